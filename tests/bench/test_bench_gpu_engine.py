"""The stages host and engine of bench/gpu_suite.py without a GPU: every case on the emulator, the rules that judge what
they find, processes that die, packages that are missing; no timing."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
import gpu_engine
import gpu_host
import gpu_peers
import gpu_steps
import gpu_suite
import gpu_tokens
import make_model
import numpy as np
import torch

from sapwood import Engine
from sapwood.program import cuda
from sapwood.program.cuda_library import CudaLibrary

SCRIPT = Path(gpu_suite.__file__)
MakeBench = Callable[..., gpu_steps.Bench]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def make_bench(
    emulated: CudaLibrary, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeBench]:
    """A rehearsal, whose rows go to rows.jsonl. What it does to device "cuda" ends with the test."""
    monkeypatch.setattr(cuda, "open_device", cuda.open_device)

    def make(known: Any = ()) -> gpu_steps.Bench:
        return gpu_steps.Bench(emulated, tmp_path / "rows.jsonl", models, emulated=True, known=known)

    yield make


def told(bench: gpu_steps.Bench) -> dict[str, dict[str, Any]]:
    """Rows by name, none of which is a failure."""
    assert [row for row in bench.known if "failure" in row] == []
    return {row["name"]: row for row in bench.known if "name" in row}


# --- Every case -----------------------------------------------------------------------------------------------
def test_completion(make_bench: MakeBench) -> None:
    bench = make_bench()
    gpu_host.completion(bench)
    rows = told(bench)
    for mode in ("host_function", "event"):
        for loop in ("asyncio", "uvloop"):
            row = rows[f"{mode}, {loop}"]
            assert row["steps"] == 30 and 0 < row["p50_us"] <= row["value"] <= row["max_us"]
            assert ("target" in row) == (mode == "host_function")
        assert f"another stream, {mode}" in rows
    assert "host functions are" in rows["decision"]["note"]


def test_host_steps(make_bench: MakeBench) -> None:
    bench = make_bench()
    gpu_host.steps(bench)
    gpu_host.copies(bench)
    rows = told(bench)
    for count in (1, 4, 8):
        assert rows[f"replay {count}, 2 layers"]["value"] > 0 and rows[f"launches {count}, 2 layers"]["value"] > 0
        packer, forward, thread = (rows[f"{part} {count}"]["value"] for part in ("packer", "forward", "thread"))
        assert 0 < packer < forward < thread
    assert rows["plan to device, 64 KB"]["value"] > 0 and rows["result to host, 1 KB"]["value"] > 0


@pytest.mark.slow
def test_tokens(make_bench: MakeBench) -> None:
    bench = make_bench()
    gpu_tokens.tokens(bench)
    rows = told(bench)
    for name in ("tokens llama", "tokens, no graphs", "tokens, no overlap", "tokens, small graphs",
                 "tokens, reference attention", "tokens, small pool", "tokens, deterministic"):  # fmt: skip
        assert rows[name]["tokens"] >= 20 and rows[name]["value"] > 0.8  # near ties
    for name in ("alone", "prefix hits", "no graphs", "no overlap", "other chunks"):
        assert rows[f"deterministic, {name}"]["value"] == 1
    assert rows["tokens llama, prefix hits"]["cached_tokens"] > 0
    assert rows["tokens llama"]["ways"]["decode graph"] > 0 and rows["tokens llama"]["ways"]["run graphs"] > 0
    assert rows["tokens, small pool"]["retractions"] > 0


def test_families(make_bench: MakeBench) -> None:
    bench = make_bench()
    gpu_tokens.other_families(bench)
    assert set(told(bench)) == {"tokens mistral-window", "tokens mistral-window, prefix hits"}


@pytest.mark.parametrize("family", gpu_tokens.families(SimpleNamespace(pick=lambda real, rehearsed: real)))
def test_every_family_loads(family: str, tmp_path: Path) -> None:
    """The shapes that a rehearsal leaves out, too."""
    shape = gpu_tokens.families(SimpleNamespace(pick=lambda real, rehearsed: real))[family]
    with Engine(gpu_steps.write_model(tmp_path, shape), skip_tokenizer_init=True, max_total_tokens=256) as engine:
        answer = engine.generate([1, 2, 3], {"max_new_tokens": 2, "temperature": 0, "return_logprob": True})
        assert engine.model.program.act == "bfloat16"
    # Far from flat: a flat one has every token at -log(vocabulary).
    assert max(answer.logprobs) > 1.5 - np.log(shape["vocab_size"])


@pytest.mark.slow
def test_speed(make_bench: MakeBench) -> None:
    bench = make_bench()
    gpu_engine.ceilings(bench)
    gpu_engine.speed(bench)
    next(case for case in gpu_engine.CASES if case.name == "no graphs").run(bench)
    rows = told(bench)
    assert "KV pool" not in rows["start: weights, graphs"]["note"]  # which is said of a GPU's memory alone
    assert rows["start: weights, graphs"]["imported_s"] > 0 and "weights" in rows["start: weights, graphs"]["note"]
    copy = 1e9 * rows["copy bandwidth"]["value"]
    cost = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 160) * 4 + 2 * 1024 * 64  # four layers and the head, bfloat16
    for count, context_len in ((1, 16), (4, 32), (8, 32)):
        row, share = rows[f"decode {count}"], rows[f"decode {count}: of copy"]
        kv_bytes = count * (context_len + 6) * 4 * 2 * 2 * 16 * 2
        assert share["least_ms"] == pytest.approx(1e3 * (cost + kv_bytes) / copy, rel=0.01)
        assert share["value"] == pytest.approx(share["least_ms"] / row["step_ms"])
        assert row["step_ms"] == pytest.approx(1e3 * count / row["value"])
        assert 0 < row["device_ms"] and 0 <= rows[f"decode {count}: idle"]["value"] < 1
        assert rows[f"host {count}: plan, commit"]["value"] > 0
    assert {row["name"] for row in rows.values() if "target" in row} == {
        "decode 1: of copy", "decode 4: idle", "host 4: plan, commit"
    }  # fmt: skip
    assert rows["prefill 96: of peak"]["value"] > 0 and rows["prefill 4x32"]["value"] > 0
    assert "of the default" in rows["decode 4, no graphs"]["note"] and "decode 8, no graphs" not in rows


def test_torch_decoder(make_bench: MakeBench) -> None:
    bench = make_bench([{"name": "decode 1", "value": 5.0}])
    gpu_peers.torch_decoder(bench)
    rows = told(bench)
    assert rows["torch: decode 1"]["ours_over_this"] == pytest.approx(5 / rows["torch: decode 1"]["value"])
    assert rows["torch: prefill 96"]["value"] > 0 and "ours_over_this" not in rows["torch: prefill 96"]


@torch.inference_mode()
def test_torch_decodes_what_it_prefills() -> None:
    """Token by token over the cache, it says what it says of all at once."""
    torch.manual_seed(3)
    decoder = gpu_peers.Decoder(gpu_steps.tiny(make_model.SHAPES["llama-3.1-8b"]), 24, "cpu")
    tokens = torch.randint(0, 1024, (20,))
    at_once = [int(decoder.forward(tokens[:n], torch.arange(n), None)) for n in range(1, 21)]
    decoder.cache.fill_(float("inf"))
    decoder.cache.zero_()
    one_by_one = []
    for token in tokens:
        decoder.token.fill_(int(token))
        decoder.step()
        one_by_one.append(int(decoder.token))
    assert sum(a != b for a, b in zip(at_once, one_by_one, strict=True)) <= 1  # a near tie in bfloat16
    assert len(set(at_once)) > 10


def test_torch_turns_by_distance() -> None:
    """Positions moved by the same leave q k^T as it was, and a turn leaves lengths."""
    decoder = gpu_peers.Decoder(gpu_steps.tiny(make_model.SHAPES["llama-3.1-8b"]), 64, "cpu")
    angles = torch.arange(64)[:, None] * torch.rand(8, dtype=torch.float64)
    decoder.cos, decoder.sin = torch.cos(angles), torch.sin(angles)
    q, k = torch.randn(2, 9, 16, dtype=torch.float64)
    at = torch.arange(9)
    here, there = (decoder.turn(q, at + n) @ decoder.turn(k, at + n).T for n in (0, 40))
    assert torch.allclose(here, there) and not torch.allclose(here, q @ k.T)
    assert torch.allclose(decoder.turn(q, at).norm(dim=1), q.norm(dim=1))


def test_transformers(make_bench: MakeBench) -> None:
    """A peer that cannot run here is said to have been left out, with its words; that is no failure of ours."""
    pytest.importorskip("transformers")
    bench = make_bench()
    gpu_peers.transformers_batching(bench)
    rows = told(bench)
    assert set(rows) == {"transformers: decode 1", "transformers: decode 4"}
    assert all(row.get("value", 0) > 0 or row["skipped"].startswith("transformers 5.") for row in rows.values())


def test_flashinfer_is_named_where_it_is_missing(make_bench: MakeBench) -> None:
    if not gpu_suite.lacks("flashinfer"):
        pytest.skip("flashinfer is installed")
    bench = make_bench()
    gpu_tokens.flashinfer(bench)
    assert any("needs FlashInfer" in row.get("failure", "") for row in bench.known)


# --- The rules ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def oracle(models: Path) -> Iterator[gpu_tokens.Oracle]:
    folder = gpu_steps.write_model(models / "llama", gpu_steps.tiny(make_model.SHAPES["llama-3.1-8b"]))
    with gpu_tokens.Oracle(folder) as oracle:
        yield oracle


@pytest.fixture
def work(make_bench: MakeBench) -> gpu_tokens.Workload:
    return gpu_tokens.Workload.of(make_bench(), 1024)


def second_best(oracle: gpu_tokens.Oracle, seen: list[int], best: int) -> tuple[int, float]:
    params = {"temperature": 0, "max_new_tokens": 1, "min_new_tokens": 1, "stop_token_ids": [best], "ignore_eos": True}
    output = oracle.engine.generate(seen, {**params, "return_logprob": True})
    return output.token_ids[0], output.logprobs[0]


def test_the_oracle_agrees_with_itself(oracle: gpu_tokens.Oracle, work: gpu_tokens.Workload) -> None:
    found = oracle.compare(work, gpu_tokens.ask(oracle.engine, work.prompts, work.params))
    assert found.num_tokens == found.num_equal == 20 and found.num_drawn == 10
    assert found.worst_logprob == 0 and found.verdict() == []


def test_a_wrong_token_is_found_and_what_follows_it_is_not_blamed(
    oracle: gpu_tokens.Oracle, work: gpu_tokens.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = gpu_tokens.ask(oracle.engine, work.prompts, work.params)
    prompt, ours = work.prompts[0], answers[0]
    best, best_logprob = ours.tokens[1], ours.logprobs[1]
    token, logprob = second_best(oracle, prompt + ours.tokens[:1], best)
    assert logprob < best_logprob
    goes_on = gpu_tokens.ask(
        oracle.engine, [[*prompt, ours.tokens[0], token]], [gpu_tokens.changed(work.params[0], max_new_tokens=3)]
    )[0]
    answers[0] = gpu_tokens.Answer(
        [ours.tokens[0], token, *goes_on.tokens], [ours.logprobs[0], logprob, *goes_on.logprobs]
    )
    gap = best_logprob - logprob
    for tolerance, near in ((gap * 0.99, False), (gap * 1.01, True)):
        monkeypatch.setattr(gpu_tokens, "LOGPROB_TOLERANCE", tolerance)
        found = oracle.compare(work, answers)
        assert (found.num_equal, found.num_near) == (19, int(near))
        assert (found.verdict() == []) == near
    assert found.worst_logprob == 0
    answers[0].tokens[1] = (best + 1) % 1024  # none of the likely ones
    assert any("token 1 is" in wrong for wrong in oracle.compare(work, answers).verdict())


def test_what_else_the_oracle_finds(oracle: gpu_tokens.Oracle, work: gpu_tokens.Workload) -> None:
    answers = gpu_tokens.ask(oracle.engine, work.prompts, work.params)
    answers[2].logprobs[3] += 0.2
    assert "off by 0.200" in oracle.compare(work, answers).verdict()[0]
    answers[2].logprobs[3] -= 0.2
    answers[2].tokens.pop()
    assert "4 tokens, not 5" in oracle.compare(work, answers).verdict()[0]
    other_seeds = [gpu_tokens.changed(p, seed=None if p.seed is None else p.seed + 1) for p in work.params]
    found = oracle.compare(work, gpu_tokens.ask(oracle.engine, work.prompts, other_seeds))
    assert "drawn tokens are not the CPU's" in " ".join(found.verdict())
    assert found.num_drawn_otherwise > 4 and found.num_near == 0


def test_rows_of_compared_tokens() -> None:
    found = gpu_tokens.Compared(num_tokens=10, num_equal=9, num_near=1)
    assert "failure" not in gpu_tokens.compared_row("a", found)
    assert gpu_tokens.compared_row("a", found, ["nobody was retracted"])["failure"].startswith("nobody was retracted")
    a, b = gpu_tokens.Answer([1, 2], [-0.5, -0.25]), gpu_tokens.Answer([1, 2], [-0.5, -0.25000001])
    assert gpu_tokens.same_bits([a, a], [a, b]) == 1


@pytest.mark.parametrize(
    ("p99", "longer", "kept"), [((120, 299), 0.029, True), ((120, 300), 0.0, False), ((1, 1), 0.031, False)]
)
def test_decision(p99: tuple[float, float], longer: float, kept: bool, make_bench: MakeBench) -> None:
    known: list[dict[str, Any]] = [
        {"name": "host_function, asyncio", "value": p99[0]}, {"name": "host_function, uvloop", "value": p99[1]},
        {"name": "event, uvloop", "value": 1e6}, {"name": "another stream, event", "value": 1.0},
        {"name": "another stream, host_function", "value": longer},
    ]  # fmt: skip
    row = next(gpu_host.decision(make_bench(known)))
    assert row["met"] == kept and ("NOT kept" in row["note"]) == (not kept)
    assert "missing" in next(gpu_host.decision(make_bench(known[:4])))


# --- Clocks ---------------------------------------------------------------------------------------------------
def test_percentile() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [gpu_steps.percentile(values[::-1], share) for share in (0.5, 0.99, 1.0, 0.001)] == [50, 99, 100, 1]
    assert gpu_steps.percentile([3.0], 0.99) == 3


def test_idle_share() -> None:
    clock = gpu_steps.StepClock.__new__(gpu_steps.StepClock)
    clock._device = gpu_steps.Rehearsed()

    def step(begin: int, end: int | None, items: int = 4, tokens: int = 4) -> gpu_steps.StepTimes:
        return gpu_steps.StepTimes(items, tokens, begin=begin, end=end)

    clock.steps = [step(0, 50), step(100, 190), step(195, 300), step(290, 400)]
    assert clock.idle_share(clock.steps) == pytest.approx((50 + 5 + 0) / 400)
    assert clock.device_s(clock.steps) == pytest.approx(97.5e-9)
    clock.steps += [step(0, 1, 4, 9), step(0, 1, 3, 3), step(0, None)]
    assert len(clock.decodes(4)) == 4


def test_steps_may_be_cleared_before_the_thread_is_through_with_the_last() -> None:
    """As a caller does that has its result; and all else of a packer is the packer's."""
    packer = SimpleNamespace(pack=lambda plan, out: out, shared_prefixes=lambda plan: 7)

    def launch(plan: Any, submit_ns: int) -> None:
        assert executor._packer.pack(plan, "packed") == "packed" and executor._packer.shared_prefixes(plan) == 7
        assert executor.launcher.forward() == "logits" and executor._completion.ticket() == "ticket"
        assert [(step.num_items, step.num_tokens) for step in clock.steps] == [(2, 5)]
        kept.extend(clock.steps)
        clock.steps.clear()

    kept: list[gpu_steps.StepTimes] = []
    executor = SimpleNamespace(
        _packer=packer, launcher=SimpleNamespace(forward=lambda: "logits"), _stream=None, _launch=launch,
        _completion=SimpleNamespace(ticket=lambda: "ticket"),
    )  # fmt: skip
    clock = gpu_steps.StepClock(executor, gpu_steps.Rehearsed())
    executor._launch(SimpleNamespace(num_items=2, num_tokens=5), 0)
    (step,) = kept
    assert step.begin <= step.end and 0 < step.pack_us + step.forward_us <= step.thread_us and clock.steps == []


