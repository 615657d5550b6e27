// Exact keyed sampling: the token of the CPU's sampler (cpp/sampling/sampler.cc), without sort and without rejection.
// One block of 512 threads per row.
//
// Penalties and biases are applied to the logits where they stand, once, so that the passes below know nothing of them;
// the raw values go to a scratch list and come back before the log-probability is taken. Mask and bans become one bit
// per token in shared memory.
//
// The order of tokens ("more likely first") is that of one integer, Rank: the logit's bits made monotone, then ~id.
// Top-k and top-p each keep a prefix of this order, so together they leave {rank >= cut}; the draw is the argmax of
// z + noise over it, z = (logit - max) / temperature. The passes over a row:
//   1  the largest logit that may be drawn, and whether the row is sound; a greedy row ends here
//   2  the first filter: the weights of buckets of 1/64 in z; the first bucket at which their running sum reaches the
//      target (k, or top_p of the mass) holds the cut
//   3  the tokens down to this bucket go into a list in shared memory. All further work has the list for a source: the
//      radix select of the cut inside the bucket (five digits of 10 bits of the rank), the second filter, the argmax.
//      Where the list is too short for them, the row stays the source
//   4  without filters: the argmax
//   5  with a log-probability: the sum of exp(logit - max), of the raw logits; where they had been adjusted, their
//      maximum before
//
// Sums. A token's mass is the integer trunc(exp(z) * 2^42): atomics may add masses up in any order. (A 64-bit atomicAdd
// on shared memory is a loop of compare-and-swap, so a bin is two words of 32 bits and a carry.) The sum of a
// log-probability is in double and in a fixed order: thread t adds tokens 4 (t + 512 i) .. + 3 for ascending i, a
// butterfly adds the lanes, another one the warps.
//
// Noise is dear (Philox, two logarithms, a division), so what cannot beat the thread's best score is skipped: groups of
// four tokens by their largest z, single ones by their random bits. Both tests are conservative and change no token.
#include <cfloat>
#include <cstdint>
#include <limits>

#include "common/check.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "sampling/keyed_noise.cuh"
#include "sampling/params.h"

namespace sapwood_cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kIdBits = 18;
constexpr int kMaxVocab = 1 << kIdBits;
constexpr int kDigitBits = 10;
constexpr int kRankBits = 32 + kIdBits;
static_assert(kRankBits % kDigitBits == 0);
constexpr int kBins = 2048;
constexpr int kBinsPerThread = kBins / kThreads;  // in FindBin
constexpr int kDigits = 1 << kDigitBits;
static_assert(kDigits <= kBins);
constexpr int kListSize = 4096;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// Noise lies between -3.2 and 22.9: a z this far below the best score is out of reach.
constexpr float kReach = 24.0f;

struct Shared {
  uint32_t low[kBins];  // a bin's weight is high * 2^32 + low
  uint32_t high[kBins];
  uint64_t list[kListSize];  // ranks, in no order
  uint64_t warp_values[kWarps];
  uint64_t place_before;
  int32_t place_bin;
  int32_t list_count;
  // Then a bit per token: may be drawn.
};
static_assert(sizeof(Shared) + kMaxVocab / 8 <= 99 * 1024, "what a block has at least, on sm_86");

struct Row {
  const float* logits;
  const uint32_t* allowed;
  int vocab;
  bool aligned;  // to four logits
  float max_logit;
  float temperature;

  __device__ __forceinline__ float Z(float logit) const {
    return __fdiv_rn(fmaxf(logit - max_logit, -FLT_MAX), temperature);
  }
};

