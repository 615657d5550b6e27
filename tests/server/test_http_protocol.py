"""HTTP itself: malformed, oversized, slow, half-read, pipelined. After each the server answers as before."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from live_server import LiveServer
from raw_client import RawClient

from sapwood.server import http_protocol

PROMPT = {"prompt": "Once upon a time", "max_tokens": 3, "temperature": 0}
STREAM = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
# One event of it holds everything so far: megabytes in all.
LONG_STREAM = {"text": "Once", "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}, "return_logprob": True}
# Its answer has a megabyte: more than the kernel and uvicorn keep for a client that does not read.
LONG_ANSWER = {"prompt": "a b " * 50_000, "return_token_strs": True}
BODY = b'{"prompt":"Once upon a time","max_tokens":3,"temperature":0}'


@pytest.fixture(autouse=True)
def no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing a client does is an error of the server's."""
    yield
    assert not [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR]


def connect(server: LiveServer, **options: Any) -> RawClient:
    return RawClient(("127.0.0.1", server.port), **options)


def probe(server: LiveServer) -> None:
    """A new client is answered, no request is left, and all pages are back."""
    engine = server.service.engine
    server.run(engine.wait_idle())
    stats = server.call(engine.stats)
    assert stats.num_alive == 0
    assert all(pool.free + pool.cached == pool.total for pool in stats.pool)
    with connect(server) as client:
        assert client.post("/v1/completions", PROMPT).answer().status == 200


def connections(server: LiveServer) -> Any:
    return server._server.server_state.connections


