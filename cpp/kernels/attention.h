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
// int8 pages: q.k is (q . whole numbers) * (k scale * scale); V's scales go with the probabilities, p v is
// act(exp(s - m') * v scale) times whole numbers, and l sums exp(s - m') as it is.
//
// Rows are taken up to kBlockRows at a time so that a tile read once serves all of them; that changes no chain. Chunks
// may be computed by different calls (AttentionArgs.partial), which changes none either. Online softmax over
// tiles: Milakov and Gimelshein 2018; FlashAttention-2 (arXiv 2307.08691).
//
// Rows are multiplied in Work: bf16 where the level has a dot product of bf16 pairs and act is bf16, else f32. Few rows
// (decode) multiply the pages as they are read, each line once for up to kFewRows rows, while the next tile's lines are
// prefetched one by one: pages lie anywhere, so the hardware would have to find each run of 2 to 16 KB anew. Many rows
// (prefill) first widen the tile to Work into scratch, of which a slice then stays in L1 for all rows.
#pragma once

#include "kernels/attention_tiles.h"
#include "kernels/gemm.h"
#include "kernels/kv_page.h"
#include "kernels/micro.h"
#include "kernels/vec_math.h"

namespace sapwood::SAPWOOD_LEVEL {

inline constexpr int kTileVectors = kTile / kLanes;

// What rows of act A are multiplied in.
template <typename A>
using WorkOf = Choose<kBf16Dot && sizeof(A) == sizeof(Bf16), Bf16, float>;

// How pages of Kv become columns of 16 lanes of Work. p: the lanes' first element; row: elements of one dim of K, or of
// one token of V; step: one element of the chain in f32, a pair in bf16. kGroup steps share the lines they are in.
template <typename Work, typename Kv>
struct Columns;

template <>
struct Columns<float, float> {
  static constexpr int kGroup = 1;
  static SAPWOOD_INLINE V16 Step(const float* p, int64_t row, int64_t step) { return Load(p + step * row); }
};
template <>
struct Columns<float, Bf16> {
  static constexpr int kGroup = 2;
  static SAPWOOD_INLINE V16 Step(const Bf16* p, int64_t row, int64_t step) {
    const PairB pair = LoadPair(p + step / 2 * 2 * row);
    return step % 2 == 0 ? First(pair) : Second(pair);
  }
};
template <>
struct Columns<float, int8_t> {
  static constexpr int kGroup = 4;
  static SAPWOOD_INLINE V16 Step(const int8_t* p, int64_t row, int64_t step) { return WidenInt8(p + step * row); }
};
template <>
struct Columns<Bf16, Bf16> {
  static constexpr int kGroup = 1;
  static SAPWOOD_INLINE PairB Step(const Bf16* p, int64_t row, int64_t step) { return LoadPair(p + step * 2 * row); }
};
#ifdef SAPWOOD_BF16_DOT
template <>
struct Columns<Bf16, int8_t> {
  static constexpr int kGroup = 2;
  static SAPWOOD_INLINE PairB Step(const int8_t* p, int64_t row, int64_t step) {
    return PairOfSmall(WidenInt8(p + step * 2 * row), WidenInt8(p + (step * 2 + 1) * row));
  }
};
#endif

// Elements between neighbouring vectors of 16 lanes: bf16 has a pair in each lane.
template <typename Kv>
inline constexpr int64_t kVectorElements = sizeof(Kv) == sizeof(Bf16) ? 2 * kLanes : kLanes;

// A tile of K and V as columns, in pages or in scratch.
template <typename Kv>
struct TileOf {
  const Kv* k[kTileVectors];  // of 16 tokens each
  const Kv* v[kTileVectors];  // dim 0 of the first of 16 tokens
  int64_t k_row, v_row;       // as Columns' row
  int64_t v_vector;           // elements from 16 dims of V to the next 16
  int64_t run;                // tokens from one discontinuity of V to the next
};

// The lines of a tile to come. Few rows: an iteration of Columns' kGroup steps reads one line of each vector and
// prefetches one, from k and v on. Many: whole pieces, a sixteenth page or more each, k_piece and v.
struct LinesAhead {
  const char* k[kTileVectors];
  const char* k_piece[kTileVectors];
  const char* v[kTileVectors];
};

// What scores and outputs are made of: rows in Work, whatever the pages hold.
template <typename Work>
struct BlockRows {
  int64_t lo[kBlockRows], hi[kBlockRows];
  Work* q;         // [kBlockRows][padded_dim], zeros from head_dim on
  float* scores;   // [kBlockRows][kTile]; a row's probabilities take its place, as Work
  float* o;        // [kBlockRows][padded_dim]
  int64_t t0;      // first token of the tile
  LinesAhead ahead;
  bool ahead_by_steps, ahead_by_lines;  // whether and how they are prefetched
  int64_t padded_dim, head_dim;

