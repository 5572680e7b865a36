"""Which database: the caller's DSN, the environment, or the embedded server."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from .errors import InvalidArgument

_PATIENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
"""After how long a network that swallows what is sent is an error (seconds; tcp_user_timeout milliseconds). Of itself
Linux says so after 15 minutes to who has sent something, and after 2 hours to who waits for an answer."""


def keywords() -> set[str]:
    """The options that libpq knows."""
    return {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}


@dataclass(frozen=True, slots=True)
class Target:
    """A database. ``source`` says where its DSN came from: ``argument``, a variable's name, or ``embedded``."""

    conninfo: str
    source: str


def resolve(dsn: str | None = None) -> Target:
    """The database to use: ``dsn``, else PGLIMITS_DSN, else DATABASE_URL, else the embedded server, started if need be.

    One that is given but empty is an error: a variable that a script forgot to set must not lead to another database.

    Raises:
        InvalidArgument: the DSN is empty or cannot be read.
        EmbeddedUnavailable: there is no DSN, and no PostgreSQL to embed or ``PGLIMITS_EMBEDDED=never``.
    """
    if dsn is not None and not isinstance(dsn, str):
        raise InvalidArgument(f"dsn must be a string, not {type(dsn).__name__}")
    for source, value in (
        ("argument", dsn),
        ("PGLIMITS_DSN", os.environ.get("PGLIMITS_DSN")),
        ("DATABASE_URL", os.environ.get("DATABASE_URL")),
    ):
        if value is None:
            continue
        if not value.strip():
            what = "dsn is" if source == "argument" else f"the environment variable {source} is set but"
            raise InvalidArgument(f"{what} empty: name a database there, or leave it out")
        return Target(_normal(value, source), source)
    from . import _embedded, _install

    server = _embedded.start()
    _install.install_if_needed(server.dsn)
    return Target(_normal(server.dsn, "embedded"), "embedded")


def _normal(dsn: str, source: str) -> str:
    # SQLAlchemy and Django users write the driver into the scheme.
    scheme, separator, rest = dsn.partition("://")
    if separator and scheme.split("+")[0] in ("postgres", "postgresql"):
        dsn = f"postgresql://{rest}"
    try:
        if "\x00" in dsn:
            raise UnicodeError
        given = conninfo_to_dict(dsn)
    except (psycopg.ProgrammingError, UnicodeError):
        what = "dsn" if source == "argument" else source
        # Not with what libpq says: it quotes what it was given, and a password may be in that.
        raise InvalidArgument(
            f"{what} is not a PostgreSQL connection string, as postgresql://user@host/database or host=… dbname=… are"
        ) from None
    given.setdefault("application_name", os.environ.get("PGAPPNAME") or "pglimits")
    for name, value in _PATIENCE.items():
        given.setdefault(name, value)
    return make_conninfo("", **given)
