"""Clients that have gone while their requests were held: their places in line are given up.

Whoever was cut off by a proxy may be asking another server already, with the same place. So only a request that still
waits leaves the line. What was granted under its id stays: another server may have told it.
"""

from __future__ import annotations

import asyncio
import logging
from uuid import UUID

from ..errors import PglimitsError
from ._database import Database

log = logging.getLogger("pglimits.server")

_AT_ONCE = 500
_LEAVE = """
    select r.released
    from (select array_agg(distinct w.lease_id) as ids from pglimits.waiters w where w.lease_id = any (%s)) waiting,
         lateral pglimits.release_all(waiting.ids) r
    where waiting.ids is not null
"""
"""The view numbers whole lines, so many places share one look at it."""


class Gone:
    """Takes requests out of their lines, in the background."""

    def __init__(self) -> None:
        self._places: set[UUID] = set()
        self._leaving: asyncio.Task[None] | None = None

    def leave_line(self, db: Database, place: UUID) -> None:
        """Have that place given up soon, if it is one still."""
        self._places.add(place)
        if self._leaving is None or self._leaving.done():
            self._leaving = asyncio.create_task(self._leave(db))

    async def _leave(self, db: Database) -> None:
        while self._places:
            places = list(self._places)[:_AT_ONCE]
            self._places.difference_update(places)
            try:
                await db.rows(_LEAVE, [places], writes=True)
            except PglimitsError as error:
                log.debug("places in line lapse by themselves: %s", error)
