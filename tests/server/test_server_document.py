"""The examples of docs/server.md, run one after the other as they stand."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from servertest import Server

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "server.md"
BLOCK = re.compile(r"^```bash\n(.*?)^```\n\n^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_examples_with_curl_print_what_the_document_says(serve: Callable[..., Server], tmp_path: Path) -> None:
    url = serve().url
    examples = BLOCK.findall(DOCUMENT.read_text(encoding="utf-8"))
    assert len(examples) >= 6
    for code, prints in examples:
        done = subprocess.run(
            ["bash", "-uc", code.replace("http://127.0.0.1:4200", url)],
            cwd=tmp_path,
            env=os.environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.stdout.replace("\r", ""), done.stderr) == (prints, ""), code


@pytest.mark.parametrize("option", re.findall(r"`(--[a-z-]+)", DOCUMENT.read_text(encoding="utf-8")))
def test_an_option_that_the_document_names_is_there(option: str) -> None:
    from pglimits_cli.serve import app
    from typer.main import get_command

    assert option in {name for parameter in get_command(app).params for name in parameter.opts}
