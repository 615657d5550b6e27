// The report of a finished step: see params.h.
#include <time.h>
#include <unistd.h>

#include <cstdint>

#include "common/check.cuh"
#include "common/launch.cuh"
#include "completion/params.h"

namespace {

void Report(void* data) {
  const auto* params = static_cast<const SapwoodNotifyParams*>(data);
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  const int event_fd = params->event_fd;  // the struct may be gone once done_ns is seen
  __atomic_store_n(params->done_ns, int64_t{now.tv_sec} * 1000000000 + now.tv_nsec, __ATOMIC_RELEASE);
  const uint64_t one = 1;
  // Fails where the eventfd has been closed (a shutdown that did not wait) or is full: there is nobody to tell, or
  // somebody who has not looked yet.
  [[maybe_unused]] const ssize_t written = write(event_fd, &one, sizeof one);
}

}  // namespace

extern "C" int sapwood_cuda_notify(const SapwoodNotifyParams* params, void* stream) {
  SAPWOOD_CUDA_CHECK_STRUCT("notify", params);
  SAPWOOD_CUDA_REQUIRE(params->event_fd >= 0, "notify: event_fd must be an open eventfd, got %d", params->event_fd);
  SAPWOOD_CUDA_REQUIRE(params->done_ns != nullptr, "notify: done_ns is null");
  SAPWOOD_CUDA_REQUIRE(sapwood_cuda::Aligned(params->done_ns, 8),
                       "notify: done_ns must be aligned to 8 bytes");
  const cudaError_t status =
      cudaLaunchHostFunc(static_cast<cudaStream_t>(stream), Report, const_cast<SapwoodNotifyParams*>(params));
  if (status != cudaSuccess) {
    cudaGetLastError();  // else the next launcher's LaunchStatus reports it as its own
    return sapwood_cuda::Fail(status, "notify: %s", cudaGetErrorString(status));
  }
  return 0;
}
