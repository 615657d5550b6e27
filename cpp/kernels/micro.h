// The one multiply-accumulate loop of linear layers, attention scores and attention outputs.
//
// acc[r][c] += sum over steps of a[r] x b[c]: a is a row broadcast element by element (a step is one float, or a pair
// of bf16), b a column of 16 lanes. Every output has one chain, steps ascending, whatever R and C are: tiling
// decides speed and nothing else.
#pragma once

#include "kernels/level.h"

namespace sapwood::SAPWOOD_LEVEL {

template <typename T>
struct Operand;

template <>
struct Operand<float> {
  static constexpr int kStep = 1;  // elements of K per step
  static constexpr int kMaxRows = kMaxRowsF32;
  static constexpr int Cols(int rows) { return ColsForF32(rows); }
  using A = V16;
  using B = V16;
  static SAPWOOD_INLINE A Broadcast(const float* p) { return Set1(*p); }
  static SAPWOOD_INLINE B LoadB(const float* p) { return Load(p); }
  static SAPWOOD_INLINE V16 Mac(V16 acc, A a, B b) { return Fma(a, b, acc); }
};

template <>
struct Operand<Bf16> {
  static constexpr int kStep = 2;
  static constexpr int kMaxRows = kMaxRowsBf16;
  static constexpr int Cols(int rows) { return ColsForBf16(rows); }
  using A = PairA;
  using B = PairB;
  static SAPWOOD_INLINE A Broadcast(const Bf16* p) { return BroadcastPairBits(PairBits(p)); }
  // The last element of an odd K: its partner is zero, not what follows it in memory.
  static SAPWOOD_INLINE A BroadcastOdd(const Bf16* p) { return BroadcastPairBits(*p); }
  static SAPWOOD_INLINE B LoadB(const Bf16* p) { return LoadPair(p); }
  static SAPWOOD_INLINE V16 Mac(V16 acc, A a, B b) { return PairMac(acc, a, b); }
};

template <int R, int C>
struct Acc {
  V16 v[R][C];
};

// Steps [begin, end). a[r]: row r at step 0. b[c]: column c at step 0; b_stride elements from one step to the next.
// before(s) comes before each step: a place for prefetches.
template <typename T, int R, int C, typename Before>
SAPWOOD_INLINE void MacSteps(Acc<R, C>& acc, const T* const (&a)[R], const T* const (&b)[C], int64_t b_stride,
                                 int64_t begin, int64_t end, Before&& before) {
  using Op = Operand<T>;
  for (int64_t s = begin; s < end; ++s) {
    before(s);
    typename Op::B column[C];
    Unroll<C>([&](auto c) __attribute__((always_inline)) { column[c.value] = Op::LoadB(b[c.value] + s * b_stride); });
    Unroll<R>([&](auto r) __attribute__((always_inline)) {
      const typename Op::A x = Op::Broadcast(a[r.value] + s * Op::kStep);
      Unroll<C>([&](auto c) __attribute__((always_inline)) {
        acc.v[r.value][c.value] = Op::Mac(acc.v[r.value][c.value], x, column[c.value]);
      });
    });
  }
}

// Of k elements the one that the steps leave: an odd K of bf16 ends in half a pair.
template <typename T, int R, int C>
SAPWOOD_INLINE void MacOddElement(Acc<R, C>& acc, const T* const (&a)[R], const T* const (&b)[C], int64_t b_stride,
                                  int64_t k) {
  if constexpr (Operand<T>::kStep == 2) {
    if (k % 2 == 0) return;
    Unroll<C>([&](auto c) __attribute__((always_inline)) {
      const PairB column = LoadPair(b[c.value] + k / 2 * b_stride);
      Unroll<R>([&](auto r) __attribute__((always_inline)) {
        acc.v[r.value][c.value] =
            PairMac(acc.v[r.value][c.value], Operand<T>::BroadcastOdd(a[r.value] + k - 1), column);
      });
    });
  }
}

// c points at R rows of accumulators, c_stride floats apart.
template <int R, int C>
SAPWOOD_INLINE void LoadAcc(Acc<R, C>& acc, const float* c, int64_t c_stride) {
  Unroll<R>([&](auto r) __attribute__((always_inline)) {
    Unroll<C>([&](auto j) __attribute__((always_inline)) {
      acc.v[r.value][j.value] = Load(c + r.value * c_stride + j.value * kLanes);
    });
  });
}
template <int R, int C>
SAPWOOD_INLINE void ZeroAcc(Acc<R, C>& acc) {
  Unroll<R>([&](auto r) __attribute__((always_inline)) {
    Unroll<C>([&](auto j) __attribute__((always_inline)) { acc.v[r.value][j.value] = Zero(); });
  });
}
template <int R, int C>
SAPWOOD_INLINE void StoreAcc(const Acc<R, C>& acc, float* c, int64_t c_stride) {
  Unroll<R>([&](auto r) __attribute__((always_inline)) {
    Unroll<C>([&](auto j) __attribute__((always_inline)) {
      Store(c + r.value * c_stride + j.value * kLanes, acc.v[r.value][j.value]);
    });
  });
}

// f(Int<R>{}, first_row) for the fewest blocks of up to MaxRows rows that cover [0, num_rows), as even as can be: a block
// of one row would leave the multipliers waiting.
template <int MaxRows, typename F>
SAPWOOD_INLINE void ForEvenRowBlocks(int64_t num_rows, F&& f) {
  const int64_t num_blocks = (num_rows + MaxRows - 1) / MaxRows;
  int64_t row = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t rows = num_rows / num_blocks + (block < num_rows % num_blocks);
    Unroll<MaxRows>([&](auto i) __attribute__((always_inline)) {
      if (rows == i.value + 1) f(Int<i.value + 1>{}, row);
    });
    row += rows;
  }
}

}  // namespace sapwood::SAPWOOD_LEVEL
