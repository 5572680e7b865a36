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
_KEPT = 30 * 86400
_AT_ONCE = 0.5
"""Seconds within which a client comes again that is told to come at once. If it comes later, it is another request:
one that tries once must not be held, only because one before it was refused."""
_REPEATS_AFTER = 1.0
"""Seconds after which a request that was granted already is taken for one whose answer was lost."""
_REMEMBERED = 100_000
_FOR_EVER = float("inf")


class Places:
    """Which request has which place in line."""

    def __init__(self) -> None:
        self._served: set[UUID] = set()
        self._used_until: OrderedDict[UUID, float] = OrderedDict()
        """Places that were granted or given up: until when nobody else may have them. As many as fit."""

    @contextlib.contextmanager
    def serving(self, request: Request, digest: str) -> Iterator[UUID | None]:
        """The id under which the request is to stand in line, as its client has brought it; None on a first request.

        No two get the same at once. What was handed out is handed out again only where the answer seems to have been
        lost: its client has not named the lease since, and asks again after a while, as Prefect's do.
        """
        place = _place(request.cookies.get(_PLACE + digest, ""))
        if place is None or place in self._served or self._used_until.get(place, 0) > time.monotonic():
            yield None
            return
        self._served.add(place)
        try:
            yield place
        finally:
            self._served.discard(place)

    def hand_out(self, place: UUID) -> None:
        """Its client is told that it was granted."""
        self._use(place, time.monotonic() + _REPEATS_AFTER)

    def give_up(self, place: UUID) -> None:
        """Its client has gone, or has what was granted under it. The id is not used again."""
        self._use(place, _FOR_EVER)

    def named(self, lease_id: UUID) -> None:
        """A client has named that lease, so it has it."""
        if lease_id in self._used_until:
            self._use(lease_id, _FOR_EVER)

    def _use(self, place: UUID, until: float) -> None:
        self._used_until[place] = until
        self._used_until.move_to_end(place)
        while len(self._used_until) > _REMEMBERED:
            self._used_until.popitem(last=False)

    def keep(self, request: Request, response: Response, digest: str, place: UUID | None, retry_after: float) -> None:
        """Have the client bring its place when it asks again; without one, a new one."""
        at_once = place is None and keeps_cookies(request)
        lives = retry_after + (_AT_ONCE if at_once else PLACE_LIVES)
        value = f"{place or uuid4()}.{time.time() + lives:.3f}"
        self._set(request, response, _PLACE + digest, value, math.ceil(lives))
        self.mark(request, response)

    def drop(self, request: Request, response: Response, digest: str) -> None:
        """The request has been answered for good."""
        if _PLACE + digest in request.cookies:
            self._set(request, response, _PLACE + digest, "", 0)

    def mark(self, request: Request, response: Response) -> None:
        """Learn whether the client keeps cookies."""
        if not keeps_cookies(request):
            self._set(request, response, POLLS, "1", _KEPT)

    @staticmethod
    def _set(request: Request, response: Response, name: str, value: str, seconds: int) -> None:
        response.set_cookie(
            name,
            value,
            max_age=seconds,
            path=f"{request.scope.get('root_path', '')}/api",
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )


def digest_of(request: Request, body: Any) -> str:
    """Tells the requests of one client apart."""
    text = json.dumps([request.scope["path"], body], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def keeps_cookies(request: Request) -> bool:
    """Whether the client has shown that it keeps cookies: told to ask again at once, it comes with its place."""
    return POLLS in request.cookies


def _place(cookie: str) -> UUID | None:
    """The place that a cookie is for, if it is still."""
    place, _, until = cookie.partition(".")
    with contextlib.suppress(ValueError):
        if len(place) == 36 and float(until) > time.time():
            return UUID(place)
    return None
