"""pglimits as an extension (docs/extension.md): as by plain SQL, kept by a dump, updated, adopted, given back."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from editions import Edition
from extensiontest import (
    NEXT,
    ROOT,
    Cli,
    create,
    files_of,
    fill,
    goes_on,
    of_extension,
    rows,
    run,
    sections,
    session,
    share,
)
from installtest import SQL, assert_same, catalog
from psycopg.conninfo import make_conninfo

from pglimits import PglimitsError, VersionMismatch, __version__, _extension, _install, install
from pglimits._embedded import Binaries, throwaway


@pytest.fixture(scope="module")
def folder(server: Any, next_edition: Edition) -> Iterator[Path]:
    """A folder in which the servers find the extension, in this version and the next."""
    with contextlib.ExitStack() as stack:
        if server.version >= 18:
            top = Path(tempfile.mkdtemp(prefix="pgl-ext-"))
            top.chmod(0o755)
            stack.callback(shutil.rmtree, top)
            place = top / "extension"
            place.mkdir()
        else:
            found = share(server.bin)
            if found is None or not os.access(found, os.W_OK):
                pytest.skip(f"may not write into the folder of extensions of PostgreSQL {server.version}: {found}")
            place = found
            lock = stack.enter_context(Path(tempfile.gettempdir(), f"pglimits-test-{server.version}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of this run have the same folder
            if (found / "pglimits.control").exists():
                pytest.skip(f"an extension pglimits is in {found}")
        written = files_of(next_edition) | files_of()
        names = [name for name in written if name.startswith("pglimits")]
        stack.callback(lambda: [(place / name).unlink() for name in names])
        for name in names:
            (place / name).write_text(written[name], encoding="utf-8")
        yield place


@contextlib.contextmanager
def cluster(server: Any, folder: Path) -> Iterator[str]:
    settings = {"extension_control_path": f"{folder.parent}:$system"} if server.version >= 18 else {}
    with throwaway(binaries=Binaries(server.bin, server.version), settings=settings) as running:
        with psycopg.connect(running.dsn, autocommit=True) as connection:
            connection.execute("create role owner login createrole")
        yield running.dsn


@pytest.fixture(scope="module")
def here(server: Any, folder: Path) -> Iterator[str]:
    """A server with the extension."""
    with cluster(server, folder) as dsn:
        yield dsn


def finding(cli: Cli, dsn: str, check: str) -> dict[str, Any]:
    checks = json.loads(cli("doctor", "-o", "json", "--dsn", dsn).stdout)["checks"]
    found: dict[str, Any] = next(each for each in checks if each["check"] == check)
    return found


# Creating.


def test_the_extension_gives_just_what_plain_sql_gives_to_a_role_that_is_no_superuser(
    database: Callable[[str], str],
) -> None:
    plain, extension = database("plain"), database("extension")
    install(plain)
    create(extension)
    for dsn in (plain, extension):
        fill(dsn)
    assert_same(catalog(extension), catalog(plain))
    with session(extension) as s:
        assert s.all(
            "select distinct proowner::regrole::text from pg_proc where pronamespace = 'pglimits'::regnamespace"
        ) == [("owner",)]
        everything = (
            "select count(*) from pg_class where relnamespace = 'pglimits'::regnamespace and relkind in ('r', 'S')"
        )
        assert s.value(f"select cardinality(extconfig) = ({everything}) from pg_extension where extname = 'pglimits'")
    goes_on(extension, rows(extension))
    run(extension, "drop extension pglimits")
    with session(extension) as s:
        assert s.value("select to_regnamespace('pglimits')") is None


def test_nothing_of_the_script_stays_behind_in_the_transaction_that_creates_the_extension(
    database: Callable[[str], str],
) -> None:
    with psycopg.connect(database("one")) as connection:
        shown = (
            "select current_user, current_setting('search_path'), current_setting('lock_timeout'),"
            " current_setting('statement_timeout'), current_setting('client_min_messages')"
        )
        before = connection.execute(shown).fetchone()
        connection.execute("create extension pglimits")
        assert connection.execute(shown).fetchone() == before
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            connection.execute(_install.plain().encode())


def test_the_extension_is_not_created_over_what_plain_sql_has_installed(database: Callable[[str], str]) -> None:
    dsn = database("one")
    install(dsn)
    before = catalog(dsn)
    with pytest.raises(psycopg.errors.DuplicateSchema, match="no extension") as caught:
        create(dsn)
    assert "create extension pglimits schema pg_catalog version 'unpackaged'" in str(caught.value.diag.message_hint)
    assert_same(catalog(dsn), before)


def test_another_isolation_than_read_committed_is_refused_with_the_way_on(
    here: str, database: Callable[[str], str], shell: Callable[..., str]
) -> None:
    old, new = database("old"), database("new")
    create(old)
    fill(old)
    run(new, "alter database new set default_transaction_isolation = 'repeatable read'")
    with pytest.raises(psycopg.errors.ActiveSqlTransaction, match="read committed") as caught:
        create(new)
    (options,) = re.findall(r"PGOPTIONS='.*?'", str(caught.value.diag.message_hint))
    shell(f'pg_dump -d "$OLD" | {options} psql -q -v ON_ERROR_STOP=1 -d "$NEW"', OLD=old, NEW=new)
    assert rows(new) == rows(old)


# Dump and restore.


@pytest.mark.parametrize("way", [0, 1], ids=["custom", "plain"])
def test_a_restored_database_goes_on_where_the_dump_was(
    shell: Callable[..., str],
    server: Any,
    folder: Path,
    here: str,
    database: Callable[[str], str],
    tmp_path: Path,
    way: int,
) -> None:
    old = database("old")
    create(old)
    fill(old)
    run(here, "create role app")
    try:
        run(old, "grant execute on function pglimits.release(uuid) to app")
        was = rows(old)
        with cluster(server, folder) as other:
            run(other, "create role app", "create database new owner owner")
            new = make_conninfo(other, dbname="new", user="owner")
            shell(sections()["Dump and restore"][way], tmp_path, OLD=old, NEW=new)
            assert rows(new) == was
            assert_same(catalog(new), catalog(old))
            assert of_extension(new) == of_extension(old)
            goes_on(new, was)
    finally:
        run(make_conninfo(here, dbname="old"), "drop owned by app", "drop role app")


def test_an_extension_without_limits_can_be_dumped_and_restored_and_so_can_one_without_data(
    shell: Callable[..., str], database: Callable[[str], str], tmp_path: Path
) -> None:
    old = database("old")
    create(old)
    for nth, options in enumerate(("", "--extension=pglimits", "--schema-only")):
        if options == "--schema-only":
            fill(old)
        new = database(f"new{nth}")
        shell(
            f'pg_dump {options} -d "$OLD" | psql -q -v ON_ERROR_STOP=1 -d "$NEW"',
            tmp_path,
            OLD=old,
            NEW=new,
        )
        with session(new) as s:
            s.create("db", 1)
            assert s.acquire("db").status == "granted"
    new = database("new3")
    shell('pg_dump --extension=pglimits -d "$OLD" | psql -q -v ON_ERROR_STOP=1 -d "$NEW"', OLD=old, NEW=new)
    assert rows(new) == rows(old)


def test_a_dump_is_restored_into_a_newer_version(shell: Callable[..., str], database: Callable[[str], str]) -> None:
    old, new = database("old"), database("new")
    create(old)
    fill(old)
    was = rows(old)
    create(new, NEXT)
    for clean in ("", "--clean --if-exists"):  # where there are limits already, it has to be cleaned
        shell(f'pg_dump {clean} -d "$OLD" | psql -q -v ON_ERROR_STOP=1 -d "$NEW"', OLD=old, NEW=new)
        assert rows(new) == was
    goes_on(new, was)


# Updating.


def test_an_update_gives_just_what_a_new_extension_gives_and_keeps_what_is_there(
    database: Callable[[str], str],
) -> None:
    dsn, fresh = database("one"), database("two")
    create(fresh, NEXT)
    fill(fresh)
    create(dsn)
    fill(dsn)
    # As after a restore of a dump by a version before.
    run(dsn, "update pglimits.meta set schema_version = 0")
    was = rows(dsn)
    run(dsn, f"alter extension pglimits update to '{NEXT}'")
    assert rows(dsn) == was
    assert_same(catalog(dsn), catalog(fresh))
    assert of_extension(dsn) == of_extension(fresh)
    goes_on(dsn, was)


def test_python_and_the_command_update_the_extension(
    database: Callable[[str], str], next_edition: Edition, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = database("one")
    create(dsn)
    fill(dsn)
    was = rows(dsn)
    result = cli("upgrade", "--dsn", dsn)
    assert result.stdout.startswith(f"The extension pglimits {__version__} is up to date in ")
    monkeypatch.setattr(_install, "_folder", lambda: next_edition.folder)
    monkeypatch.setattr(_install, "__version__", "0.1.2")
    with pytest.raises(PglimitsError, match=r"pglimits sql --extension FOLDER"):
        install(dsn)
    assert "no files that update it to 0.1.2" in cli("upgrade", "--dsn", dsn).stderr
    monkeypatch.setattr(_install, "__version__", NEXT)
    done = install(dsn)
    assert (done.version_before, done.version_after, done.extension) == (__version__, NEXT, True)
    monkeypatch.setattr(_install, "__version__", __version__)
    with pytest.raises(VersionMismatch, match="newer"):
        install(dsn)
    assert rows(dsn) == was


def test_several_may_update_the_extension_at_once(
    database: Callable[[str], str],
    next_edition: Edition,
    wait_until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dsn = database("one")
    create(dsn)
    fill(dsn)
    was = rows(dsn)
    monkeypatch.setattr(_install, "__version__", NEXT)
    with ThreadPoolExecutor(3) as pool, psycopg.connect(dsn) as lock, session(dsn) as s:
        lock.execute("select pg_advisory_xact_lock(7210911204761542)")
        results = [pool.submit(install, dsn) for _ in range(3)]
        waits = "select count(distinct pid) = 3 from pg_locks where not granted"
        wait_until(lambda: s.value(waits), timeout=60)
        lock.rollback()
        assert [(done.result(60).version_before, done.result().version_after) for done in results] == [
            (__version__, NEXT)
        ] * 3
    assert rows(dsn) == was
    goes_on(dsn, was)


def test_to_install_again_gives_an_extension_its_privileges_back_and_the_scripts_leave_it_alone(
    database: Callable[[str], str], psql: Any, tmp_path: Path
) -> None:
    dsn = database("one")
    create(dsn)
    fill(dsn)
    before, members = catalog(dsn), of_extension(dsn)
    with session(dsn) as s:
        s.run("revoke all on all functions in schema pglimits from pglimits_user")
        s.run("grant select on pglimits.leases to public")
    done = install(dsn)
    assert done.extension and done.version_before == done.version_after == __version__
    with session(dsn) as s:
        assert s.value("select has_function_privilege('pglimits_user', 'pglimits.release(uuid)', 'execute')")
        assert s.value("select has_table_privilege('pglimits_user', 'pglimits.leases', 'select')") is False
    for what in ("columns", "indexes", "views", "types", "schema", "meta"):
        assert catalog(dsn)[what] == before[what]
    before = catalog(dsn)
    said = psql(dsn, SQL / "install.sql")
    assert said.returncode != 0 and "is an extension in this database" in said.stderr
    script = tmp_path / "plain.sql"
    script.write_text(f"begin;\n{_install.plain()}commit;\n")
    assert "is an extension in this database" in psql(dsn, script).stderr
    assert_same(catalog(dsn), before)
    assert of_extension(dsn) == members


@pytest.mark.parametrize("means", ["command", "psql"])
def test_uninstalling_drops_the_extension(database: Callable[[str], str], psql: Any, cli: Cli, means: str) -> None:
    dsn = database("one")
    create(dsn)
    fill(dsn)
    run(dsn, "create view mine as select name from pglimits.limits")
    if means == "psql":
        assert psql(dsn, SQL / "uninstall.sql").returncode == 0
    else:
        assert cli("uninstall", "--yes", "--dsn", dsn).exit_code == 0
    with session(dsn) as s:
        assert s.value("select to_regnamespace('pglimits')") is None
        assert s.value("select count(*) from pg_extension where extname = 'pglimits'") == 0


# Adopting, and giving back.


@pytest.mark.parametrize("version", [__version__, NEXT])
def test_an_adopted_installation_is_the_same_as_a_new_extension_and_keeps_what_is_there(
    shell: Callable[..., str], database: Callable[[str], str], version: str
) -> None:
    dsn, fresh = database("one"), database("two")
    create(fresh, version)
    fill(fresh)
    install(dsn)
    fill(dsn)
    was = rows(dsn)
    if version == __version__:
        shell(sections()["Adopting an installation"][0], NEW=dsn)
    else:
        create(dsn, "unpackaged")
        run(dsn, f"alter extension pglimits update to '{version}'")
    assert rows(dsn) == was
    assert_same(catalog(dsn), catalog(fresh))
    assert of_extension(dsn) == of_extension(fresh)
    goes_on(dsn, was)


def test_what_is_not_there_or_somebody_elses_is_not_adopted(here: str, database: Callable[[str], str]) -> None:
    dsn = database("one")
    with pytest.raises(psycopg.errors.InvalidSchemaName, match="no pglimits"):
        create(dsn, "unpackaged")
    install(dsn)
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="adopt it as that role"):
        create(make_conninfo(here, dbname="one"), "unpackaged")


@pytest.mark.parametrize("version", [__version__, "unpackaged"])
def test_an_extension_that_is_given_back_is_what_plain_sql_installs(
    shell: Callable[..., str], database: Callable[[str], str], version: str
) -> None:
    dsn, plain = database("one"), database("two")
    install(plain)
    fill(plain)
    if version == "unpackaged":
        install(dsn)
    create(dsn, version)
    if version == "unpackaged":
        run(dsn, "alter extension pglimits update")
    fill(dsn)
    was = rows(dsn)
    shell(sections()["Going back to plain SQL"][0], NEW=dsn)
    with session(dsn) as s:
        assert s.value("select count(*) from pg_extension where extname = 'pglimits'") == 0
        assert (
            s.all("select from pg_depend where deptype = 'e' and refobjid >= 16384 and classid = 'pg_class'::regclass")
            == []
        )
    assert rows(dsn) == was
    assert_same(catalog(dsn), catalog(plain))
    done = install(dsn)
    assert done.extension is False
    assert_same(catalog(dsn), catalog(plain))
    assert rows(dsn) == was
    goes_on(dsn, was)


# What the doctor says.


def test_doctor_tells_of_the_extension_its_update_and_its_owner(
    here: str, database: Callable[[str], str], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = database("one")
    install(dsn)
    create(dsn, "unpackaged")
    found = finding(cli, dsn, "installed")
    assert (found["status"], found["fix"]) == ("warn", "alter extension pglimits update;")
    run(dsn, "alter extension pglimits update")
    found = finding(cli, dsn, "installed")
    assert found["status"] == "ok" and "as an extension" in found["text"]
    assert finding(cli, dsn, "owner")["status"] == "ok"
    monkeypatch.setattr("pglimits.__version__", NEXT)
    found = finding(cli, dsn, "installed")
    assert found["status"] == "warn" and "alter extension pglimits update" in found["fix"]


def test_doctor_warns_of_functions_that_run_as_a_superuser_and_the_lines_of_the_document_give_them_to_a_role(
    shell: Callable[..., str], here: str, database: Callable[[str], str], cli: Cli
) -> None:
    for nth, make in enumerate((install, create)):
        database(f"of_superuser{nth}")
        dsn = make_conninfo(here, dbname=f"of_superuser{nth}")
        make(dsn)
        fill(dsn)
        found = finding(cli, dsn, "owner")
        assert found["status"] == "warn" and "superuser" in found["text"]
        shell(sections()["Roles and owners"][-1], NEW=dsn)
        assert finding(cli, dsn, "owner")["status"] == "ok"
        plain = database(f"plain{nth}")
        install(plain)
        fill(plain)
        assert str(catalog(dsn)).replace("pglimits_owner", "owner") == str(catalog(plain))
        goes_on(dsn, rows(dsn))
        install(dsn)
        if make is create:
            run(dsn, f"alter extension pglimits update to '{NEXT}'")
            with session(dsn) as s:
                owners = (
                    "select relowner from pg_class where relnamespace = 'pglimits'::regnamespace and relkind <> 'i'"
                )
                owners += " union select proowner from pg_proc where pronamespace = 'pglimits'::regnamespace"
                assert s.all(f"select x.relowner::regrole::text from ({owners}) x") == [("pglimits_owner",)]
    with psycopg.connect(here, autocommit=True) as connection:
        for nth in range(2):
            connection.execute(f"drop database of_superuser{nth} with (force)".encode())
            connection.execute(f"create database of_superuser{nth}".encode())
        connection.execute("drop role pglimits_owner")


# Files.


def test_the_command_writes_all_files_and_they_are_what_pgxn_wants(cli: Cli, tmp_path: Path) -> None:
    result = cli("sql", "--extension", str(tmp_path / "new"))
    assert result.exit_code == 0
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert (
        names
        == set(_extension.files())
        >= {"pglimits.control", f"pglimits--{__version__}.sql", "META.json", "Makefile"}
    )
    meta = json.loads((tmp_path / "new" / "META.json").read_text())
    assert {"name", "version", "abstract", "maintainer", "license", "provides", "meta-spec"} <= set(meta)
    assert meta["version"] == meta["provides"]["pglimits"]["version"] == __version__
    assert meta["provides"]["pglimits"]["file"] in names
    for refused in (
        ("--extension", str(tmp_path), "--tle"),
        ("--tle", "--plain"),
        ("--extension", str(tmp_path), "--uninstall"),
    ):
        assert cli("sql", *refused).exit_code == 2


def test_the_files_are_written_to_where_the_document_says(tmp_path: Path, shell: Callable[..., str]) -> None:
    (tmp_path / "extension").mkdir()
    config = tmp_path / "pg_config"
    config.write_text(f"#!/bin/sh\ntest $1 = --sharedir && echo {tmp_path}\n")
    config.chmod(0o755)
    (script,) = sections("sh")["The files"]
    shell(f"PATH={tmp_path}:$PATH\n{script}", tmp_path)
    written = {path.name for path in (tmp_path / "extension").iterdir()}
    assert written == {name for name in _extension.files() if name.startswith("pglimits")}


def test_make_installs_the_files(server: Any, tmp_path: Path) -> None:
    pg_config = server.bin / "pg_config"
    if not pg_config.exists() or shutil.which("make") is None:
        pytest.skip("needs pg_config and make")
    pgxs = subprocess.run([pg_config, "--pgxs"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(pgxs).exists():
        pytest.skip(f"needs {pgxs}: the packages for building extensions are not installed")
    for name, text in _extension.files().items():
        (tmp_path / name).write_text(text)
    subprocess.run(
        ["make", "-C", tmp_path, "install", f"PG_CONFIG={pg_config}", f"DESTDIR={tmp_path}/root"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    installed = {path.name for path in (tmp_path / "root").rglob("pglimits*") if path.is_file()}
    assert installed == {name for name in _extension.files() if name.startswith("pglimits")}


def test_every_version_that_was_released_can_be_updated() -> None:
    released = re.findall(r"^## (\d[\d.]*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert {*released} - {__version__} == {*_extension.RELEASED}


# pg_tle.

STUB = """
create schema pgtle;
create table pgtle.scripts (name text, version text, source text, body text, primary key (name, version, source));
create table pgtle.controls (name text primary key, default_version text, description text);
create function pgtle.available_extensions() returns table (name name, default_version text, description text)
language sql as 'select name::name, default_version, description from pgtle.controls';
create function pgtle.available_extension_versions() returns table (name name, version text)
language sql as 'select name::name, version from pgtle.scripts where source = ''''';
create function pgtle.extension_update_paths(name name) returns table (source text, target text, path text)
language sql as 'select source, version, source || ''--'' || version from pgtle.scripts s
  where s.name = $1 and source <> ''''';
