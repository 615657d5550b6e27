// CacheManager by script: leases, limbo, fork, truncate, windows, invalidation, the flat and none kinds, events,
// and an allocation that fails at every possible place. The random half is cache_property_test.cc.

#include "cache/cache_manager.h"

#include <gtest/gtest.h>

#include <numeric>
#include <set>

#include "base/check.h"

namespace sapwood {
namespace {

using Keys = std::vector<int32_t>;

Keys Range(int32_t begin, int32_t end) {
  Keys keys(static_cast<size_t>(end - begin));
  std::iota(keys.begin(), keys.end(), begin);
  return keys;
}

CacheConfig FullConfig(int32_t num_pages, int32_t page_size, CacheKind kind = CacheKind::kRadix) {
  CacheConfig config;
  config.groups = {{.kind = KvKind::kFull, .page_size = page_size}};
  config.num_pages = {num_pages};
  config.kind = kind;
  return config;
}

CacheConfig MixedConfig(int32_t num_pages, int32_t page_size, int32_t window, CacheKind kind = CacheKind::kRadix) {
  CacheConfig config = FullConfig(num_pages, page_size, kind);
  config.groups.push_back({.kind = KvKind::kWindow, .window = window, .page_size = page_size});
  config.num_pages.push_back(num_pages);
  return config;
}

// A lease whose keys are all computed and committed.
Lease Computed(CacheManager& cache, const Keys& keys, uint64_t ns = 0, int64_t step = 0) {
  Lease lease = cache.Acquire(ns, keys, static_cast<int64_t>(keys.size()));
  EXPECT_TRUE(cache.Reserve(lease, static_cast<int64_t>(keys.size())));
  cache.Commit(lease, keys, step);
  cache.CheckInvariants();
  return lease;
}

std::string Counts(const CacheManager& cache, int group = 0) {
  const PoolStats s = cache.stats(group);
  return StrCat("free ", s.free, " cached ", s.cached, " leased ", s.leased, " limbo ", s.limbo, " evictable ",
                s.evictable);
}

std::vector<PageId> Pages(const Lease& lease, int group = 0) {
  const auto pages = lease.pages(group);
  return {pages.begin(), pages.end()};
}

TEST(CacheManagerTest, ALeaseSharesWhatIsCachedAndOwnsTheRest) {
  CacheManager cache(FullConfig(8, 4));
  Lease a = Computed(cache, Range(0, 10));
  EXPECT_EQ(Counts(cache), "free 5 cached 2 leased 1 limbo 0 evictable 0");
  EXPECT_EQ(cache.Match(0, Range(0, 10)), 8);
  Lease b = cache.Acquire(0, Range(0, 8), 7);  // one token is left to compute: only one whole page
  EXPECT_EQ(b.cached_len(), 4);
  EXPECT_EQ(b.capacity(), 4);
  EXPECT_EQ(Pages(b), std::vector<PageId>{0});
  ASSERT_TRUE(cache.Reserve(b, 9));
  EXPECT_EQ(b.capacity(), 12);
  cache.CheckInvariants();
  cache.Release(std::move(a), kNoStep);
  EXPECT_FALSE(a);
  cache.CheckInvariants();
  EXPECT_EQ(Counts(cache), "free 4 cached 2 leased 2 limbo 0 evictable 1");
  EXPECT_EQ(cache.AvailablePages(), 5);
}

TEST(CacheManagerTest, DuplicatesStayTheLeasesOwnAndItsTableIsNeverRepointed) {
  CacheManager cache(FullConfig(16, 2));
  const Keys keys = Range(0, 8);
  Lease a = cache.Acquire(0, keys, 7), b = cache.Acquire(0, keys, 7);
  ASSERT_TRUE(cache.Reserve(a, 8) && cache.Reserve(b, 8));
  const std::vector<PageId> before = Pages(b);
  cache.Commit(a, std::span(keys).first(6), 0);
  cache.Commit(b, keys, 0);  // three duplicates, then one new page below a's
  cache.CheckInvariants();
  EXPECT_EQ(Pages(b), before);
  EXPECT_EQ(cache.DebugString(), "namespace 0\n  0 1 2 3 4 5 [0 1 2] 2\n    6 7 [7] 1\n");
  EXPECT_EQ(Counts(cache), "free 8 cached 4 leased 4 limbo 0 evictable 0");
  cache.Release(std::move(b), kNoStep);
  cache.CheckInvariants();
  EXPECT_EQ(Counts(cache), "free 11 cached 4 leased 1 limbo 0 evictable 1");
}

TEST(CacheManagerTest, ReserveIsAllOrNothing) {
  CacheConfig config = MixedConfig(6, 2, 100);
  config.num_pages = {8, 5};
  CacheManager cache(config);
  cache.Release(Computed(cache, Range(0, 6)), kNoStep);
  Lease held = Computed(cache, Range(50, 54));
  const std::string tree = cache.DebugString();
  Lease lease = cache.Acquire(0, Range(90, 95), 4);
  EXPECT_FALSE(cache.Reserve(lease, 8));  // group 1: 0 free + 3 evictable < 4
  EXPECT_FALSE(cache.Reserve(lease, int64_t{1} << 60));
  EXPECT_EQ(cache.DebugString(), tree);
  EXPECT_EQ(lease.capacity(), 0);
  EXPECT_EQ(cache.AvailablePages(), 3);
  cache.CheckInvariants();
  EXPECT_TRUE(cache.Reserve(lease, 6));
  cache.CheckInvariants();
  EXPECT_EQ(cache.AvailablePages(), 0);
}

TEST(CacheManagerTest, APoolOfOnePage) {
  for (const CacheKind kind : {CacheKind::kRadix, CacheKind::kFlat, CacheKind::kNone}) {
    CacheManager cache(FullConfig(1, 4, kind));
    for (int32_t i = 0; i < 5; ++i) {
      Lease lease = cache.Acquire(0, Range(i, i + 5), 4);
      ASSERT_TRUE(cache.Reserve(lease, 4));
      EXPECT_FALSE(cache.Reserve(lease, 5));
      cache.Commit(lease, Range(i, i + 4), 0);
      cache.CheckInvariants();
      cache.Release(std::move(lease), kNoStep);
      cache.CheckInvariants();
    }
    EXPECT_EQ(cache.stats(0).cached, kind == CacheKind::kNone ? 0 : 1);
  }
}

TEST(CacheManagerTest, LimboHoldsPagesAndLocksUntilTheStepRetires) {
  CacheManager cache(FullConfig(8, 2));
  Lease lease = Computed(cache, Range(0, 5));  // two cached pages, one own
  cache.Release(std::move(lease), 7);
  cache.CheckInvariants();
  EXPECT_EQ(Counts(cache), "free 5 cached 2 leased 0 limbo 1 evictable 0");
  EXPECT_EQ(cache.Match(0, Range(0, 5)), 4);  // others may share it meanwhile
  cache.Retire(6);
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(0).limbo, 1);
  EXPECT_EQ(cache.Flush(), 0);
  Lease other = cache.Acquire(1, {}, 0);
  EXPECT_FALSE(cache.Reserve(other, 12));
  cache.Retire(7);
  cache.CheckInvariants();
  EXPECT_EQ(Counts(cache), "free 6 cached 2 leased 0 limbo 0 evictable 2");
  // A step that has retired already holds nothing.
  cache.Release(Computed(cache, Range(20, 25)), 7);
  EXPECT_EQ(cache.stats(0).limbo, 0);
  EXPECT_TRUE(cache.Reserve(other, 12));
  cache.CheckInvariants();
}

TEST(CacheManagerTest, LimboEmptiesByStepNotByOrderOfRelease) {
  CacheManager cache(FullConfig(8, 1));
  const auto own = [&](int64_t pages) {
    Lease lease = cache.Acquire(0, {}, 0);
    EXPECT_TRUE(cache.Reserve(lease, pages));
    return lease;
  };
  Lease a = own(1), b = own(2), c = own(3);
  cache.Release(std::move(a), 9);
  cache.Release(std::move(b), 4);
  cache.Release(std::move(c), 6);
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(0).limbo, 6);
  cache.Retire(5);
  EXPECT_EQ(cache.stats(0).limbo, 4);
  cache.Retire(8);
  EXPECT_EQ(cache.stats(0).limbo, 1);
  cache.Retire(9);
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(0).free, 8);
}

