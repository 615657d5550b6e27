// Loads and stores of four neighbouring elements as f32, and the sums whose order is fixed. Device code only.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace sapwood_cuda {

constexpr int kWarp = 32;

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

// kVector: x is aligned to four elements and all four exist. Otherwise element by element, 0 from `count` on.
template <bool kVector>
__device__ __forceinline__ void Load4(const float* x, int count, float (&out)[4]) {
  if constexpr (kVector) {
    const float4 v = *reinterpret_cast<const float4*>(x);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = i < count ? x[i] : 0.0f;
  }
}

template <bool kVector>
__device__ __forceinline__ void Load4(const __nv_bfloat16* x, int count, float (&out)[4]) {
  if constexpr (kVector) {
    const uint2 v = *reinterpret_cast<const uint2*>(x);
    out[0] = __uint_as_float(v.x << 16), out[1] = __uint_as_float(v.x & 0xffff0000u);
    out[2] = __uint_as_float(v.y << 16), out[3] = __uint_as_float(v.y & 0xffff0000u);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = i < count ? ToFloat(x[i]) : 0.0f;
  }
}

template <bool kVector>
__device__ __forceinline__ void Store4(__nv_bfloat16* y, int count, const float (&in)[4]) {
  if constexpr (kVector) {
    __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(in[0], in[1]), __floats2bfloat162_rn(in[2], in[3])};
    *reinterpret_cast<uint2*>(y) = *reinterpret_cast<const uint2*>(pair);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) y[i] = __float2bfloat16_rn(in[i]);
    }
  }
}

// Sum over the warp, the same bits in every lane: a butterfly adds the same two numbers on both sides of each exchange.
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = __fadd_rn(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

}  // namespace sapwood_cuda
