"""/v1 on a real server: limits, slots, views."""

from __future__ import annotations

import asyncio
import re
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from servertest import FULL, Server, messages, until

QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"


def made(http: httpx.Client, name: str, limit: int, **more: Any) -> None:
    response = http.post("/v1/limits", json={"name": name, "limit": limit, **more})
    assert response.status_code == 201, response.text


def test_a_limit_is_created_read_changed_listed_and_deleted(http: httpx.Client) -> None:
    response = http.post("/v1/limits", json={"name": "a b", "limit": 3, "description": "x"})
    assert response.status_code == 201
    assert response.headers["location"].endswith("/v1/limits/a%20b")
    assert http.get(response.headers["location"]).json()["limit"] == 3
    changed = http.patch("/v1/limits/a b", json={"max_waiters": 7})
    assert {key: changed.json()[key] for key in ("limit", "max_waiters", "description", "active")} == {
        "limit": 3,
        "max_waiters": 7,
        "description": "x",
        "active": True,
    }
    changed = http.patch(
        "/v1/limits/a b", json={"max_waiters": None, "description": None, "active": False, "name": "b"}
    )
    assert {key: changed.json()[key] for key in ("name", "max_waiters", "description", "active")} == {
        "name": "b",
        "max_waiters": None,
        "description": None,
        "active": False,
    }
    assert [row["name"] for row in http.get("/v1/limits").json()["limits"]] == ["b"]
    assert http.delete("/v1/limits/b").status_code == 204
    assert http.get("/v1/limits/b").status_code == 404


