"""The OpenAPI description, with errors as they are: problem details, in every route of /v1."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from ._v1_models import ProblemDetails

_PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}}
_EVERYWHERE = {"4XX": "What was asked is wrong, or not allowed.", "5XX": "The database is not available."}


def describe(app: FastAPI) -> None:
    """Have the application described so."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def allowed(app: FastAPI, path: str) -> set[str]:
    """The methods of a path. (Of several routes with one path, Starlette names those of the first.)"""
    found: set[str] = set()
    for template, methods in app.openapi()["paths"].items():
        pattern = "[^/]+".join(map(re.escape, re.split(r"\{\w+\}", template)))
        if re.fullmatch(pattern, path):
            found |= {method.upper() for method in methods}
    return found


def _tell_attributes(schema: dict[str, Any]) -> None:
    """Each field is described by what the docstring of its class says under ``Attributes:``."""
    text, _, told = schema.get("description", "").partition("\n\nAttributes:\n")
    for names, says in re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n     .*)*)", told, re.MULTILINE):
        schema["description"] = text
        for name in names.split(", "):
            says = " ".join(says.split()).replace("None", "null")
            schema["properties"][name].setdefault("description", says[0].upper() + says[1:])


def _described(app: FastAPI) -> dict[str, Any]:
    api = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes, servers=app.servers)
    schemas = api.setdefault("components", {}).setdefault("schemas", {})
    schemas["ProblemDetails"] = ProblemDetails.model_json_schema()
    for schema in schemas.values():
        _tell_attributes(schema)
    for path, methods in api["paths"].items():
        if not path.startswith("/v1/"):
            continue
        for operation in methods.values():
            responses = operation["responses"]
            responses.pop("422", None)  # as FastAPI would answer it
            for status, answer in responses.items():
                if status[0] in "45":
                    answer["content"] = _PROBLEM
            for status, text in _EVERYWHERE.items():
                responses.setdefault(status, {"description": text, "content": _PROBLEM})
    api["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "basic": {"type": "http", "scheme": "basic", "description": "The password is a token; the name is anything."},
    }
    api["security"] = [{"bearer": []}, {"basic": []}, {}]
    return api
