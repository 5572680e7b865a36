"""``throttled-py`` on Redis: its GCRA, the algorithm that counts in fractions of a second."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from .._server import Server, Site
from ._peer import Opened, Peer, Quota
from ._redis import NOT_DURABLE, PROGRAM, SETTINGS, redis


@contextlib.contextmanager
def _open(server: Server, site: Site) -> Iterator[Sequence[Opened]]:
    with redis(SETTINGS["durable"]) as durable, redis(SETTINGS["defaults"]) as defaults:
        task = {"subject": "throttled"}
        yield [
            Opened("throttled-py on Redis, appendfsync always", {**task, "socket": durable}),
            Opened("throttled-py on Redis, its defaults", {**task, "socket": defaults}, target=False, note=NOT_DURABLE),
        ]


PEER = Peer(
    name="redis-throttled",
    what="throttled-py (GCRA) on Redis",
    packages={"throttled": "throttled-py", "redis": "redis"},
    program=PROGRAM,
    install="pip install 'throttled-py[redis]', and apt install redis-server",
    flavour="threads",
    room=Quota(100_000, 1),
    holds=False,
    open=_open,
)


class subject:
    """A limit, called from threads."""

    def __init__(self, task: dict[str, Any]) -> None:
        from throttled import RateLimiterType, Throttled, rate_limiter, store

        quota = rate_limiter.per_duration(timedelta(seconds=task["seconds"]), task["slots"], task["slots"])
        kept = store.RedisStore(server=f"unix://{task['socket']}")
        self._throttled = Throttled(key=task["name"], using=RateLimiterType.GCRA.value, quota=quota, store=kept)

    def take(self) -> bool:
        return not self._throttled.limit().limited

    def turn(self) -> None:
        while self._throttled.limit(timeout=3600.0).limited:
            pass
