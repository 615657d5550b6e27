"""The mixture-of-experts launchers refuse wrong arguments and say which, before anything is launched."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.program.cuda_library import (
    CudaLibrary,
    MoeAlignParams,
    MoeCombineParams,
    MoeGatherParams,
    MoeGemmParams,
    MoeGemmSmallParams,
    MoeRouteParams,
    Params,
)


def route(**changes: Any) -> MoeRouteParams:
    fields: dict[str, Any] = dict.fromkeys(("logits", "ids", "weights"), 64)
    fields |= dict(logits_dtype=0, logits_stride=8, num_tokens=1, num_experts=8, top_k=2, scoring=0, num_groups=1)
    fields |= dict(topk_groups=1, group_score=0, renormalise=1, scale=1.0)
    return MoeRouteParams(**{**fields, **changes})


def align(**changes: Any) -> MoeAlignParams:
    fields: dict[str, Any] = dict.fromkeys(("ids", "sorted_pairs", "block_expert", "expert_offsets", "num_padded"), 64)
    fields |= dict(num_pairs=12, num_experts=4, block=16, capacity=80)
    return MoeAlignParams(**{**fields, **changes})


def gemm_small(**changes: Any) -> MoeGemmSmallParams:
    fields: dict[str, Any] = dict.fromkeys(("x", "weight", "sorted_pairs", "block_expert", "num_padded", "y"), 64)
    fields |= dict(y_dtype=1, x_stride=16, weight_stride=16, expert_stride=160, y_stride=10, num_pairs=12)
    fields |= dict(pairs_per_row=2, capacity=80, n=10, k=16)
    return MoeGemmSmallParams(**{**fields, **changes})


def gather(**changes: Any) -> MoeGatherParams:
    fields: dict[str, Any] = dict.fromkeys(("x", "sorted_pairs", "num_padded", "y", "places"), 64)
    fields |= dict(x_stride=16, y_stride=16, num_pairs=12, pairs_per_row=2, capacity=80, width=16)
    return MoeGatherParams(**{**fields, **changes})


def gemm(**changes: Any) -> MoeGemmParams:
    fields: dict[str, Any] = dict.fromkeys(("x", "weight", "expert_offsets", "block_expert", "y"), 64)
    fields |= dict(num_experts=4, x_stride=16, weight_stride=16, expert_stride=384, y_stride=24, capacity=128)
    fields |= dict(n=24, k=16, portable=1)
    return MoeGemmParams(**{**fields, **changes})


def combine(**changes: Any) -> MoeCombineParams:
    fields: dict[str, Any] = dict.fromkeys(("z", "weights", "ids", "shared", "y"), 64)
    fields |= dict(z_dtype=1, shared_dtype=1, y_dtype=1, z_stride=8, shared_stride=8, y_stride=8)
    fields |= dict(num_tokens=1, top_k=2, hidden=8, num_experts=8)
    return MoeCombineParams(**{**fields, **changes})


CALLS = {
    "moe_route": route, "moe_align": align, "moe_gemm_small": gemm_small, "moe_gather": gather, "moe_gemm": gemm,
    "moe_combine": combine,
}  # fmt: skip


def refusal(library: CudaLibrary, op: str, params: Params) -> str:
    """The error text of a call that must be refused before anything is launched."""
    assert library.status(op, params) == -1
    return library.last_error()


@pytest.mark.parametrize("op", CALLS)
def test_another_struct_size_is_refused(emulated: CudaLibrary, op: str) -> None:
    params = CALLS[op]()
    expected = params.struct_size
    params.struct_size = expected - 8
    text = refusal(emulated, op, params)
    assert text.startswith(f"{op}: params.struct_size is {expected - 8}, this library expects {expected}")


@pytest.mark.parametrize(
    ("op", "changes", "said"),
    [
        ("moe_route", {"logits_dtype": 2}, "logits_dtype must be f32 (0) or bf16 (1), got 2"),
        ("moe_route", {"num_tokens": -1}, "num_tokens must not be negative, got -1"),
        ("moe_route", {"num_experts": 0}, "num_experts must be in 1..512, got 0"),
        ("moe_route", {"num_experts": 513}, "num_experts must be in 1..512, got 513"),
        ("moe_route", {"logits_stride": 7}, "logits_stride must be at least num_experts = 8, got 7"),
        ("moe_route", {"scoring": 2}, "scoring must be softmax (0) or sigmoid (1), got 2"),
        ("moe_route", {"num_groups": 0}, "num_groups must be in 1..32 and divide num_experts = 8, got 0"),
        ("moe_route", {"num_groups": 3}, "divide num_experts = 8, got 3"),
        ("moe_route", {"num_experts": 64, "logits_stride": 64, "num_groups": 64}, "must be in 1..32"),
        ("moe_route", {"topk_groups": 0}, "topk_groups must be in 1..num_groups = 1, got 0"),
        ("moe_route", {"topk_groups": 2}, "topk_groups must be in 1..num_groups = 1, got 2"),
        ("moe_route", {"group_score": 2}, "group_score must be top2 (0) or max (1), got 2"),
        ("moe_route", {"num_groups": 8, "topk_groups": 8}, "group_score must be max (1) where a group has one expert"),
        ("moe_route", {"top_k": 0}, "top_k must be in 1..32 and at most the 8 experts of topk_groups groups, got 0"),
        ("moe_route", {"top_k": 9}, "at most the 8 experts of topk_groups groups, got 9"),
        ("moe_route", {"num_groups": 2, "top_k": 5}, "at most the 4 experts of topk_groups groups, got 5"),
        ("moe_route", {"num_experts": 64, "logits_stride": 64, "top_k": 33}, "top_k must be in 1..32"),
        ("moe_route", {"scale": float("nan")}, "scale must be finite, got nan"),
        ("moe_route", {"reserved": 1}, "reserved must be 0, got 1"),
        ("moe_route", {"ids": None}, "logits, ids and weights must not be null"),
        ("moe_align", {"num_pairs": -1}, "num_pairs must be in 0.."),
        ("moe_align", {"num_experts": 0}, "num_experts must be in 1..1024, got 0"),
        ("moe_align", {"num_experts": 1025}, "num_experts must be in 1..1024, got 1025"),
        ("moe_align", {"block": 0}, "block must be positive, got 0"),
        ("moe_align", {"capacity": 81}, "capacity must be a multiple of block = 16, got 81"),
        ("moe_align", {"capacity": 64}, "capacity must be at least 80 for num_pairs = 12, got 64"),
        ("moe_align", {"num_pairs": 3, "capacity": 32}, "capacity must be at least 48 for num_pairs = 3, got 32"),
        ("moe_align", {"reserved": 1}, "reserved must be 0, got 1"),
        ("moe_align", {"ids": None}, "ids must not be null"),
        ("moe_align", {"block_expert": None}, "sorted_pairs and block_expert must not be null"),
        ("moe_align", {"num_padded": None}, "expert_offsets and num_padded must not be null"),
        ("moe_gemm_small", {"y_dtype": 2}, "y_dtype must be f32 (0) or bf16 (1), got 2"),
        ("moe_gemm_small", {"num_pairs": -1}, "num_pairs must not be negative, got -1"),
        ("moe_gemm_small", {"pairs_per_row": 0}, "pairs_per_row must be positive, got 0"),
        ("moe_gemm_small", {"n": 0}, "n must be in 1.."),
        ("moe_gemm_small", {"k": 0}, "k must be a positive multiple of 8"),
        ("moe_gemm_small", {"k": 12}, "k must be a positive multiple of 8"),
        ("moe_gemm_small", {"x_stride": 8}, "x_stride must be a multiple of 8 and at least k = 16, got 8"),
        ("moe_gemm_small", {"x_stride": 20}, "x_stride must be a multiple of 8 and at least k = 16, got 20"),
        ("moe_gemm_small", {"weight_stride": 20}, "weight_stride must be a multiple of 8 and at least k = 16, got 20"),
        ("moe_gemm_small", {"expert_stride": 152}, "at least n * weight_stride = 160, got 152"),
        ("moe_gemm_small", {"expert_stride": 164}, "expert_stride must be a multiple of 8"),
        ("moe_gemm_small", {"y_stride": 9}, "y_stride must be at least n = 10, got 9"),
        ("moe_gemm_small", {"capacity": 72}, "capacity must be a multiple of 16 and at most 1048560, got 72"),
        ("moe_gemm_small", {"capacity": 1 << 20}, "at most 1048560, got 1048576"),
        ("moe_gemm_small", {"capacity": 0}, "capacity must be at least num_pairs = 12, got 0"),
        ("moe_gemm_small", {"reserved": 1}, "reserved must be 0, got 1"),
        ("moe_gemm_small", {"num_padded": None}, "must not be null"),
        ("moe_gemm_small", {"weight": 72}, "x and weight must be aligned to 16 bytes"),
        ("moe_gather", {"num_pairs": -1}, "num_pairs must not be negative, got -1"),
        ("moe_gather", {"pairs_per_row": 0}, "pairs_per_row must be positive, got 0"),
        ("moe_gather", {"width": 0}, "width must be a positive multiple of 8, got 0"),
        ("moe_gather", {"width": 12}, "width must be a positive multiple of 8, got 12"),
        ("moe_gather", {"x_stride": 8}, "x_stride must be a multiple of 8 and at least width = 16, got 8"),
        ("moe_gather", {"x_stride": 20}, "x_stride must be a multiple of 8 and at least width = 16, got 20"),
        ("moe_gather", {"y_stride": 8}, "y_stride must be a multiple of 8 and at least width = 16, got 8"),
        ("moe_gather", {"y_stride": 20}, "y_stride must be a multiple of 8 and at least width = 16, got 20"),
        ("moe_gather", {"capacity": 11}, "capacity must be at least num_pairs = 12, got 11"),
        ("moe_gather", {"reserved": 1}, "reserved must be 0, got 1"),
        ("moe_gather", {"num_padded": None}, "x, sorted_pairs, num_padded and y must not be null"),
        ("moe_gather", {"y": 72}, "x and y must be aligned to 16 bytes"),
        ("moe_gemm", {"num_experts": 0}, "num_experts must be in 1..1024, got 0"),
        ("moe_gemm", {"num_experts": 1025}, "num_experts must be in 1..1024, got 1025"),
        ("moe_gemm", {"n": 0}, "n must be a positive multiple of 8"),
        ("moe_gemm", {"n": 20}, "n must be a positive multiple of 8"),
        ("moe_gemm", {"k": 0}, "k must be a positive multiple of 8"),
        ("moe_gemm", {"k": 12}, "k must be a positive multiple of 8"),
        ("moe_gemm", {"x_stride": 8}, "x_stride must be a multiple of 8 and at least k = 16, got 8"),
        ("moe_gemm", {"x_stride": 20}, "x_stride must be a multiple of 8 and at least k = 16, got 20"),
        ("moe_gemm", {"weight_stride": 20}, "weight_stride must be a multiple of 8 and at least k = 16, got 20"),
        ("moe_gemm", {"expert_stride": 376}, "at least n * weight_stride = 384, got 376"),
        ("moe_gemm", {"expert_stride": 388}, "expert_stride must be a multiple of 8"),
        ("moe_gemm", {"y_stride": 16}, "y_stride must be a multiple of 8 and at least n = 24, got 16"),
        ("moe_gemm", {"y_stride": 28}, "y_stride must be a multiple of 8 and at least n = 24, got 28"),
        ("moe_gemm", {"capacity": 96}, "capacity must be a multiple of 64 and at most 4194240, got 96"),
        ("moe_gemm", {"capacity": 1 << 22}, "at most 4194240, got 4194304"),
        ("moe_gemm", {"portable": 2}, "portable must be 0 or 1, got 2"),
        ("moe_gemm", {"block_expert": None}, "block_expert and y must not be null"),
        ("moe_gemm", {"y": 72}, "x, weight and y must be aligned to 16 bytes"),
        ("moe_combine", {"z_dtype": 2}, "z_dtype must be f32 (0) or bf16 (1), got 2"),
        ("moe_combine", {"y_dtype": 2}, "y_dtype must be f32 (0) or bf16 (1), got 2"),
        ("moe_combine", {"shared_dtype": 2}, "shared_dtype must be f32 (0) or bf16 (1), got 2"),
        ("moe_combine", {"num_tokens": -1}, "num_tokens must not be negative, got -1"),
        ("moe_combine", {"top_k": 0}, "top_k must be in 1..32, got 0"),
        ("moe_combine", {"top_k": 33}, "top_k must be in 1..32, got 33"),
        ("moe_combine", {"hidden": 0}, "hidden must be in 1.."),
        ("moe_combine", {"z_stride": 7}, "at least hidden = 8, got 7 and 8"),
        ("moe_combine", {"y_stride": 7}, "at least hidden = 8, got 8 and 7"),
        ("moe_combine", {"shared_stride": 7}, "shared_stride must be at least hidden = 8, got 7"),
        ("moe_combine", {"num_experts": 0}, "num_experts must be positive where ids are given, got 0"),
        ("moe_combine", {"z": None}, "z and y must not be null"),
    ],
)
def test_the_wrong_argument_is_named(emulated: CudaLibrary, op: str, changes: dict[str, Any], said: str) -> None:
    text = refusal(emulated, op, CALLS[op](**changes))
    assert text.startswith(f"{op}: ") and said in text


def test_nothing_to_do_launches_nothing(emulated: CudaLibrary) -> None:
    assert emulated.status("moe_route", route(num_tokens=0)) == 0
    assert emulated.status("moe_gemm_small", gemm_small(num_pairs=0)) == 0
    assert emulated.status("moe_gather", gather(num_pairs=0)) == 0
    assert emulated.status("moe_gemm", gemm(capacity=0)) == 0
    assert emulated.status("moe_combine", combine(num_tokens=0)) == 0


def test_the_portable_tier_needs_no_workspace(emulated: CudaLibrary) -> None:
    assert emulated.moe_gemm_workspace_bytes(128) == 0
