"""The gate of a worker of Celery: tasks stand in line before they come to the pool.

Invariant: who waits here has an unacknowledged message with the broker, as a task with a countdown has, and nothing
else. A worker that dies leaves the line within 10 seconds, and the broker delivers its messages again.

A loop of asyncio, in a thread of its own in the worker's main process, has a line for each task and key. The first of
a line stands in line in the database, for as long as a process of the pool is free; the others wait behind it, in their
order. What is granted goes on as a task does whose countdown has ended. The lease belongs to the main process, which
renews it, and gives it back when the pool has done with the task, however that ended.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from celery.exceptions import TaskRevokedError, TimeLimitExceeded
from celery.utils.serialization import get_pickleable_exception
from celery.worker import state

from . import _default
from ._leases import Lease
from ._limiter import AsyncLimiter, Limiter
from ._tasks import Wanted
from ._wake import Bell
from .errors import AcquireTimeout, LimiterUnavailable

log = logging.getLogger("pglimits.celery")

TOLD = "pglimits"
"""What the gate tells the task, in the request that goes to the pool."""
WAITED = "pglimits_waited"
"""Header: seconds that a task had waited when its message was sent anew."""
_LOOKS = 0.05
"""Seconds after which the gate looks again whether a process of the pool is free."""
_LOOKS_ROUND = 0.5
"""Seconds after which one that stands in line is looked at: it may have been revoked."""
_TRIES_AGAIN = 1.0
"""Seconds until a database that could not be reached is asked again."""
_DIES_WITHIN = 1.0
"""Seconds that the pool may take to kill a process whose task is out of time."""


class LimitedRequest:
    """Mixed into the class of Celery that stands for a task in a worker's main process."""

    # Of the class that is made for a task and a worker.
    gate: Gate | None
    wanted: Wanted
    hold_seconds: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mine: Any = self
        headers = [mine._request_dict, mine._request_dict.get("headers") or {}]
        # A retry of the task's own has copied what was said of the last time.
        for each in headers:
            each.pop(TOLD, None)
        self.waited = max([float(each.pop(WAITED, 0.0)) for each in headers])
        self.since = time.monotonic()
        self.leaves = self.goes = self.counted = False
        self.timer: asyncio.TimerHandle | None = None
        self.limiter: Limiter | AsyncLimiter | None = None
        # Forgotten with the request, it is given back.
        self.lease: Lease | None = None

    def __init_subclass__(cls) -> None:
        """Celery derives a class for each task, with methods that call no other."""
        super().__init_subclass__()
        for name, wrap in (("execute_using_pool", _through_gate), ("on_success", _giving_back)):
            if name in cls.__dict__:
                setattr(cls, name, wrap(cls.__dict__[name]))

    def left(self) -> float | None:
        """Seconds that it may wait on; None: for ever."""
        timeout = self.wanted.timeout_seconds
        return None if timeout is None else max(timeout - self.waited - (time.monotonic() - self.since), 0.0)

    def is_over(self) -> bool:
        """Whether it need not wait any longer: it was revoked, has expired, or its message is to be sent anew."""
        mine: Any = self
        return self.leaves or mine.id in state.revoked or bool(mine.maybe_expire())

    def on_accepted(self, *args: Any, **kwargs: Any) -> Any:
        done = super().on_accepted(*args, **kwargs)  # type: ignore[misc]
        if self.gate is not None:
            self.gate.going.discard(self)
        return done

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        self.give_back(_DIES_WITHIN if isinstance(exc_info.exception, TimeLimitExceeded) else 0.0)
        return super().on_failure(exc_info, *args, **kwargs)  # type: ignore[misc]

    def on_timeout(self, soft: bool, timeout: float) -> Any:
        if not soft:
            self.give_back(_DIES_WITHIN)
        return super().on_timeout(soft, timeout)  # type: ignore[misc]

    def give_back(self, after: float = 0.0) -> None:
        """The pool has done with it."""
        lease, self.lease = self.lease, None
        if self.gate is not None:
            self.gate.done(self, lease, after)


