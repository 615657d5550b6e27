// The executor's memory of rows: applies a plan's row_ops, derives a step's flat arrays, takes samples in.
//
// Receives StepPlans from program/executor.cc in stream order; hands StepBatch to a Runner. Every index a plan carries
// is checked here, once a step: a plan may come from a ring or a file.
#include "batch/row_table.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace sapwood {
namespace {

// ids[begin, begin + count), or InternalError.
std::span<const int32_t> Slice(const std::vector<int32_t>& ids, int32_t begin, int32_t count, const char* what) {
  SAPWOOD_CHECK(begin >= 0 && count >= 0 && int64_t{begin} + count <= static_cast<int64_t>(ids.size()), what, " [",
                begin, ", +", count, ") is outside its array of ", ids.size());
  return std::span(ids).subspan(begin, count);
}

}  // namespace

RowTable::RowTable(std::vector<KvGroup> groups, int32_t max_rows, int32_t vocab_size) : groups_(std::move(groups)) {
  SAPWOOD_REQUIRE(!groups_.empty(), "groups must not be empty");
  SAPWOOD_REQUIRE(max_rows > 0, "max_rows must be positive, got ", max_rows);
  for (const KvGroup& group : groups_) {
    SAPWOOD_REQUIRE(group.page_size > 0 && group.page_size == groups_[0].page_size,
                    "all groups must have one positive page_size, got ", group.page_size, " beside ",
                    groups_[0].page_size);
  }
  rows_.resize(max_rows);
  for (RowState& row : rows_) row.pages.resize(groups_.size());
  masked_.resize(max_rows);
  masks_ = std::make_unique<MaskTable>(max_rows, vocab_size);
}

void RowTable::ApplyRowOps(const StepPlan& plan) {
  for (const RowOp& op : plan.row_ops) {
    SAPWOOD_CHECK(op.row >= 0 && op.row < max_rows(), "row op names row ", op.row, " of ", max_rows());
    RowState& row = rows_[op.row];
    if (op.kind == RowOpKind::kInit) {
      SAPWOOD_CHECK(op.begin >= 0 && op.begin < static_cast<int64_t>(plan.inits.size()), "init ", op.begin, " of ",
                    plan.inits.size());
      const RowInit& init = plan.inits[op.begin];
      SAPWOOD_CHECK(init.kv_len >= 0, "kv_len ", init.kv_len);
      const auto stop_ids = Slice(plan.ints, init.stop_begin, init.stop_count, "stop ids");
      row.init = init;
      row.gen = op.gen;
      row.kv_len = init.kv_len;
      row.last_token = 0;
      row.alive = true;
      row.held = false;
      masks_->Begin(op.row, op.gen);
      row.stop_ids.assign(stop_ids.begin(), stop_ids.end());
      for (auto& table : row.pages) table.clear();
      continue;
    }
    if (op.kind == RowOpKind::kFree) {
      if (row.gen != op.gen) continue;
      row.alive = false;
      masks_->End(op.row, op.gen);
      continue;
    }
    SAPWOOD_CHECK(row.gen == op.gen, "row op for generation ", op.gen, " of row ", op.row, ", which is at ", row.gen);
    switch (op.kind) {
      case RowOpKind::kAppendPages: {
        SAPWOOD_CHECK(op.group >= 0 && op.group < static_cast<int64_t>(groups_.size()), "group ", op.group);
        const auto ids = Slice(plan.ints, op.begin, op.count, "page ids");
        row.pages[op.group].insert(row.pages[op.group].end(), ids.begin(), ids.end());
        break;
      }
      case RowOpKind::kForceTokens: {
        const auto ids = Slice(plan.ints, op.begin, op.count, "forced tokens");
        if (!row.alive) break;  // ended on the device before the host knew
        SAPWOOD_CHECK(!ids.empty() && op.value == row.kv_len, "forced tokens at position ", op.value, " of row ",
                      op.row, ", whose next position is ", row.kv_len);
        row.last_token = ids.back();
        row.held = false;  // what it waited to draw has been given
        break;
      }
      case RowOpKind::kTruncate:
        if (!row.alive) break;
        SAPWOOD_CHECK(op.value >= 0 && op.value <= row.kv_len, "row ", op.row, " cannot be truncated to ", op.value,
                      " from ", row.kv_len);
        if (op.value < row.kv_len) row.held = false;  // the hidden state that is kept is no longer the row's last
        row.kv_len = op.value;
        break;
      default:
        SAPWOOD_CHECK(false, "row op kind ", static_cast<int>(op.kind));
    }
  }
}

