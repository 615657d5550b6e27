// The CPU kernels: one table of functions per ISA level, picked once at run time.
//
// Determinism contract (DESIGN 5; the tests hold every kernel to it, per ISA level): the bits of an output row depend
// on that row's inputs alone, not on how many rows, tiles or threads there are:
//   gemm       one accumulator chain per output, k ascending, the same instruction for every number of rows; K is
//              never split (k-blocking loads C as the initial accumulator); explicit FMA, contraction off. Quantised
//              weights: exact integer sums of 32 products, one float chain over those, k ascending.
//   attention  keys in tiles of 64 and chunks of 256 at absolute positions; a chunk starts from an empty (m, l, O);
//              chunks are merged left to right; the same code for prefill and decode. Tokens outside
//              [lo, hi) are never multiplied: masked pages may hold NaN.
//   norms      fixed lanes, fixed tree.
// Sources are compiled once per ISA level in a namespace of their own, without STL in hot code (ODR across levels).
//
// Activations between nodes are `act` (bf16 or f32, the model's compute dtype); the residual stream and logits are f32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sapwood {

// kQ8: rows of Q8Block, of which there are Q8Blocks(cols); kI8: KV pages; the other dtypes have elements.
enum class DType : uint8_t { kF32 = 0, kBF16 = 1, kF16 = 2, kI32 = 3, kQ8 = 4, kI8 = 5 };
inline constexpr size_t DTypeBytes(DType t) {
  return t == DType::kF32 || t == DType::kI32 ? 4 : t == DType::kI8 ? 1 : 2;
}

