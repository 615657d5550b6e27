"""The row state: random plans through the CPU's RowTable (sapwood._core, which must be built) and through the device.

A `Loop` plays the engine: it admits, extends in chunks, decodes, truncates, forces tokens and frees, always ahead of
what it has heard, so that rows die under plans that still name them. A `Rows` is the device's memory, with canaries
around every array and poison in all that means nothing. What they make of a plan must be the RowTable's arrays, laid
out with dead rows in their places and with padding, and its results. Some rows draw under masks, which the `Pair` of
the two posts in time or not.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from gpu_checks.device import Device
from gpu_checks.guard import before_guard
from sapwood.errors import InternalError
from sapwood.program.cuda_library import (
    MAX_GROUPS,
    ROW_BYTES,
    CommitStepParams,
    PrepareStepParams,
    RowOpsParams,
    RowState,
)

INIT, APPEND, FORCE, TRUNCATE, FREE = range(5)
EXTEND, DECODE, RESUME = 0, 1, 4
FINISHED: Final = 1 | 2 | 8  # flags of a row that has ended: stop, length, bad logits
HELD: Final = 4
SKIPPED: Final = 16
LATE: Final = -2  # in place of a mask's number
KEPT_BEGIN: Final = 5000  # logit_src of row 0 that is resumed
CANARY: Final = 0x5A
GUARD: Final = 64  # bytes on both sides of an array
POISON: Final = 0x6B6B6B6B  # a page id, or stop id, that means nothing

Array = np.ndarray[Any, Any]


# --- Plans


@dataclass
class Item:
    row: int
    gen: int
    kind: int
    q_len: int
    logit_from: int
    tokens: list[int]
    kv_len: int

    @property
    def num_logit_rows(self) -> int:
        return self.q_len - self.logit_from if self.kind == EXTEND else 1


class PlanWriter:
    """A StepPlan by hand: its bytes are those of cpp/batch/plan.cc."""

    def __init__(self, step_id: int) -> None:
        self.step_id = step_id
        self.row_ops: list[tuple[int, int, int, int, int, int, int]] = []
        self.inits: list[bytes] = []
        self.ints: list[int] = []
        self.items: list[Item] = []
        self.mask_rows: list[int] = []

    def init(
        self, row: int, gen: int, kv_len: int = 0, *, max_len: int = 1000, min_len: int = 0,
        stop_ids: Sequence[int] = (), temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
        seed: int = 0, stream: int = 0, rope_mode: int = 0, return_logprob: bool = False,
    ) -> PlanWriter:  # fmt: skip
        self.row_ops.append((INIT, row, gen, 0, len(self.inits), 0, 0))
        self.inits.append(
            struct.pack(
                "<iIqqqqfiffQIiiBii", row, gen, kv_len, kv_len, max_len, min_len, temperature, top_k, top_p, min_p,
                seed, stream, -1, rope_mode, return_logprob, len(self.ints), len(stop_ids),
            )
        )  # fmt: skip
        self.ints += stop_ids
        return self

    def op(
        self, kind: int, row: int, gen: int, *, group: int = 0, ids: Sequence[int] = (), value: int = 0
    ) -> PlanWriter:
        self.row_ops.append((kind, row, gen, group, len(self.ints), len(ids), value))
        self.ints += ids
        return self

    def extend(
        self, row: int, gen: int, kv_len: int, tokens: Sequence[int], logit_from: int | None = None
    ) -> PlanWriter:
        first = len(tokens) if logit_from is None else logit_from
        self.items.append(Item(row, gen, EXTEND, len(tokens), first, list(tokens), kv_len))
        return self

    def decode(self, row: int, gen: int) -> PlanWriter:
        self.items.append(Item(row, gen, DECODE, 1, 0, [], -1))
        return self

    def resume(self, row: int, gen: int) -> PlanWriter:
        self.items.append(Item(row, gen, RESUME, 0, 0, [], -1))
        return self

    def masked(self, *rows: int) -> PlanWriter:
        self.mask_rows += rows
        return self

    def build(self) -> Any:
        from sapwood import _core

        def array(elements: Iterable[bytes]) -> bytes:
            parts = list(elements)
            return struct.pack("<I", len(parts)) + b"".join(parts)

        tokens: list[int] = []
        items = []
        for i in self.items:
            items.append(struct.pack("<iIBiiiq", i.row, i.gen, i.kind, i.q_len, i.logit_from, len(tokens), i.kv_len))
            tokens += i.tokens
        return _core.StepPlan.deserialize(
            struct.pack("<IIq", 0x4E4C5053, 1, self.step_id)
            + array(struct.pack("<BiIiiiq", *op) for op in self.row_ops)
            + array(self.inits)
            + array(struct.pack("<i", i) for i in self.ints)
            + array(items)
            + array(struct.pack("<i", token) for token in tokens)
            + array(())
            + array(struct.pack("<i", row) for row in self.mask_rows)
        )


# --- The device's side


class Guarded:
    """An array with canaries on both sides."""

    def __init__(self, d: Device, name: str, dtype: Any, *shape: int, fill: int = CANARY) -> None:
        """fill: of every byte."""
        self.name = name
        self.dtype = np.dtype(dtype)
        self.shape = shape
        self.num_bytes = int(np.prod(shape)) * self.dtype.itemsize
        self.whole = torch.full((self.num_bytes + 2 * GUARD,), CANARY, dtype=torch.uint8, device=d.name)
        self.bytes = self.whole[GUARD : GUARD + self.num_bytes]
        self.bytes.fill_(fill)

    def data_ptr(self) -> int:
        return self.bytes.data_ptr()

    def fill(self, values: Array) -> None:
        self.bytes.copy_(torch.from_numpy(np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8)))

    def numpy(self) -> Array:
        """What it holds; the canaries are looked at first."""
        whole = self.whole.cpu().numpy()
        outside = np.concatenate((whole[:GUARD], whole[GUARD + self.num_bytes :]))
        assert (outside == CANARY).all(), f"{self.name}: something outside was written"
        return whole[GUARD : GUARD + self.num_bytes].view(self.dtype).reshape(self.shape)


def pointers(arrays: Sequence[Guarded]) -> Any:
    return (ctypes.c_void_p * MAX_GROUPS)(*(array.data_ptr() for array in arrays))


LOGIT_ARRAYS: Final = {
    "temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32, "seed": np.uint64,
    "stream": np.uint32, "position": np.int64, "want_logprob": np.int32,
}  # fmt: skip


@dataclass
class Sizes:
    """Of one executor's rows."""

    num_groups: int = 2
    page_size: int = 4
    max_rows: int = 11
    max_pages: int = 24
    max_stop_ids: int = 3
    vocab_size: int = 40  # of masks


