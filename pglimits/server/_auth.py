"""Who may do what: tokens, the cookie of a login, and requests that another site has sent.

A program sends a token as ``Authorization: Bearer``, or as the password of basic authentication. A browser sends the
cookie that a login has set. Without tokens everybody may do everything, which is for the loopback interface alone;
there, who calls this server by a foreign name (DNS rebinding) is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import time
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote, urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import InvalidArgument
from ._problems import Problem

COOKIE = "pglimits_session"
SESSION_SECONDS = 7 * 86400
SHORTEST_SECRET = 16

_PUBLIC = ("/healthz", "/readyz", "/login", "/logout", "/favicon.ico")
_SAFE = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True, slots=True)
class Token:
    """One that may use the server. ``full``: it may change things, not only look."""

    name: str
    secret: str = field(repr=False)
    full: bool = True


def parse_tokens(text: str, full: bool, where: str) -> list[Token]:
    """Tokens as ``name:secret``, separated by commas, blanks or lines. Lines that begin with # are comments.

    No error repeats any of it.
    """
    found = []
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for nth, item in enumerate(" ".join(lines).replace(",", " ").split(), 1):
        name, separator, secret = item.partition(":")
        if not separator or not name or not name.isprintable():
            raise InvalidArgument(f"token {nth} of {where} must be written name:secret")
        if len(secret) < SHORTEST_SECRET:
            raise InvalidArgument(
                f"the secret of token {nth} of {where} must have at least {SHORTEST_SECRET} characters; "
                'make one: python3 -c "import secrets; print(secrets.token_urlsafe())"'
            )
        if not secret.isascii() or not secret.isprintable():
            raise InvalidArgument(f"the secret of token {nth} of {where} must be printable ASCII, as headers are")
        found.append(Token(name, secret, full))
    return found


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request. ``name``: of its token; None without tokens."""

    name: str | None
    full: bool
    by_cookie: bool = False


