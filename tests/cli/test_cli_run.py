"""run: exit codes, signals, and the slot, which comes back in every case."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from clitest import lines, recorder

Connection = psycopg.Connection[Any]
Start = Callable[..., subprocess.Popen[str]]
Wait = Callable[..., Any]

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the leash is Linux's")


@pytest.fixture(autouse=True)
def limits(conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('database', 2)")


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    """Where the recorder writes."""
    file = tmp_path / "diary"
    file.touch()
    return file


def count(conn: Connection, view: str) -> int:
    row = conn.execute(f"select count(*) from pglimits.{view}".encode()).fetchone()
    assert row is not None
    return int(row[0])


def test_the_exit_code_goes_through_and_the_slot_comes_back(process: Callable[..., Any], conn: Connection) -> None:
    for code in (0, 7, 75, 255):
        result = process("run", "database", "--", "sh", "-c", f"exit {code}")
        assert (result.code, result.out, result.err) == (code, "", "")
        assert count(conn, "holders") == 0


def test_the_command_has_our_input_output_arguments_and_environment(process: Callable[..., Any]) -> None:
    script = 'cat; echo "$0 $1 $2 $FLAVOUR"; echo oops >&2'
    result = process(
        "run", "database", "--", "sh", "-c", script, "a", "-o", "--", stdin="fed\n", FLAVOUR="mint"
    )  # fmt: skip
    assert (result.code, result.out, result.err) == (0, "fed\na -o -- mint\n", "oops\n")


def test_the_command_knows_its_lease(process: Callable[..., Any], conn: Connection) -> None:
    conn.execute("select pglimits.create_limit('license', 1)")
    script = 'echo "$PGLIMITS_LEASE_ID $PGLIMITS_FENCE"; exec "$0" -m pglimits_cli holders -o json'
    result = process("run", "database", "license", "--slots", "1", "--", "sh", "-c", script, sys.executable)
    said, _, rest = result.out.partition("\n")
    lease_id, fences = said.split()
    import json

    holders = json.loads(rest)
    assert {holder["lease_id"] for holder in holders} == {lease_id}
    assert [str(holder["fence"]) for holder in holders] == fences.split(",")
    assert holders[0]["holder"]["program"] == "sh"


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take no such name")
def test_a_command_whose_path_is_no_unicode_runs_and_is_shown_as_well_as_can_be(
    process: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / os.fsdecode(b"job-\xff")
    file.write_text('#!/bin/sh\nexec "$1" -m pglimits_cli holders -o json\n')
    file.chmod(0o755)
    result = process("run", "database", "--", str(file), sys.executable)
    assert (result.code, result.err) == (0, "")
    assert result.json[0]["holder"]["program"] == str(tmp_path / "job-\ufffd")
    file.chmod(0o644)
    result = process("run", "database", "--", str(file))
    assert result.code == 126 and result.err.endswith(": cannot be executed: permission denied\n")


def test_the_command_inherits_other_files(start: Start, tmp_path: Path) -> None:
    with (tmp_path / "third").open("w") as third:
        fd = third.fileno()
        write = f"import os; os.write({fd}, b'hello')"
        started = start("run", "database", "--", sys.executable, "-c", write, pass_fds=(fd,))
        assert started.wait(timeout=100) == 0
    assert (tmp_path / "third").read_text() == "hello"


def test_slots_key_and_priority_are_taken(start: Start, conn: Connection, wait_until: Wait, diary: Path) -> None:
    started = start("run", "database", "--slots", "2", "--key", "k", "--priority", "3", "--", *recorder(diary))
    wait_until(lambda: lines(diary))
    row = conn.execute("select slots, key, priority, holder->>'pid' from pglimits.holders").fetchone()
    assert row == (2, "k", 3, str(started.pid))


def test_75_when_there_is_no_slot_in_time(process: Callable[..., Any], conn: Connection) -> None:
    conn.execute("select pglimits.acquire('database', slots => 2)")
    for timeout in ("0", "2"):
        result = process("run", "database", "--timeout", timeout, "--", "echo", "never")
        assert (result.code, result.out) == (75, "")
        assert result.err.startswith("Error: no slot of 'database'")


def test_what_is_not_there_or_no_program_is_found_out_before_the_wait(
    process: Callable[..., Any], conn: Connection, tmp_path: Path
) -> None:
    conn.execute("select pglimits.acquire('database', slots => 2)")
    nothing = process("run", "database", "--", "no-such-command")
    assert (nothing.code, nothing.err) == (127, "Error: no-such-command: command not found\n")
    assert process("run", "database", "--", str(tmp_path / "nix")).code == 127
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)  # root may search it all the same
    assert process("run", "database", "--", "no-such-command", PATH=f"{closed}:{os.environ['PATH']}").code == 127
    file = tmp_path / "no-program"
    file.write_text("text")
    assert process("run", "database", "--", str(file)).code == 126
    assert process("run", "database", "--", str(tmp_path)).code == 126
    assert process("run", "database", "--", "no-program", PATH=f"{tmp_path}:{os.environ['PATH']}").code == 126
    file.write_text("#!/no/such/interpreter -x\n")
    file.chmod(0o755)
    result = process("run", "database", "--", str(file))
    assert (result.code, result.err) == (127, f"Error: {file}: its interpreter /no/such/interpreter is not there\n")


def test_a_script_without_an_interpreter_line_is_run_by_sh(
    process: Callable[..., Any], conn: Connection, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "job"
    script.write_text('echo "$0" worked "$1" "$#"\nexit 7\n')
    script.chmod(0o755)
    for name in (str(script), "job"):
        result = process("run", "database", "--", name, "a b", "-c", PATH=f"{script.parent}:{os.environ['PATH']}")
        assert (result.code, result.out, result.err) == (7, f"{script} worked a b 2\n", "")
    script.write_text("")
    assert process("run", "database", "--", str(script)).code == 0
    assert count(conn, "holders") == 0


def test_a_file_that_is_no_program_at_all_ends_as_under_sh(
    process: Callable[..., Any], conn: Connection, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\x7fELF no program (")
    file.chmod(0o755)
    as_sh = subprocess.run(["/bin/sh", file], capture_output=True, check=False)
    assert as_sh.returncode != 0
    assert process("run", "database", "--", str(file)).code == as_sh.returncode
    assert count(conn, "holders") == 0


def test_without_a_command_it_is_a_usage_error(process: Callable[..., Any]) -> None:
    for arguments in (("database",), ("database", "--"), ("--", "true"), ("database", "--slots", "0", "--", "true")):
        result = process("run", *arguments)
        assert (result.code, result.out) == (2, "") and result.err.startswith("Error: ")


def test_a_missing_limit_is_a_warning_and_with_strict_an_error(process: Callable[..., Any]) -> None:
    result = process("run", "nix", "--", "echo", "ran")
    assert (result.code, result.out) == (0, "ran\n")
    assert result.err.startswith("Warning: ") and "'nix'" in result.err and result.err.count("\n") == 1
    strict = process("run", "nix", "--strict", "--", "echo", "ran")
    assert (strict.code, strict.out) == (1, "") and "Error: there is no limit named 'nix'" in strict.err


def test_no_database_no_run(process: Callable[..., Any]) -> None:
    result = process("run", "database", "--dsn", "host=127.0.0.1 port=1", "--", "echo", "ran")
    assert (result.code, result.out) == (1, "") and result.err.startswith("Error: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2])
def test_signals_reach_the_command_which_decides(
    start: Start, conn: Connection, wait_until: Wait, diary: Path, number: signal.Signals
) -> None:
    started = start("run", "database", "--", *recorder(diary))
    wait_until(lambda: lines(diary))
    started.send_signal(signal.SIGUSR1)
    wait_until(lambda: "SIGUSR1" in lines(diary))
    assert started.poll() is None and count(conn, "holders") == 1
    started.send_signal(number)
    assert started.wait(timeout=100) == 42
    assert lines(diary)[-1] == number.name
    assert count(conn, "holders") == 0


def test_an_interrupt_sent_to_us_alone_is_passed_on(start: Start, wait_until: Wait, diary: Path) -> None:
    started = start("run", "database", "--", *recorder(diary, "once"))
    wait_until(lambda: lines(diary))
    started.send_signal(signal.SIGINT)
    assert started.wait(timeout=100) == 42
    assert lines(diary)[1:] == ["SIGINT"]


def test_a_command_that_dies_of_a_signal_is_128_and_its_number(
    start: Start, conn: Connection, wait_until: Wait
) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        started = start("run", "database", "--", "sleep", "600")
        wait_until(lambda: count(conn, "holders") == 1)
        started.send_signal(number)  # before or after the command has begun: it is not lost
        assert started.wait(timeout=100) == 128 + number
        assert count(conn, "holders") == 0


def test_a_command_that_is_killed_gives_the_slot_back(
    start: Start, conn: Connection, wait_until: Wait, diary: Path
) -> None:
    started = start("run", "database", "--", *recorder(diary))
    wait_until(lambda: lines(diary))
    os.kill(int(lines(diary)[0].split()[1]), signal.SIGKILL)
    assert started.wait(timeout=100) == 128 + signal.SIGKILL
    assert count(conn, "holders") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1])
def test_a_signal_while_it_waits_gives_up_the_place(
    start: Start, conn: Connection, wait_until: Wait, number: signal.Signals
) -> None:
    conn.execute("select pglimits.acquire('database', slots => 2)")
    started = start("run", "database", "--", "echo", "ran")
    wait_until(lambda: count(conn, "waiters") == 1)
    started.send_signal(number)
    out, err = started.communicate(timeout=100)
    assert (started.returncode, out, err) == (128 + number, "", "")
    assert count(conn, "waiters") == 0 and count(conn, "holders") == 1


def test_it_waits_in_line_and_runs_when_granted(
    start: Start, process: Callable[..., Any], conn: Connection, wait_until: Wait
) -> None:
    lease = process("acquire", "database", "--slots", "2").out.strip()
    started = start("run", "database", "--", "echo", "ran")
    wait_until(lambda: count(conn, "waiters") == 1)
    process("release", lease)
    out, _ = started.communicate(timeout=100)
    assert (started.returncode, out) == (0, "ran\n")


def test_what_was_ignored_stays_ignored(start: Start, wait_until: Wait, diary: Path) -> None:
    def as_nohup_does() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    ignoring = 'kill -HUP $$; echo "still here" >> "$0"; exec sleep 600'
    started = start("run", "database", "--", "sh", "-c", ignoring, str(diary), preexec_fn=as_nohup_does)
    wait_until(lambda: lines(diary) == ["still here"])
    started.send_signal(signal.SIGHUP)
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=100) == 128 + signal.SIGTERM


def test_the_command_starts_with_signals_as_we_had_them(process: Callable[..., Any]) -> None:
    look = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGTERM).name)"
    direct = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout
    assert process("run", "database", "--", sys.executable, "-c", look).out == direct


@needs_linux
def test_killed_itself_it_takes_the_command_along_and_the_lease_ends(
    start: Start, conn: Connection, clock: Any, wait_until: Wait, diary: Path
) -> None:
    started = start("run", "database", "--", *recorder(diary))
    wait_until(lambda: lines(diary))
    pid = int(lines(diary)[0].split()[1])
    started.kill()
    wait_until(lambda: "SIGTERM" in lines(diary))
    wait_until(lambda: not alive(pid))
    assert count(conn, "holders") == 1
    clock.advance(61)
    assert count(conn, "holders") == 0


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()  # a container may have nobody to reap orphans
    except FileNotFoundError:
        return False


def test_the_lease_is_renewed(start: Start, conn: Connection, wait_until: Wait, diary: Path) -> None:
    start("run", "database", "--lease-duration", "1", "--", *recorder(diary))
    wait_until(lambda: lines(diary))
    first = conn.execute("select acquired_at from pglimits.holders").fetchone()
    assert first is not None
    wait_until(
        lambda: conn.execute(
            "select true from pglimits.holders where acquired_at = %s and expires_at > acquired_at + '3 seconds'", first
        ).fetchone()
    )


def test_a_lost_lease_is_a_warning(start: Start, conn: Connection, wait_until: Wait, diary: Path) -> None:
    started = start("run", "database", "--lease-duration", "1", "--", *recorder(diary))
    wait_until(lambda: lines(diary))
    conn.execute("select pglimits.reset('database')")
    assert started.stderr is not None
    said = started.stderr.readline()
    assert said.startswith("Warning: the lease ") and "lost" in said
    assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=100) == 42


def test_a_lost_lease_with_strict_ends_the_command(
    start: Start, conn: Connection, wait_until: Wait, diary: Path
) -> None:
    started = start("run", "database", "--strict", "--lease-duration", "1", "--", *recorder(diary))
    wait_until(lambda: lines(diary))
    conn.execute("select pglimits.reset('database')")
    _, err = started.communicate(timeout=100)
    assert started.returncode == 1
    assert "Error: the lease " in err
    assert lines(diary)[1:] == ["SIGTERM"]


def test_a_database_that_goes_away_does_not_change_the_exit_code(
    start: Start, conn: Connection, wait_until: Wait, diary: Path
) -> None:
    started = start("run", "database", "--", *recorder(diary))
    wait_until(lambda: lines(diary))
    conn.execute("drop schema pglimits cascade")
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate(timeout=200)
    assert started.returncode == 42
    assert "Warning: could not give the slots back" in err
