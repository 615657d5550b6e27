// What every per-level kernel source starts from.
//
// kernels_<level>.cc defines SAPWOOD_LEVEL (the namespace) and includes vec_<level>.h, which gives V16 (16 floats) and
// its operations, then ops.h, which compiles every op against them. Nothing here may have external linkage
// outside that namespace, and no standard library function may be called: the linker would keep one level's copy of an
// inline function for all levels, and a machine without AVX512 would meet AVX512 code.
#pragma once

#include "kernels/half.h"
#include "kernels/kernels.h"

#ifndef SAPWOOD_LEVEL
#error "define SAPWOOD_LEVEL, the namespace of this ISA level, before including kernel sources"
#endif

#define SAPWOOD_INLINE inline __attribute__((always_inline))

namespace sapwood::SAPWOOD_LEVEL {

inline constexpr int kLanes = 16;

template <int I>
struct Int {
  static constexpr int value = I;
};

// f(Int<0>{}), ..., f(Int<N-1>{}), unrolled by the front end: accumulators indexed by it live in registers, where gcc
// 12 keeps arrays walked by an ordinary loop in memory.
template <int N, int I = 0, typename F>
SAPWOOD_INLINE void Unroll(F&& f) {
  if constexpr (I < N) {
    f(Int<I>{});
    Unroll<N, I + 1>(f);
  }
}

// Yes or No by a constant, as std::conditional_t.
template <bool kYes, typename Yes, typename No>
struct ChooseOf {
  using Type = Yes;
};
template <typename Yes, typename No>
struct ChooseOf<false, Yes, No> {
  using Type = No;
};
template <bool kYes, typename Yes, typename No>
using Choose = typename ChooseOf<kYes, Yes, No>::Type;

SAPWOOD_INLINE int64_t Min64(int64_t a, int64_t b) { return a < b ? a : b; }
SAPWOOD_INLINE int64_t Max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace sapwood::SAPWOOD_LEVEL
