// Executor: order of steps and of their two reports, what a result says of each item, isolation of errors,
// the eventfd, and silence when idle. Plans are made by hand; the runner is a probe.
#include "program/executor.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "base/check.h"
#include "program/fake_runners.h"
#include "program/sample_rows.h"

namespace sapwood {
namespace {

using Kind = ExecutorEvent::Kind;

const std::vector<KvGroup> kGroups = {{.kind = KvKind::kFull, .num_layers = 1, .page_size = 4}};

// Notes each call; `on` may throw or block. The token of a logit row is 100 * row + the position it is drawn for, plus
// 1000 times the first word of its mask.
class ProbeRunner : public Runner {
 public:
  std::function<void(const std::string& call, int64_t step)> on = [](const std::string&, int64_t) {};
  std::vector<std::string> calls;
  bool bad = false;

  void CopyPages(std::span<const PageCopy> copies) override { Note("copy" + std::to_string(copies.size()), -1); }
  void Forward(const StepBatch& batch, const RowTable&) override { Note("forward", batch.step_id); }
  void Head(const StepBatch& batch, const RowTable& rows, std::span<SampledToken> out) override {
    Note("head", batch.step_id);
    for (size_t l = 0; l < out.size(); ++l) {
      const Segment& s = batch.segments[batch.logit_segment[l]];
      const RowMask mask = MaskOf(batch, rows, static_cast<int32_t>(l));
      const int64_t token = 100 * s.row + batch.logit_position[l] + (mask.bits ? 1000 * int64_t{(*mask.bits)[0]} : 0);
      out[l] = {static_cast<int32_t>(token), -0.5f, bad, mask.late};
    }
  }
  int32_t vocab_size() const override { return 32; }

 private:
  void Note(const std::string& call, int64_t step) {
    calls.push_back(step < 0 ? call : call + "@" + std::to_string(step));
    on(call, step);
  }
};

struct PlanMaker {
  std::shared_ptr<StepPlan> plan = std::make_shared<StepPlan>();

  explicit PlanMaker(int64_t step_id) { plan->step_id = step_id; }
  PlanMaker& Init(int32_t row, uint32_t gen, int64_t max_len = 1000, std::vector<int32_t> stop_ids = {},
                  bool logprob = false) {
    RowInit init{.row = row, .gen = gen, .max_len = max_len, .return_logprob = logprob};
    init.stop_begin = static_cast<int32_t>(plan->ints.size());
    init.stop_count = static_cast<int32_t>(stop_ids.size());
    plan->ints.insert(plan->ints.end(), stop_ids.begin(), stop_ids.end());
    plan->row_ops.push_back({.kind = RowOpKind::kInit, .row = row, .gen = gen,
                             .begin = static_cast<int32_t>(plan->inits.size()), .count = 1});
    plan->inits.push_back(init);
    return Pages(row, gen, {row * 4, row * 4 + 1, row * 4 + 2, row * 4 + 3});
  }
  PlanMaker& Pages(int32_t row, uint32_t gen, std::vector<int32_t> pages) {
    plan->row_ops.push_back({.kind = RowOpKind::kAppendPages, .row = row, .gen = gen,
                             .begin = static_cast<int32_t>(plan->ints.size()),
                             .count = static_cast<int32_t>(pages.size())});
    plan->ints.insert(plan->ints.end(), pages.begin(), pages.end());
    return *this;
  }
  PlanMaker& Extend(int32_t row, uint32_t gen, int32_t q_len, int64_t kv_len, int32_t logit_rows) {
    plan->items.push_back({row, gen, ItemKind::kExtend, q_len, q_len - logit_rows,
                           static_cast<int32_t>(plan->tokens.size()), kv_len});
    for (int32_t i = 0; i < q_len; ++i) plan->tokens.push_back(i);
    return *this;
  }
  PlanMaker& Decode(int32_t row, uint32_t gen) {
    plan->items.push_back({row, gen, ItemKind::kDecode, 1, 0, 0, -1});
    return *this;
  }
  PlanMaker& Resume(int32_t row, uint32_t gen) {
    plan->items.push_back({row, gen, ItemKind::kResume, 0, 0, 0, -1});
    return *this;
  }
  PlanMaker& Masked(int32_t row) {
    plan->mask_rows.push_back(row);
    return *this;
  }
  operator std::shared_ptr<const StepPlan>() const { return plan; }
};

struct Harness {
  ProbeRunner* probe;
  std::unique_ptr<Executor> executor;

