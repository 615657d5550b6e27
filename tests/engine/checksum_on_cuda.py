"""The KV-checksum model on device "cuda": torch computes what cpp/program/fake_runners.cc does, on the device.

Only the model's nodes are made up. Executor, launcher, packer, rows, sampler, commit and completion are the real ones,
and the model knows of a step what they leave on the device: tokens, positions, slots, page tables, lengths, logit rows.
Whatever is wrong with one of these is a wrong token.

It reads lengths on the host too, for how far to loop, so its graphs are launches made again, on a GPU as well; they are
padded like real ones.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.errors import SapwoodError
from sapwood.program import cuda, cuda_completion
from sapwood.program.cuda_attention import StepLens
from sapwood.program.cuda_executor import CudaExecutor, StepLauncher
from sapwood.program.cuda_library import CudaLibrary
from sapwood.program.cuda_rows import DeviceRows, StepShape, max_blob_bytes
from sapwood.program.ir import L, Node, T, Value

SLOT_SEED, FOLD_SEED = 0x5A5A0001, 0x5A5A0002
GARBAGE = 0xDEADBEEFDEADBEEF - 2**64
OWN, SEEN = 0, 1  # what a slot holds
# How a step fails: before anything is launched; halfway; on the device, where nobody knows before the result is read.
# In the latter two half of its slots are overwritten by garbage.
FAILURES = ("unsent", "launched", "device")
# Below the token's that wins: nobody draws another, at any temperature of a test.
LOSES = -1e4


def mix(h: Any, x: Any) -> Any:
    """A round of the hash; shifts of a signed number are made those of an unsigned one."""
    h = (h ^ x) * (0x9E3779B97F4A7C15 - 2**64)
    h = (h ^ (h >> 29 & 2**35 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    return h ^ (h >> 32 & 2**32 - 1)


class ChecksumAttention:
    """Of an AttentionBackend, what the host tells the device of a step."""

    in_graphs = True
    told_bytes = 0

    def __init__(self, page_size: int) -> None:
        self.shared_chunk = 2 * page_size
        self.lens = StepLens(np.zeros(0, np.int32), np.zeros(0, np.int64))

    def fits_graph(self, lens: StepLens) -> bool:
        return True

    def write(self, lens: StepLens, out: Any) -> int:
        self.lens = lens
        return 0

    def load(self, told: torch.Tensor) -> None:
        pass

    def begin(self, shape: StepShape, lens: StepLens | None) -> None:
        pass


class ChecksumModel:
    """In the place of a CudaModel.

    bad_every    > 0: the logits of every bad_every-th row are NaN
    fail_every   > 0: every fail_every-th step fails, in turns in the ways of FAILURES, beginning with first_failure
    stall_seed   not 0: random stalls of up to stall_us, of the launching thread and of the device
    """

    kept_begin = 0  # there are no masks, so no row is held

    def __init__(
        self,
        groups: Sequence[_core.KvGroup],
        num_pages: Sequence[int],
        vocab_size: int,
        rows: DeviceRows,
        *,
        stall_seed: int = 0,
        stall_us: int = 0,
        bad_every: int = 0,
        fail_every: int = 0,
        first_failure: str = FAILURES[0],
    ) -> None:
        self.rows = rows
        logits = Value(1, "logits", "float32", L, vocab_size)
        hidden = Value(0, "hidden", "float32", T, 1)
        self.program: Any = SimpleNamespace(
            nodes=[
                Node("qkv", "forward", "own", 0, (), (hidden,), (), {}),
                Node("attention", "forward", "seen", 0, (hidden,), (hidden,), (), {}),
                Node("lm_head", "head", "fold", None, (hidden,), (logits,), (), {}),
            ]
        )
        self._groups, self._num_pages = groups, num_pages
        # [OWN, SEEN][slot] of each group; the last is where everything goes that is no slot.
        self._pool = [
            torch.full((2, pages * rows.page_size + 1), GARBAGE, dtype=torch.int64, device=rows.device)
            for pages in num_pages
        ]
        self._logits = torch.empty((rows.max_rows, vocab_size), device=rows.device)
        self._vocab_size = vocab_size
        self._stall_rng = random.Random(stall_seed) if stall_seed and stall_us else None
        self._stall_us = stall_us
        self._bad_every, self._num_logit_rows = bad_every, 0
        self._fail_every, self._num_steps = fail_every, 0
        self._failures = itertools.cycle(FAILURES)
        while (failure := next(self._failures)) != first_failure:
            pass
        self._failures = itertools.chain((failure,), self._failures)
        self._failure = ""  # of the running step

    def copy_pages(self, copies: Iterable[tuple[int, int, int]]) -> None:
        self._num_steps += 1
        fails = self._fail_every > 0 and self._num_steps % self._fail_every == 0
        self._failure = next(self._failures) if fails else ""
        if self._failure == "unsent":
            raise SapwoodError("the step was to fail")
        size = self.rows.page_size
        for group, source, target in copies:
            pool = self._pool[group]
            pool[:, target * size : (target + 1) * size] = pool[:, source * size : (source + 1) * size]

    def value(self, value: Value, shape: StepShape) -> torch.Tensor:
        return self._logits[: shape.num_logit_rows]

    def begin(self, shape: StepShape) -> None:
        self._stall()

    def launch(self, nodes: Iterable[Node], shape: StepShape, attention: ChecksumAttention) -> None:
        for node in nodes:
            match node.op:
                case "qkv":
                    self._write_own(shape.num_tokens)
                case "attention":
                    self._fail(shape.num_tokens)
                    self._write_seen(shape, attention.lens)
                    self._stall()
                case "lm_head" if shape.num_logit_rows > 0:
                    self._say_next_tokens(shape, attention.lens)

    def _write_own(self, num_tokens: int) -> None:
        arrays = self.rows.arrays
        own = mix(mix(SLOT_SEED, arrays.tokens[:num_tokens].long()), arrays.positions[:num_tokens].long())
        for group, pool in enumerate(self._pool):
            pool[OWN, self._slots(group, num_tokens)] = own

    def _write_seen(self, shape: StepShape, lens: StepLens) -> None:
        segments = self._segments(torch.arange(shape.num_tokens, device=self.rows.device), shape)
        position = self.rows.arrays.positions[: shape.num_tokens].long()
        for group, pool in enumerate(self._pool):
            slots = self._slots(group, shape.num_tokens)
            first = self._first_visible(group, position)
            ends = torch.stack((first, (position - 1).clamp(min=0)), 1)
            low, high = self._read(group, OWN, segments, ends, shape, lens).unbind(1)
            own = pool[OWN, slots]
            pool[SEEN, slots] = torch.where(first < position, mix(mix(own, low), high), own)

    def _say_next_tokens(self, shape: StepShape, lens: StepLens) -> None:
        arrays, count = self.rows.arrays, shape.num_logit_rows
        source = arrays.logit_src[:count].long()
        segments = self._segments(source, shape)
        position = arrays.kv_lens[segments].long() - (arrays.q_indptr[segments + 1] - source)
        places = torch.arange(int(lens.kv_bounds.max(initial=1)), device=self.rows.device).expand(count, -1)
        h: Any = FOLD_SEED
        for group in range(len(self._pool)):
            seen = self._read(group, SEEN, segments, places, shape, lens)
            visible = (places >= self._first_visible(group, position)[:, None]) & (places <= position[:, None])
            h = mix(h, torch.where(visible, mix(mix(FOLD_SEED, places), seen), 0).sum(1))
        token = ((h >> 1 & 2**63 - 1) % self._vocab_size * 2 + (h & 1)) % self._vocab_size
        # What the sampler goes by must be of the same token.
        agree = (arrays.logit_rows[:count] == arrays.page_rows[segments]) & (
            arrays.sampling["position"][:count] == position + 1
        )
        token = torch.where(agree, token, (token + 1) % self._vocab_size)
        self._logits[:count] = LOSES
        self._logits[:count].scatter_(1, token[:, None], 0.0)
        for row in range(count if self._bad_every else 0):
            self._num_logit_rows += 1
            if self._num_logit_rows % self._bad_every == 0:
                self._logits[row : row + 1, 5] = float("nan")

    def _segments(self, tokens: torch.Tensor, shape: StepShape) -> torch.Tensor:
        """Of each query token; those behind the last one's end are the last one's."""
        ends = self.rows.arrays.q_indptr[1 : shape.num_segments + 1].long()
        return torch.searchsorted(ends, tokens, right=True).clamp(max=shape.num_segments - 1)

    def _first_visible(self, group: int, position: torch.Tensor) -> torch.Tensor:
        spec = self._groups[group]
        return (position + 1 - spec.window).clamp(min=0) if spec.kind == "window" else torch.zeros_like(position)

    def _slots(self, group: int, num_tokens: int) -> torch.Tensor:
        """Where each token writes."""
        slots = self.rows.arrays.slots[group][:num_tokens]
        nowhere = len(self._pool[group][OWN]) - 1
        return torch.where((slots >= 0) & (slots < nowhere), slots, nowhere)

    def _read(
        self, group: int, what: int, segments: torch.Tensor, positions: torch.Tensor, shape: StepShape, lens: StepLens
    ) -> torch.Tensor:
        """[N, M] of the slots at positions [N, M] of the rows of segments [N], through the page tables."""
        arrays, size = self.rows.arrays, self.rows.page_size
        rows = arrays.page_rows[segments].long()[:, None]
        if lens.prefixes is not None and len(lens.prefixes[2]) and self._groups[group].kind == "full":
            through, prefix_lens = self._prefixes(shape, lens.prefixes)
            rows = torch.where(positions < prefix_lens[segments][:, None], through[segments][:, None], rows)
        pages = arrays.page_tables[group][rows, positions // size].long()
        slots = pages * size + positions % size
        nowhere = len(self._pool[group][OWN]) - 1
        there = (pages >= 0) & (pages < self._num_pages[group])
        return self._pool[group][what][torch.where(there, slots, nowhere)]

    def _prefixes(self, shape: StepShape, prefixes: tuple[Any, Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each segment, through which row's pages its prefix is read, and how long that is.

        As cuda/attention/plan.cu has it: all read through those of one, and none where one has ended.
        """
        arrays, count = self.rows.arrays, shape.num_segments
        before = arrays.kv_lens[:count].long() - arrays.q_indptr[: count + 1].diff()
        rows = arrays.page_rows[:count].long()
        through, lens = rows.clone(), torch.zeros_like(rows)
        indptr, segments, prefix_lens = prefixes
        for i, prefix_len in enumerate(prefix_lens.tolist()):
            its = torch.from_numpy(segments[indptr[i] : indptr[i + 1]]).long().to(rows.device)
            through[its] = rows[its[0]]
            lens[its] = before[its].min().clamp(max=prefix_len)
        return through, lens

    def _fail(self, num_tokens: int) -> None:
        if not self._failure:
            return
        for group, pool in enumerate(self._pool):
            pool[:, self._slots(group, num_tokens)[::2]] = GARBAGE
        if self._failure == "launched":
            raise SapwoodError("the step was to fail")
        self.rows.failed[0] = 1

    def _stall(self) -> None:
        if self._stall_rng is None:
            return
        us = self._stall_rng.randrange(self._stall_us)
        match self._stall_rng.randrange(4):
            case 0:
                time.sleep(0)  # lets go of the interpreter
            case 1:
                time.sleep(us * 1e-6)
            case 2 if self.rows.device.type == "cuda":
                torch.cuda._sleep(us * 1500)  # cycles


