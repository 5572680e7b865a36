"""Metrics and traces of a process: what is counted, and that nobody pays or suffers for it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import poolers
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from wrappertest import Api, Children, Connection, Locked, WaitUntil, backends, open_api, terminate, waiting

from pglimits import (
    AcquireTimeout,
    AsyncLimiter,
    Limiter,
    LimiterUnavailable,
    LimitNotFound,
    QueueFull,
    _observer,
    metrics,
)
from pglimits.asyncio import concurrency as concurrency_in_task
from pglimits.sync import concurrency, rate_limit

Sample = Callable[..., float]


@pytest.fixture
def registry() -> Iterator[CollectorRegistry]:
    """Counts while the test runs."""
    made = CollectorRegistry()
    metrics.enable(made)
    yield made
    metrics.disable(made)


@pytest.fixture
def sample(registry: CollectorRegistry) -> Sample:
    """sample("requests_total", limit="x"): the sum of those samples of pglimits_client_… that have these labels."""

    def read(name: str, **labels: str) -> float:
        assert metrics.flush()
        return sum(
            sample.value
            for family in registry.collect()
            for sample in family.samples
            if sample.name == f"pglimits_client_{name}" and labels.items() <= sample.labels.items()
        )

    return read


@pytest.fixture
def results(registry: CollectorRegistry) -> Callable[..., dict[str, float]]:
    """results("x"): how many requests of a limit got what."""

    def read(limit: str, operation: str = "acquire") -> dict[str, float]:
        assert metrics.flush()
        return {
            sample.labels["result"]: sample.value
            for family in registry.collect()
            for sample in family.samples
            if sample.name == "pglimits_client_requests_total"
            and (sample.labels["limit"], sample.labels["operation"]) == (limit, operation)
            and sample.value
        }

    return read


Results = Callable[..., dict[str, float]]


# What requests got.


def test_a_request_that_was_granted_is_counted_with_its_wait_and_its_hold(
    api: Api, sample: Sample, results: Results
) -> None:
    api.create("x", 1)
    api.block("x", lambda lease: None)
    api.release(api.acquire("x"))
    assert results("x") == {"granted": 2}
    assert sample("wait_seconds_count", limit="x", operation="acquire") == 2
    assert sample("hold_seconds_count", limit="x") == 2
    assert 0 < sample("wait_seconds_sum", limit="x") < 60
    assert sample("batch_requests_sum") == 2


def test_who_waits_is_counted_once_it_has_its_answer(
    api: Api, conn: Connection, sample: Sample, results: Results, wait_until: WaitUntil
) -> None:
    api.create("x", 1)
    first = api.acquire("x")
    second = api.start("acquire", "x")
    wait_until(lambda: waiting(conn) == 1)
    assert results("x") == {"granted": 1}
    api.release(first)
    api.release(second.result(60))
    assert results("x") == {"granted": 2}
    assert sample("hold_seconds_count", limit="x") == 2


def test_who_tries_once_is_refused_and_who_has_waited_in_vain_has_timed_out(api: Api, results: Results) -> None:
    api.create("x", 1)
    api.create("r", 1, slot_decay_per_second=0.01)
    lease = api.acquire("x")
    api.rate_limit("r")
    for limit, method, seconds in (("x", "acquire", 0), ("x", "acquire", 0.05), ("r", "rate_limit", 1)):
        with pytest.raises(AcquireTimeout):
            getattr(api, method)(limit, timeout_seconds=seconds)
    assert results("x") == {"granted": 1, "refused": 1, "timeout": 1}
    assert results("r", "rate_limit") == {"granted": 1, "refused": 1}
    api.release(lease)


def test_a_line_that_is_full_and_an_error_are_told_apart(
    api: Api, conn: Connection, results: Results, wait_until: WaitUntil
) -> None:
    api.create("x", 1, max_waiters=0)
    lease = api.acquire("x")
    with pytest.raises(QueueFull):
        api.acquire("x", timeout_seconds=60)
    with pytest.raises(LimitNotFound):
        api.acquire("nowhere", strict=True)
    assert results("x") == {"granted": 1, "queue_full": 1}
    assert results("nowhere") == {"error": 1}
    api.release(lease)


def test_a_limit_that_is_missing_or_off_counts_as_unlimited_also_beside_one_that_is_enforced(
    api: Api, sample: Sample, results: Results
) -> None:
    api.create("x", 1)
    api.create("off", 1, active=False)
    api.block(["x", "nowhere"], lambda lease: None)
    api.block("off", lambda lease: None)
    assert results("x") == {"granted": 1}
    assert results("nowhere") == {"unlimited": 1}
    assert results("off") == {"unlimited": 1}
    assert sample("wait_seconds_count", limit="nowhere") == sample("hold_seconds_count", limit="nowhere") == 0


def test_all_counters_of_a_limit_begin_at_zero_as_prometheus_sees_no_increase_in_what_appears(
    api: Api, registry: CollectorRegistry, sample: Sample
) -> None:
    api.create("x", 1)
    api.block("x", lambda lease: None)
    assert sample("requests_total") == 1
    for result in get_args(_observer.Result):
        labels = {"limit": "x", "operation": "acquire", "result": result}
        assert registry.get_sample_value("pglimits_client_requests_total", labels) == (result == "granted")
    assert registry.get_sample_value("pglimits_client_lost_leases_total", {"limit": "x"}) == 0


def test_a_request_over_several_limits_counts_for_each_and_never_for_a_key(api: Api, sample: Sample) -> None:
    api.create("a", 5)
    api.create("b", 5)
    api.block({("a", "k1"): 1, ("a", "k2"): 2, "b": 3}, lambda lease: None)
    for limit in ("a", "b"):
        assert sample("requests_total", limit=limit) == 1
        assert sample("hold_seconds_count", limit=limit) == 1
    assert sample("requests_total") == 2


def test_a_limit_that_somebody_keeps_locked_is_a_timeout(api: Api, connect: Any, results: Results) -> None:
    api.create("x", 1)
    locked = Locked(connect, "x")
    with pytest.raises(AcquireTimeout):
        api.acquire("x", timeout_seconds=0.1)
    locked.unlock()
    assert results("x") == {"timeout": 1}


def test_a_caller_that_is_cancelled_is_counted_as_that(
    dsn: str, conn: Connection, results: Results, wait_until: WaitUntil
) -> None:
    async def main() -> None:
        async with AsyncLimiter(dsn) as limiter:
            await limiter.create("x", 1)
            async with limiter.concurrency("x"):
                task = asyncio.create_task(limiter.acquire("x"))
                while await asyncio.to_thread(waiting, conn) == 0:
                    pass
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    asyncio.run(main())
    assert results("x") == {"granted": 1, "cancelled": 1}


@pytest.mark.parametrize(("how", "error"), [("raise", True), ("allow", False)])
def test_a_database_that_is_gone_is_counted_whatever_the_app_does_then(how: str, error: bool, results: Results) -> None:
    with Limiter("host=/nowhere dbname=x", on_unavailable=how) as limiter:  # type: ignore[arg-type]
        with pytest.raises(LimiterUnavailable) if error else contextlib.nullcontext():
            limiter.acquire("x")
        assert results("x") == {"unavailable": 1}


def test_the_functions_and_decorators_of_the_environment_are_counted_too(
    environment: str, sample: Sample, results: Results
) -> None:
    with Limiter() as limiter:
        limiter.create("x", 1)
        limiter.create("r", 5, slot_decay_per_second=1)

    @concurrency("x")
    def in_thread() -> None:
        rate_limit("r")

    @concurrency_in_task("x")
    async def in_task() -> None:
        pass

    in_thread()
    asyncio.run(in_task())
    assert results("x") == {"granted": 2}
    assert results("r", "rate_limit") == {"granted": 1}
    assert sample("wait_seconds_count", operation="rate_limit") == 1
    assert sample("hold_seconds_count") == 2


# Leases and connections.


def test_a_lease_that_was_lost_is_counted_once_also_where_only_the_release_tells(
    limiter: Limiter, conn: Connection, sample: Sample, wait_until: WaitUntil
) -> None:
    limiter.create("x", 2)
    renewed, released = limiter.acquire("x", lease_duration=1), limiter.acquire("x")
    limiter.reset("x")
    wait_until(lambda: renewed.lost)
    assert (limiter.release(renewed), limiter.release(released)) == (False, False)
    assert sample("lost_leases_total", limit="x") == 2
    assert sample("hold_seconds_count", limit="x") == 2


def test_what_a_limiter_holds_when_it_is_closed_is_no_lost_lease(dsn: str, sample: Sample) -> None:
    with Limiter(dsn) as limiter:
        limiter.create("x", 1)
        lease = limiter.acquire("x")
    assert lease.lost
    assert sample("lost_leases_total") == 0
    assert sample("hold_seconds_count", limit="x") == 1


@pytest.mark.skipif(poolers.MODE is not None, reason="behind a pooler its connections to the server may break unseen")
def test_a_connection_in_place_of_a_broken_one_is_a_reconnect(
    limiter: Limiter, conn: Connection, sample: Sample, wait_until: WaitUntil
) -> None:
    limiter.create("x", 1)
    assert sample("reconnects_total") == 0
    terminate(conn, backends(conn))
    limiter.release(limiter.acquire("x"))
    assert sample("reconnects_total") == 1


def test_requests_that_travel_together_are_one_batch(dsn: str, sample: Sample) -> None:
    async def main() -> None:
        async with AsyncLimiter(dsn) as limiter:
            await limiter.create("x", 100)
            async with asyncio.TaskGroup() as group:
                for _ in range(50):
                    group.create_task(limiter.acquire("x", renew=False))

    asyncio.run(main())
    assert sample("batch_requests_sum") == 50
    assert 1 <= sample("batch_requests_count") < 50


# Nobody suffers.


class Broken:
    """An observer that fails whatever it is told."""

    def __getattr__(self, name: str) -> Any:
        def fail(*args: Any) -> None:
            raise RuntimeError(f"broken {name}")

        return fail


def test_an_observer_that_fails_hurts_no_request_and_is_logged_once(
    api: Api, sample: Sample, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    _observer.add(broken)
    try:
        api.create("x", 1)
        for _ in range(3):
            api.block("x", lambda lease: None)
        assert sample("requests_total") == 3
    finally:
        _observer.remove(broken)
    said = [record for record in caplog.records if record.name == "pglimits.metrics"]
    assert [record.exc_info is not None for record in said] == [True]


def test_an_observer_that_hangs_keeps_nobody_waiting(api: Api) -> None:
    class Hanging(metrics._Metrics):
        def sent(self, requests: int, context: None) -> None:
            hangs.wait()

    hangs = threading.Event()
    hanging = Hanging(CollectorRegistry(), (1,), (1,))
    _observer.add(hanging)
    try:
        api.create("x", 1)
        for _ in range(3):
            api.block("x", lambda lease: None)
        assert not metrics.flush(0.01)
    finally:
        hangs.set()
        assert metrics.flush()
        _observer.remove(hanging)


def test_what_comes_faster_than_it_is_counted_is_forgotten_and_that_is_said(
    api: Api, monkeypatch: pytest.MonkeyPatch, sample: Sample, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_observer, "MOST", 0)
    _observer._made._said.clear()
    api.create("x", 1)
    api.block("x", lambda lease: None)
    monkeypatch.undo()
    assert sample("requests_total") == 0
    assert [record.getMessage() for record in caplog.records if record.name == "pglimits.metrics"] == [
        "metrics or traces are too slow for what happens: some of it is not counted"
    ]


def test_enabling_twice_counts_once_and_disabling_takes_the_metrics_out(limiter: Limiter) -> None:
    registry = CollectorRegistry()
    metrics.enable(registry)
    metrics.enable(registry)
    limiter.create("x", 1)
    lease = limiter.acquire("x")
    assert metrics.flush()
    metrics.disable(registry)
    assert generate_latest(registry) == b""
    assert not _observer.is_on
    limiter.release(lease)
    metrics.disable(registry)
    assert not _observer.held


def test_names_that_an_app_has_taken_already_are_an_error_and_leave_nothing_behind() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    metrics._Metrics(second, (1,), (1,))
    before = generate_latest(second)
    with pytest.raises(ValueError, match="pglimits_client_requests"):
        metrics.enable(second)
    assert generate_latest(second) == before
    assert not _observer.is_on
    metrics.enable(first)
    metrics.disable(first)


# Other processes.


def test_importing_pglimits_imports_nothing_that_was_not_asked_for() -> None:
    code = "import sys, pglimits, pglimits.sync, pglimits.asyncio; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pglimits" in loaded
    wanted = ("prometheus_client", "opentelemetry", "fastapi", "uvicorn", "pglimits.metrics", "pglimits.otel")
    assert [name for name in loaded if name.startswith(wanted)] == []


FORKS = """
import os, sys
from prometheus_client import REGISTRY
from pglimits import Limiter, metrics
metrics.enable()
limiter = Limiter()

