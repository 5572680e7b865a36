"""Limits: ls, inspect, create, update, delete, enable, disable, reset. Flags as ``prefect gcl`` has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import _client, _errors, _output, _rights
from ._commands import command
from ._options import Dsn, Format, Name, NewName, Output, Yes

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from pglimits.models import Key, Limit

app = typer.Typer()
_PANEL = "Limits"
_SHOWN = 20
"""How many keys a table shows."""

Rate = Annotated[
    float | None,
    typer.Option(
        "--slot-decay-per-second",
        metavar="R",
        show_default=False,
        help="Slots that come back each second: makes it a rate limit. 0: a concurrency limit.",
    ),
]
MaxWaiters = Annotated[
    int | None,
    typer.Option("--max-waiters", metavar="N", min=0, show_default=False, help="The longest line, for each key."),
]
Description = Annotated[
    str | None, typer.Option("--description", metavar="TEXT", show_default=False, help="What it is for.")
]
ActiveSlots = Annotated[int | None, typer.Option("--active-slots", hidden=True)]


@command(app, _PANEL)
def ls(dsn: Dsn = None, output: Output = Format.table) -> None:
    """List all limits, and how much of each is in use.

    Example: pglimits ls
    """
    with _client.limiter(dsn, _rights.READER) as limiter:
        limits = limiter.list()
    if output is Format.json:
        _output.show(output, limits)
        return
    if not limits:
        _errors.write("There are no limits. Make one: pglimits create NAME --limit 10")
        return
    described = _output.is_wide() and any(limit.description for limit in limits)
    table = _output.table(
        "Name",
        "Active",
        "Limit",
        "Held",
        "Waiting",
        "Level",
        "Decay",
        *(["Description"] if described else []),
        numbers=("Limit", "Held", "Waiting", "Level", "Decay"),
    )
    for limit in limits:
        full = limit.held >= limit.limit or limit.level >= limit.limit
        table.add_row(
            _output.text(limit.name, "cyan"),
            _output.text("yes" if limit.active else "no", "" if limit.active else "yellow"),
            _output.number(limit.limit),
            _output.text(_output.number(limit.held), "yellow" if full and limit.held else ""),
            _output.text(_output.number(limit.waiting), "yellow" if limit.waiting else ""),
            _output.number(limit.level) if limit.slot_decay_per_second else "-",
            _output.rate(limit.slot_decay_per_second),
            *([_output.text(limit.description or "")] if described else []),
        )
    _output.render(table)


@command(app, _PANEL)
def inspect(
    name: Name,
    dsn: Dsn = None,
    output: Output = Format.table,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="PATH", show_default=False, help="Write the JSON there. Needs -o json."),
    ] = None,
) -> None:
    """Show everything about one limit, and how much its keys use: with -o json all of them, else the busiest.

    Example: pglimits inspect database -o json
    """
    if file and output is not Format.json:
        raise _errors.usage("--file needs --output json")
    with _client.limiter(dsn, _rights.READER, name) as limiter:
        limit = limiter.get(name)
        keys = limiter.keys(name)
    if output is Format.table:
        _output.render(_output.properties(_facts(limit)), *_busiest(keys))
        return
    facts = {**_output.plain(limit), "keys": [_output.plain(key) for key in keys]}
    if file:
        file.write_text(_output.as_json(facts) + "\n", encoding="utf-8")
        _errors.write(f"Wrote limit {name!r} to {file}.", err=True)
    else:
        _output.show(output, facts)


def _busiest(keys: list[Key]) -> list[Table | Text]:
    """A table of the keys, unless the one without a name is all there is."""
    if all(not key.key for key in keys):
        return []
    shown = sorted(keys, key=lambda key: (-key.waiting, -key.held, -key.level, key.key))[:_SHOWN]
    table = _output.table("Key", "Held", "Waiting", "Level", "Fence", numbers=("Held", "Waiting", "Level", "Fence"))
    for key in shown:
        table.add_row(
            _output.text(key.key or "''", "cyan"),
            _output.number(key.held),
            _output.text(_output.number(key.waiting), "yellow" if key.waiting else ""),
            _output.number(key.level),
            str(key.fence),
        )
    more = len(keys) - len(shown)
    return [_output.text(""), table, *([_output.text(f"and {more:,} keys more")] if more else [])]


def _facts(limit: Limit) -> list[tuple[str, str]]:
    facts = [
        ("Name", limit.name),
        ("Limit", _output.count(limit.limit, "slot")),
        ("Active", "yes" if limit.active else "no: it is not enforced"),
        ("Held", f"{_output.count(limit.held, 'slot')}, all keys together"),
    ]
    if limit.slot_decay_per_second:
        facts += [
            ("Slot decay", f"{_output.rate(limit.slot_decay_per_second)}: a rate limit"),
            ("Level", f"{_output.count(limit.level, 'slot')} used and not decayed yet, all keys together"),
        ]
    else:
        facts.append(("Slot decay", "none: a concurrency limit"))
    return [
        *facts,
        ("Waiting", _output.count(limit.waiting, "request")),
        ("Max waiters", "no bound" if limit.max_waiters is None else _output.number(limit.max_waiters)),
        ("Description", limit.description or "-"),
        ("Created", _output.moment(limit.created_at)),
        ("Updated", _output.moment(limit.updated_at)),
    ]


@command(app, _PANEL)
def create(
    name: NewName,
    limit: Annotated[
        int, typer.Option("--limit", "-l", metavar="N", show_default=False, help="How many slots. 0 admits nobody.")
    ],
    slot_decay_per_second: Rate = None,
    disable: Annotated[bool, typer.Option("--disable", help="Create it inactive: it is not enforced.")] = False,
    max_waiters: MaxWaiters = None,
    description: Description = None,
    active_slots: ActiveSlots = None,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Create a limit.

    Example: pglimits create database --limit 10

    Example: pglimits create openai --limit 60 --slot-decay-per-second 1
    """
    _no_active_slots(active_slots)
    with _client.limiter(dsn) as limiter:
        made = limiter.create(
            name, limit, slot_decay_per_second or 0.0, not disable, max_waiters=max_waiters, description=description
        )
    _output.show(output, made, f"Created limit {name!r}: {_budget(made)}.")


