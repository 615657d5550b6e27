"""One HTTP exchange: the request's body in, an answer out.

Receives an ASGI call from server/app.py's routes; its methods are what the routes of server/openai.py, server/native.py
and server/operations.py are written with. Whatever a route raises becomes an answer in OpenAI's form, here and nowhere
else.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import msgspec
from starlette.types import Message, Receive, Scope, Send

from sapwood.server.problems import Problem, internal, problem_of
from sapwood.server.service import printable

if TYPE_CHECKING:
    from sapwood.server.service import Service

logger = logging.getLogger(__name__)

JSON: Final = "application/json"


class ClientGone(Exception):
    """The client has left, or takes nothing any more: there is nobody to answer."""


class Connection(Protocol):
    """What a server may tell of a client's connection, as `sapwood.connection` among the ASGI extensions of a request;
    server/http_protocol.py does.
    """

    @property
    def is_paused(self) -> bool:
        """Whether a send would wait for the client to read."""

    def hang_up(self) -> None:
        """Cut it, whatever is still to be sent."""


class Exchange:
    """service: what the routes share. id: the request's, in the answer's headers and body, and for /abort_request."""

    __slots__ = ("_connection", "_receive", "_send", "id", "scope", "service", "started", "status")

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        self.service = service
        self.scope = scope
        self.id = uuid.uuid4().hex
        self.status = 0  # of the answer, once it has begun
        self.started = False
        self._connection: Connection | None = scope.get("extensions", {}).get("sapwood.connection")
        self._receive = receive
        self._send = send

    def header(self, name: bytes) -> bytes | None:
        """The first header of that (lower-case) name."""
        return next((value for key, value in self.scope["headers"] if key == name), None)

    async def body(self) -> bytes:
        """The request's body. Raises Problem 408, 413, 415; ClientGone."""
        config = self.service.config
        kind = self.header(b"content-type")
        # What a browser sends without asking first (forms, plain text) is refused: no page shall be able to post here.
        # So is a body without a type, if it is a browser's: that is what sends an Origin.
        kind = b"no type" if kind is None and self.header(b"origin") is not None else kind
        if kind is not None and kind.split(b";")[0].strip().lower() != JSON.encode():
            raise Problem(
                415,
                f"the content type must be {JSON}, got {kind.decode('latin-1')!r:.100} "
                f"(curl: -H 'Content-Type: {JSON}')",
            )
        declared = self.header(b"content-length")
        if declared is not None and declared.isdigit() and int(declared[:20]) > config.max_body_bytes:
            raise _too_large(config.max_body_bytes)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(config.body_timeout_s):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > config.max_body_bytes:
                        raise _too_large(config.max_body_bytes)
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise Problem(
                408,
                f"the body did not arrive within {config.body_timeout_s:g} s (setting body_timeout_s)",
                headers={"connection": "close"},
            ) from None

    async def start(self, status: int, content_type: str, headers: Mapping[str, str], length: int | None) -> None:
        """Send the answer's head; length: of its body, None where that is not known yet. Raises ClientGone."""
        name = printable(self.id)  # a client may have chosen it
        head = [(b"content-type", content_type.encode()), (b"x-request-id", name.encode("latin-1", "replace"))]
        if length is not None:
            head.append((b"content-length", b"%d" % length))
        head += [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        self.started, self.status = True, status
        await self._transmit({"type": "http.response.start", "status": status, "headers": head})

    async def send(self, body: bytes, more: bool) -> None:
        """Send a part of the answer's body. Raises ClientGone where the client takes nothing for send_timeout_s."""
        await self._transmit({"type": "http.response.body", "body": body, "more_body": more})

    async def _transmit(self, message: Message) -> None:
        try:
            if self._connection is not None and not self._connection.is_paused:
                await self._send(message)  # which waits for nobody: a timer would cost more than the sending
                return
            async with asyncio.timeout(self.service.config.send_timeout_s):
                await self._send(message)
        except TimeoutError:
            self.hang_up()
            raise ClientGone from None
        except OSError:  # what an ASGI 2.4 server says of a client that left
            raise ClientGone from None

    def hang_up(self) -> None:
        """Cut the connection, where the server lets us."""
        if self._connection is not None:
            self._connection.hang_up()

    async def answer(
        self,
        value: Any,
        status: int = 200,
        *,
        content_type: str = JSON,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Send a whole answer: bytes as they are, anything else as JSON."""
        body = value if isinstance(value, bytes) else msgspec.json.encode(value)
        await self.start(status, content_type, headers, len(body))
        await self.send(body, more=False)

    def watch(self) -> ClientWatch:
        """`async with`: the block is cancelled, and ClientGone raised, when the client leaves. After body()."""
        return ClientWatch(self._receive)


class ClientWatch:
    """Cancels its block when the client disconnects.

    Servers differ in how they tell: under ASGI 2.3 (uvicorn) sending to nobody succeeds silently, under 2.4 it raises,
    and neither wakes a task that waits for a token. `receive` says it under both, at once.
    """

    __slots__ = ("_gone", "_num_cancels", "_receive", "_task", "_watcher")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[Any] | None = task
        self._num_cancels = task.cancelling()  # by others, before us
        self._watcher = asyncio.get_running_loop().create_task(self._wait())
        return self

    async def _wait(self) -> None:
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        except OSError:
            pass  # a connection that breaks is a client that left
        # Behind its block the task is None here; so it waits inside, and there the cancellation arrives.
        if self._task is not None:
            self._gone = True
            self._task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        task, self._task = self._task, None
        self._watcher.cancel()
        # Who else cancels the task at the same time, a server that shuts down, is obeyed.
        if self._gone and task is not None and task.uncancel() <= self._num_cancels and kind is asyncio.CancelledError:
            raise ClientGone


Handler = Callable[[Exchange], Awaitable[None]]


class Endpoint:
    """The ASGI application of one route: runs its handler and answers for whatever it raises.

    path    the route's, as metrics name it
    admin   only for callers that may change the server's state (server/security.py)
    """

    def __init__(self, service: Service, path: str, handler: Handler, *, admin: bool = False) -> None:
        self._service = service
        self._path = path
        self._handler = handler
        self._admin = admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self._service, scope, receive, send)
        try:
            try:
                if self._admin and not scope["state"]["sapwood.admin"]:
                    raise Problem(
                        403, "this route changes the server's state: it needs the admin key (setting admin_api_key)"
                    )
                await self._handler(exchange)
            except ClientGone:
                raise
            except Exception as error:
                await self._answer_for(exchange, error)
        except ClientGone:
            exchange.status = exchange.status or 499
        finally:
            self._service.metrics.count_answer(scope["method"], self._path, exchange.status)

    async def _answer_for(self, exchange: Exchange, error: Exception) -> None:
        problem = problem_of(error)
        if problem is None:
            logger.error("request %s failed", printable(exchange.id), exc_info=error)
            problem = internal()
        if exchange.started:  # its head is out: a broken answer must not look like a whole one
            exchange.hang_up()
            return
        await exchange.answer(problem.body(), problem.status, headers=problem.headers)


def _too_large(most: int) -> Problem:
    return Problem(413, f"the body is larger than {most} bytes (setting max_body_bytes)")