TEST(CacheManagerTest, DestroyingALeaseReleasesIt) {
  CacheManager cache(FullConfig(8, 2));
  {
    Lease lease = Computed(cache, Range(0, 5));
    Lease moved = std::move(lease);
    EXPECT_FALSE(lease);
    EXPECT_EQ(moved.pages(0).size(), 3u);
    moved = cache.Acquire(0, Range(0, 5), 4);  // releases what it held
    EXPECT_EQ(cache.stats(0).leased, 0);
    EXPECT_EQ(cache.stats(0).evictable, 0);
  }
  cache.CheckInvariants();
  EXPECT_EQ(Counts(cache), "free 6 cached 2 leased 0 limbo 0 evictable 2");
}

TEST(CacheManagerTest, ALeaseMayOutliveItsManagerWithoutHarm) {
  Lease lease;
  {
    CacheManager cache(FullConfig(4, 1));
    lease = cache.Acquire(0, Keys{1}, 1);
  }
  EXPECT_TRUE(static_cast<bool>(lease));
}

// ---- Fork ----

TEST(CacheManagerTest, ForkSharesWholePagesAndCopiesTheTail) {
  CacheManager cache(FullConfig(10, 4));
  const Keys keys = Range(0, 10);
  Lease parent = cache.Acquire(0, keys, 9);
  ASSERT_TRUE(cache.Reserve(parent, 10));
  std::vector<PageCopy> copies;
  Lease child = cache.Fork(parent, keys, 10, 3, &copies);
  cache.CheckInvariants();
  EXPECT_EQ(child.cached_len(), 10);
  EXPECT_EQ(child.capacity(), 12);
  EXPECT_EQ(Pages(child), (std::vector<PageId>{0, 1, 3}));
  ASSERT_EQ(copies.size(), 1u);
  EXPECT_EQ(copies[0].group, 0);
  EXPECT_EQ(copies[0].src, 2);
  EXPECT_EQ(copies[0].dst, 3);

  // In the middle of what the parent committed: its node is split, its table stays.
  Lease early = cache.Fork(parent, keys, 6, 3, &copies);
  cache.CheckInvariants();
  EXPECT_EQ(Pages(early), (std::vector<PageId>{0, 4}));
  EXPECT_EQ(copies.back().src, 1);
  EXPECT_EQ(Pages(parent), (std::vector<PageId>{0, 1, 2}));
  Lease none = cache.Fork(parent, keys, 0, 3, &copies);
  EXPECT_EQ(none.capacity(), 0);
  EXPECT_EQ(copies.size(), 2u);
  cache.CheckInvariants();

  // The children go their own ways below.
  Keys left = keys, right(keys.begin(), keys.begin() + 6);
  left.insert(left.end(), {100, 101, 102});
  right.insert(right.end(), {200, 201, 202});
  ASSERT_TRUE(cache.Reserve(child, 13) && cache.Reserve(early, 9));
  cache.Commit(child, left, 4);
  cache.Commit(early, right, 4);
  cache.CheckInvariants();
  EXPECT_EQ(cache.Match(0, left), 12);
  EXPECT_EQ(cache.Match(0, right), 8);
}

