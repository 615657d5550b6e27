"""Load a server and measure it: a light client for OpenAI-compatible servers and for SGLang's /generate.

    sapwood serve &
    python bench/serving.py --num-prompts 64 --max-concurrency 16 --random-input-len 128 --random-output-len 64
    python bench/serving.py --dataset-name mooncake --trace-scale 0.05 --trace-speed 10 --num-prompts 200

Options, metrics and the saved JSON are those of `vllm bench serve` where the meaning is the same, so that the results
compare; what differs, and what to know:
  - no request is sent before the run but --num-warmups, whose prompts are not the run's: nothing measured is in the
    prefix cache already (vLLM sends its first prompt once before, unless --ready-check-timeout-sec 0)
  - as in vLLM, a second run with the same --seed finds its prompts in the server's prefix cache: change the seed, or
    flush the cache, between runs that are to be compared
  - --ignore-eos is on: the workload's lengths are what is generated (--no-ignore-eos leaves it to the model)
  - a stream that says an error, or breaks off without a finish reason, is a failed request
  - the client's CPU per token is reported; with --server-pid the server's too, compute threads apart from all else
Workloads (--dataset-name): random, prefix_repetition, generated-shared-prefix (SGLang's name for the same), and traces:
mooncake, azure-conv, azure-code, agents-taubench, agents-magagent; see bench/workloads.py.

Interrupted, it reports what has ended so far. Exit status: 0, 1 where every request failed, 2 where it could not begin,
130 where it was interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import datetime
import functools
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import generations
import numpy as np
import server_cpu
import serving_metrics
import workloads
from http_client import Client, HttpError

RANDOM: Final = ("random",)
SHARED: Final = ("prefix_repetition", "generated-shared-prefix")
TRACES: Final = ("mooncake", "azure-conv", "azure-code", "agents-taubench", "agents-magagent")
NUM_SHOWN_ERRORS: Final = 5
SAMPLING_OPTIONS: Final = ("temperature", "top_p", "top_k", "min_p")


def arrival_times(num: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Seconds after the start at which to send each of num requests, so that all are sent in num / rate seconds.

    Gamma-distributed gaps of shape `burstiness`; 1 is a Poisson process, less comes in bursts, infinity is even. As in
    vLLM the gaps are stretched to fill the time exactly. An infinite rate sends all at once.
    """
    if math.isinf(rate):
        return [0.0] * num
    gaps = np.full(num, 1.0) if math.isinf(burstiness) else rng.gamma(burstiness, 1.0, num)
    times = np.cumsum(gaps)
    return [float(t) for t in times * (num / rate / times[-1])]


