// One token after the QKV linear: per-head RMSNorm, rotary embedding, q to the attention's input, K and V to the page.
//
// Rotation of pairs (i, i + rotary_dim / 2): Su et al., RoFormer, in the half-split order of GPT-NeoX. Every value is
// rounded once, when it is stored: to act, or to int8 with a scale per token and head.
#pragma once

#include "kernels/kv_page.h"
#include "kernels/norm.h"

namespace sapwood::SAPWOOD_LEVEL {

// store(d, x, n): dims [d, d + n) of the head are the first n lanes of x.
template <typename Store>
SAPWOOD_INLINE void NormRotateHead(const RopeKvArgs& args, const float* x, const float* norm, Store&& store) {
  const int64_t head_dim = args.layout.head_dim;
  const V16 r = Set1(norm ? InverseRms(x, head_dim, args.norm_eps) : 1.0f);
  const auto normed = [&](int64_t d, int n) __attribute__((always_inline)) {
    const V16 v = LoadLanes(x + d, n);
    return norm ? Mul(Mul(v, r), LoadLanes(norm + d, n)) : v;
  };
  const int64_t half = args.rotary_dim / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int n = ValidLanes(half, i);
    const V16 a = normed(i, n), b = normed(half + i, n);
    const V16 cos = LoadLanes(args.cos + i, n), sin = LoadLanes(args.sin + i, n);
    store(i, Fma(a, cos, Sub(Zero(), Mul(b, sin))), n);
    store(half + i, Fma(b, cos, Mul(a, sin)), n);
  }
  for (int64_t d = args.rotary_dim; d < head_dim; d += kLanes) {
    const int n = ValidLanes(head_dim, d);
    store(d, normed(d, n), n);
  }
}

// x [padded_dim] of one token's K into its page: 16 lines that hold one value, or pair, of it each.
SAPWOOD_INLINE void StoreK(float* block, int64_t page_size, int64_t offset, const float* x, int64_t padded_dim) {
  for (int64_t d = 0; d < padded_dim; ++d) block[d * page_size + offset] = x[d];
}
SAPWOOD_INLINE void StoreK(Bf16* block, int64_t page_size, int64_t offset, const float* x, int64_t padded_dim) {
  for (int64_t d = 0; d < padded_dim; d += kLanes) {
    Bf16 lanes[kLanes];
    Store(lanes, Load(x + d));
    for (int i = 0; i < kLanes; i += 2) {
      __builtin_memcpy(block + ((d + i) / 2 * page_size + offset) * 2, lanes + i, 2 * sizeof(Bf16));
    }
  }
}
// The same of V.
SAPWOOD_INLINE void StoreV(float* block, int64_t offset, const float* x, int64_t padded_dim) {
  for (int64_t d = 0; d < padded_dim; d += kLanes) Store(block + offset * padded_dim + d, Load(x + d));
}
SAPWOOD_INLINE void StoreV(Bf16* block, int64_t offset, const float* x, int64_t padded_dim) {
  Bf16* const row = block + offset / 2 * 2 * padded_dim + offset % 2;
  for (int64_t d = 0; d < padded_dim; d += kLanes) StoreEverySecond(row + 2 * d, Load(x + d));
}

// x[i] becomes whole numbers: see KvLayout. Returns the scale.
SAPWOOD_INLINE float QuantizeHead(float* x, int64_t padded_dim) {
  V16 max = Zero(), nan = Zero();
  for (int64_t d = 0; d < padded_dim; d += kLanes) {
    const V16 v = Load(x + d);
    max = Max(Abs(v), max);
    nan = Fma(v, Zero(), nan);  // NaN where v is NaN or infinite
  }
  const float amax = ReduceMax(max);
  const bool bad = AnyNan(nan), tiny = amax < kMinKvAmax;
  const V16 inverse = Set1(127.0f / amax);
  for (int64_t d = 0; d < padded_dim; d += kLanes) {
    Store(x + d, bad || tiny ? Zero() : RoundToInt(Mul(Load(x + d), inverse)));
  }
  return bad ? __builtin_nanf("") : tiny ? 0.0f : amax / 127.0f;
}

