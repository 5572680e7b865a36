"""Prefect's limits, read through the API of its server or of Prefect Cloud."""

from __future__ import annotations

import base64
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any
from uuid import uuid4

from . import _errors
from ._prefect import Found, GlobalLimit, found

_PATIENCE = 30.0
"""Seconds that one answer may take."""
_LIMITS = "/v2/concurrency_limits/filter"
_LIMITS_OF_TAGS = "/concurrency_limits/filter"


def read(url: str, key: str | None) -> Found:
    """The limits of the Prefect whose API is at a URL.

    key: for Prefect Cloud, else PREFECT_API_AUTH_STRING or PREFECT_API_KEY say who asks, as they do for its client.
    """
    api = _Api(url, key)
    try:
        limits = [_limit(api, item) for item in api.all(_LIMITS, "name")]
    except _Refused as error:
        raise api.explained(error) from None
    try:
        tags = [str(item["tag"]) for item in api.all(_LIMITS_OF_TAGS, "tag")]
    except _Refused:  # a server that has none
        tags = []
    return found(api.url, limits, tags)


def _limit(api: _Api, item: dict[str, Any]) -> GlobalLimit:
    try:
        decay, held = item["slot_decay_per_second"], int(item["active_slots"])
        return GlobalLimit(item["name"], item["limit"], decay, item["active"], held)
    except (KeyError, TypeError, ValueError):
        raise _errors.fail(f"{api.url} answers with limits of a form that is not Prefect's: {item!r:.200}") from None


class _Refused(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status = status


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key must not be carried to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Api:
    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.strip().rstrip("/")
        try:
            parts = urllib.parse.urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise _errors.fail("--api-url must be a URL such as http://127.0.0.1:4200/api")
        if parts.username is not None:
            raise _errors.fail("--api-url must have no user and password in it: set PREFECT_API_AUTH_STRING to them")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "pglimits"}
        self._given = "nothing was given"
        for name, value, kind in (
            ("--api-key", key, "Bearer"),
            ("PREFECT_API_AUTH_STRING", os.environ.get("PREFECT_API_AUTH_STRING") or None, "Basic"),
            ("PREFECT_API_KEY", os.environ.get("PREFECT_API_KEY") or None, "Bearer"),
        ):
            if value is not None:
                self._given = f"{name} was given"
                self._headers["Authorization"] = f"{kind} {_secret(name, value, kind)}"
                break
        self._opener = urllib.request.build_opener(_NoRedirects)

    def all(self, path: str, key: str) -> list[dict[str, Any]]:
        """All pages of a list, in the size that the server likes."""
        rows: dict[Any, dict[str, Any]] = {}
        while True:
            page = self._ask(path, {"offset": len(rows)})
            if not isinstance(page, list) or not all(isinstance(item, dict) and key in item for item in page):
                raise _errors.fail(f"{self.url} answers, but not as Prefect's API does: {page!r:.200}")
            before = len(rows)
            rows |= {str(item[key]): item for item in page}
            if len(rows) == before:
                return list(rows.values())

    def explained(self, error: _Refused) -> Exception:
        """Why it answers so, and what to do."""
        if error.status in (401, 403):
            return _errors.fail(
                f"{self.url} refuses to answer ({error}); {self._given}."
                " Give --api-key, or set PREFECT_API_KEY or PREFECT_API_AUTH_STRING, as for Prefect's client"
            )
        if error.status in (404, 405):
            try:
                version = self._ask("/admin/version")
            except _Refused:
                version = None
            if isinstance(version, str) and version[:1].isdigit():
                return _errors.fail(f"the Prefect {version:.40} at {self.url} is too old for global concurrency limits")
            return _errors.fail(f"{self.url} is not the address of Prefect's API, which ends with /api ({error})")
        return _errors.fail(f"{self.url} answers with an error: {error}")

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            return self._send(path, body)
        except _Refused as error:
            if error.status != 403 or "csrf" not in str(error).lower():
                raise
        client = str(uuid4())
        token = self._send(f"/csrf-token?client={client}")
        if isinstance(token, dict):
            self._headers |= {"Prefect-Csrf-Token": str(token.get("token")), "Prefect-Csrf-Client": client}
        return self._send(path, body)

    def _send(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, self._headers)
            with self._opener.open(request, timeout=_PATIENCE) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise _Refused(error.code, f"{error.code} {error.reason}{_said(error)}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise _errors.fail(f"{self.url} cannot be reached: {reason or type(error).__name__}") from None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise _Refused(404, "it answers, but not with JSON") from None


def _secret(name: str, value: str, kind: str) -> str:
    """As a header has it. What is wrong with it is said without it."""
    if kind == "Basic":
        return base64.b64encode(value.encode()).decode()
    if not value.strip() or not (value.isascii() and value.strip().isprintable()):
        raise _errors.fail(f"{name} is empty, or has characters that no key has")
    return value.strip()


def _said(error: urllib.error.HTTPError) -> str:
    """What an answer says beside its status."""
    where = error.headers.get("Location")
    if where and 300 <= error.code < 400:
        return f": it has moved to {where}"
    try:
        body = json.loads(error.read())
        said = body.get("detail") or body.get("exception_message")
    except (OSError, http.client.HTTPException, ValueError, AttributeError):
        return ""
    return f": {said[:200]}" if isinstance(said, str) else ""
