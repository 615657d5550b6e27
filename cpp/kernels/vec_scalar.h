// V16 without intrinsics, for any machine: four GCC vectors of four floats, which the compiler maps to SSE2 or NEON or
// takes apart. Multiply and add are two roundings here (no FMA below AVX2).
//
// Max and Min return their second operand when either is NaN (as maxps does), at every level.
#pragma once

#include "kernels/level.h"

namespace sapwood::SAPWOOD_LEVEL {

typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));

struct V16 {
  F4 q[4];
};
struct Mask {
  I4 q[4];
};

template <typename F>
SAPWOOD_INLINE V16 Quads(F&& f) {
  return {{f(0), f(1), f(2), f(3)}};
}

SAPWOOD_INLINE V16 Set1(float x) {
  const F4 q = {x, x, x, x};
  return {{q, q, q, q}};
}
SAPWOOD_INLINE V16 Zero() { return Set1(0.0f); }
SAPWOOD_INLINE V16 Load(const float* p) {
  V16 x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
SAPWOOD_INLINE void Store(float* p, V16 x) { __builtin_memcpy(p, &x, sizeof(x)); }
SAPWOOD_INLINE V16 LoadN(const float* p, int n) {
  float lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return Load(lanes);
}
SAPWOOD_INLINE void StoreN(float* p, V16 x, int n) {
  float lanes[kLanes];
  Store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
SAPWOOD_INLINE V16 LoadN(const Bf16* p, int n) {
  float lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = Bf16ToF32(p[i]);
  return Load(lanes);
}
SAPWOOD_INLINE V16 Load(const Bf16* p) { return LoadN(p, kLanes); }
SAPWOOD_INLINE void StoreN(Bf16* p, V16 x, int n) {
  float lanes[kLanes];
  Store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = F32ToBf16(lanes[i]);
}
SAPWOOD_INLINE void Store(Bf16* p, V16 x) { StoreN(p, x, kLanes); }

// x rounded to bf16 and widened again.
SAPWOOD_INLINE V16 RoundToBf16(V16 x) {
  Bf16 lanes[kLanes];
  Store(lanes, x);
  return Load(lanes);
}
// 16 bf16 to every second place from p on.
SAPWOOD_INLINE void StoreEverySecond(Bf16* p, V16 x) {
  Bf16 lanes[kLanes];
  Store(lanes, x);
  for (int i = 0; i < kLanes; ++i) p[2 * i] = lanes[i];
}

// int8, widened exactly.
SAPWOOD_INLINE V16 WidenInt8(const int8_t* p) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(p[i]);
  return Load(lanes);
}

SAPWOOD_INLINE V16 Add(V16 a, V16 b) {
  return Quads([&](int i) __attribute__((always_inline)) { return a.q[i] + b.q[i]; });
}
SAPWOOD_INLINE V16 Sub(V16 a, V16 b) {
  return Quads([&](int i) __attribute__((always_inline)) { return a.q[i] - b.q[i]; });
}
SAPWOOD_INLINE V16 Mul(V16 a, V16 b) {
  return Quads([&](int i) __attribute__((always_inline)) { return a.q[i] * b.q[i]; });
}
SAPWOOD_INLINE V16 Div(V16 a, V16 b) {
  return Quads([&](int i) __attribute__((always_inline)) { return a.q[i] / b.q[i]; });
}
SAPWOOD_INLINE V16 Fma(V16 a, V16 b, V16 c) { return Add(Mul(a, b), c); }
SAPWOOD_INLINE V16 Max(V16 a, V16 b) {
  return Quads([&](int i) __attribute__((always_inline)) { return a.q[i] > b.q[i] ? a.q[i] : b.q[i]; });
}
SAPWOOD_INLINE V16 Min(V16 a, V16 b) {
  return Quads([&](int i) __attribute__((always_inline)) { return a.q[i] < b.q[i] ? a.q[i] : b.q[i]; });
}
SAPWOOD_INLINE V16 Sqrt(V16 a) {
  float lanes[kLanes];
  Store(lanes, a);
  for (float& x : lanes) x = __builtin_sqrtf(x);
  return Load(lanes);
}
SAPWOOD_INLINE V16 Abs(V16 a) {
  return Quads([&](int i) __attribute__((always_inline)) { return (F4)((U4)a.q[i] & 0x7fffffffu); });
}
SAPWOOD_INLINE V16 CopySign(V16 magnitude, V16 sign) {
  return Quads([&](int i) __attribute__((always_inline)) {
    return (F4)(((U4)magnitude.q[i] & 0x7fffffffu) | ((U4)sign.q[i] & 0x80000000u));
  });
}

SAPWOOD_INLINE Mask Less(V16 a, V16 b) {
  return {{a.q[0] < b.q[0], a.q[1] < b.q[1], a.q[2] < b.q[2], a.q[3] < b.q[3]}};
}
SAPWOOD_INLINE bool AnyNan(V16 a) {
  I4 nan = a.q[0] != a.q[0];
  for (int i = 1; i < 4; ++i) nan |= a.q[i] != a.q[i];
  return (nan[0] | nan[1] | nan[2] | nan[3]) != 0;
}
// Lanes [begin, end), 0 <= begin, end <= 16.
SAPWOOD_INLINE Mask LaneRange(int begin, int end) {
  const auto quad = [&](int first) __attribute__((always_inline)) {
    const I4 lane = {first, first + 1, first + 2, first + 3};
    return (lane >= begin) & (lane < end);
  };
  return {{quad(0), quad(4), quad(8), quad(12)}};
}
SAPWOOD_INLINE V16 Select(Mask m, V16 yes, V16 no) {
  return Quads([&](int i) __attribute__((always_inline)) { return m.q[i] ? yes.q[i] : no.q[i]; });
}

// 2^n for t = n + 12582912 (1.5 * 2^23), whose low bits are n: the shift drops the rest.
SAPWOOD_INLINE V16 Pow2OfMagic(V16 t) {
  return Quads([&](int i) __attribute__((always_inline)) { return (F4)(((U4)t.q[i] + 127u) << 23); });
}

// The tree of every level: lanes i and i + 8, then + 4, + 2, + 1.
SAPWOOD_INLINE float ReduceSum(V16 a) {
  const F4 s4 = (a.q[0] + a.q[2]) + (a.q[1] + a.q[3]);
  return (s4[0] + s4[2]) + (s4[1] + s4[3]);
}
SAPWOOD_INLINE float ReduceMax(V16 a) {
  const F4 s8a = a.q[0] > a.q[2] ? a.q[0] : a.q[2];
  const F4 s8b = a.q[1] > a.q[3] ? a.q[1] : a.q[3];
  const F4 s4 = s8a > s8b ? s8a : s8b;
  const float x = s4[0] > s4[2] ? s4[0] : s4[2];
  const float y = s4[1] > s4[3] ? s4[1] : s4[3];
  return x > y ? x : y;
}
SAPWOOD_INLINE float FirstLane(V16 a) { return a.q[0][0]; }

// --- bf16 pairs: acc[i] += a.first * b[i].first, then += a.second * b[i].second ---
inline constexpr bool kBf16Dot = false;  // a product of pairs is two of floats
struct PairA {
  V16 first, second;
};
struct PairB {
  V16 first, second;
};
SAPWOOD_INLINE int PairBits(const Bf16* p) { return static_cast<int>(uint32_t{p[0]} | uint32_t{p[1]} << 16); }
SAPWOOD_INLINE PairA BroadcastPairBits(int bits) {
  const uint32_t u = static_cast<uint32_t>(bits);
  return {Set1(BitsToF32(u << 16)), Set1(BitsToF32(u & 0xffff0000u))};
}
SAPWOOD_INLINE PairB LoadPair(const Bf16* p) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  U4 bits[4];
  __builtin_memcpy(bits, p, sizeof(bits));
  return {Quads([&](int i) __attribute__((always_inline)) { return (F4)(bits[i] << 16); }),
          Quads([&](int i) __attribute__((always_inline)) { return (F4)(bits[i] & 0xffff0000u); })};
#else
#error "packed bf16 pairs are little-endian"
#endif
}
SAPWOOD_INLINE V16 First(PairB b) { return b.first; }
SAPWOOD_INLINE V16 Second(PairB b) { return b.second; }
SAPWOOD_INLINE PairB KeepFirst(PairB b) { return {b.first, Zero()}; }
SAPWOOD_INLINE PairB KeepSecond(PairB b) { return {Zero(), b.second}; }
SAPWOOD_INLINE V16 PairMac(V16 acc, PairA a, PairB b) { return Fma(a.second, b.second, Fma(a.first, b.first, acc)); }

