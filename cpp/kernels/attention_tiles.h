// The fixed cuts of attention, and the memory they need.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace sapwood {
namespace {

inline constexpr int kTile = 64;  // keys per tile, at absolute multiples: one rescale of the output each
inline constexpr int kTilesPerChunk = kAttentionChunk / kTile;  // chunks at absolute multiples too: one merge each
static_assert(kAttentionChunk % kTile == 0);
// (query, head) rows that share the reading of a tile; any number gives the same bits. Enough that widening a tile
// costs little beside multiplying it, few enough that rows, tile and outputs stay in 512 KB of L2 at head_dim 128.
inline constexpr int kBlockRows = 96;

[[maybe_unused]] inline size_t PaddedDim(int32_t head_dim) { return (static_cast<size_t>(head_dim) + 15) / 16 * 16; }

// f32 of one vector of 16 dims of a widened V tile: a line more than it has, so that the vectors of a token do not all
// fall into one set of the cache.
inline constexpr size_t kWideVector = (kTile + 1) * 16;

// Of rows: q and both outputs [padded_dim], scores and probabilities in one place [kTile]; of a tile: K [kTile] and V
// widened. All f32; one line to align.
[[maybe_unused]] inline size_t BlockScratchBytes(int32_t head_dim) {
  const size_t padded_dim = PaddedDim(head_dim);
  return (kBlockRows * (3 * padded_dim + kTile) + kTile * padded_dim + padded_dim / 16 * kWideVector) * sizeof(float) +
         64;
}

// One row's (O, m, l) of one chunk: O [padded_dim], then m and l at the start of a line of their own.
[[maybe_unused]] inline size_t PartialFloats(int32_t head_dim) { return PaddedDim(head_dim) + 16; }

}  // namespace
}  // namespace sapwood
