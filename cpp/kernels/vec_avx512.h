// V16 as one zmm register. SAPWOOD_BF16_DOT (level avx512_bf16) adds VDPBF16PS and VCVTNEPS2BF16.
//
// Max and Min return their second operand when either is NaN (as maxps does), at every level.
#pragma once

// gcc 12 takes the headers' "undefined" placeholders for uninitialised variables (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "kernels/level.h"

namespace sapwood::SAPWOOD_LEVEL {

struct V16 {
  __m512 v;
};
using Mask = __mmask16;

SAPWOOD_INLINE __mmask16 FirstLanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

SAPWOOD_INLINE V16 Zero() { return {_mm512_setzero_ps()}; }
SAPWOOD_INLINE V16 Set1(float x) { return {_mm512_set1_ps(x)}; }
SAPWOOD_INLINE V16 Load(const float* p) { return {_mm512_loadu_ps(p)}; }
SAPWOOD_INLINE V16 LoadN(const float* p, int n) { return {_mm512_maskz_loadu_ps(FirstLanes(n), p)}; }
SAPWOOD_INLINE void Store(float* p, V16 x) { _mm512_storeu_ps(p, x.v); }
SAPWOOD_INLINE void StoreN(float* p, V16 x, int n) { _mm512_mask_storeu_ps(p, FirstLanes(n), x.v); }

SAPWOOD_INLINE V16 FromBf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
SAPWOOD_INLINE __m256i ToBf16(V16 x) {
#ifdef SAPWOOD_BF16_DOT
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet));
#endif
}
SAPWOOD_INLINE V16 Load(const Bf16* p) { return FromBf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
SAPWOOD_INLINE V16 LoadN(const Bf16* p, int n) { return FromBf16(_mm256_maskz_loadu_epi16(FirstLanes(n), p)); }
SAPWOOD_INLINE void Store(Bf16* p, V16 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), ToBf16(x)); }
SAPWOOD_INLINE void StoreN(Bf16* p, V16 x, int n) { _mm256_mask_storeu_epi16(p, FirstLanes(n), ToBf16(x)); }

// x rounded to bf16 and widened again.
SAPWOOD_INLINE V16 RoundToBf16(V16 x) {
#ifdef SAPWOOD_BF16_DOT
  return FromBf16(ToBf16(x));
#else
  const __m512i bits = _mm512_castps_si512(x.v), high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_mask_mov_epi32(sum, nan, quiet), high))};
#endif
}
// 16 bf16 to every second place from p on.
SAPWOOD_INLINE void StoreEverySecond(Bf16* p, V16 x) {
  _mm512_mask_storeu_epi16(p, 0x55555555u, _mm512_cvtepu16_epi32(ToBf16(x)));
}

// int8, widened exactly.
SAPWOOD_INLINE V16 WidenInt8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

