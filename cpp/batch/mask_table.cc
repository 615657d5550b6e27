// Masks by row, a handful each. Receives them from the loop (program/executor.cc: PostMask); asked by the runners' sample
// segment (program/sample_rows.cc), told by RowTable what has become of a row.
//
// Generations grow and wrap around. A mask may be posted before its row's init has been applied, so an unknown
// generation is kept, and "former" is asked only of generations that meet within a few steps, where the sign of the
// difference says it.
#include "batch/mask_table.h"

#include <algorithm>

#include "base/check.h"

namespace sapwood {
namespace {

bool Before(uint32_t gen, uint32_t other) { return static_cast<int32_t>(gen - other) < 0; }

}  // namespace

MaskTable::MaskTable(int32_t max_rows, int32_t vocab_size) : vocab_size_(vocab_size), rows_(max_rows) {
  SAPWOOD_REQUIRE(vocab_size >= 0, "vocab_size must not be negative, got ", vocab_size);
}

void MaskTable::Post(int32_t row, uint32_t gen, int64_t position, std::span<const uint32_t> bits) {
  SAPWOOD_REQUIRE(row >= 0 && row < static_cast<int64_t>(rows_.size()), "mask: row must be 0..", rows_.size() - 1,
                  ", got ", row);
  SAPWOOD_REQUIRE(position >= 0, "mask: position must not be negative, got ", position);
  const size_t num_words = (static_cast<size_t>(vocab_size_) + 31) / 32;
  SAPWOOD_REQUIRE(!bits.empty() && (vocab_size_ == 0 || bits.size() == num_words), "mask: expected ", num_words,
                  " words for a vocabulary of ", vocab_size_, ", got ", bits.size());
  auto copy = std::make_shared<const std::vector<uint32_t>>(bits.begin(), bits.end());
  const std::lock_guard lock(mutex_);
  Row& r = rows_[row];
  if (gen == r.ended_gen) return;
  for (Mask& mask : r.masks) {
    if (mask.gen == gen && mask.position == position) {
      mask.bits.swap(copy);
      return;
    }
  }
  if (r.masks.size() >= kMaxPerRow) {
    // Of a generation that ended before its masks were made, most likely: nothing else leaves masks lying.
    const auto other = std::find_if(r.masks.begin(), r.masks.end(), [gen](const Mask& m) { return m.gen != gen; });
    SAPWOOD_REQUIRE(other != r.masks.end(), "mask: ", kMaxPerRow, " masks of row ", row, " wait to be drawn under, from "
                    "position ", r.masks.front().position, " on: post a mask once the tokens before it are known");
    r.masks.erase(other);
    size_.fetch_sub(1, std::memory_order_relaxed);
  }
  r.masks.push_back({gen, position, std::move(copy)});
  size_.fetch_add(1, std::memory_order_relaxed);
}

MaskTable::Bits MaskTable::Find(int32_t row, uint32_t gen, int64_t position) const {
  const std::lock_guard lock(mutex_);
  return FindLocked(row, gen, position);
}

bool MaskTable::MayCome(int32_t row, uint32_t gen, int64_t position) const {
  const std::lock_guard lock(mutex_);
  const uint32_t ended = rows_[row].ended_gen;
  return (ended == 0 || Before(ended, gen)) && FindLocked(row, gen, position) == nullptr;
}

MaskTable::Bits MaskTable::FindLocked(int32_t row, uint32_t gen, int64_t position) const {
  for (const Mask& mask : rows_[row].masks) {
    if (mask.gen == gen && mask.position == position) return mask.bits;
  }
  return nullptr;
}

template <typename Drop>
void MaskTable::DropIf(int32_t row, Drop drop) {
  const size_t dropped = std::erase_if(rows_[row].masks, drop);
  size_.fetch_sub(dropped, std::memory_order_relaxed);
}

void MaskTable::Begin(int32_t row, uint32_t gen) {
  const std::lock_guard lock(mutex_);
  rows_[row].ended_gen = 0;
  DropIf(row, [gen](const Mask& mask) { return Before(mask.gen, gen); });
}

void MaskTable::End(int32_t row, uint32_t gen) {
  const std::lock_guard lock(mutex_);
  // Of two that ended, the older may be heard of last.
  uint32_t& ended = rows_[row].ended_gen;
  if (ended == 0 || Before(ended, gen)) ended = gen;
  DropIf(row, [gen](const Mask& mask) { return mask.gen == gen || Before(mask.gen, gen); });
}

void MaskTable::Drawn(int32_t row, uint32_t gen, int64_t position) {
  if (size() == 0) return;
  const std::lock_guard lock(mutex_);
  DropIf(row, [gen, position](const Mask& mask) { return mask.gen == gen && mask.position <= position; });
}

}  // namespace sapwood
