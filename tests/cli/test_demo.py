"""The demo, as people start it: it shows what it says, counts, tells when a promise was broken, and leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pglimits_cli._demo_count import Event, Seen, Setting, Summary, count

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
SHORT = ["--seconds", "8"]


@pytest.fixture
def folder(embedded_home: Path) -> Path:
    """A temporary folder for one demo, which the user that its server runs as can enter."""
    path = embedded_home.parent / "temporary"
    path.mkdir()
    path.chmod(0o711)
    return path


def start(folder: Path, *options: str, **files: Any) -> subprocess.Popen[bytes]:
    unwanted = ("PGLIMITS_", "DATABASE_URL", "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    environment |= {
        "TMPDIR": str(folder),
        "PGLIMITS_HOME": str(folder.parent / "home"),
        "TERM": "xterm",
        "LANG": "C.UTF-8",
    }
    command = [sys.executable, "-m", "pglimits_cli", "demo", *options]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0, **files)


def run(folder: Path, *options: str) -> tuple[int, str, str]:
    process = start(folder, *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    return process.returncode, out.decode(), err.decode()


def processes_of(folder: Path) -> list[str]:
    """Those of a demo: they have its temporary folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"TMPDIR=" + os.fsencode(folder) + b"\0" in (process / "environ").read_bytes():
                found.append(f"{process.name} {(process / 'cmdline').read_bytes()!r}")
    return found


def assert_nothing_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []
    if sys.platform == "linux":
        assert processes_of(folder) == []


def test_the_summary_is_counted_and_can_be_had_as_json(folder: Path) -> None:
    code, out, err = run(folder, *SHORT, "-o", "json")
    assert (code, err) == (0, ""), out
    summary = json.loads(out)
    assert summary["as_promised"] is True
    assert [check["kept"] for check in summary["checks"]] == [True] * 7
    assert [phase["limit"] for phase in summary["phases"]] == [2, 3, 2]
    assert all(0 < phase["most_held"] <= phase["limit"] and phase["grants"] for phase in summary["phases"])
    assert sum(phase["grants"] for phase in summary["phases"]) == summary["grants"]
    assert summary["grants"] == summary["releases"] + 1
    assert summary["waited"] > 0
    assert summary["passed"] == 0
    assert summary["wake_ups"] > 0
    assert 0 <= summary["wake_up_median_ms"] <= summary["wake_up_worst_ms"]
    killed = summary["killed"]
    assert killed["was_first_in_line"] is True
    assert killed["to_worker"] != killed["worker"]
    assert 0 < killed["lease_left_seconds"] <= killed["slot_back_seconds"]
    assert summary["calls"] > summary["burst"]
    assert (summary["held_at_end"], summary["waiting_at_end"], summary["failures"]) == (0, 0, [])
    assert_nothing_left(folder)


def test_it_says_what_it_does_before_there_is_a_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pglimits: Callable[..., Any]
) -> None:
    from pglimits import EmbeddedUnavailable, _embedded

    said: list[str] = []

    def throwaway(**_: object) -> Any:
        said.append(sys.stdout.buffer.getvalue().decode())  # type: ignore[attr-defined]
        raise EmbeddedUnavailable("there is none")

    monkeypatch.setattr(_embedded, "throwaway", throwaway)
    result = pglimits("demo")
    assert (result.code, result.err) == (1, "Error: there is none\n")
    assert said[0].startswith("6 processes contend") and "Starting 6 processes and a PostgreSQL" in said[0]
    assert (pglimits("demo", "-o", "json").out, said[1]) == ("", "")


def test_without_a_terminal_it_is_a_plain_log(folder: Path) -> None:
    code, out, err = run(folder, *SHORT)
    assert (code, err) == (0, ""), out
    assert CONTROL.search(out) is None
    assert max(len(line) for line in out.splitlines()) <= 80
    said = " ".join(out.split())
    assert said.startswith("6 processes contend for 2 slots of 'database'")
    for what in (
        r"Starting 6 processes and a PostgreSQL… PostgreSQL \d+ is up\. Installing pglimits in it… 0\.00 s All 6 start",
        r"was killed \(SIGKILL\) while it held a slot; nobody tells the database",
        r"The lease of the killed worker \d has ended: its slot went to worker \d",
        r"'database' grows from 2 to 3 slots",
        r"has the new slot \S+ ms after the change",
        r"'database' shrinks from 3 to 2 slots",
        r"-- 2 of 2 slots held, by \d \d; in line: \d",
        r"worker \d waited \S+ s, has a slot \S+ ms after worker \d released it",
        r"All as promised\.$",
    ):
        assert re.search(what, said), what
    stamps = [float(stamp) for stamp in re.findall(r"^ *(\d+\.\d\d) s  (?!--)", out, re.MULTILINE)]
    assert len(stamps) > 10
    assert_nothing_left(folder)


