"""The demo's crew: worker processes, what they wrote down, and what the database shows meanwhile."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pglimits.errors import PglimitsError

from ._client import connect
from ._demo_count import Event, Job, Jobs, Seen

if TYPE_CHECKING:
    from pglimits import Holder, Limit, Limiter, Waiter

_HELD_BACK = 0.1  # seconds until what several pipes tell has come in, so that it can be told in order
_TICK = 0.06
_LIMITS_EVERY = 0.2
_PATIENCE = 30.0


class DemoFailed(PglimitsError):
    """The demo itself could not go on."""


@dataclass(slots=True)
class Worker:
    """A worker process."""

    number: int
    process: subprocess.Popen[bytes]
    said: list[str] = field(default_factory=list)  # what is not of its log: a traceback
    ready: bool = False
    long: bool = False
    killed: bool = False
    grants: int = 0
    calls: int = 0
    _rest: bytes = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def take(self) -> list[Event] | None:
        """Read what it wrote since; None at its end."""
        assert self.process.stdout is not None
        read = os.read(self.process.stdout.fileno(), 65536)
        if not read:
            return None
        *lines, self._rest = (self._rest + read).split(b"\n")
        return [event for line in lines if (event := self._event(line)) is not None]

    def _event(self, line: bytes) -> Event | None:
        if not line.startswith(b'{"at"'):
            self.said.append(line.decode(errors="replace"))
            return None
        event = Event(worker=self.number, **json.loads(line))
        self.ready = self.ready or event.what == "ready"
        self.long = self.long or event.what == "long"
        self.grants += event.what == "run"
        self.calls += event.what == "call"
        return event

    def tell(self, command: str) -> None:
        """Send it a command. One that is dead misses nothing."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(command.encode() + b"\n")
            self.process.stdin.flush()


@dataclass(frozen=True, slots=True)
class View:
    """What is to be seen at a moment. Holders, waiters and limits as the database shows them."""

    elapsed: float
    now: float  # seconds since the epoch, by the database's clock
    database: Limit
    api: Limit
    holders: Mapping[int, Holder]
    waiters: Mapping[int, Waiter]
    workers: list[Worker]


@contextlib.contextmanager
def hired(how_many: int) -> Iterator[list[Worker]]:
    """So many workers, started before there is a server: Python needs its time too. None is left behind."""
    workers: list[Worker] = []
    try:
        for number in range(1, how_many + 1):
            # In a process group of its own: ctrl-C is for the demo alone. That it is gone is told by the end of stdin.
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}._demo_worker", str(number)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            workers.append(Worker(number, process))
        yield workers
    finally:
        _end(workers)


