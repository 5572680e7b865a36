"""The doctor on the way to the server, the server itself, the installation, and rights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ._doctor import FAIL, OK, WARN, Case, Finding

if TYPE_CHECKING:
    import psycopg

    from pglimits._dsn import Target

OLDEST, NEWEST = 14, 18
"""The major versions of PostgreSQL that pglimits is tested with."""
_ROLES = ("pglimits_user", "pglimits_reader", "pglimits_admin")


# The way to the server.


def connect(target: Target, findings: list[Finding]) -> psycopg.Connection[tuple[Any, ...]] | None:
    import psycopg

    try:
        connection = psycopg.connect(target.conninfo, autocommit=True, prepare_threshold=None)
    except psycopg.Error as error:
        text, fix = _why_not(str(error), target)
        findings.append(Finding("reachable", FAIL, text, fix))
        return None
    info = connection.info
    secure = "" if not info.host or info.host.startswith("/") else (", TLS" if info.pgconn.ssl_in_use else ", no TLS")
    findings.append(Finding("reachable", OK, f"connected to database {info.dbname} as {info.user}{secure}"))
    return connection


def _why_not(message: str, target: Target) -> tuple[str, str | None]:
    """Why there is no connection. Before there is one there are no SQLSTATEs either: only libpq's text."""
    shown = " ".join(message.split())
    lower = shown.lower()
    for signs, fix in (
        (
            ("password authentication failed", "no password supplied", "pg_hba.conf", "peer authentication"),
            "correct the user and password in the DSN (or PGPASSWORD, ~/.pgpass), or pg_hba.conf on the server",
        ),
        (
            ("does not exist", "no such database", "no such user"),
            "correct the database or user in the DSN, or create it: createdb NAME",
        ),
        (("starting up", "shutting down", "in recovery mode"), "wait until the server is up, and try again"),
        (
            ("too many clients", "remaining connection slots", "too many connections"),
            "close connections, use a pooler, or raise max_connections on the server",
        ),
        (
            (
                "could not translate host name",
                "name or service not known",
                "nodename nor servname",
                "failed to resolve",
            ),
            "correct the host in the DSN",
        ),
        (
            ("timeout expired", "timed out", "no route to host", "network is unreachable"),
            "check the host, the port and the firewall between here and there",
        ),
        (("connection refused", "no such file or directory"), "start the server, or correct host and port in the DSN"),
        (("ssl", "certificate"), "correct sslmode and sslrootcert in the DSN"),
    ):
        if any(sign in lower for sign in signs):
            return shown, "pglimits embedded start" if target.source == "embedded" else fix
    return shown, None


def _server(case: Case) -> Iterator[Finding]:
    number = int(case.one("select current_setting('server_version_num')"))
    version = case.one("select current_setting('server_version')").split()[0]
    major = number // 10000
    if major < OLDEST:
        yield Finding(
            "server",
            FAIL,
            f"PostgreSQL {version} is too old: pglimits needs {OLDEST} to {NEWEST}",
            "upgrade the server",
        )
    elif major > NEWEST:
        yield Finding(
            "server", WARN, f"PostgreSQL {version} is newer than what pglimits is tested with: {OLDEST} to {NEWEST}"
        )
    else:
        yield Finding("server", OK, f"PostgreSQL {version}")


def _writable(case: Case) -> Iterator[Finding]:
    if case.one("select pg_is_in_recovery()"):
        yield Finding(
            "writable",
            FAIL,
            "the server is a standby (in recovery): it can grant nothing",
            "name the primary in the DSN, or all servers and target_session_attrs=read-write",
        )
    elif case.one("select current_setting('transaction_read_only')::bool"):
        yield Finding(
            "writable",
            FAIL,
            "transactions are read-only here: nothing can be granted",
            "alter database … reset default_transaction_read_only; (or alter role …, alter system …)",
        )
    else:
        yield Finding("writable", OK, "the server takes writes")


def _durable(case: Case) -> Iterator[Finding]:
    settings: dict[str, str] = dict(
        case.rows(
            "select name, setting from pg_settings where name in ('fsync', 'full_page_writes', 'synchronous_commit')"
        )
    )
    off = [name for name in ("fsync", "full_page_writes") if settings.get(name) == "off"]
    if off:
        yield Finding(
            "durable",
            WARN,
            f"{' and '.join(off)} = off: a crash of the machine may ruin the whole database",
            "; ".join(f"alter system reset {name}" for name in off) + "; select pg_reload_conf();",
        )
    elif settings.get("synchronous_commit") == "off":
        yield Finding(
            "durable",
            WARN,
            "synchronous_commit = off: a crash of the server may forget the last moments, and with them"
            " slots that were granted",
            "alter database … reset synchronous_commit; (or alter role …, alter system …)",
        )
    else:
        yield Finding("durable", OK, f"fsync on, synchronous_commit {settings.get('synchronous_commit')}")


