"""Bad input of any kind: a clear error that names the argument, and nothing changed."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from sqltest import FOREVER, Clock, Db, Session, changes_nothing, fails, tables

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
DURATIONS = {
    "null": "null::float8", "zero": "0", "too short": "0.999999", "negative": "-300", "too long": "366 * 86400 + 1",
    "NaN": "'NaN'", "infinity": "'Infinity'", "minus infinity": "'-Infinity'",
}  # fmt: skip
TIMEOUTS = {
    "negative": "-1e-9", "too long": "1.1e9", "NaN": "'NaN'", "infinity": "'Infinity'", "minus infinity": "'-Infinity'",
}  # fmt: skip
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
ID_ARRAYS = {
    "null": "null::uuid[]", "null element": "array[null]::uuid[]", "nested": "array[array[gen_random_uuid()]]",
    "nested square": "array_fill(gen_random_uuid(), array[2, 2])",
}  # fmt: skip
SWEEPS = {
    "max_keys": {"null": "null::int", "zero": "0", "negative": "-1"},
    "idle_seconds": {"null": "null::float8", **TIMEOUTS},
}
STEPS = {
    "seconds": {"null": "null::float8", "zero": "0", **TIMEOUTS},
    "points": {"null": "null::int", "zero": "0", "negative": "-1", "too many": "10001"},
}
REQUEST = {
    "timeout_seconds": TIMEOUTS, "priority": PRIORITIES, "holder": HOLDERS, "strict": BOOLEANS, "channel": CHANNELS,
}  # fmt: skip
ACQUIRE = {"lease_duration": DURATIONS, **REQUEST, "clamp": BOOLEANS}
WAIT = {name: values for name, values in ACQUIRE.items() if name != "channel"}
RATE_WAIT = {name: values for name, values in REQUEST.items() if name != "channel"}
ONE = {"name": NAMES, "slots": SLOTS, "key": KEYS}
SEVERAL = {"names": NAMES_ARRAYS, "slots": SLOTS_ARRAYS, "keys": KEYS_ARRAYS}
PEEK = {"timeout_seconds": TIMEOUTS, "priority": PRIORITIES, "strict": BOOLEANS, "for_rate": BOOLEANS}
ID, IDS_OF_TWO, TWO = "gen_random_uuid()", "array[gen_random_uuid()]", "array['database', 'api']"
RATES_OF_TWO = "array['api', 'other api']"

# What is called, the arguments that it cannot do without with good values for them, and bad values for each argument.
FUNCTIONS: dict[str, tuple[dict[str, str], dict[str, dict[str, str]]]] = {
    "acquire": ({"name": "'database'"}, ONE | ACQUIRE),
    "acquire_all": ({"names": TWO}, SEVERAL | ACQUIRE),
    "acquire_wait": ({"name": "'database'"}, ONE | WAIT),
    "rate_limit": ({"name": "'api'"}, ONE | REQUEST),
    "rate_limit_all": ({"names": RATES_OF_TWO}, SEVERAL | REQUEST),
    "rate_limit_wait": ({"name": "'api'"}, ONE | RATE_WAIT),
    "peek": ({"name": "'database'"}, ONE | PEEK),
    "peek_all": ({"names": TWO}, SEVERAL | PEEK),
    # Without a duration, renew goes by the one the lease was taken with.
    "renew": ({"lease_id": ID}, {"lease_id": IDS, "lease_duration": {**DURATIONS, "null": ""}}),
    "renew_all": ({"lease_ids": IDS_OF_TWO}, {"lease_ids": ID_ARRAYS, "lease_duration": {**DURATIONS, "null": ""}}),
    "release": ({"lease_id": ID}, {"lease_id": IDS}),
    "release_all": ({"lease_ids": IDS_OF_TWO}, {"lease_ids": ID_ARRAYS}),
    "release_wait": ({"lease_id": ID}, {"lease_id": IDS}),
    "settle": (
        {"lease_id": ID, "name": "'api'", "slots": "1"},
        {"lease_id": IDS, "name": NAMES, "slots": {"null": "null::int", "negative": "-1"}, "key": KEYS},
    ),
    "settle_all": (
        {"lease_id": ID, "names": RATES_OF_TWO, "slots": "array[1]"},
        {"lease_id": IDS, **SEVERAL, "slots": {n: v for n, v in SLOTS_ARRAYS.items() if n != "zero"}},
    ),
    "_watch": ({"lease_ids": IDS_OF_TWO, "only_news": "false"}, {"lease_ids": ID_ARRAYS, "only_news": BOOLEANS}),
    "_beat": ({"channel": "'pglimits_a'"}, {"channel": {"null": "null::text", **CHANNELS}}),
    "_release_batch": ({"lease_ids": IDS_OF_TWO}, {"lease_ids": ID_ARRAYS}),
    "create_limit": (
        {"name": "'new'", "limit": "1"},
        {
            "name": NAMES, "limit": LIMITS, "slot_decay_per_second": {**RATES, "null": "null::float8"},
            "active": BOOLEANS, "max_waiters": {**MAX_WAITERS, "minus one": "-1"}, "description": DESCRIPTIONS,
        },
    ),
    "update_limit": (
        {"name": "'api'"},
        {
            "name": NAMES, "limit": {"negative": "-1"}, "slot_decay_per_second": RATES, "max_waiters": MAX_WAITERS,
            "description": DESCRIPTIONS, "new_name": {**NAMES, "null": ""},
        },
    ),
    "delete_limit": ({"name": "'api'"}, {"name": NAMES}),
    "adjust": ({"name": "'api'", "slots": "1"}, {"name": NAMES, "slots": {"null": "null::int"}, "key": KEYS}),
    "reset": ({"name": "'api'"}, {"name": NAMES, "key": {**KEYS, "null": ""}}),
    "sweep": ({}, SWEEPS),
    "force_release": ({"lease_id": ID}, {"lease_id": IDS}),
    "keep_history": ({}, {"seconds": {"null": "null::float8", **TIMEOUTS}}),
    "history": ({"name": "'api'"}, {"name": NAMES, **STEPS}),
    "sparklines": ({"names": TWO}, {"names": {"null": "null::text[]"}, **STEPS}),
    "why_waiting": ({"name": "'api'"}, {"name": NAMES}),
    "cron_enable": ({}, {"every_seconds": {"null": "null::float8", "zero": "0", "negative": "-60", "long": "2e5"}}),
}  # fmt: skip


def cases(function: str) -> Iterator[tuple[str, str, str]]:
    needed, arguments = FUNCTIONS[function]
    for argument, values in arguments.items():
        for what, value in values.items():
            if value:  # without one: null is good
                texts = ", ".join(f'"{name}" => {text}' for name, text in {**needed, argument: value}.items())
                verb = "call" if function.endswith("_wait") else "select * from"
                yield argument, what, f"{verb} pglimits.{function}({texts})"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_input_is_an_error_that_names_the_argument_and_changes_nothing(db: Db, s: Session, function: str) -> None:
    s.create("database", 5, 1)
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
    any_value_is_good = {"lease_id", "active"}
    rows = s.all(
        """
        select p.proname as name, array_agg(a.name) as names
        from pg_proc p
        cross join lateral unnest(p.proargnames, coalesce(p.proargmodes, array_fill('i'::"char", array[p.pronargs])))
          as a(name, mode)
        where p.pronamespace = 'pglimits'::regnamespace and p.proname not like '\\_%%' and a.mode = 'i'
        group by p.proname
        """
    )
    assert len(rows) > 15
    for row in rows:
        assert set(row.names) - set(FUNCTIONS[row.name][1]) <= any_value_is_good, row.name


@pytest.mark.parametrize(
    ("what", "bad"),
    [
        ("lease_ids", "'{}'"), ("lease_ids", "array_fill(gen_random_uuid(), array[10001])"),
        ("lease_ids", "array[null]::uuid[]"), ("holders", "'{}'"), ("holders", "'[]'"), ("holders", "'[1, 2]'"),
        ("for_rate", "null"), ("strict", "null"), ("priority", "null"), ("lease_duration", "0.5"), ("names", "'{}'"),
        ("slots", "'{1,1}'"), ("keys", "null"), ("channel", "'x'"), ("clamp", "null"),
    ],
)  # fmt: skip
def test_a_batch_that_is_wrong_is_an_error_too(s: Session, what: str, bad: str) -> None:
    s.create("database", 5)
    good = {
        "names": "'{database}'", "slots": "'{1}'", "keys": "'{\"\"}'", "for_rate": "false", "timeout_seconds": "0",
        "lease_duration": "300", "priority": "0", "lease_ids": "array[gen_random_uuid()]", "holders": "'[null]'",
        "again": "false", "strict": "false", "channel": "null",
    }  # fmt: skip
    texts = ", ".join(f"{name} => {value}" for name, value in {**good, what: bad}.items())
    with changes_nothing(s), fails("PL001", what.removesuffix("s")):
        s.run(f"select * from pglimits._acquire_batch({texts})")


def test_slots_that_add_up_beyond_an_integer_are_an_error(db: Db, s: Session) -> None:
    s.create("huge", 2_147_483_647)
    for function in ("acquire", "peek"):
        with pytest.raises(psycopg.Error) as caught:
            s.run(f"select * from pglimits.{function}_all(array['huge', 'huge'], array[2147483647])")
        assert caught.value.diag.sqlstate in ("PL001", "PL004")
        assert "slots" in (caught.value.diag.message_primary or "")


def test_lower_bounds_of_arrays_do_not_matter(s: Session) -> None:
    s.create("one", 5)
    s.create("two", 5)
    answer = s.one(
        "select * from pglimits.acquire_all('[0:1]={one,two}'::text[], '[7:8]={1,2}'::int[], '[3:3]={k}'::text[])"
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
    assert s.acquire("huge", timeout_seconds=1e9, priority=-1_000_000).status == "queued"
    assert s.acquire("huge", key="k", lease_duration=31622400).status == "granted"
    assert s.rate_limit("slow", slots=2_147_483_647).status == "granted"
    assert s.rate_limit("slow", slots=2_147_483_647, timeout_seconds=1e9).status == "refused"
    assert s.rate_limit("slow", slots=2_147_483_647, timeout_seconds=FOREVER).status == "queued"
    assert s.limit("slow").waiting == 1
    for arguments in ("idle_seconds => 1e9", "2147483647, 0"):
        s.run(f"select pglimits.sweep({arguments})")


def test_a_sweep_counts_more_slots_than_an_integer_holds(clock: Clock, s: Session) -> None:
    s.create("huge", 2_147_483_647)
    for key in ("a", "b"):
        s.acquire("huge", slots=2_147_483_647, key=key)
    clock.advance(301)
    assert s.sweep().leases == 2_147_483_647
    assert s.limit("huge").held == 0


@pytest.mark.parametrize("function", ["acquire", "rate_limit", "peek"])
def test_a_list_that_a_driver_made_a_text_of_lets_nobody_through(s: Session, function: str) -> None:
    s.create("database", 5, 1)
    for name in ("{a,b}", "a,b", "{}", "{database}", '["database"]', "[]", "(database)", "()", '{"a": 1}'):
        for call in (f"{function}(%s)", f"{function}_all(array[%s])"):
            with changes_nothing(s), fails("PL001", name, f"call {function}_all"):
                s.run(f"select pglimits.{call}", name)


@pytest.mark.parametrize("name", ["a,b", "{a}"])
def test_a_limit_of_such_a_name_is_one_like_any_other(s: Session, name: str) -> None:
    s.create(name, 1)
    assert [s.acquire(name).status for _ in range(2)] == ["granted", "refused"]
