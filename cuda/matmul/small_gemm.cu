// y = x w^T for up to 16 rows of x: a stream of weights that passes the tensor cores.
//
// Who does what. A block computes 16 * kTiles outputs of all rows. Its four warps share out k: step s (64 elements, 128
// bytes of a row) is warp s % 4's, so that the block reads 512 neighbouring bytes of each row of w at a time. A warp
// adds up its steps in the accumulators of mma.m16n8k16, with w as the 16-row operand and x as the 8-column one: up to
// 8 rows of x cost one mma, where x on the other side would always pay for 16, and the outputs of a tile are neighbours.
// At the end the warps' sums are added in warp order.
//
// Always mma, even for one row, where dot products on the CUDA cores would keep pace with memory: they round otherwise,
// and a row must have the same bits whether it is alone or one of 16. The tensor cores are idle most of the time.
//
// Queues. Memory is kept busy by bytes in flight: each lane has a queue in shared memory, filled by cp.async and
// kStages steps deep, 96 KB a block and two blocks per multiprocessor. A lane fetches just the 16-byte chunks it will
// feed to the mma itself, so nothing is exchanged and no barrier is in the loop; the chunks of a warp's lanes lie side
// by side, without bank conflicts. This works because a sum over k may run in any order that both operands follow. With
// g = lane / 4 and t = lane % 4 an mma wants of the lane columns 2t, 2t + 1, 2t + 8, 2t + 9 of row g (and, of w, row
// g + 8): the lane hands it elements 0 .. 3 of its chunk, and elements 4 .. 7 to the next mma.
//
//   step of one row: | t=0 | t=1 | t=2 | t=3 | t=0 | t=1 | t=2 | t=3 |   chunks of 8 elements
//                    |-------- half 0 -------|-------- half 1 -------|   two mma each
//
// How tall. x is read (from L2) once a block, so a block wants many rows of w: 16 * kTiles >= 4 num_rows adds at most
// a quarter to what passes from L2. But all multiprocessors want work: where n is too small for that, lower blocks.
//
// While the kernel before still runs, the first stages of weights, which no kernel writes, are brought to L2.
//
// Copies of what does not exist (rows past n and num_rows, elements past k) write zeros.
#include <cstdint>

#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"
#include "matmul/params.h"

namespace sapwood_cuda {
namespace {

constexpr int kWarps = 4;  // of a block; the chains of an output
constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxRows = SAPWOOD_CUDA_SMALL_GEMM_MAX_ROWS;
constexpr int kTileRows = 16;  // of w, in an mma
constexpr int kStep = 64;      // elements of k
constexpr int kQueueBytes = 24 * 1024;  // of a warp
constexpr int kBlocksWanted = 128;      // about the multiprocessors of the GPUs this is for

static_assert(kMaxRows == 16, "x is two mma columns of 8 rows");

template <int kTiles>
__global__ void __launch_bounds__(kThreads, 2) SmallGemmKernel(const SapwoodSmallGemmParams p) {
  constexpr int kOutputs = kTiles * kTileRows;
  constexpr int kChunks = 4 * kTiles + 4;  // of a lane in a step: rows g and g + 8, two halves; x likewise
  constexpr int kStages = kQueueBytes / (kChunks * kWarp * static_cast<int>(sizeof(uint4)));
  constexpr int kPitch = kOutputs + 4;  // of the warps' sums: no two lanes in a bank
  static_assert(kStages >= 2 && kMaxRows * kPitch * sizeof(float) <= kQueueBytes, "the queue is too small");

  SAPWOOD_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int group = lane / 4;
  const int pair = lane % 4;
  const int first = static_cast<int>(blockIdx.x) * kOutputs;
  const bool wide = p.num_rows > 8;
  const __nv_bfloat16* x = static_cast<const __nv_bfloat16*>(p.x);
  const __nv_bfloat16* w = static_cast<const __nv_bfloat16*>(p.w);

  // Chunks of a stage: of w (tile, row g or g + 8, half), then of x (row g or g + 8, half).
  uint4* const queue = reinterpret_cast<uint4*>(shared + warp * kQueueBytes) + lane;
  const auto w_chunk = [&](int stage, int tile, int lower, int half) {
    return queue + (stage * kChunks + 4 * tile + 2 * lower + half) * kWarp;
  };
  const auto x_chunk = [&](int stage, int column, int half) {
    return queue + (stage * kChunks + 4 * kTiles + 2 * column + half) * kWarp;
  };

  const int num_steps = (p.k + kStep - 1) / kStep;
  const auto fetch = [&](int stage, int step) {
    if (step < num_steps) {
      const int k = step * kStep + 8 * pair;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          const int row = first + tile * kTileRows + 8 * lower + group;
          const __nv_bfloat16* from = w + row * p.w_stride + k;
          CpAsync16(w_chunk(stage, tile, lower, 0), from, row < p.n && k < p.k);
          CpAsync16(w_chunk(stage, tile, lower, 1), from + kStep / 2, row < p.n && k + kStep / 2 < p.k);
        }
      }
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        if (column == 1 && !wide) break;
        const int row = 8 * column + group;
        const __nv_bfloat16* from = x + row * p.x_stride + k;
        CpAsync16(x_chunk(stage, column, 0), from, row < p.num_rows && k < p.k);
        CpAsync16(x_chunk(stage, column, 1), from + kStep / 2, row < p.num_rows && k + kStep / 2 < p.k);
      }
    }
    CpAsyncCommit();  // also where nothing was left to fetch: the wait below counts groups
  };

