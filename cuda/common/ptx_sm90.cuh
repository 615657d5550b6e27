// The PTX of compute capability 9.0: mbarriers, tensor copies (TMA), warp group products (wgmma). For files that are
// compiled for 90a alone. tests/cuda/emulator/emulator_sm90.h has the same functions for the CPU. Device code but for
// EncodeTensorMap.
//
// Shared memory is reached by ordinary loads and stores, and by TMA and wgmma through the "async proxy": what one has
// written the other sees only behind AsyncProxyFence and a barrier; mbarriers order what TMA writes and wgmma reads.
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"

#ifdef __CUDACC__

#include <cuda.h>

#include <cstdint>

namespace sapwood_cuda {

// --- TMA ------------------------------------------------------------------------------------------------------------

// A tensor of bf16 in global memory, dimension 0 without gaps, and a box of it that one instruction copies into shared
// memory, a box's rows of 64 elements (128 bytes) one behind the other. Its 16-byte pieces are permuted: bits 4 to 6 of
// the shared address are xored with bits 7 to 9, which is what wgmma reads as a 128-byte swizzle.
struct TensorBox {
  const void* base;     // aligned to 16 bytes
  uint64_t dims[4];     // elements; beyond them zeros are copied
  uint64_t strides[3];  // of dimensions 1 to 3, bytes; multiples of 16
  uint32_t box[4];      // box[0] = 64, the others at most 256
};

// Host code. 0, or a CUDA error: the driver has no such function, or it refuses the tensor.
inline int EncodeTensorMap(CUtensorMap* map, const TensorBox& t) {
  static const auto encode = [] {  // of the driver, which is there only where there is a device
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  if (encode == nullptr) {
    cudaGetLastError();  // of the search: else the next launch reports it as its own
    return cudaErrorNotSupported;
  }
  const uint32_t every[4] = {1, 1, 1, 1};
  const CUresult status =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(t.base), t.dims, t.strides, t.box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? 0 : static_cast<int>(cudaErrorInvalidValue);
}

// An mbarrier is 8 bytes of shared memory. Its phases end when `arrivals` threads have arrived and all bytes that they
// announced have been copied; then the next begins. They count 0, 1, 0, 1: a wait for parity p is over when the current
// phase is of the other parity, so one for 1 is over at once on a new barrier.
__device__ __forceinline__ void MbarrierInit(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(arrivals) : "memory");
}
// Makes a thread's MbarrierInit known to TMA; comes before the __syncthreads that the other threads wait at.
__device__ __forceinline__ void MbarrierInitFence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void MbarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
__device__ __forceinline__ void MbarrierArriveExpect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void MbarrierWait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra wait;\n}" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

// One thread: the box that begins at (c0, c1, c2, c3), to shared memory aligned to 1024 bytes; the barrier's phase waits
// for the whole box's bytes. map: a __grid_constant__ parameter.
__device__ __forceinline__ void TmaLoad(void* shared, const CUtensorMap& map, uint64_t* barrier, int c0, int c1, int c2,
                                        int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          SharedAddress(shared)),
      "l"(&map), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// --- Warp groups ----------------------------------------------------------------------------------------------------

// Barrier `id` (1 to 15; 0 is __syncthreads) of `threads` threads: those that wait, and those that only arrive.
__device__ __forceinline__ void NamedBarrierSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void NamedBarrierArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void AsyncProxyFence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// All threads of a warp group: each has so many registers from here on.
template <int kRegisters>
__device__ __forceinline__ void GiveUpRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void ClaimRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- wgmma ----------------------------------------------------------------------------------------------------------

// The matrix b [16 k][N] of a product, in shared memory as TmaLoad leaves it (rows of 128 bytes):
//   rows are columns of b, 16 k of each: eight rows at a time lie stride_bytes apart; leading_bytes has no meaning (16).
//     Further k: the address of the first row + 32 bytes
//   rows are k (kTransposed), 64 columns of b each: eight k at a time lie stride_bytes apart, 64 columns leading_bytes
// (PTX ISA, matrix descriptor of wgmma; the numbers are those of CUTLASS's make_gmma_desc.)
__device__ __forceinline__ uint64_t MatrixDescriptor(const void* shared, int leading_bytes, int stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | static_cast<uint64_t>(stride_bytes >> 4) << 32 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         (SharedAddress(shared) & 0x3ffff) >> 4;
}

// Before the first product of a group: what registers have been written with is there for it.
__device__ __forceinline__ void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products since the last commit become a group.
__device__ __forceinline__ void WgmmaCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the youngest kLeft groups of this warp group are done, among them that of d. The empty asm keeps the compiler
// from reading d before.
template <int kLeft, int kCount>
__device__ __forceinline__ void WgmmaWait(float (&d)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define SAPWOOD_F8(d, i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])

// d[64][N] (+)= a[64][16] b[16][N], bf16 with f32 sums, by the four warps of a warp group together. Warp w has rows 16 w
// .. 16 w + 15, a lane of it of each 16 x 8 the elements that it has of MmaBf16's d, d[4 n ..] those of columns 8 n ..; a
// likewise. Runs on until it is waited for: until then d and a's registers may not be touched, nor b's memory.
template <bool kTransposed>
__device__ __forceinline__ void Wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
      : SAPWOOD_F8(d, 0), SAPWOOD_F8(d, 8), SAPWOOD_F8(d, 16), SAPWOOD_F8(d, 24),
        SAPWOOD_F8(d, 32), SAPWOOD_F8(d, 40), SAPWOOD_F8(d, 48), SAPWOOD_F8(d, 56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),
        "n"(static_cast<int>(kTransposed)));
}
template <bool kTransposed>
__device__ __forceinline__ void Wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
      : SAPWOOD_F8(d, 0), SAPWOOD_F8(d, 8), SAPWOOD_F8(d, 16), SAPWOOD_F8(d, 24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),
        "n"(static_cast<int>(kTransposed)));
}

#undef SAPWOOD_F8

}  // namespace sapwood_cuda

#else
#include "emulator_sm90.h"
#endif
