"""Mixture of experts with many rows: the gather into the order of experts, and the grouped GEMM, each tier of it."""

from __future__ import annotations

import torch

from gpu_checks.device import Device
from gpu_checks.guard import before_guard
from gpu_checks.moe import Guarded, align_capacity, align_reference, close, gemm_case, padded, random_ids
from sapwood.program.cuda_library import MOE_GEMM_BLOCK, MoeGatherParams, MoeGemmParams


def routings(d: Device, tokens: int, top_k: int, experts: int) -> dict[str, torch.Tensor]:
    """By name: as a router chooses, one expert that gets all, pairs without an expert, and nobody with one."""
    ids = {name: random_ids(d, tokens, top_k, experts) for name in ("random", "one", "dropped", "none")}
    ids["one"][:] = experts - 1
    ids["dropped"][::3] = -1
    ids["dropped"][-1, -1] = experts
    ids["none"][:] = -1
    return ids


# --- The gather -------------------------------------------------------------------------------------------------
def gather_params(x: torch.Tensor, aligned: dict[str, torch.Tensor], y: torch.Tensor, places: torch.Tensor | None,
                  num_pairs: int) -> MoeGatherParams:  # fmt: skip
    """aligned: as moe_align writes it; y: a row for each of its sorted_pairs."""
    return MoeGatherParams(
        num_pairs=num_pairs, x=x.data_ptr(), x_stride=x.stride(0), sorted_pairs=aligned["sorted_pairs"].data_ptr(),
        num_padded=aligned["num_padded"].data_ptr(), y=y.data_ptr(), y_stride=y.stride(0),
        places=None if places is None else places.data_ptr(), pairs_per_row=num_pairs // x.shape[0],
        capacity=aligned["sorted_pairs"].numel(), width=y.shape[1],
    )  # fmt: skip


