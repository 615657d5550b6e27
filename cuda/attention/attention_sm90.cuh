// The door between attention's launcher (attention.cu) and its tier for compute capability 9.0 (attention_sm90.cu), which
// is there where the build has the architecture 90a: SAPWOOD_CUDA_SM90 is defined then. Host code only.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/params.h"

namespace sapwood_cuda {

// Whether this tier computes what p, which is checked, asks for: tiles of 128 rows, pages that TMA can copy.
bool AttentionSm90Serves(const SapwoodAttentionParams& p);

// Launches; returns what a launcher returns.
int AttentionSm90(const SapwoodAttentionParams& p, cudaStream_t stream);

}  // namespace sapwood_cuda