  explicit Harness(ExecutorConfig config = {}) {
    auto runner = std::make_unique<ProbeRunner>();
    probe = runner.get();
    config.groups = kGroups;
    config.max_rows = 8;
    executor = std::make_unique<Executor>(std::move(runner), config);
  }
  std::vector<ExecutorEvent> RunAll(std::vector<std::shared_ptr<const StepPlan>> plans) {
    for (auto& plan : plans) executor->Submit(plan);
    executor->WaitIdle();
    return executor->Drain();
  }
  StepResult Run(std::shared_ptr<const StepPlan> plan) { return RunAll({std::move(plan)}).back().result; }
  void Post(int32_t row, uint32_t gen, int64_t position, uint32_t word) {
    executor->PostMask(row, gen, position, std::span(&word, 1));
  }
};

bool Readable(int fd, int timeout_ms = 0) {
  pollfd p{fd, POLLIN, 0};
  return poll(&p, 1, timeout_ms) == 1;
}

double CpuSeconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

TEST(Executor, StepsRunInOrderHeadBeforeResult) {
  Harness h;
  const auto events = h.RunAll({PlanMaker(1).Init(0, 1).Extend(0, 1, 3, 0, 1), PlanMaker(2).Decode(0, 1),
                                PlanMaker(5).Decode(0, 1)});
  ASSERT_EQ(events.size(), 6u);
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(events[i].kind, i % 2 == 0 ? Kind::kHead : Kind::kResult) << i;
    EXPECT_EQ(events[i].step_id, (std::vector<int64_t>{1, 2, 5})[i / 2]);
  }
  const std::vector<std::string> calls{"forward@1", "head@1", "forward@2", "head@2", "forward@5", "head@5"};
  EXPECT_EQ(h.probe->calls, calls);
  EXPECT_EQ(events[1].result.tokens, std::vector<int32_t>{3});
  EXPECT_EQ(events[3].result.tokens, std::vector<int32_t>{4});
  EXPECT_EQ(events[5].result.tokens, std::vector<int32_t>{5});
  EXPECT_EQ(h.executor->queued(), 0);
}

// The head's report must be there while the head still runs: that is what it is for.
TEST(Executor, HeadIsReportedBeforeTheHeadRuns) {
  Harness h;
  std::vector<ExecutorEvent> at_forward, at_head;
  h.probe->on = [&](const std::string& call, int64_t) {
    (call == "forward" ? at_forward : at_head) = h.executor->Drain();
  };
  const auto rest = h.RunAll({PlanMaker(1).Init(0, 1).Extend(0, 1, 3, 0, 1)});
  EXPECT_TRUE(at_forward.empty());
  ASSERT_EQ(at_head.size(), 1u);
  EXPECT_EQ(at_head[0].kind, Kind::kHead);
  ASSERT_EQ(rest.size(), 1u);
  EXPECT_EQ(rest[0].kind, Kind::kResult);
}

TEST(Executor, ResultOfEachKindOfItem) {
  Harness h;
  h.Run(PlanMaker(1).Init(2, 7).Extend(2, 7, 2, 0, 1));
  // In one step: a chunk in mid-prompt, a stale generation, a decode, a dead row, a whole prompt with two logit rows.
  const StepResult r = h.Run(PlanMaker(2)
                                 .Init(0, 1)
                                 .Init(1, 1, 1000, {}, true)
                                 .Extend(0, 1, 5, 0, 0)
                                 .Decode(2, 6)
                                 .Decode(2, 7)
                                 .Decode(3, 0)
                                 .Extend(1, 1, 4, 0, 2));
  EXPECT_EQ(r.error, "");
  ASSERT_EQ(r.items.size(), 5u);
  const std::vector<int32_t> rows{0, 2, 2, 3, 1}, n{0, 0, 1, 0, 1};
  const std::vector<uint32_t> gens{1, 6, 7, 0, 1};
  const std::vector<uint8_t> flags{0, kSkipped, 0, kSkipped, 0};
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(r.items[i].row, rows[i]) << i;
    EXPECT_EQ(r.items[i].gen, gens[i]) << i;
    EXPECT_EQ(r.items[i].n, n[i]) << i;
    EXPECT_EQ(r.items[i].flags, flags[i]) << i;
  }
  EXPECT_EQ(r.tokens, (std::vector<int32_t>{203, 104}));
  EXPECT_EQ(r.items[2].token_begin, 0);
  EXPECT_EQ(r.items[4].token_begin, 1);
  EXPECT_TRUE(std::isnan(r.logprobs[0])) << "not asked for";
  EXPECT_EQ(r.logprobs[1], -0.5f);
  EXPECT_EQ(r.num_tokens, 5 + 1 + 4);
  EXPECT_EQ(r.num_kv, 5 + 3 + 4);
  EXPECT_EQ(r.num_logit_rows, 3);
  EXPECT_LE(r.start_ns, r.head_ns);
  EXPECT_LE(r.head_ns, r.done_ns);
  EXPECT_GT(r.start_ns, 0);
}

