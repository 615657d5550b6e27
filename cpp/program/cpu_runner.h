// The native CPU executor of a Program: one call per step, no Python, no GIL.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "program/program.h"
#include "program/runner.h"
#include "program/thread_pool.h"
#include "program/weight_store.h"

namespace sapwood {

struct CpuRunnerConfig {
  std::vector<KvGroup> groups;        // page_size 16, 32 or 64
  std::vector<int32_t> num_pages;
  int32_t num_kv_heads = 0, head_dim = 0;
  bool int8_kv = false;               // pages hold int8 with a scale per token and head; false: the program's act
  int32_t max_step_tokens = 2048;     // T is at most this
  int32_t num_threads = 0;            // 0 = UsableCpus()
  int32_t nice = 0;
  Isa isa = Isa::kScalar;
  bool debug = false;                 // no arena reuse, canaries between values, NaN poison before each step
};

// One kept row of logits (tests, debugging).
struct LogitTap {
  int64_t step_id;
  int32_t row;
  uint32_t gen;
  int64_t position;            // absolute position of the token these logits predict
  std::vector<float> logits;
};

struct NodeTime {
  std::string name;
  int64_t calls, total_ns;
};

class CpuRunner : public Runner {
 public:
  // weights is shared: every slot the program names must be filled. A slot may be filled anew between steps; its shape is
  // checked again by each. Throws InvalidArgument naming the node that does not fit.
  CpuRunner(Program program, std::shared_ptr<WeightStore> weights, CpuRunnerConfig config);
  ~CpuRunner() override;

  void CopyPages(std::span<const PageCopy> copies) override;
  void Forward(const StepBatch& batch, const RowTable& rows) override;
  void Head(const StepBatch& batch, const RowTable& rows, std::span<SampledToken> out) override;
  int32_t vocab_size() const override;

  size_t kv_bytes() const;
  ThreadPool& pool();

  // Debugging. Call only while no step runs.
  void TapLogits(bool on);
  std::vector<LogitTap> TakeLogits();
  // K and V of one token of one layer in canonical order: [2][num_kv_heads][head_dim] of the act dtype; of int8 pages
  // f32, what whole numbers and scales mean.
  std::vector<uint8_t> ReadKv(int32_t group, int32_t layer_in_group, PageId page, int32_t offset) const;
  void PoisonKv();                                // fill the whole pool with NaN
  void StopAfter(const std::string& node);        // "" = off: later nodes do not run, tokens are meaningless
  // The value's bytes after the last step, rows actually used: by the name of the node that wrote it.
  std::vector<uint8_t> Dump(const std::string& node) const;
  void TimeNodes(bool on);
  std::vector<NodeTime> NodeTimes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sapwood
