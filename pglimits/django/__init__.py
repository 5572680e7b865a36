"""Limits for views of Django and for whole projects (extra ``django``).

``concurrency`` and ``rate_limit`` decorate views, sync and async; ``middleware`` enforces a limit for all requests.
The database is the project's own, by connections of the limiter: no transaction of a view has a part in it. With
``"pglimits.django"`` in INSTALLED_APPS, ``migrate`` installs the SQL, and brings it up to this version later.

Settings:
    PGLIMITS_DATABASE: the alias in DATABASES; ``"default"`` unless told otherwise.
    PGLIMITS_WITHOUT_ROLES: True migrates also where the roles are missing and may not be created.
"""

from ._limiter import async_limiter, close, limiter
from ._limits import Limit, concurrency, middleware, rate_limit

__all__ = ["Limit", "async_limiter", "close", "concurrency", "limiter", "middleware", "rate_limit"]
