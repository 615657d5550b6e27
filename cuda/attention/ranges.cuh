// Which keys a row sees, and which chunks of them a tile has: the arithmetic that plan and kernels share.
#pragma once

#include "attention/params.h"
#include "common/launch.cuh"

namespace sapwood_cuda {

struct KeyRange {
  int begin, end;
};

// Of keys that end at `end`.
__host__ __device__ inline int FirstKey(int end, int window) { return window > 0 && end > window ? end - window : 0; }

// Of one query of a segment.
__host__ __device__ inline KeyRange KeysOfQuery(int query, int q_len, int kv_len, int window) {
  const int end = kv_len - q_len + query + 1;
  return {FirstKey(end, window), end};
}

// Of rows [first_row, last_row], both included: the union, which has no gap.
__host__ __device__ inline KeyRange KeysOfRows(int first_row, int last_row, int group, int q_len, int kv_len, int window) {
  return {KeysOfQuery(first_row / group, q_len, kv_len, window).begin,
          KeysOfQuery(last_row / group, q_len, kv_len, window).end};
}

__host__ __device__ inline int FirstChunk(KeyRange keys, int chunk_len) { return keys.begin / chunk_len; }
__host__ __device__ inline int NumChunks(KeyRange keys, int chunk_len) {
  return (keys.end - 1) / chunk_len - FirstChunk(keys, chunk_len) + 1;
}

}  // namespace sapwood_cuda
