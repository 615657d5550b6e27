"""Attention behind shared prefixes (cascade): the plan's lists, and the same bits as without them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from gpu_checks.attention import Case, expected_plan, make_lists
from gpu_checks.device import Device
from sapwood.program.cuda_library import AttentionParams, AttentionPlanParams

SHARED_ROWS = 16
OVERFLOW, BAD_PREFIX = 1, 2


@dataclass
class PrefixCase(Case):
    """Segments whose first pages are the same.

    prefixes      (segments, tokens that they have in common) of each; whole pages of these are the first segment's
    max_prefixes  what the plan is told; those that are not there are empty
    """

    prefixes: list[tuple[list[int], int]] = field(default_factory=list)
    max_prefixes: int = 6
    min_rows: int = 1
    max_rows: int = 2**30

    def make(self, d: Device) -> None:
        """The pages that a segment would have had of the prefix are NaN: nobody may read them."""
        super().make(d)
        t = self.tensors
        for segments, _ in self.prefixes:
            if not segments:
                continue
            pages = self.prefix_len(segments) // self.page_size
            first, *others = (t["page_table"][t["page_rows"][s].long()] for s in segments)
            for other in others:
                t["pool"][other[:pages].long()] = float("nan")
                other[:pages] = first[:pages]
        self.make_prefixes(d)

    def prefix_len(self, segments: list[int]) -> int:
        """Tokens that lie in common pages."""
        common = next(common for members, common in self.prefixes if members == segments)
        return common // self.page_size * self.page_size

    def make_prefixes(self, d: Device) -> None:
        tiles = self.tensors["tiles"].shape[0] - 1

        def ints(*shape: int, value: int = -9) -> torch.Tensor:
            return torch.full(shape, value, device=d.name, dtype=torch.int32)

        self.tensors |= {
            "prefix_indptr": ints(self.max_prefixes + 1),
            "prefix_segments": ints(len(self.segments) + 1),
            "prefix_lens": ints(self.max_prefixes),
            "shared_tiles": ints(tiles + 1, 2),
            "shared_rows": ints(tiles * SHARED_ROWS + 1, 4),
            "prefix_scratch": ints(2 * len(self.segments) + 1),
            "failed": ints(2, value=0),
        }
        self.fill_prefixes()

    def fill_prefixes(self) -> None:
        """In place, so that a launch with the same pointers reads them."""
        t = self.tensors
        members = [s for segments, _ in self.prefixes for s in segments]
        ends = torch.tensor([0, *(len(segments) for segments, _ in self.prefixes)]).cumsum(0)
        ends = torch.cat((ends, ends[-1:].expand(self.max_prefixes - len(self.prefixes))))
        t["prefix_indptr"].copy_(ends)
        t["prefix_segments"][: len(members)] = torch.tensor(members, dtype=torch.int32)
        for i, (segments, _) in enumerate(self.prefixes):
            t["prefix_lens"][i] = self.prefix_len(segments)

    def prefix_plan_params(self) -> AttentionPlanParams:
        t, params = self.tensors, self.plan_params(self.min_rows, self.max_rows)
        for name in ("prefix_indptr", "prefix_segments", "prefix_lens", "shared_tiles", "shared_rows", "failed",
                     "prefix_scratch"):  # fmt: skip
            setattr(params, name, t[name].data_ptr())
        params.num_prefixes = self.max_prefixes
        return params

    def prefix_params(self) -> AttentionParams:
        params = self.params()
        params.shared_tiles = self.tensors["shared_tiles"].data_ptr()
        params.shared_rows = self.tensors["shared_rows"].data_ptr()
        return params

    def poison(self) -> None:
        """Outputs, workspaces and lists as they were made."""
        for name in ("out", "partial_o", "partial_ml"):
            self.tensors[name].fill_(float("nan"))
        for name in ("tiles", "items", "counts"):
            self.tensors[name].fill_(-1)
        for name in ("shared_tiles", "shared_rows", "prefix_scratch"):
            self.tensors[name].fill_(-9)

    def outputs(self) -> torch.Tensor:
        heads = self.num_kv_heads * self.group
        return self.tensors["out"][:-1, : heads * self.head_dim].reshape(-1, heads, self.head_dim)

    def run_plain(self, d: Device) -> torch.Tensor:
        self.poison()
        d.call("attention_plan", self.plan_params(self.min_rows, self.max_rows))
        d.call("attention", self.params())
        d.call("attention_merge", self.params())
        return self.outputs().clone()

    def run_shared(self, d: Device) -> torch.Tensor:
        self.poison()
        d.call("attention_plan", self.prefix_plan_params())
        d.call("attention", self.prefix_params())
        d.call("attention_merge", self.prefix_params())
        return self.outputs().clone()

    def listed(self) -> torch.Tensor:
        """[tokens]: whether the plan lists the token's segment."""
        lens = torch.tensor([q for q, _ in self.segments])
        rows = lens * self.group
        return ((rows >= self.min_rows) & (rows <= self.max_rows)).repeat_interleave(lens)


