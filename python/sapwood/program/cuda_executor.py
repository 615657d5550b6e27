"""Device "cuda": takes StepPlans, queues their launches, reports their results; it never waits for a token.

engine/ submits plans as it does to _core.Executor and hears of results by an eventfd. Of a step, in stream order:

    one copy from pinned memory: the packed plan (_core.PlanPacker), and what attention must be told
    row ops, the step's arrays, attention's work, all nodes to the logits: a graph, or several, or launch by launch
    sample, commit: the rows have their tokens, or wait for their masks
    one copy of the result to pinned memory, and the report (program/cuda_completion.py)

A thread queues the launches, up to MAX_QUEUED steps ahead of the device: rows live there (program/cuda_rows.py), so a
step needs no token of the one before. Results are read from pinned memory by whoever drains.

A plan with mask_rows is sampled as soon as all its masks have been posted, but no later than when the device has its
logits: until then the thread waits, and whose mask is still missing is held (cpp/batch/README.md). Its hidden state is
kept for the step that resumes it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import queue
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch

from sapwood import _core
from sapwood.errors import InvalidRequest, SapwoodError
from sapwood.program.cuda_attention import AttentionBackend, StepLens
from sapwood.program.cuda_completion import Completion, Ticket
from sapwood.program.cuda_graphs import Graph, GraphPool, bucket_of, decode_buckets, run_buckets
from sapwood.program.cuda_model import CudaModel
from sapwood.program.cuda_rows import ALIGNMENT, FAILED_BYTES, DeviceRows, StepShape
from sapwood.program.ir import Node, Program
from sapwood.program.plan_executor import Trace

log = logging.getLogger(__name__)

# Steps queued and not done; the loop plans one ahead, so a place is nearly always free.
MAX_QUEUED: Final = 4


class StepLauncher:
    """A step's launches: which graphs there are, and which way a step goes."""

    def __init__(
        self,
        model: CudaModel,
        attention: AttentionBackend,
        stream: torch.cuda.Stream | None,
        *,
        max_graph_rows: int,
        max_graph_tokens: int,
    ) -> None:
        """max_graph_rows: rows of the largest graph of decodes, max_graph_tokens: tokens of the largest of a run
        between attention nodes; 0: none. Captured by `capture`.
        """
        self.model = model
        self._rows = model.rows
        self.attention = attention
        self._pool = GraphPool(stream)
        self._forward, self._head = segments(model.program)
        self._runs = runs_between_attention(self._forward)
        self._decode_buckets = decode_buckets(max_graph_rows) if attention.in_graphs else []
        self._run_buckets = run_buckets(max_graph_tokens)
        self._decode_graphs: dict[int, Graph] = {}
        self._run_graphs: dict[tuple[int, int], Graph] = {}  # by (run, tokens)
        self.num_steps = collections.Counter[str]()  # by the way they went

    @property
    def num_graphs(self) -> int:
        return len(self._decode_graphs) + len(self._run_graphs)

    def capture(self) -> None:
        """All graphs, the largest first: the others fit into the memory that it takes. The blob's plan must be empty,
        or must have run: its rows are not touched again.
        """
        for rows in reversed(self._decode_buckets):
            self._decode_graphs[rows] = self._capture_decode(rows)
        for tokens in reversed(self._run_buckets):
            for run in range(len(self._runs)):
                self._run_graphs[run, tokens] = self._capture_run(run, tokens)

    def largest_captures(self) -> list[tuple[Callable[[], Graph], int]]:
        """How to capture the largest graph of each kind, and how many of the kind `capture` will make."""
        captures: list[tuple[Callable[[], Graph], int]] = []
        for rows in self._decode_buckets[-1:]:
            captures.append((functools.partial(self._capture_decode, rows), len(self._decode_buckets)))
        for tokens in self._run_buckets[-1:]:
            # The second run holds a layer, the first and the last are shorter.
            run = min(1, len(self._runs) - 1)
            num_runs = len(self._run_buckets) * len(self._runs)
            captures.append((functools.partial(self._capture_run, run, tokens), num_runs))
        return captures

    def forget_captures(self) -> None:
        """Those of largest_captures are gone."""
        self._pool.forget()

    def warm_up(self, num_tokens: int) -> None:
        """A step of num_tokens of padding, launch by launch, with as many logit rows as there are rows."""
        shape = StepShape(num_tokens, self._rows.max_rows, self._rows.max_rows)
        lens = StepLens(np.zeros(0, np.int32), np.zeros(0, np.int64))
        self._rows.apply_row_ops()
        self._begin(shape, lens)
        self.model.launch(self.model.program.nodes, shape, self.attention)
        self._rows.sample(self._logits(shape.num_logit_rows), bans=True)
        self._rows.commit()

    def _capture_decode(self, rows: int) -> Graph:
        shape = StepShape(rows, rows, rows)

        def launch() -> None:
            self._rows.apply_row_ops()
            self._begin(shape, None)
            self.model.launch(self._forward, shape, self.attention)
            self.model.launch(self._head, shape, self.attention)

        return self._pool.capture(launch)

    def _capture_run(self, run: int, tokens: int) -> Graph:
        shape = StepShape(tokens, 1, 0)
        return self._pool.capture(lambda: self.model.launch(self._runs[run][0], shape, self.attention))

    def forward(self, num_tokens: int, num_logit_rows: int, lens: StepLens) -> torch.Tensor:
        """Row ops to logits [L, vocab] of the plan in the blob; attention has loaded what it was told."""
        num_segments = len(lens.q_lens)
        # Of decodes and resumed rows, which have no tokens; without any of the former there is no forward.
        if num_segments == num_logit_rows and num_tokens > 0 and lens.q_lens.max() == 1:
            rows = bucket_of(num_segments, self._decode_buckets)
            if rows is not None and self.attention.fits_graph(lens):
                self.num_steps["decode graph"] += 1
                self._decode_graphs[rows].replay()
                return self._logits(num_logit_rows)
        self._rows.apply_row_ops()
        tokens = bucket_of(num_tokens, self._run_buckets) if num_tokens > 0 else None
        self.num_steps["head" if num_tokens == 0 else "launches" if tokens is None else "run graphs"] += 1
        shape = StepShape(max(1, tokens or num_tokens), max(1, num_segments), num_logit_rows)
        self._begin(shape, lens)
        for run, (nodes, attention) in enumerate(self._runs if num_tokens > 0 else ()):
            if tokens is None:
                self.model.launch(nodes, shape, self.attention)
            else:
                self._run_graphs[run, tokens].replay()
            self.model.launch(attention, shape, self.attention)
        self.model.launch(self._head, shape, self.attention)
        return self._logits(num_logit_rows)

    def _begin(self, shape: StepShape, lens: StepLens | None) -> None:
        self._rows.prepare(shape, self.model.kept_begin)
        self.model.begin(shape)
        self.attention.begin(shape, lens)

    def _logits(self, num_logit_rows: int) -> torch.Tensor:
        lm_head = next(node for node in self._head if node.op == "lm_head")
        return self.model.value(lm_head.outputs[0], StepShape(0, 0, num_logit_rows))


