// Checks a recorded Program once, before anything runs, so that the runner itself can trust it.
#pragma once

#include <cstdint>
#include <vector>

#include "cache/kv_group.h"
#include "program/program.h"
#include "program/weight_store.h"

namespace sapwood {

// What the program must fit.
struct ProgramLimits {
  const std::vector<KvGroup>* groups;
  int32_t num_kv_heads, head_dim;
};

// Node arity, value and slot ids, dtypes, shapes, parameters, the order of segments, and that every value is written
// once and before it is read. Throws InvalidArgument naming the node and what it expected.
void CheckProgram(const Program& program, const ProgramLimits& limits);

// Every slot a node names is filled and has the shape the node needs. A few microseconds: the runner calls it each
// step, for slots may have been refilled since. Throws InvalidArgument naming node and slot.
void CheckWeights(const Program& program, const WeightStore& weights);

}  // namespace sapwood
