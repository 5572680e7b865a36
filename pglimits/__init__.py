"""Concurrency limits and rate limits for any app that already has PostgreSQL.

``pglimits.sync`` and ``pglimits.asyncio`` have ``concurrency`` and ``rate_limit`` for the database that the environment
names; ``Limiter`` and ``AsyncLimiter`` take a DSN or a connection pool, and also create and change limits. ``install``
installs the SQL.
"""

from __future__ import annotations

__version__ = "0.1.0"

from ._install import Installed, install
from ._leases import Lease
from ._limiter import AsyncLimiter, Limiter
from .errors import (
    AcquireTimeout,
    CommitFirst,
    CronUnavailable,
    EmbeddedUnavailable,
    InvalidArgument,
    LeaseLost,
    LimiterUnavailable,
    LimitExists,
    LimitLocked,
    LimitNotFound,
    NoSlotDecay,
    NotInstalled,
    PermissionDenied,
    PglimitsError,
    QueueFull,
    ReadOnlyServer,
    SlotsExceedLimit,
    VersionMismatch,
)
from .models import Holder, Key, Limit, Peek, Swept, Waiter

__all__ = [
    "AcquireTimeout",
    "AsyncLimiter",
    "CommitFirst",
    "CronUnavailable",
    "EmbeddedUnavailable",
    "Holder",
    "Installed",
    "InvalidArgument",
    "Key",
    "Lease",
    "LeaseLost",
    "Limit",
    "LimitExists",
    "LimitLocked",
    "LimitNotFound",
    "Limiter",
    "LimiterUnavailable",
    "NoSlotDecay",
    "NotInstalled",
    "Peek",
    "PermissionDenied",
    "PglimitsError",
    "QueueFull",
    "ReadOnlyServer",
    "SlotsExceedLimit",
    "Swept",
    "VersionMismatch",
    "Waiter",
    "install",
]
