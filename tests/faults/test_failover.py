"""A standby takes over: what holds then, what may be lost, and what the clients notice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import history
import pytest
from cluster import Cluster, cluster
from histories import RATE, ROUGH, SECONDS, SEVERAL, WIDTHS, Run, granted
from history import History
from history_checker import check
from history_replay import Tolerance
from psycopg.conninfo import make_conninfo
from wrappertest import Future, WaitUntil, open_api, open_every

from pglimits import Lease, Limiter, ReadOnlyServer

EVERYTHING = (*WIDTHS, *SEVERAL, *RATE)
LEASE = 2.0  # as the workers take it
PROMPT = Tolerance(wake_up=8.0, visible=5.0)  # who was cut off comes back within a few seconds
BY_THE_CLIENTS = ("Never too many", "Never too fast", "Nothing is lost", "No false refusal")
"""The promises that are checked against what the clients were told."""


class Pair:
    """A primary and its standby, which change places."""

    def __init__(self, run: Run, primary: Cluster, standby: Cluster) -> None:
        self.run, self.primary, self.standby = run, primary, standby
        # Of both: whoever connects gets to the one that takes writes.
        hosts = [str(primary.place.sockets), str(standby.place.sockets)]
        self.dsn = make_conninfo(primary.dsn, host=",".join(hosts), target_session_attrs="read-write")
        run.dsn = run.way = self.dsn
        standby.follow(primary)

    def synchronous(self) -> None:
        """From now on a durable commit waits for the standby."""
        self.primary.sql(f"alter system set synchronous_standby_names = '{self.standby.name}'")
        self.primary.sql("select pg_reload_conf()")
        self.run.wait_until(lambda: self.primary.sql("select 1 from pg_stat_replication where sync_state = 'sync'"))

    def fail_over(self, how: str) -> None:
        """The primary ends (``stop``, ``crash``, ``kill``), and the standby takes over."""
        gone = time.time()
        getattr(self.primary, how)()
        self.standby.promote()
        self.primary, self.standby = self.standby, self.primary
        self.run.server.away.append((gone, time.time()))
        self.run.happened += 1

    def come_back(self) -> None:
        """The old primary follows the new one."""
        self.standby.follow(self.primary)


@pytest.fixture
def pair(run: Run) -> Iterator[Pair]:
    with cluster(run.server.binaries, run.server.settings) as other:
        yield Pair(run, run.server, other)


def work(run: Run, **limiter: Any) -> None:
    """Workers of all kinds: some are told that the server is away, some wait."""
    workers = run.workers(EVERYTHING, limiter=limiter)
    for kind in ("sync", "async"):
        workers.start(kind, timeouts=(None, 1, 5), at_once=2, hold=3.0, limiter={"on_unavailable": "wait", **limiter})


def rest(run: Run) -> None:
    """Leave them to their work for half of the time that a history has, or a few seconds."""
    time.sleep(min(SECONDS / 2, 3 + 2 * run.random.random()))


def test_with_a_synchronous_standby_nothing_that_was_answered_is_lost(run: Run, pair: Pair) -> None:
    pair.synchronous()
    work(run)
    until = time.monotonic() + SECONDS
    rest(run)
    pair.fail_over(run.random.choice(["crash", "kill"]))
    while time.monotonic() + SECONDS / 2 < until:
        pair.come_back()
        pair.synchronous()
        rest(run)
        pair.fail_over(run.random.choice(["crash", "kill"]))
    rest(run)
    assert granted(run.finish(PROMPT)) > 0


def test_a_primary_that_is_stopped_in_good_order_loses_nothing(run: Run, pair: Pair) -> None:
    work(run, durable=False)
    until = time.monotonic() + SECONDS
    rest(run)
    pair.fail_over("stop")
    while time.monotonic() + SECONDS / 2 < until:
        pair.come_back()
        rest(run)
        pair.fail_over("stop")
    rest(run)
    assert granted(run.finish(PROMPT)) > 0


def test_an_asynchronous_standby_loses_what_it_had_not_received_and_nothing_else(run: Run, pair: Pair) -> None:
    work(run)
    time.sleep(SECONDS / 2)
    pair.standby.cut_off()
    (before,) = pair.primary.sql("select count(*) from history.changes where what = 'leases' and was is null")
    run.wait_until(
        lambda: (
            pair.primary.sql(
                "select count(*) > %s from history.changes where what = 'leases' and was is null", before[0] + 5
            )
            == [(True,)]
        )
    )
    pair.fail_over("crash")
    time.sleep(SECONDS / 2)
    found = run.finish(ROUGH, allowed=BY_THE_CLIENTS)

    pair.standby.start()  # what it did that nobody has heard of
    gone, back = run.server.away[0]
    kept = {(change.tx, change.what, str(change.row)) for change in found.changes}
    lost = [
        change
        for change in history.read(pair.standby.dsn).changes
        if change.at <= back and (change.tx, change.what, str(change.row)) not in kept
    ]
    assert lost
    ids = {str(change.row["lease_id"]) for change in lost if "lease_id" in change.row}
    since = min(change.at for change in lost)
    concerned = heard(found, ("granted",), since, found.end) & ids
    # Also those whose leases were renewed, and end as they did before.
    concerned |= {str(change.row["lease_id"]) for change in lost if change.what == "leases" and change.was is not None}
    # Of a call of rate_limit that went at once, and of a refusal, no row tells.
    concerned |= heard(found, ("asked",), since, back) & heard(found, ("went",), since, found.end)
    concerned |= heard(found, ("refused",), since, back)
    assert_kept(found, run, concerned)
    # Whoever held a lease that nobody knows any more was told by its end.
    forgotten = ids - {str(change.row.get("lease_id")) for change in found.changes}
    assert not heard(found, ("still", "leaving"), gone + LEASE, found.end, lost=False) & forgotten


def test_what_was_not_durable_may_be_lost_and_nothing_else(run: Run, pair: Pair) -> None:
    pair.synchronous()
    work(run, durable=False)
    time.sleep(SECONDS / 2)
    pair.fail_over("kill")
    time.sleep(SECONDS / 2)
    found = run.finish(ROUGH, allowed=BY_THE_CLIENTS)
    gone, back = run.server.away[0]
    since = max(change.at for change in found.changes if change.at < gone) - 1
    # Some note what they heard before only when they get to it.
    assert_kept(found, run, heard(found, ("asked", "granted", "still", "refused", "went"), since, back))


def heard(found: History, what: Sequence[str], since: float, until: float, **more: Any) -> set[str]:
    """The attempts that said so in that time."""
    return {
        said.attempt
        for said in found.said
        if said.what in what and since <= said.at <= until and more.items() <= said.more.items()
    }


def assert_kept(found: History, run: Run, concerned: set[str]) -> None:
    """The database has kept every promise, and what it told the clients, but for those that are concerned."""
    others = [said for said in found.said if said.attempt not in concerned]
    assert len({said.attempt for said in others}) > len(concerned)
    assert check(History(found.changes, others, found.end), run.tolerance(ROUGH)) == []


# What a client notices.


def test_holders_and_waiters_go_on_where_the_standby_has_taken_over(
    run: Run, pair: Pair, wait_until: WaitUntil
) -> None:
    pair.synchronous()
    with open_every(pair.dsn) as apis:
        leases: dict[str, Lease] = {}
        waits: dict[str, list[Future]] = {}
        for name, api in apis.items():
            api.create(name, 1)
            api.create(f"{name}, a rate", 1, slot_decay_per_second=0.5)
            leases[name] = api.acquire(name, lease_duration=20)
            waits[name] = [api.start("acquire", name)]
            wait_until(lambda name=name: run.sql(WAITING, name) == [(1,)])
            waits[name].append(api.start("acquire", name, timeout_seconds=120))
            wait_until(lambda name=name: run.sql(WAITING, name) == [(2,)])
        line = run.sql("select name, lease_id, position, waiting_since from pglimits.waiters order by 1, 3")
        ends = dict(run.sql(ENDS))
        pair.fail_over("crash")

        assert run.sql("select name, lease_id, position, waiting_since from pglimits.waiters order by 1, 3") == line
        # Renewed, by the thread that has found the way to the new primary.
        wait_until(lambda: all(after > ends[name] for name, after in run.sql(ENDS)), timeout=60)
        # Listening again: one for each pool, and one for all that have only the DSN.
        wait_until(lambda: run.sql(LISTENING) == [(3,)], timeout=30)
        for name, api in apis.items():
            lease = leases[name]
            assert not lease.lost
            for wait in waits[name]:
                assert api.release(lease)
                following = wait.result(60)
                assert (following.fence or 0) > (lease.fence or 0)
                lease = following
            assert api.release(lease)
            api.rate_limit(f"{name}, a rate")


WAITING = "select waiting::int from pglimits.limits where name = %s"
ENDS = "select name, expires_at from pglimits.holders"
LISTENING = """
    select count(*)::int from pg_stat_activity
    where (query ilike 'listen %%' or query ~ 'pglimits._(watch|beat)') and pid <> pg_backend_pid()"""


def test_a_lease_that_was_not_replicated_is_lost_and_its_fence_may_be_given_again(
    run: Run, pair: Pair, wait_until: WaitUntil
) -> None:
    with (
        open_api("sync", dsn=pair.dsn) as sync,
        open_api("async", dsn=pair.dsn) as tasks,
        Limiter(pair.dsn) as second,
    ):
        firsts = {"sync": sync, "async": tasks}
        kept = {key: first.acquire("licence", key=key, lease_duration=60) for key, first in firsts.items()}
        pair.standby.catch_up(pair.primary)
        pair.standby.cut_off()
        leases = {key: first.acquire("gpu", key=key, lease_duration=20) for key, first in firsts.items()}
        pair.fail_over("crash")
        # For as long as the first has not heard of it, there are two.
        others = {key: second.acquire("gpu", key=key, lease_duration=60) for key in firsts}
        for key, first in firsts.items():
            assert others[key].fence == leases[key].fence
            wait_until(lambda key=key: leases[key].lost)
            assert not first.release(leases[key])
            assert not kept[key].lost
            assert first.release(kept[key])
        assert {holder.lease_id for holder in second.holders("gpu")} == {other.id for other in others.values()}


def test_an_old_primary_grants_to_those_who_know_no_other_until_it_is_a_standby(run: Run, pair: Pair) -> None:
    pair.standby.catch_up(pair.primary)
    old = pair.primary
    pair.fail_over("crash")
    old.start()  # nobody has told it
    with Limiter(old.dsn) as unaware, Limiter(pair.dsn) as aware, Limiter(pair.primary.dsn) as sure:
        leases = [unaware.acquire("gpu", timeout_seconds=0), sure.acquire("gpu", timeout_seconds=0)]
        # Both take writes: the first in the DSN is taken.
        assert aware.holders("gpu") == unaware.holders("gpu")
        old.stop()
        old.follow(pair.primary)
        with pytest.raises(ReadOnlyServer, match="target_session_attrs"):
            unaware.acquire("licence")
        assert unaware.holders("gpu") == sure.holders("gpu") == aware.holders("gpu")
        leases.append(aware.acquire("licence"))
        pair.standby.catch_up(pair.primary)
        assert [holder.lease_id for holder in unaware.holders("licence")] == [leases[-1].id]