def segments(program: Program) -> tuple[list[Node], list[Node]]:
    """The nodes that compute tokens, and those that make logits of some."""
    forward, head = ([node for node in program.nodes if node.segment == s] for s in ("forward", "head"))
    return forward, head


def runs_between_attention(nodes: Sequence[Node]) -> list[tuple[list[Node], list[Node]]]:
    """(nodes, the attention node after them, or none at the end) of each run."""
    runs: list[tuple[list[Node], list[Node]]] = [([], [])]
    for node in nodes:
        if node.op == "attention":
            runs[-1][1].append(node)
            runs.append(([], []))
        else:
            runs[-1][0].append(node)
    return runs


@dataclasses.dataclass
class _Place:
    """A step's pinned memory, free again once its result has been read."""

    plan: torch.Tensor
    masks: torch.Tensor
    result: torch.Tensor


@dataclasses.dataclass
class _Step:
    plan: Any
    place: _Place | None
    ticket: Ticket
    sequence: int  # of the packed plan; 0: there is none
    submit_ns: int
    queued_ns: int


class CudaExecutor:
    """_core.Executor's interface. Thread safety: as there, one caller."""

    def __init__(
        self,
        launcher: StepLauncher,
        rows: DeviceRows,
        packer: Any,
        completion: Completion,
        event_fd: int,
        stream: torch.cuda.Stream | None,
        *,
        trace_capacity: int = 0,
    ) -> None:
        """Takes over all of them, event_fd too. packer: a _core.PlanPacker."""
        # The plan whose masks the thread waits for. Readable when they have all come, or its logits are there.
        self._awaited: _core.PackedPlan | None = None
        self._mask_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.launcher = launcher
        self._rows = rows
        self._packer = packer
        self._completion = completion
        self._fd = event_fd
        self._stream = stream
        self._plans: queue.SimpleQueue[tuple[Any, int] | None] = queue.SimpleQueue()
        self._places: queue.SimpleQueue[_Place] = queue.SimpleQueue()
        for _ in range(MAX_QUEUED):
            self._places.put(_Place(self._pinned(1 << 16), self._pinned(0), self._pinned(len(rows.answer))))
        self._lock = threading.RLock()
        self._steps: collections.deque[_Step] = collections.deque()  # launched, not read
        self._events: list[tuple[str, int, Any]] = []
        self._queued = 0
        self._last_step = -1
        self._last_done_ns = 0
        self._traces: collections.deque[Trace] = collections.deque(maxlen=trace_capacity)
        self._trace_capacity = trace_capacity
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="sapwood-executor", daemon=True)
        self._thread.start()

    def _pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    # --- the caller's side

    @property
    def queued(self) -> int:
        """Steps submitted and not done."""
        with self._lock:
            self._read_results()
            return self._queued

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

    def post_mask(self, row: int, gen: int, position: int, bits: np.ndarray[Any, np.dtype[np.uint32]]) -> None:
        """As _core.Executor.post_mask; from any thread. Raises InvalidRequest."""
        self._packer.post_mask(row, gen, position, bits)
        self._wake_if_all_came()

    def _wake_if_all_came(self) -> None:
        awaited = self._awaited
        if awaited is not None and self._packer.masks_posted(awaited):
            with self._lock:
                if not self._stopped:
                    os.eventfd_write(self._mask_fd, 1)

    def drain(self) -> list[tuple[str, int, Any]]:
        """("result", step_id, result) since the last call; clears the eventfd. Never blocks."""
        with contextlib.suppress(OSError):  # not readable, or closed
            os.eventfd_read(self._fd)
        with self._lock:
            self._read_results()
            events, self._events = self._events, []
        return events

    def fileno(self) -> int:
        """Readable while events wait. Owned by the executor."""
        return self._fd

    def wait_idle(self) -> None:
        """Block until every submitted step is done."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        while self.queued > 0:
            poll.poll()
            os.eventfd_read(self._fd)
        if self._events:
            os.eventfd_write(self._fd, 1)  # for drain's caller

    def shutdown(self) -> None:
        """Drop queued steps, wait for those that were launched, close the eventfd. Idempotent."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
        self._plans.put(None)
        self.wait_idle()
        self._thread.join()
        self._completion.close()
        if self._stream is not None:
            with contextlib.suppress(RuntimeError):  # of a failed device
                self._stream.synchronize()  # a host function says that a step is done, then writes to the eventfd
        os.close(self._fd)
        os.close(self._mask_fd)

    def take_trace(self) -> list[Trace]:
        with self._lock:
            traces = list(self._traces)
            self._traces.clear()
        return traces

    def recorded_plans(self) -> list[bytes]:
        """The native executor's flight recorder; this one keeps none."""
        return []

    def _read_results(self) -> None:
        """Of all steps that are done, oldest first. Holds the lock."""
        while self._steps and (done_ns := self._steps[0].ticket.done_ns):
            step = self._steps.popleft()
            try:
                result = self._result(step)
            except Exception as problem:  # a result nobody can read is a failed step
                result = _core.RowTable.fail(step.plan, f"{type(problem).__name__}: {problem}")
            self._packer.drop_masks(step.plan, result)
            result.start_ns = max(step.queued_ns, self._last_done_ns)
            # No mark where the head begins: with steps queued ahead, nothing is gained by planning late.
            result.head_ns = result.done_ns = self._last_done_ns = done_ns
            if step.place is not None:
                self._places.put(step.place)
            if self._trace_capacity:
                kinds = [kind for _, _, kind, _, _ in step.plan.items()]
                num_extends, num_decodes = kinds.count("extend"), kinds.count("decode")
                self._traces.append(
                    Trace(
                        step.plan.step_id, step.submit_ns, result.start_ns, done_ns, done_ns, num_extends, num_decodes
                    )
                )
            self._events.append(("result", step.plan.step_id, result))
            self._queued -= 1
            self._wake_if_all_came()  # but for those of rows that have ended

    def _result(self, step: _Step) -> Any:
        if step.ticket.error:
            log.error("step %d failed: %s", step.plan.step_id, step.ticket.error)
            return _core.RowTable.fail(step.plan, step.ticket.error)
        assert step.place is not None
        answer = step.place.result
        if failed := int(answer[-FAILED_BYTES:].view(torch.int32)[0]):
            raise SapwoodError(
                f"attention_plan failed with {failed} (cuda/attention/params.h): no room for a step, or wrong prefixes"
            )
        return _core.finish_packed(step.plan, answer[:-FAILED_BYTES].numpy(), step.sequence)

    # --- the thread

    def _loop(self) -> None:
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                torch.cuda.current_blas_handle()  # a thread has its own, with a workspace: not in the first step
        while (item := self._plans.get()) is not None:
            plan, submit_ns = item
            if self._stopped:  # dropped without a result: who stops an executor does not drain it
                with self._lock:
                    self._queued -= 1
                os.eventfd_write(self._fd, 1)  # for wait_idle
                continue
            try:
                self._launch(plan, submit_ns)
            except Exception as problem:  # the step has failed, not the thread: the loop must hear of it
                log.exception("step %d could not be launched", plan.step_id)
                self._packer.fail(plan)
                self._fail(plan, submit_ns, f"{type(problem).__name__}: {problem}")

    def _fail(self, plan: Any, submit_ns: int, error: str) -> None:
        ticket = self._completion.ticket()
        ticket.finish(error)
        with self._lock:
            self._steps.append(_Step(plan, None, ticket, 0, submit_ns, time.monotonic_ns()))
        os.eventfd_write(self._fd, 1)

    @torch.inference_mode()
    def _launch(self, plan: Any, submit_ns: int) -> None:
        place = self._places.get()
        queued_ns = time.monotonic_ns()
        launched = False
        try:
            attention, chunk = self.launcher.attention, self.launcher.attention.shared_chunk
            most = FAILED_BYTES + self._packer.bytes_needed(plan) + ALIGNMENT + attention.told_bytes
            if most > len(place.plan):
                place.plan = self._pinned(2 * most)
            packed = self._packer.pack(plan, place.plan[FAILED_BYTES:].numpy())
            prefixes = self._packer.shared_prefixes(plan, chunk) if chunk else None
            lens = StepLens(packed.q_lens, packed.kv_bounds, prefixes)
            # Zeros, the blob, and what attention is told.
            told = -(-(FAILED_BYTES + packed.num_bytes) // ALIGNMENT) * ALIGNMENT
            end = told + attention.write(lens, place.plan[told:].numpy())
            with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                self._rows.order[:end].copy_(place.plan[:end], non_blocking=True)
                attention.load(self._rows.order[told:end])
                self.launcher.model.copy_pages(packed.copies)
                logits = self.launcher.forward(packed.num_tokens, packed.num_logit_rows, lens)
                masks = self._bring_masks(packed, place) if packed.num_masked else None
                if len(logits):
                    self._rows.sample(logits, bans=packed.any_banned, masks=masks)
                self._rows.commit(masks)
                place.result.copy_(self._rows.answer, non_blocking=True)
            step = _Step(plan, place, self._completion.ticket(), packed.sequence, submit_ns, queued_ns)
            with self._lock:
                self._steps.append(step)
            launched = True
            try:
                self._completion.watch(step.ticket)
            except Exception as problem:  # the device has failed
                step.ticket.finish(str(problem))
                os.eventfd_write(self._fd, 1)
        finally:
            if not launched:
                if self._stream is not None:
                    with contextlib.suppress(RuntimeError):  # of a failed device
                        self._stream.synchronize()  # the copy of the plan may be under way
                self._places.put(place)

    def _bring_masks(self, packed: _core.PackedPlan, place: _Place) -> _core.PackedMasks:
        """Wait for the masks of the step whose logits have been launched; what has come goes to the device."""
        if not self._packer.masks_posted(packed):
            logits = self._completion.ticket(self._mask_fd)
            self._completion.watch(logits)
            self._awaited = packed  # before masks are looked for: whoever posts the last one sees it
            while not (logits.done_ns or self._packer.masks_posted(packed)):
                os.eventfd_read(self._mask_fd)
            self._awaited = None
            if logits.error:
                raise SapwoodError(logits.error)
        num_bytes = self._packer.mask_bytes(packed)
        if num_bytes > len(place.masks):
            place.masks = self._pinned(2 * num_bytes)
        masks: _core.PackedMasks = self._packer.pack_masks(packed, place.masks.numpy())
        self._rows.masks[: masks.num_bytes].copy_(place.masks[: masks.num_bytes], non_blocking=True)
        if masks.num_held:
            self.launcher.model.keep_hidden(*self._rows.held(masks))
        return masks
