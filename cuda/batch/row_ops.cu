// A plan's row ops, in order, as RowTable::ApplyRowOps. One block: a warp has every 32nd row and looks through the list
// for the ops of its rows, so that those of one row keep their order and those of different rows, which do not touch
// each other, need none. Lanes share what has a length: the pages of an append, the stop ids of an init.
//
// An op that does not fit its row is left out and reported; the step is lost then, commit_step ends its rows.
#include <cstdint>

#include "batch/rows.cuh"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"

namespace sapwood_cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// By all lanes of the warp; `at`: of the op in the list.
__device__ __forceinline__ void ApplyRowOp(const SapwoodRowOpsParams& p, const SapwoodPlanRowOp& op, int at, int lane,
                                           StepError* error) {
  const SapwoodRowState& state = p.state;
  const int32_t* ints = Array<int32_t>(p.blob, p.blob->ints);
  SapwoodRow* row = &state.rows[op.row];
  if (op.kind == SAPWOOD_ROW_OP_INIT) {
    const SapwoodPlanInit& init = Array<SapwoodPlanInit>(p.blob, p.blob->inits)[op.begin];
    int32_t* stop_ids = state.stop_ids + static_cast<int64_t>(op.row) * state.max_stop_ids;
    for (int i = lane; i < init.stop_count; i += kWarp) stop_ids[i] = ints[init.stop_begin + i];
    if (lane == 0) InitRow(init, op.gen, row);
    return;
  }
  const uint32_t gen = row->gen;
  const bool alive = row->alive != 0;
  const int64_t kv_len = row->kv_len;
  const int num_pages = op.kind == SAPWOOD_ROW_OP_APPEND_PAGES ? row->num_pages[op.group] : 0;
  __syncwarp();  // all have read what one of them may change
  if (op.kind == SAPWOOD_ROW_OP_FREE) {
    if (lane == 0 && gen == op.gen) row->alive = 0;
    return;
  }
  if (gen != op.gen) {
    error->Note(at, SAPWOOD_STEP_ROW_OP_GEN, op.row, 0, gen);
    return;
  }
  if (op.kind == SAPWOOD_ROW_OP_APPEND_PAGES) {
    if (op.count > state.max_pages - num_pages) {
      error->Note(at, SAPWOOD_STEP_PAGES_FULL, op.row, op.group, num_pages);
      return;
    }
    int32_t* table = MutablePageTable(state, op.group, op.row) + num_pages;
    for (int i = lane; i < op.count; i += kWarp) table[i] = ints[op.begin + i];
    if (lane == 0) row->num_pages[op.group] = num_pages + op.count;
  } else if (!alive) {
    return;  // ended on the device before the host knew
  } else if (op.kind == SAPWOOD_ROW_OP_FORCE_TOKENS) {
    if (op.value != kv_len) {
      error->Note(at, SAPWOOD_STEP_FORCED_POSITION, op.row, 0, kv_len);
    } else if (lane == 0) {
      row->last_token = ints[op.begin + op.count - 1];
      row->held = 0;  // what it waited to draw has been given
    }
  } else {
    if (op.value > kv_len) {
      error->Note(at, SAPWOOD_STEP_TRUNCATE, op.row, 0, kv_len);
    } else if (lane == 0) {
      if (op.value < kv_len) row->held = 0;  // the hidden state that is kept is no longer the row's last
      row->kv_len = op.value;
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1) RowOpsKernel(const SapwoodRowOpsParams p) {
  AwaitPredecessor();
  __shared__ int first_error;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (threadIdx.x == 0) {
    first_error = INT32_MAX;
    SapwoodStepResultBlock result = {};
    result.step_id = p.blob->step_id;
    result.sequence = p.blob->sequence;
    result.num_items = p.blob->num_items;
    *p.result = result;
  }
  __syncthreads();

  StepError error;
  if (p.blob->format != SAPWOOD_PLAN_BLOB_FORMAT) {
    error.Note(0, SAPWOOD_STEP_FORMAT, 0, 0, p.blob->format);
  } else {
    const SapwoodPlanRowOp* ops = Array<SapwoodPlanRowOp>(p.blob, p.blob->row_ops);
    const int num_ops = p.blob->num_row_ops;
    for (int base = 0; base < num_ops; base += kWarp) {
      const int mine = base + lane;
      unsigned ours = __ballot_sync(kAllLanes, mine < num_ops && ops[mine].row % kWarps == warp);
      while (ours != 0) {
        const int at = base + __ffs(static_cast<int>(ours)) - 1;
        ours &= ours - 1;
        ApplyRowOp(p, ops[at], at, lane, &error);
        __syncwarp();  // the next op sees what this one wrote
      }
    }
  }
  if (lane == 0 && error.code != SAPWOOD_STEP_OK) atomicMin(&first_error, error.at);
  __syncthreads();
  if (lane == 0 && error.code != SAPWOOD_STEP_OK && error.at == first_error) error.Report(p.result);
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_row_ops(const SapwoodRowOpsParams* params, void* stream) {
  SAPWOOD_CUDA_CHECK_STRUCT("row_ops", params);
  const SapwoodRowOpsParams& p = *params;
  if (const int bad = sapwood_cuda::CheckRowState("row_ops", p.state, p.blob, p.result)) return bad;
  sapwood_cuda::Launch(sapwood_cuda::RowOpsKernel, 1, sapwood_cuda::kThreads, 0, static_cast<cudaStream_t>(stream), p);
  return sapwood_cuda::LaunchStatus("row_ops");
}
