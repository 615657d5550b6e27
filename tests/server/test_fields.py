"""server/fields.py: every field understood, or refused by name; every body either JSON or a clear 400."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from answers import problem

from sapwood.server import fields
from sapwood.server.fields import HARMLESS, NEUTRAL, build, holds_prompts, parse
from sapwood.server.native import GENERATE_ALIASES, SAMPLING_ALIASES, GenerateRequest, GenerateSampling
from sapwood.server.openai import ALIASES, ChatRequest, CompletionRequest
from sapwood.server.problems import Problem

MESSAGES = [{"role": "user", "content": "Hi"}]
# body -> a request that its route takes
VALID: dict[type[msgspec.Struct], dict[str, Any]] = {
    CompletionRequest: {"prompt": "Hi"},
    ChatRequest: {"messages": MESSAGES},
    GenerateRequest: {"text": "Hi"},
}
# Values of which none is neutral for any field; 0 and False, 1 and True are told apart.
ASKING = ("something", 0.5, -2, 2, [0], {"a": 1}, [{}])
COMPLETIONS = "/v1/completions"


def on_each_route(names: Iterable[str]) -> list[Any]:
    """(body, name) of the routes that do not heed the field."""
    pairs = [(body, name) for body in VALID for name in sorted(names) if name not in body.__struct_fields__]
    return [pytest.param(body, name, id=f"{body.__name__}-{name}") for body, name in pairs]


def refusal(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        function(*args, **kwargs)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(("body", "name"), on_each_route(NEUTRAL))
def test_a_field_of_later_versions_may_ask_for_nothing(body: type[msgspec.Struct], name: str) -> None:
    for value in (*NEUTRAL[name], None):
        assert build(VALID[body] | {name: value}, body) == build(VALID[body], body)
    confusable = [not value if value in (0, 1) else 1 for value in NEUTRAL[name] if isinstance(value, (bool, int))]
    for value in (*ASKING, *confusable, True, False, 0, 1, "", [], {}):
        if any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL[name]):
            continue
        error = refusal(build, VALID[body] | {name: value}, body)
        assert (error.param, error.code) == (name, "unsupported")
        assert name in str(error)


def test_a_refusal_names_what_is_accepted() -> None:
    error = refusal(build, {"prompt": "x", "tool_choice": "required"}, CompletionRequest)
    assert str(error) == 'tool_choice is not supported by this version (accepted: "none", "auto"); leave it out'
    assert build({"prompt": "x", "frequency_penalty": 0.0}, CompletionRequest)  # a number, however it is written
    assert build({"prompt": "x", "repetition_penalty": 1.0}, CompletionRequest)


@pytest.mark.parametrize(("body", "name"), on_each_route(HARMLESS))
def test_a_harmless_field_may_hold_anything(body: type[msgspec.Struct], name: str) -> None:
    for value in (*ASKING, True, None, "", {"a": {"b": [1]}}):
        assert build(VALID[body] | {name: value}, body) == build(VALID[body], body)


def test_the_readme_lists_the_harmless_fields() -> None:
    readme = (Path(fields.__file__).parent / "README.md").read_text("utf-8")
    listed = readme.split("because known clients send them:")[1].split(".")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == HARMLESS


def test_a_harmless_field_that_a_route_heeds_is_heeded() -> None:
    assert build({"text": "x", "return_text_in_logprobs": True}, GenerateRequest).return_text_in_logprobs is True


@pytest.mark.parametrize("name", ["temprature", "max_token", "stream_option", "Model", "promt", "ignore-eos"])
def test_an_unknown_field_is_refused_with_the_nearest_valid_name(name: str) -> None:
    nearest = {"temprature": "temperature", "max_token": "max_tokens", "stream_option": "stream_options"}
    nearest |= {"Model": "model", "promt": "prompt", "ignore-eos": "ignore_eos"}
    for value in (1, None):  # a null is an absent field of a known name only
        error = refusal(build, {"prompt": "x", name: value}, CompletionRequest, aliases=ALIASES)
        assert (error.param, error.code) == (name, "unknown_field")
        assert f"did you mean {nearest[name]!r}?" in str(error)


def test_a_field_like_no_other_is_refused_without_a_guess() -> None:
    error = refusal(build, {"prompt": "x", "zzzz" * 1000: 1}, CompletionRequest)
    assert "/openapi.json" in str(error)
    assert len(str(error)) < 300
    nested = refusal(build, {"max_new_token": 1}, GenerateSampling, where="sampling_params.")
    assert nested.param == "sampling_params.max_new_token"
    assert "'max_new_tokens'" in str(nested)


@pytest.mark.parametrize("body", VALID, ids=lambda body: body.__name__)
def test_a_null_is_an_absent_field(body: type[msgspec.Struct]) -> None:
    aliases = GENERATE_ALIASES if body is GenerateRequest else ALIASES
    optional = dict.fromkeys((*body.__struct_fields__, *aliases, *HARMLESS, *NEUTRAL))
    assert build(optional | VALID[body], body, aliases=aliases) == build(VALID[body], body)


@pytest.mark.parametrize(("body", "name"), [(CompletionRequest, "prompt"), (ChatRequest, "messages")])
def test_a_missing_field_is_named(body: type[msgspec.Struct], name: str) -> None:
    for data in ({}, {name: None}):
        error = refusal(build, data, body)
        assert (error.param, str(error)) == (name, f"{name} is missing")


@pytest.mark.parametrize(
    ("data", "param", "message"),
    [
        ({"temperature": "1"}, "temperature", "temperature: Expected `float`, got `str`"),
        ({"temperature": True}, "temperature", "temperature: Expected `float`, got `bool`"),
        ({"temperature": 10**400}, "temperature", "temperature: Number out of range"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens: Expected `int`, got `float`"),
        ({"max_tokens": True}, "max_tokens", "max_tokens: Expected `int`, got `bool`"),
        ({"stream": 1}, "stream", "stream: Expected `bool`, got `int`"),
        ({"stop": ["a", 5]}, "stop[1]", "stop[1]: Expected `str`, got `int`"),
        ({"stop_token_ids": [1, True]}, "stop_token_ids[1]", "stop_token_ids[1]: Expected `int`, got `bool`"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", "include_usage: Expected"),
        ({"stream_options": {"usage": True}}, "stream_options", "unknown field `usage`"),
        ({"model": 5}, "model", "model: Expected `str`, got `int`"),
        ({"prompt": 5}, "prompt", "prompt: Expected `str | array`, got `int`"),
        ({"max_new_tokens": "5"}, "max_new_tokens", "max_new_tokens: Expected `int`, got `str`"),  # as it was sent
        ({"rid": "a\r\nset-cookie: b"}, "rid", "rid: Expected `str` matching"),  # it becomes a header
        ({"request_id": "ä"}, "request_id", "request_id: Expected `str` matching"),
        ({"rid": "a" * 257}, "rid", "rid: Expected `str` matching"),
        ({"rid": ""}, "rid", "rid: Expected `str` matching"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_type_is_named_with_its_place(data: dict[str, Any], param: str, message: str) -> None:
    error = refusal(build, {"prompt": "x"} | data, CompletionRequest, aliases=ALIASES)
    assert error.param == param
    assert message in str(error)


def test_one_field_under_two_names() -> None:
    error = refusal(build, {"prompt": "x", "max_new_tokens": 1, "max_tokens": 1}, CompletionRequest, aliases=ALIASES)
    assert str(error) == "max_new_tokens and max_tokens are the same field; give one"
    given = build({"seed": None, "sampling_seed": 5}, GenerateSampling, aliases=SAMPLING_ALIASES)
    assert given.seed == 5


def test_openais_seeds_are_signed() -> None:
    for seed, ours in (
        (0, 0),
        (2**64 - 1, 2**64 - 1),
        (-1, 2**64 - 1),
        (-(2**63), 2**63),
        (-(2**63) - 1, -(2**63) - 1),
    ):
        assert build({"prompt": "x", "seed": seed}, CompletionRequest).params()["seed"] == ours


@pytest.mark.parametrize(
    ("prompt", "texts", "expected"),
    [
        ([], True, False),
        ([1, 2], True, False),
        (["a", "b"], True, True),
        (["a", [1]], True, True),
        ([[1], [2]], True, True),
        ([[1], []], False, True),
        ([1, "a"], True, "prompt[1]: expected an integer, got 'a'"),
        ([1, True], True, "prompt[1]: expected an integer, got True"),
        ([1.0], True, "prompt[0]: expected an integer, got 1.0"),
        ([True], True, "prompt[0]: expected an integer, got True"),
        (["a", 5], True, "prompt[1]: expected a string or a list of token ids, got 5"),
        (["a", None], True, "prompt[1]: expected a string or a list of token ids, got None"),
        ([[1], [2.0]], True, "prompt[1]: expected a string or a list of token ids, got [2.0]"),
        ([[[1]]], True, "prompt[0]: expected a string or a list of token ids, got [[1]]"),
        ([MESSAGES], True, "prompt[0]: expected a string or a list of token ids, got [{'role': 'user'"),
        (MESSAGES, True, "prompt[0]: expected a string or a list of token ids, got {'role': 'user'"),
        (["a"], False, "prompt[0]: expected a list of token ids, got 'a'"),
    ],
    ids=str,
)
def test_lists_of_prompts_and_of_token_ids(prompt: list[Any], texts: bool, expected: bool | str) -> None:
    if isinstance(expected, bool):
        assert holds_prompts(prompt, "prompt", texts=texts) is expected
    else:
        error = refusal(holds_prompts, prompt, "prompt", texts=texts)
        assert str(error).startswith(expected)
        assert error.param == expected.split(":")[0]


NO_JSON = {
    "empty": b"",
    "blank": b"  ",
    "cut off": b'{"prompt": "x"',
    "two values": b"{} {}",
    "single quotes": b"{'prompt': 'x'}",
    "trailing comma": b'{"prompt": "x",}',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "Infinity": b'{"prompt": "x", "temperature": Infinity}',
    "-Infinity": b'{"prompt": "x", "temperature": -Infinity}',
    "beyond a float": b'{"prompt": "x", "temperature": 1e999}',
    "a NUL byte": b'{"prompt": "a\x00b"}',
    "a NUL behind": b'{"prompt": "x"}\x00',
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "invalid UTF-8 in a name": b'{"\xff": 1}',
    "half a character": b'{"prompt": "\xf0\x9f\x98"}',
    "a lone surrogate": b'{"prompt": "\\ud83d"}',
    "a lone surrogate in a name": b'{"prompt": "x", "\\ude00": 1}',
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "deep arrays": b"[" * 100_000,
    "deep arrays that close": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects, harmless": b'{"prompt": "x", "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
}


@pytest.mark.parametrize("raw", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_is_a_400(raw: bytes, http: httpx.Client) -> None:
    response = http.post(COMPLETIONS, content=raw, headers={"content-type": "application/json"})
    assert "JSON" in problem(response, 400)


@pytest.mark.parametrize("raw", [b"[]", b"5", b'"x"', b"null", b"true", b"1.5"])
def test_a_body_that_is_no_object(raw: bytes, http: httpx.Client) -> None:
    assert "JSON object, got" in problem(http.post(COMPLETIONS, content=raw), 400)


def test_of_a_duplicate_name_the_last_value_counts() -> None:
    assert parse(b'{"prompt": "a", "max_tokens": 1, "max_tokens": 2}', CompletionRequest).max_tokens == 2


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
def test_another_content_type_is_refused(kind: str, http: httpx.Client) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1})
    assert "application/json" in problem(http.post(COMPLETIONS, content=body, headers={"content-type": kind}), 415)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"])
def test_the_content_type_may_be_spelled_freely(kind: str, http: httpx.Client) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1})
    assert http.post(COMPLETIONS, content=body, headers={"content-type": kind}).status_code == 200
    bare = http.build_request("POST", COMPLETIONS, content=body)
    assert "content-type" not in bare.headers
    assert http.send(bare).status_code == 200


def test_a_browsers_body_without_a_type_is_refused(http: httpx.Client) -> None:
    """A page may send it to any server without asking first; a program sends no Origin."""
    body = b'{"prompt": "Once", "max_tokens": 1}'
    assert http.post(COMPLETIONS, content=body).status_code == 200
    assert "no type" in problem(http.post(COMPLETIONS, content=body, headers={"origin": "http://evil.example"}), 415)
