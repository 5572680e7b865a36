"""The data sources ``pglimits_limit`` and ``pglimits_limits``."""

from __future__ import annotations

from typing import Any

from tf.iface import DataSource, ReadDataContext
from tf.schema import Schema

from .. import _arguments
from ..errors import LimitNotFound
from ._provider import PglimitsProvider
from ._schema import ALL, ONE, encoded, facts


class LimitData(DataSource):
    """One limit, by its name."""

    def __init__(self, provider: PglimitsProvider) -> None:
        self._provider = provider

    @classmethod
    def get_name(cls) -> str:
        return "limit"

    @classmethod
    def get_schema(cls) -> Schema:
        return ONE

    def read(self, ctx: ReadDataContext, config: dict[str, Any]) -> dict[str, Any] | None:
        with self._provider.told(ctx.diagnostics, "name"):
            name = _arguments.text("name", config["name"])
            found = self._provider.by_name(name)
            if found is None:
                raise LimitNotFound(f"there is no limit named {name!r}")
            return encoded(ONE, {**facts(*found), "name": name})
        return None


class LimitsData(DataSource):
    """All limits."""

    def __init__(self, provider: PglimitsProvider) -> None:
        self._provider = provider

    @classmethod
    def get_name(cls) -> str:
        return "limits"

    @classmethod
    def get_schema(cls) -> Schema:
        return ALL

    def read(self, ctx: ReadDataContext, config: dict[str, Any]) -> dict[str, Any] | None:
        with self._provider.told(ctx.diagnostics):
            limiter = self._provider.limiter
            numbers = {each.name: each.limit_id for each in limiter.counters()}
            limits = [facts(each, numbers[each.name]) for each in limiter.list() if each.name in numbers]
            return encoded(ALL, {"limits": limits})
        return None
