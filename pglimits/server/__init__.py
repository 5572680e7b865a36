"""The HTTP server: an API for programs without a PostgreSQL driver, and a page. Needs ``pglimits[server]``."""

from __future__ import annotations

from ._app import create_app
from ._auth import Token
from ._settings import Settings

__all__ = ["Settings", "Token", "create_app"]
