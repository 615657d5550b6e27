"""The table of routes: what server/app.py mounts and server/openapi.py documents."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from sapwood.server import native, openai, operations
from sapwood.server.exchange import Handler


class Route(NamedTuple):
    """body: the struct of a request's body, with aliases for its fields. admin: it changes the server's state."""

    method: str
    path: str
    handler: Handler
    body: type | None = None
    aliases: Mapping[str, str] = MappingProxyType({})
    admin: bool = False


ROUTES: Final = (
    Route("GET", "/v1/models", openai.list_models),
    Route("GET", "/v1/models/{model:path}", openai.get_model),
    Route("POST", "/v1/completions", openai.completions, openai.CompletionRequest, openai.ALIASES),
    Route("POST", "/v1/chat/completions", openai.chat_completions, openai.ChatRequest, openai.ALIASES),
    Route("POST", "/generate", native.generate, native.GenerateRequest, native.GENERATE_ALIASES),
    Route("POST", "/tokenize", native.tokenize, native.TokenizeRequest),
    Route("POST", "/v1/tokenize", native.tokenize, native.TokenizeRequest),
    Route("POST", "/detokenize", native.detokenize, native.DetokenizeRequest),
    Route("POST", "/v1/detokenize", native.detokenize, native.DetokenizeRequest),
    Route("GET", "/health", operations.health),
    Route("GET", "/ready", operations.ready),
    Route("GET", "/metrics", operations.metrics),
    Route("GET", "/server_info", operations.server_info),
    Route("GET", "/get_server_info", operations.server_info),
    Route("GET", "/model_info", operations.model_info),
    Route("GET", "/get_model_info", operations.model_info),
    Route("GET", "/version", operations.version),
    Route("POST", "/flush_cache", operations.flush_cache, admin=True),
    Route("POST", "/abort_request", operations.abort_request, operations.AbortRequest, admin=True),
)
