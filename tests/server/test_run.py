"""The life of `sapwood serve`: loading, signals, sockets, what it says and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from raw_client import RawClient
from scripted_engine import scripted_engine
from server_process import ServerProcess, errors_in

from sapwood.config import ServerConfig
from sapwood.errors import InvalidRequest
from sapwood.server import run as run_module
from sapwood.server.app import create_app
from sapwood.server.run import _Life, listen

OPTIONS = ("--dtype", "float32", "--num-threads", "1", "--max-total-tokens", "8192")
BODY = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True, "stream": True}
SHORT = BODY | {"max_tokens": 5, "stream": False}


@pytest.fixture
def slow_model(stories_dir: Path, tmp_path: Path) -> tuple[Path, Callable[[], None]]:
    """A model whose loading waits, its config.json being a pipe; and what lets it go on."""
    model = tmp_path / "slow"
    shutil.copytree(stories_dir, model, copy_function=os.symlink)
    pipe = model / "config.json"
    pipe.unlink()
    os.mkfifo(pipe)

    def go_on() -> None:
        text = (stories_dir / "config.json").read_bytes()
        with open(pipe, "wb") as end:  # once a reader is there
            os.replace(shutil.copy(stories_dir / "config.json", tmp_path), pipe)  # for who reads it again
            end.write(text)

    return model, go_on


def test_health_is_answered_while_the_model_loads(slow_model: Any) -> None:
    model, go_on = slow_model
    with ServerProcess(model, *OPTIONS) as server:
        server.wait_listening()
        assert server.health()["status"] == "loading"
        status, body = server.get("/ready")
        assert status == 503 and json.loads(body) == {"ready": False, "status": "loading"}
        with RawClient(server.address) as client:
            answer = client.post("/v1/completions", SHORT).answer()
            assert answer.status == 503 and answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "loading"
        go_on()
        server.wait_log("ready after")
        assert server.get("/ready")[0] == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        assert errors_in(server.log) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads_ends_the_process(slow_model: Any, tmp_path: Path, number: Any) -> None:
    path = tmp_path / "socket"
    with ServerProcess(slow_model[0], *OPTIONS, "--uds", str(path)) as server:
        server.wait_log("listens on unix:")
        with RawClient(str(path)) as client:
            assert client.get("/health").answer().json()["status"] == "loading"
            server.send_signal(number)
            assert server.wait_exit() == 0
            assert client.is_closed()
    assert errors_in(server.log) == [] and "stopped while loading" in server.log[-1]
    assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(stories_dir: Path, number: signal.Signals) -> None:
    """The running stream gets all its tokens; nobody new is let in."""
    with ServerProcess(stories_dir, *OPTIONS) as server:
        server.wait_ready()
        with RawClient(server.address) as idle, RawClient(server.address) as client:
            assert idle.get("/health").answer().status == 200
            client.post("/v1/completions", BODY | {"max_tokens": 480}).head()
            server.send_signal(number)
            assert idle.is_closed()
            with pytest.raises(ConnectionRefusedError):
                RawClient(server.address)
            text = b"".join(iter(client.chunk, b""))
            assert text.endswith(b"data: [DONE]\n\n") and text.count(b'"text":') >= 480
            assert client.is_closed()
        assert server.wait_exit() == 0
        assert errors_in(server.log) == [] and "stopped" in server.log[-1]


def test_an_idle_server_stops_at_once(stories_dir: Path) -> None:
    with ServerProcess(stories_dir, *OPTIONS, "--drain-timeout-s", "0") as server:
        server.wait_ready()
        with RawClient(server.address) as client, RawClient(server.address) as half:
            assert client.post("/v1/completions", SHORT).answer().status == 200
            half.send(b"GET /hea")
            server.health()
            server.send_signal(signal.SIGTERM)
            assert server.wait_exit() == 0  # nothing was cut off
        assert errors_in(server.log) == []


def held_clients(server: ServerProcess) -> list[RawClient]:
    """Clients who keep a server busy until they are cut off: a stream and a whole answer of many tokens, a body that
    does not come.
    """
    clients = [RawClient(server.address) for _ in range(3)]
    endless = {"max_tokens": 480, "n": 64}
    clients[0].post("/v1/completions", BODY | endless).head()
    clients[0].chunk()
    clients[1].post("/v1/completions", BODY | endless | {"stream": False})
    clients[2].send(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 10\r\n\r\n")
    while server.health()["num_running_reqs"] + server.health()["num_queue_reqs"] < 65:
        pass
    return clients


@pytest.mark.parametrize("how", ["second signal", "drain_timeout_s"])
def test_running_requests_are_ended(stories_dir: Path, how: str) -> None:
    limit = ("--drain-timeout-s", "0.05") if how == "drain_timeout_s" else ()
    with ServerProcess(stories_dir, *OPTIONS, *limit) as server:
        server.wait_ready()
        stream, whole, body = held_clients(server)
        server.send_signal(signal.SIGTERM)
        if not limit:
            server.wait_log("draining: waiting for 2 running requests; again to end them now")
            server.send_signal(signal.SIGTERM)
        assert server.wait_exit() == 1
        assert "ending 3 running requests" in server.log[-2]
        assert len(errors_in(server.log)) == 1
        # Nobody takes the end for a whole answer.
        text, is_cut = b"", False
        try:
            text += b"".join(iter(stream.chunk, b""))
        except (EOFError, ConnectionResetError):
            is_cut = True
        assert is_cut or b'"code":"engine_dead"' in text
        assert whole.answer().status == 503
        assert body.is_closed()
        for client in (stream, whole, body):
            client.close()


def test_a_third_signal_kills() -> None:
    """Whatever hangs: its handlers are the system's again."""

    async def main() -> None:
        engine, config = scripted_engine(lambda tokens: 1, None, vocab_size=8, eos=7, port=0)
        listener = listen(config)
        app = create_app(engine, config)
        life = _Life(app.state.service, app, config, listener)
        loop = asyncio.get_running_loop()
        handled: set[int] = set()
        loop.add_signal_handler = lambda number, *_: handled.add(number)  # type: ignore[method-assign,assignment]
        loop.remove_signal_handler = lambda number: handled.discard(number) or True  # type: ignore[method-assign]
        running = loop.create_task(life.run())
        while not handled:
            await asyncio.sleep(0)
        await app.state.service.load()
        life._on_signal()
        assert handled == {signal.SIGTERM, signal.SIGINT}
        life._on_signal()
        assert not handled
        assert await running == 0  # nothing was running

    asyncio.run(main())


