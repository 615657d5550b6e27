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
 *   attention         computes the items: the output where a tile has one chunk, else partial results
 *   attention_merge   merges the partial results of tiles that have several
 * What a launch reads of a step is on the device: a graph that was captured with these pointers and capacities is right for
 * any step that fits them, and where one does not fit the plan says so (`failure`).
 *
 * Shared prefixes (cascade: Hydragen, arXiv 2402.05099; FlashInfer, arXiv 2501.01005). Decoding segments whose first pages
 * are the same would each read them. Where the plan is told of such a prefix, its whole chunks are read by shared tiles
 * instead: a shared tile packs 16 rows of several segments, an item of it is these rows against one chunk, and each row's
 * partial result goes where its own segment's item would have put it. Hence attention_merge knows nothing of them, and a
 * row's bits are the same with and without: a whole chunk needs no mask, and a row's arithmetic does not depend on what
 * rows its tile has beside it.
 *
 * So what is computed of a row against which chunks, and so its bits, depends on its own segment, rows_per_tile,
 * chunk_len and the device alone. */
#ifndef SAPWOOD_CUDA_ATTENTION_PARAMS_H_
#define SAPWOOD_CUDA_ATTENTION_PARAMS_H_

#include "common/abi.h"

/* Keys are read in steps of this many or fewer: chunk_len is a multiple of it. */
enum { SAPWOOD_CUDA_ATTENTION_MIN_CHUNK = 64 };

typedef struct {
  int32_t segment;
  int32_t first_row;   /* of the segment's rows */
  int32_t first_place; /* of its partial results, one for each chunk */
  int32_t num_chunks;  /* that its rows can see, ascending */
} SapwoodAttentionTile;

typedef struct {
  int32_t tile;  /* of tiles; -1 - tile of shared_tiles where negative */
  int32_t chunk; /* keys [chunk * chunk_len, (chunk + 1) * chunk_len) */
} SapwoodAttentionItem;

enum { SAPWOOD_CUDA_ATTENTION_SHARED_ROWS = 16 }; /* of a shared tile */

typedef struct {
  int32_t segment; /* through whose pages the prefix is read */
  int32_t num_rows;
} SapwoodAttentionSharedTile;

typedef struct {
  int32_t token; /* of the step */
  int32_t head;  /* 0 .. group - 1, of each KV head */
  int32_t first_place; /* of the tile that the row is in */
  int32_t tile_row;    /* there */
} SapwoodAttentionSharedRow;

/* What is wrong with a plan, counts[2]: */
enum {
  SAPWOOD_CUDA_ATTENTION_OVERFLOW = 1, /* more tiles than max_tiles, or more places than max_items */
  SAPWOOD_CUDA_ATTENTION_BAD_PREFIX = 2 /* a prefix names a segment that is not there, or one that has a prefix already */
};

/* The list of work. Only segments with min_rows <= q_len * group <= max_rows are listed, so that short ones (decode) and
 * long ones go to different calls. counts = {tiles, items, failure}: where failure is not 0 the list is empty, so that
 * attention leaves out as it was. `failed`, if not null, collects the failures of many plans (by or) until its owner reads
 * and zeroes it: one word to copy back with what a step yields. No more than sum(ceil(rows / rows_per_tile)) tiles, each of
 * no more than ceil(kv_len / chunk_len) places; there are as many items as places, fewer where prefixes are shared, and
 * never more shared tiles than tiles.
 *
 * Prefix i is shared by segments prefix_segments[prefix_indptr[i]] .. [prefix_indptr[i + 1] - 1], whose page tables say the
 * same of their first prefix_lens[i] tokens; a segment has one prefix at most. Lists of no segments cost next to nothing:
 * num_prefixes is a capacity. What is not to be shared is found here: of a prefix, the chunks that lie before the new
 * tokens of all its segments; segments that this plan does not list are left out, and one alone has its own items. */
typedef struct {
  uint32_t struct_size;
  int32_t num_segments;    /* 1 .. 16384; those of q_len 0 have no work */
  const int32_t* q_indptr; /* [num_segments + 1]: segment s has tokens q_indptr[s] .. q_indptr[s + 1] - 1 of the step */
  const int32_t* kv_lens;  /* [num_segments], >= q_len */
  SapwoodAttentionTile* tiles; /* [max_tiles] */
  SapwoodAttentionItem* items; /* [max_items] */
  int32_t* counts;             /* [3] */
  int32_t* failed;             /* [1] or null */
  const int32_t* prefix_indptr;   /* [num_prefixes + 1], ascending */
  const int32_t* prefix_segments;
  const int32_t* prefix_lens;     /* [num_prefixes], tokens */
  SapwoodAttentionSharedTile* shared_tiles; /* [max_tiles] */
  SapwoodAttentionSharedRow* shared_rows;   /* [max_tiles][16], aligned to 16 bytes */
  int32_t* prefix_scratch;        /* [2][num_segments] */
  int32_t num_prefixes; /* 0 .. 512; 0: the six above may be null. Else window is 0, as rows of a window have not the same
                           first key, and rows_per_tile is 16 */
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
 * 128 (64 where head_dim > 128) for many rows (the warps share the rows). Tiles of 128 rows are computed by TMA and wgmma
 * on compute capability 9.0, where there are tickets, page_size is 8, 16, 32, 64 or a multiple of 128, chunk_len a multiple
 * of 128, page_stride one of page_size * head_dim and scale positive: the same within rounding.
 *
 * A partial result is the state (O, m, l) of a row's softmax over some of its keys: m the maximum of their scores times
 * log2 e, l the sum of 2^(score - m), O that of 2^(score - m) v. Two states of disjoint keys are merged by
 *   m = max(m1, m2), l = l1 2^(m1 - m) + l2 2^(m2 - m), O likewise; the output is O / l
 * which is commutative and, to rounding, associative, with (0, -inf, 0) as its neutral element: however keys are split, the
 * states can be merged in any shape. attention_merge takes the same parameters and merges those of a row, its chunks
 * ascending in one sum, so that the bits are fixed too; a sink is one more state, (0, sink, 1), and comes first. */
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
  const SapwoodAttentionSharedTile* shared_tiles; /* these two null where the plan had no prefixes */
  const SapwoodAttentionSharedRow* shared_rows;
  float* partial_o;   /* [max_items places][num_kv_heads][rows_per_tile][head_dim] */
  float* partial_ml;  /* [max_items][num_kv_heads][rows_per_tile][2]: maximum (of scores times log2 e), sum */
  const float* sinks; /* [num_kv_heads * group] or null */
  int32_t* tickets;   /* [2][num_kv_heads]: zero before a launch, and after it; one launch at a time. Null: the portable tier
                         on every device */
  int32_t group;
  int32_t head_dim; /* a multiple of 8, <= 256 */
  int32_t page_size;
  int32_t rows_per_tile; /* 16, or 128 (64 where head_dim > 128) */
  int32_t chunk_len;
  int32_t window;
  float scale;
  float softcap;      /* 0: none */
  int32_t num_blocks; /* that walk through the list, for each KV head, two a processor; any number gives the same bits */
  int32_t num_pages;  /* of k_pages and v_pages */
} SapwoodAttentionParams;

SAPWOOD_CUDA_API int sapwood_cuda_attention(const SapwoodAttentionParams* params, void* stream);
SAPWOOD_CUDA_API int sapwood_cuda_attention_merge(const SapwoodAttentionParams* params, void* stream);

#endif /* SAPWOOD_CUDA_ATTENTION_PARAMS_H_ */
