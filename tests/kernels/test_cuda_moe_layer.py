"""program/cuda_moe.py: a whole mixture-of-experts block on the emulated kernels, against torch in fp64 and against the
blocks of HF transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

pytest.importorskip("torch")
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sapwood.errors import InvalidRequest
from sapwood.program.cuda_library import MOE_GROUP_MAX, MOE_SIGMOID, MOE_SOFTMAX, CudaLibrary
from sapwood.program.cuda_moe import SMALL_GEMM_ROWS, MoeConfig, MoeLayer, MoeWeights, MoeWorkspace

BASE = MoeConfig(num_experts=16, top_k=4, hidden=64, inner=24)
CONFIGS = {
    "softmax": dataclasses.replace(BASE, renormalise=False),
    "softmax, renormalised": BASE,
    "sigmoid with bias": dataclasses.replace(BASE, scoring=MOE_SIGMOID, scale=2.5),
    "sigmoid, top-2 groups": dataclasses.replace(BASE, scoring=MOE_SIGMOID, num_groups=4, topk_groups=2, scale=1.5),
    "softmax, best groups": dataclasses.replace(BASE, num_groups=8, topk_groups=3, group_score=MOE_GROUP_MAX,
                                                renormalise=False, scale=16.0),
    "two of eight": dataclasses.replace(BASE, num_experts=8, top_k=2, inner=136),
    "one expert": dataclasses.replace(BASE, num_experts=1, top_k=1),
}  # fmt: skip
# Of a row's length: what rounding to bfloat16 at four places (gate and up, their product, the experts' outputs) leaves.
# Seen: up to 7.9e-3, and 5.6e-3 on average over the rows of a case.
TOLERANCE, MEAN_TOLERANCE = 1.2e-2, 8e-3
MANY = 200  # more rows than moe_gemm_small takes, in every config


def make_weights(config: MoeConfig, seed: int = 0) -> MoeWeights:
    """Routers far from ties, outputs of about 1, biases that change choices."""
    g = torch.Generator().manual_seed(seed)
    experts, hidden, inner = config.num_experts, config.hidden, config.inner
    bias = torch.randn(experts, generator=g) * 0.2 if config.scoring == MOE_SIGMOID else None
    return MoeWeights(
        (torch.randn(experts, hidden, generator=g) * 2 / hidden**0.5).bfloat16(),
        (torch.randn(experts, 2 * inner, hidden, generator=g) / hidden**0.5).bfloat16(),
        (torch.randn(experts, hidden, inner, generator=g) * 2 / inner**0.5).bfloat16(),
        bias,
    )


def make_rows(config: MoeConfig, num_rows: int, seed: int = 1) -> Tensor:
    return torch.randn(num_rows, config.hidden, generator=torch.Generator().manual_seed(seed)).bfloat16()


def make_layer(library: CudaLibrary, config: MoeConfig, max_tokens: int, weights: MoeWeights | None = None,
               **options: Any) -> MoeLayer:  # fmt: skip
    """Its workspace is poisoned: NaN in all that is floating, and no valid index in the rest."""
    workspace = MoeWorkspace(config, max_tokens, library, torch.device("cpu"))
    for tensor in vars(workspace).values():
        if isinstance(tensor, Tensor):
            poison = 0xCD if tensor.dtype == torch.uint8 else -(2**30)
            tensor.fill_(float("nan") if tensor.is_floating_point() else poison)
    return MoeLayer(config, weights or make_weights(config), workspace, library, **options)


def run(layer: MoeLayer, x: Tensor, dtype: Any = torch.float32, shared: Tensor | None = None) -> Tensor:
    return layer.run(x, torch.full((len(x), layer.config.hidden), float("nan"), dtype=dtype), shared)


def choose(config: MoeConfig, scores: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """ids in order of choice, and for each token how far the choice is from another one."""
    value = scores if bias is None else scores + bias.double()
    margin = torch.full((len(scores),), torch.inf, dtype=torch.float64)

    def best(of: Tensor, count: int) -> Tensor:
        ordered = of.sort(1, descending=True)
        if count < of.shape[1]:
            margin.copy_(torch.minimum(margin, ordered.values[:, count - 1] - ordered.values[:, count]))
        return ordered.indices[:, :count]

    if config.num_groups > 1:
        grouped = value.view(len(value), config.num_groups, -1)
        of_group = grouped.amax(2) if config.group_score == MOE_GROUP_MAX else grouped.topk(2, 2).values.sum(2)
        out = torch.ones_like(of_group, dtype=torch.bool).scatter_(1, best(of_group, config.topk_groups), False)
        value = value.masked_fill(out.repeat_interleave(grouped.shape[2], 1), -torch.inf)
    return best(value, config.top_k), margin


def oracle(config: MoeConfig, weights: MoeWeights, x: Tensor) -> Tensor:
    """fp64 all through, every expert on every row; NaN in the rows of tokens whose choice is a near tie."""
    logits = x.double() @ weights.router.double().T
    scores = logits.softmax(1) if config.scoring == MOE_SOFTMAX else logits.sigmoid()
    ids, margin = choose(config, scores, weights.bias)
    factors = scores.gather(1, ids)
    if config.renormalise:
        factors = factors / factors.sum(1, keepdim=True)
    gate, up = torch.einsum("th,eih->tei", x.double(), weights.gate_up.double()).chunk(2, 2)
    outputs = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, weights.down.double())
    chosen = outputs.gather(1, ids[:, :, None].expand(-1, -1, config.hidden))
    y = (chosen * factors[:, :, None]).sum(1) * config.scale
    y[margin < 1e-5] = torch.nan
    return y


def check_close(got: Tensor, expected: Tensor) -> None:
    there = ~expected.isnan().any(1)
    assert there.sum() >= len(expected) - 1, "an unlucky seed: too many near ties"
    error = (got.double() - expected)[there].norm(dim=1) / expected[there].norm(dim=1)
    assert error.max() < TOLERANCE and error.mean() < MEAN_TOLERANCE


# --- Against fp64 -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_rows", [1, 7, SMALL_GEMM_ROWS + 1, MANY])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_block_against_fp64(emulated: CudaLibrary, name: str, num_rows: int) -> None:
    config = CONFIGS[name]
    assert config.is_small(num_rows) == (num_rows <= SMALL_GEMM_ROWS or (num_rows < MANY and config.num_experts > 4))
    layer, x = make_layer(emulated, config, num_rows), make_rows(config, num_rows)
    y = run(layer, x)
    check_close(y, oracle(config, make_weights(config), x))
    assert torch.equal(run(layer, x), y), "other bits the second time"
    assert torch.equal(run(layer, x, torch.bfloat16), y.bfloat16())


def test_what_is_shared_is_added_last(emulated: CudaLibrary) -> None:
    for num_rows in (3, MANY):
        layer, x = make_layer(emulated, BASE, num_rows), make_rows(BASE, num_rows)
        shared = torch.randn(num_rows, BASE.hidden, generator=torch.Generator().manual_seed(2))
        expected = run(layer, x) + shared
        assert torch.equal(run(layer, x, shared=shared), expected)
        assert layer.run(x, shared, shared) is shared and torch.equal(shared, expected)


def test_rows_that_are_wider_than_the_block(emulated: CudaLibrary) -> None:
    for num_rows in (3, MANY):
        layer, x = make_layer(emulated, BASE, num_rows), make_rows(BASE, num_rows)
        wide = torch.full((num_rows, BASE.hidden + 8), float("nan"), dtype=torch.bfloat16)
        wide[:, : BASE.hidden] = x
        out = torch.full((num_rows, BASE.hidden + 3), float("nan"))
        layer.run(wide[:, : BASE.hidden], out[:, : BASE.hidden])
        assert torch.equal(out[:, : BASE.hidden], run(layer, x)) and out[:, BASE.hidden :].isnan().all()


# --- A row's bits -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_rows", [SMALL_GEMM_ROWS, 60, MANY])
def test_order_of_tokens_does_not_matter(emulated: CudaLibrary, num_rows: int) -> None:
    layer, x = make_layer(emulated, BASE, num_rows), make_rows(BASE, num_rows)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(3))
    logits = layer.router_logits(x).clone()
    y = layer.run_experts(x, logits, torch.empty(num_rows, BASE.hidden)).clone()
    assert torch.equal(layer.run_experts(x[order], logits[order], torch.empty_like(y)), y[order])


def test_a_row_alone_and_among_others(emulated: CudaLibrary) -> None:
    """From few rows to many, where moe_gemm's portable tier runs: always the same bits."""
    config = CONFIGS["sigmoid with bias"]
    layer, x = make_layer(emulated, config, MANY, portable=True), make_rows(config, MANY)
    logits = layer.router_logits(x).clone()
    together = layer.run_experts(x, logits, torch.empty(MANY, config.hidden)).clone()
    for rows in (slice(0, 1), slice(MANY - 1, MANY), slice(5, 9), slice(20, 84), slice(3, 103)):
        alone = torch.full((rows.stop - rows.start, config.hidden), float("nan"))
        assert torch.equal(layer.run_experts(x[rows], logits[rows], alone), together[rows])


