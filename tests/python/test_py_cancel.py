"""A task cancelled and a thread interrupted, at whatever moment, leak nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import poolers
import psycopg
import pytest
from wrappertest import Children, Connection, Locked, WaitUntil, held, in_thread, nothing_left, run, value, waiting

from pglimits import AcquireTimeout, AsyncLimiter, Lease, Limiter, _courier


def settles(conn: Connection, wait_until: WaitUntil) -> None:
    wait_until(lambda: nothing_left(conn), what="for held and waiting to come to zero")


async def until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


# Tasks.


def test_a_task_cancelled_while_queued_leaves_the_queue(dsn: str, conn: Connection) -> None:
    async def main() -> None:
        async with AsyncLimiter(dsn) as limiter:
            await limiter.create("database", 1)
            async with limiter.concurrency("database"):
                queued = asyncio.create_task(limiter.acquire("database"))
                await until(lambda: waiting(conn) == 1)
                queued.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await queued
                await until(lambda: waiting(conn) == 0)
                assert held(conn) == 1
            assert held(conn) == 0

    run(main())


def test_a_task_cancelled_in_its_block_releases(dsn: str, conn: Connection) -> None:
    async def main() -> None:
        async with AsyncLimiter(dsn) as limiter:
            await limiter.create("database", 1)

            async def work() -> None:
                async with limiter.concurrency("database"):
                    await asyncio.sleep(3600)

            task = asyncio.create_task(work())
            await until(lambda: held(conn) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # The grant may be in the database before the task has heard of it; then it is given back in the background.
            await until(lambda: held(conn) == 0)

    run(main())


def test_a_task_cancelled_before_its_grant_comes_back_leaks_nothing(
    dsn: str, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    """The statement is under way, held up by the limit's lock, when the task is cancelled."""

    async def main() -> None:
        async with AsyncLimiter(dsn) as limiter:
            await limiter.create("database", 2)
            other = connect(autocommit=False)
            other.execute("select pglimits.acquire('database')")
            acquiring = asyncio.create_task(limiter.acquire("database"))
            await until(lambda: _blocked(conn) == 1)
            acquiring.cancel()
            with pytest.raises(asyncio.CancelledError):
                await acquiring
            other.rollback()
            await until(lambda: _blocked(conn) == 0)
            await until(lambda: nothing_left(conn))
            # The engine goes on as if nothing had happened.
            lease = await limiter.acquire("database")
            assert await limiter.release(lease)

    run(main())


