"""What bench/serving.py sends: made-up prompts of exact lengths, shared prefixes, and replays of real traces.

Every generator gives Requests; the same seed gives the same ones. Prompts are token ids first; `--prompt-format` says
what goes over the wire:

    ids    the ids themselves (/v1/completions and /generate take them): lengths are exact by construction, shared
           prefixes are shared to the token, and the server does not tokenise
    text   their text, so that the server's tokenizer works as in real use; this is what `vllm bench serve` sends. The
           ids are words that encode to themselves where the tokenizer has enough of them; otherwise the text is decoded
           and encoded again until its length is right, as vLLM does it

Special tokens that the tokenizer puts in front (BOS) count as part of a text's length, as in vLLM. What the server
counted (`usage`) is what is reported in the end.

Traces come from the data folder (SAPWOOD_DATA, default ../shared/data beside the checkout): Mooncake's chat requests,
whose hash_ids name 512-token blocks, so that equal ids become equal tokens; Azure's arrivals and lengths; two sets of
recorded agents, real text turn by turn.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import gzip
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

ROOT: Final = Path(__file__).resolve().parent.parent
MOONCAKE_BLOCK: Final = 512
# A pool of words smaller than this would make prompts that repeat themselves; then all tokens are used.
MIN_WORDS: Final = 256
MAX_ENCODE_ROUNDS: Final = 10

Format = Literal["text", "ids"]
Ids = np.ndarray[Any, np.dtype[np.int64]]


@dataclasses.dataclass(frozen=True)
class Request:
    """One request to send.

    prompt       text or token ids
    prompt_len   its tokens as far as known here, special tokens included
    output_len   tokens to generate
    arrival_s    seconds after the start at which to send it; None = the load options decide
    """

    prompt: str | list[int]
    prompt_len: int
    output_len: int
    arrival_s: float | None = None


class Vocabulary:
    """Draws token ids and turns them into prompts.

    tokenizer     sapwood's Tokenizer of the served model; None: ids alone, below vocab_size
    vocab_size    ids to draw from without a tokenizer
    """

    def __init__(self, tokenizer: Any = None, vocab_size: int | None = None) -> None:
        self.tokenizer = tokenizer
        if tokenizer is None:
            if vocab_size is None:
                raise ValueError("prompts need a tokenizer (--tokenizer), or --vocab-size for prompts of token ids")
            self.num_special = 0
            self.pool: Ids = np.arange(vocab_size)
        else:
            self.num_special = len(tokenizer.encode(""))
            self.pool = self._words()

    def _words(self) -> Ids:
        """Ids of words that encode to themselves in a row; all ids with a text of their own where these are few."""
        candidates = [i for i in range(self.tokenizer.vocab_size) if i not in self.tokenizer.special_ids]
        words = []
        for token_id in candidates:
            data = self.tokenizer.token_bytes(token_id)
            if len(data) > 2 and data[:1] == b" " and data[1:].isalpha():
                words.append(token_id)
        # One text of all of them, each behind another word, tells which stay what they are.
        if len(words) >= MIN_WORDS and self._encode(self.tokenizer.decode(words)) == words:
            return np.array(words)
        return np.array(candidates)

    def _encode(self, text: str) -> list[int]:
        encoded: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return encoded

    def draw(self, rng: np.random.Generator, num_ids: int) -> list[int]:
        drawn: list[int] = self.pool[rng.integers(0, len(self.pool), num_ids)].tolist()
        return drawn

    def prompt(
        self,
        ids: Sequence[int],
        output_len: int,
        form: Format,
        rng: np.random.Generator,
        arrival_s: float | None = None,
    ) -> Request:
        """A request with these ids, or with a text of as many tokens. A text that cannot be had at the exact length
        keeps the length it came to (prompt_len says it).
        """
        if form == "ids":
            return Request(list(ids), len(ids), output_len, arrival_s)
        if self.tokenizer is None:
            raise ValueError("text prompts need a tokenizer: give --tokenizer, or --prompt-format ids")
        # The special tokens in front take the place of the last ids: a shared prefix stays whole.
        num_ids = max(len(ids) - self.num_special, 1)
        current = list(ids)[:num_ids]
        for _ in range(MAX_ENCODE_ROUNDS):
            text = self.tokenizer.decode(current, skip_special_tokens=False)
            current = self._encode(text)
            if len(current) == num_ids:
                break
            current = current[:num_ids] + self.draw(rng, max(0, num_ids - len(current)))
        else:
            text = self.tokenizer.decode(current, skip_special_tokens=False)
            current = self._encode(text)
        return Request(text, len(current) + self.num_special, output_len, arrival_s)


# --- made up
def length_range(length: int, ratio: float, least: int) -> tuple[int, int]:
    """Both ends of the uniform range of lengths around `length`: vLLM's --random-range-ratio."""
    if not 0 <= ratio < 1:
        raise ValueError(f"--random-range-ratio must be in [0, 1), got {ratio}")
    return max(math.floor(length * (1 - ratio)), least), max(math.ceil(length * (1 + ratio)), least)


