"""Servers for tests: an application behind a real uvicorn on 127.0.0.1, or called in this process without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import httpx
import uvicorn
import uvloop
from starlette.applications import Starlette

from sapwood.config import ServerConfig
from sapwood.engine.async_engine import AsyncEngine
from sapwood.server.app import create_app
from sapwood.server.http_protocol import BoundedHttp, Limits
from sapwood.server.service import Service

T = TypeVar("T")
START_TIMEOUT_S = 60  # on a busy machine, loading included

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class _Uvicorn(uvicorn.Server):
    """Says when it serves, and needs no clock to be stopped."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serving = threading.Event()
        self.stop = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.serving.set()

    async def main_loop(self) -> None:
        await self.stop.wait()


class LiveServer:
    """An engine's application, served by uvicorn and uvloop in a thread until close().

    client    httpx.Client of its address
    service   its Service; what is asked of it goes through call()
    """

    def __init__(self, engine: AsyncEngine, config: ServerConfig) -> None:
        self.config = config
        self.app: Starlette = create_app(engine, config)
        self.service: Service = self.app.state.service
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._error: BaseException | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-server", daemon=True)
        self._thread.start()
        assert self._begun.wait(START_TIMEOUT_S)
        serving = self._server.serving.wait(START_TIMEOUT_S)
        assert serving and self._error is None, f"the server did not start: {self._error!r}"
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def _run(self) -> None:
        limits = Limits(self.config.max_connections, self.config.header_timeout_s, self.config.send_timeout_s)
        protocol = type("Protocol", (BoundedHttp,), {"limits": limits})
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            self.loop = runner.get_loop()
            self._server = _Uvicorn(
                uvicorn.Config(self.app, http=protocol, ws="none", lifespan="on", log_config=None, access_log=False)
            )
            self._begun.set()
            try:
                runner.run(self._server.serve(sockets=[self._listener]))
            except BaseException as error:  # close() raises it on the test's thread
                self._error = error
            finally:
                self._server.serving.set()

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(main, self.loop).result(60)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function on the server's loop, to which engine and service belong."""

        async def main() -> T:
            return function(*args)

        return self.run(main())

    def close(self) -> None:
        self.client.close()
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._server.stop.set)
            self._thread.join(60)
            assert not self._thread.is_alive(), "the server did not stop"
        self._listener.close()
        if self._error is not None:
            raise self._error


@contextlib.asynccontextmanager
async def in_process(
    engine: AsyncEngine, config: ServerConfig, *, load: bool = True
) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose requests are ASGI calls in the running loop; answers arrive whole. load: start the engine first.

    `client.service` is the application's Service.
    """
    app = create_app(engine, config)
    service: Service = app.state.service
    if load:
        await service.load()
    try:
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            client.service = service  # type: ignore[attr-defined]
            yield client
    finally:
        await engine.shutdown()
