// What differs between nvcc and the emulator of tests/cuda/emulator, which compiles the same sources for the CPU: the
// launch, dynamic shared memory and PTX (ptx.cuh).
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <cstddef>

// Dynamic shared memory, as bytes.
#define SAPWOOD_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace sapwood_cuda {

// Without the attribute a launch gets at most this much.
constexpr size_t kDefaultShared = 48 * 1024;

template <typename... Params, typename... Args>
void Launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args... args) {
  if (shared_bytes > kDefaultShared) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(args)...);
}

}  // namespace sapwood_cuda

#else
#include "emulator.h"
#endif
