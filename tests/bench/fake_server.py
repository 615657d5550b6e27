"""A server that streams made-up tokens over the three APIs, and misbehaves on request: tests/bench drives it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from threading import Event, Thread
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


class FakeServer:
    """Answers every request with as many tokens as it asks for.

    fault     request number (from 0) -> what goes wrong: "http", "error", "cut", "early", "plain", "garbage", "empty",
              "hang"; None is nothing
    usage     whether it sends usage
    cached    cached_tokens in it
    bodies    what was posted
    """

    def __init__(self, fault: Callable[[int], str | None] = lambda i: None, usage: bool = True) -> None:
        self.fault = fault
        self.usage = usage
        self.cached = 3
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.heads: list[str] = []
        self.num_running = self.most_running = 0
        self.url = ""
        self.cards: list[dict[str, Any]] = [{"id": "fake"}]
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split()[1]
                if path == "/v1/models":
                    body = json.dumps({"object": "list", "data": self.cards}).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
                    continue
                length = int(head.lower().partition("content-length:")[2].split()[0])
                self.heads.append(head)
                self.paths.append(path)
                self.bodies.append(json.loads(await reader.readexactly(length)))
                self.num_running += 1
                self.most_running = max(self.most_running, self.num_running)
                try:
                    if not await self._answer(len(self.bodies) - 1, path, self.bodies[-1], writer):
                        break
                finally:
                    self.num_running -= 1

    async def _answer(self, i: int, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        fault = self.fault(i)
        if fault == "http":
            answer = b'{"error": {"message": "no room", "type": "x"}}'
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: %d\r\n\r\n%s" % (len(answer), answer))
            return True
        if fault == "plain":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
            return True
        if fault == "hang":
            await asyncio.Event().wait()
        writer.write(HEAD)
        events = list(self._events(path, body))
        if fault == "error":
            events[2:] = [{"error": {"message": "the model fell over"}}]
        elif fault in ("cut", "early"):
            events = events[:2]
        elif fault == "empty":
            events = []
        elif fault == "garbage":
            events[1] = ["not", "an", "event"]
        for event in events:
            self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(0)  # let others run: the stream comes in pieces
        if fault == "cut":
            return False
        if fault != "early":
            self._chunk(writer, b": end\n\ndata: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return True

    def _events(self, path: str, body: dict[str, Any]) -> Any:
        chat = path == "/v1/chat/completions"
        if path == "/generate":
            num, prompt = body["sampling_params"]["max_new_tokens"], body.get("text", body.get("input_ids"))
            for n in range(1, num + 1):
                meta = {"prompt_tokens": len(prompt), "completion_tokens": n, "cached_tokens": self.cached}
                yield {
                    "text": "word " * n,
                    "meta_info": meta | {"finish_reason": {"type": "length"} if n == num else None},
                }
            return
        num = body["max_completion_tokens" if chat else "max_tokens"]
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        for n in range(1, num + 1):
            piece = {"delta": {"content": "word "}} if chat else {"text": "word "}
            yield {"choices": [{"index": 0, **piece, "finish_reason": "length" if n == num else None}], "usage": None}
        if self.usage and body["stream_options"]["include_usage"]:
            usage = {"prompt_tokens": len(prompt), "completion_tokens": num}
            yield {"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": self.cached}}}

    @staticmethod
    def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self.url
        finally:
            server.close()
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)  # closed transports let go of their sockets in the loop's next turn


@contextlib.contextmanager
def running(fake: FakeServer) -> Iterator[FakeServer]:
    """The fake server in a thread and loop of its own, as serving.main() has a loop too."""
    started = Event()
    end: list[Callable[[], object]] = []

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        async with fake.listening():
            end.append(lambda: loop.call_soon_threadsafe(stop.set))
            started.set()
            await stop.wait()

    thread = Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(60)
    try:
        yield fake
    finally:
        end[0]()
        thread.join()
