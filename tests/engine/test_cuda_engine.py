"""The public API on device "cuda": the bundled model, its kernels on the CPU (tests/cuda/emulator)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

from sapwood import Engine, SamplingParams
from sapwood.program import cuda
from sapwood.program.cuda_library import CudaLibrary

PROMPTS = ["Once upon a time", "The dog went home and"]


@pytest.fixture(scope="module")
def engine(emulated: CudaLibrary) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "open_device", lambda: (emulated, "cpu"))
        with Engine("sapling", device="cuda", max_total_tokens=2048, max_running_requests=8) as engine:
            yield engine


def test_greedy_text_is_that_of_the_cpu(engine: Engine) -> None:
    greedy = SamplingParams(temperature=0, max_new_tokens=6, return_logprob=True)
    with Engine("sapling", max_total_tokens=2048) as on_cpu:
        expected = on_cpu.generate(PROMPTS, greedy)
    for ours, theirs in zip(engine.generate(PROMPTS, greedy), expected, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.text == theirs.text
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=0.05)


def test_a_seed_names_an_answer_and_choices_differ(engine: Engine) -> None:
    sample = SamplingParams(temperature=1.0, top_p=0.9, top_k=40, min_p=0.01, seed=5, n=2, max_new_tokens=5)
    first, second = ([output.token_ids for output in engine.generate(PROMPTS[0], sample)] for _ in range(2))
    assert first == second and first[0] != first[1]


def test_a_stop_token_is_not_drawn_before_min_new_tokens(engine: Engine) -> None:
    free = engine.generate(PROMPTS[0], SamplingParams(temperature=0, max_new_tokens=4))
    stop = free.token_ids[1]
    held = engine.generate(
        PROMPTS[0], SamplingParams(temperature=0, max_new_tokens=4, min_new_tokens=3, stop_token_ids=[stop])
    )
    assert stop not in held.token_ids[:3] and held.token_ids[0] == free.token_ids[0]
