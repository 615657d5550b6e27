"""Throughput and latency of one model in this process, without HTTP, as a share of what the machine could do.

    python bench/make_model.py qwen3-0.6b-32k /tmp/qwen3-0.6b-32k
    python bench/offline.py /tmp/qwen3-0.6b-32k --concurrency 1 4 16

For every concurrency C, medians over --repeats of
    prefill   C fresh prompts of --input-len tokens, one token each: prompt tokens a second until all have it, and the
              mean time to first token
    decode    C fresh prompts, --output-len tokens each: tokens a second from the moment the last request has its first
              token until the first has its last, so with all C rows decoding and nothing else; TPOT = C / that
    total     the same run from submission to its end: output tokens and all tokens a second

The ceilings are measured in the same run (bench/machine.py). A decode step must at least read every matrix and the KV
of its rows once (bytes / read bandwidth) and multiply (operations / peak), a prefill must multiply; the share is that
least time over the measured one. The peak of quantised matrices (--quantization) is int8's; of the others, and of
attention, it is bf16's where the engine runs on bf16 dot products (level avx512_bf16), else fp32's.
A model that fits into the caches can beat "its" bandwidth.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import machine
import numpy as np

if TYPE_CHECKING:
    from sapwood import AsyncEngine
    from sapwood.models.loader import LoadedModel


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model's tokens cost at least.

    matrix_bytes     bytes of all matrices a step reads, the head included, the embedding's table not
    body_params      weights that every token is multiplied with
    head_params      weights that every token with logits is multiplied with
    kv_token_bytes   KV bytes of one token, over all layers
    attn_flops       operations of one token's attention to one earlier token, over all layers
    body_int8, head_int8   which of them are multiplied as int8
    """

    matrix_bytes: int
    body_params: int
    head_params: int
    kv_token_bytes: float
    attn_flops: int
    body_int8: bool = False
    head_int8: bool = False

    @classmethod
    def of(cls, model: LoadedModel) -> Cost:
        item_bytes = {"act": 4 if model.program.act == "float32" else 2, "int8": 34 / 32, "int4": 18 / 32}
        params = {"forward": 0, "head": 0}
        int8 = {"forward": False, "head": False}
        matrix_bytes = 0.0
        seen: set[int] = set()
        attn_flops = 0
        for node in model.program.nodes:
            if node.op == "qkv":
                # q times k, and the weighted sum of v: a multiply and an add each.
                attn_flops += 4 * int(node.params["num_q_heads"]) * int(node.params["head_dim"])
            for slot in node.weights:
                if slot is None or len(slot.shape) != 2 or slot.kind == "f32" or node.op == "embedding":
                    continue
                if slot.id not in seen:
                    seen.add(slot.id)
                    where = "forward" if node.segment == "forward" else "head"
                    params[where] += slot.shape[0] * slot.shape[1]
                    matrix_bytes += item_bytes[slot.format] * slot.shape[0] * slot.shape[1]
                    int8[where] = slot.format != "act"
        return cls(
            matrix_bytes=round(matrix_bytes),
            body_params=params["forward"],
            head_params=params["head"],
            kv_token_bytes=sum(g.page_bytes / g.page_size for g in model.groups),
            attn_flops=attn_flops,
            body_int8=int8["forward"],
            head_int8=int8["head"],
        )

    def prefill_s(self, num_prompts: int, input_len: int, peaks: Peaks) -> float | None:
        """Least seconds of that many whole prompts with logits for the last token of each; None where a peak is
        unknown.
        """
        attended = input_len * (input_len + 1) / 2
        return self._multiply_s(num_prompts * input_len, num_prompts, num_prompts * attended, peaks)

    def decode_s(self, num_rows: int, context_len: float, peaks: Peaks) -> float:
        """Least seconds of a step of num_rows rows with context_len tokens each."""
        read_s = (self.matrix_bytes + num_rows * context_len * self.kv_token_bytes) / peaks.bytes_per_s
        return max(read_s, self._multiply_s(num_rows, num_rows, num_rows * context_len, peaks) or 0.0)

    def _multiply_s(self, num_tokens: int, num_logit_rows: int, num_pairs: float, peaks: Peaks) -> float | None:
        body = peaks.int8_per_s if self.body_int8 else peaks.flops_per_s
        head = peaks.int8_per_s if self.head_int8 else peaks.flops_per_s
        if body is None or head is None or peaks.flops_per_s is None:
            return None
        matrices = 2 * self.body_params * num_tokens / body + 2 * self.head_params * num_logit_rows / head
        return matrices + self.attn_flops * num_pairs / peaks.flops_per_s


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What the machine can do in a second; None = unknown. flops_per_s is for what is not int8."""

    bytes_per_s: float
    flops_per_s: float | None
    int8_per_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Times:
    """One batch. Seconds since its submission, one each request, and when each token came."""

    firsts: list[float]
    lasts: list[float]
    tokens: list[float]

    def decode_rate(self) -> float | None:
        """Tokens a second while every request was decoding; None where no such time was."""
        begin, end = max(self.firsts), min(self.lasts)
        return sum(begin < t <= end for t in self.tokens) / (end - begin) if end > begin else None


async def run_batch(engine: AsyncEngine, prompts: list[Any], output_len: int) -> Times:
    """All prompts at once, output_len tokens each whatever they are. RuntimeError where a request ends otherwise."""
    from sapwood import SamplingParams

    params = SamplingParams(temperature=0, max_new_tokens=output_len, ignore_eos=True)
    firsts, lasts = [0.0] * len(prompts), [0.0] * len(prompts)
    tokens: list[float] = []
    begin = time.perf_counter()
    async for output in engine.generate(prompts, params, stream=True):
        now = time.perf_counter() - begin
        tokens += [now] * len(output.token_ids)
        if output.token_ids and not firsts[output.index]:
            firsts[output.index] = now
        if output.finish_reason is not None:
            if output.usage.completion_tokens != output_len:
                raise RuntimeError(f"a request ended after {output.usage.completion_tokens} tokens: {output.error}")
            lasts[output.index] = now
    return Times(firsts, lasts, tokens)


async def measure(
    engine: AsyncEngine, concurrency: int, input_len: int, output_len: int, repeats: int, rng: np.random.Generator
) -> dict[str, float]:
    """One row of the table, without its shares."""
    vocab_size = engine.model.vocab_size  # type: ignore[union-attr]

    def prompts() -> list[Any]:
        return list(rng.integers(0, vocab_size, (concurrency, input_len), dtype=np.int32))

    await run_batch(engine, prompts(), 2)
    columns: dict[str, list[float]] = {}
    for _ in range(repeats):
        prefill = await run_batch(engine, prompts(), 1)
        whole = await run_batch(engine, prompts(), output_len)
        row = {
            "prefill_tok_s": concurrency * input_len / max(prefill.firsts),
            "ttft_ms": 1e3 * statistics.fmean(prefill.firsts),
            "output_tok_s": concurrency * output_len / max(whole.lasts),
            "total_tok_s": concurrency * (input_len + output_len) / max(whole.lasts),
        }
        decode = whole.decode_rate()
        if decode is not None:
            row |= {"decode_tok_s": decode, "tpot_ms": 1e3 * concurrency / decode}
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in columns.items()}
    spread = {
        name + "_spread": (max(columns[name]) - min(columns[name])) / medians[name]
        for name in ("prefill_tok_s", "decode_tok_s")
        if name in columns
    }
    return {"concurrency": concurrency, **medians, **spread}


def add_shares(row: dict[str, float], cost: Cost, input_len: int, output_len: int, peaks: Peaks) -> None:
    """Put the shares of the machine's ceilings into a row of measure(); a share that cannot be known is left out."""
    num_rows = int(row["concurrency"])
    if (least_s := cost.prefill_s(num_rows, input_len, peaks)) is not None:
        row["prefill_share"] = least_s / (num_rows * input_len / row["prefill_tok_s"])
    if "decode_tok_s" in row:
        context_len = input_len + output_len / 2
        least_s = cost.decode_s(num_rows, context_len, peaks)
        row["decode_share"] = least_s / (num_rows / row["decode_tok_s"])


