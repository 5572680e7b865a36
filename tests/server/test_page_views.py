"""What the page says, without a browser."""

from __future__ import annotations

import asyncio
import html
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx
import psycopg
import pytest
from servertest import FULL, READ, Server, until

from pglimits.server._page_data import Overview, Picture, Query, Row, order, pick, state
from pglimits.server._page_limit import _why
from pglimits.server._page_text import duration, number, segment, sparkline, who

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def a(name: str = "one", **changed: Any) -> Row:
    """A limit as the list has it."""
    base: dict[str, Any] = {
        "name": name,
        "limit": 10,
        "held": 0,
        "waiting": 0,
        "active": True,
        "slot_decay_per_second": 0.0,
        "level": 0.0,
        "max_waiters": None,
        "description": None,
        "created_at": NOW,
        "updated_at": NOW,
        "grants": 0,
        "granted_slots": 0,
        "leases": 0,
        "keys": 1,
        "oldest_waiting_since": None,
        "oldest_wait": None,
    }
    row = Row(**{**base, **changed})
    row.state, row.reason = state(row)
    return row


@pytest.mark.parametrize(
    ("changed", "word", "reason"),
    [
        ({}, "idle", "nobody holds or waits"),
        ({"held": 3}, "active", "7 of 10 slots free"),
        ({"held": 10}, "at capacity", "every slot is held"),
        ({"held": 12}, "at capacity", "every slot is held"),
        ({"held": 10, "keys": 2}, "active", "10 of 20 slots free in 2 keys"),
        ({"held": 10, "waiting": 4}, "backlogged", "4 waiting"),
        ({"limit": 0}, "shut", "its limit is 0: nobody gets in"),
        ({"active": False, "waiting": 3}, "off", "not enforced: every request goes through"),
        ({"slot_decay_per_second": 2.0, "level": 9.5}, "at capacity", "no whole slot is left, 2/s come back"),
        ({"slot_decay_per_second": 2.0, "level": 4.0}, "active", "4 used and not decayed yet"),
    ],
)
def test_a_limit_has_one_word_of_state_and_its_reason(changed: dict[str, Any], word: str, reason: str) -> None:
    row = a(**changed)
    assert (row.state, row.reason) == (word, reason)


def test_the_busiest_come_first_and_every_column_sorts_both_ways() -> None:
    rows = [
        a("idle"),
        a("full", held=10),
        a("off", active=False),
        a("line", held=10, waiting=2, oldest_wait=1.0),
        a("half", held=5, rate=3.0),
        a("longer line", held=1, waiting=9, oldest_wait=60.0),
    ]
    assert [row.name for row in order(rows, "busiest")] == ["longer line", "line", "full", "half", "idle", "off"]
    assert [row.name for row in order(rows, "name")][:2] == ["full", "half"]
    assert [row.name for row in order(rows, "name", True)][:2] == ["off", "longer line"]
    assert [row.name for row in order(rows, "oldest")][:2] == ["longer line", "line"]
    assert [row.name for row in order(rows, "held")][:2] == ["full", "line"]
    assert next(row.name for row in order(rows, "rate")) == "half"
    assert [row.name for row in order(rows, "waiting", True)][-1] == "longer line"


def test_a_page_beyond_the_last_is_the_last_and_states_are_counted_of_what_the_filter_lets_through() -> None:
    rows = [a(f"Api-{n}", held=n % 2) for n in range(120)] + [a("other")]
    picture = Picture(NOW, rows)
    page = pick(picture, Query("aPI-", page=99))
    assert (page.page, page.pages, len(page.rows), page.found, page.total) == (3, 3, 20, 120, 121)
    assert page.states["active"] == page.states["idle"] == 60
    page = pick(picture, Query("api-", "active"))
    assert page.found == 60
    assert pick(picture, Query("nothing")).rows == []


def test_rates_are_measured_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looked:
        limits: dict[str, Any]
        at, error = NOW, None

    now = [100.0]
    monkeypatch.setattr("pglimits.server._page_data.time", SimpleNamespace(monotonic=lambda: now[0]))
    of = {name: getattr(a(), name) for name in Row.__slots__}
    live = Looked()
    live.limits = {"one": {**of, "granted_slots": 50}}
    overview = Overview(live)  # type: ignore[arg-type]
    assert asyncio.run(overview.now()).rows[0].rate is None
    now[0] += 4
    live.limits = {"one": {**of, "granted_slots": 70}, "new": {**of, "name": "new"}}
    assert [row.rate for row in asyncio.run(overview.now()).rows] == [5.0, None]


