"""Sapwood beside its peers: every engine on the same checkpoint, asked the same, by the same client, in turn.

    python bench/make_model.py qwen3-0.6b-32k /tmp/0.6b
    python bench/compare.py /tmp/0.6b --peers llama.cpp,vllm,openvino,hf --repeats 5

Each peer is installed in an environment of its own under --work-dir, which keeps it, and the weights converted for it,
for later runs; --env NAME=DIR names one that is there already. An engine is a peer with weights of one form, like
vllm:w8a8; where the form that stands for a precision can be chosen, all candidates are measured (--engines picks some).

A round starts each engine once, alone and with all cores, warms it up, takes every measure once, and ends it; prompts
are token ids, drawn anew in each round, the same for every engine. Greedy, to the asked length, tokens counted by the
server's usage. --repeats rounds alternate the engines. Measures:

    decode           1 stream: 1/TPOT of 32 tokens in, 64 out; 16 streams: tokens a second while all 16 generate
    prefill          1,024 new tokens / TTFT
    closed-loop      output tokens a second of 16 requests at once, 128 in, 128 out
    shared-prefix    the same of 16 requests with a prefix of 1,024 tokens in common, 32 own, 16 out; first unknown to
                     the server (cold), then with the same prefix and new own tokens (warm)
    start            seconds from the process's start until it answers, and until a first token is there

Results are in --out (default: in the work directory): compare.json, compare.md, and compare.png where matplotlib is
there. They are saved after each engine's turn; a later run with the same --out measures what is missing of --repeats
rounds, so that an interrupted run, more rounds, another engine or measure continue it. --fresh measures the chosen
engines again, --fresh noisy their turns in which other processes used more than a tenth of the CPUs.

Exit status: 0, 1 where an engine failed (the others' results stand), 2 where it could not begin, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import compare_limits
import compare_report
import machine
import numpy as np
import peer_process
import peer_weights
import peers
import serving
import workloads
from peer_process import Running
from peer_workspace import DEFAULT_ROOT, PeerError, Workspace

STREAMS: Final = 16
CONTEXT: Final = 2048
PROMPT_LEN: Final = 1024
DECODE_LENS: Final = (32, 64)  # in, out
DECODE_CONTEXT: Final = DECODE_LENS[0] + DECODE_LENS[1] // 2
# How many requests one after the other give a figure of one stream.
NUM_SINGLE: Final = 2
# How long others must be quiet for --wait-quiet.
QUIET_S: Final = 3.0


class Prompts:
    """A round's requests: those of the same `which` are the same for every engine, and no others' of any round."""

    def __init__(self, vocabulary: workloads.Vocabulary, seed: int, round_: int) -> None:
        self._vocabulary = vocabulary
        self._seed = (seed, round_)

    def random(self, which: int, num: int, input_len: int, output_len: int, prefix_len: int = 0) -> list[Any]:
        rng = np.random.default_rng((*self._seed, which))
        return workloads.random_requests(
            self._vocabulary, rng, num_prompts=num, input_len=input_len, output_len=output_len, prefix_len=prefix_len,
            form="ids",
        )  # fmt: skip


# --- figures
def stream_rate(load: serving.Load) -> float:
    """Tokens a second of one stream after its first token, 1/TPOT: the requests' median."""
    return statistics.median(
        ((g.output_tokens or 0) - 1) / (g.latency - g.ttft) for g in load.ended if g.latency > g.ttft
    )


def joint_rate(load: serving.Load) -> float:
    """Tokens a second of all streams while all of them generate: from the last's first token to the first's last.

    A chunk counts as its request's tokens over its chunks. PeerError where there was no such time.
    """
    begin = max(g.chunk_times[0] for g in load.ended)
    end = min(g.chunk_times[-1] for g in load.ended)
    if end <= begin:
        raise PeerError(f"the {len(load.ended)} streams never generated all at once; the engine ran fewer together")
    tokens = sum(
        sum(begin < t <= end for t in g.chunk_times) * (g.output_tokens or 0) / len(g.chunk_times) for g in load.ended
    )
    return tokens / (end - begin)


def prefill_rate(load: serving.Load) -> float:
    """Prompt tokens a second until the first token: the requests' median."""
    return statistics.median(g.request.prompt_len / g.ttft for g in load.ended)