async def run_load(
    todo: Sequence[tuple[float, generations.Generation]],
    client: Client,
    model: str,
    fields: Mapping[str, Any],
    max_concurrency: int | None,
    ended: Callable[[], None],
) -> float:
    """Send every generation at its time (seconds from now, ascending), at most max_concurrency at once; seconds until
    the last ended. `ended` is called after each. Cancelled, it cancels what still runs.
    """
    gate: Any = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()

    async def one(generation: generations.Generation) -> None:
        async with gate:
            await generation.run(client, model, fields)
        ended()

    begin = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for at, generation in todo:
            if (wait := begin + at - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            generation.arrival_time = time.perf_counter()
            tasks.create_task(one(generation))
    return time.perf_counter() - begin


@dataclasses.dataclass(frozen=True)
class Load:
    """What came of a load.

    ended          the generations that came to an end
    duration       seconds, first send to last end
    client_cpu_s   CPU seconds of this process meanwhile
    interrupted    it was cancelled before all had ended
    server_before, server_after    the server's CPU, where its processes were given
    """

    ended: list[generations.Generation]
    duration: float
    client_cpu_s: float
    interrupted: bool = False
    server_before: server_cpu.Snapshot | None = None
    server_after: server_cpu.Snapshot | None = None


async def measure_load(
    todo: Sequence[tuple[float, generations.Generation]],
    client: Client,
    model: str,
    fields: Mapping[str, Any],
    max_concurrency: int | None,
    server_pids: Sequence[int] | None = None,
    ended: Callable[[], None] = lambda: None,
) -> Load:
    """run_load, with what it cost. Cancelled, it returns what there is so far and says so."""
    gc.collect()
    gc.freeze()  # what is here is here to stay: no collection walks it during the run
    interrupted = False
    before = server_cpu.snapshot(server_pids) if server_pids else None
    cpu, begin = time.process_time(), time.perf_counter()
    try:
        duration = await run_load(todo, client, model, fields, max_concurrency, ended)
    except asyncio.CancelledError:  # Ctrl-C: asyncio.Runner cancels the main task
        interrupted = True
        duration = time.perf_counter() - begin
    cpu = time.process_time() - cpu
    after = server_cpu.snapshot(server_pids) if server_pids else None
    gc.unfreeze()
    done = [generation for _, generation in todo if generation.ended]
    return Load(done, duration, cpu, interrupted, before, after)


async def wait_ready(client: Client, timeout_s: float) -> bytes:
    """The answer of /v1/models, asked for until the server gives one. ConnectionError where it never does."""
    give_up = time.monotonic() + timeout_s
    while True:
        try:
            answer = await client.get("/v1/models")
            if answer.status == 200:
                return answer.content
            problem = f"HTTP {answer.status} {answer.reason}: {answer.content[:200].decode('utf-8', 'replace')}"
            if answer.status in (401, 403):
                raise ConnectionError(f"the server refuses: {problem}; give --api-key")
        except (OSError, HttpError) as error:
            if isinstance(error, ConnectionError) and "--api-key" in str(error):
                raise
            problem = str(error)
        if time.monotonic() >= give_up:
            raise ConnectionError(f"no server answered at /v1/models: {problem}")
        await asyncio.sleep(0.5)


# --- workload
def find_tokenizer(args: argparse.Namespace, card: Mapping[str, Any]) -> str | None:
    """Where the model's tokenizer is: --tokenizer, --model where it is a directory, or the directory that the server
    names in the model's card (`root`, as vLLM does); None where nobody says.
    """
    if args.tokenizer is not None:
        return str(args.tokenizer)
    places = (args.model, card.get("root"))
    return next((place for place in places if isinstance(place, str) and Path(place).is_dir()), None)


def load_tokenizer(name: str) -> Any:
    from sapwood.engine.tokenizer import Tokenizer

    return Tokenizer.load(name)


def make_requests(args: argparse.Namespace, tokenizer: Any, num_prompts: int, seed: int) -> list[workloads.Request]:
    """The workload that args describe. ValueError or FileNotFoundError where it cannot be made."""
    if tokenizer is None and args.vocab_size is None:
        raise ValueError(
            "the model's tokenizer is not known: give --tokenizer DIR, or --vocab-size N to send token ids up to N"
        )
    vocabulary = workloads.Vocabulary(tokenizer, args.vocab_size)
    form = args.prompt_format
    if form == "auto":
        form = "ids" if tokenizer is None or args.dataset_name in TRACES else "text"
    if not generations.BACKENDS[args.backend].sends_ids:
        form = "text"
    rng = np.random.default_rng(seed)
    name = args.dataset_name
    if name in RANDOM:
        return workloads.random_requests(
            vocabulary, rng, num_prompts=num_prompts, input_len=args.random_input_len, form=form,
            output_len=args.random_output_len, range_ratio=args.random_range_ratio, prefix_len=args.random_prefix_len,
        )  # fmt: skip
    if name in SHARED:
        if name == "generated-shared-prefix":
            groups, each = args.gsp_num_groups, args.gsp_prompts_per_group
            lens = args.gsp_system_prompt_len, args.gsp_question_len, args.gsp_output_len
        else:
            groups = args.prefix_repetition_num_prefixes
            each = num_prompts // groups
            lens = (
                args.prefix_repetition_prefix_len,
                args.prefix_repetition_suffix_len,
                args.prefix_repetition_output_len,
            )
        if each < 1:
            raise ValueError(f"--num-prompts ({num_prompts}) must be at least the number of prefixes ({groups})")
        prefix_len, suffix_len, output_len = lens
        return workloads.shared_prefix_requests(
            vocabulary, rng, num_groups=groups, prompts_per_group=each, prefix_len=prefix_len, suffix_len=suffix_len,
            output_len=output_len, form=form,
        )  # fmt: skip
    options = workloads.TraceOptions(num_prompts, args.trace_scale, args.trace_speed, args.max_model_len)
    if name == "mooncake":
        return workloads.mooncake_requests(vocabulary, options, seed=seed, form=form)
    if name.startswith("azure"):
        return workloads.azure_requests(vocabulary, options, name.removeprefix("azure-"), seed=seed, form=form)
    return workloads.agent_requests(vocabulary, options, name.removeprefix("agents-"))


def warmup_requests(args: argparse.Namespace, tokenizer: Any) -> list[workloads.Request]:
    """Short random prompts that no run of any seed sends."""
    vocabulary = workloads.Vocabulary(tokenizer, args.vocab_size)
    text = tokenizer is not None and (args.prompt_format != "ids" or not generations.BACKENDS[args.backend].sends_ids)
    rng = np.random.default_rng((args.seed, 1))
    return workloads.random_requests(
        vocabulary, rng, num_prompts=args.num_warmups, input_len=64, output_len=16, form="text" if text else "ids"
    )


# --- a run
def request_fields(args: argparse.Namespace) -> dict[str, Any]:
    """What every request carries beside its prompt and length."""
    fields = {name: getattr(args, name) for name in SAMPLING_OPTIONS if getattr(args, name) is not None}
    if args.ignore_eos:
        fields["ignore_eos"] = True
    return fields | (args.extra_body or {})


@contextlib.contextmanager
def progress(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; yields what to call after each request."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Two redraws a second: each costs a millisecond of a core that the server wants.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as bar:
        task = bar.add_task("requests", total=total)
        yield functools.partial(bar.advance, task)


async def serve_load(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The result of the run, and whether it was interrupted. Raises where it cannot begin: ValueError, OSError, what
    loading a tokenizer raises.
    """
    headers = dict(args.header)
    if key := args.api_key or os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    client = Client(args.base_url or f"http://{args.host}:{args.port}", headers)
    try:
        return await _serve_load(args, client)
    finally:
        client.close()
        await asyncio.sleep(0)  # connections end in the loop's next turn


async def _serve_load(args: argparse.Namespace, client: Client) -> tuple[dict[str, Any], bool]:
    card: Mapping[str, Any] = {}
    if args.model is None or args.ready_check_timeout_sec > 0:
        cards = generations.model_cards(await wait_ready(client, args.ready_check_timeout_sec))
        wanted = args.served_model_name or args.model
        card = next((card for card in cards if wanted in (None, card["id"])), {})
        if wanted is None and not card:
            raise ValueError("/v1/models names no model: give --model")
    model = args.served_model_name or args.model or card["id"]
    tokenizer_id = find_tokenizer(args, card)
    tokenizer = None if tokenizer_id is None else load_tokenizer(tokenizer_id)
    requests = make_requests(args, tokenizer, args.num_prompts, args.seed)
    fields = request_fields(args)
    backend = generations.BACKENDS[args.backend]

    if args.num_warmups:
        warmups = [(0.0, backend(request)) for request in warmup_requests(args, tokenizer)]
        await run_load(warmups, client, model, fields, args.max_concurrency, lambda: None)
        if all(generation.error for _, generation in warmups):
            raise ConnectionError(f"every warm-up request failed: {warmups[0][1].error}")

    if args.dataset_name in TRACES and args.self_timed:
        times = [request.arrival_s or 0.0 for request in requests]
    else:
        times = arrival_times(len(requests), args.request_rate, args.burstiness, np.random.default_rng((args.seed, 2)))
    todo = [(at, backend(request)) for at, request in zip(times, requests, strict=True)]
    with progress(len(todo), sys.stderr.isatty() and not args.disable_tqdm) as ended:
        load = await measure_load(todo, client, model, fields, args.max_concurrency, args.server_pid, ended)

    count = (lambda text: len(tokenizer.encode(text, add_special_tokens=False))) if tokenizer is not None else None
    summary = serving_metrics.summarize(
        load.ended, load.duration, goodput=args.goodput, metrics=args.percentile_metrics,
        percentiles=args.metric_percentiles, count_tokens=count,
    )  # fmt: skip
    num_tokens = summary["total_output_tokens"]
    before, after = load.server_before, load.server_after
    result = {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "model_id": model,
        "tokenizer_id": tokenizer_id,
        "num_prompts": len(requests),
        **args.metadata,
        "dataset_name": args.dataset_name,
        "seed": args.seed,
        "request_rate": args.request_rate if math.isfinite(args.request_rate) else "inf",
        "burstiness": args.burstiness if math.isfinite(args.burstiness) else "inf",
        "max_concurrency": args.max_concurrency,
        "interrupted": load.interrupted,
        **summary,
        "client_cpu_us_per_token": 1e6 * load.client_cpu_s / num_tokens if num_tokens else None,
        "server_cpu": server_cpu.used(before, after, load.duration, num_tokens) if before and after else None,
    }
    return result, load.interrupted


# --- report
def report(args: argparse.Namespace, result: Mapping[str, Any], interrupted: bool) -> None:
    """Print the table, with what is wrong first."""
    errors = [error for error in result["errors"] if error]
    if errors:
        print(f"{len(errors)} requests failed; the first {min(len(errors), NUM_SHOWN_ERRORS)}:", file=sys.stderr)
        for error in errors[:NUM_SHOWN_ERRORS]:
            print(f"  {error}", file=sys.stderr)
    if interrupted:
        num_ended = result["completed"] + result["failed"]
        print(f"interrupted: {num_ended} of {result['num_prompts']} requests had ended", file=sys.stderr)
    cpu = result["server_cpu"]
    if cpu and not cpu["named"]:
        print(
            "the server's threads have no names: all but its first are taken for compute threads below", file=sys.stderr
        )
    print(serving_metrics.table(result, args.percentile_metrics, args.metric_percentiles))


def save(args: argparse.Namespace, result: Mapping[str, Any]) -> Path:
    """Write the result, under vLLM's name where none is given; its path."""
    name = args.result_filename
    if name is None:
        limit = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
        model = result["model_id"].split("/")[-1]
        label = args.label or args.backend
        name = f"{label}-{args.request_rate}qps{limit}-{model}-{result['date']}.json"
    folder = Path(args.result_dir or ".")
    folder.mkdir(parents=True, exist_ok=True)
    kept = dict(result) if args.save_detailed else {k: v for k, v in result.items() if k not in serving_metrics.DETAILS}
    path = folder / name
    with path.open("a" if args.append_result else "w", encoding="utf-8") as file:
        if file.tell():
            file.write("\n")
        json.dump(kept, file)
    return path


# --- command line
def _key_value(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key.strip(), value.strip()


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _metric_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in serving_metrics.METRICS]:
        known = ",".join(serving_metrics.METRICS)
        raise argparse.ArgumentTypeError(f"unknown metric {unknown[0]!r}; known: {known}")
    return names


def _percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"expected numbers from 0 to 100, comma-separated, got {text!r}")
    return values


def _number(kind: Callable[[str], Any], least: float, *, open_end: bool = False) -> Callable[[str], Any]:
    """An argparse type: a number of at least `least`, or above it where open_end."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > least if open_end else value >= least):
            what = f"a number above {least:g}" if open_end else f"a number of at least {least:g}"
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    count, positive, rate = _number(int, 0), _number(int, 1), _number(float, 0, open_end=True)
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    group = out.add_argument_group("server")
    add = group.add_argument
    add("--backend", choices=sorted(generations.BACKENDS), default="openai")
    add("--base-url", help="like http://127.0.0.1:30000; instead of --host and --port")
    add("--host", default="127.0.0.1")
    add("--port", type=positive, default=30000)
    add("--api-key", help="bearer token; default: OPENAI_API_KEY of the environment")
    add("--header", type=_key_value, action="append", default=[], metavar="KEY=VALUE")
    add("--model", help="default: the first of /v1/models")
    add("--served-model-name", help="the name to send where it is not --model's")
    add("--tokenizer", help="directory or file of the model's tokenizer; default: --model, or what the server names")
    add("--vocab-size", type=positive, help="without a tokenizer: send token ids below this")
    add("--ready-check-timeout-sec", type=_number(float, 0), default=60.0, help="wait so long for the server")
    add("--server-pid", type=positive, nargs="+", help="the server's processes: report their CPU")

    group = out.add_argument_group("load")
    add = group.add_argument
    add("--num-prompts", type=positive, default=1000)
    add("--request-rate", type=rate, default=math.inf, help="requests a second; inf (default): all at once")
    add("--burstiness", type=rate, default=1.0, help="shape of the gaps' gamma distribution; 1 (default): Poisson")
    add("--max-concurrency", type=positive, help="requests at most at once; default: no limit")
    add("--num-warmups", type=count, default=0)
    add("--seed", type=count, default=0)
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True)
    for name in SAMPLING_OPTIONS:
        add("--" + name.replace("_", "-"), type=int if name == "top_k" else float, help="default: the server's")
    add("--extra-body", type=_json_object, metavar="JSON", help="further fields of every request")

    group = out.add_argument_group("workload")
    add = group.add_argument
    add("--dataset-name", choices=(*RANDOM, *SHARED, *TRACES), default="random")
    add("--prompt-format", choices=("auto", "text", "ids"), default="auto", help="auto: ids for traces, else text")
    add("--random-input-len", type=positive, default=1024)
    add("--random-output-len", type=positive, default=128)
    add("--random-range-ratio", type=_number(float, 0), default=0.0, help="lengths are within 1 +- this of the mean")
    add("--random-prefix-len", type=count, default=0, help="tokens in front that all prompts share")
    add("--prefix-repetition-num-prefixes", type=positive, default=10)
    add("--prefix-repetition-prefix-len", type=positive, default=256)
    add("--prefix-repetition-suffix-len", type=positive, default=256)
    add("--prefix-repetition-output-len", type=positive, default=128)
    add("--gsp-num-groups", type=positive, default=64)
    add("--gsp-prompts-per-group", type=positive, default=16)
    add("--gsp-system-prompt-len", type=positive, default=2048)
    add("--gsp-question-len", type=positive, default=128)
    add("--gsp-output-len", type=positive, default=256)
    add("--trace-scale", type=rate, default=1.0, help="multiply the trace's lengths")
    add("--trace-speed", type=rate, default=1.0, help="divide the trace's arrival times")
    add("--max-model-len", type=positive, help="leave out a trace's requests with more tokens, output included")
    add("--self-timed", action=argparse.BooleanOptionalAction, default=True,
        help="send a trace's requests at its times; --no-self-timed: as --request-rate says")  # fmt: skip

    group = out.add_argument_group("result")
    add = group.add_argument
    add("--goodput", nargs="+", default=[], metavar="NAME:MS", help="limits, like ttft:500 tpot:50 e2el:5000")
    add("--percentile-metrics", type=_metric_names, default=list(serving_metrics.METRICS))
    add("--metric-percentiles", type=_percentiles, default=[99.0])
    add("--disable-tqdm", action="store_true", help="no progress bar (there is one on a terminal only)")
    add("--label")
    add("--metadata", type=_key_value, nargs="+", default=[], metavar="KEY=VALUE", help="to be saved with the result")
    add("--save-result", action="store_true")
    add("--save-detailed", action="store_true", help="with every request's lengths, times, text and error")
    add("--append-result", action="store_true", help="save to the end of the file, as one more line")
    add("--result-dir")
    add("--result-filename")
    add("--json", action="store_true", help="print the result as JSON instead of a table")
    return out


def main() -> int:
    command = parser()
    args = command.parse_args()
    args.metadata = dict(args.metadata)
    try:
        args.goodput = serving_metrics.parse_goodput(args.goodput)
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result, interrupted = runner.run(serve_load(args))
    except (ValueError, OSError, HttpError) as error:
        print(f"serving.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the run began
        return 130
    if args.json:
        details = () if args.save_detailed else serving_metrics.DETAILS
        print(json.dumps({name: value for name, value in result.items() if name not in details}))
    else:
        report(args, result, interrupted)
    if args.save_result or args.append_result:
        print(f"saved to {save(args, result)}", file=sys.stderr)
    if interrupted:
        return 130
    return 1 if result["completed"] == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
