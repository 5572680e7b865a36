"""Which role may not do what, why, and the line that mends it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg

USER, READER, ADMIN = "pglimits_user", "pglimits_reader", "pglimits_admin"
WORDS = {USER: "take slots", READER: "look", ADMIN: "change limits"}
"""What each role is for."""

_MAY = """
    select quote_ident(r.rolname), pg_has_role(%(group)s, 'member'), pg_has_role(%(group)s, 'usage'),
           has_schema_privilege(r.oid, n.oid, 'usage')
           and not exists (
             select from pg_proc p where p.pronamespace = n.oid and p.proname = any (%(routines)s::text[])
               and not has_function_privilege(r.oid, p.oid, 'execute'))
           and not exists (
             select from pg_class c where c.relnamespace = n.oid and c.relname = any (%(views)s::text[])
               and not has_table_privilege(r.oid, c.oid, 'select'))
    from pg_roles r cross join pg_namespace n
    where n.nspname = 'pglimits' and r.rolname = {who}
"""


def lacking(connection: psycopg.Connection[Any], group: str) -> tuple[str, str] | None:
    """Why the role of this session may not do what ``group`` may, and what mends that. None if it may."""
    ((exists, myself),) = connection.execute(
        "select exists (select from pg_roles where rolname = %s), current_user::text", [group]
    ).fetchall()
    asked = {"group": group if exists else myself, **_belongings(group)}
    ((me, member, inherits, may),) = _ask(connection, "current_user", asked)
    if may:
        return None
    if not exists:
        return f"there is no role {group}", f"{create((group,))} then: pglimits install; grant {group} to {me};"
    ((_, _, _, group_may),) = _ask(connection, "%(group)s", asked)
    if not group_may:
        return f"the role {group} lacks its own rights in this database, as after a restore without them", (
            "pglimits install (grants them anew)"
        )
    if member and not inherits:
        new = connection.info.server_version >= 160000
        return (
            f"the role {me} is a member of {group}, but does not inherit its rights",
            f"grant {group} to {me} with inherit true;" if new else f"alter role {me} inherit;",
        )
    return f"the role {me} is not a member of {group}", f"grant {group} to {me};"


def _ask(connection: psycopg.Connection[Any], who: str, asked: dict[str, Any]) -> list[tuple[Any, ...]]:
    return connection.execute(_MAY.format(who=who).encode(), asked).fetchall()


def _belongings(group: str) -> dict[str, list[str]]:
    from pglimits._install import granted

    lists = {USER: ["users"], READER: ["readers"], ADMIN: ["users", "administrators", "readers"]}[group]
    return {"routines": granted(*lists), "views": [] if group == USER else granted("visible")}


@contextlib.contextmanager
def explained(conninfo: str, group: str) -> Iterator[None]:
    """Where the role may not do what is done inside: say which role lacks what, and the line that mends it."""
    from pglimits.errors import PermissionDenied, PglimitsError

    try:
        yield
    except PermissionDenied as error:
        from psycopg import Error

        from . import _client

        said = getattr(getattr(error.__cause__, "diag", None), "message_primary", None) or str(error)
        found = None
        with contextlib.suppress(Error, PglimitsError), _client.connect(conninfo) as connection:
            found = lacking(connection, group)
        if found is not None:
            said += f": {found[0]}. An administrator mends it: {found[1]}"
        raise PermissionDenied(said) from error


def create(roles: Sequence[str]) -> str:
    """What a role that may has to run."""
    return " ".join(f"create role {role};" for role in roles)


def missing(roles: Sequence[str]) -> str:
    """What it means that they are not there."""
    return (
        f"there is no role {', '.join(roles)}: only the owner may use pglimits. Have a role that may run the first line"
        " (then: pglimits install), or grant by hand, again after each upgrade:"
    )


def by_hand(roles: Sequence[str]) -> list[str]:
    """The lines that create the roles, and those that do for one of one's own what ``pglimits_user`` is for."""
    from pglimits._install import granted

    named = ", ".join(f"pglimits.{name}" for name in granted("users"))
    return [
        f"  {create(roles)}",
        "  grant usage on schema pglimits to YOUR_ROLE;",
        f"  grant execute on routine {named} to YOUR_ROLE;",
    ]