__device__ __forceinline__ uint64_t Rank(float logit, int token) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // + 0 makes -0 the equal of +0
  const uint32_t key = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return (static_cast<uint64_t>(key) << kIdBits) | static_cast<uint32_t>(kMaxVocab - 1 - token);
}
__device__ __forceinline__ float RankLogit(uint64_t rank) {
  const uint32_t key = static_cast<uint32_t>(rank >> kIdBits);
  return __uint_as_float(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}
__device__ __forceinline__ int RankToken(uint64_t rank) {
  return kMaxVocab - 1 - static_cast<int>(rank & (kMaxVocab - 1));
}

// Of 1/64 in z. In the last one, z < -31.9, tokens have no mass, and no noise lifts them over the most likely one,
// whose z is 0: filters pass them over.
__device__ __forceinline__ int Bucket(float z) {
  return min(static_cast<int>(fmaxf(z, -1e6f) * -64.0f), kBins - 1);
}

// trunc(e * 2^42) for e in 0 or normal and <= 1: a shift of the mantissa.
__device__ __forceinline__ uint64_t Mass(float e) {
  const uint32_t bits = __float_as_uint(e);
  const uint64_t mantissa = (bits & 0x007fffffu) | 0x00800000u;
  const int shift = static_cast<int>(bits >> 23) - (127 + 23 - 42);
  return shift >= 0 ? mantissa << shift : mantissa >> min(-shift, 63);
}

// ceil(p * total) without rounding, at least 1: p is an integer of 24 bits times a power of two.
__device__ uint64_t MassTarget(float p, uint64_t total) {
  const uint32_t bits = __float_as_uint(p);
  const int shift = 127 + 23 - static_cast<int>(bits >> 23);  // p < 1: at least 24
  if (!(p > 0.0f) || shift >= 127) return 1;
  const uint64_t digits = (bits & 0x007fffffu) | 0x00800000u;
  const uint64_t low = total * digits, high = __umul64hi(total, digits);
  uint64_t quotient, rest;
  if (shift < 64) {
    quotient = (high << (64 - shift)) | (low >> shift);
    rest = low << (64 - shift);
  } else {
    quotient = high >> (shift - 64);
    rest = low | (high & ((uint64_t{1} << (shift - 64)) - 1));
  }
  quotient += rest != 0 ? 1 : 0;
  return quotient > 0 ? quotient : 1;
}

// op over the block's values, the same bits in every thread: op is commutative, and both sides of each exchange apply
// it to the same two values.
template <typename T, typename Op>
__device__ __forceinline__ T BlockReduce(Shared& s, T x, Op op) {
  static_assert(sizeof(T) <= sizeof(s.warp_values[0]));
  T* warp_values = reinterpret_cast<T*>(s.warp_values);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, step));
  if (threadIdx.x % kWarp == 0) warp_values[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = warp_values[threadIdx.x % kWarps];
#pragma unroll
  for (int step = kWarps / 2; step > 0; step /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, step));
  __syncthreads();  // warp_values may be written again
  return x;
}

// v[i], without an address for v.
template <typename T>
__device__ __forceinline__ T Pick(const T (&v)[4], int i) {
  return i < 2 ? (i == 0 ? v[0] : v[1]) : (i == 2 ? v[2] : v[3]);
}

__device__ __forceinline__ uint64_t Larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

// f(first, logits) for this thread's groups of four neighbours, ascending. -inf past the vocabulary. kAtOnce: groups
// whose loads are in flight together.
template <int kAtOnce, typename F>
__device__ __forceinline__ void ForEachGroup(const Row& row, F f) {
  constexpr int kStep = 4 * kThreads;
  for (int base = 4 * static_cast<int>(threadIdx.x); base < row.vocab; base += kAtOnce * kStep) {
    float logits[kAtOnce][4];
    if (row.aligned && base + (kAtOnce - 1) * kStep + 4 <= row.vocab) {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) Load4<true>(row.logits + base + u * kStep, 4, logits[u]);
    } else {
#pragma unroll
      for (int i = 0; i < 4 * kAtOnce; ++i) {
        const int token = base + i / 4 * kStep + i % 4;
        logits[i / 4][i % 4] = token < row.vocab ? row.logits[token] : -kInf;
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (base + u * kStep < row.vocab) f(base + u * kStep, logits[u]);
    }
  }
}