def test_a_port_that_is_taken(stories_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with ServerProcess(stories_dir, *OPTIONS, "--port", str(port)) as server:
            assert server.wait_exit() == 2
            (line,) = server.log
            assert f"port {port} of 127.0.0.1 is taken" in line and "--port" in line


@pytest.mark.parametrize("what", ["no directory", "broken weights", "memory"])
def test_a_model_that_cannot_be_loaded(stories_dir: Path, tmp_path: Path, what: str) -> None:
    """One line and an exit code; the socket is gone."""
    model, options, path = tmp_path / "model", OPTIONS, tmp_path / "socket"
    if what != "no directory":
        shutil.copytree(stories_dir, model)
    if what == "broken weights":
        (weights,) = model.glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
    if what == "memory":
        options = ("--dtype", "float32", "--max-total-tokens", str(10**12))
    with ServerProcess(model, *options, "--uds", str(path)) as server:
        assert server.wait_exit() in (1, 2)
        lines = [line for line in server.log if " INFO " not in line]
        assert len(lines) == 1 and lines[0].startswith("sapwood: error: "), server.log
    assert not path.exists()


def test_a_unix_socket(stories_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    for manner in ("kill", "drain"):  # what a killed server leaves behind does not keep the next one out
        with ServerProcess(stories_dir, *OPTIONS, "--uds", str(path), "--send-timeout-s", "0.2") as server:
            server.wait_log("ready after")
            with RawClient(str(path)) as client:
                assert client.post("/v1/completions", SHORT).answer().json()["usage"]["completion_tokens"] == 5
                client.post("/v1/completions", BODY | {"max_tokens": 20})
                assert client.answer().body.endswith(b"data: [DONE]\n\n")
                client.post("/tokenize", {"prompt": "a b " * 50_000, "return_token_strs": True}).head()
                client.wait_cut()  # the kernel does not tell of a Unix socket's reader; we do
            if manner == "kill":
                server.process.kill()
                assert server.wait_exit() == -signal.SIGKILL
                assert stat.S_ISSOCK(path.stat().st_mode)
            else:
                with ServerProcess(stories_dir, *OPTIONS, "--uds", str(path)) as second:
                    assert second.wait_exit() == 2
                    assert len(second.log) == 1 and "another process serves it" in second.log[0]
                server.send_signal(signal.SIGTERM)
                assert server.wait_exit() == 0
                assert not path.exists()


def test_addresses_that_cannot_be_had(tmp_path: Path) -> None:
    def refused(**settings: Any) -> str:
        with pytest.raises(InvalidRequest) as error:
            listen(ServerConfig.from_kwargs(**settings)).close()
        return str(error.value)

    assert "cannot resolve" in refused(host="no.such.host.invalid")
    assert "no valid name" in refused(host="a..b")
    assert "cannot listen on 192.0.2.1" in refused(host="192.0.2.1")  # nobody's address
    file = tmp_path / "file"
    file.touch()
    assert "no socket" in refused(uds=str(file))
    assert "cannot listen" in refused(uds=str(tmp_path / "absent" / "socket"))
    assert "too long" in refused(uds=str(tmp_path / ("x" * 200)))
    busy = socket.socket(socket.AF_UNIX)
    busy.bind(str(tmp_path / "busy"))
    busy.listen(0)
    waiting = []
    try:
        with pytest.raises(BlockingIOError):  # until its backlog is full, where a connect would wait for ever
            while True:
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect(str(tmp_path / "busy"))
        assert "another process serves it" in refused(uds=str(tmp_path / "busy"))
    finally:
        for one in (busy, *waiting):
            one.close()


def test_ipv6(stories_dir: Path) -> None:
    with listen(ServerConfig.from_kwargs(host="::1", port=0)) as listener:
        assert listener.getsockname()[0] == "::1"


def test_connections_are_fewer_than_files(stories_dir: Path) -> None:
    """With all file descriptors gone nobody could be refused, nor accepted; the log says what the limit is."""

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (run_module.RESERVED_FILES + 3,) * 2)

    with ServerProcess(stories_dir, *OPTIONS, preexec=few_files) as server:
        server.wait_log("max_connections is 3 instead of 4096: the process may open 131 files")
        server.wait_ready()
        clients = []
        for _ in range(200):
            clients.append(RawClient(server.address))
        for client in clients[150:]:
            client.wait_cut()
        with clients[0] as first:
            assert first.post("/v1/completions", SHORT).answer().status == 200
        for client in clients:
            client.close()
        server.health()
        server.send_signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        assert len(errors_in(server.log)) == 1  # the limit


def test_an_idle_server_has_no_timers() -> None:
    """Nothing wakes it: no clock, no polling, and no deadline once the last connection has gone."""

    async def main() -> None:
        engine, config = scripted_engine(lambda tokens: 1, None, vocab_size=8, eos=7, port=0)
        listener = listen(config)
        port = listener.getsockname()[1]
        app = create_app(engine, config)
        life = _Life(app.state.service, app, config, listener)
        loop: Any = asyncio.get_running_loop()
        running = loop.create_task(life.run())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 3}, "stream": True}).encode()
        while app.state.service.phase.value != "ready":
            await asyncio.sleep(0)
        writer.write(b"POST /generate HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        assert b"[DONE]" in await reader.readuntil(b"0\r\n\r\n")
        scheduled = [timer for timer in loop._scheduled if not timer.cancelled()]
        assert [timer._callback.__name__ for timer in scheduled] == ["timeout_keep_alive_handler"]
        writer.close()
        await writer.wait_closed()
        while life._server.server_state.connections:
            await asyncio.sleep(0)
        assert not [timer for timer in loop._scheduled if not timer.cancelled()]
        assert not loop._ready
        life._on_signal()
        assert await running == 0

    asyncio.run(main())


def test_neither_keys_nor_lines_of_a_client_reach_the_log(stories_dir: Path) -> None:
    key, wrong, prompt = "the-key-itself", "a-wrong-key", "a prompt that is nobody's business"
    environment = {"SAPWOOD_API_KEY": key}
    with ServerProcess(stories_dir, *OPTIONS, "--log-requests", environment=environment) as server:
        server.wait_ready()
        for given in (key, wrong):
            head = f"Authorization: Bearer {given}\r\n"
            for rid in (
                "plain",
                "two\nlines\r\n2026-01-01 00:00:00 ERROR forged",
                "\x1b[31mred\x1b[0m",
                "\u202ereversed",
            ):
                with RawClient(server.address) as client:
                    client.post("/v1/completions", SHORT | {"prompt": prompt, "rid": rid}, head)
                    answer = client.answer()
                    assert answer.status == (401 if given == wrong else 200 if rid == "plain" else 400)
                    assert len(answer.headers) <= 6
            with RawClient(server.address) as client:
                assert client.get(f"/{given}?key={given}%0aERROR%20forged").answer().status == 401
                assert client.send(f"{given} bad\r\n\r\n".encode()).answer().status == 400
        assert server.get("/server_info", {"x-api-key": key})[0] == 200
        assert key.encode() not in server.get("/server_info", {"x-api-key": key})[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait_exit() == 0
    text = "\n".join(server.log)
    assert errors_in(server.log) == []
    assert text.count("request ") == 1
    for secret in (key, wrong, prompt, "\x1b", "\u202e"):
        assert secret not in text
