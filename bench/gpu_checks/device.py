"""Where the checks run, and what they have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sapwood.program.cuda_library import CudaLibrary, Params


class Device:
    """Where the checks run: "cuda" with libsapwood_cuda.so, or "cpu" with the emulated one."""

    def __init__(self, library: CudaLibrary, name: str, seed: int = 0) -> None:
        self.library = library
        self.name = name
        self.generator = torch.Generator(name).manual_seed(seed)

    @property
    def is_sm90(self) -> bool:
        """Whether the kernels for compute capability 9.0 alone run here; the emulator has them."""
        return self.name == "cpu" or torch.cuda.get_device_capability() == (9, 0)

    def call(self, op: str, params: Params) -> None:
        """Launch on torch's current stream; SapwoodError where it fails."""
        self.library.call(op, params, torch.cuda.current_stream().cuda_stream if self.name == "cuda" else None)

    def captured(self, launch: Callable[[], None]) -> Callable[[], None]:
        """On a GPU the replay of a graph of what `launch` launches, which runs once before; else `launch` itself."""
        if self.name != "cuda":
            return launch
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            launch()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            launch()
        return graph.replay

    def randn(self, *shape: int) -> torch.Tensor:
        """Normal f32."""
        return torch.randn(*shape, device=self.name, generator=self.generator)

    def poison(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """NaN everywhere."""
        return torch.full(shape, float("nan"), device=self.name, dtype=dtype)
