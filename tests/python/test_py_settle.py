"""A lease as a block of ``acquire``, what it has used settled, requests clamped; and the page about budgets."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from wrappertest import (
    Api,
    AsyncApi,
    Children,
    Connection,
    WaitUntil,
    held,
    in_thread,
    lose_reply,
    nothing_left,
    open_api,
    run,
    value,
    waiting,
)

import pglimits.asyncio
import pglimits.sync
from pglimits import (
    AcquireTimeout,
    AsyncLimiter,
    AsyncUse,
    InvalidArgument,
    Lease,
    LeaseLost,
    Limiter,
    LimiterUnavailable,
    NoSlotDecay,
    SlotsExceedLimit,
    Use,
)
from pglimits._database import TRIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "llm-budgets.md"
BUDGET = {"calls": 1, "requests": 1, "tokens": 500}


@pytest.fixture(autouse=True)
def limits(conn: Connection) -> None:
    """So slow that nothing comes back while a test lasts."""
    conn.execute("select pglimits.create_limit('calls', 2), pglimits.create_limit('requests', 20, 1e-6)")
    conn.execute("select pglimits.create_limit('tokens', 1000, 1e-6)")


def level(conn: Connection, name: str = "tokens", key: str = "") -> int:
    return round(value(conn, "select level from pglimits.keys where name = %s and key = %s", [name, key]))


def start_block(api: Api, body: Callable[[Any], Any], names: Any = BUDGET, **options: Any) -> Future[Any]:
    """Run a body within a block of ``acquire``. What it returns is awaited, if tasks have to."""

    async def in_task() -> Any:
        async with api.limiter.acquire(names, **options) as use:
            done = body(use)
            return await done if asyncio.iscoroutine(done) else done

    def in_a_thread() -> Any:
        with api.limiter.acquire(names, **options) as use:
            return body(use)

    if isinstance(api, AsyncApi):
        return asyncio.run_coroutine_threadsafe(in_task(), api.loop)
    return in_thread(in_a_thread)


def block(api: Api, body: Callable[[Any], Any], names: Any = BUDGET, **options: Any) -> Any:
    return start_block(api, body, names, **options).result(60)


# Settling.


@pytest.mark.parametrize("used", [1312, 500, 200, 0])
def test_what_was_used_is_in_the_level_and_the_slots_are_back_after_the_block(
    api: Api, conn: Connection, used: int
) -> None:
    assert block(api, lambda use: use.settle({"tokens": used})) is True
    assert (level(conn), level(conn, "requests"), held(conn)) == (used, 1, 0)


def test_not_settled_the_estimate_stands_and_an_error_goes_on_with_what_was_settled_before_it(
    api: Api, conn: Connection
) -> None:
    block(api, lambda use: None)
    assert level(conn) == 500

    def fail(use: Any) -> None:
        raise RuntimeError("the provider")

    async def fail_then(settling: Any) -> None:
        await settling
        fail(None)

    def settle_and_fail(use: Any) -> Any:
        done = use.settle({"tokens": 7})
        return fail_then(done) if asyncio.iscoroutine(done) else fail(use)

    with pytest.raises(RuntimeError, match="the provider"):
        block(api, fail)
    assert (level(conn), nothing_left(conn)) == (1000, True)
    conn.execute("select pglimits.reset('tokens')")
    with pytest.raises(RuntimeError, match="the provider"):
        block(api, settle_and_fail)
    assert (level(conn), nothing_left(conn)) == (7, True)


def test_a_lease_that_is_kept_settles_as_often_as_it_is_told_until_it_is_released(api: Api, conn: Connection) -> None:
    lease = api.acquire(BUDGET)
    assert isinstance(lease, Use if api.kind == "sync" else AsyncUse)
    assert lease.slots == (1, 1, 500)
    for used in (100, 900, 900, 40):
        assert api.settle(lease, {"tokens": used, "requests": 3}) is True
        assert (level(conn), level(conn, "requests")) == (used, 3)
    assert api.settle(lease.id, {"tokens": 50}) is True, "by its id"
    assert api.settle(str(lease.id), {("tokens", ""): 60}) is True
    assert api.release(lease) is True
    assert api.settle(lease, {"tokens": 0}) is api.settle(lease.id, {"tokens": 0}) is False
    assert level(conn) == 60
    assert api.block(BUDGET, lambda lease: api.settle(lease, {"tokens": 70})) is True, "a block of concurrency too"
    assert level(conn) == 130


def test_the_key_is_that_of_the_lease_and_has_to_be_said_where_there_are_several(api: Api, conn: Connection) -> None:
    lease = api.acquire({("tokens", "a"): 100, ("tokens", "b"): 100, "requests": 1}, key="t")
    assert api.settle(lease, {("tokens", "b"): 7, "requests": 2}) is True
    assert (level(conn, key="a"), level(conn, key="b"), level(conn, "requests", "t")) == (100, 7, 2)
    for used, words in (
        ({"tokens": 1}, r"which key of 'tokens'.*\('tokens', 'a'\), \('tokens', 'b'\)"),
        ({"requests": 1, "calls": 1}, r"'calls'.*the lease is of \('tokens', 'a'\)"),
        ({("requests", ""): 1}, "'requests', ''"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            api.settle(lease, used)
    assert (level(conn, key="a"), level(conn, key="b"), level(conn, "requests", "t")) == (100, 7, 2)


@pytest.mark.parametrize(
    ("used", "words"),
    [
        ({"tokens": -1}, "'tokens' must be from 0"), ({"tokens": 1.5}, "'tokens' must be a whole number"),
        ({"tokens": True}, "whole number"), ({"tokens": None}, "whole number"), ({"tokens": 2**31}, "2147483647"),
        ({}, "must not be empty"), (500, "must be a mapping"), (["tokens"], "must be a mapping"),
        ({1: 1}, "must name limits"), ({("tokens", 1): 1}, "must name limits"), ({("tokens",): 1}, "must name limits"),
        ({"token": 1}, "'token'"),
    ],
)  # fmt: skip
def test_bad_input_is_an_error_that_says_what_is_wrong_and_changes_nothing(
    api: Api, conn: Connection, used: Any, words: str
) -> None:
    lease = api.acquire({"tokens": 500})
    with pytest.raises(InvalidArgument, match=words):
        api.settle(lease, used)
    assert level(conn) == 500
    with pytest.raises(InvalidArgument, match="lease"):
        api.settle("no id", {"tokens": 1})
    with pytest.raises(NoSlotDecay, match="calls"):
        api.settle(api.acquire("calls"), {"calls": 1})


def test_what_is_not_enforced_has_nothing_to_settle(api: Api, conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('off', 5, 1, active => false)")
    assert block(api, lambda use: use.settle({"off": 3, "missing": 4}), {"off": 9, "missing": 9}) is False
    names = {"off": 9, "missing": 9, "tokens": 9}
    assert block(api, lambda use: use.settle({"off": 3, "missing": 4, "tokens": 5}), names) is True
    assert level(conn) == 5


def test_who_waits_is_granted_by_who_settles(api: Api, conn: Connection, wait_until: WaitUntil) -> None:
    lease = api.acquire({"tokens": 400})
    api.settle(lease, {"tokens": 900})
    waiter = api.start("acquire", {"tokens": 300})
    wait_until(lambda: waiting(conn) == 1)
    assert api.settle(lease, {"tokens": 100}) is True
    assert waiter.result(60).slots == (300,)
    assert level(conn) == 400
    assert api.settle(waiter.result(), {"tokens": 10}) is True, "granted from the line"
    assert level(conn) == 110


def test_a_reply_that_is_lost_is_asked_for_again_and_settles_once(
    api: Api, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = api.acquire({"tokens": 400})
    lose_reply(monkeypatch, lambda: None, of="settle_all")
    assert api.settle(lease, {"tokens": 100}) is True
    assert level(conn) == 100


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_where_the_database_is_gone_it_raises_or_lets_go_on_as_the_limiter_does(
    kind: str, dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for how in ("raise", "allow"):
        with open_api(kind, dsn=dsn, on_unavailable=how, durable=how == "raise") as api:
            lease = api.acquire({"tokens": 100})
            for _ in range(TRIES):
                lose_reply(monkeypatch, lambda: None, of="settle_all")
            if how == "raise":
                with pytest.raises(LimiterUnavailable):
                    api.settle(lease, {"tokens": 1})
            else:
                assert api.settle(lease, {"tokens": 1}) is False
                assert "tokens not settled" in caplog.text
            monkeypatch.undo()


def test_a_killed_process_leaves_its_estimate_which_decays_and_its_slots_at_its_leases_end(
    limiter: Limiter, conn: Connection, children: Children, wait_until: WaitUntil
) -> None:
    child = children("""
        from pglimits import Limiter
        limiter = Limiter()
        use = limiter.acquire({"calls": 1, "tokens": 600}, lease_duration=1)
        print(use.settle({"tokens": 700}))
        input()
        """)
    child.expect("True")
    assert (held(conn), level(conn)) == (601, 700)
    child.stop()
    wait_until(lambda: held(conn) == 0)
    assert level(conn) == 700
    with pytest.raises(AcquireTimeout):
        limiter.acquire({"calls": 1, "tokens": 400}, timeout_seconds=0)
    with limiter.acquire({"calls": 2, "tokens": 300}, timeout_seconds=0):
        pass


# The block of acquire.


@pytest.mark.parametrize("strict", [True, False])
def test_a_lost_lease_raises_at_the_end_of_a_strict_block(api: Api, conn: Connection, strict: bool) -> None:
    def lose(use: Lease) -> None:
        conn.execute("select pglimits.reset('calls')")

    if strict:
        with pytest.raises(LeaseLost):
            block(api, lose, "calls", strict=True)
    else:
        block(api, lose, "calls")
    assert nothing_left(conn)


def test_a_lost_lease_cancels_the_body_of_a_strict_block_of_a_task(dsn: str, conn: Connection) -> None:
    async def main() -> None:
        async with AsyncLimiter(dsn, strict=True) as limiter:
            with pytest.raises(LeaseLost):
                async with limiter.acquire("calls", lease_duration=1):
                    conn.execute("select pglimits.reset('calls')")
                    await asyncio.sleep(60)

    run(main())


def test_what_acquire_returns_can_be_awaited_wrapped_in_a_task_and_cancelled(dsn: str, conn: Connection) -> None:
    async def main() -> None:
        async with AsyncLimiter(dsn) as limiter:
            lease = await limiter.acquire("calls")
            other = await asyncio.create_task(limiter.acquire("calls"))
            waits = asyncio.ensure_future(limiter.acquire("calls"))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(waits, 0.05)
            with pytest.raises(AcquireTimeout):
                async with limiter.acquire("calls", timeout_seconds=0):
                    raise AssertionError
            await limiter.release(lease)
            async with limiter.acquire("calls") as third:
                assert third.fence is not None and other.fence is not None and third.fence > other.fence
            limiter.acquire("calls").close()

    run(main())
    assert nothing_left(conn)


@pytest.mark.usefixtures("environment")
def test_the_modules_for_the_database_of_the_environment_have_it_too(conn: Connection) -> None:
    with pglimits.sync.acquire({"tokens": 5000}, clamp=True) as use:
        assert (use.slots, use.settle({"tokens": 12})) == ((1000,), True)

    async def main() -> None:
        async with pglimits.asyncio.acquire({"tokens": 100}) as use:
            assert await use.settle({"tokens": 34})

    run(main())
    assert level(conn) == 46


# Clamping.


def test_clamped_a_request_takes_what_the_limit_has_and_says_so(api: Api, conn: Connection) -> None:
    with pytest.raises(SlotsExceedLimit, match="tokens"):
        api.acquire({"calls": 1, "tokens": 5000})
    lease = api.acquire({"calls": 3, "requests": 1, "tokens": 5000, "missing": 9}, clamp=True)
    assert lease.slots == (2, 1, 1000, 9)
    assert api.settle(lease, {"tokens": 5000}) is True
    assert (level(conn), held(conn, "tokens"), held(conn, "calls")) == (5000, 1000, 2)
    api.release(lease)
    assert api.acquire(["calls", "calls"], occupy=2, clamp=True).slots == (2, 0), "named twice, together"
    assert api.acquire("missing", occupy=9, clamp=True).slots == (9,)
    with pytest.raises(InvalidArgument, match="clamp"):
        api.acquire("calls", clamp=1)


@pytest.mark.parametrize("names", [{"tokens": 5000}, {"calls": 1, "tokens": 5000}])
def test_a_clamped_request_that_waits_takes_what_the_limit_has_by_then(
    api: Api, conn: Connection, wait_until: WaitUntil, names: dict[str, int]
) -> None:
    holder = api.acquire({"tokens": 1})
    waiter = api.start("acquire", names, clamp=True)
    wait_until(lambda: waiting(conn) == 1)
    conn.execute("select pglimits.update_limit('tokens', 300)")
    wait_until(lambda: value(conn, "select min(slots) from pglimits.waiters where name = 'tokens'") == 300)
    api.settle(holder, {"tokens": 0})
    api.release(holder)
    assert waiter.result(60).slots[-1] == 300


def test_when_what_it_took_cannot_be_found_out_it_is_given_back(
    api: Api, conn: Connection, wait_until: WaitUntil
) -> None:
    conn.execute("drop function pglimits._taken")
    with pytest.raises(pglimits.VersionMismatch):
        api.acquire({"tokens": 5000}, clamp=True)
    wait_until(lambda: nothing_left(conn))


@pytest.mark.parametrize(("timeout", "how"), [(0, "raise"), (0.2, "wait"), (0.2, "allow")])
def test_to_find_out_what_it_took_it_waits_no_longer_than_its_timeout(
    dsn: str, conn: Connection, connect: Any, wait_until: WaitUntil, timeout: float, how: Any
) -> None:
    conn.execute("""
        create or replace function pglimits._taken(lease_id uuid)
        returns table (name text, key text, slots integer)
        language plpgsql volatile security definer
        as $$ begin perform pg_advisory_xact_lock(1); end $$""")
    slow = connect()
    slow.execute("select pg_advisory_lock(1)")
    with Limiter(dsn, on_unavailable=how) as limiter:
        limiter.version()  # it is connected
        request = in_thread(limiter.acquire, {"tokens": 5000}, timeout_seconds=timeout, clamp=True)
        if how == "allow":
            assert request.result(20).slots == (5000,)
        else:
            with pytest.raises(AcquireTimeout if timeout else LimiterUnavailable):
                request.result(20)
            wait_until(lambda: nothing_left(conn))
        slow.close()


def test_a_limiter_that_allows_goes_on_when_what_it_took_cannot_be_asked(
    dsn: str, conn: Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Limiter(dsn, on_unavailable="allow") as limiter:
        for _ in range(TRIES):
            lose_reply(monkeypatch, lambda: None, of="_taken")
        with limiter.acquire({"tokens": 5000}, clamp=True) as use:
            assert (use.slots, held(conn)) == ((5000,), 1000)
    assert "what was taken of tokens is not known" in caplog.text
    assert nothing_left(conn)


# The page.


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_calls_of_the_page_are_answered_429_without_the_limiter(dsn: str) -> None:
    """That there is none with it is what the page says that its example prints."""
    (code,) = [code for code in blocks() if "--unlimited" in code]
    assert f"{code}```\n\n```text\n1000 answers, 0 times 429\n```" in PAGE.read_text(encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", code, "--unlimited"], env={"PGLIMITS_DSN": dsn}, capture_output=True, text=True,
        check=False, timeout=200,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    said = re.fullmatch(r"(\d+) answers, (\d+) times 429\n", done.stdout)
    assert said is not None
    answers, refused = int(said[1]), int(said[2])
    assert answers + refused == 1000
    assert refused > 0


def test_the_numbers_of_the_page_follow_its_rule() -> None:
    rows = re.findall(
        r"^\| (\d+) s \| ([\d,]+) \| (\d+) \| (\d+) % \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) == 4
    for seconds, limit, rate, share in ([int(text.replace(",", "")) for text in row] for row in rows):
        assert 2 * limit + 60 * rate <= 60_000
        assert limit >= rate * seconds
        assert share == rate * 60 / 600
