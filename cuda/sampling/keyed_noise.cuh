// The arithmetic that a sampled token hangs on, operation for operation that of cpp/sampling/sampler.cc: log and exp as
// fixed polynomials, Philox, and Gumbel noise of 32 random bits. Plain operators are single IEEE roundings here: the
// library is built with -fmad=false. Device code only.
#pragma once

#include <cstdint>

namespace sapwood_cuda {

// log(x) for normal x > 0. x = 2^e * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); polynomial of Cephes' logf.
__device__ __forceinline__ float Log(float x) {
  const uint32_t bits = __float_as_uint(x);
  int32_t e = static_cast<int32_t>(bits >> 23) - 126;
  float mantissa = __uint_as_float((bits & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  if (mantissa < 0.707106781186547524f) {
    mantissa = mantissa + mantissa;
    e -= 1;
  }
  const float f = mantissa - 1.0f;
  const float f2 = f * f;
  float p = 7.0376836292e-2f;
  p = __fmaf_rn(p, f, -1.1514610310e-1f);
  p = __fmaf_rn(p, f, 1.1676998740e-1f);
  p = __fmaf_rn(p, f, -1.2420140846e-1f);
  p = __fmaf_rn(p, f, 1.4249322787e-1f);
  p = __fmaf_rn(p, f, -1.6668057665e-1f);
  p = __fmaf_rn(p, f, 2.0000714765e-1f);
  p = __fmaf_rn(p, f, -2.4999993993e-1f);
  p = __fmaf_rn(p, f, 3.3333331174e-1f);
  const float scale = static_cast<float>(e);
  float y = (p * f) * f2;
  y = __fmaf_rn(scale, -2.12194440e-4f, y);
  y = __fmaf_rn(-0.5f, f2, y);
  const float sum = f + y;
  return __fmaf_rn(scale, 0.693359375f, sum);
}

// exp(x) for x <= 0; polynomial of Cephes' expf. 0 below -87.
__device__ __forceinline__ float Exp(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the low bits hold round(x / ln 2)
  const float n = shifted - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float fraction = (p * (r * r) + r) + 1.0f;
  const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : fraction * power;
}

// Philox4x32-10 (Salmon et al. 2011): out[w] are the bits of token 4 * counter + w.
__device__ __forceinline__ void KeyedBits(uint64_t seed, uint32_t stream, int64_t position, uint32_t counter,
                                          uint32_t (&out)[4]) {
  const uint64_t pos = static_cast<uint64_t>(position);
  uint32_t c0 = counter, c1 = stream, c2 = static_cast<uint32_t>(pos), c3 = static_cast<uint32_t>(pos >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// -log(-log(u)), u = (bits + 1/2) / 2^32. Above 1/2, -log(u) is -log1p(-w) with w = 1 - u, which fp32 holds to full
// relative accuracy where u itself would round to 1 (Kahan's log1p: log(v) * w / (1 - v) with v = fl(1 - w)).
__device__ __forceinline__ float KeyedGumbel(uint32_t bits) {
  const bool below_half = bits < 0x80000000u;
  const float w = (static_cast<float>(below_half ? bits : ~bits) + 0.5f) * 0x1p-32f;  // u, or 1 - u
  const float v = 1.0f - w;
  const float log_x = Log(below_half ? w : v);
  const float exponential = below_half ? -log_x : v == 1.0f ? w : log_x * __fdiv_rn(w, v - 1.0f);
  return -Log(exponential);
}

}  // namespace sapwood_cuda