#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    const int k = (warp + stage * kWarps) * kStep + 16 * pair;  // 32 bytes of the 128 that four lanes fetch
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int row = first + 8 * i + group;
      if (row < p.n && k < p.k) PrefetchL2(w + row * p.w_stride + k);
    }
  }
  AwaitPredecessor();

  float sums[kTiles][2][4] = {};
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) fetch(stage, warp + stage * kWarps);
  int stage = 0;
  for (int step = warp; step < num_steps; step += kWarps) {
    CpAsyncWait<kStages - 1>();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 b0 = *x_chunk(stage, 0, half);
      const uint4 b1 = wide ? *x_chunk(stage, 1, half) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 upper = *w_chunk(stage, tile, 0, half);
        const uint4 lower = *w_chunk(stage, tile, 1, half);
        const uint32_t a_first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t a_second[4] = {upper.z, lower.z, upper.w, lower.w};
        MmaBf16(sums[tile][0], a_first, {b0.x, b0.y});
        MmaBf16(sums[tile][0], a_second, {b0.z, b0.w});
        if (wide) {
          MmaBf16(sums[tile][1], a_first, {b1.x, b1.y});
          MmaBf16(sums[tile][1], a_second, {b1.z, b1.w});
        }
      }
    }
    fetch(stage, step + kStages * kWarps);  // into the place of what the mma have just taken
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }

  // The sums take the place of the queues, [warp][row of x][output].
  __syncthreads();
  float* const all_sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = i / 4 * 8 + 2 * pair + i % 2;
      const int output = tile * kTileRows + i % 4 / 2 * 8 + group;
      all_sums[(warp * kMaxRows + row) * kPitch + output] = sums[tile][i / 4][i % 4];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.num_rows * kOutputs; i += kThreads) {
    const int row = i / kOutputs;
    const int output = first + i % kOutputs;
    if (output >= p.n) continue;
    float y = all_sums[row * kPitch + i % kOutputs];
#pragma unroll
    for (int c = 1; c < kWarps; ++c) y = __fadd_rn(y, all_sums[(c * kMaxRows + row) * kPitch + i % kOutputs]);
    if (p.bias != nullptr) y = __fadd_rn(y, p.bias[output]);
    if (p.residual != nullptr) y = __fadd_rn(p.residual[row * p.residual_stride + output], y);
    if (p.y_dtype == SAPWOOD_CUDA_F32) {
      static_cast<float*>(p.y)[row * p.y_stride + output] = y;
    } else {
      static_cast<__nv_bfloat16*>(p.y)[row * p.y_stride + output] = __float2bfloat16_rn(y);
    }
  }
}

