"""plpgsql_check over every function, where the server has it. Those of pg_cron: see tests/cron."""

from __future__ import annotations

import pytest
from sqltest import Session

# DESIGN fixes the name of that parameter.
ALLOWED = {'name of parameter "limit" is reserved keyword'}


def test_plpgsql_check_finds_nothing(s: Session) -> None:
    if not s.value("select exists (select from pg_available_extensions where name = 'plpgsql_check')"):
        pytest.skip("this server has no plpgsql_check")
    s.run("create extension plpgsql_check")
    checked = s.all(
        """
        select p.oid::regprocedure::text as routine, c.lineno, c.level, c.message, c.detail, c.query
        from pg_proc p join pg_language l on l.oid = p.prolang
        cross join lateral plpgsql_check_function_tb(p.oid, extra_warnings => true, performance_warnings => false,
                                                     security_warnings => true) c
        where p.pronamespace = 'pglimits'::regnamespace and l.lanname = 'plpgsql'
          and p.proname not like 'cron\\_%%'
        """
    )
    assert [row for row in checked if row.message not in ALLOWED] == []
    assert s.value(
        "select count(*) from pg_proc p join pg_language l on l.oid = p.prolang"
        " where p.pronamespace = 'pglimits'::regnamespace and l.lanname = 'plpgsql'"
    ) > 40  # fmt: skip
