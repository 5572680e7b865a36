"""embedded start|stop|status: the PostgreSQL that is used where no other is named."""

from __future__ import annotations

from typing import Any

import typer

from . import _errors, _output
from ._commands import Group, command
from ._options import Format, Output

app = typer.Typer(
    name="embedded",
    help="The embedded PostgreSQL, for where no database is named.",
    no_args_is_help=True,
    add_completion=False,
    cls=Group,
)


@command(app)
def start(output: Output = Format.table) -> None:
    """Start the embedded PostgreSQL, unless it runs, and install pglimits in it.

    Example: export PGLIMITS_DSN=$(pglimits embedded start -o json | jq -r .dsn)
    """
    from pglimits import _embedded, _install

    with _output.working("Starting PostgreSQL…"):
        server = _embedded.start()
        _install.install_if_needed(server.dsn)
    _output.show(
        output, _facts(server), f"PostgreSQL {server.version} is running, pid {server.pid}.", f"DSN: {server.dsn}"
    )


@command(app)
def stop(output: Output = Format.table) -> None:
    """Stop the embedded PostgreSQL, for all your processes. Its data is kept.

    Example: pglimits embedded stop
    """
    from pglimits import _embedded

    with _output.working("Stopping PostgreSQL…"):
        stopped = _embedded.stop()
    _output.show(output, {"stopped": stopped}, "Stopped." if stopped else "It was not running.")


@command(app)
def status(output: Output = Format.table) -> None:
    """Say whether the embedded PostgreSQL runs. Exits with 1 if it does not.

    Example: pglimits embedded status
    """
    from pglimits import _embedded

    server = _embedded.status()
    if output is Format.json:
        _output.show(output, {"running": False} if server is None else _facts(server))
    elif server is not None:
        _output.render(
            _output.properties(
                [
                    ("Running", f"PostgreSQL {server.version}, pid {server.pid}"),
                    ("DSN", server.dsn),
                    ("Data", str(server.data)),
                ]
            )
        )
    if server is None:
        if output is Format.table:
            _errors.write("It is not running. Start it: pglimits embedded start")
        raise typer.Exit(_errors.ERROR)


def _facts(server: Any) -> dict[str, object]:
    return {
        "running": True,
        "dsn": server.dsn,
        "host": server.host,
        "port": server.port,
        "user": server.user,
        "data": server.data,
        "pid": server.pid,
        "version": server.version,
    }
