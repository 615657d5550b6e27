// Packs plans for the device and unpacks results: see plan_packer.h.
//
// The blob is written front to back in one pass that also checks and mirrors: whatever a bad plan has changed in the
// mirror by then belongs to rows that it names, and Fail ends those.
#include "batch/plan_packer.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "base/check.h"
#include "batch/plan_blob.h"  // of cuda/

namespace sapwood {
namespace {

constexpr int64_t kAlignment = 16;

static_assert(sizeof(SapwoodPlanBlob) % kAlignment == 0 && sizeof(SapwoodStepResultBlock) % kAlignment == 0);
static_assert(static_cast<int>(RowOpKind::kInit) == SAPWOOD_ROW_OP_INIT &&
              static_cast<int>(RowOpKind::kAppendPages) == SAPWOOD_ROW_OP_APPEND_PAGES &&
              static_cast<int>(RowOpKind::kForceTokens) == SAPWOOD_ROW_OP_FORCE_TOKENS &&
              static_cast<int>(RowOpKind::kTruncate) == SAPWOOD_ROW_OP_TRUNCATE &&
              static_cast<int>(RowOpKind::kFree) == SAPWOOD_ROW_OP_FREE);
static_assert(static_cast<int>(ItemKind::kExtend) == SAPWOOD_ITEM_EXTEND &&
              static_cast<int>(ItemKind::kDecode) == SAPWOOD_ITEM_DECODE &&
              static_cast<int>(ItemKind::kResume) == SAPWOOD_ITEM_RESUME);

constexpr int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

void CheckRange(const std::vector<int32_t>& ids, int32_t begin, int64_t count, const char* what) {
  SAPWOOD_CHECK(begin >= 0 && count >= 0 && begin + count <= static_cast<int64_t>(ids.size()), what, " [", begin, ", +",
                count, ") is outside its array of ", ids.size());
}

// As the blob has it.
int32_t LogitFrom(const PlanItem& item) {
  switch (item.kind) {
    case ItemKind::kDecode: return 0;
    case ItemKind::kResume: return -1;
    default: return item.logit_from;
  }
}

bool Samples(const PlanItem& item) { return LogitFrom(item) < item.q_len; }

}  // namespace

// Appends arrays to a blob whose size has been checked.
class PlanPacker::Writer {
 public:
  explicit Writer(uint8_t* blob) : blob_(blob) {}

  // Begins an array: its offset.
  int32_t Begin() {
    const int64_t padded = Aligned(at_);
    std::memset(blob_ + at_, 0, padded - at_);
    return static_cast<int32_t>(at_ = padded);
  }
  template <typename T>
  void Put(const T& element) {
    std::memcpy(blob_ + at_, &element, sizeof(T));
    at_ += sizeof(T);
  }
  int32_t PutAll(const std::vector<int32_t>& elements) {
    const int32_t begin = Begin();
    const size_t bytes = elements.size() * sizeof(int32_t);
    if (bytes > 0) std::memcpy(blob_ + at_, elements.data(), bytes);
    at_ += static_cast<int64_t>(bytes);
    return begin;
  }
  void PutHeader() { std::memcpy(blob_, &header, sizeof(header)); }

  SapwoodPlanBlob header = {};

