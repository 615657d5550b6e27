// RMSNorm, embedding and quantisation of one row, and the sum of squares that per-head norms share.
#pragma once

#include "kernels/gemm.h"

namespace sapwood::SAPWOOD_LEVEL {

// 1 / sqrt(mean(x^2) + eps): 16 lanes, elements ascending in each, then the fixed tree.
SAPWOOD_INLINE float InverseRms(const float* x, int64_t h, float eps) {
  V16 sum = Zero();
  int64_t i = 0;
  for (; i + kLanes <= h; i += kLanes) {
    const V16 v = Load(x + i);
    sum = Fma(v, v, sum);
  }
  if (i < h) {
    const V16 v = LoadN(x + i, static_cast<int>(h - i));
    sum = Fma(v, v, sum);
  }
  const float mean = ReduceSum(sum) / static_cast<float>(h);
  return FirstLane(Div(Set1(1.0f), Sqrt(Set1(mean + eps))));
}

template <typename T>
void RmsNormOf(const float* x, const float* w, T* y, int64_t h, float eps, bool plus_one) {
  const V16 r = Set1(InverseRms(x, h, eps));
  for (int64_t i = 0; i < h; i += kLanes) {
    const int n = ValidLanes(h, i);
    V16 weight = LoadLanes(w + i, n);
    if (plus_one) weight = Add(Set1(1.0f), weight);
    StoreLanes(y + i, Mul(Mul(LoadLanes(x + i, n), r), weight), n);
  }
}

inline void RmsNormQ8(const float* x, const float* w, Q8Block* y, int64_t h, float eps, bool plus_one) {
  const V16 r = Set1(InverseRms(x, h, eps));
  QuantizeRow(h, y, [&](int64_t i) __attribute__((always_inline)) {
    const int n = ValidLanes(h, i);
    if (n == 0) return Zero();
    V16 weight = LoadLanes(w + i, n);
    if (plus_one) weight = Add(Set1(1.0f), weight);
    return Mul(Mul(LoadLanes(x + i, n), r), weight);
  });
}

inline void RmsNorm(DType y_dtype, const float* x, const float* w, void* y, int64_t h, float eps, bool plus_one) {
  switch (y_dtype) {
    case DType::kQ8: return RmsNormQ8(x, w, static_cast<Q8Block*>(y), h, eps, plus_one);
    case DType::kBF16: return RmsNormOf(x, w, static_cast<Bf16*>(y), h, eps, plus_one);
    default: return RmsNormOf(x, w, static_cast<float*>(y), h, eps, plus_one);
  }
}

template <typename T>
void QuantizeOf(const T* x, Q8Block* y, int64_t h) {
  QuantizeRow(h, y, [&](int64_t i) __attribute__((always_inline)) {
    const int n = ValidLanes(h, i);
    return n == kLanes ? Load(x + i) : n > 0 ? LoadN(x + i, n) : Zero();
  });
}

inline void Quantize(DType act, const void* x, Q8Block* y, int64_t h) {
  if (act == DType::kBF16) {
    QuantizeOf(static_cast<const Bf16*>(x), y, h);
  } else {
    QuantizeOf(static_cast<const float*>(x), y, h);
  }
}

template <typename T>
void EmbedOf(const T* row, float* x, int64_t h, float scale) {
  for (int64_t i = 0; i < h; i += kLanes) {
    const int n = ValidLanes(h, i);
    const V16 v = n == kLanes ? Load(row + i) : LoadN(row + i, n);
    StoreLanes(x + i, Mul(v, Set1(scale)), n);
  }
}

inline void Embed(DType act, const void* table_row, float* x, int64_t h, float scale) {
  if (act == DType::kBF16) {
    EmbedOf(static_cast<const Bf16*>(table_row), x, h, scale);
  } else {
    EmbedOf(static_cast<const float*>(table_row), x, h, scale);
  }
}

}  // namespace sapwood::SAPWOOD_LEVEL