def test_numbers_durations_and_holders_are_short() -> None:
    assert [number(value) for value in (0, 3.0, 0.5, 4.25, 99.96, 12345.6, None)][:6] == [
        "0",
        "3",
        "0.50",
        "4.25",
        "99.96",
        "12,345.60",
    ]
    assert [duration(value) for value in (0.4, 59.9, 61, 3600, 7325, 90000)] == [
        "0s",
        "59s",
        "1m 1s",
        "1h",
        "2h 2m",
        "1d 1h",
    ]
    assert who({"host": "h", "pid": 3, "program": "p", "thread": "MainThread", "job": 7}) == "p (pid 3) on h job=7"
    assert who([1, "<b>"]) == '[1, "<b>"]'
    assert segment("a b?#ä..") == "a%20b%3F%23%C3%A4.."


def test_a_sparkline_has_gaps_where_nothing_is_known() -> None:
    assert sparkline([None, None], 3) is None
    drawn = sparkline([1, 2, None, 3], 4)
    assert drawn is not None
    assert drawn["line"].count("M") == 2
    assert drawn["last"] == "3"


def test_a_policy_lets_nothing_run_but_our_scripts_and_no_markup_needs_more(http: httpx.Client) -> None:
    http.post("/v1/limits", json={"name": "api", "limit": 3})
    for path in ("/", "/limits/api", "/events", "/create", "/delete?name=api", "/limits/nope"):
        page = http.get(path)
        policy = page.headers["content-security-policy"]
        assert "unsafe" not in policy
        nonce = re.findall(r"script-src 'nonce-([^']+)'", policy)[0]
        assert policy.startswith("default-src 'none'")
        assert "require-trusted-types-for 'script'" in policy
        assert not re.search(r"\sstyle=|\son[a-z]+=|<style|javascript:", page.text), path
        assert set(re.findall(r'<script nonce="([^"]+)"', page.text)) == {nonce}
        assert page.text.count("<script") == page.text.count("</script>") == 6
    assert http.get("/").headers["content-security-policy"] != policy


def test_static_files_are_kept_by_their_version_and_nothing_else_is_served(http: httpx.Client) -> None:
    links = re.findall(r'"(/static/[^"]+)"', http.get("/").text)
    assert len(links) >= 9
    for link in links:
        found = http.get(link)
        assert found.status_code == 200, link
        assert "immutable" in found.headers["cache-control"]
        assert http.get(link, headers={"If-None-Match": found.headers["etag"]}).status_code == 304
    assert http.get("/static/vendor/LICENSE.htmx.txt").status_code == 200
    for wrong in ("/static/../_page.py", "/static/%2e%2e/_page.py", "/static/", "/static/nope.js"):
        assert http.get(wrong).status_code == 404, wrong


def test_editing_writes_only_the_fields_that_were_changed(http: httpx.Client, shared_dsn: str) -> None:
    http.post("/v1/limits", json={"name": "api", "limit": 3, "description": "old"})
    form = dict(re.findall(r'name="(was_\w+)" value="([^"]*)"', http.get("/edit?name=api").text))
    given = {field.removeprefix("was_"): value for field, value in form.items()}
    with psycopg.connect(shared_dsn, autocommit=True) as connection:
        connection.execute("select pglimits.update_limit('api', 8, max_waiters => 5)")
    given |= {"description": "new", "slot_decay_per_second": "2"}
    asked = http.post("/edit?name=api", data={**form, **given})
    assert "Change this limit?" in asked.text
    assert http.get("/v1/limits/api").json()["description"] == "old"
    done = http.post("/edit?name=api", data={**form, **given, "confirmed": "1"})
    assert (done.status_code, done.headers["location"]) == (303, "/limits/api")
    now = http.get("/v1/limits/api").json()
    assert (now["limit"], now["max_waiters"]) == (8, 5)
    assert (now["description"], now["slot_decay_per_second"]) == ("new", 2)
    assert "Nothing was changed" in http.post("/edit?name=api", data=form).text


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("limit", "", "Limit is missing"),
        ("limit", "-1", "Limit must be from 0 to 2,147,483,647, not -1"),
        ("limit", "99999999999", "Limit must be from 0 to 2,147,483,647, not 99,999,999,999"),
        ("limit", "1.5", "Limit must be a whole number"),
        ("slot_decay_per_second", "fast", "Slot decay per second must be a number"),
        ("slot_decay_per_second", "inf", "Slot decay per second must be a number"),
        ("slot_decay_per_second", "-1", "Slot decay per second must be from 0 to 1,000,000,000, not -1"),
        ("slot_decay_per_second", "1e-12", "Slot decay per second must be 0 or at least"),
        ("max_waiters", "-1", "Longest line must be from 0 to"),
        ("name", "a/b", "Name must"),
        ("name", "taken", "There is a limit named"),
        ("name", " taken", "has spaces that are hard to see"),
        ("description", "x" * 2001, "Description must be at most 2000"),
    ],
)
def test_a_form_that_is_wrong_comes_back_with_what_was_typed(
    http: httpx.Client, field: str, value: str, said: str
) -> None:
    http.post("/v1/limits", json={"name": "taken", "limit": 1})
    given = {"name": "fine", "limit": "3", field: value, "max_waiters": value if field == "max_waiters" else "77"}
    answer = http.post("/create", data=given)
    assert answer.status_code == 422
    assert said in html.unescape(answer.text)
    assert 'value="77"' in answer.text or field == "max_waiters"
    if value != "taken":
        wrong = re.findall(r'name="(\w+)"[^>]*aria-invalid', answer.text)
        assert wrong == [field]
    assert [each["name"] for each in http.get("/v1/limits").json()["limits"]] == ["taken"]


