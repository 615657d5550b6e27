"""The benchmarks are scripts that import each other by bare names: their folder goes onto the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of make_model's "tiny"."""
    import make_model

    folder = tmp_path_factory.mktemp("tiny-tokenizer")
    make_model.write_tokenizer("tiny", folder)
    return folder
