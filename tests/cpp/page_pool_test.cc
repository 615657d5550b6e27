// PagePool: states, counts, the order of handing out, and the checks that catch a page given back twice.

#include "cache/page_pool.h"

#include <gtest/gtest.h>

#include <random>

#include "base/check.h"

namespace sapwood {
namespace {

TEST(PagePoolTest, HandsOutEveryPageOnce) {
  PagePool pool(5);
  for (PageId expected = 0; expected < 5; ++expected) EXPECT_EQ(pool.Allocate(), expected);
  EXPECT_EQ(pool.num_free(), 0);
  EXPECT_EQ(pool.count(PageState::kLeased), 5);
  EXPECT_THROW(pool.Allocate(), InternalError);
  pool.CheckInvariants();
}

TEST(PagePoolTest, ReusesThePageFreedLast) {
  PagePool pool(4);
  for (int i = 0; i < 3; ++i) pool.Allocate();
  pool.Move(0, PageState::kLeased, PageState::kFree);
  pool.Move(2, PageState::kLeased, PageState::kFree);
  EXPECT_EQ(pool.Allocate(), 2);
  EXPECT_EQ(pool.Allocate(), 0);
  EXPECT_EQ(pool.Allocate(), 3);
}

TEST(PagePoolTest, CountsFollowStates) {
  PagePool pool(3);
  const PageId page = pool.Allocate();
  pool.Move(page, PageState::kLeased, PageState::kCached);
  pool.Move(page, PageState::kCached, PageState::kLimbo);
  EXPECT_EQ(pool.state(page), PageState::kLimbo);
  EXPECT_EQ(pool.count(PageState::kLimbo), 1);
  EXPECT_EQ(pool.count(PageState::kLeased) + pool.count(PageState::kCached), 0);
  pool.Move(page, PageState::kLimbo, PageState::kFree);
  EXPECT_EQ(pool.num_free(), 3);
  pool.CheckInvariants();
}

TEST(PagePoolTest, RefusesAWrongState) {
  PagePool pool(2);
  const PageId page = pool.Allocate();
  EXPECT_THROW(pool.Move(page, PageState::kCached, PageState::kFree), InternalError);
  pool.Move(page, PageState::kLeased, PageState::kFree);
  EXPECT_THROW(pool.Move(page, PageState::kLeased, PageState::kFree), InternalError);  // given back twice
  EXPECT_THROW(pool.Move(page, PageState::kFree, PageState::kLeased), InternalError);
  EXPECT_THROW(pool.Move(7, PageState::kLeased, PageState::kFree), InternalError);
  EXPECT_EQ(pool.num_free(), 2);
  pool.CheckInvariants();
}

TEST(PagePoolTest, RefusesNoPages) { EXPECT_THROW(PagePool(0), InvalidArgument); }

TEST(PagePoolTest, RandomMovesAgainstAnArrayOfStates) {
  const uint64_t seed = 20240613;
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  PagePool pool(17);
  std::vector<PageState> model(17, PageState::kFree);
  for (int i = 0; i < 5000; ++i) {
    const auto page = static_cast<size_t>(random() % 17);
    const auto to = static_cast<PageState>(random() % 4);
    if (random() % 3 == 0 && pool.num_free() > 0) {
      const auto fresh = static_cast<size_t>(pool.Allocate());
      ASSERT_EQ(model[fresh], PageState::kFree);
      model[fresh] = PageState::kLeased;
    } else if (model[page] != PageState::kFree && model[page] != to) {
      pool.Move(static_cast<PageId>(page), model[page], to);
      model[page] = to;
    }
    for (size_t p = 0; p < model.size(); ++p) ASSERT_EQ(pool.state(static_cast<PageId>(p)), model[p]);
    pool.CheckInvariants();
  }
}

}  // namespace
}  // namespace sapwood
