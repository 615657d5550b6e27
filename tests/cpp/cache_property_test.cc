// Random operations on CacheManager against naive oracles, CheckInvariants after every one.
//
// Three oracles, each simple enough to be believed:
//   contents   what every physical page holds, by the hash of the prefix whose KV was last written there: a row must
//              find its own keys in its table, and no page may be written that anybody else still reads;
//   events     the set of cached pages as the stored/removed events tell it, from which the longest valid match is
//              found by trying every length;
//   exact      for one full group: a list of single pages with locks and LRU order, which predicts every eviction.
// A failure prints its seed; SAPWOOD_PROPERTY_OPS sets the operations per combination.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <set>

#include "base/check.h"
#include "cache/cache_manager.h"

namespace sapwood {
namespace {

using Keys = std::vector<int32_t>;

struct HashLess {
  bool operator()(const PageHash& a, const PageHash& b) const {
    return std::tie(a.lo, a.hi) < std::tie(b.lo, b.hi);
  }
};

enum class Shape { kChains, kSmallAlphabet, kRandom, kSharedPrefix, kRepeated, kSingle };
constexpr Shape kShapes[] = {Shape::kChains,       Shape::kSmallAlphabet, Shape::kRandom,
                             Shape::kSharedPrefix, Shape::kRepeated,      Shape::kSingle};

class Generator {
 public:
  Generator(Shape shape, int32_t page_size, std::mt19937_64* random)
      : shape_(shape), page_size_(page_size), random_(*random) {}

  int32_t KeyAt(int64_t position) {
    switch (shape_) {
      case Shape::kChains: return static_cast<int32_t>(position);
      // Whole pages agree often enough only if a page's keys are drawn together.
      case Shape::kSmallAlphabet:
        if (position % page_size_ == 0) letter_ = static_cast<int32_t>(random_() % 2);
        return letter_;
      case Shape::kRandom: return static_cast<int32_t>(random_());
      case Shape::kSharedPrefix:
        return position < 5 * page_size_ ? static_cast<int32_t>(position) : static_cast<int32_t>(random_() % 3);
      case Shape::kRepeated: return 7;
      case Shape::kSingle: return static_cast<int32_t>(random_() % 5);
    }
    return 0;
  }

  Keys Prompt() {
    const auto page = static_cast<uint64_t>(page_size_);
    const uint64_t length = shape_ == Shape::kSingle ? 1 + random_() % 2 : 1 + random_() % (8 * page);
    Keys keys;
    Extend(&keys, static_cast<int64_t>(length));
    return keys;
  }

  void Extend(Keys* keys, int64_t length) {
    while (static_cast<int64_t>(keys->size()) < length) keys->push_back(KeyAt(static_cast<int64_t>(keys->size())));
  }

 private:
  Shape shape_;
  int32_t page_size_;
  std::mt19937_64& random_;
  int32_t letter_ = 0;
};

// One full group as a list of pages. Mirrors the contract of cache_manager.h, nothing of the tree's structure.
class ExactOracle {
 public:
  struct Page {
    PageHash hash;
    int locks = 0;
    uint64_t writer = 0;
    bool cached = true;  // false: invalidated
    std::list<Page*>::iterator place;
  };
  using Path = std::vector<std::shared_ptr<Page>>;
  struct Row {
    Path path;             // the locked pages, from the root
    int64_t own = 0;       // pages in its table that are not in the tree
    int64_t size = 0;      // table length
  };

  explicit ExactOracle(int64_t total) : free_(total) {}

  int64_t free() const { return free_; }
  int64_t evictable() const { return static_cast<int64_t>(lru_.size()); }
  int64_t cached() const { return static_cast<int64_t>(pages_.size()); }
  int64_t limbo() const { return limbo_; }
  std::set<PageHash, HashLess> Hashes() const {
    std::set<PageHash, HashLess> all;
    for (const auto& [hash, page] : pages_) all.insert(hash);
    return all;
  }

  Row Acquire(const std::vector<PageHash>& hashes, int64_t limit) {
    Row row;
    for (int64_t i = 0; i < limit; ++i) {
      const auto it = pages_.find(hashes[static_cast<size_t>(i)]);
      if (it == pages_.end()) break;
      row.path.push_back(it->second);
      LockPage(it->second.get());
    }
    row.size = static_cast<int64_t>(row.path.size());
    return row;
  }

