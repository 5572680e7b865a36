from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from languages import Page


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Node's clients are installed, by the command of their page."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    folder = tmp_path_factory.mktemp("node")
    (command,) = [each for each in Page.read("node.md").commands() if each.startswith("npm ")]
    subprocess.run(["bash", "-euc", command], cwd=folder, check=True, timeout=240)
    return folder
