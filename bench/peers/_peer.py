"""What a peer is to the benchmark."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from .._server import Server, Site


@dataclass(frozen=True, slots=True)
class Quota:
    """How much a limit lets in: so many slots, which for a rate limit come back within so many seconds."""

    slots: int
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        """0 for a concurrency limit."""
        return self.slots / self.seconds if self.seconds else 0.0

    def task(self) -> dict[str, Any]:
        """For a worker."""
        return {"slots": self.slots, "seconds": self.seconds, "rate": self.seconds > 0}


@dataclass(frozen=True, slots=True)
class Opened:
    """A peer that is ready to be called.

    Attributes:
        task: what its workers need to know: its subject and its flavour, threads or tasks. A name and a quota come on
            top.
        variant: what it is called in the table, beside its name; empty where there is only one.
        environment: variables that its workers need.
    """

    task: Mapping[str, Any]
    variant: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


class Open(Protocol):
    """Starts what a peer needs, in as many variants as it is measured in."""

    def __call__(self, server: Server, site: Site) -> AbstractContextManager[Sequence[Opened]]: ...


@dataclass(frozen=True, slots=True)
class Peer:
    """Something that others use.

    Attributes:
        name: of its row.
        what: it is.
        packages: of Python, by the name to import, with the name to install.
        program: that has to be on the PATH.
        install: the line that makes it available.
        room: a quota that lets all in.
        holds: whether it hands slots out that are given back; else it only counts calls.
        open: starts what it needs.
        settle: seconds after which whoever asked is waiting for certain.
        extension: of PostgreSQL that it needs. Where the server under test has none, both run on another one that does.
        database: whether it needs one of its own.
    """

    name: str
    what: str
    packages: Mapping[str, str]
    install: str
    room: Quota
    holds: bool
    open: Open
    program: str = ""
    settle: float = 0.3
    extension: str = ""
    database: bool = False

    def missing(self) -> str | None:
        """What is missing, and how to get it; None if it can take part."""
        gone = [name for module, name in self.packages.items() if importlib.util.find_spec(module) is None]
        if self.program and shutil.which(self.program) is None:
            gone.append(self.program)
        return f"no {', '.join(gone)}: {self.install}" if gone else None

    def versions(self) -> dict[str, str]:
        """Of its packages and its program."""
        found = {}
        for name in self.packages.values():
            with contextlib.suppress(PackageNotFoundError):
                found[name] = version(name)
        if self.program:
            said = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=False).stdout
            number = re.search(r"\d+(\.\d+)+", said)
            found[self.program] = number[0] if number else "unknown"
        return found
