// Runners without a model: the KV-checksum model and the no-op.
//
// Receive StepBatches from program/executor.cc like the real runner (cpu_runner.cc); hand back tokens that prove which
// KV slots were read, or that cost nothing.
#include "program/fake_runners.h"

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>
#include <utility>

#include "base/check.h"
#include "program/sample_rows.h"

namespace sapwood {
namespace {

// One round of a 64-bit mixer: order matters, every input bit reaches every output bit.
uint64_t Mix(uint64_t h, uint64_t x) {
  h = (h ^ x) * 0x9E3779B97F4A7C15;
  h ^= h >> 29;
  h *= 0xBF58476D1CE4E5B9;
  return h ^ (h >> 32);
}

constexpr uint64_t kSlotSeed = 0x5A5A'0001;
constexpr uint64_t kFoldSeed = 0x5A5A'0002;
constexpr uint64_t kGarbage = 0xDEAD'BEEF'DEAD'BEEF;

// First position that a query at p sees.
int64_t FirstVisible(const KvGroup& group, int64_t p) {
  return group.kind == KvKind::kWindow ? std::max<int64_t>(0, p + 1 - group.window) : 0;
}

// What a slot holds, as of two layers. The second has, as after attention, something of what its query saw of the
// first: here both ends of it. So a page given up or handed on too early shows even where no token is sampled. Neither
// needs what the second layer says of other slots: a device computes all of a step's at once.
struct SlotValue {
  uint64_t own = kGarbage, seen = kGarbage;
};

uint64_t OwnValue(int32_t token, int64_t p) {
  return Mix(Mix(kSlotSeed, static_cast<uint64_t>(token)), static_cast<uint64_t>(p));
}

// own(p) reads the first layer at position p.
template <typename Own>
uint64_t SeenValue(const KvGroup& group, int64_t p, const Own& own) {
  const int64_t first = FirstVisible(group, p);
  return first < p ? Mix(Mix(own(p), own(first)), own(p - 1)) : own(p);
}

// The group's part of the next token after a query at p. A sum, of which each term knows its place.
template <typename Seen>
uint64_t Fold(uint64_t h, const KvGroup& group, int64_t p, const Seen& seen) {
  uint64_t sum = 0;
  for (int64_t i = FirstVisible(group, p); i <= p; ++i) sum += Mix(Mix(kFoldSeed, static_cast<uint64_t>(i)), seen(i));
  return Mix(h, sum);
}

// The token that the fold h stands for, or the next one that the mask allows; -1: none.
int32_t Draw(uint64_t h, int32_t vocab, std::span<const uint32_t> mask) {
  const auto first = static_cast<int32_t>(h % static_cast<uint64_t>(vocab));
  for (int32_t i = 0; i < vocab; ++i) {
    const int32_t token = (first + i) % vocab;
    if (mask.empty() || (mask[token / 32] >> (token % 32) & 1) != 0) return token;
  }
  return -1;
}

class ChecksumRunner final : public Runner {
  SlotValue& At(size_t g, int64_t slot) {
    SAPWOOD_CHECK(slot >= 0 && slot < static_cast<int64_t>(slots_[g].size()), "slot ", slot, " of ", slots_[g].size(),
                  " in group ", g);
    return slots_[g][slot];
  }

  // The row's slots in group g, by position, through its page table.
  auto RowSlots(const StepBatch& batch, size_t g, int32_t segment) {
    const PageId* table = batch.page_tables[g][segment];
    const int64_t page_size = config_.groups[g].page_size;
    return [this, g, table, page_size](int64_t p) -> const SlotValue& {
      return At(g, table[p / page_size] * page_size + p % page_size);
    };
  }

 public:
  explicit ChecksumRunner(ChecksumConfig config) : config_(std::move(config)), stall_state_(config_.stall_seed) {
    SAPWOOD_REQUIRE(!config_.groups.empty() && config_.groups.size() == config_.num_pages.size(),
                    "num_pages must have one entry per group (", config_.groups.size(), "), got ",
                    config_.num_pages.size());
    SAPWOOD_REQUIRE(config_.vocab_size > 0, "vocab_size must be positive, got ", config_.vocab_size);
    for (size_t g = 0; g < config_.groups.size(); ++g) {
      slots_.emplace_back(size_t(config_.num_pages[g]) * config_.groups[g].page_size);
    }
  }

  void CopyPages(std::span<const PageCopy> copies) override {
    for (const PageCopy& copy : copies) {
      SAPWOOD_CHECK(copy.group >= 0 && copy.group < static_cast<int64_t>(slots_.size()), "copy in group ", copy.group);
      const int64_t page_size = config_.groups[copy.group].page_size;
      const SlotValue* src = &At(copy.group, copy.src * page_size);
      std::copy_n(src, page_size, &At(copy.group, copy.dst * page_size));
    }
  }

