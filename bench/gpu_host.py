"""The cases of `bench/gpu_suite.py --stage host`: what a step costs the host, and how soon the host hears of its end.

    completion   a step of 200 us, then its report: from the moment the device is done (an event, by the host's clock)
                 to the callback in the loop, for asyncio and uvloop, by host function and by event, as
                 program/cuda_completion.py does it; and whether kernels of another stream wait for host functions
    copies       the plan's way to the device and the result's way back
    steps        a 4-layer model of Llama-3.1-8B's shape: a captured decode graph against the same launches one by one;
                 then steps of 1, 64 and 256 decodes: the packer, the launches, all of the executor's thread
    whole        the graphs and launches of all 32 layers

The rule they decide: host functions report steps if the callback's p99 is below
300 us and no other stream is held up by them; else the thread that waits for events does.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

import gpu_steps
import numpy as np
import torch
from gpu_steps import Bench, Case, Row, row

P99_LIMIT_US: Final = 300.0
# Longer than without any report by more than this: the other stream has been held up.
STALL_LIMIT: Final = 0.03
STEP_US: Final = 200.0
BUCKETS: Final = (1, 64, 256)


# --- Completion -----------------------------------------------------------------------------------------------
def completion(bench: Bench) -> None:
    devices = bench.devices()
    loops = {"asyncio": asyncio.new_event_loop}
    if gpu_steps.has("uvloop"):
        import uvloop

        loops["uvloop"] = uvloop.new_event_loop
    for mode in ("host_function", "event"):
        for loop, factory in loops.items():
            name = f"{mode}, {loop}"
            bench.measure(name, partial(report_latency, bench, devices, mode, name, factory))
    if not gpu_steps.has("uvloop"):
        bench.tell({"name": "uvloop", "skipped": "uvloop is not installed"})
    bench.measure("another stream", partial(other_stream, bench, devices))
    bench.measure("decision", partial(decision, bench))


class Steps:
    """Steps of STEP_US one after the other, each launched by the callback of the one before."""

    def __init__(self, bench: Bench, devices: Any, mode: str, go_on: Callable[[int], bool]) -> None:
        """go_on: whether to launch another one after so many."""
        from sapwood.program.cuda_completion import Completion

        self._devices = devices
        self._go_on = go_on
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        stream = devices.stream
        self._completion = Completion(
            bench.library,
            None if stream is None else stream.cuda_stream,
            self._fd,
            lambda: _blocking_event(stream),
            mode=mode,  # type: ignore[arg-type]
        )
        self._result = torch.zeros(1024, dtype=torch.uint8, device=bench.device)
        self._host = torch.zeros(1024, dtype=torch.uint8, pin_memory=not bench.emulated)
        self.reports: list[tuple[Any, int, int]] = []  # the device's mark, done_ns, the callback's time
        self._running: Any = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._over = loop.create_future()
        loop.add_reader(self._fd, self._called)
        self._launch()
        await self._over
        loop.remove_reader(self._fd)
        self._completion.close()
        self._devices.wait()
        os.close(self._fd)

    def _launch(self) -> None:
        ticket = self._completion.ticket()
        self._devices.busy(STEP_US)
        with self._devices.on(self._devices.stream):
            self._host.copy_(self._result, non_blocking=True)
        self._running = ticket, self._devices.mark(self._devices.stream)
        self._completion.watch(ticket)

    def _called(self) -> None:
        now = time.monotonic_ns()
        os.eventfd_read(self._fd)
        ticket, mark = self._running
        if not ticket.done_ns:
            return
        if ticket.error:
            self._over.set_exception(RuntimeError(ticket.error))
            return
        self.reports.append((mark, ticket.done_ns, now))
        if self._go_on(len(self.reports)):
            self._launch()
        else:
            self._over.set_result(None)


class _NeverBehind:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


def _blocking_event(stream: Any) -> Any:
    if stream is None:
        return _NeverBehind()
    return stream.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]


def report_latency(bench: Bench, devices: Any, mode: str, name: str, loop: Any) -> Iterator[Row]:
    num_steps, warm_up = bench.pick((1500, 100), (30, 3))
    devices.calibrate()
    steps = Steps(bench, devices, mode, lambda done: done < warm_up + num_steps)
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(steps.run())
    devices.calibrate()
    told = [(done_ns - devices.host_ns(mark), now - devices.host_ns(mark)) for mark, done_ns, now in steps.reports]
    report, callback = ([1e-3 * ns for ns in column] for column in zip(*told[warm_up:], strict=True))
    target = {"at_most": P99_LIMIT_US} if mode == "host_function" else {}
    p50, p99 = (gpu_steps.percentile(callback, share) for share in (0.5, 0.99))
    report_p50, report_p99 = (gpu_steps.percentile(report, share) for share in (0.5, 0.99))
    yield row(
        name, p99, "us p99", **target, p50_us=p50, max_us=max(callback), report_p50_us=report_p50,
        report_p99_us=report_p99, steps=num_steps,
        note=f"p50 {p50:.0f}, most {max(callback):.0f}; until reported p50 {report_p50:.0f}, p99 {report_p99:.0f}",
    )  # fmt: skip


def other_stream(bench: Bench, devices: Any) -> Iterator[Row]:
    """Kernels of 100 us back to back on a stream of their own, 30 to a graph, while steps end beside them: reported by
    nobody (the host spins), by host functions, by events.
    """
    _replays(bench, devices, "warm-up")  # the GPU's clock goes up first
    runs = {mode: _replays(bench, devices, mode) for mode in ("before", "host_function", "event", "after")}
    alone = max(1e-9, *(statistics.median(runs[mode]) for mode in ("before", "after")))
    for mode in ("host_function", "event"):
        times = runs[mode]
        longer = statistics.median(times) / alone - 1
        worst = max(times) / alone - 1
        target = {"at_most": STALL_LIMIT} if mode == "host_function" else {}
        yield row(
            f"another stream, {mode}", longer, "longer", **target, worst=worst,
            note=f"30 kernels of 100 us take {1e3 * statistics.median(times):.2f} ms, most {1e3 * max(times):.2f} ms",
        )  # fmt: skip


def _replays(bench: Bench, devices: Any, mode: str) -> list[float]:
    """Seconds of each replay, with steps beside them until the last. mode: of Completion; other words: no report."""
    num_replays = bench.pick(100, 3)
    stream: Any = None
    replay: Any = None
    if not bench.emulated:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(30):
                devices.busy(100, stream)
        replay = graph.replay
    devices.wait()
    marks = [devices.mark(stream)]
    with devices.on(stream):
        for _ in range(num_replays):
            if replay is not None:
                replay()
            marks.append(devices.mark(stream))

    def busy(done: int) -> bool:
        return done < 10 if bench.emulated else not marks[-1].query()

    if mode not in ("host_function", "event"):
        done = 0
        while busy(done):
            devices.busy(STEP_US)
            mark = devices.mark(devices.stream)
            while not bench.emulated and not mark.query():
                pass
            done += 1
    else:
        with asyncio.Runner() as runner:
            runner.run(Steps(bench, devices, mode, busy).run())
    devices.wait()
    return [devices.seconds(a, b) for a, b in zip(marks, marks[1:], strict=False)]


def decision(bench: Bench) -> Iterator[Row]:
    """The rule at the top of this file, on the rows measured before."""
    told = {found["name"]: found for found in bench.known if "value" in found}
    latencies = [found for name, found in told.items() if name.startswith("host_function, ")]
    stall = told.get("another stream, host_function")
    if not latencies or stall is None:
        yield {"name": "decision", "missing": "latency or stall was not measured"}
        return
    p99, longer = max(found["value"] for found in latencies), stall["value"]
    kept = p99 < P99_LIMIT_US and longer < STALL_LIMIT
    yield {
        "name": "decision", "met": kept, "note":
        f"host functions {'are kept' if kept else 'are NOT kept: wait for events'} "
        f"(p99 {p99:.0f} us, limit {P99_LIMIT_US:.0f}; another stream {100 * longer:.1f} % longer, "
        f"limit {100 * STALL_LIMIT:.0f} %)",
    }  # fmt: skip


# --- Copies ---------------------------------------------------------------------------------------------------
def copies(bench: Bench) -> None:
    bench.measure("copies", partial(copy_rows, bench))


def copy_rows(bench: Bench) -> Iterator[Row]:
    devices = bench.devices()
    for name, num_bytes, to_device in (("plan to device, 64 KB", 65536, True), ("result to host, 1 KB", 1024, False)):
        here = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=not bench.emulated)
        there = torch.zeros(num_bytes, dtype=torch.uint8, device=bench.device)
        source, target = (here, there) if to_device else (there, here)
        on_device, calls = [], []
        stream: Any = devices.stream
        for _ in range(bench.pick(500, 5)):
            devices.wait()
            with devices.on(stream):
                devices.busy(30)  # the copy is queued before the device comes to it, as in a running engine
                begin = devices.mark(stream)
                began = time.perf_counter()
                target.copy_(source, non_blocking=True)
                calls.append(1e6 * (time.perf_counter() - began))
                end = devices.mark(stream)
            devices.wait()
            on_device.append(1e6 * devices.seconds(begin, end))
        call, p99 = statistics.median(calls), gpu_steps.percentile(on_device, 0.99)
        yield row(name, statistics.median(on_device), "us", call_us=call, p99_us=p99,
                  note=f"p99 {p99:.1f}; the call {call:.1f}")  # fmt: skip


# --- Graphs and launches --------------------------------------------------------------------------------------
def host_engine(bench: Bench, num_layers: int | None) -> gpu_steps.Served:
    return gpu_steps.Served(
        bench,
        gpu_steps.large_model(bench, num_layers),
        load_format="dummy",
        context_length=bench.pick(2048, 128),
        max_total_tokens=bench.pick(65536, 1024),
        max_running_requests=bench.pick(256, 8),
        chunked_prefill_size=bench.pick(512, 64),
        max_step_ms=0,  # prompts first, then decodes alone
    )


def buckets(bench: Bench) -> tuple[int, ...]:
    return BUCKETS if not bench.emulated else (1, 4, 8)


def steps(bench: Bench) -> None:
    layers = bench.pick(4, 2)
    with host_engine(bench, layers) as served:
        for rows in buckets(bench):
            bench.measure(f"graph {rows}, {layers} layers", partial(graph_rows, bench, served, rows, layers))
        for rows in buckets(bench):
            bench.measure(f"steps {rows}", partial(step_rows, bench, served, rows))


def whole(bench: Bench) -> None:
    with host_engine(bench, None) as served:
        layers = int(bench.pick(32, 4))
        for rows in buckets(bench):
            bench.measure(f"graph {rows}, {layers} layers", partial(graph_rows, bench, served, rows, layers))


def graph_rows(bench: Bench, served: gpu_steps.Served, num_rows: int, num_layers: int) -> Iterator[Row]:
    """Row ops to logits of a step of decodes, the device idle before each."""
    launcher, devices = served.model.executor.launcher, served.devices
    stream: Any = served.model.executor._stream
    for name, call in (
        ("replay", launcher._decode_graphs[num_rows].replay),
        ("launches", captured_launches(launcher, num_rows)),
    ):
        host, device = [], []
        with torch.inference_mode(), devices.on(stream):
            for i in range(bench.pick(60, 2)):
                devices.wait()
                begin = devices.mark(stream)
                began = time.perf_counter()
                call()
                took = 1e6 * (time.perf_counter() - began)
                end = devices.mark(stream)
                devices.wait()
                if i >= bench.pick(10, 1):
                    host.append(took)
                    device.append(1e6 * devices.seconds(begin, end))
        p99, busy = gpu_steps.percentile(host, 0.99), statistics.median(device)
        yield row(f"{name} {num_rows}, {num_layers} layers", statistics.median(host), "us", p99_us=p99, device_us=busy,
                  note=f"p99 {p99:.0f}; on the device {busy:.0f}")  # fmt: skip


def captured_launches(launcher: Any, num_rows: int) -> Callable[[], None]:
    """What the launcher captures into its graph of so many rows, to be called."""
    pool, launcher._pool = launcher._pool, SimpleNamespace(capture=lambda launch: launch)
    try:
        return launcher._capture_decode(num_rows)  # type: ignore[no-any-return]
    finally:
        launcher._pool = pool


def step_rows(bench: Bench, served: gpu_steps.Served, num_rows: int) -> Iterator[Row]:
    rng = np.random.default_rng(num_rows)
    served.clock.steps.clear()
    served.batch(gpu_steps.prompts(rng, served.model.vocab_size, num_rows, 16), bench.pick(64, 8))
    found = served.clock.decodes(num_rows)[bench.pick(5, 1) : -1]
    if not found:
        raise RuntimeError(f"no step of {num_rows} decodes")
    for name, values in (
        ("packer", [step.pack_us for step in found]),
        ("forward", [step.forward_us for step in found]),
        ("thread", [step.thread_us for step in found]),
    ):
        yield row(f"{name} {num_rows}", statistics.median(values), "us", p99_us=gpu_steps.percentile(values, 0.99),
                  note=f"of {len(values)} steps; p99 {gpu_steps.percentile(values, 0.99):.0f}")  # fmt: skip


# The important ones first: what comes last is what a budget leaves out.
CASES: Final = (
    Case("completion", completion, 60),
    Case("steps", steps, 120),
    Case("copies", copies, 60),
    Case("whole", whole, 150),
)
