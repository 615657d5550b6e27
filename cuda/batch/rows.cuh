// What happens to one row, and where in a step something lies: the arithmetic of cpp/batch/row_table.cc on the device's
// structs, one thread's work each.
#pragma once

#include <cstdint>

#include "batch/params.h"
#include "common/check.cuh"
#include "common/launch.cuh"

namespace sapwood_cuda {

constexpr int kMaxRows = 16383;  // and one segment of padding: attention_plan takes 16384

// The numbers of cpp/batch/plan.h: ResultFlags.
enum : int32_t { kFinishedStop = 1, kFinishedLength = 2, kHeld = 4, kBadLogits = 8, kSkipped = 16 };

// An array of the blob, by the byte offset that its header gives.
template <typename T>
__host__ __device__ inline const T* Array(const SapwoodPlanBlob* blob, int32_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(blob) + offset);
}

__host__ __device__ inline SapwoodStepResultItem* ResultItems(SapwoodStepResultBlock* result) {
  return reinterpret_cast<SapwoodStepResultItem*>(result + 1);
}

__host__ __device__ inline const int32_t* PageTable(const SapwoodRowState& state, int group, int row) {
  return state.page_tables[group] + static_cast<int64_t>(row) * state.max_pages;
}
__host__ __device__ inline int32_t* MutablePageTable(const SapwoodRowState& state, int group, int row) {
  return state.page_tables[group] + static_cast<int64_t>(row) * state.max_pages;
}

// The last i < count with indptr[i] <= at, for indptr[0] <= at < indptr[count]: the one range that contains `at`, empty
// ones skipped.
__host__ __device__ inline int RangeOf(const int32_t* indptr, int count, int at) {
  int low = 0, high = count;  // indptr[low] <= at < indptr[high]
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (indptr[middle] <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The row begins anew, without pages. Its stop ids are copied elsewhere.
__host__ __device__ inline void InitRow(const SapwoodPlanInit& init, uint32_t gen, SapwoodRow* row) {
  row->seed = init.seed;
  row->kv_len = init.kv_len;
  row->max_len = init.max_len;
  row->min_len = init.min_len;
  row->gen = gen;
  row->stream = init.stream;
  row->last_token = 0;
  row->alive = 1;
  row->top_k = init.top_k;
  row->temperature = init.temperature;
  row->top_p = init.top_p;
  row->min_p = init.min_p;
  row->rope_mode = init.rope_mode;
  row->return_logprob = init.return_logprob;
  row->num_stop_ids = init.stop_count;
  row->held = 0;
  for (int32_t& num_pages : row->num_pages) num_pages = 0;
}

// A token was drawn for a live row, after its kv_len advanced. Returns result flags.
__host__ __device__ inline int32_t TakeToken(SapwoodRow* row, const int32_t* stop_ids, int32_t token, bool bad) {
  row->held = 0;
  if (bad) {
    row->alive = 0;
    return kBadLogits;
  }
  row->last_token = token;
  // kv_len tokens existed before this one, whose absolute position is kv_len.
  int32_t flags = 0;
  if (row->kv_len >= row->min_len) {
    for (int i = 0; i < row->num_stop_ids; ++i) {
      if (stop_ids[i] == token) flags = kFinishedStop;
    }
  }
  if (flags == 0 && row->kv_len + 1 >= row->max_len) flags = kFinishedLength;
  if (flags != 0) row->alive = 0;
  return flags;
}

__host__ __device__ inline void EndRow(const SapwoodRowState& state, int32_t row, uint32_t gen) {
  if (state.rows[row].gen == gen) state.rows[row].alive = 0;
}

// Where and why a step has failed, of one thread; the first one of all is reported.
struct StepError {
  int at = INT32_MAX;  // row ops and items each in their order; INT32_MAX: no error
  int32_t code = SAPWOOD_STEP_OK, index = 0, group = 0;
  int64_t value = 0;

  __device__ void Note(int where, int32_t code_, int32_t index_, int32_t group_, int64_t value_) {
    if (where >= at) return;
    at = where, code = code_, index = index_, group = group_, value = value_;
  }
  __device__ void Report(SapwoodStepResultBlock* result) const {
    result->error = code;
    result->error_index = index;
    result->error_group = group;
    result->error_value = value;
  }
};

// Host code: the part of a launcher's arguments that all three share.
inline int CheckRowState(const char* op, const SapwoodRowState& s, const void* blob, const void* result) {
  SAPWOOD_CUDA_REQUIRE(s.num_groups >= 1 && s.num_groups <= SAPWOOD_CUDA_MAX_GROUPS,
                       "%s: state.num_groups must be in 1..%d, got %d", op, SAPWOOD_CUDA_MAX_GROUPS, s.num_groups);
  SAPWOOD_CUDA_REQUIRE(s.max_rows >= 1 && s.max_rows <= kMaxRows, "%s: state.max_rows must be in 1..%d, got %d", op,
                       kMaxRows, s.max_rows);
  SAPWOOD_CUDA_REQUIRE(s.page_size >= 1, "%s: state.page_size must be positive, got %d", op, s.page_size);
  SAPWOOD_CUDA_REQUIRE(s.max_pages >= 1 && static_cast<int64_t>(s.max_pages) * s.page_size <= INT32_MAX,
                       "%s: state.max_pages must be positive and max_pages * page_size (%d) below 2^31, got %d", op,
                       s.page_size, s.max_pages);
  SAPWOOD_CUDA_REQUIRE(s.max_stop_ids >= 0, "%s: state.max_stop_ids must not be negative, got %d", op, s.max_stop_ids);
  SAPWOOD_CUDA_REQUIRE(s.rows != nullptr && (s.stop_ids != nullptr || s.max_stop_ids == 0),
                       "%s: state.rows and state.stop_ids must not be null", op);
  for (int group = 0; group < s.num_groups; ++group) {
    SAPWOOD_CUDA_REQUIRE(s.page_tables[group] != nullptr, "%s: state.page_tables[%d] must not be null", op, group);
  }
  SAPWOOD_CUDA_REQUIRE(blob != nullptr && result != nullptr, "%s: blob and result must not be null", op);
  SAPWOOD_CUDA_REQUIRE(Aligned(blob, 16) && Aligned(result, 16), "%s: blob and result must be aligned to 16 bytes", op);
  return SAPWOOD_CUDA_OK;
}

}  // namespace sapwood_cuda
