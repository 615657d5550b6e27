// Grammar masks on their way from the loop to the sampler.
//
// A mask says which tokens may be drawn at one place of one row: (row, gen, absolute position). The loop posts it once its
// grammar has made it, before or after the step that draws the token was submitted or runs; the executor looks it up at
// the moment it draws. Neither waits for the other: a mask that is not there then is late, and RowTable holds the row.
//
// Thread safety: all methods, from any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

namespace sapwood {

class MaskTable {
 public:
  // Shared: a mask that is being drawn under may be replaced meanwhile.
  using Bits = std::shared_ptr<const std::vector<uint32_t>>;
  // A row draws one token after another, so the loop is seldom more than one mask ahead.
  static constexpr size_t kMaxPerRow = 8;

  // vocab_size: what masks must cover; 0: any length is taken.
  MaskTable(int32_t max_rows, int32_t vocab_size);

  // Bit i % 32 of word i / 32: token i may be drawn. Replaces an earlier mask of the same token; ignored where the row of
  // this generation has ended. Throws InvalidArgument on a wrong length, and where kMaxPerRow masks of the row wait.
  void Post(int32_t row, uint32_t gen, int64_t position, std::span<const uint32_t> bits);
  Bits Find(int32_t row, uint32_t gen, int64_t position) const;  // null: not there
  // Whether it is worth waiting for: it is not there, and its row is not known to have ended.
  bool MayCome(int32_t row, uint32_t gen, int64_t position) const;

  // What the executor has done with a row, and which masks nobody will ask for any more: those of former generations, of
  // this one as well, or of tokens up to the one at `position`.
  void Begin(int32_t row, uint32_t gen);
  void End(int32_t row, uint32_t gen);
  void Drawn(int32_t row, uint32_t gen, int64_t position);

  size_t size() const { return size_.load(std::memory_order_relaxed); }

 private:
  struct Mask {
    uint32_t gen;
    int64_t position;
    Bits bits;
  };
  struct Row {
    uint32_t ended_gen = 0;    // 0 is no row's generation
    std::vector<Mask> masks;  // in the order they were posted
  };

  Bits FindLocked(int32_t row, uint32_t gen, int64_t position) const;
  template <typename Drop>
  void DropIf(int32_t row, Drop drop);

  const int32_t vocab_size_;
  mutable std::mutex mutex_;
  std::vector<Row> rows_;
  std::atomic<size_t> size_{0};  // masks in all rows: where nobody uses any, Drawn takes no lock
};

}  // namespace sapwood