// Steps queued before the end was known: the row is skipped, nobody waits for the host.
TEST(Executor, ARowThatEndedIsSkippedByTheNextStep) {
  Harness h;
  auto events = h.RunAll({PlanMaker(1).Init(0, 1, 1000, {4}).Extend(0, 1, 3, 0, 1).Init(1, 1, 5).Extend(1, 1, 3, 0, 1),
                          PlanMaker(2).Decode(0, 1).Decode(1, 1), PlanMaker(3).Decode(0, 1).Decode(1, 1)});
  EXPECT_EQ(events[3].result.items[0].flags, kFinishedStop);
  EXPECT_EQ(events[3].result.items[0].n, 1);
  EXPECT_EQ(events[3].result.items[1].flags, kFinishedLength);
  EXPECT_EQ(events[5].result.items[0].flags, kSkipped);
  EXPECT_EQ(events[5].result.items[1].flags, kSkipped);
  EXPECT_EQ(events[5].result.items[0].n, 0);
  EXPECT_EQ(events[5].result.num_tokens, 0);
  ASSERT_EQ(events.size(), 6u) << "an empty step reports twice as well";
  EXPECT_EQ(events[4].kind, Kind::kHead);
  EXPECT_EQ(h.probe->calls.size(), 4u) << "and costs the runner nothing";
}

TEST(Executor, MaskInTimeIsDrawnUnder) {
  Harness h;
  h.Post(0, 1, 3, 7);  // before the executor knows the row
  const StepResult r =
      h.Run(PlanMaker(1).Init(0, 1).Init(1, 1).Extend(0, 1, 3, 0, 1).Extend(1, 1, 3, 0, 1).Masked(0));
  EXPECT_EQ(r.tokens, (std::vector<int32_t>{7003, 103}));
  EXPECT_EQ(r.items[0].flags, 0);
  h.Post(0, 1, 4, 8);
  EXPECT_EQ(h.Run(PlanMaker(2).Decode(0, 1)).tokens, std::vector<int32_t>{4}) << "the plan asks for none";
}

