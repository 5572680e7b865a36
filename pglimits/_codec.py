"""How values travel: parameters as text, results in binary, whatever adapters an app has set for psycopg."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from psycopg.pq.abc import PGresult

Row = tuple[Any, ...]
Value = str | int | float | bool | UUID | None

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_float8 = struct.Struct("!d").unpack
_item = struct.Struct("!i").unpack_from


def encode(value: Value | Iterable[Value]) -> bytes | None:
    """A parameter, as text."""
    if value is None:
        return None
    if isinstance(value, bool):
        return b"t" if value else b"f"
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (int, float, UUID)):
        return str(value).encode()
    return array(value).encode()


def array(values: Iterable[Value]) -> str:
    """An array as PostgreSQL writes it."""
    quoted = [str(value).replace("\\", "\\\\").replace('"', '\\"') for value in values]
    return "{" + ",".join([f'"{text}"' for text in quoted]) + "}"


def ids(each: Iterable[UUID]) -> bytes:
    """An array of ids, as text."""
    return ("{" + ",".join([one.hex for one in each]) + "}").encode()


def rows(result: PGresult) -> list[Row]:
    """The rows of a result."""
    columns = range(result.nfields)
    loads = [_LOADS.get(result.ftype(column), _text) for column in columns]
    get = result.get_value
    return [
        tuple([None if (value := get(row, column)) is None else loads[column](value) for column in columns])
        for row in range(result.ntuples)
    ]


def _text(value: bytes) -> str:
    # A database in SQL_ASCII keeps whatever bytes it was given.
    return value.decode("utf-8", "replace")


def _integer(value: bytes) -> int:
    return int.from_bytes(value, "big", signed=True)


def _real(value: bytes) -> float:
    number: float = _float8(value)[0]
    return number


def _moment(value: bytes) -> datetime:
    return _EPOCH + timedelta(microseconds=int.from_bytes(value, "big", signed=True))


def _array(load: Callable[[bytes], Any], value: bytes) -> list[Any]:
    """An array of one dimension: its number of dimensions, a flag, the type; length and lower bound; the elements."""
    found: list[Any] = []
    at = 20
    while at < len(value):
        (length,) = _item(value, at)
        at += 4
        if length < 0:
            found.append(None)
        else:
            found.append(load(value[at : at + length]))
            at += length
    return found


_LOADS: dict[int, Callable[[bytes], Any]] = {
    16: lambda value: value != b"\0",
    20: _integer,
    23: _integer,
    701: _real,
    1184: _moment,
    2950: lambda value: UUID(bytes=value),
}
"""By the number of the type: bool, int8, int4, float8, timestamptz, uuid. All others are texts."""
_LOADS |= {
    1000: partial(_array, _LOADS[16]),
    1007: partial(_array, _integer),
    1009: partial(_array, _text),
    1016: partial(_array, _integer),
    1022: partial(_array, _real),
    2951: partial(_array, _LOADS[2950]),
}
