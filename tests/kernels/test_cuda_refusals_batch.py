"""The launchers of the row state refuse wrong arguments and say which, before anything is launched."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from sapwood.program.cuda_library import (
    MAX_GROUPS,
    CommitStepParams,
    CudaLibrary,
    Params,
    PrepareStepParams,
    RowOpsParams,
    RowState,
)

OPS = ("row_ops", "prepare_step", "commit_step")
SEGMENT_ARRAYS = ("tokens", "positions", "rope_modes", "q_indptr", "kv_lens", "page_rows")
LOGIT_ARRAYS = (
    "logit_src", "logit_rows", "temperature", "top_k", "top_p", "min_p", "seed", "stream", "position", "want_logprob",
)  # fmt: skip


def tables(*pointers: int | None) -> Any:
    return (ctypes.c_void_p * MAX_GROUPS)(*pointers)


def params(op: str, **changes: Any) -> Params:
    """state_*: of the state."""
    state: dict[str, Any] = dict(rows=64, stop_ids=64, page_tables=tables(64, 64), num_groups=2)
    state |= dict(max_rows=4, max_pages=8, max_stop_ids=2, page_size=16)
    state |= {name[6:]: value for name, value in changes.items() if name.startswith("state_")}
    fields: dict[str, Any] = dict(state=RowState(**state), blob=64, result=64)
    kind: type[Params] = RowOpsParams
    if op == "prepare_step":
        kind = PrepareStepParams
        fields |= dict(num_padded_tokens=1, num_padded_segments=1, num_padded_logit_rows=1, slots=tables(64, 64))
        fields |= dict.fromkeys((*SEGMENT_ARRAYS, *LOGIT_ARRAYS, "banned_indptr", "banned_ids"), 64)
    elif op == "commit_step":
        kind = CommitStepParams
        fields |= dict.fromkeys(("page_rows", "token", "logprob", "bad"), 64)
    return kind(**fields | {name: value for name, value in changes.items() if not name.startswith("state_")})


def refusal(library: CudaLibrary, op: str, wrong: Params) -> str:
    """The error text of a call that must be refused before anything is launched."""
    assert library.status(op, wrong) == -1
    text = library.last_error()
    assert text.startswith(f"{op}: ")
    return text


@pytest.mark.parametrize("op", OPS)
def test_another_struct_size_is_refused(emulated: CudaLibrary, op: str) -> None:
    wrong = params(op)
    expected = wrong.struct_size
    wrong.struct_size = expected - 8
    assert f"params.struct_size is {expected - 8}, this library expects {expected}" in refusal(emulated, op, wrong)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state_num_groups": 0}, "state.num_groups must be in 1..8, got 0"),
        ({"state_num_groups": 9}, "state.num_groups must be in 1..8, got 9"),
        ({"state_num_groups": 3}, "state.page_tables[2] must not be null"),
        ({"state_max_rows": 0}, "state.max_rows must be in 1..16383, got 0"),
        ({"state_max_rows": 16384}, "state.max_rows must be in 1..16383, got 16384"),
        ({"state_page_size": 0}, "state.page_size must be positive, got 0"),
        ({"state_max_pages": 0}, "max_pages * page_size (16) below 2^31, got 0"),
        ({"state_max_pages": 2**27}, "max_pages * page_size (16) below 2^31, got 134217728"),
        ({"state_max_stop_ids": -1}, "state.max_stop_ids must not be negative, got -1"),
        ({"state_rows": None}, "state.rows and state.stop_ids must not be null"),
        ({"state_stop_ids": None}, "state.rows and state.stop_ids must not be null"),
        ({"blob": None}, "blob and result must not be null"),
        ({"result": None}, "blob and result must not be null"),
        ({"blob": 72}, "blob and result must be aligned to 16 bytes"),
        ({"result": 72}, "blob and result must be aligned to 16 bytes"),
    ],
)
def test_the_state_is_looked_at(emulated: CudaLibrary, op: str, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(emulated, op, params(op, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_padded_tokens": 0}, "num_padded_tokens must be in 1..1073741823, got 0"),
        ({"num_padded_tokens": 2**30}, "num_padded_tokens must be in 1..1073741823, got 1073741824"),
        ({"num_padded_segments": 0}, "num_padded_segments must be in 1..16384, got 0"),
        ({"num_padded_segments": 16385}, "num_padded_segments must be in 1..16384, got 16385"),
        ({"num_padded_logit_rows": -1}, "num_padded_logit_rows must be in 0..357913941, got -1"),
        ({"num_padded_logit_rows": 357913942}, "num_padded_logit_rows must be in 0..357913941, got 357913942"),
        ({"kept_begin": -1}, "kept_begin must be in 0..2147483643, got -1"),
        ({"kept_begin": 2**31 - 4}, "kept_begin must be in 0..2147483643, got 2147483644"),
        ({"slots": tables(64)}, "slots[1] must not be null"),
        ({"banned_ids": None}, "banned_indptr and banned_ids must not be null"),
        ({"banned_indptr": None}, "banned_indptr and banned_ids must not be null"),
        *(({name: None}, name) for name in (*SEGMENT_ARRAYS, *LOGIT_ARRAYS)),
    ],
)
def test_prepare_step_names_the_wrong_argument(emulated: CudaLibrary, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(emulated, "prepare_step", params("prepare_step", **changes))


@pytest.mark.parametrize("name", ["page_rows", "token", "logprob", "bad"])
def test_commit_step_names_the_missing_array(emulated: CudaLibrary, name: str) -> None:
    text = refusal(emulated, "commit_step", params("commit_step", **{name: None}))
    assert name in text and "must not be null" in text
