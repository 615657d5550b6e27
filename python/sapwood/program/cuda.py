"""Device "cuda": a Program run node by node by libsapwood_cuda.so, and by torch where there is nothing but a product.

models/loader.py makes a CudaModel and puts it into plan_executor.py. Activations are bfloat16, the residual stream,
sums and norms float32, as on the CPU. Of a step, one packed copy goes to the device; the list of attention's work is
made there, and the tokens are drawn there. Rows are the core's (_core.RowTable), on the host, so each step waits for
its tokens; graphs and steps queued ahead are not here yet.

The tests run all of this on a CPU: device "cpu" with the library that tests/cuda/ builds.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.errors import InvalidRequest, MissingExtra
from sapwood.program.cuda_library import (
    BF16,
    F32,
    SILU,
    AttentionParams,
    AttentionPlanParams,
    CudaLibrary,
    Params,
    RmsNormParams,
    RopeKvWriteParams,
    SampleParams,
    SiluMulParams,
    SmallGemmParams,
)
from sapwood.program.ir import Node, Program, WeightSlot
from sapwood.program.plan_executor import PreparedBatch

try:
    import torch
except ImportError:
    raise MissingExtra("device 'cuda' needs torch: pip install 'sapwood[cuda]'") from None

Array = np.ndarray[Any, Any]

SMALL_GEMM_ROWS: Final = 16  # more are torch's
ALIGNMENT: Final = 16  # bytes, of every part of the step's packed copy


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


def tilings(head_dim: int) -> tuple[Tiling, Tiling]:
    """Few rows a segment (decode), and many."""
    return Tiling(1, 32, 16, 512), Tiling(33, 2**30, 64 if head_dim > 128 else 128, 4096)


@dataclasses.dataclass
class _AttentionWork:
    """The lists of one tiling of one window, made by attention_plan, and room for partial results."""

    tiling: Tiling
    tiles: torch.Tensor
    items: torch.Tensor
    counts: torch.Tensor
    partial_o: torch.Tensor
    partial_ml: torch.Tensor


class _Step:
    """What a step's nodes read, on the device."""

    def __init__(self, batch: PreparedBatch, arrays: Mapping[str, torch.Tensor]) -> None:
        self.batch = batch
        self.arrays = arrays
        self.work: dict[tuple[int, int], list[_AttentionWork]] = {}  # by (group, window)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.arrays[name]


