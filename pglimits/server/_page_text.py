"""How the page writes what it shows: numbers, durations, holders, and the shapes of bars and sparklines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

from .. import _words

_NOTHING = "\u2013"
_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s"))


def number(value: float | None) -> str:
    """A number without a tail of zeros; nothing is a dash."""
    return _NOTHING if value is None else _words.number(value)


def exact(value: float) -> str:
    """A number as somebody typed it, for a field of a form."""
    return f"{value:.10g}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them, short: ``4m 58s``. ``page.js`` counts on in the same words."""
    if seconds is None:
        return _NOTHING
    whole = max(int(seconds), 0)
    for size, unit, smaller, smaller_unit in _UNITS:
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size}{unit}" + (f" {rest}{smaller_unit}" if rest else "")
    return f"{whole}s"


def moment(at: datetime | None) -> str:
    """A timestamp in UTC; ``page.js`` writes it in the reader's own zone."""
    return _NOTHING if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def iso(at: datetime) -> str:
    return at.astimezone(UTC).isoformat()


def who(holder: Any) -> str:
    """A holder as one short line."""
    return "unknown" if holder is None else _words.who(holder)


def by_whom(by: Any) -> str:
    """Who made a change: on whose behalf, else the session's user, with its application and address."""
    if not isinstance(by, dict):
        return "unknown" if by is None else who(by)
    name = by.get("for") or by.get("user") or "unknown"
    rest = [str(by[each]) for each in ("application", "address") if by.get(each)]
    return f"{name} ({', '.join(rest)})" if rest else str(name)


def sentence(text: str | None) -> str:
    """A sentence that begins with a capital; nothing is a dash."""
    return text[:1].upper() + text[1:] if text else _NOTHING


def is_spaced(text: Any) -> bool:
    """Whether a text has spaces that HTML would not show: at its ends, or several side by side."""
    return isinstance(text, str) and text != " ".join(text.split())


def quoted(name: str) -> str:
    """A name in a sentence, where its spaces are to be seen."""
    return f'"{name}"' if is_spaced(name) else name


def value(of: Any) -> str:
    """A property of a limit, before or after it was changed."""
    if of is None or of == "":
        return "none"
    if isinstance(of, bool):
        return "yes" if of else "no"
    if isinstance(of, int | float):
        return exact(of)
    return of if isinstance(of, str) else json.dumps(of, ensure_ascii=False)


def segment(name: str) -> str:
    """A name as one segment of a path."""
    return quote(name, safe="")


def query(**given: Any) -> str:
    """The part of a URL behind its path, without what is not set. Empty where nothing is."""
    kept = {name: value for name, value in given.items() if value not in (None, "")}
    return "?" + urlencode(kept, quote_via=quote) if kept else ""


def share(part: float, whole: float) -> float:
    """Percent of a bar, from 0 to 100, with one decimal."""
    if whole <= 0:
        return 100.0 if part > 0 else 0.0
    return round(min(max(part / whole, 0.0), 1.0) * 100, 1)


def sparkline(values: Sequence[float | None] | None, top: float) -> dict[str, str] | None:
    """Paths of a line and of the area below it, in a box of 100 by 24; none where nothing is known."""
    known = [value for value in values or () if value is not None]
    if not values or not known:
        return None
    highest = max(top, *known) or 1.0
    step = 100 / max(len(values) - 1, 1)
    line: list[str] = []
    area: list[str] = []
    run: list[tuple[float, float]] = []
    for index, value in enumerate([*values, None]):
        if value is not None:
            run.append((round(index * step, 1), round(23 - value / highest * 22, 1)))
            continue
        if run:
            if len(run) == 1:
                run.insert(0, (round(run[0][0] - 4, 1), run[0][1]))  # one moment alone is a short line
            points = " ".join(f"{x:g},{y:g}" for x, y in run)
            line.append(f"M{points}")
            area.append(f"M{run[0][0]:g},24 L{points} L{run[-1][0]:g},24 Z")
        run = []
    return {"line": " ".join(line), "area": " ".join(area), "last": number(known[-1]), "most": number(max(known))}
