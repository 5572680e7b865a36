"""The API as a page, drawn from its OpenAPI description: plain HTML without scripts, and nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from typing import Any, TypeAlias

from fastapi import APIRouter, Depends, Request
from starlette.responses import HTMLResponse, Response

from ._auth import reading

Schema: TypeAlias = dict[str, Any]

_METHODS = ("get", "post", "patch", "put", "delete")
_BOUNDS = (
    ("from {}", "minimum"),
    ("to {}", "maximum"),
    ("at most {} characters", "maxLength"),
    ("default {}", "default"),
)
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid; }
details { margin: .4rem 0; padding: .4rem .6rem; border: 1px solid color-mix(in srgb, currentColor 25%, transparent); }
summary { cursor: pointer; overflow-wrap: anywhere; }
code { font: 13px ui-monospace, monospace; }
summary b { display: inline-block; min-width: 4.5rem; }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto; }
td, th { text-align: left; vertical-align: top; padding: .15rem .8rem .15rem 0; }
p { max-width: 45rem; }
"""


def router() -> APIRouter:
    """``/docs``, and its style."""
    routes = APIRouter(include_in_schema=False, dependencies=[Depends(reading)])

    @routes.get("/docs")
    async def docs(request: Request) -> HTMLResponse:
        root = request.scope.get("root_path", "")
        return HTMLResponse(_page(request.app.openapi(), root))

    @routes.get("/docs.css")
    async def style() -> Response:
        return Response(_STYLE, media_type="text/css")

    return routes


def _page(api: Schema, root: str) -> str:
    by_tag: dict[str, list[str]] = {}
    for path, methods in api["paths"].items():
        for method in _METHODS:
            if method in methods:
                operation = methods[method]
                tag = (operation.get("tags") or ["more"])[0]
                by_tag.setdefault(tag, []).append("".join(_operation(api, path, method, operation)))
    by_tag["types"] = ["".join(_type(api, name, schema)) for name, schema in _types(api)]
    sections = "".join(f"<h2>{escape(tag)}</h2>{''.join(found)}" for tag, found in by_tag.items())
    title = escape(f"{api['info']['title']} {api['info']['version']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: API</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="stylesheet" href="{escape(root)}/docs.css"></head><body><h1>{title}</h1>'
        f"<p>{escape(api['info'].get('summary', ''))} For tools: "
        f'<a href="{escape(root)}/openapi.json">openapi.json</a>. A token goes into the header '
        f"<code>Authorization: Bearer …</code>. Errors are problem details (RFC 9457).</p>{sections}</body></html>"
    )


def _operation(api: Schema, path: str, method: str, operation: Schema) -> Iterator[str]:
    text = operation.get("description") or operation.get("summary", "")
    first, _, rest = text.partition("\n\n")
    yield (f"<details><summary><code><b>{method.upper()}</b> {escape(path)}</code> {_prose(first)}</summary>")
    for paragraph in rest.split("\n\n"):
        if paragraph.strip():
            yield f"<p>{_prose(paragraph)}</p>"
    parameters = [
        (found["name"], found.get("schema", {}), found.get("required", False), found.get("description", ""))
        for found in operation.get("parameters", [])
    ]
    if parameters:
        yield _table(api, "Parameters", parameters)
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body is not None:
        yield _table(api, "Body", _fields(api, body))
    for status, answer in operation.get("responses", {}).items():
        schema = answer.get("content", {}).get("application/json", {}).get("schema")
        if schema is not None and status.startswith("2"):
            yield _table(api, f"Answer {status}: {answer.get('description', '')}", _fields(api, schema))
    yield "</details>"


def _types(api: Schema) -> list[tuple[str, Schema]]:
    """The objects that are fields of others, by name."""
    named: set[str] = set()

    def collect(found: Any) -> None:
        for value in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
            collect(value)
        if isinstance(found, dict) and "$ref" in found:
            named.add(found["$ref"].rpartition("/")[2])

    schemas = api["components"]["schemas"]
    for name, schema in schemas.items():
        if name not in ("HTTPValidationError", "ProblemDetails"):
            collect(schema.get("properties", {}))
    return [(name, schemas[name]) for name in sorted(named) if "properties" in schemas[name]]


def _type(api: Schema, name: str, schema: Schema) -> Iterator[str]:
    text = schema.get("description", "")
    yield f"<details><summary><code>{escape(name)}</code> {_prose(text)}</summary>"
    yield f"{_table(api, 'Fields', _fields(api, schema))}</details>"


def _fields(api: Schema, schema: Schema) -> list[tuple[str, Schema, bool, str]]:
    """The fields of an object, or of what a list of them has."""
    schema = _resolved(api, schema)
    required = schema.get("required", [])
    return [
        (name, field, name in required, field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    ]


def _table(api: Schema, title: str, fields: list[tuple[str, Schema, bool, str]]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_kind(api, schema))}{', needed' if needed else ''}</td>"
        f"<td>{_prose(text or schema.get('description', ''))}{escape(_bounds(schema))}</td></tr>"
        for name, schema, needed, text in fields
    )
    return f"<p>{escape(title)}</p><table>{rows}</table>" if rows else ""


def _prose(text: str) -> str:
    """A text of the description, with its ``code``."""
    return re.sub("``(.+?)``", r"<code>\1</code>", escape(" ".join(text.split())))


def _bounds(schema: Schema) -> str:
    """What a value may be, and what it is if it is not sent."""
    all_of = [schema, *schema.get("anyOf", [])]
    told = [
        said.format(found)
        for said, name in _BOUNDS
        if (found := next((one[name] for one in all_of if name in one), None)) not in (None, "")
    ]
    return f" ({', '.join(told)})" if told else ""


def _resolved(api: Schema, schema: Schema) -> Schema:
    """What a reference stands for; of alternatives, the first that is an object."""
    while "$ref" in schema:
        schema = api["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for one in schema.get("anyOf", []):
        found = _resolved(api, one)
        if "properties" in found:
            return found
    return schema


def _kind(api: Schema, schema: Schema) -> str:
    """A type in words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(_kind(api, one) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_kind(api, schema.get('items', {}))}"
    return str(schema.get("format") or schema.get("type", "JSON"))
