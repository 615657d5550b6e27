"""torch's time for the ops that bench/kernels.py measures, in a process that it starts for that (`start` runs first).

A call gets what it reads from memory: matrices and KV change from call to call, over so many copies as the caller says.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

BUDGET_S: Final = 0.25  # of calls of one op and size, five at least
INT4_GROUP: Final = 32  # elements of a row with one scale


def start(num_threads: int) -> None:
    """Prepare this process. Its threads do not spin: whoever waits for it has threads of its own."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is loaded
    import torch

    torch.set_num_threads(num_threads)
    torch.set_grad_enabled(False)


def median_us(calls: Sequence[Callable[[], object]]) -> float:
    """Of the calls in turn: one to warm up, then for BUDGET_S and five calls at least."""
    calls[0]()
    samples: list[float] = []
    begin = time.perf_counter()
    for call in itertools.cycle(calls):
        before = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - before))
        if len(samples) >= 5 and time.perf_counter() - begin > BUDGET_S:
            break
    return statistics.median(samples)


def product(shape: tuple[int, int], dtype: str, copies: int, rows: Sequence[int]) -> dict[int, dict[str, float]]:
    """us of [M, K] x [N, K]^T by M and way: "torch" F.linear, "packed" with a matrix that oneDNN packed for M.

    dtype int8 and int4: these in bfloat16, and torch's own product with such a matrix ("int8pack", "int4pack"), where
    this torch has it and the shape suits it.
    """
    import torch

    n, k = shape
    quantised = dtype in ("int8", "int4")
    weight = torch.randn(n, k).to(torch.bfloat16 if quantised else getattr(torch, dtype))
    weights = [weight.clone() for _ in range(copies)]
    multiply_quantised = quantised_products(shape, dtype, copies) if quantised else []
    found = {}
    for m in rows:
        x = torch.randn(m, k).to(weight.dtype)
        found[m] = {"torch": median_us([functools.partial(torch.nn.functional.linear, x, w) for w in weights])}
        if torch.backends.mkldnn.is_available():
            ops: Any = torch.ops.mkldnn
            packed = [ops._reorder_linear_weight(w, m) for w in weights]
            multiply = [functools.partial(ops._linear_pointwise, x, w, None, "none", [], "") for w in packed]
            found[m]["packed"] = median_us(multiply)
        if multiply_quantised:
            found[m][f"{dtype}pack"] = median_us([functools.partial(one, x) for one in multiply_quantised])
    return found


def quantised_products(shape: tuple[int, int], dtype: str, copies: int) -> list[Callable[[Any], object]]:
    """Products of rows in bfloat16 with each of the copies of a matrix of int8 or int4; none where torch cannot."""
    import torch

    n, k = shape
    aten: Any = torch.ops.aten
    if dtype == "int8" and hasattr(aten, "_weight_int8pack_mm"):
        scales = torch.ones(n, dtype=torch.bfloat16)
        matrix = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        matrices = [matrix.clone() for _ in range(copies)]
        return [functools.partial(lambda w, x: aten._weight_int8pack_mm(x, w, scales), w) for w in matrices]
    if dtype == "int4" and hasattr(aten, "_weight_int4pack_mm_for_cpu") and n % 16 == 0 and k % INT4_GROUP == 0:
        scales = torch.ones(k // INT4_GROUP, n, 2, dtype=torch.bfloat16)  # and zero points
        packed = aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
        matrices = [packed.clone() for _ in range(copies)]
        multiply = aten._weight_int4pack_mm_for_cpu
        return [functools.partial(lambda w, x: multiply(x, w, INT4_GROUP, scales), w) for w in matrices]
    return []


def rms_norm(hidden: int, dtype: str, rows: Sequence[int]) -> dict[int, dict[str, float]]:
    """us of F.rms_norm of M rows by M: float32 in, the dtype out."""
    import torch

    weight = torch.ones(hidden)

    def run(x: Any) -> Any:
        return torch.nn.functional.rms_norm(x, (hidden,), weight, 1e-6).to(getattr(torch, dtype))

    return {m: {"torch": median_us([functools.partial(run, torch.randn(m, hidden))])} for m in rows}


def attention(
    rows: int, cached: int, new: int, heads: tuple[int, int, int], dtype: str, copies: int
) -> dict[str, float]:  # fmt: skip
    """us of F.scaled_dot_product_attention: `new` causal queries after `cached` keys in each row.

    heads   query heads, KV heads, head_dim
    """
    import torch

    num_q_heads, num_kv_heads, head_dim = heads
    q = torch.randn(rows, num_q_heads, new, head_dim).to(getattr(torch, dtype))
    kv = torch.randn(2, rows, num_kv_heads, cached + new, head_dim).to(q.dtype)
    layers = [kv.clone() for _ in range(copies)]
    # is_causal means the upper left corner: right where nothing is cached.
    mask = torch.ones(new, cached + new, dtype=torch.bool).tril(cached) if new > 1 and cached else None
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": new > 1 and not cached, "enable_gqa": True}
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, **options)
    return {"torch": median_us([functools.partial(attend, q, k, v) for k, v in layers])}
