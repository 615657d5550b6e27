"""Every CPU kernel on the path that serves, as a share of the machine's ceilings and next to torch.

    python bench/kernels.py                                          # the best level, a model of 0.6B parameters
    python bench/kernels.py --ops gemm --isa avx2,avx512 --dtype bfloat16 --rows 1,16,256 --shape llama-3.1-8b
    python bench/kernels.py --ops attention --attention 16x4096,4096+1024

Small programs are recorded as models are, run as StepPlans by the executor and its thread pool, and the runner's own
clock times each node. A program has so many layers that their weights are four times the last-level cache: a node
finds its weights in memory, as when serving. Ops:

    gemm       qkv (with rotation and KV write), linear, o_proj and down_proj (add the residual), gate_up (SiLU-mul),
               lm_head (block maxima; at most 64 rows). M rows: up to 64 decode, more are prefill without logits
    quantize   rows of int8 for the o_proj of int8 and int4, between whose input and the node that wrote it it stands
    norm, embedding, sample (temperature 0.8, top_p 0.95)
    attention  16x4096: decode of 16 rows with 4,096 tokens each; 4096+1024: prefill of 1,024 tokens after 4,096 cached
               ones. Pages are in random order; the cached KV is computed before, without attention

and for each op, dtype, level and M, medians over --repeats steps:

    us         of one node, until the last thread is done; spread: largest less smallest, over the median
    GB/s       (1e9 bytes) of what it must read, over the read bandwidth: matrices or KV; where there are none, its
               rows, which may come from a cache
    GFLOP/s    of what it must multiply, over the peak; scores that the causal mask drops do not count
    torch      its time over ours, above 1 ours is faster: F.linear (nothing but the product), F.rms_norm,
               F.scaled_dot_product_attention (contiguous KV). packed: the product with a matrix that oneDNN packed

--dtype is that of the matrices. int8 and int4 (blocks of 32 with a scale: 8.5 and 4.5 bits a weight) multiply rows of
int8; everything else is as in bfloat16, attention is not measured again, and torch's columns are

    torch      F.linear in bfloat16;  packed: oneDNN's bfloat16 as above
    int8pack   _weight_int8pack_mm (bfloat16 rows, one scale an output)
    int4pack   _weight_int4pack_mm_for_cpu (bfloat16 rows, groups of 32)

The ceilings are measured in the same run (bench/machine.py). The peak is that of the level's own units: dot products of
bf16 for bfloat16 at avx512_bf16 and of int8 for int8 and int4 from avx512 up, the 256-bit rates at avx2, else fp32 FMA.
scalar has none. torch has a process of its own with as many threads, idle while ours work; without it
its columns are empty.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import machine
import make_model
import numpy as np
import torch_kernels

if TYPE_CHECKING:
    from sapwood import _core
    from sapwood.models.config import DecoderConfig
    from sapwood.program.ir import Program

# The nodes of an op, by their names without the layer.
NODES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({
    "gemm": ("qkv", "linear", "o_proj", "gate_up", "down_proj", "head.lm_head"),
    "quantize": ("o_proj.input",), "norm": ("norm",), "embedding": ("embed",), "sample": ("sample",),
    "attention": ("attention",),
})  # fmt: skip
# Bytes of a weight as packed; int8 and int4 with their share of a block's scale.
WEIGHT_BYTES: Final[Mapping[str, float]] = MappingProxyType({
    "float32": 4, "bfloat16": 2, "int8": 34 / 32, "int4": 18 / 32,
})  # fmt: skip
QUANTISED: Final = ("int8", "int4")
# Of the compute dtype: rows between nodes, the embedding table, KV.
ACT_BYTES: Final[Mapping[str, int]] = MappingProxyType({"float32": 4, "bfloat16": 2})
PAGE_SIZE: Final = 16
MOST_DECODE_ROWS: Final = 64  # logit rows that the runner takes at once
MOST_COPIES: Final = 64
NARROW: Final = 64  # hidden size and vocabulary where attention alone is measured
FILL_TOKENS: Final = 1024  # of a step that fills the cache
CASE_S: Final = 5.0  # a case whose first step takes longer is not repeated

TORCH_WAYS: Final = ("torch", "packed", "int8pack", "int4pack")

Times = dict[str, list[float]]  # node -> us, one each repetition


@dataclasses.dataclass(frozen=True)
class Context:
    """One measurement of attention: a step computes `new` tokens of each row after `cached` ones."""

    rows: int
    cached: int
    new: int

    @classmethod
    def parse(cls, text: str) -> Context:
        """16x4096 or 4096+1024."""
        first, sign, second = text.partition("x" if "x" in text else "+")
        if not (first.isdecimal() and second.isdecimal() and int(second) and (sign == "+" or int(first))):
            raise argparse.ArgumentTypeError(f"{text!r} is neither ROWSxCACHED (16x4096) nor CACHED+NEW (4096+1024)")
        return cls(int(first), int(second), 1) if sign == "x" else cls(1, int(first), int(second))

    def __str__(self) -> str:
        return f"{self.rows}x{self.cached}" if self.new == 1 else f"{self.cached}+{self.new}"

    def work(self, config: DecoderConfig, dtype: str) -> tuple[float, float]:
        """(bytes, operations) of one layer."""
        kv = 2 * config.num_kv_heads * config.head_dim * ACT_BYTES[dtype]
        pairs = self.rows * self.new * (self.cached + (self.new + 1) / 2)
        return self.rows * (self.cached + self.new) * kv, 4 * config.num_q_heads * config.head_dim * pairs

    def num_layers(self, config: DecoderConfig, dtype: str) -> int:
        """Decode must find KV in memory; prefill multiplies, one layer will do."""
        return num_copies(self.work(config, dtype)[0]) if self.new == 1 else 1


def num_copies(num_bytes: float) -> int:
    """As many as are four times the last-level cache (32 MiB where the system does not say), up to MOST_COPIES."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    cache_bytes = max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)
    return min(MOST_COPIES, math.ceil(4 * cache_bytes / num_bytes))


