"""The configuration of an engine and of a server: every default once (floor 0). Names are SGLang's where the meaning is
the same.

settings.py fills these structs from the command line, the environment and a file; cli.py and the documentation take
each setting's description from its line in the docstring.
"""

from __future__ import annotations

import math
import os
import re
from types import MappingProxyType
from typing import Any, Final, Literal, Self

import msgspec

from sapwood.errors import InvalidRequest

# The model that comes with the package; models/hub.py knows where it is.
BUNDLED_MODEL: Final = "sapling"

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
        "cuda_graph_max_bs": (1, 2**14),
        "trace_capacity": (0, 10**7),
        "port": (0, 65535),
        "max_body_bytes": (1024, 2**40),
        "max_connections": (1, 2**20),
    }
)
# Bounds of the others, both excluded; NaN is in no range.
FLOAT_RANGES: Final = MappingProxyType(
    {
        "mem_fraction_static": (0, 1),
        "priority_ageing_s": (0, 1e9),
        "max_step_ms": (-math.inf, math.inf),
        "request_timeout_s": (0, 1e9),
        "header_timeout_s": (0, 1e9),
        "body_timeout_s": (0, 1e9),
        "send_timeout_s": (0, 1e9),
        "watchdog_timeout": (0, 1e9),
    }
)
# Settings whose values are nobody's business: left out of logs and of /server_info.
SECRETS: Final = frozenset({"api_key", "admin_api_key"})
# A browser's Origin header: scheme, host and port, without a path.
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#,]+")


class EngineConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """All settings of one engine. INT_RANGES and FLOAT_RANGES have the bounds of the numbers.

    Model
      model                  directory in HF format, a hub id ("Qwen/Qwen3-0.6B"), or "sapling", the bundled model
      revision               hub revision
      tokenizer              directory or hub id of the tokenizer; None = the model's
      skip_tokenizer_init    work on token ids alone; no tokenizer is loaded, outputs have no text
      load_format            "auto" or "dummy" (random weights from config.json alone)
      dtype                  "auto" (the checkpoint's; fp16 becomes bfloat16), "float32" or "bfloat16"
      quantization           "int8" or "int4": quantise the weights while loading, to 8.5 or 4.5 bits each
      skip_lm_head_quantization  quantise all but the LM head, which otherwise becomes int8 in both cases
      context_length         tokens a request may have in all; None = the model's
      device                 "cpu" (native), "reference" (torch, node by node: the oracle), "cuda"
    Memory
      max_total_tokens       KV pool size in tokens; None = sized from free memory by mem_fraction_static
      mem_fraction_static    share of free memory (after weights) for the KV pool when max_total_tokens is None; None =
                             0.5 on a CPU, 0.9 on a GPU (of what is left after buffers and graphs)
      page_size              tokens a KV page; 16, 32 or 64 on CPU
      kv_cache_dtype         "auto" (as it is computed), "int8" (half of bfloat16's memory: a scale for each token's
                             head), or dtype's own name
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
      request_timeout_s      seconds a request may take from its submission; None = no limit
    Executor
      num_threads            compute threads; None = usable cores (affinity mask, cgroup quota)
      attention_backend      on device "cuda": "sapwood", "flashinfer" (needs sapwood[flashinfer]) or "reference"
                             (torch, slow); None = sapwood
      disable_cuda_graph     launch every kernel of a step by itself
      cuda_graph_max_bs      decode steps of more rows than this get no graph; None = 256
      enable_deterministic_inference  the same bits whatever else runs: slower on "cuda", always so on a CPU
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
    quantization: Literal["int8", "int4"] | None = None
    skip_lm_head_quantization: bool = False
    context_length: int | None = None
    device: Literal["cpu", "reference", "cuda"] = "cpu"

    max_total_tokens: int | None = None
    mem_fraction_static: float | None = None
    page_size: int = 16
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
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
    attention_backend: Literal["sapwood", "flashinfer", "reference"] | None = None
    disable_cuda_graph: bool = False
    cuda_graph_max_bs: int | None = None
    enable_deterministic_inference: bool = False
    cpu_isa: Literal["auto", "scalar", "avx2", "avx512", "avx512_bf16"] = "auto"
    trace_capacity: int = 0
    random_seed: int | None = None

    def verify(self) -> None:
        """Raise InvalidRequest for the first setting out of range."""
        for name, (least, most) in INT_RANGES.items():
            value = getattr(self, name, None)  # an engine has no server's settings
            if value is not None and not least <= value <= most:
                raise InvalidRequest(f"{name} must be {least}..{most}, got {value}", name)
        for name, (low, high) in FLOAT_RANGES.items():
            value = getattr(self, name, None)
            if value is not None and not low < value < high:
                raise InvalidRequest(f"{name} must be in ({low}, {high:g}), got {value}", name)

    @classmethod
    def from_kwargs(cls, model: str, **settings: Any) -> Self:
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


class ServerConfig(EngineConfig, kw_only=True, forbid_unknown_fields=True):
    """All settings of one server: its engine's, and these.

    Server
      host                   address to listen on; 0.0.0.0 or :: is every network interface
      port                   port to listen on; 0 = any free one
      uds                    path of a Unix socket to listen on instead of host and port
      served_model_name      the model's name in the API; None = the last part of its directory or hub id
      chat_template          Jinja file that replaces the model's own chat template
      incremental_streaming_output  /generate streams what is new instead of all the text so far
      log_level              "debug", "info", "warning" or "error"
      log_requests           log every request's id, lengths and times, never its text
    Access
      api_key                clients must send it as a bearer token; safer in SAPWOOD_API_KEY or a file than here, where
                             `ps` shows it
      admin_api_key          the same for routes that change the server's state; None = api_key opens them too
      allowed_origins        origin whose pages may call the server from a browser (CORS), or "*"
    Limits
      max_body_bytes         largest request body
      max_connections        open connections beyond which new ones are refused; None = no limit
      header_timeout_s       seconds a client may take to send a request's head
      body_timeout_s         seconds a client may take to send a request's body
      send_timeout_s         seconds a client may leave a response unread before it is dropped
      drain_timeout_s        seconds that running requests get at SIGTERM; 0 = none, None = as long as they take
      watchdog_timeout       seconds a step may run before /health answers 503
    """

    model: str = BUNDLED_MODEL

    host: str = "127.0.0.1"
    port: int = 30000
    uds: str | None = None
    served_model_name: str | None = None
    chat_template: str | None = None
    incremental_streaming_output: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_requests: bool = False

    api_key: str | None = None
    admin_api_key: str | None = None
    allowed_origins: list[str] | None = None

    max_body_bytes: int = 32 * 2**20
    max_connections: int | None = 4096
    header_timeout_s: float = 30.0
    body_timeout_s: float = 60.0
    send_timeout_s: float = 30.0
    drain_timeout_s: float | None = None
    watchdog_timeout: float = 300.0

    def verify(self) -> None:
        """Raise InvalidRequest for the first setting out of range."""
        super().verify()
        if self.drain_timeout_s is not None and not 0 <= self.drain_timeout_s < 1e9:
            raise InvalidRequest(f"drain_timeout_s must be >= 0, got {self.drain_timeout_s}", "drain_timeout_s")
        for name in ("model", "host", "uds", "served_model_name", "chat_template"):
            if getattr(self, name) == "":
                raise InvalidRequest(f"{name} is empty", name)
        for name in ("api_key", "admin_api_key"):
            key = getattr(self, name)
            # Anything else cannot be sent in an Authorization header, so that no client could ever get in.
            if key is not None and not re.fullmatch(r"[!-~]+", key):
                raise InvalidRequest(f"{name} must be visible ASCII characters without spaces", name)
        for origin in self.allowed_origins or ():
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise InvalidRequest(
                    f"allowed_origins must be '*' or like 'https://chat.example.org' (no path), got {origin!r}",
                    "allowed_origins",
                )

    @classmethod
    def from_kwargs(cls, model: str = BUNDLED_MODEL, **settings: Any) -> Self:
        return super().from_kwargs(model, **settings)

    def engine_settings(self) -> dict[str, Any]:
        """What an engine of this server is made with, beside the model: AsyncEngine(config.model, **this)."""
        return {name: getattr(self, name) for name in EngineConfig.__struct_fields__ if name != "model"}

    def public_settings(self) -> dict[str, Any]:
        """Every setting, for logs and /server_info; of a secret only whether it is set."""
        settings = msgspec.structs.asdict(self)
        return settings | {name: settings[name] is not None for name in SECRETS}

    def model_name(self) -> str:
        """The model's name in the API."""
        # An absolute path has a last part where "." and "models/llama/.." have none of use.
        return self.served_model_name or os.path.basename(os.path.abspath(os.path.expanduser(self.model))) or self.model

    def __repr__(self) -> str:
        return f"ServerConfig({', '.join(f'{name}={value!r}' for name, value in self.public_settings().items())})"
