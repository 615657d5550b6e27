// The end of a step: each live item's token goes to its row and into the result, as RowTable::CommitSample and
// FinishStep; one whose mask was late has none, its row is held. One block, a thread per item. A step that has failed
// ends the rows that its plan names instead, as the executor of cpp/program/ does: their KV may be half written.
#include <cstdint>

#include "batch/rows.cuh"
#include "common/check.cuh"
#include "common/launch.cuh"

namespace sapwood_cuda {
namespace {

constexpr int kThreads = 512;

__device__ SapwoodStepResultItem Commit(const SapwoodCommitStepParams& p, const SapwoodPlanBlob& blob, int i) {
  const SapwoodRowState& state = p.state;
  SapwoodStepResultItem out = {0, 0, -1, __int_as_float(0x7fc00000)};
  const int index = p.page_rows[i];
  if (index == state.max_rows) {
    const SapwoodPlanItem& item = Array<SapwoodPlanItem>(&blob, blob.items)[i];
    const SapwoodRow& row = state.rows[item.row];
    const bool waits = row.alive != 0 && row.gen == item.gen;  // the step has no error: the row is held
    out.flags = waits ? kSkipped | kHeld : kSkipped;
    return out;
  }
  const int32_t* logit_indptr = Array<int32_t>(&blob, blob.logit_indptr);
  const int last = logit_indptr[i + 1] - 1;
  if (last < logit_indptr[i]) return out;
  SapwoodRow* row = &state.rows[index];
  if (p.mask_index != nullptr && p.mask_index[last] == SAPWOOD_MASK_LATE) {
    row->held = 1;
    out.flags = kHeld;
    return out;
  }
  const bool bad = p.bad[last] != 0;
  const int32_t token = p.token[last];
  out.flags = TakeToken(row, state.stop_ids + static_cast<int64_t>(index) * state.max_stop_ids, token, bad);
  if (bad) return out;
  out.n = 1;
  out.token = token;
  if (row->return_logprob != 0) out.logprob = p.logprob[last];
  return out;
}

__global__ void __launch_bounds__(kThreads) CommitStepKernel(const SapwoodCommitStepParams p) {
  AwaitPredecessor();
  const SapwoodPlanBlob& blob = *p.blob;
  if (p.result->error == SAPWOOD_STEP_OK) {
    for (int i = threadIdx.x; i < blob.num_items; i += kThreads) ResultItems(p.result)[i] = Commit(p, blob, i);
    return;
  }
  if (threadIdx.x == 0) p.result->num_tokens = p.result->num_kv = p.result->num_logit_rows = 0;
  if (blob.format != SAPWOOD_PLAN_BLOB_FORMAT) return;
  const SapwoodPlanItem* items = Array<SapwoodPlanItem>(&blob, blob.items);
  for (int i = threadIdx.x; i < blob.num_items; i += kThreads) EndRow(p.state, items[i].row, items[i].gen);
  const SapwoodPlanRowOp* ops = Array<SapwoodPlanRowOp>(&blob, blob.row_ops);
  for (int i = threadIdx.x; i < blob.num_row_ops; i += kThreads) EndRow(p.state, ops[i].row, ops[i].gen);
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_commit_step(const SapwoodCommitStepParams* params, void* stream) {
  SAPWOOD_CUDA_CHECK_STRUCT("commit_step", params);
  const SapwoodCommitStepParams& p = *params;
  if (const int bad = sapwood_cuda::CheckRowState("commit_step", p.state, p.blob, p.result)) return bad;
  SAPWOOD_CUDA_REQUIRE(p.page_rows && p.token && p.logprob && p.bad,
                       "commit_step: page_rows, token, logprob and bad must not be null");
  sapwood_cuda::Launch(sapwood_cuda::CommitStepKernel, 1, sapwood_cuda::kThreads, 0, static_cast<cudaStream_t>(stream),
                       p);
  return sapwood_cuda::LaunchStatus("commit_step");
}
