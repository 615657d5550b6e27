// int8 and int4: what quantising may lose, where it puts things, and linear layers on the result against fp64, at every
// ISA level of this machine, with poisoned outputs, guard bands and odd sizes.
#include <array>

#include "base/check.h"
#include "kernels_testing.h"

namespace sapwood {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNearTie = 1e-4;  // of a step: closer than this to a tie, either neighbour is right

std::string What(Isa isa, WeightFormat format, int64_t m, int64_t n, int64_t k) {
  return std::string(IsaName(isa)) + " " + WeightFormatName(format) + " m " + std::to_string(m) + " n " +
         std::to_string(n) + " k " + std::to_string(k);
}

// --- Half --------------------------------------------------------------------------------------------------------

TEST(Half, Fp16RoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float low = F16ToF32(half);
    // Above the largest number lies 2^16, which is infinity.
    const float high = bits == 0x7bff ? 65536.0f : F16ToF32(static_cast<uint16_t>(bits + 1));
    const float middle = low + (high - low) / 2;
    for (uint32_t sign : {0u, 0x8000u}) {
      const float s = sign ? -1.0f : 1.0f;
      ASSERT_EQ(F32ToF16(s * low), bits | sign);
      ASSERT_EQ(F32ToF16(s * middle), (bits + bits % 2) | sign) << "a tie goes to the even one, after " << bits;
      ASSERT_EQ(F32ToF16(s * std::nextafter(middle, 0.0f)), bits | sign);
      ASSERT_EQ(F32ToF16(s * std::nextafter(middle, 1e9f)), (bits + 1) | sign);
    }
  }
  EXPECT_EQ(F32ToF16(1e-30f), 0);
  EXPECT_EQ(F32ToF16(-3e38f), 0xfc00);
  EXPECT_EQ(F32ToF16(static_cast<float>(kInf)), 0x7c00);
  for (uint32_t bits : {0x7f800001u, 0xffc01234u}) {
    EXPECT_EQ(F32ToF16(BitsToF32(bits)), 0x7e00u | (bits >> 16 & 0x8000u)) << "quiet, with its sign";
  }
}

// --- Rows of activations -----------------------------------------------------------------------------------------

// Blocks of n values (in act, rounded already) against the rule: scale = max |x| / 127, x / scale to the nearest
// integer. What lies past the end of the row is zero.
void ExpectQ8(const Q8Block* blocks, const std::vector<double>& x, const std::string& what) {
  const auto n = static_cast<int64_t>(x.size());
  for (int64_t b = 0; b < Q8Blocks(n); ++b) {
    const auto element = [&](int64_t i) {
      return b * kQ8Block + i < n ? x[static_cast<size_t>(b * kQ8Block + i)] : 0.0;
    };
    double most = 0;
    for (int64_t i = 0; i < kQ8Block; ++i) most = std::max(most, std::abs(element(i)));
    const double scale = blocks[b].scale;
    ASSERT_NEAR(scale, most / 127, most / 127 * 0x1p-22) << what << " block " << b;
    int32_t sum = 0;
    for (int64_t i = 0; i < kQ8Block; ++i) {
      const int q = blocks[b].q[i];
      sum += q;
      ASSERT_LE(std::abs(q), 127) << what << " block " << b << " element " << i;
      if (scale == 0) {
        ASSERT_EQ(q, 0) << what << " block " << b << " element " << i;
      } else {
        ASSERT_LE(std::abs(q - element(i) / scale), 0.5 + kNearTie) << what << " block " << b << " element " << i;
      }
    }
    ASSERT_EQ(blocks[b].minus_8_sums, -8 * sum) << what << " block " << b;
    ASSERT_EQ(blocks[b].minus_128_sums, -128 * sum) << what << " block " << b;
  }
}

constexpr int64_t kWidths[] = {1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 172, 1024, 4097};

TEST(Quantize, OddSizes) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (int64_t h : kWidths) {
        Rng rng(static_cast<uint64_t>(h));
        Buffer x(act, h), y = Q8Buffer(Q8Blocks(h));
        // From block to block magnitudes far apart.
        for (int64_t i = 0; i < h; ++i)
          x.Set(i, rng.Normal() * std::ldexp(1.0, static_cast<int>(i / kQ8Block % 7 * 20 - 60)));
        Kernels(isa).quantize(act, x.data(), Q8At(y, 0), h);
        std::vector<double> values;
        for (int64_t i = 0; i < h; ++i) values.push_back(x.Get(i));
        ExpectQ8(Q8At(y, 0), values, std::string(IsaName(isa)) + " " + ActName(act) + " h " + std::to_string(h));
        ASSERT_TRUE(y.GuardsIntact());
      }
    }
  }
}

