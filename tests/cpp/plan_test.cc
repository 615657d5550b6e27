// StepPlan bytes: round trip, every truncation refused, no harm from random bytes.
#include "batch/plan.h"

#include <gtest/gtest.h>

#include <random>

#include "base/check.h"

namespace sapwood {
namespace {

StepPlan SamplePlan() {
  StepPlan plan;
  plan.step_id = 0x1122334455667788;
  plan.row_ops = {{.kind = RowOpKind::kInit, .row = 1, .gen = 7, .begin = 0},
                  {.kind = RowOpKind::kAppendPages, .row = 1, .gen = 7, .group = 1, .begin = 2, .count = 3},
                  {.kind = RowOpKind::kForceTokens, .row = 2, .gen = 9, .begin = 0, .count = 2, .value = 1LL << 40},
                  {.kind = RowOpKind::kTruncate, .row = 2, .gen = 9, .value = 5},
                  {.kind = RowOpKind::kFree, .row = 3, .gen = 0xFFFFFFFF}};
  RowInit init;
  init.row = 1;
  init.gen = 7;
  init.kv_len = 16;
  init.prompt_len = 20;
  init.max_len = 1LL << 33;
  init.min_len = 21;
  init.temperature = 0.25f;
  init.top_k = 50;
  init.top_p = 0.9f;
  init.min_p = 0.05f;
  init.seed = 0xFEDCBA9876543210;
  init.stream = 3;
  init.lora_slot = 2;
  init.rope_mode = 1;
  init.return_logprob = 1;
  init.stop_begin = 0;
  init.stop_count = 2;
  plan.inits = {init};
  plan.ints = {11, 12, -1, 4, 5};
  plan.items = {{1, 7, ItemKind::kExtend, 4, 3, 0, 16}, {2, 9, ItemKind::kDecode, 1, 0, 0, -1}};
  plan.tokens = {100, 101, 102, 103};
  plan.copies = {{.group = 1, .src = 8, .dst = 9}};
  plan.mask_rows = {2};
  return plan;
}

TEST(PlanTest, RoundTripKeepsEveryField) {
  const StepPlan plan = SamplePlan();
  const std::vector<uint8_t> bytes = plan.Serialize();
  const StepPlan back = StepPlan::Deserialize(bytes.data(), bytes.size());
  EXPECT_EQ(back.Serialize(), bytes);
  EXPECT_EQ(back.step_id, plan.step_id);
  EXPECT_EQ(back.ints, plan.ints);
  EXPECT_EQ(back.tokens, plan.tokens);
  EXPECT_EQ(back.mask_rows, plan.mask_rows);
  ASSERT_EQ(back.row_ops.size(), plan.row_ops.size());
  for (size_t i = 0; i < plan.row_ops.size(); ++i) {
    const RowOp &a = plan.row_ops[i], &b = back.row_ops[i];
    EXPECT_EQ(std::tie(a.kind, a.row, a.gen, a.group, a.begin, a.count, a.value),
              std::tie(b.kind, b.row, b.gen, b.group, b.begin, b.count, b.value));
  }
  ASSERT_EQ(back.items.size(), plan.items.size());
  for (size_t i = 0; i < plan.items.size(); ++i) {
    const PlanItem &a = plan.items[i], &b = back.items[i];
    EXPECT_EQ(std::tie(a.row, a.gen, a.kind, a.q_len, a.logit_from, a.token_begin, a.kv_len),
              std::tie(b.row, b.gen, b.kind, b.q_len, b.logit_from, b.token_begin, b.kv_len));
  }
  ASSERT_EQ(back.inits.size(), 1u);
  const RowInit &a = plan.inits[0], &b = back.inits[0];
  EXPECT_EQ(std::tie(a.row, a.gen, a.kv_len, a.prompt_len, a.max_len, a.min_len, a.temperature, a.top_k, a.top_p),
            std::tie(b.row, b.gen, b.kv_len, b.prompt_len, b.max_len, b.min_len, b.temperature, b.top_k, b.top_p));
  EXPECT_EQ(std::tie(a.min_p, a.seed, a.stream, a.lora_slot, a.rope_mode, a.return_logprob, a.stop_begin),
            std::tie(b.min_p, b.seed, b.stream, b.lora_slot, b.rope_mode, b.return_logprob, b.stop_begin));
  EXPECT_EQ(a.stop_count, b.stop_count);
  ASSERT_EQ(back.copies.size(), 1u);
  EXPECT_EQ(std::tie(back.copies[0].group, back.copies[0].src, back.copies[0].dst), std::make_tuple(1, 8, 9));
}

TEST(PlanTest, EmptyPlanRoundTrips) {
  const std::vector<uint8_t> bytes = StepPlan().Serialize();
  EXPECT_EQ(StepPlan::Deserialize(bytes.data(), bytes.size()).step_id, kNoStep);
}

TEST(PlanTest, TruncationAtEveryByteIsRefused) {
  const std::vector<uint8_t> bytes = SamplePlan().Serialize();
  for (size_t n = 0; n < bytes.size(); ++n) {
    const std::vector<uint8_t> cut(bytes.begin(), bytes.begin() + n);  // its own allocation: a sanitizer sees overreads
    EXPECT_THROW(StepPlan::Deserialize(cut.data(), cut.size()), InvalidArgument) << n;
  }
}

TEST(PlanTest, TrailingBytesAndForeignMagicAreRefused) {
  std::vector<uint8_t> bytes = SamplePlan().Serialize();
  bytes.push_back(0);
  EXPECT_THROW(StepPlan::Deserialize(bytes.data(), bytes.size()), InvalidArgument);
  bytes.pop_back();
  for (const size_t at : {size_t{0}, size_t{3}, size_t{4}}) {  // magic, magic, version
    std::vector<uint8_t> foreign = bytes;
    foreign[at] ^= 1;
    EXPECT_THROW(StepPlan::Deserialize(foreign.data(), foreign.size()), InvalidArgument) << at;
  }
}

TEST(PlanTest, UnknownKindsAreRefused) {
  constexpr size_t kArrays = 16;  // magic, version, step_id
  StepPlan op, item;
  op.row_ops = {{.kind = RowOpKind::kFree, .row = 0, .gen = 1}};
  item.items = {{0, 1, ItemKind::kResume, 1, 0, 0, 0}};
  std::vector<uint8_t> bytes = op.Serialize();
  ASSERT_EQ(bytes[kArrays + 4], static_cast<uint8_t>(RowOpKind::kFree));
  ++bytes[kArrays + 4];
  EXPECT_THROW(StepPlan::Deserialize(bytes.data(), bytes.size()), InvalidArgument);
  bytes = item.Serialize();
  const size_t kind = kArrays + 4 * 4 + 8;  // three empty arrays and the count before it, row, gen
  ASSERT_EQ(bytes[kind], static_cast<uint8_t>(ItemKind::kResume));
  ++bytes[kind];
  EXPECT_THROW(StepPlan::Deserialize(bytes.data(), bytes.size()), InvalidArgument);
}

// The format is canonical: flipped bytes are either refused or read as exactly the plan they spell.
TEST(PlanTest, RandomFlipsAreRefusedOrCanonical) {
  const std::vector<uint8_t> bytes = SamplePlan().Serialize();
  std::mt19937_64 random(20240611);
  int refused = 0;
  for (int round = 0; round < 20000; ++round) {
    std::vector<uint8_t> flipped = bytes;
    for (uint64_t flips = 1 + random() % 4; flips > 0; --flips) {
      flipped[random() % flipped.size()] ^= static_cast<uint8_t>(1u << (random() % 8));
    }
    try {
      const StepPlan plan = StepPlan::Deserialize(flipped.data(), flipped.size());
      ASSERT_EQ(plan.Serialize(), flipped) << "round " << round;
    } catch (const InvalidArgument&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 1000);
  EXPECT_LT(refused, 20000);
}

TEST(PlanTest, RandomBytesAreRefused) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 2000; ++round) {
    std::vector<uint8_t> garbage(random() % 300);
    for (uint8_t& byte : garbage) byte = static_cast<uint8_t>(random());
    // Half of them with a good header, so that the arrays are reached.
    const std::vector<uint8_t> good = StepPlan().Serialize();
    if (round % 2 == 0) garbage.insert(garbage.begin(), good.begin(), good.begin() + 16);
    EXPECT_THROW(StepPlan::Deserialize(garbage.data(), garbage.size()), InvalidArgument) << round;
  }
}

}  // namespace
}  // namespace sapwood
