// The executor's own memory of rows, and the `prepare` node that derives a step's arrays from it.
//
// Positions, slots and lengths are *derived here, in stream order*, not baked by the host: the loop plans
// step N+1 while the tokens of step N are still unknown.
//
// A row whose mask is not there when its token is to be drawn is *held*: its KV has advanced, the hidden state that its
// logit row is computed from stays with the runner, and nothing is drawn for it until a kResume item comes.
//
// Thread safety: none, but for PostMask; used by the executor's thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "batch/mask_table.h"
#include "batch/plan.h"

namespace sapwood {

struct RowState {
  RowInit init;                // sampling parameters and limits; init.kv_len is only the starting value
  uint32_t gen = 0;
  int64_t kv_len = 0;          // tokens whose KV is written once every launched step has run
  int32_t last_token = 0;      // sampled, not yet in the KV
  bool alive = false;          // goes 1 -> 0 only, until the next kInit
  bool held = false;           // the token at position kv_len waits for its mask; last_token is in the KV
  std::vector<int32_t> stop_ids;
  std::vector<std::vector<PageId>> pages;  // [group][absolute page index], append-only between inits
};

// One live item of a step.
struct Segment {
  int32_t row;
  int32_t item;        // index in StepPlan.items
  int32_t q_begin;     // first query token in the step's flat arrays
  int32_t q_len;       // 0: resumed, only its logit row is computed
  int64_t kv_len;      // after this step: queries have positions kv_len - q_len .. kv_len - 1
  int32_t rope_mode;
};

// What one forward reads. All arrays are flat over the step's T query tokens or L logit rows.
struct StepBatch {
  int64_t step_id = kNoStep;
  int32_t num_tokens = 0;                 // T
  std::vector<int32_t> tokens;            // [T]
  std::vector<int64_t> positions;         // [T] absolute
  std::vector<int32_t> token_segment;     // [T] index into segments
  std::vector<Segment> segments;
  std::vector<std::vector<int64_t>> slots;  // [group][T] page * page_size + offset, where the token's KV goes
  // [group][segment] the row's page table; valid until the next ApplyRowOps
  std::vector<std::vector<const PageId*>> page_tables;
  std::vector<int32_t> logit_src;         // [L] query token whose hidden state feeds the logit row; -1: the row's held one
  std::vector<int32_t> logit_segment;     // [L]
  std::vector<int64_t> logit_position;    // [L] absolute position of the token that the logit row predicts
  std::vector<uint8_t> logit_masked;      // [L] whether that token is drawn under a mask, or held: keep the hidden state
  std::vector<int32_t> skipped_items;     // items whose row was dead
  std::vector<int32_t> held_items;        // decode items whose row waits for a mask: skipped as well
  int64_t num_kv = 0;                     // sum of kv_len over segments that have queries
};

struct SampledToken {
  int32_t token = 0;
  float logprob = 0.0f;
  bool bad = false;   // NaN in the row or every logit -inf
  bool held = false;  // its mask is late: nothing was drawn
};

class RowTable {
 public:
  // vocab_size: what masks must cover; 0: not known here.
  RowTable(std::vector<KvGroup> groups, int32_t max_rows, int32_t vocab_size = 0);

  const RowState& row(int32_t r) const { return rows_[r]; }
  int32_t max_rows() const { return static_cast<int32_t>(rows_.size()); }
  const std::vector<KvGroup>& groups() const { return groups_; }
  const MaskTable& masks() const { return *masks_; }

  // MaskTable::Post, from any thread.
  void PostMask(int32_t row, uint32_t gen, int64_t position, std::span<const uint32_t> bits) {
    masks_->Post(row, gen, position, bits);
  }

  // Apply the plan's row_ops in order. Throws InternalError when an op names an impossible row.
  void ApplyRowOps(const StepPlan& plan);

  // Derive the step's arrays and advance kv_len of every live row by its q_len. A row with alive == 0 or
  // another gen gets no segment (skipped_items), nor does the decode item of a held row (held_items). Throws InternalError
  // when an extend item's expected kv_len differs from the row's, a page table is too short, or a kResume item's row is
  // not held.
  void Prepare(const StepPlan& plan, StepBatch* out);

  // A token was sampled for the row (after its kv_len advanced): sets last_token, clears alive on stop ids,
  // max_len or bad logits. One that was not, for want of its mask, makes the row held. Returns ResultFlags.
  uint8_t CommitSample(int32_t r, const SampledToken& sampled);

 private:
  std::vector<KvGroup> groups_;
  std::vector<RowState> rows_;
  std::vector<uint8_t> masked_;  // [row] whether this step's plan names it in mask_rows
  std::unique_ptr<MaskTable> masks_;
};

}  // namespace sapwood
