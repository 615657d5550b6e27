"""Clients that leave, in every phase of a request: under ASGI 2.3 and 2.4 by hand, and over sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from live_server import LiveServer
from raw_client import RawClient
from scripted_engine import scripted_engine

from sapwood.config import ServerConfig
from sapwood.engine.async_engine import AsyncEngine
from sapwood.server.app import create_app
from sapwood.server.exchange import ClientGone, ClientWatch

VOCAB = 64
SPECS = ("2.3", "2.4")
ROUTES = ("/generate", "/v1/completions")
PHASES = ("queued", "prefill", "first token", "decode")


@pytest.fixture(autouse=True)
def no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A client that leaves is nobody's error."""
    yield
    assert not [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.WARNING]


def run(main: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await main

    asyncio.run(limited())


class Gate:
    """An executor that runs a step when the test says so."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.held: list[Any] = []
        self.is_open = False
        self._arrived = asyncio.Event()

    @property
    def queued(self) -> int:
        return len(self.held) + self._inner.queued

    def submit(self, plan: Any) -> None:
        if self.is_open:
            self._inner.submit(plan)
        else:
            self.held.append(plan)
            self._arrived.set()

    async def wait_held(self) -> None:
        while not self.held:
            self._arrived.clear()
            await self._arrived.wait()

    def pass_one(self) -> None:
        self._inner.submit(self.held.pop(0))

    def pass_all(self) -> None:
        self.is_open = True
        while self.held:
            self.pass_one()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Slowly:
    """A tokenizer that waits to be let; its texts are its ids as characters."""

    vocab_size = VOCAB
    eos_token_id = bos_token_id = None
    has_chat_template = False

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > 1:  # not what the detokenizer asks
            self.begun.set()
            assert self.go_on.wait(30)
        return [ord(c) % VOCAB for c in text[:100]]

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in ids)

    def table(self, skip_special_tokens: bool) -> None:
        return None


class Harness:
    """An application over a gated engine, called without a server."""

    def __init__(self, tokenizer: Any = None, **settings: Any) -> None:
        self.engine, config = scripted_engine(
            lambda tokens: len(tokens) % VOCAB, tokenizer, vocab_size=VOCAB, eos=VOCAB - 1, **settings
        )
        assert self.engine.model is not None
        self.gate = Gate(self.engine.model.executor)
        self.engine.model.executor = self.gate
        self.app = create_app(self.engine, config)

    async def __aenter__(self) -> Harness:
        await self.app.state.service.load()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.gate.pass_all()
        await self.engine.wait_idle()
        stats = self.engine.stats()
        assert stats.num_alive == stats.num_running == stats.num_waiting == 0
        assert all(pool.free + pool.cached == pool.total for pool in stats.pool)
        assert self.app.state.service.num_calls == 0
        await self.engine.shutdown()
        assert len(asyncio.all_tasks()) == 1  # this one: every watcher has ended

    def call(self, spec: str, path: str, **body: Any) -> Call:
        return Call(self.app, spec, path, body)

    def generate(self, spec: str, path: str, stream: bool, num_tokens: int = 20, prompt: Any = None) -> Call:
        prompt = prompt or [1] * 50
        limit = {"max_tokens": num_tokens, "ignore_eos": True}
        if path == "/generate":
            prompt = {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
            return self.call(spec, path, **prompt, sampling_params=limit, stream=stream)
        return self.call(spec, path, prompt=prompt, **limit, stream=stream)


class Call:
    """One ASGI call. spec: how a send to a client that has left ends: 2.3 silently, 2.4 with OSError."""

    def __init__(self, app: Any, spec: str, path: str, body: Any) -> None:
        self._spec = spec
        self._body = json.dumps(body).encode()
        self._gone = asyncio.Event()
        self._messages = iter([{"type": "http.request", "body": self._body, "more_body": False}])
        self.sent: list[Any] = []
        self.num_late = 0  # sends to nobody
        self.arrived = asyncio.Event()
        self.writes = asyncio.Event()
        self.reads = asyncio.Event()  # cleared: the client takes nothing
        self.reads.set()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
        }
        self.task = asyncio.get_running_loop().create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        message = next(self._messages, None)
        if message is None:
            await self._gone.wait()
            message = {"type": "http.disconnect"}
        return message

    async def _send(self, message: Any) -> None:
        self.writes.set()
        await self.reads.wait()
        if self._gone.is_set():
            self.num_late += 1
            if self._spec == "2.4":
                raise OSError("the client has left")
            return
        self.sent.append(message)
        self.arrived.set()

    def leave(self) -> None:
        self._gone.set()
        self.reads.set()

    async def wait_sent(self, count: int) -> None:
        while len(self.sent) < count:
            self.arrived.clear()
            await self.arrived.wait()

    @property
    def is_complete(self) -> bool:
        return bool(self.sent) and not self.sent[-1].get("more_body", True)

    async def ended(self) -> None:
        """The call has ended, without an exception."""
        await asyncio.wait_for(self.task, 30)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("spec", SPECS)
def test_a_request_ends_when_its_client_leaves(spec: str, path: str, stream: bool, phase: str) -> None:
    async def main() -> None:
        settings = {"max_running_requests": 1} if phase == "queued" else {}
        async with Harness(chunked_prefill_size=16, **settings) as harness:
            others = []
            if phase == "queued":
                others = [harness.generate(spec, path, stream) for _ in range(2)]
                await harness.gate.wait_held()
            call = harness.generate(spec, path, stream)
            await harness.gate.wait_held()
            num_steps = {"queued": 0, "prefill": 1, "first token": 3, "decode": 6}[phase]
            for _ in range(num_steps):
                await harness.gate.wait_held()
                harness.gate.pass_one()
            if phase == "decode" and stream:
                await call.wait_sent(3)  # its head, and two tokens
            while harness.engine.stats().num_alive < len(others) + 1:
                await asyncio.sleep(0)
            assert not call.is_complete
            call.leave()
            await call.ended()  # while the step is still held
            assert harness.engine.stats().num_alive == len(others)
            assert call.num_late == 0
            harness.gate.pass_all()
            for other in others:
                await other.ended()
                assert other.is_complete

    run(main())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_client_that_leaves_behind_its_body(spec: str, stream: bool) -> None:
    async def main() -> None:
        async with Harness() as harness:
            call = harness.generate(spec, "/generate", stream)
            call.leave()
            await call.ended()
            assert harness.engine.stats().num_alive == 0 and not call.sent

    run(main())


@pytest.mark.parametrize("spec", SPECS)
def test_a_client_that_leaves_within_its_body(spec: str) -> None:
    async def main() -> None:
        async with Harness() as harness:
            call = harness.generate(spec, "/generate", True)
            call._messages = iter(
                [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
            )
            await call.ended()
            assert harness.engine.stats().num_requests == 0 and not call.sent

    run(main())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_client_that_leaves_while_its_prompt_is_encoded(spec: str, stream: bool) -> None:
    async def main() -> None:
        tokenizer = Slowly()
        async with Harness(tokenizer) as harness:
            call = harness.generate(spec, "/generate", stream, prompt="x" * 5000)
            await asyncio.to_thread(tokenizer.begun.wait, 30)
            call.leave()
            await call.ended()
            assert harness.engine.stats().num_alive == 0
            tokenizer.go_on.set()
            other = harness.generate(spec, "/generate", stream)
            harness.gate.pass_all()
            await other.ended()
            assert other.is_complete

    run(main())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_client_that_leaves_while_its_answer_is_written(spec: str, stream: bool) -> None:
    async def main() -> None:
        async with Harness() as harness:
            harness.gate.pass_all()
            call = harness.generate(spec, "/generate", stream, num_tokens=500)
            call.reads.clear()
            await call.writes.wait()
            call.leave()
            await call.ended()
            assert harness.engine.stats().num_alive == 0

    run(main())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_client_that_takes_nothing_is_given_up(spec: str, stream: bool) -> None:
    """Without our own HTTP protocol, too."""

    async def main() -> None:
        async with Harness(send_timeout_s=0.05) as harness:
            harness.gate.pass_all()
            call = harness.generate(spec, "/generate", stream, num_tokens=300)
            call.reads.clear()
            await call.ended()
            assert not call.sent and harness.engine.stats().num_alive == 0

    run(main())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("spec", SPECS)
def test_leaving_at_any_moment_of_the_end(spec: str, stream: bool) -> None:
    """A turn of the loop later each time, until the answer is whole before the client has left."""

    async def main() -> None:
        num_complete = num_cut = turns = 0
        async with Harness() as harness:
            harness.gate.pass_all()
            while num_complete < 5:
                call = harness.generate(spec, "/generate", stream, num_tokens=2)
                for _ in range(turns):
                    await asyncio.sleep(0)
                num_complete += call.is_complete
                num_cut += not call.is_complete
                call.leave()
                await call.ended()
                assert harness.engine.stats().num_alive == 0
                assert call.task.cancelling() == 0
                turns += 1
        assert num_cut > 3

    run(main())


@pytest.mark.parametrize("spec", SPECS)
def test_who_cancels_the_call_is_obeyed(spec: str) -> None:
    """A server that ends its tasks: the request ends, and so does the task, as cancelled."""

    async def main() -> None:
        async with Harness() as harness:
            for leaves in (False, True):
                call = harness.generate(spec, "/generate", True)
                await harness.gate.wait_held()
                if leaves:
                    call.leave()
                call.task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call.task
                assert harness.engine.stats().num_alive == 0

    run(main())


def test_a_watch_takes_back_its_own_cancellation_alone() -> None:
    async def main() -> None:
        gone = asyncio.Event()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        with pytest.raises(ClientGone):
            async with asyncio.timeout(30), ClientWatch(receive):
                gone.set()
                await loop.create_future()
        assert task.cancelling() == 0

        with pytest.raises(TimeoutError):  # both at once: the time is up
            async with asyncio.timeout(30) as limit, ClientWatch(receive):
                limit.reschedule(loop.time())
                await loop.create_future()
        assert task.cancelling() == 0

        async def broken() -> Any:
            raise ConnectionResetError

        with pytest.raises(ClientGone):
            async with ClientWatch(broken):
                await loop.create_future()

        async with ClientWatch(receive):  # whose block ends first
            pass
        with pytest.raises(ValueError):  # its own error counts
            async with ClientWatch(receive):
                try:
                    await loop.create_future()
                except asyncio.CancelledError:
                    raise ValueError from None
        assert task.cancelling() == 0
        await asyncio.sleep(0)

    run(main())


# --- over sockets

MANNERS = {"close": RawClient.close, "reset": RawClient.reset, "half-close": RawClient.half_close}


class HeldServer:
    """A live server whose engine's steps wait for `go_on`."""

    def __init__(self, serve: Callable[[AsyncEngine, ServerConfig], LiveServer]) -> None:
        self.go_on = threading.Event()
        self.computing = threading.Event()

        def next_token(tokens: Any) -> int:
            if len(tokens) >= 52:  # the second token and those after it
                self.computing.set()
                assert self.go_on.wait(30)
            return len(tokens) % VOCAB

        engine, config = scripted_engine(next_token, None, vocab_size=VOCAB, eos=VOCAB - 1, max_running_requests=2)
        self.live = serve(engine, config)

    def num_alive(self) -> int:
        return self.live.call(lambda: self.live.service.engine.stats().num_alive)

    def wait_alive(self, count: int) -> None:
        """Every look is a turn of the server's loop."""
        for _ in range(100_000):
            if self.num_alive() == count:
                return
        raise AssertionError(f"{self.num_alive()} requests are alive, not {count}")


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_over_a_socket(
    serve: Callable[[AsyncEngine, ServerConfig], LiveServer], stream: bool, manner: str
) -> None:
    server = HeldServer(serve)
    body = {"input_ids": [1] * 50, "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}, "stream": stream}
    # Two compute, two wait for a row; two of them leave, and two stay.
    clients = [RawClient(("127.0.0.1", server.live.port)) for _ in range(4)]
    for i, client in enumerate(clients):
        client.post("/generate", body)
        server.wait_alive(i + 1)
    assert server.computing.wait(30)
    if stream:
        assert clients[0].head().status == 200
    MANNERS[manner](clients[0])
    server.wait_alive(3)
    MANNERS[manner](clients[2])
    server.wait_alive(2)  # while the step is still held
    server.go_on.set()
    for client in (clients[1], clients[3]):
        assert client.answer().status == 200
    for client in clients:
        client.close()
    server.live.run(server.live.service.engine.wait_idle())
    stats = server.live.call(server.live.service.engine.stats)
    assert stats.num_alive == 0 and stats.num_requests == 4
    assert all(pool.free + pool.cached == pool.total for pool in stats.pool)


def test_a_stream_with_requests_pipelined_behind_it_ends_when_its_client_leaves(
    serve: Callable[[AsyncEngine, ServerConfig], LiveServer],
) -> None:
    server = HeldServer(serve)
    body = {"input_ids": [1] * 50, "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}, "stream": True}
    with RawClient(("127.0.0.1", server.live.port)) as client:
        client.post("/generate", body)
        assert server.computing.wait(30)
        assert client.head().status == 200
        client.post("/generate", body).post("/generate", body)
    server.wait_alive(0)  # while the step is still held
    server.go_on.set()
    server.live.run(server.live.service.engine.wait_idle())
    assert server.live.call(server.live.service.engine.stats).num_requests == 1  # nobody waits for the others
