/* Parameters of the sampler (cuda/common/abi.h has the calling convention). */
#ifndef SAPWOOD_CUDA_SAMPLING_PARAMS_H_
#define SAPWOOD_CUDA_SAMPLING_PARAMS_H_

#include "common/abi.h"

/* Draws one token per row of logits: the token that cpp/sampling/sampler.h, which has the definition, draws of the same
 * logits, parameters and key. Filters in this order: temperature, top-k, top-p (on what top-k leaves), min-p; then the
 * argmax of logit / temperature + Gumbel noise keyed by (seed, stream, position, token) (Maddison et al. 2014; its bits
 * are Philox4x32-10, Salmon et al. 2011). Ties: the lowest id.
 *
 * A token may be drawn if its mask bit is set and it is not banned. -inf among the logits is never drawn.
 * bad[r]: a NaN or +inf is among the row's logits (banned or not), or none that may be drawn is finite; token[r] is -1
 * then and logprob[r] NaN. The logits of a row of padding may hold anything.
 *
 * What decides a token is exact: integers, or fp32 operations in the CPU's order; only the sum of a log-probability has
 * an order of its own, which depends on vocab alone (sample.cu). The bits of a row depend on that row alone. */
typedef struct {
  uint32_t struct_size;
  int32_t num_rows;              /* 0: nothing is launched */
  int32_t vocab;                 /* 1 .. 262144 */
  int32_t mask_stride;           /* 32-bit words between rows of mask, >= ceil(vocab / 32) */
  const float* logits;           /* [num_rows][vocab] */
  int64_t logits_stride;         /* elements between rows, >= vocab */
  const float* temperature;      /* [num_rows], as all below; <= 0 or NaN: greedy, the filters are not looked at */
  const int32_t* top_k;          /* <= 0: off */
  const float* top_p;            /* >= 1: off; <= 0: one token */
  const float* min_p;            /* <= 0: off */
  const uint64_t* seed;
  const uint32_t* stream;        /* of the noise: the sample of a request that has several */
  const int64_t* position;       /* absolute position of the token being drawn */
  const int32_t* want_logprob;   /* 0: logprob[r] is NaN */
  const int32_t* mask;           /* null, or [mask rows][mask_stride]: bit i % 32 of word i / 32 set: i may be drawn */
  const int32_t* mask_index;     /* [num_rows]: the row of mask, -1 for none; null without mask */
  const int32_t* banned_indptr;  /* null, or [num_rows + 1]: row r bans banned_ids[indptr[r]] .. [indptr[r + 1] - 1] */
  const int32_t* banned_ids;     /* in any order; those outside 0 .. vocab - 1 mean nothing */
  int32_t* token;                /* [num_rows] */
  float* logprob;                /* [num_rows]: log softmax(logits)[token], without temperature, filters, mask, bans */
  int32_t* bad;                  /* [num_rows]: 0 or 1 */
} SapwoodSampleParams;

SAPWOOD_CUDA_API int sapwood_cuda_sample(const SapwoodSampleParams* params, void* stream);

#endif /* SAPWOOD_CUDA_SAMPLING_PARAMS_H_ */
