"""A limit's life against a model of it in a few lines of Python: who holds, who waits, in which order, at any time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from uuid import UUID

import psycopg
import pytest
from sqltest import Clock, Db, Session


@dataclass
class Waiter:
    lease_id: UUID
    slots: int
    priority: int
    duration: timedelta


@dataclass
class Model:
    """What DESIGN says of a limit, with no regard to speed."""

    limit: int
    rate: Fraction
    now: datetime
    held: dict[UUID, tuple[int, datetime, timedelta]] = field(default_factory=dict)
    queue: list[Waiter] = field(default_factory=list)
    level: Fraction = Fraction(0)

    def move_to(self, now: datetime) -> None:
        passed = Fraction((now - self.now) // timedelta(microseconds=1), 1_000_000)
        self.level = max(self.level - self.rate * passed, Fraction(0))
        self.now = now

    def fits(self, slots: int) -> bool:
        held = sum(slots for slots, _, _ in self.held.values())
        return held + slots <= self.limit and (not self.rate or self.level + slots <= self.limit)

    def grant(self, waiter: Waiter) -> None:
        self.held[waiter.lease_id] = (waiter.slots, self.now + waiter.duration, waiter.duration)
        if self.rate:
            self.level += waiter.slots

    def settle(self) -> None:
        self.held = {lease_id: held for lease_id, held in self.held.items() if held[1] > self.now}
        if self.limit:
            self.queue = [waiter for waiter in self.queue if waiter.slots <= self.limit]
        while self.queue and self.fits(self.queue[0].slots):
            self.grant(self.queue.pop(0))

    def ask(self, waiter: Waiter, may_wait: bool) -> str:
        if waiter.slots > self.limit > 0:
            return "PL004"
        if all(other.priority < waiter.priority for other in self.queue) and self.fits(waiter.slots):
            self.grant(waiter)
            return "granted"
        if not may_wait:
            return "refused"
        place = sum(other.priority >= waiter.priority for other in self.queue)
        self.queue.insert(place, waiter)
        return "queued"


@pytest.mark.parametrize(("seed", "rate"), [(1, "0"), (2, "0"), (3, "0"), (4, "1.5"), (5, "0.25")])
def test_a_limit_behaves_as_its_model_does(clock: Clock, db: Db, s: Session, seed: int, rate: str) -> None:
    rng = random.Random(seed)
    model = Model(3, Fraction(rate), clock.freeze())
    s.create("database", model.limit, float(model.rate))
    seen: dict[str, int] = {}
    for step in range(300):
        action = rng.random()
        known = [*model.held, *(waiter.lease_id for waiter in model.queue)]
        if action < 0.45:
            waiter = Waiter(
                UUID(int=rng.getrandbits(128)), rng.choice([1, 1, 2, 3]), rng.choice([0, 0, 0, 1, -1]),
                timedelta(seconds=rng.randint(1, 20)),
            )  # fmt: skip
            may_wait = rng.random() < 0.7
            expected = model.ask(waiter, may_wait)
            try:
                status = s.acquire(
                    "database",
                    slots=waiter.slots,
                    priority=waiter.priority,
                    lease_duration=f"{waiter.duration.seconds} seconds",
                    lease_id=waiter.lease_id,
                    wait=None if may_wait else "0",
                ).status
            except psycopg.Error as error:
                status = str(error.diag.sqlstate)
            assert status == expected, step
            seen[status] = seen.get(status, 0) + 1
        elif action < 0.65 and known:
            lease_id = rng.choice(known)
            assert s.release(lease_id)
            model.held.pop(lease_id, None)
            model.queue = [waiter for waiter in model.queue if waiter.lease_id != lease_id]
        elif action < 0.72 and model.held:
            lease_id = rng.choice([*model.held])
            assert s.renew(lease_id)
            slots, _, duration = model.held[lease_id]
            model.held[lease_id] = (slots, model.now + duration, duration)
        elif action < 0.76:
            model.limit = rng.randint(0, 5)
            s.update("database", limit=model.limit)
        elif action < 0.78:
            s.sweep("0 seconds")
        elif action < 0.79:
            assert s.reset("database") == len(model.held)
            model.held, model.level = {}, Fraction(0)
        else:
            clock.advance(round(rng.expovariate(0.5), 6) % 5)
            model.move_to(clock.now())
        model.settle()
        # All waiters are alive and look; those who were granted take it up.
        s.watch(*known, *(waiter.lease_id for waiter in model.queue))
        holders = {held.lease_id: (held.slots, held.expires_at) for held in s.holders()}
        assert holders == {lease_id: held[:2] for lease_id, held in model.held.items()}, step
        assert [row.lease_id for row in s.waiters()] == [waiter.lease_id for waiter in model.queue], step
        row = s.limit("database")
        assert (row.held, row.waiting) == (sum(held[0] for held in model.held.values()), len(model.queue))
        assert row.level == pytest.approx(float(model.level), abs=1e-9)
    db.consistent()
    assert min(seen.get(status, 0) for status in ("granted", "queued", "refused")) > 5, seen