  void Forward(const StepBatch& batch, const RowTable&) override {
    Stall();
    if (config_.fail_every > 0 && ++num_steps_ % config_.fail_every == 0) {
      for (size_t g = 0; g < slots_.size(); ++g) {
        for (int32_t t = 0; t < batch.num_tokens; t += 2) At(g, batch.slots[g][t]) = {};
      }
      throw InternalError(StrCat("step ", batch.step_id, " was to fail (fail_every ", config_.fail_every, ")"));
    }
    for (size_t g = 0; g < slots_.size(); ++g) {
      for (int32_t t = 0; t < batch.num_tokens; ++t) {
        At(g, batch.slots[g][t]).own = OwnValue(batch.tokens[t], batch.positions[t]);
      }
      for (int32_t t = 0; t < batch.num_tokens; ++t) {
        const auto slots = RowSlots(batch, g, batch.token_segment[t]);
        At(g, batch.slots[g][t]).seen =
            SeenValue(config_.groups[g], batch.positions[t], [&](int64_t p) { return slots(p).own; });
      }
    }
    Stall();
  }

  void Head(const StepBatch& batch, const RowTable& rows, std::span<SampledToken> out) override {
    Stall();
    for (size_t l = 0; l < out.size(); ++l) {
      const int32_t row = batch.segments[batch.logit_segment[l]].row;
      held_.resize(rows.max_rows());
      uint64_t h = held_[row];
      if (batch.logit_src[l] >= 0) {
        h = kFoldSeed;
        for (size_t g = 0; g < slots_.size(); ++g) {
          const auto slots = RowSlots(batch, g, batch.logit_segment[l]);
          h = Fold(h, config_.groups[g], batch.logit_position[l] - 1, [&](int64_t p) { return slots(p).seen; });
        }
      }
      if (batch.logit_masked[l]) held_[row] = h;
      const RowMask mask = MaskOf(batch, rows, static_cast<int32_t>(l));
      out[l].held = mask.late;
      if (mask.late) continue;
      out[l].token = Draw(h, config_.vocab_size, mask.bits ? std::span(*mask.bits) : std::span<const uint32_t>());
      out[l].logprob = rows.row(row).init.return_logprob ? -static_cast<float>(h >> 40) * 0x1p-20f : std::nanf("");
      out[l].bad = out[l].token < 0 || (config_.bad_every > 0 && ++num_head_rows_ % config_.bad_every == 0);
    }
    Stall();
  }

  int32_t vocab_size() const override { return config_.vocab_size; }

 private:
  // Nothing, a burst of yields, a spin or a sleep: schedules that a steady load would never show.
  void Stall() {
    if (config_.stall_seed == 0 || config_.stall_us <= 0) return;
    stall_state_ = Mix(stall_state_, 1);
    const int64_t ns = static_cast<int64_t>((stall_state_ >> 8) % (uint64_t(config_.stall_us) * 1000));
    switch (stall_state_ & 3) {
      case 0: break;
      case 1: std::this_thread::yield(); break;
      case 2: {
        const auto until = std::chrono::steady_clock::now() + std::chrono::nanoseconds(ns);
        while (std::chrono::steady_clock::now() < until) std::this_thread::yield();
        break;
      }
      default: std::this_thread::sleep_for(std::chrono::nanoseconds(ns));
    }
  }

  ChecksumConfig config_;
  std::vector<std::vector<SlotValue>> slots_;  // [group][page * page_size + offset]
  std::vector<uint64_t> held_;  // [row] the fold of its newest masked logit row
  uint64_t stall_state_;
  int64_t num_head_rows_ = 0, num_steps_ = 0;
};

class NoopRunner final : public Runner {
 public:
  NoopRunner(int32_t token, int32_t forward_us, int32_t head_us)
      : token_(token), forward_us_(forward_us), head_us_(head_us) {}
  void CopyPages(std::span<const PageCopy>) override {}
  void Forward(const StepBatch&, const RowTable&) override { Spin(forward_us_); }
  void Head(const StepBatch& batch, const RowTable& rows, std::span<SampledToken> out) override {
    Spin(head_us_);
    for (size_t l = 0; l < out.size(); ++l) {
      const bool held = MaskOf(batch, rows, static_cast<int32_t>(l)).late;
      out[l] = {.token = token_, .logprob = std::nanf(""), .bad = false, .held = held};
    }
  }

 private:
  static void Spin(int32_t us) {
    if (us <= 0) return;
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(us);
    while (std::chrono::steady_clock::now() < until) continue;
  }

  int32_t token_, forward_us_, head_us_;
};

}  // namespace

std::unique_ptr<Runner> MakeChecksumRunner(ChecksumConfig config) {
  return std::make_unique<ChecksumRunner>(std::move(config));
}

int32_t ChecksumNextToken(const std::vector<KvGroup>& groups, int32_t vocab_size, const int32_t* tokens,
                          int64_t num_tokens, std::span<const uint32_t> mask) {
  SAPWOOD_REQUIRE(num_tokens > 0 && vocab_size > 0, "num_tokens and vocab_size must be positive, got ", num_tokens,
                  " and ", vocab_size);
  uint64_t h = kFoldSeed;
  const auto own = [&](int64_t p) { return OwnValue(tokens[p], p); };
  for (const KvGroup& group : groups) {
    h = Fold(h, group, num_tokens - 1, [&](int64_t p) { return SeenValue(group, p, own); });
  }
  return Draw(h, vocab_size, mask);
}

std::unique_ptr<Runner> MakeNoopRunner(int32_t token, int32_t forward_us, int32_t head_us) {
  return std::make_unique<NoopRunner>(token, forward_us, head_us);
}

}  // namespace sapwood
