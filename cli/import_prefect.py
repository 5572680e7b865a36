"""import prefect: take over the global concurrency limits of a Prefect."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated

import typer

from . import _client, _errors, _output, _rights
from ._commands import Group, command
from ._options import Dsn, Format, Output, Yes
from .files import TO_DO, PlanCommand

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pglimits import Limiter
    from pglimits._definition import Definition
    from pglimits.models import Limit

    from ._limits_file import Wanted
    from ._limits_plan import Plan
    from ._prefect import Found

app = typer.Typer(
    name="import",
    help="Take over the limits of something else.",
    no_args_is_help=True,
    add_completion=False,
    cls=Group,
)


@app.callback()
def _group() -> None:
    """One command alone would not be a group."""


@command(app, cls=PlanCommand)
def prefect(
    api_url: Annotated[
        str | None,
        typer.Option("--api-url", metavar="URL", show_default=False, help="Prefect's API. Default: $PREFECT_API_URL."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            show_default=False,
            help="Of the API. Default: $PREFECT_API_AUTH_STRING, else $PREFECT_API_KEY.",
        ),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            "--database",
            metavar="URL|FILE",
            show_default=False,
            help="Read Prefect's database instead of asking its API.",
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what would be done, and change nothing.")] = False,
    create_only: Annotated[
        bool, typer.Option("--create-only", help="Leave limits alone that are here already.")
    ] = False,
    leave_out: Annotated[bool, typer.Option("--leave-out", help="Leave out what pglimits cannot take over.")] = False,
    yes: Yes = False,
    dsn: Dsn = None,
    output: Output = Format.table,
) -> None:
    """Take over the global concurrency limits of a Prefect, all in one transaction.

    Name, limit, slot_decay_per_second and active are taken over. Slots that are held in Prefect are not.

    With --plan it exits with 0 if there is nothing to do, with 2 if there is, and with 1 on an error.

    Example: pglimits import prefect --api-url http://127.0.0.1:4200/api --plan

    Example: pglimits import prefect --database ~/.prefect/prefect.db
    """
    from . import _limits_plan

    found = _read(api_url, api_key, database)
    with _client.limiter(dsn, _rights.READER if plan else _rights.ADMIN) as limiter:
        good, faults = _checked(limiter, found)
        if faults and not leave_out:
            raise _refused(faults)
        there = limiter.list()
        made = _limits_plan.plan(found.source, _wanted(good, there, create_only), there, prune=False)
        if output is not Format.json:
            _limits_plan.show(made, there)
            _limits_plan.show_others(made, there, "Not in Prefect, and left alone")
            _say_what_stays(found, faults)
        to_do = made.count(*_limits_plan.TO_DO)
        if to_do and not plan:
            _confirm(made, yes)
            limiter._apply(json.dumps(made.plain()))
    if output is Format.json:
        _output.show(output, {**made.plain(), **_facts(found, faults), "applied": not plan})
    elif not to_do:
        _errors.write(_limits_plan.nothing(made))
    elif plan:
        _errors.write(f"Plan: {_limits_plan.summary(made, done=False)}.")
    else:
        _errors.write(f"Imported from {made.file}: {_limits_plan.summary(made, done=True)}.")
    if to_do and plan:
        raise typer.Exit(TO_DO)


def _read(api_url: str | None, api_key: str | None, database: str | None) -> Found:
    if database is not None:
        if api_url is not None or api_key is not None:
            raise _errors.fail("--database does not go with --api-url and --api-key: read one or the other")
        from . import _prefect_database

        return _prefect_database.read(database)
    url = os.environ.get("PREFECT_API_URL") if api_url is None else api_url
    if not url:
        raise _errors.fail(
            "which Prefect? Give --api-url or set PREFECT_API_URL (prefect config view shows it), or give --database"
        )
    from . import _prefect_api

    return _prefect_api.read(url, api_key)


def _checked(limiter: Limiter, found: Found) -> tuple[dict[str, Definition], dict[str, str]]:
    """What can be taken over, and what is wrong with the rest, by name."""
    from pglimits._definition import Definition, faults_of

    good: dict[str, Definition] = {}
    faults: dict[str, str] = {}
    for each in found.limits:
        fields = {"limit": each.limit, "slot_decay_per_second": each.slot_decay_per_second, "active": each.active}
        wrong = faults_of({"name": each.name, **fields})
        if wrong:
            faults[str(each.name)] = next(iter(wrong.values()))
        else:
            good[each.name] = Definition(**fields)
    names = list(good)
    asked = [{"name": name, **of.model_dump()} for name, of in good.items()]
    for nth, _, said in limiter._limit_faults(json.dumps(asked)):
        faults.setdefault(names[nth - 1], said)
    return {name: of for name, of in good.items() if name not in faults}, faults


def _wanted(good: dict[str, Definition], there: Iterable[Limit], create_only: bool) -> dict[str, Wanted]:
    """The limits as they are to be: what Prefect does not know of them stays as it is here."""
    from ._limits_file import Wanted

    here = {limit.name: limit for limit in there}
    wanted: dict[str, Wanted] = {}
    for name, of in good.items():
        fields = of.model_dump()
        if name in here:
            fields |= {"max_waiters": here[name].max_waiters, "description": here[name].description}
        wanted[name] = Wanted(**fields, on_conflict="create-only" if create_only else "update")
    return wanted


def _refused(faults: dict[str, str]) -> typer.Exit:
    for name, fault in faults.items():
        _errors.say("Error", _output.one_line(f"{_short(name)} cannot be taken over: {fault}"))
    which = "these" if len(faults) > 1 else "this"
    return _errors.fail(
        f"nothing was changed. Take over the others with --leave-out, and create {which} as pglimits allows it:"
        " pglimits create NAME --limit N"
    )


def _say_what_stays(found: Found, faults: dict[str, str]) -> None:
    """Say on stderr what is in Prefect and does not come along."""
    for name, fault in faults.items():
        _errors.write(_output.one_line(f"Left out: {_short(name)}: {fault}."), err=True)
    kept = [_output.count(found.tags, "limit") + " of tags"] if found.tags else []
    kept += [_output.count(found.deployments, "limit") + " of deployments"] if found.deployments else []
    if kept:
        _errors.write(f"Not taken over, as Prefect itself enforces them: {' and '.join(kept)}.", err=True)
    held = _held(found)
    if held:
        from . import _limits_plan

        slots = _output.count(sum(held.values()), "slot")
        _errors.write(
            f"Held in Prefect now, and not taken over: {slots} of {_limits_plan.some(list(held))}."
            " Until they are released there, they do not count here.",
            err=True,
        )


def _held(found: Found) -> dict[str, int]:
    """How many slots are held of each limit. What is used of a rate limit decays by itself."""
    return {str(of.name): of.active_slots for of in found.limits if of.active_slots and not of.slot_decay_per_second}


def _facts(found: Found, faults: dict[str, str]) -> dict[str, object]:
    return {
        "left_out": [{"name": name, "fault": fault} for name, fault in faults.items()],
        "held_in_prefect": _held(found),
        "limits_of_tags": found.tags,
        "limits_of_deployments": found.deployments,
    }


def _confirm(made: Plan, yes: bool) -> None:
    from . import _limits_plan

    changed = [step.name for step in made.limits if step.action is _limits_plan.Action.update]
    if changed:
        limits = _output.count(len(changed), "limit")
        _output.confirm(
            f"Change {limits} that {'are' if changed[1:] else 'is'} here already: {_limits_plan.some(changed)}?",
            yes=yes,
        )


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:60]}…")
