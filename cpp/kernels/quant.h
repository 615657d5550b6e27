// Blocks of 32 neighbours with one scale: rows of activations, made once by the node before a quantised linear layer
// (norm, SiLU-mul), and panels of weights, made once when they are loaded.
#pragma once

#include "kernels/vec_math.h"

namespace sapwood::SAPWOOD_LEVEL {

SAPWOOD_INLINE bool AnyNotFinite(V16 x) { return AnyNan(Sub(x, x)); }  // inf - inf is NaN

// values: 32 floats as two vectors. scale = max |x| / 127, q = x / scale to the nearest integer, ties to even. A NaN or an
// infinity makes the scale NaN and the integers zero: it must not vanish in their conversion, nor overflow their sum.
SAPWOOD_INLINE void QuantizeBlock(V16 x0, V16 x1, Q8Block* block) {
  const bool finite = !AnyNotFinite(x0) && !AnyNotFinite(x1);
  if (!finite) x0 = x1 = Zero();
  const float most = ReduceMax(Max(Abs(x0), Abs(x1)));
  const float scale = most * (1.0f / 127.0f);
  // Of a subnormal scale the inverse could be infinite: such a block is zero.
  const bool zero = !(scale >= 1.17549435e-38f);
  const V16 inverse = Set1(zero ? 0.0f : 1.0f / scale);
  const int32_t sum = StoreInt8(block->q, Mul(x0, inverse)) + StoreInt8(block->q + kLanes, Mul(x1, inverse));
  block->scale = !finite ? __builtin_nanf("") : zero ? 0.0f : scale;
  block->minus_8_sums = -8 * sum;
  block->minus_128_sums = -128 * sum;
}

// row(i): the vector of elements [i, i + 16), zero past the row's end.
template <typename Row>
SAPWOOD_INLINE void QuantizeRow(int64_t n, Q8Block* blocks, Row&& row) {
  for (int64_t i = 0; i < n; i += kQ8Block) QuantizeBlock(row(i), row(i + kLanes), blocks + i / kQ8Block);
}

SAPWOOD_INLINE V16 RoundToInt(V16 x) {  // of |x| < 2^22, ties to even: 1.5 * 2^23 leaves no bits behind the point
  const V16 magic = Set1(12582912.0f);
  return Sub(Add(x, magic), magic);
}

struct QuantizedBlock {
  float q[kQ8Block];  // integers
  uint16_t scale;     // f16
};

// scale = max |x| / 127, as ggml's Q8_0, but rounded to f16 before the division, so that its rounding costs nothing.
SAPWOOD_INLINE void QuantizeInt8(V16 x0, V16 x1, QuantizedBlock* out) {
  out->scale = F32ToF16(ReduceMax(Max(Abs(x0), Abs(x1))) * (1.0f / 127.0f));
  const float scale = F16ToF32(out->scale);
  const V16 inverse = Set1(scale > 0 ? 1.0f / scale : 0.0f), most = Set1(127.0f), least = Set1(-127.0f);
  Store(out->q, Max(Min(RoundToInt(Mul(x0, inverse)), most), least));
  Store(out->q + kLanes, Max(Min(RoundToInt(Mul(x1, inverse)), most), least));
}

// Integers in [-8, 7]. The element of largest magnitude goes to each of a few places near the ends of that range; for the
// integers that follow, the scale of least squares error is sum(q x) / sum(q q), and the place that explains most of
// sum(x x) is kept. ggml's Q4_0 is the first place alone, without the refit.
SAPWOOD_INLINE void QuantizeInt4(V16 x0, V16 x1, QuantizedBlock* out) {
  static constexpr float kPlaces[] = {-8.0f, -7.6f, -7.2f, -6.8f, -8.5f, -9.0f, 7.4f, 7.0f, 6.5f};
  const float high = ReduceMax(Max(x0, x1)), low = ReduceMax(Max(Sub(Zero(), x0), Sub(Zero(), x1)));
  const float extreme = high > low ? high : -low;
  // A subnormal f16 is so coarse that rounding the scale can cost more than a place gains.
  const bool coarse = (high > low ? high : low) < 9 * 0x1p-14f;
  const V16 most = Set1(7.0f), least = Set1(-8.0f);
  float best = -1.0f, best_scale = 0.0f;
  V16 best0 = Zero(), best1 = Zero();
  for (const float place : kPlaces) {
    if (extreme == 0) break;
    const V16 inverse = Set1(place / extreme);
    const V16 q0 = Max(Min(RoundToInt(Mul(x0, inverse)), most), least);
    const V16 q1 = Max(Min(RoundToInt(Mul(x1, inverse)), most), least);
    const float qx = ReduceSum(Fma(q0, x0, Mul(q1, x1))), qq = ReduceSum(Fma(q0, q0, Mul(q1, q1)));
    const float refit = qx / qq, scale = coarse ? F16ToF32(F32ToF16(refit)) : refit;
    const float explained = scale * (2 * qx - scale * qq);
    if (explained > best) {
      best = explained;
      best_scale = scale;
      best0 = q0;
      best1 = q1;
    }
  }
  out->scale = F32ToF16(best_scale);
  Store(out->q, best0);
  Store(out->q + kLanes, best1);
}

// One panel of 64 outputs from rows of k floats; a null row is zero. A NaN, or what is too large for a scale in f16, makes
// the scale of its block NaN.
inline void QuantizePanel(WeightFormat format, const float* const* rows, int64_t k, uint8_t* panel) {
  const bool nibbles = format == WeightFormat::kInt4;
  const int64_t value_bytes = kPanel * (nibbles ? kQ8Block / 2 : kQ8Block), group_bytes = value_bytes + 2 * kPanel;
  const float most = 65504.0f * (nibbles ? 7 : 127);
  for (int64_t first = 0; first < k; first += kQ8Block, panel += group_bytes) {
    for (int64_t row = 0; row < kPanel; ++row) {
      const auto load = [&](int64_t i) __attribute__((always_inline)) {
        const int n = static_cast<int>(Max64(0, Min64(kLanes, k - i)));
        return rows[row] == nullptr || n == 0 ? Zero() : n == kLanes ? Load(rows[row] + i) : LoadN(rows[row] + i, n);
      };
      const V16 x0 = load(first), x1 = load(first + kLanes);
      QuantizedBlock block;
      if (nibbles) {
        QuantizeInt4(x0, x1, &block);
      } else {
        QuantizeInt8(x0, x1, &block);
      }
      if (AnyNan(x0) || AnyNan(x1) || ReduceMax(Max(Abs(x0), Abs(x1))) > most) {
        block.scale = 0x7e00;
        for (float& q : block.q) q = 1.0f;
      }
      const int offset = nibbles ? 8 : 128;
      uint8_t bytes[kQ8Block];
      for (int i = 0; i < kQ8Block; ++i) bytes[i] = static_cast<uint8_t>(static_cast<int>(block.q[i]) + offset);
      for (int four = 0; four < (nibbles ? kQ8Block / 8 : kQ8Block / 4); ++four) {
        uint8_t* to = panel + (four * kPanel + row) * 4;
        for (int i = 0; i < 4; ++i) {
          to[i] = nibbles ? static_cast<uint8_t>(bytes[8 * four + i] | bytes[8 * four + 4 + i] << 4) : bytes[4 * four + i];
        }
      }
      __builtin_memcpy(panel + value_bytes + 2 * row, &block.scale, 2);
    }
  }
}

}  // namespace sapwood::SAPWOOD_LEVEL
