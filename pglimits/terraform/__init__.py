"""The provider of Terraform and OpenTofu: the program ``terraform-provider-pglimits``, which either of them starts."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Serve Terraform, until it says that it is done."""
    try:
        import pydantic  # noqa: F401
        import tf  # noqa: F401
    except ImportError as error:
        sys.exit(f"terraform-provider-pglimits needs the package {error.name}: pip install 'pglimits[terraform]'")
    if "TF_PLUGIN_MAGIC_COOKIE" not in os.environ:
        sys.exit("terraform and tofu start this program; have them find it: pglimits terraform install")
    os.environ.setdefault("PGAPPNAME", "terraform-provider-pglimits")
    from ._serve import serve

    serve()
