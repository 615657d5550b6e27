"""server/operations.py, server/service.py: what those who run a server see and do; errors that are not the client's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from answers import events, problem
from live_server import LiveServer, in_process
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import Gate, scripted_engine

from sapwood import __version__
from sapwood.config import ServerConfig
from sapwood.engine.async_engine import AsyncEngine
from sapwood.errors import InvalidRequest
from sapwood.request import ErrorType, FinishReason
from sapwood.server.app import create_app
from sapwood.server.service import printable

IDS = [1, 2, 3]


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


@contextlib.asynccontextmanager
async def gated(gate: Gate, *, load: bool = True, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an engine whose steps wait at the gate."""
    engine, config = scripted_engine(gate, None, vocab_size=16, eos=2, **settings)
    async with in_process(engine, config, load=load) as client:
        try:
            yield client
        finally:
            gate.open()  # or the engine would wait for its step for ever


def complete(client: httpx.AsyncClient, **body: Any) -> Awaitable[httpx.Response]:
    return asyncio.ensure_future(client.post("/v1/completions", json={"prompt": IDS, "max_tokens": 4} | body))


def held(gate: Gate) -> Awaitable[None]:
    """A step has come to the gate; the loop goes on meanwhile."""
    return asyncio.to_thread(gate.wait_held)


def service_of(client: httpx.AsyncClient) -> Any:
    return client.service  # type: ignore[attr-defined]


# --- health and readiness


async def test_healthy_and_idle(gate: Gate) -> None:
    async with gated(gate) as client:
        answer = await client.get("/health")
        assert answer.status_code == 200
        state = answer.json()
        assert set(state) == {
            "status",
            "uptime_s",
            "num_steps",
            "step_age_s",
            "num_running_reqs",
            "num_queue_reqs",
        }
        assert (state["status"], state["num_steps"], state["step_age_s"]) == ("ready", 0, 0)
        ready = await client.get("/ready")
        assert (ready.status_code, ready.json()) == (200, {"ready": True, "status": "ready"})


async def test_health_is_a_step_counter_that_advances(gate: Gate) -> None:
    # A step that has run for a microsecond counts as stuck.
    async with gated(gate, watchdog_timeout=1e-6) as client:
        task = complete(client, max_tokens=2)
        await held(gate)
        stuck = await client.get("/health")
        assert stuck.status_code == 503
        assert stuck.json()["status"] == "stalled"
        assert stuck.json()["step_age_s"] >= 0
        assert stuck.json()["num_running_reqs"] == 1
        gate.open()
        assert (await task).status_code == 200
        await service_of(client).engine.wait_idle()
        well = await client.get("/health")
        assert well.status_code == 200
        assert well.json()["num_steps"] > stuck.json()["num_steps"]
        assert well.json()["num_running_reqs"] == 0


async def test_a_long_step_is_no_stuck_one(gate: Gate) -> None:
    async with gated(gate) as client:  # watchdog_timeout: minutes
        task = complete(client)
        await held(gate)
        assert (await client.get("/health")).status_code == 200
        gate.open()
        await task


