"""Rope frequencies and tables: against closed forms, and against transformers for every scaling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sapwood.layers.rotary import RopeConfig, attention_factor, inv_freq, rope_tables

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT = tuple(1.0 + 0.1 * i for i in range(16))
LONG = tuple(2.0 + i for i in range(16))


def test_default_frequencies() -> None:
    np.testing.assert_allclose(inv_freq(RopeConfig("default", 10000.0, 8)), [1, 0.1, 0.01, 0.001], rtol=1e-12)


def test_linear_is_default_at_a_slower_pace() -> None:
    plain, linear = RopeConfig("default", 10000.0, 16), RopeConfig("linear", 10000.0, 16, factor=4.0)
    np.testing.assert_allclose(rope_tables(linear, 64)[0][4::4], rope_tables(plain, 16)[0][1:], atol=1e-7)


def test_llama3_keeps_fast_pairs_and_slows_slow_ones() -> None:
    rope = RopeConfig("llama3", 500000.0, 128, original_max_position=8192, **LLAMA3)
    base = inv_freq(RopeConfig("default", 500000.0, 128))
    ratio = base / inv_freq(rope)
    turns = 8192 * base / (2 * math.pi)
    np.testing.assert_allclose(ratio[turns >= 4], 1.0)
    np.testing.assert_allclose(ratio[turns <= 1], 8.0)
    between = ratio[(turns < 4) & (turns > 1)]
    assert between.size and np.all(np.diff(ratio) >= 0) and np.all((between > 1) & (between < 8))


def test_attention_factors() -> None:
    assert attention_factor(RopeConfig("default", 1e4, 32)) == 1.0
    yarn = {"kind": "yarn", "theta": 1e4, "rotary_dim": 32, "original_max_position": 64}
    assert attention_factor(RopeConfig(factor=4.0, **yarn)) == pytest.approx(0.1 * math.log(4) + 1)
    assert attention_factor(RopeConfig(factor=4.0, attention_factor=0.7, **yarn)) == 0.7
    assert attention_factor(RopeConfig(factor=4.0, mscale=1.0, mscale_all_dim=1.0, **yarn)) == pytest.approx(1.0)
    assert attention_factor(RopeConfig(factor=1.0, **yarn)) == 1.0
    longrope = RopeConfig(
        "longrope", 1e4, 32, factor=32.0, original_max_position=4096, short_factor=SHORT, long_factor=LONG
    )
    assert attention_factor(longrope) == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_longrope_tables_hold_both_modes() -> None:
    rope = RopeConfig("longrope", 1e4, 32, factor=4.0, original_max_position=32, short_factor=SHORT, long_factor=LONG)
    assert [rope.mode(n) for n in (1, 32, 33, 128)] == [0, 0, 1, 1]
    assert rope.num_modes(32) == 1 and rope.num_modes(33) == 2
    cos, sin = rope_tables(rope, 128)
    assert cos.shape == sin.shape == (256, 16) and cos.dtype == np.float32
    factor = attention_factor(rope)
    for mode, factors in enumerate((SHORT, LONG)):
        angles = 7 * 10000.0 ** (-np.arange(0, 32, 2) / 32) / np.array(factors)
        np.testing.assert_allclose(cos[mode * 128 + 7], factor * np.cos(angles), atol=1e-6)
        np.testing.assert_allclose(sin[mode * 128 + 7], factor * np.sin(angles), atol=1e-6)
    # Requests that can never be long need one mode only.
    assert rope_tables(rope, 32)[0].shape == (32, 16)


def test_other_kinds_have_one_mode() -> None:
    rope = RopeConfig("yarn", 1e4, 32, factor=4.0, original_max_position=64)
    assert rope.num_modes(10_000) == 1 and rope.mode(10_000) == 0


def test_tables_are_the_same_whatever_the_block() -> None:
    """Rows past the internal block size continue the sequence."""
    rope = RopeConfig("default", 10000.0, 4)
    cos, sin = rope_tables(rope, 5000)
    angles = np.arange(5000)[:, None] * inv_freq(rope)
    np.testing.assert_array_equal(cos, np.cos(angles).astype(np.float32))
    np.testing.assert_array_equal(sin, np.sin(angles).astype(np.float32))


TRANSFORMERS_CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear", {"factor": 3.0}, {"factor": 3.0}),
    ("llama3", {**LLAMA3, "original_max_position_embeddings": 64}, {**LLAMA3, "original_max_position": 64}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64}, {"factor": 4.0, "original_max_position": 64}),
    (
        "yarn",
        {
            "factor": 16.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 8,
            "beta_slow": 2,
            "mscale": 1.3,
            "mscale_all_dim": 0.4,
            "truncate": False,
        },
        {
            "factor": 16.0,
            "original_max_position": 256,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "mscale": 1.3,
            "mscale_all_dim": 0.4,
            "truncate": False,
        },
    ),
    (
        "longrope",
        {
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "short_factor": list(SHORT),
            "long_factor": list(LONG),
        },
        {"factor": 4.0, "original_max_position": 128, "short_factor": SHORT, "long_factor": LONG},
    ),
]


@pytest.mark.parametrize(("kind", "theirs", "ours"), TRANSFORMERS_CASES)
def test_frequencies_are_those_of_transformers(kind: Any, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **theirs},
    )
    rope = RopeConfig(kind, 10000.0, 32, **ours)
    for mode in range(rope.num_modes(512)):
        expected, factor = functions[kind](config, seq_len=500 if mode else 100)
        np.testing.assert_allclose(inv_freq(rope, mode), expected.numpy(), rtol=1e-5)
        assert attention_factor(rope) == pytest.approx(factor, rel=1e-9)
