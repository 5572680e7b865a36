"""pglimits top: every key and every action, on a real database, by Textual's pilot; and once on a terminal."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from clitest import Terminal
from documents import blocks
from pglimits_cli._top_app import Top
from pglimits_cli._top_limit import LimitScreen
from psycopg.conninfo import make_conninfo

Connection = psycopg.Connection[Any]
Cli = Callable[..., Any]


class Screen:
    """The app and its pilot."""

    def __init__(self, app: Top, pilot: Any) -> None:
        self.app, self.pilot = app, pilot

    @property
    def lines(self) -> list[str]:
        """What is shown, line by line."""
        strips = self.app.screen._compositor.render_strips()
        return [strip.text.rstrip() for strip in strips]

    @property
    def text(self) -> str:
        """All of it, and what is told in passing, which may be folded there."""
        return "\n".join([*self.lines, *(toast.message for toast in self.app._notifications)])

    def names(self) -> list[str]:
        """The first words of the table's rows."""
        lines = self.lines
        heads = [nth for nth, line in enumerate(lines) if "Held/limit" in line]
        return [line.split()[0] for line in lines[heads[0] + 1 : -1] if line.strip()] if heads else []

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)

    async def type(self, text: str) -> None:
        await self.pilot.press(*text)

    async def until(self, *texts: str, gone: str | None = None) -> str:
        """Wait until all this is shown, and that is not."""
        return await self.when(
            lambda: all(text in self.text for text in texts) and (gone is None or gone not in self.text), (texts, gone)
        )

    async def when(self, condition: Callable[[], object], what: object = "") -> str:
        async with asyncio.timeout(20):
            try:
                while not condition():
                    await self.pilot.pause(0.02)
            except asyncio.CancelledError:
                raise AssertionError(f"in vain: {what}\n{self.text}") from None
        return self.text


def show(dsn: str, test: Callable[[Screen], Awaitable[None]], size: tuple[int, int] = (80, 24), **options: Any) -> Top:
    """Run the app until a test is through with it."""

    async def main() -> Top:
        app = Top(dsn, **{"every": 0.1, **options})
        async with app.run_test(size=size, notifications=True) as pilot:
            await test(Screen(app, pilot))
        return app

    return asyncio.run(main())


@pytest.fixture
def busy(conn: Connection, clock: Any) -> UUID:
    """Limits in every state; and a lease of ``database``, for whose slots two requests wait. Time stands still."""
    clock.freeze()
    for name, limit, more in (
        ("api", 5, "slot_decay_per_second => 0.001"), ("closed", 0, "0"), ("database", 2, "description => 'Orders'"),
        ("nobody", 3, "0"), ("roomy", 10, "0"), ("tenant", 1, "0"), ("off", 4, "active => false"),
    ):  # fmt: skip
        conn.execute(f"select pglimits.create_limit('{name}', {limit}, {more})".encode())
    lease = uuid4()
    take = (
        "select pglimits.acquire(%s, slots => %s, key => %s, lease_id => %s, holder => %s::jsonb,"
        " timeout_seconds => 60)"
    )
    conn.execute("select pglimits.rate_limit('api', 5)")
    conn.execute(take.encode(), ["database", 2, "", lease, '{"program": "loader.py", "pid": 17, "host": "worker-1"}'])
    conn.execute(take.encode(), ["roomy", 4, "", uuid4(), None])
    for key in ("a", "b", "c"):
        conn.execute(take.encode(), ["tenant", 1, key, uuid4(), None])
    for program in ("first.py", "second.py"):
        conn.execute(take.encode(), ["database", 1, "", uuid4(), f'{{"program": "{program}"}}'])
    return lease


def one(conn: Connection, query: str, *params: Any) -> Any:
    row = conn.execute(query.encode(), params).fetchone()
    return row if row is None or len(row) > 1 else row[0]


