"""The pool that graphs share, against torch's rules for it, which the test plays: no GPU is needed."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch

from sapwood.program.cuda_graphs import GraphPool


class Torch:
    """As much of torch.cuda as a capture uses. A pool whose last graph is gone keeps its name, and a capture into it
    fails (torch 2.11, CachingHostAllocator.h: use_count > 0).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs_of: dict[int, int] = {}
        self.names = itertools.count(1)
        player = self

        class CUDAGraph:
            capturing = False
            name = 0

            def capture_begin(self, pool: int | None = None, capture_error_mode: str = "global") -> None:
                self.name = next(player.names) if pool is None else pool
                assert player.graphs_of.get(self.name) != 0, "a capture into a pool whose graphs are gone"
                player.graphs_of[self.name] = player.graphs_of.get(self.name, 0) + 1
                self.capturing = True

            def capture_end(self) -> None:
                if not self.capturing:
                    raise RuntimeError("capture_end without capture_begin")
                self.capturing = False
                if player.spoiled:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def pool(self) -> int:
                return self.name

            def __del__(self) -> None:
                player.graphs_of[self.name] -= 1

        self.spoiled = False
        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


class Stream:
    def synchronize(self) -> None:
        pass


def test_graphs_captured_to_be_measured_leave_no_pool_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    player = Torch(monkeypatch)
    pool = GraphPool(Stream())  # type: ignore[arg-type]
    graphs: list[Any] = [pool.capture(lambda: None) for _ in range(2)]
    assert graphs[0].pool() == graphs[1].pool() and player.graphs_of == {1: 2}
    graphs.clear()
    pool.forget()
    pool.capture(lambda: None)


def test_a_failed_capture_tells_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    player = Torch(monkeypatch)
    calls = itertools.count()

    def launch() -> None:
        if next(calls) == 1:  # the first time is for real, the second is captured
            player.spoiled = True
            raise ValueError("what is wrong")

    with pytest.raises(ValueError, match="what is wrong"):
        GraphPool(Stream()).capture(launch)  # type: ignore[arg-type]
