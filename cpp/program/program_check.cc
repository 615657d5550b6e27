// Receives the Program as recorded in Python and the WeightStore; called by cpu_runner.cc.
#include "program/program_check.h"

#include <algorithm>

#include "base/check.h"

namespace sapwood {
namespace {

const char* DTypeWord(DType t) {
  switch (t) {
    case DType::kF32: return "f32";
    case DType::kBF16: return "bf16";
    case DType::kF16: return "f16";
    case DType::kI32: return "i32";
    case DType::kQ8: return "q8";
    case DType::kI8: return "i8";
  }
  return "unknown";
}

std::string Describe(const ValueDesc& v) {
  return StrCat("[", v.rows == RowSym::kT ? "T" : "L", ", ", v.cols, "] ", DTypeWord(v.dtype));
}

struct Arity {
  size_t inputs, outputs, weights, ints, floats;
};

Arity ArityOf(OpKind op) {
  switch (op) {
    case OpKind::kEmbedding: return {0, 1, 1, 0, 1};
    case OpKind::kRmsNorm: return {1, 1, 1, 1, 1};
    case OpKind::kQuantize: return {1, 1, 0, 0, 0};
    case OpKind::kQkv: return {1, 1, 6, 7, 1};
    case OpKind::kAttention: return {1, 1, 0, 6, 2};
    case OpKind::kLinear: return {1, 1, 2, 0, 0};
    case OpKind::kLinearResidual: return {2, 1, 2, 1, 0};
    case OpKind::kGateUp: return {1, 1, 1, 1, 0};
    case OpKind::kGatherLogitRows: return {1, 1, 0, 0, 0};
    case OpKind::kLmHead: return {1, 2, 1, 0, 2};
    case OpKind::kSample: return {2, 0, 0, 0, 0};
  }
  return {};
}

class NodeCheck {
 public:
  NodeCheck(const Program& program, const ProgramLimits& limits, const NodeDesc& node)
      : program_(program),
        limits_(limits),
        node_(node),
        where_(StrCat("node \"", node.name, "\" (", OpName(node.op), "): ")) {}

  void Run() {
    const Arity arity = ArityOf(node_.op);
    Count("inputs", node_.inputs.size(), arity.inputs);
    Count("outputs", node_.outputs.size(), arity.outputs);
    Count("weights", node_.weights.size(), arity.weights);
    Count("ints", node_.ints.size(), arity.ints);
    Count("floats", node_.floats.size(), arity.floats);
    for (const auto* ids : {&node_.inputs, &node_.outputs}) {
      for (int32_t id : *ids) {
        SAPWOOD_REQUIRE(id >= 0 && id < static_cast<int64_t>(program_.values.size()), where_, "value id ", id,
                        " is not one of the program's ", program_.values.size(), " values");
      }
    }
    for (int32_t id : node_.weights) {
      SAPWOOD_REQUIRE(id >= -1 && id < program_.num_weight_slots, where_, "weight slot ", id,
                      " is not one of the program's ", program_.num_weight_slots, " slots");
    }
    Op();
  }

 private:
  const ValueDesc& in(int i) const { return program_.values[node_.inputs[i]]; }
  const ValueDesc& out(int i) const { return program_.values[node_.outputs[i]]; }

