"""The database's own view of its limits, in Prometheus' words: ``/metrics`` of the server, and ``pglimits metrics``.

Label ``limit``, never ``key``: keys are without number. Written by hand, as a scrape of ten thousand limits has 160,000
lines: prometheus-client takes seconds for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from . import __version__

Row: TypeAlias = Mapping[str, Any]

GAUGES = {
    "limit_slots": ("limit", "Slots of the limit; of each key, where it has keys."),
    "limit_active": ("active", "Whether the limit is enforced: 1, or 0."),
    "decay_slots_per_second": ("slot_decay_per_second", "Slots that come back each second; 0: a concurrency limit."),
    "held_slots": ("held", "Slots under live leases, over all keys."),
    "level_slots": ("level", "Slots that a rate limit has used and that have not decayed yet, over all keys."),
    "leases": ("leases", "Live leases."),
    "keys": ("keys", "Keys that were used and not swept since."),
    "waiters": ("waiting", "Requests that stand in line."),
    "oldest_waiter_age_seconds": ("oldest", "Seconds that the oldest of them has waited; 0 if there is none."),
}
"""What a limit is now: the name without its prefix, the column, the text."""
COUNTERS = {
    "grants": ("grants", "Requests that were granted."),
    "granted_slots": ("granted_slots", "Slots that were granted."),
    "releases": ("releases", "Leases that were released."),
    "expired_leases": ("expired_leases", "Leases that ended unreleased and unrenewed: their holder never came back."),
    "force_released_leases": ("force_released_leases", "Leases that an administrator ended."),
    "held_slot_seconds": ("held_slot_seconds", "Slots times the seconds that they were held."),
    "waited_seconds": ("waited_seconds", "Seconds that granted requests had waited, of all together."),
}
"""What has happened since the limit was made; the name without its prefix and ``_total``."""

QUERY = """
select f.*, l.*
from (
  select pglimits.version() as version, current_setting('server_version') as postgresql,
         date_part('epoch', pglimits.last_sweep()) as last_sweep
) f
left join (
  select c.name, c."limit", c.active, c.slot_decay_per_second, c.held, c.level, c.waiting, c.grants, c.granted_slots,
         c.releases, c.expired_leases, c.force_released_leases, c.held_slot_seconds, c.waited_seconds, c.leases, c.keys,
         coalesce(greatest(date_part('epoch', pglimits._now() - c.oldest_waiting_since), 0), 0) as oldest
  from pglimits.counters c
) l on true
"""
"""A row for each limit, or one without a name."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def exposition(rows: Sequence[Row] | None, refusals: Mapping[tuple[str, str], int] | None = None) -> str:
    """What ``QUERY`` has returned, or None if the database could not be asked, in the text format of Prometheus.

    refusals: of a server, by limit and operation.
    """
    lines = []
    for name, kind, text, samples in (*_metrics(rows, _written), *_refusals(refusals)):
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def samples(rows: Sequence[Row] | None) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [
        {"name": name, "labels": labels, "value": value}
        for name, _, _, found in _metrics(rows, dict)
        for labels, value in found
    ]


def _written(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items()) + "}"


_Metric: TypeAlias = tuple[str, str, str, list[tuple[Any, Any]]]


def _metrics(rows: Sequence[Row] | None, labelled: Callable[[Mapping[str, str]], Any]) -> Iterator[_Metric]:
    """Name, kind, text and samples of each metric."""
    facts: Row = rows[0] if rows else {}
    yield (
        "pglimits_up",
        "gauge",
        "Whether the database answers, and may be read: 1, or 0.",
        [(labelled({}), 0 if rows is None else 1)],
    )
    versions = {"version": __version__}
    if facts:
        versions |= {"database_version": facts["version"], "postgresql_version": facts["postgresql"]}
    text = "Versions of this program, of what is installed in the database, and of its server."
    yield "pglimits_info", "gauge", text, [(labelled(versions), 1)]
    if rows is None:
        return
    if facts["last_sweep"] is not None:
        text = "When the database was swept last, in seconds since 1970; absent if it never was."
        yield "pglimits_last_sweep_timestamp_seconds", "gauge", text, [(labelled({}), facts["last_sweep"])]
    limits = [(labelled({"limit": row["name"]}), row) for row in rows if row["name"] is not None]
    for name, (column, text) in GAUGES.items():
        yield f"pglimits_{name}", "gauge", text, [(labels, _number(row[column])) for labels, row in limits]
    for name, (column, text) in COUNTERS.items():
        yield f"pglimits_{name}_total", "counter", text, [(labels, _number(row[column])) for labels, row in limits]


def _refusals(refusals: Mapping[tuple[str, str], int] | None) -> Iterator[_Metric]:
    if refusals is not None:
        text = "Requests that this server has refused since it started: the database writes nothing of refusals."
        found: list[tuple[Any, Any]] = [
            (_written({"limit": limit, "operation": operation}), count)
            for (limit, operation), count in sorted(refusals.items())
        ]
        yield "pglimits_server_refusals_total", "counter", text, found


def _number(value: Any) -> float | int:
    """A number of the database: what is a ``numeric`` there is a Decimal here."""
    return int(value) if isinstance(value, int) else float(value)
