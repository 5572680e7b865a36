"""Writes docs/reference/*.md from the comments of the database, the docstrings, the commands and the routes:
``python docs/reference.py``. A test says when they are no longer current."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg

from pglimits import Lease

FOLDER = Path(__file__).resolve().parent / "reference"
Connection = psycopg.Connection[Any]

# Markdown.


def prose(text: str, names: Iterable[str] = ()) -> str:
    """A text as Markdown: ``code`` as such, nothing else as markup, and the names that a colon explains as code."""
    parts = re.split(r"(``.+?``)", text)
    for n, part in enumerate(parts):
        if n % 2:
            parts[n] = part[1:-1]
            continue
        part = re.sub(r"([*\[\]\\])", r"\\\1", part.replace("&", "&amp;").replace("<", "&lt;"))
        part = re.sub(r"(?<![\w.])_", r"\\_", part)
        for name in names:
            part = re.sub(rf"(?<![\w`.]){re.escape(name)}(?=: )", f"`{name}`", part)
        parts[n] = part
    return "".join(parts)


def paragraphs(text: str, names: Iterable[str] = ()) -> str:
    """Folded lines as paragraphs; lines that are set off are code, each a paragraph of its own."""
    found: list[str] = []
    text = re.sub(r"(?<=[.)])\s+(?=Errors: )", "\n\n", text)
    for paragraph in re.split(r"\n\n+", text.strip()):
        for is_code, lines in itertools.groupby(paragraph.split("\n"), lambda line: line.startswith("  ")):
            each = list(lines)
            found += [code(line.strip()) for line in each] if is_code else [listed(prose(" ".join(each), names))]
    return "\n\n".join(found)


def listed(text: str) -> str:
    """A paragraph that explains several names, as a list of them."""
    intro, *items = re.split(r"(?<=[.;:)] )(?=`\w+`: )", text)
    if intro.startswith("`"):
        intro, items = "", [intro, *items]
    if len(items) < 3:
        return text
    return "\n\n".join(filter(None, [intro.strip(), "\n".join(f"- {item.strip().rstrip(chr(59))}" for item in items)]))


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Nothing, if there is no row. A bar would end a cell, or be shown with its backslash: it becomes a word."""
    heads, rows = list(heads), [list(row) for row in rows]
    lines = [heads, ["---"] * len(heads), *rows] if rows else []
    return "\n".join(f"| {' | '.join(re.sub(r' ?[|] ?', ' or ', cell) for cell in line)} |" for line in lines)


def code(text: object) -> str:
    return f"`{text}`" if str(text) else ""


def page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", *(part.strip("\n") for part in parts if part.strip())]) + "\n"


# SQL.

ROUTINES = """
select p.proname::text as name, p.prokind::text as kind, obj_description(p.oid, 'pg_proc') as comment,
       array(select a.grantee::regrole::text from aclexplode(p.proacl) a where a.privilege_type = 'EXECUTE') as roles,
       pg_get_function_result(p.oid) as result,
       array(select row(n.name, coalesce(p.proargmodes[n.nth], 'i'), format_type(t.type, null),
                        regexp_replace(pg_get_function_arg_default(p.oid, n.nth::int), '::[a-z ]+(\\[\\])?', '', 'g'))
             from unnest(p.proargnames) with ordinality n(name, nth)
             join unnest(coalesce(p.proallargtypes, p.proargtypes::oid[])) with ordinality t(type, nth) using (nth)
             order by nth) as arguments,
       array(select row(a.attname, format_type(a.atttypid, a.atttypmod)) from pg_type y
             join pg_attribute a on a.attrelid = y.typrelid and a.attnum > 0 and not a.attisdropped
             where y.oid = p.prorettype order by a.attnum) as columns
from pg_proc p where p.pronamespace = 'pglimits'::regnamespace and p.proname not like '\\_%' order by 1
"""
VIEWS = """
select c.relname::text, obj_description(c.oid, 'pg_class'),
       array(select row(a.attname, format_type(a.atttypid, a.atttypmod)) from pg_attribute a
             where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped order by a.attnum)
from pg_class c
where c.relnamespace = 'pglimits'::regnamespace and c.relkind = 'v' and c.relname not like '\\_%' order by 1
"""
ROLES = {
    "pglimits_user": "For those who acquire",
    "pglimits_reader": "For those who look",
    "pglimits_admin": "For administrators",
}


