"""Dense projections as nodes. Called by models/decoder.py and layers/attention.py while they record.

`linear_residual` and `gate_up` stay nodes of their own rather than a GEMM and an epilogue, so that tensor
parallelism can lower them to GEMM + all_reduce and an adapter can enter the accumulator before the epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.program.ir import Recorder, TensorPart, Value

TP_SIZE = 1  # ranks that share a model in this version; the all_reduce of linear_residual is nothing at 1


def linear(rec: Recorder, name: str, y: Value, weight: Sequence[TensorPart], bias: Sequence[TensorPart] = ()) -> Value:
    """z = y W^T + b, W [N, K] and b [N] being the parts stacked along rows."""
    w = rec.slot(f"{name}.w", "linear", weight)
    b = rec.slot(f"{name}.bias", "vector", bias, init="zeros") if bias else None
    (z,) = rec.op("linear", name, [y], [("act", y.rows, w.shape[0])], [w, b])
    return z


def linear_residual(rec: Recorder, name: str, o: Value, x: Value, tensor: str, bias: str | None = None) -> Value:
    """x' = x + all_reduce(o W^T + b): back into the float32 residual stream x [*, H]."""
    w = rec.slot(f"{name}.w", "linear", [TensorPart(tensor, (x.cols, o.cols))])
    b = rec.slot(f"{name}.bias", "vector", [TensorPart(bias, (x.cols,))], init="zeros") if bias else None
    (out,) = rec.op("linear_residual", name, [o, x], [("float32", x.rows, x.cols)], [w, b], all_reduce=TP_SIZE)
    return out


def gate_up(rec: Recorder, name: str, y: Value, intermediate: int, weight: Sequence[TensorPart]) -> Value:
    """h = silu(y Wg^T) * (y Wu^T), [*, intermediate] (SwiGLU, Shazeer, arXiv 2002.05202).

    weight   gate rows, then up rows: `intermediate` each, of two tensors or of one fused
    """
    w = rec.slot(f"{name}.w", "gate_up", weight)
    (h,) = rec.op("gate_up", name, [y], [("act", y.rows, intermediate)], [w], intermediate=intermediate)
    return h
