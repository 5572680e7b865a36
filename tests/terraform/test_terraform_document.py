"""The page of Terraform, followed word by word."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from terraformtest import PAGE, blocks, environment


def test_each_command_prints_what_the_page_says(binary: str, dsn: str, tmp_path: Path) -> None:
    home, work = tmp_path / "you", tmp_path / "work"
    work.mkdir()
    home.mkdir()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "terraform").symlink_to(binary)
    (programs / "pglimits").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pglimits_cli "$@"\n')
    (programs / "pglimits").chmod(0o755)
    known = environment(home, PGLIMITS_DSN=dsn)
    known["PATH"] = f"{programs}:{known['PATH']}"
    if Path(binary).name == "tofu":
        known["TF_CLI_CONFIG_FILE"] = str(home / ".terraform.d/plugins/pglimits.tfrc")
    examples = blocks("bash")
    assert len(examples) == 5
    for code, prints in examples:
        done = subprocess.run(
            ["bash", "-euc", code], cwd=work, env=known, capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        printed = iter(done.stdout.replace(str(home), "/home/you").replace("OpenTofu", "Terraform").splitlines())
        for line in (prints or "").splitlines():
            assert any(line.rstrip() == each.rstrip() for each in printed), f"{line}\n---\n{done.stdout}"


def test_the_page_has_no_block_that_no_test_runs() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert sorted(re.findall(r"^```(\w+)$", text, re.MULTILINE)) == ["bash"] * 5 + ["hcl"] * 2 + ["text"] * 5