  void Take(Row* row, int64_t count) {
    while (free_ < count) {
      Page* victim = lru_.front();
      lru_.pop_front();
      pages_.erase(victim->hash);
      ++free_;
    }
    free_ -= count;
    row->own += count;
    row->size += count;
  }

  void Commit(Row* row, const std::vector<PageHash>& hashes, int64_t end, uint64_t writer) {
    for (auto i = static_cast<int64_t>(row->path.size()); i < end; ++i) {
      const PageHash& hash = hashes[static_cast<size_t>(i)];
      auto it = pages_.find(hash);
      if (it == pages_.end()) {
        auto page = std::make_shared<Page>();
        page->hash = hash;
        page->writer = writer;
        page->locks = 1;
        it = pages_.emplace(hash, std::move(page)).first;
        --row->own;
      } else {
        LockPage(it->second.get());
      }
      row->path.push_back(it->second);
    }
  }

  Row Fork(const Row& parent, int64_t at) {
    Row row;
    row.path.assign(parent.path.begin(), parent.path.begin() + at);
    for (const auto& page : row.path) LockPage(page.get());
    row.size = at;
    return row;
  }

  void Truncate(Row* row, int64_t size, int64_t step, int64_t retired) {
    int64_t own = row->size - std::max(size, static_cast<int64_t>(row->path.size()));
    own = std::max<int64_t>(own, 0);
    row->own -= own;
    row->size = size;
    Path cut;
    if (size < static_cast<int64_t>(row->path.size())) {
      cut.assign(row->path.begin() + size, row->path.end());
      row->path.resize(static_cast<size_t>(size));
    }
    Drop(own, std::move(cut), step, retired);
  }

  void Release(Row* row, int64_t step, int64_t retired, uint64_t writer) {
    for (const auto& page : row->path) {
      if (page->writer == writer) page->writer = 0;
    }
    Drop(row->own, std::move(row->path), step, retired);
    *row = Row();
  }

  // below: every cached page's parent, to find what hangs below.
  void Invalidate(Row* row, int64_t step, int64_t retired, uint64_t writer,
                  const std::map<PageHash, PageHash, HashLess>& parents) {
    const Page* top = nullptr;
    for (const auto& page : row->path) {
      if (page->writer == writer) {
        top = page.get();
        break;
      }
    }
    if (top != nullptr && top->cached) {
      const PageHash top_hash = top->hash;
      std::vector<PageHash> gone;
      for (const auto& [hash, page] : pages_) {
        for (PageHash up = hash; !(up == PageHash()); up = parents.at(up)) {
          if (!(up == top_hash)) continue;
          gone.push_back(hash);
          break;
        }
      }
      for (const PageHash& hash : gone) {
        const std::shared_ptr<Page> page = pages_.at(hash);
        pages_.erase(hash);
        page->cached = false;
        if (page->locks == 0) {
          lru_.erase(page->place);
          ++free_;
        } else {
          ++limbo_;
        }
      }
    }
    Release(row, step, retired, writer);
  }

  void Retire(int64_t step) {
    for (auto it = waiting_.begin(); it != waiting_.end() && it->first <= step; it = waiting_.erase(it)) {
      limbo_ -= it->second.first;
      free_ += it->second.first;
      for (const Path& path : it->second.second) Unlock(path);
    }
  }

  int64_t Flush() {
    const int64_t before = free_;
    Row nobody;
    Take(&nobody, free_ + evictable());
    free_ += nobody.own;
    return free_ - before;
  }

 private:
  void LockPage(Page* page) {
    if (page->locks++ == 0) lru_.erase(page->place);
  }
  void Unlock(const Path& path) {
    for (size_t i = path.size(); i-- > 0;) {
      Page* page = path[i].get();
      if (--page->locks > 0) continue;
      if (page->cached) {
        page->place = lru_.insert(lru_.end(), page);
      } else {
        --limbo_;
        ++free_;
      }
    }
  }
  void Drop(int64_t own, Path path, int64_t step, int64_t retired) {
    if (step <= retired) {
      free_ += own;
      Unlock(path);
    } else {
      limbo_ += own;
      waiting_[step].first += own;
      waiting_[step].second.push_back(std::move(path));
    }
  }

