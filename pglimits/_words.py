"""How people are told what there is, by terminal and page alike: numbers, holders, and how a limit is doing."""

from __future__ import annotations

import json
from typing import Any, Literal, Protocol, get_args

OFF, SHUT, BACKLOGGED, AT_CAPACITY, ACTIVE, IDLE = "off", "shut", "backlogged", "at capacity", "active", "idle"
STATES = (BACKLOGGED, AT_CAPACITY, ACTIVE, IDLE, SHUT, OFF)
"""In the order in which they want attention."""

EventKind = Literal["created", "updated", "deleted", "reset", "expired", "lost", "force_released"]
EVENT_KINDS: tuple[EventKind, ...] = get_args(EventKind)


class Used(Protocol):
    """A limit and how it is used now."""

    @property
    def limit(self) -> int: ...
    @property
    def held(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def active(self) -> bool: ...
    @property
    def slot_decay_per_second(self) -> float: ...
    @property
    def level(self) -> float: ...
    @property
    def keys(self) -> int: ...


def number(value: float) -> str:
    """A number without a tail of zeros."""
    return f"{value:,.0f}" if abs(value - round(value)) < 0.005 else f"{value:,.2f}"


def rate(per_second: float) -> str:
    """A decay rate, exact; none for a concurrency limit."""
    return f"{per_second:,.10g}/s" if per_second else "-"


def count(how_many: float, singular: str, plural: str | None = None) -> str:
    """``1 slot``, ``2 slots``."""
    return f"{number(how_many)} {singular if how_many == 1 else plural or singular + 's'}"


def who(holder: Any) -> str:
    """A holder as one line: program or application, pid, host; else its JSON."""
    if isinstance(holder, str):
        return holder
    if not isinstance(holder, dict):
        return json.dumps(holder, ensure_ascii=False)
    rest = dict(holder)
    if "application" in rest and "program" not in rest:
        rest["program"] = rest.pop("application") or None
    host, program, pid = (rest.pop(name, None) for name in ("host", "program", "pid"))
    if rest.get("thread") == "MainThread":
        del rest["thread"]
    words = [] if program is None else [str(program)]
    if pid is not None:
        words.append(f"(pid {pid})")
    if host is not None:
        words.append(f"on {host}")
    words += [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in rest.items()]
    return " ".join(words) or "{}"


def room(used: Used) -> int:
    """Slots of all keys together: each has the whole limit."""
    return used.limit * max(used.keys, 1)


def state(used: Used, oldest: str = "") -> tuple[str, str]:
    """One word for what a limit does right now, and why. oldest: how long somebody has waited, in words."""
    slots, free = room(used), room(used) - used.held
    keyed = f" in {count(used.keys, 'key')}" if used.keys > 1 else ""
    waiting = f"{number(used.waiting)} waiting" if used.waiting else ""
    if not used.active:
        return OFF, "not enforced: every request goes through"
    if used.limit == 0:
        return SHUT, "its limit is 0: nobody gets in" + (f", {waiting}" if waiting else "")
    if used.waiting:
        return BACKLOGGED, waiting + (f", the oldest for {oldest}" if oldest else "")
    if free <= 0:
        return AT_CAPACITY, f"every slot is held{keyed}"
    if used.slot_decay_per_second and used.level > slots - 1:
        return AT_CAPACITY, f"no whole slot is left{keyed}, {rate(used.slot_decay_per_second)} come back"
    if used.held:
        return ACTIVE, f"{number(free)} of {count(slots, 'slot')} free{keyed}"
    if used.level > 0:
        return ACTIVE, f"{number(used.level)} used and not decayed yet{keyed}"
    return IDLE, "nobody holds or waits"
