"""cron enable|disable: have pg_cron call the sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _client, _output, _rights
from ._commands import Group, command
from ._options import Dsn, Format, Output

if TYPE_CHECKING:
    import psycopg

    from pglimits._dsn import Target

    Connection = psycopg.Connection[tuple[Any, ...]]

app = typer.Typer(
    name="cron",
    help="Have pg_cron call the sweep.",
    no_args_is_help=True,
    add_completion=False,
    cls=Group,
)


@command(app)
def enable(
    every: Annotated[
        float,
        typer.Option(
            "--every",
            metavar="S",
            min=1,
            max=86400,
            show_default=False,
            help="Seconds; whole minutes before pg_cron 1.5. Default: 60.",
        ),
    ] = 60.0,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Schedule the sweep in pg_cron.

    Also where pg_cron lives in another database of the server. Safe to repeat: run twice, it is scheduled once.

    Example: pglimits cron enable --every 10
    """
    from psycopg import Error

    target = _client.target(dsn)
    with _rights.explained(target.conninfo, _rights.ADMIN), _client.connect(target.conninfo) as connection:
        try:
            home = cron_database(connection)
            if home is None:
                schedule = _one(connection, "select pglimits.cron_enable(%s::float8)", every)
                home = str(_one(connection, "select current_database()"))
            else:
                schedule = _enable_from_elsewhere(connection, target, home, every)
        except Error as error:
            raise _client.explained(error) from error
    _output.show(
        output,
        {"scheduled": True, "schedule": schedule, "cron_database": home},
        f"pg_cron in database {home!r} sweeps: {schedule}",
    )


@command(app)
def disable(dsn: Dsn = None, output: Output = Format.table) -> None:
    """Take the sweep off pg_cron's schedule. Safe to repeat.

    Example: pglimits cron disable
    """
    from psycopg import Error

    target = _client.target(dsn)
    with _rights.explained(target.conninfo, _rights.ADMIN), _client.connect(target.conninfo) as connection:
        try:
            home = cron_database(connection)
            if home is None:
                disabled = bool(_one(connection, "select pglimits.cron_disable()"))
            else:
                disabled = disable_from_elsewhere(connection, target, home)
        except Error as error:
            raise _client.explained(error) from error
    _output.show(
        output,
        {"disabled": disabled},
        "pg_cron sweeps no longer." if disabled else "pg_cron was not scheduled to sweep.",
    )


def cron_database(connection: Connection) -> str | None:
    """The other database of this server that pg_cron lives in; None if it lives here, or nowhere."""
    found: str | None = _one(
        connection,
        """
        select nullif(current_setting('cron.database_name', true), current_database()::text)
        where not exists (select from pg_extension where extname = 'pg_cron')
        """,
    )
    return found or None


def _enable_from_elsewhere(connection: Connection, target: Target, home: str, every: float) -> str:
    from pglimits.errors import CronUnavailable

    with _client.connect(target.conninfo, dbname=home) as there:
        version = _one(there, "select extversion from pg_extension where extname = 'pg_cron'")
        if version is None:
            raise CronUnavailable(
                f"pg_cron is not installed in database {home!r} either, which cron.database_name points to: "
                f"run there: create extension pg_cron"
            )
        job, database, schedule = _row(
            connection,
            "select pglimits._cron_job(), current_database()::text, pglimits._cron_schedule(%s::float8, %s)",
            every,
            version,
        )
        if not _one(there, "select exists (select from pg_proc where proname = 'schedule_in_database')"):
            raise CronUnavailable(
                f"pg_cron {version} in database {home!r} cannot call another database: upgrade it to 1.4 or later"
            )
        _one(there, "select cron.schedule_in_database(%s, %s, 'select pglimits.sweep()', %s)", job, schedule, database)
    return str(schedule)


def disable_from_elsewhere(connection: Connection, target: Target, home: str) -> bool:
    """Unschedule the sweep of a database from pg_cron in another."""
    job = _one(connection, "select pglimits._cron_job()")
    with _client.connect(target.conninfo, dbname=home) as there:
        if not _one(there, "select exists (select from pg_extension where extname = 'pg_cron')"):
            return False
        found = there.execute("select jobid from cron.job where jobname = %s", [job]).fetchall()
        for (job_id,) in found:
            _one(there, "select cron.unschedule(%s::bigint)", job_id)
    return bool(found)


def _row(connection: Connection, sql: str, *params: object) -> tuple[Any, ...]:
    row = connection.execute(sql.encode(), params or None).fetchone()
    assert row is not None
    return row


def _one(connection: Connection, sql: str, *params: object) -> Any:
    row = connection.execute(sql.encode(), params or None).fetchone()
    return None if row is None else row[0]
