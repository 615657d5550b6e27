"""A real trained checkpoint: the stories of golden.json, token by token (a float64 reference wrote them)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from golden_driver import Driver

from sapwood import _core


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_four_stories_in_float32(stories_dir: Path, device: str) -> None:
    """Four prompts of 160 greedy tokens, all together; native also by first logits."""
    cases = json.loads((stories_dir / "golden.json").read_text())["cases"]
    assert len(cases) == 4 and all(len(case["greedy_ids"]) == 160 for case in cases)
    with Driver(stories_dir, dtype="float32", device=device) as driver:
        assert driver.model.eos_token_ids == (2,)
        results = driver.generate([case["input_ids"] for case in cases], 160)
    for case, result in zip(cases, results, strict=True):
        assert result.tokens == case["greedy_ids"]
        if device == "cpu":
            count = len(case["first_logits"])
            np.testing.assert_allclose(result.logits[0][:count], case["first_logits"], atol=1e-4)


def test_every_isa_level_tells_the_same_story(stories_dir: Path) -> None:
    case = json.loads((stories_dir / "golden.json").read_text())["cases"][1]
    for isa in _core.isa_levels():
        with Driver(stories_dir, dtype="float32", cpu_isa=isa) as driver:
            assert driver.generate([case["input_ids"]], 160)[0].tokens == case["greedy_ids"], isa
