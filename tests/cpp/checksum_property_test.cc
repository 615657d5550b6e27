// The KV-checksum model under everything at once: cache, builder and executor thread driven one step ahead with random
// arrivals, shared prefixes, forks, multi-turn reuse, chunk sizes, aborts, pauses, retractions, stalls, and pools so
// small that rows block and pages are evicted all the time. Some requests draw every token under a mask of its own, which
// a thread that plays the grammar posts in time, some steps late, or only once it is heard that the row is held. Every
// token is compared with what the model says after the
// request's tokens alone; invariants are checked after every operation; every request ends exactly once.
//
// SAPWOOD_TEST_STEPS lowers the number of steps (sanitizer builds); SAPWOOD_TEST_SEED changes the seed.
#include <gtest/gtest.h>
#include <poll.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#include "base/check.h"
#include "batch/batch_builder.h"
#include "program/executor.h"
#include "program/fake_runners.h"

namespace sapwood {
namespace {

constexpr int32_t kVocab = 997;

struct Scenario {
  int32_t page_size;
  std::vector<KvGroup> groups;
  CacheKind kind;
  uint64_t seed;
  int64_t num_steps;
  int32_t max_tokens;  // of one request
  int32_t pool_tokens;
  int32_t bad_every = 0, fail_every = 0;
  int64_t fail_allocation = 0;
  int32_t stall_us = 30;
  int32_t masked_percent = 0;  // of the requests
  std::string name;
};

struct Stats {  // proof that the run went through what it claims to test
  int64_t steps = 0, tokens = 0, hits = 0, reused_outputs = 0, retracts = 0, drained = 0, blocked = 0, forks = 0;
  int64_t copies = 0, skipped = 0, stale = 0, aborts_in_flight = 0, finished_stop = 0, finished_length = 0, bad = 0;
  int64_t failed = 0, invalidated = 0, refused = 0, limbo = 0, same_step_hits = 0, waited = 0, fresh_pages = 0;
  int64_t masked = 0, held = 0, held_again = 0, skipped_held = 0, resumed = 0, resumed_alone = 0, released_held = 0;
  int64_t forked_held = 0, stale_masks = 0;

  void Add(const Stats& o) {
    steps += o.steps, tokens += o.tokens, hits += o.hits, reused_outputs += o.reused_outputs;
    retracts += o.retracts, drained += o.drained, blocked += o.blocked, forks += o.forks, copies += o.copies;
    skipped += o.skipped, stale += o.stale, aborts_in_flight += o.aborts_in_flight;
    finished_stop += o.finished_stop, finished_length += o.finished_length, bad += o.bad;
    failed += o.failed, invalidated += o.invalidated, refused += o.refused, limbo += o.limbo, same_step_hits += o.same_step_hits;
    waited += o.waited, fresh_pages += o.fresh_pages;
    masked += o.masked, held += o.held, held_again += o.held_again, skipped_held += o.skipped_held;
    resumed += o.resumed, resumed_alone += o.resumed_alone, released_held += o.released_held;
    forked_held += o.forked_held, stale_masks += o.stale_masks;
  }
};

struct Request {
  int64_t id = 0;
  uint64_t ns = 0;
  std::vector<int32_t> tokens;  // prompt and verified outputs
  int64_t prompt_len = 0, max_len = 0, min_len = 0;
  std::vector<int32_t> stop_ids;
  bool masked = false;
  int32_t row = -1;
  bool draining = false;  // paused, to be retracted once nothing of it is in flight
  bool paused = false;
  int ended = 0;
};

std::vector<uint32_t> MaskOfToken(const Request& request, int64_t position) {
  std::mt19937_64 random(static_cast<uint64_t>(request.id * 1'000'003 + position));
  std::vector<uint32_t> words((kVocab + 31) / 32);
  for (uint32_t& word : words) word = static_cast<uint32_t>(random() & random() & random());
  words[random() % (kVocab / 32)] |= 2;
  return words;
}

// Posts masks from a thread of its own, in the order they are handed over; tells which ones it has posted.
class Grammar {
 public:
  struct Job {
    int32_t row;
    uint32_t gen;
    int64_t position;
    std::vector<uint32_t> words;
  };

