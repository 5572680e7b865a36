"""A worker of the histories: asks, holds, releases at random, and writes down what it knew and when.

python history_worker.py '{"dsn": …, "kind": "sync", …}'     works until its standard input ends
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import psycopg
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from pglimits import (
    AcquireTimeout,
    AsyncLimiter,
    LeaseLost,
    Limiter,
    LimiterUnavailable,
    QueueFull,
    SlotsExceedLimit,
    _batches,
    _calls,
)

EXPECTED = (AcquireTimeout, LeaseLost, LimiterUnavailable, QueueFull, SlotsExceedLimit)


# What is asked has the id of its attempt: so the log of the database tells of it too.
attempt: ContextVar[str] = ContextVar("attempt")
_calls.new_id = lambda: uuid.UUID(attempt.get())


class Cancelled(Exception):
    """A task was cancelled while it asked or held."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker does.

    Attributes:
        kind: sync, async or sql.
        log: the file that it writes to.
        asks: what it asks for, one of these each time: {"slots": {name: slots}, "keys": [...], "rate": bool}.
        hold: how many seconds it holds a lease, at most.
        lease: lease_duration, seconds.
        timeouts: how many seconds it waits, one of these each time; null for ever.
        at_once: how many threads or tasks it has.
        limiter: arguments of its Limiter.
        pool: of how many connections a pool is that its Limiter is given; 0: it has its own connections.
        answers_within: instead of pglimits' own patience, seconds.
        seed: of its random numbers.
    """

    dsn: str
    name: str
    kind: str
    log: str
    asks: Sequence[Mapping[str, Any]]
    seed: int
    hold: float = 0.1
    lease: float = 2.0
    timeouts: Sequence[float | None] = (None, 0, 1, 5)
    at_once: int = 4
    limiter: Mapping[str, Any] = field(default_factory=dict)
    pool: int = 0
    answers_within: float | None = None


class Log:
    """Writes lines that outlive a kill."""

    def __init__(self, plan: Plan) -> None:
        self._file = os.open(plan.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._name = plan.name

    def say(self, attempt: str, what: str, at: float | None = None, **more: Any) -> None:
        line = json.dumps([time.time() if at is None else at, self._name, attempt, what, more])
        os.write(self._file, line.encode() + b"\n")


@dataclass(frozen=True, slots=True)
class Ask:
    """One thing asked for."""

    attempt: str
    slots: Mapping[str, int]
    key: str
    rate: bool
    priority: int
    timeout: float | None
    hold: float

    @property
    def names(self) -> dict[Any, int]:
        return {(name, self.key): slots for name, slots in self.slots.items()}


class Held(Protocol):
    """What a lease is to its holder."""

    @property
    def fences(self) -> Sequence[int | None]: ...
    @property
    def lost(self) -> bool: ...


class Worker:
    """What all kinds have in common. ``ended`` says when to stop."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.log = Log(plan)
        self.random = random.Random(plan.seed)
        self.ended = threading.Event()

    def next(self) -> Ask:
        asked = self.random.choice(self.plan.asks)
        ask = Ask(
            str(uuid.UUID(int=self.random.getrandbits(128))),
            asked["slots"],
            self.random.choice(asked.get("keys", [""])),
            bool(asked.get("rate")),
            self.random.choice(asked.get("priorities", [0])),
            self.random.choice(self.plan.timeouts),
            self.random.random() * self.plan.hold,
        )
        attempt.set(ask.attempt)
        self.log.say(
            ask.attempt, "asked", slots=dict(ask.slots), key=ask.key, rate=ask.rate, priority=ask.priority,
            timeout=ask.timeout,
        )  # fmt: skip
        return ask

    def steps(self, ask: Ask, lease: Held) -> Iterator[float]:
        """Hold a lease: how long to sleep, again and again. Says what is known of it."""
        self.say_granted(ask, lease)
        until = time.monotonic() + ask.hold
        while (left := until - time.monotonic()) > 0:
            yield min(left, 0.02)
            self.say_held(ask, "still", lease)
        self.say_held(ask, "leaving", lease)

    def say_granted(self, ask: Ask, lease: Held) -> None:
        self.say_held(ask, "granted", lease, fences=[fence for fence in lease.fences if fence is not None])

    def say_held(self, ask: Ask, what: str, lease: Held, **more: Any) -> None:
        at = time.time()  # before it is known: what is not lost after it was not lost then
        self.log.say(ask.attempt, what, at, lost=lease.lost, **more)

    @contextlib.contextmanager
    def noted(self, ask: Ask) -> Iterator[None]:
        """Says how it went on. Errors that nobody expects end the worker."""
        try:
            yield
        except AcquireTimeout as error:
            # It has a cause where the database did not say so.
            self.log.say(ask.attempt, "refused" if ask.timeout == 0 and error.__cause__ is None else "timed out")
        except Cancelled:
            self.log.say(ask.attempt, "cancelled")
        except EXPECTED as error:
            self.log.say(ask.attempt, "failed", error=type(error).__name__, message=str(error)[:200])
        except Exception as error:
            self.log.say(ask.attempt, "unexpected", error=repr(error)[:500])
            raise
        else:
            self.log.say(ask.attempt, "went" if ask.rate else "left")