class Auth:
    """Tells who a request is from."""

    def __init__(self, tokens: tuple[Token, ...], hosts: tuple[str, ...] = (), root_path: str = "") -> None:
        names = [token.name for token in tokens]
        if len(set(names)) < len(names):
            raise InvalidArgument("two tokens have the same name")
        self.required = bool(tokens)
        self.hosts = {host.lower() for host in hosts}
        self.cookie_path = root_path or "/"
        self._tokens = [(token, _digest(token.secret)) for token in tokens]

    def token(self, secret: str) -> Token | None:
        """Whose secret that is. Takes as long whoever's it is."""
        given = _digest(secret)
        found = None
        for token, digest in self._tokens:
            if hmac.compare_digest(given, digest):
                found = token
        return found

    def caller(self, headers: Headers) -> Caller | None:
        """Who sends these headers; None: somebody unknown."""
        if not self.required:
            return Caller(None, True)
        given = headers.get("authorization")
        if given is not None:
            token = self.token(_secret(given))
            return None if token is None else Caller(token.name, token.full)
        token = self._of_cookie(headers)
        return None if token is None else Caller(token.name, token.full, by_cookie=True)

    def session(self, token: Token) -> str:
        """What the cookie of a login says. It ends by itself, and with the token."""
        ends = int(time.time()) + SESSION_SECONDS
        return f"{_encode(token.name)}.{ends}.{_signature(token, ends)}"

    def _of_cookie(self, headers: Headers) -> Token | None:
        cookies: SimpleCookie = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            return None
        name, _, rest = cookies[COOKIE].value.partition(".") if COOKIE in cookies else ("", "", "")
        ends, _, signature = rest.partition(".")
        if not ends.isascii() or not ends.isdigit() or len(ends) > 12 or int(ends) < time.time():
            return None
        found = None
        for token, _ in self._tokens:
            fits = hmac.compare_digest(signature.encode(), _signature(token, int(ends)).encode())
            if fits and name == _encode(token.name):
                found = token
        return found

    def is_known_host(self, host: str | None) -> bool:
        """Whether a request without tokens calls this server by a name of its own."""
        name = _host_name(host or "")
        if name in self.hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def is_same_site(headers: Headers, needs_proof: bool) -> bool:
    """Whether a request that changes something was not sent by the page of another site.

    needs_proof: where the browser says nothing about it, that is a no.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("origin")
    if origin is None:
        return not needs_proof
    try:
        host = urlsplit(origin).netloc
    except ValueError:
        return False
    return origin != "null" and host.lower() == headers.get("host", "").lower()


class AuthMiddleware:
    """Refuses requests from nobody knows whom; notes in ``request.state.caller`` who it is."""

    def __init__(self, app: ASGIApp, auth: Auth, public: tuple[str, ...] = ()) -> None:
        self.app, self.auth, self.public = app, auth, (*_PUBLIC, *public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and not self._is_ours(Headers(scope=scope)):
            return await send({"type": "websocket.close", "code": 1008, "reason": "another site has opened that"})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refused = self._check(scope)
        if refused is None:
            return await self.app(scope, receive, send)
        return await refused(scope, receive, send)

    def _is_ours(self, headers: Headers) -> bool:
        """Whether a socket was not opened by the page of another site. Who it is, its first message says."""
        return is_same_site(headers, needs_proof=False) and (
            self.auth.required or self.auth.is_known_host(headers.get("host"))
        )

    def _check(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        auth = self.auth
        if not auth.required and not auth.is_known_host(headers.get("host")):
            return Problem(
                421, "this server has no tokens, and is not to be called by that name: see --allow-host"
            ).response()
        caller = auth.caller(headers)
        scope.setdefault("state", {})["caller"] = caller
        path = _path(scope)
        is_public = path in self.public or path.startswith("/static/")
        if caller is None and not is_public:
            return _who_are_you(scope, headers, path)
        if scope["method"] not in _SAFE and "authorization" not in headers:
            by_cookie = caller is not None and caller.by_cookie
            if not is_same_site(headers, needs_proof=by_cookie):
                return Problem(403, "the page of another site has sent that").response()
        return None


def _who_are_you(scope: Scope, headers: Headers, path: str) -> Response:
    """A browser is sent to the login, a program is told."""
    is_page = scope["method"] in ("GET", "HEAD") and not path.startswith(("/v1", "/api", "/metrics"))
    if is_page and "text/html" in headers.get("accept", "") and "authorization" not in headers:
        root = scope.get("root_path", "")
        query = scope.get("query_string", b"").decode("latin-1")
        wanted = path + (f"?{query}" if query else "")
        return RedirectResponse(f"{root}/login?next={quote(wanted, safe='')}", 303)
    return Problem(
        401,
        "a token is needed: Authorization: Bearer …" if "authorization" not in headers else "that token is not known",
        headers={"WWW-Authenticate": 'Bearer realm="pglimits"'},
    ).response()


async def reading(request: Request) -> Caller:
    """For routes that look: who asks. (Not a plain function, which FastAPI would call in a thread.)"""
    caller = getattr(request.state, "caller", None)
    if not isinstance(caller, Caller):
        raise Problem(401, "a token is needed", headers={"WWW-Authenticate": 'Bearer realm="pglimits"'})
    return caller


async def writing(request: Request) -> Caller:
    """For routes that take, give back or change: who asks. Tokens that may only read are refused."""
    caller = await reading(request)
    if not caller.full:
        raise Problem(403, f"the token {caller.name!r} may only read")
    return caller


def set_cookie(response: Response, request: Request, auth: Auth, value: str) -> None:
    """Set the cookie of a login; an empty value ends it."""
    response.set_cookie(
        COOKIE,
        value,
        max_age=SESSION_SECONDS if value else 0,
        path=auth.cookie_path,
        secure=request.scope["scheme"] == "https",
        httponly=True,
        samesite="lax",  # a link to a limit opens it; what changes something needs more: see is_same_site
    )


def local_path(wanted: str | None) -> str:
    """Where to go after a login: a path of this server, whatever the form says."""
    if not wanted or not wanted.startswith("/") or wanted[1:2] in ("/", "\\") or not wanted.isprintable():
        return "/"
    return wanted


def _path(scope: Scope) -> str:
    """The path without the prefix of a proxy."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def _secret(authorization: str) -> str:
    """The secret that a header has; empty if it has none."""
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).digest()


def _encode(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def _signature(token: Token, ends: int) -> str:
    message = f"pglimits session\n{token.name}\n{ends}\n{token.full}"
    return hmac.new(token.secret.encode(), message.encode(), hashlib.sha256).hexdigest()
