// RMSNorm (Zhang and Sennrich 2019) of the residual stream into bf16. One block per row.
//
// The order of the sum is fixed by the shape of the block alone: thread t adds the squares of elements 4 (t + 256 i) ..
// + 3 for ascending i, a butterfly adds the lanes, thread order adds the warps. The path for unaligned rows gives every
// thread the same elements, so alignment changes no bit.
#include <cstdint>

#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "elementwise/params.h"

namespace sapwood_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <typename X, bool kVector>
__global__ void __launch_bounds__(kThreads)
    RmsNormKernel(const X* x, const float* weight, __nv_bfloat16* y, int64_t x_stride, int64_t y_stride, int hidden,
                  float eps, float weight_offset) {
  AwaitPredecessor();
  __shared__ float warp_sums[kWarps];
  x += blockIdx.x * x_stride;
  y += blockIdx.x * y_stride;

  float sum = 0.0f;
  for (int i = 4 * threadIdx.x; i < hidden; i += 4 * kThreads) {
    float v[4];
    Load4<kVector>(x + i, hidden - i, v);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum = __fmaf_rn(v[j], v[j], sum);
  }
  sum = WarpSum(sum);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum = __fadd_rn(sum, warp_sums[w]);
  const float inv_rms = __frsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(hidden)), eps));

  // The row is read again rather than held: it is in L1 by now, and any hidden size fits.
  for (int i = 4 * threadIdx.x; i < hidden; i += 4 * kThreads) {
    float v[4], w[4];
    Load4<kVector>(x + i, hidden - i, v);
    Load4<kVector>(weight + i, hidden - i, w);
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = __fmul_rn(__fmul_rn(v[j], inv_rms), __fadd_rn(w[j], weight_offset));
    Store4<kVector>(y + i, hidden - i, v);
  }
}

template <typename X>
void LaunchRows(const SapwoodRmsNormParams& p, cudaStream_t stream) {
  const X* x = static_cast<const X*>(p.x);
  __nv_bfloat16* y = static_cast<__nv_bfloat16*>(p.y);
  const bool vector = p.hidden % 4 == 0 && p.x_stride % 4 == 0 && p.y_stride % 4 == 0 && Aligned(x, 4 * sizeof(X)) &&
                      Aligned(y, 8) && Aligned(p.weight, 16);
  const auto kernel = vector ? RmsNormKernel<X, true> : RmsNormKernel<X, false>;
  Launch(kernel, p.num_rows, kThreads, 0, stream, x, p.weight, y, p.x_stride, p.y_stride, p.hidden, p.eps,
         p.plus_one != 0 ? 1.0f : 0.0f);
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_rms_norm(const SapwoodRmsNormParams* params, void* stream) {
  SAPWOOD_CUDA_CHECK_STRUCT("rms_norm", params);
  const SapwoodRmsNormParams& p = *params;
  SAPWOOD_CUDA_REQUIRE(p.x_dtype == SAPWOOD_CUDA_F32 || p.x_dtype == SAPWOOD_CUDA_BF16,
                       "rms_norm: x_dtype must be f32 (0) or bf16 (1), got %d", p.x_dtype);
  SAPWOOD_CUDA_REQUIRE(p.num_rows >= 0, "rms_norm: num_rows must not be negative, got %d", p.num_rows);
  SAPWOOD_CUDA_REQUIRE(p.hidden > 0, "rms_norm: hidden must be positive, got %d", p.hidden);
  SAPWOOD_CUDA_REQUIRE(p.x_stride >= p.hidden && p.y_stride >= p.hidden,
                       "rms_norm: x_stride and y_stride must be at least hidden = %d, got %lld and %lld", p.hidden,
                       static_cast<long long>(p.x_stride), static_cast<long long>(p.y_stride));
  SAPWOOD_CUDA_REQUIRE(p.eps > 0.0f, "rms_norm: eps must be positive, got %g", static_cast<double>(p.eps));
  if (p.num_rows == 0) return SAPWOOD_CUDA_OK;
  SAPWOOD_CUDA_REQUIRE(p.x != nullptr && p.weight != nullptr && p.y != nullptr,
                       "rms_norm: x, weight and y must not be null, got %p, %p, %p", p.x,
                       static_cast<const void*>(p.weight), p.y);
  if (p.x_dtype == SAPWOOD_CUDA_F32) {
    sapwood_cuda::LaunchRows<float>(p, static_cast<cudaStream_t>(stream));
  } else {
    sapwood_cuda::LaunchRows<__nv_bfloat16>(p, static_cast<cudaStream_t>(stream));
  }
  return sapwood_cuda::LaunchStatus("rms_norm");
}
