"""docs/from-prefect.md, run as it stands: each script with Prefect's import and with ours.

With PGLIMITS_REWRITE_PAGE=1 (and PGLIMITS_TEST_PREFECT) what is printed is written into the page instead.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import shlex
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prefect_tables
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "server"))

from prefecttest import PREFECT, Prefect

from pglimits import _install, asyncio, sync

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "from-prefect.md"
TEXT = PAGE.read_text(encoding="utf-8")
REWRITE = bool(PREFECT) and os.environ.get("PGLIMITS_REWRITE_PAGE") == "1"
SHOWN = r"\n\n```text\n(.*?)```\n"
SCRIPT = re.compile(rf"^```py\n(.*?)```\n\nWith Prefect:{SHOWN}\nWith pglimits:{SHOWN}", re.MULTILINE | re.DOTALL)
SHELL = re.compile(rf"^```bash\n(.*?)```{SHOWN}", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^from prefect\.concurrency\.(?=(sync|asyncio) import )", re.MULTILINE)
API = "http://127.0.0.1:4200/api"
"""Where a page's reader has Prefect."""
LOGIN = "admin:secret"


def created() -> list[list[str]]:
    """The commands of the page that make limits in Prefect."""
    (block,) = re.findall(r"^```sh\n(.*?)```", TEXT, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines()]
    assert all(line[:3] == ["prefect", "gcl", "create"] for line in lines)
    return lines


def rewrite(printed: str, pattern: re.Pattern[str], nth: int, group: int) -> None:
    """Put what was printed into a block of the page, as it is now."""
    text = PAGE.read_text(encoding="utf-8")
    found = list(pattern.finditer(text))[nth]
    PAGE.write_text(text[: found.start(group)] + printed + text[found.end(group) :], encoding="utf-8")


def compare(printed: list[str], pattern: re.Pattern[str], group: int) -> None:
    """Compare what was printed with the blocks of the page, or write it there."""
    if REWRITE:
        for nth, text in enumerate(printed):
            rewrite(text, pattern, nth, group)
    else:
        assert printed == [found[group] for found in pattern.finditer(TEXT)]


def run_ours(environment: dict[str, str]) -> list[str]:
    """What each script prints, with the import line changed, all at the same time."""
    running = []
    for script, *_ in SCRIPT.findall(TEXT):
        changed, count = IMPORT.subn("from pglimits.", script)
        assert count == 1 and "prefect" not in changed
        command = [sys.executable, "-c", changed]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    ended = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [0] * len(running), ended
    return [out for out, _ in ended]


