// The arrays of a step from its plan and the rows, as RowTable::Prepare. Two halves:
//
//   items          one block, a thread per item: is its row alive, as the plan has it; segments; kv_len advances
//   tokens, rows   a thread per token and per logit row, from what the first half wrote
//
// As one launch while the block can do both (decode, short prompts), else as two. A token finds its segment by
// bisecting q_indptr, a logit row its item likewise: what they need beyond that is in the row.
#include <cstdint>

#include "batch/rows.cuh"
#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"

namespace sapwood_cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kTokenThreads = 256;
constexpr int kOneBlock = 1024;  // tokens or logit rows that the first half's block does as well
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ int64_t WarpTotal(int64_t x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// What the launch has room for. A step that does not fit is all padding.
struct Counts {
  bool fits;
  int items, tokens, logit_rows;
};

__device__ Counts CountsOf(const SapwoodPrepareStepParams& p) {
  const SapwoodPlanBlob& blob = *p.blob;
  if (blob.format != SAPWOOD_PLAN_BLOB_FORMAT || blob.num_items > p.num_padded_segments ||
      blob.num_items > p.state.max_rows || blob.num_tokens > p.num_padded_tokens ||
      blob.num_logit_rows > p.num_padded_logit_rows) {
    return {false, 0, 0, 0};
  }
  return {true, blob.num_items, blob.num_tokens, blob.num_logit_rows};
}

// The first page index in [begin, end) for which the table has no page, or INT32_MAX; by the lanes of a warp.
__device__ int FirstMissing(const int32_t* table, int begin, int end, int lane) {
  int missing = INT32_MAX;
  for (int page = begin + lane; page < end && missing == INT32_MAX; page += kWarp) {
    if (table[page] < 0) missing = page;
  }
  return __reduce_min_sync(kAllLanes, missing);
}

__device__ void PrepareItems(const SapwoodPrepareStepParams& p) {
  __shared__ int first_error;
  __shared__ unsigned long long num_tokens, num_kv, num_logit_rows;  // of live rows
  const SapwoodRowState& state = p.state;
  const SapwoodPlanItem* items = Array<SapwoodPlanItem>(p.blob, p.blob->items);
  const int32_t* q_indptr = Array<int32_t>(p.blob, p.blob->q_indptr);
  const Counts counts = CountsOf(p);
  const int thread = threadIdx.x, lane = thread % kWarp, page_size = state.page_size;
  const bool lost = p.result->error != SAPWOOD_STEP_OK;  // by row_ops
  if (thread == 0) {
    first_error = INT32_MAX;
    num_tokens = num_kv = num_logit_rows = 0;
  }
  __syncthreads();

  StepError error;
  int64_t my_tokens = 0, my_kv = 0, my_logit_rows = 0;
  for (int base = 0; base < counts.items; base += kThreads) {  // the warp's lanes stay together
    const int i = base + thread;
    SapwoodPlanItem item = {};
    SapwoodRow* row = nullptr;
    int begin = 0, end = 0;
    bool live = false;
    if (i < counts.items) {
      item = items[i];
      row = &state.rows[item.row];
      live = !lost && row->alive != 0 && row->gen == item.gen;
      // Queued before the host knew that the token it was to feed would not be drawn.
      if (live && row->held != 0 && item.kind == SAPWOOD_ITEM_DECODE) live = false;
    }
    if (live) {
      const int64_t kv_len = row->kv_len;
      if ((item.kind == SAPWOOD_ITEM_RESUME) != (row->held != 0)) {
        error.Note(i, SAPWOOD_STEP_HELD, i, 0, row->held);
        live = false;
      } else if (item.kind == SAPWOOD_ITEM_EXTEND && item.kv_len != kv_len) {
        error.Note(i, SAPWOOD_STEP_KV_LEN, i, 0, kv_len);
        live = false;
      }
      for (int group = 0; live && group < state.num_groups; ++group) {
        if (kv_len + item.q_len <= static_cast<int64_t>(row->num_pages[group]) * page_size) continue;
        error.Note(i, SAPWOOD_STEP_PAGES_SHORT, i, group, row->num_pages[group]);
        live = false;
      }
      if (live) {
        begin = static_cast<int>(kv_len);
        end = begin + item.q_len;
      }
    }
    // Of a resume, which has no position of its own, that is the page of its newest token, or none.
    const int first_page = begin / page_size, last_page = live ? (end - 1) / page_size : first_page;
    for (int group = 0; live && first_page == last_page && group < state.num_groups; ++group) {
      if (PageTable(state, group, item.row)[first_page] >= 0) continue;
      error.Note(i, SAPWOOD_STEP_PAGE_MISSING, i, group, begin);
      live = false;
    }
    // Where they are several, they may be many: the warp looks at them together, for one lane after the other.
    unsigned left = __ballot_sync(kAllLanes, first_page < last_page);
    while (left != 0) {
      const int owner = __ffs(static_cast<int>(left)) - 1;
      left &= left - 1;
      const int of_row = __shfl_sync(kAllLanes, item.row, owner);
      const int first = __shfl_sync(kAllLanes, first_page, owner), last = __shfl_sync(kAllLanes, last_page, owner);
      for (int group = 0; group < state.num_groups; ++group) {
        const int missing = FirstMissing(PageTable(state, group, of_row), first, last + 1, lane);
        if (lane != owner || !live || missing == INT32_MAX) continue;
        error.Note(i, SAPWOOD_STEP_PAGE_MISSING, i, group, max(begin, missing * page_size));
        live = false;
      }
    }
    if (i >= counts.items) continue;
    p.q_indptr[i] = q_indptr[i];
    p.kv_lens[i] = live ? end : item.q_len;
    p.page_rows[i] = live ? item.row : state.max_rows;
    if (live) {
      row->kv_len = end;
      my_tokens += item.q_len;
      if (item.q_len > 0) my_kv += end;
      my_logit_rows += item.q_len - item.logit_from;
    }
  }

  const int spare_tokens = p.num_padded_tokens - counts.tokens;
  for (int i = counts.items + thread; i <= p.num_padded_segments; i += kThreads) {
    const int before = i - counts.items;  // segments of padding
    p.q_indptr[i] = counts.tokens + min(before, spare_tokens);
    if (i == p.num_padded_segments) break;
    p.kv_lens[i] = before < spare_tokens ? 1 : 0;
    p.page_rows[i] = state.max_rows;
  }

  if (!counts.fits && !lost && thread == 0) error.Note(0, SAPWOOD_STEP_PADDING, 0, 0, 0);
  my_tokens = WarpTotal(my_tokens), my_kv = WarpTotal(my_kv), my_logit_rows = WarpTotal(my_logit_rows);
  if (lane == 0) {
    atomicAdd(&num_tokens, static_cast<unsigned long long>(my_tokens));
    atomicAdd(&num_kv, static_cast<unsigned long long>(my_kv));
    atomicAdd(&num_logit_rows, static_cast<unsigned long long>(my_logit_rows));
  }
  if (error.code != SAPWOOD_STEP_OK) atomicMin(&first_error, error.at);
  __syncthreads();
  if (error.code != SAPWOOD_STEP_OK && error.at == first_error) error.Report(p.result);
  if (thread == 0) {
    p.result->num_tokens = static_cast<int64_t>(num_tokens);
    p.result->num_kv = static_cast<int64_t>(num_kv);
    p.result->num_logit_rows = static_cast<int64_t>(num_logit_rows);
  }
}

__device__ void PrepareToken(const SapwoodPrepareStepParams& p, int t) {
  const SapwoodRowState& state = p.state;
  int32_t token = 0, position = 0, rope_mode = 0;
  bool live = false;
  int row_index = state.max_rows;
  if (t < p.q_indptr[p.num_padded_segments]) {
    const int segment = RangeOf(p.q_indptr, p.num_padded_segments, t);
    row_index = p.page_rows[segment];
    live = row_index != state.max_rows;
    if (live) {
      const SapwoodRow& row = state.rows[row_index];
      const SapwoodPlanItem& item = Array<SapwoodPlanItem>(p.blob, p.blob->items)[segment];
      const int in_segment = t - p.q_indptr[segment];
      position = p.kv_lens[segment] - item.q_len + in_segment;
      rope_mode = row.rope_mode;
      token = item.kind == SAPWOOD_ITEM_DECODE
                  ? row.last_token
                  : Array<int32_t>(p.blob, p.blob->tokens)[item.token_begin + in_segment];
    }
  }
  p.tokens[t] = token;
  p.positions[t] = position;
  p.rope_modes[t] = rope_mode;
  const int page = position / state.page_size, offset = position % state.page_size;
  for (int group = 0; group < state.num_groups; ++group) {
    p.slots[group][t] =
        live ? static_cast<int64_t>(PageTable(state, group, row_index)[page]) * state.page_size + offset : -1;
  }
}

__device__ void PrepareLogitRow(const SapwoodPrepareStepParams& p, int l, const Counts& counts) {
  const SapwoodRowState& state = p.state;
  int src = 0, row_index = state.max_rows;
  SapwoodRow row = {};
  row.top_p = 1.0f;
  int64_t position = 0;
  if (l < counts.logit_rows) {
    const int32_t* logit_indptr = Array<int32_t>(p.blob, p.blob->logit_indptr);
    const int i = RangeOf(logit_indptr, counts.items, l);
    const SapwoodPlanItem& item = Array<SapwoodPlanItem>(p.blob, p.blob->items)[i];
    const int query = item.logit_from + l - logit_indptr[i];
    src = item.kind == SAPWOOD_ITEM_RESUME ? p.kept_begin + item.row : p.q_indptr[i] + query;
    row_index = p.page_rows[i];
    if (row_index != state.max_rows) {
      row = state.rows[row_index];
      position = static_cast<int64_t>(p.kv_lens[i]) - item.q_len + query + 1;
    }
  }
  p.logit_src[l] = src;
  p.logit_rows[l] = row_index;
  p.temperature[l] = row.temperature;
  p.top_k[l] = row.top_k;
  p.top_p[l] = row.top_p;
  p.min_p[l] = row.min_p;
  p.seed[l] = row.seed;
  p.stream[l] = row.stream;
  p.position[l] = position;
  p.want_logprob[l] = row.return_logprob != 0;
  const int num_banned = position < row.min_len ? row.num_stop_ids : 0;
  const int64_t banned = static_cast<int64_t>(l) * state.max_stop_ids;
  for (int i = 0; i < state.max_stop_ids; ++i) {
    p.banned_ids[banned + i] =
        i < num_banned ? state.stop_ids[static_cast<int64_t>(row_index) * state.max_stop_ids + i] : -1;
  }
}

__device__ void PrepareTokensAndLogitRows(const SapwoodPrepareStepParams& p, int first, int step) {
  const Counts counts = CountsOf(p);
  for (int t = first; t < p.num_padded_tokens; t += step) PrepareToken(p, t);
  for (int l = first; l < p.num_padded_logit_rows; l += step) PrepareLogitRow(p, l, counts);
  if (p.state.max_stop_ids > 0) {
    for (int l = first; l < p.num_padded_logit_rows + (p.num_padded_logit_rows > 0); l += step) {
      p.banned_indptr[l] = l * p.state.max_stop_ids;
    }
  }
}

__global__ void __launch_bounds__(kThreads) PrepareStepKernel(const SapwoodPrepareStepParams p, bool all) {
  AwaitPredecessor();
  PrepareItems(p);  // what the rest reads is written before its last barrier
  if (all) PrepareTokensAndLogitRows(p, threadIdx.x, kThreads);
}

__global__ void __launch_bounds__(kTokenThreads, 4) PrepareTokensKernel(const SapwoodPrepareStepParams p) {
  AwaitPredecessor();
  PrepareTokensAndLogitRows(p, static_cast<int>(blockIdx.x * kTokenThreads + threadIdx.x),
                            static_cast<int>(gridDim.x * kTokenThreads));
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_prepare_step(const SapwoodPrepareStepParams* params, void* stream) {
  using namespace sapwood_cuda;
  SAPWOOD_CUDA_CHECK_STRUCT("prepare_step", params);
  const SapwoodPrepareStepParams& p = *params;
  if (const int bad = CheckRowState("prepare_step", p.state, p.blob, p.result)) return bad;
  SAPWOOD_CUDA_REQUIRE(p.num_padded_tokens >= 1 && p.num_padded_tokens <= INT32_MAX / 2,
                       "prepare_step: num_padded_tokens must be in 1..%d, got %d", INT32_MAX / 2, p.num_padded_tokens);
  SAPWOOD_CUDA_REQUIRE(p.num_padded_segments >= 1 && p.num_padded_segments <= kMaxRows + 1,
                       "prepare_step: num_padded_segments must be in 1..%d, got %d", kMaxRows + 1,
                       p.num_padded_segments);
  const int64_t max_logit_rows = (INT32_MAX / 2) / (p.state.max_stop_ids + 1);
  SAPWOOD_CUDA_REQUIRE(p.num_padded_logit_rows >= 0 && p.num_padded_logit_rows <= max_logit_rows,
                       "prepare_step: num_padded_logit_rows must be in 0..%lld, got %d",
                       static_cast<long long>(max_logit_rows), p.num_padded_logit_rows);
  SAPWOOD_CUDA_REQUIRE(p.tokens && p.positions && p.rope_modes && p.q_indptr && p.kv_lens && p.page_rows,
                       "prepare_step: tokens, positions, rope_modes, q_indptr, kv_lens and page_rows must not be "
                       "null");
  SAPWOOD_CUDA_REQUIRE(p.kept_begin >= 0 && p.kept_begin <= INT32_MAX - p.state.max_rows,
                       "prepare_step: kept_begin must be in 0..%d, got %d", INT32_MAX - p.state.max_rows, p.kept_begin);
  for (int group = 0; group < p.state.num_groups; ++group) {
    SAPWOOD_CUDA_REQUIRE(p.slots[group] != nullptr, "prepare_step: slots[%d] must not be null", group);
  }
  SAPWOOD_CUDA_REQUIRE(p.num_padded_logit_rows == 0 ||
                           (p.logit_src && p.logit_rows && p.temperature && p.top_k && p.top_p && p.min_p && p.seed &&
                            p.stream && p.position && p.want_logprob),
                       "prepare_step: logit_src, logit_rows, temperature, top_k, top_p, min_p, seed, stream, position "
                       "and want_logprob must not be null where num_padded_logit_rows > 0");
  SAPWOOD_CUDA_REQUIRE(p.num_padded_logit_rows == 0 || p.state.max_stop_ids == 0 || (p.banned_indptr && p.banned_ids),
                       "prepare_step: banned_indptr and banned_ids must not be null where num_padded_logit_rows > 0 "
                       "and state.max_stop_ids > 0");
  const int most = p.num_padded_tokens > p.num_padded_logit_rows ? p.num_padded_tokens : p.num_padded_logit_rows;
  const bool all = most <= kOneBlock;
  Launch(PrepareStepKernel, 1, kThreads, 0, static_cast<cudaStream_t>(stream), p, all);
  if (!all) {
    Launch(PrepareTokensKernel, static_cast<unsigned>((most + kTokenThreads - 1) / kTokenThreads), kTokenThreads, 0,
           static_cast<cudaStream_t>(stream), p);
  }
  return LaunchStatus("prepare_step");
}
