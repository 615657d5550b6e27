"""RMSNorm, and rotary embedding with the write of K and V."""

from __future__ import annotations

from typing import Any

import torch

from gpu_checks.device import Device
from sapwood.program.cuda_library import BF16, F32, RmsNormParams, RopeKvWriteParams


# --- RMSNorm ------------------------------------------------------------------------------------------------
def rms_norm_params(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, plus_one: bool) -> RmsNormParams:
    dtype = F32 if x.dtype == torch.float32 else BF16
    return RmsNormParams(
        x_dtype=dtype, x=x.data_ptr(), weight=weight.data_ptr(), y=y.data_ptr(), x_stride=x.stride(0),
        y_stride=y.stride(0), num_rows=x.shape[0], hidden=x.shape[1], eps=1e-5, plus_one=plus_one,
    )  # fmt: skip


def check_rms_norm(d: Device) -> int:
    """Every dtype, offset and size; returns the number of cases. AssertionError where one differs."""
    cases = 0
    for dtype in (torch.float32, torch.bfloat16):
        for rows, hidden in ((1, 1), (1, 2), (3, 63), (5, 1023), (2, 1024), (17, 1027), (64, 4096), (3, 16384)):
            for offset in (0, 1):
                plus_one = bool(cases % 2)
                x = (d.randn(rows, hidden + 8) * 3).to(dtype)[:, offset : offset + hidden]
                weight = d.randn(hidden)
                out = torch.full((rows, hidden + 8), float("nan"), device=d.name, dtype=torch.bfloat16)
                y = out[:, offset : offset + hidden]
                d.call("rms_norm", rms_norm_params(x, weight, y, plus_one))
                x64 = x.double()
                scale = weight.double() + plus_one
                expected = x64 / (x64.square().mean(1, keepdim=True) + 1e-5).sqrt() * scale
                torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)
                outside = torch.cat((out[:, :offset], out[:, offset + hidden :]), 1)
                assert outside.isnan().all(), "rms_norm wrote outside its rows"
                alone = torch.empty(1, hidden, device=d.name, dtype=torch.bfloat16)
                last = x[-1:].contiguous()
                d.call("rms_norm", rms_norm_params(last, weight, alone, plus_one))
                assert torch.equal(alone[0], y[-1]), "a row's bits depend on the other rows or on alignment"
                cases += 1
    return cases


# --- RoPE and KV write ----------------------------------------------------------------------------------------
def rope_case(d: Device, tokens: int, hq: int, hkv: int, dim: int, rotary: int, page_size: int, norm: bool,
              num_pages: int = 0) -> tuple[RopeKvWriteParams, dict[str, Any]]:  # fmt: skip
    """Parameters and tensors of one call: random slots, NaN in all outputs, K and V of a page side by side."""
    num_pages = num_pages or tokens // page_size + 3
    max_position = 4096
    angles = torch.arange(max_position, device=d.name)[:, None] / 10000 ** (
        torch.arange(rotary // 2, device=d.name) / max(rotary // 2, 1)
    )
    t: dict[str, Any] = {
        "qkv": d.randn(tokens, (hq + 2 * hkv) * dim).bfloat16(),
        "q_out": torch.full((tokens, hq * dim), float("nan"), device=d.name, dtype=torch.bfloat16),
        "pool": torch.full((num_pages, 2, hkv, page_size, dim), float("nan"), device=d.name, dtype=torch.bfloat16),
        "slots": torch.randperm(num_pages * page_size, device=d.name, generator=d.generator)[:tokens].clone(),
        "positions": torch.randint(0, max_position, (tokens,), device=d.name, generator=d.generator).int(),
        "cos": angles.cos().float().contiguous(),
        "sin": angles.sin().float().contiguous(),
        "q_norm": d.randn(dim) if norm else None,
        "k_norm": d.randn(dim) if norm else None,
    }
    params = RopeKvWriteParams(
        num_tokens=tokens, qkv=t["qkv"].data_ptr(), qkv_stride=t["qkv"].stride(0), q_out=t["q_out"].data_ptr(),
        q_stride=t["q_out"].stride(0), k_pages=t["pool"].data_ptr(), v_pages=t["pool"][:, 1].data_ptr(),
        page_stride=t["pool"].stride(0), slots=t["slots"].data_ptr(), positions=t["positions"].data_ptr(),
        cos=t["cos"].data_ptr(), sin=t["sin"].data_ptr(), q_norm=t["q_norm"].data_ptr() if norm else None,
        k_norm=t["k_norm"].data_ptr() if norm else None, norm_eps=1e-6, num_q_heads=hq, num_kv_heads=hkv,
        head_dim=dim, rotary_dim=rotary, page_size=page_size,
    )  # fmt: skip
    return params, t


def rope_reference(x: torch.Tensor, norm: torch.Tensor | None, t: dict[str, Any], rotary: int) -> torch.Tensor:
    """x bf16 [tokens, heads, dim] -> fp64."""
    x = x.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
    cos = t["cos"].double()[t["positions"].long()][:, None]
    sin = t["sin"].double()[t["positions"].long()][:, None]
    first, second, rest = x[..., : rotary // 2], x[..., rotary // 2 : rotary], x[..., rotary:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def check_rope_kv_write(d: Device) -> int:
    """Head sizes, rotation, page sizes, padding; returns the number of cases. AssertionError where one fails."""
    cases = 0
    shapes = (
        (1, 1, 1, 2, 2, 1), (5, 4, 2, 64, 64, 16), (33, 7, 1, 80, 32, 1), (17, 8, 8, 96, 96, 64),
        (70, 32, 8, 128, 128, 16), (9, 3, 3, 48, 0, 32), (12, 14, 2, 256, 64, 16),
        (3, 5, 1, 34, 34, 5),
    )  # fmt: skip
    for tokens, hq, hkv, dim, rotary, page_size in shapes:
        for norm in (False, True):
            params, t = rope_case(d, tokens, hq, hkv, dim, rotary, page_size, norm)
            padding = tokens - 1 if tokens > 4 else None
            if padding is not None:
                t["slots"][padding] = -1
            d.call("rope_kv_write", params)
            heads = t["qkv"].view(tokens, hq + 2 * hkv, dim)
            q = rope_reference(heads[:, :hq], t["q_norm"], t, rotary)
            k = rope_reference(heads[:, hq : hq + hkv], t["k_norm"], t, rotary)
            torch.testing.assert_close(t["q_out"].view(tokens, hq, dim).double(), q, rtol=2**-8, atol=1e-5)
            written = t["slots"] >= 0
            slots = t["slots"][written]
            got = t["pool"][slots // page_size, :, :, slots % page_size]
            torch.testing.assert_close(got[:, 0].double(), k[written], rtol=2**-8, atol=1e-5)
            assert torch.equal(got[:, 1], heads[written][:, hq + hkv :]), "V is not a copy"
            untouched = int(t["pool"].isnan().sum())
            assert untouched == t["pool"].numel() - got.numel(), "rope_kv_write wrote outside its slots"
            cases += 1
    return cases
