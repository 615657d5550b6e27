// V16 as two ymm registers (AVX2, FMA).
//
// Max and Min return their second operand when either is NaN (as maxps does), at every level.
#pragma once

#include <immintrin.h>

#include "kernels/level.h"

namespace sapwood::SAPWOOD_LEVEL {

struct V16 {
  __m256 lo, hi;
};
using Mask = V16;  // all ones or all zeros per lane

SAPWOOD_INLINE V16 Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SAPWOOD_INLINE V16 Set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
SAPWOOD_INLINE V16 Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SAPWOOD_INLINE void Store(float* p, V16 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}

// Lanes [begin, end), 0 <= begin, end <= 16.
SAPWOOD_INLINE Mask LaneRange(int begin, int end) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto half = [&](int b, int e) __attribute__((always_inline)) {
    const __m256i below_end = _mm256_cmpgt_epi32(_mm256_set1_epi32(e), lane);
    const __m256i below_begin = _mm256_cmpgt_epi32(_mm256_set1_epi32(b), lane);
    return _mm256_castsi256_ps(_mm256_andnot_si256(below_begin, below_end));
  };
  return {half(begin, end), half(begin - 8, end - 8)};
}
SAPWOOD_INLINE V16 LoadN(const float* p, int n) {
  const Mask m = LaneRange(0, n);
  return {_mm256_maskload_ps(p, _mm256_castps_si256(m.lo)), _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.hi))};
}
SAPWOOD_INLINE void StoreN(float* p, V16 x, int n) {
  const Mask m = LaneRange(0, n);
  _mm256_maskstore_ps(p, _mm256_castps_si256(m.lo), x.lo);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.hi), x.hi);
}

SAPWOOD_INLINE __m256 HalfFromBf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
SAPWOOD_INLINE __m256i HalfToBf16(__m256 x) {  // in the low 16 bits of each lane
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
SAPWOOD_INLINE V16 Load(const Bf16* p) {
  return {HalfFromBf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          HalfFromBf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
SAPWOOD_INLINE void Store(Bf16* p, V16 x) {
  const __m256i packed = _mm256_packus_epi32(HalfToBf16(x.lo), HalfToBf16(x.hi));  // interleaves 128-bit halves
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
SAPWOOD_INLINE V16 LoadN(const Bf16* p, int n) {
  Bf16 lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return Load(lanes);
}
SAPWOOD_INLINE void StoreN(Bf16* p, V16 x, int n) {
  Bf16 lanes[kLanes];
  Store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// x rounded to bf16 and widened again.
SAPWOOD_INLINE V16 RoundToBf16(V16 x) {
  const auto half = [](__m256 h) __attribute__((always_inline)) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(HalfToBf16(h), 16));
  };
  return {half(x.lo), half(x.hi)};
}
// 16 bf16 to every second place from p on.
SAPWOOD_INLINE void StoreEverySecond(Bf16* p, V16 x) {
  Bf16 lanes[kLanes];
  Store(lanes, x);
  for (int i = 0; i < kLanes; ++i) p[2 * i] = lanes[i];
}

// int8, widened exactly.
SAPWOOD_INLINE V16 WidenInt8(const int8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)))};
}