class Rows:
    """The rows on the device, and the three launches of a step."""

    def __init__(self, d: Device, sizes: Sizes) -> None:
        from sapwood import _core

        self.d = d
        self.sizes = s = sizes
        self.groups = [_core.KvGroup("full", page_size=s.page_size)]
        self.groups += [_core.KvGroup("window", window=6, page_size=s.page_size) for _ in range(s.num_groups - 1)]
        self.packer = _core.PlanPacker(
            self.groups, s.max_rows, max_pages=s.max_pages, max_stop_ids=s.max_stop_ids, vocab_size=s.vocab_size
        )
        self.rows = Guarded(d, "rows", np.uint8, s.max_rows, ROW_BYTES, fill=0)
        poison = POISON & 0xFF
        self.stop_ids = Guarded(d, "stop_ids", np.int32, s.max_rows, s.max_stop_ids, fill=poison)
        self.tables = [
            Guarded(d, f"page_tables[{g}]", np.int32, s.max_rows + 1, s.max_pages, fill=poison)
            for g in range(s.num_groups)
        ]
        self.state = RowState(
            rows=self.rows.data_ptr(), stop_ids=self.stop_ids.data_ptr() if s.max_stop_ids else None,
            page_tables=pointers(self.tables), num_groups=s.num_groups, max_rows=s.max_rows, max_pages=s.max_pages,
            max_stop_ids=s.max_stop_ids, page_size=s.page_size,
        )  # fmt: skip
        self.result = Guarded(d, "result", np.uint8, self.packer.result_bytes)
        self.blob = torch.empty(0)
        self.failed_rows: list[int] = []  # page_rows of the step that failed last

    def upload(self, plan: Any) -> Any:
        """Packs the plan; the blob is on the device, and behind it nothing."""
        out = np.full(self.packer.bytes_needed(plan), CANARY, np.uint8)
        packed = self.packer.pack(plan, out)
        self.put_blob(out[: packed.num_bytes])
        return packed

    def put_blob(self, blob: Array) -> None:
        assert len(blob) % 16 == 0
        self.blob = before_guard(self.d, torch.from_numpy(blob.copy()).to(self.d.name))

    def row_ops(self) -> None:
        self.d.call("row_ops", RowOpsParams(state=self.state, blob=self.blob.data_ptr(), result=self.result.data_ptr()))

    def prepare(self, num_tokens: int, num_segments: int, num_logit_rows: int) -> dict[str, Guarded]:
        """With room for so many."""
        s = self.sizes
        out = {name: Guarded(self.d, name, np.int32, num_tokens) for name in ("tokens", "positions", "rope_modes")}
        out |= {f"slots.{g}": Guarded(self.d, f"slots.{g}", np.int64, num_tokens) for g in range(s.num_groups)}
        out["q_indptr"] = Guarded(self.d, "q_indptr", np.int32, num_segments + 1)
        out |= {name: Guarded(self.d, name, np.int32, num_segments) for name in ("kv_lens", "page_rows")}
        if num_logit_rows > 0:
            out |= {name: Guarded(self.d, name, np.int32, num_logit_rows) for name in ("logit_src", "logit_rows")}
            out |= {name: Guarded(self.d, name, dtype, num_logit_rows) for name, dtype in LOGIT_ARRAYS.items()}
            if s.max_stop_ids > 0:
                out["banned_indptr"] = Guarded(self.d, "banned_indptr", np.int32, num_logit_rows + 1)
                out["banned_ids"] = Guarded(self.d, "banned_ids", np.int32, num_logit_rows, s.max_stop_ids)
        slots = pointers([out[f"slots.{g}"] for g in range(s.num_groups)])
        self.d.call(
            "prepare_step",
            PrepareStepParams(
                num_padded_tokens=num_tokens, num_padded_segments=num_segments, num_padded_logit_rows=num_logit_rows,
                kept_begin=KEPT_BEGIN, state=self.state, blob=self.blob.data_ptr(), result=self.result.data_ptr(),
                slots=slots, **{name: array.data_ptr() for name, array in out.items() if not name.startswith("slots")},
            ),
        )  # fmt: skip
        return out

    def commit(
        self, page_rows: Guarded, tokens: Array, logprobs: Array, bad: Array, mask_index: Array | None = None
    ) -> None:
        arrays = [
            before_guard(self.d, torch.from_numpy(array.copy()).to(self.d.name))
            for array in (tokens, logprobs, bad, *(() if mask_index is None else (mask_index,)))
        ]
        token, logprob, is_bad, *index = (array.data_ptr() for array in arrays)
        self.d.call(
            "commit_step",
            CommitStepParams(
                state=self.state, blob=self.blob.data_ptr(), result=self.result.data_ptr(),
                page_rows=page_rows.data_ptr(), token=token, logprob=logprob, bad=is_bad,
                mask_index=index[0] if index else None,
            ),
        )  # fmt: skip
        for array in (self.rows, self.stop_ids, *self.tables):
            array.numpy()  # its canaries
        for table in self.tables:
            assert (table.numpy()[-1] == POISON).all(), "the dummy row was written"

    def finish(self, plan: Any, sequence: int) -> Any:
        from sapwood import _core

        return _core.finish_packed(plan, self.result.numpy(), sequence)

    def fail(self, writer: PlanWriter) -> str:
        """The error of a step that must fail; one token, segment and logit row of padding more than it needs."""
        plan = writer.build()
        packed = self.upload(plan)
        self.row_ops()
        sizes = (packed.num_tokens + 1, packed.num_items + 1, packed.num_logit_rows + 1)
        return self.finish_failed(plan, packed, self.prepare(*sizes))

    def finish_failed(self, plan: Any, packed: Any, arrays: dict[str, Guarded]) -> str:
        self.failed_rows = arrays["page_rows"].numpy()[: packed.num_items].tolist()
        drawn = np.ones(max(packed.num_logit_rows, 1), np.int32)
        self.commit(arrays["page_rows"], drawn, drawn.astype(np.float32), 0 * drawn)
        result = self.finish(plan, packed.sequence)
        assert result.error and result.items() == [] and result.num_tokens == 0
        assert not self.result.numpy()[16:40].any(), "counts of a failed step"
        text: str = result.error
        return text


