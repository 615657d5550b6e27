"""memory/: pool sizing, namespaces, page arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapwood import _core
from sapwood.config import EngineConfig
from sapwood.errors import InvalidRequest
from sapwood.memory import sizing
from sapwood.memory.prefix_cache import PagePool, make_cache, namespace_id
from sapwood.memory.sizing import free_memory_bytes, max_positions, require_free, size_pool

MIB = 2**20


def config(**settings: Any) -> EngineConfig:
    return EngineConfig.from_kwargs("m", **settings)


def full(page_bytes: int = MIB, page_size: int = 16) -> _core.KvGroup:
    return _core.KvGroup(page_size=page_size, page_bytes=page_bytes)


def window(size: int, page_bytes: int = MIB) -> _core.KvGroup:
    return _core.KvGroup("window", window=size, page_size=16, page_bytes=page_bytes)


def test_max_total_tokens_decides() -> None:
    assert size_pool(config(max_total_tokens=100), [full()], context_len=4096, free_bytes=7 * MIB) == [7]


def test_a_pool_above_the_free_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"max_total_tokens=100 needs 7\.0 MiB of KV, but 6\.0 MiB of memory are free; lower --max-total-tokens"
    with pytest.raises(InvalidRequest, match=message):
        size_pool(config(max_total_tokens=100), [full()], context_len=4096, free_bytes=6 * MIB)
    monkeypatch.setattr(sizing, "free_memory_bytes", lambda: 6 * MIB)
    with pytest.raises(InvalidRequest, match=message):
        size_pool(config(max_total_tokens=100), [full()], context_len=4096)


def test_what_is_needed_is_compared_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "free_memory_bytes", lambda: 6 * MIB)
    require_free(6 * MIB, "these", "wait", "model")
    with pytest.raises(InvalidRequest, match=r"these need 6\.5 MiB, but 6\.0 MiB of memory are free; wait") as caught:
        require_free(13 * MIB // 2, "these", "wait", "model")
    assert caught.value.param == "model"


def test_the_longest_request_by_the_pool() -> None:
    assert max_positions([full()], [5], 1000) == 80
    assert max_positions([full()], [5], 70) == 70
    assert max_positions([full(), window(32)], [5, 1], 1000) == 80
    assert max_positions([window(32)], [5], 1000) == 1000  # a window moves on: no bound


def test_a_share_of_free_memory_but_no_more_than_useful() -> None:
    half = config(mem_fraction_static=0.5, max_running_requests=4)
    assert size_pool(half, [full()], context_len=16_000, free_bytes=100 * MIB) == [50]
    assert size_pool(half, [full()], context_len=160, free_bytes=1000 * MIB) == [4 * 10]


def test_window_groups_are_smaller_and_all_of_it_fits() -> None:
    settings = config(max_running_requests=2, chunked_prefill_size=64, mem_fraction_static=0.5)
    pages = size_pool(settings, [full(), window(32)], context_len=1_000_000, free_bytes=1000 * MIB)
    assert sum(pages) <= 500
    assert sum(pages) >= 497
    assert pages[1] < pages[0] // 2
    assert pages[1] >= 2 * (2 + 2) + 2 * 4  # every row's window and two chunks
    # A model with windows alone is sized by its windows.
    assert size_pool(settings, [window(32)], context_len=1_000_000, free_bytes=1000 * MIB) == [500]


def test_too_little_memory_is_refused_with_numbers() -> None:
    with pytest.raises(InvalidRequest, match="2.0 MiB.*mem_fraction_static=0.1.*--mem-fraction-static"):
        size_pool(config(mem_fraction_static=0.1), [full()], context_len=4096, free_bytes=5 * MIB)
    with pytest.raises(InvalidRequest, match="context_length=4000.*250.0 MiB"):
        size_pool(config(context_length=4000), [full()], context_len=4000, free_bytes=100 * MIB)
    with pytest.raises(InvalidRequest, match="--max-total-tokens"):
        size_pool(config(max_total_tokens=2**32), [full(page_size=1)], context_len=4096)


def test_free_memory_is_cut_by_the_cgroup(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    group = tmp_path / "cgroup"
    group.mkdir()
    assert free_memory_bytes(tmp_path, group) == 8000 * 1024
    (group / "memory.max").write_text("max\n")
    assert free_memory_bytes(tmp_path, group) == 8000 * 1024
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    assert free_memory_bytes(tmp_path, group) == 3_000_000  # page cache is given up under pressure
    assert free_memory_bytes() > MIB


def test_namespaces_differ_where_keys_must_not_be_shared() -> None:
    ids = {namespace_id(m, salt, rope) for m in (1, 2) for salt in (None, "", "a", "b") for rope in (0, 1)}
    assert len(ids) == 16
    assert namespace_id(1, "a", 0) == 0x93B983DB8955BCFC  # the same in every process and version
    assert all(0 <= i < 2**64 for i in ids)


@pytest.mark.parametrize(
    ("settings", "hits"),
    [({}, True), ({"prefix_cache": "flat"}, True), ({"disable_radix_cache": True}, False)],
    ids=str,
)
def test_make_cache_takes_the_settings(settings: dict[str, Any], hits: bool) -> None:
    cache = make_cache(config(**settings), [full()], [8])
    keys = np.arange(32, dtype=np.int32)
    lease = cache.acquire(1, keys, 31)
    assert cache.reserve(lease, 32)
    cache.commit(lease, keys, 0)
    cache.release(lease)
    cache.retire(0)
    assert cache.match(1, keys) == (32 if hits else 0)
    assert cache.match(2, keys) == 0


def test_page_pool_counts_over_groups() -> None:
    groups = [full(), window(32)]
    cache = _core.CacheManager(groups, [20, 10])
    pool = PagePool(cache, groups, [20, 10], max_chunk_tokens=16)
    assert (pool.pages_for(0), pool.pages_for(1), pool.pages_for(16), pool.pages_for(17)) == (0, 1, 1, 2)
    assert pool.fits_at_all(320)
    assert not pool.fits_at_all(321)
    assert pool.capacity_tokens() == 320
    assert pool.has_room(20, 0)  # of the window group 5 do: its window, a chunk, a page at each end
    assert not pool.has_room(21, 0)
    assert pool.has_room(10, 5)
    assert not pool.has_room(10, 6)
    assert not pool.in_limbo()
    lease = cache.acquire(1, np.arange(5, dtype=np.int32), 0)
    assert cache.reserve(lease, 50)
    cache.release(lease, 3)
    assert pool.in_limbo()
    cache.retire(3)
    assert not pool.in_limbo()
