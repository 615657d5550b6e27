// Routing of tokens to experts: scores, optional choice of groups, top-k. One warp per token.
//
// Lane l holds experts l, l + 32, .. in registers. A choice value becomes an unsigned key that orders as the value
// does, with 0 for what cannot be chosen (beyond num_experts, in a group that was left out, chosen before), so that a
// round of top-k is a maximum over the warp and then a minimum over the ids that have it: two instructions (redux).
// Lane j keeps the choice of round j.
#include <cmath>
#include <cstdint>

#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "moe/params.h"

namespace sapwood_cuda {
namespace {

constexpr int kWarps = 4;  // per block
constexpr int kMaxExperts = 512;
constexpr int kPerLane = kMaxExperts / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr unsigned kOut = 0;

// Ascending as the values are, above kOut. No value is -0: a score is not negative, and x + -x is +0.
__device__ __forceinline__ unsigned ChoiceKey(float value) {
  const unsigned bits = __float_as_uint(value);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// Bit g: group g is one of the topk_groups best.
__device__ __forceinline__ unsigned BestGroups(const float (&choice)[kPerLane], int lane, int group_size,
                                               const SapwoodMoeRouteParams& p) {
  unsigned my_group = kOut;  // of group `lane`
  for (int g = 0; g < p.num_groups; ++g) {
    float largest = -INFINITY, second = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (static_cast<unsigned>(lane + kWarp * i - g * group_size) >= static_cast<unsigned>(group_size)) continue;
      second = fmaxf(second, fminf(largest, choice[i]));
      largest = fmaxf(largest, choice[i]);
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float other_largest = __shfl_xor_sync(kAllLanes, largest, step);
      const float other_second = __shfl_xor_sync(kAllLanes, second, step);
      second = fmaxf(fminf(largest, other_largest), fmaxf(second, other_second));
      largest = fmaxf(largest, other_largest);
    }
    const float score = p.group_score == SAPWOOD_CUDA_MOE_GROUP_TOP2 ? __fadd_rn(largest, second) : largest;
    if (lane == g) my_group = ChoiceKey(isnan(score) ? -INFINITY : score);  // inf - inf
  }
  int num_better = 0;
  for (int g = 0; g < p.num_groups; ++g) {
    const unsigned other = __shfl_sync(kAllLanes, my_group, g);
    num_better += other > my_group || (other == my_group && g < lane);
  }
  return __ballot_sync(kAllLanes, my_group != kOut && num_better < p.topk_groups);
}

template <typename X>
__global__ void __launch_bounds__(kWarps* kWarp) MoeRouteKernel(const SapwoodMoeRouteParams p) {
  AwaitPredecessor();
  const int lane = threadIdx.x % kWarp;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (token >= p.num_tokens) return;
  const X* logits = static_cast<const X*>(p.logits) + token * p.logits_stride;

  float score[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = lane + kWarp * i;
    score[i] = e < p.num_experts ? ToFloat(logits[e]) : -INFINITY;
  }
  if (p.scoring == SAPWOOD_CUDA_MOE_SOFTMAX) {
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) top = fmaxf(top, score[i]);
    top = WarpMax(top);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (kWarp * i >= p.num_experts) continue;  // of all lanes: small E skips most of the work, here and below
      score[i] = expf(__fsub_rn(score[i], top));
      sum = __fadd_rn(sum, score[i]);
    }
    sum = WarpSum(sum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (kWarp * i < p.num_experts) score[i] = __fdiv_rn(score[i], sum);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (kWarp * i < p.num_experts) score[i] = __fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-score[i])));
    }
  }

  float choice[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = lane + kWarp * i;
    choice[i] = p.bias != nullptr && e < p.num_experts ? __fadd_rn(score[i], p.bias[e]) : score[i];
    if (isnan(choice[i])) choice[i] = -INFINITY;
  }
  const int group_size = p.num_experts / p.num_groups;
  const bool grouped = p.num_groups > 1;
  const unsigned groups = grouped ? BestGroups(choice, lane, group_size, p) : 0;
  unsigned key[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = lane + kWarp * i;
    const bool in = e < p.num_experts && (!grouped || (groups >> (e / group_size) & 1) != 0);
    key[i] = in ? ChoiceKey(choice[i]) : kOut;
  }

  int my_id = 0;
  float my_weight = 0.0f;
  for (int round = 0; round < p.top_k; ++round) {
    unsigned best = kOut;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best = max(best, key[i]);
    best = __reduce_max_sync(kAllLanes, best);
    int id = kMaxExperts;
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i) {
      if (key[i] == best) id = lane + kWarp * i;
    }
    id = __reduce_min_sync(kAllLanes, id);
    float weight = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane + kWarp * i != id) continue;
      weight = score[i];
      key[i] = kOut;
    }
    weight = __shfl_sync(kAllLanes, weight, id % kWarp);
    if (lane == round) {
      my_id = id;
      my_weight = weight;
    }
  }
  if (p.renormalise != 0) my_weight = __fdiv_rn(my_weight, __fadd_rn(WarpSum(my_weight), 1e-20f));
  if (lane < p.top_k) {
    p.ids[token * p.top_k + lane] = my_id;
    p.weights[token * p.top_k + lane] = __fmul_rn(my_weight, p.scale);
  }
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_moe_route(const SapwoodMoeRouteParams* params, void* stream) {
  SAPWOOD_CUDA_CHECK_STRUCT("moe_route", params);
  const SapwoodMoeRouteParams& p = *params;
  SAPWOOD_CUDA_REQUIRE(p.logits_dtype == SAPWOOD_CUDA_F32 || p.logits_dtype == SAPWOOD_CUDA_BF16,
                       "moe_route: logits_dtype must be f32 (0) or bf16 (1), got %d", p.logits_dtype);
  SAPWOOD_CUDA_REQUIRE(p.num_tokens >= 0, "moe_route: num_tokens must not be negative, got %d", p.num_tokens);
  SAPWOOD_CUDA_REQUIRE(p.num_experts > 0 && p.num_experts <= sapwood_cuda::kMaxExperts,
                       "moe_route: num_experts must be in 1..%d, got %d", sapwood_cuda::kMaxExperts, p.num_experts);
  SAPWOOD_CUDA_REQUIRE(p.logits_stride >= p.num_experts,
                       "moe_route: logits_stride must be at least num_experts = %d, got %lld", p.num_experts,
                       static_cast<long long>(p.logits_stride));
  SAPWOOD_CUDA_REQUIRE(p.scoring == SAPWOOD_CUDA_MOE_SOFTMAX || p.scoring == SAPWOOD_CUDA_MOE_SIGMOID,
                       "moe_route: scoring must be softmax (0) or sigmoid (1), got %d", p.scoring);
  SAPWOOD_CUDA_REQUIRE(p.num_groups > 0 && p.num_groups <= sapwood_cuda::kWarp && p.num_experts % p.num_groups == 0,
                       "moe_route: num_groups must be in 1..%d and divide num_experts = %d, got %d",
                       sapwood_cuda::kWarp, p.num_experts, p.num_groups);
  SAPWOOD_CUDA_REQUIRE(p.topk_groups > 0 && p.topk_groups <= p.num_groups,
                       "moe_route: topk_groups must be in 1..num_groups = %d, got %d", p.num_groups, p.topk_groups);
  const int group_size = p.num_experts / p.num_groups;
  SAPWOOD_CUDA_REQUIRE(p.group_score == SAPWOOD_CUDA_MOE_GROUP_TOP2 || p.group_score == SAPWOOD_CUDA_MOE_GROUP_MAX,
                       "moe_route: group_score must be top2 (0) or max (1), got %d", p.group_score);
  SAPWOOD_CUDA_REQUIRE(p.num_groups == 1 || group_size > 1 || p.group_score == SAPWOOD_CUDA_MOE_GROUP_MAX,
                       "moe_route: group_score must be max (1) where a group has one expert, got top2 (0)");
  SAPWOOD_CUDA_REQUIRE(
      p.top_k > 0 && p.top_k <= sapwood_cuda::kWarp && p.top_k <= p.topk_groups * group_size,
      "moe_route: top_k must be in 1..%d and at most the %d experts of topk_groups groups, got %d", sapwood_cuda::kWarp,
      p.topk_groups * group_size, p.top_k);
  SAPWOOD_CUDA_REQUIRE(std::isfinite(p.scale), "moe_route: scale must be finite, got %g", static_cast<double>(p.scale));
  SAPWOOD_CUDA_REQUIRE(p.reserved == 0, "moe_route: reserved must be 0, got %d", p.reserved);
  if (p.num_tokens == 0) return SAPWOOD_CUDA_OK;
  SAPWOOD_CUDA_REQUIRE(p.logits != nullptr && p.ids != nullptr && p.weights != nullptr,
                       "moe_route: logits, ids and weights must not be null, got %p, %p, %p", p.logits,
                       static_cast<const void*>(p.ids), static_cast<const void*>(p.weights));
  const auto kernel = p.logits_dtype == SAPWOOD_CUDA_F32 ? sapwood_cuda::MoeRouteKernel<float>
                                                         : sapwood_cuda::MoeRouteKernel<__nv_bfloat16>;
  const unsigned blocks = (static_cast<unsigned>(p.num_tokens) + sapwood_cuda::kWarps - 1) / sapwood_cuda::kWarps;
  sapwood_cuda::Launch(kernel, blocks, sapwood_cuda::kWarps * sapwood_cuda::kWarp, 0,
                       static_cast<cudaStream_t>(stream), p);
  return sapwood_cuda::LaunchStatus("moe_route");
}
