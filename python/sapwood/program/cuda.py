"""The CUDA executor's place: this version has none, and says so. models/loader.py calls it for device "cuda"."""

from __future__ import annotations

from typing import NoReturn

from sapwood.errors import InvalidRequest
from sapwood.program.ir import Program


def make_executor(program: Program) -> NoReturn:
    """Always raises InvalidRequest: programs run on the CPU only so far."""
    raise InvalidRequest(
        f"device 'cuda' is not in this version: a program of {len(program.nodes)} nodes was recorded, but no executor "
        "of this version runs it on a GPU; "
        "use device='cpu', or device='reference' for torch",
        "device",
    )
