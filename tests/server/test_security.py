"""server/security.py: nobody comes in without a key, by whatever spelling of a path, and reading changes nothing."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from live_server import LiveServer, in_process
from scripted_engine import scripted_engine
from starlette.applications import Starlette
from starlette.routing import Mount

from sapwood.config import ServerConfig
from sapwood.engine.async_engine import AsyncEngine
from sapwood.server.app import create_app
from sapwood.server.routes import ROUTES

KEY, ADMIN = "the-key", "the-admin-key"
OPEN = ("/health", "/ready")
ALL = [(route.method, route.path.replace("{model:path}", "scripted")) for route in ROUTES] + [("GET", "/openapi.json")]
ADMIN_ROUTES = [route.path for route in ROUTES if route.admin]


def engine(**settings: Any) -> tuple[AsyncEngine, ServerConfig]:
    """An engine that says 5 and 5 again."""
    return scripted_engine(lambda tokens: 5, None, vocab_size=16, eos=2, **settings)


@pytest.fixture(scope="module")
def guarded() -> Iterator[LiveServer]:
    server = LiveServer(*engine(api_key=KEY, admin_api_key=ADMIN))
    yield server
    server.close()


def ask(
    server: LiveServer, method: str, target: str, headers: dict[str, str | bytes] | None = None, body: bytes = b""
) -> tuple[int, dict[str, Any] | None]:
    """(status, JSON) of a request with exactly that target: other clients tidy paths up."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, target, body, {"content-type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        data = response.read()
        is_json = response.headers["content-type"] == "application/json" and data
        return response.status, json.loads(data) if is_json else None
    finally:
        connection.close()


def refused(answer: tuple[int, dict[str, Any] | None]) -> bool:
    status, body = answer
    if status == 401 and body is not None:
        assert body["error"]["type"] == "authentication_error"
        assert body["error"]["code"] == "invalid_api_key"
        assert KEY not in str(body)
    return status == 401


@pytest.mark.parametrize(("method", "path"), ALL, ids=lambda value: value)
def test_every_route_needs_a_key(method: str, path: str, guarded: LiveServer) -> None:
    methods = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]
    for each in methods:
        assert refused(ask(guarded, each, path)) is (path not in OPEN), each
    for key in (KEY, ADMIN):
        assert not refused(ask(guarded, method, path, {"authorization": f"Bearer {key}"}, b"{}"))


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "",
        "/nope",
        "//v1/models",
        "/v1//models",
        "/%761/models",
        "/v1/models/",
        "/V1/models",
        "/v1/models?x=/health",
        "/v1/models#/health",
        "/v1/models;/health",
        "/health/",
        "//health",
        "/health/..",
        "/health/../v1/models",
        "/health%2f..%2fv1/models",
        "/health/%2e%2e/v1/models",
        "/v1/models/../../health",
        "/HEALTH",
        "/health%00",
        "/health%20",
        "/%E2%84%8Dealth",
        "/%FF",
        "/openapi.json",
        "/docs",
        "/v1/models/" + "x" * 10_000,
    ],
    ids=lambda target: target[:30],
)
def test_no_spelling_of_a_path_goes_around(target: str, guarded: LiveServer) -> None:
    for method in ("GET", "HEAD", "OPTIONS"):
        assert refused(ask(guarded, method, target))
        assert not refused(ask(guarded, method, target, {"x-api-key": KEY}))


@pytest.mark.parametrize("target", ["/health", "/%68ealth", "/health?verbose=1", "/ready", "http://elsewhere/health"])
def test_health_is_open(target: str, guarded: LiveServer) -> None:
    status, body = ask(guarded, "GET", target)
    assert status == 200
    assert body is not None
    assert "status" in body
    assert ask(guarded, "GET", target, {"authorization": "Bearer wrong"})[0] == 200


