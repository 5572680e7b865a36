"""What Terraform may be told of a limit, and how its values travel."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from tf.schema import Attribute, Schema
from tf.types import Bool, Number, String, TfType, Unknown

from .._definition import Definition
from ..models import Limit


class Numeral(Number):
    """A number as Python has it. Terraform's are decimal, so that 0.1 comes as text, and has to go back as text."""

    def encode(self, value: Any) -> Any:
        if isinstance(value, float):
            return int(value) if value.is_integer() else repr(value)
        return value

    def decode(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        exact = Decimal(value)
        return int(exact) if exact == exact.to_integral_value() else float(exact)


class Text(String):
    """A text that the database does not keep if it is empty."""

    def semantically_equal(self, a_decoded: Any, b_decoded: Any) -> bool:
        return (a_decoded or None) == (b_decoded or None)


class Objects(TfType):
    """A list of objects that have such attributes."""

    def __init__(self, attributes: list[Attribute]) -> None:
        self._types = {attribute.name: attribute.type for attribute in attributes}

    def encode(self, value: Any) -> Any:
        return [{name: kind.encode(each[name]) for name, kind in self._types.items()} for each in value]

    def decode(self, value: Any) -> Any:
        return value

    def tf_type(self) -> bytes:
        members = ",".join(f'"{name}":{kind.tf_type().decode()}' for name, kind in self._types.items())
        return f'["list",["object",{{{members}}}]]'.encode()


_KINDS = {
    "limit": Numeral(),
    "slot_decay_per_second": Numeral(),
    "active": Bool(),
    "max_waiters": Numeral(),
    "description": Text(),
}
_DECIDED = [
    (name, _KINDS[name], Unknown if field.is_required() else field.default, field.description)
    for name, field in Definition.model_fields.items()
]
"""The fields of a limit, with their defaults. Unknown: it has to be said. None: left out it is null."""
_NAME = "Its name: 1 to 200 characters, none of / % & > <."
_COMPUTED = [
    ("id", "Which limit it is, whatever its name."),
    ("created", "When it was created, as RFC 3339 has it."),
    ("updated", "When it was last changed, as RFC 3339 has it."),
]
_USED = [
    ("held", "Slots under live leases, all keys together."),
    ("waiting", "Requests that wait."),
    ("level", "Slots of a rate limit that are used and have not decayed yet."),
]

RESOURCE = Schema(
    version=0,
    description="A limit. Renaming it keeps its leases and those who wait.",
    attributes=[
        Attribute("name", String(), _NAME, required=True),
        *(
            Attribute(name, kind, said, required=True)
            if default is Unknown
            else Attribute(name, kind, said, optional=True)
            if default is None
            else Attribute(name, kind, said, optional=True, computed=True, default=default)
            for name, kind, default, said in _DECIDED
        ),
        *(Attribute(name, String(), said, computed=True) for name, said in _COMPUTED),
    ],
)

_FOUND = [
    *(Attribute(name, kind, said, computed=True) for name, kind, _, said in _DECIDED),
    *(Attribute(name, Numeral(), said, computed=True) for name, said in _USED),
    *(Attribute(name, String(), said, computed=True) for name, said in _COMPUTED),
]
ONE = Schema(
    description="A limit that there is, as it stands now.",
    attributes=[Attribute("name", String(), _NAME, required=True), *_FOUND],
)
ALL = Schema(
    description="All limits that there are, by name.",
    attributes=[
        Attribute(
            "limits", Objects([Attribute("name", String(), _NAME, computed=True), *_FOUND]), "Them.", computed=True
        )
    ],
)
PROVIDER = Schema(
    description="Limits in a PostgreSQL database that has pglimits installed.",
    attributes=[
        Attribute(
            "dsn",
            String(),
            "The database, as postgresql://user@host/database. Left out: $PGLIMITS_DSN, else $DATABASE_URL.",
            optional=True,
            sensitive=True,
        )
    ],
)


def moment(at: datetime) -> str:
    """A moment as RFC 3339 has it, in UTC."""
    return at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def facts(limit: Limit, limit_id: int) -> dict[str, Any]:
    """All that Terraform may be told of a limit."""
    return {
        "name": limit.name,
        "limit": limit.limit,
        "slot_decay_per_second": limit.slot_decay_per_second,
        "active": limit.active,
        "max_waiters": limit.max_waiters,
        "description": limit.description,
        "held": limit.held,
        "waiting": limit.waiting,
        "level": limit.level,
        "id": str(limit_id),
        "created": moment(limit.created_at),
        "updated": moment(limit.updated_at),
    }


def state(limit: Limit, limit_id: int) -> dict[str, Any]:
    """The same, but for how it is used: what the resource has."""
    return {name: value for name, value in facts(limit, limit_id).items() if name not in dict(_USED)}


def encoded(schema: Schema, values: dict[str, Any]) -> dict[str, Any]:
    """Values as they travel."""
    return {each.name: each.type.encode(values[each.name]) for each in schema.attributes}
