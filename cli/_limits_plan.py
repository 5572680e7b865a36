"""A plan: what would have to be done for limits to be as a file has them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pglimits._definition import Definition, Model, Storable, definition, said
from pglimits.errors import InvalidArgument
from pglimits.models import Limit

from . import _errors, _output
from ._limits_file import Wanted

if TYPE_CHECKING:
    from rich.text import Text


class Action(StrEnum):
    """What is to be done with a limit."""

    create = "create"
    update = "update"
    delete = "delete"
    keep = "keep"
    none = "none"


TO_DO = (Action.create, Action.update, Action.delete)
_SIGNS = {Action.create: ("+", "green"), Action.update: ("~", "yellow"), Action.delete: ("-", "red")}
_TO_BE = {Action.create: "to create", Action.update: "to change", Action.delete: "to delete"}
_DONE = {Action.create: "created", Action.update: "changed", Action.delete: "deleted"}


class Step(Model):
    """One limit: as the plan found it, and as it is to be."""

    name: Storable
    action: Action
    old: Definition | None
    new: Definition | None

    @model_validator(mode="after")
    def _fits(self) -> Step:
        if (self.old is None) is not (self.action is Action.create) or (self.new is None) is not (
            self.action is Action.delete
        ):
            raise PydanticCustomError("fits", "has 'old' and 'new' that do not fit to its action")
        return self


class Plan(Model):
    """What is to be done, by name. ``file``: out of which it was made."""

    model_config = ConfigDict(extra="ignore")

    pglimits_plan: Literal[1] = 1
    file: Storable
    prune: bool
    limits: tuple[Step, ...]

    @model_validator(mode="after")
    def _names_each_once(self) -> Plan:
        if len({step.name for step in self.limits}) < len(self.limits):
            raise PydanticCustomError("twice", "names a limit twice")
        return self

    def count(self, *actions: Action) -> int:
        """How many steps are of such a kind."""
        return sum(step.action in actions for step in self.limits)

    @property
    def deleted(self) -> list[str]:
        """The limits that it deletes."""
        return [step.name for step in self.limits if step.action is Action.delete]

    def plain(self) -> dict[str, Any]:
        """As JSON has it: what `plan --out` saves and the database applies."""
        kinds = Counter(step.action for step in self.limits)
        return {**self.model_dump(mode="json"), "summary": {str(action): kinds[action] for action in Action}}


def plan(file: str, wanted: Mapping[str, Wanted], there: Iterable[Limit], *, prune: bool) -> Plan:
    """What has to be done for the limits that are there to be as wanted."""
    found = {limit.name: definition(limit) for limit in there}
    steps = {name: _step(name, each, found.get(name)) for name, each in wanted.items()}
    if prune:
        steps |= {
            name: Step(name=name, action=Action.delete, old=old, new=None)
            for name, old in found.items()
            if name not in steps
        }
    return Plan(file=file, prune=prune, limits=tuple(steps[name] for name in sorted(steps)))


def _step(name: str, wanted: Wanted, old: Definition | None) -> Step:
    new = wanted.definition
    if old is None:
        action = Action.create
    elif old == new:
        action = Action.none
    elif wanted.on_conflict == "create-only":
        action = Action.keep
    else:
        action = Action.update
    return Step(name=name, action=action, old=old, new=new)


def saved(text: str) -> Plan | None:
    """The plan that `plan --out` saved; None for a text that is none. Raises InvalidArgument if it is damaged."""
    if not (text.lstrip().startswith("{") and '"pglimits_plan"' in text):
        return None
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise InvalidArgument(f"it is no plan as this pglimits saves it: {where} {said(first)}") from None


# For people.


def lines(made: Plan, there: Iterable[Limit]) -> list[Text]:
    """What a plan would do, a line for each thing. ``there``: the limits, for how they are in use."""
    found = {limit.name: limit for limit in there}
    shown: list[Text] = []
    for step in made.limits:
        if step.action in TO_DO:
            sign, style = _SIGNS[step.action]
            shown.append(_output.text(f"{sign} {step.name!r}{_beside(step, found.get(step.name))}", style))
        if step.action is Action.update:
            assert step.old is not None and step.new is not None
            shown += [_output.text(f"    {change}") for change in _changes(step.old, step.new, " → ")]
        elif step.action is Action.keep:
            assert step.old is not None and step.new is not None
            differs = ", ".join(_changes(step.old, step.new, ", not "))
            shown.append(_output.text(f"= {step.name!r} stays as it is (create-only): {differs}", "dim"))
    return shown


def _beside(step: Step, limit: Limit | None) -> str:
    if step.action is Action.create:
        assert step.new is not None
        said = step.new.model_dump(exclude_defaults=True)
        return f"  {', '.join(f'{field}: {_value(value)}' for field, value in said.items())}"
    if step.action is Action.delete and limit is not None:
        return f"  {in_use(limit)}"
    return ""


def in_use(limit: Limit) -> str:
    """How a limit is in use."""
    return f"{_output.count(limit.held, 'slot')} held, {_output.number(limit.waiting)} waiting"


def _changes(old: Definition, new: Definition, between: str) -> list[str]:
    return [
        f"{field}: {_value(before)}{between}{_value(after)}"
        for (field, before), (_, after) in zip(old, new, strict=True)
        if before != after
    ]


def _value(value: Any) -> str:
    """As the file would have it."""
    if value is None:
        return "none"
    if isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)


def summary(made: Plan, *, done: bool) -> str:
    """How much there is to do, or was done."""
    words = _DONE if done else _TO_BE
    parts = [f"{made.count(action):,} {words[action]}" for action in TO_DO if made.count(action)]
    parts += [f"{made.count(Action.keep):,} kept"] if made.count(Action.keep) else []
    parts += [f"{made.count(Action.none):,} unchanged"] if made.count(Action.none) else []
    return ", ".join(parts)


def show(made: Plan, there: Iterable[Limit]) -> None:
    """Print what a plan would do."""
    said = lines(made, there)
    if said:
        _output.render(*said, _output.text(""))


def show_others(made: Plan, there: Iterable[Limit], what: str) -> None:
    """Say which limits a plan does not name. ``what``: what that means for them."""
    named = {step.name for step in made.limits}
    others = [limit.name for limit in there if limit.name not in named]
    if others:
        _errors.write(f"{what}: {some(others)}.", err=True)


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = [f"{len(names) - 5:,} more"] if names[5:] else []
    return " and ".join([", ".join(repr(name) for name in names[:5]), *more])


def nothing(made: Plan) -> str:
    """What to say of a plan that is empty."""
    said = summary(made, done=False)
    return f"Nothing to do: {said}." if said else "Nothing to do."
