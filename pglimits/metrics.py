"""Metrics of this process for Prometheus: what its requests got, how long they waited, how long it held what it got.

Nothing is counted before ``enable()``. Needs prometheus-client (``pip install 'pglimits[metrics]'``).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, get_args

from . import _observer

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
except ImportError as error:
    raise ImportError("pglimits.metrics needs prometheus-client: pip install 'pglimits[metrics]'") from error

__all__ = ["HOLD_BUCKETS", "WAIT_BUCKETS", "disable", "enable", "flush"]

WAIT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)
"""Seconds. Without any line a request takes about a millisecond."""
HOLD_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 14400)
"""Seconds."""
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class _Metrics:
    """What is registered in one registry."""

    def __init__(
        self, registry: CollectorRegistry, wait_buckets: Sequence[float], hold_buckets: Sequence[float]
    ) -> None:
        self._registry = registry
        self.all: list[Counter | Histogram] = []
        # Those of a limit are looked up here: that is faster than ``labels()``.
        self._children: dict[tuple[Any, ...], Any] = {}
        self._known: set[tuple[str, str]] = set()
        try:
            self._requests = self._add(
                Counter(
                    "pglimits_client_requests",
                    "Requests of this process, by what they got.",
                    ("limit", "operation", "result"),
                    registry=registry,
                )
            )
            self._wait = self._add(
                Histogram(
                    "pglimits_client_wait_seconds",
                    "Seconds from the call to the grant, of requests that were granted.",
                    ("limit", "operation"),
                    buckets=wait_buckets,
                    registry=registry,
                )
            )
            self._hold = self._add(
                Histogram(
                    "pglimits_client_hold_seconds",
                    "Seconds from the grant of a lease to its release or loss.",
                    ("limit",),
                    buckets=hold_buckets,
                    registry=registry,
                )
            )
            self._batch = self._add(
                Histogram(
                    "pglimits_client_batch_requests",
                    "Requests that went to the database in one statement.",
                    buckets=_BATCH_BUCKETS,
                    registry=registry,
                )
            )
            self._lost = self._add(
                Counter(
                    "pglimits_client_lost_leases",
                    "Leases that ended while this process still held them.",
                    ("limit",),
                    registry=registry,
                )
            )
            self._reconnects = self._add(
                Counter(
                    "pglimits_client_reconnects",
                    "Connections to the database that were opened in place of broken ones.",
                    registry=registry,
                )
            )
        except BaseException:
            self.unregister()
            raise

    def _add(self, metric: Any) -> Any:
        self.all.append(metric)
        return metric

    def unregister(self) -> None:
        for metric in self.all:
            self._registry.unregister(metric)

    def _begin(self, limit: str, operation: _observer.Operation) -> None:
        """All counters of a limit begin at zero: what appears with a one is no increase to Prometheus."""
        self._known.add((limit, operation))
        self._of(self._lost, limit)
        for result in get_args(_observer.Result):
            self._of(self._requests, limit, operation, result)

    def _of(self, metric: Any, *labels: str) -> Any:
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child

    # What an observer is told.

    def context(self) -> None:
        return None

    def answered(self, answer: _observer.Answer, context: Any) -> None:
        for limit, result in answer.results():
            if (limit, answer.operation) not in self._known:
                self._begin(limit, answer.operation)
            self._of(self._requests, limit, answer.operation, result).inc()
            if result == "granted":
                waited = answer.answered_at - answer.asked_at
                self._of(self._wait, limit, answer.operation).observe(waited)

    def ended(self, hold: _observer.Hold, context: Any) -> None:
        for limit in hold.limits:
            self._of(self._hold, limit).observe(hold.ended_at - hold.granted_at)

    def lost(self, limits: tuple[str, ...], context: None) -> None:
        for limit in limits:
            self._of(self._lost, limit).inc()

    def sent(self, requests: int, context: None) -> None:
        self._batch.observe(requests)

    def reconnected(self, connections: int, context: None) -> None:
        self._reconnects.inc(connections)


_enabled: dict[int, _Metrics] = {}
_lock = threading.Lock()


def enable(
    registry: CollectorRegistry | None = None,
    *,
    wait_buckets: Sequence[float] = WAIT_BUCKETS,
    hold_buckets: Sequence[float] = HOLD_BUCKETS,
) -> None:
    """Count from now on, for all limiters of this process. Doing it twice is harmless.

    Args:
        registry: where the metrics are registered; None: prometheus_client.REGISTRY.
        wait_buckets, hold_buckets: the upper bounds, in seconds, of the two histograms of times.

    Raises:
        ValueError: the registry has metrics of these names from elsewhere.
    """
    chosen = REGISTRY if registry is None else registry
    with _lock:
        if id(chosen) not in _enabled:
            made = _enabled[id(chosen)] = _Metrics(chosen, wait_buckets, hold_buckets)
            _observer.add(made)


def disable(registry: CollectorRegistry | None = None) -> None:
    """Count no longer, and take the metrics out of that registry."""
    with _lock:
        metrics = _enabled.pop(id(REGISTRY if registry is None else registry), None)
        if metrics is not None:
            _observer.remove(metrics)
            metrics.unregister()


def flush(seconds: float = 5.0) -> bool:
    """Wait until what has happened so far is counted, for at most so many seconds. Returns whether it is.

    Counting runs up to 0.1 s behind. A job that pushes its metrics when it is done calls this first.
    """
    return _observer.flush(seconds)
