"""A Program's nodes as launches over buffers that stay where they are.

program/cuda_executor.py decides which of them run in a step and in what order: one by one, or as graphs captured from
the very same calls (program/cuda_graphs.py). So that a captured launch stays right for every later step,

    - every value lives in a buffer taken once (`plan_buffers`), as large as the largest step;
    - what differs between steps is read from the step's arrays (program/cuda_rows.py), which stay in place too;
    - a launch depends on nothing but the StepShape, which is what a graph is captured for.

Products of many rows are torch's (cuBLAS), everything else is libsapwood_cuda.so's. Activations are bfloat16, the
residual stream, sums, norms and logits float32, as on the CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch

from sapwood.errors import InvalidRequest
from sapwood.program.cuda_attention import AttentionBackend
from sapwood.program.cuda_library import (
    BF16,
    F32,
    SILU,
    CudaLibrary,
    Params,
    RmsNormParams,
    RopeKvWriteParams,
    SiluMulParams,
    SmallGemmParams,
)
from sapwood.program.cuda_rows import DeviceRows, StepShape
from sapwood.program.ir import Node, Program, T, Value

SMALL_GEMM_ROWS: Final = 16  # more are torch's
# Rows of every product in deterministic mode: cuBLAS chooses its kernel, and with it the order of sums, by the shape,
# so that all products have one. 128 is a tile of most of its kernels, and no slower than fewer.
FIXED_ROWS: Final = 128
ALIGNMENT: Final = 256  # bytes, of every buffer


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Which buffer each value and each node's scratch is in, and how many bytes each buffer has for a row.

    Values of T and of L rows never share one, because the two are sized apart.
    """

    of_value: dict[int, int]
    of_scratch: dict[str, int]
    row_bytes: list[int]
    of_tokens: list[bool]  # T rows, not L


def plan_buffers(program: Program) -> Buffers:
    """First fit by size over the nodes in order: a buffer is free again once the last node that reads its value has
    run. A node's outputs never overlap its inputs.
    """
    last_use = {value.id: i for i, node in enumerate(program.nodes) for value in node.inputs}
    plan = Buffers({}, {}, [], [])
    free: list[int] = []

    def take(num_bytes: int, of_tokens: bool) -> int:
        fitting = [b for b in free if plan.of_tokens[b] == of_tokens]
        # The smallest that is large enough, else the largest, which grows.
        fitting.sort(key=lambda b: (plan.row_bytes[b] < num_bytes, abs(plan.row_bytes[b] - num_bytes)))
        if fitting:
            free.remove(fitting[0])
            plan.row_bytes[fitting[0]] = max(plan.row_bytes[fitting[0]], num_bytes)
            return fitting[0]
        plan.row_bytes.append(num_bytes)
        plan.of_tokens.append(of_tokens)
        return len(plan.row_bytes) - 1

    for i, node in enumerate(program.nodes):
        if node.op == "sample":
            continue
        output = node.outputs[0]
        of_tokens = output.rows is T
        plan.of_value[output.id] = take(_row_bytes(output), of_tokens)
        if scratch := scratch_cols(node):
            plan.of_scratch[node.name] = take(2 * scratch, of_tokens)
            free.append(plan.of_scratch[node.name])
        free.extend({plan.of_value[value.id] for value in node.inputs if last_use[value.id] == i})
        if output.id not in last_use:
            free.append(plan.of_value[output.id])
    return plan


def scratch_cols(node: Node) -> int:
    """bfloat16 elements a row that a node needs beside its output: a product before what is done to it."""
    match node.op:
        case "qkv" | "gate_up":
            weight = node.weights[0]
            assert weight is not None
            return weight.shape[0]
        case "embedding" | "linear_residual":
            return node.outputs[0].cols
    return 0


