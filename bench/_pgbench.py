"""pgbench: the floors, and the SQL functions as another language would call them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from psycopg.conninfo import conninfo_to_dict, make_conninfo

_TPS = re.compile(r"^tps = ([\d.]+) \((?:without initial connection time|excluding connections establishing)\)", re.M)
_TRIAL = 40
"""Transactions of each client in the trial that tells how many make up a fraction of a second."""


class PgbenchFailed(Exception):
    """What pgbench had to say."""


class Pgbench:
    """One pgbench program."""

    def __init__(self, program: Path) -> None:
        self._program = program
        self._rates: dict[tuple[str, int], float] = {}
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        self.version = said.strip()

    @classmethod
    def find(cls, beside: Path | None) -> Pgbench | None:
        """The one in a folder of PostgreSQL programs, else the one on the PATH."""
        for program in (beside / "pgbench" if beside else None, shutil.which("pgbench")):
            if program is not None and os.access(program, os.X_OK):
                return cls(Path(program))
        return None

    def rate(self, dsn: str, script: str, clients: int, seconds: float) -> float:
        """Transactions per second of a script, by so many clients, with prepared statements.

        pgbench counts whole seconds only. Less than that is given as a number of transactions, by what an earlier run
        has shown, which on the first call is a trial that also warms up.
        """
        if seconds >= 1:
            return self._run(dsn, script, clients, ["-T", str(round(seconds))])
        known = (script, clients)
        if known not in self._rates:
            self._rates[known] = self._run(dsn, script, clients, ["-t", str(_TRIAL)])
        each = max(round(self._rates[known] * seconds / clients), 10)
        self._rates[known] = self._run(dsn, script, clients, ["-t", str(each)])
        return self._rates[known]

    def make(self, dsn: str, script: str, clients: int, transactions: int, durable: bool = True) -> float:
        """Run a script so many times in all, at least once by each client. Returns the transactions per second."""
        return self._run(dsn, script, clients, ["-t", str(max(transactions // clients, 1))], durable)

    def _run(self, dsn: str, script: str, clients: int, how_long: list[str], durable: bool = True) -> float:
        target: dict[str, Any] = dict(conninfo_to_dict(dsn))
        environment = {**os.environ, "LC_ALL": "C"}
        if (password := target.pop("password", None)) is not None:
            environment["PGPASSWORD"] = str(password)
        if not durable:
            environment["PGOPTIONS"] = f"{environment.get('PGOPTIONS', '')} -c synchronous_commit=off".strip()
        threads = min(clients, os.cpu_count() or 1)
        command: list[str | Path] = [self._program, "--no-vacuum", "--protocol=prepared", "-f", "-"]
        command += [f"--client={clients}", f"--jobs={threads}", *how_long, make_conninfo(**target)]
        done = subprocess.run(command, input=script, capture_output=True, text=True, env=environment, check=False)
        found = _TPS.search(done.stdout)
        if done.returncode or found is None:
            raise PgbenchFailed(f"pgbench failed: {' '.join(done.stderr.split())[-400:]}")
        return float(found[1])