create function pgtle.install_extension(
  name text, version text, description text, ext text, requires text[] default null) returns boolean language sql as
'insert into pgtle.controls values (name, version, description);
 insert into pgtle.scripts values (name, version, '''', ext) returning true';
create function pgtle.install_extension_version_sql(name text, version text, ext text) returns boolean language sql as
'insert into pgtle.scripts values (name, version, '''', ext) returning true';
create function pgtle.install_update_path(name text, fromvers text, tovers text, ext text) returns boolean
language sql as
'insert into pgtle.scripts values (name, tovers, fromvers, ext) returning true';
create function pgtle.set_default_version(name text, version text) returns boolean language sql as
'update pgtle.controls set default_version = version where name = name returning true';
"""
"""What pg_tle has for this, without what it does behind."""


def test_pg_tle_is_given_what_the_files_have(
    database: Callable[[str], str], next_edition: Edition, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = database("one")
    run(dsn, STUB)
    script = cli("sql", "--tle").stdout
    for _ in range(2):
        run(dsn, script)
    (shown,) = sections("sh")["Managed servers: pg_tle"]
    assert shown.splitlines()[0].startswith("pglimits sql --tle | psql ")
    bodies = "select source, version, body from pgtle.scripts order by 1, 2"
    with session(dsn) as s:
        assert s.all("select name, default_version from pgtle.controls") == [("pglimits", __version__)]
        there = {
            f"pglimits--{source}--{version}.sql".replace("----", "--"): body for source, version, body in s.all(bodies)
        }
    assert {name: _extension._HEAD + body.lstrip("\n") for name, body in there.items()} == {
        name: text for name, text in _extension.files().items() if name.endswith(".sql")
    }
    monkeypatch.setattr(_install, "_folder", lambda: next_edition.folder)
    monkeypatch.setattr(_extension, "__version__", NEXT)
    monkeypatch.setattr(_extension, "RELEASED", (__version__,))
    run(dsn, _extension.tle())
    with session(dsn) as s:
        assert s.all("select name, default_version from pgtle.controls") == [("pglimits", NEXT)]
        assert {row[:2] for row in s.all(bodies)} == {
            ("", __version__), ("", NEXT), ("", "unpackaged"), ("unpackaged", __version__), ("unpackaged", NEXT),
            (__version__, NEXT),
        }  # fmt: skip
