// Paged attention, and the choice of its tier. Here is the portable one, sm_80 and later: mma.sync, K and V by cp.async in
// two stages. On compute capability 9.0 attention_sm90.cu computes tiles of 128 rows. params.h says what an item is; one block
// computes one item of one KV head after the other, in steps of kKeys keys:
//
//   Q and the first step's K, V to shared memory
//   for each step: wait for it; start fetching the next; S = Q K^T; online softmax in f32; O += P V
//   the rows' output, or their (O, m, l) where the tile has several chunks
//
// The rows of a tile are packed (query, head) pairs, so that the heads of a KV head share what is read of it. Many rows
// (kRowWarps = 4): a warp has 16 or 32 rows and all keys of a step. Few rows (kKeyWarps = 4 or 2): all warps have the same 16
// rows, each 16 of a step's keys and a softmax of its own over them; they merge at the end, in the order of the warps.
//
// Shared memory holds rows of D bf16, whose 16-byte pieces are permuted by row % 8: without it the eight rows that ldmatrix
// reads at once would lie in the same banks. Keys that no row of the tile sees are zeros there, not what is in the pages.
//
// An item of a shared tile (params.h) differs in where its rows come from and where their (O, m, l) go, and has no masks.
//
// Order of sums of a row: keys ascending within a warp, warps ascending, then attention_merge's chunks ascending.
#include <cstdint>

#include "attention/attention_sm90.cuh"
#include "attention/item.cuh"
#include "common/check.cuh"
#include "common/device.cuh"

namespace sapwood_cuda {
namespace {

constexpr int kPiece = 8;  // bf16 of one cp.async

template <int kDim, bool kFewRows>
struct Shape {
  static constexpr int kRowWarps = kFewRows ? 1 : 4;
  static constexpr int kRowTiles = kFewRows || kDim > 128 ? 1 : 2;  // of 16 rows, per warp: more do not fit its registers
  static constexpr int kRows = 16 * kRowTiles * kRowWarps;
  // Of a step. Two stages of them fit in the 99 KB of sm_86; 64 of them beside 128 rows of 128 would not fit the registers.
  static constexpr int kKeys = kDim > 128 || (kDim > 64 && !kFewRows) ? 32 : 64;
  static constexpr int kKeyWarps = kFewRows ? kKeys / 16 : 1;
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kWarps = kRowWarps * kKeyWarps;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kPieces = kDim / kPiece;  // of a row
  static constexpr int kStages = 2;
  static constexpr int kStageElements = 2 * kKeys * kDim;  // K, then V
  static constexpr size_t kSharedBytes = 2 * (kRows * kDim + kStages * kStageElements);
  // Merging the warps of few rows takes the place of the stages.
  static_assert(!kFewRows || kKeyWarps * kRows * (kDim + 2) * 4 <= 2 * kStages * kStageElements);
};

// Element of row `row`, piece `piece` in shared memory.
template <int kDim>
__device__ __forceinline__ int Place(int row, int piece) {
  return row * kDim + (piece ^ (row & 7)) * kPiece;
}

template <int kDim, bool kFewRows>
struct Block {
  using S = Shape<kDim, kFewRows>;
  static constexpr int kRowTiles = S::kRowTiles, kWarpKeys = S::kWarpKeys;

  const SapwoodAttentionParams& p;
  const int kv_head, lane, warp;
  __nv_bfloat16* const q;       // [kRows][kDim]
  __nv_bfloat16* const stages;  // [kStages]{K [kKeys][kDim], V}
  Item item;
  // Of this warp: rows g and g + 8 of each of its tiles, with g = lane / 4.
  float o[kRowTiles][kDim / 8][4];
  float m[kRowTiles][2], l[kRowTiles][2];  // l: of this lane's keys
  int keys_end[kRowTiles][2];  // of the keys that the row sees

  __device__ Block(const SapwoodAttentionParams& params, unsigned char* shared)
      : p(params),
        kv_head(blockIdx.y),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp),
        q(reinterpret_cast<__nv_bfloat16*>(shared)),
        stages(q + S::kRows * kDim) {}

  __device__ int WarpRow() const { return kFewRows ? 0 : warp * 16 * kRowTiles; }
  __device__ int WarpKey() const { return kFewRows ? warp * kWarpKeys : 0; }