TEST(Executor, LateMaskHoldsItsRowAndNobodyElse) {
  Harness h;
  PlanMaker first(1);
  first.Init(0, 1, 1000, {}, true).Init(1, 1).Extend(0, 1, 3, 0, 1).Extend(1, 1, 3, 0, 1).Masked(0).Masked(1);
  h.Post(1, 1, 3, 2);
  // Two steps ahead, as planned before the loop heard.
  const auto events = h.RunAll({first, PlanMaker(2).Decode(0, 1).Decode(1, 1).Masked(0),
                                PlanMaker(3).Decode(0, 1).Masked(0)});
  const StepResult &held = events[1].result, &next = events[3].result, &last = events[5].result;
  EXPECT_EQ(held.items[0].flags, kHeld);
  EXPECT_EQ(held.items[0].n, 0);
  EXPECT_EQ(held.items[1].flags, 0);
  EXPECT_EQ(held.tokens, std::vector<int32_t>{2103});
  EXPECT_EQ(held.num_logit_rows, 2);
  EXPECT_EQ(next.items[0].flags, kSkipped | kHeld);
  EXPECT_EQ(next.tokens, std::vector<int32_t>{104});
  EXPECT_EQ(next.num_tokens, 1);
  EXPECT_EQ(last.items[0].flags, kSkipped | kHeld);
  EXPECT_EQ(last.num_tokens, 0);

  h.probe->calls.clear();
  const StepResult still = h.Run(PlanMaker(4).Resume(0, 1).Masked(0));
  EXPECT_EQ(still.items[0].flags, kHeld);
  EXPECT_EQ(h.probe->calls, std::vector<std::string>{"head@4"}) << "no tokens, no forward";
  h.Post(0, 1, 3, 5);
  const StepResult resumed = h.Run(PlanMaker(5).Decode(1, 1).Resume(0, 1).Masked(0));
  EXPECT_EQ(resumed.tokens, (std::vector<int32_t>{105, 5003}));
  EXPECT_EQ(resumed.items[1].n, 1);
  EXPECT_EQ(resumed.items[1].token_begin, 1);
  EXPECT_EQ(resumed.items[1].flags, 0);
  EXPECT_EQ(resumed.logprobs[1], -0.5f);
  EXPECT_EQ(resumed.num_tokens, 1);
  EXPECT_EQ(resumed.num_kv, 5);
  EXPECT_EQ(resumed.num_logit_rows, 2);
  EXPECT_EQ(h.Run(PlanMaker(6).Decode(0, 1)).tokens, std::vector<int32_t>{4}) << "and goes on";
}

TEST(Executor, MasksOfFormerGenerationsAreNoMasks) {
  Harness h;
  h.Post(0, 1, 3, 5);
  EXPECT_EQ(h.Run(PlanMaker(1).Init(0, 2).Extend(0, 2, 3, 0, 1).Masked(0)).items[0].flags, kHeld);
  EXPECT_EQ(h.Run(PlanMaker(2).Resume(0, 1).Masked(0)).items[0].flags, kSkipped) << "a stale resume";
  PlanMaker freed(3);
  freed.plan->row_ops.push_back({.kind = RowOpKind::kFree, .row = 0, .gen = 2});
  EXPECT_EQ(h.Run(freed.Resume(0, 2).Masked(0)).items[0].flags, kSkipped);
  h.Post(0, 3, 3, 6);
  EXPECT_EQ(h.Run(PlanMaker(4).Init(0, 3).Extend(0, 3, 3, 0, 1).Masked(0)).tokens, std::vector<int32_t>{6003});
}

TEST(Executor, PostMaskChecksItsArguments) {
  Harness h;
  EXPECT_THROW(h.Post(8, 1, 0, 1), InvalidArgument);
  EXPECT_THROW(h.Post(0, 1, -1, 1), InvalidArgument);
  const std::vector<uint32_t> words(2);
  EXPECT_THROW(h.executor->PostMask(0, 1, 0, words), InvalidArgument) << "the runner has 32 tokens";
}