  SAPWOOD_INLINE int Begin(int64_t row) const { return static_cast<int>(Max64(0, lo[row] - t0)); }
  SAPWOOD_INLINE int End(int64_t row) const { return static_cast<int>(Min64(kTile, hi[row] - t0)); }
  SAPWOOD_INLINE Work* P(int64_t row) const { return reinterpret_cast<Work*>(scores + row * kTile); }
};

template <typename A, typename Kv>
struct AttentionBlock : BlockRows<WorkOf<A>> {
  using Work = WorkOf<A>;
  A* out[kBlockRows];
  // Running softmax of the chunk and of all chunks before it.
  float m[kBlockRows], l[kBlockRows], m_total[kBlockRows], l_total[kBlockRows];
  float* o_total;  // [kBlockRows][padded_dim]
  Work* wide_k;    // [kTileVectors][padded_dim][kLanes], pairs of dims together in bf16
  Work* wide_v;    // [padded_dim / kLanes][kTile][kLanes], pairs of tokens together in bf16
  TileOf<Kv> pages;
  float k_scale[kTile], v_scale[kTile];  // int8 pages; k_scale with AttentionArgs.scale in it
  int64_t page_size;
};

// f(vector, head's place in its page, offset of the vector's first token there) for each 16 tokens of the tile at t0,
// of which tokens [begin, end) are wanted (one at least). A page without a wanted token may not be there: its vectors
// get the same place on one that is, and what is computed from them is masked.
template <typename Kv, typename F>
SAPWOOD_INLINE void ForTileVectors(const AttentionArgs& args, const HeadInPage<Kv>& head, int64_t t0, int64_t begin,
                                   int64_t end, F&& f) {
  const int64_t page_size = args.layout.page_size;
  const int64_t first_page = Max64(begin, t0) / page_size;
  const int64_t last_page = (Min64(end, t0 + kTile) - 1) / page_size;
  for (int i = 0; i < kTileVectors; ++i) {
    const int64_t token = t0 + i * kLanes;
    const int64_t page = token / page_size;
    const int64_t id = args.page_table[Min64(last_page, Max64(first_page, page))];
    f(i, static_cast<const char*>(args.kv) + id * head.page_bytes + head.first, token - page * page_size);
  }
}

template <typename A, typename Kv>
void LocateTile(const AttentionArgs& args, AttentionBlock<A, Kv>& block, int64_t begin, int64_t end) {
  const HeadInPage<Kv> head(args.layout, args.kv_head);
  TileOf<Kv>& tile = block.pages;
  tile.k_row = block.page_size;
  tile.v_row = block.padded_dim;
  tile.v_vector = kVectorElements<Kv>;
  tile.run = Min64(kTile, block.page_size);
  ForTileVectors(args, head, block.t0, begin, end,
                 [&](int i, const char* place, int64_t offset) __attribute__((always_inline)) {
    tile.k[i] = reinterpret_cast<const Kv*>(place) + offset / kLanes * kVectorElements<Kv>;
    tile.v[i] = reinterpret_cast<const Kv*>(place + head.block_bytes) + offset * block.padded_dim;
    if constexpr (sizeof(Kv) == 1) {
      const float* scales = reinterpret_cast<const float*>(place + 2 * head.block_bytes) + offset;
      Store(block.k_scale + i * kLanes, Mul(Load(scales), Set1(args.scale)));
      Store(block.v_scale + i * kLanes, Load(scales + block.page_size));
    }
  });
}

// The tile after this one, of which tokens up to end are wanted.
template <typename A, typename Kv>
void LocateAhead(const AttentionArgs& args, AttentionBlock<A, Kv>& block, int64_t end) {
  const HeadInPage<Kv> head(args.layout, args.kv_head);
  const int64_t t0 = block.t0 + kTile;
  ForTileVectors(args, head, t0, t0, end, [&](int i, const char* place, int64_t offset) __attribute__((always_inline)) {
    const int64_t piece = offset * block.padded_dim * static_cast<int64_t>(sizeof(Kv));
    block.ahead.k[i] = place + offset / kLanes * kLine;
    block.ahead.k_piece[i] = place + piece;
    block.ahead.v[i] = place + head.block_bytes + piece;
    if constexpr (sizeof(Kv) == 1) {
      const char* scales = place + 2 * head.block_bytes + offset * static_cast<int64_t>(sizeof(float));
      __builtin_prefetch(scales, 0, 2);
      __builtin_prefetch(scales + block.page_size * sizeof(float), 0, 2);
    }
  });
}

// acc[R][C] += a x columns over steps [begin, end): b[c] is the column's place at step 0. Prefetched meanwhile, unless
// null: ahead, per column the line at step 0, ahead_stride bytes further each group; lines, one every kStepsPerLine.
inline constexpr int64_t kStepsPerLine = 4;
template <typename Work, typename Kv, int R, int C>
SAPWOOD_INLINE void MacColumns(Acc<R, C>& acc, const Work* const (&a)[R], const Kv* const (&b)[C], int64_t row,
                               int64_t begin, int64_t end, const char* const* ahead, int64_t ahead_stride,
                               const char* lines) {
  using Op = Operand<Work>;
  using Column = Columns<Work, Kv>;
  const auto one = [&](int64_t step) __attribute__((always_inline)) {
    typename Op::B column[C];
    Unroll<C>([&](auto c) __attribute__((always_inline)) { column[c.value] = Column::Step(b[c.value], row, step); });
    Unroll<R>([&](auto r) __attribute__((always_inline)) {
      const typename Op::A x = Op::Broadcast(a[r.value] + step * Op::kStep);
      Unroll<C>([&](auto c) __attribute__((always_inline)) {
        acc.v[r.value][c.value] = Op::Mac(acc.v[r.value][c.value], x, column[c.value]);
      });
    });
  };
  constexpr int64_t kGroup = Column::kGroup;
  int64_t step = begin;
  if constexpr (R == kTallRows && C == kTallCols) {  // those that do nearly all of the work where lines are fetched
    if (lines) {
      for (; step + kStepsPerLine <= end; step += kStepsPerLine, lines += 64) {
        __builtin_prefetch(lines, 0, 2);
        Unroll<kStepsPerLine>([&](auto i) __attribute__((always_inline)) { one(step + i.value); });
      }
    }
  }
  // Whole groups, and what is left of one at either end.
  for (;;) {
    if (step % kGroup == 0) {
      for (; step + kGroup <= end; step += kGroup) {
        if (ahead) {
          Unroll<C>([&](auto c) __attribute__((always_inline)) {
            __builtin_prefetch(ahead[c.value] + step / kGroup * ahead_stride, 0, 2);
          });
        }
        Unroll<kGroup>([&](auto i) __attribute__((always_inline)) { one(step + i.value); });
      }
    }
    if (kGroup == 1 || step >= end) break;
    one(step++);
  }
}

// --- Scores ---------------------------------------------------------------------------------------------------------

// scores[R][C vectors of tokens from `first` on] = or += q.k over steps [begin, end) of the dims. begin == 0: =.
template <typename Work, typename Tile, int R, int C>
void ScoreColumns(const BlockRows<Work>& block, const TileOf<Tile>& tile, int64_t row, int first, int64_t begin,
                  int64_t end, const char* lines = nullptr) {
  const Work* rows[R];
  Unroll<R>([&](auto r)
                __attribute__((always_inline)) { rows[r.value] = block.q + (row + r.value) * block.padded_dim; });
  const Tile* columns[C];
  Unroll<C>([&](auto c) __attribute__((always_inline)) { columns[c.value] = tile.k[first + c.value]; });
  float* scores = block.scores + row * kTile + first * kLanes;
  Acc<R, C> acc;
  if (begin == 0) {
    ZeroAcc(acc);
  } else {
    LoadAcc(acc, scores, kTile);
  }
  MacColumns<Work, Tile, R, C>(acc, rows, columns, tile.k_row, begin, end,
                               block.ahead_by_steps ? block.ahead.k + first : nullptr,
                               tile.k_row * static_cast<int64_t>(sizeof(float)), lines);
  StoreAcc(acc, scores, kTile);
}

// Steps over all dims in whole groups: q is zero from head_dim on, and so is K up to padded_dim.
template <typename Work, typename Tile>
SAPWOOD_INLINE int64_t StepsOfDims(int64_t head_dim) {
  constexpr int64_t kGroup = Columns<Work, Tile>::kGroup, kDims = kGroup * Operand<Work>::kStep;
  return (head_dim + kDims - 1) / kDims * kGroup;
}

// --- Softmax --------------------------------------------------------------------------------------------------------

// As act rounds it.
template <typename A>
SAPWOOD_INLINE V16 Rounded(V16 x) {
  if constexpr (sizeof(A) == sizeof(Bf16)) return RoundToBf16(x);
  return x;
}

// Lanes of the tile's i-th vector that are keys of [begin, end).
SAPWOOD_INLINE Mask LanesSeen(int begin, int end, int i) {
  const int first = i * kLanes;
  return LaneRange(static_cast<int>(Min64(kLanes, Max64(0, begin - first))), ValidLanes(end, first));
}

// scores -> s, and the maximum with it: a loop of its own over the rows, so that no row's exponentials wait for the
// reduction.
template <typename A, typename Kv>
float ScaleScores(const AttentionArgs& args, AttentionBlock<A, Kv>& block, int64_t row) {
  const int begin = block.Begin(row), end = block.End(row);
  float* scores = block.scores + row * kTile;
  V16 s[kTileVectors];
  Unroll<kTileVectors>([&](auto i) __attribute__((always_inline)) {
    const V16 scale = sizeof(Kv) == 1 ? Load(block.k_scale + i.value * kLanes) : Set1(args.scale);
    s[i.value] = Mul(Load(scores + i.value * kLanes), scale);
  });
  if (args.softcap > 0) {
    Unroll<kTileVectors>([&](auto i)
                             __attribute__((always_inline)) { s[i.value] = SoftCap(s[i.value], args.softcap); });
  }
  if (begin > 0 || end < kTile) {
    Unroll<kTileVectors>([&](auto i) __attribute__((always_inline)) {
      s[i.value] = Select(LanesSeen(begin, end, i.value), s[i.value], Set1(-__builtin_inff()));
    });
  }
  Unroll<kTileVectors>([&](auto i) __attribute__((always_inline)) { Store(scores + i.value * kLanes, s[i.value]); });
  const float m = ReduceMax(Max(Max(s[0], s[1]), Max(s[2], s[3])));
  return m > block.m[row] ? m : block.m[row];
}

// s -> p, l; rescales o.
template <typename A, typename Kv>
void ExponentiateScores(AttentionBlock<A, Kv>& block, int64_t row, float m_new) {
  constexpr bool kInt8 = sizeof(Kv) == 1;
  const int begin = block.Begin(row), end = block.End(row);
  const float* scores = block.scores + row * kTile;
  auto* p = block.P(row);
  V16 s[kTileVectors];
  Unroll<kTileVectors>([&](auto i) __attribute__((always_inline)) { s[i.value] = Load(scores + i.value * kLanes); });
  Unroll<kTileVectors>([&](auto i) __attribute__((always_inline)) {
    const V16 e = ExpNotPositive(Sub(s[i.value], Set1(m_new)));
    if constexpr (kInt8) {
      V16 scaled = Rounded<A>(Mul(e, Load(block.v_scale + i.value * kLanes)));
      // The scale of a key outside may be NaN.
      if (begin > 0 || end < kTile) scaled = Select(LanesSeen(begin, end, i.value), scaled, Zero());
      Store(p + i.value * kLanes, scaled);
      s[i.value] = e;
    } else {
      s[i.value] = Rounded<A>(e);  // as rounded: the sum is over what multiplies V
      Store(p + i.value * kLanes, s[i.value]);
    }
  });
  const float sum = ReduceSum(Add(Add(s[0], s[1]), Add(s[2], s[3])));

  const float m_old = block.m[row];
  if (m_new == m_old) {  // alpha is exactly 1, or NaN as every p is
    block.l[row] += sum;
    return;
  }
  const V16 alpha = ExpNotPositive(Set1(m_old - m_new));
  block.m[row] = m_new;
  block.l[row] = FirstLane(Fma(Set1(block.l[row]), alpha, Set1(sum)));
  float* o = block.o + row * block.padded_dim;
  for (int64_t d = 0; d < block.padded_dim; d += kLanes) Store(o + d, Mul(Load(o + d), alpha));
}

// scores -> p, m, l; rescales o.
template <typename A, typename Kv>
void SoftmaxTile(const AttentionArgs& args, AttentionBlock<A, Kv>& block, int64_t r0, int64_t r1) {
  float m_new[kBlockRows];
  for (int64_t row = r0; row < r1; ++row) m_new[row] = ScaleScores(args, block, row);
  for (int64_t row = r0; row < r1; ++row) ExponentiateScores(block, row, m_new[row]);
}

// --- Outputs --------------------------------------------------------------------------------------------------------

// o[R][C vectors of dims from `vector` on] += p x v over steps [begin, end) of the tile.
template <typename Work, typename Tile, int R, int C>
void OutputSteps(const BlockRows<Work>& block, const TileOf<Tile>& tile, int64_t row, int64_t vector, int64_t begin,
                 int64_t end, const char* lines = nullptr) {
  constexpr int64_t kStep = Operand<Work>::kStep;
  if (begin >= end) return;
  const int64_t run = tile.run / kStep;
  float* o = block.o + row * block.padded_dim + vector * kLanes;
  Acc<R, C> acc;
  LoadAcc(acc, o, block.padded_dim);
  for (int64_t first = begin / run * run; first < end; first += run) {
    const int64_t at = first * kStep / kLanes;
    const Tile* columns[C];
    const char* ahead[C];
    const Work* rows[R];
    Unroll<C>([&](auto c) __attribute__((always_inline)) {
      columns[c.value] = tile.v[at] + (vector + c.value) * tile.v_vector;
      ahead[c.value] = block.ahead.v[at] + (vector + c.value) * 64;
    });
    Unroll<R>([&](auto r)
                  __attribute__((always_inline)) { rows[r.value] = block.P(row + r.value) + first * kStep; });
      MacColumns<Work, Tile, R, C>(acc, rows, columns, tile.v_row, Max64(begin, first) - first,
                                 Min64(end - first, run), block.ahead_by_steps ? ahead : nullptr,
                                 tile.v_row * static_cast<int64_t>(sizeof(float)), lines);
  }
  StoreAcc(acc, o, block.padded_dim);
}

// A pair of tokens of which the row sees one: the other's V is cleared, not multiplied by zero (it may be NaN).
template <typename Work, typename Tile, int C>
void OutputHalfPair(const BlockRows<Work>& block, const TileOf<Tile>& tile, int64_t row, int64_t vector, int64_t pair,
                    bool keep_first) {
  if constexpr (Operand<Work>::kStep == 2) {
    const int64_t first = 2 * pair / tile.run * tile.run;
    const PairA p = Operand<Work>::Broadcast(block.P(row) + 2 * pair);
    for (int c = 0; c < C; ++c) {
      float* o = block.o + row * block.padded_dim + (vector + c) * kLanes;
      const Tile* column = tile.v[first / kLanes] + (vector + c) * tile.v_vector;
      const PairB both = Columns<Work, Tile>::Step(column, tile.v_row, pair - first / 2);
      Store(o, PairMac(Load(o), p, keep_first ? KeepFirst(both) : KeepSecond(both)));
    }
  }
}

// Rows [row, row + R): steps that all of them see go together, the rest row by row, each row's tokens ascending.
template <typename Work, typename Tile, int R, int C>
void OutputColumns(const BlockRows<Work>& block, const TileOf<Tile>& tile, int64_t row, int64_t vector,
                   const char* lines = nullptr) {
  constexpr int kStep = Operand<Work>::kStep;
  // lo and hi ascend over the rows.
  const int begin = block.Begin(row + R - 1), end = block.End(row);
  const int64_t common_first = (begin + kStep - 1) / kStep, common_last = end / kStep;
  if (begin == block.Begin(row) && end == block.End(row + R - 1) && begin % kStep == 0 && end % kStep == 0) {
    OutputSteps<Work, Tile, R, C>(block, tile, row, vector, common_first, common_last, lines);
    return;
  }
  const bool together = common_first < common_last;
  for (int64_t r = row; r < row + R; ++r) {
    const int64_t first = (block.Begin(r) + kStep - 1) / kStep, last = block.End(r) / kStep;
    if (block.Begin(r) % kStep != 0) OutputHalfPair<Work, Tile, C>(block, tile, r, vector, first - 1, false);
    OutputSteps<Work, Tile, 1, C>(block, tile, r, vector, first, together ? common_first : last);
  }
  if (together) OutputSteps<Work, Tile, R, C>(block, tile, row, vector, common_first, common_last);
  for (int64_t r = row; r < row + R; ++r) {
    const int64_t last = block.End(r) / kStep;
    if (together) OutputSteps<Work, Tile, 1, C>(block, tile, r, vector, common_last, last);
    if (block.End(r) % kStep != 0) OutputHalfPair<Work, Tile, C>(block, tile, r, vector, last, true);
  }
}

// --- Tiles ----------------------------------------------------------------------------------------------------------

// f(Int<R>{}, row) over [r0, r1), R the largest first.
template <int R, typename F>
SAPWOOD_INLINE void ForAttentionRows(int64_t r0, int64_t r1, F&& f) {
  for (; r0 + R <= r1; r0 += R) f(Int<R>{}, r0);
  if constexpr (R > 1) {
    constexpr int kNext = R > 8 ? 8 : R > 4 ? 4 : R > 2 ? 2 : 1;
    if (r0 < r1) ForAttentionRows<kNext>(r0, r1, f);
  }
}

// Rows [r0, r1) by the pages themselves.
template <typename A, typename Kv>
void AttendFewRows(const AttentionArgs& args, AttentionBlock<A, Kv>& block, int64_t r0, int64_t r1) {
  ForAttentionRows<kFewRows>(r0, r1, [&](auto r, int64_t row) __attribute__((always_inline)) {
    constexpr int R = r.value, kCols = ColsForFewRows(R), C = kCols < kTileVectors ? kCols : kTileVectors;
    const int64_t steps = StepsOfDims<WorkOf<A>, Kv>(block.head_dim);
    for (int i = 0; i < kTileVectors; i += C) ScoreColumns<WorkOf<A>, Kv, R, C>(block, block.pages, row, i, 0, steps);
  });
  SoftmaxTile(args, block, r0, r1);
  ForAttentionRows<kFewRows>(r0, r1, [&](auto r, int64_t row) __attribute__((always_inline)) {
    constexpr int R = r.value, C = ColsForFewRows(R);
    const int64_t vectors = block.padded_dim / kLanes;
    int64_t vector = 0;
    for (; vector + C <= vectors; vector += C) OutputColumns<WorkOf<A>, Kv, R, C>(block, block.pages, row, vector);
    if constexpr (C > 1) {
      for (; vector < vectors; ++vector) OutputColumns<WorkOf<A>, Kv, R, 1>(block, block.pages, row, vector);
    }
  });
}

SAPWOOD_INLINE void StoreColumn(float* p, V16 x) { Store(p, x); }
#ifdef SAPWOOD_BF16_DOT
SAPWOOD_INLINE void StoreColumn(Bf16* p, PairB x) { StorePair(p, x); }
#endif

// The tile as Work in scratch: the columns of every 16 tokens, or dims, one after the other.
template <typename A, typename Kv>
TileOf<WorkOf<A>> WidenTile(const AttentionBlock<A, Kv>& block) {
  using Work = WorkOf<A>;
  using Column = Columns<Work, Kv>;
  constexpr int64_t kStep = Operand<Work>::kStep, kColumn = kVectorElements<Work>;
  constexpr int64_t kWideVectorElements = kWideVector * kStep;
  const TileOf<Kv>& pages = block.pages;
  TileOf<Work> tile;
  tile.k_row = tile.v_row = kLanes;
  tile.v_vector = kWideVectorElements;
  tile.run = kTile;
  for (int i = 0; i < kTileVectors; ++i) {
    Work* const k = block.wide_k + i * block.padded_dim * kLanes;
    for (int64_t step = 0; step < block.padded_dim / kStep; step += Column::kGroup) {
      Unroll<Column::kGroup>([&](auto j) __attribute__((always_inline)) {
        StoreColumn(k + (step + j.value) * kColumn, Column::Step(pages.k[i], pages.k_row, step + j.value));
      });
    }
    tile.k[i] = k;
    tile.v[i] = block.wide_v + i * kLanes * kLanes;
  }
  for (int64_t first = 0; first < kTile; first += pages.run) {
    const Kv* const v = pages.v[first / kLanes];
    for (int64_t step = 0; step < pages.run / kStep; step += Column::kGroup) {
      Work* wide = block.wide_v + (first / kStep + step) * kColumn;
      for (int64_t vector = 0; vector < block.padded_dim / kLanes; ++vector, wide += kWideVectorElements) {
        Unroll<Column::kGroup>([&](auto j) __attribute__((always_inline)) {
          StoreColumn(wide + j.value * kColumn,
                      Column::Step(v + vector * pages.v_vector, pages.v_row, step + j.value));
        });
      }
    }
  }
  return tile;
}

// The lines of the tile to come, piece by piece of K, then of V; a few for every call that multiplies, because in a
// burst they would only queue behind each other.
template <typename A, typename Kv>
struct LineFeed {
  const AttentionBlock<A, Kv>& block;
  const int64_t piece_lines, num_lines;
  int64_t line = 0;

