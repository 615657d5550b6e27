// Every op for AVX512 with BF16: as level avx512, bf16 products by VDPBF16PS.
#define SAPWOOD_LEVEL avx512_bf16
#define SAPWOOD_BF16_DOT

#include "kernels/vec_avx512.h"
// After the vectors, which it is written against.
#include "kernels/ops.h"

namespace sapwood {

extern const KernelTable kAvx512Bf16Table;
constexpr KernelTable kAvx512Bf16Table = avx512_bf16::TableOf(Isa::kAvx512Bf16);

}  // namespace sapwood