TEST(Quantize, TiesGoToEven) {
  for (Isa isa : SupportedLevels()) {
    // 127 makes the scale 1.
    std::array<float, 32> x = {127.0f, 0.5f,  1.5f,    2.5f,   -0.5f,       -1.5f, -2.5f,
                               63.5f,  64.5f, -126.5f, 125.5f, 0.49999997f, -0.0f, 126.49999f};
    const std::array<int, 32> want = {127, 0, 2, 2, 0, -2, -2, 64, 64, -126, 126, 0, 0, 126};
    for (float unit : {1.0f, 0x1p-100f, 0x1p100f}) {
      std::array<float, 32> scaled;
      std::transform(x.begin(), x.end(), scaled.begin(), [&](float v) { return v * unit; });
      Buffer y = Q8Buffer(1);
      Kernels(isa).quantize(DType::kF32, scaled.data(), Q8At(y, 0), 32);
      EXPECT_EQ(Q8At(y, 0)->scale, unit);
      for (size_t i = 0; i < want.size(); ++i) EXPECT_EQ(Q8At(y, 0)->q[i], want[i]) << IsaName(isa) << " " << i;
    }
  }
}

TEST(Quantize, TheSmallestAndTheLargest) {
  const float least = std::numeric_limits<float>::min(), most = std::numeric_limits<float>::max();
  for (Isa isa : SupportedLevels()) {
    const auto block = [&](std::vector<float> x) {
      Buffer y = Q8Buffer(1);
      Kernels(isa).quantize(DType::kF32, x.data(), Q8At(y, 0), static_cast<int64_t>(x.size()));
      return *Q8At(y, 0);
    };
    const auto expect_zero = [&](std::vector<float> x) {
      const Q8Block b = block(x);
      EXPECT_EQ(b.scale, 0.0f) << IsaName(isa) << " " << x[0];
      EXPECT_EQ(b.minus_8_sums, 0);
      EXPECT_EQ(b.minus_128_sums, 0);
      EXPECT_TRUE(std::all_of(b.q, b.q + kQ8Block, [](int8_t q) { return q == 0; })) << IsaName(isa) << " " << x[0];
    };
    expect_zero({0.0f, -0.0f});
    expect_zero({1e-45f, -1e-40f, 1e-38f});  // the scale would be subnormal
    expect_zero({126 * least});
    EXPECT_EQ(block({128 * least, -64 * least}).q[0], 127);
    EXPECT_EQ(block({128 * least, -64 * least}).q[1], -64);  // -63.5, to even
    EXPECT_EQ(block({most, -most}).q[1], -127);
    EXPECT_FLOAT_EQ(block({most, -most}).scale, most / 127);
  }
}

TEST(Quantize, WhatIsNotFiniteSpoilsItsBlockOnly) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (double bad : {std::nan(""), kInf, -kInf}) {
        for (int64_t at : {0, 17, 31, 32, 40, 67}) {
          Rng rng(1);
          Buffer x(act, 70), good = Q8Buffer(3), y = Q8Buffer(3);
          x.FillNormal(rng);
          Kernels(isa).quantize(act, x.data(), Q8At(good, 0), 70);
          x.Set(at, bad);
          if (at == 17) x.Set(3, -bad);
          Kernels(isa).quantize(act, x.data(), Q8At(y, 0), 70);
          for (int64_t b = 0; b < 3; ++b) {
            if (b != at / kQ8Block) {
              ASSERT_TRUE(SameBits(y, b * kBlockFloats, good, b * kBlockFloats, kBlockFloats));
              continue;
            }
            ASSERT_TRUE(std::isnan(Q8At(y, b)->scale))
                << IsaName(isa) << " " << ActName(act) << " " << bad << " " << at;
            ASSERT_EQ(Q8At(y, b)->minus_8_sums, 0);
            ASSERT_EQ(Q8At(y, b)->minus_128_sums, 0);
          }
        }
      }
    }
  }
}