def test_on_a_terminal_it_is_a_live_table(folder: Path) -> None:
    code, out = on_terminal(folder, *SHORT)
    assert code == 0, out
    assert "\x1b[" in out
    for what in ("2 of 2 slots held", "1st in line", "holds a slot", "killed; its lease ends in", "All as promised."):
        assert what in out, what
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h")  # the cursor was given back as often as taken
    assert_nothing_left(folder)


def on_terminal(folder: Path, *options: str) -> tuple[int, str]:
    import fcntl
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = start(folder, *options, stdout=theirs, stderr=theirs)
    os.close(theirs)
    read = b""
    with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
        while select.select([ours], [], [], 120)[0]:
            read += os.read(ours, 65536)
    os.close(ours)
    return process.wait(), read.decode()


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_it_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    process = at_work(folder)
    process.send_signal(number)
    process.send_signal(number)  # the impatient press it twice
    assert process.wait() == 128 + number
    assert_nothing_left(folder)


@linux
def test_a_killed_demo_takes_its_processes_along_and_the_next_server_removes_its_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Any]
) -> None:
    process = at_work(folder)
    assert len(processes_of(folder)) > 6
    process.kill()
    process.wait()
    wait_until(lambda: not processes_of(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    from pglimits import _embedded

    with _embedded.throwaway():
        assert len(list(folder.iterdir())) == 1
    assert_nothing_left(folder)


def at_work(folder: Path) -> subprocess.Popen[bytes]:
    """A demo whose workers contend already."""
    out = (folder / "out").open("w+b")
    process = start(folder, stdout=out, stderr=out)
    try:
        while b"got a slot" not in (folder / "out").read_bytes():
            assert process.poll() is None, (folder / "out").read_text()
    finally:
        out.close()
    (folder / "out").unlink()
    return process


def test_too_short_a_time_is_refused(folder: Path) -> None:
    code, out, err = run(folder, "--seconds", "1")
    assert (code, out) == (2, "")
    assert "--seconds" in err
    assert_nothing_left(folder)


# The count, over logs in which promises are broken: a demo that cannot fail would show nothing.

SETTING = Setting(workers=3, slots=1, per_second=10.0, burst=1)
CALLS = [Event(at / 10, what, 1) for at in range(1, 40) for what in ("want", "call")]


def log_of_a_good_day() -> tuple[list[Event], dict[str, Seen]]:
    log = [
        Event(0.00, "ask", 1), Event(0.01, "run", 1, "a", 1), Event(0.10, "ask", 2), Event(0.20, "ask", 3),
        Event(1.00, "release", 1), Event(1.01, "run", 2, "b", 2), Event(1.05, "ask", 1),
        Event(1.50, "killed", 2), Event(2.00, "ended", 2), Event(2.01, "run", 3, "c", 3),
        Event(3.00, "release", 3), Event(3.01, "run", 1, "d", 4), Event(3.50, "release", 1),
    ]  # fmt: skip
    seen = {
        "a": Seen(None, 0.005),
        "b": Seen(0.101, 1.005),
        "c": Seen(0.201, 2.005),
        "d": Seen(1.051, 3.005),
    }
    return log, seen


def counted(log: list[Event], seen: dict[str, Seen], calls: list[Event] = CALLS, held: int = 0) -> Summary:
    return count([*log, *calls], seen, SETTING, held_at_end=held, waiting_at_end=0)


def broken(summary: Summary) -> list[str]:
    assert summary.as_promised is all(check.kept for check in summary.checks)
    return [check.promise for check in summary.checks if not check.kept]


def changed(log: list[Event], number: int, **change: Any) -> list[Event]:
    return [replace(event, **change) if at == number else event for at, event in enumerate(log)]


def test_a_good_day_is_as_promised() -> None:
    summary = counted(*log_of_a_good_day())
    assert broken(summary) == []
    assert (summary.grants, summary.releases, summary.waited, summary.wake_ups) == (4, 3, 3, 2)
    assert (summary.wake_up_median_ms, summary.wake_up_worst_ms) == (10.0, 10.0)
    assert summary.killed is not None
    assert (summary.killed.worker, summary.killed.to_worker) == (2, 3)
    assert summary.killed.slot_back_seconds == pytest.approx(0.51)
    assert summary.calls_per_second == pytest.approx(10.0)


def test_wake_ups_are_told_with_the_load_of_a_busy_machine() -> None:
    log, seen = log_of_a_good_day()
    for load, busy in ((9.0, True), (1.5, False)):
        setting = replace(SETTING, load=load, processors=2)
        summary = count([*log, *CALLS], seen, setting, held_at_end=0, waiting_at_end=0)
        (told,) = [check.counted for check in summary.checks if check.promise == "woken at once"]
        assert ("load 9.0 on 2 processors" in told) is busy


def test_a_slot_too_many_is_seen() -> None:
    log, seen = log_of_a_good_day()
    summary = counted(changed(log, 10, at=3.2), seen)  # released only after the next one ran
    assert "never too many" in broken(summary)
    assert summary.phases[0].most_held == 2


def test_a_slot_of_a_dead_worker_given_away_before_its_lease_ended_is_seen() -> None:
    log, seen = log_of_a_good_day()
    seen["c"] = Seen(0.201, 1.7)
    summary = counted(changed(log, 9, at=1.71), seen)
    assert {"never too many", "a dead worker's slot"} <= set(broken(summary))


def test_who_holds_a_slot_when_the_limit_shrinks_may_keep_it_but_nobody_new_gets_one() -> None:
    calls = CALLS
    log = [Event(0.0, "ask", 1), Event(0.0, "ask", 2), Event(0.0, "ask", 3), Event(0.005, "limit", slots=2)]
    log += [Event(0.01, "run", 1, "a", 1), Event(0.01, "run", 2, "b", 2), Event(1.0, "limit", slots=1)]
    good = count([*log, *calls], {}, SETTING, held_at_end=0, waiting_at_end=0)
    assert "never too many" not in broken(good)
    bad = counted([*log, Event(1.5, "run", 3, "c", 3)], {}, calls)
    assert "never too many" in broken(bad)


def test_who_was_granted_before_the_limit_grew_may_run_after_one_who_was_granted_then() -> None:
    log = [Event(0.0, "ask", number) for number in (1, 2, 3)] + [Event(0.01, "run", 1, "a", 1)]
    log += [Event(0.99, "release", 1), Event(1.0, "limit", slots=2), Event(1.02, "run", 3, "c", 3)]
    seen = {"a": Seen(None, 0.005), "b": Seen(0.001, 0.991), "c": Seen(0.002, 1.001)}
    late = counted([*log, Event(1.05, "run", 2, "b", 2)], seen)
    assert "never too many" not in broken(late)
    assert [(phase.grants, phase.most_held) for phase in late.phases] == [(2, 1), (1, 2)]
    seen["c"] = Seen(0.002, 0.992)  # and so by the limit of then
    assert "never too many" in broken(counted([*log, Event(1.05, "run", 2, "b", 2)], seen))


def test_a_waiter_that_was_passed_is_seen() -> None:
    log, seen = log_of_a_good_day()
    seen["b"], seen["c"] = replace_arrival(seen["b"], 0.201), replace_arrival(seen["c"], 0.101)
    summary = counted(log, seen)
    assert broken(summary) == ["in order"]
    assert summary.passed == 1


def replace_arrival(seen: Seen, arrived: float) -> Seen:
    return Seen(arrived, seen.granted)


def test_a_newcomer_that_was_never_seen_waiting_but_passed_one_who_was_is_seen() -> None:
    log, seen = log_of_a_good_day()
    seen["b"] = Seen(None, 1.005)
    summary = counted(changed(log, 2, at=0.5), seen)
    assert "in order" in broken(summary)


def test_a_wake_up_that_was_missed_is_seen() -> None:
    log, seen = log_of_a_good_day()
    log = [replace(event, at=event.at + 5) if number > 10 else event for number, event in enumerate(log)]
    assert broken(counted(log, seen)) == ["woken at once"]


def test_a_slot_that_comes_back_late_is_seen() -> None:
    log, seen = log_of_a_good_day()
    log = [replace(event, at=event.at + 5) if number > 8 else event for number, event in enumerate(log)]
    assert broken(counted(log, seen)) == ["a dead worker's slot"]


def test_a_rate_that_is_not_reached_is_seen() -> None:
    slow = [replace(event, at=event.at * 1.2) for event in CALLS]
    assert broken(counted(*log_of_a_good_day(), slow)) == ["never too slow"]


def test_a_rate_that_is_surpassed_in_one_window_is_seen() -> None:
    fast = [replace(event, at=2.0) if 2.0 < event.at < 2.3 else event for event in CALLS]
    assert broken(counted(*log_of_a_good_day(), fast)) == ["never too fast"]


def test_calls_that_come_close_together_are_no_fault_where_the_machine_wakes_others_as_late() -> None:
    log, seen = log_of_a_good_day()
    late = [replace(event, at=2.29) if 1.95 < event.at < 2.3 else event for event in CALLS]
    assert broken(counted(log, seen, late)) == ["never too fast"]
    assert broken(counted(changed(log, 5, at=1.3), seen, late)) == []


def test_what_is_left_over_is_seen() -> None:
    log, seen = log_of_a_good_day()
    assert broken(counted(log, seen, held=1)) == ["nothing left"]
    assert "nothing left" in broken(counted(log[:-1], seen))
    failed = count([*log, *CALLS], seen, SETTING, held_at_end=0, waiting_at_end=0, failures=["worker 3 failed"])
    assert broken(failed) == ["nothing left"]