def test_limits_are_filtered_sorted_and_paged(http: httpx.Client) -> None:
    for nth in range(5):
        made(http, f"limit-{nth}", 10 + nth, slot_decay_per_second=float(nth % 2), active=nth != 4)
    http.post("/v1/acquire", json={"name": "limit-2", "slots": 5})

    def names(**params: Any) -> list[str]:
        return [row["name"] for row in http.get("/v1/limits", params=params).json()["limits"]]

    assert names(name="IT-3") == ["limit-3"]
    assert names(active=False) == ["limit-4"]
    assert names(kind="rate") == ["limit-1", "limit-3"]
    assert names(sort="busiest")[0] == "limit-2"
    assert names(sort="limit", limit=2) == ["limit-4", "limit-3"]
    page = http.get("/v1/limits", params={"limit": 2, "offset": 2}).json()
    assert ([row["name"] for row in page["limits"]], page["total"]) == (["limit-2", "limit-3"], 5)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/limits", {"name": "a/b", "limit": 1}, 422, "PL001"),
        ("POST", "/v1/limits", {"name": "a", "limit": -1}, 422, "PL001"),
        ("POST", "/v1/limits", {"name": "a", "limit": 1, "limti": 2}, 422, "PL001"),
        ("POST", "/v1/limits", {"name": "there", "limit": 1}, 409, "PL003"),
        ("PATCH", "/v1/limits/there", {"limit": None}, 422, "PL001"),
        ("PATCH", "/v1/limits/missing", {"limit": 1}, 404, "PL002"),
        ("DELETE", "/v1/limits/missing", None, 404, "PL002"),
        ("POST", "/v1/acquire", {"name": "there", "slots": 2}, 422, "PL004"),
        ("POST", "/v1/acquire", {"name": "missing", "strict": True}, 404, "PL002"),
        ("POST", "/v1/acquire", {"name": "there", "holder": "\x00"}, 422, "PL001"),
        ("POST", "/v1/acquire", {}, 422, "PL001"),
        ("POST", "/v1/rate_limit", {"name": "there"}, 422, "PL005"),
        ("POST", "/v1/limits/there/adjust", {"slots": 1}, 422, "PL005"),
        ("POST", "/v1/leases/00000000-0000-4000-8000-000000000001/renew", None, 410, None),
        ("GET", "/v1/nothing", None, 404, None),
        ("PUT", "/v1/limits", None, 405, None),
    ],
)
def test_an_error_is_problem_details_with_our_code(
    http: httpx.Client, method: str, path: str, body: Any, status: int, code: str | None
) -> None:
    made(http, "there", 1)
    response = http.request(method, path, json=body)
    problem = response.json()
    assert (response.status_code, problem["status"], problem.get("code")) == (status, status, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["type"] and problem["title"] and problem["detail"]


def test_a_lease_is_taken_seen_renewed_and_released(http: httpx.Client) -> None:
    made(http, "database", 10)
    response = http.post(
        "/v1/acquire", json={"name": "database", "slots": 2, "holder": {"job": 1}, "lease_duration": 60}
    )
    lease = response.json()
    assert (response.status_code, lease["status"], lease["fence"] > 0) == (200, "granted", True)
    assert response.headers["RateLimit-Policy"] == '"database";q=10;qu="concurrent-requests"'
    assert response.headers["RateLimit"] == '"database";r=8'
    (holder,) = http.get("/v1/holders", params={"name": "database"}).json()["holders"]
    assert (holder["lease_id"], holder["slots"], holder["holder"]) == (lease["lease_id"], 2, {"job": 1})
    renewed = http.post(f"/v1/leases/{lease['lease_id']}/renew", json={"lease_duration": 600}).json()
    assert renewed["expires_at"] > lease["expires_at"]
    assert http.delete(f"/v1/leases/{lease['lease_id']}").json() == {"released": True}
    assert http.delete(f"/v1/leases/{lease['lease_id']}").json() == {"released": False}
    assert http.post(f"/v1/leases/{lease['lease_id']}/renew").status_code == 410


def test_several_limits_are_taken_together_or_not_at_all(http: httpx.Client) -> None:
    made(http, "tenant", 1)
    made(http, "everyone", 5)
    wanted = {"limits": [{"name": "tenant", "key": "t1"}, {"name": "everyone", "slots": 3}]}
    first = http.post("/v1/acquire", json=wanted)
    assert (first.json()["status"], len(first.json()["fences"])) == ("granted", 2)
    assert first.headers["RateLimit"] == '"tenant";r=0;pk=:dDE=:, "everyone";r=2'
    second = http.post("/v1/acquire", json=wanted)
    assert (second.status_code, second.json()["violated-policies"]) == (429, ["tenant", "everyone"])
    assert [row["held"] for row in http.get("/v1/limits").json()["limits"]] == [3, 1]


def test_a_refusal_says_when_to_try_again(http: httpx.Client) -> None:
    made(http, "api", 5, slot_decay_per_second=0.1)
    assert http.post("/v1/rate_limit", json={"name": "api", "slots": 5}).status_code == 200
    response = http.post("/v1/rate_limit", json={"name": "api"})
    problem = response.json()
    assert (response.status_code, problem["type"]) == (429, QUOTA_EXCEEDED)
    assert 8 < problem["retry_after"] <= 10
    assert response.headers["Retry-After"] in ("9", "10")
    assert response.headers["RateLimit-Policy"] == '"api";q=5;w=50'
    assert response.headers["RateLimit"] == f'"api";r=0;t={response.headers["Retry-After"]}'
    full = http.post("/v1/limits", json={"name": "full", "limit": 1}) and http.post(
        "/v1/acquire", json={"name": "full"}
    )
    assert full.status_code == 200
    refused = http.post("/v1/acquire", json={"name": "full"}).json()
    assert refused["retry_after"] is None or refused["retry_after"] > 200


def test_what_is_left_of_a_rate_limit_is_told(http: httpx.Client) -> None:
    made(http, "api", 5, slot_decay_per_second=5)
    response = http.post("/v1/rate_limit", json={"name": "api", "slots": 2})
    assert response.json()["status"] == "granted"
    assert response.headers["RateLimit-Policy"] == '"api";q=5;w=1'
    assert response.headers["RateLimit"] in ('"api";r=3;t=1', '"api";r=4;t=1')


def test_a_missing_limit_is_not_enforced_and_a_shut_one_admits_nobody(http: httpx.Client) -> None:
    assert http.post("/v1/acquire", json={"name": "missing"}).json()["status"] == "unlimited"
    assert http.post("/v1/rate_limit", json={"name": "missing"}).json()["status"] == "unlimited"
    made(http, "shut", 0)
    assert http.post("/v1/acquire", json={"name": "shut"}).status_code in (422, 429)


def test_peek_adjust_and_reset(http: httpx.Client) -> None:
    made(http, "tokens", 100, slot_decay_per_second=0.001)
    assert http.post("/v1/peek", json={"name": "tokens", "for_rate": True}).json()["status"] == "granted"
    assert round(http.post("/v1/limits/tokens/adjust", json={"slots": 150}).json()["level"]) == 150
    assert http.post("/v1/peek", json={"name": "tokens", "for_rate": True}).json()["status"] == "refused"
    http.post("/v1/limits/tokens/reset")
    assert http.post("/v1/peek", json={"name": "tokens", "for_rate": True}).json()["status"] == "granted"


def test_a_lease_settles_what_it_used_and_a_request_is_clamped_to_what_a_limit_has(http: httpx.Client) -> None:
    made(http, "calls", 2)
    made(http, "tokens", 1000, slot_decay_per_second=1e-6)
    wanted = {"limits": [{"name": "calls"}, {"name": "tokens", "slots": 5000, "key": "t"}]}
    assert http.post("/v1/acquire", json=wanted).json()["code"] == "PL004"
    ids: list[str] = []
    for more in ({}, {"lease_id": str(uuid.uuid4())}, {"timeout_seconds": 9, "lease_id": str(uuid.uuid4())}):
        taken = http.post("/v1/acquire", json={**wanted, **more, "clamp": True}).json()
        ids.append(taken["lease_id"])
        assert taken["status"] == "granted"
        assert [row["slots"] for row in http.get("/v1/holders", params={"name": "tokens"}).json()["holders"]] == [1000]
        at = f"/v1/leases/{ids[-1]}/settle"
        used = {"limits": [{"name": "tokens", "key": "t", "slots": slots} for slots in (3000, 2000)]}
        assert http.post(at, json=used).json() == {"settled": True}
        assert http.get("/v1/limits/tokens").json()["level"] == pytest.approx(5000)
        used["limits"] = [{"name": "tokens", "key": "t", "slots": 0}]
        assert http.post(at, json=used).json() == {"settled": True}
        assert http.get("/v1/limits/tokens").json()["level"] == 0
        http.delete(f"/v1/leases/{ids[-1]}")
        assert http.post(at, json=used).json() == {"settled": False}
    lease = http.post("/v1/acquire", json={"name": "calls", "slots": 9, "clamp": True}).json()["lease_id"]
    for limits, code in (
        ([{"name": "calls", "slots": 1}], "PL005"), ([{"name": "calls", "slots": 1, "key": "k"}], "PL001"),
        ([{"name": "calls", "slots": -1}], "PL001"), ([{"name": "calls"}], "PL001"), ([], "PL001"),
    ):  # fmt: skip
        assert http.post(f"/v1/leases/{lease}/settle", json={"limits": limits}).json()["code"] == code
    missing = {"limits": [{"name": "missing", "slots": 1}]}
    assert http.post(f"/v1/leases/{lease}/settle", json=missing).json() == {"settled": True}


def test_a_held_request_is_granted_when_the_slot_comes_free(http: httpx.Client, shared: Server) -> None:
    made(http, "one", 1)
    first = http.post("/v1/acquire", json={"name": "one"}).json()
    answers: list[httpx.Response] = []

    def wait() -> None:
        with shared.client() as client:
            answers.append(client.post("/v1/acquire", json={"name": "one", "wait": 25, "holder": {"who": "second"}}))

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: http.get("/v1/waiters").json()["waiters"], "for it to stand in line")
    http.delete(f"/v1/leases/{first['lease_id']}")
    waiting.join()
    assert answers[0].json()["status"] == "granted"
    (holder,) = http.get("/v1/holders").json()["holders"]
    assert (holder["lease_id"], holder["holder"]) == (answers[0].json()["lease_id"], {"who": "second"})


