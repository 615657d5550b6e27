"""FlashInfer as it is installed, without a GPU: the names and parameters that are used of it exist, and its plan and
run take what attention backend "flashinfer" hands them. Its kernels are replaced by a recorder; what they compute is
played in tests/golden/test_cuda_executor.py.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sapwood.program.cuda_attention import FlashInferAttention, StepLens

flashinfer = pytest.importorskip("flashinfer", reason="FlashInfer is not installed: pip install 'sapwood[flashinfer]'")


def test_names_and_parameters() -> None:
    prefill, decode = flashinfer.BatchPrefillWithPagedKVCacheWrapper, flashinfer.BatchDecodeWithPagedKVCacheWrapper
    for wrapper, more in ((prefill, {}), (decode, {"use_tensor_cores": True})):  # decode: bench/gpu_timings.py
        inspect.signature(wrapper.__init__).bind(None, "workspace", "HND", **more)
        inspect.signature(wrapper.run).bind(None, "q", "kv", out="out")
    # bench/gpu_timings.py
    inspect.signature(flashinfer.silu_and_mul).bind("x")
    inspect.signature(flashinfer.sampling.top_p_sampling_from_probs).bind("probabilities", 0.9)
    parameters = list(inspect.signature(prefill.plan).parameters)
    assert parameters[1:9] == [
        "qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len", "num_qo_heads", "num_kv_heads",
        "head_dim_qk", "page_size",
    ]  # fmt: skip
    assert {"causal", "sm_scale", "window_left", "logits_soft_cap", "q_data_type", "kv_data_type"} <= set(parameters)


class Kernels:
    """What FlashInfer compiles for a shape: remembers what it is called with."""

    def __init__(self) -> None:
        self.run: tuple[Any, ...] = ()

    def plan(self, *args: Any) -> list[int]:
        return [0]

    def paged_run(self, *args: Any) -> None:
        self.run = args


@pytest.mark.parametrize("window", [0, 5])
def test_plan_and_run_take_what_they_are_given(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    from flashinfer import prefill

    kernels = Kernels()
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(prefill, "determine_attention_backend", lambda *a, **k: "fa2")
    monkeypatch.setattr(prefill, "get_batch_prefill_module", lambda *a, **k: kernels)
    monkeypatch.setattr(prefill, "device_support_pdl", lambda device: False)
    page_size, heads, kv_heads, dim = 16, 8, 2, 64
    params = {"kv_group": 0, "window": window, "scale": 0.125, "softcap": 0.0, "num_q_heads": heads}
    node: Any = SimpleNamespace(op="attention", params=params)
    table = torch.arange(3 * 4, dtype=torch.int32).view(3, 4)
    table[0, 0] = -1  # below a window
    arrays = SimpleNamespace(page_rows=torch.tensor([0, 2], dtype=torch.int32), page_tables=[table])
    rows: Any = SimpleNamespace(device=torch.device("cpu"), page_size=page_size, arrays=arrays)
    program: Any = SimpleNamespace(head_dim=dim, num_kv_heads=kv_heads, nodes=[node])
    backend, no_shape = FlashInferAttention(program, rows), None
    backend.begin(no_shape, StepLens(np.array([1, 20], np.int32), np.array([33, 20], np.int64)))  # type: ignore[arg-type]
    wrapper = next(iter(backend._wrappers.values()))
    assert wrapper._paged_kv_indices_buf.tolist() == [0, 1, 2, 8, 9]
    assert wrapper._paged_kv_last_page_len_buf.tolist() == [1, 4] and wrapper._qo_indptr_buf.tolist() == [0, 1, 21]
    kv = torch.zeros(13, 2, kv_heads, page_size, dim, dtype=torch.bfloat16)
    q, out = (torch.zeros(24, heads * dim, dtype=torch.bfloat16) for _ in range(2))
    backend.attend(node, q, out, kv, no_shape)  # type: ignore[arg-type]
    tensors = [given for given in kernels.run if isinstance(given, torch.Tensor)]
    keys = next(given for given in tensors if given.ndim == 4)
    assert keys.shape == (13, kv_heads, page_size, dim) and keys.stride(0) == kv.stride(0)
    assert any(given.data_ptr() == out.data_ptr() for given in tensors)
    assert (window - 1 if window else -1) in [given for given in kernels.run if isinstance(given, int)]
