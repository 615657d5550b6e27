"""bench/drift.py: its measures, on distributions that can be checked by hand, and all of it on the bundled model."""

from __future__ import annotations

import math
import re
from typing import Any

import drift
import numpy as np
import pytest


def test_measures() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]))
    got = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]))
    rms, divergence = drift.drift(got, reference, np.array([0, 2]))
    assert rms == pytest.approx(math.log(2) / math.sqrt(2))
    assert divergence == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 2)
    logits = np.array([[1e4, 1e4 + math.log(3)]])
    assert np.exp(drift.log_softmax(logits)) == pytest.approx(np.array([[0.25, 0.75]]))


def test_bundled_model(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    text = tmp_path / "text"
    text.write_text("The server answers questions about a story, and tells what it knows of the animals in it.\n" * 3)
    assert drift.main(["--text", str(text), "--tokens", "40", "--peers", ""]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^sapwood (.*?) +([0-9.]+) +([0-9.e+-]+)$", printed, re.M)
    rms = {name: float(value) for name, value, _ in rows}
    assert list(rms) == list(drift.ENGINES)
    assert 0 < rms["bf16"] < rms["int8"] < 0.15
    assert rms["int8"] < rms["int4"] < 1.5


def test_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    for arguments, message in (
        ([str(tmp_path)], "has no config.json"),
        (["--peers", "vllm"], 'expected llama.cpp or ""'),
        (["--tokens", "3"], "give at least 10"),
    ):
        with pytest.raises(SystemExit) as ended:
            drift.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
