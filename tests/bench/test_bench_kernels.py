"""bench/kernels.py and bench/torch_kernels.py: what they count, and small runs to the end; no timing."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import machine
import pytest
import torch_kernels

import kernels

pytest.importorskip("sapwood._core", reason="the native core is not built", exc_type=ImportError)

PEAKS = {"read": 10.0, "fp32": 100.0, "bf16": 200.0, "int8": 400.0, "fp32_avx2": 50.0, "int8_avx2": 80.0}
RATES = {kind: {2: machine.Rate(rate, rate)} for kind, rate in PEAKS.items()}
MACHINE = machine.Ceilings("cpu", "c++", RATES)


def test_contexts() -> None:
    assert kernels.Context.parse("16x4096") == kernels.Context(16, 4096, 1)
    assert kernels.Context.parse("4096+1024") == kernels.Context(1, 4096, 1024)
    assert [str(kernels.Context.parse(text)) for text in ("2x1", "0+7")] == ["2x1", "0+7"]
    for wrong in ("16", "x4", "4x", "0x4", "4x0", "4+0", "a+4", "-1+4", "2x3+4"):
        with pytest.raises(argparse.ArgumentTypeError, match="neither"):
            kernels.Context.parse(wrong)


def test_attention_work() -> None:
    tiny = kernels.named_config("tiny")  # 4 query heads and 2 KV heads of 16
    # Two rows read 40 + 1 tokens of K and V each; a product and a weighted sum, for every query head.
    assert kernels.Context(2, 40, 1).work(tiny, "bfloat16") == (2 * 41 * 2 * 2 * 16 * 2, 2 * 41 * 4 * 4 * 16)
    # Queries 1, 2 and 3 after 5 tokens see 6, 7 and 8 keys.
    assert kernels.Context(1, 5, 3).work(tiny, "float32") == (8 * 2 * 2 * 16 * 4, (6 + 7 + 8) * 4 * 4 * 16)


def test_node_work() -> None:
    tiny = kernels.named_config("tiny")
    assert kernels.matrix_shapes(tiny) == {
        "qkv": (4 * 16 + 2 * 2 * 16, 64), "linear": (64, 64), "o_proj": (64, 64), "gate_up": (2 * 160, 64),
        "down_proj": (64, 160), "head.lm_head": (1024, 64),
    }  # fmt: skip
    assert kernels.node_work("gate_up", tiny, "bfloat16", 3) == (2 * 320 * 64, 2 * 3 * 320 * 64)
    # A block of 32 weights is 32 or 16 bytes and a scale of two.
    assert kernels.node_work("gate_up", tiny, "int8", 3) == (34 * 320 * 64 / 32, 2 * 3 * 320 * 64)
    assert kernels.node_work("gate_up", tiny, "int4", 3) == (18 * 320 * 64 / 32, 2 * 3 * 320 * 64)
    assert kernels.node_work("embed", tiny, "int4", 3) == (3 * 2 * 64, 0)
    assert kernels.node_work("o_proj.input", tiny, "int8", 3) == (3 * 2 * 64, 0)
    assert kernels.node_work("norm", tiny, "bfloat16", 3) == (3 * 4 * 64, 0)
    assert kernels.node_work("embed", tiny, "bfloat16", 3) == (3 * 2 * 64, 0)
    assert kernels.node_work("sample", tiny, "bfloat16", 3) == (3 * 4 * 1024, 0)


def test_copies() -> None:
    assert kernels.num_copies(1e15) == 1 and kernels.num_copies(1) == kernels.MOST_COPIES
    some = kernels.num_copies(8 << 20)
    assert some == kernels.MOST_COPIES or 4 * (8 << 20) <= some * (8 << 20) < 1 << 40


def test_shares() -> None:
    peaks: dict[str, float | None] = {**PEAKS}
    found = kernels.line("qkv", "bfloat16", "avx512_bf16", 4, [30, 20, 25], (125e3, 2e6), peaks, {"torch": 50.0})
    assert (found["us"], found["spread"], found["gb_s"], found["gflop_s"]) == (25, 0.4, 5.0, 80.0)
    assert (found["read_share"], found["peak_share"], found["torch_ratio"]) == (0.5, 0.4, 2.0)
    shares = {
        (dtype, isa): kernels.line("qkv", dtype, isa, 4, [25], (125e3, 2e6), peaks, {})["peak_share"]
        for dtype in kernels.WEIGHT_BYTES
        for isa in ("scalar", "avx2", "avx512", "avx512_bf16")
    }
    for dtype, want in (
        ("float32", (None, 1.6, 0.8, 0.8)), ("bfloat16", (None, 1.6, 0.8, 0.4)), ("int8", (None, 1.0, 0.2, 0.2)),
        ("int4", (None, 1.0, 0.2, 0.2)),
    ):  # fmt: skip
        assert tuple(share for (of, _), share in shares.items() if of == dtype) == want
    assert kernels.line("qkv", "int8", "avx512", 4, [25], (1, 1), {**peaks, "int8": None}, {})["peak_share"] is None
    unknown = kernels.line("qkv", "float32", "avx2", 4, [25], (125e3, 2e6), dict.fromkeys(machine.KINDS), {})
    assert unknown["read_share"] is None and unknown["peak_share"] is None


def test_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10))
    assert kernels.repeat(lambda: {"a": float(next(calls))}, 3) == {"a": [1.0, 2.0, 3.0]}
    monkeypatch.setattr(kernels, "CASE_S", -1.0)  # the first takes too long
    assert kernels.repeat(lambda: {"a": float(next(calls))}, 3) == {"a": [4.0]}


def steps_of(layers: int, **sizes: int) -> kernels.Steps:
    from sapwood import _core

    program = kernels.record(kernels.named_config("tiny"), "float32", layers, 100, matrices=False)
    store = kernels.fill(program, 100, 1)
    return kernels.Steps(program, _core.isa_levels()[0], 1, store=store, **sizes)


def test_filling_the_cache_writes_kv_and_skips_attention() -> None:
    steps = steps_of(2, num_tokens=200, max_rows=2, max_step_tokens=80)
    with steps.rows(2, 41, 50) as rows:
        steps.write_kv(rows, 40, 16)
        ran = {kernels.node_name(name) for name, calls, _ in steps.runner.node_times() if calls}
        assert ran == {"embed", "norm", "qkv"}
        # In the order they were handed out: row by row, three times.
        pages = [int(page) for turn in zip(*map(steps.builder.pages, rows), strict=True) for page in turn]
        assert len(set(pages)) == 6 and len({b - a for a, b in itertools.pairwise(pages)}) > 1
        kv = {steps.runner.read_kv(0, layer, page, 7) for layer in range(2) for page in pages}
        assert len(kv) == 12 and bytes(len(next(iter(kv)))) not in kv
        # The prompt's last token, then decoding: every node runs.
        for _ in range(2):
            assert {"attention", "o_proj", "head.lm_head", "sample"} <= set(steps.step(rows, 1))
        assert [steps.builder.num_tokens(row) for row in rows] == [43, 43]
    steps.close()


def test_a_row_without_so_many_tokens_is_an_error() -> None:
    steps = steps_of(1, num_tokens=64, max_rows=1, max_step_tokens=16)
    with steps.rows(1, 4, 5) as rows:
        steps.step(rows, 4)
        with pytest.raises(RuntimeError, match="came out with 0 tokens"):
            steps.step(rows, 1)
    with steps.rows(1, 4, 5) as rows, pytest.raises(RuntimeError, match="1 rows, 6 tokens each, came out with 4"):
        steps.step(rows, 6)
    steps.close()


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(machine, "ceilings", lambda threads: MACHINE)
    monkeypatch.setattr(kernels, "MOST_COPIES", 2)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--shape", "tiny", "--threads", "2", "--repeats", "2", *options])
    assert kernels.main() == 0


def test_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sapwood import _core

    levels = _core.isa_levels()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no torch
    options = ["--isa", ",".join(levels), "--rows", "128,1,3", "--attention", "3x40,16+32,0+20"]
    run(monkeypatch, *options, "--json", str(tmp_path / "found.json"))
    report: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    assert (report["shape"], report["threads"], report["machine"]["cpu"]) == ("tiny", 2, "cpu")
    lines = {(x["node"], x["dtype"], x["isa"], x["m"]): x for x in report["lines"]}
    assert len(lines) == len(report["lines"])
    every_row = {"qkv", "linear", "o_proj", "gate_up", "down_proj", "norm", "embed"}
    cases: set[tuple[str, Any]] = {(node, m) for node in every_row for m in (1, 3, 128)}
    cases |= {(node, m) for node in ("head.lm_head", "sample") for m in (1, 3)}  # a prompt's middle has no logits
    contexts = ("3x40", "16+32", "0+20")
    want = {(n, dtype, isa, m) for n, m in cases for dtype in kernels.WEIGHT_BYTES for isa in levels}
    want |= {
        ("attention", dtype, isa, context)
        for dtype in ("float32", "bfloat16")
        for isa in levels
        for context in contexts
    }
    want |= {("o_proj.input", dtype, isa, m) for dtype in kernels.QUANTISED for isa in levels for m in (1, 3, 128)}
    assert lines.keys() == want
    for x in lines.values():
        assert x["us"] > 0 and x["spread"] >= 0 and x["gb_s"] > 0 and math.isclose(x["read_share"], x["gb_s"] / 10)
        assert "torch_ratio" not in x
    out = capsys.readouterr().out
    assert "torch is not installed" in out and "read 10.0 GB/s, fp32 100.0 GFLOP/s" in out
    tables = [line for line in out.splitlines() if line.startswith(("qkv ", "lm_head ", "attention "))]
    assert len(tables) == len(levels) * (4 * (3 + 2) + 2 * 3) + 1  # one of them a heading


def test_torch_runs_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    run(monkeypatch, "--ops", "attention", "--attention", "2x8,4+4", "--dtype", "float32",
        "--json", str(tmp_path / "found.json"))  # fmt: skip
    lines = json.loads((tmp_path / "found.json").read_text())["lines"]
    assert len(lines) == 2 and all(x["torch_ratio"] > 0 for x in lines)
    assert "norm" not in capsys.readouterr().out


def test_torch_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch_kernels, "BUDGET_S", 0.0)
    ways = {"torch", "packed"} if torch.backends.mkldnn.is_available() else {"torch"}
    own = {"int8": "_weight_int8pack_mm", "int4": "_weight_int4pack_mm_for_cpu"}
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        expected = ways | ({f"{dtype}pack"} if dtype in own and hasattr(torch.ops.aten, own[dtype]) else set())
        found = torch_kernels.product((32, 64), dtype, 2, [1, 5])
        assert {m: set(times) for m, times in found.items()} == {1: expected, 5: expected}
    for dtype in ("float32", "bfloat16"):
        assert set(torch_kernels.rms_norm(64, dtype, [1, 5])) == {1, 5}
    assert set(torch_kernels.product((32, 48), "int4", 1, [1])[1]) == ways  # not of whole groups
    seen: list[dict[str, Any]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def record(*tensors: Any, **options: Any) -> Any:
        seen.append(options)
        return attend(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    for rows, cached, new in ((3, 5, 1), (1, 0, 4), (1, 2, 3)):
        assert torch_kernels.attention(rows, cached, new, (4, 2, 16), "float32", 2)["torch"] > 0
    decode, fresh, after = seen[0], seen[6], seen[-1]
    assert decode["attn_mask"] is None and not decode["is_causal"]
    assert fresh["attn_mask"] is None and fresh["is_causal"]
    assert not after["is_causal"] and after["attn_mask"].int().tolist() == [
        [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    ["--repeats 0", "--threads 0", "--rows 0", "--rows 65", "--rows a", "--ops gem", "--isa avx9", "--dtype int3",
     "--attention 4", "--shape none"],
)  # fmt: skip
def test_wrong_options(wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py", *wrong.split()])
    with pytest.raises(SystemExit):
        kernels.main()
    assert wrong.split()[0] in capsys.readouterr().err
