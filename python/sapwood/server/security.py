"""Who may come in: an API key over every route but /health and /ready.

Receives every ASGI call from server/app.py before any route does; hands those with a key on, with the note whether
it opens the routes that change the server's state (server/exchange.py's Endpoint asks).
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from sapwood.config import ServerConfig
from sapwood.server.problems import Problem

OPEN: Final = frozenset({"/health", "/ready"})


class KeyCheck:
    """ASGI middleware. Keys come as `Authorization: Bearer KEY` (OpenAI's way) or `x-api-key: KEY`.

    No route is exempt but OPEN, by the very path that the router matches, so that neither a route that is added later
    nor a spelling of a path goes unguarded. Compared as digests, in constant time: neither content nor length can be
    probed.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._key = _digest(config.api_key)
        self._admin_key = _digest(config.admin_api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        given = _digest(_key_of(scope))
        is_admin = given is not None and _same(given, self._admin_key)
        is_user = self._key is None or (given is not None and _same(given, self._key))
        # Where the application is mounted in another one, its routes' paths begin behind the mount's.
        if not is_admin and not is_user and scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN:
            what = "the API key is wrong" if given is not None else "this server needs an API key"
            problem = Problem(401, f"{what}; send it as 'Authorization: Bearer KEY'", code="invalid_api_key")
            await _refuse(problem, send)
            return
        scope.setdefault("state", {})["sapwood.admin"] = is_admin or (is_user and self._admin_key is None)
        await self._app(scope, receive, send)


def _key_of(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return bytes(value[7:].strip())
        if name == b"x-api-key":
            return bytes(value)
    return None


def _digest(key: str | bytes | None) -> bytes | None:
    if key is None:
        return None
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def _same(given: bytes, key: bytes | None) -> bool:
    return key is not None and hmac.compare_digest(given, key)


async def _refuse(problem: Problem, send: Send) -> None:
    body = problem.body()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
