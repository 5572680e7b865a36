"""The real terraform, and the real tofu, each where it is installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "server"))

from terraformtest import Folder, environment


@pytest.fixture(scope="session", params=["terraform", "tofu"])
def binary(request: pytest.FixtureRequest) -> str:
    """Where the program is."""
    if importlib.util.find_spec("tf") is None:
        pytest.skip("needs the extra pglimits[terraform]")
    found = shutil.which(request.param)
    if found is None:
        pytest.skip(f"needs {request.param}, which is not installed")
    return found


@pytest.fixture(scope="session")
def initialised(binary: str, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A folder after init, with the provider out of a mirror that pglimits has laid out."""
    home = tmp_path_factory.mktemp("terraform")
    known = environment(home, TF_CLI_CONFIG_FILE=str(home / "mirror" / "pglimits.tfrc"))
    command = [sys.executable, "-m", "pglimits_cli", "terraform", "install", str(home / "mirror")]
    subprocess.run(command, env=known, check=True, capture_output=True, timeout=200)
    folder = Folder(home / "initialised", binary, known)
    folder.path.mkdir()
    folder.write("")
    folder.run("init")
    return folder


@pytest.fixture
def folder_of(initialised: Folder, dsn: str, tmp_path: Path) -> Callable[[str], Folder]:
    """folder_of("a"): a folder of this test's own, for the test's database."""
    return lambda name: initialised.copy(tmp_path / name, PGLIMITS_DSN=dsn)


@pytest.fixture
def folder(folder_of: Callable[[str], Folder]) -> Folder:
    """The one folder of a test that needs no other."""
    return folder_of("folder")
