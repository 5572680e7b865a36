"""The database that a command talks to."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

from . import _errors, _rights

if TYPE_CHECKING:
    import psycopg

    from pglimits import Limiter
    from pglimits._dsn import Target

_SOURCES = {"argument": "--dsn", "embedded": "the embedded server"}


class _Warnings(logging.Handler):
    """What the library warns of, as one line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        _errors.say("Warning" if record.levelno < logging.ERROR else "Error", record.getMessage())


def show_warnings() -> None:
    """Have the library's warnings shown, and nothing of the libraries below it."""
    log = logging.getLogger("pglimits")
    if not any(isinstance(handler, _Warnings) for handler in log.handlers):
        log.addHandler(_Warnings(logging.WARNING))
        logging.getLogger("psycopg").addHandler(logging.NullHandler())


def target(dsn: str | None) -> Target:
    """Which database, and how it was found. Starts the embedded server where nothing else is named."""
    from pglimits._dsn import resolve

    show_warnings()
    return resolve(dsn)


@contextlib.contextmanager
def limiter(dsn: str | None, role: str = _rights.ADMIN, name: str | None = None) -> Iterator[Limiter]:
    """A limiter on that database.

    role: the one whose rights are needed.
    name: of the limit that the command line names. If it is not found, the error says which may have been meant.
    """
    from pglimits import Limiter

    from . import _names

    conninfo = target(dsn).conninfo
    named = [] if name is None else [name]
    with _rights.explained(conninfo, role), _names.guessed(conninfo, named), Limiter(conninfo) as opened:
        yield opened


def connect(conninfo: str, **options: Any) -> psycopg.Connection[tuple[Any, ...]]:
    """A connection in autocommit, for what the limiter has no call for."""
    from pglimits._database import connect as connect_to

    return connect_to(conninfo, **options)


def clock(conninfo: str) -> datetime:
    """The database's clock: the local one may be off."""
    with connect(conninfo) as connection:
        row = connection.execute("select pglimits._now()").fetchone()
    assert row is not None
    at = row[0]
    assert isinstance(at, datetime)
    return at


def explained(error: Exception) -> Exception:
    """An error of the database as pglimits has it, with the server's hint."""
    from psycopg import Error

    from pglimits._database import translate

    meant = translate(error)
    if isinstance(error, Error) and error.diag.message_hint:
        return type(meant)(f"{meant}. {error.diag.message_hint}")
    return meant


def source(found: Target) -> str:
    """How a database was found, in words."""
    return _SOURCES.get(found.source, f"${found.source}")


def place(conninfo: str) -> str:
    """Which database that is, without any password."""
    from psycopg.conninfo import conninfo_to_dict

    given = conninfo_to_dict(conninfo)
    host = given.get("host") or given.get("hostaddr") or "local"
    port = given.get("port")
    user = f" as {given['user']}" if given.get("user") else ""
    name = given.get("dbname") or given.get("user")
    database = f"database {name}" if name else "the default database"
    return f"{database} at {host}{f':{port}' if port else ''}{user}"


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end what runs inside as ctrl-C does. Sleep in there for short whiles only.

    Raises:
        typer.Exit: a signal came; 128 plus its number.
    """
    import typer

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    before: dict[int, Any] = {}
    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(ending) is not signal.SIG_IGN:
            before[ending] = signal.signal(ending, stop)
    try:
        yield
    except Stopped as stopped:
        raise typer.Exit(_errors.SIGNAL + stopped.number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def names(given: list[str]) -> str | list[str]:
    """One name, or several."""
    return given[0] if len(given) == 1 else given


def holder(program: str, *, parent: bool = False) -> dict[str, object]:
    """Who holds a lease that this process takes, or takes for the shell script that called it."""
    return {"host": socket.gethostname(), "pid": os.getppid() if parent else os.getpid(), "program": program}
