"""What stands in a TOML or YAML document, and where: each value with its line and column.

TOML is read by tomllib, which knows no places, so a scan over the same text finds them. YAML comes with its own.
"""

from __future__ import annotations

import bisect
import re
import tomllib
from dataclasses import dataclass
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Line and column, from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Node:
    """A value. ``value``: of a table, its nodes by name. ``at``: of the value; ``key_at``: of its name."""

    value: Any
    at: Place
    key_at: Place

    def plain(self) -> Any:
        """The value without places."""
        return {name: node.plain() for name, node in self.value.items()} if isinstance(self.value, dict) else self.value


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, and where."""

    at: Place
    message: str


class Unreadable(Exception):
    """It is no document of that format."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__(*faults)
        self.faults = list(faults)


class Broken:
    """Stands for a value that could not be read, which its fault tells already."""


START = Place(1, 1)
_HUGE = re.compile(r"[\d_]{4300,}")
"""A number of so many digits Python does not read."""


def decoded(content: bytes) -> str:
    """Text out of UTF-8, with or without a byte order mark."""
    try:
        return re.sub("\r+\n", "\n", content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig", "replace")
        byte = content[error.start]
        raise Unreadable(
            Fault(_place(before, len(before)), f"the byte 0x{byte:02x} is not UTF-8: save the file as UTF-8")
        ) from None


def _place(text: str, at: int) -> Place:
    return _Lines(text).place(at)


# TOML.


def toml(text: str) -> Node:
    """The tree of a TOML document. Raises Unreadable."""
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise Unreadable(Fault(START, "it is nested too deeply")) from None
    except tomllib.TOMLDecodeError as error:
        raise Unreadable(_toml_fault(text, str(error))) from None
    except ValueError:  # of Python: a number has more digits than it reads
        huge = _HUGE.search(text)
        at = START if huge is None else _place(text, huge.start())
        raise Unreadable(Fault(at, "a number has too many digits")) from None
    scan = _Scan(text)
    scan.document()
    return _located(data, (), scan)


class _Lines:
    """Where the lines of a text begin."""

    def __init__(self, text: str) -> None:
        self._starts = [0, *(found.end() for found in re.finditer("\n", text))]

    def place(self, at: int) -> Place:
        line = bisect.bisect_right(self._starts, at)
        return Place(line, at - self._starts[line - 1] + 1)


def _toml_fault(text: str, said: str) -> Fault:
    """What tomllib says ends with where it is."""
    found = re.fullmatch(r"(?s)(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", said)
    if found is None:
        return Fault(START, said)
    message, line, column = found.groups()
    twice = re.fullmatch(r"Cannot declare \('limits', (.*)\) twice", message)
    if twice is not None:
        message = f"limit {twice[1].rstrip(',')} is there twice"
    at = _place(text, len(text)) if line is None else Place(int(line), int(column))
    return Fault(at, message[:1].lower() + message[1:])


def _located(value: Any, path: tuple[str, ...], scan: _Scan) -> Node:
    key = scan.keys.get(path, 0)
    if isinstance(value, dict):
        value = {name: _located(item, (*path, name), scan) for name, item in value.items()}
    return Node(value, scan.lines.place(scan.values.get(path, key)), scan.lines.place(key))


class _Scan:
    """Where the names and values of a TOML document stand. It has to be one that tomllib has read."""

    _BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
    _NAME = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")
    _STRING = re.compile(r'''"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*\'''', re.DOTALL)
    _OTHER = re.compile(r"[^,\]}\n#]+")

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = _Lines(text)
        self.keys: dict[tuple[str, ...], int] = {}
        self.values: dict[tuple[str, ...], int] = {}
        self._at = 0

    def document(self) -> None:
        table: tuple[str, ...] = ()
        while self._next():
            if self._next() == "[":
                brackets = 2 if self.text.startswith("[[", self._at) else 1
                self._at += brackets
                table = self._name(())
                self._at += brackets
            else:
                self._pair(table)

    def _next(self) -> str:
        """The next character that says something; none at the end."""
        self._at = self._end(self._BLANK)
        return self.text[self._at : self._at + 1]

    def _end(self, what: re.Pattern[str]) -> int:
        found = what.match(self.text, self._at)
        assert found is not None, (what.pattern, self._at)
        return found.end()

    def _name(self, path: tuple[str, ...]) -> tuple[str, ...]:
        """Read a dotted name, and what is behind it up to what says something."""
        while True:
            self._next()
            start, self._at = self._at, self._end(self._NAME)
            word = self.text[start : self._at]
            path = (*path, next(iter(tomllib.loads(f"{word}=0"))) if word[0] in "\"'" else word)
            self.keys.setdefault(path, start)
            if self._next() != ".":
                return path
            self._at += 1

    def _pair(self, table: tuple[str, ...]) -> None:
        path = self._name(table)
        self._at += 1  # the equals sign
        self._next()
        self.values.setdefault(path, self._at)
        self._value(path)

    def _value(self, path: tuple[str, ...]) -> None:
        first = self._next()
        if first in ("{", "["):
            self._at += 1
            while self._next() not in ("}", "]"):
                if first == "{":
                    self._pair(path)
                else:
                    self._value((*path, ""))
                if self._next() == ",":
                    self._at += 1
            self._at += 1
        else:
            self._at = self._end(self._STRING if first in ('"', "'") else self._OTHER)


# YAML.

_TAG = "tag:yaml.org,2002:"
_DEPTH = 3
"""How deep tables are in each other: the document, its limits, one of them."""


def yaml(text: str) -> tuple[Node, list[Fault]]:
    """The tree of a YAML document (YAML 1.2), and what is wrong with names and values in it.

    Raises Unreadable.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    reader = YAML(typ="safe", pure=True)
    reader.composer.warn_double_anchors = False
    try:
        root = reader.compose(text)
        if root is None:
            return Node({}, START, START), []
        tree = _Yaml(reader)
        return tree.node(root, root), tree.faults
    except RecursionError:
        raise Unreadable(Fault(START, "it is nested too deeply")) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = START if mark is None else Place(mark.line + 1, mark.column + 1)
        said = ", ".join(filter(None, (error.context, error.problem)))
        raise Unreadable(Fault(at, said)) from None
    except ReaderError as error:
        # Its position may lie before the text that it has kept; the character itself is in ours.
        character = error.character if isinstance(error.character, str) else chr(error.character)
        at = _place(text, max(text.find(character), 0))
        raise Unreadable(Fault(at, f"the character U+{ord(character):04X} is not allowed")) from None
    except YAMLError as error:
        raise Unreadable(Fault(START, str(error))) from None


class _Yaml:
    """Nodes out of those of ruamel.yaml."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.faults: list[Fault] = []

    def node(self, value: Any, key: Any, depth: int = 0) -> Node:
        is_nothing = value.id == "scalar" and not value.value  # its mark is behind what comes between
        return Node(self._value(value, depth), _mark(key if is_nothing else value), _mark(key))

    def _value(self, node: Any, depth: int) -> Any:
        """A value. What holds others where nothing may is read as empty: with anchors it can be endless."""
        if node.id == "mapping":
            return self._mapping(node, depth, {id(node)}) if depth < _DEPTH else {}
        if node.id == "sequence":
            return []
        from ruamel.yaml.error import MarkedYAMLError

        try:
            # JSON may write one character as two.
            node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
            return self._reader.constructor.construct_object(node)
        except UnicodeDecodeError:
            self.faults.append(Fault(_mark(node), "what \\u stands for is no character"))
        except (ValueError, LookupError):
            kind = node.tag.rpartition(":")[2]
            self.faults.append(Fault(_mark(node), f"it is no {kind}, or one of too many digits"))
        except MarkedYAMLError as error:
            self.faults.append(Fault(_mark(node), str(error.problem)))
        return Broken

    def _mapping(self, node: Any, depth: int, seen: set[int]) -> dict[str, Node]:
        """The entries of a mapping; those of what it merges (``<<: *other``), each once, come after its own."""
        found: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                for other in value.value if value.id == "sequence" else [value]:
                    if other.id != "mapping":
                        self.faults.append(Fault(_mark(value), "only tables can be merged"))
                    elif id(other) not in seen:
                        seen.add(id(other))
                        merged = {**self._mapping(other, depth, seen), **merged}
            elif key.tag != f"{_TAG}str":
                self.faults.append(Fault(_mark(key), _no_name(key)))
            elif (name := self._value(key, depth)) in found:
                before = found[name].key_at
                self.faults.append(Fault(_mark(key), f"{name!r} is there twice, first in line {before.line}"))
            elif name is not Broken:
                found[name] = self.node(value, key, depth + 1)
        return {**found, **{name: item for name, item in merged.items() if name not in found}}


def _no_name(key: Any) -> str:
    return f'a name must be a string: write "{key.value}"' if key.id == "scalar" else "a name must be a string"


def _mark(node: Any) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)
