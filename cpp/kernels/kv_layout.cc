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

void ReadInt8Token(const KvLayout& layout, const int8_t* page, int64_t offset, float* k, float* v) {
  const int64_t padded_dim = layout.padded_dim(), page_size = layout.page_size, head_dim = layout.head_dim;
  for (int64_t head = 0; head < layout.num_kv_heads; ++head) {
    const int8_t* const k_block = page + 2 * head * (layout.block_bytes() + layout.scale_bytes());
    const int8_t* const v_block = k_block + layout.block_bytes();
    const auto* const scales = reinterpret_cast<const float*>(v_block + layout.block_bytes()) + offset;
    for (int64_t d = 0; d < head_dim; ++d) {
      k[head * head_dim + d] = static_cast<float>(k_block[d * page_size + offset]) * scales[0];
      v[head * head_dim + d] = static_cast<float>(v_block[offset * padded_dim + d]) * scales[page_size];
    }
  }
}

}  // namespace

void ReadKvToken(const KvLayout& layout, const void* page, int32_t offset, void* k, void* v) {
  SAPWOOD_REQUIRE(offset >= 0 && offset < layout.page_size, "offset must be in [0, ", layout.page_size, "), got ",
                  offset);
  switch (layout.dtype) {
    case DType::kF32:
      return ReadToken(layout, static_cast<const float*>(page), offset, static_cast<float*>(k), static_cast<float*>(v));
    case DType::kBF16:
      return ReadToken(layout, static_cast<const uint16_t*>(page), offset, static_cast<uint16_t*>(k),
                       static_cast<uint16_t*>(v));
    case DType::kI8:
      return ReadInt8Token(layout, static_cast<const int8_t*>(page), offset, static_cast<float*>(k),
                           static_cast<float*>(v));
    default:
      throw InvalidArgument(
          StrCat("KvLayout.dtype must be f32, bf16 or int8, got dtype ", static_cast<int>(layout.dtype)));
  }
}

}  // namespace sapwood
