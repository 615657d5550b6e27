// The list of tiles and items of a step (params.h). One block: a thread counts what a segment has, a scan over the segments
// says where it stands in the lists, a warp writes it. Tiles with the most keys come first in their segment, because blocks
// walk through the list in order and what starts last should be short.
//
// With shared prefixes: before, a warp finds what chunks the segments of a prefix have in common, and these are not counted
// as items of the segments; the same scan places the items of the shared tiles, all before the others; at last a warp writes
// the rows of a prefix. Chunk after chunk, each with all tiles of the prefix: blocks that run at the same time then read the
// same keys, and all but one find them in L2.
#include <cstdint>

#include "attention/ranges.cuh"
#include "common/check.cuh"
#include "common/vector.cuh"

namespace sapwood_cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxSegments = 16384;
constexpr int kMaxPrefixes = kThreads;  // a thread counts what one has
constexpr int kSharedRows = SAPWOOD_CUDA_ATTENTION_SHARED_ROWS;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int CeilDiv(int a, int b) { return (a + b - 1) / b; }

__device__ int QLen(const SapwoodAttentionPlanParams& p, int segment) {
  return p.q_indptr[segment + 1] - p.q_indptr[segment];
}

// 0 where the segment is not of this plan.
__device__ int SegmentRows(const SapwoodAttentionPlanParams& p, int segment) {
  const int rows = QLen(p, segment) * p.group;
  return rows > 0 && rows >= p.min_rows && rows <= p.max_rows ? rows : 0;
}

__device__ KeyRange TileKeys(const SapwoodAttentionPlanParams& p, int segment, int rows, int tile) {
  const int first_row = tile * p.rows_per_tile;
  return KeysOfRows(first_row, min(rows, first_row + p.rows_per_tile) - 1, p.group, rows / p.group, p.kv_lens[segment],
                    p.window);
}

// Inclusive sum over the lanes.
__device__ int WarpScan(int x, int lane) {
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, x, step);
    if (lane >= step) x += before;
  }
  return x;
}

template <bool kPrefixes>
struct Planner {
  // What is counted. Without prefixes there is an item for each place.
  enum { kTiles, kPlaces, kItems = kPrefixes ? 2 : kPlaces, kSharedTiles, kSharedItems, kCounts = kPrefixes ? 5 : 2 };

  struct Shared {
    int ends[kCounts][kThreads];  // of the segments, and the prefix, of this thread and of all before it
    int prefix_rows[kPrefixes ? kMaxPrefixes : 1], prefix_chunks[kPrefixes ? kMaxPrefixes : 1];
    int failure;
  };

  const SapwoodAttentionPlanParams& p;
  Shared& shared;
  const int thread, lane, warp, per_thread;

  __device__ Planner(const SapwoodAttentionPlanParams& params, Shared& of_block)
      : p(params),
        shared(of_block),
        thread(threadIdx.x),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        per_thread(CeilDiv(params.num_segments, kThreads)) {}

  // Of each segment: its chunks that shared tiles read, and the first of its tiles.
  __device__ int& PrefixChunks(int segment) const { return p.prefix_scratch[segment]; }
  __device__ int& FirstTile(int segment) const { return p.prefix_scratch[p.num_segments + segment]; }
  __device__ int ChunksElsewhere(int segment) const { return kPrefixes ? PrefixChunks(segment) : 0; }

  __device__ int EndBefore(int count, int index) const { return index == 0 ? 0 : shared.ends[count][index - 1]; }

  __device__ void FindPrefixChunks() {
    for (int segment = thread; segment < p.num_segments; segment += kThreads) PrefixChunks(segment) = 0;
    if (p.prefix_indptr[0] == p.prefix_indptr[p.num_prefixes]) {  // nearly every step: no walk through empty lists
      if (thread < p.num_prefixes) shared.prefix_rows[thread] = shared.prefix_chunks[thread] = 0;
      __syncthreads();
      return;
    }
    __syncthreads();
    for (int prefix = warp; prefix < p.num_prefixes; prefix += kWarps) {
      const int begin = p.prefix_indptr[prefix], end = p.prefix_indptr[prefix + 1];
      int rows = 0, segments = 0, len = p.prefix_lens[prefix];
      for (int i = begin + lane; i < end; i += kWarp) {
        const int segment = p.prefix_segments[i];
        if (segment < 0 || segment >= p.num_segments) {
          shared.failure = SAPWOOD_CUDA_ATTENTION_BAD_PREFIX;
        } else if (const int its_rows = SegmentRows(p, segment)) {
          rows += its_rows;
          ++segments;
          len = min(len, p.kv_lens[segment] - its_rows / p.group);
        }
      }
      rows = __reduce_add_sync(kAllLanes, rows);
      segments = __reduce_add_sync(kAllLanes, segments);
      len = __reduce_min_sync(kAllLanes, len);
      const int chunks = segments > 1 && len > 0 ? len / p.chunk_len : 0;
      if (lane == 0) {
        shared.prefix_rows[prefix] = rows;
        shared.prefix_chunks[prefix] = chunks;
      }
      if (chunks == 0) continue;
      for (int i = begin + lane; i < end; i += kWarp) {
        const int segment = p.prefix_segments[i];
        if (segment < 0 || segment >= p.num_segments || SegmentRows(p, segment) == 0) continue;
        if (atomicCAS(&PrefixChunks(segment), 0, chunks) != 0) shared.failure = SAPWOOD_CUDA_ATTENTION_BAD_PREFIX;
      }
    }
    __syncthreads();
  }

