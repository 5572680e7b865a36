"""Other versions of the product, made of this one: what a release to come may change, and what one before it had."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from installtest import SQL

VERSIONS = sorted((Path(__file__).resolve().parent / "versions").glob("*.sql"))
"""What ``pglimits sql`` printed in earlier versions; each release adds its own.

That of 0.1.0 is to be printed anew should its tables change before it is released.
"""

_GONE = """
create or replace function pglimits._gone() returns integer language sql return 1;
create or replace function pglimits.gone(name text) returns integer language sql return pglimits._gone();
create or replace procedure pglimits.gone_hot(name text, inout status text default null)
language plpgsql as $$ begin status := name; end $$;
create or replace view pglimits.gone_view as select pglimits.gone('x') as gone;
grant select on pglimits.gone_view to pglimits_reader;
grant execute on function pglimits.gone(text), pglimits.peek(text, integer, text, interval, integer, boolean, boolean)
  to pglimits_reader;
"""

_NEXT = """
drop view if exists pglimits.waiters;
drop function if exists pglimits._check_ids(uuid[]);
alter table pglimits.configs add column note text;
comment on column pglimits.configs.note is 'What comes next.';
alter table pglimits.leases add column origin text not null default 'before';
alter table pglimits.states set (fillfactor = 60);
alter table pglimits.queue add constraint queue_slots check (slots > 0);
create index leases_origin on pglimits.leases (origin) where origin <> 'before';
create table pglimits.samples (limit_id bigint primary key, taken_at timestamptz not null);
comment on table pglimits.samples is 'What comes next.';
alter type pglimits._findings add attribute remark text;
"""


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

    def add(self, path: str, text: str) -> None:
        """Add a file, to be included before grants.sql or, if it is a migration, after the others."""
        (self.folder / path).write_text(text)
        migration = re.match(r"migrations/(\d+)_", path)
        if migration is None:
            self.edit("install.sql", "\\ir tidy.sql\n", f"\\ir tidy.sql\n\\ir {path}\n")
            return
        number = int(migration[1])
        before = number - 1
        self.edit("install.sql", f":installed > {before} as too_new", f":installed > {number} as too_new")
        self.edit(
            "install.sql", " \\gset\n\\if :too_new", f", :installed < {number} as need_{number} \\gset\n\\if :too_new"
        )
        self.edit(
            "install.sql",
            "\\ir functions/010",
            f"\\if :need_{number}\n\\ir {path}\nupdate pglimits.meta set schema_version = {number};\n\\endif\n"
            "\\ir functions/010",
        )

    def become_the_one_before(self) -> Edition:
        """With functions, a view and privileges that are gone by now."""
        self.add("gone.sql", _GONE)
        return self

    def become_the_next(self) -> Edition:
        """With all that can change and does not concern those who call.

        A table, columns, an index, a constraint and options of storage; a function with one more argument, one whose
        arguments have other names, which a migration drops, a type with one more attribute, a view in another order.
        """
        self.add("migrations/0002_next.sql", _NEXT)
        path = "functions/040_acquire.sql"
        self.edit(path, "pglimits._position(lease_id uuid)", "pglimits._position(lease_id uuid, more text default '')")
        self.edit(path, "pglimits._position(uuid)", "pglimits._position(uuid, text)")
        path = "functions/050_leases.sql"
        self.edit(path, "pglimits._check_ids(lease_ids uuid[])", "pglimits._check_ids(ids uuid[])")
        for use in ("when {} is null", "array_ndims({})", "array_position({}, null)"):
            self.edit(path, use.format("lease_ids"), use.format("ids"))
        self.edit(
            "views.sql",
            "q.lease_id, c.name, q.key, q.slots, q.holder,",
            "c.name, q.lease_id, q.key, q.slots, q.holder,",
        )
        return self
