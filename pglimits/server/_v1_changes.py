"""The stream of changes, as server-sent events."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterable, Iterable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import AfterValidator
from pydantic_core import to_json

from ._auth import reading
from ._changes import Change
from ._live import Live
from ._v1_models import _storable

_Names = Annotated[list[Annotated[str, AfterValidator(_storable)]] | None, Query(max_length=100)]


def encode(value: Any) -> str:
    """As JSON; what JSON cannot say is null."""
    return to_json(value, inf_nan_mode="null").decode()


def add_to(routes: APIRouter) -> None:
    """Add these routes."""

    @routes.get("/changes", tags=["changes"], response_class=EventSourceResponse, dependencies=[Depends(reading)])
    async def changes(
        request: Request,
        name: Annotated[_Names, Query(description="Only these limits.")] = None,
        only: Annotated[Literal["limits", "events"] | None, Query(description="Only one of the two.")] = None,
        last_event_id: Annotated[str | None, Header(include_in_schema=False)] = None,
        after: Annotated[int | None, Query(ge=0, le=2**63 - 1, description="The last event that you have.")] = None,
    ) -> AsyncIterable[ServerSentEvent]:
        """What changes, as it does.

        ``limits``: rows that changed (``first``: all of them) and names that are ``gone``. ``event``: one of
        /v1/events, with its id, from which a stream goes on that is asked for again. ``missed``: there were more
        events than are sent, of which the newest follow. ``database``: since when it has not been reached, or
        not answered in time, or null.
        """
        live: Live = request.app.state.live
        if last_event_id is not None and last_event_id.isascii() and last_event_id.isdigit():
            after = min(int(last_event_id[:19]), 2**63 - 1)
        wanted = None if name is None else frozenset(name)
        async with contextlib.aclosing(live.stream(after=after, events=only != "limits")) as stream:
            async for change in stream:
                for event in _events(change, wanted, only):
                    yield event


def _events(change: Change, wanted: frozenset[str] | None, only: str | None) -> Iterable[ServerSentEvent]:
    """What a stream is told of a change."""
    if change.database_changed:
        yield ServerSentEvent(event="database", raw_data=encode({"down_since": change.down_since}))
    if only != "events" and (change.first or change.limits or change.gone):
        if wanted is None:
            yield ServerSentEvent(event="limits", raw_data=change.shared(encode_limits))
        else:
            limits = [row for row in change.limits if row["name"] in wanted]
            gone = [name for name in change.gone if name in wanted]
            if change.first or limits or gone:
                yield ServerSentEvent(
                    event="limits",
                    raw_data=encode({"at": change.at, "first": change.first, "limits": limits, "gone": gone}),
                )
    if only != "limits":
        if change.missed:
            yield ServerSentEvent(event="missed", raw_data="null")
        for row in change.events:
            if wanted is None or row["name"] in wanted:
                yield ServerSentEvent(event="event", id=str(row["event_id"]), raw_data=encode(row))


def encode_limits(change: Change) -> str:
    return encode({"at": change.at, "first": change.first, "limits": change.limits, "gone": change.gone})
