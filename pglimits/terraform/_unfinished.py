"""Limits that Terraform asked for and may not have heard of: it was killed before it wrote them into its state.

Invariant: whoever asks for a limit that there is gets an error, unless it was made for the very same folder of
Terraform by a run that ended before it could know. Then the limit is taken over, so that the next apply completes.

A note in Terraform's data folder is written before a limit is created. It is taken away once the limit was seen in a
state, or the run has ended in peace.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

from .._definition import Definition, definition
from ..models import Limit
from ._schema import moment

_TERRAFORM = os.getppid()
"""The Terraform that started this process. When it is killed, another becomes the parent."""


@dataclass(frozen=True, slots=True)
class Left:
    """A limit that a killed run wanted, and when it was created, if it lived to see that."""

    wanted: Definition
    created: str | None

    def is_it(self, limit: Limit) -> bool:
        """Whether that became this limit."""
        return self.wanted == definition(limit) if self.created is None else self.created == moment(limit.created_at)


class Unfinished:
    """The notes of a database, in the folder that Terraform runs in."""

    def __init__(self, conninfo: str) -> None:
        given = conninfo_to_dict(conninfo)
        self._database = [given.get(name) for name in ("host", "hostaddr", "port", "dbname", "user", "service")]
        self._folder = Path(os.environ.get("TF_DATA_DIR") or ".terraform").absolute() / "pglimits"
        self._mine: set[str] = set()

    def begin(self, name: str, wanted: Definition) -> None:
        """A limit is about to be created."""
        self._write(name, {"definition": asdict(wanted), "terraform": _TERRAFORM})
        self._mine.add(name)

    def made(self, limit: Limit) -> None:
        """It was created, and Terraform will be told."""
        note = {"definition": asdict(definition(limit)), "created": moment(limit.created_at), "terraform": _TERRAFORM}
        self._write(limit.name, note)
        self._mine.add(limit.name)

    def left(self, name: str) -> Left | None:
        """What a run that was killed has left of the limit that it wanted."""
        if name in self._mine:
            return None
        try:
            note = json.loads(self._path(name).read_text(encoding="utf-8"))
            terraform, created = int(note["terraform"]), note.get("created")
            if terraform != _TERRAFORM and _is_alive(terraform):
                return None
            return Left(Definition(**note["definition"]), created)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def end(self, name: str) -> None:
        """Terraform knows of it, or it was not created."""
        self._mine.discard(name)
        with contextlib.suppress(OSError):
            self._path(name).unlink(missing_ok=True)

    def leave(self, name: str) -> None:
        """It may have been created, and Terraform will never know."""
        self._mine.discard(name)

    def end_all(self) -> None:
        """Terraform has heard all answers of this run."""
        for name in list(self._mine):
            self.end(name)
        with contextlib.suppress(OSError):  # not if there is something in them
            self._folder.rmdir()
            self._folder.parent.rmdir()

    def _write(self, name: str, note: dict[str, object]) -> None:
        # Where there is no writing, as in a read-only container, an error says that the limit has to be imported.
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._path(name)
            new = path.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(note), encoding="utf-8")
            new.replace(path)

    def _path(self, name: str) -> Path:
        what = json.dumps([*self._database, name])
        return self._folder / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.json"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    try:  # one that nobody has waited for is dead too
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True
