// Leases, limbo and the rules between them; pages live in page_pool.h, cached ones in radix_tree.h.
//
// On the request path: the batch builder, on behalf of the scheduler, acquires a lease when a request is admitted,
// reserves before each step, commits at launch, and releases at the end; retired steps come back as Retire.
//
// A lease's entry names its own page (PageState::kLeased: nobody else's) or one of a tree node on its
// locked path (kCached, or kLimbo when invalidated), so "own" is read off the page's state and kept nowhere else.

#include "cache/cache_manager.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "cache/page_hash.h"
#include "cache/page_pool.h"
#include "cache/radix_tree.h"

namespace sapwood {

struct LeaseState {
  CacheManager* manager = nullptr;
  LeaseState* prev = nullptr;  // the manager's list of live leases
  LeaseState* next = nullptr;
  uint64_t id = 0;  // > 0, never used twice
  PathLock lock;    // node == nullptr for CacheKind::kNone
  PageTables tables;
  int64_t capacity = 0;        // tokens
  int64_t cached_len = 0;      // tokens
  int32_t committed = 0;       // pages: where lock.node ends
  bool owns_nodes = false;     // Commit has been here: Truncate may not cut below `committed`
};

namespace {

constexpr size_t kMaxSpareLeases = 256;

LeaseState& Live(const std::unique_ptr<LeaseState>& state, const char* operation) {
  SAPWOOD_REQUIRE(state != nullptr, operation, ": expected a live lease, got an empty one (released or moved from)");
  return *state;
}

}  // namespace

struct CacheManager::Impl {
  // What waits for one step.
  struct Limbo {
    int64_t step;
    std::vector<std::pair<int32_t, PageId>> pages;  // group, page
    std::vector<PathLock> locks;
  };

  Impl(CacheManager* manager, CacheConfig checked)
      : self(manager), config(std::move(checked)), page_size(config.groups[0].page_size) {
    for (const int32_t count : config.num_pages) pools.emplace_back(count);
    tree = std::make_unique<RadixTree>(config, &pools, &events);
  }

  int num_groups() const { return static_cast<int>(config.groups.size()); }
  bool sharing() const { return config.kind != CacheKind::kNone; }
  int32_t PagesOf(int64_t tokens) const { return static_cast<int32_t>((tokens + page_size - 1) / page_size); }

  std::unique_ptr<LeaseState> NewLease();
  void Recycle(std::unique_ptr<LeaseState> state);
  void DropPage(int g, PageId page, int64_t step);
  void DropLock(const PathLock& lock, int64_t step);
  void DropOwnPages(LeaseState& state, int32_t begin, int64_t step);
  Limbo& LimboOf(int64_t step);
  bool Grow(LeaseState& state, int64_t num_tokens);
  bool TakeRoom(std::span<const int32_t> num_pages);
  void SetPath(LeaseState& state, TreeNode* node);
  void ReleaseState(std::unique_ptr<LeaseState> state, int64_t step);
  int32_t Available(int g) const { return pools[static_cast<size_t>(g)].num_free() + tree->evictable(g); }
  void CheckLease(const LeaseState& state, std::vector<std::vector<bool>>* seen) const;

