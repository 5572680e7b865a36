"""Tables for people, JSON for programs: stdout has the result and nothing else."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TextIO
from uuid import UUID

import typer

from . import _errors
from ._options import Format

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from pglimits._words import count as count
    from pglimits._words import number as number
    from pglimits._words import rate as rate

_INVISIBLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What could steer a terminal or turn a line around: control characters but the line feed, and marks of direction. And
bytes of a path that are no text."""

_WIDE = 10_000  # into a file or a pipe every row is one line, however long, unless COLUMNS says otherwise


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is destroyed. Ends the command unless the answer is yes.

    Where nobody sits at a terminal who could be asked, only ``--yes`` is an answer.
    """
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise _errors.usage(f"{question} There is no terminal to ask on: give --yes to do it")
    _errors.write(f"{question} [y/N]: ", end="", err=True)
    try:
        answer = input()  # with a prompt of its own it could write to stdout, which has the result
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise typer.Abort


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show on a terminal's stderr that something is under way."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(what), spinner="dots" if is_unicode(sys.stderr) else "line"):
        yield


@contextlib.contextmanager
def progress(stream: TextIO) -> Iterator[Callable[[str], None]]:
    """Show on stdout or stderr what is under way: in place on a terminal, else a line each, at once."""
    if not stream.isatty():
        yield lambda what: _errors.write(what, err=stream is sys.stderr)
        return
    from rich.console import Console
    from rich.text import Text

    with Console(file=stream).status(Text("starting"), spinner="dots" if is_unicode(stream) else "line") as status:
        yield lambda what: status.update(Text(what))


def plain(value: Any) -> Any:
    """A value as JSON has it: timestamps in ISO 8601, durations in seconds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value) if isinstance(value, (UUID, os.PathLike)) else value


def as_json(value: Any, *, indent: int | None = 2) -> str:
    """A result as JSON."""
    return _visible(json.dumps(plain(value), indent=indent, ensure_ascii=not is_unicode(sys.stdout)))


def is_unicode(stream: TextIO | None) -> bool:
    """Whether a stream can print every character."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return codecs.lookup(encoding).name.startswith("utf")


def _visible(written: str) -> str:
    """The same with what could steer a terminal as JSON escapes it: a holder is anybody's to choose."""
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", written)


def show(output: Format, result: Any, *lines: str) -> None:
    """Print a result: as JSON, or as lines for people."""
    _errors.write(as_json(result) if output is Format.json else "\n".join(lines))


def _console() -> Console:
    from rich.console import Console

    wide = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _WIDE
    return Console(width=wide, highlight=False, emoji=False, markup=False, soft_wrap=False)


def is_wide() -> bool:
    """Whether a line holds a lease's id beside everything else; else that goes below."""
    return _console().width >= 120


def render(*parts: RenderableType) -> None:
    """Print tables and texts."""
    console = _console()
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    with console.capture() as capture:
        console.print(*parts, sep="\n")
    _errors.write("\n".join(line.rstrip() for line in capture.get().splitlines()))


def table(*columns: str, numbers: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """A table that folds what is too long and cuts nothing off.

    ``numbers`` stand to the right; they and what is ``whole`` never fold.
    """
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        right = column in numbers
        made.add_column(
            column,
            justify="right" if right else "left",
            no_wrap=column in whole or right,
            min_width=len(column),
            overflow="fold",
        )
    return made


def properties(pairs: Iterable[tuple[str, str | Text]]) -> Table:
    """A thing and what is known of it, a line each."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(name, value if not isinstance(value, str) else text(value))
    return made


def text(value: object, style: str = "") -> Text:
    """A cell that is shown as it is: a name like ``[red]`` is no markup."""
    from rich.text import Text

    return Text(_visible(str(value)), style=style)


def one_line(value: str) -> str:
    """A text that is printed as it is, but for what could steer a terminal or begin another line."""
    return _visible(value.replace("\n", "\\n"))


_EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(value: float, most: float, width: int) -> str:
    """A bar of blocks, as long as a value is of the greatest one."""
    eighths = round(min(max(value / most, 0.0), 1.0) * width * 8) if most else 0
    if value > 0:
        eighths = max(eighths, 1)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


_HEIGHTS = "▁▂▃▄▅▆▇█"


def sparkline(values: Iterable[float | None], most: float) -> str:
    """A character for each value; a gap where it is not known."""
    last = len(_HEIGHTS) - 1
    return "".join(
        " " if value is None else _HEIGHTS[min(max(math.ceil(value / most * 8) - 1, 0), last) if most else 0]
        for value in values
    )


def moment(at: datetime) -> str:
    """A timestamp as people here read it."""
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S %z}"


def short(value: float) -> str:
    """A number in five characters or so: ``1234``, ``12.3k``, ``4.5M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 10_000):
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}" if abs(value - round(value)) < 0.05 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """Seconds as people say them, short: ``4m58s``."""
    whole = max(round(seconds), 0)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size}{unit}" + (f"{rest}{smaller_unit}" if rest else "")
    return f"{whole}s"


def who(holder: Any) -> str:
    """A holder as one short line; nobody is a dash."""
    from pglimits import _words

    return "-" if holder is None else _words.who(holder).replace("\n", "\\n")


def __getattr__(name: str) -> Any:
    """What the wrapper has words for: a command that shows nothing starts sooner without it."""
    if name in ("count", "number", "rate"):
        from pglimits import _words

        return getattr(_words, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