  explicit LineFeed(const AttentionBlock<A, Kv>& b)
      : block(b),
        piece_lines(b.padded_dim * static_cast<int64_t>(sizeof(Kv)) * kLanes / 64),
        num_lines(b.ahead_by_lines ? 2 * kTileVectors * piece_lines : 0) {}
  // Where the next steps / kStepsPerLine lines are, or null.
  SAPWOOD_INLINE const char* Take(int64_t steps) {
    if (line >= num_lines) return nullptr;
    const int64_t piece = line / piece_lines;
    const char* p = piece < kTileVectors ? block.ahead.k_piece[piece] : block.ahead.v[piece - kTileVectors];
    p += (line - piece * piece_lines) * 64;
    line += steps / kStepsPerLine;
    return p;
  }
};

// Rows [r0, r1) by the tile in scratch. Slices of kSliceSteps dims of the kTallCols columns stay in L1 for all rows.
inline constexpr int64_t kSliceSteps = 64;
template <typename A, typename Kv>
void AttendManyRows(const AttentionArgs& args, AttentionBlock<A, Kv>& block, int64_t r0, int64_t r1) {
  using Work = WorkOf<A>;
  const TileOf<Work> tile = WidenTile(block);
  LineFeed<A, Kv> feed(block);
  constexpr int C = kTallCols, kHalf = C > 1 ? C / 2 : 1;
  const int64_t steps = StepsOfDims<Work, Work>(block.head_dim);
  for (int i = 0; i < kTileVectors; i += C) {
    for (int64_t begin = 0; begin < steps; begin += kSliceSteps) {
      const int64_t end = Min64(steps, begin + kSliceSteps);
      ForAttentionRows<kTallRows>(r0, r1, [&](auto r, int64_t row) __attribute__((always_inline)) {
        constexpr int R = r.value;
        // Where no row sees a key of the columns, the scores are masked whatever they are.
        const int first_seen = block.Begin(row), last_seen = block.End(row + R - 1);
        if (last_seen <= i * kLanes || first_seen >= (i + C) * kLanes) return;
        if (C > 1 && last_seen <= (i + kHalf) * kLanes) {
          ScoreColumns<Work, Work, R, kHalf>(block, tile, row, i, begin, end);
        } else {
          ScoreColumns<Work, Work, R, C>(block, tile, row, i, begin, end, feed.Take(end - begin));
        }
      });
    }
  }
  SoftmaxTile(args, block, r0, r1);
  const int64_t vectors = block.padded_dim / kLanes;
  int64_t vector = 0;
  for (; vector + C <= vectors; vector += C) {
    ForAttentionRows<kTallRows>(r0, r1, [&](auto r, int64_t row) __attribute__((always_inline)) {
      OutputColumns<Work, Work, r.value, C>(block, tile, row, vector, feed.Take(kTile / Operand<Work>::kStep));
    });
  }
  if constexpr (C > 1) {
    for (; vector < vectors; ++vector) {
      ForAttentionRows<kTallRows>(r0, r1, [&](auto r, int64_t row) __attribute__((always_inline)) {
        OutputColumns<Work, Work, r.value, 1>(block, tile, row, vector);
      });
    }
  }
}

template <typename A, typename Kv>
void AttendTile(const AttentionArgs& args, AttentionBlock<A, Kv>& block, int64_t num_rows, int64_t t0) {
  // lo and hi ascend over the rows, so those that meet the tile stand together.
  int64_t r0 = 0, r1 = num_rows;
  while (r0 < r1 && block.hi[r0] <= t0) ++r0;
  while (r1 > r0 && block.lo[r1 - 1] >= t0 + kTile) --r1;
  if (r0 == r1) return;
  block.t0 = t0;
  LocateTile(args, block, block.lo[r0], block.hi[r1 - 1]);
  const int64_t end = block.hi[num_rows - 1];
  const bool few = num_rows <= kFewRows;
  const bool ahead = t0 + kTile < end;
  block.ahead_by_steps = ahead && few;
  block.ahead_by_lines = ahead && !few;
  if (ahead) LocateAhead(args, block, end);
  if (few) {
    AttendFewRows(args, block, r0, r1);
  } else {
    AttendManyRows(args, block, r0, r1);
  }
}

// --- Chunks ---------------------------------------------------------------------------------------------------------

// total = merge(total, part); with an empty total this copies, since exp(-inf) = 0 and exp(0) = 1 exactly.
SAPWOOD_INLINE void MergeChunk(float m, float l, const float* o, float& m_total, float& l_total, float* o_total,
                               int64_t padded_dim) {
  const float m_new = m > m_total ? m : m_total;
  const V16 a = Exp(Set1(m_total - m_new)), b = Exp(Set1(m - m_new));
  m_total = m_new;
  l_total = FirstLane(Fma(Set1(l_total), a, Mul(Set1(l), b)));
  for (int64_t d = 0; d < padded_dim; d += kLanes) {
    Store(o_total + d, Fma(Load(o_total + d), a, Mul(Load(o + d), b)));
  }
}

template <typename A>
SAPWOOD_INLINE void StoreOutput(A* out, const float* o_total, float l_total, int64_t head_dim) {
  const V16 l = Set1(l_total);
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    StoreLanes(out + d, Div(Load(o_total + d), l), ValidLanes(head_dim, d));
  }
}

