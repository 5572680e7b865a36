"""Other versions of the product, made of this one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from installtest import SQL


class Edition:
    """A copy of the SQL that is installed as if it were a version of the product."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder = folder
        shutil.copytree(SQL, folder, ignore=shutil.ignore_patterns("__*"))
        number = re.search(r"'(\d[^']*)'", (folder / "version.sql").read_text())
        assert number is not None
        self.edit("version.sql", number[1], version)

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self.folder / path).read_text()
        assert old in text, old
        (self.folder / path).write_text(text.replace(old, new))

    def migrate(self, sql: str) -> Edition:
        """With a second migration."""
        (self.folder / "migrations/0002_next.sql").write_text(sql)
        self.edit("install.sql", ":installed > 1 as too_new", ":installed > 2 as too_new, :installed < 2 as need_0002")
        self.edit(
            "install.sql",
            "\\ir functions/010",
            "\\if :need_0002\n\\ir migrations/0002_next.sql\nupdate pglimits.meta set schema_version = 2;\n\\endif\n"
            "\\ir functions/010",
        )
        return self
