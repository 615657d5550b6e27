// The book of rows and the building of plans.
//
// Receives admissions and chunk sizes from engine/scheduler.py (through the bindings) and StepResults from the
// executor; leases pages from cache/cache_manager.cc; hands StepPlans to program/executor.cc.
//
// Three lengths of a row, all in tokens from position 0:
//
//   known    tokens the loop knows: prompt, and outputs whose results have come back
//   planned  KV length once every launched step has run (planned_len)
//   written  the part of both that launched steps certainly write: what may be put into the cache
//
// While a row decodes, planned == known - 1 + samples in flight: the newest token is sampled but not yet in the KV. A held
// row (its mask was late) has planned == known and nothing in flight that will run: decode items launched before the loop
// heard of the hold are skipped by the executor, and have given their part of `planned` back when it did.
#include "batch/batch_builder.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <utility>

#include "base/check.h"

namespace sapwood {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

struct Row {
  RowPhase phase = RowPhase::kFree;  // never kPaused: that is `paused` on top of kExtend, kDecode or kHeld
  bool paused = false;
  bool on_device = false;            // its kInit is in a plan
  bool worthless = false;            // bad logits or a failed step: nothing of it may be matched by others
  uint32_t gen = 0;
  int32_t in_flight = 0;             // launched, unretired steps that name it
  int32_t samples_in_flight = 0;     // those of them that sample a token for it
  int32_t skips_in_flight = 0;       // those that were to, but were launched on top of one that was held: the oldest
  int64_t planned_len = 0;
  int64_t mask_position = -1;        // newest token whose mask has been posted
  int64_t max_len = 0;
  int64_t capacity = 0;              // tokens its lease has pages for
  int64_t last_step = kNoStep;       // newest step that names it
  int64_t copied_step = kNoStep;     // a fork: newest step that wrote the pages it copies, while that was in flight
  int64_t cached_len = 0;
  int64_t committed_len = 0;         // whole pages handed to the cache, in tokens
  int64_t next_slide = kNever;       // planned_len at which a window group can give up its next page
  int64_t order = 0;                 // admissions before it
  int32_t pages_sent = 0;            // page table entries the executor has, per group
  Lease lease;
  RowSpec spec;

  const std::vector<int32_t>& keys() const { return spec.keys.empty() ? spec.tokens : spec.keys; }
  int64_t known() const { return static_cast<int64_t>(spec.tokens.size()); }
  bool runs(RowPhase wanted) const { return phase == wanted && !paused; }

  // Tokens whose KV is certain. A row that ended by its last token never wrote it: a later step that names the row
  // skips it, though planned_len counts that step. A live row's every known token was sampled while the row was
  // alive, so the launched step that writes it does run.
  int64_t written() const {
    if (worthless) return 0;
    return std::min(planned_len, phase == RowPhase::kDone ? known() - 1 : known());
  }
};

bool Samples(const PlanItem& item) { return item.kind == ItemKind::kResume || item.logit_from < item.q_len; }

struct RowRef {
  int32_t row;
  uint32_t gen;
};

// A fork's tail copies that wait for the next plan.
struct PendingFork {
  RowRef ref;
  std::vector<PageCopy> copies;
};

struct LaunchedStep {
  int64_t step_id;
  std::shared_ptr<const StepPlan> plan;
  std::vector<RowRef> forks;  // rows that only its copies name
};

}  // namespace

struct BatchBuilder::Impl {
  CacheManager* cache;
  int32_t page_size;
  int num_groups;
  bool has_window = false;
  uint32_t last_gen = 0;
  int64_t num_admitted = 0;
  std::vector<Row> rows;
  std::vector<int32_t> free_rows;
  std::vector<int32_t> live;  // oldest admission first
  std::vector<PendingFork> pending_forks;
  std::deque<LaunchedStep> launched;

  // The plan being filled. Row ops gather in it between steps too, and stay when a step has no items.
  std::shared_ptr<StepPlan> plan = std::make_shared<StepPlan>();
  bool building = false;
  int64_t step_id = kNoStep;        // of the step being built
  int64_t last_launched = kNoStep;
  BuiltStep built;

