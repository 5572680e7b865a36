"""``concurrency`` and ``rate_limit`` for asyncio, on the database that the environment names.

PGLIMITS_DSN, then DATABASE_URL, then the embedded server. Parameters that Prefect has keep their names, order and
meaning: ``from pglimits.asyncio import concurrency, rate_limit`` is the whole migration.
"""

from __future__ import annotations

from typing import Any

from ._arguments import Names
from ._async_limiter import AsyncConcurrency
from ._default import async_limiter
from ._renewal import Lease

__all__ = ["Lease", "concurrency", "rate_limit"]


def concurrency(
    names: Names,
    occupy: int = 1,
    timeout_seconds: float | None = None,
    max_retries: int | None = None,
    lease_duration: float = 300,
    strict: bool = False,
    holder: Any = None,
    raise_on_lease_renewal_failure: bool | None = None,
    *,
    key: str = "",
    priority: int = 0,
) -> AsyncConcurrency:
    """Hold slots while an ``async with`` block or a decorated function runs. See ``AsyncLimiter.concurrency``."""
    return AsyncConcurrency(
        async_limiter,
        (
            names,
            occupy,
            timeout_seconds,
            max_retries,
            lease_duration,
            strict,
            holder,
            raise_on_lease_renewal_failure,
            key,
            priority,
        ),
    )


async def rate_limit(
    names: Names,
    occupy: int = 1,
    timeout_seconds: float | None = None,
    strict: bool = False,
    key: str = "",
) -> None:
    """Take slots that come back by decay, and sleep until their turn. See ``AsyncLimiter.rate_limit``."""
    await async_limiter().rate_limit(names, occupy, timeout_seconds, strict, key)