def random_requests(
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    *,
    num_prompts: int,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    form: Format = "text",
) -> list[Request]:
    """Prompts of prefix_len tokens common to all and about input_len of their own (vLLM's `random`)."""
    in_low, in_high = length_range(input_len, range_ratio, 1)
    out_low, out_high = length_range(output_len, range_ratio, 1)
    input_lens = rng.integers(in_low, in_high + 1, num_prompts)
    output_lens = rng.integers(out_low, out_high + 1, num_prompts)
    prefix = vocabulary.draw(rng, prefix_len)
    return [
        vocabulary.prompt(prefix + vocabulary.draw(rng, int(n)), int(out), form, rng)
        for n, out in zip(input_lens, output_lens, strict=True)
    ]


def shared_prefix_requests(
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    *,
    num_groups: int,
    prompts_per_group: int,
    prefix_len: int,
    suffix_len: int,
    output_len: int,
    form: Format = "text",
) -> list[Request]:
    """Groups of prompts with a prefix in common, shuffled (vLLM's `prefix_repetition`, SGLang's
    `generated-shared-prefix`).
    """
    requests = []
    for _ in range(num_groups):
        prefix = vocabulary.draw(rng, prefix_len)
        requests += [
            vocabulary.prompt(prefix + vocabulary.draw(rng, suffix_len), output_len, form, rng)
            for _ in range(prompts_per_group)
        ]
    return [requests[i] for i in rng.permutation(len(requests))]


# --- traces
def data_file(name: str) -> Path:
    """A file or folder of the data folder. FileNotFoundError says where it was looked for."""
    folder = Path(os.environ.get("SAPWOOD_DATA") or ROOT.parent / "shared" / "data")
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; the environment variable SAPWOOD_DATA names the data folder")
    return path


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


@dataclasses.dataclass(frozen=True)
class TraceOptions:
    """How a trace is replayed.

    num_prompts   the first so many of its requests that fit
    scale         lengths are multiplied by it, a Mooncake block's too
    speed         arrivals come so many times as fast
    max_len       requests with more tokens than this, prompt and output together, are left out; None = none is
    """

    num_prompts: int
    scale: float = 1.0
    speed: float = 1.0
    max_len: int | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "speed"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"--trace-{name} must be a positive number, got {value}")

    def length(self, tokens: int) -> int:
        return max(1, round(tokens * self.scale))

    def fits(self, input_len: int, output_len: int) -> bool:
        return self.max_len is None or input_len + output_len <= self.max_len


def block_ids(vocabulary: Vocabulary, seed: int, block: int, length: int) -> list[int]:
    """The tokens of a Mooncake block: the same for the same (seed, block), whichever request asks."""
    return vocabulary.draw(np.random.default_rng((seed, block)), length)


def mooncake_len(input_len: int, options: TraceOptions) -> int:
    """Tokens of a prompt at options.scale: whole blocks scaled each, and what is left of the last one."""
    whole, rest = divmod(input_len, MOONCAKE_BLOCK)
    return whole * options.length(MOONCAKE_BLOCK) + (options.length(rest) if rest else 0)


