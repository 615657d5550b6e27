"""/openapi.json: the routes and their bodies, made from the very structs that parse them.

Receives the route table of server/app.py; server/fields.py's tables say which further fields are accepted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from sapwood import __version__
from sapwood.server.fields import HARMLESS, NEUTRAL
from sapwood.server.routes import Route

REF: Final = "#/components/schemas/{name}"
ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    bodies = [route.body for route in routes if route.body is not None]
    schemas, components = msgspec.json.schema_components(bodies, ref_template=REF)
    by_body = dict(zip(bodies, schemas, strict=True))
    for body in bodies:
        schema = components[body.__name__]
        schema["additionalProperties"] = False
        properties = schema["properties"]
        required = schema.get("required", ())
        for name, value in properties.items():
            if name not in required:  # a null is an absent field
                properties[name] = {"anyOf": [value, {"type": "null"}]}
        for name in sorted(HARMLESS - set(properties)):
            properties[name] = {"description": "accepted, of no consequence"}
        for name, values in NEUTRAL.items():
            if name not in properties:
                properties[name] = {"enum": [*values, None], "description": "not supported yet"}
        for name, field in route_aliases(routes, body):
            properties[name] = properties[field] | {"description": f"another name of {field}"}
    components["Error"] = ERROR
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path.replace(":path", ""), {})[route.method.lower()] = _operation(route, by_body)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Sapwood", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def route_aliases(routes: Sequence[Route], body: type) -> list[tuple[str, str]]:
    """(other name, field) of the route that takes this body."""
    return sorted(next(route.aliases for route in routes if route.body is body).items())


def _operation(route: Route, by_body: dict[Any, Any]) -> dict[str, Any]:
    error = {"content": {"application/json": {"schema": {"$ref": REF.format(name="Error")}}}}
    operation: dict[str, Any] = {
        "summary": (route.handler.__doc__ or "").strip().splitlines()[0],
        "operationId": f"{route.method.lower()}_{re.sub(r'[^a-z0-9]+', '_', route.path.strip('/{}'))}",
        "responses": {
            "200": {"description": "the answer"},
            "4XX": {"description": "the request is refused", **error},
            "5XX": {"description": "the server cannot answer it", **error},
        },
    }
    if "{" in route.path:
        name = route.path.split("{")[1].split(":")[0].rstrip("}")
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": by_body[route.body]}}}
    return operation
