"""Limits as code: plan, apply, export."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _client, _errors, _output, _rights
from ._commands import Command, command
from ._options import Dsn, Format, Output, Yes

if TYPE_CHECKING:
    from pglimits import Limiter
    from pglimits.models import Limit

    from ._limits_file import Syntax, Wanted
    from ._limits_plan import Plan

app = typer.Typer()
_PANEL = "Limits"
_ATTEMPTS = 20
"""How often a plan is made anew because others changed limits meanwhile."""

TO_DO = 2
"""Exit code of a plan that is not empty."""


class PlanCommand(Command):
    """Exits with 1 on every error: 2 says that there is something to do."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except _errors.UsageError as error:
            error.exit_code = _errors.ERROR  # type: ignore[attr-defined]
            raise

    def invoke(self, ctx: Any) -> Any:
        from pglimits.errors import InvalidArgument

        try:
            return super().invoke(ctx)
        except InvalidArgument as error:
            raise _errors.fail(error) from None


File = Annotated[
    str, typer.Argument(metavar="FILE", help="The limits, in TOML or YAML. -: standard input.", show_default=False)
]
Written = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="toml|yaml",
        show_default=False,
        help="How FILE is written. Default: by its name; standard input is TOML.",
    ),
]
Prune = Annotated[bool, typer.Option("--prune", help="Delete the limits that FILE does not name.")]


@command(app, _PANEL, PlanCommand)
def plan(
    file: File,
    prune: Prune = False,
    syntax: Written = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH", dir_okay=False, show_default=False, help="Save the plan, for apply."),
    ] = None,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Show what has to be done for the limits to be as a file has them. Changes nothing.

    Exits with 0 if there is nothing to do, with 2 if there is, and with 1 on an error.

    Example: pglimits plan limits.toml

    Example: pglimits plan limits.yaml --prune --out plan.json
    """
    from . import _limits_file as files
    from . import _limits_plan

    text = _text(file)
    if _saved(file, text) is not None:
        raise _errors.fail(f"{file} is a saved plan already: pglimits apply {file}")
    if out is not None and file != "-" and out.exists() and out.samefile(file):
        raise _errors.fail("--out names the file of limits itself, which the plan would replace")
    chosen = files.syntax_of(file, _syntax(syntax))
    with _client.limiter(dsn, _rights.READER) as limiter:
        there = limiter.list()
        made = _limits_plan.plan(_called(file), _wanted(limiter, file, text, chosen), there, prune=prune)
    to_do = made.count(*_limits_plan.TO_DO)
    if out is not None:
        out.write_text(_output.as_json(made.plain()) + "\n", encoding="utf-8")
    if output is Format.json:
        _output.show(output, made.plain())
    else:
        _limits_plan.show(made, there)
        _limits_plan.show_others(made, there, "Not in the file, and left alone without --prune")
        _errors.write(f"Plan: {_limits_plan.summary(made, done=False)}." if to_do else _limits_plan.nothing(made))
    if out is not None:
        _errors.write(f"Saved the plan: pglimits apply {out}", err=True)
    if to_do:
        raise typer.Exit(TO_DO)


@command(app, _PANEL)
def apply(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="The limits, in TOML or YAML, or a plan that plan --out saved. -: standard input.",
            show_default=False,
        ),
    ],
    prune: Prune = False,
    syntax: Written = None,
    yes: Yes = False,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Make the limits as a file has them, all in one transaction.

    Holders keep what they hold, as with update; what is deleted ends its leases, as with delete.

    A saved plan is done exactly, or not at all where limits were changed since it was made.

    Example: pglimits apply limits.toml

    Example: pglimits apply limits.yaml --prune --yes
    """
    from pglimits.errors import LimitsChanged

    from . import _limits_file as files
    from . import _limits_plan

    text = _text(file)
    given = _saved(file, text)
    if given is not None and prune:
        raise _errors.usage("--prune does not go with a saved plan, which says itself what it deletes")
    chosen = files.syntax_of(file, _syntax(syntax)) if given is None else None
    confirmed: set[str] = set()
    shown: Plan | None = None
    with _client.limiter(dsn) as limiter:
        for attempt in range(_ATTEMPTS):
            there = limiter.list()
            if chosen is not None:
                made = _limits_plan.plan(_called(file), _wanted(limiter, file, text, chosen), there, prune=prune)
            else:
                assert given is not None
                made = given
                _check_saved(limiter, file, made)
            new = [name for name in made.deleted if name not in confirmed]
            if new and not yes:
                if output is not Format.json:
                    _limits_plan.show(made, there)
                    shown = made
                _output.confirm(_question(new, there), yes=yes)
                confirmed |= set(new)
            try:
                limiter._apply(json.dumps(made.plain()))
                break
            except LimitsChanged as error:
                if given is not None:
                    raise _errors.fail(f"{error}. Make a new plan") from None
                if attempt == _ATTEMPTS - 1:
                    raise
    if output is Format.json:
        _output.show(output, {**made.plain(), "applied": True})
        return
    if made != shown:
        _limits_plan.show(made, there)
    to_do = made.count(*_limits_plan.TO_DO)
    done = f"Applied {made.file}: {_limits_plan.summary(made, done=True)}."
    _errors.write(done if to_do else _limits_plan.nothing(made))


