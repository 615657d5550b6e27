"""What the CUDA kernels compute, on the CPU: the checks of bench/gpu_checks/ over the emulated library, with a block's
threads in three orders. On a machine with a GPU, bench/gpu_suite.py runs the same checks there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from gpu_checks import CHECKS
from gpu_checks.device import Device

from sapwood.program.cuda_library import OPS, CudaLibrary

ORDERS = ("ascending", "descending", "7")  # of threads: a missing barrier shows in one of them


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("op", CHECKS)
def test_kernel_against_fp64(emulated: CudaLibrary, op: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPWOOD_EMULATOR_ORDER", order)
    assert CHECKS[op](Device(emulated, "cpu")) > 0


def test_every_launcher_is_checked() -> None:
    assert set(OPS) == set(CHECKS)
