"""Builds, checks and times the CUDA kernels on a machine with a GPU: `python bench/gpu_suite.py [--stage ...]`.

Stages, in order; the first that fails ends the run with status 1:
    build   libsapwood_cuda.so with CMake and nvcc, for this GPU's architecture (skipped when --lib names one)
    check   every kernel against a torch fp64 reference (bench/gpu_checks/)
    time    CUDA events, median of many launches over rotating buffers larger than L2; printed as GB/s and as a fraction
            of this machine's copy bandwidth, measured in the same run
Without torch, a GPU or (for build) nvcc it says so and exits with status 2.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gpu_checks.device import Device

ROOT: Final = Path(__file__).resolve().parent.parent


def build(tree: Path, archs: str) -> Path:
    """Configures and builds libsapwood_cuda.so in `tree` for `archs` (CMAKE_CUDA_ARCHITECTURES); its path. Raises
    CalledProcessError where CMake or nvcc fails."""
    options = ["PYTHON=OFF", "TESTS=OFF", "CUDA=ON", f"CUDA_ARCHS={archs}", f"PYTHON_DIR={tree}"]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(tree), *(f"-DSAPWOOD_{o}" for o in options)], check=True)
    subprocess.run(["cmake", "--build", str(tree), "--parallel", "2", "--target", "sapwood_cuda"], check=True)
    return tree / "libsapwood_cuda.so"


class Timer:
    """Timings of one loaded library on the current GPU."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def seconds(self, launch: Callable[[int], None], launches: int = 60) -> float:
        """Median time of one launch(i); i rotates buffers."""
        import torch

        for i in range(10):
            launch(i)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(launches + 1)]
        events[0].record()
        for i in range(launches):
            launch(i)
            events[i + 1].record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) / 1e3

    def report(self, name: str, num_bytes: int, launch: Callable[[int], None], ceiling: float) -> None:
        seconds = self.seconds(launch)
        rate = num_bytes / seconds
        print(f"{name:44} {seconds * 1e6:9.1f} us  {rate / 1e9:8.0f} GB/s  {rate / ceiling:5.2f} of copy bandwidth")

    def time(self) -> None:
        """Prints the machine's copy bandwidth, then each kernel against it."""
        import torch
        from gpu_checks.elementwise import rms_norm_params, rope_case

        device, buffers = self.device, 8
        source = torch.empty(buffers, 1 << 26, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(source)
        num_bytes = 2 * source[0].nbytes
        ceiling = num_bytes / self.seconds(lambda i, s=source, t=target: t[i % buffers].copy_(s[i % buffers]))
        print(f"{torch.cuda.get_device_name()}: copy bandwidth {ceiling / 1e9:.0f} GB/s (read + write)")
        del source, target
        for rows, hidden in ((64, 4096), (8192, 4096), (8192, 8192)):
            xs = [device.randn(rows, hidden) for _ in range(buffers)]
            ys = [torch.empty(rows, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(buffers)]
            weight = device.randn(hidden)
            calls = [rms_norm_params(x, weight, y, False) for x, y in zip(xs, ys, strict=True)]
            self.report(
                f"rms_norm f32 [{rows}, {hidden}]", xs[0].nbytes + ys[0].nbytes,
                lambda i, calls=calls: device.call("rms_norm", calls[i % buffers]), ceiling,
            )  # fmt: skip
        for tokens in (64, 8192):
            cases = [rope_case(device, tokens, 32, 8, 128, 128, 16, True) for _ in range(buffers)]
            self.report(
                f"rope_kv_write [{tokens}, 32 + 2 x 8 heads of 128]", 2 * cases[0][1]["qkv"].nbytes,
                lambda i, cases=cases: device.call("rope_kv_write", cases[i % buffers][0]), ceiling,
            )  # fmt: skip


def quit_without(what: str) -> None:
    print(f"gpu_suite: {what}; nothing was checked", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("build", "check", "time", "all"), default="all")
    parser.add_argument("--lib", type=Path, help="a libsapwood_cuda.so that is already built")
    parser.add_argument("--tree", type=Path, default=ROOT / "build-cuda", help="CMake tree of the build stage")
    parser.add_argument("--archs", help="CMAKE_CUDA_ARCHITECTURES of the build (default: this GPU's)")
    args = parser.parse_args()

    try:
        import torch
    except ImportError:
        quit_without("torch is missing (`pip install 'sapwood[cuda]'`)")
    has_gpu = torch.cuda.is_available()
    if not has_gpu and args.stage != "build":
        quit_without("torch finds no CUDA GPU (--stage build works without one)")

    library_path = args.lib or args.tree / "libsapwood_cuda.so"
    if args.stage in ("build", "all") and args.lib is None:
        if shutil.which("nvcc") is None or shutil.which("cmake") is None:
            quit_without("nvcc and cmake are needed on the PATH to build; --lib names a library built elsewhere")
        archs = args.archs
        if archs is None:
            major, minor = torch.cuda.get_device_capability() if has_gpu else (9, 0)
            archs = f"{major}{minor}{'a' if major == 9 else ''}-real"
        library_path = build(args.tree.resolve(), archs)
        print(f"build: {library_path} for {archs}")
    if args.stage == "build":
        return
    if not library_path.exists():
        quit_without(f"{library_path} does not exist (--stage build makes it)")

    from gpu_checks import CHECKS
    from gpu_checks.device import Device

    from sapwood.program.cuda_library import CudaLibrary

    device = Device(CudaLibrary(library_path.resolve()), "cuda")
    if args.stage in ("check", "all"):
        for op, check in CHECKS.items():
            print(f"check: {op}, {check(device)} cases equal", flush=True)
    if args.stage in ("time", "all"):
        Timer(device).time()


if __name__ == "__main__":
    main()
