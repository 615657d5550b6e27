// bf16 and fp16 as bit patterns, converted one value at a time: weight packing, page export and the scalar level.
// Internal linkage on purpose: these are compiled into files of several ISA levels.
#pragma once

#include <cstdint>

namespace sapwood {
namespace {

using Bf16 = uint16_t;

[[maybe_unused]] inline float BitsToF32(uint32_t bits) { return __builtin_bit_cast(float, bits); }
[[maybe_unused]] inline uint32_t F32ToBits(float x) { return __builtin_bit_cast(uint32_t, x); }

[[maybe_unused]] inline float Bf16ToF32(Bf16 x) { return BitsToF32(uint32_t{x} << 16); }

// Round to nearest even; a NaN keeps its sign and becomes quiet.
[[maybe_unused]] inline Bf16 F32ToBf16(float x) {
  const uint32_t bits = F32ToBits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Bf16>((bits >> 16) | 0x40u);
  return static_cast<Bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Exact, subnormals included.
[[maybe_unused]] inline float F16ToF32(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16;
  const uint32_t exponent = (x >> 10) & 0x1fu;
  const uint32_t mantissa = x & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * BitsToF32(0x33800000u);
    return BitsToF32(F32ToBits(magnitude) | sign);
  }
  if (exponent == 31) return BitsToF32(sign | 0x7f800000u | (mantissa << 13));
  return BitsToF32(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Round to nearest even, subnormals included; infinity above 65504; a NaN becomes quiet.
[[maybe_unused]] inline uint16_t F32ToF16(float x) {
  const uint32_t bits = F32ToBits(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds beyond 65504
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves x in steps of 2^-24 in the low bits, rounded
    const uint32_t steps = F32ToBits(BitsToF32(magnitude) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | steps);
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace
}  // namespace sapwood