async def test_an_engine_that_died(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    async with gated(gate) as client:
        running = complete(client)
        await held(gate)
        service_of(client).engine._steps._die(RuntimeError("a bug of ours"))
        assert "a bug of ours" in problem(await running, 503, code="engine_dead")
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        assert (await client.get("/ready")).status_code == 503
        for path in ("/v1/models", "/v1/models/scripted", "/model_info"):
            assert problem(await client.get(path), 503, code="engine_dead")
        for path, body in (
            ("/v1/completions", {"prompt": IDS}),
            ("/generate", {"input_ids": IDS}),
            ("/tokenize", {"prompt": "x"}),
            ("/flush_cache", {}),
        ):
            assert problem(await client.post(path, json=body), 503, code="engine_dead")
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/server_info")).status_code == 200
    assert "the step loop failed" in caplog.text


async def test_an_engine_that_somebody_shut_down(gate: Gate) -> None:
    async with gated(gate) as client:
        await service_of(client).engine.shutdown()
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        assert (await client.get("/ready")).status_code == 503
        assert problem(await client.get("/v1/models"), 503, code="engine_dead")
        assert problem(await complete(client), 503, code="engine_dead")
        for path in ("/metrics", "/server_info", "/version", "/openapi.json"):
            assert (await client.get(path)).status_code == 200


async def test_while_the_model_loads(stories_config: Callable[..., ServerConfig]) -> None:
    config = stories_config()
    engine = AsyncEngine(config.model, **config.engine_settings())
    async with in_process(engine, config, load=False) as client:
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "loading")
        ready = await client.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"ready": False, "status": "loading"})
        for path, body in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/generate", {"text": "x"}),
            ("/tokenize", {"prompt": "x"}),
            ("/detokenize", {"tokens": [1]}),
            ("/flush_cache", {}),
        ):
            answer = await client.post(path, json=body)
            assert "/ready" in problem(answer, 503, code="loading")
            assert answer.headers["retry-after"] == "1"
        for path in ("/v1/models", "/model_info", "/get_model_info"):
            assert problem(await client.get(path), 503, code="loading")
        for path in ("/metrics", "/server_info", "/version", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        await service_of(client).load()
        assert (await client.get("/ready")).json() == {"ready": True, "status": "ready"}
        assert (await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})).status_code == 200


async def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    config = ServerConfig.from_kwargs(str(tmp_path))
    async with in_process(AsyncEngine(config.model), config, load=False) as client:
        with pytest.raises(InvalidRequest):
            await service_of(client).load()
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert (await client.get("/ready")).status_code == 503
        assert "log" in problem(await complete(client), 503, code="failed")


async def test_draining(gate: Gate) -> None:
    async with gated(gate) as client:
        running = complete(client)
        await held(gate)
        service_of(client).drain()
        ready = await client.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"ready": False, "status": "draining"})
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "draining")
        refusal = await complete(client)
        assert "shutting down" in problem(refusal, 503, code="draining")
        assert refusal.headers["retry-after"] == "1"
        assert (await client.get("/server_info")).json()["status"] == "draining"
        # Whoever runs may still be ended by hand.
        assert (await client.post("/abort_request", json={"abort_all": True})).json()["num_aborted"] == 1
        assert (await running).json()["choices"][0]["finish_reason"] == "abort"


# --- facts


def test_server_info(http: httpx.Client, stories: LiveServer, stories_dir: Path) -> None:
    http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 2})
    info = http.get("/server_info").json()
    assert info == http.get("/get_server_info").json() | {"uptime_s": info["uptime_s"]}
    assert info["version"] == __version__
    assert info["status"] == "ready"
    assert info["served_model_name"] == "stories260K"
    assert info["settings"]["model"] == str(stories_dir)
    assert info["settings"]["dtype"] == info["model"]["dtype"] == stories.config.dtype
    assert info["settings"]["api_key"] is False
    assert info["model"]["context_len"] == 512
    assert info["model"]["vocab_size"] == 512
    assert info["model"]["kv_pool_tokens"] == 8192
    assert info["model"]["has_chat_template"] is True
    assert info["model"]["num_threads"] == (1 if stories.config.device == "cpu" else None)
    assert info["stats"]["num_steps"] > 0
    assert sum(info["stats"]["pool"][0][state] for state in ("free", "cached", "leased", "limbo")) == 512


def test_model_info_and_version(http: httpx.Client, stories_dir: Path) -> None:
    info = http.get("/model_info").json()
    assert info == http.get("/get_model_info").json()
    assert info["model_path"] == info["tokenizer_path"] == str(stories_dir)
    assert (info["is_generation"], info["max_model_len"], info["vocab_size"]) == (True, 512, 512)
    assert http.get("/version").json() == {"version": __version__}


