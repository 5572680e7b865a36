"""What drivers make of parameters and answers is right, or an error that takes nothing. It lets nobody through."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from drivers import STYLES, Driver, address, node_pg, sqlstate
from psycopg.rows import dict_row


@pytest.fixture(params=[*STYLES, "Node's pg"])
def driver(request: pytest.FixtureRequest, server_dsn: str) -> Iterator[Driver]:
    style = STYLES.get(request.param) or node_pg(request.getfixturevalue("node_folder"))
    with style(address(server_dsn)) as opened:
        yield opened


@pytest.fixture
def conn(connect: Callable[..., psycopg.Connection[Any]]) -> psycopg.Connection[Any]:
    """With limits of 5 slots: database; full, which somebody has; the rate limits api and slow, which are used up."""
    connection = connect(row_factory=dict_row)
    for name, rate in (("database", 0), ("full", 0), ("api", 10), ("slow", 0.001)):
        connection.execute("select pglimits.create_limit(%s, 5, %s::float8)", [name, rate])
    connection.execute(
        "select pglimits.acquire('full', 5), pglimits.rate_limit('slow', 5), pglimits.rate_limit('api', 5)"
    )
    return connection


def held(conn: psycopg.Connection[Any]) -> list[dict[str, Any]]:
    return conn.execute("select * from pglimits.holders where name <> 'full' order by acquired_at").fetchall()


@contextmanager
def fails(conn: psycopg.Connection[Any], *codes: str | None) -> Iterator[None]:
    """With one of those SQLSTATEs, if any are given; and nothing is taken, and nobody queues."""
    shown = "select to_jsonb(h) from pglimits.holders h union all select to_jsonb(w) from pglimits.waiters w"
    before = conn.execute(shown).fetchall()
    with pytest.raises(Exception) as caught:
        yield
    if codes:
        assert sqlstate(caught.value) in codes, caught.value
    assert conn.execute(shown).fetchall() == before


def test_functions_take_untyped_parameters_and_ids_of_both_kinds(driver: Driver, conn: psycopg.Connection[Any]) -> None:
    ids = []
    for _ in range(3):
        answer = driver.one("acquire", "database", 1)
        assert answer["status"] == "granted" and int(answer["fence"]) > 0
        ids.append(answer["lease_id"])
    assert driver.one("peek", "database", 2)["status"] == "granted"
    assert driver.one("peek", "database", 3)["status"] == "refused"
    assert driver.one("acquire", "database", 3)["status"] == "refused"
    assert driver.one("rate_limit", "slow", 1)["status"] == "refused"
    assert [lease["lease_id"] for lease in held(conn)] == [UUID(str(each)) for each in ids]

    assert driver.ask("renew", UUID(str(ids[0])), 60.5) == [{"renew": True}]
    assert driver.ask("release", UUID(str(ids[0]))) == [{"release": True}]
    if "text id" in driver.refuses:
        with fails(conn):
            driver.ask("release", str(ids[1]))
    else:
        assert driver.ask("release", str(ids[1])) == [{"release": True}]
        assert driver.ask("release", str(ids[1])) == [{"release": False}]
    released = driver.ask("release_all", [UUID(str(each)) for each in ids[1:]])
    assert len(released) == 2
    assert held(conn) == []


def test_durations_are_numbers_of_any_kind_or_an_error(driver: Driver, conn: psycopg.Connection[Any]) -> None:
    for given in (60, 60.5, Decimal("60.5"), "60.5"):
        if type(given).__name__ in driver.refuses:
            with fails(conn):
                driver.one("acquire", "database", 1, "", 0, given)
            continue
        answer = driver.one("acquire", "database", 1, "", given, given)
        (lease,) = held(conn)
        assert lease["expires_at"] - lease["acquired_at"] == timedelta(seconds=float(given))
        # Read right, to the precision of the language.
        assert abs(answer["expires_at"] - lease["expires_at"]) < timedelta(milliseconds=1)
        assert driver.ask("release", UUID(str(answer["lease_id"]))) == [{"release": True}]
    for wrong in (timedelta(minutes=5), "5 minutes", float("nan")):
        for arguments in ((wrong,), (0, wrong)):
            with fails(conn):
                driver.one("acquire", "database", 1, "", *arguments)
            with fails(conn):
                driver.one("rate_limit", "api", 1, "", wrong)


def test_a_holder_is_a_document_and_no_timeout_waits_for_ever(driver: Driver, conn: psycopg.Connection[Any]) -> None:
    holder, lease_id = {"job": 1, "who": "é\\ '\""}, uuid4()
    answer = driver.one("acquire", "database", 1, "", 0, 60, 0, driver.json(holder), lease_id)
    assert (answer["status"], str(answer["lease_id"])) == ("granted", str(lease_id))
    assert [lease["holder"] for lease in held(conn)] == [holder]
    answer = driver.one("acquire", "full", 1, "", None, 60, 0, driver.json(holder))
    assert (answer["status"], answer["position"]) == ("queued", 1)
    assert isinstance(answer["retry_after"], float | int) and 0 < answer["retry_after"] <= 3


LISTS = [["database", "api"], ["database"], [], ("database", "api"), ("database",), ()]


def test_a_list_where_one_name_is_expected_lets_nobody_through(driver: Driver, conn: psycopg.Connection[Any]) -> None:
    for names in LISTS:
        for function in ("acquire", "rate_limit", "peek"):
            try:
                answer = driver.one(function, names, 1)
            except Exception as error:
                assert sqlstate(error) != "PL002", error
                continue
            # psycopg2 writes ('database') of it, which is the name.
            assert names == ("database",) and answer["status"] == "granted"
    assert {lease["name"] for lease in held(conn)} <= {"database"}


def test_several_limits_have_functions_of_their_own_which_an_empty_list_is_an_error_to(
    driver: Driver, conn: psycopg.Connection[Any]
) -> None:
    answer = driver.one("acquire_all", ["database", "api"], [2, 1], ["", "k"])
    assert answer["status"] == "granted" and len(answer["fences"]) == 2
    assert sorted((lease["name"], lease["key"], lease["slots"]) for lease in held(conn)) == [
        ("api", "k", 1), ("database", "", 2),
    ]  # fmt: skip
    assert driver.one("rate_limit_all", ["api"])["status"] in ("granted", "refused")
    for function in ("acquire_all", "rate_limit_all", "peek_all"):
        for names in ([], None, "", "{}"):
            with fails(conn):
                driver.one(function, names)


def test_granted_means_go_now(driver: Driver, conn: psycopg.Connection[Any]) -> None:
    """The limit is used up; each of three has to wait for its moment, and is told so by any driver."""
    level = conn.execute("select level, pglimits._now() as now from pglimits.limits where name = 'api'").fetchone()
    assert level is not None
    for _ in range(10):
        lease_id = uuid4()
        while (answer := driver.one("rate_limit", "api", 1, "", 60, 0, None, lease_id))["status"] == "queued":
            assert answer["retry_after"] > 0
            time.sleep(answer["retry_after"])
        assert answer["status"] == "granted"
    now = conn.execute("select pglimits._now() as now").fetchone()
    assert now is not None
    earliest = (level["level"] + 10 - 5) / 10
    assert (now["now"] - level["now"]).total_seconds() >= earliest - 0.001


def test_errors_come_with_their_sqlstates(driver: Driver, conn: psycopg.Connection[Any]) -> None:
    for code, function, *arguments in (
        ("PL001", "acquire", "a/b", 1),
        ("PL002", "acquire", "nowhere", 1, "", 0, 60, 0, None, None, True),
        ("PL003", "create_limit", "database", 1),
        ("PL004", "acquire", "database", 6),
        ("PL005", "rate_limit", "database", 1),
    ):
        with fails(conn, code):
            driver.one(function, *arguments)


def test_what_waits_in_sql_is_called_outside_of_a_transaction(driver: Driver, conn: psycopg.Connection[Any]) -> None:
    for call in ("acquire_wait($1)", "rate_limit_wait($1)"):
        (answer,) = driver.query(f"call pglimits.{call}", ["api"])
        assert answer["status"] == "granted"
        driver.query("begin", [])
        with fails(conn, "PL010"):
            driver.query(f"call pglimits.{call}", ["api"])
        driver.query("rollback", [])
