// What differs between nvcc and the emulator of tests/cuda/emulator, which compiles the same sources for the CPU: the
// launch, dynamic shared memory and PTX (ptx.cuh).
//
// Launches overlap (programmatic dependent launch, compute capability 9.0 and later): a kernel's blocks take their places
// as soon as all blocks of the kernel before have theirs, and wait there. It saves a microsecond between kernels of which
// a decode step has hundreds. So every kernel begins with AwaitPredecessor, in all threads, and touches nothing before it
// that a kernel writes. Environment SAPWOOD_CUDA_OVERLAP=0 turns it off.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>

// Dynamic shared memory, as bytes.
#define SAPWOOD_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace sapwood_cuda {

// Until here a kernel runs beside those that were launched before it; from here on they are done, and what they wrote is
// there. The kernel launched next may take its places.
__device__ __forceinline__ void AwaitPredecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether launches on the current device may overlap.
inline bool LaunchesOverlap() {
  static const bool wanted = [] {
    const char* const said = std::getenv("SAPWOOD_CUDA_OVERLAP");
    return said == nullptr || std::strcmp(said, "0") != 0;
  }();
  int device = 0, major = 0;
  return wanted && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

// Without the attribute a launch gets at most this much.
constexpr size_t kDefaultShared = 48 * 1024;

template <typename... Params, typename... Args>
void Launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args... args) {
  if (shared_bytes > kDefaultShared) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  // Code for older architectures, which the driver may run on a newer device, does not await.
  static const bool awaits = [&] {
    cudaFuncAttributes of;
    return cudaFuncGetAttributes(&of, kernel) == cudaSuccess && of.ptxVersion >= 90;
  }();
  config.numAttrs = awaits && LaunchesOverlap() ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace sapwood_cuda

#else
#include "emulator.h"
#endif
