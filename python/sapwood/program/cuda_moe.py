"""A mixture-of-experts block on a device: what stands in the place of a decoder layer's gate_up and down.

Receives the normalised rows of a layer and hands back the sum of their experts' outputs; a shared expert is the
caller's, who may pass its output to be added. Router logits are a product, float32; moe_route chooses the experts,
moe_align sorts (token, slot) pairs by expert, two grouped products with silu_mul between them are the experts,
moe_combine sums a token's slots. How the products run follows from the number of rows alone:

few rows    up to SMALL_PAIRS pairs an expert on average: reading the weights is the work. moe_gemm_small reads rows of
            x through the sorted list and leaves rows in the order of pairs
many rows   multiplying is. moe_gather brings rows into the order of the list, moe_gemm multiplies whole segments,
            silu_mul takes what lies between them along, and moe_combine finds a pair's row by its place

Nothing here reads what the device computes and all memory is taken beforehand (MoeWorkspace), so a block can be
captured into a CUDA graph, one for each number of rows.

A token's row depends on that row alone as long as the number of rows stays on the same side of both limits. Across
SMALL_PAIRS it still does where moe_gemm runs its portable tier, whose sums are those of moe_gemm_small.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from sapwood.errors import InvalidRequest, MissingExtra
from sapwood.program.cuda_library import (
    BF16,
    F32,
    MOE_GEMM_BLOCK,
    MOE_GROUP_TOP2,
    MOE_SMALL_BLOCK,
    MOE_SOFTMAX,
    SILU,
    CudaLibrary,
    MoeAlignParams,
    MoeCombineParams,
    MoeGatherParams,
    MoeGemmParams,
    MoeGemmSmallParams,
    MoeRouteParams,
    Params,
    SiluMulParams,
    SmallGemmParams,
)

try:
    import torch
except ImportError:
    raise MissingExtra("device 'cuda' needs torch: pip install 'sapwood[cuda]'") from None

# Pairs an expert, on average, that moe_gemm_small still takes: one of its blocks, so that a weight is read about once.
SMALL_PAIRS: Final = MOE_SMALL_BLOCK
SMALL_GEMM_ROWS: Final = 16  # of the router's product; more are torch's
WORKSPACE_BYTES: Final = 256  # at least: a tensor without elements has no address


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Sizes of a block, and how it chooses experts (cuda/moe/params.h, moe_route)."""

    num_experts: int
    top_k: int
    hidden: int
    inner: int  # of one expert
    scoring: int = MOE_SOFTMAX
    renormalise: bool = True
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: int = MOE_GROUP_TOP2

    def is_small(self, num_tokens: int) -> bool:
        """Whether moe_gemm_small takes this many rows."""
        return num_tokens * self.top_k <= SMALL_PAIRS * self.num_experts

    def block(self, num_tokens: int) -> int:
        """Of moe_align."""
        return MOE_SMALL_BLOCK if self.is_small(num_tokens) else MOE_GEMM_BLOCK

    def capacity(self, num_tokens: int) -> int:
        """The length of the sorted list that every routing of this many tokens fits in."""
        block, num_pairs = self.block(num_tokens), num_tokens * self.top_k
        return -(-(num_pairs + min(self.num_experts, num_pairs) * (block - 1)) // block) * block

    def num_rows(self, num_tokens: int) -> int:
        """Of the products' outputs."""
        return num_tokens * self.top_k if self.is_small(num_tokens) else self.capacity(num_tokens)


@dataclasses.dataclass(frozen=True)
class MoeWeights:
    """Of one block, on the device, contiguous. gate_up has an expert's gate rows first, then its up rows."""

    router: torch.Tensor  # bfloat16 [num_experts, hidden]
    gate_up: torch.Tensor  # bfloat16 [num_experts, 2 * inner, hidden]
    down: torch.Tensor  # bfloat16 [num_experts, hidden, inner]
    bias: torch.Tensor | None = None  # float32 [num_experts]: added for the choice alone


class MoeWorkspace:
    """All that a block of up to max_tokens rows writes on its way. The blocks of a model take turns with one."""

    def __init__(self, config: MoeConfig, max_tokens: int, library: CudaLibrary, device: torch.device) -> None:
        self.config = config
        self.max_tokens = max_tokens
        last_small = min(max_tokens, SMALL_PAIRS * config.num_experts // config.top_k)
        sizes = (last_small, max_tokens)
        rows = max(map(config.num_rows, sizes))
        capacity = max(map(config.capacity, sizes))
        blocks = max(config.capacity(size) // config.block(size) for size in sizes)

        def ints(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        def bf16(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16, device=device)

        self.logits = torch.empty(max_tokens, config.num_experts, dtype=torch.float32, device=device)
        self.ids = ints(max_tokens, config.top_k)
        self.weights = torch.empty(max_tokens, config.top_k, dtype=torch.float32, device=device)
        self.sorted_pairs = ints(capacity)
        self.block_expert = ints(blocks)
        self.expert_offsets = ints(config.num_experts + 1)
        self.num_padded = ints(1)
        self.places = ints(max_tokens * config.top_k)
        # Rows in the order of experts; then, when gate_up has been through them, the outputs of down.
        self.rows = bf16(rows, config.hidden)
        self.gate_up = bf16(rows, 2 * config.inner)
        self.inside = bf16(rows, config.inner)
        num_bytes = max(WORKSPACE_BYTES, library.moe_gemm_workspace_bytes(config.num_experts))
        self.gemm = torch.empty(num_bytes, dtype=torch.uint8, device=device)


class MoeLayer:
    """One block. Launches on torch's current stream."""

    def __init__(
        self,
        config: MoeConfig,
        weights: MoeWeights,
        workspace: MoeWorkspace,
        library: CudaLibrary,
        *,
        portable: bool = False,
    ) -> None:
        """portable: moe_gemm's portable tier on every device. Raises InvalidRequest where a weight does not fit."""
        if config.hidden % 8 != 0 or config.inner % 8 != 0:
            raise InvalidRequest(
                f"device 'cuda' needs sizes of experts that are multiples of 8, this model has hidden = "
                f"{config.hidden} and inner = {config.inner}; use --device cpu",
                "device",
            )
        experts, hidden, inner = config.num_experts, config.hidden, config.inner
        _check("router", weights.router, (experts, hidden), torch.bfloat16)
        _check("gate_up", weights.gate_up, (experts, 2 * inner, hidden), torch.bfloat16)
        _check("down", weights.down, (experts, hidden, inner), torch.bfloat16)
        if weights.bias is not None:
            _check("bias", weights.bias, (experts,), torch.float32)
        self.config = config
        self._weights = weights
        self._workspace = workspace
        self._library = library
        self._portable = portable

    def run(self, x: torch.Tensor, y: torch.Tensor, shared: torch.Tensor | None = None) -> torch.Tensor:
        """y = the experts' sum for every row of x, + shared; returns y.

        x       bfloat16 [T, hidden], rows that begin at multiples of 16 bytes; T up to the workspace's max_tokens
        y       bfloat16 or float32 [T, hidden]; may be shared itself
        shared  likewise, or None
        """
        return self.run_experts(x, self.router_logits(x), y, shared)

    def router_logits(self, x: torch.Tensor) -> torch.Tensor:
        """[T, num_experts] float32."""
        self._check_rows(x)
        num_rows, router = x.shape[0], self._weights.router
        logits = self._workspace.logits[:num_rows]
        if num_rows > SMALL_GEMM_ROWS:
            if x.is_cuda:
                return torch.mm(x, router.T, out_dtype=torch.float32, out=logits)
            return torch.mm(x.float(), router.T.float(), out=logits)  # a CPU has no product of bfloat16 in float32
        self._call(
            "small_gemm",
            SmallGemmParams(
                y_dtype=F32, x=x.data_ptr(), w=router.data_ptr(), y=logits.data_ptr(), x_stride=x.stride(0),
                w_stride=router.stride(0), y_stride=logits.stride(0), num_rows=num_rows, n=router.shape[0],
                k=router.shape[1],
            ),
        )  # fmt: skip
        return logits

    def run_experts(
        self, x: torch.Tensor, logits: torch.Tensor, y: torch.Tensor, shared: torch.Tensor | None = None
    ) -> torch.Tensor:
        """run() with logits that are there."""
        self._check_rows(x)
        num_tokens = x.shape[0]
        if num_tokens == 0:
            return y
        self._route(logits)
        self._align(num_tokens)
        rows = self._workspace.rows[: self.config.num_rows(num_tokens)]
        gate_up, inside = self._workspace.gate_up[: len(rows)], self._workspace.inside[: len(rows)]
        small = self.config.is_small(num_tokens)
        if small:
            self._gemm_small(x, self._weights.gate_up, gate_up)
        else:
            self._gather(x, rows)
            self._gemm(rows, self._weights.gate_up, gate_up)
        self._call(
            "silu_mul",
            SiluMulParams(
                activation=SILU, x=gate_up.data_ptr(), y=inside.data_ptr(), x_stride=gate_up.stride(0),
                y_stride=inside.stride(0), num_rows=len(rows), width=self.config.inner,
            ),
        )  # fmt: skip
        if small:
            self._gemm_small(inside, self._weights.down, rows)
        else:
            self._gemm(inside, self._weights.down, rows)
        self._combine(rows, y, shared, by_place=not small)
        return y

    # --- launches

    def _check_rows(self, x: torch.Tensor) -> None:
        if x.shape[0] > self._workspace.max_tokens:
            raise InvalidRequest(
                f"x must have at most the {self._workspace.max_tokens} rows that the workspace was made for, got "
                f"{x.shape[0]}; make it larger"
            )

    def _call(self, op: str, params: Params) -> None:
        device = self._weights.router.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        self._library.call(op, params, stream)

    def _route(self, logits: torch.Tensor) -> None:
        c, w, bias = self.config, self._workspace, self._weights.bias
        self._call(
            "moe_route",
            MoeRouteParams(
                logits_dtype=F32, logits=logits.data_ptr(), logits_stride=logits.stride(0),
                bias=None if bias is None else bias.data_ptr(), ids=w.ids.data_ptr(), weights=w.weights.data_ptr(),
                num_tokens=logits.shape[0], num_experts=c.num_experts, top_k=c.top_k, scoring=c.scoring,
                num_groups=c.num_groups, topk_groups=c.topk_groups, group_score=c.group_score,
                renormalise=int(c.renormalise), scale=c.scale,
            ),
        )  # fmt: skip

    def _align(self, num_tokens: int) -> None:
        c, w = self.config, self._workspace
        self._call(
            "moe_align",
            MoeAlignParams(
                num_pairs=num_tokens * c.top_k, ids=w.ids.data_ptr(), sorted_pairs=w.sorted_pairs.data_ptr(),
                block_expert=w.block_expert.data_ptr(), expert_offsets=w.expert_offsets.data_ptr(),
                num_padded=w.num_padded.data_ptr(), num_experts=c.num_experts, block=c.block(num_tokens),
                capacity=c.capacity(num_tokens),
            ),
        )  # fmt: skip

    def _gemm_small(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        w, num_pairs = self._workspace, len(y)
        self._call(
            "moe_gemm_small",
            MoeGemmSmallParams(
                y_dtype=BF16, x=x.data_ptr(), x_stride=x.stride(0), weight=weight.data_ptr(),
                expert_stride=weight.stride(0), weight_stride=weight.stride(1),
                sorted_pairs=w.sorted_pairs.data_ptr(), block_expert=w.block_expert.data_ptr(),
                num_padded=w.num_padded.data_ptr(), y=y.data_ptr(), y_stride=y.stride(0), num_pairs=num_pairs,
                pairs_per_row=num_pairs // len(x), capacity=self.config.capacity(num_pairs // self.config.top_k),
                n=weight.shape[1], k=weight.shape[2],
            ),
        )  # fmt: skip

    def _gather(self, x: torch.Tensor, rows: torch.Tensor) -> None:
        w = self._workspace
        self._call(
            "moe_gather",
            MoeGatherParams(
                num_pairs=len(x) * self.config.top_k, x=x.data_ptr(), x_stride=x.stride(0),
                sorted_pairs=w.sorted_pairs.data_ptr(), num_padded=w.num_padded.data_ptr(), y=rows.data_ptr(),
                y_stride=rows.stride(0), places=w.places.data_ptr(), pairs_per_row=self.config.top_k,
                capacity=len(rows), width=self.config.hidden,
            ),
        )  # fmt: skip

    def _gemm(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        w = self._workspace
        self._call(
            "moe_gemm",
            MoeGemmParams(
                num_experts=self.config.num_experts, x=x.data_ptr(), x_stride=x.stride(0), weight=weight.data_ptr(),
                expert_stride=weight.stride(0), weight_stride=weight.stride(1),
                expert_offsets=w.expert_offsets.data_ptr(), block_expert=w.block_expert.data_ptr(), y=y.data_ptr(),
                y_stride=y.stride(0), workspace=w.gemm.data_ptr(), workspace_bytes=w.gemm.numel(), capacity=len(x),
                n=weight.shape[1], k=weight.shape[2], portable=int(self._portable),
            ),
        )  # fmt: skip

    def _combine(self, z: torch.Tensor, y: torch.Tensor, shared: torch.Tensor | None, *, by_place: bool) -> None:
        c, w = self.config, self._workspace
        self._call(
            "moe_combine",
            MoeCombineParams(
                z_dtype=BF16, z=z.data_ptr(), z_stride=z.stride(0), weights=w.weights.data_ptr(), ids=w.ids.data_ptr(),
                shared=None if shared is None else shared.data_ptr(),
                shared_stride=0 if shared is None else shared.stride(0), y=y.data_ptr(), y_stride=y.stride(0),
                shared_dtype=BF16 if shared is None else _dtype(shared), y_dtype=_dtype(y), num_tokens=y.shape[0],
                top_k=c.top_k, hidden=c.hidden, num_experts=c.num_experts,
                places=w.places.data_ptr() if by_place else None,
            ),
        )  # fmt: skip


def _dtype(x: torch.Tensor) -> int:
    return F32 if x.dtype == torch.float32 else BF16


def _check(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype or not x.is_contiguous():
        raise InvalidRequest(
            f"{name} must be contiguous {dtype} {list(shape)}, got {x.dtype} {list(x.shape)} with strides {x.stride()}"
        )
