"""The routes of /v1."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request

from ._auth import reading
from ._settings import Settings


def router(settings: Settings) -> APIRouter:
    """All routes under /v1."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/limits", dependencies=[Depends(reading)], tags=["limits"])
    async def list_limits(request: Request) -> dict[str, Any]:
        """All limits."""
        return {"limits": await request.app.state.db.rows("select * from pglimits.limits")}

    return routes
