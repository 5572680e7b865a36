"""What the words of a command line mean.

Since version 0.29 Typer has pydantic turn words into values. Loading pydantic takes longer than most commands do, so
the few types that the commands use are read here. An older Typer reads them by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin
from uuid import UUID

import typer

Reader = Callable[[Any], Any]


def lighten(parameter: Any) -> None:
    """Have an option or argument read here, if it is of a type that is known here, and shown plainly in the help."""
    descriptor = getattr(parameter, "type_descriptor", None)
    if descriptor is None or not hasattr(parameter, "get_runtime_param"):
        return
    of = descriptor.annotation
    is_list = get_origin(of) is list
    is_argument = parameter.param_type_name == "argument"
    if of is bool or is_argument:
        parameter.display_type_rich = lambda ctx: None  # a flag takes no value, and an argument has a name already
    if is_argument:
        name = f"{parameter.metavar}{'...' if is_list else ''}"
        parameter.get_usage_pieces = lambda ctx: [name if parameter.required else f"[{name}]"]
    read = _reader(get_args(of)[0] if is_list else of, descriptor.parameter_info)
    if read is not None:
        light = _Light(read, is_list)
        parameter.get_runtime_param = lambda: light


class _Light:
    """Stands in for what Typer would make of pydantic."""

    def __init__(self, read: Reader, is_list: bool) -> None:
        self._read = read
        self._is_list = is_list

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Turn what was given, or the default, into a value."""
        if value is None:
            return () if self._is_list else None
        try:
            return [self._read(each) for each in value] if self._is_list else self._read(value)
        except ValueError as error:
            raise typer.BadParameter(str(error), ctx=ctx, param=param) from None


def _reader(of: Any, facts: Any) -> Reader | None:
    """What reads a word as a value of a type; None for a type that is not known here."""
    if of is str:
        return _text
    if of is bool:
        return lambda given: given if isinstance(given, bool) else None
    if of is int or of is float:
        return lambda word: _number(of, word, facts.min, facts.max)
    if of is UUID:
        return _uuid
    if of is Path:
        return _path
    if isinstance(of, type) and issubclass(of, Enum):
        return lambda word: _choice(of, word)
    return None


def _text(word: Any) -> Any:
    if isinstance(word, str) and any("\ud800" <= character <= "\udfff" for character in word):
        encoding = sys.getfilesystemencoding()
        raise ValueError(f"{word!r} is no text in the encoding of this terminal, which is {encoding} (LC_ALL, LANG)")
    return word


def _number(of: type[int] | type[float], word: Any, least: float | None, most: float | None) -> Any:
    try:
        value = of(word)
    except (ValueError, OverflowError):
        raise ValueError(f"{word!r} is not a {'whole ' if of is int else ''}number") from None
    if (least is not None and not value >= least) or (most is not None and not value <= most):
        low = "" if least is None else f"at least {least:g}"
        high = "" if most is None else f"at most {int(most) if of is int else most}"
        raise ValueError(f"{word} is out of range: it must be {' and '.join(filter(None, (low, high)))}")
    return value


def _uuid(word: Any) -> UUID:
    if isinstance(word, UUID):
        return word
    try:
        return UUID(word)
    except ValueError:
        raise ValueError(f"{word!r} is not a lease's id, which is a UUID") from None


def _path(word: Any) -> Path:
    if not str(word).strip():
        raise ValueError("it is empty: name a place, or leave the option out")
    return Path(word)


def _choice(of: type[Enum], word: Any) -> Enum:
    if isinstance(word, of):
        return word
    for member in of:
        if str(member.value) == str(word).lower():
            return member
    raise ValueError(f"{word!r} is not one of {', '.join(repr(str(member.value)) for member in of)}")