@command(app, _PANEL)
def update(
    name: Name,
    limit: Annotated[
        int | None,
        typer.Option("--limit", "-l", metavar="N", show_default=False, help="How many slots. 0 admits nobody."),
    ] = None,
    slot_decay_per_second: Rate = None,
    enable: Annotated[bool, typer.Option("--enable", help="Enforce it.")] = False,
    disable: Annotated[bool, typer.Option("--disable", help="Do not enforce it; waiters go on at once.")] = False,
    new_name: Annotated[
        str | None,
        typer.Option("--new-name", metavar="NAME", show_default=False, help="Rename it; everything is kept."),
    ] = None,
    max_waiters: MaxWaiters = None,
    no_max_waiters: Annotated[bool, typer.Option("--no-max-waiters", help="A line of any length.")] = False,
    description: Description = None,
    active_slots: ActiveSlots = None,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Change a limit, at once.

    If it grows, waiters are granted. If it shrinks, holders keep their slots, and nobody new is granted until there is
    room.

    Example: pglimits update database --limit 20

    Example: pglimits update openai --slot-decay-per-second 0.5 --max-waiters 100
    """
    _no_active_slots(active_slots)
    if enable and disable:
        raise _errors.usage("--enable and --disable cannot both be given")
    if max_waiters is not None and no_max_waiters:
        raise _errors.usage("--max-waiters and --no-max-waiters cannot both be given")
    if no_max_waiters:
        max_waiters = -1
    active = enable if enable or disable else None
    changes = (limit, slot_decay_per_second, active, new_name, max_waiters, description)
    if all(change is None for change in changes):
        raise _errors.usage("nothing to update: give an option that changes something (see: pglimits update --help)")
    with _client.limiter(dsn, name=name) as limiter:
        changed = limiter.update(
            name,
            limit=limit,
            slot_decay_per_second=slot_decay_per_second,
            active=active,
            max_waiters=max_waiters,
            description=description,
            new_name=new_name,
        )
    renamed = f", now {changed.name!r}" if changed.name != name else ""
    _output.show(output, changed, f"Updated limit {name!r}{renamed}: {_budget(changed)}.")


@command(app, _PANEL)
def delete(name: Name, yes: Yes = False, dsn: Dsn = None, output: Output = Format.table) -> None:
    """Delete a limit with its leases.

    Its waiters go on, as with any missing limit.

    Example: pglimits delete database --yes
    """
    with _client.limiter(dsn, name=name) as limiter:
        limit = limiter.get(name)
        _output.confirm(f"Delete limit {name!r} ({_in_use(limit)})?", yes=yes)
        limiter.delete(name)
    _output.show(output, {"name": name, "deleted": True}, f"Deleted limit {name!r}.")


@command(app, _PANEL)
def enable(name: Name, dsn: Dsn = None, output: Output = Format.table) -> None:
    """Enforce a limit that was disabled.

    Example: pglimits enable database
    """
    _switch(name, True, dsn, output)


@command(app, _PANEL)
def disable(name: Name, dsn: Dsn = None, output: Output = Format.table) -> None:
    """Do not enforce a limit, for now. Its waiters go on.

    Example: pglimits disable database
    """
    _switch(name, False, dsn, output)


def _switch(name: str, active: bool, dsn: str | None, output: Format) -> None:
    word = "enabled" if active else "disabled"
    with _client.limiter(dsn, name=name) as limiter:
        if limiter.get(name).active is active:
            raise _errors.fail(f"limit {name!r} is already {word}")
        changed = limiter.update(name, active=active)
    _output.show(output, changed, f"{word.capitalize()} limit {name!r}.")


@command(app, _PANEL)
def reset(
    name: Name,
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="KEY", show_default=False, help="Only this key. Default: all of them."),
    ] = None,
    yes: Yes = False,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """End all leases of a limit and set its level to zero.

    The holders are not stopped: they find out when they next renew. So more than the limit may be at work for a
    while.

    Example: pglimits reset database --yes
    """
    with _client.limiter(dsn, name=name) as limiter:
        limit = limiter.get(name)
        of_key = "" if key is None else f", key {key!r}"
        _output.confirm(f"End every lease of limit {name!r}{of_key} ({_in_use(limit)})?", yes=yes)
        ended = limiter.reset(name, key)
    _output.show(
        output,
        {"name": name, "key": key, "ended": ended},
        f"Reset limit {name!r}{of_key}: {_output.count(ended, 'lease')} ended.",
    )


def _budget(limit: Limit) -> str:
    parts = [_output.count(limit.limit, "slot")]
    if limit.slot_decay_per_second:
        parts.append(f"{_output.rate(limit.slot_decay_per_second)} come back")
    if limit.max_waiters is not None:
        parts.append(f"at most {limit.max_waiters} waiting")
    if not limit.active:
        parts.append("not active")
    return ", ".join(parts)


def _in_use(limit: Limit) -> str:
    return f"{_output.count(limit.held, 'slot')} held, {_output.number(limit.waiting)} waiting"


def _no_active_slots(given: int | None) -> None:
    if given is not None:
        raise _errors.usage("--active-slots has no meaning here: slots are held by leases (see: pglimits reset --help)")
