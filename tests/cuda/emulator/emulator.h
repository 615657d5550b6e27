// CUDA C++ on the CPU, for tests: what cuda/ uses of the language, the runtime and bf16, and of PTX through
// cuda/common/ptx.cuh. The same sources, compiled by a C++ compiler with this folder before CUDA's headers, become a
// library whose launchers take host pointers: what a kernel computes is checked where no GPU is.
//
// A block's threads are fibers of one OS thread, blocks run one after the other. A fiber runs until it waits: at a
// barrier, or in a warp's exchange (shuffle, vote, ldmatrix, mma) for its 31 neighbours. Hence:
//   - between two waits a thread runs alone, and of those that can run always the first in order, so a missing barrier
//     shows only where the order is against it: SAPWOOD_EMULATOR_ORDER = ascending (default), descending, or a number,
//     which seeds an order for each block;
//   - dynamic shared memory begins as NaN in every block; what cp.async fetches arrives when it is waited for and not
//     before, its place is NaN until then;
//   - a barrier or an exchange that some thread never reaches, or that differs among a warp's lanes, ends the launch
//     with an error that says who waits for what;
//   - rounding is that of the operations written (build with -ffp-contract=off), but approximations (exp2, rsqrt) are
//     exact ones, and an mma sums its products in double.
// One launch at a time: the machine is one for the process, and not locked.
// It does not know of speed, occupancy, bank conflicts, memory models, or of races between blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

// --- The language ---------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static  // one block at a time
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

struct Thread {
  dim3 thread, block, block_dim, grid_dim;
};
const Thread& Current();
unsigned char* DynamicShared();

// Runs the kernel over the grid; the outcome is cudaGetLastError's.
void Run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

void Barrier();
int BarrierReduce(int value, bool all);  // __syncthreads_or, _and

// What all lanes of a warp deposited in the same call of the same kind. mask: the lanes that take part, all of the
// block's threads in this warp.
enum class Exchange { kSync, kShuffle, kVote, kLdMatrix, kMma, kWgmma };
constexpr size_t kDeposit = 64;
using Deposits = unsigned char[32][kDeposit];
const Deposits& Meet(Exchange kind, unsigned mask, const void* deposit, size_t bytes);
int Lane();

void CpAsync(void* shared, const void* global, int bytes, int valid_bytes);
void CpAsyncCommit();
void CpAsyncWait(int groups_left);

// A thread that ends without ends the launch with an error.
void AwaitPredecessor();

// As the hardware numbers shared memory. A block's dynamic part does not begin at a multiple of more than 128.
uint32_t SharedAddress(const void* shared);

}  // namespace emulator

#define threadIdx (::emulator::Current().thread)
#define blockIdx (::emulator::Current().block)
#define blockDim (::emulator::Current().block_dim)
#define gridDim (::emulator::Current().grid_dim)
#define warpSize 32