def output_tokens(load: serving.Load) -> int:
    return sum(g.output_tokens or 0 for g in load.ended)


def output_rate(load: serving.Load) -> float:
    return output_tokens(load) / load.duration


# --- measures
Values = dict[str, float]
Ask = Callable[[Sequence[workloads.Request], int], serving.Load]


def measure_decode(ask: Ask, prompts: Prompts) -> Values:
    one = ask(prompts.random(0, NUM_SINGLE, *DECODE_LENS), 1)
    return {
        "decode-1": stream_rate(one),
        f"decode-{STREAMS}": joint_rate(ask(prompts.random(1, STREAMS, *DECODE_LENS), STREAMS)),
    }


def measure_prefill(ask: Ask, prompts: Prompts) -> Values:
    return {"prefill": prefill_rate(ask(prompts.random(2, NUM_SINGLE, PROMPT_LEN, 1), 1))}


def measure_closed_loop(ask: Ask, prompts: Prompts) -> Values:
    load = ask(prompts.random(3, STREAMS, 128, 128), STREAMS)
    return {"closed-loop": output_rate(load), "client-cpu": 1e6 * load.client_cpu_s / output_tokens(load)}


def measure_shared_prefix(ask: Ask, prompts: Prompts) -> Values:
    requests = prompts.random(4, 2 * STREAMS, 32, 16, prefix_len=PROMPT_LEN)
    cold, warm = (ask(half, STREAMS) for half in (requests[:STREAMS], requests[STREAMS:]))
    return {"shared-cold": output_rate(cold), "shared-warm": output_rate(warm)}


def warm_up(ask: Ask, prompts: Prompts) -> None:
    """What the measures do, once and shorter: caches are allocated, shapes compiled."""
    ask(prompts.random(5, 1, PROMPT_LEN, 4), 1)
    ask(prompts.random(6, STREAMS, 32, 8), STREAMS)


MEASURES: Final[Mapping[str, Callable[[Ask, Prompts], Values]]] = MappingProxyType(
    {
        "decode": measure_decode,
        "prefill": measure_prefill,
        "closed-loop": measure_closed_loop,
        "shared-prefix": measure_shared_prefix,
    }
)
START: Final = "start"
# measure -> the figures that it gives
GIVES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "decode": ("decode-1", f"decode-{STREAMS}"),
        "prefill": ("prefill",),
        "closed-loop": ("closed-loop", "client-cpu"),
        "shared-prefix": ("shared-cold", "shared-warm"),
        START: ("ready", "first-token"),
    }
)


# --- results
class Results:
    """compare.json: what was measured so far, saved after each change.

    identity   of checkpoint and machine; a file of another identity is refused
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path = path
        self.data: dict[str, Any] = {
            "identity": dict(identity),
            "rounds": [],
            "ceilings": [],
            "failures": {},
            "about": {},
        }
        if path.exists():
            found = json.loads(path.read_bytes())
            if found["identity"] != self.data["identity"]:
                raise ValueError(f"{path} is of {found['identity']}, not of {dict(identity)}; name another --out")
            self.data = found

    def save(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1))
        partial.replace(self._path)

    def forget(self, engine: str, above_percent: float) -> None:
        """An engine's turns in which others used more of the CPUs than that."""
        self.data["rounds"] = [
            entry
            for entry in self.data["rounds"]
            if entry["engine"] != engine or entry["others_percent"] <= above_percent
        ]

    def values(self, engine: str, round_: int) -> Values:
        """An engine's figures of a round, to be added to."""
        for entry in self.data["rounds"]:
            if (entry["engine"], entry["round"]) == (engine, round_):
                found: Values = entry["values"]
                return found
        return {}

    def add(self, engine: str, round_: int, values: Mapping[str, float], others_percent: float) -> None:
        date = datetime.datetime.now().isoformat(timespec="seconds")
        entry = {"engine": engine, "round": round_, "date": date, "others_percent": others_percent}
        entry["values"] = {**self.values(engine, round_), **values}
        rounds = self.data["rounds"]
        rounds[:] = [old for old in rounds if (old["engine"], old["round"]) != (engine, round_)] + [entry]
        self.save()

    def fail(self, engine: str, error: Exception) -> None:
        self.data["failures"][engine] = str(error)
        self.save()


