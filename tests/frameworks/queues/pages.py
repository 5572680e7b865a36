"""The examples of docs/task-queues.md, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "docs" / "task-queues.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def run(section: str, folder: Path, **environment: str) -> tuple[str, str]:
    """Save the programs of a section where it says, run its commands: what they print, and what the page says of it."""
    (text,) = re.findall(
        rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    blocks = BLOCK.findall(text)
    assert [language for language, _ in blocks] == ["py", "py", "bash", "text"]
    files = re.findall(r"(?:Save|And) this\s+as `(\w+\.py)`", text)
    for file, (_, code) in zip(files, blocks[:2], strict=True):
        (folder / file).write_text(code)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", blocks[2][1]], cwd=folder, env={**os.environ, "PATH": path, **environment},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    log = "".join(file.read_text() for file in folder.glob("*.log"))
    assert done.returncode in (0, 143), done.stderr + log
    assert done.stderr == "", log
    return done.stdout, blocks[3][1]