TEST(RmsNormQ8, OddSizes) {
  for (Isa isa : SupportedLevels()) {
    for (int64_t h : kWidths) {
      for (bool plus_one : {false, true}) {
        Rng rng(static_cast<uint64_t>(h));
        Buffer x(DType::kF32, h), w(DType::kF32, h), f32(DType::kF32, h), y = Q8Buffer(Q8Blocks(h)),
                                                                          want = Q8Buffer(Q8Blocks(h));
        x.FillNormal(rng, 3.0);
        w.FillNormal(rng);
        Kernels(isa).rms_norm(DType::kQ8, x.f32(), w.f32(), y.data(), h, 1e-5f, plus_one);
        double sum = 0;
        for (int64_t i = 0; i < h; ++i) sum += x.Get(i) * x.Get(i);
        const double r = 1.0 / std::sqrt(sum / static_cast<double>(h) + 1e-5);
        for (int64_t i = 0; i < h; ++i) {
          const double exact = x.Get(i) * r * (w.Get(i) + plus_one);
          ASSERT_NEAR(Q8Value(Q8At(y, 0), i), exact,
                      Q8At(y, i / kQ8Block)->scale * (0.5 + kNearTie) + 1e-6 * std::abs(exact))
              << IsaName(isa) << " h " << h << " element " << i;
        }
        // To the bit what the norm in f32 and the op quantize would have made.
        Kernels(isa).rms_norm(DType::kF32, x.f32(), w.f32(), f32.data(), h, 1e-5f, plus_one);
        Kernels(isa).quantize(DType::kF32, f32.data(), Q8At(want, 0), h);
        EXPECT_TRUE(y.SameBytes(want)) << IsaName(isa) << " h " << h;
      }
    }
  }
}

// --- Panels of weights -------------------------------------------------------------------------------------------

// Element k of an output as the words of kernels.h place it: the stored integer without its offset, and the scale.
struct Stored {
  int q;
  float scale;
};
Stored ReadPanel(WeightFormat format, const uint8_t* panel, int64_t output, int64_t k) {
  const bool nibbles = format == WeightFormat::kInt4;
  const int64_t fours = nibbles ? 4 : 8, group_bytes = fours * 64 * 4 + 64 * 2, i = k % 32;
  const uint8_t* group = panel + k / 32 * group_bytes;
  uint16_t scale;
  std::memcpy(&scale, group + fours * 64 * 4 + output * 2, 2);
  const int64_t four = nibbles ? i / 8 : i / 4;
  const uint8_t byte = group[(four * 64 + output) * 4 + i % 4];
  if (!nibbles) return {byte - 128, F16ToF32(scale)};
  return {(i / 4 % 2 == 0 ? byte % 16 : byte / 16) - 8, F16ToF32(scale)};
}

TEST(QuantizePanel, LayoutPaddingAndNullRows) {
  for (Isa isa : SupportedLevels()) {
    for (WeightFormat format : kQuantized) {
      const bool nibbles = format == WeightFormat::kInt4;
      for (int64_t k : {1, 4, 31, 32, 33, 100}) {
        Rng rng(static_cast<uint64_t>(k));
        Buffer rows(DType::kF32, 64 * k);
        rows.FillNormal(rng);
        auto pointers = PanelRows(rows, 64, k);
        pointers[13] = pointers[63] = nullptr;
        const QuantizedPanels panels(isa, format, pointers, k);
        ASSERT_EQ(panels.panel_bytes(), Q8Blocks(k) * 64 * (nibbles ? 18 : 34));
        ASSERT_TRUE(panels.packed.GuardsIntact());
        for (int64_t n = 0; n < 64; ++n) {
          const std::vector<float> row = panels.Row(n);
          for (int64_t i = 0; i < Q8Blocks(k) * kQ8Block; ++i) {
            const Stored stored = ReadPanel(format, panels.panel(0), n, i);
            const std::string what = What(isa, format, 0, n, k) + " element " + std::to_string(i);
            if (i >= k || pointers[static_cast<size_t>(n)] == nullptr) {
              ASSERT_EQ(stored.q, 0) << what;
            } else {
              // In int4 what lies beyond an end of the range is clamped.
              ASSERT_NEAR(float(stored.q) * stored.scale, rows.Get(n * k + i),
                          (nibbles ? 1.5 : 0.51) * std::abs(stored.scale))
                  << what;
            }
            if (i < k) {
              ASSERT_EQ(row[static_cast<size_t>(i)], float(stored.q) * stored.scale) << what;
            }
            if (pointers[static_cast<size_t>(n)] == nullptr) {
              ASSERT_EQ(stored.scale, 0.0f) << what;
            }
          }
        }
      }
    }
  }
  float out[1];
  EXPECT_THROW(ReadQuantizedRow(WeightFormat::kAct, out, 1, 0, out), InvalidArgument);
  EXPECT_THROW(ReadQuantizedRow(WeightFormat::kInt8, out, 1, 64, out), InvalidArgument);
  EXPECT_THROW(ReadQuantizedRow(WeightFormat::kInt4, out, 1, -1, out), InvalidArgument);
  EXPECT_THROW(PackedBytes(WeightFormat::kInt8, DType::kF32, 1, -1), InvalidArgument);
  EXPECT_EQ(PackedBytes(WeightFormat::kInt8, DType::kBF16, 65, 64), 128u * 64 * 34 / 32);
  EXPECT_EQ(PackedBytes(WeightFormat::kInt4, DType::kBF16, 65, 64), 128u * 64 * 18 / 32);
}