// K and V of one token and head, [padded_dim] each, which are overwritten.
template <typename Kv>
SAPWOOD_INLINE void StoreToken(const RopeKvArgs& args, int64_t kv_head, float* k, float* v) {
  const HeadInPage<Kv> head(args.layout, kv_head);
  const int64_t page_size = args.layout.page_size, padded_dim = head.padded_dim;
  char* const place = static_cast<char*>(args.page) + head.first;
  Kv* const k_block = reinterpret_cast<Kv*>(place);
  Kv* const v_block = reinterpret_cast<Kv*>(place + head.block_bytes);
  if constexpr (sizeof(Kv) == 1) {
    float* const scales = reinterpret_cast<float*>(place + 2 * head.block_bytes) + args.offset;
    scales[0] = QuantizeHead(k, padded_dim);
    scales[page_size] = QuantizeHead(v, padded_dim);
    for (int64_t d = 0; d < padded_dim; d += kLanes) {
      int8_t lanes[kLanes];
      StoreInt8(lanes, Load(k + d));
      for (int i = 0; i < kLanes; ++i) k_block[(d + i) * page_size + args.offset] = lanes[i];
      StoreInt8(v_block + args.offset * padded_dim + d, Load(v + d));
    }
  } else {
    StoreK(k_block, page_size, args.offset, k, padded_dim);
    StoreV(v_block, args.offset, v, padded_dim);
  }
}

// The lines of a page that a token's K and V of a head will be written to: one for each dim, or pair of dims, of K, and a
// page that another step wrote last has left the caches. Written to without this, they would be fetched one by one.
template <typename Kv>
SAPWOOD_INLINE void FetchToken(const RopeKvArgs& args, int64_t kv_head) {
  const HeadInPage<Kv> head(args.layout, kv_head);
  constexpr int64_t kBytes = sizeof(Kv), kPair = sizeof(Kv) == sizeof(Bf16) ? 2 : 1;
  const int64_t k_row = args.layout.page_size * kPair * kBytes, v_row = head.padded_dim * kPair * kBytes;
  const char* const k = static_cast<const char*>(args.page) + head.first + args.offset * kPair * kBytes;
  const char* const v =
      static_cast<const char*>(args.page) + head.first + head.block_bytes + args.offset / kPair * v_row;
  for (int64_t at = 0; at < head.block_bytes; at += k_row < kLine ? kLine : k_row) __builtin_prefetch(k + at, 1, 2);
  for (int64_t at = 0; at < v_row; at += kLine) __builtin_prefetch(v + at, 1, 2);
}

template <typename A, typename Kv>
void RopeKvOf(const RopeKvArgs& args) {
  const int64_t head_dim = args.layout.head_dim, num_kv_heads = args.layout.num_kv_heads;
  const int64_t padded_dim = (head_dim + kLanes - 1) / kLanes * kLanes;
  for (int64_t h = 0; h < args.num_q_heads; ++h) {
    if (h < num_kv_heads) FetchToken<Kv>(args, h);
    A* q = static_cast<A*>(args.q_out) + h * head_dim;
    NormRotateHead(args, args.qkv + h * head_dim, args.q_norm,
                   [&](int64_t d, V16 x, int n) __attribute__((always_inline)) { StoreLanes(q + d, x, n); });
  }
  const float* k = args.qkv + args.num_q_heads * head_dim;
  const float* v = k + num_kv_heads * head_dim;
  // A head in one piece first: the rotation's halves may be odd, and a scale needs all of it.
  float* const k_head = static_cast<float*>(__builtin_alloca(2 * static_cast<size_t>(padded_dim) * sizeof(float)));
  float* const v_head = k_head + padded_dim;
  for (int64_t h = 0; h < num_kv_heads; ++h) {
    Store(k_head + padded_dim - kLanes, Zero());
    NormRotateHead(args, k + h * head_dim, args.k_norm,
                   [&](int64_t d, V16 x, int n) __attribute__((always_inline)) { StoreLanes(k_head + d, x, n); });
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      Store(v_head + d, LoadLanes(v + h * head_dim + d, ValidLanes(head_dim, d)));
    }
    StoreToken<Kv>(args, h, k_head, v_head);
  }
}

inline void RopeKv(DType act, const RopeKvArgs& args) {
  const bool int8 = args.layout.dtype == DType::kI8;
  if (act == DType::kBF16) {
    int8 ? RopeKvOf<Bf16, int8_t>(args) : RopeKvOf<Bf16, Bf16>(args);
  } else {
    int8 ? RopeKvOf<float, int8_t>(args) : RopeKvOf<float, float>(args);
  }
}

}  // namespace sapwood::SAPWOOD_LEVEL