// The same with -inf for what may not be drawn.
template <typename F>
__device__ __forceinline__ void ForEachAllowedGroup(const Row& row, F f) {
  ForEachGroup<2>(row, [&](int first, float (&logits)[4]) {
    const uint32_t allowed = row.allowed[first / 32] >> (first % 32);
#pragma unroll
    for (int j = 0; j < 4; ++j) logits[j] = (allowed >> j & 1) != 0 ? logits[j] : -kInf;
    f(first, logits);
  });
}

// f(logit, rank) for this thread's share of the tokens that rank at or above `cut`: of the list, or of the row where
// list_size is 0.
template <typename F>
__device__ __forceinline__ void ForEachCandidate(const Row& row, const Shared& s, int list_size, uint64_t cut, F f) {
  if (list_size > 0) {
#pragma unroll 1
    for (int i = threadIdx.x; i < list_size; i += kThreads) {
      const uint64_t rank = s.list[i];
      if (rank >= cut) f(RankLogit(rank), rank);
    }
  } else {
    ForEachAllowedGroup(row, [&](int first, const float (&logits)[4]) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint64_t rank = Rank(logits[j], first + j);
        if (logits[j] > -kInf && rank >= cut) f(logits[j], rank);
      }
    });
  }
}

__device__ __forceinline__ void ClearBins(Shared& s) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) s.low[i] = s.high[i] = 0;
  __syncthreads();
}

__device__ __forceinline__ void AddToBin(Shared& s, int bin, uint64_t weight) {
  const uint32_t low = static_cast<uint32_t>(weight);
  const uint32_t sum = atomicAdd(&s.low[bin], low) + low;
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + (sum < low ? 1u : 0u);
  if (high != 0) atomicAdd(&s.high[bin], high);
}

struct Place {
  int bin;
  uint64_t before;  // weight of the bins in front of it
};

// The first bin at which the running sum of weights reaches `target`, which their total does.
__device__ __forceinline__ Place FindBin(Shared& s, uint64_t target) {
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  __syncthreads();  // the bins are complete
  const int first = kBinsPerThread * thread;
  uint64_t weights[kBinsPerThread], own = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    weights[i] = (static_cast<uint64_t>(s.high[first + i]) << 32) | s.low[first + i];
    own += weights[i];
  }
  uint64_t sum = own;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint64_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) s.warp_values[warp] = sum;
  __syncthreads();
  uint64_t before = sum - own;
  for (int w = 0; w < warp; ++w) before += s.warp_values[w];
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (before < target && before + weights[i] >= target) {
      s.place_bin = first + i;
      s.place_before = before;
    }
    before += weights[i];
  }
  __syncthreads();
  return {s.place_bin, s.place_before};
}

