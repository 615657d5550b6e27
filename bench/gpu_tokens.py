"""The cases of `bench/gpu_suite.py --stage engine` that compare tokens: device "cuda" against device "cpu".

Small checkpoints with random weights, prompts of several lengths computed together, half of the answers greedy, half
drawn with seeds. The CPU's engine is the oracle; it is itself checked against transformers. bfloat16 rounds
differently there, so a token counts as right where

    greedy   it is the CPU's, or as likely by the CPU's reckoning but for LOGPROB_TOLERANCE
    drawn    it is the CPU's, given the same seed; a share of DRAWN_TOLERANCE may differ (a near tie flips)

and every equal token's log-probability is within LOGPROB_TOLERANCE. Behind a token that differs, the CPU goes on from
ours. How likely the CPU finds a token that it has not chosen, it tells when those it prefers are banned (as end tokens
are before min_new_tokens).

Deterministic inference promises more: the same bits, whatever the settings and whoever else is in the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import gpu_steps
import make_model
import numpy as np
from gpu_steps import Bench, Case, Row

LOGPROB_TOLERANCE: Final = 0.06
DRAWN_TOLERANCE: Final = 0.05
MOST_BANNED: Final = 4  # of tokens that the CPU prefers to ours
PAGE_SIZE: Final = 16  # the default


# --- Models and prompts ---------------------------------------------------------------------------------------
def families(bench: Bench) -> dict[str, dict[str, Any]]:
    """Shapes by name; the first two have every setting tried."""
    shapes, tiny = make_model.SHAPES, gpu_steps.tiny
    wide = {"hidden_size": 512, "intermediate_size": 1408, "num_key_value_heads": 1, "vocab_size": 4096}
    found: dict[str, Any] = {
        "llama": tiny(shapes["llama-3.1-8b"]),
        "llama-128": tiny(shapes["llama-3.1-8b"], **wide),  # heads of 128, four to a KV head: the usual tiles
        "mistral-window": tiny(shapes["mistral-7b-v0.3"], sliding_window=24),
        "qwen2-bias": tiny(shapes["qwen2.5-0.5b"]),
        "qwen3-tied": tiny(shapes["qwen3-0.6b"]),
        "phi3-window": tiny(shapes["phi-3-mini-4k"], sliding_window=30, original_max_position_embeddings=4096),
    }
    return {name: found[name] for name in bench.pick(list(found), ["llama", "mistral-window"])}


def main_family(bench: Bench) -> str:
    return str(bench.pick("llama-128", "llama"))


def model_of(bench: Bench, family: str) -> Path:
    return gpu_steps.write_model(bench.folder / family, families(bench)[family])


@dataclass
class Workload:
    """Requests that are asked together."""

    prompts: list[list[int]]
    params: list[Any]

    @classmethod
    def of(cls, bench: Bench, vocab_size: int) -> Workload:
        from sapwood import SamplingParams

        lens = bench.pick((5, 37, 90, 200, 1, 33, 64, 16, 130, 300, 17, 48), (5, 37, 20, 3))
        num_new = bench.pick(32, 5)
        rng = np.random.default_rng(7)
        drawn: Any = ({"temperature": 1.0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
                 {"temperature": 1.2, "min_p": 0.02})  # fmt: skip
        params = []
        for i in range(len(lens)):
            how: Any = {"temperature": 0.0} if i % 2 == 0 else {**drawn[i // 2 % 3], "seed": 100 + i}
            params.append(SamplingParams(**how, max_new_tokens=num_new, ignore_eos=True, return_logprob=True))
        return cls([rng.integers(0, vocab_size, n).tolist() for n in lens], params)


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[float]
    num_cached: int = 0


def ask(engine: Any, prompts: Sequence[list[int]], params: Sequence[Any]) -> list[Answer]:
    """Together; RuntimeError where one fails."""
    answers = []
    for output in engine.generate(list(prompts), list(params)):
        if output.error or len(output.token_ids) == 0:
            raise RuntimeError(f"a request failed: {output.error}")
        answers.append(Answer(output.token_ids, output.logprobs, output.usage.cached_tokens))
    return answers


# --- The oracle -----------------------------------------------------------------------------------------------
@dataclass
class Compared:
    """Tokens by whether they are the oracle's. wrong: what breaks the rule, in words."""

    num_tokens: int = 0
    num_equal: int = 0
    num_near: int = 0
    num_drawn: int = 0
    num_drawn_otherwise: int = 0
    worst_logprob: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def verdict(self) -> list[str]:
        wrong = list(self.wrong)
        if self.num_drawn_otherwise > max(2, DRAWN_TOLERANCE * self.num_drawn):
            wrong.append(f"{self.num_drawn_otherwise} of {self.num_drawn} drawn tokens are not the CPU's")
        if self.worst_logprob > LOGPROB_TOLERANCE:
            wrong.append(f"a log-probability is off by {self.worst_logprob:.3f}")
        return wrong


