// Paged attention of many rows on compute capability 9.0: K and V by TMA, both products by wgmma (FlashAttention-3, arXiv
// 2407.08608). Items, their rows and their results are those of attention.cu; a block of three warp groups computes one
// after the other, in steps of kKeys keys:
//
//   the producer, one warp, draws the item's number and walks kStages places ahead of the consumers: a lane looks up a page
//   and copies 64 columns of its K and its V
//   two consumers of 64 rows each, Q in registers:
//     S = Q K^T of the first step; softmax
//     for each further step: issue S = Q K^T of it, then O += P V of the one before; softmax of S while O runs on
//     O += P V of the last; the rows' output, or their (O, m, l)
//
// The consumers take turns to issue: while one multiplies, the other has its exponentials. Which is all that the turns are
// for; each consumer's registers are its own.
//
// Blocks draw tickets for items, because the items of a prompt have from one step to all of a chunk's, and the list begins
// with the long ones. The last block to find none left puts the tickets back for the next launch.
//
// Places of K and V: [kDim / 64 column blocks][kKeys][64], 128 bytes a row, swizzled as TMA writes and wgmma reads it.
// The pages of a step that no row of the tile sees are not copied, and what a copied page holds beyond the tile's keys is
// not to be trusted: scores of such keys are masked, and rows of V are zeroed first, as 0 * NaN is NaN.
//
// Order of sums of a row: k16 by k16 of wgmma, keys ascending, then attention_merge's chunks ascending. Steps stand at
// multiples of kKeys, and a step of which a row sees nothing changes none of its bits.
#include "attention/attention_sm90.cuh"

#include <cstdint>
#include <utility>

#include "attention/item.cuh"
#include "common/check.cuh"
#include "common/ptx_sm90.cuh"

namespace sapwood_cuda {
namespace {

constexpr int kRows = 128;  // of a tile
constexpr int kKeys = 128;  // of a step
constexpr int kGroup = 4 * kWarp;  // threads of a warp group
constexpr int kConsumers = 2;
constexpr int kConsumerThreads = kConsumers * kGroup;
constexpr int kThreads = kGroup + kConsumerThreads;
constexpr int kConsumerWarps = kConsumerThreads / kWarp;
constexpr int kColumns = 64;  // of a row of 128 bytes
constexpr int kRowBytes = 2 * kColumns;
constexpr int kBlockBytes = kKeys * kRowBytes;  // of a column block of a step
constexpr int kCoreBytes = 8 * kRowBytes;       // eight rows, of which the swizzle makes a unit
constexpr int kMinPage = 8;                     // tokens: a copy writes whole units
constexpr int kItems = 2;                       // numbers of items on their way from the producer
// A processor has 65536 registers, and the kernel begins with 168 for each thread.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kGroup * kProducerRegisters + kConsumerThreads * kConsumerRegisters <= 65536);

// Named barriers.
constexpr int kTurn = 1;  // and 2: of the first consumer, of the second
constexpr int kZeroed = 3;

template <int kDim>
struct Shape {
  static constexpr int kBlocks = kDim / kColumns;
  static constexpr int kStages = kDim > 64 ? 3 : 4;
  static constexpr int kTileBytes = kBlocks * kBlockBytes;  // of K, or of V
  static constexpr int kBarriers = 4 * kStages + 2 * kItems;
  // The places begin at a unit.
  static constexpr int kSharedBytes = kCoreBytes + 2 * kStages * kTileBytes + kBarriers * 8 + kItems * 4;
  static_assert(kKeys / kMinPage * kBlocks <= kWarp);  // a lane for each copy of a step
};

// The rings of places and of items' numbers, as producer and consumers walk through them: both see the same steps of the
// same items.
template <int kDim>
struct Ring {
  using S = Shape<kDim>;

  unsigned char* const places;
  uint64_t* const barriers;  // [4][kStages]: K, V are there; K, V have been read; then [2][kItems] likewise
  int* const items;          // -1: there are no more
  int stage = 0, round = 0;  // round: 0, 1, 0, 1, how often the ring was walked through
  int slot = 0, item_round = 0;

