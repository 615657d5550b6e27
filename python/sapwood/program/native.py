"""The native CPU executor: lowers a Program to the core, once; after that no Python runs in a step.

models/loader.py calls `lower`, fills the weight store, sizes the pool and calls `make_executor`; engine/ submits
StepPlans to what that returns. Kernels, layout and threads are cpp/program/cpu_runner.h's and cpp/kernels/kernels.h's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.errors import InvalidRequest
from sapwood.program.ir import ArrayPart, Program, Value
from sapwood.program.ops import OPS, QUANT_BLOCK

PAGE_SIZES = (16, 32, 64)  # what the CPU attention kernels take
DIM_MULTIPLE = 16  # head_dim is padded to it inside a page (KvLayout in kernels.h)
PANEL = 64  # rows of a packed panel (kPanel in kernels.h)
COMPUTE_NICE = 5  # the event loop must be able to preempt the compute threads (one of two cores is its too)


def lower(program: Program) -> _core.ProgramBuilder:
    """The program as the core takes it: value and slot ids stay the same, named parameters become lists in OPS'
    order.
    """
    builder = _core.ProgramBuilder(program.act, program.vocab_size)
    for value in program.values:
        builder.value(value_dtype(program, value), value.rows.name, value.cols)
    for _ in program.slots:
        builder.slot()
    for node in program.nodes:
        spec = OPS[node.op]
        builder.node(
            node.op, node.segment, [v.id for v in node.inputs], [v.id for v in node.outputs],
            [-1 if w is None else w.id for w in node.weights], [int(node.params[n]) for n in spec.ints],
            [float(node.params[n]) for n in spec.floats], node.name,
        )  # fmt: skip
    return builder


def value_dtype(program: Program, value: Value) -> str:
    """float32, bfloat16 (what "act" means in this program) or q8."""
    return program.act if value.dtype == "act" else value.dtype


def has_int8_kv(program: Program, config: EngineConfig) -> bool:
    """Whether KV pages hold int8 rather than what the program computes in. InvalidRequest for a third dtype."""
    wanted: str = config.kv_cache_dtype
    if wanted not in ("auto", "int8", program.act):
        raise InvalidRequest(
            f"kv_cache_dtype must be auto, int8 or the model's dtype {program.act}, got {wanted}; set dtype as well",
            "kv_cache_dtype",
        )
    return wanted == "int8"


def kv_groups(program: Program, page_size: int, *, int8_kv: bool = False) -> list[_core.KvGroup]:
    """The program's groups with the bytes of one page over all layers of the group, K and V, padding and int8's scales
    included.
    """
    if page_size not in PAGE_SIZES:
        raise InvalidRequest(f"page_size must be 16, 32 or 64 on device 'cpu', got {page_size}", "page_size")
    padded_dim = -(-program.head_dim // DIM_MULTIPLE) * DIM_MULTIPLE
    if int8_kv:
        token_bytes = padded_dim + 4
    else:
        token_bytes = padded_dim * (4 if program.act == "float32" else 2)
    layer_bytes = 2 * page_size * program.num_kv_heads * token_bytes
    return [
        _core.KvGroup(
            group.kind,
            window=group.window,
            num_layers=group.num_layers,
            page_size=page_size,
            page_bytes=layer_bytes * group.num_layers,
        )
        for group in program.groups
    ]


def resolve_isa(config: EngineConfig) -> str:
    """The kernels' level: the setting, else SAPWOOD_CPU_ISA, else the best that this machine has and this build was
    compiled for. InvalidRequest names those.
    """
    isa: str = config.cpu_isa
    source = "cpu_isa"
    if isa == "auto" and (override := os.environ.get("SAPWOOD_CPU_ISA")):
        isa, source = override, "SAPWOOD_CPU_ISA"
    levels = _core.isa_levels()
    if isa != "auto" and isa not in levels:
        raise InvalidRequest(
            f"{source} {isa!r} is not available here; this machine and build have: {', '.join(levels)}", "cpu_isa"
        )
    return _core.best_isa() if isa == "auto" else isa


def weight_bytes(program: Program) -> int:
    """Bytes the weight store takes for the program's slots but those computed at record time (rope tables).

    The packing is cpp/kernels/pack.cc's: matrices in panels of PANEL rows, gate_up in panels of half gate, half up;
    bfloat16 has an even number of columns; int8 and int4 come in blocks of QUANT_BLOCK columns with a float16 scale.
    """
    item_bytes = 4 if program.act == "float32" else 2
    total = 0
    for slot in program.slots:
        if isinstance(slot.parts[0], ArrayPart):
            continue
        rows, cols = slot.shape[0], math.prod(slot.shape[1:])
        match slot.kind:
            case "linear" | "gate_up":
                panels = -(-rows // PANEL) if slot.kind == "linear" else -(-(rows // 2) // (PANEL // 2))
                if slot.format == "act":
                    row_bytes = (cols if item_bytes == 4 else cols + cols % 2) * item_bytes
                else:
                    block_bytes = (QUANT_BLOCK if slot.format == "int8" else QUANT_BLOCK // 2) + 2
                    row_bytes = -(-cols // QUANT_BLOCK) * block_bytes
                total += panels * PANEL * row_bytes
            case "table":
                total += rows * cols * item_bytes
            case _:
                total += rows * cols * 4
    return total


def make_runner(
    program: Program,
    builder: _core.ProgramBuilder,
    weights: _core.WeightStore,
    groups: Sequence[_core.KvGroup],
    num_pages: Sequence[int],
    config: EngineConfig,
    *,
    max_step_tokens: int,
    debug: bool = False,
) -> _core.CpuRunner:
    """The runner: every slot must be filled. debug: no reuse of buffers, canaries, NaN poison before each step."""
    return _core.CpuRunner(
        builder,
        weights,
        groups,
        num_pages,
        num_kv_heads=program.num_kv_heads,
        head_dim=program.head_dim,
        max_step_tokens=max_step_tokens,
        num_threads=config.num_threads or 0,
        nice=COMPUTE_NICE,
        isa=resolve_isa(config),
        int8_kv=has_int8_kv(program, config),
        debug=debug,
    )


def make_executor(
    runner: _core.CpuRunner, groups: Sequence[_core.KvGroup], config: EngineConfig, *, recorder_capacity: int = 0
) -> _core.Executor:
    """The executor that owns the runner: a row for every running request."""
    return _core.Executor(
        runner,
        groups,
        config.max_running_requests,
        trace_capacity=config.trace_capacity,
        recorder_capacity=recorder_capacity,
        nice=COMPUTE_NICE,
    )
