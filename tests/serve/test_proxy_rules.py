"""Ray Serve's proxy gets neither the headers that lift its limits nor requests for its own routes."""

import asyncio
from typing import Any

import httpx
import pytest
from ray._common.utils import import_attr
from ray.serve._private import constants, http_util
from starlette.middleware import Middleware

from vila_ops.serve.backends.proxy_router import HEALTH
from vila_ops.serve.backends.proxy_rules import OBEYED, ProxyRules, middleware
from vila_ops.serve.backends.ray_serve import CONTROLLER_ENV


def answered(path: str, headers: dict[str, str] | dict[bytes, bytes]) -> tuple[httpx.Response, dict[bytes, bytes]]:
    """The response of a proxy behind Ray's own way to put middleware around it, and the headers that reached it."""
    reached: dict[bytes, bytes] = {}

    async def proxy(scope: Any, _: Any, send: Any) -> None:
        reached.update(scope["headers"])
        own = [(name, value) for name, value in scope["headers"] if name == b"x-request-id"]  # as a replica answers
        await send({"type": "http.response.start", "status": 200, "headers": own})
        await send({"type": "http.response.body", "body": b"success"})

    async def ask() -> httpx.Response:
        app = http_util._apply_middlewares(proxy, [Middleware(ProxyRules)])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a.test") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask()), reached


def test_headers_that_lift_limits_do_not_reach_the_proxy() -> None:
    lifting = {"X-Request-Timeout-Seconds": "0", "x-request-disconnect-disabled": "?1", "x-request-id": "mine"}
    _, reached = answered("/v1/models", lifting)
    assert reached[b"x-request-id"] == b"mine"
    assert http_util.parse_request_timeout_header(reached, 30.0) == 30.0
    assert not http_util.parse_disconnect_disabled_header(reached)
    names = (
        constants.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
        constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
        constants.SERVE_SESSION_ID,
        constants.SERVE_MULTIPLEXED_MODEL_ID.replace("_", "-"),
    )
    assert {name.encode() for name in names} == OBEYED


@pytest.mark.parametrize("headers", [{}, {"x-request-id": "mine"}])
def test_a_response_has_one_request_id(headers: dict[str, str]) -> None:
    """The proxy adds the id to a response of a replica, which has it."""
    response, reached = answered("/v1/models", headers)
    assert response.headers.get_list("x-request-id") == [reached[b"x-request-id"].decode()]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"X-Session-Id", b"one"),
        (b"x_session_id", b"\xff"),
        (b"serve_multiplexed_model_id", b"another"),
        (b"Serve-Multiplexed-Model-Id", b"\xff"),
        (b"X-Request-Id", b"\xff"),
        (b"x-request-id", b"a b"),
        (b"x-request-id", b"a" * 129),
    ],
)
def test_what_chooses_a_replica_or_makes_the_proxy_fail_does_not_reach_it(name: bytes, value: bytes) -> None:
    reached = answered("/v1/models", {name: value, b"x-other": b"\xff"})[1]
    assert name.lower() not in reached or reached[name.lower()] != value
    assert reached[b"x-other"] == b"\xff"


@pytest.mark.parametrize("path", ["/-/routes", "/-/", "/-/healthz/", "/%2d/routes", "/-/anything"])
def test_the_proxys_own_routes_are_hidden(path: str) -> None:
    response, reached = answered(path, {})
    assert (response.status_code, response.json()["error"]["code"], reached) == (404, "not_found", {})


def test_the_health_of_the_proxy_is_shown() -> None:
    assert answered(HEALTH, {})[0].text == "success"


def test_ray_reads_the_variable_and_finds_the_middleware() -> None:
    name = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
    assert hasattr(constants, name)
    assert import_attr(CONTROLLER_ENV[name]) is middleware
