"""Installs, upgrades and removes the SQL of pglimits. The order of its files is the one in sql/install.sql."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from . import __version__
from ._database import connect, numbers, translate
from ._dsn import resolve
from .errors import InvalidArgument, PermissionDenied, PglimitsError, VersionMismatch

ROLES = ("pglimits_user", "pglimits_reader", "pglimits_admin")
"""Who may take slots, who may look, who may do everything."""

_INCLUDE = re.compile(r"^\\ir (\S+)$", re.MULTILINE)
_MIGRATION = re.compile(r"^migrations/(\d+)_")
_REPEATABLE = re.compile(r"^create or replace (?:function|procedure|view) pglimits\.(\w+)", re.MULTILINE)
_LIST = re.compile(r"^  (users|administrators|readers|visible) constant text\[\] := '\{(.*)\}';$", re.MULTILINE)

_HEAD = f"""\
-- Installs pglimits {__version__}, or brings what is there up to it. Plain statements for any tool, to be run in one
-- transaction, together or one by one. Safe to repeat. At the end your transaction's settings are as they were.
"""

# The isolation comes first here too, see start.sql.
_ISOLATION = "set transaction isolation level read committed, read write;\n"
_BEGIN = (
    _ISOLATION
    + """\
do $$ begin
  perform pg_catalog.set_config(
    'pglimits.settings', pg_catalog.json_object_agg(s.name, pg_catalog.current_setting(s.name))::text, true)
  from pg_catalog.unnest('{role,search_path,lock_timeout,statement_timeout,client_min_messages}'::text[]) s(name);
end $$;
do $$ begin
  if coalesce(pg_catalog.current_setting('pglimits.settings', true), '') = '' then
    raise exception using errcode = 'no_active_sql_transaction',
      message = 'the statements that install pglimits have to run in one transaction: nothing was changed';
  end if;
end $$;
"""
)

# Tells sql/start.sql that what belongs to the extension may be changed now.
_AS_EXTENSION = "set local pglimits.as_extension = on;\n"

# A restore into a newer version has brought the number of the older one.
_SCHEMA_VERSION = """\
do $$ begin
  if pg_catalog.to_regclass('pglimits.meta') is not null then
    update pglimits.meta set schema_version = default;
  end if;
end $$;
"""

_WITHOUT_ROLES = "set local pglimits.without_roles = on;\n"

_END = """\
do $$ begin
  perform pg_catalog.set_config(s.key, s.value, true)
  from pg_catalog.json_each_text(pg_catalog.current_setting('pglimits.settings')::json) s;
  perform pg_catalog.set_config('pglimits.as_extension', '', true);
end $$;
"""

# As strings, so that an older server, which stumbles over what it cannot read, gets as far as the check of its version.
_FUNCTIONS = """\
do $pglimits_file$ begin execute $pglimits_sql$
{sql}$pglimits_sql$; end $pglimits_file$;
"""

_MIGRATE = """\
do $pglimits_file$
declare
  installed integer := 0;
begin
  if pg_catalog.to_regclass('pglimits.meta') is not null then
    select m.schema_version into installed from pglimits.meta m;
  end if;
  if installed > {newest} then
    raise exception using errcode = 'PL008',
      message = 'the database has a newer schema of pglimits than {version}: pip install --upgrade pglimits';
  elsif installed < {number} then
    execute $pglimits_sql$
{sql}$pglimits_sql$;
    insert into pglimits.meta (schema_version) values ({number})
    on conflict (only_row) do update set schema_version = excluded.schema_version;
  end if;