# --- What a step must look like


def expected_arrays(
    items: Sequence[Item], prepared: dict[str, Any], sizes: Sizes, room: tuple[int, int, int]
) -> dict[str, Array]:
    """RowTable's arrays with dead rows in their places, padded."""
    num_tokens, num_segments, num_logit_rows = room
    q_lens = np.array([item.q_len for item in items], np.int64)
    q_begin = np.concatenate(([0], np.cumsum(q_lens)))
    logit_begin = np.concatenate(([0], np.cumsum([item.num_logit_rows for item in items]))).astype(np.int64)
    total = int(q_begin[-1])
    one_each = min(num_segments - len(items), num_tokens - total)  # segments of padding that have a token

    out: dict[str, Array] = {name: np.zeros(num_tokens, np.int32) for name in ("tokens", "positions", "rope_modes")}
    slots = [np.full(num_tokens, -1, np.int64) for _ in range(sizes.num_groups)]
    padding = np.minimum(np.arange(1, num_segments - len(items) + 1), one_each)
    out["q_indptr"] = np.concatenate((q_begin, total + padding)).astype(np.int32)
    out["kv_lens"] = np.diff(out["q_indptr"])
    out["page_rows"] = np.full(num_segments, sizes.max_rows, np.int32)
    out["logit_src"] = np.zeros(num_logit_rows, np.int32)
    out["logit_rows"] = np.full(num_logit_rows, sizes.max_rows, np.int32)
    for i, item in enumerate(items):
        ends = int(q_begin[i]) + item.q_len
        there = slice(int(logit_begin[i]), int(logit_begin[i + 1]))
        out["logit_src"][there] = np.arange(ends - item.num_logit_rows, ends)
        if item.kind == RESUME:
            out["logit_src"][there] = KEPT_BEGIN + item.row
    sampling = {name: np.zeros(num_logit_rows, dtype) for name, dtype in LOGIT_ARRAYS.items()}
    sampling["top_p"][:] = 1
    banned = np.full((num_logit_rows, sizes.max_stop_ids), -1, np.int32)

    live_logits = 0
    for row, i, begin, q_len, kv_len, rope_mode in prepared["segments"]:
        there, here = slice(begin, begin + q_len), slice(q_begin[i], q_begin[i] + q_len)
        out["tokens"][here] = prepared["tokens"][there]
        out["positions"][here] = prepared["positions"][there]
        out["rope_modes"][here] = rope_mode
        for group, values in enumerate(slots):
            values[here] = prepared["slots"][group][there]
        out["kv_lens"][i] = kv_len
        out["page_rows"][i] = row
        given = prepared["sampling"]
        for logit in range(int(logit_begin[i]), int(logit_begin[i + 1])):
            if q_len > 0:
                assert out["logit_src"][logit] - q_begin[i] == prepared["logit_src"][live_logits] - begin
            else:
                assert prepared["logit_src"][live_logits] == -1
            out["logit_rows"][logit] = row
            for name, column in sampling.items():
                column[logit] = given[name][live_logits]
            first, last = given["banned_indptr"][live_logits : live_logits + 2]
            banned[logit, : last - first] = given["banned_ids"][first:last]
            live_logits += 1
    assert live_logits == len(prepared["logit_src"])
    out |= {f"slots.{group}": values for group, values in enumerate(slots)} | sampling
    out["banned_indptr"] = np.arange(num_logit_rows + 1, dtype=np.int32) * sizes.max_stop_ids
    out["banned_ids"] = banned
    return out


def assert_equal(got: dict[str, Guarded], expected: dict[str, Array], what: str) -> None:
    for name, array in got.items():
        values = array.numpy()
        same = np.array_equal(values, expected[name])
        assert same, f"{what}: {name} is {values.tolist()}, expected {expected[name].tolist()}"