// Distributions that weights have and that they should not have, at magnitudes from f16's subnormal scales upwards.
struct Distribution {
  const char* name;
  double (*draw)(Rng&, int64_t);
};
constexpr Distribution kDistributions[] = {
    {"normal", [](Rng& rng, int64_t) { return rng.Normal(); }},
    {"uniform", [](Rng& rng, int64_t) { return 2 * rng.Uniform() - 1; }},
    {"long tails", [](Rng& rng, int64_t) { return std::pow(rng.Normal(), 3.0); }},
    {"one outlier", [](Rng& rng, int64_t i) { return i % 32 == 5 ? 40.0 : rng.Normal(); }},
    {"one value", [](Rng&, int64_t) { return -0.7; }},
    {"signs", [](Rng& rng, int64_t) { return rng.Below(2) ? 1.0 : -1.0; }},
    {"sparse", [](Rng& rng, int64_t) { return rng.Below(11) ? 0.0 : rng.Normal(); }},
};
constexpr double kMagnitudes[] = {1.0, 0.02, 1e-3, 2e-5, 1e-6, 1e-12, 1e-38, 1e4};

Buffer Draw(const Distribution& distribution, double magnitude, int64_t n) {
  Rng rng(static_cast<uint64_t>(n) + static_cast<uint64_t>(distribution.name[0]));
  Buffer rows(DType::kF32, n);
  for (int64_t i = 0; i < n; ++i) rows.Set(i, distribution.draw(rng, i) * magnitude);
  return rows;
}

TEST(QuantizePanel, Int8RoundsToNearestEvenByTheF16Scale) {
  constexpr int64_t kK = 96;
  for (Isa isa : SupportedLevels()) {
    for (const Distribution& distribution : kDistributions) {
      for (double magnitude : kMagnitudes) {
        Buffer rows = Draw(distribution, magnitude, 64 * kK);
        const QuantizedPanels panels(isa, WeightFormat::kInt8, PanelRows(rows, 64, kK), kK);
        for (int64_t first = 0; first < 64 * kK; first += kQ8Block) {
          double most = 0;
          for (int64_t i = first; i < first + kQ8Block; ++i) most = std::max(most, std::abs(rows.Get(i)));
          const float scale = ReadPanel(WeightFormat::kInt8, panels.panel(0), first / kK, first % kK).scale;
          const std::string what =
              std::string(IsaName(isa)) + " " + distribution.name + " of " + std::to_string(magnitude);
          // The nearest f16 of most / 127, which is rounded to f32 on the way.
          const uint16_t bits = F32ToF16(scale);
          ASSERT_LE(most / 127, (scale + F16ToF32(static_cast<uint16_t>(bits + 1))) / 2.0 * (1 + 0x1p-22)) << what;
          ASSERT_GE(most / 127,
                    bits == 0 ? 0.0 : (scale + F16ToF32(static_cast<uint16_t>(bits - 1))) / 2.0 * (1 - 0x1p-22))
              << what;
          for (int64_t i = first; i < first + kQ8Block; ++i) {
            const int q = ReadPanel(WeightFormat::kInt8, panels.panel(0), i / kK, i % kK).q;
            const double exact = scale == 0 ? 0.0 : std::clamp(rows.Get(i) / scale, -127.0, 127.0);
            if (std::abs(std::abs(exact - std::floor(exact)) - 0.5) > kNearTie) {
              ASSERT_EQ(q, std::nearbyint(exact)) << what << " element " << i;
            } else {
              ASSERT_LE(std::abs(q - exact), 0.5 + kNearTie) << what << " element " << i;
            }
          }
        }
      }
    }
    // Ties, by a scale that is a power of two.
    std::vector<float> ties = {127.0f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 125.5f, -126.5f};
    const std::vector<int> want = {127, 0, 2, 2, 0, -2, -2, 126, -126};
    for (float& x : ties) x *= 0x1p-9f;
    std::vector<const float*> pointers(64, nullptr);
    pointers[7] = ties.data();
    const QuantizedPanels panels(isa, WeightFormat::kInt8, pointers, static_cast<int64_t>(ties.size()));
    for (size_t i = 0; i < want.size(); ++i) {
      const Stored stored = ReadPanel(WeightFormat::kInt8, panels.panel(0), 7, static_cast<int64_t>(i));
      EXPECT_EQ(stored.q, want[i]) << IsaName(isa) << " " << ties[i];
      EXPECT_EQ(stored.scale, 0x1p-9f);
    }
  }
}

