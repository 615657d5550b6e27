// Every op for AVX2 + FMA + F16C; compiled with exactly these.
#define SAPWOOD_LEVEL avx2

#include "kernels/vec_avx2.h"
// After the vectors, which it is written against.
#include "kernels/ops.h"

namespace sapwood {

extern const KernelTable kAvx2Table;
constexpr KernelTable kAvx2Table = avx2::TableOf(Isa::kAvx2);

}  // namespace sapwood
