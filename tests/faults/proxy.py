"""A proxy of a test's own with the faults of networks: clients come by TCP, and the server has a unix socket.

Directions are seen from the client: ``up`` is what it sends, ``down`` what it gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from psycopg.conninfo import conninfo_to_dict, make_conninfo

T = TypeVar("T")
Direction = Literal["up", "down"]
BOTH: Sequence[Direction] = ("up", "down")
_NOTIFICATION = ord("A")


@dataclass(eq=False)
class Link:
    """One connection through the proxy.

    Attributes:
        delay: for how many seconds everything is under way, each way.
        holes: directions in which everything disappears: it is accepted and goes nowhere. For good, as what has
            disappeared is missing.
        listens: whether the client has sent LISTEN on it.
        asked: how many times the client has sent something.
    """

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    delay: float = 0.0
    holes: set[Direction] = field(default_factory=set)
    listens: bool = False
    asked: int = 0

    def end(self, direction: Direction) -> asyncio.StreamWriter:
        """Where what goes in this direction comes out."""
        return self.server if direction == "up" else self.client

    def cut(self) -> None:
        """Reset it, as a router that has forgotten it does."""
        with contextlib.suppress(OSError):  # it is closed already
            # Not lingering: what closes it is RST and not FIN.
            client = self.client.get_extra_info("socket")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.transport.abort()
        self.server.transport.abort()

    def half_close(self, direction: Direction) -> None:
        """The other end is told that no more comes in this direction, and that is so. The other direction lives."""
        self.holes.add(direction)
        with contextlib.suppress(OSError):
            self.end(direction).write_eof()


class Proxy:
    """Connections, and what is wrong with all of them, and with those that come.

    Attributes:
        dsn: how to come by it.
        links: the connections that are open.
        refuses: whether whoever comes is turned away.
        delay: as of a Link, for those that come.
        holes: the same.
        deaf: whether notifications are lost on all connections.
        lost: how many notifications were.
    """

    def __init__(self, dsn: str) -> None:
        to = conninfo_to_dict(dsn)
        self._to = f"{to['host']}/.s.PGSQL.{to['port']}"
        self._dsn = dsn
        self.links: list[Link] = []
        self.refuses = False
        self.delay = 0.0
        self.holes: set[Direction] = set()
        self.deaf = False
        self.lost = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    # For the test's thread.

    def __enter__(self) -> Proxy:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="test-proxy", daemon=True)
        self._thread.start()
        self._listener = self._wait_for(lambda: asyncio.start_server(self._accept, "127.0.0.1", 0))
        port = self._listener.sockets[0].getsockname()[1]
        self.dsn = make_conninfo(self._dsn, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable")
        return self

    def __exit__(self, *exc: object) -> None:
        self._wait_for(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def each(self, what: Callable[[Link], object], where: Callable[[Link], bool] = lambda link: True) -> int:
        """Do something to all connections that are open and of that kind. Returns how many there were."""

        async def do() -> int:
            chosen = [link for link in self.links if where(link)]
            for link in chosen:
                what(link)
            return len(chosen)

        return self._wait_for(do)

    def one(self, what: Callable[[Link], object], rng: random.Random) -> int:
        """Do something to one of the connections. Returns whether there was one."""
        chosen = rng.choice(self.links or [None])
        return self.each(what, lambda link: link is chosen)

    def black_hole(self, directions: Sequence[Direction] = BOTH) -> None:
        """Whatever is sent from now on disappears, on the connections that are open and on those that come."""

        async def do() -> None:
            self.holes = set(directions)
            for link in self.links:
                link.holes.update(directions)

        self._wait_for(do)

    def heal(self) -> None:
        """Those that come from now on have nothing. What a connection has lost stays lost."""

        async def do() -> None:
            self.refuses, self.deaf, self.delay, self.holes = False, False, 0.0, set()
            for link in self.links:
                link.delay = 0.0

        self._wait_for(do)

    def _wait_for(self, make: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await make()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    # In the loop.

    async def _close(self) -> None:
        self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # a server would call it an error
            await self._serve(from_client, to_client)

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            if self.refuses:
                raise ConnectionRefusedError
            from_server, to_server = await asyncio.open_unix_connection(self._to)
        except OSError:
            to_client.transport.abort()
            return
        link = Link(to_client, to_server, self.delay, set(self.holes))
        self.links.append(link)
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(link, "up", from_client))
                pumps.create_task(self._pump(link, "down", from_server))
        finally:
            self.links.remove(link)
            to_server.close()
            to_client.close()

    async def _pump(self, link: Link, direction: Direction, source: asyncio.StreamReader) -> None:
        """Forward what comes until there is no more. Then the other end is told, unless it hears nothing."""
        filters = _Messages()
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if direction == "up":
                    link.asked += 1
                    link.listens = link.listens or b"listen pglimits" in data
                if link.delay:
                    await asyncio.sleep(link.delay)
                if direction == "down":
                    data = b"".join(self._heard(filters.add(data)))
                if direction not in link.holes:
                    link.end(direction).write(data)
                    await link.end(direction).drain()
            if direction not in link.holes:
                link.end(direction).write_eof()
            if direction == "up":
                # The client has closed it. A client never closes one half alone, so nobody reads the other.
                link.server.transport.abort()

    def _heard(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        for message in messages:
            if self.deaf and message[0] == _NOTIFICATION:
                self.lost += 1
            else:
                yield message


class _Messages:
    """Cuts what a server sends into its messages: a letter, and a length that counts itself and what follows it."""

    def __init__(self) -> None:
        self._rest = b""

    def add(self, data: bytes) -> Iterator[bytes]:
        self._rest += data
        while len(self._rest) >= 5:
            end = 1 + int.from_bytes(self._rest[1:5], "big")
            if len(self._rest) < end:
                return
            yield self._rest[:end]
            self._rest = self._rest[end:]
