// Exact keyed sampling: no sort, no rejection, no state.
//
// Every candidate token gets Gumbel noise keyed by (seed, stream, absolute position, token); the sample is
// the argmax of logit/temperature + noise over the tokens that pass temperature, top-k, top-p (on the renormalised
// rest), min-p, in this order. So a token depends on the row's logits and key alone: not on batch mates, order, ISA
// level or device, and a recomputed position draws the same token again. (Gumbel-max: Maddison et al. 2014.)
//
// Before that, logits are adjusted, in this order: penalties (repetition, frequency, presence), bias, then mask and
// bans. Each step below is one IEEE fp32 operation, or two where it says so, none fused, and what it yields is clamped
// to [-FLT_MAX, FLT_MAX], so that no penalty makes a token impossible; -inf stays -inf.
//   repetition  l > 0 ? l / repetition : l * repetition    of tokens in prompt or output (Keskar et al. 2019, CTRL)
//   frequency   l - frequency * output_count               two roundings; output_count rounded to fp32
//   presence    l - presence                               of tokens in the output
//   bias        l + bias
//   mask, bans  -inf
// Log-probabilities are those of the raw logits, whatever is adjusted or filtered, as with OpenAI's API and vLLM's
// default ("raw_logprobs").
//
// Ties: greedy and top-k prefer the lowest id; top-k keeps exactly k. All arithmetic that decides is fp32 with a
// fixed order or exact integers; log is a fixed polynomial (fma order specified in sampler.cc) so that other
// devices can repeat it.
#pragma once

#include <cstdint>
#include <span>

namespace sapwood {

// A token that occurred before the one being drawn. In neither prompt nor output: means nothing.
struct Occurrence {
  int32_t token;
  int32_t output_count;  // how often in the output
  bool in_prompt;
};

struct TokenBias {
  int32_t token;
  float bias;
};

struct SamplingRow {
  float temperature;  // <= 0: greedy
  int32_t top_k;      // <= 0: off
  float top_p;        // >= 1: off
  float min_p;        // <= 0: off
  uint64_t seed;
  uint32_t stream;
  int64_t position;   // absolute position of the token being drawn
  std::span<const int32_t> banned;  // ids that cannot be drawn (stop ids below min_len)
  bool want_logprob;
  // Empty: all may be drawn. Else ceil(vocab / 32) words: bit i % 32 of word i / 32 set: token i may be drawn.
  std::span<const uint32_t> mask = {};
  std::span<const Occurrence> occurred = {};  // strictly ascending tokens
  float repetition = 1.0f;                    // 1: off
  float frequency = 0.0f;
  float presence = 0.0f;
  std::span<const TokenBias> logit_bias = {};  // strictly ascending tokens
};

// Throws InvalidArgument unless spans are as described above, token ids (but of bans, where others mean nothing) are in
// 0 .. vocab - 1, repetition is positive, and all of it is finite. For whoever builds rows; SampleRow does not check.
void RequireValid(const SamplingRow& row, int32_t vocab);

struct SampleOutcome {
  int32_t token;
  float logprob;  // log softmax(raw logits)[token]; NaN unless wanted
  bool bad;       // a NaN or +inf among the raw logits, or no finite logit left; token is -1 then
};

// logits f32 [vocab]; block_max f32 [ceil(vocab/64)], each the maximum of its block (upper bound suffices), or null.
// Both are of the raw logits. scratch: SamplerScratch(vocab) floats. Deterministic.
SampleOutcome SampleRow(const float* logits, const float* block_max, int32_t vocab, const SamplingRow& row,
                        float* scratch);
int64_t SamplerScratch(int32_t vocab);

// The tokens SampleRow draws from, for tests: ascending ids into ids[vocab], returns how many (0 where SampleRow
// says bad).
int64_t SampleSupport(const float* logits, int32_t vocab, const SamplingRow& row, float* scratch, int32_t* ids);

// What the filters see of a sound row, for tests: the adjusted logits into out[vocab].
void AdjustedLogits(const float* logits, int32_t vocab, const SamplingRow& row, float* scratch, float* out);

// The noise, for tests: uniform in (0, 1) with 32 bits, and -log(-log(u)).
uint32_t KeyedBits(uint64_t seed, uint32_t stream, int64_t position, int32_t token);
float KeyedGumbel(uint32_t bits);

}  // namespace sapwood