  int64_t free_;
  int64_t limbo_ = 0;
  std::map<PageHash, std::shared_ptr<Page>, HashLess> pages_;
  std::list<Page*> lru_;
  std::map<int64_t, std::pair<int64_t, std::vector<Path>>> waiting_;
};

class Harness {
 public:
  Harness(const CacheConfig& config, Shape shape, uint64_t seed)
      : random_(seed),
        config_(config),
        cache_(config),
        page_size_(config.groups[0].page_size),
        generator_(shape, page_size_, &random_) {
    for (const int32_t count : config.num_pages) {
      contents_.emplace_back(static_cast<size_t>(count));
      writers_.emplace_back(static_cast<size_t>(count), 0);
      busy_.emplace_back(static_cast<size_t>(count), kNoStep);
    }
    cached_.resize(config.groups.size());
    const bool full = config.groups.size() == 1 && config.groups[0].kind != KvKind::kWindow;
    if (full && config.kind != CacheKind::kNone) exact_ = std::make_unique<ExactOracle>(config.num_pages[0]);
  }

  void Run(int num_ops) {
    for (int i = 0; i < num_ops && !testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE(StrCat("operation ", i));
      Operate();
      Verify();
    }
    if (testing::Test::HasFailure()) return;
    while (!rows_.empty()) Give(rows_.size() - 1, false);
    Retire(step_);
    Flush();
    Verify();
    for (int g = 0; g < cache_.num_groups(); ++g) {
      EXPECT_EQ(cache_.stats(g).free, cache_.stats(g).total);
      EXPECT_TRUE(cached_[static_cast<size_t>(g)].empty());
    }
    EXPECT_GT(num_steps_, 0);
  }

 private:
  struct Row {
    Lease lease;
    uint64_t id;
    uint64_t ns;
    Keys keys;
    int64_t computed;        // tokens whose KV is written
    int64_t shared = 0;      // tokens that Acquire or Fork gave and Truncate left
    int64_t committed = 0;   // tokens that a Commit of this row has covered, past those
    int64_t last_step = kNoStep;
    std::vector<std::vector<PageId>> table;  // as last seen
    ExactOracle::Row exact;
  };

  int64_t Pick(int64_t bound) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(bound)); }
  std::vector<PageHash> Hashes(const Row& row) const { return cache_.HashPages(row.ns, row.keys); }
  int32_t FirstNeeded(size_t g, int64_t len) const {
    const KvGroup& group = config_.groups[g];
    if (group.kind != KvKind::kWindow) return 0;
    int32_t page = 0;
    while (int64_t{page + 1} * page_size_ <= len + 1 - group.window) ++page;  // its end is out of sight
    return page;
  }

  void Operate() {
    const int64_t choice = Pick(100);
    if (rows_.empty() || (choice < 18 && rows_.size() < 7)) return Admit();
    const auto r = static_cast<size_t>(Pick(static_cast<int64_t>(rows_.size())));
    if (choice < 58) return Step(rows_[r]);
    if (choice < 66) return Fork(r);
    if (choice < 71) return Truncate(rows_[r]);
    if (choice < 79) return Slide(rows_[r]);
    if (choice < 87) return Give(r, false);
    if (choice < 91) return Give(r, true);
    if (choice < 99) return Retire(step_ - Pick(3));
    Flush();
  }

  // The longest valid prefix, by trying them all.
  int64_t NaiveMatch(uint64_t ns, const Keys& keys, int64_t limit) const {
    const std::vector<PageHash> hashes = cache_.HashPages(ns, keys);
    for (int64_t pages = limit / page_size_; pages > 0; --pages) {
      bool valid = true;
      for (size_t g = 0; g < cached_.size() && valid; ++g) {
        for (int64_t i = FirstNeeded(g, pages * page_size_); i < pages && valid; ++i) {
          valid = cached_[g].count(hashes[static_cast<size_t>(i)]) == 1;
        }
      }
      if (valid) return pages * page_size_;
    }
    return 0;
  }

