// The model as the core sees it: a list of nodes over values whose only symbolic sizes are T (query tokens of the
// step) and L (logit rows of a block). Recorded once by python/sapwood/program, run by CpuRunner every step.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace sapwood {

// Which nodes run when: forward over T, head over blocks of <= 64 logit rows, sample after each head block.
enum class SegmentKind : uint8_t { kForward, kHead, kSample };

// The matrix input of a node with a linear or gate_up weight is act, or q8 (Q8Blocks) when the weight is int8 or int4.
enum class OpKind : uint8_t {
  // op               inputs              output          weights                          ints / floats
  kEmbedding,       //                     x [T,H] f32     table                            | scale
  kRmsNorm,         // x [*,H] f32         y [*,H] act|q8  w                                plus_one | eps
  kQuantize,        // x [*,K] act         y [*,K] q8      -
  kQkv,             // y [T,H] act         q [T,Hq*D] act  w, bias?, q_norm?, k_norm?, cos, sin
                    //                                     ints: Hq, Hkv, D, rotary_dim, kv_group, layer_in_group,
                    //                                     num_rope_modes | eps
                    //                                     cos, sin: [modes * max_pos][rotary_dim / 2]
  kAttention,       // q                   o [T,Hq*D] act  -
                    //                                     ints: Hq, Hkv, D, kv_group, layer_in_group, window
                    //                                     | scale, softcap
  kLinear,          // y act               z act           w, bias?
  kLinearResidual,  // o act, x f32        x' f32          w, bias?                         all_reduce (tp size)
  kGateUp,          // y act               h [T,I] act|q8  w (gate_up panels)               I
  kGatherLogitRows, // x [T,H] f32         x' [L,H] f32
  kLmHead,          // y [L,H] act         logits [L,V] f32, block_max [L,ceil(V/64)] f32   w  | scale, softcap
  kSample,          // logits, block_max   -
};
const char* OpName(OpKind op);
OpKind ParseOp(const std::string& name);  // "embedding", "rms_norm", ...; throws InvalidArgument

enum class RowSym : uint8_t { kT, kL };

struct ValueDesc {
  DType dtype;
  RowSym rows;
  int64_t cols;
};

struct NodeDesc {
  OpKind op;
  SegmentKind segment;
  std::vector<int32_t> inputs;    // value ids
  std::vector<int32_t> outputs;   // value ids
  std::vector<int32_t> weights;   // weight slot ids in the op's fixed order; -1 where an optional one is absent
  std::vector<int64_t> ints;
  std::vector<double> floats;
  std::string name;               // "layers.3.qkv"
};

struct Program {
  DType act = DType::kF32;  // compute dtype: kF32 or kBF16
  int32_t vocab_size = 0;
  std::vector<ValueDesc> values;
  std::vector<NodeDesc> nodes;
  int32_t num_weight_slots = 0;
};

}  // namespace sapwood