SAPWOOD_INLINE V16 Add(V16 a, V16 b) { return {_mm512_add_ps(a.v, b.v)}; }
SAPWOOD_INLINE V16 Sub(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
SAPWOOD_INLINE V16 Mul(V16 a, V16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
SAPWOOD_INLINE V16 Div(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
SAPWOOD_INLINE V16 Fma(V16 a, V16 b, V16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SAPWOOD_INLINE V16 Max(V16 a, V16 b) { return {_mm512_max_ps(a.v, b.v)}; }
SAPWOOD_INLINE V16 Min(V16 a, V16 b) { return {_mm512_min_ps(a.v, b.v)}; }
SAPWOOD_INLINE V16 Sqrt(V16 a) { return {_mm512_sqrt_ps(a.v)}; }
SAPWOOD_INLINE V16 Abs(V16 a) { return {_mm512_abs_ps(a.v)}; }
SAPWOOD_INLINE V16 CopySign(V16 magnitude, V16 sign) {
  return {
      _mm512_or_ps(_mm512_andnot_ps(_mm512_set1_ps(-0.0f), magnitude.v), _mm512_and_ps(_mm512_set1_ps(-0.0f), sign.v))};
}

SAPWOOD_INLINE Mask Less(V16 a, V16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
SAPWOOD_INLINE bool AnyNan(V16 a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
// Lanes [begin, end), 0 <= begin, end <= 16.
SAPWOOD_INLINE Mask LaneRange(int begin, int end) { return static_cast<Mask>(FirstLanes(end) & ~FirstLanes(begin)); }
SAPWOOD_INLINE V16 Select(Mask m, V16 yes, V16 no) { return {_mm512_mask_mov_ps(no.v, m, yes.v)}; }

// 2^n for t = n + 12582912 (1.5 * 2^23), whose low bits are n: the shift drops the rest.
SAPWOOD_INLINE V16 Pow2OfMagic(V16 t) {
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(t.v), _mm512_set1_epi32(127)), 23))};
}

// The tree of every level: lanes i and i + 8, then + 4, + 2, + 1.
SAPWOOD_INLINE float ReduceSum(V16 a) {
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
SAPWOOD_INLINE float ReduceMax(V16 a) {
  const __m256 s8 = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
SAPWOOD_INLINE float FirstLane(V16 a) { return _mm512_cvtss_f32(a.v); }

// --- bf16 pairs: acc[i] += a.first * b[i].first + a.second * b[i].second ---
SAPWOOD_INLINE int PairBits(const Bf16* p) {
  int bits;
  __builtin_memcpy(&bits, p, 4);
  return bits;
}
#ifdef SAPWOOD_BF16_DOT
inline constexpr bool kBf16Dot = true;
struct PairA {
  __m512i v;
};
struct PairB {
  __m512i v;
};
SAPWOOD_INLINE PairA BroadcastPairBits(int bits) { return {_mm512_set1_epi32(bits)}; }
SAPWOOD_INLINE PairB LoadPair(const Bf16* p) { return {_mm512_loadu_si512(p)}; }
SAPWOOD_INLINE V16 First(PairB b) { return {_mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16))}; }
SAPWOOD_INLINE V16 Second(PairB b) {
  return {_mm512_castsi512_ps(_mm512_and_si512(b.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
SAPWOOD_INLINE PairB KeepFirst(PairB b) { return {_mm512_and_si512(b.v, _mm512_set1_epi32(0x0000ffff))}; }
SAPWOOD_INLINE PairB KeepSecond(PairB b) {
  return {_mm512_and_si512(b.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))};
}
SAPWOOD_INLINE V16 PairMac(V16 acc, PairA a, PairB b) {
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
inline constexpr int kMaxRowsBf16 = 6;
// Whole numbers in -128..127 as a pair: exact in bf16, so the low half of their f32 bits is zero.
SAPWOOD_INLINE PairB PairOfSmall(V16 first, V16 second) {
  return {_mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first.v), 16), _mm512_castps_si512(second.v))};
}
SAPWOOD_INLINE void StorePair(Bf16* p, PairB b) { _mm512_storeu_si512(p, b.v); }
#else
inline constexpr bool kBf16Dot = false;
struct PairA {
  V16 first, second;
};
struct PairB {
  V16 first, second;
};
SAPWOOD_INLINE PairB SplitPair(__m512i v) {
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(v, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))}};
}
SAPWOOD_INLINE PairA BroadcastPairBits(int bits) {
  const PairB split = SplitPair(_mm512_set1_epi32(bits));
  return {split.first, split.second};
}
SAPWOOD_INLINE PairB LoadPair(const Bf16* p) { return SplitPair(_mm512_loadu_si512(p)); }
SAPWOOD_INLINE V16 First(PairB b) { return b.first; }
SAPWOOD_INLINE V16 Second(PairB b) { return b.second; }
SAPWOOD_INLINE PairB KeepFirst(PairB b) { return {b.first, Zero()}; }
SAPWOOD_INLINE PairB KeepSecond(PairB b) { return {Zero(), b.second}; }
SAPWOOD_INLINE V16 PairMac(V16 acc, PairA a, PairB b) { return Fma(a.second, b.second, Fma(a.first, b.first, acc)); }
inline constexpr int kMaxRowsBf16 = 4;
#endif

// --- int8: acc[i] += sum of four products of an unsigned weight and a signed activation ---
struct V16i {
  __m512i v;
};
struct DotB {
  __m512i v;
};
// The weights' offset is undone by where the chain of a block begins: at -offset times the sum of its activations.
SAPWOOD_INLINE V16i DotStart(int32_t minus_offset_sums) { return {_mm512_set1_epi32(minus_offset_sums)}; }
SAPWOOD_INLINE DotB LoadInt8(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
SAPWOOD_INLINE void LoadInt4(const uint8_t* p, DotB& low, DotB& high) {
  const __m512i v = _mm512_loadu_si512(p), nibble = _mm512_set1_epi8(15);
  low.v = _mm512_and_si512(v, nibble);
  high.v = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
}
SAPWOOD_INLINE V16i Dot(V16i acc, const int8_t* a, DotB b) {
  int32_t four;
  __builtin_memcpy(&four, a, 4);
  return {_mm512_dpbusd_epi32(acc.v, b.v, _mm512_set1_epi32(four))};
}
SAPWOOD_INLINE V16 ToF32(V16i x) { return {_mm512_cvtepi32_ps(x.v)}; }
SAPWOOD_INLINE V16 LoadF16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// Rounds to the nearest integers, ties to even; returns their sum.
SAPWOOD_INLINE int32_t StoreInt8(int8_t* p, V16 x) {
  const __m512i q = _mm512_cvtps_epi32(x.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(q));
  return _mm512_reduce_add_epi32(q);
}

// Register tiles: R rows x ColsFor(R) vectors of accumulators, out of 32 registers.
inline constexpr int kMaxRowsF32 = 6;
inline constexpr int ColsForF32(int) { return 4; }
inline constexpr int ColsForBf16(int) { return 4; }
inline constexpr int kMaxRowsPairs = 12;  // bf16 widened in registers
inline constexpr int ColsForPairs(int rows) { return rows <= 4 ? 4 : 2; }
inline constexpr int kMaxRowsInt8 = 6;
inline constexpr int kMaxRowsInt4 = 4;  // nibbles taken apart in registers
inline constexpr int ColsForInt8(int) { return 4; }
// Of attention: many rows x few columns of a widened tile, which then stay in L1; few rows x many of the pages.
inline constexpr int kTallRows = 5, kTallCols = 4;
inline constexpr int kFewRows = 8;
inline constexpr int ColsForFewRows(int rows) { return rows <= 2 ? 8 : rows <= 4 ? 4 : 2; }

}  // namespace sapwood::SAPWOOD_LEVEL