TEST(CacheManagerTest, ForkWithoutPagesGivesAnEmptyLease) {
  CacheManager cache(FullConfig(3, 4));
  const Keys keys = Range(0, 10);
  Lease parent = cache.Acquire(0, keys, 9);
  ASSERT_TRUE(cache.Reserve(parent, 10));
  std::vector<PageCopy> copies;
  EXPECT_FALSE(cache.Fork(parent, keys, 10, kNoStep, &copies));
  EXPECT_TRUE(copies.empty());
  cache.CheckInvariants();
  EXPECT_TRUE(cache.Fork(parent, keys, 8, kNoStep, &copies));  // an aligned fork needs none
  cache.CheckInvariants();
}

TEST(CacheManagerTest, ForkWithoutSharingCopiesEveryPage) {
  CacheManager cache(MixedConfig(16, 4, 6, CacheKind::kNone));
  const Keys keys = Range(0, 18);
  Lease parent = Computed(cache, keys);
  cache.SlideWindow(parent, 18, kNoStep);
  EXPECT_EQ(parent.first_page(1), 3);
  std::vector<PageCopy> copies;
  Lease child = cache.Fork(parent, keys, 18, kNoStep, &copies);
  cache.CheckInvariants();
  ASSERT_TRUE(static_cast<bool>(child));
  EXPECT_EQ(child.cached_len(), 18);
  EXPECT_EQ(child.first_page(1), 3);
  EXPECT_EQ(copies.size(), 5u + 2u);
  for (const PageCopy& copy : copies) EXPECT_NE(copy.src, copy.dst);
  EXPECT_FALSE(cache.Fork(parent, keys, 8, kNoStep, &copies));  // the window has left [3, 8)
  cache.CheckInvariants();
  EXPECT_EQ(copies.size(), 7u);
}

// ---- Truncate ----

TEST(CacheManagerTest, TruncateDropsUncommittedPages) {
  CacheManager cache(FullConfig(8, 2));
  Lease lease = cache.Acquire(0, Range(0, 12), 11);
  ASSERT_TRUE(cache.Reserve(lease, 12));
  cache.Commit(lease, Range(0, 5), 0);
  cache.Truncate(lease, 5, 3);
  cache.CheckInvariants();
  EXPECT_EQ(lease.capacity(), 6);
  EXPECT_EQ(Counts(cache), "free 2 cached 2 leased 1 limbo 3 evictable 0");
  cache.Truncate(lease, 4, kNoStep);
  EXPECT_EQ(Counts(cache), "free 3 cached 2 leased 0 limbo 3 evictable 0");
  EXPECT_THROW(cache.Truncate(lease, 2, kNoStep), InvalidArgument);
  EXPECT_THROW(cache.Truncate(lease, -1, kNoStep), InvalidArgument);
  cache.Truncate(lease, 100, kNoStep);  // nothing past it
  cache.CheckInvariants();
  EXPECT_EQ(lease.capacity(), 4);
}

