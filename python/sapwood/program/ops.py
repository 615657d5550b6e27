"""The operations a Program may hold: their inputs, weights and parameters, in the core's order, and their checks.

The signatures are those of a model as recorded; program/quantize.py turns the "act" values that quantised matrices read
into "q8". This table is the contract with cpp/program/program.h (enum OpKind): program/native.py flattens named
parameters by it, program/reference.py implements each op anew. A check runs once, when the node is recorded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sapwood.errors import InternalError

if TYPE_CHECKING:
    from sapwood.program.ir import Node, Recorder

QUANT_BLOCK = 32  # columns of a quantised matrix, or of a row it reads, with one scale (kQ8Block in kernels.h)
LOGIT_BLOCK = 64  # vocabulary columns that share one entry of block_max


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """Signature of an op. A weight name ending in "?" may be absent (None in the node).

    inputs, outputs   dtypes: "act" or "float32"
    weights           (name, slot kind) in the core's order
    ints, floats      parameter names in the core's order
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[tuple[str, str], ...] = ()
    ints: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    segments: tuple[str, ...] = ("forward",)

    def check(self, node: Node, recorder: Recorder) -> None:
        """Raise InternalError unless the node has this signature and its sizes agree."""

        def require(condition: bool, what: str) -> None:
            if not condition:
                raise InternalError(f"node {node.name!r} ({node.op}): {what}")

        require(node.segment in self.segments, f"belongs to {self.segments}, not {node.segment!r}")
        require(
            tuple(v.dtype for v in node.inputs) == self.inputs,
            f"inputs must be {self.inputs}, got {[v.dtype for v in node.inputs]}",
        )
        require(tuple(v.dtype for v in node.outputs) == self.outputs, f"outputs must be {self.outputs}")
        require(
            set(node.params) == {*self.ints, *self.floats},
            f"parameters must be {(*self.ints, *self.floats)}, got {list(node.params)}",
        )
        require(all(isinstance(node.params[n], int) for n in self.ints), "integer parameter expected")
        require(len(node.weights) == len(self.weights), f"takes {len(self.weights)} weights, got {len(node.weights)}")
        for slot, (name, kind) in zip(node.weights, self.weights, strict=True):
            if slot is None:
                require(name.endswith("?"), f"weight {name!r} is not optional")
            else:
                require(slot.kind == kind, f"weight {name!r} must be of kind {kind!r}, got {slot.kind!r}")
        problem = _shape_problem(node, recorder.vocab_size)
        require(problem is None, f"shapes do not agree: {problem}")


