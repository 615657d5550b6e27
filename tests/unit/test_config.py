"""config.py: what verify() and from_kwargs() refuse, and that the message helps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from sapwood.config import EngineConfig, ServerConfig
from sapwood.errors import InvalidRequest

BAD = (
    ("context_length", (0, -1, "x", 10**20)),
    ("max_total_tokens", (0, -5, 10**18)),
    ("mem_fraction_static", (0, 1, 1.5, -0.1, "x", math.nan)),
    ("page_size", (0, 65, -1, 16.5)),
    ("kv_cache_dtype", ("fp8", "int4", 8)),
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
        ("kv_cache_dtype", "int8"),
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


SERVER_BAD = (
    ("port", (-1, 65536, "x", 1.5)),
    ("host", ("", 5)),
    ("uds", ("",)),
    ("api_key", ("", "a b", "ключ", "a\n")),
    ("max_body_bytes", (0, -1)),
    ("max_connections", (0,)),
    ("header_timeout_s", (0, -1, math.nan, math.inf)),
    ("body_timeout_s", (0,)),
    ("send_timeout_s", (0,)),
    ("drain_timeout_s", (-1, math.nan, math.inf)),
    ("watchdog_timeout", (0,)),
    ("log_level", ("loud",)),
    ("allowed_origins", (["example.org"], ["https://a.org/path"], "x")),
)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in SERVER_BAD for value in values])
def test_refused_of_a_server(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name):
        ServerConfig.from_kwargs(**{name: value})


def test_edges_of_a_server() -> None:
    ServerConfig.from_kwargs(admin_api_key="a", drain_timeout_s=0, port=0, allowed_origins=["*"], max_connections=None)


def test_secrets_are_not_shown() -> None:
    config = ServerConfig.from_kwargs("org/name", api_key="s3cret", admin_api_key="t0psecret")
    assert "s3cret" not in repr(config) and "t0psecret" not in repr(config)
    shown = config.public_settings()
    assert shown["api_key"] is True and shown["admin_api_key"] is True and shown["model"] == "org/name"
    assert set(config.engine_settings()) == set(EngineConfig.__struct_fields__) - {"model"}
    assert EngineConfig.from_kwargs(config.model, **config.engine_settings()).model == "org/name"


@pytest.mark.parametrize(
    ("model", "name"),
    [("sapling", "sapling"), ("org/name", "name"), ("/a/b/", "b"), ("/a/b", "b"), ("./x", "x")],
)
def test_the_models_name_in_the_api(model: str, name: str) -> None:
    assert ServerConfig.from_kwargs(model).model_name() == name
    assert ServerConfig.from_kwargs(model, served_model_name="own").model_name() == "own"
