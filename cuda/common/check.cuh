// Argument checks and the error text of the launchers. Host code only.
//
// Use in a launcher: SAPWOOD_CUDA_CHECK_STRUCT first, then one SAPWOOD_CUDA_REQUIRE per condition, launch, then
// `return sapwood_cuda::LaunchStatus("name")`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/abi.h"

namespace sapwood_cuda {

// Writes this thread's error text (printf style, cut at its fixed length) and returns `code`.
[[gnu::format(printf, 2, 3)]] int Fail(int code, const char* format, ...);

// The outcome of the launch just made: 0, or the CUDA error with its text. Does not synchronise.
int LaunchStatus(const char* op);

inline bool Aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace sapwood_cuda

#define SAPWOOD_CUDA_REQUIRE(cond, ...) \
  do {                                  \
    if (!(cond)) return ::sapwood_cuda::Fail(SAPWOOD_CUDA_BAD_ARGUMENT, __VA_ARGS__); \
  } while (0)

#define SAPWOOD_CUDA_CHECK_STRUCT(op, params)                                                                        \
  do {                                                                                                               \
    SAPWOOD_CUDA_REQUIRE((params) != nullptr, op ": params is null");                                                \
    SAPWOOD_CUDA_REQUIRE((params)->struct_size == sizeof(*(params)),                                                 \
                         op ": params.struct_size is %u, this library expects %zu: rebuild it with the version of "  \
                            "sapwood that calls it",                                                                 \
                         static_cast<unsigned>((params)->struct_size), sizeof(*(params)));                           \
  } while (0)
