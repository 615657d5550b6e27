// The PTX that CUDA C++ has no words for, sm_80 and later: asynchronous copies into shared memory, ldmatrix, mma.
// tests/cuda/emulator/emulator.h has the same functions for the CPU. Device code only.
#pragma once

#include "common/launch.cuh"

#ifdef __CUDACC__

#include <cstdint>

namespace sapwood_cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes, both addresses multiples of 16, past L1; where not valid zeros are written and global is not read.
__device__ __forceinline__ void CpAsync16(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)), "l"(global), "r"(bytes)
               : "memory");
}
// The copies of this thread since the last one become a group.
__device__ __forceinline__ void CpAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the youngest kLeft groups of this thread have arrived; other threads see them after a barrier.
template <int kLeft>
__device__ __forceinline__ void CpAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// x, of which nothing is computed earlier than here: before a loop, say, that has no registers for it.
__device__ __forceinline__ int NotBefore(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The 32 bytes around an address on their way into L2.
__device__ __forceinline__ void PrefetchL2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Four 8 x 8 matrices of 16-bit elements: lanes 8 i .. 8 i + 7 name the rows of matrix i, lane l gets of each row l / 4,
// elements 2 (l % 4) and + 1.
__device__ __forceinline__ void LdMatrix4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(SharedAddress(row))
               : "memory");
}
// The same of the matrices transposed: column l / 4, rows 2 (l % 4) and + 1.
__device__ __forceinline__ void LdMatrix4Transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// 2^x to about 2 ulp, subnormals as zero; 2^-inf = 0.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// d[16][8] += a[16][16] b[16][8], bf16 with f32 sums. With g = lane / 4 and t = lane % 4 a lane holds
//   a: rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8 (pairs); b: rows 2t, 2t + 8 (pairs) of column g;
//   d: row g columns 2t, 2t + 1, then row g + 8.
__device__ __forceinline__ void MmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace sapwood_cuda

#endif
