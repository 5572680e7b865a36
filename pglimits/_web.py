"""What web frameworks share: what a request of theirs needs, and how a refusal is answered."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from . import _arguments
from ._arguments import Names, Part
from ._calls import Course
from ._leases import Lease, Place
from ._problem_details import MEDIA_TYPE, details, whole_seconds
from ._ratelimit_fields import PATIENCE, Budget, Known, fields, full, policy
from .errors import AcquireTimeout, LimiterUnavailable, PermissionDenied, PglimitsError, QueueFull

if TYPE_CHECKING:
    from ._limiter import AsyncLimiter, Limiter

log = logging.getLogger("pglimits.web")

T = TypeVar("T")


@dataclass(slots=True)
class Refusal:
    """A request that gets no slot, as an answer of HTTP."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def content(self) -> bytes:
        return json.dumps(self.body, ensure_ascii=False).encode()


@dataclass(slots=True)
class Entered:
    """A request that goes on. ``lease``: what it holds, if it is to hold something."""

    lease: Lease | None
    headers: Mapping[str, str]


class Wanted:
    """What each request to a route or an app needs."""

    def __init__(
        self,
        names: Names,
        occupy: int,
        timeout_seconds: float | None,
        strict: bool,
        *,
        lease_duration: float | None,
        show_fields: bool,
    ) -> None:
        """``lease_duration``: None for rate_limit, which holds nothing. Raises InvalidArgument."""
        _arguments.parts(names, occupy, "")
        self._names = names
        self._occupy = occupy
        self._timeout = _arguments.timeout(timeout_seconds, None)
        self._strict = _arguments.flag("strict", strict)
        self._duration = None if lease_duration is None else _arguments.lease_duration(lease_duration)
        self._show_fields = _arguments.flag("show_fields", show_fields)
        self._known = Known()

    @property
    def may_wait(self) -> bool:
        return self._timeout != 0

    def enter(self, limiter: Limiter | AsyncLimiter, key: str, holder: Any) -> Course[Entered | Refusal]:
        """Take the slots, and say what is left. Raises what is the app's own mistake, such as a missing limit."""
        from ._calls import Calls

        parts = _arguments.parts(self._names, self._occupy, key)
        places = [(part.name, part.key) for part in parts]
        lease = None
        try:
            if self._duration is None:
                yield from Calls.rate_limit(limiter, self._names, self._occupy, self._timeout, self._strict, key)  # type: ignore[arg-type]
            else:
                lease = yield from Calls.acquire(
                    limiter,  # type: ignore[arg-type]
                    self._names,
                    self._occupy,
                    self._timeout,
                    None,
                    self._duration,
                    self._strict,
                    holder,
                    key=key,
                )
        except (AcquireTimeout, QueueFull, LimiterUnavailable) as error:
            unreachable = isinstance(error, LimiterUnavailable)
            return refusal(error, parts, [] if unreachable else (yield from self._left(limiter, places)))
        try:
            left = yield from self._left(limiter, places)
        except BaseException:  # the task is cancelled, or the thread struck, in this moment
            if lease is not None:
                limiter._release_later(lease)
            raise
        return Entered(lease, fields(left))

    def _left(self, limiter: Limiter | AsyncLimiter, places: Iterable[Place]) -> Course[list[Budget]]:
        from ._reports import Reports

        if not self._show_fields:
            return []
        try:
            looking = Reports._budgets(limiter, self._known, places)  # type: ignore[arg-type]
            return (yield from _at_most(PATIENCE, looking)) or []
        except PermissionDenied:
            self._show_fields = False
            log.warning("answers have no RateLimit fields: the role of the app is no pglimits_reader")
        except PglimitsError:
            pass  # the answer stands without them
        return []


def _at_most(seconds: float, course: Course[T]) -> Course[T | None]:
    """What a course returns; None if that takes longer."""
    until = time.monotonic() + seconds
    try:
        waker, timeout = next(course)
        while (left := until - time.monotonic()) > 0:
            yield waker, left if timeout is None else min(timeout, left)
            waker, timeout = next(course)
    except StopIteration as end:
        found: T = end.value
        return found
    finally:
        course.close()
    return None


def refusal(error: PglimitsError, parts: Sequence[Part], budgets: list[Budget]) -> Refusal:
    """What somebody hears who gets no slot."""
    found = details(error)
    assert found is not None
    body, headers = found.body(), {"Content-Type": MEDIA_TYPE}
    if found.status == 429:
        violated = full([(part.name, part.key, part.slots) for part in parts], budgets)
        names = [budget.policy for budget in violated] or [policy(part.name) for part in parts]
        body["violated-policies"] = list(dict.fromkeys(names))
    if found.retry_after is not None:
        headers["Retry-After"] = whole_seconds(found.retry_after)
    return Refusal(found.status, body, {**headers, **fields(budgets, found.retry_after)})