def work_in_threads(worker: Worker) -> None:
    with contextlib.ExitStack() as opened:
        to: dict[str, Any] = {"dsn": worker.plan.dsn}
        if size := worker.plan.pool:
            to = {"pool": opened.enter_context(ConnectionPool(worker.plan.dsn, min_size=size, max_size=size))}
        limiter = opened.enter_context(Limiter(**to, **worker.plan.limiter))

        def work() -> None:
            while not worker.ended.is_set():
                ask_once(worker, limiter)

        run_threads(worker, work)


def ask_once(worker: Worker, limiter: Limiter) -> None:
    ask = worker.next()
    with worker.noted(ask):
        if ask.rate:
            limiter.rate_limit(ask.names, timeout_seconds=ask.timeout, strict=True)
            return
        with limiter.concurrency(
            ask.names, timeout_seconds=ask.timeout, lease_duration=worker.plan.lease, priority=ask.priority,
            strict=True, raise_on_lease_renewal_failure=False,
        ) as lease:  # fmt: skip
            for seconds in worker.steps(ask, lease):
                time.sleep(seconds)


def run_threads(worker: Worker, work: Any) -> None:
    threads = [threading.Thread(target=work, daemon=True) for _ in range(worker.plan.at_once)]
    for thread in threads:
        thread.start()
    worker.ended.wait()
    for thread in threads:
        thread.join()


async def work_in_tasks(worker: Worker) -> None:
    async with contextlib.AsyncExitStack() as opened:
        to: dict[str, Any] = {"dsn": worker.plan.dsn}
        if size := worker.plan.pool:
            pool = AsyncConnectionPool(worker.plan.dsn, min_size=size, max_size=size, open=False)
            to = {"pool": await opened.enter_async_context(pool)}
        limiter = await opened.enter_async_context(AsyncLimiter(**to, **worker.plan.limiter))

        async def work() -> None:
            while not worker.ended.is_set():
                await ask_once_in_loop(worker, limiter)

        async def until_ended() -> AsyncIterator[None]:
            while not worker.ended.is_set():
                yield
                await asyncio.sleep(0.05)

        tasks = [asyncio.create_task(work()) for _ in range(worker.plan.at_once)]
        async for _ in until_ended():
            if any(task.done() for task in tasks):
                break
        await asyncio.gather(*tasks)


async def ask_once_in_loop(worker: Worker, limiter: AsyncLimiter) -> None:
    ask = worker.next()
    with worker.noted(ask):
        # Some give up by cancelling.
        bound = worker.random.random() if worker.random.random() < 0.1 else None
        try:
            async with asyncio.timeout(bound):
                await _ask_in_loop(worker, limiter, ask)
        except TimeoutError as error:
            if isinstance(error, AcquireTimeout):
                raise
            raise Cancelled from None


async def _ask_in_loop(worker: Worker, limiter: AsyncLimiter, ask: Ask) -> None:
    if ask.rate:
        await limiter.rate_limit(ask.names, timeout_seconds=ask.timeout, strict=True)
        return
    async with limiter.concurrency(
        ask.names, timeout_seconds=ask.timeout, lease_duration=worker.plan.lease, priority=ask.priority,
        strict=True, raise_on_lease_renewal_failure=False,
    ) as lease:  # fmt: skip
        for seconds in worker.steps(ask, lease):
            await asyncio.sleep(seconds)


