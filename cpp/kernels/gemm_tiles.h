// The register tiles under gemm.h: one struct per weight format, which says how a slice of K is made ready and multiplies
// a few rows with one panel of it. c[rows][64] holds the accumulators between slices.
//
// Where the level has no bf16 dot, bf16 is widened to f32 (exact, so the bits are those of any other order of the same
// chain): the rows once a slice, the panel in the tile's registers, or once a slice where there are too few of them.
// int4 nibbles are taken apart in registers for one tile, once into int8 bytes for several.
#pragma once

#include "kernels/micro.h"

namespace sapwood::SAPWOOD_LEVEL {

inline constexpr int64_t kRowsPerBlock = 96;  // rows that share what was made ready
// Bytes of a panel's slice as the tiles read it: it stays in L1, so that no load of a tile waits behind the fetches from
// memory, for which there are a dozen buffers. Few rows read a panel once, straight from memory.
inline constexpr int64_t kL1Slice = 16 * 1024;
inline constexpr int64_t kFewRowsSlice = 4096;  // elements

// A tile is a function of its own: inlined side by side, gcc 12 gives their accumulators memory instead of registers.
#define SAPWOOD_TILE __attribute__((noinline))

// What is read after this slice: a tile fetches its share into L2 while it computes, a little with every step, for in a
// burst the lines would only queue behind each other and before what the tile itself reads.
struct Ahead {
  const char* at;
  int64_t num_lines;
};
inline constexpr int64_t kLine = 64;
// Of few rows the panel itself is what to fetch: it is read faster than the hardware's prefetchers look ahead, and they
// stop at the end of each 4 KB.
inline constexpr int64_t kStreamAhead = 2048;

// A block of rows at one slice of K.
struct RowsAt {
  const void* a;  // first row, first element of the slice
  int64_t lda;    // elements, or blocks
  int64_t num_rows;
  int64_t k;      // elements in the slice
  bool few;       // one register tile holds all rows
};

// c[R][64] = or += rows of a x columns of the panel, for operands that micro.h multiplies as they are.
template <typename T, int R>
SAPWOOD_TILE void DenseTile(const T* a, int64_t lda, const T* w, int64_t k, bool first, float* c, Ahead ahead) {
  using Op = Operand<T>;
  constexpr int C = Op::Cols(R);
  const T* rows[R];
  Unroll<R>([&](auto r) __attribute__((always_inline)) { rows[r.value] = a + r.value * lda; });
  for (int j = 0; j < kPanel / kLanes; j += C) {
    const T* columns[C];
    Unroll<C>([&](auto i)
                  __attribute__((always_inline)) { columns[i.value] = w + (j + i.value) * kLanes * Op::kStep; });
    Acc<R, C> acc;
    if (first) {
      ZeroAcc(acc);
    } else {
      LoadAcc(acc, c + j * kLanes, kPanel);
    }
    const int64_t num_steps = k / Op::kStep;
    const int64_t fetching = j == 0 ? Min64(num_steps, ahead.num_lines) : 0;
    MacSteps<T, R, C>(acc, rows, columns, kPanel * Op::kStep, 0, fetching, [&](int64_t s) __attribute__((always_inline)) {
      __builtin_prefetch(ahead.at + s * kLine, 0, 2);
    });
    MacSteps<T, R, C>(acc, rows, columns, kPanel * Op::kStep, fetching, num_steps, [](int64_t) {});
    MacOddElement<T, R, C>(acc, rows, columns, kPanel * Op::kStep, k);
    StoreAcc(acc, c + j * kLanes, kPanel);
  }
}

// f32, and bf16 with the dot.
template <typename T>
struct DenseFormat {
  static constexpr int kMaxRows = Operand<T>::kMaxRows;
  static constexpr int kFewRows = kMaxRows;
  static constexpr int64_t kSliceBytes = kPanel * int64_t{sizeof(T)};  // of one k, as the tiles read it
  static int64_t PanelBytes(int64_t k) {
    return (k + Operand<T>::kStep - 1) / Operand<T>::kStep * Operand<T>::kStep * kPanel * int64_t{sizeof(T)};
  }
  static int64_t SliceOffset(int64_t k) { return k * kPanel * int64_t{sizeof(T)}; }
  static int64_t RowOffset(int64_t k) { return k * int64_t{sizeof(T)}; }

