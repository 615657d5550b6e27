// Paged attention of one segment's query rows against one kv head; prefill and decode are this one function.
//
// A row is a (query, q head) pair, and what happens to it depends on its own range of keys [lo, hi) alone:
//
//   total = empty
//   for each chunk of 256 absolute positions that meets [lo, hi):
//     part = empty                                     (m, l, O) = (-inf, 0, 0)
//     for each tile of 64 absolute positions in it that meets [lo, hi):
//       s = softcap(scale * q.k), -inf outside [lo, hi)     one chain per key, dims ascending
//       m' = max(m, max s);  p = act(exp(s - m'))
//       l = l * exp(m - m') + sum p;  O = O * exp(m - m') + sum p v      keys ascending; never a key outside [lo, hi)
//     total = merge(total, part)
//   out = act(O / l)
//
// Rows are taken up to kBlockRows at a time so that a tile read once serves all of them; that changes no chain.
// Online softmax over tiles: Milakov and Gimelshein 2018; FlashAttention-2 (arXiv 2307.08691).
#pragma once

#include "kernels/attention_tiles.h"
#include "kernels/gemm.h"
#include "kernels/micro.h"
#include "kernels/vec_math.h"

namespace sapwood::SAPWOOD_LEVEL {

inline constexpr int kTileVectors = kTile / kLanes;

// K and V of the 16 tokens of each vector of a tile.
template <typename T>
struct TileVectors {
  const T* k[kTileVectors];
  const T* v[kTileVectors];
};

template <typename T>
struct AttentionBlock {
  // Rows.
  const T* q[kBlockRows];
  T* out[kBlockRows];
  int64_t lo[kBlockRows], hi[kBlockRows];
  // Running softmax of the chunk and of all chunks before it.
  float m[kBlockRows], l[kBlockRows], m_total[kBlockRows], l_total[kBlockRows];
  float* scores;   // [kBlockRows][kTile]
  T* p;            // [kBlockRows][kTile]
  float* o;        // [kBlockRows][padded_dim]
  float* o_total;  // [kBlockRows][padded_dim]
  int64_t t0;      // first token of the tile
  TileVectors<T> tile;
  // The tile after it, prefetched during this one when few rows make memory the bound: pages lie anywhere, so the
  // hardware would have to find each 2 to 16 KB run anew.
  TileVectors<T> next;
  bool prefetch;
  int64_t page_size, padded_dim, head_dim;

