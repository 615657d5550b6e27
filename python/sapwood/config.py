"""The engine's configuration: every default once (floor 0). Names are SGLang's where the meaning is the same."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

from sapwood.errors import InvalidRequest

# Bounds of the integer settings, both included; the upper ones are far beyond any use, and what the engine can carry.
INT_RANGES: Final = MappingProxyType(
    {
        "context_length": (1, 2**24),
        "max_total_tokens": (1, 2**40),
        "page_size": (1, 64),
        "max_running_requests": (1, 2**16),
        "max_queued_requests": (0, 2**31),
        "chunked_prefill_size": (1, 2**20),
        "num_threads": (1, 1024),
        "trace_capacity": (0, 10**7),
    }
)
# Bounds of the others, both excluded; NaN is in no range.
FLOAT_RANGES: Final = MappingProxyType(
    {
        "mem_fraction_static": (0, 1),
        "priority_ageing_s": (0, 1e9),
        "max_step_ms": (-math.inf, math.inf),
        "request_timeout_s": (0, 1e9),
    }
)


class EngineConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """All settings of one engine. INT_RANGES and FLOAT_RANGES have the bounds of the numbers.

    Model
      model                  directory in HF format, or a hub id ("Qwen/Qwen3-0.6B")
      revision               hub revision
      tokenizer              directory or hub id of the tokenizer; None = the model's
      skip_tokenizer_init    work on token ids alone; no tokenizer is loaded, outputs have no text
      load_format            "auto" or "dummy" (random weights from config.json alone)
      dtype                  "auto" (the checkpoint's; fp16 becomes bfloat16), "float32" or "bfloat16"
      context_length         tokens a request may have in all; None = the model's
      device                 "cpu" (native), "reference" (torch, node by node: the oracle), "cuda"
    Memory
      max_total_tokens       KV pool size in tokens; None = sized from free memory by mem_fraction_static
      mem_fraction_static    share of free memory (after weights) for the KV pool when max_total_tokens is None
      page_size              tokens a KV page; 16, 32 or 64 on CPU
      disable_radix_cache    no prefix reuse at all
      prefix_cache           "radix" or "flat" (hash table of pages, for ablations)
    Scheduling
      max_running_requests   rows that may compute at once
      max_queued_requests    waiting requests beyond which new ones are refused with CapacityError; None = no limit
      schedule_policy        "fcfs", "lpm" (longest cached prefix first) or "priority"
      priority_ageing_s      seconds of waiting worth one level of priority (policy "priority")
      chunked_prefill_size   most prompt tokens one step computes, over all requests
      max_step_ms            a step's time budget while somebody decodes: prefill chunks are cut to it; <= 0 is off
      disable_overlap_schedule  plan a step only after the previous one's tokens are known (same tokens, slower)
      request_timeout_s      deadline of every request from its submission; None = none
    Executor
      num_threads            compute threads; None = usable cores (affinity mask, cgroup quota)
      cpu_isa                "auto", "scalar", "avx2", "avx512", "avx512_bf16"; SAPWOOD_CPU_ISA overrides "auto"
      trace_capacity         steps whose timing is kept for Engine.trace(); 0 = off
      random_seed            seeds the seeds drawn for requests that give none; None = from the OS
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    context_length: int | None = None
    device: Literal["cpu", "reference", "cuda"] = "cpu"

    max_total_tokens: int | None = None
    mem_fraction_static: float = 0.5
    page_size: int = 16
    disable_radix_cache: bool = False
    prefix_cache: Literal["radix", "flat"] = "radix"

    max_running_requests: int = 64
    max_queued_requests: int | None = None
    schedule_policy: Literal["fcfs", "lpm", "priority"] = "fcfs"
    priority_ageing_s: float = 10.0
    chunked_prefill_size: int = 2048
    max_step_ms: float = 250.0
    disable_overlap_schedule: bool = False
    request_timeout_s: float | None = None

    num_threads: int | None = None
    cpu_isa: Literal["auto", "scalar", "avx2", "avx512", "avx512_bf16"] = "auto"
    trace_capacity: int = 0
    random_seed: int | None = None

    def verify(self) -> None:
        """Raise InvalidRequest for the first setting out of range."""
        for name, (least, most) in INT_RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InvalidRequest(f"{name} must be {least}..{most}, got {value}", name)
        for name, (low, high) in FLOAT_RANGES.items():
            value = getattr(self, name)
            if value is not None and not low < value < high:
                raise InvalidRequest(f"{name} must be in ({low}, {high:g}), got {value}", name)

    @classmethod
    def from_kwargs(cls, model: str, **settings: Any) -> EngineConfig:
        """Build and verify. InvalidRequest for a wrong type or an unknown setting, naming the nearest valid one."""
        import difflib

        for name in settings:
            if name not in cls.__struct_fields__:
                near = difflib.get_close_matches(name, cls.__struct_fields__, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InvalidRequest(f"unknown engine setting {name!r}{hint}", name)
        try:
            config = msgspec.convert({"model": str(model), **settings}, cls)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"engine setting: {error}") from None
        config.verify()
        return config