class CudaModel:
    """A Program with its weights and KV pool on a device.

    Thread safety: none; one thread runs steps. The pool of a group is bfloat16
    [layers][pages][K, V][kv heads][page_size][head_dim].
    """

    def __init__(
        self,
        program: Program,
        weights: Sequence[torch.Tensor],
        num_pages: Sequence[int],
        page_size: int,
        *,
        device: str,
        library: CudaLibrary,
    ) -> None:
        """weights: of every slot, as upload_weights makes them. The pool is taken here."""
        self.program = program
        self.page_size = page_size
        self._device = torch.device(device)
        self._library = library
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._weights = weights
        shape = (2, program.num_kv_heads, page_size, program.head_dim)
        self._kv = [
            torch.zeros((spec.num_layers, pages, *shape), dtype=torch.bfloat16, device=self._device)
            for spec, pages in zip(program.groups, num_pages, strict=True)
        ]
        self._tilings = tilings(program.head_dim)
        num_processors = 2
        if self._stream is not None:
            num_processors = torch.cuda.get_device_properties(self._device).multi_processor_count
        # Two blocks fit on a processor; each KV head has blocks of its own.
        self._attention_blocks = max(1, 2 * num_processors // program.num_kv_heads)

    # --- a step

    @torch.inference_mode()
    def run(
        self,
        batch: PreparedBatch,
        *,
        keep: dict[str, Array] | None = None,
        on_head: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """One step; returns logits [L, vocab] float32, on the device.

        keep      receives every node's first output by node name, float32
        on_head   called when the head segment begins
        """
        with self._on_stream():
            self.copy_pages(batch.copies)
            step = _Step(batch, self._upload(self._arrays(batch)))
            values: dict[int, torch.Tensor] = {}
            logits = self._empty(0, self.program.vocab_size, dtype=torch.float32)
            segment = "forward"
            for node in self.program.nodes:
                if node.segment != segment:
                    segment = node.segment
                    if segment == "head" and on_head is not None:
                        on_head()
                output = self._run_node(node, [values.get(value.id) for value in node.inputs], step)
                if output is None:
                    continue
                values[node.outputs[0].id] = output
                if keep is not None:
                    keep[node.name] = output.float().cpu().numpy()
                if node.op == "lm_head":
                    logits = output
            return logits

    @torch.inference_mode()
    def sample(self, rows: Any, plan: Any, prepared: dict[str, Any], logits: torch.Tensor) -> Any:
        """On the device; waits for the step. Returns the StepResult."""
        num_rows, vocab = logits.shape
        if num_rows == 0:
            return rows.commit(plan, np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32))
        arrays = dict(prepared["sampling"])
        if not arrays["banned_ids"].size:
            del arrays["banned_indptr"], arrays["banned_ids"]
        with self._on_stream():
            there = self._upload(arrays)
            drawn = self._empty(3, num_rows, dtype=torch.int32)  # tokens, log-probabilities, bad: one copy back
            self._call(
                "sample",
                SampleParams(
                    **{name: tensor.data_ptr() for name, tensor in there.items()}, num_rows=num_rows, vocab=vocab,
                    logits=logits.data_ptr(), logits_stride=logits.stride(0), token=drawn[0].data_ptr(),
                    logprob=drawn[1].data_ptr(), bad=drawn[2].data_ptr(),
                ),
            )  # fmt: skip
            tokens, logprobs, bad = drawn.cpu().numpy()
        return rows.commit(plan, tokens, logprobs.view(np.float32), bad)

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def copy_pages(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """(group, source page, destination page) of each copy, done in order, before the forward."""
        for group, source, target in copies:
            self._kv[group][:, target] = self._kv[group][:, source]

    def read_kv(self, group: int, layer_in_group: int, page: int, offset: int) -> Array:
        """[2, num_kv_heads, head_dim]: K and V of one token of one layer, float32."""
        return self._kv[group][layer_in_group, page, :, :, offset].float().cpu().numpy()

    def _arrays(self, batch: PreparedBatch) -> dict[str, Array]:
        """The step as flat arrays. A token's row of a rope table is its position in the table of its segment's mode."""
        lens = [segment[3] for segment in batch.segments]
        modes = np.repeat([segment[5] for segment in batch.segments], lens)
        arrays = {
            "tokens": np.asarray(batch.tokens, np.int32),
            "positions": np.asarray(batch.positions, np.int32),
            "rope_modes": modes.astype(np.int32),
            "logit_src": np.asarray(batch.logit_src, np.int32),
            "q_indptr": np.concatenate(([0], np.cumsum(lens))).astype(np.int32),
            "kv_lens": np.asarray([segment[4] for segment in batch.segments], np.int32),
            "page_rows": np.arange(len(lens), dtype=np.int32),
        }
        for group, (slots, tables) in enumerate(zip(batch.slots, batch.page_tables, strict=True)):
            table = np.full((len(tables), max((len(pages) for pages in tables), default=0)), -1, np.int32)
            for row, pages in zip(table, tables, strict=True):
                row[: len(pages)] = pages
            arrays[f"slots.{group}"] = np.asarray(slots, np.int64)
            arrays[f"page_table.{group}"] = table
        return arrays

    def _upload(self, arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        """All arrays in one copy."""
        starts, size = {}, 0
        for name, array in arrays.items():
            starts[name] = size
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        packed = torch.empty(max(size, ALIGNMENT), dtype=torch.uint8, pin_memory=self._stream is not None)
        for name, array in arrays.items():
            packed[starts[name] : starts[name] + array.nbytes] = torch.from_numpy(array.reshape(-1).view(np.uint8))
        there = packed.to(self._device, non_blocking=True)
        dtypes = {4: torch.int32, 8: torch.int64}
        return {
            name: there[starts[name] : starts[name] + array.nbytes].view(dtypes[array.itemsize]).view(array.shape)
            for name, array in arrays.items()
        }

    # --- nodes

    def _run_node(self, node: Node, inputs: list[torch.Tensor | None], step: _Step) -> torch.Tensor | None:
        x = [tensor for tensor in inputs if tensor is not None]
        w = [None if slot is None else self._weights[slot.id] for slot in node.weights]
        p = node.params
        match node.op:
            case "embedding":
                return _there(w[0])[step["tokens"].long()].float() * p["scale"]
            case "rms_norm":
                return self._rms_norm(x[0], _there(w[0]), float(p["eps"]), plus_one=bool(p["plus_one"]))
            case "qkv":
                return self._qkv(node, x[0], w, step)
            case "attention":
                return self._attention(node, x[0], step)
            case "linear":
                return self._linear(x[0], _there(w[0]), w[1])
            case "linear_residual":
                return self._linear(x[0], _there(w[0]), w[1], residual=x[1])
            case "gate_up":
                return self._silu_mul(self._linear(x[0], _there(w[0]), None))
            case "gather_logit_rows":
                return x[0][step["logit_src"].long()]
            case "lm_head":
                logits = self._linear(x[0], _there(w[0]), None, dtype=torch.float32) * p["scale"]
                return p["softcap"] * torch.tanh(logits / p["softcap"]) if p["softcap"] > 0 else logits
            case "sample":
                return None
        raise InvalidRequest(f"device 'cuda' has no op {node.op!r} (node {node.name!r})")

    def _empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _call(self, op: str, params: Params) -> None:
        self._library.call(op, params, None if self._stream is None else self._stream.cuda_stream)

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, *, plus_one: bool) -> torch.Tensor:
        y = torch.empty_like(x, dtype=torch.bfloat16)
        self._call(
            "rms_norm",
            RmsNormParams(
                x_dtype=F32, x=x.data_ptr(), weight=weight.data_ptr(), y=y.data_ptr(), x_stride=x.stride(0),
                y_stride=y.stride(0), num_rows=x.shape[0], hidden=x.shape[1], eps=eps, plus_one=plus_one,
            ),
        )  # fmt: skip
        return y

    def _linear(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        residual: torch.Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        """x w^T + bias, plus a residual in float32; x [M, K] and w [N, K] bfloat16."""
        num_rows, k = x.shape
        if residual is not None:
            dtype = torch.float32
        if num_rows > SMALL_GEMM_ROWS or k % 8 != 0:
            y = torch.nn.functional.linear(x, w).to(dtype)
            y = y if bias is None else (y + bias).to(dtype)
            return y if residual is None else y + residual
        y = self._empty(num_rows, w.shape[0], dtype=dtype)
        self._call(
            "small_gemm",
            SmallGemmParams(
                y_dtype=F32 if dtype == torch.float32 else BF16, x=x.data_ptr(), w=w.data_ptr(),
                bias=None if bias is None else bias.data_ptr(),
                residual=None if residual is None else residual.data_ptr(), y=y.data_ptr(), x_stride=x.stride(0),
                w_stride=w.stride(0), residual_stride=0 if residual is None else residual.stride(0),
                y_stride=y.stride(0), num_rows=num_rows, n=w.shape[0], k=k,
            ),
        )  # fmt: skip
        return y

    def _silu_mul(self, x: torch.Tensor) -> torch.Tensor:
        y = self._empty(x.shape[0], x.shape[1] // 2)
        self._call(
            "silu_mul",
            SiluMulParams(
                activation=SILU, x=x.data_ptr(), y=y.data_ptr(), x_stride=x.stride(0), y_stride=y.stride(0),
                num_rows=x.shape[0], width=y.shape[1],
            ),
        )  # fmt: skip
        return y

    def _qkv(self, node: Node, y: torch.Tensor, w: list[torch.Tensor | None], step: _Step) -> torch.Tensor:
        p = node.params
        heads, kv_heads, dim = int(p["num_q_heads"]), int(p["num_kv_heads"]), int(p["head_dim"])
        qkv = self._linear(y, _there(w[0]), w[1])
        q = self._empty(qkv.shape[0], heads * dim)
        cos, sin = _there(w[4]), _there(w[5])
        positions = step["positions"] + step["rope_modes"] * (cos.shape[0] // int(p["num_rope_modes"]))
        kv = self._kv[int(p["kv_group"])][int(p["layer_in_group"])]
        self._call(
            "rope_kv_write",
            RopeKvWriteParams(
                num_tokens=qkv.shape[0], qkv=qkv.data_ptr(), qkv_stride=qkv.stride(0), q_out=q.data_ptr(),
                q_stride=q.stride(0), k_pages=kv.data_ptr(), v_pages=kv[:, 1].data_ptr(), page_stride=kv.stride(0),
                slots=step[f"slots.{int(p['kv_group'])}"].data_ptr(), positions=positions.data_ptr(),
                cos=cos.data_ptr(), sin=sin.data_ptr(), q_norm=None if w[2] is None else w[2].data_ptr(),
                k_norm=None if w[3] is None else w[3].data_ptr(), norm_eps=float(p["eps"]), num_q_heads=heads,
                num_kv_heads=kv_heads, head_dim=dim, rotary_dim=int(p["rotary_dim"]), page_size=self.page_size,
            ),
        )  # fmt: skip
        return q

    def _attention(self, node: Node, q: torch.Tensor, step: _Step) -> torch.Tensor:
        p = node.params
        group, window, kv_heads = int(p["kv_group"]), int(p["window"]), int(p["num_kv_heads"])
        share, dim = int(p["num_q_heads"]) // kv_heads, int(p["head_dim"])
        kv = self._kv[group][int(p["layer_in_group"])]
        table = step[f"page_table.{group}"]
        out = torch.empty_like(q)
        if (group, window) not in step.work:
            step.work[group, window] = self._plan(step, share, window)
        for work in step.work[group, window]:
            params = AttentionParams(
                num_kv_heads=kv_heads, q=q.data_ptr(), out=out.data_ptr(), q_stride=q.stride(0),
                out_stride=out.stride(0), k_pages=kv.data_ptr(), v_pages=kv[:, 1].data_ptr(),
                page_stride=kv.stride(0), page_table=table.data_ptr(), table_stride=table.stride(0),
                page_rows=step["page_rows"].data_ptr(), q_indptr=step["q_indptr"].data_ptr(),
                kv_lens=step["kv_lens"].data_ptr(), tiles=work.tiles.data_ptr(), items=work.items.data_ptr(),
                counts=work.counts.data_ptr(), partial_o=work.partial_o.data_ptr(),
                partial_ml=work.partial_ml.data_ptr(), group=share, head_dim=dim, page_size=self.page_size,
                rows_per_tile=work.tiling.rows_per_tile, chunk_len=work.tiling.chunk_len, window=window,
                scale=float(p["scale"]), softcap=float(p["softcap"]), num_blocks=self._attention_blocks,
            )  # fmt: skip
            self._call("attention", params)
            self._call("attention_merge", params)
        return out

    def _plan(self, step: _Step, share: int, window: int) -> list[_AttentionWork]:
        """Attention's work for each tiling that has some, for all layers of the window."""
        plans = []
        for tiling in self._tilings:
            max_tiles = max_items = 0
            for _, _, _, q_len, kv_len, _ in step.batch.segments:
                if tiling.min_rows <= q_len * share <= tiling.max_rows:
                    tiles = -(-q_len * share // tiling.rows_per_tile)
                    max_tiles += tiles
                    max_items += tiles * -(-kv_len // tiling.chunk_len)
            if max_tiles == 0:
                continue
            shape = (max_items, self.program.num_kv_heads, tiling.rows_per_tile)
            work = _AttentionWork(
                tiling,
                self._empty(max_tiles, 4, dtype=torch.int32),
                self._empty(max_items, 2, dtype=torch.int32),
                self._empty(3, dtype=torch.int32),
                self._empty(*shape, self.program.head_dim, dtype=torch.float32),
                self._empty(*shape, 2, dtype=torch.float32),
            )
            self._call(
                "attention_plan",
                AttentionPlanParams(
                    num_segments=len(step.batch.segments), q_indptr=step["q_indptr"].data_ptr(),
                    kv_lens=step["kv_lens"].data_ptr(), tiles=work.tiles.data_ptr(), items=work.items.data_ptr(),
                    counts=work.counts.data_ptr(), max_tiles=max_tiles, max_items=max_items, group=share,
                    rows_per_tile=tiling.rows_per_tile, chunk_len=tiling.chunk_len, window=window,
                    min_rows=tiling.min_rows, max_rows=tiling.max_rows,
                ),
            )  # fmt: skip
            plans.append(work)
        return plans


def _there(weight: torch.Tensor | None) -> torch.Tensor:
    assert weight is not None  # the recorder has checked it
    return weight


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


def upload_weights(
    program: Program, weight: Callable[[WeightSlot], np.ndarray[Any, np.dtype[np.float32]]], device: str
) -> list[torch.Tensor]:
    """Every slot's values on the device: matrices and tables bfloat16, the rest float32. weight: a slot's values
    (models/weights.py: slot_array).
    """
    weights = []
    for slot in program.slots:
        dtype = torch.bfloat16 if slot.kind in ("linear", "gate_up", "table") else torch.float32
        weights.append(torch.from_numpy(np.array(weight(slot))).to(device, dtype))
    return weights


def kv_groups(program: Program, page_size: int) -> list[_core.KvGroup]:
    """The program's groups with the bytes of one page over all layers of the group; any page size from 1 to 64."""
    layer_bytes = 2 * 2 * page_size * program.num_kv_heads * program.head_dim
    return [
        _core.KvGroup(
            g.kind, window=g.window, num_layers=g.num_layers, page_size=page_size, page_bytes=layer_bytes * g.num_layers
        )
        for g in program.groups
    ]


def free_bytes(device: str) -> int | None:
    """Of the device's memory; None where that is the machine's."""
    if device == "cpu":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


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
