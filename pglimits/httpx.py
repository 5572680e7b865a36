"""Limits for calls that go out by httpx, across all processes that make them (extra ``httpx``).

``LimitTransport`` and ``AsyncLimitTransport`` wrap another transport: ``httpx.Client(transport=LimitTransport())``.
"""

from __future__ import annotations

import email.utils
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Literal, TypeAlias, cast

import httpx

from . import _default
from ._arguments import flag, number
from ._calls import Base, Calls, Course
from ._leases import Lease
from ._limiter import AsyncLimiter, Limiter
from .errors import (
    AcquireTimeout,
    InvalidArgument,
    LimitNotFound,
    NoSlotDecay,
    PermissionDenied,
    PglimitsError,
    QueueFull,
)

__all__ = ["AsyncLimitTransport", "LimitTransport", "host"]

log = logging.getLogger("pglimits.httpx")

_MOST_SLOTS = 2**31 - 1
Name: TypeAlias = str | Callable[[httpx.Request], str | None]
Kind: TypeAlias = Literal["rate_limit", "concurrency"]


def host(request: httpx.Request) -> str:
    """The name of the limit of a request, unless told otherwise: the host that it goes to."""
    return request.url.host


class _Either:
    """What both transports know."""

    def __init__(
        self,
        kind: Kind,
        name: Name,
        key: str,
        strict: bool,
        longest_retry_after: float,
    ) -> None:
        if kind not in ("rate_limit", "concurrency"):
            raise InvalidArgument(f"kind must be 'rate_limit' or 'concurrency', not {kind!r}")
        self._kind = kind
        self._name = name
        self._key = key
        self._strict = flag("strict", strict)
        self._longest = number("longest_retry_after", longest_retry_after)
        if self._longest < 0:
            raise InvalidArgument(f"longest_retry_after must be at least 0, not {longest_retry_after!r}")

    def _name_of(self, request: httpx.Request) -> str | None:
        return self._name(request) if callable(self._name) else self._name

    def _enter(self, limiter: Base, name: str, request: httpx.Request) -> Course[Lease | None]:
        timeout = request.extensions.get("timeout", {}).get("pool")
        calls = cast(Calls, limiter)
        try:
            if self._kind == "concurrency":
                holder = {"method": request.method, "host": request.url.host, "path": request.url.path}
                return (
                    yield from Calls.acquire(
                        calls, name, timeout_seconds=timeout, strict=self._strict, holder=holder, key=self._key
                    )
                )
            yield from Calls.rate_limit(calls, name, timeout_seconds=timeout, strict=self._strict, key=self._key)
        except (AcquireTimeout, QueueFull) as error:
            raise httpx.PoolTimeout(str(error), request=request) from error
        return None

    def _heed(self, limiter: Base, name: str, response: httpx.Response) -> Course[None]:
        """Have everybody wait as long as the answer asks for."""
        seconds = _retry_after(response)
        if not seconds:
            return
        try:
            yield from self._raise_level(cast(Calls, limiter), name, min(seconds, self._longest))
        except (LimitNotFound, NoSlotDecay):
            pass  # nothing is enforced, or only a release gives slots
        except PermissionDenied:
            log.warning("%r asked to wait for %g s, and the role is no pglimits_admin, who may adjust", name, seconds)
        except PglimitsError as error:
            log.warning("%r asked to wait for %g s, and its level could not be adjusted: %s", name, seconds, error)

    def _raise_level(self, limiter: Calls, name: str, seconds: float) -> Course[None]:
        """To where the next slot comes free in so many seconds. Several that hear the same raise it once: whoever has
        raised it too far takes that back."""
        limit = yield from Calls.get(limiter, name)
        if not limit.active or not limit.slot_decay_per_second:
            return
        wanted = limit.limit - 1 + limit.slot_decay_per_second * seconds
        level = yield from Calls.adjust(limiter, name, 0, self._key)
        slots = min(math.ceil(wanted - level), _MOST_SLOTS)
        if slots > 0:
            level = yield from Calls.adjust(limiter, name, slots, self._key)
            if (excess := min(math.floor(level - wanted), slots)) > 0:
                yield from Calls.adjust(limiter, name, -excess, self._key)


