"""bench/compare.py against fake peers: what is measured, in which order, what is kept, and what is reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import compare
import compare_report
import generations
import make_model
import peer_process
import peers
import pytest
import serving
from fake_peer import FakePeer, fake_peers
from peer_workspace import PeerError
from workloads import Request, Vocabulary

CEILINGS: dict[str, float | None] = {"read": 20.0, "fp32": 300.0, "bf16": None, "int8": 1000.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model.make_model("tiny", folder)
    return folder


class Bench:
    """Runs of compare.py against `peers.PEERS = fake_peers(...)`, results and starts in one folder."""

    def __init__(self, folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.checkpoint, self.monkeypatch = folder, checkpoint, monkeypatch
        monkeypatch.setattr(compare, "measure_ceilings", lambda: dict(CEILINGS))
        monkeypatch.setenv("FAKE_PEER_STARTS", str(folder / "starts"))
        self.with_peers()

    def with_peers(self, *added: peers.Peer) -> None:
        self.monkeypatch.setattr(peers, "PEERS", fake_peers(*added))

    def run(self, *options: str) -> int:
        """Exit status."""
        arguments = [str(self.checkpoint), "--work-dir", str(self.folder / "work"), "--out", str(self.folder / "out")]
        self.monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, *options])
        return compare.main()

    def results(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "out" / "compare.json").read_text())
        return found

    def starts(self) -> list[str]:
        """Modes of the servers started so far."""
        file = self.folder / "starts"
        return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def bench(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, tiny, monkeypatch)


# --- figures
def generation(prompt_len: int, start: float, times: list[float], tokens: int | None = None) -> generations.Generation:
    found = generations.Completion(Request([1] * prompt_len, prompt_len, tokens or len(times)))
    found.start_time, found.chunk_times, found.output_tokens = start, times, tokens or len(times)
    found.ended = True
    return found


def test_figures() -> None:
    # Gaps of 0.1 and 0.2 s, after 0.5 and 1 s.
    one, two = generation(100, 0.0, [0.5, 0.6, 0.7]), generation(100, 2.0, [3.0, 3.2, 3.4])
    load = serving.Load([one, two], duration=4.0, client_cpu_s=0.1)
    assert compare.stream_rate(load) == pytest.approx((10 + 5) / 2)
    assert compare.prefill_rate(load) == pytest.approx((200 + 100) / 2)
    assert compare.output_rate(load) == pytest.approx(6 / 4)


def test_joint_rate_counts_while_all_generate() -> None:
    # All generate from 2 to 4; within it come 2 chunks of the first, which carry 2 tokens each, and 4 of the second.
    first = generation(1, 0.0, [1, 2, 3, 4], tokens=8)
    second = generation(1, 0.0, [2, 2.5, 3, 3.5, 4, 4.5])
    assert compare.joint_rate(serving.Load([first, second], 4.0, 0.0)) == pytest.approx((2 * 2 + 4) / 2)
    late = generation(1, 0.0, [4, 5])
    with pytest.raises(PeerError, match="2 streams never generated all at once"):
        compare.joint_rate(serving.Load([first, late], 5.0, 0.0))


def test_prompts_are_the_same_for_every_engine_and_new_in_each_round() -> None:
    def prompts(seed: int, round_: int, which: int) -> list[Any]:
        made = compare.Prompts(Vocabulary(vocab_size=1000), seed, round_).random(which, 4, 8, 2, prefix_len=6)
        assert all(len(request.prompt) == 14 and request.prompt[:6] == made[0].prompt[:6] for request in made)
        return [request.prompt for request in made]

    assert prompts(0, 0, 4) == prompts(0, 0, 4)
    assert len({str(prompts(*which)) for which in ((0, 0, 4), (0, 1, 4), (1, 0, 4), (0, 0, 5))}) == 4


def test_each_measure_asks_what_it_says() -> None:
    asked: list[tuple[int, int, int, int]] = []
    seen: list[Any] = []

    def ask(requests: Any, max_concurrency: int) -> serving.Load:
        asked.append((len(requests), len(requests[0].prompt), requests[0].output_len, max_concurrency))
        seen.extend(requests)
        ended = [generation(r.prompt_len, 0.0, [1.0 + i for i in range(r.output_len)]) for r in requests]
        return serving.Load(ended, 2.0, 0.5)

    prompts = compare.Prompts(Vocabulary(vocab_size=1000), 0, 0)
    found = {measure: run(ask, prompts) for measure, run in compare.MEASURES.items()}
    assert asked == [
        (2, 32, 64, 1), (16, 32, 64, 16), (2, 1024, 1, 1), (16, 128, 128, 16), (16, 1056, 16, 16), (16, 1056, 16, 16),
    ]  # fmt: skip
    assert all(set(values) == set(compare.GIVES[measure]) for measure, values in found.items())
    assert found["closed-loop"] == {"closed-loop": 16 * 128 / 2, "client-cpu": 1e6 * 0.5 / (16 * 128)}
    cold, warm = seen[-32:-16], seen[-16:]
    assert len({tuple(request.prompt[:1024]) for request in cold + warm}) == 1
    assert len({tuple(request.prompt[1024:]) for request in cold + warm}) == 32
    names = [column.name for column in compare_report.COLUMNS]
    assert set(names) == {name for given in compare.GIVES.values() for name in given}


# --- runs
def test_engines_alternate_and_all_is_reported(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.with_peers(FakePeer("other", "good"))
    # The fake is too fast for 16 streams to generate all at once.
    measures = ["prefill", "closed-loop", "shared-prefix", "start"]
    options = ("--repeats", "2", "--peers", "good,other", "--precisions", "bf16", "--measures", ",".join(measures))
    assert bench.run(*options) == 0
    results = bench.results()
    order = ["sapwood:good", "good:good", "other:good"]
    assert [(entry["engine"], entry["round"]) for entry in results["rounds"]] == [
        (engine, round_) for round_ in (0, 1) for engine in order
    ]
    every = {name for measure in measures for name in compare.GIVES[measure]}
    for entry in results["rounds"]:
        assert set(entry["values"]) == every and all(value > 0 for value in entry["values"].values())
        assert entry["values"]["ready"] < entry["values"]["first-token"]
    assert [ceilings["round"] for ceilings in results["ceilings"]] == [0, 1]
    out = capsys.readouterr()
    for name in order:
        assert f"round 2: {name}: ready " in out.err
        assert name in out.out and name in (bench.folder / "out" / "compare.md").read_text()
    assert "good 0.1" in out.out and "read 20, fp32 300, int8 1000" in out.out
    assert len(bench.starts()) == 6


def test_a_later_run_measures_what_is_missing(bench: Bench) -> None:
    base = ("--peers", "good", "--precisions", "bf16")
    assert bench.run(*base, "--repeats", "1", "--measures", "prefill") == 0
    assert bench.run(*base, "--repeats", "1", "--measures", "prefill") == 0
    assert len(bench.starts()) == 2
    before = {entry["engine"]: entry["values"]["prefill"] for entry in bench.results()["rounds"]}
    # Another measure joins the same round, and what was measured stays.
    assert bench.run(*base, "--repeats", "1", "--measures", "prefill,start") == 0
    rounds = bench.results()["rounds"]
    assert len(bench.starts()) == 4 and len(rounds) == 2
    assert all(set(entry["values"]) == {"prefill", "ready", "first-token"} for entry in rounds)
    assert {entry["engine"]: entry["values"]["prefill"] for entry in rounds} == before
    # One more round of one engine.
    assert bench.run("--engines", "good:good", "--repeats", "2", "--measures", "prefill") == 0
    assert len(bench.starts()) == 5
    assert [(e["engine"], e["round"]) for e in bench.results()["rounds"]][-1] == ("good:good", 1)
    assert bench.run("--engines", "good:good", "--repeats", "1", "--measures", "prefill", "--fresh") == 0
    assert sorted((e["engine"], e["round"]) for e in bench.results()["rounds"]) == [
        ("good:good", 0),
        ("sapwood:good", 0),
    ]
    assert bench.run("--engines", "good:good", "--report-only") == 0
    assert len(bench.starts()) == 6


def test_one_that_fails_leaves_the_others(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.with_peers(FakePeer("dying", "dies"), FakePeer("absent", "good"), FakePeer("lying", "short"))
    options = ("--peers", "absent,dying,lying,good", "--precisions", "bf16", "--repeats", "2", "--measures", "prefill")
    assert bench.run(*options) == 1
    results = bench.results()
    assert {entry["engine"] for entry in results["rounds"]} == {"sapwood:good", "good:good"}
    assert len(results["rounds"]) == 4
    assert set(results["failures"]) == {"absent:good", "dying:dies", "lying:short"}
    assert bench.starts().count("dies") == 1  # it has no second turn
    out = capsys.readouterr()
    assert (
        "dying:dies FAILED: the process ended with exit status 3" in out.err and "  | no such file: weights" in out.err
    )
    assert "absent:good FAILED: there is no such package" in out.err
    assert "FAILED dying:dies: the process ended with exit status 3" in out.out
    # Mended, its failure is forgotten.
    bench.with_peers(FakePeer("dying", "good"))
    assert bench.run("--peers", "dying", *options[2:]) == 0
    assert "dying:dies" in bench.results()["failures"]
    assert bench.run("--engines", "dying:good", "--fresh", *options[4:]) == 0
    assert "dying:good" not in bench.results()["failures"]


def test_what_an_engine_gave_before_it_failed_is_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.with_peers(FakePeer("slow", "hangs"))
    monkeypatch.setattr(compare, "warm_up", lambda ask, prompts: None)
    options = ("--engines", "slow:hangs", "--repeats", "1", "--measures", "prefill,closed-loop,start")
    assert bench.run(*options, "--measure-timeout", "3") == 1
    results = bench.results()
    assert set(results["rounds"][0]["values"]) == {"ready", "first-token", "prefill"}
    assert "a measurement took longer than 3 s" in results["failures"]["slow:hangs"]


def test_engines_without_shared_prefixes_are_not_asked_for_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = FakePeer("alone", "good")
    peer.measures = peers.MEASURES - {"shared-prefix"}  # type: ignore[misc]
    bench.with_peers(peer)
    assert bench.run("--engines", "alone:good", "--repeats", "1", "--measures", "start,shared-prefix") == 0
    assert bench.run("--engines", "alone:good", "--repeats", "1", "--measures", "start,shared-prefix") == 0
    assert set(bench.results()["rounds"][0]["values"]) == {"ready", "first-token"} and len(bench.starts()) == 1


class Measuring(peers.SelfMeasuring):
    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]
        self.measures = frozenset({"decode", "prefill"})  # type: ignore[misc]

    def forms(self, precision: str, has_bf16: bool) -> tuple[str, ...]:
        return ("good",)

    def install(self, work: Any) -> None: ...

    def weights(self, work: Any, checkpoint: Path, form: str) -> Path:
        return checkpoint

    def version(self, work: Any) -> str:
        return "7"

    def figures(self, work: Any, weights: Path, measure: str, setup: Any, timeout_s: float) -> dict[str, float]:
        if measure == "prefill" and self.name == "broken":
            raise PeerError("it fell over")
        return dict.fromkeys(compare.GIVES[measure], 5.0)


def test_one_that_measures_itself(bench: Bench) -> None:
    bench.with_peers(Measuring("itself"), Measuring("broken"))
    options = ("--repeats", "2", "--measures", "start,decode,prefill")
    assert bench.run("--engines", "itself:good", *options) == 0
    assert bench.starts() == []
    assert [entry["values"] for entry in bench.results()["rounds"]] == [
        {"decode-1": 5.0, "decode-16": 5.0, "prefill": 5.0}
    ] * 2
    assert bench.run("--engines", "broken:good", *options) == 1
    assert bench.results()["failures"] == {"broken:good": "it fell over"}


def test_noisy_turns_are_measured_again(bench: Bench) -> None:
    options = ("--engines", "good:good", "--repeats", "2", "--measures", "start")
    assert bench.run(*options) == 0
    results = bench.results()
    for entry, others in zip(results["rounds"], (10.1, 9.9), strict=True):
        entry["others_percent"], entry["values"]["ready"] = others, 77.0
    (bench.folder / "out" / "compare.json").write_text(json.dumps(results))
    assert bench.run(*options, "--fresh", "noisy") == 0
    assert len(bench.starts()) == 3
    left = {entry["round"]: entry["values"]["ready"] for entry in bench.results()["rounds"]}
    assert left[0] != 77.0 and left[1] == 77.0


def test_results_of_another_machine_are_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run("--engines", "good:good", "--repeats", "1", "--measures", "start") == 0
    assert bench.run("--engines", "good:good", "--threads", "97") == 2
    assert "name another --out" in capsys.readouterr().err


def test_install_only_starts_nothing(bench: Bench) -> None:
    bench.with_peers(FakePeer("absent", "good"))
    assert bench.run("--peers", "good", "--install-only") == 0
    assert bench.run("--peers", "good,absent", "--install-only") == 1
    assert bench.starts() == []


def test_lock_is_held_while_measuring(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = bench.folder / "lock"
    held: list[bool] = []

    def is_held() -> bool:
        command = ["flock", "--nonblock", str(lock), "true"]
        return subprocess.run(command).returncode != 0

    def measure(ask: Any, prompts: Any) -> dict[str, float]:
        held.append(is_held())
        return {"prefill": 1.0}

    monkeypatch.setattr(compare, "MEASURES", {"prefill": measure})
    options = ("--engines", "good:good", "--repeats", "1", "--measures", "prefill")
    assert bench.run(*options, "--lock", str(lock)) == 0
    assert bench.run(*options, "--fresh") == 0
    assert held == [True, False] and not is_held()


def test_waits_until_others_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = os.cpu_count() or 1
    now, busy, slept = [0.0], iter([0.0, 2.0 * cpus, 2.0 * cpus, 2.1 * cpus]), []
    monkeypatch.setattr(peer_process, "busy_seconds", lambda: next(busy))

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    clock = types.SimpleNamespace(
        monotonic=lambda: now[0], perf_counter=lambda: now[0], process_time=lambda: 0.0, sleep=sleep
    )
    monkeypatch.setattr(compare, "time", clock)
    monkeypatch.setattr(peer_process, "time", clock)
    compare.wait_quiet(0.0)
    compare.wait_quiet(100.0)
    assert slept == [3.0, 3.0]  # two thirds of the CPUs, then a thirtieth
    busy = iter([0.0, 9.0 * cpus, 9.0 * cpus, 20.0 * cpus])
    compare.wait_quiet(4.0)
    assert slept == [3.0] * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--peers", "nobody"), "unknown name 'nobody'; known: llama.cpp,llama-batched-bench,vllm,openvino,hf"),
        (("--engines", "vllm:q4_0"), "unknown name 'vllm:q4_0'"),
        (("--measures", "decode,speed"), "known: decode,prefill,closed-loop,shared-prefix,start"),
        (("--precisions", "int3"), "known: bf16,int8,int4"),
        (("--repeats", "0"), "expected a number of at least 1, got '0'"),
        (("--env", "vllm"), "expected PEER=DIR"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", "/model", *options])
    with pytest.raises(SystemExit):
        compare.main()
    assert words in capsys.readouterr().err


def test_no_checkpoint(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.checkpoint = bench.folder / "nothing"
    assert bench.run() == 2
    assert "nothing has no *.safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_no_server_and_keeps_what_it_has(tiny: Path, tmp_path: Path, how: signal.Signals) -> None:
    """While the second engine hangs in a measure, in a process of its own."""
    bench = Path(compare.__file__).parent
    code = f"""