// The squared error of ggml's Q4_0: the element of largest magnitude becomes -8, halves are rounded up, and the scale
// is rounded to f16 after the division.
double Q4_0Error(const Buffer& rows, int64_t first) {
  float extreme = 0;
  for (int64_t i = first; i < first + kQ8Block; ++i) {
    const auto x = static_cast<float>(rows.Get(i));
    if (std::abs(x) > std::abs(extreme)) extreme = x;
  }
  const float scale = extreme / -8.0f;
  // 1 / a subnormal is infinite, and no integer is: such a block is all zeros, as its scale is in f16.
  const float inverse = std::isnormal(scale) ? 1.0f / scale : 0.0f;
  double error = 0;
  for (int64_t i = first; i < first + kQ8Block; ++i) {
    const auto x = static_cast<float>(rows.Get(i));
    const int q = std::min(15, static_cast<int>(x * inverse + 8.5f)) - 8;
    error += std::pow(q * double{F16ToF32(F32ToF16(scale))} - x, 2);
  }
  return error;
}

TEST(QuantizePanel, Int4LosesNoMoreThanQ4_0) {
  constexpr int64_t kK = 256;
  for (Isa isa : SupportedLevels()) {
    for (const Distribution& distribution : kDistributions) {
      for (double magnitude : kMagnitudes) {
        Buffer rows = Draw(distribution, magnitude, 64 * kK);
        const QuantizedPanels panels(isa, WeightFormat::kInt4, PanelRows(rows, 64, kK), kK);
        const std::string what =
            std::string(IsaName(isa)) + " " + distribution.name + " of " + std::to_string(magnitude);
        double total = 0, total_q4_0 = 0;
        for (int64_t first = 0; first < 64 * kK; first += kQ8Block) {
          double error = 0, square = 0;
          for (int64_t i = first; i < first + kQ8Block; ++i) {
            const Stored stored = ReadPanel(WeightFormat::kInt4, panels.panel(0), i / kK, i % kK);
            ASSERT_TRUE(stored.q >= -8 && stored.q <= 7) << what;
            error += std::pow(double{stored.scale} * stored.q - rows.Get(i), 2);
            square += rows.Get(i) * rows.Get(i);
          }
          const double q4_0 = Q4_0Error(rows, first);
          // What fp32 sums of 32 squares can tell apart.
          ASSERT_LE(error, q4_0 + 1e-6 * square) << what << " block " << first / kQ8Block;
          total += error;
          total_q4_0 += q4_0;
        }
        if (std::string(distribution.name) == "normal" && magnitude > 1e-4) {
          EXPECT_LT(total, 0.92 * total_q4_0) << what;
        }
      }
    }
  }
}

TEST(QuantizePanel, WhatIsNotFiniteSpoilsItsBlockOnly) {
  constexpr int64_t kK = 70, kOutput = 9;
  for (Isa isa : SupportedLevels()) {
    for (WeightFormat format : kQuantized) {
      Rng rng(3);
      Buffer rows(DType::kF32, 64 * kK);
      rows.FillNormal(rng);
      const QuantizedPanels good(isa, format, PanelRows(rows, 64, kK), kK);
      for (const auto& [first, second] :
           {std::pair{std::nan(""), 1.0}, {kInf, 1.0}, {-kInf, 1.0}, {kInf, -kInf}, {1e30, -1e30}}) {
        Buffer spoilt = rows;
        spoilt.Set(kOutput * kK + 35, first);
        spoilt.Set(kOutput * kK + 60, second);
        const QuantizedPanels panels(isa, format, PanelRows(spoilt, 64, kK), kK);
        for (int64_t n = 0; n < 64; ++n) {
          for (int64_t k = 0; k < kK; ++k) {
            const Stored got = ReadPanel(format, panels.panel(0), n, k), want = ReadPanel(format, good.panel(0), n, k);
            if (n == kOutput && k / kQ8Block == 1) {
              // Not zero: a product with an integer of zero is NaN as well, but an input of zero must not hide it.
              ASSERT_TRUE(std::isnan(got.scale)) << What(isa, format, 0, n, k) << " " << first << " " << second;
            } else {
              ASSERT_TRUE(got.q == want.q && got.scale == want.scale) << What(isa, format, 0, n, k);
            }
          }
        }
      }
    }
  }
}

// --- Linear layers -----------------------------------------------------------------------------------------------

// Bounds on what fp32 sums of k / 32 terms lose: relative L2, and per element of the values' rms.
void ExpectNear(const std::vector<double>& got, const std::vector<double>& want, const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  double error2 = 0, norm2 = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error2 += (got[i] - want[i]) * (got[i] - want[i]);
    norm2 += want[i] * want[i];
  }
  EXPECT_LE(std::sqrt(error2), 2e-6 * std::sqrt(norm2)) << what;
  const double rms = std::sqrt(norm2 / static_cast<double>(want.size()));
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], 1e-5 * (std::abs(want[i]) + rms)) << what << " element " << i;
  }
}

