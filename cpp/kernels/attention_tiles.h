// The fixed cuts of attention, and the scratch they need.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sapwood {
namespace {

inline constexpr int kTile = 64;          // keys per tile, at absolute multiples: one rescale of the output each
inline constexpr int kTilesPerChunk = 4;  // tiles per chunk, at absolute multiples: one merge each
inline constexpr int kBlockRows =
    24;  // (query, head) rows that share the reading of a tile; any number gives the same bits

// Per row: scores and probabilities [kTile], output of the chunk and of all chunks [padded_dim], all f32; one line to
// align.
[[maybe_unused]] inline size_t BlockScratchBytes(int32_t head_dim) {
  const size_t padded_dim = (static_cast<size_t>(head_dim) + 15) / 16 * 16;
  return kBlockRows * (2 * kTile + 2 * padded_dim) * sizeof(float) + 64;
}

}  // namespace
}  // namespace sapwood