// A grammar's thread posts masks while steps run: each token is drawn under its own, in time or resumed.
TEST(Executor, MasksComeFromAnotherThread) {
  Harness h;
  constexpr int64_t kTokens = 500;
  std::atomic<int64_t> wanted{1};  // the position whose mask may be made: the tokens before it are known
  std::thread grammar([&] {
    for (int64_t position = 1; position <= kTokens; ++position) {
      while (wanted.load() < position) std::this_thread::yield();
      h.Post(0, 1, position, static_cast<uint32_t>(position % 31 + 1));
    }
  });
  h.executor->Submit(
      PlanMaker(0).Init(0, 1, 1 << 30).Pages(0, 1, std::vector<int32_t>(600, 0)).Extend(0, 1, 1, 0, 1).Masked(0));
  int64_t step = 0, position = 1, num_held = 0;
  while (position <= kTokens) {
    ASSERT_TRUE(Readable(h.executor->fd(), 5000));
    for (const ExecutorEvent& e : h.executor->Drain()) {
      if (e.kind == Kind::kHead) continue;
      ASSERT_EQ(e.result.error, "");
      PlanMaker next(++step);
      if (e.result.items[0].flags == kHeld) {
        ++num_held;
        next.Resume(0, 1);
      } else {
        EXPECT_EQ(e.result.tokens, std::vector<int32_t>{static_cast<int32_t>(position + 1000 * (position % 31 + 1))});
        wanted = ++position;
        next.Decode(0, 1);
      }
      if (position <= kTokens) h.executor->Submit(next.Masked(0));
    }
  }
  grammar.join();
  RecordProperty("held", std::to_string(num_held));
}

TEST(Executor, BadLogitsEndTheRow) {
  Harness h;
  h.probe->bad = true;
  const StepResult r = h.Run(PlanMaker(1).Init(0, 1).Extend(0, 1, 3, 0, 1));
  EXPECT_TRUE(r.items[0].flags & kBadLogits);
  EXPECT_EQ(r.error, "");
  h.probe->bad = false;
  EXPECT_EQ(h.Run(PlanMaker(2).Decode(0, 1)).items[0].flags, kSkipped);
}

// An exception anywhere ends that step and the rows it named; others go on, and so does the executor.
TEST(Executor, AnErrorIsOneStepsOwn) {
  for (const std::string where : {"copy1", "forward", "head", "prepare"}) {
    Harness h;
    h.Run(PlanMaker(1).Init(0, 1).Extend(0, 1, 2, 0, 1).Init(1, 1).Extend(1, 1, 2, 0, 1));
    h.probe->on = [&](const std::string& call, int64_t) {
      if (call == where) throw std::runtime_error("broken in " + where);
    };
    PlanMaker bad(2);
    bad.Decode(0, 1).Init(2, 1).Extend(2, 1, 2, where == "prepare" ? 1 : 0, 1);
    if (where == "copy1") bad.plan->copies.push_back({0, 0, 1});
    const auto events = h.RunAll({bad, PlanMaker(3).Decode(0, 1).Decode(2, 1)});
    h.probe->on = [](const std::string&, int64_t) {};
    ASSERT_EQ(events.size(), 4u) << where;
    EXPECT_EQ(events[0].kind, Kind::kHead) << "two reports a step, come what may";
    EXPECT_EQ(events[1].kind, Kind::kResult);
    EXPECT_FALSE(events[1].result.error.empty());
    if (where != "prepare") {
      EXPECT_EQ(events[1].result.error, "broken in " + where);
    }
    EXPECT_TRUE(events[1].result.items.empty());
    EXPECT_EQ(events[3].result.error, "");
    EXPECT_EQ(events[3].result.items[0].flags, kSkipped) << where;
    EXPECT_EQ(events[3].result.items[1].flags, kSkipped) << where;
    const StepResult other = h.Run(PlanMaker(4).Decode(1, 1));
    EXPECT_EQ(other.tokens, std::vector<int32_t>{103}) << "row 1 was not in the broken step";
    EXPECT_EQ(h.Run(PlanMaker(5).Init(0, 2).Extend(0, 2, 1, 0, 1)).tokens, std::vector<int32_t>{1}) << "init revives";
  }
}

