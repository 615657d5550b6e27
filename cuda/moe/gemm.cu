// The grouped GEMM of prefill, and the choice of its tier. Here is the portable one: tiles of 128 rows of an expert by
// 128 rows of its weight, by cp.async, ldmatrix and mma.sync. On compute capability 9.0 gemm_sm90.cu takes over where
// it was built.
//
// A tile is two blocks of moe_align, or one where a segment ends: the thread blocks of odd blocks of a segment leave at
// once, as do those past the last segment, so the grid follows from the capacity and every routing runs in it. Four
// warps multiply 64 x 64 each: per 16 k eight ldmatrix for 32 mma. Smaller shares would be bound by shared memory.
//
// K goes by in steps of 32, 64 bytes of a row, in a ring of kStages places of 16 KB; three of them are on their way
// while one is multiplied. Two rows share a line of 128 bytes; 16-byte chunk c of row r lies at chunk
// (4 (r % 2) + c) ^ (line % 8) of line r / 2, so that the eight rows of an ldmatrix, and the two rows that a quarter
// of a warp copies, are in different banks.
//
// Order of sums: each output's accumulator stays in one register from the first k to the last, 16 at a time: the chain
// of moe_gemm_small, the same bits. The tile leaves through shared memory, where its rows come together for stores of
// 16 bytes.
#include <cstdint>

#include "common/check.cuh"
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"
#include "moe/gemm_sm90.cuh"
#include "moe/params.h"