struct Shape {
  int64_t m, n, k;
};

// Around the rows of a tile (1, 3, 4, 6) and of a block of rows (96); N odd, below, at and beyond panels and their
// groups of four; K below, at and beyond a block and the slices of K (256, 4096).
constexpr Shape kShapes[] = {{1, 64, 32},    {1, 100, 37},  {1, 1, 1},     {2, 65, 33},   {3, 129, 4130},
                             {4, 70, 100},   {5, 64, 31},   {6, 300, 65},  {7, 33, 257},  {12, 130, 64},
                             {24, 64, 4100}, {25, 65, 515}, {33, 99, 300}, {97, 50, 260}, {101, 70, 1027}};

// M rows of the shape, lda blocks apart (NaN between them), as the quantize kernel made them.
struct Rows {
  int64_t lda;
  Buffer blocks;

  Rows(Isa isa, const Shape& s, Rng& rng) : lda(Q8Blocks(s.k) + 2), blocks(Q8Buffer(s.m * lda)) {
    for (int64_t m = 0; m < s.m; ++m) Quantize(isa, m, s.k, rng);
  }
  void Quantize(Isa isa, int64_t m, int64_t k, Rng& rng) {
    Buffer x(DType::kF32, k);
    x.FillNormal(rng);
    Kernels(isa).quantize(DType::kF32, x.data(), Q8At(blocks, m * lda), k);
  }
};

GemmArgs ArgsFor(const Shape& s, const Rows& a, const QuantizedPanels& w, Buffer& out, int64_t ldc, Epilogue epilogue) {
  GemmArgs args{};
  args.a = a.blocks.data();
  args.lda = a.lda;
  args.w = w.packed.data();
  args.out = out.data();
  args.ldc = ldc;
  args.n = s.n;
  args.k = s.k;
  args.epilogue = epilogue;
  args.format = w.format;
  return args;
}

// [m][panels * 64] in the order of the panels.
std::vector<double> Product(const Shape& s, const Rows& a, const QuantizedPanels& w) {
  std::vector<double> product, columns(static_cast<size_t>(s.k));
  const int64_t places = w.num_panels * kPanel;
  product.resize(static_cast<size_t>(s.m * places));
  for (int64_t n = 0; n < places; ++n) {
    const std::vector<float> row = w.Row(n);
    for (int64_t m = 0; m < s.m; ++m) {
      double sum = 0;
      for (int64_t k = 0; k < s.k; ++k) sum += Q8Value(Q8At(a.blocks, m * a.lda), k) * row[static_cast<size_t>(k)];
      product[static_cast<size_t>(m * places + n)] = sum;
    }
  }
  return product;
}

TEST(QuantizedGemm, LinearEpilogues) {
  for (Isa isa : SupportedLevels()) {
    for (WeightFormat format : kQuantized) {
      for (const Shape& s : kShapes) {
        Rng rng(static_cast<uint64_t>(s.m * 131 + s.n * 17 + s.k));
        Buffer rows(DType::kF32, s.n * s.k);
        rows.FillNormal(rng, 1.0 / std::sqrt(static_cast<double>(s.k)));
        const QuantizedPanels w(isa, format, PanelRows(rows, s.n, s.k), s.k);
        const Rows a(isa, s, rng);
        const int64_t ldc = s.n + 5;
        Buffer bias(DType::kF32, s.n), residual(DType::kF32, s.m * ldc);
        bias.FillNormal(rng);
        residual.FillNormal(rng);
        const std::vector<double> product = Product(s, a, w);
        const std::string what = What(isa, format, s.m, s.n, s.k);
        for (bool with_bias : {false, true}) {
          const auto run = [&](DType act, Epilogue epilogue, Buffer& out, const Buffer& from) {
            GemmArgs args = ArgsFor(s, a, w, out, ldc, epilogue);
            args.bias = with_bias ? bias.f32() : nullptr;
            args.residual = static_cast<const float*>(from.data());
            Kernels(isa).gemm(act, args, 0, s.m, 0, w.num_panels);
            ASSERT_TRUE(out.GuardsIntact()) << what;
          };
          for (Epilogue epilogue : {Epilogue::kStoreF32, Epilogue::kResidual}) {
            Buffer out(DType::kF32, s.m * ldc);
            run(DType::kBF16, epilogue, out, residual);
            std::vector<double> got, want;
            for (int64_t m = 0; m < s.m; ++m) {
              for (int64_t n = 0; n < s.n; ++n) {
                got.push_back(out.Get(m * ldc + n));
                want.push_back(product[static_cast<size_t>(m * w.num_panels * kPanel + n)] +
                               (with_bias ? bias.Get(n) : 0.0) +
                               (epilogue == Epilogue::kResidual ? residual.Get(m * ldc + n) : 0.0));
              }
              for (int64_t n = s.n; n < ldc; ++n) ASSERT_TRUE(out.BytesAre(m * ldc + n, 0xff)) << what;
            }
            ExpectNear(got, want, what + " epilogue " + std::to_string(int(epilogue)));
            if (epilogue == Epilogue::kResidual) {  // onto itself
              Buffer alias = residual;
              run(DType::kF32, epilogue, alias, alias);
              for (int64_t m = 0; m < s.m; ++m) ASSERT_TRUE(SameBits(alias, m * ldc, out, m * ldc, s.n)) << what;
            } else {  // the same, rounded to act
              for (DType act : kActs) {
                Buffer rounded(act, s.m * ldc);
                run(act, Epilogue::kStoreAct, rounded, residual);
                for (int64_t m = 0; m < s.m; ++m) {
                  for (int64_t n = 0; n < s.n; ++n) {
                    const auto x = static_cast<float>(out.Get(m * ldc + n));
                    ASSERT_EQ(rounded.Get(m * ldc + n), act == DType::kF32 ? x : Bf16ToF32(F32ToBf16(x))) << what;
                  }
                  for (int64_t n = s.n; n < ldc; ++n) ASSERT_TRUE(rounded.BytesAre(m * ldc + n, 0xff)) << what;
                }
              }
            }
          }
        }
      }
    }
  }
}

