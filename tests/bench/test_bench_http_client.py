"""bench/http_client.py: responses and events cut anywhere, and connections that end where they should not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from http_client import Client, EventParser, HttpError, ResponseParser, WholeBody

CHUNKED = (
    b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;name=value\r\nhello\r\n1A\r\n, this is the second piece\r\n0\r\nx-trailer: 1\r\n\r\n"
)
LENGTH = b"HTTP/1.1 404 Not Found\r\ncontent-length: 7\r\nconnection: close\r\n\r\nnothing"
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"
UNTIL_END = b"HTTP/1.0 200 OK\r\n\r\nall of it"


@pytest.mark.parametrize(
    ("response", "status", "body", "keep_alive"),
    [
        (CHUNKED, 200, b"hello, this is the second piece", True),
        (LENGTH, 404, b"nothing", False),
        (EMPTY, 204, b"", True),
        (UNTIL_END, 200, b"all of it", False),
    ],
)
def test_responses_cut_at_every_byte(response: bytes, status: int, body: bytes, keep_alive: bool) -> None:
    for size in (1, 2, 3, len(response)):
        parser = ResponseParser()
        pieces: list[bytes] = []
        for i in range(0, len(response), size):
            assert not parser.done
            pieces += parser.feed(response[i : i + size])
        if response is UNTIL_END:
            assert not parser.done
        parser.eof()
        assert parser.done
        assert (parser.status, b"".join(pieces), parser.keep_alive) == (status, body, keep_alive)
    for cut in range(len(response)):
        parser = ResponseParser()
        pieces = parser.feed(response[:cut]) + parser.feed(response[cut:])
        assert b"".join(pieces) == body


def test_headers() -> None:
    parser = ResponseParser()
    parser.feed(CHUNKED)
    assert parser.reason == "OK"
    assert parser.headers == {"content-type": "text/event-stream", "transfer-encoding": "chunked"}


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "not an HTTP/1.1 response"),
        (b"HTTP/1.1 abc\r\n\r\n", "not an HTTP/1.1 response"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", "content-length is no number"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nabc", "longer than its content-length"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", "not a chunk's size"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nabcd", "longer than it says"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nHTTP/1.1", "after the end"),
        (b"HTTP/1.1 204 No Content\r\n\r\nx", "after the end"),
    ],
)
def test_what_is_no_response(response: bytes, message: str) -> None:
    with pytest.raises(HttpError, match=message):
        ResponseParser().feed(response)


CHUNKED_HEAD = CHUNKED[: CHUNKED.index(b"5;name")]


@pytest.mark.parametrize("response", [b"", CHUNKED[:60], CHUNKED_HEAD, CHUNKED[:-1], LENGTH[:-1]])
def test_responses_that_break_off(response: bytes) -> None:
    parser = ResponseParser()
    parser.feed(response)
    with pytest.raises(HttpError, match="closed the connection"):
        parser.eof()


STREAM = (
    ": a comment\n\ndata: one\n\nevent: x\ndata:two\nid: 7\ndata: lines\n\n: ping\n\n\n"
    'data: {"text": "caf\u00e9 \u2028 \U0001f600"}\n\ndata: \n\ndata: [DONE]\n\n'
).encode()
EVENTS = [b"one", b"two\nlines", '{"text": "café \u2028 \U0001f600"}'.encode(), b"", b"[DONE]"]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_events_cut_at_every_byte(line_end: bytes) -> None:
    stream = STREAM.replace(b"\n", line_end)
    for size in (1, 2, 3, 5, len(stream)):
        parser = EventParser()
        events = [e for i in range(0, len(stream), size) for e in parser.feed(stream[i : i + size])]
        assert events + parser.finish() == EVENTS
    for cut in range(len(stream)):
        parser = EventParser()
        assert parser.feed(stream[:cut]) + parser.feed(stream[cut:]) + parser.finish() == EVENTS


def test_events_come_when_they_are_complete() -> None:
    parser = EventParser()
    assert parser.feed(b"data: one\n") == []
    assert parser.feed(b"\n") == [b"one"]
    assert parser.feed(b"data: two\r\n\r") == []
    assert parser.feed(b"\n") == [b"two"]


def test_a_last_event_without_its_empty_line() -> None:
    for stream in (b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r"):
        parser = EventParser()
        assert parser.feed(stream) == []
        assert parser.finish() == [b"[DONE]"]
    parser = EventParser()
    parser.feed(b"data: x\n\n")
    assert parser.finish() == []


Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that reads requests and lets `answer` write; yields its URL and what was asked, one entry a request."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
                )
                asked.append(head + await reader.readexactly(length))
                await answer(asked[-1], writer)
                if writer.is_closing():
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", asked
    finally:
        listening.close()


async def test_a_connection_is_used_again() -> None:
    peers = set()

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        peers.add(writer.get_extra_info("peername"))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async with server(answer) as (url, asked):
        client = Client(url + "/base/", {"Authorization": "Bearer k"})
        for _ in range(3):
            assert (await client.get("/x")).content == b"ok"
        client.close()
    assert len(peers) == 1
    assert asked[0].startswith(b"GET /base/x HTTP/1.1\r\n") and b"\r\nAuthorization: Bearer k\r\n" in asked[0]


async def test_a_stale_connection_is_replaced() -> None:
    num_answers = 0

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal num_answers
        num_answers += 1
        if num_answers == 2:  # kept alive, then closed without a word: the client cannot have known
            writer.close()
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async with server(answer) as (url, asked):
        client = Client(url)
        assert (await client.get("/1")).content == b"ok"
        assert (await client.get("/2")).content == b"ok"
        client.close()
    assert [request.split()[1] for request in asked] == [b"/1", b"/2", b"/2"]


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"", "without an answer"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel", "in the middle"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel", "in the middle"),
        (b"hello", "without an answer"),
    ],
)
async def test_a_connection_that_ends_early(sent: bytes, message: str) -> None:
    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        writer.close()

    async with server(answer) as (url, asked):
        client = Client(url)
        with pytest.raises(HttpError, match=message):
            await client.post("/x", b"{}", WholeBody())
        client.close()
        assert len(asked) == 1  # a request that may have been seen is not sent twice


async def test_a_cancelled_request_closes_its_connection() -> None:
    arrived, gone = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        arrived.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        gone.set()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = Client(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
    task = asyncio.ensure_future(client.post("/x", b"{}", WholeBody()))
    await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(gone.wait(), 30)
    listening.close()


async def test_nobody_listens() -> None:
    listening = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    listening.close()
    await listening.wait_closed()
    with pytest.raises(OSError):
        await Client(f"http://127.0.0.1:{port}").get("/")


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "ftp://x", "http://", "http://host:port"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="--base-url"):
        Client(url)


def test_headers_that_would_break_the_request() -> None:
    for headers in ({"x": "a\r\nb: c"}, {"x:": "a"}, {"x": "é"}):
        with pytest.raises(ValueError, match="header"):
            Client("http://127.0.0.1", headers)