@command(app, _PANEL)
def export(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="PATH", dir_okay=False, show_default=False, help="Write there instead of printing."
        ),
    ] = None,
    syntax: Annotated[
        str | None,
        typer.Option(
            "--format", metavar="toml|yaml", show_default=False, help="How to write. Default: by --out, else TOML."
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of such a file instead, for editors.")
    ] = False,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Write all limits as a file that plan and apply read.

    Example: pglimits export --out limits.toml

    Example: pglimits export --schema --out limits.schema.json
    """
    from pglimits._definition import definition

    from . import _limits_file as files

    written = "The JSON Schema"
    if schema:
        text = _output.as_json(files.schema()) + "\n"
    else:
        path = "-" if out is None else str(out)
        chosen = None if output is Format.json else files.syntax_of(path, _syntax(syntax))
        with _client.limiter(dsn, _rights.READER) as limiter:
            limits = {limit.name: definition(limit).model_dump(exclude_defaults=True) for limit in limiter.list()}
        written = _output.count(len(limits), "limit")
        text = files.written(limits, chosen) if chosen else _output.as_json({"limits": limits}) + "\n"
    if out is None:
        _errors.write(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
        _errors.write(f"Wrote {written[0].lower()}{written[1:]} to {out}.", err=True)


def _text(file: str) -> str:
    from . import _trees

    if not file:
        raise _errors.fail("FILE is empty: name a file, or - for standard input")
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return _trees.decoded(content)
    except _trees.Unreadable as error:
        raise _refused(file, error.faults) from None


def _saved(file: str, text: str) -> Plan | None:
    from pglimits.errors import InvalidArgument

    from . import _limits_plan

    try:
        return _limits_plan.saved(text)
    except InvalidArgument as error:
        raise _errors.fail(f"{_called(file)}: {error}") from None


def _syntax(given: str | None) -> Syntax | None:
    from pglimits.errors import InvalidArgument

    from . import _limits_file as files

    if given is None or given.lower() in set(files.Syntax):
        return None if given is None else files.Syntax(given.lower())
    raise InvalidArgument(f"--format must be 'toml' or 'yaml', not {given!r}")


def _wanted(limiter: Limiter, file: str, text: str, syntax: Syntax) -> dict[str, Wanted]:
    from . import _limits_file as files
    from . import _trees

    try:
        return files.read(text, syntax, limiter._limit_faults)
    except _trees.Unreadable as error:
        raise _refused(file, error.faults) from None


def _check_saved(limiter: Limiter, file: str, made: Plan) -> None:
    """A saved plan may have been changed by hand."""
    asked = [{"name": step["name"], **(step["new"] or {})} for step in made.plain()["limits"]]
    for nth, _, said in limiter._limit_faults(json.dumps(asked)):
        raise _errors.fail(f"{_called(file)}: limit {asked[nth - 1]['name']!r}: {said}")


def _refused(file: str, faults: Sequence[Any]) -> typer.Exit:
    """Say everything that is wrong with a file."""
    for fault in faults:
        _errors.say("Error", _output.one_line(f"{_called(file)}:{fault.at.line}:{fault.at.column}: {fault.message}"))
    return typer.Exit(_errors.ERROR)


def _called(file: str) -> str:
    return "stdin" if file == "-" else file


def _question(names: Sequence[str], there: Sequence[Limit]) -> str:
    from . import _limits_plan

    found = {limit.name: limit for limit in there}
    shown = [
        f"{name!r} ({_limits_plan.in_use(found[name])})" if name in found else repr(name) for name in names[:5]
    ] + ([f"{len(names) - 5:,} more"] if names[5:] else [])
    return f"Delete {_output.count(len(names), 'limit')}: {', '.join(shown)}?"
