/* Parameters of the row-wise kernels (cuda/common/abi.h has the calling convention). */
#ifndef SAPWOOD_CUDA_ELEMENTWISE_PARAMS_H_
#define SAPWOOD_CUDA_ELEMENTWISE_PARAMS_H_

#include "common/abi.h"

/* y[r][i] = bf16(x[r][i] / sqrt(mean(x[r]^2) + eps) * (weight[i] + (plus_one ? 1 : 0))), in fp32, rounded once.
 * The bits of a row depend on that row alone, not on num_rows, strides or alignment. y may not overlap x. */
typedef struct {
  uint32_t struct_size;
  int32_t x_dtype;     /* SAPWOOD_CUDA_F32 or SAPWOOD_CUDA_BF16 */
  const void* x;       /* [num_rows][hidden], the residual stream */
  const float* weight; /* [hidden] */
  void* y;             /* bf16 [num_rows][hidden] */
  int64_t x_stride;    /* elements between rows, >= hidden */
  int64_t y_stride;
  int32_t num_rows;    /* 0: nothing is launched */
  int32_t hidden;
  float eps;
  int32_t plus_one;
} SapwoodRmsNormParams;

SAPWOOD_CUDA_API int sapwood_cuda_rms_norm(const SapwoodRmsNormParams* params, void* stream);

/* For each token t: RMSNorm of each q and k head (where a weight is given), rotation of the first rotary_dim elements
 * by the angle of positions[t] (pairs are i, i + rotary_dim / 2), q to q_out, k and v into the page slot slots[t].
 * fp32 inside, each value rounded to bf16 once. The bits of a token depend on that token alone.
 *
 * K lies at k_pages + page * page_stride + (kv_head * page_size + offset) * head_dim with page = slot / page_size,
 * offset = slot % page_size; V likewise. Two pools, or K and V of one page side by side: page_stride says.
 * A negative slot (padding of a captured graph) writes no K and V. Two tokens of a call never share a slot.
 * q_out may be the q part of qkv itself (same stride). */
typedef struct {
  uint32_t struct_size;
  int32_t num_tokens;   /* 0: nothing is launched */
  const void* qkv;      /* bf16 [num_tokens][(num_q_heads + 2 * num_kv_heads) * head_dim]: q | k | v, bias added */
  int64_t qkv_stride;   /* elements between tokens; even */
  void* q_out;          /* bf16 [num_tokens][num_q_heads * head_dim] */
  int64_t q_stride;     /* even */
  void* k_pages;        /* bf16 */
  void* v_pages;        /* bf16 */
  int64_t page_stride;  /* elements between pages; even, >= num_kv_heads * page_size * head_dim */
  const int64_t* slots; /* [num_tokens] */
  const int32_t* positions; /* [num_tokens], absolute, each in [0, rows of cos and sin) */
  const float* cos;     /* [positions][rotary_dim / 2] */
  const float* sin;
  const float* q_norm;  /* [head_dim] or null */
  const float* k_norm;
  float norm_eps;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;     /* even, <= 256 */
  int32_t rotary_dim;   /* even, <= head_dim; 0: no rotation, cos and sin may be null */
  int32_t page_size;
} SapwoodRopeKvWriteParams;

SAPWOOD_CUDA_API int sapwood_cuda_rope_kv_write(const SapwoodRopeKvWriteParams* params, void* stream);

enum { SAPWOOD_CUDA_SILU = 0, SAPWOOD_CUDA_GELU = 1, SAPWOOD_CUDA_GELU_TANH = 2 };

/* y[r][i] = bf16(act(x[r][i]) * x[r][width + i]), in fp32, rounded once. act is torch.nn.functional's silu, gelu (erf)
 * or gelu(approximate="tanh"). The bits of an output depend on its two inputs alone. y may not overlap x. */
typedef struct {
  uint32_t struct_size;
  int32_t activation; /* SAPWOOD_CUDA_SILU, _GELU or _GELU_TANH */
  const void* x;      /* bf16 [num_rows][2 * width]: gate | up */
  void* y;            /* bf16 [num_rows][width] */
  int64_t x_stride;   /* elements between rows, >= 2 * width */
  int64_t y_stride;   /* >= width */
  int32_t num_rows;   /* 0: nothing is launched */
  int32_t width;      /* 1 .. 65535 * 1024 */
} SapwoodSiluMulParams;

SAPWOOD_CUDA_API int sapwood_cuda_silu_mul(const SapwoodSiluMulParams* params, void* stream);

#endif /* SAPWOOD_CUDA_ELEMENTWISE_PARAMS_H_ */