# --- running
@dataclasses.dataclass(frozen=True)
class Plan:
    """What every engine is measured with."""

    work: Workspace
    checkpoint: Path
    setup: peers.Setup
    measures: Sequence[str]
    vocabulary: workloads.Vocabulary
    seed: int
    start_timeout_s: float
    measure_timeout_s: float
    lock: Path | None
    quiet_s: float


def start(peer: peers.Started, engine: peers.Engine, plan: Plan) -> Running:
    """The engine's process, not yet started. PeerError, ValueError or OSError where its weights cannot be made."""
    weights = peer.weights(plan.work, plan.checkpoint, engine.form)
    port = peer_process.free_port()
    command = peer.command(plan.work, weights, engine.form, plan.setup, port)
    variables, log = peer.variables(plan.setup), plan.work.log(engine.name.replace(":", "-"))
    if peer.in_process:
        return peer_process.Worker(command, variables, log)
    return peer_process.Server(command, variables, log, port)


def missing_measures(engine: peers.Engine, plan: Plan, values: Mapping[str, float]) -> list[str]:
    """The plan's measures of which this engine has not all figures, and can have them."""
    return [
        measure
        for measure in plan.measures
        if measure in engine.peer.measures and not set(GIVES[measure]) <= set(values)
    ]


def measure_engine(engine: peers.Engine, plan: Plan, round_: int, results: Results) -> None:
    """One engine's turn in a round. What it gave before it failed is kept; PeerError where it did."""
    todo = missing_measures(engine, plan, results.values(engine.name, round_))
    if not todo:
        return
    if isinstance(engine.peer, peers.SelfMeasuring):
        measure_itself(engine.peer, engine, plan, round_, todo, results)
    if isinstance(engine.peer, peers.Started):
        measure_asked(engine.peer, engine, plan, round_, todo, results)


def measure_itself(
    peer: peers.SelfMeasuring, engine: peers.Engine, plan: Plan, round_: int, todo: Sequence[str], results: Results
) -> None:
    """measure_engine of one that has a program for it."""
    weights = peer.weights(plan.work, plan.checkpoint, engine.form)
    values: Values = {}
    usage = peer_process.Usage()
    for measure in todo:
        with alone(plan), usage.counting(peer_process.children_cpu_seconds):
            say(f"  {engine.name}: {measure}")
            values |= peer.figures(plan.work, weights, measure, plan.setup, plan.measure_timeout_s)
    results.add(engine.name, round_, values, usage.others_percent)
    say_figures(engine, round_, values, usage)


def measure_asked(
    peer: peers.Started, engine: peers.Engine, plan: Plan, round_: int, todo: Sequence[str], results: Results
) -> None:
    """measure_engine of one that we start and ask."""
    prompts = Prompts(plan.vocabulary, plan.seed, round_)
    values: Values = {}
    with contextlib.ExitStack() as stack:
        starting = stack.enter_context(contextlib.ExitStack())
        if START in todo:
            starting.enter_context(alone(plan))
        running = stack.enter_context(start(peer, engine, plan))

        def ask(requests: Sequence[workloads.Request], max_concurrency: int) -> serving.Load:
            return running.generate(requests, max_concurrency, plan.measure_timeout_s)

        try:
            ready_s = running.wait_ready(plan.start_timeout_s)
            first = ask(prompts.random(7, 1, 32, 1), 1).ended[0]
            if START in todo:
                values |= {"ready": ready_s, "first-token": first.chunk_times[0] - running.begin}
            starting.close()
            if todo != [START]:
                warm_up(ask, prompts)
                running.usage = peer_process.Usage()
            for measure in todo:
                if measure != START:
                    with alone(plan):
                        say(f"  {engine.name}: {measure}")
                        values |= MEASURES[measure](ask, prompts)
        finally:
            if values:
                results.add(engine.name, round_, values, running.usage.others_percent)
    say_figures(engine, round_, values, running.usage)