void RowTable::Prepare(const StepPlan& plan, StepBatch* out) {
  const int32_t page_size = groups_[0].page_size;
  const size_t num_groups = groups_.size();
  out->step_id = plan.step_id;
  out->num_kv = 0;
  out->tokens.clear();
  out->positions.clear();
  out->token_segment.clear();
  out->segments.clear();
  out->logit_src.clear();
  out->logit_segment.clear();
  out->logit_position.clear();
  out->logit_masked.clear();
  out->skipped_items.clear();
  out->held_items.clear();
  out->slots.resize(num_groups);
  out->page_tables.resize(num_groups);
  for (size_t g = 0; g < num_groups; ++g) {
    out->slots[g].clear();
    out->page_tables[g].clear();
  }

  std::fill(masked_.begin(), masked_.end(), 0);
  for (const int32_t r : plan.mask_rows) {
    SAPWOOD_CHECK(r >= 0 && r < max_rows(), "mask_rows names row ", r, " of ", max_rows());
    masked_[r] = 1;
  }

  for (size_t i = 0; i < plan.items.size(); ++i) {
    const PlanItem& item = plan.items[i];
    SAPWOOD_CHECK(item.row >= 0 && item.row < max_rows(), "item ", i, " names row ", item.row, " of ", max_rows());
    const bool decode = item.kind == ItemKind::kDecode, resume = item.kind == ItemKind::kResume;
    SAPWOOD_CHECK(decode || resume || item.kind == ItemKind::kExtend, "item ", i, ": ", ItemKindName(item.kind),
                  " is not supported by this executor");
    SAPWOOD_CHECK(resume ? item.q_len == 0 : item.q_len >= 1 && (!decode || item.q_len == 1), "item ", i, ": ",
                  ItemKindName(item.kind), " of ", item.q_len, " tokens");
    SAPWOOD_CHECK(item.logit_from >= 0 && item.logit_from <= item.q_len, "item ", i, ": logit_from ", item.logit_from,
                  " of ", item.q_len);
    RowState& row = rows_[item.row];
    if (!row.alive || row.gen != item.gen) {
      out->skipped_items.push_back(static_cast<int32_t>(i));
      continue;
    }
    if (decode && row.held) {  // planned before the loop heard that the token it was to feed was not drawn
      out->held_items.push_back(static_cast<int32_t>(i));
      continue;
    }
    SAPWOOD_CHECK(resume == row.held, "item ", i, ": ", ItemKindName(item.kind), " of row ", item.row,
                  resume ? ", which is not held" : ", which is held");
    const int64_t begin = row.kv_len, end = begin + item.q_len;
    if (decode) {
      out->tokens.push_back(row.last_token);
    } else if (!resume) {
      SAPWOOD_CHECK(item.kv_len == begin, "extend of row ", item.row, " expects kv_len ", item.kv_len, ", the row has ",
                    begin);
      const auto ids = Slice(plan.tokens, item.token_begin, item.q_len, "extend tokens");
      out->tokens.insert(out->tokens.end(), ids.begin(), ids.end());
    }
    const int32_t q_begin = static_cast<int32_t>(out->positions.size());
    const int32_t segment = static_cast<int32_t>(out->segments.size());
    for (int64_t p = begin; p < end; ++p) out->positions.push_back(p);
    out->token_segment.insert(out->token_segment.end(), item.q_len, segment);
    for (size_t g = 0; g < num_groups; ++g) {
      const std::vector<PageId>& table = row.pages[g];
      SAPWOOD_CHECK(end <= static_cast<int64_t>(table.size()) * page_size, "row ", item.row, " needs ", end,
                    " slots in group ", g, ", its page table has ", table.size(), " pages of ", page_size);
      for (int64_t p = begin; p < end;) {
        const PageId page = table[p / page_size];
        SAPWOOD_CHECK(page >= 0, "row ", item.row, " has no page for position ", p, " in group ", g);
        const int64_t page_end = std::min((p / page_size + 1) * page_size, end);
        for (int64_t slot = int64_t{page} * page_size + p % page_size; p < page_end; ++p, ++slot) {
          out->slots[g].push_back(slot);
        }
      }
      out->page_tables[g].push_back(table.data());
    }
    const auto add_logit_row = [&](int32_t src, int64_t position, bool drawn) {
      out->logit_src.push_back(src);
      out->logit_segment.push_back(segment);
      out->logit_position.push_back(position);
      out->logit_masked.push_back(drawn && masked_[item.row]);
    };
    for (int32_t q = decode ? 0 : item.logit_from; q < item.q_len; ++q) {
      add_logit_row(q_begin + q, begin + q + 1, q + 1 == item.q_len);
    }
    if (resume) add_logit_row(-1, end, true);
    row.kv_len = end;
    if (!resume) out->num_kv += end;
    out->segments.push_back({.row = item.row,
                             .item = static_cast<int32_t>(i),
                             .q_begin = q_begin,
                             .q_len = item.q_len,
                             .kv_len = end,
                             .rope_mode = row.init.rope_mode});
  }
  out->num_tokens = static_cast<int32_t>(out->tokens.size());
}

uint8_t RowTable::CommitSample(int32_t r, const SampledToken& sampled) {
  SAPWOOD_CHECK(r >= 0 && r < max_rows(), "row ", r, " of ", max_rows());
  RowState& row = rows_[r];
  SAPWOOD_CHECK(row.alive, "a token was sampled for row ", r, ", which has ended");
  if (sampled.held) {
    row.held = true;
    return kHeld;
  }
  row.held = false;
  if (sampled.bad) {
    row.alive = false;
    masks_->End(r, row.gen);
    return kBadLogits;
  }
  row.last_token = sampled.token;
  // kv_len tokens existed before this one, whose absolute position is kv_len.
  const bool stops = row.kv_len >= row.init.min_len &&
                     std::find(row.stop_ids.begin(), row.stop_ids.end(), sampled.token) != row.stop_ids.end();
  uint8_t flags = 0;
  if (stops) {
    flags = kFinishedStop;
  } else if (row.kv_len + 1 >= row.init.max_len) {
    flags = kFinishedLength;
  }
  if (flags != 0) row.alive = false;
  if (row.alive) {
    masks_->Drawn(r, row.gen, row.kv_len);
  } else {
    masks_->End(r, row.gen);
  }
  return flags;
}

}  // namespace sapwood
