// The end of a step, shared by every executor: sample a logit row by its row's parameters, and turn the
// sampled tokens into a StepResult.
#pragma once

#include <span>

#include "batch/row_table.h"
#include "sampling/sampler.h"

namespace sapwood {

// The mask that the token of logit row `l` must obey, as it is at this moment.
struct RowMask {
  MaskTable::Bits bits;  // null: none is needed, or it is late
  bool late = false;     // the row is to be held
};
RowMask MaskOf(const StepBatch& batch, const RowTable& rows, int32_t l);

// How logit row `l` of the batch is sampled, but for its mask. Stop ids are banned while fewer than min_len tokens exist.
// Its spans look into rows.
SamplingRow SamplingOf(const StepBatch& batch, const RowTable& rows, int32_t l);

// Sample logit row `l` of the batch under its mask, or find that it is late (`held`). logits f32 [vocab]; block_max as in sampling/sampler.h, or null; scratch:
// SamplerScratch(vocab) floats.
SampledToken SampleLogitRow(const StepBatch& batch, const RowTable& rows, int32_t l, const float* logits,
                            const float* block_max, int32_t vocab, float* scratch);

// Commit every item's token, or its hold, to its row and build the result, items in plan order. sampled: one per logit
// row.
// Times and errors are left to the caller.
StepResult FinishStep(const StepPlan& plan, const StepBatch& batch, std::span<const SampledToken> sampled,
                      RowTable* rows);

}  // namespace sapwood
