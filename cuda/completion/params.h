/* How the host hears that a step is done (cuda/common/abi.h has the calling convention). */
#ifndef SAPWOOD_CUDA_COMPLETION_PARAMS_H_
#define SAPWOOD_CUDA_COMPLETION_PARAMS_H_

#include "common/abi.h"

/* Once everything queued on the stream before has run: *done_ns becomes the time (CLOCK_MONOTONIC), then event_fd is
 * written to. By a thread of the driver's (cudaLaunchHostFunc), which takes no lock of Python's. Not for graphs. The
 * struct itself must stay where it is until then; after an error of the device it is never looked at. */
typedef struct {
  uint32_t struct_size;
  int32_t event_fd;       /* an eventfd */
  int64_t* done_ns; /* host memory, 8-byte aligned */
} SapwoodNotifyParams;

SAPWOOD_CUDA_API int sapwood_cuda_notify(const SapwoodNotifyParams* params, void* stream);

#endif /* SAPWOOD_CUDA_COMPLETION_PARAMS_H_ */