  explicit Grammar(Executor* executor) : executor_(executor), thread_([this] { Loop(); }) {}
  ~Grammar() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void Post(Job job) {
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back(std::move(job));
    }
    changed_.notify_all();
  }
  std::vector<Job> TakePosted(bool all) {
    std::unique_lock lock(mutex_);
    if (all) changed_.wait(lock, [this] { return jobs_.empty() && !busy_; });
    return std::exchange(posted_, {});
  }

 private:
  void Loop() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return stop_ || !jobs_.empty(); });
      if (stop_) return;
      Job job = std::move(jobs_.front());
      jobs_.pop_front();
      busy_ = true;
      lock.unlock();
      executor_->PostMask(job.row, job.gen, job.position, job.words);
      lock.lock();
      busy_ = false;
      posted_.push_back(std::move(job));
      changed_.notify_all();
    }
  }

  Executor* executor_;
  std::mutex mutex_;
  std::condition_variable changed_;  // a job came or is done, or stop
  std::deque<Job> jobs_;
  std::vector<Job> posted_;
  bool busy_ = false, stop_ = false;
  std::thread thread_;  // last: it uses the others
};

class Driver {
 public:
  explicit Driver(const Scenario& scenario)
      : scenario_(scenario), random_(scenario.seed), num_pages_(NumPages(scenario)),
        cache_({.groups = scenario.groups, .num_pages = num_pages_, .kind = scenario.kind, .record_events = false}),
        builder_(&cache_, kMaxRows),
        executor_(MakeChecksumRunner({.groups = scenario.groups,
                                      .num_pages = num_pages_,
                                      .vocab_size = kVocab,
                                      .stall_seed = scenario.stall_us > 0 ? scenario.seed | 1 : 0,
                                      .stall_us = scenario.stall_us,
                                      .bad_every = scenario.bad_every,
                                      .fail_every = scenario.fail_every}),
                  {.groups = scenario.groups, .max_rows = kMaxRows}),
        grammar_(&executor_) {
    for (const int32_t n : num_pages_) last_used_.emplace_back(n, kNoStep);
    tables_.resize(kMaxRows, std::vector<std::vector<PageId>>(scenario.groups.size()));
    table_kv_len_.resize(kMaxRows);
    by_row_.resize(kMaxRows, nullptr);
    for (int i = 0; i < 4; ++i) system_prompts_.push_back(RandomTokens(Below(scenario_.max_tokens * 2 / 3) + 1));
    for (int i = 0; i < 40; ++i) stop_pool_.push_back(Below(kVocab));
    if (scenario.fail_allocation > 0) cache_.TEST_FailAllocation(scenario.fail_allocation);
  }

  Stats Run() {
    while (stats_.steps < scenario_.num_steps || !live_.empty() || !in_flight_.empty()) {
      if (stats_.steps < scenario_.num_steps) {
        Arrive();
        Disturb();
      }
      RetractDrained();
      PostMasks(false);
      const bool launched = Plan();
      if (!launched && in_flight_.empty()) Unstick();
      const size_t ahead = launched ? 1 + Below(4) / 3 : 0;
      while (in_flight_.size() > ahead) TakeResult();
    }
    Finish();
    return stats_;
  }

 private:
  static constexpr int32_t kMaxRows = 7;

  static std::vector<int32_t> NumPages(const Scenario& scenario) {
    std::vector<int32_t> pages;
    for (const KvGroup& group : scenario.groups) {
      const bool window = group.kind == KvKind::kWindow;
      const int32_t tokens = window ? std::min(scenario.pool_tokens, 3 * (group.window + 24)) : scenario.pool_tokens;
      pages.push_back((tokens + scenario.page_size - 1) / scenario.page_size + 4);
    }
    return pages;
  }

  int32_t Below(int64_t n) { return static_cast<int32_t>(random_() % static_cast<uint64_t>(n)); }
  bool Chance(int percent) { return Below(100) < percent; }

  std::vector<int32_t> RandomTokens(int32_t n) {
    std::vector<int32_t> tokens(n);
    for (int32_t& token : tokens) token = Below(kVocab);
    return tokens;
  }

  void Check() {
    cache_.CheckInvariants();
    builder_.CheckInvariants();
  }

  // --- requests