@pytest.mark.parametrize("odd", ["%00", "%FF", "%ED%A0%80", "x" * 3000, "%0A", "%E2%80%AE", "%27%22%3C"])
def test_what_nobody_would_ask_for_is_answered(http: httpx.Client, odd: str) -> None:
    http.post("/v1/limits", json={"name": "api", "limit": 1})
    for path in (
        f"/?q={odd}&sort={odd}&state={odd}&page={odd}",
        f"/limits/{odd}",
        f"/limits/api?key={odd}&span={odd}&holders={odd}",
        f"/limits?name={odd}",
        f"/events?name={odd}&kind={odd}&before={odd}",
        f"/history?name={odd}&span={odd}",
        f"/create?name={odd}",
        f"/edit?name={odd}",
        f"/reset?name=api&key={odd}",
        f"/release?lease={odd}&name={odd}",
        "/limits/api?holders=999999999999999999&waiters=99999&keys=0",
        "/events?before=99999999999999999999",
    ):
        assert http.get(path).status_code < 500, path
    for path in (f"/create?name={odd}", f"/edit?name={odd}", f"/delete?name={odd}", f"/reset?name=api&key={odd}"):
        answer = http.post(path, content=f"name={odd}&limit={odd}&description={odd}", headers=FORM)
        assert answer.status_code < 500, path


def test_forms_work_without_a_script(http: httpx.Client) -> None:
    made = http.post("/create", data={"name": "a b?", "limit": "2", "active": "1"})
    assert (made.status_code, made.headers["location"]) == (303, "/limits/a%20b%3F")
    assert http.get("/limits/a%20b%3F").status_code == 200
    assert http.post("/disable?name=a+b%3F").status_code == 303
    assert http.get("/v1/limits").json()["limits"][0]["active"] is False
    assert http.post("/delete?name=a+b%3F").status_code == 303
    for path in ("/edit", "/delete", "/reset", "/enable", "/disable"):
        assert http.get(f"{path}?name=a+b%3F").status_code == 404
    assert http.get("/release?lease=9a9e3c1e-0b52-4f0e-9d0a-5a3d1c2b4e6f").status_code == 404
    odd = http.get("/release?lease=nonsense")
    assert (odd.status_code, odd.headers["content-type"]) == (422, "text/html; charset=utf-8")
    assert "lease: Input should be a valid UUID" in odd.text


def test_a_name_with_spaces_at_its_ends_is_asked_about_and_shown_as_it_is(http: httpx.Client) -> None:
    given = {"name": " x ", "limit": "2"}
    assert "If they are meant" in http.post("/create", data=given).text
    assert http.get("/v1/limits").json()["limits"] == []
    assert http.post("/create", data={**given, "name": "y ", "spaced": " x "}).status_code == 422
    assert http.post("/create", data={**given, "spaced": " x "}).status_code == 303
    until(lambda: '<bdi class="spaced"> x </bdi>' in http.get("/").text, "for the list")
    assert '<h1><bdi class="spaced"> x </bdi></h1>' in http.get("/limits/%20x%20").text


def test_a_rate_limit_shows_one_number_and_the_bar_of_it(http: httpx.Client) -> None:
    http.post("/v1/limits", json={"name": "api", "limit": 5, "slot_decay_per_second": 0.000001})
    http.post("/v1/rate_limit", json={"name": "api", "slots": 4})

    def cell() -> str:
        return "".join(re.findall(r'<td[^>]*class="held".*?</td>', http.get("/").text, re.DOTALL))

    until(lambda: "<b>4</b> / 5<" in cell(), "for the list")
    assert re.search(r'class="level" width="(80.0|79.9)"', cell())


