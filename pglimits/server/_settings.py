"""How a server is to run."""

from __future__ import annotations

from dataclasses import dataclass, field

from ._auth import Token


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server is to run.

    Attributes:
        dsn: the database; None takes PGLIMITS_DSN, then DATABASE_URL, then the embedded server.
        durable: False commits grants with ``synchronous_commit = off``, as ``Limiter(durable=False)`` does.
        tokens: who may use it. Without any, everybody who reaches it may do everything.
        root_path: the path under which a proxy shows it, such as ``/pglimits``. Not one of the server's
            own paths, such as ``/limits``.
        hosts: names by which it may be called without tokens, besides those of the loopback interface.
        sweep_every: seconds between two sweeps; 0 for none.
        longest_wait: seconds for which one HTTP request is held at most.
        largest_body: bytes that the body of a request may have.
    """

    dsn: str | None = None
    durable: bool = True
    tokens: tuple[Token, ...] = field(default=(), repr=False)
    root_path: str = ""
    hosts: tuple[str, ...] = ()
    sweep_every: float = 60.0
    longest_wait: float = 600.0
    largest_body: int = 1_000_000
