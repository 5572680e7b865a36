"""Every argument of every public routine, with any value: an answer, or an error that names it and changes nothing.

The routines and their arguments are read from the catalog, so that a new one is covered by itself.
PGLIMITS_TEST_EXAMPLES says how many calls of each are tried.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqltest import FOREVER, Session, check_consistent, tables

EXAMPLES = int(os.environ.get("PGLIMITS_TEST_EXAMPLES", "10"))
KNOWN = "00000000-0000-0000-0000-00000000000"
"""Of leases 1 and 2, and waiters 3 and 4, for slots and for a rate."""

STRANGE = [
    "", " ", "database", "api", "no such limit", "a/b", "é", "e\u0301", "\u200f\u202etxt", "\ufeff", "\ufffe", "\uffff",
    "\U0001f512", "\U0010ffff", "\u2028", "\u0085", "\x7f", "\r\n", "%s", "%1$s", "%n", "{1}", "null",
    "'; select 1; --",
    '"', "\\", "$$", "x" * 200, "\U0001f512" * 200, "x" * 201, "x" * 100_000, "pglimits_a", "pglimits_'",
    *map(chr, range(1, 32)),
]  # fmt: skip
UUIDS = ["null::uuid", *(f"'{KNOWN}{n}'::uuid" for n in range(6)), "'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid"]
INTEGERS = ["null", "-2147483648", "-1000001", "-1", "0", "1", "2", "3", "100", "1000000", "1000001", "2147483647"]
NUMBERS = [
    "null", "'NaN'", "'Infinity'", "'-Infinity'", "0", "'-0'", "5e-324", "1e-10", "1e-9", "0.1", "0.999999", "1", "300",
    "2147483.647", "2147483.648", "31622400", "31622400.1", "1e9", "1.0000001e9", "1.7976931348623157e308", "-1e-300",
]  # fmt: skip
BOOLEANS = ["null", "true", "false"]
SHAPES = ["'{{}}'::{0}[]", "array[null]::{0}[]", "array[array[{1}]]::{0}[]", "array_fill({1}, array[2, 2])::{0}[]",
          "array_fill({1}, array[2], array[0])::{0}[]", "array_fill({1}, array[1], array[-2147483648])::{0}[]",
          "array_fill({1}, array[101])::{0}[]", "array_fill({1}, array[20000])::{0}[]", "array[{1}, null]::{0}[]",
          "null::{0}[]"]  # fmt: skip
JSON = [
    "null", "'null'", "'{}'", "'[]'", "'1'", "'\"x\"'", "'1e5000'", "'-1e100000'", "'\"\\u0001\"'",
    "(repeat('[', 3000) || repeat(']', 3000))::jsonb", "(repeat('{\"a\":', 1300) || '1' || repeat('}', 1300))::jsonb",
    "to_jsonb(repeat('x', 100000))", "'[[]]'", "'[{\"a\": [null]}]'",
]  # fmt: skip


def literal(text: str) -> str:
    return "U&'" + re.sub(r"[^ -&(-\[\]-~]", lambda c: f"\\+{ord(c[0]):06x}", text) + "'"


def texts() -> st.SearchStrategy[str]:
    written = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12)
    return st.one_of(st.sampled_from(STRANGE), written).map(literal)


def arrays(kind: str, items: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    shaped = st.builds(lambda shape, item: shape.format(kind, f"{item}::{kind}"), st.sampled_from(SHAPES), items)
    flat = st.lists(items, min_size=1, max_size=4).map(lambda found: f"array[{', '.join(found)}]::{kind}[]")
    return st.one_of(flat, shaped)


NEAR = {
    "uuid": st.sampled_from(UUIDS),
    "integer": st.sampled_from(INTEGERS),
    "double precision": st.sampled_from(NUMBERS),
    "boolean": st.sampled_from(BOOLEANS),
    "text": st.one_of(st.just("null"), texts()),
    "jsonb": st.sampled_from(JSON),
    "timestamp with time zone": st.sampled_from(["null", "'infinity'", "'-infinity'", "'294276-12-31'"]),
    "bigint": st.sampled_from(["null", "-9223372036854775808", "0", "9223372036854775807"]),
}  # fmt: skip


def values(kind: str) -> st.SearchStrategy[str]:
    """SQL for values of a type, the nasty ones before all."""
    if kind.endswith("[]"):
        element = kind.removesuffix("[]")
        return arrays(element, NEAR[element])
    return NEAR[kind].map(lambda value: f"{value}::{kind}")


@dataclass(frozen=True, slots=True)
class Routine:
    """A public function or procedure, and what it takes."""

    signature: str
    name: str
    kind: str
    arguments: tuple[tuple[str, str], ...]
    needed: int

    def call(self, given: dict[str, str]) -> str:
        texts = ", ".join(f'"{name}" => {value}' for name, value in given.items())
        return f"call pglimits.{self.name}({texts})" if self.kind == "p" else f"select pglimits.{self.name}({texts})"


ROUTINES = """
    select p.oid::regprocedure::text as signature, p.proname as name, p.prokind as kind,
           p.pronargs - p.pronargdefaults as needed,
           coalesce((select array_agg(array[p.proargnames[i], format_type(p.proargtypes[i - 1], null)] order by i)
                     from generate_series(1, p.pronargs) i
                     where coalesce(p.proargmodes[i], 'i') = 'i'), '{}') as arguments
    from pg_proc p where p.pronamespace = 'pglimits'::regnamespace and p.proname not like '\\_%%' order by 1
