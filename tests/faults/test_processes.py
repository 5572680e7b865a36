"""Processes that exit, are terminated, are killed, or fork, while they hold and wait."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import poolers
import pytest
from wrappertest import (
    Children,
    Connection,
    WaitUntil,
    backends,
    held,
    in_thread,
    nothing_left,
    run,
    value,
    waiting,
)

from pglimits import AsyncLimiter, Limiter

HOLDS = """
    import sys
    from pglimits import Limiter
    limiter = Limiter()
    lease = limiter.acquire("database", lease_duration=float(sys.argv[1]))
    print("holds")
    input()
"""


@pytest.fixture
def database(limiter: Limiter) -> Limiter:
    limiter.create("database", 1)
    return limiter


@pytest.fixture
def api_limit(limiter: Limiter) -> Limiter:
    limiter.create("api", 1, slot_decay_per_second=0.01)
    limiter.rate_limit("api")
    return limiter


def test_a_process_that_exits_with_a_lease_held_releases_it(
    database: Limiter, children: Children, conn: Connection
) -> None:
    child = children(HOLDS, "300")
    child.expect("holds")
    assert held(conn) == 1
    child.tell()
    child.end()
    assert held(conn) == 0


def test_a_process_that_ends_by_an_error_in_its_block_releases(
    database: Limiter, children: Children, conn: Connection
) -> None:
    child = children(
        """
        from pglimits.sync import concurrency
        with concurrency("database"):
            raise RuntimeError("the work failed")
        """
    )
    child.end(1)
    assert "the work failed" in child.errors
    assert held(conn) == 0


def test_a_task_run_that_ends_with_leases_held_releases_them_at_exit(
    limiter: Limiter, children: Children, conn: Connection
) -> None:
    limiter.create("database", 3)
    child = children(
        """
        import asyncio
        from pglimits import AsyncLimiter
        async def main():
            global limiter, leases
            limiter = AsyncLimiter()
            leases = [await limiter.acquire("database") for _ in range(3)]
        asyncio.run(main())
        print("holds")
        input()
        """
    )
    child.expect("holds")
    assert held(conn) == 3
    child.tell()
    child.end()
    assert held(conn) == 0


def test_what_comes_free_at_the_exit_of_a_process_is_not_taken_by_its_own_waiters(
    limiter: Limiter, children: Children, conn: Connection
) -> None:
    limiter.create("database", 2)
    for _ in range(5):
        child = children(
            """
            import threading, time
            from pglimits import Limiter
            limiter = Limiter()
            held = [limiter.acquire("database") for _ in range(2)]
            for _ in range(8):
                threading.Thread(target=limiter.acquire, args=("database",), daemon=True).start()
            while len(limiter.waiters()) < 8:
                time.sleep(0.01)
            """
        )
        child.end()
        assert nothing_left(conn)


def test_sys_exit_in_a_block_releases_and_keeps_the_exit_code(
    database: Limiter, children: Children, conn: Connection
) -> None:
    child = children(
        """
        import sys
        from pglimits.sync import concurrency
        with concurrency("database"):
            sys.exit(7)
        """
    )
    child.end(7)
    assert held(conn) == 0


def test_daemon_threads_that_wait_and_hold_do_not_keep_a_process_from_ending(
    database: Limiter, children: Children, conn: Connection, clock: Any, wait_until: WaitUntil
) -> None:
    child = children(
        """
        import threading
        from pglimits import Limiter
        limiter = Limiter()
        def work():
            with limiter.concurrency("database"):
                threading.Event().wait()
        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        input()
        """
    )
    wait_until(lambda: held(conn) == 1 and waiting(conn) == 2)
    child.tell()
    child.end()
    assert child.errors == ""
    # Those who were queued need not have been withdrawn, but then they are dead within 10 seconds.
    clock.advance(11)
    wait_until(lambda: nothing_left(conn))


def test_a_process_terminated_with_the_default_action_frees_its_slot_at_the_leases_end(
    database: Limiter, children: Children, conn: Connection
) -> None:
    child = children(HOLDS, "1")
    child.expect("holds")
    child.signal(signal.SIGTERM)
    child.end(-signal.SIGTERM)
    assert database.acquire("database", timeout_seconds=30)


def test_a_process_that_turns_sigterm_into_an_exit_releases(
    database: Limiter, children: Children, conn: Connection
) -> None:
    child = children(
        """
        import signal, sys, time
        from pglimits.sync import concurrency
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
        with concurrency("database"):
            print("holds")
            while True:
                time.sleep(1)
        """
    )
    child.expect("holds")
    child.signal(signal.SIGTERM)
    child.end(3)
    assert held(conn) == 0


def test_a_killed_holders_slot_goes_to_the_waiter_at_the_head_at_the_end_of_its_lease(
    database: Limiter, children: Children, conn: Connection, wait_until: WaitUntil
) -> None:
    conn.execute("create table went (who text, at timestamptz default clock_timestamp())")
    holder = children(HOLDS, "3")
    holder.expect("holds")
    waits = """
        import sys
        import psycopg, os
        from pglimits import Limiter
        limiter = Limiter()
        with limiter.concurrency("database"):
            with psycopg.connect(os.environ["SERVER_DSN"], autocommit=True) as log:
                log.execute("insert into went (who) values (%s)", [sys.argv[1]])
        input()
    """
    waiters = []
    for number in range(2):
        waiters.append(children(waits, str(number)))
        wait_until(lambda number=number: waiting(conn) == number + 1)
    holder.signal(signal.SIGKILL)
    holder.end(-signal.SIGKILL)
    ends = value(conn, "select expires_at from pglimits.holders where name = 'database'")
    wait_until(lambda: value(conn, "select count(*) from went") == 2)
    went = conn.execute("select who, at >= %s from went order by at", [ends]).fetchall()
    # In the order of arrival, and not before the end of the lease that nobody renewed any longer.
    assert went == [("0", True), ("1", True)]
    for waiter in waiters:
        waiter.tell()
        waiter.end()
    assert nothing_left(conn)


def test_a_killed_waiter_leaves_the_queue_within_ten_seconds_and_those_behind_it_go_on(
    database: Limiter, children: Children, conn: Connection, clock: Any, wait_until: WaitUntil
) -> None:
    lease = database.acquire("database")
    dead = children("from pglimits import Limiter; Limiter().acquire('database')")
    wait_until(lambda: waiting(conn) == 1)
    dead.signal(signal.SIGKILL)
    dead.end(-signal.SIGKILL)
    assert value(conn, "select max(expires_at) <= pglimits._now() + interval '10 s' from pglimits.queue")
    behind = in_thread(database.acquire, "database")
    wait_until(lambda: waiting(conn) == 2)
    database.release(lease)
    # Nobody knows yet that the one at the head is dead: its place is good for ten seconds.
    clock.advance(10)
    mine = behind.result(30)
    assert not mine.lost
    assert waiting(conn) == 0
    assert database.release(mine)


def test_a_slot_handed_to_a_dead_waiter_goes_on_to_the_next(
    database: Limiter, dsn: str, children: Children, conn: Connection, clock: Any, wait_until: WaitUntil
) -> None:
    lease = database.acquire("database")
    dead = children(
        "from pglimits import Limiter; Limiter().acquire('database', lease_duration=3600)",
        env={"PGLIMITS_DSN": f"{dsn} application_name=dead"},
    )
    wait_until(lambda: waiting(conn) == 1)
    dead.signal(signal.SIGKILL)
    dead.end(-signal.SIGKILL)
    # What it had sent before it died is done: a look under way would take up what comes now.
    wait_until(lambda: poolers.MODE is not None or not backends(conn, application="dead"))
    database.release(lease)
    # It was granted what it can no longer take up. That lasts as long as it would have lived in the queue, no longer.
    assert held(conn) == 1
    assert waiting(conn) == 0
    behind = in_thread(database.acquire, "database")
    wait_until(lambda: waiting(conn) == 1)
    clock.advance(10)
    assert database.release(behind.result(30))
    assert nothing_left(conn)


def test_a_process_killed_in_the_line_of_a_rate_limit_is_in_nobodys_way(
    api_limit: Limiter, dsn: str, children: Children, conn: Connection, clock: Any, wait_until: WaitUntil
) -> None:
    dead = children("from pglimits import Limiter; Limiter().rate_limit('api')")
    wait_until(lambda: waiting(conn) == 1)
    dead.signal(signal.SIGKILL)
    dead.end(-signal.SIGKILL)
    clock.advance(11)
    assert waiting(conn) == 0

    # The next one goes at 100 seconds, and is not refused as it would be behind the dead, at 200.
    async def asks() -> None:
        async with AsyncLimiter(dsn) as limiter:
            asked = asyncio.create_task(limiter.rate_limit("api", timeout_seconds=120))
            while not asked.done() and waiting(conn) == 0:
                await asyncio.sleep(0.01)
            assert waiting(conn) == 1
            asked.cancel()

    run(asks())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_ended_at_random_moments_leave_nothing_behind(
    limiter: Limiter, children: Children, conn: Connection, clock: Any, wait_until: WaitUntil, number: int
) -> None:
    limiter.create("a", 2)
    limiter.create("b", 1)
    code = """
        import random, sys
        from pglimits import Limiter
        limiter = Limiter()
        print("ready")
        while True:
            with limiter.concurrency(random.choice([["a"], ["b"], ["b", "a"]]), lease_duration=1):
                pass
    """
    working = [children(code) for _ in range(4)]
    for child in working:
        child.expect("ready")
    wait_until(lambda: value(conn, "select coalesce(max(version), 0) from pglimits.states") > 100)
    for child in working:
        time.sleep(random.random() * 0.05)
        child.signal(number)
    for child in working:
        child.end(None)
    # Killed ones may have been granted slots for a second, and their places are good for ten.
    clock.advance(11)
    wait_until(lambda: nothing_left(conn), what="for held and waiting to come to zero")
    with limiter.concurrency({"a": 2, "b": 1}, timeout_seconds=30):
        pass


# Forks. In child processes: the test's own process has threads of other tests.

FORK = """
    import os, sys, time
    from pglimits import Limiter
    limiter = Limiter()