// One filter, top-p if by_mass, else top-k: the rank of the last token that it keeps of those at or above `cut`, or
// `cut` where it keeps all that can be drawn. May put what is left into the list and set list_size.
__device__ __forceinline__ uint64_t Filter(const Row& row, Shared& s, bool by_mass, int top_k, float top_p,
                                           uint64_t cut, int& list_size) {
  const auto weight_of = [&](float z) { return by_mass ? Mass(Exp(z)) : uint64_t{1}; };
  ClearBins(s);
  uint64_t total = 0;
  ForEachCandidate(row, s, list_size, cut, [&](float logit, uint64_t) {
    const float z = row.Z(logit);
    const int bucket = Bucket(z);
    const uint64_t weight = weight_of(z);
    if (bucket == kBins - 1 || weight == 0) return;
    total += weight;
    AddToBin(s, bucket, weight);
  });
  total = BlockReduce(s, total, [](uint64_t a, uint64_t b) { return a + b; });
  if (!by_mass && total < static_cast<uint64_t>(top_k)) return cut;
  uint64_t target = by_mass ? MassTarget(top_p, total) : static_cast<uint64_t>(top_k);
  Place place = FindBin(s, target);
  const int bucket = place.bin;

  if (list_size == 0) {
    if (threadIdx.x == 0) s.list_count = 0;
    __syncthreads();
    ForEachCandidate(row, s, 0, cut, [&](float logit, uint64_t rank) {
      if (Bucket(row.Z(logit)) > bucket) return;
      const int slot = atomicAdd(&s.list_count, 1);
      if (slot < kListSize) s.list[slot] = rank;
    });
    __syncthreads();
    list_size = s.list_count <= kListSize ? s.list_count : 0;
  }

  // Bins in the order of ranks: the largest digit first.
  uint64_t prefix = 0;
  for (int shift = kRankBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    target -= place.before;
    ClearBins(s);
    ForEachCandidate(row, s, list_size, cut, [&](float logit, uint64_t rank) {
      if (rank >> (shift + kDigitBits) != prefix) return;
      const float z = row.Z(logit);
      if (Bucket(z) != bucket) return;
      AddToBin(s, kDigits - 1 - static_cast<int>(rank >> shift & (kDigits - 1)), weight_of(z));
    });
    place = FindBin(s, target);
    prefix = (prefix << kDigitBits) | static_cast<uint32_t>(kDigits - 1 - place.bin);
  }
  return prefix;
}

// The token of the largest z + noise among those that rank at or above `cut` and have z >= z_min; `top` is the most
// likely one.
__device__ __forceinline__ int GumbelArgMax(const Row& row, Shared& s, int list_size, uint64_t cut, float z_min,
                                            int top, uint64_t seed, uint32_t stream, int64_t position) {
  // Every thread begins with the score of the most likely token: much is out of its reach.
  const auto bits_of = [&](int token) {
    uint32_t bits[4];
    KeyedBits(seed, stream, position, token / 4, bits);
    return Pick(bits, token % 4);
  };
  int best_token = top;
  float best = row.Z(row.max_logit) + KeyedGumbel(bits_of(top));
  const auto consider = [&](float logit, int token, uint32_t bits) {
    const float z = row.Z(logit);
    if (!(z >= z_min)) return;
    const float score = z + KeyedGumbel(bits);
    if (score > best || (score == best && token < best_token)) {
      best = score;
      best_token = token;
    }
  };

  if (list_size > 0) {
    ForEachCandidate(row, s, list_size, cut, [&](float logit, uint64_t rank) {
      const int token = RankToken(rank);
      consider(logit, token, bits_of(token));
    });
  } else {
    const float cut_logit = cut > 0 ? RankLogit(cut) : -FLT_MAX;
    ForEachAllowedGroup(row, [&](int first, const float (&logits)[4]) {
      const float largest = fmaxf(fmaxf(logits[0], logits[1]), fmaxf(logits[2], logits[3]));
      if (largest < cut_logit) return;
      // z < least, multiplied out. The unit below z_min, and the one that kReach has to spare, cover the rounding.
      const float least = fmaxf(best - kReach, z_min - 1.0f);
      if (largest - row.max_logit < least * row.temperature) return;
      uint32_t bits[4];
      KeyedBits(seed, stream, position, first / 4, bits);
      // With w = 1 - u, noise is at most -log(w): it reaches best - z only where w <= exp(z - best). 1e-3 covers the
      // rounding of scores and the error of KeyedGumbel and __expf many times over.
      const uint32_t largest_w = __float2uint_rz(__expf(row.Z(largest) - best + 1e-3f) * 0x1p32f);
      uint32_t hits = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (~bits[j] <= largest_w && logits[j] >= cut_logit && Rank(logits[j], first + j) >= cut) hits |= 1u << j;
      }
      for (; hits != 0; hits &= hits - 1) {
        const int j = __ffs(static_cast<int>(hits)) - 1;
        consider(Pick(logits, j), first + j, Pick(bits, j));
      }
    });
  }
  return RankToken(BlockReduce(s, Rank(best, best_token), Larger));
}

