// The sum of a token's expert outputs. A block covers 1024 columns of one token, a thread four neighbouring ones, which
// it sums over ascending slots in fp32. At decode the latency of loads is all there is: ids, weights and places of all
// slots are fetched at once into shared memory, and rows of kAhead slots before the first of them is added. A slot that
// does not count is a weight of 0 and a row of zeros, which adds nothing.
#include <cstdint>

#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "moe/params.h"

namespace sapwood_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // per multiprocessor; knowing it, the compiler spends registers on loads in flight
constexpr int kColumns = 4 * kThreads;
constexpr int kAhead = 8;
constexpr int kMaxTopK = 32;
static_assert(kMaxTopK % kAhead == 0);

template <typename Z, bool kVector>
__global__ void __launch_bounds__(kThreads, kBlocks) MoeCombineKernel(const SapwoodMoeCombineParams p) {
  AwaitPredecessor();
  __shared__ float weights[kMaxTopK];
  __shared__ int64_t rows[kMaxTopK];  // of z; -1 where the slot does not count
  const int64_t token = blockIdx.x;
  if (threadIdx.x < kMaxTopK) {
    const int slot = static_cast<int>(threadIdx.x);
    const int64_t pair = token * p.top_k + slot;
    const bool here = slot < p.top_k && (p.ids == nullptr || static_cast<unsigned>(p.ids[pair]) <
                                                                 static_cast<unsigned>(p.num_experts));
    rows[slot] = !here ? -1 : p.places != nullptr ? p.places[pair] : pair;
    weights[slot] = !here ? 0.0f : p.weights != nullptr ? p.weights[pair] : 1.0f;
  }
  __syncthreads();
  const int column = static_cast<int>(blockIdx.y) * kColumns + 4 * static_cast<int>(threadIdx.x);
  const int count = p.hidden - column;
  if (count <= 0) return;

  const Z* z = static_cast<const Z*>(p.z) + column;
  float sum[4] = {};
  for (int first = 0; first < p.top_k; first += kAhead) {
    float v[kAhead][4] = {};
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (rows[first + j] >= 0) Load4<kVector>(z + rows[first + j] * p.z_stride, count, v[j]);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = __fmaf_rn(weights[first + j], v[j][i], sum[i]);
    }
  }
  if (p.shared != nullptr) {
    const int64_t at = token * p.shared_stride + column;
    float v[4];
    if (p.shared_dtype == SAPWOOD_CUDA_F32) {
      Load4<kVector>(static_cast<const float*>(p.shared) + at, count, v);
    } else {
      Load4<kVector>(static_cast<const __nv_bfloat16*>(p.shared) + at, count, v);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = __fadd_rn(sum[i], v[i]);
  }
  const int64_t at = token * p.y_stride + column;
  if (p.y_dtype == SAPWOOD_CUDA_BF16) {
    Store4<kVector>(static_cast<__nv_bfloat16*>(p.y) + at, count, sum);
  } else if (kVector) {
    *reinterpret_cast<float4*>(static_cast<float*>(p.y) + at) = make_float4(sum[0], sum[1], sum[2], sum[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) static_cast<float*>(p.y)[at + i] = sum[i];
    }
  }
}

bool IsType(int dtype) { return dtype == SAPWOOD_CUDA_F32 || dtype == SAPWOOD_CUDA_BF16; }

// Rows begin where four elements can be loaded at once.
bool RowsAligned(const void* rows, int dtype, int64_t stride) {
  return stride % 4 == 0 && Aligned(rows, dtype == SAPWOOD_CUDA_F32 ? 16 : 8);
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_moe_combine(const SapwoodMoeCombineParams* params, void* stream) {
  using namespace sapwood_cuda;
  SAPWOOD_CUDA_CHECK_STRUCT("moe_combine", params);
  const SapwoodMoeCombineParams& p = *params;
  SAPWOOD_CUDA_REQUIRE(IsType(p.z_dtype), "moe_combine: z_dtype must be f32 (0) or bf16 (1), got %d", p.z_dtype);
  SAPWOOD_CUDA_REQUIRE(IsType(p.y_dtype), "moe_combine: y_dtype must be f32 (0) or bf16 (1), got %d", p.y_dtype);
  SAPWOOD_CUDA_REQUIRE(p.shared == nullptr || IsType(p.shared_dtype),
                       "moe_combine: shared_dtype must be f32 (0) or bf16 (1), got %d", p.shared_dtype);
  SAPWOOD_CUDA_REQUIRE(p.num_tokens >= 0, "moe_combine: num_tokens must not be negative, got %d", p.num_tokens);
  SAPWOOD_CUDA_REQUIRE(p.top_k > 0 && p.top_k <= kMaxTopK, "moe_combine: top_k must be in 1..%d, got %d", kMaxTopK,
                       p.top_k);
  SAPWOOD_CUDA_REQUIRE(p.hidden > 0 && p.hidden <= 65535 * kColumns,
                       "moe_combine: hidden must be in 1..%d, got %d", 65535 * kColumns, p.hidden);
  SAPWOOD_CUDA_REQUIRE(p.z_stride >= p.hidden && p.y_stride >= p.hidden,
                       "moe_combine: z_stride and y_stride must be at least hidden = %d, got %lld and %lld", p.hidden,
                       static_cast<long long>(p.z_stride), static_cast<long long>(p.y_stride));
  SAPWOOD_CUDA_REQUIRE(p.shared == nullptr || p.shared_stride >= p.hidden,
                       "moe_combine: shared_stride must be at least hidden = %d, got %lld", p.hidden,
                       static_cast<long long>(p.shared_stride));
  SAPWOOD_CUDA_REQUIRE(p.ids == nullptr || p.num_experts > 0,
                       "moe_combine: num_experts must be positive where ids are given, got %d", p.num_experts);
  if (p.num_tokens == 0) return SAPWOOD_CUDA_OK;
  SAPWOOD_CUDA_REQUIRE(p.z != nullptr && p.y != nullptr, "moe_combine: z and y must not be null, got %p and %p", p.z,
                       p.y);
  const bool vector = p.hidden % 4 == 0 && RowsAligned(p.z, p.z_dtype, p.z_stride) &&
                      RowsAligned(p.y, p.y_dtype, p.y_stride) &&
                      (p.shared == nullptr || RowsAligned(p.shared, p.shared_dtype, p.shared_stride));
  using Kernel = void (*)(SapwoodMoeCombineParams);
  Kernel kernel = vector ? MoeCombineKernel<float, true> : MoeCombineKernel<float, false>;
  if (p.z_dtype == SAPWOOD_CUDA_BF16) {
    kernel = vector ? MoeCombineKernel<__nv_bfloat16, true> : MoeCombineKernel<__nv_bfloat16, false>;
  }
  const dim3 grid(static_cast<unsigned>(p.num_tokens), static_cast<unsigned>((p.hidden + kColumns - 1) / kColumns));
  Launch(kernel, grid, kThreads, 0, static_cast<cudaStream_t>(stream), p);
  return LaunchStatus("moe_combine");
}