  void Admit() {
    Row row;
    row.id = ++last_id_;
    row.ns = static_cast<uint64_t>(Pick(8) == 0);
    row.keys = generator_.Prompt();
    const auto size = static_cast<int64_t>(row.keys.size());
    const int64_t limit = Pick(4) == 0 ? Pick(size + 1) : size - 1;
    EXPECT_EQ(cache_.Match(row.ns, row.keys), NaiveMatch(row.ns, row.keys, size));
    const int64_t expected = NaiveMatch(row.ns, row.keys, limit);
    row.lease = cache_.Acquire(row.ns, row.keys, limit);
    EXPECT_EQ(row.lease.cached_len(), expected);
    EXPECT_EQ(row.lease.capacity(), expected);
    for (size_t g = 0; g < cached_.size(); ++g) {
      EXPECT_EQ(row.lease.first_page(static_cast<int>(g)), FirstNeeded(g, expected));
    }
    row.computed = row.shared = expected;
    if (exact_) row.exact = exact_->Acquire(Hashes(row), limit / page_size_);
    rows_.push_back(std::move(row));
  }

  // Pages that `row` has got since its table was last seen.
  void TakeOver(Row& row) {
    for (size_t g = 0; g < cached_.size(); ++g) {
      const auto pages = row.lease.pages(static_cast<int>(g));
      for (size_t i = row.table.empty() ? 0 : row.table[g].size(); i < pages.size(); ++i) {
        const auto page = static_cast<size_t>(pages[i]);
        EXPECT_LE(busy_[g][page], retired_) << "page " << page << " is still named by a running step";
        contents_[g][page] = PageHash();
        writers_[g][page] = row.id;
      }
    }
  }

  // Writes KV up to `target`; the pages written must be nobody else's.
  void Write(Row& row, int64_t target) {
    const std::vector<PageHash> hashes = Hashes(row);
    for (size_t g = 0; g < cached_.size(); ++g) {
      const auto pages = row.lease.pages(static_cast<int>(g));
      for (int64_t i = row.computed / page_size_; i * page_size_ < target; ++i) {
        const PageId page = pages[static_cast<size_t>(i)];
        if (page == kNoPage) continue;
        if ((i + 1) * page_size_ <= target) contents_[g][static_cast<size_t>(page)] = hashes[static_cast<size_t>(i)];
        for (const Row& other : rows_) {
          if (&other == &row) continue;
          const auto others = other.lease.pages(static_cast<int>(g));
          EXPECT_EQ(std::count(others.begin(), others.end(), page), 0) << "page " << page << " has two writers";
        }
      }
    }
    row.computed = target;
  }

  void Step(Row& row) {
    const int64_t target = row.computed + 1 + Pick(Pick(2) == 0 ? 1 : 3 * page_size_);
    const int64_t room = target + Pick(2) * Pick(2 * page_size_);
    generator_.Extend(&row.keys, target);
    const auto size = static_cast<int64_t>(row.lease.pages(0).size());
    const int64_t grown = std::max<int64_t>(0, (room + page_size_ - 1) / page_size_ - size);
    bool fits = true;
    std::string before;
    for (int g = 0; g < cache_.num_groups(); ++g) {
      fits = fits && grown <= cache_.stats(g).free + cache_.stats(g).evictable;
    }
    if (!fits) before = cache_.DebugString();
    SnapTable(row);
    EXPECT_EQ(cache_.Reserve(row.lease, room), fits);
    if (!fits) {
      EXPECT_EQ(cache_.DebugString(), before);
      return;
    }
    if (exact_) exact_->Take(&row.exact, grown);
    TakeOver(row);
    ++step_;
    ++num_steps_;
    row.last_step = step_;
    if (!row.lease.valid()) {  // runs on until the loop hears of it
      row.computed = target;
      return;
    }
    if (Pick(10) < 7) Commit(row, target);
    Write(row, target);
  }

  void Commit(Row& row, int64_t len) {
    cache_.Commit(row.lease, std::span(row.keys).first(static_cast<size_t>(len)), step_);
    if (config_.kind == CacheKind::kNone) return;
    if (exact_) exact_->Commit(&row.exact, Hashes(row), len / page_size_, row.id);
    NoteCommit(row, len);
  }

