"""A peer's process: started, waited for, asked for generations, and ended with all that it has started itself.

bench/compare.py gets a Running from `start`: a Server is asked over HTTP by bench/serving.py's client, a Worker (one of
bench/peer_in_process.py) over its stdin. Both give serving.Load, so that the same figures are computed of both.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import generations
import server_cpu
import serving
import uvloop
from http_client import Client, HttpError
from peer_workspace import PeerError, log_tail
from workloads import Request

POLL_S: Final = 0.02
STOP_S: Final = 15.0
# Greedy, and to the asked length.
FIELDS: Final[Mapping[str, Any]] = {"temperature": 0, "ignore_eos": True}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def children_cpu_seconds() -> float:
    """Of this process's children that have ended."""
    used = os.times()
    return used.children_user + used.children_system


# --- processes of a group, and the CPU they and others use
def group_members(group: int, proc: Path = Path("/proc")) -> list[str]:
    """The lines /proc/PID/stat of the group's processes; those that have ended and wait to be reaped are left out."""
    found = []
    for entry in proc.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                stat = (entry / "stat").read_text()
                state, _, pgrp = stat[stat.rindex(")") + 2 :].split()[:3]
                if int(pgrp) == group and state != "Z":
                    found.append(stat)
    return found


def busy_seconds(proc: Path = Path("/proc")) -> float:
    """CPU seconds that the machine's CPUs were busy since it started, those a hypervisor gave to others included."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, (proc / "stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass
class Usage:
    """What a measurement used of the machine, in CPU seconds; `others` is everybody else."""

    wall_s: float = 0.0
    engine_s: float = 0.0
    client_s: float = 0.0
    busy_s: float = 0.0

    @contextlib.contextmanager
    def counting(self, engine_s: Callable[[], float]) -> Iterator[None]:
        """Add what is used meanwhile; engine_s gives the engine's CPU seconds so far."""

        def now() -> tuple[float, ...]:
            return time.perf_counter(), engine_s(), time.process_time(), busy_seconds()

        before = now()
        yield
        for field, begin, end in zip(dataclasses.fields(self), before, now(), strict=True):
            setattr(self, field.name, getattr(self, field.name) + end - begin)

    @property
    def others_percent(self) -> float:
        """Of all CPUs, what neither engine nor client used, though it was used."""
        others = max(0.0, self.busy_s - self.engine_s - self.client_s)
        return 100 * others / (self.wall_s * (os.cpu_count() or 1)) if self.wall_s else 0.0


