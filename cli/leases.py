"""Leases: holders, waiters, release; and for shell scripts acquire, renew, rate."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from . import _client, _errors, _output, _rights
from ._commands import command
from ._options import Dsn, Format, Key, Names, Output, Priority, Slots, SomeName, Strict, Timeout

if TYPE_CHECKING:
    from rich.text import Text

    from pglimits import AsyncLimiter, Holder, Limiter, Waiter

app = typer.Typer()
_LOOK = "Limits"
_SCRIPTS = "Take slots"
_WHOLE = ("Lease", "Holder, lease", "Waiter, lease")

LeaseIds = Annotated[
    list[UUID],
    typer.Argument(metavar="LEASE_ID", help="What acquire printed, or holders shows.", show_default=False),
]


@command(app, _LOOK)
def holders(name: SomeName = None, dsn: Dsn = None, output: Output = Format.table) -> None:
    """Show who holds slots.

    Held: since when. Left: how long still unless they renew. With -o json also fences, priorities and timestamps.

    Example: pglimits holders database
    """
    conninfo = _client.target(dsn).conninfo
    with _client.limiter(conninfo, _rights.READER, name) as limiter:
        found = limiter.holders(name)
        _must_exist(limiter, name, bool(found))
    if output is Format.json:
        _output.show(output, found)
        return
    if not found:
        _errors.write("Nobody holds a slot." if name is None else f"Nobody holds a slot of limit {name!r}.")
        return
    now = _client.clock(conninfo)
    keyed = any(holder.key for holder in found)
    table = _output.table(
        "Limit",
        *(["Key"] if keyed else []),
        "Slots",
        "Held",
        "Left",
        *_who_columns("Holder"),
        numbers=("Slots", "Held", "Left"),
        whole=_WHOLE,
    )
    for holder in found:
        table.add_row(
            _output.text(holder.name, "cyan"),
            *([_output.text(holder.key)] if keyed else []),
            _output.number(holder.slots),
            _output.duration((now - holder.acquired_at).total_seconds()),
            _output.duration((holder.expires_at - now).total_seconds()),
            *_who_cells(holder),
        )
    _output.render(table)


@command(app, _LOOK)
def waiters(name: SomeName = None, dsn: Dsn = None, output: Output = Format.table) -> None:
    """Show who waits for slots, in the order of the line.

    Example: pglimits waiters database
    """
    conninfo = _client.target(dsn).conninfo
    with _client.limiter(conninfo, _rights.READER, name) as limiter:
        found = limiter.waiters(name)
        _must_exist(limiter, name, bool(found))
    if output is Format.json:
        _output.show(output, found)
        return
    if not found:
        _errors.write("Nobody waits." if name is None else f"Nobody waits for limit {name!r}.")
        return
    now = _client.clock(conninfo)
    keyed = any(waiter.key for waiter in found)
    ranked = any(waiter.priority for waiter in found)
    table = _output.table(
        "Limit",
        *(["Key"] if keyed else []),
        "Place",
        "Slots",
        *(["Prio"] if ranked else []),
        "Waits",
        *_who_columns("Waiter"),
        numbers=("Place", "Slots", "Prio", "Waits"),
        whole=_WHOLE,
    )
    for waiter in found:
        table.add_row(
            _output.text(waiter.name, "cyan"),
            *([_output.text(waiter.key)] if keyed else []),
            str(waiter.position),
            _output.number(waiter.slots),
            *([str(waiter.priority)] if ranked else []),
            _output.duration((now - waiter.waiting_since).total_seconds()),
            *_who_cells(waiter),
        )
    _output.render(table)


def _who_columns(word: str) -> list[str]:
    return [word, "Lease"] if _output.is_wide() else [f"{word}, lease"]


def _who_cells(row: Holder | Waiter) -> list[Text]:
    who, lease = _output.who(row.holder), _output.text(row.lease_id, "dim")
    if _output.is_wide():
        return [_output.text(who), lease]
    folded = textwrap.wrap(who, len(lease), break_on_hyphens=False)  # as wide as the id, which must not be folded
    return [_output.text("\n".join([*folded, ""])).append_text(lease)]


def _must_exist(limiter: Limiter, name: str | None, seen: bool) -> None:
    """An empty answer about a limit that does not exist is an error."""
    if name is not None and not seen:
        limiter.get(name)


@command(app, _LOOK)
def release(
    lease_ids: LeaseIds,
    force: Annotated[
        bool, typer.Option("--force", help="It is somebody else's: the events tell of it. For administrators.")
    ] = False,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """End leases, or take requests out of the line.

    Safe to repeat: a lease that has ended already is no error.

    Without --force it is what a script does with the id that acquire gave it, and no event. A holder that is still
    at work is not stopped either way: it finds out when it next renews.

    Example: pglimits release "$lease"
    """
    with _client.limiter(dsn, _rights.ADMIN if force else _rights.USER) as limiter:
        end = limiter.force_release if force else limiter.release
        done = [(lease_id, end(lease_id)) for lease_id in lease_ids]
    _output.show(
        output,
        [{"lease_id": lease_id, "released": released} for lease_id, released in done],
        *(f"Released {lease_id}." if released else f"{lease_id} had ended already." for lease_id, released in done),
    )


@command(app, _SCRIPTS)
def acquire(
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
            help="Seconds until the slots come back by themselves. Default: 300.",
        ),
    ] = 300.0,
    key: Key = "",
    priority: Priority = 0,
    strict: Strict = False,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Take slots and print the lease's id.

    They are held until released, or until the lease's end: nobody renews it but you. Exits with 75 if they could not
    be had in time. Where a command can be wrapped, `pglimits run` is safer.

    Example: lease=$(pglimits acquire database --timeout 60 --lease-duration 600) || exit

    Example: pglimits acquire database license --key tenant-42 -o json
    """
    from ._signals import Signals, with_limiter

    async def take(limiter: AsyncLimiter, signals: Signals) -> None:
        lease = await signals.interrupt(
            limiter.acquire(
                _client.names(names),
                slots,
                timeout,
                lease_duration=lease_duration,
                strict=strict,
                holder=_client.holder("pglimits acquire", parent=True),
                key=key,
                priority=priority,
                renew=False,
            )
        )
        try:
            if signals.first is not None:
                raise typer.Exit(_errors.SIGNAL + signals.first)
            facts = {name: getattr(lease, name) for name in ("id", "fence", "fences", "expires_at", "enforced")}
            _output.show(output, facts, str(lease.id))
        except BaseException:  # nobody has read the id: nobody could release it
            await limiter.release(lease)
            raise

    with_limiter(_client.target(dsn).conninfo, names, take)


