"""The public API on device "cuda": on a GPU, or its kernels on the CPU (tests/cuda/emulator)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch")

from sapwood import AsyncEngine, Engine, SamplingParams
from sapwood.errors import SapwoodError
from sapwood.program import cuda
from sapwood.program.cuda_library import AttentionPlanParams, CudaLibrary, Params
from sapwood.request import FinishReason

OWN_DEVICE = True
PROMPTS = ["Once upon a time", "The dog went home and"]
TINY = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 97, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256, "model_type": "qwen3", "rope_theta": 1e4, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "eos_token_id": 3,
}  # fmt: skip
# Random weights, prompts of token ids.
OF_TINY: dict[str, Any] = {"device": "cuda", "load_format": "dummy", "skip_tokenizer_init": True, "page_size": 8}


@pytest.fixture(scope="module", autouse=True)
def _device(cuda_device: tuple[CudaLibrary, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "open_device", lambda: cuda_device)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
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


def test_steps_are_queued_before_the_tokens_of_earlier_ones_are_known(tiny: str) -> None:
    """The same answers with and without, ends by stop token (which the next step, queued, must skip) included."""
    params = [SamplingParams(temperature=0, max_new_tokens=n) for n in (3, 9, 1, 14)]
    prompts = [[5, 6, 7], list(range(30, 60)), [9], [11, 12]]
    answers = []
    for overlap in (True, False):
        settings = OF_TINY | {"max_total_tokens": 2048, "trace_capacity": 100, "disable_overlap_schedule": not overlap}
        with Engine(tiny, **settings) as engine:
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
    """A library one of whose launches fails, or, of attention_plan, finds no room on the device."""

    def __init__(self, library: CudaLibrary) -> None:
        self.library = library
        self.fails_at = {"rms_norm": 0, "sample": 0, "attention_plan": 0}  # calls from now

    def call(self, op: str, params: Params, stream: int | None = None) -> None:
        if self.fails_at.get(op, 0) > 0:
            self.fails_at[op] -= 1
            if self.fails_at[op] == 0 and isinstance(params, AttentionPlanParams):
                params.max_items = 0
            elif self.fails_at[op] == 0:
                raise SapwoodError(f"{op}: out of luck")
        self.library.call(op, params, stream)


@pytest.mark.parametrize(
    ("op", "said"),
    [
        ("rms_norm", "rms_norm: out of luck"),
        ("sample", "sample: out of luck"),
        ("attention_plan", "attention_plan failed with 1"),
    ],
)
def test_a_step_that_cannot_be_computed_fails_alone(
    cuda_device: tuple[CudaLibrary, str], monkeypatch: pytest.MonkeyPatch, tiny: str, op: str, said: str
) -> None:
    library = Failing(cuda_device[0])
    monkeypatch.setattr(cuda, "open_device", lambda: (library, cuda_device[1]))
    greedy = SamplingParams(temperature=0, max_new_tokens=14)  # a whole page each
    prompts = [[5, 6, 7], list(range(30, 50))]
    with Engine(tiny, max_total_tokens=2048, disable_cuda_graph=True, **OF_TINY) as engine:
        expected = engine.generate(prompts, greedy)
        baseline = engine.flush_cache()
        library.fails_at[op] = 5
        failed = engine.generate(prompts, greedy)
        assert any(output.finish_reason is FinishReason.ABORT for output in failed)
        assert all(said in (o.error or "") for o in failed if o.finish_reason is FinishReason.ABORT)
        again = engine.generate(prompts, greedy)
        assert [o.token_ids for o in again] == [o.token_ids for o in expected]
        engine.flush_cache()
        assert baseline > 0 and engine.flush_cache() == 0


@pytest.mark.parametrize("graphs", [True, False])
def test_a_request_is_answered_under_load_as_alone(tiny: str, graphs: bool) -> None:
    """A pool too small for all, common prefixes, prompts in chunks, choices, requests that are dropped: bit by bit."""
    rng = random.Random(3)
    prefix = [rng.randrange(4, 97) for _ in range(24)]
    asked = []
    for i in range(10):
        prompt = prefix[: rng.choice((0, 16, 24))] + [rng.randrange(4, 97) for _ in range(rng.randrange(1, 30))]
        params = SamplingParams(
            temperature=rng.choice((0.0, 1.0)), top_p=0.9, seed=i, n=rng.choice((1, 1, 2)), return_logprob=True,
            max_new_tokens=rng.randrange(6, 28), ignore_eos=True,
        )  # fmt: skip
        asked.append((prompt, params))
    settings = OF_TINY | {
        "enable_deterministic_inference": True,
        "chunked_prefill_size": 24,
        "max_running_requests": 6,
        "disable_cuda_graph": not graphs,
    }

    async def answer(engine: AsyncEngine, prompt: list[int], params: SamplingParams, drop: bool) -> list[Any]:
        if drop:
            async with contextlib.aclosing(engine.generate(prompt, params, stream=True)) as stream:
                async for _ in stream:
                    break
            return []
        outputs = await engine.generate(prompt, params)
        choices = outputs if isinstance(outputs, list) else [outputs]
        assert all(o.error is None for o in choices)
        return [(o.choice, o.token_ids, o.logprobs, o.finish_reason) for o in choices]

    async def main() -> None:
        async with AsyncEngine(tiny, max_total_tokens=2048, **settings) as engine:
            alone = [await answer(engine, *request, False) for request in asked]
        async with AsyncEngine(tiny, max_total_tokens=80, **settings) as engine:
            dropped = {2, 7}
            together = await asyncio.gather(*(answer(engine, *r, i in dropped) for i, r in enumerate(asked)))
            stats = engine.stats()
        for i, (expected, got) in enumerate(zip(alone, together, strict=True)):
            assert i in dropped or got == expected, f"request {i}"
        assert stats.num_retractions > 0

    asyncio.run(main())