TEST(CacheManagerTest, TruncateIntoASharedPrefixUnlocksTheRest) {
  CacheManager cache(FullConfig(16, 2));
  cache.Release(Computed(cache, Range(0, 8)), kNoStep);
  Lease lease = cache.Acquire(0, Range(0, 8), 8);
  EXPECT_EQ(cache.stats(0).evictable, 0);
  cache.Truncate(lease, 3, 5);  // a running step still reads the rest
  cache.CheckInvariants();
  EXPECT_EQ(lease.capacity(), 4);
  EXPECT_EQ(cache.stats(0).evictable, 0);
  cache.Retire(5);
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(0).evictable, 2);
  // And goes on from there with keys of its own.
  ASSERT_TRUE(cache.Reserve(lease, 6));
  cache.Commit(lease, Keys{0, 1, 2, 3, 70, 71}, 6);
  cache.CheckInvariants();
  EXPECT_EQ(cache.Match(0, Keys{0, 1, 2, 3, 70, 71}), 6);
  EXPECT_EQ(cache.Match(0, Range(0, 8)), 8);
}

// ---- Windows ----

TEST(CacheManagerTest, SlideWindowGivesUpWhatNoQueryCanSee) {
  CacheManager cache(MixedConfig(32, 2, 5));
  Lease lease = cache.Acquire(0, Range(0, 12), 11);
  ASSERT_TRUE(cache.Reserve(lease, 12));
  cache.SlideWindow(lease, 5, kNoStep);  // the query at 5 sees 1..5: page 0 still has token 1
  EXPECT_EQ(lease.first_page(1), 0);
  cache.SlideWindow(lease, 6, kNoStep);
  EXPECT_EQ(lease.first_page(1), 1);
  EXPECT_EQ(lease.pages(1)[0], kNoPage);
  EXPECT_EQ(lease.first_page(0), 0);
  EXPECT_NE(lease.pages(0)[0], kNoPage);
  EXPECT_EQ(Counts(cache, 1), "free 27 cached 0 leased 5 limbo 0 evictable 0");
  cache.SlideWindow(lease, 10, 4);
  cache.CheckInvariants();
  EXPECT_EQ(lease.first_page(1), 3);
  EXPECT_EQ(Counts(cache, 1), "free 27 cached 0 leased 3 limbo 2 evictable 0");
  cache.SlideWindow(lease, 2, 4);  // never back
  EXPECT_EQ(lease.first_page(1), 3);
  cache.Commit(lease, Range(0, 12), 4);  // what has slid away enters the tree as tombstones
  cache.CheckInvariants();
  EXPECT_EQ(cache.Match(0, Range(0, 12)), 12);
  EXPECT_EQ(cache.Match(0, Range(0, 9)), 0);  // needs page 2
  cache.Retire(4);
  EXPECT_EQ(Counts(cache, 1), "free 29 cached 3 leased 0 limbo 0 evictable 0");
}

TEST(CacheManagerTest, SlideWindowUnlocksSharedNodesWhenTheStepRetires) {
  CacheManager cache(MixedConfig(32, 1, 8));  // nodes of 2 pages
  Lease lease = Computed(cache, Range(0, 20));
  EXPECT_EQ(cache.num_tree_nodes(), 10);
  EXPECT_EQ(cache.stats(1).evictable, 0);
  cache.SlideWindow(lease, 15, 3);  // needs [8, 20)
  cache.CheckInvariants();
  EXPECT_EQ(lease.first_page(1), 8);
  EXPECT_EQ(cache.stats(1).evictable, 0);
  cache.Retire(3);
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(1).evictable, 8);
  EXPECT_EQ(cache.stats(0).evictable, 0);
  cache.SlideWindow(lease, 20, kNoStep);  // needs [13, 20); node [12, 14) overlaps
  cache.CheckInvariants();
  EXPECT_EQ(lease.first_page(1), 13);
  EXPECT_EQ(cache.stats(1).evictable, 12);
  Lease other = cache.Acquire(1, {}, 0);
  ASSERT_TRUE(cache.Reserve(other, 12));  // fits the full group only without taking locked pages
  EXPECT_FALSE(cache.Reserve(other, 13));
  cache.CheckInvariants();
}

