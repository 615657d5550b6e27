"""The cache manager as the engine sees it: made from the settings, keyed by namespace, counted in pages.

Receives groups and pool sizes from models/ (through memory/sizing.py); hands a `_core.CacheManager` to engine/plan.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sapwood import _core
from sapwood.config import EngineConfig


def make_cache(config: EngineConfig, groups: Sequence[_core.KvGroup], num_pages: Sequence[int]) -> _core.CacheManager:
    """The page pool and prefix index the settings ask for."""
    kind = "none" if config.disable_radix_cache else config.prefix_cache
    return _core.CacheManager(groups, num_pages, kind=kind)


def namespace_id(model_salt: int, request_salt: str | None, rope_mode: int) -> int:
    """Stable 64-bit namespace of a request's keys: equal exactly where KV computed for one request serves the other.

    model_salt    stands for the weights and their version
    request_salt  the caller's wall between users who must not see each other's timing; None shares
    rope_mode     row of the rope tables: keys rotated in another mode are other keys
    """
    digest = hashlib.blake2b(digest_size=8)
    digest.update(int(model_salt & (2**64 - 1)).to_bytes(8, "little"))
    digest.update(int(rope_mode).to_bytes(4, "little"))
    # None and "" are different salts.
    if request_salt is not None:
        digest.update(b"\x01" + request_salt.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little")


class PagePool:
    """How many pages a request needs and how many could be had, over all groups.

    A window group gives up what no later query sees, so a request never needs more of it than its window, the longest
    chunk and a page at each end.
    """

    __slots__ = ("_cache", "_caps", "_num_groups", "num_pages", "page_size")

    def __init__(
        self,
        cache: _core.CacheManager,
        groups: Sequence[_core.KvGroup],
        num_pages: Sequence[int],
        max_chunk_tokens: int,
    ) -> None:
        self._cache = cache
        self._num_groups = len(groups)
        self.page_size = groups[0].page_size
        self.num_pages = list(num_pages)
        self._caps: list[int | None] = [
            -(-(g.window + max_chunk_tokens) // self.page_size) + 2 if g.kind == "window" else None for g in groups
        ]

    def pages_for(self, num_tokens: int) -> int:
        """Pages of a full group that hold num_tokens."""
        return -(-num_tokens // self.page_size)

    def _capped(self, group: int, pages: int) -> int:
        cap = self._caps[group]
        return pages if cap is None else min(pages, cap)

    def fits_at_all(self, num_tokens: int) -> bool:
        """Whether one request of num_tokens fits an otherwise empty pool."""
        pages = self.pages_for(num_tokens)
        return all(self._capped(g, pages) <= total for g, total in enumerate(self.num_pages))

    def capacity_tokens(self) -> int:
        """Tokens the longest request could have; unbounded groups do not count."""
        full = [n for n, cap in zip(self.num_pages, self._caps, strict=True) if cap is None]
        return min(full or self.num_pages) * self.page_size

    def has_room(self, pages: int, reserve: int) -> bool:
        """Whether `pages` more (fewer of a window group) and `reserve` of every group could be handed out now."""
        if self._num_groups == 1:
            return self._capped(0, pages) + reserve <= self._cache.available_pages()
        for group in range(self._num_groups):
            stats = self._cache.stats(group)
            if self._capped(group, pages) + reserve > stats.free + stats.evictable:
                return False
        return True

    def in_limbo(self) -> bool:
        """Whether pages are on their way back: released, still named by a launched step."""
        return any(self._cache.stats(group).limbo > 0 for group in range(self._num_groups))
