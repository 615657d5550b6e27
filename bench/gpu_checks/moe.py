"""Mixture of experts: routing, the sort of pairs by expert, the grouped GEMM of decode, the sum of a token's rows."""

from __future__ import annotations

from typing import Any, Final

import torch

from gpu_checks.device import Device
from gpu_checks.guard import before_guard
from sapwood.program.cuda_library import (
    BF16,
    F32,
    MOE_GROUP_MAX,
    MOE_GROUP_TOP2,
    MOE_SIGMOID,
    MOE_SOFTMAX,
    MoeAlignParams,
    MoeCombineParams,
    MoeGemmSmallParams,
    MoeRouteParams,
)

CANARY: Final = -77
GUARD: Final = 64  # elements on both sides of an output


def dtype_of(x: torch.Tensor) -> int:
    return F32 if x.dtype == torch.float32 else BF16


class Guarded:
    """A tensor of i32 or f32 between canaries, and itself canaries to begin with."""

    def __init__(self, d: Device, *shape: int, dtype: torch.dtype = torch.int32) -> None:
        size = torch.Size(shape).numel()
        self.whole = torch.full((size + 2 * GUARD,), CANARY, device=d.name, dtype=dtype)
        self.inside = self.whole[GUARD : GUARD + size].view(shape)

    def check(self, name: str) -> None:
        whole = torch.cat((self.whole[:GUARD], self.whole[GUARD + self.inside.numel() :]))
        assert (whole == CANARY).all(), f"wrote outside {name}"


def padded(d: Device, x: torch.Tensor, columns: int = 8) -> torch.Tensor:
    """x with `columns` of NaN after each row."""
    whole = torch.full((*x.shape[:-1], x.shape[-1] + columns), float("nan"), device=d.name, dtype=x.dtype)
    whole[..., : x.shape[-1]] = x
    return whole[..., : x.shape[-1]]


# --- Routing --------------------------------------------------------------------------------------------------
def call_route(d: Device, logits: torch.Tensor, bias: torch.Tensor | None, top_k: int,
               **fields: Any) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """ids and weights, [tokens, top_k]."""
    tokens, experts = logits.shape
    ids, weights = Guarded(d, tokens, top_k), Guarded(d, tokens, top_k, dtype=torch.float32)
    d.call("moe_route", MoeRouteParams(
        logits_dtype=dtype_of(logits), logits=logits.data_ptr(), logits_stride=logits.stride(0),
        bias=None if bias is None else bias.data_ptr(), ids=ids.inside.data_ptr(),
        weights=weights.inside.data_ptr(), num_tokens=tokens, num_experts=experts, top_k=top_k, **fields,
    ))  # fmt: skip
    ids.check("ids")
    weights.check("weights")
    return ids.inside, weights.inside


