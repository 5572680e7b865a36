"""A file of limits: what it says, checked, each fault with its place. And the same written down.

Values are checked by the model and, for what only the database knows, by the database's own functions.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from pglimits import _definition
from pglimits._definition import Definition, Model, Storable

from . import _errors, _trees
from ._trees import Fault, Node, Unreadable

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Syntax(StrEnum):
    """How a file of limits is written."""

    toml = "toml"
    yaml = "yaml"


class Wanted(Definition):
    """A limit as a file has it."""

    on_conflict: Annotated[
        Literal["update", "create-only"],
        Field(description="create-only: a limit that is there stays as it is, whatever the file says."),
    ] = "update"

    @property
    def definition(self) -> Definition:
        """What is to be decided about it."""
        return Definition(**self.model_dump(exclude={"on_conflict"}))


_NAMES = {"minLength": 1, "maxLength": 200, "pattern": "^[^/%&><\\u0000-\\u001f\\u007f-\\u009f]*$"}
"""What names there may be, for editors. Else the database is asked."""


class File(Model):
    """A file of limits."""

    model_config = ConfigDict(title="Limits of pglimits")

    limits: Annotated[dict[Storable, Wanted], Field(json_schema_extra={"propertyNames": _NAMES})]


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


def read(text: str, syntax: Syntax, ask: Ask) -> dict[str, Wanted]:
    """The limits of a file, by name. Raises Unreadable, with everything that is wrong with it."""
    root, faults = (_trees.toml(text), []) if syntax is Syntax.toml else _trees.yaml(text)
    plain = root.plain()
    wanted: dict[str, Wanted] = {}
    errors: list[ErrorDetails] = []
    try:
        wanted = File.model_validate(plain).limits
    except ValidationError as error:
        errors = error.errors()
    faults += [
        _fault(root, error)
        for error in errors
        if error["input"] is not _trees.Broken or error["type"] == "extra_forbidden"
    ]
    for name, field, said in _faults_by_database(plain, {error["loc"] for error in errors}, ask):
        limit = root.value["limits"].value[name]
        faults.append(Fault(limit.key_at if field == "name" else limit.value[field].at, f"limit {name!r}: {said}"))
    if faults:
        raise Unreadable(*sorted(set(faults), key=lambda fault: (fault.at, fault.message)))
    return wanted


def _faults_by_database(plain: Any, wrong: set[tuple[int | str, ...]], ask: Ask) -> list[tuple[str, str, str]]:
    """What the database finds wrong with what the model found right: limit, field, fault."""
    limits = {} if wrong & {(), ("limits",)} else plain["limits"]
    asked = [
        {"name": name, **{field: value for field, value in of.items() if ("limits", name, field) not in wrong}}
        for name, of in limits.items()
        if not wrong & {("limits", name), ("limits", name, _KEY)}
    ]
    return [(asked[nth - 1]["name"], field, said) for nth, field, said in ask(json.dumps(asked))]


_KEY = "[key]"
"""What pydantic says instead of a field if the name of a limit is wrong."""

_WRONG = {
    ("model_type", 0): "it must have a table 'limits', and nothing else",
    ("missing", 1): "there is no table 'limits'; a file of no limits has an empty one",
    ("dict_type", 1): "'limits' must be a table, with a table for each limit",
    ("model_type", 2): "it must be a table with a 'limit', such as {limit = 10} or {limit: 10}",
    ("missing", 3): "it has no 'limit', which says how many slots there are",
}
"""What is wrong with what a file is made of, by how deep in it that is."""


def _fault(root: Node, error: ErrorDetails) -> Fault:
    """What the model finds wrong, and where that is."""
    kind, path = error["type"], [str(step) for step in error["loc"]]
    depth, name = len(path), path[-1] if path else ""
    is_unknown = kind == "extra_forbidden"
    is_of_table = kind == "missing" or (name == _KEY and depth == 3 and not is_unknown)
    node = root
    for step in path[:-1] if is_of_table else path:
        node = node.value[step]
    if is_unknown:
        said = f"there is no field {name!r}{_meant(name, list((File if depth == 1 else Wanted).model_fields))}"
    else:
        said = _WRONG.get((kind, depth)) or f"{'name' if name == _KEY else name} {_definition.said(error)}"
    limit = f"limit {path[1]!r}: " if depth > 1 else ""
    return Fault(node.key_at if is_of_table or is_unknown else node.at, limit + said)


def _meant(name: str, known: Sequence[str]) -> str:
    """What somebody who wrote a wrong name may have meant."""
    close = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f", only {', '.join(known)}"


# Written down.


def written(limits: Mapping[str, Mapping[str, Any]], syntax: Syntax) -> str:
    """A file of limits. What is as it would be without a word is left out."""
    if not limits:
        return "[limits]\n" if syntax is Syntax.toml else "limits: {}\n"
    if syntax is Syntax.toml:
        return "\n".join(
            "".join(
                [f"[limits.{_toml_key(name)}]\n", *(f"{field} = {_scalar(value)}\n" for field, value in fields.items())]
            )
            for name, fields in limits.items()
        )
    return "limits:\n" + "".join(
        "".join([f"  {_yaml_key(name)}:\n", *(f"    {field}: {_scalar(value)}\n" for field, value in fields.items())])
        for name, fields in limits.items()
    )


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def _quoted(text: str) -> str:
    """A string as both TOML and YAML read it: as JSON has it. Escaped is also what could steer a terminal."""
    odd = "[\x7f-\xa0\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]"
    return re.sub(odd, lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)


def _yaml_key(name: str) -> str:
    reserved = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name) and name.lower() not in reserved
    return name if plain else _quoted(name)


def schema() -> dict[str, Any]:
    """A JSON Schema of such a file, for editors."""
    return {"$schema": "http://json-schema.org/draft-07/schema#", **File.model_json_schema()}