@pytest.mark.usefixtures("busy")
def test_the_document_shows_the_screen_as_it_is(dsn: str) -> None:
    (shown,) = blocks("docs/terminal.md", "text")
    title, summary, heads, *rows, keys = shown.code.splitlines()
    states = {"backlogged", "at capacity", "active", "idle", "off", "shut"}

    async def test(screen: Screen) -> None:
        text = await screen.until("busiest first", "backlogged", "Quit")
        lines = [line.split() for line in text.splitlines()]
        assert heads.split() in lines
        assert keys.split() in lines
        assert set(re.findall("|".join(states), "\n".join(rows))) == set(re.findall("|".join(states), text)) == states
        assert summary.split("·")[1].strip() in text
        assert len(rows) == int(summary.split()[0])
        assert title.split()[:2] == text.split()[:2] == ["pglimits", "top"]

    show(dsn, test)


@pytest.mark.usefixtures("busy")
def test_every_limit_has_its_state_and_the_busiest_come_first(dsn: str) -> None:
    async def test(screen: Screen) -> None:
        await screen.until("7 limits · busiest first", "backlogged", "Open", "Quit")
        assert screen.names()[0] == "database"
        rows = {line.split()[0]: line for line in screen.lines if line.strip()}
        for name, words in {
            "database": ("████████", "2/2", "2", "backlogged"), "api": ("████████", "0/5", "5", "at capacity"),
            "tenant": ("3/1×3", "at capacity"), "roomy": ("███▎····", "4/10", "active"),  # noqa: RUF001
            "nobody": ("········", "0/3", "idle"), "closed": ("0/0", "shut"), "off": ("0/4", "off"),
        }.items():  # fmt: skip
            assert all(word in rows[name] for word in words), rows[name]
        assert all(len(line) <= 80 for line in screen.lines)

    show(dsn, test)


@pytest.mark.usefixtures("busy")
def test_a_wide_screen_has_the_reason_and_the_last_hour(dsn: str) -> None:
    async def test(screen: Screen) -> None:
        await screen.until("because", "Last hour", "2 waiting, the oldest for", "not enforced")
        await screen.pilot.resize_terminal(80, 24)
        await screen.until("7 limits", "backlogged", gone="because")
        await screen.pilot.resize_terminal(160, 24)
        await screen.until(
            "every slot is held in 3 keys", "no whole slot is left, 0.001/s", "nobody gets in", "6 of 10 slots free"
        )

    show(dsn, test, (160, 40))


@pytest.mark.usefixtures("busy")
def test_sorting_by_key_and_by_mouse(dsn: str, conn: Connection, clock: Any) -> None:
    async def test(screen: Screen) -> None:
        await screen.until("busiest first", "backlogged")
        first = {
            "by name": "api", "most held first": "roomy", "most level first": "api", "most waiting first": "database",
            "longest wait first": "database", "fastest first": "nobody", "most limit first": "roomy",
        }  # fmt: skip
        for words, name in first.items():
            await screen.press("s")
            await screen.until(f"7 limits · {words}")
            if words == "fastest first":
                conn.execute("select count(pglimits.acquire('nobody')) from generate_series(1, 3)")
                clock.advance(1)
            await screen.when(lambda name=name: screen.names()[:1] == [name], (words, name))
        await screen.press("S")
        await screen.until("fastest first")
        await screen.press("s", "s")
        await screen.until("busiest first")
        await screen.pilot.click("#limits", offset=(3, 0))
        await screen.until("by name")
        await screen.pilot.click("#limits", offset=(3, 0))
        await screen.until("busiest first")

    show(dsn, test)


