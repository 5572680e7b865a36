"""install, upgrade, uninstall, sql, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import _client, _errors, _output
from ._commands import command
from ._options import Dsn, Format, Output, Yes

if TYPE_CHECKING:
    from . import _doctor

app = typer.Typer()
_PANEL = "Set up and look after"


WithoutRoles = Annotated[
    bool,
    typer.Option(
        "--without-roles",
        help="Go on where the roles pglimits_user, pglimits_reader and pglimits_admin cannot be created.",
    ),
]


@command(app, _PANEL)
def install(without_roles: WithoutRoles = False, dsn: Dsn = None, output: Output = Format.table) -> None:
    """Install pglimits in a database, or bring it up to date.

    Safe to repeat, and safe when many do it at once. Where pglimits is an extension, the extension is updated.

    Example: pglimits install --dsn postgresql://admin@db.example.com/app
    """
    _install(dsn, output, without_roles)


@command(app, _PANEL)
def upgrade(without_roles: WithoutRoles = False, dsn: Dsn = None, output: Output = Format.table) -> None:
    """Bring a database up to this version. The same as install.

    Example: pglimits upgrade
    """
    _install(dsn, output, without_roles)


def _install(dsn: str | None, output: Format, without_roles: bool) -> None:
    from pglimits import _install as installer
    from pglimits.errors import PermissionDenied

    target = _client.target(dsn)
    try:
        with _output.working("Installing pglimits…"):
            done = installer.install(target.conninfo, without_roles=without_roles)
    except PermissionDenied as error:
        what, *lines = str(error).split("\n")
        raise _errors.fail(what, _errors.ERROR, *lines) from error
    before, after, missing = done.version_before, done.version_after, done.missing_roles
    what = "the extension pglimits" if done.extension else "pglimits"
    where = f"{_client.place(target.conninfo)} (from {_client.source(target)})"
    if before is None:
        line = f"Installed pglimits {after} in {where}."
    elif before == after:
        line = f"{what[0].upper() if done.extension else what[0]}{what[1:]} {after} is up to date in {where}."
    else:
        line = f"Upgraded {what} from {before} to {after} in {where}."
    if missing:
        from . import _rights

        _errors.say("Note", _rights.missing(missing), *_rights.by_hand(missing))
    facts = {"version_before": before, "version_after": after, "changed": before != after, "missing_roles": missing}
    _output.show(output, facts, line)


@command(app, _PANEL)
def uninstall(yes: Yes = False, dsn: Dsn = None, output: Output = Format.table) -> None:
    """Remove pglimits from a database, with every limit and lease.

    Example: pglimits uninstall --yes
    """
    from pglimits import _install as installer
    from pglimits.errors import NotInstalled

    from . import cron

    target = _client.target(dsn)
    where = _client.place(target.conninfo)
    with _client.connect(target.conninfo) as connection:
        if connection.execute("select to_regnamespace('pglimits')").fetchone() == (None,):
            raise NotInstalled(f"pglimits is not installed in {where}: there is nothing to remove")
        _output.confirm(f"Remove pglimits from {where}, with every limit and lease?", yes=yes)
        home = cron.cron_database(connection)
        if home is not None:
            try:
                cron.disable_from_elsewhere(connection, target, home)
            except Exception as error:
                _errors.say("Warning", f"the job of pg_cron in database {home!r} is left: {_client.explained(error)}")
    with _output.working("Removing pglimits…"):
        remarks = installer.uninstall(target.conninfo)
    for remark in remarks:
        _errors.say("Note", remark)
    _output.show(output, {"uninstalled": True}, f"Removed pglimits from {where}.")


@command(app, _PANEL)
def sql(
    plain: Annotated[
        bool, typer.Option("--plain", help="Plain statements without what only psql knows, to be run in a transaction.")
    ] = False,
    without_roles: WithoutRoles = False,
    remove: Annotated[bool, typer.Option("--uninstall", help="The script that removes it.")] = False,
    extension: Annotated[
        Path | None,
        typer.Option(
            "--extension",
            metavar="FOLDER",
            file_okay=False,
            show_default=False,
            help="Write the files for 'create extension pglimits', and for PGXN, into this folder.",
        ),
    ] = None,
    tle: Annotated[
        bool, typer.Option("--tle", help="The extension as SQL for pg_tle, where the server's files are out of reach.")
    ] = False,
) -> None:
    """Print the installation as one script for psql, or for a tool that migrates databases.

    With --plain for Alembic, Flyway, Django's RunSQL and the like, which run it in a transaction of theirs. From Python
    `pglimits.install(connection)` does the same.

    Example: pglimits sql | psql postgresql://admin@db.example.com/app

    Example: pglimits sql --plain > migrations/V7__pglimits.sql

    Example: pglimits sql --extension pglimits-extension
    """
    from importlib import resources

    from pglimits import _install as installer

    if remove and (plain or without_roles):
        raise _errors.usage("--uninstall goes with neither --plain nor --without-roles")
    if (extension is not None or tle) and (plain or without_roles or remove or (extension is not None and tle)):
        raise _errors.usage("--extension and --tle go with no other option")
    if extension is not None:
        _write_extension(extension)
    elif tle:
        from pglimits import _extension

        _errors.write(_extension.tle(), end="")
    elif remove:
        _errors.write(resources.files("pglimits_sql").joinpath("uninstall.sql").read_text(encoding="utf-8"), end="")
    elif plain:
        _errors.write(installer.plain(without_roles=without_roles), end="")
    else:
        _errors.write(installer.script(without_roles=without_roles))


def _write_extension(folder: Path) -> None:
    """Write the files of the extension, and say which they are."""
    from pglimits import _extension

    files = _extension.files()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    _errors.write(f"Wrote {', '.join(files)} into {folder}.")


@command(app, _PANEL)
def doctor(dsn: Dsn = None, output: Output = Format.table) -> None:
    """Find out what is wrong, and say what mends it.

    Exits with 1 if anything fails. Looks at the connection, the server, the installation, your rights, the sweep, and
    what slows things down: old snapshots, long transactions, poolers, waiters that nobody serves.

    Example: pglimits doctor --dsn postgresql://app@db.example.com/app
    """
    from . import _doctor

    _client.show_warnings()
    with _output.working("Looking…"):
        findings = _doctor.examine(dsn)
    failed = any(finding.status == _doctor.FAIL for finding in findings)
    if output is Format.json:
        _output.show(output, {"ok": not failed, "checks": findings})
    else:
        _show(findings)
    if failed:
        raise typer.Exit(_errors.ERROR)


def _show(findings: list[_doctor.Finding]) -> None:
    from rich.table import Table

    from . import _doctor

    styles = {_doctor.OK: "green", _doctor.WARN: "yellow", _doctor.FAIL: "bold red", _doctor.SKIP: "dim"}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        style = styles[finding.status]
        explained = _output.text(finding.text, "dim" if finding.status == _doctor.SKIP else "")
        for line in (finding.fix or "").splitlines():
            explained.append(f"\n→ {line}", "bold")
        table.add_row(_output.text(finding.status, style), _output.text(finding.check), explained)
    counts = {status: sum(finding.status == status for finding in findings) for status in styles}
    _output.render(
        table,
        "",
        f"{counts[_doctor.FAIL]} failed, {_output.count(counts[_doctor.WARN], 'warning')}, {counts[_doctor.OK]} ok.",
    )
