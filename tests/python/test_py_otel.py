"""OpenTelemetry: the same metrics as of Prometheus, and spans around waiting and holding."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from wrappertest import Api, Connection, WaitUntil, waiting

from pglimits import AcquireTimeout, AsyncLimiter, Lease, Limiter, _observer, otel


class Recorded:
    """What an app's SDK is given."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.exporter = InMemorySpanExporter()
        self.meters = MeterProvider([self.reader])
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.tracers.get_tracer("app")

    def points(self, name: str) -> list[Any]:
        """The points of a metric, as they stand now."""
        assert otel.flush()
        data = self.reader.get_metrics_data()
        return [
            point
            for resource in ([] if data is None else data.resource_metrics)
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]

    def spans(self) -> dict[str, ReadableSpan]:
        assert otel.flush()
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    made = Recorded()
    otel.enable(meter_provider=made.meters, tracer_provider=made.tracers)
    yield made
    otel.disable()
    made.meters.shutdown()
    made.tracers.shutdown()


def sums(points: list[Any], *attributes: str) -> dict[Any, Any]:
    return {tuple(point.attributes[each] for each in attributes): getattr(point, "value", None) for point in points}


def test_requests_waits_and_holds_are_recorded_for_each_limit(api: Api, recorded: Recorded) -> None:
    api.create("a", 1)
    api.create("b", 1)
    with pytest.raises(AcquireTimeout):
        api.block(["a", "b"], lambda lease: api.acquire("a", timeout_seconds=0))
    requests = recorded.points("pglimits.client.requests")
    assert sums(requests, "pglimits.limit.name", "pglimits.request.result") == {
        ("a", "granted"): 1,
        ("b", "granted"): 1,
        ("a", "refused"): 1,
    }
    assert [point.attributes["error.type"] for point in requests if "error.type" in point.attributes] == [
        "AcquireTimeout"
    ]
    for name in ("pglimits.request.wait_time", "pglimits.lease.use_time"):
        found = recorded.points(name)
        assert {point.attributes["pglimits.limit.name"]: point.count for point in found} == {"a": 1, "b": 1}
        assert all(0 < point.sum < 60 and point.explicit_bounds[0] == 0.001 for point in found)
    assert [point.sum for point in recorded.points("pglimits.client.batch_requests")] == [2]


def test_slots_that_are_held_are_counted_and_go_back_to_zero(api: Api, recorded: Recorded) -> None:
    def look(lease: Lease) -> dict[Any, Any]:
        return sums(recorded.points("pglimits.slot.count"), "pglimits.limit.name")

    api.create("a", 5)
    api.create("b", 5)
    assert api.block({("a", "k1"): 1, ("a", "k2"): 2, "b": 1, "missing": 1}, look) == {("a",): 3, ("b",): 1}
    assert sums(recorded.points("pglimits.slot.count"), "pglimits.limit.name") == {("a",): 0, ("b",): 0}


def test_a_lost_lease_is_recorded_and_its_span_is_an_error(
    limiter: Limiter, recorded: Recorded, wait_until: WaitUntil
) -> None:
    limiter.create("x", 1)
    lease = limiter.acquire("x", lease_duration=1)
    limiter.reset("x")
    wait_until(lambda: lease.lost)
    assert sums(recorded.points("pglimits.client.lost_leases"), "pglimits.limit.name") == {("x",): 1}
    span = recorded.spans()["hold x"]
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert (span.attributes["pglimits.lease.lost"], span.attributes["pglimits.lease.id"]) == (True, str(lease.id))


