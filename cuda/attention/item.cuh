// What the attention kernels of both tiers have in common: where an item's rows come from and where its results go.
// Device code only.
#pragma once

#include <cstdint>

#include "attention/ranges.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"

namespace sapwood_cuda {

constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// To an absolute 2^-22, without tanhf's branches: beside the accumulators they cost registers that are not there.
__device__ __forceinline__ float Tanh(float x) { return 1.0f - __fdividef(2.0f, Exp2(2.0f * kLog2E * x) + 1.0f); }

// What an item is, for one KV head.
struct Item {
  int token_begin, first_row, num_rows, q_len, kv_len;
  KeyRange keys;  // those of the tile that lie in the chunk
  const int32_t* pages;
  bool partial;  // the tile has other chunks too
  int place;     // of the partial results; of shared rows: counted from each row's first place on
  const SapwoodAttentionSharedRow* shared_rows;  // of a shared tile, else null

  __device__ SapwoodAttentionSharedRow SharedRow(int row) const {
    const int4 all = *reinterpret_cast<const int4*>(shared_rows + row);
    return {all.x, all.y, all.z, all.w};
  }
};

template <bool kFewRows>
__device__ __forceinline__ Item ItemOf(const SapwoodAttentionParams& p, int index, int rows_per_tile) {
  const auto pages_of = [&](int segment) {
    return p.page_table + static_cast<int64_t>(p.page_rows[segment]) * p.table_stride;
  };
  const SapwoodAttentionItem item = p.items[index];
  Item of;
  of.shared_rows = nullptr;
  if constexpr (kFewRows) {
    if (item.tile < 0) {
      const int shared_tile = -1 - item.tile;
      const SapwoodAttentionSharedTile tile = p.shared_tiles[shared_tile];
      of.token_begin = of.first_row = of.q_len = of.kv_len = 0;  // each row has its own
      of.num_rows = tile.num_rows;
      of.keys = {item.chunk * p.chunk_len, (item.chunk + 1) * p.chunk_len};
      of.pages = pages_of(tile.segment);
      of.partial = true;
      of.place = item.chunk;
      of.shared_rows = p.shared_rows + shared_tile * SAPWOOD_CUDA_ATTENTION_SHARED_ROWS;
      return of;
    }
  }
  const SapwoodAttentionTile tile = p.tiles[item.tile];
  of.token_begin = p.q_indptr[tile.segment];
  of.q_len = p.q_indptr[tile.segment + 1] - of.token_begin;
  of.kv_len = p.kv_lens[tile.segment];
  of.first_row = tile.first_row;
  of.num_rows = min(rows_per_tile, of.q_len * p.group - tile.first_row);
  const KeyRange all = KeysOfRows(of.first_row, of.first_row + of.num_rows - 1, p.group, of.q_len, of.kv_len, p.window);
  of.keys = {max(all.begin, item.chunk * p.chunk_len), min(all.end, (item.chunk + 1) * p.chunk_len)};
  of.pages = pages_of(tile.segment);
  of.partial = tile.num_chunks > 1;
  // Many rows share no prefix: an item is a place.
  of.place = kFewRows ? tile.first_place + item.chunk - FirstChunk(all, p.chunk_len) : index;
  return of;
}

// Where a whole row's results go, and what they are multiplied by: 1 / sum, a sink counted in.
struct RowOutput {
  __nv_bfloat16* out;
  float weight;
};

// row_m, row_l: the state of the row's softmax over all its keys.
__device__ __forceinline__ RowOutput OutputOf(const SapwoodAttentionParams& p, const Item& item, int kv_head, int row,
                                              float row_m, float row_l) {
  const int packed = item.first_row + row, query = packed / p.group, head = kv_head * p.group + packed % p.group;
  float weight = 1.0f;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[head] * kLog2E, most = fmaxf(row_m, sink);
    weight = Exp2(row_m - most);
    row_l = row_l * weight + Exp2(sink - most);
  }
  return {static_cast<__nv_bfloat16*>(p.out) + static_cast<int64_t>(item.token_begin + query) * p.out_stride +
              static_cast<int64_t>(head) * p.head_dim,
          weight / row_l};
}

// A row of many, summed over all keys of the item: to the output, or to the partial results. The four lanes of a row each
// have dims 8 n + 2 (lane % 4) and + 1: value(n, 0) and value(n, 1).
template <int kDim, typename Value>
__device__ __forceinline__ void EmitRow(const SapwoodAttentionParams& p, const Item& item, int kv_head, int rows_per_tile,
                                        int row, float row_m, float row_l, const Value& value) {
  if (row >= item.num_rows) return;
  const int dim = threadIdx.x % 4 * 2;
  if (item.partial) {
    const int64_t at = (static_cast<int64_t>(item.place) * p.num_kv_heads + kv_head) * rows_per_tile + row;
    float* const to = p.partial_o + at * p.head_dim + dim;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      if (8 * n < p.head_dim) *reinterpret_cast<float2*>(to + 8 * n) = make_float2(value(n, 0), value(n, 1));
    }
    if (dim == 0) *reinterpret_cast<float2*>(p.partial_ml + 2 * at) = make_float2(row_m, row_l);
    return;
  }
  const RowOutput to = OutputOf(p, item, kv_head, row, row_m, row_l);
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    if (8 * n < p.head_dim) {
      *reinterpret_cast<__nv_bfloat162*>(to.out + dim + 8 * n) =
          __floats2bfloat162_rn(value(n, 0) * to.weight, value(n, 1) * to.weight);
    }
  }
}

}  // namespace sapwood_cuda
