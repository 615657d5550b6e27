"""The reference executor against transformers, and the native executor against the reference, node by node."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_checkpoints import Built, hf_logits, log_softmax, prompts_of
from golden_driver import Driver

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.models.loader import load
from sapwood.models.weights import Checkpoint, slot_array
from sapwood.program.plan_executor import PreparedBatch
from sapwood.program.reference import ReferenceModel, compare, native_outputs

LENGTH = 90
INT8_FLIPS = 8e-3


def reference_of(
    built: Built, driver: Driver, dtype: torch.dtype = torch.float64, *, int8_kv: bool = False
) -> ReferenceModel:
    program = driver.model.program
    checkpoint = Checkpoint.open(built.f32_dir)
    pages = [16] * len(program.groups)
    return ReferenceModel(
        program, lambda slot: slot_array(slot, checkpoint, program.act), pages, 16, dtype=dtype, int8_kv=int8_kv
    )


def test_reference_in_float64_is_transformers(built: Built) -> None:
    """The forward alone: no row table, no executor."""
    tokens = prompts_of(4)[0]
    with Driver(built.f32_dir, dtype="float32") as driver:
        model = reference_of(built, driver)
        mode = driver.model.rope_mode(len(tokens))
    batch = PreparedBatch.solo(tokens, num_groups=len(model.program.groups), rope_mode=mode)
    expected = log_softmax(hf_logits(built.f32, tokens))
    assert np.abs(log_softmax(model.run(batch)) - expected).max() < 1e-4


def test_reference_does_not_depend_on_chunks(built: Built) -> None:
    tokens = prompts_of(5)[0]
    with Driver(built.f32_dir, dtype="float32") as driver:
        whole, chunked = reference_of(built, driver), reference_of(built, driver)
        mode = driver.model.rope_mode(len(tokens))
    groups = len(whole.program.groups)
    expected = whole.run(PreparedBatch.solo(tokens, num_groups=groups, rope_mode=mode))
    parts = [
        chunked.run(PreparedBatch.solo(tokens[at : at + 19], num_groups=groups, past=at, rope_mode=mode))
        for at in range(0, LENGTH, 19)
    ]
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-5)


# With int8 a number of K or V that lies between two whole multiples may go one way here and the other way there.
@pytest.mark.parametrize(("kv", "rtol"), [("auto", 3e-5), ("int8", INT8_FLIPS)])
def test_native_agrees_with_reference_node_by_node(built: Built, kv: str, rtol: float) -> None:
    """Every node's output of a prefill step, native float32 against reference float64."""
    tokens = prompts_of(6)[0]
    settings = {"dtype": "float32", "max_total_tokens": 512, "max_running_requests": 2, "skip_tokenizer_init": True}
    settings["kv_cache_dtype"] = kv
    config = EngineConfig.from_kwargs(str(built.f32_dir), **settings)
    model = load(config, debug=True)
    try:
        cache = _core.CacheManager(model.groups, model.num_pages)
        builder = _core.BatchBuilder(cache, model.max_rows)
        mode = model.rope_mode(LENGTH)
        row, _, _ = builder.admit(
            0, np.asarray(tokens, np.int32), prompt_len=LENGTH, max_len=LENGTH + 1, temperature=0.0, rope_mode=mode
        )
        builder.begin_step(1)
        builder.add_extend(row, LENGTH)
        model.executor.submit(builder.end_step().plan)
        model.executor.wait_idle()
        got = native_outputs(model.program, model.runner.dump)
        checkpoint = Checkpoint.open(built.f32_dir)
        reference = ReferenceModel(
            model.program,
            lambda slot: slot_array(slot, checkpoint, "float32"),
            model.num_pages,
            16,
            dtype=torch.float64,
            int8_kv=kv == "int8",
        )
        expected: dict[str, np.ndarray] = {}
        batch = PreparedBatch.solo(tokens, num_groups=len(model.groups), rope_mode=mode, all_logits=False)
        reference.run(batch, keep=expected)
        assert expected.keys() == got.keys()
        assert compare(expected, got, rtol=rtol) == []
    finally:
        model.executor.shutdown()


def test_int8_kv_is_the_references_int8_kv(built: Built) -> None:
    """Prompts and decodes mixed, with int8 pages, against the float64 model that rounds its K and V so; the one that
    does not is many times further away.
    """
    prompts = prompts_of(8)
    with Driver(built.f32_dir, dtype="float32", kv_cache_dtype="int8") as driver:
        results = driver.generate(prompts, 24, chunk=17)
        rounds, exact = (reference_of(built, driver, int8_kv=int8) for int8 in (True, False))
        modes = [driver.model.rope_mode(len(prompt) + 24) for prompt in prompts]
    errors = []
    for model in (rounds, exact):
        square = count = 0.0
        for prompt, result, mode in zip(prompts, results, modes, strict=True):
            batch = PreparedBatch.solo(
                prompt + result.tokens[:-1], num_groups=len(model.program.groups), rope_mode=mode
            )
            expected = log_softmax(model.run(batch)[len(prompt) - 1 :])
            assert result.logits is not None
            square += float(np.square(log_softmax(result.logits) - expected).sum())
            count += expected.size
        errors.append((square / count) ** 0.5)
    assert errors[0] < 0.1 * errors[1]


def test_compare_names_the_first_node_that_differs() -> None:
    good = {"a": np.ones((2, 3)), "b": np.ones((2, 3)), "c": np.ones((2, 3))}
    bad = {name: array.copy() for name, array in good.items()}
    bad["b"][1, 2] = 1.5
    bad["c"][0, 0] = np.nan
    diffs = compare(good, bad, atol=1e-6)
    assert [d.node for d in diffs] == ["b", "c"]
    assert diffs[0].at == (1, 2) and diffs[0].max_abs == pytest.approx(0.5)
    assert "b: |diff| 0.5" in str(diffs[0])


def test_reference_executor_draws_transformers_tokens(built: Built) -> None:
    """Through rows, pages and sampling: device "reference" with a page size no native kernel takes."""
    prompts = prompts_of(7)
    with Driver(built.f32_dir, dtype="float32", device="reference", page_size=8) as driver:
        results = driver.generate(prompts, 12, chunk=7)
    for prompt, result in zip(prompts, results, strict=True):
        expected = hf_logits(built.f32, prompt + result.tokens)[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(expected.argmax(-1), result.tokens)
