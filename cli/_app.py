"""The app: all commands, and what comes before one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from . import _errors
from ._commands import Commands
from ._options import DSN_HELP, given_dsn


class _Main(Commands):
    """Ends with an exit code that scripts can rely on."""

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
            return super(_Main, self).main(args, prog_name, complete_var, False, windows_expand_args, **extra)

        return sys.exit(_errors.exit_code(command)) if standalone_mode else command()


app = typer.Typer(
    cls=_Main,
    help="Concurrency limits and rate limits in PostgreSQL.",
    epilog="Example: pglimits create database --limit 10 && pglimits run database -- ./job.sh",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        _errors.write(f"pglimits {version('pglimits')}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    dsn: Annotated[
        str | None,
        typer.Option(
            "--dsn",
            metavar="DSN",
            callback=given_dsn,
            show_default=False,
            help=DSN_HELP + " Commands take it as well.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    context.obj = dsn
    if context.invoked_subcommand is None:
        text = context.get_help()
        if text:
            _errors.write(text)
        raise typer.Exit(_errors.USAGE)