  __device__ explicit Ring(unsigned char* shared)
      : places(shared + (kCoreBytes - SharedAddress(shared) % kCoreBytes) % kCoreBytes),
        barriers(reinterpret_cast<uint64_t*>(places + 2 * S::kStages * S::kTileBytes)),
        items(reinterpret_cast<int*>(barriers + S::kBarriers)) {}

  __device__ void Init() const {
    for (int i = 0; i < S::kStages; ++i) {
      MbarrierInit(FullK(i), 1);
      MbarrierInit(FullV(i), 1);
      MbarrierInit(EmptyK(i), kConsumerWarps);
      MbarrierInit(EmptyV(i), kConsumerWarps);
    }
    for (int i = 0; i < kItems; ++i) {
      MbarrierInit(FullItem(i), 1);
      MbarrierInit(EmptyItem(i), kConsumerWarps);
    }
    MbarrierInitFence();
  }

  __device__ void Advance() {
    if (++stage == S::kStages) {
      stage = 0;
      round ^= 1;
    }
  }

  __device__ void AdvanceItem() {
    if (++slot == kItems) {
      slot = 0;
      item_round ^= 1;
    }
  }

  __device__ unsigned char* K(int i) const { return places + 2 * i * S::kTileBytes; }
  __device__ unsigned char* V(int i) const { return K(i) + S::kTileBytes; }
  __device__ uint64_t* FullK(int i) const { return barriers + i; }
  __device__ uint64_t* FullV(int i) const { return barriers + S::kStages + i; }
  __device__ uint64_t* EmptyK(int i) const { return barriers + 2 * S::kStages + i; }
  __device__ uint64_t* EmptyV(int i) const { return barriers + 3 * S::kStages + i; }
  __device__ uint64_t* FullItem(int i) const { return barriers + 4 * S::kStages + i; }
  __device__ uint64_t* EmptyItem(int i) const { return barriers + 4 * S::kStages + kItems + i; }
};

// Steps stand at multiples of kKeys: which keys share one does not depend on where the segment's queries begin.
__device__ __forceinline__ int FirstStep(KeyRange keys) { return keys.begin / kKeys * kKeys; }

// One warp.
template <int kDim>
__device__ void Produce(const SapwoodAttentionParams& p, const CUtensorMap& k_map, const CUtensorMap& v_map,
                        unsigned char* shared) {
  using S = Shape<kDim>;
  Ring<kDim> ring(shared);
  const int lane = threadIdx.x % kWarp, kv_head = blockIdx.y;
  const int rows = min(p.page_size, kKeys);  // of a copy
  const int column_block = lane % S::kBlocks, row = lane / S::kBlocks * rows;
  const int at = column_block * kBlockBytes + row * kRowBytes;
  const int num_items = p.counts[1];
  int index = blockIdx.x;
  for (;;) {
    MbarrierWait(ring.EmptyItem(ring.slot), ring.item_round ^ 1);
    __syncwarp();  // a lane that came later might find the next phase of that parity, and wait for ever
    if (lane == 0) {
      ring.items[ring.slot] = index < num_items ? index : -1;
      MbarrierArrive(ring.FullItem(ring.slot));
    }
    ring.AdvanceItem();
    if (index >= num_items) break;
    int next = 0;  // drawn now, needed when the item's last step is on its way
    if (lane == 0) next = static_cast<int>(gridDim.x) + atomicAdd(&p.tickets[kv_head], 1);
    const Item item = ItemOf<false>(p, index, kRows);
    for (int first = FirstStep(item.keys); first < item.keys.end; first += kKeys) {
      const int key = first + row;
      const bool seen = row < kKeys && key < item.keys.end && key + rows > item.keys.begin;
      const int page = seen ? item.pages[key / p.page_size] : 0, offset = key % p.page_size;
      const int bytes = __popc(__ballot_sync(0xffffffffu, seen)) * rows * kRowBytes;
      MbarrierWait(ring.EmptyK(ring.stage), ring.round ^ 1);
      if (lane == 0) MbarrierArriveExpect(ring.FullK(ring.stage), bytes);
      __syncwarp();
      if (seen) {
        TmaLoad(ring.K(ring.stage) + at, k_map, ring.FullK(ring.stage), column_block * kColumns, offset, kv_head, page);
      }
      MbarrierWait(ring.EmptyV(ring.stage), ring.round ^ 1);
      if (lane == 0) MbarrierArriveExpect(ring.FullV(ring.stage), bytes);
      __syncwarp();
      if (seen) {
        TmaLoad(ring.V(ring.stage) + at, v_map, ring.FullV(ring.stage), column_block * kColumns, offset, kv_head, page);
      }
      ring.Advance();
    }
    index = __shfl_sync(0xffffffffu, next, 0);
  }
  int* const finished = &p.tickets[p.num_kv_heads + kv_head];
  if (lane == 0 && atomicAdd(finished, 1) == static_cast<int>(gridDim.x) - 1) p.tickets[kv_head] = *finished = 0;
}

// A warp group. Of its products a thread has rows g and g + 8 of its warp's 16, g = lane / 4, and of every eight columns
// 2 (lane % 4) and + 1: element 4 n + 2 half + i is of row g + 8 half, column 8 n + 2 (lane % 4) + i.
template <int kDim>
struct Consumer {
  using S = Shape<kDim>;