class Pair:
    """The device and the RowTable, given the same plans."""

    def __init__(self, d: Device, sizes: Sizes, seed: int) -> None:
        from sapwood import _core

        self.device = Rows(d, sizes)
        self.table = _core.RowTable(self.device.groups, sizes.max_rows)
        self.rng = np.random.default_rng(seed)
        self.vocab = 24

    def step(self, writer: PlanWriter, room: tuple[int, int, int] = (0, 0, 0)) -> Any:
        """One step; room: for more tokens, segments and logit rows than it has. Returns the result."""
        plan = writer.build()
        what = f"step {writer.step_id}"
        packed = self.device.upload(plan)
        prepared = self.table.prepare(plan)
        padded = (
            max(packed.num_tokens + room[0], 1),
            max(packed.num_items + room[1], 1),
            packed.num_logit_rows + room[2],
        )
        self.check_packed(writer, packed, prepared)
        self.device.row_ops()
        arrays = self.device.prepare(*padded)
        expected = expected_arrays(writer.items, prepared, self.device.sizes, padded)
        assert_equal(arrays, expected, what)

        # A dead row's and padding's logit rows draw something as well.
        drawn = max(padded[2], 1)
        tokens = self.rng.integers(0, self.vocab, drawn, dtype=np.int32)
        logprobs = -self.rng.random(drawn, dtype=np.float32)
        bad = (self.rng.random(drawn) < 0.03).astype(np.int32)
        live = np.flatnonzero(expected["logit_rows"] != self.device.sizes.max_rows)
        masked = {logit: (row, gen, position) for logit, row, gen, position, _ in packed.masked}
        by_table = live[prepared["logit_masked"] != 0].tolist()
        assert [logit for logit in masked if logit in live] == by_table, f"{what}: masked {masked}, not {by_table}"
        for logit in by_table:
            assert masked[logit] == (expected["logit_rows"][logit], masked[logit][1], expected["position"][logit])
        mask_index = self.mask(packed, expected, live) if masked or self.rng.random() < 0.3 else None
        self.device.commit(arrays["page_rows"], tokens, logprobs, bad, mask_index)
        held = np.zeros(len(live), bool) if mask_index is None else mask_index[live] == LATE
        result = self.table.commit(plan, tokens[live], logprobs[live], bad[live], held)
        got = self.device.finish(plan, packed.sequence)
        assert got.error == "", f"{what}: {got.error}"
        for name in ("step_id", "num_tokens", "num_kv", "num_logit_rows", "tokens"):
            values = (getattr(got, name), getattr(result, name))
            assert values[0] == values[1], f"{what}: {name} of the result is {values[0]}, expected {values[1]}"
        assert got.items() == result.items(), f"{what}: items {got.items()}, expected {result.items()}"
        np.testing.assert_array_equal(got.logprobs, result.logprobs)
        self.device.packer.drop_masks(plan, got)
        return result

    def mask(self, packed: Any, expected: dict[str, Array], live: Array) -> Array:
        """Posts some of the step's masks and packs them; the index, of all L. Those of rows that have ended, as the
        packer has been told, are not taken.
        """
        packer, posted = self.device.packer, {}
        for logit, row, gen, position, query in packed.masked:
            src = expected["logit_src"][logit]
            assert query == (-1 if src >= KEPT_BEGIN else src)
            if self.rng.random() < 0.6:
                words = self.rng.integers(0, 2**32, 2, dtype=np.uint32)
                packer.post_mask(row, gen, position, words)
                if logit in live:
                    posted[logit] = words
        assert packer.masks_posted(packed) == all(m[0] in posted or m[0] not in live for m in packed.masked)
        out = np.full(packer.mask_bytes(packed) + GUARD, CANARY, np.uint8)
        block = packer.pack_masks(packed, out)
        assert (out[block.num_bytes :] == CANARY).all() and block.num_bytes <= len(out) - GUARD
        assert not packer.masks_posted(packed) or not posted, "what has been packed is still there"
        index = out[block.mask_index :][: 4 * packed.num_logit_rows].view(np.int32)
        words = out[block.masks : block.num_bytes].view(np.uint32).reshape(-1, 2)
        assert len(words) == block.num_masks == len(posted)
        for logit in range(packed.num_logit_rows):
            if logit in posted:
                assert np.array_equal(words[index[logit]], posted[logit])
            else:
                assert index[logit] == (LATE if any(logit == m[0] for m in packed.masked) else -1)
        late = [m for m in packed.masked if m[0] not in posted and m[4] >= 0]
        pairs = out[: 16 * block.num_held].view(np.int64).reshape(2, -1).tolist()
        assert pairs == [[m[4] for m in late], [m[1] for m in late]]
        return np.concatenate((index, np.full(1, LATE, np.int32)))  # the last is nobody's

    def check_packed(self, writer: PlanWriter, packed: Any, prepared: dict[str, Any]) -> None:
        """What the host was told before the launch holds."""
        assert packed.num_items == len(writer.items) and packed.step_id == writer.step_id
        q_lens = [item.q_len for item in writer.items]
        assert packed.q_lens.tolist() == q_lens and packed.num_tokens == sum(q_lens)
        assert packed.num_logit_rows == sum(item.num_logit_rows for item in writer.items)
        bounds = packed.kv_bounds
        assert (bounds >= packed.q_lens).all()
        for _, i, _, q_len, kv_len, _ in prepared["segments"]:
            bound = kv_len if q_len > 0 else 0
            assert bounds[i] == bound, f"item {i}: kv_len bounded by {bounds[i]}, it is {kv_len}"
        assert packed.max_q_len == max(q_lens, default=0) and packed.max_kv_bound == max(bounds, default=0)
        assert packed.any_logprob or not prepared["sampling"]["want_logprob"].any()
        assert packed.any_banned or not prepared["sampling"]["banned_ids"].size


# --- The engine's side


