"""test_bitwise's property on device "cuda", in its deterministic mode.

Alone = in chunks, among others = after a cache hit = after retraction = with any page size, with graphs and without. On
the emulator of one model and a short prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from test_bitwise import CONFIGS, VOCAB, Bits, Rig, assert_same

from sapwood.program import cuda
from sapwood.program.cuda_executor import CudaExecutor
from sapwood.program.cuda_library import CudaLibrary


class Taps:
    """Of _core.CpuRunner's debugging, what Rig needs. Waits for the device: a rig runs one step at a time."""

    def __init__(self, rig: Rig, executor: CudaExecutor) -> None:
        self._rig, self._model = rig, executor.launcher.model
        self._taken: list[tuple[int, int, int, int, Any]] = []
        rows = executor._rows
        sample = rows.sample

        def tapped(logits: Any, **how: Any) -> None:
            sample(logits, **how)
            which, positions = rows.arrays.logit_rows.tolist(), rows.arrays.sampling["position"].tolist()
            for i, values in enumerate(logits.cpu().numpy()):
                if which[i] != rows.max_rows:
                    self._taken.append((0, which[i], rig.builder.gen(which[i]), positions[i] - 1, values.copy()))

        rows.sample = tapped  # type: ignore[method-assign]

    def poison_kv(self) -> None:
        for pool in self._model._kv:
            pool[:, :-1] = float("nan")  # the last page is padding's
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # steps run on another stream

    def tap_logits(self, on: bool) -> None:
        pass

    def take_logits(self) -> list[tuple[int, int, int, int, Any]]:
        taken, self._taken = self._taken, []
        return taken

    def read_kv(self, group: int, layer: int, page: int, offset: int) -> bytes:
        return self._model.read_kv(group, layer, page, offset).tobytes()


class CudaRig(Rig):
    def __init__(self, model_dir: str, *, page_size: int = 16, **settings: Any) -> None:
        super().__init__(
            model_dir, device="cuda", dtype="bfloat16", enable_deterministic_inference=True, page_size=page_size,
            **settings,
        )  # fmt: skip

    def _runner(self) -> Any:
        return Taps(self, self.model.executor)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_bits_do_not_depend_on_company(
    name: str, cuda_device: tuple[CudaLibrary, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda, "open_device", lambda: cuda_device)
    emulated = cuda_device[1] == "cpu"
    if emulated and name != "mistral":
        pytest.skip("the emulator takes too long for more than one model")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    prompt = np.random.default_rng(7).integers(3, VOCAB, 24 if emulated else 300)

    def generate(rig: Rig, **how: Any) -> Bits:
        bits = rig.generate(prompt, 5, **how)
        rig.cache.flush()
        return bits

    def same(got: Bits) -> None:
        assert_same(got, want, min_kv=2 * min(70, len(prompt)))

    rig = CudaRig(str(tmp_path))
    try:
        want = generate(rig)
        if not emulated:  # pages that slide out of the window within a chunk are gone before they can be read
            want.kv = generate(rig, chunk=7).kv | want.kv
        assert all(np.isfinite(np.frombuffer(bits, np.float32)).all() for bits in want.logits.values())
        same(rig.generate(prompt, 5, chunk=7, mates=2, retract_at=6))
        same(generate(rig))  # of the cache
        if not emulated:
            for chunk in (1, 64):
                same(generate(rig, chunk=chunk, mates=63, retract_at=6, flush=True))
    finally:
        rig.close()
    for settings in ({"page_size": 5, "disable_cuda_graph": True},) if emulated else (
        {"page_size": 1}, {"page_size": 5}, {"page_size": 64}, {"disable_cuda_graph": True},
    ):  # fmt: skip
        rig = CudaRig(str(tmp_path), **settings)
        try:
            same(generate(rig, chunk=16))
        finally:
            rig.close()
