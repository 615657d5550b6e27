"""Fixtures of the server's tests: a live server over stories260K, its engine's own answers, servers made to order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import TEMPLATE, LiveServer

from devices import devices
from sapwood.config import ServerConfig
from sapwood.engine.async_engine import AsyncEngine, Engine


@pytest.fixture(scope="session")
def stories_dir(data_dir: Path) -> Path:
    return data_dir / "checkpoints" / "stories260K"


@pytest.fixture(scope="session")
def chat_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Jinja file for ServerConfig.chat_template: stories260K has no template of its own."""
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(TEMPLATE)
    return file


@pytest.fixture(scope="session", params=devices(emulated=False))
def stories_config(
    request: pytest.FixtureRequest, stories_dir: Path, chat_template: Path
) -> Iterator[Callable[..., ServerConfig]]:
    """settings -> the settings of a server of stories260K, called "stories260K": in float32, or on device "cuda"."""
    options: dict[str, Any] = {"dtype": "float32"}
    if request.param == "cuda":
        options = {"device": "cuda", "dtype": "bfloat16", "enable_deterministic_inference": True}

    def config(**settings: Any) -> ServerConfig:
        defaults = options | {"num_threads": 1, "max_total_tokens": 8192, "chat_template": str(chat_template)}
        return ServerConfig.from_kwargs(str(stories_dir), **(defaults | settings))

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cuda":
            from sapwood.program import cuda

            there = request.getfixturevalue("cuda_device")
            patch.setattr(cuda, "open_device", lambda: there)
        yield config


@pytest.fixture(scope="session")
def stories(stories_config: Callable[..., ServerConfig]) -> Iterator[LiveServer]:
    """A server of stories260K that all tests share: they leave no request behind, and its settings alone."""
    config = stories_config()
    server = LiveServer(AsyncEngine(config.model, **config.engine_settings()), config)
    yield server
    server.close()


@pytest.fixture(scope="session")
def truth(stories_config: Callable[..., ServerConfig]) -> Iterator[Engine]:
    """An engine of the same settings that no server has touched."""
    config = stories_config()
    with Engine(config.model, **config.engine_settings()) as engine:
        assert engine.tokenizer is not None
        engine.tokenizer.set_chat_template(TEMPLATE)
        yield engine


@pytest.fixture
def http(stories: LiveServer) -> httpx.Client:
    """A client of the shared server."""
    return stories.client


@pytest.fixture
def serve() -> Iterator[Callable[[AsyncEngine, ServerConfig], LiveServer]]:
    """(engine, config) -> a LiveServer that ends with the test."""
    servers: list[LiveServer] = []

    def start(engine: AsyncEngine, config: ServerConfig) -> LiveServer:
        servers.append(LiveServer(engine, config))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def serve_stories(
    serve: Callable[[AsyncEngine, ServerConfig], LiveServer], stories_config: Callable[..., ServerConfig]
) -> Callable[..., LiveServer]:
    """settings -> a LiveServer of stories260K with them."""

    def start(**settings: Any) -> LiveServer:
        config = stories_config(**settings)
        return serve(AsyncEngine(config.model, **config.engine_settings()), config)

    return start
