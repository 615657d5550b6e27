"""The CPU's sampler, which defines what masks, penalties and biases mean: its adjusted logits are those of numpy in
fp32 in the stated order, and a row draws what logits draw that have it all in them.

What is random, and numpy's side, are those of the CUDA sampler's check (bench/gpu_checks/sampling.py).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from gpu_checks.sampling import Draw, adjusted, adjustments, cpu_sample, random_adjustments, random_draw, random_logits

from sapwood import _core
from sapwood.errors import InvalidRequest

PLAIN: dict[str, Any] = {"banned": (), "masked": None, "occurred": (), "logit_bias": ()}


def forbidden(draw: Draw, vocab: int) -> list[int]:
    return [i for i in (*draw.banned, *(draw.masked or ())) if 0 <= i < vocab]


def test_adjusted_logits_are_those_of_numpy() -> None:
    rng = np.random.default_rng(61)
    for _ in range(400):
        vocab = int(rng.choice([1, 31, 64, 65, 500]))
        logits = random_logits(rng, vocab)
        draw = replace(random_draw(rng, vocab), **random_adjustments(rng, vocab))
        expected = adjusted(logits, draw)
        expected[forbidden(draw, vocab)] = -np.inf
        np.testing.assert_array_equal(_core.adjusted_logits(logits, adjustments(draw, vocab)), expected)


def test_a_masked_row_draws_what_logits_with_minus_infinity_draw() -> None:
    rng = np.random.default_rng(67)
    drawn = 0
    for _ in range(600):
        vocab = int(rng.choice([2, 33, 64, 200, 1500]))
        logits = random_logits(rng, vocab)
        masked = tuple(np.flatnonzero(rng.random(vocab) < rng.choice([0.02, 0.5, 0.98])).tolist())
        draw = replace(random_draw(rng, vocab), **PLAIN | {"masked": masked})
        put_in = logits.copy()
        put_in[list(masked)] = -np.inf
        token, _, bad = cpu_sample(logits, draw)
        assert (token, bad) == cpu_sample(put_in, replace(draw, masked=None))[::2]
        assert bad or token not in masked
        drawn += not bad
    assert drawn > 400


def test_an_adjusted_row_draws_what_adjusted_logits_draw() -> None:
    rng = np.random.default_rng(71)
    changed = 0
    for _ in range(600):
        vocab = int(rng.choice([2, 64, 130, 1500]))
        logits = random_logits(rng, vocab)
        draw = replace(random_draw(rng, vocab), **random_adjustments(rng, vocab))
        put_in = adjusted(logits, draw)
        put_in[forbidden(draw, vocab)] = -np.inf
        plain = replace(draw, **PLAIN)
        token, logprob, bad = cpu_sample(logits, draw)
        assert (token, bad) == cpu_sample(put_in, plain)[::2], draw
        if not bad:
            raw = logits.astype(np.float64)
            expected = raw[token] - raw.max() - np.log(np.exp(raw - raw.max()).sum())
            assert abs(logprob - expected) <= 2e-6 * (1 + abs(expected)), "raw logits have another log-probability"
            changed += token != cpu_sample(logits, plain)[0]
    assert changed > 100, "adjustments change hardly a token: this compares nothing"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mask": [1]}, "mask must have ceil(vocab / 32) = 2 words"),
        ({"occurred": [(3, 1, True), (2, 1, True)]}, "occurred must name tokens in strictly ascending order"),
        ({"occurred": [(3, 1, True), (3, 1, True)]}, "strictly ascending order, got 3 after 3"),
        ({"occurred": [(40, 1, True)]}, "occurred must name tokens in 0 .. vocab - 1 = 39, got 40"),
        ({"occurred": [(4, -1, True)]}, "output_count must not be negative, got -1 for token 4"),
        ({"repetition": 0.0}, "repetition must be a finite number > 0"),
        ({"repetition": float("nan")}, "repetition must be"),
        ({"frequency": float("inf")}, "frequency must be a finite number"),
        ({"presence": float("nan")}, "presence must be a finite number"),
        ({"logit_bias": [(-1, 1.0)]}, "logit_bias must name tokens in 0 .. vocab - 1 = 39, got -1"),
        ({"logit_bias": [(5, float("-inf"))]}, "logit_bias must be finite (ban a token to forbid it), got -inf"),
    ],
)  # fmt: skip
def test_what_makes_no_row_is_refused(wrong: dict[str, Any], said: str) -> None:
    logits = np.zeros(40, np.float32)
    with pytest.raises(InvalidRequest) as refusal:
        _core.adjusted_logits(logits, _core.Adjustments(**wrong))
    assert said in str(refusal.value)