  Impl(CacheManager* cache_manager, int32_t max_rows) : cache(cache_manager) {
    SAPWOOD_REQUIRE(cache != nullptr, "cache must not be null");
    SAPWOOD_REQUIRE(max_rows > 0, "max_rows must be positive, got ", max_rows);
    page_size = cache->page_size();
    num_groups = cache->num_groups();
    for (const KvGroup& group : cache->config().groups) has_window |= group.kind == KvKind::kWindow;
    rows.resize(max_rows);
    free_rows.reserve(max_rows);
    for (int32_t r = max_rows - 1; r >= 0; --r) free_rows.push_back(r);
    live.reserve(max_rows);
  }

  const Row& Get(int32_t r) const {
    SAPWOOD_REQUIRE(r >= 0 && r < static_cast<int64_t>(rows.size()), "row must be 0..", rows.size() - 1, ", got ", r);
    return rows[r];
  }
  const Row& GetLive(int32_t r) const {
    const Row& row = Get(r);
    SAPWOOD_REQUIRE(row.phase != RowPhase::kFree, "row ", r, " is free: it was released or never admitted");
    return row;
  }
  Row& GetLive(int32_t r) { return const_cast<Row&>(std::as_const(*this).GetLive(r)); }
  bool Current(RowRef ref) const { return rows[ref.row].gen == ref.gen; }
  bool InThisStep(const Row& row) const { return building && row.last_step == step_id; }

  void CheckSpec(const RowSpec& spec) const {
    const int64_t n = static_cast<int64_t>(spec.tokens.size());
    SAPWOOD_REQUIRE(n > 0, "tokens must not be empty: one token at least has to be computed");
    SAPWOOD_REQUIRE(spec.keys.empty() || spec.keys.size() == spec.tokens.size(), "keys must be as long as tokens (", n,
                    "), got ", spec.keys.size());
    SAPWOOD_REQUIRE(spec.init.max_len > n, "max_len must exceed the ", n, " known tokens, got ", spec.init.max_len);
    if (free_rows.empty()) {
      throw CapacityError(StrCat("no free row: all ", rows.size(), " are live; release one or raise max_rows"));
    }
  }

  Admitted TakeRow(RowSpec spec, Lease lease) {
    const int32_t r = free_rows.back();
    free_rows.pop_back();
    Row& row = rows[r];
    row.phase = RowPhase::kExtend;
    if (++last_gen == 0) ++last_gen;  // 0 is what a free row has
    row.gen = last_gen;
    row.order = num_admitted++;
    row.cached_len = row.planned_len = lease.cached_len();
    row.committed_len = row.cached_len / page_size * page_size;
    row.capacity = lease.capacity();
    row.max_len = spec.init.max_len;
    row.lease = std::move(lease);
    row.spec = std::move(spec);
    row.spec.init.row = r;
    row.spec.init.gen = row.gen;
    row.spec.init.kv_len = row.cached_len;
    if (has_window) row.next_slide = NextSlide(row);
    live.push_back(r);
    return {.row = r, .gen = row.gen, .cached_len = row.cached_len};
  }

  int64_t NextSlide(const Row& row) const {
    int64_t next = kNever;
    for (int g = 0; g < num_groups; ++g) {
      const KvGroup& group = cache->config().groups[g];
      if (group.kind != KvKind::kWindow) continue;
      next = std::min(next, (int64_t{row.lease.first_page(g)} + 1) * page_size + group.window - 1);
    }
    return next;
  }

  // Whether the lease still holds, in every window group, what a query at position `at` sees.
  bool WindowHolds(const Row& row, int64_t at) const {
    for (int g = 0; g < num_groups; ++g) {
      const KvGroup& group = cache->config().groups[g];
      if (group.kind != KvKind::kWindow) continue;
      if (row.lease.first_page(g) > std::max<int64_t>(0, at + 1 - group.window) / page_size) return false;
    }
    return true;
  }

  Admitted Admit(RowSpec spec) {
    CheckSpec(spec);
    const std::vector<int32_t>& keys = spec.keys.empty() ? spec.tokens : spec.keys;
    Lease lease = cache->Acquire(spec.ns, keys, static_cast<int64_t>(keys.size()) - 1);
    return TakeRow(std::move(spec), std::move(lease));
  }

