"""Every error as problem details (RFC 9457): what an error of pglimits means in HTTP.

Members beyond those of the RFC: ``code``, our SQLSTATE where there is one, and ``retry_after`` in seconds.
"""

from __future__ import annotations

import json
import logging
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..errors import (
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

log = logging.getLogger("pglimits.server")

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


class Problem(Exception):
    """An error that is answered as problem details."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        title: str | None = None,
        kind: str = "about:blank",
        code: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.title = title
        self.kind = kind
        self.code = code
        self.retry_after = retry_after
        self.headers = headers or {}
        self.more = more or {}

    def response(self) -> Response:
        body: dict[str, Any] = {"type": self.kind, "title": self.title or _phrase(self.status), "status": self.status}
        body["detail"] = self.detail
        if self.code is not None:
            body["code"] = self.code
        headers = dict(self.headers)
        if self.retry_after is not None:
            body["retry_after"] = self.retry_after
            headers["Retry-After"] = whole_seconds(self.retry_after)
        elif self.kind == QUOTA_EXCEEDED:
            body["retry_after"] = None
        return Response(
            json.dumps({**body, **self.more}, ensure_ascii=False, default=str),
            self.status,
            headers,
            "application/problem+json",
        )


def whole_seconds(seconds: float) -> str:
    """As ``Retry-After`` has it: whole seconds, and never too early."""
    return str(max(math.ceil(seconds), 1))


def problem(error: BaseException) -> Problem:
    """What an error means in HTTP. One that nobody expects is logged, and tells nothing of the inside."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException) and error.status_code == 400:  # raised by the framework, for bodies only
        return _not_json()
    if isinstance(error, HTTPException):
        return Problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if not isinstance(error, PglimitsError):
        log.error("an error that nobody expected", exc_info=error)
        return Problem(500, "something went wrong in this server; its log has more")
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 0)
    if not status:
        log.error("the database has refused something: %s", error)
        return Problem(500, "the database has refused that; the log of this server has more")
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
    retry_after = getattr(error, "retry_after", None)
    if status == 503 and retry_after is None:
        retry_after = _COMES_BACK
    title = {LimitLocked: "The limit is locked", SlotsExceedLimit: "Slots exceed the limit"}.get(type(error))
    if status == 429:
        return Problem(429, str(error), title=title, kind=QUOTA_EXCEEDED, code=code, retry_after=retry_after)
    return Problem(status, str(error), title=title, code=code, retry_after=retry_after)


def _invalid(error: RequestValidationError) -> Problem:
    """A request that is not of the right form. What was sent is not repeated: it may be long, or secret."""
    found = error.errors()
    if any(one.get("type") == "json_invalid" for one in found):
        return _not_json()
    said = []
    for one in found[:10]:
        place = ".".join(str(part) for part in one.get("loc", ()) if part not in ("body", "query", "path", "header"))
        what = str(one.get("msg", "invalid")).removeprefix("Value error, ")
        if one.get("type") == "model_attributes_type":
            what = "must be a JSON object"
        said.append(f"{place}: {what}" if place else what)
    return Problem(422, "; ".join(said), code="PL001")


def _not_json() -> Problem:
    return Problem(400, "the body is not JSON", code="PL001")


def _phrase(status: int) -> str:
    if status in _TITLES:
        return _TITLES[status]
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


async def _answer(request: Request, error: Exception) -> Response:
    found = problem(error)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found.status == 422 and kind and "json" not in kind:
        found = Problem(415, f"send the body as Content-Type: application/json, not {kind}", code="PL001")
    if found.status == 405:
        from ._openapi import allowed

        root = request.scope.get("root_path", "")
        methods = allowed(request.app, request.scope["path"].removeprefix(root))
        if methods:
            found.headers = {"Allow": ", ".join(sorted(methods))}
    return found.response()


def add_handlers(app: FastAPI) -> None:
    """Have every error that a route raises answered so."""
    for kind in (Problem, PglimitsError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
