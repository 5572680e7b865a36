"""What stands in, in the sessions that the documents show, for programs that would install something or would not end.

``pip`` looks whether what is to be installed has that name and those extras. ``python3 -m venv`` makes a folder with
these stand-ins. ``pglimits serve`` runs until it serves, and is then ended as ctrl-C ends it. ``pglimits demo`` and
``bench``, which have tests of their own, only have their arguments read. ``pytest`` would run these tests again.
Everything else is the real thing.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pip(arguments: list[str]) -> None:
    from packaging.requirements import Requirement

    command, *rest = arguments
    assert command == "install", arguments
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [argument for argument in rest if not argument.startswith("-")]
    assert wanted, arguments
    assert {argument for argument in rest if argument.startswith("-")} <= {"-q", "-e", "-U"}, arguments
    for argument in wanted:
        asked = Requirement(argument.replace(".", "pglimits", 1) if argument.startswith(".") else argument)
        if asked.name == "pglimits":
            assert asked.extras <= set(project["optional-dependencies"]), f"no such extra: {asked}"


def python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "venv"]:
        folder = Path(arguments[2], "bin")
        folder.mkdir(parents=True, exist_ok=True)
        for stand in Path(os.environ["PGLIMITS_STAND_INS"]).iterdir():
            if not (folder / stand.name).exists():
                (folder / stand.name).symlink_to(stand)
        (folder / "activate").write_text(f"PATH={folder.resolve()}:$PATH\n")
    else:
        from pglimits_bench import document

        text = document.DOCUMENT.read_text(encoding="utf-8")
        assert document.with_figures(text) == text, "docs/performance.md has other figures than bench/results"
        chart = document.RESULTS.parent / document.CHART.name
        assert document.CHART.read_bytes() == chart.read_bytes(), f"{document.CHART} is another than {chart}"


def pglimits(arguments: list[str]) -> None:
    command, *rest = arguments
    if command == "serve":
        serve(rest)
    else:
        from pglimits_cli._commands import _load

        _load(command).make_context(command, rest)


def serve(arguments: list[str]) -> None:
    """On any port, so that several tests can."""
    program = [sys.executable, "-m", "pglimits_cli", "serve", "--port", "0", *arguments]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        print(line, end="")
        process.send_signal(signal.SIGINT)
    assert re.fullmatch(r"Serving .* on http://\S+\n", line), line
    assert process.returncode == 0, process.returncode


def pytest(arguments: list[str]) -> None:
    assert arguments == ["-q"], arguments


_PYTHON = ('"-m venv" | "-m pglimits_bench.document"', "")
STAND_INS = {
    "pip": ("*", ""),
    "python": _PYTHON,
    "python3": _PYTHON,
    "pglimits": ('"serve "* | "demo "* | "bench "*', "-m pglimits_cli"),
    "pytest": ("*", ""),
}
"""For which arguments each stands in, as a shell's pattern, and how Python is called with all others."""

if __name__ == "__main__":
    {"pip": pip, "python": python, "python3": python, "pglimits": pglimits, "pytest": pytest}[sys.argv[1]](sys.argv[2:])