def test_a_shorter_context(serve_stories: Callable[..., LiveServer]) -> None:
    http = serve_stories(context_length=32).client
    assert http.get("/model_info").json()["max_model_len"] == 32
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 32
    assert http.post("/tokenize", json={"prompt": "a"}).json()["max_model_len"] == 32
    answer = http.post("/v1/completions", json={"prompt": [5] * 30, "max_tokens": 9, "ignore_eos": True}).json()
    assert answer["usage"]["total_tokens"] == 32
    assert "32" in problem(http.post("/v1/completions", json={"prompt": [5] * 32}), 400, "prompt")


# --- what changes the server's state


def test_flush_cache(serve_stories: Callable[..., LiveServer]) -> None:
    server = serve_stories()
    http = server.client
    prompt = {"prompt": [1, *range(300, 363)], "max_tokens": 1}
    http.post("/v1/completions", json=prompt)
    cached = server.call(server.service.engine.stats).pool[0].cached
    assert cached >= 4
    assert http.post("/flush_cache").json() == {"success": True, "num_pages": cached}
    assert server.call(server.service.engine.stats).pool[0].cached == 0
    assert http.post("/flush_cache", json={}).json() == {"success": True, "num_pages": 0}
    answer = http.post("/v1/completions", json=prompt).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize(
    ("route", "body"),
    [("/v1/completions", {"prompt": IDS, "n": 2}), ("/generate", {"input_ids": [IDS, IDS]})],
    ids=["completions", "generate"],
)
async def test_abort_ends_a_whole_call(route: str, body: dict[str, Any], gate: Gate) -> None:
    async with gated(gate) as client:
        calls = [
            asyncio.ensure_future(client.post(route, json=body | {"rid": rid})) for rid in ("mine", "mine-0", "other")
        ]
        await held(gate)
        answer = await client.post("/abort_request", json={"rid": "mine"})
        assert answer.json() == {"success": True, "num_aborted": 1}
        ended = (await calls[0]).json()
        reasons = (
            [choice["finish_reason"] for choice in ended["choices"]]
            if isinstance(ended, dict)
            else [one["meta_info"]["finish_reason"] for one in ended]
        )
        assert reasons in (["abort"] * 2, [{"type": "abort", "message": "aborted by the caller"}] * 2)
        assert not calls[2].done()
        assert (await client.post("/abort_request", json={"abort_all": True})).json()["num_aborted"] >= 1
        await asyncio.gather(*calls)
        assert service_of(client).num_calls == 0
        assert service_of(client).engine.stats().num_alive == 0


def test_abort_ends_a_stream_with_the_text_so_far(
    serve: Callable[[AsyncEngine, ServerConfig], LiveServer], gate: Gate
) -> None:
    server = serve(*scripted_engine(gate, None, vocab_size=16, eos=2))
    body = {"prompt": IDS, "max_tokens": 9, "stream": True, "rid": "mine", "stream_options": {"include_usage": True}}
    gate.pass_one()  # the first token comes out, the second one's step waits
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert '"finish_reason":null' in next(lines)
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as other:
            assert other.post("/abort_request", json={"rid": "mine"}).json()["num_aborted"] == 1
            rest = [line for line in lines if line]
            # The id is free again, and nobody is left.
            assert problem(other.post("/abort_request", json={"rid": "mine"}), 404, "rid", "request_not_found")
    assert '"finish_reason":"abort"' in rest[0]
    assert '"completion_tokens":1' in rest[1]
    assert rest[2:] == ["data: [DONE]"]


