"""The doctor on the way to the server, the server itself, the installation, and rights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import _output, _rights
from ._doctor import FAIL, OK, WARN, Case, Finding

if TYPE_CHECKING:
    import psycopg

    from pglimits._dsn import Target

OLDEST, NEWEST = 14, 18
"""The major versions of PostgreSQL that pglimits is tested with."""


# The way to the server.


def connect(target: Target, findings: list[Finding]) -> psycopg.Connection[tuple[Any, ...]] | None:
    import psycopg

    try:
        connection = psycopg.connect(target.conninfo, autocommit=True, prepare_threshold=None, client_encoding="utf8")
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
    from pglimits._install import extension_version, functions_and_views

    extension = extension_version(case.connection)
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
    if extension not in (None, there):
        yield Finding(
            "installed",
            WARN,
            f"the extension pglimits is of version {extension}, and its functions are of {there}",
            "alter extension pglimits update;",
        )
        return
    if there == __version__:
        missing = sorted(functions_and_views() - _there(case))
        if not missing:
            how = ", as an extension" if extension else ""
            yield Finding("installed", OK, f"pglimits {there}{how}, the same as this command")
            return
        which = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        fix = "drop extension pglimits; create extension pglimits;" if extension else "pglimits install"
        yield Finding("installed", FAIL, f"pglimits {there} is only half there, without {which}", fix)
        return
    older = numbers(there) < numbers(__version__)
    upgrade = "pglimits upgrade"
    if extension:
        upgrade = (
            f"pglimits sql --extension FOLDER (then bring the files to the server)\n"
            f"alter extension pglimits update to '{__version__}';"
        )
    status = WARN if numbers(there)[:2] == numbers(__version__)[:2] else FAIL
    yield Finding(
        "installed",
        status,
        f"pglimits {there} in the database is {'older' if older else 'newer'} than this command, {__version__}",
        upgrade if older else "pip install --upgrade pglimits",
    )


def _owner(case: Case) -> Iterator[Finding]:
    ((owner, superuser),) = case.rows(
        "select quote_ident(r.rolname), r.rolsuper from pg_namespace n join pg_roles r on r.oid = n.nspowner"
        " where n.nspname = 'pglimits'"
    )
    if not superuser:
        yield Finding("owner", OK, f"the functions run as {owner}, which is no superuser")
    elif case.target.source == "embedded":
        yield Finding("owner", OK, f"the functions run as {owner}, whose server this is")
    else:
        yield Finding(
            "owner",
            WARN,
            f"the functions run as {owner}, a superuser: better as a role that may do nothing else",
            "the lines under 'Roles and owners' in docs/extension.md give them to a role of their own",
        )


def _there(case: Case) -> set[str]:
    """The names of the functions and relations of pglimits in the database."""
    found = case.rows(
        "select proname::text from pg_proc where pronamespace = 'pglimits'::regnamespace"
        " union select relname::text from pg_class where relnamespace = 'pglimits'::regnamespace"
    )
    return {name for (name,) in found}


def _roles(case: Case) -> Iterator[Finding]:
    from pglimits._install import ROLES

    there = {name for (name,) in case.rows("select rolname from pg_roles where rolname = any (%s)", list(ROLES))}
    missing = [name for name in ROLES if name not in there]
    if missing:
        fix = "\n".join(line.strip() for line in _rights.by_hand(missing))
        yield Finding("roles", WARN, _rights.missing(missing), fix)
    else:
        yield Finding("roles", OK, ", ".join(ROLES))


def _may(case: Case) -> Iterator[Finding]:
    found = {role: _rights.lacking(case.connection, role) for role in _rights.WORDS}
    case.may = {role for role, lack in found.items() if lack is None}
    case.may_read_tables = bool(
        case.one(
            "select has_schema_privilege('pglimits', 'usage') and bool_and(has_table_privilege(c.oid, 'select'))"
            " from pg_class c where c.relnamespace = 'pglimits'::regnamespace and c.relkind = 'r'"
        )
    )
    me = case.one("select quote_ident(current_user)")
    allowed = ", ".join(words for role, words in _rights.WORDS.items() if role in case.may)
    lack = found[_rights.USER]
    if lack is not None:
        yield Finding("rights", FAIL, f"{me} may not take slots, only: {allowed or 'nothing'}; {lack[0]}", lack[1])
        return
    lacking = [role for role in _rights.WORDS if role not in case.may]
    without = f"; not granted: {', '.join(lacking)}" if lacking else ""
    yield Finding("rights", OK, f"{me} may {allowed}{without}")


# What is nobody's business, by default privileges or by a grant of somebody's.
_REACHED = """
    select a.role, x.kind, string_agg(x.name, ', ' order by x.name), a.rights
    from (
      select case c.relkind when 'S' then 'sequence' else 'table' end as kind, c.oid::regclass::text as name,
             coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char", c.relowner)) as acl,
             c.relowner as owner, c.relkind <> 'v' or c.relname <> all (%(views)s::text[]) as is_private
      from pg_class c where c.relnamespace = 'pglimits'::regnamespace and c.relkind in ('r', 'v', 'S')
      union all
      select 'routine', 'pglimits.' || p.proname, coalesce(p.proacl, acldefault('f', p.proowner)), p.proowner,
             p.proname <> all (%(routines)s::text[])
      from pg_proc p where p.pronamespace = 'pglimits'::regnamespace
      union all
      select 'schema', 'pglimits', coalesce(n.nspacl, acldefault('n', n.nspowner)), n.nspowner, false
      from pg_namespace n where n.nspname = 'pglimits'
    ) x
    cross join lateral (
      select case when e.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(e.grantee)) end as role,
             string_agg(lower(e.privilege_type), ', ' order by e.privilege_type) as rights
      from aclexplode(x.acl) e
      where e.grantee <> x.owner and (x.is_private or e.grantee = 0 or e.privilege_type = 'CREATE')
      group by e.grantee
    ) a
    group by a.role, x.kind, a.rights order by 1, 2 desc