  void Count(const char* what, size_t got, size_t want) const {
    SAPWOOD_REQUIRE(got == want, where_, "expected ", want, " ", what, ", got ", got);
  }
  void Segment(SegmentKind kind) const {
    static constexpr const char* kNames[] = {"forward", "head", "sample"};
    SAPWOOD_REQUIRE(node_.segment == kind, where_, "belongs to segment ", kNames[static_cast<int>(kind)], ", got ",
                    kNames[static_cast<int>(node_.segment)]);
  }
  void Rows() const {  // values of forward nodes are over T, of head nodes over L
    const RowSym want = node_.segment == SegmentKind::kForward ? RowSym::kT : RowSym::kL;
    for (const auto* ids : {&node_.inputs, &node_.outputs}) {
      for (int32_t id : *ids) {
        SAPWOOD_REQUIRE(program_.values[id].rows == want, where_, "expected values over ",
                        want == RowSym::kT ? "T" : "L", " in this segment, got ", Describe(program_.values[id]));
      }
    }
  }
  void Value(const char* what, const ValueDesc& value, DType dtype, int64_t cols) const {
    SAPWOOD_REQUIRE(value.dtype == dtype && value.cols == cols, where_, what, " must be ", DTypeWord(dtype), " with ",
                    cols, " columns, got ", Describe(value));
  }
  void ActValue(const char* what, const ValueDesc& value) const { Value(what, value, program_.act, value.cols); }
  // Made for a linear layer, whose weight decides which of the two it takes (CheckWeights).
  void ActOrQ8(const char* what, const ValueDesc& value, int64_t cols) const {
    Value(what, value, value.dtype == DType::kQ8 ? DType::kQ8 : program_.act, cols);
  }
  void Heads(int64_t hq, int64_t hkv, int64_t d, int64_t group, int64_t layer) const {
    SAPWOOD_REQUIRE(hkv == limits_.num_kv_heads && d == limits_.head_dim, where_, "has ", hkv, " KV heads of ", d,
                    ", but the KV pool is made for ", limits_.num_kv_heads, " of ", limits_.head_dim);
    SAPWOOD_REQUIRE(hq > 0 && hq % hkv == 0, where_, "query heads must be a multiple of the ", hkv, " KV heads, got ",
                    hq);
    const std::vector<KvGroup>& groups = *limits_.groups;
    SAPWOOD_REQUIRE(group >= 0 && group < static_cast<int64_t>(groups.size()), where_, "KV group ", group,
                    " does not exist; there are ", groups.size());
    SAPWOOD_REQUIRE(layer >= 0 && layer < groups[group].num_layers, where_, "layer ", layer, " of KV group ", group,
                    " does not exist; it has ", groups[group].num_layers);
  }
  void NeedWeight(int i) const { SAPWOOD_REQUIRE(node_.weights[i] >= 0, where_, "weight ", i, " is required"); }

  void Op() const {
    const DType act = program_.act;
    switch (node_.op) {
      case OpKind::kEmbedding:
        Segment(SegmentKind::kForward);
        Rows();
        NeedWeight(0);
        Value("output", out(0), DType::kF32, out(0).cols);
        break;
      case OpKind::kRmsNorm:
        Rows();
        NeedWeight(0);
        Value("input", in(0), DType::kF32, in(0).cols);
        ActOrQ8("output", out(0), in(0).cols);
        break;
      case OpKind::kQuantize:
        Rows();
        ActValue("input", in(0));
        Value("output", out(0), DType::kQ8, in(0).cols);
        break;
      case OpKind::kQkv: {
        Segment(SegmentKind::kForward);
        Rows();
        const auto& p = node_.ints;
        Heads(p[0], p[1], p[2], p[4], p[5]);
        SAPWOOD_REQUIRE(p[3] > 0 && p[3] % 2 == 0 && p[3] <= p[2], where_, "rotary_dim must be even and in 2..", p[2],
                        ", got ", p[3]);
        SAPWOOD_REQUIRE(p[6] > 0, where_, "num_rope_modes must be positive, got ", p[6]);
        for (int i : {0, 4, 5}) NeedWeight(i);
        ActOrQ8("input", in(0), in(0).cols);
        Value("output", out(0), act, p[0] * p[2]);
        break;
      }
      case OpKind::kAttention: {
        Segment(SegmentKind::kForward);
        Rows();
        const auto& p = node_.ints;
        Heads(p[0], p[1], p[2], p[3], p[4]);
        const KvGroup& group = (*limits_.groups)[p[3]];
        SAPWOOD_REQUIRE(p[5] >= 0, where_, "window must be >= 0, got ", p[5]);
        SAPWOOD_REQUIRE(group.kind != KvKind::kWindow || (p[5] > 0 && p[5] <= group.window), where_, "window ", p[5],
                        " reaches further back than KV group ", p[3], " keeps (", group.window, " tokens)");
        Value("input", in(0), act, p[0] * p[2]);
        Value("output", out(0), act, p[0] * p[2]);
        break;
      }
      case OpKind::kLinear:
        Rows();
        NeedWeight(0);
        ActOrQ8("input", in(0), in(0).cols);
        ActValue("output", out(0));
        break;
      case OpKind::kLinearResidual:
        Rows();
        NeedWeight(0);
        ActOrQ8("input", in(0), in(0).cols);
        Value("residual", in(1), DType::kF32, out(0).cols);
        Value("output", out(0), DType::kF32, out(0).cols);
        SAPWOOD_REQUIRE(node_.ints[0] == 1, where_, "all_reduce over ", node_.ints[0], " ranks; one process has 1");
        break;
      case OpKind::kGateUp:
        Rows();
        NeedWeight(0);
        ActOrQ8("input", in(0), in(0).cols);
        ActOrQ8("output", out(0), node_.ints[0]);
        break;
      case OpKind::kGatherLogitRows:
        Segment(SegmentKind::kHead);
        Value("input", in(0), DType::kF32, in(0).cols);
        Value("output", out(0), DType::kF32, in(0).cols);
        SAPWOOD_REQUIRE(in(0).rows == RowSym::kT && out(0).rows == RowSym::kL, where_,
                        "gathers T rows into L rows, got ", Describe(in(0)), " and ", Describe(out(0)));
        break;
      case OpKind::kLmHead:
        Segment(SegmentKind::kHead);
        Rows();
        NeedWeight(0);
        ActOrQ8("input", in(0), in(0).cols);
        Value("logits", out(0), DType::kF32, program_.vocab_size);
        Value("block_max", out(1), DType::kF32, (program_.vocab_size + kPanel - 1) / kPanel);
        break;
      case OpKind::kSample:
        Segment(SegmentKind::kSample);
        Rows();
        Value("logits", in(0), DType::kF32, program_.vocab_size);
        Value("block_max", in(1), DType::kF32, (program_.vocab_size + kPanel - 1) / kPanel);
        break;
    }
  }

