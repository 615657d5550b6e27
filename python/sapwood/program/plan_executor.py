"""The executor of a model that Python runs node by node: device "reference". (Device "cuda" has one of its own,
cuda_executor.py: its rows are not on the host.)

models/loader.py puts a model into it; engine/ submits StepPlans as it does to _core.Executor, and hears of results by
an eventfd.

    PreparedBatch   what one forward reads
    Model           what runs one
    PlanExecutor    the thread that takes plans in order
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sapwood.errors import InvalidRequest

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreparedBatch:
    """What one forward reads: _core.RowTable.prepare's arrays (see cpp/batch/row_table.h), or `solo`'s.

    tokens, positions   [T]
    segments            (row, item, q_begin, q_len, kv_len after this step, rope_mode) of each live item
    slots               per group: [T] page * page_size + offset, where each token's KV goes
    page_tables         [group][segment]: page ids by absolute page index, -1 below a window
    logit_src           [L] query tokens that yield logits; -1: the hidden state kept of the row
    logit_rows          [L] the executor's row that each belongs to
    logit_masked        [L] whether its hidden state must be kept: its mask may be late
    """

    tokens: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    segments: Sequence[tuple[int, int, int, int, int, int]]
    slots: Sequence[np.ndarray[Any, Any]]
    page_tables: Sequence[Sequence[np.ndarray[Any, Any]]]
    logit_src: np.ndarray[Any, Any]
    copies: Sequence[tuple[int, int, int]] = ()
    logit_rows: Sequence[int] | np.ndarray[Any, Any] = ()
    logit_masked: Sequence[int] | np.ndarray[Any, Any] = ()

    @classmethod
    def from_prepared(cls, prepared: Mapping[str, Any]) -> PreparedBatch:
        return cls(**{f.name: prepared[f.name] for f in dataclasses.fields(cls)})

    @classmethod
    def solo(
        cls,
        tokens: Sequence[int],
        *,
        num_groups: int = 1,
        page_size: int = 16,
        past: int = 0,
        rope_mode: int = 0,
        all_logits: bool = True,
    ) -> PreparedBatch:
        """One row's tokens after `past` earlier ones, in pages 0, 1, 2, ... of every group; logits of all tokens or
        the last.
        """
        count = len(tokens)
        positions = np.arange(past, past + count)
        table = np.arange(-(-(past + count) // page_size))
        return cls(
            np.asarray(tokens),
            positions,
            [(0, 0, 0, count, past + count, rope_mode)],
            [positions] * num_groups,
            [[table]] * num_groups,
            np.arange(count) if all_logits else np.array([count - 1]),
        )


class Model(Protocol):
    """A program with its weights and KV pool. What `run` returns is `sample`'s business alone."""

    def run(self, batch: PreparedBatch, *, on_head: Callable[[], None] | None = None) -> Any:
        """One step: its logits [L, vocab]. Calls on_head when the head segment begins."""
        ...

    def sample(self, rows: Any, plan: Any, prepared: dict[str, Any], logits: Any) -> Any:
        """Draw a token of each logit row and commit it to its row (_core.RowTable): the StepResult."""
        ...


@dataclasses.dataclass(frozen=True)
class Trace:
    """As _core.StepTrace: when a step was handed over, began, reached the head and was done (CLOCK_MONOTONIC ns)."""

    step_id: int
    submit_ns: int
    start_ns: int
    head_ns: int
    done_ns: int
    num_extend_items: int
    num_decode_items: int


class PlanExecutor:
    """_core.Executor's interface around a Model: one thread takes StepPlans in order and reports through an eventfd.

    Rows, sampling and results are the core's (_core.RowTable). Thread safety: as _core.Executor, one caller.
    """

    def __init__(self, model: Model, rows: Any, *, trace_capacity: int = 0) -> None:
        """rows: a _core.RowTable of the same groups, owned by this executor from now on."""
        self._model = model
        self._rows = rows
        self._plans: queue.SimpleQueue[tuple[Any, int] | None] = queue.SimpleQueue()
        self._events: list[tuple[str, int, Any]] = []
        self._lock = threading.Condition()
        self._queued = 0
        self._last_step = -1
        self._traces: collections.deque[Trace] = collections.deque(maxlen=trace_capacity)
        self._trace_capacity = trace_capacity
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="sapwood-executor", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Steps submitted and not done."""
        with self._lock:
            return self._queued

    def post_mask(self, row: int, gen: int, position: int, bits: np.ndarray[Any, Any]) -> None:
        """As _core.Executor.post_mask. Raises InvalidRequest."""
        self._rows.post_mask(row, gen, position, bits)

    def submit(self, plan: Any) -> None:
        """Queue a StepPlan. Raises InvalidRequest unless step_id grows, and after shutdown."""
        with self._lock:
            if self._stopped:
                raise InvalidRequest("the executor has been shut down")
            if plan.step_id <= self._last_step:
                raise InvalidRequest(f"step_id must grow: got {plan.step_id} after {self._last_step}")
            self._last_step = plan.step_id
            self._queued += 1
        self._plans.put((plan, time.monotonic_ns()))

    def drain(self) -> list[tuple[str, int, Any]]:
        """("head" | "result", step_id, result) since the last call; clears the eventfd. Never blocks."""
        with self._lock:
            events, self._events = self._events, []
            with contextlib.suppress(BlockingIOError, OSError):
                os.eventfd_read(self._fd)
        return events

    def fileno(self) -> int:
        """Readable while events wait. Owned by the executor."""
        return self._fd

    def wait_idle(self) -> None:
        """Block until every submitted step is done."""
        with self._lock:
            self._lock.wait_for(lambda: self._queued == 0)

    def shutdown(self) -> None:
        """Drop queued steps, wait for the running one, close the eventfd. Idempotent."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        self._plans.put(None)
        self._thread.join()
        os.close(self._fd)

    def take_trace(self) -> list[Trace]:
        with self._lock:
            traces = list(self._traces)
            self._traces.clear()
        return traces

    def recorded_plans(self) -> list[bytes]:
        """The native executor's flight recorder; this one keeps none."""
        return []

    def _loop(self) -> None:
        while (item := self._plans.get()) is not None:
            plan, submitted = item
            if self._stopped:
                self._report(None, done=True)
                continue
            started = time.monotonic_ns()
            head = [started]

            def on_head(plan: Any = plan, head: list[int] = head) -> None:
                head[0] = time.monotonic_ns()
                self._report(("head", plan.step_id, None))

            try:
                prepared = self._rows.prepare(plan)
                logits = self._model.run(PreparedBatch.from_prepared(prepared), on_head=on_head)
                result = self._model.sample(self._rows, plan, prepared, logits)
            except Exception as error:  # the step has failed, not the thread: the loop must hear of it
                log.exception("step %d failed", plan.step_id)
                result = self._rows.fail(plan, f"{type(error).__name__}: {error}")
            if self._trace_capacity:
                kinds = [kind for _, _, kind, _, _ in plan.items()]
                trace = Trace(
                    plan.step_id,
                    submitted,
                    started,
                    head[0],
                    time.monotonic_ns(),
                    kinds.count("extend"),
                    kinds.count("decode"),
                )
                with self._lock:
                    self._traces.append(trace)
            self._report(("result", plan.step_id, result), done=True)

    def _report(self, event: tuple[str, int, Any] | None, *, done: bool = False) -> None:
        """Post an event and, with a result, count the step as done: nobody may see one without the other."""
        with self._lock:
            if event is not None:
                self._events.append(event)
                os.eventfd_write(self._fd, 1)
            if done:
                self._queued -= 1
                self._lock.notify_all()
