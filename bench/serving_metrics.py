"""From the times of many generations to the figures, under the definitions and names of `vllm bench serve`.

Of a request: TTFT, sent to first chunk with a choice; E2EL, sent to last such chunk; TPOT, (E2EL - TTFT) / (tokens -
1), of requests with more than one token; ITL, every gap between chunks, of all requests in one pool: a server that
sends several tokens in a chunk has larger ones. Tokens are what `usage` says, else what a tokenizer counts, else the
chunks' number.
bench/serving.py calls `summarize`, prints `table` and saves what `summarize` returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from generations import Generation

METRICS: Final[Mapping[str, tuple[str, str]]] = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
GOODPUT_METRICS: Final = ("ttft", "tpot", "e2el")
# What vLLM saves with --save-detailed only.
DETAILS: Final = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors")


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """{"ttft": ms, ...} from "ttft:500 tpot:50". ValueError for anything else."""
    limits = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        if name not in GOODPUT_METRICS or not limits[name] >= 0:
            raise ValueError(f"--goodput takes ttft:MS, tpot:MS and e2el:MS, in milliseconds; got {pair!r}")
    return limits


def num_output_tokens(generation: Generation, count: Callable[[str], int] | None) -> int:
    """Tokens a successful request generated."""
    if generation.output_tokens:
        return generation.output_tokens
    return count(generation.text) if count is not None else len(generation.chunk_times)


def peaks(done: Sequence[Generation]) -> tuple[float, int]:
    """Most chunks that came in one second, and most requests that were running in one, counted from the first send."""
    if not done:
        return 0.0, 0
    begin = min(g.start_time for g in done)
    num_seconds = math.ceil(max(g.start_time + g.latency for g in done) - begin) + 1
    tokens, running = np.zeros(num_seconds), np.zeros(num_seconds, int)
    for g in done:
        np.add.at(tokens, (np.asarray(g.chunk_times) - begin).astype(int), 1)
        running[int(g.start_time - begin) : int(g.start_time + g.latency - begin) + 1] += 1
    return float(tokens.max()), int(running.max())


def percentile_name(percentile: float) -> str:
    """99.0 is p99, 99.9 is p99.9."""
    return f"p{int(percentile) if percentile == int(percentile) else percentile}"


def summarize(
    generations: Sequence[Generation],
    duration: float,
    *,
    goodput: Mapping[str, float],
    metrics: Sequence[str] = tuple(METRICS),
    percentiles: Sequence[float] = (99.0,),
    count_tokens: Callable[[str], int] | None = None,
) -> dict[str, Any]:
    """All figures of a run.

    generations    those that ended; a failed one counts in `failed` alone
    duration       seconds, first send to last end
    goodput        limits in ms by metric; {} = not asked for
    count_tokens   tokens of a text, for servers without usage

    Times in the result are milliseconds where the name says so, else seconds.
    """
    done = [g for g in generations if g.success]
    counts = {id(g): num_output_tokens(g, count_tokens) for g in done}
    tpots = {id(g): (g.latency - g.ttft) / (counts[id(g)] - 1) if counts[id(g)] > 1 else 0.0 for g in done}
    total_input = sum(_input_len(g) for g in done)
    total_output = sum(counts.values())
    # As in vLLM, a request of one token has no TPOT, yet meets any limit on it.
    good = sum(
        all(
            value <= goodput.get(name, math.inf) / 1000
            for name, value in (("ttft", g.ttft), ("tpot", tpots[id(g)]), ("e2el", g.latency))
        )
        for g in done
    )
    max_tokens, max_running = peaks(done)
    cached = [g.cached_tokens for g in done if g.cached_tokens is not None]
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(generations) - len(done),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(done) / duration,
        "request_goodput": good / duration if goodput else None,
        "output_throughput": total_output / duration,
        "total_token_throughput": (total_input + total_output) / duration,
        "total_cached_tokens": sum(cached) if cached else None,
        "input_lens": [_input_len(g) for g in generations],
        "output_lens": [counts.get(id(g), 0) for g in generations],
        "ttfts": [g.ttft for g in generations],
        "itls": [g.itl for g in generations],
        "latencies": [g.latency for g in generations],
        "start_times": [g.start_time for g in generations],
        "queue_times": [g.start_time - g.arrival_time for g in generations],
        "generated_texts": [g.text for g in generations],
        "errors": [g.error for g in generations],
        "max_output_tokens_per_s": max_tokens,
        "max_concurrent_requests": max_running,
    }
    values = {
        "ttft": [g.ttft for g in done],
        "tpot": [tpots[id(g)] for g in done if counts[id(g)] > 1],
        "itl": [gap for g in done for gap in g.itl],
        "e2el": [g.latency for g in done],
    }
    for name in metrics:
        of = np.asarray(values[name] or [0.0]) * 1000
        result[f"mean_{name}_ms"] = float(of.mean())
        result[f"median_{name}_ms"] = float(np.median(of))
        result[f"std_{name}_ms"] = float(of.std())
        for percentile in percentiles:
            result[f"{percentile_name(percentile)}_{name}_ms"] = float(np.percentile(of, percentile))
    return result


def _input_len(generation: Generation) -> int:
    counted = generation.prompt_tokens
    return generation.request.prompt_len if counted is None else counted


def table(result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The figures as text, line by line as vLLM prints them."""
    lines = [f"{' Serving Benchmark Result ':=^50}"]

    def line(label: str, value: Any) -> None:
        if value is not None:
            lines.append(f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}")

    line("Successful requests:", result["completed"])
    line("Failed requests:", result["failed"])
    line("Maximum request concurrency:", result.get("max_concurrency"))
    if isinstance(result.get("request_rate"), float):
        line("Request rate configured (RPS):", result["request_rate"])
    line("Benchmark duration (s):", result["duration"])
    line("Total input tokens:", result["total_input_tokens"])
    if result["total_cached_tokens"] is not None:
        line("  of them cached:", result["total_cached_tokens"])
    line("Total generated tokens:", result["total_output_tokens"])
    line("Request throughput (req/s):", result["request_throughput"])
    line("Request goodput (req/s):", result["request_goodput"])
    line("Output token throughput (tok/s):", result["output_throughput"])
    line("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"])
    line("Peak concurrent requests:", result["max_concurrent_requests"])
    line("Total token throughput (tok/s):", result["total_token_throughput"])
    for name in metrics:
        short, title = METRICS[name]
        lines.append(f"{title:-^50}")
        line(f"Mean {short} (ms):", result[f"mean_{name}_ms"])
        line(f"Median {short} (ms):", result[f"median_{name}_ms"])
        for percentile in percentiles:
            key = percentile_name(percentile)
            line(f"{key.upper()} {short} (ms):", result[f"{key}_{name}_ms"])
    lines.append(f"{'CPU':-^50}")
    line("Client CPU (us per output token):", result.get("client_cpu_us_per_token"))
    server = result.get("server_cpu")
    if server:
        line("Server compute threads (us per token):", server["compute_us_per_token"])
        line("Server everything else (us per token):", server["other_us_per_token"])
        line("Server compute threads (% of machine):", server["compute_percent"])
        line("Server everything else (% of machine):", server["other_percent"])
    lines.append("=" * 50)
    return "\n".join(lines)
