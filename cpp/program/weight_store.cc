// Fills weight slots. Receives views of the mapped checkpoint from the loader (python/sapwood/models, through
// bindings/), hands packed memory to cpu_runner.cc. One panel or block of rows is a tile, so loading uses every core
// and needs, beyond the packed weights themselves, one panel of scratch per thread.
#include "program/weight_store.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "base/check.h"
#include "kernels/half.h"
#include "program/fp_mode.h"

namespace sapwood {
namespace {

const char* KindName(SlotKind kind) {
  switch (kind) {
    case SlotKind::kLinear: return "linear";
    case SlotKind::kGateUp: return "gate_up";
    case SlotKind::kTable: return "table";
    case SlotKind::kVector: return "vector";
    case SlotKind::kF32: return "f32";
  }
  return "unknown";
}

std::string Shapes(const std::vector<SlotPart>& parts) {
  std::string out;
  for (const SlotPart& part : parts) out += StrCat(out.empty() ? "" : ", ", "[", part.rows, ", ", part.cols, "]");
  return out;
}

uint64_t Mix(uint64_t z) {  // the finaliser of SplitMix64 (Steele, Lea, Flood 2014)
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// Row `row` of a dummy slot: four 16-bit draws per hash, none of them 0, symmetric around 0.
void DummyRow(int32_t slot, int64_t row, float scale, float* out, int64_t n) {
  if (scale == 0) {
    std::fill(out, out + n, 0.0f);  // and not -0
    return;
  }
  const uint64_t key = Mix(Mix(static_cast<uint64_t>(slot) + 1) ^ static_cast<uint64_t>(row));
  const float step = scale / 32768.0f;
  const auto quad = [&](int64_t i) { return Mix(key + static_cast<uint64_t>(i / 4) * 0x9e3779b97f4a7c15ull); };
  const auto draw = [&](uint64_t bits, int64_t j) {
    return (static_cast<float>(static_cast<int32_t>((bits >> (16 * j)) & 0xffff)) - 32767.5f) * step;
  };
  const int64_t whole = n / 4 * 4;
  for (int64_t i = 0; i < whole; i += 4) {
    const uint64_t bits = quad(i);
    for (int64_t j = 0; j < 4; ++j) out[i + j] = draw(bits, j);
  }
  for (int64_t j = 0; j < n - whole; ++j) out[whole + j] = draw(quad(whole), j);
}

void ToF32(DType src, const void* in, float* out, int64_t n) {
  if (src == DType::kF32) {
    std::memcpy(out, in, static_cast<size_t>(n) * 4);
    return;
  }
  // Checkpoint files align tensors to bytes only.
  const auto* bytes = static_cast<const unsigned char*>(in);
  for (int64_t i = 0; i < n; ++i) {
    uint16_t h;
    std::memcpy(&h, bytes + 2 * i, 2);
    out[i] = src == DType::kBF16 ? Bf16ToF32(h) : F16ToF32(h);
  }
}

// The stacked rows of all parts.
class Rows {
 public:
  Rows(int32_t slot, const std::vector<SlotPart>& parts, float dummy_scale)
      : slot_(slot), dummy_scale_(dummy_scale), parts_(parts) {
    for (const SlotPart& part : parts_) {
      begins_.push_back(total_);
      total_ += part.rows;
    }
  }

  int64_t total() const { return total_; }
  const SlotPart& part_of(int64_t row) const { return parts_[index(row)]; }
  // Null for a dummy row.
  const void* pointer(int64_t row) const {
    const size_t i = index(row);
    const SlotPart& part = parts_[i];
    if (part.data == nullptr) return nullptr;
    const int64_t row_bytes = part.stride * static_cast<int64_t>(DTypeBytes(part.src));
    return static_cast<const char*>(part.data) + (row - begins_[i]) * row_bytes;
  }
  void ReadF32(int64_t row, float* out) const {
    const SlotPart& part = part_of(row);
    if (const void* p = pointer(row)) {
      ToF32(part.src, p, out, part.cols);
    } else {
      DummyRow(slot_, row, dummy_scale_, out, part.cols);
    }
  }
  // In dst (f32 or bf16), rounded once. tmp: room for one row, used where a conversion needs it.
  void Read(int64_t row, DType dst, void* out, float* tmp) const {
    const SlotPart& part = part_of(row);
    const void* p = pointer(row);
    if (p != nullptr && part.src == dst) {
      std::memcpy(out, p, static_cast<size_t>(part.cols) * DTypeBytes(dst));
    } else if (dst == DType::kF32) {
      ReadF32(row, static_cast<float*>(out));
    } else {
      ReadF32(row, tmp);
      auto* bf16 = static_cast<uint16_t*>(out);
      for (int64_t i = 0; i < part.cols; ++i) bf16[i] = F32ToBf16(tmp[i]);
    }
  }

 private:
  size_t index(int64_t row) const {
    return static_cast<size_t>(std::upper_bound(begins_.begin(), begins_.end(), row) - begins_.begin() - 1);
  }

  int32_t slot_;
  float dummy_scale_;
  const std::vector<SlotPart>& parts_;
  std::vector<int64_t> begins_;
  int64_t total_ = 0;
};

template <typename F>
void ForTiles(ThreadPool* pool, int64_t num_tiles, F&& f) {
  if (pool != nullptr) {
    pool->ParallelFor(num_tiles, f);
  } else {
    for (int64_t tile = 0; tile < num_tiles; ++tile) f(tile, 0);
  }
}

// source_row(panel, i): the stacked row at place i of the panel, or -1 for zeros.
template <typename SourceRow>
void Pack(DType act, const Rows& rows, int64_t num_panels, int64_t k, void* out, ThreadPool* pool,
          SourceRow source_row) {
  const size_t panel_bytes = PackedBytes(act, kPanel, k);
  std::vector<std::vector<float>> scratch(pool != nullptr ? pool->num_threads() : 1);
  bool needs_scratch = false;
  const SlotPart& first = rows.part_of(0);
  for (int64_t row = 0; row < rows.total(); row += rows.part_of(row).rows) {
    needs_scratch |= rows.part_of(row).data == nullptr || rows.part_of(row).src != first.src;
  }
  if (needs_scratch) {
    // Rows of one panel in act, and one row in f32: floats are enough for either act.
    for (auto& buffer : scratch) buffer.resize(static_cast<size_t>((kPanel + 1) * k));
  }
  ForTiles(pool, num_panels, [&](int64_t panel, int32_t thread) {
    const void* pointers[kPanel];
    for (int i = 0; i < kPanel; ++i) {
      const int64_t row = source_row(panel, i);
      pointers[i] = nullptr;
      if (row < 0) continue;
      if (needs_scratch) {
        float* buffer = scratch[thread].data() + (i + 1) * k;
        rows.Read(row, act, buffer, scratch[thread].data());
        pointers[i] = buffer;
      } else {
        pointers[i] = rows.pointer(row);
      }
    }
    PackPanels(act, static_cast<char*>(out) + static_cast<size_t>(panel) * panel_bytes, kPanel, k, pointers,
               needs_scratch ? act : first.src, 0, 1);
  });
}

// As Pack, in int8 or int4: every panel from the f32 rows of its outputs.
template <typename SourceRow>
void QuantizePanels(const KernelTable& kernels, WeightFormat format, const Rows& rows, int64_t num_panels, int64_t k,
                    void* out, ThreadPool* pool, SourceRow source_row) {
  const size_t panel_bytes = PackedBytes(format, DType::kF32, kPanel, k);
  std::vector<std::vector<float>> scratch(pool != nullptr ? pool->num_threads() : 1);
  for (auto& buffer : scratch) buffer.resize(static_cast<size_t>(kPanel * k));
  ForTiles(pool, num_panels, [&](int64_t panel, int32_t thread) {
    const float* pointers[kPanel];
    for (int i = 0; i < kPanel; ++i) {
      const int64_t row = source_row(panel, i);
      float* buffer = scratch[thread].data() + i * k;
      if (row >= 0) rows.ReadF32(row, buffer);
      pointers[i] = row >= 0 ? buffer : nullptr;
    }
    kernels.quantize_panel(format, pointers, k, static_cast<uint8_t*>(out) + static_cast<size_t>(panel) * panel_bytes);
  });
}

// Row-major copy in dst; rows of `cols` elements each.
void Convert(DType dst, const Rows& rows, int64_t cols, void* out, ThreadPool* pool) {
  const int64_t block = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, cols));
  std::vector<std::vector<float>> scratch(pool != nullptr ? pool->num_threads() : 1);
  for (auto& buffer : scratch) buffer.resize(static_cast<size_t>(cols));
  const size_t row_bytes = static_cast<size_t>(cols) * DTypeBytes(dst);
  ForTiles(pool, (rows.total() + block - 1) / block, [&](int64_t tile, int32_t thread) {
    const int64_t end = std::min(rows.total(), (tile + 1) * block);
    for (int64_t row = tile * block; row < end; ++row) {
      rows.Read(row, dst, static_cast<char*>(out) + static_cast<size_t>(row) * row_bytes, scratch[thread].data());
    }
  });
}

}  // namespace

