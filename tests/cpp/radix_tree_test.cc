// The tree's shape under sharing, splitting and eviction: the nine steps of the RadixAttention figure as a golden
// test, LRU order, the cost of eviction, window tombstones.

#include "cache/radix_tree.h"

#include <gtest/gtest.h>

#include <memory>

#include "base/check.h"
#include "cache/cache_manager.h"

namespace sapwood {
namespace {

using Keys = std::vector<int32_t>;

Keys Concat(std::initializer_list<Keys> parts) {
  Keys all;
  for (const Keys& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

CacheConfig OneFullGroup(int32_t num_pages, int32_t page_size = 1) {
  CacheConfig config;
  config.groups = {{.kind = KvKind::kFull, .page_size = page_size}};
  config.num_pages = {num_pages};
  return config;
}

// A whole life of a row: prompt and answer are `keys`, with room for `room` tokens (its output budget) while it runs.
void Serve(CacheManager& cache, const Keys& keys, int64_t room, int64_t expect_cached) {
  Lease lease = cache.Acquire(0, keys, static_cast<int64_t>(keys.size()) - 1);
  EXPECT_EQ(lease.cached_len(), expect_cached);
  ASSERT_TRUE(cache.Reserve(lease, room));
  cache.CheckInvariants();
  cache.Commit(lease, keys, 0);
  cache.CheckInvariants();
  cache.Release(std::move(lease), kNoStep);
  cache.CheckInvariants();
}

// The figure of RadixAttention operations at nine points in time in the SGLang paper (Zheng et al., NeurIPS 2024):
// two chat sessions, few-shot queries, self-consistency sampling. The pool of 22 one-token pages and the rows' output
// budgets are ours, chosen so that memory runs out where it does in the figure.
TEST(RadixTreeTest, NineStepsOfRadixAttention) {
  const Keys kSystem = {1, 2, 3};
  const Keys kHello = {11, 12};          // session 1, turn 1: question, answer
  const Keys kStory = {13, 14};          // session 1, turn 2
  const Keys kSecond = {21, 22};         // session 2, turn 1
  const Keys kSecondAgain = {23, 24};    // session 2, turn 2
  const Keys kExamples = {31, 32, 33};   // few-shot examples
  const Keys kQuestions[] = {{41, 42}, {51, 52}, {61, 62}};

  CacheManager cache(OneFullGroup(22));

  // (1) Empty.
  EXPECT_EQ(cache.DebugString(), "");

  // (2) Session 1 says hello: system prompt, question and answer become one node.
  Serve(cache, Concat({kSystem, kHello}), 5, 0);
  EXPECT_EQ(cache.DebugString(),
            "namespace 0\n"
            "  1 2 3 11 12 [0 1 2 3 4] 0\n");

  // (3) Its second turn reuses the first and appends a node.
  Serve(cache, Concat({kSystem, kHello, kStory}), 7, 5);
  EXPECT_EQ(cache.DebugString(),
            "namespace 0\n"
            "  1 2 3 11 12 [0 1 2 3 4] 0\n"
            "    13 14 [5 6] 0\n");

  // (4) Session 2 shares the system prompt: the first node is split.
  Serve(cache, Concat({kSystem, kSecond}), 5, 3);
  EXPECT_EQ(cache.DebugString(),
            "namespace 0\n"
            "  1 2 3 [0 1 2] 0\n"
            "    11 12 [3 4] 0\n"
            "      13 14 [5 6] 0\n"
            "    21 22 [7 8] 0\n");

  // (5) Session 2 goes on with a budget of 15 tokens where 13 pages are free: the least recently used node, turn 2
  // of session 1, is evicted.
  Serve(cache, Concat({kSystem, kSecond, kSecondAgain}), 20, 5);
  EXPECT_EQ(cache.DebugString(),
            "namespace 0\n"
            "  1 2 3 [0 1 2] 0\n"
            "    11 12 [3 4] 0\n"
            "    21 22 [7 8] 0\n"
            "      23 24 [5 6] 0\n");

  // (6) A few-shot query shares nothing: a second child of the root.
  Serve(cache, Concat({kExamples, kQuestions[0]}), 5, 0);
  EXPECT_EQ(cache.DebugString(),
            "namespace 0\n"
            "  1 2 3 [0 1 2] 0\n"
            "    11 12 [3 4] 0\n"
            "    21 22 [7 8] 0\n"
            "      23 24 [5 6] 0\n"
            "  31 32 33 41 42 [9 10 11 12 13] 0\n");

  // (7) A batch of two more queries with the same examples splits it.
  {
    const Keys second = Concat({kExamples, kQuestions[1]}), third = Concat({kExamples, kQuestions[2]});
    Lease a = cache.Acquire(0, second, 4), b = cache.Acquire(0, third, 4);
    EXPECT_EQ(a.cached_len(), 3);
    EXPECT_EQ(b.cached_len(), 3);
    ASSERT_TRUE(cache.Reserve(a, 5) && cache.Reserve(b, 5));
    cache.Commit(a, second, 0);
    cache.Commit(b, third, 0);
    cache.CheckInvariants();
    EXPECT_EQ(cache.DebugString(),
              "namespace 0\n"
              "  1 2 3 [0 1 2] 0\n"
              "    11 12 [3 4] 0\n"
              "    21 22 [7 8] 0\n"
              "      23 24 [5 6] 0\n"
              "  31 32 33 [9 10 11] 2\n"
              "    41 42 [12 13] 0\n"
              "    51 52 [14 15] 1\n"
              "    61 62 [16 17] 1\n");
    cache.Release(std::move(a), kNoStep);
    cache.Release(std::move(b), kNoStep);
  }

  // (8) Session 1 comes back; its budget of 8 tokens evicts both nodes of session 2, now least recently used.
  Serve(cache, Concat({kSystem, kHello, {17, 18}}), 13, 5);
  EXPECT_EQ(cache.DebugString(),
            "namespace 0\n"
            "  1 2 3 [0 1 2] 0\n"
            "    11 12 [3 4] 0\n"
            "      17 18 [7 8] 0\n"
            "  31 32 33 [9 10 11] 0\n"
            "    41 42 [12 13] 0\n"
            "    51 52 [14 15] 0\n"
            "    61 62 [16 17] 0\n");

  // (9) Three more answers to question 51 (self-consistency): the old answer and the other two queries make room.
  {
    const Keys question = Concat({kExamples, {51}});
    std::vector<PageCopy> copies;
    Lease a = cache.Acquire(0, question, 4);
    EXPECT_EQ(a.cached_len(), 4);
    Lease b = cache.Fork(a, question, 4, kNoStep, &copies);
    Lease c = cache.Fork(a, question, 4, kNoStep, &copies);
    EXPECT_TRUE(copies.empty());  // whole pages are shared
    ASSERT_TRUE(cache.Reserve(a, 8) && cache.Reserve(b, 8) && cache.Reserve(c, 7));
    cache.Commit(a, Concat({question, {71, 72}}), 0);
    cache.Commit(b, Concat({question, {73, 74}}), 0);
    cache.Commit(c, Concat({question, {75, 76}}), 0);
    cache.CheckInvariants();
    cache.Release(std::move(a), kNoStep);
    cache.Release(std::move(b), kNoStep);
    cache.Release(std::move(c), kNoStep);
    cache.CheckInvariants();
  }
  EXPECT_EQ(cache.DebugString(),
            "namespace 0\n"
            "  1 2 3 [0 1 2] 0\n"
            "    11 12 [3 4] 0\n"
            "      17 18 [7 8] 0\n"
            "  31 32 33 [9 10 11] 0\n"
            "    51 [14] 0\n"
            "      71 72 [5 6] 0\n"
            "      73 74 [12 13] 0\n"
            "      75 76 [16 17] 0\n");
}

// One row's worth of tree driving without a CacheManager: pages from the pool, straight into the tree.
class BareTree {
 public:
  explicit BareTree(const CacheConfig& config) {
    for (const int32_t count : config.num_pages) pools_.emplace_back(count);
    tree_ = std::make_unique<RadixTree>(config, &pools_, &events_);
  }

  void Add(const Keys& keys, uint64_t ns = 0) {
    const RadixTree::Found found = tree_->Match(ns, keys);
    PathLock lock;
    lock.LockAllGroups();
    lock.node = found.num_pages == 0 ? tree_->Root(ns) : tree_->CutAt(found.node, found.num_pages);
    tree_->Lock(lock);
    PageTables tables;
    tables.pages.resize(pools_.size());
    tree_->FillTables(lock.node, &tables);
    for (size_t g = 0; g < pools_.size(); ++g) {
      while (tables.pages[g].size() < keys.size()) tables.pages[g].push_back(pools_[g].Allocate());
    }
    tree_->Insert(&lock, keys, tables, 0, kNoStep);
    tree_->Unlock(lock);
  }

  void Check() const {
    std::vector<std::vector<bool>> seen;
    for (const PagePool& pool : pools_) seen.emplace_back(static_cast<size_t>(pool.total()), false);
    tree_->Check({}, &seen);
  }

  RadixTree& tree() { return *tree_; }
  PagePool& pool(size_t g = 0) { return pools_[g]; }

 private:
  std::vector<PagePool> pools_;
  std::vector<CacheEvent> events_;
  std::unique_ptr<RadixTree> tree_;
};

TEST(RadixTreeTest, EvictionVisitsOneNodePerPageWhateverTheTreesSize) {
  for (const int32_t branches : {10, 100, 1000, 10000}) {
    SCOPED_TRACE(branches);
    BareTree bare(OneFullGroup(branches * 4 + 2));
    for (int32_t i = 0; i < branches; ++i) bare.Add({-1, -2, i, i, i, i});
    ASSERT_EQ(bare.tree().num_nodes(), branches + 1);
    bare.tree().Evict(0, bare.pool().num_free() + 25);
    EXPECT_EQ(bare.tree().TEST_num_evict_visits(), 25);
    if (branches <= 1000) bare.Check();
  }
}

TEST(RadixTreeTest, SplittingAnUnlockedNodeKeepsTheOrderOfEviction) {
  for (const int32_t window : {0, 100}) {
    SCOPED_TRACE(window);
    CacheConfig config = OneFullGroup(16);
    if (window > 0) config.groups[0] = {.kind = KvKind::kWindow, .window = window, .page_size = 1};
    BareTree bare(config);
    bare.Add({1, 2, 3, 4, 5, 6});
    bare.Add({7, 8});
    bare.tree().CutAt(bare.tree().Match(0, Keys{1, 2, 3, 4, 5, 6}).node, 4);
    bare.tree().CutAt(bare.tree().Match(0, Keys{1, 2, 3, 4}).node, 2);
    EXPECT_EQ(bare.tree().num_nodes(), 4);
    bare.Check();
    bare.tree().Evict(0, bare.pool().num_free() + 3);  // full: 6 5 4; window: 1 2 3
    bare.Check();
    EXPECT_EQ(bare.tree().Match(0, Keys{1, 2, 3, 4, 5, 6}).num_pages, window == 0 ? 3 : 0);
    EXPECT_EQ(bare.pool().state(3), window == 0 ? PageState::kFree : PageState::kCached);
    EXPECT_EQ(bare.pool().state(2), window == 0 ? PageState::kCached : PageState::kFree);
    EXPECT_EQ(bare.tree().Match(0, Keys{7, 8}).num_pages, 2);
  }
}

TEST(RadixTreeTest, EvictsLeastRecentlyUsedLeavesFromTheirTails) {
  CacheManager cache(OneFullGroup(12));
  Serve(cache, {1, 2, 3, 4}, 4, 0);
  Serve(cache, {1, 2, 5, 6}, 4, 2);
  Serve(cache, {7, 8, 9}, 3, 0);
  cache.Release(cache.Acquire(0, Keys{1, 2, 3, 4}, 4), kNoStep);  // touched: 5 6 is now the oldest
  ASSERT_EQ(cache.stats(0).free, 3);
  const auto take = [&](int64_t pages) {
    Lease lease = cache.Acquire(9, {}, 0);
    EXPECT_TRUE(cache.Reserve(lease, pages));
    cache.CheckInvariants();
    cache.Release(std::move(lease), kNoStep);
  };
  take(4);
  EXPECT_EQ(cache.Match(0, Keys{1, 2, 5, 6}), 3);  // one page off the tail
  take(5);
  EXPECT_EQ(cache.Match(0, Keys{1, 2, 5, 6}), 2);
  EXPECT_EQ(cache.Match(0, Keys{7, 8, 9}), 3);
  take(7);
  EXPECT_EQ(cache.Match(0, Keys{7, 8, 9}), 1);
  EXPECT_EQ(cache.Match(0, Keys{1, 2, 3, 4}), 4);
  take(10);
  EXPECT_EQ(cache.Match(0, Keys{1, 2, 3, 4}), 2);
  take(12);
  EXPECT_EQ(cache.DebugString(), "");
}

TEST(RadixTreeTest, NamespacesShareNothing) {
  CacheManager cache(OneFullGroup(8));
  Serve(cache, {1, 2}, 2, 0);
  EXPECT_EQ(cache.Match(1, Keys{1, 2}), 0);
  Lease lease = cache.Acquire(1, Keys{1, 2}, 2);
  ASSERT_TRUE(cache.Reserve(lease, 2));
  cache.Commit(lease, Keys{1, 2}, 0);
  EXPECT_EQ(cache.DebugString(),
            "namespace 0\n  1 2 [0 1] 0\n"
            "namespace 1\n  1 2 [2 3] 1\n");
  cache.CheckInvariants();
}

TEST(RadixTreeTest, AnEmptyNamespaceDisappears) {
  CacheManager cache(OneFullGroup(8));
  for (uint64_t ns = 0; ns < 1000; ++ns) cache.Release(cache.Acquire(ns, Keys{1}, 1), kNoStep);
  EXPECT_EQ(cache.DebugString(), "");
}

TEST(RadixTreeTest, ManyChildrenOfOneNodeAreFound) {
  BareTree bare(OneFullGroup(20001));
  for (int32_t i = 0; i < 20000; ++i) bare.Add({5, i});
  for (int32_t i = 0; i < 20000; ++i) ASSERT_EQ(bare.tree().Match(0, Keys{5, i, 1}).num_pages, 2);
  EXPECT_EQ(bare.tree().Match(0, Keys{5, 20000}).num_pages, 1);
  EXPECT_EQ(bare.tree().Match(0, Keys{6}).num_pages, 0);
}

TEST(RadixTreeTest, KeysDifferingWithinAPageShareNoPage) {
  CacheManager cache(OneFullGroup(16, 4));
  Serve(cache, {1, 2, 3, 4, 5, 6, 7, 8}, 8, 0);
  EXPECT_EQ(cache.Match(0, Keys{1, 2, 3, 4, 5, 6, 7, 8}), 8);
  EXPECT_EQ(cache.Match(0, Keys{1, 2, 3, 4, 5, 6, 7}), 4);
  EXPECT_EQ(cache.Match(0, Keys{1, 2, 3, 4, 5, 6, 7, 9}), 4);
  EXPECT_EQ(cache.Match(0, Keys{1, 2, 3, 9, 5, 6, 7, 8}), 0);
  Serve(cache, {1, 2, 3, 9, 5, 6, 7, 8}, 8, 0);
  EXPECT_EQ(cache.num_tree_nodes(), 2);
}

TEST(RadixTreeTest, ARowGrowsItsOwnLeafInPlace) {
  CacheManager cache(OneFullGroup(64));
  Keys keys;
  Lease lease = cache.Acquire(0, keys, 0);
  for (int32_t i = 0; i < 40; ++i) {
    keys.push_back(i);
    ASSERT_TRUE(cache.Reserve(lease, i + 1));
    cache.Commit(lease, keys, i);
    cache.CheckInvariants();
    EXPECT_EQ(cache.num_tree_nodes(), 1);
  }
  Lease other = cache.Acquire(0, keys, 40);  // now somebody else ends where it ends
  keys.push_back(40);
  ASSERT_TRUE(cache.Reserve(lease, 41));
  cache.Commit(lease, keys, 41);
  cache.CheckInvariants();
  EXPECT_EQ(cache.num_tree_nodes(), 2);
}

// ---- Windows ----

CacheConfig FullAndWindow(int32_t page_size, int32_t window, int32_t full_pages, int32_t window_pages) {
  CacheConfig config;
  config.groups = {{.kind = KvKind::kFull, .page_size = page_size},
                   {.kind = KvKind::kWindow, .window = window, .page_size = page_size}};
  config.num_pages = {full_pages, window_pages};
  return config;
}

TEST(RadixTreeTest, AWindowGroupLosesPagesFrontToBackAndMatchesWhatIsStillValid) {
  // Window 4, page 1: the query at position L sees L - 3 .. L, so a prefix of L tokens needs the last 3.
  CacheManager cache(FullAndWindow(1, 4, 32, 8));
  const Keys keys = {1, 2, 3, 4, 5, 6, 7, 8};
  Serve(cache, keys, 8, 0);
  EXPECT_EQ(cache.Match(0, keys), 8);
  for (int64_t len = 0; len <= 8; ++len) EXPECT_EQ(cache.Match(0, std::span(keys).first(len)), len);

  // Another row's two window pages cost this one the first two.
  Lease other = cache.Acquire(1, {}, 0);
  ASSERT_TRUE(cache.Reserve(other, 2));
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(1).cached, 6);
  EXPECT_EQ(cache.stats(0).cached, 8);
  EXPECT_EQ(cache.Match(0, keys), 8);
  EXPECT_EQ(cache.Match(0, std::span(keys).first(5)), 5);  // needs [2, 5)
  EXPECT_EQ(cache.Match(0, std::span(keys).first(4)), 0);  // needs [1, 4)

  ASSERT_TRUE(cache.Reserve(other, 5));
  cache.CheckInvariants();
  EXPECT_EQ(cache.Match(0, keys), 8);  // needs [5, 8)
  EXPECT_EQ(cache.Match(0, std::span(keys).first(7)), 0);
  ASSERT_TRUE(cache.Reserve(other, 6));
  cache.CheckInvariants();
  EXPECT_EQ(cache.Match(0, keys), 0);
}

TEST(RadixTreeTest, TombstonesAreFilledByTheNextRowThatComputesThem) {
  CacheManager cache(FullAndWindow(1, 4, 32, 8));
  const Keys keys = {1, 2, 3, 4, 5, 6, 7, 8};
  Serve(cache, keys, 8, 0);
  {
    Lease other = cache.Acquire(1, {}, 0);
    ASSERT_TRUE(cache.Reserve(other, 6));
  }
  EXPECT_EQ(cache.Match(0, std::span(keys).first(5)), 0);
  Serve(cache, {1, 2, 3, 4, 5}, 5, 0);  // finds the nodes there, without window pages
  EXPECT_EQ(cache.stats(0).cached, 8);  // its full pages were duplicates
  EXPECT_EQ(cache.stats(1).cached, 7);
  EXPECT_EQ(cache.Match(0, std::span(keys).first(5)), 5);
  EXPECT_EQ(cache.Match(0, keys), 5);  // page 5 is still missing
}

TEST(RadixTreeTest, TombstonesInsideANode) {
  // Window 17, page 1: nodes of up to 4 pages; a prefix of L tokens needs the last 16.
  CacheManager cache(FullAndWindow(1, 17, 64, 24));
  Keys keys;
  for (int32_t i = 0; i < 24; ++i) keys.push_back(i);
  Serve(cache, keys, 24, 0);
  EXPECT_EQ(cache.num_tree_nodes(), 6);
  Lease lease = cache.Acquire(0, keys, 24);
  EXPECT_EQ(lease.cached_len(), 24);
  EXPECT_EQ(lease.first_page(1), 8);
  EXPECT_EQ(lease.first_page(0), 0);
  EXPECT_EQ(lease.pages(1)[7], kNoPage);
  EXPECT_NE(lease.pages(1)[8], kNoPage);
  EXPECT_EQ(cache.stats(1).evictable, 8);  // the first two nodes are not locked in the window group
  EXPECT_EQ(cache.stats(0).evictable, 0);

  Lease other = cache.Acquire(1, {}, 0);
  ASSERT_TRUE(cache.Reserve(other, 2));  // drops the first half of the first node
  cache.CheckInvariants();
  EXPECT_NE(cache.DebugString().find("\n  0 1 2 3 [0 1 2 3] [- - 2 3] 1,0\n"), std::string::npos);
  EXPECT_EQ(cache.Match(0, keys), 24);                       // needs [8, 24)
  EXPECT_EQ(cache.Match(0, std::span(keys).first(18)), 18);  // needs [2, 18)
  EXPECT_EQ(cache.Match(0, std::span(keys).first(17)), 0);   // needs [1, 17)
  EXPECT_FALSE(cache.Reserve(other, 9));
  ASSERT_TRUE(cache.Reserve(other, 8));
  cache.CheckInvariants();
  EXPECT_EQ(cache.Match(0, std::span(keys).first(22)), 0);
  EXPECT_EQ(cache.Match(0, keys), 24);
}

TEST(RadixTreeTest, ALeafWithoutWindowPagesIsRemovedWhole) {
  CacheManager cache(FullAndWindow(1, 4, 32, 8));
  const Keys keys = {1, 2, 3, 4, 5, 6, 7, 8};
  Serve(cache, keys, 8, 0);
  Lease other = cache.Acquire(1, {}, 0);
  ASSERT_TRUE(cache.Reserve(other, 7));
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(1).cached, 1);
  EXPECT_EQ(cache.stats(0).cached, 8);
  ASSERT_TRUE(cache.Reserve(other, 8));
  cache.CheckInvariants();
  EXPECT_EQ(cache.stats(1).cached, 0);
  EXPECT_EQ(cache.stats(0).cached, 0);  // no prefix could use them any more
  EXPECT_EQ(cache.num_tree_nodes(), 0);
}

TEST(RadixTreeTest, WindowPagesOfBranchesOutliveTheirStem) {
  CacheManager cache(FullAndWindow(1, 4, 32, 10));
  Serve(cache, {1, 2, 3, 4, 5}, 5, 0);
  Serve(cache, {1, 2, 3, 6, 7}, 5, 3);
  EXPECT_EQ(cache.stats(1).cached, 7);
  Lease other = cache.Acquire(1, {}, 0);
  ASSERT_TRUE(cache.Reserve(other, 5));  // the oldest are 4 5 of the first row, whose leaves go whole
  cache.CheckInvariants();
  EXPECT_EQ(cache.Match(0, Keys{1, 2, 3, 4, 5}), 3);
  ASSERT_TRUE(cache.Reserve(other, 6));  // then the stem, front first
  cache.CheckInvariants();
  EXPECT_EQ(cache.Match(0, Keys{1, 2, 3, 4, 5}), 0);
  EXPECT_EQ(cache.Match(0, Keys{1, 2, 3, 6, 7}), 5);
  EXPECT_EQ(cache.stats(0).cached, 5);
}

}  // namespace
}  // namespace sapwood