def named_config(shape: str) -> DecoderConfig:
    """One of make_model.SHAPES."""
    from sapwood.models import registry
    from sapwood.models.config import HfConfig

    raw = HfConfig(dict(make_model.SHAPES[shape]), Path(shape))
    config: DecoderConfig = registry.resolve(raw.architecture).configure(raw)
    return config


def act_of(dtype: str) -> str:
    """The compute dtype beside matrices of `dtype`."""
    return "bfloat16" if dtype in QUANTISED else dtype


def record(config: DecoderConfig, dtype: str, layers: int, positions: int, *, matrices: bool = True) -> Program:
    """Decoder layers with `linear`, an op that no model uses yet, between attention and o_proj. All qkv nodes come
    first: a step that stops after them has written KV. matrices False: attention, and what it cannot do without."""
    from sapwood.layers import attention as attn
    from sapwood.layers.embedding import embedding, gather_logit_rows, lm_head
    from sapwood.layers.linear import gate_up, linear, linear_residual
    from sapwood.layers.norm import rms_norm
    from sapwood.layers.rotary import RopeConfig, rope_slots
    from sapwood.program.ir import GroupSpec, Recorder, TensorPart
    from sapwood.program.quantize import quantize

    heads, kv_heads, dim, hidden = config.num_q_heads, config.num_kv_heads, config.head_dim, config.hidden
    rec = Recorder(act_of(dtype), config.vocab_size)  # type: ignore[arg-type]
    x = embedding(rec, "embed", config.vocab_size, hidden)
    rope = rope_slots(rec, RopeConfig("default", 1e6, dim), positions)
    shapes = [attn.AttentionShape(heads, kv_heads, dim, 0, i) for i in range(layers)]
    queries = []
    for i, shape in enumerate(shapes):
        with rec.layer(i):
            y = rms_norm(rec, "norm", x, f"{i}.norm", 1e-6)
            weight = [TensorPart(f"{i}.qkv", ((heads + 2 * kv_heads) * dim, hidden))]
            norms = (f"{i}.q_norm", f"{i}.k_norm") if config.qk_norm else None
            queries.append(attn.qkv(rec, y, shape, rope, weight, (), norms, 1e-6))
    for i, (shape, q) in enumerate(zip(shapes, queries, strict=True)):
        with rec.layer(i):
            o = attn.attention(rec, q, shape)
            if matrices:
                o = linear(rec, "linear", o, [TensorPart(f"{i}.linear", (heads * dim, heads * dim))])
            x = linear_residual(rec, "o_proj", o, x, f"{i}.o_proj")
            if not matrices:
                continue
            y = rms_norm(rec, "mlp_norm", x, f"{i}.mlp_norm", 1e-6)
            weight = [TensorPart(f"{i}.gate_up", (2 * config.intermediate, hidden))]
            h = gate_up(rec, "gate_up", y, config.intermediate, weight)
            x = linear_residual(rec, "down_proj", h, x, f"{i}.down_proj")
    lm_head(rec, rms_norm(rec, "head.norm", gather_logit_rows(rec, x), "head_norm", 1e-6), "lm_head")
    program = rec.finish([GroupSpec(0, layers)], kv_heads, dim)
    return quantize(program, dtype, dtype) if dtype in QUANTISED else program  # type: ignore[arg-type]