WRONG: list[dict[str, str | bytes]] = [
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": "Bearer "},
    {"authorization": KEY},
    {"authorization": f"Basic {KEY}"},
    {"authorization": f"Token {KEY}"},
    {"authorization": f"Bearer {KEY} x"},
    {"authorization": f"Bearer {KEY[:-1]}"},
    {"authorization": f"Bearer {KEY}e"},
    {"authorization": f"Bearer {KEY.upper()}"},
    {"authorization": f"Bearer {ADMIN[:-1]}"},
    {"authorization": "Bearer schlüssel".encode()},
    {"authorization": b"Bearer \xff\xfe"},
    {"authorization": b"Bearer " + b"k" * 50_000},
    {"x-api-key": ""},
    {"x-api-key": "wrong"},
    {"x-api-key": f"Bearer {KEY}"},
    {"x-api-key": b"\xff"},
    {"api-key": KEY},
    {"cookie": f"api_key={KEY}"},
    {"authorization": "Bearer wrong", "x-api-key": KEY},
]


@pytest.mark.parametrize("headers", WRONG, ids=lambda headers: str(headers)[:40])
def test_a_wrong_key(headers: dict[str, str | bytes], guarded: LiveServer) -> None:
    assert refused(ask(guarded, "GET", "/v1/models", headers))
    assert refused(ask(guarded, "POST", "/flush_cache", headers))
    assert refused(ask(guarded, "GET", f"/v1/models?api_key={KEY}", headers))


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer {KEY}"},
        {"authorization": f"BEARER   {KEY} "},
        {"x-api-key": KEY},
        {"X-API-Key": KEY},
        {"authorization": "Basic dXNlcjpwYXNz", "x-api-key": KEY},  # a proxy's own
        {"authorization": f"Bearer {ADMIN}"},
    ],
    ids=str,
)
def test_a_right_key(headers: dict[str, str | bytes], guarded: LiveServer) -> None:
    assert ask(guarded, "GET", "/v1/models", headers)[0] == 200


def test_a_key_of_a_megabyte_does_no_harm(guarded: LiveServer) -> None:
    """The head is cut off at 64 KiB, by an answer or by closing the connection."""
    try:
        status, _ = ask(guarded, "GET", "/v1/models", {"authorization": "Bearer " + "k" * 2**20})
    except (ConnectionError, http.client.HTTPException):
        status = 431
    assert status == 431
    assert ask(guarded, "GET", "/health")[0] == 200


async def test_a_key_of_a_megabyte_in_another_server() -> None:
    async with in_process(*engine(api_key=KEY)) as client:
        answer = await client.get("/v1/models", headers={"authorization": "Bearer " + "k" * 2**20})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize(
    ("settings", "opens"),
    [
        ({}, {None, KEY, ADMIN}),
        ({"api_key": KEY}, {KEY}),
        ({"api_key": KEY, "admin_api_key": ADMIN}, {ADMIN}),
        ({"admin_api_key": ADMIN}, {ADMIN}),
    ],
    ids=str,
)
async def test_who_may_change_the_servers_state(settings: dict[str, str], opens: set[str | None]) -> None:
    async with in_process(*engine(**settings)) as client:
        for key in (None, KEY, ADMIN, "wrong"):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            flush = (await client.post("/flush_cache", headers=headers)).status_code
            abort = (await client.post("/abort_request", headers=headers, json={"abort_all": True})).status_code
            if key in opens or not settings:
                assert (flush, abort) == (200, 200), key
            else:
                is_known = key == KEY or "api_key" not in settings
                assert (flush, abort) == ((403, 403) if is_known else (401, 401)), key
    assert set(ADMIN_ROUTES) == {"/flush_cache", "/abort_request"}


