"""Rows that draw under grammar masks, in time and late, against transformers' logits, on every device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden_checkpoints import TINY, build, hf_logits, log_softmax, prompts_of
from golden_driver import Driver
from golden_flashinfer import install

from sapwood import _core
from sapwood.program import cuda

NUM_NEW = 8
BF16_TOLERANCE = 6e-2  # of logits
BANNED = tuple(range(0, 1000, 4))  # of the first row


def allowed_at(position: int, vocab_size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.random.default_rng(position).random(vocab_size) < 0.1


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        ("cpu", {}),
        ("reference", {}),
        ("cuda", {}),
        ("cuda", {"attention_backend": "reference"}),
        ("cuda", {"attention_backend": "flashinfer"}),
        ("cuda", {"disable_cuda_graph": True, "enable_deterministic_inference": True}),
    ],
)
def test_a_held_row_draws_the_best_allowed_token(
    device: str,
    settings: dict[str, Any],
    tmp_path: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of three rows one is held each step and resumed later, beside the others or alone; one draws without masks. The
    first may draw none of its stop ids, whatever its masks say. Log-probabilities are those of the raw logits.
    """
    built = build(TINY[0], tmp_path)
    prompts = prompts_of(9)[:3]
    folder, dtype, oracle, tolerance = built.f32_dir, "float32", built.f32, 2e-4
    if device == "cuda":
        of_tests = request.getfixturevalue("cuda_device")
        monkeypatch.setattr(cuda, "open_device", lambda: of_tests)
        head_dim = built.tiny.fields["hidden_size"] // built.tiny.fields["num_attention_heads"]
        install(monkeypatch, (head_dim,))
        folder, dtype, oracle, tolerance = built.bf16_dir, "bfloat16", built.bf16, BF16_TOLERANCE
    logprobs: dict[int, list[float]] = {}
    with Driver(folder, dtype=dtype, device=device, **settings) as driver:
        builder, executor, vocab_size = driver.builder, driver.model.executor, driver.model.vocab_size

        def post(row: int, gen: int) -> None:
            position = builder.num_tokens(row)
            words = np.zeros(-(-vocab_size // 32) * 32, bool)
            words[:vocab_size] = allowed_at(position, vocab_size)
            executor.post_mask(row, gen, position, np.packbits(words, bitorder="little").view(np.uint32))
            builder.mask_posted(row, position)

        rows = []
        for prompt in prompts:
            ids = np.asarray(prompt, np.int32)
            admitted = builder.admit(
                0, ids, prompt_len=len(ids), max_len=len(ids) + NUM_NEW, temperature=0.0, masked=len(rows) < 2,
                min_len=len(ids) + NUM_NEW, stop_ids=[] if rows else [i for i in BANNED if i < vocab_size],
                return_logprob=True,
            )  # fmt: skip
            rows.append(admitted[:2])
        num_held = num_alone = 0
        for step in range(1, 200):
            builder.begin_step(step)
            builder.add_decodes()
            for row, _ in rows:
                if builder.phase(row) == "extend":
                    builder.add_extend(row, 48)
            made = builder.end_step()
            if made.plan is not None:
                num_alone += made.num_resume_rows > 0 and made.plan.num_tokens == 0
                executor.submit(made.plan)
                executor.wait_idle()
                result = next(result for kind, _, result in executor.drain() if kind == "result")
                assert not result.error, result.error
                for row, token, flags, logprob in zip(*builder.commit(result), strict=True):
                    num_held += flags & _core.HELD != 0
                    if token >= 0:
                        logprobs.setdefault(row, []).append(logprob)
            for at, (row, gen) in enumerate(rows[:2]):
                if (step + at) % 3 == 0 and builder.phase(row) != "done":
                    post(row, gen)
            if all(builder.phase(row) == "done" for row, _ in rows):
                break
        outputs = [builder.tokens(row).tolist() for row, _ in rows]
    assert num_held >= 4 and num_alone >= 2
    for at, (prompt, tokens) in enumerate(zip(prompts, outputs, strict=True)):
        assert len(tokens) == len(prompt) + NUM_NEW
        logits = hf_logits(oracle, tokens)[len(prompt) - 1 : -1]
        for position, (row, token) in enumerate(zip(logits, tokens[len(prompt) :], strict=True), len(prompt)):
            allowed = allowed_at(position, len(row)) if at < 2 else np.ones(len(row), bool)
            if at == 0:
                allowed[[i for i in BANNED if i < len(row)]] = False
            best = np.where(allowed, row, -np.inf).max()
            assert allowed[token] and row[token] >= best - tolerance, (at, position)
        chosen = log_softmax(logits)[np.arange(NUM_NEW), tokens[len(prompt) :]]
        assert np.abs(np.asarray(logprobs[rows[at][0]]) - chosen).max() <= tolerance
