// The table of one level: the last include of kernels_<level>.cc.
#pragma once

#include "kernels/attention.h"
#include "kernels/gemm.h"
#include "kernels/norm.h"
#include "kernels/rope.h"

namespace sapwood::SAPWOOD_LEVEL {

inline constexpr KernelTable TableOf(Isa isa) {
  return {isa, Gemm, RmsNorm, RopeKv, Attention, AttentionMerge, Embed, Quantize, QuantizePanel};
}

}  // namespace sapwood::SAPWOOD_LEVEL
