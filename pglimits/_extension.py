"""pglimits as an extension of PostgreSQL: the files for a server, for PGXN, and the script for pg_tle.

All scripts of an extension but one are the installation, which is the same as an upgrade. The one that adopts an
installation by plain SQL, ``pglimits--unpackaged.sql``, only makes its objects belong to the extension.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from . import __version__
from ._install import _pieces

NAME = "pglimits"
COMMENT = "Concurrency limits and rate limits"
UNPACKAGED = "unpackaged"
"""The version that an installation by plain SQL has once it is adopted, until it is updated."""

RELEASED: tuple[str, ...] = ()
"""Every version that was released before this one: each can be updated to this one. A release appends itself."""

_HEAD = f"""\
\\echo Use "create extension {NAME}" to load this file. \\quit
"""

# Not trusted: whoever creates the extension owns the functions. Those of a trusted one would belong to the superuser.
# The script makes the schema pglimits, so that the schema belongs to the extension and goes with it.
_CONTROL = f"""\
comment = '{COMMENT}'
default_version = '{__version__}'
schema = pg_catalog
relocatable = false
superuser = false
trusted = false
"""

_MAKEFILE = f"""\
EXTENSION = {NAME}
DATA = $(wildcard {NAME}--*.sql)
PG_CONFIG = pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)
"""

_NOTHING_THERE = f"""\
do $$ begin
  if pg_catalog.to_regnamespace('pglimits') is not null then
    raise exception using errcode = 'duplicate_schema',
      message = 'there is a schema pglimits already, and it belongs to no extension: nothing was changed',
      hint = 'Where pglimits was installed without an extension: '
             'create extension pglimits schema pg_catalog version ''{UNPACKAGED}''; alter extension pglimits update;';
  end if;
end $$;
"""

# The isolation cannot be chosen here: create extension, and what a restore runs, is a statement on its way already.
_READ_COMMITTED = """\
do $$ begin
  if pg_catalog.current_setting('transaction_isolation') <> 'read committed' then
    raise exception using errcode = 'active_sql_transaction',
      message = 'pglimits is installed in a read committed transaction, not in a '
                || pg_catalog.current_setting('transaction_isolation') || ' one: nothing was changed',
      hint = 'set default_transaction_isolation = ''read committed''; '
             'for a restore: PGOPTIONS=''-c default_transaction_isolation=read\\ committed''';
  end if;
end $$;
"""

_ADOPT = """\
do $$
declare
  owner constant name := (
    select pg_catalog.pg_get_userbyid(n.nspowner) from pg_catalog.pg_namespace n where n.nspname = 'pglimits');
  member text;
begin
  if owner is null or pg_catalog.to_regprocedure('pglimits.version()') is null then
    raise exception using errcode = 'invalid_schema_name',
      message = 'there is no pglimits in this database that could be adopted', hint = 'create extension pglimits;';
  elsif owner <> current_user then
    raise exception using errcode = 'insufficient_privilege',
      message = pg_catalog.format('the schema pglimits belongs to the role %I here: adopt it as that role', owner),
      hint = pg_catalog.format('set role %I;', owner);
  end if;
  for member in
    select 'schema pglimits'
    union all
    select case c.relkind when 'r' then 'table ' when 'v' then 'view ' when 'S' then 'sequence ' else 'type ' end
           || c.oid::pg_catalog.regclass
    from pg_catalog.pg_class c
    where c.relnamespace = 'pglimits'::pg_catalog.regnamespace and c.relkind in ('r', 'v', 'S', 'c')
    union all
    select 'routine ' || p.oid::pg_catalog.regprocedure
    from pg_catalog.pg_proc p where p.pronamespace = 'pglimits'::pg_catalog.regnamespace
  loop
    execute 'alter extension pglimits add ' || member;
  end loop;
end $$;
"""

# What is in the tables, and where the sequences are, is part of a dump.
_DUMPED = """\
do $$
declare
  relation regclass;
begin
  for relation in
    select c.oid from pg_catalog.pg_class c
    where c.relnamespace = 'pglimits'::pg_catalog.regnamespace and c.relkind in ('r', 'S') order by c.oid
  loop
    perform pg_catalog.pg_extension_config_dump(relation, '');
  end loop;
