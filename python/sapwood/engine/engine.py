"""The step loop: one owner of all state, one step ahead of the executor.

Receives requests from engine/async_engine.py (register, then enqueue with their tokens), StepPlans from engine/plan.py
and StepResults from the executor; hands plans to the executor and outputs (engine/output.py) to each request's sink.

    arrival, abort  -> _wake -> _pump: plan N+1 and submit it before the result of N, so that the executor never waits
    eventfd readable -> _on_events: head of N -> plan N+1 late; result of N -> commit, texts, then _pump

Nothing polls and no timer runs but one for the next deadline, where some live request has one: an idle engine uses no
CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.engine.output import OutputProcessor, TextDecoder
from sapwood.engine.plan import Planner
from sapwood.engine.request_state import Ints, Phase, RequestState
from sapwood.engine.scheduler import Scheduler
from sapwood.errors import CapacityError, EngineDead, InternalError, InvalidRequest, PromptTooLong
from sapwood.memory.prefix_cache import PagePool, make_cache, namespace_id
from sapwood.request import ErrorType, FinishReason

logger = logging.getLogger(__name__)

# Plan late where the head takes at least this long: the host needs ~0.1 ms to plan, five times that is safe.
LATE_HEAD_MS = 0.5
# A head that was over before the loop got to plan (another process had the core) left the executor idle: for so many
# steps planning does not wait for the head.
EARLY_STEPS_AFTER_MISS = 24
# At most one step runs and one waits.
MAX_IN_FLIGHT = 2


class Executor(Protocol):
    """`_core.Executor`, or a Python object that behaves like it (the reference executor)."""

    queued: int

    def submit(self, plan: _core.StepPlan) -> None: ...
    def drain(self) -> list[tuple[str, int, _core.StepResult | None]]: ...
    def fileno(self) -> int: ...
    def wait_idle(self) -> None: ...
    def shutdown(self) -> None: ...


class LoadedModel(Protocol):
    """What models/ hands over: the running executor, and what the loop must know of the model.

    max_step_tokens  query tokens a step may have; more than max_running_requests
    rope_mode        total length of a request -> row of the rope tables, fixed for its life
    cache_salt       stands for the weights and their version in cache namespaces
    """

    executor: Any
    groups: list[_core.KvGroup]
    num_pages: list[int]
    max_step_tokens: int
    vocab_size: int
    context_len: int
    cache_salt: int
    name: str

    @property
    def eos_token_ids(self) -> Sequence[int]: ...
    def rope_mode(self, total_len: int) -> int: ...


class StepRecord(msgspec.Struct):
    """One step in the trace. *_ns: CLOCK_MONOTONIC; the executor's own times are 0 until its result came."""

    step_id: int
    planned_ns: int  # planning was complete
    submit_ns: int
    num_decode_rows: int
    num_extend_tokens: int
    num_kv: int
    num_logit_rows: int
    plan_us: float
    start_ns: int = 0
    head_ns: int = 0
    done_ns: int = 0
    commit_us: float = 0.0
    output_us: float = 0.0
    error: str = ""