def counted(name):
    assert metrics.flush()
    return int(REGISTRY.get_sample_value(f"pglimits_client_{name}", {"limit": "x"}) or 0)

with limiter.concurrency("x"):
    pid = os.fork()
    with limiter.concurrency("x"):
        pass
    who = "child" if pid == 0 else "parent"
    os.write(1, f"{who} {counted('hold_seconds_count')}\\n".encode())  # in one piece, as both do
if pid == 0:
    assert counted("hold_seconds_count") == 1  # the block that the parent had entered is the parent's
    limiter.close()
    os._exit(0)
os.waitpid(pid, 0)
print("parent", counted("hold_seconds_count"))
"""


def test_parent_and_child_of_a_fork_count_each_its_own(children: Children, dsn: str, limiter: Limiter) -> None:
    limiter.create("x", 10)
    child = children(FORKS, env={"PGLIMITS_DSN": dsn})
    heard = [child.hear() for _ in range(3)]
    assert sorted(heard[:2]) == ["child 1", "parent 1"]
    assert heard[2] == "parent 2"


SEVERAL_PROCESSES = """
import multiprocessing
from prometheus_client import CollectorRegistry, multiprocess
from pglimits import metrics
from pglimits.sync import concurrency

def work():
    with concurrency("x"):
        pass
    assert metrics.flush()