TEST(QuantizedGemm, SiluMul) {
  for (Isa isa : SupportedLevels()) {
    for (WeightFormat format : kQuantized) {
      for (const Shape& s : {Shape{1, 172, 64}, {9, 172, 65}, {4, 32, 31}, {7, 5, 300}, {33, 129, 100}}) {
        Rng rng(static_cast<uint64_t>(s.n + s.k));
        Buffer rows(DType::kF32, 2 * s.n * s.k);
        rows.FillNormal(rng, 2.0 / std::sqrt(static_cast<double>(s.k)));
        const QuantizedPanels w(isa, format, PanelRows(rows, 2 * s.n, s.k, true), s.k);
        const Rows a(isa, s, rng);
        Buffer bias(DType::kF32, w.num_panels * kPanel);  // zero where there is no output
        for (int64_t i = 0; i < bias.count(); ++i) bias.Set(i, i / 64 * 32 + i % 32 < s.n ? rng.Normal() : 0.0);
        const std::vector<double> product = Product(s, a, w);
        const std::string what = What(isa, format, s.m, s.n, s.k);
        for (bool with_bias : {false, true}) {
          const auto run = [&](DType act, Epilogue epilogue, Buffer& out, int64_t ldc) {
            GemmArgs args = ArgsFor(s, a, w, out, ldc, epilogue);
            args.bias = with_bias ? bias.f32() : nullptr;
            Kernels(isa).gemm(act, args, 0, s.m, 0, w.num_panels);
            ASSERT_TRUE(out.GuardsIntact()) << what;
          };
          const int64_t ldc = s.n + 3, ld_blocks = Q8Blocks(s.n) + 1;
          Buffer out(DType::kF32, s.m * ldc), rounded(DType::kBF16, s.m * ldc);
          run(DType::kF32, Epilogue::kSiluMul, out, ldc);
          run(DType::kBF16, Epilogue::kSiluMul, rounded, ldc);
          std::vector<double> got, want;
          for (int64_t m = 0; m < s.m; ++m) {
            for (int64_t n = 0; n < s.n; ++n) {
              const int64_t at = n / 32 * 64 + n % 32;
              const auto sum = [&](int64_t place) {
                return product[static_cast<size_t>(m * w.num_panels * kPanel + place)] +
                       (with_bias ? bias.Get(place) : 0.0);
              };
              got.push_back(out.Get(m * ldc + n));
              want.push_back(sum(at) / (1.0 + std::exp(-sum(at))) * sum(at + 32));
              ASSERT_EQ(rounded.Get(m * ldc + n), Bf16ToF32(F32ToBf16(static_cast<float>(got.back())))) << what;
            }
            for (int64_t n = s.n; n < ldc; ++n) ASSERT_TRUE(out.BytesAre(m * ldc + n, 0xff)) << what;
          }
          ExpectNear(got, want, what + " silu_mul");

          // To the bit what the op quantize would have made of the f32 output, whatever act is.
          for (DType act : kActs) {
            Buffer blocks = Q8Buffer(s.m * ld_blocks), expected = Q8Buffer(s.m * ld_blocks);
            run(act, Epilogue::kSiluMulQ8, blocks, ld_blocks);
            for (int64_t m = 0; m < s.m; ++m) {
              Kernels(isa).quantize(DType::kF32, out.at(m * ldc), Q8At(expected, m * ld_blocks), s.n);
            }
            EXPECT_TRUE(blocks.SameBytes(expected)) << what;
          }
        }
      }
    }
  }
}

