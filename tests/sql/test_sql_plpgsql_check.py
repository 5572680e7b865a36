"""plpgsql_check over every function, where the server has it. Those of pg_cron: see tests/cron."""

from __future__ import annotations

import pytest
from sqltest import Session

EXPECTED = {
    # These try to commit, to find out whether they may.
    ("_cannot_commit", "2D000", "error"),
    ("_refuse_transaction", "2D000", "error"),
    # It has no plain value for a parameter of a composite type.
    ("_serve_several", "00000", "warning extra"),
}


def test_plpgsql_check_finds_nothing_else(s: Session) -> None:
    if not s.value("select exists (select from pg_available_extensions where name = 'plpgsql_check')"):
        pytest.skip("this server has no plpgsql_check")
    s.run("create extension plpgsql_check")
    checked = s.all(
        """
        select p.proname::text, c.sqlstate, c.level, p.oid::regprocedure::text as routine, c.lineno, c.message, c.query
        from pg_proc p join pg_language l on l.oid = p.prolang
        cross join lateral plpgsql_check_function_tb(p.oid, extra_warnings => true, performance_warnings => false,
                                                     security_warnings => true) c
        where p.pronamespace = 'pglimits'::regnamespace and l.lanname = 'plpgsql'
          and p.proname not like 'cron\\_%%'
          and c.message <> 'name of parameter "limit" is reserved keyword'
        """
    )
    assert [row for row in checked if tuple(row[:3]) not in EXPECTED] == []
    assert len(checked) == len(EXPECTED)
