/* Parameters of the mixture-of-experts kernels (cuda/common/abi.h has the calling convention).
 *
 * One layer: moe_route chooses top_k experts for every token; a token and one of its choices are a *pair*, numbered
 * token * top_k + slot. moe_align sorts the pairs by expert into blocks that one grouped GEMM tile covers. With few
 * pairs an expert (decode), moe_gemm_small reads rows through that list and leaves one row per pair, in the order of
 * pairs. With many, moe_gather brings the rows into the order of the list, and moe_gemm multiplies whole segments in
 * that order. moe_combine sums a token's rows, from either order.
 * All of it runs from device data on grids that the shapes alone fix, so a captured graph serves every routing. */
#ifndef SAPWOOD_CUDA_MOE_PARAMS_H_
#define SAPWOOD_CUDA_MOE_PARAMS_H_

#include "common/abi.h"

/* How logits become scores: softmax over all experts, or each by itself. */
enum { SAPWOOD_CUDA_MOE_SOFTMAX = 0, SAPWOOD_CUDA_MOE_SIGMOID = 1 };
/* The score of a group of experts: the sum of its two largest (DeepSeek-V3), or the largest (DeepSeek-V2). */
enum { SAPWOOD_CUDA_MOE_GROUP_TOP2 = 0, SAPWOOD_CUDA_MOE_GROUP_MAX = 1 };

/* For each token the top_k experts of highest choice value, which is score + bias, in that order; equal values go to
 * the lowest id. The weight is the score, without the bias (DeepSeek-V3, arXiv:2412.19437); with `renormalise` it is
 * divided by the sum of the chosen ones + 1e-20; `scale` multiplies it last.
 *
 * With num_groups > 1, expert e is in group e / (num_experts / num_groups), and only the experts of the topk_groups
 * groups of highest score are chosen from (equal: lowest group). The others are out, whatever their value.
 *
 * fp32 inside. Order of sums: softmax adds experts lane, lane + 32, .. and then the lanes by a butterfly; the chosen
 * weights are added by a butterfly over slots. A token's results depend on its logits alone.
 *
 * NaN: a choice value that is NaN counts as -inf, so that ids are always valid and distinct; a score that is NaN is a
 * weight that is. A softmax with a NaN, with +inf or with nothing above -inf is NaN throughout: experts 0 .. top_k - 1
 * (of the first topk_groups groups), all weights NaN. */
typedef struct {
  uint32_t struct_size;
  int32_t logits_dtype;  /* SAPWOOD_CUDA_F32 or SAPWOOD_CUDA_BF16 */
  const void* logits;    /* [num_tokens][num_experts] */
  int64_t logits_stride; /* elements between tokens, >= num_experts */
  const float* bias;     /* [num_experts] or null */
  int32_t* ids;          /* [num_tokens][top_k] */
  float* weights;        /* [num_tokens][top_k] */
  int32_t num_tokens;    /* 0: nothing is launched */
  int32_t num_experts;   /* 1 .. 512 */
  int32_t top_k;         /* 1 .. 32, at most the experts of topk_groups groups */
  int32_t scoring;       /* SAPWOOD_CUDA_MOE_SOFTMAX or _SIGMOID */
  int32_t num_groups;    /* 1 .. 32, divides num_experts; 1: no groups */
  int32_t topk_groups;   /* 1 .. num_groups */
  int32_t group_score;   /* SAPWOOD_CUDA_MOE_GROUP_TOP2 (groups of two experts or more) or _MAX */
  int32_t renormalise;
  float scale;           /* finite */
  int32_t reserved;      /* 0 */
} SapwoodMoeRouteParams;

SAPWOOD_CUDA_API int sapwood_cuda_moe_route(const SapwoodMoeRouteParams* params, void* stream);

/* Sorts the pairs by expert: a segment for each expert in ascending order, its pairs ascending, filled up to a multiple
 * of `block` with the number num_pairs, which is no pair. Ids outside [0, num_experts) (padding tokens, experts of
 * another rank) are in no segment. Everything of sorted_pairs and block_expert past the last segment is num_pairs and
 * -1. Integers only: the same ids give the same output. No workspace. */