def sql(connection: Connection) -> str:
    """Of a database in which pglimits is installed."""
    routines = connection.execute(ROUTINES).fetchall()
    groups: dict[str, list[Any]] = {role: [] for role in ROLES}
    for routine in routines:
        groups[next(role for role in ROLES if role in routine[3])].append(routine)
    parts = [
        "The functions, procedures and views of the schema `pglimits`, with their comments. In psql,"
        " `\\df+ pglimits.acquire` shows the same. Durations are in seconds, everywhere. Arguments can be passed by"
        " name: `timeout_seconds => 60`. Names that begin with an underscore are private.",
    ]
    for role, title in ROLES.items():
        may = "" if role == "pglimits_admin" else " or `pglimits_admin`"
        parts += [f"## {title}", f"These need the role `{role}`{may}."]
        if role == "pglimits_reader":
            parts += [view(*found) for found in connection.execute(VIEWS).fetchall()]
        for found in groups[role]:
            parts += routine_parts(*found)
    errors = connection.execute("select code, kind, meaning from pglimits.errors()").fetchall()
    parts += [
        "## Errors",
        "`select * from pglimits.errors()` lists them. The kind is the name of the error in Python.",
        table(
            ["SQLSTATE", "kind", "meaning"], ([code(code_), code(kind), prose(says)] for code_, kind, says in errors)
        ),
    ]
    return page("SQL reference", *parts)


def view(name: str, comment: str, columns: list[tuple[str, str]]) -> str:
    rows = table(["column", "type"], ([code(column), kind] for column, kind in columns))
    return f"### View {name}\n\n{paragraphs(comment, [column for column, _ in columns])}\n\n{rows}"


def routine_parts(
    name: str, kind: str, comment: str, _: object, result: str | None, arguments: list[Any], columns: list[Any]
) -> Iterator[str]:
    yield f"### {'Procedure ' if kind == 'p' else ''}{name}"
    given = [(name, of, default) for name, mode, of, default in arguments if mode in "ib"]
    answered = [(name, of) for name, mode, of, _ in arguments if mode in "bt"] or columns
    yield paragraphs(comment, [*(name for name, *_ in given), *(name for name, _ in answered)])
    # A procedure's arguments that are only there to answer have no place among those that are given.
    answers = {name for name, _ in answered} - {"lease_id"} if kind == "p" else set()
    rows = ([code(name), of, code(default or "")] for name, of, default in given if name not in answers)
    yield table(["argument", "type", "default"], rows)
    if answered:
        row = "rows" if result and result.startswith("TABLE") else "one row"
        yield f"Answers {row}:"
        yield table(["column", "type"], ([code(name), of] for name, of in answered))
    elif result and result != "void":
        yield f"Returns {result}."


# Python.

MODULES = {
    "pglimits": ("Limiter", "AsyncLimiter", "Lease", "Use", "AsyncUse", "install", "Installed"),
    "pglimits.sync": ("concurrency", "rate_limit", "acquire"),
    "pglimits.asyncio": (),
    "pglimits.models": None,
    "pglimits.errors": None,
    "pglimits.metrics": ("enable", "flush", "disable"),
    "pglimits.otel": ("enable", "flush", "disable"),
    "pglimits.starlette": None,
    "pglimits.django": None,
    "pglimits.httpx": None,
    "pglimits.sqlalchemy": None,
    "pglimits.celery": None,
    "pglimits.procrastinate": None,
    "pglimits.pytest": None,
}
"""The public modules, and what is told of each; None: all that it exports. Those of asyncio are as those of sync."""


def python() -> str:
    parts = [
        "The signatures and docstrings of the public modules. The [tutorial](../tutorial.md) shows how to use them,"
        " and so do [Frameworks](../frameworks.md), [Task queues](../task-queues.md) and [Metrics](../metrics.md)."
    ]
    for name, wanted in MODULES.items():
        module = importlib.import_module(name)
        parts += [f"## {name}", docstring(module)]
        if name == "pglimits.errors":
            parts.append(errors(module))
            continue
        for each in module.__all__ if wanted is None else wanted:
            parts += members(name, each, getattr(module, each))
    return page("Python reference", *parts)


def members(module: str, name: str, found: Any) -> Iterator[str]:
    """A class with its methods, or a function."""
    inner = module.removeprefix("pglimits").removeprefix(".models").removeprefix(".pytest").removeprefix(".")
    title = f"{inner}.{name}" if inner else name
    yield f"### {title}"
    if not inspect.isclass(found):
        if module == "pglimits.pytest":  # a fixture is not called
            yield docstring(found.__wrapped__ if hasattr(found, "__wrapped__") else found._fixture_function)
        else:
            yield signature(title, found)
            yield docstring(found)
        return
    if found.__base__ is Lease:
        yield docstring(found)
        yield "It has the attributes and methods of `Lease`, and `settle`."
    elif dataclasses.is_dataclass(found):
        yield docstring(found)
        fields = ((field.name, field.type) for field in dataclasses.fields(found))
        yield table(["field", "type"], ([code(field), code(of)] for field, of in fields if not field.startswith("_")))
    else:
        yield signature(title, found)
        yield docstring(found)
        if "__init__" in vars(found) and found.__init__.__doc__:
            yield docstring(found.__init__)
    if name == "AsyncLimiter":
        yield "It has the methods of `Limiter` as coroutines, and `concurrency` for `async with`."
        return
    for method, of in inspect.getmembers(
        found, lambda member: inspect.isfunction(member) or isinstance(member, property)
    ):
        if method.startswith("_") or not of.__doc__ or not in_here(of):
            continue
        if found.__base__ is Lease and hasattr(Lease, method):
            continue
        yield f"#### {title}.{method}"
        if not isinstance(of, property):
            yield signature(f"{title}.{method}", of)
        yield docstring(of)


