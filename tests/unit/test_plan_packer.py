"""PlanPacker: what the host knows of a step before its launch, what it refuses, and how a result block is read.

What the device makes of the blobs is checked by bench/gpu_checks/batch.py.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from gpu_checks.batch import APPEND, FORCE, FREE, TRUNCATE, Item, PlanWriter

from sapwood import _core
from sapwood.errors import InternalError, InvalidRequest

Array = np.ndarray[Any, Any]


def packer(**changes: int) -> Any:
    sizes = {"max_rows": 4, "max_pages": 6, "max_stop_ids": 2, "page_size": 4, "vocab_size": 40} | changes
    page_size = sizes.pop("page_size")
    groups = [_core.KvGroup("full", page_size=page_size), _core.KvGroup("window", window=6, page_size=page_size)]
    return _core.PlanPacker(groups, sizes.pop("max_rows"), **sizes)


def pack(on: Any, writer: PlanWriter) -> Any:
    plan = writer.build()
    return on.pack(plan, np.zeros(on.bytes_needed(plan), np.uint8))


def pages(writer: PlanWriter, row: int, gen: int, count: int) -> PlanWriter:
    return writer.op(APPEND, row, gen, ids=range(count)).op(APPEND, row, gen, group=1, ids=range(count))


def begun(**changes: int) -> tuple[Any, PlanWriter]:
    """A packer whose row 1 (generation 5) has 6 of 8 slots filled and has drawn nothing yet; the next plan."""
    on = packer(**changes)
    pack(on, pages(PlanWriter(1).init(1, 5), 1, 5, 2).extend(1, 5, 0, range(6)))
    return on, PlanWriter(2)


# --- Layout and bounds


def test_a_plan_is_laid_out_with_all_items_in_their_places() -> None:
    on = packer()
    writer = pages(PlanWriter(7).init(2, 9, 3, return_logprob=True), 2, 9, 3)
    writer.extend(2, 9, 3, [7, 8, 9], 1).decode(1, 99).extend(0, 98, 4, [6, 5])
    packed = pack(on, writer)
    assert (packed.step_id, packed.sequence, packed.num_items) == (7, 1, 3)
    assert (packed.num_tokens, packed.num_logit_rows, packed.max_q_len) == (6, 3, 3)
    assert packed.q_lens.tolist() == [3, 1, 2] and packed.q_lens.dtype == np.int32
    # Rows that nobody has have the lengths of padding.
    assert packed.kv_bounds.tolist() == [6, 1, 2] and packed.kv_bounds.dtype == np.int64
    assert packed.max_kv_bound == 6 and packed.any_logprob and not packed.any_banned and packed.copies == []
    assert pack(on, PlanWriter(8).decode(2, 9)).kv_bounds.tolist() == [7]


def test_the_blob_is_what_was_asked_for_and_the_same_each_time() -> None:
    plan = pages(PlanWriter(3).init(0, 1, stop_ids=[4]), 0, 1, 2).extend(0, 1, 0, [1, 2, 3], 2).build()
    blobs = []
    for fill in (0, 255):
        on = packer()
        out = np.full(on.bytes_needed(plan) + 32, fill, np.uint8)
        packed = on.pack(plan, out)
        assert packed.num_bytes == on.bytes_needed(plan) and packed.num_bytes % 16 == 0
        assert (out[packed.num_bytes :] == fill).all()
        blobs.append(out[: packed.num_bytes].copy())
    assert np.array_equal(*blobs)
    header = struct.unpack("<IiqqiiiiiiiiiiiIII", blobs[0][:80].tobytes())
    assert header[:8] == (2, len(blobs[0]), 3, 1, 3, 1, 3, 1)
    for at in header[8:15]:
        assert at % 16 == 0 and 80 <= at <= len(blobs[0])
    names = ("row_ops", "inits", "ints", "items", "q_indptr", "logit_indptr", "tokens")
    at = dict(zip(names, header[8:15], strict=True))
    assert blobs[0][at["tokens"] :].view(np.int32)[:3].tolist() == [1, 2, 3]
    assert blobs[0][at["ints"] :].view(np.int32)[:5].tolist() == [4, 0, 1, 0, 1]
    assert blobs[0][at["q_indptr"] :].view(np.int32)[:2].tolist() == [0, 3]
    assert blobs[0][at["logit_indptr"] :].view(np.int32)[:2].tolist() == [0, 1]


def test_bounds_follow_row_ops() -> None:
    on, writer = begun()
    assert pack(on, writer.extend(1, 5, 6, [1, 2], 1)).kv_bounds.tolist() == [8]
    assert pack(on, PlanWriter(3).op(TRUNCATE, 1, 5, value=3).decode(1, 5)).kv_bounds.tolist() == [4]
    assert pack(on, PlanWriter(4).op(FREE, 1, 4).decode(1, 5)).kv_bounds.tolist() == [5]  # another generation's
    assert pack(on, PlanWriter(5).op(FREE, 1, 5).decode(1, 5)).kv_bounds.tolist() == [1]
    assert pack(on, PlanWriter(6).init(1, 6, 20).decode(1, 5)).kv_bounds.tolist() == [1]
    assert pack(on, pages(PlanWriter(7), 1, 6, 6).decode(1, 6)).kv_bounds.tolist() == [21]


def test_copies_are_handed_through() -> None:
    data = bytearray(PlanWriter(3).build().serialize())
    copies = struct.pack("<Iiiiiii", 2, 0, 5, 6, 1, 7, 8)
    plan = _core.StepPlan.deserialize(bytes(data[:-8] + copies + data[-4:]))
    on = packer()
    assert on.pack(plan, np.zeros(on.bytes_needed(plan), np.uint8)).copies == [(0, 5, 6), (1, 7, 8)]


@pytest.mark.parametrize(
    ("min_len", "stop_ids", "logit_from", "any_banned"),
    [
        (5, [1], 3, True),
        (4, [1], 3, False),
        (5, [], 3, False),
        (5, [1], 4, False),
        (2, [1], 0, True),
        (1, [1], 0, False),
    ],
)
def test_bans_are_announced_where_there_may_be_some(
    min_len: int, stop_ids: list[int], logit_from: int, any_banned: bool
) -> None:
    # Logit row q draws the token at position q + 1.
    writer = pages(PlanWriter(1).init(0, 1, min_len=min_len, stop_ids=stop_ids), 0, 1, 1)
    assert pack(packer(), writer.extend(0, 1, 0, [1] * 4, logit_from)).any_banned == any_banned


def test_log_probabilities_are_announced_where_a_row_draws() -> None:
    on = packer()
    writer = pages(PlanWriter(1).init(0, 1, return_logprob=True), 0, 1, 3)
    assert not pack(on, writer.extend(0, 1, 0, [1, 2])).any_logprob
    assert pack(on, PlanWriter(2).extend(0, 1, 2, [1, 2], 1)).any_logprob
    assert pack(on, PlanWriter(3).decode(0, 1)).any_logprob
    assert not pack(on, PlanWriter(4).op(FREE, 0, 1).decode(0, 1)).any_logprob


# --- Refusals


def two_items(writer: PlanWriter) -> None:
    writer.extend(1, 5, 6, [1]).decode(1, 4)


def long_resume(writer: PlanWriter) -> None:
    writer.items.append(Item(1, 5, 4, 1, 0, [], -1))


def unknown_kind(writer: PlanWriter) -> None:
    writer.items.append(Item(1, 5, 2, 1, 0, [], -1))


def long_decode(writer: PlanWriter) -> None:
    writer.items.append(Item(1, 5, 1, 2, 0, [], -1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.decode(4, 1), "item 0 names row 4 of 4"),
        (lambda w: w.decode(-1, 1), "item 0 names row -1 of 4"),
        (two_items, "item 1: row 1 has an item in this step already"),
        (unknown_kind, "item 0: verify is not supported"),
        (long_decode, "item 0: decode of 2 tokens"),
        (long_resume, "item 0: resume of 1 tokens"),
        (lambda w: w.resume(1, 5), "item 0: resume of row 1, which is not held"),
        (lambda w: w.masked(4), "mask_rows names row 4 of 4"),
        (lambda w: w.masked(-1), "mask_rows names row -1 of 4"),
        (lambda w: w.extend(1, 5, 6, []), "item 0: extend of 0 tokens"),
        (lambda w: w.extend(1, 5, 6, [1, 2], 3), "item 0: logit_from 3 of 2"),
        (lambda w: w.extend(1, 5, 6, [1, 2], -1), "item 0: logit_from -1 of 2"),
        (lambda w: w.extend(2, 9, 0, [1] * 25), "item 0: 25 tokens, 6 pages of 4 hold fewer"),
        (lambda w: w.extend(1, 5, 5, [1]), "extend of row 1 expects kv_len 5, the row has 6"),
        (lambda w: w.extend(1, 5, 6, [1] * 3), "row 1 needs 9 slots in group 0, its page table has 2 pages of 4"),
        (
            lambda w: w.op(APPEND, 1, 5, ids=[3]).extend(1, 5, 6, [1] * 3),
            "row 1 needs 9 slots in group 1, its page table has 2 pages of 4",
        ),
        (lambda w: w.op(APPEND, 4, 5, ids=[1]), "row op names row 4 of 4"),
        (lambda w: w.op(APPEND, 1, 4, ids=[1]), "row op for generation 4 of row 1, which is at 5"),
        (lambda w: w.op(APPEND, 1, 5, group=2, ids=[1]), "group 2"),
        (lambda w: w.op(APPEND, 1, 5, ids=[1] * 5), "row 1 has 2 pages in group 0, 5 more are above max_pages = 6"),
        (
            lambda w: w.op(FORCE, 1, 5, ids=[1], value=5),
            "forced tokens at position 5 of row 1, whose next position is 6",
        ),
        (lambda w: w.op(FORCE, 1, 5, value=6), "no forced tokens for row 1"),
        (lambda w: w.op(TRUNCATE, 1, 5, value=7), "row 1 cannot be truncated to 7 from 6"),
        (lambda w: w.op(TRUNCATE, 1, 5, value=-1), "row 1 cannot be truncated to -1"),
        (lambda w: w.init(2, 9, -1), "kv_len -1"),
        (lambda w: w.row_ops.append((APPEND, 1, 5, 0, 1, 3, 0)), "page ids [1, +3) is outside its array of 0"),
        (lambda w: w.row_ops.append((FORCE, 1, 5, 0, -1, 1, 6)), "forced tokens [-1, +1) is outside its array of 0"),
        (lambda w: w.row_ops.append((0, 1, 6, 0, 1, 0, 0)), "init 1 of 0"),
    ],
)
def test_a_bad_plan_is_refused(change: Callable[[PlanWriter], Any], said: str) -> None:
    on, writer = begun()
    change(writer)
    with pytest.raises(InternalError) as caught:
        pack(on, writer)
    assert said in str(caught.value)


def test_too_many_stop_ids_say_what_to_raise() -> None:
    with pytest.raises(InvalidRequest, match="row 3 has 3 stop ids, the device has room for 2: raise max_stop_ids"):
        pack(packer(), PlanWriter(1).init(3, 1, stop_ids=[1, 2, 3]))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.extend(1, 5, 5, [1]),
        lambda w: w.extend(1, 5, 7, [1] * 9),
        lambda w: w.op(FORCE, 1, 5, ids=[1], value=5).decode(1, 5),
        lambda w: w.op(TRUNCATE, 1, 5, value=50).decode(1, 5),
    ],
)
def test_what_only_a_live_row_makes_wrong_is_left_to_the_device(change: Callable[[PlanWriter], Any]) -> None:
    on, writer = begun()
    pack(on, writer.extend(1, 5, 6, [1], 0))  # it may have ended by the token that is drawn here
    writer = PlanWriter(3)
    change(writer)
    assert pack(on, writer).num_items == 1


def test_a_buffer_that_is_too_small_changes_nothing() -> None:
    on, writer = begun()
    plan = writer.extend(1, 5, 6, [1, 2], 1).build()
    needed = on.bytes_needed(plan)
    with pytest.raises(InvalidRequest, match=f"out must have room for {needed} bytes, got {needed - 1}"):
        on.pack(plan, np.zeros(needed - 1, np.uint8))
    packed = on.pack(plan, np.zeros(needed, np.uint8))
    assert packed.kv_bounds.tolist() == [8] and packed.sequence == 2


@pytest.mark.parametrize("shape", [(64, 64), (4096,), (4096, 1)])
def test_the_buffer_must_be_plain_bytes(shape: tuple[int, ...]) -> None:
    out = np.zeros(shape, np.uint8 if len(shape) == 2 else np.int8)
    with pytest.raises(InvalidRequest, match="out must be a writeable, contiguous uint8 array, got"):
        packer().pack(PlanWriter(1).build(), out)
    strided = np.zeros(8192, np.uint8)[::2]
    constant = np.zeros(4096, np.uint8)
    constant.flags.writeable = False
    for wrong in (strided, constant):
        with pytest.raises(InvalidRequest, match="out must be"):
            packer().pack(PlanWriter(1).build(), wrong)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_rows": 0}, "max_rows must be positive, got 0"),
        ({"max_pages": 0}, "max_pages must be positive"),
        ({"max_pages": 2**29}, "below 2\\^31, got 536870912"),
        ({"max_stop_ids": -1}, "max_stop_ids must not be negative, got -1"),
        ({"vocab_size": 0}, "vocab_size must be positive, got 0"),
    ],
)
def test_sizes_are_looked_at(changes: dict[str, int], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        packer(**changes)


def test_groups_are_looked_at() -> None:
    with pytest.raises(InvalidRequest, match="groups must not be empty"):
        _core.PlanPacker([], 1, max_pages=1, max_stop_ids=0, vocab_size=1)
    with pytest.raises(InvalidRequest, match="all groups must have one positive page_size, got 8 beside 4"):
        _core.PlanPacker(
            [_core.KvGroup("full", page_size=4), _core.KvGroup("full", page_size=8)], 1, max_pages=1, max_stop_ids=0,
            vocab_size=1,
        )  # fmt: skip


# --- Masks

WORDS = np.array([0x80000001, 5], np.uint32)


def masks_of(on: Any, packed: Any) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """Query tokens and rows that are held now, the index of masks, and those."""
    out = np.full(on.mask_bytes(packed), 0x5A, np.uint8)
    block = on.pack_masks(packed, out)
    queries, rows = out[: 16 * block.num_held].view(np.int64).reshape(2, -1).tolist()
    index = out[block.mask_index : block.masks].view(np.int32).tolist()
    words = out[block.masks : block.num_bytes].view(np.uint32).reshape(-1, 2).tolist()
    assert block.num_masks == len(words) and (out[block.num_bytes :] == 0x5A).all()
    return queries, rows, index, words


def test_masks_are_asked_for_at_the_newest_position_of_rows_that_draw() -> None:
    on, writer = begun()
    writer.extend(3, 9, 0, [4, 4, 4], 2)  # nobody's row: padding, and in its place a logit row
    pages(writer.init(2, 6), 2, 6, 2).extend(2, 6, 0, [1, 2], 2)  # draws nothing
    writer.extend(1, 5, 6, [7, 8], 0).masked(1, 2, 3, 0)
    packed = pack(on, writer)
    assert packed.masked == [(2, 1, 5, 8, 6)] and packed.num_masked == 1
    assert not on.masks_posted(packed)
    for stale in ((1, 4, 8), (1, 5, 7), (2, 5, 8)):
        on.post_mask(*stale, WORDS)
        assert not on.masks_posted(packed)
    on.post_mask(1, 5, 8, WORDS)
    assert on.masks_posted(packed)
    assert masks_of(on, packed) == ([], [], [-1, -1, 0], [WORDS.tolist()])
    # Drawn under, it is gone, and with it those before.
    assert on.num_masks == 2
    assert pack(on, PlanWriter(3).init(0, 3)).masked == []


def test_a_late_mask_holds_its_row_until_it_is_resumed() -> None:
    on, writer = begun()
    packed = pack(on, writer.extend(1, 5, 6, [7], 0).masked(1))
    assert packed.masked == [(0, 1, 5, 7, 0)] and masks_of(on, packed) == ([0], [1], [-2], [])
    # What has been planned on top, as if the row had ended; it awaits no mask.
    for step_id in (3, 4):
        packed = pack(on, PlanWriter(step_id).decode(1, 5).masked(1))
        assert packed.kv_bounds.tolist() == [1] and packed.masked == [] and packed.num_logit_rows == 1
    # Resumed: no token, a logit row, the position that was held; too early, it is held again.
    packed = pack(on, PlanWriter(5).resume(1, 5).masked(1))
    assert (packed.num_tokens, packed.num_logit_rows, packed.max_kv_bound) == (0, 1, 0)
    assert packed.q_lens.tolist() == packed.kv_bounds.tolist() == [0]
    assert packed.masked == [(0, 1, 5, 7, -1)] and masks_of(on, packed) == ([], [], [-2], [])
    assert pack(on, PlanWriter(6).decode(1, 5)).kv_bounds.tolist() == [1]
    on.post_mask(1, 5, 7, WORDS)
    packed = pack(on, PlanWriter(7).resume(1, 5).masked(1))
    assert masks_of(on, packed) == ([], [], [0], [WORDS.tolist()])
    assert pack(on, PlanWriter(8).decode(1, 5)).kv_bounds.tolist() == [8]


@pytest.mark.parametrize(
    ("change", "kv_bound"),
    [
        (lambda w: w.op(FORCE, 1, 5, ids=[3], value=7), 8),
        (lambda w: w.op(TRUNCATE, 1, 5, value=7), 1),  # to where it is: held
        (lambda w: w.op(TRUNCATE, 1, 5, value=4), 5),
        (lambda w: pages(w.init(1, 5, 3), 1, 5, 1), 4),
        (lambda w: w.op(FREE, 1, 4), 1),
    ],
)
def test_what_ends_a_hold(change: Callable[[PlanWriter], Any], kv_bound: int) -> None:
    on, writer = begun()
    packed = pack(on, writer.extend(1, 5, 6, [7], 0).masked(1))
    masks_of(on, packed)
    writer = PlanWriter(3)
    change(writer)
    assert pack(on, writer.decode(1, 5).masked(1)).kv_bounds.tolist() == [kv_bound]


def test_held_rows_share_no_prefix() -> None:
    on = packer()
    writer = PlanWriter(1)
    for row in range(3):
        pages(writer.init(row, 1), row, 1, 4).extend(row, 1, 0, [1] * 9, 8).masked(row)
    for row in (0, 1):
        on.post_mask(row, 1, 9, WORDS)
    assert masks_of(on, pack(on, writer))[1] == [2]
    plan = PlanWriter(2).decode(0, 1).decode(1, 1).decode(2, 1).build()
    on.pack(plan, np.zeros(on.bytes_needed(plan), np.uint8))
    indptr, segments, lens = on.shared_prefixes(plan, 4)
    assert (indptr.tolist(), sorted(segments.tolist()), lens.tolist()) == ([0, 2], [0, 1], [8])


def test_masks_of_rows_that_have_ended_are_dropped() -> None:
    on, writer = begun()
    plan = pages(writer.init(2, 6).init(3, 7), 2, 6, 2).extend(1, 5, 6, [7], 0).extend(2, 6, 0, [1], 0).build()
    on.pack(plan, np.zeros(on.bytes_needed(plan), np.uint8))

    def left() -> list[int]:
        """Of rows 1 to 3, each posted now or before."""
        for row, gen in ((1, 5), (2, 6), (3, 7)):
            on.post_mask(row, gen, 90, WORDS)
        return on.num_masks

    assert left() == 3
    going_on = [(0, 1, 4, 0.0), (4, 0, -1, 0.0)]
    on.drop_masks(plan, _core.finish_packed(plan, block(2, going_on)))
    assert left() == 3
    for flags, count in ((1, 2), (2, 2), (8, 2)):
        again, writer = begun()
        again.pack(plan, np.zeros(again.bytes_needed(plan), np.uint8))
        again.drop_masks(plan, _core.finish_packed(plan, block(2, [(0, 1, 4, 0.0), (flags, 0, -1, 0.0)])))
        on = again
        assert left() == count
    on.drop_masks(plan, _core.RowTable.fail(plan, "lost"))  # also of row 3, which only its init names
    assert left() == 0
    pack(on, PlanWriter(3).init(1, 8).op(FREE, 1, 8))
    on.post_mask(1, 8, 3, WORDS)
    assert on.num_masks == 0


def test_masks_are_packed_once_and_in_order() -> None:
    on, writer = begun()
    old = pack(on, writer.extend(1, 5, 6, [7], 0).masked(1))
    new = pack(on, PlanWriter(3).decode(1, 5))
    with pytest.raises(InvalidRequest, match="masks are of packing 2, the last was 3"):
        on.pack_masks(old, np.zeros(99, np.uint8))
    needed = on.mask_bytes(new)
    with pytest.raises(InvalidRequest, match=f"out must have room for {needed} bytes, got {needed - 1}"):
        on.pack_masks(new, np.zeros(needed - 1, np.uint8))


# --- Failed steps


def row_ops_of(on: Any, writer: PlanWriter) -> list[tuple[int, ...]]:
    """(kind, row, gen) of the blob."""
    plan = writer.build()
    out = np.zeros(on.bytes_needed(plan), np.uint8)
    on.pack(plan, out)
    count, at = struct.unpack("<i12xi", out[24:44].tobytes())
    return [struct.unpack("<iiI", out[at + 32 * i : at + 32 * i + 12].tobytes()) for i in range(count)]


@pytest.mark.parametrize("refused", [True, False])
def test_a_failed_step_ends_its_rows_and_no_others(refused: bool) -> None:
    on, _ = begun()
    pack(on, pages(PlanWriter(2).init(2, 6), 2, 6, 2).decode(2, 6))
    failing = PlanWriter(3).init(3, 7).op(APPEND, 3, 7, ids=[1]).decode(1, 5)
    if refused:
        failing.decode(1, 5)
        with pytest.raises(InternalError):
            pack(on, failing)
    else:
        pack(on, failing)
        on.fail(failing.build())
    after = PlanWriter(4).op(APPEND, 3, 7, ids=[2]).op(APPEND, 2, 6, ids=[3]).op(TRUNCATE, 1, 5, value=0)
    assert row_ops_of(on, after.decode(3, 7).decode(1, 5).decode(2, 6)) == [(FREE, 1, 5), (FREE, 3, 7), (APPEND, 2, 6)]
    # Told once. The rows begin anew.
    again = PlanWriter(5).op(APPEND, 3, 7, ids=[2]).init(1, 8)
    assert row_ops_of(on, pages(again, 1, 8, 1).extend(1, 8, 0, [1])) == [(0, 1, 8), (APPEND, 1, 8), (APPEND, 1, 8)]
    assert pack(on, PlanWriter(6).decode(1, 8).decode(3, 7).decode(2, 6)).kv_bounds.tolist() == [2, 1, 3]


# --- Results


def block(step_id: int, items: list[tuple[int, int, int, float]], **changes: int) -> Array:
    fields = dict(step_id=step_id, sequence=4, num_tokens=5, num_kv=6, num_logit_rows=7, num_items=len(items))
    fields |= dict(error=0, index=0, group=0, value=0) | changes
    data = struct.pack("<qqqqqiiiiq", *fields.values()) + b"".join(struct.pack("<iiif", *item) for item in items)
    return np.frombuffer(data + b"\x5a" * 16, np.uint8)


def test_a_result_block_becomes_a_result() -> None:
    plan = PlanWriter(8).decode(1, 5).decode(2, 6).extend(3, 7, 0, [1, 2]).decode(0, 4).build()
    nan = float("nan")
    items = [(16, 0, -1, nan), (1, 1, 33, -0.5), (0, 0, -1, nan), (0, 1, 44, nan)]
    result = _core.finish_packed(plan, block(8, items), sequence=4)
    assert result.items() == [(1, 5, 0, 0, 16), (2, 6, 1, 0, 1), (3, 7, 0, 0, 0), (0, 4, 1, 1, 0)]
    assert result.tokens == [33, 44] and result.logprobs[0] == -0.5 and np.isnan(result.logprobs[1])
    assert (result.step_id, result.num_tokens, result.num_kv, result.num_logit_rows) == (8, 5, 6, 7)
    assert result.error == ""


@pytest.mark.parametrize(
    ("error", "index", "said"),
    [
        (1, 0, "another format than 70: build libsapwood_cuda.so and _core from one checkout"),
        (2, 3, "row op of row 3, which is at generation 70"),
        (3, 3, "forced tokens of row 3 at another position than its next, 70"),
        (4, 3, "row 3 cannot be truncated to more than it has, 70"),
        (5, 3, "the page table of row 3 in group 1 has 70 pages and no room for more"),
        (6, 1, "item 1 (extend of row 2): expects kv_len 9, the row has 70"),
        (7, 0, "item 0 (decode of row 1): its page table in group 1 has only 70 pages"),
        (8, 1, "item 1 (extend of row 2): no page for position 70 in group 1"),
        (10, 1, "item 1 (extend of row 2): the row is held"),
        (9, 0, "launched with room for fewer tokens, segments or logit rows than it has"),
        (99, 0, "unknown error 99 of the device"),
    ],
)
def test_an_error_of_the_device_says_whose(error: int, index: int, said: str) -> None:
    plan = PlanWriter(8).decode(1, 5).extend(2, 6, 9, [1]).build()
    result = _core.finish_packed(plan, block(8, [(0, 1, 1, 0.0)] * 2, error=error, index=index, group=1, value=70))
    assert result.error.startswith("step 8, ") and result.error.endswith(said)
    assert result.items() == [] and result.tokens == [] and result.num_tokens == 0 and result.step_id == 8


def test_a_block_of_something_else_is_refused() -> None:
    plan = PlanWriter(8).decode(1, 5).build()
    item = (0, 1, 1, 0.0)
    with pytest.raises(InvalidRequest, match="must have the 80 bytes of 1 items, got 79"):
        _core.finish_packed(plan, block(8, [item])[:79])
    with pytest.raises(InvalidRequest, match="is of step 7 with 1 items, expected step 8 with 1"):
        _core.finish_packed(plan, block(7, [item]))
    with pytest.raises(InvalidRequest, match="is of step 8 with 2 items, expected step 8 with 1"):
        _core.finish_packed(plan, block(8, [item, item]))
    with pytest.raises(InvalidRequest, match="is of packing 4, expected 5"):
        _core.finish_packed(plan, block(8, [item]), sequence=5)
    with pytest.raises(InvalidRequest, match="result_block must be a contiguous uint8 array, got int32"):
        _core.finish_packed(plan, np.zeros(80, np.int32))