  void NoteCommit(Row& row, int64_t len) {
    const int64_t end = len / page_size_ * page_size_;
    if (end > std::max(row.committed, row.shared)) row.committed = end;
  }

  void Fork(size_t r) {
    Row& parent = rows_[r];
    if (!parent.lease.valid() || rows_.size() >= 8) return;
    const int64_t at = Pick(3) == 0 ? parent.computed : Pick(parent.computed + 1);
    std::vector<PageCopy> copies;
    Row child;
    child.id = ++last_id_;
    child.ns = parent.ns;
    const int64_t available = cache_.AvailablePages();
    child.lease = cache_.Fork(parent.lease, parent.keys, at, step_, &copies);
    if (config_.kind != CacheKind::kNone) {
      if (exact_) exact_->Commit(&parent.exact, Hashes(parent), at / page_size_, parent.id);
      NoteCommit(parent, at);
    }
    if (!child.lease) {
      EXPECT_TRUE(copies.empty());
      if (exact_) {
        EXPECT_EQ(available, 0);
      }
      return;
    }
    child.keys.assign(parent.keys.begin(), parent.keys.begin() + at);
    child.computed = at;
    child.shared = at / page_size_ * page_size_;
    EXPECT_EQ(child.lease.cached_len(), at);
    if (exact_) {
      child.exact = exact_->Fork(parent.exact, at / page_size_);
      exact_->Take(&child.exact, at % page_size_ != 0);
      EXPECT_EQ(copies.size(), at % page_size_ != 0);
    }
    for (const PageCopy& copy : copies) {
      const auto g = static_cast<size_t>(copy.group), dst = static_cast<size_t>(copy.dst);
      EXPECT_LE(busy_[g][dst], retired_);
      EXPECT_EQ(std::ranges::count(parent.lease.pages(copy.group), copy.src), 1);
      EXPECT_EQ(std::ranges::count(child.lease.pages(copy.group), copy.dst), 1);
      contents_[g][dst] = contents_[g][static_cast<size_t>(copy.src)];
      writers_[g][dst] = child.id;
    }
    SnapTable(child);
    child.last_step = parent.last_step;
    rows_.push_back(std::move(child));
  }

  void Truncate(Row& row) {
    if (row.lease.capacity() == 0) return;
    const int64_t len = row.committed + Pick(row.lease.capacity() - row.committed + 1);
    const int64_t kept = std::min<int64_t>((len + page_size_ - 1) / page_size_, row.lease.capacity() / page_size_);
    NameBusy(row);
    cache_.Truncate(row.lease, len, row.last_step);
    EXPECT_EQ(row.lease.capacity(), kept * page_size_);
    if (exact_) exact_->Truncate(&row.exact, kept, row.last_step, retired_);
    row.computed = std::min(row.computed, kept * page_size_);
    row.shared = std::min(row.shared, kept * page_size_);
    row.keys.resize(static_cast<size_t>(std::max(row.computed, row.committed)));
    for (auto& table : row.table) table.resize(std::min(table.size(), static_cast<size_t>(kept)));
    // A shared page, once given up, may not be written: only whole pages of what is left count as computed.
    row.computed = row.computed / page_size_ * page_size_;
    row.keys.resize(static_cast<size_t>(std::max(row.computed, row.committed)));
  }

  void Slide(Row& row) {
    NameBusy(row);
    cache_.SlideWindow(row.lease, row.computed, row.last_step);
    for (size_t g = 0; g < cached_.size(); ++g) {
      EXPECT_GE(row.lease.first_page(static_cast<int>(g)), FirstNeeded(g, row.computed));
    }
  }

  // A step that has not retired names every page of the row.
  void NameBusy(const Row& row) {
    for (size_t g = 0; g < cached_.size(); ++g) {
      for (const PageId page : row.lease.pages(static_cast<int>(g))) {
        if (page == kNoPage) continue;
        int64_t& busy = busy_[g][static_cast<size_t>(page)];
        busy = std::max(busy, row.last_step);
      }
    }
  }

