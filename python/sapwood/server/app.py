"""The ASGI application: routes, keys, CORS. `create_app(engine)` can be served alone or mounted in an app of yours.

Receives an AsyncEngine; hands each call to its route's Endpoint (server/exchange.py) behind the key check
(server/security.py). server/run.py serves it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from sapwood.config import ServerConfig
from sapwood.engine.async_engine import AsyncEngine
from sapwood.server.exchange import Endpoint, Exchange
from sapwood.server.openapi import document
from sapwood.server.problems import Problem
from sapwood.server.routes import ROUTES
from sapwood.server.routes import Route as TableRoute
from sapwood.server.security import KeyCheck
from sapwood.server.service import Service


def create_app(engine: AsyncEngine, config: ServerConfig | None = None) -> Starlette:
    """The application over an engine. config: the server's settings; None = defaults, with the engine's own.

    `app.state.service` is its Service. Its lifespan starts the engine and shuts it down; where the app is mounted in
    another one, which does not run a mounted app's lifespan, the engine is started by whoever owns it.
    """
    if config is None:
        config = ServerConfig(**msgspec.structs.asdict(engine.config))
    service = Service(engine, config)
    schema = msgspec.json.encode(document(ROUTES))

    async def openapi(exchange: Exchange) -> None:
        """GET /openapi.json: this document."""
        await exchange.answer(schema)

    routes = [
        StarletteRoute(
            route.path,
            Endpoint(service, route.path, route.handler, admin=route.admin),
            methods=[route.method],
        )
        for route in (*ROUTES, TableRoute("GET", "/openapi.json", openapi))
    ]
    middleware = [Middleware(KeyCheck, config)]
    if config.allowed_origins:
        # Outermost: a browser asks before it has a key to show.
        cors = Middleware(
            CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: _not_routed},
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    service: Service = app.state.service
    await service.load()
    try:
        yield
    finally:
        service.drain()
        await service.engine.shutdown()


async def _not_routed(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    service: Service = request.app.state.service
    path, method = request.scope["path"], request.method
    methods = sorted({route.method for route in ROUTES if route.path == path})
    if error.status_code == 405 and methods:
        problem = Problem(
            405, f"{path} takes {' or '.join(methods)}, not {method:.20}", headers={"allow": ", ".join(methods)}
        )
    elif error.status_code == 404:
        problem = Problem(404, f"there is no route {path!r:.200}; /openapi.json lists them", code="route_not_found")
    else:
        problem = Problem(error.status_code, error.detail, headers=error.headers or {})
    service.metrics.count_answer(method, "other", problem.status)
    headers: dict[str, Any] = dict(problem.headers)
    return Response(problem.body(), problem.status, headers, media_type="application/json")