def test_the_devices_clock_by_the_hosts() -> None:
    gpu = gpu_steps.Gpu.__new__(gpu_steps.Gpu)
    gpu._first, gpu._fixed = 0.0, [(1000.0, 500.0), (3000.0, 520.0)]
    gpu.seconds = lambda begin, end: (end - begin) / 1e9  # type: ignore[method-assign]
    assert [gpu.host_ns(mark) for mark in (1000.0, 2000.0, 3000.0)] == pytest.approx([1500, 2510, 3520])


def test_steps_end_when_the_device_fails(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails:
        def query(self) -> bool:
            raise RuntimeError("an illegal address")

        synchronize = query

    monkeypatch.setattr(gpu_host, "_blocking_event", lambda stream: Fails())
    steps = gpu_host.Steps(make_bench(), gpu_steps.Rehearsed(), "event", lambda done: done < 3)
    with pytest.raises(RuntimeError, match="an illegal address"):
        asyncio.run(steps.run())


# --- Rows -----------------------------------------------------------------------------------------------------
def test_measure(make_bench: MakeBench, tmp_path: Path) -> None:
    bench = make_bench()

    def half() -> Iterator[gpu_steps.Row]:
        yield gpu_steps.row("a", 1.0, "s", at_most=0.5)
        raise ValueError("no b")

    assert not bench.measure("first", half)
    rows = gpu_suite.read_rows(tmp_path / "rows.jsonl")
    assert [row.get("name", row.get("begin")) for row in rows] == ["first", "a", "first", None]
    assert rows[1]["met"] is False and rows[2]["failure"] == "ValueError: no b" and rows[3] == {"end": "first"}
    again = make_bench(rows)
    assert not again.measure("first", half) and len(again.known) == len(rows)
    assert again.measure("second", lambda: [gpu_steps.row("c", 2.0, "s")])
    assert again.value("a") == 1.0 and again.value("first") is None
    found = again.compared(gpu_steps.row("d", 0.5, "s", note="x"), "a", "the default")
    assert found["note"] == "x; 0.50 of the default"


def test_tables_of_cases(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"begin": "a"}, gpu_steps.row("a", 0.9123456, "share", at_least=0.85),
        gpu_steps.row("b", 0.8, "s", at_most=0.5),
        {"name": "c", "failure": "died", "value": 1234.5}, {"name": "d", "skipped": "no e"},
        {"name": "f", "met": False, "note": "not kept"}, {"name": "g", "missing": "no time was left"}, {"end": "a"},
    ]  # fmt: skip
    table = gpu_suite.case_table(rows)
    assert table[1:] == [
        ["a", "0.9123", "share", "at least 0.85", "met", ""], ["b", "0.8", "s", "at most 0.5", "MISSED", ""],
        ["c", "1234", "", "", "FAIL", "died"], ["d", "", "", "", "", "skipped: no e"],
        ["f", "", "", "", "MISSED", "not kept"], ["g", "", "", "", "", "NOT RUN: no time was left"],
    ]  # fmt: skip
    assert gpu_suite.summarise({"engine": rows}) == 1
    assert capsys.readouterr().out == (
        "TARGETS MISSED: b (0.8, at most 0.5); f (not kept)\nNOT RUN: engine g\nFAILED: engine c\n"
    )
    text = gpu_suite.markdown({}, {"engine": rows})
    assert "## Engine" in text and "| b | 0.8 | s | at most 0.5 | MISSED |  |" in text and "TARGETS MISSED: b" in text