class CudaModel:
    """A Program with its weights, KV pool and buffers on a device.

    Thread safety: none; one thread launches. The pool of a group is bfloat16
    [layers][pages + 1][K, V][kv heads][page_size][head_dim]; its last page is where padding reads and writes.
    """

    def __init__(
        self,
        program: Program,
        weights: Sequence[torch.Tensor],
        rows: DeviceRows,
        *,
        max_tokens: int,
        library: CudaLibrary,
        stream: torch.cuda.Stream | None,
        deterministic: bool = False,
    ) -> None:
        """weights: of every slot, as cuda.upload_weights makes them. max_tokens: most of a step, padding included.
        stream: None on the emulated device. deterministic: a row's bits do not depend on how many rows a step has.
        """
        self.program = program
        self.rows = rows
        self._weights = weights
        self._library = library
        self._stream = stream
        self._deterministic = deterministic
        self._kv: list[torch.Tensor] = []
        self._plan = plan_buffers(program)
        most = {True: _round_up(max_tokens, FIXED_ROWS), False: _round_up(rows.max_rows, FIXED_ROWS)}
        sizes = [
            num_bytes * most[of_tokens]
            for num_bytes, of_tokens in zip(self._plan.row_bytes, self._plan.of_tokens, strict=True)
        ]
        # The value that logit rows are gathered from has rows behind all that its buffer is used for, where the hidden
        # states of held rows are kept: resumed, they are gathered like the others.
        (self._gathered,) = {node.inputs[0] for node in program.nodes if node.op == "gather_logit_rows"}
        buffer = self._plan.of_value[self._gathered.id]
        self.kept_begin = -(-sizes[buffer] // _row_bytes(self._gathered))
        sizes[buffer] = (self.kept_begin + rows.max_rows) * _row_bytes(self._gathered)
        # Zeros: rows of padding are computed from whatever is there.
        self._buffers = [
            torch.zeros(_round_up(size, ALIGNMENT), dtype=torch.uint8, device=rows.device) for size in sizes
        ]
        # Of each token in tables of several rope modes, by the rows of one mode.
        modes = {_rope_rows(node, weights) for node in program.nodes if _num_rope_modes(node) > 1}
        self._positions = {n: torch.zeros(most[True], dtype=torch.int32, device=rows.device) for n in modes}

    @property
    def buffer_bytes(self) -> int:
        """Of all activations."""
        return sum(buffer.numel() for buffer in self._buffers)

    def set_pool(self, num_pages: Sequence[int]) -> None:
        """Take the KV pool: num_pages of each group and one for padding. Graphs are captured after this: they name its
        address.
        """
        self._kv.clear()  # the old one's memory first
        shape = (2, self.program.num_kv_heads, self.rows.page_size, self.program.head_dim)
        for spec, pages in zip(self.program.groups, num_pages, strict=True):
            size = (spec.num_layers, pages + 1, *shape)
            self._kv.append(torch.zeros(size, dtype=torch.bfloat16, device=self.rows.device))

    def kv(self, node: Node) -> torch.Tensor:
        """The pool of a qkv or attention node's layer: [pages + 1, 2, kv heads, page_size, head_dim]."""
        return self._kv[int(node.params["kv_group"])][int(node.params["layer_in_group"])]

    def copy_pages(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """(group, source page, destination page) of each copy, in order."""
        for group, source, target in copies:
            self._kv[group][:, target] = self._kv[group][:, source]

    def read_kv(self, group: int, layer_in_group: int, page: int, offset: int) -> Any:
        """[2, num_kv_heads, head_dim] float32 numpy: K and V of one token of one layer."""
        return self._kv[group][layer_in_group, page, :, :, offset].float().cpu().numpy()

    def value(self, value: Value, shape: StepShape) -> torch.Tensor:
        """A value in its buffer, until a later node takes that."""
        return self._view(self._plan.of_value[value.id], shape, value, value.cols, _dtype(value))

    def keep_hidden(self, queries: torch.Tensor, rows: torch.Tensor) -> None:
        """Of these rows, the hidden states of these tokens of the step, until a later call names the row."""
        hidden = self._with_kept()
        hidden[self.kept_begin :].index_copy_(0, rows, hidden.index_select(0, queries))

    # --- launching

    def begin(self, shape: StepShape) -> None:
        """What all layers need, once the step's arrays are there."""
        arrays, count = self.rows.arrays, shape.num_tokens
        for size, positions in self._positions.items():
            torch.add(arrays.positions[:count], arrays.rope_modes[:count], alpha=size, out=positions[:count])

    def launch(self, nodes: Iterable[Node], shape: StepShape, attention: AttentionBackend) -> None:
        """The nodes' kernels, in order."""
        for node in nodes:
            if node.op != "sample" and (shape.num_logit_rows > 0 or node.outputs[0].rows is T):
                self._launch(node, shape, attention)

    def _launch(self, node: Node, shape: StepShape, attention: AttentionBackend) -> None:
        x = [self.value(value, shape) for value in node.inputs]
        y = self.value(node.outputs[0], shape)
        w = [None if slot is None else self._weights[slot.id] for slot in node.weights]
        arrays, p = self.rows.arrays, node.params
        match node.op:
            case "embedding":
                found = torch.index_select(_there(w[0]), 0, arrays.tokens[: len(y)], out=self._scratch(node, shape))
                y.copy_(found).mul_(p["scale"])
            case "rms_norm":
                self._rms_norm(x[0], _there(w[0]), y, float(p["eps"]), plus_one=bool(p["plus_one"]))
            case "qkv":
                product = self._scratch(node, shape)
                self._linear(x[0], _there(w[0]), product, w[1])
                self._rope_kv_write(node, product, y, w)
            case "attention":
                attention.attend(node, x[0], y, self.kv(node), shape)
            case "linear":
                self._linear(x[0], _there(w[0]), y, w[1])
            case "linear_residual":
                self._linear(x[0], _there(w[0]), y, w[1], residual=x[1], product=self._scratch(node, shape))
            case "gate_up":
                product = self._scratch(node, shape)
                self._linear(x[0], _there(w[0]), product, None)
                self._silu_mul(product, y)
            case "gather_logit_rows":
                torch.index_select(self._with_kept(), 0, arrays.logit_src[: len(y)], out=y)
            case "lm_head":
                self._linear(x[0], _there(w[0]), y, None)
                if p["scale"] != 1:
                    y.mul_(p["scale"])
                if p["softcap"] > 0:
                    y.div_(p["softcap"]).tanh_().mul_(p["softcap"])
            case _:
                raise InvalidRequest(f"device 'cuda' has no op {node.op!r} (node {node.name!r})")

    def _view(self, buffer: int, shape: StepShape, like: Value, cols: int, dtype: torch.dtype) -> torch.Tensor:
        count = shape.num_tokens if like.rows is T else shape.num_logit_rows
        num_bytes = count * cols * dtype.itemsize
        return self._buffers[buffer][:num_bytes].view(dtype).view(count, cols)

    def _with_kept(self) -> torch.Tensor:
        """What logit rows are gathered from: tokens, and from kept_begin on what is kept of held rows."""
        return self.value(self._gathered, StepShape(self.kept_begin + self.rows.max_rows, 0, 0))

    def _scratch(self, node: Node, shape: StepShape) -> torch.Tensor:
        return self._view(self._plan.of_scratch[node.name], shape, node.outputs[0], scratch_cols(node), torch.bfloat16)

    def _call(self, op: str, params: Params) -> None:
        self._library.call(op, params, None if self._stream is None else self._stream.cuda_stream)

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, eps: float, *, plus_one: bool) -> None:
        self._call(
            "rms_norm",
            RmsNormParams(
                x_dtype=F32, x=x.data_ptr(), weight=weight.data_ptr(), y=y.data_ptr(), x_stride=x.stride(0),
                y_stride=y.stride(0), num_rows=x.shape[0], hidden=x.shape[1], eps=eps, plus_one=plus_one,
            ),
        )  # fmt: skip

    def _linear(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        y: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        residual: torch.Tensor | None = None,
        product: torch.Tensor | None = None,
    ) -> None:
        """y = x w^T + bias, plus a float32 residual; x [M, K] and w [N, K] bfloat16. product: bfloat16 [M, N], for the
        product alone where there is a residual.
        """
        num_rows, k = x.shape
        if (num_rows <= SMALL_GEMM_ROWS and k % 8 == 0) and not self._deterministic:
            self._call(
                "small_gemm",
                SmallGemmParams(
                    y_dtype=F32 if y.dtype == torch.float32 else BF16, x=x.data_ptr(), w=w.data_ptr(),
                    bias=None if bias is None else bias.data_ptr(),
                    residual=None if residual is None else residual.data_ptr(), y=y.data_ptr(), x_stride=x.stride(0),
                    w_stride=w.stride(0), residual_stride=0 if residual is None else residual.stride(0),
                    y_stride=y.stride(0), num_rows=num_rows, n=w.shape[0], k=k,
                ),
            )  # fmt: skip
            return
        if product is None:
            self._product(x, w, y)
        else:
            self._product(x, w, product)
            torch.add(product, _there(residual), out=y)
        if bias is not None:
            y.add_(bias)

    def _product(self, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> None:
        """y = x w^T by torch, y bfloat16 or float32 (logits)."""
        if self._deterministic:
            # Whole blocks, whatever is in the rows past the step's: the buffers have them.
            num_rows = _round_up(x.shape[0], FIXED_ROWS)
            x, y = (t.as_strided((num_rows, t.shape[1]), t.stride()) for t in (x, y))
            blocks = list(zip(x.split(FIXED_ROWS), y.split(FIXED_ROWS), strict=True))
        else:
            blocks = [(x, y)]
        for x_block, y_block in blocks:
            if y.dtype == torch.bfloat16:
                torch.mm(x_block, w.t(), out=y_block)
            elif y.is_cuda:
                torch.ops.aten.mm.dtype_out(x_block, w.t(), torch.float32, out=y_block)
            else:
                torch.mm(x_block.float(), w.t().float(), out=y_block)

    def _silu_mul(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self._call(
            "silu_mul",
            SiluMulParams(
                activation=SILU, x=x.data_ptr(), y=y.data_ptr(), x_stride=x.stride(0), y_stride=y.stride(0),
                num_rows=x.shape[0], width=y.shape[1],
            ),
        )  # fmt: skip

    def _rope_kv_write(self, node: Node, qkv: torch.Tensor, q: torch.Tensor, w: Sequence[torch.Tensor | None]) -> None:
        p, kv, arrays = node.params, self.kv(node), self.rows.arrays
        cos, sin = _there(w[4]), _there(w[5])
        positions = arrays.positions
        if _num_rope_modes(node) > 1:
            positions = self._positions[_rope_rows(node, self._weights)]
        self._call(
            "rope_kv_write",
            RopeKvWriteParams(
                num_tokens=qkv.shape[0], qkv=qkv.data_ptr(), qkv_stride=qkv.stride(0), q_out=q.data_ptr(),
                q_stride=q.stride(0), k_pages=kv.data_ptr(), v_pages=kv[:, 1].data_ptr(), page_stride=kv.stride(0),
                slots=arrays.slots[int(p["kv_group"])].data_ptr(), positions=positions.data_ptr(),
                cos=cos.data_ptr(), sin=sin.data_ptr(), q_norm=None if w[2] is None else w[2].data_ptr(),
                k_norm=None if w[3] is None else w[3].data_ptr(), norm_eps=float(p["eps"]),
                num_q_heads=int(p["num_q_heads"]), num_kv_heads=int(p["num_kv_heads"]), head_dim=int(p["head_dim"]),
                rotary_dim=int(p["rotary_dim"]), page_size=self.rows.page_size,
            ),
        )  # fmt: skip


def _there(weight: torch.Tensor | None) -> torch.Tensor:
    assert weight is not None  # the recorder has checked it
    return weight


def _dtype(value: Value) -> torch.dtype:
    return torch.float32 if value.dtype == "float32" else torch.bfloat16


def _row_bytes(value: Value) -> int:
    return value.cols * _dtype(value).itemsize


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _num_rope_modes(node: Node) -> int:
    return int(node.params.get("num_rope_modes", 1))


def _rope_rows(node: Node, weights: Sequence[torch.Tensor]) -> int:
    """Rows of one mode of a qkv node's rope tables."""
    slot = node.weights[4]
    assert slot is not None
    return int(weights[slot.id].shape[0]) // _num_rope_modes(node)