  const SapwoodAttentionParams& p;
  const int kv_head, thread, lane, group;  // thread: of the consumers
  Ring<kDim> ring;
  Item item;
  uint32_t q[kDim / 16][4];
  float o[kDim / 2];
  float m[2], l[2];  // l: of this lane's keys
  int keys_end[2];   // of the keys that the row sees

  __device__ Consumer(const SapwoodAttentionParams& params, unsigned char* shared)
      : p(params),
        kv_head(blockIdx.y),
        thread(threadIdx.x - kGroup),
        lane(threadIdx.x % kWarp),
        group(threadIdx.x / kGroup - 1),
        ring(shared) {}

  __device__ int Row(int half) const { return thread / kWarp * 16 + 8 * half + lane / 4; }

  __device__ void Begin() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m[half] = -INFINITY;
      l[half] = 0.0f;
      const int row = Row(half), packed = item.first_row + min(row, item.num_rows - 1), query = packed / p.group;
      keys_end[half] = KeysOfQuery(query, item.q_len, item.kv_len, p.window).end;
      const __nv_bfloat16* const from = static_cast<const __nv_bfloat16*>(p.q) +
                                        static_cast<int64_t>(item.token_begin + query) * p.q_stride +
                                        (kv_head * p.group + packed % p.group) * p.head_dim + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        q[n / 2][n % 2 * 2 + half] =
            row < item.num_rows && 8 * n < p.head_dim ? *reinterpret_cast<const uint32_t*>(from + 8 * n) : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;
  }

  // s = Q K^T of the keys in a place.
  __device__ void IssueScores(float (&s)[kKeys / 2], int stage) {
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      const unsigned char* const k = ring.K(stage) + d / 4 * kBlockBytes + d % 4 * 32;
      Wgmma<false>(s, q[d], MatrixDescriptor(k, 16, kCoreBytes), d > 0);
    }
    WgmmaCommit();
  }

