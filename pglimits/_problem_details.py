"""Problem details (RFC 9457): what an error of pglimits means in HTTP, for whatever answers with it.

Members beyond those of the RFC: ``code``, our SQLSTATE where there is one, and ``retry_after`` in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from .errors import (
    BY_SQLSTATE,
    AcquireTimeout,
    CommitFirst,
    CronUnavailable,
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
    SlotsExceedLimit,
    VersionMismatch,
)

MEDIA_TYPE = "application/problem+json"
QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"

_CODES = {kind: code for code, kind in BY_SQLSTATE.items()}
_STATUS: list[tuple[type[PglimitsError], int]] = [
    (InvalidArgument, 422),
    (LimitNotFound, 404),
    (LimitExists, 409),
    (LimitsChanged, 409),
    (SlotsExceedLimit, 422),
    (NoSlotDecay, 422),
    (QueueFull, 429),
    (CronUnavailable, 501),
    (LimitLocked, 503),
    (AcquireTimeout, 429),
    (CommitFirst, 409),
    (LeaseLost, 410),
    (PermissionDenied, 403),
    (NotInstalled, 503),
    (VersionMismatch, 503),
    (LimiterUnavailable, 503),
]
_TITLES = {
    429: "Quota exceeded",
    413: "Content too large",
    422: "Invalid argument",
    503: "The database is not available",
}
_COMES_BACK = 2.0
"""Seconds after which it is worth while to ask a server again that has no database."""


@dataclass(frozen=True, slots=True)
class Details:
    """What an error means. ``kind``: a URI. ``retry_after``: seconds; None where nobody can tell."""

    status: int
    detail: str
    title: str | None = None
    kind: str = "about:blank"
    code: str | None = None
    retry_after: float | None = None

    def body(self) -> dict[str, Any]:
        return body_of(self.status, self.detail, self.title, self.kind, self.code, self.retry_after)


def details(error: PglimitsError) -> Details | None:
    """What an error means in HTTP; None where only the database's own words tell."""
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 0)
    if not status:
        return None
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
    retry_after = getattr(error, "retry_after", None)
    if status == 503 and retry_after is None:
        retry_after = _COMES_BACK
    title = {LimitLocked: "The limit is locked", SlotsExceedLimit: "Slots exceed the limit"}.get(type(error))
    return Details(status, str(error), title, QUOTA_EXCEEDED if status == 429 else "about:blank", code, retry_after)


def body_of(
    status: int, detail: str, title: str | None, kind: str, code: str | None, retry_after: float | None
) -> dict[str, Any]:
    """The members of a body."""
    body: dict[str, Any] = {"type": kind, "title": title or _phrase(status), "status": status, "detail": detail}
    if code is not None:
        body["code"] = code
    if retry_after is not None or kind == QUOTA_EXCEEDED:
        body["retry_after"] = retry_after
    return body


def whole_seconds(seconds: float) -> str:
    """As ``Retry-After`` has it: whole seconds, and never too early."""
    return str(max(math.ceil(seconds), 1))


def _phrase(status: int) -> str:
    if status in _TITLES:
        return _TITLES[status]
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
