"""Limits in the database of an SQLAlchemy engine; Alembic installs and removes them."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
import sqlalchemy
from alembic import command
from alembic.config import Config
from documents import blocks
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.ext.asyncio import create_async_engine

from pglimits import InvalidArgument
from pglimits.sqlalchemy import dsn as dsn_of
from pglimits.sqlalchemy import install, limiter_for, uninstall

DRIVERS = ("psycopg", "psycopg2", "asyncpg", "pg8000")


def url(driver: str, dsn: str) -> str:
    """For a server that listens on a Unix socket alone."""
    to = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    folder, port = quote(to["host"], safe=""), to["port"]
    place = {
        "asyncpg": f"?host={folder}&port={port}",
        "pg8000": f"?unix_sock={folder}%2F.s.PGSQL.{port}",
    }.get(driver, f"?host={folder}&port={port}&application_name=of_engine")
    return f"postgresql+{driver}://{to['user']}:secret@/{to['dbname']}{place}"


def test_an_engine_for_threads_needs_no_greenlet() -> None:
    program = """
import sys
sys.modules["greenlet"] = None
import sqlalchemy
from pglimits.sqlalchemy import limiter_for
print(type(limiter_for(sqlalchemy.create_engine("postgresql+psycopg://u@h/d"))).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "Limiter\n", done.stderr


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        (
            "postgresql://u:p%40%2F%20'x@h:1/d",
            {"user": "u", "password": "p@/ 'x", "host": "h", "port": "1", "dbname": "d"},
        ),
        ("postgresql+psycopg2://u@/d?host=a:1&host=b:2", {"user": "u", "dbname": "d", "host": "a,b", "port": "1,2"}),
        ("postgresql+psycopg2://u@/d?host=a,b&port=1,2", {"user": "u", "dbname": "d", "host": "a,b", "port": "1,2"}),
        ("postgresql+psycopg://u@/d?host=/run/pg", {"user": "u", "dbname": "d", "host": "/run/pg"}),
        ("postgresql+psycopg://u@[::1]:5/d", {"user": "u", "dbname": "d", "host": "::1", "port": "5"}),
        (
            "postgresql+asyncpg://u@h/d?ssl=verify-full&timeout=4.6&command_timeout=3&prepared_statement_cache_size=0",
            {"user": "u", "dbname": "d", "host": "h", "sslmode": "verify-full", "connect_timeout": "5"},
        ),
        ("postgresql+asyncpg://u@h/d?ssl=true", {"user": "u", "dbname": "d", "host": "h", "sslmode": "require"}),
        ("postgresql://?service=mine", {"service": "mine"}),
        (
            "postgresql://h/d?options=-c%20statement_timeout%3D5&target_session_attrs=read-write",
            {"host": "h", "dbname": "d", "options": "-c statement_timeout=5", "target_session_attrs": "read-write"},
        ),
    ],
)
def test_a_url_is_told_to_libpq(url: str, wanted: dict[str, str]) -> None:
    assert conninfo_to_dict(dsn_of(url)) == wanted


def test_another_database_is_an_error() -> None:
    with pytest.raises(InvalidArgument, match="sqlite"):
        limiter_for(sqlalchemy.create_engine("sqlite://"))


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_engine_has_a_limiter(driver: str, server_dsn: str) -> None:
    if driver == "asyncpg":

        async def work() -> None:
            engine = create_async_engine(url(driver, server_dsn))
            async with engine.connect() as connection, limiter_for(engine) as limiter:
                await connection.exec_driver_sql("select pglimits.create_limit('api', 1)")
                await connection.commit()
                async with limiter.concurrency("api", strict=True):
                    assert (await limiter.get("api")).held == 1
            await engine.dispose()

        asyncio.run(work())
        return
    engine = sqlalchemy.create_engine(url(driver, server_dsn))
    with engine.begin() as connection:
        connection.exec_driver_sql("select pglimits.create_limit('api', 1)")
    with limiter_for(engine, durable=False) as limiter, limiter.concurrency("api", strict=True):
        assert limiter.get("api").held == 1
    engine.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_installation_belongs_to_the_transaction(driver: str, bare_dsn: str, server_dsn: str) -> None:
    dsn = server_dsn.replace(str(conninfo_to_dict(server_dsn)["dbname"]), str(conninfo_to_dict(bare_dsn)["dbname"]))

    def is_there() -> bool:
        with psycopg.connect(dsn) as connection:
            row = connection.execute("select to_regprocedure('pglimits.version()') is not null").fetchone()
        return row == (True,)

    def work(connection: sqlalchemy.Connection) -> None:
        for undo in (True, False):
            with contextlib.suppress(ZeroDivisionError), connection.begin():
                install(connection)
                assert not is_there()
                if undo:
                    raise ZeroDivisionError
            assert is_there() is not undo
        with connection.begin():
            uninstall(connection)
            # What it leaves behind is still the caller's transaction.
            assert connection.exec_driver_sql("select 1").scalar() == 1
        assert not is_there()

    if driver == "asyncpg":

        async def in_task() -> None:
            engine = create_async_engine(url(driver, dsn))
            async with engine.connect() as connection:
                await connection.run_sync(work)
            await engine.dispose()

        asyncio.run(in_task())
        return
    engine = sqlalchemy.create_engine(url(driver, dsn))
    with engine.connect() as connection:
        work(connection)
    engine.dispose()


