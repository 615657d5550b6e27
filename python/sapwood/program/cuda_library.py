"""libsapwood_cuda.so by ctypes: one class for each params struct of cuda/*/params.h, and how a launcher is called.

The structs mirror the headers field by field; the library refuses a struct of another size, so a header that changed
alone is noticed at the first call.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Final

from sapwood.errors import SapwoodError

ABI_VERSION: Final = 2
F32: Final = 0
BF16: Final = 1
MOE_SOFTMAX: Final = 0
MOE_SIGMOID: Final = 1
MOE_GROUP_TOP2: Final = 0
MOE_GROUP_MAX: Final = 1
MOE_SMALL_BLOCK: Final = 16  # of moe_align: what moe_gemm_small wants
MOE_GEMM_BLOCK: Final = 64  # and moe_gemm

_I32: Final = ctypes.c_int32
_I64: Final = ctypes.c_int64
_F32: Final = ctypes.c_float
_PTR: Final = ctypes.c_void_p


class Params(ctypes.Structure):
    """A params struct; struct_size is filled in. Fields left out are 0 or null."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(type(self)), **fields)


class RmsNormParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("x_dtype", _I32),
        ("x", _PTR),
        ("weight", _PTR),
        ("y", _PTR),
        ("x_stride", _I64),
        ("y_stride", _I64),
        ("num_rows", _I32),
        ("hidden", _I32),
        ("eps", _F32),
        ("plus_one", _I32),
    )


class RopeKvWriteParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_tokens", _I32),
        ("qkv", _PTR),
        ("qkv_stride", _I64),
        ("q_out", _PTR),
        ("q_stride", _I64),
        ("k_pages", _PTR),
        ("v_pages", _PTR),
        ("page_stride", _I64),
        ("slots", _PTR),
        ("positions", _PTR),
        ("cos", _PTR),
        ("sin", _PTR),
        ("q_norm", _PTR),
        ("k_norm", _PTR),
        ("norm_eps", _F32),
        ("num_q_heads", _I32),
        ("num_kv_heads", _I32),
        ("head_dim", _I32),
        ("rotary_dim", _I32),
        ("page_size", _I32),
    )


class AttentionPlanParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_segments", _I32),
        ("q_indptr", _PTR),
        ("kv_lens", _PTR),
        ("tiles", _PTR),
        ("items", _PTR),
        ("counts", _PTR),
        ("failed", _PTR),
        ("prefix_indptr", _PTR),
        ("prefix_segments", _PTR),
        ("prefix_lens", _PTR),
        ("shared_tiles", _PTR),
        ("shared_rows", _PTR),
        ("prefix_scratch", _PTR),
        ("num_prefixes", _I32),
        ("max_tiles", _I32),
        ("max_items", _I32),
        ("group", _I32),
        ("rows_per_tile", _I32),
        ("chunk_len", _I32),
        ("window", _I32),
        ("min_rows", _I32),
        ("max_rows", _I32),
    )


class AttentionParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_kv_heads", _I32),
        ("q", _PTR),
        ("out", _PTR),
        ("q_stride", _I64),
        ("out_stride", _I64),
        ("k_pages", _PTR),
        ("v_pages", _PTR),
        ("page_stride", _I64),
        ("page_table", _PTR),
        ("table_stride", _I64),
        ("page_rows", _PTR),
        ("q_indptr", _PTR),
        ("kv_lens", _PTR),
        ("tiles", _PTR),
        ("items", _PTR),
        ("counts", _PTR),
        ("shared_tiles", _PTR),
        ("shared_rows", _PTR),
        ("partial_o", _PTR),
        ("partial_ml", _PTR),
        ("sinks", _PTR),
        ("tickets", _PTR),
        ("group", _I32),
        ("head_dim", _I32),
        ("page_size", _I32),
        ("rows_per_tile", _I32),
        ("chunk_len", _I32),
        ("window", _I32),
        ("scale", _F32),
        ("softcap", _F32),
        ("num_blocks", _I32),
        ("num_pages", _I32),
    )


SILU: Final = 0
GELU: Final = 1
GELU_TANH: Final = 2


class SiluMulParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("activation", _I32),
        ("x", _PTR),
        ("y", _PTR),
        ("x_stride", _I64),
        ("y_stride", _I64),
        ("num_rows", _I32),
        ("width", _I32),
    )


class SmallGemmParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("y_dtype", _I32),
        ("x", _PTR),
        ("w", _PTR),
        ("bias", _PTR),
        ("residual", _PTR),
        ("y", _PTR),
        ("x_stride", _I64),
        ("w_stride", _I64),
        ("residual_stride", _I64),
        ("y_stride", _I64),
        ("num_rows", _I32),
        ("n", _I32),
        ("k", _I32),
    )


class MoeRouteParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("logits_dtype", _I32),
        ("logits", _PTR),
        ("logits_stride", _I64),
        ("bias", _PTR),
        ("ids", _PTR),
        ("weights", _PTR),
        ("num_tokens", _I32),
        ("num_experts", _I32),
        ("top_k", _I32),
        ("scoring", _I32),
        ("num_groups", _I32),
        ("topk_groups", _I32),
        ("group_score", _I32),
        ("renormalise", _I32),
        ("scale", _F32),
        ("reserved", _I32),
    )


class MoeAlignParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_pairs", _I32),
        ("ids", _PTR),
        ("sorted_pairs", _PTR),
        ("block_expert", _PTR),
        ("expert_offsets", _PTR),
        ("num_padded", _PTR),
        ("num_experts", _I32),
        ("block", _I32),
        ("capacity", _I32),
        ("reserved", _I32),
    )


class MoeGemmSmallParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("y_dtype", _I32),
        ("x", _PTR),
        ("x_stride", _I64),
        ("weight", _PTR),
        ("expert_stride", _I64),
        ("weight_stride", _I64),
        ("sorted_pairs", _PTR),
        ("block_expert", _PTR),
        ("num_padded", _PTR),
        ("pair_weight", _PTR),
        ("y", _PTR),
        ("y_stride", _I64),
        ("num_pairs", _I32),
        ("pairs_per_row", _I32),
        ("capacity", _I32),
        ("n", _I32),
        ("k", _I32),
        ("reserved", _I32),
    )


class MoeGatherParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_pairs", _I32),
        ("x", _PTR),
        ("x_stride", _I64),
        ("sorted_pairs", _PTR),
        ("num_padded", _PTR),
        ("y", _PTR),
        ("y_stride", _I64),
        ("places", _PTR),
        ("pairs_per_row", _I32),
        ("capacity", _I32),
        ("width", _I32),
        ("reserved", _I32),
    )


class MoeGemmParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_experts", _I32),
        ("x", _PTR),
        ("x_stride", _I64),
        ("weight", _PTR),
        ("expert_stride", _I64),
        ("weight_stride", _I64),
        ("expert_offsets", _PTR),
        ("block_expert", _PTR),
        ("y", _PTR),
        ("y_stride", _I64),
        ("workspace", _PTR),
        ("workspace_bytes", _I64),
        ("capacity", _I32),
        ("n", _I32),
        ("k", _I32),
        ("portable", _I32),
    )


class MoeCombineParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("z_dtype", _I32),
        ("z", _PTR),
        ("z_stride", _I64),
        ("weights", _PTR),
        ("ids", _PTR),
        ("shared", _PTR),
        ("shared_stride", _I64),
        ("y", _PTR),
        ("y_stride", _I64),
        ("shared_dtype", _I32),
        ("y_dtype", _I32),
        ("num_tokens", _I32),
        ("top_k", _I32),
        ("hidden", _I32),
        ("num_experts", _I32),
        ("places", _PTR),
    )


class SampleParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_rows", _I32),
        ("vocab", _I32),
        ("num_mask_rows", _I32),
        ("logits", _PTR),
        ("logits_stride", _I64),
        ("temperature", _PTR),
        ("top_k", _PTR),
        ("top_p", _PTR),
        ("min_p", _PTR),
        ("seed", _PTR),
        ("stream", _PTR),
        ("position", _PTR),
        ("want_logprob", _PTR),
        ("mask", _PTR),
        ("mask_stride", _I64),
        ("mask_index", _PTR),
        ("banned_indptr", _PTR),
        ("banned_ids", _PTR),
        ("occurred_indptr", _PTR),
        ("occurred_ids", _PTR),
        ("output_counts", _PTR),
        ("in_prompt", _PTR),
        ("repetition", _PTR),
        ("frequency", _PTR),
        ("presence", _PTR),
        ("bias_indptr", _PTR),
        ("bias_ids", _PTR),
        ("bias", _PTR),
        ("saved", _PTR),
        ("token", _PTR),
        ("logprob", _PTR),
        ("bad", _PTR),
    )


MAX_GROUPS: Final = 8  # SAPWOOD_CUDA_MAX_GROUPS
ROW_BYTES: Final = 112  # sizeof(SapwoodRow)


class RowState(ctypes.Structure):
    """SapwoodRowState: a part of the three params below, without a size of its own."""

    _fields_ = (
        ("rows", _PTR),
        ("stop_ids", _PTR),
        ("page_tables", _PTR * MAX_GROUPS),
        ("num_groups", _I32),
        ("max_rows", _I32),
        ("max_pages", _I32),
        ("max_stop_ids", _I32),
        ("page_size", _I32),
        ("reserved", _I32),
    )


class RowOpsParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("reserved", _I32),
        ("state", RowState),
        ("blob", _PTR),
        ("result", _PTR),
    )


class PrepareStepParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_padded_tokens", _I32),
        ("num_padded_segments", _I32),
        ("num_padded_logit_rows", _I32),
        ("kept_begin", _I32),
        ("reserved", _I32),
        ("state", RowState),
        ("blob", _PTR),
        ("result", _PTR),
        ("tokens", _PTR),
        ("positions", _PTR),
        ("rope_modes", _PTR),
        ("slots", _PTR * MAX_GROUPS),
        ("q_indptr", _PTR),
        ("kv_lens", _PTR),
        ("page_rows", _PTR),
        ("logit_src", _PTR),
        ("logit_rows", _PTR),
        ("temperature", _PTR),
        ("top_k", _PTR),
        ("top_p", _PTR),
        ("min_p", _PTR),
        ("seed", _PTR),
        ("stream", _PTR),
        ("position", _PTR),
        ("want_logprob", _PTR),
        ("banned_indptr", _PTR),
        ("banned_ids", _PTR),
    )


class CommitStepParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("reserved", _I32),
        ("state", RowState),
        ("blob", _PTR),
        ("result", _PTR),
        ("page_rows", _PTR),
        ("token", _PTR),
        ("logprob", _PTR),
        ("bad", _PTR),
        ("mask_index", _PTR),
    )


class NotifyParams(Params):
    _fields_ = (("struct_size", ctypes.c_uint32), ("event_fd", _I32), ("done_ns", _PTR))


OPS: Final[dict[str, type[Params]]] = {
    "rms_norm": RmsNormParams,
    "rope_kv_write": RopeKvWriteParams,
    "silu_mul": SiluMulParams,
    "small_gemm": SmallGemmParams,
    "attention_plan": AttentionPlanParams,
    "attention": AttentionParams,
    "attention_merge": AttentionParams,
    "moe_route": MoeRouteParams,
    "moe_align": MoeAlignParams,
    "moe_gemm_small": MoeGemmSmallParams,
    "moe_gather": MoeGatherParams,
    "moe_gemm": MoeGemmParams,
    "moe_combine": MoeCombineParams,
    "sample": SampleParams,
    "notify": NotifyParams,
    "row_ops": RowOpsParams,
    "prepare_step": PrepareStepParams,
    "commit_step": CommitStepParams,
}


class CudaLibrary:
    """A loaded library. `call("rms_norm", params, stream)` launches; stream is a cudaStream_t as an integer."""

    def __init__(self, path: Path) -> None:
        """Raises SapwoodError where the file does not load or is of another ABI version."""
        try:
            # Not CDLL: a launch takes microseconds, and a thread that lets go of the GIL for it may wait milliseconds
            # to get it back from a busy event loop.
            self._library = ctypes.PyDLL(str(path))
        except OSError as error:
            raise SapwoodError(f"{path} does not load as a library: {error}") from None
        self._library.sapwood_cuda_last_error.restype = ctypes.c_char_p
        version = self._library.sapwood_cuda_abi_version()
        if version != ABI_VERSION:
            raise SapwoodError(
                f"{path}: ABI version {ABI_VERSION} expected, got {version}: build it again from this checkout"
            )
        self._launchers: dict[str, Any] = {}
        for op, params in OPS.items():
            launcher = getattr(self._library, f"sapwood_cuda_{op}")
            launcher.argtypes = [ctypes.POINTER(params), ctypes.c_void_p]
            launcher.restype = ctypes.c_int
            self._launchers[op] = launcher
        self._library.sapwood_cuda_moe_gemm_workspace_bytes.argtypes = [_I32]
        self._library.sapwood_cuda_moe_gemm_workspace_bytes.restype = _I64

    def status(self, op: str, params: Params | None, stream: int | None = None) -> int:
        """Launch; returns 0, -1 for a wrong argument, or a cudaError_t."""
        pointer = None if params is None else ctypes.byref(params)
        status: int = self._launchers[op](pointer, stream)
        return status

    def moe_gemm_workspace_bytes(self, num_experts: int) -> int:
        """What moe_gemm needs on the current device; 0 says that it runs the portable tier there."""
        num_bytes: int = self._library.sapwood_cuda_moe_gemm_workspace_bytes(num_experts)
        return num_bytes

    def last_error(self) -> str:
        """The text of this thread's last failed call."""
        text: bytes = self._library.sapwood_cuda_last_error()
        return text.decode()

    def call(self, op: str, params: Params, stream: int | None = None) -> None:
        """Launch; raises SapwoodError with the library's text where that fails."""
        if self.status(op, params, stream) != 0:
            raise SapwoodError(self.last_error())
