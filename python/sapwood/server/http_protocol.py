"""uvicorn's HTTP/1.1 protocol with the bounds it lacks: every connection waits for something that has a deadline.

server/run.py hands it to uvicorn. What it adds: a limit on a request's head, its size (431) and its time (408); time
limits on a body that nobody reads any more, and on an answer that its client does not read; a limit on connections
(503); a Date header without a timer; detection of peers that vanished (keep-alive probes, TCP_USER_TIMEOUT); requests
that offer an upgrade keep their body; and `sapwood.connection` among the ASGI extensions: this object, for
server/exchange.py to hang up with.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from email.utils import formatdate
from typing import Any, Final

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from sapwood.server.problems import RETRY_AFTER, Problem

MAX_HEAD_BYTES: Final = 64 * 1024
# A connection closed while its client still sends is reset, and the answer lost: so long we read what nobody wants.
LINGER_S: Final = 5.0
MAX_REFUSED: Final = 64  # connections beyond max_connections that are told so; the others are just closed
MAX_PIPELINED: Final = 16  # requests read ahead of the answer to one before them
# Probes for a peer that is silent: after a minute, every 15 s, four times.
KEEP_ALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
RESET: Final = struct.pack("ii", 1, 0)  # struct linger: on, no time
# What the kernel keeps for a client that does not read; it would let the buffer grow to megabytes.
SEND_BUFFER_BYTES: Final = 256 * 1024
MAX_C_INT: Final = 2**31 - 1


class Limits:
    """max_connections None: any number."""

    __slots__ = ("header_timeout_s", "max_connections", "send_timeout_s")

    def __init__(self, max_connections: int | None, header_timeout_s: float, send_timeout_s: float) -> None:
        self.max_connections = max_connections
        self.header_timeout_s = header_timeout_s
        self.send_timeout_s = send_timeout_s


class BoundedHttp(HttpToolsProtocol):
    """One connection. `limits` is set by a subclass that server/run.py makes (uvicorn makes the instances).

    It is always in one of these states, and never for longer than what is in brackets: reading a head
    [header_timeout_s], reading a body [exchange.py's body_timeout_s; LINGER_S once the request is answered], answering
    [the request's own limits; send_timeout_s a write], idle [uvicorn's timeout_keep_alive], writing the rest of an
    answer [send_timeout_s without progress].
    """

    limits: Limits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answering: RequestResponseCycle | None = None  # self.cycle is a later one where requests are pipelined
        self._in_head = True
        self._head_bytes = 0  # of the request whose head is being read
        self._offers_upgrade = False
        self._problem: Problem | None = None  # why the parser was stopped
        self._is_refused = False
        self._deadline: asyncio.TimerHandle | None = None  # of the head, or of a body that nobody reads
        self._unread: asyncio.TimerHandle | None = None  # looks whether the client reads its answer

    # --- what server/exchange.py asks of its connection

    @property
    def is_paused(self) -> bool:
        """Whether a send would wait for the client to read."""
        return bool(self.flow.write_paused)

    def hang_up(self, *, reset: bool = True) -> None:
        """Cut the connection, whatever is still to be sent; a polite close would wait for a client that never reads.

        reset: what the kernel still has to send goes, too; else the client may read it.
        """
        connection = self.transport.get_extra_info("socket")
        if reset and connection is not None and connection.family != socket.AF_UNIX and connection.fileno() >= 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        for cycle in (self._answering, self.cycle):
            if cycle is not None:
                cycle.disconnected = True  # uvicorn shall not wonder at the answer's missing end
        self.transport.abort()

    # --- the transport's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            silence_ms = min(max(1, int(self.limits.send_timeout_s * 1000)), MAX_C_INT)
            for option, value in (*KEEP_ALIVE, (socket.TCP_USER_TIMEOUT, silence_ms)):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        most = self.limits.max_connections
        if most is not None and len(self.connections) > most + MAX_REFUSED:
            transport.abort()
        elif most is not None and len(self.connections) > most:
            self._refuse(Problem(503, f"too many connections (setting max_connections={most})", headers=RETRY_AFTER))
        else:
            self._set_deadline(self.limits.header_timeout_s, self._on_head_deadline)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        if self._unread is not None:
            self._unread.cancel()
        answering = self._answering
        if answering is not None and not answering.response_complete:
            answering.disconnected = True
            answering.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.parser is None or self._is_refused:
            return
        self._unset_keepalive_if_required()
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self._refuse(self._problem or Problem(400, "this is not a valid HTTP/1.1 request"))
            return
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(_head_too_large())
        elif self._in_head and self._head_bytes and self._deadline is None:
            self._set_deadline(self.limits.header_timeout_s, self._on_head_deadline)
        if self.pipeline and len(self.pipeline) < MAX_PIPELINED and len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()  # uvicorn pauses, and so would not notice that the client leaves

    def shutdown(self) -> None:
        super().shutdown()
        self._watch_unread()

    # --- the parser's calls

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = max(self._head_bytes, 1)  # where it came with the last bytes of the request before it
        extensions: dict[str, Any] = {"sapwood.connection": self}
        self.scope["extensions"] = extensions

    def on_headers_complete(self) -> None:
        # As much as came, with ": " and the line's end: a whole head may have come at once, with a body behind it.
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            self._problem = _head_too_large()
            raise ValueError  # stops the parser
        if self.parser.should_upgrade():
            self._offers_upgrade = True
            return
        self._in_head = False
        self._cancel_deadline()
        state, second = self.server_state, int(time.time())
        if getattr(state, "sapwood_second", 0) != second:
            state.sapwood_second = second  # type: ignore[attr-defined]
            state.default_headers = [(b"date", formatdate(second, usegmt=True).encode())]
        super().on_headers_complete()
        if self.expect_100_continue:
            # Refused before its body was asked for, a client may send the body or not: nobody could tell what follows.
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        if self._offers_upgrade:
            return
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0
        self._cancel_deadline()
        if self.cycle.response_complete:  # the answer was early: the connection is idle only now
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    # --- uvicorn's calls

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_unread()
        if not self._in_head and self.cycle.response_complete and not self.transport.is_closing():
            self._set_deadline(LINGER_S, self.transport.abort)

    # --- bounds

    def _set_deadline(self, after_s: float, then: Any) -> None:
        self._cancel_deadline()
        self._deadline = self.loop.call_later(after_s, then)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_head_deadline(self) -> None:
        self._deadline = None
        if self._is_answering():  # the next request's head; its client is busy with the answer to this one
            self._set_deadline(self.limits.header_timeout_s, self._on_head_deadline)
        elif self._head_bytes:
            timeout = self.limits.header_timeout_s
            self._refuse(Problem(408, f"the request's head did not arrive within {timeout:g} s"))
        else:
            self.transport.close()

    def _watch_unread(self) -> None:
        """An answer is complete: what its client does not read is not kept for ever."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        if unread := self.transport.get_write_buffer_size():
            self._unread = self.loop.call_later(self.limits.send_timeout_s, self._on_unread, unread)

    def _on_unread(self, before: int) -> None:
        self._unread = None
        if self._is_answering():
            return  # the next answer's sends are timed, and its end comes back here
        if self.transport.get_write_buffer_size() >= before:
            self.hang_up()
        else:
            self._watch_unread()

    def _is_answering(self) -> bool:
        return self._answering is not None and not self._answering.response_complete

    def _refuse(self, problem: Problem) -> None:
        """Answer what is no request, and close. What still comes is read, so that the answer arrives."""
        self._is_refused = True
        if self._is_answering():  # the client broke its own connection; nothing may look like a part of the answer
            self.hang_up()
            return
        body = problem.body()
        headers = {"content-type": "application/json", "content-length": len(body), "connection": "close"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in {**headers, **problem.headers}.items())
        self.transport.write(b"HTTP/1.1 %d Refused\r\n%b\r\n%b" % (problem.status, lines.encode(), body))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._set_deadline(LINGER_S, self.transport.abort)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Read the head again, without the offer (HTTP/2 over clear text, mostly): the parser would take no body else.

        rest: what came behind the head.
        """
        self._offers_upgrade = False
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse(Problem(400, "CONNECT: this is not a proxy"))
            return
        lines = [b"%b %b HTTP/%b" % (method, self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                value = b"close" if b"close" in value.lower() else b"keep-alive"
            if name not in (b"upgrade", b"http2-settings"):
                lines.append(b"%b: %b" % (name, value))
        self.parser = httptools.HttpRequestParser(self)
        self._head_bytes = 0
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)


def _head_too_large() -> Problem:
    return Problem(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")