def in_here(found: Any) -> bool:
    return str(getattr(found, "__module__", "pglimits")).startswith("pglimits")


def signature(name: str, found: Any) -> str:
    """As it is called, in a line or one line an argument."""
    of = inspect.signature(found)
    given = [each for each in of.parameters.values() if each.name != "self"]
    words, star = [], False
    for each in given:
        if each.kind is each.KEYWORD_ONLY and not star:
            words.append("*")
        star = star or each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        words.append(
            re.sub(r"<(?:function|class) \W?(?:\w+\.)*(\w+)\b[^>]*>", r"\1", str(each.replace(annotation=each.empty)))
        )
        words[-1] = words[-1].replace("'", '"')
    line = f"{name}({', '.join(words)})"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {word},\n" for word in words) + ")"
    return f"```py\n{line}\n```"


LISTS = {
    "Args:": "Arguments",
    "Attributes:": "Attributes",
    "Raises:": "Raises",
    "Returns:": "Returns",
    "Settings:": "Settings",
}


def docstring(found: Any) -> str:
    """Arguments and what is raised as lists."""
    text = inspect.getdoc(found) or ""
    told = []
    for section in re.split(r"\n\n(?=\S)", text):
        head, _, body = section.partition("\n")
        if head not in LISTS:
            told.append(paragraphs(section.replace(":\n\n    ", ":\n\n")))
            continue
        entries = re.split(r"\n(?=    \S)", body)
        items = (re.fullmatch(r"    (\*{0,2}\w+(?:, \w+)*): (.*)", entry, re.DOTALL) for entry in entries)
        told.append(
            f"{LISTS[head]}:\n\n"
            + "\n".join(
                f"- {', '.join(map(code, item[1].split(', ')))}: {prose(' '.join(item[2].split()))}"
                if item
                else f"- {prose(' '.join(entry.split()))}"
                for item, entry in zip(items, entries, strict=True)
            )
        )
    return "\n\n".join(told)


def errors(module: ModuleType) -> str:
    rows = []
    for name in module.__all__:
        of = getattr(module, name)
        bases = [base.__name__ for base in of.__bases__ if base is not module.PglimitsError]
        rows.append([code(name), ", ".join(map(code, bases)), prose(" ".join((of.__doc__ or "").split()))])
    return table(["error", "also a", "meaning"], rows)


# The commands: by their functions, as what Typer makes of them differs with its version.


def cli() -> str:
    from pglimits_cli._commands import FAMILIES

    parts = [
        "What `pglimits COMMAND --help` says. Without `--dsn` the database is that of `PGLIMITS_DSN`, else of"
        " `DATABASE_URL`, else the embedded server. With `-o json` a command prints JSON."
    ]
    for family, names in FAMILIES.items():
        app = importlib.import_module(f"pglimits_cli.{family}").app
        if app.info.name in names:
            parts += [part for found in commands(app, f"pglimits {app.info.name}") for part in found]
        else:
            of = {found.callback.__name__: found.callback for found in app.registered_commands}
            parts += [part for name in names for part in command(f"pglimits {name}", of[name])]
    return page("Commands", *parts)


def commands(app: Any, path: str) -> Iterator[Iterable[str]]:
    """Of a group, and the groups in it."""
    for found in app.registered_commands:
        yield command(f"{path} {found.name or found.callback.__name__.replace('_', '-')}", found.callback)
    for group in app.registered_groups:
        yield from commands(group.typer_instance, f"{path} {group.name or group.typer_instance.info.name}")