namespace sapwood_cuda {
namespace {

constexpr int kBlockRows = SAPWOOD_CUDA_MOE_GEMM_BLOCK;
constexpr int kTile = 128;  // rows, and columns
constexpr int kTileK = 32;
constexpr int kSteps = kTileK / 16;
constexpr int kStages = 4;
constexpr int kThreads = 128;
constexpr int kBlocks = 2;  // per multiprocessor
constexpr int kShare = 64;  // of a warp, either way
constexpr int kChunk = 8;   // elements of 16 bytes
constexpr int kRowChunks = kTileK / kChunk;
constexpr int kCopyRows = kThreads / kRowChunks;  // that the block fetches at once
constexpr int kHalfStage = kTile * kTileK;        // elements: of x, and of the weight
constexpr int kMaxExperts = 1024;
constexpr int kMaxBlocks = 65535;
constexpr size_t kSharedBytes = 2 * kStages * kHalfStage * sizeof(__nv_bfloat16);
static_assert(kTile == 2 * kBlockRows && kTile == 2 * kShare && kThreads == 4 * kWarp && kRowChunks == 4);
static_assert(kTile * kTile <= 2 * kStages * kHalfStage);  // the tile's outputs fit in the ring

// Where chunk `chunk` of row `row` of a half stage lies.
__device__ __forceinline__ int Place(int row, int chunk) {
  const int line = row / 2;
  return line * 2 * kTileK + ((row % 2 * kRowChunks + chunk) ^ (line % 8)) * kChunk;
}
// The same in the tile of outputs, rows of 16 chunks.
__device__ __forceinline__ int OutPlace(int row, int chunk) { return row * kTile + (chunk ^ (row % 8)) * kChunk; }

__global__ void __launch_bounds__(kThreads, kBlocks) MoeGemmKernel(const SapwoodMoeGemmParams p) {
  AwaitPredecessor();
  SAPWOOD_DYNAMIC_SHARED(shared);
  __nv_bfloat16* const ring = reinterpret_cast<__nv_bfloat16*>(shared);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int expert = p.block_expert[blockIdx.y];
  if (expert < 0) return;
  const int row0 = static_cast<int>(blockIdx.y) * kBlockRows;
  if ((row0 - p.expert_offsets[expert]) % kTile != 0) return;
  const int num_rows = min(kTile, p.expert_offsets[expert + 1] - row0);
  const int n0 = static_cast<int>(blockIdx.x) * kTile;
  const int num_columns = min(kTile, p.n - n0);

  // Thread t copies chunk t % 4 of rows t / 4 + 32 j, of x and of the weight.
  const int copy_row = thread / kRowChunks, chunk = thread % kRowChunks;
  const __nv_bfloat16* const x =
      static_cast<const __nv_bfloat16*>(p.x) + (row0 + copy_row) * p.x_stride + chunk * kChunk;
  const __nv_bfloat16* const weight = static_cast<const __nv_bfloat16*>(p.weight) + expert * p.expert_stride +
                                      (n0 + copy_row) * p.weight_stride + chunk * kChunk;
  const auto fetch = [&](int step) {
    __nv_bfloat16* const to = ring + step % kStages * (2 * kHalfStage);
    const int k0 = step * kTileK;
    const bool in_k = k0 + chunk * kChunk < p.k;
#pragma unroll
    for (int j = 0; j < kTile / kCopyRows; ++j) {
      const int row = copy_row + kCopyRows * j;
      CpAsync16(to + Place(row, chunk), x + kCopyRows * j * p.x_stride + k0, in_k && row < num_rows);
      CpAsync16(to + kHalfStage + Place(row, chunk), weight + kCopyRows * j * p.weight_stride + k0,
                in_k && row < num_columns);
    }
  };

  const int row_of_warp = warp / 2 * kShare, column_of_warp = warp % 2 * kShare;
  const bool has_work = row_of_warp < num_rows && column_of_warp < num_columns;
  const int num_steps = (p.k + kTileK - 1) / kTileK;
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < num_steps) fetch(step);
    CpAsyncCommit();
  }
  float sums[4][8][4] = {};  // 16 rows, 8 columns each
  for (int step = 0; step < num_steps; ++step) {
    CpAsyncWait<kStages - 2>();
    __syncthreads();  // all of the step is there, and the place of the step before is free
    if (step + kStages - 1 < num_steps) fetch(step + kStages - 1);
    CpAsyncCommit();
    if (!has_work) continue;
    const __nv_bfloat16* const x_tile = ring + step % kStages * (2 * kHalfStage);
    const __nv_bfloat16* const w_tile = x_tile + kHalfStage;
#pragma unroll
    for (int k16 = 0; k16 < kSteps; ++k16) {
      uint32_t a[4][4], b[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        LdMatrix4(a[i], x_tile + Place(row_of_warp + 16 * i + lane % 16, 2 * k16 + lane / 16));
        LdMatrix4(b[i], w_tile + Place(column_of_warp + 16 * i + lane / 16 * 8 + lane % 8, 2 * k16 + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t columns[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          MmaBf16(sums[i][j], a[i], columns);
        }
      }
    }
  }

  CpAsyncWait<0>();
  __syncthreads();  // nobody reads the ring any more
  if (has_work) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row_of_warp + 16 * i + 8 * half + lane / 4;
          __nv_bfloat16* const to = ring + OutPlace(row, column_of_warp / kChunk + j) + lane % 4 * 2;
          *reinterpret_cast<__nv_bfloat162*>(to) =
              __floats2bfloat162_rn(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
      }
    }
  }
  __syncthreads();
  constexpr int kOutChunks = kTile / kChunk;
  const int column = thread % kOutChunks;
  if (column * kChunk >= num_columns) return;
  __nv_bfloat16* const y = static_cast<__nv_bfloat16*>(p.y) + row0 * p.y_stride + n0 + column * kChunk;
  for (int row = thread / kOutChunks; row < num_rows; row += kThreads / kOutChunks) {
    *reinterpret_cast<uint4*>(y + row * p.y_stride) = *reinterpret_cast<const uint4*>(ring + OutPlace(row, column));
  }
}

}  // namespace
}  // namespace sapwood_cuda

int64_t sapwood_cuda_moe_gemm_workspace_bytes([[maybe_unused]] int32_t num_experts) {
#ifdef SAPWOOD_CUDA_CUTLASS
  if (const int processors = sapwood_cuda::Sm90Processors(); processors > 0 && num_experts > 0) {
    return sapwood_cuda::MoeGemmSm90WorkspaceBytes(num_experts, processors);
  }
#endif
  return 0;
}

