"""Fixtures of the golden tests: tiny checkpoints, built once a session, and the real one of the test data folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

golden_checkpoints = pytest.importorskip(
    "golden_checkpoints", reason="needs torch and transformers", exc_type=ImportError
)

DATA = Path(os.environ.get("SAPWOOD_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> Iterator[None]:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session", params=golden_checkpoints.TINY, ids=str)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> golden_checkpoints.Built:
    """One tiny checkpoint after the other, in float32 and bfloat16, each with transformers' model of it."""
    return golden_checkpoints.build(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def stories_dir() -> Path:
    """The trained checkpoint of the test data folder; skips without it."""
    path = DATA / "checkpoints" / "stories260K"
    if not path.is_dir():
        pytest.skip(f"{path} not found; set SAPWOOD_DATA to the test data folder")
    return path
