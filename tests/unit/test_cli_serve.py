"""`sapwood serve`: its help, every flag, the names of other engines, and the messages people meet first; with a server
that only says what it was given.
"""

from __future__ import annotations

import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sapwood import _core, cli
from sapwood.config import BUNDLED_MODEL, INT_RANGES, EngineConfig, ServerConfig
from sapwood.errors import InvalidRequest
from sapwood.flag_names import ALIASES, IN_REQUESTS, NOT_HERE, NOT_NEEDED
from sapwood.memory.sizing import size_pool
from sapwood.models import hub, registry
from sapwood.settings import Setting, describe


class FakeServer:
    """Keeps the configurations it was started with; raises `fails`, else its exit code is 7."""

    def __init__(self) -> None:
        self.configs: list[ServerConfig] = []
        self.fails: Exception | None = None

    def serve(self, config: ServerConfig) -> int:
        if self.fails is not None:
            raise self.fails
        self.configs.append(config)
        return 7


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    for name in [name for name in os.environ if name.startswith("SAPWOOD_")]:
        monkeypatch.delenv(name)
    fake = FakeServer()
    module = types.ModuleType("sapwood.server.run")
    module.serve = fake.serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sapwood.server.run", module)
    return fake


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    headings = [line.rstrip(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["options", "model", "memory", "scheduling", "executor", "server", "access", "limits"]
    # Every setting once, under the heading that its docstring has; other engines' names in the last lines only.
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    assert sorted(shown) == sorted(["--config", *(cli._flag(name) for name in ServerConfig.__struct_fields__)])
    assert out.index("memory:") < out.index("  --page-size") < out.index("scheduling:")
    assert out.index("server:") < out.index("  --port N") < out.index("access:")
    text = " ".join(out.split())
    assert "--port N port to listen on; 0 = any free one (default: 30000)" in text
    assert "none = sized from free memory by --mem-fraction-static" in text and "None" not in text
    assert "--max-model-len is --context-length" in text
    assert "--enable-prefix-caching is --no-disable-radix-cache" in text
    choices = [choice for setting in describe(ServerConfig) for choice in setting.choices]
    assert len(choices) > 15 and all(f'"{choice}"' in text for choice in choices)


def other_value(setting: Setting) -> tuple[list[str], Any]:
    """A value that is not the setting's default: the arguments that say it, and what must arrive."""
    flag = cli._flag(setting.name)
    match setting.kind:
        case "switch":
            return [cli._flag(setting.name, not setting.default)], not setting.default
        case "choice":
            choice = next(choice for choice in setting.choices if choice != setting.default)
            return [flag, choice], choice
        case "list":
            return [flag, "https://a.example", flag, "*"], ["https://a.example", "*"]
        case "int":
            number = INT_RANGES.get(setting.name, (0, 0))[0] + 7
            return [flag, str(number)], number
        case "float":
            return [flag, "0.25"], 0.25
    return [flag, "abc"], "abc"


@pytest.mark.parametrize("setting", describe(ServerConfig), ids=lambda setting: setting.name)
def test_every_setting_is_a_flag_and_arrives(server: FakeServer, setting: Setting) -> None:
    arguments, value = other_value(setting)
    assert value != getattr(ServerConfig(), setting.name)
    assert cli.main(["serve", *arguments]) == 7  # the server's own exit code
    assert server.configs == [msgspec.structs.replace(ServerConfig(), **{setting.name: value})]


def test_the_last_flag_counts_and_none_is_none(server: FakeServer) -> None:
    arguments = ["--log-requests", "--no-log-requests", "--page-size", "16", "--block-size", "32"]
    assert cli.main(["serve", "--max-connections", "none", *arguments]) == 7
    assert server.configs == [ServerConfig(max_connections=None, page_size=32)]


# name -> (arguments, what they set)
OTHER_NAMES = {
    "model_path": (["--model-path", "m"], {"model": "m"}),
    "tokenizer_path": (["--tokenizer-path", "t"], {"tokenizer": "t"}),
    "max_model_len": (["--max-model-len", "64"], {"context_length": 64}),
    "max_num_seqs": (["--max-num-seqs", "3"], {"max_running_requests": 3}),
    "max_num_batched_tokens": (["--max-num-batched-tokens", "128"], {"chunked_prefill_size": 128}),
    "enforce_eager": (["--enforce-eager"], {"disable_cuda_graph": True}),
    "block_size": (["--block-size", "32"], {"page_size": 32}),
    "seed": (["--seed", "5"], {"random_seed": 5}),
    "scheduling_policy": (["--scheduling-policy", "priority"], {"schedule_policy": "priority"}),
    "enable_prefix_caching": (["--no-enable-prefix-caching"], {"disable_radix_cache": True}),
    "async_scheduling": (["--no-async-scheduling"], {"disable_overlap_schedule": True}),
    "enable_log_requests": (["--enable-log-requests"], {"log_requests": True}),
    "disable_log_requests": (["--log-requests", "--disable-log-requests"], {"log_requests": False}),
    "shutdown_timeout": (["--shutdown-timeout", "0"], {"drain_timeout_s": 0.0}),
    "threads": (["--threads", "2"], {"num_threads": 2}),
    "parallel": (["--parallel", "4"], {"max_running_requests": 4}),
    "alias": (["--alias", "name"], {"served_model_name": "name"}),
}


@pytest.mark.parametrize("name", ALIASES)
def test_other_engines_names(server: FakeServer, name: str) -> None:
    arguments, settings = OTHER_NAMES[name]
    assert cli.main(["serve", *arguments]) == 7
    assert server.configs == [msgspec.structs.replace(ServerConfig(), **settings)]


def test_prefix_caching_can_be_asked_for(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPWOOD_DISABLE_RADIX_CACHE", "1")
    assert cli.main(["serve", "--enable-prefix-caching"]) == 7
    monkeypatch.setenv("SAPWOOD_DISABLE_RADIX_CACHE", "0")
    assert cli.main(["serve"]) == 7
    monkeypatch.delenv("SAPWOOD_DISABLE_RADIX_CACHE")
    monkeypatch.setenv("SAPWOOD_NO_ENABLE_PREFIX_CACHING", "on")
    assert cli.main(["serve"]) == 7
    assert [config.disable_radix_cache for config in server.configs] == [False, False, True]


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_what_is_always_so(server: FakeServer, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main(["serve", cli._flag(name)]) == 7
    assert server.configs == [ServerConfig()]
    assert capsys.readouterr() == ("", f"sapwood: note: {cli._flag(name)} is not needed: {NOT_NEEDED[name]}\n")
    assert cli.main(["serve", cli._flag(name, False)]) == 2
    assert capsys.readouterr().err == f"sapwood: error: {cli._flag(name, False)} is not possible: {NOT_NEEDED[name]}\n"


def test_advice_names_only_flags_that_exist() -> None:
    flags = {cli._flag(name) for name in (*ServerConfig.__struct_fields__, "config")}
    texts = (*(instead for instead, _ in (*NOT_HERE, *IN_REQUESTS)), *NOT_NEEDED.values())
    named = {flag for text in texts for flag in re.findall(r"--[a-z-]+", text)}
    assert len(named) > 10 and named <= flags
    patterns = [pattern for _, line in (*NOT_HERE, *IN_REQUESTS) for pattern in line.split()]
    assert len(patterns) == len(set(patterns))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-modellen", "1"], "unknown option '--max-modellen'; did you mean --max-model-len?"),
        (["--zzzzzz"], "unknown option '--zzzzzz'; see sapwood serve --help"),
        (["--port"], "argument --port: expected one argument"),
        (["--max-model-len", "32k"], "argument --max-model-len: expected an integer or none, got '32k'"),
        (["--send-timeout-s", "0"], "--send-timeout-s must be in (0, 1e+09), got 0.0"),
        (["--drain-timeout-s", "-1"], "--drain-timeout-s must be >= 0, got -1.0"),
        (["--log-requests=yes"], "--log-requests takes no value"),
        (["-tp", "2"], "sapwood has no -tp: one server uses one device"),
        (["-hf", "org/model"], "sapwood has no -hf: name the model as the argument"),  # not -h
        (["--cache-type-k", "q8_0"], "sapwood has no --cache-type-k: --kv-cache-dtype int8 halves the KV cache"),
    ],
)
def test_usage_errors(
    server: FakeServer, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["serve", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sapwood: error: ") and err.count("\n") == 1 and message in err
    assert server.configs == []


def error_of(call: Callable[..., Any], *arguments: Any, **settings: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        call(*arguments, **settings)
    return caught.value


def message(server: FakeServer, capsys: pytest.CaptureFixture[str], error: InvalidRequest) -> str:
    """What is printed where starting the engine raises `error`."""
    server.fails = error
    assert cli.main(["serve", "m"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1
    return err.strip().removeprefix("sapwood: error: ")


def test_too_little_memory_names_the_numbers_and_the_flag(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = [_core.KvGroup(page_size=16, page_bytes=2**20)]
    config = EngineConfig(model="m", max_total_tokens=1600)
    assert message(server, capsys, error_of(size_pool, config, groups, context_len=64, free_bytes=10 * 2**20)) == (
        "--max-total-tokens=1600 needs 100.0 MiB of KV, but 10.0 MiB of memory are free; lower --max-total-tokens, or "
        "leave it out to have the pool sized by what is free"
    )
    config = EngineConfig(model="m", mem_fraction_static=0.25)
    assert message(server, capsys, error_of(size_pool, config, groups, context_len=64, free_bytes=4 * 2**20)) == (
        "the KV pool needs at least 2 pages (2.0 MiB), but --mem-fraction-static=0.25 of 4.0 MiB free memory is "
        "1.0 MiB; raise --mem-fraction-static, or free memory"
    )


def test_an_unsupported_model_names_what_is_supported(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    text = message(server, capsys, error_of(registry.resolve, "GPT2LMHeadModel"))
    assert text.startswith("architecture 'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM, ")


def test_only_settings_become_flags(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    error = InvalidRequest("no /x/page_size or my_page_size or page_size/; page_size is page_size='a'. model, port")
    assert message(server, capsys, error) == (
        "no /x/page_size or my_page_size or page_size/; --page-size is --page-size='a'. model, port"
    )


def test_an_error_while_serving_names_the_source_of_the_setting(
    server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("\ncontext_length: 5\n")
    server.fails = InvalidRequest("too long", "context_length")
    assert cli.main(["serve", "--config", str(file)]) == 2
    assert capsys.readouterr().err == f"sapwood: error: too long (from {file}:2: context-length)\n"
    monkeypatch.setenv("SAPWOOD_MAX_MODEL_LEN", "6")
    server.fails = InvalidRequest("too long", "context_length")
    assert cli.main(["serve", "--config", str(file)]) == 2
    assert capsys.readouterr().err == "sapwood: error: too long (from SAPWOOD_MAX_MODEL_LEN)\n"
    server.fails = InvalidRequest("too long", "context_length")
    assert cli.main(["serve", "--config", str(file), "--context-length", "7"]) == 2
    assert capsys.readouterr().err == "sapwood: error: too long\n"


def test_the_bundled_model_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sapwood import sapling

    monkeypatch.chdir(tmp_path)
    assert sapling.NAME == BUNDLED_MODEL
    monkeypatch.setattr(sapling, "MODEL_DIR", tmp_path / "model")
    with pytest.raises(InvalidRequest, match="'sapling' is not part of this installation"):
        hub.resolve_model_dir("sapling")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "sapling").write_text("a file is no model")
    assert hub.resolve_model_dir("sapling") == tmp_path / "model"
    (tmp_path / "sapling").unlink()
    (tmp_path / "sapling").mkdir()
    assert hub.resolve_model_dir("sapling") == Path("sapling")  # one's own directory comes first


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("/models/llama", "llama"),
        ("/models/llama/", "llama"),
        ("./llama", "llama"),
        (".", "here"),
        ("sub/..", "here"),
        ("/", "/"),
    ],
)
def test_the_served_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, name: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert ServerConfig(model=model).model_name() == name
    assert ServerConfig(model=model, served_model_name="mine").model_name() == "mine"
