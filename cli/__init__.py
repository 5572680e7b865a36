"""The command line of pglimits."""

from __future__ import annotations

import gc
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command that the process was started with, and exit."""
    gc.set_threshold(100_000)  # what imports make is no garbage, and a tenth of a command's time went into looking
    from ._app import app
    from ._errors import print_any_text

    print_any_text()
    try:
        app(prog_name="pglimits" if sys.argv[0].endswith("__main__.py") else None)
    finally:
        gc.freeze()  # the process ends: nothing that modules made needs to be looked through once more
