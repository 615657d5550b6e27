"""libsapwood_cuda.so by ctypes: one class for each params struct of cuda/*/params.h, and how a launcher is called.

The structs mirror the headers field by field; the library refuses a struct of another size, so a header that changed
alone is noticed at the first call.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Final

from sapwood.errors import SapwoodError

ABI_VERSION: Final = 1
F32: Final = 0
BF16: Final = 1

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


OPS: Final[dict[str, type[Params]]] = {
    "rms_norm": RmsNormParams,
    "rope_kv_write": RopeKvWriteParams,
}


class CudaLibrary:
    """A loaded library. `call("rms_norm", params, stream)` launches; stream is a cudaStream_t as an integer."""

    def __init__(self, path: Path) -> None:
        """Raises SapwoodError where the file does not load or is of another ABI version."""
        try:
            self._library = ctypes.CDLL(str(path))
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

    def status(self, op: str, params: Params | None, stream: int | None = None) -> int:
        """Launch; returns 0, -1 for a wrong argument, or a cudaError_t."""
        pointer = None if params is None else ctypes.byref(params)
        status: int = self._launchers[op](pointer, stream)
        return status

    def last_error(self) -> str:
        """The text of this thread's last failed call."""
        text: bytes = self._library.sapwood_cuda_last_error()
        return text.decode()

    def call(self, op: str, params: Params, stream: int | None = None) -> None:
        """Launch; raises SapwoodError with the library's text where that fails."""
        if self.status(op, params, stream) != 0:
            raise SapwoodError(self.last_error())
