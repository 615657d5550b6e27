"""From an EngineConfig to a loaded model: the one place that joins checkpoint, program, memory and executor.

engine/ calls `load` once at its start; what it gets runs StepPlans and answers what a scheduler must know of the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.errors import InternalError, InvalidRequest
from sapwood.memory.sizing import max_positions, require_free, size_pool
from sapwood.models import hub, registry
from sapwood.models.config import HfConfig, eos_token_ids, generation_defaults
from sapwood.models.weights import (
    Checkpoint,
    fill_rope_tables,
    fill_store,
    part_rows,
    resolve_dtype,
    rope_table_bytes,
    slot_array,
)
from sapwood.program import native
from sapwood.program.ir import ActDType, Program, WeightFormat
from sapwood.program.quantize import HEAD_FORMAT, quantize

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes of weights done, bytes in all


@dataclasses.dataclass
class LoadedModel:
    """A model ready to run.

    executor         _core.Executor, or another device's with the same interface
    runner           what the executor runs, for taps and dumps: _core.CpuRunner, ReferenceModel or CudaModel; touch it
                     only while no step runs
    groups, num_pages    KV groups and the pages of each, for the cache manager
    max_rows         rows the executor has; the batch builder must not have more
    max_step_tokens  most query tokens of one step
    context_len      tokens a request may have in all
    rope_mode        total tokens a request can reach to the rope mode it must be admitted with
    cache_salt       64 bits that differ when weights, configuration or dtype do: part of every cache namespace
    generation_defaults  sampling settings the checkpoint recommends, by SamplingParams' names
    """

    executor: Any
    runner: Any
    groups: list[_core.KvGroup]
    num_pages: list[int]
    max_rows: int
    max_step_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    context_len: int
    rope_mode: Callable[[int], int]
    cache_salt: int
    name: str
    model_dir: Path
    generation_defaults: dict[str, float | int]
    dtype: ActDType
    program: Program


def load(config: EngineConfig, progress: Progress | None = None, *, debug: bool = False) -> LoadedModel:
    """Find, check and load the model, and start its executor (the caller shuts it down).

    debug   the native runner keeps every node's output apart, with canaries and NaN poison (slow)

    Raises InvalidRequest for what the user can put right (paths, settings, files), UnsupportedModel naming what is
    supported.
    """
    dummy = config.load_format == "dummy"
    model_dir = hub.resolve_model_dir(config.model, config.revision, weights=not dummy)
    raw = HfConfig.read(model_dir / "config.json")
    generation_path = model_dir / "generation_config.json"
    generation = HfConfig.read(generation_path) if generation_path.is_file() else HfConfig({}, generation_path)
    family = registry.resolve(raw.architecture)
    model_config: registry.ModelConfig = family.configure(raw)
    checkpoint = None if dummy else Checkpoint.open(model_dir)
    act = resolve_dtype(config.dtype, checkpoint.dtype() if checkpoint else _declared_dtype(raw))
    context_len = _context_len(config, model_config.context_len)
    program = family.record(model_config, act, context_len)
    if checkpoint is not None:
        checkpoint.check(program)
    if config.quantization is not None:
        program = quantize(program, config.quantization, _head_format(config))
    max_step_tokens = config.chunked_prefill_size + config.max_running_requests
    executor, runner, groups, num_pages = _start(
        config, program, checkpoint, context_len, max_step_tokens, progress, debug
    )
    return LoadedModel(
        executor=executor,
        runner=runner,
        groups=groups,
        num_pages=num_pages,
        max_rows=config.max_running_requests,
        max_step_tokens=max_step_tokens,
        vocab_size=model_config.vocab_size,
        eos_token_ids=eos_token_ids(raw, generation),
        context_len=context_len,
        rope_mode=model_config.rope_mode,
        cache_salt=_cache_salt(model_dir, checkpoint, act, config),
        name=model_dir.name if Path(config.model).expanduser().is_dir() else config.model,
        model_dir=model_dir,
        generation_defaults=generation_defaults(generation),
        dtype=act,
        program=program,
    )


def _start(
    config: EngineConfig,
    program: Program,
    checkpoint: Checkpoint | None,
    context_len: int,
    max_step_tokens: int,
    progress: Progress | None,
    debug: bool,
) -> tuple[Any, Any, list[_core.KvGroup], list[int]]:
    """(executor, runner, groups, pages of each group) on the configured device; weights first, so that the pool gets
    what is left.
    """
    if config.device != "cuda":
        for name in ("attention_backend", "disable_cuda_graph", "cuda_graph_max_bs"):
            if getattr(config, name):
                raise InvalidRequest(f"{name} is for device 'cuda', not {config.device!r}; leave it out", name)
    match config.device:
        case "cpu":
            groups = native.kv_groups(program, config.page_size, int8_kv=native.has_int8_kv(program, config))
            isa = native.resolve_isa(config)  # a wrong level is cheaper to hear of before gigabytes are read
            store = _core.WeightStore(program.act, len(program.slots), isa)
            num_threads = config.num_threads or 0
            _require_room(native.weight_bytes(program), program)
            fill_store(program, store, checkpoint, num_threads=num_threads, progress=progress)
            num_pages = size_pool(config, groups, context_len=context_len)
            # Sized after the pool, which leaves 1 - mem_fraction_static of the memory to such as these: a token's
            # angles are a hundredth of its KV.
            positions = max_positions(groups, num_pages, context_len)
            require_free(
                rope_table_bytes(program, positions),
                f"the rope tables of {positions} positions",
                "lower --context-length, or free memory",
                "context_length",
            )
            fill_rope_tables(program, store, positions, num_threads=num_threads)
            runner: Any = native.make_runner(
                program,
                native.lower(program),
                store,
                groups,
                num_pages,
                config,
                max_step_tokens=max_step_tokens,
                debug=debug,
            )
            return native.make_executor(runner, groups, config), runner, groups, num_pages
        case "reference":
            from sapwood.program import reference  # torch: seconds to import, and not installed to serve
            from sapwood.program.plan_executor import PlanExecutor

            groups = _reference_groups(program, config.page_size)
            _require_room(sum(4 * math.prod(slot.shape) for slot in program.slots), program)
            num_pages = size_pool(config, groups, context_len=context_len)
            runner = reference.ReferenceModel(
                program,
                lambda slot: slot_array(slot, checkpoint, program.act),
                num_pages,
                config.page_size,
                int8_kv=native.has_int8_kv(program, config),
            )
            rows = _core.RowTable(groups, config.max_running_requests, program.vocab_size)
            return (
                PlanExecutor(runner, rows, trace_capacity=config.trace_capacity),
                runner,
                groups,
                num_pages,
            )
        case "cuda":
            from sapwood.program import cuda  # torch, as above

            device = cuda.CudaDevice(
                program,
                cuda.WeightSource(
                    None if checkpoint is None else lambda part: part_rows(part, checkpoint),
                    lambda slot: slot_array(slot, checkpoint, program.act),
                ),
                config,
                context_len=context_len,
                max_step_tokens=max_step_tokens,
            )
            num_pages = size_pool(config, device.groups, context_len=context_len, free_bytes=device.free_bytes)
            return device.start(num_pages), device.model, device.groups, num_pages
        case _:
            raise InternalError(f"no device {config.device!r}")


def _require_room(num_bytes: int, program: Program) -> None:
    require_free(
        num_bytes,
        f"the weights in {program.act}",
        "load a smaller model, dtype bfloat16 instead of float32, set --quantization int8 or int4, or free memory",
        "model",
    )


def _reference_groups(program: Program, page_size: int) -> list[_core.KvGroup]:
    """Groups in float32 without padding; any page size from 1 to 64."""
    layer_bytes = 2 * page_size * program.num_kv_heads * program.head_dim * 4
    return [
        _core.KvGroup(
            g.kind, window=g.window, num_layers=g.num_layers, page_size=page_size, page_bytes=layer_bytes * g.num_layers
        )
        for g in program.groups
    ]


def _declared_dtype(raw: HfConfig) -> str:
    """config.json's dtype ("torch_dtype" before transformers 5); float32 where it is silent."""
    value = raw.values.get("dtype") or raw.values.get("torch_dtype") or "float32"
    return str(value).removeprefix("torch.")


def _context_len(config: EngineConfig, of_model: int) -> int:
    if config.context_length is None:
        return of_model
    if config.context_length > of_model:
        log.warning(
            "context_length %d is beyond the model's %d: quality past it is not the model's",
            config.context_length,
            of_model,
        )
    return config.context_length


def _head_format(config: EngineConfig) -> WeightFormat:
    return HEAD_FORMAT[config.quantization] if config.quantization and not config.skip_lm_head_quantization else "act"


def _cache_salt(model_dir: Path, checkpoint: Checkpoint | None, act: ActDType, config: EngineConfig) -> int:
    digest = hashlib.blake2b(digest_size=8)
    digest.update((model_dir / "config.json").read_bytes())
    digest.update(checkpoint.identity() if checkpoint is not None else b"dummy")
    digest.update(f"{act} {config.quantization} {_head_format(config)}".encode())
    return int.from_bytes(digest.digest(), "little")
