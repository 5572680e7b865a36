"""A file of limits: what it says, checked, each fault with its place. And the same written down.

Values are checked by what checks the arguments of `Limiter.create` and, for what only the database knows (names,
ranges, lengths), by the database's own functions.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pglimits import _arguments
from pglimits._definition import CHECKS, Definition
from pglimits.errors import InvalidArgument

from . import _errors, _trees
from ._trees import Fault, Node, Place, Unreadable


class Syntax(StrEnum):
    """How a file of limits is written."""

    toml = "toml"
    yaml = "yaml"


class OnConflict(StrEnum):
    """What becomes of a limit that is there, but not as the file has it."""

    update = "update"
    create_only = "create-only"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A limit as a file has it."""

    name: str
    definition: Definition
    on_conflict: OnConflict


def _on_conflict(argument: str, value: object) -> OnConflict:
    if not isinstance(value, str) or value not in set(OnConflict):
        raise InvalidArgument(f"{argument} must be {' or '.join(map(repr, map(str, OnConflict)))}, not {value!r}")
    return OnConflict(value)


_CHECKS = {**CHECKS, "on_conflict": _on_conflict}
"""What may be said of a limit, and what checks it."""

Ask = Callable[[str], Iterable[tuple[int, str, str]]]
"""What the database finds wrong with limits: see ``Limiter._limit_faults``."""


def syntax_of(path: str, given: Syntax | None) -> Syntax:
    """How a file is written, by its name unless it was said. Standard input is TOML."""
    if given is not None:
        return given
    suffix = Path(path).suffix.lower()
    if suffix == ".toml" or path == "-":
        return Syntax.toml
    if suffix in (".yaml", ".yml"):
        return Syntax.yaml
    raise _errors.fail(f"{path}: is it TOML or YAML? Its name does not end in .toml, .yaml or .yml: give --format")


def read(text: str, syntax: Syntax, ask: Ask) -> list[Wanted]:
    """The limits of a file. Raises Unreadable, with everything that is wrong with it."""
    root, faults = (_trees.toml(text), []) if syntax is Syntax.toml else _trees.yaml(text)
    limits = _tables(root, faults)
    wanted: list[Wanted] = []
    checked: list[dict[str, Any]] = []
    for name, node in limits.items():
        values, wrong = _values(name, node)
        faults += wrong
        checked.append(values)
        if not wrong and "limit" in values:
            wanted.append(_wanted(values))
    nodes = list(limits.items())
    for nth, field, said in ask(json.dumps(checked)):
        name, node = nodes[nth - 1]
        at = node.key_at if field == "name" else node.value[field].at
        faults.append(_fault(at, name, said))
    if faults:
        raise Unreadable(*sorted(faults, key=lambda fault: fault.at))
    return wanted


def _tables(root: Node, faults: list[Fault]) -> dict[str, Node]:
    """The limits of a document, each a table or not."""
    if not isinstance(root.value, dict):
        raise Unreadable(Fault(root.at, "it must have a table 'limits', and nothing else"))
    faults += [
        Fault(node.key_at, f"there is no field {name!r} here, only 'limits'{_meant(name, ['limits'])}")
        for name, node in root.value.items()
        if name != "limits"
    ]
    limits = root.value.get("limits")
    if limits is None:
        faults.append(Fault(root.at, "there is no table 'limits'; a file of no limits has an empty one"))
        return {}
    if not isinstance(limits.value, dict):
        faults.append(Fault(limits.at, "'limits' must be a table, with a table for each limit"))
        return {}
    return limits.value


def _values(name: str, node: Node) -> tuple[dict[str, Any], list[Fault]]:
    """What is said of a limit and can be right, its name among it, and what is wrong with the rest."""
    values: dict[str, Any] = {}
    if not isinstance(node.value, dict):
        return values, [_fault(node.at, name, "it must be a table with a 'limit', such as {limit = 10} or {limit: 10}")]
    faults: list[Fault] = []
    try:
        values["name"] = _arguments.text("name", name)
    except InvalidArgument as error:
        faults.append(_fault(node.key_at, name, str(error)))
    for field, item in node.value.items():
        if field not in _CHECKS:
            said = f"there is no field {field!r}{_meant(field, list(_CHECKS))}"
            faults.append(_fault(item.key_at, name, said))
            continue
        if item.value is _trees.Broken:
            continue
        if isinstance(item.value, (dict, list)):
            kind = "table" if isinstance(item.value, dict) else "list"
            faults.append(_fault(item.at, name, f"{field} must not be a {kind}"))
            continue
        try:
            values[field] = _CHECKS[field](field, item.value)
        except InvalidArgument as error:
            faults.append(_fault(item.at, name, _in_files_words(str(error))))
    if "limit" not in node.value:
        faults.append(_fault(node.key_at, name, "it has no 'limit', which says how many slots there are"))
    return values, faults


