"""The rows of the peers: ours and theirs in turns, at the same work, called in the same way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from pglimits import Limiter
from pglimits.errors import EmbeddedUnavailable

from .._figures import figure
from .._measure import slope, spread
from .._processes import Worker, worker
from .._results import Line, Result, Skipped
from .._rows import Bench, row
from .._server import Site, server_where
from . import prefect, pyrate, redis_limits, throttled
from ._peer import Opened, Peer, Quota

PEERS = (prefect.PEER, redis_limits.PEER, throttled.PEER, pyrate.PEER)

_STREAM = Quota(100, 1)
_CALLERS = 8
"""Who do not wait, or ask for turns all the time."""
_HOLD = 0.02
"""Seconds for which a slot is held that is then handed over."""
_STARTING = 2.0
"""Seconds of a stream that are not counted: what has gathered before it is used up first."""
_PAUSE = 0.005
"""Seconds between two calls of those who do not wait."""


def measure(peer: Peer, bench: Bench) -> Iterator[Result]:
    """Ours and a peer's, or why it cannot take part."""
    reason = peer.missing()
    if reason is None and peer.database and not bench.server.own:
        reason = "it needs a database of its own: run without --dsn"
    if reason is not None:
        yield Skipped(peer.name, peer.what, reason)
        return
    bench.peers |= peer.versions()
    with contextlib.ExitStack() as stack:
        server = bench.server
        if peer.extension and not server.has(peer.extension):
            try:
                suits = server_where(lambda other: other.has(peer.extension), peer.extension, instead_of=server)
                server = stack.enter_context(suits)
            except EmbeddedUnavailable as error:
                yield Skipped(peer.name, peer.what, f"{error}: apt install postgresql")
                return
            bench.peers["PostgreSQL for " + peer.name] = server.setup()["version"]
        site = stack.enter_context(server.site())
        variants = stack.enter_context(peer.open(server, site))
        for opened in variants if bench.scale.peer_variants else variants[:1]:
            role = {"role": "calls", "flavour": opened.task["flavour"]}
            with worker(role) as ours, worker(role, opened.environment) as theirs:
                yield from _Contest(bench, site, peer, opened, ours, theirs).all()


class _Contest:
    """Ours against one variant of a peer."""

    def __init__(self, bench: Bench, site: Site, peer: Peer, opened: Opened, ours: Worker, theirs: Worker) -> None:
        self._bench, self._site, self._peer, self._opened = bench, site, peer, opened
        self._workers = ours, theirs
        self._name = site.name(f"{opened.variant}-")

    def all(self) -> Iterator[Result]:
        """Everything that both can do."""
        yield from self._calls()
        yield self._false_refusals()
        if self._peer.holds:
            yield self._hand_over()
        if self._bench.scale.peer_stream_seconds:
            yield self._stream()

    def _use(self, short: str, quota: Quota, **more: Any) -> None:
        """Have both workers call a limit that lets so much in; ours is made here."""
        name = self._name + short
        with Limiter(self._site.dsn) as limiter:
            limiter.upsert(name, quota.slots, slot_decay_per_second=quota.per_second)
        common = {"name": name, "flavour": self._opened.task["flavour"], **quota.task(), **more}
        ours, theirs = self._workers
        ours.ask("use", task={**common, "subject": "ours", "dsn": self._site.dsn})
        theirs.ask("use", task={**common, **self._opened.task})

    def _in_turns(self, callers: int, **more: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Both run alternately; the first time warms up."""
        scale = self._bench.scale
        how = {"callers": callers, "seconds": scale.peer_seconds, **more}
        runs = [[each.ask("run", **how) for each in self._workers] for _ in range(scale.peer_repetitions + 1)]
        return [mine for mine, _ in runs[1:]], [other for _, other in runs[1:]]

    def _calls(self) -> Iterator[Result]:
        """Calls on a limit with room for all: by one caller, then by several at once."""
        self._use("room", self._peer.room)
        for callers in self._bench.scale.callers:
            self._say(f"{callers} callers")
            runs = self._in_turns(callers)
            if callers == 1:
                mine, other = ([run["ms"] for run in each] for each in runs)
            else:
                mine, other = ([run["granted"] / run["elapsed"] for run in each] for each in runs)
            yield self._line(str(callers), mine, other)

    def _false_refusals(self) -> Result:
        """Calls that do not wait, on a limit with room for all: none may be refused."""
        self._say("false refusals")
        self._use("impatient", self._peer.room, timeout=0)
        runs = self._in_turns(_CALLERS, pause=_PAUSE)
        mine, other = ([100 * run["refused"] / (run["refused"] + run["granted"]) for run in each] for each in runs)
        return self._line("refused", mine, other)

    def _hand_over(self) -> Result:
        """How long the only slot stays free between a release and the next grant, while others wait."""
        scale = self._bench.scale
        how = {"waiters": scale.peer_waiters, "rounds": scale.peer_rounds, "hold": _HOLD, "settle": self._peer.settle}
        self._say("hand-over")
        self._use("turns", Quota(1))
        mine, other = (each.ask("hand_over", **how)["ms"] for each in self._workers)
        return self._line("hand-over", mine, other)

    def _stream(self) -> Result:
        """A rate that everybody always waits for: how much of it is delivered."""
        seconds = self._bench.scale.peer_stream_seconds
        self._say("delivered rate")
        self._use("stream", _STREAM)
        delivered = []
        for each in self._workers:
            moments = sorted(each.ask("stream", callers=_CALLERS, seconds=seconds)["moments"])
            steady = [moment for moment in moments if _STARTING <= moment - moments[0] <= seconds]
            delivered.append([slope(steady) / _STREAM.per_second])
        return self._line("delivered", *delivered)

    def _say(self, what: str) -> None:
        self._bench.say(f"{self._peer.name}: {self._opened.variant or self._peer.what}, {what}")

    def _line(self, part: str, ours: Sequence[float], theirs: Sequence[float]) -> Line:
        return figure(self._peer.name, part).line(spread(ours), spread(theirs), variant=self._opened.variant)


def _register(peer: Peer) -> None:
    @row(peer.name)
    def beside_ours(bench: Bench) -> Iterator[Result]:
        yield from measure(peer, bench)


for _peer in PEERS:
    _register(_peer)
