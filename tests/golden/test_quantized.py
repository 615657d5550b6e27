"""Quantised weights: the native executor against the reference, which has the same quantised weights in float64, and
against the model as it was.
"""

from __future__ import annotations

import numpy as np
import pytest
from golden_checkpoints import Built, hf_logits, log_softmax, prompts_of
from golden_driver import Driver

from sapwood.models.weights import Checkpoint, slot_array
from sapwood.program.plan_executor import PreparedBatch
from sapwood.program.reference import ReferenceModel

FORMATS = ("int8", "int4")


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_the_reference_s(built: Built, quantization: str, dtype: str) -> None:
    """As a share of the logits' spread. What differs is where an activation falls between two of its
    256 steps. In bfloat16 attention's input and output are rounded besides.
    """
    import torch

    tokens = prompts_of(4)[0]
    with Driver(built.f32_dir, dtype=dtype, quantization=quantization) as driver:
        program = driver.model.program
        got = driver.generate([tokens], 1)[0]
        mode = driver.model.rope_mode(len(tokens) + 1)
    checkpoint = Checkpoint.open(built.f32_dir)
    reference = ReferenceModel(
        program, lambda slot: slot_array(slot, checkpoint, program.act), [16] * len(program.groups), 16,
        dtype=torch.float64,
    )  # fmt: skip
    batch = PreparedBatch.solo(tokens, num_groups=len(program.groups), rope_mode=mode, all_logits=False)
    want = reference.run(batch)[0]
    assert got.logits is not None
    error = np.sqrt(np.mean((got.logits[0] - want) ** 2)) / want.std()
    assert error < (0.03 if dtype == "float32" else 0.15)


@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.2), ("int4", 1.2)])
def test_near_the_model_as_it_was(built: Built, quantization: str, bound: float) -> None:
    tokens = prompts_of(5)[0]
    with Driver(built.f32_dir, dtype="float32", quantization=quantization) as driver:
        got = driver.generate([tokens], 1)[0]
    assert got.logits is not None
    want = log_softmax(hf_logits(built.f32, tokens))[-1]
    error = np.sqrt(np.mean((log_softmax(got.logits[0]) - want) ** 2)) / want.std()
    assert 1e-4 < error < bound


def test_head_left_as_it_is(built: Built) -> None:
    with Driver(built.f32_dir, dtype="float32", quantization="int4", skip_lm_head_quantization=True) as driver:
        program = driver.model.program
    head = program.node("head.lm_head")
    assert head.weights[0] is not None and head.weights[0].format == "act"
    assert head.inputs[0].dtype == "act"
