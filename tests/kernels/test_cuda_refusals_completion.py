"""The report of a step refuses wrong arguments and says which, before anything is queued."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.program.cuda_library import CudaLibrary, NotifyParams


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"struct_size": 8}, "params.struct_size is 8, this library expects 16"),
        ({"event_fd": -1}, "event_fd must be an open eventfd, got -1"),
        ({"done_ns": None}, "done_ns is null"),
        ({"done_ns": 68}, "done_ns must be aligned to 8 bytes"),
    ],
)
def test_notify_names_the_wrong_argument(emulated: CudaLibrary, changes: dict[str, Any], said: str) -> None:
    wrong = NotifyParams(event_fd=0, done_ns=64)
    for name, value in changes.items():
        setattr(wrong, name, value)
    assert emulated.status("notify", wrong) == -1
    assert emulated.last_error().startswith("notify: ") and said in emulated.last_error()