  void Rows(const RowsAt& at) { at_ = at; }
  void Panel(const void* w) { w_ = static_cast<const T*>(w); }
  template <int R>
  SAPWOOD_INLINE void Tile(int64_t row, bool first, float* c, Ahead ahead) const {
    DenseTile<T, R>(static_cast<const T*>(at_.a) + row * at_.lda, at_.lda, w_, at_.k, first, c, ahead);
  }

 private:
  RowsAt at_;
  const T* w_;
};

// As DenseTile<float>, straight from the packed pairs of bf16, which are widened in registers. k is even; kStride floats
// from row to row of a, a constant, so that every element has one base register and a displacement.
template <int R, int64_t kStride, bool kStream>
SAPWOOD_TILE void PairTile(const float* a, const Bf16* w, int64_t k, bool first, float* c, Ahead ahead) {
  constexpr int C = ColsForPairs(R);
  for (int j = 0; j < kPanel / kLanes; j += C) {
    Acc<R, C> acc;
    if (first) {
      ZeroAcc(acc);
    } else {
      LoadAcc(acc, c + j * kLanes, kPanel);
    }
    const Bf16* columns = w + j * 2 * kLanes;
    const float* x = a;
    const auto step = [&]() __attribute__((always_inline)) {
      V16 b[2][C];
      Unroll<C>([&](auto i) __attribute__((always_inline)) {
        const PairB pair = LoadPair(columns + i.value * 2 * kLanes);
        b[0][i.value] = First(pair);
        b[1][i.value] = Second(pair);
      });
      Unroll<2>([&](auto half) __attribute__((always_inline)) {
        Unroll<R>([&](auto r) __attribute__((always_inline)) {
          const V16 value = Set1(x[r.value * kStride + half.value]);
          Unroll<C>([&](auto i) __attribute__((always_inline)) {
            acc.v[r.value][i.value] = Fma(value, b[half.value][i.value], acc.v[r.value][i.value]);
          });
        });
      });
      columns += 2 * kPanel;
      x += 2;
    };
    const float* const end = a + k;
    if constexpr (kStream) {
      while (x != end) {
        Unroll<C>([&](auto i) __attribute__((always_inline)) {
          __builtin_prefetch(reinterpret_cast<const char*>(columns + i.value * 2 * kLanes) + kStreamAhead, 0, 3);
        });
        step();
      }
    } else {
      const int64_t fetching = Max64(0, Min64(k / 2, ahead.num_lines));
      for (const float* const last = a + 2 * fetching; x != last; ahead.at += kLine) {
        __builtin_prefetch(ahead.at, 0, 2);
        step();
      }
      ahead.num_lines -= fetching;
      while (x != end) step();
    }
    StoreAcc(acc, c + j * kLanes, kPanel);
  }
}

// bf16 without the dot: f32 chains over widened operands.
struct WideFormat {
  // With 32 registers a tile of 12 rows widens the pairs as it goes; with 16 there is no room for that, and several tiles
  // share a panel slice that is widened once.
  static constexpr bool kWidenPanel = kMaxRowsPairs < 12;
  static constexpr int kMaxRows = kWidenPanel ? Operand<float>::kMaxRows : kMaxRowsPairs;
  static constexpr int kFewRows = kMaxRowsPairs < 4 ? kMaxRowsPairs : 4;
  static constexpr int64_t kSliceBytes = kPanel * int64_t{kWidenPanel ? sizeof(float) : sizeof(Bf16)};
  static int64_t PanelBytes(int64_t k) { return DenseFormat<Bf16>::PanelBytes(k); }
  static int64_t SliceOffset(int64_t k) { return DenseFormat<Bf16>::SliceOffset(k); }
  static int64_t RowOffset(int64_t k) { return DenseFormat<Bf16>::RowOffset(k); }

