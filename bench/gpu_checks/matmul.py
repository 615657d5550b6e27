"""The product with a weight for the few rows of a decode step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from gpu_checks.activation import silu_mul_params
from gpu_checks.device import Device
from gpu_checks.elementwise import rms_norm_params
from gpu_checks.guard import before_guard
from sapwood.program.cuda_library import BF16, F32, SmallGemmParams

# Of the sum of absolute products: 2.4 times what f32 sums that are rounded show. The tensor cores cut off instead, once
# an mma, which adds up with their number: against a sum of absolute products, with the square root of k.
SUM_ERROR: Final = 2**-22


def small_gemm_params(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None = None,
                      residual: torch.Tensor | None = None) -> SmallGemmParams:  # fmt: skip
    return SmallGemmParams(
        y_dtype=F32 if y.dtype == torch.float32 else BF16, x=x.data_ptr(), w=w.data_ptr(), y=y.data_ptr(),
        bias=None if bias is None else bias.data_ptr(), residual=None if residual is None else residual.data_ptr(),
        x_stride=x.stride(0), w_stride=w.stride(0), residual_stride=0 if residual is None else residual.stride(0),
        y_stride=y.stride(0), num_rows=x.shape[0], n=w.shape[0], k=x.shape[1],
    )  # fmt: skip


def framed(d: Device, values: torch.Tensor, columns: int) -> torch.Tensor:
    """The values with `columns` of NaN behind each row, and rows of NaN after the last one."""
    rows, width = values.shape
    frame = d.poison(rows + 17, width + columns, dtype=values.dtype)
    frame[:rows, :width] = values
    return frame[:rows, :width]


def check_small_gemm(d: Device) -> int:
    """Rows, sizes and what is added; returns the number of cases. AssertionError where one differs."""
    # Both sides of every edge: 8 and 16 rows of x, 16-row tiles of w, the n where blocks grow taller (4096, 8192),
    # steps of 64 and the four of them that the warps take, and the depth of the queues.
    shapes = (
        (1, 1, 8), (16, 1, 16), (2, 3, 24), (7, 16, 56), (8, 17, 64), (9, 31, 72), (15, 33, 248), (16, 64, 256),
        (3, 65, 264), (16, 48, 1024), (5, 20, 1600), (11, 16, 4104), (4, 37, 2048), (16, 16, 32768), (1, 5, 11008),
        (16, 4095, 8), (5, 4097, 136), (9, 4096, 264), (8, 8191, 72), (9, 8193, 72), (16, 8200, 320),
    )  # fmt: skip
    cases = 0
    for rows, n, k in shapes:
        x = framed(d, d.randn(rows, k).bfloat16(), 8 if cases % 3 else 0)
        w = framed(d, d.randn(n, k).bfloat16(), 24 if cases % 2 else 0)
        bias = d.randn(n) * 3 if cases % 2 else None
        residual = framed(d, d.randn(rows, n) * 20, 3) if cases % 4 > 1 else None
        added = (0 if bias is None else bias.double()) + (0 if residual is None else residual.double())
        expected = x.double() @ w.double().T + added
        magnitude = x.double().abs() @ w.double().abs().T
        magnitude += (0 if bias is None else bias.double().abs()) + (0 if residual is None else residual.double().abs())

        out = d.poison(rows + 2, n + 6, dtype=torch.float32)
        y = out[1 : rows + 1, 3 : n + 3]
        d.call("small_gemm", small_gemm_params(x, w, y, bias, residual))
        bound = SUM_ERROR * (1 + k**0.5 / 128)
        worst = ((y.double() - expected).abs() / magnitude).max().item()
        assert worst <= bound, f"small_gemm {rows, n, k}: error {worst / bound:.2f} times the bound"
        exact = y.clone()
        y.fill_(float("nan"))
        assert out.isnan().all(), "small_gemm wrote outside its rows"

        out16 = d.poison(rows + 2, n + 6)
        d.call("small_gemm", small_gemm_params(x, w, out16[1 : rows + 1, 3 : n + 3], bias, residual))
        y16 = out16[1 : rows + 1, 3 : n + 3]
        assert torch.equal(y16, exact.bfloat16()), "small_gemm's bf16 is not its f32 rounded, or not repeatable"
        y16.fill_(float("nan"))
        assert out16.isnan().all(), "small_gemm wrote outside its rows"

        # Alone, and by fewer outputs: other blocks, the same bits.
        for row in {0, rows // 2, rows - 1}:
            first = max(0, n - 70) // 2
            some = slice(first, min(n, first + 70))
            alone = d.poison(1, some.stop - first, dtype=torch.float32)
            d.call("small_gemm", small_gemm_params(
                x[row : row + 1], w[some], alone, None if bias is None else bias[some],
                None if residual is None else residual[row : row + 1, some],
            ))  # fmt: skip
            assert torch.equal(alone[0], exact[row, some]), "an output's bits depend on num_rows, n or the strides"
        cases += 1
    return cases + check_exact_sums(d) + check_nan_stays(d) + check_bounds(d) + check_in_place(d) + check_overlap(d)


def check_exact_sums(d: Device) -> int:
    """Small integers, whose sums no order rounds: every product must be there exactly once."""
    cases = 0
    for rows, n, k in ((16, 50, 2056), (1, 9, 512), (3, 17, 32768), (12, 8192, 16), (6, 4100, 40)):
        x = (torch.randint(1, 9, (rows, k), device=d.name, generator=d.generator)).bfloat16()
        w = (torch.randint(-8, 9, (n, k), device=d.name, generator=d.generator)).bfloat16()
        y = d.poison(rows, n, dtype=torch.float32)
        d.call("small_gemm", small_gemm_params(x, w, y))
        assert torch.equal(y.double(), x.double() @ w.double().T), "sums of small integers are not exact"
        cases += 1
    return cases


def check_nan_stays(d: Device) -> int:
    """NaN in a row of x (padding of a captured graph) or of w changes that row or output alone."""
    x, w = d.randn(13, 320).bfloat16(), d.randn(40, 320).bfloat16()
    clean, y = d.poison(13, 40, dtype=torch.float32), d.poison(13, 40, dtype=torch.float32)
    d.call("small_gemm", small_gemm_params(x, w, clean))
    x[[3, 12]] = float("nan")
    w[[0, 25], 7] = float("inf")
    d.call("small_gemm", small_gemm_params(x, w, y))
    assert y[[3, 12]].isnan().all() and not y[:, [0, 25]].isfinite().any(), "NaN or infinity got lost"
    others = torch.ones_like(y, dtype=torch.bool)
    others[[3, 12]] = others[:, [0, 25]] = False
    assert torch.equal(y[others], clean[others]), "NaN of one row reached another"
    return 1


def check_bounds(d: Device) -> int:
    """Nothing behind any tensor is touched; rows that do not exist change no result, so only this shows it."""
    cases = 0
    for rows, n, k in ((1, 1, 8), (3, 17, 72), (11, 40, 328), (9, 8193, 24), (6, 4097, 24)):
        x, w = before_guard(d, d.randn(rows, k).bfloat16()), before_guard(d, d.randn(n, k).bfloat16())
        bias, residual = before_guard(d, d.randn(n)), before_guard(d, d.randn(rows, n))
        y = before_guard(d, d.poison(rows, n))
        d.call("small_gemm", small_gemm_params(x, w, y, bias, residual))
        expected = x.double() @ w.double().T + bias.double() + residual.double()
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-4)
        cases += 1
    return cases


def check_in_place(d: Device) -> int:
    """The residual stream as input and output."""
    x, w, stream = d.randn(16, 192).bfloat16(), d.randn(100, 192).bfloat16(), d.randn(16, 100)
    apart = d.poison(16, 100, dtype=torch.float32)
    d.call("small_gemm", small_gemm_params(x, w, apart, residual=stream))
    d.call("small_gemm", small_gemm_params(x, w, stream, residual=stream))
    assert torch.equal(apart, stream), "small_gemm differs in place"
    return 1


def check_overlap(d: Device) -> int:
    """Layers launched one after the other, each kernel in need of what the one before wrote and where that one reads
    (cuda/common/launch.cuh: launches overlap), among them torch's: the same bits as with a wait behind each; again as
    a graph.
    """
    layers, rows, hidden = (24, 4, 1024) if d.name == "cuda" else (2, 4, 128)
    weights = [
        (1 + d.randn(hidden) / 8, (d.randn(4 * hidden, hidden) / hidden**0.5).bfloat16(),
         (d.randn(hidden, 2 * hidden) / (2 * hidden) ** 0.5).bfloat16())
        for _ in range(layers)
    ]  # fmt: skip
    start = d.randn(rows, hidden)
    x, y = torch.empty_like(start), torch.empty_like(start)
    normed, gated = d.poison(rows, hidden), d.poison(rows, 2 * hidden)
    gate_up = d.poison(rows, 4 * hidden)

    def run(after_each: Callable[[], None]) -> None:
        x.copy_(start)
        y.zero_()
        for norm, up, down in weights:
            for op, params in (
                ("rms_norm", rms_norm_params(x, norm, normed, plus_one=False)),
                ("small_gemm", small_gemm_params(normed, up, gate_up)),
                ("silu_mul", silu_mul_params(gate_up, gated)),
                ("small_gemm", small_gemm_params(gated, down, y, residual=x)),
            ):
                d.call(op, params)
                after_each()
            torch.mul(y, 0.9, out=x)
            after_each()

    run(torch.cuda.synchronize if d.name == "cuda" else lambda: None)
    expected = x.clone()
    assert expected.isfinite().all()
    replay = d.captured(lambda: run(lambda: None))
    for again in (lambda: run(lambda: None), replay):
        for _ in range(20 if d.name == "cuda" else 1):
            x.fill_(float("nan"))
            again()
            assert torch.equal(x, expected), "launched one after the other: other bits than with a wait behind each"
    return 2
