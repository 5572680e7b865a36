"""The database's own view of its limits, in Prometheus' words: ``/metrics`` of the server, and ``pglimits metrics``.

Label ``limit``, never ``key``: keys are without number. Needs prometheus-client.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

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
  select l.name, l."limit", l.active, l.slot_decay_per_second, l.held, l.level, l.waiting,
         c.grants, c.granted_slots, c.releases, c.expired_leases, c.force_released_leases, c.held_slot_seconds,
         c.waited_seconds, c.leases, c.keys,
         coalesce(greatest(date_part('epoch', pglimits._now() - c.oldest_waiting_since), 0), 0) as oldest
  from pglimits.limits l
  join pglimits.counters c on c.name = l.name
) l on true
"""
"""A row for each limit, or one without a name."""


def exposition(rows: Sequence[Row] | None, accept: str = "") -> tuple[bytes, str]:
    """What ``QUERY`` has returned, or None if the database could not be asked, as a scrape is answered.

    accept: the header of whoever asks; by default the text format. Returns the body and its content type.
    """
    registry = CollectorRegistry()
    registry.register(_Answered(rows))
    encoder, content_type = choose_encoder(accept)
    return encoder(registry), content_type


def samples(rows: Sequence[Row] | None) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [
        {"name": sample.name, "labels": sample.labels, "value": sample.value}
        for metric in _Answered(rows).collect()
        for sample in metric.samples
    ]


class _Answered:
    """A collector of one answer."""

    def __init__(self, rows: Sequence[Row] | None) -> None:
        self._rows = rows

    def describe(self) -> Iterable[Metric]:
        """Nothing that a registry has to know before."""
        return []

    def collect(self) -> Iterator[Metric]:
        rows = self._rows
        up = rows is not None
        facts: Row = rows[0] if rows else {}
        yield _gauge("pglimits_up", "Whether the database answers: 1, or 0.", float(up))
        versions = {"version": __version__}
        if facts:
            versions |= {"database_version": facts["version"], "postgresql_version": facts["postgresql"]}
        yield InfoMetricFamily("pglimits", "Versions: of this program, of what is installed, of the server.", versions)
        swept = facts.get("last_sweep")
        if swept is not None:
            text = "When the database was swept last, in seconds since 1970; absent if it never was."
            yield _gauge("pglimits_last_sweep_timestamp_seconds", text, swept)
        limits = [row for row in rows or [] if row["name"] is not None]
        for name, (column, text) in GAUGES.items():
            gauge = GaugeMetricFamily(f"pglimits_{name}", text, labels=["limit"])
            for row in limits:
                gauge.add_metric([row["name"]], float(row[column]))
            yield gauge
        for name, (column, text) in COUNTERS.items():
            counter = CounterMetricFamily(f"pglimits_{name}", text, labels=["limit"])
            for row in limits:
                counter.add_metric([row["name"]], float(row[column]))
            yield counter


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