template <typename A, typename Kv>
SAPWOOD_INLINE bool MeetsChunk(const AttentionBlock<A, Kv>& block, int64_t row, int64_t chunk) {
  return block.lo[row] < (chunk + 1) * kAttentionChunk && block.hi[row] > chunk * kAttentionChunk;
}

// (O, m, l) of a row's chunk; row counts from the first of the call.
SAPWOOD_INLINE float* Partial(const AttentionArgs& args, int64_t row, int64_t chunk, int64_t padded_dim) {
  return args.partial + (row * args.num_chunks + chunk - args.first_chunk) * (padded_dim + kLanes);
}
SAPWOOD_INLINE const float* SharedPartial(const AttentionArgs& args, int64_t row, int64_t chunk, int64_t padded_dim) {
  return args.shared + (row * args.shared_chunks + chunk) * (padded_dim + kLanes);
}

// Rows [first, first + num_rows) of the call.
template <typename A, typename Kv>
void AttendBlock(const AttentionArgs& args, AttentionBlock<A, Kv>& block, int64_t first, int64_t num_rows) {
  const int64_t padded_dim = block.padded_dim;
  for (int64_t row = 0; row < num_rows; ++row) {
    block.m_total[row] = -__builtin_inff();
    block.l_total[row] = 0;
  }
  for (int64_t i = 0; i < num_rows * padded_dim; i += kLanes) Store(block.o_total + i, Zero());

  int64_t tile = block.lo[0] / kTile, tile_end = (block.hi[num_rows - 1] + kTile - 1) / kTile;
  if (args.partial) {
    tile = Max64(tile, args.chunk_begin * kTilesPerChunk);
    tile_end = Min64(tile_end, args.chunk_end * kTilesPerChunk);
  }
  while (tile < tile_end) {
    const int64_t chunk = tile / kTilesPerChunk;
    const int64_t chunk_end = Min64(tile_end, (chunk + 1) * kTilesPerChunk);
    for (int64_t row = 0; row < num_rows; ++row) {
      block.m[row] = -__builtin_inff();
      block.l[row] = 0;
    }
    for (int64_t i = 0; i < num_rows * padded_dim; i += kLanes) Store(block.o + i, Zero());
    for (; tile < chunk_end; ++tile) AttendTile(args, block, num_rows, tile * kTile);
    for (int64_t row = 0; row < num_rows; ++row) {
      if (!MeetsChunk(block, row, chunk)) continue;
      const float* o = block.o + row * padded_dim;
      if (args.partial) {
        float* part = Partial(args, first + row, chunk, padded_dim);
        for (int64_t d = 0; d < padded_dim; d += kLanes) Store(part + d, Load(o + d));
        part[padded_dim] = block.m[row];
        part[padded_dim + 1] = block.l[row];
      } else {
        MergeChunk(block.m[row], block.l[row], o, block.m_total[row], block.l_total[row],
                   block.o_total + row * padded_dim, padded_dim);
      }
    }
  }
  if (args.partial) return;
  for (int64_t row = 0; row < num_rows; ++row) {
    StoreOutput(block.out[row], block.o_total + row * padded_dim, block.l_total[row], block.head_dim);
  }
}