TEST(CacheManagerTest, CommitAfterTheWindowHasMovedOnLocksOnlyWhatIsStillNeeded) {
  CacheManager cache(MixedConfig(64, 1, 8));  // nodes of 2 pages
  const Keys keys = Range(0, 20);
  Lease lease = cache.Acquire(0, keys, 0);
  ASSERT_TRUE(cache.Reserve(lease, 20));
  cache.Commit(lease, Range(0, 1), 0);
  cache.SlideWindow(lease, 20, kNoStep);
  EXPECT_EQ(cache.stats(1).evictable, 1);
  cache.Commit(lease, keys, 0);  // may not go on in the node of page 0, which it no longer locks
  cache.CheckInvariants();
  EXPECT_EQ(cache.Match(0, keys), 20);
  EXPECT_EQ(cache.stats(1).cached, 1 + 7);
  EXPECT_EQ(cache.stats(1).evictable, 1);

  // The same over nodes that are there already.
  cache.Release(Computed(cache, Range(100, 120)), kNoStep);
  EXPECT_EQ(cache.stats(1).evictable, 1 + 20);
  Lease second = cache.Acquire(0, Range(100, 120), 0);
  ASSERT_TRUE(cache.Reserve(second, 20));
  cache.SlideWindow(second, 20, kNoStep);
  cache.Commit(second, Range(100, 120), 0);
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(1).evictable, 1 + 12);  // locked: [12, 20), the nodes that overlap [13, 20)
}

TEST(CacheManagerTest, ALongRowNeedsOnlyItsWindowsPages) {
  CacheManager cache([] {
    CacheConfig config = MixedConfig(600, 1, 16);
    config.num_pages[1] = 16 + 4 + 2;  // the window, a node's slack, the page in limbo and the next one
    return config;
  }());
  Keys keys;
  Lease lease = cache.Acquire(0, keys, 0);
  for (int32_t i = 0; i < 500; ++i) {
    keys.push_back(i % 7);
    ASSERT_TRUE(cache.Reserve(lease, i + 1)) << i;
    cache.Commit(lease, keys, i);
    cache.SlideWindow(lease, i + 1, i);
    cache.CheckInvariants();
    if (i > 0) cache.Retire(i - 1);
  }
  EXPECT_LT(cache.num_tree_nodes(), 500 / 4 + 2);
}

TEST(CacheManagerTest, ForkCopiesWindowPagesThatOnlyTheParentHas) {
  CacheConfig config = MixedConfig(32, 1, 4);
  config.num_pages[1] = 13;
  CacheManager cache(config);
  const Keys keys = Range(0, 6);
  Lease first = Computed(cache, keys);   // owns the nodes and lives on
  Lease second = cache.Acquire(0, {}, 0);
  ASSERT_TRUE(cache.Reserve(second, 6));
  cache.SlideWindow(first, 100, kNoStep);
  {
    Lease other = cache.Acquire(1, {}, 0);
    ASSERT_TRUE(cache.Reserve(other, 7));  // evicts every window page of the tree
  }
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(1).cached, 0);
  cache.Commit(second, keys, 0);  // the owner lives: tombstones stay, second keeps its pages
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(1).cached, 0);
  std::vector<PageCopy> copies;
  Lease child = cache.Fork(second, keys, 6, kNoStep, &copies);
  cache.CheckInvariants();
  ASSERT_TRUE(static_cast<bool>(child));
  ASSERT_EQ(copies.size(), 3u);  // [3, 6)
  for (const PageCopy& copy : copies) EXPECT_EQ(copy.group, 1);
  EXPECT_EQ(copies[0].src, second.pages(1)[3]);
  EXPECT_EQ(child.pages(0)[0], first.pages(0)[0]);
}

// ---- Invalidate ----

TEST(CacheManagerTest, InvalidateTakesTheLeadersNodesAndAllBelow) {
  CacheManager cache(FullConfig(32, 2));
  cache.Release(Computed(cache, Range(0, 4)), kNoStep);  // healthy pages of an earlier row
  Lease leader = Computed(cache, Range(0, 8));
  Lease sharer = Computed(cache, Range(0, 12));          // shares the leader's pages, computes more below
  Lease healthy = Computed(cache, Range(0, 4));
  Lease early = cache.Acquire(0, Range(0, 5), 5);
  const std::vector<PageId> table = Pages(sharer);
  cache.Invalidate(std::move(leader), 5);
  cache.CheckInvariants();
  EXPECT_FALSE(sharer.valid());
  EXPECT_TRUE(healthy.valid());
  EXPECT_TRUE(early.valid());
  EXPECT_EQ(cache.Match(0, Range(0, 12)), 4);
  EXPECT_EQ(Pages(sharer), table);  // a running step still reads them
  EXPECT_EQ(Counts(cache), "free 26 cached 2 leased 0 limbo 4 evictable 0");
  cache.Retire(5);
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(0).limbo, 4);  // the sharer has not let go
  EXPECT_TRUE(cache.Reserve(sharer, 14));
  cache.Commit(sharer, Range(0, 14), 6);  // worthless, so not kept
  cache.CheckInvariants();
  EXPECT_EQ(cache.Match(0, Range(0, 14)), 4);
  std::vector<PageCopy> copies;
  EXPECT_THROW(cache.Fork(sharer, Range(0, 14), 14, kNoStep, &copies), InvalidArgument);
  cache.Truncate(sharer, 13, kNoStep);
  // Somebody else computes the same keys again while the old ones are still held.
  Lease again = Computed(cache, Range(0, 8));
  EXPECT_TRUE(again.valid());
  EXPECT_EQ(cache.Match(0, Range(0, 12)), 8);
  cache.Invalidate(std::move(sharer), 8);
  cache.CheckInvariants();
  EXPECT_EQ(cache.Match(0, Range(0, 12)), 8);
  cache.Retire(8);
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(0).limbo, 0);
  cache.Release(std::move(again), kNoStep);
  cache.Release(std::move(healthy), kNoStep);
  cache.Release(std::move(early), kNoStep);
  EXPECT_EQ(Counts(cache), "free 28 cached 4 leased 0 limbo 0 evictable 4");
  cache.CheckInvariants();
}