def best(value: torch.Tensor, allowed: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the `count` best allowed columns, ties to the lowest; and whether 1e-6 could change them."""
    order = value.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, allowed.gather(1, order).int().argsort(dim=1, descending=True, stable=True))
    ranked = value.gather(1, order).masked_fill(~allowed.gather(1, order), -torch.inf)
    upper, lower = ranked[:, :-1], ranked[:, 1:]
    near = (upper != lower) & (upper - lower < 1e-6 * upper.abs().clamp(min=1e-30))
    return order[:, :count], near[:, :count].any(1)


def route_reference(logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, scoring: int, num_groups: int,
                    topk_groups: int, group_score: int, renormalise: int, scale: float,
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """fp64: ids, weights, and for which tokens f32 may choose otherwise."""
    x = logits.double()
    score = x.softmax(1) if scoring == MOE_SOFTMAX else x.sigmoid()
    choice = score if bias is None else score + bias.double()
    choice = choice.masked_fill(choice.isnan(), -torch.inf)
    allowed = torch.ones_like(choice, dtype=torch.bool)
    unsure = torch.zeros(len(x), device=x.device, dtype=torch.bool)
    if num_groups > 1:
        grouped = choice.view(len(x), num_groups, -1)
        top = grouped.topk(2 if group_score == MOE_GROUP_TOP2 else 1, 2).values.sum(2)
        groups, unsure = best(top, torch.ones_like(top, dtype=torch.bool), topk_groups)
        chosen = torch.zeros_like(top, dtype=torch.bool).scatter_(1, groups, True)
        allowed = chosen.repeat_interleave(choice.shape[1] // num_groups, 1)
    ids, near = best(choice, allowed, top_k)
    weights = score.gather(1, ids)
    if renormalise:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return ids, weights * scale, unsure | near


def check_moe_route(d: Device) -> int:
    """Sizes, types, scores, groups, biases, ties, NaN; returns the number of cases. AssertionError where one fails."""
    cases = 0
    # experts, top_k, num_groups, topk_groups, group_score
    layouts = (
        (1, 1, 1, 1, MOE_GROUP_MAX), (8, 1, 1, 1, MOE_GROUP_MAX), (8, 2, 1, 1, MOE_GROUP_TOP2),
        (8, 8, 1, 1, MOE_GROUP_MAX), (33, 5, 1, 1, MOE_GROUP_MAX), (60, 8, 6, 3, MOE_GROUP_TOP2),
        (60, 2, 1, 1, MOE_GROUP_MAX), (128, 8, 1, 1, MOE_GROUP_MAX), (128, 8, 8, 4, MOE_GROUP_MAX),
        (160, 6, 8, 3, MOE_GROUP_MAX), (256, 8, 8, 4, MOE_GROUP_TOP2), (32, 4, 32, 8, MOE_GROUP_MAX),
        (512, 1, 1, 1, MOE_GROUP_MAX), (512, 32, 1, 1, MOE_GROUP_MAX), (512, 8, 2, 1, MOE_GROUP_TOP2),
    )  # fmt: skip
    for experts, top_k, num_groups, topk_groups, group_score in layouts:
        for dtype, scoring in ((torch.float32, MOE_SOFTMAX), (torch.float32, MOE_SIGMOID),
                               (torch.bfloat16, MOE_SOFTMAX), (torch.bfloat16, MOE_SIGMOID)):  # fmt: skip
            tokens = (64, 7, 1)[cases % 3]
            fields: dict[str, Any] = dict(scoring=scoring, num_groups=num_groups, topk_groups=topk_groups,
                                          group_score=group_score, renormalise=cases // 2 % 2,
                                          scale=(1.0, 2.5)[cases % 2])  # fmt: skip
            x = d.randn(tokens, experts) * 2
            if dtype == torch.bfloat16 and tokens > 1:
                x = x.round()  # ties everywhere
            elif tokens > 6:
                x[0] = 0.0  # all equal
                x[1, experts // 2] = float("nan")
                x[2] = float("nan")
                x[3, -1] = float("inf")
                x[4] = -float("inf")
                x[5, : experts // 2 + 1] = -float("inf")
                x[6, : experts // 2] = -torch.tensor(float("nan"))  # of the other sign
            logits = padded(d, x.to(dtype), 3)
            bias = padded(d, d.randn(experts) * 0.3) if cases % 4 == 1 or group_score == MOE_GROUP_TOP2 else None
            ids, weights = call_route(d, logits, bias, top_k, **fields)
            expected_ids, expected, unsure = route_reference(logits, bias, top_k, **fields)
            assert unsure.sum() <= 1 + tokens // 16, "an unlucky seed: too many near ties"
            assert torch.equal(ids[~unsure], expected_ids[~unsure].int()), "other experts than the reference"
            ordered = ids.sort(1).values
            assert (ordered >= 0).all() and (ordered < experts).all() and (ordered.diff(dim=1) > 0).all()
            torch.testing.assert_close(
                weights[~unsure].double(), expected[~unsure], rtol=1e-6, atol=1e-12, equal_nan=True
            )
            again = call_route(d, logits, bias, top_k, **fields)
            tight_bias = None if bias is None else before_guard(d, bias)
            alone = call_route(d, before_guard(d, logits[-1:]), tight_bias, top_k, **fields)
            for first, second in ((again, (ids, weights)), (alone, (ids[-1:], weights[-1:]))):
                assert torch.equal(first[0], second[0]), "other experts the second time, or alone"
                assert torch.equal(first[1].view(torch.int32), second[1].view(torch.int32)), "other bits of a weight"
            cases += 1
    call_route(d, d.randn(0, 8), None, 2, num_groups=1, topk_groups=1)
    return cases + 1


# --- The sort by expert -----------------------------------------------------------------------------------------
def align_capacity(num_pairs: int, num_experts: int, block: int) -> int:
    """The least capacity that every routing fits in."""
    most = num_pairs + min(num_experts, num_pairs) * (block - 1)
    return (most + block - 1) // block * block


def align_reference(ids: torch.Tensor, num_experts: int, block: int, capacity: int) -> dict[str, torch.Tensor]:
    """sorted_pairs, block_expert, expert_offsets, num_padded on ids' device."""
    pairs: list[int] = []
    owners: list[int] = []
    offsets = [0]
    flat = ids.flatten().cpu()
    for expert in range(num_experts):
        pairs += (flat == expert).nonzero().flatten().tolist()
        pairs += [len(flat)] * (-len(pairs) % block)
        owners += [expert] * ((len(pairs) - offsets[-1]) // block)
        offsets.append(len(pairs))
    lists = {
        "sorted_pairs": pairs + [len(flat)] * (capacity - len(pairs)),
        "block_expert": owners + [-1] * (capacity // block - len(owners)),
        "expert_offsets": offsets,
        "num_padded": offsets[-1:],
    }
    return {name: torch.tensor(values, dtype=torch.int32, device=ids.device) for name, values in lists.items()}


def call_align(d: Device, ids: torch.Tensor, num_experts: int, block: int, capacity: int) -> dict[str, torch.Tensor]:
    outputs = {
        "sorted_pairs": Guarded(d, capacity),
        "block_expert": Guarded(d, capacity // block),
        "expert_offsets": Guarded(d, num_experts + 1),
        "num_padded": Guarded(d, 1),
    }
    pointers = {name: output.inside.data_ptr() for name, output in outputs.items()}
    d.call("moe_align", MoeAlignParams(num_pairs=ids.numel(), ids=ids.data_ptr(), num_experts=num_experts, block=block,
                                       capacity=capacity, **pointers))  # fmt: skip
    for name, output in outputs.items():
        output.check(name)
    return {name: output.inside for name, output in outputs.items()}


def random_ids(d: Device, tokens: int, top_k: int, num_experts: int) -> torch.Tensor:
    """As a router chooses: the ids of a token differ."""
    return d.randn(tokens, num_experts).argsort(1)[:, :top_k].int().contiguous()


def check_moe_align(d: Device) -> int:
    """Sizes, blocks and routings; returns the number of cases. AssertionError where one fails."""
    cases = 0
    shapes = (
        (0, 2, 8, 16), (1, 1, 8, 16), (1, 8, 128, 16), (7, 2, 60, 64), (64, 8, 128, 16), (64, 1, 8, 128),
        (64, 2, 3, 1), (511, 1, 1, 5), (700, 8, 10, 128), (7, 8, 520, 16),
    )  # fmt: skip
    for tokens, top_k, experts, block in shapes:
        for routing in ("random", "one", "dropped") if experts < 100 else ("random",):  # the emulator takes its time
            ids = random_ids(d, tokens, top_k, max(experts, top_k))
            if routing == "one":
                ids[:] = experts - 1 if cases % 2 else 0
            elif routing == "dropped":
                ids[::2] = -1
                if ids.numel() > 0:
                    ids[-1, 0] = experts
                    ids[0, -1] = 2**31 - 1
            least = align_capacity(ids.numel(), experts, block)
            capacity = least + (cases % 3) * block
            expected = align_reference(ids, experts, block, capacity)
            if ids.numel() > 0:
                ids = before_guard(d, ids)
            for _ in range(2 if experts < 60 else 1):
                got = call_align(d, ids, experts, block, capacity)
                for name, values in expected.items():
                    assert torch.equal(got[name], values), f"{name} of {tokens} x {top_k}, {experts} experts: {routing}"
            cases += 1
    return cases


# --- The grouped GEMM of decode ---------------------------------------------------------------------------------
GEMM_BLOCK: Final = 16


def gemm_case(d: Device, ids: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype,
              pair_weight: torch.Tensor | None, surplus: int = 2,
              ) -> tuple[MoeGemmSmallParams, dict[str, Any]]:  # fmt: skip
    """Every pair's row of x by its expert of weight [E, n, k]; y is NaN, and 3 columns of NaN follow it."""
    experts, n, k = weight.shape
    capacity = align_capacity(ids.numel(), experts, GEMM_BLOCK) + surplus * GEMM_BLOCK
    t: dict[str, Any] = align_reference(ids, experts, GEMM_BLOCK, capacity)
    # A block past the end that does not leave would write pair 0.
    t["sorted_pairs"][int(t["num_padded"]) :] = 0
    t["block_expert"][int(t["num_padded"]) // GEMM_BLOCK :] = 0
    t = {name: before_guard(d, values) for name, values in t.items()}
    t |= {"x": x, "weight": weight, "pair_weight": pair_weight}
    t["whole"] = d.poison(ids.numel(), n + 3, dtype=dtype)
    t["y"] = t["whole"][:, :n]
    params = MoeGemmSmallParams(
        y_dtype=dtype_of(t["y"]), x=x.data_ptr(), x_stride=x.stride(0), weight=weight.data_ptr(),
        expert_stride=weight.stride(0), weight_stride=weight.stride(1), sorted_pairs=t["sorted_pairs"].data_ptr(),
        block_expert=t["block_expert"].data_ptr(), num_padded=t["num_padded"].data_ptr(),
        pair_weight=None if pair_weight is None else pair_weight.data_ptr(), y=t["y"].data_ptr(),
        y_stride=t["y"].stride(0), num_pairs=ids.numel(), pairs_per_row=ids.numel() // x.shape[0], capacity=capacity,
        n=n, k=k,
    )  # fmt: skip
    return params, t


def gemm_reference(ids: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, pair_weight: torch.Tensor | None,
                   ) -> torch.Tensor:  # fmt: skip
    """fp64; NaN in the rows of pairs that no expert has."""
    flat = ids.flatten().long()
    rows = torch.arange(len(flat), device=x.device) // (len(flat) // len(x))
    y = torch.full((len(flat), weight.shape[1]), float("nan"), device=x.device, dtype=torch.float64)
    for expert in range(len(weight)):
        mine = flat == expert
        y[mine] = x[rows[mine]].double() @ weight[expert].double().T
    return y if pair_weight is None else y * pair_weight.double()[:, None]


def close(got: torch.Tensor, expected: torch.Tensor, f32_error: float) -> None:
    """f32_error: of sums in f32, as a part of the root mean square of all values. bf16: and one rounding."""
    there = ~expected.isnan()
    assert torch.equal(~got.isnan(), there), "a row is missing, or one is there that should not be"
    rms = expected[there].square().mean().sqrt().item() if there.any() else 0.0
    rtol = 1e-6 if got.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(got[there].double(), expected[there], rtol=rtol, atol=f32_error * rms)


def check_moe_gemm_small(d: Device) -> int:
    """Sizes, tails, routings, types; returns the number of cases. AssertionError where one fails."""
    cases = 0
    # tokens, top_k, experts, n, k
    shapes = (
        (1, 8, 60, 64, 64), (1, 1, 1, 1, 8), (7, 2, 8, 100, 72), (64, 2, 8, 70, 328), (17, 1, 2, 65, 1024),
        (5, 8, 128, 16, 392), (33, 4, 5, 72, 384),
    )  # fmt: skip
    for tokens, top_k, experts, n, k in shapes:
        for routing in ("random", "one", "dropped"):
            dtype = torch.float32 if cases % 2 else torch.bfloat16
            per_pair = cases % 3 == 1  # the down GEMM: a row of x and a weight per pair
            ids = random_ids(d, tokens, top_k, experts)
            if routing == "one":
                ids[:] = experts - 1
            elif routing == "dropped":
                ids[::3] = -1
                ids[-1, -1] = experts
            x = padded(d, d.randn(tokens * top_k if per_pair else tokens, k).bfloat16())
            weight = padded(d, d.randn(experts, n, k).bfloat16())
            pair_weight = d.randn(ids.numel()) if per_pair else None
            # What no pair refers to must not be read.
            for expert in range(experts):
                if not (ids == expert).any():
                    weight[expert] = float("nan")
            kept = ((ids >= 0) & (ids < experts)).flatten()
            rows = kept if per_pair else kept.view(tokens, top_k).any(1)
            x[~rows] = float("nan")
            if pair_weight is not None:
                pair_weight[~kept] = float("nan")
            params, t = gemm_case(d, ids, x, weight, dtype, pair_weight)
            d.call("moe_gemm_small", params)
            assert t["whole"][:, n:].isnan().all(), "moe_gemm_small wrote outside its rows"
            # The tensor cores cut their sums off, which the emulator does not: a tenth of this is seen there.
            close(t["y"], gemm_reference(ids, x, weight, pair_weight), 1e-5)
            if pair_weight is not None:
                pair_weight = before_guard(d, pair_weight)
            x, weight = before_guard(d, x), before_guard(d, weight)
            again, u = gemm_case(d, ids, x, weight, dtype, pair_weight, 0)
            d.call("moe_gemm_small", again)
            assert torch.equal(t["y"][kept], u["y"][kept]), "other bits the second time, or with other strides"
            if kept.any():
                pair = int(kept.nonzero()[-1])
                only = torch.full_like(ids, -1).flatten()
                only[pair] = ids.flatten()[pair]
                alone, u = gemm_case(d, only.view_as(ids), x, weight, dtype, pair_weight)
                d.call("moe_gemm_small", alone)
                assert torch.equal(t["y"][pair], u["y"][pair]), "a pair's bits depend on the other pairs"
            cases += 1
    return cases


# --- The sum of a token's experts ---------------------------------------------------------------------------------
def combine_params(z: torch.Tensor, weights: torch.Tensor | None, ids: torch.Tensor | None,
                   shared: torch.Tensor | None, y: torch.Tensor, num_experts: int,
                   places: torch.Tensor | None = None, top_k: int | None = None) -> MoeCombineParams:  # fmt: skip
    """top_k: where z has not one row for each pair."""
    return MoeCombineParams(
        z_dtype=dtype_of(z), z=z.data_ptr(), z_stride=z.stride(0), y_dtype=dtype_of(y), y=y.data_ptr(),
        y_stride=y.stride(0), weights=None if weights is None else weights.data_ptr(),
        ids=None if ids is None else ids.data_ptr(), shared=None if shared is None else shared.data_ptr(),
        shared_stride=0 if shared is None else shared.stride(0),
        shared_dtype=BF16 if shared is None else dtype_of(shared),
        num_tokens=y.shape[0], top_k=top_k or z.shape[0] // max(y.shape[0], 1), hidden=y.shape[1],
        num_experts=num_experts, places=None if places is None else places.data_ptr(),
    )  # fmt: skip


def check_layer(d: Device) -> None:
    """Route, align, gate-up, down, combine as a model calls them, against every expert on every token."""
    tokens, top_k, experts, hidden, inner = 21, 3, 7, 64, 24
    x = d.randn(tokens, hidden).bfloat16()
    up = (d.randn(experts, inner, hidden) / 8).bfloat16()
    down = (d.randn(experts, hidden, inner) / 5).bfloat16()
    ids, weights = call_route(d, d.randn(tokens, experts), None, top_k, scoring=MOE_SOFTMAX, num_groups=1,
                              topk_groups=1, renormalise=1, scale=1.0)  # fmt: skip
    capacity = align_capacity(ids.numel(), experts, GEMM_BLOCK)
    aligned = call_align(d, ids, experts, GEMM_BLOCK, capacity)
    params, t = gemm_case(d, ids, x, up, torch.bfloat16, None, 0)
    for name, values in aligned.items():
        if hasattr(params, name):
            setattr(params, name, values.data_ptr())
    d.call("moe_gemm_small", params)
    inner_rows = t["y"].float().relu().bfloat16()
    params, t = gemm_case(d, ids, inner_rows, down, torch.float32, None, 0)
    d.call("moe_gemm_small", params)
    y = d.poison(tokens, hidden)
    d.call("moe_combine", combine_params(t["y"], weights, ids, None, y, experts))
    inside = torch.einsum("th,eih->tei", x.double(), up.double()).bfloat16().double().relu()
    dense = torch.einsum("tei,ehi->teh", inside, down.double())
    chosen = dense[torch.arange(tokens, device=d.name)[:, None], ids.long()]
    close(y, (chosen * weights.double()[..., None]).sum(1), 2e-3)


def check_moe_combine(d: Device) -> int:
    """Types, sizes, alignment, dropped slots; returns the number of cases. AssertionError where one fails."""
    cases = 0
    types = (torch.bfloat16, torch.float32)
    for tokens, top_k, hidden in ((1, 1, 1), (1, 8, 4096), (7, 2, 1027), (64, 8, 64), (3, 9, 2048), (2, 17, 30)):
        for z_type in types:
            for variant in range(4):
                y_type, shared_type = types[variant % 2], types[variant // 2]
                offset = variant % 3  # 0 and 2: rows begin at multiples of four elements or not
                whole = d.poison(tokens * top_k, hidden + 8, dtype=z_type)
                whole[:, offset : offset + hidden] = (d.randn(tokens * top_k, hidden) * 3).to(z_type)
                z = whole[:, offset : offset + hidden]
                weights = d.randn(tokens, top_k) if variant != 1 else None
                ids = random_ids(d, tokens, top_k, 64) if variant != 2 else None
                kept = torch.ones(tokens, top_k, device=d.name, dtype=torch.bool)
                if ids is not None and variant == 3:
                    ids[-1] = -1
                    ids[0, 0] = 64
                    kept = (ids >= 0) & (ids < 64)
                    z[~kept.flatten()] = float("nan")
                    if weights is not None:
                        weights[~kept] = float("nan")
                shared = padded(d, d.randn(tokens, hidden).to(shared_type), 12) if variant != 0 else None
                out = d.poison(tokens, hidden + 8, dtype=y_type)
                y = out[:, offset : offset + hidden]
                d.call("moe_combine", combine_params(z, weights, ids, shared, y, 64))
                terms = z.double().view(tokens, top_k, hidden)
                if weights is not None:
                    terms = terms * weights.double()[..., None]
                expected = terms.masked_fill(~kept[..., None], 0.0).sum(1)
                if shared is not None:
                    expected = expected + shared.double()
                close(y, expected, 1e-6)
                outside = torch.cat((out[:, :offset], out[:, offset + hidden :]), 1)
                assert outside.isnan().all(), "moe_combine wrote outside its rows"
                one_z, alone = before_guard(d, z[-top_k:]), before_guard(d, d.poison(1, hidden, dtype=y_type))
                one_weights, one_ids, one_shared = (
                    None if every is None else before_guard(d, every[-1:]) for every in (weights, ids, shared)
                )
                d.call("moe_combine", combine_params(one_z, one_weights, one_ids, one_shared, alone, 64))
                assert torch.equal(alone[0], y[-1]), "a token's bits depend on the other tokens or on alignment"
                # The same rows in another order, among rows that nobody has; no place where no expert is.
                order = d.randn(2 * tokens * top_k).argsort()[: tokens * top_k].int()
                scattered = torch.full((2 * tokens * top_k, hidden + 4), float("nan"), device=d.name, dtype=z_type)
                scattered[order.long(), :hidden] = z
                places = order.view(tokens, top_k).masked_fill(~kept, 2**31 - 1).contiguous()
                again = d.poison(tokens, hidden, dtype=y_type)
                d.call("moe_combine", combine_params(scattered[:, :hidden], weights, ids, shared, again, 64, places,
                                                     top_k))  # fmt: skip
                assert torch.equal(again, y), "with places it is another result"
                if shared is not None and shared_type == y_type:
                    d.call("moe_combine", combine_params(z, weights, ids, shared, shared, 64))
                    assert torch.equal(shared, y), "in place it is another result"
                cases += 1
    check_layer(d)
    nothing = d.poison(0, 8)
    d.call("moe_combine", combine_params(d.poison(1, 8), None, None, None, nothing, 1))
    return cases + 2
