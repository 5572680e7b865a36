"""The routes for Prefect's clients, called by plain HTTP: each status code, body and header."""

from __future__ import annotations

import base64
import json
import uuid
from typing import Any

import httpx
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from prefecttest import LIMITS, Prefect, _prefect, client, looks, prefect
from servertest import FULL, READ, Server

Connection = Any
__all__ = ["_prefect", "client", "looks", "prefect"]


def increment(client: httpx.Client, *names: str, slots: int = 1, **body: Any) -> httpx.Response:
    return client.post("/increment-with-lease", json={"names": list(names), "slots": slots, **body})


def test_what_a_client_asks_first(shared: Server) -> None:
    with shared.client(base_url=shared.url + "/api") as client:
        assert client.get("/health").json() is True
        assert client.get("/ready").json() == {"message": "OK"}
        assert client.get("/hello").json() == "👋"
        assert client.get("/version").json() == "0.8.4"
        old = client.get("/admin/version", headers={"User-Agent": "prefect/3.2.1 (API 0.8.4)"})
        assert old.json() == "3.2.1"
        assert client.get("/admin/version", headers={"User-Agent": "curl"}).json().startswith("3.")
        token = client.get("/csrf-token", params={"client": str(uuid.uuid4())})
        assert (token.status_code, token.json()) == (422, {"detail": "CSRF protection is disabled."})
        assert dict(client.cookies) == {"pglimits_polls": "1"}
        cookie = token.headers["set-cookie"]
        assert all(part in cookie for part in ("HttpOnly", "Path=/api", "SameSite=strict"))


def test_a_limit_from_its_creation_to_its_end(client: httpx.Client, looks: Connection) -> None:
    made = client.post("/", json={"name": "tag:a b", "limit": 3, "active_slots": 2})
    assert made.status_code == 201
    limit = made.json()
    assert limit | {"id": "", "created": "", "updated": ""} == {
        "id": "", "created": "", "updated": "", "active": True, "name": "tag:a b", "limit": 3, "active_slots": 2,
        "denied_slots": 0, "slot_decay_per_second": 0.0, "avg_slot_occupancy_seconds": 2.0,
    }  # fmt: skip
    assert uuid.UUID(limit["id"]).version == 8
    assert client.post("", json={"name": "tag:a b", "limit": 3}).status_code == 409
    read = {name: limit[name] for name in limit if name not in ("denied_slots", "avg_slot_occupancy_seconds")}
    assert client.get(f"/{limit['id']}").json() == client.get("/tag:a b").json() == read
    assert client.patch(f"/{limit['id']}", json={"limit": 7, "name": "b", "active": None}).status_code == 204
    assert client.get(f"/{limit['id']}").json()["name"] == "b"
    client.post("/", json={"name": "c", "limit": 1})
    assert client.patch("/b", json={"name": "c"}).status_code == 409
    assert client.patch("/b", json={}).status_code == 204
    assert client.delete("/b").status_code == 204
    gone = client.delete(f"/{limit['id']}")
    assert (gone.status_code, gone.json()["detail"]) == (404, "Concurrency Limit not found")
    assert client.patch("/b", json={"limit": 1}).status_code == client.get("/b").status_code == 404
    assert client.get(f"/{uuid.uuid4()}").status_code == client.get("/%00").status_code == 404
    assert looks.execute("select name from pglimits.limits").fetchall() == [("c",)]


def test_a_name_that_is_a_uuid(client: httpx.Client) -> None:
    name = str(uuid.uuid4())
    client.post("/", json={"name": name, "limit": 3})
    limit = client.get(f"/{name}").json()
    assert limit["name"] == name
    other = client.post("/", json={"name": limit["id"], "limit": 4, "active_slots": 1}).json()
    assert (other["name"], other["active_slots"]) == (limit["id"], 1)
    assert client.get(f"/{limit['id']}").json() == limit


def test_a_filter_lists_by_name_with_offset_and_limit(client: httpx.Client, looks: Connection) -> None:
    looks.execute("select pglimits.create_limit('l' || n, 1) from generate_series(1, 5) n")

    def names(**body: Any) -> list[str]:
        return [limit["name"] for limit in client.post("/filter", json=body).json()]

    assert names() == ["l1", "l2", "l3", "l4", "l5"]
    assert names(limit=2, offset=3) == ["l4", "l5"]
    assert names(limit=0) == []
    assert len(client.post("/filter").json()) == 5
    assert client.post("/filter", json={"limit": 201}).status_code == 422