  void Give(size_t r, bool invalidate) {
    Row row = std::move(rows_[r]);
    rows_.erase(rows_.begin() + static_cast<ptrdiff_t>(r));
    NameBusy(row);
    const bool was_valid = row.lease.valid();
    if (!invalidate && was_valid) {
      cache_.Release(std::move(row.lease), row.last_step);
      if (exact_) exact_->Release(&row.exact, row.last_step, retired_, row.id);
      return;
    }
    std::vector<std::vector<PageId>> table;
    for (int g = 0; g < cache_.num_groups(); ++g) {
      table.emplace_back(row.lease.pages(g).begin(), row.lease.pages(g).end());
    }
    cache_.Invalidate(std::move(row.lease), row.last_step);
    if (exact_) exact_->Invalidate(&row.exact, row.last_step, retired_, row.id, parents_);
    for (const Row& other : rows_) {
      for (size_t g = 0; g < table.size(); ++g) {
        const auto pages = other.lease.pages(static_cast<int>(g));
        for (const PageId page : table[g]) {
          if (page == kNoPage || writers_[g][static_cast<size_t>(page)] != row.id) continue;
          if (std::count(pages.begin(), pages.end(), page) > 0) {
            EXPECT_FALSE(other.lease.valid()) << "shares page " << page;
          }
        }
      }
    }
  }

  void Retire(int64_t step) {
    cache_.Retire(step);
    retired_ = std::max(retired_, step);
    if (exact_) exact_->Retire(step);
  }

  void Flush() {
    int64_t evictable = 0;
    for (int g = 0; g < cache_.num_groups(); ++g) evictable += cache_.stats(g).evictable;
    EXPECT_EQ(cache_.Flush(), evictable);
    if (exact_) {
      EXPECT_EQ(exact_->Flush(), evictable);
    }
  }

  void SnapTable(Row& row) {
    row.table.resize(cached_.size());
    for (size_t g = 0; g < cached_.size(); ++g) {
      const auto pages = row.lease.pages(static_cast<int>(g));
      row.table[g].assign(pages.begin(), pages.end());
    }
  }

  void Verify() {
    ASSERT_NO_THROW(cache_.CheckInvariants());
    for (const CacheEvent& event : cache_.TakeEvents()) {
      auto& cached = cached_[static_cast<size_t>(event.group)];
      if (event.kind == CacheEvent::Kind::kStored) {
        EXPECT_TRUE(cached.insert(event.hash).second) << "stored twice";
        parents_[event.hash] = event.parent;
        EXPECT_EQ(event.parent == PageHash(), event.first_token == 0);
      } else {
        EXPECT_EQ(cached.erase(event.hash), 1u) << "removed, never stored";
      }
    }
    for (int g = 0; g < cache_.num_groups(); ++g) {
      const PoolStats stats = cache_.stats(g);
      EXPECT_EQ(stats.free + stats.cached + stats.leased + stats.limbo, stats.total);
      EXPECT_EQ(stats.cached, static_cast<int64_t>(cached_[static_cast<size_t>(g)].size()));
      EXPECT_LE(stats.evictable, stats.cached);
    }
    for (Row& row : rows_) VerifyRow(row);
    if (exact_) {
      const PoolStats stats = cache_.stats(0);
      int64_t leased = 0;
      for (const Row& row : rows_) leased += row.exact.own;
      EXPECT_EQ(stats.free, exact_->free());
      EXPECT_EQ(stats.cached, exact_->cached());
      EXPECT_EQ(stats.leased, leased);
      EXPECT_EQ(stats.limbo, exact_->limbo());
      EXPECT_EQ(stats.evictable, exact_->evictable());
      const auto expected = exact_->Hashes();
      EXPECT_TRUE(std::equal(expected.begin(), expected.end(), cached_[0].begin(), cached_[0].end()));
      for (const Row& row : rows_) {
        const bool expect_valid = row.exact.path.empty() || row.exact.path.back()->cached;
        EXPECT_EQ(row.lease.valid(), expect_valid);
      }
    }
  }

