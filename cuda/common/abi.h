/* What every exported function of libsapwood_cuda.so has in common. Plain C.
 *
 * A launcher is `int sapwood_cuda_<op>(const <Op>Params* params, void* stream)`:
 *   - params is plain data; its first field is its size, so a caller compiled against another version is told
 *     so instead of being misread. Pointers are device pointers unless a comment says otherwise.
 *   - stream is a cudaStream_t and is always explicit (null is the legacy default stream).
 *   - it checks its arguments, launches, and returns; it never allocates, synchronises or keeps state, so it can be
 *     captured into a graph.
 *   - it returns 0, SAPWOOD_CUDA_BAD_ARGUMENT, or a cudaError_t (> 0); sapwood_cuda_last_error() has the text.
 * Thread safety: all functions may be called from any thread.
 */
#ifndef SAPWOOD_CUDA_COMMON_ABI_H_
#define SAPWOOD_CUDA_COMMON_ABI_H_

#include <stdint.h>

#ifdef __cplusplus
#define SAPWOOD_CUDA_API extern "C" __attribute__((visibility("default")))
#else
#define SAPWOOD_CUDA_API
#endif

/* Raised when a Params struct or the meaning of a field changes. */
#define SAPWOOD_CUDA_ABI_VERSION 2

enum { SAPWOOD_CUDA_OK = 0, SAPWOOD_CUDA_BAD_ARGUMENT = -1 };

/* Element types; the numbers of sapwood::DType in cpp/kernels/kernels.h. */
enum { SAPWOOD_CUDA_F32 = 0, SAPWOOD_CUDA_BF16 = 1 };

SAPWOOD_CUDA_API int32_t sapwood_cuda_abi_version(void);

/* The text of this thread's last failed call, "" if none has failed. Valid until the thread's next failing call. */
SAPWOOD_CUDA_API const char* sapwood_cuda_last_error(void);

#endif /* SAPWOOD_CUDA_COMMON_ABI_H_ */
