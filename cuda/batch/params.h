/* Parameters of the row state (cuda/common/abi.h has the calling convention).
 *
 * The executor's memory of rows lives on the device, so that a step can be queued while the tokens of the one before
 * are unknown: cpp/batch/row_table.h has the definition of it all, plan_blob.h the messages. The way of a step, in
 * stream order:
 *
 *   copy of the blob       one, host to device, from pinned memory
 *   row_ops                applies the plan's row ops; begins the step's result
 *   prepare_step           derives what the forward and the sampler read; advances kv_len of live rows
 *   the forward, sample
 *   commit_step            gives each row its token, notes which have ended; completes the result
 *   copy of the result     one, device to host, into pinned memory
 *
 * Each is one launch of fixed size (prepare_step: two where there are many tokens), counts come from the blob: a graph
 * that holds them replays over other plans. row_ops runs for a plan without row ops too.
 *
 * Held rows. A row whose grammar mask has not come when its token is to be drawn draws none and is held: its keys and
 * values are written, the executor keeps the hidden state that its logit row was computed from (in a place of the row's
 * own, behind the step's tokens). Its decode items, queued before the host knew, are as those of a row that has ended; a
 * resume item, without queries, computes the logit row again from what is kept.
 *
 * Rows that have ended. An item of a dead row, or of another generation than the row's, keeps its place among tokens,
 * segments and logit rows: the host, which lays them out, does not know yet. It is as padding is: its tokens are 0 at
 * position 0, write no K and V (slot -1), and see keys of the dummy row.
 *
 * The dummy row. Row max_rows of every page table belongs to nobody: the executor fills it, once, with one page of
 * zeros that it keeps behind the pool's own. Attention needs kv_len >= q_len and reads pages 0 .. (kv_len - 1) /
 * page_size: here kv_len = q_len, which is at most max_pages * page_size. Nothing writes that page, so what padding
 * computes is finite.
 *
 * Errors. What RowTable throws on becomes the result's error. After a wrong row op no item runs, beside a wrong item
 * the others do; in both cases commit_step ends every row that the plan names (as cpp/program/executor.cc does), and
 * the host reports the step as failed. */
#ifndef SAPWOOD_CUDA_BATCH_PARAMS_H_
#define SAPWOOD_CUDA_BATCH_PARAMS_H_

#include "batch/plan_blob.h"
#include "common/abi.h"

enum { SAPWOOD_CUDA_MAX_GROUPS = 8 };

/* One row. All zeros is a row that nobody has. */
typedef struct {
  uint64_t seed;
  int64_t kv_len; /* tokens whose KV is written once every launched step has run */
  int64_t max_len;
  int64_t min_len;
  uint32_t gen;
  uint32_t stream;
  int32_t last_token; /* sampled, not yet in the KV */
  int32_t alive;      /* goes 1 -> 0 only, until the next init */
  int32_t top_k;
  float temperature;
  float top_p;
  float min_p;
  int32_t rope_mode;
  int32_t return_logprob;
  int32_t num_stop_ids;
  int32_t held; /* the token at position kv_len waits for its mask; last_token is in the KV */
  int32_t num_pages[SAPWOOD_CUDA_MAX_GROUPS]; /* entries of its page tables; what is behind them means nothing */
} SapwoodRow;

/* The rows, as all three take them. The executor allocates: all zeros, but for the page tables' dummy rows. */
typedef struct {
  SapwoodRow* rows;   /* [max_rows] */
  int32_t* stop_ids;  /* [max_rows][max_stop_ids]; may be null where that is 0 */
  /* [max_rows + 1][max_pages] of each group; -1: no page (below a window) */
  int32_t* page_tables[SAPWOOD_CUDA_MAX_GROUPS];
  int32_t num_groups; /* 1 .. SAPWOOD_CUDA_MAX_GROUPS */
  int32_t max_rows;   /* 1 .. 16383 */
  int32_t max_pages;  /* max_pages * page_size <= 2^31 - 1: positions and lengths of a step are int32 */
  int32_t max_stop_ids;
  int32_t page_size; /* of all groups */
  int32_t reserved;
} SapwoodRowState;