metrics.enable()
work()
for _ in range(2):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
labels = {"limit": "x", "operation": "acquire", "result": "granted"}
print(registry.get_sample_value("pglimits_client_requests_total", labels))
"""


def test_processes_that_fork_are_added_up_in_the_multi_process_mode_of_prometheus_client(
    children: Children, dsn: str, limiter: Limiter, tmp_path: Path
) -> None:
    limiter.create("x", 10)
    child = children(SEVERAL_PROCESSES, env={"PGLIMITS_DSN": dsn, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)})
    assert child.hear() == "3.0"


ENDS = """
import atexit
from prometheus_client import REGISTRY, CollectorRegistry
labels = {"limit": "x", "operation": "acquire", "result": "granted"}
atexit.register(lambda: print(REGISTRY.get_sample_value("pglimits_client_requests_total", labels), flush=True))
from pglimits import metrics
from pglimits.sync import concurrency
metrics.enable()
with concurrency("x"):
    pass
"""


def test_what_happened_last_is_counted_before_the_process_ends(children: Children, dsn: str, limiter: Limiter) -> None:
    limiter.create("x", 1)
    assert children(ENDS, env={"PGLIMITS_DSN": dsn}).hear() == "1.0"


# What is exposed.


def exposed(registry: CollectorRegistry) -> dict[str, str]:
    """The names of the samples, each with its help."""
    return {
        sample.name: family.documentation
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_names_labels_and_texts_are_those_of_the_issue(api: Api, registry: CollectorRegistry, sample: Sample) -> None:
    api.create('a ü\\"b\\n', 1)
    api.block('a ü\\"b\\n', lambda lease: None)
    assert sample("requests_total", limit='a ü\\"b\\n', operation="acquire", result="granted") == 1
    with open_api(api.kind, dsn="host=/nowhere dbname=x", on_unavailable="allow") as other:
        other.block("x", lambda lease: None)
    registry_names = {family.name: family.documentation for family in registry.collect()}
    assert set(registry_names) == {
        "pglimits_client_requests",
        "pglimits_client_wait_seconds",
        "pglimits_client_hold_seconds",
        "pglimits_client_batch_requests",
        "pglimits_client_lost_leases",
        "pglimits_client_reconnects",
    }
    assert all(text.endswith(".") for text in registry_names.values())
    assert "pglimits_client_requests_total" in exposed(registry)
    assert not any("key" in sample.labels for family in registry.collect() for sample in family.samples)
