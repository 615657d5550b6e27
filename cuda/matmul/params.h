/* Parameters of the matrix products (cuda/common/abi.h has the calling convention). */
#ifndef SAPWOOD_CUDA_MATMUL_PARAMS_H_
#define SAPWOOD_CUDA_MATMUL_PARAMS_H_

#include "common/abi.h"

enum { SAPWOOD_CUDA_SMALL_GEMM_MAX_ROWS = 16 };

/* y[m][i] = (residual ? residual[m][i] : 0) + (sum over j of x[m][j] * w[i][j] + (bias ? bias[i] : 0)) in fp32, for the
 * few rows of a decode step: w is read once, at memory speed. More rows are the business of torch's GEMMs.
 *
 * An output is the sum of four chains, added in ascending order: k is cut into steps of 64, chain c has the steps c,
 * c + 4, c + 8 ... in ascending order, four mma a step (the order within an mma is the hardware's). So the bits of an
 * output depend on its row of x, its row of w and on k, not on num_rows, n, strides or the row's place.
 *
 * y may not overlap x or w; it may be the residual itself (same stride, f32). */
typedef struct {
  uint32_t struct_size;
  int32_t y_dtype;       /* SAPWOOD_CUDA_F32 or SAPWOOD_CUDA_BF16 */
  const void* x;         /* bf16 [num_rows][k], aligned to 16 bytes */
  const void* w;         /* bf16 [n][k] (the weight of torch's Linear), aligned to 16 bytes */
  const float* bias;     /* [n] or null */
  const float* residual; /* [num_rows][n] or null */
  void* y;               /* [num_rows][n] */
  int64_t x_stride;      /* elements between rows, >= k, a multiple of 8 */
  int64_t w_stride;      /* the same */
  int64_t residual_stride; /* >= n; unused without a residual */
  int64_t y_stride;        /* >= n */
  int32_t num_rows;      /* at most SAPWOOD_CUDA_SMALL_GEMM_MAX_ROWS; 0: nothing is launched */
  int32_t n;             /* 1 .. 2^30 */
  int32_t k;             /* a multiple of 8, 8 .. 2^30 */
} SapwoodSmallGemmParams;

SAPWOOD_CUDA_API int sapwood_cuda_small_gemm(const SapwoodSmallGemmParams* params, void* stream);

#endif /* SAPWOOD_CUDA_MATMUL_PARAMS_H_ */
