"""What can go wrong. Errors of the SQL functions are told apart by SQLSTATE, never by their message."""

from __future__ import annotations

__all__ = [
    "AcquireTimeout",
    "CommitFirst",
    "CronUnavailable",
    "EmbeddedUnavailable",
    "InvalidArgument",
    "LeaseLost",
    "LimitExists",
    "LimitLocked",
    "LimitNotFound",
    "LimiterUnavailable",
    "LimitsChanged",
    "NoSlotDecay",
    "NotInstalled",
    "PermissionDenied",
    "PglimitsError",
    "QueueFull",
    "ReadOnlyServer",
    "SlotsExceedLimit",
    "VersionMismatch",
]


class PglimitsError(Exception):
    """Base of all errors of pglimits."""


class InvalidArgument(PglimitsError, ValueError):
    """An argument is of the wrong form; nothing was changed (SQLSTATE PL001)."""


class LimitNotFound(PglimitsError, LookupError):
    """There is no limit of that name (PL002)."""


class LimitExists(PglimitsError):
    """There is a limit of that name already (PL003)."""


class SlotsExceedLimit(PglimitsError, ValueError):
    """More slots were asked for than the limit has; waiting would not help (PL004)."""


class NoSlotDecay(PglimitsError, ValueError):
    """The limit has no slot_decay_per_second, so it is not a rate limit (PL005)."""


class QueueFull(PglimitsError):
    """max_waiters requests wait already (PL006)."""


class CronUnavailable(PglimitsError):
    """pg_cron is not installed in this database (PL007)."""


class AcquireTimeout(PglimitsError, TimeoutError):
    """The slots could not be had within timeout_seconds; nothing was taken.

    ``retry_after``: in how many seconds time alone would let the request in; None where only a release can tell.
    """

    retry_after: float | None = None


class LimitLocked(AcquireTimeout):
    """An open transaction kept the limit locked for all of timeout_seconds; nothing was taken (PL009)."""


class CommitFirst(PglimitsError):
    """The caller's open transaction is in the way: commit, and call again (PL010). Only SQL callers can meet that."""


class LimitsChanged(PglimitsError):
    """The limits are not as the plan that is to be applied found them; nothing was changed (PL011)."""


class LeaseLost(PglimitsError):
    """A lease ended while its holder was still at work: somebody else may have its slots by now."""


class LimiterUnavailable(PglimitsError):
    """The database could not be reached, or the connection broke during a call."""


class ReadOnlyServer(LimiterUnavailable):
    """The server is a standby, or read-only, and cannot grant anything."""


class NotInstalled(PglimitsError):
    """The database has no pglimits in it."""


class VersionMismatch(PglimitsError):
    """The database has an older or newer pglimits in it than this one (PL008 where it was to be installed)."""


class PermissionDenied(PglimitsError):
    """The role may not do that."""


class EmbeddedUnavailable(PglimitsError):
    """There is no PostgreSQL to embed, or it did not start."""


BY_SQLSTATE: dict[str, type[PglimitsError]] = {
    "PL001": InvalidArgument,
    "PL002": LimitNotFound,
    "PL003": LimitExists,
    "PL004": SlotsExceedLimit,
    "PL005": NoSlotDecay,
    "PL006": QueueFull,
    "PL007": CronUnavailable,
    "PL008": VersionMismatch,
    "PL009": LimitLocked,
    "PL010": CommitFirst,
    "PL011": LimitsChanged,
}
"""The class for each SQLSTATE that ``pglimits.errors()`` lists."""