def test_few_and_many_rows_agree(emulated: CudaLibrary) -> None:
    """All of it, the router's two products included, on both sides of the limit."""
    limit = 16 * BASE.num_experts // BASE.top_k
    assert BASE.is_small(limit) and not BASE.is_small(limit + 1)
    layer, x = make_layer(emulated, BASE, limit + 1), make_rows(BASE, limit + 1)
    few, many = run(layer, x[:limit]), run(layer, x)
    expected = oracle(BASE, make_weights(BASE), x)
    check_close(few, expected[:limit])
    check_close(many, expected)
    check_close(many[:limit], few.double())


def test_one_expert_gets_all_and_others_nothing(emulated: CudaLibrary) -> None:
    """Experts without rows are not read."""
    weights = make_weights(BASE)
    for expert in range(BASE.num_experts):
        if expert not in (2, 3, 5, 15):
            weights.gate_up[expert] = torch.nan
            weights.down[expert] = torch.nan
    for num_rows in (9, MANY):
        layer, x = make_layer(emulated, BASE, num_rows, weights), make_rows(BASE, num_rows)
        logits = torch.zeros(num_rows, BASE.num_experts)
        logits[:, [2, 3, 5, 15]] = torch.tensor([12.0, 11.0, 10.0, 9.0])
        y = layer.run_experts(x, logits, torch.full((num_rows, BASE.hidden), float("nan")))
        ids, factors = [2, 3, 5, 15], torch.tensor([12.0, 11.0, 10.0, 9.0]).double().softmax(0)
        gate, up = torch.einsum("th,eih->tei", x.double(), weights.gate_up[ids].double()).chunk(2, 2)
        outputs = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, weights.down[ids].double())
        check_close(y, torch.einsum("teh,e->th", outputs, factors))