def start(
    device: tuple[CudaLibrary, str],
    groups: Sequence[_core.KvGroup],
    num_pages: Sequence[int],
    config: EngineConfig,
    *,
    vocab_size: int,
    context_len: int,
    max_step_tokens: int,
    **checksum: Any,
) -> CudaExecutor:
    """As cuda.CudaDevice.start, of the checksum model."""
    library, name = device
    stream = torch.cuda.Stream(name) if name != "cpu" else None
    max_rows, max_pages = config.max_running_requests, -(-context_len // config.page_size)
    max_tokens = max(max_step_tokens, max_rows)
    rows = DeviceRows(
        len(groups),
        max_rows=max_rows,
        page_size=config.page_size,
        max_pages=max_pages,
        max_stop_ids=cuda.MAX_STOP_IDS,
        max_tokens=max_tokens,
        blob_bytes=max_blob_bytes(max_rows, max_pages, max_tokens, len(groups), cuda.MAX_STOP_IDS),
        vocab_size=vocab_size,
        device=name,
        library=library,
        stream=stream,
    )
    rows.set_dummy_pages(num_pages)
    model: Any = ChecksumModel(groups, num_pages, vocab_size, rows, **checksum)
    attention: Any = ChecksumAttention(config.page_size)
    launcher = StepLauncher(model, attention, None, max_graph_rows=max_rows, max_graph_tokens=max_tokens)
    launcher.capture()
    if stream is not None:
        torch.cuda.synchronize(name)  # what fills memory is on another stream
    event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    completion = cuda_completion.Completion(
        library,
        None if stream is None else stream.cuda_stream,
        event_fd,
        lambda: cuda._record_event(stream),
    )
    packer = _core.PlanPacker(
        groups, max_rows, max_pages=max_pages, max_stop_ids=cuda.MAX_STOP_IDS, vocab_size=vocab_size
    )
    return CudaExecutor(launcher, rows, packer, completion, event_fd, stream, trace_capacity=config.trace_capacity)
