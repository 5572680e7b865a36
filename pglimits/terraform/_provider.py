"""The provider: which database it talks to, and what becomes of errors."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from psycopg.conninfo import conninfo_to_dict
from tf.iface import DataSource, Provider, Resource
from tf.schema import Schema
from tf.types import Unknown
from tf.utils import Diagnostics

from .._dsn import resolve
from .._limiter import Limiter
from ..errors import InvalidArgument, LimitNotFound, PermissionDenied, PglimitsError
from ..models import Limit
from . import _schema

_VARIABLES = ("PGLIMITS_DSN", "DATABASE_URL")
_SECRET = ("password", "sslpassword", "oauth_client_secret")

Found = tuple[Limit, int]
"""A limit, and the number that stays its own when it is renamed."""


class PglimitsProvider(Provider):
    """Limits of one database."""

    def __init__(self) -> None:
        self._conninfo: str | None = None
        self._limiter: Limiter | None = None

    # What Terraform asks.

    def full_name(self) -> str:
        return "registry.terraform.io/pglimits/pglimits"

    def get_model_prefix(self) -> str:
        return "pglimits_"

    def get_provider_schema(self, diags: Diagnostics) -> Schema:
        return _schema.PROVIDER

    def get_resources(self) -> list[type[Resource]]:
        from ._resource import LimitResource

        return [LimitResource]

    def get_data_sources(self) -> list[type[DataSource]]:
        from ._data_sources import LimitData, LimitsData

        return [LimitData, LimitsData]

    def validate_config(self, diags: Diagnostics, config: dict[str, Any]) -> None:
        if isinstance(config["dsn"], str):
            with self.told(diags, "dsn"):
                checked(config["dsn"])

    def configure_provider(self, diags: Diagnostics, config: dict[str, Any]) -> None:
        dsn = config["dsn"]
        if dsn is Unknown:  # as that of a database that is to be created
            return
        with self.told(diags, None if dsn is None else "dsn"):
            self._conninfo = checked(dsn)
            self.limiter.version()  # so that what keeps all from working is told once

    # What resources and data sources need.

    @property
    def is_known(self) -> bool:
        """Whether it is known yet which database it is."""
        return self._conninfo is not None

    @property
    def limiter(self) -> Limiter:
        """The limits. Raises InvalidArgument if it is not known yet of which database."""
        if self._conninfo is None:
            raise InvalidArgument("the provider's dsn is not known yet: apply first what it comes from, with -target")
        if self._limiter is None:
            self._limiter = Limiter(self._conninfo)
        return self._limiter

    def by_name(self, name: str) -> Found | None:
        """The limit of a name."""
        try:
            return self.limiter.get(name), self.limiter.counters(name)[0].limit_id
        except (LimitNotFound, IndexError):
            return None

    def same(self, state: dict[str, Any]) -> Found | None:
        """The limit that a state tells of, by whatever name it goes now; None if it was deleted.

        A number alone does not tell: in a database that was made anew another limit can have it.
        """

        def is_it(found: Found) -> bool:
            return (str(found[1]), _schema.moment(found[0].created_at)) == (state["id"], state["created"])

        found = self.by_name(state["name"])
        if found is not None and is_it(found):
            return found
        for name in [each.name for each in self.limiter.counters() if str(each.limit_id) == state["id"]]:
            renamed = self.by_name(name)
            if renamed is not None and is_it(renamed):
                return renamed
        return None

    @contextlib.contextmanager
    def told(self, diags: Diagnostics, attribute: str | None = None) -> Iterator[None]:
        """Tell Terraform what goes wrong inside, and of which attribute."""
        try:
            yield
        except PglimitsError as error:
            said = self._without_secrets(str(error))
            if isinstance(error, PermissionDenied):
                said += ". Changing limits takes a member of pglimits_admin, data sources one of pglimits_reader"
            path = [attribute] if attribute else None
            if isinstance(error, InvalidArgument) and attribute:
                diags.add_error(f"Invalid {attribute}", f"{said}.", path=path)
            else:
                diags.add_error(said if said.startswith("pglimits") else f"{said[:1].upper()}{said[1:]}", path=path)

    def close(self) -> None:
        """Terraform needs it no longer."""
        if self._limiter is not None:
            self._limiter.close()

    def _without_secrets(self, said: str) -> str:
        given = conninfo_to_dict(self._conninfo or "")
        for secret in sorted((str(given[name]) for name in _SECRET if given.get(name)), key=len, reverse=True):
            said = said.replace(secret, "***")
        return said


def checked(dsn: str | None) -> str:
    """The database that a configuration names. Never the embedded server: a state that is shared tells of one that is.

    Raises:
        InvalidArgument: there is none, or it cannot be read. The error quotes nothing of it.
    """
    if dsn is None and not any(name in os.environ for name in _VARIABLES):
        raise InvalidArgument("no database is named: set the provider's dsn, or PGLIMITS_DSN, or DATABASE_URL")
    conninfo = resolve(dsn).conninfo
    given = conninfo_to_dict(conninfo)
    # A password that has an @ or a / in it is cut there, and errors of the network would quote the rest as the host.
    if any("@" in str(given.get(name, "")) for name in ("host", "dbname")) or not re.fullmatch(
        r"[\d,]*", str(given.get("port", ""))
    ):
        raise InvalidArgument(
            "the host, port or database of the dsn cannot be right: in a password, write @ as %40, / as %2F, : as %3A"
        )
    return conninfo