@pytest.mark.usefixtures("busy")
def test_the_filter_is_part_of_a_name_and_no_pattern(dsn: str, conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('100_x', 1)")

    async def test(screen: Screen) -> None:
        await screen.until("8 limits")
        await screen.press("slash")
        await screen.type("DATAq")
        await screen.until("0 limits", "with 'DATAq' in the name")
        await screen.press("backspace")
        await screen.until("1 limit ", "with 'DATA' in the name")
        assert screen.names() == ["database", "DATA"]
        await screen.press("enter", "e")
        await screen.until("Disable limit 'database'?")
        await screen.press("n", "slash", *["backspace"] * 4, "0", "_")
        await screen.until("1 limit ", "100_x")
        await screen.press("escape")
        await screen.until("8 limits", gone="in the name")
        await screen.press("p")
        await screen.until("paused")

    show(dsn, test)


def test_pages_are_asked_for_one_by_one(dsn: str, conn: Connection) -> None:
    conn.execute(
        "select pglimits.create_limit(format('limit-%s', lpad(n::text, 3, '0')), 1) from generate_series(1, 90) n"
    )

    async def test(screen: Screen) -> None:
        await screen.until("1 to 20 of 90 limits", "limit-020", gone="limit-021")
        page: Any = screen.app.screen
        await screen.press(*["down"] * 20)
        await screen.until("21 to 40 of 90", "limit-040")
        assert page.page.at == "limit-021"
        await screen.press("up")
        await screen.until("1 to 20 of 90")
        await screen.when(lambda: page.page.at == "limit-020")
        await screen.press("pagedown")
        await screen.until("21 to 40 of 90")
        await screen.when(lambda: page.page.at == "limit-040")
        await screen.press("end")
        await screen.until("81 to 90 of 90")
        await screen.when(lambda: page.page.at == "limit-090")
        await screen.press("pagedown", "pageup")
        await screen.until("61 to 80 of 90")
        conn.execute("select pglimits.delete_limit(name) from pglimits.limits where name > 'limit-030'")
        await screen.until("1 to 20 of 30")
        await screen.press("pagedown")
        await screen.until("21 to 30 of 30")
        await screen.press("home")
        await screen.until("1 to 20 of 30")
        await screen.when(lambda: page.page.at == "limit-001")
        await screen.pilot.resize_terminal(80, 40)
        await screen.until("30 limits", "limit-030")

    show(dsn, test)


def test_no_limits_are_no_table_but_a_hint(dsn: str) -> None:
    async def test(screen: Screen) -> None:
        await screen.until("No limits yet: pglimits create NAME --limit 10")
        await screen.press("enter", "e", "down", "end")
        await screen.until("No limits yet")

    show(dsn, test)


def test_a_limit_shows_its_holders_its_queue_with_the_reasons_and_its_keys(dsn: str, busy: UUID) -> None:
    async def test(screen: Screen) -> None:
        await screen.until("backlogged")
        await screen.press("enter")
        await screen.until("database  backlogged: 2 waiting", "2 slots · Orders", "2 held · 2 waiting")
        await screen.until("1 Holders 1", "2 Queue 2", "3 Keys 1", "loader.py (pid 17) on worker-1", f"lease {busy}")
        await screen.press("tab")
        await screen.until("Place", "first.py", "second.py", "request ")
        await screen.when(lambda: "'database'" in screen.lines[-4], "the reason, in the lines below")
        await screen.press("down")
        await screen.when(lambda: "second.py" in screen.lines[-3])
        await screen.press("3")
        await screen.until("''", "Fence", "the key without a name")
        await screen.press("1")
        await screen.until("Holder", "Left")
        await screen.press("shift+tab")
        await screen.until("Waiting", "Fence")
        await screen.press("2")
        await screen.until("Place")
        await screen.press("escape")
        await screen.until("7 limits")
        await screen.press("slash", "t", "e", "n", "enter")
        await screen.until("1 limit ")
        await screen.press("enter")
        await screen.until("tenant  at capacity", "1 slot, for each of 3 keys", "Key")
        await screen.press("backspace")
        await screen.until("1 limit ")

    show(dsn, test)


@pytest.mark.usefixtures("busy")
def test_a_wide_screen_shows_why_each_request_waits_and_every_lease(dsn: str) -> None:
    async def test(screen: Screen) -> None:
        await screen.until("backlogged")
        await screen.press("enter")
        await screen.until("Lease", "Fence", "loader.py (pid 17) on worker-1")
        await screen.press("2")
        await screen.until("Why it waits", "first.py")

    show(dsn, test, (160, 40))


def test_lists_of_a_limit_have_pages(dsn: str, conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('wide', 100)")
    conn.execute(
        "select count(pglimits.acquire('wide', holder => to_jsonb(format('holder-%s.', n))))"
        " from generate_series(1, 40) n"
    )

    async def test(screen: Screen) -> None:
        await screen.until("40/100")
        await screen.press("enter")
        await screen.until("1 Holders 40", "holder-1.", gone="holder-40.")
        await screen.press("end")
        await screen.until("holder-40.", " to 40", gone="holder-1.")

    show(dsn, test)


def test_a_lease_is_released_once_that_is_confirmed(dsn: str, busy: UUID, conn: Connection) -> None:
    async def test(screen: Screen) -> None:
        await screen.until("backlogged")
        await screen.press("enter")
        await screen.until(str(busy))
        for no in ("n", "escape", "enter"):
            await screen.press("r")
            await screen.until(
                "Release 2 slots of 'database'?", "by loader.py (pid 17) on worker-1.", "requests wait now"
            )
            await screen.press(no)
            await screen.until("1 Holders 1", gone="Release 2 slots")
        assert one(conn, "select count(*) from pglimits.holders where lease_id = %s", busy) == 1
        await screen.press("r", "y")
        await screen.until(f"Released {str(busy)[:8]}", "1 Holders 2", "2 Queue 0")
        assert one(conn, "select kind, lease_id from pglimits.events order by event_id desc limit 1") == (
            "force_released",
            busy,
        )

    show(dsn, test)


@pytest.mark.usefixtures("busy")
def test_a_request_is_taken_out_of_its_line(dsn: str, conn: Connection) -> None:
    async def test(screen: Screen) -> None:
        await screen.until("backlogged")
        await screen.press("enter")
        await screen.until("loader.py")
        await screen.press("3", "r")
        await screen.until("Choose a holder or a waiter")
        await screen.press("2")
        await screen.until("second.py")
        await screen.press("down", "r")
        await screen.until("out of the line of 'database'?", "second.py")
        await screen.press("right", "enter")
        await screen.until("2 Queue 1", "first.py", gone="second.py")
        assert one(conn, "select holder->>'program' from pglimits.waiters") == "first.py"

    show(dsn, test)


@pytest.mark.usefixtures("busy")
def test_a_limit_is_disabled_and_enabled_from_both_screens(dsn: str, conn: Connection) -> None:
    async def test(screen: Screen) -> None:
        await screen.until("backlogged")
        await screen.press("e")
        await screen.until("Disable limit 'database'?", "2 requests waiting now would go on", "2 slots now held")
        await screen.press("n")
        await screen.until("backlogged")
        await screen.press("e")
        await screen.until("Disable limit")
        await screen.press("y")
        await screen.until("Disabled limit 'database'.")
        assert one(conn, "select active from pglimits.limits where name = 'database'") is False
        await screen.press("slash", *"data", "enter")
        await screen.until("1 limit ")
        await screen.press("enter")
        await screen.until("database  off: not enforced")
        await screen.press("e")
        await screen.until("Enable limit 'database'?")
        await screen.press("y")
        await screen.until("Enabled limit 'database'.", gone="off: not enforced")
        assert one(conn, "select active from pglimits.limits where name = 'database'") is True

    show(dsn, test)


@pytest.mark.usefixtures("busy")
def test_what_is_shown_follows_the_database_unless_it_is_paused(dsn: str, conn: Connection) -> None:
    async def test(screen: Screen) -> None:
        await screen.until("4/10")
        conn.execute("select pglimits.acquire('roomy', slots => 5)")
        await screen.until("9/10")
        await screen.press("p")
        await screen.until("paused")
        conn.execute("select pglimits.update_limit('roomy', 20)")
        await screen.pilot.pause(0.5)
        assert "9/20" not in screen.text
        await screen.press("s")  # whatever is asked for is shown, though
        await screen.until("9/20", "by name")
        await screen.press("space")
        await screen.until("every 0.1s")
        conn.execute("select pglimits.delete_limit('roomy')")
        await screen.until("6 limits", gone="roomy")

    show(dsn, test)


def test_the_cursor_stays_with_its_limit(dsn: str, conn: Connection) -> None:
    conn.execute("select pglimits.create_limit(name, 5) from unnest('{a,b,c}'::text[]) name")

    async def test(screen: Screen) -> None:
        await screen.when(lambda: "3 limits" in screen.text and screen.names() == ["a", "b", "c"])
        await screen.press("down")
        conn.execute("select pglimits.acquire('c', 5)")
        await screen.when(lambda: screen.names() == ["c", "a", "b"])
        page: Any = screen.app.screen
        assert page.page.at == "b"

    show(dsn, test)


def test_any_characters_are_shown_and_none_is_markup_or_steers_the_terminal(dsn: str, conn: Connection) -> None:
    name, holder = "[red]x[b] 名前 $error", '{"program": "[bold]\\u001b[31m\\u202e", "host": "a\\nb[/]"}'
    conn.execute("select pglimits.create_limit(%s, 1, description => %s)", [name, "[link=x]\n\x1b]0;x"])
    conn.execute("select pglimits.acquire(%s, holder => %s::jsonb, key => '[i]')", [name, holder])

    async def test(screen: Screen) -> None:
        await screen.until(name)
        await screen.press("enter")
        await screen.until(name, "[link=x]\\n\\u001b]0;x", "[bold]\\u001b[31m\\u202e on a\\nb[/]", "[i]")
        assert "\x1b" not in screen.text
        await screen.press("r")
        await screen.until(f"Release 1 slot of '{name}'?", "[bold]\\u001b[31m\\u202e on a\\nb[/]")
        await screen.press("n", "e")
        await screen.until(f"Disable limit '{name}'?")
        await screen.press("y")
        await screen.until(f"Disabled limit '{name}'.")

    show(dsn, test, (160, 30))


@pytest.mark.usefixtures("busy")
def test_a_limit_that_is_deleted_meanwhile_leads_back_to_all(dsn: str, conn: Connection) -> None:
    async def test(screen: Screen) -> None:
        await screen.until("backlogged")
        await screen.press("enter")
        await screen.until("1 Holders 1")
        conn.execute("select pglimits.delete_limit('database')")
        await screen.until("6 limits", "there is no limit named 'database' any longer")

    show(dsn, test)


@pytest.mark.usefixtures("busy")
def test_a_limit_that_is_deleted_below_a_question_is_told_once(dsn: str, conn: Connection) -> None:
    async def test(screen: Screen) -> None:
        await screen.until("backlogged")
        await screen.press("enter")
        await screen.until("1 Holders 1")
        below = screen.app.screen
        assert isinstance(below, LimitScreen)
        await screen.press("r")
        await screen.until("Release 2 slots of 'database'?")
        failures: list[object] = []
        failed = below.failed

        def count(error: Any) -> None:
            failed(error)
            failures.append(error)

        below.failed = count  # type: ignore[method-assign]
        conn.execute("select pglimits.delete_limit('database')")
        for nth in range(1, 4):
            below.look_now()
            await screen.when(lambda n=nth: len(failures) >= n)
        await screen.press("n")
        await screen.until("6 limits")
        assert [toast.message for toast in screen.app._notifications] == [
            "there is no limit named 'database' any longer"
        ]

    show(dsn, test)


def test_a_lease_that_ends_as_its_release_is_asked_for_is_no_error(dsn: str, busy: UUID, conn: Connection) -> None:
    async def test(screen: Screen) -> None:
        await screen.until("backlogged")
        await screen.press("enter")
        await screen.until(str(busy))
        shown = screen.app.screen
        assert isinstance(shown, LimitScreen)
        await shown._release(str(uuid4()))
        await screen.press("2")
        await screen.until("second.py")
        await shown._release(str(uuid4()))
        assert screen.app.screen is shown

    show(dsn, test)


def test_a_role_that_may_only_look_is_told_so(server_dsn: str, busy: UUID, conn: Connection) -> None:
    conn.execute("create role onlooker login in role pglimits_reader")
    try:

        async def test(screen: Screen) -> None:
            await screen.until("read-only", "backlogged")
            await screen.press("e")
            await screen.until("This is read-only here")
            await screen.press("enter")
            await screen.until("loader.py")
            await screen.press("r")
            await screen.until("This is read-only here")

        show(make_conninfo(server_dsn, user="onlooker"), test)
    finally:
        conn.execute("drop role onlooker")
    assert one(conn, "select count(*) from pglimits.holders where lease_id = %s", busy) == 1


@pytest.mark.usefixtures("busy")
def test_a_database_that_goes_is_told_and_one_that_comes_back_is_shown(
    server_dsn: str, server: Any, conn: Connection
) -> None:
    name = conn.info.dbname
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as elsewhere:

        def allow(yes: bool) -> None:
            elsewhere.execute(f'alter database "{name}" allow_connections {yes}'.encode())

        async def test(screen: Screen) -> None:
            await screen.until("4/10")
            allow(False)
            elsewhere.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [name])
            await screen.until("No database since ", "Trying again", "4/10")
            await screen.press("enter")
            await screen.until("No database since ")
            await screen.press("escape")
            allow(True)
            with psycopg.connect(server_dsn, autocommit=True) as again:
                again.execute("select pglimits.acquire('roomy', slots => 2)")
            await screen.until("6/10", gone="No database")

        try:
            show(server_dsn, test)
        finally:
            allow(True)


def test_light_and_dark_and_the_ways_out(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLORFGBG", "0;15")

    async def test(screen: Screen) -> None:
        assert screen.app.theme == "textual-light"
        await screen.press("d")
        assert screen.app.theme == "textual-dark"
        await screen.press("d")
        assert screen.app.theme == "textual-light"
        await screen.press("q")

    assert show(dsn, test).return_code == 0

    async def interrupted(screen: Screen) -> None:
        await screen.press("slash", "q", "ctrl+c")

    assert show(dsn, interrupted).return_code == 0


# The command.


def test_without_a_terminal_it_says_what_prints(process: Cli) -> None:
    result = process("top")
    assert (result.code, result.out) == (2, "")
    assert "needs a terminal" in result.err and "pglimits ls" in result.err and "pglimits watch" in result.err


def test_without_textual_it_says_how_to_install_it(pglimits: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = pglimits("top")
    assert (result.code, result.out) == (1, "")
    assert result.err == "Error: pglimits top needs Textual: pip install 'pglimits[top]'\n"


@pytest.mark.usefixtures("busy")
def test_on_a_terminal_it_is_drawn_and_leaves_the_terminal_as_it_was(terminal: Callable[..., Terminal]) -> None:
    shown = terminal("top", "--every", "0.5")
    shown.read_until("backlogged")
    shown.type("q")
    assert shown.wait() == 0
    killed = terminal("top")
    killed.read_until("backlogged")
    os.kill(killed.pid, signal.SIGTERM)
    assert killed.wait() == 128 + signal.SIGTERM
    for each in (shown, killed):
        assert each.shown.rindex("\x1b[?1049l") > each.shown.index("\x1b[?1049h")


@pytest.mark.usefixtures("busy")
def test_keys_that_come_together_with_the_filter_s_own_are_not_lost(terminal: Callable[..., Terminal]) -> None:
    shown = terminal("top", "--every", "0.5")
    shown.read_until("backlogged")
    shown.type("/equals")
    shown.read_until("with 'equals' in the name")
    os.kill(shown.pid, signal.SIGTERM)
    assert shown.wait() == 128 + signal.SIGTERM


def test_a_database_that_is_not_there_is_an_error_before_the_screen_is_taken(terminal: Callable[..., Terminal]) -> None:
    shown = terminal("top", "--dsn", "host=127.0.0.1 port=1")
    assert shown.wait() == 1
    assert "Error: " in shown.plain and "\x1b[?1049h" not in shown.shown