  __device__ void LoadQ() {
    // Addresses that do not depend on the item would be kept over all items, and spilled on sm_120.
    for (int i = NotBefore(threadIdx.x); i < S::kRows * S::kPieces; i += S::kThreads) {
      const int row = i / S::kPieces, piece = i % S::kPieces;
      const bool valid = row < item.num_rows && piece * kPiece < p.head_dim;
      const int packed = valid ? item.first_row + row : 0;
      int token = item.token_begin + packed / p.group, head = packed % p.group;
      if (kFewRows && item.shared_rows != nullptr) {
        const SapwoodAttentionSharedRow shared_row = item.SharedRow(valid ? row : 0);
        token = shared_row.token;
        head = shared_row.head;
      }
      const __nv_bfloat16* from = static_cast<const __nv_bfloat16*>(p.q) + static_cast<int64_t>(token) * p.q_stride +
                                  (kv_head * p.group + head) * p.head_dim;
      CpAsync16(q + Place<kDim>(row, piece), from + (valid ? piece * kPiece : 0), valid);
    }
  }

  // Keys [first, first + kKeys) into a stage. A warp copies kKeys / kWarps rows of K and of V; its first lanes look up
  // where they are.
  __device__ void LoadStep(int first, int stage) {
    constexpr int kRowsAtOnce = kWarp / S::kPieces;  // per warp; kPieces <= 32
    constexpr int kWarpRows = S::kKeys / S::kWarps;
    static_assert(kWarpRows <= kWarp && kRowsAtOnce >= 1);
    __nv_bfloat16* const k = stages + stage * S::kStageElements;
    __nv_bfloat16* const v = k + S::kKeys * kDim;
    const int row0 = warp * kWarpRows, token = first + row0 + lane;
    int64_t place = -1;  // of the lane's row in the pool, in elements
    if (lane < kWarpRows && token >= item.keys.begin && token < item.keys.end) {
      const int page = token / p.page_size;
      place = item.pages[page] * p.page_stride +
              (static_cast<int64_t>(kv_head) * p.page_size + (token - page * p.page_size)) * p.head_dim;
    }
    const int piece = lane % S::kPieces;
#pragma unroll
    for (int i = 0; i < kWarpRows; i += kRowsAtOnce) {
      const int row = i + lane / S::kPieces;
      const int64_t from = __shfl_sync(0xffffffffu, place, row);
      const bool valid = from >= 0 && piece * kPiece < p.head_dim;
      const int64_t at = valid ? from + piece * kPiece : 0;
      const int to = Place<kDim>(row0 + row, piece);
      CpAsync16(k + to, static_cast<const __nv_bfloat16*>(p.k_pages) + at, valid);
      CpAsync16(v + to, static_cast<const __nv_bfloat16*>(p.v_pages) + at, valid);
    }
  }

  __device__ void Begin() {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        m[t][half] = -INFINITY;
        l[t][half] = 0.0f;
        const int row = min(WarpRow() + 16 * t + 8 * half + lane / 4, item.num_rows - 1);
        keys_end[t][half] = KeysOfQuery((item.first_row + row) / p.group, item.q_len, item.kv_len, p.window).end;
        if (kFewRows && item.shared_rows != nullptr) keys_end[t][half] = item.keys.end;
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[t][n][i] = 0.0f;
      }
    }
  }

  // This warp's share of the step whose first key is `first`.
  __device__ void Step(int first, int stage) {
    const __nv_bfloat16* const k = stages + stage * S::kStageElements + WarpKey() * kDim;
    const __nv_bfloat16* const v = k + S::kKeys * kDim;
    float s[kRowTiles][kWarpKeys / 8][4];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kWarpKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[t][n][i] = 0.0f;
      }
    }
