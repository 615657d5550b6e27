"""How many pages the KV pool gets.

Called by models/ once the weights are in memory, with the groups the model needs; its answer goes to the runner that
allocates the pool and to memory/prefix_cache.py that administers it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.errors import InvalidRequest

# Page ids are int32.
MAX_PAGES = 2**31 - 1
# mem_fraction_static's defaults. A machine has others to serve; a GPU has us alone, and what is left when the pool is
# sized is needed for little more than a step of unusual shape.
CPU_FRACTION = 0.5
GPU_FRACTION = 0.9


def free_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process could still allocate: the machine's available memory, cut by the cgroup's limit (v2 or v1).

    Page cache counts as available, in the machine and in the cgroup: it is given up under pressure.
    """
    available = 0
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
                break
    except OSError:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, usage, stat, cache_key in (
        (cgroup / "memory.max", cgroup / "memory.current", cgroup / "memory.stat", "inactive_file"),
        (
            cgroup / "memory/memory.limit_in_bytes",
            cgroup / "memory/memory.usage_in_bytes",
            cgroup / "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            text = limit.read_text().strip()
            if text == "max":
                continue
            used = int(usage.read_text())
            for line in stat.read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == cache_key:
                    used -= int(value)
            available = min(available, max(0, int(text) - max(0, used)))
        except (OSError, ValueError):
            continue
    return available


def require_free(num_bytes: int, what: str, remedy: str, param: str) -> None:
    """InvalidRequest, with both numbers, where num_bytes are more than the free memory.

    Asked before the memory is touched: Linux grants it without having it and kills the process later.
    """
    free = free_memory_bytes()
    if num_bytes > free:
        raise InvalidRequest(
            f"{what} need {num_bytes / 2**20:.1f} MiB, but {free / 2**20:.1f} MiB of memory are free; {remedy}", param
        )


def max_positions(groups: Sequence[_core.KvGroup], num_pages: Sequence[int], context_len: int) -> int:
    """Tokens the longest request can reach: no more than a group that keeps all tokens has room for. Windows are left
    behind, so a pool of windows alone bounds nothing.
    """
    room = [n * g.page_size for g, n in zip(groups, num_pages, strict=True) if g.kind != "window"]
    return min([context_len, *room])


def window_pages(group: _core.KvGroup, config: EngineConfig, full_pages: int) -> int:
    """Pages of a window group beside a full group of full_pages.

    Every row's window, two chunks, and a quarter of the full group for what the cache keeps.
    """
    rows = config.max_running_requests * (-(-group.window // group.page_size) + 2)
    chunks = 2 * -(-config.chunked_prefill_size // group.page_size)
    return max(1, min(full_pages, rows + chunks + full_pages // 4))


def size_pool(
    config: EngineConfig, groups: Sequence[_core.KvGroup], *, context_len: int, free_bytes: int | None = None
) -> list[int]:
    """Pages of every group.

    max_total_tokens decides where it is given; otherwise mem_fraction_static of the free memory (free_bytes; None = ask
    the system), yet never more than every row's full context. Raises InvalidRequest with the numbers where not even one
    page and a token fit, or the pool asked for is more than is free.
    """
    page_size = groups[0].page_size
    fraction = config.mem_fraction_static
    if fraction is None:
        fraction = GPU_FRACTION if config.device == "cuda" else CPU_FRACTION
    free = free_memory_bytes() if free_bytes is None else free_bytes
    if config.max_total_tokens is not None:
        full_pages = -(-config.max_total_tokens // page_size)
    else:
        useful = config.max_running_requests * -(-context_len // page_size)
        budget = int(free * fraction)
        full_pages = min(useful, MAX_PAGES)
        if _bytes(config, groups, full_pages) > budget:
            # Bytes grow with full_pages in every group, so the largest number that fits can be bisected.
            low, high = 0, full_pages
            while low < high:
                middle = (low + high + 1) // 2
                if _bytes(config, groups, middle) <= budget:
                    low = middle
                else:
                    high = middle - 1
            full_pages = low
        if full_pages < 2:
            page_bytes = sum(g.page_bytes for g in groups)
            raise InvalidRequest(
                f"the KV pool needs at least 2 pages ({2 * page_bytes / 2**20:.1f} MiB), but mem_fraction_static="
                f"{fraction} of {free / 2**20:.1f} MiB free memory is {budget / 2**20:.1f} MiB; "
                "raise --mem-fraction-static, or free memory",
                "mem_fraction_static",
            )
        # A length the user asked for must fit; the checkpoint's own may be longer than this machine can hold.
        asked = config.context_length
        if asked is not None and _has_full(groups) and full_pages * page_size < asked:
            needed = _bytes(config, groups, -(-asked // page_size))
            raise InvalidRequest(
                f"one request of context_length={asked} tokens needs {needed / 2**20:.1f} MiB of KV, but "
                f"mem_fraction_static={fraction} of {free / 2**20:.1f} MiB free memory is "
                f"{budget / 2**20:.1f} MiB, room for {full_pages * page_size} tokens; lower --context-length, "
                "raise --mem-fraction-static, or free memory",
                "context_length",
            )
    if full_pages > MAX_PAGES:
        raise InvalidRequest(
            f"max_total_tokens={config.max_total_tokens} is {full_pages} pages of {page_size} tokens, at most "
            f"{MAX_PAGES} are possible; lower --max-total-tokens",
            "max_total_tokens",
        )
    needed = _bytes(config, groups, full_pages)
    if config.max_total_tokens is not None and needed > free:
        raise InvalidRequest(
            f"max_total_tokens={config.max_total_tokens} needs {needed / 2**20:.1f} MiB of KV, but "
            f"{free / 2**20:.1f} MiB of memory are free; lower --max-total-tokens, or leave it out to have the pool "
            "sized by what is free",
            "max_total_tokens",
        )
    return _pages(config, groups, full_pages)


def _has_full(groups: Sequence[_core.KvGroup]) -> bool:
    return any(g.kind != "window" for g in groups)


def _pages(config: EngineConfig, groups: Sequence[_core.KvGroup], full_pages: int) -> list[int]:
    has_full = _has_full(groups)
    return [window_pages(g, config, full_pages) if has_full and g.kind == "window" else full_pages for g in groups]


def _bytes(config: EngineConfig, groups: Sequence[_core.KvGroup], full_pages: int) -> int:
    return sum(n * g.page_bytes for n, g in zip(_pages(config, groups, full_pages), groups, strict=True))
