// The executor: one thread that takes StepPlans in order, runs them, and reports through an eventfd.
//
// Two reports a step, in this order, whatever happens in it: kHead when the LM head starts (the loop may now plan the
// next step late, with what has just arrived), kResult when the tokens are there. Nothing polls: with no plan queued
// every thread sleeps. One Submit is all a step costs the caller; no Python runs and no GIL is needed until its result.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "batch/plan.h"
#include "program/runner.h"

namespace sapwood {

struct ExecutorEvent {
  enum class Kind : uint8_t { kHead, kResult } kind;
  int64_t step_id;
  StepResult result;  // kResult only
};

// When each submitted step was handed over, began, reached the head and was done (CLOCK_MONOTONIC ns), and how many
// runner calls it took (the claim "one native call a step" is num_calls == 1 from the loop's view).
struct StepTrace {
  int64_t step_id, submit_ns, start_ns, head_ns, done_ns;
  int32_t num_extend_items, num_decode_items;
};

struct ExecutorConfig {
  std::vector<KvGroup> groups;
  int32_t max_rows = 256;
  int32_t trace_capacity = 0;      // ring of StepTrace, 0 = off
  int32_t recorder_capacity = 0;   // flight recorder: ring of serialized StepPlans, 0 = off
  int32_t nice = 0;                // scheduling niceness of the executor's thread, so that the event loop preempts it
};

class Executor {
 public:
  Executor(std::unique_ptr<Runner> runner, ExecutorConfig config);
  ~Executor();  // waits for the running step, drops queued ones

  // Queue a step. Steps run strictly in order. Throws InvalidArgument unless step_id grows.
  void Submit(std::shared_ptr<const StepPlan> plan);
  // The mask of a token that a plan's mask_rows ask for, at its absolute position: ceil(vocab / 32) words, bit i % 32 of
  // word i / 32 set: token i may be drawn. From any thread, at any time: before its step is submitted, or when the row has
  // come back held, to be resumed by a later step. Masks of rows that have ended are ignored. Throws as MaskTable::Post.
  void PostMask(int32_t row, uint32_t gen, int64_t position, std::span<const uint32_t> bits);
  // Events since the last call; also clears the eventfd. Never blocks.
  std::vector<ExecutorEvent> Drain();
  // Readable while events wait. Owned by the executor.
  int fd() const;
  // Block until every submitted step is done (tests, sync use).
  void WaitIdle();
  void Shutdown();

  std::vector<StepTrace> TakeTrace();
  std::vector<std::vector<uint8_t>> RecordedPlans() const;  // oldest first
  int32_t queued() const;  // submitted, not done
  Runner& runner();        // only while idle

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sapwood