  Request* NewRequest(uint64_t ns, std::vector<int32_t> prompt) {
    auto request = std::make_unique<Request>();
    request->id = num_created_++;
    request->ns = ns;
    request->prompt_len = static_cast<int64_t>(prompt.size());
    request->tokens = std::move(prompt);
    request->max_len = request->prompt_len + 1 + Below(scenario_.max_tokens - request->prompt_len);
    if (Chance(60)) request->stop_ids.assign(stop_pool_.begin(), stop_pool_.begin() + 1 + Below(40));
    request->masked = Chance(scenario_.masked_percent);
    if (Chance(30)) request->min_len = request->prompt_len + Below(request->max_len - request->prompt_len);
    live_.push_back(std::move(request));
    return live_.back().get();
  }

  std::vector<int32_t> NewPrompt() {
    std::vector<int32_t> prompt;
    const int32_t way = Below(10);
    if (way < 5) {
      prompt = system_prompts_[Below(4)];
      if (Chance(30)) prompt.resize(1 + Below(prompt.size()));
    } else if (way < 8 && !history_.empty()) {
      prompt = history_[Below(history_.size())];  // the next turn of a conversation, or the same prompt again
    }
    if (way != 7 || prompt.empty()) {
      for (const int32_t token : RandomTokens(1 + Below(6))) prompt.push_back(token);
    }
    if (static_cast<int32_t>(prompt.size()) > scenario_.max_tokens - 2) prompt.resize(scenario_.max_tokens - 2);
    return prompt;
  }

  void Arrive() {
    while (live_.size() < 12 && Chance(40)) NewRequest(Below(2), NewPrompt());
  }

  Request* AnyRunning() {
    std::vector<Request*> running;
    for (const auto& request : live_) {
      if (request->row >= 0) running.push_back(request.get());
    }
    return running.empty() ? nullptr : running[Below(running.size())];
  }

  RowSpec Spec(const Request& request) {
    RowSpec spec;
    spec.ns = request.ns;
    spec.tokens = request.tokens;
    spec.stop_ids = request.stop_ids;
    spec.masked = request.masked;
    spec.init.prompt_len = request.prompt_len;
    spec.init.max_len = request.max_len;
    spec.init.min_len = request.min_len;
    return spec;
  }

  void Place(Request* request, const Admitted& admitted) {
    SAPWOOD_CHECK(by_row_[admitted.row] == nullptr, "row ", admitted.row, " was given out twice");
    SAPWOOD_CHECK(admitted.cached_len < static_cast<int64_t>(request->tokens.size()), "nothing left to compute");
    request->row = admitted.row;
    by_row_[admitted.row] = request;
    stats_.hits += admitted.cached_len > 0;
    WantMask(*request);
    Check();
  }

  // --- masks

  // The mask of the request's next token can be made now: it comes at once, in some steps, or when the row is held.
  void WantMask(const Request& request) {
    if (!request.masked) return;
    const int64_t position = static_cast<int64_t>(request.tokens.size());
    ++stats_.masked;
    const int32_t delay = Chance(50) ? 0 : Chance(50) ? Below(4) : kUntilHeld;
    masks_.push_back({{request.row, builder_.gen(request.row), position, MaskOfToken(request, position)}, delay});
  }

  // Hands over what is due, and tells the builder what has been posted; whether there was any. all: everything is due.
  bool PostMasks(bool all) {
    for (PendingMask& mask : masks_) {
      const bool current = builder_.gen(mask.job.row) == mask.job.gen;
      if (!current) mask.delay = std::min<int32_t>(mask.delay, 3);  // made for nothing, and posted all the same
      if (mask.delay == kUntilHeld && builder_.phase(mask.job.row) == RowPhase::kHeld) mask.delay = Below(3);
      if (mask.delay != kUntilHeld && mask.delay > 0) --mask.delay;
      if (all) mask.delay = 0;
      if (mask.delay > 0) {
        // A loop that mistakes itself: the row is resumed in vain.
        if (current && Chance(5)) builder_.MaskPosted(mask.job.row, mask.job.position);
        continue;
      }
      stats_.stale_masks += !current;
      grammar_.Post(std::move(mask.job));
    }
    std::erase_if(masks_, [](const PendingMask& mask) { return mask.delay == 0; });
    const std::vector<Grammar::Job> posted = grammar_.TakePosted(all);
    for (const Grammar::Job& job : posted) {
      if (builder_.gen(job.row) == job.gen) builder_.MaskPosted(job.row, job.position);
    }
    Check();
    return !posted.empty();
  }

