"""The gated activation."""

from __future__ import annotations

from typing import Final

import torch

from gpu_checks.device import Device
from gpu_checks.guard import before_guard
from sapwood.program.cuda_library import GELU, GELU_TANH, SILU, SiluMulParams

ACTIVATIONS: Final = (SILU, GELU, GELU_TANH)


def silu_mul_params(x: torch.Tensor, y: torch.Tensor, activation: int = SILU) -> SiluMulParams:
    return SiluMulParams(
        activation=activation, x=x.data_ptr(), y=y.data_ptr(), x_stride=x.stride(0), y_stride=y.stride(0),
        num_rows=x.shape[0], width=x.shape[1] // 2,
    )  # fmt: skip


def gated_reference(x: torch.Tensor, activation: int) -> torch.Tensor:
    """x bf16 gate | up -> fp64. Both GELUs are written for a relative error that is small for negative gates as well:
    torch's own lose their digits to 1 + tanh and 1 + erf.
    """
    gate, up = x.double().chunk(2, 1)
    if activation == SILU:
        share = torch.sigmoid(gate)
    elif activation == GELU:
        share = 0.5 * torch.erfc(-gate * 0.5**0.5)
    else:
        share = torch.sigmoid((8 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    return gate * share * up


def check_gated_reference() -> None:
    """The reference against torch's own, where those keep their digits."""
    x = torch.linspace(-5, 5, 1001).bfloat16()[None]
    x = torch.cat((x, torch.ones_like(x)), 1)
    gate = x.double()[:, :1001]
    gelu, silu = torch.nn.functional.gelu, torch.nn.functional.silu
    torch.testing.assert_close(gated_reference(x, SILU), silu(gate), rtol=1e-12, atol=0)
    torch.testing.assert_close(gated_reference(x, GELU), gelu(gate), rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(gated_reference(x, GELU_TANH), gelu(gate, approximate="tanh"), rtol=1e-8, atol=1e-14)


def check_silu_mul(d: Device) -> int:
    """Every activation, odd widths and offsets; returns the number of cases. AssertionError where one differs."""
    check_gated_reference()
    # Far into both tails: exp overflows below -88, and at -60 a digit lost to cancellation would show.
    special = torch.tensor([0.0, -0.0, 20, -20, -60, 88, -88, -89, -100, 1e4, -1e4, 1e37, -1e37], device=d.name)
    cases = 0
    for activation in ACTIVATIONS:
        for rows, width in ((1, 1), (2, 7), (3, 8), (5, 1000), (2, 1024), (3, 1032), (1, 2061), (40, 96), (2, 5376)):
            for offset in (0, 1, 8):
                # NaN before and behind every row; strides that are odd in every second case.
                store = d.poison(rows + 1, 2 * width + 24 + cases % 2)
                x = store[:rows, offset : offset + 2 * width]
                x.copy_(d.randn(rows, 2 * width) * 3)
                x[:, : min(width, len(special))] = special[:width]
                out = d.poison(rows + 1, width + 16 + cases // 2 % 2)
                y = out[:rows, offset : offset + width]
                d.call("silu_mul", silu_mul_params(x, y, activation))
                expected = gated_reference(x, activation)
                torch.testing.assert_close(y.double(), expected, rtol=2**-8 * 1.01, atol=1e-35)
                y_copy = y.clone()
                y.fill_(float("nan"))
                assert out.isnan().all(), "silu_mul wrote outside its rows"
                # The row alone and elsewhere: no longer aligned, or aligned where it was not.
                shifted = d.poison(1, 2 * width + 24)[:, 8 - offset : 8 - offset + 2 * width]
                shifted.copy_(x[-1:])
                alone = d.poison(1, width)
                d.call("silu_mul", silu_mul_params(shifted, alone, activation))
                assert torch.equal(alone[0], y_copy[-1]), "a row's bits depend on the other rows or on alignment"
                cases += 1
        for width in (1, 9, 16):
            x, y = before_guard(d, d.randn(2, 2 * width).bfloat16()), before_guard(d, d.poison(2, width))
            d.call("silu_mul", silu_mul_params(x, y, activation))
            torch.testing.assert_close(y.double(), gated_reference(x, activation), rtol=2**-8 * 1.01, atol=1e-35)
            cases += 1
        gate = torch.tensor([[float("nan"), float("inf"), 1.0, 2.0, 2.0, float("nan")]], device=d.name).bfloat16()
        y = d.poison(1, 3)
        d.call("silu_mul", silu_mul_params(gate, y, activation))
        assert y[0, 0].isnan() and y[0, 1] == float("inf") and y[0, 2].isnan(), "NaN or infinity got lost"
        cases += 1
    return cases