def _end(workers: list[Worker]) -> None:
    """End those that are still there. Safe to repeat."""
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.kill()
    for worker in workers:
        worker.process.wait()
        for pipe in (worker.process.stdin, worker.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


class Crew:
    """The workers, and the log of what happened.

    on_event: is told each event in the order of time, a moment later, with the job that it belongs to.
    on_view: is told what is to be seen, many times a second.
    """

    def __init__(
        self,
        workers: list[Worker],
        dsn: str,
        limiter: Limiter,
        jobs: Jobs,
        on_event: Callable[[Event, Job | None], None],
        on_view: Callable[[View], None],
    ) -> None:
        self.log: list[Event] = []
        self.heads: deque[tuple[float, int]] = deque(maxlen=400)  # who stood first in line when, of late
        self.seen: dict[str, Seen] = {}
        self.workers = workers
        self.view: View | None = None
        self.started = math.inf
        self._limiter = limiter
        self._jobs = jobs
        self._on_event = on_event
        self._on_view = on_view
        self._untold: list[Event] = []
        self._pipes = selectors.DefaultSelector()
        for worker in workers:
            assert worker.process.stdout is not None
            self._pipes.register(worker.process.stdout, selectors.EVENT_READ, worker)
        self._ahead = _ahead(dsn)
        self._limits_then: dict[str, Limit] = {}
        self._limits_seen = -math.inf

    @contextlib.contextmanager
    def at_work(self, dsn: str) -> Iterator[None]:
        """Have the workers connect; they then wait for ``go``. At the end there are none any more."""
        try:
            for worker in self.workers:
                worker.tell(f"connect {dsn}")
            everybody = len(self.workers)
            self.play(
                until=lambda: all(worker.ready for worker in self.workers) or len(self._pipes.get_map()) < everybody,
                what="the workers to start",
            )
            if failures := self.failures():
                raise DemoFailed("; ".join(failures))
            yield
        finally:
            _end(self.workers)
            self._pipes.close()

    def go(self) -> None:
        """Let them begin."""
        self.started = time.monotonic()
        for worker in self.workers:
            worker.tell("go")

    def stop(self) -> None:
        """Have them finish what they are at, and see them end."""
        for worker in self.workers:
            worker.tell("stop")
        self.play(_PATIENCE, until=lambda: not self._pipes.get_map())
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
                worker.said.append(f"did not end within {_PATIENCE:g} s and was killed")
        self._tell_events(math.inf)

    def was_first_in_line(self, worker: int, at: float) -> bool:
        """Whether the database showed it at the head when we looked last before that time."""
        return next((head == worker for seen_at, head in reversed(self.heads) if seen_at < at), False)

    def first_in_line(self) -> Worker:
        """The worker that is to get the next slot."""
        assert self.view is not None
        waiters = self.view.waiters
        return min(
            self.workers,
            key=lambda worker: waiters[worker.pid].position if worker.pid in waiters else math.inf,
        )

    def kill(self, worker: Worker) -> float:
        """End a worker as a power failure would, while it holds a slot. Returns when its lease ends."""
        os.kill(worker.pid, signal.SIGKILL)
        at = time.monotonic()
        worker.process.wait()
        worker.killed = True
        self.happened(Event(at, "killed", worker.number))
        self.play(0.1)  # until what it had sent last, a renewal perhaps, has been served
        ends = [
            self.local(holder.expires_at.timestamp())
            for holder in self._limiter.holders("database")
            if _pid(holder.holder) == worker.pid
        ]
        if not ends:
            raise DemoFailed(f"worker {worker.number} held no slot any more when it was killed")
        self.happened(Event(ends[0], "ended", worker.number))
        return ends[0]

    def set_limit(self, slots: int) -> None:
        """Change how many slots there are, while the workers contend for them."""
        # A grant by the new limit comes after we ask for it if it grows, after it is in force if it shrinks.
        asked = time.monotonic()
        changed = self._limiter.update("database", limit=slots)
        self._limits_seen = -math.inf
        grows = slots > self._jobs.slots
        self.happened(Event(asked if grows else self.local(changed.updated_at.timestamp()), "limit", slots=slots))

    def happened(self, event: Event) -> None:
        """Add to the log."""
        self.log.append(event)
        self._untold.append(event)

    def play(self, seconds: float = math.inf, *, until: Callable[[], bool] = lambda: False, what: str = "") -> None:
        """Let time pass, and show it: for so many seconds, or until something has come about."""
        begun = time.monotonic()
        while (left := begun + seconds - time.monotonic()) > 0 and not until():
            if seconds == math.inf and time.monotonic() > begun + _PATIENCE:
                raise DemoFailed(f"waited {_PATIENCE:g} s in vain for {what}")
            self._read(min(left, _TICK))
            self._look()
            self._tell_events(time.monotonic() - _HELD_BACK)

    def local(self, epoch: float) -> float:
        """A time of the database's clock as one of the monotonic clock."""
        return epoch - self._ahead

    def failures(self) -> list[str]:
        """The workers that failed, and what they said last."""
        return [
            f"worker {worker.number} ended with code {worker.process.poll()}"
            + (f": {worker.said[-1]}" if worker.said else "")
            for worker in self.workers
            if (worker.process.poll() or worker.said) and not worker.killed
        ]

    def _read(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        if not self._pipes.get_map():
            time.sleep(seconds)
        for key, _ in self._pipes.select(seconds):
            worker: Worker = key.data
            events = worker.take()
            for event in events or ():
                self.happened(event)
                if event.what == "run" and self._seen(event.lease).granted is None:  # where we look too seldom
                    self._seen(event.lease).granted = self.local(event.granted)
            if events is None:
                self._pipes.unregister(key.fileobj)
                worker.process.wait()
        time.sleep(max(until - time.monotonic(), 0.0))

    def _look(self) -> None:
        """See what the database shows, and keep what only it knows: arrivals and grants."""
        holders = self._limiter.holders("database")
        waiters = self._limiter.waiters("database")
        for waiter in waiters:
            self._seen(waiter.lease_id).arrived = self.local(waiter.waiting_since.timestamp())
        for holder in holders:
            self._seen(holder.lease_id).granted = self.local(holder.acquired_at.timestamp())
        now = time.monotonic()
        in_line = {waiter.position: _pid(waiter.holder) for waiter in waiters}
        self.heads.append((now, next((worker.number for worker in self.workers if worker.pid == in_line.get(1)), 0)))
        self.view = View(
            max(now - self.started, 0.0),
            now + self._ahead,
            self._limits()["database"],
            self._limits()["api"],
            {_pid(holder.holder): holder for holder in holders},
            {_pid(waiter.holder): waiter for waiter in waiters},
            self.workers,
        )
        self._on_view(self.view)

    def _limits(self) -> dict[str, Limit]:
        """The limits as they were a moment ago: it is others who are to be busy, not we."""
        if time.monotonic() >= self._limits_seen + _LIMITS_EVERY:
            self._limits_seen = time.monotonic()
            self._limits_then = {limit.name: limit for limit in self._limiter.list()}
        return self._limits_then

    def _seen(self, lease_id: object) -> Seen:
        return self.seen.setdefault(str(lease_id), Seen())

    def _tell_events(self, until: float) -> None:
        due = sorted((event for event in self._untold if event.at <= until), key=lambda event: event.at)
        self._untold = [event for event in self._untold if event.at > until]
        for event in due:
            self._on_event(event, self._jobs.follow(event))


def _pid(holder: object) -> int:
    return int(holder["pid"]) if isinstance(holder, dict) else 0


def _ahead(dsn: str) -> float:
    """By how much the database's clock, in seconds since the epoch, is ahead of our monotonic one."""
    best, ahead = math.inf, 0.0
    with connect(dsn) as connection:
        for _ in range(30):
            before = time.monotonic()
            row = connection.execute("select extract(epoch from pglimits._now())::float8").fetchone()
            took = time.monotonic() - before
            if row is not None and took < best:
                best, ahead = took, float(row[0]) - before - took / 2
    return ahead
