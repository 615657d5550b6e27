// Cases, buffers and comparisons shared by kernels_test.cc and kernels_quant_test.cc (against fp64) and
// kernels_bitwise_test.cc (against itself).
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/half.h"
#include "kernels/kernels.h"

namespace sapwood {

inline std::vector<Isa> SupportedLevels() {
  std::vector<Isa> levels;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (IsaSupported(isa)) levels.push_back(isa);
  }
  return levels;
}

inline constexpr DType kActs[] = {DType::kF32, DType::kBF16};
inline const char* ActName(DType act) { return act == DType::kF32 ? "f32" : "bf16"; }

class Rng {
 public:
  explicit Rng(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint64_t Bits() {
    state_ += 0x9e3779b97f4a7c15ull;
    uint64_t z = (state_ ^ (state_ >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int64_t Below(int64_t n) { return static_cast<int64_t>(Bits() % static_cast<uint64_t>(n)); }
  double Uniform() { return static_cast<double>(Bits() >> 11) * 0x1p-53; }
  // Roughly normal, unit variance.
  double Normal() { return (Uniform() + Uniform() + Uniform() + Uniform() - 2.0) * std::sqrt(3.0); }

 private:
  uint64_t state_;
};

// Values of one dtype between guard bands of 256 bytes. Starts as NaN (all bytes `poison`); Set rounds to the dtype.
class Buffer {
 public:
  static constexpr size_t kGuard = 256;

  Buffer(DType dtype, int64_t count, uint8_t poison = 0xff)
      : dtype_(dtype), count_(count), bytes_(static_cast<size_t>(count) * DTypeBytes(dtype) + 2 * kGuard, 0xcd) {
    std::fill(bytes_.begin() + kGuard, bytes_.end() - kGuard, poison);
  }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  size_t size_bytes() const { return bytes_.size() - 2 * kGuard; }
  void* data() { return bytes_.data() + kGuard; }
  const void* data() const { return bytes_.data() + kGuard; }
  void* at(int64_t i) { return bytes_.data() + kGuard + static_cast<size_t>(i) * DTypeBytes(dtype_); }
  const void* at(int64_t i) const { return bytes_.data() + kGuard + static_cast<size_t>(i) * DTypeBytes(dtype_); }
  float* f32() { return static_cast<float*>(data()); }

  double Get(int64_t i) const {
    if (dtype_ == DType::kF32) {
      float x;
      std::memcpy(&x, at(i), 4);
      return x;
    }
    if (dtype_ == DType::kI8) return *static_cast<const int8_t*>(at(i));
    uint16_t x;
    std::memcpy(&x, at(i), 2);
    return dtype_ == DType::kBF16 ? Bf16ToF32(x) : F16ToF32(x);
  }
  void Set(int64_t i, double value) {
    const float x = static_cast<float>(value);
    if (dtype_ == DType::kF32) {
      std::memcpy(at(i), &x, 4);
    } else if (dtype_ == DType::kI8) {
      *static_cast<int8_t*>(at(i)) = static_cast<int8_t>(value);
    } else {
      ASSERT_EQ(dtype_, DType::kBF16);
      const uint16_t bits = F32ToBf16(x);
      std::memcpy(at(i), &bits, 2);
    }
  }
  void FillNormal(Rng& rng, double scale = 1.0) {
    for (int64_t i = 0; i < count_; ++i) Set(i, rng.Normal() * scale);
  }
  bool GuardsIntact() const {
    const auto untouched = [](uint8_t byte) { return byte == 0xcd; };
    return std::all_of(bytes_.begin(), bytes_.begin() + kGuard, untouched) &&
           std::all_of(bytes_.end() - kGuard, bytes_.end(), untouched);
  }
  bool BytesAre(int64_t i, uint8_t byte) const {
    const uint8_t* p = static_cast<const uint8_t*>(at(i));
    return std::all_of(p, p + DTypeBytes(dtype_), [&](uint8_t b) { return b == byte; });
  }
  bool SameBytes(const Buffer& other) const { return bytes_ == other.bytes_; }

 private:
  DType dtype_;
  int64_t count_;
  std::vector<uint8_t> bytes_;
};

inline bool SameBits(const Buffer& a, int64_t i, const Buffer& b, int64_t j, int64_t n) {
  return std::memcmp(a.at(i), b.at(j), static_cast<size_t>(n) * DTypeBytes(a.dtype())) == 0;
}

// A weight [n][k] of the act dtype and its panels.
struct Weight {
  Buffer rows, packed;
  int64_t n, k;

  Weight(DType act, int64_t n_, int64_t k_, Rng& rng)
      : rows(act, n_ * k_),
        packed(act, static_cast<int64_t>(PackedBytes(act, n_, k_) / DTypeBytes(act))),
        n(n_),
        k(k_) {
    rows.FillNormal(rng, 1.0 / std::sqrt(static_cast<double>(k)));
    Pack();
  }
  void Pack() {
    std::vector<const void*> pointers(static_cast<size_t>((n + kPanel - 1) / kPanel * kPanel), nullptr);
    for (int64_t i = 0; i < n; ++i) pointers[static_cast<size_t>(i)] = rows.at(i * k);
    PackPanels(rows.dtype(), packed.data(), n, k, pointers.data(), rows.dtype(), 0, (n + kPanel - 1) / kPanel);
  }
};

// Gate [inter][k] and up [inter][k] as panels of 32 + 32 columns.
struct GateUpWeight {
  Buffer gate, up, packed;
  int64_t inter, k;

  GateUpWeight(DType act, int64_t inter_, int64_t k_, Rng& rng)
      : gate(act, inter_ * k_),
        up(act, inter_ * k_),
        packed(act, static_cast<int64_t>(PackedBytes(act, (inter_ + 31) / 32 * 64, k_) / DTypeBytes(act))),
        inter(inter_),
        k(k_) {
    gate.FillNormal(rng, 1.0 / std::sqrt(static_cast<double>(k)));
    up.FillNormal(rng, 1.0 / std::sqrt(static_cast<double>(k)));
    Pack();
  }
  int64_t num_panels() const { return (inter + 31) / 32; }
  void Pack() {
    std::vector<const void*> pointers(static_cast<size_t>(num_panels() * kPanel), nullptr);
    for (int64_t i = 0; i < inter; ++i) {
      pointers[static_cast<size_t>(i / 32 * kPanel + i % 32)] = gate.at(i * k);
      pointers[static_cast<size_t>(i / 32 * kPanel + 32 + i % 32)] = up.at(i * k);
    }
    PackPanels(gate.dtype(), packed.data(), num_panels() * kPanel, k, pointers.data(), gate.dtype(), 0, num_panels());
  }
};

inline constexpr WeightFormat kQuantized[] = {WeightFormat::kInt8, WeightFormat::kInt4};

// Q8Blocks in a Buffer, poisoned like any other.
inline constexpr int64_t kBlockFloats = sizeof(Q8Block) / sizeof(float);
inline Buffer Q8Buffer(int64_t num_blocks) { return Buffer(DType::kF32, num_blocks * kBlockFloats); }
inline Q8Block* Q8At(Buffer& blocks, int64_t i) { return static_cast<Q8Block*>(blocks.at(i * kBlockFloats)); }
inline const Q8Block* Q8At(const Buffer& blocks, int64_t i) {
  return static_cast<const Q8Block*>(blocks.at(i * kBlockFloats));
}
// What element i of a quantised row stands for.
inline double Q8Value(const Q8Block* row, int64_t i) {
  const Q8Block& block = row[i / kQ8Block];
  return double{block.scale} * block.q[i % kQ8Block];
}

// Panels of int8 or int4 from the f32 rows of their outputs (64 a panel, null = zero), and what they stand for.
struct QuantizedPanels {
  WeightFormat format;
  int64_t num_panels, k;
  Buffer packed;  // bytes, as pairs

  QuantizedPanels(Isa isa, WeightFormat format_, const std::vector<const float*>& rows, int64_t k_)
      : format(format_),
        num_panels(static_cast<int64_t>(rows.size()) / kPanel),
        k(k_),
        packed(DType::kBF16, num_panels * panel_bytes() / 2) {
    for (int64_t p = 0; p < num_panels; ++p) Kernels(isa).quantize_panel(format, rows.data() + p * kPanel, k, panel(p));
  }
  int64_t panel_bytes() const { return static_cast<int64_t>(PackedBytes(format, DType::kF32, kPanel, k)); }
  uint8_t* panel(int64_t p) { return static_cast<uint8_t*>(packed.data()) + p * panel_bytes(); }
  const uint8_t* panel(int64_t p) const { return static_cast<const uint8_t*>(packed.data()) + p * panel_bytes(); }
  std::vector<float> Row(int64_t i) const {
    std::vector<float> row(static_cast<size_t>(k));
    ReadQuantizedRow(format, panel(i / kPanel), k, i % kPanel, row.data());
    return row;
  }
};

// Pointers to the rows of [n][k] floats in whole panels; gate and up of [n/2] each, 32 + 32 a panel, where `gate_up`.
inline std::vector<const float*> PanelRows(Buffer& rows, int64_t n, int64_t k, bool gate_up = false) {
  const int64_t half = n / 2, num_panels = gate_up ? (half + 31) / 32 : (n + 63) / 64;
  std::vector<const float*> pointers(static_cast<size_t>(num_panels * kPanel), nullptr);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = gate_up ? i % half / 32 * kPanel + i % half % 32 + (i < half ? 0 : 32) : i;
    pointers[static_cast<size_t>(at)] = rows.f32() + i * k;
  }
  return pointers;
}

// One layer's pool with one sequence in it: pages in random order, everything not written is poison. dtype: of the
// pages, an act or kI8.
class KvSequence {
 public:
  KvSequence(DType dtype, int32_t page_size, int32_t num_kv_heads, int32_t head_dim, int64_t len, uint8_t poison = 0xff,
             uint64_t page_seed = 7)
      : layout_{dtype, page_size, num_kv_heads, head_dim},
        len_(len),
        pool_(dtype, 0),
        pages_(static_cast<size_t>((len + page_size - 1) / page_size)) {
    const int64_t num_pages = static_cast<int64_t>(pages_.size()) + 3;
    pool_ = Buffer(dtype, num_pages * static_cast<int64_t>(layout_.page_bytes() / DTypeBytes(dtype)), poison);
    std::vector<int32_t> order(static_cast<size_t>(num_pages));
    std::iota(order.begin(), order.end(), 0);
    Rng rng(page_seed);
    for (size_t i = order.size() - 1; i > 0; --i)
      std::swap(order[i], order[static_cast<size_t>(rng.Below(static_cast<int64_t>(i) + 1))]);
    std::copy_n(order.begin(), pages_.size(), pages_.begin());
  }
  const KvLayout& layout() const { return layout_; }
  int64_t len() const { return len_; }
  Buffer& pool() { return pool_; }
  std::vector<int32_t>& pages() { return pages_; }
  void* Page(int64_t token) {
    return static_cast<uint8_t*>(pool_.data()) +
           static_cast<size_t>(pages_[static_cast<size_t>(token / layout_.page_size)]) * layout_.page_bytes();
  }
  // Element index in the pool, by the words of kernels.h.
  int64_t KIndex(int64_t token, int64_t head, int64_t d) const {
    const int64_t ps = layout_.page_size, at = token % ps;
    return HeadBase(token, head) + (layout_.dtype == DType::kBF16 ? (d / 2 * ps + at) * 2 + d % 2 : d * ps + at);
  }
  int64_t VIndex(int64_t token, int64_t head, int64_t d) const {
    const int64_t dp = layout_.padded_dim(), at = token % layout_.page_size;
    return HeadBase(token, head) + dp * layout_.page_size +
           (layout_.dtype == DType::kBF16 ? (at / 2 * dp + d) * 2 + at % 2 : at * dp + d);
  }
  // Of int8 pages: first byte of the scale of K, or of V.
  int64_t ScaleIndex(int64_t token, int64_t head, bool v) const {
    const int64_t ps = layout_.page_size;
    return HeadBase(token, head) + 2 * int64_t{layout_.padded_dim()} * ps + (v ? 4 * ps : 0) + 4 * (token % ps);
  }
  float Scale(int64_t token, int64_t head, bool v) const {
    float scale;
    std::memcpy(&scale, pool_.at(ScaleIndex(token, head, v)), sizeof(scale));
    return scale;
  }
  void SetScale(int64_t token, int64_t head, bool v, float scale) {
    std::memcpy(pool_.at(ScaleIndex(token, head, v)), &scale, sizeof(scale));
  }
  // What the pages mean.
  double K(int64_t token, int64_t head, int64_t d) const {
    return pool_.Get(KIndex(token, head, d)) * (int8() ? static_cast<double>(Scale(token, head, false)) : 1.0);
  }
  double V(int64_t token, int64_t head, int64_t d) const {
    return pool_.Get(VIndex(token, head, d)) * (int8() ? static_cast<double>(Scale(token, head, true)) : 1.0);
  }
  bool int8() const { return layout_.dtype == DType::kI8; }
  // A token of every head whose K and V are not numbers, as rope_kv would have left it.
  void Spoil(int64_t token, double k, double v) {
    for (int64_t h = 0; h < layout_.num_kv_heads; ++h) {
      for (int64_t d = 0; d < layout_.head_dim; ++d) {
        pool_.Set(KIndex(token, h, d), int8() ? 0 : k);
        pool_.Set(VIndex(token, h, d), int8() ? 0 : v);
      }
      if (!int8()) continue;
      SetScale(token, h, false, std::nanf(""));
      SetScale(token, h, true, std::nanf(""));
    }
  }
  // Token t of every sequence with this seed has the same K and V, whatever the page size.
  void FillTokens(uint64_t seed, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Rng rng(seed * 1000003 + static_cast<uint64_t>(t));
      const auto value = [&] { return int8() ? static_cast<double>(rng.Below(255) - 127) : rng.Normal(); };
      for (int64_t h = 0; h < layout_.num_kv_heads; ++h) {
        for (int64_t d = 0; d < layout_.padded_dim(); ++d) {
          const bool real = d < layout_.head_dim;
          pool_.Set(KIndex(t, h, d), real ? value() : 0.0);
          pool_.Set(VIndex(t, h, d), real ? value() : 0.0);
        }
        if (!int8()) continue;
        SetScale(t, h, false, static_cast<float>((0.5 + rng.Uniform()) / 64));
        SetScale(t, h, true, static_cast<float>((0.5 + rng.Uniform()) / 64));
      }
    }
  }

 private:
  int64_t HeadBase(int64_t token, int64_t head) const {
    const auto page_elements = static_cast<int64_t>(layout_.page_bytes() / DTypeBytes(layout_.dtype));
    return pages_[static_cast<size_t>(token / layout_.page_size)] * page_elements +
           page_elements / layout_.num_kv_heads * head;
  }

  KvLayout layout_;
  int64_t len_;
  Buffer pool_;
  std::vector<int32_t> pages_;
};

struct AttentionCase {
  DType act;
  int32_t group, num_kv_heads, head_dim;
  int64_t len, q_len;  // the last q_len of len tokens are queries
  int32_t window = 0;
  float softcap = 0.0f;
  bool int8 = false;

  DType kv_dtype() const { return int8 ? DType::kI8 : act; }
  int32_t num_q_heads() const { return group * num_kv_heads; }
  int64_t width() const { return int64_t{num_q_heads()} * head_dim; }
};

// Queries whose row for token t depends on t alone.
inline Buffer Queries(const AttentionCase& c, uint64_t seed) {
  Buffer q(c.act, c.q_len * c.width());
  for (int64_t i = 0; i < c.q_len; ++i) {
    Rng rng(seed * 7919 + static_cast<uint64_t>(c.len - c.q_len + i));
    for (int64_t j = 0; j < c.width(); ++j) q.Set(i * c.width() + j, rng.Normal());
  }
  return q;
}

// Rows [begin, end) of the case's queries, all kv heads, into out. cuts: absolute positions, multiples of
// kAttentionChunk, at which the keys are split among calls, last part first; empty = one call.
inline void RunAttention(Isa isa, const AttentionCase& c, KvSequence& kv, const Buffer& q, Buffer& out, int64_t begin,
                         int64_t end, const std::vector<int64_t>& cuts = {}) {
  std::vector<uint8_t> scratch(AttentionScratchBytes(c.group, c.head_dim) + 128, 0xff);
  std::fill(scratch.end() - 128, scratch.end(), uint8_t{0xcd});
  for (int32_t head = 0; head < c.num_kv_heads; ++head) {
    AttentionArgs args{};
    args.layout = kv.layout();
    args.kv = kv.pool().data();
    args.page_table = kv.pages().data();
    args.q = q.data();
    args.out = out.data();
    args.ldq = args.ldo = c.width();
    args.num_q_heads = c.num_q_heads();
    args.kv_head = head;
    args.q_begin = static_cast<int32_t>(begin);
    args.q_len = static_cast<int32_t>(end - begin);
    args.first_position = c.len - c.q_len + begin;
    args.window = c.window;
    args.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    args.softcap = c.softcap;
    args.scratch = scratch.data();
    if (cuts.empty()) {
      Kernels(isa).attention(c.act, args);
      continue;
    }
    const int64_t first_key = c.window > 0 ? std::max<int64_t>(0, args.first_position + 1 - c.window) : 0;
    args.first_chunk = first_key / kAttentionChunk;
    const int64_t end_chunk = (args.first_position + args.q_len + kAttentionChunk - 1) / kAttentionChunk;
    args.num_chunks = end_chunk - args.first_chunk;
    Buffer partial(DType::kF32, args.q_len * c.group * args.num_chunks *
                                    static_cast<int64_t>(AttentionPartialFloats(c.head_dim)));
    args.partial = partial.f32();
    args.chunk_end = end_chunk;
    for (auto cut = cuts.rbegin(); cut != cuts.rend(); ++cut) {
      args.chunk_begin = std::clamp(*cut / kAttentionChunk, args.first_chunk, args.chunk_end);
      Kernels(isa).attention(c.act, args);
      args.chunk_end = args.chunk_begin;
    }
    args.chunk_begin = args.first_chunk;
    Kernels(isa).attention(c.act, args);
    std::fill(scratch.begin(), scratch.end() - 128, uint8_t{0xff});
    Kernels(isa).attention_merge(c.act, args);
    ASSERT_TRUE(partial.GuardsIntact()) << "partial results overrun";
  }
  ASSERT_TRUE(std::all_of(scratch.end() - 128, scratch.end(), [](uint8_t b) { return b == 0xcd; }))
      << "scratch overrun";
}

}  // namespace sapwood
