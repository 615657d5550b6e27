// Exact keyed sampling of one row (sampler.h has the contract). Called by the runners' sample segment with a row of
// f32 logits; its token goes into the StepResult.
//
// What another device must repeat to draw the same token (every operation is IEEE fp32, round to nearest, not
// contracted unless fma is written):
//   l_i    = the logits, adjusted as sampler.h says
//   m      = the largest of them that may be drawn
//   z_i    = (l_i - m) / temperature             two roundings; z <= 0, so no temperature overflows
//   g_i    = KeyedGumbel(KeyedBits(seed, stream, position, i))
//   token  = argmax over the allowed set of z_i + g_i; equal scores: the lowest id
// Order of tokens ("more likely first") everywhere: larger logit first, equal logits by lower id. Each filter keeps a
// prefix of this order, so the set that is left is the shortest of three prefixes and is found without sorting:
//   top-k  the first k
//   top-p  masses are integers, trunc(Exp(z) * 2^42), so that their sums have no order; the shortest prefix whose mass
//          is >= ceil(top_p * mass of what top-k left)
//   min-p  z >= Log(min_p)
//
// Speed: whole blocks of 64 tokens that cannot win are skipped, and in the others only tokens whose 32 random bits are
// high enough for the block's maximum to win get their noise computed. Both tests are conservative and change no token.
// Functions that pass over a row begin on a 64-byte boundary: where their loops lie in the lines of the instruction
// cache is worth up to a tenth of their time, and would else change with what stands before them.
// Rows that adjust nothing are read in place. Others are copied; the maxima of blocks that an adjustment touches are
// taken again, those of all others are the raw ones.
#include "sampling/sampler.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "base/check.h"