  __device__ void IssueOutputs(const uint32_t (&probabilities)[kKeys / 16][4], int stage) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const unsigned char* const v = ring.V(stage) + k * 16 * kRowBytes;
      Wgmma<true>(o, probabilities[k], MatrixDescriptor(v, kBlockBytes, kCoreBytes), true);
    }
    WgmmaCommit();
  }

  // A step's scores -> probabilities, rounded to bf16, m and l; O so far is to be multiplied by alpha. Chunks begin and end
  // at multiples of a step, so that only the row's own range cuts one.
  __device__ void Softmax(float (&s)[kKeys / 2], int first, float (&alpha)[2]) {
    const bool soft = p.softcap > 0.0f;
    const float scale = soft ? p.scale / p.softcap : p.scale * kLog2E;
    if (soft) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] = p.softcap * kLog2E * Tanh(s[i] * scale);
    }
    const int end[2] = {keys_end[0], keys_end[1]}, begin[2] = {FirstKey(end[0], p.window), FirstKey(end[1], p.window)};
    if (max(begin[0], begin[1]) > first || min(end[0], end[1]) < first + kKeys) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        const int key = first + i / 4 * 8 + lane % 4 * 2 + i % 2, half = i / 2 % 2;
        if (key < begin[half] || key >= end[half]) s[i] = -INFINITY;
      }
    }
    // Both rows side by side, for the sake of independent instructions.
    const float factor = soft ? 1.0f : scale;
    float most[2] = {-INFINITY, -INFINITY}, base[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], fmaxf(s[i], s[i + 1]));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      most[half] = fmaxf(most[half], __shfl_xor_sync(0xffffffffu, most[half], 1));
      most[half] = fmaxf(most[half], __shfl_xor_sync(0xffffffffu, most[half], 2));
      most[half] = fmaxf(m[half], most[half] * factor);
      base[half] = most[half] == -INFINITY ? 0.0f : most[half];  // a row may see no key of the step
      alpha[half] = Exp2(m[half] - base[half]);
      m[half] = most[half];
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      const float minus = -base[i / 2 % 2];
      const uint32_t pair = PackBf16(Exp2(__fmaf_rn(s[i], factor, minus)), Exp2(__fmaf_rn(s[i + 1], factor, minus)));
      s[i] = __uint_as_float(pair << 16);
      s[i + 1] = __uint_as_float(pair & 0xffff0000u);
      sum[i / 2 % 2] += s[i] + s[i + 1];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) l[half] = l[half] * alpha[half] + sum[half];
  }

  // What Softmax has left in s, as wgmma's a. Only when the product before is done, which reads these registers.
  __device__ void Pack(const float (&s)[kKeys / 2], uint32_t (&probabilities)[kKeys / 16][4]) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      probabilities[i / 8][i / 2 % 4] = __byte_perm(__float_as_uint(s[i]), __float_as_uint(s[i + 1]), 0x7632);
    }
  }

  // The rows of V that hold no key of the tile, where the step whose first key is `first` has some.
  __device__ void ZeroUnseen(int first, int stage) {
    if (item.keys.begin <= first && item.keys.end >= first + kKeys) return;
    constexpr int kPieces = kRowBytes / 16;
    for (int i = thread; i < S::kBlocks * kKeys * kPieces; i += kConsumerThreads) {
      const int key = first + i / kPieces % kKeys;
      if (key >= item.keys.begin && key < item.keys.end) continue;
      *reinterpret_cast<uint4*>(ring.V(stage) + 16 * i) = make_uint4(0, 0, 0, 0);
    }
    AsyncProxyFence();
    NamedBarrierSync(kZeroed, kConsumerThreads);
  }

  __device__ void Release(uint64_t* barrier) const {
    if (lane == 0) MbarrierArrive(barrier);
  }

  // The number of the next item; -1: there are no more.
  __device__ int Next() {
    MbarrierWait(ring.FullItem(ring.slot), ring.item_round);
    const int index = ring.items[ring.slot];
    __syncwarp();
    Release(ring.EmptyItem(ring.slot));
    ring.AdvanceItem();
    return index;
  }

  __device__ void Run(int index) {
    item = ItemOf<false>(p, index, kRows);
    Begin();
    float s[kKeys / 2], alpha[2];
    uint32_t probabilities[kKeys / 16][4];
    const KeyRange keys = item.keys;
    int first = FirstStep(keys);
    MbarrierWait(ring.FullK(ring.stage), ring.round);
    WgmmaFence();
    IssueScores(s, ring.stage);
    WgmmaWait<0>(s);
    Release(ring.EmptyK(ring.stage));
    Softmax(s, first, alpha);
    int in_use = -1;  // the place whose V a product may still read
    for (;;) {
      const int before = ring.stage;
      MbarrierWait(ring.FullV(before), ring.round);
      ZeroUnseen(first, before);
      // Waited for here, not behind Softmax: ptxas would draw half of Softmax behind the wait.
      WgmmaWait<0>(o);
      if (in_use >= 0) Release(ring.EmptyV(in_use));
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) o[i] *= alpha[i / 2 % 2];
      Pack(s, probabilities);
      first += kKeys;
      if (first >= keys.end) break;
      ring.Advance();
      MbarrierWait(ring.FullK(ring.stage), ring.round);
      NamedBarrierSync(kTurn + group, kConsumerThreads);
      WgmmaFence();
      IssueScores(s, ring.stage);
      IssueOutputs(probabilities, before);
      NamedBarrierArrive(kTurn + (group ^ 1), kConsumerThreads);
      WgmmaWait<1>(s);
      Release(ring.EmptyK(ring.stage));
      Softmax(s, first, alpha);
      in_use = before;
    }
    WgmmaFence();
    IssueOutputs(probabilities, ring.stage);
    WgmmaWait<0>(o);
    Release(ring.EmptyV(ring.stage));
    ring.Advance();
    Finish(index);
  }

  __device__ void Finish(int index) {
    item = ItemOf<false>(p, index, kRows);  // anew: the loop has no registers to keep it
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[half] += __shfl_xor_sync(0xffffffffu, l[half], 1);
      l[half] += __shfl_xor_sync(0xffffffffu, l[half], 2);
      EmitRow<kDim>(p, item, kv_head, kRows, Row(half), m[half], l[half],
                    [&](int n, int i) { return o[4 * n + 2 * half + i]; });
    }
  }
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    AttentionSm90Kernel(const SapwoodAttentionParams p, const __grid_constant__ CUtensorMap k_map,
                        const __grid_constant__ CUtensorMap v_map) {
  SAPWOOD_DYNAMIC_SHARED(shared);
  if (threadIdx.x == 0) Ring<kDim>(shared).Init();
  __syncthreads();
  AwaitPredecessor();
  if (threadIdx.x < kGroup) {
    GiveUpRegisters<kProducerRegisters>();
    if (threadIdx.x < kWarp) Produce<kDim>(p, k_map, v_map, shared);
  } else {
    ClaimRegisters<kConsumerRegisters>();
    Consumer<kDim> consumer(p, shared);
    if (consumer.group == 1) NamedBarrierArrive(kTurn, kConsumerThreads);  // the first turn is the first consumer's
    for (int index = consumer.Next(); index >= 0; index = consumer.Next()) consumer.Run(index);
  }
}

