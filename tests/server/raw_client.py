"""An HTTP client of bare sockets, for requests and manners that no HTTP library would allow."""

from __future__ import annotations

import http.client
import json
import select
import socket
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

TIMEOUT_S = 30.0  # of what must happen; what must not is bounded by the server's own settings


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class RawClient:
    """One connection. rcvbuf: bytes of its receive buffer, for readers that fall behind soon."""

    def __init__(self, address: tuple[str, int] | str, *, rcvbuf: int | None = None) -> None:
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.socket.settimeout(TIMEOUT_S)
        if rcvbuf is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        try:
            self.socket.connect(address)
        except OSError:
            self.socket.close()
            raise
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> Self:
        self.socket.sendall(data)
        return self

    def get(self, path: str) -> Self:
        return self.send(b"GET %b HTTP/1.1\r\nHost: test\r\n\r\n" % path.encode())

    def post(self, path: str, body: Mapping[str, Any], head: str = "") -> Self:
        data = json.dumps(body).encode()
        lines = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(data)}\r\n{head}\r\n"
        return self.send(lines.encode() + data)

    def head(self) -> Answer:
        """Status and headers of the next answer; 100 Continue is one."""
        status = self.file.readline()
        assert status.startswith(b"HTTP/1.1 "), status
        return Answer(int(status.split()[1]), http.client.parse_headers(self.file), b"")  # type: ignore[arg-type]

    def answer(self, method: str = "GET") -> Answer:
        """The next answer, whole. EOFError where the connection ends within it."""
        head = self.head()
        if method == "HEAD" or head.status == 100:
            return head
        if head.headers.get("transfer-encoding") == "chunked":
            return head._replace(body=b"".join(iter(self.chunk, b"")))
        return head._replace(body=self._read(int(head.headers["content-length"])))

    def chunk(self) -> bytes:
        """The next piece of a chunked body; b"" at its end."""
        line = self.file.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError(line)
        data = self._read(int(line, 16))
        if self._read(2) != b"\r\n":
            raise EOFError
        return data

    def _read(self, size: int) -> bytes:
        data = self.file.read(size)
        if len(data) < size:
            raise EOFError(data)
        return data

    def is_closed(self) -> bool:
        """Whether the server closes the connection without another byte; waits for one or the other."""
        try:
            return self.file.read(1) == b""
        except ConnectionResetError:
            return True

    def wait_cut(self) -> None:
        """Wait, reading nothing, until the server has closed or reset the connection."""
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)  # POLLHUP and POLLERR come unasked
        assert poll.poll(TIMEOUT_S * 1000), "the connection is still open"

    def half_close(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.file.close()
        self.socket.close()
