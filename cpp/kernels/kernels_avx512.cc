// Every op for AVX512 F, BW, VL, DQ and VNNI; bf16 products are converted to f32.
#define SAPWOOD_LEVEL avx512

#include "kernels/vec_avx512.h"
// After the vectors, which it is written against.
#include "kernels/ops.h"

namespace sapwood {

extern const KernelTable kAvx512Table;
constexpr KernelTable kAvx512Table = avx512::TableOf(Isa::kAvx512);

}  // namespace sapwood
