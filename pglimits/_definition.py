"""What somebody decides about a limit, and what checks that: the same for files of limits and for Terraform.

Values are checked by what checks the arguments of `Limiter.create`. What only the database knows (names, ranges,
lengths) it says itself: `Limiter._limit_faults`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import _arguments
from .errors import InvalidArgument
from .models import Limit


@dataclass(frozen=True, slots=True)
class Definition:
    """What somebody has decided about a limit."""

    limit: int
    slot_decay_per_second: float = 0.0
    active: bool = True
    max_waiters: int | None = None
    description: str | None = None


CHECKS: dict[str, Callable[[str, object], Any]] = {
    "limit": partial(_arguments.whole, least=0),
    "slot_decay_per_second": lambda _, value: _arguments.rate(value) + 0.0,
    "active": _arguments.flag,
    "max_waiters": partial(_arguments.optional_whole, least=0),
    "description": lambda argument, value: _arguments.optional_text(argument, value) or None,
}
"""What may be decided about a limit, and what checks it. Each raises InvalidArgument."""


def definition(limit: Limit) -> Definition:
    """What was decided about a limit that is there."""
    return Definition(limit.limit, limit.slot_decay_per_second, limit.active, limit.max_waiters, limit.description)


def checked_definition(fields: Mapping[str, Any]) -> Definition:
    """All fields of a limit, checked. Raises InvalidArgument."""
    names = {field.name for field in dataclasses.fields(Definition)}
    if set(fields) != names:
        raise InvalidArgument(f"a limit must have just the fields {', '.join(sorted(names))}")
    return Definition(**{field: CHECKS[field](field, value) for field, value in fields.items()})