@dataclass
class Request:
    """A row as the loop sees it: as if it lived."""

    row: int
    gen: int
    kv_len: int
    first_kv: int  # below it there may be no pages in window groups
    prompt: int  # tokens still to be computed before it decodes
    pages: int = 0
    ended: bool = False
    masked: bool = False
    held: bool = False


@dataclass
class Loop:
    """Plans at random, and hears of results `lag` steps later."""

    sizes: Sizes
    rng: np.random.Generator
    lag: int = 2
    max_chunk: int = 13
    requests: dict[int, Request] = field(default_factory=dict)
    unheard: list[Any] = field(default_factory=list)
    next_gen: int = 1
    step_id: int = 0

    def pick(self, low: int, high: int) -> int:
        """Both included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def hear(self, result: Any) -> None:
        self.unheard.append(result)
        if len(self.unheard) <= self.lag:
            return
        for row, gen, _, _, flags in self.unheard.pop(0).items():
            request = self.requests.get(row)
            if request is None or request.gen != gen:
                continue
            if flags & FINISHED:
                request.ended = True
            elif flags == HELD:
                # Decodes have been launched on top of it, and come to nothing.
                request.held = True
                request.kv_len -= self.num_unheard(request)

    def num_unheard(self, request: Request) -> int:
        """Items of the request whose results have not been heard of."""
        items = (item for result in self.unheard for item in result.items())
        return sum((row, gen) == (request.row, request.gen) for row, gen, *_ in items)

    def plan(self) -> PlanWriter:
        self.step_id += 1
        writer = PlanWriter(self.step_id)
        for row in list(self.requests):
            request = self.requests[row]
            if request.ended and self.chance(0.6) or self.chance(0.02):
                del self.requests[row]
                if self.chance(0.8):  # else the next init does it
                    writer.op(FREE, row, request.gen)
        for row in self.rng.permutation(self.sizes.max_rows).tolist():
            if row not in self.requests and self.chance(0.3):
                self.admit(writer, row)
            if row in self.requests and self.chance(0.05):
                writer.op(FREE, row, self.requests[row].gen - 1)  # late, and of no row any more
        for row in self.rng.permutation(list(self.requests)).tolist():
            if self.chance(0.85):
                self.plan_row(writer, self.requests[row])
        free = [row for row in range(self.sizes.max_rows) if row not in self.requests]
        for row in free:
            if self.chance(0.05):  # of a generation that has been, or will be
                writer.decode(row, self.next_gen + 1000 if self.chance(0.5) else 0)
        return writer

    def admit(self, writer: PlanWriter, row: int) -> None:
        s = self.sizes
        room = s.max_pages * s.page_size
        kv_len = self.pick(0, room // 3) if self.chance(0.5) else 0
        max_len = self.pick(kv_len + 2, room) if self.chance(0.6) else 10**12
        stop_ids = self.rng.integers(0, 24, self.pick(0, s.max_stop_ids)).tolist()
        gen, self.next_gen = self.next_gen, self.next_gen + 1
        writer.init(
            row, gen, kv_len, max_len=max_len, min_len=self.pick(0, room // 2) if self.chance(0.5) else 0,
            stop_ids=stop_ids, temperature=self.pick(0, 4) / 4, top_k=self.pick(-1, 9), top_p=self.pick(1, 8) / 8,
            min_p=self.pick(0, 4) / 8, seed=int(self.rng.integers(0, 2**63)) * 2 + 1, stream=self.pick(0, 2**32 - 1),
            rope_mode=self.pick(0, 3), return_logprob=self.chance(0.5),
        )  # fmt: skip
        prompt = self.pick(1, min(room // 2, max_len - kv_len - 1))
        self.requests[row] = Request(row, gen, kv_len, kv_len, prompt, masked=self.chance(0.4))
        self.reserve(writer, self.requests[row], kv_len)

    def reserve(self, writer: PlanWriter, request: Request, num_tokens: int) -> None:
        """Append pages for so many tokens; groups in any order, in one op or several."""
        s = self.sizes
        pages = min(-(-num_tokens // s.page_size) + self.pick(0, 1), s.max_pages)
        if pages <= request.pages:
            return
        for group in self.rng.permutation(s.num_groups).tolist():
            ids = self.rng.integers(0, 1000, pages - request.pages).tolist()
            below = request.first_kv // s.page_size - request.pages  # pages that a window has left
            if group > 0 and below > 0:
                ids[:below] = [-1] * len(ids[:below])
            cut = self.pick(0, len(ids))
            for part in (ids[:cut], ids[cut:]) if self.chance(0.3) else (ids,):
                writer.op(APPEND, request.row, request.gen, group=group, ids=part)
        request.pages = pages

    def plan_row(self, writer: PlanWriter, request: Request) -> None:
        room = self.sizes.max_pages * self.sizes.page_size
        row, gen = request.row, request.gen
        # A step that has not been heard of may have held the row; what is planned on top must not mind.
        certain = not request.masked or self.num_unheard(request) == 0
        if request.prompt == 0 and request.kv_len > request.first_kv and certain and self.chance(0.05):
            kv_len = self.pick(request.first_kv, request.kv_len) if self.chance(0.8) else request.kv_len
            request.held &= kv_len == request.kv_len
            request.kv_len = kv_len
            writer.op(TRUNCATE, row, gen, value=kv_len)
            if not request.held and self.chance(0.5):
                request.prompt = self.pick(1, 9)
        if request.prompt == 0 and certain and self.chance(0.05):
            ids = self.rng.integers(0, 24, self.pick(1, 3)).tolist()
            writer.op(FORCE, row, gen, ids=ids, value=request.kv_len)
            request.held = False
        if request.masked and self.chance(0.9):
            writer.masked(row)
        if request.held:
            if self.chance(0.7):
                writer.resume(row, gen)
                request.held = False
            return
        left = room - request.kv_len
        if left == 0:
            return
        if request.prompt == 0:
            self.reserve(writer, request, request.kv_len + 1)
            writer.decode(row, gen)
            request.kv_len += 1
            return
        count = min(self.pick(1, self.max_chunk), request.prompt, left)
        request.prompt -= count
        self.reserve(writer, request, request.kv_len + count)
        logit_from = count - 1 if request.prompt == 0 else count
        if self.chance(0.15) and not (request.masked and request.prompt > 0):
            logit_from = self.pick(0, count)
        writer.extend(row, gen, request.kv_len, self.rng.integers(0, 24, count).tolist(), logit_from)
        request.kv_len += count


def play(d: Device, sizes: Sizes, num_steps: int, seed: int, lag: int = 2, max_chunk: int = 13) -> int:
    """Random steps; returns their number. Enough of what can happen must have happened."""
    pair = Pair(d, sizes, seed)
    loop = Loop(sizes, np.random.default_rng(seed + 1), lag, max_chunk)
    seen: dict[int, int] = {}
    for _ in range(num_steps):
        room = (0, 0, 0)
        if loop.chance(0.7):
            room = (loop.pick(0, 9), loop.pick(0, 9), loop.pick(0, 5))
        result = pair.step(loop.plan(), room)
        for _, _, _, _, flags in result.items():
            seen[flags] = seen.get(flags, 0) + 1
        loop.hear(result)
    assert all(seen.get(flags, 0) >= num_steps // 40 for flags in (0, 2, 8, SKIPPED)), seen
    assert seen.get(1, 0) >= num_steps // 40 or sizes.max_stop_ids == 0, seen
    assert seen.get(HELD, 0) >= num_steps // 40, seen
    assert (seen.get(HELD | SKIPPED, 0) >= num_steps // 40) == (lag > 0), seen
    writer = PlanWriter(loop.step_id + 1)
    for request in loop.requests.values():
        writer.op(FREE, request.row, request.gen)
    pair.step(writer)
    assert pair.device.packer.num_masks == 0, "masks of rows that have ended"
    return num_steps


def raises_in_table(pair: Pair, writer: PlanWriter) -> None:
    with contextlib.suppress(InternalError):
        pair.table.prepare(writer.build())
        raise AssertionError("the RowTable takes what the device must report")


def two_live_rows(d: Device, sizes: Sizes) -> Pair:
    """Rows 1 to 3 of generations 5 to 7 with 6 tokens each and two pages; their first tokens are drawn: the host does
    not know any more that they live.
    """
    pair = Pair(d, sizes, 3)
    writer = PlanWriter(1)
    for row, gen in ((1, 5), (2, 6), (3, 7)):
        writer.init(row, gen)
        for group in range(sizes.num_groups):
            writer.op(APPEND, row, gen, group=group, ids=[10 * row, 10 * row + 1])
        writer.extend(row, gen, 0, [1, 2, 3, 4, 5, 6], 5)
    plan = writer.build()
    packed = pair.device.upload(plan)
    prepared = pair.table.prepare(plan)
    pair.device.row_ops()
    arrays = pair.device.prepare(18, 3, 3)
    tokens, zeros = np.array([7, 8, 9], np.int32), np.zeros(3, np.float32)
    pair.device.commit(arrays["page_rows"], tokens, zeros, np.zeros(3, np.int32))
    assert pair.device.finish(plan, packed.sequence).tokens == [7, 8, 9]
    assert pair.table.commit(plan, tokens, zeros, np.zeros(3, np.int32)).tokens == [7, 8, 9]
    assert prepared["tokens"].size == 18
    return pair


def held_row(d: Device) -> Pair:
    """two_live_rows, of which row 1 came to its seventh token without a mask: what was drawn counts for nothing."""
    pair = two_live_rows(d, Sizes())
    plan = PlanWriter(2).decode(1, 5).masked(1).build()
    packed = pair.device.upload(plan)
    pair.table.prepare(plan)
    pair.device.packer.pack_masks(packed, np.zeros(pair.device.packer.mask_bytes(packed), np.uint8))
    pair.device.row_ops()
    arrays = pair.device.prepare(1, 1, 1)
    one, held = np.ones(1, np.int32), np.ones(1, bool)
    pair.device.commit(arrays["page_rows"], one, one.astype(np.float32), one, np.full(1, LATE, np.int32))
    result = pair.device.finish(plan, packed.sequence)
    assert result.items() == pair.table.commit(plan, one, one.astype(np.float32), one, held).items()
    assert [item[4] for item in result.items()] == [HELD]
    return pair


def assert_ended(pair: Pair, alive: Sequence[int]) -> None:
    """Of the two_live_rows only those run on."""
    writer = PlanWriter(9).decode(1, 5).decode(2, 6).decode(3, 7)
    plan = writer.build()
    packed = pair.device.upload(plan)
    pair.device.row_ops()
    rows = pair.device.prepare(3, 3, 3)["page_rows"].numpy().tolist()
    assert rows == [row if row in alive else pair.device.sizes.max_rows for row in (1, 2, 3)], rows
    assert packed.num_tokens == 3


def check_row_ops(d: Device) -> int:
    """Play with much coming and going; what the RowTable throws on."""
    cases = play(d, Sizes(max_rows=37), 120, seed=1, max_chunk=7)
    cases += play(d, Sizes(num_groups=1, page_size=1, max_pages=40, max_stop_ids=0), 60, seed=2)
    # More than a warp's lanes can do at once: pages, stop ids, ops.
    sizes = Sizes(num_groups=8, page_size=2, max_rows=70, max_pages=90, max_stop_ids=40)
    pair = Pair(d, sizes, 5)
    writer = PlanWriter(1)
    for row in range(70):
        writer.init(row, row + 1, 100, min_len=1000, stop_ids=range(row % 41))
        for group in range(8):
            writer.op(APPEND, row, row + 1, group=group, ids=range(group * 7, group * 7 + 57))
        writer.extend(row, row + 1, 100, [row] * 14, 12)
    pair.step(writer)
    cases += 1

    failures = (
        (FORCE, [1], 5, "forced tokens of row 1 at another position than its next, 6"),
        (TRUNCATE, [], 7, "row 1 cannot be truncated to more than it has, 6"),
    )
    for kind, ids, value, said in failures:
        pair = two_live_rows(d, Sizes())
        writer = PlanWriter(2).op(kind, 1, 5, ids=ids, value=value).decode(2, 6)
        raises_in_table(pair, writer)
        error = pair.device.fail(writer)
        assert said in error, error
        assert pair.device.failed_rows == [11], "an item ran on rows that are not as planned"
        assert_ended(pair, [3])
        cases += 1
    # The first of several, whichever row's it is.
    for first, second in ((1, 2), (2, 1)):
        pair = two_live_rows(d, Sizes())
        writer = PlanWriter(2).op(TRUNCATE, first, 4 + first, value=50).op(TRUNCATE, second, 4 + second, value=51)
        error = pair.device.fail(writer.op(FORCE, first, 4 + first, ids=[1], value=52))
        assert f"row {first} cannot be truncated" in error, error
        cases += 1

    # A device that has not seen what the packer has packed, or has seen it twice.
    rows = Rows(d, Sizes(max_pages=3))
    rows.upload(PlanWriter(1).init(4, 9).build())
    error = rows.fail(PlanWriter(2).op(APPEND, 4, 9, ids=[1, 2]))
    assert "row op of row 4, which is at generation 0" in error, error
    rows = Rows(d, Sizes(max_pages=3))
    rows.upload(PlanWriter(1).init(4, 9).build())
    rows.row_ops()
    rows.upload(PlanWriter(2).op(APPEND, 4, 9, group=1, ids=[1, 2]).build())
    rows.row_ops()
    plan = PlanWriter(3).op(APPEND, 4, 9, group=1, ids=[3]).build()
    packed = rows.upload(plan)
    rows.row_ops()
    rows.row_ops()
    error = rows.finish_failed(plan, packed, rows.prepare(1, 1, 1))
    assert "the page table of row 4 in group 1 has 3 pages" in error, error

    # A blob of another format is not looked into.
    pair = two_live_rows(d, Sizes())
    plan = PlanWriter(2).decode(1, 5).op(FREE, 1, 5).build()
    packed = pair.device.upload(plan)
    blob = pair.device.blob.cpu().numpy().copy()
    blob[:4] = (7, 0, 0, 0)
    pair.device.put_blob(blob)
    pair.device.row_ops()
    arrays = pair.device.prepare(1, 1, 1)
    assert arrays["page_rows"].numpy().tolist() == [11] and arrays["logit_rows"].numpy().tolist() == [11]
    assert "another format than 7" in pair.device.finish_failed(plan, packed, arrays)
    return cases + 3


def check_prepare_step(d: Device) -> int:
    """Play with long chunks and much padding; one launch and two; what the RowTable throws on."""
    cases = play(d, Sizes(page_size=16, max_pages=7), 120, seed=11, max_chunk=60)
    cases += play(d, Sizes(num_groups=3, page_size=5, max_rows=4), 100, seed=12, lag=0)
    # More items than the block has threads.
    sizes = Sizes(num_groups=1, max_rows=601, max_pages=3)
    pair = Pair(d, sizes, 13)
    writer = PlanWriter(1)
    for row in range(601):
        writer.init(row, 1, stop_ids=[row % 24], return_logprob=row % 2 == 0, max_len=3 if row % 5 == 0 else 9)
        writer.op(APPEND, row, 1, ids=[row, 700 + row]).extend(row, 1, 0, [row], 0)
    pair.step(writer, (3, 2, 0))
    for step_id in (2, 3):
        writer = PlanWriter(step_id)
        for row in reversed(range(601)):
            writer.decode(row, 1)
        # Two launches: tokens, logit rows, both.
        pair.step(writer, (424, 7, 0) if step_id == 2 else (500, 0, 700))
    cases += 3
    # Long chunks in pages by the hundred, all their logits.
    sizes = Sizes(page_size=1, max_rows=2, max_pages=1500)
    pair = Pair(d, sizes, 14)
    writer = PlanWriter(1)
    for row, length in ((0, 1201), (1, 3)):
        writer.init(row, 2, min_len=600, stop_ids=[3, 4], rope_mode=row)
        for group in range(2):
            writer.op(APPEND, row, 2, group=group, ids=np.random.default_rng(row).permutation(length).tolist())
        writer.extend(row, 2, 0, range(length), 0)
    pair.step(writer, (0, 0, 1))
    cases += 1

    # Only the device can tell, because the rows may have ended.
    for group in range(2):
        pair = two_live_rows(d, Sizes())
        writer = PlanWriter(2).decode(2, 6).extend(1, 5, 6, [1, 2, 3], 3)
        raises_in_table(pair, writer)
        error = pair.device.fail(writer)
        assert "item 1 (extend of row 1): its page table in group 0 has only 2 pages" in error, error
        assert_ended(pair, [3])

        # In the first page of several, in one that only lane 0 looks at, in the second round of the lanes.
        ahead = ([-1], 5, 8), ([4] * 3 + [-1] + [5] * 16, 60, 20), ([4] * 35 + [-1] + [5] * 16, 190, 148)
        for ids, tokens, position in ahead:
            pair = two_live_rows(d, Sizes(max_pages=60))
            writer = PlanWriter(2)
            for g in range(2):
                writer.op(APPEND, 1, 5, group=g, ids=ids if g == group else [3] * len(ids))
            writer.decode(3, 7).extend(1, 5, 6, [1] * tokens, 0)
            raises_in_table(pair, writer)
            error = pair.device.fail(writer)
            assert f"item 1 (extend of row 1): no page for position {position} in group {group}" in error, error
            assert_ended(pair, [2])
        # The row's next position lies inside the page that is missing, alone or as the first of several.
        for tokens in (1, 3):
            pair = two_live_rows(d, Sizes())
            writer = PlanWriter(2).init(2, 8, 6)
            for g in range(2):
                writer.op(APPEND, 2, 8, group=g, ids=[1, -1 if g == group else 2, 3])
            writer.extend(2, 8, 6, [1] * tokens, 0)
            raises_in_table(pair, writer)
            error = pair.device.fail(writer)
            assert f"item 0 (extend of row 2): no page for position 6 in group {group}" in error, error
            assert_ended(pair, [1, 3])
        cases += 6
    pair = two_live_rows(d, Sizes())
    writer = PlanWriter(2).decode(3, 7).extend(2, 6, 5, [1], 0).extend(1, 5, 4, [1], 0)
    raises_in_table(pair, writer)
    error = pair.device.fail(writer)
    assert "item 1 (extend of row 2): expects kv_len 5, the row has 6" in error, error
    assert pair.device.failed_rows == [3, 11, 11]
    assert_ended(pair, [])
    cases += 1

    # What goes on with a row that is held, and with one that is not.
    held_or_not = (
        (
            two_live_rows(d, Sizes()),
            PlanWriter(3).decode(3, 7).resume(1, 5),
            "item 1 (resume of row 1): the row is not held",
        ),
        (held_row(d), PlanWriter(3).decode(3, 7).extend(1, 5, 7, [1], 0), "item 1 (extend of row 1): the row is held"),
    )
    for pair, writer, said in held_or_not:
        raises_in_table(pair, writer)
        error = pair.device.fail(writer)
        assert said in error, error
        assert_ended(pair, [2])
        cases += 1
    pair = held_row(d)
    for gen, flags in ((4, SKIPPED), (5, SKIPPED | HELD), (6, SKIPPED)):
        result = pair.step(PlanWriter(gen).decode(1, gen), (1, 1, 1))
        assert [item[4] for item in result.items()] == [flags]
        cases += 1

    # A launch with too little room is all padding, and writes nothing beyond it.
    for room in ((1, 2, 2), (2, 1, 2), (2, 2, 1), (2, 2, 0)):
        pair = two_live_rows(d, Sizes())
        plan = PlanWriter(2).decode(1, 5).decode(3, 7).build()
        packed = pair.device.upload(plan)
        pair.device.row_ops()
        arrays = pair.device.prepare(*room)
        nothing = {"segments": [], "logit_src": [], "sampling": {}}
        assert_equal(arrays, expected_arrays([], nothing, pair.device.sizes, room), f"room {room}")
        assert "launched with room for fewer" in pair.device.finish_failed(plan, packed, arrays)
        assert_ended(pair, [2])
        cases += 1
    return cases


def check_commit_step(d: Device) -> int:
    """Play with results that come late; more items than the block has threads; plans that fail on the host."""
    cases = 0
    for lag in (0, 1, 4):
        cases += play(d, Sizes(max_rows=6, max_pages=12), 80, seed=20 + lag, lag=lag)

    # A failed step ends the rows that it names by their generation.
    pair = two_live_rows(d, Sizes())
    writer = PlanWriter(2).op(FREE, 3, 6).op(TRUNCATE, 2, 6, value=50).decode(1, 4)
    assert "row 2 cannot be truncated" in pair.device.fail(writer)
    assert_ended(pair, [1, 3])
    cases += 1

    # A plan that the packer refuses ends its rows, with the next blob: those of the failed step alone.
    pair = two_live_rows(d, Sizes())
    with contextlib.suppress(InternalError):
        pair.device.upload(PlanWriter(2).init(4, 20).decode(1, 5).decode(1, 5).build())
        raise AssertionError("two items of a row were packed")
    plan = PlanWriter(3).op(APPEND, 4, 20, ids=[9]).op(APPEND, 1, 5, ids=[8]).decode(4, 20).decode(2, 6).decode(1, 5)
    packed = pair.device.upload(plan.build())
    assert packed.kv_bounds.tolist() == [1, 7, 1]
    pair.device.row_ops()
    arrays = pair.device.prepare(3, 3, 3)
    assert arrays["page_rows"].numpy().tolist() == [11, 2, 11]
    pair.device.commit(arrays["page_rows"], np.full(3, 4, np.int32), np.zeros(3, np.float32), np.zeros(3, np.int32))
    result = pair.device.finish(plan.build(), packed.sequence)
    assert [item[4] for item in result.items()] == [SKIPPED, 0, SKIPPED] and result.num_kv == 7
    assert_ended(pair, [2, 3])
    # They may begin anew.
    writer = PlanWriter(10).init(1, 30).op(APPEND, 1, 30, ids=[1]).op(APPEND, 1, 30, group=1, ids=[2])
    packed = pair.device.upload(writer.extend(1, 30, 0, [5], 0).build())
    pair.device.row_ops()
    assert pair.device.prepare(1, 1, 1)["slots.1"].numpy().tolist() == [8]
    return cases + 1