  CacheManager* self;
  const CacheConfig config;
  const int32_t page_size;
  std::vector<PagePool> pools;
  std::vector<CacheEvent> events;
  std::unique_ptr<RadixTree> tree;
  LeaseState* leases = nullptr;
  std::vector<std::unique_ptr<LeaseState>> spare;
  std::vector<Limbo> limbo;  // by ascending step; a handful at most, one per step in flight
  std::vector<Limbo> spare_limbo;
  int64_t retired = kNoStep;
  uint64_t last_lease_id = 0;
  int64_t fail_at = 0;
};

// ---- Lease ----

Lease::Lease() = default;
Lease::Lease(std::unique_ptr<LeaseState> state) : state_(std::move(state)) {}
Lease::Lease(Lease&&) noexcept = default;

Lease& Lease::operator=(Lease&& other) noexcept {
  if (this != &other) {
    Lease old(std::move(state_));
    state_ = std::move(other.state_);
  }
  return *this;
}

Lease::~Lease() {
  if (state_ != nullptr && state_->manager != nullptr) {
    CacheManager* manager = state_->manager;
    manager->impl_->ReleaseState(std::move(state_), kNoStep);
  }
}

int64_t Lease::cached_len() const { return Live(state_, "cached_len").cached_len; }

std::span<const PageId> Lease::pages(int group) const {
  const LeaseState& state = Live(state_, "pages");
  SAPWOOD_REQUIRE(group >= 0 && static_cast<size_t>(group) < state.tables.pages.size(), "group: expected 0..",
                  state.tables.pages.size() - 1, ", got ", group);
  return state.tables.pages[static_cast<size_t>(group)];
}

int32_t Lease::first_page(int group) const {
  pages(group);
  return state_->tables.first[static_cast<size_t>(group)];
}

int64_t Lease::capacity() const { return Live(state_, "capacity").capacity; }

bool Lease::valid() const {
  const TreeNode* node = Live(state_, "valid").lock.node;
  return node == nullptr || node->attached;  // an invalidated subtree is detached whole
}

// ---- Impl ----

std::unique_ptr<LeaseState> CacheManager::Impl::NewLease() {
  std::unique_ptr<LeaseState> state;
  if (spare.empty()) {
    state = std::make_unique<LeaseState>();
  } else {
    state = std::move(spare.back());
    spare.pop_back();
  }
  state->manager = self;
  state->id = ++last_lease_id;
  state->tables.pages.resize(config.groups.size());
  state->lock.LockAllGroups();
  state->prev = nullptr;
  state->next = leases;
  if (leases != nullptr) leases->prev = state.get();
  leases = state.get();
  return state;
}

void CacheManager::Impl::Recycle(std::unique_ptr<LeaseState> state) {
  (state->prev == nullptr ? leases : state->prev->next) = state->next;
  if (state->next != nullptr) state->next->prev = state->prev;
  if (spare.size() >= kMaxSpareLeases) return;
  for (std::vector<PageId>& pages : state->tables.pages) pages.clear();
  state->tables.first.fill(0);
  state->lock = PathLock();
  state->capacity = state->cached_len = 0;
  state->committed = 0;
  state->owns_nodes = false;
  spare.push_back(std::move(state));
}

CacheManager::Impl::Limbo& CacheManager::Impl::LimboOf(int64_t step) {
  auto it = limbo.end();
  while (it != limbo.begin() && std::prev(it)->step >= step) --it;
  if (it != limbo.end() && it->step == step) return *it;
  Limbo fresh;
  if (!spare_limbo.empty()) {
    fresh = std::move(spare_limbo.back());
    spare_limbo.pop_back();
  }
  fresh.step = step;
  return *limbo.insert(it, std::move(fresh));
}

void CacheManager::Impl::DropPage(int g, PageId page, int64_t step) {
  if (step <= retired) {
    pools[static_cast<size_t>(g)].Move(page, PageState::kLeased, PageState::kFree);
  } else {
    pools[static_cast<size_t>(g)].Move(page, PageState::kLeased, PageState::kLimbo);
    LimboOf(step).pages.emplace_back(g, page);
  }
}

void CacheManager::Impl::DropLock(const PathLock& lock, int64_t step) {
  if (lock.node == nullptr) return;
  if (step <= retired) {
    tree->Unlock(lock);
  } else {
    LimboOf(step).locks.push_back(lock);
  }
}

// Own pages at and after `begin`, of every group. Last first: the pool hands them out again in ascending order.
void CacheManager::Impl::DropOwnPages(LeaseState& state, int32_t begin, int64_t step) {
  for (int g = 0; g < num_groups(); ++g) {
    const auto i = static_cast<size_t>(g);
    const std::vector<PageId>& pages = state.tables.pages[i];
    const auto first = static_cast<size_t>(std::max(begin, state.tables.first[i]));
    for (size_t p = pages.size(); p-- > first;) {
      if (pools[i].state(pages[p]) == PageState::kLeased) DropPage(g, pages[p], step);
    }
  }
}

// Makes num_pages[g] pages of each group free, evicting where needed, or changes nothing and returns false.
bool CacheManager::Impl::TakeRoom(std::span<const int32_t> num_pages) {
  int64_t total = 0;
  for (size_t g = 0; g < num_pages.size(); ++g) {
    if (num_pages[g] > Available(static_cast<int>(g))) return false;
    total += num_pages[g];
  }
  if (fail_at > 0) {
    if (fail_at <= total) {
      fail_at = 0;
      return false;
    }
    fail_at -= total;
  }
  // Evicting for one group may free pages of others, each counted as evictable there: the check stands.
  for (size_t g = 0; g < num_pages.size(); ++g) tree->Evict(static_cast<int>(g), num_pages[g]);
  return true;
}

// Sets the lock of a lease that holds none to node's path, as far as its tables need it.
void CacheManager::Impl::SetPath(LeaseState& state, TreeNode* node) {
  state.lock.node = node;
  state.committed = node->end();
  for (int g = 0; g < num_groups(); ++g) {
    const auto i = static_cast<size_t>(g);
    state.lock.from[i] = tree->FirstOverlap(node, state.tables.first[i]);
  }
  tree->Lock(state.lock);
}

void CacheManager::Impl::ReleaseState(std::unique_ptr<LeaseState> state, int64_t step) {
  if (state->owns_nodes) {  // from here on nobody can invalidate them
    for (TreeNode* node = state->lock.node; node != nullptr; node = node->parent) {
      if (node->owner == state->id) node->owner = 0;
    }
  }
  DropOwnPages(*state, 0, step);
  DropLock(state->lock, step);
  Recycle(std::move(state));
}

// ---- CacheManager ----

CacheManager::CacheManager(CacheConfig config) {
  SAPWOOD_REQUIRE(!config.groups.empty() && config.groups.size() <= kMaxGroups, "groups: expected 1..", kMaxGroups,
                  " groups, got ", config.groups.size());
  SAPWOOD_REQUIRE(config.num_pages.size() == config.groups.size(), "num_pages: expected one count per group (",
                  config.groups.size(), "), got ", config.num_pages.size());
  for (const KvGroup& group : config.groups) {
    SAPWOOD_REQUIRE(group.page_size >= 1 && group.page_size <= 64, "page_size: expected 1..64, got ", group.page_size);
    SAPWOOD_REQUIRE(group.page_size == config.groups[0].page_size, "page_size: expected the same in every group, got ",
                    config.groups[0].page_size, " and ", group.page_size);
    SAPWOOD_REQUIRE(group.kind != KvKind::kState, "kind: groups of recurrent state are not supported by this version; "
                    "expected kFull, kWindow or kLatent");
    SAPWOOD_REQUIRE((group.kind == KvKind::kWindow) == (group.window > 0),
                    "window: expected > 0 in window groups and 0 in others, got ", group.window);
  }
  impl_ = std::make_unique<Impl>(this, std::move(config));
}

CacheManager::~CacheManager() {
  // A lease that outlives us is a bug of its holder's, but interpreters destroy things in any order at exit.
  for (LeaseState* state = impl_->leases; state != nullptr; state = state->next) state->manager = nullptr;
}

const CacheConfig& CacheManager::config() const { return impl_->config; }
int32_t CacheManager::page_size() const { return impl_->page_size; }
int CacheManager::num_groups() const { return impl_->num_groups(); }

int64_t CacheManager::Match(uint64_t ns, std::span<const int32_t> keys) const {
  return static_cast<int64_t>(impl_->tree->Match(ns, keys).num_pages) * impl_->page_size;
}

Lease CacheManager::Acquire(uint64_t ns, std::span<const int32_t> keys, int64_t max_len) {
  Impl& impl = *impl_;
  std::unique_ptr<LeaseState> state = impl.NewLease();
  if (impl.sharing()) {
    const int64_t limit = std::clamp<int64_t>(max_len, 0, static_cast<int64_t>(keys.size()));
    const RadixTree::Found found = impl.tree->Match(ns, keys.first(static_cast<size_t>(limit)));
    TreeNode* node = found.num_pages == 0 ? impl.tree->Root(ns) : impl.tree->CutAt(found.node, found.num_pages);
    state->cached_len = state->capacity = static_cast<int64_t>(found.num_pages) * impl.page_size;
    for (int g = 0; g < impl.num_groups(); ++g) {
      state->tables.first[static_cast<size_t>(g)] = impl.tree->FirstNeeded(g, state->cached_len);
    }
    impl.tree->FillTables(node, &state->tables);
    impl.SetPath(*state, node);
  }
  return Lease(std::move(state));
}

bool CacheManager::Reserve(Lease& lease, int64_t num_tokens) {
  const LeaseState* state = lease.state_.get();
  if (state != nullptr && num_tokens <= state->capacity) return true;  // most decode steps: nothing else is touched
  return impl_->Grow(Live(lease.state_, "Reserve"), num_tokens);
}

bool CacheManager::Impl::Grow(LeaseState& state, int64_t num_tokens) {
  SAPWOOD_REQUIRE(state.manager == self, "lease: expected one of this cache manager's");
  const auto size = static_cast<int32_t>(state.tables.pages[0].size());
  const int64_t grown = (num_tokens - 1) / page_size + 1 - size;
  // A row can never exceed the largest pool by more than what it shares; also keeps the count within 32 bits.
  for (const PagePool& pool : pools) {
    if (grown > pool.total()) return false;
  }
  std::array<int32_t, kMaxGroups> need;
  need.fill(static_cast<int32_t>(grown));
  if (!TakeRoom({need.data(), pools.size()})) return false;
  for (size_t g = 0; g < pools.size(); ++g) {
    std::vector<PageId>& pages = state.tables.pages[g];
    for (int64_t i = 0; i < grown; ++i) pages.push_back(pools[g].Allocate());
  }
  state.capacity = static_cast<int64_t>(size + grown) * page_size;
  return true;
}

void CacheManager::Commit(Lease& lease, std::span<const int32_t> keys, int64_t ready_step) {
  LeaseState& state = Live(lease.state_, "Commit");
  Impl& impl = *impl_;
  const auto num_tokens = static_cast<int64_t>(keys.size());
  SAPWOOD_REQUIRE(num_tokens <= state.capacity, "keys: expected at most the lease's capacity of ", state.capacity,
                  " tokens, got ", num_tokens, "; Reserve first");
  // What an invalidated row computes must not be matched by anybody.
  if (num_tokens / impl.page_size <= state.committed || !impl.sharing() || !lease.valid()) return;
  SAPWOOD_REQUIRE(state.manager == this, "lease: expected one of this cache manager's");
  impl.tree->Insert(&state.lock, keys, state.tables, state.id, ready_step);
  state.committed = state.lock.node->end();
  state.owns_nodes = true;
}

Lease CacheManager::Fork(Lease& parent, std::span<const int32_t> keys, int64_t at, int64_t last_step,
                         std::vector<PageCopy>* copies) {
  Impl& impl = *impl_;
  const LeaseState& from = Live(parent.state_, "Fork");
  SAPWOOD_REQUIRE(from.manager == this, "parent: expected one of this cache manager's leases");
  SAPWOOD_REQUIRE(copies != nullptr, "copies: expected a list to append to, got null");
  const int64_t limit = std::min<int64_t>(from.capacity, std::ssize(keys));
  SAPWOOD_REQUIRE(at >= 0 && at <= limit, "at: expected 0..", limit, " (keys, capacity), got ", at);
  SAPWOOD_REQUIRE(parent.valid(), "parent: expected a valid lease, got one whose prefix was invalidated; "
                  "release it with Invalidate and compute again");
  Commit(parent, keys.first(static_cast<size_t>(at)), last_step);

  std::unique_ptr<LeaseState> child = impl.NewLease();
  child->cached_len = at;
  const int32_t num_pages = impl.PagesOf(at);
  for (int g = 0; g < impl.num_groups(); ++g) {
    child->tables.first[static_cast<size_t>(g)] = std::min(num_pages, impl.tree->FirstNeeded(g, at));
  }
  if (impl.sharing()) {
    TreeNode* node = impl.tree->CutAt(from.lock.node, static_cast<int32_t>(at / impl.page_size));
    impl.tree->FillTables(node, &child->tables);
    impl.SetPath(*child, node);  // before TakeRoom, which must not evict what we share
  }

  // What the tree does not give is copied: the partial tail, window pages that the parent alone still has.
  std::array<int32_t, kMaxGroups> need{};
  bool possible = true;
  for (size_t g = 0; g < impl.pools.size(); ++g) {
    std::vector<PageId>& pages = child->tables.pages[g];
    pages.resize(static_cast<size_t>(num_pages), kNoPage);
    for (auto i = static_cast<size_t>(child->tables.first[g]); i < pages.size(); ++i) {
      if (pages[i] != kNoPage) continue;
      ++need[g];
      possible = possible && from.tables.pages[g][i] != kNoPage;
    }
  }
  if (!possible || !impl.TakeRoom({need.data(), impl.pools.size()})) {
    impl.DropLock(child->lock, kNoStep);
    impl.Recycle(std::move(child));
    return Lease();
  }
  for (size_t g = 0; g < impl.pools.size(); ++g) {
    std::vector<PageId>& pages = child->tables.pages[g];
    for (auto i = static_cast<size_t>(child->tables.first[g]); i < pages.size(); ++i) {
      if (pages[i] != kNoPage) continue;
      pages[i] = impl.pools[g].Allocate();
      copies->push_back({static_cast<int32_t>(g), from.tables.pages[g][i], pages[i]});
    }
  }
  child->capacity = static_cast<int64_t>(num_pages) * impl.page_size;
  return Lease(std::move(child));
}

void CacheManager::Truncate(Lease& lease, int64_t num_tokens, int64_t last_step) {
  LeaseState& state = Live(lease.state_, "Truncate");
  Impl& impl = *impl_;
  SAPWOOD_REQUIRE(state.manager == this, "lease: expected one of this cache manager's");
  SAPWOOD_REQUIRE(num_tokens >= 0, "num_tokens: expected >= 0, got ", num_tokens);
  if (num_tokens + impl.page_size > state.capacity) return;
  const int32_t kept = impl.PagesOf(num_tokens);
  SAPWOOD_REQUIRE(kept >= state.committed || !state.owns_nodes, "num_tokens: expected at least the ",
                  static_cast<int64_t>(state.committed) * impl.page_size, " tokens that were committed, got ",
                  num_tokens);
  impl.DropOwnPages(state, kept, last_step);
  for (size_t g = 0; g < impl.pools.size(); ++g) {
    state.tables.pages[g].resize(static_cast<size_t>(kept));
    state.tables.first[g] = std::min(state.tables.first[g], kept);
  }
  state.capacity = static_cast<int64_t>(kept) * impl.page_size;
  if (kept < state.committed) {
    TreeNode* node = impl.tree->CutAt(state.lock.node, kept);
    const PathLock old = state.lock;
    impl.SetPath(state, node);
    impl.DropLock(old, last_step);
  }
}

void CacheManager::SlideWindow(Lease& lease, int64_t kv_len, int64_t last_step) {
  LeaseState& state = Live(lease.state_, "SlideWindow");
  Impl& impl = *impl_;
  SAPWOOD_REQUIRE(state.manager == this, "lease: expected one of this cache manager's");
  for (int g = 0; g < impl.num_groups(); ++g) {
    const auto i = static_cast<size_t>(g);
    std::vector<PageId>& pages = state.tables.pages[i];
    int32_t& first = state.tables.first[i];
    const int32_t moved = std::min(impl.tree->FirstNeeded(g, kv_len), static_cast<int32_t>(pages.size()));
    if (moved <= first) continue;
    for (; first < moved; ++first) {
      PageId& page = pages[static_cast<size_t>(first)];
      if (impl.pools[i].state(page) == PageState::kLeased) impl.DropPage(g, page, last_step);
      page = kNoPage;
    }
    if (state.lock.node == nullptr) continue;
    const int32_t from = state.lock.from[i];
    const int32_t to = impl.tree->FirstOverlap(state.lock.node, moved);
    if (to <= from) continue;
    state.lock.from[i] = to;
    if (last_step <= impl.retired) {
      impl.tree->UnlockRange(state.lock.node, g, from, to);
    } else {
      PathLock old;  // takes over this group's lock of [from, to), and pins no more: the row's last node may grow
      old.node = state.lock.node;
      while (old.node->begin >= to) old.node = old.node->parent;
      old.from[i] = from;
      old.to[i] = to;
      impl.tree->Pin(old.node);
      impl.DropLock(old, last_step);
    }
  }
}

void CacheManager::Release(Lease lease, int64_t last_step) {
  const LeaseState& state = Live(lease.state_, "Release");
  SAPWOOD_REQUIRE(state.manager == this, "lease: expected one of this cache manager's");
  impl_->ReleaseState(std::move(lease.state_), last_step);
}

void CacheManager::Invalidate(Lease lease, int64_t last_step) {
  const LeaseState& state = Live(lease.state_, "Invalidate");
  SAPWOOD_REQUIRE(state.manager == this, "lease: expected one of this cache manager's");
  if (state.owns_nodes) {
    // Everything below the topmost of its nodes goes, so one subtree holds them all.
    TreeNode* topmost = nullptr;
    for (TreeNode* node = state.lock.node; node != nullptr; node = node->parent) {
      if (node->owner == state.id) topmost = node;
    }
    if (topmost != nullptr && topmost->attached) impl_->tree->Detach(topmost);
  }
  impl_->ReleaseState(std::move(lease.state_), last_step);
}

void CacheManager::InvalidateSince(int64_t step) { impl_->tree->DetachSince(step); }

void CacheManager::Retire(int64_t step) {
  Impl& impl = *impl_;
  impl.retired = std::max(impl.retired, step);
  size_t done = 0;
  for (; done < impl.limbo.size() && impl.limbo[done].step <= step; ++done) {
    Impl::Limbo& entry = impl.limbo[done];
    for (const auto& [group, page] : entry.pages) {
      impl.pools[static_cast<size_t>(group)].Move(page, PageState::kLimbo, PageState::kFree);
    }
    for (const PathLock& lock : entry.locks) impl.tree->Unlock(lock);
    entry.pages.clear();
    entry.locks.clear();
    impl.spare_limbo.push_back(std::move(entry));
  }
  impl.limbo.erase(impl.limbo.begin(), impl.limbo.begin() + static_cast<ptrdiff_t>(done));
}

int64_t CacheManager::Flush() {
  int64_t freed = 0;
  for (const PagePool& pool : impl_->pools) freed -= pool.num_free();
  impl_->tree->Flush();
  for (const PagePool& pool : impl_->pools) freed += pool.num_free();
  return freed;
}

PoolStats CacheManager::stats(int group) const {
  SAPWOOD_REQUIRE(group >= 0 && group < num_groups(), "group: expected 0..", num_groups() - 1, ", got ", group);
  const PagePool& pool = impl_->pools[static_cast<size_t>(group)];
  return {pool.total(),
          pool.num_free(),
          pool.count(PageState::kCached),
          pool.count(PageState::kLeased),
          pool.count(PageState::kLimbo),
          impl_->tree->evictable(group)};
}

int32_t CacheManager::AvailablePages() const {
  int32_t available = impl_->Available(0);
  for (int g = 1; g < num_groups(); ++g) available = std::min(available, impl_->Available(g));
  return available;
}

std::vector<CacheEvent> CacheManager::TakeEvents() { return std::exchange(impl_->events, {}); }

std::vector<PageHash> CacheManager::HashPages(uint64_t ns, std::span<const int32_t> keys) const {
  std::vector<PageHash> hashes;
  PageHash hash = SeedHash(ns);
  const auto page_size = static_cast<size_t>(impl_->page_size);
  hashes.reserve(keys.size() / page_size);
  for (size_t i = 0; i + page_size <= keys.size(); i += page_size) {
    hash = NextHash(hash, keys.data() + i, impl_->page_size);
    hashes.push_back(hash);
  }
  return hashes;
}

void CacheManager::Impl::CheckLease(const LeaseState& state, std::vector<std::vector<bool>>* seen) const {
  const size_t size = state.tables.pages[0].size();
  SAPWOOD_CHECK(state.capacity == static_cast<int64_t>(size) * page_size, "lease ", state.id, ": capacity");
  SAPWOOD_CHECK(static_cast<size_t>(state.committed) <= size, "lease ", state.id, ": committed past its table");
  SAPWOOD_CHECK((state.lock.node != nullptr) == sharing(), "lease ", state.id, ": no path");
  SAPWOOD_CHECK(!sharing() || state.lock.node->end() == state.committed, "lease ", state.id, ": its node's end");

  std::vector<const TreeNode*> holder(size, nullptr);
  for (const TreeNode* node = state.lock.node; node != nullptr; node = node->parent) {
    for (int32_t i = node->begin; i < node->end(); ++i) holder[static_cast<size_t>(i)] = node;
  }
  for (size_t g = 0; g < pools.size(); ++g) {
    const std::vector<PageId>& pages = state.tables.pages[g];
    SAPWOOD_CHECK(pages.size() == size, "lease ", state.id, ": tables of different lengths");
    for (size_t i = 0; i < size; ++i) {
      const bool absent = static_cast<int32_t>(i) < state.tables.first[g];
      SAPWOOD_CHECK((pages[i] == kNoPage) == absent, "lease ", state.id, ": group ", g, " entry ", i, " is ", pages[i]);
      if (absent) continue;
      if (pools[g].state(pages[i]) == PageState::kLeased) {
        SAPWOOD_CHECK(!(*seen)[g][static_cast<size_t>(pages[i])], "page ", pages[i], " is held twice");
        (*seen)[g][static_cast<size_t>(pages[i])] = true;
        continue;
      }
      const TreeNode* node = holder[i];
      SAPWOOD_CHECK(node != nullptr && node->groups[g].pages[i - static_cast<size_t>(node->begin)] == pages[i],
                    "lease ", state.id, ": page ", pages[i], " is neither its own nor on its path");
      SAPWOOD_CHECK(node->begin >= state.lock.from[g], "lease ", state.id, " reads page ", pages[i],
                    " without a lock in group ", g);
    }
  }
}

void CacheManager::CheckInvariants() const {
  const Impl& impl = *impl_;
  std::vector<std::vector<bool>> seen;  // held by the tree, a lease or limbo
  for (const PagePool& pool : impl.pools) {
    pool.CheckInvariants();
    seen.emplace_back(static_cast<size_t>(pool.total()), false);
  }
  std::vector<const PathLock*> locks;
  for (const LeaseState* state = impl.leases; state != nullptr; state = state->next) {
    SAPWOOD_CHECK(state->manager == this, "a lease of another manager is registered");
    impl.CheckLease(*state, &seen);
    if (state->lock.node != nullptr) locks.push_back(&state->lock);
  }
  int64_t last_step = impl.retired;
  for (const Impl::Limbo& entry : impl.limbo) {
    SAPWOOD_CHECK(entry.step > last_step, "limbo is out of order or late");
    last_step = entry.step;
    for (const auto& [group, page] : entry.pages) {
      const auto g = static_cast<size_t>(group);
      SAPWOOD_CHECK(impl.pools[g].state(page) == PageState::kLimbo && !seen[g][static_cast<size_t>(page)], "page ",
                    page, " in limbo");
      seen[g][static_cast<size_t>(page)] = true;
    }
    for (const PathLock& lock : entry.locks) locks.push_back(&lock);
  }
  impl.tree->Check(locks, &seen);
  for (size_t g = 0; g < impl.pools.size(); ++g) {
    for (PageId page = 0; page < impl.pools[g].total(); ++page) {
      const bool held = impl.pools[g].state(page) != PageState::kFree;
      SAPWOOD_CHECK(held == seen[g][static_cast<size_t>(page)], "group ", g, " page ", page,
                    held ? " is leaked" : " is free and held");
    }
  }
}

std::string CacheManager::DebugString() const { return impl_->tree->DebugString(); }

void CacheManager::TEST_FailAllocation(int64_t k) { impl_->fail_at = k; }

int64_t CacheManager::num_tree_nodes() const { return impl_->tree->num_nodes(); }

}  // namespace sapwood
