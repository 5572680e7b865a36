"""How a function becomes a command, and how the app finds it without loading the others."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import typer
import typer.core
import typer.main

from ._parameters import lighten

F = TypeVar("F", bound=Callable[..., Any])

FAMILIES = {
    "demo": ("demo",),
    "limits": ("ls", "inspect", "create", "update", "delete", "enable", "disable", "reset"),
    "files": ("plan", "apply", "export"),
    "leases": ("holders", "waiters", "release", "acquire", "renew", "rate"),
    "top": ("top",),
    "watch": ("watch", "events", "history"),
    "run": ("run",),
    "sweep": ("sweep",),
    "metrics": ("metrics",),
    "serve": ("serve",),
    "setup": ("install", "upgrade", "uninstall", "sql", "doctor"),
    "bench": ("bench",),
    "import_prefect": ("import",),
    "cron": ("cron",),
    "embedded": ("embedded",),
    "terraform": ("terraform",),
}
"""The modules, and the commands of each, in the order of the help. ``import``, ``cron``, ``embedded`` and ``terraform``
are groups of commands."""

_PANEL_OF_GROUPS = "Set up and look after"

_MODULES = {name: family for family, names in FAMILIES.items() for name in names}


class _Light:
    """What starts quickly."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            lighten(parameter)
        return parameters


class Command(_Light, typer.core.TyperCommand):
    """A command that starts quickly."""


class Group(_Light, typer.core.TyperGroup):
    """A group of such commands."""


class Commands(Group):
    """All commands: each is loaded when it is wanted."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _MODULES:
            self.list_commands(ctx)  # all, for Typer to guess which was meant
        elif cmd_name not in self.commands:
            self.add_command(_load(cmd_name), cmd_name)
        return super().get_command(ctx, cmd_name)

    def list_commands(self, ctx: Any) -> list[str]:
        for name in _MODULES:
            if name not in self.commands:
                self.add_command(_load(name), name)
        return list(_MODULES)


def _load(name: str) -> Any:
    """A command, or a group of commands, out of the module that has it."""
    app: typer.Typer = importlib.import_module(f"{__package__}.{_MODULES[name]}").app
    if app.info.name != name:  # not a group: the one command of that name
        alone = typer.Typer(add_completion=False)
        alone.registered_commands = [
            each for each in app.registered_commands if each.callback is not None and each.callback.__name__ == name
        ]
        app = alone
    made = typer.main.get_command(app)
    if isinstance(made, Group):
        made.rich_help_panel = _PANEL_OF_GROUPS
    return made


def command(
    app: typer.Typer, panel: str | None = None, cls: type[typer.core.TyperCommand] = Command
) -> Callable[[F], F]:
    """Make a function a command of its name. Its docstring is the help, folded where the terminal ends."""

    def register(function: F) -> F:
        paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split("\n")) for paragraph in paragraphs)
        return app.command(help=text, rich_help_panel=panel, cls=cls)(function)

    return register