# The installation.


def _installed(case: Case) -> Iterator[Finding]:
    from pglimits import __version__
    from pglimits._database import numbers

    if not case.one("select exists (select from pg_namespace where nspname = 'pglimits')"):
        yield Finding("installed", FAIL, "pglimits is not installed in this database", "pglimits install")
        return
    if not case.one(
        "select exists (select from pg_proc p join pg_namespace n on n.oid = p.pronamespace"
        " where n.nspname = 'pglimits' and p.proname = 'version')"
    ):
        yield Finding("installed", FAIL, "pglimits is only half there: the schema has no version()", "pglimits install")
        return
    case.installed = True
    if not case.one("select has_schema_privilege('pglimits', 'usage')") or not case.one(
        "select has_function_privilege('pglimits.version()', 'execute')"
    ):
        yield Finding("installed", OK, "pglimits is installed; its version is not for you to see")
        return
    there = str(case.one("select pglimits.version()"))
    if there == __version__:
        yield Finding("installed", OK, f"pglimits {there}, the same as this command")
        return
    older = numbers(there) < numbers(__version__)
    status = WARN if numbers(there)[:2] == numbers(__version__)[:2] else FAIL
    yield Finding(
        "installed",
        status,
        f"pglimits {there} in the database is {'older' if older else 'newer'} than this command, {__version__}",
        "pglimits upgrade" if older else "pip install --upgrade pglimits",
    )


def _roles(case: Case) -> Iterator[Finding]:
    there = {name for (name,) in case.rows("select rolname from pg_roles where rolname = any (%s)", list(_ROLES))}
    missing = [name for name in _ROLES if name not in there]
    if missing:
        yield Finding(
            "roles",
            WARN,
            f"missing, because the installing role may not create roles: {', '.join(missing)}",
            "as a role that may: " + " ".join(f"create role {name};" for name in missing) + " then: pglimits install",
        )
    else:
        yield Finding("roles", OK, ", ".join(_ROLES))


def _rights(case: Case) -> Iterator[Finding]:
    usage = case.one("select has_schema_privilege('pglimits', 'usage')")
    for right, name in (("acquire", "acquire"), ("change", "create_limit"), ("sweep", "sweep")):
        case.may[right] = usage and bool(
            case.one(
                "select bool_or(has_function_privilege(p.oid, 'execute')) from pg_proc p"
                " where p.pronamespace = 'pglimits'::regnamespace and p.proname = %s",
                name,
            )
        )
    case.may["look"] = usage and bool(
        case.one(
            "select bool_and(has_table_privilege(c.oid, 'select')) from pg_class c"
            " where c.relnamespace = 'pglimits'::regnamespace and c.relname in ('limits', 'holders', 'waiters')"
        )
    )
    case.may["tables"] = usage and bool(
        case.one(
            "select bool_and(has_table_privilege(c.oid, 'select')) from pg_class c"
            " where c.relnamespace = 'pglimits'::regnamespace and c.relkind = 'r'"
        )
    )
    me = case.one("select quote_ident(current_user)")
    allowed = [
        words
        for right, words in (("acquire", "take slots"), ("look", "look"), ("change", "change limits"))
        if case.may[right]
    ]
    if not case.may["acquire"]:
        yield Finding(
            "rights",
            FAIL,
            f"{me} may not take slots (pglimits_user), only: {', '.join(allowed) or 'nothing'}",
            f"grant pglimits_user to {me};",
        )
        return
    lacking = [
        role for right, role in (("look", "pglimits_reader"), ("change", "pglimits_admin")) if not case.may[right]
    ]
    without = f"; not granted: {', '.join(lacking)}" if lacking else ""
    yield Finding("rights", OK, f"{me} may {', '.join(allowed)}{without}")


CHECKS = (
    ("server", _server),
    ("writable", _writable),
    ("durable", _durable),
    ("installed", _installed),
    ("roles", _roles),
    ("rights", _rights),
)
"""The checks of this module, in order. Without an installation there is nothing to look at behind "installed"."""