def test_when_the_hold_is_over_the_place_is_kept_and_asked_for_again(http: httpx.Client) -> None:
    made(http, "one", 1)
    first = http.post("/v1/acquire", json={"name": "one"}).json()
    wanted: dict[str, Any] = {"name": "one", "wait": 0.1, "timeout_seconds": 60}
    queued = http.post("/v1/acquire", json=wanted)
    assert (queued.status_code, queued.json()["status"], queued.json()["position"]) == (202, "queued", 1)
    assert int(queued.headers["Retry-After"]) <= 3
    behind = http.post("/v1/acquire", json=wanted).json()
    assert behind["position"] == 2
    http.delete(f"/v1/leases/{first['lease_id']}")
    again = http.post("/v1/acquire", json={**wanted, "lease_id": queued.json()["lease_id"]})
    assert (again.status_code, again.json()["status"]) == (200, "granted")
    assert again.json()["lease_id"] == queued.json()["lease_id"]


def test_a_request_that_waits_no_longer_than_it_is_held_is_refused_then(http: httpx.Client) -> None:
    made(http, "one", 1)
    http.post("/v1/acquire", json={"name": "one"})
    assert http.post("/v1/acquire", json={"name": "one", "wait": 0.2}).status_code == 429
    assert http.get("/v1/waiters").json()["waiters"] == []