  const Program& program_;
  const ProgramLimits& limits_;
  const NodeDesc& node_;
  const std::string where_;
};

// One node's slot against what the node needs; -1 = any.
class SlotCheck {
 public:
  SlotCheck(const WeightStore& weights, const NodeDesc& node) : weights_(weights), node_(node) {}

  // A matrix and the input it multiplies.
  void Matrix(SlotKind kind, int64_t rows, const ValueDesc& input) const {
    Weight(0, "w", kind, rows, input.cols);
    const WeightFormat format = weights_.slot(node_.weights[0]).format;
    SAPWOOD_REQUIRE((format == WeightFormat::kAct) == (input.dtype != DType::kQ8), "node \"", node_.name, "\" (",
                    OpName(node_.op), "): weight slot ", node_.weights[0], " has format ", WeightFormatName(format),
                    ", but the node's input is ", Describe(input), "; int8 and int4 weights take q8");
  }

  void Weight(int i, const char* what, SlotKind kind, int64_t rows, int64_t cols) const {
    const int32_t id = node_.weights[i];
    if (id < 0) return;
    const WeightSlot& slot = weights_.slot(id);
    if (slot.filled && slot.kind == kind && (rows < 0 || slot.rows == rows) && (cols < 0 || slot.cols == cols)) return;
    const auto word = [](int64_t n) { return n < 0 ? std::string("any") : std::to_string(n); };
    const std::string where =
        StrCat("node \"", node_.name, "\" (", OpName(node_.op), "): weight slot ", id, " (", what, ") ");
    SAPWOOD_REQUIRE(slot.filled, where, "is not filled");
    SAPWOOD_REQUIRE(slot.kind == kind, where, "is of slot kind ", static_cast<int>(slot.kind), ", expected kind ",
                    static_cast<int>(kind));
    throw InvalidArgument(
        StrCat(where, "must be [", word(rows), ", ", word(cols), "], got [", slot.rows, ", ", slot.cols, "]"));
  }

