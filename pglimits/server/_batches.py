"""Requests that are tried once under ids that their clients chose: those that arrive together share a statement.

The wrapper's courier does so for ids of its own. It gives back what it has not heard of, which an id that a client may
ask for again forbids. Here nothing is given back: asked again, a request gets the answer that it has already.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from .._database import TRIES, Busy, Cancelled
from ..errors import LimiterUnavailable, LimitLocked, PglimitsError
from ._database import Database

log = logging.getLogger("pglimits.server")

_LOCKED = "55P03"
_MOST = 500
"""Requests in one statement."""
_ACQUIRE = """
    select a.first, a.last, a.status, a.fences, a.expires_at, a.seconds
    from pglimits._acquire_batch(
      %s::text[], %s::int[], %s::text[], %s::boolean, 0, %s::float8, %s::int, %s::uuid[], %s::jsonb, true, %s::boolean,
      null, clamp => %s::boolean) a
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request was answered.

    Attributes:
        status: ``granted``, ``queued``, ``refused``, or ``unlimited``.
        lease_id: of the lease or the place in line; None if there is neither.
        fences: one for each name; None where the limit is not enforced, and for rate limits.
        retry_after: seconds; of ``queued``: ask again within that. None: only a release can tell.
    """

    status: str
    lease_id: UUID | None = None
    fences: list[int | None] | None = None
    expires_at: datetime | None = None
    retry_after: float | None = None
    position: int | None = None

    @property
    def fence(self) -> int | None:
        """The first fence there is."""
        return next((fence for fence in self.fences or () if fence is not None), None)


@dataclass(frozen=True, slots=True)
class Alike:
    """What requests have in common that differ in nothing but their ids and holders."""

    names: tuple[str, ...]
    slots: tuple[int, ...]
    keys: tuple[str, ...]
    for_rate: bool
    lease_duration: float
    priority: int
    strict: bool
    clamp: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    lease_id: UUID
    holder: str
    answer: asyncio.Future[tuple[Answer, float]]


class Batches:
    """Sends them."""

    def __init__(self, database: Database, at_once: asyncio.Semaphore) -> None:
        self._db = database
        self._at_once = at_once
        self._asked: dict[Alike, list[_Asked]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, alike: Alike, lease_id: UUID, holder: str) -> Answer:
        """Ask once. holder: as JSON. Raises as ``pglimits.acquire`` does."""
        asked = _Asked(lease_id, holder, asyncio.get_running_loop().create_future())
        if alike in self._asked:
            self._asked[alike].append(asked)
        else:
            self._asked[alike] = [asked]
            task = asyncio.create_task(self._go_on(alike))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        answer, seconds = await asked.answer
        if seconds:  # it is granted as of a moment that is near
            await asyncio.sleep(seconds)
        return answer

    async def _go_on(self, alike: Alike) -> None:
        """Send what has been asked meanwhile, until there is nothing left."""
        batch: dict[UUID, _Asked] = {}
        try:
            while self._asked[alike]:
                batch = {}
                later = []
                for asked in self._asked[alike]:
                    if asked.lease_id in batch or len(batch) == _MOST:
                        later.append(asked)
                    else:
                        batch[asked.lease_id] = asked
                self._asked[alike] = later
                await self._send(alike, list(batch.values()))
        finally:  # however it ends: nobody is left waiting, and the next who asks begins anew
            _fail([*batch.values(), *self._asked.pop(alike)], LimiterUnavailable("the server ends"))

    async def _send(self, alike: Alike, batch: Sequence[_Asked]) -> None:
        try:
            answers = await self._answers(alike, batch)
            for asked, answer in zip(batch, answers, strict=True):
                if not asked.answer.done():
                    asked.answer.set_result(answer)
        except (LimiterUnavailable, LimitLocked) as error:
            _fail(batch, error)
        except PglimitsError as error:
            if len(batch) == 1:
                _fail(batch, error)
            else:  # it may be the fault of one
                for asked in batch:
                    await self._send(alike, [asked])
        except Exception as error:
            _fail(batch, error)

    async def _answers(self, alike: Alike, batch: Sequence[_Asked]) -> list[tuple[Answer, float]]:
        """Those of a batch. It is sent again where the database says that it did nothing, and may do it now."""
        for _ in range(TRIES - 1):
            try:
                return await self._answers_of_one_try(alike, batch)
            except (Busy, Cancelled) as error:
                log.debug("a batch is sent again: %s", error)
        return await self._answers_of_one_try(alike, batch)

    async def _answers_of_one_try(self, alike: Alike, batch: Sequence[_Asked]) -> list[tuple[Answer, float]]:
        try:
            async with self._at_once:
                rows = await self._db.rows(
                    _ACQUIRE,
                    [
                        list(alike.names),
                        list(alike.slots),
                        list(alike.keys),
                        alike.for_rate,
                        alike.lease_duration,
                        alike.priority,
                        [asked.lease_id for asked in batch],
                        f"[{','.join(asked.holder for asked in batch)}]",
                        alike.strict,
                        alike.clamp,
                    ],
                )
        except Busy as error:
            if getattr(error.__cause__, "sqlstate", None) != _LOCKED:
                raise
            raise LimitLocked(f"somebody keeps one of these limits locked: {error}") from error
        return [
            _answer(alike, row, nth, batch[row["first"] - 1 + nth].lease_id)
            for row in rows
            for nth in range(row["last"] - row["first"] + 1)
        ]


def _answer(alike: Alike, row: dict[str, Any], nth: int, lease_id: UUID) -> tuple[Answer, float]:
    """That of the nth request of a run of them, and the seconds until it goes."""
    seconds = row["seconds"] or [None]
    mine: float | None = seconds[min(nth, len(seconds) - 1)]
    if row["status"] == "unlimited":
        return Answer("unlimited"), 0.0
    if row["status"] != "granted":
        return Answer("refused", retry_after=mine), 0.0
    if alike.for_rate:
        return Answer("granted", lease_id), mine or 0.0
    fences: list[int | None] | None = row["fences"]
    if nth and fences is not None and fences[0] is not None:
        fences = [fences[0] + nth]  # one limit, and each has the next
    ends: datetime | None = row["expires_at"]
    if ends is not None and nth:
        ends += timedelta(seconds=(mine or 0.0) - (seconds[0] or 0.0))
    return Answer("granted", lease_id, fences, ends), mine or 0.0


def _fail(batch: Sequence[_Asked], error: Exception) -> None:
    for asked in batch:
        if not asked.answer.done():
            asked.answer.set_exception(error)
