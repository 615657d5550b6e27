// Rows of x into the order that moe_align found, so that the grouped GEMM reads an expert's rows as one matrix, and
// where each pair went. A warp moves one row, 16 bytes a lane, kAhead of them in flight.
//
// The grid covers the capacity; warps past num_padded leave at once.
#include <cstdint>

#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "moe/params.h"

namespace sapwood_cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kChunk = 8;  // elements of 16 bytes
constexpr int kAhead = 4;

__global__ void __launch_bounds__(kThreads) MoeGatherKernel(const SapwoodMoeGatherParams p) {
  AwaitPredecessor();
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= *p.num_padded) return;
  const int pair = p.sorted_pairs[row];
  const bool is_pair = pair < p.num_pairs;
  const int chunks = p.width / kChunk;
  const int64_t source = is_pair ? pair / p.pairs_per_row : 0;
  const uint4* const x = reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.x) + source * p.x_stride);
  uint4* const y = reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.y) + row * p.y_stride);
  for (int first = lane; first < chunks; first += kAhead * kWarp) {
    uint4 v[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int chunk = first + kWarp * j;
      v[j] = is_pair && chunk < chunks ? x[chunk] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int chunk = first + kWarp * j;
      if (chunk < chunks) y[chunk] = v[j];
    }
  }
  if (lane == 0 && is_pair && p.places != nullptr) p.places[pair] = static_cast<int32_t>(row);
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_moe_gather(const SapwoodMoeGatherParams* params, void* stream) {
  using sapwood_cuda::Aligned;
  using sapwood_cuda::kChunk;
  SAPWOOD_CUDA_CHECK_STRUCT("moe_gather", params);
  const SapwoodMoeGatherParams& p = *params;
  SAPWOOD_CUDA_REQUIRE(p.num_pairs >= 0, "moe_gather: num_pairs must not be negative, got %d", p.num_pairs);
  SAPWOOD_CUDA_REQUIRE(p.pairs_per_row > 0, "moe_gather: pairs_per_row must be positive, got %d", p.pairs_per_row);
  SAPWOOD_CUDA_REQUIRE(p.width > 0 && p.width % kChunk == 0,
                       "moe_gather: width must be a positive multiple of %d, got %d", kChunk, p.width);
  SAPWOOD_CUDA_REQUIRE(p.x_stride >= p.width && p.x_stride % kChunk == 0,
                       "moe_gather: x_stride must be a multiple of %d and at least width = %d, got %lld", kChunk,
                       p.width, static_cast<long long>(p.x_stride));
  SAPWOOD_CUDA_REQUIRE(p.y_stride >= p.width && p.y_stride % kChunk == 0,
                       "moe_gather: y_stride must be a multiple of %d and at least width = %d, got %lld", kChunk,
                       p.width, static_cast<long long>(p.y_stride));
  SAPWOOD_CUDA_REQUIRE(p.capacity >= p.num_pairs, "moe_gather: capacity must be at least num_pairs = %d, got %d",
                       p.num_pairs, p.capacity);
  SAPWOOD_CUDA_REQUIRE(p.reserved == 0, "moe_gather: reserved must be 0, got %d", p.reserved);
  if (p.num_pairs == 0) return SAPWOOD_CUDA_OK;
  SAPWOOD_CUDA_REQUIRE(p.x && p.sorted_pairs && p.num_padded && p.y,
                       "moe_gather: x, sorted_pairs, num_padded and y must not be null");
  SAPWOOD_CUDA_REQUIRE(Aligned(p.x, 16) && Aligned(p.y, 16),
                       "moe_gather: x and y must be aligned to 16 bytes, got %p and %p", p.x, p.y);
  const unsigned blocks = (static_cast<unsigned>(p.capacity) + sapwood_cuda::kWarps - 1) / sapwood_cuda::kWarps;
  sapwood_cuda::Launch(sapwood_cuda::MoeGatherKernel, blocks, sapwood_cuda::kThreads, 0,
                       static_cast<cudaStream_t>(stream), p);
  return sapwood_cuda::LaunchStatus("moe_gather");
}
