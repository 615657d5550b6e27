"""request.py: what verify() refuses, and that it names the field."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from sapwood.errors import InvalidRequest, SapwoodError
from sapwood.request import MAX_N, MAX_SEED, FinishReason, RequestOutput, SamplingParams, Usage

BAD = (
    ("temperature", (-0.1, math.nan, math.inf, True, "1", None, 10**400)),
    ("top_k", (1.5, "1", None, True)),
    ("top_p", (0, -1, 1.01, math.nan, "1", None, 10**400)),
    ("min_p", (-0.01, 1.01, math.inf, None)),
    ("max_new_tokens", (0, -1, 1.5, "5", True)),
    ("min_new_tokens", (-1, 1.5, None, True, 129)),  # 129 > max_new_tokens
    ("stop", ("", [""], ["a", ""], [1], ["x"] * 65, 5, True, b"ab", {"a"})),
    ("stop_token_ids", ([-1], [1.5], [True], ["1"], [0] * 257, [1000], 5, {5}, "5")),
    ("seed", (-1, MAX_SEED + 1, 1.5, "1", True)),
    ("n", (0, -1, MAX_N + 1, 1.5, "1", True, None)),
    ("ignore_eos", (0, 1, None, "no")),
    ("return_logprob", (0, 1, None, "yes")),
    ("skip_special_tokens", (0, 1, None, "no")),
)
GOOD = (
    ("temperature", (0, 0.0, 1, 100.0)),
    ("top_k", (-1, 0, 1, 10**9, 10**30)),
    ("top_p", (1, 1.0, 1e-9)),
    ("min_p", (0, 1, 0.5)),
    ("max_new_tokens", (None, 1, 10**9)),
    ("min_new_tokens", (0, 128)),
    ("stop", (None, "x", [], ["x"], ("x", "y"), ["x"] * 64)),
    ("stop_token_ids", (None, [], [0], (999,), [0] * 256)),
    ("seed", (None, 0, MAX_SEED)),
    ("n", (1, MAX_N)),
    ("ignore_eos", (True, False)),
    ("return_logprob", (True, False)),
    ("skip_special_tokens", (True, False)),
)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        SamplingParams(**{name: value}).verify(vocab_size=1000)
    assert caught.value.param == name
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, SapwoodError)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD for value in values])
def test_accepted(name: str, value: Any) -> None:
    SamplingParams(**{name: value}).verify(vocab_size=1000)


def test_every_field_is_tried() -> None:
    assert {name for name, _ in BAD} == {name for name, _ in GOOD} == set(SamplingParams.__struct_fields__)


def test_defaults() -> None:
    params = SamplingParams()
    params.verify()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, -1, 1.0, 0.0)
    assert (params.max_new_tokens, params.min_new_tokens, params.seed) == (128, 0, None)
    assert params.skip_special_tokens and not params.ignore_eos and not params.return_logprob


def test_min_new_tokens_without_a_maximum() -> None:
    SamplingParams(max_new_tokens=None, min_new_tokens=10**6).verify()


def test_stop_strings() -> None:
    assert SamplingParams().stop_strings() == []
    assert SamplingParams(stop="ab").stop_strings() == ["ab"]
    assert SamplingParams(stop=("a", "b")).stop_strings() == ["a", "b"]


def test_stop_token_ids_without_a_vocabulary() -> None:
    SamplingParams(stop_token_ids=[10**9]).verify()


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="temprature"):
        msgspec.convert({"temprature": 1.0}, SamplingParams)
    with pytest.raises(TypeError):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]


def test_outputs_travel_as_json() -> None:
    output = RequestOutput("r", "é", [1], FinishReason.STOP, Usage(1, 2, 3), matched_stop="x")
    data = msgspec.json.encode(output)
    assert msgspec.json.decode(data, type=RequestOutput) == output
    assert b'"finish_reason":"stop"' in data
