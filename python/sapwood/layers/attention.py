"""Grouped-query attention over the paged KV pool, as two nodes. Called by models/decoder.py while it records.

The `qkv` node writes K and V of the step's tokens into their pages before `attention` reads, so every query reads
all of its keys from the pool, its own included: a chunk, a cache hit and a batch mate cannot change what it sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sapwood.layers.rotary import RopeSlots
from sapwood.program.ir import Recorder, TensorPart, Value, WeightSlot


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Heads of one layer and where its KV lives.

    group, layer_in_group   the KvGroup and the layer's index in it
    window                  tokens a query sees, itself included; 0 = all
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    group: int
    layer_in_group: int
    window: int = 0


def qkv(
    rec: Recorder,
    y: Value,
    shape: AttentionShape,
    rope: RopeSlots,
    weight: Sequence[TensorPart],
    bias: Sequence[TensorPart] = (),
    head_norms: tuple[str, str] | None = None,
    eps: float = 0.0,
) -> Value:
    """Project y, normalise heads where asked, rotate, store K and V; returns q [T, num_q_heads * head_dim].

    weight, bias   rows of q, then k, then v
    head_norms     tensors [head_dim] of the RMSNorm of q heads and of k heads, before the rotation (Qwen3)
    """
    dim = shape.head_dim
    w = rec.slot("qkv.w", "linear", weight)
    b = rec.slot("qkv.bias", "vector", bias, init="zeros") if bias else None
    norms: Sequence[WeightSlot | None] = [
        rec.slot(f"qkv.{which}_norm", "vector", [TensorPart(tensor, (dim,))], init="ones")
        for which, tensor in zip("qk", head_norms or (), strict=False)
    ] or [None, None]
    (q,) = rec.op(
        "qkv", "qkv", [y], [("act", y.rows, shape.num_q_heads * dim)], [w, b, *norms, rope.cos, rope.sin],
        num_q_heads=shape.num_q_heads, num_kv_heads=shape.num_kv_heads, head_dim=dim, rotary_dim=rope.rotary_dim,
        kv_group=shape.group, layer_in_group=shape.layer_in_group, num_rope_modes=rope.num_modes, eps=eps,
    )  # fmt: skip
    return q


def attention(rec: Recorder, q: Value, shape: AttentionShape, *, softcap: float = 0.0) -> Value:
    """softmax(q K^T / sqrt(head_dim)) V over each query's visible keys; [T, num_q_heads * head_dim]."""
    (o,) = rec.op(
        "attention", "attention", [q], [("act", q.rows, q.cols)],
        num_q_heads=shape.num_q_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, kv_group=shape.group,
        layer_in_group=shape.layer_in_group, window=shape.window, scale=shape.head_dim**-0.5, softcap=softcap,
    )  # fmt: skip
    return o
