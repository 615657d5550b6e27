"""Builds, checks and times the CUDA kernels on a machine with a GPU: `python bench/gpu_suite.py [--stage ...]`.

Stages, in order; the first that fails ends the run with status 1:
    build   libsapwood_cuda.so with CMake and nvcc, for this GPU's architecture (skipped when --lib names one)
    check   every kernel against a torch fp64 reference: odd shapes, unaligned rows, NaN-poisoned outputs, canaries
            around what must stay untouched, and equal bits alone and among other rows
    time    CUDA events, median of many launches over rotating buffers larger than L2; printed as GB/s and as a fraction
            of this machine's copy bandwidth, measured in the same run
Without torch, a GPU or (for build) nvcc it says so and exits with status 2.

`load_library` and the parameter structs mirror cuda/*/params.h; tests/kernels/test_cuda_build.py uses them as well.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

ROOT: Final = Path(__file__).resolve().parent.parent
F32: Final = 0
BF16: Final = 1


class Params(ctypes.Structure):
    """A params struct of cuda/*/params.h; struct_size is filled in."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(type(self)), **fields)


class RmsNormParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("x_dtype", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("plus_one", ctypes.c_int32),
    )


class RopeKvWriteParams(Params):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("num_tokens", ctypes.c_int32),
        ("qkv", ctypes.c_void_p),
        ("qkv_stride", ctypes.c_int64),
        ("q_out", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("k_pages", ctypes.c_void_p),
        ("v_pages", ctypes.c_void_p),
        ("page_stride", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("norm_eps", ctypes.c_float),
        ("num_q_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("rotary_dim", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
    )


OPS: Final = {"sapwood_cuda_rms_norm": RmsNormParams, "sapwood_cuda_rope_kv_write": RopeKvWriteParams}


def load_library(path: Path) -> ctypes.CDLL:
    """The library with its signatures declared. OSError where it does not load; ValueError on another ABI version."""
    library = ctypes.CDLL(str(path))
    library.sapwood_cuda_last_error.restype = ctypes.c_char_p
    for name, params in OPS.items():
        function = getattr(library, name)
        function.argtypes = [ctypes.POINTER(params), ctypes.c_void_p]
        function.restype = ctypes.c_int
    version = library.sapwood_cuda_abi_version()
    if version != 1:
        raise ValueError(f"{path}: ABI version 1 expected, got {version}: build it again from this checkout")
    return library


def build(tree: Path, archs: str) -> Path:
    """Configures and builds libsapwood_cuda.so in `tree` for `archs` (CMAKE_CUDA_ARCHITECTURES); its path. Raises
    CalledProcessError where CMake or nvcc fails."""
    options = ["PYTHON=OFF", "TESTS=OFF", "CUDA=ON", f"CUDA_ARCHS={archs}", f"PYTHON_DIR={tree}"]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(tree), *(f"-DSAPWOOD_{o}" for o in options)], check=True)
    subprocess.run(["cmake", "--build", str(tree), "--parallel", "2", "--target", "sapwood_cuda"], check=True)
    return tree / "libsapwood_cuda.so"


class Suite:
    """Checks and timings of one loaded library on the current GPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        import torch

        self.torch = torch
        self.library = library
        self.stream = torch.cuda.current_stream().cuda_stream
        self.generator = torch.Generator("cuda").manual_seed(0)

    def call(self, name: str, params: Params) -> None:
        status = getattr(self.library, name)(ctypes.byref(params), self.stream)
        if status != 0:
            raise RuntimeError(self.library.sapwood_cuda_last_error().decode())

    def randn(self, *shape: int) -> torch.Tensor:
        return self.torch.randn(*shape, device="cuda", generator=self.generator)

    # --- RMSNorm ------------------------------------------------------------------------------------------------
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, plus_one: bool) -> RmsNormParams:
        dtype = F32 if x.dtype == self.torch.float32 else BF16
        return RmsNormParams(
            x_dtype=dtype, x=x.data_ptr(), weight=weight.data_ptr(), y=y.data_ptr(), x_stride=x.stride(0),
            y_stride=y.stride(0), num_rows=x.shape[0], hidden=x.shape[1], eps=1e-5, plus_one=plus_one,
        )  # fmt: skip

    def check_rms_norm(self) -> int:
        """Every dtype, offset and size; returns the number of cases. AssertionError where one differs."""
        torch, cases = self.torch, 0
        for dtype in (torch.float32, torch.bfloat16):
            for rows, hidden in ((1, 1), (1, 2), (3, 63), (5, 1023), (2, 1024), (17, 1027), (64, 4096), (3, 16384)):
                for offset in (0, 1):
                    plus_one = bool(cases % 2)
                    x = (self.randn(rows, hidden + 8) * 3).to(dtype)[:, offset : offset + hidden]
                    weight = self.randn(hidden)
                    out = torch.full((rows, hidden + 8), float("nan"), device="cuda", dtype=torch.bfloat16)
                    y = out[:, offset : offset + hidden]
                    self.call("sapwood_cuda_rms_norm", self.rms_norm(x, weight, y, plus_one))
                    x64 = x.double()
                    scale = weight.double() + plus_one
                    expected = x64 / (x64.square().mean(1, keepdim=True) + 1e-5).sqrt() * scale
                    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)
                    outside = torch.cat((out[:, :offset], out[:, offset + hidden :]), 1)
                    assert outside.isnan().all(), "rms_norm wrote outside its rows"
                    alone = torch.empty(1, hidden, device="cuda", dtype=torch.bfloat16)
                    last = x[-1:].contiguous()
                    self.call("sapwood_cuda_rms_norm", self.rms_norm(last, weight, alone, plus_one))
                    assert torch.equal(alone[0], y[-1]), "a row's bits depend on the other rows or on alignment"
                    cases += 1
        return cases

    # --- RoPE and KV write ----------------------------------------------------------------------------------------
    def rope_case(self, tokens: int, hq: int, hkv: int, dim: int, rotary: int, page_size: int, norm: bool,
                  num_pages: int = 0) -> tuple[RopeKvWriteParams, dict[str, Any]]:  # fmt: skip
        """Parameters and tensors of one call: random slots, NaN in all outputs, K and V of a page side by side."""
        torch = self.torch
        num_pages = num_pages or tokens // page_size + 3
        max_position = 4096
        angles = torch.arange(max_position, device="cuda")[:, None] / 10000 ** (
            torch.arange(rotary // 2, device="cuda") / max(rotary // 2, 1)
        )
        t: dict[str, Any] = {
            "qkv": self.randn(tokens, (hq + 2 * hkv) * dim).bfloat16(),
            "q_out": torch.full((tokens, hq * dim), float("nan"), device="cuda", dtype=torch.bfloat16),
            "pool": torch.full((num_pages, 2, hkv, page_size, dim), float("nan"), device="cuda", dtype=torch.bfloat16),
            "slots": torch.randperm(num_pages * page_size, device="cuda", generator=self.generator)[:tokens].clone(),
            "positions": torch.randint(0, max_position, (tokens,), device="cuda", generator=self.generator).int(),
            "cos": angles.cos().float().contiguous(),
            "sin": angles.sin().float().contiguous(),
            "q_norm": self.randn(dim) if norm else None,
            "k_norm": self.randn(dim) if norm else None,
        }
        params = RopeKvWriteParams(
            num_tokens=tokens, qkv=t["qkv"].data_ptr(), qkv_stride=t["qkv"].stride(0), q_out=t["q_out"].data_ptr(),
            q_stride=t["q_out"].stride(0), k_pages=t["pool"].data_ptr(), v_pages=t["pool"][:, 1].data_ptr(),
            page_stride=t["pool"].stride(0), slots=t["slots"].data_ptr(), positions=t["positions"].data_ptr(),
            cos=t["cos"].data_ptr(), sin=t["sin"].data_ptr(), q_norm=t["q_norm"].data_ptr() if norm else None,
            k_norm=t["k_norm"].data_ptr() if norm else None, norm_eps=1e-6, num_q_heads=hq, num_kv_heads=hkv,
            head_dim=dim, rotary_dim=rotary, page_size=page_size,
        )  # fmt: skip
        return params, t

    def rope_reference(
        self, x: torch.Tensor, norm: torch.Tensor | None, t: dict[str, Any], rotary: int
    ) -> torch.Tensor:
        """x bf16 [tokens, heads, dim] -> fp64."""
        torch = self.torch
        x = x.double()
        if norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
        cos = t["cos"].double()[t["positions"].long()][:, None]
        sin = t["sin"].double()[t["positions"].long()][:, None]
        first, second, rest = x[..., : rotary // 2], x[..., rotary // 2 : rotary], x[..., rotary:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)

    def check_rope_kv_write(self) -> int:
        """Head sizes, rotation, page sizes, padding; returns the number of cases. AssertionError where one fails."""
        torch, cases = self.torch, 0
        shapes = (
            (1, 1, 1, 2, 2, 1), (5, 4, 2, 64, 64, 16), (33, 7, 1, 80, 32, 1), (17, 8, 8, 96, 96, 64),
            (70, 32, 8, 128, 128, 16), (9, 3, 3, 48, 0, 32), (12, 14, 2, 256, 64, 16),
            (3, 5, 1, 34, 34, 5),
        )  # fmt: skip
        for tokens, hq, hkv, dim, rotary, page_size in shapes:
            for norm in (False, True):
                params, t = self.rope_case(tokens, hq, hkv, dim, rotary, page_size, norm)
                padding = tokens - 1 if tokens > 4 else None
                if padding is not None:
                    t["slots"][padding] = -1
                self.call("sapwood_cuda_rope_kv_write", params)
                heads = t["qkv"].view(tokens, hq + 2 * hkv, dim)
                q = self.rope_reference(heads[:, :hq], t["q_norm"], t, rotary)
                k = self.rope_reference(heads[:, hq : hq + hkv], t["k_norm"], t, rotary)
                torch.testing.assert_close(t["q_out"].view(tokens, hq, dim).double(), q, rtol=2**-8, atol=1e-5)
                written = t["slots"] >= 0
                slots = t["slots"][written]
                got = t["pool"][slots // page_size, :, :, slots % page_size]
                torch.testing.assert_close(got[:, 0].double(), k[written], rtol=2**-8, atol=1e-5)
                assert torch.equal(got[:, 1], heads[written][:, hq + hkv :]), "V is not a copy"
                untouched = int(t["pool"].isnan().sum())
                assert untouched == t["pool"].numel() - got.numel(), "rope_kv_write wrote outside its slots"
                cases += 1
        return cases

    # --- Timing -----------------------------------------------------------------------------------------------
    def seconds(self, launch: Callable[[int], None], launches: int = 60) -> float:
        """Median time of one launch(i); i rotates buffers."""
        torch = self.torch
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
        torch = self.torch
        buffers = 8
        source = torch.empty(buffers, 1 << 26, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(source)
        num_bytes = 2 * source[0].nbytes
        ceiling = num_bytes / self.seconds(lambda i, s=source, t=target: t[i % buffers].copy_(s[i % buffers]))
        print(f"{torch.cuda.get_device_name()}: copy bandwidth {ceiling / 1e9:.0f} GB/s (read + write)")
        del source, target
        for rows, hidden in ((64, 4096), (8192, 4096), (8192, 8192)):
            xs = [self.randn(rows, hidden) for _ in range(buffers)]
            ys = [torch.empty(rows, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(buffers)]
            weight = self.randn(hidden)
            calls = [self.rms_norm(x, weight, y, False) for x, y in zip(xs, ys, strict=True)]
            self.report(
                f"rms_norm f32 [{rows}, {hidden}]", xs[0].nbytes + ys[0].nbytes,
                lambda i, calls=calls: self.call("sapwood_cuda_rms_norm", calls[i % buffers]), ceiling,
            )  # fmt: skip
        for tokens in (64, 8192):
            cases = [self.rope_case(tokens, 32, 8, 128, 128, 16, True) for _ in range(buffers)]
            self.report(
                f"rope_kv_write [{tokens}, 32 + 2 x 8 heads of 128]", 2 * cases[0][1]["qkv"].nbytes,
                lambda i, cases=cases: self.call("sapwood_cuda_rope_kv_write", cases[i % buffers][0]), ceiling,
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

    suite = Suite(load_library(library_path.resolve()))
    if args.stage in ("check", "all"):
        print(f"check: rms_norm, {suite.check_rms_norm()} cases equal")
        print(f"check: rope_kv_write, {suite.check_rope_kv_write()} cases equal")
    if args.stage in ("time", "all"):
        suite.time()


if __name__ == "__main__":
    main()
