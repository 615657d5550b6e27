"""Device "cuda": what it can run, its memory, and its executor.

models/loader.py checks a program here, opens the device, sizes the KV pool by what is measured to be free, and starts
the executor:

    cuda.py             this: weights, measuring, starting
    cuda_executor.py    a step: the packed plan, its launches, its result
    cuda_graphs.py      launches captured for sizes in buckets
    cuda_model.py       nodes as launches over buffers that stay in place
    cuda_attention.py   attention backends
    cuda_rows.py        rows and a step's arrays, on the device
    cuda_completion.py  how the loop hears that a step is done
    cuda_library.py     libsapwood_cuda.so

The tests run all of this on a CPU: device "cpu" with the library that tests/cuda/ builds.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.errors import InvalidRequest, MissingExtra
from sapwood.program.cuda_library import CudaLibrary
from sapwood.program.ir import Program, TensorPart, WeightSlot

try:
    import torch
except ImportError:
    raise MissingExtra("device 'cuda' needs torch: pip install 'sapwood[cuda]'") from None

from sapwood.program import cuda_attention, cuda_completion, cuda_rows
from sapwood.program.cuda_executor import CudaExecutor, StepLauncher
from sapwood.program.cuda_model import CudaModel

log = logging.getLogger(__name__)

MAX_GRAPH_ROWS: Final = 256
# Stop ids a request may have: 256 of its own (request.py) and the model's end tokens.
MAX_STOP_IDS: Final = 320


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """Where a slot's values come from (models/weights.py).

    rows     a part's rows of the checkpoint: float32, or the bits of bfloat16 as uint16; None: there is no checkpoint,
             matrices get random values
    values   any slot's values as float32
    """

    rows: Callable[[TensorPart], np.ndarray[Any, Any]] | None
    values: Callable[[WeightSlot], np.ndarray[Any, np.dtype[np.float32]]]


class CudaDevice:
    """A model on a device: weights and buffers are taken here, the KV pool by `start`.

    free_bytes   of the device, measured after the largest step has run once, and with what the graphs will need and
                 attention may take for a step left out; None on the emulated device, whose memory is the machine's
    """

    def __init__(
        self, program: Program, weights: WeightSource, config: EngineConfig, *, context_len: int, max_step_tokens: int
    ) -> None:
        """Raises InvalidRequest, with the remedy, where the device is not there or cannot run this."""
        check_supported(program, config)
        self._library, self._device = open_device()
        self._config = config
        self._stream = torch.cuda.Stream(self._device) if self._device != "cpu" else None
        self.groups = kv_groups(program, config.page_size)
        max_rows, num_groups = config.max_running_requests, len(program.groups)
        max_pages = -(-context_len // config.page_size)
        before = self._used_bytes()
        slots = upload_weights(program, weights, self._device)
        self._weight_bytes = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in slots}.values())
        # Prompts may share a step with a decode of every row; padding goes up to the next bucket.
        self._max_tokens = max(max_step_tokens, max_rows)
        self._packer = _core.PlanPacker(
            self.groups, max_rows, max_pages=max_pages, max_stop_ids=MAX_STOP_IDS, vocab_size=program.vocab_size
        )
        self._rows = cuda_rows.DeviceRows(
            num_groups,
            max_rows=max_rows,
            page_size=config.page_size,
            max_pages=max_pages,
            max_stop_ids=MAX_STOP_IDS,
            max_tokens=self._max_tokens,
            blob_bytes=cuda_rows.max_blob_bytes(max_rows, max_pages, self._max_tokens, num_groups, MAX_STOP_IDS)
            + cuda_rows.ALIGNMENT
            + cuda_attention.told_bytes(max_rows),
            vocab_size=program.vocab_size,
            device=self._device,
            library=self._library,
            stream=self._stream,
        )
        self.model = CudaModel(
            program,
            slots,
            self._rows,
            max_tokens=self._max_tokens,
            library=self._library,
            stream=self._stream,
            deterministic=config.enable_deterministic_inference,
        )
        self._attention = self._make_attention(program)
        self._launcher = self._make_launcher()
        self.free_bytes = self._measure(context_len) if self._stream is not None else None
        log.info(
            "weights %s, buffers %s", _gib(self._weight_bytes), _gib(self._used_bytes() - before - self._weight_bytes)
        )

    def start(self, num_pages: Sequence[int]) -> CudaExecutor:
        """Take the pool, capture the graphs, start the executor."""
        self._take_pool(num_pages)
        self._launcher.capture()
        if self._stream is not None:
            pool_bytes = sum(n * group.page_bytes for n, group in zip(num_pages, self.groups, strict=True))
            log.info(
                "KV pool %s (%d tokens), %d CUDA graphs, %s left free",
                _gib(pool_bytes),
                max(num_pages) * self._rows.page_size,
                self._launcher.num_graphs,
                _gib(torch.cuda.mem_get_info(self._device)[0]),
            )
        event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        completion = cuda_completion.Completion(
            self._library,
            None if self._stream is None else self._stream.cuda_stream,
            event_fd,
            lambda: _record_event(self._stream),
        )
        return CudaExecutor(
            self._launcher,
            self._rows,
            self._packer,
            completion,
            event_fd,
            self._stream,
            trace_capacity=self._config.trace_capacity,
        )

    def _make_attention(self, program: Program) -> cuda_attention.AttentionBackend:
        match self._config.attention_backend:
            case "flashinfer":
                return cuda_attention.FlashInferAttention(program, self._rows)
            case "reference":
                return cuda_attention.ReferenceAttention(program, self._rows)
        return cuda_attention.SapwoodAttention(
            program,
            self._rows,
            max_tokens=self._max_tokens,
            library=self._library,
            stream=self._stream,
            deterministic=self._config.enable_deterministic_inference,
        )

    def _make_launcher(self) -> StepLauncher:
        config, max_rows, max_tokens = self._config, 0, 0
        if not config.disable_cuda_graph:
            most = config.cuda_graph_max_bs or MAX_GRAPH_ROWS
            max_rows = min(most, config.max_running_requests)
            max_tokens = self._max_tokens
        return StepLauncher(
            self.model, self._attention, self._stream, max_graph_rows=max_rows, max_graph_tokens=max_tokens
        )

    def _measure(self, context_len: int) -> int:
        """Free bytes once everything has been used that is going to be used, the pool apart.

        Runs the largest step, over a pool of one page, and captures the largest graph of each kind: the others of its
        kind are taken to need as much, though what they work in they share.
        """
        assert self._stream is not None
        self._take_pool([1] * len(self.groups))
        with torch.cuda.stream(self._stream):
            self._launcher.warm_up(self._max_tokens)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        graphs, graph_bytes = [], 0
        for capture, count in self._launcher.largest_captures():
            before = torch.cuda.mem_get_info(self._device)[0]
            graphs.append(capture())
            torch.cuda.synchronize(self._device)
            graph_bytes += max(0, before - torch.cuda.mem_get_info(self._device)[0]) * count
        graphs.clear()
        self._launcher.forget_captures()
        torch.cuda.empty_cache()
        free = max(0, torch.cuda.mem_get_info(self._device)[0] - graph_bytes)
        # A checkpoint may promise more context than any pool here can hold.
        token_bytes = sum(group.page_bytes for group in self.groups) // self._rows.page_size
        step_bytes = self._attention.step_bytes(self._max_tokens, min(context_len, free // token_bytes))
        return max(0, free - step_bytes)

    def _take_pool(self, num_pages: Sequence[int]) -> None:
        self.model.set_pool(num_pages)
        self._rows.set_dummy_pages(num_pages)
        if self._stream is not None:
            torch.cuda.synchronize(self._device)  # what fills memory is on another stream

    def _used_bytes(self) -> int:
        return 0 if self._stream is None else torch.cuda.memory_allocated(self._device)


class _NeverBehind:
    """An event of the emulated device, which has done a thing when it has been told."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _record_event(stream: torch.cuda.Stream | None) -> cuda_completion.Event:
    if stream is None:
        return _NeverBehind()
    event: cuda_completion.Event = stream.record_event(torch.cuda.Event(blocking=True))  # its waiters sleep
    return event


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def check_supported(program: Program, config: EngineConfig) -> None:
    """Raise InvalidRequest, with the remedy, where this device cannot run the program as configured."""
    if program.act != "bfloat16":
        raise InvalidRequest(f"device 'cuda' computes in bfloat16, not {program.act}; set --dtype bfloat16", "dtype")
    if program.head_dim % 8 != 0 or program.head_dim > 256:
        raise InvalidRequest(
            f"device 'cuda' needs a head_dim that is a multiple of 8 and at most 256, this model has "
            f"{program.head_dim}; use --device cpu",
            "device",
        )
    if config.enable_deterministic_inference and config.attention_backend == "flashinfer":
        raise InvalidRequest(
            "attention_backend 'flashinfer' splits keys by what else is in the batch, so it cannot serve "
            "enable_deterministic_inference; leave one of the two out",
            "attention_backend",
        )
    if config.quantization is not None:
        raise InvalidRequest(
            f"quantization {config.quantization!r} is not possible on device 'cuda' yet; leave it out, or use "
            "--device cpu",
            "quantization",
        )
    if config.kv_cache_dtype not in ("auto", "bfloat16"):
        raise InvalidRequest(
            f"kv_cache_dtype must be auto or bfloat16 on device 'cuda', got {config.kv_cache_dtype}", "kv_cache_dtype"
        )


