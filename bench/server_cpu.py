"""CPU seconds of a server's process, those of its compute threads apart: what serving costs beside computing.

bench/serving.py takes one snapshot before a run and one after it. Sapwood's compute threads are known by their names
(COMPUTE_NAMES); where no thread has such a name, all but the process's first count as compute threads, and the result
says so.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

# The executor's thread takes part in every computation, as the pool's do.
COMPUTE_NAMES: Final = re.compile(r"sapwood-(exec|comp)")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """CPU seconds used so far: of all processes together, and of each living thread as (is compute by name, is its
    process's first thread, seconds)."""

    total_s: float
    threads: dict[int, tuple[bool, bool, float]]


def cpu_seconds(stat: str) -> float:
    """User and system time in a line of /proc/PID/stat. The name in it may hold spaces and parentheses."""
    fields = stat[stat.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def snapshot(pids: Sequence[int], proc: Path = Path("/proc")) -> Snapshot:
    """ProcessLookupError where one of the processes does not exist."""
    total = 0.0
    threads: dict[int, tuple[bool, bool, float]] = {}
    for pid in pids:
        try:
            total += cpu_seconds((proc / str(pid) / "stat").read_text())
            tasks = list((proc / str(pid) / "task").iterdir())
        except FileNotFoundError:
            raise ProcessLookupError(f"--server-pid: there is no process {pid}") from None
        for task in tasks:
            try:
                name, stat = (task / "comm").read_text(), (task / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended; its time is in the process's
            is_compute = COMPUTE_NAMES.match(name) is not None
            threads[int(task.name)] = (is_compute, task.name == str(pid), cpu_seconds(stat))
    return Snapshot(total, threads)


def used(before: Snapshot, after: Snapshot, duration: float, num_tokens: int) -> dict[str, Any]:
    """CPU between two snapshots: microseconds a token and percent of the machine, of compute threads and of all else.

    named   compute threads were known by their names; False: all but each process's first thread were taken for them
    """
    named = any(is_compute for is_compute, _, _ in after.threads.values())
    compute = 0.0
    for thread, (is_compute, is_first, seconds) in after.threads.items():
        if is_compute if named else not is_first:
            compute += seconds - before.threads.get(thread, (False, False, 0.0))[2]
    other = max(0.0, after.total_s - before.total_s - compute)
    machine_s = duration * (os.cpu_count() or 1)
    return {
        "named": named,
        "compute_s": compute,
        "other_s": other,
        "compute_us_per_token": 1e6 * compute / max(num_tokens, 1),
        "other_us_per_token": 1e6 * other / max(num_tokens, 1),
        "compute_percent": 100 * compute / machine_s,
        "other_percent": 100 * other / machine_s,
    }
