"""What task queues share: what each task needs, and how it is taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from . import _arguments
from ._arguments import Names
from ._calls import Calls, Course
from ._leases import Lease
from ._limiter import AsyncLimiter, Limiter
from .errors import InvalidArgument

Key: TypeAlias = str | Callable[..., str | None]
OfLimiter: TypeAlias = Limiter | AsyncLimiter | Callable[[], Limiter | AsyncLimiter] | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What each task of a kind needs, checked. Raises InvalidArgument, which names the option."""

    concurrency: Names | None
    rate: Names | None
    occupy: int
    key: Key
    timeout_seconds: float | None
    lease_duration: float
    priority: int
    strict: bool
    limiter: OfLimiter

    def __post_init__(self) -> None:
        if self.concurrency is None and self.rate is None:
            raise InvalidArgument("concurrency or rate must name a limit")
        for option, names in (("concurrency", self.concurrency), ("rate", self.rate)):
            if names is not None:
                try:
                    _arguments.parts(names, self.occupy, "")
                except InvalidArgument as error:
                    raise InvalidArgument(f"{option}: {error}") from None
        if not callable(self.key):
            _arguments.text("key", self.key)
        _arguments.timeout(self.timeout_seconds, None)
        _arguments.lease_duration(self.lease_duration)
        _arguments.whole("priority", self.priority)
        _arguments.flag("strict", self.strict)
        if not (self.limiter is None or callable(self.limiter) or isinstance(self.limiter, (Limiter, AsyncLimiter))):
            raise InvalidArgument(f"limiter must be a Limiter, or a function that returns one, not {self.limiter!r}")

    def key_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The key of a task with these arguments; None: it is not limited."""
        return self.key(*args, **kwargs) if callable(self.key) else self.key

    def limiter_or(self, default: Callable[[], Limiter | AsyncLimiter]) -> Limiter | AsyncLimiter:
        """The limiter that was given, or the default one."""
        if self.limiter is None:
            return default()
        return self.limiter() if callable(self.limiter) else self.limiter

    def take(
        self, limiter: Limiter | AsyncLimiter, key: str, timeout: float | None, holder: Any
    ) -> Course[Lease | None]:
        """Take what a task needs; the lease if it holds something. That comes first: so the rate is that of starts."""
        calls = cast(Calls, limiter)
        until = None if timeout is None else time.monotonic() + timeout
        lease = None
        if self.concurrency is not None:
            lease = yield from Calls.acquire(
                calls,
                self.concurrency,
                self.occupy,
                timeout,
                None,
                self.lease_duration,
                self.strict,
                holder,
                key=key,
                priority=self.priority,
            )
        try:
            if self.rate is not None:
                left = None if until is None else max(until - time.monotonic(), 0.0)
                yield from Calls.rate_limit(calls, self.rate, self.occupy, left, self.strict, key)
        except BaseException:
            if lease is not None:
                limiter._release_later(lease)
            raise
        return lease