def upload_weights(program: Program, source: WeightSource, device: str) -> list[torch.Tensor]:
    """Every slot's values on the device: matrices and tables bfloat16, the rest float32."""
    matrices: dict[tuple[Any, ...], torch.Tensor] = {}  # a tied head has the embedding's
    weights = []
    for slot in program.slots:
        parts = tuple(part for part in slot.parts if isinstance(part, TensorPart))
        if slot.kind in ("vector", "f32") or len(parts) < len(slot.parts):
            dtype = torch.float32 if slot.kind in ("vector", "f32") else torch.bfloat16
            weights.append(torch.from_numpy(np.array(source.values(slot))).to(device, dtype))
            continue
        if parts not in matrices:
            matrices[parts] = torch.empty(slot.shape, dtype=torch.bfloat16, device=device)
            if source.rows is None:
                _fill_random(matrices[parts], slot)
            else:
                _fill(matrices[parts], [source.rows(part) for part in parts])
        weights.append(matrices[parts])
    return weights


def _fill(weight: torch.Tensor, parts: Sequence[np.ndarray[Any, Any]]) -> None:
    """Part under part. Bits of bfloat16 go as they are in the file; torch rounds float32 as the core does, to even."""
    begin = 0
    for rows in parts:
        with warnings.catch_warnings():  # a mapped file is read-only, and torch would rather write
            warnings.simplefilter("ignore", UserWarning)
            values = torch.from_numpy(rows)
        weight[begin : begin + len(rows)].copy_(values.view(torch.bfloat16) if rows.dtype == np.uint16 else values)
        begin += len(rows)


