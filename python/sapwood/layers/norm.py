"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), as a node. Called by models/decoder.py while it records."""

from __future__ import annotations

from sapwood.program.ir import Recorder, TensorPart, Value


def rms_norm(rec: Recorder, name: str, x: Value, tensor: str, eps: float, *, plus_one: bool = False) -> Value:
    """y = x * rsqrt(mean(x^2) + eps) * w over the columns of x; float32 in, the compute dtype out.

    plus_one   the checkpoint stores w - 1 (Gemma's way)
    """
    weight = rec.slot(f"{name}.w", "vector", [TensorPart(tensor, (x.cols,))], init="zeros" if plus_one else "ones")
    (y,) = rec.op("rms_norm", name, [x], [("act", x.rows, x.cols)], [weight], plus_one=int(plus_one), eps=eps)
    return y