 private:
  const WeightStore& weights_;
  const NodeDesc& node_;
};

}  // namespace

void CheckProgram(const Program& program, const ProgramLimits& limits) {
  SAPWOOD_REQUIRE(program.act == DType::kF32 || program.act == DType::kBF16, "program.act must be f32 or bf16, got ",
                  DTypeWord(program.act));
  SAPWOOD_REQUIRE(program.vocab_size > 0, "program.vocab_size must be positive, got ", program.vocab_size);
  for (size_t i = 0; i < program.values.size(); ++i) {
    const ValueDesc& v = program.values[i];
    SAPWOOD_REQUIRE(v.cols > 0 && (v.dtype == DType::kF32 || v.dtype == DType::kBF16 || v.dtype == DType::kQ8), "value ",
                    i, " must be f32, bf16 or q8 with at least one column, got ", Describe(v));
  }
  std::vector<const NodeDesc*> writer(program.values.size());
  SegmentKind segment = SegmentKind::kForward;
  int num_samples = 0;
  for (const NodeDesc& node : program.nodes) {
    NodeCheck(program, limits, node).Run();
    SAPWOOD_REQUIRE(node.segment >= segment, "node \"", node.name,
                    "\": nodes must stand in the order forward, head, sample");
    segment = node.segment;
    num_samples += node.op == OpKind::kSample;
    for (int32_t id : node.inputs) {
      SAPWOOD_REQUIRE(writer[id] != nullptr, "node \"", node.name, "\" reads value ", id, " before any node writes it");
    }
    for (int32_t id : node.outputs) {
      SAPWOOD_REQUIRE(writer[id] == nullptr, "node \"", node.name, "\" writes value ", id, ", which node \"",
                      writer[id]->name, "\" wrote already");
      writer[id] = &node;
    }
  }
  SAPWOOD_REQUIRE(num_samples == 1, "a program needs exactly one sample node, got ", num_samples);
}

void CheckWeights(const Program& program, const WeightStore& weights) {
  for (const NodeDesc& node : program.nodes) {
    const SlotCheck check(weights, node);
    const auto cols = [&](int32_t id) { return program.values[id].cols; };
    switch (node.op) {
      case OpKind::kEmbedding:
        check.Weight(0, "table", SlotKind::kTable, -1, cols(node.outputs[0]));
        break;
      case OpKind::kRmsNorm:
        check.Weight(0, "w", SlotKind::kVector, cols(node.inputs[0]), 1);
        break;
      case OpKind::kQkv: {
        const auto& p = node.ints;
        const int64_t n = (p[0] + 2 * p[1]) * p[2];
        check.Matrix(SlotKind::kLinear, n, program.values[node.inputs[0]]);
        check.Weight(1, "bias", SlotKind::kVector, n, 1);
        check.Weight(2, "q_norm", SlotKind::kVector, p[2], 1);
        check.Weight(3, "k_norm", SlotKind::kVector, p[2], 1);
        check.Weight(4, "cos", SlotKind::kF32, -1, p[3] / 2);
        const int64_t rows = weights.slot(node.weights[4]).rows;
        SAPWOOD_REQUIRE(rows % p[6] == 0, "node \"", node.name, "\" (qkv): ", rows, " rows of cos are not ", p[6],
                        " rope modes of equal length");
        check.Weight(5, "sin", SlotKind::kF32, rows, p[3] / 2);
        break;
      }
      case OpKind::kLinear:
      case OpKind::kLinearResidual:
        check.Matrix(SlotKind::kLinear, cols(node.outputs[0]), program.values[node.inputs[0]]);
        check.Weight(1, "bias", SlotKind::kVector, cols(node.outputs[0]), 1);
        break;
      case OpKind::kGateUp:
        check.Matrix(SlotKind::kGateUp, node.ints[0], program.values[node.inputs[0]]);
        break;
      case OpKind::kLmHead:
        check.Matrix(SlotKind::kLinear, program.vocab_size, program.values[node.inputs[0]]);
        break;
      case OpKind::kQuantize:
      case OpKind::kAttention:
      case OpKind::kGatherLogitRows:
      case OpKind::kSample:
        break;
    }
  }
}

}  // namespace sapwood
