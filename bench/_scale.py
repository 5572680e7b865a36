"""How much is measured: two to three minutes of it, or all of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of a mode.

    Attributes:
        name: of the mode.
        takes: how long all rows but the peers' take on two idle processors.
        repetitions: how often each figure is measured.
        seconds: of one measurement of a rate.
        rounds: measurements of each size of what grows, and of processor time, for each repetition.
        pairs: acquire and release by one client, for each repetition.
        handovers: of a slot, in one measurement.
        stream_seconds, streams: for which the delivered rate is watched, after the start, and how often.
        snapshot_calls: how many are made while an old snapshot is open.
        patience: seconds after which that is cut short.
        keys, leases, waiters: how far they grow.
        view_limits, view_keys: over which the views are read.
        blocked_seconds: for which connections that wait in SQL are watched.
        callers: of a peer, on one hot limit.
        peer_seconds, peer_repetitions, peer_stream_seconds: as those above, for peers; 0 seconds: not at all.
        peer_waiters, peer_rounds: who wait for the slot that a peer hands over, and how often.
        peer_variants: whether a peer is called in all the ways that it can be, or only in the first.
    """

    name: str
    takes: str
    repetitions: int
    seconds: float
    rounds: int
    pairs: int
    handovers: int
    stream_seconds: float
    streams: int
    snapshot_calls: int
    patience: float
    keys: int
    leases: int
    waiters: int
    view_limits: int
    view_keys: int
    blocked_seconds: float
    callers: tuple[int, ...]
    peer_seconds: float
    peer_repetitions: int
    peer_stream_seconds: float
    peer_waiters: int
    peer_rounds: int
    peer_variants: bool


SHORT = Scale(
    name="short",
    takes="two to three minutes",
    repetitions=3,
    seconds=0.3,
    rounds=10,
    pairs=100,
    handovers=60,
    stream_seconds=4.0,
    streams=1,
    snapshot_calls=10_000,
    patience=4.0,
    keys=1_000,
    leases=1_000,
    waiters=1_000,
    view_limits=1_000,
    view_keys=10_000,
    blocked_seconds=3.0,
    callers=(1, 8),
    peer_seconds=0.2,
    peer_repetitions=2,
    peer_stream_seconds=0.0,
    peer_waiters=1,
    peer_rounds=1,
    peer_variants=False,
)

FULL = Scale(
    name="full",
    takes="ten minutes, and five more with what others use",
    repetitions=5,
    seconds=2.0,
    rounds=30,
    pairs=500,
    handovers=300,
    stream_seconds=15.0,
    streams=3,
    snapshot_calls=500_000,
    patience=400.0,
    keys=1_000_000,
    leases=100_000,
    waiters=10_000,
    view_limits=10_000,
    view_keys=100_000,
    blocked_seconds=10.0,
    callers=(1, 8, 64),
    peer_seconds=0.7,
    peer_repetitions=3,
    peer_stream_seconds=10.0,
    peer_waiters=5,
    peer_rounds=3,
    peer_variants=True,
)


def steps(most: int) -> list[int]:
    """1, 10, 100 … up to ``most``, which is the last."""
    found = [1]
    while found[-1] * 10 <= most:
        found.append(found[-1] * 10)
    return found if found[-1] == most else [*found, most]
