"""Routers that are passed over at once where a path is not theirs: their routes are tried one after the other."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.routing import Match
from starlette.types import Scope


class PrefixRouter(APIRouter):
    """A router with a prefix. A FastAPI that copies the routes of a router does not ask it; then it is as any other."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path: str = scope["path"]
        if not path.startswith(scope.get("root_path", "") + self.prefix) and not path.startswith(self.prefix):
            return Match.NONE, {}
        return super().matches(scope)