WeightStore::WeightStore(DType act, int32_t num_slots, Isa isa) : act_(act), kernels_(&Kernels(isa)) {
  SAPWOOD_REQUIRE(act == DType::kF32 || act == DType::kBF16, "act must be f32 or bf16");
  SAPWOOD_REQUIRE(num_slots >= 0, "num_slots must be >= 0, got ", num_slots);
  slots_.resize(num_slots);
  memory_.resize(num_slots);
  is_alias_.resize(num_slots);
}

WeightStore::~WeightStore() = default;

void WeightStore::Fill(int32_t slot, SlotKind kind, const std::vector<SlotPart>& parts, ThreadPool* pool,
                       float dummy_scale, WeightFormat format) {
  const std::string what = StrCat("weight slot ", slot, " (", KindName(kind), ")");
  SAPWOOD_REQUIRE(slot >= 0 && slot < size(), what, ": the store has slots 0..", size() - 1);
  SAPWOOD_REQUIRE(!parts.empty(), what, ": needs at least one part");
  SAPWOOD_REQUIRE(format == WeightFormat::kAct || kind == SlotKind::kLinear || kind == SlotKind::kGateUp, what,
                  ": only linear and gate_up slots are quantised, got format ", WeightFormatName(format));
  int64_t num_rows = 0, num_elements = 0;
  const int64_t cols = parts[0].cols;
  for (const SlotPart& part : parts) {
    SAPWOOD_REQUIRE(part.rows > 0 && part.cols > 0, what, ": parts must not be empty, got ", Shapes(parts));
    SAPWOOD_REQUIRE(kind == SlotKind::kVector || part.cols == cols, what,
                    ": parts stacked along rows must agree in columns, got ", Shapes(parts));
    SAPWOOD_REQUIRE(part.src == DType::kF32 || part.src == DType::kBF16 || part.src == DType::kF16, what,
                    ": source must be f32, bf16 or f16");
    SAPWOOD_REQUIRE(part.data == nullptr || part.stride >= part.cols, what, ": stride ", part.stride,
                    " is shorter than a row of ", part.cols);
    num_rows += part.rows;
    num_elements += part.rows * part.cols;
  }
  WeightSlot filled{.kind = kind, .format = format, .rows = num_rows, .cols = cols};
  switch (kind) {
    case SlotKind::kLinear:
      filled.bytes = PackedBytes(format, act_, num_rows, cols);
      break;
    case SlotKind::kGateUp:
      SAPWOOD_REQUIRE(num_rows % 2 == 0, what, ": gate and up must have equally many rows, got ", Shapes(parts));
      filled.rows = num_rows / 2;
      filled.bytes = PackedBytes(format, act_, (filled.rows + 31) / 32 * kPanel, cols);
      break;
    case SlotKind::kTable:
      filled.bytes = static_cast<size_t>(num_elements) * DTypeBytes(act_);
      break;
    case SlotKind::kVector:
      filled.rows = num_elements;
      filled.cols = 1;
      [[fallthrough]];
    case SlotKind::kF32:
      filled.bytes = static_cast<size_t>(num_elements) * 4;
      break;
  }

  WeightSlot& old = slots_[slot];
  const bool in_place = old.filled && !is_alias_[slot] && old.kind == kind && old.rows == filled.rows &&
                        old.cols == filled.cols && old.bytes == filled.bytes && old.format == format;
  const std::shared_ptr<HugeBuffer> memory = in_place ? memory_[slot] : std::make_shared<HugeBuffer>(filled.bytes);
  filled.data = memory->data();

  const ScopedFpMode fp_mode;  // f16 subnormals
  const auto pack = [&](const Rows& rows, int64_t num_panels, auto source_row) {
    if (format == WeightFormat::kAct) {
      Pack(act_, rows, num_panels, cols, filled.data, pool, source_row);
    } else {
      QuantizePanels(*kernels_, format, rows, num_panels, cols, filled.data, pool, source_row);
    }
  };
  switch (kind) {
    case SlotKind::kLinear: {
      const Rows rows(slot, parts, dummy_scale);
      pack(rows, (num_rows + kPanel - 1) / kPanel, [&](int64_t panel, int i) {
        const int64_t row = panel * kPanel + i;
        return row < num_rows ? row : -1;
      });
      break;
    }
    case SlotKind::kGateUp: {
      const Rows rows(slot, parts, dummy_scale);
      const int64_t half = filled.rows;
      pack(rows, (half + 31) / 32, [&](int64_t panel, int i) {
        const int64_t row = panel * 32 + i % 32;
        return row < half ? row + (i < 32 ? 0 : half) : -1;
      });
      break;
    }
    case SlotKind::kTable:
      Convert(act_, Rows(slot, parts, dummy_scale), cols, filled.data, pool);
      break;
    case SlotKind::kF32:
      Convert(DType::kF32, Rows(slot, parts, dummy_scale), cols, filled.data, pool);
      break;
    case SlotKind::kVector: {
      const Rows rows(slot, parts, dummy_scale);
      float* out = static_cast<float*>(filled.data);
      for (int64_t row = 0; row < rows.total(); ++row) {
        rows.ReadF32(row, out);
        out += rows.part_of(row).cols;
      }
      break;
    }
  }
  filled.filled = true;
  slots_[slot] = filled;
  memory_[slot] = memory;
  is_alias_[slot] = 0;
}

void WeightStore::Alias(int32_t slot, int32_t of) {
  SAPWOOD_REQUIRE(slot >= 0 && slot < size() && of >= 0 && of < size() && slot != of, "cannot alias weight slot ", slot,
                  " to ", of, ": the store has slots 0..", size() - 1);
  SAPWOOD_REQUIRE(slots_[of].filled, "cannot alias weight slot ", slot, " to ", of, ", which is not filled yet");
  slots_[slot] = slots_[of];
  memory_[slot] = memory_[of];
  is_alias_[slot] = 1;
}

size_t WeightStore::total_bytes() const {
  std::set<const HugeBuffer*> seen;
  size_t total = 0;
  for (const auto& memory : memory_) {
    if (memory != nullptr && seen.insert(memory.get()).second) total += memory->size();
  }
  return total;
}

}  // namespace sapwood
