// The pages of one KvGroup: which are free, and in what state each of the others is.
//
// On the request path: the cache manager takes pages from here for leases (Reserve, Fork); the radix tree and the
// manager's limbo give them back. Nothing here knows about memory: a PageId is an index that the executor's pool of
// bytes shares.
//
// Thread safety: none; owned by the event loop's thread.
//
// Invariants:
//   1. a page has exactly one state, and count(s) is the number of pages in state s;
//   2. the free list holds each free page once, and nothing else.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cache/kv_group.h"

namespace sapwood {

enum class PageState : uint8_t {
  kFree,
  kLeased,  // one lease's own: it writes there, nobody else reads
  kCached,  // in the tree
  kLimbo,   // left its lease or the tree, but a running step or a lease that shares it still names it
};

class PagePool {
 public:
  explicit PagePool(int32_t num_pages);

  int32_t total() const { return static_cast<int32_t>(states_.size()); }
  int32_t count(PageState state) const { return counts_[static_cast<size_t>(state)]; }
  int32_t num_free() const { return count(PageState::kFree); }
  PageState state(PageId page) const { return states_[static_cast<size_t>(page)]; }

  // A free page, now kLeased. The page freed last comes first: its bytes are likeliest to be in a CPU cache.
  // REQUIRES: num_free() > 0. O(1).
  PageId Allocate();

  // Changes a page's state, `to` may be kFree. REQUIRES: state(page) == from, from != kFree, from != to. O(1).
  void Move(PageId page, PageState from, PageState to);

  // Throws InternalError naming the first broken invariant. O(pages).
  void CheckInvariants() const;

 private:
  std::vector<PageState> states_;
  std::vector<PageId> free_;  // a stack
  std::array<int32_t, 4> counts_{};
};

}  // namespace sapwood