def import_limits(environment: dict[str, str], url: str) -> None:
    """The step of the page that imports."""
    (commands, shown) = SHELL.findall(TEXT)[0]
    done = subprocess.run(
        ["bash", "-euc", commands], env={**environment, "PREFECT_API_URL": url}, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    printed = done.stdout.replace(url, API)
    if REWRITE:
        rewrite(printed, SHELL, 0, 2)
    else:
        assert printed == shown


@pytest.fixture
def shell(environment: dict[str, str]) -> dict[str, str]:
    """The environment of a reader's shell, in which pglimits is found."""
    kept = {name: value for name, value in environment.items() if not name.startswith("PREFECT_")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_the_page_read_word_by_word_with_our_server_in_place_of_prefects(
    shell: dict[str, str], bare_dsn: str, start: Callable[..., Any], pglimits: Callable[..., Any]
) -> None:
    _install.install(bare_dsn)
    for _, _, *command in created():
        assert pglimits(*command, "--dsn", bare_dsn).code == 0
    serving = start("serve", "--port", "0", "--dsn", bare_dsn)
    import_limits(shell, re.findall(r"http://[^\s/]+", serving.stdout.readline())[0] + "/api")
    compare(run_ours(shell), SCRIPT, 3)


@contextlib.contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """The URL of the API of a real server of Prefect, which wants a login and protects itself from CSRF."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "PREFECT_HOME": str(home), "PREFECT_API_URL": url,
        "PREFECT_SERVER_API_AUTH_STRING": LOGIN, "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_LOGGING_LEVEL": "ERROR", "DO_NOT_TRACK": "1",
    }  # fmt: skip
    command = [PREFECT, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--port", str(port)]
    log = home / "server.log"
    with log.open("w") as file:
        running = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        yield url
    finally:
        running.kill()
        running.wait()


def is_ready(url: str) -> bool:
    request = urllib.request.Request(
        f"{url}/ready", headers={"Authorization": f"Basic {b64encode(LOGIN.encode()).decode()}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_the_page_read_word_by_word_with_prefect(
    shell: dict[str, str],
    pglimits: Callable[..., Any],
    tmp_path: Path,
    wait_until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All in one test, as a server of Prefect takes long to start."""
    if not PREFECT:
        pytest.skip("PGLIMITS_TEST_PREFECT does not name the Python of an environment with Prefect")
    login = {"PREFECT_API_AUTH_STRING": LOGIN}
    with prefect_server(tmp_path) as url, contextlib.closing(Prefect(tmp_path, url, **login)) as prefect:
        wait_until(lambda: is_ready(url), timeout=120)
        commands = [prefect.start("cli", *command) for _, *command in created()]
        assert [command.wait().code for command in commands] == [0] * len(commands)

        # The import: by the API, then out of the database.
        for wrong in ("", "admin:wrong"):
            monkeypatch.setenv("PREFECT_API_AUTH_STRING", wrong)
            refused = pglimits("import", "prefect", "--api-url", url)
            assert refused.code == 1 and f"{url} refuses to answer (401 Unauthorized" in refused.err
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", LOGIN)
        refused = pglimits("import", "prefect", "--api-url", url[:-4])
        assert refused.code == 1 and "is not the address of Prefect's API" in refused.err
        import_limits({**shell, **login}, url)
        there = pglimits("import", "prefect", "--database", str(tmp_path / "prefect.db"), "--plan")
        assert (there.code, there.out) == (0, f"Nothing to do: {len(commands)} unchanged.\n")
        check_tables(tmp_path / "prefect.db")

        # The scripts.
        running = []
        for nth, (script, *_) in enumerate(SCRIPT.findall(TEXT)):
            file = tmp_path / f"script{nth}.py"
            file.write_text(script)
            running.append(prefect.start("script", str(file)))
        compare([script.wait(60).out for script in running], SCRIPT, 2)

        held, rates, held_in_tasks, rates_in_tasks, flags = prefect.run("surface").said
    assert (held, rates) == (held_in_tasks, rates_in_tasks)
    assert table_of("### concurrency").keys() == {*held, "key", "priority", "what `as` gives"}
    assert table_of("### rate_limit").keys() == {*rates, "key"}
    for name, theirs in (("concurrency", held), ("rate_limit", rates)):
        for module in (sync, asyncio):
            ours = inspect.signature(getattr(module, name)).parameters
            assert list(ours)[: len(theirs)] == list(theirs)
            assert set(ours) <= table_of(f"### {name}").keys()
        for parameter, default in theirs.items():
            assert table_of(f"### {name}")[parameter] == default
    commands_of_page = " ".join(re.findall(r"^\| ([^|]*) \|", section("## Commands"), re.MULTILINE))
    for command, options in flags.items():
        assert f"`{command} " in commands_of_page or f"`{command}`" in commands_of_page, command
        for names in options:
            shown = [name for name in names if name != "--name" and not name.startswith("--no-")]
            assert all(name in commands_of_page for name in shown), (command, names)


def check_tables(database: Path) -> None:
    """The tables that tests make for themselves are as Prefect has them."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        for table, columns in prefect_tables.COLUMNS.items():
            assert {row[1] for row in connection.execute(f"pragma table_info({table})")} == set(columns)


def section(title: str) -> str:
    found: str = re.split(r"^##", TEXT.partition(f"\n{title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return found


def table_of(title: str) -> dict[str, str | None]:
    """The parameters that a table names, with their defaults."""
    rows = re.findall(r"^\| (?:`(\w+)(?:=(.*?))?`|(what .*?)) \|", section(title), re.MULTILINE)
    return {name or what: default.replace('"', "'") or None for name, default, what in rows}
