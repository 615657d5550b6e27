// The grouped GEMM of decode: at most 16 pairs of one expert against 64 rows of its weight. The work is reading
// weights, so everything serves a steady stream of them: a block keeps kStages - 1 tiles of 8 KB on their way.
//
// A tile is 64 columns of K: 64 rows of weight and 16 of x, 128 bytes each, fetched by cp.async into a ring of kStages
// places. A 16-byte chunk c of row r lies at chunk c ^ (r % 8) of the row, so that the eight rows that an ldmatrix or a
// quarter of a warp's copies touch are in different banks.
//
// Pairs are the M side of m16n8k16, padded to 16 with rows of zeros, weight rows the N side; warp w multiplies weight
// rows 16 w .. + 15. K is not split: an output's accumulator stays in one register from the first k to the last, and
// rows of an mma do not touch each other, so its bits are the same whoever its neighbours are. Columns past K are zeros
// in both.
//
// The grid covers the capacity; blocks past num_padded leave at once.
#include <cstdint>

#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"
#include "moe/params.h"

namespace sapwood_cuda {
namespace {

constexpr int kPairs = 16;
constexpr int kTileN = 64;
constexpr int kTileK = 64;
constexpr int kSteps = kTileK / 16;
constexpr int kStages = 6;
constexpr int kThreads = 128;
constexpr int kBlocks = 3;  // per multiprocessor; knowing it, the compiler spends registers on overlapping ldmatrix
constexpr int kChunk = 8;  // elements of 16 bytes
constexpr int kRowChunks = kTileK / kChunk;
constexpr int kCopyRows = kThreads / kRowChunks;  // rows that the block fetches at once
constexpr int kXElements = kPairs * kTileK;
constexpr int kStageElements = kXElements + kTileN * kTileK;
constexpr size_t kSharedBytes = kStages * kStageElements * sizeof(__nv_bfloat16);
static_assert(kCopyRows == kPairs && kTileN == kThreads / kWarp * 16 && kRowChunks == 8);

__device__ __forceinline__ int Place(int row, int chunk) { return row * kTileK + (chunk ^ (row % 8)) * kChunk; }

__device__ __forceinline__ void Store(float* y, float value) { *y = value; }
__device__ __forceinline__ void Store(__nv_bfloat16* y, float value) { *y = __float2bfloat16_rn(value); }

template <typename Y>
__global__ void __launch_bounds__(kThreads, kBlocks) MoeGemmSmallKernel(const SapwoodMoeGemmSmallParams p) {
  AwaitPredecessor();
  SAPWOOD_DYNAMIC_SHARED(shared);
  __nv_bfloat16* const tiles = reinterpret_cast<__nv_bfloat16*>(shared);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int32_t* pairs = p.sorted_pairs + static_cast<int64_t>(blockIdx.y) * kPairs;
  const int n0 = blockIdx.x * kTileN;

  // Thread t copies chunk t % 8 of row t / 8 of x, and of rows t / 8 + 16 j of weight.
  const int row = thread / kRowChunks, chunk = thread % kRowChunks;
  const int expert = p.block_expert[blockIdx.y];
  const int copied_pair = pairs[row];
  if (static_cast<int>(blockIdx.y) * kPairs >= *p.num_padded) return;
  const bool has_pair = copied_pair < p.num_pairs;
  const __nv_bfloat16* x = static_cast<const __nv_bfloat16*>(p.x) + chunk * kChunk;
  if (has_pair) x += copied_pair / p.pairs_per_row * p.x_stride;
  const __nv_bfloat16* weight =
      static_cast<const __nv_bfloat16*>(p.weight) + expert * p.expert_stride + chunk * kChunk;
  const int place = Place(row, chunk);

  const auto fetch = [&](int tile) {
    __nv_bfloat16* const to = tiles + tile % kStages * kStageElements + place;
    const int k0 = tile * kTileK;
    const bool in_k = k0 + chunk * kChunk < p.k;
    CpAsync16(to, x + k0, in_k && has_pair);
#pragma unroll
    for (int j = 0; j < kTileN / kCopyRows; ++j) {
      const int n = n0 + row + kCopyRows * j;
      CpAsync16(to + kXElements + kCopyRows * j * kTileK, weight + n * p.weight_stride + k0, in_k && n < p.n);
    }
  };

  const int num_tiles = (p.k + kTileK - 1) / kTileK;
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < num_tiles) fetch(tile);
    CpAsyncCommit();
  }
  float sums[2][4] = {};  // weight rows 16 warp .. + 7, and + 8 .. + 15
  for (int tile = 0; tile < num_tiles; ++tile) {
    CpAsyncWait<kStages - 2>();
    __syncthreads();  // all of the tile is there, and the place of the tile before is free
    if (tile + kStages - 1 < num_tiles) fetch(tile + kStages - 1);
    CpAsyncCommit();
    const __nv_bfloat16* const x_tile = tiles + tile % kStages * kStageElements;
    const __nv_bfloat16* const w_tile = x_tile + kXElements;
    // All of the tile's fragments first: the latencies of ldmatrix overlap.
    uint32_t a[kSteps][4], b[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      LdMatrix4(a[step], x_tile + Place(lane % 16, 2 * step + lane / 16));
      LdMatrix4(b[step], w_tile + Place(16 * warp + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t low[2] = {b[step][0], b[step][1]}, high[2] = {b[step][2], b[step][3]};
      MmaBf16(sums[0], a[step], low);
      MmaBf16(sums[1], a[step], high);
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int pair = pairs[lane / 4 + 8 * half];
    if (pair >= p.num_pairs) continue;
    const float factor = p.pair_weight != nullptr ? p.pair_weight[pair] : 1.0f;
    Y* const y = static_cast<Y*>(p.y) + pair * p.y_stride;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = n0 + 16 * warp + i / 2 * 8 + lane % 4 * 2 + i % 2;
      if (n < p.n) Store(y + n, __fmul_rn(sums[i / 2][2 * half + i % 2], factor));
    }
  }
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_moe_gemm_small(const SapwoodMoeGemmSmallParams* params, void* stream) {
  using sapwood_cuda::Aligned;
  using sapwood_cuda::kChunk;
  using sapwood_cuda::kPairs;
  SAPWOOD_CUDA_CHECK_STRUCT("moe_gemm_small", params);
  const SapwoodMoeGemmSmallParams& p = *params;
  SAPWOOD_CUDA_REQUIRE(p.y_dtype == SAPWOOD_CUDA_F32 || p.y_dtype == SAPWOOD_CUDA_BF16,
                       "moe_gemm_small: y_dtype must be f32 (0) or bf16 (1), got %d", p.y_dtype);
  SAPWOOD_CUDA_REQUIRE(p.num_pairs >= 0, "moe_gemm_small: num_pairs must not be negative, got %d", p.num_pairs);
  SAPWOOD_CUDA_REQUIRE(p.pairs_per_row > 0, "moe_gemm_small: pairs_per_row must be positive, got %d", p.pairs_per_row);
  SAPWOOD_CUDA_REQUIRE(p.n > 0 && p.n <= INT32_MAX - sapwood_cuda::kTileN,
                       "moe_gemm_small: n must be in 1..%d, got %d", INT32_MAX - sapwood_cuda::kTileN, p.n);
  SAPWOOD_CUDA_REQUIRE(p.k > 0 && p.k % kChunk == 0 && p.k <= INT32_MAX / 2,
                       "moe_gemm_small: k must be a positive multiple of %d and at most %d, got %d", kChunk,
                       INT32_MAX / 2, p.k);
  SAPWOOD_CUDA_REQUIRE(p.x_stride >= p.k && p.x_stride % kChunk == 0,
                       "moe_gemm_small: x_stride must be a multiple of %d and at least k = %d, got %lld", kChunk, p.k,
                       static_cast<long long>(p.x_stride));
  SAPWOOD_CUDA_REQUIRE(p.weight_stride >= p.k && p.weight_stride % kChunk == 0,
                       "moe_gemm_small: weight_stride must be a multiple of %d and at least k = %d, got %lld", kChunk,
                       p.k, static_cast<long long>(p.weight_stride));
  SAPWOOD_CUDA_REQUIRE(p.expert_stride >= p.n * p.weight_stride && p.expert_stride % kChunk == 0,
                       "moe_gemm_small: expert_stride must be a multiple of %d and at least n * weight_stride = %lld, "
                       "got %lld",
                       kChunk, static_cast<long long>(p.n * p.weight_stride), static_cast<long long>(p.expert_stride));
  SAPWOOD_CUDA_REQUIRE(p.y_stride >= p.n, "moe_gemm_small: y_stride must be at least n = %d, got %lld", p.n,
                       static_cast<long long>(p.y_stride));
  SAPWOOD_CUDA_REQUIRE(p.capacity >= 0 && p.capacity % kPairs == 0 && p.capacity / kPairs <= 65535,
                       "moe_gemm_small: capacity must be a multiple of %d and at most %d, got %d", kPairs,
                       kPairs * 65535, p.capacity);
  SAPWOOD_CUDA_REQUIRE(p.reserved == 0, "moe_gemm_small: reserved must be 0, got %d", p.reserved);
  if (p.num_pairs == 0) return SAPWOOD_CUDA_OK;
  SAPWOOD_CUDA_REQUIRE(p.capacity >= p.num_pairs,
                       "moe_gemm_small: capacity must be at least num_pairs = %d, got %d", p.num_pairs, p.capacity);
  SAPWOOD_CUDA_REQUIRE(p.x && p.weight && p.sorted_pairs && p.block_expert && p.num_padded && p.y,
                       "moe_gemm_small: x, weight, sorted_pairs, block_expert, num_padded and y must not be null");
  SAPWOOD_CUDA_REQUIRE(Aligned(p.x, 16) && Aligned(p.weight, 16),
                       "moe_gemm_small: x and weight must be aligned to 16 bytes, got %p and %p", p.x, p.weight);
  const auto kernel = p.y_dtype == SAPWOOD_CUDA_F32 ? sapwood_cuda::MoeGemmSmallKernel<float>
                                                    : sapwood_cuda::MoeGemmSmallKernel<__nv_bfloat16>;
  const dim3 grid((static_cast<unsigned>(p.n) + sapwood_cuda::kTileN - 1) / sapwood_cuda::kTileN,
                  static_cast<unsigned>(p.capacity / kPairs));
  sapwood_cuda::Launch(kernel, grid, sapwood_cuda::kThreads, sapwood_cuda::kSharedBytes,
                       static_cast<cudaStream_t>(stream), p);
  return sapwood_cuda::LaunchStatus("moe_gemm_small");
}
