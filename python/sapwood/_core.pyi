"""The C++ core as Python sees it. Written by hand; tests/arch compares it with the built module.

Arrays: `Ints` is anything with a contiguous int32 buffer (numpy int32 array); lists of int are accepted where noted.
`Mask` is which tokens may be drawn: ceil(vocab / 32) words, bit i % 32 of word i / 32 for token i; int32 words, as some
libraries make them, need .view(np.uint32).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

import sapwood.errors

Ints = np.ndarray[Any, np.dtype[np.int32]]
Mask = np.ndarray[Any, np.dtype[np.uint32]]

__version__: str

InvalidArgument = sapwood.errors.InvalidRequest
CapacityError = sapwood.errors.CapacityError
InternalError = sapwood.errors.InternalError

# --- cache
class KvGroup:
    def __init__(
        self, kind: str = "full", *, window: int = 0, num_layers: int = 1, page_size: int = 16, page_bytes: int = 0
    ) -> None: ...
    kind: str
    window: int
    num_layers: int
    page_size: int
    page_bytes: int

class PoolStats:
    total: int
    free: int
    cached: int
    leased: int
    limbo: int
    evictable: int

class Lease:
    cached_len: int
    capacity: int
    valid: bool
    def pages(self, group: int) -> Ints: ...
    def first_page(self, group: int) -> int: ...

class CacheManager:
    def __init__(
        self, groups: Sequence[KvGroup], num_pages: Sequence[int], *, kind: str = "radix", record_events: bool = False
    ) -> None: ...
    page_size: int
    num_groups: int
    num_tree_nodes: int
    def match(self, ns: int, keys: Ints) -> int: ...
    def match_many(self, ns: Sequence[int], keys: Sequence[Ints]) -> list[int]: ...
    def acquire(self, ns: int, keys: Ints, max_len: int) -> Lease: ...
    def reserve(self, lease: Lease, num_tokens: int) -> bool: ...
    def commit(self, lease: Lease, keys: Ints, ready_step: int) -> None: ...
    def fork(
        self, lease: Lease, keys: Ints, at: int, last_step: int
    ) -> tuple[Lease | None, list[tuple[int, int, int]]]: ...
    def truncate(self, lease: Lease, num_tokens: int, last_step: int = -1) -> None: ...
    def slide_window(self, lease: Lease, kv_len: int, last_step: int = -1) -> None: ...
    def release(self, lease: Lease, last_step: int = -1) -> None: ...
    def invalidate(self, lease: Lease, last_step: int = -1) -> None: ...
    def retire(self, step: int) -> None: ...
    def flush(self) -> int: ...
    def stats(self, group: int = 0) -> PoolStats: ...
    def available_pages(self) -> int: ...
    def take_events(self) -> list[tuple[str, int, bytes, bytes, int]]: ...
    def hash_pages(self, ns: int, keys: Ints) -> list[bytes]: ...
    def check_invariants(self) -> None: ...
    def debug_string(self) -> str: ...
    def test_fail_allocation(self, k: int) -> None: ...

# --- batch
FINISHED_STOP: int
FINISHED_LENGTH: int
HELD: int
BAD_LOGITS: int
SKIPPED: int

class StepPlan:
    step_id: int
    num_items: int
    num_tokens: int
    mask_rows: list[int]  # rows of items whose drawn token must obey the mask posted for it
    def items(self) -> list[tuple[int, int, str, int, int]]: ...  # row, gen, kind, q_len, logit_from
    def serialize(self) -> bytes: ...
    @staticmethod
    def deserialize(data: bytes) -> StepPlan: ...

class StepResult:
    step_id: int
    def items(self) -> list[tuple[int, int, int, int, int]]: ...  # row, gen, n, token_begin, flags
    tokens: list[int]
    logprobs: list[float]
    num_tokens: int
    num_kv: int
    num_logit_rows: int
    start_ns: int
    head_ns: int
    done_ns: int
    error: str

class BuiltStep:
    plan: StepPlan | None
    blocked: list[int]
    num_extend_tokens: int
    num_decode_rows: int
    num_resume_rows: int
    num_kv: int
    num_logit_rows: int

class BatchBuilder:
    def __init__(self, cache: CacheManager, max_rows: int) -> None: ...
    num_free_rows: int
    def admit(
        self,
        ns: int,
        tokens: Ints,
        *,
        prompt_len: int,
        max_len: int,
        min_len: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stream: int = 0,
        rope_mode: int = 0,
        return_logprob: bool = False,
        stop_ids: Sequence[int] = (),
        keys: Ints | None = None,
        masked: bool = False,  # every token drawn for it obeys a mask that is posted: Executor.post_mask, mask_posted
    ) -> tuple[int, int, int]: ...  # row, gen, cached_len; CapacityError when no row is free
    def admit_fork(
        self, parent: int, at: int, ns: int, tokens: Ints, **same_as_admit: Any
    ) -> tuple[int, int, int]: ...  # row -1: no pages
    def begin_step(self, step_id: int) -> None: ...
    def add_decodes(self) -> int: ...
    def add_extend(self, row: int, max_tokens: int) -> int: ...
    def end_step(self) -> BuiltStep: ...
    # rows, tokens (-1: none), flags, logprobs. HELD: the token's mask was late; the row is "held" until it is there
    def commit(self, result: StepResult) -> tuple[list[int], list[int], list[int], list[float]]: ...
    # To be called with every Executor.post_mask of the row, late or in time: add_decodes resumes it where it is held
    def mask_posted(self, row: int, position: int) -> None: ...
    def pause(self, row: int) -> None: ...
    def resume(self, row: int) -> None: ...
    def release(self, row: int, keep: bool = True, failed: bool = False) -> None: ...
    def pending_prefix(self, ns: int, keys: Ints) -> int: ...
    def phase(self, row: int) -> str: ...  # "free" "extend" "decode" "held" "paused" "done"
    def gen(self, row: int) -> int: ...
    def num_tokens(self, row: int) -> int: ...
    def tokens(self, row: int) -> Ints: ...
    def planned_len(self, row: int) -> int: ...
    def cached_len(self, row: int) -> int: ...
    def in_flight(self, row: int) -> int: ...
    def valid(self, row: int) -> bool: ...
    def pages(self, row: int, group: int = 0) -> Ints: ...
    def check_invariants(self) -> None: ...

# --- executor
class Runner: ...  # what Executor takes; handed over once

def checksum_runner(
    groups: Sequence[KvGroup],
    num_pages: Sequence[int],
    vocab_size: int = 1000,
    *,
    stall_seed: int = 0,
    stall_us: int = 0,
    bad_every: int = 0,
    fail_every: int = 0,
) -> Runner: ...
def checksum_next_token(groups: Sequence[KvGroup], vocab_size: int, tokens: Ints, mask: Mask | None = None) -> int: ...
def noop_runner(token: int, forward_us: int = 0, head_us: int = 0) -> Runner: ...

class StepTrace:
    step_id: int
    submit_ns: int
    start_ns: int
    head_ns: int
    done_ns: int
    num_extend_items: int
    num_decode_items: int

class Executor:
    def __init__(
        self,
        runner: Runner,
        groups: Sequence[KvGroup],
        max_rows: int,
        *,
        trace_capacity: int = 0,
        recorder_capacity: int = 0,
        nice: int = 0,
    ) -> None: ...
    queued: int
    # The mask of the row's token at an absolute position, for plans that name the row in mask_rows. At any time, from
    # any thread; a second one replaces the first; ignored once the row of this generation has ended.
    def post_mask(self, row: int, gen: int, position: int, bits: Mask) -> None: ...
    def submit(self, plan: StepPlan) -> None: ...
    def drain(self) -> list[tuple[str, int, StepResult | None]]: ...  # ("head" | "result", step_id, result)
    def fileno(self) -> int: ...
    def wait_idle(self) -> None: ...
    def shutdown(self) -> None: ...
    def take_trace(self) -> list[StepTrace]: ...
    def recorded_plans(self) -> list[bytes]: ...

# Segments whose page tables begin alike (-1 behind their ends), each of `tokens` tokens that it may have in common with
# others, 0 where none: (indptr, segments, lens); prefix i is that of segments[indptr[i] : indptr[i + 1]], lens[i]
# tokens, a multiple of chunk_len.
def find_shared_prefixes(
    page_table: np.ndarray, tokens: np.ndarray, page_size: int, chunk_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...

# A RowTable for executors written in Python (the reference executor).
class RowTable:
    def __init__(self, groups: Sequence[KvGroup], max_rows: int, vocab_size: int = 0) -> None: ...  # 0: of any size
    def post_mask(self, row: int, gen: int, position: int, bits: Mask) -> None: ...  # as Executor.post_mask
    def prepare(self, plan: StepPlan) -> dict[str, Any]: ...
    # applies row_ops, then: tokens positions token_segment logit_src logit_segment logit_rows logit_masked: int arrays
    # (logit_src -1: the hidden state kept of the row; logit_masked: keep it);
    # segments: list of (row, item, q_begin, q_len, kv_len, rope_mode); slots: list per group of int64 [T];
    # page_tables: [group][segment] int32 arrays; copies: list of (group, src, dst); skipped_items: list[int];
    # sampling: dict of [L] arrays by their names in cuda/sampling/params.h
    def sample(self, plan: StepPlan, prepared: dict[str, Any], logits: np.ndarray) -> StepResult: ...  # f32 [L, vocab]
    # The same with what another sampler drew: int32, f32, int32 [L]. held: bool [L], of a plan with mask_rows: whose
    # masks were late.
    def commit(
        self, plan: StepPlan, tokens: np.ndarray, logprobs: np.ndarray, bad: np.ndarray, held: np.ndarray = ...
    ) -> StepResult: ...
    @staticmethod
    def fail(plan: StepPlan, error: str) -> StepResult: ...  # the result of a step that raised: no items, only why

# Plans for a device that keeps the rows itself (cpp/batch/plan_packer.h, cuda/batch/params.h).
class PackedPlan:
    step_id: int
    sequence: int  # of this packer's plans: 1, 2, ..
    num_bytes: int
    num_items: int
    num_tokens: int
    num_logit_rows: int
    max_q_len: int
    max_kv_bound: int
    any_logprob: bool
    any_banned: bool
    q_lens: np.ndarray  # int32 [num_items]
    # int64 [num_items]: of those with queries, kv_len after the step if the row is alive and not held; else the device
    # has q_len
    kv_bounds: np.ndarray
    copies: list[tuple[int, int, int]]  # group, src, dst
    num_masked: int
    # (logit row, row, gen, position, query token or -1) of those that draw under masks
    masked: list[tuple[int, int, int, int, int]]

# See cpp/batch/plan_packer.h. mask_index, masks: byte offsets.
class PackedMasks:
    num_bytes: int
    num_held: int
    num_masks: int
    mask_index: int
    masks: int

class PlanPacker:
    def __init__(
        self, groups: Sequence[KvGroup], max_rows: int, *, max_pages: int, max_stop_ids: int, vocab_size: int
    ) -> None: ...
    result_bytes: int  # of any plan's result block
    def bytes_needed(self, plan: StepPlan) -> int: ...
    # out: writeable uint8 [>= bytes_needed]. A bad plan raises, and has failed then.
    def pack(self, plan: StepPlan, out: np.ndarray) -> PackedPlan: ...
    def post_mask(self, row: int, gen: int, position: int, bits: Mask) -> None: ...  # as Executor.post_mask
    def masks_posted(self, packed: PackedPlan) -> bool: ...  # but for those of rows that have ended
    # Of the plan packed last, once, when its tokens are drawn: whose mask is not there is held.
    def mask_bytes(self, packed: PackedPlan) -> int: ...
    def pack_masks(self, packed: PackedPlan, out: np.ndarray) -> PackedMasks: ...
    def drop_masks(self, plan: StepPlan, result: StepResult) -> None: ...  # of rows that have ended
    num_masks: int  # that wait
    # Of the plan packed last, as find_shared_prefixes has them: decode items behind the same pages.
    def shared_prefixes(self, plan: StepPlan, chunk_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
    def fail(self, plan: StepPlan) -> None: ...  # it was not launched: its rows may not run again before an init

# From the block that the plan's step left on the device; sequence 0: of any packing of this step_id.
def finish_packed(plan: StepPlan, result_block: np.ndarray, sequence: int = 0) -> StepResult: ...

# --- program
def isa_levels() -> list[str]: ...  # supported here, lowest first
def best_isa() -> str: ...

# What a weight [n, k] becomes when it is quantised to "int8" or "int4" and read back.
def quantized_weight(
    weight: np.ndarray[Any, np.dtype[np.float32]], format: str, isa: str = "auto"
) -> np.ndarray[Any, np.dtype[np.float32]]: ...
def usable_cpus() -> int: ...

class ProgramBuilder:
    def __init__(self, act: str, vocab_size: int) -> None: ...  # act: "float32" | "bfloat16"
    def value(self, dtype: str, rows: str, cols: int) -> int: ...  # rows "T" | "L"; dtype "float32" | "bfloat16"
    def slot(self) -> int: ...
    def node(
        self,
        op: str,
        segment: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        weights: Sequence[int],
        ints: Sequence[int],
        floats: Sequence[float],
        name: str,
    ) -> None: ...  # segment "forward" | "head" | "sample"

class WeightStore:
    def __init__(self, act: str, num_slots: int, isa: str = "auto") -> None: ...
    total_bytes: int
    # parts: (address, dtype "float32"|"bfloat16"|"float16", rows, cols, stride) stacked along rows; address 0 = dummy
    # rows. kind: "linear" | "gate_up" | "table" | "vector" | "f32". The memory must stay mapped during the call, which
    # runs without the GIL.
    def fill(
        self,
        slot: int,
        kind: str,
        parts: Sequence[tuple[int, str, int, int, int]],
        *,
        dummy_scale: float = 0.0,
        num_threads: int = 0,
        format: str = "act",  # "int8" | "int4": linear and gate_up only
    ) -> None: ...
    def alias(self, slot: int, of: int) -> None: ...

class CpuRunner(Runner):
    def __init__(
        self,
        program: ProgramBuilder,
        weights: WeightStore,
        groups: Sequence[KvGroup],
        num_pages: Sequence[int],
        *,
        num_kv_heads: int,
        head_dim: int,
        max_step_tokens: int,
        num_threads: int = 0,
        nice: int = 0,
        isa: str = "auto",
        int8_kv: bool = False,
        debug: bool = False,
    ) -> None: ...
    kv_bytes: int
    num_threads: int
    isa: str
    def tap_logits(self, on: bool) -> None: ...
    def take_logits(self) -> list[tuple[int, int, int, int, np.ndarray]]: ...  # step, row, gen, position, f32 [vocab]
    def read_kv(self, group: int, layer_in_group: int, page: int, offset: int) -> bytes: ...
    def poison_kv(self) -> None: ...
    def stop_after(self, node: str) -> None: ...
    def dump(self, node: str) -> bytes: ...
    def time_nodes(self, on: bool) -> None: ...
    def node_times(self) -> list[tuple[str, int, int]]: ...  # name, calls, ns

# --- sampling (tests)
class Adjustments:
    def __init__(
        self,
        *,
        banned: Sequence[int] = (),
        mask: Sequence[int] | np.ndarray = (),
        occurred: Sequence[tuple[int, int, bool]] = (),
        repetition: float = 1.0,
        frequency: float = 0.0,
        presence: float = 0.0,
        logit_bias: Sequence[tuple[int, float]] = (),
    ) -> None: ...

def sample_row(
    logits: np.ndarray,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    stream: int,
    position: int,
    adjustments: Adjustments = ...,
) -> tuple[int, float, bool]: ...
def adjusted_logits(logits: np.ndarray, adjustments: Adjustments) -> np.ndarray: ...
def keyed_bits(seed: int, stream: int, position: int, token: int) -> int: ...
def keyed_gumbel(bits: int) -> float: ...
