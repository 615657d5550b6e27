"""Do bench/serving.py and `vllm bench serve` measure the same? Both load one server alternately; medians side by side.

    sapwood serve /tmp/qwen3-0.6b-32k &
    python bench/serving_agreement.py --vllm /path/to/venv/bin/vllm --model /tmp/qwen3-0.6b-32k --concurrency 1 4 16

Each repeat runs both clients with the same load (random prompts of --input-len tokens, --output-len tokens out, eos
ignored, closed loop of C requests, --rounds times C of them), the first one changing from repeat to repeat; every run
has a seed of its own, so that no prompt is in the server's prefix cache. vLLM's first prompt is not sent beforehand
(--ready-check-timeout-sec 0). Both clients send text, made with the tokenizer in --model, which must be a directory.

Exit status 1 where a median differs by more than --tolerance percent, or a request failed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

FIGURES: Final = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms", "mean_itl_ms")
CLIENTS: Final = ("serving.py", "vllm")


def command(args: argparse.Namespace, client: str, concurrency: int, seed: int, folder: str) -> list[str]:
    ours = [sys.executable, str(Path(__file__).with_name("serving.py"))]
    program = ours if client == "serving.py" else [args.vllm, "bench", "serve"]
    name = args.served_model_name or Path(args.model).resolve().name
    return [
        *program, "--backend", "openai", "--base-url", args.base_url, "--model", args.model,
        "--served-model-name", name, "--dataset-name", "random", "--random-input-len", str(args.input_len),
        "--random-output-len", str(args.output_len), "--num-prompts", str(concurrency * args.rounds),
        "--max-concurrency", str(concurrency), "--seed", str(seed), "--ignore-eos", "--ready-check-timeout-sec", "0",
        "--disable-tqdm", "--save-result", "--result-dir", folder, "--result-filename", "result.json",
    ]  # fmt: skip


def measure(args: argparse.Namespace, client: str, concurrency: int, seed: int) -> dict[str, Any]:
    """One run's result. RuntimeError with the client's last words where it fails, or a request of it does."""
    with tempfile.TemporaryDirectory(prefix="sapwood-agreement-") as folder:
        done = subprocess.run(command(args, client, concurrency, seed, folder), capture_output=True, text=True)
        file = Path(folder) / "result.json"
        if not file.exists():
            raise RuntimeError(f"{client} failed with exit status {done.returncode}:\n{done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(file.read_text())
    if result["failed"] or result["completed"] != concurrency * args.rounds:
        raise RuntimeError(f"{client}: {result['failed']} of {concurrency * args.rounds} requests failed")
    return result


def compare(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """figure -> both clients' medians, their spreads (max - min) and our difference, both in percent."""
    rows = {}
    for figure in FIGURES:
        row: dict[str, float] = {}
        for client in CLIENTS:
            values = [run[figure] for run in runs[client]]
            row[client] = statistics.median(values)
            row[client + " spread"] = 100 * (max(values) - min(values)) / row[client] if row[client] else 0.0
        ours, theirs = (row[client] for client in CLIENTS)
        row["difference"] = 100 * (ours / theirs - 1) if theirs else 0.0
        rows[figure] = row
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the vllm program")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--model", required=True, help="directory of the served model")
    parser.add_argument("--served-model-name", help="default: the directory's name")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4, help="requests of a run, by concurrency (default 4)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--tolerance", type=float, default=5.0, help="percent (default 5)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    agree, report = True, {}
    seed = args.seed
    if not args.json:
        print(f"{'C':>3s}  {'figure':18s} {'serving.py':>12s}   spread {'vllm':>12s}   spread {'difference':>11s}")
    for concurrency in args.concurrency:
        runs: dict[str, list[dict[str, Any]]] = {client: [] for client in CLIENTS}
        for repeat in range(args.repeats):
            for client in CLIENTS if repeat % 2 == 0 else CLIENTS[::-1]:
                runs[client].append(measure(args, client, concurrency, seed))
                seed += 1
        rows = report[concurrency] = compare(runs)
        agree &= all(abs(row["difference"]) <= args.tolerance for row in rows.values())
        if not args.json:
            for figure, row in rows.items():
                cells = [f"{row[client]:12.3f} {row[client + ' spread']:6.1f} %" for client in CLIENTS]
                print(f"{concurrency:3d}  {figure:18s} {' '.join(cells)} {row['difference']:+9.2f} %", flush=True)
    if args.json:
        print(json.dumps(report))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
