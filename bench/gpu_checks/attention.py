"""Paged attention: plan, items, merge."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from gpu_checks.device import Device
from sapwood.program.cuda_library import AttentionParams, AttentionPlanParams

KEEP_AWAY = 3  # pages of NaN that no segment has


@dataclass
class Case:
    """Segments of (q_len, kv_len) against a paged pool; what a segment may not read is NaN."""

    segments: list[tuple[int, int]]
    num_kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    page_size: int = 16
    rows_per_tile: int = 16
    chunk_len: int = 128
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    num_blocks: int = 3
    portable: bool = True
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    def make(self, d: Device) -> None:
        """Tensors: q, pages in random order, indices, outputs and workspaces full of NaN."""
        hq, dim, size = self.num_kv_heads * self.group, self.head_dim, self.page_size
        tokens = sum(q for q, _ in self.segments)
        pages_of = [-(-kv // size) for _, kv in self.segments]
        num_pages = sum(pages_of) + KEEP_AWAY
        order = torch.randperm(num_pages, device=d.name, generator=d.generator).int()
        pool = d.poison(num_pages, 2, self.num_kv_heads, size, dim)
        table = torch.full((len(self.segments), max(pages_of) + 1), -(2**30), device=d.name, dtype=torch.int32)
        rows = torch.randperm(len(self.segments), device=d.name, generator=d.generator).int()
        at = 0
        for s, (q_len, kv_len) in enumerate(self.segments):
            mine = order[at : at + pages_of[s]]
            at += pages_of[s]
            first = self.first_key(kv_len - q_len + 1)
            table[rows[s], first // size : pages_of[s]] = mine[first // size :]
            tokens_of = torch.arange(first, kv_len, device=d.name)
            values = d.randn(kv_len - first, 2, self.num_kv_heads, dim).bfloat16()
            pool[mine[tokens_of // size].long(), :, :, tokens_of % size] = values
        indptr = torch.tensor([0, *(q for q, _ in self.segments)]).cumsum(0).int()
        max_tiles = sum(-(-q * self.group // self.rows_per_tile) for q, _ in self.segments)
        max_items = sum(-(-q * self.group // self.rows_per_tile) * -(-kv // self.chunk_len) for q, kv in self.segments)
        partials = (max_items, self.num_kv_heads, self.rows_per_tile)
        self.tensors = {
            "q": (d.randn(tokens + 1, hq * dim) * 2).bfloat16()[:tokens],
            "out": d.poison(tokens + 1, hq * dim + 2),
            "pool": pool,
            "page_table": table,
            "page_rows": rows,
            "q_indptr": indptr.to(d.name),
            "kv_lens": torch.tensor([kv for _, kv in self.segments], device=d.name).int(),
            "tiles": torch.full((max_tiles + 1, 4), -1, device=d.name, dtype=torch.int32),
            "items": torch.full((max_items + 1, 2), -1, device=d.name, dtype=torch.int32),
            "counts": torch.full((4,), -1, device=d.name, dtype=torch.int32),
            "tickets": torch.zeros(2 * self.num_kv_heads, device=d.name, dtype=torch.int32),
            "partial_o": d.poison(*partials, dim, dtype=torch.float32),
            "partial_ml": d.poison(*partials, 2, dtype=torch.float32),
            "sinks": 4 + 3 * d.randn(hq),  # some above all scores, some below
        }

    def first_key(self, end: int) -> int:
        return max(0, end - self.window) if self.window else 0

    def plan_params(self, min_rows: int = 0, max_rows: int = 2**30) -> AttentionPlanParams:
        t = self.tensors
        return AttentionPlanParams(
            num_segments=len(self.segments), q_indptr=t["q_indptr"].data_ptr(), kv_lens=t["kv_lens"].data_ptr(),
            tiles=t["tiles"].data_ptr(), items=t["items"].data_ptr(), counts=t["counts"].data_ptr(),
            max_tiles=t["tiles"].shape[0] - 1, max_items=t["items"].shape[0] - 1, group=self.group,
            rows_per_tile=self.rows_per_tile, chunk_len=self.chunk_len, window=self.window, min_rows=min_rows,
            max_rows=max_rows,
        )  # fmt: skip

    def params(self) -> AttentionParams:
        t = self.tensors
        names = (
            "page_table",
            "page_rows",
            "q_indptr",
            "kv_lens",
            "tiles",
            "items",
            "counts",
            "partial_o",
            "partial_ml",
        )
        return AttentionParams(
            **{name: t[name].data_ptr() for name in names}, q=t["q"].data_ptr(), out=t["out"].data_ptr(),
            q_stride=t["q"].stride(0), out_stride=t["out"].stride(0), k_pages=t["pool"].data_ptr(),
            v_pages=t["pool"][:, 1].data_ptr(), page_stride=t["pool"].stride(0), table_stride=t["page_table"].stride(0),
            sinks=t["sinks"].data_ptr() if self.sinks else None, num_kv_heads=self.num_kv_heads, group=self.group,
            head_dim=self.head_dim, page_size=self.page_size, rows_per_tile=self.rows_per_tile,
            chunk_len=self.chunk_len, window=self.window, scale=self.scale, softcap=self.softcap,
            num_blocks=self.num_blocks, num_pages=t["pool"].shape[0],
            tickets=None if self.portable else t["tickets"].data_ptr(),
        )  # fmt: skip

    def run(self, d: Device) -> torch.Tensor:
        """Plan, compute, merge; the outputs [tokens][heads][dim]."""
        d.call("attention_plan", self.plan_params())
        d.call("attention", self.params())
        d.call("attention_merge", self.params())
        hq = self.num_kv_heads * self.group
        return self.tensors["out"][:-1, : hq * self.head_dim].reshape(-1, hq, self.head_dim)

    def keys(self, segment: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a segment, fp64 [kv_len][kv heads][dim], zero where no query sees them."""
        t, size = self.tensors, self.page_size
        q_len, kv_len = self.segments[segment]
        first = self.first_key(kv_len - q_len + 1)
        token = torch.arange(first, kv_len, device=t["pool"].device)
        page = t["page_table"][t["page_rows"][segment].long()][token // size].long()
        both = t["pool"][page, :, :, token % size].double()
        whole = both.new_zeros(kv_len, *both.shape[1:])
        whole[first:] = both
        return whole[:, 0], whole[:, 1]

    def reference(self) -> torch.Tensor:
        """fp64 [tokens][heads][dim]."""
        t, out, at = self.tensors, [], 0
        for s, (q_len, kv_len) in enumerate(self.segments):
            k, v = self.keys(s)
            q = t["q"][at : at + q_len].double().view(q_len, self.num_kv_heads, self.group, self.head_dim)
            at += q_len
            scores = torch.einsum("qhgd,khd->qhgk", q, k) * self.scale
            if self.softcap:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            end = torch.arange(kv_len - q_len + 1, kv_len + 1, device=k.device)[:, None]
            key = torch.arange(kv_len, device=k.device)[None]
            seen = (key < end) & (key >= (end - self.window).clamp_min(0) if self.window else key >= 0)
            scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
            if self.sinks:
                sink = t["sinks"].double().view(1, self.num_kv_heads, self.group, 1).expand(q_len, -1, -1, 1)
                weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
            else:
                weights = scores.softmax(-1)
            out.append(
                torch.einsum("qhgk,khd->qhgd", weights, v).reshape(q_len, self.num_kv_heads * self.group, self.head_dim)
            )
        return torch.cat(out)


DECODE_LENS = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300, 517)
CASES = (
    # Decode: few rows of long and short segments, chunks that end everywhere.
    Case([(1, n) for n in DECODE_LENS]),
    Case([(1, 700), (1, 5), (0, 9), (1, 333)], head_dim=128, group=7, page_size=64, chunk_len=256),
    Case([(1, 190), (3, 77), (2, 64)], head_dim=256, group=2, page_size=1, chunk_len=64, num_blocks=1),
    Case([(1, 90), (1, 257)], head_dim=80, group=16, num_kv_heads=1, page_size=32, softcap=20.0),
    Case([(1, 300), (1, 40), (5, 150)], group=1, num_kv_heads=3, window=100, sinks=True),
    Case([(7, 200)], group=5, head_dim=8, page_size=3, window=33, chunk_len=64),
    # Many rows: prompts alone, behind a prefix, and mixed with decode.
    Case([(1, 130), (77, 77), (40, 400), (2, 9), (0, 3), (33, 1000)], rows_per_tile=128, chunk_len=512),
    Case([(70, 210)], rows_per_tile=128, head_dim=128, group=2, chunk_len=64, num_kv_heads=1, sinks=True),
    Case([(45, 45), (9, 120)], rows_per_tile=64, head_dim=192, group=3, num_kv_heads=1, softcap=5.0, page_size=64),
    Case([(150, 260)], rows_per_tile=128, group=1, head_dim=96, window=50, num_kv_heads=1),
    # The tier of compute capability 9.0, which a device has or has not: pages that its copies can take and that they
    # cannot, steps cut at either end, second halves of a tile without rows, tiles of several chunks and of one.
    Case([(1, 130), (77, 77), (2, 9), (0, 3), (33, 600)], rows_per_tile=128, chunk_len=256, portable=False),
    Case([(70, 210)], rows_per_tile=128, head_dim=128, group=2, chunk_len=128, page_size=8, sinks=True, portable=False),
    Case([(9, 9), (130, 390)], rows_per_tile=128, group=1, head_dim=96, window=150, num_kv_heads=1, page_size=64,
         chunk_len=1024, portable=False),
    Case([(21, 300)], rows_per_tile=128, group=7, head_dim=40, num_kv_heads=1, page_size=256, chunk_len=384,
         softcap=20.0, num_blocks=1, portable=False),
    Case([(40, 200)], rows_per_tile=128, head_dim=128, num_kv_heads=1, page_size=12, chunk_len=256, portable=False),
    Case([(9, 140)], rows_per_tile=128, head_dim=128, num_kv_heads=1, page_size=4, chunk_len=256, portable=False),
    Case([(9, 450)], rows_per_tile=128, num_kv_heads=1, chunk_len=192, portable=False),
)  # fmt: skip


