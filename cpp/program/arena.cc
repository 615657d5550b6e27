// Used by cpu_runner.cc alone. Greedy first fit in order of birth: the programs are long chains of few live values, on
// which it is optimal or close to it.
#include "program/arena.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace sapwood {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t kGuard = 256;
constexpr unsigned char kPoison = 0xff;  // a NaN as f32 and as bf16

size_t RoundUp(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

Arena::Arena(const Program& program, int64_t max_tokens, int64_t max_logit_rows, bool debug) : debug_(debug) {
  const auto num_values = static_cast<int32_t>(program.values.size());
  const auto num_nodes = static_cast<int32_t>(program.nodes.size());
  std::vector<int32_t> birth(num_values, 0), death(num_values, 0);
  for (int32_t n = 0; n < num_nodes; ++n) {
    const NodeDesc& node = program.nodes[n];
    for (int32_t id : node.outputs) birth[id] = death[id] = n;
    for (int32_t id : node.inputs) {
      // Head and sample nodes run once per block of logit rows: what an earlier segment made must outlive them all.
      const bool from_before = program.values[id].rows == RowSym::kT && node.segment != SegmentKind::kForward;
      death[id] = std::max(death[id], from_before ? num_nodes : n);
    }
  }

  std::vector<int32_t> order(num_values);
  for (int32_t id = 0; id < num_values; ++id) order[id] = id;
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return birth[a] < birth[b]; });

  struct Used {
    size_t begin, end;
    int32_t death;
  };
  std::vector<Used> live;  // by begin
  values_.resize(num_values);
  size_t total = 0;
  for (int32_t id : order) {
    const ValueDesc& desc = program.values[id];
    Place& place = values_[id];
    place.rows = desc.rows;
    place.row_bytes = RowBytes(desc.dtype, desc.cols);
    place.max_rows = static_cast<size_t>(desc.rows == RowSym::kT ? max_tokens : max_logit_rows);
    const size_t bytes = RoundUp(place.row_bytes * place.max_rows, kAlign);
    if (debug_) {
      place.offset = total + kGuard;
      total = place.offset + bytes + kGuard;
      continue;
    }
    // A value may not take the place of an input of the node that writes it: rows are read and written out of step.
    std::erase_if(live, [&](const Used& u) { return u.death < birth[id]; });
    size_t begin = 0;
    auto at = live.begin();
    for (; at != live.end() && at->begin < begin + bytes; ++at) begin = std::max(begin, at->end);
    live.insert(at, {begin, begin + bytes, death[id]});
    place.offset = begin;
    total = std::max(total, begin + bytes);
  }
  memory_ = HugeBuffer(total);
  if (debug_) std::memset(memory_.data(), kPoison, memory_.size());
}

void Arena::Poison(RowSym rows) {
  if (!debug_) return;
  for (const Place& place : values_) {
    if (place.rows != rows) continue;
    const size_t bytes = RoundUp(place.row_bytes * place.max_rows, kAlign);
    std::memset(static_cast<char*>(memory_.data()) + place.offset - kGuard, kPoison, bytes + 2 * kGuard);
  }
}

std::string Arena::CheckGuards(int64_t num_tokens, int64_t num_logit_rows) const {
  if (!debug_) return "";
  const auto* base = static_cast<const unsigned char*>(memory_.data());
  const auto intact = [](const unsigned char* p) {
    return std::all_of(p, p + kGuard, [](unsigned char c) { return c == kPoison; });
  };
  for (size_t id = 0; id < values_.size(); ++id) {
    const Place& place = values_[id];
    const auto used = static_cast<size_t>(place.rows == RowSym::kT ? num_tokens : num_logit_rows);
    if (!intact(base + place.offset - kGuard)) return StrCat("the bytes before value ", id);
    if (!intact(base + place.offset + used * place.row_bytes)) {
      return StrCat("the bytes behind the ", used, " used rows of value ", id);
    }
  }
  return "";
}

}  // namespace sapwood
