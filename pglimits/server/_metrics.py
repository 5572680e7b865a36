"""``/metrics``: the database's view of its limits, for Prometheus."""

from __future__ import annotations

import asyncio
import logging
import time

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from .._exposition import CONTENT_TYPE, QUERY, exposition
from ..errors import PglimitsError
from ._auth import reading
from ._database import Database, Rows
from ._grants import Grants

log = logging.getLogger("pglimits.server")

_ANSWERS_WITHIN = 8.0
"""Seconds. Prometheus gives up after ten, and would not hear that the database is gone."""
_KEEPS = 1.0
"""Seconds for which one look at the database answers everybody who asks."""


class _Scrapes:
    """One look at a time, however many ask."""

    def __init__(self) -> None:
        self._one = asyncio.Lock()
        self._body = b""
        self._looked_at = -_KEEPS
        self._was_up = True

    async def body(self, database: Database, grants: Grants) -> bytes:
        async with self._one:
            if time.monotonic() - self._looked_at >= _KEEPS:
                rows = await self._rows(database)
                if rows is not None:
                    grants.forget_refusals({row["name"] for row in rows})
                # In a thread: of ten thousand limits it takes a while, and others are waiting for their answers.
                self._body = (await asyncio.to_thread(exposition, rows, dict(grants.refusals))).encode()
                self._looked_at = time.monotonic()
            return self._body

    async def _rows(self, database: Database) -> Rows | None:
        try:
            async with asyncio.timeout(_ANSWERS_WITHIN):
                rows = await database.rows(QUERY)
        except (PglimitsError, TimeoutError) as error:
            if self._was_up:
                log.warning("metrics without the database: %s", str(error) or "it has not answered in time")
            self._was_up = False
            return None
        self._was_up = True
        return rows


def router() -> APIRouter:
    """The route of ``/metrics``. Needs a token that may read, where there are tokens."""
    routes = APIRouter(tags=["metrics"], dependencies=[Depends(reading)])
    scrapes = _Scrapes()

    @routes.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics(request: Request) -> Response:
        """Metrics of all limits, as Prometheus reads them. Without its database it says ``pglimits_up 0``."""
        return Response(
            await scrapes.body(request.app.state.db, request.app.state.grants),
            headers={"Content-Type": CONTENT_TYPE},
        )

    return routes
