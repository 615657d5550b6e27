"""settings.py and flag_names.py: settings from a file, from the environment, under other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sapwood.config import EngineConfig, ServerConfig
from sapwood.errors import InvalidRequest
from sapwood.flag_names import ALIASES, IN_REQUESTS, NOT_HERE, NOT_NEEDED, advice
from sapwood.request import SamplingParams
from sapwood.settings import collect, describe, field_help


@pytest.mark.parametrize("struct", [EngineConfig, ServerConfig, SamplingParams])
def test_every_field_has_its_help(struct: type[msgspec.Struct]) -> None:
    found = field_help(struct)
    assert set(found) == set(struct.__struct_fields__)
    assert all(len(text) > 5 for _, text in found.values())
    if struct is not SamplingParams:
        assert found["page_size"] == ("Memory", "tokens a KV page; 16, 32 or 64 on CPU")


def from_file(tmp_path: Path, text: str | bytes, **environment: str) -> dict[str, Any]:
    file = tmp_path / "serve.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return collect(ServerConfig, {}, str(file), environment).values


def test_a_file(tmp_path: Path) -> None:
    text = """
        # a comment
        model: org/name
        port: 8000
        max-running-requests: "16"
        max_model_len: 4096
        log_requests: yes
        context_lenght: 1
    """
    with pytest.raises(
        InvalidRequest, match=r"serve.yaml:8: context-lenght is no setting; did you mean context_length"
    ):
        from_file(tmp_path, text)
    values = from_file(tmp_path, "\n".join(text.splitlines()[:-2]))
    assert values == {
        "model": "org/name",
        "port": 8000,
        "max_running_requests": 16,
        "context_length": 4096,
        "log_requests": True,
    }
    assert ServerConfig.from_kwargs(**values).port == 8000


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("# nothing", {}),
        ("served_model_name: no", {"served_model_name": "no"}),  # YAML 1.1 would make it False
        ("served_model_name: 010", {"served_model_name": "010"}),  # and this 8
        ("log_requests: off", {"log_requests": False}),
        ("context_length: null", {"context_length": None}),
        ("context_length: none", {"context_length": None}),
        ("allowed_origins: [http://a.org, http://b.org]", {"allowed_origins": ["http://a.org", "http://b.org"]}),
        ("allowed_origins:\n- http://a.org", {"allowed_origins": ["http://a.org"]}),
        ("enable_prefix_caching: false", {"disable_radix_cache": True}),
        ("api_key: 0123", {"api_key": "0123"}),
    ],
)
def test_values_in_a_file(tmp_path: Path, text: str, values: dict[str, Any]) -> None:
    assert from_file(tmp_path, text) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 1\nport: 2", "serve.yaml:2: port is set on line 1 already"),
        ("context_length: 1\nmax_model_len: 2", "are the same setting; leave one out"),
        ("port: [1]", "serve.yaml:1: port: expected an integer, got a list"),
        ("port: 1.5", "expected an integer, got '1.5'"),
        ("port: null", "expected an integer, got nothing"),
        ("port: {a: 1}", "settings are not nested"),
        ("- port", "expected lines like 'port: 8000', got a list"),
        ("port", "expected lines like 'port: 8000'"),
        ("port: 1: 2", "serve.yaml:1: not valid YAML"),
        ("port: !!python/object:os.system 1", "mean nothing here"),
        ("prot: 1", "serve.yaml:1: prot is no setting; did you mean port?"),
        ("tensor_parallel_size: 2", "is no setting: one server uses one device"),
        ("log_requests: perhaps", "expected true or false, got 'perhaps'"),
        ("enable_metrics: false", "cannot be switched off: /metrics is always there"),
        (b"host: \xff", "is not valid UTF-8"),
        ("[" * 100_000, "serve.yaml"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        from_file(tmp_path, text)
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            collect(ServerConfig, {}, str(path), {})
    (tmp_path / "big.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(InvalidRequest, match="larger than"):
        collect(ServerConfig, {}, str(tmp_path / "big.yaml"), {})


def test_the_environment(tmp_path: Path) -> None:
    environment = {
        "SAPWOOD_PORT": "8000",
        "SAPWOOD_LOG_REQUESTS": "1",
        "SAPWOOD_MAX_MODEL_LEN": "64",
        "SAPWOOD_API_KEY": "secret",
        "SAPWOOD_DATA": "/data",  # the tests'
        "SAPWOOD_BUILD_CUDA": "off",
        "SAPWOOD_SERVICE_HOST": "10.0.0.1",  # Kubernetes'
        "SAPWOOD_PROT": "1",
        "OTHER": "x",
    }
    found = collect(ServerConfig, {}, None, environment)
    assert found.values == {"port": 8000, "log_requests": True, "context_length": 64, "api_key": "secret"}
    assert found.notes == ["SAPWOOD_PROT is no setting and is ignored; did you mean SAPWOOD_PORT?"]
    file = tmp_path / "a.yaml"
    file.write_text("host: a\nport: 1")
    named = collect(ServerConfig, {}, None, {"SAPWOOD_CONFIG": str(file), "SAPWOOD_PORT": "2"})
    assert named.values == {"host": "a", "port": 2}
    flagged = collect(ServerConfig, {"port": 3}, str(file), {"SAPWOOD_PORT": "2", "SAPWOOD_HOST": "b"})
    assert flagged.values == {"host": "b", "port": 3}
    assert flagged.origins == {"host": "SAPWOOD_HOST"}
    for text in ("maybe", "", "2"):
        with pytest.raises(InvalidRequest, match=r"SAPWOOD_LOG_REQUESTS: expected true or false"):
            collect(ServerConfig, {}, None, {"SAPWOOD_LOG_REQUESTS": text})


def test_kubernetes_port_is_no_port() -> None:
    found = collect(ServerConfig, {}, None, {"SAPWOOD_PORT": "tcp://10.0.0.1:80"})
    assert found.values == {} and "comes from Kubernetes" in found.notes[0]


def test_one_file_serves_an_engine_too(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("port: 1\npage_size: 32")
    assert collect(EngineConfig, {}, str(file), {}).values == {"page_size": 32}


def test_names_of_others_lead_somewhere() -> None:
    """Every alias is of a setting, no name has two meanings, and no pattern hides a setting of ours."""
    settings = {setting.name: setting for setting in describe(ServerConfig)}
    for name, alias in ALIASES.items():
        assert name not in settings and name not in NOT_NEEDED
        assert not alias.inverted or settings[alias.field].kind == "switch"
    for name in (*settings, *ALIASES, *NOT_NEEDED):
        assert advice(name) is None, name
    for instead, patterns in (*NOT_HERE, *IN_REQUESTS):
        assert patterns.split() and instead
    assert "one device" in (advice("tensor_parallel_size") or "")
    assert advice("zzz") is None
    assert advice("temperature", in_requests=False) is None