SAPWOOD_INLINE V16 Add(V16 a, V16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
SAPWOOD_INLINE V16 Sub(V16 a, V16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
SAPWOOD_INLINE V16 Mul(V16 a, V16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
SAPWOOD_INLINE V16 Div(V16 a, V16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
SAPWOOD_INLINE V16 Fma(V16 a, V16 b, V16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
SAPWOOD_INLINE V16 Max(V16 a, V16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
SAPWOOD_INLINE V16 Min(V16 a, V16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
SAPWOOD_INLINE V16 Sqrt(V16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
SAPWOOD_INLINE V16 Abs(V16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
SAPWOOD_INLINE V16 CopySign(V16 magnitude, V16 sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.lo), _mm256_and_ps(bit, sign.lo)),
          _mm256_or_ps(_mm256_andnot_ps(bit, magnitude.hi), _mm256_and_ps(bit, sign.hi))};
}

SAPWOOD_INLINE Mask Less(V16 a, V16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
SAPWOOD_INLINE bool AnyNan(V16 a) {
  const __m256 nan = _mm256_or_ps(_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q));
  return _mm256_movemask_ps(nan) != 0;
}
SAPWOOD_INLINE V16 Select(Mask m, V16 yes, V16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}

// 2^n for t = n + 12582912 (1.5 * 2^23), whose low bits are n: the shift drops the rest.
SAPWOOD_INLINE V16 Pow2OfMagic(V16 t) {
  const auto half = [](__m256 x) __attribute__((always_inline)) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(127)), 23));
  };
  return {half(t.lo), half(t.hi)};
}

// The tree of every level: lanes i and i + 8, then + 4, + 2, + 1.
SAPWOOD_INLINE float ReduceSum(V16 a) {
  const __m256 s8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
SAPWOOD_INLINE float ReduceMax(V16 a) {
  const __m256 s8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
SAPWOOD_INLINE float FirstLane(V16 a) { return _mm256_cvtss_f32(a.lo); }

// --- bf16 pairs: acc[i] += a.first * b[i].first, then += a.second * b[i].second ---
inline constexpr bool kBf16Dot = false;  // a product of pairs is two of floats
struct PairA {
  V16 first, second;
};
struct PairB {
  V16 first, second;
};
SAPWOOD_INLINE int PairBits(const Bf16* p) {
  int bits;
  __builtin_memcpy(&bits, p, 4);
  return bits;
}
SAPWOOD_INLINE __m256 FirstOfPair(__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
SAPWOOD_INLINE __m256 SecondOfPair(__m256i v) {
  return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
SAPWOOD_INLINE PairA BroadcastPairBits(int bits) {
  const __m256i v = _mm256_set1_epi32(bits);
  const __m256 first = FirstOfPair(v), second = SecondOfPair(v);
  return {{first, first}, {second, second}};
}
SAPWOOD_INLINE PairB LoadPair(const Bf16* p) {
  const __m256i lo = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i hi = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  return {{FirstOfPair(lo), FirstOfPair(hi)}, {SecondOfPair(lo), SecondOfPair(hi)}};
}
SAPWOOD_INLINE V16 First(PairB b) { return b.first; }
SAPWOOD_INLINE V16 Second(PairB b) { return b.second; }
SAPWOOD_INLINE PairB KeepFirst(PairB b) { return {b.first, Zero()}; }
SAPWOOD_INLINE PairB KeepSecond(PairB b) { return {Zero(), b.second}; }
SAPWOOD_INLINE V16 PairMac(V16 acc, PairA a, PairB b) { return Fma(a.second, b.second, Fma(a.first, b.first, acc)); }

// --- int8: acc[i] += sum of four products of a weight and a signed activation ---
struct V16i {
  __m256i lo, hi;
};
// VPMADDUBSW wants one unsigned operand and saturates at 16 bits: |w| times a under w's sign stays below 2 * 128 * 127.
struct DotB {
  __m256i lo, hi, abs_lo, abs_hi;
};
SAPWOOD_INLINE DotB SignedB(__m256i lo, __m256i hi) { return {lo, hi, _mm256_abs_epi8(lo), _mm256_abs_epi8(hi)}; }
SAPWOOD_INLINE __m256i LoadBytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
// The weights are signed here, so there is no offset to undo.
SAPWOOD_INLINE V16i DotStart(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
SAPWOOD_INLINE DotB LoadInt8(const uint8_t* p) {
  const __m256i offset = _mm256_set1_epi8(-128);
  return SignedB(_mm256_xor_si256(LoadBytes(p), offset), _mm256_xor_si256(LoadBytes(p + 32), offset));
}
SAPWOOD_INLINE void LoadInt4(const uint8_t* p, DotB& low, DotB& high) {
  const __m256i v0 = LoadBytes(p), v1 = LoadBytes(p + 32), nibble = _mm256_set1_epi8(15), offset = _mm256_set1_epi8(8);
  const auto part = [&](__m256i v)
                        __attribute__((always_inline)) { return _mm256_sub_epi8(_mm256_and_si256(v, nibble), offset); };
  low = SignedB(part(v0), part(v1));
  high = SignedB(part(_mm256_srli_epi16(v0, 4)), part(_mm256_srli_epi16(v1, 4)));
}
SAPWOOD_INLINE V16i Dot(V16i acc, const int8_t* a, DotB b) {
  int32_t four;
  __builtin_memcpy(&four, a, 4);
  const __m256i x = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
  const auto half = [&](__m256i sum, __m256i w, __m256i abs) __attribute__((always_inline)) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(abs, _mm256_sign_epi8(x, w)), ones));
  };
  return {half(acc.lo, b.lo, b.abs_lo), half(acc.hi, b.hi, b.abs_hi)};
}
SAPWOOD_INLINE V16 ToF32(V16i x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }
SAPWOOD_INLINE V16 LoadF16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
// Rounds to the nearest integers, ties to even; returns their sum.
SAPWOOD_INLINE int32_t StoreInt8(int8_t* p, V16 x) {
  const __m256i lo = _mm256_cvtps_epi32(x.lo), hi = _mm256_cvtps_epi32(x.hi);
  const __m128i words_lo = _mm_packs_epi32(_mm256_castsi256_si128(lo), _mm256_extracti128_si256(lo, 1));
  const __m128i words_hi = _mm_packs_epi32(_mm256_castsi256_si128(hi), _mm256_extracti128_si256(hi, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words_lo, words_hi));
  const __m256i s8 = _mm256_add_epi32(lo, hi);
  const __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  const __m128i s2 = _mm_add_epi32(s4, _mm_shuffle_epi32(s4, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s2, _mm_shuffle_epi32(s2, 0xb1)));
}

// Register tiles: R rows x ColsFor(R) vectors of accumulators (two registers each), out of 16 registers.
inline constexpr int kMaxRowsF32 = 6;
inline constexpr int kMaxRowsBf16 = 4;
inline constexpr int ColsForF32(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
inline constexpr int ColsForBf16(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
inline constexpr int kMaxRowsPairs = 1;  // bf16 widened in registers
inline constexpr int ColsForPairs(int) { return 1; }
inline constexpr int kMaxRowsInt8 = 3;
inline constexpr int kMaxRowsInt4 = 3;  // nibbles taken apart in registers
inline constexpr int ColsForInt8(int) { return 1; }
// Of attention: many rows x few columns of a widened tile, which then stay in L1; few rows x many of the pages.
inline constexpr int kTallRows = 5, kTallCols = 1;
inline constexpr int kFewRows = 4;
inline constexpr int ColsForFewRows(int rows) { return rows == 1 ? 2 : 1; }

}  // namespace sapwood::SAPWOOD_LEVEL
