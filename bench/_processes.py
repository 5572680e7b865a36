"""Other processes that the benchmark needs: they end with it, however that ends, and with the block they are for."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

_PATIENCE = 10.0
"""Seconds that a process gets to end by itself."""

# Runs a program for as long as its own stdin is open: when the benchmark dies, the kernel closes that.
_LEASH = """
import os, subprocess, sys, threading
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
def end():
    while os.read(0, 1):
        pass
    child.terminate()
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
threading.Thread(target=end, daemon=True).start()
os._exit(1 if child.wait() else 0)
"""


class ProcessFailed(Exception):
    """A process that the benchmark needs did not do what it is for; the message has the end of what it said."""


@contextlib.contextmanager
def program(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A server that runs during the block. Ctrl-C in the terminal does not reach it."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LEASH, *command],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=None if environment is None else {**os.environ, **environment},
            start_new_session=True,
        )
        try:
            yield process
        except ProcessFailed as error:
            raise ProcessFailed(f"{error}: {tail(said)}") from error
        finally:
            _end(process)


class Worker:
    """A process of ``_worker.py``: it does as it is told, an object in JSON a line, and answers likewise."""

    def __init__(self, task: Mapping[str, Any], environment: Mapping[str, str] | None) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}._worker", json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=None if environment is None else {**os.environ, **environment},
            start_new_session=True,
        )

    def tell(self, do: str, **how: Any) -> None:
        """Have it do something, without waiting for the answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **how}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise ProcessFailed(f"a worker has ended: {tail(self._said)}") from error

    def answer(self) -> dict[str, Any]:
        """Wait for its next line."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            raise ProcessFailed(f"a worker has ended: {tail(self._said)}")
        found: dict[str, Any] = json.loads(text)
        if "error" in found:
            raise ProcessFailed(str(found["error"]))
        return found

    def ask(self, do: str, **how: Any) -> dict[str, Any]:
        """Have it do something, and wait for the answer."""
        self.tell(do, **how)
        return self.answer()

    def close(self) -> None:
        _end(self.process)
        self._said.close()


@contextlib.contextmanager
def workers(tasks: Sequence[Mapping[str, Any]], environment: Mapping[str, str] | None = None) -> Iterator[list[Worker]]:
    """Workers that are ready, for the block."""
    with contextlib.ExitStack() as stack:
        started = []
        for task in tasks:
            worker = Worker(task, environment)
            stack.callback(worker.close)
            started.append(worker)
        for worker in started:
            worker.answer()
        yield started


@contextlib.contextmanager
def worker(task: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Iterator[Worker]:
    """One worker that is ready, for the block."""
    with workers([task], environment) as started:
        yield started[0]


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tail(said: IO[bytes]) -> str:
    """The end of what a process has said, as one line."""
    with contextlib.suppress(OSError, ValueError):
        said.seek(0, os.SEEK_END)
        said.seek(max(said.tell() - 800, 0))
        return " ".join(said.read().decode(errors="replace").split()) or "it said nothing"
    return "it said nothing"
