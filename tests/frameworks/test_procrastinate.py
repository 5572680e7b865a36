"""Jobs of procrastinate, by real workers: two processes on the database that has the limits as well."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

pytest.importorskip("procrastinate", reason="procrastinate is not installed")

from queues import pages
from queues.crews import PATIENCE, QUEUES, Crew, database

from pglimits import InvalidArgument
from pglimits.procrastinate import limited

STATUS = "select status::text from procrastinate_jobs where id = any(%s) order by id"


class ProcrastinateCrew(Crew):
    tasks: Any

    def start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        app = ("procrastinate", "-v", "--app", "procrastinate_tasks.app")
        return self.run(name, *app, "worker", "-n", name, "--fetch-job-polling-interval", "0.1", *options)

    def status(self, *jobs: int) -> list[str]:
        return [status for (status,) in self.rows(STATUS, list(jobs))]

    def ended(self, *jobs: int) -> bool:
        return not {"todo", "doing"}.intersection(self.status(*jobs))


@pytest.fixture(scope="module")
def workers(
    server: Any, by_way: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcrastinateCrew]:
    with database(server, by_way) as (dsn, server_dsn), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(QUEUES))
        patch.setenv("SERVER_DSN", server_dsn)
        # The limiter is on the app's database: nobody names it otherwise.
        patch.delenv("PGLIMITS_DSN", raising=False)
        patch.setenv("PGLIMITS_EMBEDDED", "never")
        crew = ProcrastinateCrew(dsn, server_dsn, tmp_path_factory.mktemp("procrastinate"))
        crew.tasks = importlib.import_module("procrastinate_tasks")
        try:
            with crew.tasks.app.open():
                crew.tasks.app.schema_manager.apply_schema()
                crew.start("first", "-c", "1", "-q", "default,one")
                crew.start("second", "-c", "4", "-q", "default")
                crew.await_start(first="Starting worker on", second="Starting worker on")
                yield crew
        finally:
            crew.stop()
            sys.modules.pop("procrastinate_tasks", None)


@pytest.fixture
def crew(workers: ProcrastinateCrew) -> ProcrastinateCrew:
    workers.begin()
    return workers


def test_two_workers_together_are_never_more_than_the_limit_and_do_everything(
    crew: ProcrastinateCrew, wait_until: Callable[..., Any]
) -> None:
    jobs = [crew.tasks.in_crowd.defer(number=number) for number in range(8)]
    jobs += [crew.tasks.in_crowd_too.defer(number=number) for number in range(8)]
    wait_until(lambda: crew.status(*jobs) == ["succeeded"] * 16, what="for all to be done", timeout=PATIENCE)
    ((most,),) = crew.rows("select max(sum) from (select sum(change) over (order by nth) from at_work) s")
    assert most <= 2
    assert crew.rows("select number, count(*) from at_work where change > 0 group by 1 order by 1") == [
        (number, 2) for number in range(8)
    ]
    # To be postponed is no attempt; to succeed is one.
    assert crew.rows("select distinct attempts from procrastinate_jobs where id = any(%s)", jobs) == [(1,)]
    assert crew.rows("select count(*) > 16 from procrastinate_events where type = 'started'") == [(True,)]


def test_who_waits_occupies_no_worker(crew: ProcrastinateCrew, wait_until: Callable[..., Any]) -> None:
    crew.limiter.update("one", limit=0)
    waiting = [crew.tasks.one.defer(number=n) for n in range(4)]
    postponed = "select count(*) from procrastinate_events where type = 'deferred_for_retry' and job_id = any(%s)"
    wait_until(lambda: crew.rows(postponed, waiting) >= [(4,)], what="for them to be postponed")
    unlimited = crew.tasks.unlimited.defer()
    wait_until(lambda: crew.status(unlimited) == ["succeeded"], what="for what is not limited")
    assert not {"succeeded", "failed"}.intersection(crew.status(*waiting))
    crew.limiter.update("one", limit=1)
    wait_until(lambda: crew.status(*waiting) == ["succeeded"] * 4, what="for them to be done")
    assert crew.at_once("one") == 1
    assert crew.rows("select distinct attempts from at_work where task like '%%.one'") == [(0,)]


def test_a_job_that_fails_counts_its_own_attempts(crew: ProcrastinateCrew, wait_until: Callable[..., Any]) -> None:
    word = str(uuid4())
    crew.tasks.one.defer(number=100, until=word)
    wait_until(lambda: crew.held("one") == 1, what="for the slot to be taken")
    job = crew.tasks.fails_twice.defer(number=1)
    started = "select count(*) from procrastinate_events where type = 'started' and job_id = %s"
    wait_until(lambda: crew.rows(started, job) > [(2,)], what="for it to be postponed")
    crew.say(word)
    wait_until(lambda: crew.ended(job), what="for it to end")
    assert crew.status(job) == ["succeeded"]
    tries = crew.rows("select attempts from at_work where task like '%%.fails_twice' and change > 0 order by nth")
    assert tries == [(0,), (1,), (2,)]
    log = (crew.log("first") + crew.log("second")).splitlines()
    before = [log[nth - 1] for nth, line in enumerate(log) if "Postponed: its turn has not come" in line]
    assert before and all("Error, to retry" in line for line in before)  # one line, no traceback


def test_a_rate_lets_go_what_it_allows_and_the_rest_when_there_is_room(
    crew: ProcrastinateCrew, wait_until: Callable[..., Any]
) -> None:
    crew.limiter.update("slow", slot_decay_per_second=0.001)
    jobs = [crew.tasks.at_a_rate.defer(number=n) for n in range(3)]
    wait_until(lambda: crew.status(*jobs).count("succeeded") == 2, what="for as many as the rate allows")
    (waiting,) = [job for job in jobs if crew.status(job) != ["succeeded"]]
    later = (
        "select scheduled_at > now() + interval '50 seconds' from procrastinate_jobs where id = %s and status = 'todo'"
    )
    wait_until(lambda: crew.rows(later, waiting) == [(True,)], what="for the third to be put off until it may go")
    crew.limiter.adjust("slow", -1)
    crew.rows("update procrastinate_jobs set scheduled_at = null where id = %s returning id", waiting)
    wait_until(lambda: crew.status(*jobs) == ["succeeded"] * 3, what="for the third")


def test_a_job_whose_time_is_over_fails(crew: ProcrastinateCrew, wait_until: Callable[..., Any]) -> None:
    crew.limiter.update("one", limit=0)
    job = crew.tasks.impatient.defer(number=1)
    wait_until(lambda: crew.ended(job), what="for it to end")
    assert crew.status(job) == ["failed"]
    wait_until(
        lambda: "AcquireTimeout: no slot came free within 0.3 s" in crew.log("first") + crew.log("second"),
        what="for a worker to say why",
    )


def test_keys_are_of_the_arguments_and_none_is_not_limited(
    crew: ProcrastinateCrew, wait_until: Callable[..., Any]
) -> None:
    word = str(uuid4())
    first = crew.tasks.of_tenant.defer(tenant="a", number=1, until=word)
    wait_until(lambda: crew.held("tenant") == 1, what="for the first to be at work")
    second = crew.tasks.of_tenant.defer(tenant="a", number=2)
    others = [crew.tasks.of_tenant.defer(tenant=tenant, number=3) for tenant in ("b", "")]
    wait_until(lambda: crew.status(*others) == ["succeeded"] * 2, what="for those of other keys")
    assert not {"succeeded", "failed"}.intersection(crew.status(first, second))
    crew.say(word)
    wait_until(lambda: crew.status(first, second) == ["succeeded"] * 2, what="for both")


def test_a_missing_limit_is_not_enforced_unless_strict(crew: ProcrastinateCrew, wait_until: Callable[..., Any]) -> None:
    jobs = [crew.tasks.of_nothing.defer(), crew.tasks.strictly_of_nothing.defer()]
    wait_until(lambda: crew.ended(*jobs), what="for both to end")
    assert crew.status(*jobs) == ["succeeded", "failed"]
    assert "LimitNotFound" in crew.log("first") + crew.log("second")


def test_the_slot_of_a_worker_that_dies_comes_back(crew: ProcrastinateCrew, wait_until: Callable[..., Any]) -> None:
    doomed = crew.start("doomed", "-q", "doomed")
    crew.tasks.brief.defer(until=str(uuid4()))
    wait_until(lambda: crew.held("brief") == 1, what="for it to be at work", timeout=PATIENCE)
    (holder,) = crew.limiter.holders("brief")
    assert holder.holder["worker"] == "doomed"
    doomed.send_signal(signal.SIGKILL)
    word = str(uuid4())
    crew.say(word)
    waiting = crew.tasks.brief.configure(queue="default").defer(until=word)
    wait_until(lambda: crew.status(waiting) == ["succeeded"], what="for the slot")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "concurrency or rate"),
        ({"concurrency": 3}, "concurrency: "),
        ({"rate": "a", "occupy": "two"}, "occupy"),
        ({"concurrency": "a", "key": 3}, "key"),
        ({"concurrency": "a", "timeout_seconds": -1}, "timeout_seconds"),
        ({"concurrency": "a", "stand_seconds": -1}, "stand_seconds"),
        ({"concurrency": "a", "postpone_seconds": "1"}, "postpone_seconds"),
        ({"concurrency": "a", "lease_duration": 0}, "lease_duration"),
        ({"concurrency": "a", "strict": None}, "strict"),
        ({"concurrency": "a", "limiter": "postgresql://"}, "limiter"),
    ],
)
def test_a_bad_option_is_an_error_where_the_task_is_defined(options: dict[str, Any], named: str) -> None:
    from procrastinate import App
    from procrastinate.testing import InMemoryConnector

    app = App(connector=InMemoryConnector())
    with pytest.raises(InvalidArgument, match=named):
        limited(app, **options)
    with pytest.raises(TypeError, match="concurency"):
        limited(app, rate="a", concurency="a")(lambda: None)


def test_a_plain_call_is_not_limited_and_a_test_in_memory_works(environment: str, limiter: Any) -> None:
    from procrastinate import App
    from procrastinate.testing import InMemoryConnector

    app = App(connector=InMemoryConnector())
    seen = []

    @limited(app, concurrency="one", timeout_seconds=0, name="seen")
    def see(number: int) -> int:
        seen.append((number, limiter.get("one").held))
        return number

    limiter.upsert("one", 1)
    assert see(1) == 1
    see.defer(number=2)
    app.run_worker(wait=False, install_signal_handlers=False)
    assert seen == [(1, 0), (2, 1)]


def test_the_example_of_the_page_prints_what_the_page_says(
    _bare_database: Any, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGLIMITS_DSN", raising=False)
    dsn = server.dsn(_bare_database.info.dbname)
    printed, said = pages.run("procrastinate", tmp_path, DATABASE_URL=dsn)
    assert printed == said
