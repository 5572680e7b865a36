"""run: a command under a lease, as flock does with a file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _client, _errors, _program
from ._commands import Command, command
from ._options import Dsn, Key, Names, Priority, Slots, Timeout

if TYPE_CHECKING:
    from pglimits import AsyncLimiter, Lease

    from ._child import Child
    from ._signals import Signals

app = typer.Typer()


class _WithCommand(Command):
    """Everything after ``--`` is a command, options and all."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing and "--" in args:
            at = args.index("--")
            ctx.meta[__name__] = args[at + 1 :]
            args = args[:at]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "-- COMMAND..."]


@command(app, "Take slots", _WithCommand)
def run(
    context: typer.Context,
    names: Names,
    slots: Slots = 1,
    timeout: Timeout = None,
    lease_duration: Annotated[
        float,
        typer.Option(
            "--lease-duration",
            metavar="S",
            min=1,
            show_default=False,
            help="Renewed while the command runs; so long after this machine died, the slots come back. Default: 60.",
        ),
    ] = 60.0,
    key: Key = "",
    priority: Priority = 0,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="A missing limit is an error; a lost lease terminates the command (exit code 1)."
        ),
    ] = False,
    dsn: Dsn = None,
) -> None:
    """Run a command while holding slots.

    For cron lines and shell scripts: like flock, but across machines, and in line.

    The lease is renewed while the command runs and given back when it ends, however it ends. The command finds
    PGLIMITS_LEASE_ID and PGLIMITS_FENCE (of several limits: commas between) in its environment. TERM, INT, HUP,
    QUIT, USR1 and USR2 are passed on to it. Should this process be killed by SIGKILL, the command gets a SIGTERM
    at once (on Linux, and unless it is set-user-ID as sudo is), and the lease ends by itself.

    Exit code: the command's; 128+n if signal n ended it, or the wait for the slot; 75 if the slots could not be
    had in time; 127 not found, 126 not executable; 1 any other error; 2 usage.

    Example: pglimits run nightly-report --timeout 0 -- ./report.sh --all

    Example: */5 * * * *  pglimits run crm-api --slots 2 --timeout 240 -- sync-customers
    """
    command: list[str] | None = context.meta.get(__name__)
    if not command:
        raise _errors.usage("no command: put it after --, as in: pglimits run database -- ./job.sh")
    path = _program.find(command[0])

    from ._signals import with_limiter

    acquire: dict[str, Any] = {
        "names": _client.names(names),
        "occupy": slots,
        "timeout_seconds": timeout,
        "lease_duration": lease_duration,
        "strict": strict,
        "holder": _client.holder(os.fsencode(command[0]).decode(errors="replace")[:500]),
        "key": key,
        "priority": priority,
    }
    conninfo = _client.target(dsn).conninfo
    raise typer.Exit(
        with_limiter(conninfo, names, lambda limiter, signals: _run(limiter, signals, acquire, path, command))
    )


async def _run(limiter: AsyncLimiter, signals: Signals, acquire: dict[str, Any], path: str, command: list[str]) -> int:
    from ._child import Child

    lease = await signals.interrupt(limiter.acquire(**acquire))
    try:
        if signals.first is not None:  # in the moment of the grant
            return _errors.SIGNAL + signals.first
        child = await Child.start(path, command, lease, signals)
        return await _watch(child, lease, strict=acquire["strict"])
    finally:
        await _give_back(limiter, lease, signals)


async def _watch(child: Child, lease: Lease, *, strict: bool) -> int:
    """Wait for the command to end; under ``strict``, end it when the lease is lost."""
    import asyncio

    ended = asyncio.ensure_future(child.wait())
    while strict and not lease.lost and not ended.done():
        await asyncio.wait({ended}, timeout=0.2)
    if strict and lease.lost and not ended.done():
        _errors.say("Error", f"the lease {lease.id} was lost: terminating the command")
        await child.terminate()
        return _errors.ERROR
    return await ended


async def _give_back(limiter: AsyncLimiter, lease: Lease, signals: Signals) -> None:
    from pglimits.errors import PglimitsError

    try:
        await signals.interrupt(limiter.release(lease))
    except PglimitsError as error:
        _errors.say("Warning", f"could not give the slots back, they come back at {lease.expires_at}: {error}")
    except typer.Exit:
        _errors.say("Warning", f"interrupted while giving the slots back; they come back at {lease.expires_at}")
