"""An event as one line for people."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from . import _output

if TYPE_CHECKING:
    from pglimits import Event


def line(event: Event) -> str:
    """When, what, of which limit, and what there is to say about it."""
    where = event.name if not event.key else f"{event.name} key={event.key}"
    parts = [where, *filter(None, (_lease(event), _change(event.old, event.new), _by(event)))]
    return _output.one_line(f"{_output.moment(event.at)}  {event.kind:<14}  {'  '.join(parts)}")


def _lease(event: Event) -> str:
    if event.slots is None:
        return ""
    held = "" if event.held_seconds is None else f" for {_output.duration(event.held_seconds)}"
    return f"{_output.count(event.slots, 'slot')}{held}, {_output.who(event.holder)}, lease {event.lease_id}"


def _change(old: Any, new: Any) -> str:
    """``limit 10 → 20``; of a limit that was created, what is worth a word."""
    if not isinstance(new, dict):
        return ""
    if not isinstance(old, dict):
        said = {field: value for field, value in new.items() if field != "name" and value not in _nothing(field)}
        return ", ".join(f"{field} {_value(value)}" for field, value in said.items())
    return ", ".join(f"{field} {_value(old.get(field))} → {_value(value)}" for field, value in new.items())


def _nothing(field: str) -> tuple[Any, ...]:
    return {"active": (True,), "slot_decay_per_second": (0,)}.get(field, (None,))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _by(event: Event) -> str:
    """Who did it; nobody does what a lease's end does."""
    if not isinstance(event.by, dict) or event.kind in ("expired", "lost"):
        return ""
    by = event.by
    words = [f"by {by.get('user') or '?'}"]
    if by.get("application"):
        words.append(f"({by['application']})")
    if by.get("address"):
        words.append(f"at {by['address']}")
    if by.get("for"):
        words.append(f"for {by['for']}")
    return " ".join(words)
