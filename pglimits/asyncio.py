"""``concurrency``, ``rate_limit`` and ``acquire`` for asyncio, on the database that the environment names.

PGLIMITS_DSN, then DATABASE_URL, then the embedded server. Parameters that Prefect has keep their names, order and
meaning: ``from pglimits.asyncio import concurrency, rate_limit`` is the whole migration.
"""

from __future__ import annotations

from ._concurrency import AsyncConcurrency
from ._default import async_limiter
from ._leases import Lease
from ._limiter import AsyncLimiter, on_default

__all__ = ["Lease", "acquire", "concurrency", "rate_limit"]

acquire = on_default(AsyncLimiter.acquire, lambda *args, **kwargs: async_limiter().acquire(*args, **kwargs))
concurrency = on_default(
    AsyncLimiter.concurrency, lambda *args, **kwargs: AsyncConcurrency(async_limiter, *args, **kwargs)
)
rate_limit = on_default(AsyncLimiter.rate_limit, lambda *args, **kwargs: async_limiter().rate_limit(*args, **kwargs))
