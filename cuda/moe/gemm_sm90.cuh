// The door between moe_gemm's launcher (gemm.cu) and its tier for compute capability 9.0 (gemm_sm90.cu), which is there
// where the build has CUTLASS and the architecture 90a: SAPWOOD_CUDA_CUTLASS is defined then. Host code only.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "moe/params.h"

namespace sapwood_cuda {

// On a device with this many multiprocessors.
int64_t MoeGemmSm90WorkspaceBytes(int num_experts, int num_processors);

// Launches; p is checked but for its workspace_bytes. Returns what a launcher returns.
int MoeGemmSm90(const SapwoodMoeGemmParams& p, int num_processors, cudaStream_t stream);

}  // namespace sapwood_cuda
