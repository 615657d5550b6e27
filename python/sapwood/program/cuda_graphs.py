"""CUDA graphs of a step's launches: captured once for sizes in buckets, replayed for every step that fits one.

A decode step is one graph, for a bucket of rows: row ops, the step's arrays, attention's list of work, all nodes to the
logits. A mixed step replays a graph for each run of nodes between two attention nodes, for a bucket of tokens, and
launches attention itself, whose work has no bounds that a bucket could hold. Sampling is in none of them: it may have
to wait for a mask. What a graph has launched reads its inputs where they were when it was captured, so only what stays
in place may be read (program/cuda_model.py).

    buckets   DECODE: 1, 2, 4, 8, then every 8 rows; RUNS: 16 to 512 tokens, where padding costs less than launches
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import torch


class Graph(Protocol):
    def replay(self) -> None:
        """Launch everything again, on the stream it was captured on."""
        ...


class _Recorded:
    """A graph of the emulated device: the calls, made anew."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self.replay = launch


class GraphPool:
    """Captures graphs that share their memory: they run one after the other, on one stream."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        """stream: None on the emulated device."""
        self._stream = stream
        self._pool: Any = None

    def capture(self, launch: Callable[[], None]) -> Graph:
        """A graph of what `launch` launches. It runs once for real before: modules load, cuBLAS takes its workspace."""
        if self._stream is None:
            return _Recorded(launch)
        with torch.cuda.stream(self._stream):
            launch()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile (thread_local): the tokenizer's do not, a caller's may.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launch()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what ended the capture is the error to tell of
                    graph.capture_end()
                raise
            graph.capture_end()
        if self._pool is None:
            self._pool = graph.pool()
        return graph

    def forget(self) -> None:
        """All graphs are gone: the next one begins a pool of its own. torch keeps a pool's name after its last graph
        and refuses to use it again (CachingHostAllocator.h: use_count > 0).
        """
        self._pool = None


def decode_buckets(max_rows: int) -> list[int]:
    """Rows, ascending; the last is max_rows."""
    return sorted({n for n in (1, 2, 4, *range(8, max_rows, 8)) if n < max_rows} | {max_rows}) if max_rows > 0 else []


RUN_BUCKETS: Final = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def run_buckets(max_tokens: int) -> list[int]:
    """Tokens, ascending; none above max_tokens."""
    return [n for n in RUN_BUCKETS if n <= max_tokens]


def bucket_of(count: int, buckets: Sequence[int]) -> int | None:
    """The smallest bucket that holds count, or None."""
    return next((n for n in buckets if n >= count), None)