inline void __syncthreads() { ::emulator::Barrier(); }
inline int __syncthreads_or(int value) { return ::emulator::BarrierReduce(value, false); }
inline int __syncthreads_and(int value) { return ::emulator::BarrierReduce(value, true); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::emulator::Meet(::emulator::Exchange::kSync, mask, nullptr, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = ::emulator::Lane();
  const auto& all = ::emulator::Meet(::emulator::Exchange::kShuffle, mask, &value, sizeof(T));
  T out;
  std::memcpy(&out, all[lane / width * width + (source & (width - 1))], sizeof(T));
  return out;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step, int width = 32) {
  const int lane = ::emulator::Lane(), from = lane ^ step;
  const auto& all = ::emulator::Meet(::emulator::Exchange::kShuffle, mask, &value, sizeof(T));
  T out;
  std::memcpy(&out, all[from / width > lane / width ? lane : from], sizeof(T));
  return out;
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32) {
  const int lane = ::emulator::Lane(), from = lane - static_cast<int>(step);
  const auto& all = ::emulator::Meet(::emulator::Exchange::kShuffle, mask, &value, sizeof(T));
  T out;
  std::memcpy(&out, all[from < lane / width * width ? lane : from], sizeof(T));
  return out;
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32) {
  const int lane = ::emulator::Lane(), from = lane + static_cast<int>(step);
  const auto& all = ::emulator::Meet(::emulator::Exchange::kShuffle, mask, &value, sizeof(T));
  T out;
  std::memcpy(&out, all[from >= (lane / width + 1) * width ? lane : from], sizeof(T));
  return out;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned char set = predicate != 0;
  const auto& all = ::emulator::Meet(::emulator::Exchange::kVote, mask, &set, 1);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && all[lane][0]) bits |= 1u << lane;
  }
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Of 32-bit integers, over the lanes of mask (sm_80 and later).
namespace emulator {
template <typename T, typename Fold>
T Reduce(unsigned mask, T value, Fold fold) {
  static_assert(sizeof(T) == 4);
  const auto& all = Meet(Exchange::kVote, mask, &value, sizeof(T));
  T out = value;
  for (int lane = 0; lane < 32; ++lane) {
    T other;
    std::memcpy(&other, all[lane], sizeof(T));
    if (mask >> lane & 1 && lane != Lane()) out = fold(out, other);
  }
  return out;
}
}  // namespace emulator
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return ::emulator::Reduce(mask, value, [](T a, T b) { return std::max(a, b); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return ::emulator::Reduce(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return ::emulator::Reduce(mask, value, [](T a, T b) { return static_cast<T>(a + b); });
}

// --- Arithmetic -----------------------------------------------------------------------------------------------------

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline float rsqrtf(float a) { return __frsqrt_rn(a); }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __fdividef(float a, float b) { return a / b; }
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
inline int min(int a, unsigned b) { return a < static_cast<int>(b) ? a : static_cast<int>(b); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
// Byte i of the result is byte selector >> 4 i & 7 of {a, b}.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(both >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  return out;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}
// Truncates; the nearest end of the range where it is outside, 0 for NaN.
inline unsigned __float2uint_rz(float a) {
  return !(a > 0.0f) ? 0u : a >= 4294967296.0f ? 0xffffffffu : static_cast<unsigned>(a);
}

namespace emulator {
template <typename To, typename From>
To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace emulator
inline float __uint_as_float(unsigned a) { return ::emulator::BitCast<float>(a); }
inline float __int_as_float(int a) { return ::emulator::BitCast<float>(a); }
inline unsigned __float_as_uint(float a) { return ::emulator::BitCast<unsigned>(a); }
inline int __float_as_int(float a) { return ::emulator::BitCast<int>(a); }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T, typename U>
T atomicAdd(T* p, U value) {
  const T before = *p;
  *p = before + static_cast<T>(value);
  return before;
}
template <typename T, typename U>
T atomicMax(T* p, U value) {
  const T before = *p;
  *p = std::max(before, static_cast<T>(value));
  return before;
}
template <typename T, typename U>
T atomicMin(T* p, U value) {
  const T before = *p;
  *p = std::min(before, static_cast<T>(value));
  return before;
}
template <typename T, typename U>
T atomicOr(T* p, U value) {
  const T before = *p;
  *p = before | static_cast<T>(value);
  return before;
}
template <typename T, typename U>
T atomicAnd(T* p, U value) {
  const T before = *p;
  *p = before & static_cast<T>(value);
  return before;
}
template <typename T, typename U, typename V>
T atomicCAS(T* p, U expected, V value) {
  const T before = *p;
  if (before == static_cast<T>(expected)) *p = static_cast<T>(value);
  return before;
}

// --- bf16 -----------------------------------------------------------------------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 a) { return __uint_as_float(unsigned{a.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  const unsigned bits = __float_as_uint(a);
  if (a != a) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {__bfloat162float(a.x), __bfloat162float(a.y)}; }

// --- The runtime ----------------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
// A device of compute capability 9.0.
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : attribute == cudaDevAttrMultiProcessorCount ? 4 : 0;
  return cudaSuccess;
}
// Streams run what they are given at once.
inline cudaError_t cudaLaunchHostFunc(cudaStream_t, void (*function)(void*), void* data) {
  function(data);
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

// --- As cuda/common/launch.cuh and ptx.cuh have them for nvcc ---------------------------------------------------------

#define SAPWOOD_DYNAMIC_SHARED(name) unsigned char* const name = ::emulator::DynamicShared()

namespace sapwood_cuda {

inline void AwaitPredecessor() { ::emulator::AwaitPredecessor(); }

template <typename... Params, typename... Args>
void Launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, Args... args) {
  ::emulator::Run(grid, block, shared_bytes, [=] { kernel(args...); });
}

inline uint32_t SharedAddress(const void* shared) { return ::emulator::SharedAddress(shared); }
inline void CpAsync16(void* shared, const void* global, bool valid) {
  ::emulator::CpAsync(shared, global, 16, valid ? 16 : 0);
}
inline void PrefetchL2(const void*) {}
inline int NotBefore(int x) { return x; }
inline void CpAsyncCommit() { ::emulator::CpAsyncCommit(); }
template <int kLeft>
void CpAsyncWait() {
  ::emulator::CpAsyncWait(kLeft);
}

// Lane l gets of matrix i row l / 4, elements 2 (l % 4) and + 1; lanes 8 i .. 8 i + 7 name the rows of matrix i.
inline void LdMatrix4(uint32_t (&out)[4], const void* row) {
  const int lane = ::emulator::Lane();
  const auto& all = ::emulator::Meet(::emulator::Exchange::kLdMatrix, 0xffffffffu, &row, sizeof(row));
  for (int i = 0; i < 4; ++i) {
    const unsigned char* from;
    std::memcpy(&from, all[8 * i + lane / 4], sizeof(from));
    std::memcpy(&out[i], from + lane % 4 * 4, 4);
  }
}
// The same of the matrices transposed: column l / 4, rows 2 (l % 4) and + 1.
inline void LdMatrix4Transposed(uint32_t (&out)[4], const void* row) {
  const int lane = ::emulator::Lane();
  const auto& all = ::emulator::Meet(::emulator::Exchange::kLdMatrix, 0xffffffffu, &row, sizeof(row));
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const unsigned char* from;
      std::memcpy(&from, all[8 * i + lane % 4 * 2 + j], sizeof(from));
      std::memcpy(&pair[j], from + lane / 4 * 2, 2);
    }
    std::memcpy(&out[i], pair, 4);
  }
}

inline float Exp2(float x) { return std::exp2(x); }

// mma.sync.m16n8k16 of bf16 with f32 sums.
inline void MmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const int lane = ::emulator::Lane(), group = lane / 4, pair = lane % 4;
  const auto& all = ::emulator::Meet(::emulator::Exchange::kMma, 0xffffffffu, &mine, sizeof(mine));
  const auto element = [](uint32_t two, int i) { return double{__uint_as_float((two >> (16 * i)) << 16)}; };
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, column = pair * 2 + i % 2;
    double sum = double{d[i]};
    for (int k = 0; k < 16; ++k) {
      Fragments of_a, of_b;
      std::memcpy(&of_a, all[row % 8 * 4 + k % 8 / 2], sizeof(of_a));
      std::memcpy(&of_b, all[column * 4 + k % 8 / 2], sizeof(of_b));
      sum += element(of_a.a[row / 8 + k / 8 * 2], k % 2) * element(of_b.b[k / 8], k % 2);
    }
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace sapwood_cuda
