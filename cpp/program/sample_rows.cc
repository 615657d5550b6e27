#include "program/sample_rows.h"

#include <limits>

#include "base/check.h"

namespace sapwood {

RowMask MaskOf(const StepBatch& batch, const RowTable& rows, int32_t l) {
  if (!batch.logit_masked[l]) return {};
  const int32_t row = batch.segments[batch.logit_segment[l]].row;
  MaskTable::Bits bits = rows.masks().Find(row, rows.row(row).gen, batch.logit_position[l]);
  const bool late = bits == nullptr;
  return {.bits = std::move(bits), .late = late};
}

SamplingRow SamplingOf(const StepBatch& batch, const RowTable& rows, int32_t l) {
  const RowState& state = rows.row(batch.segments[batch.logit_segment[l]].row);
  const RowInit& init = state.init;
  const int64_t position = batch.logit_position[l];
  SamplingRow row{.temperature = init.temperature,
                  .top_k = init.top_k,
                  .top_p = init.top_p,
                  .min_p = init.min_p,
                  .seed = init.seed,
                  .stream = init.stream,
                  .position = position,
                  .banned = {},
                  .want_logprob = init.return_logprob != 0};
  if (position < init.min_len) row.banned = state.stop_ids;
  return row;
}

SampledToken SampleLogitRow(const StepBatch& batch, const RowTable& rows, int32_t l, const float* logits,
                            const float* block_max, int32_t vocab, float* scratch) {
  const RowMask mask = MaskOf(batch, rows, l);
  if (mask.late) return {.held = true};
  SamplingRow row = SamplingOf(batch, rows, l);
  if (mask.bits != nullptr) {
    // Never in a tile of a native runner: its executor's PostMask knows the vocabulary.
    SAPWOOD_CHECK(int64_t{vocab} <= static_cast<int64_t>(mask.bits->size()) * 32, "mask of ", mask.bits->size(),
                  " words for ", vocab, " logits");
    row.mask = *mask.bits;
  }
  const SampleOutcome outcome = SampleRow(logits, block_max, vocab, row, scratch);
  return {outcome.token, outcome.logprob, outcome.bad};
}

StepResult FinishStep(const StepPlan& plan, const StepBatch& batch, std::span<const SampledToken> sampled,
                      RowTable* rows) {
  StepResult result;
  result.step_id = plan.step_id;
  result.num_tokens = batch.num_tokens;
  result.num_kv = batch.num_kv;
  result.num_logit_rows = static_cast<int64_t>(batch.logit_src.size());
  result.items.reserve(plan.items.size());
  for (const PlanItem& item : plan.items) {
    result.items.push_back({item.row, item.gen, 0, static_cast<int32_t>(result.tokens.size()), 0});
  }
  for (int32_t skipped : batch.skipped_items) result.items[skipped].flags = kSkipped;
  for (int32_t held : batch.held_items) result.items[held].flags = kSkipped | kHeld;
  result.tokens.reserve(sampled.size());
  result.logprobs.reserve(sampled.size());
  for (size_t l = 0; l < sampled.size(); ++l) {
    const int32_t segment = batch.logit_segment[l];
    // Every item draws one token, from its last logit row.
    if (l + 1 < sampled.size() && batch.logit_segment[l + 1] == segment) continue;
    const Segment& s = batch.segments[segment];
    ResultItem& item = result.items[s.item];
    item.flags |= rows->CommitSample(s.row, sampled[l]);
    if (sampled[l].bad || sampled[l].held) continue;
    item.n = 1;
    item.token_begin = static_cast<int32_t>(result.tokens.size());
    result.tokens.push_back(sampled[l].token);
    result.logprobs.push_back(rows->row(s.row).init.return_logprob ? sampled[l].logprob
                                                                   : std::numeric_limits<float>::quiet_NaN());
  }
  return result;
}

}  // namespace sapwood
