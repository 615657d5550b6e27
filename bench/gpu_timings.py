"""The cases that `bench/gpu_suite.py --stage time` measures, and how one is timed.

A case has several sets of inputs, launched in turn, so that a launch finds its inputs in memory and not in L2. Passes
over the sets are captured as a CUDA graph; its replays are timed by events, at least 50 ms at a time, and the median of
five is told. Beside it stand torch's ways of computing the same, measured alike, and the relative difference
(Frobenius) of the outputs from the first of them. Targets are those of the roofline table that the kernels were
designed by (H200).

Every size can be divided: that is how the tests launch each case on the CPU, through the emulator.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from gpu_checks.activation import silu_mul_params
from gpu_checks.device import Device
from gpu_checks.elementwise import rms_norm_params, rope_case
from gpu_checks.matmul import small_gemm_params
from gpu_checks.moe import align_capacity, dtype_of
from gpu_checks.moe_prefill import gather_params, gemm_params, workspace_of
from torch.nn import functional

from sapwood.program.cuda_library import (
    F32,
    MOE_GEMM_BLOCK,
    MOE_SMALL_BLOCK,
    MOE_SOFTMAX,
    AttentionParams,
    AttentionPlanParams,
    MoeAlignParams,
    MoeGemmSmallParams,
    MoeRouteParams,
    SampleParams,
)
from sapwood.program.cuda_moe import MoeConfig, MoeLayer, MoeWeights, MoeWorkspace

ROTATE_BYTES: Final = 256 << 20  # that the sets of a case move together: four times the L2 of an H200
MOST_BYTES: Final = 20 * 10**9  # that they take
MOST_SETS: Final = 128  # what is smaller than ROTATE_BYTES / MOST_SETS is timed for its latency, from L2
LAUNCHES: Final = 16  # of a graph, at least: the gap between two graphs is not the kernel's
GROUP_S: Final = 0.05
GROUPS: Final = 5

Launch = Callable[[int], Any]  # of set i; a tensor where outputs can be compared


@dataclass
class Work:
    """A case on its device; its launches keep the tensors alive whose addresses they pass.

    reference: what launch(0) must return; None: what the first baseline returns.
    """

    launch: Launch
    baselines: dict[str, Launch] = field(default_factory=dict)
    reference: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True)
class Case:
    """What is timed.

    name               for --only and the table
    ops                launchers that it calls
    num_bytes, flops   that a launch must move and compute; 0 where that bounds nothing
    make               (device, number of sets)
    set_bytes          memory of one set of inputs and outputs, where that is more than num_bytes
    """

    name: str
    ops: tuple[str, ...]
    num_bytes: float
    flops: float
    make: Callable[[Device, int], Work]
    target_us: float | None = None
    set_bytes: float = 0.0

    def num_sets(self, rotate_bytes: float = ROTATE_BYTES) -> int:
        wanted = min(MOST_SETS, math.ceil(rotate_bytes / max(self.num_bytes, 1.0)))
        return max(1, min(wanted, int(MOST_BYTES / max(self.set_bytes, self.num_bytes, 1.0))))


@dataclass(frozen=True)
class Ceilings:
    """Of this device, in this run: bytes read and written by a copy, bytes read by a sum, a bf16 product; a second."""

    copy: float
    read: float
    matmul: float


# What the targets are for: bytes a second of a copy and of a read, bf16 FLOP a second, as measured on one.
H200: Final = Ceilings(4.3e12, 4.3e12, 790e12)


class Clock(Protocol):
    def seconds(self, launch: Launch, num_sets: int) -> tuple[float, bool]:
        """(time of a launch, whether a graph was replayed)."""
        ...


class GpuClock:
    """CUDA events around replays of a graph; around plain launches where capturing fails."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def seconds(self, launch: Launch, num_sets: int) -> tuple[float, bool]:
        torch.cuda.synchronize()  # the inputs were made on another stream
        with torch.cuda.stream(self.stream):
            for i in range(max(3, num_sets)):
                launch(i % num_sets)
            torch.cuda.synchronize()
            launches = num_sets * math.ceil(LAUNCHES / num_sets)

            def one_pass() -> None:
                for i in range(launches):
                    launch(i % num_sets)

            replay, captured = one_pass, False
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    one_pass()
                replay, captured = graph.replay, True
            except Exception:  # whatever a library does that cannot be captured
                torch.cuda.synchronize()
            replay()
            first = self.elapsed(replay, 1)
            passes = max(1, math.ceil(GROUP_S / max(first, 1e-6)))
            return statistics.median(self.elapsed(replay, passes) for _ in range(GROUPS)) / passes / launches, captured

    def elapsed(self, replay: Callable[[], None], passes: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(passes):
            replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class WallClock:
    """For a rehearsal on the CPU: each set once, by the wall clock."""

    def seconds(self, launch: Launch, num_sets: int) -> tuple[float, bool]:
        begin = time.perf_counter()
        for i in range(num_sets):
            launch(i)
        return (time.perf_counter() - begin) / num_sets, False


def measure_ceilings(device: Device, clock: Clock, scale: int = 1) -> Ceilings:
    source = torch.randn((1 << 30) // scale, device=device.name)  # 4 GiB
    target = torch.empty_like(source)
    copy, _ = clock.seconds(lambda i: target.copy_(source), 1)
    read, _ = clock.seconds(lambda i: source.sum(), 1)
    n = 8192 // scale
    a, b, c = (torch.randn(n, n, device=device.name, dtype=torch.bfloat16) for _ in range(3))
    matmul, _ = clock.seconds(lambda i: torch.mm(a, b, out=c), 1)
    return Ceilings(2 * source.nbytes / copy, source.nbytes / read, 2 * n**3 / matmul)


def slower(case: Case, ceilings: Ceilings) -> float:
    """How much longer than an H200 this device must take for what bounds the case."""
    memory_s, product_s = case.num_bytes / H200.copy, case.flops / H200.matmul
    return H200.copy / ceilings.copy if memory_s >= product_s else H200.matmul / ceilings.matmul


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    a, b = got.double().flatten(), expected.double().flatten()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def measure(case: Case, device: Device, clock: Clock, ceilings: Ceilings, num_sets: int,
            tell: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:  # fmt: skip
    """A row of the table. Raises what the kernel's own launch raises; a baseline that fails is a note. tell: hears of
    the row before there are baselines, which may take a minute to compile (FlashInfer) or take the process with them.
    """
    row: dict[str, Any] = {"name": case.name, "sets": num_sets, "bytes": case.num_bytes, "flops": case.flops}
    notes: list[str] = []
    with torch.no_grad():
        work = case.make(device, num_sets)
        seconds, captured = clock.seconds(work.launch, num_sets)
        if not captured and isinstance(clock, GpuClock):
            notes.append("not captured: plain launches")
        row |= {"us": seconds * 1e6, "captured": captured, "baselines": {}, "baseline_us": {}}
        if case.num_bytes:
            row |= {"gbs": case.num_bytes / seconds / 1e9, "of_copy": case.num_bytes / seconds / ceilings.copy}
        if case.flops:
            row |= {"tflops": case.flops / seconds / 1e12, "of_peak": case.flops / seconds / ceilings.matmul}
        if case.target_us is not None:
            target_us = case.target_us * slower(case, ceilings)
            row |= {"target_us": target_us, "of_target": target_us / row["us"]}
        if work.baselines:
            tell(row | {"note": "; ".join([*notes, "the baselines did not end"])})
        reference = work.reference
        for name, launch in work.baselines.items():
            try:
                took, captured = clock.seconds(launch, num_sets)
                row["baseline_us"][name] = took * 1e6
                row["baselines"][name] = took / seconds
                if not captured and isinstance(clock, GpuClock):
                    notes.append(f"{name} not captured")
                if reference is None and isinstance(launch(0), torch.Tensor):
                    reference = functools.partial(launch, 0)
            except Exception as error:  # a library's limits are not our failure
                notes.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:80]}")
        if reference is not None:
            row["error"] = relative_error(work.launch(0), reference())
    row["note"] = "; ".join(notes)
    return row


# --- Row-wise kernels -----------------------------------------------------------------------------------------
def rms_norm(name: str, rows: int, hidden: int, target_us: float | None) -> Case:
    def make(d: Device, sets: int) -> Work:
        x = [d.randn(rows, hidden) for _ in range(sets)]
        y = [empty(d, rows, hidden) for _ in range(sets)]
        weight = d.randn(hidden)

        def launch(i: int) -> torch.Tensor:
            d.call("rms_norm", rms_norm_params(x[i], weight, y[i], False))
            return y[i]

        return Work(launch, {"torch": lambda i: functional.rms_norm(x[i], (hidden,), weight, 1e-5).bfloat16()})

    return Case(name, ("rms_norm",), 6 * rows * hidden, 0, make, target_us, 6 * rows * hidden)


def silu_mul(name: str, rows: int, width: int, target_us: float | None) -> Case:
    def make(d: Device, sets: int) -> Work:
        x = [randn16(d, rows, 2 * width) for _ in range(sets)]
        y = [empty(d, rows, width) for _ in range(sets)]

        def launch(i: int) -> torch.Tensor:
            d.call("silu_mul", silu_mul_params(x[i], y[i]))
            return y[i]

        def by_flashinfer() -> Launch:
            silu_and_mul = importlib.import_module("flashinfer").silu_and_mul
            return lambda i: silu_and_mul(x[i])

        return Work(launch, {
            "torch": lambda i: functional.silu(x[i][:, :width]) * x[i][:, width:], **with_flashinfer(by_flashinfer),
        })  # fmt: skip

    return Case(name, ("silu_mul",), 6 * rows * width, 0, make, target_us, 6 * rows * width)


def rope_kv_write(name: str, tokens: int, target_us: float | None) -> Case:
    heads, kv_heads, dim, page_size = 32, 8, 128, 16
    num_bytes = 2 * tokens * (heads + 2 * kv_heads) * dim * 2

    def make(d: Device, sets: int) -> Work:
        every = [rope_case(d, tokens, heads, kv_heads, dim, dim, page_size, False) for _ in range(sets)]

        def launch(i: int) -> torch.Tensor:
            d.call("rope_kv_write", every[i][0])
            q: torch.Tensor = every[i][1]["q_out"]
            return q.view(tokens, heads, dim)

        def by_torch(i: int) -> torch.Tensor:
            t = every[i][1]
            qkv = t["qkv"].view(tokens, heads + 2 * kv_heads, dim)
            cos, sin = (t[table][t["positions"]][:, None] for table in ("cos", "sin"))
            first, second = qkv[:, : heads + kv_heads].float().chunk(2, -1)
            turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).bfloat16()
            page, offset = t["slots"] // page_size, t["slots"] % page_size
            t["pool"][page, 0, :, offset] = turned[:, heads:]
            t["pool"][page, 1, :, offset] = qkv[:, heads + kv_heads :]
            return turned[:, :heads]

        return Work(launch, {"torch": by_torch})

    return Case(name, ("rope_kv_write",), num_bytes, 0, make, target_us, 1.2 * num_bytes)


