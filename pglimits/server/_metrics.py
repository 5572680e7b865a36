"""``/metrics``: the database's view of its limits, for Prometheus."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request
from starlette.responses import Response

from .._exposition import QUERY, exposition
from ..errors import PglimitsError
from ._auth import reading
from ._database import Database, Rows

log = logging.getLogger("pglimits.server")

_ANSWERS_WITHIN = 8.0
"""Seconds. Prometheus gives up after ten, and would not hear that the database is gone."""


def router() -> APIRouter:
    """The route of ``/metrics``. Needs a token that may read, where there are tokens."""
    routes = APIRouter(tags=["metrics"], dependencies=[Depends(reading)])

    @routes.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics(request: Request, accept: Annotated[str, Header()] = "") -> Response:
        """Metrics of all limits, as Prometheus reads them. Without its database it says ``pglimits_up 0``."""
        rows = await _rows(request.app.state.db)
        # In a thread: of ten thousand limits it is a second's work, and others are waiting for theirs.
        body, content_type = await asyncio.to_thread(exposition, rows, accept)
        return Response(body, headers={"Content-Type": content_type})

    return routes


async def _rows(database: Database) -> Rows | None:
    try:
        async with asyncio.timeout(_ANSWERS_WITHIN):
            return await database.rows(QUERY)
    except (PglimitsError, TimeoutError) as error:
        log.warning("metrics without the database: %s", error or "it has not answered in time")
        return None
