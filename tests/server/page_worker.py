"""One of a crowd: takes a slot, keeps it for a moment, gives it back, again and again."""

from __future__ import annotations

import random
import sys
import time

from pglimits import AcquireTimeout, Limiter, PglimitsError


def main(dsn: str, name: str, key: str) -> None:
    limiter = Limiter(dsn, durable=False)
    print("at work", flush=True)
    while True:
        try:
            with limiter.concurrency(name, key=key, timeout_seconds=5, holder={"program": "<b>worker</b>", "pid": 1}):
                time.sleep(random.uniform(0.01, 0.2))
        except AcquireTimeout:
            pass
        except PglimitsError:
            time.sleep(0.1)


main(*sys.argv[1:])
