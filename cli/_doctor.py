"""What the doctor looks at. Each check says what it found and, if that is not well, what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import _client

if TYPE_CHECKING:
    import psycopg

    from pglimits._dsn import Target

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"


@dataclass(frozen=True, slots=True)
class Finding:
    """``status``: ok, warn, fail, or skip where it could not be looked at. ``fix``: what mends it, a command a line."""

    check: str
    status: str
    text: str
    fix: str | None = None


@dataclass(slots=True)
class Case:
    """A database under examination. ``may``: the roles of pglimits whose rights this session has."""

    target: Target
    connection: psycopg.Connection[tuple[Any, ...]]
    may: set[str] = field(default_factory=set)
    may_read_tables: bool = False
    installed: bool = False

    def rows(self, sql: str, *params: Any) -> list[tuple[Any, ...]]:
        """The rows of a query; ``params`` one by one, or a mapping."""
        given = params[0] if params and isinstance(params[0], dict) else params or None
        return self.connection.execute(sql.encode(), given).fetchall()

    def one(self, sql: str, *params: object) -> Any:
        rows = self.rows(sql, *params)
        return rows[0][0] if rows else None


Check = Callable[[Case], Iterator[Finding]]


def examine(dsn: str | None) -> list[Finding]:
    """All findings, in the order in which to read them. Ends early where the rest would only say the same."""
    from pglimits.errors import PglimitsError

    from . import _doctor_health, _doctor_server

    findings: list[Finding] = []
    try:
        target = _client.target(dsn)
    except (PglimitsError, RuntimeError, OSError) as error:
        return [
            Finding(
                "target", FAIL, " ".join(str(error).split()), "pglimits doctor --dsn postgresql://user@host/database"
            )
        ]
    findings.append(Finding("target", OK, f"{_client.place(target.conninfo)} (from {_client.source(target)})"))
    connection = _doctor_server.connect(target, findings)
    if connection is None:
        return findings
    with connection:
        case = Case(target, connection)
        for name, check in (*_doctor_server.CHECKS, *_doctor_health.CHECKS):
            findings += _run(name, check, case)
            if name == "installed" and not case.installed:
                break
    return findings


def _run(name: str, check: Check, case: Case) -> list[Finding]:
    import psycopg

    found: list[Finding] = []
    try:
        found += check(case)
    except psycopg.errors.InsufficientPrivilege as error:
        found.append(Finding(name, SKIP, f"you may not look: {message_of(error)}"))
    except psycopg.Error as error:
        if case.connection.closed:
            found.append(Finding(name, FAIL, f"the connection broke: {message_of(error)}"))
        else:
            found.append(Finding(name, SKIP, f"could not be looked at: {message_of(error)}"))
    return found


def message_of(error: Exception) -> str:
    primary = getattr(getattr(error, "diag", None), "message_primary", None)
    return str(primary or error).strip()