"""
GOOD = {
    "name": "'database'", "names": "array['database', 'api']", "lease_ids": f"array['{KNOWN}1', '{KNOWN}3']::uuid[]",
    "slots": "1", "limit": "5",
}  # fmt: skip


def routines(s: Session) -> list[Routine]:
    return [
        Routine(row.signature, row.name, row.kind, tuple((name, kind) for name, kind in row.arguments), row.needed)
        for row in s.all(ROUTINES)
    ]


def begin(s: Session) -> None:
    """The tables as every call finds them."""
    names = ("meta", "configs", "known_keys", "states", "leases", "queue", "processes")
    s.run(f"truncate {', '.join(f'pglimits.{name}' for name in names)}")
    s.run("insert into pglimits.meta (schema_version) values (1)")
    s.create("database", 2)
    s.create("api", 5, 1)
    s.create("huge", 2_147_483_647)
    s.acquire("database", lease_id=f"{KNOWN}1", holder={"job": 1})
    s.acquire(["api", "database"], lease_id=f"{KNOWN}2")
    s.queue("database", lease_id=f"{KNOWN}3")
    s.rate_limit("api", slots=5, timeout_seconds=FOREVER, lease_id=f"{KNOWN}4")
    s.acquire("huge", slots=2_147_483_000)


def check_error(error: psycopg.Error, routine: Routine) -> None:
    """It has to be one that tells who called what is wrong."""
    state, message = error.diag.sqlstate or "", error.diag.message_primary or str(error)
    names = [name for name, _ in routine.arguments]
    words = {word for name in names for word in (name, name.removesuffix("s"))}
    assert len(message) <= 500, f"a message of {len(message)} characters"
    if state in ("PL002", "PL003", "PL004", "PL005", "PL006", "PL007"):
        return
    assert state == "PL001" or state[:2] in ("22", "54"), f"{state} {message}"
    assert any(re.search(rf"\b{word}\b", message) for word in words), f"{state} {message}"


def check_answer(s: Session) -> None:
    """What is stored can be read, and ordinary calls work as ever."""
    check_consistent(s)
    far = s.all("select lease_id from pglimits.leases where not isfinite(expires_at) or expires_at < acquired_at"
                " or expires_at > acquired_at + interval '367 days'")  # fmt: skip
    assert far == []
    assert s.all("select name from pglimits.configs where abs(decayed) < 1e18 is not true") == []
    assert s.all("select key from pglimits.states where abs(booked) < 1e18 is not true") == []
    for view in ("limits", "keys", "holders", "waiters"):
        s.run(f"select v::text from pglimits.{view} v")
    names = [row.name for row in s.all('select name from pglimits.configs where active and "limit" > 0')]
    for name in names:
        s.run("select pglimits.sweep(idle_seconds => 0)")
        s.reset(name)
        s.run("select pglimits.release_all(array(select lease_id from pglimits.queue))")
        s.reset(name)
        assert s.acquire(name, key="of its own").status == "granted"
        assert s.acquire(name).status in ("granted", "queued", "refused")
    check_consistent(s)


def attempt(s: Session, routine: Routine, given: dict[str, str]) -> None:
    begin(s)
    before = tables(s)
    s.run(f"set statement_timeout = '{'100ms' if routine.kind == 'p' else '1min'}'")
    try:
        s.run(routine.call(given))
    except psycopg.errors.QueryCanceled:
        assert routine.kind == "p"  # it waits, as it was told
    except psycopg.Error as error:
        assert tables(s) == before
        check_error(error, routine)
        return
    finally:
        s.run("reset statement_timeout")
    check_answer(s)


def valid(s: Session, value: str) -> bool:
    """Whether it is a value at all, before any routine has seen it."""
    try:
        s.run(f"select from (select {value} as given) x where x.given is null")
    except psycopg.Error:
        return False
    return True


def test_there_is_a_strategy_for_the_type_of_every_argument(s: Session) -> None:
    for routine in routines(s):
        for name, kind in routine.arguments:
            assert kind.removesuffix("[]") in NEAR, f"{routine.signature} {name}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bad", ["one", "several"])
def test_whatever_an_argument_is_the_answer_is_sane(s: Session, bad: str) -> None:
    wrong: list[str] = []
    for routine in routines(s):
        if not routine.arguments:
            continue

        @settings(
            max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
            suppress_health_check=list(HealthCheck), print_blob=False,
        )  # fmt: skip
        @given(st.data())
        def try_it(data: st.DataObject) -> None:
            arguments = dict(routine.arguments)
            given = {name: GOOD.get(name, "null") for name, _ in routine.arguments[: routine.needed]}
            for name, kind in routine.arguments[: routine.needed]:
                if name == "slots" and kind.endswith("[]"):
                    given[name] = "'{1}'"
                if name == "lease_id":
                    given[name] = f"'{KNOWN}1'::{kind}"
            if routine.name == "create_limit":
                given["name"] = "'new'"
            chosen = data.draw(
                st.sampled_from(list(arguments)).map(lambda name: [name])
                if bad == "one"
                else st.lists(st.sampled_from(list(arguments)), unique=True, min_size=min(2, len(arguments)))
            )
            for name in chosen:
                value = data.draw(values(arguments[name]), label=name)
                if not valid(s, value):
                    return
                given[name] = value
            attempt(s, routine, given)

        try:
            try_it()
        except AssertionError as error:
            wrong.append(f"{routine.signature}: {error} {error.__notes__}")
    assert wrong == []
