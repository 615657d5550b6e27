"""llama.cpp, built for this CPU, and the GGUF files it makes of a checkpoint, which OpenVINO reads too.

The tree is the one inside llama-cpp-python's source package; bench/peers.py calls this with its Workspace.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Final

import machine
from peer_workspace import VERSIONS, PeerError, Workspace

# The converter knows tokenizers by a hash and refuses others, as random checkpoints have; prompts are token ids, so any
# will do. Run by the environment `hf`: argv is the tree, then convert_hf_to_gguf.py's arguments.
CONVERT: Final = """
import sys
tree = sys.argv.pop(1)
sys.path[:0] = [tree, tree + "/gguf-py"]
from conversion import base
recognise = base.TextModel.get_vocab_base_pre
def recognise_or_default(self, tokenizer):
    try:
        return recognise(self, tokenizer)
    except NotImplementedError:
        return "qwen2"
base.TextModel.get_vocab_base_pre = recognise_or_default
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""
# llama-bench and llama-perplexity are for comparisons by hand.
TARGETS: Final = ("llama-server", "llama-quantize", "llama-batched-bench", "llama-bench", "llama-perplexity")
OPTIONS: Final = (
    "CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_UI=OFF", "LLAMA_USE_PREBUILT_UI=OFF",
)  # fmt: skip
CONVERTED: Final = ("bf16", "f16")
FORMS: Final = (*CONVERTED, "q8_0", "q4_0")


def tree(work: Workspace) -> Path:
    return work.environment("llama.cpp") / "source" / "vendor" / "llama.cpp"


def program(work: Workspace, name: str) -> Path:
    return work.environment("llama.cpp") / "build" / "bin" / name


def install(work: Workspace) -> None:
    """Download, unpack and compile, which takes minutes. PeerError where it fails."""
    folder, log = work.environment("llama.cpp"), "llama.cpp-install"
    package = f"llama-cpp-python=={VERSIONS['llama-cpp-python']}"

    def fill() -> None:
        work.run(
            [work.python("llama.cpp"), "-m", "pip", "download", "--disable-pip-version-check", "--progress-bar", "off",
             "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder / "download", package],
            log,
        )  # fmt: skip
        (archive,) = (folder / "download").glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder / "unpacked", filter="data")
        (source,) = (folder / "unpacked").iterdir()
        source.rename(folder / "source")
        build = folder / "build"
        work.run(["cmake", "-S", tree(work), "-B", build, *(f"-D{option}" for option in OPTIONS)], log)
        jobs = str(machine.num_usable_cpus())
        work.run(["cmake", "--build", build, "--parallel", jobs, "--target", *TARGETS], log)

    work.install_torch()
    work.install("llama.cpp", (package, *OPTIONS), fill)
    for needed in (program(work, "llama-server"), tree(work) / "convert_hf_to_gguf.py"):
        if not needed.exists():
            raise PeerError(f"{needed} does not exist; name another --env llama.cpp=DIR")


def gguf(work: Workspace, checkpoint: Path, form: str) -> Path:
    """The checkpoint as a GGUF file of a form of FORMS; q4_0's LM head is q6_K, as llama-quantize chooses."""
    log = f"gguf-{form}"

    def convert(path: Path) -> None:
        work.run(
            [work.python("hf"), "-c", CONVERT, tree(work), checkpoint, "--outtype", form, "--outfile", path], log,
            append=False,
        )  # fmt: skip

    def quantize(path: Path) -> None:
        source = gguf(work, checkpoint, "bf16")
        work.run([program(work, "llama-quantize"), source, path, form], log, append=False)

    return work.make(work.weights(checkpoint) / f"{form}.gguf", convert if form in CONVERTED else quantize)
