"""What a running ``pglimits serve`` can take: requests a second, and idle streams.

    python -m pglimits_bench.http_load http://127.0.0.1:4200 --clients 32 --seconds 5
    python -m pglimits_bench.http_load http://127.0.0.1:4200 --prefect
    python -m pglimits_bench.http_load http://127.0.0.1:4200 --streams 1000

It creates the limit ``http-load``. Give ``--pid`` of the server, and it tells the processor time that a request took.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import resource
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

NAME = "http-load"
_ID = re.compile(rb'"lease_id":\s*"([0-9a-f-]{36})"')


class Client:
    """One connection that is kept."""

    def __init__(self, url: str) -> None:
        self.at = urlsplit(url)

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection(self.at.hostname, self.at.port)

    async def ask(self, method: str, path: str, body: object = None) -> bytes:
        """The body of the answer, which has to be a good one."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self.at.path}{path} HTTP/1.1\r\nHost: {self.at.netloc}\r\nContent-Length: {len(content)}\r\n"
        self.writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        said = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", said, re.IGNORECASE)
        answer = await self.reader.readexactly(int(length[1])) if length else b""
        if not said.startswith(b"HTTP/1.1 2"):
            raise SystemExit(f"{method} {path}: {said.decode()}{answer.decode()}")
        return answer


async def pair(client: Client) -> None:
    """Acquire and release."""
    found = _ID.search(await client.ask("POST", "/v1/acquire", {"name": NAME}))
    assert found is not None
    await client.ask("DELETE", f"/v1/leases/{found[1].decode()}")


async def prefect_pair(client: Client) -> None:
    """The same, as Prefect's client does it."""
    path = "/api/v2/concurrency_limits"
    wanted = {"names": [NAME], "slots": 1, "mode": "concurrency", "lease_duration": 300}
    found = _ID.search(await client.ask("POST", f"{path}/increment-with-lease", wanted))
    assert found is not None
    await client.ask("POST", f"{path}/decrement-with-lease", {"lease_id": found[1].decode()})


async def load(url: str, clients: int, seconds: float, work: Callable[[Client], object], pid: int | None) -> None:
    asked = 0
    opened = [Client(url) for _ in range(clients)]
    for client in opened:
        await client.open()
    before, began = processor_seconds(pid), time.monotonic()

    async def go_on(client: Client) -> None:
        nonlocal asked
        while time.monotonic() - began < seconds:
            await work(client)  # type: ignore[misc]
            asked += 2

    await asyncio.gather(*map(go_on, opened))
    took = time.monotonic() - began
    line = f"{clients} clients: {asked / took:,.0f} requests a second"
    if pid is not None:
        line += f", {(processor_seconds(pid) - before) / asked * 1e6:,.0f} us of the server's processor time each"
    print(line)


async def streams(url: str, many: int, seconds: float, pid: int | None) -> None:
    at = urlsplit(url)
    heard = 0
    all_heard = asyncio.Event()

    async def listen() -> None:
        nonlocal heard
        reader, writer = await asyncio.open_connection(at.hostname, at.port)
        writer.write(f"GET {at.path}/v1/changes HTTP/1.1\r\nHost: {at.netloc}\r\n\r\n".encode())
        await reader.readuntil(b"event: limits")
        heard += 1
        if heard == many:
            all_heard.set()
        while await reader.read(65536):
            pass

    tasks = [asyncio.create_task(listen()) for _ in range(many)]
    began = time.monotonic()
    await all_heard.wait()
    print(f"{many} streams are open after {time.monotonic() - began:.1f} s")
    before = processor_seconds(pid)
    await asyncio.sleep(seconds)
    if pid is not None:
        print(f"idle, they take {(processor_seconds(pid) - before) / seconds:.1%} of a processor")
    for task in tasks:
        task.cancel()


def processor_seconds(pid: int | None) -> float:
    if pid is None:
        return 0.0
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--prefect", action="store_true", help="the routes that Prefect's client knows")
    parser.add_argument("--streams", type=int, help="open so many streams instead")
    parser.add_argument("--pid", type=int, help="of the server")
    given = parser.parse_args()
    url = given.url.rstrip("/")
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    body = json.dumps({"name": NAME, "limit": 100_000}).encode()
    request = urllib.request.Request(f"{url}/v1/limits", body, {"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(request).close()
    except urllib.error.HTTPError as error:
        if error.code != 409:  # it is there already
            raise
    if given.streams:
        asyncio.run(streams(url, given.streams, given.seconds, given.pid))
    else:
        work = prefect_pair if given.prefect else pair
        asyncio.run(load(url, given.clients, given.seconds, work, given.pid))


if __name__ == "__main__":
    main()