# --- The driver -----------------------------------------------------------------------------------------------
def arguments_of(tmp_path: Path, *more: str) -> Any:
    return gpu_suite.parser().parse_args(["--emulated", "none.so", "--out", str(tmp_path), *more])


def test_rehearsal_end_to_end(emulated_tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--emulated", str(emulated_tree / "libsapwood_cuda_emulated.so")]
    command += ["--out", str(tmp_path / "out"), "--stage", "host,engine", "--only", "copies,torch"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    host, engine = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (host["stage"], engine["stage"]) == ("host", "engine")
    assert [row["name"] for row in host["rows"]] == ["plan to device, 64 KB", "result to host, 1 KB"]
    assert [row["name"] for row in engine["rows"]] == ["torch: decode 1", "torch: prefill 96"]
    table = (tmp_path / "out" / "table.md").read_text()
    for said in (table, done.stdout):
        assert "a rehearsal on the CPU" in said and "plan to device" in said and "torch: prefill 96" in said
    assert (tmp_path / "out" / "engine.log").read_text().startswith("--- torch")


def test_cases_are_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def chosen(*more: str) -> list[str]:
        args = arguments_of(tmp_path, *more)
        return [case.name for stage in ("host", "engine") for case in gpu_suite.selected_cases(args, stage)]

    assert chosen() == [case.name for case in (*gpu_host.CASES, *gpu_engine.CASES)]
    assert len(set(chosen())) == len(chosen()) and not any("," in name for name in chosen())
    assert chosen("--only", "tokens, no*") == ["tokens", "no overlap", "no graphs"]
    assert gpu_suite.parser().parse_args([]).stage == ["build", "check", "time"]
    (tmp_path / "none.so").touch()
    with pytest.raises(SystemExit):
        gpu_suite.main(["--emulated", str(tmp_path / "none.so"), "--stage", "engine", "--only", "speeed"])
    said = capsys.readouterr().err
    assert "speeed: no such op or case" in said and "families" in said


# Measures a, b, c of a case, as gpu_steps.Bench does, and dies in b, or where it ends.
CHILD = """
import json, os, sys, time
rows, how = sys.argv[1:]
begun = open(rows).read() if os.path.exists(rows) else ""
print("its last words", file=sys.stderr)
with open(rows, "a") as file:
    def tell(row):
        print(json.dumps(row), file=file, flush=True)
    if how == "at once":
        os.abort()
    for name in "abc":
        if '{"begin": "%s"}' % name in begun:
            continue
        tell({"begin": name})
        if name == "b":
            if how == "hang":
                time.sleep(60)
            if how in ("abort", "unfinished"):
                if how == "unfinished":
                    file.write('{"name": "b", "va')
                    file.flush()
                os.abort()
        tell({"name": name, "value": 1.0})
        tell({"end": name})
    if how == "at last":
        os.abort()
"""


def run_cases(
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    budget_s: float = 60,
    limit_s: float = 60,
    package: str | None = None,
) -> list[dict[str, Any]]:
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(
        gpu_suite, "child_command",
        lambda args, kind, *more: [sys.executable, str(tmp_path / "child.py"), more[more.index("--rows") + 1], how],
    )  # fmt: skip
    case = gpu_steps.Case("case", lambda bench: None, limit_s, package)
    return gpu_suite.case_stage(arguments_of(tmp_path), "engine", gpu_suite.Budget(budget_s), [case])


@pytest.mark.parametrize("how", ["abort", "unfinished", "hang"])
def test_a_case_goes_on_behind_what_kills_it(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run_cases(how, tmp_path, monkeypatch, limit_s=1.5 if how == "hang" else 60)
    assert [(row["name"], row.get("value")) for row in rows] == [("a", 1.0), ("b", None), ("c", 1.0)]
    assert ("no result within 2 s" if how == "hang" else "killed by SIGABRT: ") in rows[1]["failure"]
    assert "its last words" in rows[1]["failure"]


def test_a_case_that_dies_outside_its_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = run_cases("at once", tmp_path, monkeypatch)
    assert row["name"] == "case, outside its measurements" and "SIGABRT" in row["failure"]
    rows = run_cases("at last", tmp_path, monkeypatch)
    assert [row["name"] for row in rows] == ["a", "b", "c", "case, outside its measurements"]


def test_a_budget_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = run_cases("", tmp_path, monkeypatch, budget_s=0)
    assert row == {"name": "case", "missing": gpu_suite.NO_TIME}
    rows = run_cases("hang", tmp_path, monkeypatch, budget_s=1.2)
    assert rows[-1]["missing"] == gpu_suite.NO_TIME and gpu_suite.summarise({"engine": rows}) == 0


def test_packages_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_suite, "OPTIONAL", ("no_such_peer", "json", "no_such_loop"))
    (row,) = run_cases("", tmp_path, monkeypatch, package="no_such_peer")
    assert row == {"name": "case", "skipped": "no_such_peer is not installed"}
    assert "engine: missing no_such_peer, no_such_loop\n" in capsys.readouterr().out
    assert len(run_cases("", tmp_path, monkeypatch, package="json")) == 3
    monkeypatch.setattr(gpu_suite, "REQUIRED", ("json", "no_such_structs"))
    (row,) = run_cases("", tmp_path, monkeypatch)
    assert row == {"name": "everything", "missing": "no no_such_structs"}
    assert gpu_suite.cases_of("engine") == ()
    monkeypatch.setattr(gpu_suite, "REQUIRED", ())
    monkeypatch.setattr(gpu_suite, "has_core", lambda folder: False)
    (row,) = run_cases("", tmp_path, monkeypatch)
    assert "sapwood._core (--stage build makes it)" in row["missing"]
