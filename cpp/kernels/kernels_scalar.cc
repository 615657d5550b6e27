// Every op without intrinsics: any machine, and the level the others are compared with.
#define SAPWOOD_LEVEL scalar

#include "kernels/vec_scalar.h"
// After the vectors, which it is written against.
#include "kernels/ops.h"

namespace sapwood {

extern const KernelTable kScalarTable;
constexpr KernelTable kScalarTable = scalar::TableOf(Isa::kScalar);

}  // namespace sapwood