def node_name(name: str) -> str:
    """Without the layer."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def matrix_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """(outputs, inputs) of each gemm node's weight."""
    program = record(config, "float32", 1, 1)
    return {
        name: node.weights[0].shape
        for node in program.nodes
        if (name := node_name(node.name)) in NODES["gemm"] and node.weights[0] is not None
    }


def node_work(node: str, config: DecoderConfig, dtype: str, m: int) -> tuple[float, int]:
    """(bytes, operations) of a node but attention."""
    if size := math.prod(matrix_shapes(config).get(node, (0,))):
        return WEIGHT_BYTES[dtype] * size, 2 * m * size
    act_bytes = ACT_BYTES[act_of(dtype)]
    row = {"norm": 4 * config.hidden, "embed": act_bytes * config.hidden, "sample": 4 * config.vocab_size,
           "o_proj.input": act_bytes * config.num_q_heads * config.head_dim}  # fmt: skip
    return m * row[node], 0


class Steps:
    """A program on the executor, and what the serving loop does for it: rows, pages, plans.

    num_tokens   that rows hold at most, all together, in pages of their own
    """

    def __init__(
        self, program: Program, isa: str, threads: int, *, store: _core.WeightStore, num_tokens: int, max_rows: int,
        max_step_tokens: int,
    ) -> None:  # fmt: skip
        from sapwood import _core
        from sapwood.program import native

        groups, num_pages = native.kv_groups(program, PAGE_SIZE), num_tokens // PAGE_SIZE + max_rows
        self._rng = np.random.default_rng(0)
        self._vocab_size, self._last_qkv = program.vocab_size, [n.name for n in program.nodes if n.op == "qkv"][-1]
        cache = _core.CacheManager(groups, [num_pages], kind="none")
        # Free pages are a stack: given back in random order, they are handed out in random order.
        leases = [cache.acquire(0, np.zeros(1, np.int32), 0) for _ in range(num_pages)]
        for lease in leases:
            cache.reserve(lease, PAGE_SIZE)
        for i in self._rng.permutation(num_pages):
            cache.release(leases[i])
        self.builder = _core.BatchBuilder(cache, max_rows)
        self.runner = _core.CpuRunner(
            native.lower(program), store, groups, [num_pages], num_kv_heads=program.num_kv_heads,
            head_dim=program.head_dim, max_step_tokens=max_step_tokens, num_threads=threads, isa=isa,
        )  # fmt: skip
        self._executor = _core.Executor(self.runner, groups, max_rows)
        self._ids = itertools.count()

    def close(self) -> None:
        self._executor.shutdown()

    @contextlib.contextmanager
    def rows(self, count: int, prompt_len: int, max_len: int) -> Iterator[list[int]]:
        """Rows with random prompts, nothing of them computed."""
        prompts = self._rng.integers(0, self._vocab_size, (count, prompt_len), dtype=np.int32)
        params: dict[str, Any] = {"prompt_len": prompt_len, "max_len": max_len, "temperature": 0.8, "top_p": 0.95}
        rows = [self.builder.admit(0, prompt, seed=i, **params)[0] for i, prompt in enumerate(prompts)]
        try:
            yield rows
        finally:
            for row in rows:
                self.builder.release(row, keep=False)

    def step(self, rows: Sequence[int], new: int) -> dict[str, float]:
        """Compute `new` more tokens of each row: us of every node that ran, mean over the layers. RuntimeError where
        the step fails or a row has ended."""
        self.builder.begin_step(next(self._ids))
        extends = [row for row in rows if self.builder.phase(row) == "extend"]
        num_tokens = sum(self.builder.add_extend(row, new) for row in extends) + self.builder.add_decodes()
        plan = self.builder.end_step().plan
        if plan is None or num_tokens != new * len(rows):
            raise RuntimeError(f"a step of {len(rows)} rows, {new} tokens each, came out with {num_tokens} tokens")
        self.runner.time_nodes(True)
        self._executor.submit(plan)
        self._executor.wait_idle()
        for _, _, result in self._executor.drain():
            if result is not None:
                if result.error:
                    raise RuntimeError(f"a step failed: {result.error}")
                self.builder.commit(result)
        times: dict[str, list[float]] = {}
        for name, calls, ns in self.runner.node_times():
            if calls:
                times.setdefault(node_name(name), []).append(1e-3 * ns / calls)
        return {name: statistics.fmean(us) for name, us in times.items()}

    def write_kv(self, rows: Sequence[int], num_tokens: int, chunk: int) -> None:
        """The next tokens of each row as far as their KV goes: no attention, nothing after it. `chunk`: of a step."""
        self.runner.stop_after(self._last_qkv)
        for begin in range(0, num_tokens, chunk):
            self.step(rows, min(chunk, num_tokens - begin))
        self.runner.stop_after("")


