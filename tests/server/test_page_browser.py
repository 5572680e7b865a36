"""The page in a real browser, on a real server, while others hold slots and wait."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import psycopg
import pytest
from pagetest import NAMES, NARROW, NASTY, WIDE, axe, browse, chromium, crowd, does_not_scroll, is_live, playwright
from proxy import Link, Proxy
from servertest import FULL, READ, Server, until

__all__ = ["browse", "chromium", "crowd"]
Browse = Callable[..., Any]
expect = playwright.expect if playwright else None


@pytest.fixture
def sql(shared_dsn: str) -> Iterator[Callable[..., list[Any]]]:
    """sql("select …", …): in the database that the shared servers serve."""
    with psycopg.connect(shared_dsn, autocommit=True) as connection:

        def run(query: str, *params: Any) -> list[Any]:
            cursor = connection.execute(query.encode(), params)
            return cursor.fetchall() if cursor.description else []

        yield run


def holds(sql: Callable[..., Any], name: str, holder: str = '"somebody"', key: str = "", slots: int = 1) -> str:
    lease = str(uuid4())
    found = sql(
        "select status from pglimits.acquire(%s, %s, %s, holder => %s::jsonb, lease_id => %s)",
        name,
        slots,
        key,
        holder,
        lease,
    )
    assert found == [("granted",)]
    return lease


def stay(sql: Callable[..., Any]) -> str:
    """The channel of a process that gives signs of life, whoever waits in it: for as long as a browser may take."""
    sql(
        "insert into pglimits.processes (channel, expires_at) values ('pglimits_page', now() + interval '1 hour')"
        " on conflict (channel) do update set expires_at = excluded.expires_at"
    )
    return "pglimits_page"


def waits(sql: Callable[..., Any], name: str, holder: str = '"another"', key: str = "") -> str:
    lease = str(uuid4())
    found = sql(
        "select status from pglimits.acquire(%s, 1, %s, timeout_seconds => null, holder => %s::jsonb, lease_id => %s,"
        " channel => %s)",
        name,
        key,
        holder,
        lease,
        stay(sql),
    )
    assert found == [("queued",)]
    return lease


def test_every_action_is_done_through_the_page_while_others_contend(
    shared: Server, sql: Any, browse: Browse, crowd: Any, shared_dsn: str
) -> None:
    tab = browse()
    tab.goto(f"{shared.url}/")
    expect(tab.get_by_text("No limits yet")).to_be_visible()
    is_live(tab)

    tab.get_by_role("link", name="New limit").click()
    tab.get_by_label("Name", exact=True).fill("crowded")
    tab.get_by_label("Limit", exact=True).fill("many")
    tab.get_by_role("button", name="Create").click()
    expect(tab.locator("#dialog .notice")).to_contain_text("a whole number")
    tab.get_by_label("Limit", exact=True).fill("2")
    tab.get_by_role("button", name="Create").click()
    expect(tab.get_by_role("heading", level=1)).to_have_text("crowded")
    expect(tab.locator("#toast")).to_have_text("Created crowded.")
    assert sql('select "limit", active from pglimits.limits') == [(2, True)]
    crowd(shared_dsn, "crowded")
    expect(tab.locator("#holders-title .tally")).not_to_have_text("0")

    # Edit: two steps; only what was changed is written, so what somebody else changes meanwhile stays.
    tab.get_by_role("link", name="Edit").click()
    tab.get_by_label("Limit", exact=True).fill("1")
    sql("select pglimits.update_limit('crowded', max_waiters => 77)")
    tab.get_by_role("button", name="Review").click()
    expect(tab.locator(".changes")).to_contain_text(re.compile(r"limit\s*2.*1"))
    expect(tab.locator(".hit")).to_contain_text("in line")
    tab.get_by_role("button", name="Back").click()
    expect(tab.get_by_label("Limit", exact=True)).to_have_value("1")
    tab.get_by_role("button", name="Review").click()
    tab.get_by_role("button", name="Change", exact=True).click()
    expect(tab.locator("#toast")).to_have_text("Changed crowded.")
    assert sql('select "limit", max_waiters from pglimits.limits') == [(1, 77)]
    expect(tab.locator(".huge")).to_contain_text("of 1 held")

    tab.get_by_role("link", name="Disable").click()
    expect(tab.locator("#dialog")).to_contain_text("Those in line go on at once")
    tab.locator("#dialog").get_by_role("button", name="Disable").click()
    expect(tab.locator(".summary .chip")).to_have_text("off")
    tab.get_by_role("link", name="Enable").click()
    tab.locator("#dialog").get_by_role("button", name="Enable").click()
    expect(tab.locator(".summary .chip")).not_to_have_text("off")
    assert sql("select active from pglimits.limits") == [(True,)]

    # One that holds a slot for long, and one that waits behind it.
    sql("select pglimits.update_limit('crowded', 1000)")
    holder = holds(sql, "crowded", '"the one to release"')
    sql("select pglimits.update_limit('crowded', 1)")
    tab.locator(f"#release-{holder}").click()
    expect(tab.locator("#dialog")).to_contain_text("the one to release")
    tab.locator("#dialog").get_by_role("button", name="Release").click()
    expect(tab.locator("#toast")).to_have_text("Released.")
    expect(tab.locator(f"#lease-{holder}")).to_have_count(0)
    assert sql("select 1 from pglimits.holders where lease_id = %s", holder) == []

    sql("select pglimits.update_limit('crowded', 0)")
    expect(tab.locator(".summary .chip")).to_have_text("shut")
    sql("select pglimits.update_limit('crowded', 1)")
    stays = holds(sql, "crowded", '"the one to reset"', key="mine")
    waiter = waits(sql, "crowded", '"the one to remove"', key="mine")
    tab.locator(f"#release-{waiter}").click()
    expect(tab.locator("#dialog")).to_contain_text("out of the line")
    tab.locator("#dialog").get_by_role("button", name="Remove").click()
    expect(tab.locator(f"#lease-{waiter}")).to_have_count(0)

    tab.get_by_role("link", name="Reset", exact=True).click()
    expect(tab.locator(".hit")).to_be_visible()
    tab.locator("#dialog").get_by_role("button", name="Reset").click()
    expect(tab.locator("#toast")).to_contain_text("Reset crowded")
    assert sql("select 1 from pglimits.holders where lease_id = %s", stays) == []

    tab.get_by_role("link", name="Delete").click()
    tab.locator("#dialog").get_by_role("button", name="Delete").click()
    expect(tab.locator("#toast")).to_have_text("Deleted crowded.")
    expect(tab.get_by_text("No limits yet")).to_be_visible()
    assert sql("select name from pglimits.limits") == []

    tab.get_by_role("link", name="Events", exact=True).click()
    for kind in ("created", "updated", "force-released", "reset", "deleted"):
        expect(tab.locator("td.kind", has_text=kind).first).to_be_visible()
    tab.locator(".states").get_by_role("link", name="deleted").click()
    expect(tab.locator("td.kind", has_text="created")).to_have_count(0)
    assert "kind=deleted" in tab.url


def test_everything_can_be_done_by_keyboard_alone(shared: Server, sql: Any, browse: Browse) -> None:
    sql("select pglimits.create_limit('first', 2), pglimits.create_limit('second', 2)")
    tab = browse()
    tab.goto(f"{shared.url}/")
    is_live(tab)

    def tab_to(selector: str) -> None:
        for _ in range(60):
            tab.keyboard.press("Tab")
            if tab.evaluate("selector => document.activeElement?.matches(selector)", selector):
                outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", selector
                return
        raise AssertionError(f"no Tab leads to {selector}")

    tab_to(".skip")
    tab_to("#q")
    tab.keyboard.type("second")
    expect(tab.locator("td.name")).to_have_text(["second"])
    tab_to("td.name a")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("heading", level=1)).to_have_text("second")
    tab_to("#edit")
    tab.keyboard.press("Enter")
    expect(tab.locator("#dialog")).to_be_visible()
    tab.keyboard.press("Escape")
    expect(tab.locator("#dialog")).to_be_hidden()
    assert tab.evaluate("document.activeElement.id") == "edit"
    tab_to("#delete")
    tab.keyboard.press("Enter")
    expect(tab.locator("#dialog")).to_be_visible()
    tab_to("#dialog button.danger")
    tab.keyboard.press("Enter")
    expect(tab.locator("td.name")).to_have_text(["first"])
    assert sql("select name from pglimits.limits") == [("first",)]


def test_focus_and_text_survive_news(shared: Server, sql: Any, browse: Browse) -> None:
    sql("select pglimits.create_limit('l' || n, 5) from generate_series(1, 9) n")
    tab = browse()
    tab.goto(f"{shared.url}/")
    is_live(tab)
    marked = tab.evaluate("document.querySelectorAll('td.name').forEach(each => each.marked = true) ?? true")
    assert marked

    # A link that has the focus keeps it while its row moves up.
    last = tab.locator("td.name a", has_text="l9")
    last.focus()
    holds(sql, "l9")
    expect(tab.locator("td.name").first).to_have_text("l9")
    assert tab.evaluate("document.activeElement.textContent") == "l9"
    assert tab.evaluate("document.activeElement.closest('td').marked"), "the row was made anew instead of moved"

    # A field that is written in keeps its text and its cursor; so does a dialog.
    tab.locator("#q").press_sequentially("l")
    tab.keyboard.press("ArrowLeft")
    holds(sql, "l5")
    expect(tab.locator("tr", has_text="l5").locator(".figure b")).to_have_text("1")
    tab.keyboard.type("x")
    assert tab.locator("#q").input_value() == "xl"
    expect(tab.get_by_text("Nothing matches")).to_be_visible()
    tab.locator("#q").fill("")
    tab.get_by_role("link", name="New limit").click()
    tab.get_by_label("Name", exact=True).fill("half a na")
    holds(sql, "l6")
    expect(tab.locator("tr", has_text="l6").locator(".figure b")).to_have_text("1")
    tab.keyboard.type("me")
    assert tab.get_by_label("Name", exact=True).input_value() == "half a name"
    tab.keyboard.press("Escape")

    # Where what had the focus is gone, its section has it.
    tab.goto(f"{shared.url}/limits/l9")
    is_live(tab)
    lease = str(sql("select lease_id from pglimits.holders where name = 'l9'")[0][0])
    tab.locator(f"#release-{lease}").focus()
    sql("select pglimits.release(%s)", lease)
    expect(tab.locator(f"#lease-{lease}")).to_have_count(0)
    assert tab.evaluate("document.activeElement.id") == "holders-title"


def test_news_come_without_a_reload_and_can_be_paused(shared: Server, sql: Any, browse: Browse) -> None:
    sql("select pglimits.create_limit('gpu', 1)")
    tab = browse()
    tab.goto(f"{shared.url}/limits/gpu")
    is_live(tab)
    tab.evaluate("window.same = true")
    lease = holds(sql, "gpu", '"a holder"')
    expect(tab.locator("td.who")).to_contain_text("a holder")
    waiting = waits(sql, "gpu", '"a waiter"')
    row = tab.locator(f"#lease-{waiting}")
    expect(row).to_contain_text("a waiter")
    expect(row.locator(".why")).not_to_have_text("–")  # noqa: RUF001
    waited = row.locator("time[data-since]")
    before = waited.text_content()
    expect(waited).not_to_have_text(before or "")  # counts on by itself

    tab.get_by_role("button", name="Pause").click()
    expect(tab.locator("#live-word")).to_have_text("paused")
    tab.reload()
    # Not wait_for_function, which may evaluate a text in the page: its policy forbids that.
    until(lambda: tab.evaluate("document.getElementById('stream')._htmx?.sse?.lastEventId"), "for the stream to begin")
    tab.evaluate("document.dispatchEvent(new CustomEvent('look'))")
    expect(tab.locator("#live-word")).to_have_text("paused")  # that is no news
    tab.evaluate("window.same = true")
    sql("select pglimits.release(%s)", lease)
    expect(tab.locator("#live-word")).to_have_text("paused, there is news")
    expect(tab.locator(f"#lease-{lease}")).to_have_count(1)
    tab.get_by_role("button", name="Resume").click()
    expect(tab.locator(f"#lease-{lease}")).to_have_count(0)
    assert tab.evaluate("window.same"), "the page was loaded anew"


def test_the_focus_in_a_dialog_goes_on_to_what_comes_next(shared: Server, sql: Any, browse: Browse) -> None:
    sql("select pglimits.create_limit('gpu', 1)")
    tab = browse()
    tab.goto(f"{shared.url}/limits/gpu")
    is_live(tab)
    tab.get_by_role("link", name="Edit").click()
    expect(tab.locator("#f-limit")).to_be_focused()
    tab.keyboard.type("x")
    tab.keyboard.press("Enter")
    expect(tab.locator("#form-error")).to_contain_text("must be a whole number")
    expect(tab.locator("#f-limit")).to_be_focused()
    tab.locator("#f-limit").fill("3")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("button", name="Change", exact=True)).to_be_focused()
    tab.keyboard.press("Enter")
    expect(tab.locator("#toast")).to_have_text("Changed gpu.")
    assert sql('select "limit" from pglimits.limits') == [(3,)]
    tab.get_by_role("link", name="Delete").click()
    expect(tab.locator("#dialog").get_by_role("link", name="Cancel")).to_be_focused()


def test_names_that_are_long_or_have_spaces_and_short_keys_are_shown_well(
    shared: Server, sql: Any, browse: Browse
) -> None:
    long = "x" * 200
    sql("select pglimits.create_limit(%s, 2000000000), pglimits.create_limit(' a', 1)", long)
    holds(sql, long, slots=1_999_999_999)
    holds(sql, long, key="k", slots=2_000_000_000)
    waits(sql, long, key="k")
    tab = browse()

    def lines(locator: str) -> float:
        return float(
            tab.locator(locator).first.evaluate(
                "each => each.getBoundingClientRect().height / parseFloat(getComputedStyle(each).lineHeight)"
            )
        )

    for viewport in (WIDE, {"width": 800, "height": 900}, NARROW):
        tab.set_viewport_size(viewport)
        tab.goto(f"{shared.url}/")
        assert lines("td.name a:has-text('xxx')") < 3.5
        assert tab.locator("td.name bdi[title]").get_attribute("title") == long
        shown = "each => getComputedStyle(each, '::before').content"
        assert '"' in tab.locator("td.name bdi.spaced").evaluate(shown)
        does_not_scroll(tab)
        tab.goto(f"{shared.url}/events")
        assert lines("td.name a:has-text('xxx')") < 3.5
        assert long not in (tab.locator("td.details").first.text_content() or "")
        tab.goto(f"{shared.url}/limits/{long}")
        assert lines("td.key-of .key") < 1.5
        assert tab.locator("td.key-of .key").first.text_content() == "''"
        expect(tab.locator("td.why")).to_contain_text("It needs 1 slot of this limit")
        does_not_scroll(tab)


def test_without_a_script_there_is_nothing_that_needs_one(shared: Server, sql: Any, browse: Browse) -> None:
    sql("select pglimits.create_limit('gpu', 1)")
    tab = browse(java_script_enabled=False)
    tab.goto(f"{shared.url}/limits/gpu")
    expect(tab.get_by_role("heading", level=1)).to_have_text("gpu")
    for needs_it in ("#charts", "#live-state", "#pause"):
        expect(tab.locator(needs_it)).to_be_hidden()
    tab.get_by_role("link", name="Edit").click()
    expect(tab.get_by_role("button", name="Review")).to_be_visible()


def test_any_characters_are_shown_and_never_run(shared: Server, sql: Any, browse: Browse) -> None:
    for number, name in enumerate(NAMES):
        sql("select pglimits.create_limit(%s, 3, description => %s)", name, NASTY[number % len(NASTY)])
        for text in NASTY[number % 3 :: 3]:
            holds(sql, name, json.dumps({"program": text, text: text}), key=text)
    tab = browse()
    tab.goto(f"{shared.url}/")
    assert sorted(tab.locator("td.name a bdi").all_text_contents()) == sorted(NAMES)
    for name in NAMES[2:]:
        tab.goto(f"{shared.url}/?q={quote(name)}&sort=name")
        tab.locator("td.name a", has=tab.locator("bdi").get_by_text(name, exact=True)).first.click()
        expect(tab.locator("h1 bdi")).to_have_text(name)
        assert tab.title().startswith(" ".join(name.split()))
        expect(tab.locator("#holders-title .tally")).not_to_have_text("0")
    tab.goto(f"{shared.url}/limits/{quote(NAMES[0])}")
    shown = " ".join(tab.locator("td.who").all_text_contents())
    assert NASTY[0] in shown
    tab.locator("td.key-of a", has_text=NASTY[3][:10]).first.click()
    expect(tab.locator(".filtered .key")).to_have_text(NASTY[3])
    expect(tab.locator("#holders-title .tally")).to_have_text("1")
    tab.get_by_role("link", name="Release").first.click()
    expect(tab.locator("#dialog")).to_contain_text(NASTY[3])


def test_every_view_is_accessible_light_and_dark_and_fits_a_narrow_screen(
    shared: Server, sql: Any, browse: Browse
) -> None:
    sql("select pglimits.create_limit('api', 5, 0.5, description => 'of the contract')")
    sql("select pglimits.create_limit('x' || repeat('y', 150), 1), pglimits.create_limit('off', 1, active => false)")
    sql("select pglimits.create_limit('shut', 0), pglimits.create_limit('keyed', 1), pglimits.create_limit('idle', 1)")
    sql("select pglimits.create_limit('gone', 1), pglimits.delete_limit('gone')")
    sql("select pglimits.rate_limit('api', 3)")
    for key in ("", "a", "b" * 60):
        holds(sql, "keyed", '{"host": "h", "program": "p' + "q" * 90 + '"}', key=key)
    waits(sql, "keyed")
    holds(sql, "x" + "y" * 150)
    tab = browse()
    tab.expected = ["404"]

    def look() -> None:
        tab.set_viewport_size(WIDE)
        axe(tab)
        tab.emulate_media(color_scheme="dark")
        axe(tab, "color-contrast")
        tab.emulate_media(color_scheme="light")
        tab.set_viewport_size(NARROW)
        does_not_scroll(tab)

    long = f"/limits/x{'y' * 150}"
    for path in ("/", "/?q=nothing", "/limits/keyed", "/limits/api", "/limits/nope", "/events", long):
        tab.goto(shared.url + path)
        expect(tab.locator("#live")).to_be_visible()
        look()
    for path in ("/create", "/edit?name=keyed", "/delete?name=keyed"):
        tab.goto(shared.url + path)
        look()
    tab.goto(f"{shared.url}/limits/keyed")
    axe(tab)
    tab.get_by_role("link", name="Reset").click()
    expect(tab.locator("#dialog form")).to_be_visible()
    look()


def test_ten_thousand_limits_are_filtered_sorted_and_paged_on_the_server(
    shared: Server, sql: Any, browse: Browse
) -> None:
    sql("select pglimits.create_limit('limit-' || lpad(n::text, 5, '0'), 5) from generate_series(1, 10000) n")
    holds(sql, "limit-07777")
    tab = browse()
    tab.goto(f"{shared.url}/")
    expect(tab.locator("td.name").first).to_have_text("limit-07777")  # the busiest
    assert tab.locator("tbody tr").count() == 50
    expect(tab.locator(".counted")).to_contain_text("of 10,000")
    tab.get_by_role("link", name="Next").click()
    expect(tab.locator(".counted")).to_contain_text("51")
    assert "page=2" in tab.url
    tab.locator("#q").fill("LIMIT-0999")
    expect(tab.locator("tbody tr")).to_have_count(10)
    assert "q=LIMIT-0999" in tab.url
    assert "page" not in tab.url
    tab.get_by_role("link", name="Name", exact=True).click()
    expect(tab.locator("th[aria-sort=ascending]")).to_have_text(re.compile("Name"))
    tab.get_by_role("link", name=re.compile("Name")).click()
    expect(tab.locator("td.name").first).to_have_text("limit-09999")
    tab.go_back()
    expect(tab.locator("td.name").first).to_have_text("limit-09990")
    tab.reload()
    expect(tab.locator("td.name").first).to_have_text("limit-09990")
    expect(tab.locator("#q")).to_have_value("LIMIT-0999")
    tab.locator("#q").fill("")
    tab.locator(".states").get_by_role("link", name="active").click()
    expect(tab.locator("td.name")).to_have_text(["limit-07777"])


def test_charts_show_the_history_under_one_cursor(serve: Any, connect: Any, clock: Any, browse: Browse) -> None:
    connection = connect()
    connection.execute("select pglimits.create_limit('api', 3)")
    clock.advance(-2400)
    for held in range(40):
        if held % 2:
            connection.execute("select pglimits.acquire('api', lease_duration => 90)")
        connection.execute("select pglimits.sweep()")
        clock.advance(60)
    tab = browse()
    tab.goto(f"{serve('--sweep-every', '0').url}/limits/api")
    expect(tab.locator(".chart canvas")).to_have_count(4)
    assert "held" in (tab.locator("#chart-held canvas").get_attribute("aria-label") or "")
    box = tab.locator("#chart-held .u-over").bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    times = tab.locator(".u-legend .u-series:first-child .u-value")
    expect(times.first).to_have_text(re.compile(r"\d\d:\d\d:\d\d"))
    assert len(set(times.all_text_contents())) == 1
    tab.get_by_role("link", name="week").click()
    expect(times.first).to_have_text("now")
    assert "span=week" in tab.url


def test_a_request_over_several_limits_names_the_one_that_it_waits_for(
    shared: Server, sql: Any, browse: Browse
) -> None:
    sql("select pglimits.create_limit('gpu', 1), pglimits.create_limit('licence', 1)")
    holds(sql, "licence")
    both = "select pglimits.acquire_all('{gpu,licence}', timeout_seconds => null, holder => '\"both\"', channel => %s)"
    sql(both, stay(sql))
    tab = browse()
    tab.goto(f"{shared.url}/limits/gpu")
    row = tab.locator("tr", has_text="both")
    expect(row).to_contain_text("licence")
    row.get_by_role("link", name="licence").click()
    expect(tab.locator("tr", has_text="both").locator(".why")).to_contain_text("It needs 1 slot")


def test_a_database_that_is_gone_is_said_with_since_when_and_comes_back_by_itself(
    serve: Any, server_dsn: str, connect: Any, browse: Browse
) -> None:
    with Proxy(server_dsn) as proxy:
        connection = connect()
        connection.execute("select pglimits.create_limit('steady', 3)")
        served = serve(on=proxy.dsn)
        tab = browse()
        tab.expected = ["503", "404"]
        tab.goto(f"{served.url}/")
        is_live(tab)
        other = browse()
        other.expected = ["503"]
        other.goto(f"{served.url}/limits/steady")
        is_live(other)
        other.get_by_role("link", name="Edit").click()
        other.get_by_label("Limit", exact=True).fill("7")
        proxy.refuses = True
        proxy.each(Link.cut)
        for each in (tab, other):
            expect(each.locator("#down")).to_contain_text("The database cannot be reached since")
            expect(each.locator("#live-word")).to_have_text("no database")
            expect(each.locator("#live-state")).to_have_attribute("data-kind", "lost")
        other.get_by_role("button", name="Review").click()
        expect(other.locator("#form-error")).to_contain_text("The database cannot be reached")
        expect(other.get_by_label("Limit", exact=True)).to_have_value("7")
        other.keyboard.press("Escape")
        for name in ("Edit", "Disable", "Reset", "Delete"):
            other.get_by_role("link", name=name).click()
            expect(other.locator("#dialog")).to_contain_text("The database cannot be reached")
            other.locator("#dialog").get_by_role("link", name="Close").click()
            expect(other.locator("#dialog")).to_be_hidden()
        for each in (tab, other):
            expect(each.get_by_text("steady").first).to_be_visible()
        fresh = browse()
        fresh.expected = ["503"]
        fresh.goto(f"{served.url}/events")
        expect(fresh.locator("#down")).to_be_visible()
        proxy.refuses = False
        for each in (tab, other, fresh):
            expect(each.locator("#down")).to_have_count(0)
        is_live(tab)
        connection.execute("select pglimits.acquire('steady')")
        expect(tab.locator(".figure b")).to_have_text("1")


def test_a_server_that_ends_and_comes_back_is_found_again(serve: Any, connect: Any, browse: Browse) -> None:
    connect().execute("select pglimits.create_limit('steady', 3)")
    served = serve()
    tab = browse()
    tab.expected = ["ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET", "htmx"]
    tab.goto(f"{served.url}/")
    is_live(tab)
    served.terminate()
    expect(tab.locator("#lost")).to_be_visible()
    tab.get_by_role("link", name="New limit").click()
    expect(tab.locator("#toast")).to_contain_text("There was no answer")
    expect(tab.locator("#dialog")).to_be_hidden()
    serve("--port", str(served.port))
    expect(tab.locator("#lost")).to_be_hidden(timeout=20000)
    connect().execute("select pglimits.acquire('steady')")
    expect(tab.locator(".figure b")).to_have_text("1")


def test_the_page_works_under_a_prefix(serve: Any, connect: Any, browse: Browse) -> None:
    connect().execute("select pglimits.create_limit('here', 3)")
    served = serve("--root-path", "/some/where")
    tab = browse()
    tab.goto(f"{served.url}/")
    is_live(tab)
    tab.get_by_role("link", name="here").click()
    expect(tab.get_by_role("heading", level=1)).to_have_text("here")
    is_live(tab)
    tab.get_by_role("link", name="Disable").click()
    tab.locator("#dialog").get_by_role("button", name="Disable").click()
    expect(tab.locator(".summary .chip")).to_have_text("off")
    tab.get_by_role("link", name="day").click()
    assert "/some/where/limits/here?span=day" in tab.url
    tab.get_by_role("link", name="Events", exact=True).click()
    expect(tab.locator("td.kind").first).to_have_text("updated")


def test_a_token_signs_in_and_one_that_may_only_look_sees_no_action(guarded: Server, sql: Any, browse: Browse) -> None:
    sql("select pglimits.create_limit('api', 5)")
    tab = browse()
    tab.goto(f"{guarded.url}/limits/api")
    assert "/login" in tab.url
    axe(tab)
    tab.get_by_label("Token").fill("guessed")
    tab.get_by_role("button", name="Sign in").click()
    expect(tab.get_by_role("alert")).to_contain_text("not known")
    tab.get_by_label("Token").fill(READ)
    tab.get_by_role("button", name="Sign in").click()
    expect(tab.get_by_role("heading", level=1)).to_have_text("api")
    is_live(tab)
    expect(tab.get_by_role("link", name="Edit")).to_have_count(0)
    tab.expected = ["403"]
    tab.goto(f"{guarded.url}/delete?name=api")
    expect(tab.get_by_text("You may not do that")).to_be_visible()
    tab.goto(f"{guarded.url}/limits/api")
    is_live(tab)
    tab.context.clear_cookies()
    sql("select pglimits.update_limit('api', 6)")
    expect(tab.get_by_label("Token")).to_be_visible()
    assert "next=%2Flimits%2Fapi" in tab.url
    tab.get_by_label("Token").fill(READ)
    tab.get_by_role("button", name="Sign in").click()
    expect(tab.locator(".huge")).to_contain_text("of 6 held")
    tab.get_by_role("button", name="Sign out").click()
    tab.get_by_label("Token").fill(FULL)
    tab.get_by_role("button", name="Sign in").click()
    tab.get_by_role("link", name="api").click()
    tab.get_by_role("link", name="Delete").click()
    tab.locator("#dialog").get_by_role("button", name="Delete").click()
    expect(tab.get_by_text("No limits yet")).to_be_visible()
    assert sql("select name from pglimits.limits") == []
