"""Calls of pglimits.* for the SQL tests, in few words, and what must hold of the tables at any time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import namedtuple_row

KINDS = {
    "slots": "int", "key": "text", "keys": "text[]", "timeout_seconds": "float8", "lease_duration": "float8",
    "priority": "int", "holder": "jsonb", "lease_id": "uuid", "strict": "boolean", "channel": "text",
    "for_rate": "boolean", "clamp": "boolean",
}  # fmt: skip
FOREVER = None


class Clock(Protocol):
    """The clock of the test's database, which the fixture `clock` puts in place of pglimits._now()."""

    def advance(self, seconds: float) -> None: ...
    def freeze(self, at: datetime | None = None) -> datetime: ...
    def now(self) -> datetime: ...


class Session:
    """One connection, in autocommit mode."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection
        self.connection.row_factory = namedtuple_row
        self.pid = connection.info.backend_pid
        self.notices: list[str] = []
        connection.add_notice_handler(lambda notice: self.notices.append(notice.message_primary or ""))

    def all(self, query: str, *parameters: Any) -> list[Any]:
        cursor = self.connection.execute(query.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []

    def one(self, query: str, *parameters: Any) -> Any:
        rows = self.all(query, *parameters)
        assert len(rows) == 1, rows
        return rows[0]

    def value(self, query: str, *parameters: Any) -> Any:
        return self.one(query, *parameters)[0]

    def run(self, query: str, *parameters: Any) -> None:
        self.all(query, *parameters)

    def call(self, function: str, names: str | Sequence[str], **arguments: Any) -> Any:
        """One of the functions that have a sister for several limits."""
        several = not isinstance(names, str)
        texts = ["%s::text[]" if several else "%s::text"]
        values: list[Any] = [list(names) if several else names]
        for name, value in arguments.items():
            kind = KINDS[name]
            if several and name in ("slots", "keys"):
                kind = kind.removesuffix("[]") + "[]"
                value = value if isinstance(value, list) else [value]
            texts.append(f"{name} => %s::{kind}")
            values.append(json.dumps(value) if kind == "jsonb" and value is not None else value)
        function += "_all" if several else ""
        return self.one(f"select * from pglimits.{function}({', '.join(texts)})", *values)

    def acquire(self, names: str | Sequence[str], **arguments: Any) -> Any:
        return self.call("acquire", names, **arguments)

    def rate_limit(self, names: str | Sequence[str], **arguments: Any) -> Any:
        return self.call("rate_limit", names, **arguments)

    def peek(self, names: str | Sequence[str], **arguments: Any) -> Any:
        return self.call("peek", names, **arguments)

    def release(self, lease_id: UUID | str) -> bool:
        return bool(self.value("select pglimits.release(%s::uuid)", lease_id))

    def renew(self, lease_id: UUID | str, lease_duration: float | None = None) -> bool:
        return bool(self.value("select pglimits.renew(%s::uuid, %s::float8)", lease_id, lease_duration))

    def settle(self, lease_id: UUID | str, name: str, slots: int, key: str = "") -> bool:
        return bool(self.value("select pglimits.settle(%s::uuid, %s, %s::int, %s)", lease_id, name, slots, key))

    def watch(self, *lease_ids: UUID | str) -> list[Any]:
        return self.all("select * from pglimits._watch(%s::uuid[], false)", [str(each) for each in lease_ids])

    def watch_one(self, lease_id: UUID | str) -> Any:
        rows = self.watch(lease_id)
        assert len(rows) == 1, rows
        return rows[0]

    def beat(self, channel: str) -> float:
        return float(self.value("select pglimits._beat(%s)", channel))

    def create(self, name: str, limit: int, rate: float = 0, **more: Any) -> str:
        texts = "".join(f", {argument} => %s" for argument in more)
        self.run(f"select pglimits.create_limit(%s, %s, %s::float8{texts})", name, limit, rate, *more.values())
        return name

    def update(self, name: str, **changes: Any) -> None:
        kinds = {"slot_decay_per_second": "float8", "limit": "int", "max_waiters": "int", "active": "boolean"}
        texts = "".join(f', "{argument}" => %s::{kinds.get(argument, "text")}' for argument in changes)
        self.run(f"select pglimits.update_limit(%s{texts})", name, *changes.values())

    def delete(self, name: str) -> None:
        self.run("select pglimits.delete_limit(%s)", name)

    def adjust(self, name: str, slots: int, key: str = "") -> float:
        return float(self.value("select pglimits.adjust(%s, %s, %s)", name, slots, key))

    def reset(self, name: str, key: str | None = None) -> int:
        return int(self.value("select pglimits.reset(%s, %s)", name, key))

    def sweep(self, idle_seconds: float = 3600) -> Any:
        return self.one("select * from pglimits.sweep(idle_seconds => %s::float8)", idle_seconds)

    def limit(self, name: str) -> Any:
        return self.one("select * from pglimits.limits where name = %s", name)

    def holders(self, name: str | None = None) -> list[Any]:
        return self.all("select * from pglimits.holders where name = coalesce(%s, name) order by fence", name)

    def waiters(self, name: str | None = None) -> list[Any]:
        return self.all(
            "select * from pglimits.waiters where name = coalesce(%s, name) order by name, key, position", name
        )

    def serves(self, name: str, count: int, **arguments: Any) -> list[Any]:
        """Acquire so many times; every one of them has to be granted."""
        answers = [self.acquire(name, **arguments) for _ in range(count)]
        assert [answer.status for answer in answers] == ["granted"] * count
        return answers

    def queue(self, name: str | Sequence[str], **arguments: Any) -> UUID:
        """Join the queue of a limit that is full; returns the id to watch."""
        lease_id = arguments.pop("lease_id", None) or uuid4()
        answer = self.acquire(name, lease_id=lease_id, **{"timeout_seconds": FOREVER, **arguments})
        assert answer.status == "queued", answer
        assert answer.lease_id == UUID(str(lease_id))
        return UUID(str(lease_id))

    @contextmanager
    def transaction(self, how: str = "") -> Iterator[None]:
        self.run(f"begin {how}")
        try:
            yield
        except BaseException:
            self.run("rollback")
            raise
        self.run("commit")


class Db:
    """The test's database: sessions, and calls in the background."""

    def __init__(
        self, connect: Callable[..., psycopg.Connection[Any]], wait_until: Callable[..., Any], pool: ThreadPoolExecutor
    ) -> None:
        self._connect = connect
        self._pool = pool
        self.wait_until = wait_until
        self.main = Session(connect())

    def session(self, **options: Any) -> Session:
        return Session(self._connect(**options))

    def start(self, work: Callable[[Session], Any], session: Session | None = None) -> tuple[Future[Any], Session]:
        """Run that in the background, in a session of its own."""
        session = session or self.session()
        return self._pool.submit(work, session), session

    def blocked(self, pid: int) -> bool:
        return bool(
            self.main.value("select count(*) from pg_stat_activity where pid = %s and wait_event_type = 'Lock'", pid)
        )

    def start_blocked(self, work: Callable[[Session], Any]) -> tuple[Future[Any], Session]:
        """Run that in the background, and wait until it waits for a lock."""
        future, session = self.start(work)
        self.wait_until(lambda: future.done() or self.blocked(session.pid))
        assert not future.done(), f"it did not wait for a lock: {future.exception() or future.result()}"
        return future, session

    def together(self, works: Sequence[Callable[[Session], Any]]) -> list[Any]:
        """Run all of them at the same time, each in a session of its own, and return what they return."""
        sessions = [self.session() for _ in works]
        futures = [self._pool.submit(work, session) for work, session in zip(works, sessions, strict=True)]
        try:
            # What went wrong with one of them, rather than that others wait for it in vain.
            done, _ = wait(futures, timeout=60, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result(timeout=1) for future in futures]
        finally:
            for session in sessions:
                session.connection.cancel_safe()
            wait(futures, timeout=20)
            for session in sessions:
                session.connection.close()

    def consistent(self) -> None:
        check_consistent(self.main)


