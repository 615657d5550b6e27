"""Policy, and nothing else: who waits, who is next, how much of a step prompts may take, who gives memory back.

Receives arrivals and retracted requests from engine/engine.py and step costs through engine/cost_model.py;
engine/plan.py asks it for every decision and carries them out. No native call, no clock, no asyncio: times are
arguments, so that a test or a simulation can run it under a virtual clock.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from sapwood.config import EngineConfig
from sapwood.engine.cost_model import CostModel
from sapwood.engine.request_state import RequestState

# lpm: above so many waiting requests matching every one costs more than a better order brings (SGLang's number).
LPM_MAX_QUEUE = 128
# lpm: who has waited so long goes first, in order of arrival, however short its prefix.
LPM_MAX_WAIT_S = 30.0
# Waiting requests looked at in one step beyond the first that could not be admitted only because it follows a leader.
MAX_FOLLOWERS = 64


class StepBudget:
    """What one step may still take of prompts: tokens always, milliseconds only where some row decodes.

    Hands out at least `min_tokens` once, so that a step already over its time cannot starve prefill.
    """

    __slots__ = ("_a_b_c_d", "_left_ms", "_min_tokens", "tokens")

    def __init__(
        self, max_tokens: int, min_tokens: int, left_ms: float, coefficients: Sequence[float] = (0.0, 0.0, 0.0, 0.0)
    ) -> None:
        self.tokens = max_tokens
        self._min_tokens = min_tokens
        self._left_ms = left_ms
        self._a_b_c_d = coefficients

    def allow(self, planned_len: int, want: int) -> int:
        """How many of `want` tokens a prompt that stands at planned_len may compute in this step."""
        allowed = min(want, self.tokens)
        if self._left_ms != math.inf:
            _, b, c, d = self._a_b_c_d
            # The row's KV is read once per step however many queries it has; the last chunk has a logit row: count it
            # always.
            left = self._left_ms - c * planned_len - d
            per_token = b + c
            affordable = int(left / per_token) if left > 0 and per_token > 0 else (self.tokens if left > 0 else 0)
            allowed = min(allowed, max(affordable, self._min_tokens))
        return max(0, allowed)

    def charge(self, planned_len: int, num_tokens: int) -> None:
        """num_tokens were planned for a prompt that stood at planned_len."""
        _, b, c, d = self._a_b_c_d
        self.tokens -= num_tokens
        self._left_ms -= b * num_tokens + c * (planned_len + num_tokens) + d
        self._min_tokens = max(0, self._min_tokens - num_tokens)


class Scheduler:
    """The waiting queue and the rules. Not thread safe; owned by the loop.

    Invariants: the queue is sorted by `order` and holds exactly the requests in phase WAITING; a request's seq is given
    once, at its first push, and is its age for ever after.
    """

    def __init__(
        self, config: EngineConfig, *, page_size: int, max_step_tokens: int, cost: CostModel | None = None
    ) -> None:
        self.cost = cost if cost is not None else CostModel()
        self._policy = config.schedule_policy
        self._ageing_s = config.priority_ageing_s
        self._chunk_tokens = min(config.chunked_prefill_size, max_step_tokens)
        self._max_step_tokens = max_step_tokens
        self._max_step_ms = config.max_step_ms
        self._max_queued = config.max_queued_requests
        self._page_size = page_size
        self._queue: list[RequestState] = []
        self._next_seq = 0
        # Requests a planning pass has seen and left behind: newcomers queue up after them.
        self._num_stuck = 0

    def __len__(self) -> int:
        return len(self._queue)

    # --- the queue

    def push(self, req: RequestState) -> None:
        """A new request waits. O(log queue) comparisons."""
        req.seq = self._next_seq
        self._next_seq += 1
        key = 0.0
        if self._policy == "priority":
            # effective = priority + waited / ageing. All wait at the same rate, so who is ahead never changes: a static
            # key.
            key = req.submitted_s / self._ageing_s - req.priority
        req.order = (key, req.seq)
        bisect.insort(self._queue, req, key=_order)

    def push_again(self, req: RequestState) -> None:
        """A retracted request waits again, in its old place: first among its equals, behind a higher priority."""
        bisect.insort(self._queue, req, key=_order)

    def remove(self, req: RequestState) -> None:
        """Take a waiting request out (admitted, or ended). O(log queue) comparisons."""
        at = bisect.bisect_left(self._queue, req.order, key=_order)
        if at == len(self._queue) or self._queue[at] is not req:
            raise KeyError(f"request {req.id!r} does not wait")
        del self._queue[at]
        self._num_stuck = min(self._num_stuck, len(self._queue))

    def full(self, num_new: int, num_free_rows: int, num_tokenising: int = 0) -> bool:
        """Whether num_new more would exceed max_queued_requests.

        A request counts as queued once it cannot start at once: behind others that a planning pass left waiting, or
        beyond the free rows.
        """
        if self._max_queued is None:
            return False
        waiting = len(self._queue) + num_tokenising + num_new
        queued = waiting if self._num_stuck else max(0, waiting - num_free_rows)
        return queued > self._max_queued

    def peek(self) -> RequestState | None:
        return self._queue[0] if self._queue else None

    def urgent(self, foremost: RequestState) -> RequestState | None:
        """The waiting request whose priority puts it before the foremost prefill; None where there is none."""
        waiting = self.peek()
        if self._policy == "priority" and waiting is not None and waiting.order < foremost.order:
            return waiting
        return None

    def end_pass(self) -> None:
        """A planning pass is over: who still waits is stuck."""
        self._num_stuck = len(self._queue)

    def candidates(
        self, now: float, match_many: Callable[[Sequence[RequestState]], list[int]]
    ) -> Iterator[RequestState]:
        """Waiting requests, best first. match_many: cached prefix lengths, asked for by lpm only.

        The caller may remove the request it was given, and stops at the first it cannot admit for want of memory:
        overtaking would starve the large ones.
        """
        queue = list(self._queue) if len(self._queue) <= LPM_MAX_QUEUE else self._queue[:LPM_MAX_QUEUE]
        if self._policy == "lpm" and 1 < len(self._queue) <= LPM_MAX_QUEUE:
            first = [r for r in queue if r.num_retractions or now - r.submitted_s >= LPM_MAX_WAIT_S]
            ahead = set(map(id, first))
            rest = [r for r in queue if id(r) not in ahead]
            matched = dict(zip(map(id, rest), match_many(rest), strict=True))
            rest.sort(key=lambda r: -matched[id(r)])  # stable: arrival order among equals
            queue = first + rest
        return iter(queue)

    # --- the step

    def budget(self, num_decode_rows: int, decode_kv: int) -> StepBudget:
        """The room for prompts in a step that decodes num_decode_rows rows over decode_kv KV positions."""
        tokens = min(self._chunk_tokens, self._max_step_tokens - num_decode_rows)
        if num_decode_rows == 0 or self._max_step_ms <= 0:
            return StepBudget(tokens, self._page_size, math.inf)
        a, b, c, d = coefficients = self.cost.solve()
        left = self._max_step_ms - (a + b * num_decode_rows + c * decode_kv + d * num_decode_rows)
        return StepBudget(tokens, self._page_size, left, coefficients)

    def share(self, budget: StepBudget, req: RequestState, others_want: int) -> int:
        """How many tokens req's prompt takes of what is left, others_want being what all behind it could use.

        A prompt too long for this step leaves up to half of what it could have to those behind it, each of which does
        the same: several prefills are in flight, and a short prompt gets through beside long ones.
        """
        want = len(req.known) - req.planned_len
        allowed = budget.allow(req.planned_len, want)
        if allowed < want and others_want > 0:
            allowed -= min(others_want, allowed // 2)
        return allowed

    # --- memory

    def reserve_pages(self, req: RequestState, num_running: int) -> int:
        """Pages to keep free for the running rows when admitting req.

        One each; twice as many for each time req was retracted, or it would be back in, and out again, at every page.
        """
        return num_running << min(req.num_retractions, 6)

    def victims(self, running: Iterable[RequestState], pages_wanted: int) -> list[RequestState]:
        """Who gives memory back so that pages_wanted become free: lowest priority, then newest; never the oldest.

        Empty when only the oldest runs.
        """
        by_age = sorted(running, key=lambda r: r.seq)
        chosen: list[RequestState] = []
        freed = 0
        for req in sorted(by_age[1:], key=lambda r: (r.priority, -r.seq)):
            if freed >= pages_wanted:
                break
            chosen.append(req)
            # Its own pages; those it shares stay locked by the others.
            freed += max(1, (req.num_tokens - max(0, req.cached_len)) // self._page_size)
        return chosen


def _order(req: RequestState) -> tuple[float, int]:
    return req.order