def check_moe_gather(d: Device) -> int:
    """Sizes, routings, blocks; returns the number of cases. AssertionError where one fails."""
    cases = 0
    # tokens, top_k, experts, block, width
    for tokens, top_k, experts, block, width in (
        (1, 1, 1, 64, 8), (1, 8, 60, 16, 2048), (7, 2, 8, 64, 1032), (33, 4, 5, 64, 72), (64, 8, 128, 16, 264),
        (130, 1, 2, 1, 256),
    ):  # fmt: skip
        for routing, ids in routings(d, tokens, top_k, experts).items():
            per_pair = cases % 3 == 1
            x = padded(d, d.randn(tokens * top_k if per_pair else tokens, width).bfloat16())
            kept = ((ids >= 0) & (ids < experts)).flatten()
            x[~(kept if per_pair else kept.view(tokens, top_k).any(1))] = float("nan")
            x = before_guard(d, x)
            aligned = align_reference(ids, experts, block, align_capacity(ids.numel(), experts, block) + 3 * block)
            num_padded = int(aligned["num_padded"])
            pairs = aligned["sorted_pairs"][:num_padded].long()
            # Where there is nothing to do, a number that would make a row.
            aligned["sorted_pairs"][num_padded:] = 0
            whole = d.poison(aligned["sorted_pairs"].numel(), width + 8)
            y, places = whole[:, :width], Guarded(d, ids.numel())
            d.call("moe_gather", gather_params(x, aligned, y, places.inside if cases % 2 else None, ids.numel()))
            assert whole[num_padded:].isnan().all() and whole[:, width:].isnan().all(), f"{routing}: wrote too much"
            there = pairs < ids.numel()
            expected = torch.zeros(num_padded, width, device=d.name, dtype=torch.bfloat16)
            expected[there] = x[pairs[there] // (ids.numel() // x.shape[0])]
            assert torch.equal(y[:num_padded], expected), f"{routing}: other rows"
            places.check("places")
            if cases % 2:
                back = places.inside.long()
                assert (back[~kept] == places.whole[0]).all(), f"{routing}: a place of a pair without an expert"
                assert torch.equal(pairs[back[kept]], kept.nonzero().flatten()), f"{routing}: other places"
            cases += 1
    return cases


# --- The grouped GEMM ---------------------------------------------------------------------------------------------
def workspace_of(d: Device, num_experts: int) -> torch.Tensor:
    """What moe_gemm takes on this device, poisoned."""
    return torch.full((d.library.moe_gemm_workspace_bytes(num_experts),), 0xCD, device=d.name, dtype=torch.uint8)


def gemm_params(x: torch.Tensor, weight: torch.Tensor, aligned: dict[str, torch.Tensor], y: torch.Tensor,
                workspace: torch.Tensor | None) -> MoeGemmParams:  # fmt: skip
    """workspace None: the portable tier."""
    experts, n, k = weight.shape
    return MoeGemmParams(
        num_experts=experts, x=x.data_ptr(), x_stride=x.stride(0), weight=weight.data_ptr(),
        expert_stride=weight.stride(0), weight_stride=weight.stride(1),
        expert_offsets=aligned["expert_offsets"].data_ptr(), block_expert=aligned["block_expert"].data_ptr(),
        y=y.data_ptr(), y_stride=y.stride(0), workspace=None if workspace is None else workspace.data_ptr(),
        workspace_bytes=0 if workspace is None else workspace.numel(), capacity=aligned["sorted_pairs"].numel(), n=n,
        k=k, portable=int(workspace is None),
    )  # fmt: skip


def check_moe_gemm(d: Device) -> int:
    """Sizes, tails and routings on each tier that this device has; returns the number of cases. AssertionError where
    one fails.
    """
    tiers = (True, False) if d.library.moe_gemm_workspace_bytes(1) > 0 else (True,)
    return sum(check_tier(d, portable) for portable in tiers)


def check_tier(d: Device, portable: bool) -> int:
    cases = 0
    # tokens, top_k, experts, n, k
    for tokens, top_k, experts, n, k in (
        (1, 1, 1, 8, 8), (70, 2, 5, 136, 104), (65, 1, 3, 72, 328), (130, 1, 2, 64, 40), (33, 4, 60, 24, 64),
    ):  # fmt: skip
        for routing, ids in routings(d, tokens, top_k, experts).items():
            name = f"moe_gemm {tokens} x {top_k}, {experts} experts, {n} x {k}: {routing}"
            workspace = None if portable else workspace_of(d, experts)
            surplus = cases % 3 * MOE_GEMM_BLOCK
            capacity = align_capacity(ids.numel(), experts, MOE_GEMM_BLOCK) + surplus
            aligned = {key: before_guard(d, values)
                       for key, values in align_reference(ids, experts, MOE_GEMM_BLOCK, capacity).items()}  # fmt: skip
            num_padded = int(aligned["num_padded"])
            pairs = aligned["sorted_pairs"].long()
            there = pairs < ids.numel()
            # Rows that fill a block, rows past the end and experts without rows are NaN: none of it may spread.
            rows = torch.full((capacity, k), float("nan"), device=d.name, dtype=torch.bfloat16)
            rows[there] = d.randn(int(there.sum()), k).bfloat16()
            x = padded(d, rows)
            weight = padded(d, d.randn(experts, n, k).bfloat16())
            owner = aligned["block_expert"].long().repeat_interleave(MOE_GEMM_BLOCK)
            for expert in range(experts):
                if not (ids == expert).any():
                    weight[expert] = float("nan")
            whole = d.poison(capacity, n + 8)
            y = whole[:, :n]
            d.call("moe_gemm", gemm_params(x, weight, aligned, y, workspace))
            expected = torch.full((capacity, n), float("nan"), device=d.name, dtype=torch.float64)
            for expert in range(experts):
                mine = there & (owner == expert)
                expected[mine] = rows[mine].double() @ weight[expert].double().T
            # The tensor cores cut their sums off, which the emulator does not: a tenth of this is seen there.
            close(y, expected, 1e-5)
            assert whole[num_padded:].isnan().all() and whole[:, n:].isnan().all(), f"{name}: wrote outside its rows"
            # Other strides, other NaN, and the memory ends where the values end.
            rows[~there] = 0.0
            tight_x, tight_weight = before_guard(d, rows), before_guard(d, weight)
            tight_y = before_guard(d, d.poison(capacity, n))
            d.call("moe_gemm", gemm_params(tight_x, tight_weight, aligned, tight_y, workspace))
            assert torch.equal(tight_y[there], y[there]), f"{name}: other bits the second time, or with other strides"
            if there.any():
                check_row_alone(d, name, rows[int(there.nonzero()[-1])], weight, int(owner[there][-1]),
                                y[there][-1], workspace)  # fmt: skip
            if portable:
                check_against_small(d, name, ids, aligned, rows, weight, y)
            cases += 1
    return cases


def check_row_alone(d: Device, name: str, row: torch.Tensor, weight: torch.Tensor, expert: int, expected: torch.Tensor,
                    workspace: torch.Tensor | None) -> None:  # fmt: skip
    """The same bits where the row is its expert's first, and the only one of all."""
    ids = torch.tensor([[expert]], device=d.name, dtype=torch.int32)
    aligned = align_reference(ids, len(weight), MOE_GEMM_BLOCK, MOE_GEMM_BLOCK)
    x = torch.zeros(MOE_GEMM_BLOCK, len(row), device=d.name, dtype=torch.bfloat16)
    x[0] = row
    y = d.poison(MOE_GEMM_BLOCK, weight.shape[1])
    d.call("moe_gemm", gemm_params(x, weight, aligned, y, workspace))
    assert torch.equal(y[0], expected), f"{name}: a row's bits depend on the other rows"


def check_against_small(d: Device, name: str, ids: torch.Tensor, aligned: dict[str, torch.Tensor], rows: torch.Tensor,
                        weight: torch.Tensor, y: torch.Tensor) -> None:  # fmt: skip
    """The bits of moe_gemm_small."""
    pairs = aligned["sorted_pairs"].long()
    there = pairs < ids.numel()
    per_pair = torch.zeros(ids.numel(), rows.shape[1], device=d.name, dtype=torch.bfloat16)
    per_pair[pairs[there]] = rows[there]
    params, t = gemm_case(d, ids, per_pair, weight, torch.bfloat16, None)
    d.call("moe_gemm_small", params)
    assert torch.equal(t["y"][pairs[there]], y[there]), f"{name}: other bits than moe_gemm_small"
