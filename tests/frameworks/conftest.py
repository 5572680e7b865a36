"""What the tests of the frameworks share."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from wrappertest import _nothing_stays_open, children, environment, limiter

__all__ = ["_nothing_stays_open", "children", "environment", "limiter"]


@pytest.fixture
def serve(wait_until: Callable[..., Any]) -> Iterator[Callable[[Any], str]]:
    """serve(app): where a real server answers for an ASGI app."""
    with contextlib.ExitStack() as stack:

        def start(app: Any) -> str:
            server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
            thread = threading.Thread(target=server.run, daemon=True)
            thread.start()

            def stop() -> None:
                server.should_exit = True
                thread.join(20)

            stack.callback(stop)
            wait_until(lambda: server.started, what="for uvicorn to start")
            return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

        yield start


@pytest.fixture
def asks() -> Callable[[str], contextlib.AbstractContextManager[None]]:
    """``with asks(url):``: a client asks for it, and goes at the end of the block, whether it was answered or not."""

    @contextlib.contextmanager
    def ask(url: str) -> Iterator[None]:
        to = httpx.URL(url)
        with socket.create_connection((to.host, to.port or 80)) as client:
            client.sendall(f"GET {to.path or '/'} HTTP/1.1\r\nHost: {to.host}\r\n\r\n".encode())
            yield

    return ask
