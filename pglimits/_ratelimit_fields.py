"""The fields RateLimit-Policy and RateLimit, as draft-ietf-httpapi-ratelimit-headers-11 has them; all of it is here.

A policy is a limit, its partition a key: ``"api";q=5;w=1`` is a rate limit of 5 slots that come back within a second,
``"database";q=10;qu="concurrent-requests"`` a concurrency limit. What is left: ``"api";r=3;t=1``, three slots now, and
no more within a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

import http_sf

from . import _sql
from ._leases import Place
from .errors import PglimitsError

_LARGEST = 999_999_999_999_999
"""The largest integer of a structured field."""
_PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
_SETTINGS, _USED = (re.sub(rb"\$\d", b"%s", each.sql).decode() for each in (_sql.SETTINGS, _sql.USED))
_SETTINGS_LIVE = 2.0
"""Seconds for which the settings of a limit are remembered here. They are a hint: nothing is decided by them."""
_MOST_SETTINGS = 10_000
PATIENCE = 0.5
"""Seconds for which an answer waits for these fields."""


def policy(name: str) -> str:
    """The name of a limit as these fields have it: they know ASCII only."""
    return quote(name, safe=_PRINTABLE)


@dataclass(frozen=True, slots=True)
class Budget:
    """What is left of one key of a limit."""

    name: str
    key: str
    limit: int
    slot_decay_per_second: float
    held: int = 0
    level: float = 0.0

    @property
    def policy(self) -> str:
        """Its name as these fields have it."""
        return policy(self.name)

    @property
    def left(self) -> int:
        used = max(self.held, self.level) if self.slot_decay_per_second else self.held
        return max(math.floor(self.limit - used + 1e-9), 0)

    @property
    def window(self) -> int | None:
        """Seconds in which all slots come back."""
        return _seconds(self.limit / self.slot_decay_per_second) if self.slot_decay_per_second else None

    @property
    def next_slot_in(self) -> int | None:
        """Seconds until one more comes back; None if none is to come, or only a release can tell."""
        left = self.left
        if not self.slot_decay_per_second or left >= self.limit:
            return None
        return _seconds((left + 1 - (self.limit - self.level)) / self.slot_decay_per_second)


def fields(budgets: Sequence[Budget], retry_after: float | None = None) -> dict[str, str]:
    """Both fields. ``retry_after``: seconds in which a request that was refused would be let in."""
    if not budgets:
        return {}
    policies: list[Any] = []
    left: list[Any] = []
    for budget in budgets:
        policy: dict[str, Any] = {"q": min(budget.limit, _LARGEST)}
        now: dict[str, Any] = {"r": min(budget.left, _LARGEST)}
        if budget.window is None:
            policy["qu"] = "concurrent-requests"
        else:
            policy["w"] = budget.window
        seconds = budget.next_slot_in if retry_after is None else _seconds(retry_after)
        if seconds is not None:
            now["t"] = seconds
        if budget.key:
            policy["pk"] = now["pk"] = budget.key.encode()
        policies.append((budget.policy, policy))
        left.append((budget.policy, now))
    return {"RateLimit-Policy": http_sf.ser(policies), "RateLimit": http_sf.ser(left)}


def full(parts: Iterable[tuple[str, str, int]], budgets: Sequence[Budget]) -> Sequence[Budget]:
    """The limits that have too few slots left for a request of (name, key, slots). Where all seem to have room by now:
    all of them."""
    wanted: Counter[Place] = Counter()
    for name, key, slots in parts:
        wanted[name, key] += slots
    return [budget for budget in budgets if budget.left < wanted[budget.name, budget.key]] or budgets


def _seconds(seconds: float) -> int:
    return min(max(math.ceil(seconds - 1e-9), 1), _LARGEST)


class Known:
    """Settings of limits, remembered for a moment, as most limits are asked for again and again."""

    def __init__(self) -> None:
        self._settings: dict[str, tuple[float, int, float, bool]] = {}

    def unknown(self, places: Iterable[Place]) -> list[str]:
        """The names whose settings have to be looked up."""
        now = time.monotonic()
        if len(self._settings) > _MOST_SETTINGS:
            self._settings.clear()
        return list({name for name, _ in places if self._settings.get(name, (0.0,))[0] < now})

    def learn(self, names: Iterable[str], rows: Iterable[Sequence[Any]]) -> None:
        """What ``_sql.SETTINGS`` has found of these."""
        self.forget(*names)
        until = time.monotonic() + _SETTINGS_LIVE
        for name, limit, rate, active in rows:
            self._settings[name] = until, limit, rate, active

    def forget(self, *names: str) -> None:
        """Their settings were changed here."""
        for name in names:
            self._settings.pop(name, None)

    def enforced(self, places: Iterable[Place]) -> list[Place]:
        """Those whose limit is there and active, each once."""
        return [place for place in dict.fromkeys(places) if self._settings.get(place[0], (0.0, 0, 0.0, False))[3]]

    def budgets(self, enforced: Iterable[Place], rows: Iterable[Sequence[Any]]) -> list[Budget]:
        """What is left of each, by what ``_sql.USED`` has found."""
        used = {nth: (held, level) for nth, held, level in rows}
        found = []
        for nth, (name, key) in enumerate(enforced, 1):
            if (settings := self._settings.get(name)) is not None:
                found.append(Budget(name, key, settings[1], settings[2], *used.get(nth, (0, 0.0))))
        return found


class _Database(Protocol):
    async def rows(self, sql: str, params: Sequence[Any] = ...) -> list[dict[str, Any]]: ...


class Budgets:
    """Looks up what is left, for all who ask at the same time together."""

    def __init__(self, database: _Database) -> None:
        self._db = database
        self._known = Known()
        self._asked: list[tuple[Sequence[str], Sequence[str], asyncio.Future[list[Budget]]]] = []
        self._task: asyncio.Task[None] | None = None

    async def of(self, names: Sequence[str], keys: Sequence[str]) -> list[Budget]:
        """What is left of each, without those that are not enforced. Empty where the database cannot tell."""
        found: asyncio.Future[list[Budget]] = asyncio.get_running_loop().create_future()
        self._asked.append((names, keys, found))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer())
        try:
            async with asyncio.timeout(PATIENCE):
                return await found
        except TimeoutError:
            return []

    def forget(self, *names: str) -> None:
        """Their settings were changed here."""
        self._known.forget(*names)

    async def _answer(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, []
            try:
                places = list(dict.fromkeys(pair for n, k, _ in asked for pair in zip(n, k, strict=True)))
                budgets = await self._look_up(places)
            except PglimitsError:
                budgets = {}  # the answer stands without them
            for names, keys, found in asked:
                if not found.done():
                    wanted = [budgets.get(pair) for pair in dict.fromkeys(zip(names, keys, strict=True))]
                    found.set_result([budget for budget in wanted if budget is not None])

    async def _look_up(self, places: Sequence[Place]) -> Mapping[Place, Budget]:
        if unknown := self._known.unknown(places):
            self._known.learn(unknown, [tuple(row.values()) for row in await self._db.rows(_SETTINGS, [unknown])])
        if not (enforced := self._known.enforced(places)):
            return {}
        names, keys = [name for name, _ in enforced], [key for _, key in enforced]
        used = [tuple(row.values()) for row in await self._db.rows(_USED, [names, keys])]
        return {(budget.name, budget.key): budget for budget in self._known.budgets(enforced, used)}

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