class Oracle:
    """Device "cpu" on the same checkpoint."""

    def __init__(self, model: Path) -> None:
        from sapwood import Engine

        self.engine = Engine(model, skip_tokenizer_init=True, dtype="bfloat16", max_total_tokens=16384)

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.shutdown()

    def compare(self, work: Workload, answers: Sequence[Answer]) -> Compared:
        found = Compared()
        firsts = ask(self.engine, work.prompts, work.params)
        for i, (prompt, params, ours) in enumerate(zip(work.prompts, work.params, answers, strict=True)):
            self._compare(i, prompt, params, ours, firsts[i], found)
        return found

    def _compare(self, i: int, prompt: list[int], params: Any, ours: Answer, theirs: Answer, found: Compared) -> None:
        count, at = len(ours.tokens), 0
        if count != params.max_new_tokens:
            found.wrong.append(f"request {i}: {count} tokens, not {params.max_new_tokens}")
        found.num_tokens += count
        found.num_drawn += count if params.temperature > 0 else 0
        while True:
            for token, logprob, mine, my_logprob in zip(
                theirs.tokens, theirs.logprobs, ours.tokens[at:], ours.logprobs[at:], strict=False
            ):
                if token != mine:
                    break
                found.num_equal += 1
                found.worst_logprob = max(found.worst_logprob, abs(logprob - my_logprob))
                at += 1
            else:
                return
            seen = prompt + ours.tokens[:at]
            if params.temperature > 0:
                found.num_drawn_otherwise += 1
            elif self._is_near(seen, ours.tokens[at], token, logprob):
                found.num_near += 1
            else:
                found.wrong.append(f"request {i}: token {at} is {ours.tokens[at]}, the CPU's {token} is likelier")
            at += 1
            if at == count:
                return
            theirs = ask(self.engine, [prompt + ours.tokens[:at]], [changed(params, max_new_tokens=count - at)])[0]

    def _is_near(self, seen: list[int], token: int, best: int, best_logprob: float) -> bool:
        from sapwood import SamplingParams

        banned = [best]
        while len(banned) <= MOST_BANNED:
            params = SamplingParams(temperature=0, max_new_tokens=1, min_new_tokens=1, ignore_eos=True,
                                    stop_token_ids=banned, return_logprob=True)  # fmt: skip
            next_best = ask(self.engine, [seen], [params])[0]
            if best_logprob - next_best.logprobs[0] > LOGPROB_TOLERANCE:
                return False
            if next_best.tokens[0] == token:
                return True
            banned.append(next_best.tokens[0])
        return False