  // The step failed: its requests end; what was built on it starts again, at once or when nothing of it runs any more.
  void TakeFailure(const StepPlan& plan) {
    SAPWOOD_CHECK(scenario_.fail_every > 0, "a step failed out of nowhere");
    for (const PlanItem& item : plan.items) {
      Request* request = by_row_[item.row];
      if (request == nullptr || builder_.gen(item.row) != item.gen) continue;
      ++stats_.failed;
      builder_.Release(request->row, false, true);
      by_row_[request->row] = nullptr;
      request->row = -1;
      Check();
      End(request);
    }
    for (const auto& request : live_) {  // forks of what was to be computed
      if (request->row >= 0 && builder_.phase(request->row) == RowPhase::kDone) Free(request.get(), false, true);
    }
    if (Chance(50)) return RecomputeInvalid();
    for (const auto& request : live_) {
      if (request->row < 0 || builder_.valid(request->row)) continue;
      ++stats_.invalidated;
      builder_.Pause(request->row);
      request->paused = request->draining = true;
    }
  }

  void Free(Request* request, bool keep, bool failed) {
    const int32_t row = request->row;
    stats_.stale += builder_.in_flight(row) > 0;
    stats_.released_held += builder_.phase(row) == RowPhase::kHeld;
    builder_.Release(row, keep, failed);
    by_row_[row] = nullptr;
    request->row = -1;
    request->draining = request->paused = false;
    for (size_t g = 0; g < scenario_.groups.size(); ++g) stats_.limbo += cache_.stats(static_cast<int>(g)).limbo;
    Check();
    if (failed) RecomputeInvalid();
  }

  // Rows that shared what a failed row computed start again.
  void RecomputeInvalid() {
    for (bool again = true; again;) {
      again = false;
      for (const auto& request : live_) {
        if (request->row < 0 || builder_.valid(request->row)) continue;
        ++stats_.invalidated;
        Free(request.get(), false, true);
        again = true;
        break;
      }
    }
  }

  void End(Request* request) {
    SAPWOOD_CHECK(++request->ended == 1, "request ", request->id, " ended twice");
    SAPWOOD_CHECK(request->row < 0, "request ", request->id, " ended with a row");
    ++num_ended_;
    if (history_.size() > 12) history_.erase(history_.begin() + Below(history_.size()));
    history_.push_back(request->tokens);
    std::erase_if(live_, [&](const auto& other) { return other.get() == request; });
  }

  // --- what happens to running requests

  void Disturb() {
    if (Chance(4) && !live_.empty()) {  // abort, at whatever phase it is
      Request* request = live_[Below(live_.size())].get();
      if (request->row >= 0) {
        stats_.aborts_in_flight += builder_.in_flight(request->row) > 0;
        Free(request, Chance(80), false);
      }
      End(request);
    }
    if (Request* request = Chance(3) ? AnyRunning() : nullptr) {  // retract without waiting for what is in flight
      ++stats_.retracts;
      Free(request, Chance(80), false);
    }
    if (Request* request = Chance(8) ? AnyRunning() : nullptr) {
      builder_.Pause(request->row);
      request->paused = true;
      request->draining = Chance(40);
      Check();
    }
    for (const auto& request : live_) {
      if (!request->paused || request->draining || !Chance(25)) continue;
      builder_.Resume(request->row);
      request->paused = false;
    }
    if (Chance(6)) Fork();
  }

  void Fork() {
    Request* parent = AnyRunning();
    if (parent == nullptr || builder_.num_free_rows() == 0) return;
    const int64_t most = std::min<int64_t>(builder_.planned_len(parent->row), parent->tokens.size());
    const int64_t at = std::min<int64_t>(Below(most + 1), scenario_.max_tokens - 8);
    std::vector<int32_t> prompt(parent->tokens.begin(), parent->tokens.begin() + at);
    for (const int32_t token : RandomTokens(1 + Below(4))) prompt.push_back(token);
    Request* request = NewRequest(parent->ns, std::move(prompt));
    const Admitted admitted = builder_.AdmitFork(parent->row, at, Spec(*request));
    Check();
    if (admitted.row < 0) return;  // too few pages: it waits like any other
    stats_.forks += admitted.cached_len == at && at > 0;
    stats_.forked_held += builder_.phase(parent->row) == RowPhase::kHeld;
    Place(request, admitted);
  }

  void RetractDrained() {
    for (const auto& request : live_) {
      if (!request->draining || builder_.in_flight(request->row) > 0) continue;
      ++stats_.drained;
      Free(request.get(), true, false);
    }
  }

