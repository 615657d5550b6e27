"""Attention over the paged KV pool, by name: `sapwood` (cuda/attention), `flashinfer`, `reference` (torch).

A backend is told of a step once (`begin`), then computes each attention node (`attend`). One that can be captured into
a graph with the nodes around it says so; the others run between the graphs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final, Protocol

import numpy as np
import torch

from sapwood.errors import InvalidRequest, MissingExtra
from sapwood.program.cuda_library import AttentionParams, AttentionPlanParams, CudaLibrary, Params
from sapwood.program.cuda_rows import DeviceRows, StepShape
from sapwood.program.ir import Node, Program

# Of partial results of rows whose keys are split. More than a step needs fewer than this for are rare (64 rows of 16k
# tokens, 8 KV heads of 128: 128 MiB); such a step takes memory of its own and no graph.
PARTIAL_BYTES: Final = 256 * 2**20
MAX_PREFIXES: Final = 512  # that rows share, of a step (cuda/attention/params.h)
SHARED_ROWS: Final = 16  # of a tile of such rows


Ints = np.ndarray[Any, np.dtype[np.int32]]


@dataclasses.dataclass(frozen=True)
class StepLens:
    """What the host knows of a step's segments.

    q_lens      [S] query tokens
    kv_bounds   [S] most keys: fewer where a row has ended
    prefixes    those that decoding segments share (_core.PlanPacker.shared_prefixes); None: nobody has looked
    """

    q_lens: Ints
    kv_bounds: np.ndarray[Any, np.dtype[np.int64]]
    prefixes: tuple[Ints, Ints, Ints] | None = None


class AttentionBackend(Protocol):
    """See this module's docstring."""

    name: str
    # Whether `begin` and `attend` of a step of decodes may be captured into a graph and replayed for other lengths.
    in_graphs: bool

    # Most bytes that `write` writes.
    told_bytes: int

    # In chunks of so many tokens a prefix that decoding segments share is read once for all; 0: it is not.
    shared_chunk: int

    def fits_graph(self, lens: StepLens) -> bool:
        """Whether a captured step of decodes has room for these."""
        ...

    def step_bytes(self, max_tokens: int, context_len: int) -> int:
        """Most memory that a step takes for itself: one of max_tokens at the end of a context of that length."""
        ...

    def write(self, lens: StepLens, out: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
        """Into out, which goes to the device with the packed plan: what it must be told of a step. Returns bytes."""
        ...

    def load(self, told: torch.Tensor) -> None:
        """Take what `write` wrote, on the device; comes before `begin` and before a graph."""
        ...

    def begin(self, shape: StepShape, lens: StepLens | None) -> None:
        """Launch what all layers need. lens: None where a graph is captured, which must serve all that fit."""
        ...

    def attend(self, node: Node, q: torch.Tensor, out: torch.Tensor, kv: torch.Tensor, shape: StepShape) -> None:
        """out [T, q heads * head_dim] of q, both bfloat16, over the node's pages kv [pages, 2, kv heads, page_size,
        head_dim], which hold the step's tokens already. Rows of padding may get anything.
        """
        ...


def told_bytes(max_rows: int) -> int:
    """Most that any backend writes of a step."""
    return 4 * (2 * MAX_PREFIXES + 1 + max_rows)


_NONE: Final = np.zeros(0, np.int32)

# --- sapwood


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How segments of a number of rows ((query, head) pairs of a KV head) are cut (cuda/attention/params.h).

    The numbers are fixed, so that attention's bits do not depend on the batch: chunks short enough for a few long rows
    to fill the device, long enough that merging them is a hundredth of reading their keys.
    """

    min_rows: int
    max_rows: int
    rows_per_tile: int
    chunk_len: int


def tilings(head_dim: int, *, deterministic: bool = False) -> tuple[Tiling, ...]:
    """Few rows a segment (decode), and many. deterministic: one for all, because a prompt's chunks may be of any
    number of rows, and the two kernels sum in different orders.
    """
    many = Tiling(33, 2**30, 64 if head_dim > 128 else 128, 4096)
    if deterministic:
        return (dataclasses.replace(many, min_rows=1),)
    return Tiling(1, 32, 16, 512), many


@dataclasses.dataclass
class _Work:
    """The lists of one tiling of one window, made by attention_plan, and room for partial results."""

    tiling: Tiling
    window: int
    tiles: torch.Tensor
    items: torch.Tensor
    counts: torch.Tensor
    partial_o: torch.Tensor
    partial_ml: torch.Tensor
    shared_tiles: torch.Tensor | None  # of rows that share a prefix, where this tiling can have some
    shared_rows: torch.Tensor | None


class SapwoodAttention:
    """libsapwood_cuda.so's kernels: attention_plan once a step and window, then attention and merge for each layer.

    In which order a row's sums take its keys depends on the row's own length alone, and with `deterministic` not on the
    number of its segment's queries either.
    """

    name = "sapwood"
    in_graphs = True

    def __init__(
        self,
        program: Program,
        rows: DeviceRows,
        *,
        max_tokens: int,
        library: CudaLibrary,
        stream: torch.cuda.Stream | None,
        deterministic: bool = False,
    ) -> None:
        """max_tokens: most of a step."""
        self._rows = rows
        self._library = library
        self._stream = stream
        nodes = [node for node in program.nodes if node.op == "attention"]
        self._kv_heads, self._head_dim = program.num_kv_heads, program.head_dim
        self._group = int(nodes[0].params["num_q_heads"]) // self._kv_heads
        self._windows = sorted({int(node.params["window"]) for node in nodes})
        self._tilings = tilings(program.head_dim, deterministic=deterministic)
        num_processors = 2
        if stream is not None:
            num_processors = torch.cuda.get_device_properties(rows.device).multi_processor_count
        # Two blocks fit on a processor; each KV head has blocks of its own.
        self._num_blocks = max(1, 2 * num_processors // self._kv_heads)
        # Layers come one after the other, and so do tilings: they share the room for partial results.
        room = max(PARTIAL_BYTES // 4, *(self._item_floats(t) for t in self._tilings))
        self._partial = torch.empty(room, dtype=torch.float32, device=rows.device)
        self._work = {
            (window, t): self._take(
                t, window, rows.max_rows + max_tokens * self._group // t.rows_per_tile, self._most_items(t)
            )
            for window in self._windows
            for t in self._tilings
        }
        self._step: list[_Work] = []
        self._tickets = self._ints(2, self._kv_heads)
        # Rows of a window have not the same first key, and only the small tiles take rows of several segments.
        self.shared_chunk = self._tilings[0].chunk_len if self._can_share(self._tilings[0], 0) else 0
        # Where each prefix's segments begin, how long it is, and the segments.
        self._prefixes = self._ints(2 * MAX_PREFIXES + 1 + rows.max_rows)
        self._prefix_scratch = self._ints(2, rows.max_rows)
        self._has_prefixes = self._writes_prefixes = False
        self.told_bytes = told_bytes(rows.max_rows)

    def _can_share(self, t: Tiling, window: int) -> bool:
        return t.rows_per_tile == SHARED_ROWS and window == 0 and 0 in self._windows

    def _ints(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self._rows.device)

    def fits_graph(self, lens: StepLens) -> bool:
        return all(self._num_items(t, lens) <= self._most_items(t) for t in self._tilings)

    def step_bytes(self, max_tokens: int, context_len: int) -> int:
        lens = StepLens(np.array([max_tokens], np.int32), np.array([context_len], np.int64))
        most = 0
        for t in self._tilings:
            if (num_items := self._num_items(t, lens)) > self._most_items(t):
                most = max(most, 4 * num_items * self._item_floats(t))
        return most * len(self._windows)

    def write(self, lens: StepLens, out: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
        indptr, segments, prefix_lens = lens.prefixes or (_NONE, _NONE, _NONE)
        count = min(len(prefix_lens), MAX_PREFIXES)
        self._writes_prefixes = count > 0
        if count == 0 and not self._has_prefixes:
            return 0
        num_ints = 2 * MAX_PREFIXES + 1 + len(segments)
        whole = out[: 4 * num_ints].view(np.int32)
        # Those after the last are empty: the list's capacity is what a graph was captured with.
        whole[: MAX_PREFIXES + 1] = indptr[count] if count else 0
        whole[:count] = indptr[:count]
        whole[MAX_PREFIXES + 1 : MAX_PREFIXES + 1 + count] = prefix_lens[:count]
        whole[2 * MAX_PREFIXES + 1 :] = segments
        return 4 * num_ints

    def load(self, told: torch.Tensor) -> None:
        if len(told) > 0:
            self._prefixes[: len(told) // 4].copy_(told.view(torch.int32), non_blocking=True)
        self._has_prefixes = self._writes_prefixes

    def begin(self, shape: StepShape, lens: StepLens | None) -> None:
        self._step.clear()
        arrays = self._rows.arrays
        for (window, t), work in self._work.items():
            if lens is None:  # decodes
                if not t.min_rows <= self._group <= t.max_rows:
                    continue
            elif (num_items := self._num_items(t, lens)) == 0:
                continue
            elif num_items > self._most_items(t):
                # More than there is room for: memory of this step's own, which the allocator keeps for the next.
                work = self._take(t, window, len(work.tiles), num_items)
            self._step.append(work)
            params = AttentionPlanParams(
                num_segments=shape.num_segments, q_indptr=arrays.q_indptr.data_ptr(),
                kv_lens=arrays.kv_lens.data_ptr(), tiles=work.tiles.data_ptr(), items=work.items.data_ptr(),
                counts=work.counts.data_ptr(), failed=self._rows.failed.data_ptr(), max_tiles=len(work.tiles),
                max_items=len(work.items), group=self._group, rows_per_tile=t.rows_per_tile, chunk_len=t.chunk_len,
                window=window, min_rows=t.min_rows, max_rows=t.max_rows,
            )  # fmt: skip
            # A graph must serve steps with prefixes and without; by itself, a plan without is cheaper.
            if work.shared_tiles is not None and work.shared_rows is not None and (lens is None or self._has_prefixes):
                params.num_prefixes = MAX_PREFIXES
                params.prefix_indptr = self._prefixes.data_ptr()
                params.prefix_lens = self._prefixes[MAX_PREFIXES + 1 :].data_ptr()
                params.prefix_segments = self._prefixes[2 * MAX_PREFIXES + 1 :].data_ptr()
                params.prefix_scratch = self._prefix_scratch.data_ptr()
                params.shared_tiles = work.shared_tiles.data_ptr()
                params.shared_rows = work.shared_rows.data_ptr()
            self._call("attention_plan", params)

    def attend(self, node: Node, q: torch.Tensor, out: torch.Tensor, kv: torch.Tensor, shape: StepShape) -> None:
        p, arrays = node.params, self._rows.arrays
        table = arrays.page_tables[int(p["kv_group"])]
        for work in self._step:
            if work.window != int(p["window"]):
                continue
            params = AttentionParams(
                num_kv_heads=self._kv_heads, q=q.data_ptr(), out=out.data_ptr(), q_stride=q.stride(0),
                out_stride=out.stride(0), k_pages=kv.data_ptr(), v_pages=kv[:, 1].data_ptr(),
                page_stride=kv.stride(0), page_table=table.data_ptr(), table_stride=table.stride(0),
                page_rows=arrays.page_rows.data_ptr(), q_indptr=arrays.q_indptr.data_ptr(),
                kv_lens=arrays.kv_lens.data_ptr(), tiles=work.tiles.data_ptr(), items=work.items.data_ptr(),
                counts=work.counts.data_ptr(),
                shared_tiles=None if work.shared_tiles is None else work.shared_tiles.data_ptr(),
                shared_rows=None if work.shared_rows is None else work.shared_rows.data_ptr(),
                partial_o=work.partial_o.data_ptr(), partial_ml=work.partial_ml.data_ptr(), group=self._group,
                head_dim=self._head_dim,
                page_size=self._rows.page_size, rows_per_tile=work.tiling.rows_per_tile,
                chunk_len=work.tiling.chunk_len, window=work.window, scale=float(p["scale"]),
                softcap=float(p["softcap"]), num_blocks=self._num_blocks, num_pages=kv.shape[0],
                tickets=self._tickets.data_ptr(),
            )  # fmt: skip
            self._call("attention", params)
            self._call("attention_merge", params)

    def _call(self, op: str, params: Params) -> None:
        self._library.call(op, params, None if self._stream is None else self._stream.cuda_stream)

    def _item_floats(self, t: Tiling) -> int:
        return self._kv_heads * t.rows_per_tile * (self._head_dim + 2)

    def _most_items(self, t: Tiling) -> int:
        return self._partial.numel() // self._item_floats(t)

    def _num_items(self, t: Tiling, lens: StepLens) -> int:
        """At most so many: a window only makes them fewer."""
        rows = lens.q_lens.astype(np.int64) * self._group
        listed = (rows >= t.min_rows) & (rows <= t.max_rows)
        chunks = -(-lens.kv_bounds // t.chunk_len)
        return int((-(-rows // t.rows_per_tile) * chunks)[listed].sum())

    def _take(self, t: Tiling, window: int, max_tiles: int, max_items: int) -> _Work:
        device, rows = self._rows.device, max_items * self._kv_heads * t.rows_per_tile
        partial = self._partial
        if max_items > self._most_items(t):
            partial = torch.empty(max_items * self._item_floats(t), dtype=torch.float32, device=device)
        lists = (self._ints(max_tiles, 4), self._ints(max_items, 2), self._ints(3))
        shared: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if self._can_share(t, window):
            shared = (self._ints(max_tiles, 2), self._ints(max_tiles, SHARED_ROWS, 4))
        return _Work(t, window, *lists, partial, partial[rows * self._head_dim :], *shared)


# --- flashinfer


class FlashInferAttention:
    """FlashInfer's paged prefill kernels (arXiv 2501.01005) for prompts and decodes alike, planned on the host.

    A row that has ended on the device is planned as if it had not: what is computed for it is dropped.
    """

    name = "flashinfer"
    in_graphs = False
    told_bytes = 0
    shared_chunk = 0
    HEAD_DIMS: Final = (64, 128, 256)
    WORKSPACE_BYTES: Final = 256 * 2**20

    def __init__(self, program: Program, rows: DeviceRows) -> None:
        """Raises MissingExtra without the package, InvalidRequest where it has no kernel for the model."""
        try:
            from flashinfer import BatchPrefillWithPagedKVCacheWrapper
        except ImportError as error:
            raise MissingExtra(
                f"attention_backend 'flashinfer' needs FlashInfer ({error}): pip install 'sapwood[flashinfer]'"
            ) from None
        if program.head_dim not in self.HEAD_DIMS:
            raise InvalidRequest(
                f"attention_backend 'flashinfer' has kernels for head_dim {self.HEAD_DIMS}, this model has "
                f"{program.head_dim}; leave --attention-backend out",
                "attention_backend",
            )
        self._program, self._rows = program, rows
        workspace = torch.empty(self.WORKSPACE_BYTES, dtype=torch.uint8, device=rows.device)
        self._wrappers: dict[tuple[int, int, float, float], Any] = {}
        self._num_q_heads = 0
        for node in program.nodes:
            if node.op == "attention":
                self._num_q_heads = int(node.params["num_q_heads"])
                self._wrappers.setdefault(self._key(node), BatchPrefillWithPagedKVCacheWrapper(workspace, "HND"))
        self._num_tokens = 0

    @staticmethod
    def _key(node: Node) -> tuple[int, int, float, float]:
        p = node.params
        return int(p["kv_group"]), int(p["window"]), float(p["scale"]), float(p["softcap"])

    def fits_graph(self, lens: StepLens) -> bool:
        return False

    def step_bytes(self, max_tokens: int, context_len: int) -> int:
        return 0

    def write(self, lens: StepLens, out: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
        return 0

    def load(self, told: torch.Tensor) -> None:
        pass

    def begin(self, shape: StepShape, lens: StepLens | None) -> None:
        assert lens is not None  # only a capture has none
        arrays, page_size = self._rows.arrays, self._rows.page_size
        self._num_tokens = int(lens.q_lens.sum())
        if self._num_tokens == 0:
            return
        num_pages = -(-lens.kv_bounds // page_size)
        q_indptr, page_indptr = (
            torch.from_numpy(np.concatenate(([0], np.cumsum(n))).astype(np.int32)) for n in (lens.q_lens, num_pages)
        )
        last_page_len = torch.from_numpy(((lens.kv_bounds - 1) % page_size + 1).astype(np.int32))
        # The page tables are the device's: where in them each page stands goes there.
        segments = np.repeat(np.arange(len(num_pages)), num_pages)
        columns = np.arange(len(segments)) - np.repeat(page_indptr[:-1].numpy(), num_pages)
        segment, column = torch.from_numpy(np.stack((segments, columns))).to(self._rows.device)
        row = arrays.page_rows[segment].long()
        for (group, window, scale, softcap), wrapper in self._wrappers.items():
            # Pages below a window are -1, and masked.
            indices = arrays.page_tables[group][row, column].clamp(min=0)
            wrapper.plan(
                q_indptr, page_indptr, indices, last_page_len, self._num_q_heads, self._program.num_kv_heads,
                self._program.head_dim, page_size, causal=True, sm_scale=scale,
                window_left=window - 1 if window else -1, logits_soft_cap=softcap or None,
                q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
            )  # fmt: skip

    def attend(self, node: Node, q: torch.Tensor, out: torch.Tensor, kv: torch.Tensor, shape: StepShape) -> None:
        if self._num_tokens > 0:
            heads = (self._num_tokens, self._num_q_heads, self._program.head_dim)
            q, out = (tensor[: self._num_tokens].view(heads) for tensor in (q, out))
            self._wrappers[self._key(node)].run(q, kv, out=out)


# --- reference


class ReferenceAttention:
    """torch in float32, a segment at a time: to hold the others against, on any device. Waits for the device."""

    name = "reference"
    in_graphs = False
    told_bytes = 0
    shared_chunk = 0

    def __init__(self, program: Program, rows: DeviceRows) -> None:
        self._rows = rows
        self._kv_heads, self._head_dim = program.num_kv_heads, program.head_dim
        self._segments: list[tuple[int, int, int, int]] = []

    def fits_graph(self, lens: StepLens) -> bool:
        return False

    def step_bytes(self, max_tokens: int, context_len: int) -> int:
        return 0

    def write(self, lens: StepLens, out: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
        return 0

    def load(self, told: torch.Tensor) -> None:
        pass

    def begin(self, shape: StepShape, lens: StepLens | None) -> None:
        arrays, count = self._rows.arrays, shape.num_segments
        indptr = arrays.q_indptr[: count + 1].tolist()
        lens_and_rows = zip(arrays.kv_lens[:count].tolist(), arrays.page_rows[:count].tolist(), strict=True)
        self._segments = [(indptr[s], indptr[s + 1], kv_len, row) for s, (kv_len, row) in enumerate(lens_and_rows)]

    def attend(self, node: Node, q: torch.Tensor, out: torch.Tensor, kv: torch.Tensor, shape: StepShape) -> None:
        p, page_size = node.params, self._rows.page_size
        table = self._rows.arrays.page_tables[int(p["kv_group"])]
        window, softcap = int(p["window"]), float(p["softcap"])
        for begin, end, kv_len, row in self._segments:
            if begin == end:
                continue
            # Of a window, the pages below it have been given back.
            first = max(0, kv_len - (end - begin) - window + 1) if window else 0
            pages = table[row, first // page_size : -(-kv_len // page_size)].long()
            offset = first // page_size * page_size
            k, v = kv[pages].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : kv_len - offset]
            heads = q[begin:end].float().view(end - begin, self._kv_heads, -1, self._head_dim)
            scores = torch.einsum("qhgd,hkd->hgqk", heads, k) * p["scale"]
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            keys = torch.arange(offset, kv_len, device=q.device)
            high = torch.arange(kv_len - (end - begin) + 1, kv_len + 1, device=q.device)[:, None]
            seen = (keys < high) & (keys >= high - window if window else keys >= 0)
            probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            v = v.masked_fill(~seen.any(0)[:, None], 0)
            out[begin:end] = torch.einsum("hgqk,hkd->qhgd", probabilities, v).flatten(1).bfloat16()
