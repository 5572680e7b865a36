"""serve: the HTTP API and the page."""

from __future__ import annotations

import contextlib
import gc
import ipaddress
import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from . import _client, _errors
from ._commands import command
from ._options import Dsn

if TYPE_CHECKING:
    from pglimits.server import Settings, Token

app = typer.Typer()

_NEEDS = ("fastapi", "uvicorn", "psycopg_pool")
_ENDS_WITHIN = 4.7
"""Seconds from when it is told to end. What is at work in the database then ends by itself."""


@command(app, "Set up and look after")
def serve(
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: any that is free.")] = 4200,
    root_path: Annotated[
        str, typer.Option("--root-path", metavar="PATH", help="The path under which a proxy shows it.")
    ] = "",
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file", metavar="FILE", show_default=False, help="Tokens that may do everything: lines name:secret."
        ),
    ] = None,
    read_token_file: Annotated[
        Path | None,
        typer.Option("--read-token-file", metavar="FILE", show_default=False, help="Tokens that may only look."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            show_default=False,
            help="Without tokens: a name, besides localhost, by which it may be called. Repeatable.",
        ),
    ] = None,
    sweep_every: Annotated[
        float, typer.Option("--sweep-every", metavar="S", min=0, help="Seconds between two sweeps; 0: none.")
    ] = 60,
    dsn: Dsn = None,
) -> None:
    """Serve an HTTP API and a web page, until ctrl-C.

    Where no database is named, the embedded one is served. Listening elsewhere than on this machine needs tokens, as
    PGLIMITS_TOKENS=name:secret (PGLIMITS_READ_TOKENS for those who may only look), or in files.

    Example: pglimits serve

    Example: PGLIMITS_TOKENS=ops:$(openssl rand -hex 24) pglimits serve --host 0.0.0.0
    """
    _check_installed()
    from pglimits.server import Settings

    tokens = [*_tokens("PGLIMITS_TOKENS", token_file, True), *_tokens("PGLIMITS_READ_TOKENS", read_token_file, False)]
    if not tokens and not _is_loopback(host):
        raise _errors.usage(
            f"to listen on {host}, which others can reach, name tokens: set PGLIMITS_TOKENS=name:secret, or use "
            '--token-file. A secret: python3 -c "import secrets; print(secrets.token_urlsafe())"'
        )
    _check_address(host, port)
    settings = Settings(
        dsn=_client.target(dsn).conninfo,
        tokens=tuple(tokens),
        root_path=_root_path(root_path),
        hosts=tuple(allow_host or ()),
        sweep_every=sweep_every,
    )
    _check_database(settings)
    raise typer.Exit(_run(settings, host, port))


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise _errors.fail(f"serve needs {', '.join(missing)}: pip install 'pglimits[server]'")


def _tokens(variable: str, file: Path | None, full: bool) -> list[Token]:
    """The tokens of a variable and of a file."""
    from pglimits.server._auth import parse_tokens

    given = os.environ.get(variable)
    found = [] if given is None else parse_tokens(given, full, variable)
    if given is not None and not found:
        raise _errors.usage(f"the environment variable {variable} is set but has no token: name one, or unset it")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise _errors.usage(f"cannot read {file}: {reason}") from None
        in_file = parse_tokens(text, full, str(file))
        if not in_file:
            raise _errors.usage(f"there is no token in {file}")
        found += in_file
    return found


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_address(host: str, port: int) -> None:
    """Before a database is started for it. The server finds out by itself what changes until it listens."""
    import socket

    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        raise _errors.fail(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None


def _root_path(path: str) -> str:
    path = path.rstrip("/")
    if path and (not path.startswith("/") or not path.isprintable() or set(path) & set(' ?#%"<>\\')):
        raise _errors.usage("--root-path must be a path such as /pglimits")
    return path


def _check_database(settings: Settings) -> None:
    """A database without pglimits is an error at once. One that cannot be reached may come."""
    import psycopg

    from pglimits import __version__
    from pglimits._database import connect, mismatch, numbers, translate
    from pglimits.errors import LimiterUnavailable

    assert settings.dsn is not None
    try:
        with connect(settings.dsn) as connection:
            row = connection.execute("select pglimits.version()").fetchone()
    except LimiterUnavailable as error:
        _errors.say("Warning", f"{error}; serving 503 until it is there")
        return
    except psycopg.Error as error:
        raise translate(error) from error
    there = str(row[0]) if row else ""
    if numbers(__version__)[:2] != numbers(there)[:2]:
        raise mismatch(there)


def _run(settings: Settings, host: str, port: int) -> int:
    import socket

    import uvicorn

    from pglimits.server import create_app
    from pglimits.server._app import begin_closing

    application = create_app(settings)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            gc.freeze()  # what is here now stays: the collector need not look at it again
            if self.started:
                bound = self.servers[0].sockets[0].getsockname()
                shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
                _errors.write(
                    f"Serving {_client.place(settings.dsn or '')} on http://{shown}:{bound[1]}{settings.root_path}/"
                )

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # Not as uvicorn has it, which ends by the signal: this is how it is meant to end.
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Not all that waits for a database that is frozen ends when it is cancelled.
            last = threading.Timer(_ENDS_WITHIN, os._exit, [0])
            last.daemon = True
            last.start()
            begin_closing(application)
            await super().shutdown(sockets)

    _many_connections()
    logging.getLogger("uvicorn.error").addHandler(_OneLine(logging.ERROR))
    _log_faults()
    server = Server(
        uvicorn.Config(
            application,
            host=host,
            port=port,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=3,
            timeout_keep_alive=75,
            server_header=False,
            ws_max_size=1_000_000,
        )
    )
    try:
        server.run()
    except SystemExit:
        return _errors.ERROR  # it has said why
    return 0 if server.started else _errors.ERROR


def _many_connections() -> None:
    """Each stream is a connection: have as many as the system allows."""
    try:
        import resource
    except ImportError:  # not everywhere
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _log_faults() -> None:
    """Errors that nobody expected are logged as they are, for whoever mends them."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.ERROR)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    log = logging.getLogger("pglimits.server")
    log.addHandler(handler)
    log.propagate = False


class _OneLine(logging.Handler):
    """What the server could not do, as one line."""

    def emit(self, record: logging.LogRecord) -> None:
        _errors.say("Error", record.getMessage())
