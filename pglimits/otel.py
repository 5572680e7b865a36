"""Metrics and traces of this process for OpenTelemetry.

Nothing is recorded before ``enable()``. Needs opentelemetry-api (``pip install 'pglimits[otel]'``); what becomes of the
data is up to the SDK that the app sets up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

from . import __version__, _observer

try:
    from opentelemetry import context as otel_context
    from opentelemetry import metrics, trace
except ImportError as error:
    raise ImportError("pglimits.otel needs opentelemetry-api: pip install 'pglimits[otel]'") from error

__all__ = ["disable", "enable", "flush"]

LIMIT = "pglimits.limit.name"
LIMITS = "pglimits.limit.names"
OPERATION = "pglimits.operation.name"
RESULT = "pglimits.request.result"
SLOTS = "pglimits.request.slots"
LEASE = "pglimits.lease.id"
LOST = "pglimits.lease.lost"
ERROR = "error.type"

_WAIT_BOUNDARIES = (0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)
_USE_BOUNDARIES = (0.001, 0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 14400)
_BATCH_BOUNDARIES = (1, 2, 4, 8, 16, 32, 64, 128)
_NO_FAULT = ("granted", "unlimited", "refused", "cancelled")
"""Results that are no error of a span."""


class _Metrics:
    """The instruments of one meter."""

    def __init__(self, provider: metrics.MeterProvider | None) -> None:
        meter = metrics.get_meter("pglimits", __version__, provider)
        self._on = True
        self._seen: set[str] = set()
        meter.create_observable_up_down_counter(
            "pglimits.slot.count", [self._slots], "{slot}", "Slots that this process holds."
        )
        self._wait = meter.create_histogram(
            "pglimits.request.wait_time",
            "s",
            "From the call to the grant, of requests that were granted.",
            explicit_bucket_boundaries_advisory=_WAIT_BOUNDARIES,
        )
        self._use = meter.create_histogram(
            "pglimits.lease.use_time",
            "s",
            "From the grant of a lease to its release or loss.",
            explicit_bucket_boundaries_advisory=_USE_BOUNDARIES,
        )
        self._batch = meter.create_histogram(
            "pglimits.client.batch_requests",
            "{request}",
            "Requests that went to the database in one statement.",
            explicit_bucket_boundaries_advisory=_BATCH_BOUNDARIES,
        )
        self._requests = meter.create_counter(
            "pglimits.client.requests", "{request}", "Requests of this process, by what they got."
        )
        self._lost = meter.create_counter(
            "pglimits.client.lost_leases", "{lease}", "Leases that ended while this process still held them."
        )
        self._reconnects = meter.create_counter(
            "pglimits.client.reconnects",
            "{connection}",
            "Connections to the database that were opened in place of broken ones.",
        )

    def off(self) -> None:
        """An observable instrument cannot be taken out of its meter."""
        self._on = False

    def _slots(self, options: metrics.CallbackOptions) -> Iterable[metrics.Observation]:
        if not self._on:
            return []
        found = dict.fromkeys(self._seen, 0)
        for hold in list(_observer.held.values()):
            for limit, slots in zip(hold.limits, hold.slots, strict=True):
                found[limit] = found.get(limit, 0) + slots
        self._seen.update(found)
        return [metrics.Observation(slots, {LIMIT: limit}) for limit, slots in found.items()]

    # What an observer is told.

    def context(self) -> None:
        return None

    def answered(self, answer: _observer.Answer, context: Any) -> None:
        for limit, result in answer.results():
            of = {LIMIT: limit, OPERATION: answer.operation}
            failed = {} if answer.error is None else {ERROR: answer.error}
            self._requests.add(1, {**of, RESULT: result, **failed})
            if result == "granted":
                self._wait.record(answer.answered_at - answer.asked_at, of)

    def ended(self, hold: _observer.Hold, context: Any) -> None:
        for limit in hold.limits:
            self._use.record(hold.ended_at - hold.granted_at, {LIMIT: limit})

    def lost(self, limits: tuple[str, ...], context: None) -> None:
        for limit in limits:
            self._lost.add(1, {LIMIT: limit})

    def sent(self, requests: int, context: None) -> None:
        self._batch.record(requests)

    def reconnected(self, connections: int, context: None) -> None:
        self._reconnects.add(connections)


class _Traces:
    """A span for each request and one for each lease, below the span in which the request was made."""

    def __init__(self, provider: trace.TracerProvider | None) -> None:
        self._tracer = trace.get_tracer("pglimits", __version__, provider)

    def off(self) -> None:
        """Nothing is left behind."""

    def context(self) -> otel_context.Context:
        return otel_context.get_current()

    def _span(
        self, name: str, context: otel_context.Context, kind: trace.SpanKind, begin: float, attributes: dict[str, Any]
    ) -> trace.Span:
        return self._tracer.start_span(name, context, kind, attributes, start_time=_nanoseconds(begin))

    def answered(self, answer: _observer.Answer, context: otel_context.Context) -> None:
        attributes: dict[str, Any] = {
            OPERATION: answer.operation,
            LIMITS: answer.limits,
            SLOTS: answer.slots,
            RESULT: answer.result,
        }
        if answer.error is not None:
            attributes[ERROR] = answer.error
        name = f"{answer.operation} {_named(answer.limits)}"
        span = self._span(name, context, trace.SpanKind.CLIENT, answer.asked_at, attributes)
        if answer.result not in _NO_FAULT:
            span.set_status(trace.StatusCode.ERROR)
        span.end(_nanoseconds(answer.answered_at))

    def ended(self, hold: _observer.Hold, context: otel_context.Context) -> None:
        attributes: dict[str, Any] = {
            LIMITS: hold.limits,
            SLOTS: hold.slots,
            LEASE: str(hold.lease_id),
            LOST: hold.lost,
        }
        name = f"hold {_named(hold.limits)}"
        span = self._span(name, context, trace.SpanKind.INTERNAL, hold.granted_at, attributes)
        if hold.lost:
            span.set_status(trace.StatusCode.ERROR, "the lease was lost")
        span.end(_nanoseconds(hold.ended_at))

    def lost(self, limits: tuple[str, ...], context: None) -> None:
        """Its span says so."""

    def sent(self, requests: int, context: None) -> None:
        """Not of one request."""

    def reconnected(self, connections: int, context: None) -> None:
        """Not of one request."""


def _named(limits: tuple[str, ...]) -> str:
    return ", ".join(limits)


def _nanoseconds(moment: float) -> int:
    """A moment of the monotonic clock, since 1970."""
    return time.time_ns() + int((moment - time.monotonic()) * 1e9)


_enabled: list[_Metrics | _Traces] = []
_arguments: tuple[object, ...] | None = None
"""What it was enabled with."""
_lock = threading.Lock()


def enable(
    *,
    meter_provider: metrics.MeterProvider | None = None,
    tracer_provider: trace.TracerProvider | None = None,
    with_metrics: bool = True,
    with_traces: bool = True,
) -> None:
    """Record from now on, for all limiters of this process. Doing it twice is harmless; other arguments replace these.

    Args:
        meter_provider, tracer_provider: of the SDK; None: those that the app has set for all.
        with_metrics, with_traces: False leaves these out.
    """
    global _arguments
    arguments = (meter_provider, tracer_provider, with_metrics, with_traces)
    with _lock:
        if _arguments == arguments:
            return
        _disable()
        if with_metrics:
            _enabled.append(_Metrics(meter_provider))
        if with_traces:
            _enabled.append(_Traces(tracer_provider))
        for each in _enabled:
            _observer.add(each)
        _arguments = arguments


def disable() -> None:
    """Record no longer."""
    with _lock:
        _disable()


def _disable() -> None:
    global _arguments
    _arguments = None
    while _enabled:
        observer = _enabled.pop()
        observer.off()
        _observer.remove(observer)


def flush(seconds: float = 5.0) -> bool:
    """Wait until what has happened so far is recorded, for at most so many seconds. Returns whether it is.

    Recording runs up to 0.1 s behind. Call this before the SDK is shut down.
    """
    return _observer.flush(seconds)
