"""Fixtures shared by all tests: the data folder and the tokenizers in it, the CUDA kernels on the CPU."""

from __future__ import annotations

import gzip
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sapwood.program.cuda_library import CudaLibrary

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The project's test data: environment variable SAPWOOD_DATA, or ../shared/data beside the checkout."""
    named = os.environ.get("SAPWOOD_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if named:
            pytest.fail(f"SAPWOOD_DATA names {folder}, which is no directory")
        pytest.skip(f"test data absent: no {folder}; set SAPWOOD_DATA")
    return folder.resolve()


@pytest.fixture(scope="session")
def unpack_tokenizer(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> directory with the tokenizer.json (and tokenizer_config.json) of that family, unpacked once a session."""
    unpacked = tmp_path_factory.mktemp("tokenizers")

    def unpack(name: str) -> Path:
        source, target = data_dir / "tokenizers" / "hf" / name, unpacked / name
        if target.exists():
            return target
        content = json.loads(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
        if name == "llama2":
            # This copy holds three merges of literal spaces, which the one-string form of a merge cannot express and
            # the library refuses. The normaliser leaves no literal space in any text, so they never applied.
            content["model"]["merges"] = [merge for merge in content["model"]["merges"] if merge.count(" ") == 1]
        target.mkdir()
        (target / "tokenizer.json").write_text(json.dumps(content))
        if (source / "tokenizer_config.json").exists():
            shutil.copy(source / "tokenizer_config.json", target)
        return target

    return unpack


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer whose decoder joins tokens by looking at their neighbours (BERT's)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["[UNK]", "[SEP]", "un", "##believ", "##able", "a", "story", ".", "é", "##é", "日", "本", "don", "'", "t"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    folder = tmp_path_factory.mktemp("wordpiece")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def emulated_tree() -> Path:
    """Where tests/cuda is built. It is kept: a second run compiles what has changed."""
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
    return tree


@pytest.fixture(scope="session")
def emulated(emulated_tree: Path) -> CudaLibrary:
    """The CUDA kernels on the CPU."""
    return CudaLibrary(emulated_tree / "libsapwood_cuda_emulated.so")


@pytest.fixture(scope="session")
def cuda_device(request: pytest.FixtureRequest) -> tuple[CudaLibrary, str]:
    """Device "cuda", as cuda.open_device gives it: the GPU, where there is one, else the kernels on the CPU."""
    import torch

    from sapwood.program import cuda

    if torch.cuda.is_available():
        return cuda.open_device()
    return request.getfixturevalue("emulated"), "cpu"
