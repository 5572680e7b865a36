"""A request that is held, and whose client may go away meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class ClientGone(Exception):
    """The client whose request was held has closed its connection. Nobody is there to be answered."""


async def until_gone(
    work: Coroutine[Any, Any, T], gone: Coroutine[Any, Any, None], lost: Callable[[T], None] | None = None
) -> T:
    """What the work returns; it is cancelled when the client closes its connection, or when this is cancelled.

    gone: returns when the client has closed its connection.
    lost: what to do with a result that comes all the same.

    Raises:
        ClientGone: the client has closed its connection.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    is_wanted = False
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            raise ClientGone
        is_wanted = True
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
        if not is_wanted and lost is not None and not working.cancelled() and working.exception() is None:
            lost(working.result())


async def disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when a client has closed its connection. The body of its request has to be read by then."""
    while (await receive())["type"] not in ("http.disconnect", "websocket.disconnect"):
        pass