def _shape_problem(node: Node, vocab_size: int) -> str | None:
    """The first disagreement between the sizes of values, weights and parameters, or None."""
    p = node.params
    # The signature has been checked: what a branch below reads is there.
    weights: tuple[Any, ...] = node.weights
    x: Any = node.inputs[0] if node.inputs else None
    y: Any = node.outputs[0] if node.outputs else None
    w: Any = weights[0] if weights else None
    pairs: list[tuple[str, object, object]] = []
    if x is not None and y is not None and node.op != "gather_logit_rows":
        pairs.append(("rows", id(x.rows), id(y.rows)))
    match node.op:
        case "embedding":
            pairs += [("table", w.shape, (vocab_size, y.cols))]
        case "quantize":
            pairs += [("output", y.cols, x.cols)]
        case "rms_norm":
            pairs += [("weight", w.shape, (x.cols,)), ("output", y.cols, x.cols)]
        case "qkv":
            heads, kv, dim = p["num_q_heads"], p["num_kv_heads"], p["head_dim"]
            pairs += [("qkv weight", w.shape, ((heads + 2 * kv) * dim, x.cols)), ("q", y.cols, heads * dim)]
            pairs += [("heads a kv head", heads % kv, 0), ("rotary_dim", p["rotary_dim"] % 2, 0)]
            pairs += [("rotary_dim <= head_dim", p["rotary_dim"] <= dim, True)]
            _, bias, q_norm, k_norm, cos, sin = weights
            pairs += [("bias", bias.shape, (w.shape[0],))] if bias is not None else []
            pairs += [("head norm", s.shape, (dim,)) for s in (q_norm, k_norm) if s is not None]
            pairs += [("rope table", s.shape[1], p["rotary_dim"] // 2) for s in (cos, sin)]
            pairs += [("rope modes", cos.shape[0] % p["num_rope_modes"], 0), ("rope tables", cos.shape, sin.shape)]
        case "attention":
            pairs += [("q", x.cols, p["num_q_heads"] * p["head_dim"]), ("output", y.cols, x.cols)]
        case "linear" | "linear_residual":
            pairs += [("weight", w.shape, (y.cols, x.cols))]
            pairs += [("bias", weights[1].shape, (y.cols,))] if weights[1] is not None else []
            pairs += [("residual", node.inputs[1].cols, y.cols)] if node.op == "linear_residual" else []
        case "gate_up":
            pairs += [("weight", w.shape, (2 * y.cols, x.cols)), ("output", y.cols, p["intermediate"])]
        case "gather_logit_rows":
            pairs += [("cols", y.cols, x.cols), ("rows in", x.rows.name, "T"), ("rows out", y.rows.name, "L")]
        case "lm_head":
            pairs += [("weight", w.shape, (vocab_size, x.cols)), ("logits", y.cols, vocab_size)]
            pairs += [("block_max", node.outputs[1].cols, -(-vocab_size // LOGIT_BLOCK))]
        case "sample":
            pairs += [("logits", x.cols, vocab_size)]
    return next((f"{what}: {got} against {expected}" for what, got, expected in pairs if got != expected), None)


_ROWWISE = ("forward", "head")
OPS: Mapping[str, OpSpec] = MappingProxyType(
    {
        # x[t] = table[token[t]] * scale
        "embedding": OpSpec((), ("float32",), (("table", "table"),), floats=("scale",)),
        # y = x * rsqrt(mean(x^2) + eps) * w, or * (1 + w) when plus_one
        "rms_norm": OpSpec(("float32",), ("act",), (("w", "vector"),), ("plus_one",), ("eps",), _ROWWISE),
        # y = x in blocks of 32 int8 with a scale each; put in by program/quantize.py
        "quantize": OpSpec(("act",), ("q8",), segments=_ROWWISE),
        # q, k, v = x W^T + b; per-head RMSNorm of q and k where given; rope; k and v go into the KV pool, q comes out
        "qkv": OpSpec(
            ("act",),
            ("act",),
            (
                ("w", "linear"),
                ("bias?", "vector"),
                ("q_norm?", "vector"),
                ("k_norm?", "vector"),
                ("cos", "f32"),
                ("sin", "f32"),
            ),
            ("num_q_heads", "num_kv_heads", "head_dim", "rotary_dim", "kv_group", "layer_in_group", "num_rope_modes"),
            ("eps",),
        ),
        # o = softmax(q K^T * scale, over the last `window` tokens where window > 0) V, from the KV pool
        "attention": OpSpec(
            ("act",),
            ("act",),
            (),
            ("num_q_heads", "num_kv_heads", "head_dim", "kv_group", "layer_in_group", "window"),
            ("scale", "softcap"),
        ),
        # z = y W^T + b
        "linear": OpSpec(("act",), ("act",), (("w", "linear"), ("bias?", "vector")), segments=_ROWWISE),
        # x' = x + all_reduce(o W^T + b); all_reduce = number of tensor-parallel ranks, nothing at 1
        "linear_residual": OpSpec(
            ("act", "float32"), ("float32",), (("w", "linear"), ("bias?", "vector")), ("all_reduce",), segments=_ROWWISE
        ),
        # h = silu(y Wg^T) * (y Wu^T)
        "gate_up": OpSpec(("act",), ("act",), (("w", "gate_up"),), ("intermediate",), segments=_ROWWISE),
        # x'[l] = x[logit_src[l]], or what was kept of the row where its mask was late
        "gather_logit_rows": OpSpec(("float32",), ("float32",), segments=("head",)),
        # logits = y W^T * scale, softcapped where softcap > 0; block_max = maximum of each 64 columns
        "lm_head": OpSpec(
            ("act",), ("float32", "float32"), (("w", "linear"),), floats=("scale", "softcap"), segments=("head",)
        ),
        # draws each row's token by its request's parameters
        "sample": OpSpec(("float32", "float32"), (), segments=("sample",)),
    }
)