def test_a_client_that_goes_away_gives_up_its_place(http: httpx.Client, shared: Server) -> None:
    made(http, "one", 1)
    http.post("/v1/acquire", json={"name": "one"})
    with shared.client(timeout=httpx.Timeout(30, read=1.0)) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/acquire", json={"name": "one", "wait": 60})
    until(lambda: http.get("/v1/waiters").json()["waiters"] == [], "for the place to be given up", 9)


def test_a_request_repeated_under_its_id_acts_once(http: httpx.Client) -> None:
    made(http, "two", 2)
    wanted = {"name": "two", "lease_id": str(uuid.uuid4())}
    first, second = (http.post("/v1/acquire", json=wanted).json() for _ in range(2))
    assert first == second
    assert http.get("/v1/limits/two").json()["held"] == 1


def test_a_stream_tells_what_changes(http: httpx.Client, shared: Server) -> None:
    made(http, "one", 1)
    with shared.client() as other, other.stream("GET", "/v1/changes") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        stream = messages(response)
        told = {kind: data for kind, _, data in (next(stream), next(stream))}
        assert told["database"] == {"down_since": None}
        assert told["limits"]["first"]
        # As they were found last: perhaps just before.
        there = told["limits"]["limits"] or next(data["limits"] for kind, _, data in stream if kind == "limits")
        assert [row["name"] for row in there] == ["one"]
        http.post("/v1/acquire", json={"name": "one"})
        data = next(data for kind, _, data in stream if kind == "limits")
        assert (data["first"], data["limits"][0]["held"]) == (False, 1)
        http.delete("/v1/limits/one")
        assert next(data["gone"] for kind, _, data in stream if kind == "limits" and data["gone"]) == ["one"]