// The penalties and biases of row r: entries begin .. end - 1 of the lists, with a place in p.saved each.
struct Adjustments {
  int occurred_begin, occurred_end, bias_begin, bias_end;
  float* occurred_saved;  // index as the lists
  float* bias_saved;

  __device__ __forceinline__ Adjustments(const SapwoodSampleParams& p, int64_t r) {
    const bool occurred = p.occurred_indptr != nullptr, bias = p.bias_indptr != nullptr;
    occurred_begin = occurred ? p.occurred_indptr[r] : 0;
    occurred_end = occurred ? p.occurred_indptr[r + 1] : 0;
    bias_begin = bias ? p.bias_indptr[r] : 0;
    bias_end = bias ? p.bias_indptr[r + 1] : 0;
    // The rows before this one have occurred_begin + bias_begin places.
    occurred_saved = p.saved + bias_begin;
    bias_saved = p.saved + occurred_end;
  }
  __device__ __forceinline__ bool Any() const { return occurred_begin < occurred_end || bias_begin < bias_end; }
};

__device__ __forceinline__ float Clamped(float x) { return fminf(fmaxf(x, -FLT_MAX), FLT_MAX); }

// The block's threads take the entries by turns: ids differ, so no two write the same logit. What is not finite stays
// as it is: -inf is not drawn, and the rest makes the row bad.
__device__ __forceinline__ void Adjust(const SapwoodSampleParams& p, int64_t r, const Adjustments& a, float* logits) {
  for (int i = a.occurred_begin + static_cast<int>(threadIdx.x); i < a.occurred_end; i += kThreads) {
    const int id = p.occurred_ids[i];
    if (id < 0 || id >= p.vocab) continue;
    float x = logits[id];
    a.occurred_saved[i] = x;
    if (!(fabsf(x) <= FLT_MAX)) continue;
    const int count = p.output_counts[i];
    if (p.in_prompt[i] != 0 || count > 0) {
      const float repetition = p.repetition[r];
      x = Clamped(x > 0.0f ? __fdiv_rn(x, repetition) : x * repetition);
    }
    x = Clamped(x - p.frequency[r] * static_cast<float>(count));
    logits[id] = count > 0 ? Clamped(x - p.presence[r]) : x;
  }
  __syncthreads();
  for (int i = a.bias_begin + static_cast<int>(threadIdx.x); i < a.bias_end; i += kThreads) {
    const int id = p.bias_ids[i];
    if (id < 0 || id >= p.vocab) continue;
    const float x = logits[id];
    a.bias_saved[i] = x;
    if (fabsf(x) <= FLT_MAX) logits[id] = Clamped(x + p.bias[i]);
  }
  __syncthreads();
}

// Undoes Adjust, last step first. All threads have read the adjusted logits: a reduction over the block lies between.
__device__ __forceinline__ void Restore(const SapwoodSampleParams& p, const Adjustments& a, float* logits) {
  for (int i = a.bias_begin + static_cast<int>(threadIdx.x); i < a.bias_end; i += kThreads) {
    const int id = p.bias_ids[i];
    if (id >= 0 && id < p.vocab) logits[id] = a.bias_saved[i];
  }
  __syncthreads();
  for (int i = a.occurred_begin + static_cast<int>(threadIdx.x); i < a.occurred_end; i += kThreads) {
    const int id = p.occurred_ids[i];
    if (id >= 0 && id < p.vocab) logits[id] = a.occurred_saved[i];
  }
  __syncthreads();
}

__device__ __forceinline__ void SayBad(const SapwoodSampleParams& p, int64_t r) {
  if (threadIdx.x != 0) return;
  p.token[r] = -1;
  p.logprob[r] = kNaN;
  p.bad[r] = 1;
}