def changed(params: Any, **fields: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(params, **fields)


def compared_row(name: str, found: Compared, more: Sequence[str] = (), **details: Any) -> Row:
    """A failure where a rule is broken; `more`: rules of the caller's that are."""
    wrong = [*found.verdict(), *more]
    note = (f"{found.num_near} near ties, {found.num_drawn_otherwise} of {found.num_drawn} drawn otherwise, "
            f"log-probabilities within {found.worst_logprob:.3f}")  # fmt: skip
    result: Row = {"name": name, "value": found.num_equal / found.num_tokens, "unit": "equal tokens", "note": note}
    result |= {"tokens": found.num_tokens, "worst_logprob": found.worst_logprob, **details}
    return result | ({"failure": f"{'; '.join(wrong)[:300]} ({note})"} if wrong else {})


def same_bits(one: Sequence[Answer], two: Sequence[Answer]) -> int:
    """Requests whose tokens and log-probabilities are alike to the last bit."""
    return sum(a.tokens == b.tokens and a.logprobs == b.logprobs for a, b in zip(one, two, strict=True))


# --- Engines --------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def on_cuda(bench: Bench, model: Path, **settings: Any) -> Iterator[Any]:
    """Prompts of the workload take several steps, beside decodes of others."""
    from sapwood import Engine

    bench.use_library()
    defaults = {"max_total_tokens": bench.pick(8192, 1024), "max_running_requests": bench.pick(32, 8),
                "chunked_prefill_size": bench.pick(64, 16), "trace_capacity": 10_000}  # fmt: skip
    with Engine(model, device="cuda", skip_tokenizer_init=True, dtype="bfloat16", **{**defaults, **settings}) as engine:
        yield engine


def workload_of(bench: Bench, family: str) -> Workload:
    return Workload.of(bench, int(families(bench)[family]["vocab_size"]))


def together(bench: Bench, family: str, oracle: Oracle, name: str, **settings: Any) -> Iterator[Row]:
    """All requests at once, then again, which finds their prompts in the prefix cache."""
    work = workload_of(bench, family)
    with on_cuda(bench, model_of(bench, family), **settings) as engine:
        first, again = (ask(engine, work.prompts, work.params) for _ in range(2))
        ways = dict(engine.model.executor.launcher.num_steps)
        mixed = sum(1 for r in engine.trace() if r.num_decode_rows and r.num_extend_tokens)
    broken = [] if mixed else ["no step had prompts and decodes"]
    yield compared_row(name, oracle.compare(work, first), broken, ways=ways, mixed_steps=mixed)
    cached = sum(answer.num_cached for answer in again)
    broken = [] if cached else ["the prefix cache was not hit"]
    found = compared_row(f"{name}, prefix hits", oracle.compare(work, again), broken, cached_tokens=cached)
    yield found | {"note": f"{cached} tokens cached; {found['note']}"}


# --- Cases ----------------------------------------------------------------------------------------------------
def tokens(bench: Bench) -> None:
    """The main family: all that may not change a token."""
    family = main_family(bench)
    with Oracle(model_of(bench, family)) as oracle:
        bench.measure(f"tokens {family}", lambda: together(bench, family, oracle, f"tokens {family}"))
        bench.measure("tokens, deterministic", lambda: deterministic(bench, family, oracle))
        bench.measure("tokens, small pool", lambda: retraction(bench, family, oracle))
        bench.measure("tokens, settings", lambda: variants(bench, family, oracle))
        bench.measure("tokens, reference attention", lambda: together(
            bench, family, oracle, "tokens, reference attention", attention_backend="reference"))  # fmt: skip


def deterministic(bench: Bench, family: str, oracle: Oracle) -> Iterator[Row]:
    """Together, alone, from the cache, in other chunks, without graphs, without overlap."""
    work, model = workload_of(bench, family), model_of(bench, family)
    answers: dict[str, list[Answer]] = {}
    with on_cuda(bench, model, enable_deterministic_inference=True) as engine:
        answers["together"] = ask(engine, work.prompts, work.params)
        answers["prefix hits"] = ask(engine, work.prompts, work.params)
        engine.flush_cache()
        answers["alone"] = [ask(engine, [p], [how])[0] for p, how in zip(work.prompts, work.params, strict=True)]
    for name, settings in (
        ("no graphs", {"disable_cuda_graph": True}),
        ("no overlap", {"disable_overlap_schedule": True}),
        ("other chunks", {"chunked_prefill_size": bench.pick(50, 11)}),
    ):
        with on_cuda(bench, model, enable_deterministic_inference=True, **settings) as engine:
            answers[name] = ask(engine, work.prompts, work.params)
    yield compared_row("tokens, deterministic", oracle.compare(work, answers["together"]))
    count = len(work.prompts)
    for name, other in answers.items():
        if name == "together":
            continue
        alike = same_bits(answers["together"], other)
        found: Row = {"name": f"deterministic, {name}", "value": alike / count, "unit": "same bits"}
        yield found | ({} if alike == count else {"failure": f"{count - alike} of {count} answers differ in a bit"})


def retraction(bench: Bench, family: str, oracle: Oracle) -> Iterator[Row]:
    """A pool that holds all prompts and the longest answer, not all answers."""
    work = workload_of(bench, family)
    few = [i for i, prompt in enumerate(work.prompts) if len(prompt) <= 64]
    num_new = bench.pick(120, 40)
    work = Workload([work.prompts[i] for i in few], [changed(work.params[i], max_new_tokens=num_new) for i in few])
    for_prompts = sum(len(prompt) // PAGE_SIZE + 1 for prompt in work.prompts)
    for_longest = max(len(prompt) + num_new for prompt in work.prompts) // PAGE_SIZE + 2
    pool = PAGE_SIZE * (max(for_prompts, for_longest) + 1)
    with on_cuda(bench, model_of(bench, family), max_total_tokens=pool) as engine:
        answers = ask(engine, work.prompts, work.params)
        times = engine.stats().num_retractions
    found = compared_row("tokens, small pool", oracle.compare(work, answers), [] if times else ["nobody was retracted"],
                         retractions=times)  # fmt: skip
    yield found | {"note": f"{times} retractions; {found['note']}"}


def variants(bench: Bench, family: str, oracle: Oracle) -> Iterator[Row]:
    """Without graphs, without overlap. Other shapes of products may round otherwise: each must hold by itself, and how
    many answers are the default's to the last bit is told.
    """
    work, model = workload_of(bench, family), model_of(bench, family)
    with on_cuda(bench, model) as engine:
        default = ask(engine, work.prompts, work.params)
    for name, settings in (
        ("no graphs", {"disable_cuda_graph": True}),
        ("no overlap", {"disable_overlap_schedule": True}),
        ("small graphs", {"cuda_graph_max_bs": 2}),
    ):
        with on_cuda(bench, model, **settings) as engine:
            answers = ask(engine, work.prompts, work.params)
        found = compared_row(f"tokens, {name}", oracle.compare(work, answers))
        alike = f"{same_bits(default, answers)} of {len(answers)} answers have the default's bits"
        yield found | {"note": f"{alike}; {found['note']}", "same_bits": same_bits(default, answers)}


def other_families(bench: Bench) -> None:
    for family in families(bench):
        if family != main_family(bench):

            def take(family: str = family) -> Iterator[Row]:
                with Oracle(model_of(bench, family)) as oracle:
                    yield from together(bench, family, oracle, f"tokens {family}")

            bench.measure(f"tokens {family}", take)


def flashinfer(bench: Bench) -> None:
    family = main_family(bench)
    with Oracle(model_of(bench, family)) as oracle:
        bench.measure("tokens, flashinfer", lambda: together(
            bench, family, oracle, "tokens, flashinfer", attention_backend="flashinfer"))  # fmt: skip


TOKENS: Final = Case("tokens", tokens, 120)
FAMILIES: Final = Case("families", other_families, 60)
FLASHINFER: Final = Case("flashinfer tokens", flashinfer, 150, "flashinfer")