@pytest.mark.parametrize(
    "path, body",
    [
        ("/", {"name": "a/b", "limit": 1}),
        ("/", {"name": "a", "limit": -1}),
        ("/", {"name": "a"}),
        ("/", {"name": "a", "limit": 1, "more": 1}),
        ("/", {"name": "a\0", "limit": 1}),
        ("/", {"name": "a\ud800", "limit": 1}),
        ("/", {"name": "a" * 201, "limit": 1}),
        ("/", {"name": "a", "limit": 1, "slot_decay_per_second": float("inf")}),
        ("/", {"name": "a", "limit": 2, "active_slots": 3}),
        ("/increment-with-lease", {"names": ["one"], "slots": 0}),
        ("/increment-with-lease", {"names": [], "slots": 1}),
        ("/increment-with-lease", {"names": ["one"], "slots": 2}),
        ("/increment-with-lease", {"names": ["one"], "slots": 1, "mode": "rate_limit"}),
        ("/increment-with-lease", {"names": ["one"], "slots": 1, "lease_duration": 0.5}),
        ("/increment-with-lease", {"names": ["one"], "slots": 1, "holder": {"type": "flow", "id": "x"}}),
        ("/increment-with-lease", {"names": ["{one,two}"], "slots": 1}),
        ("/increment", {"names": ["one\ud800"], "slots": 1}),
        ("/decrement", {"names": ["one"], "slots": 1, "occupancy_seconds": 0}),
        ("/decrement-with-lease", {"lease_id": "x"}),
        ("/leases/x/renew", {"lease_duration": 60}),
        (f"/leases/{uuid.UUID(int=1)}/renew", {"lease_duration": 0}),
    ],
)
def test_a_body_that_is_wrong_is_422_with_what_is_wrong(
    client: httpx.Client, looks: Connection, path: str, body: Any
) -> None:
    looks.execute("select pglimits.create_limit('one', 1)")
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["exception_detail"][0]["msg"]
    assert looks.execute("select name, held from pglimits.limits").fetchall() == [("one", 0)]