def test_a_held_request_that_an_operator_takes_out_of_the_line_is_answered(
    http: httpx.Client, shared: Server, wait_until: Callable[..., Any]
) -> None:
    made(http, "removed", 1)
    http.post("/v1/acquire", json={"name": "removed"})

    def removed() -> bool:
        rows = http.get("/v1/waiters", params={"name": "removed"}).json()["waiters"]
        return bool(rows) and http.post(f"/v1/leases/{rows[0]['lease_id']}/force-release").json()["released"]

    with shared.client() as other, ThreadPoolExecutor(1) as thread:
        asked = thread.submit(other.post, "/v1/acquire", json={"name": "removed", "wait": 60})
        wait_until(removed)
        assert asked.result(30).status_code == 429
    assert http.get("/v1/waiters", params={"name": "removed"}).json()["total"] == 0


def test_a_page_beyond_the_last_one_is_empty_and_says_how_many_there_are(http: httpx.Client) -> None:
    for name in ("beyond-1", "beyond-2"):
        made(http, name, 1)
    http.post("/v1/acquire", json={"name": "beyond-1"})
    beyond = {"offset": 10}
    assert http.get("/v1/limits", params={"name": "beyond-", **beyond}).json() == {"limits": [], "total": 2}
    assert http.get("/v1/limits/beyond-1/keys", params=beyond).json() == {"keys": [], "total": 1}
    assert http.get("/v1/holders", params={"name": "beyond-1", **beyond}).json() == {"holders": [], "total": 1}
    assert http.get("/v1/waiters", params={"name": "beyond-1", **beyond}).json() == {"waiters": [], "total": 0}
    assert http.get("/v1/limits/beyond-1/waiters", params=beyond).json() == {"waiters": [], "total": 0}
    assert http.get("/v1/holders", params={"name": "beyond-1"}).json()["total"] == 1


def test_events_are_told_paged_and_streamed_from_the_last_one_seen(http: httpx.Client, shared: Server) -> None:
    def ids(**params: Any) -> list[int]:
        return [row["event_id"] for row in http.get("/v1/events", params={"name": "mine", **params}).json()["events"]]

    made(http, "mine", 1)
    http.patch("/v1/limits/mine", json={"limit": 2})
    lease = http.post("/v1/acquire", json={"name": "mine", "holder": {"who": "me"}}).json()
    assert http.post(f"/v1/leases/{lease['lease_id']}/force-release").json() == {"released": True}
    newest, updated, created = http.get("/v1/events", params={"name": "mine", "limit": 3}).json()["events"]
    assert (newest["kind"], newest["holder"]) == ("force_released", {"who": "me"})
    assert (updated["kind"], updated["old"], updated["new"]) == ("updated", {"limit": 1}, {"limit": 2})
    assert (created["kind"], created["by"]["application"]) == ("created", "pglimits serve")
    all_ids = [newest["event_id"], updated["event_id"], created["event_id"]]
    assert ids(before=all_ids[0], limit=1) == [all_ids[1]]
    assert ids(after=all_ids[2]) == [all_ids[1], all_ids[0]]
    assert ids(kind=["updated"], after=all_ids[2]) == [all_ids[1]]
    headers = {"Last-Event-ID": str(all_ids[2])}
    with shared.client() as other, other.stream("GET", "/v1/changes?name=mine", headers=headers) as response:
        stream = ((kind, event_id, data) for kind, event_id, data in messages(response) if kind == "event")
        told = [next(stream), next(stream)]
        http.delete("/v1/limits/mine")
        told.append(next(stream))
    assert [data["kind"] for _, _, data in told] == ["updated", "force_released", "deleted"]
    assert [event_id for _, event_id, _ in told][:2] == [str(all_ids[1]), str(all_ids[0])]


def test_a_change_says_on_whose_behalf_it_was_made(guarded: Server) -> None:
    with guarded.client(FULL) as http:
        made(http, "mine", 1)
        event = http.get("/v1/events", params={"name": "mine"}).json()["events"][0]
    assert (event["kind"], event["by"]["for"]) == ("created", "ops")


