// Per-head q/k norm, rotary embedding (Su et al. 2021) and the write of K and V into their page. One warp per head of a
// token: num_q_heads + 2 * num_kv_heads warps a token, the last of them copying V.
//
// A head is held in shared memory as f32 between norm and rotation: pairs (i, i + rotary_dim / 2) lie in other lanes
// for all but a few head sizes.
#include <cstdint>

#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "elementwise/params.h"

namespace sapwood_cuda {
namespace {

constexpr int kWarps = 8;  // per block
constexpr int kMaxHeadDim = 256;

__global__ void __launch_bounds__(kWarps* kWarp) RopeKvWriteKernel(const SapwoodRopeKvWriteParams p) {
  AwaitPredecessor();
  __shared__ float heads[kWarps][kMaxHeadDim];
  const int lane = threadIdx.x % kWarp;
  float* head_values = heads[threadIdx.x / kWarp];
  const int num_heads = p.num_q_heads + 2 * p.num_kv_heads;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (item >= static_cast<int64_t>(p.num_tokens) * num_heads) return;  // whole warps: no barrier of the block below
  const int64_t token = item / num_heads;
  const int head = static_cast<int>(item % num_heads);
  const int D = p.head_dim;

  const bool is_q = head < p.num_q_heads;
  const bool is_k = !is_q && head < p.num_q_heads + p.num_kv_heads;
  __nv_bfloat16* out;
  if (is_q) {
    out = static_cast<__nv_bfloat16*>(p.q_out) + token * p.q_stride + static_cast<int64_t>(head) * D;
  } else {
    const int64_t slot = p.slots[token];
    if (slot < 0) return;
    const int kv_head = head - p.num_q_heads - (is_k ? 0 : p.num_kv_heads);
    __nv_bfloat16* pages = static_cast<__nv_bfloat16*>(is_k ? p.k_pages : p.v_pages);
    out = pages + slot / p.page_size * p.page_stride +
          (static_cast<int64_t>(kv_head) * p.page_size + slot % p.page_size) * D;
  }
  const __nv_bfloat162* in = reinterpret_cast<const __nv_bfloat162*>(
      static_cast<const __nv_bfloat16*>(p.qkv) + token * p.qkv_stride + static_cast<int64_t>(head) * D);
  __nv_bfloat162* out2 = reinterpret_cast<__nv_bfloat162*>(out);

  if (!is_q && !is_k) {
    for (int i = lane; i < D / 2; i += kWarp) out2[i] = in[i];
    return;
  }

  // Lane l holds elements 2 (l + 32 j), + 1 for ascending j: the order of the norm's sum.
  float sum = 0.0f;
  for (int i = lane; i < D / 2; i += kWarp) {
    const float2 v = __bfloat1622float2(in[i]);
    head_values[2 * i] = v.x;
    head_values[2 * i + 1] = v.y;
    sum = __fmaf_rn(v.x, v.x, sum);
    sum = __fmaf_rn(v.y, v.y, sum);
  }
  const float* norm = is_q ? p.q_norm : p.k_norm;
  if (norm != nullptr) {
    const float inv_rms = __frsqrt_rn(__fadd_rn(__fdiv_rn(WarpSum(sum), static_cast<float>(D)), p.norm_eps));
    for (int i = lane; i < D / 2; i += kWarp) {
      head_values[2 * i] = __fmul_rn(__fmul_rn(head_values[2 * i], inv_rms), norm[2 * i]);
      head_values[2 * i + 1] = __fmul_rn(__fmul_rn(head_values[2 * i + 1], inv_rms), norm[2 * i + 1]);
    }
  }
  __syncwarp();

  const int half = p.rotary_dim / 2;
  const int64_t angle_row = half > 0 ? static_cast<int64_t>(p.positions[token]) * half : 0;
  const float* cos_row = p.cos + angle_row;
  const float* sin_row = p.sin + angle_row;
  auto rotated = [&](int i) {
    const float x = head_values[i];
    if (i >= p.rotary_dim) return x;
    const bool first = i < half;
    const int pair = first ? i : i - half;
    const float other = head_values[first ? i + half : i - half];
    const float turned = __fmul_rn(other, sin_row[pair]);
    return __fmaf_rn(x, cos_row[pair], first ? -turned : turned);
  };
  for (int i = lane; i < D / 2; i += kWarp) out2[i] = __floats2bfloat162_rn(rotated(2 * i), rotated(2 * i + 1));
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_rope_kv_write(const SapwoodRopeKvWriteParams* params, void* stream) {
  using sapwood_cuda::Aligned;
  SAPWOOD_CUDA_CHECK_STRUCT("rope_kv_write", params);
  const SapwoodRopeKvWriteParams& p = *params;
  SAPWOOD_CUDA_REQUIRE(p.num_tokens >= 0, "rope_kv_write: num_tokens must not be negative, got %d", p.num_tokens);
  SAPWOOD_CUDA_REQUIRE(p.num_q_heads > 0 && p.num_kv_heads > 0,
                       "rope_kv_write: num_q_heads and num_kv_heads must be positive, got %d and %d", p.num_q_heads,
                       p.num_kv_heads);
  SAPWOOD_CUDA_REQUIRE(p.head_dim > 0 && p.head_dim % 2 == 0 && p.head_dim <= sapwood_cuda::kMaxHeadDim,
                       "rope_kv_write: head_dim must be even and in 2..%d, got %d", sapwood_cuda::kMaxHeadDim,
                       p.head_dim);
  SAPWOOD_CUDA_REQUIRE(p.rotary_dim >= 0 && p.rotary_dim % 2 == 0 && p.rotary_dim <= p.head_dim,
                       "rope_kv_write: rotary_dim must be even and in 0..head_dim = %d, got %d", p.head_dim,
                       p.rotary_dim);
  SAPWOOD_CUDA_REQUIRE(p.page_size > 0, "rope_kv_write: page_size must be positive, got %d", p.page_size);
  const int64_t q_width = static_cast<int64_t>(p.num_q_heads) * p.head_dim;
  const int64_t kv_width = static_cast<int64_t>(p.num_kv_heads) * p.head_dim;
  SAPWOOD_CUDA_REQUIRE(p.qkv_stride >= q_width + 2 * kv_width && p.qkv_stride % 2 == 0,
                       "rope_kv_write: qkv_stride must be even and at least %lld, got %lld",
                       static_cast<long long>(q_width + 2 * kv_width), static_cast<long long>(p.qkv_stride));
  SAPWOOD_CUDA_REQUIRE(p.q_stride >= q_width && p.q_stride % 2 == 0,
                       "rope_kv_write: q_stride must be even and at least %lld, got %lld",
                       static_cast<long long>(q_width), static_cast<long long>(p.q_stride));
  SAPWOOD_CUDA_REQUIRE(p.page_stride >= kv_width * p.page_size && p.page_stride % 2 == 0,
                       "rope_kv_write: page_stride must be even and at least %lld, got %lld",
                       static_cast<long long>(kv_width * p.page_size), static_cast<long long>(p.page_stride));
  SAPWOOD_CUDA_REQUIRE(p.q_norm == nullptr || p.norm_eps > 0.0f, "rope_kv_write: norm_eps must be positive, got %g",
                       static_cast<double>(p.norm_eps));
  SAPWOOD_CUDA_REQUIRE(p.k_norm == nullptr || p.norm_eps > 0.0f, "rope_kv_write: norm_eps must be positive, got %g",
                       static_cast<double>(p.norm_eps));
  if (p.num_tokens == 0) return SAPWOOD_CUDA_OK;
  SAPWOOD_CUDA_REQUIRE(p.qkv && p.q_out && p.k_pages && p.v_pages && p.slots,
                       "rope_kv_write: qkv, q_out, k_pages, v_pages and slots must not be null");
  SAPWOOD_CUDA_REQUIRE(p.rotary_dim == 0 || (p.positions && p.cos && p.sin),
                       "rope_kv_write: positions, cos and sin must not be null when rotary_dim = %d", p.rotary_dim);
  SAPWOOD_CUDA_REQUIRE(Aligned(p.qkv, 4) && Aligned(p.q_out, 4) && Aligned(p.k_pages, 4) && Aligned(p.v_pages, 4),
                       "rope_kv_write: qkv, q_out, k_pages and v_pages must be aligned to 4 bytes");
  const int64_t items = static_cast<int64_t>(p.num_tokens) * (p.num_q_heads + 2 * p.num_kv_heads);
  const int64_t blocks = (items + sapwood_cuda::kWarps - 1) / sapwood_cuda::kWarps;
  SAPWOOD_CUDA_REQUIRE(blocks <= INT32_MAX, "rope_kv_write: num_tokens = %d times its heads is too many for one launch",
                       p.num_tokens);
  sapwood_cuda::Launch(sapwood_cuda::RopeKvWriteKernel, static_cast<unsigned>(blocks),
                       sapwood_cuda::kWarps * sapwood_cuda::kWarp, 0, static_cast<cudaStream_t>(stream), p);
  return sapwood_cuda::LaunchStatus("rope_kv_write");
}
