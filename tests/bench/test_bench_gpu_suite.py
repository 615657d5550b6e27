"""bench/gpu_suite.py and bench/gpu_timings.py without a GPU: every timing case launched by the emulator, processes that
die, what is written; no timing."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
import gpu_suite
import gpu_timings
import torch
from gpu_checks import CHECKS
from gpu_checks.device import Device

from sapwood.errors import SapwoodError
from sapwood.program.cuda_library import OPS, CudaLibrary

SCRIPT = Path(gpu_suite.__file__)
SMALL = {case.name: case for case in gpu_timings.cases(2, gpu_suite.REHEARSAL_SCALE)}
CEILINGS = gpu_timings.Ceilings(1e12, 1e12, 1e14)
LOG = """
ptxas info    : Compiling entry function '_ZN12sapwood_cuda6KernelILi8EEEvi' for 'sm_90a'
ptxas info    : Function properties for _ZN12sapwood_cuda6KernelILi8EEEvi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'other' for 'sm_90a'
    24 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers
"""
ROWS: list[dict[str, Any]] = [
    {"ceilings": {"copy": 4.3e12, "read": 4.1e12, "matmul": 7.9e14}},
    {"name": "a", "us": 12.34, "gbs": 3000.0, "of_copy": 0.7, "target_us": 10.0, "of_target": 0.81,
     "baselines": {"torch": 1.5}, "error": 2e-3, "note": "not | captured"},
    {"name": "b", "us": 5.0, "tflops": 400.0, "of_peak": 0.5, "note": ""},
    {"name": "c", "failure": "died"},
    {"name": "d", "missing": "not reached"},
    {"name": "e", "skipped": "no op"},
]  # fmt: skip


# --- Cases ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SMALL)
def test_every_case_computes_what_torch_does(emulated: CudaLibrary, name: str) -> None:
    case = SMALL[name]
    if not set(case.ops) <= set(OPS):
        pytest.skip("a launcher of this case is not written")
    row = gpu_timings.measure(case, Device(emulated, "cpu"), gpu_timings.WallClock(), CEILINGS, 2)
    assert row["us"] > 0 and row["note"] == ""
    compared = not (name.startswith(("tune", "plan", "moe_align")) or "top_p" in name)
    assert ("error" in row) == compared
    assert row.get("error", 0.0) < 6e-3


def test_cases_are_named_alike_at_every_size() -> None:
    names = [case.name for case in gpu_timings.cases()]
    assert names == list(SMALL) and len(set(names)) == len(names)
    assert not any("," in name or name in CHECKS for name in names)


def test_bytes_are_those_of_the_roofline_table() -> None:
    full = {case.name: case for case in gpu_timings.cases()}
    for name, num_bytes in (
        ("decode bs64 ctx4096", 1.07e9), ("decode bs1 ctx131072", 537e6), ("decode bs8 ctx512", 17e6),
        ("silu_mul 16384x14336", 1.41e9), ("rope_kv_write 16384", 403e6), ("moe_layer T1", 75e6),
        ("moe_layer T64", 1.2e9), ("sample bs256 top_p", 155e6),
    ):  # fmt: skip
        assert full[name].num_bytes == pytest.approx(num_bytes, rel=0.02)
    for name, flops in (("prefill 4x4096", 0.55e12), ("extend 8x512 on 16k", 1.12e12), ("moe_layer T16384", 1.24e12)):
        assert full[name].flops == pytest.approx(flops, rel=0.02)


def test_sets_leave_the_cache_and_fit_the_memory() -> None:
    for case in gpu_timings.cases():
        sets = case.num_sets()
        assert sets * max(case.num_bytes, case.set_bytes) <= gpu_timings.MOST_BYTES
        assert sets == gpu_timings.MOST_SETS or sets * case.num_bytes >= gpu_timings.ROTATE_BYTES

    def nothing(device: Device, sets: int) -> gpu_timings.Work:
        raise NotImplementedError

    assert gpu_timings.Case("a", (), 1e6, 0, nothing, set_bytes=8e9).num_sets() == 2
    assert gpu_timings.Case("a", (), 60e9, 0, nothing).num_sets() == 1


def test_what_fails_in_a_case(emulated: CudaLibrary) -> None:
    """A baseline is a note; our own launch is an error."""

    def wrong(i: int) -> None:
        raise ValueError("two\nlines")

    def good(device: Device, sets: int) -> gpu_timings.Work:
        return gpu_timings.Work(lambda i: torch.ones(2), {"bad": wrong, "half": lambda i: torch.full((2,), 0.5)})

    def bad(device: Device, sets: int) -> gpu_timings.Work:
        case = gpu_timings.rms_norm("", 1, 8, None).make(device, 1)
        device.call("rms_norm", gpu_timings.rms_norm_params(torch.ones(1, 8), torch.ones(8), torch.ones(1, 0), False))
        return case

    device, clock = Device(emulated, "cpu"), gpu_timings.WallClock()
    row = gpu_timings.measure(gpu_timings.Case("a", (), 10, 20, good, 5.0), device, clock, CEILINGS, 1)
    assert row["note"] == "bad: ValueError: two"
    assert set(row["baselines"]) == {"half"} and row["error"] == pytest.approx(1.0)
    assert row["gbs"] * 1e9 == pytest.approx(row["of_copy"] * CEILINGS.copy)
    assert row["tflops"] * 1e12 == pytest.approx(row["of_peak"] * CEILINGS.matmul)
    slower = gpu_timings.H200.copy / CEILINGS.copy  # what moves 10 bytes for 20 operations is bound by memory
    assert row["of_target"] == pytest.approx(5.0 * slower / row["us"])
    with pytest.raises(SapwoodError, match="rms_norm"):
        gpu_timings.measure(gpu_timings.Case("a", (), 10, 20, bad), device, clock, CEILINGS, 1)


class FakeGpu:
    """As much of torch.cuda as GpuClock uses; a launch takes 10 us, a replay 5 us more."""

    def __init__(self, capturable: bool) -> None:
        self.now, self.capturable, self.captured, self.capturing = 0.0, capturable, 0, False

    def launch(self, i: int) -> None:
        if self.capturing and not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.capturing:
            self.captured += 1
        else:
            self.now += 10e-6

    def Stream(self) -> None: ...

    def stream(self, stream: None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self) -> None: ...

    def CUDAGraph(self) -> Any:
        def replay() -> None:
            self.now += 10e-6 * self.captured + 5e-6

        return SimpleNamespace(replay=replay)

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: None) -> Iterator[None]:
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def Event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


def test_gpu_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for capturable, num_sets, seconds in (
        (True, 5, 10e-6 + 5e-6 / 20),
        (True, 40, 10e-6 + 5e-6 / 40),
        (False, 1, 1e-5),
    ):
        gpu = FakeGpu(capturable)
        monkeypatch.setattr(gpu_timings, "torch", SimpleNamespace(cuda=gpu))
        took, captured = gpu_timings.GpuClock().seconds(gpu.launch, num_sets)
        assert took == pytest.approx(seconds) and captured == capturable
        assert gpu.now > gpu_timings.GROUPS * gpu_timings.GROUP_S


# --- The command line -----------------------------------------------------------------------------------------
def test_only_and_stages(capsys: pytest.CaptureFixture[str]) -> None:
    def selected(*arguments: str) -> tuple[list[str], list[str]]:
        return gpu_suite.selected(gpu_suite.parser().parse_args(arguments))

    assert selected() == (list(CHECKS), list(SMALL))
    ops, names = selected("--only", "rms_norm, decode*")
    assert ops == ["rms_norm"]
    assert names[0] == "decode bs64 ctx4096" and names[-1] == "rms_norm 64x4096" and len(names) == 6
    ops, names = selected("--only", "attention")
    assert ops == ["attention"] and "prefill 4x4096" in names and "plan bs64 ctx4096" not in names
    assert selected("--only", "no_such") == ([], [])
    assert gpu_suite.parser().parse_args(["--stage", "time,check"]).stage == ["time", "check"]
    for wrong in (["--stage", "check,tim"], ["--stage", ""], ["--sanitizer", "valgrind"]):
        with pytest.raises(SystemExit) as left:
            gpu_suite.parser().parse_args(wrong)
        assert left.value.code == 2
        assert "argument --" in capsys.readouterr().err


def test_budget() -> None:
    now = 100.0
    budget = gpu_suite.Budget(10, lambda: now)
    assert budget.left() == 10
    now = 107.5
    assert budget.left() == 2.5
    now = 200.0
    assert budget.left() == 0


def test_rehearsal_end_to_end(emulated_tree: Path, tmp_path: Path) -> None:
    """All of it but the build, in processes as on a GPU."""
    command = [sys.executable, str(SCRIPT), "--emulated", str(emulated_tree / "libsapwood_cuda_emulated.so")]
    command += ["--out", str(tmp_path / "out"), "--only", "moe_combine,silu_mul 64*"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    check, timing = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (check["stage"], timing["stage"]) == ("check", "time")
    assert [row["op"] for row in check["rows"]] == ["moe_combine"] and check["rows"][0]["cases"] > 40
    ceilings, *rows = timing["rows"]
    assert set(ceilings["ceilings"]) == {"copy", "read", "matmul"}
    assert [row["name"] for row in rows] == ["silu_mul 64x14336", "moe_layer T1", "moe_layer T64", "moe_layer T16384"]
    assert all(row["us"] > 0 and not row["captured"] for row in rows)
    table = (tmp_path / "out" / "table.md").read_text()
    for said in (table, done.stdout):
        assert "a rehearsal on the CPU" in said and "silu_mul 64x14336" in said and "check: moe_combine" in said


def test_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        gpu_suite.main(["--emulated", str(tmp_path / "none.so"), "--out", str(tmp_path)])
    assert left.value.code == 2
    assert "none.so does not exist" in capsys.readouterr().err
    (tmp_path / "some.so").touch()
    with pytest.raises(SystemExit) as left:
        gpu_suite.main(["--emulated", str(tmp_path / "some.so"), "--only", "no_such", "--out", str(tmp_path / "out")])
    assert left.value.code == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert "no_such: no such op or case" in said and "rms_norm" in said


# --- Processes that die ---------------------------------------------------------------------------------------
def arguments_of(*arguments: str) -> Any:
    return gpu_suite.parser().parse_args(["--emulated", "none.so", *arguments])


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.abort()", "died, killed by SIGABRT"),
        ("import sys; sys.exit('no library')", "died, exit status 1: no library"),
        ("print('no JSON')", "died, exit status 0"),
        ("import time; time.sleep(60)", "no result within 1 s"),
        ('print(\'{"failure": "off by one", "s": 0.1}\')', "off by one"),
    ],
)
def test_check_tells_how_it_failed(
    program: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_suite, "child_command", lambda *_: [sys.executable, "-c", program])
    monkeypatch.setattr(gpu_suite, "CHECK_S", 1.4 if "sleep" in program else 60.0)
    rows = gpu_suite.check_stage(arguments_of(), gpu_suite.Budget(60), ["rms_norm"])
    assert said in rows[0]["failure"]
    assert "check: rms_norm, FAIL" in capsys.readouterr().out
    assert gpu_suite.summarise({"check": rows}) == 1


def test_check_without_time_left() -> None:
    rows = gpu_suite.check_stage(arguments_of(), gpu_suite.Budget(0), ["rms_norm", "silu_mul"])
    assert [row["missing"] for row in rows] == [gpu_suite.NO_TIME] * 2
    assert gpu_suite.summarise({"check": rows}) == 0


# A child that times a, b, c and d, and dies in b; each line is written at once.
CHILD = """
import json, os, sys, time
rows, how = sys.argv[1:]
begun = [json.loads(line)["begin"] for line in open(rows) if "begin" in line] if os.path.exists(rows) else []
with open(rows, "a") as file:
    for name in "abcd":
        if name in begun:
            continue
        print(json.dumps({"begin": name}), file=file, flush=True)
        if name == "b":
            if how == "unfinished":
                file.write('{"name": "b", "u')
                file.flush()
            if how == "hang":
                time.sleep(60)
            os.abort()
        print(json.dumps({"name": name, "us": 1.0}), file=file, flush=True)
