"""A request that is held, and whose client may go away meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

T = TypeVar("T")


class ClientGone(Exception):
    """The client whose request was held has closed its connection. Nobody is there to be answered."""


async def until_disconnect(
    request: Request, work: Coroutine[Any, Any, T], lost: Callable[[T], None] | None = None
) -> T:
    """What the work returns; it is cancelled when the client closes its connection. The body has to be read by then.

    lost: what to do with the result where it comes just as the client goes.

    Raises:
        ClientGone: the client has closed its connection.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not watching.done():
            return working.result()
        if working.done() and lost is not None and not working.cancelled() and working.exception() is None:
            lost(working.result())
        raise ClientGone
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
