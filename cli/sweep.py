"""sweep: tidy up, once or again and again."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _client, _errors, _output
from ._commands import command
from ._options import Dsn, Format, Output

if TYPE_CHECKING:
    from pglimits import Limiter

app = typer.Typer()

_FULL = 1000
"""A sweep that removed so many may have left some: it takes a thousand keys at a time."""


@command(app, "Set up and look after")
def sweep(
    every: Annotated[
        float | None,
        typer.Option(
            "--every", metavar="S", min=1, show_default=False, help="Again every so many seconds, until ctrl-C."
        ),
    ] = None,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Tidy up, once or regularly.

    Removes ended leases that nobody wanted, dead waiters and idle keys, and takes the samples of the history. Nothing
    else depends on it but the size of the tables. Where pg_cron is installed, `pglimits cron enable` schedules it.

    Example: pglimits sweep --every 60
    """
    with _client.limiter(dsn) as limiter:
        if every is None:
            _sweep(limiter, output)
            return
        try:
            with _client.ended_by_signals():
                _sweep_for_ever(limiter, every, output)
        except typer.Exit:
            return  # that is how it is meant to end


def _sweep_for_ever(limiter: Limiter, every: float, output: Format) -> None:
    from pglimits.errors import LimiterUnavailable

    while True:
        try:
            _sweep(limiter, output, stamped=True)
        except LimiterUnavailable as error:  # a restart: the next one may work
            _errors.say("Warning", error)
        again = time.monotonic() + every
        while (left := again - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))  # a signal in the moment before a sleep does not end that one


def _sweep(limiter: Limiter, output: Format, *, stamped: bool = False) -> None:
    total = [0, 0, 0]
    with _output.working("Sweeping…"):
        while True:
            swept = limiter.sweep()
            removed = (swept.leases, swept.waiters, swept.keys)
            total = [before + now for before, now in zip(total, removed, strict=True)]
            if sum(removed) < _FULL:
                break
    slots, waiters, keys = total
    result: dict[str, Any] = {"leases": slots, "waiters": waiters, "keys": keys}
    line = (
        f"Swept {_output.count(slots, 'slot')} of ended leases, "
        f"{_output.count(waiters, 'waiter')}, {_output.count(keys, 'idle key')}."
    )
    if stamped:
        at = datetime.now(UTC).astimezone()
        result = {"at": at, **result}
        line = f"{at:%Y-%m-%d %H:%M:%S}  {line}"
    _errors.write(_output.as_json(result, indent=None if stamped else 2) if output is Format.json else line)