class SqlLease:
    """A lease of plain SQL that nobody renews: lost when it ends."""

    def __init__(self, fences: Sequence[int | None], ends: float) -> None:
        self._fences, self._ends = fences, ends

    @property
    def fences(self) -> Sequence[int | None]:
        return self._fences

    @property
    def lost(self) -> bool:
        return time.time() >= self._ends


UNAVAILABLE = (psycopg.OperationalError, psycopg.InternalError)
LIMIT_LOCKED = "PL009"
ASK = {
    "acquire": "status, array[fence], expires_at, retry_after from pglimits.acquire",
    "acquire_all": "status, fences, expires_at, retry_after from pglimits.acquire_all",
    "rate_limit": "status, null, null, retry_after from pglimits.rate_limit",
    "rate_limit_all": "status, null, null, retry_after from pglimits.rate_limit_all",
}


def work_in_sql(worker: Worker) -> None:
    """Repeats whatever got no answer: that must act once."""

    def work() -> None:
        connection: psycopg.Connection[Any] | None = None

        def run(query: str, *parameters: Any) -> Any:
            nonlocal connection
            while True:
                try:
                    if connection is None or connection.closed:
                        connection = psycopg.connect(worker.plan.dsn, autocommit=True, prepare_threshold=None)
                    return connection.execute(query.encode(), parameters).fetchone()
                except psycopg.Error as error:
                    if not isinstance(error, UNAVAILABLE) and error.sqlstate != LIMIT_LOCKED:
                        worker.log.say("", "unexpected", error=repr(error)[:500])
                        raise
                    if connection is not None:
                        connection.close()
                    time.sleep(0.05)

        while not worker.ended.is_set():
            ask = worker.next()
            status, lease = ask_in_sql(worker, ask, run)
            if lease is not None:
                for seconds in worker.steps(ask, lease):
                    time.sleep(seconds)
                run("select pglimits.release(%s)", ask.attempt)
            worker.log.say(ask.attempt, status)

    run_threads(worker, work)


def ask_in_sql(worker: Worker, ask: Ask, run: Callable[..., Any]) -> tuple[str, SqlLease | None]:
    """Ask until it is granted, or not: what to say of it at its end, and the lease that it has until then."""
    function = "rate_limit" if ask.rate else "acquire"
    wanted: list[Any] = [*ask.slots, *ask.slots.values(), ask.key]
    if len(ask.slots) > 1:
        function += "_all"
        wanted = [list(ask.slots), list(ask.slots.values()), [ask.key]]
    more = "timeout_seconds => %s, priority => %s, lease_id => %s"
    parameters = [*wanted, ask.timeout, ask.priority, ask.attempt]
    if not ask.rate:
        more += ", lease_duration => %s"
        parameters.append(worker.plan.lease)
    status, fences, ends = "queued", [], None
    if len(ask.slots) == 1 and ask.timeout != 0 and worker.random.random() < 0.25:
        answer = run(f"call pglimits.{function}_wait(%s, %s, %s, {more})", *parameters)
        status, fences, ends = answer[1], answer[2:3], answer[3] if not ask.rate else None
    while status == "queued":
        status, fences, ends, retry_after = run(f"select {ASK[function]}(%s, %s, %s, {more})", *parameters)
        if status == "queued" and worker.ended.is_set():
            run("select pglimits.release(%s)", ask.attempt)
            status = "timed out"
        elif status == "queued":
            # A lease that was handed over meanwhile is in use by nobody.
            time.sleep(retry_after if ask.rate else min(retry_after, 0.05))
    if status == "granted":
        return ("went", None) if ask.rate else ("left", SqlLease(fences, ends.timestamp()))
    return "refused" if status == "refused" and ask.timeout == 0 else "timed out", None


def start() -> Worker:
    """The worker that the arguments of this process describe. It ends with its standard input."""
    logging.disable(logging.WARNING)
    worker = Worker(Plan(**json.loads(sys.argv[1])))
    if worker.plan.answers_within is not None:
        _batches.Batch.answers_within = worker.plan.answers_within

    def until_told() -> None:
        sys.stdin.read()
        worker.ended.set()

    threading.Thread(target=until_told, daemon=True).start()
    print("ready", flush=True)
    return worker


def main() -> None:
    worker = start()
    if worker.plan.kind == "sync":
        work_in_threads(worker)
    elif worker.plan.kind == "async":
        asyncio.run(work_in_tasks(worker))
    else:
        work_in_sql(worker)


if __name__ == "__main__":
    main()
