"""terraform install: what it lays out, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tf", reason="needs the extra pglimits[terraform]")

Cli = Callable[..., Any]
PROGRAM = Path(sys.executable).with_name("terraform-provider-pglimits")
pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="pglimits is not installed, so there is no such program")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("TF_CLI_CONFIG_FILE", raising=False)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): b"" if path.name == "program" else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_mirror_is_laid_out_for_both_of_them_and_named_by_a_configuration(pglimits: Cli, tmp_path: Path) -> None:
    mirror = tmp_path / "my mirror"
    result = pglimits("terraform", "install", str(mirror))
    assert result.code == 0 and result.err == ""
    assert result.out.endswith(f"  export TF_CLI_CONFIG_FILE='{mirror}/pglimits.tfrc'\n")
    for host in ("registry.terraform.io", "registry.opentofu.org"):
        provider = mirror / host / "pglimits" / "pglimits" / "0.1.0"
        script = provider / "linux_amd64" / "terraform-provider-pglimits_v0.1.0"
        done = subprocess.run([script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "have them find it: pglimits terraform install" in done.stderr
    said = pglimits("terraform", "install", str(mirror), "-o", "json").json
    assert said == {
        "directory": str(mirror), "version": "0.1.0", "program": str(PROGRAM), "implied": False,
        "config": str(mirror / "pglimits.tfrc"),
    }  # fmt: skip


def test_every_machine_gets_the_same_package(pglimits: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pglimits_cli import terraform

    pglimits("terraform", "install", str(tmp_path / "one"))
    monkeypatch.setattr(terraform, "_program", lambda: Path("/elsewhere/terraform-provider-pglimits"))
    pglimits("terraform", "install", str(tmp_path / "other"))
    one, other = files(tmp_path / "one"), files(tmp_path / "other")
    assert {name for name in one if "_v0.1.0" in name} == {name for name in other if "_v0.1.0" in name}
    assert all(other[name] == content for name, content in one.items() if "_v0.1.0" in name)
    # And where its program is gone, it says so.
    gone = tmp_path / "other/registry.terraform.io/pglimits/pglimits/0.1.0/linux_arm64"
    done = subprocess.run(
        [gone / "terraform-provider-pglimits_v0.1.0"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (
        1, "terraform-provider-pglimits is no longer where it was: pglimits terraform install\n",
    )  # fmt: skip


def test_a_configuration_of_the_users_stays_as_it_is(pglimits: Cli, home: Path) -> None:
    mine = home / ".terraformrc"
    mine.write_text('plugin_cache_dir = "/somewhere"\n')
    result = pglimits("terraform", "install")
    assert result.code == 0 and mine.read_text() == 'plugin_cache_dir = "/somewhere"\n'
    assert f"That takes the place of {mine}, which stays as it is" in result.err
    assert f"is in {home}/.terraform.d/plugins, where terraform init finds it." in result.out
    again = files(home)
    pglimits("terraform", "install")
    assert files(home) == again


def test_an_upgrade_takes_the_place_of_what_was_there(
    pglimits: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pglimits_cli import terraform

    def versions() -> list[str]:
        return sorted(path.name for path in (tmp_path / "registry.terraform.io/pglimits/pglimits").iterdir())

    for released, number in (("0.1.0", "0.1.0"), ("1.2.0rc1", "1.2.0-rc1"), ("1.2.3.dev4+local", "1.2.3-dev4.local")):
        monkeypatch.setattr(terraform, "version", lambda _, released=released: released)
        assert pglimits("terraform", "install", str(tmp_path)).code == 0
        assert versions() == [number]


def test_dev_overrides_run_the_program_itself(pglimits: Cli, tmp_path: Path) -> None:
    pglimits("terraform", "install", str(tmp_path), "--dev-overrides")
    config = (tmp_path / "pglimits.tfrc").read_text()
    assert f'"registry.opentofu.org/pglimits/pglimits" = "{PROGRAM.parent}"' in config
    assert config.count("{") == config.count("}") == 4


def test_without_what_it_needs_it_says_what_to_install(
    pglimits: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tf", None)
    monkeypatch.setenv("PATH", str(tmp_path))  # nor in an environment of its own
    result = pglimits("terraform", "install", str(tmp_path / "mirror"))
    assert result.code == 1 and "pip install 'pglimits[terraform]'" in result.err
    assert not (tmp_path / "mirror").exists()


def test_a_place_that_is_no_folder_is_an_error_that_names_it(pglimits: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    result = pglimits("terraform", "install", str(tmp_path / "file"))
    assert result.code != 0 and str(tmp_path / "file") in result.err
    assert (tmp_path / "file").read_text() == "kept"