TEST(CacheManagerTest, AReleasedRowsNodesCannotBeInvalidatedAnyMore) {
  CacheManager cache(FullConfig(32, 2));
  cache.Release(Computed(cache, Range(0, 8)), 1);
  Lease follower = Computed(cache, Range(0, 10));
  cache.Invalidate(std::move(follower), kNoStep);
  cache.CheckInvariants();
  EXPECT_EQ(cache.Match(0, Range(0, 10)), 8);
}

TEST(CacheManagerTest, InvalidateOfAForkedParentReachesItsChild) {
  for (const CacheKind kind : {CacheKind::kRadix, CacheKind::kFlat}) {
    CacheManager cache(FullConfig(32, 2, kind));
    Lease parent = Computed(cache, Range(0, 7));
    std::vector<PageCopy> copies;
    Lease child = cache.Fork(parent, Range(0, 7), 7, 1, &copies);
    Lease grandchild = cache.Fork(child, Range(0, 7), 5, 1, &copies);
    cache.Invalidate(std::move(parent), 2);
    cache.CheckInvariants();
    EXPECT_FALSE(child.valid());
    EXPECT_FALSE(grandchild.valid());
    cache.Invalidate(std::move(child), 2);
    cache.Retire(2);
    cache.Truncate(grandchild, 3, kNoStep);  // splits an invalidated path
    cache.CheckInvariants();
    EXPECT_FALSE(grandchild.valid());
    cache.Invalidate(std::move(grandchild), kNoStep);
    cache.CheckInvariants();
    EXPECT_EQ(cache.stats(0).free, 32);
  }
}

// ---- Kinds ----

TEST(CacheManagerTest, TheFlatTableMatchesAsTheTreeDoes) {
  CacheManager flat(FullConfig(64, 4, CacheKind::kFlat)), radix(FullConfig(64, 4));
  const std::vector<Keys> rows = {Range(0, 17), Range(0, 9), Range(3, 30), Keys(20, 7), Keys(13, 7)};
  for (const Keys& keys : rows) {
    for (CacheManager* cache : {&flat, &radix}) cache->Release(Computed(*cache, keys), kNoStep);
    for (const Keys& other : rows) EXPECT_EQ(flat.Match(0, other), radix.Match(0, other));
    EXPECT_EQ(flat.stats(0).cached, radix.stats(0).cached);
  }
  EXPECT_EQ(flat.num_tree_nodes(), flat.stats(0).cached);
  EXPECT_LT(radix.num_tree_nodes(), radix.stats(0).cached);
}

TEST(CacheManagerTest, KindNoneSharesNothing) {
  CacheManager cache(FullConfig(8, 2, CacheKind::kNone));
  Lease a = Computed(cache, Range(0, 8));
  EXPECT_EQ(cache.Match(0, Range(0, 8)), 0);
  Lease b = cache.Acquire(0, Range(0, 8), 8);
  EXPECT_EQ(b.cached_len(), 0);
  EXPECT_TRUE(a.valid());
  cache.Invalidate(std::move(a), 3);
  EXPECT_EQ(Counts(cache), "free 4 cached 0 leased 0 limbo 4 evictable 0");
  cache.Retire(3);
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(0).free, 8);
}

// ---- Flush, events, hashes ----

TEST(CacheManagerTest, FlushDropsWhatIsUnlocked) {
  CacheManager cache(MixedConfig(32, 2, 4));
  cache.Release(Computed(cache, Range(0, 8)), kNoStep);
  cache.Release(Computed(cache, Range(20, 28)), kNoStep);
  Lease held = Computed(cache, Range(0, 8));
  EXPECT_EQ(held.first_page(1), 2);
  EXPECT_EQ(cache.Flush(), 4 + 4 + 2);
  cache.CheckInvariants();
  EXPECT_EQ(cache.Match(0, Range(0, 8)), 8);
  EXPECT_EQ(cache.Match(0, Range(20, 28)), 0);
  cache.Release(std::move(held), kNoStep);
  EXPECT_EQ(cache.Flush(), 4 + 2);
  EXPECT_EQ(cache.DebugString(), "");
}

