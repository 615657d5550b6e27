// What a model is to the executor: something that runs a prepared step and samples its logit rows.
#pragma once

#include <functional>
#include <span>

#include "batch/row_table.h"

namespace sapwood {

class Runner {
 public:
  virtual ~Runner() = default;
  // Copy whole pages (fork tails), before Forward.
  virtual void CopyPages(std::span<const PageCopy> copies) = 0;
  // Run every layer for the batch's tokens; each layer writes its KV before its attention reads.
  virtual void Forward(const StepBatch& batch, const RowTable& rows) = 0;
  // Logits of every logit row, in blocks, and a token sampled from each by its row's parameters.
  // out has one entry per logit row. A token's absolute position is its segment's kv_len
  // for the last query token.
  virtual void Head(const StepBatch& batch, const RowTable& rows, std::span<SampledToken> out) = 0;
};

}  // namespace sapwood