def test_spans_of_waiting_and_holding_lie_below_the_span_of_whoever_asked(
    dsn: str, conn: Connection, recorded: Recorded
) -> None:
    async def work(limiter: AsyncLimiter, name: str) -> None:
        with recorded.tracer.start_as_current_span(name):
            async with limiter.concurrency("x"):
                while name == "first" and await asyncio.to_thread(waiting, conn) == 0:
                    pass

    async def main() -> None:
        async with AsyncLimiter(dsn) as limiter, asyncio.TaskGroup() as group:
            await limiter.create("x", 1)
            group.create_task(work(limiter, "first"))
            group.create_task(work(limiter, "second"))

    asyncio.run(main())
    assert otel.flush()
    spans = recorded.exporter.get_finished_spans()
    parents = {span.context.span_id: span for span in spans if span.name in ("first", "second")}
    below: dict[str, list[ReadableSpan]] = {"first": [], "second": []}
    for span in spans:
        if span.context.span_id not in parents:
            assert span.parent is not None
            below[parents[span.parent.span_id].name].append(span)
    assert {name: sorted(span.name for span in found) for name, found in below.items()} == {
        "first": ["acquire x", "hold x"],
        "second": ["acquire x", "hold x"],
    }
    first_hold, second_wait, second_hold = (
        next(span for span in below[of] if span.name == name)
        for of, name in (("first", "hold x"), ("second", "acquire x"), ("second", "hold x"))
    )
    millisecond = 1_000_000
    for earlier, later in ((first_hold, second_hold), (second_wait, second_hold)):
        assert earlier.end_time is not None
        assert later.start_time is not None
        assert earlier.end_time <= later.start_time + 100 * millisecond


def test_the_span_of_a_request_says_what_it_asked_for_and_what_it_got(api: Api, recorded: Recorded) -> None:
    api.create("a", 5)
    api.create("r", 5, slot_decay_per_second=1)
    api.block({"a": 2}, lambda lease: None)
    api.rate_limit(["r"], occupy=3)
    with pytest.raises(ValueError, match="slots must"):
        api.acquire("a", occupy=9)
    got = [span for span in recorded.exporter.get_finished_spans() if span.name != "hold a"] if otel.flush() else []
    assert [(span.name, dict(span.attributes or {}), span.status.status_code) for span in got] == [
        (
            name,
            {
                "pglimits.operation.name": name.split()[0],
                "pglimits.limit.names": (name.split()[1],),
                "pglimits.request.slots": (slots,),
                "pglimits.request.result": result,
                **({"error.type": "SlotsExceedLimit"} if result == "error" else {}),
            },
            StatusCode.ERROR if result == "error" else StatusCode.UNSET,
        )
        for name, slots, result in (
            ("acquire a", 2, "granted"),
            ("rate_limit r", 3, "granted"),
            ("acquire a", 9, "error"),
        )
    ]


def test_nothing_is_recorded_that_was_not_asked_for_and_nothing_after_the_end(
    limiter: Limiter, recorded: Recorded
) -> None:
    limiter.create("x", 1)
    providers: dict[str, Any] = {"meter_provider": recorded.meters, "tracer_provider": recorded.tracers}
    otel.enable(**providers, with_metrics=False)
    limiter.release(limiter.acquire("x"))
    assert sorted(recorded.spans()) == ["acquire x", "hold x"]
    assert recorded.points("pglimits.client.requests") == recorded.points("pglimits.slot.count") == []
    recorded.exporter.clear()
    otel.enable(**providers, with_traces=False)
    otel.enable(**providers, with_traces=False)
    limiter.release(limiter.acquire("x"))
    assert recorded.spans() == {}
    assert [point.value for point in recorded.points("pglimits.client.requests")] == [1]
    otel.disable()
    limiter.release(limiter.acquire("x"))
    assert [point.value for point in recorded.points("pglimits.client.requests")] == [1]
    assert not _observer.is_on


def test_what_could_not_be_enabled_is_enabled_by_the_next_call(limiter: Limiter, recorded: Recorded) -> None:
    otel.disable()
    providers: dict[str, Any] = {"meter_provider": recorded.meters, "tracer_provider": recorded.tracers}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(otel.trace, "get_tracer", None)
        with pytest.raises(TypeError):
            otel.enable(**providers)
    otel.enable(**providers)
    limiter.create("x", 1)
    limiter.release(limiter.acquire("x"))
    assert sorted(recorded.spans()) == ["acquire x", "hold x"]


def test_both_kinds_of_metrics_count_side_by_side(
    limiter: Limiter, recorded: Recorded, request: pytest.FixtureRequest
) -> None:
    from prometheus_client import CollectorRegistry

    from pglimits import metrics

    registry = CollectorRegistry()
    metrics.enable(registry)
    request.addfinalizer(lambda: metrics.disable(registry))
    limiter.create("x", 1)
    limiter.release(limiter.acquire("x"))
    assert [point.value for point in recorded.points("pglimits.client.requests")] == [1]
    labels = {"limit": "x", "operation": "acquire", "result": "granted"}
    assert registry.get_sample_value("pglimits_client_requests_total", labels) == 1
