// One token after the QKV linear: per-head RMSNorm, rotary embedding, q to the attention's input, K and V to the page.
//
// Rotation of pairs (i, i + rotary_dim / 2): Su et al., RoFormer, in the half-split order of GPT-NeoX. Every value is
// rounded to act once, when it is stored.
#pragma once

#include "kernels/norm.h"

namespace sapwood::SAPWOOD_LEVEL {

// The pages of kernels.h, addressed by one (kv head, offset). KvLayout's own members are not called here: see level.h.
template <typename T>
struct TokenInPage {
  static constexpr int64_t kPair = Operand<T>::kStep;  // f32: 1, bf16: 2 neighbours interleaved
  T* k;
  T* v;
  int64_t padded_dim, page_size, offset;

  TokenInPage(const KvLayout& layout, void* page, int64_t kv_head, int64_t at)
      : padded_dim((layout.head_dim + 15) / 16 * 16), page_size(layout.page_size), offset(at) {
    const int64_t block = padded_dim * page_size;
    k = static_cast<T*>(page) + 2 * kv_head * block;
    v = k + block;
  }
  SAPWOOD_INLINE T& K(int64_t d) const { return k[(d / kPair * page_size + offset) * kPair + d % kPair]; }
  SAPWOOD_INLINE T& V(int64_t d) const { return v[(offset / kPair * padded_dim + d) * kPair + offset % kPair]; }
};

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

template <typename T>
void RopeKvOf(const RopeKvArgs& args) {
  const int64_t head_dim = args.layout.head_dim;
  const int64_t num_kv_heads = args.layout.num_kv_heads;
  for (int64_t h = 0; h < args.num_q_heads; ++h) {
    T* q = static_cast<T*>(args.q_out) + h * head_dim;
    NormRotateHead(args, args.qkv + h * head_dim, args.q_norm,
                   [&](int64_t d, V16 x, int n) __attribute__((always_inline)) { StoreLanes(q + d, x, n); });
  }
  const float* k = args.qkv + args.num_q_heads * head_dim;
  const float* v = k + num_kv_heads * head_dim;
  for (int64_t h = 0; h < num_kv_heads; ++h) {
    const TokenInPage<T> token(args.layout, args.page, h, args.offset);
    T lanes[kLanes];
    NormRotateHead(args, k + h * head_dim, args.k_norm, [&](int64_t d, V16 x, int n) __attribute__((always_inline)) {
      Store(lanes, x);
      for (int i = 0; i < n; ++i) token.K(d + i) = lanes[i];
    });
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const int n = ValidLanes(head_dim, d);
      Store(lanes, LoadLanes(v + h * head_dim + d, n));
      for (int i = 0; i < n; ++i) token.V(d + i) = lanes[i];
    }
    for (int64_t d = head_dim; d < token.padded_dim; ++d) token.K(d) = token.V(d) = T{0};
  }
}

inline void RopeKv(DType act, const RopeKvArgs& args) {
  if (act == DType::kBF16) {
    RopeKvOf<Bf16>(args);
  } else {
    RopeKvOf<float>(args);
  }
}

}  // namespace sapwood::SAPWOOD_LEVEL
