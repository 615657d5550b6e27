// A StepPlan as one blob for a device that keeps the rows' state itself, and a StepResult from what the device leaves.
//
// The executor's thread packs each plan into pinned memory before it launches the step, while the tokens of earlier
// steps are unknown. The packer therefore keeps a mirror of what row ops and items do to rows, all but their deaths:
// enough to lay a step out, to bound its lengths, and to refuse a bad plan before anything is launched.
//
// cuda/batch/plan_blob.h has the bytes, cuda/batch/ the kernels that read them; row_table.h the definition of both.
//
// Grammar masks (mask_table.h) are packed apart, as late as can be: when the step's sampling is launched. It is here that
// a row is held or not, so the mirror knows of that as well, and a plan is packed after the masks of the one before.
//
// Thread safety: none, used by the executor's thread; but for PostMask, MasksPosted and DropMasks.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "batch/mask_table.h"
#include "batch/plan.h"
#include "batch/shared_prefix.h"

namespace sapwood {

// A logit row whose token is drawn under a mask, unless its row has ended.
struct MaskedLogitRow {
  int32_t logit_row;
  int32_t row;
  uint32_t gen;
  int64_t position;  // absolute, of the token
  int32_t query;     // of the step, whose hidden state is the logit row's; -1: the one that is kept of the row
};

// What the host knows of a packed step, to choose how it is launched.
struct PackedPlan {
  int64_t step_id = kNoStep;
  int64_t sequence = 0;        // of this packer's plans: 1, 2, ..
  int64_t num_bytes = 0;       // of the blob
  int32_t num_tokens = 0;      // T, of all items: a row that has died keeps its place
  int32_t num_logit_rows = 0;  // L, likewise
  int32_t max_q_len = 0;
  int64_t max_kv_bound = 0;
  bool any_logprob = false;        // a logit row wants its log-probability
  bool any_banned = false;         // a logit row may have to ban its row's stop ids
  std::vector<int32_t> q_lens;     // [items]
  // [items] of those with queries, kv_len after the step if the row is alive and not held; else the device has q_len
  std::vector<int64_t> kv_bounds;
  std::vector<PageCopy> copies;
  std::vector<MaskedLogitRow> masked;  // without those of rows that are held, and so draw nothing in this step
};

// A block of the step's masks: these arrays, from the byte offsets on. The first two, at offset 0 and behind it, are of the
// rows that are held now and were not before: int64 query tokens of the step, and int64 rows.
struct PackedMasks {
  int64_t num_bytes = 0;
  int32_t num_held = 0;    // H, of both
  int32_t num_masks = 0;
  int64_t mask_index = 0;  // int32 [L]: as commit_step and sample take it (cuda/batch/params.h)
  int64_t masks = 0;       // uint32 [num_masks][ceil(vocab_size / 32)]
};

class PlanPacker {
 public:
  // max_pages: of a row in each group; max_stop_ids: of a row. The device's tables have that room. vocab_size: what masks
  // must cover.
  PlanPacker(std::vector<KvGroup> groups, int32_t max_rows, int32_t max_pages, int32_t max_stop_ids, int32_t vocab_size);

  // MaskTable::Post, from any thread.
  void PostMask(int32_t row, uint32_t gen, int64_t position, std::span<const uint32_t> bits) {
    masks_->Post(row, gen, position, bits);
  }

  // Of the plan's blob, if it is packed next.
  int64_t BytesNeeded(const StepPlan& plan) const;
  // Of the result block of any plan.
  int64_t ResultBytes() const;

  // Write the plan's blob to out. Throws InvalidArgument where out is too small, and has done nothing then;
  // InternalError or InvalidArgument where the plan is bad, which has then failed as by Fail.
  //
  // A plan is bad for what RowTable would throw on, as far as that does not depend on whether a row is alive, which it
  // certainly is until a sample of it is planned. The rest the device reports.
  PackedPlan Pack(const StepPlan& plan, std::span<uint8_t> out);

  // Whether every mask of the plan is there, but for those of rows that have ended (DropMasks). From any thread.
  bool MasksPosted(const PackedPlan& packed) const;
  // The masks that are there, and which rows are held for want of theirs, of the plan packed last: once for each plan that
  // has masked logit rows, before the next is packed. out: MaskBytes or more.
  int64_t MaskBytes(const PackedPlan& packed) const;
  PackedMasks PackMasks(const PackedPlan& packed, std::span<uint8_t> out);
  // A plan's result has come: the masks of rows that have ended go, and none of theirs is taken any more. From any thread.
  void DropMasks(const StepPlan& plan, const StepResult& result);
  size_t num_masks() const { return masks_->size(); }  // that wait

  // Of the plan packed last: its decode items behind the same pages of the first group that keeps all tokens, as segments
  // of the step, in whole chunks of chunk_len tokens that lie before every one's new token. Right whether rows live or not:
  // a dead one's pages are still what the mirror has.
  std::vector<SharedPrefix> SharedPrefixes(const StepPlan& plan, int64_t chunk_len) const;

  // The plan's step was not launched, or not to its end: none of the rows it names may run again before its next init.
  // Later row ops of them are dropped, and the next blob ends those that are alive on the device.
  void Fail(const StepPlan& plan);

 private:
  struct Row {
    uint32_t gen = 0;
    bool alive = false;    // may be
    bool certain = false;  // is, if alive: no step that samples for it has been packed
    bool held = false;     // is, if alive
    bool wants_logprob = false;
    int32_t num_stop_ids = 0;
    int64_t min_len = 0;
    int64_t kv_len = 0;  // if it is alive
    int64_t last_sequence = 0;  // newest plan with an item of it
    std::vector<int32_t> num_pages;  // [group]
    std::vector<PageId> pages;       // of full_group_
  };
  class Writer;

  void PackRowOps(const StepPlan& plan, Writer* writer);
  void PackItems(const StepPlan& plan, Writer* writer, PackedPlan* packed);
  bool MirrorRowOp(const StepPlan& plan, const RowOp& op);
  void MirrorInit(const StepPlan& plan, const RowOp& op);
  void CheckItem(const StepPlan& plan, size_t index) const;

  int32_t num_groups_, page_size_, max_pages_, max_stop_ids_;
  int32_t full_group_ = -1;  // the first that keeps all tokens; -1: there is none
  int64_t mask_words_;
  std::vector<Row> rows_;
  std::vector<uint8_t> masked_;  // [row] whether this plan names it in mask_rows
  std::unique_ptr<MaskTable> masks_;
  std::vector<std::pair<int32_t, uint32_t>> ended_;  // (row, gen) that the next blob ends
  int64_t sequence_ = 0;
};

// The result of a packed plan from the block that its step left: what FinishStep (program/sample_rows.h) gives for it,
// or an error that says what the device found. Throws InvalidArgument where the block is of another plan, or, where
// sequence is not 0, of another packing. Times are left out.
StepResult FinishPacked(const StepPlan& plan, std::span<const uint8_t> block, int64_t sequence = 0);

}  // namespace sapwood
