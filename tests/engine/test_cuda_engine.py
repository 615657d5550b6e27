"""The public API on device "cuda": the bundled model, its kernels on the CPU (tests/cuda/emulator)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

from sapwood import Engine, SamplingParams
from sapwood.errors import SapwoodError
from sapwood.program import cuda
from sapwood.program.cuda_library import CudaLibrary, Params
from sapwood.request import FinishReason

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


@pytest.fixture
def on_cuda(emulated: CudaLibrary, monkeypatch: pytest.MonkeyPatch) -> CudaLibrary:
    monkeypatch.setattr(cuda, "open_device", lambda: (emulated, "cpu"))
    return emulated


def test_steps_are_queued_before_the_tokens_of_earlier_ones_are_known(on_cuda: CudaLibrary) -> None:
    """The same answers with and without, ends by stop token (which the next step, queued, must skip) included."""
    params = [SamplingParams(temperature=0, max_new_tokens=n) for n in (3, 9, 1, 14)]
    prompts = [*PROMPTS, "A cat", "Tom had a ball. Tom"]
    answers = []
    for overlap in (True, False):
        settings = {"max_total_tokens": 2048, "max_running_requests": 8, "trace_capacity": 100}
        with Engine("sapling", device="cuda", disable_overlap_schedule=not overlap, **settings) as engine:
            free = engine.generate(prompts, params)
            stops = [[output.token_ids[-2]] if len(output.token_ids) > 2 else None for output in free]
            stopped = [
                SamplingParams(temperature=0, max_new_tokens=n.max_new_tokens, stop_token_ids=stop)
                for n, stop in zip(params, stops, strict=True)
            ]
            answers.append([output.token_ids for output in (*free, *engine.generate(prompts, stopped))])
            trace = [step for step in engine.trace() if step.num_decode_rows]
            # Planned while the step before was in flight: submitted before that one was done.
            ahead = sum(b.submit_ns < a.done_ns for a, b in zip(trace, trace[1:], strict=False))
            assert ahead > len(trace) // 2 if overlap else ahead == 0
    assert answers[0] == answers[1]


class Failing:
    """A library one of whose launches fails."""

    def __init__(self, library: CudaLibrary) -> None:
        self.library = library
        self.fails_at = {"rms_norm": 0, "sample": 0}  # calls from now

    def call(self, op: str, params: Params, stream: int | None = None) -> None:
        if self.fails_at.get(op, 0) > 0:
            self.fails_at[op] -= 1
            if self.fails_at[op] == 0:
                raise SapwoodError(f"{op}: out of luck")
        self.library.call(op, params, stream)


@pytest.mark.parametrize("op", ["rms_norm", "sample"])
def test_a_step_that_cannot_be_launched_fails_alone(
    on_cuda: CudaLibrary, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    library = Failing(on_cuda)
    monkeypatch.setattr(cuda, "open_device", lambda: (library, "cpu"))
    greedy = SamplingParams(temperature=0, max_new_tokens=14)  # a whole page each
    with Engine("sapling", device="cuda", max_total_tokens=2048, max_running_requests=8) as engine:
        expected = engine.generate(PROMPTS, greedy)
        baseline = engine.flush_cache()
        library.fails_at[op] = 5
        failed = engine.generate(PROMPTS, greedy)
        assert any(output.finish_reason is FinishReason.ABORT for output in failed)
        assert all(f"{op}: out of luck" in (o.error or "") for o in failed if o.finish_reason is FinishReason.ABORT)
        again = engine.generate(PROMPTS, greedy)
        assert [o.token_ids for o in again] == [o.token_ids for o in expected]
        engine.flush_cache()
        assert baseline > 0 and engine.flush_cache() == 0