#pragma unroll 4  // more, and ptxas loads further ahead than it has registers for
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        LdMatrix4(a[t], q + Place<kDim>(WarpRow() + 16 * t + lane % 16, 2 * d + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < kWarpKeys / 8; n += 2) {
        uint32_t b[4];
        LdMatrix4(b, k + Place<kDim>(8 * n + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
        const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          MmaBf16(s[t][n], a[t], b0);
          MmaBf16(s[t][n + 1], a[t], b1);
        }
      }
    }
    uint32_t probabilities[kRowTiles][kWarpKeys / 8][2];  // of rows g and g + 8
    const int warp_first = first + WarpKey();
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) Softmax(t, half, warp_first, s[t], probabilities[t]);
    }
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; n += 2) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        a[t][0] = probabilities[t][n][0], a[t][1] = probabilities[t][n][1];
        a[t][2] = probabilities[t][n + 1][0], a[t][3] = probabilities[t][n + 1][1];
      }
#pragma unroll
      for (int d = 0; d < kDim / 8; d += 2) {
        uint32_t b[4];
        LdMatrix4Transposed(b, v + Place<kDim>(8 * n + lane / 8 % 2 * 8 + lane % 8, d + lane / 16));
        const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          MmaBf16(o[t][d], a[t], b0);
          MmaBf16(o[t][d + 1], a[t], b1);
        }
      }
    }
  }

  // Scores of one row -> probabilities, m and l; rescales o. Chunks begin and end at multiples of a step, so that only the
  // row's own range cuts one. The four lanes of a row have its keys 2 (lane % 4) and + 1 of
  // every eight.
  __device__ void Softmax(int t, int half, int warp_first, float (&s)[kWarpKeys / 8][4],
                          uint32_t (&probabilities)[kWarpKeys / 8][2]) {
    const int end = keys_end[t][half], begin = FirstKey(end, p.window);
    const bool masked = begin > warp_first || end < warp_first + kWarpKeys;
    const float scale = p.softcap > 0.0f ? p.scale / p.softcap : p.scale * kLog2E;
    float most = m[t][half];
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[n][2 * half + i];
        x *= scale;
        if (p.softcap > 0.0f) x = p.softcap * kLog2E * Tanh(x);
        const int key = warp_first + 8 * n + lane % 4 * 2 + i;
        if (masked && (key < begin || key >= end)) x = -INFINITY;
        most = fmaxf(most, x);
      }
    }
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    const float base = most == -INFINITY ? 0.0f : most;  // a row may see no key of the step
    const float alpha = Exp2(m[t][half] - base);
    m[t][half] = most;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; ++n) {
      const uint32_t pair = PackBf16(Exp2(s[n][2 * half] - base), Exp2(s[n][2 * half + 1] - base));
      probabilities[n][half] = pair;
      sum += __uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000u);
    }
    l[t][half] = l[t][half] * alpha + sum;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      o[t][d][2 * half] *= alpha;
      o[t][d][2 * half + 1] *= alpha;
    }
  }

  // Of few rows: two neighbouring dims of one.
  __device__ void EmitPair(int row, int dim, float x0, float x1, float row_m, float row_l) const {
    if (row >= item.num_rows || dim >= p.head_dim) return;
    if (item.partial) {
      int place = item.place, tile_row = row;
      if (item.shared_rows != nullptr) {
        const SapwoodAttentionSharedRow shared_row = item.SharedRow(row);
        place += shared_row.first_place;
        tile_row = shared_row.tile_row;
      }
      const int64_t at = (static_cast<int64_t>(place) * p.num_kv_heads + kv_head) * S::kRows + tile_row;
      *reinterpret_cast<float2*>(p.partial_o + at * p.head_dim + dim) = make_float2(x0, x1);
      if (dim == 0) *reinterpret_cast<float2*>(p.partial_ml + 2 * at) = make_float2(row_m, row_l);
      return;
    }
    const RowOutput to = OutputOf(p, item, kv_head, row, row_m, row_l);
    *reinterpret_cast<__nv_bfloat162*>(to.out + dim) = __floats2bfloat162_rn(x0 * to.weight, x1 * to.weight);
  }

  __device__ void Finish(int index) {
    item = ItemOf<kFewRows>(p, index, S::kRows);  // anew: the loop has no registers to keep it
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        l[t][half] += __shfl_xor_sync(0xffffffffu, l[t][half], 1);
        l[t][half] += __shfl_xor_sync(0xffffffffu, l[t][half], 2);
      }
    }
    if constexpr (!kFewRows) {
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          EmitRow<kDim>(p, item, kv_head, S::kRows, WarpRow() + 16 * t + 8 * half + lane / 4, m[t][half], l[t][half],
                        [&](int d, int i) { return o[t][d][2 * half + i]; });
        }
      }
    } else {
      MergeWarps();
    }
  }

  // All warps have the same rows: their (O, m, l) meet where K and V were.
  __device__ void MergeWarps() {
    float* const all_o = reinterpret_cast<float*>(stages);          // [kKeyWarps][16][kDim]
    float* const all_ml = all_o + S::kKeyWarps * S::kRows * kDim;  // [kKeyWarps][16][2]
    __syncthreads();                                              // the last step's K and V have been read
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * S::kRows + 8 * half + lane / 4;
      if (lane % 4 == 0) *reinterpret_cast<float2*>(all_ml + 2 * row) = make_float2(m[0][half], l[0][half]);
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        *reinterpret_cast<float2*>(all_o + row * kDim + 8 * d + lane % 4 * 2) =
            make_float2(o[0][d][2 * half], o[0][d][2 * half + 1]);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < S::kRows * kDim / 2; i += S::kThreads) {
      const int row = i / (kDim / 2), dim = i % (kDim / 2) * 2;
      float most = -INFINITY;
#pragma unroll
      for (int w = 0; w < S::kKeyWarps; ++w) most = fmaxf(most, all_ml[2 * (w * S::kRows + row)]);
      const float base = most == -INFINITY ? 0.0f : most;
      float x0 = 0.0f, x1 = 0.0f, sum = 0.0f;
#pragma unroll
      for (int w = 0; w < S::kKeyWarps; ++w) {
        const int at = w * S::kRows + row;
        const float weight = Exp2(all_ml[2 * at] - base);
        sum += all_ml[2 * at + 1] * weight;
        x0 += all_o[at * kDim + dim] * weight;
        x1 += all_o[at * kDim + dim + 1] * weight;
      }
      EmitPair(row, dim, x0, x1, most, sum);
    }
  }

  __device__ void Run(int index) {
    item = ItemOf<kFewRows>(p, index, S::kRows);
    // Steps stand at multiples of kKeys: which keys share one does not depend on where the segment's queries begin.
    const int begin = item.keys.begin / S::kKeys * S::kKeys;
    __syncthreads();  // the item before has been read from shared memory
    LoadQ();
    LoadStep(begin, 0);
    CpAsyncCommit();
    Begin();
    int stage = 0;
    for (int first = begin; first < item.keys.end; first += S::kKeys) {
      CpAsyncWait<0>();
      __syncthreads();  // the step is there for all, and all have read the stage that comes next
      if (first + S::kKeys < item.keys.end) LoadStep(first + S::kKeys, stage ^ 1);
      CpAsyncCommit();
      Step(first, stage);
      stage ^= 1;
    }
    Finish(index);
  }
};

