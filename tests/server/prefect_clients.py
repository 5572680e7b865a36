"""Runs in the Python of an unmodified Prefect: it imports Prefect once, and forks a process for each client.

A line of JSON on stdin starts one: {"id", "call": [name of a function below, *arguments], "out", "err"}. Lines on
stdout say {"id", "pid"} when it runs and {"id", "code"} when it has ended.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import runpy
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

# ruff: noqa: F401
# Much of this is imported only so that no child has to.
import anyio._backends._asyncio
import prefect.cli.global_concurrency_limit
import prefect.client.orchestration
import prefect.events.clients
import prefect.events.worker
import prefect.logging.formatters
import rich._emoji_codes
import rich.table
from prefect.cli import app
from prefect.concurrency import asyncio as in_tasks
from prefect.concurrency import sync as in_threads

if threading.active_count() > 1:
    raise RuntimeError("Prefect has threads before it is used: it cannot be forked")


def cli(*arguments: str) -> int:
    """The command ``prefect``, which ends the process."""
    sys.argv = ["prefect", *arguments]
    app()
    return 0


def script(path: str) -> None:
    """Run a file as a program."""
    runpy.run_path(path, run_name="__main__")


def surface() -> None:
    """Say which parameters the functions have, with their defaults, and which flags each command of ``prefect gcl``."""
    for module in (in_threads, in_tasks):
        for function in (module.concurrency, module.rate_limit):
            parameters = inspect.signature(function).parameters.values()
            say({each.name: None if each.default is each.empty else repr(each.default) for each in parameters})
    commands = prefect.cli.global_concurrency_limit.global_concurrency_limit_app
    named = [name for name in commands if not name.startswith("-")]
    say({name: [each.names for each in commands[name].assemble_argument_collection()] for name in named})


def program(code: str) -> int:
    """A program of Prefect's users."""
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})
    return 0


def say(*words: object) -> None:
    print(json.dumps(words[0] if len(words) == 1 else words), flush=True)


def wait_for(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.002)


def note(diary: str, what: str, who: object) -> None:
    """One line, in one write: what happened, who did it, when by the clock of this machine."""
    with Path(diary).open("a") as file:
        file.write(f"{what} {who} {time.time():.6f}\n")


def _tried(limits, **options) -> str:
    """How an attempt to acquire ends."""
    try:
        with in_threads.concurrency(limits, **options):
            return "held"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def try_each(*attempts: dict) -> None:
    """Say how each attempt ended, and whether that took more than three seconds."""
    for attempt in attempts:
        began = time.monotonic()
        ended = _tried(attempt.pop("names"), **attempt)
        say(ended, time.monotonic() - began > 3)


def hold(diary: str, who: str, names: list[str], until: str, options: dict, after: str | None = None) -> None:
    """Hold slots until a file is there, or until the lease is lost, which ends a strict one.

    after: a file to wait for first, with everything made ready.
    """
    if after is not None:
        with in_threads.concurrency("warm-up"):
            wait_for(after)
    try:
        with in_threads.concurrency(names, **options):
            note(diary, "begins", who)
            wait_for(until)
            note(diary, "ends", who)
    except BaseException as error:
        note(diary, "cancelled", type(error).__name__)


def hold_until_cancelled(diary: str, names: list[str], options: dict) -> None:
    """Hold slots in a task until it is cancelled, as a lost lease does with strict."""

    async def main() -> None:
        try:
            async with in_tasks.concurrency(names, **options):
                note(diary, "begins", "task")
                await asyncio.sleep(60)
        except BaseException as error:
            note(diary, "cancelled", type(error).__name__)

    asyncio.run(main())


def take_turns(diary: str, who: str, names: list[str], rounds: int, seconds: float, go: str) -> None:
    """Acquire and release, again and again."""
    wait_for(go)
    for _ in range(rounds):
        with in_threads.concurrency(names, timeout_seconds=60):
            note(diary, "begins", who)
            time.sleep(seconds)
            note(diary, "ends", who)


def use_rate(diary: str, who: str, names: list[str], until: str, warm: str) -> None:
    """Go at a rate until a file is there."""
    in_threads.rate_limit(["warm-up"])
    note(warm, "warm", who)
    while not Path(until).exists():
        in_threads.rate_limit(names, timeout_seconds=30)
        note(diary, "goes", who)


def by_client(steps: list[list]) -> None:
    """Call methods of Prefect's client, and say what each one returns."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for method, arguments in steps:
            try:
                found = getattr(client, method)(**arguments)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            if hasattr(found, "status_code"):
                found = [found.status_code, found.json() if found.content else None]
            elif hasattr(found, "model_dump"):
                found = found.model_dump(mode="json")
            elif isinstance(found, list):
                found = [limit.model_dump(mode="json") for limit in found]
            say(found if isinstance(found, (list, dict)) else str(found))


def validate(answers: list[list]) -> None:
    """Read what a server has answered into the models of Prefect's own server, and say what it says then."""
    from prefect.server.api.concurrency_limits_v2 import (
        ConcurrencyLimitWithLeaseResponse,
        MinimalConcurrencyLimitResponse,
    )
    from prefect.server.schemas.core import ConcurrencyLimitV2
    from prefect.server.schemas.responses import GlobalConcurrencyLimitResponse

    models = {
        "created": ConcurrencyLimitV2,
        "limit": GlobalConcurrencyLimitResponse,
        "minimal": MinimalConcurrencyLimitResponse,
        "leased": ConcurrencyLimitWithLeaseResponse,
    }
    for name, answer in answers:
        say(models[name].model_validate(answer, strict=False).model_dump(mode="json"))


def _run(command: dict) -> int:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    name, *arguments = command["call"]
    try:
        code = globals()[name](*arguments) or 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main() -> None:
    running: dict[int, int] = {}
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken)
    say("ready")
    buffer = b""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 1000)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            say({"id": running.pop(pid), "code": os.waitstatus_to_exitcode(status)})
        if 0 in ready:
            read = os.read(0, 65536)
            if not read:
                break
            *lines, buffer = (buffer + read).split(b"\n")
            for line in lines:
                command = json.loads(line)
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    code = _run(command)
                    # As the interpreter does at its end: Prefect's threads send what they still have.
                    threading._shutdown()
                    sys.exit(code)
                running[pid] = command["id"]
                say({"id": command["id"], "pid": pid})
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
