"""What the tests expect of every answer: errors in OpenAI's form, streams of server-sent events."""

from __future__ import annotations

import json
from typing import Any

import httpx

from sapwood.server.problems import TYPES


def problem(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """The message of an error in OpenAI's form, of that status, about that field.

    One about the context's length has OpenAI's code for it, always.
    """
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == TYPES[status]
    if "with a context length of" in error["message"]:
        code = "context_length_exceeded"
    assert (error["param"], error["code"]) == (param, code), error
    assert error["message"]
    return str(error["message"])


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a whole stream; the last one was [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert parts.pop() == "data: [DONE]"
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]
