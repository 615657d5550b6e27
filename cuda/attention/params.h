/* Parameters of paged attention (cuda/common/abi.h has the calling convention).
 *
 * A segment is a run of tokens of one request in this step: its queries, q_len of them, and all of its keys, kv_len, the
 * new tokens' among them, which are in their pages already. Query i sees keys [lo, hi): hi = kv_len - q_len + i + 1, lo =
 * hi - window where there is a window, else 0. A row is a (query, query head) pair; the `group` heads of one KV head stand
 * together, row r of a segment is query r / group, head kv_head * group + r % group.
 *
 * Rows are cut into tiles of rows_per_tile, keys at absolute multiples of chunk_len. An item is one tile against one chunk
 * of keys, the unit of work. Three launches, all of fixed size, so that a graph replays them over other lengths:
 *   attention_plan    lists tiles and items; once a step for all layers of the same window
 *   attention         computes the items: the output where a tile has one item, else partial results
 *   attention_merge   merges the partial results of tiles that have several
 * Which items there are, and so the bits of a row, depends on its own segment, rows_per_tile and chunk_len alone. */
#ifndef SAPWOOD_CUDA_ATTENTION_PARAMS_H_
#define SAPWOOD_CUDA_ATTENTION_PARAMS_H_

#include "common/abi.h"

/* Keys are read in steps of this many or fewer: chunk_len is a multiple of it. */
enum { SAPWOOD_CUDA_ATTENTION_MIN_CHUNK = 64 };

typedef struct {
  int32_t segment;
  int32_t first_row; /* of the segment's rows */
  int32_t first_item;
  int32_t num_items; /* chunks that its rows can see, ascending */
} SapwoodAttentionTile;

typedef struct {
  int32_t tile;
  int32_t chunk; /* keys [chunk * chunk_len, (chunk + 1) * chunk_len) */
} SapwoodAttentionItem;

/* The list of work. Only segments with min_rows <= q_len * group <= max_rows are listed, so that short ones (decode) and
 * long ones go to different calls. counts = {tiles, items, overflow}: where there are more than max_tiles or max_items,
 * overflow is 1 and the list is empty. No more than sum(ceil(rows / rows_per_tile)) tiles, each of no more than
 * ceil(kv_len / chunk_len) items. */
typedef struct {
  uint32_t struct_size;
  int32_t num_segments;    /* 1 .. 16384; those of q_len 0 have no work */
  const int32_t* q_indptr; /* [num_segments + 1]: segment s has tokens q_indptr[s] .. q_indptr[s + 1] - 1 of the step */
  const int32_t* kv_lens;  /* [num_segments], >= q_len */
  SapwoodAttentionTile* tiles; /* [max_tiles] */
  SapwoodAttentionItem* items; /* [max_items] */
  int32_t* counts;             /* [3] */
  int32_t max_tiles;
  int32_t max_items;
  int32_t group;
  int32_t rows_per_tile;
  int32_t chunk_len; /* a multiple of 64 */
  int32_t window;    /* 0: none */
  int32_t min_rows;
  int32_t max_rows;
} SapwoodAttentionPlanParams;

SAPWOOD_CUDA_API int sapwood_cuda_attention_plan(const SapwoodAttentionPlanParams* params, void* stream);

/* out = softmax(softcap(scale q k^T)) v over the keys each row sees; with sinks, the softmax has one more key of that score
 * and no value. Scores, sums and outputs in f32, probabilities rounded to bf16 before they multiply v and before they are
 * summed (FlashAttention-2, arXiv 2307.08691; splitting keys: Flash-Decoding).
 *
 * K lies at k_pages + page * page_stride + (kv_head * page_size + offset) * head_dim for page = page_table[page_rows[s]]
 * [token / page_size], offset = token % page_size; V likewise. Pages of keys that no row sees are not read.
 * rows_per_tile chooses the kernel: 16 is for few rows and long keys (the four warps of a block share the keys of a step),
 * 128 (64 where head_dim > 128) for many rows (the warps share the rows). attention_merge takes the same parameters. */
typedef struct {
  uint32_t struct_size;
  int32_t num_kv_heads;
  const void* q;    /* bf16 [tokens][num_kv_heads * group * head_dim] */
  void* out;        /* bf16, the same shape; may not overlap q */
  int64_t q_stride; /* elements between tokens; a multiple of 8 */
  int64_t out_stride; /* even */
  const void* k_pages; /* bf16 */
  const void* v_pages;
  int64_t page_stride;       /* elements between pages; a multiple of 8 */
  const int32_t* page_table; /* [rows][table_stride] */
  int64_t table_stride;
  const int32_t* page_rows;  /* [num_segments]: the segment's row of page_table */
  const int32_t* q_indptr;   /* as planned */
  const int32_t* kv_lens;
  const SapwoodAttentionTile* tiles;
  const SapwoodAttentionItem* items;
  const int32_t* counts;
  float* partial_o;   /* [max_items][num_kv_heads][rows_per_tile][head_dim] */
  float* partial_ml;  /* [max_items][num_kv_heads][rows_per_tile][2]: maximum (of scores times log2 e), sum */
  const float* sinks; /* [num_kv_heads * group] or null */
  int32_t group;
  int32_t head_dim; /* a multiple of 8, <= 256 */
  int32_t page_size;
  int32_t rows_per_tile; /* 16, or 128 (64 where head_dim > 128) */
  int32_t chunk_len;
  int32_t window;
  float scale;
  float softcap;      /* 0: none */
  int32_t num_blocks; /* that walk through the list, for each KV head; any number gives the same bits */
} SapwoodAttentionParams;

SAPWOOD_CUDA_API int sapwood_cuda_attention(const SapwoodAttentionParams* params, void* stream);
SAPWOOD_CUDA_API int sapwood_cuda_attention_merge(const SapwoodAttentionParams* params, void* stream);

#endif /* SAPWOOD_CUDA_ATTENTION_PARAMS_H_ */
