// Kernels with one mistake each, and the same without it: tests/kernels/test_cuda_emulator.py asks whether the emulator
// shows the mistake. `run(name, out)` gives the launch's status; out[0] says whether the result was right.
#include <cstdint>
#include <cstring>

#include "common/ptx.cuh"
#include "common/vector.cuh"

namespace {

using namespace sapwood_cuda;

__device__ void Say(int* out, bool right) {
  if (threadIdx.x == 0) out[0] = right;
}

// Each thread reads what the thread `step` further wrote.
template <bool kBarrier>
__global__ void Neighbour(int* out, int step) {
  SAPWOOD_DYNAMIC_SHARED(shared);
  int* const values = reinterpret_cast<int*>(shared);
  const int n = blockDim.x, i = threadIdx.x;
  values[i] = i;
  if (kBarrier) __syncthreads();
  const int read = values[(i + step + n) % n];
  const bool all = __syncthreads_and(read == (i + step + n) % n);
  Say(out, all);
}

template <bool kWait>
__global__ void Copy(int* out, const int* from) {
  SAPWOOD_DYNAMIC_SHARED(shared);
  CpAsync16(shared + 16 * threadIdx.x, from + 4 * threadIdx.x, true);
  CpAsyncCommit();
  if (kWait) CpAsyncWait<0>();
  const bool arrived = reinterpret_cast<const int*>(shared)[4 * threadIdx.x] == from[4 * threadIdx.x];
  const bool all = __syncthreads_and(arrived);
  Say(out, all);
}

__global__ void MisalignedCopy(int* out, const int* from) {
  SAPWOOD_DYNAMIC_SHARED(shared);
  CpAsync16(shared + 16 * threadIdx.x, from + 4 * threadIdx.x + 1, true);
  Say(out, true);
}

__global__ void HalfAWarpShuffles(int* out) {
  int x = threadIdx.x;
  if (threadIdx.x % 2 == 0) x = __shfl_xor_sync(0xffffffffu, x, 2);
  Say(out, x >= 0);
}

__global__ void DivergedExchange(int* out) {
  int x = threadIdx.x;
  if (threadIdx.x < 16) {
    x = __shfl_xor_sync(0xffffffffu, x, 1);
  } else {
    x = __ballot_sync(0xffffffffu, x);
  }
  Say(out, x >= 0);
}

__global__ void BarrierInABranch(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  if (threadIdx.x < 20) __syncthreads();
  else __shfl_sync(0xffffffffu, 1, 0);
  Say(out, true);
}

// a [16][16] times b [16][8] with a(i, k) = i + k, b(k, j) = k - j: whole numbers, exact in bf16 and f32.
__global__ void Product(int* out) {
  SAPWOOD_DYNAMIC_SHARED(shared);
  __nv_bfloat16* const a = reinterpret_cast<__nv_bfloat16*>(shared);  // [16][16], then b transposed [16 columns][16], then b
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += kWarp) {
    const int row = i / 16, k = i % 16;
    a[i] = __float2bfloat16_rn(static_cast<float>(row + k));
    a[256 + i] = __float2bfloat16_rn(static_cast<float>(k - row));  // row: b's column
    a[512 + i] = __float2bfloat16_rn(static_cast<float>(row - k));  // row: b's row, k its column
  }
  __syncwarp();
  uint32_t fa[4], fb[4], ft[4];
  LdMatrix4(fa, a + lane % 16 * 16 + lane / 16 * 8);
  LdMatrix4(fb, a + 256 + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
  LdMatrix4Transposed(ft, a + 512 + (lane / 8 % 2 * 8 + lane % 8) * 16 + lane / 16 * 8);
  bool right = true;
  for (int tile = 0; tile < 2; ++tile) {
    const uint32_t b[2] = {fb[2 * tile], fb[2 * tile + 1]}, t[2] = {ft[2 * tile], ft[2 * tile + 1]};
    float d[4] = {0.5f, 0.5f, 0.5f, 0.5f}, e[4] = {0.5f, 0.5f, 0.5f, 0.5f};
    MmaBf16(d, fa, b);
    MmaBf16(e, fa, t);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 8 * tile + lane % 4 * 2 + i % 2;
      float sum = 0.5f;
      for (int k = 0; k < 16; ++k) sum += static_cast<float>((row + k) * (k - column));
      right &= d[i] == sum && e[i] == sum;
    }
  }
  Say(out, __all_sync(0xffffffffu, right));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* last_text() { return cudaGetErrorString(cudaSuccess); }

extern "C" __attribute__((visibility("default"))) int run(const char* name, int* out) {
  alignas(16) static const int numbers[4 * 64 + 4] = {1, 2, 3, 4, 5};
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  out[0] = 0;
  if (is("neighbour")) Launch(Neighbour<true>, 2, 64, 256, nullptr, out, 1);
  if (is("no barrier, next")) Launch(Neighbour<false>, 2, 64, 256, nullptr, out, 1);
  if (is("no barrier, previous")) Launch(Neighbour<false>, 2, 64, 256, nullptr, out, -1);
  if (is("copy")) Launch(Copy<true>, 1, 64, 1024, nullptr, out, numbers);
  if (is("no wait")) Launch(Copy<false>, 1, 64, 1024, nullptr, out, numbers);
  if (is("misaligned copy")) Launch(MisalignedCopy, 1, 64, 1024, nullptr, out, numbers);
  if (is("half a warp shuffles")) Launch(HalfAWarpShuffles, 1, 64, 0, nullptr, out);
  if (is("diverged exchange")) Launch(DivergedExchange, 1, 32, 0, nullptr, out);
  if (is("barrier in a branch")) Launch(BarrierInABranch, 1, 64, 0, nullptr, out);
  if (is("product")) Launch(Product, 1, 32, 2048, nullptr, out);
  if (is("too large a block")) Launch(Product, 1, 2048, 0, nullptr, out);
  return cudaGetLastError();
}
