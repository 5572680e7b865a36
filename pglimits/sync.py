"""``concurrency``, ``rate_limit`` and ``acquire`` for threads, on the database that the environment names.

PGLIMITS_DSN, then DATABASE_URL, then the embedded server. Parameters that Prefect has keep their names, order and
meaning: ``from pglimits.sync import concurrency, rate_limit`` is the whole migration.
"""

from __future__ import annotations

from ._concurrency import Concurrency
from ._default import limiter
from ._leases import Lease
from ._limiter import Limiter, on_default

__all__ = ["Lease", "acquire", "concurrency", "rate_limit"]

acquire = on_default(Limiter.acquire, lambda *args, **kwargs: limiter().acquire(*args, **kwargs))
concurrency = on_default(Limiter.concurrency, lambda *args, **kwargs: Concurrency(limiter, *args, **kwargs))
rate_limit = on_default(Limiter.rate_limit, lambda *args, **kwargs: limiter().rate_limit(*args, **kwargs))