// Two blocks of a processor: told nothing, ptxas aims at more where shared memory has no room for them, and spills.
template <int kDim, bool kFewRows>
__global__ void __launch_bounds__(Shape<kDim, kFewRows>::kThreads, 2) AttentionKernel(const SapwoodAttentionParams p) {
  AwaitPredecessor();
  SAPWOOD_DYNAMIC_SHARED(shared);
  Block<kDim, kFewRows> block(p, shared);
  // The count is read anew each time: where rows are many there is no register to keep it.
  for (int index = blockIdx.x; index < p.counts[1]; index += gridDim.x) block.Run(index);
}

template <int kDim>
void LaunchAttention(const SapwoodAttentionParams& p, cudaStream_t stream) {
  const dim3 grid(p.num_blocks, p.num_kv_heads);
  if (p.rows_per_tile == 16) {
    using S = Shape<kDim, true>;
    Launch(AttentionKernel<kDim, true>, grid, S::kThreads, S::kSharedBytes, stream, p);
  } else {
    using S = Shape<kDim, false>;
    Launch(AttentionKernel<kDim, false>, grid, S::kThreads, S::kSharedBytes, stream, p);
  }
}

// A warp per row of a tile that has several chunks; blocks walk through the tiles.
constexpr int kMergeWarps = 8;