import sys
sys.path[:0] = [{str(bench)!r}, {str(Path(__file__).parent)!r}]
import compare, peers, fake_peer
peers.PEERS = fake_peer.fake_peers(fake_peer.FakePeer("slow", "hangs"))
compare.measure_ceilings = lambda: {CEILINGS!r}
compare.warm_up = lambda ask, prompts: None
sys.exit(compare.main())
"""
    command = [sys.executable, "-c", code, str(tiny), "--work-dir", str(tmp_path / "work"), "--out", str(tmp_path),
               "--engines", "good:good,slow:hangs", "--measures", "closed-loop", "--repeats", "1"]  # fmt: skip
    environment = {**os.environ, "FAKE_PEER_STARTS": str(tmp_path / "starts")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell starts background jobs
    ) as run:  # fmt: skip
        assert run.stderr is not None
        for line in run.stderr:
            if "slow:hangs: closed-loop" in line:
                break
        run.send_signal(how)
        out, err = run.communicate()
    assert run.returncode == 130, err
    assert "interrupted: the same command continues" in err and "good:good" in out
    assert [entry["engine"] for entry in json.loads((tmp_path / "compare.json").read_text())["rounds"]] == ["good:good"]
    pids = [int(line.split()[1]) for line in (tmp_path / "starts").read_text().splitlines()]
    assert len(pids) == 2 and not any(peer_process.group_members(pid) for pid in pids)


# --- report
def crafted() -> dict[str, Any]:
    """Results of Sapwood and two peers at bf16, and of one peer at int8."""
    values = {
        "sapwood:bf16": [{"decode-1": 10.0, "ready": 2.0}, {"decode-1": 12.0, "ready": 2.0}, {"decode-1": 11.0}],
        "llama.cpp:f16": [{"decode-1": 22.0, "ready": 4.0, "client-cpu": 30.0}],
        "hf:float32": [{"decode-1": 5.5, "ready": 8.0}],
        "vllm:w8a8": [{"decode-1": 333.4, "ready": 100.0}],
    }
    rounds = [
        {"engine": engine, "round": i, "values": of, "others_percent": 40.0 if engine == "hf:float32" else 1.0}
        for engine, turns in values.items()
        for i, of in enumerate(turns)
    ]
    about = {
        engine: {"precision": "int8" if engine == "vllm:w8a8" else "bf16", "version": "1", "in_process": "hf" in engine}
        for engine in ("llama.cpp:f16", "hf:float32", "sapwood:bf16", "vllm:w8a8")
    }
    return {
        "identity": {"checkpoint": "model", "cpu": "a CPU", "threads": 2}, "rounds": rounds, "about": about,
        "failures": {"openvino:f16": "no such device\n  | more"},
    }  # fmt: skip


LIMITS = {"bf16": {"decode-1": 25.0}, "int8": {}, "int4": {}}


def test_table() -> None:
    text = compare_report.table(crafted(), CEILINGS, LIMITS, markdown=False)
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert "11.0 ±9% 1.00/0.50" in rows["sapwood:bf16"] and "2.00 ±0% 1.00/2.00" in rows["sapwood:bf16"]
    assert "22.0 ±0% 2.00/1.00" in rows["llama.cpp:f16"] and "4.00 ±0% 0.50/1.00" in rows["llama.cpp:f16"]
    assert "30.0 ±0%" in rows["llama.cpp:f16"] and "30.0 ±0% " not in rows["llama.cpp:f16"].rstrip() + "|"
    assert "5.50 ±0% 0.50/0.25" in rows["hf:float32"] and rows["hf:float32"].startswith("hf:float32 *")
    assert "333 ±0% -/1.00" in rows["vllm:w8a8"]
    assert text.index("sapwood:bf16") < text.index("llama.cpp:f16") < text.index("vllm:w8a8")
    assert "25.0" in text.splitlines()[2] and "prefill" not in text
    assert "NOISY: in 1 of 6 turns others used more than 10 % of the CPUs" in text
    assert "FAILED openvino:f16: no such device" in text and "more\n" not in text
    markdown = compare_report.table(crafted(), CEILINGS, LIMITS, markdown=True)
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and table[1].startswith("|---|")
    assert "## 8 bit" in markdown


def test_short() -> None:
    assert [compare_report.short(v) for v in (0.123, 9.994, 9.996, 99.94, 99.96, 12345.6)] == [
        "0.12", "9.99", "10.0", "99.9", "100", "12346",
    ]  # fmt: skip


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is optional: pip install matplotlib")
    compare_report.draw(crafted(), LIMITS, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    compare_report.draw({**crafted(), "rounds": []}, LIMITS, tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()


def test_without_matplotlib(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.run("--engines", "good:good", "--repeats", "1", "--measures", "start") == 0
    assert "matplotlib is not installed; `pip install matplotlib`" in capsys.readouterr().err
    assert (bench.folder / "out" / "compare.md").exists()


def test_ceilings_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fake(*_: Any) -> Any:
        calls.append(1)
        return types.SimpleNamespace(median=lambda kind: CEILINGS[kind])

    monkeypatch.setattr(compare.machine.ceilings, "__wrapped__", fake)
    assert compare.measure_ceilings() == compare.measure_ceilings() == CEILINGS
    assert len(calls) == 2
