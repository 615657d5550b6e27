// The owner of every KV page: prefix matching, leases, eviction, limbo.
//
// Callers see four nouns. A *page* is page_size tokens of one group. A *lease* is one row's claim:
// its page table per group, made of pages it shares with the tree (locked) and pages of its own.
// The *tree* keeps computed pages under their key ids so that later requests reuse them. *Limbo*
// holds what was released while a running step still names it, until that step retires.
//
// Thread safety: none; owned by the event loop's thread.
//
// Invariants, checked by CheckInvariants() (tests call it after every operation):
//   1. per group: free + cached + leased + limbo == num_pages, and each page is in exactly one state;
//   2. between Acquire and Release a lease's page table only grows at its end; entries are never
//      re-pointed (a window group's entries below first_page() become kNoPage, nothing else changes);
//   3. a node's lock count per group == the number of leases (and limbo entries) that lock through it;
//   4. an unlocked node that holds pages of a group is on that group's LRU list exactly once, any other on
//      none, and in a group of kind kFull/kLatent a child stands before its parent, so the head is always a leaf;
//   5. tree nodes hold whole pages: key length == page_size * number of pages, never 0 but for the root.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cache/kv_group.h"

namespace sapwood {

enum class CacheKind : uint8_t {
  kRadix,  // the radix tree
  kFlat,   // a flat hash table over chained page hashes, as vLLM's block cache: for ablations
  kNone,   // no sharing: Match is always 0 and Commit keeps nothing
};

struct CacheConfig {
  std::vector<KvGroup> groups;      // 1..8, equal page_size
  std::vector<int32_t> num_pages;   // per group, >= 1
  CacheKind kind = CacheKind::kRadix;
  bool record_events = false;
};

// 128-bit chained page hash: hash(page i) covers namespace and all keys up to and including page i.
struct PageHash {
  uint64_t lo = 0, hi = 0;
  bool operator==(const PageHash&) const = default;
};

struct CacheEvent {
  enum class Kind : uint8_t { kStored, kRemoved } kind;
  int32_t group;
  PageHash hash;
  PageHash parent;       // zero for the first page of a namespace
  int64_t first_token;   // absolute position of the page's first token
};

struct PoolStats {  // pages of one group
  int32_t total, free, cached, leased, limbo;  // limbo includes invalidated pages that a lease still shares
  int32_t evictable;  // the cached pages that no lease locks
};

class CacheManager;
struct LeaseState;  // cache_manager.cc

// One row's claim on pages. Move-only; destroying a live lease releases it with last_step = kNoStep.
// Must not outlive its CacheManager.
class Lease {
 public:
  Lease();
  Lease(Lease&&) noexcept;
  Lease& operator=(Lease&&) noexcept;
  ~Lease();

  explicit operator bool() const { return state_ != nullptr; }
  // Tokens found in the cache by Acquire (a multiple of page_size) or given by Fork (any length).
  int64_t cached_len() const;
  // Absolute page index -> page; length = reserved pages. kNoPage below first_page(group).
  std::span<const PageId> pages(int group) const;
  int32_t first_page(int group) const;
  // Tokens the page tables have room for: page_size * pages(0).size().
  int64_t capacity() const;
  // False once a page it shares has been invalidated (its leader failed): what this lease's row
  // computed is worthless, release it with Invalidate and compute again.
  bool valid() const;

 private:
  friend class CacheManager;
  explicit Lease(std::unique_ptr<LeaseState>);
  std::unique_ptr<LeaseState> state_;
};

class CacheManager {
 public:
  explicit CacheManager(CacheConfig config);
  ~CacheManager();
  CacheManager(const CacheManager&) = delete;
  CacheManager& operator=(const CacheManager&) = delete;

  const CacheConfig& config() const;
  int32_t page_size() const;
  int num_groups() const;

  // Longest cached prefix of keys[0, n) in tokens (a multiple of page_size, valid in every group).
  // Changes nothing. O(matched tokens).
  int64_t Match(uint64_t ns, std::span<const int32_t> keys) const;

