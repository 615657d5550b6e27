// Linear layers: rows x packed panels of 64 outputs, with the epilogues of kernels.h.
//
// A group of panels at a time, so that weights stream from memory once per call; within it blocks of kRowsPerBlock rows, K
// in slices, and per slice and panel the register tiles of gemm_tiles.h. A slice loads the accumulators the slice before
// left in `c`, so an output has one chain over all of K. The epilogue works row by row on `c`, the same code for every M.
#pragma once

#include "kernels/gemm_tiles.h"
#include "kernels/quant.h"
#include "kernels/vec_math.h"

namespace sapwood::SAPWOOD_LEVEL {

// Panels that share a slice of rows made ready, and their accumulators: 96 KB on the stack.
inline constexpr int64_t kPanelsPerGroup = 4;

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
  constexpr int kHalf = kPanel / 2;
  const auto silu_mul = [&](int j) __attribute__((always_inline)) {
    V16 gate = Load(c + j), up = Load(c + kHalf + j);
    if (args.bias) {  // in the order of the panels, whole
      gate = Add(gate, Load(args.bias + panel * kPanel + j));
      up = Add(up, Load(args.bias + panel * kPanel + kHalf + j));
    }
    return Mul(Silu(gate), up);
  };
  if (args.epilogue == Epilogue::kSiluMul) {
    T* out = static_cast<T*>(args.out) + m * args.ldc;
    for (int j = 0; j < kHalf; j += kLanes) {
      const int64_t column = panel * kHalf + j;
      const int n = ValidLanes(args.n, column);
      if (n == 0) break;
      StoreLanes(out + column, silu_mul(j), n);
    }
    return;
  }
  if (args.epilogue == Epilogue::kSiluMulQ8) {  // half a panel is one block; past N its weights are zero, and so is it
    static_assert(kHalf == kQ8Block);
    QuantizeBlock(silu_mul(0), silu_mul(kLanes), static_cast<Q8Block*>(args.out) + m * args.ldc + panel);
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
      default: {  // kLogits; the SiLU-muls have returned
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
struct ActFormatOf {
  using Format = DenseFormat<T>;
};
template <>
struct ActFormatOf<Bf16> {
  using Format = Choose<kBf16Dot, DenseFormat<Bf16>, WideFormat>;
};

template <typename Format, typename T>
void GemmAs(const GemmArgs& args, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  const int64_t panel_bytes = Format::PanelBytes(args.k);
  const char* a = static_cast<const char*>(args.a);
  const char* w = static_cast<const char*>(args.w);
  const int64_t row_bytes = args.lda * (args.format == WeightFormat::kAct ? int64_t{sizeof(T)} : int64_t{sizeof(Q8Block)});
  Format format;
  alignas(64) float c[kPanelsPerGroup * kRowsPerBlock * kPanel];
  for (int64_t group = p0; group < p1; group += kPanelsPerGroup) {
    const int64_t num_panels = Min64(kPanelsPerGroup, p1 - group);
    for (int64_t m = m0; m < m1; m += kRowsPerBlock) {
      const int64_t num_rows = Min64(kRowsPerBlock, m1 - m);
      const bool few = num_rows <= Format::kFewRows;
      const int64_t slice = few ? kFewRowsSlice : kL1Slice / Format::kSliceBytes;
      for (int64_t k = 0; k < args.k; k += slice) {
        const int64_t slice_k = Min64(slice, args.k - k);
        format.Rows({a + m * row_bytes + Format::RowOffset(k), args.lda, num_rows, slice_k, few});
        for (int64_t p = 0; p < num_panels; ++p) {
          const char* panel = w + (group + p) * panel_bytes;
          format.Panel(panel + Format::SliceOffset(k));
          // The same slice of the next panel; after the last, the first panel's next slice or the next group.
          const char* next = p + 1 < num_panels   ? panel + panel_bytes + Format::SliceOffset(k)
                             : k + slice < args.k ? w + group * panel_bytes + Format::SliceOffset(k + slice)
                                                  : panel + panel_bytes;
          const int64_t num_tiles = (num_rows + Format::kMaxRows - 1) / Format::kMaxRows;
          const int64_t lines = few ? 0 : Format::SliceOffset(slice_k) / (kLine * num_tiles) + 1;
          int64_t tile = 0;
          float* rows = c + p * kRowsPerBlock * kPanel;
          ForEvenRowBlocks<Format::kMaxRows>(num_rows, [&](auto r, int64_t row) __attribute__((always_inline)) {
            const Ahead ahead{next + tile++ * lines * kLine, lines};
            format.template Tile<r.value>(row, k == 0, rows + row * kPanel, ahead);
          });
        }
      }
      for (int64_t p = 0; p < num_panels; ++p) {
        for (int64_t row = 0; row < num_rows; ++row) {
          GemmEpilogue<T>(args, c + (p * kRowsPerBlock + row) * kPanel, m + row, group + p);
        }
      }
    }
  }
}

template <typename T>
void GemmOf(const GemmArgs& args, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
  switch (args.format) {
    case WeightFormat::kInt8: return GemmAs<IntFormat<false>, T>(args, m0, m1, p0, p1);
    case WeightFormat::kInt4: return GemmAs<IntFormat<true>, T>(args, m0, m1, p0, p1);
    case WeightFormat::kAct: return GemmAs<typename ActFormatOf<T>::Format, T>(args, m0, m1, p0, p1);
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