// Row ops are applied in order: of a step that broke on one, nobody knows which rows are whole.
TEST(Executor, RowsNamedOnlyByABrokenStepsOpsEndToo) {
  Harness h;
  PlanMaker bad(1);
  bad.Init(2, 1).Pages(2, 9, {0});  // generation 9 never was
  EXPECT_FALSE(h.Run(bad).error.empty());
  EXPECT_EQ(h.Run(PlanMaker(2).Decode(2, 1)).items[0].flags, kSkipped);
}

TEST(Executor, EventFdIsReadableExactlyWhileEventsWait) {
  Harness h;
  std::mutex mutex;
  std::condition_variable cv;
  bool open = false;
  h.probe->on = [&](const std::string& call, int64_t) {
    if (call != "head") return;
    std::unique_lock lock(mutex);
    cv.wait(lock, [&] { return open; });
  };
  EXPECT_FALSE(Readable(h.executor->fd()));
  EXPECT_TRUE(h.executor->Drain().empty()) << "never blocks";
  h.executor->Submit(PlanMaker(1).Init(0, 1).Extend(0, 1, 3, 0, 1));
  EXPECT_TRUE(Readable(h.executor->fd(), 5000));
  EXPECT_EQ(h.executor->Drain().size(), 1u);
  EXPECT_FALSE(Readable(h.executor->fd()));
  EXPECT_EQ(h.executor->queued(), 1);
  {
    const std::lock_guard lock(mutex);
    open = true;
  }
  cv.notify_all();
  EXPECT_TRUE(Readable(h.executor->fd(), 5000));
  h.RunAll({PlanMaker(2).Decode(0, 1)});  // coalesced: one drain takes all
  EXPECT_FALSE(Readable(h.executor->fd()));
}

// The loop's side in another thread, woken by poll alone.
TEST(Executor, ALoopDrivenByPollSeesEverything) {
  Harness h;
  constexpr int64_t kSteps = 2000;
  h.executor->Submit(PlanMaker(0).Init(0, 1, 1 << 30).Pages(0, 1, std::vector<int32_t>(600, 0)).Extend(0, 1, 1, 0, 1));
  int64_t submitted = 1, results = 0, heads = 0;
  while (results < kSteps) {
    ASSERT_TRUE(Readable(h.executor->fd(), 5000)) << "lost wake-up after " << results;
    for (const ExecutorEvent& e : h.executor->Drain()) {
      if (e.kind == Kind::kHead) {
        EXPECT_EQ(e.step_id, heads++);
        if (submitted < kSteps) h.executor->Submit(PlanMaker(submitted++).Decode(0, 1));
      } else {
        EXPECT_EQ(e.step_id, results++);
        EXPECT_EQ(e.result.tokens, std::vector<int32_t>{static_cast<int32_t>(results)});
      }
    }
  }
  EXPECT_EQ(heads, kSteps);
}

TEST(Executor, IdleCostsNoCpu) {
  Harness h;
  h.Run(PlanMaker(1).Init(0, 1).Extend(0, 1, 3, 0, 1));
  const double before = CpuSeconds();
  EXPECT_FALSE(Readable(h.executor->fd(), 200));
  EXPECT_LT(CpuSeconds() - before, 0.02);
}

TEST(Executor, SubmitChecksItsPlan) {
  Harness h;
  EXPECT_THROW(h.executor->Submit(nullptr), InvalidArgument);
  h.Run(PlanMaker(3));
  EXPECT_THROW(h.executor->Submit(PlanMaker(3)), InvalidArgument);
  EXPECT_THROW(h.executor->Submit(PlanMaker(2)), InvalidArgument);
  h.executor->WaitIdle();
  EXPECT_TRUE(h.executor->Drain().empty());
}

