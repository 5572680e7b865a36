"""Concurrency limits and rate limits for any app that already has PostgreSQL.

``pglimits.sync`` and ``pglimits.asyncio`` have ``concurrency`` and ``rate_limit`` for the database that the environment
names; ``Limiter`` and ``AsyncLimiter`` take a DSN or a connection pool, and also create and change limits. ``install``
installs the SQL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from ._leases import Lease
from ._limiter import AsyncLimiter, Limiter
from ._uses import AsyncUse, Use
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
    LimitsChanged,
    NoSlotDecay,
    NotInstalled,
    PermissionDenied,
    PglimitsError,
    QueueFull,
    ReadOnlyServer,
    SlotsExceedLimit,
    VersionMismatch,
)
from .models import Counters, Event, Holder, Key, Limit, Peek, Reason, Step, Swept, Usage, Waiter

if TYPE_CHECKING:
    from ._install import Installed, install

__all__ = [
    "AcquireTimeout",
    "AsyncLimiter",
    "AsyncUse",
    "CommitFirst",
    "Counters",
    "CronUnavailable",
    "EmbeddedUnavailable",
    "Event",
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
    "LimitsChanged",
    "NoSlotDecay",
    "NotInstalled",
    "Peek",
    "PermissionDenied",
    "PglimitsError",
    "QueueFull",
    "ReadOnlyServer",
    "Reason",
    "SlotsExceedLimit",
    "Step",
    "Swept",
    "Usage",
    "Use",
    "VersionMismatch",
    "Waiter",
    "install",
]


def __getattr__(name: str) -> Any:
    """What only an installation needs is imported when it is asked for: a command of the CLI starts sooner without."""
    if name in ("Installed", "install"):
        from . import _install

        return getattr(_install, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
