"""The app of procrastinate that tests/frameworks/test_procrastinate.py runs workers of."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import psycopg
from procrastinate import App, JobContext, PsycopgConnector

from pglimits.procrastinate import limited

app = App(
    connector=PsycopgConnector(conninfo=os.environ["SERVER_DSN"], min_size=1, max_size=4),
    import_paths=["procrastinate_tasks"],
)


def note(connection: psycopg.Connection[Any], context: JobContext, number: int, change: int) -> None:
    connection.execute(
        "insert into at_work (task, number, change, attempts) values (%s, %s, %s, %s)",
        [context.job.task_name, number, change, context.job.attempts],
    )


def do(context: JobContext, number: int, until: str | None = None) -> None:
    """Work until the test says so, or for a moment."""
    with psycopg.connect(os.environ["SERVER_DSN"], autocommit=True) as connection:
        note(connection, context, number, 1)
        while until and not connection.execute("select 1 from said where said = %s", [until]).fetchone():
            time.sleep(0.02)
        time.sleep(0.02)
        note(connection, context, number, -1)


@limited(app, concurrency="crowd", postpone_seconds=0.1, pass_context=True)
def in_crowd(context: JobContext, number: int) -> None:
    do(context, number)


@limited(app, concurrency="crowd", stand_seconds=0.2, postpone_seconds=0.1, pass_context=True)
async def in_crowd_too(context: JobContext, number: int) -> None:
    await asyncio.to_thread(do, context, number)


@limited(app, concurrency="one", postpone_seconds=0.1, pass_context=True, queue="one")
async def one(context: JobContext, number: int, until: str | None = None) -> None:
    await asyncio.to_thread(do, context, number, until)


@limited(app, concurrency="one", postpone_seconds=0.1, retry=2, pass_context=True, lock="fails")
def fails_twice(context: JobContext, number: int) -> None:
    do(context, number)
    if context.job.attempts < 2:
        raise ValueError("not yet")


@limited(app, rate="slow", postpone_seconds=0.1)
def at_a_rate(number: int) -> None: ...


@limited(app, concurrency="one", timeout_seconds=0.3, postpone_seconds=0.1)
def impatient(number: int) -> None: ...


@limited(app, concurrency="tenant", key=lambda tenant, **_: tenant or None, postpone_seconds=0.1, pass_context=True)
def of_tenant(context: JobContext, tenant: str, number: int, until: str | None = None) -> None:
    do(context, number, until)


@limited(app, concurrency="brief", lease_duration=1, postpone_seconds=0.1, pass_context=True, queue="doomed")
async def brief(context: JobContext, until: str) -> None:
    await asyncio.to_thread(do, context, 0, until)


@limited(app, concurrency="nowhere")
def of_nothing() -> None: ...


@limited(app, concurrency="nowhere", strict=True)
async def strictly_of_nothing() -> None: ...


@app.task(queue="one")
def unlimited() -> None: ...
