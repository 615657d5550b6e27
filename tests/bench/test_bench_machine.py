"""bench/machine.py and bench/offline.py: sane figures, no timing."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import machine
import make_model
import offline
import pytest


def test_thread_counts() -> None:
    assert [machine.thread_counts(n) for n in (1, 2, 3, 8, 12)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12],
    ]  # fmt: skip


def test_parse() -> None:
    rates = machine.parse("read 1 10\nread 2 20\nread 1 30\nread 1 12\nread 2 22\nfp32 1 5\nbf16 absent\n")
    assert rates == {
        "read": {1: machine.Rate(12, 30), 2: machine.Rate(21, 22)},
        "fp32": {1: machine.Rate(5, 5)},
    }
    found = machine.Ceilings("cpu", "c++", rates)
    assert (found.median("read"), found.median("read", 1), found.median("bf16")) == (21, 12, None)
    as_json = json.loads(json.dumps(found.as_json()))
    assert as_json["read"]["1"] == {"median": 12, "best": 30} and as_json["bf16"] is None


@pytest.fixture(scope="module")
def measured() -> machine.Ceilings:
    if machine.find_compiler() is None:
        pytest.skip("no C++ compiler (CXX, c++, g++, clang++)")
    return machine.ceilings((1, 2), repeats=1, buffer_bytes=64 << 20)


def test_ceilings(measured: machine.Ceilings) -> None:
    assert measured.method == "c++" and measured.cpu
    assert {"read", "fp32"} <= set(measured.rates) <= set(machine.KINDS)
    for by_threads in measured.rates.values():
        assert set(by_threads) == {1, 2}
        # From the slowest machine under load to one that nobody has yet.
        assert all(0.05 < rate.median <= rate.best < 1e6 for rate in by_threads.values())
    flags = machine.cpu_flags()
    assert ("bf16" in measured.rates) == ("avx512_bf16" in flags)
    assert ("int8" in measured.rates) == bool({"avx512_vnni", "avx_vnni"} & flags)
    assert all((kind in measured.rates) == ({"avx2", "fma"} <= flags) for kind in ("fp32_avx2", "int8_avx2"))
    assert machine.ceilings((1, 2), repeats=1, buffer_bytes=64 << 20) is measured


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "find_compiler", lambda: None)
    monkeypatch.setattr(sys, "argv", ["machine.py", "--threads", "1", "2", "--repeats", "2", "--buffer-mb", "8"])
    assert machine.main() == 0
    out = capsys.readouterr().out
    assert "no C++ compiler found" in out and "int8      not measured" in out and "read      GB/s" in out


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho it does not work >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(RuntimeError, match="it does not work"):
        machine.measure_compiled(str(compiler), [1], 1, 1 << 20)


def test_wrong_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (["--repeats", "0"], ["--threads", "0"], ["--buffer-mb", "1"]):
        monkeypatch.setattr(sys, "argv", ["machine.py", *wrong])
        with pytest.raises(SystemExit):
            machine.main()


COST = offline.Cost(matrix_bytes=2000, body_params=900, head_params=100, kv_token_bytes=8.0, attn_flops=16)


def test_least_times() -> None:
    # 3 prompts of 10: 2 * 900 a token, 2 * 100 for the last, 16 for each of 55 pairs.
    assert COST.prefill_s(3, 10, offline.Peaks(1.0, 10.0)) == pytest.approx(3 * (18_000 + 200 + 16 * 55) / 10)
    # One row is bound by reading: 2000 + 8 * 50 bytes at 100 a second.
    assert COST.decode_s(1, 50, offline.Peaks(100.0, 1000.0)) == pytest.approx(24.0)
    # Forty rows by multiplying: 2000 + 16 * 50 each.
    assert COST.decode_s(40, 50, offline.Peaks(1e6, 1000.0)) == pytest.approx(40 * 2.8)
    assert COST.decode_s(40, 50, offline.Peaks(1e6, None)) == pytest.approx((2000 + 40 * 400) / 1e6)
    # Quantised layers multiply at the int8 peak, head and attention at the other.
    quantised = dataclasses.replace(COST, body_int8=True)
    assert quantised.decode_s(40, 50, offline.Peaks(1e6, 1000.0, 9000.0)) == pytest.approx(40 * (0.2 + 0.2 + 0.8))
    assert quantised.prefill_s(1, 10, offline.Peaks(1.0, 10.0, None)) is None


def test_decode_rate() -> None:
    # All decode from 2.0 to 5.0: the tokens at 3, 4 and 5 of the one, 3.5 and 5 of the other.
    times = offline.Times([1.0, 2.0], [6.0, 5.0], [1.0, 2.0, 2.0, 3.0, 3.5, 4.0, 5.0, 5.0, 6.0])
    assert times.decode_rate() == pytest.approx(5 / 3)
    assert offline.Times([1.0, 2.0], [2.0, 5.0], [1.0]).decode_rate() is None


def test_shares() -> None:
    row = {"concurrency": 2, "prefill_tok_s": 10.0, "decode_tok_s": 0.5}
    offline.add_shares(row, COST, 10, 4, offline.Peaks(1000.0, 1e5))
    assert row["prefill_share"] == pytest.approx(COST.prefill_s(2, 10, offline.Peaks(1000.0, 1e5)) / 2.0)
    assert row["decode_share"] == pytest.approx(COST.decode_s(2, 12, offline.Peaks(1000.0, 1e5)) / 4.0)
    row = {"concurrency": 2, "prefill_tok_s": 10.0}
    offline.add_shares(row, COST, 10, 1, offline.Peaks(1000.0, None))
    assert set(row) == {"concurrency", "prefill_tok_s"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run(
    dtype: str, measured: machine.Ceilings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("sapwood._core", reason="the native core is not built", exc_type=ImportError)
    make_model.make_model("tiny", tmp_path)
    monkeypatch.setattr(machine, "ceilings", lambda threads: measured)
    command = ["offline.py", str(tmp_path), "--input-len", "20", "--output-len", "9", "--concurrency", "1", "3",
               "--repeats", "2", "--num-threads", "2", "--dtype", dtype]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    assert offline.main() == 0
    report = json.loads(capsys.readouterr().out)
    tiny = make_model.SHAPES["tiny"]
    params = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 160  # a layer: qkv, o, gate, up, down
    item = 4 if dtype == "float32" else 2
    assert report["matrix_bytes"] == item * (2 * params + 1024 * tiny["hidden_size"])
    assert [row["concurrency"] for row in report["rows"]] == [1, 3]
    for row in report["rows"]:
        assert {"prefill_tok_s", "decode_tok_s", "tpot_ms", "output_tok_s", "prefill_share", "decode_share"} <= set(row)
        assert all(value >= 0 for value in row.values())
    monkeypatch.setattr(sys, "argv", command)
    assert offline.main() == 0
    out = capsys.readouterr().out
    assert "decode tok/s" in out and "GB of matrices" in out