async def test_an_id_in_use(gate: Gate) -> None:
    async with gated(gate) as client:
        first = complete(client, rid="mine")
        await held(gate)
        assert "'mine'" in problem(await complete(client, rid="mine"), 400, "rid")
        assert "'mine'" in problem(await complete(client, rid="mine", stream=True), 400, "rid")
        gate.open()
        assert (await first).status_code == 200
        assert (await complete(client, rid="mine")).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "rid"),
        ({"rid": "x", "abort_all": True}, 400, "rid"),
        ({"rid": None, "abort_all": False}, 400, "rid"),
        ({"rid": 5}, 400, "rid"),
        ({"abort_all": 1}, 400, "abort_all"),
        ({"rid": "x"}, 404, "rid"),
        ({"rid": ""}, 404, "rid"),
    ],
    ids=str,
)
def test_what_cannot_be_aborted(body: dict[str, Any], status: int, param: str, http: httpx.Client) -> None:
    code = "request_not_found" if status == 404 else None
    assert problem(http.post("/abort_request", json=body), status, param, code)
    assert http.post("/abort_request", json={"abort_all": True}).json() == {"success": True, "num_aborted": 0}


# --- limits and troubles of the server's own


async def test_a_full_queue(gate: Gate) -> None:
    async with gated(gate, max_running_requests=1, max_queued_requests=1) as client:
        calls = [complete(client)]
        await held(gate)
        calls.append(complete(client))
        while service_of(client).engine.stats().num_waiting < 1:
            await asyncio.sleep(0)
        for stream in (False, True):
            refusal = await complete(client, stream=stream)
            assert "max_queued_requests" in problem(refusal, 503, code="queue_full")
            assert refusal.headers["retry-after"] == "1"
        gate.open()
        assert [answer.status_code for answer in await asyncio.gather(*calls)] == [200, 200]


@pytest.mark.parametrize("route", ["/v1/completions", "/generate"])
async def test_a_deadline(route: str, gate: Gate) -> None:
    body = {"prompt": IDS} if route == "/v1/completions" else {"input_ids": IDS}
    async with gated(gate, request_timeout_s=0.01) as client:
        for stream in (False, True):  # before the first token a stream has a status, too
            assert problem(await client.post(route, json=body | {"stream": stream}), 504, code="timeout")


