// Op names, as python/sapwood/program spells them.
#include "program/program.h"

#include <iterator>

#include "base/check.h"

namespace sapwood {
namespace {

struct Named {
  OpKind op;
  const char* name;
};

constexpr Named kOps[] = {
    {OpKind::kEmbedding, "embedding"},
    {OpKind::kRmsNorm, "rms_norm"},
    {OpKind::kQuantize, "quantize"},
    {OpKind::kQkv, "qkv"},
    {OpKind::kAttention, "attention"},
    {OpKind::kLinear, "linear"},
    {OpKind::kLinearResidual, "linear_residual"},
    {OpKind::kGateUp, "gate_up"},
    {OpKind::kGatherLogitRows, "gather_logit_rows"},
    {OpKind::kLmHead, "lm_head"},
    {OpKind::kSample, "sample"},
};

}  // namespace

const char* OpName(OpKind op) {
  for (const Named& named : kOps) {
    if (named.op == op) return named.name;
  }
  return "unknown";
}

OpKind ParseOp(const std::string& name) {
  std::string known;
  for (const Named& named : kOps) {
    if (name == named.name) return named.op;
    if (!known.empty()) known += ", ";
    known += named.name;
  }
  throw InvalidArgument(StrCat("unknown op \"", name, "\"; known: ", known));
}

}  // namespace sapwood
