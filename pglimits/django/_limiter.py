"""The limiters of a project: on the databases that its settings name."""

from __future__ import annotations

import os
import threading
from typing import Any

import psycopg
from django.conf import settings
from django.db import connections
from psycopg.conninfo import make_conninfo

from .._dsn import keywords, resolve
from .._limiter import AsyncLimiter, Limiter
from ..errors import InvalidArgument

_lock = threading.Lock()
_limiters: dict[tuple[str, str], Limiter] = {}
"""By alias and name of the database: that of a test has another name."""


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def database() -> str:
    """The alias of the database with the limits."""
    return str(getattr(settings, "PGLIMITS_DATABASE", "default"))


def limiter(alias: str | None = None) -> Limiter:
    """The limiter of the project, for threads. ``alias``: of another database than PGLIMITS_DATABASE.

    It opens connections of its own, as DATABASES says, and asks Django each time how: a backend that changes its
    credentials is heard.

    Raises:
        InvalidArgument: the database is not PostgreSQL.
    """
    alias = database() if alias is None else alias
    connection = connections[alias]
    if connection.vendor != "postgresql":
        raise InvalidArgument(f"the database {alias!r} is not PostgreSQL: PGLIMITS_DATABASE names the alias of one")
    place = alias, str(connection.settings_dict["NAME"])
    with _lock:
        if place not in _limiters:
            _limiters[place] = Limiter(connect=lambda: _open(alias))
        return _limiters[place]


def async_limiter(alias: str | None = None) -> AsyncLimiter:
    """The same for tasks."""
    return limiter(alias)._in_tasks()


def close(alias: str | None = None) -> None:
    """Close the limiters of one database, or of all. They are made anew when they are needed."""
    with _lock:
        places = [place for place in _limiters if alias in (None, place[0])]
        closing = [_limiters.pop(place) for place in places]
    for each in closing:
        each.close()


def _open(alias: str) -> psycopg.Connection[Any]:
    given = connections[alias].get_connection_params()
    of_libpq = keywords()
    known = {name: value for name, value in given.items() if name in of_libpq and value is not None}
    return psycopg.connect(resolve(make_conninfo("", **known) or "dbname=''").conninfo, autocommit=True)
