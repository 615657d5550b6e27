// What a page is: page_size consecutive tokens of one KvGroup.
#pragma once

#include <cstdint>

namespace sapwood {

using PageId = int32_t;  // index into one group's pool
inline constexpr PageId kNoPage = -1;
inline constexpr int64_t kNoStep = -1;

enum class KvKind : uint8_t {
  kFull,    // every earlier token is needed
  kWindow,  // only the last `window` tokens are needed
  kLatent,  // as kFull, one compressed row per token (MLA)
  kState,   // recurrent state; not implemented by this version
};

// Layers that share one page table. A plain decoder has one group; a model that mixes full and
// sliding-window layers has two. All groups of one cache share one page_size: the radix tree is
// cut at pages, and a prefix is valid where every group holds what it needs.
struct KvGroup {
  KvKind kind = KvKind::kFull;
  int32_t window = 0;     // tokens a query sees, itself included; > 0 iff kind == kWindow
  int32_t num_layers = 1;
  int32_t page_size = 16;  // tokens, 1..64
  int64_t page_bytes = 0;  // bytes of one page over all its layers; 0 where there is no memory behind it
};

// One page's contents to be copied before a step's forward runs (fork at an unaligned position).
struct PageCopy {
  int32_t group;
  PageId src;
  PageId dst;
};

}  // namespace sapwood
