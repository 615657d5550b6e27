"""The sampler's launcher refuses wrong arguments and says which, before anything is launched."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.program.cuda_library import CudaLibrary, SampleParams

REQUIRED = (
    "logits", "temperature", "top_k", "top_p", "min_p", "seed", "stream", "position", "want_logprob",
    "token", "logprob", "bad",
)  # fmt: skip
OF_PENALTIES = ("occurred_ids", "output_counts", "in_prompt", "repetition", "frequency", "presence", "saved")
OF_BIASES = ("bias_ids", "bias", "saved")


def sample(**changes: Any) -> SampleParams:
    lists = ("banned_indptr", "banned_ids", "occurred_indptr", *OF_PENALTIES, "bias_indptr", *OF_BIASES)
    fields: dict[str, Any] = dict.fromkeys((*REQUIRED, "mask", "mask_index", *lists), 64)
    fields |= dict(num_rows=1, vocab=33, num_mask_rows=1, mask_stride=2, logits_stride=33)
    return SampleParams(**{**fields, **changes})


def refusal(library: CudaLibrary, params: SampleParams) -> str:
    """The error text of a call that must be refused before anything is launched."""
    assert library.status("sample", params) == -1
    return library.last_error()


def test_another_struct_size_is_refused(emulated: CudaLibrary) -> None:
    params = sample()
    expected = params.struct_size
    params.struct_size = expected - 8
    text = refusal(emulated, params)
    assert text.startswith(f"sample: params.struct_size is {expected - 8}, this library expects {expected}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_rows": -1}, "num_rows must not be negative, got -1"),
        ({"vocab": 0}, "vocab must be in 1..262144, got 0"),
        ({"vocab": 262145, "logits_stride": 262145}, "vocab must be in 1..262144, got 262145"),
        ({"logits_stride": 32}, "logits_stride must be at least vocab = 33, got 32"),
        ({"mask_stride": 1}, "mask_stride must be at least ceil(vocab / 32) = 2, got 1"),
        ({"num_mask_rows": 0}, "num_mask_rows must be positive where mask is given, got 0"),
        ({"mask_index": None}, "mask_index must not be null where mask is given"),
        ({"banned_ids": None}, "banned_ids must not be null where banned_indptr is given"),
        *(({name: None, "bias_indptr": 0}, "where occurred_indptr is given") for name in OF_PENALTIES),
        *(({name: None, "occurred_indptr": 0}, "where bias_indptr is given") for name in OF_BIASES),
        *(({name: None}, "must not be null") for name in REQUIRED),
    ],
)
def test_sample_names_the_wrong_argument(emulated: CudaLibrary, changes: dict[str, Any], said: str) -> None:
    text = refusal(emulated, sample(**changes))
    assert text.startswith("sample: ") and said in text
    assert all(name in text for name, value in changes.items() if value is None)


def test_no_rows_need_no_pointers(emulated: CudaLibrary) -> None:
    assert emulated.status("sample", SampleParams(num_rows=0, vocab=33, logits_stride=33)) == 0