__global__ void __launch_bounds__(kMergeWarps* kWarp) AttentionMergeKernel(const SapwoodAttentionParams p) {
  AwaitPredecessor();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, kv_head = blockIdx.y;
  const int num_tiles = p.counts[0];
  for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
    const SapwoodAttentionTile tile = p.tiles[index];
    if (tile.num_chunks <= 1) continue;
    const int token_begin = p.q_indptr[tile.segment];
    const int rows = (p.q_indptr[tile.segment + 1] - token_begin) * p.group;
    const int num_rows = min(p.rows_per_tile, rows - tile.first_row);
    for (int row = warp; row < num_rows; row += kMergeWarps) {
      const auto place = [&](int i) {
        return (static_cast<int64_t>(tile.first_place + i) * p.num_kv_heads + kv_head) * p.rows_per_tile + row;
      };
      const int packed = tile.first_row + row, head = kv_head * p.group + packed % p.group;
      float most = p.sinks != nullptr ? p.sinks[head] * kLog2E : -INFINITY;
      for (int i = 0; i < tile.num_chunks; ++i) most = fmaxf(most, p.partial_ml[2 * place(i)]);
      float sum = p.sinks != nullptr ? Exp2(p.sinks[head] * kLog2E - most) : 0.0f;
      for (int i = 0; i < tile.num_chunks; ++i) {
        sum += p.partial_ml[2 * place(i) + 1] * Exp2(p.partial_ml[2 * place(i)] - most);
      }
      __nv_bfloat16* const out = static_cast<__nv_bfloat16*>(p.out) +
                                 static_cast<int64_t>(token_begin + packed / p.group) * p.out_stride +
                                 static_cast<int64_t>(head) * p.head_dim;
      for (int dim = 2 * lane; dim < p.head_dim; dim += 2 * kWarp) {
        float x0 = 0.0f, x1 = 0.0f;
        for (int i = 0; i < tile.num_chunks; ++i) {
          const float weight = Exp2(p.partial_ml[2 * place(i)] - most);
          const float2 part = *reinterpret_cast<const float2*>(p.partial_o + place(i) * p.head_dim + dim);
          x0 = __fmaf_rn(part.x, weight, x0);
          x1 = __fmaf_rn(part.y, weight, x1);
        }
        *reinterpret_cast<__nv_bfloat162*>(out + dim) = __floats2bfloat162_rn(x0 / sum, x1 / sum);
      }
    }
  }
}