def test_a_body_that_is_no_json(client: httpx.Client) -> None:
    answer = client.post("/increment", content="{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["exception_detail"][0]["msg"]


def test_a_lease_is_granted_renewed_and_ended(client: httpx.Client, looks: Connection) -> None:
    looks.execute("select pglimits.create_limit('a', 2), pglimits.create_limit('b', 3)")
    run = {"type": "task_run", "id": str(uuid.uuid4())}
    granted = increment(client, "b", "none", "a", "a", slots=2, lease_duration=120, holder=run)
    assert granted.status_code == 200
    lease = granted.json()
    assert [(limit["name"], limit["limit"]) for limit in lease["limits"]] == [("b", 3), ("a", 2)]
    assert lease["limits"][1]["id"] == client.get("/a").json()["id"]
    holders = looks.execute("select lease_id, name, slots, holder from pglimits.holders").fetchall()
    assert [(str(row[0]), *row[1:3]) for row in holders] == [(lease["lease_id"], "a", 2), (lease["lease_id"], "b", 2)]
    assert holders[0][3] == {**run, "address": "127.0.0.1", "program": client.headers["User-Agent"]}
    assert client.get("/a").json()["active_slots"] == 2

    renewed = client.post(f"/leases/{lease['lease_id']}/renew", json={"lease_duration": 4000})
    assert (renewed.status_code, renewed.content) == (204, b"")
    longer = "select bool_and(expires_at > clock_timestamp() + interval '1 hour') from pglimits.holders"
    assert looks.execute(longer).fetchone() == (True,)
    for _ in range(2):
        ended = client.post("/decrement-with-lease", json={"lease_id": lease["lease_id"]})
        assert (ended.status_code, ended.content) == (204, b"")
    assert client.get("/a").json()["active_slots"] == 0
    gone = client.post(f"/leases/{lease['lease_id']}/renew", json={})
    assert (gone.status_code, gone.json()["detail"]) == (
        410,
        "Lease not found - it may have expired or been revoked",
    )


def test_a_lease_of_nothing_lives_as_long_as_its_client_likes(client: httpx.Client, looks: Connection) -> None:
    looks.execute("select pglimits.create_limit('off', 1, active => false), pglimits.create_limit('rate', 5, 1)")
    missing = increment(client, "none", "neither").json()
    off = increment(client, "off").json()
    rate = increment(client, "rate", mode="rate_limit").json()
    assert [len(lease["limits"]) for lease in (missing, off, rate)] == [0, 1, 1]
    looks.execute("select pglimits.update_limit('off', active => true)")
    for lease in (missing, off, rate):
        assert client.post(f"/leases/{lease['lease_id']}/renew", json={}).status_code == 204
        assert client.post("/decrement-with-lease", json={"lease_id": lease["lease_id"]}).status_code == 204
    assert increment(client, "off").status_code == 200


def test_a_short_wait_for_a_rate_is_slept_out(client: httpx.Client, looks: Connection) -> None:
    looks.execute("select pglimits.create_limit('rate', 1, 20)")
    for _ in range(5):
        went = client.post("/increment", json={"names": ["rate"], "slots": 1, "mode": "rate_limit"})
        assert (went.status_code, went.json()[0]["name"]) == (200, "rate")


def test_a_refusal_says_when_to_ask_again(shared: Server, looks: Connection) -> None:
    looks.execute("select pglimits.create_limit('rate', 1, 0.05), pglimits.create_limit('one', 1)")
    for name, mode in (("rate", "rate_limit"), ("one", "concurrency")):
        body = {"names": [name], "slots": 1, "mode": mode}
        with shared.client(base_url=shared.url + LIMITS) as fresh:
            assert fresh.post("/increment-with-lease", json=body).status_code == 200
            refused = fresh.post("/increment-with-lease", json=body)
            assert (refused.status_code, refused.json()["detail"]) == (423, "Locked")
            seconds = float(refused.headers["Retry-After"])
            assert seconds == 1 if name == "one" else 0.05 * 15 < seconds * 0.05 <= 1
            if name == "one":
                # One that keeps cookies comes again at once, to stand in line.
                assert fresh.post("/increment", json=body).headers["Retry-After"] == "0"
    assert looks.execute("select sum(waiting) from pglimits.limits").fetchone() == (0,)


def test_slots_without_a_lease_are_given_back_by_number(client: httpx.Client, looks: Connection) -> None:
    looks.execute("select pglimits.create_limit('a', 5), pglimits.create_limit('b', 5)")
    both = {"names": ["a", "b"], "slots": 3}
    taken = client.post("/increment", json=both)
    assert [limit["name"] for limit in taken.json()] == ["a", "b"]
    assert client.post("/increment", json=both).status_code == 423
    leased = increment(client, "a", slots=2)
    waiting = looks.execute("select status, lease_id from pglimits.acquire('a', 2, timeout_seconds => 60)").fetchone()
    assert waiting[0] == "queued"

    # One is given back: it is free, and no more than that.
    assert client.post("/decrement", json={"names": ["a"], "slots": 1}).json()[0]["name"] == "a"
    assert client.get("/a").json()["active_slots"] == 4
    assert client.get("/b").json()["active_slots"] == 3
    # Another one: who waits has it.
    client.post("/decrement", json={"names": ["a"], "slots": 1, "occupancy_seconds": 0.5})
    asked = looks.execute(
        "select status from pglimits.acquire('a', 2, timeout_seconds => 60, lease_id => %s)", [waiting[1]]
    )
    assert asked.fetchone() == ("granted",)
    assert looks.execute("select held from pglimits.limits").fetchall() == [(5,), (3,)]
    # A part of a lease on two limits: the rest stays.
    third = client.post("/increment", json={"names": ["b"], "slots": 1})
    assert third.status_code == 200
    client.post("/decrement", json={"names": ["b"], "slots": 2})
    assert looks.execute("select held from pglimits.limits").fetchall() == [(5,), (2,)]
    client.post("/increment", json={"names": ["b"], "slots": 1})
    # More than there is, and of limits that are not there.
    client.post("/decrement", json={"names": ["a", "b", "none"], "slots": 9})
    assert looks.execute("select held from pglimits.limits").fetchall() == [(4,), (0,)]
    assert client.post("/decrement", json={"names": ["none"], "slots": 9}).json() == []
    assert client.post(f"/leases/{leased.json()['lease_id']}/renew", json={}).status_code == 204


def test_active_slots_of_a_rate_limit_are_its_level(client: httpx.Client, looks: Connection) -> None:
    client.post("/", json={"name": "rate", "limit": 5, "slot_decay_per_second": 0.001, "active_slots": 4})
    for wanted in (4, 7, 2, 0):
        client.patch("/rate", json={"active_slots": wanted})
        assert client.get("/rate").json()["active_slots"] == wanted
    client.post("/increment", json={"names": ["rate"], "slots": 3, "mode": "rate_limit"})
    client.post("/decrement", json={"names": ["rate"], "slots": 3})
    assert client.get("/rate").json()["active_slots"] == 3


def test_active_slots_of_an_inactive_limit(client: httpx.Client, looks: Connection) -> None:
    client.post("/", json={"name": "off", "limit": 5, "active": False, "active_slots": 4})
    limit = client.get("/off").json()
    assert (limit["active"], limit["active_slots"]) == (False, 4)
    refused = client.patch("/off", json={"active_slots": 5})
    assert (refused.status_code, "inactive" in refused.json()["detail"]) == (422, True)
    assert client.patch("/off", json={"active_slots": 5, "active": False}).status_code == 422
    assert client.patch("/off", json={"active_slots": 4}).status_code == 204
    assert client.patch("/off", json={"active_slots": 5, "active": True}).status_code == 204
    assert client.get("/off").json()["active_slots"] == 5
    body = {"active_slots": 7, "limit": 8, "active": False, "name": "new"}
    assert client.patch("/off", json=body).status_code == 204
    limit = client.get("/new").json()
    assert (limit["active"], limit["active_slots"], limit["limit"]) == (False, 7, 8)


def test_a_limit_of_zero_refuses_until_it_is_opened(client: httpx.Client, looks: Connection) -> None:
    client.post("/", json={"name": "shut", "limit": 0})
    assert increment(client, "shut").status_code == 423
    client.patch("/shut", json={"limit": 1})
    assert increment(client, "shut").status_code == 200


def test_tokens(guarded: Server) -> None:
    basic = base64.b64encode(f"ops:{FULL}".encode()).decode()
    body = {"names": ["none"], "slots": 1}
    with guarded.client() as client:
        assert client.get("/api/health").status_code == client.get("/api/ready").status_code == 200
        assert client.get("/api/admin/version").status_code == 401
        assert client.post(f"{LIMITS}/filter", json={}).status_code == 401
        for authorization, writes in ((f"Bearer {FULL}", 200), (f"Basic {basic}", 200), (f"Bearer {READ}", 403)):
            headers = {"Authorization": authorization}
            assert client.post(f"{LIMITS}/filter", json={}, headers=headers).status_code == 200
            assert client.post(f"{LIMITS}/increment", json=body, headers=headers).status_code == writes
            assert client.delete(f"{LIMITS}/none", headers=headers).status_code == (403 if writes == 403 else 404)


def test_events_that_clients_send_are_taken(shared: Server) -> None:
    from websockets.sync.client import connect

    with connect(f"ws{shared.url[4:]}/api/events/in", subprotocols=["prefect"]) as socket:  # type: ignore[list-item]
        socket.send(json.dumps({"type": "auth", "token": None}))
        assert json.loads(socket.recv(10)) == {"type": "auth_success"}
        socket.send("{}")
        assert socket.ping().wait(10)


def test_answers_are_what_prefects_own_models_say(prefect: Prefect, client: httpx.Client) -> None:
    created = client.post("/", json={"name": "a", "limit": 3, "slot_decay_per_second": 0.5}).json()
    read = client.get("/a").json()
    leased = increment(client, "a").json()
    process = prefect.run(
        "validate", [["created", created], ["limit", read], ["leased", leased], ["minimal", leased["limits"][0]]]
    )
    assert process.said == [created, read, leased, leased["limits"][0]]


FIELDS = st.sampled_from(
    [
        *("name", "names", "slots", "mode", "limit", "offset", "active", "active_slots", "slot_decay_per_second"),
        *("lease_duration", "lease_id", "holder", "occupancy_seconds"),
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["one", "rate", "\ud800", "\0", "9" * 400, "{a}", 2**31, 1e308, "rate_limit"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "id"]), inner, max_size=2),
    max_leaves=4,
)
PATHS = ["/", "/filter", "/one", "/rate", "/increment", "/increment-with-lease", "/decrement", "/decrement-with-lease"]


def test_nonsense_is_never_a_500(client: httpx.Client, looks: Connection) -> None:
    looks.execute("select pglimits.create_limit('one', 1), pglimits.create_limit('rate', 5, 1)")
    typical = {"name": "one", "names": ["one", "rate"], "slots": 1, "limit": 5}

    @settings(max_examples=150, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(
        st.sampled_from(["POST", "PATCH"]),
        st.sampled_from(PATHS),
        st.dictionaries(FIELDS, VALUES, max_size=4),
        st.booleans(),
        st.sampled_from(["", "x", f"{uuid.UUID(int=1)}_1_1", f"{uuid.UUID(int=1)}_nan_inf"]),
    )
    def ask(method: str, path: str, body: dict[str, Any], is_typical: bool, cookie: str) -> None:
        content = json.dumps({**(typical if is_typical else {}), **body})
        headers = {"Content-Type": "application/json", "Cookie": f"pglimits_place_x={cookie}"}
        answer = client.request(method, path, content=content, headers=headers)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert answer.json()

    ask()
