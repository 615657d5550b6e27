// Weight packing: once per load, off the path of a step. Called by the weight store, a range of panels per thread.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "base/check.h"
#include "kernels/half.h"
#include "kernels/kernels.h"

namespace sapwood {
namespace {

struct Fp16 {
  uint16_t bits;
};

float ToF32(float x) { return x; }
float ToF32(Bf16 x) { return Bf16ToF32(x); }
float ToF32(Fp16 x) { return F16ToF32(x.bits); }

// The same dtype is copied bit by bit: a NaN's payload survives a round trip.
template <typename Dst, typename Src>
Dst Convert(Src x) {
  if constexpr (std::is_same_v<Dst, Src>) {
    return x;
  } else if constexpr (std::is_same_v<Dst, float>) {
    return ToF32(x);
  } else {
    return F32ToBf16(ToF32(x));
  }
}

constexpr int64_t kBlock = 64;  // units of K, a float or a pair of bf16: 16 KB of output, written while in L1

// What is packed as it is: out[num_units][64] from 64 rows of 4-byte units, four by four in registers; a null row is zero.
void TransposeUnits(const void* const* rows, int64_t num_units, char* out) {
  using Four = uint32_t __attribute__((vector_size(16)));
  using Pick = int32_t __attribute__((vector_size(16)));
  constexpr int64_t kUnit = 4, kLine = 64;
  for (int64_t u0 = 0; u0 < num_units; u0 += kBlock) {
    const int64_t whole = std::min(kBlock, num_units - u0) / 4 * 4;
    for (int64_t j = 0; j < kPanel; j += 4) {
      const char* from[4];
      for (int r = 0; r < 4; ++r) {
        from[r] = rows[j + r] == nullptr ? nullptr : static_cast<const char*>(rows[j + r]) + u0 * kUnit;
        // More rows than the hardware's prefetchers follow.
        for (int64_t at = 0; from[r] != nullptr && at < kBlock * kUnit; at += kLine) {
          __builtin_prefetch(from[r] + kBlock * kUnit + at);
        }
      }
      char* const to = out + (u0 * kPanel + j) * kUnit;
      for (int64_t u = 0; u < whole; u += 4) {
        Four row[4] = {};
        for (int r = 0; r < 4; ++r) {
          if (from[r] != nullptr) std::memcpy(&row[r], from[r] + u * kUnit, sizeof(Four));
        }
        const Four low01 = __builtin_shuffle(row[0], row[1], Pick{0, 4, 1, 5});
        const Four low23 = __builtin_shuffle(row[2], row[3], Pick{0, 4, 1, 5});
        const Four high01 = __builtin_shuffle(row[0], row[1], Pick{2, 6, 3, 7});
        const Four high23 = __builtin_shuffle(row[2], row[3], Pick{2, 6, 3, 7});
        const Four columns[4] = {__builtin_shuffle(low01, low23, Pick{0, 1, 4, 5}),
                                 __builtin_shuffle(low01, low23, Pick{2, 3, 6, 7}),
                                 __builtin_shuffle(high01, high23, Pick{0, 1, 4, 5}),
                                 __builtin_shuffle(high01, high23, Pick{2, 3, 6, 7})};
        for (int i = 0; i < 4; ++i) std::memcpy(to + (u + i) * kPanel * kUnit, &columns[i], sizeof(Four));
      }
      for (int64_t u = whole; u < std::min(kBlock, num_units - u0); ++u) {
        for (int r = 0; r < 4; ++r) {
          char* const at = to + (u * kPanel + r) * kUnit;
          if (from[r] != nullptr) {
            std::memcpy(at, from[r] + u * kUnit, kUnit);
          } else {
            std::memset(at, 0, kUnit);
          }
        }
      }
    }
  }
}

template <typename Dst, typename Src>
void Pack(Dst* out, int64_t k, const void* const* rows, int64_t panel_begin, int64_t panel_end) {
  constexpr int64_t kStep = std::is_same_v<Dst, Bf16> ? 2 : 1;
  const int64_t padded_k = (k + kStep - 1) / kStep * kStep;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    Dst* const base = out + panel * padded_k * kPanel;
    int64_t first = 0;
    if constexpr (std::is_same_v<Dst, Src>) {
      first = k / kStep * kStep;
      TransposeUnits(rows + panel * kPanel, k / kStep, reinterpret_cast<char*>(base));
    }
    for (int64_t k0 = first; k0 < padded_k; k0 += kBlock) {
      const int64_t k1 = std::min(k0 + kBlock, padded_k);
      for (int64_t j = 0; j < kPanel; ++j) {
        const Src* row = static_cast<const Src*>(rows[panel * kPanel + j]);
        for (int64_t i = k0; i < k1; i += kStep) {
          Dst* const at = base + i * kPanel + j * kStep;
          for (int64_t s = 0; s < kStep; ++s) at[s] = row && i + s < k ? Convert<Dst>(row[i + s]) : Dst{0};
        }
      }
    }
  }
}

template <typename Dst>
void PackAs(Dst* out, int64_t k, const void* const* rows, DType src, int64_t panel_begin, int64_t panel_end) {
  switch (src) {
    case DType::kF32: return Pack<Dst, float>(out, k, rows, panel_begin, panel_end);
    case DType::kBF16: return Pack<Dst, Bf16>(out, k, rows, panel_begin, panel_end);
    case DType::kF16: return Pack<Dst, Fp16>(out, k, rows, panel_begin, panel_end);
    case DType::kI32:
    case DType::kQ8:
    case DType::kI8: break;
  }
  throw InvalidArgument(StrCat("weights must be f32, bf16 or f16, got dtype ", static_cast<int>(src)));
}

void RequirePackable(DType dtype) {
  SAPWOOD_REQUIRE(dtype == DType::kF32 || dtype == DType::kBF16, "weights are packed to f32 or bf16, got dtype ",
                  static_cast<int>(dtype));
}

}  // namespace

