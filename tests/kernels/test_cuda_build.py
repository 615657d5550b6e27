"""libsapwood_cuda.so without a GPU: it builds, loads, exports only launchers, and refuses wrong arguments.

Needs nvcc and cmake, or SAPWOOD_CUDA_LIB = a library that is already built. What the kernels compute is checked by
test_cuda_kernels.py, and on a GPU by bench/gpu_suite.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sapwood.program.cuda_library import OPS, CudaLibrary, Params, RmsNormParams, RopeKvWriteParams

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_suite", ROOT / "bench" / "gpu_suite.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def library_path(suite: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if named := os.environ.get("SAPWOOD_CUDA_LIB"):
        return Path(named)
    beside_python = Path(sys.executable).parent
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH (or name a built library in SAPWOOD_CUDA_LIB)")
    if shutil.which("cmake") is None and not (beside_python / "cmake").exists():
        pytest.skip("cmake is not on the PATH (or name a built library in SAPWOOD_CUDA_LIB)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{beside_python}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("SAPWOOD_CUTLASS", os.environ.get("SAPWOOD_CUTLASS", "OFF"))  # else a download, and a minute more
        built: Path = suite.build(tmp_path_factory.mktemp("cuda"), "90a-real")
    return built


@pytest.fixture(scope="module")
def library(library_path: Path) -> CudaLibrary:
    return CudaLibrary(library_path)


def refusal(library: CudaLibrary, op: str, params: Params) -> str:
    """The error text of a call that must be refused before anything is launched."""
    assert library.status(op, params) == -1
    return library.last_error()


def rms_norm(**changes: Any) -> RmsNormParams:
    fields = dict(x_dtype=0, x=64, weight=64, y=64, x_stride=8, y_stride=8, num_rows=1, hidden=8, eps=1e-5, plus_one=0)
    return RmsNormParams(**{**fields, **changes})


def rope(**changes: Any) -> RopeKvWriteParams:
    pointers = ("qkv", "q_out", "k_pages", "v_pages", "slots", "positions", "cos", "sin")
    fields: dict[str, Any] = dict.fromkeys(pointers, 64)
    fields |= dict(num_tokens=1, qkv_stride=32, q_stride=16, page_stride=128, norm_eps=1e-6)
    fields |= dict(num_q_heads=2, num_kv_heads=1, head_dim=8, rotary_dim=8, page_size=16)
    return RopeKvWriteParams(**{**fields, **changes})


def test_exports_the_launchers_and_nothing_else(library_path: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not on the PATH")
    command = ["nm", "-D", "--defined-only", str(library_path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1] for line in listing.splitlines()}
    others = {"sapwood_cuda_abi_version", "sapwood_cuda_last_error", "sapwood_cuda_moe_gemm_workspace_bytes"}
    assert symbols == others | {f"sapwood_cuda_{op}" for op in OPS}


def test_needs_no_cuda_library_to_load(library_path: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not on the PATH")
    dynamic = subprocess.run(["readelf", "-d", str(library_path)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert needed and not [name for name in needed if "cuda" in name or "nv" in name]


def test_another_struct_size_is_refused(library: CudaLibrary) -> None:
    for name, params in (("rms_norm", rms_norm()), ("rope_kv_write", rope())):
        expected = params.struct_size
        params.struct_size = expected - 8
        text = refusal(library, name, params)
        assert text.startswith(f"{name}: params.struct_size is {expected - 8}, this library expects {expected}")


def test_null_params_are_refused(library: CudaLibrary) -> None:
    for op in OPS:
        assert library.status(op, None) == -1
        assert "params is null" in library.last_error()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x_dtype": 2}, "x_dtype must be f32 (0) or bf16 (1), got 2"),
        ({"num_rows": -1}, "num_rows must not be negative, got -1"),
        ({"hidden": 0}, "hidden must be positive, got 0"),
        ({"x_stride": 7}, "at least hidden = 8, got 7 and 8"),
        ({"y_stride": 7}, "at least hidden = 8, got 8 and 7"),
        ({"eps": 0.0}, "eps must be positive, got 0"),
        ({"weight": None}, "must not be null"),
    ],
)
def test_rms_norm_names_the_wrong_argument(library: CudaLibrary, changes: dict[str, Any], said: str) -> None:
    text = refusal(library, "rms_norm", rms_norm(**changes))
    assert text.startswith("rms_norm: ") and said in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_tokens": -1}, "num_tokens must not be negative, got -1"),
        ({"num_kv_heads": 0}, "must be positive, got 2 and 0"),
        ({"head_dim": 7}, "head_dim must be even and in 2..256, got 7"),
        ({"head_dim": 258}, "head_dim must be even and in 2..256, got 258"),
        ({"rotary_dim": 10}, "rotary_dim must be even and in 0..head_dim = 8, got 10"),
        ({"page_size": 0}, "page_size must be positive, got 0"),
        ({"qkv_stride": 31}, "qkv_stride must be even and at least 32, got 31"),
        ({"q_stride": 14}, "q_stride must be even and at least 16, got 14"),
        ({"page_stride": 126}, "page_stride must be even and at least 128, got 126"),
        ({"q_norm": 64, "norm_eps": 0.0}, "norm_eps must be positive, got 0"),
        ({"k_norm": 64, "norm_eps": 0.0}, "norm_eps must be positive, got 0"),
        ({"slots": None}, "must not be null"),
        ({"cos": None}, "must not be null when rotary_dim = 8"),
        ({"q_out": 66}, "aligned to 4 bytes"),
    ],
)
def test_rope_kv_write_names_the_wrong_argument(library: CudaLibrary, changes: dict[str, Any], said: str) -> None:
    text = refusal(library, "rope_kv_write", rope(**changes))
    assert text.startswith("rope_kv_write: ") and said in text


def test_nothing_to_do_needs_no_gpu(library: CudaLibrary) -> None:
    assert library.status("rms_norm", rms_norm(num_rows=0)) == 0
    assert library.status("rope_kv_write", rope(num_tokens=0)) == 0


def test_gpu_suite_says_why_it_cannot_run() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: run bench/gpu_suite.py itself")
    command = [sys.executable, str(ROOT / "bench" / "gpu_suite.py"), "--stage", "check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr and "nothing was checked" in done.stderr


def test_wgmma_is_not_run_one_by_one(tmp_path: Path) -> None:
    """ptxas does so, and says it by the way, where it finds that a register is touched while a product may use it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    command = [nvcc, "-std=c++17", "-fmad=false", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas=-v"]
    command += ["-gencode", "arch=compute_90a,code=sm_90a", f"-I{ROOT / 'cuda'}", "-cubin"]
    source = ROOT / "cuda" / "attention" / "attention_sm90.cu"
    done = subprocess.run([*command, str(source), "-o", str(tmp_path / "cubin")], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("Used 168 registers") == 2 and "serialized" not in said, said