_IN_FILES = {"True": "true", "False": "false", "None": "null"}


def _in_files_words(said: str) -> str:
    short = said if len(said) < 300 else f"{said[:280]}…"
    short = short.replace("must be True or False", "must be true or false")
    return re.sub("not (True|False|None)$", lambda found: f"not {_IN_FILES[found[1]]}", short)


def _wanted(values: Mapping[str, Any]) -> Wanted:
    fields = dict(values)
    name, on_conflict = fields.pop("name"), fields.pop("on_conflict", OnConflict.update)
    return Wanted(name, Definition(**fields), on_conflict)


def _fault(at: Place, name: str, said: str) -> Fault:
    return Fault(at, f"limit {name!r}: {said}")


def _meant(name: str, known: Sequence[str]) -> str:
    """What somebody who wrote a wrong name may have meant."""
    close = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(known)}" if len(known) > 1 else ""


# Written down.


def written(limits: Iterable[tuple[str, Definition]], syntax: Syntax) -> str:
    """A file of limits. What is as it would be without a word is left out."""
    tables = [(name, said(of)) for name, of in limits]
    if syntax is Syntax.toml:
        if not tables:
            return "[limits]\n"
        return "\n".join(
            "".join(
                [f"[limits.{_toml_key(name)}]\n", *(f"{field} = {_scalar(value)}\n" for field, value in fields.items())]
            )
            for name, fields in tables
        )
    if not tables:
        return "limits: {}\n"
    return "limits:\n" + "".join(
        "".join([f"  {_yaml_key(name)}:\n", *(f"    {field}: {_scalar(value)}\n" for field, value in fields.items())])
        for name, fields in tables
    )


def said(of: Definition) -> dict[str, Any]:
    """The fields of a limit that have to be said."""
    usual = Definition(of.limit)
    fields = dataclasses.asdict(of)
    return {name: value for name, value in fields.items() if name == "limit" or value != getattr(usual, name)}


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def _quoted(text: str) -> str:
    """A string as both TOML and YAML read it: as JSON has it, with all escaped that one of them would not take."""
    odd = "[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]"
    return re.sub(odd, lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)


def _yaml_key(name: str) -> str:
    reserved = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name) and name.lower() not in reserved
    return name if plain else _quoted(name)


def schema() -> dict[str, Any]:
    """A JSON Schema of such a file, for editors."""
    limit = {
        "type": "object",
        "additionalProperties": False,
        "required": ["limit"],
        "properties": {
            "limit": {
                "type": "integer",
                "minimum": 0,
                "maximum": 2147483647,
                "description": "How many slots there are. 0 admits nobody.",
            },
            "slot_decay_per_second": {
                "type": "number",
                "minimum": 0,
                "maximum": 1e9,
                "default": 0,
                "description": "Slots that come back each second: makes it a rate limit. 0: a concurrency limit.",
            },
            "active": {"type": "boolean", "default": True, "description": "false: it is not enforced."},
            "max_waiters": {
                "type": ["integer", "null"],
                "minimum": 0,
                "maximum": 2147483647,
                "default": None,
                "description": "The longest line, for each key. Left out: no bound.",
            },
            "description": {
                "type": ["string", "null"],
                "maxLength": 2000,
                "default": None,
                "description": "What it is for.",
            },
            "on_conflict": {
                "enum": [str(each) for each in OnConflict],
                "default": "update",
                "description": "create-only: a limit that is there stays as it is, whatever the file says.",
            },
        },
    }
    name = {"minLength": 1, "maxLength": 200, "pattern": "^[^/%&><\\u0000-\\u001f\\u007f-\\u009f]*$"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Limits of pglimits",
        "type": "object",
        "additionalProperties": False,
        "required": ["limits"],
        "properties": {"limits": {"type": "object", "propertyNames": name, "additionalProperties": limit}},
    }
