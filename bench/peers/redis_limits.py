"""``limits`` on Redis: its moving window, the strategy that never lets too many in."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from .._server import Server, Site
from ._peer import Opened, Peer, Quota
from ._redis import NOT_DURABLE, PROGRAM, SETTINGS, redis


@contextlib.contextmanager
def _open(server: Server, site: Site) -> Iterator[Sequence[Opened]]:
    with redis(SETTINGS["durable"]) as durable, redis(SETTINGS["defaults"]) as defaults:
        task = {"subject": "limits"}
        yield [
            Opened("limits on Redis, appendfsync always", {**task, "socket": durable}),
            Opened("limits on Redis, its defaults", {**task, "socket": defaults}, target=False, note=NOT_DURABLE),
        ]


PEER = Peer(
    name="redis-limits",
    what="limits (moving window) on Redis",
    packages={"limits": "limits", "redis": "redis"},
    program=PROGRAM,
    install="pip install 'limits[redis]', and apt install redis-server",
    flavour="threads",
    room=Quota(100_000, 1),
    holds=False,
    open=_open,
)


class subject:
    """A limit, called from threads."""

    def __init__(self, task: dict[str, Any]) -> None:
        import limits

        storage = limits.storage.storage_from_string(f"redis+unix://{task['socket']}")
        self._limiter = limits.strategies.MovingWindowRateLimiter(storage)
        self._item = limits.RateLimitItemPerSecond(task["slots"], int(task["seconds"]))
        self._name: str = task["name"]

    def take(self) -> bool:
        return bool(self._limiter.hit(self._item, self._name))

    def turn(self) -> None:
        while not self._limiter.hit(self._item, self._name):
            reset_at = self._limiter.get_window_stats(self._item, self._name).reset_time
            time.sleep(max(reset_at - time.time(), 0.001))