  // An odd K ends in half a pair; its partner is zero in the panel and made zero here.
  void Rows(const RowsAt& at) {
    at_ = at;
    even_k_ = (at.k + 1) / 2 * 2;
    const int64_t stride = at.few ? kFewStride : kStride;
    const auto* a = static_cast<const Bf16*>(at.a);
    for (int64_t row = 0; row < at.num_rows; ++row) {
      const Bf16* from = a + row * at.lda;
      float* to = a_ + row * stride;
      int64_t k = 0;
      for (; k + kLanes <= at.k; k += kLanes) Store(to + k, Load(from + k));
      for (; k < at.k; ++k) to[k] = Bf16ToF32(from[k]);
      if (k < even_k_) to[k] = 0.0f;
    }
  }
  void Panel(const void* w) {
    w_ = static_cast<const Bf16*>(w);
    if (!kWidenPanel || at_.few) return;
    for (int64_t i = 0; i < even_k_ * kPanel; i += 2 * kPanel) {
      Unroll<kPanel / kLanes>([&](auto j) __attribute__((always_inline)) {
        const PairB pair = LoadPair(w_ + i + j.value * 2 * kLanes);
        Store(wide_ + i + j.value * kLanes, First(pair));
        Store(wide_ + i + kPanel + j.value * kLanes, Second(pair));
      });
    }
  }
  template <int R>
  SAPWOOD_INLINE void Tile(int64_t row, bool first, float* c, Ahead ahead) const {
    if constexpr (R <= kFewRows) {
      if (at_.few) return PairTile<R, kFewStride, true>(a_ + row * kFewStride, w_, even_k_, first, c, ahead);
    }
    const float* a = a_ + row * kStride;
    if constexpr (kWidenPanel) {
      DenseTile<float, R>(a, kStride, wide_, even_k_, first, c, ahead);
    } else {
      PairTile<R, kStride, false>(a, w_, even_k_, first, c, ahead);
    }
  }

 private:
  // Rows of a_ are one line longer than a slice: power-of-two strides would put them all into the same sets of L1.
  static constexpr int64_t kStride = kL1Slice / kSliceBytes + kLanes, kFewStride = kFewRowsSlice + kLanes;
  RowsAt at_;
  int64_t even_k_;
  const Bf16* w_;
  alignas(64) float a_[kRowsPerBlock * kStride > kFewRows * kFewStride ? kRowsPerBlock * kStride : kFewRows * kFewStride];
  alignas(64) float wide_[kWidenPanel ? kL1Slice / sizeof(float) : 1];
};

// int8 and int4: integer sums over a block of 32 k, which then join the float chain: c = fma(sum, w scale * a scale, c).
inline constexpr int64_t kInt8GroupBytes = kPanel * (kQ8Block + 2);
inline constexpr int64_t kInt4GroupBytes = kPanel * (kQ8Block / 2 + 2);

template <int R, bool kNibbles>
SAPWOOD_TILE void GroupTile(const Q8Block* a, int64_t lda, const uint8_t* w, int64_t num_groups, float* c, Ahead ahead) {
  constexpr int C = ColsForInt8(R);
  constexpr int64_t kBytes = kNibbles ? kInt4GroupBytes : kInt8GroupBytes;
  constexpr int kFours = kQ8Block / 4, kRun = kPanel * 4, kFew = 4;
  for (int j = 0; j < kPanel / kLanes; j += C) {
    const uint8_t* group = w;
    const int64_t lines_per_group = j == 0 ? (ahead.num_lines + num_groups - 1) / num_groups : 0;
    const char* fetch = ahead.at;
    for (int64_t g = 0; g < num_groups; ++g, group += kBytes) {
      const Q8Block* blocks[R];
      V16i acc[R][C];
      Unroll<R>([&](auto r) __attribute__((always_inline)) {
        blocks[r.value] = a + r.value * lda + g;
        const Q8Block& block = *blocks[r.value];
        const V16i start = DotStart(kNibbles ? block.minus_8_sums : block.minus_128_sums);
        Unroll<C>([&](auto i) __attribute__((always_inline)) { acc[r.value][i.value] = start; });
      });
      Unroll<kNibbles ? kFours / 2 : kFours>([&](auto s) __attribute__((always_inline)) {
        if (s.value < lines_per_group) __builtin_prefetch(fetch + s.value * kLine, 0, 2);
        if constexpr (R <= kFew) {
          if (ahead.num_lines == 0) {  // few rows in all: the panel itself is what to fetch
            Unroll<C>([&](auto i) __attribute__((always_inline)) {
              __builtin_prefetch(group + s.value * kRun + (j + i.value) * 4 * kLanes + kStreamAhead, 0, 3);
            });
          }
        }
        Unroll<C>([&](auto i) __attribute__((always_inline)) {
          const uint8_t* at = group + s.value * kRun + (j + i.value) * 4 * kLanes;
          if constexpr (kNibbles) {
            DotB low, high;
            LoadInt4(at, low, high);
            Unroll<R>([&](auto r) __attribute__((always_inline)) {
              const int8_t* q = blocks[r.value]->q + 8 * s.value;
              acc[r.value][i.value] = Dot(Dot(acc[r.value][i.value], q, low), q + 4, high);
            });
          } else {
            const DotB b = LoadInt8(at);
            Unroll<R>([&](auto r) __attribute__((always_inline)) {
              acc[r.value][i.value] = Dot(acc[r.value][i.value], blocks[r.value]->q + 4 * s.value, b);
            });
          }
        });
      });
      const auto* scales = reinterpret_cast<const uint16_t*>(group + kBytes - kPanel * 2) + j * kLanes;
      Unroll<C>([&](auto i) __attribute__((always_inline)) {
        const V16 scale = LoadF16(scales + i.value * kLanes);
        Unroll<R>([&](auto r) __attribute__((always_inline)) {
          float* at = c + r.value * kPanel + (j + i.value) * kLanes;
          const V16 both = Mul(scale, Set1(blocks[r.value]->scale));
          Store(at, Fma(ToF32(acc[r.value][i.value]), both, Load(at)));
        });
      });
      fetch += lines_per_group * kLine;
      // Or gcc would keep c in copies on the stack from one group to the next.
      asm volatile("" : "+r"(c));
    }
  }
}

template <bool kNibbles>
struct IntFormat {
  static constexpr int kMaxRows = kMaxRowsInt8;
  static constexpr int kFewRows = kNibbles ? kMaxRowsInt4 : kMaxRowsInt8;
  static constexpr int64_t kSliceBytes = kPanel;  // and the scales
  static constexpr int64_t kGroupBytes = kNibbles ? kInt4GroupBytes : kInt8GroupBytes;
  static int64_t PanelBytes(int64_t k) { return Q8BlocksOf(k) * kGroupBytes; }
  static int64_t SliceOffset(int64_t k) { return Q8BlocksOf(k) * kGroupBytes; }
  static int64_t RowOffset(int64_t k) { return Q8BlocksOf(k) * int64_t{sizeof(Q8Block)}; }

