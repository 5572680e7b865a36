"""install, upgrade, uninstall, sql, doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import _client, _errors, _output
from ._commands import command
from ._options import Dsn, Format, Output, Yes

if TYPE_CHECKING:
    from . import _doctor

app = typer.Typer()
_PANEL = "Set up and look after"


@command(app, _PANEL)
def install(dsn: Dsn = None, output: Output = Format.table) -> None:
    """Install pglimits in a database, or bring it up to date.

    Safe to repeat, and safe when many do it at once.

    Example: pglimits install --dsn postgresql://admin@db.example.com/app
    """
    _install(dsn, output)


@command(app, _PANEL)
def upgrade(dsn: Dsn = None, output: Output = Format.table) -> None:
    """Bring a database up to this version. The same as install.

    Example: pglimits upgrade
    """
    _install(dsn, output)


def _install(dsn: str | None, output: Format) -> None:
    from pglimits import _install as installer

    target = _client.target(dsn)
    with _output.working("Installing pglimits…"):
        report = installer.install(target.conninfo)
    before, after = report.version_before, report.version_after
    where = f"{_client.place(target.conninfo)} (from {_client.source(target)})"
    if before is None:
        line = f"Installed pglimits {after} in {where}."
    elif before == after:
        line = f"pglimits {after} is up to date in {where}."
    else:
        line = f"Upgraded pglimits from {before} to {after} in {where}."
    for remark in report.remarks:
        _errors.say("Note", remark.removeprefix("pglimits: "))
    _output.show(output, {"version_before": before, "version_after": after, "changed": before != after}, line)


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
    remove: Annotated[bool, typer.Option("--uninstall", help="The script that removes it.")] = False,
) -> None:
    """Print the installation as one script for psql.

    Example: pglimits sql | psql postgresql://admin@db.example.com/app
    """
    from importlib import resources

    from pglimits import _install as installer

    if remove:
        typer.echo(resources.files("pglimits_sql").joinpath("uninstall.sql").read_text(encoding="utf-8"), nl=False)
    else:
        typer.echo(installer.script())


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
        if finding.fix:
            explained.append("\n→ ", "bold")
            explained.append(finding.fix, "bold")
        table.add_row(_output.text(finding.status, style), _output.text(finding.check), explained)
    counts = {status: sum(finding.status == status for finding in findings) for status in styles}
    _output.render(
        table,
        "",
        f"{counts[_doctor.FAIL]} failed, {_output.count(counts[_doctor.WARN], 'warning')}, {counts[_doctor.OK]} ok.",
    )
