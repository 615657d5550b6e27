"""The loop: one step ahead, idle for free, faults kept apart, requests ended in every phase."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import time
from typing import Any

import numpy as np
import pytest
import uvloop
from fakes import VOCAB, expected, loaded, run, settings

from sapwood import _core
from sapwood.engine import engine as engine_module
from sapwood.engine.async_engine import AsyncEngine
from sapwood.engine.engine import StepLoop, StepRecord
from sapwood.engine.request_state import Phase
from sapwood.errors import CapacityError, EngineDead, InvalidRequest
from sapwood.request import FinishReason, RequestOutput


class Gate:
    """An executor that runs a step only when the test says so: what is in flight is then known."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.held: list[_core.StepPlan] = []
        self.arrived = asyncio.Event()
        self.open = False

    @property
    def queued(self) -> int:
        return len(self.held) + self.inner.queued

    def submit(self, plan: _core.StepPlan) -> None:
        if self.open:
            self.inner.submit(plan)
            return
        self.held.append(plan)
        self.arrived.set()

    def pass_one(self, instead: _core.StepPlan | None = None) -> None:
        plan = self.held.pop(0)
        self.inner.submit(instead if instead is not None else plan)

    def pass_all(self) -> None:
        self.open = True
        while self.held:
            self.pass_one()

    async def wait_held(self, count: int) -> None:
        while len(self.held) < count:
            self.arrived.clear()
            await self.arrived.wait()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def gated(config: Any, **options: Any) -> tuple[Any, Gate]:
    model = loaded(config, **options)
    model.executor = gate = Gate(model.executor)
    return model, gate


def loop_of(engine: AsyncEngine) -> StepLoop:
    assert engine._steps is not None
    return engine._steps


async def check_pool(engine: AsyncEngine) -> None:
    await engine.wait_idle()
    loop_of(engine).cache.check_invariants()
    loop_of(engine).builder.check_invariants()
    engine.flush_cache()
    for pool in engine.stats().pool:
        assert pool.free == pool.total
    assert engine.stats().num_alive == engine.stats().num_running == 0


# --- one step ahead


