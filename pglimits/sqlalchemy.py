"""Limits in the database of an SQLAlchemy engine, and operations for Alembic (extra ``sqlalchemy``).

``limiter_for(engine)`` makes a limiter of an engine's URL, whatever its driver. Importing this module in a migration
gives Alembic ``op.install_pglimits()`` and ``op.uninstall_pglimits()``, where Alembic is installed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, overload

import psycopg
from psycopg.conninfo import make_conninfo
from sqlalchemy.engine import URL, Connection, Engine, make_url

from . import _install
from ._dsn import keywords
from ._limiter import AsyncLimiter, Limiter
from .errors import InvalidArgument

if TYPE_CHECKING:  # needs greenlet, which not everybody has who needs no async engine
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["dsn", "install", "limiter_for", "uninstall"]

_OTHER_NAMES = {"ssl": "sslmode", "timeout": "connect_timeout"}
"""What drivers call options of libpq."""
_SSL = {"true": "require", "1": "require", "false": "disable", "0": "disable"}


@overload
def limiter_for(engine: Engine, **options: Any) -> Limiter: ...
@overload
def limiter_for(engine: AsyncEngine, **options: Any) -> AsyncLimiter: ...
def limiter_for(engine: Engine | AsyncEngine, **options: Any) -> Limiter | AsyncLimiter:
    """A limiter for the database of an engine: for threads, or of an async engine for tasks.

    It opens up to three connections of its own, by the engine's URL. What was given to the engine beside its URL
    (``connect_args``, ``creator``, events) is not known here: give ``Limiter(connect=…)`` a function instead.

    Args:
        options: of the limiter, such as ``durable``, ``strict``, ``on_unavailable``.

    Raises:
        InvalidArgument: the engine is not for PostgreSQL.
    """
    if isinstance(engine, Engine):
        return Limiter(dsn(engine.url), **options)
    return AsyncLimiter(dsn(engine.url), **options)


def dsn(url: URL | str) -> str:
    """The connection string of libpq for an SQLAlchemy URL, with its password.

    Hosts, ports and sockets are taken from wherever the drivers psycopg, psycopg2, asyncpg and pg8000 take them.
    Options that libpq has as well are kept under its names; those of the driver alone are left out.

    Raises:
        InvalidArgument: the URL is not for PostgreSQL.
    """
    url = make_url(url)
    if url.get_backend_name() != "postgresql":
        raise InvalidArgument(f"the engine is for {url.get_backend_name()}, not for PostgreSQL")
    found: dict[str, Any] = {}
    known = keywords()
    for name, given in url.query.items():
        values = [given] if isinstance(given, str) else list(given)
        keyword = _OTHER_NAMES.get(name, name)
        if keyword == "host":
            _hosts(found, values, url.port)
        elif name == "unix_sock":  # of pg8000
            folder, _, port = values[0].rpartition("/.s.PGSQL.")
            found |= {"host": folder, "port": port} if folder else {"host": values[0]}
        elif keyword in known:
            found[keyword] = _SSL.get(values[-1].lower(), values[-1]) if keyword == "sslmode" else ",".join(values)
    if url.host:
        found["host"] = url.host
    if url.port is not None:
        found.setdefault("port", url.port)
    if "connect_timeout" in found:
        with contextlib.suppress(ValueError):
            found["connect_timeout"] = max(round(float(found["connect_timeout"])), 1)
    for name, value in (("user", url.username), ("password", url.password), ("dbname", url.database)):
        if value is not None:
            found[name] = value
    try:
        return make_conninfo("", **found)
    except psycopg.ProgrammingError:
        raise InvalidArgument("libpq cannot read what the engine's URL says") from None


def _hosts(found: dict[str, Any], values: list[str], port: int | None) -> None:
    """Of ``?host=a:5432&host=b:5433``, or ``?host=a,b``, or ``?host=/run/postgresql``."""
    hosts, ports = [], []
    for each in (part for value in values for part in value.split(",")):
        name, colon, number = each.rpartition(":")
        is_port = bool(colon) and number.isdigit() and not each.startswith("/")
        hosts.append(name if is_port else each)
        ports.append(number if is_port else "" if port is None else str(port))
    found["host"] = ",".join(hosts)
    if any(ports):
        found["port"] = ",".join(ports)


def install(connection: Connection, *, without_roles: bool = False) -> None:
    """Install the SQL, or bring it up to this version, in the transaction of a connection, which the caller commits.

    The transaction has to be ``read committed``, as it is unless told otherwise. ``without_roles``: as of
    ``pglimits.install``.
    """
    _run(connection, _install.plain(without_roles=without_roles))


def uninstall(connection: Connection) -> None:
    """Remove the SQL with every limit and lease, in the transaction of a connection."""
    _run(connection, _install.plain_uninstall())


def _run(connection: Connection, script: str) -> None:
    """A script of many statements, which some drivers take only by a way of their own."""
    if connection.dialect.driver != "asyncpg":
        connection.exec_driver_sql(script, execution_options={"no_parameters": True})
        return
    connection.exec_driver_sql("select 1")  # the driver begins its transaction with the first statement
    driver: Any = connection.connection.dbapi_connection
    driver.run_async(lambda asyncpg: asyncpg.execute(script))


def _register() -> None:
    from alembic.operations import MigrateOperation, Operations

    class InstallPglimits(MigrateOperation):
        """Installs the SQL of pglimits, or brings it up to this version."""

        def __init__(self, without_roles: bool = False) -> None:
            self.without_roles = without_roles

        @classmethod
        def install_pglimits(cls, operations: Operations, *, without_roles: bool = False) -> None:
            """Install pglimits in the migration's transaction, or bring it up to the version of the package.

            without_roles: go on where the roles do not exist and may not be created.
            """
            operations.invoke(cls(without_roles))

        def reverse(self) -> MigrateOperation:
            return UninstallPglimits()

    class UninstallPglimits(MigrateOperation):
        """Removes pglimits."""

        @classmethod
        def uninstall_pglimits(cls, operations: Operations) -> None:
            """Remove pglimits, with every limit and lease, in the migration's transaction."""
            operations.invoke(cls())

    def run(operations: Operations, script: str) -> None:
        context = operations.migration_context
        if context.as_sql:
            context.impl.static_output(script)
        else:
            _run(operations.get_bind(), script)

    def do_install(operations: Operations, operation: InstallPglimits) -> None:
        run(operations, _install.plain(without_roles=operation.without_roles))

    def do_uninstall(operations: Operations, operation: UninstallPglimits) -> None:
        run(operations, _install.plain_uninstall())

    Operations.register_operation("install_pglimits")(InstallPglimits)
    Operations.register_operation("uninstall_pglimits")(UninstallPglimits)
    Operations.implementation_for(InstallPglimits)(do_install)
    Operations.implementation_for(UninstallPglimits)(do_uninstall)


with contextlib.suppress(ImportError):
    _register()