// At least one block on a multiprocessor: the compiler is not to save registers for a second one.
__global__ void __launch_bounds__(kThreads, 1) SampleKernel(const SapwoodSampleParams p) {
  AwaitPredecessor();
  SAPWOOD_DYNAMIC_SHARED(shared_bytes);
  Shared& s = *reinterpret_cast<Shared*>(shared_bytes);
  uint32_t* allowed = reinterpret_cast<uint32_t*>(shared_bytes + sizeof(Shared));
  const int64_t r = blockIdx.x;
  Row row{};
  float* const logits = p.logits + r * p.logits_stride;
  row.logits = logits;
  row.allowed = allowed;
  row.vocab = p.vocab;
  row.aligned = reinterpret_cast<uintptr_t>(row.logits) % 16 == 0;
  row.temperature = p.temperature[r];

  const int mask_row = p.mask == nullptr ? -1 : p.mask_index[r];
  if (mask_row < -1 || mask_row >= p.num_mask_rows) {
    SayBad(p, r);
    return;
  }
  const uint32_t* mask = mask_row < 0 ? nullptr : p.mask + mask_row * p.mask_stride;
  for (int word = threadIdx.x; word < (p.vocab + 31) / 32; word += kThreads) {
    allowed[word] = mask == nullptr ? 0xffffffffu : mask[word];
  }
  __syncthreads();
  if (p.banned_indptr != nullptr) {
    const int end = p.banned_indptr[r + 1];
    for (int i = p.banned_indptr[r] + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
      const int id = p.banned_ids[i];
      if (id >= 0 && id < p.vocab) atomicAnd(&allowed[id / 32], ~(1u << (id % 32)));
    }
    __syncthreads();
  }

  const Adjustments adjustments(p, r);
  if (adjustments.Any()) Adjust(p, r, adjustments, logits);

  // Ids ascend within a thread: only a larger logit replaces the best one.
  float best = -kInf, raw_max = -kInf;
  int best_token = 0;
  bool unsound = false;
  ForEachGroup<8>(row, [&](int first, const float (&group)[4]) {
    const uint32_t bits = allowed[first / 32] >> (first % 32);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      unsound |= !(group[j] <= FLT_MAX);
      raw_max = fmaxf(raw_max, group[j]);
      if ((bits >> j & 1) != 0 && group[j] > best) {
        best = group[j];
        best_token = first + j;
      }
    }
  });
  const uint64_t top_rank = BlockReduce(s, best > -kInf ? Rank(best, best_token) : 0, Larger);
  if (__syncthreads_or(unsound) || top_rank == 0) {
    if (adjustments.Any()) Restore(p, adjustments, logits);
    SayBad(p, r);
    return;
  }
  row.max_logit = RankLogit(top_rank);

  int token = RankToken(top_rank);
  if (row.temperature > 0.0f) {
    const int top_k = p.top_k[r];
    const float top_p = p.top_p[r], min_p = p.min_p[r];
    uint64_t cut = 0;
    int list_size = 0;
    for (int by_mass = 0; by_mass < 2; ++by_mass) {
      const bool on = by_mass != 0 ? top_p < 1.0f : top_k > 0 && top_k < p.vocab;
      if (on) cut = Filter(row, s, by_mass != 0, top_k, top_p, cut, list_size);
    }
    // The most likely token passes whatever min_p is: its z is 0. Below FLT_MIN, z_min is -87, where nothing is drawn.
    const float z_min = min_p > 0.0f ? Log(fminf(fmaxf(min_p, FLT_MIN), 1.0f)) : -kInf;
    token = GumbelArgMax(row, s, list_size, cut, z_min, token, p.seed[r], p.stream[r], p.position[r]);
  }

  if (adjustments.Any()) Restore(p, adjustments, logits);
  float logprob = kNaN;
  if (p.want_logprob[r] != 0) {
    if (adjustments.Any()) {
      raw_max = -kInf;
      ForEachGroup<8>(row, [&](int, const float (&group)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) raw_max = fmaxf(raw_max, group[j]);
      });
    }
    raw_max = BlockReduce(s, raw_max, [](float a, float b) { return fmaxf(a, b); });
    double sum = 0.0;
    ForEachGroup<8>(row, [&](int, const float (&group)[4]) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += static_cast<double>(Exp(group[j] - raw_max));
    });
    sum = BlockReduce(s, sum, [](double a, double b) { return a + b; });
    logprob = static_cast<float>(static_cast<double>(logits[token]) - static_cast<double>(raw_max) - log(sum));
  }
  if (threadIdx.x == 0) {
    p.token[r] = token;
    p.logprob[r] = logprob;
    p.bad[r] = 0;
  }
}

}  // namespace
}  // namespace sapwood_cuda

