"""The step loop reduced to its calls: requests in, tokens and logits out, one step at a time, no scheduler and no
asyncio.

Golden tests drive a loaded model with it, so that a failure is the model's and not the engine's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.models.loader import LoadedModel, load


@dataclasses.dataclass
class Generated:
    """What one request got: new tokens, their log-probabilities, and logits by new token (native runner only)."""

    tokens: list[int]
    logprobs: list[float]
    logits: np.ndarray[Any, np.dtype[np.float32]] | None


class Driver:
    """A loaded model with a cache and a batch builder. Use as a context manager."""

    def __init__(self, model_dir: Path | str, **settings: Any) -> None:
        defaults: dict[str, Any] = {
            "max_total_tokens": 8192,
            "max_running_requests": 8,
            "num_threads": 2,
            "skip_tokenizer_init": True,
        }
        self.config = EngineConfig.from_kwargs(str(model_dir), **{**defaults, **settings})
        self.model: LoadedModel = load(self.config)
        self.cache = _core.CacheManager(self.model.groups, self.model.num_pages)
        self.builder = _core.BatchBuilder(self.cache, self.model.max_rows)
        self._step = 0
        self.taps = isinstance(self.model.runner, _core.CpuRunner)
        if self.taps:
            self.model.runner.poison_kv()  # reading a slot nobody wrote gives NaN
            self.model.runner.tap_logits(True)

    def __enter__(self) -> Driver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.model.executor.shutdown()

    def generate(
        self, prompts: Sequence[Sequence[int]], num_new: int, *, chunk: int = 48, total_len: int | None = None
    ) -> list[Generated]:
        """Greedy tokens of all prompts, computed together: prompts in chunks, then decodes, mixed as they come.

        total_len   what admission is told each request can reach (longrope's mode); default prompt + num_new
        """
        rows: list[int] = []
        keys: list[tuple[int, int]] = []
        for prompt in prompts:
            mode = self.model.rope_mode(total_len or len(prompt) + num_new)
            row, gen, _ = self.builder.admit(
                self.model.cache_salt ^ mode,
                np.asarray(prompt, np.int32),
                prompt_len=len(prompt),
                max_len=len(prompt) + num_new,
                temperature=0.0,
                rope_mode=mode,
                return_logprob=True,
            )
            rows.append(row)
            keys.append((row, gen))
        tokens: dict[int, list[int]] = {row: [] for row in rows}
        logprobs: dict[int, list[float]] = {row: [] for row in rows}
        logits: dict[tuple[int, int], dict[int, np.ndarray[Any, Any]]] = {key: {} for key in keys}
        live = set(rows)
        while live:
            self._one_step(sorted(live), chunk, tokens, logprobs)
            if self.taps:
                for _, row, gen, position, row_logits in self.model.runner.take_logits():
                    logits[row, gen][position] = row_logits
            for row in [r for r in live if self.builder.phase(r) == "done"]:
                self.builder.release(row)
                live.discard(row)
        return [
            Generated(
                tokens[row],
                logprobs[row],
                np.stack([logits[row, gen][p] for p in sorted(logits[row, gen])]) if self.taps else None,
            )
            for row, gen in keys
        ]

    def _one_step(
        self, live: list[int], chunk: int, tokens: dict[int, list[int]], logprobs: dict[int, list[float]]
    ) -> None:
        self._step += 1
        self.builder.begin_step(self._step)
        self.builder.add_decodes()
        for row in live:
            if self.builder.phase(row) == "extend":
                self.builder.add_extend(row, chunk)
        built = self.builder.end_step()
        assert built.plan is not None and not built.blocked, "the pool is too small for this test"
        self.model.executor.submit(built.plan)
        self.model.executor.wait_idle()
        for kind, _, result in self.model.executor.drain():
            if kind == "result":
                assert result.error == "", result.error
                for row, token, flags, logprob in zip(*self.builder.commit(result), strict=True):
                    assert not flags & _core.BAD_LOGITS, f"row {row} has NaN logits"
                    if token >= 0:
                        tokens[row].append(token)
                        logprobs[row].append(logprob)
        self.cache.check_invariants()
