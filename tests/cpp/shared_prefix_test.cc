// Which segments FindSharedPrefixes puts together, against a search of all choices where there are few.
#include "batch/shared_prefix.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

namespace sapwood {
namespace {

struct Found {
  std::vector<std::pair<std::set<int32_t>, int64_t>> prefixes;
  bool operator==(const Found&) const = default;
};

Found Find(const std::vector<std::vector<PageId>>& tables, const std::vector<int64_t>& tokens, int64_t page_size,
           int64_t chunk_len) {
  std::vector<PrefixReader> readers;
  for (size_t s = 0; s < tables.size(); ++s) readers.push_back({static_cast<int32_t>(s), tables[s].data(), tokens[s]});
  Found found;
  for (const SharedPrefix& prefix : FindSharedPrefixes(readers, page_size, chunk_len)) {
    found.prefixes.push_back({{prefix.segments.begin(), prefix.segments.end()}, prefix.chunks});
    EXPECT_EQ(prefix.segments.size(), found.prefixes.back().first.size());
  }
  return found;
}

TEST(SharedPrefix, WholeChunksInCommonPages) {
  const std::vector<std::vector<PageId>> tables = {{1, 2, 3, 4, 5}, {1, 2, 3, 4, 6}, {7, 2, 3, 4, 5}};
  // Pages of 16, chunks of two pages.
  EXPECT_EQ(Find(tables, {80, 80, 80}, 16, 32), (Found{{{{0, 1}, 2}}}));
  EXPECT_EQ(Find(tables, {80, 63, 80}, 16, 32), (Found{{{{0, 1}, 1}}}));
  EXPECT_EQ(Find(tables, {31, 80, 80}, 16, 32), (Found{}));
  // A chunk of 24 ends in the middle of its second page; the fifth page, which is not common, would have the third chunk.
  EXPECT_EQ(Find(tables, {80, 80, 80}, 16, 24), (Found{{{{0, 1}, 2}}}));
  EXPECT_EQ(Find(tables, {25, 25, 25}, 5, 15), (Found{{{{0, 1}, 1}}}));
}

TEST(SharedPrefix, ComparesEveryPage) {
  // Segment 1 computed its first page itself, and has the next from the cache.
  EXPECT_EQ(Find({{1, 2, 3}, {1, 9, 3}, {1, 2, 3}}, {48, 48, 48}, 16, 16), (Found{{{{0, 2}, 3}}}));
  EXPECT_EQ(Find({{8, 2}, {1, 2}}, {32, 32}, 16, 16), (Found{}));
}

TEST(SharedPrefix, JoinsWhatSavesMost) {
  // Five have one chunk in common, two of them eight: these two together, and the other three.
  std::vector<std::vector<PageId>> tables(5, {1, 0, 0, 0, 0, 0, 0, 0});
  for (int32_t s = 0; s < 5; ++s) tables[s][1] = s < 2 ? 50 : 60 + s;
  EXPECT_EQ(Find(tables, std::vector<int64_t>(5, 8), 1, 1), (Found{{{{0, 1}, 8}, {{2, 3, 4}, 1}}}));
  // With two chunks it is the five.
  EXPECT_EQ(Find(tables, {8, 2, 8, 8, 8}, 1, 1), (Found{{{{0, 1, 2, 3, 4}, 1}}}));
}

// Every segment is in one prefix at most, all of a prefix have its chunks in common, and no two segments that are left
// over have any.
TEST(SharedPrefix, RandomTrees) {
  std::mt19937 random(7);
  for (int round = 0; round < 500; ++round) {
    const int64_t page_size = 1 + static_cast<int64_t>(random() % 6), chunk_len = 1 + static_cast<int64_t>(random() % 9);
    const size_t num_segments = random() % 12;
    std::vector<std::vector<PageId>> tables(num_segments, std::vector<PageId>(12));
    std::vector<int64_t> tokens;
    for (size_t s = 0; s < num_segments; ++s) {
      const size_t parent = random() % (s + 1), shared = random() % 13;
      for (size_t page = 0; page < 12; ++page) {
        tables[s][page] = parent < s && page < shared ? tables[parent][page] : static_cast<PageId>(100 * s + page);
      }
      tokens.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(12 * page_size + 1)));
    }
    const auto in_common = [&](int32_t a, int32_t b) {  // whole chunks, token by token
      int64_t n = 0;
      while (n < std::min(tokens[a], tokens[b]) && tables[a][n / page_size] == tables[b][n / page_size]) ++n;
      return n / chunk_len;
    };
    std::set<int32_t> left;
    for (size_t s = 0; s < num_segments; ++s) left.insert(static_cast<int32_t>(s));
    for (const auto& [segments, chunks] : Find(tables, tokens, page_size, chunk_len).prefixes) {
      ASSERT_GE(segments.size(), 2u);
      int64_t least = INT64_MAX;
      for (int32_t s : segments) {
        ASSERT_EQ(left.erase(s), 1u);
        if (s != *segments.begin()) least = std::min(least, in_common(*segments.begin(), s));
      }
      ASSERT_GE(chunks, 1);
      ASSERT_GE(least, chunks);
    }
    for (int32_t a : left) {
      for (int32_t b : left) ASSERT_TRUE(a == b || in_common(a, b) == 0) << "round " << round << ": " << a << ", " << b;
    }
  }
}

}  // namespace
}  // namespace sapwood
