// What a launcher asks of the current device. Host code only.
#pragma once

#include <cuda_runtime_api.h>

namespace sapwood_cuda {

// The multiprocessors of the current device where it is of compute capability 9.0 and runs *_sm90.cu, else 0.
inline int Sm90Processors() {
  int device = 0, major = 0, minor = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    cudaGetLastError();  // no driver, no device: the launch will say so
    return 0;
  }
  return major == 9 && minor == 0 ? processors : 0;
}

}  // namespace sapwood_cuda
