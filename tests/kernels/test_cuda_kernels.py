"""What the CUDA kernels compute, on the CPU: the checks of bench/gpu_checks/ over the emulated library, with the
threads of a block in three orders. On a machine with a GPU, bench/gpu_suite.py runs the same checks there.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from gpu_checks import CHECKS  # noqa: E402
from gpu_checks.device import Device  # noqa: E402

from sapwood.program.cuda_library import OPS, CudaLibrary  # noqa: E402

ORDERS = ("ascending", "descending", "7")  # of threads: a missing barrier shows in one of them


@pytest.fixture(scope="module")
def library() -> CudaLibrary:
    if platform.machine() != "x86_64":
        pytest.skip("the emulator switches stacks in x86-64 assembly")
    beside_python = Path(sys.executable).with_name("cmake")
    cmake = str(beside_python) if beside_python.exists() else shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not on the PATH")
    tree = ROOT / "build-emulated"  # kept: a second run compiles what has changed
    subprocess.run([cmake, "-S", str(ROOT / "tests" / "cuda"), "-B", str(tree)], check=True, stdout=subprocess.DEVNULL)
    jobs = str(len(os.sched_getaffinity(0)))
    subprocess.run([cmake, "--build", str(tree), "--parallel", jobs], check=True, stdout=subprocess.DEVNULL)
    return CudaLibrary(tree / "libsapwood_cuda_emulated.so")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("op", CHECKS)
def test_kernel_against_fp64(library: CudaLibrary, op: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPWOOD_EMULATOR_ORDER", order)
    assert CHECKS[op](Device(library, "cpu")) > 0


def test_every_launcher_is_checked() -> None:
    assert set(OPS) == set(CHECKS)