// The pages of K or of V: [page][kv_head][offset][head_dim].
TensorBox Pages(const SapwoodAttentionParams& p, const void* base) {
  const auto head_dim = static_cast<uint64_t>(p.head_dim), page_size = static_cast<uint64_t>(p.page_size);
  const uint64_t row = 2 * head_dim;
  return {base,
          {head_dim, page_size, static_cast<uint64_t>(p.num_kv_heads), static_cast<uint64_t>(p.num_pages)},
          {row, row * page_size, 2 * static_cast<uint64_t>(p.page_stride)},
          {kColumns, static_cast<uint32_t>(min(p.page_size, kKeys)), 1, 1}};
}

template <int kDim>
int LaunchOf(const SapwoodAttentionParams& p, cudaStream_t stream) {
  CUtensorMap k_map, v_map;
  for (const auto& [map, base] : {std::pair{&k_map, p.k_pages}, std::pair{&v_map, p.v_pages}}) {
    if (const int status = EncodeTensorMap(map, Pages(p, base))) {
      return Fail(status,
                  "attention: the driver makes no tensor map of %d pages of %d tokens, %d heads, head_dim %d, %lld elements "
                  "apart (without tickets none is needed)",
                  p.num_pages, p.page_size, p.num_kv_heads, p.head_dim, static_cast<long long>(p.page_stride));
    }
  }
  // num_blocks is for blocks of which two share a processor; this one has it for itself.
  const dim3 grid(static_cast<unsigned>(max(1, p.num_blocks / 2)), static_cast<unsigned>(p.num_kv_heads));
  Launch(AttentionSm90Kernel<kDim>, grid, kThreads, Shape<kDim>::kSharedBytes, stream, p, k_map, v_map);
  return LaunchStatus("attention");
}

}  // namespace

bool AttentionSm90Serves(const SapwoodAttentionParams& p) {
  return p.tickets != nullptr && p.rows_per_tile == kRows && p.head_dim <= 128 && p.chunk_len % kKeys == 0 &&
         p.page_size % kMinPage == 0 && (kKeys % p.page_size == 0 || p.page_size % kKeys == 0) &&
         p.page_stride % (static_cast<int64_t>(p.head_dim) * p.page_size) == 0 && p.scale > 0.0f;
}

int AttentionSm90(const SapwoodAttentionParams& p, cudaStream_t stream) {
  return p.head_dim <= 64 ? LaunchOf<64>(p, stream) : LaunchOf<128>(p, stream);
}

}  // namespace sapwood_cuda