  SAPWOOD_INLINE int Begin(int64_t row) const { return static_cast<int>(Max64(0, lo[row] - t0)); }
  SAPWOOD_INLINE int End(int64_t row) const { return static_cast<int>(Min64(kTile, hi[row] - t0)); }
};

// The tile of tokens [t0, t0 + 64), of which those in [begin, end) are wanted (one at least). A page without a wanted
// token may not be there: its vectors get the same place on one that is, and what is computed from them is masked.
template <typename T>
TileVectors<T> LocateTile(const AttentionArgs& args, const AttentionBlock<T>& block, int64_t t0, int64_t begin,
                          int64_t end) {
  const int64_t block_elements = block.padded_dim * block.page_size;
  const int64_t page_elements = 2 * block_elements * args.layout.num_kv_heads;
  const T* head = static_cast<const T*>(args.kv) + 2 * args.kv_head * block_elements;
  const int64_t first_page = Max64(begin, t0) / block.page_size;
  const int64_t last_page = (Min64(end, t0 + kTile) - 1) / block.page_size;
  TileVectors<T> tile;
  for (int i = 0; i < kTileVectors; ++i) {
    const int64_t token = t0 + i * kLanes;
    const int64_t page = token / block.page_size, offset = token - page * block.page_size;
    const T* k = head + args.page_table[Min64(last_page, Max64(first_page, page))] * page_elements;
    tile.k[i] = k + offset * Operand<T>::kStep;
    tile.v[i] = k + block_elements + offset * block.padded_dim;
  }
  return tile;
}

template <typename T, int R>
void Scores(const AttentionBlock<T>& block, int64_t row) {
  constexpr int C = Operand<T>::Cols(R);
  const T* rows[R];
  Unroll<R>([&](auto r) __attribute__((always_inline)) { rows[r.value] = block.q[row + r.value]; });
  for (int i = 0; i < kTileVectors; i += C) {
    const T* columns[C];
    Unroll<C>([&](auto c) __attribute__((always_inline)) { columns[c.value] = block.tile.k[i + c.value]; });
    Acc<R, C> acc;
    ZeroAcc(acc);
    MacElements<T, R, C>(acc, rows, columns, block.page_size * Operand<T>::kStep, block.head_dim,
                         block.prefetch ? block.next.k + i : nullptr);
    StoreAcc(acc, block.scores + row * kTile + i * kLanes, kTile);
  }
}

// scores -> p, m, l; rescales o.
template <typename T>
void SoftmaxTile(const AttentionArgs& args, AttentionBlock<T>& block, int64_t row) {
  const int begin = block.Begin(row), end = block.End(row);
  const float* scores = block.scores + row * kTile;
  T* p = block.p + row * kTile;

  V16 s[kTileVectors];
  Unroll<kTileVectors>([&](auto i) __attribute__((always_inline)) {
    V16 x = Mul(Load(scores + i.value * kLanes), Set1(args.scale));
    if (args.softcap > 0) x = SoftCap(x, args.softcap);
    const int first = i.value * kLanes;
    const int from = static_cast<int>(Min64(kLanes, Max64(0, begin - first)));
    const int to = ValidLanes(end, first);
    s[i.value] = Select(LaneRange(from, to), x, Set1(-__builtin_inff()));
  });
  const float m_old = block.m[row];
  const float m_tile = ReduceMax(Max(Max(s[0], s[1]), Max(s[2], s[3])));
  const float m_new = m_tile > m_old ? m_tile : m_old;

  Unroll<kTileVectors>([&](auto i) __attribute__((always_inline)) {
    Store(p + i.value * kLanes, Exp(Sub(s[i.value], Set1(m_new))));
    s[i.value] = Load(p + i.value * kLanes);  // as rounded: the sum is over what multiplies V
  });
  const float sum = ReduceSum(Add(Add(s[0], s[1]), Add(s[2], s[3])));

  const V16 alpha = Exp(Set1(m_old - m_new));
  block.m[row] = m_new;
  block.l[row] = FirstLane(Fma(Set1(block.l[row]), alpha, Set1(sum)));
  if (m_new != m_old) {  // else alpha is exactly 1
    float* o = block.o + row * block.padded_dim;
    for (int64_t d = 0; d < block.padded_dim; d += kLanes) Store(o + d, Mul(Load(o + d), alpha));
  }
}

// o[R][C vectors from dim d] += p x v over steps [begin, end) of the tile.
template <typename T, int R, int C>
SAPWOOD_INLINE void OutputDims(const AttentionBlock<T>& block, int64_t row, int64_t d, int64_t begin, int64_t end) {
  constexpr int64_t kStep = Operand<T>::kStep;
  const int64_t page_steps = block.page_size / kStep;
  float* o = block.o + row * block.padded_dim + d;
  Acc<R, C> acc;
  LoadAcc(acc, o, block.padded_dim);
  for (int64_t step = begin; step < end;) {
    const int64_t page = step / page_steps;
    const int64_t page_end = Min64(end, (page + 1) * page_steps);
    const int64_t vector = page * block.page_size / kLanes;
    const int64_t offset = (step - page * page_steps) * block.padded_dim * kStep + d * kStep;
    const T* columns[C];
    const T* ahead[C];
    Unroll<C>([&](auto c) __attribute__((always_inline)) {
      columns[c.value] = block.tile.v[vector] + offset + c.value * kLanes * kStep;
      ahead[c.value] = block.next.v[vector] + offset + c.value * kLanes * kStep;
    });
    const T* rows[R];
    Unroll<R>([&](auto r)
                  __attribute__((always_inline)) { rows[r.value] = block.p + (row + r.value) * kTile + step * kStep; });
    MacSteps<T, R, C>(acc, rows, columns, block.padded_dim * kStep, page_end - step, block.prefetch ? ahead : nullptr);
    step = page_end;
  }
  StoreAcc(acc, o, block.padded_dim);
}

template <typename T, int R>
void OutputSteps(const AttentionBlock<T>& block, int64_t row, int64_t begin, int64_t end) {
  if (begin >= end) return;
  constexpr int C = Operand<T>::Cols(R);
  int64_t d = 0;
  for (; d + C * kLanes <= block.padded_dim; d += C * kLanes) OutputDims<T, R, C>(block, row, d, begin, end);
  if constexpr (C > 1) {
    for (; d < block.padded_dim; d += kLanes) OutputDims<T, R, 1>(block, row, d, begin, end);
  }
}

// A pair of tokens of which the row sees one: the other's V is cleared, not multiplied by zero (it may be NaN).
template <typename T>
void OutputHalfPair(const AttentionBlock<T>& block, int64_t row, int64_t pair, bool keep_first) {
  if constexpr (Operand<T>::kStep == 2) {
    const int64_t token = 2 * pair;
    const int64_t page = token / block.page_size;
    const T* v = block.tile.v[page * block.page_size / kLanes] + (token - page * block.page_size) * block.padded_dim;
    float* o = block.o + row * block.padded_dim;
    const PairA p = Operand<T>::Broadcast(block.p + row * kTile + token);
    for (int64_t d = 0; d < block.padded_dim; d += kLanes) {
      const PairB both = LoadPair(v + d * 2);
      Store(o + d, PairMac(Load(o + d), p, keep_first ? KeepFirst(both) : KeepSecond(both)));
    }
  }
}

// Rows [row, row + R): steps that all of them see go together, the rest row by row, each row's tokens ascending.
template <typename T, int R>
void Output(const AttentionBlock<T>& block, int64_t row) {
  constexpr int kStep = Operand<T>::kStep;
  int64_t first[R], last[R];  // whole steps of a row
  int64_t common_first = 0, common_last = kTile / kStep;
  for (int r = 0; r < R; ++r) {
    first[r] = (block.Begin(row + r) + kStep - 1) / kStep;
    last[r] = block.End(row + r) / kStep;
    common_first = Max64(common_first, first[r]);
    common_last = Min64(common_last, last[r]);
  }
  const bool together = common_first < common_last;
  for (int r = 0; r < R; ++r) {
    if (block.Begin(row + r) % kStep != 0) OutputHalfPair(block, row + r, first[r] - 1, false);
    OutputSteps<T, 1>(block, row + r, first[r], together ? common_first : last[r]);
  }
  if (together) OutputSteps<T, R>(block, row, common_first, common_last);
  for (int r = 0; r < R; ++r) {
    if (together) OutputSteps<T, 1>(block, row + r, common_last, last[r]);
    if (block.End(row + r) % kStep != 0) OutputHalfPair(block, row + r, last[r], true);
  }
}

// total = merge(total, part); with an empty total this copies, since exp(-inf) = 0 and exp(0) = 1 exactly.
template <typename T>
void MergeChunk(AttentionBlock<T>& block, int64_t row) {
  const float m_total = block.m_total[row], m = block.m[row];
  const float m_new = m > m_total ? m : m_total;
  const V16 a = Exp(Set1(m_total - m_new)), b = Exp(Set1(m - m_new));
  block.m_total[row] = m_new;
  block.l_total[row] = FirstLane(Fma(Set1(block.l_total[row]), a, Mul(Set1(block.l[row]), b)));
  const float* o = block.o + row * block.padded_dim;
  float* o_total = block.o_total + row * block.padded_dim;
  for (int64_t d = 0; d < block.padded_dim; d += kLanes) {
    Store(o_total + d, Fma(Load(o_total + d), a, Mul(Load(o + d), b)));
  }
}

template <typename T>
void AttendTile(const AttentionArgs& args, AttentionBlock<T>& block, int64_t num_rows, int64_t t0) {
  // lo and hi ascend over the rows, so those that meet the tile stand together.
  int64_t r0 = 0, r1 = num_rows;
  while (r0 < r1 && block.hi[r0] <= t0) ++r0;
  while (r1 > r0 && block.lo[r1 - 1] >= t0 + kTile) --r1;
  if (r0 == r1) return;
  block.t0 = t0;
  block.tile = LocateTile(args, block, t0, block.lo[r0], block.hi[r1 - 1]);
  const int64_t end = block.hi[num_rows - 1];
  block.prefetch = num_rows <= Operand<T>::kMaxRows && t0 + kTile < end;
  block.next = block.prefetch ? LocateTile(args, block, t0 + kTile, t0 + kTile, end) : block.tile;
  ForRowBlocks<Operand<T>::kMaxRows>(
      r1 - r0, [&](auto rows, int64_t row) __attribute__((always_inline)) { Scores<T, rows.value>(block, r0 + row); });
  for (int64_t row = r0; row < r1; ++row) SoftmaxTile(args, block, row);
  ForRowBlocks<Operand<T>::kMaxRows>(
      r1 - r0, [&](auto rows, int64_t row) __attribute__((always_inline)) { Output<T, rows.value>(block, r0 + row); });
}

template <typename T>
void AttendBlock(const AttentionArgs& args, AttentionBlock<T>& block, int64_t num_rows) {
  const int64_t padded_dim = block.padded_dim;
  for (int64_t row = 0; row < num_rows; ++row) {
    block.m_total[row] = -__builtin_inff();
    block.l_total[row] = 0;
  }
  for (int64_t i = 0; i < num_rows * padded_dim; i += kLanes) Store(block.o_total + i, Zero());

  const int64_t tile_end = (block.hi[num_rows - 1] + kTile - 1) / kTile;
  for (int64_t tile = block.lo[0] / kTile; tile < tile_end;) {
    const int64_t chunk = tile / kTilesPerChunk;
    const int64_t chunk_end = Min64(tile_end, (chunk + 1) * kTilesPerChunk);
    for (int64_t row = 0; row < num_rows; ++row) {
      block.m[row] = -__builtin_inff();
      block.l[row] = 0;
    }
    for (int64_t i = 0; i < num_rows * padded_dim; i += kLanes) Store(block.o + i, Zero());
    for (; tile < chunk_end; ++tile) AttendTile(args, block, num_rows, tile * kTile);
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t begin = chunk * kTilesPerChunk * kTile, end = begin + kTilesPerChunk * kTile;
      if (block.lo[row] < end && block.hi[row] > begin) MergeChunk(block, row);
    }
  }