// The bits are the same for every kTiles.
template <int kTiles>
void LaunchTiles(const SapwoodSmallGemmParams& p, cudaStream_t stream) {
  constexpr int kOutputs = kTiles * kTileRows;
  Launch(SmallGemmKernel<kTiles>, (p.n + kOutputs - 1) / kOutputs, kThreads, kWarps * kQueueBytes, stream, p);
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_small_gemm(const SapwoodSmallGemmParams* params, void* stream) {
  using sapwood_cuda::Aligned;
  SAPWOOD_CUDA_CHECK_STRUCT("small_gemm", params);
  const SapwoodSmallGemmParams& p = *params;
  constexpr int kMaxSize = 1 << 30;  // positions and what is beyond them by a step or a block fit 32 bits
  SAPWOOD_CUDA_REQUIRE(p.y_dtype == SAPWOOD_CUDA_F32 || p.y_dtype == SAPWOOD_CUDA_BF16,
                       "small_gemm: y_dtype must be f32 (0) or bf16 (1), got %d", p.y_dtype);
  SAPWOOD_CUDA_REQUIRE(p.num_rows >= 0 && p.num_rows <= SAPWOOD_CUDA_SMALL_GEMM_MAX_ROWS,
                       "small_gemm: num_rows must be in 0..%d, got %d", SAPWOOD_CUDA_SMALL_GEMM_MAX_ROWS, p.num_rows);
  SAPWOOD_CUDA_REQUIRE(p.n > 0 && p.n <= kMaxSize, "small_gemm: n must be in 1..%d, got %d", kMaxSize, p.n);
  SAPWOOD_CUDA_REQUIRE(p.k > 0 && p.k <= kMaxSize && p.k % 8 == 0,
                       "small_gemm: k must be a multiple of 8 in 8..%d, got %d", kMaxSize, p.k);
  SAPWOOD_CUDA_REQUIRE(
      p.x_stride >= p.k && p.x_stride % 8 == 0 && p.w_stride >= p.k && p.w_stride % 8 == 0,
      "small_gemm: x_stride and w_stride must be multiples of 8 and at least k = %d, got %lld and %lld", p.k,
      static_cast<long long>(p.x_stride), static_cast<long long>(p.w_stride));
  SAPWOOD_CUDA_REQUIRE(p.y_stride >= p.n, "small_gemm: y_stride must be at least n = %d, got %lld", p.n,
                       static_cast<long long>(p.y_stride));
  SAPWOOD_CUDA_REQUIRE(p.residual == nullptr || p.residual_stride >= p.n,
                       "small_gemm: residual_stride must be at least n = %d, got %lld", p.n,
                       static_cast<long long>(p.residual_stride));
  if (p.num_rows == 0) return SAPWOOD_CUDA_OK;
  SAPWOOD_CUDA_REQUIRE(p.x != nullptr && p.w != nullptr && p.y != nullptr,
                       "small_gemm: x, w and y must not be null, got %p, %p, %p", p.x, p.w, p.y);
  SAPWOOD_CUDA_REQUIRE(Aligned(p.x, 16) && Aligned(p.w, 16),
                       "small_gemm: x and w must be aligned to 16 bytes, got %p and %p", p.x, p.w);
  SAPWOOD_CUDA_REQUIRE(Aligned(p.bias, 4) && Aligned(p.residual, 4) &&
                           Aligned(p.y, p.y_dtype == SAPWOOD_CUDA_F32 ? 4 : 2),
                       "small_gemm: bias, residual and y must be aligned to their elements, got %p, %p, %p",
                       static_cast<const void*>(p.bias), static_cast<const void*>(p.residual), p.y);

  const int most_tiles = (p.n / sapwood_cuda::kBlocksWanted) / sapwood_cuda::kTileRows;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (p.num_rows > 8 && most_tiles >= 4) {
    sapwood_cuda::LaunchTiles<4>(p, on);
  } else if (p.num_rows > 4 && most_tiles >= 2) {
    sapwood_cuda::LaunchTiles<2>(p, on);
  } else {
    sapwood_cuda::LaunchTiles<1>(p, on);
  }
  return sapwood_cuda::LaunchStatus("small_gemm");
}
