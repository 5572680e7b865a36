"""The resource ``pglimits_limit``."""

from __future__ import annotations

import contextlib
import json
import shlex
import unicodedata
from collections.abc import Mapping
from typing import Any

from tf.iface import CreateContext, DeleteContext, ImportContext, PlanContext, ReadContext, Resource, UpdateContext
from tf.schema import Schema
from tf.types import Unknown
from tf.utils import Diagnostics

from .. import _arguments
from .._definition import Definition, Named, faults_of
from ..errors import InvalidArgument, LimitExists, LimitNotFound
from ._provider import Found, PglimitsProvider
from ._schema import RESOURCE, state

State = dict[str, Any]


class LimitResource(Resource):
    """A limit, which is the same as long as its number is, by whatever name."""

    def __init__(self, provider: PglimitsProvider) -> None:
        self._provider = provider

    @classmethod
    def get_name(cls) -> str:
        return "limit"

    @classmethod
    def get_schema(cls) -> Schema:
        return RESOURCE

    def validate(self, diags: Diagnostics, type_name: str, config: State) -> None:
        decode = {each.name: each.type.decode for each in RESOURCE.attributes}
        for each in RESOURCE.attributes:
            with self._provider.told(diags, each.name):
                if each.required and config.get(each.name) is None:  # one that is left out Terraform sees itself
                    raise InvalidArgument(f"{each.name} must not be null")
                if not each.required and not each.optional and config.get(each.name) is not None:
                    raise InvalidArgument(f"{each.name} is computed, so it cannot be set")
        said = {name: decode[name](value) for name, value in config.items() if value not in (None, Unknown)}
        self._values(diags, said)

    def _values(self, diags: Diagnostics, said: Mapping[str, Any]) -> State:
        """What is said of a limit and can be right. Tells what is wrong with the rest, each fault of its attribute."""
        values = {field: said[field] for field in Named.model_fields if said.get(field) not in (None, Unknown)}
        for field, fault in faults_of(values).items():
            if values.pop(field, None) is not None:  # what is left out may be unknown yet
                with self._provider.told(diags, field):
                    raise InvalidArgument(fault)
        if self._provider.is_known:
            with self._provider.told(diags):
                for _, field, fault in self._provider.limiter._limit_faults(json.dumps([values])):
                    with self._provider.told(diags, field):
                        raise InvalidArgument(fault)
        return values

    def _wanted(self, diags: Diagnostics, planned: State) -> tuple[str, Definition] | None:
        """The name and the definition that a plan came to; None if something is wrong with them."""
        values = self._values(diags, planned)
        return None if diags.has_errors() else (values.pop("name"), Definition(**values))

    def plan(self, ctx: PlanContext, current: State | None, planned: State) -> State:
        provider, name = self._provider, planned["name"]
        if provider.is_known and current is None and name is not Unknown and not ctx.diagnostics.has_errors():
            with provider.told(ctx.diagnostics):
                if provider.by_name(name) is not None:
                    ctx.diagnostics.add_warning(*_exists(name), path=["name"])
        return planned

    def create(self, ctx: CreateContext, planned: State) -> State | None:
        # One that is there may be somebody else's, even if it is just as wanted: two states would fight over it.
        provider = self._provider
        with provider.told(ctx.diagnostics):
            wanted = self._wanted(ctx.diagnostics, planned)
            if wanted is None:
                return None
            name, of = wanted
            try:
                made = provider.limiter.create(
                    name, of.limit, of.slot_decay_per_second, of.active, of.max_waiters, of.description
                )
            except LimitExists:
                ctx.diagnostics.add_error(*_exists(name), path=["name"])
                return None
            found = provider.by_name(name)
            if found is None or found[0].created_at != made.created_at:
                raise LimitNotFound(f"somebody else deleted limit {name!r} meanwhile, or renamed it: apply again")
            return state(*found)
        return None

    def read(self, ctx: ReadContext, current: State) -> State | None:
        provider = self._provider
        if not provider.is_known:
            ctx.diagnostics.add_warning(
                f"It is not known how limit {current['name']!r} is now",
                "The provider's dsn is not known yet, so the limit is taken to be as it was.",
            )
            return current
        with provider.told(ctx.diagnostics):
            found = provider.same(current) or provider.by_name(current["name"])
            return None if found is None else state(*found)
        return current

    def update(self, ctx: UpdateContext, current: State, planned: State) -> State:
        provider = self._provider
        with provider.told(ctx.diagnostics):
            wanted = self._wanted(ctx.diagnostics, planned)
            if wanted is None:
                return current
            found = self._there(current)
            name, of = wanted
            with provider.told(ctx.diagnostics, "name" if name != current["name"] else None):
                return state(self._changed(found[0].name, name, of), found[1])
        return current

    def delete(self, ctx: DeleteContext, current: State) -> State | None:
        with self._provider.told(ctx.diagnostics):
            found = self._provider.same(current)
            if found is not None:
                with contextlib.suppress(LimitNotFound):  # just what is wanted
                    self._provider.limiter.delete(found[0].name)
            return None
        return current

    def import_(self, ctx: ImportContext, id: str) -> State | None:
        with self._provider.told(ctx.diagnostics):
            found = self._provider.by_name(_arguments.text("the name", id))
            if found is None:
                raise LimitNotFound(f"there is no limit named {id!r}")
            return state(*found)
        return None

    def _there(self, current: State) -> Found:
        found = self._provider.same(current)
        if found is None:
            raise LimitNotFound(f"limit {current['name']!r} was deleted since the plan: plan and apply again")
        return found

    def _changed(self, name: str, new_name: str | None, of: Definition) -> Any:
        limiter = self._provider.limiter
        # Terraform composes what a name is made of; one that is the same but for that stays.
        if new_name is not None and unicodedata.normalize("NFC", name) == new_name:
            new_name = None
        return limiter.update(
            name,
            limit=of.limit,
            slot_decay_per_second=of.slot_decay_per_second,
            active=of.active,
            max_waiters=-1 if of.max_waiters is None else of.max_waiters,
            description=of.description or "",
            new_name=new_name,
        )


def _exists(name: str) -> tuple[str, str]:
    """What is told of a limit that is there and not in the state: the fault, and the way on."""
    return (
        f"Limit {name!r} exists already",
        f"If no state has it, import it: terraform import ADDRESS {shlex.quote(name)}, with the address of this"
        " resource, or an import block. If this state has it under another address, write a moved block, or apply again"
        " once that one has another name.",
    )
