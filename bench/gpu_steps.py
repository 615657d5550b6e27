"""What `bench/gpu_suite.py --stage host` and `--stage engine` are made of: cases, their rows, models, and the clocks.

A case (bench/gpu_host.py, bench/gpu_tokens.py, bench/gpu_engine.py, bench/gpu_peers.py) runs in a process of its own
and takes measurements through `Bench.measure`, which writes each row to a file as it comes. Where the process dies,
the suite starts it again, and it goes on behind the measurement that killed it.

    Row     name, value and unit; target, whether it was met; or failure, skipped, missing: why there is none; details
    Times   of what the device does: CUDA events, read when all is over; on the emulator the host's clock
    Steps   StepClock hooks into a CudaExecutor from outside: what its thread does in a step, when the device begins
            it and ends it
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import make_model
import numpy as np
import offline
import torch

Row = dict[str, Any]
Shape = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """Measurements that share a process.

    run       takes them through bench.measure
    limit_s   that one of them may take, its start included
    package   without which there are none
    """

    name: str
    run: Callable[[Bench], None]
    limit_s: float
    package: str | None = None


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def row(
    name: str, value: float, unit: str, *, at_least: float | None = None, at_most: float | None = None, **more: Any
) -> Row:
    """A measurement; a target makes it met or missed."""
    found: Row = {"name": name, "value": value, "unit": unit}
    if at_least is not None:
        found |= {"target": at_least, "wanted": "at least", "met": value >= at_least}
    if at_most is not None:
        found |= {"target": at_most, "wanted": "at most", "met": value <= at_most}
    return found | more


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that so large a share of them does not exceed."""
    return sorted(values)[max(0, -int(-share * len(values)) - 1)]


class Bench:
    """A case's process: its device, what was measured before, and where rows go.

    library    a CudaLibrary
    emulated   the device is the CPU: sizes are small, times mean nothing
    rows       a file of JSON lines, which this process continues
    folder     for models; what other processes of this run left there may be used
    """

    def __init__(self, library: Any, rows: Path, folder: Path, *, emulated: bool, known: Iterable[Row] = ()) -> None:
        self.library = library
        self.emulated = emulated
        self.folder = folder
        self.device = "cpu" if emulated else "cuda"
        self._rows = rows
        self.known = list(known)
        self._begun = {found["begin"] for found in self.known if "begin" in found}

    def pick(self, real: Any, rehearsed: Any) -> Any:
        """A size by whether this is a rehearsal."""
        return rehearsed if self.emulated else real

    def tell(self, found: Row) -> None:
        self.known.append(found)
        with self._rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")

    def measure(self, name: str, take: Callable[[], Iterable[Row]]) -> bool:
        """Tell the rows that `take` yields; what it raises is a row. Does nothing where it was begun before. Whether
        all rows came. Raises where the device is lost, so that this process ends here and another one goes on.
        """
        if name in self._begun:
            return False
        self._begun.add(name)
        self.tell({"begin": name})
        failed = False
        try:
            for found in take():
                self.tell(found)
        except Exception as error:  # whatever it is, it is this measurement's result
            failed = True
            self.tell({"name": name, "failure": f"{type(error).__name__}: {error}"[:400]})
        if not self.emulated:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        self.tell({"end": name})
        return not failed

    def value(self, name: str) -> float | None:
        """Of a row told before, in any process of this stage."""
        return next((found["value"] for found in self.known if found.get("name") == name and "value" in found), None)

    def compared(self, found: Row, other: str, word: str) -> Row:
        """The row with how much it is of another one, where that is known."""
        if value := self.value(other):
            found["note"] = "; ".join(filter(None, (found.get("note"), f"{found['value'] / value:.2f} of {word}")))
            found["of_other"] = found["value"] / value
        return found

    def ceilings(self) -> Any:
        """gpu_timings.Ceilings of this run, measured where they are not known."""
        import gpu_timings
        from gpu_checks.device import Device

        told = next((found["ceilings"] for found in self.known if "ceilings" in found), None)
        if told is not None:
            return gpu_timings.Ceilings(**told)
        clock: gpu_timings.Clock = gpu_timings.WallClock() if self.emulated else gpu_timings.GpuClock()
        found = gpu_timings.measure_ceilings(Device(self.library, self.device), clock, self.pick(1, 64))
        self.tell({"ceilings": vars(found)})
        return found

    def use_library(self) -> None:
        """Device "cuda" is this process's library, wherever that was built, and, in a rehearsal, the CPU."""
        from sapwood.program import cuda

        cuda.open_device = lambda: (self.library, self.device)

    def devices(self) -> Gpu | Rehearsed:
        return Rehearsed() if self.emulated else Gpu()