def test_why_somebody_waits_is_told(http: httpx.Client) -> None:
    made(http, "one", 1)
    http.post("/v1/acquire", json={"name": "one"})
    queued = http.post("/v1/acquire", json={"name": "one", "timeout_seconds": 60, "holder": {"who": "me"}}).json()
    (waiter,) = http.get("/v1/limits/one/waiters").json()["waiters"]
    assert (waiter["lease_id"], waiter["blocked_by"], waiter["holder"]) == (queued["lease_id"], "one", {"who": "me"})
    assert waiter["reason"]


def test_a_history_and_keys_are_shown(http: httpx.Client) -> None:
    made(http, "tenants", 5)
    for key in ("a", "b", "b"):
        http.post("/v1/acquire", json={"name": "tenants", "key": key})
    history = http.get("/v1/limits/tenants/history", params={"seconds": 60, "points": 1}).json()
    assert (history["name"], len(history["steps"]) <= 1) == ("tenants", True)
    keys = http.get("/v1/limits/tenants/keys").json()
    assert ([(row["key"], row["held"]) for row in keys["keys"]], keys["total"]) == ([("b", 2), ("a", 1)], 2)
    assert http.get("/v1/limits/missing/history").status_code == 404


def test_the_api_is_described_on_a_page_without_scripts(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "<script" not in page.text and "http://" not in page.text and "https://" not in page.text
    for path in http.get("/openapi.json").json()["paths"]:
        assert path.replace("<", "&lt;") in page.text
    types = set(re.findall(r"list of ([A-Z]\w+)", page.text))
    assert types > {"Limit", "Part"}
    for name in types:
        assert f"<code>{name}</code>" in page.text
    assert http.get("/docs.css").headers["content-type"].startswith("text/css")


def test_who_waits_for_a_rate_goes_at_its_moment(http: httpx.Client) -> None:
    made(http, "api", 1, slot_decay_per_second=4)
    answers = [http.post("/v1/rate_limit", json={"name": "api", "wait": 20}).json()["status"] for _ in range(4)]
    assert answers == ["granted"] * 4
    (limit,) = http.get("/v1/limits").json()["limits"]
    assert limit["level"] <= 1.0  # nobody went before its moment


def test_a_method_that_is_not_there_is_told_which_are(http: httpx.Client) -> None:
    for path, allow in (("/v1/limits", "GET, POST"), ("/v1/limits/a", "DELETE, GET, PATCH")):
        response = http.put(path)
        assert (response.status_code, response.headers["Allow"]) == (405, allow)


def test_requests_that_share_a_statement_are_answered_each_for_itself(http: httpx.Client, shared: Server) -> None:
    made(http, "some", 30)
    wanted: list[dict[str, Any]] = [
        {"name": "some", "lease_id": str(uuid.uuid4()), "holder": {"nth": nth}} for nth in range(50)
    ]
    wanted[7]["holder"] = "x" * 9000
    wanted.append(wanted[0])  # one is sent twice

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=shared.url, timeout=30) as client:
            return list(await asyncio.gather(*(client.post("/v1/acquire", json=body) for body in wanted)))

    answers = asyncio.run(ask_all())
    assert (answers[7].status_code, answers[7].json()["code"]) == (422, "PL001")
    granted = {answer.json()["lease_id"]: answer.json()["fence"] for answer in answers if answer.status_code == 200}
    assert (len(granted), len(set(granted.values()))) == (30, 30)
    assert {answer.status_code for answer in answers} == {200, 422, 429}
    holders = http.get("/v1/holders", params={"name": "some"}).json()["holders"]
    nth_of = {body["lease_id"]: body["holder"] for body in wanted}
    assert {row["lease_id"]: row["fence"] for row in holders} == granted
    assert all(nth_of[row["lease_id"]] == row["holder"] for row in holders)


