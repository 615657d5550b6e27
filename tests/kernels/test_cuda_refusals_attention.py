"""Attention's launchers refuse wrong arguments by name, before anything is launched."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.program.cuda_library import AttentionParams, AttentionPlanParams, CudaLibrary

POINTERS = (
    "q", "out", "k_pages", "v_pages", "page_table", "page_rows", "q_indptr", "kv_lens", "tiles", "items", "counts",
    "partial_o", "partial_ml",
)  # fmt: skip

PREFIX_POINTERS = ("prefix_indptr", "prefix_segments", "prefix_lens", "shared_tiles", "shared_rows", "prefix_scratch")


def attention(**changes: Any) -> AttentionParams:
    fields: dict[str, Any] = dict.fromkeys(POINTERS, 64)
    fields |= dict(num_kv_heads=2, group=4, head_dim=64, page_size=16, rows_per_tile=16, chunk_len=512, window=0)
    fields |= dict(q_stride=512, out_stride=512, page_stride=4096, table_stride=8, scale=0.1, softcap=0.0, num_blocks=2)
    fields |= dict(num_pages=9)
    return AttentionParams(**{**fields, **changes})


def plan(**changes: Any) -> AttentionPlanParams:
    fields: dict[str, Any] = dict.fromkeys(("q_indptr", "kv_lens", "tiles", "items", "counts"), 64)
    fields |= dict(num_segments=1, group=4, rows_per_tile=16, chunk_len=512, max_tiles=4, max_items=4, max_rows=99)
    return AttentionPlanParams(**{**fields, **changes})


@pytest.mark.parametrize("op", ["attention", "attention_merge"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads and group must be positive, got 0 and 4"),
        ({"head_dim": 60}, "head_dim must be a multiple of 8 in 8..256, got 60"),
        ({"head_dim": 264}, "head_dim must be a multiple of 8 in 8..256, got 264"),
        ({"page_size": 0}, "page_size must be positive, got 0"),
        ({"rows_per_tile": 64}, "rows_per_tile must be 16 or, where head_dim = 64, 128, got 64"),
        ({"chunk_len": 96}, "chunk_len must be a positive multiple of 64, got 96"),
        ({"window": -1}, "window must not be negative, got -1"),
        ({"softcap": -1.0}, "softcap must not be negative, got -1"),
        ({"num_blocks": 0}, "num_blocks must be positive, got 0"),
        ({"num_pages": 0}, "num_pages must be positive, got 0"),
        ({"q_stride": 516}, "q_stride must be a multiple of 8 and at least 512, got 516"),
        ({"out_stride": 510}, "out_stride must be even and at least 512, got 510"),
        ({"page_stride": 2040}, "page_stride must be a multiple of 8 and at least 2048, got 2040"),
        ({"partial_o": None}, "no pointer but tickets, sinks, shared_tiles and shared_rows may be null"),
        ({"shared_tiles": 64}, "shared_tiles and shared_rows must both be null, or rows_per_tile 16 and window 0"),
        ({"shared_rows": 64}, "shared_tiles and shared_rows must both be null, or rows_per_tile 16 and window 0"),
        ({"shared_rows": 72, "shared_tiles": 64}, "and shared_rows must be aligned to 16 bytes"),
        ({"shared_rows": 64, "shared_tiles": 64, "window": 9}, "or rows_per_tile 16 and window 0, got 16 and 9"),
        ({"shared_rows": 64, "shared_tiles": 64, "rows_per_tile": 128}, "16 and window 0, got 128 and 0"),
        ({"k_pages": 72}, "aligned to 16 bytes"),
    ],
)
def test_attention_names_the_wrong_argument(emulated: CudaLibrary, op: str, changes: dict[str, Any], said: str) -> None:
    assert emulated.status(op, attention(**changes)) == -1
    assert emulated.last_error().startswith(f"{op}: ") and said in emulated.last_error()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_segments": 0}, "num_segments must be in 1..16384, got 0"),
        ({"num_segments": 16385}, "num_segments must be in 1..16384, got 16385"),
        ({"group": 0}, "group must be positive, got 0"),
        ({"rows_per_tile": 0}, "rows_per_tile must be positive, got 0"),
        ({"chunk_len": 0}, "chunk_len must be a positive multiple of 64, got 0"),
        ({"window": -5}, "window must not be negative, got -5"),
        ({"max_items": -1}, "must not be negative, got 4 and -1"),
        ({"counts": None}, "must not be null"),
        ({"num_prefixes": -1}, "num_prefixes must be in 0..512, got -1"),
        ({"num_prefixes": 513}, "num_prefixes must be in 0..512, got 513"),
        ({"window": 8}, "num_prefixes must be 0 where there is a window, got 2 with window = 8"),
        ({"rows_per_tile": 128}, "rows_per_tile must be 16 where num_prefixes is not 0, got 128"),
        ({"prefix_scratch": None}, "and prefix_scratch must not be null where num_prefixes is not 0"),
        ({"shared_rows": 72}, "shared_rows must be aligned to 16 bytes"),
    ],
)
def test_plan_names_the_wrong_argument(emulated: CudaLibrary, changes: dict[str, Any], said: str) -> None:
    changes = dict.fromkeys(PREFIX_POINTERS, 64) | {"num_prefixes": 2} | changes
    assert emulated.status("attention_plan", plan(**changes)) == -1
    assert said in emulated.last_error()
