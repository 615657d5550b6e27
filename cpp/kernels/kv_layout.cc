// The canonical order of what a page holds: for export, dumps and tests, never on the path of a step.
#include "base/check.h"
#include "kernels/kernels.h"

namespace sapwood {
namespace {

template <typename T>
void ReadToken(const KvLayout& layout, const T* page, int64_t offset, T* k, T* v) {
  const int64_t pair = sizeof(T) == 2 ? 2 : 1;  // bf16 interleaves two dims of K, two tokens of V
  const int64_t padded_dim = layout.padded_dim(), page_size = layout.page_size, head_dim = layout.head_dim;
  for (int64_t head = 0; head < layout.num_kv_heads; ++head) {
    const T* k_block = page + 2 * head * padded_dim * page_size;
    const T* v_block = k_block + padded_dim * page_size;
    for (int64_t d = 0; d < head_dim; ++d) {
      k[head * head_dim + d] = k_block[(d / pair * page_size + offset) * pair + d % pair];
      v[head * head_dim + d] = v_block[(offset / pair * padded_dim + d) * pair + offset % pair];
    }
  }
}

}  // namespace

void ReadKvToken(const KvLayout& layout, const void* page, int32_t offset, void* k, void* v) {
  SAPWOOD_REQUIRE(offset >= 0 && offset < layout.page_size, "offset must be in [0, ", layout.page_size, "), got ",
                  offset);
  SAPWOOD_REQUIRE(layout.dtype == DType::kF32 || layout.dtype == DType::kBF16,
                  "KvLayout.dtype must be f32 or bf16, got dtype ", static_cast<int>(layout.dtype));
  if (layout.dtype == DType::kF32) {
    ReadToken(layout, static_cast<const float*>(page), offset, static_cast<float*>(k), static_cast<float*>(v));
  } else {
    ReadToken(layout, static_cast<const uint16_t*>(page), offset, static_cast<uint16_t*>(k), static_cast<uint16_t*>(v));
  }
}

}  // namespace sapwood
