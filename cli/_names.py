"""Names of limits: completed in a shell, and guessed where somebody mistyped one."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from . import _client

_PATIENCE = 2
"""Seconds that somebody who pressed the tab key, or mistyped a name, is kept waiting at most for each step."""
_MOST = 200
"""How many names a shell is offered."""

_KNOWN = "select name from pglimits.limits where starts_with(name, %s) order by name"


def complete(context: typer.Context, incomplete: str) -> list[str]:
    """The names of limits that begin so, of the database that the command line or the environment names.

    None where it cannot be asked, without a word: a shell is in the middle of a line. Starts no embedded server.
    """
    try:
        dsn = _given(context, "dsn")
        if dsn is None and not any(os.environ.get(name, "").strip() for name in ("PGLIMITS_DSN", "DATABASE_URL")):
            return []
        from pglimits._dsn import resolve

        for name in ("pglimits", "psycopg"):
            logging.getLogger(name).addHandler(logging.NullHandler())
        already = context.params.get("names") or ()
        return [name for name in _known(resolve(dsn).conninfo, incomplete) if name not in already][:_MOST]
    except Exception:
        return []


def _given(context: Any, option: str) -> str | None:
    """An option of this command, else of those above it."""
    while context is not None:
        if context.params.get(option) is not None:
            return str(context.params[option])
        context = context.parent
    return None


def _known(conninfo: str, prefix: str = "") -> list[str]:
    with _client.connect(conninfo, connect_timeout=_PATIENCE) as connection, connection.transaction():
        connection.execute(f"set local statement_timeout = '{_PATIENCE}s'".encode())
        return [name for (name,) in connection.execute(_KNOWN.encode(), [prefix]).fetchall()]


@contextlib.contextmanager
def guessed(conninfo: str, names: Sequence[str]) -> Iterator[None]:
    """Where one of these limits is not found inside, say which one may have been meant."""
    from pglimits.errors import LimitNotFound, PglimitsError

    try:
        yield
    except LimitNotFound as error:
        from psycopg import Error

        known: list[str] = []
        with contextlib.suppress(Error, PglimitsError):
            known = _known(conninfo)
        near = [repr(each) for name in names if name not in known for each in _near(name, known)]
        if not near:
            raise
        raise LimitNotFound(f"{error}: did you mean {' or '.join(dict.fromkeys(near))}?") from error


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Those that a name resembles most, whatever their case."""
    import difflib

    by_folded = {each.casefold(): each for each in known}
    return [by_folded[each] for each in difflib.get_close_matches(name.casefold(), by_folded, n=3)]
