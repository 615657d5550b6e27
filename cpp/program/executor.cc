// One thread that runs StepPlans. Receives them from the step loop through Submit (bindings/), hands each to the
// RowTable (batch/) and the Runner (cpu_runner.cc), and the StepResult back through the CompletionQueue.
#include "program/executor.h"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>
#include <utility>

#include "base/check.h"
#include "program/completion.h"
#include "program/sample_rows.h"

namespace sapwood {
namespace {

int64_t NowNs() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return int64_t{ts.tv_sec} * 1'000'000'000 + ts.tv_nsec;
}

}  // namespace

struct Executor::Impl {
  struct Queued {
    std::shared_ptr<const StepPlan> plan;
    int64_t submit_ns;
  };

  ExecutorConfig config;
  std::unique_ptr<Runner> runner;
  CompletionQueue completion;

  // Shared with the callers, under mutex.
  mutable std::mutex mutex;
  std::condition_variable work;  // a plan came, or stop
  std::condition_variable idle;  // num_pending became 0
  std::deque<Queued> queue;
  int32_t num_pending = 0;  // submitted, not done
  int64_t last_submitted = std::numeric_limits<int64_t>::min();
  bool stop = false;
  std::deque<StepTrace> traces;
  std::deque<std::vector<uint8_t>> recorded;

  // The executor thread's own, but for the masks in `rows`.
  RowTable rows;
  StepBatch batch;
  std::vector<SampledToken> sampled;

  std::thread thread;
  const pid_t pid = getpid();  // a forked child has this object, but not its thread

  Impl(std::unique_ptr<Runner> r, ExecutorConfig c)
      : config(std::move(c)),
        runner(std::move(r)),
        rows(config.groups, config.max_rows, runner->vocab_size()) {}

  void Loop() {
    pthread_setname_np(pthread_self(), "sapwood-exec");  // top, perf and bench/server_cpu.py tell threads by name
    if (config.nice != 0) setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), config.nice);
    std::unique_lock lock(mutex);
    for (;;) {
      work.wait(lock, [&] { return stop || !queue.empty(); });
      if (stop) return;
      Queued queued = std::move(queue.front());
      queue.pop_front();
      lock.unlock();
      RunStep(*queued.plan, queued.submit_ns);
      // Freed here rather than by the loop: a long prompt's plan is large.
      queued.plan.reset();
      lock.lock();
      if (--num_pending == 0) idle.notify_all();
    }
  }

  // Never throws: whatever goes wrong belongs to this step alone.
  void RunStep(const StepPlan& plan, int64_t submit_ns) {
    StepResult result;
    result.step_id = plan.step_id;
    result.start_ns = NowNs();
    bool head_posted = false;
    const auto post_head = [&] {
      result.head_ns = NowNs();
      head_posted = true;
      completion.Post({ExecutorEvent::Kind::kHead, plan.step_id, {}});
    };
    try {
      if (config.recorder_capacity > 0) Record(plan);  // before it runs: the plan that breaks us is the one wanted
      rows.ApplyRowOps(plan);
      if (!plan.copies.empty()) runner->CopyPages(plan.copies);
      rows.Prepare(plan, &batch);
      if (batch.num_tokens > 0) runner->Forward(batch, rows);
      post_head();
      sampled.assign(batch.logit_src.size(), SampledToken{});
      if (!sampled.empty()) runner->Head(batch, rows, sampled);
      const int64_t start_ns = result.start_ns, head_ns = result.head_ns;
      result = FinishStep(plan, batch, sampled, &rows);
      result.start_ns = start_ns;
      result.head_ns = head_ns;
    } catch (const std::exception& e) {
      Fail(plan, e.what(), &result);
    } catch (...) {
      Fail(plan, "unknown exception", &result);
    }
    if (!head_posted) post_head();  // the loop counts on two reports a step
    result.done_ns = NowNs();
    if (config.trace_capacity > 0) Trace(plan, submit_ns, result);
    completion.Post({ExecutorEvent::Kind::kResult, plan.step_id, std::move(result)});
  }

  // The step's rows hold KV that may be half written: none of them may run again before its next kInit.
  void Fail(const StepPlan& plan, const char* what, StepResult* result) {
    const auto kill = [this](int32_t row, uint32_t gen) {
      if (row < 0 || row >= rows.max_rows()) return;
      const RowState& state = rows.row(row);
      if (state.gen == gen && state.alive) rows.CommitSample(row, SampledToken{0, 0.0f, true});
    };
    for (const PlanItem& item : plan.items) kill(item.row, item.gen);
    for (const RowOp& op : plan.row_ops) kill(op.row, op.gen);
    result->items.clear();
    result->tokens.clear();
    result->logprobs.clear();
    result->num_tokens = result->num_kv = result->num_logit_rows = 0;
    result->error = what != nullptr && *what != '\0' ? what : "exception without a message";
  }

  void Record(const StepPlan& plan) {
    std::vector<uint8_t> bytes = plan.Serialize();
    const std::lock_guard lock(mutex);
    if (recorded.size() >= static_cast<size_t>(config.recorder_capacity)) recorded.pop_front();
    recorded.push_back(std::move(bytes));
  }

  void Trace(const StepPlan& plan, int64_t submit_ns, const StepResult& result) {
    StepTrace trace{plan.step_id, submit_ns, result.start_ns, result.head_ns, result.done_ns, 0, 0};
    for (const PlanItem& item : plan.items) {
      if (item.kind == ItemKind::kExtend) ++trace.num_extend_items;
      if (item.kind == ItemKind::kDecode) ++trace.num_decode_items;
    }
    const std::lock_guard lock(mutex);
    if (traces.size() >= static_cast<size_t>(config.trace_capacity)) traces.pop_front();
    traces.push_back(trace);
  }
};

