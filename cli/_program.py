"""Finds the program that a command names, and what keeps it from running, before a slot is waited for."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from . import _errors


def find(name: str) -> str:
    """The path of a program, looked for as a shell does: along PATH, unless the name has a slash.

    Raises:
        typer.Exit: 127 if there is none, or no interpreter that its first line names; 126 if it cannot be executed.
    """
    # A folder that may not be searched has nothing, as for a shell.
    searched = [folder for folder in os.get_exec_path() if name and os.access(folder or ".", os.X_OK)]
    places = [name] if "/" in name else [str(Path(folder, name)) for folder in searched]
    problem = ""
    for place in places:
        path = Path(place)
        why = _why_not(path)
        if why is None:
            missing = _missing_interpreter(path)
            if missing is not None:
                raise _errors.fail(f"{name}: its interpreter {missing} is not there", _errors.NOT_FOUND)
            return place if "/" in place else f"./{place}"
        problem = problem or why
    if problem:
        raise _errors.fail(f"{name}: {problem}", _errors.NOT_EXECUTABLE)
    raise _errors.fail(f"{name}: command not found", _errors.NOT_FOUND)


def _why_not(path: Path) -> str | None:
    """What keeps a path from being executed: empty if nothing is there, None if it can be."""
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        return f"cannot be executed: {error.strerror}"
    except (OSError, ValueError):
        return ""
    if stat.S_ISDIR(mode):
        return "cannot be executed: it is a directory"
    return None if os.access(path, os.X_OK) else "cannot be executed: permission denied"


def _missing_interpreter(path: Path) -> str | None:
    """The interpreter that the first line of a script names, if it is not there."""
    try:
        with path.open("rb") as file:
            first, *_ = file.read(256).split(b"\n", 1)
    except OSError:  # it may be executed, but not read
        return None
    words = first[2:].split() if first.startswith(b"#!") else []
    if not words or os.path.lexists(words[0]):
        return None
    return os.fsdecode(words[0])
