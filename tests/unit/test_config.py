"""config.py: what verify() and from_kwargs() refuse, and that the message helps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from sapwood.config import EngineConfig
from sapwood.errors import InvalidRequest

BAD = (
    ("context_length", (0, -1, "x", 10**20)),
    ("max_total_tokens", (0, -5, 10**18)),
    ("mem_fraction_static", (0, 1, 1.5, -0.1, "x", math.nan)),
    ("page_size", (0, 65, -1, 16.5)),
    ("max_running_requests", (0, -1, 10**10)),
    ("max_queued_requests", (-1, 10**20)),
    ("chunked_prefill_size", (0, -1, 2**40)),
    ("num_threads", (0, -1, 10**6)),
    ("request_timeout_s", (0, -0.5, math.nan, math.inf, 1e300)),
    ("priority_ageing_s", (0, -1, math.nan, math.inf)),
    ("max_step_ms", (math.nan, math.inf, -math.inf)),
    ("trace_capacity", (-1, 10**8)),
    ("schedule_policy", ("best", 1)),
    ("prefix_cache", ("tree",)),
    ("dtype", ("int4", "float16")),
    ("device", ("tpu",)),
    ("load_format", ("gguf",)),
    ("cpu_isa", ("avx10",)),
    ("disable_radix_cache", ("yes", 1)),
)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}"):
        EngineConfig.from_kwargs("m", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context_length", None),
        ("context_length", 1),
        ("max_total_tokens", 1),
        ("mem_fraction_static", 0.999),
        ("page_size", 1),
        ("page_size", 64),
        ("max_running_requests", 1),
        ("max_queued_requests", 0),
        ("max_queued_requests", None),
        ("num_threads", None),
        ("max_step_ms", -1),
        ("max_step_ms", 0.5),
        ("request_timeout_s", None),
        ("trace_capacity", 0),
        ("random_seed", 0),
    ],
)
def test_accepted(name: str, value: Any) -> None:
    assert getattr(EngineConfig.from_kwargs("m", **{name: value}), name) == value


def test_unknown_settings_name_the_nearest() -> None:
    with pytest.raises(
        InvalidRequest, match=r"unknown engine setting 'page_sise'; did you mean 'page_size'\?"
    ) as caught:
        EngineConfig.from_kwargs("m", page_sise=16)
    assert caught.value.param == "page_sise"
    with pytest.raises(InvalidRequest, match="unknown engine setting 'zzzzzz'$"):
        EngineConfig.from_kwargs("m", zzzzzz=1)


def test_the_range_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"num_threads must be 1\.\.1024, got 1000000$") as caught:
        EngineConfig.from_kwargs("m", num_threads=10**6)
    assert caught.value.param == "num_threads"
    with pytest.raises(InvalidRequest, match=r"mem_fraction_static must be in \(0, 1\), got nan$"):
        EngineConfig.from_kwargs("m", mem_fraction_static=math.nan)


def test_a_path_is_a_model(tmp_path: Path) -> None:
    assert EngineConfig.from_kwargs(tmp_path).model == str(tmp_path)  # type: ignore[arg-type]


def test_defaults_are_valid() -> None:
    config = EngineConfig(model="m")
    config.verify()
    assert EngineConfig.from_kwargs("m") == config


def test_every_field_is_documented() -> None:
    lines = {line.split()[0] for line in (EngineConfig.__doc__ or "").splitlines() if line.strip()}
    assert set(EngineConfig.__struct_fields__) <= lines
