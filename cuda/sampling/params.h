/* Parameters of the sampler (cuda/common/abi.h has the calling convention). */
#ifndef SAPWOOD_CUDA_SAMPLING_PARAMS_H_
#define SAPWOOD_CUDA_SAMPLING_PARAMS_H_

#include "common/abi.h"

/* Draws one token per row of logits: the token that cpp/sampling/sampler.h, which has the definition, draws of the same
 * logits, parameters and key. Logits are adjusted by penalties (repetition, frequency, presence), bias, mask and bans,
 * in this order; then filtered by temperature, top-k, top-p (on what top-k leaves) and min-p; the token is the argmax
 * of logit / temperature + Gumbel noise keyed by (seed, stream, position, token) (Maddison et al. 2014; its bits are
 * Philox4x32-10, Salmon et al. 2011). Ties: the lowest id.
 *
 * A token may be drawn if its mask bit is set and it is not banned. -inf among the logits is never drawn.
 * bad[r]: a NaN or +inf is among the row's raw logits (banned or not), none that may be drawn is finite, or
 * mask_index[r] names no row of mask; token[r] is -1 then and logprob[r] NaN. The logits of a row of padding may hold
 * anything.
 *
 * What decides a token is exact: integers, or fp32 operations in the CPU's order; only the sum of a log-probability has
 * an order of its own, which depends on vocab alone (sample.cu). The bits of a row depend on that row alone.
 *
 * While a row is sampled its penalties and biases stand in `logits` and the raw values in `saved`; afterwards the
 * logits are what they were, bit for bit. So nothing else may read them meanwhile. A row without either is not written.
 *
 * Lists of rows are in CSR form: row r has the entries indptr[r] .. indptr[r + 1] - 1 of indptr [num_rows + 1]. Ids
 * outside 0 .. vocab - 1 mean nothing. What the CPU's RequireValid refuses (ids out of order or twice in one row,
 * parameters that are not finite, repetition <= 0) must not come here. */
typedef struct {
  uint32_t struct_size;
  int32_t num_rows;                /* 0: nothing is launched */
  int32_t vocab;                   /* 1 .. 262144 */
  int32_t num_mask_rows;           /* of mask */
  float* logits;                   /* [num_rows][vocab] */
  int64_t logits_stride;           /* elements between rows, >= vocab */
  const float* temperature;        /* [num_rows], as all below; <= 0 or NaN: greedy, the filters are not looked at */
  const int32_t* top_k;            /* <= 0: off */
  const float* top_p;              /* >= 1: off; <= 0: one token */
  const float* min_p;              /* <= 0: off */
  const uint64_t* seed;
  const uint32_t* stream;          /* of the noise: the sample of a request that has several */
  const int64_t* position;         /* absolute position of the token being drawn */
  const int32_t* want_logprob;     /* 0: logprob[r] is NaN */
  const uint32_t* mask;            /* null, or [num_mask_rows][mask_stride]: bit i % 32 of word i / 32 is token i */
  int64_t mask_stride;             /* words between rows of mask, >= ceil(vocab / 32) */
  const int32_t* mask_index;       /* [num_rows]: the row of mask, -1 for none; null without mask. Another is
                                    * a cheap way to draw nothing */
  const int32_t* banned_indptr;    /* null: no bans. CSR */
  const int32_t* banned_ids;       /* in any order */
  const int32_t* occurred_indptr;  /* null: no penalties. CSR: the tokens that occurred in a row's prompt or output */
  const int32_t* occurred_ids;     /* strictly ascending within a row */
  const int32_t* output_counts;    /* how often in the output, >= 0 */
  const uint8_t* in_prompt;        /* 0 or 1 */
  const float* repetition;         /* [num_rows]; > 0, 1: off */
  const float* frequency;          /* [num_rows]; 0: off */
  const float* presence;           /* [num_rows]; 0: off */
  const int32_t* bias_indptr;      /* null: no biases. CSR */
  const int32_t* bias_ids;         /* strictly ascending within a row */
  const float* bias;               /* added to the logits of these tokens */
  float* saved;                    /* scratch [occurred_indptr[num_rows] + bias_indptr[num_rows]]; null without lists */
  int32_t* token;                  /* [num_rows] */
  float* logprob;                  /* [num_rows]: log softmax(raw logits)[token], before any adjustment and filter */
  int32_t* bad;                    /* [num_rows]: 0 or 1 */
} SapwoodSampleParams;

SAPWOOD_CUDA_API int sapwood_cuda_sample(const SapwoodSampleParams* params, void* stream);

#endif /* SAPWOOD_CUDA_SAMPLING_PARAMS_H_ */