TEST(CacheManagerTest, EventsChainAndBalance) {
  CacheConfig config = MixedConfig(12, 2, 5);
  config.record_events = true;
  CacheManager cache(config);
  const Keys keys = Range(0, 9);
  const std::vector<PageHash> hashes = cache.HashPages(0, keys);
  ASSERT_EQ(hashes.size(), 4u);
  Lease lease = Computed(cache, keys);
  std::vector<CacheEvent> events = cache.TakeEvents();
  ASSERT_EQ(events.size(), 8u);
  EXPECT_TRUE(cache.TakeEvents().empty());
  for (const CacheEvent& event : events) {
    EXPECT_EQ(event.kind, CacheEvent::Kind::kStored);
    const auto page = static_cast<size_t>(event.first_token / 2);
    EXPECT_EQ(event.hash, hashes[page]);
    EXPECT_EQ(event.parent, page == 0 ? PageHash() : hashes[page - 1]);
  }
  Lease split = cache.Acquire(0, keys, 3);  // splitting moves nothing in or out
  EXPECT_TRUE(cache.TakeEvents().empty());
  cache.Release(std::move(split), kNoStep);
  cache.Release(std::move(lease), kNoStep);
  Lease other = cache.Acquire(1, {}, 0);
  ASSERT_TRUE(cache.Reserve(other, 20));
  std::multiset<std::pair<int, uint64_t>> stored, removed;
  for (const CacheEvent& event : events) stored.insert({event.group, event.hash.lo});
  events = cache.TakeEvents();
  cache.Flush();
  for (const CacheEvent& event : cache.TakeEvents()) events.push_back(event);
  for (const CacheEvent& event : events) {
    EXPECT_EQ(event.kind, CacheEvent::Kind::kRemoved);
    const auto page = static_cast<size_t>(event.first_token / 2);
    EXPECT_EQ(event.hash, hashes[page]);
    EXPECT_EQ(event.parent, page == 0 ? PageHash() : hashes[page - 1]);
    removed.insert({event.group, event.hash.lo});
  }
  EXPECT_EQ(stored, removed);
}

TEST(CacheManagerTest, HashesCoverNamespaceAndEveryKeyBefore) {
  CacheManager cache(FullConfig(4, 3));
  const Keys keys = Range(0, 9);
  const auto base = cache.HashPages(5, keys);
  EXPECT_EQ(base, cache.HashPages(5, Range(0, 11)));  // whole pages only
  EXPECT_NE(base[0], cache.HashPages(6, keys)[0]);
  for (size_t i = 0; i < keys.size(); ++i) {
    Keys changed = keys;
    changed[i] ^= 1 << 20;
    const auto other = cache.HashPages(5, changed);
    for (size_t page = 0; page < 3; ++page) EXPECT_EQ(other[page] == base[page], page < i / 3) << i;
  }
  // Many near keys, no collision in either half.
  std::set<uint64_t> lo, hi;
  for (int32_t i = 0; i < 20000; ++i) {
    const PageHash hash = cache.HashPages(0, Keys{i & 31, i >> 5 & 31, i >> 10})[0];
    lo.insert(hash.lo);
    hi.insert(hash.hi);
  }
  EXPECT_EQ(lo.size(), 20000u);
  EXPECT_EQ(hi.size(), 20000u);
  // Other processes compute these too: changing the function is changing a format.
  EXPECT_EQ(cache.HashPages(0, Keys{1, 2, 3})[0].lo, 17060712047068908107u);
  EXPECT_EQ(cache.HashPages(0, Keys{1, 2, 3})[0].hi, 5805935353927200249u);
}

// ---- Failure ----

