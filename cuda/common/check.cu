#include "common/check.cuh"

#include <cstdarg>
#include <cstdio>

namespace sapwood_cuda {
namespace {

thread_local char last_error[512] = "";

}  // namespace

int Fail(int code, const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(last_error, sizeof(last_error), format, args);
  va_end(args);
  return code;
}

int LaunchStatus(const char* op) {
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return SAPWOOD_CUDA_OK;
  return Fail(static_cast<int>(status), "%s: CUDA error %d (%s): %s", op, static_cast<int>(status),
              cudaGetErrorName(status), cudaGetErrorString(status));
}

}  // namespace sapwood_cuda

int32_t sapwood_cuda_abi_version() { return SAPWOOD_CUDA_ABI_VERSION; }

const char* sapwood_cuda_last_error() { return sapwood_cuda::last_error; }