class LimitTransport(_Either, httpx.BaseTransport):
    """Sends a request when a limit lets it, through another transport."""

    def __init__(
        self,
        transport: httpx.BaseTransport | None = None,
        limiter: Limiter | None = None,
        kind: Kind = "rate_limit",
        *,
        name: Name = host,
        key: str = "",
        strict: bool = False,
        longest_retry_after: float = 3600,
    ) -> None:
        """
        Args:
            transport: what sends; by default ``httpx.HTTPTransport()``.
            limiter: by default the one for the database that the environment names.
            kind: ``"rate_limit"``, or ``"concurrency"``: a slot is held until the response is closed. For both, wrap
                one in the other.
            name: the limit, or a function of the request that returns its name; None: that request is not limited.
            key: each key of a limit has the whole budget.
            strict: a missing limit is an error.
            longest_retry_after: seconds that an answer can ask for at most.

        A request waits as long as the pool timeout of httpx says. Then, or where the line is full, httpx.PoolTimeout is
        raised. An answer of 429 or 503 with ``Retry-After`` raises the limit's level, so that all processes wait. That
        needs ``pglimits_admin``, and a limit with ``slot_decay_per_second``. Nothing is sent again.

        Requests raise LimitNotFound (strict), LimiterUnavailable, InvalidArgument.
        """
        super().__init__(kind, name, key, strict, longest_retry_after)
        self._transport = transport or httpx.HTTPTransport()
        self._limiter = limiter

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        name = self._name_of(request)
        if name is None:
            return self._transport.handle_request(request)
        limiter = self._limiter or _default.limiter()
        lease = limiter._run(self._enter(limiter, name, request))
        try:
            response = self._transport.handle_request(request)
        except BaseException:
            if lease is not None:
                limiter.release(lease)
            raise
        if lease is not None:
            response.stream = _Stream(cast(httpx.SyncByteStream, response.stream), limiter, lease)
        try:
            limiter._run(self._heed(limiter, name, response))
        except BaseException:
            response.close()
            raise
        return response

    def close(self) -> None:
        """Close the other transport. The limiter stays open."""
        self._transport.close()


class AsyncLimitTransport(_Either, httpx.AsyncBaseTransport):
    """The same for ``httpx.AsyncClient``, under asyncio. Arguments as LimitTransport."""

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | None = None,
        limiter: AsyncLimiter | None = None,
        kind: Kind = "rate_limit",
        *,
        name: Name = host,
        key: str = "",
        strict: bool = False,
        longest_retry_after: float = 3600,
    ) -> None:
        super().__init__(kind, name, key, strict, longest_retry_after)
        self._transport = transport or httpx.AsyncHTTPTransport()
        self._limiter = limiter

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        name = self._name_of(request)
        if name is None:
            return await self._transport.handle_async_request(request)
        limiter = self._limiter or _default.async_limiter()
        lease = await limiter._run(self._enter(limiter, name, request))
        try:
            response = await self._transport.handle_async_request(request)
        except BaseException:
            if lease is not None:
                await limiter.release(lease)
            raise
        if lease is not None:
            response.stream = _AsyncStream(cast(httpx.AsyncByteStream, response.stream), limiter, lease)
        try:
            await limiter._run(self._heed(limiter, name, response))
        except BaseException:
            await response.aclose()
            raise
        return response

    async def aclose(self) -> None:
        """Close the other transport. The limiter stays open."""
        await self._transport.aclose()


class _Stream(httpx.SyncByteStream):
    """What a response brings. Closed, it gives the slot back."""

    def __init__(self, stream: httpx.SyncByteStream, limiter: Limiter, lease: Lease) -> None:
        self._stream, self._limiter, self._lease = stream, limiter, lease

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            self._limiter.release(self._lease)


class _AsyncStream(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream, limiter: AsyncLimiter, lease: Lease) -> None:
        self._stream, self._limiter, self._lease = stream, limiter, lease

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            yield chunk

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            await self._limiter.release(self._lease)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that an answer asks to wait. A date counts from that of the answer: clocks differ."""
    said = response.headers.get("retry-after", "").strip()
    if response.status_code not in (429, 503) or not said:
        return None
    if said.isascii() and said.isdigit():
        return float(said)
    until, sent = _date(said), _date(response.headers.get("date", ""))
    return None if until is None else max(until - (time.time() if sent is None else sent), 0.0)


def _date(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