def wait_quiet(seconds: float) -> None:
    """Wait until others use little of the CPUs, so many seconds at most."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        usage = peer_process.Usage()
        with usage.counting(lambda: 0.0):
            time.sleep(min(QUIET_S, seconds))
        if usage.others_percent <= compare_report.NOISY_PERCENT:
            return


@contextlib.contextmanager
def alone(plan: Plan) -> Iterator[None]:
    """Hold the lock's file, as flock(1) does: whoever else measures on this machine waits. It is held for one measure
    at a time, a start that is measured included, so that others wait minutes at most."""
    wait_quiet(plan.quiet_s)
    if plan.lock is None:
        yield
        return
    with plan.lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure_ceilings() -> dict[str, float | None]:
    """The machine's rates with all threads, by kind: measured now, not once a process, for its neighbours change."""
    found = machine.ceilings.__wrapped__()
    return {kind: found.median(kind) for kind in compare_limits.CEILINGS}


def prepare(engines: Sequence[peers.Engine], plan: Plan, results: Results) -> list[peers.Engine]:
    """Install the peers and make their weights; the engines that can be measured."""
    ready: list[peers.Engine] = []
    for engine in engines:
        try:
            say(f"{engine.name}: preparing")
            engine.peer.install(plan.work)
            engine.peer.weights(plan.work, plan.checkpoint, engine.form)
        except (PeerError, ValueError, OSError) as error:
            report_failure(engine, error, results)
        else:
            results.data["about"][engine.name] = {
                "precision": engine.precision, "version": engine.peer.version(plan.work),
                "in_process": engine.peer.in_process,
            }  # fmt: skip
            ready.append(engine)
    return ready


def measure_rounds(engines: Sequence[peers.Engine], plan: Plan, results: Results, repeats: int) -> bool:
    """All rounds, engine by engine in each; whether none failed. One that fails has no further turns."""
    going = list(engines)
    for round_ in range(repeats):
        turn = [e for e in going if missing_measures(e, plan, results.values(e.name, round_))]
        if turn:
            with alone(plan):
                results.data["ceilings"].append({"round": round_, **measure_ceilings()})
        for engine in turn:
            try:
                measure_engine(engine, plan, round_, results)
            except (PeerError, ValueError, OSError) as error:
                report_failure(engine, error, results)
                going.remove(engine)
            else:
                results.data["failures"].pop(engine.name, None)
    results.save()
    return len(going) == len(engines)


def say_figures(engine: peers.Engine, round_: int, values: Mapping[str, float], usage: peer_process.Usage) -> None:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    say(f"round {round_ + 1}: {engine.name}: {figures}; others used {usage.others_percent:.0f} % of the CPUs")


def report_failure(engine: peers.Engine, error: Exception, results: Results) -> None:
    say(f"{engine.name} FAILED: {error}")
    results.fail(engine.name, error)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_report(results: Results, plan: Plan, out: Path) -> None:
    """Print the table; write it as Markdown, and the picture where it can be drawn."""
    ceilings = {
        kind: statistics.median(known) if (known := [c[kind] for c in results.data["ceilings"] if c[kind]]) else None
        for kind in compare_limits.CEILINGS
    }
    limits = {
        precision: compare_limits.limits(plan.checkpoint, ceilings, precision, STREAMS, PROMPT_LEN, DECODE_CONTEXT)
        for precision in peers.PRECISIONS
    }
    print(compare_report.table(results.data, ceilings, limits, markdown=False))
    (out / "compare.md").write_text(compare_report.table(results.data, ceilings, limits, markdown=True) + "\n")
    try:
        compare_report.draw(results.data, limits, out / "compare.png")
    except ImportError:
        say("compare.png is not drawn: matplotlib is not installed; `pip install matplotlib` and run again")


# --- command line
def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: comma-separated names, each known."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown name {unknown[0]!r}; known: {','.join(known)}")
        return names

    return parse