def test_a_task_cancelled_while_it_releases_still_releases(
    dsn: str, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    async def main() -> None:
        async with AsyncLimiter(dsn) as limiter:
            await limiter.create("database", 2)
            lease = await limiter.acquire("database")
            other = connect(autocommit=False)
            other.execute("select pglimits.acquire('database')")
            releasing = asyncio.create_task(limiter.release(lease))
            await until(lambda: _blocked(conn) == 1)
            releasing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await releasing
            other.rollback()
            await until(lambda: nothing_left(conn))

    run(main())


def test_a_task_cancelled_while_it_waits_for_a_rate_takes_nothing(dsn: str, conn: Connection) -> None:
    async def main() -> None:
        async with AsyncLimiter(dsn) as limiter:
            await limiter.create("api", 1, slot_decay_per_second=0.01)
            await limiter.rate_limit("api")
            sleeping = asyncio.create_task(limiter.rate_limit("api"))
            await until(lambda: waiting(conn) == 1)
            sleeping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sleeping
            await until(lambda: waiting(conn) == 0)
            assert (await limiter.get("api")).level <= 1

    run(main())


def test_asyncio_timeout_around_an_acquire_leaves_the_queue(dsn: str, conn: Connection) -> None:
    async def main() -> None:
        async with AsyncLimiter(dsn) as limiter:
            await limiter.create("database", 1)
            async with limiter.concurrency("database"):
                with pytest.raises(TimeoutError) as caught:
                    async with asyncio.timeout(0.3), limiter.concurrency("database"):
                        pytest.fail("there was no slot")
                assert not isinstance(caught.value, AcquireTimeout)
                await until(lambda: waiting(conn) == 0)
            assert held(conn) == 0

    run(main())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_hundreds_of_tasks_cancelled_at_random_moments_leak_nothing(
    dsn: str, conn: Connection, wait_until: WaitUntil, seed: int
) -> None:
    chance = random.Random(seed)
    finished = 0

    async def main() -> None:
        nonlocal finished
        limiter = AsyncLimiter(dsn)
        await limiter.create("a", 3)
        await limiter.create("b", 2)
        await limiter.create("api", 5, slot_decay_per_second=200)

        async def work(number: int) -> None:
            nonlocal finished
            names = (["a"], ["b"], ["a", "b"], ["b", "a"])[number % 4]
            if number % 5 == 0:
                await limiter.rate_limit("api")
            async with limiter.concurrency(names, timeout_seconds=None if number % 3 else 0.05):
                await asyncio.sleep(chance.random() * 0.004)
            finished += 1

        for _ in range(4):
            tasks = [asyncio.create_task(work(number)) for number in range(80)]
            for task in chance.sample(tasks, 60):
                # Some before they even start, some at once after another, some in the middle of everything.
                if chance.random() < 0.7:
                    await asyncio.sleep(chance.random() * 0.006)
                task.cancel()
            outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
            for outcome in outcomes:
                assert outcome is None or isinstance(outcome, (asyncio.CancelledError, AcquireTimeout)), repr(outcome)
        # Before the limiter is closed: closing releases what is held, and this must not be what tidies up.
        await until(lambda: nothing_left(conn))
        async with asyncio.timeout(20), limiter.concurrency({"a": 3, "b": 2}):
            pass
        await limiter.close()

    run(main())
    assert finished >= 20
    settles(conn, wait_until)


def test_a_loop_that_ends_with_tasks_queued_and_holding_leaks_nothing(
    dsn: str, conn: Connection, wait_until: WaitUntil
) -> None:
    async def main(limiter: AsyncLimiter) -> None:
        await limiter.create("database", 2)

        async def work() -> None:
            async with limiter.concurrency("database"):
                await asyncio.sleep(3600)

        tasks = [asyncio.create_task(work()) for _ in range(6)]
        await until(lambda: held(conn) == 2 and waiting(conn) == 4)
        assert tasks  # asyncio.run cancels them

    limiter = AsyncLimiter(dsn)
    run(main(limiter))
    settles(conn, wait_until)
    run(limiter.close())


def test_a_loop_closed_under_its_waiters_harms_no_other_loop(dsn: str, conn: Connection, wait_until: WaitUntil) -> None:
    limiter = AsyncLimiter(dsn)
    with Limiter(dsn) as threads:
        threads.create("database", 1)
        lease = threads.acquire("database")
        loop = asyncio.new_event_loop()
        abandoned = loop.create_task(limiter.acquire("database"))
        for _ in range(20):
            loop.run_until_complete(asyncio.sleep(0.01))
            if waiting(conn):
                break
        wait_until(lambda: waiting(conn) == 1)
        loop.close()
        behind = in_thread(threads.acquire, "database")
        wait_until(lambda: waiting(conn) == 2)
        with contextlib.suppress(RuntimeError):
            abandoned.get_coro().close()
        abandoned._log_destroy_pending = False  # type: ignore[attr-defined]
        del abandoned
        threads.release(lease)
        mine = behind.result(30)
        assert threads.release(mine)
        settles(conn, wait_until)
    run(limiter.close())


# Threads.


class Interrupt(BaseException):
    """What is thrown into a thread."""


def throw_into(thread: threading.Thread) -> None:
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupt))


