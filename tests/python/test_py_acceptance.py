"""What "it is done when" says, with real processes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import poolers
import psycopg
import pytest
from wrappertest import Children, Connection, WaitUntil, held, in_thread, nothing_left, value, waiting

from pglimits import Limiter


def in_order(conn: Connection) -> list[str]:
    return [row[0] for row in conn.execute("select who from turns order by fence").fetchall()]


@pytest.fixture
def turns(conn: Connection) -> None:
    conn.execute(
        "create table turns (fence bigint not null, who text not null, at timestamptz default clock_timestamp())"
    )


def test_four_processes_on_one_slot_go_round_in_the_order_of_arrival_with_equal_shares(
    limiter: Limiter, conn: Connection, children: Children, turns: None, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    conn.execute("create table stop (now boolean)")
    code = """
        import os, sys, time, psycopg
        from pglimits import Limiter
        limiter = Limiter()
        log = psycopg.connect(os.environ["SERVER_DSN"], autocommit=True)
        stopped = lambda: log.execute("select count(*) from stop").fetchone()[0]
        while not stopped():
            with limiter.concurrency("database") as lease:
                log.execute("insert into turns values (%s, %s)", [lease.fence, sys.argv[1]])
                # Hold it until the other three are in the queue.
                while not stopped() and log.execute("select waiting from pglimits.limits").fetchone()[0] < 3:
                    time.sleep(0.002)
    """
    working = [children(code, str(number)) for number in range(4)]
    wait_until(lambda: value(conn, "select count(*) from turns") >= 25, timeout=60)
    conn.execute("insert into stop values (true)")
    for child in working:
        child.end()
    grants = in_order(conn)[:25]
    shares = {who: grants.count(who) for who in "0123"}
    assert max(shares.values()) - min(shares.values()) <= 1, shares
    # Once all four are there, each comes back exactly behind the three others.
    assert all(grants[n] == grants[n - 4] for n in range(7, 25)), grants
    assert nothing_left(conn)


def test_eight_processes_started_at_intervals_are_granted_in_exactly_that_order(
    limiter: Limiter, conn: Connection, children: Children, turns: None, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    lease = limiter.acquire("database")
    code = """
        import os, sys, psycopg
        from pglimits.sync import concurrency
        print("ready")
        input()
        with concurrency("database") as lease, psycopg.connect(os.environ["SERVER_DSN"], autocommit=True) as log:
            log.execute("insert into turns values (%s, %s)", [lease.fence, sys.argv[1]])
    """
    started = [children(code, str(number)) for number in range(8)]
    for child in started:
        child.expect("ready")
    order = random.sample(range(8), 8)
    for place, number in enumerate(order):
        started[number].tell()
        wait_until(lambda place=place: waiting(conn) == place + 1)
    limiter.release(lease)
    for child in started:
        child.end()
    assert in_order(conn) == [str(number) for number in order]


def test_six_processes_share_a_rate_exactly_never_faster_and_never_slower(
    limiter: Limiter, conn: Connection, children: Children, connect: Any, wait_until: WaitUntil
) -> None:
    """Every moment that somebody in line was granted is noted, and every time at which a process went on."""
    limiter.create("api", 3, slot_decay_per_second=5)
    conn.execute("create table went (at timestamptz default clock_timestamp())")
    conn.execute("create table given (lease_id uuid primary key, moment timestamptz)")
    code = """
        import os, psycopg
        from pglimits.sync import rate_limit
        with psycopg.connect(os.environ["SERVER_DSN"], autocommit=True) as log:
            log.execute("select 1")
            print("ready")
            input()
            while log.execute("select count(*) from went").fetchone()[0] < 50:
                rate_limit("api")
                log.execute("insert into went default values")
    """
    working = [children(code) for _ in range(6)]
    for child in working:
        child.expect("ready")
    began = value(conn, "select clock_timestamp()")
    for child in working:
        child.tell()

    def note() -> bool:
        conn.execute(
            "insert into given select lease_id, acquired_at from pglimits.leases where slots = 0 and fence > 0"
            " on conflict do nothing"
        )
        return int(value(conn, "select count(*) from went")) >= 50

    wait_until(note, timeout=60)
    for child in working:
        child.end()
    note()
    given = [row[0] for row in conn.execute("select moment from given order by moment").fetchall()]
    went = [row[0] for row in conn.execute("select at from went order by at").fetchall()]
    # All but the first few stood in line.
    assert len(given) >= 40
    # Five a second, no more and no fewer, give or take the burst of 3.
    for one, two in itertools.combinations(range(len(given)), 2):
        assert abs((given[two] - given[one]).total_seconds() - (two - one) / 5) <= 3 / 5 + 1e-4
    # Nobody went before its moment.
    assert all(at >= moment for at, moment in zip(went[-len(given) :], given, strict=True))
    # And so, in no window since the start, more than the burst in advance.
    for count, at in enumerate(went, start=1):
        assert count <= 3 + 5 * (at - began).total_seconds() + 1e-6
    assert nothing_left(conn)


def test_sixteen_processes_on_random_subsets_of_six_limits_never_deadlock_and_never_exceed(
    limiter: Limiter, conn: Connection, children: Children, wait_until: WaitUntil
) -> None:
    conn.execute("create table in_use (name text primary key, most int not null, n int default 0, peak int default 0)")
    for number in range(6):
        limiter.create(f"limit-{number}", number % 3 + 1)
        conn.execute("insert into in_use (name, most) values (%s, %s)", [f"limit-{number}", number % 3 + 1])
    deadlocks = value(conn, "select deadlocks from pg_stat_database where datname = current_database()")
    code = """
        import os, random, sys, time, psycopg
        from pglimits import AcquireTimeout
        from pglimits.sync import concurrency
        log = psycopg.connect(os.environ["SERVER_DSN"], autocommit=True)
        names = [f"limit-{n}" for n in range(6)]
        print("ready")
        input()
        until, rounds, refused = time.monotonic() + 8, 0, 0
        while time.monotonic() < until:
            chosen = random.sample(names, random.randint(1, 4))
            try:
                with concurrency(chosen, timeout_seconds=random.choice([None, None, 0.2, 0])):
                    for name in sorted(chosen):
                        log.execute("update in_use set n = n + 1, peak = greatest(peak, n + 1) where name = %s", [name])
                    for name in sorted(chosen):
                        log.execute("update in_use set n = n - 1 where name = %s", [name])
                rounds += 1
            except AcquireTimeout:
                refused += 1
        print(rounds, refused)
    """
    working = [children(code) for _ in range(16)]
    for child in working:
        child.expect("ready")
    for child in working:
        child.tell()
    ends = [child.end().split() for child in working]
    assert sum(int(rounds) for rounds, _ in ends) > 100
    # The limits were really fought over.
    assert sum(int(refused) for _, refused in ends) > 0
    assert conn.execute("select name, n, peak, most from in_use where n <> 0 or peak > most").fetchall() == []
    assert nothing_left(conn)
    conn.execute("select pg_stat_clear_snapshot()")
    assert value(conn, "select deadlocks from pg_stat_database where datname = current_database()") == deadlocks


def test_four_hundred_contended_grants_charge_exactly_four_hundred(
    limiter: Limiter, conn: Connection, children: Children
) -> None:
    limiter.create("api", 1000, slot_decay_per_second=1e-6)
    code = """
        import threading
        from pglimits import Limiter
        limiter = Limiter()
        print("ready")
        input()
        def work():
            for _ in range(25):
                limiter.rate_limit("api", timeout_seconds=0)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    """
    working = [children(code) for _ in range(4)]
    for child in working:
        child.expect("ready")
    for child in working:
        child.tell()
    for child in working:
        child.end()
    level = limiter.get("api").level
    assert 399.99 < level <= 400


def test_a_clock_and_a_time_zone_off_by_hours_change_nothing(
    dsn: str, limiter: Limiter, conn: Connection, children: Children, wait_until: WaitUntil
) -> None:
    """The process believes that it is another time, in another zone, and so does its session."""
    limiter.create("database", 1)
    limiter.create("api", 1, slot_decay_per_second=2)
    code = """
        import time, datetime, sys
        # A clock that is nine hours ahead, for everything that asks for the time of day.
        true_time = time.time
        time.time = lambda: true_time() + 9 * 3600
        from pglimits import Limiter, AcquireTimeout
        limiter = Limiter()
        lease = limiter.acquire("database", lease_duration=2)
        print("holds")
        input()
        assert not lease.lost
        try:
            limiter.acquire("database", timeout_seconds=0.2)
        except AcquireTimeout:
            print("refused")
        assert limiter.release(lease) is True
        limiter.rate_limit("api")
        limiter.rate_limit("api")
        print(lease.expires_at.astimezone(datetime.timezone.utc).isoformat())
    """
    child = children(
        code,
        env={
            "TZ": "Pacific/Kiritimati",
            "PGTZ": "America/St_Johns",
            "PGDATESTYLE": "German",
            # A pooler refuses options.
            **({} if poolers.MODE else {"PGOPTIONS": "-c IntervalStyle=sql_standard"}),
        },
    )
    child.expect("holds")
    row = conn.execute(
        "select holder ->> 'pid', expires_at, expires_at - interval '2 s' <= clock_timestamp() from pglimits.holders"
    ).fetchone()
    assert row is not None
    assert (row[0], row[2]) == (str(child.pid), True)
    # It renews, several times, at the right moments.
    wait_until(lambda: value(conn, "select clock_timestamp() > %s::timestamptz + interval '2 s'", [row[1]]))
    assert held(conn) == 1
    child.tell()
    child.expect("refused")
    ends = child.end().strip()
    assert value(conn, "select abs(extract(epoch from %s::timestamptz - clock_timestamp())) < 60", [ends])
    assert nothing_left(conn)


def test_waiting_is_fair_across_sessions_of_any_time_zone(
    dsn: str, limiter: Limiter, conn: Connection, children: Children, turns: None, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    lease = limiter.acquire("database")
    code = """
        import os, sys, psycopg
        from pglimits.sync import concurrency
        with concurrency("database") as lease, psycopg.connect(os.environ["SERVER_DSN"], autocommit=True) as log:
            log.execute("insert into turns values (%s, %s)", [lease.fence, sys.argv[1]])
    """
    zones = ["Pacific/Kiritimati", "Pacific/Midway", "Asia/Kathmandu", "UTC"]
    waits = []
    for place, zone in enumerate(zones):
        waits.append(children(code, zone, env={"TZ": zone, "PGTZ": zone}))
        wait_until(lambda place=place: waiting(conn) == place + 1)
    limiter.release(lease)
    for child in waits:
        child.end()
    assert in_order(conn) == zones


def test_polling_a_full_limit_writes_nothing(limiter: Limiter, conn: Connection, connect: Any) -> None:
    limiter.create("database", 1)
    lease = limiter.acquire("database")
    limiter.create("api", 1, slot_decay_per_second=0.001)
    limiter.rate_limit("api")

    def written() -> tuple[Any, ...]:
        with psycopg.connect(conn.info.dsn, autocommit=True) as fresh:
            row = fresh.execute("select pg_snapshot_xmax(pg_current_snapshot())").fetchone()
        assert row is not None
        return row

    before = written()
    for _ in range(100):
        for refused in (
            in_thread(limiter.acquire, "database", timeout_seconds=0),
            in_thread(limiter.rate_limit, "api", timeout_seconds=0),
        ):
            assert isinstance(refused.exception(30), TimeoutError)
    after = written()
    # No transaction got an id for any of the two hundred refusals, but for what the server does by itself.
    assert int(after[0]) - int(before[0]) < 20
    limiter.release(lease)
