"""install, upgrade, uninstall, sql, sweep, embedded; and pglimits.install, the same from Python."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

import pglimits as library
from pglimits import InvalidArgument, PermissionDenied, PglimitsError, VersionMismatch, __version__, _install
from pglimits._embedded import Binaries, Server, throwaway

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "sql"))

from installtest import assert_same, catalog, other_dsn, psql

__all__ = ["other_dsn", "psql"]

Connection = psycopg.Connection[Any]
Cli = Callable[..., Any]
ROLES = ("pglimits_user", "pglimits_reader", "pglimits_admin")
TOKEN = re.compile(r"--[^\n]*|'(?:[^']|\'\')*'|(\$\w*\$).*?\1|;|.", re.DOTALL)


def installed(dsn: str) -> bool:
    with psycopg.connect(dsn) as connection:
        return connection.execute("select to_regnamespace('pglimits')").fetchone() != (None,)


def statements(sql: str) -> list[str]:
    """Each of them, as a tool that reads a file would split it."""
    found = [""]
    for token in TOKEN.finditer(sql):
        found[-1] += token[0]
        if token[0] == ";":
            found.append("")
    return [statement for statement in found if statement.strip()]


def run_in_one_go(connection: Connection, sql: str) -> None:
    connection.execute(sql.encode())


def run_one_by_one(connection: Connection, sql: str) -> None:
    with connection.transaction():
        for statement in statements(sql):
            connection.execute(statement.encode())


def test_install_installs_and_may_be_repeated(pglimits: Cli, bare_dsn: str) -> None:
    result = pglimits("install", "--dsn", bare_dsn)
    assert result.code == 0 and result.out.startswith(f"Installed pglimits {__version__} in database ")
    assert "(from --dsn)" in result.out
    assert pglimits("create", "x", "-l", "1", "--dsn", bare_dsn).code == 0
    again = pglimits("install", "--dsn", bare_dsn)
    assert again.code == 0 and again.out.startswith(f"pglimits {__version__} is up to date in database ")
    assert [row["name"] for row in pglimits("ls", "-o", "json", "--dsn", bare_dsn).json] == ["x"]


def test_upgrade_says_what_changed(pglimits: Cli, conn: Connection) -> None:
    conn.execute("create or replace function pglimits.version() returns text language sql as $$select '0.0.1'$$")
    result = pglimits("upgrade")
    assert result.code == 0
    assert result.out.startswith(f"Upgraded pglimits from 0.0.1 to {__version__} in database ")
    assert pglimits("upgrade", "-o", "json").json == {
        "version_before": __version__, "version_after": __version__, "changed": False, "missing_roles": [],
    }  # fmt: skip


def test_a_newer_schema_is_left_alone(pglimits: Cli, conn: Connection, dsn: str) -> None:
    conn.execute("update pglimits.meta set schema_version = 1000")
    before = catalog(dsn)
    result = pglimits("install")
    assert (result.code, result.out) == (1, "") and result.err.startswith("Error: ") and "newer" in result.err
    with pytest.raises(VersionMismatch, match="newer"):
        library.install(conn)
    assert_same(catalog(dsn), before)


# Roles.


@pytest.fixture
def cluster(server: Any) -> Iterator[Server]:
    """A server of its own, as roles belong to all of it, with a database whose owner may not create roles."""
    with throwaway(binaries=Binaries(server.bin, server.version)) as running:
        with psycopg.connect(running.dsn, autocommit=True) as connection:
            connection.execute("create role owner login")
            connection.execute("create role app login")
            connection.execute("create database mine owner owner")
        yield running


@pytest.fixture
def owned(cluster: Server) -> str:
    return make_conninfo(cluster.dsn, user="owner", dbname="mine")


def test_an_owner_that_may_not_create_roles_is_given_the_lines_to_be_run_first(
    pglimits: Cli, cluster: Server, owned: str
) -> None:
    result = pglimits("install", "--dsn", owned)
    assert (result.code, result.out) == (1, "") and not installed(owned)
    lines = re.findall(r"^  (create role \w+;)$", result.err, re.MULTILINE)
    assert lines == [f"create role {role};" for role in ROLES]
    with pytest.raises(PermissionDenied, match=lines[0]):
        library.install(owned)
    with psycopg.connect(cluster.dsn, autocommit=True) as administrator:
        for line in lines:
            administrator.execute(line.encode())
    assert pglimits("install", "--dsn", owned, "-o", "json").json["missing_roles"] == []


def test_without_roles_an_owner_can_grant_by_hand_what_is_for_users_and_no_more(pglimits: Cli, owned: str) -> None:
    result = pglimits("install", "--without-roles", "-o", "json", "--dsn", owned)
    assert (result.code, result.json["missing_roles"]) == (0, list(ROLES))
    by_hand = re.findall(r"^  (grant .*;)$", result.err, re.MULTILINE)
    with psycopg.connect(owned, autocommit=True) as owner:
        owner.execute("select pglimits.create_limit('database', 2)")
        for line in by_hand:
            owner.execute(line.replace("YOUR_ROLE", "app").encode())
    as_app = ("--dsn", make_conninfo(owned, user="app"))
    assert pglimits("acquire", "database", *as_app).code == 0
    for refused in (("delete", "database"), ("update", "database", "-l", "5"), ("reset", "database"), ("sweep",)):
        assert pglimits(*refused, *as_app).code == 1
    checks = {each["check"]: each for each in pglimits("doctor", "-o", "json", *as_app).json["checks"]}
    assert (checks["rights"]["status"], checks["private"]["status"]) == ("ok", "ok")
    assert checks["roles"]["status"] == "warn"
    assert checks["roles"]["fix"].splitlines()[0] == " ".join(f"create role {role};" for role in ROLES)


@pytest.mark.parametrize("plain", [("--plain",), ()])
def test_the_scripts_go_on_without_roles_only_if_told_so(
    pglimits: Cli, owned: str, psql: Any, tmp_path: Path, plain: tuple[str, ...]
) -> None:
    for words, there in (((), False), (("--without-roles",), True)):
        script = tmp_path / "install.sql"
        sql = pglimits("sql", *plain, *words).out
        script.write_text(f"\\set ON_ERROR_STOP on\nbegin;\n{sql}\ncommit;\n" if plain else sql)
        done = psql(owned, script)
        assert (done.returncode == 0) is there, done.stderr
        assert ("create role pglimits_user;" in done.stderr) is not there
        assert installed(owned) is there


# Plain statements, and the connection of somebody else.


@pytest.mark.parametrize("run", [run_in_one_go, run_one_by_one])
def test_plain_statements_install_the_same_new_and_again(
    pglimits: Cli, bare_dsn: str, other_dsn: str, run: Callable[[Connection, str], None]
) -> None:
    library.install(other_dsn)
    script = pglimits("sql", "--plain")
    assert script.code == 0
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        for _ in ("new", "again"):
            run(connection, script.out)
            assert_same(catalog(bare_dsn), catalog(other_dsn))
        connection.execute("drop function pglimits._bury; create function pglimits.gone() returns int return 1")
        run(connection, script.out)
        assert_same(catalog(bare_dsn), catalog(other_dsn))


def test_a_transaction_may_install_several_times_and_goes_on_with_its_own_settings(
    bare_dsn: str, other_dsn: str
) -> None:
    """As where a tool runs all migrations of an app in one, the first and its upgrades."""
    library.install(other_dsn)
    shown = "select current_setting(s) from unnest(%s::text[]) s"
    names = ["search_path", "lock_timeout", "statement_timeout", "client_min_messages", "role"]
    with psycopg.connect(bare_dsn) as connection:
        connection.execute("create table mine ()")
        connection.execute("set local lock_timeout = '7s'; set statement_timeout = '50s'")
        before = connection.execute(shown, [names]).fetchall()
        for _ in range(2):
            connection.execute(_install.plain().encode())
            assert library.install(connection).version_after == __version__
        assert connection.execute(shown, [names]).fetchall() == before
        connection.execute("select from mine")
    assert_same(catalog(bare_dsn), catalog(other_dsn))


def test_statements_that_are_not_run_in_one_transaction_change_nothing(bare_dsn: str) -> None:
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        with pytest.raises(psycopg.errors.NoActiveSqlTransaction, match="in one transaction"):
            for statement in statements(_install.plain()):
                connection.execute(statement.encode())
        assert not installed(bare_dsn)


def test_no_tool_takes_a_part_of_the_plain_statements_for_something_of_its_own() -> None:
    sql = _install.plain()
    assert not re.search(r"^\s*\\", sql, re.MULTILINE), "psql"
    assert not re.search(r"(?<![:\w\\]):(\w+)(?!:)", sql), "a parameter of SQLAlchemy's text()"
    assert "${" not in sql, "a placeholder of Flyway"
    first_words = {re.sub(r"(--.*\n|\s)+", " ", statement).split()[0] for statement in statements(sql)}
    assert not first_words & {"begin", "start", "commit", "end", "rollback", "savepoint", "copy"}, "its transaction"


def test_sqlalchemy_runs_the_plain_statements(bare_dsn: str, other_dsn: str) -> None:
    """As op.execute of Alembic does."""
    sqlalchemy = pytest.importorskip("sqlalchemy")
    library.install(other_dsn)
    info = psycopg.conninfo.conninfo_to_dict(bare_dsn)
    engine = sqlalchemy.create_engine("postgresql+psycopg://", connect_args=info)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(_install.plain()))
        library.install(connection.connection.driver_connection)
    engine.dispose()
    assert_same(catalog(bare_dsn), catalog(other_dsn))


def test_install_joins_a_transaction_that_is_open(bare_dsn: str) -> None:
    with psycopg.connect(bare_dsn) as connection:
        connection.execute("select 1")
        library.install(connection)
        connection.rollback()
        assert not installed(bare_dsn)
        assert library.install(connection) == library.Installed(None, __version__)
        assert installed(bare_dsn), "one of its own"


@pytest.mark.parametrize(
    "options",
    [
        {"autocommit": True},
        {"row_factory": dict_row, "cursor_factory": psycopg.ClientCursor},
        {"prepare_threshold": 0, "options": "-c default_transaction_isolation=serializable"},
        {"autocommit": True, "options": "-c default_transaction_read_only=on -c search_path=public"},
    ],
)
def test_install_takes_any_connection_of_psycopg(bare_dsn: str, other_dsn: str, options: dict[str, Any]) -> None:
    library.install(other_dsn)
    with psycopg.connect(bare_dsn, **options) as connection:
        assert library.install(connection).version_before is None
    assert_same(catalog(bare_dsn), catalog(other_dsn))


def test_install_says_what_it_cannot_take(bare_dsn: str) -> None:
    for wrong in (None, "", " ", 5, object()):
        with pytest.raises(InvalidArgument, match="connection must be"):
            library.install(wrong)  # type: ignore[arg-type]
    with psycopg.connect(bare_dsn) as connection:
        connection.execute("set transaction isolation level serializable")
        connection.execute("select 1")
        with pytest.raises(InvalidArgument, match="not in a serializable one"):
            library.install(connection)
        connection.execute("select 1")


def test_an_older_server_is_told_so_by_every_way_to_install(
    pglimits: Cli, bare_dsn: str, psql: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = _install._read
    monkeypatch.setattr(_install, "_read", lambda path: read(path).replace("140000", "990000"))
    sentence = "pglimits needs PostgreSQL 14 or later; this server is "
    result = pglimits("install", "--dsn", bare_dsn)
    assert result.code == 1 and result.err.startswith(f"Error: {sentence}") and result.err.count("\n") == 1
    script = tmp_path / "install.sql"
    script.write_text(_install.script())
    assert sentence in psql(bare_dsn, script).stderr
    with psycopg.connect(bare_dsn, autocommit=True) as connection:
        with pytest.raises(PglimitsError, match=sentence):
            library.install(connection)
        for run in (run_in_one_go, run_one_by_one):
            with pytest.raises(psycopg.errors.FeatureNotSupported, match=sentence):
                run(connection, _install.plain())
    assert not installed(bare_dsn)


def test_an_older_server_can_read_all_of_the_plain_statements() -> None:
    """It reads what it is sent in one go before it does anything. Bodies that are no strings came with 14."""
    bare = TOKEN.sub(lambda token: "''" if token[1] else token[0], _install.plain())
    assert not re.search(r"^\s*(return|begin atomic)\b", bare, re.MULTILINE | re.IGNORECASE)
    assert "do ''" in bare


def test_uninstall_removes_all_of_it(pglimits: Cli, dsn: str) -> None:
    result = pglimits("uninstall", "--yes")
    assert result.code == 0 and result.out.startswith("Removed pglimits from database ")
    assert not installed(dsn)
    again = pglimits("uninstall", "--yes", "-o", "json")
    assert (again.code, again.out) == (1, "") and "not installed" in again.err


def test_uninstall_without_a_terminal_needs_yes(pglimits: Cli, dsn: str) -> None:
    refused = pglimits("uninstall", "-o", "json", stdin="y\n")
    assert (refused.code, refused.out) == (2, "") and "--yes" in refused.err
    assert installed(dsn)
    assert pglimits("uninstall", "-o", "json", "--yes").json == {"uninstalled": True}
    assert not installed(dsn)


def test_without_an_installation_every_command_says_what_to_run(pglimits: Cli, bare_dsn: str) -> None:
    for arguments in (("ls",), ("create", "x", "-l", "1"), ("acquire", "x"), ("holders",), ("sweep",)):
        result = pglimits(*arguments, "--dsn", bare_dsn)
        assert (result.code, result.out) == (1, ""), arguments
        assert "run pglimits install" in result.err and result.err.count("\n") == 1


def test_sql_prints_scripts_for_psql(pglimits: Cli, bare_dsn: str, psql: Any, tmp_path: Path) -> None:
    for arguments, there in ((("sql",), True), (("sql", "--uninstall"), False)):
        script = tmp_path / "script.sql"
        script.write_text(pglimits(*arguments).out)
        done = psql(bare_dsn, script)
        assert done.returncode == 0, done.stderr
        assert installed(bare_dsn) is there
    assert pglimits("sql", "--uninstall", "--plain").code == 2


def test_sweep_tidies_up_and_counts(pglimits: Cli, conn: Connection, clock: Any) -> None:
    assert pglimits("sweep").out == "Swept 0 slots of ended leases, 0 waiters, 0 idle keys.\n"
    conn.execute("select pglimits.create_limit('database', 5)")
    conn.execute("select pglimits.acquire('database', slots => 3)")
    clock.advance(301)
    assert pglimits("sweep", "-o", "json").json == {"leases": 3, "waiters": 0, "keys": 0}


def test_sweep_does_not_stop_before_all_is_tidy(pglimits: Cli, conn: Connection, clock: Any) -> None:
    conn.execute("select pglimits.create_limit('database', 5)")
    conn.execute(
        "select count(pglimits.acquire('database', key => 'k' || n)) from generate_series(1, 2500) n",
    )
    clock.advance(301)
    assert pglimits("sweep", "-o", "json").json["leases"] == 2500


def test_sweep_every_so_often_until_a_signal(start: Callable[..., Any], pglimits: Cli) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        sweeping = start("sweep", "--every", "1", "-o", "json")
        for _ in range(2):
            assert set(json.loads(sweeping.stdout.readline())) == {"at", "leases", "waiters", "keys"}
        sweeping.send_signal(number)
        _, err = sweeping.communicate(timeout=100)
        assert (sweeping.returncode, err) == (0, "")
    assert pglimits("sweep", "--every", "0").code == 2


def test_sweep_goes_on_after_the_database_was_away(
    start: Callable[..., Any], conn: Connection, wait_until: Callable[..., Any]
) -> None:
    sweeping = start("sweep", "--every", "1")
    sweeping.stdout.readline()
    conn.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pglimits' and datname = "
        "current_database() and pid <> pg_backend_pid()"
    )
    assert "Swept" in sweeping.stdout.readline()


def test_embedded_starts_once_and_stops(process: Cli, environment: dict[str, str]) -> None:
    import tempfile

    del environment["PGLIMITS_DSN"]
    with tempfile.TemporaryDirectory(prefix="pgl-") as folder:
        Path(folder).chmod(0o711)
        home = {"PGLIMITS_HOME": f"{folder}/home"}
        try:
            status = process("embedded", "status", **home)
            assert (status.code, status.out) == (1, "It is not running. Start it: pglimits embedded start\n")
            assert process("embedded", "status", "-o", "json", **home).json == {"running": False}
            started = process("embedded", "start", "-o", "json", **home)
            assert started.code == 0
            assert set(started.json) == {"running", "dsn", "host", "port", "user", "data", "pid", "version"}
            again = process("embedded", "start", **home)
            assert again.code == 0 and f"pid {started.json['pid']}" in again.out
            assert process("embedded", "status", **home).code == 0
            assert process("create", "x", "-l", "3", **home).code == 0  # no DSN: this is where it goes
            assert [row["name"] for row in process("ls", "-o", "json", **home).json] == ["x"]
            doctor = process("doctor", **home)
            assert doctor.code == 0 and "(from the embedded server)" in doctor.out
        finally:
            stopped = process("embedded", "stop", "-o", "json", **home)
        assert stopped.json == {"stopped": True}
        assert process("embedded", "stop", **home).out == "It was not running.\n"