"""


def test_the_child_of_a_fork_neither_renews_nor_releases_its_parents_leases(
    database: Limiter, children: Children, conn: Connection
) -> None:
    child = children(
        FORK
        + """
    lease = limiter.acquire("database", lease_duration=300)
    if os.fork() == 0:
        print("released by the child:", limiter.release(lease))
        del lease
        sys.exit(0)   # with all that runs at exit
    os.wait()
    print("the child has ended")
    input()
    print("released by the parent:", limiter.release(lease))
    """
    )
    child.expect("released by the child: False")
    child.expect("the child has ended")
    assert held(conn) == 1
    child.tell()
    child.expect("released by the parent: True")
    child.end()
    assert held(conn) == 0


def test_leaving_a_block_in_the_child_of_a_fork_leaves_the_parents_lease_alone(
    database: Limiter, children: Children, conn: Connection
) -> None:
    child = children(
        FORK
        + """
    with limiter.concurrency("database", strict=True):
        pid = os.fork()
        if pid:
            os.wait()
            print("the child has ended")
            input()
    if pid == 0:
        limiter.close()
        sys.exit(0)
    """
    )
    child.expect("the child has ended")
    assert held(conn) == 1
    child.tell()
    child.end()
    assert held(conn) == 0


def test_a_forked_child_uses_limiters_with_connections_of_its_own_and_the_parent_goes_on(
    limiter: Limiter, children: Children, conn: Connection, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    child = children(
        FORK
        + """
    import threading
    # Everything is in use when the fork comes: pool, renewal, and a thread that waits.
    held = limiter.acquire("database")
    def wait():
        with limiter.concurrency("database"):
            pass
    waiter = threading.Thread(target=wait)
    waiter.start()
    while not limiter.waiters("database"):
        time.sleep(0.01)
    pid = os.fork()
    if pid == 0:
        try:
            assert limiter.get("database").held == 1
            # In the child nobody waits: this is a new waiter, behind its parent's.
            with limiter.concurrency("database") as lease:
                assert lease.pid == os.getpid()
                print("the child holds it")
        finally:
            limiter.close()
            os._exit(0)
    while len(limiter.waiters("database")) < 2:
        time.sleep(0.01)
    print("both wait")
    limiter.release(held)
    waiter.join()
    os.waitpid(pid, 0)
    with limiter.concurrency("database"):
        print("the parent still works")
    """
    )
    child.expect("both wait")
    child.expect("the child holds it")
    child.expect("the parent still works")
    child.end()
    assert nothing_left(conn)


def test_forks_in_the_middle_of_traffic_harm_neither_side(
    limiter: Limiter, children: Children, conn: Connection, wait_until: WaitUntil
) -> None:
    limiter.create("database", 2)
    child = children(
        FORK
        + """
    import threading
    stop = threading.Event()
    failed = []
    def work():
        try:
            while not stop.is_set():
                with limiter.concurrency("database", timeout_seconds=30):
                    pass
        except BaseException as error:
            failed.append(error)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    codes = []
    for _ in range(12):
        time.sleep(0.02)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for _ in range(3):
                    with limiter.concurrency("database", timeout_seconds=30):
                        pass
                code = 0
            finally:
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    stop.set()
    for thread in threads:
        thread.join()
    print(codes, failed)
    """
    )
    child.expect(f"{[0] * 12} []")
    child.end()
    assert nothing_left(conn)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_workers_share_a_limit_with_their_parent(
    limiter: Limiter, children: Children, conn: Connection, method: str, tmp_path: Any
) -> None:
    limiter.create("database", 2)
    conn.execute("create table in_use (n int not null, most int not null)")
    conn.execute("insert into in_use values (0, 0)")
    script = tmp_path / "script.py"
    script.write_text(
        """