  void VerifyRow(Row& row) {
    const std::vector<PageHash> hashes = Hashes(row);
    for (size_t i = 0; i < hashes.size(); ++i) {
      const auto it = parents_.find(hashes[i]);
      EXPECT_TRUE(it == parents_.end() || it->second == (i == 0 ? PageHash() : hashes[i - 1])) << "page " << i;
    }
    for (size_t g = 0; g < cached_.size(); ++g) {
      const auto pages = row.lease.pages(static_cast<int>(g));
      const int32_t first = row.lease.first_page(static_cast<int>(g));
      for (size_t i = 0; !row.table.empty() && i < row.table[g].size(); ++i) {
        const PageId expected = static_cast<int32_t>(i) < first ? kNoPage : row.table[g][i];
        EXPECT_EQ(pages[i], expected) << "the page table was re-pointed";
      }
      if (!row.lease.valid()) continue;
      for (auto i = static_cast<size_t>(first); i < static_cast<size_t>(row.computed / page_size_); ++i) {
        EXPECT_TRUE(contents_[g][static_cast<size_t>(pages[i])] == hashes[i])
            << "row " << row.id << " group " << g << " reads somebody else's KV in page " << pages[i];
      }
    }
    SnapTable(row);
  }

  std::mt19937_64 random_;
  CacheConfig config_;
  CacheManager cache_;
  int32_t page_size_;
  Generator generator_;
  std::vector<Row> rows_;
  std::vector<std::vector<PageHash>> contents_;             // [group][page]
  std::vector<std::vector<uint64_t>> writers_;              // [group][page]: the row that computed it
  std::vector<std::vector<int64_t>> busy_;                  // [group][page]: the newest step that names it
  std::vector<std::set<PageHash, HashLess>> cached_;        // [group], from events
  std::map<PageHash, PageHash, HashLess> parents_;          // from events
  std::unique_ptr<ExactOracle> exact_;
  uint64_t last_id_ = 0;
  int64_t step_ = 0;
  int64_t retired_ = kNoStep;
  int64_t num_steps_ = 0;
};

int NumOps() {
  const char* text = std::getenv("SAPWOOD_PROPERTY_OPS");
  return text == nullptr ? 250 : std::atoi(text);
}

void RunAll(CacheKind kind) {
  uint64_t seed = 1000 * (static_cast<uint64_t>(kind) + 1);
  for (const int32_t page_size : {1, 2, 16, 64}) {
    for (const char* groups : {"full", "window", "full+window", "latent+two windows"}) {
      for (const Shape shape : kShapes) {
        for (const int32_t num_pages : {9, 40}) {
          ++seed;
          CacheConfig config;
          config.kind = kind;
          config.record_events = true;
          const std::string_view name = groups;
          const KvGroup window = {.kind = KvKind::kWindow, .window = 3 * page_size + 1, .page_size = page_size};
          if (name == "window") {
            config.groups = {window};
          } else {
            const KvKind first = name.starts_with("latent") ? KvKind::kLatent : KvKind::kFull;
            config.groups = {{.kind = first, .page_size = page_size}};
            if (name == "full+window") config.groups.push_back(window);
            if (name == "latent+two windows") {  // wide enough for nodes of two pages, which can grow
              config.groups.push_back({.kind = KvKind::kWindow, .window = 8 * page_size, .page_size = page_size});
              config.groups.push_back({.kind = KvKind::kWindow, .window = 11 * page_size, .page_size = page_size});
            }
          }
          for (size_t g = 0; g < config.groups.size(); ++g) {
            config.num_pages.push_back(num_pages - static_cast<int32_t>(g));
          }
          SCOPED_TRACE(StrCat("seed ", seed, " kind ", static_cast<int>(kind), " page_size ", page_size, " groups ",
                              name, " shape ", static_cast<int>(shape), " pages ", num_pages));
          Harness(config, shape, seed).Run(NumOps());
          if (testing::Test::HasFailure()) return;
        }
      }
    }
  }
}

TEST(CachePropertyTest, Radix) { RunAll(CacheKind::kRadix); }
TEST(CachePropertyTest, Flat) { RunAll(CacheKind::kFlat); }
TEST(CachePropertyTest, None) { RunAll(CacheKind::kNone); }

}  // namespace
}  // namespace sapwood
