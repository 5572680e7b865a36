"""Options and arguments that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Format(StrEnum):
    """How to print."""

    table = "table"
    json = "json"


def given_dsn(context: typer.Context, value: str | None) -> str | None:
    """The DSN of this command, else the one that stood before the command. One that is empty is an error."""
    if context.resilient_parsing:  # a shell completes the line
        return value
    if value is not None and not value.strip():
        raise typer.BadParameter("it is empty: name a database, or leave the option out")
    given = context.obj if value is None else value
    return given if isinstance(given, str) else None


DSN_HELP = "The database. Default: $PGLIMITS_DSN, else $DATABASE_URL, else the embedded server."

Dsn = Annotated[str | None, typer.Option("--dsn", metavar="DSN", help=DSN_HELP, callback=given_dsn, show_default=False)]
Output = Annotated[
    Format,
    typer.Option(
        "--output", "-o", metavar="table|json", help="How to print.", case_sensitive=False, show_default=False
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask. Needed where there is no terminal.")]


def _complete(context: typer.Context, incomplete: str) -> list[str]:
    """What a shell offers for the name of a limit."""
    from . import _names

    return _names.complete(context, incomplete)


Name = Annotated[str, typer.Argument(metavar="NAME", help="The limit.", show_default=False, autocompletion=_complete)]
NewName = Annotated[str, typer.Argument(metavar="NAME", help="The new limit.", show_default=False)]
SomeName = Annotated[
    str | None, typer.Argument(metavar="NAME", help="Only this limit.", show_default=False, autocompletion=_complete)
]
OfName = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Only of this limit.", show_default=False, autocompletion=_complete),
]
Names = Annotated[
    list[str],
    typer.Argument(metavar="NAME", help="The limits: all or none.", show_default=False, autocompletion=_complete),
]


def _slots(value: int) -> int:
    if value > 2**31 - 1:  # not as a bound of the option, which the help would show
        raise typer.BadParameter(f"{value} is out of range: no limit has so many")
    return value


Slots = Annotated[
    int, typer.Option("--slots", metavar="N", min=1, callback=_slots, help="Slots to take of each limit.")
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="S",
        min=0,
        show_default=False,
        help="Seconds to wait at most; 0 tries once. Default: for ever.",
    ),
]
Key = Annotated[
    str, typer.Option("--key", metavar="KEY", help="Each key has the whole limit for itself.", show_default=False)
]
Priority = Annotated[int, typer.Option("--priority", metavar="N", help="Higher goes first.")]
Strict = Annotated[bool, typer.Option("--strict", help="A missing limit is an error, not a warning.")]
