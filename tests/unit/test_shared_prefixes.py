"""_core.find_shared_prefixes: page tables in, attention_plan's lists out; tests/cpp/shared_prefix_test.cc: which."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sapwood import _core

TABLE = np.array([[5, 6, 7, -1], [1, 2, 3, 4], [5, 6, 8, 9], [5, 6, 7, 3]], np.int32)


def find(tokens: list[int], chunk_len: int) -> list[list[int]]:
    arrays = _core.find_shared_prefixes(TABLE, np.array(tokens, np.int64), 16, chunk_len)
    assert all(array.dtype == np.int32 for array in arrays)
    return [array.tolist() for array in arrays]


def test_prefixes_are_csr_with_lengths_in_tokens() -> None:
    assert find([47, 63, 63, 63], 16) == [[0, 3], [0, 2, 3], [32]]
    assert find([48, 63, 63, 63], 48) == [[0, 2], [0, 3], [48]]
    assert find([47, 63, 63, 63], 48) == [[0], [], []]


def test_a_segment_of_no_tokens_shares_nothing() -> None:
    assert find([0, 63, 63, 63], 16) == [[0, 2], [2, 3], [32]]
    assert find([0, 0, 0, 0], 16) == [[0], [], []]


@pytest.mark.parametrize(
    ("table", "tokens", "sizes", "said"),
    [
        (TABLE[0], [1], (16, 64), "page_table must be .segments, pages. and tokens .segments., got 1 and 1 dimensions"),
        (TABLE, [1, 2], (16, 64), "got 2 and 1 dimensions, 16 and 2 elements"),
        (
            TABLE,
            [1, 2, 65, 4],
            (16, 64),
            "tokens of segment 2 must be at most 64, which page_table has room for, got 65",
        ),
        (TABLE, [1, 2, 3, 4], (0, 64), "page_size and chunk_len must be positive, got 0 and 64"),
        (TABLE, [1, 2, 3, 4], (16, 0), "page_size and chunk_len must be positive, got 16 and 0"),
    ],
)
def test_what_does_not_fit_is_refused(table: Any, tokens: list[int], sizes: tuple[int, int], said: str) -> None:
    with pytest.raises(Exception, match=said):
        _core.find_shared_prefixes(table, np.array(tokens, np.int64), *sizes)