def begin_all(limiter: Limiter, conn: Connection, wait_until: WaitUntil, name: str) -> None:
    """Have the limiter start its own threads: an exception thrown at a thread that starts another may hit that one."""
    leases = [limiter.acquire(name) for _ in range(limiter.get(name).limit)]
    waits = in_thread(limiter.acquire, name)
    wait_until(lambda: waiting(conn) == 1)
    for lease in leases:
        limiter.release(lease)
    limiter.release(waits.result(30))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_threads_interrupted_at_random_moments_leak_nothing(
    dsn: str, conn: Connection, wait_until: WaitUntil, seed: int
) -> None:
    gc.collect()  # else a thread that is struck may be tidying up after another test
    chance = random.Random(seed)
    limiter = Limiter(dsn)
    limiter.create("a", 2)
    limiter.create("b", 1)
    begin_all(limiter, conn, wait_until, "a")
    done = interrupted = 0
    unexpected: list[BaseException] = []

    def work(number: int) -> None:
        nonlocal done, interrupted
        try:
            with limiter.concurrency((["a"], ["b"], ["a", "b"])[number % 3]):
                pass
            done += 1
        except Interrupt:
            interrupted += 1
        except BaseException as error:
            unexpected.append(error)

    for _ in range(12):
        over = threading.Event()
        threads = [threading.Thread(target=_guarded, args=(work, number, over), daemon=True) for number in range(9)]
        for thread in threads:
            thread.start()
        for thread in chance.sample(threads, 6):
            time.sleep(chance.random() * 0.003)
            throw_into(thread)
        over.set()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not unexpected
    assert interrupted >= 10
    assert done >= 10
    settles(conn, wait_until)
    with limiter.concurrency({"a": 2, "b": 1}, timeout_seconds=20):
        pass
    limiter.close()


def _guarded(work: Any, number: int, over: threading.Event) -> None:
    # An interrupt can also strike outside of what the test runs. The thread stays until all are thrown: its number
    # could be given to another, which then would be struck.
    with contextlib.suppress(Interrupt):
        work(number)
        over.wait(60)
    over.wait(60)