def check_attention(d: Device) -> int:
    """Outputs against fp64; equal bits again, with other numbers of blocks, and for a segment alone."""
    for case in CASES:
        case.make(d)
        got = case.run(d).clone()
        expected = case.reference()
        assert torch.isfinite(got).all(), f"{case.segments}: not finite"
        rms = expected.square().mean().sqrt()
        error = (got.double() - expected).abs()
        assert (error <= 2**-7 * expected.abs() + 4 * 2**-8 * rms).all(), f"{case.segments}: off by {error.max():.2e}"
        relative = error.square().sum().sqrt() / expected.square().sum().sqrt()
        assert relative < 6e-3, f"{case.segments}: relative error {relative:.2e}"
        out = case.tensors["out"]
        assert out[-1].isnan().all() and out[:, got.shape[1] * got.shape[2] :].isnan().all(), "wrote outside its rows"
        assert not case.tensors["tickets"].any(), "tickets are left for the next launch"
        case.num_blocks = 11
        for name in ("out", "partial_o", "partial_ml"):
            case.tensors[name].fill_(float("nan"))
        assert torch.equal(case.run(d), got), f"{case.segments}: other bits with another number of blocks"
        check_alone(d, case, got)
    if d.is_sm90:
        assert case_bits(d, portable=True) != case_bits(d, portable=False), "the tier for 9.0 was not reached"
    return len(CASES)


