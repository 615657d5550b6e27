// The gated activation of an MLP (Shazeer 2020, "GLU variants improve transformer"): act(gate) * up. One thread per
// eight neighbouring outputs, 16 bytes of gate, of up and of y; a block has 1024 outputs of a row.
//
// SiLU and GELU are written without the difference that cancels for negative x: 1 + tanh(u) = 2 / (1 + exp(-2u)) and
// 1 + erf(u) = erfc(-u). For x to -infinity they become NaN, as torch's do.
#include <cstdint>

#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "elementwise/params.h"

namespace sapwood_cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kElements = 8;  // of a thread
constexpr int kBlockElements = kThreads * kElements;
constexpr int kMaxWidth = 65535 * kBlockElements;  // the grid's second dimension

// x / (1 + exp(-z))
__device__ __forceinline__ float TimesSigmoid(float x, float z) {
  return __fdiv_rn(x, __fadd_rn(1.0f, __expf(-z)));
}
__device__ __forceinline__ float Gelu(float x) {
  constexpr float kSqrtHalf = 0.70710678118654752f;
  return __fmul_rn(__fmul_rn(0.5f, x), erfcf(__fmul_rn(-x, kSqrtHalf)));
}
__device__ __forceinline__ float GeluTanh(float x) {
  constexpr float kTwiceSqrtTwoOverPi = 1.5957691216057308f;
  constexpr float kCubic = 0.044715f;
  const float cubic = __fmaf_rn(__fmul_rn(kCubic, __fmul_rn(x, x)), x, x);
  return TimesSigmoid(x, __fmul_rn(kTwiceSqrtTwoOverPi, cubic));
}

// kVector: x is aligned to 16 bytes and all eight exist. Otherwise element by element, 0 from `count` on.
template <bool kVector>
__device__ __forceinline__ void Load8(const __nv_bfloat16* x, int count, float (&out)[kElements]) {
  if constexpr (kVector) {
    const uint4 v = *reinterpret_cast<const uint4*>(x);
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = __uint_as_float(pairs[i] << 16);
      out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) out[i] = i < count ? ToFloat(x[i]) : 0.0f;
  }
}

template <bool kVector>
__device__ __forceinline__ void Store8(__nv_bfloat16* y, int count, const float (&in)[kElements]) {
  if constexpr (kVector) {
    __nv_bfloat162 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
    *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(pairs);
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (i < count) y[i] = __float2bfloat16_rn(in[i]);
    }
  }
}

template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    SiluMulKernel(const __nv_bfloat16* x, __nv_bfloat16* y, int64_t x_stride, int64_t y_stride, int width,
                  int activation) {
  AwaitPredecessor();
  const int i = static_cast<int>(blockIdx.y) * kBlockElements + static_cast<int>(threadIdx.x) * kElements;
  if (i >= width) return;
  x += blockIdx.x * x_stride + i;
  y += blockIdx.x * y_stride + i;
  float v[kElements], up[kElements];
  Load8<kVector>(x, width - i, v);
  Load8<kVector>(x + width, width - i, up);
  if (activation == SAPWOOD_CUDA_SILU) {
#pragma unroll
    for (int j = 0; j < kElements; ++j) v[j] = TimesSigmoid(v[j], v[j]);
  } else if (activation == SAPWOOD_CUDA_GELU) {
#pragma unroll
    for (int j = 0; j < kElements; ++j) v[j] = Gelu(v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kElements; ++j) v[j] = GeluTanh(v[j]);
  }
#pragma unroll
  for (int j = 0; j < kElements; ++j) v[j] = __fmul_rn(v[j], up[j]);
  Store8<kVector>(y, width - i, v);
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_silu_mul(const SapwoodSiluMulParams* params, void* stream) {
  using sapwood_cuda::Aligned;
  using sapwood_cuda::kBlockElements;
  using sapwood_cuda::kElements;
  using sapwood_cuda::kMaxWidth;
  SAPWOOD_CUDA_CHECK_STRUCT("silu_mul", params);
  const SapwoodSiluMulParams& p = *params;
  SAPWOOD_CUDA_REQUIRE(p.activation >= SAPWOOD_CUDA_SILU && p.activation <= SAPWOOD_CUDA_GELU_TANH,
                       "silu_mul: activation must be silu (0), gelu (1) or gelu_tanh (2), got %d", p.activation);
  SAPWOOD_CUDA_REQUIRE(p.num_rows >= 0, "silu_mul: num_rows must not be negative, got %d", p.num_rows);
  SAPWOOD_CUDA_REQUIRE(p.width > 0 && p.width <= kMaxWidth, "silu_mul: width must be in 1..%d, got %d", kMaxWidth,
                       p.width);
  SAPWOOD_CUDA_REQUIRE(p.x_stride >= 2 * static_cast<int64_t>(p.width),
                       "silu_mul: x_stride must be at least 2 * width = %lld, got %lld", 2LL * p.width,
                       static_cast<long long>(p.x_stride));
  SAPWOOD_CUDA_REQUIRE(p.y_stride >= p.width, "silu_mul: y_stride must be at least width = %d, got %lld", p.width,
                       static_cast<long long>(p.y_stride));
  if (p.num_rows == 0) return SAPWOOD_CUDA_OK;
  SAPWOOD_CUDA_REQUIRE(p.x != nullptr && p.y != nullptr, "silu_mul: x and y must not be null, got %p, %p", p.x, p.y);
  SAPWOOD_CUDA_REQUIRE(Aligned(p.x, 2) && Aligned(p.y, 2),
                       "silu_mul: x and y must be aligned to their elements, got %p, %p", p.x, p.y);
  const bool vector = p.width % kElements == 0 && p.x_stride % kElements == 0 && p.y_stride % kElements == 0 &&
                      Aligned(p.x, 16) && Aligned(p.y, 16);
  const dim3 grid(p.num_rows, (p.width + kBlockElements - 1) / kBlockElements);
  const auto kernel = vector ? sapwood_cuda::SiluMulKernel<true> : sapwood_cuda::SiluMulKernel<false>;
  sapwood_cuda::Launch(kernel, grid, sapwood_cuda::kThreads, 0, static_cast<cudaStream_t>(stream),
                       static_cast<const __nv_bfloat16*>(p.x), static_cast<__nv_bfloat16*>(p.y), p.x_stride, p.y_stride,
                       p.width, p.activation);
  return sapwood_cuda::LaunchStatus("silu_mul");
}