def member(db: Db, role: str | None, name: str) -> Session:
    """A session of a login role that is a member of nothing but that."""
    db.main.run(f"drop role if exists {name}")
    db.main.run(f"create role {name} login" + (f" in role {role}" if role else ""))
    session = db.session()
    session.run(f"set session authorization {name}")
    return session


@contextmanager
def fails(sqlstate: str, *words: str) -> Iterator[None]:
    """The block has to fail with that SQLSTATE, and a message with those words in it."""
    with pytest.raises(psycopg.Error) as caught:
        yield
    message = caught.value.diag.message_primary or str(caught.value)
    assert caught.value.diag.sqlstate == sqlstate, f"{caught.value.diag.sqlstate}: {message}"
    for word in words:
        assert word in message, message


def check_consistent(session: Session) -> None:
    """What the states say and what is in the other tables agrees."""
    wrong = session.all(
        """
        select s.limit_id, s.key, s.held, s.waiting, s.waiting_slots, l.slots, q.waiting as in_queue,
               q.slots as queue_slots
        from pglimits.states s
        left join pglimits.configs c on c.limit_id = s.limit_id
        cross join lateral (
          select coalesce(sum(l.slots), 0) as slots, coalesce(min(l.expires_at), 'infinity') as first
          from pglimits.leases l where l.limit_id = s.limit_id and l.key = s.key) l
        cross join lateral (
          select count(*) as waiting, coalesce(sum(q.slots), 0) as slots,
                 coalesce(bool_and((q.rank, q.arrival) >= (s.head_rank, s.head_arrival)), true) as behind
          from pglimits.queue q where q.limit_id = s.limit_id and q.key = s.key) q
        where s.held <> l.slots or (s.waiting, s.waiting_slots) <> (q.waiting, q.slots) or s.next_expiry > l.first
           or not q.behind or s.generation <> s.version / 16
           or (s."limit", s.slot_decay_per_second, s.active, s.max_waiters, s.decayed, s.decayed_at) is distinct from
              (c."limit", c.slot_decay_per_second, c.active, c.max_waiters, c.decayed, c.decayed_at)
        """
    )
    assert wrong == []
    assert session.all(
        "select limit_id, key from pglimits.states group by limit_id, key having count(*) > 1"
    ) == []  # fmt: skip
    for table in ("leases", "queue", "known_keys"):
        strays = f"select count(*) from pglimits.{table} x where not exists (select from pglimits.states s"
        assert session.value(f"{strays} where s.limit_id = x.limit_id and s.key = x.key)") == 0


def tables(session: Session) -> dict[str, list[Any]]:
    """Everything that is stored, to see that nothing was changed (xmin sees a rewrite of the same)."""
    return {
        table: session.all(f"select x.xmin::text, x::text from pglimits.{table} x order by x::text")
        for table in ("meta", "configs", "states", "leases", "queue")
    }


@contextmanager
def changes_nothing(session: Session) -> Iterator[None]:
    before = tables(session)
    yield
    assert tables(session) == before