def environment(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not separator or name not in peers.PEERS or not folder:
        raise argparse.ArgumentTypeError(f"expected PEER=DIR with a peer of {','.join(peers.PEERS)}, got {text!r}")
    return name, Path(folder).absolute()


def at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    all_peers = [name for name in peers.PEERS if name != "sapwood"]
    every = peers.engines(list(peers.PEERS), peers.PRECISIONS, True)
    every += peers.engines(list(peers.PEERS), peers.PRECISIONS, False)
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = out.add_argument
    add("checkpoint", type=Path, help="directory in HF format, 16-bit weights")
    add("--peers", type=names_of(all_peers), default=all_peers, help=f"default: {','.join(all_peers)}")
    add("--precisions", type=names_of(peers.PRECISIONS), default=list(peers.PRECISIONS))
    add("--engines", type=names_of(sorted({engine.name for engine in every})), metavar="NAME,NAME",
        help="these alone, like vllm:w8a8,sapwood:int8; default: all of the peers, and Sapwood")  # fmt: skip
    add("--measures", type=names_of(list(GIVES)), default=list(GIVES), help=f"default: {','.join(GIVES)}")
    add("--repeats", type=at_least_one, default=5, help="rounds (default 5)")
    add("--threads", type=at_least_one, default=machine.num_usable_cpus(), help="default: all usable CPUs")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--work-dir", type=Path, default=DEFAULT_ROOT)
    add("--env", type=environment, action="append", default=[], metavar="PEER=DIR",
        help="a virtual environment that has the peer; llama.cpp: a folder laid out as this makes it")  # fmt: skip
    add("--out", type=Path, help="folder of the results; default: results/CHECKPOINT in the work directory")
    add("--fresh", nargs="?", const="all", choices=("all", "noisy"),
        help="forget these engines' earlier turns; noisy: those alone in which others used the CPUs")  # fmt: skip
    add("--install-only", action="store_true", help="install, convert weights, measure nothing")
    add("--report-only", action="store_true", help="measure nothing, report what is there")
    add("--lock", type=Path, metavar="FILE", help="hold this file's lock (flock) while measuring")
    add("--wait-quiet", type=float, default=0.0, metavar="S",
        help="before each measure, wait at most so long until others use little of the CPUs (default 0)")  # fmt: skip
    add("--start-timeout", type=float, default=900.0, metavar="S", help="seconds an engine may take to start")
    add("--measure-timeout", type=float, default=900.0, metavar="S", help="seconds a measure may take")
    return out


def chosen_engines(args: argparse.Namespace) -> list[peers.Engine]:
    """The engines that args ask for."""
    has_bf16 = peers.cpu_has_bf16()
    if args.engines is None:
        return peers.engines(["sapwood", *args.peers], args.precisions, has_bf16)
    everything = peers.engines(list(peers.PEERS), peers.PRECISIONS, False)
    everything += peers.engines(list(peers.PEERS), peers.PRECISIONS, True)
    return [next(engine for engine in everything if engine.name == name) for name in args.engines]


def run(args: argparse.Namespace) -> int:
    work = Workspace(args.work_dir, dict(args.env))
    checkpoint = args.checkpoint.absolute()
    kept_as = work.weights(checkpoint).name
    out = args.out or work.root / "results" / kept_as
    out.mkdir(parents=True, exist_ok=True)
    kv_bytes = STREAMS * CONTEXT * peer_weights.kv_bytes_per_token(checkpoint)
    plan = Plan(
        work, checkpoint, peers.Setup(args.threads, STREAMS, CONTEXT, kv_bytes), args.measures,
        workloads.Vocabulary(serving.load_tokenizer(str(checkpoint))), args.seed, args.start_timeout,
        args.measure_timeout, args.lock, args.wait_quiet,
    )  # fmt: skip
    identity = {"checkpoint": kept_as, "cpu": machine.cpu_name(), "threads": args.threads}
    results = Results(out / "compare.json", identity)
    all_well = True
    if not args.report_only:
        engines = chosen_engines(args)
        if args.fresh:
            for engine in engines:
                results.forget(engine.name, compare_report.NOISY_PERCENT if args.fresh == "noisy" else -1.0)
        ready = prepare(engines, plan, results)
        all_well = len(ready) == len(engines)
        if not args.install_only:
            try:
                all_well = measure_rounds(ready, plan, results, args.repeats) and all_well
            except KeyboardInterrupt:
                write_report(results, plan, out)
                raise
    if not args.install_only:
        write_report(results, plan, out)
    return 0 if all_well else 1


def main() -> int:
    command = parser()
    args = command.parse_args()
    # Ended from outside it ends the engines as after Ctrl-C, which a shell lets its background jobs ignore.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