# --- Models ---------------------------------------------------------------------------------------------------
def tiny(shape: Shape, **fields: Any) -> Shape:
    """A public model's family, a thousandth of its size."""
    small = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 4096}  # fmt: skip
    if "head_dim" in shape:
        small["head_dim"] = 16
    return {**shape, **small, **fields}


def write_config(folder: Path, shape: Shape) -> Path:
    """A model that has no weights yet, for load_format "dummy"; no token ends a text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**shape, "bos_token_id": None, "eos_token_id": None}, indent=1))
    return folder


def write_model(folder: Path, shape: Shape) -> Path:
    """A checkpoint whose values keep their size from layer to layer, so that logits are far from flat."""
    if not (folder / "model.safetensors").exists():
        write_config(folder, shape)
        make_model.write_weights(folder, make_model.tensor_shapes(shape), 1, 4 << 30, std=None)
    return folder


def large_model(bench: Bench, num_layers: int | None = None) -> Path:
    """Llama-3.1-8B's shape, or so many layers of it."""
    shape = make_model.SHAPES["llama-3.1-8b"]
    if bench.emulated:
        shape = tiny(shape, num_hidden_layers=4)
    if num_layers is not None:
        shape = {**shape, "num_hidden_layers": num_layers}
    return write_config(bench.folder / f"large-{shape['num_hidden_layers']}", shape)


def prompts(rng: np.random.Generator, vocab_size: int, count: int, length: int) -> list[Any]:
    return list(rng.integers(0, vocab_size, (count, length), dtype=np.int32))


# --- Times of the device --------------------------------------------------------------------------------------
class Gpu:
    """Marks on a stream are CUDA events. `host_ns` tells when they were reached by the host's CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self.stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._fixed: list[tuple[float, float]] = []  # (ns of the device since the first mark, host - device)
        self._first = self.mark(self.stream)
        self._cycles_per_us = 1000.0
        for _ in range(20):  # until the kernel is loaded and the clock has gone up
            begin = self.mark(self.stream)
            self.busy(1000)
            end = self.mark(self.stream)
            self.wait()
            took_us = 1e6 * self.seconds(begin, end)
        self._cycles_per_us *= 1000 / took_us

    def mark(self, stream: Any) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Both must have been reached."""
        return float(begin.elapsed_time(end)) / 1e3

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def busy(self, microseconds: float, stream: Any = None) -> None:
        """A kernel that keeps one multiprocessor waiting."""
        with self.on(stream or self.stream):
            torch.cuda._sleep(int(microseconds * self._cycles_per_us))  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        torch.cuda.synchronize()

    def calibrate(self) -> None:
        """Where the two clocks are now: the host spins on a mark, and the least delay of many is none."""
        self.wait()
        least, at = float("inf"), 0.0
        for _ in range(200):
            event = self.mark(self.stream)
            while not event.query():
                pass
            now = time.monotonic_ns()
            device_ns = 1e9 * self.seconds(self._first, event)
            if now - device_ns < least:
                least, at = now - device_ns, device_ns
        self._fixed.append((at, least))

    def host_ns(self, mark: Any) -> float:
        """Between calibrations before and after, the clocks drift evenly."""
        device_ns = 1e9 * self.seconds(self._first, mark)
        at, ahead = np.array(self._fixed).T
        return device_ns + float(np.interp(device_ns, at, ahead))


class Rehearsed:
    """The same on the emulator, where a launch is over when it returns."""

    stream = None

    def mark(self, stream: Any) -> Any:
        return time.monotonic_ns()

    def seconds(self, begin: Any, end: Any) -> float:
        return float(end - begin) / 1e9

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def busy(self, microseconds: float, stream: Any = None) -> None: ...

    def wait(self) -> None: ...

    def calibrate(self) -> None: ...

    def host_ns(self, mark: Any) -> float:
        return float(mark)


# --- Steps ----------------------------------------------------------------------------------------------------
@dataclass
class StepTimes:
    """One step of a CudaExecutor. *_us: of its thread; forward_us is from the row ops to the logits, thread_us all."""

    num_items: int
    num_tokens: int
    pack_us: float = 0.0
    forward_us: float = 0.0
    thread_us: float = 0.0
    begin: Any = None  # marks: the plan is packed and its copy comes next, the result's copy is queued
    end: Any = None


