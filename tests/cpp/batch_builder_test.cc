// BatchBuilder against the real cache and executor, one rule at a time. Results are taken in when the test says so:
// between Launch and Finish a step is in flight.
#include "batch/batch_builder.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/check.h"
#include "program/executor.h"
#include "program/fake_runners.h"

namespace sapwood {
namespace {

using Ints = std::vector<int32_t>;
constexpr int32_t kVocab = 500;

KvGroup Full(int32_t page_size) { return {.kind = KvKind::kFull, .page_size = page_size}; }
KvGroup Window(int32_t page_size, int32_t window) {
  return {.kind = KvKind::kWindow, .window = window, .page_size = page_size};
}

Ints Range(int32_t first, int32_t n) {
  Ints ids(n);
  for (int32_t i = 0; i < n; ++i) ids[i] = first + i;
  return ids;
}

struct World {
  std::vector<KvGroup> groups;
  CacheManager cache;
  BatchBuilder builder;
  Executor executor;
  int64_t next_step = 0;

  World(std::vector<KvGroup> kv_groups, int32_t num_pages, int32_t max_rows = 4, int32_t bad_every = 0,
        CacheKind kind = CacheKind::kRadix)
      : groups(std::move(kv_groups)),
        cache({.groups = groups, .num_pages = Pages(num_pages), .kind = kind}),
        builder(&cache, max_rows),
        executor(MakeChecksumRunner({.groups = groups,
                                     .num_pages = Pages(num_pages),
                                     .vocab_size = kVocab,
                                     .bad_every = bad_every}),
                 {.groups = groups, .max_rows = max_rows}) {}

  Ints Pages(int32_t n) const { return Ints(groups.size(), n); }

  static RowSpec Spec(Ints tokens, int64_t max_len = 1000) {
    RowSpec spec;
    spec.init.prompt_len = static_cast<int64_t>(tokens.size());
    spec.init.max_len = max_len;
    spec.tokens = std::move(tokens);
    return spec;
  }
  int32_t Admit(Ints tokens, int64_t max_len = 1000) { return builder.Admit(Spec(std::move(tokens), max_len)).row; }

  int32_t AdmitMasked(Ints tokens, int64_t max_len = 1000) {
    RowSpec spec = Spec(std::move(tokens), max_len);
    spec.masked = true;
    return builder.Admit(std::move(spec)).row;
  }
  // What the grammar allows at a place: a third of the tokens, others at each.
  static std::vector<uint32_t> Mask(int64_t position) {
    std::vector<uint32_t> words((kVocab + 31) / 32);
    for (int64_t i = position % 3; i < kVocab; i += 3) words[i / 32] |= uint32_t{1} << (i % 32);
    return words;
  }
  // Posts the mask of the row's next token, as the loop does.
  void Post(int32_t row) {
    const int64_t position = builder.num_tokens(row);
    executor.PostMask(row, builder.gen(row), position, Mask(position));
    builder.MaskPosted(row, position);
  }
  Ints ExpectedMasked(Ints tokens, int n) const {
    for (int i = 0; i < n; ++i) {
      const auto position = static_cast<int64_t>(tokens.size());
      tokens.push_back(ChecksumNextToken(groups, kVocab, tokens.data(), position, Mask(position)));
    }
    return tokens;
  }

  // Builds and submits; the result waits in the executor.
  BuiltStep Launch(std::vector<std::pair<int32_t, int32_t>> extends = {}, bool decodes = true) {
    BuiltStep built = builder.Build(next_step++, extends, decodes);
    if (built.plan != nullptr) executor.Submit(built.plan);
    Check();
    return built;
  }
  // Takes in the results of the oldest launched step.
  Committed Finish() {
    if (results.empty()) {
      executor.WaitIdle();
      for (ExecutorEvent& event : executor.Drain()) {
        if (event.kind == ExecutorEvent::Kind::kResult) results.push_back(std::move(event.result));
      }
    }
    const StepResult result = std::move(results.front());
    results.erase(results.begin());
    EXPECT_EQ(result.error, "");
    const Committed committed = builder.Commit(result);
    Check();
    return committed;
  }
  Committed Step(std::vector<std::pair<int32_t, int32_t>> extends = {}) {
    Launch(std::move(extends));
    return Finish();
  }
  Ints Expected(Ints tokens, int n) const {
    for (int i = 0; i < n; ++i) {
      tokens.push_back(ChecksumNextToken(groups, kVocab, tokens.data(), static_cast<int64_t>(tokens.size())));
    }
    return tokens;
  }
  void Check() const {
    cache.CheckInvariants();
    builder.CheckInvariants();
  }
  PoolStats stats(int group = 0) const { return cache.stats(group); }