  void Rows(const RowsAt& at) {
    at_ = at;
    groups_ = Q8BlocksOf(at.k);
  }
  void Panel(const void* w) {
    w_ = static_cast<const uint8_t*>(w);
    if (!kNibbles || at_.few) return;
    for (int64_t g = 0; g < groups_; ++g) ExpandGroup(w_ + g * kGroupBytes, bytes_ + g * kInt8GroupBytes);
  }
  template <int R>
  SAPWOOD_INLINE void Tile(int64_t row, bool first, float* c, Ahead ahead) const {
    const Q8Block* a = static_cast<const Q8Block*>(at_.a) + row * at_.lda;
    if (first) {
      for (int64_t i = 0; i < R * kPanel; i += kLanes) Store(c + i, Zero());
    }
    if constexpr (kNibbles && R <= kFewRows) {
      if (at_.few) return GroupTile<R, true>(a, at_.lda, w_, groups_, c, ahead);
    }
    GroupTile<R, false>(a, at_.lda, kNibbles ? bytes_ : w_, groups_, c, ahead);
  }

 private:
  // Not kernels.h's: see level.h about linkage.
  static SAPWOOD_INLINE int64_t Q8BlocksOf(int64_t k) { return (k + kQ8Block - 1) / kQ8Block; }

  // (nibble - 8) as an int8 weight is the byte nibble - 8 + 128.
  static void ExpandGroup(const uint8_t* from, uint8_t* to) {
    constexpr int kRun = kPanel * 4;  // one four of k of all outputs
    for (int s = 0; s < kQ8Block / 8; ++s) {
      for (int i = 0; i < kRun; ++i) {
        to[2 * s * kRun + i] = static_cast<uint8_t>((from[s * kRun + i] & 15) + 120);
        to[(2 * s + 1) * kRun + i] = static_cast<uint8_t>((from[s * kRun + i] >> 4) + 120);
      }
    }
    __builtin_memcpy(to + kPanel * kQ8Block, from + kPanel * kQ8Block / 2, kPanel * 2);
  }

  RowsAt at_;
  int64_t groups_;
  const uint8_t* w_;
  alignas(64) uint8_t bytes_[kNibbles ? kL1Slice / kPanel / kQ8Block * kInt8GroupBytes : 1];
};

}  // namespace sapwood::SAPWOOD_LEVEL