ENV = """
import asyncio
from alembic import context
from sqlalchemy import engine_from_config, pool
from sqlalchemy.ext.asyncio import create_async_engine

config = context.config
url = config.get_main_option("sqlalchemy.url")

def run(connection):
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()

async def run_async():
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        await connection.run_sync(run)
    await engine.dispose()

if context.is_offline_mode():
    context.configure(url=url, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
elif "asyncpg" in url:
    asyncio.run(run_async())
else:
    engine = engine_from_config(config.get_section("alembic"), prefix="sqlalchemy.", poolclass=pool.NullPool)
    with engine.connect() as connection:
        run(connection)
"""
VERSION = """
import pglimits.sqlalchemy
from alembic import op

revision, down_revision = "0001", None

def upgrade():
    op.execute("create table before_it (id int)")
    op.install_pglimits()
    op.execute("select pglimits.create_limit('api', 3)")

def downgrade():
    op.uninstall_pglimits()
    op.drop_table("before_it")
"""
FAILS = """
from alembic import op

revision, down_revision = "0002", "0001"

def upgrade():
    op.uninstall_pglimits()
    op.execute("select 1 / 0")
"""


@pytest.fixture
def environment(tmp_path: Path) -> Any:
    """environment(url): Alembic's configuration of a folder with two migrations, the second of which fails."""
    (tmp_path / "versions").mkdir()
    for name, text in (("env.py", ENV), ("versions/first.py", VERSION), ("versions/second.py", FAILS)):
        (tmp_path / name).write_text(textwrap.dedent(text))

    def configure(of: str, output: Any = None) -> Config:
        config = Config(output_buffer=output) if output else Config()
        config.set_main_option("script_location", str(tmp_path))
        config.set_main_option("sqlalchemy.url", of.replace("%", "%%"))
        return config

    return configure


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_migration_installs_and_removes(driver: str, bare_dsn: str, server_dsn: str, environment: Any) -> None:
    dsn = server_dsn.replace(str(conninfo_to_dict(server_dsn)["dbname"]), str(conninfo_to_dict(bare_dsn)["dbname"]))
    config = environment(url(driver, dsn))
    command.upgrade(config, "0001")
    with psycopg.connect(dsn, autocommit=True) as connection:
        limits = 'select name, "limit" from pglimits.limits'
        assert connection.execute(limits).fetchall() == [("api", 3)]
        with pytest.raises(sqlalchemy.exc.DBAPIError):
            command.upgrade(config, "0002")
        assert connection.execute(limits).fetchall() == [("api", 3)]
        command.downgrade(config, "base")
        with pytest.raises(psycopg.errors.UndefinedTable):
            connection.execute(limits)


def test_the_migration_of_the_document_installs_and_removes(bare_dsn: str, environment: Any, tmp_path: Path) -> None:
    (migration,) = [block.code for block in blocks("docs/frameworks.md", "py") if "alembic" in block.code]
    (tmp_path / "versions" / "first.py").write_text(migration)
    config = environment(url("psycopg", bare_dsn))
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        is_there = "select to_regclass('pglimits.limits') is not null"
        for go, there in (
            (lambda: command.upgrade(config, "0001"), True),
            (lambda: command.downgrade(config, "base"), False),
        ):
            go()
            assert connection.execute(is_there).fetchone() == (there,)


def test_a_script_of_a_migration_installs(bare_dsn: str, environment: Any, tmp_path: Path) -> None:
    with (tmp_path / "script.sql").open("w+") as written:
        command.upgrade(environment(url("psycopg", bare_dsn), written), "0001", sql=True)
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        connection.execute((tmp_path / "script.sql").read_bytes())
        assert connection.execute("select name from pglimits.limits").fetchall() == [("api",)]
