"""Whatever one request asks for, those beside it get their own answers: no bad value and no long prompt is theirs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes import expected, loaded, run, settings

from sapwood.engine.async_engine import AsyncEngine
from sapwood.errors import InvalidRequest
from sapwood.request import RequestOutput, SamplingParams


@pytest.mark.parametrize(
    ("params", "priority"),
    [
        ({"top_k": 2**31}, 0),
        *(
            pytest.param(*values, marks=pytest.mark.slow_emulated)
            for values in (
                ({"top_k": 10**30}, 0),
                ({"max_new_tokens": None, "min_new_tokens": 10**30}, 0),
                ({"return_logprob": "yes"}, 0),
                ({"temperature": 10**400}, 0),
                ({"stop": 5}, 0),
                ({"stop_token_ids": 5}, 0),
            )
        ),
        ({}, 10**400),
    ],
)
def test_a_bad_value_is_its_own_trouble(params: dict[str, Any], priority: int) -> None:
    """The request is answered or refused; its batch mates and the engine go on."""

    async def main() -> None:
        config = settings(schedule_policy="priority")
        model = loaded(config, context_len=64)
        async with AsyncEngine.from_loaded(model, config) as engine:
            asked = [[i + 1] * 8 for i in range(4)]
            mates = [asyncio.create_task(engine.generate(prompt, {"max_new_tokens": 50})) for prompt in asked]
            while engine.stats().num_running < len(mates):
                await asyncio.sleep(0)
            asks_much = SamplingParams(**({"max_new_tokens": 4, "temperature": 0.0} | params))
            try:
                output = await engine.generate([9, 9, 9], asks_much, priority=priority)
                assert output.error is None
                assert output.token_ids == expected(model, [9, 9, 9], len(output.token_ids))
            except InvalidRequest as error:
                assert error.param in {*params, "priority"}
            for prompt, mate in zip(asked, mates, strict=True):
                assert (await mate).token_ids == expected(model, prompt, 50)
            await engine.wait_idle()
            assert engine.stats().num_alive == 0

    run(main())


def test_what_the_batch_builder_refuses_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a value that no native call takes get past verify() after all."""

    async def main() -> None:
        config = settings()
        model = loaded(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            monkeypatch.setattr("sapwood.request.SamplingParams.verify", lambda *_: None)
            good, bad = await asyncio.gather(
                engine.generate([1] * 8, {"max_new_tokens": 20}),
                engine.generate([2] * 8, {"max_new_tokens": 20, "seed": -1}),
            )
            assert good.token_ids == expected(model, [1] * 8, 20)
            assert bad.finish_reason == "abort" and "refused by the batch builder" in (bad.error or "")

    run(main())


@pytest.mark.parametrize(("policy", "priority"), [("fcfs", 0), ("priority", 0), ("priority", 5)])
@pytest.mark.parametrize("num_long", [1, 2, 3])
def test_long_prompts_leave_room_for_a_short_one(policy: str, priority: int, num_long: int) -> None:
    async def main() -> None:
        config = settings(schedule_policy=policy, chunked_prefill_size=32)
        model = loaded(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            asked = [[i + 1] * 1000 for i in range(num_long)]
            long = [asyncio.create_task(engine.generate(prompt, {"max_new_tokens": 2})) for prompt in asked]
            while engine.stats().num_steps < 4:
                await asyncio.sleep(0)
            began = engine.stats().num_steps
            short = await engine.generate([9] * 4, {"max_new_tokens": 1}, priority=priority)
            assert engine.stats().num_steps - began <= 8  # the long ones take 30 each
            assert short.token_ids == expected(model, [9] * 4, 1)
            for prompt, task in zip(asked, long, strict=True):
                assert (await task).token_ids == expected(model, prompt, 2)

    run(main())


def test_a_higher_priority_takes_its_share_of_the_step_first() -> None:
    """So many long prompts are begun that their halves leave nothing of a step: the urgent one passes them all."""

    async def main() -> None:
        config = settings(schedule_policy="priority", chunked_prefill_size=32)
        model = loaded(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            ended: list[str] = []

            async def ask(name: str, token: int, length: int, priority: int) -> RequestOutput:
                output = await engine.generate([token] * length, {"max_new_tokens": 1}, priority=priority)
                ended.append(name)
                return output

            low = [asyncio.create_task(ask(f"low{i}", i + 1, 600, 0)) for i in range(8)]
            while engine.stats().num_steps < 12:
                await asyncio.sleep(0)
            await asyncio.gather(ask("high", 9, 250, 1000), *low)
            assert ended[0] == "high"

    run(main())