 private:
  uint8_t* blob_;
  int64_t at_ = sizeof(SapwoodPlanBlob);
};

PlanPacker::PlanPacker(std::vector<KvGroup> groups, int32_t max_rows, int32_t max_pages, int32_t max_stop_ids,
                       int32_t vocab_size)
    : max_pages_(max_pages), max_stop_ids_(max_stop_ids), mask_words_((int64_t{vocab_size} + 31) / 32) {
  SAPWOOD_REQUIRE(!groups.empty(), "groups must not be empty");
  SAPWOOD_REQUIRE(max_rows > 0, "max_rows must be positive, got ", max_rows);
  SAPWOOD_REQUIRE(max_stop_ids >= 0, "max_stop_ids must not be negative, got ", max_stop_ids);
  SAPWOOD_REQUIRE(vocab_size > 0, "vocab_size must be positive, got ", vocab_size);
  num_groups_ = static_cast<int32_t>(groups.size());
  page_size_ = groups[0].page_size;
  for (const KvGroup& group : groups) {
    SAPWOOD_REQUIRE(group.page_size > 0 && group.page_size == page_size_,
                    "all groups must have one positive page_size, got ", group.page_size, " beside ", page_size_);
  }
  SAPWOOD_REQUIRE(max_pages > 0 && int64_t{max_pages} * page_size_ <= std::numeric_limits<int32_t>::max(),
                  "max_pages must be positive and max_pages * page_size (", page_size_, ") below 2^31, got ",
                  max_pages);
  for (int32_t g = num_groups_ - 1; g >= 0; --g) {
    if (groups[g].kind == KvKind::kFull) full_group_ = g;
  }
  rows_.resize(max_rows);
  for (Row& row : rows_) row.num_pages.resize(num_groups_);
  masked_.resize(max_rows);
  masks_ = std::make_unique<MaskTable>(max_rows, vocab_size);
}

int64_t PlanPacker::BytesNeeded(const StepPlan& plan) const {
  const auto num_items = static_cast<int64_t>(plan.items.size());
  const auto ints = [](const std::vector<int32_t>& v) { return Aligned(static_cast<int64_t>(v.size()) * 4); };
  return static_cast<int64_t>(sizeof(SapwoodPlanBlob)) +
         Aligned((plan.row_ops.size() + ended_.size()) * sizeof(SapwoodPlanRowOp)) +
         Aligned(plan.inits.size() * sizeof(SapwoodPlanInit)) + ints(plan.ints) +
         Aligned(num_items * sizeof(SapwoodPlanItem)) + 2 * Aligned((num_items + 1) * 4) + ints(plan.tokens);
}

int64_t PlanPacker::ResultBytes() const {
  return static_cast<int64_t>(sizeof(SapwoodStepResultBlock) + rows_.size() * sizeof(SapwoodStepResultItem));
}

PackedPlan PlanPacker::Pack(const StepPlan& plan, std::span<uint8_t> out) {
  const int64_t needed = BytesNeeded(plan);
  SAPWOOD_REQUIRE(static_cast<int64_t>(out.size()) >= needed, "out must have room for ", needed, " bytes, got ",
                  out.size(), ": see bytes_needed");
  SAPWOOD_REQUIRE(needed <= std::numeric_limits<int32_t>::max(), "step ", plan.step_id, " takes ", needed,
                  " bytes: offsets are 32 bits");
  PackedPlan packed;
  packed.step_id = plan.step_id;
  packed.sequence = ++sequence_;
  try {
    Writer writer(out.data());
    PackRowOps(plan, &writer);
    PackItems(plan, &writer, &packed);
    SapwoodPlanBlob& header = writer.header;
    header.tokens = writer.PutAll(plan.tokens);
    packed.num_bytes = writer.Begin();
    header.format = SAPWOOD_PLAN_BLOB_FORMAT;
    header.num_bytes = static_cast<int32_t>(packed.num_bytes);
    header.step_id = plan.step_id;
    header.sequence = packed.sequence;
    writer.PutHeader();
  } catch (...) {
    Fail(plan);
    throw;
  }
  ended_.clear();
  packed.copies = plan.copies;
  return packed;
}

void PlanPacker::PackRowOps(const StepPlan& plan, Writer* writer) {
  SapwoodPlanBlob& header = writer->header;
  header.row_ops = writer->Begin();
  // First: the plan may have taken the row anew.
  for (const auto& [row, gen] : ended_) {
    SapwoodPlanRowOp op = {};
    op.kind = SAPWOOD_ROW_OP_FREE;
    op.row = row;
    op.gen = gen;
    writer->Put(op);
    ++header.num_row_ops;
  }
  for (const RowOp& op : plan.row_ops) {
    if (!MirrorRowOp(plan, op)) continue;
    writer->Put(SapwoodPlanRowOp{.kind = static_cast<int32_t>(op.kind),
                                 .row = op.row,
                                 .gen = op.gen,
                                 .group = op.group,
                                 .begin = op.begin,
                                 .count = op.count,
                                 .value = op.value});
    ++header.num_row_ops;
  }
  header.inits = writer->Begin();
  for (const RowInit& init : plan.inits) {
    writer->Put(SapwoodPlanInit{.seed = init.seed,
                                .kv_len = init.kv_len,
                                .max_len = init.max_len,
                                .min_len = init.min_len,
                                .stream = init.stream,
                                .top_k = init.top_k,
                                .temperature = init.temperature,
                                .top_p = init.top_p,
                                .min_p = init.min_p,
                                .rope_mode = init.rope_mode,
                                .return_logprob = init.return_logprob,
                                .stop_begin = init.stop_begin,
                                .stop_count = init.stop_count,
                                .reserved = 0});
  }
  header.ints = writer->PutAll(plan.ints);
}

// As RowTable::ApplyRowOps. False: the op does nothing, because its row is known to be dead.
bool PlanPacker::MirrorRowOp(const StepPlan& plan, const RowOp& op) {
  SAPWOOD_CHECK(op.row >= 0 && op.row < static_cast<int64_t>(rows_.size()), "row op names row ", op.row, " of ",
                rows_.size());
  Row& row = rows_[op.row];
  if (op.kind == RowOpKind::kInit) {
    MirrorInit(plan, op);
    return true;
  }
  if (op.kind == RowOpKind::kFree) {
    if (row.gen == op.gen) {
      row.alive = false;
      masks_->End(op.row, op.gen);
    }
    return true;
  }
  SAPWOOD_CHECK(row.gen == op.gen, "row op for generation ", op.gen, " of row ", op.row, ", which is at ", row.gen);
  switch (op.kind) {
    case RowOpKind::kAppendPages: {
      SAPWOOD_CHECK(op.group >= 0 && op.group < num_groups_, "group ", op.group);
      CheckRange(plan.ints, op.begin, op.count, "page ids");
      if (!row.alive) return false;
      int32_t& num_pages = row.num_pages[op.group];
      SAPWOOD_CHECK(op.count <= max_pages_ - num_pages, "row ", op.row, " has ", num_pages, " pages in group ",
                    op.group, ", ", op.count, " more are above max_pages = ", max_pages_);
      num_pages += op.count;
      if (op.group == full_group_) {
        row.pages.insert(row.pages.end(), plan.ints.begin() + op.begin, plan.ints.begin() + op.begin + op.count);
      }
      return true;
    }
    case RowOpKind::kForceTokens:
      CheckRange(plan.ints, op.begin, op.count, "forced tokens");
      SAPWOOD_CHECK(op.count > 0, "no forced tokens for row ", op.row);
      SAPWOOD_CHECK(!row.alive || !row.certain || op.value == row.kv_len, "forced tokens at position ", op.value,
                    " of row ", op.row, ", whose next position is ", row.kv_len);
      row.held = false;  // what it waited to draw has been given
      return row.alive;
    case RowOpKind::kTruncate:
      SAPWOOD_CHECK(op.value >= 0, "row ", op.row, " cannot be truncated to ", op.value);
      SAPWOOD_CHECK(!row.alive || !row.certain || op.value <= row.kv_len, "row ", op.row, " cannot be truncated to ",
                    op.value, " from ", row.kv_len);
      if (op.value < row.kv_len) row.held = false;  // the hidden state that is kept is no longer the row's last
      row.kv_len = std::min(row.kv_len, op.value);
      return row.alive;
    default:
      SAPWOOD_CHECK(false, "row op kind ", static_cast<int>(op.kind));
  }
}

void PlanPacker::MirrorInit(const StepPlan& plan, const RowOp& op) {
  SAPWOOD_CHECK(op.begin >= 0 && op.begin < static_cast<int64_t>(plan.inits.size()), "init ", op.begin, " of ",
                plan.inits.size());
  const RowInit& init = plan.inits[op.begin];
  SAPWOOD_CHECK(init.kv_len >= 0, "kv_len ", init.kv_len);
  CheckRange(plan.ints, init.stop_begin, init.stop_count, "stop ids");
  SAPWOOD_REQUIRE(init.stop_count <= max_stop_ids_, "row ", op.row, " has ", init.stop_count,
                  " stop ids, the device has room for ", max_stop_ids_, ": raise max_stop_ids");
  Row& row = rows_[op.row];
  row.gen = op.gen;
  row.alive = row.certain = true;
  row.held = false;
  masks_->Begin(op.row, op.gen);
  row.wants_logprob = init.return_logprob != 0;
  row.num_stop_ids = init.stop_count;
  row.min_len = init.min_len;
  row.kv_len = init.kv_len;
  std::fill(row.num_pages.begin(), row.num_pages.end(), 0);
  row.pages.clear();
}

std::vector<SharedPrefix> PlanPacker::SharedPrefixes(const StepPlan& plan, int64_t chunk_len) const {
  SAPWOOD_REQUIRE(chunk_len > 0, "chunk_len must be positive, got ", chunk_len);
  std::vector<PrefixReader> readers;
  for (size_t i = 0; i < plan.items.size() && full_group_ >= 0; ++i) {
    const PlanItem& item = plan.items[i];
    const Row& row = rows_[item.row];
    if (item.kind != ItemKind::kDecode || row.held) continue;
    const auto room = static_cast<int64_t>(row.pages.size()) * page_size_;
    const int64_t before = std::min(row.kv_len - 1, room);  // kv_len is that after the step
    if (before > 0) readers.push_back({static_cast<int32_t>(i), row.pages.data(), before});
  }
  return FindSharedPrefixes(std::move(readers), page_size_, chunk_len);
}

void PlanPacker::PackItems(const StepPlan& plan, Writer* writer, PackedPlan* packed) {
  const size_t num_items = plan.items.size();
  SapwoodPlanBlob& header = writer->header;
  header.num_items = static_cast<int32_t>(num_items);
  packed->q_lens.reserve(num_items);
  packed->kv_bounds.reserve(num_items);
  std::fill(masked_.begin(), masked_.end(), 0);
  for (const int32_t r : plan.mask_rows) {
    SAPWOOD_CHECK(r >= 0 && r < static_cast<int64_t>(rows_.size()), "mask_rows names row ", r, " of ", rows_.size());
    masked_[r] = 1;
  }
  header.items = writer->Begin();
  int64_t num_tokens = 0, num_logit_rows = 0;
  for (size_t i = 0; i < num_items; ++i) {
    const PlanItem& item = plan.items[i];
    CheckItem(plan, i);
    const bool resume = item.kind == ItemKind::kResume;
    const int32_t logit_from = LogitFrom(item);
    writer->Put(SapwoodPlanItem{.row = item.row,
                                .gen = item.gen,
                                .kind = static_cast<int32_t>(item.kind),
                                .q_len = item.q_len,
                                .logit_from = logit_from,
                                .token_begin = item.token_begin,
                                .kv_len = item.kv_len});
    Row& row = rows_[item.row];
    row.last_sequence = packed->sequence;
    int64_t kv_bound = item.q_len;
    const int64_t logit_rows_end = num_logit_rows + item.q_len - logit_from;
    if (row.alive && row.gen == item.gen && !(row.held && item.kind == ItemKind::kDecode)) {
      const int64_t begin = row.kv_len;
      row.kv_len = begin + item.q_len;
      if (!resume) kv_bound = row.kv_len;
      if (Samples(item)) {
        row.certain = row.held = false;
        packed->any_logprob |= row.wants_logprob;
        packed->any_banned |= row.num_stop_ids > 0 && begin + logit_from + 1 < row.min_len;
        if (masked_[item.row]) {
          packed->masked.push_back({.logit_row = static_cast<int32_t>(logit_rows_end - 1),
                                    .row = item.row,
                                    .gen = item.gen,
                                    .position = row.kv_len,
                                    .query = resume ? -1 : static_cast<int32_t>(num_tokens + item.q_len - 1)});
        }
      }
    }
    num_tokens += item.q_len;
    num_logit_rows = logit_rows_end;
    packed->q_lens.push_back(item.q_len);
    packed->kv_bounds.push_back(kv_bound);
    packed->max_q_len = std::max(packed->max_q_len, item.q_len);
    packed->max_kv_bound = std::max(packed->max_kv_bound, kv_bound);
  }
  SAPWOOD_CHECK(num_tokens <= std::numeric_limits<int32_t>::max(), "step ", plan.step_id, " has ", num_tokens,
                " tokens");
  header.num_tokens = packed->num_tokens = static_cast<int32_t>(num_tokens);
  header.num_logit_rows = packed->num_logit_rows = static_cast<int32_t>(num_logit_rows);

  header.q_indptr = writer->Begin();
  int32_t end = 0;
  writer->Put(end);
  for (const PlanItem& item : plan.items) writer->Put(end += item.q_len);
  header.logit_indptr = writer->Begin();
  writer->Put(end = 0);
  for (const PlanItem& item : plan.items) writer->Put(end += item.q_len - LogitFrom(item));
}

// As RowTable::Prepare, as far as a row is certain to be alive; whether a page is missing only the device looks.
void PlanPacker::CheckItem(const StepPlan& plan, size_t index) const {
  const PlanItem& item = plan.items[index];
  SAPWOOD_CHECK(item.row >= 0 && item.row < static_cast<int64_t>(rows_.size()), "item ", index, " names row ", item.row,
                " of ", rows_.size());
  const Row& row = rows_[item.row];
  SAPWOOD_CHECK(row.last_sequence != sequence_, "item ", index, ": row ", item.row,
                " has an item in this step already");
  const bool decode = item.kind == ItemKind::kDecode, resume = item.kind == ItemKind::kResume;
  SAPWOOD_CHECK(decode || resume || item.kind == ItemKind::kExtend, "item ", index, ": ", ItemKindName(item.kind),
                " is not supported by this executor");
  SAPWOOD_CHECK(resume ? item.q_len == 0 : item.q_len >= 1 && (!decode || item.q_len == 1), "item ", index, ": ",
                ItemKindName(item.kind), " of ", item.q_len, " tokens");
  SAPWOOD_CHECK(item.logit_from >= 0 && item.logit_from <= item.q_len, "item ", index, ": logit_from ", item.logit_from,
                " of ", item.q_len);
  SAPWOOD_CHECK(item.q_len <= max_pages_ * page_size_, "item ", index, ": ", item.q_len, " tokens, ", max_pages_,
                " pages of ", page_size_, " hold fewer");
  if (item.kind == ItemKind::kExtend) CheckRange(plan.tokens, item.token_begin, item.q_len, "extend tokens");
  if (!row.alive || !row.certain || row.gen != item.gen) return;
  SAPWOOD_CHECK(!resume, "item ", index, ": resume of row ", item.row, ", which is not held");
  SAPWOOD_CHECK(decode || item.kv_len == row.kv_len, "extend of row ", item.row, " expects kv_len ", item.kv_len,
                ", the row has ", row.kv_len);
  const int64_t end = row.kv_len + item.q_len;
  for (int32_t g = 0; g < num_groups_; ++g) {
    SAPWOOD_CHECK(end <= int64_t{row.num_pages[g]} * page_size_, "row ", item.row, " needs ", end, " slots in group ",
                  g, ", its page table has ", row.num_pages[g], " pages of ", page_size_);
  }
}

bool PlanPacker::MasksPosted(const PackedPlan& packed) const {
  return std::none_of(packed.masked.begin(), packed.masked.end(), [this](const MaskedLogitRow& masked) {
    return masks_->MayCome(masked.row, masked.gen, masked.position);
  });
}

int64_t PlanPacker::MaskBytes(const PackedPlan& packed) const {
  const auto num_masked = static_cast<int64_t>(packed.masked.size());
  return num_masked * (2 * 8 + mask_words_ * 4) + int64_t{packed.num_logit_rows} * 4;
}

PackedMasks PlanPacker::PackMasks(const PackedPlan& packed, std::span<uint8_t> out) {
  SAPWOOD_REQUIRE(packed.sequence == sequence_, "masks are of packing ", packed.sequence, ", the last was ", sequence_);
  const int64_t needed = MaskBytes(packed);
  SAPWOOD_REQUIRE(static_cast<int64_t>(out.size()) >= needed, "out must have room for ", needed, " bytes, got ",
                  out.size(), ": see mask_bytes");
  std::vector<int64_t> queries, rows;
  std::vector<int32_t> index(packed.num_logit_rows, -1);
  std::vector<MaskTable::Bits> masks;
  for (const MaskedLogitRow& masked : packed.masked) {
    if (MaskTable::Bits bits = masks_->Find(masked.row, masked.gen, masked.position)) {
      index[masked.logit_row] = static_cast<int32_t>(masks.size());
      masks.push_back(std::move(bits));
      masks_->Drawn(masked.row, masked.gen, masked.position);
      continue;
    }
    index[masked.logit_row] = SAPWOOD_MASK_LATE;
    rows_[masked.row].held = true;
    if (masked.query < 0) continue;  // resumed too early: its hidden state is there
    queries.push_back(masked.query);
    rows.push_back(masked.row);
  }
  PackedMasks block;
  int64_t at = 0;
  const auto put = [&](const auto& elements) {
    const int64_t begin = at;
    const auto bytes = static_cast<int64_t>(elements.size() * sizeof(elements[0]));
    if (bytes > 0) std::memcpy(out.data() + begin, elements.data(), bytes);
    at += bytes;
    return begin;
  };
  put(queries);
  put(rows);
  block.mask_index = put(index);
  block.masks = at;
  for (const MaskTable::Bits& bits : masks) put(*bits);
  block.num_bytes = at;
  block.num_held = static_cast<int32_t>(rows.size());
  block.num_masks = static_cast<int32_t>(masks.size());
  return block;
}

void PlanPacker::DropMasks(const StepPlan& plan, const StepResult& result) {
  const auto end = [this](int32_t row, uint32_t gen) {
    if (row >= 0 && row < static_cast<int64_t>(rows_.size())) masks_->End(row, gen);
  };
  if (!result.error.empty()) {
    for (const PlanItem& item : plan.items) end(item.row, item.gen);
    for (const RowOp& op : plan.row_ops) end(op.row, op.gen);
    return;
  }
  for (const ResultItem& item : result.items) {
    if (item.flags & (kFinishedStop | kFinishedLength | kBadLogits)) end(item.row, item.gen);
  }
}

void PlanPacker::Fail(const StepPlan& plan) {
  const auto end = [this](int32_t r, uint32_t gen, bool is_init) {
    if (r < 0 || r >= static_cast<int64_t>(rows_.size())) return;
    // Of a generation that the device does not have it does nothing there.
    ended_.emplace_back(r, gen);
    Row& row = rows_[r];
    if (is_init) row.gen = gen;
    if (row.gen == gen) row.alive = false;
  };
  for (const RowOp& op : plan.row_ops) end(op.row, op.gen, op.kind == RowOpKind::kInit);
  for (const PlanItem& item : plan.items) end(item.row, item.gen, false);
  std::sort(ended_.begin(), ended_.end());
  ended_.erase(std::unique(ended_.begin(), ended_.end()), ended_.end());
}

namespace {

// What the device found, in RowTable's words.
std::string DeviceError(const StepPlan& plan, const SapwoodStepResultBlock& block) {
  const int32_t index = block.error_index, group = block.error_group;
  const int64_t value = block.error_value;
  const std::string step = StrCat("step ", plan.step_id, ", ");
  const bool names_item = (block.error >= SAPWOOD_STEP_KV_LEN && block.error <= SAPWOOD_STEP_PAGE_MISSING) ||
                          block.error == SAPWOOD_STEP_HELD;
  const bool of_item = names_item && index >= 0 && index < static_cast<int64_t>(plan.items.size());
  const PlanItem item = of_item ? plan.items[index] : PlanItem{};
  const std::string what = StrCat(step, "item ", index, " (", ItemKindName(item.kind), " of row ", item.row, "): ");
  switch (block.error) {
    case SAPWOOD_STEP_FORMAT:
      return StrCat(step, "the kernels read blobs of another format than ", value,
                    ": build libsapwood_cuda.so and _core from one checkout");
    case SAPWOOD_STEP_ROW_OP_GEN:
      return StrCat(step, "row op of row ", index, ", which is at generation ", value);
    case SAPWOOD_STEP_FORCED_POSITION:
      return StrCat(step, "forced tokens of row ", index, " at another position than its next, ", value);
    case SAPWOOD_STEP_TRUNCATE:
      return StrCat(step, "row ", index, " cannot be truncated to more than it has, ", value);
    case SAPWOOD_STEP_PAGES_FULL:
      return StrCat(step, "the page table of row ", index, " in group ", group, " has ", value,
                    " pages and no room for more");
    case SAPWOOD_STEP_KV_LEN:
      return StrCat(what, "expects kv_len ", item.kv_len, ", the row has ", value);
    case SAPWOOD_STEP_PAGES_SHORT:
      return StrCat(what, "its page table in group ", group, " has only ", value, " pages");
    case SAPWOOD_STEP_PAGE_MISSING:
      return StrCat(what, "no page for position ", value, " in group ", group);
    case SAPWOOD_STEP_HELD:
      return StrCat(what, value != 0 ? "the row is held" : "the row is not held");
    case SAPWOOD_STEP_PADDING:
      return StrCat(step, "launched with room for fewer tokens, segments or logit rows than it has");
    default:
      return StrCat(step, "unknown error ", block.error, " of the device");
  }
}

}  // namespace

StepResult FinishPacked(const StepPlan& plan, std::span<const uint8_t> bytes, int64_t sequence) {
  const size_t num_items = plan.items.size();
  const size_t needed = sizeof(SapwoodStepResultBlock) + num_items * sizeof(SapwoodStepResultItem);
  SAPWOOD_REQUIRE(bytes.size() >= needed, "result_block must have the ", needed, " bytes of ", num_items,
                  " items, got ", bytes.size());
  SapwoodStepResultBlock block;
  std::memcpy(&block, bytes.data(), sizeof(block));
  SAPWOOD_REQUIRE(block.step_id == plan.step_id && block.num_items == static_cast<int64_t>(num_items),
                  "result_block is of step ", block.step_id, " with ", block.num_items, " items, expected step ",
                  plan.step_id, " with ", num_items, ": copy it after that step's commit_step");
  SAPWOOD_REQUIRE(sequence == 0 || block.sequence == sequence, "result_block is of packing ", block.sequence,
                  ", expected ", sequence);
  StepResult result;
  result.step_id = plan.step_id;
  if (block.error != SAPWOOD_STEP_OK) {
    result.error = DeviceError(plan, block);
    return result;
  }
  result.num_tokens = block.num_tokens;
  result.num_kv = block.num_kv;
  result.num_logit_rows = block.num_logit_rows;
  result.items.reserve(num_items);
  for (size_t i = 0; i < num_items; ++i) {
    SapwoodStepResultItem from;
    std::memcpy(&from, bytes.data() + sizeof(block) + i * sizeof(from), sizeof(from));
    ResultItem item{plan.items[i].row, plan.items[i].gen, from.n, 0, static_cast<uint8_t>(from.flags)};
    if (from.n > 0) {
      item.token_begin = static_cast<int32_t>(result.tokens.size());
      result.tokens.push_back(from.token);
      result.logprobs.push_back(from.logprob);
    }
    result.items.push_back(item);
  }
  return result;
}

}  // namespace sapwood
