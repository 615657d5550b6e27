"""The whole engine over the KV-checksum model: a wrong page, a stale slot, a lost or doubled token is a wrong answer.

The oracle is `_core.checksum_next_token`, which knows the tokens alone.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import uvloop
from fakes import VOCAB, Device, expected, loaded, run, settings

from sapwood.engine.async_engine import AsyncEngine
from sapwood.engine.engine import StepLoop
from sapwood.request import FinishReason, RequestOutput

SLOW_EMULATED = pytest.mark.slow_emulated


def prompts(rng: random.Random, count: int, longest: int = 120) -> list[list[int]]:
    """Random prompts, half of them beginning like one of three others."""
    shared = [[rng.randrange(VOCAB) for _ in range(longest // 2)] for _ in range(3)]
    out = []
    for _ in range(count):
        head = rng.choice(shared)[: rng.randrange(1, longest // 2)] if rng.random() < 0.5 else []
        out.append(head + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, longest // 2))])
    return out


def loop_of(engine: AsyncEngine) -> StepLoop:
    assert engine._steps is not None
    return engine._steps


async def check_pool(engine: AsyncEngine) -> None:
    """Everything is back: nothing leased, nothing in limbo, nothing lost."""
    await engine.wait_idle()
    steps = loop_of(engine)
    steps.cache.check_invariants()
    steps.builder.check_invariants()
    stats = engine.stats()
    assert stats.num_running == stats.num_waiting == stats.num_alive == 0
    for pool in stats.pool:
        assert pool.leased == pool.limbo == 0
        assert pool.free + pool.cached == pool.total
    engine.flush_cache()
    for pool in engine.stats().pool:
        assert pool.free == pool.total
    assert steps._planner.decode_kv == steps._planner.num_decoding == 0
    assert steps._planner.extending == steps._planner.draining == []


def run_all(
    asked: list[list[int]], num_tokens: int, changes: dict[str, Any] | None = None, **model_options: Any
) -> tuple[list[RequestOutput], Any]:
    """All prompts at once; their outputs, checked against the oracle, and the engine's statistics."""

    async def main() -> tuple[list[RequestOutput], Any]:
        config = settings(**(changes or {}))
        model = loaded(config, **model_options)
        async with AsyncEngine.from_loaded(model, config) as engine:
            outputs = await engine.generate(asked, {"max_new_tokens": num_tokens})
            stats = engine.stats()
            await check_pool(engine)
        for prompt, output in zip(asked, outputs, strict=True):
            assert output.error is None
            assert output.token_ids == expected(model, prompt, num_tokens)
            assert output.usage.prompt_tokens == len(prompt)
            assert output.usage.completion_tokens == len(output.token_ids)
        return outputs, stats

    return run(main())


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=SLOW_EMULATED)])
def test_tokens_for_every_page_size_and_overlap(page_size: int, overlap: bool) -> None:
    asked = prompts(random.Random(page_size), 24)
    changes = {"page_size": page_size, "disable_overlap_schedule": not overlap, "chunked_prefill_size": 64}
    outputs, stats = run_all(asked, 20, changes, num_pages=4096 // page_size, stall_seed=5, stall_us=100)
    assert stats.num_retractions == 0
    assert all(o.finish_reason == FinishReason.LENGTH for o in outputs)


@pytest.mark.parametrize(
    "changes",
    [
        {"disable_radix_cache": True},
        {"prefix_cache": "flat"},
        {"schedule_policy": "lpm"},
        {"schedule_policy": "priority"},
        {"chunked_prefill_size": 1},
        {"chunked_prefill_size": 7, "max_running_requests": 3},
        {"max_step_ms": 0.001},
        {"max_step_ms": 0},
        {"max_running_requests": 1},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_settings(changes: dict[str, Any]) -> None:
    run_all(prompts(random.Random(1), 16, 80), 12, changes)


@pytest.mark.parametrize("model", [{"kind": "window", "window": 24}, {"two_groups": True}], ids=str)
@pytest.mark.parametrize("num_pages", [30, pytest.param(512, marks=SLOW_EMULATED)])
def test_window_groups(model: dict[str, Any], num_pages: int) -> None:
    run_all(
        prompts(random.Random(2), 16),
        30,
        {"page_size": 4, "chunked_prefill_size": 32},
        num_pages=num_pages * 4,
        **model,
    )


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=SLOW_EMULATED)])
@pytest.mark.parametrize("cache", ["radix", *(pytest.param(c, marks=SLOW_EMULATED) for c in ("flat", "none"))])
def test_a_tiny_pool_retracts_and_changes_no_token(page_size: int, overlap: bool, cache: str) -> None:
    asked = prompts(random.Random(7), 20, 60)
    changes: dict[str, Any] = {
        "page_size": page_size,
        "disable_overlap_schedule": not overlap,
        "chunked_prefill_size": 32,
    }
    changes |= {"disable_radix_cache": True} if cache == "none" else {"prefix_cache": cache}
    # The longest request has 60 + 50 tokens: it fits alone, and little else beside it.
    _, stats = run_all(asked, 50, changes, num_pages=-(-160 // page_size), stall_seed=3, stall_us=50)
    assert stats.num_retractions > 0


def test_random_load_with_aborts_timeouts_and_a_tiny_pool(device: Device) -> None:
    """Streams, aborts in every phase, deadlines, cancelled tasks: each request ends once, its tokens right so far."""

    async def client(engine: AsyncEngine, model: Any, rng: random.Random, number: int, counts: dict[str, int]) -> None:
        prompt = prompts(rng, 1, 60)[0]
        length = rng.randrange(1, 50)
        fate = rng.choice(["whole", "stream", "abort", "cancel", "close", "deadline"])
        want = expected(model, prompt, length)
        params = {"max_new_tokens": length}
        name = f"r{number}"
        if fate == "whole":
            output = await engine.generate(prompt, params, request_id=name, priority=rng.randrange(3))
            assert output.token_ids == want
        elif fate == "deadline":
            output = await engine.generate(prompt, params, request_id=name, timeout_s=rng.choice([1e-4, 3e-3, 100.0]))
            assert output.token_ids == want[: len(output.token_ids)]
            assert output.finish_reason == FinishReason.LENGTH or "deadline" in str(output.error)
        elif fate == "cancel":
            task = asyncio.ensure_future(engine.generate(prompt, params, request_id=name))
            for _ in range(rng.randrange(20)):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            tokens: list[int] = []
            finals = 0
            stop_at = rng.randrange(0, length + 1)
            stream = engine.generate(prompt, params, request_id=name, stream=True)
            async for delta in stream:
                tokens += delta.token_ids
                finals += delta.finish_reason is not None
                if fate == "abort" and len(tokens) == stop_at:
                    engine.abort(name)
                if fate == "close" and len(tokens) >= stop_at:
                    break
            if fate == "close":
                await stream.aclose()
            assert tokens == want[: len(tokens)]
            if fate != "close":
                assert finals == 1
            if fate == "stream":
                assert tokens == want
        counts[fate] = counts.get(fate, 0) + 1

    async def main(seed: int, page_size: int, policy: str, overlap: bool) -> None:
        rng = random.Random(seed)
        config = settings(
            page_size=page_size,
            schedule_policy=policy,
            max_running_requests=8,
            chunked_prefill_size=32,
            disable_overlap_schedule=not overlap,
        )
        model = loaded(config, num_pages=-(-150 // page_size), stall_seed=seed + 1, stall_us=60)
        counts: dict[str, int] = {}
        async with AsyncEngine.from_loaded(model, config) as engine:
            for wave in range(num_waves):
                await asyncio.gather(*(client(engine, model, rng, wave * 100 + i, counts) for i in range(40)))
            assert sum(counts.values()) == num_waves * 40
            assert engine.stats().num_retractions > 0
            await check_pool(engine)

    num_waves = 1 if device.emulated else 4
    cases = [(16, "fcfs", True), (3, "lpm", True), (1, "priority", True), (16, "fcfs", False)]
    for seed, (page_size, policy, overlap) in enumerate(cases):
        run(main(seed, page_size, policy, overlap), uvloop.run if seed % 2 else asyncio.run)


def test_eos_is_taken_from_the_model_and_can_be_ignored(device: Device) -> None:
    async def main() -> None:
        config = settings()
        model = loaded(config, eos=(3, 4))
        plain = loaded(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            ended = 0
            num_prompts = 3 if device.emulated else 40
            for start in range(num_prompts):
                output = await engine.generate([start], {"max_new_tokens": 100})
                assert output.token_ids == expected(model, [start], 100)
                if output.finish_reason == FinishReason.STOP:
                    ended += 1
                    assert output.matched_stop == output.token_ids[-1] in (3, 4)
                free = await engine.generate([start], {"max_new_tokens": 100, "ignore_eos": True})
                assert free.token_ids == expected(plain, [start], 100)
                late = await engine.generate([start], {"max_new_tokens": 100, "min_new_tokens": 60})
                assert len(late.token_ids) > 60 or late.finish_reason == FinishReason.LENGTH
                # The native checksum model draws what it must not.
                assert device.name == "cpu" or not {3, 4} & set(late.token_ids[:60])
            assert ended > num_prompts // 8
            stop = expected(plain, [0], 10)[4]
            output = await engine.generate([0], {"max_new_tokens": 10, "ignore_eos": True, "stop_token_ids": [stop]})
            assert output.token_ids[-1] == stop == output.matched_stop
            await check_pool(engine)

    run(main())


def test_bad_logits_end_their_row_alone() -> None:
    async def main() -> None:
        config = settings(page_size=4)
        model = loaded(config, bad_every=37)
        rng = random.Random(4)
        async with AsyncEngine.from_loaded(model, config) as engine:
            asked = prompts(rng, 40, 40)
            outputs = await engine.generate(asked, {"max_new_tokens": 12})
            bad = [o for o in outputs if o.finish_reason == FinishReason.ABORT]
            for prompt, output in zip(asked, outputs, strict=True):
                want = expected(model, prompt, 12)
                if output in bad:
                    assert "NaN" in str(output.error)
                    assert output.token_ids == want[: len(output.token_ids)]
                else:
                    assert output.token_ids == want  # those who shared a failed leader's pages included
            assert 3 <= len(bad) < len(outputs)
            await check_pool(engine)

    run(main())


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=SLOW_EMULATED) for seed in (1, 2, 3))])
def test_failing_steps_end_their_requests_and_poison_no_other(page_size: int, seed: int) -> None:
    """Every 17th step throws with half its KV overwritten, while clients leave and prompts share their beginnings."""

    async def main() -> None:
        config = settings(page_size=page_size, chunked_prefill_size=48, max_running_requests=4)
        model = loaded(config, fail_every=17, stall_seed=seed + 1, stall_us=200)
        rng = random.Random(seed)
        async with AsyncEngine.from_loaded(model, config) as engine:

            async def client(prompt: list[int]) -> str:
                stream = engine.generate(prompt, {"max_new_tokens": 10}, stream=True)
                want, got = expected(model, prompt, 10), []
                leave_after = rng.randrange(3) if rng.random() < 0.6 else 99
                async for delta in stream:
                    got += delta.token_ids
                    assert got == want[: len(got)]
                    if delta.finish_reason == FinishReason.ABORT:
                        assert "step failed" in str(delta.error)
                        return "failed"
                    if len(got) > leave_after:
                        return "left"
                assert got == want
                return "done"

            ends = []
            for _ in range(8):  # later rounds ask again for what earlier ones may have left in the cache
                asked = prompts(random.Random(seed), 20, 90)
                ends += await asyncio.gather(*(client(prompt) for prompt in asked))
            assert min(ends.count(end) for end in ("failed", "left", "done")) >= 3
            assert ends.count("failed") <= engine.stats().num_steps // 17 * config.max_running_requests
            await check_pool(engine)

    run(main())


def test_followers_wait_for_their_leader_and_hit() -> None:
    async def main(radix: bool) -> int:
        config = settings(chunked_prefill_size=64, disable_radix_cache=not radix, trace_capacity=100)
        model = loaded(config)
        head = [i % VOCAB for i in range(320)]
        asked = [[*head, 100 + i] for i in range(6)]
        async with AsyncEngine.from_loaded(model, config) as engine:
            outputs = await engine.generate(asked, {"max_new_tokens": 4})
            for prompt, output in zip(asked, outputs, strict=True):
                assert output.token_ids == expected(model, prompt, 4)
            if radix:  # who only waits for the leader takes nothing of its steps
                assert [r.num_extend_tokens for r in engine.trace()[:5]] == [64] * 5
            await check_pool(engine)
        return sum(o.usage.cached_tokens for o in outputs)

    assert run(main(True)) == 5 * 320  # computed once, though all six came at once
    assert run(main(False)) == 0


def test_salt_divides_the_cache() -> None:
    async def main() -> None:
        config = settings()
        async with AsyncEngine.from_loaded(loaded(config), config) as engine:
            prompt, one = list(range(100)), {"max_new_tokens": 1}
            assert (await engine.generate(prompt, one)).usage.cached_tokens == 0
            assert (await engine.generate(prompt, one)).usage.cached_tokens == 96
            assert (await engine.generate(prompt, one, cache_salt="alice")).usage.cached_tokens == 0
            assert (await engine.generate(prompt, one, cache_salt="alice")).usage.cached_tokens == 96
            assert (await engine.generate(prompt, one, cache_salt="")).usage.cached_tokens == 0
            assert engine.flush_cache() > 0
            assert (await engine.generate(prompt, one)).usage.cached_tokens == 0

    run(main())


def test_the_last_request_that_cannot_fit_ends_with_an_error() -> None:
    async def main() -> None:
        config = settings(chunked_prefill_size=16)
        model = loaded(config, num_pages=4)  # 64 tokens
        async with AsyncEngine.from_loaded(model, config) as engine:
            long, short = await asyncio.gather(
                engine.generate([1] * 40, {"max_new_tokens": 100}), engine.generate([2] * 20, {"max_new_tokens": 30})
            )
            assert long.finish_reason == FinishReason.ABORT
            assert "KV pool exhausted" in str(long.error)
            assert "--max-total-tokens" in str(long.error)
            assert long.token_ids == expected(model, [1] * 40, len(long.token_ids))
            assert len(long.token_ids) >= 24
            assert short.token_ids == expected(model, [2] * 20, 30)
            await check_pool(engine)

    run(main())


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_two_engines_in_one_loop(runner: Any) -> None:
    async def main() -> None:
        config = settings()
        one, two = loaded(config), loaded(config, vocab_size=97)
        async with AsyncEngine.from_loaded(one, config) as first, AsyncEngine.from_loaded(two, config) as second:
            a, b = await asyncio.gather(
                first.generate([5, 6], {"max_new_tokens": 30}), second.generate([5, 6], {"max_new_tokens": 30})
            )
            assert a.token_ids == expected(one, [5, 6], 30)
            assert b.token_ids == expected(two, [5, 6], 30)
            assert first.stats().num_requests == 1

    run(main(), runner)
