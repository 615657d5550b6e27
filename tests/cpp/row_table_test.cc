// RowTable: what row ops leave behind, what Prepare derives, when a row ends, is held and goes on. MaskTable: which masks
// are there, and that they go.
#include "batch/row_table.h"

#include <gtest/gtest.h>

#include "base/check.h"

namespace sapwood {
namespace {

using Ints = std::vector<int32_t>;
using Longs = std::vector<int64_t>;

KvGroup Group(KvKind kind, int32_t page_size, int32_t window = 0) {
  return {.kind = kind, .window = window, .num_layers = 1, .page_size = page_size, .page_bytes = 0};
}

std::vector<KvGroup> TwoGroups() { return {Group(KvKind::kFull, 4), Group(KvKind::kWindow, 4, 6)}; }

// Writes plans by hand, as the builder would.
struct PlanWriter {
  StepPlan plan;

  PlanWriter& Init(int32_t row, uint32_t gen, int64_t kv_len, int64_t max_len = 100, Ints stop_ids = {},
                   int64_t min_len = 0) {
    RowInit init;
    init.row = row;
    init.gen = gen;
    init.kv_len = kv_len;
    init.max_len = max_len;
    init.min_len = min_len;
    init.stop_begin = static_cast<int32_t>(plan.ints.size());
    init.stop_count = static_cast<int32_t>(stop_ids.size());
    plan.ints.insert(plan.ints.end(), stop_ids.begin(), stop_ids.end());
    plan.row_ops.push_back(
        {.kind = RowOpKind::kInit, .row = row, .gen = gen, .begin = static_cast<int32_t>(plan.inits.size())});
    plan.inits.push_back(init);
    return *this;
  }
  PlanWriter& Ids(RowOpKind kind, int32_t row, uint32_t gen, int32_t group, Ints ids, int64_t value = 0) {
    plan.row_ops.push_back({.kind = kind,
                            .row = row,
                            .gen = gen,
                            .group = group,
                            .begin = static_cast<int32_t>(plan.ints.size()),
                            .count = static_cast<int32_t>(ids.size()),
                            .value = value});
    plan.ints.insert(plan.ints.end(), ids.begin(), ids.end());
    return *this;
  }
  PlanWriter& Pages(int32_t row, uint32_t gen, int32_t group, Ints ids) {
    return Ids(RowOpKind::kAppendPages, row, gen, group, std::move(ids));
  }
  PlanWriter& Op(RowOpKind kind, int32_t row, uint32_t gen, int64_t value = 0) {
    return Ids(kind, row, gen, 0, {}, value);
  }
  PlanWriter& Extend(int32_t row, uint32_t gen, int64_t kv_len, Ints tokens, int32_t logit_from) {
    plan.items.push_back({row, gen, ItemKind::kExtend, static_cast<int32_t>(tokens.size()), logit_from,
                          static_cast<int32_t>(plan.tokens.size()), kv_len});
    plan.tokens.insert(plan.tokens.end(), tokens.begin(), tokens.end());
    return *this;
  }
  PlanWriter& Item(int32_t row, uint32_t gen, ItemKind kind) {
    plan.items.push_back({row, gen, kind, 1, 0, 0, -1});
    return *this;
  }
  PlanWriter& Decode(int32_t row, uint32_t gen) { return Item(row, gen, ItemKind::kDecode); }
  PlanWriter& Resume(int32_t row, uint32_t gen) {
    plan.items.push_back({row, gen, ItemKind::kResume, 0, 0, 0, -1});
    return *this;
  }
  PlanWriter& Masked(int32_t row) {
    plan.mask_rows.push_back(row);
    return *this;
  }
};

StepBatch PrepareStep(RowTable& rows, const PlanWriter& writer) {
  StepBatch batch;
  rows.ApplyRowOps(writer.plan);
  rows.Prepare(writer.plan, &batch);
  return batch;
}

SampledToken Token(int32_t token) { return {.token = token, .logprob = 0.0f, .bad = false}; }

TEST(RowTableTest, DerivesArraysFromRowState) {
  RowTable rows(TwoGroups(), 4);
  const StepBatch first = PrepareStep(rows, PlanWriter()
                                        .Init(2, 5, 4)
                                        .Pages(2, 5, 0, {10, 11})
                                        .Pages(2, 5, 1, {20, 21})
                                        .Init(0, 6, 0)
                                        .Pages(0, 6, 0, {12})
                                        .Pages(0, 6, 1, {22})
                                        .Extend(2, 5, 4, {7, 8, 9}, 2)
                                        .Extend(0, 6, 0, {1, 2}, 2));
  EXPECT_EQ(first.num_tokens, 5);
  EXPECT_EQ(first.tokens, (Ints{7, 8, 9, 1, 2}));
  EXPECT_EQ(first.positions, (Longs{4, 5, 6, 0, 1}));
  EXPECT_EQ(first.token_segment, (Ints{0, 0, 0, 1, 1}));
  EXPECT_EQ(first.slots[0], (Longs{44, 45, 46, 48, 49}));
  EXPECT_EQ(first.slots[1], (Longs{84, 85, 86, 88, 89}));
  EXPECT_EQ(first.logit_src, (Ints{2}));  // the last query token of row 2; row 0 is mid-prompt
  EXPECT_EQ(first.logit_segment, (Ints{0}));
  EXPECT_EQ(first.num_kv, 7 + 2);
  ASSERT_EQ(first.segments.size(), 2u);
  EXPECT_EQ(first.segments[0].kv_len, 7);
  EXPECT_EQ(first.segments[1].q_begin, 3);
  EXPECT_EQ(first.page_tables[1][0][1], 21);

  EXPECT_EQ(rows.CommitSample(2, Token(77)), 0);
  // Crosses into a new page; the token comes from the row, not from the plan.
  const StepBatch second =
      PrepareStep(rows, PlanWriter().Pages(2, 5, 0, {13}).Pages(2, 5, 1, {23}).Decode(2, 5).Extend(0, 6, 2, {3}, 0));
  EXPECT_EQ(second.tokens, (Ints{77, 3}));
  EXPECT_EQ(second.positions, (Longs{7, 2}));
  EXPECT_EQ(second.slots[0], (Longs{47, 50}));
  EXPECT_EQ(second.logit_src, (Ints{0, 1}));
  EXPECT_EQ(rows.row(2).kv_len, 8);
  EXPECT_EQ(rows.row(2).pages[1], (Ints{20, 21, 23}));
}

TEST(RowTableTest, ExtendAcrossPagesWalksTheTable) {
  RowTable rows({Group(KvKind::kFull, 3)}, 1);
  const StepBatch batch =
      PrepareStep(rows, PlanWriter().Init(0, 1, 2).Pages(0, 1, 0, {5, 2, 9}).Extend(0, 1, 2, {1, 1, 1, 1, 1, 1}, 5));
  EXPECT_EQ(batch.slots[0], (Longs{17, 6, 7, 8, 27, 28}));
}

TEST(RowTableTest, InitForgetsTheFormerRow) {
  RowTable rows({Group(KvKind::kFull, 4)}, 1);
  PrepareStep(rows, PlanWriter().Init(0, 1, 0, 2, {3}).Pages(0, 1, 0, {6}).Extend(0, 1, 0, {1}, 0));
  EXPECT_EQ(rows.CommitSample(0, Token(9)), kFinishedLength);
  const StepBatch batch =
      PrepareStep(rows, PlanWriter().Init(0, 2, 0, 9, {4, 5}).Pages(0, 2, 0, {7}).Extend(0, 2, 0, {1}, 0));
  EXPECT_EQ(batch.slots[0], (Longs{28}));
  EXPECT_EQ(rows.row(0).stop_ids, (Ints{4, 5}));
  EXPECT_TRUE(rows.row(0).alive);
  EXPECT_EQ(rows.CommitSample(0, Token(3)), 0);  // the former row's stop id
}

TEST(RowTableTest, DeadOrStaleItemsAreSkipped) {
  RowTable rows({Group(KvKind::kFull, 4)}, 3);
  PrepareStep(rows, PlanWriter()
                .Init(0, 1, 0, 100, {42})
                .Pages(0, 1, 0, {0})
                .Init(1, 2, 0)
                .Pages(1, 2, 0, {1})
                .Extend(0, 1, 0, {5}, 0)
                .Extend(1, 2, 0, {5}, 0));
  EXPECT_EQ(rows.CommitSample(0, Token(42)), kFinishedStop);
  EXPECT_EQ(rows.CommitSample(1, Token(42)), 0);
  const StepBatch batch = PrepareStep(rows, PlanWriter().Decode(0, 1).Decode(1, 99).Decode(2, 0).Decode(1, 2));
  EXPECT_EQ(batch.skipped_items, (Ints{0, 1, 2}));
  ASSERT_EQ(batch.segments.size(), 1u);
  EXPECT_EQ(batch.segments[0].item, 3);
  EXPECT_EQ(rows.row(0).kv_len, 1);  // not advanced
  const StepBatch freed = PrepareStep(rows, PlanWriter().Op(RowOpKind::kFree, 1, 2).Decode(1, 2));
  EXPECT_EQ(freed.skipped_items, (Ints{0}));
  EXPECT_EQ(freed.num_tokens, 0);
}

TEST(RowTableTest, StaleFreeLeavesTheNewRowAlone) {
  RowTable rows({Group(KvKind::kFull, 4)}, 1);
  PrepareStep(rows, PlanWriter().Init(0, 2, 0).Pages(0, 2, 0, {0}).Op(RowOpKind::kFree, 0, 1));
  EXPECT_TRUE(rows.row(0).alive);
}

TEST(RowTableTest, EndsOnStopLengthAndBadLogits) {
  struct Case {
    int64_t kv_len, min_len, max_len;
    SampledToken sampled;
    uint8_t flags;
  };
  const SampledToken bad{.token = 1, .logprob = 0.0f, .bad = true};
  const Case cases[] = {
      {4, 0, 100, Token(7), 0},
      {4, 0, 100, Token(50), kFinishedStop},
      {4, 5, 100, Token(50), kFinishedStop},    // 5 tokens exist before sampling
      {4, 6, 100, Token(50), 0},                // below min_len
      {4, 0, 6, Token(7), kFinishedLength},     // the sixth token
      {4, 0, 7, Token(7), 0},
      {4, 0, 6, Token(50), kFinishedStop},      // stop wins over length
      {4, 6, 6, Token(50), kFinishedLength},
      {4, 0, 100, bad, kBadLogits},
  };
  for (const Case& c : cases) {
    RowTable rows({Group(KvKind::kFull, 16)}, 1);
    PlanWriter writer;
    writer.Init(0, 1, c.kv_len, c.max_len, {50}, c.min_len).Pages(0, 1, 0, {0}).Extend(0, 1, c.kv_len, {9}, 0);
    PrepareStep(rows, writer);
    EXPECT_EQ(rows.CommitSample(0, c.sampled), c.flags) << c.min_len << " " << c.max_len;
    EXPECT_EQ(rows.row(0).alive, c.flags == 0);
    if (c.flags != 0) { EXPECT_THROW(rows.CommitSample(0, Token(1)), InternalError); }
  }
}

TEST(RowTableTest, ForceAndTruncate) {
  RowTable rows({Group(KvKind::kFull, 4)}, 1);
  PrepareStep(rows, PlanWriter().Init(0, 1, 0).Pages(0, 1, 0, {3}).Extend(0, 1, 0, {5, 6, 7}, 2));
  rows.CommitSample(0, Token(8));
  const StepBatch forced =
      PrepareStep(rows, PlanWriter().Ids(RowOpKind::kForceTokens, 0, 1, 0, {30, 31}, 3).Decode(0, 1));
  EXPECT_EQ(forced.tokens, (Ints{31}));
  EXPECT_THROW(PrepareStep(rows, PlanWriter().Ids(RowOpKind::kForceTokens, 0, 1, 0, {30}, 3)), InternalError);
  PrepareStep(rows, PlanWriter().Op(RowOpKind::kTruncate, 0, 1, 2));
  EXPECT_EQ(rows.row(0).kv_len, 2);
  EXPECT_THROW(PrepareStep(rows, PlanWriter().Op(RowOpKind::kTruncate, 0, 1, 3)), InternalError);
}

TEST(RowTableTest, ImpossiblePlansAreInternalErrors) {
  const auto fresh = [] {
    RowTable rows(TwoGroups(), 2);
    PrepareStep(rows, PlanWriter().Init(0, 1, 0).Pages(0, 1, 0, {0}).Pages(0, 1, 1, {0}));
    return rows;
  };
  const auto fails = [&](const PlanWriter& writer, const char* because) {
    RowTable rows = fresh();
    EXPECT_THROW(PrepareStep(rows, writer), InternalError) << because;
  };
  fails(PlanWriter().Init(2, 1, 0), "row out of range");
  fails(PlanWriter().Init(-1, 1, 0), "negative row");
  fails(PlanWriter().Pages(0, 9, 0, {1}), "generation");
  fails(PlanWriter().Pages(0, 1, 2, {1}), "group");
  fails(PlanWriter().Decode(5, 1), "item row");
  fails(PlanWriter().Extend(0, 1, 1, {1}, 0), "expected kv_len");
  fails(PlanWriter().Extend(0, 1, 0, {1, 2, 3, 4, 5}, 4), "page table too short");
  fails(PlanWriter().Extend(0, 1, 0, {1}, 2), "logit_from");
  fails(PlanWriter().Pages(0, 1, 0, {1}).Extend(0, 1, 0, {1, 2, 3, 4, 5}, 4), "second group's table too short");
  fails(PlanWriter().Pages(0, 1, 0, {1}).Pages(0, 1, 1, {kNoPage}).Extend(0, 1, 0, {1, 2, 3, 4, 5}, 4), "no page");
  PlanWriter outside;
  outside.Pages(0, 1, 0, {1});
  outside.plan.row_ops.back().count = 2;
  fails(outside, "ids outside ints");
  PlanWriter tokens;
  tokens.Extend(0, 1, 0, {1}, 0);
  tokens.plan.items.back().token_begin = 1;
  fails(tokens, "tokens outside");
  for (const ItemKind kind : {ItemKind::kVerify, ItemKind::kScore}) {
    fails(PlanWriter().Item(0, 1, kind), "unsupported kind");
  }
  fails(PlanWriter().Decode(0, 1).Masked(2), "mask of a row out of range");
  fails(PlanWriter().Decode(0, 1).Masked(-1), "mask of a negative row");
  fails(PlanWriter().Item(0, 1, ItemKind::kResume), "resume with a query token");
  fails(PlanWriter().Resume(0, 1), "resume of a row that is not held");
}

const SampledToken kLate{.held = true};

// Row 0 of generation 7 with a prompt of three tokens, held at position 3.
RowTable HeldRow() {
  RowTable rows(TwoGroups(), 3);
  const StepBatch batch = PrepareStep(
      rows, PlanWriter().Init(0, 7, 0).Pages(0, 7, 0, {4, 5}).Pages(0, 7, 1, {6, 7}).Extend(0, 7, 0, {1, 2, 3}, 1)
                .Masked(0));
  EXPECT_EQ(batch.logit_masked, (std::vector<uint8_t>{0, 1}));  // only the last logit row draws a token
  EXPECT_EQ(batch.logit_position, (Longs{2, 3}));
  EXPECT_EQ(rows.CommitSample(0, kLate), kHeld);
  return rows;
}

TEST(RowTableTest, OnlyTheRowsThatArePlannedToAreMasked) {
  RowTable rows({Group(KvKind::kFull, 4)}, 3);
  PlanWriter writer;
  for (int32_t r = 0; r < 3; ++r) {
    writer.Init(r, 1, 0).Pages(r, 1, 0, {r}).Extend(r, 1, 0, {5, 6}, r == 2 ? 2 : 1);
  }
  EXPECT_EQ(PrepareStep(rows, writer.Masked(2).Masked(1)).logit_masked, (std::vector<uint8_t>{0, 1}));
  for (int32_t r = 0; r < 2; ++r) rows.CommitSample(r, Token(7));
  // The next plan's masks are its own.
  EXPECT_EQ(PrepareStep(rows, PlanWriter().Decode(0, 1).Decode(1, 1).Masked(0)).logit_masked,
            (std::vector<uint8_t>{1, 0}));
}

TEST(RowTableTest, HeldRowIsSkippedThenResumed) {
  RowTable rows = HeldRow();
  EXPECT_TRUE(rows.row(0).held);
  EXPECT_TRUE(rows.row(0).alive);
  EXPECT_EQ(rows.row(0).kv_len, 3);
  for (int i = 0; i < 2; ++i) {  // planned ahead
    const StepBatch ahead = PrepareStep(rows, PlanWriter().Decode(0, 7).Masked(0));
    EXPECT_EQ(ahead.held_items, (Ints{0}));
    EXPECT_TRUE(ahead.skipped_items.empty());
    EXPECT_TRUE(ahead.segments.empty());
    EXPECT_EQ(rows.row(0).kv_len, 3);
  }
  for (const uint32_t gen : {8u, 9u}) {  // beside another row; late the first time
    const StepBatch batch = PrepareStep(
        rows, PlanWriter().Init(1, gen, 0).Pages(1, gen, 0, {8}).Pages(1, gen, 1, {8}).Extend(1, gen, 0, {9}, 0)
                  .Resume(0, 7).Masked(0));
    EXPECT_TRUE(batch.held_items.empty());
    EXPECT_EQ(batch.num_tokens, 1);
    EXPECT_EQ(batch.num_kv, 1);
    EXPECT_EQ(batch.logit_src, (Ints{0, -1}));
    EXPECT_EQ(batch.logit_segment, (Ints{0, 1}));
    EXPECT_EQ(batch.logit_position, (Longs{1, 3}));
    EXPECT_EQ(batch.logit_masked, (std::vector<uint8_t>{0, 1}));
    ASSERT_EQ(batch.segments.size(), 2u);
    EXPECT_EQ(batch.segments[1].q_len, 0);
    EXPECT_EQ(batch.segments[1].kv_len, 3);
    EXPECT_EQ(rows.row(0).kv_len, 3);
    if (gen == 8) { EXPECT_EQ(rows.CommitSample(0, kLate), kHeld); }
  }
  EXPECT_EQ(rows.CommitSample(0, Token(33)), 0);
  EXPECT_FALSE(rows.row(0).held);
  const StepBatch next = PrepareStep(rows, PlanWriter().Decode(0, 7));
  EXPECT_EQ(next.tokens, (Ints{33}));
  EXPECT_EQ(next.positions, (Longs{3}));
}

TEST(RowTableTest, AResumeThatFinishesEndsTheRow) {
  RowTable rows({Group(KvKind::kFull, 4)}, 1);
  PrepareStep(rows, PlanWriter().Init(0, 1, 0, 100, {50}, 3).Pages(0, 1, 0, {3}).Extend(0, 1, 0, {1, 2, 3}, 2).Masked(0));
  rows.CommitSample(0, kLate);
  PrepareStep(rows, PlanWriter().Resume(0, 1).Masked(0));
  EXPECT_EQ(rows.CommitSample(0, Token(50)), kFinishedStop);  // three tokens exist: not below min_len
  EXPECT_EQ(PrepareStep(rows, PlanWriter().Resume(0, 1)).skipped_items, (Ints{0}));
}

TEST(RowTableTest, WhatEndsAHold) {
  const auto decodes = [](RowTable& rows, uint32_t gen) {
    return !PrepareStep(rows, PlanWriter().Decode(0, gen)).segments.empty();
  };
  {
    RowTable rows = HeldRow();
    EXPECT_FALSE(decodes(rows, 7));
    EXPECT_THROW(PrepareStep(rows, PlanWriter().Extend(0, 7, 3, {1}, 0)), InternalError);
  }
  {
    RowTable rows = HeldRow();
    const StepBatch stale = PrepareStep(rows, PlanWriter().Resume(0, 6));
    EXPECT_EQ(stale.skipped_items, (Ints{0})) << "another generation";
    EXPECT_TRUE(rows.row(0).held);
  }
  {
    RowTable rows = HeldRow();
    EXPECT_EQ(PrepareStep(rows, PlanWriter().Op(RowOpKind::kFree, 0, 7).Resume(0, 7)).skipped_items, (Ints{0}));
  }
  {
    RowTable rows = HeldRow();
    PrepareStep(rows, PlanWriter().Init(0, 8, 0).Pages(0, 8, 0, {1}).Pages(0, 8, 1, {1}).Extend(0, 8, 0, {1}, 0));
    EXPECT_FALSE(rows.row(0).held) << "a new init";
  }
  {
    RowTable rows = HeldRow();  // the grammar leaves no choice: the token is given
    const StepBatch forced = PrepareStep(rows, PlanWriter().Ids(RowOpKind::kForceTokens, 0, 7, 0, {40}, 3).Decode(0, 7));
    EXPECT_EQ(forced.tokens, (Ints{40}));
    EXPECT_EQ(forced.positions, (Longs{3}));
  }
  {
    RowTable rows = HeldRow();
    PrepareStep(rows, PlanWriter().Op(RowOpKind::kTruncate, 0, 7, 3));
    EXPECT_TRUE(rows.row(0).held) << "nothing was cut off";
    PrepareStep(rows, PlanWriter().Op(RowOpKind::kTruncate, 0, 7, 2));
    EXPECT_FALSE(rows.row(0).held);
    EXPECT_TRUE(decodes(rows, 7));
  }
  {
    RowTable rows = HeldRow();
    EXPECT_EQ(rows.CommitSample(0, {.token = 0, .logprob = 0.0f, .bad = true}), kBadLogits);  // its step failed
    EXPECT_FALSE(decodes(rows, 7));
  }
}

using Words = std::vector<uint32_t>;

TEST(MaskTableTest, KeyedByRowGenerationAndPosition) {
  MaskTable masks(2, 40);
  const Words first{1, 2}, second{3, 4};
  masks.Post(1, 5, 9, first);
  ASSERT_NE(masks.Find(1, 5, 9), nullptr);
  EXPECT_EQ(*masks.Find(1, 5, 9), first);
  EXPECT_EQ(masks.Find(0, 5, 9), nullptr);
  EXPECT_EQ(masks.Find(1, 6, 9), nullptr);
  EXPECT_EQ(masks.Find(1, 5, 8), nullptr);
  const MaskTable::Bits in_use = masks.Find(1, 5, 9);
  masks.Post(1, 5, 9, second);
  EXPECT_EQ(*masks.Find(1, 5, 9), second) << "the last word counts";
  EXPECT_EQ(*in_use, first) << "but not for who is drawing";
  EXPECT_EQ(masks.size(), 1u);
}

TEST(MaskTableTest, MisuseIsRefused) {
  MaskTable masks(2, 40);
  EXPECT_THROW(masks.Post(2, 1, 0, Words{0, 0}), InvalidArgument);
  EXPECT_THROW(masks.Post(-1, 1, 0, Words{0, 0}), InvalidArgument);
  EXPECT_THROW(masks.Post(0, 1, -1, Words{0, 0}), InvalidArgument);
  EXPECT_THROW(masks.Post(0, 1, 0, Words{0}), InvalidArgument);
  EXPECT_THROW(masks.Post(0, 1, 0, Words{0, 0, 0}), InvalidArgument);
  EXPECT_THROW(masks.Post(0, 1, 0, Words{}), InvalidArgument);
  EXPECT_THROW(MaskTable(1, -1), InvalidArgument);
  MaskTable any(1, 0);
  any.Post(0, 1, 0, Words{7, 7, 7});
  EXPECT_THROW(any.Post(0, 1, 0, Words{}), InvalidArgument);
  EXPECT_EQ(masks.size(), 0u);
}

TEST(MaskTableTest, MasksGoWithWhatTheyAreFor) {
  MaskTable masks(1, 32);
  const auto post = [&](uint32_t gen, int64_t position) { masks.Post(0, gen, position, Words{gen}); };
  const auto there = [&](uint32_t gen, int64_t position) { return masks.Find(0, gen, position) != nullptr; };
  for (int64_t p = 10; p < 14; ++p) post(3, p);
  masks.Drawn(0, 3, 11);
  EXPECT_FALSE(there(3, 10) || there(3, 11));
  EXPECT_TRUE(there(3, 12) && there(3, 13));
  post(4, 5);  // before its row is known
  masks.Drawn(0, 3, 12);
  EXPECT_TRUE(there(4, 5));
  masks.Begin(0, 4);
  EXPECT_FALSE(there(3, 13));
  EXPECT_TRUE(there(4, 5));
  post(5, 1);
  masks.End(0, 4);
  EXPECT_FALSE(there(4, 5));
  EXPECT_TRUE(there(5, 1));
  post(4, 6);  // made too late
  EXPECT_FALSE(there(4, 6));
  masks.Begin(0, 5);
  EXPECT_TRUE(there(5, 1));
  masks.End(0, 4);  // heard of late
  post(4, 6);
  EXPECT_TRUE(there(5, 1) && !there(4, 6));
  masks.Begin(0, 6);
  masks.End(0, 6);
  masks.End(0, 5);  // after one that came later
  post(6, 1);
  EXPECT_EQ(masks.size(), 0u);
  masks.Begin(0, 5);
  post(5, 1);
  masks.Drawn(0, 5, 1);
  EXPECT_EQ(masks.size(), 0u);

  const uint32_t last = 0xFFFFFFFF;  // generations wrap around, leaving out 0
  masks.Begin(0, last);
  post(last, 1);
  post(1, 1);
  masks.Begin(0, 1);
  EXPECT_FALSE(there(last, 1));
  EXPECT_TRUE(there(1, 1));
}

TEST(MaskTableTest, MemoryIsBounded) {
  MaskTable masks(1, 32);
  constexpr auto kMost = static_cast<int64_t>(MaskTable::kMaxPerRow);
  masks.Begin(0, 9);
  for (int64_t p = 0; p < kMost; ++p) masks.Post(0, 7, p, Words{1});  // a former generation's: made too late
  for (int64_t p = 0; p < kMost; ++p) masks.Post(0, 9, p, Words{1});
  EXPECT_EQ(masks.size(), MaskTable::kMaxPerRow);
  for (int64_t p = 0; p < kMost; ++p) EXPECT_NE(masks.Find(0, 9, p), nullptr) << p;
  EXPECT_THROW(masks.Post(0, 9, kMost, Words{1}), InvalidArgument);
  masks.Post(0, 9, kMost - 1, Words{2});  // replacing is no growth
  masks.Drawn(0, 9, 0);
  masks.Post(0, 9, kMost, Words{1});
}

TEST(RowTableTest, MasksFollowTheRow) {
  RowTable rows({Group(KvKind::kFull, 4)}, 1);
  const auto post = [&](uint32_t gen, int64_t position) { rows.PostMask(0, gen, position, Words{1}); };
  post(1, 1);
  post(1, 2);
  PrepareStep(rows, PlanWriter().Init(0, 1, 0).Pages(0, 1, 0, {0}).Extend(0, 1, 0, {5}, 0).Masked(0));
  EXPECT_EQ(rows.masks().size(), 2u);
  rows.CommitSample(0, Token(9));
  EXPECT_EQ(rows.masks().size(), 1u);  // position 1 is drawn
  PrepareStep(rows, PlanWriter().Decode(0, 1).Masked(0));
  rows.CommitSample(0, kLate);
  EXPECT_EQ(rows.masks().size(), 1u);  // a held row's is still to come
  post(1, 3);
  PrepareStep(rows, PlanWriter().Op(RowOpKind::kFree, 0, 1));
  EXPECT_EQ(rows.masks().size(), 0u);
  post(2, 1);
  post(3, 1);
  PrepareStep(rows, PlanWriter().Init(0, 3, 0, 2).Pages(0, 3, 0, {0}).Extend(0, 3, 0, {5}, 0).Masked(0));
  EXPECT_EQ(rows.masks().size(), 1u);
  post(3, 2);
  EXPECT_EQ(rows.CommitSample(0, Token(9)), kFinishedLength);
  EXPECT_EQ(rows.masks().size(), 0u);
  post(3, 3);
  EXPECT_EQ(rows.masks().size(), 0u);
}

}  // namespace
}  // namespace sapwood