def test_a_deadline_in_a_stream(serve: Callable[[AsyncEngine, ServerConfig], LiveServer], gate: Gate) -> None:
    # The deadline comes by hand: by the clock it could come before the first token.
    server = serve(*scripted_engine(gate, None, vocab_size=16, eos=2))
    gate.pass_one()
    with server.client.stream("POST", "/v1/completions", json={"prompt": IDS, "stream": True}) as answer:
        lines = answer.iter_lines()
        assert '"choices"' in next(lines)

        def expire() -> None:
            steps: Any = server.service.engine._steps
            (request,) = steps._requests.values()
            steps._end(request, FinishReason.ABORT, "deadline: too late", ErrorType.TIMEOUT)

        server.call(expire)
        rest = [line for line in lines if line]
    assert rest[0].startswith('data: {"error":{')
    assert '"type":"timeout_error"' in rest[0]
    assert rest[1:] == ["data: [DONE]"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_the_pool_cannot_hold(stream: bool, gate: Gate) -> None:
    gate.open()
    async with gated(gate, num_pages=2) as client:  # 32 tokens
        answer = await complete(client, max_tokens=100, stream=stream)
        if stream:
            *texts, last = events(answer)
            assert len(texts) > 20
            assert last["error"]["code"] == "capacity"
            assert last["error"]["type"] == "overloaded_error"
        else:
            assert "32" in problem(answer, 503, code="capacity")
        assert (await complete(client, max_tokens=9)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_step_that_fails(stream: bool) -> None:
    def next_token(tokens: Any) -> int:
        if 13 in tokens:
            raise ValueError("thirteen")
        return 5

    engine, config = scripted_engine(next_token, None, vocab_size=16, eos=2)
    async with in_process(engine, config) as client:
        assert "thirteen" in problem(await complete(client, prompt=[13], stream=stream), 500, code="internal")
        assert (await complete(client)).status_code == 200
        assert (await client.get("/health")).status_code == 200


async def test_a_bug_of_ours_is_nobodys_business(
    gate: Gate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gated(gate) as client:

        def broken(*args: Any, **kwargs: Any) -> None:
            raise KeyError("a secret path")

        monkeypatch.setattr(service_of(client).engine, "generate", broken)
        message = problem(await complete(client), 500, code="internal")
        assert "secret" not in message
        assert "log" in message
    assert "a secret path" in caplog.text


def test_a_body_that_is_too_large(serve_stories: Callable[..., LiveServer]) -> None:
    http = serve_stories(max_body_bytes=1024).client
    fits = b'{"prompt": "Once", "max_tokens": 1}'.ljust(1024)
    assert http.post("/v1/completions", content=fits).status_code == 200
    assert "1024 bytes" in problem(http.post("/v1/completions", content=fits + b" "), 413)


def test_routes_that_are_not_there(http: httpx.Client) -> None:
    assert "'/nope'" in problem(http.get("/nope"), 404, code="route_not_found")
    for method, path, allow in (
        ("GET", "/v1/completions", "POST"),
        ("POST", "/health", "GET"),
        ("PUT", "/ready", "GET"),
    ):
        answer = http.request(method, path)
        assert allow in problem(answer, 405)
        assert answer.headers["allow"] == allow
    assert http.head("/v1/models").status_code == 200
    assert http.head("/v1/models").content == b""


def test_a_template_with_a_mistake_stops_the_start(tmp_path: Path) -> None:
    for source, message in (("{% if %}", "line 1"), (None, "cannot read")):
        file = tmp_path / "broken.jinja"
        if source is None:
            file.unlink()
        else:
            file.write_text(source)
        engine, config = scripted_engine(lambda tokens: 5, None, vocab_size=16, eos=2, chat_template=str(file))
        with pytest.raises(InvalidRequest, match=message) as caught:
            create_app(engine, config)
        assert caught.value.param == "chat_template"
        asyncio.run(engine.shutdown())


# --- metrics


def metrics_of(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """sample name -> labels -> value"""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        assert family.name.startswith(("sapwood_", "process_"))
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_the_metrics_add_up(serve_stories: Callable[..., LiveServer]) -> None:
    http = serve_stories().client
    usages = []
    for _ in range(2):
        for body in (
            {"prompt": [1, *range(300, 340)], "max_tokens": 7},
            {"prompt": ["Once", "Tim"], "max_tokens": 3, "n": 2},
            {"prompt": "Once", "stop": "time"},
        ):
            usages.append(http.post("/v1/completions", json=body).json()["usage"])
    streamed = events(
        http.post(
            "/v1/completions",
            json={"prompt": "Once", "max_tokens": 9, "stream": True, "stream_options": {"include_usage": True}},
        )
    )
    usages.append(streamed[-1]["usage"])
    for bad in ({"prompt": []}, {"prompt": "x " * 2000}, {"prompt": "x", "nope": 1}):
        assert http.post("/v1/completions", json=bad).status_code == 400
    http.get("/nope")
    http.request("PATCH", "/pot")
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = metrics_of(answer.text)

    def value(name: str, **labels: str) -> float:
        return found[f"sapwood_{name}"][tuple(sorted(labels.items()))]

    def total(name: str) -> float:
        return sum(found[f"sapwood_{name}"].values())

    num_requests = 2 * (1 + 4 + 1) + 1
    assert total("requests_total") == num_requests
    assert value("requests_total", finish_reason="stop", error="") == 2
    assert value("requests_total", finish_reason="length", error="") == num_requests - 2
    generated = sum(usage["completion_tokens"] for usage in usages)
    assert value("generation_tokens_total") == total("request_generation_tokens_sum") == generated
    # The engine counts a prompt for each of its choices; two prompts had two.
    twice = sum(usage["prompt_tokens"] for usage in usages) + sum(usages[i]["prompt_tokens"] for i in (1, 4))
    assert value("prompt_tokens_total") == total("request_prompt_tokens_sum") == twice
    assert value("cached_tokens_total") >= 32  # the long prompt's second time
    for name in ("e2e_request_latency_seconds", "queue_time_seconds", "time_to_first_token_seconds"):
        assert total(f"{name}_count") == num_requests
    assert total("time_per_output_token_seconds_count") == num_requests
    assert total("inter_token_latency_seconds_count") == 8  # of the one stream
    assert value("http_answers_total", method="POST", route="/v1/completions", status="200") == 7
    assert value("http_answers_total", method="POST", route="/v1/completions", status="400") == 3
    assert value("http_answers_total", method="GET", route="other", status="404") == 1
    assert value("http_answers_total", method="other", route="other", status="404") == 1
    assert value("num_running_reqs") == value("num_queue_reqs") == value("token_usage") == 0
    pages = [value("kv_pages", group="0", state=state) for state in ("free", "cached", "leased", "limbo")]
    assert sum(pages) == 512
    assert value("steps_total") > 0
    assert found["process_resident_memory_bytes"]


def test_the_names_that_dashboards_know(http: httpx.Client) -> None:
    http.get("/metrics")
    names = {name for name in metrics_of(http.get("/metrics").text) if name.startswith("sapwood_")}
    bare = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in names}
    assert {name for name in bare if not name.endswith("_created")} == {
        f"sapwood_{name}"
        for name in (
            "cached_tokens_total",
            "e2e_request_latency_seconds",
            "generation_tokens_total",
            "host_commit_microseconds",
            "host_output_microseconds",
            "host_plan_microseconds",
            "http_answers_total",
            "inter_token_latency_seconds",
            "kv_pages",
            "num_queue_reqs",
            "num_running_reqs",
            "prompt_tokens_total",
            "queue_time_seconds",
            "request_generation_tokens",
            "request_prompt_tokens",
            "requests_total",
            "retractions_total",
            "step_age_seconds",
            "steps_total",
            "time_per_output_token_seconds",
            "time_to_first_token_seconds",
            "token_usage",
        )
    }


async def test_strangers_make_no_new_series(gate: Gate) -> None:
    async with gated(gate) as client:
        for i in range(20):
            await client.request(f"M{i}", f"/path/{i}")
            await client.get(f"/v1/models/{i}")
        text = (await client.get("/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith("sapwood_http_answers_total{")]
        assert len(lines) == 2
        assert all(line.endswith(" 20.0") for line in lines)


async def test_two_servers_count_apart(gate: Gate) -> None:
    gate.open()
    async with gated(gate) as one, gated(gate) as two:
        await complete(one)
        assert "sapwood_requests_total{" in (await one.get("/metrics")).text
        assert "sapwood_requests_total{" not in (await two.get("/metrics")).text


# --- the log


def test_requests_are_logged_without_their_text(
    serve_stories: Callable[..., LiveServer], caplog: pytest.LogCaptureFixture
) -> None:
    http = serve_stories(log_requests=True).client
    with caplog.at_level("INFO", "sapwood"):
        http.post("/v1/completions", json={"prompt": "Once upon a time", "max_tokens": 3, "rid": "mine"})
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("request ")]
    assert line.startswith("request mine: 5 prompt tokens (0 cached), 3 generated, length, ")
    assert "Once" not in caplog.text


def test_ids_in_the_log_are_one_line() -> None:
    assert printable("a\nb\x1b[31m\u2028" + "c" * 500) == "a?b?[31m?" + "c" * 191


def test_many_clients_at_once(http: httpx.Client, stories: LiveServer) -> None:
    """Health answers while requests run, and every number is back where it was."""
    before = stories.call(stories.service.engine.stats)

    def ask(i: int) -> int:
        body = {"prompt": "Once", "max_tokens": 20, "stream": i % 2 == 0, "rid": f"many-{i}"}
        return http.post("/v1/completions", json=body).status_code

    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(ask, i) for i in range(64)]
        assert http.get("/health").status_code == 200
        assert {answer.result() for answer in answers} == {200}
    after = stories.call(stories.service.engine.stats)
    assert after.num_requests == before.num_requests + 64
    assert (after.num_alive, after.pool[0].leased, stories.service.num_calls) == (0, 0, 0)