def expected_lists(case: PrefixCase) -> dict[str, list[list[int]]]:
    """The lists by their definition: the shared tiles' items first, prefix by prefix, chunk by chunk."""
    tiles, own_items = expected_plan(case, max(1, case.min_rows), case.max_rows)
    tile_of = {(segment, first_row): index for index, (segment, first_row, _, _) in enumerate(tiles)}
    shared_tiles: list[list[int]] = []
    shared_rows: list[list[int]] = []
    items: list[list[int]] = []
    begins = [0]
    for q_len, _ in case.segments:
        begins.append(begins[-1] + q_len)
    elsewhere = dict.fromkeys(range(len(case.segments)), 0)
    for segments, _ in case.prefixes:
        alive = [s for s in segments if (s, 0) in tile_of]
        before = [case.segments[s][1] - case.segments[s][0] for s in alive]
        chunks = min([case.prefix_len(segments), *before]) // case.chunk_len if len(alive) > 1 else 0
        if chunks == 0:
            continue
        rows = [(s, row) for s in alive for row in range(case.segments[s][0] * case.group)]
        first = len(shared_tiles)
        for at in range(0, len(rows), SHARED_ROWS):
            shared_tiles.append([rows[at][0], min(SHARED_ROWS, len(rows) - at)])
        for s, row in rows:
            elsewhere[s] = chunks
            own = tiles[tile_of[s, row // 16 * 16]]
            shared_rows.append([begins[s] + row // case.group, row % case.group, own[2], row % 16])
        shared_rows += [[-9] * 4] * (-len(rows) % SHARED_ROWS)
        items += [[-1 - tile, chunk] for chunk in range(chunks) for tile in range(first, len(shared_tiles))]
    items += [[tile, chunk] for tile, chunk in own_items if chunk >= elsewhere[tiles[tile][0]]]
    return {"tiles": tiles, "items": items, "shared_tiles": shared_tiles, "shared_rows": shared_rows}


def check_lists(case: PrefixCase) -> None:
    t, expected = case.tensors, expected_lists(case)
    assert t["counts"].tolist() == [len(expected["tiles"]), len(expected["items"]), 0, -1], t["counts"].tolist()
    for name, rows in expected.items():
        got = t[name].tolist()
        assert got[: len(rows)] == rows, f"{name} of {case.segments} behind {case.prefixes}"
        assert all(x in (-1, -9) for row in got[len(rows) :] for x in row), f"wrote behind {name}"
    assert t["prefix_scratch"][-1] == -9 and t["failed"].tolist() == [0, 0]


def decodes(count: int, prefix: int, step: int = 7) -> list[tuple[int, int]]:
    """Segments of one new token behind a prefix and of 1, 1 + step, ... tokens of their own."""
    return [(1, prefix + 1 + step * i) for i in range(count)]


def alone(count: int) -> list[int]:
    return list(range(count))


CASES = (
    # A prefix around multiples of a chunk; pages of one token, so that what differs first is not in a common page.
    *(PrefixCase(decodes(3, n), prefixes=[(alone(3), n)], page_size=1, chunk_len=512, num_kv_heads=1)
      for n in (0, 511, 512, 513, 1024)),
    # Pages of 16; a segment that is elsewhere, a prompt in the middle, one with no tokens, one that has the prefix too
    # but alone; a group in an order of its own.
    PrefixCase([(1, 300), (1, 400), (20, 330), (0, 9), (1, 290), (1, 500), (3, 274)], chunk_len=64, max_rows=32,
               prefixes=[([6, 1, 2, 0, 4], 272)]),
    # Two groups, groups of one; more rows than a tile, tiles across segments, and tiles of segments of two.
    PrefixCase([*decodes(9, 260, 31), *decodes(5, 140), (5, 180), (1, 700)], group=7, chunk_len=64, head_dim=128,
               num_kv_heads=1, prefixes=[([0, 2, 4, 6, 8, 1, 3], 256), ([9, 10, 14, 11], 140), ([5], 200), ([], 64)]),
    # Sinks and softcap; 20 segments of one row, and of 16.
    PrefixCase(decodes(20, 130, 13), group=1, num_kv_heads=3, head_dim=80, chunk_len=64, page_size=32, sinks=True,
               prefixes=[(alone(20), 130)]),
    PrefixCase(decodes(3, 100, 40), group=16, num_kv_heads=1, head_dim=256, chunk_len=64, softcap=20.0, sinks=True,
               prefixes=[(alone(3), 100)]),
    # New tokens at the boundary itself: a chunk that holds one is its row's own, though all pages are common.
    PrefixCase([(1, 128), (1, 129), (1, 200)], chunk_len=64, page_size=1, prefixes=[([0, 1, 2], 128)]),
    PrefixCase([(1, 129), (2, 130)], chunk_len=64, page_size=1, prefixes=[([0, 1], 129)]),
    PrefixCase(decodes(2, 3000), chunk_len=512, group=2, num_kv_heads=1, page_size=5, prefixes=[([1, 0], 3000)]),
)  # fmt: skip


def check_shared_prefixes(d: Device) -> int:
    """Bit for bit what attention computes without them, and close to fp64; other numbers of blocks; replays."""
    for case in CASES:
        case.make(d)
        plain, listed = case.run_plain(d), case.listed()
        got = case.run_shared(d)
        check_lists(case)
        what = f"{case.segments} behind {case.prefixes}"
        assert torch.equal(got[listed], plain[listed]), f"{what}: other bits than without a shared prefix"
        assert got[~listed].isnan().all(), f"{what}: wrote rows that are not its own"
        out = case.tensors["out"]
        assert out[-1].isnan().all() and out[:, got.shape[1] * got.shape[2] :].isnan().all(), "wrote outside its rows"
        expected, found = case.reference()[listed], got[listed].double()
        rms, error = expected.square().mean().sqrt(), (found - expected).abs()
        assert (error <= 2**-7 * expected.abs() + 4 * 2**-8 * rms).all(), f"{what}: off by {error.max():.2e}"
        case.num_blocks = 2
        assert torch.equal(case.run_shared(d)[listed], got[listed]), f"{what}: other bits with another number of blocks"
    return len(CASES) + check_replays(d)


# Steps of six segments: what a graph of one pair of launches is replayed over.
STEPS: tuple[tuple[list[tuple[int, int]], list[tuple[list[int], int]]], ...] = (
    (decodes(6, 200), [(alone(6), 192)]),
    (decodes(6, 201), [([0, 1, 2], 192), ([3, 5], 128)]),
    ([(1, 230), (0, 230), (1, 90), (2, 203), (0, 1), (1, 20)], [([0, 1, 3], 192)]),
    (decodes(6, 150), []),
    ([(0, 0)] * 6, []),
    ([(0, 0)] * 3 + decodes(3, 250, 1), [([3, 4, 5], 250)]),
)


def check_replays(d: Device) -> int:
    """The same launches, pointers and capacities over other lengths, pages and prefixes."""
    case = PrefixCase([(2, 256)] * 6, chunk_len=64, num_kv_heads=1, max_prefixes=3)
    case.make(d)
    t = case.tensors
    t["pool"].copy_(d.randn(*t["pool"].shape))
    plan, params = case.prefix_plan_params(), case.prefix_params()

    def launch() -> None:
        d.call("attention_plan", plan)
        d.call("attention", params)
        d.call("attention_merge", params)

    replay = d.captured(launch)
    for segments, prefixes in STEPS:
        case.segments, case.prefixes = segments, prefixes
        t["q_indptr"].copy_(torch.tensor([0, *(q for q, _ in segments)]).cumsum(0))
        t["kv_lens"].copy_(torch.tensor([kv for _, kv in segments]))
        pages = torch.randperm(t["pool"].shape[0], device=d.name, generator=d.generator).int()
        width = t["page_table"].shape[1] - 1
        t["page_table"][:, :width] = pages[: 6 * width].view(6, width)
        for members, common in prefixes:
            rows = t["page_rows"][members].long()
            t["page_table"][rows, : common // case.page_size] = t["page_table"][rows[0], : common // case.page_size]
        case.fill_prefixes()
        tokens = sum(q for q, _ in segments)
        plain = case.run_plain(d)[:tokens]
        case.poison()
        replay()
        check_lists(case)
        assert torch.equal(case.outputs()[:tokens], plain), f"{segments}: a replay differs"
        assert torch.isfinite(plain).all()
        assert case.outputs()[tokens:].isnan().all(), f"{segments}: wrote tokens that are not of the step"
    return len(STEPS)


def check_prefix_plan(d: Device) -> int:
    """Lists of many segments and prefixes; what fails, how it is said, and that it is said until it has been read."""
    many = PrefixCase(
        decodes(900, 70, 1), group=3, chunk_len=64, max_prefixes=512, max_rows=32,
        prefixes=[(list(range(i, 900, 320)), 64 * (i % 5)) for i in range(320)],
    )  # fmt: skip
    one = PrefixCase(decodes(300, 700), group=5, chunk_len=64, prefixes=[(list(reversed(range(300))), 650)])
    for case in (many, one):
        make_lists(d, case)
        case.make_prefixes(d)
        d.call("attention_plan", case.prefix_plan_params())
        check_lists(case)

    def failing(changes: dict[str, Any], indices: dict[str, Any], failure: int) -> None:
        t, params = case.tensors, case.prefix_plan_params()
        case.fill_prefixes()
        for name, (index, value) in indices.items():
            t[name][index] = value
        for name, value in changes.items():
            setattr(params, name, value)
        t["items"].fill_(-1)
        d.call("attention_plan", params)
        assert t["counts"].tolist() == [0, 0, failure, -1] and bool((t["items"] == -1).all())

    case = PrefixCase(decodes(6, 200), chunk_len=64, prefixes=[([0, 1, 2], 192), ([3, 4], 128)])
    make_lists(d, case)
    case.make_prefixes(d)
    places = sum(row[3] for row in expected_lists(case)["tiles"])
    failing({"failed": None}, {"prefix_segments": (1, 6)}, BAD_PREFIX)
    assert case.tensors["failed"].tolist() == [0, 0]
    failing({}, {"prefix_segments": (1, -1)}, BAD_PREFIX)
    failing({}, {"prefix_segments": (3, 2)}, BAD_PREFIX)
    failing({}, {"prefix_segments": (0, 1)}, BAD_PREFIX)
    assert case.tensors["failed"].tolist() == [BAD_PREFIX, 0]
    failing({"max_items": places - 1}, {}, OVERFLOW)
    failing({"max_tiles": 5}, {}, OVERFLOW)
    case.fill_prefixes()
    d.call("attention_plan", case.prefix_plan_params())
    assert case.tensors["failed"].tolist() == [OVERFLOW | BAD_PREFIX, 0], "forgot a failure"
    case.tensors["failed"].zero_()
    check_lists(case)
    return 8