  __device__ void Count() {
    const int begin = min(p.num_segments, thread * per_thread), end = min(p.num_segments, begin + per_thread);
    int mine[kCounts] = {};
    for (int segment = begin; segment < end; ++segment) {
      const int rows = SegmentRows(p, segment), tiles = CeilDiv(rows, p.rows_per_tile);
      int places = 0;
      for (int tile = 0; tile < tiles; ++tile) places += NumChunks(TileKeys(p, segment, rows, tile), p.chunk_len);
      mine[kTiles] += tiles;
      mine[kPlaces] += places;
      if constexpr (kPrefixes) mine[kItems] += places - tiles * PrefixChunks(segment);
    }
    if constexpr (kPrefixes) {
      if (thread < p.num_prefixes && shared.prefix_chunks[thread] > 0) {
        mine[kSharedTiles] = CeilDiv(shared.prefix_rows[thread], kSharedRows);
        mine[kSharedItems] = mine[kSharedTiles] * shared.prefix_chunks[thread];
      }
    }
#pragma unroll
    for (int count = 0; count < kCounts; ++count) shared.ends[count][thread] = mine[count];
    for (int step = 1; step < kThreads; step *= 2) {
      __syncthreads();
      int before[kCounts];
#pragma unroll
      for (int count = 0; count < kCounts; ++count) before[count] = thread >= step ? shared.ends[count][thread - step] : 0;
      __syncthreads();
#pragma unroll
      for (int count = 0; count < kCounts; ++count) shared.ends[count][thread] += before[count];
    }
    __syncthreads();
  }

  // Whether there is a list.
  __device__ bool Judge() {
    const int tiles = shared.ends[kTiles][kThreads - 1], places = shared.ends[kPlaces][kThreads - 1];
    int failure = kPrefixes ? shared.failure : 0;
    if (tiles > p.max_tiles || places > p.max_items) failure = SAPWOOD_CUDA_ATTENTION_OVERFLOW;
    if (thread == 0) {
      p.counts[0] = failure ? 0 : tiles;
      p.counts[1] = failure ? 0 : shared.ends[kItems][kThreads - 1] + NumSharedItems();
      p.counts[2] = failure;
      if (failure && p.failed != nullptr) atomicOr(p.failed, failure);
    }
    return failure == 0;
  }

  __device__ int NumSharedItems() const {
    if constexpr (kPrefixes) return shared.ends[kSharedItems][kThreads - 1];
    return 0;
  }

  // A warp takes the segments of its lanes one after the other, all lanes the tiles of one.
  __device__ void WriteSegments() const {
    for (int owner = thread - lane; owner < thread - lane + kWarp; ++owner) {
      const int first = min(p.num_segments, owner * per_thread), last = min(p.num_segments, first + per_thread);
      int tile_at = EndBefore(kTiles, owner), place_at = EndBefore(kPlaces, owner);
      int item_at = NumSharedItems() + EndBefore(kItems, owner);
      for (int segment = first; segment < last; ++segment) {
        const int rows = SegmentRows(p, segment), tiles = CeilDiv(rows, p.rows_per_tile);
        const int elsewhere = ChunksElsewhere(segment);
        if constexpr (kPrefixes) {
          if (lane == 0) FirstTile(segment) = tile_at;
        }
        for (int base = 0; base < tiles; base += kWarp) {
          const int tile = tiles - 1 - base - lane;
          const KeyRange keys = tile >= 0 ? TileKeys(p, segment, rows, tile) : KeyRange{0, 0};
          const int num_chunks = tile >= 0 ? NumChunks(keys, p.chunk_len) : 0;
          const int end = WarpScan(num_chunks, lane), in_batch = __shfl_sync(kAllLanes, end, kWarp - 1);
          if (tile >= 0) {
            const int index = tile_at + base + lane, before = end - num_chunks;
            p.tiles[index] = {segment, tile * p.rows_per_tile, place_at + before, num_chunks};
            SapwoodAttentionItem* const items = p.items + item_at + before - (lane + 1) * elsewhere;
#pragma unroll 1
            for (int i = elsewhere; i < num_chunks; ++i) items[i] = {index, FirstChunk(keys, p.chunk_len) + i};
          }
          place_at += in_batch;
          item_at += in_batch - min(kWarp, tiles - base) * elsewhere;
        }
        tile_at += tiles;
      }
    }
  }