class _Packer:
    def __init__(self, packer: Any, clock: StepClock) -> None:
        self._packer, self._clock = packer, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packer, name)

    def pack(self, plan: Any, out: Any) -> Any:
        began = time.perf_counter()
        packed = self._packer.pack(plan, out)
        self._clock.packed(plan, time.perf_counter() - began)
        return packed


class StepClock:
    """Takes the times of every step from now on, by replacing what the executor's thread calls: its packer, the
    launcher's forward, the ticket of a step. Read or clear `steps` while no step is in flight; the thread may still be
    at the end of the last one, whose thread_us is not known then.
    """

    def __init__(self, executor: Any, device: Gpu | Rehearsed) -> None:
        self.steps: list[StepTimes] = []
        self._step = StepTimes(0, 0)  # the thread's own
        self._executor, self._device = executor, device
        self._forward, self._launch = executor.launcher.forward, executor._launch
        self._ticket = executor._completion.ticket
        executor._packer = _Packer(executor._packer, self)
        executor.launcher.forward = self._timed_forward
        executor._completion.ticket = self._marked_ticket
        executor._launch = self._timed_launch

    def packed(self, plan: Any, seconds: float) -> None:
        self._step = StepTimes(plan.num_items, plan.num_tokens, 1e6 * seconds)
        self.steps.append(self._step)
        self._step.begin = self._device.mark(self._executor._stream)

    def _timed_forward(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        logits = self._forward(*arguments)
        self._step.forward_us = 1e6 * (time.perf_counter() - began)
        return logits

    def _marked_ticket(self, *of_logits: int) -> Any:
        if not of_logits:
            self._step.end = self._device.mark(self._executor._stream)
        return self._ticket(*of_logits)

    def _timed_launch(self, plan: Any, submit_ns: int) -> None:
        began = time.perf_counter()
        self._launch(plan, submit_ns)
        self._step.thread_us = 1e6 * (time.perf_counter() - began)

    def decodes(self, num_rows: int) -> list[StepTimes]:
        """The steps of exactly so many decodes and nothing else."""
        return [s for s in self.steps if s.num_items == s.num_tokens == num_rows and s.end is not None]

    def device_s(self, steps: Sequence[StepTimes]) -> float:
        """Median time that the device took for one of them."""
        return statistics.median(self._device.seconds(s.begin, s.end) for s in steps)

    def idle_share(self, steps: Sequence[StepTimes]) -> float:
        """Of the time from the first of these steps to the last, what lay between one's end and the next one's begin.
        Within a step the device may wait for launches, too: a graph's it does not.
        """
        whole = self._device.seconds(steps[0].begin, steps[-1].end)
        gaps = [self._device.seconds(a.end, b.begin) for a, b in zip(steps, steps[1:], strict=False)]
        return sum(max(0.0, gap) for gap in gaps) / whole


# --- An engine ------------------------------------------------------------------------------------------------
class Served:
    """An AsyncEngine on device "cuda" and the loop it lives in, uvloop's where that is installed."""

    def __init__(self, bench: Bench, model: Path, **settings: Any) -> None:
        from sapwood import AsyncEngine
        from sapwood.engine.async_engine import _new_event_loop

        bench.use_library()
        self.devices = bench.devices()
        self._runner = asyncio.Runner(loop_factory=_new_event_loop)
        self.engine = AsyncEngine(
            model, device="cuda", skip_tokenizer_init=True, dtype="bfloat16", trace_capacity=20_000, **settings
        )
        self.clock: StepClock

    def __enter__(self) -> Self:
        try:
            self._runner.run(self.engine.start())
            self.clock = StepClock(self.engine.model.executor, self.devices)  # type: ignore[union-attr]
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self.engine.shutdown())
        self._runner.close()

    @property
    def model(self) -> Any:
        return self.engine.model

    def batch(self, prompts: Sequence[Any], num_new: int) -> offline.Times:
        """All prompts at once, greedily, num_new tokens each; then the engine is idle."""
        return self._runner.run(self._batch(list(prompts), num_new))

    async def _batch(self, prompts: list[Any], num_new: int) -> offline.Times:
        times = await offline.run_batch(self.engine, prompts, num_new)
        await self.engine.wait_idle()
        return times


def decode_records(engine: Any, num_rows: int) -> Iterator[Any]:
    """The engine's own records of steps of so many decodes alone."""
    return (r for r in engine.trace() if r.num_decode_rows == num_rows and not r.num_extend_tokens and r.done_ns)