"""


@pytest.mark.parametrize("how", ["abort", "unfinished", "hang"])
def test_time_goes_on_behind_a_case_that_dies(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child.py").write_text(CHILD)

    def command(args: Any, kind: str, *more: str) -> list[str]:
        return [sys.executable, str(tmp_path / "child.py"), more[more.index("--rows") + 1], how]

    monkeypatch.setattr(gpu_suite, "child_command", command)
    watch = gpu_suite.watch
    monkeypatch.setattr(gpu_suite, "watch", lambda *arguments: watch(*arguments, case_s=1.5))
    rows = gpu_suite.time_stage(arguments_of(), gpu_suite.Budget(60), list("abcd"))
    assert [row.get("us") for row in rows] == [1.0, None, 1.0, 1.0]
    assert ("no result within" if how == "hang" else "killed by SIGABRT") in rows[1]["failure"]


def test_time_ends_where_no_process_gets_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "child_command", lambda *_: [sys.executable, "-c", "raise SystemExit('no driver')"])
    rows = gpu_suite.time_stage(arguments_of(), gpu_suite.Budget(60), ["a"])
    assert "no driver" in rows[0]["failure"] and rows[1] == {"name": "a", "missing": "not reached"}


def test_time_ends_with_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(
        gpu_suite, "child_command",
        lambda args, kind, *more: [sys.executable, str(tmp_path / "child.py"), more[1], "hang"],
    )  # fmt: skip
    rows = gpu_suite.time_stage(arguments_of(), gpu_suite.Budget(2), list("abcd"))
    assert [row.get("us") for row in rows] == [1.0, None, None, None]
    assert [row.get("missing") for row in rows[1:]] == [gpu_suite.NO_TIME, "not reached", "not reached"]
    assert gpu_suite.summarise({"time": rows}) == 0


def test_a_limit_kills_what_was_started_too(tmp_path: Path) -> None:
    inner = f"import time; time.sleep(1.5); open({str(tmp_path / 'alive')!r}, 'w')"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    assert gpu_suite.run_within(0.7, [sys.executable, "-c", outer]) is None
    time.sleep(1.5)
    assert not (tmp_path / "alive").exists()
    assert gpu_suite.how_it_ended(-signal.SIGSEGV) == "killed by SIGSEGV"


def test_sanitizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stand-in that finds something in one op."""
    args = arguments_of("--sanitizer", "memcheck,racecheck")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_suite.sanitizer_stage(args, gpu_suite.Budget(60), ["silu_mul"]) == []
    assert "not on the PATH" in capsys.readouterr().out
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "assert os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1'\n"
        "bad = sys.argv[2] == 'racecheck' and sys.argv[-1] == 'silu_mul'\n"
        "print('========= COMPUTE-SANITIZER\\n========= a hazard\\n========= SUMMARY:', 'bad' if bad else 'good')\n"
        "sys.exit(99 if bad else 0)\n"
    )
    tool.chmod(0o755)
    rows = gpu_suite.sanitizer_stage(args, gpu_suite.Budget(60), ["silu_mul", "rms_norm"])
    assert [row.get("summary") for row in rows] == ["SUMMARY: good", "SUMMARY: good", None, "SUMMARY: good"]
    assert rows[2]["failure"].startswith("exit status 99: a hazard")
    assert "racecheck: silu_mul, FAIL: exit status 99" in capsys.readouterr().out
    assert gpu_suite.summarise({"sanitizer": rows}) == 1


