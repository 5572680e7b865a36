"""What somebody decides about a limit: one model for files of limits, saved plans, what Prefect has, and Terraform.

What only the database knows (which names there may be, the lowest rate) it says itself: `Limiter._limit_faults`.
It needs pydantic, which the extras `files` and `terraform` bring along.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from .models import Limit

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def _checked(text: str) -> str:
    if re.search("[\x00\ud800-\udfff]", text):
        raise PydanticCustomError("storable", "must be Unicode without the character U+0000")
    return text


Storable = Annotated[str, AfterValidator(_checked)]
"""What PostgreSQL can keep."""

_Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Model(BaseModel):
    """Values that are what they are said to be: nothing is converted, nothing else may be there."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Definition(Model):
    """What somebody has decided about a limit."""

    limit: Annotated[_Count, Field(description="How many slots there are. 0 admits nobody.")]
    slot_decay_per_second: Annotated[
        float,
        Field(
            ge=0,
            le=1e9,
            allow_inf_nan=False,
            description="Slots that come back each second: makes it a rate limit. 0, the default: a concurrency limit.",
        ),
    ] = 0.0
    active: Annotated[bool, Field(description="false: it is not enforced. Default: true.")] = True
    max_waiters: Annotated[_Count | None, Field(description="The longest line, for each key. Left out: no bound.")] = (
        None
    )
    description: Annotated[
        Annotated[str, Field(max_length=2000), AfterValidator(_checked)] | None,
        AfterValidator(lambda text: text or None),
        Field(description="What it is for."),
    ] = None


class Named(Definition):
    """The same, and the name of the limit."""

    name: Storable


def faults_of(fields: Mapping[str, object]) -> dict[str, str]:
    """What is wrong with the fields of a limit, its name among them, by field."""
    try:
        Named.model_validate(fields)
    except ValidationError as error:
        wrong = {str(each["loc"][0]): said(each) for each in error.errors()}
        return {field: f"{field} {fault}" for field, fault in wrong.items()}
    return {}


def definition(limit: Limit) -> Definition:
    """What was decided about a limit that is there."""
    return Definition(**{field: getattr(limit, field) for field in Definition.model_fields})


_SAID = {
    "missing": "is missing",
    "extra_forbidden": "is unknown",
    "int_type": "must be a whole number, not {value}",
    "float_type": "must be a number, not {value}",
    "finite_number": "must be a number, not {value}",
    "bool_type": "must be true or false, not {value}",
    "string_type": "must be a string, not {value}",
    "string_too_long": "must have at most {max_length} characters",
    "greater_than_equal": "must be at least {ge:.10g}, not {value}",
    "less_than_equal": "must be at most {le:.10g}, not {value}",
    "json_invalid": "is no JSON: {error}",
    "enum": "must be {expected}, not {value}",
    "literal_error": "must be {expected}, not {value}",
}


def said(error: ErrorDetails) -> str:
    """What is wrong with a value, in words that come after the name of its field."""
    value = error["input"]
    try:
        shown = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    except ValueError:  # of Python: a number of more digits than it writes
        shown = "one of so many digits"
    shown = shown if len(shown) < 300 else f"{shown[:280]}…"
    plainly = _SAID.get(error["type"])
    if plainly is None:
        return error["msg"].replace("Input should", "must")
    return plainly.format(value=shown, **error.get("ctx", {}))
