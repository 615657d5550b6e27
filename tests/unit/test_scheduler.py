"""engine/scheduler.py and engine/cost_model.py: policy under a virtual clock, no native core behind it."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from sapwood.config import EngineConfig
from sapwood.engine.cost_model import FIRST_GUESS, CostModel
from sapwood.engine.request_state import RequestState
from sapwood.engine.scheduler import LPM_MAX_WAIT_S, Scheduler, StepBudget
from sapwood.request import SamplingParams


class NoSink:
    def put(self, output: Any) -> None: ...
    def fail(self, error: Exception) -> None: ...


def request(name: str, *, length: int = 10, priority: int = 0, at: float = 0.0) -> RequestState:
    req = RequestState(name, SamplingParams(), NoSink(), stream=False, seed=0, priority=priority, submitted_s=at)
    req.prompt = req.known = np.arange(length, dtype=np.int32)
    req.num_prompt = length
    return req


def scheduler(**settings: Any) -> Scheduler:
    return Scheduler(EngineConfig.from_kwargs("m", **settings), page_size=16, max_step_tokens=4096)


def names(s: Scheduler, now: float = 0.0, match: dict[str, int] | None = None) -> list[str]:
    return [r.id for r in s.candidates(now, lambda reqs: [(match or {})[r.id] for r in reqs])]


# --- the queue


def test_fcfs_and_retracted_first() -> None:
    s = scheduler()
    a, b, c, d = (request(n) for n in "abcd")
    for r in (a, b, c, d):
        s.push(r)
    assert names(s) == ["a", "b", "c", "d"]
    s.remove(b)
    s.remove(a)
    s.push_again(b)  # retracted in this order; the older one is ahead all the same
    s.push_again(a)
    assert names(s) == ["a", "b", "c", "d"]
    with pytest.raises(KeyError):
        s.remove(request("x"))
    assert len(s) == 4


def test_priority_ages() -> None:
    s = scheduler(schedule_policy="priority", priority_ageing_s=10.0)
    s.push(request("low", priority=0, at=0.0))
    s.push(request("high", priority=2, at=5.0))
    s.push(request("late", priority=2, at=19.0))
    s.push(request("later", priority=2, at=21.0))
    # low has waited 20 s = two levels when one of priority 2 arrives at 20.
    assert names(s) == ["high", "late", "low", "later"]


def test_a_retracted_request_does_not_pass_a_higher_priority() -> None:
    s = scheduler(schedule_policy="priority")
    low, equal, high = request("low"), request("equal"), request("high", priority=1000)
    s.push(low)
    s.remove(low)
    s.push(equal)
    s.push(high)
    s.push_again(low)
    assert names(s) == ["high", "low", "equal"]


def test_urgent_is_who_precedes_the_foremost_prefill() -> None:
    s = scheduler(schedule_policy="priority")
    running = request("running", priority=1)
    s.push(running)
    s.remove(running)
    assert s.urgent(running) is None
    s.push(request("equal", priority=1))
    assert s.urgent(running) is None
    s.push(request("high", priority=2))
    urgent = s.urgent(running)
    assert urgent is not None and urgent.id == "high"
    other = scheduler()  # fcfs knows no urgency, not even for one that was retracted
    other.push(old := request("old"))
    other.push(new := request("new"))
    other.remove(new)
    assert old.order < new.order and other.urgent(new) is None


def test_lpm_prefers_the_cached_but_not_for_ever() -> None:
    s = scheduler(schedule_policy="lpm")
    for name in "abc":
        s.push(request(name, at=0.0))
    match = {"a": 0, "b": 64, "c": 32, "d": 128}
    assert names(s, 1.0, match) == ["b", "c", "a"]
    s.push(request("d", at=LPM_MAX_WAIT_S))
    assert names(s, LPM_MAX_WAIT_S + 1, match) == ["a", "b", "c", "d"]
    back = request("r", at=LPM_MAX_WAIT_S)
    s.push(back)
    s.remove(back)
    back.num_retractions = 1
    s.push_again(back)
    assert names(s, 1.0, match) == ["r", "d", "b", "c", "a"]


def test_lpm_gives_up_on_a_long_queue() -> None:
    s = scheduler(schedule_policy="lpm")
    for i in range(129):
        s.push(request(str(i)))
    assert names(s)[:3] == ["0", "1", "2"]  # match_many, which knows no such names, was not asked


def test_queue_limit() -> None:
    s = scheduler(max_queued_requests=2)
    assert not s.full(1, 1)
    assert not s.full(3, 1)  # one starts, two wait
    assert s.full(4, 1)
    for name in "ab":
        s.push(request(name))
    assert not s.full(1, 1)
    assert s.full(1, 0)
    s.end_pass()  # a planning pass left them waiting: free rows do not help, memory is short
    assert s.full(1, 5)
    assert not scheduler().full(10**6, 0)
    none = scheduler(max_queued_requests=0)
    assert not none.full(1, 1)
    assert none.full(1, 0)
    assert none.full(1, 1, num_tokenising=1)


# --- the budget


def test_chunk_cap_always_time_only_while_decoding() -> None:
    s = scheduler(chunked_prefill_size=100, max_step_ms=50.0)
    alone = s.budget(0, 0)
    assert alone.allow(0, 1000) == 100
    beside = s.budget(4, 400)
    assert 0 < beside.allow(0, 1000) < 100  # the first guess is slow: 2 ms a token
    assert scheduler(chunked_prefill_size=100, max_step_ms=0).budget(4, 400).allow(0, 1000) == 100


def test_max_step_tokens_leaves_room_for_decodes() -> None:
    s = Scheduler(
        EngineConfig.from_kwargs("m", chunked_prefill_size=64, max_step_ms=0), page_size=16, max_step_tokens=64
    )
    assert s.budget(60, 0).allow(0, 1000) == 4


def test_a_step_over_its_time_still_moves_prefill_by_a_page() -> None:
    s = scheduler(max_step_ms=1.0)  # less than the first guess for an empty step
    budget = s.budget(8, 10_000)
    assert budget.allow(500, 1000) == 16
    budget.charge(500, 16)
    assert budget.allow(0, 1000) == 0  # once, not for every prompt


def test_budget_is_charged_for_several_prompts() -> None:
    budget = StepBudget(1000, 1, 100.0, (0.0, 1.0, 0.0, 10.0))
    first = budget.allow(0, 50)
    assert first == 50
    budget.charge(0, first)
    assert budget.allow(0, 50) == 30  # 100 - (50 + 10) - 10
    budget.charge(0, 30)
    assert budget.allow(0, 50) == 0


def test_kv_costs_time_too() -> None:
    costs = (0.0, 1.0, 0.01, 0.0)
    near = StepBudget(10_000, 1, 100.0, costs).allow(0, 10_000)
    far = StepBudget(10_000, 1, 100.0, costs).allow(5000, 10_000)
    assert near == 99  # 100 / 1.01
    assert far == 49  # 5000 positions cost half of it


def test_long_prompt_leaves_half_to_those_behind() -> None:
    s = scheduler(chunked_prefill_size=100)
    long = request("long", length=1000)
    assert s.share(s.budget(0, 0), long, others_want=0) == 100
    assert s.share(s.budget(0, 0), long, others_want=10) == 90
    assert s.share(s.budget(0, 0), long, others_want=10_000) == 50
    assert s.share(s.budget(0, 0), request("short", length=100), others_want=10_000) == 100  # it ends in this step


# --- retraction


def test_victims() -> None:
    s = scheduler()
    reqs = [request(n, length=64, priority=p) for n, p in (("old", -5), ("mid", 0), ("important", 3), ("new", 0))]
    for r in reqs:
        s.push(r)
    assert [r.id for r in s.victims(reqs, 1)] == ["new"]
    assert [r.id for r in s.victims(reqs, 5)] == ["new", "mid"]
    # Everybody but the oldest, however low its priority: somebody must get to the end.
    assert [r.id for r in s.victims(reqs, 1000)] == ["new", "mid", "important"]
    assert s.victims(reqs[:1], 1) == []
    assert s.victims([], 1) == []


def test_victims_count_only_pages_of_their_own() -> None:
    s = scheduler()
    reqs = [request(n, length=64) for n in "abc"]
    for r in reqs:
        s.push(r)
        r.cached_len = 64  # all shared: retracting one frees next to nothing
    assert [r.id for r in s.victims(reqs, 2)] == ["c", "b"]


def test_retracted_needs_more_room_each_time() -> None:
    s = scheduler()
    req = request("a")
    reserves = []
    for n in range(4):
        req.num_retractions = n
        reserves.append(s.reserve_pages(req, 3))
    assert reserves == [3, 6, 12, 24]
    assert s.reserve_pages(req, 0) == 0  # alone it may always come in


# --- the cost model


def truth(a: float, b: float, c: float, d: float):
    return lambda tokens, kv, rows: a + b * tokens + c * kv + d * rows


def feed(model: CostModel, cost: Any, rng: random.Random, steps: int, noise: float = 0.03, extend: float = 0.3) -> None:
    for _ in range(steps):
        rows = rng.randrange(0, 32)
        chunk = rng.randrange(1, 512) if rows == 0 or rng.random() < extend else 0
        tokens, kv = rows + chunk, rows * rng.randrange(100, 2000) + chunk
        logits = rows + (rng.random() < 0.5 if chunk else 0)
        ms = cost(tokens, kv, logits) * rng.uniform(1 - noise, 1 + noise)
        model.observe(tokens, kv, logits, rows, ms)
    model.solve()


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_cost_model_learns(scale: float) -> None:
    cost = truth(4 * scale, 0.5 * scale, 0.0004 * scale, 0.3 * scale)
    model = CostModel()
    feed(model, cost, random.Random(1), 300)
    for tokens, kv, rows in ((1, 500, 1), (16, 16_000, 16), (512, 512, 1), (300, 20_000, 12)):
        assert model.predict(tokens, kv, rows) == pytest.approx(cost(tokens, kv, rows), rel=0.15)
    assert all(c >= 0 for c in model.solve())


def test_first_guess_is_slow() -> None:
    model = CostModel()
    assert model.predict(100, 100, 1) >= 200.0
    assert tuple(model.solve()) == FIRST_GUESS


def test_thousand_decodes_do_not_forget_what_a_prompt_costs() -> None:
    cost = truth(8.0, 2.0, 0.0, 0.0)
    model = CostModel()
    rng = random.Random(2)
    feed(model, cost, rng, 100)
    for _ in range(2000):  # memory-bound decodes, all alike: their ten rows might as well cost 0.05 ms each
        model.observe(10, 5000, 10, 10, 8.5)
    model.solve()
    assert model.predict(500, 500, 1) > 700.0  # truth: 1008


def test_one_stall_moves_little_a_lasting_change_all() -> None:
    cost = truth(5.0, 0.5, 0.0, 0.2)
    model = CostModel()
    rng = random.Random(4)
    feed(model, cost, rng, 200)
    before = model.predict(200, 200, 1)
    model.observe(200, 200, 1, 0, 60_000.0)
    model.solve()
    assert model.predict(200, 200, 1) < 1.2 * before
    slower = truth(15.0, 1.5, 0.0, 0.6)
    feed(model, slower, rng, 200)
    assert model.predict(200, 200, 1) == pytest.approx(slower(200, 200, 1), rel=0.2)


def test_coefficients_never_negative() -> None:
    model = CostModel()
    rng = random.Random(5)
    for _ in range(500):
        rows = rng.randrange(1, 20)
        model.observe(rows + rng.randrange(0, 9), rng.randrange(1, 5000), rows, rows, rng.uniform(1.0, 20.0))
        assert min(model.solve()) >= 0.0
    assert all(math.isfinite(c) for c in model.solve())


def test_budget_under_the_learned_model_keeps_the_step_short() -> None:
    """A simulation: prompts arrive while 8 rows decode; no step beyond the first few exceeds max_step_ms by much."""
    cost = truth(20.0, 1.0, 0.001, 0.5)
    s = scheduler(max_step_ms=100.0, chunked_prefill_size=2048)
    rng = random.Random(6)
    over = []
    for step in range(300):
        budget = s.budget(8, 8000)
        want = 0 if step % 3 == 0 else 5000
        chunk = budget.allow(0, want) if want else 0
        ms = cost(8 + chunk, 8000 + chunk, 8) * rng.uniform(0.95, 1.05)
        s.cost.observe(8 + chunk, 8000 + chunk, 8, 8, ms)
        if step >= 20:
            over.append(ms)
    assert max(over) < 120.0
    assert sum(ms > 80.0 for ms in over) >= 150  # and the time is used
