// The messages between the loop and the executor: StepPlan goes down, StepResult comes up.
//
// Plain data, no pointers: in one process a plan is handed over by pointer, to other ranks the same bytes go
// through a ring, and a recorded plan can be replayed. The loop and the executor share no other memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cache/kv_group.h"

namespace sapwood {

// What a row needs to be sampled and to know its own end. Copied into RowState by kInit.
struct RowInit {
  int32_t row = 0;
  uint32_t gen = 0;          // generation: results carry it back, stale ones are dropped
  int64_t kv_len = 0;        // tokens whose KV is already there (prefix hit or fork)
  int64_t prompt_len = 0;    // original prompt; stays when a retracted row recomputes its outputs
  int64_t max_len = 0;       // prompt + outputs: the row ends when this many tokens exist
  int64_t min_len = 0;       // below it (tokens that exist before sampling) stop ids cannot be sampled
  float temperature = 1.0f;  // <= 0 means greedy
  int32_t top_k = 0;         // <= 0 means off
  float top_p = 1.0f;
  float min_p = 0.0f;
  uint64_t seed = 0;
  uint32_t stream = 0;       // choice index: n > 1 with one seed must differ
  int32_t lora_slot = -1;
  int32_t rope_mode = 0;     // row of the rope tables, fixed at admission
  uint8_t return_logprob = 0;
  int32_t stop_begin = 0, stop_count = 0;  // stop ids (eos included) in StepPlan.ints
};

enum class RowOpKind : uint8_t { kInit, kAppendPages, kForceTokens, kTruncate, kFree };

struct RowOp {
  RowOpKind kind;
  int32_t row;
  uint32_t gen;
  int32_t group = 0;             // kAppendPages
  // kAppendPages: page ids in ints; kForceTokens: token ids in ints; kInit: begin = index in inits
  int32_t begin = 0, count = 0;
  int64_t value = 0;             // kForceTokens: position; kTruncate: new kv_len
};

enum class ItemKind : uint8_t { kExtend, kDecode, kVerify, kScore, kResume };
const char* ItemKindName(ItemKind kind);  // "extend", ...; "unknown" for foreign bytes

struct PlanItem {
  int32_t row;
  uint32_t gen;
  ItemKind kind;
  int32_t q_len;        // query tokens; 1 for kDecode, 0 for kResume
  int32_t logit_from;   // first query token that yields a logit row; == q_len for none. kResume: 0, and one logit row
  int32_t token_begin;  // kExtend: its ids in StepPlan.tokens; unused by kDecode (last_token is on the device)
  int64_t kv_len;       // kExtend: kv_len expected before the step (a mismatch is an error of ours); else -1
};

struct StepPlan {
  int64_t step_id = kNoStep;
  std::vector<RowOp> row_ops;    // applied in order, before the items
  std::vector<RowInit> inits;
  std::vector<int32_t> ints;
  std::vector<PlanItem> items;   // at most one per row
  std::vector<int32_t> tokens;
  std::vector<PageCopy> copies;  // done in order, after row_ops, before the forward
  std::vector<int32_t> mask_rows;  // rows of items whose drawn token must obey the mask posted for it (mask_table.h)

  // Flat bytes and back, for rings and the flight recorder. Deserialize throws InvalidArgument on
  // truncated or foreign bytes.
  std::vector<uint8_t> Serialize() const;
  static StepPlan Deserialize(const uint8_t* data, size_t size);
};

enum ResultFlags : uint8_t {
  kFinishedStop = 1,    // the token is an EOS or stop id
  kFinishedLength = 2,  // max_len reached
  kHeld = 4,            // its mask was late: the token is not drawn, the row waits; comes back as kResume
  kBadLogits = 8,       // NaN, or every logit -inf: the row has ended with an error
  kSkipped = 16,        // the row was not alive, or (with kHeld) waits for a mask: nothing was computed
};

struct ResultItem {
  int32_t row;
  uint32_t gen;
  int32_t n;            // tokens produced
  int32_t token_begin;  // in StepResult.tokens and .logprobs
  uint8_t flags;        // ResultFlags
};

struct StepResult {
  int64_t step_id = kNoStep;
  std::vector<ResultItem> items;  // same order as the plan's items
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;    // log-probability under the raw (untempered) distribution; NaN where not asked
  int64_t num_tokens = 0;         // query tokens computed
  int64_t num_kv = 0;             // KV positions attended to, summed over items
  int64_t num_logit_rows = 0;
  int64_t start_ns = 0, head_ns = 0, done_ns = 0;  // CLOCK_MONOTONIC: forward began, head began, done
  std::string error;              // non-empty: the whole step failed; items are empty
};

}  // namespace sapwood