async def run(args: argparse.Namespace) -> dict[str, Any]:
    from sapwood import AsyncEngine
    from sapwood.program.native import resolve_isa

    total = max(args.concurrency) * (args.input_len + args.output_len + 64)
    settings = {
        "dtype": args.dtype,
        "quantization": args.quantization,
        "max_total_tokens": total,
        "max_running_requests": max(args.concurrency),
    }
    threads = args.num_threads or machine.num_usable_cpus()
    found = machine.ceilings(tuple(sorted({1, threads})))
    async with AsyncEngine(args.model, skip_tokenizer_init=True, num_threads=threads, **settings) as engine:
        isa = resolve_isa(engine.config)
        model: Any = engine.model
        cost = Cost.of(model)
        kind = "bf16" if isa == "avx512_bf16" and model.program.act == "bfloat16" else "fp32"
        peak, bandwidth = found.median(kind, threads), found.median("read", threads)
        assert bandwidth is not None
        int8 = found.median("int8", threads)
        peaks = Peaks(1e9 * bandwidth, peak and 1e9 * peak, int8 and 1e9 * int8)
        rows = []
        rng = np.random.default_rng(args.seed)
        for concurrency in args.concurrency:
            row = await measure(engine, concurrency, args.input_len, args.output_len, args.repeats, rng)
            add_shares(row, cost, args.input_len, args.output_len, peaks)
            rows.append(row)
            if not args.json:
                print_row(row, header=len(rows) == 1)
        return {
            "model": model.name,
            "dtype": model.program.act,
            "quantization": args.quantization,
            "isa": isa,
            "threads": threads,
            "input_len": args.input_len,
            "output_len": args.output_len,
            "repeats": args.repeats,
            "matrix_bytes": cost.matrix_bytes,
            "kv_token_bytes": cost.kv_token_bytes,
            "peak": "int8" if cost.body_int8 else kind,
            "machine": found.as_json(),
            "rows": rows,
        }


