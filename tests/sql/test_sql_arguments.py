"""Bad input of any kind: a clear error that names the argument, and nothing changed."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from sqltest import Clock, Db, Session, changes_nothing, fails, tables

NAMES = {
    "null": "null::text",
    "empty": "''",
    "too long": "repeat('x', 201)",
    "far too long": "repeat('x', 1000000)",
    "slash": "'a/b'",
    "percent": "'a%b'",
    "ampersand": "'a&b'",
    "greater": "'a>b'",
    "less": "'a<b'",
    "newline": "e'a\\nb'",
    "trailing newline": "e'a\\n'",
    "tab": "e'\\ta'",
    "escape": "e'a\\x1b'",
    "delete": "e'a\\x7f'",
    "C1 control": "U&'a\\0085'",
}
KEYS = {
    "null": "null::text",
    "too long": "repeat('x', 201)",
    "newline": "e'a\\nb'",
    "trailing newline": "e'\\n'",
    "delete": "e'a\\x7f'",
    "C1 control": "U&'\\009f'",
}
SLOTS = {"null": "null::int", "zero": "0", "negative": "-1", "least": "-2147483648"}
MONTHS_AGAINST_DAYS = {  # compared as intervals they seem to be from 1 second to 366 days, as a year has 360 there
    "negative against days": "'-1 year 361 days'",
    "far too long against days": "'5000 years -1799999 days'",
    "beyond all timestamps": "'5965000 years -2147399999 days'",
    "before all timestamps": "'-5965000 years 2147400001 days'",
}
DURATIONS = {
    "null": "null::interval",
    "zero": "'0'",
    "too short": "'999999 microseconds'",
    "negative": "'-5 minutes'",
    "too long": "'367 days'",
    "huge": "'178000000 years'",
    "least": "'-178000000 years'",
    **MONTHS_AGAINST_DAYS,
}
WAITS = {"negative": "'-1 microsecond'", "least": "'-178000000 years'"}
PRIORITIES = {"null": "null::int", "too high": "1000001", "too low": "-1000001", "least": "-2147483648"}
BOOLEANS = {"null": "null::boolean"}
HOLDERS = {"too long": "to_jsonb(repeat('x', 8001))"}
CHANNELS = {
    "other": "'news'",
    "empty": "''",
    "prefix only": "'pglimits_'",
    "upper case": "'pglimits_A'",
    "quote": "'pglimits_a''b'",
    "too long": "'pglimits_' || repeat('a', 41)",
    "newline": "e'pglimits_a\\n'",
}
NAMES_ARRAYS = {
    "null": "null::text[]",
    "empty": "'{}'::text[]",
    "nested": "'{{database,api}}'::text[]",
    "nested square": "'{{database,api},{api,database}}'::text[]",
    "too many": "array_fill('database'::text, array[101])",
    "null element": "array['database', null]",
    "forbidden": "array['database', 'a/b']",
    "empty element": "array['']",
}
SLOTS_ARRAYS = {
    "null": "null::int[]",
    "empty": "'{}'::int[]",
    "nested": "'{{1,1}}'::int[]",
    "too few": "array[1, 1, 1]",
    "far too many": "array_fill(1, array[100000])",
    "null element": "array[1, null]",
    "zero": "array[0]",
    "negative": "array[1, -1]",
}
KEYS_ARRAYS = {
    "null": "null::text[]",
    "empty": "'{}'::text[]",
    "nested": "'{{a,b}}'::text[]",
    "too many": "array['a', 'b', 'c']",
    "far too many": "array_fill(repeat('k', 200), array[10000])",
    "null element": "array['a', null]",
    "control": "array[e'\\n']",
}
LIMITS = {"null": "null::int", "negative": "-1", "least": "-2147483648"}
RATES = {
    "negative": "-1", "NaN": "'NaN'", "infinity": "'Infinity'", "minus infinity": "'-Infinity'", "huge": "1e10",
    "tiny": "1e-10", "minus tiny": "-1e-300",
}  # fmt: skip
MAX_WAITERS = {"negative": "-2", "least": "-2147483648"}
DESCRIPTIONS = {"too long": "repeat('x', 2001)"}
IDS = {"null": "null::uuid"}
TEXT_IDS = {
    "null": "null::text", "empty": "''", "word": "'x'", "too short": "'0123'", "newline": "e'\\n'",
    "one brace": "'{' || gen_random_uuid()", "other brace": "gen_random_uuid() || '}'",
    "dash at the end": "repeat('0', 32) || '-'",
}  # fmt: skip
ID_ARRAYS = {
    "null": "null::uuid[]", "null element": "array[null]::uuid[]", "nested": "array[array[gen_random_uuid()]]",
    "nested square": "array_fill(gen_random_uuid(), array[2, 2])",
}  # fmt: skip
PATIENCES = {
    "zero": "'0'", "negative": "'-1 second'", "too long": "'21 days'", "huge": "'178000000 years'",
    **MONTHS_AGAINST_DAYS,
}  # fmt: skip
CRON = {"null": "null::interval", "zero": "'0'", "negative": "'-1 minute'", "too long": "'2 days'"}

ACQUIRE = {
    "lease_duration": DURATIONS, "wait": WAITS, "priority": PRIORITIES, "holder": HOLDERS, "strict": BOOLEANS,
    "channel": CHANNELS,
}  # fmt: skip
ONE = {"name": NAMES, "slots": SLOTS, "key": KEYS}
SEVERAL = {"names": NAMES_ARRAYS, "slots": SLOTS_ARRAYS, "keys": KEYS_ARRAYS}
PEEK = {"wait": WAITS, "priority": PRIORITIES, "strict": BOOLEANS, "for_rate": BOOLEANS}
RATE = {"wait": WAITS, "strict": BOOLEANS, "channel": CHANNELS}
TWO = "array['database', 'api']"

# What is called, the argument that it cannot do without and a good value for it, and bad values for each argument.
FUNCTIONS: dict[str, tuple[str, str, dict[str, dict[str, str]]]] = {
    "acquire(text)": ("name", "'database'", ONE | ACQUIRE),
    "acquire(text[])": ("names", TWO, SEVERAL | ACQUIRE),
    "rate_limit(text)": ("name", "'api'", ONE | RATE),
    "rate_limit(text[])": ("names", "array['api', 'other api']", SEVERAL | RATE),
    "peek(text)": ("name", "'database'", ONE | PEEK),
    "peek(text[])": ("names", TWO, SEVERAL | PEEK),
    "renew(uuid)": ("lease_id", "gen_random_uuid()", {"lease_id": IDS, "lease_duration": DURATIONS}),
    "renew(uuid[])": (
        "lease_ids", "array[gen_random_uuid()]", {"lease_ids": ID_ARRAYS, "lease_duration": DURATIONS},
    ),
    "renew(text)": ("lease_id", "gen_random_uuid()::text", {"lease_id": TEXT_IDS, "lease_duration": DURATIONS}),
    "release(uuid)": ("lease_id", "gen_random_uuid()", {"lease_id": IDS}),
    "release(text)": ("lease_id", "gen_random_uuid()::text", {"lease_id": TEXT_IDS}),
    "release(uuid[])": (
        "lease_ids", "array[gen_random_uuid()]",
        {"lease_ids": ID_ARRAYS},
    ),
    "release_many": (
        "lease_ids", "array[gen_random_uuid()]",
        {"lease_ids": ID_ARRAYS, "durable": BOOLEANS, "patience": PATIENCES},
    ),
    "watch": ("lease_ids", "array[gen_random_uuid()]", {"lease_ids": ID_ARRAYS, "settle": BOOLEANS}),
    "acquire_many": ("requests", "'[]'::jsonb", {"durable": BOOLEANS, "patience": PATIENCES}),
    "acquire_alike": (
        "lease_ids", "array[gen_random_uuid()]",
        {
            "lease_ids": {"null": "null::uuid[]", "empty": "'{}'::uuid[]", "a null in it": "'{null}'::uuid[]",
                          "nested": "array[array[gen_random_uuid()]]",
                          "too many": "(select array_agg(gen_random_uuid()) from generate_series(1, 10001))"},
            "holders": {"no array": "'{}'::jsonb", "too few": "'[]'::jsonb", "too many": "'[1, 2]'::jsonb"},
            "durable": BOOLEANS, "patience": PATIENCES,
        },
    ),
    "create_limit": (
        "name", "'new'",
        {
            "name": NAMES, "limit": LIMITS, "slot_decay_per_second": {**RATES, "null": "null::float8"},
            "active": BOOLEANS, "max_waiters": {**MAX_WAITERS, "minus one": "-1"}, "description": DESCRIPTIONS,
        },
    ),
    "update_limit": (
        "name", "'api'",
        {
            "name": NAMES, "limit": {"negative": "-1"}, "slot_decay_per_second": RATES, "max_waiters": MAX_WAITERS,
            "description": DESCRIPTIONS, "new_name": {n: v for n, v in NAMES.items() if n != "null"},
        },
    ),
    "delete_limit": ("name", "'api'", {"name": NAMES}),
    "adjust": ("name", "'api'", {"name": NAMES, "slots": {"null": "null::int"}, "key": KEYS}),
    "reset": ("name", "'api'", {"name": NAMES, "key": {n: v for n, v in KEYS.items() if n != "null"}}),
    "sweep": (
        "", "",
        {
            "max_keys": {"null": "null::int", "zero": "0", "negative": "-1"},
            "idle": {
                "null": "null::interval", "negative": "'-1 second'", "negative against days": "'-1 year 361 days'",
                "before all": "'-5965000 years 2147400001 days'",
            },
        },
    ),
    "cron_enable": ("", "", {"every": CRON}),
}  # fmt: skip
# renew without a duration renews by the one the lease was taken with.
NULLS_THAT_ARE_GOOD = {
    ("renew(uuid)", "lease_duration"),
    ("renew(uuid[])", "lease_duration"),
    ("renew(text)", "lease_duration"),
}


def cases(function: str) -> Iterator[tuple[str, str, str]]:
    needed, good, arguments = FUNCTIONS[function]
    for argument, values in arguments.items():
        for what, value in values.items():
            if what == "null" and (function, argument) in NULLS_THAT_ARE_GOOD:
                continue
            given = {needed: good} if needed else {}
            if function == "create_limit":
                given["limit"] = "1"
            if function == "acquire_alike":
                given["name"] = "'database'"
            if function == "adjust":
                given["slots"] = "1"
            given[argument] = value
            texts = ", ".join(f'"{name}" => {text}' for name, text in given.items())
            yield argument, what, f"select * from pglimits.{function.split('(')[0]}({texts})"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_input_is_an_error_that_names_the_argument_and_changes_nothing(db: Db, s: Session, function: str) -> None:
    s.create("database", 5)
    s.create("api", 5, 1)
    s.create("other api", 5, 1)
    s.acquire("database")
    s.rate_limit("api")
    before = tables(db.main)
    wrong = []
    for argument, what, statement in cases(function):
        singular = {"names": "name", "keys": "key", "lease_ids": "lease_id"}.get(argument, argument)
        try:
            s.run(statement)
        except psycopg.Error as error:
            message = error.diag.message_primary or ""
            if error.diag.sqlstate != "PL001":
                wrong.append(f"{argument} {what}: {error.diag.sqlstate} {message}")
            elif singular not in message.split(":")[0]:
                wrong.append(f"{argument} {what}: the message does not name it: {message}")
            elif len(message) > 500:
                wrong.append(f"{argument} {what}: the message has {len(message)} characters")
        else:
            wrong.append(f"{argument} {what}: was taken")
    assert wrong == []
    assert tables(db.main) == before


def test_every_argument_of_every_public_function_is_in_the_table(s: Session) -> None:
    optional = {  # any value of its type is good
        "acquire": {"lease_id"}, "rate_limit": {"lease_id"}, "acquire_wait": set(), "update_limit": {"active"},
        "errors": set(), "version": set(), "cron_disable": set(), "acquire_many": {"requests"},
        # What is wrong with these is in the rows.
        "acquire_alike": {
            "name", "slots", "key", "lease_duration", "wait", "priority", "strict", "channel", "for_rate",
        },
        "may_sleep": {"lease_id"},
    }  # fmt: skip
    known: dict[str, set[str]] = {}
    for function, (_, _, arguments) in FUNCTIONS.items():
        known.setdefault(function.split("(")[0], set()).update(arguments)
    rows = s.all(
        """
        select p.proname as name, coalesce(array_agg(distinct a.name) filter (where a.name is not null), '{}') as names
        from pg_proc p
        left join lateral (
          select u.name from unnest(p.proargnames, coalesce(p.proargmodes, array_fill('i'::"char", array[p.pronargs])))
            as u(name, mode) where u.mode = 'i') a on true
        where p.pronamespace = 'pglimits'::regnamespace and p.proname not like '\\_%%' and p.prokind = 'f'
        group by p.proname
        """
    )
    assert {row.name for row in rows} >= set(known)
    for row in rows:
        missing = set(row.names) - known.get(row.name, set()) - optional.get(row.name, set())
        assert missing == set(), row.name


def test_slots_that_add_up_beyond_an_integer_are_an_error(db: Db, s: Session) -> None:
    s.create("huge", 2_147_483_647)
    for function in ("acquire", "peek"):
        with pytest.raises(psycopg.Error) as caught:
            s.run(f"select * from pglimits.{function}(array['huge', 'huge'], array[2147483647])")
        assert caught.value.diag.sqlstate in ("PL001", "PL004")
        assert "slots" in (caught.value.diag.message_primary or "")


def test_lower_bounds_of_arrays_do_not_matter(s: Session) -> None:
    s.create("one", 5)
    s.create("two", 5)
    answer = s.one(
        "select * from pglimits.acquire('[0:1]={one,two}'::text[], '[7:8]={1,2}'::int[], '[3:3]={k}'::text[])"
    )
    assert answer.status == "granted"
    assert [(held.name, held.key, held.slots) for held in sorted(s.holders(), key=lambda held: held.name)] == [
        ("one", "k", 1),
        ("two", "k", 2),
    ]


@pytest.mark.parametrize(
    "name", ["x", "x" * 200, "ein Name: mit @ _ . - ü", "日本", "'; drop schema pglimits; --", '"', "\\"]
)
def test_good_names_and_keys_are_taken(s: Session, name: str) -> None:
    s.create(name, 1)
    assert s.acquire(name, key=name).status == "granted"
    assert (s.holders()[0].name, s.holders()[0].key) == (name, name)
    s.update(name, new_name="other")
    s.update("other", new_name=name)
    s.delete(name)


def test_extreme_but_good_values_work(s: Session) -> None:
    s.create("huge", 2_147_483_647, 1e9, max_waiters=2_147_483_647, description="x" * 2000)
    s.create("slow", 2_147_483_647, 1e-9)
    assert s.acquire("huge", slots=2_147_483_647, priority=1_000_000, holder="x" * 7000).status == "granted"
    assert s.acquire("huge", wait="178000000 years", priority=-1_000_000).status == "queued"
    assert s.rate_limit("slow", slots=2_147_483_647, wait="0").status == "granted"
    assert s.rate_limit("slow", slots=2_147_483_647).retry_after is not None
    assert s.rate_limit("slow", slots=2_147_483_647, wait=None).status == "granted"
    assert s.limit("slow").waiting == 1
    s.run("select pglimits.sweep(idle => '178000000 years')")
    s.run("select pglimits.sweep(2147483647, '0')")
    s.run("select pglimits.sweep(idle => '5965000 years -2147399999 days')")


def test_a_sweep_counts_more_slots_than_an_integer_holds(clock: Clock, s: Session) -> None:
    s.create("huge", 2_147_483_647)
    for key in ("a", "b"):
        s.acquire("huge", slots=2_147_483_647, key=key)
    clock.advance(301)
    assert s.sweep().leases == 2_147_483_647
    assert s.limit("huge").held == 0


MEMBERS = {
    "names": ('"database"', "1", "{}", '[["database"]]', '[{"a": 1}]'),
    "slots": ("1", '"{1}"', "[1.5]", "[99999999999]", "[-2147483649]", '["a"]', "[[1]]", "[true]"),
    "keys": ('"k"', '[["k"]]', "{}"),
    "lease_duration": ("{}", "[]", "true"),
    "priority": ('"x"', "1.5", "2147483648", "1e300", "[]", "{}", "true"),
    "strict": ('"maybe"', "2", "[]", "{}"),
    "for_rate": ('"maybe"', "2", "[]", "{}"),
    "lease_id": ('"x"', '""', "1", "[]", "{}", "true", '"00000000-0000-0000-0000-00000000000g"'),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_of_the_wrong_type_is_an_error_that_names_it(s: Session, member: str) -> None:
    s.create("database", 5)
    for value in MEMBERS[member]:
        text = value if member == "names" else f'["database"], "{member}": {value}'
        for requests in (f'[{{"names": {text}}}]', f'[{{"names": ["database"]}}, {{"names": {text}}}]'):
            with changes_nothing(s), fails("PL001", member):
                s.run("select * from pglimits.acquire_many(%s::jsonb)", requests)


@pytest.mark.parametrize(
    "requests", ["1", '"x"', "{}", "null", "[1]", "[null]", '["x"]', "[[]]", '[{"names": ["database"]}, 1]']
)
def test_requests_that_are_no_objects_are_an_error(s: Session, requests: str) -> None:
    s.create("database", 5)
    with changes_nothing(s), fails("PL001", "requests"):
        s.run("select * from pglimits.acquire_many(%s::jsonb)", requests)
