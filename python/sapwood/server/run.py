"""`sapwood serve`: one process that listens, loads, serves, drains.

Receives a ServerConfig from cli.py; binds the socket first, so that a taken port is known before gigabytes are read;
answers /health and /ready while the model loads; at SIGTERM or SIGINT takes no new requests and lets the running ones
end (at most drain_timeout_s); at a second signal ends them at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import resource
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator
from typing import Final, NoReturn

import uvicorn
import uvloop

from sapwood import __version__
from sapwood.config import ServerConfig
from sapwood.engine.async_engine import AsyncEngine
from sapwood.errors import InvalidRequest
from sapwood.server.app import create_app
from sapwood.server.http_protocol import BoundedHttp, Limits
from sapwood.server.service import Phase, Service

logger = logging.getLogger("sapwood.server")

BACKLOG: Final = 2048
# Longer than the idle time of usual proxies (60 s), so that they, not we, close a connection they are about to use.
KEEP_ALIVE_S: Final = 75
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
PROGRESS_S: Final = 10.0  # between two lines about a long load
END_S: Final = 10.0  # that a running step gets to end in when everything is to end at once
MAX_FILES: Final = 2**20  # where the system sets no limit
RESERVED_FILES: Final = 128  # file descriptors for all but connections: weights, logs, connections that are refused


def serve(config: ServerConfig) -> int:
    """Serve until a signal; returns the exit code: 0 drained, 1 cut off. Raises what loading raises, InvalidRequest
    where the address cannot be had.
    """
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    engine = AsyncEngine(config.model, own_process=True, **config.engine_settings())
    app = create_app(engine, config)
    listener = listen(config)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Life(app.state.service, app, config, listener).run())
    finally:
        listener.close()
        if config.uds is not None:
            with contextlib.suppress(OSError):
                os.unlink(config.uds)


def listen(config: ServerConfig) -> socket.socket:
    """A bound socket that listens. Raises InvalidRequest with the remedy where there is none to be had."""
    try:
        return _listen_unix(config.uds) if config.uds is not None else _listen_tcp(config.host, config.port)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no valid name"
        raise InvalidRequest(f"host: cannot resolve {config.host!r} ({reason})", "host") from None
    except OSError as error:
        if config.uds is not None:
            raise InvalidRequest(f"uds: cannot listen on {config.uds!r}: {error.strerror or error}", "uds") from None
        where = f"{config.host}:{config.port}"
        if error.errno == errno.EADDRINUSE:
            raise InvalidRequest(
                f"port {config.port} of {config.host} is taken by another process; choose another one with --port "
                f"(0 is any free one), or see who has it: ss -ltnp 'sport = :{config.port}'",
                "port",
            ) from None
        hint = "; ports below 1024 need a privilege, choose a higher one" if error.errno == errno.EACCES else ""
        raise InvalidRequest(f"host, port: cannot listen on {where}: {error.strerror or error}{hint}", "port") from None


def _listen_tcp(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and host == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _listen_unix(path: str) -> socket.socket:
    """A Unix socket; one that an ended process left behind is replaced, one that somebody serves is not."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(errno.EEXIST, "it exists and is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # a connect waits where the other's backlog is full
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except BlockingIOError:
                raise OSError(errno.EADDRINUSE, "another process serves it") from None
            else:
                raise OSError(errno.EADDRINUSE, "another process serves it")
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its clock (ten wake-ups a second) and its signal handlers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stop = asyncio.Event()

    async def main_loop(self) -> None:
        await self.stop.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def hang_up(self) -> None:
        """Cut every connection."""
        self.force_exit = True
        for connection in list(self.server_state.connections):
            assert isinstance(connection, BoundedHttp)
            connection.hang_up(reset=False)  # what its client was told of the end it may read