typedef struct {
  uint32_t struct_size;
  int32_t num_pairs;       /* num_tokens * top_k; 0: every segment is empty, and that is written */
  const int32_t* ids;      /* [num_pairs] */
  int32_t* sorted_pairs;   /* [capacity] */
  int32_t* block_expert;   /* [capacity / block]: the expert of each block, -1 past the last segment */
  int32_t* expert_offsets; /* [num_experts + 1]: where each segment begins, a multiple of block; then num_padded */
  int32_t* num_padded;     /* [1]: the length of all segments */
  int32_t num_experts;     /* 1 .. 1024 */
  int32_t block;           /* the M tile of the GEMM that follows */
  int32_t capacity;        /* a multiple of block, >= num_pairs + min(num_experts, num_pairs) * (block - 1) rounded up
                            * to one: no routing needs more */
  int32_t reserved;        /* 0 */
} SapwoodMoeAlignParams;

SAPWOOD_CUDA_API int sapwood_cuda_moe_align(const SapwoodMoeAlignParams* params, void* stream);

/* y[pair][n] = pair_weight[pair] * sum over k of x[pair / pairs_per_row][k] * weight[expert][n][k] for the pairs of
 * moe_align with block = 16; rows of pairs that are in no segment are not written. bf16 products on the tensor cores,
 * f32 sums, one rounding to y's type.
 *
 * Made for decode, where weights are what is read: each block of 16 pairs reads its expert's weights once, and no
 * others. Every output is one chain over ascending k in steps of 16: its bits depend on its row of x and of weight
 * alone. */
typedef struct {
  uint32_t struct_size;
  int32_t y_dtype;             /* SAPWOOD_CUDA_F32 or SAPWOOD_CUDA_BF16 */
  const void* x;               /* bf16 [ceil(num_pairs / pairs_per_row)][k], aligned to 16 bytes */
  int64_t x_stride;            /* elements between rows; a multiple of 8, >= k */
  const void* weight;          /* bf16 [experts][n][k], aligned to 16 bytes */
  int64_t expert_stride;       /* elements between experts; a multiple of 8, >= n * weight_stride */
  int64_t weight_stride;       /* elements between rows of an expert; a multiple of 8, >= k */
  const int32_t* sorted_pairs; /* these three as moe_align writes them */
  const int32_t* block_expert;
  const int32_t* num_padded;
  const float* pair_weight;    /* [num_pairs], or null: 1 */
  void* y;                     /* [num_pairs][n] */
  int64_t y_stride;            /* elements between rows, >= n */
  int32_t num_pairs;           /* 0: nothing is launched */
  int32_t pairs_per_row;       /* top_k where x has a row per token, 1 where it has one per pair */
  int32_t capacity;            /* of sorted_pairs; a multiple of 16, at most 16 * 65535 */
  int32_t n;
  int32_t k;                   /* a multiple of 8 */
  int32_t reserved;            /* 0 */
} SapwoodMoeGemmSmallParams;

SAPWOOD_CUDA_API int sapwood_cuda_moe_gemm_small(const SapwoodMoeGemmSmallParams* params, void* stream);

/* y[i] = x[sorted_pairs[i] / pairs_per_row] for i < num_padded, zeros where sorted_pairs[i] is no pair; rows from
 * num_padded on are not written. places[pair] = i, the way back; of pairs in no segment it is not written. */
typedef struct {
  uint32_t struct_size;
  int32_t num_pairs;           /* 0: nothing is launched */
  const void* x;               /* bf16 [ceil(num_pairs / pairs_per_row)][width], aligned to 16 bytes */
  int64_t x_stride;            /* elements between rows; a multiple of 8, >= width; likewise below */
  const int32_t* sorted_pairs; /* these two as moe_align writes them, whatever its block */
  const int32_t* num_padded;
  void* y;                     /* bf16 [capacity][width], aligned to 16 bytes; not x */
  int64_t y_stride;
  int32_t* places;             /* [num_pairs], or null */
  int32_t pairs_per_row;       /* top_k where x has a row per token, 1 where it has one per pair */
  int32_t capacity;            /* of sorted_pairs, >= num_pairs */
  int32_t width;               /* a multiple of 8 */
  int32_t reserved;            /* 0 */
} SapwoodMoeGatherParams;

SAPWOOD_CUDA_API int sapwood_cuda_moe_gather(const SapwoodMoeGatherParams* params, void* stream);

/* The block of moe_align that moe_gemm wants. */
enum { SAPWOOD_CUDA_MOE_GEMM_BLOCK = 64 };

