"""The kernels' libraries, built once a session."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sapwood.program.cuda_library import CudaLibrary

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def emulated() -> CudaLibrary:
    """The CUDA kernels on the CPU. Their tree is kept: a second run compiles what has changed."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulator switches stacks in x86-64 assembly")
    beside_python = Path(sys.executable).with_name("cmake")
    cmake = str(beside_python) if beside_python.exists() else shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not on the PATH")
    tree = ROOT / "build-emulated"
    subprocess.run([cmake, "-S", str(ROOT / "tests" / "cuda"), "-B", str(tree)], check=True, stdout=subprocess.DEVNULL)
    jobs = str(len(os.sched_getaffinity(0)))
    subprocess.run([cmake, "--build", str(tree), "--parallel", jobs], check=True, stdout=subprocess.DEVNULL)
    return CudaLibrary(tree / "libsapwood_cuda_emulated.so")