def case_bits(d: Device, *, portable: bool) -> list[float]:
    """Of a case whose sums the tiers do in different orders."""
    d.generator.manual_seed(1)
    case = Case([(32, 300)], rows_per_tile=128, chunk_len=512, portable=portable)
    case.make(d)
    return case.run(d).flatten().tolist()


def check_alone(d: Device, case: Case, got: torch.Tensor) -> None:
    """The last segment without the others."""
    t = case.tensors
    q_len, kv_len = case.segments[-1]
    alone = Case(**{name: getattr(case, name) for name in Case.__dataclass_fields__ if name != "tensors"})
    alone.segments = [(q_len, kv_len)]
    alone.make(d)
    for name in ("pool", "page_table"):
        alone.tensors[name] = t[name]
    alone.tensors["page_rows"] = t["page_rows"][-1:].clone()
    alone.tensors["q"] = t["q"][-q_len:].clone()
    alone.tensors["sinks"] = t["sinks"]
    assert torch.equal(alone.run(d), got[-q_len:]), f"{case.segments}: a segment's bits depend on the others"


def check_attention_merge(d: Device) -> int:
    """One long segment in one item and in many: the same to rounding, and a tile of one item is left alone."""
    whole = Case([(1, 900)], chunk_len=1024)
    whole.make(d)
    expected = whole.run(d).float()
    cases = 0
    for chunk_len in (64, 192, 448):
        whole.chunk_len = chunk_len
        parts = Case([(1, 900)], chunk_len=chunk_len)
        parts.make(d)
        for name in ("pool", "page_table", "page_rows", "q"):
            parts.tensors[name] = whole.tensors[name]
        torch.testing.assert_close(parts.run(d).float(), expected, rtol=2**-7, atol=2**-8)
        assert int(parts.tensors["counts"][1]) == -(-900 // chunk_len)
        cases += 1
    return cases


def check_attention_plan(d: Device) -> int:
    """Tiles and items cover rows and keys exactly once; filters, empty segments, overflow; nothing beyond the lists."""
    shapes = (
        [(1, n) for n in range(1, 900, 7)], [(0, 5), (300, 300), (1, 1), (17, 5000)], [(0, 4)], [(5, 5)] * 600,
        [(700, 9000)],
    )  # fmt: skip
    cases = 0
    for segments in shapes:
        for window, rows_per_tile in ((0, 16), (200, 128)):
            case = Case(segments, group=3, window=window, rows_per_tile=rows_per_tile, chunk_len=192, num_kv_heads=1)
            case.head_dim = 1
            make_lists(d, case)
            t = case.tensors
            low, high = (0, 2**30) if cases % 2 == 0 else (4, 900)
            d.call("attention_plan", case.plan_params(low, high))
            tiles, items, counts = t["tiles"].tolist(), t["items"].tolist(), t["counts"].tolist()
            expected_tiles, expected_items = expected_plan(case, low, high)
            assert counts == [len(expected_tiles), len(expected_items), 0, -1]
            assert tiles[: len(expected_tiles)] == expected_tiles and items[: len(expected_items)] == expected_items
            assert tiles[len(expected_tiles) :] == [[-1] * 4] * (len(tiles) - len(expected_tiles))
            assert items[len(expected_items) :] == [[-1] * 2] * (len(items) - len(expected_items))
            if len(expected_items) > 1:
                few = case.plan_params(low, high)
                few.max_items = len(expected_items) - 1
                t["items"].fill_(-1)
                d.call("attention_plan", few)
                assert t["counts"].tolist() == [0, 0, 1, -1] and bool((t["items"] == -1).all())
            cases += 1
    return cases


def make_lists(d: Device, case: Case) -> None:
    """What a plan reads and writes, without a pool."""
    indptr = torch.tensor([0, *(q for q, _ in case.segments)]).cumsum(0).int()
    tiles = sum(-(-q * case.group // case.rows_per_tile) for q, _ in case.segments) + 2
    items = sum(
        -(-q * case.group // case.rows_per_tile) * -(-kv // case.chunk_len) for q, kv in case.segments
    ) + 2  # fmt: skip
    case.tensors = {
        "q_indptr": indptr.to(d.name),
        "kv_lens": torch.tensor([kv for _, kv in case.segments], device=d.name).int(),
        "tiles": torch.full((tiles, 4), -1, device=d.name, dtype=torch.int32),
        "items": torch.full((items, 2), -1, device=d.name, dtype=torch.int32),
        "counts": torch.full((4,), -1, device=d.name, dtype=torch.int32),
    }


def expected_plan(case: Case, low: int, high: int) -> tuple[list[list[int]], list[list[int]]]:
    """The lists by their definition: segments in order, their tiles from the last to the first, chunks ascending."""
    tiles: list[list[int]] = []
    items: list[list[int]] = []
    for s, (q_len, kv_len) in enumerate(case.segments):
        rows = q_len * case.group
        if rows == 0 or not low <= rows <= high:
            continue
        for first in reversed(range(0, rows, case.rows_per_tile)):
            last = min(rows, first + case.rows_per_tile) - 1
            seen = [kv_len - q_len + row // case.group + 1 for row in (first, last)]
            chunks = sorted({key // case.chunk_len for key in range(case.first_key(seen[0]), seen[1])})
            tiles.append([s, first, len(items), len(chunks)])
            items += [[len(tiles) - 1, chunk] for chunk in chunks]
    return tiles, items