def test_an_id_that_is_in_use_for_another_request_is_an_error_of_that_request_alone(http: httpx.Client) -> None:
    made(http, "a", 5)
    made(http, "b", 5)
    lease_id = str(uuid.uuid4())
    assert http.post("/v1/acquire", json={"name": "a", "lease_id": lease_id}).status_code == 200
    refused = http.post("/v1/acquire", json={"name": "b", "lease_id": lease_id})
    assert (refused.status_code, refused.json()["code"]) == (422, "PL001")


def test_a_refusal_names_only_the_limits_that_have_too_few_slots(http: httpx.Client) -> None:
    made(http, "shut ü", 0)
    made(http, "roomy", 5)
    wanted = [{"name": name} for name in ("shut ü", "roomy", "missing")]
    answer = http.post("/v1/acquire", json={"limits": wanted})
    assert answer.status_code == 429
    assert answer.json()["violated-policies"] == ["shut %C3%BC"]
    assert answer.json()["detail"] == "no slot of 'shut ü' is free"
    assert '"shut %C3%BC"' in answer.headers["ratelimit-policy"]


@pytest.mark.parametrize(
    "body", [b'{"name":"\xe9","limit":1}', b"[" * 100_000, b'{"limit":' + b"1" * 5000 + b"}", b"{"]
)
def test_a_body_that_cannot_be_read_is_no_json(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/limits", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"], answer.json()["detail"]) == (
        400, "PL001", "the body is not JSON",
    )  # fmt: skip


def test_a_body_of_another_kind_is_told_so(http: httpx.Client) -> None:
    form = http.post("/v1/limits", data={"name": "x"})
    assert (form.status_code, form.json()["code"]) == (415, "PL001")
    assert "application/json" in form.json()["detail"]
    listed = http.post("/v1/limits", json=[])
    assert (listed.status_code, listed.json()["detail"]) == (422, "must be a JSON object")


@pytest.mark.parametrize("path", ["/", "/v1/limits", "/v1/events", "/metrics", "/docs", "/v1/changes", "/readyz"])
def test_head_is_answered_wherever_get_is(http: httpx.Client, path: str) -> None:
    answer = http.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_head_is_refused_as_get_is(http: httpx.Client) -> None:
    assert http.head("/v1/limits/nothing").status_code == 404
    assert http.request("HEAD", "/v1/limits", content=bytes(1_100_000)).status_code == 413


def test_a_change_of_nothing_changes_nothing(http: httpx.Client) -> None:
    made(http, "same", 2)
    before = http.get("/v1/limits/same").json()
    assert http.patch("/v1/limits/same", json={"limit": 2}).status_code == 200
    assert http.patch("/v1/limits/same", json={}).status_code == 200
    assert http.get("/v1/limits/same").json() == before


def test_of_too_many_missed_events_the_newest_are_sent(http: httpx.Client, shared: Server) -> None:
    made(http, "many", 1)
    for limit in range(2, 1012):
        http.patch("/v1/limits/many", json={"limit": limit})
    with shared.client() as other, other.stream("GET", "/v1/changes?name=many&only=events&after=0") as response:
        stream = messages(response)
        assert next(kind for kind, _, _ in stream if kind in ("missed", "event")) == "missed"
        told = [next(stream)[2]["new"]["limit"] for _ in range(999)]
    assert told == sorted(told) and told[-1] == 1010


def test_all_keys_together_may_hold_more_than_an_integer(http: httpx.Client) -> None:
    most = 2**31 - 1
    made(http, "vast", most)
    for key in ("a", "b"):
        assert http.post("/v1/acquire", json={"name": "vast", "slots": most, "key": key}).status_code == 200
    assert http.get("/v1/limits/vast").json()["held"] == 2 * most
    assert http.get("/v1/limits", params={"name": "vast"}).json()["limits"][0]["held"] == 2 * most
    assert [row["held"] for row in http.get("/v1/limits/vast/keys").json()["keys"]] == [most, most]
    assert "pglimits_held_slots" in http.get("/metrics").text