def print_row(row: Mapping[str, float], header: bool) -> None:
    if header:
        print("   C   prefill tok/s  of peak   TTFT ms   decode tok/s  of ceiling   TPOT ms   output tok/s   all tok/s")

    def number(name: str, width: int, digits: int) -> str:
        return f"{row[name]:{width}.{digits}f}" if name in row else " " * (width - 1) + "-"

    def share(name: str, width: int) -> str:
        return f"{100 * row[name]:{width - 2}.1f} %" if name in row else " " * (width - 1) + "-"

    print(
        f"{int(row['concurrency']):4d} {number('prefill_tok_s', 15, 1)} {share('prefill_share', 8)} "
        f"{number('ttft_ms', 9, 1)} {number('decode_tok_s', 14, 2)} {share('decode_share', 11)} "
        f"{number('tpot_ms', 9, 2)} {number('output_tok_s', 14, 2)} {number('total_tok_s', 11, 1)}",
        flush=True,
    )


def print_machine(report: Mapping[str, Any]) -> None:
    ceilings, threads = report["machine"], str(report["threads"])
    speed = f"reads {ceilings['read'][threads]['median']:.1f} GB/s"
    if ceilings[report["peak"]]:
        speed += f", {report['peak']} {ceilings[report['peak']][threads]['median']:.0f} GFLOP/s"
    matrices_gb, kv_kib = report["matrix_bytes"] / 1e9, report["kv_token_bytes"] / 1024
    sizes = f"{matrices_gb:.3f} GB of matrices, {kv_kib:.1f} KiB of KV a token"
    dtype = report["quantization"] or report["dtype"]
    print(f"\n{report['model']}, {dtype}, {report['isa']}, {report['threads']} threads; {sizes}")
    print(f"{ceilings['cpu']}: {speed}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory in Hugging Face format, hub id, or sapling")
    parser.add_argument("--input-len", type=int, default=512, help="prompt tokens (default 512)")
    parser.add_argument("--output-len", type=int, default=64, help="generated tokens (default 64)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--quantization", choices=["int8", "int4"], help="quantise the weights while loading")
    parser.add_argument("--num-threads", type=int, help="compute threads (default: all usable CPUs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    if min(args.input_len, args.output_len, args.repeats, *args.concurrency, args.num_threads or 1) < 1:
        parser.error("lengths, --concurrency, --repeats and --num-threads must be at least 1")
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(run(args))
    if args.json:
        print(json.dumps(report))
    else:
        print_machine(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
