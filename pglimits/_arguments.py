"""Checks of what callers pass. The SQL functions check again; here the error comes before anything is sent."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import InvalidArgument

Counts = Mapping[str, int] | Mapping[tuple[str, str], int] | Mapping[str | tuple[str, str], int]
"""Slots by limit, or by (limit, key)."""

Names = str | Sequence[str | tuple[str, str]] | Counts
"""One limit, several, or a count (and, where wanted, a key) for each: ``{("tenant", "t42"): 1, "everyone": 1}``."""

_MAX_INT = 2**31 - 1
_MAX_DURATION = 366 * 86400.0


@dataclass(frozen=True, slots=True)
class Part:
    """What is wanted of one limit."""

    name: str
    key: str
    slots: int


def parts(names: Names, occupy: int, key: str) -> tuple[Part, ...]:
    """What is wanted of each limit, in the order of the names."""
    slots = whole("occupy", occupy, least=1)
    key = text("key", key)
    if isinstance(names, str):
        return (Part(text("names", names), key, slots),)
    if isinstance(names, Mapping):
        if slots != 1:
            raise InvalidArgument(f"occupy must be left out when names gives a count for each limit, not {occupy!r}")
        counted = [(name, whole(f"the count of {name!r}", count, least=1)) for name, count in names.items()]
    elif isinstance(names, Sequence) and not isinstance(names, (bytes, bytearray)):
        counted = [(name, slots) for name in names]
    else:
        raise InvalidArgument(f"names must be a name, a list of names or a mapping to counts, not {names!r}")
    if not counted:
        raise InvalidArgument("names must not be empty")
    return tuple(_part(name, key, count) for name, count in counted)


def _part(name: object, key: str, slots: int) -> Part:
    if isinstance(name, tuple):
        if len(name) != 2 or not all(isinstance(item, str) for item in name):
            raise InvalidArgument(f"names must be strings or (name, key) pairs, not {name!r}")
        return Part(text("names", name[0]), text("key", name[1]), slots)
    return Part(text("names", name), key, slots)


def text(argument: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(f"{argument} must be a string, not {value!r}")
    if "\x00" in value:
        raise InvalidArgument(f"{argument} must not contain control characters: {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{argument} must be valid Unicode: {value!r}") from None
    return str.__str__(value)  # of an enum's member, its value


def optional_text(argument: str, value: object) -> str | None:
    return None if value is None else text(argument, value)


def whole(argument: str, value: object, *, least: int = -_MAX_INT, most: int = _MAX_INT) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{argument} must be a whole number, not {value!r}")
    if not least <= value <= most:
        raise InvalidArgument(f"{argument} must be from {least} to {most}, not {value!r}")
    return int(value)


def optional_whole(argument: str, value: object, *, least: int = -_MAX_INT) -> int | None:
    return None if value is None else whole(argument, value, least=least)


def flag(argument: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{argument} must be True or False, not {value!r}")
    return value


def optional_flag(argument: str, value: object) -> bool | None:
    return None if value is None else flag(argument, value)


def number(argument: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgument(f"{argument} must be a number, not {value!r}")
    try:
        converted = float(value)
    except OverflowError:
        raise InvalidArgument(f"{argument} is too large: {value!r}") from None
    if math.isnan(converted):
        raise InvalidArgument(f"{argument} must be a number, not {value!r}")
    return converted


def timeout(value: object, max_retries: object) -> float | None:
    """Seconds to wait; None waits for ever. ``max_retries=0`` tries once; another number changes nothing.

    What is left of somebody's time may be next to nothing: below a millisecond it tries once, as 0 does.
    """
    seconds = None if value is None else number("timeout_seconds", value)
    if seconds is not None and seconds < 0:
        raise InvalidArgument(f"timeout_seconds must be at least 0, or None, not {value!r}")
    if optional_whole("max_retries", max_retries, least=0) == 0 or (seconds is not None and seconds < 0.001):
        return 0.0
    return None if seconds is None or seconds > _MAX_DURATION else seconds


def lease_duration(value: object) -> float:
    seconds = number("lease_duration", value)
    if not 1 <= seconds <= _MAX_DURATION:
        raise InvalidArgument(f"lease_duration must be from 1 second to 366 days, not {value!r}")
    return seconds


def rate(value: object) -> float:
    per_second = number("slot_decay_per_second", value)
    if not 0 <= per_second <= 1e9:
        raise InvalidArgument(f"slot_decay_per_second must be from 0 to 1000000000, not {value!r}")
    return per_second


def holder(value: object) -> str:
    """A holder as JSON. Pydantic models, such as Prefect's lease holders, are taken as well."""
    dump = getattr(value, "model_dump", None)
    plain = dump(mode="json") if callable(dump) else value
    try:
        encoded = json.dumps(plain, allow_nan=False, ensure_ascii=False)
        encoded.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"holder must be JSON: {error}") from None
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", encoded):
        raise InvalidArgument("holder must not contain the character U+0000")
    return encoded