# --- Attention ------------------------------------------------------------------------------------------------
class Paged:
    """Segments alike, of q_len new tokens with kv_len keys; their pages in random order, the same in every set."""

    def __init__(self, d: Device, sets: int, batch: int, q_len: int, kv_len: int, page_size: int, kv_heads: int,
                 rows_per_tile: int, chunk_len: int, num_blocks: int, *, portable: bool = False) -> None:  # fmt: skip
        self.group, self.dim, self.kv_heads, self.page_size = 4, 128, kv_heads, page_size
        self.batch, self.q_len, self.kv_len = batch, q_len, kv_len
        self.rows_per_tile, self.chunk_len, self.num_blocks = rows_per_tile, chunk_len, num_blocks
        self.portable = portable
        hq, pages = self.group * kv_heads, -(-kv_len // page_size)
        self.q = [randn16(d, batch * q_len, hq * self.dim) for _ in range(sets)]
        self.out = [torch.empty_like(q) for q in self.q]
        self.pool = [randn16(d, batch * pages, 2, kv_heads, page_size, self.dim) for _ in range(sets)]
        order = torch.randperm(batch * pages, device=d.name, generator=d.generator)
        self.table = order.int().view(batch, pages)
        self.page_rows = torch.arange(batch, device=d.name, dtype=torch.int32)
        self.q_indptr = torch.arange(batch + 1, device=d.name, dtype=torch.int32) * q_len
        self.kv_lens = torch.full((batch,), kv_len, device=d.name, dtype=torch.int32)
        self.max_tiles = batch * -(-q_len * self.group // rows_per_tile)
        self.max_items = self.max_tiles * -(-kv_len // chunk_len)
        self.prefix: dict[str, torch.Tensor] = {}
        self.make_lists(d)

    def make_lists(self, d: Device) -> None:
        """What a plan writes, and the partial results."""
        self.tiles = empty(d, self.max_tiles, 4, dtype=torch.int32)
        self.items = empty(d, self.max_items, 2, dtype=torch.int32)
        self.counts = empty(d, 3, dtype=torch.int32)
        self.tickets = torch.zeros(2 * self.kv_heads, device=d.name, dtype=torch.int32)
        partials = (self.max_items, self.kv_heads, self.rows_per_tile)
        self.partial_o = empty(d, *partials, self.dim, dtype=torch.float32)
        self.partial_ml = empty(d, *partials, 2, dtype=torch.float32)

    def share(self, d: Device, tokens: int) -> None:
        """All segments have their first tokens in the first one's pages; the plan is told of it."""
        self.table[:, : tokens // self.page_size] = self.table[0, : tokens // self.page_size].clone()
        self.prefix = {
            "prefix_indptr": torch.tensor([0, self.batch], device=d.name, dtype=torch.int32),
            "prefix_segments": torch.arange(self.batch, device=d.name, dtype=torch.int32),
            "prefix_lens": torch.full((1,), tokens, device=d.name, dtype=torch.int32),
            "prefix_scratch": empty(d, 2, self.batch, dtype=torch.int32),
            "shared_tiles": empty(d, self.max_tiles, 2, dtype=torch.int32),
            "shared_rows": empty(d, self.max_tiles, 16, 4, dtype=torch.int32),
        }

    def without_prefix(self, d: Device) -> Paged:
        """The same inputs, lists and outputs of its own, and a plan that is not told."""
        other = copy.copy(self)
        other.prefix, other.out = {}, [torch.empty_like(out) for out in self.out]
        other.make_lists(d)
        return other

    def plan_params(self) -> AttentionPlanParams:
        return AttentionPlanParams(
            **{name: tensor.data_ptr() for name, tensor in self.prefix.items()}, num_prefixes=bool(self.prefix),
            num_segments=self.batch, q_indptr=self.q_indptr.data_ptr(), kv_lens=self.kv_lens.data_ptr(),
            tiles=self.tiles.data_ptr(), items=self.items.data_ptr(), counts=self.counts.data_ptr(),
            max_tiles=self.max_tiles, max_items=self.max_items, group=self.group, rows_per_tile=self.rows_per_tile,
            chunk_len=self.chunk_len, window=0, min_rows=1, max_rows=2**30,
        )  # fmt: skip

    def params(self, i: int) -> AttentionParams:
        q, out, pool = self.q[i], self.out[i], self.pool[i]
        shared = {name: self.prefix[name].data_ptr() for name in ("shared_tiles", "shared_rows") if name in self.prefix}
        return AttentionParams(
            **shared,
            num_kv_heads=self.kv_heads, q=q.data_ptr(), out=out.data_ptr(), q_stride=q.stride(0),
            out_stride=out.stride(0), k_pages=pool.data_ptr(), v_pages=pool[:, 1].data_ptr(),
            page_stride=pool.stride(0), page_table=self.table.data_ptr(), table_stride=self.table.stride(0),
            page_rows=self.page_rows.data_ptr(), q_indptr=self.q_indptr.data_ptr(), kv_lens=self.kv_lens.data_ptr(),
            tiles=self.tiles.data_ptr(), items=self.items.data_ptr(), counts=self.counts.data_ptr(),
            partial_o=self.partial_o.data_ptr(), partial_ml=self.partial_ml.data_ptr(), group=self.group,
            head_dim=self.dim, page_size=self.page_size, rows_per_tile=self.rows_per_tile, chunk_len=self.chunk_len,
            window=0, scale=self.dim**-0.5, softcap=0.0, num_blocks=self.num_blocks,
            num_pages=pool.shape[0],
            tickets=None if self.portable else self.tickets.data_ptr(),
        )  # fmt: skip

    def sdpa(self) -> Launch:
        """torch's attention over K and V that lie together; [tokens][heads][dim]."""
        from torch.nn.attention.bias import causal_lower_right

        keys, values = [], []
        for pool in self.pool:
            both = pool[self.table.long()].permute(0, 2, 3, 1, 4, 5).flatten(3, 4)  # [batch, pages, K V, head, ...]
            keys.append(both[:, 0, :, : self.kv_len].contiguous())
            values.append(both[:, 1, :, : self.kv_len].contiguous())
        # One new token sees every key; whole prompts and what stands behind a prefix have their triangle.
        how: dict[str, Any] = {"is_causal": self.q_len == self.kv_len and self.q_len > 1}
        if 1 < self.q_len < self.kv_len:
            how = {"attn_mask": causal_lower_right(self.q_len, self.kv_len)}

        def launch(i: int) -> torch.Tensor:
            q = self.q[i].view(self.batch, self.q_len, -1, self.dim).transpose(1, 2)
            out = functional.scaled_dot_product_attention(q, keys[i], values[i], enable_gqa=True, **how)
            return out.transpose(1, 2)

        return launch

    def flashinfer(self) -> Launch:
        """Over the same pages. Raises ImportError where it is not installed."""
        flashinfer = importlib.import_module("flashinfer")

        room = torch.empty(256 << 20, dtype=torch.uint8, device=self.table.device)
        pages = self.table.shape[1]
        indptr = torch.arange(self.batch + 1, dtype=torch.int32) * pages
        last = torch.full((self.batch,), self.kv_len - (pages - 1) * self.page_size, dtype=torch.int32)
        heads = (self.group * self.kv_heads, self.kv_heads, self.dim, self.page_size)
        types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        if self.q_len == 1:
            run = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, "HND", use_tensor_cores=True)
            run.plan(indptr, self.table.flatten(), last, *heads, **types)
        else:
            run = flashinfer.BatchPrefillWithPagedKVCacheWrapper(room, "HND")
            run.plan(self.q_indptr.cpu(), indptr, self.table.flatten(), last, *heads, causal=True, **types)
        return lambda i: run.run(self.q[i].view(-1, self.group * self.kv_heads, self.dim), self.pool[i])


def optional(make: Callable[[], Launch]) -> Launch:
    """A baseline that is made when it is first launched: what it raises is a note of the row."""
    made: list[Launch] = []

    def launch(i: int) -> Any:
        if not made:
            made.append(make())
        return made[0](i)

    return launch


def attention(name: str, batch: int, q_len: int, kv_len: int, target_us: float | None = None, *, kv_heads: int,
              num_blocks: int, page_size: int = 16, chunk_len: int | None = None, bare: bool = False,
              portable: bool = False) -> Case:  # fmt: skip
    """attention and attention_merge; bare: without baselines, for rows that only tune."""
    dim, group = 128, 4
    rows_per_tile, usual_chunk = (16, 512) if q_len * group <= 32 else (128, 4096)
    seen = q_len * (kv_len - q_len) + q_len * (q_len + 1) // 2
    kv_bytes, q_bytes = batch * kv_len * kv_heads * dim * 4, batch * q_len * kv_heads * group * dim * 2

    def make(d: Device, sets: int) -> Work:
        paged = Paged(
            d, sets, batch, q_len, kv_len, page_size, kv_heads, rows_per_tile, chunk_len or usual_chunk, num_blocks,
            portable=portable,
        )  # fmt: skip
        d.call("attention_plan", paged.plan_params())

        def launch(i: int) -> torch.Tensor:
            params = paged.params(i)
            d.call("attention", params)
            d.call("attention_merge", params)
            return paged.out[i].view(batch, q_len, -1, dim)

        if bare:
            return Work(launch)
        return Work(launch, {"sdpa": optional(paged.sdpa), **with_flashinfer(paged.flashinfer)})

    return Case(
        name, ("attention_plan", "attention", "attention_merge"), kv_bytes + 2 * q_bytes,
        4 * batch * kv_heads * group * dim * seen, make, target_us, 2 * kv_bytes + 2 * q_bytes,
    )  # fmt: skip


def cascade(name: str, batch: int, shared: int, own: int, target_us: float | None = None, *, kv_heads: int,
            num_blocks: int) -> Case:  # fmt: skip
    """Plan, attention and merge of decodes behind a prefix that they share; beside it, of a plan not told of it."""
    dim, group, kv_len = 128, 4, shared + own
    token_bytes, q_bytes = kv_heads * dim * 4, batch * kv_heads * group * dim * 2

    def make(d: Device, sets: int) -> Work:
        told = Paged(d, sets, batch, 1, kv_len, 16, kv_heads, 16, 512, num_blocks)
        told.share(d, shared)
        plain = told.without_prefix(d)

        def launch(i: int, paged: Paged) -> torch.Tensor:
            d.call("attention_plan", paged.plan_params())
            d.call("attention", paged.params(i))
            d.call("attention_merge", paged.params(i))
            return paged.out[i]

        return Work(functools.partial(launch, paged=told), {"plain": functools.partial(launch, paged=plain)})

    return Case(
        name, ("attention_plan", "attention", "attention_merge"), (shared + batch * own) * token_bytes + 2 * q_bytes,
        4 * batch * kv_heads * group * dim * kv_len, make, target_us, batch * kv_len * token_bytes + 2 * q_bytes,
    )  # fmt: skip


def with_flashinfer(make: Callable[[], Launch]) -> dict[str, Launch]:
    """A baseline, where FlashInfer is installed."""
    return {"flashinfer": optional(make)} if importlib.util.find_spec("flashinfer") is not None else {}


def attention_plan(name: str, batch: int, kv_len: int) -> Case:
    def make(d: Device, sets: int) -> Work:
        paged = Paged(d, 1, batch, 1, kv_len, kv_len, 1, 16, 512, 1)
        return Work(lambda i: d.call("attention_plan", paged.plan_params()))

    return Case(name, ("attention_plan",), 0, 0, make)


# --- Products with few rows -----------------------------------------------------------------------------------
def small_gemm(name: str, rows: int, n: int, k: int, target_us: float | None = None) -> Case:
    num_bytes = 2 * (rows * k + n * k + rows * n)

    def make(d: Device, sets: int) -> Work:
        x = [randn16(d, rows, k) for _ in range(sets)]
        w = [randn16(d, n, k) for _ in range(sets)]
        y = [empty(d, rows, n) for _ in range(sets)]

        def launch(i: int) -> torch.Tensor:
            d.call("small_gemm", small_gemm_params(x[i], w[i], y[i]))
            return y[i]

        return Work(launch, {"linear": lambda i: functional.linear(x[i], w[i])})

    return Case(name, ("small_gemm",), num_bytes, 2 * rows * n * k, make, target_us, num_bytes)


# --- Mixture of experts ---------------------------------------------------------------------------------------
class Experts:
    """One layer's routing: set i of T tokens takes the experts that follow those of set i - 1, each equally often."""

    def __init__(self, d: Device, sets: int, tokens: int, experts: int, top_k: int,
                 block: int = MOE_SMALL_BLOCK) -> None:  # fmt: skip
        self.d, self.tokens, self.experts, self.top_k, self.block = d, tokens, experts, top_k, block
        self.pairs = tokens * top_k
        self.capacity = align_capacity(self.pairs, experts, block)
        first = torch.arange(sets, device=d.name)[:, None] * self.pairs
        chosen = (first + torch.arange(self.pairs, device=d.name)) % experts
        self.ids = list(chosen.int().view(sets, tokens, top_k))
        self.logits = []
        for ids in self.ids:
            logits = d.randn(tokens, experts) / 10
            self.logits.append(logits.scatter_add_(1, ids.long(), torch.full(ids.shape, 5.0, device=d.name)))
        self.weights = empty(d, tokens, top_k, dtype=torch.float32)
        self.routed = empty(d, tokens, top_k, dtype=torch.int32)
        # What moe_align writes, for each set.
        self.sorted = [empty(d, self.capacity, dtype=torch.int32) for _ in range(sets)]
        self.owners = [empty(d, self.capacity // block, dtype=torch.int32) for _ in range(sets)]
        self.offsets = [empty(d, experts + 1, dtype=torch.int32) for _ in range(sets)]
        self.padded = [empty(d, 1, dtype=torch.int32) for _ in range(sets)]

    def route(self, i: int) -> torch.Tensor:
        logits = self.logits[i]
        self.d.call("moe_route", MoeRouteParams(
            logits_dtype=F32, logits=logits.data_ptr(), logits_stride=logits.stride(0), ids=self.routed.data_ptr(),
            weights=self.weights.data_ptr(), num_tokens=self.tokens, num_experts=self.experts, top_k=self.top_k,
            scoring=MOE_SOFTMAX, num_groups=1, topk_groups=1, renormalise=1, scale=1.0,
        ))  # fmt: skip
        return self.weights

    def route_by_torch(self, i: int) -> torch.Tensor:
        weights = self.logits[i].softmax(1).topk(self.top_k).values
        return weights / weights.sum(1, keepdim=True)

    def align(self, i: int, ids: torch.Tensor) -> None:
        self.d.call("moe_align", MoeAlignParams(
            num_pairs=self.pairs, ids=ids.data_ptr(), sorted_pairs=self.sorted[i].data_ptr(),
            block_expert=self.owners[i].data_ptr(), expert_offsets=self.offsets[i].data_ptr(),
            num_padded=self.padded[i].data_ptr(), num_experts=self.experts, block=self.block, capacity=self.capacity,
        ))  # fmt: skip

    def aligned(self, i: int) -> dict[str, torch.Tensor]:
        """What moe_align has written for set i."""
        return {"sorted_pairs": self.sorted[i], "block_expert": self.owners[i], "expert_offsets": self.offsets[i],
                "num_padded": self.padded[i]}  # fmt: skip

    def multiply(self, i: int, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        self.d.call("moe_gemm_small", MoeGemmSmallParams(
            y_dtype=dtype_of(y), x=x.data_ptr(), x_stride=x.stride(0), weight=weight.data_ptr(),
            expert_stride=weight.stride(0), weight_stride=weight.stride(1), sorted_pairs=self.sorted[i].data_ptr(),
            block_expert=self.owners[i].data_ptr(), num_padded=self.padded[i].data_ptr(), y=y.data_ptr(),
            y_stride=y.stride(0), num_pairs=self.pairs, pairs_per_row=self.pairs // x.shape[0],
            capacity=self.capacity, n=weight.shape[1], k=weight.shape[2],
        ))  # fmt: skip

    def product(self, i: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[pairs][n] by torch, expert by expert."""
        per_row, ids = self.pairs // x.shape[0], self.ids[i].flatten()
        y = empty(self.d, self.pairs, weight.shape[1], dtype=torch.float32)
        for expert in ids.unique().tolist():
            pairs = (ids == expert).nonzero().flatten()
            y[pairs] = x[pairs // per_row].float() @ weight[expert].float().T
        return y

    def grouped(self, x: Sequence[torch.Tensor], weight: torch.Tensor) -> Launch:
        """torch's grouped product over pairs that are sorted already."""
        multiply = getattr(functional, "grouped_mm", None) or torch._grouped_mm
        rows, ends = [], []
        for i, ids in enumerate(self.ids):
            flat = ids.flatten().long()
            order = flat.argsort(stable=True)
            rows.append(x[i][order // (self.pairs // x[i].shape[0])].contiguous())
            ends.append(torch.bincount(flat, minlength=self.experts).cumsum(0).int())
        right = weight.transpose(1, 2)

        def launch(i: int) -> None:
            multiply(rows[i], right, offs=ends[i])  # in another order of rows: not compared

        return launch

    def used(self) -> int:
        """Experts of one set."""
        return min(self.pairs, self.experts)


def moe_route(name: str, tokens: int, experts: int, top_k: int) -> Case:
    def make(d: Device, sets: int) -> Work:
        case = Experts(d, sets, tokens, experts, top_k)
        return Work(case.route, {"torch": case.route_by_torch})

    return Case(name, ("moe_route",), 4 * tokens * (experts + 2 * top_k), 0, make)


def moe_align(name: str, tokens: int, experts: int, top_k: int) -> Case:
    def make(d: Device, sets: int) -> Work:
        case = Experts(d, sets, tokens, experts, top_k)
        return Work(lambda i: case.align(i, case.ids[i]))

    return Case(name, ("moe_align",), 0, 0, make)


def moe_gemm(name: str, tokens: int, experts: int, top_k: int, n: int, k: int, *, down: bool) -> Case:
    """down: a row of x for each pair, else for each token."""
    pairs = tokens * top_k
    rows = pairs if down else tokens
    num_bytes = 2 * (min(pairs, experts) * n * k + rows * k + pairs * n)

    def make(d: Device, sets: int) -> Work:
        case = Experts(d, sets, tokens, experts, top_k)
        x = [randn16(d, rows, k) for _ in range(sets)]
        weight = randn16(d, experts, n, k)
        y = [empty(d, pairs, n) for _ in range(sets)]
        for i in range(sets):
            case.align(i, case.ids[i])

        def launch(i: int) -> torch.Tensor:
            case.multiply(i, x[i], weight, y[i])
            return y[i]

        grouped = optional(lambda: case.grouped(x, weight))
        return Work(launch, {"grouped_mm": grouped}, lambda: case.product(0, x[0], weight))

    return Case(name, ("moe_align", "moe_gemm_small"), num_bytes, 2 * pairs * n * k, make)


def moe_gather(name: str, tokens: int, experts: int, top_k: int, width: int) -> Case:
    pairs = tokens * top_k

    def make(d: Device, sets: int) -> Work:
        case = Experts(d, sets, tokens, experts, top_k, MOE_GEMM_BLOCK)
        x = [randn16(d, tokens, width) for _ in range(sets)]
        y = [empty(d, case.capacity, width) for _ in range(sets)]
        places = empty(d, pairs, dtype=torch.int32)
        for i in range(sets):
            case.align(i, case.ids[i])
        num_padded = int(case.padded[0])
        rows = case.sorted[0][:num_padded].long()

        def launch(i: int) -> torch.Tensor:
            d.call("moe_gather", gather_params(x[i], case.aligned(i), y[i], places, pairs))
            return y[i][:num_padded]

        def reference() -> torch.Tensor:
            there = rows < pairs
            return x[0][rows.where(there, 0) // top_k] * there[:, None]

        return Work(launch, {}, reference)

    return Case(name, ("moe_align", "moe_gather"), 2 * (tokens + pairs) * width, 0, make)


def moe_gemm_many(name: str, tokens: int, experts: int, top_k: int, n: int, k: int, *, portable: bool = False) -> Case:
    """Rows in the order of experts; each expert has as many as any other, and no more than the gather would bring."""
    pairs = tokens * top_k
    num_bytes = 2 * (min(pairs, experts) * n * k + pairs * (k + n))

    def make(d: Device, sets: int) -> Work:
        case = Experts(d, sets, tokens, experts, top_k, MOE_GEMM_BLOCK)
        x = [randn16(d, case.capacity, k) for _ in range(sets)]
        weight = randn16(d, experts, n, k)
        y = [empty(d, case.capacity, n) for _ in range(sets)]
        workspace = None if portable else workspace_of(d, experts)
        for i in range(sets):
            case.align(i, case.ids[i])
        num_padded = int(case.padded[0])

        def launch(i: int) -> torch.Tensor:
            d.call("moe_gemm", gemm_params(x[i], weight, case.aligned(i), y[i], workspace))
            return y[i][:num_padded]

        def grouped(i: int) -> torch.Tensor:
            multiply = getattr(functional, "grouped_mm", None) or torch._grouped_mm
            product: torch.Tensor = multiply(x[i][:num_padded], weight.transpose(1, 2), offs=case.offsets[i][1:])
            return product

        def reference() -> torch.Tensor:
            ends = case.offsets[0].tolist()
            return torch.cat([
                x[0][begin:end].float() @ weight[expert].float().T
                for expert, (begin, end) in enumerate(itertools.pairwise(ends))
            ])  # fmt: skip

        return Work(launch, {"grouped_mm": grouped}, reference)

    return Case(name, ("moe_align", "moe_gemm"), num_bytes, 2 * pairs * n * k, make)


def moe_layer(name: str, tokens: int, experts: int, top_k: int, hidden: int, inner: int, target_us: float | None,
              ) -> Case:  # fmt: skip
    """All of a layer but the router's product, as program/cuda_moe.py runs it."""
    pairs = tokens * top_k
    num_weights = min(pairs, experts) * 3 * hidden * inner
    config = MoeConfig(experts, top_k, hidden, inner)

    def make(d: Device, sets: int) -> Work:
        case = Experts(d, sets, tokens, experts, top_k)
        x = [randn16(d, tokens, hidden) for _ in range(sets)]
        gate_up = randn16(d, experts, 2 * inner, hidden) / hidden**0.5
        down = randn16(d, experts, hidden, inner) / inner**0.5
        router = empty(d, experts, hidden)
        workspace = MoeWorkspace(config, tokens, d.library, x[0].device)
        layer = MoeLayer(config, MoeWeights(router, gate_up, down), workspace, d.library)
        y = empty(d, tokens, hidden)

        def launch(i: int) -> torch.Tensor:
            return layer.run_experts(x[i], case.logits[i], y)

        def reference() -> torch.Tensor:
            inside = case.product(0, x[0], gate_up)
            inside = functional.silu(inside[:, :inner]) * inside[:, inner:]
            out = case.product(0, inside.bfloat16(), down).view(tokens, top_k, hidden)
            scores = case.logits[0].softmax(1).gather(1, case.ids[0].long())
            return (out * (scores / scores.sum(1, keepdim=True))[..., None]).sum(1)

        return Work(launch, {}, reference)

    products = ("moe_gemm_small",) if config.is_small(tokens) else ("moe_gather", "moe_gemm")
    ops = ("moe_route", "moe_align", *products, "silu_mul", "moe_combine")
    return Case(name, ops, 2 * num_weights, 2 * pairs * 3 * hidden * inner, make, target_us)


# --- Sampling -------------------------------------------------------------------------------------------------
def sample(name: str, rows: int, vocab: int, temperature: float, top_p: float, spread: float,
           target_us: float | None = None) -> Case:  # fmt: skip
    """spread: of the logits; small ones leave more tokens than the kernel keeps in its list."""

    def make(d: Device, sets: int) -> Work:
        logits = [d.randn(rows, vocab) * spread for _ in range(sets)]

        def column(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((rows,), value, device=d.name, dtype=dtype)

        columns = {name: column(value, torch.float32)
                   for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", 0.0))}  # fmt: skip
        columns |= {name: column(0, torch.int32) for name in ("top_k", "want_logprob", "stream")}
        columns |= {"seed": column(7, torch.int64), "position": torch.arange(rows, device=d.name)}
        token, bad = (empty(d, rows, dtype=torch.int32) for _ in range(2))
        logprob = empty(d, rows, dtype=torch.float32)

        def launch(i: int) -> torch.Tensor:
            d.call("sample", SampleParams(
                num_rows=rows, vocab=vocab, logits=logits[i].data_ptr(), logits_stride=logits[i].stride(0),
                token=token.data_ptr(), logprob=logprob.data_ptr(), bad=bad.data_ptr(),
                **{name: values.data_ptr() for name, values in columns.items()},
            ))  # fmt: skip
            return token

        def sort(i: int) -> None:
            p, order = (logits[i] / temperature).softmax(1).sort(1, descending=True)
            p = p.masked_fill(p.cumsum(1) - p >= top_p, 0.0)
            order.gather(1, (p / torch.empty_like(p).exponential_()).argmax(1, keepdim=True))

        def by_flashinfer() -> Launch:
            draw = importlib.import_module("flashinfer").sampling.top_p_sampling_from_probs

            def launch(i: int) -> None:  # rejection sampling; tokens of its own
                draw((logits[i] / temperature).softmax(1), top_p)

            return launch

        if temperature > 0:
            return Work(launch, {"torch": sort, **with_flashinfer(by_flashinfer)})
        return Work(launch, {"argmax": lambda i: logits[i].argmax(1)})

    return Case(name, ("sample",), 4 * rows * vocab, 0, make, target_us, 4 * rows * vocab)


def randn16(d: Device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=d.name, generator=d.generator, dtype=torch.bfloat16)


def empty(d: Device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device=d.name, dtype=dtype)


# --- What is timed --------------------------------------------------------------------------------------------
def cases(num_processors: int = 132, scale: int = 1) -> list[Case]:
    """num_processors: of the GPU. scale: what batches, lengths and widths are divided by."""

    def s(size: int, least: int = 1) -> int:
        return max(least, size // scale)

    kv_heads = s(8)
    blocks = max(1, 2 * num_processors // kv_heads)  # as program/cuda.py has them

    def decode(name: str, batch: int, kv_len: int, target_us: float | None = None, **more: Any) -> Case:
        more = {"num_blocks": blocks, "kv_heads": kv_heads, **more}
        return attention(name, s(batch), 1, s(kv_len), target_us, **more)

    def prefill(name: str, batch: int, prefix: int, q_len: int, target_us: float | None = None, **more: Any) -> Case:
        more = {"num_blocks": blocks, "kv_heads": kv_heads, **more}
        return attention(name, s(batch), s(q_len), (s(prefix) if prefix else 0) + s(q_len), target_us, **more)

    found = [
        decode("decode bs64 ctx4096", 64, 4096, 300),
        decode("decode bs1 ctx131072", 1, 131072, 165),
        decode("decode bs256 ctx1024 page1", 256, 1024, 340, page_size=1),
        decode("decode bs8 ctx512", 8, 512, 12),
        cascade("cascade bs64 8192+512", s(64, 2), s(8192), s(512), 90, kv_heads=kv_heads, num_blocks=blocks),
        cascade("cascade bs16 4096+256", s(16, 2), s(4096), s(256), kv_heads=kv_heads, num_blocks=blocks),
        cascade("cascade bs64 4096+256", s(64, 2), s(4096), s(256), kv_heads=kv_heads, num_blocks=blocks),
        attention_plan("plan bs64 ctx4096", s(64), s(4096)),
        attention_plan("plan bs256 ctx1024", s(256), s(1024)),
        attention_plan("plan bs1 ctx131072", 1, s(131072)),
        prefill("prefill 4x4096", 4, 0, 4096, 900),
        prefill("prefill 4x4096 portable", 4, 0, 4096, 1500, portable=True),
        prefill("tune prefill 4x4096 page64", 4, 0, 4096, page_size=64, bare=True),
        prefill("extend 8x512 on 16k", 8, 16384, 512, 1900),
        prefill("extend 8x512 on 16k portable", 8, 16384, 512, 3000, portable=True),
        rms_norm("rms_norm 16384x4096", s(16384), s(4096), 105),  # the table's 140 us are with an addition
        rms_norm("rms_norm 64x4096", s(64), s(4096), None),
        silu_mul("silu_mul 16384x14336", s(16384), s(14336), 370),
        silu_mul("silu_mul 64x14336", s(64), s(14336), None),
        rope_kv_write("rope_kv_write 16384", s(16384), 115),
        rope_kv_write("rope_kv_write 64", s(64), None),
    ]
    for n, k in ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)):
        found += [small_gemm(f"small_gemm {m}x{n}x{k}", m, s(n), s(k)) for m in (1, 4, 8, 16)]
    found += [
        sample("sample bs256 top_p", s(256), s(151936), 0.8, 0.95, 3.0, 150),
        sample("sample bs256 top_p flat", s(256), s(151936), 0.8, 0.95, 0.5),
        sample("sample bs256 greedy", s(256), s(151936), 0.0, 1.0, 3.0),
        sample("sample bs64 top_p", s(64), s(151936), 0.8, 0.95, 3.0),
        sample("sample bs64 greedy", s(64), s(151936), 0.0, 1.0, 3.0),
    ]
    experts, hidden, inner = s(128, 16), s(2048, 64), s(768, 64)
    for tokens, target in ((1, 40), (64, 370)):
        t = s(tokens)
        found += [
            moe_route(f"moe_route T{tokens}", t, experts, 8),
            moe_align(f"moe_align T{tokens}", t, experts, 8),
            moe_gemm(f"moe_gate_up T{tokens}", t, experts, 8, 2 * inner, hidden, down=False),
            moe_gemm(f"moe_down T{tokens}", t, experts, 8, hidden, inner, down=True),
            moe_layer(f"moe_layer T{tokens}", t, experts, 8, hidden, inner, target),
        ]
    t = s(16384)
    found += [
        moe_route("moe_route T16384", t, experts, 8),
        moe_align("moe_align T16384", t, experts, 8),
        moe_gather("moe_gather T16384", t, experts, 8, hidden),
        moe_gemm_many("moe_gate_up T16384", t, experts, 8, 2 * inner, hidden),
        moe_gemm_many("moe_gate_up T16384 portable", t, experts, 8, 2 * inner, hidden, portable=True),
        moe_gemm_many("moe_down T16384", t, experts, 8, hidden, inner),
        moe_layer("moe_layer T16384", t, experts, 8, hidden, inner, 2400),
    ]
    # Which of the two products should take 16 and 32 rows an expert: SMALL_PAIRS of program/cuda_moe.py.
    for tokens in (256, 512):
        t = s(tokens)
        found += [
            moe_gemm(f"moe_gate_up T{tokens}", t, experts, 8, 2 * inner, hidden, down=False),
            moe_gemm_many(f"moe_gate_up T{tokens} many", t, experts, 8, 2 * inner, hidden),
        ]
    for chunk in (256, 1024, 2048):
        found.append(decode(f"tune bs64 ctx4096 chunk{chunk}", 64, 4096, chunk_len=chunk, bare=True))
    for times in (1, 3, 4):
        many = max(1, times * num_processors // kv_heads)
        found.append(decode(f"tune bs64 ctx4096 blocks{times}x", 64, 4096, num_blocks=many, bare=True))
    for chunk in (256, 1024, 2048):
        found.append(decode(f"tune bs1 ctx131072 chunk{chunk}", 1, 131072, chunk_len=chunk, bare=True))
    return found