def _through_gate(execute: Callable[..., Any]) -> Callable[..., Any]:
    def execute_using_pool(self: Any, pool: Any, **kwargs: Any) -> Any:
        if self.gate is None:
            return execute(self, pool, **kwargs)
        if self.goes or self.revoked():
            try:
                return execute(self, pool, **kwargs)
            except BaseException:
                self.give_back()
                raise
        self.gate.keep(self)
        raise TaskRevokedError(self.id)  # told so, the worker does not count it as one that is in its pool

    return execute_using_pool


def _giving_back(on_success: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.give_back()
        return on_success(self, *args, **kwargs)

    return wrapper


class Gate:
    """Of one worker."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        # On their way into the pool.
        self.going: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lines: dict[tuple[str, str], deque[Any]] = {}
        self._serving: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._kept: set[Any] = set()
        # In whose place no other task was fetched, as the pool was full: one worker shall not have what another could
        # be doing.
        self._uncounted: deque[Any] = deque()
        self._bell = Bell()
        self._to_do: deque[tuple[Callable[[Any], None], Any]] = deque()
        # Where the worker has no event loop: there its timer does such things, in a thread of its own as well.
        self._hands = concurrent.futures.ThreadPoolExecutor(1, "pglimits-gate")
        threading.Thread(target=self._loop.run_forever, name="pglimits-gate", daemon=True).start()

    # In the worker's threads.

    def open(self, task: str) -> None:
        """The worker begins to fetch such tasks. If it did so before, the broker delivers again what waits here."""
        self._loop.call_soon_threadsafe(self._forget, task)
        if self._consumer.hub is not None:
            self._consumer.hub.add_reader(self._bell.fd, self._heed)

    def keep(self, request: Any) -> None:
        """Have a task wait. The worker fetches another one in its place, as with a countdown, if it can run one."""
        if self._is_free(len(self._kept)):
            self._count(request)
        self._kept.add(request)
        state.reserved_requests.discard(request)
        self._loop.call_soon_threadsafe(self._join, request)

    def _is_free(self, more: int = 0) -> bool:
        """Whether there is a process in the pool that does nothing, and will not have to if so many more come."""
        busy = len(self.going) + len(state.active_requests) + more
        return bool(busy < self._consumer.pool.num_processes)

    def _count(self, request: Any) -> None:
        if not request.counted:
            request.counted = True
            self._consumer.qos.increment_eventually()

    def done(self, request: Any, lease: Lease | None, after: float) -> None:
        """A task has left the pool."""
        self.going.discard(request)
        if lease is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, after, request.limiter._release_later, lease)

    def _heed(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._bell.heard()
        while self._to_do:
            self._do(*self._to_do.popleft())

    def _do(self, what: Callable[[Any], None], request: Any) -> None:
        try:
            what(request)
        except Exception:
            log.exception("the task %s[%s] could not go on", request.name, request.id)

    def _send_anew(self, request: Any) -> None:
        context = request._context
        waited = request.waited + time.monotonic() - request.since
        headers = {**(context.headers or {}), WAITED: waited}
        try:
            request.task.signature_from_request(context, context.args, context.kwargs, headers=headers).apply_async()
        except Exception:
            request.leaves = request.goes = False
            self._kept.add(request)
            self._loop.call_soon_threadsafe(self._join, request)
            raise
        request.acknowledge()
        state.task_ready(request)
        if request.counted:
            self._consumer.qos.decrement_eventually()

    # In the loop.

    def _forget(self, task: str) -> None:
        for place in [place for place in self._lines if place[0] == task]:
            self._serving.pop(place).cancel()
            for request in self._lines.pop(place):
                request.goes = True
                self._kept.discard(request)
                state.requests.pop(request.id, None)

    def _join(self, request: Any) -> None:
        try:
            key = request.wanted.key_of(request.args, request.kwargs)
            place = request.task.name, key
            line = self._lines.get(place) or deque()
        except Exception as error:
            self._go(request, {"error": get_pickleable_exception(error)})
            return
        if key is None:
            self._go(request, {})
            return
        line.append(request)
        if not request.counted:
            self._uncounted.append(request)
        if place not in self._serving:
            self._lines[place] = line
            self._serving[place] = self._loop.create_task(self._serve(place, line))
        request.timer = self._loop.call_later(request.hold_seconds, self._leave, line, request)

    def _leave(self, line: deque[Any], request: Any) -> None:
        """It has waited so long that the broker might lose patience. Who stands in line in the database sees to it."""
        if request in line:
            request.leaves = True
            if request is not line[0]:
                line.remove(request)
                self._go(request, None)

    async def _serve(self, place: tuple[str, str], line: deque[Any]) -> None:
        while line:
            request = line[0]
            try:
                told = await self._ask(request, place[1])
            except Exception as error:
                told = {"error": get_pickleable_exception(error)}
            line.popleft()
            self._go(request, told)
        del self._lines[place], self._serving[place]

    async def _ask(self, request: Any, key: str) -> dict[str, Any] | None:
        """Stand in line for a task. What it is to be told; None: it is over. Raises what the task is to raise."""
        wanted: Wanted = request.wanted
        holder = {"task": request.name, "id": request.id, "worker": request.hostname}
        while not request.is_over():
            left = request.left()
            if left == 0 and wanted.timeout_seconds:
                raise AcquireTimeout(f"no slot came free within {wanted.timeout_seconds:g} s")
            if not await self._has_room():
                continue
            limiter = request.limiter = wanted.limiter_or(_default.async_limiter)._in_tasks()
            asking = self._loop.create_task(limiter._run(wanted.take(limiter, key, left, holder)))
            try:
                while not asking.done() and not request.is_over():
                    await asyncio.wait({asking}, timeout=_LOOKS_ROUND)
                    if not asking.done() and self._is_free():
                        self._fetch_more(len(self._uncounted))
                if asking.done():
                    request.lease = lease = asking.result()
                    return {} if lease is None else {"fence": lease.fence}
            except LimiterUnavailable as error:
                if wanted.timeout_seconds == 0:
                    raise
                log.warning("the tasks %s wait until the database can be reached: %s", request.name, error)
                await asyncio.sleep(_TRIES_AGAIN)
            finally:
                asking.cancel()
        return None

    async def _has_room(self) -> bool:
        """Whether a process of the pool is free; if not, some time has passed. Many lines look less often."""
        if self._is_free():
            self._fetch_more(1)
            return True
        await asyncio.sleep(_LOOKS * max(len(self._serving) / 20, 1))
        return False

    def _fetch_more(self, most: int) -> None:
        """The pool has room again."""
        while self._uncounted and most > 0:
            if not (request := self._uncounted.popleft()).goes:
                self._count(request)
                most -= 1

    def _go(self, request: Any, told: dict[str, Any] | None) -> None:
        """Let it into the pool, with what it is told. None: it was revoked, which is seen to on the way there; or its
        message is to be sent anew."""
        self._kept.discard(request)
        if request.timer is not None:
            request.timer.cancel()
        if told is None and request.leaves:
            request.goes = True
            self._hand(self._send_anew, request)
            return
        if told is not None:
            request.request_dict[TOLD] = told
        if request.lease is not None:
            request.lease.on_lost(
                functools.partial(
                    log.error, "the lease of the task %s[%s] was lost while it is at work", request.name, request.id
                )
            )
        request.goes = True
        self._count(request)  # the worker undoes that
        self.going.add(request)
        self._hand(self._consumer.apply_eta_task, request)

    def _hand(self, what: Callable[[Any], None], request: Any) -> None:
        """Have the worker do something, in the thread that may."""
        if self._consumer.hub is None:
            self._hands.submit(self._do, what, request)
        else:
            self._to_do.append((what, request))
            self._bell.ring()


def gate_of(consumer: Any) -> Gate:
    """The gate of a worker."""
    if not hasattr(consumer, "pglimits_gate"):
        consumer.pglimits_gate = Gate(consumer)
    gate: Gate = consumer.pglimits_gate
    return gate
