"""bench/workloads.py: exact lengths, shared prefixes, and traces replayed as they say."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import workloads
from workloads import Request, TraceOptions, Vocabulary

from sapwood.engine.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer: Path) -> Vocabulary:
    return Vocabulary(Tokenizer.load(tiny_tokenizer))


IDS = Vocabulary(vocab_size=50_000)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@pytest.mark.parametrize("name", ["falcon", "gpt-neox", "llama2", "phi-3-mini"])
def test_texts_have_exactly_as_many_tokens(name: str, unpack_tokenizer: Callable[[str], Path]) -> None:
    """Byte-level and SentencePiece-like, with and without BOS."""
    tokenizer = Tokenizer.load(unpack_tokenizer(name))
    made = workloads.random_requests(
        Vocabulary(tokenizer), rng(), num_prompts=20, input_len=100, output_len=10, range_ratio=0.5, prefix_len=7
    )
    lengths = [len(tokenizer.encode(str(request.prompt))) for request in made]
    assert lengths == [request.prompt_len for request in made]
    assert min(lengths) < 90 and max(lengths) > 120 and all(57 <= n <= 157 for n in lengths)
    made = workloads.random_requests(Vocabulary(tokenizer), rng(), num_prompts=5, input_len=50, output_len=1)
    assert [len(tokenizer.encode(str(request.prompt))) for request in made] == [50] * 5


def test_texts_by_decoding_and_encoding_again() -> None:
    """A tokenizer with few words of its own: bytes are drawn, and their text is cut to the length."""

    class Pairs:
        """Ids are letters; two equal ones in a row become one token."""

        vocab_size = 26
        special_ids = frozenset({0})

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [ord(c) - 97 for c, _ in itertools.groupby(text)]

        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            return "".join(chr(97 + i) for i in ids)

        def token_bytes(self, token_id: int) -> bytes:
            return bytes([97 + token_id])

    made = workloads.random_requests(Vocabulary(Pairs()), rng(), num_prompts=50, input_len=40, output_len=1)
    assert [request.prompt_len for request in made] == [40] * 50
    assert all(len(Pairs().encode(str(request.prompt))) == 40 for request in made)
    assert not any("a" in str(request.prompt) for request in made)


def test_random_requests(vocabulary: Vocabulary) -> None:
    def make(seed: int) -> list[Request]:
        return workloads.random_requests(
            vocabulary, rng(seed), num_prompts=8, input_len=32, output_len=16, prefix_len=5, form="ids"
        )

    made = make(1)
    assert make(1) == made != make(2)
    prompts = [list(request.prompt) for request in made]
    assert all(len(p) == 37 and r.output_len == 16 and r.arrival_s is None for p, r in zip(prompts, made, strict=True))
    assert all(isinstance(i, int) for i in prompts[0])
    assert {common(prompts[0], p) for p in prompts[1:]} == {5}


@pytest.mark.parametrize("form", ["ids", "text"])
def test_lengths_are_within_the_range(form: Any, vocabulary: Vocabulary) -> None:
    made = workloads.random_requests(
        vocabulary, rng(), num_prompts=300, input_len=20, output_len=1, range_ratio=0.75, form=form
    )
    assert {request.prompt_len for request in made} == set(range(5, 36))
    assert {request.output_len for request in made} == {1, 2}  # 0.25 .. 1.75, yet never 0
    with pytest.raises(ValueError, match="--random-range-ratio"):
        workloads.length_range(10, 1.0, 1)


@pytest.mark.parametrize("form", ["ids", "text"])
def test_shared_prefixes(form: Any, vocabulary: Vocabulary) -> None:
    made = workloads.shared_prefix_requests(
        vocabulary, rng(), num_groups=3, prompts_per_group=4, prefix_len=30, suffix_len=10, output_len=5, form=form
    )
    prompts = [
        request.prompt if isinstance(request.prompt, list) else vocabulary.tokenizer.encode(request.prompt)
        for request in made
    ]
    assert [len(p) for p in prompts] == [request.prompt_len for request in made] == [40] * 12
    groups: dict[tuple[int, ...], int] = {}
    for p in prompts:
        groups[tuple(p[:30])] = groups.get(tuple(p[:30]), 0) + 1
    assert sorted(groups.values()) == [4, 4, 4]
    assert len({tuple(p) for p in prompts}) == 12
    assert [tuple(p[:30]) for p in prompts[:4]] != [tuple(prompts[0][:30])] * 4  # shuffled


def write_mooncake(path: Path, rows: list[tuple[int, int, int, list[int]]]) -> Path:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    return path


ROWS = [
    (500, 1200, 30, [0, 1, 2]),
    (700, 1030, 7, [0, 1, 3]),
    (700, 100, 7, [0]),
    (2500, 2048, 9, [0, 4, 5, 6]),
    (3500, 1500, 9, [0, 1, 2]),
]


def test_mooncake_blocks_are_shared_as_their_ids_say(tmp_path: Path) -> None:
    path = write_mooncake(tmp_path / "trace.jsonl.gz", ROWS)
    made = workloads.mooncake_requests(IDS, TraceOptions(10), seed=3, path=path)
    prompts = [list(request.prompt) for request in made]
    assert [len(p) for p in prompts] == [row[1] for row in ROWS]
    assert [request.output_len for request in made] == [row[2] for row in ROWS]
    assert [request.arrival_s for request in made] == pytest.approx([0, 0.2, 0.2, 2.0, 3.0])
    for (a, first), (b, second) in itertools.combinations(zip(prompts, ROWS, strict=True), 2):
        blocks = common(first[3], second[3])
        assert common(a, b) == min(len(a), len(b), 512 * blocks)
    # A block's tokens depend on its id and the seed alone, wherever it stands.
    again = write_mooncake(tmp_path / "again.jsonl.gz", [(0, 1024, 1, [5, 0])])
    block_5_0 = list(workloads.mooncake_requests(IDS, TraceOptions(1), seed=3, path=again)[0].prompt)
    assert block_5_0 == prompts[3][1024:1536] + prompts[0][:512]
    assert workloads.mooncake_requests(IDS, TraceOptions(10), seed=4, path=path)[0].prompt != prompts[0]


def test_mooncake_scaled(tmp_path: Path) -> None:
    path = write_mooncake(tmp_path / "trace.jsonl.gz", ROWS)
    options = TraceOptions(10, scale=1 / 32, speed=10.0, max_len=40)
    made = workloads.mooncake_requests(IDS, options, seed=3, path=path)
    # Blocks of 16: 1200 = 2 whole and 176, 1030 = 2 and 6, 2048 = 4 whole and too long, 1500 = 2 and 476, too long.
    assert [request.prompt_len for request in made] == [2 * 16 + 6, 2 * 16 + 1, 3]
    assert [request.output_len for request in made] == [1, 1, 1]
    assert [request.arrival_s for request in made] == pytest.approx([0, 0.02, 0.02])
    assert common(list(made[0].prompt), list(made[1].prompt)) == 32
    assert len(workloads.mooncake_requests(IDS, TraceOptions(2), seed=3, path=path)) == 2
    with pytest.raises(ValueError, match="no request of the trace fits"):
        workloads.mooncake_requests(IDS, TraceOptions(2, max_len=5), seed=3, path=path)


def test_mooncake_as_text(tmp_path: Path, vocabulary: Vocabulary) -> None:
    path = write_mooncake(tmp_path / "trace.jsonl.gz", ROWS[:2])
    a, b = workloads.mooncake_requests(vocabulary, TraceOptions(10), seed=3, form="text", path=path)
    encode = vocabulary.tokenizer.encode
    assert len(encode(a.prompt)) == 1200 and common(encode(a.prompt), encode(b.prompt)) == 1024


def test_the_real_mooncake_trace(data_dir: Path) -> None:
    path = data_dir / "traces/mooncake/conversation_trace.jsonl.gz"
    rows = list(itertools.islice(workloads.read_jsonl(path), 40))
    made = workloads.mooncake_requests(IDS, TraceOptions(40, scale=1 / 64), seed=0, path=path)
    assert [request.output_len for request in made] == [max(1, round(row["output_length"] / 64)) for row in rows]
    for row, request in zip(rows, made, strict=True):
        blocks = common(row["hash_ids"], rows[0]["hash_ids"])
        shared = common(list(request.prompt), list(made[0].prompt))
        assert shared == min(8 * blocks, request.prompt_len, made[0].prompt_len)


@pytest.mark.parametrize(("kind", "first", "arrivals"), [("conv", (374, 44), 4.314579), ("code", (4808, 10), 0.052)])
def test_azure(kind: Any, first: tuple[int, int], arrivals: float, data_dir: Path) -> None:
    path = data_dir / f"traces/azure/AzureLLMInferenceTrace_{kind}.csv.gz"
    made = workloads.azure_requests(IDS, TraceOptions(50), kind, seed=0, path=path)
    assert (made[0].prompt_len, made[0].output_len) == first
    assert made[0].arrival_s == 0 and made[1].arrival_s == pytest.approx(arrivals, abs=1e-5)
    assert [request.arrival_s for request in made] == sorted(request.arrival_s or 0 for request in made)
    fast = workloads.azure_requests(IDS, TraceOptions(50, scale=0.1, speed=4, max_len=60), kind, seed=0, path=path)
    assert all(request.prompt_len + request.output_len <= 60 for request in fast)


@pytest.mark.parametrize("kind", ["taubench", "magagent"])
def test_agents(kind: Any, data_dir: Path, vocabulary: Vocabulary) -> None:
    folder = data_dir / f"traces/agents/{kind}"
    made = workloads.agent_requests(vocabulary, TraceOptions(30), kind, folder=folder)
    assert len(made) == 30 and made[0].arrival_s == 0
    assert [request.arrival_s for request in made] == sorted(request.arrival_s or 0 for request in made)
    assert all(isinstance(request.prompt, str) and request.prompt for request in made)
    cut = workloads.agent_requests(vocabulary, TraceOptions(30, scale=0.5), kind, folder=folder)
    assert str(made[0].prompt).startswith(str(cut[0].prompt))
    assert len(cut[0].prompt) == round(len(made[0].prompt) / 2)


def test_what_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--vocab-size"):
        Vocabulary()
    with pytest.raises(ValueError, match="need a tokenizer"):
        workloads.random_requests(IDS, rng(), num_prompts=1, input_len=1, output_len=1, form="text")
    with pytest.raises(ValueError, match="agent traces are text"):
        workloads.agent_requests(IDS, TraceOptions(1), "taubench")
    for options in ({"scale": 0.0}, {"speed": float("inf")}, {"scale": float("nan")}):
        with pytest.raises(ValueError, match="positive number"):
            TraceOptions(1, **options)
    monkeypatch.setenv("SAPWOOD_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="SAPWOOD_DATA names the data folder"):
        workloads.mooncake_requests(IDS, TraceOptions(1), seed=0)