size_t PackedBytes(WeightFormat format, DType dtype, int64_t n, int64_t k) {
  RequirePackable(dtype);
  SAPWOOD_REQUIRE(n >= 0 && k >= 0, "a weight's shape must not be negative, got [", n, ", ", k, "]");
  const size_t num_panels = static_cast<size_t>((n + kPanel - 1) / kPanel);
  if (format != WeightFormat::kAct) {
    const int64_t block_bytes = (format == WeightFormat::kInt8 ? kQ8Block : kQ8Block / 2) + 2;
    return num_panels * static_cast<size_t>(Q8Blocks(k) * kPanel * block_bytes);
  }
  const size_t padded_k = static_cast<size_t>(dtype == DType::kBF16 ? (k + 1) / 2 * 2 : k);
  return num_panels * padded_k * kPanel * DTypeBytes(dtype);
}

void PackPanels(DType dst, void* out, int64_t n, int64_t k, const void* const* rows, DType src, int64_t panel_begin,
                int64_t panel_end) {
  RequirePackable(dst);
  const int64_t num_panels = (n + kPanel - 1) / kPanel;
  SAPWOOD_REQUIRE(0 <= panel_begin && panel_begin <= panel_end && panel_end <= num_panels, "panels [", panel_begin,
                  ", ", panel_end, ") must lie in [0, ", num_panels, ")");
  if (dst == DType::kF32) {
    PackAs(static_cast<float*>(out), k, rows, src, panel_begin, panel_end);
  } else {
    PackAs(static_cast<Bf16*>(out), k, rows, src, panel_begin, panel_end);
  }
}

const char* WeightFormatName(WeightFormat format) {
  switch (format) {
    case WeightFormat::kAct: return "act";
    case WeightFormat::kInt8: return "int8";
    case WeightFormat::kInt4: return "int4";
  }
  throw InternalError(StrCat("no weight format ", static_cast<int>(format)));
}

void ReadQuantizedRow(WeightFormat format, const void* panel, int64_t k, int64_t row, float* out) {
  SAPWOOD_REQUIRE(format != WeightFormat::kAct && row >= 0 && row < kPanel,
                  "a row 0..63 of an int8 or int4 panel is wanted, got row ", row, " of format ", WeightFormatName(format));
  const bool nibbles = format == WeightFormat::kInt4;
  const int64_t value_bytes = kPanel * (nibbles ? kQ8Block / 2 : kQ8Block);
  const auto* group = static_cast<const uint8_t*>(panel);
  for (int64_t i = 0; i < k; ++i) {
    if (i > 0 && i % kQ8Block == 0) group += value_bytes + 2 * kPanel;
    const int64_t j = i % kQ8Block;
    uint16_t scale;
    std::memcpy(&scale, group + value_bytes + 2 * row, 2);
    int q;
    if (nibbles) {
      const uint8_t byte = group[(j / 8 * kPanel + row) * 4 + j % 4];
      q = (j % 8 < 4 ? byte & 15 : byte >> 4) - 8;
    } else {
      q = group[(j / 4 * kPanel + row) * 4 + j % 4] - 128;
    }
    out[i] = static_cast<float>(q) * F16ToF32(scale);
  }
}

}  // namespace sapwood
