#include "cache/page_pool.h"

#include "base/check.h"

namespace sapwood {

PagePool::PagePool(int32_t num_pages) {
  SAPWOOD_REQUIRE(num_pages >= 1, "num_pages: expected at least 1 page in every group, got ", num_pages);
  states_.assign(static_cast<size_t>(num_pages), PageState::kFree);
  free_.reserve(states_.size());
  for (PageId page = num_pages - 1; page >= 0; --page) free_.push_back(page);  // so that page 0 is handed out first
  counts_[static_cast<size_t>(PageState::kFree)] = num_pages;
}

PageId PagePool::Allocate() {
  SAPWOOD_CHECK(!free_.empty(), "Allocate on an exhausted pool of ", total(), " pages");
  const PageId page = free_.back();
  free_.pop_back();
  states_[static_cast<size_t>(page)] = PageState::kLeased;
  --counts_[static_cast<size_t>(PageState::kFree)];
  ++counts_[static_cast<size_t>(PageState::kLeased)];
  return page;
}

void PagePool::Move(PageId page, PageState from, PageState to) {
  SAPWOOD_CHECK(page >= 0 && page < total(), "page ", page, " of ", total());
  SAPWOOD_CHECK(from != PageState::kFree && from != to && state(page) == from, "page ", page, " is in state ",
                static_cast<int>(state(page)), ", asked to go from ", static_cast<int>(from), " to ",
                static_cast<int>(to));
  states_[static_cast<size_t>(page)] = to;
  --counts_[static_cast<size_t>(from)];
  ++counts_[static_cast<size_t>(to)];
  if (to == PageState::kFree) free_.push_back(page);
}

void PagePool::CheckInvariants() const {
  std::array<int32_t, 4> counts{};
  for (const PageState state : states_) ++counts[static_cast<size_t>(state)];
  SAPWOOD_CHECK(counts == counts_, "the pool's counts differ from a recount");
  SAPWOOD_CHECK(static_cast<int32_t>(free_.size()) == num_free(), "free list holds ", free_.size(), " pages, count is ",
                num_free());
  std::vector<bool> listed(states_.size(), false);
  for (const PageId page : free_) {
    SAPWOOD_CHECK(page >= 0 && page < total(), "free list holds page ", page);
    SAPWOOD_CHECK(state(page) == PageState::kFree, "page ", page, " is on the free list but not free");
    SAPWOOD_CHECK(!listed[static_cast<size_t>(page)], "page ", page, " is on the free list twice");
    listed[static_cast<size_t>(page)] = true;
  }
}

}  // namespace sapwood