  Admitted AdmitFork(int32_t parent_row, int64_t at, RowSpec spec) {
    // A tail copy is done before the forward of its step, so it must not share a step with what it copies.
    SAPWOOD_REQUIRE(!building, "AdmitFork must be called outside BeginStep..EndStep");
    Row& parent = GetLive(parent_row);
    CheckSpec(spec);
    SAPWOOD_REQUIRE(at >= 0 && at < static_cast<int64_t>(spec.tokens.size()), "at must leave one of the ",
                    spec.tokens.size(), " tokens to compute, got ", at);
    SAPWOOD_REQUIRE(at <= parent.planned_len && at <= parent.known(), "at must be within the parent's ",
                    std::min(parent.planned_len, parent.known()), " computed tokens, got ", at);
    const std::vector<int32_t>& keys = spec.keys.empty() ? spec.tokens : spec.keys;
    SAPWOOD_REQUIRE(spec.ns == parent.spec.ns, "a fork must stay in its parent's cache namespace");
    SAPWOOD_REQUIRE(std::equal(keys.begin(), keys.begin() + at, parent.keys().begin()) &&
                        std::equal(spec.tokens.begin(), spec.tokens.begin() + at, parent.spec.tokens.begin()),
                    "tokens must begin with the parent's first ", at, " tokens");
    // What the parent cannot give is matched or computed instead.
    if (at == 0 || at > parent.written() || !parent.lease.valid() || !WindowHolds(parent, at)) {
      return Admit(std::move(spec));
    }
    PendingFork fork;
    Lease lease = cache->Fork(parent.lease, parent.keys(), at, parent.last_step, &fork.copies);
    if (!lease) return {.row = -1, .gen = 0, .cached_len = 0};
    const Admitted admitted = TakeRow(std::move(spec), std::move(lease));
    if (!fork.copies.empty()) {
      if (parent.in_flight > 0) rows[admitted.row].copied_step = parent.last_step;
      fork.ref = {admitted.row, admitted.gen};
      pending_forks.push_back(std::move(fork));
    }
    return admitted;
  }

  void BeginStep(int64_t id) {
    SAPWOOD_REQUIRE(!building, "BeginStep(", id, ") while step ", step_id, " is being built: call EndStep first");
    SAPWOOD_REQUIRE(id > last_launched && id >= 0, "step_id must grow, got ", id, " after ", last_launched);
    building = true;
    step_id = id;
    built = BuiltStep();
  }

  // Bring the executor's copy of the row up to date: its init, and the pages it does not know yet.
  void SyncRow(Row& row) {
    StepPlan& p = *plan;
    const int32_t r = row.spec.init.row;
    if (!row.on_device) {
      row.on_device = true;
      RowInit& init = row.spec.init;
      init.stop_begin = static_cast<int32_t>(p.ints.size());
      init.stop_count = static_cast<int32_t>(row.spec.stop_ids.size());
      p.ints.insert(p.ints.end(), row.spec.stop_ids.begin(), row.spec.stop_ids.end());
      p.row_ops.push_back({.kind = RowOpKind::kInit,
                           .row = r,
                           .gen = row.gen,
                           .begin = static_cast<int32_t>(p.inits.size())});
      p.inits.push_back(init);
    }
    if (int64_t{row.pages_sent} * page_size == row.capacity) return;
    const int32_t num_pages = static_cast<int32_t>(row.capacity / page_size);
    for (int g = 0; g < num_groups; ++g) {
      const auto fresh = row.lease.pages(g).subspan(row.pages_sent);
      p.row_ops.push_back({.kind = RowOpKind::kAppendPages,
                           .row = r,
                           .gen = row.gen,
                           .group = g,
                           .begin = static_cast<int32_t>(p.ints.size()),
                           .count = static_cast<int32_t>(fresh.size())});
      p.ints.insert(p.ints.end(), fresh.begin(), fresh.end());
    }
    row.pages_sent = num_pages;
  }

  bool Reserve(Row& row, int64_t num_tokens) {
    if (num_tokens <= row.capacity) return true;
    if (!cache->Reserve(row.lease, num_tokens)) return false;
    row.capacity = row.lease.capacity();
    return true;
  }