  std::vector<StepResult> results;
};

int CountOps(const StepPlan& plan, RowOpKind kind) {
  int n = 0;
  for (const RowOp& op : plan.row_ops) n += op.kind == kind;
  return n;
}

TEST(BatchBuilderTest, ChunksThenDecodesToMaxLen) {
  World world({Full(4)}, 20);
  const Ints prompt = Range(10, 10);
  const int32_t row = world.Admit(prompt, 13);
  EXPECT_EQ(world.stats().leased, 0);  // admission reserves nothing
  EXPECT_EQ(world.builder.phase(row), RowPhase::kExtend);

  const BuiltStep first = world.Launch({{row, 6}});
  ASSERT_EQ(first.plan->items.size(), 1u);
  EXPECT_EQ(first.plan->items[0].logit_from, 6);  // mid-prompt: no logits
  EXPECT_EQ(first.plan->tokens, Range(10, 6));
  EXPECT_EQ(CountOps(*first.plan, RowOpKind::kInit), 1);
  EXPECT_EQ(CountOps(*first.plan, RowOpKind::kAppendPages), 1);
  EXPECT_EQ(first.granted, (Ints{6}));
  EXPECT_EQ(first.num_kv, 6);

  const BuiltStep second = world.Launch({{row, 100}});  // before the first has come back
  EXPECT_EQ(second.plan->items[0].q_len, 4);
  EXPECT_EQ(second.plan->items[0].logit_from, 3);
  EXPECT_EQ(second.plan->items[0].kv_len, 6);
  EXPECT_EQ(CountOps(*second.plan, RowOpKind::kInit), 0);
  EXPECT_EQ(second.num_logit_rows, 1);
  EXPECT_EQ(world.builder.phase(row), RowPhase::kDecode);
  EXPECT_EQ(world.builder.in_flight(row), 2);

  const BuiltStep third = world.Launch();
  EXPECT_EQ(third.num_decode_rows, 1);
  EXPECT_EQ(CountOps(*third.plan, RowOpKind::kAppendPages), 0);  // position 10 fits the third page
  const BuiltStep fourth = world.Launch();
  ASSERT_NE(fourth.plan, nullptr);
  EXPECT_EQ(world.Launch().plan, nullptr);  // the token that makes max_len is planned: no wasted item

  EXPECT_EQ(world.Finish().tokens, (Ints{-1}));
  const Ints expected = world.Expected(prompt, 3);
  for (int i = 10; i < 13; ++i) {
    const Committed committed = world.Finish();
    EXPECT_EQ(committed.rows, (Ints{row}));
    EXPECT_EQ(committed.tokens, (Ints{expected[i]}));
    EXPECT_EQ(committed.flags[0], i == 12 ? kFinishedLength : 0);
    EXPECT_TRUE(std::isnan(committed.logprobs[0]));
  }
  EXPECT_EQ(world.builder.phase(row), RowPhase::kDone);
  EXPECT_EQ(world.builder.tokens(row), expected);
  world.builder.Release(row);
  EXPECT_EQ(world.cache.Match(0, expected), 12);  // the thirteenth token was never written
  EXPECT_EQ(world.stats().leased + world.stats().limbo, 0);
}

TEST(BatchBuilderTest, RowThatStopsIsSkippedByTheNextStep) {
  World world({Full(1)}, 40);
  const Ints prompt = Range(3, 5);
  const Ints expected = world.Expected(prompt, 2);
  RowSpec spec = World::Spec(prompt);
  spec.stop_ids = {expected[6]};
  spec.init.return_logprob = 1;
  const int32_t row = world.builder.Admit(spec).row;
  world.Launch({{row, 100}});
  world.Launch();
  world.Launch();  // the row will have ended by then
  EXPECT_FALSE(std::isnan(world.Finish().logprobs[0]));
  const Committed last = world.Finish();
  EXPECT_EQ(last.flags[0], kFinishedStop);
  EXPECT_EQ(world.builder.in_flight(row), 1);
  EXPECT_EQ(world.builder.planned_len(row), 7);
  world.builder.Release(row);
  world.Check();
  // Seven tokens are known and planned, six are written: the stop id itself never reached the KV.
  EXPECT_EQ(world.cache.Match(0, expected), 6);
  EXPECT_GT(world.stats().limbo, 0);
  EXPECT_TRUE(world.Finish().rows.empty());
  EXPECT_EQ(world.stats().limbo, 0);
}

TEST(BatchBuilderTest, StaleResultsAreDropped) {
  World world({Full(4)}, 20, 1);
  const int32_t row = world.Admit(Range(0, 4));
  world.Launch({{row, 100}});
  const uint32_t gen = world.builder.gen(row);
  world.builder.Release(row);
  const int32_t again = world.Admit(Range(50, 5));
  EXPECT_EQ(again, row);  // the index is reusable at once
  EXPECT_GT(world.builder.gen(again), gen);
  const BuiltStep built = world.Launch({{again, 100}});
  EXPECT_EQ(CountOps(*built.plan, RowOpKind::kFree), 1);
  EXPECT_TRUE(world.Finish().rows.empty());
  EXPECT_EQ(world.builder.num_tokens(again), 5);
  EXPECT_EQ(world.Finish().tokens, (Ints{world.Expected(Range(50, 5), 1).back()}));
}

TEST(BatchBuilderTest, ReleasedPagesWaitInLimbo) {
  World world({Full(4)}, 20, 4, 0, CacheKind::kNone);
  const int32_t row = world.Admit(Range(0, 8));
  world.Launch({{row, 100}});
  world.builder.Release(row);
  EXPECT_EQ(world.stats().limbo, 2);
  EXPECT_EQ(world.stats().free, 18);
  world.Finish();
  EXPECT_EQ(world.stats().free, 20);
}

TEST(BatchBuilderTest, BlockedRowsAreNewestFirstAndPartialChunksAreGranted) {
  World world({Full(1)}, 10, 4, 0, CacheKind::kNone);
  const int32_t a = world.Admit(Range(0, 3)), b = world.Admit(Range(0, 3));
  const int32_t c = world.Admit(Range(0, 6));
  const BuiltStep first = world.Launch({{a, 9}, {b, 9}, {c, 9}});
  EXPECT_EQ(first.granted, (Ints{3, 3, 4}));
  world.Finish();
  const BuiltStep second = world.Launch({{c, 9}});
  EXPECT_EQ(second.plan, nullptr);
  EXPECT_EQ(second.blocked, (Ints{b, a}));
  EXPECT_EQ(second.granted, (Ints{0}));
  EXPECT_EQ(world.builder.planned_len(a), 3);
  world.builder.Release(c);
  world.builder.Pause(a);
  world.builder.Pause(b);
  EXPECT_EQ(world.Launch().plan, nullptr);
  world.builder.Resume(a);
  world.builder.Resume(b);
  const BuiltStep third = world.Launch();
  EXPECT_EQ(third.num_decode_rows, 2);
  EXPECT_EQ(third.plan->items[0].row, a);  // oldest admission first
  EXPECT_EQ(CountOps(*third.plan, RowOpKind::kFree), 1);  // kept while there was no plan to carry it
  world.Finish();
}

TEST(BatchBuilderTest, FollowerInTheSamePlanHitsItsLeader) {
  World world({Full(4)}, 20);
  const Ints prompt = Range(0, 10);
  const int32_t leader = world.Admit(prompt);
  EXPECT_EQ(world.builder.PendingPrefix(0, prompt), 8);
  EXPECT_EQ(world.builder.PendingPrefix(1, prompt), 0);           // another namespace
  EXPECT_EQ(world.builder.PendingPrefix(0, Range(0, 8)), 4);      // one token is left to compute
  EXPECT_EQ(world.builder.PendingPrefix(0, Range(100, 10)), 0);
  world.builder.BeginStep(world.next_step++);
  world.builder.AddExtend(leader, 9);
  EXPECT_EQ(world.builder.PendingPrefix(0, prompt), 0);           // in the tree at launch
  const Admitted follower = world.builder.Admit(World::Spec(prompt));
  EXPECT_EQ(follower.cached_len, 8);
  EXPECT_EQ(world.builder.AddExtend(follower.row, 9), 2);
  const BuiltStep built = world.builder.EndStep();
  world.Check();
  EXPECT_EQ(built.num_extend_tokens, 11);
  world.executor.Submit(built.plan);
  EXPECT_EQ(world.Finish().tokens, (Ints{-1, world.Expected(prompt, 1).back()}));
  world.builder.Pause(leader);
  EXPECT_EQ(world.builder.PendingPrefix(0, prompt), 0);
}

TEST(BatchBuilderTest, PauseLeavesARowOutAndResumeBringsItBack) {
  World world({Full(4)}, 20);
  const int32_t row = world.Admit(Range(0, 6));
  world.Launch({{row, 3}});
  world.builder.Pause(row);
  EXPECT_EQ(world.builder.phase(row), RowPhase::kPaused);
  world.builder.BeginStep(world.next_step);
  EXPECT_THROW(world.builder.AddExtend(row, 3), InvalidArgument);
  EXPECT_EQ(world.builder.EndStep().plan, nullptr);
  world.builder.Resume(row);
  EXPECT_EQ(world.builder.phase(row), RowPhase::kExtend);
  world.Finish();
  world.Launch({{row, 3}});
  world.builder.Pause(row);
  EXPECT_EQ(world.Finish().tokens.size(), 1u);  // what was in flight still counts
  EXPECT_EQ(world.Launch().plan, nullptr);
  world.builder.Resume(row);
  EXPECT_EQ(world.builder.phase(row), RowPhase::kDecode);
  EXPECT_EQ(world.Step().tokens, (Ints{world.Expected(Range(0, 6), 2).back()}));
}

TEST(BatchBuilderTest, RetractedRowGoesOnWhereItWas) {
  World world({Full(2)}, 20);
  const Ints prompt = Range(0, 5);
  int32_t row = world.Admit(prompt);
  world.Step({{row, 100}});
  for (int i = 0; i < 3; ++i) world.Step();
  const Ints known = world.builder.tokens(row);
  world.Launch();  // a token that is lost and made again
  world.builder.Release(row);
  RowSpec spec = World::Spec(known);
  spec.init.prompt_len = 5;
  const Admitted again = world.builder.Admit(spec);
  EXPECT_EQ(again.cached_len, 8);  // generated tokens are cached too
  world.Finish();
  world.Step({{again.row, 100}});
  EXPECT_EQ(world.builder.tokens(again.row), world.Expected(prompt, 5));
}

TEST(BatchBuilderTest, ForkCopiesItsTailInTheNextPlan) {
  for (const CacheKind kind : {CacheKind::kRadix, CacheKind::kNone}) {
    World world({Full(4), Window(4, 5)}, 30, 4, 0, kind);
    const Ints prompt = Range(0, 7);
    const int32_t parent = world.Admit(prompt);
    world.Launch({{parent, 100}});
    Ints other = prompt;
    other[6] = 99;
    const Admitted fork = world.builder.AdmitFork(parent, 6, World::Spec(other));
    world.Check();
    EXPECT_EQ(fork.cached_len, 6);
    const BuiltStep built = world.Launch({{fork.row, 100}});
    EXPECT_EQ(built.plan->copies.size(), kind == CacheKind::kRadix ? 2u : 4u);
    EXPECT_EQ(world.builder.in_flight(fork.row), 1);
    world.Finish();
    const Committed committed = world.Finish();
    EXPECT_EQ(committed.tokens, (Ints{world.Expected(prompt, 2).back(), world.Expected(other, 1).back()}));
    EXPECT_TRUE(world.Launch().plan->copies.empty());
    world.Finish();
  }
}

TEST(BatchBuilderTest, ForkReleasedBeforeItsStepCopiesNothing) {
  World world({Full(4)}, 30);
  const int32_t parent = world.Admit(Range(0, 7));
  world.Step({{parent, 100}});
  const Admitted fork = world.builder.AdmitFork(parent, 6, World::Spec(Range(0, 7)));
  world.builder.Release(fork.row);
  EXPECT_TRUE(world.Launch().plan->copies.empty());
  world.Finish();
}

TEST(BatchBuilderTest, ForkBehindASlidWindowIsAdmittedPlainly) {
  World world({Window(1, 3)}, 12, 4, 0, CacheKind::kNone);
  const Ints prompt = Range(0, 5);
  const int32_t parent = world.Admit(prompt);
  world.Step({{parent, 100}});
  for (int i = 0; i < 6; ++i) world.Step();
  const Admitted fork = world.builder.AdmitFork(parent, 4, World::Spec(prompt));
  EXPECT_EQ(fork.cached_len, 0);
  world.Step({{fork.row, 100}});
  EXPECT_EQ(world.builder.tokens(fork.row), world.Expected(prompt, 1));
}

TEST(BatchBuilderTest, ForkErrorsNameTheArgument) {
  World world({Full(4)}, 30);
  const int32_t parent = world.Admit(Range(0, 7));
  world.Step({{parent, 5}});
  const auto fork = [&](int64_t at, RowSpec spec) { world.builder.AdmitFork(parent, at, std::move(spec)); };
  EXPECT_THROW(fork(6, World::Spec(Range(0, 7))), InvalidArgument);  // not computed yet
  EXPECT_THROW(fork(5, World::Spec(Range(1, 7))), InvalidArgument);  // other tokens
  EXPECT_THROW(fork(5, World::Spec(Range(0, 5))), InvalidArgument);  // nothing left to compute
  RowSpec elsewhere = World::Spec(Range(0, 7));
  elsewhere.ns = 1;
  EXPECT_THROW(fork(5, elsewhere), InvalidArgument);
  world.builder.BeginStep(world.next_step);
  EXPECT_THROW(fork(4, World::Spec(Range(0, 7))), InvalidArgument);  // a copy must not share its source's step
  world.builder.EndStep();
  world.Check();
  EXPECT_EQ(world.builder.num_free_rows(), 3);
}

TEST(BatchBuilderTest, WindowGroupsGiveUpWhatNobodySees) {
  World world({Full(2), Window(2, 5)}, 40);
  const int32_t row = world.Admit(Range(0, 9), 60);
  world.Step({{row, 100}});
  for (int i = 0; i < 40; ++i) {
    world.Step();
    const std::vector<PageId> pages = world.builder.pages(row, 1);
    const int64_t held = std::count_if(pages.begin(), pages.end(), [](PageId page) { return page != kNoPage; });
    EXPECT_LE(held, 4);
    EXPECT_GE(held * 2, 4);  // the next query sees itself and four before it
  }
  EXPECT_EQ(world.builder.tokens(row), world.Expected(Range(0, 9), 41));
  EXPECT_EQ(world.stats(0).leased + world.stats(0).cached, 25);
}

TEST(BatchBuilderTest, BadLogitsTakeTheRowsPagesOutOfTheTree) {
  World world({Full(2)}, 20, 4, 2);
  const Ints prompt = Range(0, 6);
  const int32_t leader = world.Admit(prompt);
  world.Step({{leader, 100}});
  const int32_t follower = world.Admit(prompt);
  EXPECT_EQ(world.builder.cached_len(follower), 4);
  const Committed committed = world.Step();
  EXPECT_EQ(committed.flags, (std::vector<uint8_t>{kBadLogits}));
  EXPECT_EQ(committed.tokens, (Ints{-1}));
  EXPECT_EQ(world.builder.phase(leader), RowPhase::kDone);
  world.builder.Release(leader, true);  // keep does not keep what is worthless
  EXPECT_EQ(world.cache.Match(0, prompt), 0);
  EXPECT_FALSE(world.builder.valid(follower));
  EXPECT_EQ(world.builder.PendingPrefix(0, prompt), 0);
  world.builder.Release(follower, false, true);
  world.Check();
  EXPECT_EQ(world.stats().free, 20);
}

TEST(BatchBuilderTest, FailedStepEndsItsRows) {
  World world({Full(2)}, 20);
  const int32_t named = world.Admit(Range(0, 6)), other = world.Admit(Range(50, 6));
  const BuiltStep built = world.builder.Build(0, std::vector<std::pair<int32_t, int32_t>>{{named, 100}});
  StepResult failed;
  failed.step_id = built.plan->step_id;
  failed.error = "kernel fault";
  EXPECT_TRUE(world.builder.Commit(failed).rows.empty());
  world.Check();
  EXPECT_EQ(world.builder.in_flight(named), 0);
  EXPECT_EQ(world.builder.phase(named), RowPhase::kDone);
  EXPECT_EQ(world.builder.phase(other), RowPhase::kExtend);
  world.builder.Release(named);
  EXPECT_EQ(world.cache.Match(0, Range(0, 6)), 0);  // its prompt had entered the tree at launch
  EXPECT_EQ(world.stats().free, 20);
}

TEST(BatchBuilderTest, FailedStepEndsTheForksItCopied) {
  World world({Full(4)}, 20);
  const int32_t parent = world.Admit(Range(0, 7));
  world.Step({{parent, 100}});
  const Admitted fork = world.builder.AdmitFork(parent, 6, World::Spec(Range(0, 7)));
  const BuiltStep built = world.builder.Build(world.next_step, {});
  EXPECT_EQ(built.plan->copies.size(), 1u);
  EXPECT_EQ(world.builder.in_flight(fork.row), 1);
  StepResult failed;
  failed.step_id = built.plan->step_id;
  failed.error = "kernel fault";
  world.builder.Commit(failed);
  EXPECT_EQ(world.builder.phase(fork.row), RowPhase::kDone);
  world.builder.Release(fork.row);
  world.Check();
}

TEST(BatchBuilderTest, KeysDecideWhatIsShared) {
  World world({Full(2)}, 20);
  RowSpec spec = World::Spec(Range(0, 6));
  spec.keys = Range(1000, 6);  // as for two images behind equal placeholders
  const int32_t row = world.builder.Admit(spec).row;
  world.Step({{row, 100}});
  world.Step();
  world.builder.Release(row);
  EXPECT_EQ(world.cache.Match(0, Range(0, 6)), 0);
  EXPECT_EQ(world.cache.Match(0, Range(1000, 6)), 6);
  EXPECT_EQ(world.builder.Admit(spec).cached_len, 4);
}

TEST(BatchBuilderTest, MaskInTimeIsObeyed) {
  World world({Full(4)}, 20);
  const Ints prompt = Range(3, 6);
  ASSERT_NE(world.ExpectedMasked(prompt, 1), world.Expected(prompt, 1)) << "the mask must matter";
  const int32_t row = world.AdmitMasked(prompt), free = world.Admit(Range(60, 3));
  world.Post(row);
  EXPECT_EQ(world.Launch({{row, 4}, {free, 9}}).plan->mask_rows, Ints{}) << "mid-prompt, and the other needs none";
  world.Finish();
  EXPECT_EQ(world.Launch({{row, 9}}).plan->mask_rows, (Ints{row}));
  world.Finish();
  for (int i = 0; i < 3; ++i) {
    world.Post(row);
    const BuiltStep built = world.Launch();
    EXPECT_EQ(built.plan->mask_rows, (Ints{row}));
    EXPECT_EQ(built.num_resume_rows, 0);
    world.Finish();
  }
  EXPECT_EQ(world.builder.tokens(row), world.ExpectedMasked(prompt, 4));
  EXPECT_EQ(world.builder.tokens(free), world.Expected(Range(60, 3), 5));
}

// Held, resumed while what was launched on top is still in flight, and held by the step launched on top of the resume.
TEST(BatchBuilderTest, LateMaskHoldsItsRowAlone) {
  World world({Full(4)}, 20);
  const Ints prompt = Range(3, 6);
  const int32_t row = world.AdmitMasked(prompt), free = world.Admit(Range(60, 3));
  world.Launch({{row, 9}, {free, 9}});
  const BuiltStep ahead = world.Launch();
  EXPECT_EQ(ahead.num_decode_rows, 2);
  EXPECT_EQ(world.builder.planned_len(row), 7);

  const Committed held = world.Finish();
  EXPECT_EQ(held.rows, (Ints{row, free}));
  EXPECT_EQ(held.tokens, (Ints{-1, world.Expected(Range(60, 3), 1).back()}));
  EXPECT_EQ(held.flags, (std::vector<uint8_t>{kHeld, 0}));
  EXPECT_EQ(world.builder.phase(row), RowPhase::kHeld);
  EXPECT_EQ(world.builder.planned_len(row), 6) << "what is in flight will be skipped: given back at once";
  EXPECT_EQ(world.builder.num_tokens(row), 6);
  EXPECT_EQ(world.builder.in_flight(row), 1);
  const BuiltStep without = world.Launch();
  ASSERT_EQ(without.plan->items.size(), 1u) << "no mask: not planned";
  EXPECT_EQ(without.plan->items[0].row, free);

  world.Post(row);
  world.builder.BeginStep(world.next_step++);
  EXPECT_EQ(world.builder.AddDecodes(), 1) << "decode items alone";
  const BuiltStep resumed = world.builder.EndStep();
  world.executor.Submit(resumed.plan);
  world.Check();
  EXPECT_EQ(resumed.num_resume_rows, 1);
  EXPECT_EQ(resumed.num_logit_rows, 2);
  EXPECT_EQ(resumed.num_kv, 6) << "of the other row alone";
  EXPECT_EQ(resumed.plan->items[0].kind, ItemKind::kResume);
  EXPECT_EQ(resumed.plan->items[0].q_len, 0);
  EXPECT_EQ(resumed.plan->mask_rows, (Ints{row}));
  EXPECT_EQ(world.builder.phase(row), RowPhase::kDecode);
  EXPECT_EQ(world.builder.planned_len(row), 6);
  EXPECT_EQ(world.Launch().num_decode_rows, 2) << "launched ahead, on top of the resume";

  EXPECT_EQ(world.Finish().rows, (Ints{free})) << "skipped";
  EXPECT_EQ(world.Finish().rows, (Ints{free})) << "left out";
  const Ints expected = world.ExpectedMasked(prompt, 2);
  const Committed drawn = world.Finish();
  EXPECT_EQ(drawn.tokens, (Ints{expected[6], world.Expected(Range(60, 3), 4).back()}));
  EXPECT_EQ(drawn.flags[0], 0);
  EXPECT_EQ(world.Finish().flags[0], kHeld);
  EXPECT_EQ(world.builder.planned_len(row), 7);
  world.builder.Pause(free);
  world.Post(row);
  EXPECT_EQ(world.Step().tokens, (Ints{expected[7]})) << "a step of resumes only";
}

TEST(BatchBuilderTest, ResumeWhoseMaskIsStillLateIsHeldAgain) {
  World world({Full(4)}, 20);
  const int32_t row = world.AdmitMasked(Range(3, 6), 7);
  world.Step({{row, 9}});
  world.builder.MaskPosted(row, 6);  // which is not so
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(world.Step().flags, (std::vector<uint8_t>{kHeld}));
    EXPECT_EQ(world.builder.phase(row), RowPhase::kHeld);
  }
  world.Post(row);
  const Committed last = world.Step();
  EXPECT_EQ(last.tokens, (Ints{world.ExpectedMasked(Range(3, 6), 1).back()}));
  EXPECT_EQ(last.flags, (std::vector<uint8_t>{kFinishedLength}));
}

// The mask came after the token was to be drawn and before the loop heard of it.
TEST(BatchBuilderTest, MaskPostedBeforeTheHoldIsHeardOf) {
  World world({Full(4)}, 20);
  const int32_t row = world.AdmitMasked(Range(3, 6));
  world.Launch({{row, 9}});
  world.executor.WaitIdle();
  world.Post(row);
  EXPECT_EQ(world.builder.phase(row), RowPhase::kDecode);
  EXPECT_EQ(world.Finish().flags, (std::vector<uint8_t>{kHeld}));
  EXPECT_EQ(world.Step().tokens, (Ints{world.ExpectedMasked(Range(3, 6), 1).back()}));
}

TEST(BatchBuilderTest, HeldRowMayBePausedForkedAndReleased) {
  World world({Full(2)}, 30);
  const Ints prompt = Range(3, 6);
  int32_t row = world.AdmitMasked(prompt);
  world.Post(row);
  world.Step({{row, 9}});
  EXPECT_EQ(world.Step().flags, (std::vector<uint8_t>{kHeld}));
  const Ints known = world.builder.tokens(row);
  ASSERT_EQ(known.size(), 7u);
  world.builder.Pause(row);
  EXPECT_EQ(world.builder.phase(row), RowPhase::kPaused);
  world.Post(row);
  EXPECT_EQ(world.Launch().plan, nullptr);
  world.builder.Resume(row);
  EXPECT_EQ(world.builder.phase(row), RowPhase::kHeld);

  Ints other = known;
  other.push_back(77);
  const Admitted fork = world.builder.AdmitFork(row, 7, World::Spec(other));
  EXPECT_EQ(fork.cached_len, 7) << "every known token is in the KV";
  world.builder.Release(row);
  EXPECT_EQ(world.cache.Match(0, known), 6);
  world.Step({{fork.row, 9}});
  EXPECT_EQ(world.builder.tokens(fork.row), world.Expected(other, 1));

  RowSpec spec = World::Spec(known);  // a retracted row's grammar goes on: its mask is posted anew
  spec.masked = true;
  row = world.builder.Admit(spec).row;
  world.Post(row);
  world.builder.Pause(fork.row);
  world.Step({{row, 9}});
  EXPECT_EQ(world.builder.tokens(row), world.ExpectedMasked(prompt, 2));
  EXPECT_EQ(world.executor.queued(), 0);
}

// A decode item launched on top of a held one does not run: what its query would not have seen, the row's next one does.
TEST(BatchBuilderTest, WindowDoesNotSlideForWhatMayBeSkipped) {
  World world({Window(1, 3)}, 16, 4, 0, CacheKind::kNone);
  const Ints prompt = Range(3, 6);
  const int32_t row = world.AdmitMasked(prompt);
  world.Launch({{row, 9}});
  world.Launch();
  world.Finish();
  world.Finish();
  EXPECT_EQ(world.builder.phase(row), RowPhase::kHeld);
  const int32_t other = world.Admit(Range(60, 20));  // writes into whatever page is free
  while (world.builder.phase(other) == RowPhase::kExtend) world.Step({{other, 3}});
  world.builder.Release(other);
  for (int i = 0; i < 4; ++i) {
    world.Post(row);
    world.Step();
    if (world.builder.phase(row) == RowPhase::kHeld) continue;
    world.Post(row);
    world.Step();
  }
  EXPECT_GE(world.builder.num_tokens(row), 10);
  EXPECT_EQ(world.builder.tokens(row), world.ExpectedMasked(prompt, static_cast<int>(world.builder.num_tokens(row)) - 6));
}

TEST(BatchBuilderTest, FailedStepEndsAHeldRow) {
  World world({Full(2)}, 20);
  const int32_t row = world.AdmitMasked(Range(0, 6));
  world.Launch({{row, 100}});
  const BuiltStep ahead = world.Launch();
  world.Finish();
  world.Post(row);
  const BuiltStep resumed = world.builder.Build(world.next_step++, {});
  world.executor.WaitIdle();
  for (const auto& plan : {ahead.plan, resumed.plan}) {
    StepResult failed;
    failed.step_id = plan->step_id;
    failed.error = "kernel fault";
    world.builder.Commit(failed);
    world.Check();
    EXPECT_EQ(world.builder.phase(row), RowPhase::kDone);
  }
  EXPECT_EQ(world.builder.in_flight(row), 0);
  world.builder.Release(row);
  EXPECT_EQ(world.cache.Match(0, Range(0, 6)), 0);
}

TEST(BatchBuilderTest, HoldsThatCannotBeAreErrors) {
  const auto commit = [](bool masked, std::vector<uint8_t> flags_of_each_step) {
    World world({Full(2)}, 20);
    RowSpec spec = World::Spec(Range(0, 6));
    spec.masked = masked;
    const int32_t row = world.builder.Admit(spec).row;
    std::vector<std::pair<int32_t, int32_t>> extends{{row, 9}};
    for (size_t i = 0; i < flags_of_each_step.size(); ++i, extends.clear()) {
      world.builder.Build(static_cast<int64_t>(i), extends);
    }
    for (size_t i = 0; i < flags_of_each_step.size(); ++i) {
      const uint8_t flags = flags_of_each_step[i];
      StepResult result;
      result.step_id = static_cast<int64_t>(i);
      result.items = {{row, world.builder.gen(row), flags & (kHeld | kSkipped) ? 0 : 1, 0, flags}};
      result.tokens = {1};
      world.builder.Commit(result);
      world.Check();
    }
  };
  EXPECT_NO_THROW(commit(true, {kHeld, kSkipped | kHeld, kSkipped | kHeld}));
  EXPECT_NO_THROW(commit(true, {0, kHeld, kSkipped | kHeld}));
  EXPECT_THROW(commit(false, {kHeld}), InternalError);               // nobody asked for a mask
  EXPECT_THROW(commit(true, {kHeld, 0}), InternalError);             // what was it fed?
  EXPECT_THROW(commit(true, {kHeld, kHeld}), InternalError);
  EXPECT_THROW(commit(true, {kHeld, kSkipped}), InternalError);      // dead?
  EXPECT_THROW(commit(true, {0, kSkipped | kHeld}), InternalError);  // no hold came before
}

TEST(BatchBuilderTest, MisuseIsRefused) {
  World world({Full(2)}, 20, 1);
  EXPECT_THROW(world.Admit({}), InvalidArgument);
  EXPECT_THROW(world.Admit(Range(0, 6), 6), InvalidArgument);
  RowSpec keys = World::Spec(Range(0, 6));
  keys.keys = {1};
  EXPECT_THROW(world.builder.Admit(keys), InvalidArgument);
  const int32_t row = world.Admit(Range(0, 6));
  EXPECT_THROW(world.Admit(Range(0, 6)), CapacityError);
  EXPECT_THROW(world.builder.AddExtend(row, 1), InvalidArgument);
  EXPECT_THROW(world.builder.MaskPosted(row, 6), InvalidArgument);  // it draws without masks
  EXPECT_THROW(world.builder.EndStep(), InvalidArgument);
  EXPECT_THROW(world.builder.tokens(7), InvalidArgument);
  EXPECT_THROW(world.builder.BeginStep(-1), InvalidArgument);
  world.builder.BeginStep(3);
  EXPECT_THROW(world.builder.BeginStep(4), InvalidArgument);
  EXPECT_EQ(world.builder.AddExtend(row, 2), 2);
  EXPECT_THROW(world.builder.AddExtend(row, 2), InvalidArgument);  // one item per row
  EXPECT_THROW(world.builder.Release(row), InvalidArgument);       // its step is being built
  const BuiltStep built = world.builder.EndStep();
  EXPECT_THROW(world.builder.BeginStep(3), InvalidArgument);
  StepResult result;
  result.step_id = 2;
  EXPECT_THROW(world.builder.Commit(result), InvalidArgument);  // not the oldest launched
  result.step_id = 3;
  EXPECT_THROW(world.builder.Commit(result), InvalidArgument);  // items are missing
  world.executor.Submit(built.plan);
  world.Finish();
  world.builder.Release(row);
  EXPECT_THROW(world.builder.Release(row), InvalidArgument);
  EXPECT_THROW(world.builder.Pause(row), InvalidArgument);
  EXPECT_EQ(world.builder.phase(row), RowPhase::kFree);
}

}  // namespace
}  // namespace sapwood
