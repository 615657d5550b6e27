"""The reference executor: a Program computed node by node in torch, in float32 or float64. The oracle of the native
one.

It shares nothing with the core's arithmetic: dense matrix products, whole softmaxes, no tiles, no packing,
activations never rounded. What it does share are the page tables, so a wrong page shows here as well. Two parts:

    ReferenceModel   the forward of one batch, node by node; every node's output can be kept and compared
    compare          where two sets of node outputs first differ

models/loader.py imports it for device "reference" and runs it by plan_executor.py, tests import it for diffs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sapwood.errors import InvalidRequest, MissingExtra
from sapwood.program.ir import Node, Program, WeightSlot
from sapwood.program.ops import LOGIT_BLOCK, QUANT_BLOCK
from sapwood.program.plan_executor import PreparedBatch

try:
    import torch
except ImportError:
    raise MissingExtra("device 'reference' needs torch: pip install 'sapwood[test]'") from None


class ReferenceModel:
    """A Program with weights and a KV pool of its own.

    Thread safety: none. The pool begins as NaN, so that reading a slot nobody wrote shows.
    """

    def __init__(
        self,
        program: Program,
        weight: Callable[[WeightSlot], np.ndarray[Any, np.dtype[np.float32]]],
        num_pages: Sequence[int],
        page_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        int8_kv: bool = False,
    ) -> None:
        """weight: a slot's values by name of parts, float32 (models/weights.py: slot_array).

        int8_kv   K and V are what int8 with a scale per token and head can say of them
        """
        self.program = program
        self.dtype = dtype
        self.int8_kv = int8_kv
        self.page_size = page_size
        self._weights = [torch.from_numpy(np.array(weight(slot))).to(dtype) for slot in program.slots]
        shape = (2, program.num_kv_heads, program.head_dim)
        self._kv = [
            torch.full((spec.num_layers, pages * page_size, *shape), float("nan"), dtype=dtype)
            for spec, pages in zip(program.groups, num_pages, strict=True)
        ]
        # Of rows that draw under masks, which may be late: by name of the gathering node and row.
        self._held: dict[tuple[str, int], torch.Tensor] = {}

    def copy_pages(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """(group, source page, destination page) of each copy, done in order, before the forward."""
        size = self.page_size
        for group, src, dst in copies:
            self._kv[group][:, dst * size : (dst + 1) * size] = self._kv[group][:, src * size : (src + 1) * size]

    @torch.inference_mode()
    def run(
        self,
        batch: PreparedBatch,
        *,
        keep: dict[str, np.ndarray[Any, Any]] | None = None,
        on_head: Callable[[], None] | None = None,
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One step; returns logits [L, vocab] float32.

        keep      receives every node's first output by node name, in the reference's dtype
        on_head   called when the head segment begins
        """
        self.copy_pages(batch.copies)
        values: dict[int, torch.Tensor] = {}
        logits = torch.zeros(0, self.program.vocab_size)
        segment = "forward"
        for node in self.program.nodes:
            if node.segment != segment:
                segment = node.segment
                if segment == "head" and on_head is not None:
                    on_head()
            if segment == "forward" and not len(batch.tokens):  # resumed rows alone
                values |= {value.id: torch.empty(0, value.cols, dtype=self.dtype) for value in node.outputs}
                continue
            outputs = self._run_node(node, [values[v.id] for v in node.inputs], batch)
            outputs = [
                _through_int8(tensor) if value.dtype == "q8" else tensor
                for value, tensor in zip(node.outputs, outputs, strict=True)
            ]
            for value, tensor in zip(node.outputs, outputs, strict=True):
                values[value.id] = tensor
            if keep is not None and outputs:
                keep[node.name] = outputs[0].numpy().copy()
            if node.op == "lm_head":
                logits = outputs[0]
        return logits.float().numpy()

    def sample(self, rows: Any, plan: Any, prepared: dict[str, Any], logits: np.ndarray[Any, Any]) -> Any:
        """By the core's sampler: the StepResult."""
        return rows.sample(plan, prepared, np.ascontiguousarray(logits))

    def read_kv(self, group: int, layer_in_group: int, page: int, offset: int) -> np.ndarray[Any, Any]:
        """[2, num_kv_heads, head_dim]: K and V of one token of one layer."""
        return self._kv[group][layer_in_group, page * self.page_size + offset].numpy().copy()

    def _run_node(self, node: Node, x: list[torch.Tensor], batch: PreparedBatch) -> list[torch.Tensor]:
        w = [None if slot is None else self._weights[slot.id] for slot in node.weights]
        p = node.params
        match node.op:
            case "embedding":
                return [_need(w[0])[torch.as_tensor(batch.tokens, dtype=torch.long)] * p["scale"]]
            case "rms_norm":
                return [_rms_norm(x[0], _need(w[0]) + p["plus_one"], float(p["eps"]))]
            case "quantize":
                return [x[0]]  # its output is q8: `run` rounds it
            case "qkv":
                return [self._qkv(node, x[0], w, batch)]
            case "attention":
                return [self._attention(node, x[0], batch)]
            case "linear":
                return [_linear(x[0], w)]
            case "linear_residual":
                return [x[1] + _linear(x[0], w)]
            case "gate_up":
                gate, up = (x[0] @ _need(w[0]).T).chunk(2, dim=-1)
                return [torch.nn.functional.silu(gate) * up]
            case "gather_logit_rows":
                return [self._gather(node, x[0], batch)]
            case "lm_head":
                logits = x[0] @ _need(w[0]).T * p["scale"]
                if p["softcap"] > 0:
                    logits = p["softcap"] * torch.tanh(logits / p["softcap"])
                blocks = [block.amax(-1) for block in logits.split(LOGIT_BLOCK, dim=-1)]
                return [logits, torch.stack(blocks, -1)]
            case "sample":
                return []
        raise InvalidRequest(f"the reference executor has no op {node.op!r} (node {node.name!r})")

    def _gather(self, node: Node, x: torch.Tensor, batch: PreparedBatch) -> torch.Tensor:
        src = np.asarray(batch.logit_src, np.int64)
        out = torch.empty(len(src), x.shape[1], dtype=x.dtype)
        computed = src >= 0
        out[torch.from_numpy(computed)] = x[torch.from_numpy(src[computed])]
        for at, (row, masked) in enumerate(zip(batch.logit_rows, batch.logit_masked, strict=True)):
            if not computed[at]:
                out[at] = self._held[node.name, int(row)]
            elif masked:
                self._held[node.name, int(row)] = out[at].clone()
        return out

    def _qkv(self, node: Node, y: torch.Tensor, w: list[torch.Tensor | None], batch: PreparedBatch) -> torch.Tensor:
        p = node.params
        heads, kv_heads, dim = int(p["num_q_heads"]), int(p["num_kv_heads"]), int(p["head_dim"])
        qkv = _linear(y, w[:2]).view(-1, heads + 2 * kv_heads, dim)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        q = q if w[2] is None else _rms_norm(q, w[2], float(p["eps"]))
        k = k if w[3] is None else _rms_norm(k, w[3], float(p["eps"]))
        cos, sin = _need(w[4]), _need(w[5])
        modes = np.zeros(len(batch.tokens), np.int64)
        for _, _, begin, length, _, mode in batch.segments:
            modes[begin : begin + length] = mode
        rows = torch.as_tensor(modes * (cos.shape[0] // int(p["num_rope_modes"])) + np.asarray(batch.positions))
        q, k = (_rotate(t, cos[rows].unsqueeze(1), sin[rows].unsqueeze(1), int(p["rotary_dim"])) for t in (q, k))
        if self.int8_kv:
            k, v = _as_int8(k), _as_int8(v)
        slots = torch.as_tensor(batch.slots[int(p["kv_group"])], dtype=torch.long)
        self._kv[int(p["kv_group"])][int(p["layer_in_group"]), slots] = torch.stack([k, v], dim=1)
        return q.reshape(len(batch.tokens), -1)

    def _attention(self, node: Node, q: torch.Tensor, batch: PreparedBatch) -> torch.Tensor:
        p = node.params
        group, dim, window = int(p["kv_group"]), int(p["head_dim"]), int(p["window"])
        kv_heads, share = int(p["num_kv_heads"]), int(p["num_q_heads"]) // int(p["num_kv_heads"])
        pool = self._kv[group][int(p["layer_in_group"])]
        out = torch.empty_like(q)
        for index, (_, _, begin, length, kv_len, _) in enumerate(batch.segments):
            first_query = kv_len - length
            low = max(0, first_query + 1 - window) if window else 0
            keys_at = np.arange(low, kv_len)
            pages = np.asarray(batch.page_tables[group][index])[keys_at // self.page_size]
            kv = pool[torch.as_tensor(pages * self.page_size + keys_at % self.page_size, dtype=torch.long)]
            k, v = kv[:, 0], kv[:, 1]  # [keys, kv_heads, dim]
            # Query head h reads kv head h // share.
            queries = q[begin : begin + length].view(length, kv_heads, share, dim)
            scores = torch.einsum("tgsd,kgd->gstk", queries, k) * p["scale"]
            if p["softcap"] > 0:
                scores = p["softcap"] * torch.tanh(scores / p["softcap"])
            distance = torch.arange(first_query, kv_len)[:, None] - torch.as_tensor(keys_at)[None, :]
            hidden = (distance < 0) | (distance >= window) if window else distance < 0
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[begin : begin + length] = torch.einsum("gstk,kgd->tgsd", weights, v).reshape(length, q.shape[1])
        return out


def _need(weight: torch.Tensor | None) -> torch.Tensor:
    assert weight is not None  # the recorder has checked it
    return weight


def _linear(y: torch.Tensor, w: Sequence[torch.Tensor | None]) -> torch.Tensor:
    out = y @ _need(w[0]).T
    return out if w[1] is None else out + w[1]


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Turn pairs (i, i + rotary_dim/2) of the leading rotary_dim dimensions; x [T, heads, dim], cos and sin [T, 1,
    rotary_dim/2].
    """
    a, b, rest = x.split([rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _as_int8(x: torch.Tensor) -> torch.Tensor:
    """[T, heads, dim]: each head's numbers as whole multiples of 1/127 of its largest, nearest even; NaN where one is
    not finite.
    """
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, torch.round(x / scale) * scale, scale)


# --- comparison


@dataclasses.dataclass(frozen=True)
class NodeDiff:
    """How a node's output differs from the reference's. max_abs is inf where shapes differ, nan where one has NaN."""

    node: str
    max_abs: float
    max_rel: float
    at: tuple[int, ...]
    reference: float
    other: float

    def __str__(self) -> str:
        values = f"{self.reference:.6g} against {self.other:.6g}"
        return f"{self.node}: |diff| {self.max_abs:.3g} (rel {self.max_rel:.3g}) at {self.at}: {values}"


def compare(
    reference: Mapping[str, np.ndarray[Any, Any]],
    other: Mapping[str, np.ndarray[Any, Any]],
    *,
    atol: float = 0.0,
    rtol: float = 0.0,
) -> list[NodeDiff]:
    """Nodes, in the program's order, whose outputs differ by more than atol + rtol * max|reference|; the first is
    where to look.

    Only nodes that both mappings hold are compared.
    """
    diffs = []
    for name, expected in reference.items():
        if name not in other:
            continue
        got = np.asarray(other[name], np.float64)
        want = np.asarray(expected, np.float64)
        if got.shape != want.shape:
            diffs.append(NodeDiff(name, float("inf"), float("inf"), got.shape, float("nan"), float("nan")))
            continue
        if not want.size:
            continue
        error = np.abs(got - want)
        at = np.unravel_index(int(np.argmax(np.where(np.isnan(error), np.inf, error))), error.shape)
        worst, scale = float(error[at]), float(np.nanmax(np.abs(want)))
        if not worst <= atol + rtol * scale:
            place = tuple(int(i) for i in at)
            diffs.append(
                NodeDiff(name, worst, worst / scale if scale else float("inf"), place, float(want[at]), float(got[at]))
            )
    return diffs


def native_outputs(
    program: Program, dump: Callable[[str], bytes], names: Iterable[str] | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """Every node's first output as float32 [rows, cols] from `_core.CpuRunner.dump`, after a step of a debug runner."""
    out = {}
    for node in program.nodes:
        if not node.outputs or (names is not None and node.name not in names):
            continue
        value = node.outputs[0]
        raw = np.frombuffer(dump(node.name), np.uint8)
        if value.dtype == "q8":
            out[node.name] = _read_int8_rows(raw, value.cols)
            continue
        if value.dtype == "act" and program.act == "bfloat16":
            flat = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            flat = raw.view(np.float32)
        out[node.name] = flat.reshape(-1, value.cols)
    return out


def _through_int8(x: torch.Tensor) -> torch.Tensor:
    """x [*, n] as it is after rounding to int8 in blocks of QUANT_BLOCK with a scale each."""
    n = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -n % QUANT_BLOCK))
    blocks = padded.view(*x.shape[:-1], -1, QUANT_BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    q = torch.where(scale > 0, blocks / scale, 0).round()
    return (q * scale).view(padded.shape)[..., :n]


def _read_int8_rows(raw: np.ndarray[Any, Any], cols: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows of Q8Block (kernels.h) as float32 [rows, cols]."""
    block = np.dtype([("q", np.int8, QUANT_BLOCK), ("scale", np.float32), ("sums", np.int32, 3)])
    blocks = raw.view(block).reshape(-1, -(-cols // QUANT_BLOCK))
    rows = blocks["q"].astype(np.float32) * blocks["scale"][..., None]
    return np.ascontiguousarray(rows.reshape(len(blocks), -1)[:, :cols])
