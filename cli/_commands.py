"""How a function becomes a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import typer
import typer.core

F = TypeVar("F", bound=Callable[..., Any])


def command(
    app: typer.Typer, panel: str | None = None, cls: type[typer.core.TyperCommand] | None = None
) -> Callable[[F], F]:
    """Make a function a command of its name. Its docstring is the help, folded where the terminal ends."""

    def register(function: F) -> F:
        paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split("\n")) for paragraph in paragraphs)
        return app.command(help=text, rich_help_panel=panel, cls=cls)(function)

    return register
