// Linear layers: act [M][K] x packed panels of 64 outputs, with the epilogues of kernels.h.
//
// Panel by panel, so that weights stream from memory once per call; within a panel, blocks of kRowsPerBlock rows, K in
// slices that stay in L2, register tiles of a few rows x 64 columns. A slice loads the accumulators the slice
// before left in `c`, so an output has one chain over all of K. The epilogue works row by row on `c`, the same code for
// every M.
#pragma once

#include "kernels/micro.h"
#include "kernels/vec_math.h"

namespace sapwood::SAPWOOD_LEVEL {

inline constexpr int64_t kRowsPerBlock = 96;       // 24 KB of accumulators on the stack
inline constexpr int64_t kSliceBytes = 32 * 1024;  // of one panel: with the rows it meets, well inside 512 KB of L2

// c[R][64] = or += a[R][k] x panel slice.
template <typename T, int R>
void GemmTile(const T* a, int64_t lda, const T* w, int64_t k, bool first, float* c) {
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
    MacElements<T, R, C>(acc, rows, columns, kPanel * Op::kStep, k);
    StoreAcc(acc, c + j * kLanes, kPanel);
  }
}

SAPWOOD_INLINE int ValidLanes(int64_t n, int64_t column) {
  return static_cast<int>(Max64(0, Min64(kLanes, n - column)));
}

// A partial vector goes through StoreN / LoadN; the values are the same.
template <typename T>
SAPWOOD_INLINE void StoreLanes(T* p, V16 x, int n) {
  if (n == kLanes) {
    Store(p, x);
  } else {
    StoreN(p, x, n);
  }
}
SAPWOOD_INLINE V16 LoadLanes(const float* p, int n) { return n == kLanes ? Load(p) : LoadN(p, n); }

// One row of one panel: c[64] to its output.
template <typename T>
void GemmEpilogue(const GemmArgs& args, const float* c, int64_t m, int64_t panel) {
  if (args.epilogue == Epilogue::kSiluMul) {
    constexpr int kHalf = kPanel / 2;
    T* out = static_cast<T*>(args.out) + m * args.ldc;
    for (int j = 0; j < kHalf; j += kLanes) {
      const int64_t column = panel * kHalf + j;
      const int n = ValidLanes(args.n, column);
      if (n == 0) break;
      V16 gate = Load(c + j), up = Load(c + kHalf + j);
      if (args.bias) {  // in the order of the panels, whole
        gate = Add(gate, Load(args.bias + panel * kPanel + j));
        up = Add(up, Load(args.bias + panel * kPanel + kHalf + j));
      }
      StoreLanes(out + column, Mul(Silu(gate), up), n);
    }
    return;
  }

  float block_max = -__builtin_inff();
  bool nan = false;
  for (int j = 0; j < kPanel; j += kLanes) {
    const int64_t column = panel * kPanel + j;
    const int n = ValidLanes(args.n, column);
    if (n == 0) break;
    V16 x = Load(c + j);
    if (args.bias) x = Add(x, LoadLanes(args.bias + column, n));
    const int64_t at = m * args.ldc + column;
    switch (args.epilogue) {
      case Epilogue::kStoreAct: StoreLanes(static_cast<T*>(args.out) + at, x, n); break;
      case Epilogue::kStoreF32: StoreLanes(static_cast<float*>(args.out) + at, x, n); break;
      case Epilogue::kResidual:
        StoreLanes(static_cast<float*>(args.out) + at, Add(LoadLanes(args.residual + at, n), x), n);
        break;
      default: {  // kLogits; kSiluMul has returned
        x = Mul(x, Set1(args.scale));
        if (args.softcap > 0) x = SoftCap(x, args.softcap);
        StoreLanes(static_cast<float*>(args.out) + at, x, n);
        const V16 valid = Select(LaneRange(0, n), x, Set1(-__builtin_inff()));
        nan |= AnyNan(valid);
        const float lane_max = ReduceMax(valid);
        block_max = lane_max > block_max ? lane_max : block_max;
      }
    }
  }
  if (args.epilogue == Epilogue::kLogits && args.block_max) {
    const int64_t num_blocks = (args.n + kPanel - 1) / kPanel;
    args.block_max[m * num_blocks + panel] = nan ? __builtin_nanf("") : block_max;  // a NaN must not hide in a maximum
  }
}

template <typename T>
void GemmOf(const GemmArgs& args, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  using Op = Operand<T>;
  const int64_t panel_elements = (args.k + Op::kStep - 1) / Op::kStep * Op::kStep * kPanel;
  const T* a = static_cast<const T*>(args.a);
  alignas(64) float c[kRowsPerBlock * kPanel];
  for (int64_t panel = p0; panel < p1; ++panel) {
    const T* w = static_cast<const T*>(args.w) + panel * panel_elements;
    for (int64_t m = m0; m < m1; m += kRowsPerBlock) {
      const int64_t num_rows = Min64(kRowsPerBlock, m1 - m);
      // One register tile as wide as the panel reads it once anyway: no slices.
      const bool once = num_rows <= Op::kMaxRows && Op::Cols(static_cast<int>(num_rows)) == kPanel / kLanes;
      const int64_t slice = once ? args.k : kSliceBytes / (kPanel * int64_t{sizeof(T)});
      for (int64_t k = 0; k < args.k; k += slice) {
        const int64_t slice_k = Min64(slice, args.k - k);
        ForRowBlocks<Op::kMaxRows>(num_rows, [&](auto rows, int64_t row) __attribute__((always_inline)) {
          GemmTile<T, rows.value>(a + (m + row) * args.lda + k, args.lda, w + k * kPanel, slice_k, k == 0,
                                  c + row * kPanel);
        });
      }
      for (int64_t row = 0; row < num_rows; ++row) GemmEpilogue<T>(args, c + row * kPanel, m + row, panel);
    }
  }
}

inline void Gemm(DType act, const GemmArgs& args, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  if (act == DType::kBF16) {
    GemmOf<Bf16>(args, m0, m1, p0, p1);
  } else {
    GemmOf<float>(args, m0, m1, p0, p1);
  }
}

}  // namespace sapwood::SAPWOOD_LEVEL