// --- Calls ----------------------------------------------------------------------------------------------------------

SAPWOOD_INLINE void WidenRow(const float* q, float* wide, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes) Store(wide + d, LoadLanes(q + d, ValidLanes(n, d)));
}
SAPWOOD_INLINE void WidenRow(const Bf16* q, float* wide, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes) {
    const int lanes = ValidLanes(n, d);
    Store(wide + d, lanes == kLanes ? Load(q + d) : LoadN(q + d, lanes));
  }
}
SAPWOOD_INLINE void WidenRow(const Bf16* q, Bf16* copy, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes) {
    const int lanes = ValidLanes(n, d);
    Store(copy + d, lanes == kLanes ? Load(q + d) : LoadN(q + d, lanes));  // to f32 and back: exact
  }
}

// f(block, first row, rows) over the call's rows, with their ranges and outputs in the block.
template <typename A, typename Kv, typename F>
SAPWOOD_INLINE void ForBlocks(const AttentionArgs& args, F&& f) {
  using Work = WorkOf<A>;
  const KvLayout& layout = args.layout;
  AttentionBlock<A, Kv> block;
  block.ahead = {};
  block.head_dim = layout.head_dim;
  block.padded_dim = static_cast<int64_t>(PaddedDim(layout.head_dim));
  block.page_size = layout.page_size;
  float* scratch = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(args.scratch) + 63) / 64 * 64);
  const auto take = [&](int64_t floats) __attribute__((always_inline)) {
    float* const p = scratch;
    scratch += floats;
    return p;
  };
  block.q = reinterpret_cast<Work*>(take(kBlockRows * block.padded_dim));
  block.o = take(kBlockRows * block.padded_dim);
  block.o_total = take(kBlockRows * block.padded_dim);
  block.scores = take(kBlockRows * kTile);
  block.wide_k = reinterpret_cast<Work*>(take(kTile * block.padded_dim));
  block.wide_v = reinterpret_cast<Work*>(take(block.padded_dim / kLanes * static_cast<int64_t>(kWideVector)));

  const int64_t group = args.num_q_heads / layout.num_kv_heads;
  const int64_t num_rows = args.q_len * group;
  for (int64_t first = 0; first < num_rows; first += kBlockRows) {
    const int64_t n = Min64(kBlockRows, num_rows - first);
    for (int64_t row = 0; row < n; ++row) {
      const int64_t query = (first + row) / group;
      const int64_t column = (args.kv_head * group + (first + row) % group) * block.head_dim;
      const int64_t token = args.tokens ? args.tokens[query] : args.q_begin + query;
      const A* q = static_cast<const A*>(args.q) + token * args.ldq + column;
      WidenRow(q, block.q + row * block.padded_dim, block.head_dim);
      block.out[row] = static_cast<A*>(args.out) + token * args.ldo + column;
      block.hi[row] = args.tokens ? args.chunk_end * kAttentionChunk : args.first_position + query + 1;
      block.lo[row] = args.window > 0 ? Max64(0, block.hi[row] - args.window) : 0;
    }
    f(block, first, n);
  }
}