end $$;
"""

# The row comes back with the first limit, or with a restore, which a row that is here already would stop.
_NO_ROWS = "delete from pglimits.meta;\n"

_TLE = """\
do $pglimits_do$
begin
  if exists (select from pgtle.available_extension_versions() x
             where x.name = '{name}' and x.version = '{version}') then
    raise notice '{name} {version} is there already';
  elsif exists (select from pgtle.available_extensions() x where x.name = '{name}') then
    perform pgtle.install_extension_version_sql('{name}', '{version}', $pglimits_tle$
{create}$pglimits_tle$);
    perform pgtle.set_default_version('{name}', '{version}');
  else
    perform pgtle.install_extension('{name}', '{version}', '{comment}', $pglimits_tle$
{create}$pglimits_tle$);
  end if;
end $pglimits_do$;
"""
_TLE_UNPACKAGED = """\
do $pglimits_do$
begin
  if not exists (select from pgtle.available_extension_versions() x
                 where x.name = '{name}' and x.version = '{version}') then
    perform pgtle.install_extension_version_sql('{name}', '{version}', $pglimits_tle$
{create}$pglimits_tle$);
  end if;
end $pglimits_do$;
"""
_TLE_UPDATE = """\
do $pglimits_do$
begin
  if not exists (select from pgtle.extension_update_paths('{name}') x
                 where x.source = '{before}' and x.target = '{version}' and x.path = '{before}--{version}') then
    perform pgtle.install_update_path('{name}', '{before}', '{version}', $pglimits_tle$
{update}$pglimits_tle$);
  end if;
end $pglimits_do$;
"""


def files() -> dict[str, str]:
    """The files of the extension by their names, with those that PGXN and PGXS need."""
    return {
        f"{NAME}.control": _CONTROL,
        f"{NAME}--{__version__}.sql": _HEAD + _create(),
        f"{NAME}--{UNPACKAGED}.sql": _HEAD + _adopt(),
        **{f"{NAME}--{before}--{__version__}.sql": _HEAD + _update() for before in (*RELEASED, UNPACKAGED)},
        "META.json": _meta(),
        "Makefile": _MAKEFILE,
    }


def tle() -> str:
    """The same as SQL that gives it to pg_tle, for a server whose files one cannot reach."""
    return "\n".join(_tle())


def _tle() -> Iterator[str]:
    yield (
        f"-- Gives pglimits {__version__} to pg_tle, in the database that you are connected to. Safe to repeat. Then:\n"
        f"-- create extension {NAME} schema pg_catalog; or, where an older one is: alter extension {NAME} update;"
    )
    yield _TLE.format(name=NAME, version=__version__, comment=COMMENT, create=_create())
    yield _TLE_UNPACKAGED.format(name=NAME, version=UNPACKAGED, create=_adopt())
    for before in (*RELEASED, UNPACKAGED):
        yield _TLE_UPDATE.format(name=NAME, before=before, version=__version__, update=_update())


def _create() -> str:
    return _NOTHING_THERE + _update() + _NO_ROWS


def _adopt() -> str:
    return _ADOPT + _DUMPED


def _update() -> str:
    return _READ_COMMITTED + "\n".join(_pieces(without_roles=False, extension=True)) + _DUMPED


def _meta() -> str:
    script = f"{NAME}--{__version__}.sql"
    about = {
        "name": NAME,
        "abstract": COMMENT,
        "description": "Concurrency limits and rate limits for any app that already has PostgreSQL, as SQL functions.",
        "version": __version__,
        "maintainer": "The authors of pglimits",
        "license": "apache_2_0",
        "provides": {NAME: {"abstract": COMMENT, "file": script, "version": __version__}},
        "prereqs": {"runtime": {"requires": {"PostgreSQL": "14.0.0", "plpgsql": 0}}},
        "release_status": "stable",
        "tags": ["concurrency", "rate limit", "semaphore", "lock", "lease", "queue"],
        "meta-spec": {"version": "1.0.0", "url": "https://pgxn.org/meta/spec.txt"},
        "generated_by": f"pglimits sql --extension, {__version__}",
    }
    return json.dumps(about, indent=2) + "\n"
