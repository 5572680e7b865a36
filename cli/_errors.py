"""Exit codes that scripts can rely on, and errors as one line on stderr."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import typer

DONE = 0
ERROR = 1
USAGE = 2
NO_SLOT = 75
"""Could not get a slot in time: EX_TEMPFAIL of sysexits.h, as flock and cron know it."""
NOT_EXECUTABLE = 126
NOT_FOUND = 127
SIGNAL = 128
"""Plus the number of the signal that ended it."""

_REPLACEMENTS = {"…": "...", "→": "->"}
"""What our own texts have beyond ASCII."""

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer brings click along, or its own copy of it
_CliError: type[Exception] = typer.BadParameter.__mro__[2]


def write(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Print a line to stdout or stderr, at once.

    Not by typer's echo, which prints UTF-8 where the encoding is ASCII.
    """
    stream = sys.stderr if err else sys.stdout
    stream.write(text + end)
    stream.flush()


def print_any_text() -> None:
    """Have stdout and stderr take any text. What their encoding lacks is replaced: a holder's name must not fail.

    Those that were closed when this process began are opened on the null device.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    codecs.register_error(__name__, _replacement)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=__name__)


def _replacement(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(_REPLACEMENTS.get(character, "?") for character in lacking), error.end


def say(kind: str, message: object, *lines: str) -> None:
    """``Error: …`` or ``Warning: …`` on stderr, as one line. ``lines``: what is to be copied, below it as it is."""
    text = " ".join(str(message).split())
    label = f"{kind}:"
    if sys.stderr.isatty():
        label = typer.style(label, bold=True, fg="red" if kind == "Error" else "yellow")
    write("\n".join([f"{label} {text}", *lines]), err=True)


def fail(message: object, code: int = ERROR, *lines: str) -> typer.Exit:
    """Say what is wrong. ``raise fail(…)`` ends the command."""
    say("Error", message, *lines)
    return typer.Exit(code)


def usage(message: str) -> typer.Exit:
    """Say what is wrong with the command line."""
    return fail(message, USAGE)


def exit_code(command: Callable[[], object]) -> int:
    """Run a command, show what went wrong, and say what to exit with."""
    try:
        done = command()
    except _CliError as error:
        return _refused(error)
    except typer.Abort:
        return fail("aborted; nothing was changed").exit_code
    except KeyboardInterrupt:
        return SIGNAL + 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # its reader has left: nobody gets the rest
        return ERROR
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("pydantic", "ruamel"):
            raise
        return fail("this needs more than is installed: pip install 'pglimits[files]'").exit_code
    except Exception as error:
        code = _code_of(error)
        if code is None:
            raise
        return fail(error, code).exit_code
    return done if isinstance(done, int) else DONE


def _refused(error: Exception) -> int:
    """Show what is wrong with the command line."""
    message = str(getattr(error, "format_message", lambda: error)())
    code = int(getattr(error, "exit_code", USAGE))
    if type(error).__name__ == "NoArgsIsHelpError":
        if message.strip():
            write(message, err=True)
        return code
    context = getattr(error, "ctx", None)
    if context is not None and isinstance(error, UsageError):
        message = f"{message.rstrip('.')} (see: {context.command_path} --help)"
    return fail(message, code).exit_code


def _code_of(error: Exception) -> int | None:
    """What to exit with after an error that is no fault of this program; None if it may be one."""
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        return ERROR
    from pglimits.errors import AcquireTimeout, InvalidArgument, PglimitsError, QueueFull

    if isinstance(error, (AcquireTimeout, QueueFull)):
        return NO_SLOT
    if isinstance(error, InvalidArgument):
        return USAGE
    if isinstance(error, PglimitsError):
        return ERROR
    return None