def _fill_random(weight: torch.Tensor, slot: WeightSlot) -> None:
    """Reproducible on one kind of device; not the values that the core draws."""
    scale = 1.0 if slot.kind == "table" else float(slot.shape[-1] ** -0.5)
    generator = torch.Generator(weight.device).manual_seed(slot.id)
    for block in weight.split(4096):  # drawn in float32, which for all at once may be too much
        block.copy_(torch.randn(block.shape, generator=generator, device=weight.device) * scale)


def kv_groups(program: Program, page_size: int) -> list[_core.KvGroup]:
    """The program's groups with the bytes of one page over all layers of the group; any page size from 1 to 64."""
    layer_bytes = 2 * 2 * page_size * program.num_kv_heads * program.head_dim
    return [
        _core.KvGroup(
            g.kind, window=g.window, num_layers=g.num_layers, page_size=page_size, page_bytes=layer_bytes * g.num_layers
        )
        for g in program.groups
    ]


def open_device() -> tuple[CudaLibrary, str]:
    """The library beside this package, and torch's name of the GPU. Raises InvalidRequest where either is missing."""
    if not torch.cuda.is_available():
        raise InvalidRequest(
            f"device 'cuda': torch {torch.__version__} finds no GPU; use --device cpu, or install a driver and a torch "
            "that is built for CUDA",
            "device",
        )
    path = Path(__file__).resolve().parent.parent / "libsapwood_cuda.so"
    if not path.exists():
        raise InvalidRequest(
            f"device 'cuda' needs {path.name}, which this installation was built without; install again where nvcc is, "
            "with SAPWOOD_BUILD_CUDA=on pip install .",
            "device",
        )
    return CudaLibrary(path), "cuda"