int Check(const char* op, const SapwoodAttentionParams& p) {
  const int many = p.head_dim > 128 ? 64 : 128;
  SAPWOOD_CUDA_REQUIRE(p.num_kv_heads > 0 && p.num_kv_heads <= 65535 && p.group > 0,
                       "%s: num_kv_heads and group must be positive, got %d and %d", op, p.num_kv_heads, p.group);
  SAPWOOD_CUDA_REQUIRE(p.head_dim > 0 && p.head_dim % kPiece == 0 && p.head_dim <= 256,
                       "%s: head_dim must be a multiple of %d in %d..256, got %d", op, kPiece, kPiece, p.head_dim);
  SAPWOOD_CUDA_REQUIRE(p.page_size > 0, "%s: page_size must be positive, got %d", op, p.page_size);
  SAPWOOD_CUDA_REQUIRE(p.rows_per_tile == 16 || p.rows_per_tile == many,
                       "%s: rows_per_tile must be 16 or, where head_dim = %d, %d, got %d", op, p.head_dim, many,
                       p.rows_per_tile);
  SAPWOOD_CUDA_REQUIRE(p.chunk_len > 0 && p.chunk_len % SAPWOOD_CUDA_ATTENTION_MIN_CHUNK == 0,
                       "%s: chunk_len must be a positive multiple of %d, got %d", op, SAPWOOD_CUDA_ATTENTION_MIN_CHUNK,
                       p.chunk_len);
  SAPWOOD_CUDA_REQUIRE(p.window >= 0, "%s: window must not be negative, got %d", op, p.window);
  SAPWOOD_CUDA_REQUIRE(p.softcap >= 0.0f, "%s: softcap must not be negative, got %g", op, static_cast<double>(p.softcap));
  SAPWOOD_CUDA_REQUIRE(p.num_blocks > 0, "%s: num_blocks must be positive, got %d", op, p.num_blocks);
  SAPWOOD_CUDA_REQUIRE(p.num_pages > 0, "%s: num_pages must be positive, got %d", op, p.num_pages);
  const int64_t kv_width = static_cast<int64_t>(p.num_kv_heads) * p.head_dim, q_width = kv_width * p.group;
  SAPWOOD_CUDA_REQUIRE(p.q_stride >= q_width && p.q_stride % kPiece == 0,
                       "%s: q_stride must be a multiple of %d and at least %lld, got %lld", op, kPiece,
                       static_cast<long long>(q_width), static_cast<long long>(p.q_stride));
  SAPWOOD_CUDA_REQUIRE(p.out_stride >= q_width && p.out_stride % 2 == 0,
                       "%s: out_stride must be even and at least %lld, got %lld", op, static_cast<long long>(q_width),
                       static_cast<long long>(p.out_stride));
  SAPWOOD_CUDA_REQUIRE(p.page_stride >= kv_width * p.page_size && p.page_stride % kPiece == 0,
                       "%s: page_stride must be a multiple of %d and at least %lld, got %lld", op, kPiece,
                       static_cast<long long>(kv_width * p.page_size), static_cast<long long>(p.page_stride));
  SAPWOOD_CUDA_REQUIRE(p.q && p.out && p.k_pages && p.v_pages && p.page_table && p.page_rows && p.q_indptr &&
                           p.kv_lens && p.tiles && p.items && p.counts && p.partial_o && p.partial_ml,
                       "%s: no pointer but tickets, sinks, shared_tiles and shared_rows may be null", op);
  SAPWOOD_CUDA_REQUIRE(Aligned(p.q, 16) && Aligned(p.k_pages, 16) && Aligned(p.v_pages, 16) && Aligned(p.out, 4) &&
                           Aligned(p.partial_o, 8) && Aligned(p.partial_ml, 8) && Aligned(p.shared_rows, 16),
                       "%s: q, k_pages, v_pages and shared_rows must be aligned to 16 bytes, out to 4, partial_o and "
                       "partial_ml to 8",
                       op);
  SAPWOOD_CUDA_REQUIRE((p.shared_tiles == nullptr) == (p.shared_rows == nullptr) &&
                           (p.shared_tiles == nullptr || (p.rows_per_tile == 16 && p.window == 0)),
                       "%s: shared_tiles and shared_rows must both be null, or rows_per_tile 16 and window 0, got %d and %d",
                       op, p.rows_per_tile, p.window);
  return SAPWOOD_CUDA_OK;
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_attention(const SapwoodAttentionParams* params, void* stream) {
  SAPWOOD_CUDA_CHECK_STRUCT("attention", params);
  const SapwoodAttentionParams& p = *params;
  if (const int status = sapwood_cuda::Check("attention", p)) return status;
#ifdef SAPWOOD_CUDA_SM90
  if (sapwood_cuda::AttentionSm90Serves(p) && sapwood_cuda::Sm90Processors() > 0) {
    return sapwood_cuda::AttentionSm90(p, static_cast<cudaStream_t>(stream));
  }
#endif
  const auto launch = p.head_dim <= 64    ? sapwood_cuda::LaunchAttention<64>
                      : p.head_dim <= 128 ? sapwood_cuda::LaunchAttention<128>
                                          : sapwood_cuda::LaunchAttention<256>;
  launch(p, static_cast<cudaStream_t>(stream));
  return sapwood_cuda::LaunchStatus("attention");
}

int sapwood_cuda_attention_merge(const SapwoodAttentionParams* params, void* stream) {
  SAPWOOD_CUDA_CHECK_STRUCT("attention_merge", params);
  const SapwoodAttentionParams& p = *params;
  if (const int status = sapwood_cuda::Check("attention_merge", p)) return status;
  sapwood_cuda::Launch(sapwood_cuda::AttentionMergeKernel, dim3(p.num_blocks, p.num_kv_heads),
                       sapwood_cuda::kMergeWarps * sapwood_cuda::kWarp, 0, static_cast<cudaStream_t>(stream), p);
  return sapwood_cuda::LaunchStatus("attention_merge");
}
