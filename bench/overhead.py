"""What the host costs: microseconds of planning and committing a step, of text per token, of the prefix cache.

    python bench/overhead.py [--json]

The forward is a no-op runner, so a step is nothing but host work: StepLoop plans, submits, commits; the rows stream to
sinks that do nothing (the loop's own part of a streamed token) or through the public API. Targets: <= 100 us a step
(plan and commit) at batch 64, <= 10 us of Python a streamed token. The machine's own speed is printed with it: a Python
loop and a native call, in the same run. No model and no test data are needed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.engine.async_engine import AsyncEngine
from sapwood.engine.engine import StepLoop
from sapwood.engine.output import OutputProcessor
from sapwood.engine.request_state import RequestState
from sapwood.request import RequestOutput, SamplingParams

PAGE_SIZE = 16
PROMPT_LEN = 200


class NoSink:
    def put(self, output: RequestOutput) -> None: ...
    def fail(self, error: Exception) -> None:
        raise error


class OneWord:
    """A detokenizer that costs what the common case costs: a dictionary lookup."""

    def __init__(self) -> None:
        self._texts = dict.fromkeys(range(1000), " word")

    def push(self, token_id: int) -> str:
        return self._texts[token_id]

    def flush(self) -> str:
        return ""


def model(batch: int, forward_us: int, num_pages: int) -> tuple[EngineConfig, SimpleNamespace]:
    config = EngineConfig.from_kwargs(
        "noop",
        skip_tokenizer_init=True,
        page_size=PAGE_SIZE,
        max_running_requests=batch,
        chunked_prefill_size=8192,
        trace_capacity=100_000,
        max_step_ms=0,
    )
    groups = [_core.KvGroup(page_size=PAGE_SIZE)]
    executor = _core.Executor(_core.noop_runner(7, forward_us, 0), groups, batch)
    return config, SimpleNamespace(
        executor=executor,
        groups=groups,
        num_pages=[num_pages],
        vocab_size=1000,
        eos_token_ids=[],
        context_len=100_000,
        max_step_tokens=8192 + batch,
        cache_salt=0,
        name="noop",
        generation_defaults={},
        rope_mode=lambda _: 0,
    )


async def step_costs(batch: int, num_steps: int) -> dict[str, float]:
    """Decode steps of `batch` streaming rows with text: microseconds by part, medians over steps."""
    loop = asyncio.get_running_loop()
    num_pages = batch * ((PROMPT_LEN + num_steps) // PAGE_SIZE + 2)
    config, loaded = model(batch, 300, num_pages)
    steps = StepLoop(loaded, config, loop=loop)
    steps.start()
    rng = np.random.default_rng(0)
    for i in range(batch):
        req = RequestState(str(i), SamplingParams(max_new_tokens=num_steps), NoSink(), stream=True, seed=i)
        steps.register(req)
        steps.enqueue(req, rng.integers(0, 1000, PROMPT_LEN, dtype=np.int32), OneWord)
    await steps.wait_idle()
    records = [r for r in steps.trace() if r.num_decode_rows == batch][20:-20]
    steps.close()
    await asyncio.to_thread(loaded.executor.shutdown)

    def median(values: list[float]) -> float:
        return statistics.median(values)

    plan = [r.plan_us + (r.submit_ns - r.planned_ns) / 1e3 for r in records]
    commit = [r.commit_us for r in records]
    output = [r.output_us for r in records]
    both = sorted(a + b for a, b in zip(plan, commit, strict=True))
    return {
        "batch": batch,
        "steps": len(records),
        "plan_us": median(plan),
        "commit_us": median(commit),
        "plan_commit_us": median(both),
        "plan_commit_p99_us": both[int(0.99 * len(both))],
        "output_us_per_token": median(output) / batch,
    }


async def streamed_token_cost(batch: int, num_tokens: int) -> float:
    """Host microseconds of CPU a token, all in: step, texts, one asyncio consumer a request; not the executor's."""
    config, loaded = model(batch, 0, batch * ((PROMPT_LEN + num_tokens) // PAGE_SIZE + 2))
    rng = np.random.default_rng(1)

    async def consume(engine: AsyncEngine, prompt: Any) -> None:
        async for _ in engine.generate(prompt, SamplingParams(max_new_tokens=num_tokens), stream=True):
            pass

    async with AsyncEngine.from_loaded(loaded, config) as engine:
        engine._decoder = lambda params: OneWord  # type: ignore[method-assign]
        prompts = [rng.integers(0, 1000, PROMPT_LEN, dtype=np.int32) for _ in range(batch)]
        began = time.thread_time()
        await asyncio.gather(*(consume(engine, p) for p in prompts))
        return (time.thread_time() - began) * 1e6 / (batch * num_tokens)


def output_cost(num_tokens: int = 20_000) -> dict[str, float]:
    """Microseconds of Python a token in engine/output.py alone, streaming."""
    out = {}
    for name, params in (
        ("plain", SamplingParams()),
        ("stop_strings", SamplingParams(stop=["\n\nQ:", "</end>", "STOP"])),
    ):
        output = OutputProcessor("r", params, num_prompt=1, decoder=OneWord(), stream=True)
        began = time.perf_counter()
        for _ in range(num_tokens):
            output.push(7, 0, 0.0)
            output.take()
        out[name] = (time.perf_counter() - began) * 1e6 / num_tokens
    return out


def cache_costs(num_tokens: int, kind: str = "radix") -> dict[str, float]:
    """A tree of num_tokens cached tokens: nanoseconds to match a token, microseconds to evict a page."""
    group = _core.KvGroup(page_size=PAGE_SIZE)
    prompt_len = 1024
    num_prompts = num_tokens // prompt_len
    cache = _core.CacheManager([group], [num_prompts * prompt_len // PAGE_SIZE], kind=kind)
    rng = np.random.default_rng(2)
    prompts = rng.integers(0, 50_000, (num_prompts, prompt_len), dtype=np.int32)
    for step, prompt in enumerate(prompts):
        lease = cache.acquire(0, prompt, prompt_len - 1)
        assert cache.reserve(lease, prompt_len)
        cache.commit(lease, prompt, step)
        cache.release(lease)
        cache.retire(step)
    chosen = rng.permutation(num_prompts)[: min(num_prompts, 400)]
    for i in chosen:
        cache.match(0, prompts[i])
    began = time.perf_counter()
    for i in chosen:
        assert cache.match(0, prompts[i]) == prompt_len
    match_ns = (time.perf_counter() - began) * 1e9 / (len(chosen) * prompt_len)
    assert cache.stats().free == 0
    lease = cache.acquire(0, np.arange(60_000, 60_001, dtype=np.int32), 0)
    num_evicted = min(num_prompts, 400) * prompt_len // PAGE_SIZE
    began = time.perf_counter()
    for i in range(1, num_evicted // 16 + 1):
        assert cache.reserve(lease, i * 16 * PAGE_SIZE)
    evict_us = (time.perf_counter() - began) * 1e6 / (num_evicted // 16 * 16)
    cache.release(lease)
    return {
        "tokens": num_prompts * prompt_len,
        "nodes": num_prompts,
        "match_ns_per_token": match_ns,
        "evict_us_per_page": evict_us,
    }


def machine() -> dict[str, float | str]:
    """How fast this machine is at what is measured here."""
    began = time.perf_counter()
    for _ in range(1_000_000):
        pass
    loop_ns = (time.perf_counter() - began) * 1e3
    cache = _core.CacheManager([_core.KvGroup(page_size=PAGE_SIZE)], [16])
    began = time.perf_counter()
    for _ in range(100_000):
        cache.available_pages()
    call_ns = (time.perf_counter() - began) * 1e4
    return {"python": platform.python_version(), "python_loop_ns": loop_ns, "native_call_ns": call_ns}


def run(loop_factory: Any, main: Any) -> Any:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--steps", type=int, default=500, help="decode steps per batch size")
    arguments = parser.parse_args()
    import uvloop

    report: dict[str, Any] = {"machine": machine()}
    report["steps"] = [run(uvloop.new_event_loop, step_costs(batch, arguments.steps)) for batch in (1, 16, 64, 256)]
    report["output_us_per_token"] = output_cost()
    report["streamed_us_per_token"] = {
        str(batch): run(uvloop.new_event_loop, streamed_token_cost(batch, 300)) for batch in (1, 16, 64)
    }
    report["cache"] = [cache_costs(n) for n in (2**14, 2**17, 2**20, 2**22)]
    if arguments.json:
        print(json.dumps(report))
        return
    m = report["machine"]
    print(
        f"python {m['python']}: {m['python_loop_ns']:.1f} ns a turn of an empty loop, "
        f"{m['native_call_ns']:.0f} ns a native call\n"
    )
    print("host work of a decode step, us (median)   plan   commit   plan+commit    p99   output per token")
    for s in report["steps"]:
        print(
            f"  batch {s['batch']:4d}  ({s['steps']} steps)              {s['plan_us']:7.1f}  {s['commit_us']:7.1f}  "
            f"{s['plan_commit_us']:12.1f} {s['plan_commit_p99_us']:6.1f}  {s['output_us_per_token']:8.2f}"
        )
    at_64 = next(s for s in report["steps"] if s["batch"] == 64)
    print(f"  target at 64: <= 100 us plan+commit: {'met' if at_64['plan_commit_us'] <= 100 else 'MISSED'}\n")
    print("a streamed token, us")
    for name, us in report["output_us_per_token"].items():
        print(f"  output.py alone, {name:12s} {us:6.2f}")
    for batch, us in report["streamed_us_per_token"].items():
        print(f"  everything on the loop's thread, batch {batch:3s} {us:6.2f}")
    print("\nprefix cache          tokens     match ns/token   evict us/page")
    for c in report["cache"]:
        print(f"  radix          {c['tokens']:11d}   {c['match_ns_per_token']:14.2f}  {c['evict_us_per_page']:14.3f}")


if __name__ == "__main__":
    main()
