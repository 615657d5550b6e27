"""Builds sapwood._core (and, where wanted, libsapwood_cuda.so) by driving CMake; pyproject.toml holds everything else.

Environment:
    SAPWOOD_BUILD_CUDA   auto (default: when nvcc and an NVIDIA driver are here) | on | off
    SAPWOOD_CUDA_ARCHS   architectures of libsapwood_cuda.so, as in CMAKE_CUDA_ARCHITECTURES
    SAPWOOD_CUTLASS      where CUTLASS's headers come from: AUTO (default), OFF, or a folder (cuda/cutlass.cmake)
    SAPWOOD_CPU_LEVELS   all (default) | native: of the CPU kernels the portable and this machine's best only,
                         which compiles faster (`make serve`)
    SAPWOOD_BUILD_JOBS   parallel compilations (default: the CPUs this process may use)
    SAPWOOD_BUILD_DIR    a CMake tree that is already configured with SAPWOOD_PYTHON=ON: compile there, so that a
                         developer's tree and the editable install share their objects (`make build`)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str | None:
    """The build requirement of that name (a wheel with a binary in it), else the system's. None where neither is."""
    beside_python = Path(sys.executable).parent / name
    return shutil.which(name) or (str(beside_python) if beside_python.exists() else None)


def cuda_switch() -> str:
    """ON or OFF for CMake's SAPWOOD_CUDA."""
    choice = os.environ.get("SAPWOOD_BUILD_CUDA", "auto").lower()
    if choice not in ("auto", "on", "off"):
        raise SystemExit(f"SAPWOOD_BUILD_CUDA: expected auto, on or off, got {choice!r}")
    if choice == "auto":
        # A driver as well: a CUDA toolkit alone does not mean that this machine will serve on a GPU.
        driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()
        choice = "on" if driver and (shutil.which("nvcc") or os.environ.get("CUDACXX")) else "off"
    return choice.upper()


def num_jobs() -> int:
    """Parallel compilations: SAPWOOD_BUILD_JOBS, else the CPUs this process may run on."""
    if jobs := os.environ.get("SAPWOOD_BUILD_JOBS"):
        return int(jobs)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CMakeBuild(build_ext):
    """Configures and builds the CMake target of each extension into the folder setuptools wants it in."""

    def build_extension(self, ext: Extension) -> None:
        cmake = find_tool("cmake")
        if cmake is None:
            raise SystemExit("building sapwood needs cmake >= 3.22: `pip install cmake ninja`")
        package_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        shared_tree = os.environ.get("SAPWOOD_BUILD_DIR")
        if shared_tree:
            tree = Path(shared_tree).resolve()
            if not (tree / "CMakeCache.txt").exists():
                raise SystemExit(f"SAPWOOD_BUILD_DIR: {tree} is not a configured CMake tree")
        else:
            tree = Path(self.build_temp).resolve()
            self.configure(cmake, tree, package_dir)
        targets = ["_core"] if shared_tree or cuda_switch() == "OFF" else ["_core", "sapwood_cuda"]
        command = [cmake, "--build", str(tree), "--parallel", str(num_jobs()), "--target", *targets]
        subprocess.run(command, check=True)
        built = ROOT / "python" / "sapwood" / Path(self.get_ext_filename(ext.name)).name
        if shared_tree and package_dir != built.parent:
            # That tree keeps building into the checkout; an editable install wants a copy in a folder of its own.
            package_dir.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, package_dir)

    def configure(self, cmake: str, tree: Path, package_dir: Path) -> None:
        import pybind11

        # Every path is passed again each time: a tree that survives from an earlier isolated build remembers tools that
        # are gone.
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "SAPWOOD_PYTHON": "ON",
            "SAPWOOD_PYTHON_DIR": package_dir,
            "SAPWOOD_TESTS": "OFF",
            "SAPWOOD_WERROR": "OFF",
            "SAPWOOD_CPU_LEVELS": os.environ.get("SAPWOOD_CPU_LEVELS", "all"),
            "SAPWOOD_CUDA": cuda_switch(),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if archs := os.environ.get("SAPWOOD_CUDA_ARCHS"):
            options["SAPWOOD_CUDA_ARCHS"] = archs
        command = [cmake, "-S", str(ROOT), "-B", str(tree)]
        ninja = find_tool("ninja")
        if ninja is not None:
            command += ["-G", "Ninja"]
            options["CMAKE_MAKE_PROGRAM"] = ninja
        tree.mkdir(parents=True, exist_ok=True)
        subprocess.run(command + [f"-D{key}={value}" for key, value in options.items()], check=True)


class FreshBuildPy(build_py):
    """Empties build_lib first: setuptools would pack modules into a wheel that were deleted since an earlier build."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "sapwood", ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension("sapwood._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuildPy},
    options={"build": {"build_base": "build-pip"}},
)
