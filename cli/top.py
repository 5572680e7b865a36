"""top: limits live in a terminal. What it shows is in the modules ``_top_…``, which need Textual."""

from __future__ import annotations

import importlib.util
import sys
from typing import Annotated

import typer

from . import _client, _errors, _rights
from ._commands import command
from ._options import Dsn

app = typer.Typer()


@command(app, "Limits")
def top(
    every: Annotated[
        float, typer.Option("--every", metavar="S", min=0.1, max=3600, help="Seconds between two looks.")
    ] = 1.0,
    dsn: Dsn = None,
) -> None:
    """Show all limits live: what is held, who waits, how fast it goes. Busiest first.

    Enter opens a limit: who holds it, who waits and why, its keys. The keys below the table say what else there is:
    sort, filter, pause; for administrators also release a lease, enable and disable a limit. q quits.

    It needs Textual: pip install 'pglimits\\[top]'

    Example: pglimits top --every 5
    """
    if importlib.util.find_spec("textual") is None:
        raise _errors.fail("pglimits top needs Textual: pip install 'pglimits[top]'")
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise _errors.usage("pglimits top needs a terminal; pglimits ls prints what there is, pglimits watch goes on")
    conninfo = _client.target(dsn).conninfo
    with _client.limiter(conninfo, _rights.READER) as limiter:
        limiter.usage(count=1)  # whoever may not look, or finds nobody there, is told so before the screen is taken

    from ._top_app import Top

    shown = Top(conninfo, every)
    shown.run()
    if shown.return_code:
        raise typer.Exit(shown.return_code)
