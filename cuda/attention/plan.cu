// The list of tiles and items of a step (params.h). One block: a thread counts what a segment has, a scan over the segments
// says where it stands in the lists, a warp writes it. Tiles with the most keys come first in their segment, because blocks
// walk through the list in order and what starts last should be short.
#include <cstdint>

#include "attention/ranges.cuh"
#include "common/check.cuh"
#include "common/vector.cuh"

namespace sapwood_cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxSegments = 16384;

struct Count {
  int tiles, items;
};

__device__ int SegmentRows(const SapwoodAttentionPlanParams& p, int segment) {
  const int rows = (p.q_indptr[segment + 1] - p.q_indptr[segment]) * p.group;
  return rows > 0 && rows >= p.min_rows && rows <= p.max_rows ? rows : 0;
}

__device__ KeyRange TileKeys(const SapwoodAttentionPlanParams& p, int segment, int rows, int tile) {
  const int first_row = tile * p.rows_per_tile;
  return KeysOfRows(first_row, min(rows, first_row + p.rows_per_tile) - 1, p.group, rows / p.group, p.kv_lens[segment],
                    p.window);
}

__global__ void __launch_bounds__(kThreads) AttentionPlanKernel(const SapwoodAttentionPlanParams p) {
  __shared__ Count ends[kThreads];  // of the segments of this thread and of all before it
  const int thread = threadIdx.x, per_thread = (p.num_segments + kThreads - 1) / kThreads;
  const int begin = min(p.num_segments, thread * per_thread), end = min(p.num_segments, begin + per_thread);
  Count mine = {0, 0};
  for (int segment = begin; segment < end; ++segment) {
    const int rows = SegmentRows(p, segment), tiles = (rows + p.rows_per_tile - 1) / p.rows_per_tile;
    mine.tiles += tiles;
    for (int tile = 0; tile < tiles; ++tile) mine.items += NumChunks(TileKeys(p, segment, rows, tile), p.chunk_len);
  }
  ends[thread] = mine;
  for (int step = 1; step < kThreads; step *= 2) {
    __syncthreads();
    const Count before = thread >= step ? ends[thread - step] : Count{0, 0};
    __syncthreads();
    ends[thread].tiles += before.tiles;
    ends[thread].items += before.items;
  }
  __syncthreads();
  const Count all = ends[kThreads - 1];
  const bool overflow = all.tiles > p.max_tiles || all.items > p.max_items;
  if (thread == 0) {
    p.counts[0] = overflow ? 0 : all.tiles;
    p.counts[1] = overflow ? 0 : all.items;
    p.counts[2] = overflow;
  }
  if (overflow) return;

  // A warp takes the segments of its lanes one after the other, all lanes the tiles of one.
  const int lane = thread % kWarp;
  for (int owner = thread - lane; owner < thread - lane + kWarp; ++owner) {
    const int first = min(p.num_segments, owner * per_thread), last = min(p.num_segments, first + per_thread);
    Count at = owner == 0 ? Count{0, 0} : ends[owner - 1];
    for (int segment = first; segment < last; ++segment) {
      const int rows = SegmentRows(p, segment), tiles = (rows + p.rows_per_tile - 1) / p.rows_per_tile;
      for (int base = 0; base < tiles; base += kWarp) {
        const int tile = tiles - 1 - base - lane;
        const KeyRange keys = tile >= 0 ? TileKeys(p, segment, rows, tile) : KeyRange{0, 0};
        const int num_items = tile >= 0 ? NumChunks(keys, p.chunk_len) : 0;
        int item = num_items;  // inclusive scan over the lanes
        for (int step = 1; step < kWarp; step *= 2) {
          const int before = __shfl_up_sync(0xffffffffu, item, step);
          if (lane >= step) item += before;
        }
        const int in_batch = __shfl_sync(0xffffffffu, item, kWarp - 1);
        item += at.items - num_items;
        if (tile >= 0) {
          const int index = at.tiles + base + lane;
          p.tiles[index] = {segment, tile * p.rows_per_tile, item, num_items};
          for (int i = 0; i < num_items; ++i) p.items[item + i] = {index, FirstChunk(keys, p.chunk_len) + i};
        }
        at.items += in_batch;
      }
      at.tiles += tiles;
    }
  }
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_attention_plan(const SapwoodAttentionPlanParams* params, void* stream) {
  SAPWOOD_CUDA_CHECK_STRUCT("attention_plan", params);
  const SapwoodAttentionPlanParams& p = *params;
  SAPWOOD_CUDA_REQUIRE(p.num_segments >= 1 && p.num_segments <= sapwood_cuda::kMaxSegments,
                       "attention_plan: num_segments must be in 1..%d, got %d", sapwood_cuda::kMaxSegments, p.num_segments);
  SAPWOOD_CUDA_REQUIRE(p.group > 0, "attention_plan: group must be positive, got %d", p.group);
  SAPWOOD_CUDA_REQUIRE(p.rows_per_tile > 0, "attention_plan: rows_per_tile must be positive, got %d", p.rows_per_tile);
  SAPWOOD_CUDA_REQUIRE(p.chunk_len > 0 && p.chunk_len % SAPWOOD_CUDA_ATTENTION_MIN_CHUNK == 0,
                       "attention_plan: chunk_len must be a positive multiple of %d, got %d",
                       SAPWOOD_CUDA_ATTENTION_MIN_CHUNK, p.chunk_len);
  SAPWOOD_CUDA_REQUIRE(p.window >= 0, "attention_plan: window must not be negative, got %d", p.window);
  SAPWOOD_CUDA_REQUIRE(p.max_tiles >= 0 && p.max_items >= 0,
                       "attention_plan: max_tiles and max_items must not be negative, got %d and %d", p.max_tiles,
                       p.max_items);
  SAPWOOD_CUDA_REQUIRE(p.q_indptr && p.kv_lens && p.tiles && p.items && p.counts,
                       "attention_plan: q_indptr, kv_lens, tiles, items and counts must not be null");
  sapwood_cuda::Launch(sapwood_cuda::AttentionPlanKernel, 1, sapwood_cuda::kThreads, 0, static_cast<cudaStream_t>(stream),
                       p);
  return sapwood_cuda::LaunchStatus("attention_plan");
}
