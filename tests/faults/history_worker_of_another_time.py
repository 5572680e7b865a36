"""A worker of the histories whose clock is off by hours, and jumps back and forth while it works.

Its log keeps the true time.
"""

from __future__ import annotations

import datetime
import random
import time
import types
from typing import Any

_true_time = time.time
_HOURS = 3600.0
_ahead = 0.0
_jumps_at = 0.0


def _shifted() -> float:
    global _ahead, _jumps_at
    if time.monotonic() >= _jumps_at:
        _jumps_at = time.monotonic() + random.random()
        _ahead = random.choice([-1, 1]) * random.uniform(1, 30) * _HOURS
    return _true_time() + _ahead


class _Datetime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return cls.fromtimestamp(_shifted(), tz)

    @classmethod
    def utcnow(cls) -> Any:
        return cls.fromtimestamp(_shifted(), datetime.UTC).replace(tzinfo=None)


time.time = _shifted
time.time_ns = lambda: int(_shifted() * 1e9)
datetime.datetime = _Datetime  # type: ignore[misc]

import history_worker  # noqa: E402

history_worker.time = types.SimpleNamespace(  # type: ignore[attr-defined]
    time=_true_time, monotonic=time.monotonic, sleep=time.sleep
)

if __name__ == "__main__":
    history_worker.main()
