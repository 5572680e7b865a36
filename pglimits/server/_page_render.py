"""Turns what the page shows into HTML: templates, static files, and headers that let it run nothing else."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse, Response

from .. import _words
from . import _page_text
from ._auth import Caller

_HERE = Path(__file__).parent
_STATIC = _HERE / "static"
_SCRIPTS = (
    "vendor/htmx.min.js",
    "vendor/hx-csp.min.js",
    "vendor/hx-sse.min.js",
    "vendor/uPlot.iife.min.js",
    "charts.js",
    "page.js",
)
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".txt": "text/plain"}
_DEFAULTS: dict[str, Any] = {"down": None, "stale": False, "stream": "", "section": ""}


def content_security_policy(nonce: str) -> str:
    """Only scripts that carry the nonce, only style sheets of our own, nothing from elsewhere, and no sink of HTML but
    htmx's, whose elements need the nonce too."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'nonce-{nonce}'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "form-action 'self'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types htmx",
        )
    )


@cache
def static_files() -> dict[str, tuple[bytes, str, str]]:
    """Name to content, media type and version of every static file."""
    found = {}
    for path in sorted(_STATIC.rglob("*")):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            version = hashlib.sha256(content).hexdigest()[:12]
            found[path.relative_to(_STATIC).as_posix()] = (content, _TYPES[path.suffix], version)
    return found


@cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    for name in ("number", "exact", "duration", "moment", "iso", "who", "by_whom", "sentence", "value"):
        made.filters[name] = getattr(_page_text, name)
    made.tests["spaced"] = _page_text.is_spaced
    made.globals["count"] = _words.count
    for name in ("share", "sparkline"):
        made.globals[name] = getattr(_page_text, name)
    made.globals["macros"] = made.get_template("macros.html").module
    return made


def root_of(request: Request) -> str:
    """The prefix that a proxy puts before our paths."""
    root: str = request.scope.get("root_path", "")
    return root.rstrip("/")


def url_of(request: Request, path: str, **query: Any) -> str:
    return root_of(request) + path + _page_text.query(**query)


def limit_url(request: Request, name: str, **query: Any) -> str:
    """The page of a limit. Browsers take a segment of dots for a way up, so such names go behind the path."""
    if name in (".", ".."):
        return url_of(request, "/limits", name=name, **query)
    return url_of(request, f"/limits/{_page_text.segment(name)}", **query)


def is_part(request: Request) -> bool:
    """Whether ``page.js`` asks: it wants only what it puts into the page that is there."""
    return request.headers.get("hx-request") == "true"


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who looks at the page, and what there is for them to do."""

    name: str
    can_write: bool
    can_leave: bool


def visitor(request: Request) -> Visitor:
    caller = getattr(request.state, "caller", None)
    if not isinstance(caller, Caller):
        return Visitor("", False, False)
    return Visitor(caller.name or "", caller.full, caller.by_cookie)


def in_dialog(request: Request) -> bool:
    """Whether ``page.js`` asks for what it shows in a dialog."""
    return is_part(request) and "hx-dialog" in request.headers


def _layout(request: Request) -> str:
    """Around a view: a whole page; or the part that changes; or nothing, in a dialog."""
    if not is_part(request):
        return "layout.html"
    return "dialog.html" if in_dialog(request) else "part.html"


def render(request: Request, template: str, status: int = 200, **context: Any) -> HTMLResponse:
    """An answer of HTML: the whole page, or its part that changes."""
    nonce = secrets.token_urlsafe(18)
    files = static_files()
    given = {
        **_DEFAULTS,
        "now": datetime.now(UTC),
        "scripts": _SCRIPTS,
        "visitor": visitor(request),
        "layout": _layout(request),
        "nonce": nonce,
        "url": partial(url_of, request),
        "limit_url": partial(limit_url, request),
        "static": lambda name: url_of(request, f"/static/{name}", v=files[name][2]),
        **context,
    }
    html = _environment().get_template(template).render(given)
    headers = {
        "Content-Security-Policy": content_security_policy(nonce),
        "Cache-Control": "no-store",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "Vary": "HX-Request",
    }
    # What ``page.js`` asks for it shows, whatever the status; a browser's console would complain of most.
    return HTMLResponse(html, 200 if is_part(request) else status, headers)


def static(request: Request, name: str) -> Response:
    """A static file; one that is asked for by its version is kept by the browser."""
    found = static_files().get(name)
    if found is None:
        return Response("there is no such file", 404, media_type="text/plain")
    content, media_type, version = found
    kept = "public, max-age=31536000, immutable" if request.query_params.get("v") == version else "no-cache"
    headers = {"Cache-Control": kept, "ETag": f'"{version}"', "X-Content-Type-Options": "nosniff"}
    if request.headers.get("if-none-match") == f'"{version}"':
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)
