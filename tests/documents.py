"""The blocks of code of the README and of docs/, and a shell in which those for a shell run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stand_ins import STAND_INS

ROOT = Path(__file__).resolve().parent.parent
GENERATED = "docs/reference/"
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("[!.]*.md")))
"""Every page, by its path in the repository."""

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})([^\n]*)\n(.*?)^\1\2$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """``prints``: what the block of text right after it has, or None. ``section``: the heading above it."""

    page: str
    section: str
    language: str
    code: str
    prints: str | None
    line: int


@cache
def every_block(page: str) -> tuple[Block, ...]:
    """All blocks of a page, in order. A block of text that says what the block before it prints is not one of them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found: list[Block] = []
    end = -1
    for match in _FENCE.finditer(text):
        _, _, info, code = match.groups()
        language = info.split()[0] if info.strip() else ""
        between = text[end : match.start()] if end >= 0 else "-"
        if language == "text" and found and not between.strip() and found[-1].prints is None:
            last = found.pop()
            found.append(Block(last.page, last.section, last.language, last.code, code, last.line))
        else:
            above = re.findall(r"^#+ (.+)$", _FENCE.sub("", text[: match.start()]), re.MULTILINE)
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, above[-1] if above else "", language, code, None, line))
        end = match.end()
    return tuple(found)


def blocks(page: str, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order."""
    return [block for block in every_block(page) if block.language in languages]


def around_blocks(page: str) -> str:
    """The text of a page without its blocks."""
    return _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))


def environment(dsn: str) -> dict[str, str]:
    """Of a program that finds pglimits, and the database."""
    folder = str(Path(sys.executable).parent)
    return {**os.environ, "PGLIMITS_DSN": dsn, "PATH": f"{folder}:{os.environ['PATH']}"}


def shell(code: str, known: dict[str, str], folder: Path, *, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """Run a session of a shell in a folder. Stand-ins take the place of what would install, or would not end."""
    stands = folder / ".stand-ins"
    if not stands.exists():
        stands.mkdir()
        for name, (instead_of, really) in STAND_INS.items():
            stand = stands / name
            here = f"{sys.executable} {ROOT}/tests/stand_ins.py {name}"
            stand.write_text(
                f'#!/bin/sh\ncase "$1 $2" in\n  {instead_of}) exec {here} "$@" ;;\n'
                f'  *) exec {sys.executable} {really} "$@" ;;\nesac\n'
            )
            stand.chmod(0o755)
    known = {**known, "PATH": f"{stands}:{known['PATH']}", "PGLIMITS_STAND_INS": str(stands)}
    return subprocess.run(
        ["bash", "-euc", code], cwd=folder, env=known, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False, timeout=timeout,
    )  # fmt: skip