def test_a_thread_interrupted_while_queued_leaves_the_queue(
    limiter: Limiter, conn: Connection, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    begin_all(limiter, conn, wait_until, "database")
    lease = limiter.acquire("database")
    interrupted = threading.Event()

    def work() -> None:
        try:
            limiter.acquire("database")
        except Interrupt:
            interrupted.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    wait_until(lambda: waiting(conn) == 1)
    throw_into(thread)
    # An asynchronous exception waits for the thread to run: it runs when it is woken.
    limiter.release(lease)
    wait_until(interrupted.is_set)
    settles(conn, wait_until)


def test_an_interrupt_in_the_handler_of_another_leaks_nothing_either(
    limiter: Limiter, conn: Connection, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter.create("database", 1)
    begin_all(limiter, conn, wait_until, "database")
    lease = limiter.acquire("database")

    def strike(*_: Any) -> None:
        raise Interrupt

    def work() -> None:
        with contextlib.suppress(Interrupt):
            limiter.acquire("database")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    wait_until(lambda: waiting(conn) == 1)
    monkeypatch.setattr(limiter._courier, "put", strike)
    throw_into(thread)
    wait_until(lambda: not thread.is_alive())
    with contextlib.suppress(Interrupt):
        limiter.release(lease)
    monkeypatch.undo()
    del lease
    settles(conn, wait_until)


def test_a_courier_that_is_struck_at_birth_is_started_again(
    dsn: str, conn: Connection, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that is thrown at the thread that starts it may strike the new one instead."""
    struck: list[int] = []
    real = _courier.Courier._run

    def strike(self: _courier.Courier) -> None:
        if len(struck) < 2:
            struck.append(1)
        else:
            real(self)

    monkeypatch.setattr(_courier.Courier, "_run", strike)
    with Limiter(dsn) as limiter:
        assert in_thread(limiter.version).result(30)
    assert len(struck) == 2


def test_a_lease_that_nobody_refers_to_any_longer_is_given_back(
    limiter: Limiter, conn: Connection, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    lease: Lease | None = limiter.acquire("database")
    assert held(conn) == 1
    assert lease is not None
    del lease
    settles(conn, wait_until)


def test_what_is_given_back_is_not_held_up_by_another_limit_that_somebody_keeps_locked(
    limiter: Limiter, conn: Connection, connect: Any, wait_until: WaitUntil
) -> None:
    for name in ("free", "locked"):
        limiter.create(name, 9)
    leases = [limiter.acquire(name) for name in ("locked", "free", "locked", "free")]
    locked = Locked(connect, "locked")
    del leases
    wait_until(lambda: held(conn, "free") == 0)
    assert held(conn, "locked") == 2
    locked.unlock()
    wait_until(lambda: held(conn, "locked") == 0)


def test_a_limiter_that_is_closed_releases_all_but_what_somebody_keeps_locked(
    dsn: str, conn: Connection, connect: Any
) -> None:
    limiter = Limiter(dsn)
    for name in ("free", "locked"):
        limiter.create(name, 9)
    leases = [limiter.acquire(name) for name in ("locked", "free", "locked", "free")]
    locked = Locked(connect, "locked")
    limiter.close()
    assert (held(conn, "free"), held(conn, "locked")) == (0, 2)
    locked.unlock()
    del leases  # referred to until now: it is not the garbage collector that gave them back


def test_a_process_that_only_releases_goes_on_when_its_releases_were_interrupted(
    limiter: Limiter, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter.create("database", 3)
    ids = [value(conn, "select lease_id from pglimits.acquire('database')") for _ in range(3)]
    real = limiter._courier.put

    def interrupted(*what: Any) -> None:
        real(*what)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(limiter._courier, "put", interrupted)
        for lease_id in ids[:2]:
            with pytest.raises(KeyboardInterrupt):
                limiter.release(lease_id)
    assert in_thread(lambda: limiter.release(ids[2])).result(30)
    assert held(conn) == 0


def test_a_lease_taken_without_renewal_outlives_its_handle(limiter: Limiter, conn: Connection) -> None:
    limiter.create("database", 1)
    lease_id = limiter.acquire("database", renew=False).id
    limiter.create("other", 1)
    with limiter.concurrency("other"):
        pass
    assert held(conn, "database") == 1
    assert limiter.release(lease_id)
    assert held(conn) == 0


def test_a_main_thread_interrupted_by_a_signal_while_queued_leaves_the_queue_at_once(
    children: Children, limiter: Limiter, conn: Connection, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    with limiter.concurrency("database"):
        child = children(
            """
            from pglimits.sync import concurrency
            try:
                with concurrency("database"):
                    print("holds")
            except KeyboardInterrupt:
                print("interrupted")
            input()
            """
        )
        wait_until(lambda: waiting(conn) == 1)
        child.signal(signal.SIGINT)
        child.expect("interrupted")
        wait_until(lambda: waiting(conn) == 0, what="for the interrupted waiter to leave the queue")
        child.tell()
        child.end()


HAMMER = """
    import random, signal, sys, time, threading
    from pglimits import Limiter
    limiter = Limiter()
    chance = random.Random(int(sys.argv[1]))
    done = interrupted = 0
    # Raised wherever the main thread happens to be.
    def interrupt(number, frame):
        signal.setitimer(signal.ITIMER_REAL, chance.choice([0.005, 0.02, 0.06]) * chance.random() + 0.0002)
        if armed:
            raise KeyboardInterrupt
    armed = False
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    rounds = 0
    while rounds < 4000 and (done < 40 or interrupted < 80):
        rounds += 1
        try:
            armed = True
            if rounds % 4 == 0:
                limiter.rate_limit("api")
            else:
                with limiter.concurrency("a" if rounds % 2 else ["b", "a"]):
                    done += 1
            armed = False
        except KeyboardInterrupt:
            armed = False
            interrupted += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(done, interrupted)
    input()
"""


@poolers.straight_only("PgBouncer 1.18 ends (bad client state) where an interrupt strikes who sends a cancel request")
@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_main_thread_interrupted_at_random_moments_leaks_nothing(
    children: Children, limiter: Limiter, conn: Connection, wait_until: WaitUntil, seed: str
) -> None:
    limiter.create("a", 1)
    limiter.create("b", 1)
    limiter.create("api", 100, slot_decay_per_second=1000)
    # Somebody else who wants the same, so that the child also queues.
    stop = threading.Event()

    def contend() -> None:
        while not stop.is_set():
            with limiter.concurrency("a"):
                pass

    rival = in_thread(contend)
    try:
        child = children(HAMMER, seed)
        said = child.hear()
    finally:
        stop.set()
    rival.result(30)
    done, interrupted = map(int, said.split())
    assert interrupted >= 20, said
    assert done >= 20, said
    # The child is still there: its exit is not what gives the slots back.
    settles(conn, wait_until)
    child.tell()
    child.end()


def _blocked(conn: psycopg.Connection[Any]) -> int:
    row = conn.execute(
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    ).fetchone()
    assert row is not None
    return int(row[0])


LEAVES = """
    import signal, sys
    from pglimits import Limiter
    kind, what, then = sys.argv[1:]
    class Stop(getattr(__import__("builtins"), kind)):
        pass
    def interrupt(number, frame):
        raise Stop
    limiter = Limiter()
    with limiter.concurrency("other"):
        pass
    signal.signal(signal.SIGUSR1, interrupt)
    print("ready")
    input()
    try:
        if what == "acquire":
            limiter.acquire("database")
        else:
            limiter.rate_limit("database")
        print("was not interrupted")
    except Stop:
        print("interrupted")
    if then == "stays":
        input()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
"""


@pytest.mark.parametrize("then", ["stays", "exits"])
@pytest.mark.parametrize("what", ["acquire", "rate_limit"])
@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "SystemExit", "BaseException", "Exception", "TimeoutError"])
def test_a_signal_in_the_middle_of_a_statement_raises_its_own_exception_and_leaves_nothing_behind(
    dsn: str,
    children: Children,
    limiter: Limiter,
    conn: Connection,
    wait_until: WaitUntil,
    kind: str,
    what: str,
    then: str,
) -> None:
    limiter.create("other", 1)
    limiter.create("database", 1, slot_decay_per_second=0.001 if what == "rate_limit" else 0)
    if what == "rate_limit":
        limiter.rate_limit("database")
    # The statements of the child stop at the clock until the gate is opened.
    conn.execute("create table public.gate (open boolean)")
    conn.execute("insert into public.gate values (true)")
    conn.execute(
        """
        create or replace function pglimits._now() returns timestamptz language plpgsql volatile set search_path = ''
        as $$ begin
          while current_setting('application_name') = 'child' and not (select bool_and(g.open) from public.gate g) loop
            perform pg_catalog.pg_sleep(0.01);
          end loop;
          return clock_timestamp();
        end $$
        """
    )
    child = children(LEAVES, kind, what, then, env={"PGLIMITS_DSN": f"{dsn} application_name=child"})
    child.expect("ready")
    conn.execute("update public.gate set open = false")
    child.tell()
    wait_until(lambda: _at_work(conn) == 1)
    child.signal(signal.SIGUSR1)
    child.expect("interrupted")
    conn.execute("update public.gate set open = true")
    wait_until(lambda: _at_work(conn) == 0)
    settles(conn, wait_until)
    wait_until(lambda: limiter.get("database").level <= 1)
    if then == "stays":
        child.tell()
    child.end()
    settles(conn, wait_until)


def _at_work(conn: Connection) -> int:
    return int(
        value(
            conn,
            "select count(*) from pg_stat_activity"
            " where datname = current_database() and application_name = 'child' and state = 'active'",
        )
    )


ABANDONS = """
    import faulthandler, gc, threading
    from pglimits import Limiter
    faulthandler.dump_traceback_later(200, exit=True)
    gc.set_threshold(50, 5, 5)
    limiter = Limiter()
    class Job:
        def rows(self):
            with limiter.concurrency("database"):
                yield 1
    def work():
        for _ in range(3000):
            job = Job()
            job.rows_of_mine = job.rows()
            next(job.rows_of_mine)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    print("done")
    input()
"""


def test_a_block_in_a_generator_that_the_garbage_collector_closes_gives_its_slot_back(
    children: Children, limiter: Limiter, conn: Connection, wait_until: WaitUntil
) -> None:
    """It does so in any thread and at any moment, also in the midst of a call of the limiter."""
    limiter.create("database", 1000)
    child = children(ABANDONS)
    child.expect("done")
    settles(conn, wait_until)
    child.tell()
    child.end()


def test_a_generator_that_is_closed_leaves_its_block_at_once(limiter: Limiter, conn: Connection) -> None:
    limiter.create("database", 1)

    def rows() -> Iterator[int]:
        with limiter.concurrency("database"):
            yield 1

    holding = rows()
    next(holding)
    assert held(conn) == 1
    holding.close()  # type: ignore[attr-defined]
    assert held(conn) == 0


HANDLES = """
    import faulthandler, signal, threading
    from pglimits import Limiter
    faulthandler.dump_traceback_later(200, exit=True)
    limiter = Limiter()
    mine = []
    handled = 0
    def handle(*_):
        global handled
        limiter.release(mine.pop())
        mine.append(limiter.acquire("database"))
        limiter.release(mine.pop())
        handled += 1
    signal.signal(signal.SIGALRM, handle)
    while handled < 200:
        mine.append(limiter.acquire("database"))
        before = handled
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        while handled == before:
            with limiter.concurrency("database"):
                pass
    print("done")
    input()
"""


def test_a_signal_handler_may_release_and_acquire_in_the_midst_of_another_call(
    children: Children, limiter: Limiter, conn: Connection, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1000)
    child = children(HANDLES)
    child.expect("done")
    settles(conn, wait_until)
    child.tell()
    child.end()


def strike(event: str, function: str, nth: int = 1) -> None:
    """Have this thread interrupted as a function of that name is called, or returns, for the nth time."""
    left = [None] * nth

    def trace(frame: FrameType, what: str, _: Any) -> Any:
        if what == event and frame.f_code.co_qualname == function:
            left.pop()
            if not left:
                raise Interrupt
        return trace

    sys.settrace(trace)


@pytest.mark.parametrize(
    ("event", "function"), [("return", "_Hold._entered"), ("call", "Concurrency.__exit__"), ("return", "_leave")]
)
def test_an_interrupt_at_the_edge_of_a_block_gives_the_slot_back_whoever_keeps_the_lease(
    limiter: Limiter, conn: Connection, wait_until: WaitUntil, event: str, function: str
) -> None:
    limiter.create("database", 1)
    leases = []
    with pytest.raises(Interrupt):
        strike(event, function)
        with limiter.concurrency("database") as lease:
            leases.append(lease)
    wait_until(lambda: nothing_left(conn))
    with limiter.concurrency("database", timeout_seconds=0):
        pass


@pytest.mark.parametrize("function", ["AsyncConcurrency.__aexit__", "_leave"])
def test_an_interrupt_at_the_edge_of_an_async_block_gives_the_slot_back_whoever_keeps_the_lease(
    limiter: Limiter, conn: Connection, wait_until: WaitUntil, function: str
) -> None:
    limiter.create("database", 1)
    leases = []

    async def works() -> None:
        strike("call", function)
        async with limiter._in_tasks().concurrency("database") as lease:
            leases.append(lease)

    with pytest.raises(Interrupt):
        asyncio.run(works())

    def collected() -> bool:
        gc.collect()  # the loop's task and its error keep each other
        return nothing_left(conn)

    wait_until(collected)


def test_a_context_that_is_kept_and_interrupted_as_it_is_entered_keeps_no_slot(
    limiter: Limiter, conn: Connection, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    kept = limiter.concurrency("database")
    with pytest.raises(Interrupt):
        strike("return", "_Hold._entered")
        with kept:
            pass
    wait_until(lambda: nothing_left(conn))
    with kept:
        assert held(conn) == 1


def test_a_second_interrupt_while_the_first_is_dealt_with_leaves_nobody_in_the_line(
    limiter: Limiter, conn: Connection, wait_until: WaitUntil
) -> None:
    limiter.create("database", 1)
    lease = limiter.acquire("database")
    struck: list[type[BaseException]] = []

    def waits() -> None:
        # First it asks; then it gives up, as the first interrupt comes.
        strike("call", "Courier.put", nth=2)
        try:
            limiter.acquire("database")
        except Interrupt as error:
            found: BaseException | None = error
            while found is not None:
                struck.append(type(found))
                found = found.__context__

    thread = threading.Thread(target=waits)
    thread.start()
    wait_until(lambda: waiting(conn) == 1)
    throw_into(thread)
    thread.join(30)
    assert struck.count(Interrupt) == 2
    wait_until(lambda: waiting(conn) == 0, what="for whoever was struck twice to leave the line")
    limiter.release(lease)