def ahead_share(trace: list[StepRecord]) -> float:
    """The share of decode steps that were planned before the result of the step before them."""
    pairs = [(before, r) for before, r in itertools.pairwise(trace) if r.num_decode_rows]
    assert len(pairs) >= 20
    return sum(r.planned_ns < before.done_ns for before, r in pairs) / len(pairs)


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_next_step_is_planned_before_the_result(runner: Any) -> None:
    async def main() -> None:
        config = settings(trace_capacity=1000)
        model, gate = gated(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            task = asyncio.ensure_future(engine.generate([[i] for i in range(8)], {"max_new_tokens": 45}))
            for _ in range(44):  # the last step has no successor
                await gate.wait_held(2)  # step N+1 is here, and N has not even begun
                gate.pass_one()
            gate.pass_all()
            assert all(len(o.token_ids) == 45 for o in await task)
            trace = engine.trace()
            assert ahead_share(trace) >= 0.95
            # The executor's own trace: each step is one submission.
            assert [t.step_id for t in gate.take_trace()] == [r.step_id for r in trace]

    run(main(), runner)


@pytest.mark.cpu_only("a step on device cuda has no mark where its head begins")
@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_where_the_head_is_long_planning_waits_for_it(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Late enough to take in what came during the forward, early enough for the next step to start at once."""
    # On a busy machine one head may be missed; it must not count for all the steps after it.
    monkeypatch.setattr(engine_module, "EARLY_STEPS_AFTER_MISS", 0)

    async def main() -> None:
        config = settings(trace_capacity=1000)
        model = loaded(config, runner=_core.noop_runner(1, 1_000, 20_000))
        async with AsyncEngine.from_loaded(model, config) as engine:
            await engine.generate([[i] for i in range(8)], {"max_new_tokens": 30})
            trace = engine.trace()
            assert ahead_share(trace) >= 0.95
            pairs = list(itertools.pairwise(trace))[2:]
            assert sum(before.head_ns <= r.planned_ns for before, r in pairs) >= 0.95 * len(pairs)

    run(main(), runner)


@pytest.mark.cpu_only("a step on device cuda has no mark where its head begins")
def test_a_missed_head_makes_the_next_steps_plan_early() -> None:
    async def main() -> None:
        config = settings(trace_capacity=1000)
        model = loaded(config, runner=_core.noop_runner(1, 15_000, 15_000))  # long, for machines that are busy
        async with AsyncEngine.from_loaded(model, config) as engine:
            task = asyncio.ensure_future(engine.generate([[i] for i in range(4)], {"max_new_tokens": 40}))
            while engine.stats().num_steps < 10:
                await asyncio.sleep(0)
            blocked_until = time.monotonic() + 0.15  # the loop is kept busy for several steps' time
            while time.monotonic() < blocked_until:
                pass
            after = engine.trace()[-1].step_id
            await task
            pairs = [(a, b) for a, b in itertools.pairwise(engine.trace()) if b.step_id > after + 1][:15]
            assert sum(b.planned_ns < a.head_ns for a, b in pairs) >= 12

    run(main())


def test_without_overlap_a_step_is_planned_after_the_result() -> None:
    async def main() -> None:
        config = settings(trace_capacity=1000, disable_overlap_schedule=True)
        async with AsyncEngine.from_loaded(loaded(config), config) as engine:
            await engine.generate([[i] for i in range(4)], {"max_new_tokens": 30})
            trace = engine.trace()
            assert len(trace) >= 30
            assert all(r.planned_ns >= before.done_ns for before, r in itertools.pairwise(trace))

    run(main())


def test_at_most_two_steps_in_flight() -> None:
    async def main() -> None:
        config = settings()
        model, gate = gated(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            task = asyncio.ensure_future(engine.generate([1, 2], {"max_new_tokens": 20}))
            await gate.wait_held(2)
            for _ in range(10):
                await asyncio.sleep(0)
            assert len(gate.held) == 2
            assert engine.stats().num_in_flight == 2
            gate.pass_all()
            assert (await task).token_ids == expected(model, [1, 2], 20)
            await check_pool(engine)

    run(main())


def test_a_newcomer_joins_the_running_batch() -> None:
    async def main() -> None:
        config = settings(trace_capacity=100)
        model, gate = gated(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            first = asyncio.ensure_future(engine.generate([1], {"max_new_tokens": 10}))
            await gate.wait_held(2)
            second = asyncio.ensure_future(engine.generate([2], {"max_new_tokens": 10}))
            gate.pass_one()
            await gate.wait_held(2)
            gate.pass_all()
            assert (await first).token_ids == expected(model, [1], 10)
            assert (await second).token_ids == expected(model, [2], 10)
            mixed = [r for r in engine.trace() if r.num_extend_tokens and r.num_decode_rows]
            assert len(mixed) == 1

    run(main())


@pytest.mark.cpu_only("of a runner whose steps take a known time")
def test_prefill_beside_decodes_is_cut_to_the_time_budget() -> None:
    async def main(max_step_ms: float) -> list[int]:
        config = settings(trace_capacity=1000, max_step_ms=max_step_ms, page_size=4)
        # 1 ms a step whatever it holds: the cost model starts at 2 ms a token, so the first chunk beside a decode is
        # short.
        model = loaded(config, runner=_core.noop_runner(1, 500, 500), num_pages=2000)
        async with AsyncEngine.from_loaded(model, config) as engine:
            decoding = engine.generate([1], {"max_new_tokens": 60}, stream=True)
            await anext(decoding)
            long = await engine.generate([2] * 1500, {"max_new_tokens": 2})
            assert len(long.token_ids) == 2
            chunks = [r.num_extend_tokens for r in engine.trace() if r.num_extend_tokens and r.num_decode_rows]
            await decoding.aclose()
            return chunks

    cut, whole = run(main(20.0)), run(main(0.0))
    assert whole == [1500]
    assert len(cut) > 1
    assert sum(cut) == 1500
    assert cut[0] < 100


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_idle_costs_nothing(runner: Any) -> None:
    async def main() -> None:
        config = settings()
        async with AsyncEngine.from_loaded(loaded(config), config) as engine:
            await engine.generate([1], {"max_new_tokens": 10}, timeout_s=100.0)
            await engine.wait_idle()
            gc.collect()
            assert loop_of(engine)._timer is None  # the deadline's timer left with its request
            wall, cpu = time.monotonic(), time.process_time()
            await asyncio.sleep(0.5)
            assert time.monotonic() - wall >= 0.5
            assert time.process_time() - cpu < 0.01

    run(main(), runner)


# --- ends in every phase


def test_abort_in_every_phase() -> None:
    async def main() -> None:
        config = settings(max_running_requests=2, chunked_prefill_size=16)
        model, gate = gated(config, num_pages=64)
        async with AsyncEngine.from_loaded(model, config) as engine:
            steps = loop_of(engine)

            def phase(name: str) -> Phase:
                return steps._requests[name].phase

            tasks = {
                name: asyncio.ensure_future(engine.generate(prompt, {"max_new_tokens": 40}, request_id=name))
                for name, prompt in (("decoding", [1] * 8), ("extending", [2] * 100), ("queued", [3] * 8))
            }
            await gate.wait_held(2)
            assert phase("decoding") == Phase.DECODE
            assert phase("extending") == Phase.EXTEND
            assert phase("queued") == Phase.WAITING
            for name in ("queued", "extending", "decoding"):
                assert engine.abort(name)
                assert not engine.abort(name)
                output = await tasks[name]
                assert output.finish_reason == FinishReason.ABORT
                assert output.error is None
                assert output.token_ids == []
            # Two steps still name the rows: their pages are in limbo, not free.
            pool = engine.stats().pool[0]
            assert pool.limbo > 0
            assert pool.free + pool.cached + pool.leased + pool.limbo == pool.total
            gate.pass_all()
            await check_pool(engine)
            assert not engine.abort("never was")

    run(main())


def test_abort_while_draining() -> None:
    async def main() -> None:
        config = settings(page_size=4)
        model, gate = gated(config, num_pages=12)
        async with AsyncEngine.from_loaded(model, config) as engine:
            old = asyncio.ensure_future(engine.generate([1] * 12, {"max_new_tokens": 30}, request_id="old"))
            new = asyncio.ensure_future(engine.generate([2] * 10, {"max_new_tokens": 30}, request_id="new"))
            await gate.wait_held(2)
            steps = loop_of(engine)
            while steps._requests["new"].phase != Phase.DRAINING:
                gate.pass_one()
                await gate.wait_held(2)
            assert engine.abort("new")
            aborted = await new
            assert aborted.finish_reason == FinishReason.ABORT
            assert aborted.token_ids == expected(model, [2] * 10, len(aborted.token_ids))
            gate.pass_all()
            assert (await old).token_ids == expected(model, [1] * 12, 30)
            await check_pool(engine)

    run(main())


@pytest.mark.slow_emulated
@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_deadline_reaches_a_request_that_no_step_serves(runner: Any) -> None:
    async def main() -> None:
        config = settings(request_timeout_s=0.05)
        model, gate = gated(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            output = await engine.generate([1], {"max_new_tokens": 5})  # its step never runs
            assert output.finish_reason == FinishReason.ABORT
            assert "deadline" in str(output.error)
            tiny = await asyncio.gather(*(engine.generate([i], timeout_s=1e-9) for i in range(3)))
            assert all("deadline" in str(o.error) for o in tiny)
            gate.pass_all()
            quick = await engine.generate([1], {"max_new_tokens": 5}, timeout_s=0.01 * 10**6)  # the setting is the most
            assert quick.token_ids == expected(model, [1], 5)
            await check_pool(engine)

    run(main(), runner)


def test_cancelled_task_gives_its_pages_back() -> None:
    async def main() -> None:
        config = settings()
        model, gate = gated(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            task = asyncio.ensure_future(engine.generate([[1] * 50, [2] * 50], {"max_new_tokens": 5}))
            await gate.wait_held(2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert engine.stats().num_alive == 0
            gate.pass_all()
            await check_pool(engine)

    run(main())


def test_left_streams_give_their_pages_back() -> None:
    async def main() -> None:
        config = settings()
        model = loaded(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            async for _ in engine.generate([1], {"max_new_tokens": 3000}, stream=True):
                break  # dropped
            gc.collect()
            closed = engine.generate([2], {"max_new_tokens": 3000}, stream=True)
            await anext(closed)
            await closed.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(closed)
            never = engine.generate([3], {"max_new_tokens": 3000}, stream=True)
            await never.aclose()
            await check_pool(engine)
            assert engine.stats().num_requests == 2
            assert engine.stats().num_steps < 3000  # nobody ran to its end

    run(main())


def test_a_deadline_that_cannot_be_set_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        config = settings()
        model, gate = gated(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            first = asyncio.ensure_future(engine.generate([1], timeout_s=0.2))
            await gate.wait_held(1)

            def refuse(*_: Any) -> None:
                raise OverflowError("too far")

            with monkeypatch.context() as patch:
                patch.setattr(asyncio.get_running_loop(), "call_at", refuse)
                with pytest.raises(OverflowError):
                    await engine.generate([2], request_id="id", timeout_s=0.1)
            assert engine.stats().num_requests == engine.stats().num_alive == 1
            assert loop_of(engine)._num_new == 0
            async with asyncio.timeout(10):
                assert "deadline" in str((await first).error)  # its timer still stands
            gate.pass_all()
            again = await engine.generate([2], {"max_new_tokens": 3}, request_id="id", timeout_s=100)
            assert again.token_ids == expected(model, [2], 3)
            await check_pool(engine)

    run(main())


def test_a_request_the_queue_cannot_take_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        config = settings(max_running_requests=1)
        model, gate = gated(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            running = asyncio.ensure_future(engine.generate([1], {"max_new_tokens": 5}))
            await gate.wait_held(2)
            steps = loop_of(engine)

            def refuse(req: Any) -> None:
                raise OverflowError("no such key")

            push, steps._scheduler.push = steps._scheduler.push, refuse  # type: ignore[method-assign]
            output = await engine.generate([2])
            assert output.finish_reason == FinishReason.ABORT
            assert "no such key" in str(output.error)
            steps._scheduler.push = push  # type: ignore[method-assign]
            assert (engine.stats().num_alive, engine.stats().num_waiting, steps._num_new) == (1, 0, 0)
            # One that says it waits, and does not.
            waiting = asyncio.ensure_future(engine.generate([3], request_id="lost"))
            await asyncio.sleep(0)
            steps._scheduler.remove(steps._requests["lost"])
            assert engine.abort("lost")
            assert (await waiting).finish_reason == FinishReason.ABORT
            gate.pass_all()
            assert (await running).token_ids == expected(model, [1], 5)
            await check_pool(engine)

    with caplog.at_level(logging.CRITICAL):
        run(main())


# --- limits


def test_queue_limit() -> None:
    async def main() -> None:
        config = settings(max_running_requests=2, max_queued_requests=1)
        model, gate = gated(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            tasks = [asyncio.ensure_future(engine.generate([i], {"max_new_tokens": 4})) for i in range(3)]
            await gate.wait_held(2)
            with pytest.raises(CapacityError, match="max_queued_requests=1"):
                await engine.generate([9], {"max_new_tokens": 4})
            gate.pass_all()
            for i, task in enumerate(tasks):
                assert (await task).token_ids == expected(model, [i], 4)
            with pytest.raises(CapacityError):  # all or none
                await engine.generate([[i] for i in range(4)])
            assert engine.stats().num_requests == 3
            assert len(await engine.generate([[i] for i in range(3)])) == 3
            await check_pool(engine)

    run(main())


def test_refusals_name_the_numbers() -> None:
    async def main() -> None:
        config = settings(context_length=100)
        model = loaded(config, num_pages=5)  # 80 tokens
        async with AsyncEngine.from_loaded(model, config) as engine:
            with pytest.raises(InvalidRequest, match="100 tokens.*context length of 100"):
                await engine.generate([1] * 100)
            with pytest.raises(InvalidRequest, match="90 tokens.*--max-total-tokens"):
                await engine.generate([1] * 90)
            with pytest.raises(InvalidRequest, match=f"{VOCAB}"):
                await engine.generate([1, VOCAB])
            with pytest.raises(InvalidRequest, match="in use"):
                await asyncio.gather(*(engine.generate([1], request_id="same") for _ in range(2)))
            with pytest.raises(InvalidRequest, match="sampling_params"):
                await engine.generate([[1], [2]], [None])
            await check_pool(engine)
            clipped = await engine.generate([1] * 30, {"max_new_tokens": 500, "ignore_eos": True})
            assert clipped.error is not None  # the pool of 80 tokens ends it before the context of 100 does
            assert clipped.token_ids == expected(model, [1] * 30, len(clipped.token_ids))
        config = settings(context_length=40)
        async with AsyncEngine.from_loaded(loaded(config), config) as engine:
            output = await engine.generate([1] * 30, {"max_new_tokens": None})
            assert len(output.token_ids) == 10
            assert output.finish_reason == FinishReason.LENGTH

    run(main())


# --- faults


def foreign_plan() -> _core.StepPlan:
    """A plan of step 1 that expects row 0 to stand at 4 tokens: the executor refuses it."""
    cache = _core.CacheManager([_core.KvGroup(page_size=16)], [8])
    builder = _core.BatchBuilder(cache, 1)
    row, _, _ = builder.admit(0, np.arange(8, dtype=np.int32), prompt_len=8, max_len=10)
    builder.begin_step(0)
    builder.add_extend(row, 4)
    builder.end_step()
    builder.begin_step(1)
    builder.add_extend(row, 4)
    plan = builder.end_step().plan
    assert plan is not None
    return plan


def test_a_failed_step_ends_its_requests_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        config = settings()
        model, gate = gated(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            doomed = asyncio.ensure_future(engine.generate([1] * 20, {"max_new_tokens": 10}))
            await gate.wait_held(2)
            assert gate.held[1].step_id == 1
            gate.pass_one()
            late = asyncio.ensure_future(engine.generate([2] * 20, {"max_new_tokens": 10}))
            await asyncio.sleep(0)
            gate.pass_one(foreign_plan())
            gate.pass_all()
            output = await doomed
            assert output.finish_reason == FinishReason.ABORT
            assert "the step failed" in str(output.error)
            assert (await late).token_ids == expected(model, [2] * 20, 10)
            again = await engine.generate([1] * 20, {"max_new_tokens": 10})
            assert again.token_ids == expected(model, [1] * 20, 10)
            assert again.usage.cached_tokens == 0  # what a failed row computed is not reused
            await check_pool(engine)

    with caplog.at_level(logging.CRITICAL):
        run(main())


def test_a_broken_sink_hurts_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        config = settings()
        model = loaded(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            stream = engine.generate([1], {"max_new_tokens": 10}, stream=True)

            def broken(output: RequestOutput) -> None:
                raise RuntimeError("sink")

            stream._sink = type("Broken", (type(stream._sink),), {"put": staticmethod(broken)})()
            task = asyncio.ensure_future(anext(stream))
            other = await engine.generate([2], {"max_new_tokens": 10})
            assert other.token_ids == expected(model, [2], 10)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await check_pool(engine)

    with caplog.at_level(logging.CRITICAL + 1):
        run(main())


def test_a_bug_in_the_loop_ends_everything_loudly(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        config = settings()
        model, gate = gated(config)
        async with AsyncEngine.from_loaded(model, config) as engine:
            tasks = [asyncio.ensure_future(engine.generate([i], {"max_new_tokens": 10})) for i in range(3)]

            async def read() -> None:
                async for _ in engine.generate([4], {"max_new_tokens": 10}, stream=True):
                    pass

            waiting = asyncio.ensure_future(read())
            await gate.wait_held(2)

            def bug(*_: Any) -> None:
                raise ZeroDivisionError("a bug of ours")

            loop_of(engine)._planner.build = bug  # type: ignore[method-assign]
            gate.pass_all()
            for task in (*tasks, waiting):
                with pytest.raises(EngineDead, match="a bug of ours"):
                    await task
            with pytest.raises(EngineDead, match="a bug of ours"):
                await engine.generate([1])

    with caplog.at_level(logging.CRITICAL):
        run(main())
    assert any(r.exc_info and r.exc_info[0] is ZeroDivisionError for r in caplog.records)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("place", ["_pump", "_on_events"])
def test_an_interrupt_in_the_loop_is_raised_and_ends_every_request(
    place: str, interrupt: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.new_event_loop()
    config = settings()
    engine = AsyncEngine.from_loaded(loaded(config), config)
    loop.run_until_complete(engine.start())

    def hit(*_: Any) -> None:
        raise interrupt

    if place == "_pump":
        loop_of(engine)._planner.build = hit  # type: ignore[method-assign]
    else:
        loop_of(engine)._commit = hit  # type: ignore[method-assign]
    tasks = [loop.create_task(engine.generate([i], {"max_new_tokens": 10})) for i in range(3)]
    with caplog.at_level(logging.CRITICAL):
        with pytest.raises(interrupt):
            loop.run_until_complete(asyncio.wait(tasks, timeout=10))
        loop.run_until_complete(asyncio.wait(tasks, timeout=10))  # the program chose to go on
    for task in tasks:
        assert isinstance(task.exception(), EngineDead)
    loop.run_until_complete(engine.shutdown())
    loop.run_until_complete(asyncio.sleep(0))
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def test_shutdown_with_requests_alive() -> None:
    async def main() -> None:
        config = settings()
        model, gate = gated(config)
        engine = AsyncEngine.from_loaded(model, config)
        with pytest.raises(EngineDead, match="not started"):
            engine.stats()
        await engine.start()
        await engine.start()
        tasks = [asyncio.ensure_future(engine.generate([i], {"max_new_tokens": 10})) for i in range(3)]
        await gate.wait_held(2)
        await engine.shutdown()
        for task in tasks:
            with pytest.raises(EngineDead, match="shut down"):
                await task
        with pytest.raises(EngineDead, match="shut down"):
            await engine.generate([1])
        await engine.shutdown()

    run(main())


# --- retraction


def test_retracted_request_goes_on_where_it_was() -> None:
    async def main() -> None:
        config = settings(page_size=4, trace_capacity=1000)
        model = loaded(config, num_pages=14)
        async with AsyncEngine.from_loaded(model, config) as engine:
            outputs: list[list[RequestOutput]] = [[], []]

            async def read(i: int) -> None:
                async for output in engine.generate(
                    [i + 1] * 12, {"max_new_tokens": 30}, stream=True, request_id=str(i)
                ):
                    outputs[i].append(output)

            await asyncio.gather(read(0), read(1))
            assert engine.stats().num_retractions >= 1
            for i, parts in enumerate(outputs):
                assert [t for o in parts for t in o.token_ids] == expected(model, [i + 1] * 12, 30)
                assert [o.usage.completion_tokens for o in parts] == list(range(1, 31))  # one each, none twice
                assert {o.usage.prompt_tokens for o in parts} == {12}
                assert sum(o.finish_reason is not None for o in parts) == 1
            await check_pool(engine)

    run(main())


def test_retracted_request_comes_back_before_those_that_wait() -> None:
    async def main() -> None:
        config = settings(page_size=4)
        model = loaded(config, num_pages=14)
        async with AsyncEngine.from_loaded(model, config) as engine:
            planner, admitted = loop_of(engine)._planner, []
            admit = planner._admit

            def watched(req: Any) -> bool:
                done = admit(req)
                if done:
                    admitted.append(req.id)
                return done

            planner._admit = watched  # type: ignore[method-assign]
            names = ["old", "new", "third", "fourth"]
            tasks = [
                asyncio.ensure_future(engine.generate([i + 1] * 12, {"max_new_tokens": 30}, request_id=name))
                for i, name in enumerate(names)
            ]
            for i, task in enumerate(tasks):
                assert (await task).token_ids == expected(model, [i + 1] * 12, 30)
            assert admitted[:3] == names[:3]
            # third was retracted while fourth waited, and is back before fourth gets in at all.
            assert admitted.index("third", 3) < admitted.index("fourth")
            await check_pool(engine)

    run(main())


def test_low_priority_is_retracted_first() -> None:
    async def main() -> None:
        config = settings(page_size=4, schedule_policy="priority")
        model, gate = gated(config, num_pages=18)
        async with AsyncEngine.from_loaded(model, config) as engine:
            gate.pass_all()
            ended: list[str] = []

            async def ask(name: str, priority: int) -> None:
                output = await engine.generate(
                    [len(name)] * 12, {"max_new_tokens": 36}, priority=priority, request_id=name
                )
                assert output.token_ids == expected(model, [len(name)] * 12, 36)
                ended.append(name)

            await asyncio.gather(ask("first", 1), ask("important", 5), ask("low", 0))
            assert engine.stats().num_retractions >= 1
            assert ended[-1] == "low"
            await check_pool(engine)

    run(main())