  // Everything the item brings with it, once its pages are reserved.
  void AddItem(Row& row, ItemKind kind, int32_t q_len, int32_t logit_from, int32_t token_begin, int64_t kv_len) {
    SyncRow(row);
    plan->items.push_back({.row = row.spec.init.row,
                           .gen = row.gen,
                           .kind = kind,
                           .q_len = q_len,
                           .logit_from = logit_from,
                           .token_begin = token_begin,
                           .kv_len = kv_len});
    const bool samples = Samples(plan->items.back());
    if (samples && row.spec.masked) plan->mask_rows.push_back(row.spec.init.row);
    row.planned_len += q_len;
    row.last_step = step_id;
    ++row.in_flight;
    row.samples_in_flight += samples;
    built.num_kv += q_len > 0 ? row.planned_len : 0;
    built.num_logit_rows += kind == ItemKind::kResume ? 1 : q_len - logit_from;
  }

  // After the row's pages of this step are committed: the step itself still reads what is given up here.
  void SlideWindow(Row& row) {
    // Where the oldest sample in flight may yet be held, the next query is the one behind the known tokens.
    const int64_t len = row.spec.masked ? std::min(row.planned_len, row.known()) : row.planned_len;
    if (len < row.next_slide) return;
    cache->SlideWindow(row.lease, len, step_id);
    row.next_slide = NextSlide(row);
  }

  int32_t AddDecodes() {
    SAPWOOD_REQUIRE(building, "AddDecodes outside BeginStep..EndStep");
    plan->items.reserve(plan->items.size() + live.size());
    const int32_t before = built.num_decode_rows;
    for (const int32_t r : live) {
      Row& row = rows[r];
      if (row.runs(RowPhase::kHeld) && row.mask_position >= row.known() && !InThisStep(row)) {
        AddItem(row, ItemKind::kResume, 0, 0, 0, -1);
        row.phase = RowPhase::kDecode;
        ++built.num_resume_rows;
      }
      // The token that makes max_len is sampled by the step that writes max_len - 1 tokens.
      if (!row.runs(RowPhase::kDecode) || row.planned_len >= row.max_len - 1 || InThisStep(row)) continue;
      if (!Reserve(row, row.planned_len + 1)) {
        built.blocked.push_back(r);
        continue;
      }
      AddItem(row, ItemKind::kDecode, 1, 0, 0, -1);
      SlideWindow(row);
      ++built.num_decode_rows;
    }
    return built.num_decode_rows - before;
  }

  int32_t AddExtend(int32_t r, int32_t max_tokens) {
    SAPWOOD_REQUIRE(building, "AddExtend outside BeginStep..EndStep");
    Row& row = GetLive(r);
    SAPWOOD_REQUIRE(row.runs(RowPhase::kExtend), "row ", r, " has nothing to extend: it is paused, decoding or done");
    SAPWOOD_REQUIRE(!InThisStep(row), "row ", r, " is in step ", step_id, " already: one item per row");
    SAPWOOD_REQUIRE(max_tokens > 0, "max_tokens must be positive, got ", max_tokens);
    const int64_t begin = row.planned_len;
    int64_t q_len = std::min<int64_t>(max_tokens, row.known() - begin);
    if (!Reserve(row, begin + q_len)) {
      // Take what there is rather than nothing: a chunk more or less changes no token.
      const int64_t room = row.capacity + int64_t{cache->AvailablePages()} * page_size;
      q_len = std::min(q_len, room - begin);
      if (q_len <= 0 || !Reserve(row, begin + q_len)) q_len = 0;
    }
    built.granted.push_back(static_cast<int32_t>(q_len));
    if (q_len == 0) return 0;

    const int32_t n = static_cast<int32_t>(q_len);
    const int64_t end = begin + q_len;
    const bool last = end == row.known();
    const auto token_begin = static_cast<int32_t>(plan->tokens.size());
    plan->tokens.insert(plan->tokens.end(), row.spec.tokens.begin() + begin, row.spec.tokens.begin() + end);
    AddItem(row, ItemKind::kExtend, n, last ? n - 1 : n, token_begin, begin);
    if (last) row.phase = RowPhase::kDecode;
    CommitPages(row, end, step_id);
    SlideWindow(row);
    built.num_extend_tokens += n;
    return n;
  }

  void CommitPages(Row& row, int64_t num_tokens, int64_t ready_step) {
    const int64_t whole = num_tokens / page_size * page_size;
    if (whole <= row.committed_len || !row.lease.valid()) return;
    cache->Commit(row.lease, std::span(row.keys()).first(whole), ready_step);
    row.committed_len = whole;
  }

