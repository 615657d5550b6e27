// Weight slots: what nodes name. A slot is filled once, straight from the mapped checkpoint file, packed
// into huge-page memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/huge_buffer.h"
#include "kernels/kernels.h"
#include "program/thread_pool.h"

namespace sapwood {

enum class SlotKind : uint8_t {
  kLinear,  // packed panels in the slot's format
  kGateUp,  // packed panels, 32 gate + 32 up rows in each; parts are [gate rows..., up rows...] of I each
  kTable,   // row-major [rows][cols] in the act dtype (embedding)
  kVector,  // f32 [n] (norm weights, biases); rows = n, cols = 1, whatever the parts' shapes
  kF32,     // f32 row-major [rows][cols] as given (rope tables)
};

// A run of source rows: row-major [rows][cols] of dtype src at data, `stride` elements between rows. data == null:
// pseudo-random rows (load-format dummy), keyed by (slot, row, column), uniform in +-dummy_scale.
struct SlotPart {
  const void* data;
  DType src;
  int64_t rows, cols, stride;
};

struct WeightSlot {
  SlotKind kind;
  WeightFormat format = WeightFormat::kAct;  // of kLinear and kGateUp
  int64_t rows = 0, cols = 0;                // linear: N, K; gate_up: I, K
  void* data = nullptr;
  size_t bytes = 0;
  bool filled = false;
};

class WeightStore {
 public:
  // isa: whose kernels quantise. Weights may differ in their last bit between levels, as everything may.
  WeightStore(DType act, int32_t num_slots, Isa isa = BestIsa());
  ~WeightStore();

  // Fill a slot from parts stacked along rows, in `format` (kLinear and kGateUp only). Packs in parallel on pool (may be null). Throws InvalidArgument on
  // shapes that do not add up, naming slot and shapes. Filling twice replaces (a reload): in place when kind and shape
  // are as before, so that aliases of the slot follow. Filling a slot that is an alias ends the sharing. Not while a
  // step runs.
  void Fill(int32_t slot, SlotKind kind, const std::vector<SlotPart>& parts, ThreadPool* pool,
            float dummy_scale = 0.0f, WeightFormat format = WeightFormat::kAct);
  // A slot that shares another's memory. Throws InvalidArgument unless `of` is filled.
  void Alias(int32_t slot, int32_t of);
  const WeightSlot& slot(int32_t i) const { return slots_[i]; }
  int32_t size() const { return static_cast<int32_t>(slots_.size()); }
  DType act() const { return act_; }
  size_t total_bytes() const;  // shared memory counts once

 private:
  DType act_;
  const KernelTable* kernels_;
  std::vector<WeightSlot> slots_;
  std::vector<std::shared_ptr<HugeBuffer>> memory_;  // [slot]
  std::vector<uint8_t> is_alias_;                    // [slot]
};

}  // namespace sapwood