enum class Isa : uint8_t { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
const char* IsaName(Isa isa);

// --- Packed weights -------------------------------------------------------------------------------------------
// A linear weight W[N][K] (row n = output n) becomes panels of 64 outputs, shared by every ISA level:
//   f32   [ceil(N/64)][K][64]                f32
//   bf16  [ceil(N/64)][ceil(K/2)][64][2]     bf16, k pairs interleaved (VDPBF16PS operand order)
//   int8  [ceil(N/64)][ceil(K/32)]{[8][64][4] u8, [64] f16}     w = (u8 - 128) * scale; fours of k in a lane (VPDPBUSD)
//   int4  [ceil(N/64)][ceil(K/32)]{[4][64][4] u8, [64] f16}     w = (nibble - 8) * scale; the low nibbles are one four of
//                                                               k, the high ones the next
// Outputs past N and k past K are zero. int8 and int4 scale every 32 k of an output by themselves (the numerics of
// ggml's Q8_0 and Q4_0); their layers take rows of Q8Block.
inline constexpr int kPanel = 64;
inline constexpr int kQ8Block = 32;  // neighbours along K with one scale, of weights and activations
enum class WeightFormat : uint8_t { kAct = 0, kInt8 = 1, kInt4 = 2 };  // kAct: as the activations, f32 or bf16
size_t PackedBytes(WeightFormat format, DType act, int64_t n, int64_t k);
inline size_t PackedBytes(DType dtype, int64_t n, int64_t k) { return PackedBytes(WeightFormat::kAct, dtype, n, k); }
// Pack panels [panel_begin, panel_end). rows[i] = pointer to source row i (K elements of src), or null for a zero row;
// i runs over ceil(N/64)*64 rows. src f16/bf16/f32 are converted to dst (f32 or bf16, round to nearest even).
void PackPanels(DType dst, void* out, int64_t n, int64_t k, const void* const* rows, DType src, int64_t panel_begin,
                int64_t panel_end);

// Output `row` (0..63) of a packed int8 or int4 panel as the k floats it stands for (tests, the reference executor).
void ReadQuantizedRow(WeightFormat format, const void* panel, int64_t k, int64_t row, float* out);
const char* WeightFormatName(WeightFormat format);

// 32 neighbours of a row of activations: x[i] = q[i] * scale. The sums undo the offsets of the weights.
struct Q8Block {
  int8_t q[kQ8Block];
  float scale;
  int32_t minus_8_sums, minus_128_sums;  // -8 and -128 times the sum of q
  int32_t unused;
};
static_assert(sizeof(Q8Block) == 48);
inline constexpr int64_t Q8Blocks(int64_t cols) { return (cols + kQ8Block - 1) / kQ8Block; }
inline constexpr size_t RowBytes(DType t, int64_t cols) {
  return t == DType::kQ8 ? static_cast<size_t>(Q8Blocks(cols)) * sizeof(Q8Block) : static_cast<size_t>(cols) * DTypeBytes(t);
}

// --- KV pages --------------------------------------------------------------------------------------------------
// One page of one layer: [kv_head][K block | V block | scales], head_dim padded to a multiple of 16 (Dp), padding zero:
//   f32   K [Dp][page_size]            V [page_size][Dp]             no scales
//   bf16  K [Dp/2][page_size][2]       V [page_size/2][Dp][2]        no scales
//   int8  K [Dp][page_size]            V [page_size][Dp]             f32 of K [page_size], f32 of V [page_size]
// so 16 tokens stand in the lanes of a score and Dp in the lanes of an output. page_size is 16, 32 or 64.
// int8: x = q * scale with scale = max|x| / 127 of the token's head, q rounded to nearest even; all zero where max|x|
// is below kMinKvAmax; a token's head with a NaN or an infinity has scale NaN, q 0.
inline constexpr float kMinKvAmax = 0x1p-100f;  // so that 127 / amax is finite
struct KvLayout {
  DType dtype;        // kF32, kBF16 or kI8
  int32_t page_size;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t padded_dim() const { return (head_dim + 15) / 16 * 16; }
  size_t block_bytes() const { return size_t(padded_dim()) * page_size * DTypeBytes(dtype); }  // K or V of one head
  size_t scale_bytes() const { return dtype == DType::kI8 ? size_t(page_size) * sizeof(float) : 0; }  // of one block
  size_t page_bytes() const { return 2 * (block_bytes() + scale_bytes()) * num_kv_heads; }            // one layer
};
// Canonical copy of one token's K and V of one layer page: k, v [num_kv_heads][head_dim] in layout.dtype, of int8 pages
// the f32 values q * scale (export, tests).
void ReadKvToken(const KvLayout& layout, const void* page, int32_t offset, void* k, void* v);

// --- Ops -------------------------------------------------------------------------------------------------------
enum class Epilogue : uint8_t {
  kStoreAct,   // out act [M][N]  = acc + bias
  kStoreF32,   // out f32 [M][N]  = acc + bias
  kResidual,   // out f32 [M][N]  = residual + (acc + bias)          (residual may alias out)
  kSiluMul,    // panel = 32 gate + 32 up columns; out act [M][N/2]  = silu(gate) * up   (N = 2I padded to panels)
  kSiluMulQ8,  // the same, out kQ8
  kLogits,     // out f32 [M][N]  = (acc + bias) * scale (softcap > 0: softcap * tanh(x / softcap));
               // block_max [M][ceil(N/64)], NaN where a logit of the block is
};

struct GemmArgs {
  const void* a;          // act [M][lda], or Q8Block [M][lda] of quantised weights
  int64_t lda;            // elements >= K, or blocks >= Q8Blocks(K)
  const void* w;          // packed panels
  const float* bias;      // [N] or null (kSiluMul: [panels * 64] in the order of the panels)
  const float* residual;  // f32 [M][ldc] (kResidual)
  void* out;              // [M][ldc]
  int64_t ldc;            // elements, or blocks of kSiluMulQ8
  int64_t n, k;           // n: valid outputs (kSiluMul: n = I, the valid output columns)
  float scale = 1.0f, softcap = 0.0f;
  float* block_max = nullptr;  // kLogits, ld = ceil(n/64)
  Epilogue epilogue;
  WeightFormat format = WeightFormat::kAct;
};

// One item = the query rows [q_begin, q_begin + q_len) of one segment against one kv head.
struct AttentionArgs {
  KvLayout layout;
  const void* kv;             // base of this layer: page p at kv + p * layout.page_bytes()
  const int32_t* page_table;  // absolute page index -> page
  const void* q;              // act [T][num_q_heads * head_dim], rope applied
  void* out;                  // act, same shape
  int64_t ldq, ldo;           // elements between tokens
  int32_t num_q_heads;        // per token; heads of one kv head stand together
  int32_t kv_head;
  int32_t q_begin, q_len;     // rows of q and out
  int64_t first_position;     // absolute position of row q_begin; a row at p sees keys [max(0, p + 1 - window), p]
  int32_t window;             // 0 = all
  float scale;                // multiplies q.k
  float softcap;              // 0 = off
  void* scratch;              // AttentionScratchBytes(...) of this thread
  // Keys split among several calls: chunks of kAttentionChunk absolute positions, [chunk_begin, chunk_end) in this one.
  // Their (O, m, l) go to partial [q_len * group size][num_chunks][AttentionPartialFloats(head_dim)], which begins with
  // first_chunk; attention_merge writes out. partial == null: all keys in one call, which writes out. Same bits.
  float* partial;
  int64_t first_chunk, num_chunks, chunk_begin, chunk_end;
  // With partial: rows of several segments that have these chunks' pages in common and see all of their keys. tokens
  // [q_len] takes the place of q_begin, chunk_end that of first_position. Null: one segment's.
  const int32_t* tokens;
  // To attention_merge: what such a call has left of the chunks [0, shared_chunks), which come before first_chunk, laid out
  // as partial. Null: none.
  const float* shared;
  int64_t shared_chunks;
};
inline constexpr int64_t kAttentionChunk = 256;
size_t AttentionScratchBytes(int32_t group_size, int32_t head_dim);
size_t AttentionPartialFloats(int32_t head_dim);

struct RopeKvArgs {
  const float* qkv;           // one token: [(num_q_heads + 2 * num_kv_heads) * head_dim] f32, bias already added
  int32_t num_q_heads;
  const float* q_norm;        // [head_dim] or null: RMSNorm of each head before rope
  const float* k_norm;
  float norm_eps;
  const float* cos;           // [rotary_dim / 2] of this token's position and rope mode
  const float* sin;
  int32_t rotary_dim;         // even, <= head_dim; pairs are (i, i + rotary_dim/2)
  void* q_out;                // act [num_q_heads * head_dim]
  KvLayout layout;            // layout.dtype is act or kI8
  void* page;                 // the layer page the token lives in
  int32_t offset;             // its place there
};

struct KernelTable {
  Isa isa;
  // Rows [m0, m1) of panels [p0, p1). act = dtype of the activations and of kAct weights.
  void (*gemm)(DType act, const GemmArgs& args, int64_t m0, int64_t m1, int64_t p0, int64_t p1);
  // y[H] = x[H] * rsqrt(mean(x^2) + eps) * w, or * (1 + w) when plus_one; y is f32, bf16 or kQ8. One row.
  void (*rms_norm)(DType y_dtype, const float* x, const float* w, void* y, int64_t h, float eps, bool plus_one);
  // One token: per-head norm, rope, q out, K and V into the page (each rounded to act once; int8 from the f32 values).
  void (*rope_kv)(DType act, const RopeKvArgs& args);
  void (*attention)(DType act, const AttentionArgs& args);
  // The chunks of partial, all of them computed, left to right into out. chunk_begin and chunk_end are not read.
  void (*attention_merge)(DType act, const AttentionArgs& args);
  // x f32[h] = table[row] * scale; table is act.
  void (*embed)(DType act, const void* table_row, float* x, int64_t h, float scale);
  // y = x of h elements as Q8Blocks. One row.
  void (*quantize)(DType act, const void* x, Q8Block* y, int64_t h);
  // One packed panel of format int8 or int4 from 64 rows of k floats, null = zero.
  void (*quantize_panel)(WeightFormat format, const float* const* rows, int64_t k, uint8_t* panel);
};

// Best level this CPU has (cpuid and XCR0).
Isa BestIsa();
bool IsaSupported(Isa isa);
// "auto" or empty = BestIsa(). Throws InvalidArgument naming the levels of this machine and build.
Isa ParseIsa(const char* name);
const KernelTable& Kernels(Isa isa);

}  // namespace sapwood