namespace sapwood {
namespace {

constexpr int kBlock = 64;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kMassOne = 4398046511104.0;  // 2^42: sums of 2^21 tokens fit in 63 bits
constexpr int kBuckets = 2048;                // of 1/64 in z: Exp(-32) * 2^42 < 1, what is further down has no mass

int64_t NumBlocks(int32_t vocab) { return (int64_t{vocab} + kBlock - 1) / kBlock; }

// log(x) for normal x > 0. x = 2^e * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); polynomial of Cephes' logf.
// All steps below in this order, each fma a fused one.
float Log(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  int32_t e = static_cast<int32_t>(bits >> 23) - 126;
  float mantissa = std::bit_cast<float>((bits & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
  if (mantissa < 0.707106781186547524f) {
    mantissa = mantissa + mantissa;
    e -= 1;
  }
  const float f = mantissa - 1.0f;
  const float f2 = f * f;
  float p = 7.0376836292e-2f;
  p = __builtin_fmaf(p, f, -1.1514610310e-1f);
  p = __builtin_fmaf(p, f, 1.1676998740e-1f);
  p = __builtin_fmaf(p, f, -1.2420140846e-1f);
  p = __builtin_fmaf(p, f, 1.4249322787e-1f);
  p = __builtin_fmaf(p, f, -1.6668057665e-1f);
  p = __builtin_fmaf(p, f, 2.0000714765e-1f);
  p = __builtin_fmaf(p, f, -2.4999993993e-1f);
  p = __builtin_fmaf(p, f, 3.3333331174e-1f);
  const float scale = static_cast<float>(e);
  float y = (p * f) * f2;
  y = __builtin_fmaf(scale, -2.12194440e-4f, y);
  y = __builtin_fmaf(-0.5f, f2, y);
  const float sum = f + y;
  return __builtin_fmaf(scale, 0.693359375f, sum);
}

// exp(x) for x <= 0, no fma so that it vectorises at the baseline ISA; polynomial of Cephes' expf. 0 below -87.
inline float Exp(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the low bits hold round(x / ln 2)
  const float n = shifted - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float fraction = (p * (r * r) + r) + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : fraction * power;
}

inline uint64_t Mass(float e) { return static_cast<uint64_t>(static_cast<int64_t>(static_cast<double>(e) * kMassOne)); }

// A token's place in the order as one integer, larger = more likely: the logit's bits made monotone, then ~id.
inline uint64_t Rank(float logit, int32_t token) {
  const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);  // + 0 makes -0 the equal of +0
  const uint32_t key = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return (static_cast<uint64_t>(key) << 32) | ~static_cast<uint32_t>(token);
}
inline float RankLogit(uint64_t rank) {
  const uint32_t key = static_cast<uint32_t>(rank >> 32);
  return std::bit_cast<float>(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kLanes = kBlock / 4;  // counters of one block

// bits[w][lane] of token block * 64 + lane * 4 + w.
void BlockBits(uint64_t seed, uint32_t stream, int64_t position, int64_t block, uint32_t bits[4][kLanes]) {
  const uint64_t pos = static_cast<uint64_t>(position);
  for (int i = 0; i < kLanes; ++i) {
    bits[0][i] = static_cast<uint32_t>(block * kLanes + i);
    bits[1][i] = stream;
    bits[2][i] = static_cast<uint32_t>(pos);
    bits[3][i] = static_cast<uint32_t>(pos >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * bits[0][i];
      const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * bits[2][i];
      const uint32_t c1 = bits[1][i], c3 = bits[3][i];
      bits[0][i] = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      bits[1][i] = static_cast<uint32_t>(p1);
      bits[2][i] = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      bits[3][i] = static_cast<uint32_t>(p0);
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

// Maximum of each block into out (null: not wanted). False if a NaN or +inf is among the logits.
[[gnu::aligned(64)]] bool ScanBlocks(const float* logits, int32_t vocab, float* out) {
  constexpr int kWidth = 16;
  int32_t bad[kWidth] = {};
  const int64_t full = vocab / kBlock;
  for (int64_t b = 0; b < full; ++b) {
    const float* x = logits + b * kBlock;
    float top[kWidth];
    for (int i = 0; i < kWidth; ++i) top[i] = -kInf;
    for (int j = 0; j < kBlock; j += kWidth) {
      for (int i = 0; i < kWidth; ++i) {
        top[i] = top[i] > x[j + i] ? top[i] : x[j + i];
        bad[i] |= x[j + i] <= FLT_MAX ? 0 : 1;
      }
    }
    if (out != nullptr) {
      for (int step = kWidth / 2; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) top[i] = top[i] > top[i + step] ? top[i] : top[i + step];
      }
      out[b] = top[0];
    }
  }
  int32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= bad[i];
  if (full * kBlock < vocab) {
    float top = -kInf;
    for (int64_t i = full * kBlock; i < vocab; ++i) {
      top = top > logits[i] ? top : logits[i];
      any |= logits[i] <= FLT_MAX ? 0 : 1;
    }
    if (out != nullptr) out[full] = top;
  }
  return any == 0;
}

int32_t BlockLen(int32_t vocab, int64_t block) {
  return static_cast<int32_t>(std::min<int64_t>(kBlock, vocab - block * kBlock));
}

// Lowest id of the largest logit, -1 if none is finite. bound[b] >= every logit of block b.
int32_t ArgMax(const float* logits, const float* bound, int32_t vocab) {
  float best = -kInf;
  int32_t token = -1;
  for (int64_t b = 0; b < NumBlocks(vocab); ++b) {
    if (!(bound[b] > best)) continue;  // an equal logit further on has a higher id
    const int32_t begin = static_cast<int32_t>(b * kBlock);
    for (int32_t i = begin; i < begin + BlockLen(vocab, b); ++i) {
      if (logits[i] > best) {
        best = logits[i];
        token = i;
      }
    }
  }
  return token;
}

// Where the scratch of SampleRow lies.
struct Scratch {
  float* logits;     // [vocab] copy with banned tokens at -inf
  float* block_max;  // [blocks] exact
  float* selection;  // [blocks]
  uint64_t* ranks;   // [vocab]
};
Scratch Carve(float* scratch, int32_t vocab) {
  const int64_t blocks = NumBlocks(vocab);
  Scratch s;
  // ranks first: 8-byte aligned by skipping at most one float.
  const bool odd = reinterpret_cast<uintptr_t>(scratch) % sizeof(uint64_t) != 0;
  float* base = scratch + (odd ? 1 : 0);
  s.ranks = reinterpret_cast<uint64_t*>(base);
  s.logits = base + 2 * int64_t{vocab};
  s.block_max = s.logits + vocab;
  s.selection = s.block_max + blocks;
  return s;
}

// The tokens left by the filters: those with Rank >= cut and z >= z_min.
struct Support {
  float max_logit;
  float temperature;
  uint64_t cut = 0;
  float z_min = -kInf;

  float Z(float logit) const { return std::max(logit - max_logit, -FLT_MAX) / temperature; }
  bool Allows(float logit, int32_t token) const {
    return logit > -kInf && Rank(logit, token) >= cut && Z(logit) >= z_min;
  }
};

// The rank of the k-th token, 0 if fewer are finite.
uint64_t TopKCut(const float* logits, const Scratch& scratch, int32_t vocab, int32_t k) {
  const int64_t blocks = NumBlocks(vocab);
  // k blocks whose maxima reach `floor` hold k tokens that reach it: nothing below is among the first k.
  float floor = -FLT_MAX;
  if (k <= blocks) {
    std::copy_n(scratch.block_max, blocks, scratch.selection);
    std::nth_element(scratch.selection, scratch.selection + (k - 1), scratch.selection + blocks, std::greater<float>());
    floor = std::max(floor, scratch.selection[k - 1]);
  }
  int64_t n = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (scratch.block_max[b] < floor) continue;
    const int32_t begin = static_cast<int32_t>(b * kBlock);
    for (int32_t i = begin; i < begin + BlockLen(vocab, b); ++i) {
      if (logits[i] >= floor) scratch.ranks[n++] = Rank(logits[i], i);
    }
  }
  if (n < k) return 0;
  std::nth_element(scratch.ranks, scratch.ranks + (k - 1), scratch.ranks + n, std::greater<uint64_t>());
  return scratch.ranks[k - 1];
}

int Bucket(float z) { return std::min(static_cast<int>(std::max(z, -1e6f) * -64.0f), kBuckets - 1); }

// ceil(p * total) without rounding: p is an integer times a power of two.
uint64_t MassTarget(float p, uint64_t total) {
  if (!(p > 0)) return 1;
  int exponent;
  const float fraction = std::frexp(p, &exponent);  // p = fraction * 2^exponent, exponent <= 0
  const uint64_t digits = static_cast<uint64_t>(std::ldexp(fraction, 24));  // exact
  const int shift = 24 - exponent;
  if (shift >= 127) return 1;
  const unsigned __int128 product = static_cast<unsigned __int128>(total) * digits;
  const unsigned __int128 one = 1;
  return std::max<uint64_t>(1, static_cast<uint64_t>((product + ((one << shift) - 1)) >> shift));
}

// The rank of the last token of the shortest prefix with mass >= top_p of all that rank at or above support.cut.
[[gnu::aligned(64)]] uint64_t TopPCut(const float* logits, const Scratch& scratch, int32_t vocab,
                                      const Support& support, float top_p) {
  const float floor = support.cut == 0 ? -FLT_MAX : RankLogit(support.cut);
  uint64_t histogram[kBuckets] = {};
  const int64_t blocks = NumBlocks(vocab);
  for (int64_t b = 0; b < blocks; ++b) {
    if (!(scratch.block_max[b] >= floor)) continue;
    const int32_t begin = static_cast<int32_t>(b * kBlock), len = BlockLen(vocab, b);
    float z[kBlock], e[kBlock];
    for (int32_t i = 0; i < len; ++i) z[i] = support.Z(logits[begin + i]);
    for (int32_t i = 0; i < len; ++i) e[i] = Exp(z[i]);
    for (int32_t i = 0; i < len; ++i) {
      const float logit = logits[begin + i];
      if (logit > -kInf && Rank(logit, begin + i) >= support.cut) histogram[Bucket(z[i])] += Mass(e[i]);
    }
  }
  uint64_t total = 0;
  for (uint64_t mass : histogram) total += mass;
  const uint64_t target = MassTarget(top_p, total);
  uint64_t before = 0;  // mass of the buckets above
  int bucket = 0;
  while (before + histogram[bucket] < target) before += histogram[bucket++];

  int64_t n = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (!(scratch.block_max[b] >= floor) || Bucket(support.Z(scratch.block_max[b])) > bucket) continue;
    const int32_t begin = static_cast<int32_t>(b * kBlock), len = BlockLen(vocab, b);
    for (int32_t i = begin; i < begin + len; ++i) {
      if (!(logits[i] > -kInf) || Bucket(support.Z(logits[i])) != bucket) continue;
      const uint64_t rank = Rank(logits[i], i);
      if (rank >= support.cut) scratch.ranks[n++] = rank;
    }
  }
  // Weighted selection inside the bucket: halve the range that holds the last token until one is left.
  uint64_t* lo = scratch.ranks;
  uint64_t* hi = scratch.ranks + n;
  while (hi - lo > 1) {
    uint64_t* mid = lo + (hi - lo) / 2;
    std::nth_element(lo, mid, hi, std::greater<uint64_t>());
    uint64_t upper = before;
    for (uint64_t* r = lo; r < mid; ++r) upper += Mass(Exp(support.Z(RankLogit(*r))));
    if (upper >= target) {
      hi = mid;
    } else {
      before = upper;
      lo = mid;
    }
  }
  return *lo;
}

// The filters of `row`, for a temperature > 0. scratch.block_max holds exact maxima, the largest of them max_logit.
Support FindSupport(const float* logits, int32_t vocab, float max_logit, const SamplingRow& row,
                    const Scratch& scratch) {
  Support support{.max_logit = max_logit, .temperature = row.temperature};
  if (row.top_k > 0 && row.top_k < vocab) support.cut = TopKCut(logits, scratch, vocab, row.top_k);
  if (row.top_p < 1.0f) support.cut = std::max(support.cut, TopPCut(logits, scratch, vocab, support, row.top_p));
  // z <= 0: the most likely token passes whatever min_p is.
  if (row.min_p > 0.0f) support.z_min = row.min_p < FLT_MIN ? -FLT_MAX : Log(std::min(row.min_p, 1.0f));
  return support;
}

// Argmax of z + noise over the support.
int32_t GumbelArgMax(const float* logits, const float* block_max, int32_t vocab, const Support& support,
                     const SamplingRow& row) {
  const double max_noise = KeyedGumbel(0xffffffffu);
  float best = -kInf;
  int32_t token = -1;
  auto visit = [&](int64_t b) {
    if (!support.Allows(block_max[b], 0)) return;  // id 0: the best rank a token with this logit could have
    // A token of this block scores at most fl(z_block + noise). Below `need` it cannot reach the best score so far; the
    // margin covers the rounding of scores and the error of KeyedGumbel many times over.
    const float z_block = support.Z(block_max[b]);
    uint32_t least_bits = 0;
    if (token >= 0) {
      const double size = std::fabs(static_cast<double>(z_block)) + std::fabs(static_cast<double>(best));
      const double margin = 1e-3 + 1e-6 * size;
      const double need = static_cast<double>(best) - z_block - margin;
      if (need > max_noise) return;
      const double bits = std::exp(-std::exp(-need)) * 4294967296.0 - 2.0;
      least_bits = bits > 0 ? static_cast<uint32_t>(bits) : 0;
    }
    uint32_t bits[4][kLanes];
    BlockBits(row.seed, row.stream, row.position, b, bits);
    const int32_t begin = static_cast<int32_t>(b * kBlock), len = BlockLen(vocab, b);
    for (int w = 0; w < 4; ++w) {
      for (int lane = 0; lane < kLanes; ++lane) {
        if (bits[w][lane] < least_bits || lane * 4 + w >= len) continue;
        const int32_t i = begin + lane * 4 + w;
        if (!support.Allows(logits[i], i)) continue;
        const float score = support.Z(logits[i]) + KeyedGumbel(bits[w][lane]);
        if (score > best || (score == best && i < token)) {
          best = score;
          token = i;
        }
      }
    }
  };
  // The most likely block first: a good score early makes the rest cheap. The order changes no result.
  const int64_t blocks = NumBlocks(vocab);
  const int64_t first = std::find(block_max, block_max + blocks, support.max_logit) - block_max;
  visit(first);
  for (int64_t b = 0; b < blocks; ++b) {
    if (b != first) visit(b);
  }
  return token;
}

// log softmax(logits)[token]: fp32 exponentials, double sums in eight lanes over ascending tokens.
float LogProb(const float* logits, int32_t vocab, float max_logit, int32_t token) {
  double lanes[8] = {};
  for (int64_t b = 0; b < NumBlocks(vocab); ++b) {
    const float* x = logits + b * kBlock;
    const int32_t len = BlockLen(vocab, b);
    float e[kBlock] = {};
    for (int32_t i = 0; i < len; ++i) e[i] = Exp(x[i] - max_logit);
    for (int i = 0; i < kBlock; i += 8) {
      for (int lane = 0; lane < 8; ++lane) lanes[lane] += static_cast<double>(e[i + lane]);
    }
  }
  const double sum =
      ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  return static_cast<float>(static_cast<double>(logits[token]) - static_cast<double>(max_logit) - std::log(sum));
}

float Maximum(const float* x, int32_t len) {
  constexpr int kWidth = 16;
  if (len < kBlock) return *std::max_element(x, x + len);
  float top[kWidth];
  for (int i = 0; i < kWidth; ++i) top[i] = x[i];
  for (int j = kWidth; j < kBlock; j += kWidth) {
    for (int i = 0; i < kWidth; ++i) top[i] = top[i] > x[j + i] ? top[i] : x[j + i];
  }
  return *std::max_element(top, top + kWidth);
}

bool Adjusts(const SamplingRow& row) {
  return !row.banned.empty() || !row.mask.empty() || !row.occurred.empty() || !row.logit_bias.empty();
}

// NaN, which only parameters that RequireValid refuses yield, becomes a number as well: the filters know none.
float Clamped(float x) { return !(x >= -FLT_MAX) ? -FLT_MAX : x > FLT_MAX ? FLT_MAX : x; }

float Penalized(float logit, const Occurrence& occurrence, const SamplingRow& row) {
  const bool in_output = occurrence.output_count > 0;
  if (occurrence.in_prompt || in_output) {
    logit = Clamped(logit > 0.0f ? logit / row.repetition : logit * row.repetition);
  }
  logit = Clamped(logit - row.frequency * static_cast<float>(occurrence.output_count));
  return in_output ? Clamped(logit - row.presence) : logit;
}

// Copies the row with -inf for what the mask forbids. block_max, maxima or upper bounds of `logits`, becomes that of
// the copy.
void CopyMasked(const float* logits, int32_t vocab, std::span<const uint32_t> mask, float* out, float* block_max) {
  for (int64_t b = 0; b < NumBlocks(vocab); ++b) {
    const int32_t len = BlockLen(vocab, b);
    const float* x = logits + b * kBlock;
    float* y = out + b * kBlock;
    uint64_t allowed = mask[2 * b];
    if (len > 32) allowed |= static_cast<uint64_t>(mask[2 * b + 1]) << 32;
    const uint64_t all = ~uint64_t{0} >> (kBlock - len);
    allowed &= all;
    // A grammar allows few tokens of a block or all but few: walk the fewer.
    if (std::popcount(allowed) > kBlock / 2) {
      std::copy_n(x, len, y);
      if (allowed == all) continue;
      for (uint64_t left = all & ~allowed; left != 0; left &= left - 1) y[std::countr_zero(left)] = -kInf;
      block_max[b] = Maximum(y, len);
    } else {
      std::fill_n(y, len, -kInf);
      float top = -kInf;
      for (uint64_t left = allowed; left != 0; left &= left - 1) {
        const int i = std::countr_zero(left);
        y[i] = x[i];
        top = top > x[i] ? top : x[i];
      }
      block_max[b] = top;
    }
  }
}

// logit = adjusted(logit, entry) for the listed tokens, ascending, in s.logits; s.block_max follows.
template <typename Entry, typename F>
void AdjustListed(std::span<const Entry> entries, int32_t vocab, const Scratch& s, F adjusted) {
  for (size_t i = 0; i < entries.size();) {
    const int32_t b = entries[i].token / kBlock;
    for (; i < entries.size() && entries[i].token / kBlock == b; ++i) {
      float& logit = s.logits[entries[i].token];
      if (logit > -kInf) logit = adjusted(logit, entries[i]);
    }
    s.block_max[b] = Maximum(s.logits + int64_t{b} * kBlock, BlockLen(vocab, b));
  }
}

// The adjusted row into s.logits. s.block_max holds the maxima of `logits`, which are sound, or upper bounds of them,
// and becomes those of the adjusted row. The mask comes first, though last in the definition: what it forbids is -inf
// either way.
void Adjust(const float* logits, int32_t vocab, const SamplingRow& row, const Scratch& s) {
  if (row.mask.empty()) {
    std::copy_n(logits, vocab, s.logits);
  } else {
    CopyMasked(logits, vocab, row.mask, s.logits, s.block_max);
  }
  AdjustListed(row.occurred, vocab, s,
               [&](float logit, const Occurrence& occurrence) { return Penalized(logit, occurrence, row); });
  AdjustListed(row.logit_bias, vocab, s,
               [](float logit, const TokenBias& entry) { return Clamped(logit + entry.bias); });
  for (int32_t id : row.banned) {
    if (id < 0 || id >= vocab) continue;
    const int32_t b = id / kBlock;
    s.logits[id] = -kInf;
    s.block_max[b] = Maximum(s.logits + int64_t{b} * kBlock, BlockLen(vocab, b));
  }
}

}  // namespace

int64_t SamplerScratch(int32_t vocab) { return 1 + 3 * int64_t{vocab} + 2 * NumBlocks(vocab); }

uint32_t KeyedBits(uint64_t seed, uint32_t stream, int64_t position, int32_t token) {
  uint32_t bits[4][kLanes];
  BlockBits(seed, stream, position, token / kBlock, bits);
  return bits[token % 4][token % kBlock / 4];
}

// u = (bits + 1/2) / 2^32. Above 1/2, -log(u) is -log1p(-w) with w = 1 - u, which fp32 holds to full relative accuracy
// where u itself would round to 1 (Kahan's log1p: log(v) * w / (1 - v) with v = fl(1 - w)).
float KeyedGumbel(uint32_t bits) {
  float exponential;
  if (bits < 0x80000000u) {
    exponential = -Log((static_cast<float>(bits) + 0.5f) * 0x1p-32f);
  } else {
    const float w = (static_cast<float>(~bits) + 0.5f) * 0x1p-32f;
    const float v = 1.0f - w;
    exponential = v == 1.0f ? w : Log(v) * (w / (v - 1.0f));
  }
  return -Log(exponential);
}

SampleOutcome SampleRow(const float* logits, const float* block_max, int32_t vocab, const SamplingRow& row,
                        float* scratch) {
  SampleOutcome outcome{-1, std::numeric_limits<float>::quiet_NaN(), true};
  if (vocab <= 0) return outcome;
  const bool greedy = !(row.temperature > 0.0f);
  const bool adjusts = Adjusts(row);
  const Scratch s = Carve(scratch, vocab);
  // Upper bounds suffice to find a maximum, of a row whose maximum is wanted for nothing else.
  const bool own_maxima = !greedy || block_max == nullptr || (adjusts && row.want_logprob);
  if (!ScanBlocks(logits, vocab, own_maxima ? s.block_max : nullptr)) return outcome;
  const float* allowed = logits;
  float raw_max = -kInf;
  if (adjusts) {
    const int64_t blocks = NumBlocks(vocab);
    if (!own_maxima) std::copy_n(block_max, blocks, s.block_max);
    if (row.want_logprob) raw_max = *std::max_element(s.block_max, s.block_max + blocks);
    Adjust(logits, vocab, row, s);
    allowed = s.logits;
  }
  const int32_t top = ArgMax(allowed, own_maxima || adjusts ? s.block_max : block_max, vocab);
  if (top < 0) return outcome;

  outcome.bad = false;
  outcome.token = greedy ? top
                         : GumbelArgMax(allowed, s.block_max, vocab,
                                        FindSupport(allowed, vocab, allowed[top], row, s), row);
  if (row.want_logprob) outcome.logprob = LogProb(logits, vocab, adjusts ? raw_max : logits[top], outcome.token);
  return outcome;
}

int64_t SampleSupport(const float* logits, int32_t vocab, const SamplingRow& row, float* scratch, int32_t* ids) {
  if (vocab <= 0) return 0;
  const Scratch s = Carve(scratch, vocab);
  if (!ScanBlocks(logits, vocab, s.block_max)) return 0;
  Adjust(logits, vocab, row, s);
  const float* allowed = s.logits;
  const int32_t top = ArgMax(allowed, s.block_max, vocab);
  if (top < 0) return 0;
  if (!(row.temperature > 0.0f)) {
    ids[0] = top;
    return 1;
  }
  const Support support = FindSupport(allowed, vocab, allowed[top], row, s);
  int64_t n = 0;
  for (int32_t i = 0; i < vocab; ++i) {
    if (support.Allows(allowed[i], i)) ids[n++] = i;
  }
  return n;
}

void AdjustedLogits(const float* logits, int32_t vocab, const SamplingRow& row, float* scratch, float* out) {
  const Scratch s = Carve(scratch, vocab);
  SAPWOOD_REQUIRE(ScanBlocks(logits, vocab, s.block_max), "logits must hold neither NaN nor +inf");
  Adjust(logits, vocab, row, s);
  std::copy_n(s.logits, vocab, out);
}

void RequireValid(const SamplingRow& row, int32_t vocab) {
  const int64_t words = (int64_t{vocab} + 31) / 32;
  SAPWOOD_REQUIRE(row.mask.empty() || std::ssize(row.mask) == words, "mask must have ceil(vocab / 32) = ", words,
                  " words, or none, got ", row.mask.size());
  SAPWOOD_REQUIRE(std::isfinite(row.repetition) && row.repetition > 0,
                  "repetition must be a finite number > 0 (1: off), got ", row.repetition);
  SAPWOOD_REQUIRE(std::isfinite(row.frequency), "frequency must be a finite number (0: off), got ", row.frequency);
  SAPWOOD_REQUIRE(std::isfinite(row.presence), "presence must be a finite number (0: off), got ", row.presence);
  const auto require_ascending = [&](const char* name, const auto& entries) {
    int32_t last = -1;
    for (const auto& entry : entries) {
      SAPWOOD_REQUIRE(entry.token >= 0 && entry.token < vocab, name, " must name tokens in 0 .. vocab - 1 = ",
                      vocab - 1, ", got ", entry.token);
      SAPWOOD_REQUIRE(entry.token > last, name, " must name tokens in strictly ascending order, got ", entry.token,
                      " after ", last);
      last = entry.token;
    }
  };
  require_ascending("occurred", row.occurred);
  require_ascending("logit_bias", row.logit_bias);
  for (const Occurrence& o : row.occurred) {
    SAPWOOD_REQUIRE(o.output_count >= 0, "occurred: output_count must not be negative, got ", o.output_count,
                    " for token ", o.token);
  }
  for (const TokenBias& entry : row.logit_bias) {
    SAPWOOD_REQUIRE(std::isfinite(entry.bias), "logit_bias must be finite (ban a token to forbid it), got ", entry.bias,
                    " for token ", entry.token);
  }
}

}  // namespace sapwood
