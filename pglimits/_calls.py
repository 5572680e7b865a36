"""The calls that need no waiting: what to execute, and what to make of the rows. Shared by both shells."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import UUID

from . import _arguments, _sql
from ._database import Row
from ._renewal import Lease, Renewed
from .errors import InvalidArgument, LimitNotFound
from .models import Holder, Key, Limit, Peek, Swept, Waiter

T = TypeVar("T")

_DEEPEST = 100
"""A holder nested deeper stays text, as whoever walks it would run out of stack."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One statement and how to read its rows."""

    sql: str
    params: Sequence[object]
    read: Callable[[list[Row]], T]


def _nothing(rows: list[Row]) -> None:
    return None


def create(
    name: str,
    limit: int,
    slot_decay_per_second: float,
    active: bool,
    max_waiters: int | None,
    description: str | None,
) -> Call[None]:
    return Call(
        _sql.CREATE,
        (
            _arguments.text("name", name),
            _arguments.whole("limit", limit, least=0),
            _arguments.rate(slot_decay_per_second),
            _arguments.flag("active", active),
            _arguments.optional_whole("max_waiters", max_waiters, least=0),
            _arguments.optional_text("description", description),
        ),
        _nothing,
    )


def update(
    name: str,
    limit: int | None,
    slot_decay_per_second: float | None,
    active: bool | None,
    max_waiters: int | None,
    description: str | None,
    new_name: str | None,
) -> Call[None]:
    return Call(
        _sql.UPDATE,
        (
            _arguments.text("name", name),
            _arguments.optional_whole("limit", limit, least=0),
            None if slot_decay_per_second is None else _arguments.rate(slot_decay_per_second),
            _arguments.optional_flag("active", active),
            _arguments.optional_whole("max_waiters", max_waiters, least=-1),
            _arguments.optional_text("description", description),
            _arguments.optional_text("new_name", new_name),
        ),
        _nothing,
    )


def delete(name: str) -> Call[None]:
    return Call(_sql.DELETE, (_arguments.text("name", name),), _nothing)


def get(name: str) -> Call[Limit]:
    def read(rows: list[Row]) -> Limit:
        if not rows:
            raise LimitNotFound(f"there is no limit named {name!r}")
        return Limit(*rows[0])

    return Call(_sql.LIMITS, (_arguments.text("name", name),), read)


def list_limits() -> Call[list[Limit]]:
    return Call(_sql.LIMITS, (None,), lambda rows: [Limit(*row) for row in rows])


def keys(name: str | None) -> Call[list[Key]]:
    named = _arguments.optional_text("name", name)
    return Call(_sql.KEYS, (named,), lambda rows: [Key(*row) for row in rows])


def holders(name: str | None) -> Call[list[Holder]]:
    named = _arguments.optional_text("name", name)
    return Call(_sql.HOLDERS, (named,), lambda rows: [Holder(*_with_holder(row)) for row in rows])


def _with_holder(row: Row) -> Row:
    return (*row[:4], _holder(row[4]), *row[5:])


def _holder(text: str | None) -> Any:
    """A holder from its JSON. What is too much for Python, numbers of thousands of digits for instance, stays text."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    level = [found]
    for _ in range(_DEEPEST):
        if not level:
            return found
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in _items(outer)]
    return text


def _items(found: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return found.values() if isinstance(found, dict) else found


def waiters(name: str | None) -> Call[list[Waiter]]:
    named = _arguments.optional_text("name", name)
    return Call(_sql.WAITERS, (named,), lambda rows: [Waiter(*_with_holder(row)) for row in rows])


def reset(name: str, key: str | None) -> Call[int]:
    params = (_arguments.text("name", name), _arguments.optional_text("key", key))
    return Call(_sql.RESET, params, lambda rows: int(rows[0][0]))


def adjust(name: str, slots: int, key: str) -> Call[float]:
    params = (_arguments.text("name", name), _arguments.whole("slots", slots), _arguments.text("key", key))
    return Call(_sql.ADJUST, params, lambda rows: float(rows[0][0]))


def peek(names: _arguments.Names, occupy: int, key: str, priority: int, strict: bool, for_rate: bool) -> Call[Peek]:
    parts = _arguments.parts(names, occupy, key)
    return Call(
        _sql.PEEK,
        (
            [part.name for part in parts],
            [part.slots for part in parts],
            [part.key for part in parts],
            _arguments.whole("priority", priority),
            _arguments.flag("strict", strict),
            _arguments.flag("for_rate", for_rate),
        ),
        lambda rows: Peek(*rows[0]),
    )


def renew(lease: Lease | UUID, lease_duration: float | None) -> Call[Renewed]:
    seconds = None if lease_duration is None else _arguments.lease_duration(lease_duration)
    return Call(_sql.RENEW, (None, [lease_id(lease)], seconds), lambda rows: Renewed(*rows[0]))


def sweep() -> Call[Swept]:
    return Call(_sql.SWEEP, (), lambda rows: Swept(*rows[0]))


def version() -> Call[str]:
    return Call(_sql.VERSION, (), lambda rows: str(rows[0][0]))


def lease_id(lease: Lease | UUID | str) -> UUID:
    """The id of a lease, given as itself, as a UUID, or as the text of one."""
    if isinstance(lease, Lease):
        return lease.id
    try:
        return lease if isinstance(lease, UUID) else UUID(lease)
    except (ValueError, AttributeError, TypeError):
        raise InvalidArgument(f"lease must be a Lease or the UUID of one, not {lease!r}") from None