  for (int64_t row = 0; row < num_rows; ++row) {
    const V16 l = Set1(block.l_total[row]);
    for (int64_t d = 0; d < block.head_dim; d += kLanes) {
      const int n = ValidLanes(block.head_dim, d);
      StoreLanes(block.out[row] + d, Div(Load(block.o_total + row * padded_dim + d), l), n);
    }
  }
}

template <typename T>
void AttentionOf(const AttentionArgs& args) {
  const KvLayout& layout = args.layout;
  AttentionBlock<T> block;
  block.head_dim = layout.head_dim;
  block.padded_dim = (layout.head_dim + 15) / 16 * 16;
  block.page_size = layout.page_size;
  float* scratch = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(args.scratch) + 63) / 64 * 64);
  block.scores = scratch;
  block.p = reinterpret_cast<T*>(scratch + kBlockRows * kTile);
  block.o = scratch + 2 * kBlockRows * kTile;
  block.o_total = block.o + kBlockRows * block.padded_dim;

  const int64_t group = args.num_q_heads / layout.num_kv_heads;
  const int64_t num_rows = args.q_len * group;
  for (int64_t first = 0; first < num_rows; first += kBlockRows) {
    const int64_t n = Min64(kBlockRows, num_rows - first);
    for (int64_t row = 0; row < n; ++row) {
      const int64_t query = (first + row) / group;
      const int64_t column = (args.kv_head * group + (first + row) % group) * block.head_dim;
      block.q[row] = static_cast<const T*>(args.q) + (args.q_begin + query) * args.ldq + column;
      block.out[row] = static_cast<T*>(args.out) + (args.q_begin + query) * args.ldo + column;
      block.hi[row] = args.first_position + query + 1;
      block.lo[row] = args.window > 0 ? Max64(0, block.hi[row] - args.window) : 0;
    }
    AttendBlock(args, block, n);
  }
}

inline void Attention(DType act, const AttentionArgs& args) {
  if (act == DType::kBF16) {
    AttentionOf<Bf16>(args);
  } else {
    AttentionOf<float>(args);
  }
}

}  // namespace sapwood::SAPWOOD_LEVEL
