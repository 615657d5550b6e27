// Runners without a model, for tests and host benchmarks.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "program/runner.h"

namespace sapwood {

// The KV-checksum model: Forward stores into every slot of every group a hash of its token and position and, once all
// tokens of the step have that, a hash of it and of the slots at both ends of what a query there sees; Head folds the
// row's slots *through the real page tables* into the next token. A wrong page, a stale slot, a lost or doubled token, a
// row mixed up with another: each shows as a wrong token. A window group folds its last `window` slots only. The fold is
// the row's hidden state: a held row is resumed from it. tests/engine/checksum_on_cuda.py computes the same on a device.
struct ChecksumConfig {
  std::vector<KvGroup> groups;
  std::vector<int32_t> num_pages;
  int32_t vocab_size = 1000;    // tokens are 0 .. vocab_size - 1
  uint64_t stall_seed = 0;      // != 0: random stalls of up to stall_us microseconds around each phase
  int32_t stall_us = 0;
  int32_t bad_every = 0;        // > 0: every bad_every-th head row reports bad logits
  int32_t fail_every = 0;       // > 0: every fail_every-th step throws, with half of its slots overwritten by garbage
};
std::unique_ptr<Runner> MakeChecksumRunner(ChecksumConfig config);
// What the checksum model says after `tokens`: the oracle, computed from the tokens alone. mask: if not empty, the next
// allowed token instead, counting round from the last to the first; -1, as for bad logits, where it allows none.
int32_t ChecksumNextToken(const std::vector<KvGroup>& groups, int32_t vocab_size, const int32_t* tokens,
                          int64_t num_tokens, std::span<const uint32_t> mask = {});

// Computes nothing; every sampled token is `token`, whatever its mask allows. forward_us/head_us > 0 spin that long to imitate a device.
std::unique_ptr<Runner> MakeNoopRunner(int32_t token, int32_t forward_us = 0, int32_t head_us = 0);

}  // namespace sapwood