import multiprocessing, os, sys
import psycopg
from pglimits.sync import concurrency

def work(number):
    with psycopg.connect(os.environ["SERVER_DSN"], autocommit=True) as log:
        for _ in range(5):
            with concurrency("database"):
                log.execute("update in_use set n = n + 1, most = greatest(most, n + 1)")
                log.execute("update in_use set n = n - 1")
    return number

if __name__ == "__main__":
    with concurrency("database"):
        with multiprocessing.get_context(sys.argv[1]).Pool(4) as pool:
            print(sorted(pool.map(work, range(8), chunksize=1)))
        # The parent's lease outlived its children.
        from pglimits import Limiter
        print(Limiter().get("database").held)
"""
    )
    ended = subprocess.run(
        [sys.executable, str(script), method],
        env={**os.environ, **children.env},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.stdout.splitlines() == [str(list(range(8))), "1"], ended.stderr
    # The parent holds one of the two.
    assert conn.execute("select n, most from in_use").fetchone() == (0, 1)
    assert nothing_left(conn)


def test_an_asyncio_process_that_forks_leaves_its_leases_to_the_parent(
    database: Limiter, children: Children, conn: Connection
) -> None:
    child = children(
        """
        import asyncio, atexit, os
        from pglimits.asyncio import concurrency
        async def main():
            async with concurrency("database"):
                pid = os.fork()
                if pid == 0:
                    # Not by way of asyncio: its selector is shared with the parent.
                    atexit._run_exitfuncs()
                    os._exit(0)
                os.waitpid(pid, 0)
                print("the child has ended")
                await asyncio.to_thread(input)
        asyncio.run(main())
        """
    )
    child.expect("the child has ended")
    assert held(conn) == 1
    child.tell()
    child.end()
    assert held(conn) == 0


def test_a_forked_child_uses_an_async_limiter_on_a_pool_with_connections_of_its_own_and_the_parent_goes_on(
    limiter: Limiter, children: Children, conn: Connection
) -> None:
    limiter.create("database", 2)
    child = children(
        """
        import asyncio, os, threading
        from psycopg_pool import AsyncConnectionPool
        from pglimits import AsyncLimiter

        async def use(limiter):
            for _ in range(20):
                async with limiter.concurrency("database", timeout_seconds=10):
                    await limiter.get("database")

        def in_child(limiter):
            try:
                asyncio.run(use(limiter))
                os._exit(0)
            finally:
                os._exit(1)

        async def main():
            async with AsyncConnectionPool(os.environ["PGLIMITS_DSN"], min_size=1, max_size=1) as pool:
                limiter = AsyncLimiter(pool=pool)
                await use(limiter)
                pid = os.fork()
                if pid == 0:
                    thread = threading.Thread(target=in_child, args=[limiter])
                    thread.start()
                    thread.join()
                await use(limiter)
                _, status = await asyncio.to_thread(os.waitpid, pid, 0)
                print("the child ended with", os.waitstatus_to_exitcode(status))
                await use(limiter)
                print("the parent still works")
                await limiter.close()

        asyncio.run(main())
        """
    )
    child.expect("the child ended with 0")
    child.expect("the parent still works")
    child.end()
    assert nothing_left(conn)
