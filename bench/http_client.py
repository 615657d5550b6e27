"""HTTP/1.1 and server-sent events over asyncio's sockets, at little cost.

bench/generations.py sends its requests through a Client and takes the pieces of each response as a Sink. Client and
server share the machine's cores, so a token costs one callback here: no task is woken before the response is over.

    Connection.data_received -> ResponseParser (HTTP) -> Sink.body, in generations.py -> EventParser (SSE)
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol

MAX_HEAD_BYTES: Final = 1 << 20


class HttpError(Exception):
    """What came is not HTTP/1.1, or not all of a response."""


class StaleConnection(HttpError):
    """A kept-alive connection was closed before it answered: nobody has seen the request, it may be sent again."""


# --- HTTP
class ResponseParser:
    """One response, fed in pieces of any size: content-length, chunked, or ended by the connection's end.

    status, headers    once `has_head`; names of headers in lower case
    done               the response is complete
    keep_alive         whether the connection may carry another one then
    """

    def __init__(self) -> None:
        self.status = 0
        self.reason = ""
        self.headers: dict[str, str] = {}
        self.has_head = False
        self.done = False
        self.keep_alive = True
        self._rest = b""
        self._chunked = False
        self._remaining: int | None = None  # of the body, or of a chunk; None = until the end
        self._in_chunk = False
        self._in_trailers = False

    def feed(self, data: bytes) -> list[bytes]:
        """Pieces of the body, as they come to light. HttpError where this cannot be a response."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not self.has_head:
            data = self._head(data)
            if not self.has_head:
                return []
        if self.done:
            if data:
                raise HttpError(f"{len(data)} bytes came after the end of a response: {data[:40]!r}")
            return []
        if self._chunked:
            return self._chunks(data)
        if self._remaining is None:
            return [data] if data else []
        if len(data) > self._remaining:
            raise HttpError(f"the body is longer than its content-length says, by {len(data) - self._remaining} bytes")
        self._remaining -= len(data)
        self.done = self._remaining == 0
        return [data] if data else []

    def eof(self) -> None:
        """The connection has ended. HttpError where the response needed more."""
        if self.done:
            return
        if not self.has_head:
            raise HttpError("the server closed the connection without an answer")
        if self._chunked or self._remaining is not None:
            raise HttpError("the server closed the connection in the middle of a response")
        self.done = True

    def _head(self, data: bytes) -> bytes:
        """What follows the head; sets has_head when all of it is there. Interim responses (1xx) are passed over."""
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > MAX_HEAD_BYTES:
                    raise HttpError(f"a response's head is larger than {MAX_HEAD_BYTES} bytes")
                self._rest = data
                return b""
            status_line, *lines = data[:end].decode("latin-1").split("\r\n")
            data = data[end + 4 :]
            version, _, status = status_line.partition(" ")
            if not version.startswith("HTTP/1.") or not status[:3].isdigit():
                raise HttpError(f"not an HTTP/1.1 response: {status_line[:80]!r}")
            self.status, self.reason = int(status[:3]), status[4:]
            if self.status >= 200:
                break
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self.has_head = True
        connection = self.headers.get("connection", "").lower()
        self.keep_alive = "close" not in connection and (version != "HTTP/1.0" or "keep-alive" in connection)
        if self.status in (204, 304):
            self.done = True
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._chunked = True
        elif (length := self.headers.get("content-length")) is not None:
            if not length.isdigit():
                raise HttpError(f"content-length is no number: {length!r}")
            self._remaining = int(length)
            self.done = self._remaining == 0
        else:
            self.keep_alive = False
        return data

    def _chunks(self, data: bytes) -> list[bytes]:
        pieces = []
        at = 0
        while not self.done:
            if self._in_chunk:
                assert self._remaining is not None
                piece = data[at : at + self._remaining]
                if piece:
                    pieces.append(piece)
                self._remaining -= len(piece)
                at += len(piece)
                if self._remaining:
                    break
                if len(data) - at < 2:
                    self._rest = data[at:]
                    break
                if data[at : at + 2] != b"\r\n":
                    raise HttpError(f"a chunk of the body is longer than it says: {data[at : at + 20]!r} follows it")
                at += 2
                self._in_chunk = False
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                if len(data) - at > MAX_HEAD_BYTES:
                    raise HttpError(f"a chunk's size is longer than {MAX_HEAD_BYTES} bytes")
                self._rest = data[at:]
                break
            line = data[at:end]
            at = end + 2
            if self._in_trailers:
                self.done = not line
                continue
            try:
                self._remaining = int(line.partition(b";")[0], 16)
            except ValueError:
                raise HttpError(f"not a chunk's size: {line[:40]!r}") from None
            self._in_chunk = self._remaining > 0
            self._in_trailers = self._remaining == 0
        else:
            if at < len(data):
                raise HttpError(f"{len(data) - at} bytes came after the end of a response: {data[at : at + 40]!r}")
        return pieces


