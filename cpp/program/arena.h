// Where the values of a Program live while a step runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/huge_buffer.h"
#include "program/program.h"

namespace sapwood {

// One block of memory, planned once: values whose lives do not overlap share bytes. In debug mode none do, and what a
// step leaves unused of each value, up to the guard behind its last row, must still hold the poison after every node.
class Arena {
 public:
  // Room for max_tokens rows of T values and max_logit_rows rows of L values. The program must have been checked.
  Arena(const Program& program, int64_t max_tokens, int64_t max_logit_rows, bool debug);

  void* value(int32_t id) const { return static_cast<char*>(memory_.data()) + values_[id].offset; }
  size_t row_bytes(int32_t id) const { return values_[id].row_bytes; }
  size_t bytes() const { return memory_.size(); }

  // Debug mode only, otherwise they do nothing. Poison: every float of the values over `rows` is a NaN from here on.
  void Poison(RowSym rows);
  // num_rows: how many rows of each value are in use. Returns a description of the first overwritten guard, or "".
  std::string CheckGuards(int64_t num_tokens, int64_t num_logit_rows) const;

 private:
  struct Place {
    RowSym rows;
    size_t offset, row_bytes, max_rows;
  };
  bool debug_;
  std::vector<Place> values_;
  HugeBuffer memory_;
};

}  // namespace sapwood