MALFORMED = {
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "connect": b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "version": b"GET /health HTTP/9.9\r\n\r\n",
    "bad method": b"G\xc3\x8bT / HTTP/1.1\r\n\r\n",
    "path not ascii": b"GET /v1/\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "nul in a header": b"GET /health HTTP/1.1\r\nHost: x\x00y\r\n\r\n",
    "lengths differ": b"POST /generate HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "smuggling": b"POST /generate HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "negative length": b"POST /generate HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "huge length": b"POST /generate HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_request_gets_400_and_ends_the_connection(stories: LiveServer, data: bytes) -> None:
    with connect(stories) as client:
        answer = client.send(data).answer()
        assert answer.status == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.headers["connection"] == "close"
        assert client.is_closed()
    probe(stories)


def test_a_chunk_size_that_is_none_ends_the_connection_without_an_answer(stories: LiveServer) -> None:
    """The request runs already: whatever is written now would look like its answer."""
    with connect(stories) as client:
        client.send(b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        assert client.is_closed()
    probe(stories)


@pytest.mark.parametrize(
    "lines",
    [b"A: %b\r\n" % (b"a" * 100_000), b"A: a\r\n" * 17_000, b"%b: a\r\n" % (b"A" * 70_000)],
    ids=["one long value", "many", "one long name"],
)
@pytest.mark.parametrize("piece", [1 << 20, 10_000])
def test_a_head_beyond_64_kb_is_refused(stories: LiveServer, lines: bytes, piece: int) -> None:
    data = b"GET /health HTTP/1.1\r\nHost: x\r\n%b\r\n" % lines
    with connect(stories) as client:
        for i in range(0, len(data), piece):
            client.send(data[i : i + piece])
        assert client.answer().status == 431
        assert client.is_closed()
    probe(stories)


def test_a_head_that_does_not_end_is_refused_at_64_kb(stories: LiveServer) -> None:
    """Its client writes on for a while, and gets the answer nevertheless."""
    with connect(stories) as client:
        assert client.send(b"GET /health HTTP/1.1\r\nA: %b" % (b"a" * 20_000_000)).answer().status == 431
        assert client.is_closed()


def test_a_head_and_a_path_below_64_kb_are_served(stories: LiveServer) -> None:
    with connect(stories) as client:
        client.send(b"GET /health HTTP/1.1\r\nHost: x\r\nA: %b\r\n\r\n" % (b"a" * 60_000))
        assert client.answer().status == 200
        assert client.get("/" + "a" * 60_000).answer().status == 404


def test_a_head_that_does_not_come(serve_stories: Callable[..., LiveServer]) -> None:
    server = serve_stories(header_timeout_s=0.2)
    with connect(server) as client:
        assert client.is_closed()  # nobody asked for anything
    with connect(server) as client:
        assert client.send(b"GET /health HTTP/1.1\r\nHo").answer().status == 408
        assert client.is_closed()
    with connect(server) as client:  # the second request of a connection
        assert client.get("/health").answer().status == 200
        assert client.send(b"GET /hea").answer().status == 408
        assert client.is_closed()
    with connect(server) as client:  # line ends between requests are allowed, and no way to stay for ever
        assert client.get("/health").answer().status == 200
        assert client.send(b"\r\n").answer().status == 408
        assert client.is_closed()
    probe(server)


def test_a_started_head_behind_a_running_stream_does_not_break_it(serve_stories: Callable[..., LiveServer]) -> None:
    server = serve_stories(header_timeout_s=0.05)
    with connect(server) as client:
        client.post("/v1/completions", STREAM).send(b"GET /hea")
        assert client.answer().body.endswith(b"data: [DONE]\n\n")
        assert client.answer().status == 408
        assert client.is_closed()
    probe(server)


def test_idle_connections_are_closed(serve_stories: Callable[..., LiveServer], monkeypatch: Any) -> None:
    server = serve_stories()
    monkeypatch.setattr(server._server.config, "timeout_keep_alive", 0.1)
    with connect(server) as client:
        assert client.get("/health").answer().status == 200
        assert client.is_closed()
    with connect(server) as client:  # an answer before its body has come: idle begins behind the body
        client.send(b"POST /nowhere HTTP/1.1\r\nContent-Length: 5\r\n\r\n12")
        assert client.answer().status == 404
        client.send(b"345")
        assert client.is_closed()


def test_a_body_that_does_not_come(serve_stories: Callable[..., LiveServer]) -> None:
    server = serve_stories(body_timeout_s=0.2)
    head = b"POST /generate HTTP/1.1\r\nContent-Length: 10\r\n\r\n"
    for data in (head, head + b"{", b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"):
        with connect(server) as client:
            answer = client.send(data).answer()
            assert answer.status == 408 and "body_timeout_s" in answer.json()["error"]["message"]
            assert client.is_closed()
    probe(server)


def test_a_body_that_never_ends(serve_stories: Callable[..., LiveServer], monkeypatch: Any) -> None:
    """It is refused as soon as it is too large; then for a while read and thrown away, so that the answer arrives."""
    monkeypatch.setattr(http_protocol, "LINGER_S", 0.2)
    server = serve_stories(max_body_bytes=10_000)
    with connect(server) as client:
        client.send(b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):  # in the end the connection is cut
            while True:
                client.send(b"1000\r\n%b\r\n" % (b" " * 0x1000))
    with connect(server) as client:
        client.send(b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(3):
            client.send(b"1000\r\n%b\r\n" % (b" " * 0x1000))
        assert client.answer().status == 413
        client.send(b"1000\r\n%b\r\n" % (b" " * 0x1000))
        assert client.is_closed()
    probe(server)


def test_a_large_body_is_refused_before_it_comes_and_the_connection_stays_usable(
    serve_stories: Callable[..., LiveServer],
) -> None:
    server = serve_stories(max_body_bytes=10_000)
    head = b"POST /generate HTTP/1.1\r\nContent-Length: 5000000\r\n"
    with connect(server) as client:
        assert client.send(head + b"\r\n").answer().status == 413
        client.send(b" " * 5_000_000)
        assert client.get("/health").answer().status == 200
    with connect(server) as client:  # a client that writes all before it reads gets the answer, not a reset
        assert client.send(head + b"\r\n" + b" " * 5_000_000).answer().status == 413
    with connect(server) as client:  # one that asks first is not told to go on
        answer = client.send(head + b"Expect: 100-continue\r\n\r\n").answer()
        assert answer.status == 413 and answer.headers["connection"] == "close"
        assert client.is_closed()
    probe(server)


def test_a_body_behind_a_refused_key_does_not_keep_the_connection(
    serve_stories: Callable[..., LiveServer], monkeypatch: Any
) -> None:
    monkeypatch.setattr(http_protocol, "LINGER_S", 0.2)
    server = serve_stories(api_key="secret")
    with connect(server) as client:
        client.send(b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
        assert client.answer().status == 401
        client.send(b"1\r\n \r\n")  # no reason to start from the beginning
        assert client.is_closed()


def test_expect_100_continue(stories: LiveServer) -> None:
    with connect(stories) as client:
        client.send(b"POST /v1/completions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
        assert client.answer().status == 100
        assert client.send(BODY).answer().status == 200


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("cut", [0, 60, -20, -2, None])
def test_an_offer_of_http2_is_declined_and_the_body_kept(
    stories: LiveServer, is_chunked: bool, cut: int | None
) -> None:
    """Some clients (Java's) offer it with every first request."""
    length = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(BODY)
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) if is_chunked else BODY
    data = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n%b%b\r\n\r\n%b" % (UPGRADE, length, body)
    with connect(stories) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if cut is not None:
            client.send(data[:cut])
        answer = client.send(data[cut:]).answer()
        assert answer.status == 200 and answer.json()["usage"]["completion_tokens"] == 3
        client.send(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert client.answer().status == 200
        assert client.post("/v1/completions", PROMPT).answer().status == 200


def test_head_requests_have_no_body(stories: LiveServer) -> None:
    with connect(stories) as client:
        answer = client.send(b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n").answer("HEAD")
        assert answer.status == 200 and int(answer.headers["content-length"]) > 0
        assert client.get("/health").answer().status == 200


def test_http_1_0(stories: LiveServer) -> None:
    with connect(stories) as client:
        client.send(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY))
        answer = client.answer()
        assert answer.status == 200 and answer.headers["connection"] == "close"
        assert client.is_closed()


def test_every_answer_has_a_date(stories: LiveServer) -> None:
    with connect(stories) as client:
        assert client.get("/health").answer().headers["date"].endswith("GMT")


def test_pipelined_requests_are_answered_in_order(stories: LiveServer) -> None:
    with connect(stories) as client:
        client.send(b"GET /version HTTP/1.1\r\n\r\nGET /nowhere HTTP/1.1\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
        assert [client.answer().status for _ in range(3)] == [200, 404, 200]
        client.post("/v1/completions", STREAM)
        for i in range(50):  # more than are read ahead
            client.post("/v1/completions", PROMPT | {"max_tokens": 1 + i % 2})
        assert client.answer().body.endswith(b"data: [DONE]\n\n")
        assert [client.answer().json()["usage"]["completion_tokens"] for _ in range(50)] == [1, 2] * 25
    probe(stories)


def test_garbage_behind_a_running_stream_cuts_it(stories: LiveServer) -> None:
    with connect(stories) as client:
        client.post("/v1/completions", STREAM).head()
        client.send(b"\x00\x01garbage\r\n\r\n")
        with pytest.raises((EOFError, ConnectionResetError)):
            while (chunk := client.chunk()) != b"":
                assert chunk.startswith(b"data: {") and b"[DONE]" not in chunk
    probe(stories)


def test_connections_beyond_the_limit_are_told_so(serve_stories: Callable[..., LiveServer]) -> None:
    server = serve_stories(max_connections=2)
    first, second = connect(server), connect(server)
    assert first.get("/health").answer().status == second.get("/health").answer().status == 200
    with connect(server) as third:
        answer = third.post("/v1/completions", PROMPT).answer()
        assert answer.status == 503 and "max_connections" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "1"
        assert third.is_closed()
    # A crowd of them is not even told.
    crowd = [connect(server) for _ in range(http_protocol.MAX_REFUSED + 5)]
    for client in crowd:
        client.wait_cut()
    for client in crowd:
        client.close()
    assert first.get("/health").answer().status == 200
    first.close()
    second.close()
    while server.call(lambda: len(connections(server))):
        pass  # every look is a turn of the server's loop, which hears of it soon
    probe(server)


def test_a_stream_that_is_not_read_is_dropped(serve_stories: Callable[..., LiveServer]) -> None:
    server = serve_stories(send_timeout_s=0.2)
    with connect(server, rcvbuf=2048) as client:
        client.post("/generate", LONG_STREAM | {"stream": True}).head()
        client.wait_cut()
        with pytest.raises((EOFError, ConnectionResetError)):
            while client.chunk():
                pass
    assert not server.call(lambda: list(connections(server)))
    probe(server)


@pytest.mark.parametrize("head", ["", "Connection: close\r\n"])
def test_a_whole_answer_that_is_not_read_is_dropped(serve_stories: Callable[..., LiveServer], head: str) -> None:
    server = serve_stories(send_timeout_s=0.2)
    with connect(server, rcvbuf=2048) as client:
        client.post("/tokenize", LONG_ANSWER, head).head()
        client.wait_cut()
    assert not server.call(lambda: list(connections(server)))
    probe(server)


def test_an_answer_that_is_read_slowly_arrives(serve_stories: Callable[..., LiveServer]) -> None:
    """Progress counts, not the time it takes in all."""
    server = serve_stories(send_timeout_s=1)
    with connect(server, rcvbuf=2048) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 2048)
        client.post("/tokenize", LONG_ANSWER)
        assert client.answer().json()["count"] > 80_000
    probe(server)


def test_a_peer_that_vanishes_is_noticed_by_the_kernel(serve_stories: Callable[..., LiveServer]) -> None:
    server = serve_stories(send_timeout_s=7)
    with connect(server) as client:
        assert client.get("/health").answer().status == 200
        (connection,) = server.call(lambda: list(connections(server)))
        peer = connection.transport.get_extra_info("socket")
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
        (keep_idle,) = struct.unpack("i", peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4))
        assert keep_idle == 60


def test_time_limits_beyond_what_the_kernel_takes(serve_stories: Callable[..., LiveServer]) -> None:
    server = serve_stories(send_timeout_s=9e8, header_timeout_s=9e8)
    with connect(server) as client:
        assert client.get("/health").answer().status == 200
