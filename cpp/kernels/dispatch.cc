// Which ISA levels this machine has and this build was compiled for, and their tables.
#include <string>
#include <string_view>

#include "base/check.h"
#include "kernels/attention_tiles.h"
#include "kernels/kernels.h"

namespace sapwood {

extern const KernelTable kScalarTable;
// CMake says which are compiled (SAPWOOD_CPU_LEVELS); they exist on x86-64 only.
#if defined(SAPWOOD_LEVEL_AVX2)
extern const KernelTable kAvx2Table;
#endif
#if defined(SAPWOOD_LEVEL_AVX512)
extern const KernelTable kAvx512Table;
#endif
#if defined(SAPWOOD_LEVEL_AVX512_BF16)
extern const KernelTable kAvx512Bf16Table;
#endif

namespace {

constexpr Isa kLevels[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

// Null: not compiled.
const KernelTable* CompiledTable(Isa isa) {
  switch (isa) {
#if defined(SAPWOOD_LEVEL_AVX2)
    case Isa::kAvx2: return &kAvx2Table;
#endif
#if defined(SAPWOOD_LEVEL_AVX512)
    case Isa::kAvx512: return &kAvx512Table;
#endif
#if defined(SAPWOOD_LEVEL_AVX512_BF16)
    case Isa::kAvx512Bf16: return &kAvx512Bf16Table;
#endif
    case Isa::kScalar: return &kScalarTable;
    default: return nullptr;
  }
}

}  // namespace

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
  }
  throw InternalError(StrCat("no ISA level ", static_cast<int>(isa)));
}

bool IsaSupported(Isa isa) {
  if (isa == Isa::kScalar) return true;
  if (CompiledTable(isa) == nullptr) return false;
#if defined(__x86_64__)
  // These tests include XCR0: whether the operating system saves the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::kAvx2: return avx2;
    case Isa::kAvx512: return avx512;
    case Isa::kAvx512Bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    default: return false;
  }
#else
  return false;
#endif
}

Isa BestIsa() {
  Isa best = Isa::kScalar;
  for (Isa isa : kLevels) {
    if (IsaSupported(isa)) best = isa;
  }
  return best;
}

Isa ParseIsa(const char* name) {
  const std::string_view wanted = name ? name : "";
  if (wanted.empty() || wanted == "auto") return BestIsa();
  std::string available;
  for (Isa isa : kLevels) {
    if (!IsaSupported(isa)) continue;
    if (wanted == IsaName(isa)) return isa;
    available += available.empty() ? "" : ", ";
    available += IsaName(isa);
  }
  throw InvalidArgument(StrCat("isa must be auto or a level of this machine and build (", available, "), got \"",
                               wanted,
                               "\"; unset SAPWOOD_CPU_ISA to use the best one"));
}

const KernelTable& Kernels(Isa isa) {
  SAPWOOD_REQUIRE(IsaSupported(isa), "isa must be a level of this machine and build, got ", IsaName(isa));
  return *CompiledTable(isa);
}

size_t AttentionScratchBytes(int32_t /*group_size*/, int32_t head_dim) { return BlockScratchBytes(head_dim); }

size_t AttentionPartialFloats(int32_t head_dim) { return PartialFloats(head_dim); }

}  // namespace sapwood