def test_more_slots_than_an_integer_has_are_held_over_all_keys(http: httpx.Client, shared_dsn: str) -> None:
    with psycopg.connect(shared_dsn, autocommit=True) as connection:
        connection.execute("select pglimits.create_limit('big', 2000000000)")
        connection.execute("select pglimits.acquire('big', 1900000000, 'k' || n) from generate_series(1, 3) n")
    until(lambda: "<b>5,700,000,000</b> / 2,000,000,000" in http.get("/").text, "for the list")


def test_a_rate_in_the_first_moment_of_a_limit_is_not_absurd(http: httpx.Client, shared_dsn: str) -> None:
    with psycopg.connect(shared_dsn, autocommit=True) as connection:
        connection.execute("select pglimits.create_limit('new', 5)")
        connection.execute("select pglimits.acquire('new')")
        connection.execute("select pglimits.sweep()")
    found = http.get("/history?name=new").json()
    assert max(value for value in found["grants"] if value is not None) == 0.1


@pytest.mark.parametrize("path", ["/nothing", "/limits/a/edit", "/v2/limits"])
def test_where_there_is_nothing_a_browser_gets_a_page_and_a_program_an_error(http: httpx.Client, path: str) -> None:
    seen = http.get(path, headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert (seen.status_code, seen.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "No page has this address" in seen.text
    for told in (
        http.get(path),
        http.post(path, headers={"Accept": "text/html"}),
        http.get(f"/v1{path}", headers={"Accept": "text/html"}),
        http.get(f"/api{path}", headers={"Accept": "text/html"}),
    ):
        assert (told.status_code, told.headers["content-type"]) == (404, "application/problem+json")


@pytest.mark.parametrize(
    ("reason", "blocked_by", "said"),
    [
        (
            "it needs 1 slot of 'a', and 2 of 2 are held",
            "a",
            ("it needs 1 slot of this limit, and 2 of 2 are held", None, ""),
        ),
        ("limit 'a' is shut: it has 0 slots", "a", ("this limit is shut: it has 0 slots", None, "")),
        (
            "it needs 1 slot of 'b's', and 2 of 2 are held",
            "b's",
            ("it needs 1 slot of ", "b's", ", and 2 of 2 are held"),
        ),
        ("", None, ("", None, "")),
    ],
)
def test_a_reason_names_only_other_limits(
    reason: str, blocked_by: str | None, said: tuple[str, str | None, str]
) -> None:
    assert _why(reason, blocked_by, "a") == said


def test_a_token_that_may_only_look_changes_nothing(guarded: Server) -> None:
    with guarded.client(FULL) as full, guarded.client(READ) as eyes, guarded.client() as nobody:
        full.post("/v1/limits", json={"name": "api", "limit": 3})
        assert "New limit" in full.get("/").text
        assert "New limit" not in eyes.get("/").text
        for path in ("/create", "/edit?name=api", "/disable?name=api", "/delete?name=api", "/reset?name=api"):
            assert eyes.get(path).status_code == 403
            assert eyes.post(path, data={"name": "x", "limit": "1"}).status_code == 403
            assert nobody.post(path).status_code == 401
        assert nobody.get("/news").status_code == 401
        assert nobody.get("/history?name=api").status_code == 401
        assert full.get("/v1/limits").json()["limits"][0]["limit"] == 3
        full.post("/disable?name=api")
        assert "ops" in full.get("/events").text


def test_events_tell_what_became_of_what_and_who_did_it(http: httpx.Client, shared_dsn: str) -> None:
    with psycopg.connect(shared_dsn, autocommit=True, application_name="a <b>test</b>") as connection:
        connection.execute("select pglimits.create_limit('api', 3), pglimits.update_limit('api', 4)")
    page = http.get("/events?name=api").text
    assert "a &lt;b&gt;test&lt;/b&gt;" in page
    assert re.search(r"<del>3</del>.*<ins>4</ins>", page)
    assert "<td" not in http.get("/events?name=apis").text
    assert "Nothing matches" in http.get("/events?name=api&kind=lost").text


def test_many_pages_of_one_limit_ask_the_database_once(
    serve: Callable[..., Server], server_dsn: str, conn: psycopg.Connection[Any]
) -> None:
    server = serve("--sweep-every", "0", on=server_dsn)
    with server.client() as http:
        http.post("/v1/limits", json={"name": "api", "limit": 3})
        began = time.monotonic()
        for _ in range(100):
            assert http.get("/limits/api").status_code == 200
        seconds = time.monotonic() - began
    server.terminate()
    # A connection that ends has told how many commits it made; one that goes on tells it when it likes.
    others = "select from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    until(lambda: not conn.execute(others).fetchall(), "for its connections to end")
    told = conn.execute("select xact_commit from pg_stat_database where datname = current_database()").fetchone()
    assert told is not None
    # Each page alone would take eight.
    assert 20 < told[0] < 200 + 40 * seconds
