"""What both shells do before they ask: check arguments, say who asks, and wrap functions."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from json.encoder import encode_basestring
from typing import Any, TypeVar, cast
from uuid import UUID

from . import _arguments
from ._batches import Kind
from ._database import Database, connection_source
from ._dsn import resolve
from ._engine import Engine, OnUnavailable, User, engine_for, kind_of
from .errors import InvalidArgument

F = TypeVar("F", bound=Callable[..., Any])
K = TypeVar("K")
T = TypeVar("T")


def who(*, task: str | None = None) -> str:
    """The default holder, as JSON: host, pid, program, and the thread or task."""
    if task is not None:
        return f'{_this_process(os.getpid())},"task":{encode_basestring(_storable(task))}}}'
    return f'{_this_process(os.getpid())},"thread":{encode_basestring(_storable(threading.current_thread().name))}}}'


def _storable(name: str) -> str:
    """A name that nobody passed, as the database takes it."""
    return name[:200].encode(errors="replace").decode().replace("\0", "?")


@functools.lru_cache(maxsize=1)
def _this_process(pid: int) -> str:
    program = os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else "python"  # noqa: PTH119
    who = {"host": _storable(socket.gethostname()), "pid": pid, "program": _storable(program)}
    return json.dumps(who, ensure_ascii=False)[:-1]


_random: list[bytes] = []
os.register_at_fork(after_in_child=_random.clear)


def new_id() -> UUID:
    """A random UUID, as ``uuid4`` makes it, but asking the system for randomness only now and then."""
    try:
        mine = _random.pop()
    except IndexError:
        block = os.urandom(16 * 256)
        _random.extend(block[at : at + 16] for at in range(16, len(block), 16))
        mine = block[:16]
    return UUID(bytes=mine, version=4)


def checked(
    names: _arguments.Names,
    occupy: int,
    timeout_seconds: float | None,
    max_retries: int | None,
    lease_duration: float,
    strict: bool,
    holder: Any,
    raise_on_lease_renewal_failure: bool | None,
    key: str,
    priority: int,
    *,
    for_rate: bool = False,
) -> tuple[Kind, str | None]:
    """Check the arguments. Returns the kind of request that they make, and the holder, as JSON, if there is one."""
    rest = (
        occupy,
        timeout_seconds,
        max_retries,
        lease_duration,
        strict,
        raise_on_lease_renewal_failure,
        key,
        priority,
        for_rate,
    )
    try:
        kind = _kind_again(names, *rest) if isinstance(names, str) else _kind(names, *rest)
    except TypeError:  # something that cannot be hashed, and so is of a wrong type
        kind = _kind(names, *rest)
    return kind, None if holder is None else _arguments.holder(holder)


def _kind(
    names: _arguments.Names,
    occupy: int,
    timeout_seconds: float | None,
    max_retries: int | None,
    lease_duration: float,
    strict: bool,
    raise_on_lease_renewal_failure: bool | None,
    key: str,
    priority: int,
    for_rate: bool,
) -> Kind:
    _arguments.optional_flag("raise_on_lease_renewal_failure", raise_on_lease_renewal_failure)
    return kind_of(
        _arguments.parts(names, occupy, key),
        _arguments.timeout(timeout_seconds, max_retries),
        _arguments.lease_duration(lease_duration),
        _arguments.whole("priority", priority),
        _arguments.flag("strict", strict),
        for_rate,
    )


# By type too: True is no number of slots.
_kind_again = functools.lru_cache(maxsize=1000, typed=True)(_kind)


def engine_of(
    user: User, dsn: str | None, pool: Any, kind_of_pool: type[Any], durable: bool, on_unavailable: OnUnavailable
) -> Engine:
    """The engine for what a limiter was given, with one more user."""
    _arguments.flag("durable", durable)
    if on_unavailable not in ("raise", "wait", "allow"):
        raise InvalidArgument(f"on_unavailable must be 'raise', 'wait' or 'allow', not {on_unavailable!r}")
    if pool is None:
        return engine_for(resolve(dsn).conninfo, durable, user)
    if dsn is not None:
        raise InvalidArgument("dsn and pool must not be given both")
    if not isinstance(pool, kind_of_pool):
        raise InvalidArgument(f"pool must be a psycopg_pool.{kind_of_pool.__name__}, not {pool!r}")
    conninfo, options = connection_source(pool)
    engine = Engine(Database(conninfo, options, pool), durable)
    engine.users.add(user)
    return engine


def leave(entered: dict[K, list[T]], who: K) -> T:
    """What a thread or task that leaves a context had entered it with.

    A context may be left by another than the one who entered it, a generator's that is finished elsewhere for
    instance: then it is what was entered last.
    """
    if who not in entered:
        who = next(reversed(entered))
    last = entered[who].pop()
    if not entered[who]:
        del entered[who]
    return last


def decorate(
    function: F,
    in_thread: Callable[[], AbstractContextManager[Any]],
    in_task: Callable[[], AbstractAsyncContextManager[Any]],
) -> F:
    """Wrap a function, sync or async, so that each call runs within a context of its own."""
    if isinstance(function, (staticmethod, classmethod)):
        return cast(F, type(function)(decorate(function.__func__, in_thread, in_task)))
    import inspect

    if not callable(function) or _is(function, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
        raise InvalidArgument(f"concurrency decorates functions and coroutine functions, not {function!r}")
    if _is(function, asyncio.iscoroutinefunction):

        @functools.wraps(function)
        async def in_task_wrapper(*args: Any, **kwargs: Any) -> Any:
            async with in_task():
                return await function(*args, **kwargs)

        return cast(F, in_task_wrapper)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with in_thread():
            result = function(*args, **kwargs)
            if isinstance(result, (Coroutine, Generator, AsyncGenerator)):
                if isinstance(result, Coroutine):
                    result.close()
                raise InvalidArgument(
                    f"{function!r} returned {result!r}, which would run when its slots have been given back: "
                    "decorate a coroutine function, or enter the context inside"
                )
            return result

    return cast(F, wrapper)


def _is(function: Callable[..., Any], *tests: Callable[[Any], bool]) -> bool:
    """Whether a function, or what an object does when it is called, passes one of the tests."""
    while isinstance(function, functools.partial):
        function = function.func
    return any(test(function) or test(type(function).__call__) for test in tests)
