#include "program/sample_rows.h"

#include <limits>

namespace sapwood {

SamplingRow SamplingOf(const StepBatch& batch, const RowTable& rows, int32_t l) {
  const RowState& state = rows.row(batch.segments[batch.logit_segment[l]].row);
  const RowInit& init = state.init;
  const int64_t position = batch.positions[batch.logit_src[l]] + 1;
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
  const SampleOutcome outcome = SampleRow(logits, block_max, vocab, SamplingOf(batch, rows, l), scratch);
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
  result.tokens.reserve(sampled.size());
  result.logprobs.reserve(sampled.size());
  for (size_t l = 0; l < sampled.size(); ++l) {
    const int32_t segment = batch.logit_segment[l];
    // Extend and decode items draw one token, from their last logit row.
    if (l + 1 < sampled.size() && batch.logit_segment[l + 1] == segment) continue;
    const Segment& s = batch.segments[segment];
    ResultItem& item = result.items[s.item];
    item.flags |= rows->CommitSample(s.row, sampled[l]);
    if (sampled[l].bad) continue;
    item.n = 1;
    item.token_begin = static_cast<int32_t>(result.tokens.size());
    result.tokens.push_back(sampled[l].token);
    result.logprobs.push_back(rows->row(s.row).init.return_logprob ? sampled[l].logprob
                                                                   : std::numeric_limits<float>::quiet_NaN());
  }
  return result;
}

}  // namespace sapwood