  // Nothing could be launched and nothing runs: give memory back, newest first.
  void Unstick() {
    if (PostMasks(true)) return;
    Request* newest = nullptr;
    int num_running = 0;
    for (const auto& request : live_) {
      if (request->row < 0) continue;
      ++num_running;
      if (!builder_.valid(request->row)) {
        newest = request.get();
        break;
      }
      if (request->paused) {
        builder_.Resume(request->row);
        request->paused = request->draining = false;
      }
      if (newest == nullptr || builder_.gen(request->row) > builder_.gen(newest->row)) newest = request.get();
    }
    if (num_running == 0) {
      num_stuck_ = 0;
      return;
    }
    ++stats_.retracts;
    Free(newest, Chance(50), false);
    SAPWOOD_CHECK(++num_stuck_ < 100, "no progress: ", live_.size(), " requests live\n", cache_.DebugString());
  }

  // --- steps

  bool Plan() {
    builder_.BeginStep(next_step_);
    const bool decodes_first = Chance(70);
    if (decodes_first) builder_.AddDecodes();
    Check();
    const std::vector<int32_t> running = Extending();
    for (const int32_t row : running) Extend(row);
    const bool extends_before = !running.empty();
    for (const auto& request : live_) {
      // While nothing moves, a newcomer would take the very pages that were just given back.
      if (num_stuck_ > 0 || request->row >= 0 || builder_.num_free_rows() == 0 || Chance(20)) continue;
      if (Chance(50) && builder_.PendingPrefix(request->ns, request->tokens) > 0) {
        ++stats_.waited;
        continue;
      }
      const Admitted admitted = builder_.Admit(Spec(*request));
      stats_.same_step_hits += extends_before && admitted.cached_len > 0;
      stats_.reused_outputs += admitted.cached_len > request->prompt_len;
      Place(request.get(), admitted);
      if (Chance(85)) Extend(admitted.row);
    }
    if (!decodes_first) builder_.AddDecodes();
    const BuiltStep built = builder_.EndStep();
    Check();
    stats_.blocked += static_cast<int64_t>(built.blocked.size());
    for (size_t i = 1; i < built.blocked.size(); ++i) {
      SAPWOOD_CHECK(builder_.gen(built.blocked[i - 1]) > builder_.gen(built.blocked[i]), "blocked: newest first");
    }
    // Some of the blocked ones are retracted, as a scheduler would.
    for (const int32_t row : built.blocked) {
      if (!Chance(30)) continue;
      ++stats_.retracts;
      Free(by_row_[row], true, false);
    }
    if (built.plan == nullptr) return false;
    CheckPlan(*built.plan);
    ++next_step_;
    ++stats_.steps;
    num_stuck_ = 0;
    in_flight_.push_back(built);
    if (Chance(10)) {  // the bytes are as good as the plan
      const std::vector<uint8_t> bytes = built.plan->Serialize();
      executor_.Submit(std::make_shared<StepPlan>(StepPlan::Deserialize(bytes.data(), bytes.size())));
    } else {
      executor_.Submit(built.plan);
    }
    return true;
  }

  std::vector<int32_t> Extending() {
    std::vector<int32_t> rows;
    for (const auto& request : live_) {
      if (request->row >= 0 && builder_.phase(request->row) == RowPhase::kExtend) rows.push_back(request->row);
    }
    std::shuffle(rows.begin(), rows.end(), random_);
    return rows;
  }

  void Extend(int32_t row) {
    const int32_t chunk = Chance(30) ? 1000 : 1 + Below(24);
    const int64_t before = builder_.planned_len(row);
    const int32_t granted = builder_.AddExtend(row, chunk);
    SAPWOOD_CHECK(granted >= 0 && granted <= chunk && builder_.planned_len(row) == before + granted, "granted ",
                  granted, " of ", chunk);
    stats_.refused += granted == 0;
    Check();
  }

