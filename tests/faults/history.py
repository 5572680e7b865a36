"""A history of what processes asked and got. ``history_checker`` proves that it keeps the promises.

There are two logs. In the clients', every worker writes down what it asks, what it gets, and for how long it believes
to hold that. It does so by the database's clock, as both are on one machine. In the database's, triggers write down
every heartbeat, and every change of a lease, a place in line, a level and a limit. They do so in the transaction that
makes the change, while it has the lock of the (limit, key). An attempt has the id of its lease. What the clients
believe must lie within what the database says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import psycopg

Key: TypeAlias = tuple[int, str]  # limit_id and key
Row: TypeAlias = Mapping[str, Any]

RECORD = """
create schema history;
create table history.changes (
  seq bigserial primary key,
  tx xid8 not null default pg_current_xact_id(),
  at timestamptz not null default clock_timestamp(),
  what text not null,
  was jsonb,
  becomes jsonb
);
create function history.note() returns trigger language plpgsql security definer set search_path = '' as $$
begin
  insert into history.changes (what, was, becomes) values (
    tg_table_name,
    case when tg_op <> 'INSERT' then to_jsonb(old) end,
    case when tg_op <> 'DELETE' then to_jsonb(new) end);
  return null;
end $$;
create trigger history after insert or update or delete on pglimits.leases for each row execute function history.note();
create trigger history after insert or update or delete on pglimits.queue for each row execute function history.note();
create trigger history after insert or update or delete on pglimits.processes
  for each row execute function history.note();
create trigger history after update on pglimits.states for each row
  when (new.slot_decay_per_second > 0
        and (new.booked, new.slot_decay_per_second, new."limit", new.decayed_at)
            is distinct from (old.booked, old.slot_decay_per_second, old."limit", old.decayed_at))
  execute function history.note();
-- At the commit, as all states of the limit are locked by then: whoever decided by the old one has been noted before.
create constraint trigger history after insert or update or delete on pglimits.configs
  deferrable initially deferred for each row execute function history.note();
"""

_TIMES = ("acquired_at", "expires_at", "arrival", "decayed_at")


def record(dsn: str) -> None:
    """Have the database write down what happens to its leases, lines, levels, limits and processes."""
    with psycopg.connect(dsn) as connection:
        connection.execute(RECORD.encode())


@dataclass(frozen=True, slots=True)
class Change:
    """One row of a table before and after a change; ``at``: seconds since 1970, read under the lock."""

    seq: int
    tx: int
    at: float
    what: str  # leases, queue, states, configs or processes
    was: Row | None
    becomes: Row | None

    @property
    def row(self) -> Row:
        found = self.becomes if self.becomes is not None else self.was
        assert found is not None
        return found

    @property
    def place(self) -> Key:
        return _place(self.row)

    def by_place(self) -> list[Change]:
        """It as each (limit, key) sees it: who goes to stand in another line leaves one."""
        if self.was is None or self.becomes is None or _place(self.was) == _place(self.becomes):
            return [self]
        return [replace(self, becomes=None), replace(self, was=None)]


def _place(row: Row) -> Key:
    return int(row["limit_id"]), str(row["key"])


def is_held(row: Row) -> bool:
    """Whether a row of leases is a lease: it may be slots that are kept, or what became of a request."""
    return bool(row["fence"] and row["slots"])


@dataclass(frozen=True, slots=True)
class Said:
    """One line of a worker's log: what it did, or learned, and when (seconds since 1970)."""

    at: float
    worker: str
    attempt: str
    what: str
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class History:
    """Everything that was written down until ``end`` (seconds since 1970)."""

    changes: Sequence[Change]
    said: Sequence[Said]
    end: float


def read(dsn: str, logs: Iterable[Path] = ()) -> History:
    """The history that the database and the workers have written."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(
            "select seq, tx::text::bigint, extract(epoch from at)::float8, what, was, becomes"
            " from history.changes order by seq"
        ).fetchall()
    changes = [
        Change(seq, tx, at, what, _with_seconds(was), _with_seconds(becomes))
        for seq, tx, at, what, was, becomes in rows
    ]
    said = [line for log in logs for line in read_log(log)]
    return History(changes, sorted(said, key=lambda line: line.at), time.time())


def read_log(log: Path) -> Iterator[Said]:
    """The lines of a worker's log. Of one that was killed, the last may be torn."""
    for text in log.read_text().splitlines(keepends=True):
        if text.endswith("\n"):
            at, worker, attempt, what, more = json.loads(text)
            yield Said(at, worker, attempt, what, more)


def _with_seconds(row: dict[str, Any] | None) -> Row | None:
    if row is None:
        return None
    return row | {name: _seconds(row[name]) for name in _TIMES if name in row}


def _seconds(moment: str) -> float:
    return float("inf") if moment == "infinity" else datetime.fromisoformat(moment).timestamp()


def grants(history: History) -> Iterator[Change]:
    """The rows of leases that tell of a grant: one for each limit."""
    for change in history.changes:
        if change.what == "leases" and change.was is None and change.row["fence"]:
            yield change
