// StepPlan as flat bytes and back.
//
// Receives plans from the executor (flight recorder, rings to other ranks); hands equal plans to whoever replays them.
// Fields go out one by one, so padding never reaches the bytes and equal plans have equal bytes. One field list per
// struct serves the writer, the reader and the size count: they cannot disagree.
#include "batch/plan.h"

#include <bit>
#include <cstring>
#include <type_traits>

#include "base/check.h"

namespace sapwood {
namespace {

static_assert(std::endian::native == std::endian::little, "plans are exchanged as little-endian bytes");

constexpr uint32_t kMagic = 0x4E4C5053;  // "SPLN"
constexpr uint32_t kVersion = 1;         // raise whenever a field list below changes

template <typename T, typename Of>
concept Is = std::is_same_v<std::remove_const_t<T>, Of>;

template <typename Ar, Is<RowInit> T>
void Fields(Ar& ar, T& x) {
  ar(x.row), ar(x.gen), ar(x.kv_len), ar(x.prompt_len), ar(x.max_len), ar(x.min_len), ar(x.temperature), ar(x.top_k);
  ar(x.top_p), ar(x.min_p), ar(x.seed), ar(x.stream), ar(x.lora_slot), ar(x.rope_mode), ar(x.return_logprob);
  ar(x.stop_begin), ar(x.stop_count);
}

template <typename Ar, Is<RowOp> T>
void Fields(Ar& ar, T& x) {
  ar.Enum(x.kind, RowOpKind::kFree);
  ar(x.row), ar(x.gen), ar(x.group), ar(x.begin), ar(x.count), ar(x.value);
}

template <typename Ar, Is<PlanItem> T>
void Fields(Ar& ar, T& x) {
  ar(x.row), ar(x.gen);
  ar.Enum(x.kind, ItemKind::kResume);
  ar(x.q_len), ar(x.logit_from), ar(x.token_begin), ar(x.kv_len);
}

template <typename Ar, Is<PageCopy> T>
void Fields(Ar& ar, T& x) {
  ar(x.group), ar(x.src), ar(x.dst);
}

template <typename Ar, Is<int32_t> T>
void Fields(Ar& ar, T& x) {
  ar(x);
}

template <typename Ar, Is<StepPlan> T>
void Fields(Ar& ar, T& x) {
  ar(x.step_id);
  ar.Array(x.row_ops), ar.Array(x.inits), ar.Array(x.ints), ar.Array(x.items), ar.Array(x.tokens);
  ar.Array(x.copies), ar.Array(x.mask_rows);
}

class SizeCounter {
 public:
  template <typename T>
  void operator()(const T&) {
    size_ += sizeof(T);
  }
  template <typename E>
  void Enum(const E&, E) {
    size_ += sizeof(E);
  }
  template <typename T>
  void Array(const std::vector<T>& v) {
    size_ += sizeof(uint32_t) + v.size() * ElementSize<T>();
  }
  template <typename T>
  static size_t ElementSize() {
    SizeCounter counter;
    const T element{};
    Fields(counter, element);
    return counter.size_;
  }
  size_t size() const { return size_; }

 private:
  size_t size_ = 0;
};

class Writer {
 public:
  explicit Writer(uint8_t* at) : at_(at) {}
  template <typename T>
  void operator()(const T& x) {
    static_assert(std::is_arithmetic_v<T>);
    std::memcpy(at_, &x, sizeof(T));
    at_ += sizeof(T);
  }
  template <typename E>
  void Enum(const E& x, E) {
    (*this)(static_cast<std::underlying_type_t<E>>(x));
  }
  template <typename T>
  void Array(const std::vector<T>& v) {
    (*this)(static_cast<uint32_t>(v.size()));
    for (const T& x : v) Fields(*this, x);
  }

 private:
  uint8_t* at_;
};

class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  template <typename T>
  void operator()(T& x) {
    static_assert(std::is_arithmetic_v<T>);
    SAPWOOD_REQUIRE(size_ - pos_ >= sizeof(T), "step plan: expected ", sizeof(T), " more bytes at offset ", pos_,
                    ", got ", size_ - pos_, ": the bytes are truncated");
    std::memcpy(&x, data_ + pos_, sizeof(T));
    pos_ += sizeof(T);
  }
  template <typename E>
  void Enum(E& x, E last) {
    std::underlying_type_t<E> raw;
    (*this)(raw);
    SAPWOOD_REQUIRE(raw <= static_cast<std::underlying_type_t<E>>(last), "step plan: kind at offset ", pos_ - 1,
                    " must be 0..", static_cast<int>(last), ", got ", static_cast<int>(raw));
    x = static_cast<E>(raw);
  }
  template <typename T>
  void Array(std::vector<T>& v) {
    uint32_t count = 0;
    (*this)(count);
    // Before the resize: a count read from garbage must not allocate gigabytes.
    const size_t element = SizeCounter::ElementSize<T>();
    SAPWOOD_REQUIRE(count <= (size_ - pos_) / element, "step plan: array of ", count, " elements at offset ", pos_,
                    " does not fit in the remaining ", size_ - pos_, " bytes: the bytes are truncated or foreign");
    v.resize(count);
    for (T& x : v) Fields(*this, x);
  }
  size_t pos() const { return pos_; }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t pos_ = 0;
};

}  // namespace

const char* ItemKindName(ItemKind kind) {
  switch (kind) {
    case ItemKind::kExtend: return "extend";
    case ItemKind::kDecode: return "decode";
    case ItemKind::kVerify: return "verify";
    case ItemKind::kScore: return "score";
    case ItemKind::kResume: return "resume";
  }
  return "unknown";
}

std::vector<uint8_t> StepPlan::Serialize() const {
  SizeCounter counter;
  counter(kMagic), counter(kVersion);
  Fields(counter, *this);
  std::vector<uint8_t> bytes(counter.size());
  Writer writer(bytes.data());
  writer(kMagic), writer(kVersion);
  Fields(writer, *this);
  return bytes;
}

StepPlan StepPlan::Deserialize(const uint8_t* data, size_t size) {
  Reader reader(data, size);
  uint32_t magic = 0, version = 0;
  reader(magic), reader(version);
  SAPWOOD_REQUIRE(magic == kMagic, "step plan: expected magic ", kMagic, ", got ", magic, ": not a step plan");
  SAPWOOD_REQUIRE(version == kVersion, "step plan: expected version ", kVersion, ", got ", version,
                  ": read it with the build that wrote it");
  StepPlan plan;
  Fields(reader, plan);
  SAPWOOD_REQUIRE(reader.pos() == size, "step plan: expected ", reader.pos(), " bytes, got ", size);
  return plan;
}

}  // namespace sapwood
