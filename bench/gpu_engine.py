"""The cases of `bench/gpu_suite.py --stage engine`: tokens first (bench/gpu_tokens.py), then speed, then peers
(bench/gpu_peers.py).

Speed is that of a model of Llama-3.1-8B's shape, bf16, weights drawn on the GPU, through AsyncEngine:

    start        from the process's begin to ready and to the first token; what the device says of its memory
    decode N     N streams with 1k tokens of context (one stream: 128), all of them decoding: tokens a second; its share
                 of this run's copy bandwidth is the least a step must read (all matrices but the embedding's table, the
                 KV of its rows) over what it takes; idle: what lies between two steps on the device
    prefill      prompts of 8k tokens one at a time, and the 64 of 1k: tokens a second, as a share of this run's bf16
                 product
    host 64      microseconds of a step of 64 decodes: plan and commit, texts and sinks, the packer, the launches

and the same without overlap, without graphs, with deterministic inference, with FlashInfer's attention, each in a
process of its own, as a share of the first.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import gpu_peers
import gpu_steps
import gpu_tokens
import numpy as np
import offline
from gpu_steps import Bench, Case, Row, Served, row

COPY_SHARE: Final = 0.85
IDLE_SHARE: Final = 0.03
HOST_US: Final = 100.0  # plan and commit of a step at batch 64


def ceilings(bench: Bench) -> None:
    def take() -> Iterator[Row]:
        found = bench.ceilings()
        yield row("copy bandwidth", found.copy / 1e9, "GB/s")
        yield row("bf16 product", found.matmul / 1e12, "TFLOP/s")

    bench.measure("ceilings", take)


# --- An engine's speed ----------------------------------------------------------------------------------------
def streams(bench: Bench) -> tuple[tuple[int, int], ...]:
    """(streams, tokens of context each)."""
    return ((1, 16), (4, 32), (8, 32)) if bench.emulated else ((1, 128), (64, 1024), (256, 1024))


def long_prompt(bench: Bench) -> int:
    return int(bench.pick(8192, 96))


def served(bench: Bench, **settings: Any) -> Served:
    """Room for the most streams' contexts and answers, all in the prefix cache."""
    count, context_len = streams(bench)[-1]
    return Served(
        bench,
        gpu_steps.large_model(bench),
        load_format="dummy",
        context_length=bench.pick(16384, 256),
        max_running_requests=count,
        max_total_tokens=count * (context_len + bench.pick(128, 16)) + 2 * long_prompt(bench),
        # On the emulator every step is too long to be shared with prompts.
        **({"chunked_prefill_size": 64, "max_step_ms": 0} if bench.emulated else {}),
        **settings,
    )


def process_age_s() -> float:
    """Since this process began, to a hundredth of a second."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Messages(logging.Handler):
    """What device "cuda" says of its memory."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []
        log = logging.getLogger("sapwood.program.cuda")
        log.setLevel(logging.INFO)
        log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def speed(bench: Bench) -> None:
    peaks = bench.ceilings()
    imported_s, messages, began = process_age_s(), Messages(), time.monotonic()
    with served(bench) as engine:
        ready_s = time.monotonic() - began
        rng = np.random.default_rng(0)

        def start() -> Iterator[Row]:
            first_s = engine.batch(gpu_steps.prompts(rng, engine.model.vocab_size, 1, 16), 1).firsts[0]
            yield row("start: weights, graphs", ready_s, "s", imported_s=imported_s, first_token_s=first_s,
                      messages=messages.said, note="; ".join(messages.said))  # fmt: skip
            yield row("start: first token after that", first_s, "s")

        bench.measure("start", start)
        measure_speed(bench, engine, peaks, "")


def variant(name: str, with_prefill: bool = False, package: str | None = None, **settings: Any) -> Case:
    """The same with other settings, as shares of what `speed` has measured."""

    def run(bench: Bench) -> None:
        peaks = bench.ceilings()
        with served(bench, **settings) as engine:
            measure_speed(bench, engine, peaks, f", {name}", few=True, with_prefill=with_prefill)

    return Case(name, run, 150, package)


def measure_speed(
    bench: Bench, engine: Served, peaks: Any, suffix: str, *, few: bool = False, with_prefill: bool = True
) -> None:
    """few: not with the most streams."""
    for count, context_len in streams(bench)[: 2 if few else 3]:
        bench.measure(f"decode {count}{suffix}", partial(decode, bench, engine, peaks, count, context_len, suffix))
    if with_prefill:
        bench.measure(f"prefill {long_prompt(bench)}{suffix}", partial(prefill, bench, engine, peaks, suffix))