# --- What is written ------------------------------------------------------------------------------------------
def test_kernel_resources() -> None:
    kernel, other = gpu_suite.kernel_resources(LOG)
    assert "Kernel" in kernel["kernel"] and (kernel["registers"], kernel["shared_bytes"]) == (40, 1024)
    assert kernel["spill_bytes"] == 0 and kernel["arch"] == "sm_90a"
    assert (other["kernel"], other["registers"], other["spill_bytes"]) == ("other", 255, 44)
    assert gpu_suite.kernel_resources("ninja: no work to do.") == []


def test_tables() -> None:
    table = gpu_suite.time_table(ROWS)
    assert table[1] == ["a", "12.3", "3000", "0.70", "", "", "0.81", "torch 1.50x", "2e-03", "not | captured"]
    assert table[2][:6] == ["b", "5.0", "", "", "400.0", "0.50"]
    assert [row[-1] for row in table[3:]] == ["FAIL: died", "NOT RUN: not reached", "skipped: no op"]
    lines = gpu_suite.aligned(table).splitlines()
    assert len(lines) == len(table) and lines[0].index("us") + 2 == lines[1].index("12.3") + 4
    results: dict[str, list[dict[str, Any]]] = {
        "build": gpu_suite.kernel_resources(LOG),
        "check": [{"op": "x", "cases": 3, "s": 1.0}, {"op": "y", "failure": "off", "s": 1.0}],
        "sanitizer": [{"tool": "memcheck", "op": "x", "summary": "0 errors", "s": 2.0}],
        "time": ROWS,
    }
    text = gpu_suite.markdown({"gpu": "some"}, results)
    for said in ("gpu: some", "| other | sm_90a | 255 | 44 | 0 |", "x, 3 cases", "y, FAIL after 1.0 s: off",
                 "memcheck: x, 0 errors", "copy 4300 GB/s", "| not \\| captured |"):  # fmt: skip
        assert said in text
    assert "no ceilings" in gpu_suite.describe_ceilings([])


def test_failures_decide_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.summarise({"build": [], "time": ROWS[:3]}) == 0
    assert capsys.readouterr().out == ""
    assert gpu_suite.summarise({"time": ROWS}) == 1
    assert capsys.readouterr().out == "NOT RUN: time d\nFAILED: time c\n"


def test_results_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    gpu_suite.append_json(path, {"stage": "check"})
    gpu_suite.append_json(path, {"stage": "time"})
    assert json.loads(path.read_text()) == [{"stage": "check"}, {"stage": "time"}]
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a list"):
        gpu_suite.append_json(path, {})
    assert path.read_text() == "{}"


def test_plot(tmp_path: Path) -> None:
    assert not gpu_suite.plot(tmp_path / "none.png", "", ROWS[3:])
    pytest.importorskip("matplotlib")
    assert gpu_suite.plot(tmp_path / "plot.png", "a title", ROWS)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