Executor::Executor(std::unique_ptr<Runner> runner, ExecutorConfig config) {
  SAPWOOD_REQUIRE(runner != nullptr, "runner must not be null");
  SAPWOOD_REQUIRE(config.max_rows > 0, "max_rows must be positive, got ", config.max_rows);
  SAPWOOD_REQUIRE(config.trace_capacity >= 0 && config.recorder_capacity >= 0,
                  "trace_capacity and recorder_capacity must be >= 0, got ", config.trace_capacity, " and ",
                  config.recorder_capacity);
  impl_ = std::make_unique<Impl>(std::move(runner), std::move(config));
  impl_->thread = std::thread([impl = impl_.get()] { impl->Loop(); });
}

Executor::~Executor() {
  Shutdown();
  // In a forked child the lock may be held, and memory written, by a thread that is not there: leave it all alone.
  if (getpid() != impl_->pid) static_cast<void>(impl_.release());
}

void Executor::Submit(std::shared_ptr<const StepPlan> plan) {
  SAPWOOD_REQUIRE(plan != nullptr, "plan must not be null");
  const int64_t now = NowNs();
  {
    const std::lock_guard lock(impl_->mutex);
    SAPWOOD_REQUIRE(!impl_->stop, "the executor has been shut down; step ", plan->step_id, " was not taken");
    SAPWOOD_REQUIRE(plan->step_id > impl_->last_submitted, "step_id must grow, got ", plan->step_id, " after ",
                    impl_->last_submitted);
    impl_->last_submitted = plan->step_id;
    impl_->queue.push_back({std::move(plan), now});
    ++impl_->num_pending;
  }
  impl_->work.notify_one();
}

void Executor::PostMask(int32_t row, uint32_t gen, int64_t position, std::span<const uint32_t> bits) {
  impl_->rows.PostMask(row, gen, position, bits);
}

std::vector<ExecutorEvent> Executor::Drain() { return impl_->completion.Drain(); }

int Executor::fd() const { return impl_->completion.fd(); }

void Executor::WaitIdle() {
  std::unique_lock lock(impl_->mutex);
  impl_->idle.wait(lock, [&] { return impl_->num_pending == 0; });
}

void Executor::Shutdown() {
  if (getpid() != impl_->pid) {
    if (impl_->thread.joinable()) impl_->thread.detach();
    return;
  }
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->stop = true;
    impl_->num_pending -= static_cast<int32_t>(impl_->queue.size());
    impl_->queue.clear();
    if (impl_->num_pending == 0) impl_->idle.notify_all();
  }
  impl_->work.notify_all();
  if (impl_->thread.joinable()) impl_->thread.join();
}

std::vector<StepTrace> Executor::TakeTrace() {
  const std::lock_guard lock(impl_->mutex);
  std::vector<StepTrace> out(impl_->traces.begin(), impl_->traces.end());
  impl_->traces.clear();
  return out;
}

std::vector<std::vector<uint8_t>> Executor::RecordedPlans() const {
  const std::lock_guard lock(impl_->mutex);
  return {impl_->recorded.begin(), impl_->recorded.end()};
}

int32_t Executor::queued() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->num_pending;
}

Runner& Executor::runner() { return *impl_->runner; }

}  // namespace sapwood
