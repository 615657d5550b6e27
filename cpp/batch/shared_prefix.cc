#include "batch/shared_prefix.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace sapwood {
namespace {

// Whole chunks that two readers have in the same pages; a page that a chunk ends in counts with it.
int64_t CommonChunks(const PrefixReader& a, const PrefixReader& b, int64_t page_size, int64_t chunk_len) {
  const int64_t most = std::min(a.tokens, b.tokens) / chunk_len;
  int64_t page = 0;
  for (int64_t chunk = 0; chunk < most; ++chunk) {
    const int64_t end = ((chunk + 1) * chunk_len + page_size - 1) / page_size;
    if (std::memcmp(a.pages + page, b.pages + page, static_cast<size_t>(end - page) * sizeof(PageId)) != 0) return chunk;
    page = end;
  }
  return most;
}

}  // namespace

std::vector<SharedPrefix> FindSharedPrefixes(std::vector<PrefixReader> readers, int64_t page_size, int64_t chunk_len) {
  std::vector<SharedPrefix> found;
  std::erase_if(readers, [&](const PrefixReader& reader) { return reader.tokens < chunk_len; });
  std::stable_sort(readers.begin(), readers.end(),
                   [](const PrefixReader& a, const PrefixReader& b) { return a.pages[0] < b.pages[0]; });
  std::vector<std::pair<int64_t, PrefixReader>> common;  // chunks in common with the leader, reader
  std::vector<PrefixReader> rest;
  for (size_t i = 0; i < readers.size();) {
    const PrefixReader leader = readers[i++];
    common.clear();
    rest.clear();
    for (; i < readers.size() && readers[i].pages[0] == leader.pages[0]; ++i) {
      const int64_t chunks = CommonChunks(leader, readers[i], page_size, chunk_len);
      if (chunks > 0) {
        common.push_back({chunks, readers[i]});
      } else {
        rest.push_back(readers[i]);
      }
    }
    std::stable_sort(common.begin(), common.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    size_t best = 0;  // how many of them join
    int64_t best_saved = 0;
    for (size_t n = 1; n <= common.size(); ++n) {
      const int64_t saved = static_cast<int64_t>(n) * common[n - 1].first;
      if (saved > best_saved) {
        best_saved = saved;
        best = n;
      }
    }
    for (size_t n = best; n < common.size(); ++n) rest.push_back(common[n].second);
    // They have the leader's first page still: the next round begins with them.
    i -= rest.size();
    std::copy(rest.begin(), rest.end(), readers.begin() + static_cast<int64_t>(i));
    if (best == 0) continue;
    SharedPrefix prefix{{leader.segment}, common[best - 1].first};
    for (size_t n = 0; n < best; ++n) prefix.segments.push_back(common[n].second.segment);
    found.push_back(std::move(prefix));
  }
  return found;
}

}  // namespace sapwood