# --- Against transformers -----------------------------------------------------------------------------------------
def fill(block: Any, weights: MoeWeights) -> Any:
    """The block's parameters are ours, as float32."""
    with torch.no_grad():
        block.gate.weight.copy_(weights.router.float())
        block.experts.gate_up_proj.copy_(weights.gate_up.float())
        block.experts.down_proj.copy_(weights.down.float())
    return block.eval()


def hf_block(name: str, config: MoeConfig) -> Any:
    common: dict[str, Any] = dict(hidden_size=config.hidden, num_experts_per_tok=config.top_k, num_hidden_layers=1)
    if name == "mixtral":
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as block

        return block(MixtralConfig(intermediate_size=config.inner, num_local_experts=config.num_experts, **common))
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as block

    return block(Qwen3MoeConfig(moe_intermediate_size=config.inner, num_experts=config.num_experts,
                                norm_topk_prob=config.renormalise, **common))  # fmt: skip


@pytest.mark.parametrize("num_rows", [5, MANY])
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe, not renormalised", "mixtral"])
def test_a_block_against_transformers(emulated: CudaLibrary, name: str, num_rows: int) -> None:
    pytest.importorskip("transformers")
    config = CONFIGS["two of eight" if name == "mixtral" else "softmax" if "not" in name else "softmax, renormalised"]
    weights, x = make_weights(config), make_rows(config, num_rows)
    with torch.no_grad():
        expected = fill(hf_block(name, config), weights)(x.float()[None])[0].double()
    check_close(run(make_layer(emulated, config, num_rows), x), expected)


# --- What a graph can capture, memory, refusals --------------------------------------------------------------------
class Ops(TorchDispatchMode):
    """The names of torch's ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_block_takes_no_memory_and_reads_nothing_back(emulated: CudaLibrary) -> None:
    for num_rows in (SMALL_GEMM_ROWS, MANY):
        layer, x = make_layer(emulated, BASE, num_rows), make_rows(BASE, num_rows)
        y, logits = torch.empty(num_rows, BASE.hidden), layer.router_logits(x).clone()
        with Ops() as ops:
            if num_rows <= SMALL_GEMM_ROWS:
                layer.run(x, y)
            else:  # the router's product is torch's
                layer.run_experts(x, logits, y)
        assert ops.seen == {"slice"}  # views


def test_a_workspace_serves_every_smaller_number_of_rows(emulated: CudaLibrary) -> None:
    layer, x = make_layer(emulated, BASE, MANY), make_rows(BASE, MANY)
    for num_rows in (0, 1, 64, 65, 100, MANY):
        alone = run(make_layer(emulated, BASE, num_rows), x[:num_rows])
        assert torch.equal(run(layer, x[:num_rows]), alone)


def test_what_does_not_fit_is_refused(emulated: CudaLibrary) -> None:
    layer = make_layer(emulated, BASE, 4)
    with pytest.raises(InvalidRequest, match="at most the 4 rows that the workspace was made for, got 5"):
        run(layer, make_rows(BASE, 5))
    weights = make_weights(BASE)
    for changes, said in (
        ({"router": weights.router.float()}, r"router must be contiguous torch.bfloat16 \[16, 64\], got torch.float32"),
        ({"gate_up": weights.gate_up[:, :24]}, r"gate_up must be contiguous torch.bfloat16 \[16, 48, 64\]"),
        ({"down": weights.down.transpose(1, 2)}, r"down must be contiguous torch.bfloat16 \[16, 64, 24\]"),
        ({"bias": torch.zeros(15)}, r"bias must be contiguous torch.float32 \[16\], got torch.float32 \[15\]"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest, match=said):
            make_layer(emulated, BASE, 4, dataclasses.replace(weights, **changes))
    odd = dataclasses.replace(BASE, inner=20)
    with pytest.raises(InvalidRequest, match="multiples of 8, this model has hidden = 64 and inner = 20"):
        make_layer(emulated, odd, 4)
