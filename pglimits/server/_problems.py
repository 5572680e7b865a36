"""Every error as problem details (RFC 9457): what an error of pglimits means in HTTP.

Members beyond those of the RFC: ``code``, our SQLSTATE where there is one, and ``retry_after`` in seconds.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .._problem_details import body_of, details, whole_seconds
from ..errors import PglimitsError

log = logging.getLogger("pglimits.server")


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
        body = body_of(self.status, self.detail, self.title, self.kind, self.code, self.retry_after)
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["Retry-After"] = whole_seconds(self.retry_after)
        return Response(
            json.dumps({**body, **self.more}, ensure_ascii=False, default=str),
            self.status,
            headers,
            "application/problem+json",
        )


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
    known = details(error)
    if known is None:
        log.error("the database has refused something: %s", error)
        return Problem(500, "the database has refused that; the log of this server has more")
    return Problem(
        known.status, str(error), title=known.title, kind=known.kind, code=known.code, retry_after=known.retry_after
    )


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
