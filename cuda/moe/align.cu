// A stable counting sort of pairs by expert, segments padded to whole blocks. One launch, no workspace: one block per
// expert, and each of them counts all pairs.
//
// That costs num_experts * num_pairs reads of L2, against which a second and third launch (counts, scan, scatter) would
// have to pay; beside the GEMMs of as many pairs it is under a percent, and in decode a launch is what counts.
//
// A block's warps own neighbouring spans of pairs. A first pass counts: every id into a histogram in shared memory
// (integer atomics: any order gives the same counts), and per warp how many are this block's. The histogram says where
// the segment begins, the warps before where a warp's pairs begin, a ballot where a pair is among its warp's. A second
// pass writes.
#include <cstdint>

#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "moe/params.h"

namespace sapwood_cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxExperts = 1024;
constexpr int kAhead = 4;  // loads of a lane in flight
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int RoundUp(int n, int to) { return (n + to - 1) / to * to; }

// Ids of pairs i, i + 32, ..; -1, which is no expert, from `end` on.
__device__ __forceinline__ void LoadIds(const int32_t* ids, int i, int end, int (&out)[kAhead]) {
#pragma unroll
  for (int j = 0; j < kAhead; ++j) out[j] = i + kWarp * j < end ? ids[i + kWarp * j] : -1;
}

__global__ void __launch_bounds__(kThreads) MoeAlignKernel(const SapwoodMoeAlignParams p) {
  AwaitPredecessor();
  __shared__ int counts[kMaxExperts];
  __shared__ int warp_mine[kWarps];
  __shared__ int warp_before[kWarps];
  __shared__ int warp_all[kWarps];
  const int expert = blockIdx.x, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;

  for (int e = thread; e < p.num_experts; e += kThreads) counts[e] = 0;
  __syncthreads();
  const int span = RoundUp((p.num_pairs + kWarps - 1) / kWarps, kWarp);
  const int begin = min(p.num_pairs, warp * span);
  const int end = min(p.num_pairs, (warp + 1) * span);
  int mine = 0;
  for (int i = begin; i < end; i += kAhead * kWarp) {
    int ids[kAhead];
    LoadIds(p.ids, i + lane, end, ids);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (static_cast<unsigned>(ids[j]) < static_cast<unsigned>(p.num_experts)) atomicAdd(&counts[ids[j]], 1);
      mine += __popc(__ballot_sync(kAllLanes, ids[j] == expert));
    }
  }
  if (lane == 0) warp_mine[warp] = mine;
  __syncthreads();

  int before = 0, all = 0;  // padded lengths of the experts before this one, and of all
  for (int e = thread; e < p.num_experts; e += kThreads) {
    const int padded = RoundUp(counts[e], p.block);
    all += padded;
    if (e < expert) before += padded;
  }
  before = __reduce_add_sync(kAllLanes, before);
  all = __reduce_add_sync(kAllLanes, all);
  if (lane == 0) {
    warp_before[warp] = before;
    warp_all[warp] = all;
  }
  __syncthreads();
  before = all = 0;
  int place = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before += warp_before[w];
    all += warp_all[w];
    if (w < warp) place += warp_mine[w];
  }

  place += before;
  for (int i = begin; i < end; i += kAhead * kWarp) {
    int ids[kAhead];
    LoadIds(p.ids, i + lane, end, ids);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const unsigned same = __ballot_sync(kAllLanes, ids[j] == expert);
      if (ids[j] == expert) p.sorted_pairs[place + __popc(same & ((1u << lane) - 1))] = i + kWarp * j + lane;
      place += __popc(same);
    }
  }

  const int count = counts[expert];
  const int after = before + RoundUp(count, p.block);
  for (int i = before + count + thread; i < after; i += kThreads) p.sorted_pairs[i] = p.num_pairs;
  for (int b = before / p.block + thread; b < after / p.block; b += kThreads) p.block_expert[b] = expert;
  // All blocks share the rest of the capacity.
  const int turn = expert * kThreads + thread, step = p.num_experts * kThreads;
  for (int64_t i = int64_t{all} + turn; i < p.capacity; i += step) p.sorted_pairs[i] = p.num_pairs;
  for (int64_t b = int64_t{all / p.block} + turn; b < p.capacity / p.block; b += step) p.block_expert[b] = -1;
  if (thread == 0) {
    p.expert_offsets[expert] = before;
    if (expert == p.num_experts - 1) p.expert_offsets[p.num_experts] = *p.num_padded = all;
  }
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_moe_align(const SapwoodMoeAlignParams* params, void* stream) {
  SAPWOOD_CUDA_CHECK_STRUCT("moe_align", params);
  const SapwoodMoeAlignParams& p = *params;
  // Sums of sizes stay within int32: in the kernel a span rounded up for every warp passes num_pairs by 512 at most.
  constexpr int kMaxPairs = INT32_MAX - (1 << 20);
  SAPWOOD_CUDA_REQUIRE(p.num_pairs >= 0 && p.num_pairs <= kMaxPairs,
                       "moe_align: num_pairs must be in 0..%d, got %d", kMaxPairs, p.num_pairs);
  SAPWOOD_CUDA_REQUIRE(p.num_experts > 0 && p.num_experts <= sapwood_cuda::kMaxExperts,
                       "moe_align: num_experts must be in 1..%d, got %d", sapwood_cuda::kMaxExperts, p.num_experts);
  SAPWOOD_CUDA_REQUIRE(p.block > 0, "moe_align: block must be positive, got %d", p.block);
  SAPWOOD_CUDA_REQUIRE(p.capacity >= 0 && p.capacity % p.block == 0,
                       "moe_align: capacity must be a multiple of block = %d, got %d", p.block, p.capacity);
  const int64_t segments = p.num_experts < p.num_pairs ? p.num_experts : p.num_pairs;
  const int64_t needed = (p.num_pairs + segments * (p.block - 1) + p.block - 1) / p.block * p.block;
  SAPWOOD_CUDA_REQUIRE(p.capacity >= needed, "moe_align: capacity must be at least %lld for num_pairs = %d, got %d",
                       static_cast<long long>(needed), p.num_pairs, p.capacity);
  SAPWOOD_CUDA_REQUIRE(p.reserved == 0, "moe_align: reserved must be 0, got %d", p.reserved);
  SAPWOOD_CUDA_REQUIRE(p.ids != nullptr || p.num_pairs == 0, "moe_align: ids must not be null");
  SAPWOOD_CUDA_REQUIRE((p.sorted_pairs != nullptr && p.block_expert != nullptr) || p.capacity == 0,
                       "moe_align: sorted_pairs and block_expert must not be null, got %p and %p",
                       static_cast<const void*>(p.sorted_pairs), static_cast<const void*>(p.block_expert));
  SAPWOOD_CUDA_REQUIRE(p.expert_offsets != nullptr && p.num_padded != nullptr,
                       "moe_align: expert_offsets and num_padded must not be null, got %p and %p",
                       static_cast<const void*>(p.expert_offsets), static_cast<const void*>(p.num_padded));
  sapwood_cuda::Launch(sapwood_cuda::MoeAlignKernel, static_cast<unsigned>(p.num_experts), sapwood_cuda::kThreads, 0,
                       static_cast<cudaStream_t>(stream), p);
  return sapwood_cuda::LaunchStatus("moe_align");
}
