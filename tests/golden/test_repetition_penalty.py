"""The sampler's repetition penalty against transformers' RepetitionPenaltyLogitsProcessor, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from sapwood import _core


@pytest.mark.parametrize("penalty", [1.0, 1.05, 1.3, 2.0, 0.8])
def test_equals_transformers(penalty: float) -> None:
    rng = np.random.default_rng(int(penalty * 100))
    for vocab in (5, 64, 1000):
        logits = rng.normal(0.0, 4.0, vocab).astype(np.float32)
        logits[rng.random(vocab) < 0.1] = 0.0
        prompt, output = rng.integers(0, vocab, 20), rng.integers(0, vocab, 12)
        ids = torch.from_numpy(np.concatenate((prompt, output)))[None]
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.from_numpy(logits)[None])[0].numpy()
        tokens = sorted({*prompt.tolist(), *output.tolist()})
        occurred = [(token, int((output == token).sum()), token in prompt) for token in tokens]
        adjustments = _core.Adjustments(occurred=occurred, repetition=penalty)
        np.testing.assert_array_equal(_core.adjusted_logits(logits, adjustments), expected)
        assert penalty == 1.0 or (expected != logits).any()
        for position in range(20):
            key = {"temperature": 0.9, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "seed": 3, "stream": 0}
            token, logprob, _ = _core.sample_row(logits, position=position, adjustments=adjustments, **key)
            assert token == _core.sample_row(expected, position=position, **key)[0]
            raw = torch.from_numpy(logits).double().log_softmax(0)[token]
            assert abs(logprob - raw) < 2e-6 * (1 + abs(raw)), "the log-probability is that of the raw logits"
