"""The app: all commands, and what comes before one."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from . import _errors, bench, cron, embedded, leases, limits, run, setup, sweep
from ._options import DSN_HELP

_DEMO = "demo"


class _Commands(typer.core.TyperGroup):
    """Ends with an exit code that scripts can rely on, and loads the demo only when it is wanted."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        def command() -> Any:
            return super(_Commands, self).main(args, prog_name, complete_var, False, windows_expand_args, **extra)

        return sys.exit(_errors.exit_code(command)) if standalone_mode else command()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name == _DEMO and _DEMO not in self.commands and _has_demo():
            self.add_command(_demo(), _DEMO)
        return super().get_command(ctx, cmd_name)

    def list_commands(self, ctx: Any) -> list[str]:
        names = [name for name in super().list_commands(ctx) if name != _DEMO]
        return [_DEMO, *names] if _has_demo() else names


def _has_demo() -> bool:
    return importlib.util.find_spec(f"{__package__}.{_DEMO}") is not None


def _demo() -> Any:
    alone = typer.Typer(add_completion=False)
    function = importlib.import_module(f"{__package__}.{_DEMO}").demo
    alone.command(_DEMO, rich_help_panel="Start here")(function)
    return typer.main.get_command(alone)


app = typer.Typer(
    cls=_Commands,
    help="Concurrency limits and rate limits in PostgreSQL.",
    epilog="Example: pglimits create database --limit 10 && pglimits run database -- ./job.sh",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for family in (limits, leases, run, sweep, setup, bench):
    app.registered_commands += family.app.registered_commands
for group in (cron, embedded):
    app.add_typer(group.app, rich_help_panel="Set up and look after")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"pglimits {version('pglimits')}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    dsn: Annotated[
        str | None,
        typer.Option("--dsn", metavar="DSN", show_default=False, help=DSN_HELP + " Commands take it as well."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    context.obj = dsn
    if context.invoked_subcommand is None:
        text = context.get_help()
        if text:
            typer.echo(text)
        raise typer.Exit(_errors.USAGE)