TEST(QuantizedGemm, Logits) {
  for (Isa isa : SupportedLevels()) {
    for (WeightFormat format : kQuantized) {
      for (float softcap : {0.0f, 3.0f}) {
        const Shape s{7, 150, 77};
        Rng rng(3);
        Buffer rows(DType::kF32, s.n * s.k), out(DType::kF32, s.m * s.n), block_max(DType::kF32, s.m * 3);
        rows.FillNormal(rng, 0.3);
        const QuantizedPanels w(isa, format, PanelRows(rows, s.n, s.k), s.k);
        Rows a(isa, s, rng);
        GemmArgs args = ArgsFor(s, a, w, out, s.n, Epilogue::kLogits);
        args.scale = 0.7f;
        args.softcap = softcap;
        args.block_max = block_max.f32();
        Kernels(isa).gemm(DType::kBF16, args, 0, s.m, 0, 3);
        const std::vector<double> product = Product(s, a, w);
        std::vector<double> got, want;
        for (int64_t m = 0; m < s.m; ++m) {
          double most[3] = {-1e30, -1e30, -1e30};
          for (int64_t n = 0; n < s.n; ++n) {
            const double x = product[static_cast<size_t>(m * 192 + n)] * args.scale;
            got.push_back(out.Get(m * s.n + n));
            want.push_back(softcap > 0 ? softcap * std::tanh(x / softcap) : x);
            most[n / 64] = std::max(most[n / 64], got.back());
          }
          for (int b = 0; b < 3; ++b) ASSERT_EQ(block_max.Get(m * 3 + b), most[b]) << "row " << m << " block " << b;
        }
        EXPECT_TRUE(out.GuardsIntact());
        EXPECT_TRUE(block_max.GuardsIntact());
        ExpectNear(got, want, What(isa, format, s.m, s.n, s.k) + " logits");

        Q8At(a.blocks, 2 * a.lda)->scale = std::nanf("");
        Kernels(isa).gemm(DType::kBF16, args, 0, s.m, 0, 3);
        for (int b = 0; b < 3; ++b) EXPECT_TRUE(std::isnan(block_max.Get(2 * 3 + b))) << "a NaN logit must show";
        EXPECT_FALSE(std::isnan(block_max.Get(0)));
      }
    }
  }
}

// A bad block of a row spoils that row, one of a weight that output; all other bits stay.
TEST(QuantizedGemm, NanSpoilsOnlyItsRowOrOutput) {
  for (Isa isa : SupportedLevels()) {
    for (WeightFormat format : kQuantized) {
      for (int64_t m : {1, 6, 40}) {
        const Shape s{m, 100, 600};
        const int64_t bad_row = m / 2, bad_output = 70;
        Rng rng(11);
        Buffer rows(DType::kF32, s.n * s.k);
        rows.FillNormal(rng);
        const Rows a(isa, s, rng);
        const auto run = [&](const Rows& x, Buffer& weight) {
          const QuantizedPanels w(isa, format, PanelRows(weight, s.n, s.k), s.k);
          Buffer out(DType::kF32, s.m * s.n);
          Kernels(isa).gemm(DType::kF32, ArgsFor(s, x, w, out, s.n, Epilogue::kStoreF32), 0, s.m, 0, w.num_panels);
          return out;
        };
        const Buffer good = run(a, rows);
        const auto expect = [&](const Buffer& got, auto spoilt) {
          for (int64_t i = 0; i < s.m; ++i) {
            for (int64_t n = 0; n < s.n; ++n) {
              if (spoilt(i, n)) {
                ASSERT_TRUE(std::isnan(got.Get(i * s.n + n))) << What(isa, format, m, n, s.k) << " row " << i;
              } else {
                ASSERT_TRUE(SameBits(got, i * s.n + n, good, i * s.n + n, 1))
                    << What(isa, format, m, n, s.k) << " row " << i;
              }
            }
          }
        };
        Rows bad = a;
        std::vector<float> x(64, 1.0f);
        x[40] = std::nanf("");
        Kernels(isa).quantize(DType::kF32, x.data(), Q8At(bad.blocks, bad_row * bad.lda + 9), 64);
        expect(run(bad, rows), [&](int64_t i, int64_t) { return i == bad_row; });
        for (double value : {std::nan(""), kInf, 1e9}) {
          Buffer weight = rows;
          weight.Set(bad_output * s.k + 333, value);
          expect(run(a, weight), [&](int64_t, int64_t n) { return n == bad_output; });
        }
      }
    }
  }
}

}  // namespace
}  // namespace sapwood
