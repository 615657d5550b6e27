// Kernels with one mistake each, and the same without it: tests/kernels/test_cuda_emulator.py asks whether the emulator
// shows the mistake. `run(name, out)` gives the launch's status; out[0] says whether the result was right.
#include <cstdint>
#include <cstring>

#include "common/ptx.cuh"
#include "common/ptx_sm90.cuh"
#include "common/vector.cuh"

namespace {

using namespace sapwood_cuda;

__device__ void Say(int* out, bool right) {
  if (threadIdx.x == 0) out[0] = right;
}

// Each thread reads what the thread `step` further wrote.
template <bool kBarrier>
__global__ void Neighbour(int* out, int step) {
  AwaitPredecessor();
  SAPWOOD_DYNAMIC_SHARED(shared);
  int* const values = reinterpret_cast<int*>(shared);
  const int n = blockDim.x, i = threadIdx.x;
  values[i] = i;
  if (kBarrier) __syncthreads();
  const int read = values[(i + step + n) % n];
  const bool all = __syncthreads_and(read == (i + step + n) % n);
  Say(out, all);
}

__global__ void DoesNotAwait(int* out) { Say(out, true); }

template <bool kWait>
__global__ void Copy(int* out, const int* from) {
  AwaitPredecessor();
  SAPWOOD_DYNAMIC_SHARED(shared);
  CpAsync16(shared + 16 * threadIdx.x, from + 4 * threadIdx.x, true);
  CpAsyncCommit();
  if (kWait) CpAsyncWait<0>();
  const bool arrived = reinterpret_cast<const int*>(shared)[4 * threadIdx.x] == from[4 * threadIdx.x];
  const bool all = __syncthreads_and(arrived);
  Say(out, all);
}

__global__ void MisalignedCopy(int* out, const int* from) {
  AwaitPredecessor();
  SAPWOOD_DYNAMIC_SHARED(shared);
  CpAsync16(shared + 16 * threadIdx.x, from + 4 * threadIdx.x + 1, true);
  Say(out, true);
}

__global__ void HalfAWarpShuffles(int* out) {
  AwaitPredecessor();
  int x = threadIdx.x;
  if (threadIdx.x % 2 == 0) x = __shfl_xor_sync(0xffffffffu, x, 2);
  Say(out, x >= 0);
}

__global__ void DivergedExchange(int* out) {
  AwaitPredecessor();
  int x = threadIdx.x;
  if (threadIdx.x < 16) {
    x = __shfl_xor_sync(0xffffffffu, x, 1);
  } else {
    x = __ballot_sync(0xffffffffu, x);
  }
  Say(out, x >= 0);
}

__global__ void BarrierInABranch(int* out) {
  AwaitPredecessor();
  if (threadIdx.x < 40) __syncthreads();
  if (threadIdx.x < 20) __syncthreads();
  else __shfl_sync(0xffffffffu, 1, 0);
  Say(out, true);
}

// a [16][16] times b [16][8] with a(i, k) = i + k, b(k, j) = k - j: whole numbers, exact in bf16 and f32.
__global__ void Product(int* out) {
  AwaitPredecessor();
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

// --- Compute capability 9.0 -----------------------------------------------------------------------------------------

constexpr int kSide = 64;  // of a matrix in global memory: element (r, c) is r - 2 c, a whole number that bf16 has

__host__ __device__ float MatrixElement(int r, int c) { return static_cast<float>(r - 2 * c); }

enum class Mistake { kNone, kNoWait, kNoFence, kNoProductWait, kNoInit };

// The matrix by TMA, then products of it as b with a(i, k) = i % 8 - k: once its rows are columns of b, once they are k.
template <Mistake kMistake>
__global__ void WarpGroupProduct(int* out, const __grid_constant__ CUtensorMap map) {
  AwaitPredecessor();
  SAPWOOD_DYNAMIC_SHARED(shared);
  unsigned char* const matrix = shared + (1024 - SharedAddress(shared) % 1024) % 1024;
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(matrix + kSide * kSide * 2);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (threadIdx.x == 0 && kMistake != Mistake::kNoInit) MbarrierInit(barrier, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    MbarrierArriveExpect(barrier, kSide * kSide * 2);
    TmaLoad(matrix, map, barrier, 0, 0, 0, 0);
  }
  if (kMistake != Mistake::kNoWait) MbarrierWait(barrier, 0);
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) {
    const int row = 16 * warp + lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
    const float first = static_cast<float>(row % 8 - k);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, first - 1);
    a[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  bool right = true;
  for (int transposed = 0; transposed < 2; ++transposed) {
    float d[kSide / 2];
    for (float& x : d) x = 0.5f;
    const int k0 = 16;  // the second sixteen
    if (kMistake != Mistake::kNoFence) WgmmaFence();
    if (transposed) {
      Wgmma<true>(d, a, MatrixDescriptor(matrix + k0 * 128, 16, 1024), true);
    } else {
      Wgmma<false>(d, a, MatrixDescriptor(matrix + k0 * 2, 16, 1024), true);
    }
    WgmmaCommit();
    if (kMistake != Mistake::kNoProductWait) WgmmaWait<0>(d);
    for (int i = 0; i < kSide / 2; ++i) {
      const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = 0.5f;
      for (int k = 0; k < 16; ++k) {
        const float b = transposed ? MatrixElement(k0 + k, column) : MatrixElement(column, k0 + k);
        sum += static_cast<float>(row % 8 - k) * b;
      }
      right &= d[i] == sum;
    }
    if (kMistake == Mistake::kNoProductWait) WgmmaWait<0>(d);
  }
  const bool all = __syncthreads_and(right);
  Say(out, all);
}

// Two warps; the first of them only where it should not.
__global__ void NamedBarriers(int* out, int waiting_warps) {
  AwaitPredecessor();
  SAPWOOD_DYNAMIC_SHARED(shared);
  int* const value = reinterpret_cast<int*>(shared);
  const int warp = threadIdx.x / kWarp;
  if (warp == 1) {
    if (threadIdx.x % kWarp == 0) value[0] = 7;
    __syncwarp();
    NamedBarrierArrive(1, 64);
  } else if (waiting_warps > 0) {
    NamedBarrierSync(1, waiting_warps * kWarp);
  }
  Say(out, value[0] == 7);
}

template <Mistake kMistake>
void LaunchProduct(int* out) {
  static __nv_bfloat16 matrix[kSide][kSide];
  for (int r = 0; r < kSide; ++r) {
    for (int c = 0; c < kSide; ++c) matrix[r][c] = __float2bfloat16_rn(MatrixElement(r, c));
  }
  CUtensorMap map;
  if (EncodeTensorMap(&map, {matrix, {kSide, kSide, 1, 1}, {2 * kSide, 2 * kSide, 2 * kSide}, {kSide, kSide, 1, 1}})) return;
  Launch(WarpGroupProduct<kMistake>, 1, 128, 10240, nullptr, out, map);
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
  if (is("no wait for the kernel before")) Launch(DoesNotAwait, 1, 64, 0, nullptr, out);
  if (is("copy")) Launch(Copy<true>, 1, 64, 1024, nullptr, out, numbers);
  if (is("no wait")) Launch(Copy<false>, 1, 64, 1024, nullptr, out, numbers);
  if (is("misaligned copy")) Launch(MisalignedCopy, 1, 64, 1024, nullptr, out, numbers);
  if (is("half a warp shuffles")) Launch(HalfAWarpShuffles, 1, 64, 0, nullptr, out);
  if (is("diverged exchange")) Launch(DivergedExchange, 1, 32, 0, nullptr, out);
  if (is("barrier in a branch")) Launch(BarrierInABranch, 1, 64, 0, nullptr, out);
  if (is("product")) Launch(Product, 1, 32, 2048, nullptr, out);
  if (is("warp group product")) LaunchProduct<Mistake::kNone>(out);
  if (is("no wait for TMA")) LaunchProduct<Mistake::kNoWait>(out);
  if (is("no fence before wgmma")) LaunchProduct<Mistake::kNoFence>(out);
  if (is("no wait for wgmma")) LaunchProduct<Mistake::kNoProductWait>(out);
  if (is("no mbarrier")) LaunchProduct<Mistake::kNoInit>(out);
  if (is("named barrier")) Launch(NamedBarriers, 1, 64, 16, nullptr, out, 2);
  if (is("no named barrier")) Launch(NamedBarriers, 1, 64, 16, nullptr, out, 0);
  if (is("named barrier of three")) Launch(NamedBarriers, 1, 64, 16, nullptr, out, 3);
  if (is("too large a block")) Launch(Product, 1, 2048, 0, nullptr, out);
  return cudaGetLastError();
}