  BuiltStep EndStep() {
    SAPWOOD_REQUIRE(building, "EndStep without BeginStep");
    building = false;
    std::reverse(built.blocked.begin(), built.blocked.end());  // newest first: the order to retract in
    if (plan->items.empty()) return std::move(built);
    LaunchedStep& step = launched.emplace_back();
    step.step_id = plan->step_id = last_launched = step_id;
    for (PendingFork& fork : pending_forks) {
      if (!Current(fork.ref)) continue;  // released before its copies were sent
      plan->copies.insert(plan->copies.end(), fork.copies.begin(), fork.copies.end());
      Row& row = rows[fork.ref.row];
      if (row.last_step == step_id) continue;
      row.last_step = step_id;
      ++row.in_flight;
      step.forks.push_back(fork.ref);
    }
    pending_forks.clear();
    step.plan = built.plan = std::exchange(plan, std::make_shared<StepPlan>());
    return std::move(built);
  }

  static void EndRow(Row& row, bool worthless) {
    row.phase = RowPhase::kDone;
    row.paused = false;
    row.worthless |= worthless;
  }

  Committed Commit(const StepResult& result) {
    SAPWOOD_REQUIRE(!launched.empty() && launched.front().step_id == result.step_id,
                    "results must come in launch order: expected step ",
                    launched.empty() ? kNoStep : launched.front().step_id, ", got ", result.step_id);
    const LaunchedStep& step = launched.front();
    const std::vector<PlanItem>& items = step.plan->items;
    const bool failed = !result.error.empty();
    if (!failed) CheckResult(result, items);
    Committed out;
    if (!failed) {
      out.rows.reserve(items.size());
      out.tokens.reserve(items.size());
      out.flags.reserve(items.size());
      out.logprobs.reserve(items.size());
    }
    for (size_t i = 0; i < items.size(); ++i) {
      Row& row = rows[items[i].row];
      if (row.gen != items[i].gen) continue;
      --row.in_flight;
      const bool skips = Samples(items[i]) && row.skips_in_flight > 0;
      row.skips_in_flight -= skips;
      row.samples_in_flight -= Samples(items[i]) && !skips;
      if (failed || !row.lease.valid()) {
        // A row that shares pages of a failed step sampled from garbage: its token is not one.
        EndRow(row, true);
      } else if (!row.worthless) {
        CommitItem(row, items[i], skips, result, result.items[i], &out);
      }
    }
    for (const RowRef ref : step.forks) {
      if (!Current(ref)) continue;
      --rows[ref.row].in_flight;
      if (failed) EndRow(rows[ref.row], true);
    }
    launched.pop_front();
    if (failed) FailSince(result.step_id);
    cache->Retire(result.step_id);
    return out;
  }

  // Nobody may build on what the failed step, and those launched on top of it, were to compute.
  void FailSince(int64_t step) {
    cache->InvalidateSince(step);
    for (const int32_t r : live) {
      if (rows[r].copied_step >= step) EndRow(rows[r], true);
    }
  }

  static void CheckResult(const StepResult& result, const std::vector<PlanItem>& items) {
    SAPWOOD_REQUIRE(result.items.size() == items.size(), "step ", result.step_id, " has ", items.size(),
                    " items, its result ", result.items.size());
    for (size_t i = 0; i < items.size(); ++i) {
      const ResultItem& item = result.items[i];
      SAPWOOD_REQUIRE(item.row == items[i].row && item.gen == items[i].gen, "item ", i, " of step ", result.step_id,
                      " is row ", items[i].row, " generation ", items[i].gen, ", its result says ", item.row, ", ",
                      item.gen);
      SAPWOOD_REQUIRE(item.n == 0 || (item.n > 0 && item.token_begin >= 0 &&
                                      int64_t{item.token_begin} + item.n <= static_cast<int64_t>(result.tokens.size())),
                      "item ", i, " of step ", result.step_id, " claims tokens [", item.token_begin, ", +", item.n,
                      ") of ", result.tokens.size());
    }
  }