int sapwood_cuda_sample(const SapwoodSampleParams* params, void* stream) {
  using sapwood_cuda::kMaxVocab;
  SAPWOOD_CUDA_CHECK_STRUCT("sample", params);
  const SapwoodSampleParams& p = *params;
  SAPWOOD_CUDA_REQUIRE(p.num_rows >= 0, "sample: num_rows must not be negative, got %d", p.num_rows);
  SAPWOOD_CUDA_REQUIRE(p.vocab > 0 && p.vocab <= kMaxVocab, "sample: vocab must be in 1..%d, got %d", kMaxVocab,
                       p.vocab);
  SAPWOOD_CUDA_REQUIRE(p.logits_stride >= p.vocab, "sample: logits_stride must be at least vocab = %d, got %lld",
                       p.vocab, static_cast<long long>(p.logits_stride));
  const int words = (p.vocab + 31) / 32;
  SAPWOOD_CUDA_REQUIRE(p.mask == nullptr || p.mask_stride >= words,
                       "sample: mask_stride must be at least ceil(vocab / 32) = %d, got %lld", words,
                       static_cast<long long>(p.mask_stride));
  SAPWOOD_CUDA_REQUIRE(p.mask == nullptr || p.num_mask_rows > 0,
                       "sample: num_mask_rows must be positive where mask is given, got %d", p.num_mask_rows);
  SAPWOOD_CUDA_REQUIRE(p.mask == nullptr || p.mask_index != nullptr,
                       "sample: mask_index must not be null where mask is given");
  SAPWOOD_CUDA_REQUIRE(p.banned_indptr == nullptr || p.banned_ids != nullptr,
                       "sample: banned_ids must not be null where banned_indptr is given");
  SAPWOOD_CUDA_REQUIRE(p.occurred_indptr == nullptr || (p.occurred_ids && p.output_counts && p.in_prompt &&
                                                        p.repetition && p.frequency && p.presence && p.saved),
                       "sample: occurred_ids, output_counts, in_prompt, repetition, frequency, presence and saved must "
                       "not be null where occurred_indptr is given");
  SAPWOOD_CUDA_REQUIRE(p.bias_indptr == nullptr || (p.bias_ids && p.bias && p.saved),
                       "sample: bias_ids, bias and saved must not be null where bias_indptr is given");
  if (p.num_rows == 0) return SAPWOOD_CUDA_OK;
  SAPWOOD_CUDA_REQUIRE(p.logits && p.temperature && p.top_k && p.top_p && p.min_p && p.seed && p.stream && p.position &&
                           p.want_logprob,
                       "sample: logits, temperature, top_k, top_p, min_p, seed, stream, position and want_logprob must "
                       "not be null");
  SAPWOOD_CUDA_REQUIRE(p.token && p.logprob && p.bad, "sample: token, logprob and bad must not be null");
  const size_t shared_bytes = sizeof(sapwood_cuda::Shared) + static_cast<size_t>(words) * sizeof(uint32_t);
  sapwood_cuda::Launch(sapwood_cuda::SampleKernel, static_cast<unsigned>(p.num_rows), sapwood_cuda::kThreads,
                       shared_bytes, static_cast<cudaStream_t>(stream), p);
  return sapwood_cuda::LaunchStatus("sample");
}