@command(app, _SCRIPTS)
def renew(
    lease_id: Annotated[UUID, typer.Argument(metavar="LEASE_ID", help="What acquire printed.", show_default=False)],
    lease_duration: Annotated[
        float | None,
        typer.Option(
            "--lease-duration",
            metavar="S",
            min=1,
            show_default=False,
            help="Seconds from now. Default: as it was acquired.",
        ),
    ] = None,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Move a lease's end further away.

    Exits with 1 if it has ended already.

    Example: pglimits renew "$lease"
    """
    with _client.limiter(dsn, _rights.USER) as limiter:
        renewed = limiter.renew(lease_id, lease_duration)
    if output is Format.json:
        _output.show(output, {"lease_id": lease_id, "renewed": renewed})
    if not renewed:
        raise _errors.fail(f"lease {lease_id} has ended: somebody else may have its slots")
    if output is Format.table:
        _errors.write(f"Renewed {lease_id}.")


@command(app, _SCRIPTS)
def rate(
    names: Names,
    slots: Slots = 1,
    timeout: Timeout = None,
    key: Key = "",
    strict: Strict = False,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Take slots of a rate limit, and wait until it lets you go on.

    Exits with 75, at once, if that would be too late.

    Example: pglimits rate openai --timeout 30 && curl https://api.openai.com/v1/models
    """
    from ._signals import Signals, with_limiter

    async def wait(limiter: AsyncLimiter, signals: Signals) -> None:
        await signals.interrupt(limiter.rate_limit(_client.names(names), slots, timeout, strict, key))

    with_limiter(_client.target(dsn).conninfo, names, wait)
    if output is Format.json:
        _output.show(output, {"names": names, "slots": slots, "key": key, "granted": True})
