"""/openapi.json describes this server, and its answers are what OpenAI's own specification says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from answers import events
from openapi_spec_validator import OpenAPIV31SpecValidator

from sapwood.server.fields import HARMLESS, NEUTRAL
from sapwood.server.openapi import document
from sapwood.server.routes import ROUTES

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return json.loads(json.dumps(document(ROUTES)))


def validator(spec: dict[str, Any], schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    """Of a schema whose references are to components of the document."""
    return jsonschema.Draft202012Validator(schema | {"components": spec["components"]})


def test_the_document_is_served(spec: dict[str, Any], http: httpx.Client) -> None:
    answer = http.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == spec


def test_the_document_is_valid(spec: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(spec).validate()
    for schema in spec["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_route_is_described(spec: dict[str, Any]) -> None:
    described = {(method.upper(), path) for path, methods in spec["paths"].items() for method in methods}
    assert described == {(route.method, route.path.replace(":path", "")) for route in ROUTES}
    operations = [operation for methods in spec["paths"].values() for operation in methods.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids) == len(ROUTES)
    assert all(re.fullmatch("[a-z][a-z0-9_]*", name) for name in ids)
    for route in ROUTES:
        operation = spec["paths"][route.path.replace(":path", "")][route.method.lower()]
        assert operation["summary"].startswith(f"{route.method} /")
        assert ("requestBody" in operation) is (route.body is not None)


def test_every_field_is_described(spec: dict[str, Any]) -> None:
    for route in ROUTES:
        if route.body is not None:
            properties = spec["components"]["schemas"][route.body.__name__]["properties"]
            assert set(properties) == {*route.body.__struct_fields__, *route.aliases, *HARMLESS, *NEUTRAL}


BODIES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    # route -> (accepted, refused), each added to the least that the route needs
    "/v1/completions": (
        [
            {},
            {"prompt": ["Hi", "Ho"]},
            {"prompt": [1, 5]},
            {"prompt": [[1, 5], [1]]},
            {"temperature": 1},
            {"temperature": 0.5, "top_p": 1.0},
            {"stop": "a"},
            {"stop": ["a", "b"]},
            {"logprobs": 0},
            {"logprobs": None},
            {"stream_options": None, "seed": None, "n": None, "stream": None, "model": None, "rid": None},
            {"user": 5, "metadata": {"a": [1]}},
            {"frequency_penalty": 0, "presence_penalty": 0.0, "best_of": 1, "suffix": "", "logit_bias": {}},
            {"max_new_tokens": 1, "max_tokens": None},
            {"stream": True, "stream_options": {"include_usage": True}},
            {"rid": "mine"},
        ],
        [
            {"prompt": None},
            {"prompt": 5},
            {"temperature": "1"},
            {"temperature": True},
            {"max_tokens": "5"},
            {"max_tokens": 1.5},
            {"n": True},
            {"stop": 5},
            {"stop": [5]},
            {"stream": 1},
            {"stream": True, "stream_options": {"usage": True}},
            {"echo": "yes"},
            {"frequency_penalty": 0.1},
            {"best_of": 2},
            {"suffix": "a"},
            {"logit_bias": {"1": 5}},
            {"max_new_tokens": "1"},
            {"unknown": 1},
            {"messages": MESSAGES},
            {"rid": ""},
            {"rid": "a b"},
            {"rid": "a\nb"},
        ],
    ),
    "/v1/chat/completions": (
        [
            {},
            {"max_completion_tokens": 2, "max_tokens": 2},
            {"logprobs": True, "top_logprobs": 0},
            {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}},
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        ],
        [
            {"messages": None},
            {"messages": "Hi"},
            {"messages": ["Hi"]},
            {"logprobs": 1},
            {"top_logprobs": 1},
            {"tools": [{"type": "function"}]},
            {"tool_choice": "required"},
            {"response_format": {"type": "json_object"}},
            {"chat_template_kwargs": []},
            {"prompt": "Hi"},
        ],
    ),
    "/generate": (
        [
            {},
            {"text": ["Hi"]},
            {"text": None, "input_ids": [1, 5]},
            {"sampling_params": [{"max_new_tokens": 1}], "text": ["Hi"]},
            {"return_logprob": True, "logprob_start_len": -1, "lora_path": ""},
            {"extra_key": "a"},
        ],
        [
            {"text": 5},
            {"text": ["a", 5]},
            {"input_ids": "a"},
            {"sampling_params": 5},
            {"sampling_params": ["a"]},
            {"rid": ["a"]},
            {"return_logprob": 1},
            {"n": 2},
        ],
    ),
    "/tokenize": (
        [{}, {"prompt": ["Hi"]}, {"prompt": None, "messages": MESSAGES}, {"add_special_tokens": False}],
        [{"prompt": 5}, {"prompt": [5]}, {"add_special_tokens": 1}, {"text": "Hi"}],
    ),
    "/detokenize": (
        [{}, {"tokens": []}, {"tokens": [[1], []]}, {"skip_special_tokens": True}],
        [{"tokens": None}, {"tokens": 5}, {"tokens": "a"}, {"ids": [1]}],
    ),
    "/abort_request": ([{}], [{"rid": 5}, {"abort_all": "yes"}, {"id": "a"}]),
}
LEAST: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "/generate": {"text": "Hi", "sampling_params": {"max_new_tokens": 1}},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 5]},
    "/abort_request": {"abort_all": True},
}


def bodies() -> Iterator[Any]:
    for route, (accepted, refused) in BODIES.items():
        for added, is_accepted in [(a, True) for a in accepted] + [(r, False) for r in refused]:
            yield pytest.param(route, LEAST[route] | added, is_accepted, id=f"{route}-{added}")


@pytest.mark.parametrize(("route", "body", "is_accepted"), [*bodies()])
def test_the_schema_and_the_server_agree(
    route: str, body: dict[str, Any], is_accepted: bool, spec: dict[str, Any], http: httpx.Client
) -> None:
    """Of types, names and neutral values. Ranges, and what two fields must be to each other, the server knows alone."""
    schema = spec["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert validator(spec, schema).is_valid(body) is is_accepted
    assert http.post(route, json=body).status_code == (200 if is_accepted else 400)


def test_errors_are_as_described(spec: dict[str, Any], http: httpx.Client) -> None:
    check = validator(spec, {"$ref": "#/components/schemas/Error"})
    for answer in (
        http.get("/nope"),
        http.get("/v1/completions"),
        http.post("/v1/completions", json={"prompt": 5}),
        http.post("/v1/completions", json={"prompt": "x", "model": "y"}),
        http.post("/v1/completions", content=b"", headers={"content-type": "text/plain"}),
    ):
        assert answer.status_code >= 400
        check.validate(answer.json())


# --- OpenAI's specification


@pytest.fixture(scope="module")
def openai_spec(data_dir: Path) -> dict[str, Any]:
    return json.loads((data_dir / "suites" / "openapi_subset" / "openai_chat.openapi.json").read_bytes())


def conforms(openai_spec: dict[str, Any], name: str, value: Any) -> None:
    validator(openai_spec, {"$ref": f"#/components/schemas/{name}"}).validate(value)


COMPLETION = {"prompt": "Once upon a time", "max_tokens": 3}
CHAT = {"messages": MESSAGES, "max_tokens": 3}
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"n": 2}, {"stop": " ", "temperature": 1}, {"max_tokens": 1})


@pytest.mark.parametrize("variant", [*VARIANTS, {"logprobs": True}], ids=str)
def test_chat_answers_conform(variant: dict[str, Any], openai_spec: dict[str, Any], http: httpx.Client) -> None:
    conforms(openai_spec, "CreateChatCompletionResponse", http.post("/v1/chat/completions", json=CHAT | variant).json())


@pytest.mark.parametrize("variant", [*VARIANTS, {"logprobs": True}], ids=str)
@pytest.mark.parametrize("with_usage", [False, True])
def test_chat_chunks_conform(
    variant: dict[str, Any], with_usage: bool, openai_spec: dict[str, Any], http: httpx.Client
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": with_usage}}
    chunks = events(http.post("/v1/chat/completions", json=CHAT | variant | options))
    for chunk in chunks:
        conforms(openai_spec, "CreateChatCompletionStreamResponse", chunk)
    assert ("usage" in chunks[-1]) is with_usage


@pytest.mark.parametrize("variant", [*VARIANTS, {"logprobs": 0}, {"echo": True}], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_completions_conform(
    variant: dict[str, Any], stream: bool, openai_spec: dict[str, Any], http: httpx.Client
) -> None:
    """But for one thing: in a stream finish_reason is null until the end, as OpenAI's own server has it; the
    specification describes only whole answers.
    """
    response = http.post("/v1/completions", json=COMPLETION | variant | {"stream": stream})
    bodies = events(response) if stream else [response.json()]
    assert all(choice["finish_reason"] is not None for choice in bodies[-1]["choices"])
    for body in bodies:
        for choice in body["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        conforms(openai_spec, "CreateCompletionResponse", body)


def test_models_and_errors_conform(openai_spec: dict[str, Any], http: httpx.Client) -> None:
    conforms(openai_spec, "ListModelsResponse", http.get("/v1/models").json())
    conforms(openai_spec, "Model", http.get("/v1/models/stories260K").json())
    conforms(openai_spec, "ErrorResponse", http.get("/v1/models/other").json())
    conforms(openai_spec, "ErrorResponse", http.post("/v1/completions", json={}).json())


def test_what_the_specification_calls_a_request_is_understood(
    openai_spec: dict[str, Any], spec: dict[str, Any]
) -> None:
    """Heeded, refused as not there yet, or harmless."""
    schemas = openai_spec["components"]["schemas"]

    def fields(schema: dict[str, Any]) -> set[str]:
        if "$ref" in schema:
            schema = schemas[schema["$ref"].split("/")[-1]]
        return set(schema.get("properties", ())).union(*map(fields, schema.get("allOf", ())))

    for theirs, ours in (
        ("CreateCompletionRequest", "CompletionRequest"),
        ("CreateChatCompletionRequest", "ChatRequest"),
    ):
        unknown = fields({"$ref": theirs}) - set(spec["components"]["schemas"][ours]["properties"])
        assert not unknown, f"{theirs}: {sorted(unknown)}"
