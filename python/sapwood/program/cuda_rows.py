"""The state of rows on the device (cuda/batch), and the arrays of the running step, all in memory that stays in place.

program/cuda_executor.py brings a packed plan to `blob`, as part of `order`, and calls, in stream order: apply_row_ops,
prepare, then the forward (program/cuda_model.py), sample, commit; `result`, part of `answer`, is what became of it.
The tokens of a step are drawn and fed back here, so the host may queue the next step without having seen them. The
masks of a step that draws under some are brought to `masks` before sample.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import torch

from sapwood import _core
from sapwood.program.cuda_library import (
    ROW_BYTES,
    CommitStepParams,
    CudaLibrary,
    Params,
    PrepareStepParams,
    RowOpsParams,
    RowState,
    SampleParams,
)

MAX_GROUPS: Final = 8
RESULT_HEADER_BYTES: Final = 64
RESULT_ITEM_BYTES: Final = 16
FAILED_BYTES: Final = 16
ALIGNMENT: Final = 16  # of the parts of an order


@dataclasses.dataclass(frozen=True)
class StepShape:
    """The sizes that launches of a step are made for, padding included."""

    num_tokens: int
    num_segments: int
    num_logit_rows: int


@dataclasses.dataclass(frozen=True)
class StepArrays:
    """What prepare_step writes (cuda/batch/params.h): of T tokens, S segments, L logit rows."""

    tokens: torch.Tensor  # int32 [T], as positions and rope_modes
    positions: torch.Tensor
    rope_modes: torch.Tensor
    slots: list[torch.Tensor]  # of each group, int64 [T]
    page_tables: list[torch.Tensor]  # of each group, int32 [rows + 1, pages]
    q_indptr: torch.Tensor  # int32 [S + 1]
    kv_lens: torch.Tensor  # int32 [S]
    page_rows: torch.Tensor  # int32 [S]
    logit_src: torch.Tensor  # int32 [L]
    logit_rows: torch.Tensor  # int32 [L]
    sampling: dict[str, torch.Tensor]  # by the names of SampleParams


class DeviceRows:
    """Rows, their page tables, and a step's arrays.

    Thread safety: none; one thread launches.
    """

    def __init__(
        self,
        num_groups: int,
        *,
        max_rows: int,
        page_size: int,
        max_pages: int,
        max_stop_ids: int,
        max_tokens: int,
        blob_bytes: int,
        vocab_size: int,
        device: str,
        library: CudaLibrary,
        stream: torch.cuda.Stream | None,
    ) -> None:
        """max_pages: of one row. max_tokens: most of a step, padding included; a step has at most max_rows segments and
        logit rows. blob_bytes: most of a packed plan and of what goes to the device behind it. stream: None on the
        emulated device.
        """
        self.device = torch.device(device)
        self.max_rows = max_rows
        self.page_size = page_size
        self._library = library
        self._stream = stream

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        # A step's result, its blob, and between them `failed`, where plans of attention's work collect what is wrong
        # with them (cuda/attention/params.h): zeros come to it in the copy that brings the blob, and it goes back in
        # the one of the result.
        result_bytes = RESULT_HEADER_BYTES + RESULT_ITEM_BYTES * max_rows
        messages = zeros(result_bytes + FAILED_BYTES + blob_bytes, dtype=torch.uint8)
        self.answer, self.order = messages[: result_bytes + FAILED_BYTES], messages[result_bytes:]
        self.result, self.blob = self.answer[:-FAILED_BYTES], self.order[FAILED_BYTES:]
        self.failed = self.answer[-FAILED_BYTES:].view(torch.int32)
        # A _core.PackedMasks block: two int64 and an int32 of each row at most, and a mask.
        self._mask_words = -(-vocab_size // 32)
        self.masks = zeros(max_rows * (20 + 4 * self._mask_words), dtype=torch.uint8)
        self.drawn = zeros(3, max_rows)  # tokens, log-probabilities (float32 bits), bad
        i64, f32 = torch.int64, torch.float32
        sampling = {
            "temperature": zeros(max_rows, dtype=f32),
            "top_k": zeros(max_rows),
            "top_p": zeros(max_rows, dtype=f32),
            "min_p": zeros(max_rows, dtype=f32),
            "seed": zeros(max_rows, dtype=i64),
            "stream": zeros(max_rows),
            "position": zeros(max_rows, dtype=i64),
            "want_logprob": zeros(max_rows),
            "banned_indptr": zeros(max_rows + 1),
            "banned_ids": zeros(max_rows * max_stop_ids),
        }
        self.arrays = StepArrays(
            tokens=zeros(max_tokens),
            positions=zeros(max_tokens),
            rope_modes=zeros(max_tokens),
            slots=[zeros(max_tokens, dtype=i64) for _ in range(num_groups)],
            page_tables=[zeros(max_rows + 1, max_pages) for _ in range(num_groups)],
            q_indptr=zeros(max_rows + 1),
            kv_lens=zeros(max_rows),
            page_rows=zeros(max_rows),
            logit_src=zeros(max_rows),
            logit_rows=zeros(max_rows),
            sampling=sampling,
        )
        self._rows = zeros(max_rows * ROW_BYTES, dtype=torch.uint8)
        self._stop_ids = zeros(max_rows * max_stop_ids)
        self._state = RowState(
            rows=self._rows.data_ptr(),
            stop_ids=self._stop_ids.data_ptr(),
            page_tables=_pointers(self.arrays.page_tables),
            num_groups=num_groups,
            max_rows=max_rows,
            max_pages=max_pages,
            max_stop_ids=max_stop_ids,
            page_size=page_size,
        )

    def set_dummy_pages(self, pages: Sequence[int]) -> None:
        """The page of each group that padding reads: one behind the pool's own, which nothing writes."""
        for table, page in zip(self.arrays.page_tables, pages, strict=True):
            table[self.max_rows] = page

    def apply_row_ops(self) -> None:
        """Of the plan in `blob`; begins `result`. Always the first of a step."""
        self._call("row_ops", RowOpsParams(state=self._state, blob=self.blob.data_ptr(), result=self.result.data_ptr()))

    def prepare(self, shape: StepShape, kept_begin: int) -> None:
        """The step's arrays, padded to the shape. kept_begin: logit_src of what is kept of row 0 while it is held."""
        a = self.arrays
        params = PrepareStepParams(
            num_padded_tokens=shape.num_tokens,
            num_padded_segments=shape.num_segments,
            num_padded_logit_rows=shape.num_logit_rows,
            kept_begin=kept_begin,
            state=self._state,
            blob=self.blob.data_ptr(),
            result=self.result.data_ptr(),
            slots=_pointers(a.slots),
            **{
                name: getattr(a, name).data_ptr()
                for name in (
                    "tokens", "positions", "rope_modes", "q_indptr", "kv_lens", "page_rows", "logit_src", "logit_rows",
                )
            },
            **{name: array.data_ptr() for name, array in a.sampling.items()},
        )  # fmt: skip
        self._call("prepare_step", params)

    def held(self, masks: _core.PackedMasks) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that the block in `masks` holds: query tokens whose hidden states are to be kept, and rows."""
        queries, rows = self.masks[: 16 * masks.num_held].view(torch.int64).view(2, masks.num_held)
        return queries, rows

    def sample(self, logits: torch.Tensor, *, bans: bool, masks: _core.PackedMasks | None = None) -> None:
        """Draw a token of each row of logits [L, vocab] float32 into `drawn`. bans: whether any row may have some.
        masks: of the block in `masks`; None: nobody needs one.
        """
        num_rows, vocab = logits.shape
        arrays = {n: a.data_ptr() for n, a in self.arrays.sampling.items() if bans or not n.startswith("banned")}
        params = SampleParams(
            **arrays, num_rows=num_rows, vocab=vocab, logits=logits.data_ptr(), logits_stride=logits.stride(0),
            token=self.drawn[0].data_ptr(), logprob=self.drawn[1].data_ptr(), bad=self.drawn[2].data_ptr(),
        )  # fmt: skip
        if masks is not None:
            params.mask = self.masks.data_ptr() + masks.masks
            params.mask_index = self.masks.data_ptr() + masks.mask_index
            params.mask_stride = self._mask_words
            params.num_mask_rows = max(1, masks.num_masks)  # where all are late, nobody asks for this one
        self._call("sample", params)

    def commit(self, masks: _core.PackedMasks | None = None) -> None:
        """Each row takes its token, or is held; `result` is complete."""
        self._call(
            "commit_step",
            CommitStepParams(
                state=self._state,
                blob=self.blob.data_ptr(),
                result=self.result.data_ptr(),
                page_rows=self.arrays.page_rows.data_ptr(),
                token=self.drawn[0].data_ptr(),
                logprob=self.drawn[1].data_ptr(),
                bad=self.drawn[2].data_ptr(),
                mask_index=None if masks is None else self.masks.data_ptr() + masks.mask_index,
            ),
        )

    def _call(self, op: str, params: Params) -> None:
        self._library.call(op, params, None if self._stream is None else self._stream.cuda_stream)


def _pointers(tensors: Sequence[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * MAX_GROUPS)(*(tensor.data_ptr() for tensor in tensors))


def max_blob_bytes(max_rows: int, max_pages: int, max_tokens: int, num_groups: int, max_stop_ids: int) -> int:
    """No packed plan has more: each row is freed, begun, given all its pages and forced or cut once."""
    ops = 48 * max_rows * (6 + 2 * num_groups)
    ints = 4 * max_rows * (num_groups * max_pages + max_stop_ids)
    return 4096 + ops + ints + 80 * max_rows + 48 * max_rows + 4 * max_tokens