/* y[i][n] = sum over k of x[i][k] * weight[e][n][k] for the rows i of the segment of every expert e, the rows that fill
 * it up to a whole block included; rows past the last segment are neither read nor written. bf16 products on the tensor
 * cores, f32 sums, one rounding. Experts without rows and experts with all of them are nothing special.
 *
 * Made for prefill, where multiplying is the work. Two tiers. The portable one (sm_80 and later) has the bits of
 * moe_gemm_small: every output is one chain over ascending k in steps of 16. On compute capability 9.0 a library built
 * with CUTLASS (cuda/README.md) takes TMA and wgmma instead, unless `portable` is set; its chain is ascending as well,
 * with the hardware's order within a step. Either way an output's bits depend on its row of x and of weight alone. */
typedef struct {
  uint32_t struct_size;
  int32_t num_experts;           /* 1 .. 1024 */
  const void* x;                 /* bf16 [capacity][k], aligned to 16 bytes: rows in the order of sorted_pairs */
  int64_t x_stride;              /* elements between rows; a multiple of 8, >= k */
  const void* weight;            /* bf16 [num_experts][n][k], aligned to 16 bytes */
  int64_t expert_stride;         /* elements between experts; a multiple of 8, >= n * weight_stride */
  int64_t weight_stride;         /* elements between rows of an expert; a multiple of 8, >= k */
  const int32_t* expert_offsets; /* these two as moe_align writes them with block = SAPWOOD_CUDA_MOE_GEMM_BLOCK */
  const int32_t* block_expert;
  void* y;                       /* bf16 [capacity][n], aligned to 16 bytes; not x */
  int64_t y_stride;              /* elements between rows; a multiple of 8, >= n */
  void* workspace;               /* aligned to 256 bytes; null where none is needed. Written by each call: two calls
                                  * that may run at the same time need two */
  int64_t workspace_bytes;       /* >= sapwood_cuda_moe_gemm_workspace_bytes(num_experts), unless portable */
  int32_t capacity;              /* rows; a multiple of the block, at most 65535 blocks; 0: nothing is launched */
  int32_t n;                     /* a multiple of 8 */
  int32_t k;                     /* a multiple of 8 */
  int32_t portable;              /* 1: the portable tier on every device */
} SapwoodMoeGemmParams;

SAPWOOD_CUDA_API int sapwood_cuda_moe_gemm(const SapwoodMoeGemmParams* params, void* stream);

/* Bytes of workspace that moe_gemm takes on the current device; 0 says that it runs the portable tier there. */
SAPWOOD_CUDA_API int64_t sapwood_cuda_moe_gemm_workspace_bytes(int32_t num_experts);

/* y[t] = sum over ascending slots of weights[t][slot] * z[t * top_k + slot], by fma from 0, + shared[t] last; fp32, one
 * rounding to y's type. With places the row of z is places[t * top_k + slot]. Slots whose id is outside
 * [0, num_experts) add nothing, and neither their row of z nor their place is read. y may be shared itself (same type
 * and stride). The bits of a token depend on its rows alone. */
typedef struct {
  uint32_t struct_size;
  int32_t z_dtype;       /* SAPWOOD_CUDA_F32 or SAPWOOD_CUDA_BF16, here and below */
  const void* z;         /* [num_tokens * top_k][hidden], or as many rows as places say */
  int64_t z_stride;      /* elements between rows, >= hidden; likewise below */
  const float* weights;  /* [num_tokens][top_k], or null: 1 (moe_gemm_small had them) */
  const int32_t* ids;    /* [num_tokens][top_k], or null: all slots count */
  const void* shared;    /* [num_tokens][hidden], the output of shared experts, or null */
  int64_t shared_stride;
  void* y;               /* [num_tokens][hidden] */
  int64_t y_stride;
  int32_t shared_dtype;
  int32_t y_dtype;
  int32_t num_tokens;    /* 0: nothing is launched */
  int32_t top_k;         /* 1 .. 32 */
  int32_t hidden;        /* at most 1024 * 65535 */
  int32_t num_experts;   /* of ids; unused where they are null */
  const int32_t* places; /* [num_tokens][top_k] as moe_gather writes them, or null */
} SapwoodMoeCombineParams;

SAPWOOD_CUDA_API int sapwood_cuda_moe_combine(const SapwoodMoeCombineParams* params, void* stream);

#endif /* SAPWOOD_CUDA_MOE_PARAMS_H_ */