"""


def _private(case: Case) -> Iterator[Finding]:
    from pglimits._install import granted

    routines = granted("users", "administrators", "readers")
    reached = case.rows(_REACHED, {"views": granted("visible"), "routines": routines})
    for role, kind, names, rights in reached:
        many = len(names.split(", "))
        what = "the schema pglimits" if kind == "schema" else _output.count(many, f"private {kind}")
        yield Finding(
            "private",
            WARN,
            f"{role} has {rights} on {what}, by default privileges or by a grant",
            f"revoke {rights if kind == 'schema' else 'all'} on {kind} {names} from {role};",
        )
    if not reached:
        yield Finding("private", OK, "tables and private functions are out of everybody's reach")


# Roles that log in, take slots, and have not been told to notice that a client is gone.
_DEAF = """
    with recursive members as (
      select m.member from pg_auth_members m join pg_roles g on g.oid = m.roleid where g.rolname = 'pglimits_user'
      union
      select m.member from pg_auth_members m join members x on m.roleid = x.member
    )
    select quote_ident(r.rolname) from members m join pg_roles r on r.oid = m.member
    where r.rolcanlogin and not exists (
      select from pg_db_role_setting s cross join unnest(s.setconfig) as c(setting)
      where s.setrole in (0, r.oid) and c.setting ~ '^client_connection_check_interval='
        and s.setdatabase in (0, (select d.oid from pg_database d where d.datname = current_database())))
      and not exists (
      select from pg_settings p where p.name = 'client_connection_check_interval' and p.setting <> '0'
        and p.source in ('command line', 'environment variable', 'configuration file'))
    order by 1
"""


def _clients(case: Case) -> Iterator[Finding]:
    deaf = [role for (role,) in case.rows(_DEAF)]
    if deaf:
        yield Finding(
            "clients",
            WARN,
            f"a client of {', '.join(deaf)} that is killed while it waits in SQL (acquire_wait) keeps its session and"
            " its place in line: the server does not look whether it is still there",
            "\n".join(f"alter role {role} set client_connection_check_interval = '1s';" for role in deaf),
        )
    else:
        yield Finding("clients", OK, "the server notices where a waiting client is gone")


CHECKS = (
    ("server", _server),
    ("writable", _writable),
    ("durable", _durable),
    ("installed", _installed),
    ("owner", _owner),
    ("roles", _roles),
    ("rights", _may),
    ("private", _private),
    ("clients", _clients),
)
"""The checks of this module, in order. Without an installation there is nothing to look at behind "installed"."""
