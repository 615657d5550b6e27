// Where a head is in a page: KvLayout's own members have external linkage and are not called here (see level.h).
#pragma once

#include "kernels/level.h"

namespace sapwood::SAPWOOD_LEVEL {

// Bytes: K's block at first, V's block_bytes further, after both int8's scales of K, those of V scale_bytes further.
template <typename Kv>
struct HeadInPage {
  int64_t padded_dim, block_bytes, scale_bytes, page_bytes, first;

  HeadInPage(const KvLayout& layout, int64_t kv_head)
      : padded_dim((layout.head_dim + 15) / 16 * 16),
        block_bytes(padded_dim * layout.page_size * static_cast<int64_t>(sizeof(Kv))),
        scale_bytes(sizeof(Kv) == 1 ? layout.page_size * static_cast<int64_t>(sizeof(float)) : 0),
        page_bytes(2 * (block_bytes + scale_bytes) * layout.num_kv_heads),
        first(2 * (block_bytes + scale_bytes) * kv_head) {}
};

}  // namespace sapwood::SAPWOOD_LEVEL