class _Life:
    """From the bound socket to the exit code."""

    def __init__(self, service: Service, app: object, config: ServerConfig, listener: socket.socket) -> None:
        self._service = service
        self._config = config
        self._listener = listener
        limits = Limits(_max_connections(config), config.header_timeout_s, config.send_timeout_s)
        protocol = type("Protocol", (BoundedHttp,), {"limits": limits})
        self._server = _Server(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of what strangers send
        self._num_signals = 0
        self._aborting: asyncio.Task[None] | None = None
        self._reported_s = time.monotonic()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        serving = loop.create_task(self._server.serve(sockets=[self._listener]))
        try:
            try:
                self._say_hello()
                began = time.monotonic()
                await self._service.load(self._on_progress)
                self._say_ready(time.monotonic() - began)
            except BaseException:
                self._server.stop.set()
                self._server.hang_up()
                await serving
                raise
            await serving
            if self._aborting is not None:
                await self._aborting
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
            await self._service.engine.shutdown()
        logger.info("stopped")
        return 0

    def _on_signal(self) -> None:
        self._num_signals += 1
        service, loop = self._service, asyncio.get_running_loop()
        if service.phase is Phase.LOADING:  # nobody is being served
            logger.info("stopped while loading")
            self._leave(0)
        if self._num_signals == 1:
            service.drain()
            num_calls, timeout = service.num_calls, self._config.drain_timeout_s
            if num_calls:
                limit = "" if timeout is None else f", at most {timeout:g} s"
                logger.info("draining: waiting for %d running requests%s; again to end them now", num_calls, limit)
            self._server.stop.set()
            if timeout is not None:
                loop.call_later(timeout, self._abort)
            return
        for number in SIGNALS:  # a third one kills
            loop.remove_signal_handler(number)
        self._abort()

    def _abort(self) -> None:
        if self._aborting is None:
            self._aborting = asyncio.get_running_loop().create_task(self._end_now())

    async def _end_now(self) -> None:
        """Every request fails with EngineDead, its client hears of it; then the connections go, and the process."""
        num_cut = len(self._server.server_state.tasks)
        if num_cut:
            logger.warning("ending %d running requests", num_cut)
        ending = asyncio.get_running_loop().create_task(self._service.engine.shutdown())
        await asyncio.wait({ending}, timeout=END_S)
        self._server.hang_up()
        if num_cut:
            logger.info("stopped")
            self._leave(1)

    def _leave(self, code: int) -> NoReturn:
        """End the process, whatever its threads do: reading weights and encoding a long text cannot be broken off."""
        if self._config.uds is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._config.uds)
        logging.shutdown()
        os._exit(code)

    def _on_progress(self, done: int, total: int) -> None:
        """Called by the loader's thread."""
        now = time.monotonic()
        if now - self._reported_s >= PROGRESS_S:
            self._reported_s = now
            logger.info("loading: %.1f of %.1f GB", done / 1e9, total / 1e9)

    def _say_hello(self) -> None:
        config = self._config
        logger.info("sapwood %s listens on %s and loads %s", __version__, self.url, config.model)
        if config.uds is None and config.api_key is None and not _is_loopback(self._listener.getsockname()[0]):
            logger.warning(
                "everybody who can reach %s can use this server: set an API key (environment SAPWOOD_API_KEY)", self.url
            )

    def _say_ready(self, load_s: float) -> None:
        facts = self._service.model_facts()
        logger.info(
            "ready after %.2f s: %s, %s, context of %d tokens, KV pool of %d tokens, %s threads, %s",
            load_s,
            self._service.model_name,
            facts["dtype"],
            facts["context_len"],
            facts["kv_pool_tokens"],
            facts["num_threads"],
            facts["cpu_isa"],
        )
        if facts["has_chat_template"] and self._config.uds is None and sys.stderr.isatty():
            key = "" if self._config.api_key is None else ' -H "Authorization: Bearer $SAPWOOD_API_KEY"'
            message = '{"messages": [{"role": "user", "content": "Hello!"}]}'
            sys.stderr.write(
                f"\nTry it from another terminal:\n\n  curl {self.url}/v1/chat/completions{key} "
                f"-H 'Content-Type: application/json' \\\n    -d '{message}'\n\n"
            )

    @property
    def url(self) -> str:
        if self._config.uds is not None:
            return f"unix:{self._config.uds}"
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _max_connections(config: ServerConfig) -> int:
    """max_connections, as far as there are file descriptors: without one, nobody could be refused either."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            files = most
    if files == resource.RLIM_INFINITY:
        files = MAX_FILES
    possible = max(1, files - RESERVED_FILES)
    if config.max_connections is not None and config.max_connections > possible:
        logger.warning(
            "max_connections is %d instead of %d: the process may open %d files (ulimit -n)",
            possible,
            config.max_connections,
            files,
        )
    return min(config.max_connections or possible, possible)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