async def test_a_user_is_told_what_is_missing() -> None:
    async with in_process(*engine(api_key=KEY, admin_api_key=ADMIN)) as client:
        answer = await client.post("/flush_cache", headers={"x-api-key": KEY})
        assert answer.status_code == 403
        assert answer.json()["error"]["type"] == "permission_error"
        assert "admin_api_key" in answer.json()["error"]["message"]
        assert "needs an API key" in (await client.get("/v1/models")).json()["error"]["message"]
        wrong = await client.get("/v1/models", headers={"x-api-key": "x"})
        assert "is wrong" in wrong.json()["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_reading_changes_nothing(method: str, serve_stories: Callable[..., LiveServer]) -> None:
    server = serve_stories()
    server.client.post("/v1/completions", json={"prompt": [1] * 64, "max_tokens": 1})
    before = server.call(server.service.engine.stats)
    assert before.pool[0].cached > 0
    for _, path in ALL:
        status, _ = ask(server, method, f"{path}?abort_all=true&rid=x")
        assert status in (200, 404, 405)  # 404: another model
    after = server.call(server.service.engine.stats)
    assert (after.pool[0], after.num_requests, after.num_steps) == (
        before.pool[0],
        before.num_requests,
        before.num_steps,
    )


async def test_secrets_are_shown_to_nobody() -> None:
    async with in_process(*engine(api_key=KEY, admin_api_key=ADMIN)) as client:
        for _, path in ALL:
            for headers in ({}, {"x-api-key": KEY}):
                text = (await client.get(path, headers=headers)).text
                assert KEY not in text
                assert ADMIN not in text
        settings = (await client.get("/server_info", headers={"x-api-key": KEY})).json()["settings"]
        assert settings["api_key"] is settings["admin_api_key"] is True


async def test_a_form_of_another_site_is_refused() -> None:
    """Browsers post forms and plain text anywhere without asking; JSON they do not."""
    async with in_process(*engine()) as client:
        for _, path in ((m, p) for m, p in ALL if m == "POST"):
            for kind in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain"):
                answer = await client.post(path, content=b'{"abort_all": true}', headers={"content-type": kind})
                assert answer.status_code == 415, path


ORIGIN = "https://chat.example.org"


async def test_pages_of_allowed_origins_may_ask() -> None:
    async with in_process(*engine(api_key=KEY, allowed_origins=[ORIGIN])) as client:
        for path in ("/v1/chat/completions", "/generate", "/flush_cache"):
            preflight = {
                "origin": ORIGIN,
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,content-type,x-stainless-lang",
            }
            answer = await client.options(path, headers=preflight)  # without a key: browsers send none
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == ORIGIN
            assert "POST" in answer.headers["access-control-allow-methods"]
            assert "authorization" in answer.headers["access-control-allow-headers"]
            other = await client.options(path, headers=preflight | {"origin": "https://evil.example.org"})
            assert "access-control-allow-origin" not in other.headers
        answer = await client.get("/v1/models", headers={"origin": ORIGIN, "x-api-key": KEY})
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        refusal = await client.get("/v1/models", headers={"origin": ORIGIN})
        assert refusal.status_code == 401
        assert refusal.headers["access-control-allow-origin"] == ORIGIN  # or its page could not read why
        assert "access-control-allow-origin" not in (await client.get("/health", headers={"origin": "x://y"})).headers


async def test_without_the_setting_no_page_may_ask() -> None:
    async with in_process(*engine()) as client:
        preflight = {"origin": ORIGIN, "access-control-request-method": "POST"}
        answer = await client.options("/v1/completions", headers=preflight)
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_mounted_in_another_application() -> None:
    """The routes that are open stay open, the others guarded, wherever the application is mounted."""
    own, config = engine(api_key=KEY)
    app = create_app(own, config)
    await app.state.service.load()
    outer = Starlette(routes=[Mount("/llm", app), Mount("/health", app)])
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="http://test") as client:
            for path, status in (
                ("/llm/health", 200),
                ("/llm/ready", 200),
                ("/llm/v1/models", 401),
                ("/llm/llm/health", 401),
                ("/health/v1/models", 401),
                ("/health/health", 200),
                ("/health/", 401),
                ("/llm/health/", 401),
            ):
                assert (await client.get(path)).status_code == status, path
            assert (await client.get("/llm/v1/models", headers={"x-api-key": KEY})).status_code == 200
    finally:
        await own.shutdown()


async def test_a_web_socket_is_closed() -> None:
    own, config = engine(api_key=KEY)
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    await create_app(own, config)({"type": "websocket", "path": "/health", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]
    await own.shutdown()
