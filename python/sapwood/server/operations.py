"""Routes for those who run the server: health, readiness, metrics, facts, and the two that change its state.

Receives exchanges from server/app.py; asks server/service.py.
"""

from __future__ import annotations

import msgspec

from sapwood import __version__
from sapwood.server.exchange import Exchange
from sapwood.server.fields import parse
from sapwood.server.metrics import CONTENT_TYPE
from sapwood.server.problems import Problem
from sapwood.server.service import Phase


class AbortRequest(msgspec.Struct, kw_only=True):
    """POST /abort_request: the id of a call (the answer's id, or the rid it was sent with), or all of them."""

    rid: str | None = None
    abort_all: bool = False


async def health(exchange: Exchange) -> None:
    """GET /health: 200 while the engine computes, or has nothing to compute, or loads; else 503."""
    alive, state = exchange.service.health()
    await exchange.answer(state, 200 if alive else 503)


async def ready(exchange: Exchange) -> None:
    """GET /ready: 200 while requests are taken; 503 while the model loads and while the server drains."""
    service = exchange.service
    is_ready = service.phase is Phase.READY and service.engine.is_alive
    await exchange.answer({"ready": is_ready, "status": service.phase.value}, 200 if is_ready else 503)


async def metrics(exchange: Exchange) -> None:
    """GET /metrics"""
    await exchange.answer(exchange.service.metrics.render(), content_type=CONTENT_TYPE)


async def server_info(exchange: Exchange) -> None:
    """GET /server_info"""
    await exchange.answer(exchange.service.info())


async def model_info(exchange: Exchange) -> None:
    """GET /model_info: SGLang's short form."""
    service = exchange.service
    service.ready_engine()
    await exchange.answer(
        {
            "model_path": service.config.model,
            "tokenizer_path": service.config.tokenizer or service.config.model,
            "is_generation": True,
            "max_model_len": service.context_len(),
            "vocab_size": service.model.vocab_size,
        }
    )


async def version(exchange: Exchange) -> None:
    """GET /version"""
    await exchange.answer({"version": __version__})


async def flush_cache(exchange: Exchange) -> None:
    """POST /flush_cache: drop every cached page that no running request uses."""
    await exchange.body()  # nothing is in it; but what a page of another site could post is refused
    num_pages = exchange.service.ready_engine().flush_cache()
    await exchange.answer({"success": True, "num_pages": num_pages})


async def abort_request(exchange: Exchange) -> None:
    """POST /abort_request: end a running call, or all; its client gets finish_reason "abort" and the text so far."""
    request = parse(await exchange.body(), AbortRequest)
    if (request.rid is None) == (not request.abort_all):
        raise Problem(400, "give rid, or abort_all=true", param="rid")
    num_aborted = exchange.service.abort(request.rid)
    if request.rid is not None and not num_aborted:
        raise Problem(404, f"no request {request.rid!r:.200} is running", param="rid", code="request_not_found")
    await exchange.answer({"success": True, "num_aborted": num_aborted})
