"""pglimits as an extension that pg_tle keeps (docs/extension.md), where the server has pg_tle."""

from __future__ import annotations

import fcntl
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from editions import Edition
from extensiontest import (
    NEXT,
    Cli,
    create,
    fill,
    goes_on,
    of_extension,
    rows,
    run,
    sections,
    session,
    share,
)
from installtest import assert_same, catalog
from psycopg.conninfo import make_conninfo

from pglimits import PglimitsError, __version__, _extension, _install, install
from pglimits._embedded import Binaries, throwaway

Databases = Callable[[str], str]


@pytest.fixture(scope="module")
def here(server: Any) -> Iterator[str]:
    """A server that has loaded pg_tle."""
    folder = share(server.bin)
    if folder is None or not (folder / "pg_tle.control").exists():
        pytest.skip(f"needs pg_tle for PostgreSQL {server.version}, which neither Debian, PyPI nor npm has")
    if (folder / "pglimits.control").exists():
        pytest.skip(f"an extension pglimits is in {folder}")
    settings = {"shared_preload_libraries": "pg_tle"}
    with Path(tempfile.gettempdir(), f"pglimits-test-{server.version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests of the files put them where pg_tle would see them
        with throwaway(binaries=Binaries(server.bin, server.version), settings=settings) as running:
            run(
                running.dsn,
                "create role owner login createrole",
                "create role pgtle_admin",
                "grant pgtle_admin to owner",
            )
            yield running.dsn


@pytest.fixture
def managed(database: Databases, here: str) -> Databases:
    """managed("one"): the DSN of a new database, to the owner of which pg_tle was opened."""

    def create(name: str) -> str:
        dsn = database(name)
        run(make_conninfo(here, dbname=name), "create extension pg_tle")
        return dsn

    return create


def give(dsn: str) -> None:
    run(dsn, _extension.tle())


def restored(shell: Callable[..., str], here: str, database: Databases) -> str:
    """The DSN of a copy of the database "one", from a dump without an error."""
    database("copy")
    old, new = (make_conninfo(here, dbname=name) for name in ("one", "copy"))
    shell('pg_dump -d "$OLD" | psql -q -v ON_ERROR_STOP=1 -d "$NEW"', OLD=old, NEW=new)
    return new


def test_the_extension_is_the_same_as_plain_sql_is_kept_by_a_dump_and_dropped(
    managed: Databases, database: Databases, here: str, shell: Callable[..., str], cli: Cli
) -> None:
    dsn, plain = managed("one"), database("plain")
    install(plain)
    shell(sections("sh")["Managed servers: pg_tle"][0], NEW=dsn)
    for each in (plain, dsn):
        fill(each)
    assert_same(catalog(dsn), catalog(plain))
    checks = {each["check"]: each for each in json.loads(cli("doctor", "-o", "json", "--dsn", dsn).stdout)["checks"]}
    assert checks["installed"]["status"] == checks["owner"]["status"] == "ok"
    assert "as an extension" in checks["installed"]["text"]
    was = rows(dsn)
    run(make_conninfo(here, dbname="one"), "drop schema public cascade")
    copy = restored(shell, here, database)
    assert rows(copy) == was
    assert of_extension(copy) == of_extension(dsn)
    goes_on(copy, was)
    # As on a managed server: pg_tle is there already, and somebody else's.
    other = managed("other")
    shell('pg_dump -d "$OLD" | psql -q -d "$NEW"', OLD=make_conninfo(here, dbname="one"), NEW=other)
    assert rows(other) == was
    run(dsn, "drop extension pglimits", "select pgtle.uninstall_extension('pglimits')")
    with session(dsn) as s:
        assert s.value("select to_regnamespace('pglimits')") is None
        assert s.value("select count(*) from pgtle.available_extensions()") == 0


def test_an_update_gives_what_a_new_extension_gives_and_is_kept_by_a_dump(
    managed: Databases,
    database: Databases,
    here: str,
    shell: Callable[..., str],
    next_edition: Edition,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dsn, fresh = managed("one"), managed("two")
    give(dsn)
    create(dsn)
    fill(dsn)
    was = rows(dsn)
    monkeypatch.setattr(_install, "_folder", lambda: next_edition.folder)
    monkeypatch.setattr(_install, "__version__", NEXT)
    monkeypatch.setattr(_extension, "__version__", NEXT)
    monkeypatch.setattr(_extension, "RELEASED", (__version__,))
    with pytest.raises(PglimitsError, match="pglimits sql --tle"):
        install(dsn)
    for each in (fresh, dsn, dsn):
        give(each)
    run(fresh, "create extension pglimits")
    fill(fresh)
    assert install(dsn).version_after == NEXT
    assert rows(dsn) == was
    assert_same(catalog(dsn), catalog(fresh))
    assert of_extension(dsn) == of_extension(fresh)
    goes_on(restored(shell, here, database), was)


def test_an_adopted_installation_is_the_same_as_a_new_extension_is_kept_by_a_dump_and_can_be_given_back(
    managed: Databases, database: Databases, here: str, shell: Callable[..., str]
) -> None:
    dsn, plain, fresh = managed("one"), database("plain"), managed("two")
    give(fresh)
    create(fresh)
    fill(fresh)
    for each in (dsn, plain):
        install(each)
        fill(each)
    was = rows(dsn)
    give(dsn)
    with pytest.raises(psycopg.errors.DuplicateSchema):
        create(dsn)
    shell(sections()["Adopting an installation"][0], NEW=dsn)
    assert rows(dsn) == was
    assert_same(catalog(dsn), catalog(fresh))
    assert of_extension(dsn) == of_extension(fresh)
    assert rows(restored(shell, here, database)) == was
    shell(sections()["Going back to plain SQL"][0], NEW=dsn)
    run(dsn, "select pgtle.uninstall_extension('pglimits')")
    assert install(dsn).extension is False
    assert rows(dsn) == was
    assert_same(catalog(dsn), catalog(plain))
    goes_on(dsn, was)