  // Mirrors the page tables from the row ops and checks that a page handed out as new is named by no step that has not
  // retired: what limbo is for.
  void CheckPlan(const StepPlan& plan) {
    for (const RowOp& op : plan.row_ops) {
      if (op.kind == RowOpKind::kInit) {
        for (auto& table : tables_[op.row]) table.clear();
        table_kv_len_[op.row] = plan.inits[op.begin].kv_len;
      } else if (op.kind == RowOpKind::kAppendPages) {
        std::vector<PageId>& table = tables_[op.row][op.group];
        for (int32_t i = op.begin; i < op.begin + op.count; ++i) {
          const PageId page = plan.ints[i];
          const bool fresh = static_cast<int64_t>(table.size()) >= table_kv_len_[op.row] / scenario_.page_size;
          if (fresh && page != kNoPage) {
            ++stats_.fresh_pages;
            SAPWOOD_CHECK(last_used_[op.group][page] <= retired_, "page ", page, " of group ", op.group,
                          " was handed to row ", op.row, " in step ", plan.step_id, " while step ",
                          last_used_[op.group][page], " names it; retired: ", retired_);
          }
          table.push_back(page);
        }
      }
    }
    for (const PageCopy& copy : plan.copies) last_used_[copy.group][copy.dst] = plan.step_id;
    stats_.copies += static_cast<int64_t>(plan.copies.size());
    for (const PlanItem& item : plan.items) {
      if (by_row_[item.row] == nullptr) continue;  // just retracted: its step is in flight, its pages are in limbo
      const int64_t end = builder_.planned_len(item.row);
      for (size_t g = 0; g < scenario_.groups.size(); ++g) {
        const KvGroup& group = scenario_.groups[g];
        const int64_t begin =
            group.kind == KvKind::kWindow ? std::max<int64_t>(0, end - item.q_len + 1 - group.window) : 0;
        for (int64_t i = begin / scenario_.page_size; i * scenario_.page_size < end; ++i) {
          last_used_[g][tables_[item.row][g][i]] = plan.step_id;
        }
      }
    }
  }

