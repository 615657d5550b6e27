"""What the loader hands over and what it refuses, on a model of random weights made from config.json alone."""

from __future__ import annotations

import json
import select
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.errors import InvalidRequest, UnsupportedModel
from sapwood.memory import sizing
from sapwood.models import loader
from sapwood.models.loader import LoadedModel, load
from sapwood.program import native

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "eos_token_id": 7, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def settings(model_dir: Path, **changes: Any) -> EngineConfig:
    defaults: dict[str, Any] = {
        "load_format": "dummy",
        "max_total_tokens": 512,
        "max_running_requests": 4,
        "num_threads": 1,
    }
    return EngineConfig.from_kwargs(str(model_dir), **{**defaults, **changes})


def loaded(model_dir: Path, **changes: Any) -> LoadedModel:
    model = load(settings(model_dir, **changes))
    model.executor.shutdown()
    return model


def test_what_a_loaded_model_says(model_dir: Path) -> None:
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [9, 7], "temperature": 0.6, "top_k": 20}')
    seen: list[tuple[int, int]] = []
    model = load(settings(model_dir, chunked_prefill_size=64), lambda done, total: seen.append((done, total)))
    model.executor.shutdown()
    assert (model.vocab_size, model.context_len, model.dtype, model.name) == (100, 256, "bfloat16", "tiny-model")
    assert model.eos_token_ids == (7, 9) and model.generation_defaults == {"temperature": 0.6, "top_k": 20}
    assert (model.max_step_tokens, model.max_rows, model.num_pages) == (68, 4, [32])
    assert model.model_dir == model_dir and model.rope_mode(10**6) == 0
    assert isinstance(model.runner, _core.CpuRunner)
    assert seen[-1][0] == seen[-1][1] > 0
    # K and V, 16 tokens, 2 heads of 8 padded to 16, bfloat16, 2 layers
    assert model.groups[0].page_bytes == 2 * 16 * 2 * 16 * 2 * 2
    assert model.runner.kv_bytes == 32 * model.groups[0].page_bytes


def test_settings_change_the_model(model_dir: Path) -> None:
    assert loaded(model_dir, context_length=100).context_len == 100
    assert loaded(model_dir, dtype="float32").dtype == "float32"
    assert loaded(model_dir, page_size=64).groups[0].page_size == 64
    for isa in _core.isa_levels():
        assert loaded(model_dir, cpu_isa=isa).runner.isa == isa


def test_isa_override(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPWOOD_CPU_ISA", "scalar")
    assert loaded(model_dir).runner.isa == "scalar"
    monkeypatch.setenv("SAPWOOD_CPU_ISA", "avx9")
    with pytest.raises(
        InvalidRequest, match="SAPWOOD_CPU_ISA 'avx9' is not available here; this machine and build have: scalar"
    ):
        load(settings(model_dir))
    assert loaded(model_dir, cpu_isa="scalar").runner.isa == "scalar"  # a setting is stronger than the variable


def test_cache_salt_tells_models_apart(model_dir: Path) -> None:
    first = loaded(model_dir).cache_salt
    assert 0 <= first < 2**64
    assert loaded(model_dir, page_size=32).cache_salt == first
    assert loaded(model_dir, dtype="float32").cache_salt != first
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 5e5}))
    assert loaded(model_dir).cache_salt != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 8}, "page_size must be 16, 32 or 64"),
        ({"load_format": "auto"}, "holds no \\*.safetensors"),
    ],
)
def test_refusals(model_dir: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        load(settings(model_dir, **changes))


def test_unsupported_checkpoints(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float8_e4m3fn"}))
    with pytest.raises(UnsupportedModel, match="float8_e4m3fn"):
        load(settings(model_dir))
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["BertModel"]}))
    with pytest.raises(UnsupportedModel, match="'BertModel' is not supported; supported: Llama"):
        load(settings(model_dir))
    with pytest.raises(InvalidRequest, match="config.json not found"):
        load(settings(tmp_path))