class PoolUse(msgspec.Struct, frozen=True):
    """Pages of one KvGroup; free + cached + leased + limbo == total, evictable is part of cached."""

    total: int
    free: int
    cached: int
    leased: int
    limbo: int
    evictable: int


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine at one moment.

    num_steps        steps whose results were taken in: the liveness counter
    step_age_s       seconds since it last moved (or a step was launched into idleness); 0 while no step is in flight
    num_in_flight    steps launched, not yet committed; at most 2
    num_requests     requests registered since the start; num_alive of them have not ended
    num_waiting      requests in the queue; num_running have a row
    prompt_tokens, cached_tokens, output_tokens    of requests that have ended; cached ones are part of the prompt
    plan_us, commit_us    host microseconds a step, mean since the start; output_us: texts and sinks, counted apart
    head_ms          how long the LM head takes at least, mostly; where that is long, planning waits for its start
    step_cost_ms     (a, b, c, d) of the cost model: a step, a token, a KV position, a logit row
    """

    num_steps: int
    step_age_s: float
    num_in_flight: int
    num_requests: int
    num_alive: int
    num_waiting: int
    num_running: int
    num_retractions: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    pool: list[PoolUse]
    plan_us: float
    commit_us: float
    output_us: float
    head_ms: float
    step_cost_ms: tuple[float, ...]


class _Launched:
    __slots__ = ("head_seen", "num_decode_rows", "num_logit_rows", "plan", "record")

    def __init__(self, built: _core.BuiltStep, record: StepRecord | None) -> None:
        self.plan = built.plan
        self.num_decode_rows = built.num_decode_rows
        self.num_logit_rows = built.num_logit_rows
        self.head_seen = False
        self.record = record


class StepLoop:
    """Schedules, launches and commits steps. Not thread safe: every method is called on `loop`'s thread.

    own_process  this process exists for the engine: freeze the garbage collector at the first idle moment after a step,
                 so that full collections do not walk the imported modules

    Every registered request ends with exactly one call that closes its sink: put() of an output with finish_reason, or
    fail().
    """

    def __init__(
        self, model: LoadedModel, config: EngineConfig, *, loop: asyncio.AbstractEventLoop, own_process: bool = False
    ) -> None:
        self._model = model
        self._config = config
        self._loop = loop
        self._executor: Executor = model.executor
        page_size = model.groups[0].page_size
        # Decode rows alone must fit a step, with room for a prompt token.
        max_rows = max(1, min(config.max_running_requests, model.max_step_tokens - 1))
        self.context_len = min(config.context_length or model.context_len, model.context_len)
        self.cache = make_cache(config, model.groups, model.num_pages)
        self.builder = _core.BatchBuilder(self.cache, max_rows)
        self._pool = PagePool(
            self.cache, model.groups, model.num_pages, min(config.chunked_prefill_size, model.max_step_tokens)
        )
        self._scheduler = Scheduler(config, page_size=page_size, max_step_tokens=model.max_step_tokens)
        self._planner = Planner(self.builder, self.cache, self._pool, self._scheduler, max_rows)
        self._eos = tuple(model.eos_token_ids)
        self._overlap = not config.disable_overlap_schedule

        self._requests: dict[str, RequestState] = {}
        self._num_new = 0  # registered, tokens not there yet
        self._in_flight: deque[_Launched] = deque()
        self._next_step = 0
        self._head_ms = 0.0
        self._num_early_steps = 0
        self._head_times: deque[float] = deque(maxlen=16)
        self._wake_pending = False
        self._dead: EngineDead | None = None
        self._closed = False

        self._deadlines: list[tuple[float, int, str]] = []
        self._deadline_no = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._freeze = own_process
        self._frozen = False

        self._trace: deque[StepRecord] | None = (
            deque(maxlen=config.trace_capacity) if config.trace_capacity > 0 else None
        )
        self._num_steps = 0
        self._moved_ns = 0  # when a step was last taken in, or launched into idleness
        self._num_requests = 0
        self._num_prompt_tokens = self._num_cached_tokens = self._num_output_tokens = 0
        self._plan_ns = self._commit_ns = self._output_ns = 0

    # --- life

    def start(self) -> None:
        """Begin listening to the executor."""
        self._loop.add_reader(self._executor.fileno(), self._on_events)

    def close(self, error: EngineDead | None = None) -> None:
        """Stop: every live request fails with EngineDead, no new one is taken. Does not wait for the running step."""
        if self._closed:
            return
        self._closed = True
        self._dead = self._dead or error or EngineDead("the engine was shut down")
        if not self._loop.is_closed():
            self._loop.remove_reader(self._executor.fileno())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        requests, self._requests = list(self._requests.values()), {}
        for req in requests:
            req.phase = Phase.DONE
            try:
                req.sink.fail(self._dead)
            except Exception:
                logger.exception("request %s: its sink raised", req.id)
        self._release_idle_waiters()
        if self._frozen:
            gc.unfreeze()
            self._frozen = False

    def _die(self, problem: BaseException) -> None:
        """A bug of ours, or an executor that is gone: say so, with the traceback, to the log and to every request."""
        logger.critical("the step loop failed; every request ends with EngineDead", exc_info=problem)
        error = EngineDead(f"the step loop failed: {type(problem).__name__}: {problem}")
        error.__cause__ = problem
        self._dead = error
        self.close(error)

    @property
    def is_alive(self) -> bool:
        """Whether requests can be served."""
        return self._dead is None

    def check_alive(self) -> None:
        """Raise EngineDead where no request can be served any more."""
        if self._dead is not None:
            raise EngineDead(str(self._dead)) from self._dead

    # --- requests

    def register(self, req: RequestState) -> None:
        """Take req under its id, in phase NEW: abort and deadline hold from here on; enqueue() must follow.

        Raises EngineDead, CapacityError (queue full), InvalidRequest (the id is in use).
        """
        self.check_alive()
        if req.id in self._requests:
            raise InvalidRequest(f"request_id {req.id!r} is in use by a running request; choose another", "request_id")
        self.check_capacity(1)
        self._requests[req.id] = req
        try:
            if req.deadline is not None:
                self._deadline_no += 1
                heapq.heappush(self._deadlines, (req.deadline, self._deadline_no, req.id))
                self._arm_timer()
        except BaseException:
            del self._requests[req.id]  # its deadline, if noted, finds nobody
            raise
        self._num_new += 1
        self._num_requests += 1

    def check_capacity(self, num_new: int) -> None:
        """Raise CapacityError where num_new more requests exceed max_queued_requests."""
        if self._scheduler.full(num_new, self.builder.num_free_rows, self._num_new):
            raise CapacityError(
                f"the queue is full: {len(self._scheduler) + self._num_new} requests wait, max_queued_requests="
                f"{self._config.max_queued_requests}; retry later or raise --max-queued-requests"
            )

    def enqueue(self, req: RequestState, prompt: Ints, decoder: Callable[[], TextDecoder] | None) -> None:
        """req's tokens are there: check them against the limits, and let it wait for a row.

        Does nothing for a request that has ended meanwhile. A refusal (InvalidRequest) closes the sink and is raised as
        well.
        """
        if req.phase != Phase.NEW:
            return
        try:
            self._fix_limits(req, prompt)
            req.output = OutputProcessor(
                req.id,
                req.params,
                num_prompt=req.num_prompt,
                decoder=decoder() if decoder is not None else None,
                stream=req.stream,
                seed=req.seed,
                index=req.index,
                choice=req.choice,
            )
            self._scheduler.push(req)
        except InvalidRequest as error:
            self.refuse(req, error)
            raise
        except Exception as error:
            logger.warning("request %s failed before admission", req.id, exc_info=error)
            self._end(req, FinishReason.ABORT, f"{type(error).__name__}: {error}")
            return
        self._num_new -= 1
        req.phase = Phase.WAITING
        self._wake()

    def _fix_limits(self, req: RequestState, prompt: Ints) -> None:
        params, length = req.params, len(prompt)
        if length + 1 > self.context_len:
            raise PromptTooLong(
                f"the prompt has {length} tokens, but with a context length of {self.context_len} at most "
                f"{self.context_len - 1} are possible; shorten it, or raise --context-length if the model allows it",
                "prompt",
            )
        if not self._pool.fits_at_all(length + 1):
            raise PromptTooLong(
                f"the prompt has {length} tokens and needs {self._pool.pages_for(length + 1)} pages of "
                f"{self._pool.page_size}, but the KV pool has {min(self._pool.num_pages)} "
                f"({self._pool.capacity_tokens()} tokens); shorten it or raise --max-total-tokens",
                "prompt",
            )
        req.prompt = req.known = prompt
        req.num_prompt = length
        req.max_len = (
            min(self.context_len, length + params.max_new_tokens) if params.max_new_tokens else self.context_len
        )
        req.min_len = length + params.min_new_tokens if params.min_new_tokens else 0
        ids = params.stop_token_ids or ()
        req.stop_ids = tuple(ids) if params.ignore_eos else tuple(dict.fromkeys((*self._eos, *ids)))
        req.rope_mode = self._model.rope_mode(req.max_len)
        req.ns = namespace_id(self._model.cache_salt, req.salt, req.rope_mode)

    def refuse(self, req: RequestState, error: Exception) -> None:
        """req turned out invalid before it was admitted: its sink gets the error, no output."""
        if req.phase == Phase.DONE:
            return
        self._num_new -= 1
        req.phase = Phase.DONE
        self._requests.pop(req.id, None)
        req.sink.fail(error)
        self._note_idle()

    def fail(self, req: RequestState, problem: BaseException) -> None:
        """Something of req's own (its tokenising, say) failed: it ends with ABORT and the error, alone."""
        if req.phase != Phase.DONE:
            logger.warning("request %s failed", req.id, exc_info=problem)
            self._end(req, FinishReason.ABORT, f"{type(problem).__name__}: {problem}")

    def abort(self, request_id: str) -> bool:
        """End a request, or all of a group, wherever they are; False where no such request lives.

        Their pages come free when the running step retires. O(live requests), for a group's id.
        """
        one = self._requests.get(request_id)
        found = [one] if one is not None else [r for r in self._requests.values() if r.group == request_id]
        for req in found:
            self._end(req, FinishReason.ABORT)
        return bool(found)

    def cancel(self, req: RequestState) -> None:
        """As abort(), for a request in hand; nothing where it has ended."""
        self._end(req, FinishReason.ABORT)

    def _end(
        self,
        req: RequestState,
        reason: FinishReason,
        error: str | None = None,
        error_type: ErrorType = ErrorType.INTERNAL,
        *,
        failed: bool = False,
    ) -> None:
        """The one way a request ends with an output. failed: what its row computed is worthless."""
        phase = req.phase
        if phase == Phase.DONE:
            return
        if req.row >= 0:
            self._planner.forget(req, keep=not failed, failed=failed)
            self._wake()  # a row and pages came free
        else:
            if phase == Phase.NEW:
                self._num_new -= 1
            # NEW is not in the queue, WAITING is; an interrupt in enqueue() may have left it otherwise.
            with contextlib.suppress(KeyError):
                self._scheduler.remove(req)
            self._wake()  # who waited behind it may be next
        req.phase = Phase.DONE
        self._requests.pop(req.id, None)
        output = req.output
        if output is None:
            output = req.output = OutputProcessor(
                req.id,
                req.params,
                num_prompt=req.num_prompt,
                decoder=None,
                stream=req.stream,
                seed=req.seed,
                index=req.index,
                choice=req.choice,
            )
        output.finish(reason, error, error_type)
        self._num_output_tokens += len(output.token_ids)
        if req.cached_len >= 0:
            self._num_prompt_tokens += req.num_prompt
            self._num_cached_tokens += req.cached_len
        final = output.take()
        final.timing = req.timing(self._loop.time())
        try:
            req.sink.put(final)
        except Exception:
            logger.exception("request %s: its sink raised", req.id)
        self._note_idle()

    # --- deadlines

    def _arm_timer(self) -> None:
        """Keep exactly one timer, for the earliest deadline of a live request; none where there is none."""
        deadlines, requests = self._deadlines, self._requests
        while deadlines and deadlines[0][2] not in requests:
            heapq.heappop(deadlines)
        if not deadlines:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            return
        when = deadlines[0][0]
        if self._timer is not None and self._timer_s <= when:
            return
        timer = self._loop.call_at(when, self._on_deadline)  # where this raises, the old timer still stands
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_s = timer, when  # kept here: not every loop's handle knows when

    def _on_deadline(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._deadlines and self._deadlines[0][0] <= now:
            when, _, request_id = heapq.heappop(self._deadlines)
            req = self._requests.get(request_id)
            if req is not None and req.deadline == when:
                error = f"deadline: not finished within {when - req.submitted_s:.3g} s"
                self._end(req, FinishReason.ABORT, error, ErrorType.TIMEOUT)
        self._arm_timer()

    # --- the step

    def _wake(self) -> None:
        if not self._wake_pending and self._dead is None:
            self._wake_pending = True
            self._loop.call_soon(self._on_wake)

    def _on_wake(self) -> None:
        self._wake_pending = False
        self._pump()

    def _may_plan(self) -> bool:
        num_in_flight = len(self._in_flight)
        if num_in_flight == 0:
            return True
        if not self._overlap or num_in_flight >= MAX_IN_FLIGHT:
            return False
        # Where the head is long enough to hide the planning, wait for it: what arrives during the forward gets in a
        # step earlier.
        return self._head_ms < LATE_HEAD_MS or self._num_early_steps > 0 or self._in_flight[0].head_seen

    def _pump(self) -> None:
        """Plan and submit as far as allowed."""
        if self._dead is not None:
            return
        try:
            while self._may_plan() and self._planner.has_work():
                if not self._launch() and not self._unblock():
                    if not self._in_flight:
                        # No result will ever wake us: better dead with a name than asleep for ever.
                        raise InternalError(f"nothing to plan and nothing in flight, yet requests live: {self.stats()}")
                    break
        except BaseException as problem:
            self._die(problem)
            if not isinstance(problem, Exception):
                raise  # an interrupt that hit this callback is the program's own

    def _launch(self) -> bool:
        """Plan one step and submit it; False where there was nothing to compute."""
        began = time.monotonic_ns()
        planner = self._planner
        step_id = self._next_step
        self._next_step += 1  # the builder wants a new one even where the last came to nothing
        built = planner.build(step_id, self._loop.time(), len(self._in_flight))
        if built is None:
            self._plan_ns += time.monotonic_ns() - began
            return False
        record = None
        if self._trace is not None:
            planned = time.monotonic_ns()
            record = StepRecord(
                step_id,
                planned,
                0,
                built.num_decode_rows,
                built.num_extend_tokens,
                built.num_kv,
                built.num_logit_rows,
                (planned - began) / 1e3,
            )
            self._trace.append(record)
        launched = _Launched(built, record)
        self._num_early_steps = max(0, self._num_early_steps - 1)
        if not self._in_flight:
            self._moved_ns = began
        self._in_flight.append(launched)
        self._executor.submit(launched.plan)  # type: ignore[arg-type]
        ended = time.monotonic_ns()
        if record is not None:
            record.submit_ns = ended
        self._plan_ns += ended - began
        self._end_failures()
        return True

    def _unblock(self) -> bool:
        """Planning found nothing to do: end who cannot go on, requeue who has drained. Whether to plan again."""
        failed = self._end_failures()
        return self._planner.requeue_drained() or failed

    def _end_failures(self) -> bool:
        failures = self._planner.failures
        if not failures:
            return False
        self._planner.failures = []
        for req, error, error_type in failures:
            self._end(req, FinishReason.ABORT, error, error_type)
        return True

    def _on_events(self) -> None:
        """The executor's eventfd is readable."""
        if self._dead is not None:
            return
        try:
            late_head = -1
            for kind, step_id, result in self._executor.drain():
                if kind == "head":
                    late_head = step_id
                    for launched in self._in_flight:
                        if launched.plan.step_id == step_id:  # type: ignore[union-attr]
                            launched.head_seen = True
                else:
                    assert result is not None
                    if step_id == late_head and self._head_ms >= LATE_HEAD_MS:
                        self._num_early_steps = EARLY_STEPS_AFTER_MISS
                    self._commit(result)
        except BaseException as problem:
            self._die(problem)
            if not isinstance(problem, Exception):
                raise  # as in _pump
            return
        self._pump()
        self._note_idle()

    def _commit(self, result: _core.StepResult) -> None:
        """Take a step's result in: tokens to texts, texts to sinks, ended rows back to the builder."""
        began = time.monotonic_ns()
        launched = self._in_flight.popleft()
        planner = self._planner
        rows, tokens, flags, logprobs = self.builder.commit(result)
        self._num_steps += 1
        self._moved_ns = began
        if result.error:
            self._fail_step(launched, result.error)
        else:
            done, head = result.done_ns, result.head_ns
            self._scheduler.cost.observe(
                result.num_tokens,
                result.num_kv,
                result.num_logit_rows,
                launched.num_decode_rows,
                (done - result.start_ns) / 1e6,
            )
            if launched.num_logit_rows:
                # The lower quartile of the last few: a head that was merely interrupted once is not a long head.
                heads = self._head_times
                heads.append((done - head) / 1e6)
                self._head_ms = sorted(heads)[len(heads) // 4]
        committed = time.monotonic_ns()
        if rows:
            self._take_tokens(rows, tokens, flags, logprobs)
        spoken = time.monotonic_ns()
        if planner.draining:
            planner.requeue_drained()
        self._commit_ns += committed - began
        self._output_ns += spoken - committed
        record = launched.record
        if record is not None:
            record.start_ns, record.head_ns, record.done_ns = result.start_ns, result.head_ns, result.done_ns
            record.commit_us, record.output_us = (committed - began) / 1e3, (spoken - committed) / 1e3
            record.error = result.error

    def _take_tokens(self, rows: list[int], tokens: list[int], flags: list[int], logprobs: list[float]) -> None:
        planner = self._planner
        by_row = planner.by_row
        decode, bad_logits, ended = Phase.DECODE, _core.BAD_LOGITS, _core.FINISHED_STOP | _core.FINISHED_LENGTH
        num_bad = 0
        now = self._loop.time()
        for row, token, flag, logprob in zip(rows, tokens, flags, logprobs, strict=True):
            req = by_row[row]
            if req is None:
                continue
            if flag & bad_logits:
                num_bad += 1
                output_len = req.num_tokens
                self._end(
                    req,
                    FinishReason.ABORT,
                    f"the logits at position {output_len} hold NaN, or no finite value at all",
                    failed=True,
                )
                continue
            if token < 0:
                continue
            output = req.output
            assert output is not None
            if not req.first_token_s:
                req.first_token_s = now
            if req.phase is decode:
                planner.decode_kv += 1
            try:
                if output.push(token, flag, logprob) or flag & ended:
                    self._end(req, output.finish_reason or FinishReason.LENGTH)
                elif req.stream:
                    req.sink.put(output.take())
            except Exception as problem:  # this request's own trouble (detokenizer, sink): the others go on
                logger.warning("request %s failed", req.id, exc_info=problem)
                self._end(req, FinishReason.ABORT, f"{type(problem).__name__}: {problem}")
        if num_bad:
            planner.drain_invalid()

    def _fail_step(self, launched: _Launched, error: str) -> None:
        """The whole step failed: its requests end, the engine lives on."""
        logger.error("step %d failed: %s", launched.plan.step_id, error)  # type: ignore[union-attr]
        for row, gen, *_ in launched.plan.items():  # type: ignore[union-attr]
            req = self._planner.by_row[row]
            if req is not None and self.builder.gen(row) == gen:
                self._end(req, FinishReason.ABORT, f"the step failed: {error}", failed=True)
        self._planner.drain_invalid()

    # --- idleness

    def _is_idle(self) -> bool:
        return not self._requests and not self._in_flight

    def _note_idle(self) -> None:
        if self._requests or self._in_flight:
            return
        if self._deadlines:
            self._arm_timer()
        self._release_idle_waiters()
        if self._freeze and self._num_steps and not self._frozen and self._dead is None:
            self._frozen = True
            gc.freeze()

    def _release_idle_waiters(self) -> None:
        waiters, self._idle_waiters = self._idle_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_idle(self) -> None:
        """Return once no request lives and no step is in flight."""
        if self._dead is None and not self._is_idle():
            waiter = self._loop.create_future()
            self._idle_waiters.append(waiter)
            await waiter

    # --- looking in

    def flush_cache(self) -> int:
        """Drop every cached page no row uses; returns how many."""
        return self.cache.flush()

    def trace(self) -> list[StepRecord]:
        """The last `trace_capacity` steps, oldest first; empty where the setting is 0."""
        return list(self._trace) if self._trace is not None else []

    def stats(self) -> EngineStats:
        """Counters since the start, gauges of this moment, host microseconds per step."""
        steps = max(1, self._num_steps)
        pools = [self.cache.stats(group) for group in range(len(self._model.groups))]
        return EngineStats(
            num_steps=self._num_steps,
            step_age_s=(time.monotonic_ns() - self._moved_ns) / 1e9 if self._in_flight else 0.0,
            num_in_flight=len(self._in_flight),
            num_requests=self._num_requests,
            num_alive=len(self._requests),
            num_waiting=len(self._scheduler),
            num_running=self._planner.num_rows,
            num_retractions=self._planner.num_retractions,
            prompt_tokens=self._num_prompt_tokens,
            cached_tokens=self._num_cached_tokens,
            output_tokens=self._num_output_tokens,
            pool=[PoolUse(p.total, p.free, p.cached, p.leased, p.limbo, p.evictable) for p in pools],
            plan_us=self._plan_ns / steps / 1e3,
            commit_us=self._commit_ns / steps / 1e3,
            output_us=self._output_ns / steps / 1e3,
            head_ms=self._head_ms,
            step_cost_ms=tuple(self._scheduler.cost.solve()),
        )


def as_prompt(ids: Any, vocab_size: int) -> Ints:
    """Token ids as an int32 array of our own: the caller may write to the one it gave at any time.

    Raises InvalidRequest unless they are a non-empty sequence of integers in [0, vocab_size).
    """
    try:
        array = np.array(ids, order="C")
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"prompt must be a list of token ids: {error}", "prompt") from None
    if array.ndim != 1 or array.size == 0:
        raise InvalidRequest(f"prompt must be a non-empty list of token ids, got shape {array.shape}", "prompt")
    if array.dtype.kind not in "iu" or (isinstance(ids, (list, tuple)) and bool in set(map(type, ids))):
        raise InvalidRequest(f"prompt must be a list of integers, got {array.dtype} or booleans", "prompt")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        raise InvalidRequest(f"prompt token ids must be in [0, {vocab_size}), got {low if low < 0 else high}", "prompt")
    return array.astype(np.int32, copy=False)
