"""The limiters that the module-level functions use, made when they are first needed."""

from __future__ import annotations

import os
import threading

from ._limiter import AsyncLimiter, Limiter

_lock = threading.RLock()
_limiter: Limiter | None = None


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def limiter() -> Limiter:
    """The limiter for the database that the environment names."""
    global _limiter
    with _lock:
        if _limiter is None:
            _limiter = Limiter()
        return _limiter


def async_limiter() -> AsyncLimiter:
    """The same for tasks: both share what is held and renewed."""
    return limiter()._in_tasks()