def decode(bench: Bench, engine: Served, peaks: Any, count: int, context_len: int, suffix: str) -> Iterator[Row]:
    """Fresh prompts, computed for one token each; then again, from the prefix cache, so that all decode at once."""
    rng = np.random.default_rng(count)
    num_new = bench.pick(256 if count == 1 else 100, 12)
    cost, model = offline.Cost.of(engine.model), engine.model
    asked = gpu_steps.prompts(rng, model.vocab_size, count, context_len)
    engine.batch(asked, 1)
    if count == 1:
        engine.batch(asked, bench.pick(32, 2))  # the first steps of a process are slower
    engine.clock.steps.clear()
    times = engine.batch(asked, num_new)
    found = engine.clock.decodes(count)[2:-1]
    rate = times.decode_rate()
    if rate is None or len(found) < 2:
        raise RuntimeError(f"of {len(engine.clock.steps)} steps {len(found)} were decodes of all {count} streams")
    device_s = engine.clock.device_s(found)
    least_s = cost.decode_s(count, context_len + num_new / 2, offline.Peaks(peaks.copy, None))
    told = row(f"decode {count}{suffix}", rate, "tok/s", step_ms=1e3 * count / rate, device_ms=1e3 * device_s,
               note=f"a step {1e3 * count / rate:.3f} ms, on the device {1e3 * device_s:.3f}")  # fmt: skip
    yield bench.compared(told, f"decode {count}", "the default") if suffix else told
    target = {"at_least": COPY_SHARE} if count == 1 and not suffix else {}
    yield row(f"decode {count}{suffix}: of copy", least_s / (count / rate), "share", **target, least_ms=1e3 * least_s)
    idle = engine.clock.idle_share(found)
    target = {"at_most": IDLE_SHARE} if count == streams(bench)[1][0] and not suffix else {}
    yield row(f"decode {count}{suffix}: idle", idle, "share", **target, note=f"{len(found)} steps")
    yield host_row(engine, count, suffix, found, {"at_most": HOST_US} if target else {})


def host_row(
    engine: Served, count: int, suffix: str, steps: Sequence[gpu_steps.StepTimes], target: dict[str, float]
) -> Row:
    records = list(gpu_steps.decode_records(engine.engine, count))[-len(steps) :]
    parts = {
        "plan_us": [r.plan_us + (r.submit_ns - r.planned_ns) / 1e3 for r in records],
        "commit_us": [r.commit_us for r in records],
        "output_us": [r.output_us for r in records],
        "pack_us": [step.pack_us for step in steps],
        "forward_us": [step.forward_us for step in steps],
        "thread_us": [step.thread_us for step in steps],
    }
    medians = {name: statistics.median(values) for name, values in parts.items()}
    return row(
        f"host {count}{suffix}: plan, commit", medians["plan_us"] + medians["commit_us"], "us", **target, **medians,
        note=", ".join(f"{name.removesuffix('_us')} {value:.0f}" for name, value in medians.items()),
    )  # fmt: skip


def prefill(bench: Bench, engine: Served, peaks: Any, suffix: str) -> Iterator[Row]:
    """Of one long prompt at a time, and of as many short ones as there are streams."""
    rng = np.random.default_rng(1)
    cost = offline.Cost.of(engine.model)
    count, context_len = streams(bench)[1]
    for name, num, length, repeats in (
        (f"prefill {long_prompt(bench)}", 1, long_prompt(bench), bench.pick(4, 2)),
        (f"prefill {count}x{context_len}", count, context_len, 1),
    ):
        found = []
        for _ in range(repeats):
            engine.engine.flush_cache()
            asked = gpu_steps.prompts(rng, engine.model.vocab_size, num, length)
            found.append(max(engine.batch(asked, 1).firsts))
        took = statistics.median(found[repeats > 1 :])  # the first of a length meets products of a new shape
        told = row(name + suffix, num * length / took, "tok/s", ms=1e3 * took, note=f"{1e3 * took:.1f} ms")
        yield bench.compared(told, name, "the default") if suffix else told
        least_s = cost.prefill_s(num, length, offline.Peaks(peaks.copy, peaks.matmul))
        assert least_s is not None  # the peak is known
        yield row(f"{name}{suffix}: of peak", least_s / took, "share")


# The important ones first: what comes last is what a budget leaves out.
CASES: Final = (
    Case("ceilings", ceilings, 60),
    gpu_tokens.TOKENS,
    Case("speed", speed, 150),
    gpu_peers.TORCH,
    variant("no overlap", disable_overlap_schedule=True),
    variant("no graphs", disable_cuda_graph=True),
    variant("deterministic", with_prefill=True, enable_deterministic_inference=True),
    gpu_tokens.FAMILIES,
    gpu_peers.TRANSFORMERS,
    gpu_tokens.FLASHINFER,
    variant("flashinfer", with_prefill=True, package="flashinfer", attention_backend="flashinfer"),
)
