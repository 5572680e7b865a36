"""The routes of /v1."""

from __future__ import annotations

from fastapi import APIRouter

from . import _v1_changes, _v1_grants, _v1_limits, _v1_views
from ._settings import Settings
from ._v1_models import ProblemDetails


def router(settings: Settings) -> APIRouter:
    """All routes under /v1."""
    problem = {"model": ProblemDetails, "content": {"application/problem+json": {}}}
    routes = APIRouter(prefix="/v1", responses=dict.fromkeys(("4XX", "5XX"), problem))
    routes.include_router(_v1_limits.router())
    routes.include_router(_v1_views.router())
    routes.include_router(_v1_grants.router(settings))
    routes.include_router(_v1_changes.router())
    return routes