// One of everything that allocates, going on after each refusal. Returns whether anything was refused.
bool Scenario(CacheManager& cache) {
  bool refused = false;
  const auto reserve = [&](Lease& lease, int64_t tokens) {
    const int64_t capacity = lease.capacity();
    const std::string tree = cache.DebugString();
    const bool ok = cache.Reserve(lease, tokens);
    cache.CheckInvariants();
    if (!ok) {
      refused = true;
      EXPECT_EQ(lease.capacity(), capacity);
      EXPECT_EQ(cache.DebugString(), tree);
    }
    return ok;
  };
  const auto commit = [&](Lease& lease, const Keys& keys, int64_t step) {
    cache.Commit(lease, std::span(keys).first(std::min<size_t>(keys.size(), static_cast<size_t>(lease.capacity()))),
                 step);
    cache.CheckInvariants();
  };
  std::vector<PageCopy> copies;
  Lease old = cache.Acquire(0, Range(500, 520), 19);  // something to evict
  reserve(old, 16);
  commit(old, Range(500, 516), 0);
  cache.Release(std::move(old), kNoStep);
  cache.CheckInvariants();
  Lease a = cache.Acquire(0, Range(0, 9), 8);
  reserve(a, 9);
  commit(a, Range(0, 9), 1);
  Lease b = cache.Acquire(0, Range(0, 12), 11);
  reserve(b, 13);
  commit(b, Range(0, 13), 1);
  Lease c = a.capacity() >= 7 ? cache.Fork(a, Range(0, 7), 7, 1, &copies) : Lease();
  refused = refused || !c;
  cache.CheckInvariants();
  Lease d = b.capacity() >= 10 ? cache.Fork(b, Range(0, 10), 10, 2, &copies) : Lease();
  refused = refused || !d;
  cache.CheckInvariants();
  cache.Release(std::move(a), 2);
  cache.CheckInvariants();
  if (c) {
    reserve(c, 12);
    Keys keys = Range(0, 7);
    keys.insert(keys.end(), {90, 91, 92, 93, 94});
    commit(c, keys, 3);
    cache.SlideWindow(c, 10, 3);
    cache.CheckInvariants();
  }
  cache.Retire(2);
  cache.CheckInvariants();
  Lease e = cache.Acquire(0, Range(0, 30), 29);
  for (int64_t tokens = 1; tokens < 26; tokens += 3) reserve(e, tokens);  // has to evict
  cache.Truncate(e, 20, 4);
  cache.CheckInvariants();
  if (d) cache.Invalidate(std::move(d), 4);
  cache.CheckInvariants();
  reserve(e, 24);
  if (b) cache.Invalidate(std::move(b), 4);
  cache.CheckInvariants();
  cache.Release(std::move(e), 5);
  if (c) cache.Release(std::move(c), 5);
  cache.CheckInvariants();
  cache.Retire(5);
  cache.CheckInvariants();
  cache.Flush();
  cache.CheckInvariants();
  return refused;
}

TEST(CacheManagerTest, AnAllocationThatFailsAnywhereLeavesAConsistentState) {
  for (const CacheKind kind : {CacheKind::kRadix, CacheKind::kFlat, CacheKind::kNone}) {
    for (const int32_t window : {0, 6}) {
      SCOPED_TRACE(StrCat("kind ", static_cast<int>(kind), " window ", window));
      // The tightest pool in which nothing is refused, so that the scenario has to evict.
      CacheConfig config;
      for (int32_t pages = 1;; ++pages) {
        config = window == 0 ? FullConfig(pages, 2, kind) : MixedConfig(pages, 2, window, kind);
        CacheManager cache(config);
        if (!Scenario(cache)) break;
        ASSERT_LT(pages, 100);
      }
      int64_t k = 1;
      for (;; ++k) {
        SCOPED_TRACE(k);
        CacheManager cache(config);
        cache.TEST_FailAllocation(k);
        const bool refused = Scenario(cache);
        for (int g = 0; g < cache.num_groups(); ++g) {
          const PoolStats stats = cache.stats(g);
          ASSERT_EQ(stats.free, stats.total) << "group " << g << " leaks";
        }
        if (!refused) break;
        ASSERT_LT(k, 1000);
      }
      EXPECT_GT(k, 20);  // every page the scenario takes was refused once
    }
  }
}

TEST(CacheManagerTest, ArgumentsAreChecked) {
  EXPECT_THROW(CacheManager(CacheConfig{}), InvalidArgument);
  EXPECT_THROW(CacheManager(FullConfig(4, 0)), InvalidArgument);
  EXPECT_THROW(CacheManager(FullConfig(4, 65)), InvalidArgument);
  EXPECT_THROW(CacheManager(FullConfig(0, 4)), InvalidArgument);
  EXPECT_THROW(CacheManager(MixedConfig(4, 4, -1)), InvalidArgument);
  CacheConfig config = MixedConfig(4, 4, 8);
  config.groups[1].page_size = 8;
  EXPECT_THROW(CacheManager{config}, InvalidArgument);
  config = FullConfig(4, 4);
  config.num_pages.push_back(4);
  EXPECT_THROW(CacheManager{config}, InvalidArgument);
  config.groups.push_back({.kind = KvKind::kState, .page_size = 4});
  EXPECT_THROW(CacheManager{config}, InvalidArgument);

  CacheManager cache(FullConfig(4, 4)), other(FullConfig(4, 4));
  Lease empty;
  EXPECT_THROW(cache.Reserve(empty, 1), InvalidArgument);
  EXPECT_THROW(cache.Release(Lease(), kNoStep), InvalidArgument);
  Lease lease = cache.Acquire(0, {}, 0);
  EXPECT_THROW(cache.Commit(lease, Range(0, 4), 0), InvalidArgument);
  EXPECT_THROW(lease.pages(1), InvalidArgument);
  EXPECT_THROW(other.Reserve(lease, 4), InvalidArgument);
  EXPECT_THROW(other.Release(std::move(lease), kNoStep), InvalidArgument);
  cache.CheckInvariants();
  other.CheckInvariants();
  EXPECT_THROW(cache.stats(1), InvalidArgument);
}

}  // namespace
}  // namespace sapwood