  __device__ void WritePrefixes() const {
    __syncthreads();  // the segments' tiles are there
    for (int prefix = warp; prefix < p.num_prefixes; prefix += kWarps) {
      const int chunks = shared.prefix_chunks[prefix], rows = shared.prefix_rows[prefix];
      if (chunks == 0) continue;
      const int first_tile = EndBefore(kSharedTiles, prefix), tiles = CeilDiv(rows, kSharedRows);
      const int begin = p.prefix_indptr[prefix], end = p.prefix_indptr[prefix + 1];
      int row_at = 0;
      for (int base = begin; base < end; base += kWarp) {
        const int segment = base + lane < end ? p.prefix_segments[base + lane] : 0;
        const int its_rows = base + lane < end ? SegmentRows(p, segment) : 0;
        const int rows_end = WarpScan(its_rows, lane), last_tile = CeilDiv(its_rows, p.rows_per_tile) - 1;
#pragma unroll 1
        for (int row = 0; row < its_rows; ++row) {
          const int packed = row_at + rows_end - its_rows + row, tile = first_tile + packed / kSharedRows;
          if (packed % kSharedRows == 0) p.shared_tiles[tile] = {segment, min(kSharedRows, rows - packed)};
          const int own_tile = FirstTile(segment) + last_tile - row / p.rows_per_tile;
          p.shared_rows[tile * kSharedRows + packed % kSharedRows] = {
              p.q_indptr[segment] + row / p.group, row % p.group, p.tiles[own_tile].first_place, row % p.rows_per_tile};
        }
        row_at += __shfl_sync(kAllLanes, rows_end, kWarp - 1);
      }
      const int first_item = EndBefore(kSharedItems, prefix);
#pragma unroll 1
      for (int i = lane; i < tiles * chunks; i += kWarp) p.items[first_item + i] = {-1 - (first_tile + i % tiles), i / tiles};
    }
  }
};

template <bool kPrefixes>
__global__ void __launch_bounds__(kThreads) AttentionPlanKernel(const SapwoodAttentionPlanParams p) {
  AwaitPredecessor();
  __shared__ typename Planner<kPrefixes>::Shared shared;
  Planner<kPrefixes> planner(p, shared);
  if constexpr (kPrefixes) {
    if (threadIdx.x == 0) shared.failure = 0;
    planner.FindPrefixChunks();  // begins with a barrier
  }
  planner.Count();
  if (!planner.Judge()) return;
  planner.WriteSegments();
  if constexpr (kPrefixes) planner.WritePrefixes();
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
  SAPWOOD_CUDA_REQUIRE(p.num_prefixes >= 0 && p.num_prefixes <= sapwood_cuda::kMaxPrefixes,
                       "attention_plan: num_prefixes must be in 0..%d, got %d", sapwood_cuda::kMaxPrefixes, p.num_prefixes);
  const auto stream_ = static_cast<cudaStream_t>(stream);
  if (p.num_prefixes == 0) {
    sapwood_cuda::Launch(sapwood_cuda::AttentionPlanKernel<false>, 1, sapwood_cuda::kThreads, 0, stream_, p);
    return sapwood_cuda::LaunchStatus("attention_plan");
  }
  SAPWOOD_CUDA_REQUIRE(p.window == 0,
                       "attention_plan: num_prefixes must be 0 where there is a window, got %d with window = %d: rows of a "
                       "window have not the same first key",
                       p.num_prefixes, p.window);
  SAPWOOD_CUDA_REQUIRE(p.rows_per_tile == sapwood_cuda::kSharedRows,
                       "attention_plan: rows_per_tile must be %d where num_prefixes is not 0, got %d",
                       sapwood_cuda::kSharedRows, p.rows_per_tile);
  SAPWOOD_CUDA_REQUIRE(p.prefix_indptr && p.prefix_segments && p.prefix_lens && p.shared_tiles && p.shared_rows &&
                           p.prefix_scratch,
                       "attention_plan: prefix_indptr, prefix_segments, prefix_lens, shared_tiles, shared_rows and "
                       "prefix_scratch must not be null where num_prefixes is not 0");
  SAPWOOD_CUDA_REQUIRE(sapwood_cuda::Aligned(p.shared_rows, 16),
                       "attention_plan: shared_rows must be aligned to 16 bytes");
  sapwood_cuda::Launch(sapwood_cuda::AttentionPlanKernel<true>, 1, sapwood_cuda::kThreads, 0, stream_, p);
  return sapwood_cuda::LaunchStatus("attention_plan");
}
