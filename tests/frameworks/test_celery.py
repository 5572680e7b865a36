"""Tasks of Celery, by real workers: one with a process and one with two threads."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest
from psycopg.conninfo import conninfo_to_dict

pytest.importorskip("celery", reason="Celery is not installed")

from queues import pages
from queues.crews import PATIENCE, QUEUES, Crew, database

from pglimits import AcquireTimeout, InvalidArgument, Limiter, LimitNotFound
from pglimits.celery import limited


class CeleryCrew(Crew):
    tasks: Any

    def start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "INFO")
        return self.run(name, "celery", "-A", "celery_tasks", "worker", "-n", f"{name}@here", *quiet, *options)

    def received(self, name: str, results: list[Any]) -> list[Any]:
        """Which of these a worker has received, in that order."""
        log = self.log(name)
        there = [(log.find(f"[{result.id}] received"), result) for result in results]
        return [result for at, result in sorted(there, key=lambda each: each[0]) if at >= 0]


@pytest.fixture(scope="module")
def workers(
    server: Any, by_way: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryCrew]:
    folder = tmp_path_factory.mktemp("celery")
    for name in ("broker", "control", "results"):
        (folder / name).mkdir()
    # Two that create one of these at the same moment are in each other's way.
    for name in ("celery", "processes", "threads", "doomed", "celery.pidbox", "reply.celery.pidbox", "celeryev"):
        (folder / "control" / f"{name}.exchange").write_text("[]")
    with database(server, by_way) as (dsn, server_dsn), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(QUEUES))
        for name, value in (("PGLIMITS_DSN", dsn), ("SERVER_DSN", server_dsn), ("QUEUE_FOLDER", str(folder))):
            patch.setenv(name, value)
        patch.setenv("C_FORCE_ROOT", "1")
        crew = CeleryCrew(dsn, server_dsn, folder)
        crew.tasks = importlib.import_module("celery_tasks")
        try:
            crew.start("processes", "-P", "prefork", "-c", "1", "-Q", "celery,processes")
            crew.start("threads", "-P", "threads", "-c", "2", "-Q", "celery,threads")
            crew.await_start(processes=" ready.", threads=" ready.")
            yield crew
        finally:
            crew.stop()
            sys.modules.pop("celery_tasks", None)


@pytest.fixture
def crew(workers: CeleryCrew) -> CeleryCrew:
    workers.begin()
    return workers


def got(result: Any) -> Any:
    return result.get(timeout=PATIENCE, interval=0.02)


def test_two_workers_together_are_never_more_than_the_limit_and_do_everything(crew: CeleryCrew) -> None:
    results = [crew.tasks.in_crowd.delay(number) for number in range(16)]
    assert [got(result) for result in results] == list(range(16))
    assert crew.at_once("in_crowd") <= 2
    assert crew.rows("select distinct retries, fence > 0 from at_work where task like '%%.in_crowd'") == [(0, True)]
    fences = crew.rows("select fence from at_work where task like '%%.in_crowd' and change > 0")
    assert len(set(fences)) == 16


@pytest.mark.parametrize("worker", ["processes", "threads"])
def test_who_waits_occupies_no_worker_and_goes_in_order(
    crew: CeleryCrew, worker: str, wait_until: Callable[..., Any]
) -> None:
    crew.limiter.update("one", limit=0)
    waiting = [crew.tasks.one.apply_async((100 + n,), {"plus": 1}, queue=worker) for n in range(8)]
    wait_until(lambda: crew.waiting("one") == 1, what="for the first of them to stand in line")
    wait_until(lambda: len(crew.received(worker, waiting)) == 8, what="for the worker to have them all")
    received = crew.received(worker, waiting)
    (waiter,) = crew.limiter.waiters("one")
    assert waiter.holder == {"task": "celery_tasks.one", "id": received[0].id, "worker": f"{worker}@here"}
    assert [got(crew.tasks.unlimited.apply_async((n,), queue=worker)) for n in range(3)] == [0, 1, 2]
    assert not any(result.ready() for result in waiting)
    crew.limiter.update("one", limit=1)
    assert [got(result) for result in waiting] == [101 + n for n in range(8)]
    done = crew.rows(
        "select number from at_work where task like '%%.one' and number >= 100 and change > 0 order by nth"
    )
    assert [101 + number - 100 for (number,) in done[-8:]] == [got(result) for result in received]


def test_chains_groups_chords_links_and_the_headers_of_tasks_stay_as_they_are(
    crew: CeleryCrew, wait_until: Callable[..., Any]
) -> None:
    one, add = crew.tasks.one, crew.tasks.add
    assert got((one.s(1) | one.s(plus=2) | add.s(more=3)).apply_async()) == 6
    from celery import chord, group

    assert got(group(one.s(n) for n in range(3)).apply_async()) == [0, 1, 2]
    assert got(chord([one.s(n) for n in range(3)], add.s(more=10)).apply_async()) == 13
    word = f"linked {uuid4()}"
    linked = crew.tasks.sent_anew.apply_async((5,), link=crew.tasks.said.s(word=word), headers={"tenant": "t42"})
    assert got(linked) == [5, {"tenant": "t42"}]
    wait_until(lambda: crew.held("one") == 0, what="for the slot to come back")
    wait_until(lambda: crew.rows("select from said where said = %s", word), what="for the link")


def test_what_waits_long_is_sent_anew_and_is_the_same_task(crew: CeleryCrew, wait_until: Callable[..., Any]) -> None:
    crew.limiter.update("one", limit=0)
    word = f"linked {uuid4()}"
    link = crew.tasks.said.s(word=word)
    results = [
        crew.tasks.sent_anew.apply_async((n,), queue="threads", link=link, headers={"tenant": "t42"}) for n in range(2)
    ]
    for result in results:
        received = f"celery_tasks.sent_anew[{result.id}] received"
        wait_until(lambda: crew.log("threads").count(received) >= 3, what="for it to come again twice")
    crew.limiter.update("one", limit=1)
    assert [got(result)[0] for result in results] == [0, 1]
    assert crew.rows("select distinct retries from at_work where task like '%%.sent_anew'") == [(0,)]
    wait_until(lambda: len(crew.rows("select from said where said = %s", word)) == 2, what="for the links")
    # Each has run once.
    assert crew.rows("select count(*) from at_work where task like '%%.sent_anew' and number < 5 and change > 0") == [
        (2,)
    ]


def test_a_task_that_retries_counts_its_own_retries_and_holds_nothing_between_them(crew: CeleryCrew) -> None:
    crew.limiter.update("one", limit=1)
    results = [crew.tasks.fails_twice.delay(n) for n in range(3)]
    assert [got(result) for result in results] == [2, 2, 2]
    assert crew.at_once("fails_twice") == 1


def test_a_rate_lets_go_what_it_allows_and_the_rest_when_there_is_room(
    crew: CeleryCrew, wait_until: Callable[..., Any]
) -> None:
    results = [crew.tasks.at_a_rate.delay(n) for n in range(3)]
    wait_until(lambda: sum(result.ready() for result in results) == 2, what="for as many as the rate allows")
    wait_until(lambda: crew.waiting("slow") == 1, what="for the last of them to stand in line")
    crew.limiter.adjust("slow", -1)
    assert sorted(got(result) for result in results) == [0, 1, 2]


def test_a_task_whose_time_is_over_fails_and_takes_nothing(crew: CeleryCrew, wait_until: Callable[..., Any]) -> None:
    crew.limiter.update("one", limit=0)
    word = f"failed {uuid4()}"
    result = crew.tasks.impatient.apply_async((1,), link_error=crew.tasks.said.si(word=word))
    with pytest.raises(AcquireTimeout):
        got(result)
    assert result.state == "FAILURE"
    crew.limiter.update("one", limit=1)

    def is_done() -> bool:
        try:
            return bool(got(crew.tasks.impatient.delay(2)) == 2)
        except AcquireTimeout:  # the worker was too busy to ask in time
            return False

    wait_until(is_done, what="for one to be in time")
    assert crew.limiter.get("slow").level == pytest.approx(1, abs=0.01)
    assert crew.rows("select number from at_work where task like '%%.impatient' and change > 0") == [(2,)]


def test_a_task_whose_time_is_over_is_retried_where_it_says_so(
    crew: CeleryCrew, wait_until: Callable[..., Any]
) -> None:
    crew.limiter.update("one", limit=0)
    result = crew.tasks.persistent.delay(1)
    wait_until(lambda: result.state != "PENDING", what="for its time to be over")
    assert result.state == "RETRY"
    crew.limiter.update("one", limit=1)
    assert got(result) == [1, True]


def test_keys_are_of_the_arguments_and_none_is_not_limited(crew: CeleryCrew, wait_until: Callable[..., Any]) -> None:
    word = str(uuid4())
    first = crew.tasks.of_tenant.apply_async(("a", 1, word), queue="threads")
    wait_until(lambda: crew.held("tenant") == 1, what="for the first to be at work")
    second = crew.tasks.of_tenant.apply_async(("a", 2), queue="threads")
    wait_until(lambda: crew.waiting("tenant") == 1, what="for the second to wait")
    assert got(crew.tasks.of_tenant.apply_async(("b", 3), queue="threads")) == 3
    assert got(crew.tasks.of_tenant.apply_async(("", 4), queue="threads")) == 4
    crew.say(word)
    assert (got(first), got(second)) == (1, 2)


def test_a_missing_limit_is_not_enforced_unless_strict(crew: CeleryCrew) -> None:
    assert got(crew.tasks.of_nothing.delay(1)) == 1
    with pytest.raises(LimitNotFound, match="nowhere"):
        got(crew.tasks.strictly_of_nothing.delay())


def test_a_database_that_cannot_be_reached_is_waited_for_until_the_time_is_over(
    crew: CeleryCrew, wait_until: Callable[..., Any]
) -> None:
    def is_waited_for() -> bool:
        result = crew.tasks.unreachable.apply_async(queue="threads")
        assert got(crew.tasks.unlimited.apply_async((1,), queue="threads")) == 1
        with pytest.raises(AcquireTimeout):
            got(result)
        return "wait until the database can be reached" in crew.log("threads")

    wait_until(is_waited_for, what="for the worker to ask in time, and to say so")


def test_a_task_that_is_revoked_or_expires_leaves_the_line(crew: CeleryCrew, wait_until: Callable[..., Any]) -> None:
    from celery.exceptions import TaskRevokedError

    crew.limiter.update("one", limit=0)
    revoked = crew.tasks.one.apply_async((1,), queue="processes")
    wait_until(lambda: crew.waiting("one") == 1, what="for the first to stand in line")
    for seconds in (2, 10, 50):  # until the worker has it before it expires
        expired = crew.tasks.one.apply_async((2,), queue="threads", expires=seconds)
        wait_until(lambda: crew.waiting("one") == 2 or expired.ready(), what="for it to wait or to expire", timeout=60)
        if not expired.ready():
            break
    revoked.revoke()
    for result in (revoked, expired):
        with pytest.raises(TaskRevokedError):
            got(result)
    wait_until(lambda: crew.waiting("one") == 0, what="for both to leave the line")


def test_a_task_that_is_killed_gives_back_at_once(crew: CeleryCrew, wait_until: Callable[..., Any]) -> None:
    from celery.exceptions import TimeLimitExceeded

    with pytest.raises(TimeLimitExceeded):
        got(crew.tasks.too_long.apply_async(queue="processes"))
    wait_until(lambda: crew.held("one") == 0, what="for the slot")
    word = str(uuid4())
    killed = crew.tasks.one.apply_async((3000, 0, word), queue="processes")
    # Not before: a pool whose process is killed as it takes a task up is stuck, whatever the task.
    wait_until(lambda: crew.rows("select from at_work where number = 3000"), what="for it to be at work")
    killed.revoke(terminate=True, signal="SIGKILL")
    wait_until(lambda: crew.held("one") == 0, what="for the slot")
    assert got(crew.tasks.one.apply_async((4,), queue="processes")) == 4


def test_the_slot_of_a_worker_that_dies_comes_back_to_who_waits(
    crew: CeleryCrew, wait_until: Callable[..., Any]
) -> None:
    doomed = crew.start("doomed", "-P", "solo", "-Q", "doomed")
    crew.tasks.brief.apply_async((1, str(uuid4())), queue="doomed")
    wait_until(lambda: crew.held("brief") == 1, what="for it to be at work", timeout=PATIENCE)
    waiting = crew.tasks.brief.apply_async((2,), queue="threads")
    wait_until(lambda: crew.waiting("brief") == 1, what="for the other to wait")
    doomed.send_signal(signal.SIGKILL)
    assert got(waiting) == 2


def test_a_lease_that_is_lost_is_reported_with_its_task(crew: CeleryCrew, wait_until: Callable[..., Any]) -> None:
    word = str(uuid4())
    result = crew.tasks.brief.apply_async((1, word), queue="threads")
    wait_until(lambda: crew.held("brief") == 1, what="for it to be at work")
    crew.limiter.reset("brief")
    wait_until(
        lambda: f"the lease of the task celery_tasks.brief[{result.id}] was lost" in crew.log("threads"),
        what="for the worker to say so",
    )
    crew.say(word)
    assert got(result) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "concurrency or rate"),
        ({"concurrency": 3}, "concurrency: "),
        ({"rate": []}, "rate: "),
        ({"concurrency": "a", "occupy": 0}, "occupy"),
        ({"concurrency": "a", "key": 3}, "key"),
        ({"concurrency": "a", "timeout_seconds": -1}, "timeout_seconds"),
        ({"concurrency": "a", "lease_duration": 0.5}, "lease_duration"),
        ({"concurrency": "a", "priority": "high"}, "priority"),
        ({"concurrency": "a", "strict": 1}, "strict"),
        ({"concurrency": "a", "hold_seconds": 0}, "hold_seconds"),
        ({"concurrency": "a", "limiter": "postgresql://"}, "limiter"),
        ({"concurrency": "a", "base": int}, "base"),
    ],
)
def test_a_bad_option_is_an_error_where_the_task_is_defined(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        limited(**options)
    with pytest.raises(TypeError, match="concurency"):
        limited(concurency="a")  # type: ignore[call-arg]


def test_an_eager_task_waits_where_it_is_called_and_a_plain_call_is_not_limited(
    environment: str, limiter: Limiter
) -> None:
    from celery import Celery
    from celery.exceptions import Retry

    app = Celery("eager", broker="memory://", set_as_current=False)
    app.conf.update(task_always_eager=True, task_eager_propagates=True)

    @app.task(base=limited(concurrency="eager", timeout_seconds=0), bind=True, name="eager.held")
    def held(self: Any, number: int) -> tuple[int, int, bool]:
        return number, limiter.get("eager").held, self.fence is not None

    @app.task(base=limited(concurrency="eager", timeout_seconds=0), autoretry_for=(AcquireTimeout,), max_retries=1)
    def retried() -> None: ...

    limiter.upsert("eager", 1)
    assert held.delay(1).get() == (1, 1, True)
    assert limiter.get("eager").held == 0
    assert held(2) == (2, 0, False)
    limiter.upsert("eager", 0)
    with pytest.raises(AcquireTimeout):
        held.delay(3)
    with pytest.raises(Retry):
        retried.delay()


def test_the_example_of_the_page_prints_what_the_page_says(server_dsn: str, dsn: str, tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy", reason="SQLAlchemy, the broker of the example, is not installed")
    to = conninfo_to_dict(server_dsn)
    url = f"postgresql+psycopg://{to['user']}@/{to['dbname']}?host={quote(str(to['host']), '')}&port={to['port']}"
    printed, said = pages.run(
        "Celery", tmp_path, PGLIMITS_DSN=dsn, CELERY_BROKER_URL=f"sqla+{url}", CELERY_RESULT_BACKEND=f"db+{url}"
    )
    assert printed == said
