"""FlashInfer as its documentation has it, in torch: for tests of how it is planned, on any machine."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from sapwood.program import cuda_attention


class PagedPrefill:
    """FlashInfer's BatchPrefillWithPagedKVCacheWrapper as its documentation has it, in torch."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str) -> None:
        assert kv_layout == "HND" and workspace.dtype == torch.uint8

    def plan(
        self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor, paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int,
        *, causal: bool, sm_scale: float, window_left: int, logits_soft_cap: float | None, q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert causal and q_data_type == kv_data_type == torch.bfloat16 and logits_soft_cap is None
        for tensor in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert tensor.dtype == torch.int32
        self.segments = []
        for s in range(len(qo_indptr) - 1):
            pages = paged_kv_indices[paged_kv_indptr[s] : paged_kv_indptr[s + 1]].long()
            kv_len = (len(pages) - 1) * page_size + int(paged_kv_last_page_len[s])
            self.segments.append((int(qo_indptr[s]), int(qo_indptr[s + 1]), pages, kv_len))
        self.shape, self.scale, self.window_left = (num_qo_heads, num_kv_heads, head_dim_qk), sm_scale, window_left

    def run(self, q: torch.Tensor, paged_kv_cache: torch.Tensor, *, out: torch.Tensor) -> None:
        heads, kv_heads, dim = self.shape
        assert q.shape == out.shape == (self.segments[-1][1], heads, dim)
        for begin, end, pages, kv_len in self.segments:
            k, v = paged_kv_cache[pages].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :kv_len]
            scores = torch.einsum("qhgd,hkd->hgqk", q[begin:end].float().unflatten(1, (kv_heads, -1)), k) * self.scale
            position = torch.arange(kv_len - (end - begin), kv_len)[:, None]
            seen = torch.arange(kv_len) <= position
            if self.window_left >= 0:
                seen &= torch.arange(kv_len) >= position - self.window_left
            out[begin:end] = torch.einsum(
                "hgqk,hkd->qhgd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v
            ).flatten(1, 2).bfloat16()  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch, head_dims: tuple[int, ...] | None = None) -> None:
    """As the package `flashinfer`. head_dims: those that it has kernels for; None: as the package says."""
    module = types.ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = PagedPrefill  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    if head_dims is not None:
        monkeypatch.setattr(cuda_attention.FlashInferAttention, "HEAD_DIMS", head_dims)