template <typename A, typename Kv>
void AttentionOf(const AttentionArgs& args) {
  ForBlocks<A, Kv>(args, [&](AttentionBlock<A, Kv>& block, int64_t first, int64_t num_rows)
                             __attribute__((always_inline)) { AttendBlock(args, block, first, num_rows); });
}

inline void Attention(DType act, const AttentionArgs& args) {
  const bool int8 = args.layout.dtype == DType::kI8;
  if (act == DType::kBF16) {
    int8 ? AttentionOf<Bf16, int8_t>(args) : AttentionOf<Bf16, Bf16>(args);
  } else {
    int8 ? AttentionOf<float, int8_t>(args) : AttentionOf<float, float>(args);
  }
}

template <typename A>
void AttentionMergeOf(const AttentionArgs& args) {
  ForBlocks<A, A>(args, [&](AttentionBlock<A, A>& block, int64_t first, int64_t num_rows)
                            __attribute__((always_inline)) {
    for (int64_t row = 0; row < num_rows; ++row) {
      float m = -__builtin_inff(), l = 0, *const o = block.o_total;
      for (int64_t d = 0; d < block.padded_dim; d += kLanes) Store(o + d, Zero());
      for (int64_t chunk = args.shared ? 0 : args.first_chunk; chunk < args.first_chunk + args.num_chunks; ++chunk) {
        if (!MeetsChunk(block, row, chunk)) continue;
        const float* part = args.shared && chunk < args.shared_chunks
                                ? SharedPartial(args, first + row, chunk, block.padded_dim)
                                : Partial(args, first + row, chunk, block.padded_dim);
        MergeChunk(part[block.padded_dim], part[block.padded_dim + 1], part, m, l, o, block.padded_dim);
      }
      StoreOutput(block.out[row], o, l, block.head_dim);
    }
  });
}

inline void AttentionMerge(DType act, const AttentionArgs& args) {
  if (act == DType::kBF16) {
    AttentionMergeOf<Bf16>(args);
  } else {
    AttentionMergeOf<float>(args);
  }
}

}  // namespace sapwood::SAPWOOD_LEVEL
