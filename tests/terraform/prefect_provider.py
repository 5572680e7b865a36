"""Writes what Prefect's provider writes into a state, as Terraform needs some provider to read such a state.

Its fields are those of ``prefect_global_concurrency_limit``. Whatever is deleted is written down in the file DELETED.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tf.iface import Resource
from tf.runner import run_provider
from tf.schema import Attribute, Schema
from tf.types import Bool, Number, String

SCHEMA = Schema(
    version=0,
    attributes=[
        *(Attribute(name, String(), computed=True) for name in ("id", "created", "updated")),
        *(Attribute(name, String(), optional=True) for name in ("account_id", "workspace_id")),
        Attribute("name", String(), required=True),
        Attribute("limit", Number(), required=True),
        Attribute("active", Bool(), optional=True, computed=True, default=True),
        Attribute("active_slots", Number(), optional=True, computed=True, default=0),
        Attribute("slot_decay_per_second", Number(), optional=True, computed=True, default=0),
    ],
)


class GlobalConcurrencyLimit(Resource):
    def __init__(self, provider: Any) -> None: ...

    @classmethod
    def get_name(cls) -> str:
        return "global_concurrency_limit"

    @classmethod
    def get_schema(cls) -> Schema:
        return SCHEMA

    def create(self, ctx: Any, planned: Any) -> Any:
        made = {"id": "4f1a2c7e-5ad5-4a6e-9b1c-0a3f5b1f7d10", "created": "2025-01-01T00:00:00Z"}
        return {**planned, **made, "updated": "2025-01-01T00:00:00Z"}

    def read(self, ctx: Any, current: Any) -> Any:
        return current

    def update(self, ctx: Any, current: Any, planned: Any) -> Any:
        return planned

    def delete(self, ctx: Any, current: Any) -> None:
        Path("DELETED").write_text(current["name"], encoding="utf-8")


class Prefect:
    def full_name(self) -> str:
        return "registry.terraform.io/prefecthq/prefect"

    def get_model_prefix(self) -> str:
        return "prefect_"

    def get_provider_schema(self, diags: Any) -> Schema:
        return Schema()

    def validate_config(self, diags: Any, config: Any) -> None: ...

    def configure_provider(self, diags: Any, config: Any) -> None: ...

    def get_resources(self) -> list[Any]:
        return [GlobalConcurrencyLimit]

    def get_data_sources(self) -> list[Any]:
        return []

    def get_functions(self) -> list[Any]:
        return []

    def new_resource(self, kind: Any) -> Any:
        return kind(self)


if __name__ == "__main__":
    run_provider(Prefect())  # type: ignore[arg-type]
