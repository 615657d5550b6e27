/* A StepPlan as one flat blob for the device, and the block that a step leaves behind for the host. Plain C.
 *
 * cpp/batch/plan_packer.cc writes the blob into pinned memory, one copy brings it to the device, the kernels of this
 * folder read it (params.h has the way of a step); the block goes the other way and becomes a StepResult there. Both
 * sides include this header and nothing else of each other.
 *
 * The blob: this header, then seven arrays, each at the byte offset that the header names, a multiple of 16. Kinds and
 * flags have the numbers of cpp/batch/plan.h. What a kernel may rely on, because the packer has checked it: rows are
 * 0 .. max_rows - 1, groups exist, ranges lie within their arrays, an item's row is no other item's, kinds are extend,
 * decode or resume, 1 <= q_len <= max_pages * page_size (0 of a resume), forced tokens are some, no length is
 * negative. */
#ifndef SAPWOOD_CUDA_BATCH_PLAN_BLOB_H_
#define SAPWOOD_CUDA_BATCH_PLAN_BLOB_H_

#include <stdint.h>

/* Raised whenever something below changes: _core and libsapwood_cuda.so are built apart. */
enum { SAPWOOD_PLAN_BLOB_FORMAT = 2 };

enum {
  SAPWOOD_ROW_OP_INIT = 0,
  SAPWOOD_ROW_OP_APPEND_PAGES = 1,
  SAPWOOD_ROW_OP_FORCE_TOKENS = 2,
  SAPWOOD_ROW_OP_TRUNCATE = 3,
  SAPWOOD_ROW_OP_FREE = 4
};
enum { SAPWOOD_ITEM_EXTEND = 0, SAPWOOD_ITEM_DECODE = 1, SAPWOOD_ITEM_RESUME = 4 };

/* In place of a logit row's mask: it has not come, the row is held (params.h). */
enum { SAPWOOD_MASK_LATE = -2 };

typedef struct {
  uint32_t format; /* SAPWOOD_PLAN_BLOB_FORMAT */
  int32_t num_bytes;
  int64_t step_id;
  int64_t sequence; /* of the packer's plans: 1, 2, .. */
  int32_t num_row_ops;
  int32_t num_items;      /* S, of which dead rows' keep their place */
  int32_t num_tokens;     /* T, of all items */
  int32_t num_logit_rows; /* L, of all items */
  /* Byte offsets of the arrays. */
  int32_t row_ops;      /* SapwoodPlanRowOp [num_row_ops], applied in order */
  int32_t inits;        /* SapwoodPlanInit, named by row ops */
  int32_t ints;         /* int32, named by row ops and inits: page ids, forced tokens, stop ids */
  int32_t items;        /* SapwoodPlanItem [S] */
  int32_t q_indptr;     /* int32 [S + 1]: item i has query tokens q_indptr[i] .. q_indptr[i + 1] - 1 */
  int32_t logit_indptr; /* int32 [S + 1]: and those logit rows */
  int32_t tokens;       /* int32, named by extend items */
  int32_t reserved[3];
} SapwoodPlanBlob;

typedef struct {
  int32_t kind;
  int32_t row;
  uint32_t gen;
  int32_t group; /* append_pages */
  int32_t begin; /* append_pages, force_tokens: in ints; init: in inits */
  int32_t count;
  int64_t value; /* force_tokens: position; truncate: new kv_len */
} SapwoodPlanRowOp;

typedef struct {
  uint64_t seed;
  int64_t kv_len;
  int64_t max_len;
  int64_t min_len;
  uint32_t stream;
  int32_t top_k;
  float temperature;
  float top_p;
  float min_p;
  int32_t rope_mode;
  int32_t return_logprob;
  int32_t stop_begin; /* in ints */
  int32_t stop_count; /* <= max_stop_ids */
  int32_t reserved;
} SapwoodPlanInit;

typedef struct {
  int32_t row;
  uint32_t gen;
  int32_t kind;
  int32_t q_len;
  int32_t logit_from;  /* first query token that yields a logit row; 0 of a decode, q_len for none, -1 of a resume: its
                        * logit row is that of the row's newest token, which an earlier step computed */
  int32_t token_begin; /* extend: in tokens */
  int64_t kv_len;      /* extend: expected before the step */
} SapwoodPlanItem;

/* Why a step has failed: what RowTable would have thrown (cpp/batch/row_table.cc). `index` is an item's in the plan, or
 * the row that a row op names. */
enum {
  SAPWOOD_STEP_OK = 0,
  SAPWOOD_STEP_FORMAT = 1,          /* the blob has format `value` */
  SAPWOOD_STEP_ROW_OP_GEN = 2,      /* row `index` is at generation `value` */
  SAPWOOD_STEP_FORCED_POSITION = 3, /* the next position of row `index` is `value` */
  SAPWOOD_STEP_TRUNCATE = 4,        /* row `index` has kv_len `value` */
  SAPWOOD_STEP_PAGES_FULL = 5,      /* the table of row `index` in group `group` has `value` pages already */
  SAPWOOD_STEP_KV_LEN = 6,          /* item `index`: the row's kv_len is `value` */
  SAPWOOD_STEP_PAGES_SHORT = 7,     /* item `index`: the row's table in group `group` has `value` pages */
  SAPWOOD_STEP_PAGE_MISSING = 8,    /* item `index`: no page for position `value` in group `group` */
  SAPWOOD_STEP_PADDING = 9,         /* more of something than the launch has room for */
  SAPWOOD_STEP_HELD = 10            /* item `index`: a resume of a row that is not held (`value` 0), or the row is (1) */
};

/* The block: this header, at byte 64 SapwoodStepResultItem [num_items], in the plan's order. */
typedef struct {
  int64_t step_id;
  int64_t sequence;
  int64_t num_tokens; /* of live rows, as all three; 0 where the step has failed */
  int64_t num_kv;
  int64_t num_logit_rows;
  int32_t num_items;
  int32_t error; /* SAPWOOD_STEP_*: the first one, a row op's before an item's */
  int32_t error_index;
  int32_t error_group;
  int64_t error_value;
} SapwoodStepResultBlock;

typedef struct {
  int32_t flags;
  int32_t n;     /* tokens produced: 0 or 1 */
  int32_t token; /* -1 without */
  float logprob; /* NaN where not asked for */
} SapwoodStepResultItem;

#endif /* SAPWOOD_CUDA_BATCH_PLAN_BLOB_H_ */