  // Match, cut to max_len (rounded down to pages), lock what matched, and return a lease whose page
  // tables hold it. Never fails. Pass max_len = n - 1 so that one token is left to compute.
  Lease Acquire(uint64_t ns, std::span<const int32_t> keys, int64_t max_len);

  // Grow the page tables to hold num_tokens, evicting least recently used unlocked pages where free
  // ones are short. All groups or nothing: false means too few pages, and nothing has changed
  // (not even an eviction).
  bool Reserve(Lease& lease, int64_t num_tokens);

  // Put the whole pages of keys[0, n) into the tree: computed by a step up to ready_step, at launch.
  // keys holds all of the row's key ids from position 0, n <= capacity. Pages whose keys the tree already
  // has stay this lease's own duplicates. Later Commit calls must extend the same keys.
  void Commit(Lease& lease, std::span<const int32_t> keys, int64_t ready_step);

  // A new lease over the parent's tokens [0, at), at <= n of keys: whole pages are shared through the tree
  // (committed if they were not), the partial tail page is copied: appended to *copies, to be put
  // into the next StepPlan. kNone copies every page, and so does a window group with pages that only the parent has.
  // Returns an empty lease if pages are too few, or if a window group has lost pages that `at` needs.
  // last_step: the newest launched step that names the parent: what it computes is ready then.
  // REQUIRES: parent.valid().
  Lease Fork(Lease& parent, std::span<const int32_t> keys, int64_t at, int64_t last_step,
             std::vector<PageCopy>* copies);

  // Drop whole pages past num_tokens from the page tables (own pages go to limbo until last_step
  // retires, shared ones are unlocked). REQUIRES: no committed page of this lease's own is cut
  // (only tokens never committed can be truncated).
  void Truncate(Lease& lease, int64_t num_tokens, int64_t last_step);

  // For window groups: give up pages that no query at position >= kv_len can see
  // (page end <= kv_len + 1 - window). Own pages go to limbo, shared nodes lose this group's lock.
  void SlideWindow(Lease& lease, int64_t kv_len, int64_t last_step);

  // Give everything back. last_step: the newest launched step that names the row and has not
  // retired, or kNoStep. Own pages pass through limbo; shared nodes are unlocked when that step retires,
  // deepest first (leaf before parents, see radix_tree.h).
  void Release(Lease lease, int64_t last_step);

  // As Release for a row whose computation failed: every tree node made of this lease's own pages
  // leaves the tree at once, with all below it, so nobody matches them again; leases that already
  // share them become !valid(). Their pages are freed when the last sharer lets go.
  void Invalidate(Lease lease, int64_t last_step);

  // Step `step` failed: what it and the steps after it were to compute leaves the tree, also the pages of leases that
  // have been released meanwhile. Leases that share such pages become !valid(). Call before Retire(step). O(nodes).
  void InvalidateSince(int64_t step);

  // Step `step` and all before it have retired: empty the limbo up to it.
  void Retire(int64_t step);

  // Drop every unlocked cached page. Returns pages freed (summed over groups).
  int64_t Flush();

  PoolStats stats(int group) const;
  // Pages of every group that Reserve could hand out now: free + evictable, the minimum over groups.
  int32_t AvailablePages() const;
  // Events since the last call (empty unless record_events).
  std::vector<CacheEvent> TakeEvents();

  // The chained hash of every whole page of keys, under ns.
  std::vector<PageHash> HashPages(uint64_t ns, std::span<const int32_t> keys) const;

  // Throws InternalError naming the first broken invariant. O(pages + nodes).
  void CheckInvariants() const;
  // The tree as indented text, for tests and humans: one node a line "keys [pages] locks".
  std::string DebugString() const;

  // Test hook: the k-th page allocation from now (k >= 1) fails as if the pool were empty; 0 disarms.
  void TEST_FailAllocation(int64_t k);
  int64_t num_tree_nodes() const;

 private:
  friend class Lease;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sapwood