end $pglimits_file$;
"""


@dataclass(frozen=True, slots=True)
class Installed:
    """What an installation did.

    ``version_before`` is None for a fresh one. ``missing_roles``: those that could not be created and that were to be
    done without. ``extension``: pglimits is an extension there.
    """

    version_before: str | None
    version_after: str
    missing_roles: tuple[str, ...] = ()
    extension: bool = False


def _folder() -> Traversable:
    return resources.files("pglimits_sql")


def _read(path: str) -> str:
    return _folder().joinpath(*path.split("/")).read_text(encoding="utf-8")


def script(*, without_roles: bool = False) -> str:
    """The whole installation as one script for psql, which needs no other file."""
    whole = _INCLUDE.sub(lambda include: _read(include[1]).rstrip("\n"), _read("install.sql"))
    return whole.replace("\nbegin;\n", f"\nbegin;\n{_WITHOUT_ROLES}", 1) if without_roles else whole


def plain(*, without_roles: bool = False) -> str:
    """The whole installation as plain SQL statements, for a transaction that is open."""
    return _HEAD + "\n".join(_pieces(without_roles))


def plain_uninstall() -> str:
    """The whole removal as one plain SQL statement."""
    body = re.search(r"^do \$\$.*?^end \$\$;", _read("uninstall.sql"), re.MULTILINE | re.DOTALL)
    assert body is not None
    return body[0]


def _pieces(without_roles: bool, *, extension: bool = False) -> Iterator[str]:
    """The statements, some at a time. ``extension``: as the script of an extension runs them."""
    if extension:
        yield _AS_EXTENSION
    yield _BEGIN + (_WITHOUT_ROLES if without_roles else "")
    paths = _INCLUDE.findall(_read("install.sql"))
    newest = max(int(migration[1]) for path in paths if (migration := _MIGRATION.match(path)))
    for path in paths:
        sql = _read(path)
        if migration := _MIGRATION.match(path):
            yield _MIGRATE.format(sql=sql, number=int(migration[1]), newest=newest, version=__version__)
        else:
            yield _FUNCTIONS.format(sql=sql) if path.startswith("functions/") else sql
        if extension and path == "lock.sql":
            yield _SCHEMA_VERSION
    yield _END


def _privileges(without_roles: bool) -> Iterator[str]:
    """The statements that give an extension its roles and privileges anew."""
    yield _AS_EXTENSION + _BEGIN + (_WITHOUT_ROLES if without_roles else "")
    yield from map(_read, ("start.sql", "grants.sql"))
    yield _END


def install(connection: psycopg.Connection[Any] | str, *, without_roles: bool = False) -> Installed:
    """Install pglimits in a database, or bring what is there up to this version, in one transaction.

    Safe to repeat, and safe when many processes do it at once. Where pglimits is an extension, that is updated.

    Args:
        connection: a psycopg connection, or a PostgreSQL connection string. A transaction that is open on the
            connection is joined: the caller commits it, and its settings are as before. Else it is one of its own.
        without_roles: go on where the roles pglimits_user, pglimits_reader and pglimits_admin do not exist and may not
            be created. Then only the owner may use pglimits, and roles that are granted its functions.

    Returns:
        What was there before, what is there now, and which roles are missing.

    Raises:
        PermissionDenied: the role may not create the schema or the roles; its message has the lines to run first.
        VersionMismatch: the database has a newer pglimits than this one.
        InvalidArgument: the connection is neither, or its transaction is not a read committed one.
        LimiterUnavailable: the database could not be reached.
        PglimitsError: pglimits is an extension there, and the server has no files of this version.
    """
    if isinstance(connection, psycopg.Connection):
        return _install(connection, without_roles)
    if not isinstance(connection, str) or not connection.strip():
        raise InvalidArgument(
            "connection must be a psycopg.Connection or a PostgreSQL connection string, not "
            + ("an empty one" if isinstance(connection, str) else type(connection).__name__)
        )
    with connect(resolve(connection).conninfo) as opened:
        return _install(opened, without_roles)


def _install(connection: psycopg.Connection[Any], without_roles: bool) -> Installed:
    # Whatever cursors the caller's connection makes.
    cursor = psycopg.Cursor(connection, row_factory=tuple_row)
    try:
        if connection.info.transaction_status == TransactionStatus.INTRANS:
            ((isolation,),) = cursor.execute("show transaction_isolation", prepare=False).fetchall()
            if isolation != "read committed":
                raise InvalidArgument(
                    f"pglimits is installed in a read committed transaction, not in a {isolation} one"
                )
        with connection.transaction():
            cursor.execute(_ISOLATION.encode(), prepare=False)
            extension = extension_version(connection)
            if extension is None:
                pieces = _pieces(without_roles)
            elif extension == __version__:
                pieces = _privileges(without_roles)
            else:
                pieces = iter(())
                _update_extension(connection, extension, without_roles)
            for piece in pieces:
                cursor.execute(piece.encode(), prepare=False)
            cursor.execute(
                "select nullif(current_setting('pglimits.version_before', true), ''), pglimits.version(),"
                " array(select w.name from unnest(%s::text[]) with ordinality w(name, nth)"
                " where not exists (select from pg_roles r where r.rolname = w.name) order by w.nth)",
                [list(ROLES)],
                prepare=False,
            )
            ((before, after, missing),) = cursor.fetchall()
    except psycopg.errors.InsufficientPrivilege as error:
        raise PermissionDenied(
            "\n".join(filter(None, (error.diag.message_primary, error.diag.message_hint)))
        ) from error
    except psycopg.errors.FeatureNotSupported as error:  # of an older server
        raise PglimitsError(error.diag.message_primary) from error
    except psycopg.Error as error:
        raise translate(error) from error
    return Installed(extension or before, after, tuple(missing), extension is not None)


def extension_version(connection: psycopg.Connection[Any]) -> str | None:
    """The version of the extension pglimits in the database, or None where pglimits is no extension there."""
    cursor = psycopg.Cursor(connection, row_factory=tuple_row)
    found = cursor.execute("select extversion from pg_catalog.pg_extension where extname = 'pglimits'", prepare=False)
    row = found.fetchone()
    return None if row is None else str(row[0])


def _update_extension(connection: psycopg.Connection[Any], there: str, without_roles: bool) -> None:
    """Bring the extension to this version."""
    if there != "unpackaged" and numbers(there) > numbers(__version__):
        raise VersionMismatch(
            f"the database has the extension pglimits {there}, which is newer than this one, {__version__}:"
            " pip install --upgrade pglimits"
        )
    cursor = psycopg.Cursor(connection, row_factory=tuple_row)
    if without_roles:
        cursor.execute(_WITHOUT_ROLES.encode(), prepare=False)
    try:
        with connection.transaction():
            cursor.execute(f"alter extension pglimits update to '{__version__}'".encode(), prepare=False)
    except psycopg.errors.InternalError_:  # updated concurrently
        if extension_version(connection) != __version__:
            raise
    except (
        psycopg.errors.FeatureNotSupported,
        psycopg.errors.InvalidParameterValue,
        psycopg.errors.UndefinedFile,
    ) as error:
        raise PglimitsError(
            f"pglimits {there} is an extension in this database, and the server has no files that update it to"
            f" {__version__}: nothing was changed. 'pglimits sql --extension FOLDER' writes them (for pg_tle: 'pglimits"
            " sql --tle'). Put them into the server's folder of extensions, and run: alter extension pglimits update;"
        ) from error


def granted(*lists: str) -> list[str]:
    """Names by the lists in sql/grants.sql: functions for ``users``, ``administrators`` and ``readers``; views
    (``visible``)."""
    there = {name: names.split(",") for name, names in _LIST.findall(_read("grants.sql"))}
    return sorted({name for each in lists for name in there[each]})


def functions_and_views() -> set[str]:
    """The names of all that an installation has beside its tables."""
    return set(_REPEATABLE.findall(script()))


def version(connection: psycopg.Connection[tuple[object, ...]]) -> str | None:
    """The version of pglimits in the database, or None."""
    exists = connection.execute("select to_regprocedure('pglimits.version()') is not null").fetchone()
    if exists is None or not exists[0]:
        return None
    row = connection.execute("select pglimits.version()").fetchone()
    return None if row is None else str(row[0])


def install_if_needed(conninfo: str) -> None:
    """Bring a database up to this version, if it is not there already. For the embedded server.

    A newer one is left alone: others of the user's programs brought it there, and whether it serves this version too is
    found out by its first statement.
    """
    with connect(conninfo) as connection:
        there = version(connection)
    if there is None or numbers(there) < numbers(__version__):
        install(conninfo)


def uninstall(conninfo: str) -> list[str]:
    """Remove pglimits from a database, with every limit and lease. Returns what the server remarked."""
    remarks: list[str] = []
    with connect(conninfo) as connection:
        connection.add_notice_handler(lambda notice: remarks.append(notice.message_primary or ""))
        try:
            connection.execute(plain_uninstall().encode())
        except psycopg.Error as error:
            raise translate(error) from error
    return [remark for remark in remarks if remark.startswith("the role")]