def command(path: str, function: Any) -> Iterator[str]:
    yield f"## {path}"
    told = [" ".join(part.split()) for part in (inspect.getdoc(function) or "").split("\n\n")]
    # Typer takes brackets for markup, unless they are escaped.
    yield "\n\n".join(prose(part.replace("\\[", "[")) for part in told if not part.startswith("Example: "))
    usage, rows = [path], []
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        of, *infos = typing.get_args(hints[parameter.name]) or (hints[parameter.name],)
        if not infos or getattr(infos[0], "hidden", False):
            continue
        (info,) = infos
        is_needed = parameter.default is parameter.empty
        if type(info).__name__ == "ArgumentInfo":
            name = f"{info.metavar or parameter.name.upper()}{'...' * ('list' in str(of))}"
            usage.append(name if is_needed else f"[{name}]")
        else:
            decls = [*([info.default] if isinstance(info.default, str) else ()), *(info.param_decls or ())]
            takes = info.metavar or ("" if "bool" in str(of) else "VALUE")
            name = f"{', '.join(decls)} {takes}".strip()
        is_told = info.show_default is not False and parameter.default not in (None, False, "", parameter.empty)
        says = [prose(info.help or ""), "Needed." * is_needed, f"Default: {parameter.default}." if is_told else ""]
        rows.append([code(name), " ".join(filter(None, says))])
    usage[1:1] = ["[OPTIONS]"] * any(row[0].startswith("`-") for row in rows)
    yield code(" ".join(usage) + " -- COMMAND..." * (path == "pglimits run"))
    yield table(["argument or option", "meaning"], rows)
    examples = [code(part.removeprefix("Example: ")) for part in told if part.startswith("Example: ")]
    yield "\n".join(["Examples:\n" * bool(examples), *(f"- {example}" for example in examples)])


# HTTP.


def http() -> str:
    from pglimits.server import Settings, _docs, create_app

    api = create_app(Settings(dsn="host=127.0.0.1")).openapi()  # it is not asked for anything
    parts = [
        "What `pglimits serve` answers to. The running server has the same under `/docs`, and for tools under"
        " `/openapi.json`. [The server](../server.md) tells the rest by example. Errors are problem details (RFC 9457)."
    ]
    by_tag: dict[str, list[str]] = {}
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            (tag,) = operation.get("tags") or ["more"]
            by_tag.setdefault(tag, []).extend(operation_parts(_docs, api, path, method, operation))
    for tag, told in sorted(by_tag.items(), key=lambda item: item[0].startswith("for ")):
        parts += [f"## {tag[0].upper()}{tag[1:]}", *told]
    parts.append("## Types")
    for name, schema in _docs._types(api):
        fields = [(name, of, False, text) for name, of, _, text in _docs._fields(api, schema)]
        parts += [f"### {name}", paragraphs(schema.get("description", "")), field_table(_docs, api, "Fields", fields)]
    return page("HTTP reference", *parts)


def field_table(docs: Any, api: Any, title: str, fields: Any) -> str:
    """A table of fields, with their types and bounds."""

    def bounds(schema: Any) -> str:
        return re.sub(r"(?<=\d)\.0(?=[,)])", "", docs._bounds(schema))

    rows = [
        [
            code(name),
            prose(docs._kind(api, schema)) + (", needed" if needed else ""),
            prose((" ".join((text or schema.get("description", "")).split()) + bounds(schema)).strip()),
        ]
        for name, schema, needed, text in fields
    ]
    return f"{title}:\n\n{table(['name', 'type', 'meaning'], rows)}" if rows else ""


def operation_parts(docs: Any, api: Any, path: str, method: str, operation: Any) -> Iterator[str]:
    yield f"### {method.upper()} {re.sub(r'{(.+?)}', lambda found: found[1].upper(), path)}"
    yield paragraphs(operation.get("description") or operation.get("summary", ""))
    fields = [
        (each["name"], each.get("schema", {}), each.get("required", False), each.get("description", ""))
        for each in operation.get("parameters", [])
    ]
    yield field_table(docs, api, "Parameters", fields)
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body is not None:
        yield field_table(docs, api, "Body", docs._fields(api, body))
    answers: dict[str, list[str]] = {}
    for status, answer in operation.get("responses", {}).items():
        schema = answer.get("content", {}).get("application/json", {}).get("schema")
        if schema is not None and status.startswith("2"):
            answers.setdefault(
                field_table(docs, api, "", [(*field[:2], False, field[3]) for field in docs._fields(api, schema)]), []
            ).append(status)
    for fields_told, statuses in answers.items():
        yield f"Answer {', '.join(statuses)}{fields_told}" if fields_told else ""


PAGES: dict[str, Callable[[Connection], str]] = {
    "sql.md": sql,
    "python.md": lambda _: python(),
    "cli.md": lambda _: cli(),
    "http.md": lambda _: http(),
}


def main() -> None:
    from pglimits import _embedded, install

    FOLDER.mkdir(exist_ok=True)
    with _embedded.throwaway() as server:
        install(server.dsn)
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            for name, write in PAGES.items():
                (FOLDER / name).write_text(write(connection), encoding="utf-8")


if __name__ == "__main__":
    main()
