"""What a failed step was to compute is nobody's prefix, be they later or launched behind it."""

from __future__ import annotations

import asyncio

import pytest
from fakes import expected, run, settings
from test_step_loop import check_pool, gated

from sapwood.engine.async_engine import AsyncEngine

SHARED = [1] * 32  # two pages


@pytest.mark.parametrize("failure", ["unsent", "launched", "device"])  # alike on a CPU
def test_pages_of_a_request_that_left_before_its_step_failed_are_not_cached(failure: str) -> None:
    async def main() -> None:
        config = settings(disable_overlap_schedule=True)
        model, gate = gated(config, fail_every=2, first_failure=failure)  # the second step fails
        async with AsyncEngine.from_loaded(model, config) as engine:
            gate.pass_all()
            await engine.generate([5], {"max_new_tokens": 1})
            gate.open = False
            doomed = asyncio.ensure_future(engine.generate([*SHARED, 2], {"max_new_tokens": 10}))
            await gate.wait_held(1)
            doomed.cancel()
            await asyncio.gather(doomed, return_exceptions=True)
            gate.pass_all()
            again = await engine.generate([*SHARED, 2], {"max_new_tokens": 1})
            assert again.usage.cached_tokens == 0
            assert again.token_ids == expected(model, [*SHARED, 2], 1)
            await check_pool(engine)

    run(main())


@pytest.mark.parametrize("failure", ["unsent", "launched", "device"])  # alike on a CPU
def test_a_token_computed_behind_a_failed_leader_is_dropped_and_computed_again(failure: str) -> None:
    async def main() -> None:
        config = settings(chunked_prefill_size=33)
        model, gate = gated(config, fail_every=3, first_failure=failure)  # the third step fails
        async with AsyncEngine.from_loaded(model, config) as engine:
            gate.pass_all()
            await engine.generate([5], {"max_new_tokens": 2})
            gate.open = False
            leader, follower = (
                asyncio.ensure_future(engine.generate([*SHARED, last], {"max_new_tokens": 1})) for last in (2, 3)
            )
            await gate.wait_held(2)  # the leader's step, and the follower's on the leader's pages
            gate.pass_all()
            assert "step failed" in str((await leader).error)
            answer = await follower
            assert answer.error is None
            assert answer.token_ids == expected(model, [*SHARED, 3], 1)
            await check_pool(engine)

    run(main())
