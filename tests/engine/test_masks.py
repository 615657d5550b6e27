"""Grammar masks through the bindings: posted in time, late or never; what builder and executors say of a held row.

The test plays the grammar and the loop; tokens are checked against the checksum model's, which are computed from the
tokens and masks alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapwood import _core
from sapwood.errors import InvalidRequest

VOCAB = 211
PROMPT = list(range(3, 12))


def mask_at(position: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """A third of the tokens, others at each position."""
    allowed = np.arange(-(-VOCAB // 32) * 32) % 3 == position % 3
    return np.packbits(allowed, bitorder="little").view(np.uint32)


class World:
    """Cache, builder and executor with the checksum model, driven step by step."""

    def __init__(self) -> None:
        self.groups = [_core.KvGroup(page_size=4)]
        self.cache = _core.CacheManager(self.groups, [64])
        self.builder = _core.BatchBuilder(self.cache, 4)
        self.executor = _core.Executor(_core.checksum_runner(self.groups, [64], VOCAB), self.groups, 4)
        self.next_step = 0

    def admit(self, *, masked: bool, max_len: int = 64) -> int:
        row, _, _ = self.builder.admit(
            0, np.asarray(PROMPT, np.int32), prompt_len=len(PROMPT), max_len=max_len, masked=masked
        )
        return row

    def post(self, row: int) -> None:
        position = self.builder.num_tokens(row)
        self.executor.post_mask(row, self.builder.gen(row), position, mask_at(position))
        self.builder.mask_posted(row, position)

    def step(self) -> tuple[_core.BuiltStep, list[tuple[int, int, int]]]:
        """Every row that can goes on; (row, token, flags) of what came of it."""
        self.builder.begin_step(self.next_step)
        self.next_step += 1
        self.builder.add_decodes()
        for row in range(4):
            if self.builder.phase(row) == "extend":
                self.builder.add_extend(row, 100)
        built = self.builder.end_step()
        assert built.plan is not None
        self.executor.submit(built.plan)
        self.executor.wait_idle()
        result = self.executor.drain()[-1][2]
        assert result is not None and not result.error
        rows, tokens, flags, _ = self.builder.commit(result)
        self.builder.check_invariants()
        return built, list(zip(rows, tokens, flags, strict=True))

    def expected(self, num_tokens: int) -> list[int]:
        tokens = list(PROMPT)
        for position in range(len(PROMPT), len(PROMPT) + num_tokens):
            array = np.asarray(tokens, np.int32)
            tokens.append(_core.checksum_next_token(self.groups, VOCAB, array, mask_at(position)))
        return tokens


def test_late_and_timely_masks_draw_the_same_tokens() -> None:
    world = World()
    timely, late, free = world.admit(masked=True), world.admit(masked=True), world.admit(masked=False)
    for _ in range(5):
        world.post(timely)
        built, came = world.step()
        assert built.plan is not None and built.plan.mask_rows == [timely, late]
        assert [(row, flags) for row, _, flags in came] == [(timely, 0), (late, _core.HELD), (free, 0)]
        assert [token for row, token, _ in came if row == late] == [-1]
        assert world.builder.phase(late) == "held"
        for row in (timely, free):
            world.builder.pause(row)
        world.post(late)
        built, came = world.step()
        assert built.plan is not None and built.plan.items() == [(late, world.builder.gen(late), "resume", 0, 0)]
        assert (built.num_resume_rows, built.num_decode_rows, built.num_logit_rows) == (1, 0, 1)
        assert built.plan.num_tokens == 0 and [(row, flags) for row, _, flags in came] == [(late, 0)]
        for row in (timely, free):
            world.builder.resume(row)
    assert world.builder.tokens(timely).tolist() == world.builder.tokens(late).tolist() == world.expected(5)
    assert world.builder.tokens(free).tolist() != world.expected(5)


def test_what_is_no_mask_is_refused() -> None:
    world = World()
    words = mask_at(0)
    for bits in (words[:-1], np.append(words, words), words[None]):
        with pytest.raises(InvalidRequest, match="mask"):
            world.executor.post_mask(0, 1, 0, bits)
    with pytest.raises(InvalidRequest, match="row must be"):
        world.executor.post_mask(4, 1, 0, words)
    with pytest.raises(TypeError):  # converted, a word with its highest bit set would be wrong
        world.executor.post_mask(0, 1, 0, words.view(np.int32))  # type: ignore[arg-type]
    row = world.admit(masked=False)
    with pytest.raises(InvalidRequest, match="without masks"):
        world.builder.mask_posted(row, len(PROMPT))


def test_a_sampler_that_forgets_masks_is_told() -> None:
    world = World()
    rows = _core.RowTable(world.groups, 4, VOCAB)
    row = world.admit(masked=True)
    world.builder.begin_step(0)
    world.builder.add_extend(row, 100)
    plan = world.builder.end_step().plan
    rows.prepare(plan)
    drawn = np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32)
    with pytest.raises(InvalidRequest, match="under a mask"):
        rows.commit(plan, *drawn)
    assert rows.commit(plan, *drawn, np.ones(1, bool)).items()[0][4] == _core.HELD
