"""bench/serving_agreement.py: the comparison, and both clients run with the same load."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import serving
import serving_agreement
from fake_server import FakeServer, running


def run(**figures: float) -> dict[str, float]:
    return dict.fromkeys(serving_agreement.FIGURES, 1.0) | figures


def test_compare() -> None:
    ours = [run(output_throughput=value) for value in (103.0, 99.0, 110.0)]
    theirs = [run(output_throughput=value, mean_itl_ms=0.0) for value in (100.0, 100.0, 90.0)]
    rows = serving_agreement.compare({"serving.py": ours, "vllm": theirs})
    row = rows["output_throughput"]
    assert (row["serving.py"], row["vllm"]) == (103, 100)
    assert row["difference"] == pytest.approx(3.0)
    assert (row["serving.py spread"], row["vllm spread"]) == (pytest.approx(1100 / 103), pytest.approx(10))
    assert rows["mean_tpot_ms"]["difference"] == 0 and rows["mean_itl_ms"]["difference"] == 0


def test_both_clients_run(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a vllm that is serving.py itself: its options are those of vLLM."""
    vllm = tmp_path / "vllm"
    vllm.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {serving.__file__} "$@"\n')
    vllm.chmod(0o755)
    with running(FakeServer()) as fake:
        command = ["serving_agreement.py", "--vllm", str(vllm), "--base-url", fake.url, "--model", str(tiny_tokenizer),
                   "--served-model-name", "m", "--concurrency", "2", "--repeats", "1", "--input-len", "9",
                   "--output-len", "4", "--rounds", "2", "--tolerance", "1e9", "--json"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        assert serving_agreement.main() == 0
        assert len(fake.bodies) == 8 and len({body["prompt"] for body in fake.bodies}) == 8
        assert {(body["model"], body["max_tokens"]) for body in fake.bodies} == {("m", 4)}
        report = json.loads(capsys.readouterr().out)
        assert set(report["2"]) == set(serving_agreement.FIGURES)
        monkeypatch.setattr(sys, "argv", [*command[:-3], "--tolerance", "0"])  # two runs are never the same
        assert serving_agreement.main() == 1
        assert "mean_ttft_ms" in capsys.readouterr().out
        fake.fault = lambda i: "http"
        with pytest.raises(RuntimeError, match="serving.py: 4 of 4 requests failed"):
            serving_agreement.main()