# --- running
class Running(abc.ABC):
    """A peer's process, from `with` to the end of it. PeerError, with the log's last lines, where it fails.

    begin    time.perf_counter() when it was started
    usage    of all `generate` so far
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self._command = list(command)
        self._variables = dict(variables)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.begin = 0.0
        self.usage = Usage()

    def __enter__(self) -> Running:
        pipe = self._pipe()
        with self._log.open("wb") as log:
            log.write(f"$ {' '.join(self._command)}\n".encode())
            log.flush()
            self.begin = time.perf_counter()
            try:
                self._process = subprocess.Popen(
                    self._command, stdin=pipe or subprocess.DEVNULL, stdout=pipe or log, stderr=log,
                    env={**os.environ, **self._variables}, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise PeerError(f"cannot run {self._command[0]}: {error}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nobody's second Ctrl-C may leave a server behind; both patiences are short.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._close()
            self._end_group()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _end_group(self) -> None:
        process = self._process
        if process is None:
            return
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            give_up = time.monotonic() + STOP_S
            while (members := process.poll() is None or group_members(process.pid)) and time.monotonic() < give_up:
                time.sleep(POLL_S)
            if not members:
                return

    def _pipe(self) -> int | None:
        """subprocess.PIPE where the engine is asked through stdin and stdout."""
        return None

    @abc.abstractmethod
    def _close(self) -> None:
        """Let go of what connects to the process."""

    @abc.abstractmethod
    def _wait_ready(self) -> None: ...

    @abc.abstractmethod
    def _generate(self, requests: Sequence[Request], max_concurrency: int) -> serving.Load: ...

    def wait_ready(self, timeout_s: float) -> float:
        """Seconds from the start until it takes requests."""
        with self._deadline(timeout_s, "starting"):
            self._wait_ready()
        return time.perf_counter() - self.begin

    def generate(self, requests: Sequence[Request], max_concurrency: int, timeout_s: float) -> serving.Load:
        """Send all, at most max_concurrency at once; what came of it. PeerError where a request fails or has another
        length than was asked for. KeyboardInterrupt where that comes."""
        with self.usage.counting(self._cpu_seconds), self._deadline(timeout_s, "a measurement"):
            load = self._generate(requests, max_concurrency)
        if load.interrupted:
            raise KeyboardInterrupt
        for generation in load.ended:
            if generation.error:
                raise self._error(f"a request failed: {generation.error}")
            asked, got = generation.request.output_len, generation.output_tokens
            if got != asked:
                raise self._error(f"{asked} tokens were asked for, its usage says {got}")
        return load

    def _cpu_seconds(self) -> float:
        assert self._process is not None
        return sum(server_cpu.cpu_seconds(stat) for stat in group_members(self._process.pid))

    def _error(self, problem: str) -> PeerError:
        return PeerError(f"{problem} ({self._log}):{log_tail(self._log)}")

    def _ended(self) -> PeerError:
        """The process is ending, or has closed its output, without being asked to."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        return self._error(f"the process ended with exit status {self._process.poll()}")

    @contextlib.contextmanager
    def _deadline(self, seconds: float, what: str) -> Iterator[None]:
        """Kill the process once it takes longer, whatever waits for it then fails, and say so."""
        process = self._process
        assert process is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        except PeerError:
            if not expired.is_set():
                raise
        finally:
            timer.cancel()
        if expired.is_set():
            raise self._error(f"{what} took longer than {seconds:g} s")


class Server(Running):
    """One that listens on 127.0.0.1:port and has OpenAI's API."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path, port: int) -> None:
        super().__init__(command, variables, log)
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._client = Client(f"http://127.0.0.1:{port}")
        self._model = ""

    def _close(self) -> None:
        self._client.close()
        self._runner.close()

    def _wait_ready(self) -> None:
        self._model = self._runner.run(self._first_model())

    async def _first_model(self) -> str:
        assert self._process is not None
        while True:
            if self._process.poll() is not None:
                raise self._ended()
            with contextlib.suppress(OSError, HttpError):
                answer = await self._client.get("/v1/models")
                if answer.status == 200:
                    if cards := generations.model_cards(answer.content):
                        return str(cards[0]["id"])
                    raise self._error(f"/v1/models names no model: {answer.content[:200]!r}")
            await asyncio.sleep(POLL_S)

    def _generate(self, requests: Sequence[Request], max_concurrency: int) -> serving.Load:
        todo = [(0.0, generations.Completion(request)) for request in requests]
        return self._runner.run(serving.measure_load(todo, self._client, self._model, FIELDS, max_concurrency))


class Worker(Running):
    """A process of bench/peer_in_process.py."""

    def _pipe(self) -> int | None:
        return subprocess.PIPE

    def _close(self) -> None:
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._error(answer["error"])
        return answer

    def _wait_ready(self) -> None:
        self._answer()

    def _generate(self, requests: Sequence[Request], max_concurrency: int) -> serving.Load:
        assert self._process is not None and self._process.stdin is not None
        (output_len,) = {request.output_len for request in requests}
        prompts = [request.prompt for request in requests]
        asked = {"prompts": prompts, "output_len": output_len, "concurrency": max_concurrency}
        cpu, begin = time.process_time(), time.perf_counter()
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        answer = self._answer()
        ended: list[generations.Generation] = []
        for request, start, times in zip(requests, answer["starts"], answer["times"], strict=True):
            generation = generations.Completion(request)
            generation.start_time, generation.chunk_times = start, times
            generation.output_tokens, generation.ended = len(times), True
            ended.append(generation)
        return serving.Load(ended, max(times[-1] for times in answer["times"]) - begin, time.process_time() - cpu)