int sapwood_cuda_moe_gemm(const SapwoodMoeGemmParams* params, void* stream) {
  using sapwood_cuda::Aligned;
  using sapwood_cuda::kChunk;
  using sapwood_cuda::kTile;
  SAPWOOD_CUDA_CHECK_STRUCT("moe_gemm", params);
  const SapwoodMoeGemmParams& p = *params;
  SAPWOOD_CUDA_REQUIRE(p.num_experts > 0 && p.num_experts <= sapwood_cuda::kMaxExperts,
                       "moe_gemm: num_experts must be in 1..%d, got %d", sapwood_cuda::kMaxExperts, p.num_experts);
  SAPWOOD_CUDA_REQUIRE(p.n > 0 && p.n % kChunk == 0 && p.n <= INT32_MAX / 2,
                       "moe_gemm: n must be a positive multiple of %d and at most %d, got %d", kChunk, INT32_MAX / 2,
                       p.n);
  SAPWOOD_CUDA_REQUIRE(p.k > 0 && p.k % kChunk == 0 && p.k <= INT32_MAX / 2,
                       "moe_gemm: k must be a positive multiple of %d and at most %d, got %d", kChunk, INT32_MAX / 2,
                       p.k);
  SAPWOOD_CUDA_REQUIRE(p.x_stride >= p.k && p.x_stride % kChunk == 0,
                       "moe_gemm: x_stride must be a multiple of %d and at least k = %d, got %lld", kChunk, p.k,
                       static_cast<long long>(p.x_stride));
  SAPWOOD_CUDA_REQUIRE(p.weight_stride >= p.k && p.weight_stride % kChunk == 0,
                       "moe_gemm: weight_stride must be a multiple of %d and at least k = %d, got %lld", kChunk, p.k,
                       static_cast<long long>(p.weight_stride));
  SAPWOOD_CUDA_REQUIRE(p.expert_stride >= p.n * p.weight_stride && p.expert_stride % kChunk == 0,
                       "moe_gemm: expert_stride must be a multiple of %d and at least n * weight_stride = %lld, got "
                       "%lld",
                       kChunk, static_cast<long long>(p.n * p.weight_stride), static_cast<long long>(p.expert_stride));
  SAPWOOD_CUDA_REQUIRE(p.y_stride >= p.n && p.y_stride % kChunk == 0,
                       "moe_gemm: y_stride must be a multiple of %d and at least n = %d, got %lld", kChunk, p.n,
                       static_cast<long long>(p.y_stride));
  SAPWOOD_CUDA_REQUIRE(p.capacity >= 0 && p.capacity % sapwood_cuda::kBlockRows == 0 &&
                           p.capacity / sapwood_cuda::kBlockRows <= sapwood_cuda::kMaxBlocks,
                       "moe_gemm: capacity must be a multiple of %d and at most %d, got %d", sapwood_cuda::kBlockRows,
                       sapwood_cuda::kBlockRows * sapwood_cuda::kMaxBlocks, p.capacity);
  SAPWOOD_CUDA_REQUIRE(p.portable == 0 || p.portable == 1, "moe_gemm: portable must be 0 or 1, got %d", p.portable);
  if (p.capacity == 0) return SAPWOOD_CUDA_OK;
  SAPWOOD_CUDA_REQUIRE(p.x && p.weight && p.expert_offsets && p.block_expert && p.y,
                       "moe_gemm: x, weight, expert_offsets, block_expert and y must not be null");
  SAPWOOD_CUDA_REQUIRE(Aligned(p.x, 16) && Aligned(p.weight, 16) && Aligned(p.y, 16),
                       "moe_gemm: x, weight and y must be aligned to 16 bytes, got %p, %p and %p", p.x, p.weight, p.y);
#ifdef SAPWOOD_CUDA_CUTLASS
  if (const int processors = sapwood_cuda::Sm90Processors(); processors > 0 && p.portable == 0) {
    const int64_t needed = sapwood_cuda::MoeGemmSm90WorkspaceBytes(p.num_experts, processors);
    SAPWOOD_CUDA_REQUIRE(p.workspace != nullptr && Aligned(p.workspace, 256) && p.workspace_bytes >= needed,
                         "moe_gemm: workspace must be %lld bytes aligned to 256 (or set portable), got %lld at %p",
                         static_cast<long long>(needed), static_cast<long long>(p.workspace_bytes), p.workspace);
    return sapwood_cuda::MoeGemmSm90(p, processors, static_cast<cudaStream_t>(stream));
  }
#endif
  const dim3 grid((static_cast<unsigned>(p.n) + kTile - 1) / kTile,
                  static_cast<unsigned>(p.capacity / sapwood_cuda::kBlockRows));
  sapwood_cuda::Launch(sapwood_cuda::MoeGemmKernel, grid, sapwood_cuda::kThreads, sapwood_cuda::kSharedBytes,
                       static_cast<cudaStream_t>(stream), p);
  return sapwood_cuda::LaunchStatus("moe_gemm");
}
