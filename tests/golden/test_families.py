"""Every family against transformers, on tiny random checkpoints of many shapes: tokens equal, log-probabilities close.

The oracle is one forward of transformers' model (eager attention, float32) over the prompt and the engine's own
tokens: its argmax at every step must be the engine's next token, which is what greedy generation there would have
drawn.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
from golden_checkpoints import TINY, Built, hf_logits, log_softmax, prompts_of, rms
from golden_driver import Driver

NUM_NEW = 64
F32_TOLERANCE = 1e-4
BF16_TOLERANCE = 3e-2


def test_greedy_tokens_and_logprobs_equal_transformers_in_float32(built: Built) -> None:
    with Driver(built.f32_dir, dtype="float32") as driver:
        prompts = prompts_of()
        results = driver.generate(prompts, NUM_NEW)
    for prompt, result in zip(prompts, results, strict=True):
        assert len(result.tokens) == NUM_NEW
        # Over the whole sequence at once transformers' longrope is in the mode that our admission chose.
        expected = log_softmax(hf_logits(built.f32, prompt + result.tokens)[len(prompt) - 1 : -1])
        np.testing.assert_array_equal(expected.argmax(-1), result.tokens)
        assert np.abs(log_softmax(result.logits) - expected).max() < F32_TOLERANCE
        np.testing.assert_allclose(result.logprobs, expected[np.arange(NUM_NEW), result.tokens], atol=F32_TOLERANCE)
    assert len({token for result in results for token in result.tokens}) > 20, "a degenerate model proves nothing"


def test_logprobs_are_close_in_bfloat16(built: Built) -> None:
    """bfloat16 engine against transformers in float32 on the same bfloat16 weights; dtype "auto" must find bfloat16.

    Over all logits the error must also be no more than transformers' own in bfloat16 (measured: about half).
    """
    half = copy.deepcopy(built.bf16)
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()  # parameters only: the rope's buffers stay float32
    with Driver(built.bf16_dir) as driver:
        assert driver.model.dtype == "bfloat16"
        prompts = prompts_of(1)
        results = driver.generate(prompts, NUM_NEW)
    for prompt, result in zip(prompts, results, strict=True):
        expected, theirs = (
            log_softmax(hf_logits(m, prompt + result.tokens)[len(prompt) - 1 : -1]) for m in (built.bf16, half)
        )
        chosen = expected[np.arange(NUM_NEW), result.tokens]
        error = np.abs(np.asarray(result.logprobs) - chosen)
        assert error.max() < BF16_TOLERANCE
        assert rms(log_softmax(result.logits) - expected) < rms(theirs - expected)
        # A token may differ from the oracle's only where the two are a near tie.
        assert (expected.max(-1) - chosen).max() < 2 * BF16_TOLERANCE


def test_transformers_generate_draws_the_same_tokens(built: Built) -> None:
    """The real thing once: generate() with its KV cache (no checkpoint's longrope boundary lies inside this
    request).
    """
    import torch

    prompt = prompts_of(2)[0]
    with torch.inference_mode():
        expected = built.f32.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()[len(prompt) :]
    with Driver(built.f32_dir, dtype="float32", page_size=32) as driver:
        assert driver.generate([prompt], NUM_NEW, chunk=1000)[0].tokens == expected


@pytest.mark.parametrize("built", [t for t in TINY if t.name == "phi3-longrope-long"], indirect=True, ids=str)
def test_longrope_mode_is_fixed_at_admission(built: Built) -> None:
    """A short prompt that may grow past the boundary uses the long factors from its first token, and one that may
    not, never.
    """
    prompt = prompts_of(3)[1]
    original = built.tiny.fields["original_max_position_embeddings"]
    with Driver(built.f32_dir, dtype="float32") as driver:
        short = driver.generate([prompt], 20)[0]
        long = driver.generate([prompt], 20, total_len=original + 1)[0]
        assert driver.model.rope_mode(original) == 0 and driver.model.rope_mode(original + 1) == 1
    expected = log_softmax(hf_logits(built.f32, prompt + short.tokens)[len(prompt) - 1 : -1])
    assert np.abs(log_softmax(short.logits) - expected).max() < F32_TOLERANCE
    assert np.abs(log_softmax(long.logits[:1]) - expected[:1]).max() > 100 * F32_TOLERANCE
    # transformers in its long mode: the same tokens followed by enough others to be past the boundary.
    padded = prompt + long.tokens + [3] * original
    expected = log_softmax(hf_logits(built.f32, padded)[len(prompt) - 1 : len(prompt) + 19])
    assert np.abs(log_softmax(long.logits) - expected).max() < F32_TOLERANCE