  // skips: the item was launched on top of one that came back held.
  static void CommitItem(Row& row, const PlanItem& planned, bool skips, const StepResult& result,
                         const ResultItem& item, Committed* out) {
    const int32_t r = item.row;
    if (skips) {
      SAPWOOD_CHECK(item.flags == (kSkipped | kHeld), "row ", r, " was held but step ", result.step_id, " computed it");
      return;
    }
    if (item.flags & kSkipped) {
      SAPWOOD_CHECK(row.phase == RowPhase::kDone, "row ", r, " was skipped by step ", result.step_id,
                    " but has not ended");
      return;
    }
    SAPWOOD_CHECK(row.phase != RowPhase::kDone, "row ", r, " has ended but step ", result.step_id, " computed it");
    const auto push = [&](int32_t token, float logprob) {
      out->rows.push_back(r);
      out->tokens.push_back(token);
      out->flags.push_back(0);
      out->logprobs.push_back(logprob);
    };
    const bool bad = item.flags & kBadLogits;
    const bool samples = Samples(planned);
    if (item.flags & kHeld) {
      SAPWOOD_CHECK(row.spec.masked && samples && item.n == 0, "row ", r, " was held by step ", result.step_id,
                    ": no mask was asked for");
      row.phase = RowPhase::kHeld;
      // Decode items all of them, a token each.
      row.planned_len -= row.samples_in_flight;
      row.skips_in_flight += std::exchange(row.samples_in_flight, 0);
      push(-1, std::nanf(""));
      out->flags.back() = item.flags;
      return;
    }
    SAPWOOD_CHECK(bad || (item.n > 0) == samples, "row ", r, " was to sample ", samples, " tokens in step ",
                  result.step_id, ", got ", item.n);
    if (item.n == 0 || bad) {
      push(-1, std::nanf(""));
    } else {
      for (int32_t i = item.token_begin; i < item.token_begin + item.n; ++i) {
        row.spec.tokens.push_back(result.tokens[i]);
        if (!row.spec.keys.empty()) row.spec.keys.push_back(result.tokens[i]);
        const bool has_logprob = static_cast<size_t>(i) < result.logprobs.size();
        push(result.tokens[i], has_logprob ? result.logprobs[i] : std::nanf(""));
      }
    }
    out->flags.back() = item.flags;
    if (item.flags & (kFinishedStop | kFinishedLength | kBadLogits)) {
      EndRow(row, bad);
    }
  }

  void Release(int32_t r, bool keep, bool failed) {
    Row& row = GetLive(r);
    SAPWOOD_REQUIRE(!InThisStep(row), "row ", r, " is in step ", step_id, ", which is being built: call EndStep first");
    const int64_t last_step = row.in_flight > 0 ? row.last_step : kNoStep;
    if (failed || row.worthless || !row.lease.valid()) {
      cache->Invalidate(std::move(row.lease), last_step);
    } else {
      if (keep) CommitPages(row, row.written(), row.last_step);
      cache->Release(std::move(row.lease), last_step);
    }
    if (row.on_device) plan->row_ops.push_back({.kind = RowOpKind::kFree, .row = r, .gen = row.gen});
    live.erase(std::find(live.begin(), live.end(), r));
    row = Row();
    free_rows.push_back(r);
  }

  int64_t PendingPrefix(uint64_t ns, std::span<const int32_t> keys) const {
    if (cache->config().kind == CacheKind::kNone || keys.empty()) return 0;
    const int64_t most = (static_cast<int64_t>(keys.size()) - 1) / page_size * page_size;
    int64_t best = 0;
    for (const int32_t r : live) {
      const Row& row = rows[r];
      if (!row.runs(RowPhase::kExtend) || row.spec.ns != ns || !row.lease.valid()) continue;
      const std::vector<int32_t>& theirs = row.keys();
      const int64_t n = std::min<int64_t>(most, row.known());
      if (n <= best) continue;
      const auto differ = std::mismatch(keys.begin(), keys.begin() + n, theirs.begin());
      const int64_t shared = (differ.first - keys.begin()) / page_size * page_size;
      if (shared > row.planned_len) best = std::max(best, shared);
    }
    if (best == 0) return 0;
    return std::max<int64_t>(0, best - cache->Match(ns, keys));
  }

  void CheckInvariants() const;
  void CheckRow(const Row& row, int32_t r) const;
};

