"""The routes of /v1."""

from __future__ import annotations

from fastapi import APIRouter

from . import _v1_changes, _v1_grants, _v1_limits, _v1_views
from ._settings import Settings


def router(settings: Settings) -> APIRouter:
    """All routes under /v1."""
    routes = APIRouter(prefix="/v1")
    _v1_grants.add_to(routes, settings)  # first, as they are asked for most
    _v1_limits.add_to(routes)
    _v1_views.add_to(routes)
    _v1_changes.add_to(routes)
    return routes
