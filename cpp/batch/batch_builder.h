// The loop's side of a step: the book of rows, and the building of one StepPlan a step.
//
// The book mirrors what the loop knows of each row: its tokens, its lease, how far launched steps reach.
// Everything per row and per token happens here, in a few native calls a step: Python decides *which*
// requests are admitted, chunked and retracted, and never loops over tokens or pages.
//
//   Admit -> [kExtend: prompt chunks] -> [kDecode: one token a step] -> Release
//                     Pause: leave the row out of new plans (draining before retraction)
//                     kHeld: came back without a token, its mask was late; MaskPosted lets it go on as kDecode
//
// Thread safety: none; owned by the event loop's thread, like the CacheManager it uses.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "batch/plan.h"
#include "cache/cache_manager.h"

namespace sapwood {

// A request as the book needs it.
struct RowSpec {
  uint64_t ns = 0;                // cache namespace
  std::vector<int32_t> tokens;    // known tokens: the prompt, and after a retraction the outputs so far
  std::vector<int32_t> keys;      // cache key ids; empty = the token ids (else same length as tokens)
  std::vector<int32_t> stop_ids;
  bool masked = false;            // every token drawn for it obeys a mask that the loop posts (Executor::PostMask)
  RowInit init;                   // row, gen, kv_len and the stop range are filled in by the builder
};

struct Admitted {
  int32_t row;
  uint32_t gen;
  int64_t cached_len;
};

enum class RowPhase : uint8_t { kFree, kExtend, kDecode, kHeld, kPaused, kDone };

// One step as built: the plan and what the scheduler wants to know of it.
struct BuiltStep {
  std::shared_ptr<StepPlan> plan;           // null when there was nothing to do
  std::vector<int32_t> granted;             // per requested extend: tokens actually planned (0 = no pages)
  std::vector<int32_t> blocked;             // decode rows left out for want of a page, newest admission first
  int32_t num_extend_tokens = 0;
  int32_t num_decode_rows = 0;
  int32_t num_resume_rows = 0;              // held rows that draw their token: a logit row each, no query token
  int64_t num_kv = 0;                       // KV positions the step will attend to (upper bound)
  int32_t num_logit_rows = 0;
};

// What a result meant for the rows it still concerns, flat, in item order.
struct Committed {
  std::vector<int32_t> rows;
  std::vector<int32_t> tokens;     // -1 where an item produced none (mid-prompt chunk, kHeld)
  std::vector<uint8_t> flags;      // ResultFlags
  std::vector<float> logprobs;
};

class BatchBuilder {
 public:
  // cache must outlive the builder. max_rows: rows that can be live at once.
  BatchBuilder(CacheManager* cache, int32_t max_rows);
  ~BatchBuilder();

  int32_t num_free_rows() const;

  // Take a row for the request: match and lock its prefix (at most tokens - 1). Throws CapacityError when
  // no row is free. Reserves no pages yet. The row starts in kExtend.
  Admitted Admit(RowSpec spec);
  // A row that starts as a copy of parent's first `at` tokens (KV computed by launched steps);
  // spec.tokens must begin with them. row = -1 when pages are too few. Copies of the tail go into the next plan, so
  // this is refused between BeginStep and EndStep. What the parent can no longer give (its window has slid past `at`,
  // its prefix was invalidated) is matched or computed as by Admit: see cached_len.
  Admitted AdmitFork(int32_t parent, int64_t at, RowSpec spec);

  // Build the next plan. extends: (row, most tokens to compute), in priority order; then every kDecode row
  // that is not past its last planned token, oldest admission first, when include_decodes. A prompt's whole pages
  // are committed to the cache here, at launch, so later extends of the same plan can already match them
  // (Admit them after BuildExtend of the leader: see BeginStep/AddExtend below for the incremental form).
  BuiltStep Build(int64_t step_id, std::span<const std::pair<int32_t, int32_t>> extends,
                  bool include_decodes = true);

  // The incremental form of Build, so that a follower admitted between two calls hits its leader's pages.
  // step_id must exceed every launched step's; that of a step without items may be used again.
  void BeginStep(int64_t step_id);
  // Every kDecode row, and of the kHeld rows those whose mask has been posted, as kResume. Returns decode items added.
  int32_t AddDecodes();
  int32_t AddExtend(int32_t row, int32_t max_tokens);  // returns tokens granted
  BuiltStep EndStep();

  // Take a result in: append tokens, note the end of rows, retire the step (cache limbo included).
  // A row whose mask was late (flag kHeld, token -1) becomes kHeld; what was launched for it meanwhile is skipped.
  // A row that ended (flags kFinished*, kBadLogits) becomes kDone; the caller must Release it. Results come in launch
  // order; items that were skipped or whose row was released leave no entry. A failed step (result.error) gives an
  // empty answer, makes every row it named kDone and worthless, and takes out of the cache what it and later steps were
  // to compute. Rows that share such pages become !valid(): their results are dropped too, release and recompute them.
  Committed Commit(const StepResult& result);

  // The loop has posted the mask of the masked row's token at absolute position `position`. Says so for every mask, in
  // time or late: a row that comes back held after its mask was posted goes on all the same.
  void MaskPosted(int32_t row, int64_t position);

  // Leave the row out of new plans from now on / take it back in (back to kExtend, kDecode or kHeld).
  void Pause(int32_t row);
  void Resume(int32_t row);

  // Give the row back. keep: put its computed whole pages into the cache. Pages that a launched step still names
  // wait in limbo. failed: the row's computation is worthless: take its pages out of the tree instead (so it is done,
  // whatever the flags say, after bad logits and where the row shares an invalidated prefix). Not for a row of the step
  // being built.
  void Release(int32_t row, bool keep = true, bool failed = false);

  // How many tokens of `tokens` (whole pages) rows still in kExtend are going to compute and put into the cache
  // beyond what Match finds now: > 0 means waiting a step is better than computing twice.
  int64_t PendingPrefix(uint64_t ns, std::span<const int32_t> keys) const;

  RowPhase phase(int32_t row) const;
  uint32_t gen(int32_t row) const;
  int64_t num_tokens(int32_t row) const;          // known tokens
  std::vector<int32_t> tokens(int32_t row) const;  // known tokens: prompt and outputs
  int64_t planned_len(int32_t row) const;         // KV length once every launched step has run
  int64_t cached_len(int32_t row) const;
  int32_t in_flight(int32_t row) const;           // launched, unretired steps that name it
  bool valid(int32_t row) const;                  // false: shares an invalidated prefix, must be recomputed
  std::vector<PageId> pages(int32_t row, int group) const;

  // Rows, leases and counters agree with each other and with the cache. Throws InternalError.
  void CheckInvariants() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sapwood
