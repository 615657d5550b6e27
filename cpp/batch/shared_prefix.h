// Rows of a step that decode behind the same pages: what the CPU runner and the CUDA executor read once for all of them.
//
// Pages are what says it: a page that two rows have in the same place of their tables holds the same tokens for both. All
// pages are compared, not the last alone, because a row may have computed its first tokens itself and keep its own pages of
// them while it has later ones from the cache.
#pragma once

#include <cstdint>
#include <vector>

#include "cache/kv_group.h"

namespace sapwood {

// A segment that may share.
struct PrefixReader {
  int32_t segment;
  const PageId* pages;
  int64_t tokens;  // that it may have in common with others: those before its new ones
};

struct SharedPrefix {
  std::vector<int32_t> segments;  // two or more
  int64_t chunks;                 // in the same pages, from the first token on
};

// Groups of readers by their first chunks of chunk_len tokens. A segment joins one group at most: with those that have the
// most reading in common with it, not with all that share some chunks. Time is that of comparing the tables of a group
// with one of its segments.
std::vector<SharedPrefix> FindSharedPrefixes(std::vector<PrefixReader> readers, int64_t page_size, int64_t chunk_len);

}  // namespace sapwood
