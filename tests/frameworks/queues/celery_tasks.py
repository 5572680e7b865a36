"""The app of Celery that tests/frameworks/test_celery.py runs workers of."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from celery import Celery
from kombu.transport import filesystem
from kombu.utils.json import dumps

from pglimits import AcquireTimeout, Limiter
from pglimits.celery import limited

FOLDER = os.environ["QUEUE_FOLDER"]


def put(channel: Any, queue: str, payload: Any, **_: Any) -> None:
    """In place of the broker's own, which lets others read a message that is not written yet."""
    folder = Path(channel.data_folder_out)
    name = f"{time.monotonic_ns():020}_{uuid4()}.{queue}.msg"
    (folder / f"{name}.new").write_text(dumps(payload))
    (folder / f"{name}.new").rename(folder / name)


filesystem.Channel._put = put

app = Celery("celery_tasks", broker="filesystem://", backend=f"file://{FOLDER}/results")
app.conf.update(
    broker_transport_options={
        "data_folder_in": f"{FOLDER}/broker",
        "data_folder_out": f"{FOLDER}/broker",
        "control_folder": f"{FOLDER}/control",
        "polling_interval": 0.05,
    },
    broker_connection_retry_on_startup=True,
    result_chord_retry_interval=0.1,
    worker_hijack_root_logger=False,
)


def note(connection: psycopg.Connection[Any], task: Any, number: int, change: int) -> None:
    connection.execute(
        "insert into at_work (task, number, change, retries, fence) values (%s, %s, %s, %s, %s)",
        [task.name, number, change, task.request.retries, task.fence],
    )


def do(task: Any, number: int, until: str | None = None) -> int:
    """Work until the test says so, or for a moment."""
    with psycopg.connect(os.environ["SERVER_DSN"], autocommit=True) as connection:
        note(connection, task, number, 1)
        while until and not connection.execute("select 1 from said where said = %s", [until]).fetchone():
            time.sleep(0.02)
        time.sleep(0.02)
        note(connection, task, number, -1)
    return number


@app.task(base=limited(concurrency="crowd"), bind=True)
def in_crowd(self: Any, number: int) -> int:
    return do(self, number)


@app.task(base=limited(concurrency="one"), bind=True)
def one(self: Any, number: int, plus: int = 0, until: str | None = None) -> int:
    return do(self, number, until) + plus


@app.task(base=limited(concurrency="brief", lease_duration=1), bind=True)
def brief(self: Any, number: int, until: str | None = None) -> int:
    return do(self, number, until)


@app.task(base=limited(rate="slow"), bind=True)
def at_a_rate(self: Any, number: int) -> int:
    return do(self, number)


@app.task(base=limited(concurrency="one", rate="slow", timeout_seconds=0.2), bind=True)
def impatient(self: Any, number: int) -> int:
    return do(self, number)


@app.task(
    base=limited(concurrency="one", timeout_seconds=0.2),
    bind=True, autoretry_for=(AcquireTimeout,), default_retry_delay=0, max_retries=200,
)  # fmt: skip
def persistent(self: Any, number: int) -> tuple[int, bool]:
    return do(self, number), self.request.retries > 0


@app.task(base=limited(concurrency="tenant", key=lambda tenant, *_, **__: tenant or None), bind=True)
def of_tenant(self: Any, tenant: str, number: int, until: str | None = None) -> int:
    return do(self, number, until)


@app.task(base=limited(concurrency="one", hold_seconds=0.3), bind=True)
def sent_anew(self: Any, number: int) -> tuple[int, Any]:
    return do(self, number), self.request.headers


def out_of_reach() -> Limiter:
    return Limiter("host=127.0.0.1 port=1 connect_timeout=1")


@app.task(base=limited(concurrency="one", timeout_seconds=0.5, limiter=out_of_reach))
def unreachable() -> None: ...


@app.task(base=limited(concurrency="nowhere"), bind=True)
def of_nothing(self: Any, number: int) -> int:
    return do(self, number)


@app.task(base=limited(concurrency="nowhere", strict=True))
def strictly_of_nothing() -> None: ...


@app.task(base=limited(concurrency="one"), bind=True, max_retries=2, acks_late=True)
def fails_twice(self: Any, number: int) -> int:
    do(self, number)
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return int(self.request.retries)


@app.task(base=limited(concurrency="one"), bind=True, time_limit=1)
def too_long(self: Any) -> int:
    return do(self, 0, "never")


@app.task
def unlimited(number: int) -> int:
    return number


@app.task
def add(numbers: int | list[int], more: int = 0) -> int:
    return (sum(numbers) if isinstance(numbers, list) else numbers) + more


@app.task
def said(*_: Any, word: str) -> None:
    with psycopg.connect(os.environ["SERVER_DSN"], autocommit=True) as connection:
        connection.execute("insert into said values (%s)", [word])