// --- int8: acc[i] += sum of four products of a weight and a signed activation ---
struct V16i {
  int32_t v[kLanes];
};
struct DotB {
  int8_t v[kLanes * 4];
};
// The weights are signed here, so there is no offset to undo.
SAPWOOD_INLINE V16i DotStart(int32_t) { return {}; }
SAPWOOD_INLINE DotB LoadInt8(const uint8_t* p) {
  DotB b;
  for (int i = 0; i < kLanes * 4; ++i) b.v[i] = static_cast<int8_t>(p[i] - 128);
  return b;
}
SAPWOOD_INLINE void LoadInt4(const uint8_t* p, DotB& low, DotB& high) {
  for (int i = 0; i < kLanes * 4; ++i) {
    low.v[i] = static_cast<int8_t>((p[i] & 15) - 8);
    high.v[i] = static_cast<int8_t>((p[i] >> 4) - 8);
  }
}
SAPWOOD_INLINE V16i Dot(V16i acc, const int8_t* a, DotB b) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < 4; ++j) acc.v[i] += b.v[4 * i + j] * a[j];
  }
  return acc;
}
SAPWOOD_INLINE V16 ToF32(V16i x) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(x.v[i]);
  return Load(lanes);
}
SAPWOOD_INLINE V16 LoadF16(const uint16_t* p) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = F16ToF32(p[i]);
  return Load(lanes);
}
// Rounds to the nearest integers, ties to even; returns their sum.
SAPWOOD_INLINE int32_t StoreInt8(int8_t* p, V16 x) {
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
  const V16 magic = Add(x, Set1(12582912.0f));
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) {
    p[i] = static_cast<int8_t>(F32ToBits(magic.q[i / 4][i % 4]));
    sum += p[i];
  }
  return sum;
}

// Register tiles: R rows x ColsFor(R) vectors of accumulators (four registers each), out of 16 registers.
inline constexpr int kMaxRowsF32 = 2;
inline constexpr int kMaxRowsBf16 = 2;
inline constexpr int ColsForF32(int rows) { return rows == 1 ? 2 : 1; }
inline constexpr int ColsForBf16(int) { return 1; }
inline constexpr int kMaxRowsPairs = 2;  // bf16 widened in registers
inline constexpr int ColsForPairs(int) { return 1; }
inline constexpr int kMaxRowsInt8 = 1;
inline constexpr int kMaxRowsInt4 = 1;  // nibbles taken apart in registers
inline constexpr int ColsForInt8(int) { return 1; }
// Of attention: rows x columns of a widened tile, which then stay in L1; rows x columns of the pages.
inline constexpr int kTallRows = 2, kTallCols = 1;
inline constexpr int kFewRows = 2;
inline constexpr int ColsForFewRows(int rows) { return rows == 1 ? 2 : 1; }

}  // namespace sapwood::SAPWOOD_LEVEL
