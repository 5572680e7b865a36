"""terraform install: have Terraform and OpenTofu find the provider."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from . import _errors, _output
from ._commands import Group, command
from ._options import Format, Output

app = typer.Typer(
    name="terraform",
    help="The provider of Terraform and OpenTofu.",
    no_args_is_help=True,
    add_completion=False,
    cls=Group,
)

_PROGRAM = "terraform-provider-pglimits"
_SOURCES = ("registry.terraform.io/pglimits/pglimits", "registry.opentofu.org/pglimits/pglimits")
_PLATFORMS = (
    "darwin_amd64", "darwin_arm64", "freebsd_amd64", "linux_386", "linux_amd64", "linux_arm", "linux_arm64",
)  # fmt: skip
_SCRIPT = f"""\
#!/bin/sh
# Runs the program that `pglimits terraform install` has linked to; where this is a copy elsewhere, the one on the PATH.
# Every machine has the same script, so that one .terraform.lock.hcl fits all.
program=$(CDPATH='' cd -P -- "$(dirname -- "$0")/.." && pwd)/program
[ -x "$program" ] || program=$(command -v {_PROGRAM}) || {{
  echo "{_PROGRAM} is no longer where it was: pglimits terraform install"
  exit 1
}}
exec "$program" "$@"
"""


@app.callback()
def _group() -> None:
    """A group, though it has one command only."""


@command(app)
def install(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR", file_okay=False, show_default=False, help="Where. Default: ~/.terraform.d/plugins."
        ),
    ] = None,
    dev_overrides: Annotated[
        bool, typer.Option("--dev-overrides", help="Have the configuration run the program without the lock file.")
    ] = False,
    output: Output = Format.table,
) -> None:
    """Lay out a mirror with the provider, so that terraform init and tofu init find it without a network.

    Writes DIR/pglimits.tfrc too: a configuration that names the mirror, for TF_CLI_CONFIG_FILE. Without DIR, Terraform
    looks there by itself. Safe to repeat, and needed again after an upgrade of pglimits.

    Example: pglimits terraform install

    Example: export TF_CLI_CONFIG_FILE=$(pglimits terraform install mirror -o json | jq -r .config)
    """
    program = _program()
    usual = Path.home() / ".terraform.d" / "plugins"
    mirror = Path(os.path.abspath(usual if folder is None else folder))  # noqa: PTH100 - of a link, not its target
    number = _semantic(version("pglimits"))
    for source in _SOURCES:
        _lay_out(mirror / source, number, program)
    config = mirror / "pglimits.tfrc"
    config.write_text(_config(mirror, program if dev_overrides else None), encoding="utf-8")
    implied = mirror == usual and not dev_overrides
    found = f", where {'terraform init finds it' if implied else 'nothing looks for it yet'}"
    use = f"export TF_CLI_CONFIG_FILE={shlex.quote(str(config))}"
    _output.show(
        output,
        {"directory": mirror, "version": number, "program": program, "config": config, "implied": implied},
        f"{_PROGRAM} {number} is in {mirror}{found}.",
        f"{'For tofu, and where you have a provider_installation of your own' if implied else 'Have them look there'}:",
        f"  {use}",
    )
    mine = _of_the_user()
    if mine is not None and output is not Format.json:
        _errors.write(
            f"That takes the place of {mine}, which stays as it is: to keep what it says, copy the block"
            f" provider_installation of {config} into it instead.",
            err=True,
        )


def _program() -> Path:
    """The program to run. Ends the command if it is not installed."""
    beside = Path(sysconfig.get_path("scripts")) / _PROGRAM
    is_here = importlib.util.find_spec("tf") is not None and beside.is_file()
    found = str(beside) if is_here else shutil.which(_PROGRAM)  # of an environment of its own
    if found is None or (Path(found).resolve() == beside.resolve() and not is_here):
        raise _errors.fail("the provider needs more than is installed: pip install 'pglimits[terraform]'")
    if os.name != "posix":
        raise _errors.fail("a mirror needs Linux, macOS or another system with a POSIX shell")
    return Path(os.path.abspath(found))  # noqa: PTH100


def _lay_out(provider: Path, number: str, program: Path) -> None:
    """One version of the provider for each platform. Those that ran this program before an upgrade go."""
    for other in provider.glob("*/program"):
        if other.parent.name != number and other.is_symlink() and other.readlink() == program:
            shutil.rmtree(other.parent)
    for platform in _PLATFORMS:
        package = provider / number / platform
        package.mkdir(parents=True, exist_ok=True)
        with _anew(package / f"{_PROGRAM}_v{number}") as new:
            new.write_text(_SCRIPT, encoding="ascii")
            new.chmod(0o755)
    with _anew(provider / number / "program") as new:
        new.symlink_to(program)


@contextlib.contextmanager
def _anew(path: Path) -> Iterator[Path]:
    """Where to write a file that then takes the place of one that somebody may run."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    yield new
    new.replace(path)


def _config(mirror: Path, program: Path | None) -> str:
    sources = ", ".join(map(json.dumps, _SOURCES))
    overrides = "".join(f"    {json.dumps(source)} = {_quoted(program.parent)}\n" for source in _SOURCES if program)
    return (
        "provider_installation {\n"
        + (f"  dev_overrides {{\n{overrides}  }}\n" if overrides else "")
        + f"  filesystem_mirror {{\n    path    = {_quoted(mirror)}\n    include = [{sources}]\n  }}\n"
        + f"  direct {{\n    exclude = [{sources}]\n  }}\n}}\n"
    )


def _quoted(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


def _semantic(released: str) -> str:
    """A version of Python's as Terraform reads it: 1.2.0rc1 is 1.2.0-rc1."""
    found = re.match(r"(\d+(?:\.\d+)*)(.*)", released)
    numbers = ([*found[1].split("."), "0", "0"] if found else ["0"] * 3)[:3]
    rest = re.sub("[^0-9A-Za-z]+", ".", found[2] if found else "").strip(".")
    return ".".join(numbers) + (f"-{rest}" if rest else "")


def _of_the_user() -> Path | None:
    """The configuration of Terraform that the user has already."""
    given = os.environ.get("TF_CLI_CONFIG_FILE")
    places = [Path(given)] if given else [Path.home() / ".terraformrc", Path.home() / ".tofurc"]
    return next((place for place in places if place.is_file() and place.name != "pglimits.tfrc"), None)