void BatchBuilder::Impl::CheckRow(const Row& row, int32_t r) const {
  SAPWOOD_CHECK(row.gen != 0 && row.gen <= last_gen, "row ", r, " generation ", row.gen);
  SAPWOOD_CHECK(row.spec.init.row == r && row.spec.init.gen == row.gen, "row ", r, " init names another");
  SAPWOOD_CHECK(static_cast<bool>(row.lease), "live row ", r, " has no lease");
  SAPWOOD_CHECK(row.spec.keys.empty() || row.spec.keys.size() == row.spec.tokens.size(), "row ", r, " keys");
  SAPWOOD_CHECK(row.capacity == row.lease.capacity(), "row ", r, " capacity ", row.capacity, ", lease ",
                row.lease.capacity());
  for (int g = 0; g < num_groups; ++g) {
    SAPWOOD_CHECK(static_cast<int64_t>(row.lease.pages(g).size()) * page_size == row.capacity, "row ", r,
                  " has page tables of different lengths");
  }
  SAPWOOD_CHECK(row.planned_len <= row.capacity, "row ", r, " planned ", row.planned_len, " of ", row.capacity);
  SAPWOOD_CHECK(int64_t{row.pages_sent} * page_size <= row.capacity, "row ", r, " sent more pages than it has");
  SAPWOOD_CHECK(row.committed_len <= std::max(row.planned_len, row.cached_len), "row ", r, " committed ",
                row.committed_len, " of ", row.planned_len);
  SAPWOOD_CHECK(row.on_device || (row.planned_len == row.cached_len && row.samples_in_flight == 0), "row ", r,
                " was planned without an init");
  SAPWOOD_CHECK(row.known() <= row.max_len, "row ", r, " has ", row.known(), " tokens of ", row.max_len);
  SAPWOOD_CHECK(!row.paused || row.phase != RowPhase::kDone, "row ", r, " paused");
  SAPWOOD_CHECK(row.spec.masked || row.skips_in_flight == 0, "row ", r, " was held: no mask was asked for");
  if (row.phase == RowPhase::kExtend) {
    SAPWOOD_CHECK(row.planned_len < row.known(), "row ", r, " has no token left to extend");
    SAPWOOD_CHECK(row.samples_in_flight == 0, "row ", r, " samples while it extends");
  } else if (row.phase == RowPhase::kDecode) {
    SAPWOOD_CHECK(row.planned_len == row.known() - 1 + row.samples_in_flight, "row ", r, " planned ", row.planned_len,
                  ", known ", row.known(), ", samples in flight ", row.samples_in_flight);
    SAPWOOD_CHECK(row.planned_len < row.max_len, "row ", r, " planned past max_len");
  } else if (row.phase == RowPhase::kHeld) {
    SAPWOOD_CHECK(row.spec.masked && row.planned_len == row.known() && row.samples_in_flight == 0, "held row ", r,
                  " planned ", row.planned_len, ", known ", row.known(), ", samples in flight ",
                  row.samples_in_flight);
  }
}

void BatchBuilder::Impl::CheckInvariants() const {
  SAPWOOD_CHECK(live.size() + free_rows.size() == rows.size(), live.size(), " live + ", free_rows.size(), " free of ",
                rows.size());
  std::vector<int32_t> named(rows.size(), 0), sampled(rows.size(), 0);
  const auto count = [&](int32_t r, uint32_t gen) {
    if (rows[r].gen == gen) ++named[r];
  };
  const auto count_item = [&](const PlanItem& item) {
    count(item.row, item.gen);
    if (rows[item.row].gen == item.gen) sampled[item.row] += Samples(item);
  };
  int64_t before = kNoStep;
  for (const LaunchedStep& step : launched) {
    SAPWOOD_CHECK(step.step_id > before, "launched steps out of order");
    before = step.step_id;
    for (const PlanItem& item : step.plan->items) count_item(item);
    for (const RowRef ref : step.forks) count(ref.row, ref.gen);
  }
  for (const PlanItem& item : plan->items) count_item(item);
  int64_t order = -1;
  for (const int32_t r : live) {
    const Row& row = rows[r];
    SAPWOOD_CHECK(row.phase != RowPhase::kFree, "row ", r, " is listed as live but free");
    SAPWOOD_CHECK(row.order > order, "row ", r, " out of admission order");
    order = row.order;
    SAPWOOD_CHECK(row.in_flight == named[r], "row ", r, " says ", row.in_flight, " steps in flight, ", named[r],
                  " name it");
    SAPWOOD_CHECK(row.samples_in_flight >= 0 && row.skips_in_flight >= 0 &&
                      row.samples_in_flight + row.skips_in_flight == sampled[r],
                  "row ", r, " says ", row.samples_in_flight, " samples and ", row.skips_in_flight, " skips in flight, ",
                  sampled[r], " items sample it");
    CheckRow(row, r);
  }
  for (const int32_t r : free_rows) {
    SAPWOOD_CHECK(rows[r].phase == RowPhase::kFree && rows[r].gen == 0 && !rows[r].lease, "row ", r, " is not free");
  }
  SAPWOOD_CHECK(building || plan->items.empty(), "items outside a step");
}

