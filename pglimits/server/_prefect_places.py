"""Places in line of clients that can only poll.

Prefect's clients know nothing of a queue: they ask, and ask again. But they keep cookies, as every httpx client does.
So a refusal sets a cookie with the id under which the same request stands in line when it comes again. The server keeps
nothing that it could not lose.

Who asks for the first time is not put in line: many only try once, and a client that never comes back must not keep a
place. A client that keeps cookies is told to come again at once. Who brings its place stands in line, and its request
is held: whoever frees a slot wakes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

from fastapi import Request
from starlette.responses import Response

from ._grants import PLACE_LIVES

POLLS = "pglimits_polls"
"""The cookie that marks a client as one that keeps cookies."""
_PLACE = "pglimits_place_"
_MARKED = 30 * 86400
_KEPT_BY_CLIENTS = 60
"""Seconds for which a client keeps a place."""
_AT_ONCE = 0.5
"""Seconds within which a client comes again that is told to come at once. If it comes later, it is another request:
one that tries once must not be held, only because one before it was refused."""
_NEARLY_AT_ONCE = 2.0
"""The same for one that came too late for that: its network may be slow."""
_REPEATS = (1.0, 60.0)
"""A request that was granted already, and comes again so many seconds later, is one whose answer was lost."""
_REMEMBERED = 100_000
_MOST_COOKIES = 32
"""Places that one client brings at most: proxies bound the size of headers, many to 4 KB."""


class Places:
    """Which request has which place in line."""

    def __init__(self) -> None:
        self._began = time.time()
        self._served: set[UUID] = set()
        self._used: OrderedDict[UUID, float | None] = OrderedDict()
        """Places that were granted: when their clients were told; None: they are over. As many as fit."""

    @contextlib.contextmanager
    def serving(self, request: Request, digest: str) -> Iterator[UUID | None]:
        """The id under which the request is to stand in line, as its client has brought it; None on a first request.

        No two get the same at once. What was handed out is handed out again only where the answer seems to have been
        lost: its client has not named the lease since, and asks again after a while, as Prefect's do.
        """
        place = self._brought(request.cookies.get(_PLACE + digest, ""))
        if place is None or place in self._served:
            yield None
            return
        self._served.add(place)
        try:
            yield place
        finally:
            self._served.discard(place)

    def hand_out(self, place: UUID) -> None:
        """Its client is told that it was granted."""
        self._use(place, time.monotonic())

    def give_up(self, place: UUID) -> None:
        """Its client has gone. The id is not used again."""
        self._use(place, None)

    def named(self, lease_id: UUID) -> None:
        """A client has named that lease, so it has it."""
        if lease_id in self._used:
            self._use(lease_id, None)

    def _use(self, place: UUID, told: float | None) -> None:
        self._used[place] = told
        self._used.move_to_end(place)
        while len(self._used) > _REMEMBERED:
            self._used.popitem(last=False)

    def _brought(self, cookie: str) -> UUID | None:
        """The place that a cookie says, if it is still one."""
        try:
            text, issued, lives = cookie.split("_")
            place, age = UUID(text), time.time() - float(issued)
            if place in self._used:
                told = self._used[place]
                return place if told is not None and _REPEATS[0] <= time.monotonic() - told <= _REPEATS[1] else None
            if float(issued) < self._began:  # by a server that has ended since: its clients had to wait for this one
                return place if age < _KEPT_BY_CLIENTS else None
            return place if age < float(lives) else None
        except ValueError:
            return None

    def keep(self, request: Request, response: Response, digest: str, place: UUID | None, retry_after: float) -> None:
        """Have the client bring its place when it asks again; without one, a new one."""
        name, late = _PLACE + digest, PLACE_LIVES
        if place is None and keeps_cookies(request):
            late = _NEARLY_AT_ONCE if _age(request.cookies.get(name, "")) < _NEARLY_AT_ONCE else _AT_ONCE
        value = f"{place or uuid4()}_{time.time():.3f}_{retry_after + late:.3f}"
        self._set(request, response, name, value, math.ceil(retry_after) + _KEPT_BY_CLIENTS)
        others = [each for each in request.cookies if each.startswith(_PLACE) and each != name]
        others.sort(key=lambda each: _age(request.cookies[each]))
        for oldest in others[_MOST_COOKIES - 1 :]:
            self._set(request, response, oldest, "", 0)
        self.mark(request, response)

    def drop(self, request: Request, response: Response, digest: str) -> None:
        """The request has been answered for good."""
        if _PLACE + digest in request.cookies:
            self._set(request, response, _PLACE + digest, "", 0)

    def mark(self, request: Request, response: Response) -> None:
        """Learn whether the client keeps cookies."""
        if not keeps_cookies(request):
            self._set(request, response, POLLS, "1", _MARKED)

    @staticmethod
    def _set(request: Request, response: Response, name: str, value: str, seconds: int) -> None:
        response.set_cookie(
            name,
            value,
            max_age=seconds,
            path=f"{request.scope.get('root_path', '')}/api",
            secure=request.scope["scheme"] == "https",
            httponly=True,
            samesite="strict",
        )


def _age(cookie: str) -> float:
    """Seconds since a place was given out."""
    with contextlib.suppress(ValueError, IndexError):
        return time.time() - float(cookie.split("_")[1])
    return math.inf


def digest_of(request: Request, body: Any) -> str:
    """Tells the requests of one client apart."""
    text = json.dumps([request.scope["path"], body], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def keeps_cookies(request: Request) -> bool:
    """Whether the client has shown that it keeps cookies: told to ask again at once, it comes with its place."""
    return POLLS in request.cookies
