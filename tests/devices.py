"""Which devices a test that names none runs on (README.md, "Devices")."""

from __future__ import annotations

import importlib.util
import os

import pytest

CHOICE = "SAPWOOD_TEST_DEVICE"


def chosen() -> str:
    """What the environment asks for: "cpu", "cuda", or "", both."""
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "cpu", "cuda"):
        raise pytest.UsageError(f"{CHOICE} must be cpu or cuda, or not be set; got {choice!r}")
    return choice


def has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def devices(*, emulated: bool) -> list[str]:
    """emulated: "cuda" also where there is no GPU, and nobody has asked for it."""
    if choice := chosen():
        return [choice]
    there = importlib.util.find_spec("torch") is not None if emulated else has_gpu()
    return ["cpu", "cuda"] if there else ["cpu"]