def mooncake_requests(
    vocabulary: Vocabulary, options: TraceOptions, *, seed: int, form: Format = "ids", path: Path | None = None
) -> list[Request]:
    """Kimi's chat requests: prompts made of blocks, so that prompts share exactly the prefixes that the trace's
    hash_ids say they do. `timestamp` is milliseconds.
    """
    path = path or data_file("traces/mooncake/conversation_trace.jsonl.gz")
    block_len = options.length(MOONCAKE_BLOCK)
    requests: list[Request] = []
    for row in read_jsonl(path):
        if len(requests) == options.num_prompts:
            break
        input_len = mooncake_len(row["input_length"], options)
        output_len = options.length(row["output_length"])
        if not options.fits(input_len, output_len):
            continue
        ids = itertools.chain.from_iterable(block_ids(vocabulary, seed, b, block_len) for b in row["hash_ids"])
        prompt = list(itertools.islice(ids, input_len))
        rng = np.random.default_rng((seed, len(requests)))
        requests.append(vocabulary.prompt(prompt, output_len, form, rng, row["timestamp"] / 1000 / options.speed))
    return _from_zero(requests)


def azure_requests(
    vocabulary: Vocabulary, options: TraceOptions, kind: Literal["conv", "code"], *, seed: int, form: Format = "ids",
    path: Path | None = None,
) -> list[Request]:  # fmt: skip
    """Azure's arrivals and lengths of November 2023, of a chat or a code service; the tokens are random."""
    path = path or data_file(f"traces/azure/AzureLLMInferenceTrace_{kind}.csv.gz")
    rng = np.random.default_rng(seed)
    requests: list[Request] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if len(requests) == options.num_prompts:
                break
            input_len, output_len = (
                options.length(int(row["ContextTokens"])),
                options.length(int(row["GeneratedTokens"])),
            )
            if options.fits(input_len, output_len):
                # Seven digits of a second, one more than Python reads.
                at = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26] + "+00:00").timestamp()
                ids = vocabulary.draw(rng, input_len)
                requests.append(vocabulary.prompt(ids, output_len, form, rng, at / options.speed))
    return _from_zero(requests)


def agent_requests(
    vocabulary: Vocabulary, options: TraceOptions, kind: Literal["taubench", "magagent"], *, folder: Path | None = None
) -> list[Request]:
    """Recorded agents: each turn's real prompt, as long an output as was recorded, at the recorded times, all sessions
    together. `scale` keeps so much of each prompt's beginning, which keeps what turns have in common. `timestamp` is
    microseconds. ValueError without a tokenizer.
    """
    if vocabulary.tokenizer is None:
        raise ValueError("agent traces are text: give --tokenizer")
    folder = folder or data_file(f"traces/agents/{kind}")
    rows = [row for path in sorted(folder.glob("*.jsonl.gz")) for row in read_jsonl(path)]
    rows.sort(key=lambda row: row["timestamp"])
    requests: list[Request] = []
    for row in rows:
        if len(requests) == options.num_prompts:
            break
        ids = vocabulary.tokenizer.encode(row["input"])
        text = row["input"]
        if options.scale < 1:
            text = text[: max(1, round(len(text) * options.scale))]
            ids = vocabulary.tokenizer.encode(text)
        output_len = options.length(len(vocabulary.tokenizer.encode(row["output"], add_special_tokens=False)))
        if text and options.fits(len(ids), output_len):
            requests.append(Request(text, len(ids), output_len, row["timestamp"] / 1e6 / options.speed))
    return _from_zero(requests)


def _from_zero(requests: Sequence[Request]) -> list[Request]:
    """The first arrives at once. ValueError where there is none."""
    if not requests:
        raise ValueError("no request of the trace fits; raise --max-model-len or lower --trace-scale")
    begin = min(request.arrival_s or 0.0 for request in requests)
    return [dataclasses.replace(request, arrival_s=(request.arrival_s or 0.0) - begin) for request in requests]


def describe(requests: Sequence[Request]) -> Mapping[str, float]:
    """Counts and mean lengths, for the report."""
    return {
        "num_prompts": len(requests),
        "mean_prompt_len": float(np.mean([r.prompt_len for r in requests])),
        "mean_output_len": float(np.mean([r.output_len for r in requests])),
    }
