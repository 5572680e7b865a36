"""Routes of /v1 that show and change limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import AfterValidator

from ..errors import LimitNotFound
from ..models import Limit
from . import _v1_models as models
from ._auth import Caller, reading, writing
from ._database import Database

Reader = Annotated[Caller, Depends(reading)]
Writer = Annotated[Caller, Depends(writing)]
Name = Annotated[str, Path(max_length=200, description="The limit."), AfterValidator(models._storable)]
NameFilter = Annotated[str | None, Query(max_length=200), AfterValidator(lambda t: t and models._storable(t))]
Most = Annotated[int, Query(ge=1, le=1000, description="Rows at most.")]
Skip = Annotated[int, Query(ge=0, le=10_000_000, description="Rows to skip.")]

_LIMIT = """
    select l.name, l."limit", l.held, l.waiting, l.active, l.slot_decay_per_second, l.level, l.max_waiters,
           l.description, l.created_at, l.updated_at
    from pglimits.limits l
"""
_SORTS = {
    "name": "name",
    "busiest": 'waiting desc, active desc, greatest(held, level) / greatest("limit", 1)::float8 desc, name',
    "held": "held desc, name",
    "waiting": "waiting desc, name",
    "level": "level desc, name",
    "limit": '"limit" desc, name',
    "created_at": "created_at desc, name",
    "updated_at": "updated_at desc, name",
}
Sort = Literal["name", "busiest", "held", "waiting", "level", "limit", "created_at", "updated_at"]


def database(request: Request) -> Database:
    found = request.app.state.db
    assert isinstance(found, Database)
    return found


async def the_limit(db: Database, name: str) -> dict[str, Any]:
    """One limit as it stands now. Raises LimitNotFound."""
    found = await db.row(_LIMIT + "where l.name = %s", [name])
    if found is None:
        raise LimitNotFound(f"there is no limit named {name!r}")
    return found


async def paged(
    db: Database, called: str, query: str, order: str, limit: int, offset: int, **params: Any
) -> dict[str, Any]:
    """One page of the rows of a query, as an answer has them, and how many there are on all pages."""
    rows = await db.rows(
        f"""
        with found as (select q.*, row_number() over (order by {order}) as place from ({query}) q)
        select f.total, p.*
        from (select count(*)::int as total from found) f
        left join lateral (select * from found order by place limit %(limit)s offset %(offset)s) p on true
        order by p.place
        """,
        {"limit": limit, "offset": offset, **params},
    )
    return {called: [row for row in rows if row["place"] is not None], "total": rows[0]["total"]}


def add_to(routes: APIRouter) -> None:
    """Add these routes."""

    @routes.get("/limits", tags=["limits"], response_model=models.Limits)
    async def list_limits(
        request: Request,
        _: Reader,
        name: Annotated[NameFilter, Query(description="Only names that contain this.")] = None,
        active: Annotated[bool | None, Query(description="Only those that are enforced, or not.")] = None,
        kind: Annotated[Literal["concurrency", "rate"] | None, Query()] = None,
        sort: Sort = "name",
        limit: Most = 100,
        offset: Skip = 0,
    ) -> dict[str, Any]:
        """Limits, and how much of each is used."""
        return await paged(
            database(request),
            "limits",
            f"""
            {_LIMIT} where (%(name)s::text is null or strpos(lower(l.name), lower(%(name)s)) > 0)
              and (%(active)s::boolean is null or l.active = %(active)s)
              and (%(rate)s::boolean is null or (l.slot_decay_per_second > 0) = %(rate)s)
            """,
            _SORTS[sort],
            limit,
            offset,
            name=name,
            active=active,
            rate=None if kind is None else kind == "rate",
        )

    @routes.post("/limits", tags=["limits"], status_code=201, response_model=Limit)
    async def create_limit(
        request: Request, response: Response, caller: Writer, body: models.NewLimit
    ) -> dict[str, Any]:
        """Create a limit."""
        db = database(request)
        await db.run(
            "select pglimits.create_limit(%s, %s::int, %s::float8, %s::boolean, %s::int, %s::text)",
            [body.name, body.limit, body.slot_decay_per_second, body.active, body.max_waiters, body.description],
            by=caller.name,
        )
        request.app.state.budgets.forget(body.name)
        response.headers["Location"] = f"{request.scope.get('root_path', '')}/v1/limits/{quote(body.name, safe='')}"
        return await the_limit(db, body.name)

    @routes.get("/limits/{name}", tags=["limits"], response_model=Limit)
    async def get_limit(request: Request, _: Reader, name: Name) -> dict[str, Any]:
        """One limit."""
        return await the_limit(database(request), name)

    @routes.patch("/limits/{name}", tags=["limits"], response_model=Limit)
    async def update_limit(request: Request, caller: Writer, name: Name, body: models.LimitChange) -> dict[str, Any]:
        """Change what is sent, at once."""
        db = database(request)
        sent = {field: getattr(body, field) for field in body.model_fields_set}
        if "max_waiters" in sent and sent["max_waiters"] is None:
            sent["max_waiters"] = -1
        if "description" in sent and sent["description"] is None:
            sent["description"] = ""
        await db.run(
            "select pglimits.update_limit(%s, %s::int, %s::float8, %s::boolean, %s::int, %s::text, %s::text)",
            [
                name,
                *(sent.get(f) for f in ("limit", "slot_decay_per_second", "active", "max_waiters", "description")),
                sent.get("name"),
            ],
            by=caller.name,
        )
        request.app.state.budgets.forget(name, sent.get("name", name))
        return await the_limit(db, sent.get("name", name))

    @routes.delete("/limits/{name}", tags=["limits"], status_code=204)
    async def delete_limit(request: Request, caller: Writer, name: Name) -> None:
        """Delete a limit with its leases. Its waiters are told."""
        await database(request).run("select pglimits.delete_limit(%s)", [name], by=caller.name)
        request.app.state.budgets.forget(name)

    @routes.post("/limits/{name}/reset", tags=["limits"])
    async def reset(request: Request, caller: Writer, name: Name, body: models.OneKey | None = None) -> dict[str, int]:
        """End every lease of a limit, or of one key, and set its level to zero."""
        row = await database(request).row(
            "select pglimits.reset(%s, %s::text) as ended",
            [name, None if body is None else body.key],
            by=caller.name,
            writes=True,
        )
        return {"ended": 0 if row is None else row["ended"]}

    @routes.post("/limits/{name}/adjust", tags=["limits"])
    async def adjust(request: Request, caller: Writer, name: Name, body: models.Adjustment) -> dict[str, float]:
        """Correct the level of a rate limit after the fact: up, even past the limit, or down, never below zero."""
        row = await database(request).row(
            "select pglimits.adjust(%s, %s::int, %s) as level",
            [name, body.slots, body.key],
            by=caller.name,
            writes=True,
        )
        return {"level": 0.0 if row is None else row["level"]}
