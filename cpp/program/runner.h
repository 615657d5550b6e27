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
  // Run every layer for the batch's tokens; each layer writes its KV before its attention reads. Not called for a step
  // without tokens (resumed rows only).
  virtual void Forward(const StepBatch& batch, const RowTable& rows) = 0;
  // Logits of every logit row, in blocks, and a token sampled from each by its row's parameters: out has one entry per
  // logit row. One that is masked (batch.logit_masked) is drawn under its mask if that is there at this moment, else held;
  // its hidden state is kept by row, for a later step's logit row with logit_src -1.
  virtual void Head(const StepBatch& batch, const RowTable& rows, std::span<SampledToken> out) = 0;
  // Tokens are 0 .. vocab_size() - 1, and masks have as many bits; 0: the runner does not say.
  virtual int32_t vocab_size() const { return 0; }
};

}  // namespace sapwood