class EventParser:
    """Server-sent events, fed in pieces of any size: the data of each. Comments and other fields are passed over; lines
    may end in LF, CR LF or CR.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if b"\r" in data:
            # A CR at the end may be half of a line end.
            if data.endswith(b"\r"):
                data, self._rest = data[:-1], b"\r"
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = data.split(b"\n")
        self._rest = lines.pop() + self._rest
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
        return events

    def finish(self) -> list[bytes]:
        """The stream has ended: an event that lacks only its empty line."""
        return self.feed(b"\n\n") if self._rest or self._data else []


class Sink(Protocol):
    """Where a response goes."""

    def head(self, parser: ResponseParser) -> None: ...
    def body(self, data: bytes, now: float) -> None: ...


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.num_requests = 0
        self.is_open = False
        self._parser: ResponseParser | None = None
        self._sink: Sink | None = None
        self._done: asyncio.Future[None] | None = None
        self._any_data = False

    async def request(self, data: bytes, sink: Sink) -> bool:
        """Send, hand the response to the sink; whether the connection may be used again.

        HttpError where the response is broken, or StaleConnection.
        """
        if not self.is_open:
            raise StaleConnection("the server closed the connection")
        self.num_requests += 1
        self._parser, self._sink, self._any_data = ResponseParser(), sink, False
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        try:
            await self._done
        except BaseException:
            self.close()
            raise
        finally:
            parser, self._parser, self._sink, self._done = self._parser, None, None, None
        return parser.keep_alive and self.is_open

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        parser, sink, done = self._parser, self._sink, self._done
        if parser is None or sink is None or done is None or done.done():
            self.close()  # it speaks without being asked
            return
        self._any_data = True
        try:
            had_head = parser.has_head
            pieces = parser.feed(data)
            if parser.has_head and not had_head:
                sink.head(parser)
            for piece in pieces:
                sink.body(piece, now)
        except Exception as error:
            done.set_exception(error)
            return
        if parser.done:
            done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._done is None or self._done.done() or self._parser is None:
            return
        if not self._any_data and self.num_requests > 1:
            self._done.set_exception(StaleConnection("the server closed a kept-alive connection"))
            return
        try:
            self._parser.eof()
        except HttpError as broken:
            self._done.set_exception(HttpError(f"{broken}{f' ({error})' if error else ''}"))
        else:
            self._done.set_result(None)


class WholeBody:
    """A response that is read to its end."""

    def __init__(self) -> None:
        self.status = 0
        self.reason = ""
        self._pieces: list[bytes] = []

    def head(self, parser: ResponseParser) -> None:
        self.status, self.reason = parser.status, parser.reason

    def body(self, data: bytes, now: float) -> None:
        self._pieces.append(data)

    @property
    def content(self) -> bytes:
        return b"".join(self._pieces)


class Client:
    """Connections to one server, kept alive and used again.

    base_url   http://host:port or https://host:port, with a path in front of the routes where there is one
    headers    further headers of every request
    """

    def __init__(self, base_url: str, headers: Mapping[str, str] | None = None) -> None:
        scheme, separator, rest = base_url.partition("://")
        netloc, _, path = rest.partition("/")
        if not separator or scheme not in ("http", "https") or not netloc:
            raise ValueError(f"--base-url must be like http://127.0.0.1:30000, got {base_url!r}")
        host, colon, port = netloc.rpartition(":")
        if not colon or netloc.endswith("]"):  # an IPv6 address without a port
            host, port = netloc, "443" if scheme == "https" else "80"
        if not port.isdigit():
            raise ValueError(f"--base-url: the port must be a number, got {port!r}")
        self._host, self._port = host.strip("[]"), int(port)
        self._ssl = ssl.create_default_context() if scheme == "https" else None
        self._prefix = f"/{path}".rstrip("/")
        for name, value in (headers or {}).items():
            if not (name + value).isprintable() or not (name + value).isascii() or ":" in name:
                raise ValueError(f"header {name!r} must be printable ASCII on one line")
        extra = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._head = f"Host: {netloc}\r\nUser-Agent: sapwood-bench\r\nAccept: */*\r\n{extra}"
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()

    async def post(self, path: str, body: bytes, sink: Sink) -> None:
        head = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\n"
        await self._send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body, sink)

    async def get(self, path: str) -> WholeBody:
        sink = WholeBody()
        await self._send(f"GET {self._prefix}{path} HTTP/1.1\r\n{self._head}\r\n".encode("latin-1"), sink)
        return sink

    async def _send(self, data: bytes, sink: Sink) -> None:
        """OSError where there is no connection, HttpError where there is no whole response."""
        while self._idle:
            connection = self._idle.pop()
            try:
                await self._use(connection, data, sink)
                return
            except StaleConnection:
                self._all.discard(connection)
        _, connection = await asyncio.get_running_loop().create_connection(
            Connection, self._host, self._port, ssl=self._ssl
        )
        self._all.add(connection)
        await self._use(connection, data, sink)

    async def _use(self, connection: Connection, data: bytes, sink: Sink) -> None:
        if await connection.request(data, sink):
            self._idle.append(connection)
        else:
            connection.close()
            self._all.discard(connection)

    def close(self) -> None:
        for connection in self._all:
            connection.close()
        self._all.clear()
        self._idle.clear()
