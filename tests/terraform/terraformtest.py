"""What the tests of Terraform share: a folder of Terraform's, and the real program run in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

HEAD = 'terraform {\n  required_providers {\n    pglimits = { source = "pglimits/pglimits" }\n  }\n}\n'
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "terraform.md"


def blocks(language: str) -> list[tuple[str, str | None]]:
    """The examples of the page, each with what it prints if the page says so."""
    between = r"(?:(?!```|#)[^\n]*\n)*?"
    pattern = rf"^```{language}\n(.*?)^```\n(?:{between}```text\n(.*?)^```\n)?"
    found = re.findall(pattern, PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [(code, prints or None) for code, prints in found]


class Folder:
    """A folder with a configuration and a state."""

    def __init__(self, path: Path, binary: str, environment: dict[str, str]) -> None:
        self.path = path
        self.binary = binary
        self.environment = environment

    def copy(self, path: Path, **changed: str) -> Folder:
        """Another folder that is initialised as this one is."""
        shutil.copytree(self.path, path, symlinks=True)
        return Folder(path, self.binary, self.environment | changed)

    def write(self, configuration: str) -> None:
        """Have another configuration."""
        (self.path / "main.tf").write_text(HEAD + configuration, encoding="utf-8")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A command that goes on, in a process group of its own, as a terminal has it."""
        return subprocess.Popen(
            [self.binary, *arguments], cwd=self.path, env=self.environment, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def errors(self, *arguments: str) -> list[dict[str, Any]]:
        """What a command that fails finds wrong, as the program tells other programs."""
        said = [json.loads(line) for line in self._run(*arguments, "-json", code=1).splitlines() if line[:1] == "{"]
        found = [each["diagnostic"] for each in said if each["type"] == "diagnostic" and each["@level"] == "error"]
        return sorted(found, key=lambda each: each["range"]["start"]["line"])

    def faults(self, *arguments: str) -> list[tuple[str, int, str]]:
        """The same: the attribute and the line that each fault points at, and the fault."""
        written = (self.path / "main.tf").read_text(encoding="utf-8").splitlines()
        found = [
            (each["range"]["start"]["line"], each["detail"] or each["summary"]) for each in self.errors(*arguments)
        ]
        return [(written[line - 1].split("=")[0].strip(), line, fault) for line, fault in found]

    def run(self, *arguments: str, code: int = 0) -> str:
        """A command, and what it said, on one line: Terraform folds its errors."""
        return unfolded(self._run(*arguments, code=code))

    def _run(self, *arguments: str, code: int) -> str:
        done = subprocess.run(
            [self.binary, *arguments], cwd=self.path, env=self.environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=200,
        )  # fmt: skip
        assert done.returncode == code, done.stdout
        return done.stdout

    def apply(self, configuration: str, code: int = 0) -> str:
        """Apply that configuration."""
        self.write(configuration)
        return self.run("apply", "-auto-approve", code=code)

    def plan(self, code: int) -> str:
        """0: there is nothing to do; 2: there is."""
        return self.run("plan", "-detailed-exitcode", code=code)

    @property
    def state(self) -> dict[str, dict[str, Any]]:
        """What the state has of each resource, numbers as they are written there."""
        path = self.path / "terraform.tfstate"
        written = path.read_text(encoding="utf-8") if path.exists() else ""
        read = json.loads(written or '{"resources": []}', parse_float=str)
        return {each["name"]: one["attributes"] for each in read["resources"] for one in each["instances"]}


def unfolded(said: str) -> str:
    return " ".join(re.sub("[│╷╵]", " ", said).split())


def environment(path: Path, **changed: str) -> dict[str, str]:
    """Of a Terraform that knows nothing of whoever runs the tests."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("DATABASE_URL", "PGLIMITS_DSN") and not name.startswith(("TF_", "PG"))
    }
    ours = {"HOME": str(path), "TF_IN_AUTOMATION": "1", "TF_CLI_ARGS": "-no-color", "CHECKPOINT_DISABLE": "1"}
    return {**kept, **ours, "PGLIMITS_EMBEDDED": "never", **changed}