TEST(Executor, ShutdownDropsWhatIsQueuedAndMayBeRepeated) {
  Harness h;
  std::atomic<bool> inside{false}, release{false};
  h.probe->on = [&](const std::string&, int64_t) {
    inside = true;
    while (!release) std::this_thread::yield();
  };
  h.executor->Submit(PlanMaker(1).Init(0, 1).Extend(0, 1, 3, 0, 1));
  for (int64_t s = 2; s < 10; ++s) h.executor->Submit(PlanMaker(s).Decode(0, 1));
  while (!inside) std::this_thread::yield();
  std::thread stopper([&] { h.executor->Shutdown(); });
  while (h.executor->queued() != 1) std::this_thread::yield();
  release = true;
  stopper.join();
  h.executor->Shutdown();
  h.executor->WaitIdle();
  const auto events = h.executor->Drain();
  ASSERT_EQ(events.size(), 2u) << "the running step finished";
  EXPECT_EQ(events[1].step_id, 1);
  EXPECT_EQ(h.executor->queued(), 0);
  EXPECT_THROW(h.executor->Submit(PlanMaker(20)), InvalidArgument);
}

TEST(Executor, DestructorJoinsARunningStep) {
  for (int i = 0; i < 20; ++i) {
    Executor executor(MakeNoopRunner(7, 200, 100), {.groups = kGroups, .max_rows = 4});
    executor.Submit(PlanMaker(1).Init(0, 1).Extend(0, 1, 3, 0, 1));
    executor.Submit(PlanMaker(2).Decode(0, 1));
  }
}

TEST(Executor, TraceAndRecorderAreRings) {
  Harness h({.groups = kGroups, .trace_capacity = 3, .recorder_capacity = 2});
  h.Run(PlanMaker(1).Init(0, 1).Extend(0, 1, 3, 0, 1));
  for (int64_t s = 2; s <= 5; ++s) h.Run(PlanMaker(s).Decode(0, 1));
  const auto traces = h.executor->TakeTrace();
  ASSERT_EQ(traces.size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(traces[i].step_id, static_cast<int64_t>(3 + i));
    EXPECT_LE(traces[i].submit_ns, traces[i].start_ns);
    EXPECT_LE(traces[i].start_ns, traces[i].head_ns);
    EXPECT_LE(traces[i].head_ns, traces[i].done_ns);
    EXPECT_EQ(traces[i].num_decode_items, 1);
    EXPECT_EQ(traces[i].num_extend_items, 0);
  }
  EXPECT_TRUE(h.executor->TakeTrace().empty());
  const auto plans = h.executor->RecordedPlans();
  ASSERT_EQ(plans.size(), 2u);
  const StepPlan last = StepPlan::Deserialize(plans[1].data(), plans[1].size());
  EXPECT_EQ(last.step_id, 5);
  EXPECT_EQ(last.items.size(), 1u);
}

// A recorded run, replayed into a new executor, says the same.
TEST(Executor, RecordedPlansReplay) {
  Harness h({.groups = kGroups, .recorder_capacity = 100});
  std::vector<int32_t> tokens, again;
  for (int64_t s = 1; s <= 6; ++s) {
    PlanMaker plan(s);
    const StepResult r = h.Run(s == 1 ? plan.Init(3, 2).Extend(3, 2, 4, 0, 1) : plan.Decode(3, 2));
    tokens.insert(tokens.end(), r.tokens.begin(), r.tokens.end());
  }
  Harness replay;
  for (const auto& bytes : h.executor->RecordedPlans()) {
    const StepResult r = replay.Run(std::make_shared<StepPlan>(StepPlan::Deserialize(bytes.data(), bytes.size())));
    again.insert(again.end(), r.tokens.begin(), r.tokens.end());
  }
  EXPECT_EQ(tokens.size(), 6u);
  EXPECT_EQ(tokens, again);
}

}  // namespace
}  // namespace sapwood