def fill(program: Program, positions: int, threads: int) -> _core.WeightStore:
    """Random weights, and rope tables of so many positions."""
    from sapwood import _core
    from sapwood.models.weights import fill_rope_tables, fill_store

    store = _core.WeightStore(program.act, len(program.slots))
    fill_store(program, store, None, num_threads=threads)
    fill_rope_tables(program, store, positions, num_threads=threads)
    return store


def repeat(run: Callable[[], dict[str, float]], repeats: int) -> Times:
    """Once to warm up and then `repeats` times; once in all where that takes longer than CASE_S."""
    begin = time.perf_counter()
    first = run()
    samples = [first] if time.perf_counter() - begin > CASE_S else [run() for _ in range(repeats)]
    return {name: [sample[name] for sample in samples] for name in first}


def measure_nodes(config: DecoderConfig, dtype: str, args: argparse.Namespace) -> dict[tuple[str, int], Times]:
    """Every node but attention, by level and M."""
    # Up to 64 rows decode one token each; more are the prompts of 64 rows, which never come to their end.
    sizes = {m: (m, 1) if m <= MOST_DECODE_ROWS else (MOST_DECODE_ROWS, m // MOST_DECODE_ROWS) for m in args.rows}
    most_rows = max(count for count, _ in sizes.values())
    most_len = max(new for _, new in sizes.values()) * (args.repeats + 1) + 2
    a_layer = sum(math.prod(shape) for node, shape in matrix_shapes(config).items() if node != "head.lm_head")
    program = record(config, dtype, num_copies(a_layer * WEIGHT_BYTES[dtype]), most_len)
    store = fill(program, most_len, args.threads)
    pool = {"num_tokens": most_rows * most_len, "max_rows": most_rows, "max_step_tokens": max(args.rows)}
    found = {}
    for isa in args.isa:
        with contextlib.closing(Steps(program, isa, args.threads, store=store, **pool)) as steps:
            for m, (count, new) in sizes.items():
                prompt_len = 1 if new == 1 else new * (args.repeats + 1) + 1
                with steps.rows(count, prompt_len, most_len) as rows:
                    found[isa, m] = repeat(functools.partial(steps.step, rows, new), args.repeats)
    return found


def measure_attention(
    config: DecoderConfig, dtype: str, context: Context, args: argparse.Namespace
) -> dict[str, list[float]]:  # fmt: skip
    """us of one layer's attention, by level."""
    config = dataclasses.replace(config, hidden=NARROW, vocab_size=NARROW)
    layers, decode = context.num_layers(config, dtype), context.new == 1
    max_len = context.cached + max(context.new, args.repeats) + 2
    program = record(config, dtype, layers, max_len, matrices=False)
    store = fill(program, max_len, args.threads)
    chunk = max(1, FILL_TOKENS // context.rows)
    pool = {"num_tokens": context.rows * max_len, "max_rows": context.rows}
    pool["max_step_tokens"] = context.rows * max(chunk, context.new)

    @contextlib.contextmanager
    def cached_rows(steps: Steps) -> Iterator[list[int]]:
        with steps.rows(context.rows, context.cached + (1 if decode else context.new + 1), max_len) as rows:
            steps.write_kv(rows, context.cached, chunk)
            yield rows

    def prefill(steps: Steps) -> dict[str, float]:
        with cached_rows(steps) as rows:
            return steps.step(rows, context.new)

    found = {}
    for isa in args.isa:
        with contextlib.closing(Steps(program, isa, args.threads, store=store, **pool)) as steps:
            if decode:
                with cached_rows(steps) as rows:
                    found[isa] = repeat(functools.partial(steps.step, rows, 1), args.repeats)["attention"]
            else:
                found[isa] = repeat(functools.partial(prefill, steps), args.repeats)["attention"]
    return found


# --- the report
def peak_kind(dtype: str, isa: str) -> str | None:
    """Of machine.KINDS the one that bounds what this level multiplies; None: not measured."""
    if isa == "scalar":
        return None
    if dtype in QUANTISED:
        return "int8_avx2" if isa == "avx2" else "int8"
    if isa == "avx2":
        return "fp32_avx2"
    return "bf16" if (dtype, isa) == ("bfloat16", "avx512_bf16") else "fp32"


def line(
    node: str, dtype: str, isa: str, m: int | str, us: Sequence[float], work: tuple[float, float],
    peaks: Mapping[str, float | None], torch_us: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """A line of the tables. work: (bytes, operations). peaks: machine.KINDS -> ceiling, None where it was not measured.
    torch_us: way -> us."""
    median = statistics.median(us)
    gb_s, gflop_s = (1e-3 * amount / median for amount in work)
    kind = peak_kind(dtype, isa)
    read, peak = peaks["read"], peaks[kind] if kind else None
    return {
        "node": node, "dtype": dtype, "isa": isa, "m": m, "us": median, "spread": (max(us) - min(us)) / median,
        "gb_s": gb_s, "read_share": gb_s / read if read else None,
        "gflop_s": gflop_s, "peak_share": gflop_s / peak if peak else None,
        **{f"{way}_ratio": other / median for way, other in torch_us.items()},
    }  # fmt: skip


def measure(args: argparse.Namespace, peaks: Mapping[str, float | None]) -> Iterator[dict[str, Any]]:
    """The lines of every table, as they come."""
    config = named_config(args.shape)
    nodes = [node for op in args.ops if op != "attention" for node in NODES[op]]
    shapes = matrix_shapes(config)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, spawn, initializer=torch_kernels.start, initargs=(args.threads,)
    ) as pool:

        def ask(function: Callable[..., dict[Any, Any]], *parameters: Any) -> dict[Any, Any]:
            return pool.submit(function, *parameters).result() if args.torch else {}

        heads = (config.num_q_heads, config.num_kv_heads, config.head_dim)
        for dtype in args.dtype:
            times = measure_nodes(config, dtype, args) if nodes else {}
            for node in nodes:
                if not (rows := [m for m in args.rows if node in times[args.isa[0], m]]):
                    continue  # what float matrices do without
                torch_us: dict[Any, Any] = {}
                if node in shapes:
                    copies = num_copies(WEIGHT_BYTES[dtype] * math.prod(shapes[node]))
                    torch_us = ask(torch_kernels.product, shapes[node], dtype, copies, rows)
                elif node == "norm":
                    torch_us = ask(torch_kernels.rms_norm, config.hidden, act_of(dtype), rows)
                for isa, m in itertools.product(args.isa, rows):
                    work = node_work(node, config, dtype, m)
                    yield line(node, dtype, isa, m, times[isa, m][node], work, peaks, torch_us.get(m, {}))
            for context in args.attention if "attention" in args.ops and dtype not in QUANTISED else ():
                by_isa, work = measure_attention(config, dtype, context, args), context.work(config, dtype)
                copies = context.num_layers(config, dtype)
                torch_us = ask(torch_kernels.attention, *dataclasses.astuple(context), heads, dtype, copies)
                for isa, us in by_isa.items():
                    yield line("attention", dtype, isa, str(context), us, work, peaks, torch_us)


def print_table(op: str, lines: Sequence[Mapping[str, Any]]) -> None:
    # Column, its field, its width, its factor and format.
    columns = (
        ("us", "us", 10, 1, ".1f"), ("% spread", "spread", 10, 100, ".0f"), ("GB/s", "gb_s", 8, 1, ".1f"),
        ("% of read", "read_share", 10, 100, ".1f"), ("GFLOP/s", "gflop_s", 9, 1, ".1f"),
        ("% of peak", "peak_share", 10, 100, ".1f"),
        *((way, f"{way}_ratio", 10, 1, ".2f") for way in TORCH_WAYS if any(f"{way}_ratio" in x for x in lines)),
    )  # fmt: skip
    print(
        f"\n{op:10s} {'dtype':9s} {'level':11s} {'M':>9s}"
        + "".join(f"{name:>{width}}" for name, _, width, *_ in columns)
    )
    for x in lines:
        numbers = (f"{format(factor * x[key], form) if x.get(key) is not None else '-':>{width}}"
                   for _, key, width, factor, form in columns)  # fmt: skip
        print(f"{x['node'].removeprefix('head.'):10s} {x['dtype']:9s} {x['isa']:11s} {x['m']:>9}" + "".join(numbers))


def names(*known: str) -> Callable[[str], list[str]]:
    """Parses "a,b"."""

    def parse(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return text.split(",")

    return parse


def row_counts(text: str) -> list[int]:
    counts = sorted({int(m) for m in text.split(",")})
    if counts[0] < 1 or any(m > MOST_DECODE_ROWS and m % MOST_DECODE_ROWS for m in counts):
        raise argparse.ArgumentTypeError(f"each must be 1..{MOST_DECODE_ROWS} or a multiple of that, got {text}")
    return counts


def contexts(text: str) -> list[Context]:
    return [Context.parse(part) for part in text.split(",")]


def parse_args() -> argparse.Namespace:
    from sapwood import _core

    isas = _core.isa_levels()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, rows, cases = parser.add_argument, "1,2,4,8,16,32,64,256,1024", "16x4096,1x8192,0+1024,4096+1024"
    add("--ops", type=names(*NODES), default=",".join(NODES), help="default: all, %(default)s")
    add("--isa", type=names(*isas), default=isas[-1], help=f"levels out of {','.join(isas)} (default %(default)s)")
    add("--dtype", type=names(*WEIGHT_BYTES), default=",".join(WEIGHT_BYTES), help="default: all, %(default)s")
    add("--rows", type=row_counts, default=rows, help="M of all ops but attention (default %(default)s)")
    add("--attention", type=contexts, default=cases, help="ROWSxCACHED or CACHED+NEW (default %(default)s)")
    add("--shape", choices=list(make_model.SHAPES), default="qwen3-0.6b-32k", help="default %(default)s")
    add("--threads", type=int, default=machine.num_usable_cpus(), help="default: all usable CPUs")
    add("--repeats", type=int, default=5)
    add("--no-torch", dest="torch", action="store_false", help="measure ours only")
    add("--json", type=Path, metavar="FILE", help="write the lines there as well")
    args = parser.parse_args()
    if min(args.threads, args.repeats) < 1:
        parser.error("--threads and --repeats must be at least 1")
    return args


def main() -> int:
    args = parse_args()
    if args.torch and importlib.util.find_spec("torch") is None:
        print("torch is not installed (pip install torch): its columns stay empty")
        args.torch = False
    found = machine.ceilings((args.threads,))
    peaks = {kind: found.median(kind, args.threads) for kind in machine.KINDS}
    units = dict(zip(machine.KINDS, machine.UNITS, strict=True))
    said = ", ".join(f"{kind} {peak:.1f} {units[kind]}" for kind, peak in peaks.items() if peak is not None)
    print(f"{args.shape}, {args.threads} threads, median of {args.repeats}; {found.cpu}: {said}", flush=True)
    lines = []
    for x in measure(args, peaks):
        lines.append(x)
        print(f"... {x['node']} {x['dtype']} {x['isa']} {x['m']}: {x['us']:.1f} us", file=sys.stderr, flush=True)
    for op in args.ops:
        if of_op := [x for x in lines if x["node"] in NODES[op]]:
            print_table(op, of_op)
    if args.json:
        settings = {"shape": args.shape, "threads": args.threads, "repeats": args.repeats}
        args.json.write_text(json.dumps({**settings, "machine": found.as_json(), "lines": lines}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
