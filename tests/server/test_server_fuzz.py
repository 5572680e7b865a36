"""Nonsense, and what the schema allows: nothing is a 500, and every answer has the form that is promised."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance
from servertest import Server

FUZZ = settings(
    max_examples=10,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
NAMES = ["busy", "rate", "off"]


@pytest.fixture
def api(shared: Server) -> Server:
    with shared.client() as http:
        http.post("/v1/limits", json={"name": "busy", "limit": 1})
        http.post("/v1/limits", json={"name": "rate", "limit": 5, "slot_decay_per_second": 1})
        http.post("/v1/limits", json={"name": "off", "limit": 1, "active": False})
        http.post("/v1/acquire", json={"name": "busy"})
    return shared


def check(response: httpx.Response) -> None:
    assert response.status_code != 500, response.text
    kind = response.headers.get("content-type", "")
    if response.status_code >= 400:
        assert kind == "application/problem+json", (response.status_code, kind)
        problem = response.json()
        assert problem["status"] == response.status_code
        assert problem["type"] and problem["title"] and isinstance(problem["detail"], str)
        assert "Traceback" not in response.text


def test_what_the_schema_allows_is_never_a_500(api: Server) -> None:
    load_all_checks()
    schema = schemathesis.openapi.from_url(f"{api.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    tested = 0
    for operation in operations:
        if operation.path == "/v1/changes" or not operation.path.startswith("/v1/"):  # that stream does not end
            continue
        tested += 1

        @FUZZ
        @given(case=operation.as_strategy(), name=st.sampled_from(NAMES))
        def ask(case: Any, name: str) -> None:
            if case.path_parameters and "name" in case.path_parameters:
                case.path_parameters["name"] = name
            if isinstance(case.body, dict) and "wait" in case.body:
                case.body["wait"] = 0.01
            if isinstance(case.body, dict) and isinstance(case.body.get("name"), str) and case.path.startswith("/v1/"):
                case.body["name"] = name
            response = case.call()
            case.validate_response(
                response, checks=[not_a_server_error, content_type_conformance, response_schema_conformance]
            )

        ask()
    assert tested >= 18


PATHS = [
    *("/v1/limits", "/v1/limits/busy", "/v1/acquire", "/v1/rate_limit", "/v1/peek", "/v1/events", "/v1/holders"),
    *("/v1/limits/busy/reset", "/v1/limits/rate/adjust", "/v1/leases/x/renew", "/v1/limits/rate/history"),
    *("/v1/", "/login", "/logout"),
]
FIELDS = st.sampled_from(
    [
        *("name", "limits", "slots", "key", "holder", "lease_id", "timeout_seconds", "limit", "active", "priority"),
        *("slot_decay_per_second", "strict", "lease_duration", "max_waiters", "description"),
    ]
)
PARAMS = st.sampled_from(["name", "limit", "offset", "after", "before", "kind", "sort", "seconds", "points", "active"])
KINDS = st.sampled_from(
    ["application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ANYTHING = st.recursive(
    SIMPLE | st.sampled_from(["busy", "\ud800", "\0", "9" * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=6),
    max_leaves=8,
)


def test_nonsense_is_never_a_500(api: Server) -> None:
    with api.client() as http:

        @settings(FUZZ, max_examples=300)
        @given(
            st.sampled_from(["GET", "POST", "PATCH", "DELETE", "PUT", "OPTIONS", "HEAD"]),
            st.sampled_from(PATHS),
            st.one_of(
                st.binary(max_size=200),
                ANYTHING.map(lambda value: json.dumps(value).encode()),
                st.dictionaries(FIELDS, ANYTHING, max_size=6).map(lambda value: json.dumps(value).encode()),
            ),
            KINDS,
            st.dictionaries(
                PARAMS,
                st.text(max_size=10) | st.integers() | st.sampled_from(["%00", "\0", "nan", "-1", "9" * 400]),
                max_size=3,
            ),
        )
        def ask(method: str, path: str, content: bytes, kind: str, params: dict[str, Any]) -> None:
            response = http.request(method, path, content=content, params=params, headers={"Content-Type": kind})
            if method != "HEAD":
                check(response)
            assert response.status_code != 500

        ask()


STRANGE = [
    *("/v1/limits/%00", "/v1/limits/%FF", "/v1/limits/%ED%A0%80", "/v1/limits/a%2Fb", "/v1/limits/.."),
    *("/v1/leases/%00", "//v1/limits", "/v1/limits/" + "x" * 5000, "/v1/limits?name=%FF%00"),
]


@pytest.mark.parametrize("path", STRANGE)
def test_a_strange_path_is_never_a_500(api: Server, path: str) -> None:
    with api.client() as http:
        for method in ("GET", "DELETE", "PATCH"):
            check(http.request(method, path, json={}))
