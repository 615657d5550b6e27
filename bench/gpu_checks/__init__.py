"""What the CUDA kernels must compute: every launcher of libsapwood_cuda.so against an fp64 reference by torch.

Odd shapes, unaligned rows, NaN in all outputs before the call and in everything that must not be read, canaries around
what must stay untouched, equal bits when a row is alone and among others, and when a call is repeated. The same checks
run on a GPU (bench/gpu_suite.py) and on the CPU by the emulator (tests/kernels/test_cuda_kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gpu_checks.activation import check_silu_mul
from gpu_checks.attention import check_attention, check_attention_merge, check_attention_plan
from gpu_checks.batch import check_commit_step, check_prepare_step, check_row_ops
from gpu_checks.completion import check_notify
from gpu_checks.device import Device
from gpu_checks.elementwise import check_rms_norm, check_rope_kv_write
from gpu_checks.matmul import check_small_gemm
from gpu_checks.moe import check_moe_align, check_moe_combine, check_moe_gemm_small, check_moe_route
from gpu_checks.moe_prefill import check_moe_gather, check_moe_gemm
from gpu_checks.sampling import check_sample
from gpu_checks.shared_prefix import check_prefix_plan, check_shared_prefixes

# Each returns its number of cases; AssertionError where one fails.
CHECKS: Final[dict[str, Callable[[Device], int]]] = {
    "rms_norm": check_rms_norm,
    "rope_kv_write": check_rope_kv_write,
    "attention_plan": lambda d: check_attention_plan(d) + check_prefix_plan(d),
    "attention": lambda d: check_attention(d) + check_shared_prefixes(d),
    "attention_merge": check_attention_merge,
    "silu_mul": check_silu_mul,
    "small_gemm": check_small_gemm,
    "moe_route": check_moe_route,
    "moe_align": check_moe_align,
    "moe_gemm_small": check_moe_gemm_small,
    "moe_gather": check_moe_gather,
    "moe_gemm": check_moe_gemm,
    "moe_combine": check_moe_combine,
    "sample": check_sample,
    "row_ops": check_row_ops,
    "prepare_step": check_prepare_step,
    "commit_step": check_commit_step,
    "notify": check_notify,
}
