// WeightStore: what a slot holds is what its parts say, whatever their dtype, cut and stride, and however many threads
// pack; dummy rows; reloads and aliases.
#include "program/weight_store.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "base/check.h"

namespace sapwood {
namespace {

std::vector<float> Random(int64_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& x : out) x = normal(rng);
  return out;
}

uint16_t Bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float FromBf16(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Element (n, k) of packed panels.
float Packed(DType act, const void* data, int64_t k_total, int64_t n, int64_t k) {
  const int64_t panel = n / kPanel, lane = n % kPanel;
  if (act == DType::kF32) return static_cast<const float*>(data)[(panel * k_total + k) * kPanel + lane];
  const int64_t pairs = (k_total + 1) / 2;
  return FromBf16(static_cast<const uint16_t*>(data)[((panel * pairs + k / 2) * kPanel + lane) * 2 + k % 2]);
}

std::vector<uint8_t> Bytes(const WeightSlot& slot) {
  const auto* p = static_cast<const uint8_t*>(slot.data);
  return {p, p + slot.bytes};
}

std::vector<uint8_t> Row(const WeightSlot& table, int64_t row) {
  const size_t row_bytes = table.bytes / table.rows;
  const auto* p = static_cast<const uint8_t*>(table.data) + row * row_bytes;
  return {p, p + row_bytes};
}

class WeightStoreTest : public testing::TestWithParam<DType> {
 protected:
  float Round(float x) const { return GetParam() == DType::kF32 ? x : FromBf16(Bf16(x)); }
};
INSTANTIATE_TEST_SUITE_P(Acts, WeightStoreTest, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return info.param == DType::kF32 ? "f32" : "bf16"; });

TEST_P(WeightStoreTest, LinearStacksPartsOfAnyDTypeAndStride) {
  constexpr int64_t kK = 37, kStride = 41;
  const auto a = Random(70 * kStride, 1), c = Random(30 * kK, 2);
  std::vector<uint16_t> b;
  for (float x : Random(50 * kK, 3)) b.push_back(Bf16(x));
  const std::vector<SlotPart> parts = {{a.data(), DType::kF32, 70, kK, kStride},
                                       {b.data(), DType::kBF16, 50, kK, kK},
                                       {c.data(), DType::kF32, 30, kK, kK}};
  for (int32_t threads : {0, 1, 3}) {
    std::unique_ptr<ThreadPool> pool = threads > 0 ? std::make_unique<ThreadPool>(threads) : nullptr;
    WeightStore store(GetParam(), 1);
    store.Fill(0, SlotKind::kLinear, parts, pool.get());
    const WeightSlot& slot = store.slot(0);
    ASSERT_EQ(slot.rows, 150);
    ASSERT_EQ(slot.cols, kK);
    ASSERT_EQ(slot.bytes, PackedBytes(GetParam(), 150, kK));
    for (int64_t n = 0; n < 192; ++n) {
      for (int64_t k = 0; k < kK; ++k) {
        const float want = n < 70    ? Round(a[n * kStride + k])
                           : n < 120 ? FromBf16(b[(n - 70) * kK + k])
                           : n < 150 ? Round(c[(n - 120) * kK + k])
                                     : 0.0f;
        ASSERT_EQ(Packed(GetParam(), slot.data, kK, n, k), want) << n << " " << k;
      }
    }
  }
}

TEST_P(WeightStoreTest, GateUpInterleavesHalfPanels) {
  constexpr int64_t kI = 75, kK = 10;
  const auto gate = Random(kI * kK, 1), up = Random(kI * kK, 2);
  auto fused = gate;
  fused.insert(fused.end(), up.begin(), up.end());
  WeightStore store(GetParam(), 2);
  store.Fill(0, SlotKind::kGateUp, {{gate.data(), DType::kF32, kI, kK, kK}, {up.data(), DType::kF32, kI, kK, kK}},
             nullptr);
  store.Fill(1, SlotKind::kGateUp, {{fused.data(), DType::kF32, 2 * kI, kK, kK}}, nullptr);
  EXPECT_EQ(store.slot(0).rows, kI);
  EXPECT_EQ(Bytes(store.slot(0)), Bytes(store.slot(1)));
  for (int64_t panel = 0; panel < 3; ++panel) {
    for (int64_t lane = 0; lane < 64; ++lane) {
      const int64_t row = panel * 32 + lane % 32;
      for (int64_t k = 0; k < kK; ++k) {
        const float want = row >= kI ? 0.0f : Round((lane < 32 ? gate : up)[row * kK + k]);
        ASSERT_EQ(Packed(GetParam(), store.slot(0).data, kK, panel * 64 + lane, k), want);
      }
    }
  }
}

TEST_P(WeightStoreTest, TablesVectorsAndF32) {
  const auto x = Random(40 * 9, 4);
  std::vector<uint16_t> halves = {0x0000, 0x8000, 0x3c00, 0xc000, 0x0001, 0x03ff, 0x0400, 0x7bff, 0x7c00, 0xfc00};
  const float values[] = {0.0f, -0.0f, 1.0f, -2.0f, 0x1p-24f, 0x1.ff8p-15f, 0x1p-14f, 65504.0f, INFINITY, -INFINITY};
  WeightStore store(GetParam(), 3);
  store.Fill(0, SlotKind::kTable, {{x.data(), DType::kF32, 15, 9, 9}, {x.data() + 135, DType::kF32, 25, 9, 9}},
             nullptr);
  store.Fill(1, SlotKind::kVector, {{halves.data(), DType::kF16, 1, 10, 10}, {x.data(), DType::kF32, 7, 1, 1}},
             nullptr);
  store.Fill(2, SlotKind::kF32, {{x.data(), DType::kF32, 40, 9, 9}}, nullptr);
  EXPECT_EQ(store.slot(0).rows, 40);
  for (size_t i = 0; i < x.size(); ++i) {
    const float got = GetParam() == DType::kF32 ? static_cast<const float*>(store.slot(0).data)[i]
                                                : FromBf16(static_cast<const uint16_t*>(store.slot(0).data)[i]);
    ASSERT_EQ(got, Round(x[i]));
  }
  EXPECT_EQ(std::memcmp(store.slot(2).data, x.data(), x.size() * 4), 0) << "f32 stays f32";
  EXPECT_EQ(store.slot(1).rows, 17);
  const auto* v = static_cast<const float*>(store.slot(1).data);
  EXPECT_EQ(std::memcmp(v, values, sizeof values), 0);
  EXPECT_EQ(std::memcmp(v + 10, x.data(), 28), 0);
}

TEST_P(WeightStoreTest, DummyRowsAreKeyedUniformAndIndependentOfThreads) {
  constexpr int64_t kN = 200, kK = 300;
  const SlotPart dummy{nullptr, GetParam(), kN, kK, 0};
  ThreadPool pool(3);
  WeightStore a(GetParam(), 3), b(GetParam(), 3);
  a.Fill(0, SlotKind::kLinear, {dummy}, nullptr, 0.5f);
  b.Fill(0, SlotKind::kLinear, {dummy}, &pool, 0.5f);
  EXPECT_EQ(Bytes(a.slot(0)), Bytes(b.slot(0)));
  b.Fill(1, SlotKind::kLinear, {dummy}, &pool, 0.5f);
  EXPECT_NE(Bytes(a.slot(0)), Bytes(b.slot(1))) << "each slot has its own";
  b.Fill(2, SlotKind::kTable, {dummy}, &pool, 0.5f);
  double sum = 0, square = 0;
  for (int64_t n = 0; n < kN; ++n) {
    for (int64_t k = 0; k < kK; ++k) {
      const float x = Packed(GetParam(), a.slot(0).data, kK, n, k);
      ASSERT_LE(std::abs(x), 0.5f);
      sum += x;
      square += x * x;
    }
    ASSERT_NE(std::memcmp(Row(b.slot(2), n).data(), Row(b.slot(2), (n + 1) % kN).data(), Row(b.slot(2), n).size()), 0);
  }
  const double count = kN * kK;
  EXPECT_NEAR(sum / count, 0, 0.005);
  EXPECT_NEAR(square / count, 0.25 / 3, 0.002);
  // Scale 0 gives zeros, for those who want them.
  a.Fill(1, SlotKind::kVector, {{nullptr, DType::kF32, 5, 1, 1}}, nullptr);
  EXPECT_EQ(Bytes(a.slot(1)), std::vector<uint8_t>(20)) << "-0 would be another byte";
}

TEST_P(WeightStoreTest, ReloadsInPlaceAndAliasesFollow) {
  const auto x = Random(64 * 8, 1), y = Random(64 * 8, 2);
  const auto part = [](const std::vector<float>& v, int64_t rows) {
    return SlotPart{v.data(), DType::kF32, rows, 8, 8};
  };
  WeightStore store(GetParam(), 4);
  EXPECT_THROW(store.Alias(1, 0), InvalidArgument) << "not filled";
  store.Fill(0, SlotKind::kLinear, {part(x, 64)}, nullptr);
  store.Alias(1, 0);
  EXPECT_EQ(store.slot(1).data, store.slot(0).data);
  const size_t bytes = store.total_bytes();
  EXPECT_EQ(bytes, store.slot(0).bytes) << "shared memory counts once";
  const auto first = Bytes(store.slot(0));

  store.Fill(0, SlotKind::kLinear, {part(y, 64)}, nullptr);
  EXPECT_NE(Bytes(store.slot(0)), first);
  EXPECT_EQ(store.slot(1).data, store.slot(0).data);
  const auto second = Bytes(store.slot(0));

  store.Fill(1, SlotKind::kLinear, {part(x, 64)}, nullptr);  // ends the sharing
  EXPECT_EQ(Bytes(store.slot(0)), second);
  EXPECT_EQ(Bytes(store.slot(1)), first);

  store.Alias(2, 0);
  store.Fill(0, SlotKind::kLinear, {part(x, 40)}, nullptr);  // another shape: the alias keeps the old memory
  EXPECT_EQ(Bytes(store.slot(2)), second);
  EXPECT_EQ(store.slot(0).rows, 40);
}

// int8 and int4 from any source: what the slot holds is what the level's kernel makes of the same rows in f32.
TEST_P(WeightStoreTest, QuantisesLinearAndGateUp) {
  constexpr int64_t kRows = 75, kK = 45, kStride = 50;
  const auto a = Random(kRows * kStride, 1);
  std::vector<uint16_t> b;
  for (float x : Random(kRows * kK, 2)) b.push_back(Bf16(x));
  const std::vector<SlotPart> parts = {{a.data(), DType::kF32, kRows, kK, kStride},
                                       {b.data(), DType::kBF16, kRows, kK, kK}};
  std::vector<std::vector<float>> rows;
  for (int64_t n = 0; n < kRows; ++n) rows.emplace_back(a.begin() + n * kStride, a.begin() + n * kStride + kK);
  for (int64_t n = 0; n < kRows; ++n) {
    std::vector<float>& row = rows.emplace_back();
    for (int64_t k = 0; k < kK; ++k) row.push_back(FromBf16(b[n * kK + k]));
  }
  for (WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
    for (Isa isa : {Isa::kScalar, BestIsa()}) {
      for (int32_t threads : {0, 3}) {
        std::unique_ptr<ThreadPool> pool = threads > 0 ? std::make_unique<ThreadPool>(threads) : nullptr;
        WeightStore store(GetParam(), 2, isa);
        store.Fill(0, SlotKind::kLinear, parts, pool.get(), 0.0f, format);
        store.Fill(1, SlotKind::kGateUp, parts, pool.get(), 0.0f, format);
        for (int32_t id : {0, 1}) {
          const WeightSlot& slot = store.slot(id);
          EXPECT_EQ(slot.format, format);
          EXPECT_EQ(slot.rows, id == 0 ? 2 * kRows : kRows);
          ASSERT_EQ(slot.bytes, PackedBytes(format, GetParam(), 3 * kPanel, kK));
          const size_t panel_bytes = slot.bytes / 3;
          for (int64_t panel = 0; panel < 3; ++panel) {
            std::vector<const float*> pointers;
            for (int64_t i = 0; i < kPanel; ++i) {
              const int64_t half = panel * 32 + i % 32,
                            row = id == 0 ? panel * kPanel + i : half + (i < 32 ? 0 : kRows);
              const bool there = id == 0 ? row < 2 * kRows : half < kRows;
              pointers.push_back(there ? rows[row].data() : nullptr);
            }
            std::vector<uint8_t> want(panel_bytes);
            Kernels(isa).quantize_panel(format, pointers.data(), kK, want.data());
            ASSERT_EQ(
                std::memcmp(static_cast<const uint8_t*>(slot.data) + panel * panel_bytes, want.data(), panel_bytes), 0)
                << WeightFormatName(format) << " slot " << id << " panel " << panel;
          }
        }
      }
    }
  }
}

TEST_P(WeightStoreTest, AnotherFormatIsAnotherShape) {
  const auto x = Random(64 * 32, 1), y = Random(64 * 32, 2);
  const auto part = [](const std::vector<float>& v) { return SlotPart{v.data(), DType::kF32, 64, 32, 32}; };
  WeightStore store(GetParam(), 2);
  store.Fill(0, SlotKind::kLinear, {part(x)}, nullptr, 0.0f, WeightFormat::kInt8);
  store.Alias(1, 0);
  EXPECT_EQ(store.slot(1).format, WeightFormat::kInt8);
  const auto first = Bytes(store.slot(0));
  const void* const memory = store.slot(0).data;
  store.Fill(0, SlotKind::kLinear, {part(y)}, nullptr, 0.0f, WeightFormat::kInt8);  // in place: the alias follows
  EXPECT_EQ(store.slot(0).data, memory);
  EXPECT_NE(Bytes(store.slot(1)), first);
  const auto second = Bytes(store.slot(1));
  store.Fill(0, SlotKind::kLinear, {part(y)}, nullptr, 0.0f, WeightFormat::kInt4);  // elsewhere: it does not
  EXPECT_EQ(store.slot(0).format, WeightFormat::kInt4);
  EXPECT_EQ(store.slot(0).bytes, 64u * 18);
  EXPECT_EQ(store.slot(1).format, WeightFormat::kInt8);
  EXPECT_EQ(Bytes(store.slot(1)), second);
  for (SlotKind kind : {SlotKind::kTable, SlotKind::kVector, SlotKind::kF32}) {
    try {
      store.Fill(0, kind, {part(x)}, nullptr, 0.0f, WeightFormat::kInt8);
      ADD_FAILURE() << "accepted kind " << static_cast<int>(kind);
    } catch (const InvalidArgument& e) {
      const std::string what = e.what();
      EXPECT_NE(what.find("slot 0"), std::string::npos) << what;
      EXPECT_NE(what.find("got format int8"), std::string::npos) << what;
    }
  }
  EXPECT_EQ(store.slot(0).format, WeightFormat::kInt4) << "a refusal changes nothing";
}

TEST_P(WeightStoreTest, BadShapesAreRefusedWithSlotAndShapes) {
  const std::vector<float> x(1000);
  WeightStore store(GetParam(), 2);
  const auto message = [&](int32_t slot, SlotKind kind, const std::vector<SlotPart>& parts) {
    try {
      store.Fill(slot, kind, parts, nullptr);
    } catch (const InvalidArgument& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  const auto part = [&](int64_t rows, int64_t cols, int64_t stride, DType t = DType::kF32) {
    return SlotPart{x.data(), t, rows, cols, stride};
  };
  EXPECT_NE(message(2, SlotKind::kLinear, {part(4, 4, 4)}).find("slots 0..1"), std::string::npos);
  EXPECT_NE(message(0, SlotKind::kLinear, {}).find("at least one part"), std::string::npos);
  EXPECT_NE(message(1, SlotKind::kLinear, {part(4, 4, 4), part(4, 5, 5)}).find("slot 1 (linear)"), std::string::npos);
  EXPECT_NE(message(0, SlotKind::kLinear, {part(4, 4, 4), part(4, 5, 5)}).find("[4, 4], [4, 5]"), std::string::npos);
  EXPECT_NE(message(0, SlotKind::kGateUp, {part(5, 4, 4)}).find("equally many"), std::string::npos);
  EXPECT_NE(message(0, SlotKind::kTable, {part(4, 4, 3)}).find("stride"), std::string::npos);
  EXPECT_NE(message(0, SlotKind::kTable, {part(0, 4, 4)}).find("empty"), std::string::npos);
  EXPECT_NE(message(0, SlotKind::kF32, {part(4, 4, 4, DType::kI32)}).find("source must be"), std::string::npos);
  EXPECT_FALSE(store.slot(0).filled);
  EXPECT_THROW(WeightStore(DType::kF16, 1), InvalidArgument);
}

}  // namespace
}  // namespace sapwood
