"""How Terraform's questions reach the resource: as ``tf`` does it, but for what a plan needs to know.

A field that is left out of the configuration has its default, also where it was set before; and a number stays as
somebody wrote it if the database has the same.
"""

from __future__ import annotations

import json
from typing import Any

import msgpack
from tf.gen import tfplugin_pb2 as pb
from tf.iface import PlanContext
from tf.provider import ProviderServicer
from tf.types import Unknown
from tf.utils import Diagnostics, read_dynamic_value, to_dynamic_value

_UNKNOWN = msgpack.ExtType(0, b"\0")
_PREFECT = "prefect_global_concurrency_limit"
_OF_PREFECT = {"name", "limit", "active", "slot_decay_per_second"}


class Servicer(ProviderServicer):
    """Answers what Terraform asks."""

    def GetProviderSchema(self, request: Any, context: Any) -> Any:
        answer = super().GetProviderSchema(request, context)
        answer.server_capabilities.move_resource_state = True
        return answer

    def UpgradeResourceState(self, request: Any, context: Any) -> Any:
        # Numbers of a state stay decimal. A state of an older or newer provider may have other attributes.
        state = json.loads(request.raw_state.json, parse_float=str)
        known = {name: state.get(name) for name in self._get_res_attrs(request.type_name)}
        return pb.UpgradeResourceState.Response(upgraded_state=to_dynamic_value(known))

    def PlanResourceChange(self, request: Any, context: Any) -> Any:
        config, prior = read_dynamic_value(request.config), read_dynamic_value(request.prior_state)
        if config is None:
            return pb.PlanResourceChange.Response(planned_state=request.proposed_new_state)
        diags = Diagnostics()
        attributes = self._get_res_attrs(request.type_name)
        planned = {name: _planned(each, config[name], prior) for name, each in attributes.items()}
        changed = {name for name in planned if prior is None or planned[name] != prior[name]}
        if changed:
            planned["updated"] = Unknown
        resource = self.app.new_resource(self._get_res_cls(request.type_name))
        decoded = {name: _decoded(attributes[name], value) for name, value in planned.items()}
        resource.plan(PlanContext(diags, request.type_name, changed), prior, decoded)
        return pb.PlanResourceChange.Response(planned_state=to_dynamic_value(planned), diagnostics=diags.to_pb())

    def MoveResourceState(self, request: Any, context: Any) -> Any:
        attributes = self._get_res_attrs(request.target_type_name)
        # From another registry, as from Terraform's to OpenTofu's, it is the same. Of Prefect's limit that is taken
        # which says what to read next: the limit of that name, or none, and then it is created.
        taken = {request.target_type_name: set(attributes), _PREFECT: _OF_PREFECT}.get(request.source_type_name)
        if taken is None:
            diags = Diagnostics().add_error(f"A {request.source_type_name} cannot become a {request.target_type_name}")
            return pb.MoveResourceState.Response(diagnostics=diags.to_pb())
        source = json.loads(request.source_state.json, parse_float=str)
        moved = {name: source.get(name) if name in taken else None for name in attributes}
        return pb.MoveResourceState.Response(target_state=to_dynamic_value(moved))


class Plain:
    """The same for values of which Terraform knows a part, such as how a name begins: to `tf` those are no values."""

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer

    def __getattr__(self, name: str) -> Any:
        answer = getattr(self._servicer, name)
        return lambda request, context: answer(_plain(request), context)


def _plain(request: Any) -> Any:
    for _, value in request.ListFields():
        if isinstance(value, pb.DynamicValue) and value.msgpack:
            value.msgpack = msgpack.packb(msgpack.unpackb(value.msgpack, ext_hook=lambda code, data: _UNKNOWN))
    return request


def _planned(attribute: Any, said: Any, prior: dict[str, Any] | None) -> Any:
    """What an attribute is to be, as it travels: what the configuration says, else its default."""
    before = None if prior is None else prior[attribute.name]
    if said is None and attribute.computed:
        if attribute.default is Unknown:
            return Unknown if prior is None else before
        said = attribute.type.encode(attribute.default)
    if said is None or before is None or said is Unknown:
        return said
    return (
        before if attribute.type.semantically_equal(*(_decoded(attribute, each) for each in (before, said))) else said
    )


def _decoded(attribute: Any, value: Any) -> Any:
    return value if value is Unknown else attribute.type.decode(value)