/* As RowTable::ApplyRowOps. Writes of the result everything but the items. */
typedef struct {
  uint32_t struct_size;
  int32_t reserved;
  SapwoodRowState state;
  const SapwoodPlanBlob* blob;    /* 16-byte aligned */
  SapwoodStepResultBlock* result; /* and max_rows SapwoodStepResultItem behind it */
} SapwoodRowOpsParams;

SAPWOOD_CUDA_API int sapwood_cuda_row_ops(const SapwoodRowOpsParams* params, void* stream);

/* As RowTable::Prepare, with padding. A plan of T tokens, S items and L logit rows may be launched with any T' >= T, S'
 * >= S, L' >= L (num_padded_*; where one is too small the step fails with SAPWOOD_STEP_PADDING, and all is padding):
 *   segments S .. S' - 1 take one token each of the T' - T (decode buckets), those for which none is left take none;
 *     otherwise as a dead row's
 *   tokens that belong to no segment (beyond q_indptr[S']): as a dead row's; attention does not write their output
 *   logit rows L .. L' - 1, and those of dead rows: greedy, no log-probability, no bans; the former have logit_src 0
 * A held row's decode is as a dead row's.
 * Elements beyond T', S', L' are not touched. */
typedef struct {
  uint32_t struct_size;
  int32_t num_padded_tokens;     /* T', >= 1 */
  int32_t num_padded_segments;   /* S', 1 .. 16384 */
  int32_t num_padded_logit_rows; /* L', >= 0: 0 allows the arrays of logit rows to be null */
  int32_t kept_begin;            /* where the hidden state kept of row 0 is, counted as query tokens are; those of the
                                  * others follow */
  int32_t reserved;
  SapwoodRowState state;
  const SapwoodPlanBlob* blob;
  SapwoodStepResultBlock* result; /* as row_ops left it */

  int32_t* tokens;     /* [T'] */
  int32_t* positions;  /* [T'] absolute */
  int32_t* rope_modes; /* [T'] */
  int64_t* slots[SAPWOOD_CUDA_MAX_GROUPS]; /* [T'] of each group: page * page_size + offset, or -1 */

  int32_t* q_indptr;  /* [S' + 1] */
  int32_t* kv_lens;   /* [S'] after this step */
  int32_t* page_rows; /* [S'] the item's row, max_rows where that is dead */

  int32_t* logit_src;  /* [L'] as all below: the query token whose hidden state feeds the logit row, or kept_begin + row */
  int32_t* logit_rows; /* its row, or max_rows */
  float* temperature;  /* from here on as cuda/sampling/params.h has them */
  int32_t* top_k;
  float* top_p;
  float* min_p;
  uint64_t* seed;
  uint32_t* stream;
  int64_t* position;
  int32_t* want_logprob;
  int32_t* banned_indptr; /* [L' + 1]: l * max_stop_ids */
  int32_t* banned_ids;    /* [L'][max_stop_ids]: stop ids while fewer than min_len tokens exist; unused places are -1,
                           * which is no id. Both may be null where max_stop_ids is 0 */
} SapwoodPrepareStepParams;

SAPWOOD_CUDA_API int sapwood_cuda_prepare_step(const SapwoodPrepareStepParams* params, void* stream);

/* As RowTable::CommitSample and FinishStep: a live item with logit rows takes the token of its last one, or is held.
 * Without error the result's items are complete after this, with one they mean nothing. */
typedef struct {
  uint32_t struct_size;
  int32_t reserved;
  SapwoodRowState state;
  const SapwoodPlanBlob* blob;
  SapwoodStepResultBlock* result; /* as prepare_step left it */
  const int32_t* page_rows; /* as prepare_step wrote them */
  const int32_t* token;     /* [L] as sample wrote them; not read where the plan has no logit rows */
  const float* logprob;
  const int32_t* bad;
  const int32_t* mask_index; /* [L] as sample read it; SAPWOOD_MASK_LATE: the row is held, nothing was drawn for it. Null:
                              * no row is */
} SapwoodCommitStepParams;

SAPWOOD_CUDA_API int sapwood_cuda_commit_step(const SapwoodCommitStepParams* params, void* stream);

#endif /* SAPWOOD_CUDA_BATCH_PARAMS_H_ */
