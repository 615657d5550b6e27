"""What the launchers of cuda/matmul/ and of the gated activation refuse, and how they say it."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.program.cuda_library import CudaLibrary, Params, SiluMulParams, SmallGemmParams


def refusal(library: CudaLibrary, op: str, params: Params) -> str:
    """The error text of a call that must be refused before anything is launched."""
    assert library.status(op, params) == -1
    return library.last_error()


def small_gemm(**changes: Any) -> SmallGemmParams:
    fields = dict(x=64, w=64, y=64, x_stride=16, w_stride=16, residual_stride=8, y_stride=8, num_rows=2, n=8, k=16)
    return SmallGemmParams(**{**fields, **changes})


def silu_mul(**changes: Any) -> SiluMulParams:
    return SiluMulParams(**{**dict(x=64, y=64, x_stride=16, y_stride=8, num_rows=2, width=8), **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"y_dtype": 2}, "y_dtype must be f32 (0) or bf16 (1), got 2"),
        ({"num_rows": -1}, "num_rows must be in 0..16, got -1"),
        ({"num_rows": 17}, "num_rows must be in 0..16, got 17"),
        ({"n": 0}, "n must be in 1..1073741824, got 0"),
        ({"n": 2**30 + 1}, "n must be in 1..1073741824, got 1073741825"),
        ({"k": 0}, "k must be a multiple of 8 in 8..1073741824, got 0"),
        ({"k": 12}, "k must be a multiple of 8 in 8..1073741824, got 12"),
        ({"k": 2**30 + 8}, "k must be a multiple of 8 in 8..1073741824, got 1073741832"),
        ({"x_stride": 8}, "multiples of 8 and at least k = 16, got 8 and 16"),
        ({"x_stride": 20}, "multiples of 8 and at least k = 16, got 20 and 16"),
        ({"w_stride": 8}, "multiples of 8 and at least k = 16, got 16 and 8"),
        ({"w_stride": 20}, "multiples of 8 and at least k = 16, got 16 and 20"),
        ({"y_stride": 7}, "y_stride must be at least n = 8, got 7"),
        ({"residual": 64, "residual_stride": 7}, "residual_stride must be at least n = 8, got 7"),
        ({"x": None}, "x, w and y must not be null"),
        ({"w": None}, "x, w and y must not be null"),
        ({"y": None}, "x, w and y must not be null"),
        ({"x": 72}, "x and w must be aligned to 16 bytes, got 0x48 and 0x40"),
        ({"w": 72}, "x and w must be aligned to 16 bytes, got 0x40 and 0x48"),
        ({"bias": 66}, "must be aligned to their elements, got 0x42"),
        ({"residual": 66}, "must be aligned to their elements"),
        ({"y": 66}, "must be aligned to their elements"),
        ({"y": 65, "y_dtype": 1}, "must be aligned to their elements"),
    ],
)
def test_small_gemm_names_the_wrong_argument(emulated: CudaLibrary, changes: dict[str, Any], said: str) -> None:
    text = refusal(emulated, "small_gemm", small_gemm(**changes))
    assert text.startswith("small_gemm: ") and said in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation": 3}, "activation must be silu (0), gelu (1) or gelu_tanh (2), got 3"),
        ({"activation": -1}, "activation must be silu (0), gelu (1) or gelu_tanh (2), got -1"),
        ({"num_rows": -1}, "num_rows must not be negative, got -1"),
        ({"width": 0}, "width must be in 1..67107840, got 0"),
        ({"width": 67107841}, "width must be in 1..67107840, got 67107841"),
        ({"x_stride": 15}, "x_stride must be at least 2 * width = 16, got 15"),
        ({"y_stride": 7}, "y_stride must be at least width = 8, got 7"),
        ({"x": None}, "x and y must not be null"),
        ({"y": None}, "x and y must not be null"),
        ({"x": 65}, "must be aligned to their elements, got 0x41"),
        ({"y": 65}, "must be aligned to their elements"),
    ],
)
def test_silu_mul_names_the_wrong_argument(emulated: CudaLibrary, changes: dict[str, Any], said: str) -> None:
    text = refusal(emulated, "silu_mul", silu_mul(**changes))
    assert text.startswith("silu_mul: ") and said in text


def test_another_struct_size_is_refused(emulated: CudaLibrary) -> None:
    for op, params in (("small_gemm", small_gemm()), ("silu_mul", silu_mul())):
        expected = params.struct_size
        params.struct_size = expected - 8
        text = refusal(emulated, op, params)
        assert text.startswith(f"{op}: params.struct_size is {expected - 8}, this library expects {expected}")


def test_no_rows_launch_nothing(emulated: CudaLibrary) -> None:
    assert emulated.status("small_gemm", small_gemm(num_rows=0)) == 0
    assert emulated.status("silu_mul", silu_mul(num_rows=0)) == 0
