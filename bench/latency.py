"""Start-up, time to first token cold and after a prefix hit, and idle CPU of one model.

    python bench/make_model.py qwen3-0.6b-32k /tmp/qwen3-0.6b-32k
    python bench/latency.py /tmp/qwen3-0.6b-32k

start    a new `python` process, from exec to the first token of a 16-token prompt; the checkpoint is read once
         before, so it comes from the page cache; beside it the time one plain read of the same files takes
ttft     a prompt of --prompt-len tokens, then the same prompt again; fresh prompts each repeat; medians
ahead    4 requests decoding together: the share of decode steps that were planned before the result of the step before
         them, the pause between two steps, and a step's length
idle     CPU seconds the whole process uses in --idle-s seconds with an engine up and nothing to do
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

_START = """
import sys, time
from sapwood import Engine, SamplingParams
t_import = time.monotonic()
with Engine(sys.argv[1], skip_tokenizer_init=True, max_total_tokens=4096) as engine:
    t_ready = time.monotonic()
    for output in engine.generate(list(range(3, 19)), SamplingParams(temperature=0, max_new_tokens=2), stream=True):
        if output.token_ids:
            t_first = time.monotonic()
            break
print(t_import, t_ready, t_first)
"""


def read_files(model: Path) -> float:
    """Seconds to read every weight file once, sequentially."""
    begin = time.monotonic()
    buffer = bytearray(1 << 24)
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.monotonic() - begin


def measure_start(model: Path, repeats: int) -> dict[str, float]:
    rows = []
    for _ in range(repeats):
        read_s = read_files(model)
        begin = time.monotonic()
        done = subprocess.run([sys.executable, "-c", _START, str(model)], check=True, capture_output=True, text=True)
        t_import, t_ready, t_first = map(float, done.stdout.split())
        rows.append((read_s, t_import - begin, t_ready - begin, t_first - begin))
    read_s, import_s, ready_s, first_s = (statistics.median(column) for column in zip(*rows, strict=True))
    return {"read_files_s": read_s, "import_s": import_s, "ready_s": ready_s, "first_token_s": first_s}


def measure_ttft(engine, vocab_size: int, prompt_len: int, repeats: int) -> dict[str, float]:
    from sapwood import SamplingParams

    params = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)
    rng = np.random.default_rng(0)

    def first_token(prompt: list[int]) -> tuple[float, int]:
        begin = time.monotonic()
        first = 0.0
        for output in engine.generate(prompt, params, stream=True):
            if output.token_ids and not first:
                first = time.monotonic() - begin
        return first, output.usage.cached_tokens

    first_token(rng.integers(300, vocab_size, 64).tolist())
    cold, warm, cached = [], [], []
    for _ in range(repeats):
        prompt = rng.integers(300, vocab_size, prompt_len).tolist()
        cold.append(first_token(prompt)[0])
        seconds, num_cached = first_token(prompt)
        warm.append(seconds)
        cached.append(num_cached)
    return {
        "prompt_len": prompt_len, "cold_ttft_s": statistics.median(cold), "warm_ttft_s": statistics.median(warm),
        "ratio": statistics.median(w / c for w, c in zip(warm, cold, strict=True)), "cached_tokens": min(cached),
    }  # fmt: skip


def measure_ahead(engine, vocab_size: int) -> dict[str, float]:
    from itertools import pairwise

    from sapwood import SamplingParams

    rng = np.random.default_rng(1)
    prompts = [rng.integers(300, vocab_size, 32).tolist() for _ in range(4)]
    begin = len(engine.trace())
    engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=100, ignore_eos=True))
    pairs = [(a, b) for a, b in pairwise(engine.trace()[begin:]) if b.num_decode_rows]
    ahead = sum(b.planned_ns < a.done_ns for a, b in pairs)
    return {
        "decode_steps": len(pairs),
        "planned_ahead": ahead / len(pairs),
        "gap_us": statistics.median((b.start_ns - a.done_ns) / 1e3 for a, b in pairs),
        "step_ms": statistics.median((b.done_ns - b.start_ns) / 1e6 for _, b in pairs),
    }


def measure_idle(seconds: float) -> dict[str, float]:
    time.sleep(1.0)  # let threads park
    cpu, wall = time.process_time(), time.monotonic()
    time.sleep(seconds)
    used, wall = time.process_time() - cpu, time.monotonic() - wall
    return {"idle_wall_s": wall, "idle_cpu_s": used, "idle_cpu_percent": 100 * used / wall}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt-len", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--idle-s", type=float, default=10.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    from sapwood import Engine

    results = {"start": measure_start(args.model, args.repeats)}
    config = json.loads((args.model / "config.json").read_text())
    with Engine(str(args.model), skip_tokenizer_init=True, max_total_tokens=8192, trace_capacity=10000) as engine:
        results["ttft"] = measure_ttft(engine, config["vocab_size"], args.prompt_len, args.repeats)
        results["ahead"] = measure_ahead(engine, config["vocab_size"])
        results["idle"] = measure_idle(args.idle_s)
    if args.json:
        print(json.dumps(results))
    else:
        for part, values in results.items():
            print(part + "  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
