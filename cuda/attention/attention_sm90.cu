// Paged attention of many rows on compute capability 9.0: K and V by TMA, both products by wgmma (FlashAttention-3, arXiv
// 2407.08608). Items, their rows and their results are those of attention.cu; a block of three warp groups computes one
// after the other, in steps of kKeys keys:
//
//   the producer, one warp, walks kStages places ahead: a lane looks up a page and copies 64 columns of its K and its V
//   two consumers of 64 rows each, Q in registers:
//     S = Q K^T of the first step; softmax
//     for each further step: issue S = Q K^T of it, then O += P V of the one before; softmax of S while O runs on
//     O += P V of the last; the rows' output, or their (O, m, l)
//
// The consumers take turns to issue: while one multiplies, the other has its exponentials. Which is all that the turns are
// for; each consumer's registers are its own.
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
  static constexpr int kBarriers = 4 * kStages;
  static constexpr int kSharedBytes = kCoreBytes + 2 * kStages * kTileBytes + kBarriers * 8;  // begins at a unit
  static_assert(kKeys / kMinPage * kBlocks <= kWarp);  // a lane for each copy of a step
};

// The ring of places, as producer and consumers walk through it: both see the same steps of the same items.
template <int kDim>
struct Ring {
  using S = Shape<kDim>;

  unsigned char* const places;
  uint64_t* const barriers;  // [4][kStages]: K, V are there; K, V have been read
  int stage = 0, round = 0;  // round: 0, 1, 0, 1, how often the ring was walked through

  __device__ explicit Ring(unsigned char* shared)
      : places(shared + (kCoreBytes - SharedAddress(shared) % kCoreBytes) % kCoreBytes),
        barriers(reinterpret_cast<uint64_t*>(places + 2 * S::kStages * S::kTileBytes)) {}

  __device__ void Init() const {
    for (int i = 0; i < S::kStages; ++i) {
      MbarrierInit(FullK(i), 1);
      MbarrierInit(FullV(i), 1);
      MbarrierInit(EmptyK(i), kConsumerWarps);
      MbarrierInit(EmptyV(i), kConsumerWarps);
    }
    MbarrierInitFence();
  }

  __device__ void Advance() {
    if (++stage == S::kStages) {
      stage = 0;
      round ^= 1;
    }
  }

  __device__ unsigned char* K(int i) const { return places + 2 * i * S::kTileBytes; }
  __device__ unsigned char* V(int i) const { return K(i) + S::kTileBytes; }
  __device__ uint64_t* FullK(int i) const { return barriers + i; }
  __device__ uint64_t* FullV(int i) const { return barriers + S::kStages + i; }
  __device__ uint64_t* EmptyK(int i) const { return barriers + 2 * S::kStages + i; }
  __device__ uint64_t* EmptyV(int i) const { return barriers + 3 * S::kStages + i; }
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
  for (int index = blockIdx.x; index < p.counts[1]; index += gridDim.x) {
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
  }
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
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int end = keys_end[half], begin = FirstKey(end, p.window);
      if (soft) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = s[4 * n + 2 * half + i];
            x = p.softcap * kLog2E * Tanh(x * scale);
          }
        }
      }
      if (begin > first || end < first + kKeys) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int key = first + 8 * n + lane % 4 * 2 + i;
            if (key < begin || key >= end) s[4 * n + 2 * half + i] = -INFINITY;
          }
        }
      }
      float most = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) most = fmaxf(most, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float factor = soft ? 1.0f : scale;
      most = fmaxf(m[half], most * factor);
      const float base = most == -INFINITY ? 0.0f : most;  // a row may see no key of the step
      alpha[half] = Exp2(m[half] - base);
      m[half] = most;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        float &x0 = s[4 * n + 2 * half], &x1 = s[4 * n + 2 * half + 1];
        const uint32_t pair = PackBf16(Exp2(__fmaf_rn(x0, factor, -base)), Exp2(__fmaf_rn(x1, factor, -base)));
        x0 = __uint_as_float(pair << 16);
        x1 = __uint_as_float(pair & 0xffff0000u);
        sum += x0 + x1;
      }
      l[half] = l[half] * alpha[half] + sum;
    }
  }

  // What Softmax has left in s, as wgmma's a. Only when the product before is done, which reads these registers.
  __device__ void Pack(const float (&s)[kKeys / 2], uint32_t (&probabilities)[kKeys / 16][4]) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x0 = s[4 * n + 2 * half], x1 = s[4 * n + 2 * half + 1];
        probabilities[n / 2][n % 2 * 2 + half] = __byte_perm(__float_as_uint(x0), __float_as_uint(x1), 0x7632);
      }
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
    Pack(s, probabilities);
    for (first += kKeys; first < keys.end; first += kKeys) {
      const int before = ring.stage;
      MbarrierWait(ring.FullV(before), ring.round);
      ZeroUnseen(first - kKeys, before);
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
      WgmmaWait<0>(o);
      Release(ring.EmptyV(before));
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) o[i] *= alpha[i / 2 % 2];
      Pack(s, probabilities);
    }
    MbarrierWait(ring.FullV(ring.stage), ring.round);
    ZeroUnseen(first - kKeys, ring.stage);
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
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        Emit<false>(p, item, kv_head, kRows, Row(half), 8 * n + lane % 4 * 2, o[4 * n + 2 * half],
                    o[4 * n + 2 * half + 1], m[half], l[half]);
      }
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
    for (int index = blockIdx.x; index < p.counts[1]; index += gridDim.x) consumer.Run(index);
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
                  "apart (portable = 1 needs none)",
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
  return p.rows_per_tile == kRows && p.head_dim <= 128 && p.chunk_len % kKeys == 0 && p.page_size % kMinPage == 0 &&
         (kKeys % p.page_size == 0 || p.page_size % kKeys == 0) && p.scale > 0.0f;
}

int AttentionSm90(const SapwoodAttentionParams& p, cudaStream_t stream) {
  return p.head_dim <= 64 ? LaunchOf<64>(p, stream) : LaunchOf<128>(p, stream);
}

}  // namespace sapwood_cuda