BatchBuilder::BatchBuilder(CacheManager* cache, int32_t max_rows) : impl_(std::make_unique<Impl>(cache, max_rows)) {}
BatchBuilder::~BatchBuilder() = default;

int32_t BatchBuilder::num_free_rows() const { return static_cast<int32_t>(impl_->free_rows.size()); }
Admitted BatchBuilder::Admit(RowSpec spec) { return impl_->Admit(std::move(spec)); }
Admitted BatchBuilder::AdmitFork(int32_t parent, int64_t at, RowSpec spec) {
  return impl_->AdmitFork(parent, at, std::move(spec));
}

BuiltStep BatchBuilder::Build(int64_t step_id, std::span<const std::pair<int32_t, int32_t>> extends,
                              bool include_decodes) {
  BeginStep(step_id);
  // Running rows take their pages first: a prompt can wait a step, a decode row would have to be retracted.
  if (include_decodes) AddDecodes();
  for (const auto& [row, max_tokens] : extends) AddExtend(row, max_tokens);
  return EndStep();
}

void BatchBuilder::BeginStep(int64_t step_id) { impl_->BeginStep(step_id); }
int32_t BatchBuilder::AddDecodes() { return impl_->AddDecodes(); }
int32_t BatchBuilder::AddExtend(int32_t row, int32_t max_tokens) { return impl_->AddExtend(row, max_tokens); }
BuiltStep BatchBuilder::EndStep() { return impl_->EndStep(); }
Committed BatchBuilder::Commit(const StepResult& result) { return impl_->Commit(result); }

void BatchBuilder::MaskPosted(int32_t row, int64_t position) {
  Row& r = impl_->GetLive(row);
  SAPWOOD_REQUIRE(r.spec.masked, "row ", row, " draws without masks: admit it with masked = true");
  r.mask_position = std::max(r.mask_position, position);
}
void BatchBuilder::Pause(int32_t row) {
  Row& r = impl_->GetLive(row);
  r.paused = r.phase != RowPhase::kDone;
}
void BatchBuilder::Resume(int32_t row) { impl_->GetLive(row).paused = false; }
void BatchBuilder::Release(int32_t row, bool keep, bool failed) { impl_->Release(row, keep, failed); }
int64_t BatchBuilder::PendingPrefix(uint64_t ns, std::span<const int32_t> keys) const {
  return impl_->PendingPrefix(ns, keys);
}

RowPhase BatchBuilder::phase(int32_t row) const {
  const Row& r = impl_->Get(row);
  return r.paused ? RowPhase::kPaused : r.phase;
}
uint32_t BatchBuilder::gen(int32_t row) const { return impl_->Get(row).gen; }
int64_t BatchBuilder::num_tokens(int32_t row) const { return impl_->GetLive(row).known(); }
std::vector<int32_t> BatchBuilder::tokens(int32_t row) const { return impl_->GetLive(row).spec.tokens; }
int64_t BatchBuilder::planned_len(int32_t row) const { return impl_->GetLive(row).planned_len; }
int64_t BatchBuilder::cached_len(int32_t row) const { return impl_->GetLive(row).cached_len; }
int32_t BatchBuilder::in_flight(int32_t row) const { return impl_->GetLive(row).in_flight; }
bool BatchBuilder::valid(int32_t row) const { return impl_->GetLive(row).lease.valid(); }
std::vector<PageId> BatchBuilder::pages(int32_t row, int group) const {
  SAPWOOD_REQUIRE(group >= 0 && group < impl_->num_groups, "group must be 0..", impl_->num_groups - 1, ", got ", group);
  const auto pages = impl_->GetLive(row).lease.pages(group);
  return {pages.begin(), pages.end()};
}
void BatchBuilder::CheckInvariants() const { impl_->CheckInvariants(); }

}  // namespace sapwood