def test_a_context_that_was_asked_for_must_fit(model_dir: Path) -> None:
    config = settings(model_dir, max_total_tokens=None, mem_fraction_static=1e-6, context_length=200_000)
    with pytest.raises(InvalidRequest, match=r"context_length=200000 tokens needs .* MiB of KV.*room for \d+ tokens"):
        load(config)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_model_larger_than_the_memory_is_refused(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    if device == "reference":
        pytest.importorskip("torch")
    monkeypatch.setattr(sizing, "free_memory_bytes", lambda: 10_000)
    with pytest.raises(
        InvalidRequest, match=r"weights in bfloat16 need 0\.\d MiB, but 0\.0 MiB of memory are free; load"
    ):
        load(settings(model_dir, device=device))


def test_a_pool_larger_than_the_memory_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "free_memory_bytes", lambda: 2**20)
    with pytest.raises(InvalidRequest, match=r"max_total_tokens=100000 needs .* MiB of KV, but 1\.0 MiB of memory"):
        load(settings(model_dir, max_total_tokens=100_000))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_that_are_checked_are_those_the_store_takes(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Odd shapes: panels that are not full, an odd number of columns, biases."""
    odd = {"hidden_size": 33, "intermediate_size": 37, "attention_bias": True, "vocab_size": 101, "head_dim": 6}
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, **odd, "tie_word_embeddings": False}))
    stores: list[tuple[int, int]] = []
    fill = loader.fill_store

    def spied(program: Any, store: Any, *args: Any, **how: Any) -> None:
        fill(program, store, *args, **how)
        stores.append((store.total_bytes, native.weight_bytes(program)))

    monkeypatch.setattr(loader, "fill_store", spied)
    loaded(model_dir, dtype=dtype)
    ((taken, counted),) = stores
    assert taken == counted > 0


def test_a_request_as_long_as_the_pool_runs(model_dir: Path) -> None:
    """The rope tables reach as far as the pool, not as the context: its last position still has angles."""
    model = load(settings(model_dir, max_total_tokens=50))
    assert (model.context_len, model.num_pages) == (256, [4])
    cache = _core.CacheManager(model.groups, model.num_pages)
    builder = _core.BatchBuilder(cache, model.max_rows)
    builder.admit(0, np.arange(3, 67, dtype=np.int32), prompt_len=64, max_len=65, temperature=0.0)
    builder.begin_step(0)
    assert builder.add_extend(0, 64) == 64
    model.executor.submit(builder.end_step().plan)
    model.executor.wait_idle()
    results = [payload for kind, _, payload in model.executor.drain() if kind == "result"]
    assert [(r.error, r.num_tokens) for r in results] == [("", 64)]
    model.executor.shutdown()


def test_all_devices_have_the_same_executor(model_dir: Path) -> None:
    """submit, drain, fileno, wait_idle, queued, take_trace, shutdown: native and reference alike."""
    pytest.importorskip("torch")
    for device in ("cpu", "reference"):
        model = load(settings(model_dir, device=device, trace_capacity=4))
        executor = model.executor
        cache = _core.CacheManager(model.groups, model.num_pages)
        builder = _core.BatchBuilder(cache, model.max_rows)
        builder.admit(0, np.arange(3, 23, dtype=np.int32), prompt_len=20, max_len=22, temperature=0.0)
        assert executor.drain() == [] and executor.queued == 0
        assert select.select([executor.fileno()], [], [], 0)[0] == []
        builder.begin_step(5)
        builder.add_extend(0, 20)
        plan = builder.end_step().plan
        executor.submit(plan)
        executor.wait_idle()
        assert executor.queued == 0
        assert select.select([executor.fileno()], [], [], 5)[0] != []
        events = executor.drain()
        assert [(kind, step) for kind, step, _ in events] == [("head", 5), ("result", 5)]
        assert select.select([executor.fileno()], [], [], 0)[0] == []
        assert events[1][2].error == "" and events[1][2].num_tokens == 20
        with pytest.raises(ValueError):
            executor.submit(plan)  # step ids must grow
        (trace,) = executor.take_trace()
        assert (trace.step_id, trace.num_extend_items, trace.num_decode_items) == (5, 1, 0)
        assert 0 < trace.submit_ns <= trace.start_ns <= trace.head_ns <= trace.done_ns
        assert executor.take_trace() == []
        executor.shutdown()
        executor.shutdown()


def test_a_failed_step_is_reported_by_the_reference(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    model = load(settings(model_dir, device="reference"))

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(model.runner, "run", broken)
    cache = _core.CacheManager(model.groups, model.num_pages)
    builder = _core.BatchBuilder(cache, model.max_rows)
    builder.admit(0, np.arange(3, 23, dtype=np.int32), prompt_len=20, max_len=22)
    builder.begin_step(1)
    builder.add_extend(0, 20)
    model.executor.submit(builder.end_step().plan)
    model.executor.wait_idle()
    ((_, _, result),) = model.executor.drain()
    assert result.error == "RuntimeError: out of luck"
    assert builder.commit(result)[0] == []  # the builder takes it as any other result
    model.executor.shutdown()