  void TakeResult() {
    while (results_.empty()) {
      pollfd wait{.fd = executor_.fd(), .events = POLLIN, .revents = 0};
      SAPWOOD_CHECK(poll(&wait, 1, 30'000) == 1, "the executor has gone silent");
      for (ExecutorEvent& event : executor_.Drain()) {
        if (event.kind == ExecutorEvent::Kind::kResult) results_.push_back(std::move(event.result));
      }
    }
    const StepResult result = std::move(results_.front());
    results_.pop_front();
    const BuiltStep built = std::move(in_flight_.front());
    in_flight_.pop_front();
    SAPWOOD_CHECK(result.step_id == built.plan->step_id, "result out of order");
    SAPWOOD_CHECK(result.num_kv <= built.num_kv, "num_kv is an upper bound");
    for (const ResultItem& item : result.items) {
      stats_.skipped += item.flags == kSkipped;
      stats_.skipped_held += item.flags == (kSkipped | kHeld);
    }
    CountResumes(*built.plan, result);
    const Committed committed = builder_.Commit(result);
    retired_ = result.step_id;
    Check();
    if (!result.error.empty()) {
      SAPWOOD_CHECK(committed.rows.empty(), "a failed step gave tokens: ", result.error);
      return TakeFailure(*built.plan);
    }
    for (size_t i = 0; i < committed.rows.size(); ++i) {
      // An earlier item's failure may have sent this one's request back to waiting.
      Request* request = by_row_[committed.rows[i]];
      if (request != nullptr) TakeToken(request, committed.tokens[i], committed.flags[i]);
    }
  }

  void CountResumes(const StepPlan& plan, const StepResult& result) {
    if (!result.error.empty()) return;
    int64_t num_resumed = 0;
    for (size_t i = 0; i < plan.items.size(); ++i) {
      if (plan.items[i].kind != ItemKind::kResume) continue;
      ++num_resumed;
      stats_.held_again += result.items[i].flags == kHeld;
      stats_.resumed += result.items[i].n;
    }
    stats_.resumed_alone += num_resumed > 0 && result.num_tokens == 0;
  }

  void TakeToken(Request* request, int32_t token, uint8_t flags) {
    if (flags & kHeld) {
      SAPWOOD_CHECK(request->masked && token == -1 && flags == kHeld, "request ", request->id, " was held");
      ++stats_.held;
      return;
    }
    if (flags & kBadLogits) {
      SAPWOOD_CHECK(scenario_.bad_every > 0, "bad logits out of nowhere");
      ++stats_.bad;
      Free(request, false, true);
      return End(request);
    }
    if (token < 0) return;
    const int64_t n = static_cast<int64_t>(request->tokens.size());
    const std::vector<uint32_t> mask = request->masked ? MaskOfToken(*request, n) : std::vector<uint32_t>();
    const int32_t expected = ChecksumNextToken(scenario_.groups, kVocab, request->tokens.data(), n, mask);
    SAPWOOD_CHECK(token == expected, "request ", request->id, " row ", request->row, ": token ", n, " is ", token,
                  ", the model says ", expected);
    const bool stops = n >= request->min_len &&
                       std::find(request->stop_ids.begin(), request->stop_ids.end(), token) != request->stop_ids.end();
    const uint8_t expected_flags = stops ? kFinishedStop : n + 1 == request->max_len ? kFinishedLength : 0;
    SAPWOOD_CHECK(flags == expected_flags, "request ", request->id, " flags ", int{flags}, ", expected ",
                  int{expected_flags});
    request->tokens.push_back(token);
    ++stats_.tokens;
    if (flags == 0) return WantMask(*request);
    SAPWOOD_CHECK(builder_.tokens(request->row) == request->tokens, "the book has other tokens");
    ++(stops ? stats_.finished_stop : stats_.finished_length);
    Free(request, Chance(90), false);
    End(request);
  }

  void Finish() {
    SAPWOOD_CHECK(num_created_ == num_ended_, num_created_, " requests admitted, ", num_ended_, " ended");
    SAPWOOD_CHECK(builder_.num_free_rows() == kMaxRows, "rows are left");
    executor_.WaitIdle();
    for (size_t g = 0; g < scenario_.groups.size(); ++g) {
      const PoolStats stats = cache_.stats(static_cast<int>(g));
      SAPWOOD_CHECK(stats.free + stats.cached == stats.total, "free ", stats.free, " + cached ", stats.cached, " of ",
                    stats.total, "; leased ", stats.leased, ", limbo ", stats.limbo);
    }
    cache_.Flush();
    Check();
    for (size_t g = 0; g < scenario_.groups.size(); ++g) {
      const PoolStats stats = cache_.stats(static_cast<int>(g));
      SAPWOOD_CHECK(stats.free == stats.total, "free ", stats.free, " of ", stats.total, " after Flush");
    }
  }

  Scenario scenario_;
  std::mt19937_64 random_;
  std::vector<int32_t> num_pages_;
  CacheManager cache_;
  BatchBuilder builder_;
  Executor executor_;
  Grammar grammar_;
  Stats stats_;

  static constexpr int32_t kUntilHeld = 1'000'000;
  struct PendingMask {
    Grammar::Job job;
    int32_t delay;  // steps
  };
  std::vector<PendingMask> masks_;

  std::vector<std::unique_ptr<Request>> live_;
  std::vector<Request*> by_row_;
  std::vector<std::vector<int32_t>> system_prompts_, history_;
  std::vector<int32_t> stop_pool_;
  int64_t num_created_ = 0, num_ended_ = 0;
  int num_stuck_ = 0;

  int64_t next_step_ = 0, retired_ = kNoStep;
  std::deque<BuiltStep> in_flight_;
  std::deque<StepResult> results_;
  std::vector<std::vector<int64_t>> last_used_;            // [group][page]: newest step that names it
  std::vector<std::vector<std::vector<PageId>>> tables_;   // [row][group], from the row ops
  std::vector<int64_t> table_kv_len_;
};

KvGroup Full(int32_t page_size) { return {.kind = KvKind::kFull, .page_size = page_size}; }
KvGroup Window(int32_t page_size, int32_t window) {
  return {.kind = KvKind::kWindow, .window = window, .page_size = page_size};
}

int64_t FromEnv(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::atoll(text) : otherwise;
}

std::vector<Scenario> Scenarios(int64_t num_steps) {
  struct Size { int32_t page_size, window, max_tokens, pool_tokens; };
  const Size sizes[] = {{1, 6, 40, 90}, {3, 7, 45, 100}, {16, 20, 90, 220}, {64, 70, 260, 640}};
  const std::pair<CacheKind, const char*> kinds[] = {
      {CacheKind::kRadix, "radix"}, {CacheKind::kFlat, "flat"}, {CacheKind::kNone, "none"}};
  std::vector<Scenario> scenarios;
  const auto seed = static_cast<uint64_t>(FromEnv("SAPWOOD_TEST_SEED", 1));
  for (const Size& size : sizes) {
    const std::pair<std::vector<KvGroup>, const char*> groups[] = {
        {{Full(size.page_size)}, "full"},
        {{Window(size.page_size, size.window)}, "window"},
        {{Full(size.page_size), Window(size.page_size, size.window)}, "both"}};
    for (const auto& [group, group_name] : groups) {
      for (const auto& [kind, kind_name] : kinds) {
        Scenario scenario{.page_size = size.page_size,
                          .groups = group,
                          .kind = kind,
                          .seed = seed * 1000 + scenarios.size(),
                          .num_steps = num_steps,
                          .max_tokens = size.max_tokens,
                          .pool_tokens = size.pool_tokens,
                          .name = ""};
        // A third with failing rows, a third with failing steps (over the kinds in turn), every fourth without stalls
        // (the executor then keeps up with the loop).
        const size_t fault = (scenarios.size() + scenarios.size() / 3) % 3;
        if (fault == 1) scenario.bad_every = 61;
        if (scenarios.size() % 4 == 3) scenario.stall_us = 0;
        if (fault == 2) scenario.fail_every = 23;
        if (scenarios.size() % 5 != 4) scenario.masked_percent = 40;
        scenario.name = StrCat("page_size ", size.page_size, " groups ", group_name, " kind ", kind_name, " seed ",
                            scenario.seed, " bad_every ", scenario.bad_every, " fail_every ", scenario.fail_every,
                            " masked_percent ", scenario.masked_percent);
        scenarios.push_back(std::move(scenario));
      }
    }
  }
  return scenarios;
}

TEST(ChecksumPropertyTest, NoWrongTokenUnderRandomLoad) {
  const int64_t total_steps = FromEnv("SAPWOOD_TEST_STEPS", 104'400);
  Stats total;
  for (const Scenario& scenario : Scenarios((total_steps + 35) / 36)) {
    try {
      total.Add(Driver(scenario).Run());
    } catch (const std::exception& error) {
      FAIL() << scenario.name << "\n" << error.what();
    }
  }
  EXPECT_GE(total.steps, total_steps);
  const std::map<std::string, int64_t> seen = {
      {"tokens", total.tokens}, {"prefix hits", total.hits}, {"reused outputs", total.reused_outputs},
      {"retracted", total.retracts}, {"drained", total.drained}, {"blocked", total.blocked}, {"forked", total.forks},
      {"copied pages", total.copies}, {"skipped items", total.skipped}, {"released in flight", total.stale},
      {"aborted in flight", total.aborts_in_flight}, {"stopped", total.finished_stop},
      {"length", total.finished_length}, {"bad logits", total.bad}, {"failed", total.failed},
      {"invalidated", total.invalidated},
      {"extends refused", total.refused}, {"pages in limbo", total.limbo}, {"same-step hits", total.same_step_hits},
      {"waited for a leader", total.waited}, {"fresh pages", total.fresh_pages}, {"masks wanted", total.masked},
      {"held", total.held}, {"held again", total.held_again}, {"skipped while held", total.skipped_held},
      {"resumed", total.resumed}, {"steps of resumes alone", total.resumed_alone},
      {"released while held", total.released_held}, {"forked while held", total.forked_held},
      {"masks of former generations", total.stale_masks}};
  for (const auto& [what, count] : seen) {
    RecordProperty(what, std::to_string(count));
    if (total_steps >= 20'000) { EXPECT_GE(count, 10) << what << ": the run never went there"; }
  }
}

// The k-th page allocation fails, for every k of a short run: nothing leaks, nothing is wrong.
TEST(ChecksumPropertyTest, AllocationFailureAtEveryPage) {
  const int64_t num_steps = FromEnv("SAPWOOD_TEST_STEPS", 104'400) >= 20'000 ? 14 : 6;
  for (Scenario scenario : Scenarios(num_steps)) {
    if (scenario.page_size != 3 && scenario.page_size != 16) continue;
    scenario.stall_us = 0;
    scenario.masked_percent = 0;  // whether a mask is in time is not the same in every run
    for (int64_t k = 1;; ++k) {
      scenario.fail_allocation = k;
      try {
        const Stats stats = Driver(scenario).Run();
        if (k > stats.fresh_pages + stats.copies) break;  // past the last allocation
      } catch (const std::exception& error) {
        FAIL() << scenario.name << " failing allocation " << k << "\n" << error.what();
      }
    }
  }
}

}  // namespace
}  // namespace sapwood
