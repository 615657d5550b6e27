// moe_gemm on compute capability 9.0: CUTLASS's grouped GEMM (a persistent kernel: one warp group fetches by TMA, two
// multiply by wgmma, in turns, so that one's epilogue hides behind the other's products).
//
// A group is an expert. How many rows it has is known on the device only, so a kernel of one block writes the groups'
// sizes, addresses and strides into the workspace, and the GEMM's scheduler reads them there: what is launched does not
// depend on the routing, and a captured graph serves every one. Behind them in the workspace CUTLASS keeps the tensor
// maps that each multiprocessor rewrites when it comes to another group.
//
// Tile: 128 rows x 128 columns x 64 k. A cluster is two tiles side by side in n, which share the fetch of their rows of
// x: with 128 x 128 alone a multiprocessor at full rate would draw 32 bytes a clock from L2, more than its share. The
// other way round (two tiles of rows sharing a weight) a cluster's second half would be idle for experts of up to 128
// rows.
// Order of sums: k ascending, never split.
#include <cstdint>

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "common/check.cuh"
#include "common/launch.cuh"
#include "moe/gemm_sm90.cuh"

namespace sapwood_cuda {
namespace {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_64;
using Bf16 = cutlass::bfloat16_t;

constexpr int kAlignment = 8;  // elements, of every row's beginning
constexpr int kThreads = 128;
constexpr int64_t kPartBytes = 256;  // parts of the workspace begin at multiples

using Problem = cute::Shape<int, int, int>;  // m, n, k
using Groups = cutlass::gemm::GroupProblemShape<Problem>;
using TileShape = cute::Shape<_128, _128, _64>;
using ClusterShape = cute::Shape<_1, _2, _1>;

// y = products; there is no y to begin with (void).
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::RowMajor*, kAlignment, Bf16,
    cutlass::layout::RowMajor*, kAlignment, cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong>::CollectiveOp;

using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Bf16, cutlass::layout::RowMajor*, kAlignment, Bf16,
    cutlass::layout::ColumnMajor*, kAlignment, float, TileShape, ClusterShape,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong>::CollectiveOp;

using GemmKernel = cutlass::gemm::kernel::GemmUniversal<Groups, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<GemmKernel>;
using StrideA = typename GemmKernel::InternalStrideA;
using StrideB = typename GemmKernel::InternalStrideB;
using StrideD = typename GemmKernel::InternalStrideD;

// The arrays over groups, and what is CUTLASS's own.
struct Workspace {
  Problem* problems;
  const Bf16** a;
  const Bf16** b;
  Bf16** d;
  StrideA* stride_a;
  StrideB* stride_b;
  StrideD* stride_d;
  void* cutlass;
  int64_t own_bytes;  // of all before `cutlass`
};

Workspace Lay(void* memory, int num_experts) {
  int64_t used = 0;
  const auto part = [&](auto* of) {
    auto* const at = reinterpret_cast<decltype(of)>(reinterpret_cast<uintptr_t>(memory) + used);
    used += (num_experts * static_cast<int64_t>(sizeof(*of)) + kPartBytes - 1) / kPartBytes * kPartBytes;
    return at;
  };
  Workspace w;
  w.problems = part(static_cast<Problem*>(nullptr));
  w.a = part(static_cast<const Bf16**>(nullptr));
  w.b = part(static_cast<const Bf16**>(nullptr));
  w.d = part(static_cast<Bf16**>(nullptr));
  w.stride_a = part(static_cast<StrideA*>(nullptr));
  w.stride_b = part(static_cast<StrideB*>(nullptr));
  w.stride_d = part(static_cast<StrideD*>(nullptr));
  w.cutlass = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(memory) + used);
  w.own_bytes = used;
  return w;
}

__global__ void __launch_bounds__(kThreads) MoeGemmGroupsKernel(const SapwoodMoeGemmParams p, const Workspace w) {
  AwaitPredecessor();
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) {
    const int64_t begin = p.expert_offsets[e];
    w.problems[e] = Problem(p.expert_offsets[e + 1] - static_cast<int>(begin), p.n, p.k);
    w.a[e] = static_cast<const Bf16*>(p.x) + begin * p.x_stride;
    w.b[e] = static_cast<const Bf16*>(p.weight) + e * p.expert_stride;
    w.d[e] = static_cast<Bf16*>(p.y) + begin * p.y_stride;
    w.stride_a[e] = cute::make_stride(p.x_stride, _1{}, cute::_0{});
    w.stride_b[e] = cute::make_stride(p.weight_stride, _1{}, cute::_0{});
    w.stride_d[e] = cute::make_stride(p.y_stride, _1{}, cute::_0{});
  }
}

typename Gemm::Arguments Arguments(const Workspace& w, int num_experts, int num_processors) {
  typename Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
  arguments.problem_shape = {num_experts, w.problems, nullptr};
  arguments.mainloop = {w.a, w.stride_a, w.b, w.stride_b};
  arguments.epilogue = {{}, nullptr, nullptr, w.d, w.stride_d};
  arguments.epilogue.thread.alpha = 1.0f;
  arguments.epilogue.thread.beta = 0.0f;
  arguments.hw_info.sm_count = num_processors;
  return arguments;
}

}  // namespace

int64_t MoeGemmSm90WorkspaceBytes(int num_experts, int num_processors) {
  const Workspace w = Lay(nullptr, num_experts);
  return w.own_bytes + static_cast<int64_t>(Gemm::get_workspace_size(Arguments(w, num_experts, num_processors)));
}

int MoeGemmSm90(const SapwoodMoeGemmParams& p, int num_processors, cudaStream_t stream) {
  const Workspace w = Lay(p.workspace, p.num_experts);
  Launch(MoeGemmGroupsKernel, 1, kThreads, 0, stream, p, w);
  if (const int status = LaunchStatus("moe_gemm: sizes of groups"); status != SAPWOOD_CUDA_OK) return status;
  Gemm gemm;
  cutlass::Status status = gemm.initialize(Arguments(w, p.num_experts, num_processors), w.cutlass, stream);
  // Not launch_with_pdl: this kernel of CUTLASS 4.2 does not await its predecessor.
  if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
  if (status != cutlass::Status::kSuccess) {
    if (const int error = LaunchStatus("moe_gemm"); error != SAPWOOD_CUDA_OK) return error;
    return Fail(cudaErrorLaunchFailure, "moe_gemm: CUTLASS refuses the launch: %s",
                cutlass::cutlassGetStatusString(status));
  }
  return LaunchStatus("moe_gemm");
}

}  // namespace sapwood_cuda
