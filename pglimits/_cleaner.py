"""Gives back, in the background, what nobody waits for any longer."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, TypeAlias
from uuid import UUID

from . import _sql
from ._apart import AGAIN, Apart
from ._batches import Place, Slot
from ._database import ANSWERS_WITHIN, LOCK_WAIT, Busy, Database
from ._wake import OURS, Orphan, started
from .errors import PglimitsError

log = logging.getLogger("pglimits")


class Gone(NamedTuple):
    """A lease, or a place in line, that is to be released.

    places: each limit and key that it is on, as far as that is known.
    again_after: release it once more so many seconds later, where the first time may have been too early.
    """

    lease_id: UUID
    places: tuple[Place, ...] = ()
    again_after: float = 0.0

    @property
    def group(self) -> tuple[Place, ...]:
        """What is locked together with it: all on the same places. If they are not known, nothing is."""
        return self.places or (("", str(self.lease_id)),)


Given: TypeAlias = Gone | Slot | Orphan[Gone] | Orphan[Slot]


class Cleaner:
    """What has been given up, and the thread that releases it.

    ``put`` may be called from anywhere, a signal handler or the garbage collector too. A slot is put back into its
    batches, once the server is done with what was sent.
    """

    def __init__(self, database: Database, durable: bool, forget: Callable[[UUID], None]) -> None:
        self._database = database
        self._durable = durable
        self._forget = forget
        self._given: queue.SimpleQueue[Given | None] = queue.SimpleQueue()
        self.put: Callable[[Given], None] = self._given.put
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._later: list[tuple[float, Gone]] = []
        # What is on places that somebody keeps locked.
        self._apart: Apart[tuple[Place, ...]] = Apart()
        self._locked: defaultdict[tuple[Place, ...], set[UUID]] = defaultdict(set)

    def ready(self) -> None:
        """Have the thread run."""
        if self._thread is None or not self._thread.is_alive():
            with self._lock:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = started(
                        lambda: threading.Thread(target=self._work, name=f"{OURS}release", daemon=True)
                    )

    def stop(self) -> None:
        """Release what was put by now, and end the thread."""
        if self._thread is not None:
            self._given.put(None)
            self._thread.join(timeout=5)

    def release_all(self, all_of_it: Collection[Gone]) -> None:
        """Release as many as can be, for some seconds: what somebody keeps locked holds up none of the others."""
        until = time.monotonic() + ANSWERS_WITHIN / 2
        try:
            self._release({gone.lease_id for gone in all_of_it}, LOCK_WAIT)
        except Busy:
            groups: defaultdict[tuple[Place, ...], set[UUID]] = defaultdict(set)
            for gone in all_of_it:
                groups[gone.group].add(gone.lease_id)
            locked: Apart[tuple[Place, ...]] = Apart()
            locked.add(sorted(groups))
            while locked and (now := time.monotonic()) < until:
                time.sleep(max(min(locked.next_at, until) - now, 0.0))
                locked.try_next(lambda part: self._release(set().union(*map(groups.__getitem__, part)), AGAIN))

    def _work(self) -> None:
        with self._lock:
            if self._thread is not threading.current_thread():
                return
        while self._take():
            now = time.monotonic()
            due = [gone for at, gone in self._later if at <= now]
            self._later = [(at, gone) for at, gone in self._later if at > now]
            for gone in due:
                if gone.group in self._apart:
                    self._locked[gone.group].add(gone.lease_id)
            self._release_now([gone for gone in due if gone.group not in self._apart])
            self._apart.try_next(self._release_apart)
        left = [gone for _, gone in self._later]
        left += [Gone(lease_id, places) for places, ids in self._locked.items() for lease_id in ids]
        if left:
            with contextlib.suppress(PglimitsError):
                self.release_all(left)

    def _take(self) -> bool:
        """Take in what has been given, once there is something to do. False: it is time to stop."""
        while True:
            moment = min([self._apart.next_at, *(at for at, _ in self._later)])
            try:
                item = self._given.get(timeout=None if moment == math.inf else max(moment - time.monotonic(), 0.0))
            except queue.Empty:
                return True
            given = item.subject if isinstance(item, Orphan) else item
            if given is None:
                return False
            if isinstance(given, Slot):
                if given.connection is not None:
                    self._database.let_end(given.connection)
                    given.connection = None
                given.batches.put_back(given)
                continue
            self._forget(given.lease_id)
            self._later.append((0.0, given))
            if given.again_after:
                self._later.append((time.monotonic() + given.again_after, given))

    def _release_now(self, due: list[Gone]) -> None:
        if not due:
            return
        try:
            self._release({gone.lease_id for gone in due}, LOCK_WAIT)
        except Busy:
            self._apart.add(sorted(gone.group for gone in due))
            for gone in due:
                self._locked[gone.group].add(gone.lease_id)
        except Exception as error:
            self._failed(due, error)

    def _release_apart(self, groups: list[tuple[Place, ...]]) -> None:
        ids = {group: self._locked[group] for group in groups}
        try:
            self._release(set().union(*ids.values()), AGAIN)
        except Busy:
            raise
        except Exception as error:
            self._failed([Gone(lease_id, group) for group in groups for lease_id in ids[group]], error)
        for group in groups:
            del self._locked[group]

    def _failed(self, due: list[Gone], error: Exception) -> None:
        log.debug("giving back %d requests failed: %s", len(due), error)
        self._later += [(time.monotonic() + 1.0, gone) for gone in due]

    def _release(self, lease_ids: Iterable[UUID], patience: float) -> None:
        self._database.execute(_sql.RELEASE, [list(lease_ids), self._durable, patience], within=ANSWERS_WITHIN)
