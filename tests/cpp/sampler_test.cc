// The sampler against naive oracles: support sets by a full sort, tokens by evaluating every noise, adjusted logits in
// fp64 and by the rules of sampler.h token by token, and the drawn distribution by chi-square tests with fixed seeds.
#include "sampling/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "base/check.h"

namespace sapwood {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kMax = std::numeric_limits<float>::max();

SamplingRow Row(float temperature, int32_t top_k = 0, float top_p = 1.0f, float min_p = 0.0f) {
  return SamplingRow{.temperature = temperature,
                     .top_k = top_k,
                     .top_p = top_p,
                     .min_p = min_p,
                     .seed = 1234,
                     .stream = 0,
                     .position = 0,
                     .banned = {},
                     .want_logprob = false};
}

std::vector<float> BlockMax(const std::vector<float>& logits, float slack = 0.0f) {
  std::vector<float> out((logits.size() + 63) / 64, -kInf);
  for (size_t i = 0; i < logits.size(); ++i) out[i / 64] = std::max(out[i / 64], logits[i]);
  for (float& x : out) x += slack;
  return out;
}

int32_t LikeliestOf(const std::vector<float>& logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

SampleOutcome Sample(const std::vector<float>& logits, const SamplingRow& row, const float* block_max = nullptr) {
  const int32_t vocab = static_cast<int32_t>(logits.size());
  std::vector<float> scratch(SamplerScratch(vocab), kNaN);
  return SampleRow(logits.data(), block_max, vocab, row, scratch.data());
}

std::vector<int32_t> SupportOf(const std::vector<float>& logits, const SamplingRow& row) {
  const int32_t vocab = static_cast<int32_t>(logits.size());
  std::vector<float> scratch(SamplerScratch(vocab), kNaN);
  std::vector<int32_t> ids(vocab);
  ids.resize(SampleSupport(logits.data(), vocab, row, scratch.data(), ids.data()));
  return ids;
}

// Everything sorted, everything in fp64. `ambiguous`: a threshold passes so near a token that rounding may decide.
struct Oracle {
  std::vector<int32_t> support;
  std::map<int32_t, double> probability;
  bool ambiguous = false;
};

Oracle Naive(const std::vector<float>& logits, const SamplingRow& row) {
  Oracle oracle;
  const std::set<int32_t> banned(row.banned.begin(), row.banned.end());
  std::vector<int32_t> order;
  for (int32_t i = 0; i < static_cast<int32_t>(logits.size()); ++i) {
    if (logits[i] > -kInf && !banned.count(i)) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  if (order.empty()) return oracle;
  if (row.top_k > 0 && order.size() > static_cast<size_t>(row.top_k)) order.resize(row.top_k);
  const double top = logits[order[0]];
  auto weight = [&](int32_t i) { return std::exp((logits[i] - top) / row.temperature); };
  if (row.top_p < 1) {
    double total = 0, sum = 0;
    for (int32_t i : order) total += weight(i);
    size_t keep = 0;
    while (keep < order.size()) {
      sum += weight(order[keep++]);
      if (std::fabs(sum / total - row.top_p) < 2e-6) oracle.ambiguous = true;
      if (sum >= row.top_p * total) break;
    }
    order.resize(keep);
  }
  if (row.min_p > 0) {
    size_t keep = 0;
    for (int32_t i : order) {
      if (std::fabs(weight(i) - row.min_p) < 1e-5 * row.min_p) oracle.ambiguous = true;
      if (weight(i) >= row.min_p) ++keep;
    }
    order.resize(std::max<size_t>(keep, 1));
  }
  double total = 0;
  for (int32_t i : order) total += weight(i);
  for (int32_t i : order) oracle.probability[i] = weight(i) / total;
  oracle.support = order;
  std::sort(oracle.support.begin(), oracle.support.end());
  return oracle;
}

// Every noise evaluated, nothing skipped.
int32_t NaiveGumbel(const std::vector<float>& logits, const std::vector<int32_t>& support, const SamplingRow& row) {
  float max_logit = -kInf, best = -kInf;
  for (int32_t i : support) max_logit = std::max(max_logit, logits[i]);
  int32_t token = -1;
  for (int32_t i : support) {
    const float z = std::max(logits[i] - max_logit, -std::numeric_limits<float>::max()) / row.temperature;
    const float score = z + KeyedGumbel(KeyedBits(row.seed, row.stream, row.position, i));
    if (score > best) {
      best = score;
      token = i;
    }
  }
  return token;
}

// Rows of every kind: smooth, coarse (many ties), with -inf, nearly one-hot, constant, mixed signs of zero.
std::vector<float> RandomLogits(std::mt19937& rng, int vocab) {
  std::normal_distribution<float> normal(0.0f, std::vector<float>{0.01f, 1.0f, 3.0f, 30.0f}[rng() % 4]);
  std::vector<float> logits(vocab);
  for (float& x : logits) x = normal(rng);
  switch (rng() % 6) {
    case 0:
      for (float& x : logits) x = std::round(x);
      break;
    case 1:
      for (float& x : logits) x = rng() % 3 == 0 ? x : -kInf;
      break;
    case 2:
      logits[rng() % vocab] += 40.0f;
      break;
    case 3:
      for (float& x : logits) x = rng() % 2 == 0 ? 0.0f : -0.0f;
      break;
    default:
      break;
  }
  return logits;
}

SamplingRow RandomRow(std::mt19937& rng, int vocab) {
  SamplingRow row = Row(std::vector<float>{0.1f, 0.7f, 1.0f, 1.5f, 5.0f}[rng() % 5]);
  auto uniform = [&] { return static_cast<float>(rng() % 10000) / 10000.0f; };
  if (rng() % 2) row.top_k = 1 + rng() % (rng() % 2 ? 5 : vocab + 5);
  if (rng() % 2) row.top_p = uniform();
  if (rng() % 2) row.min_p = uniform() * uniform();
  row.seed = rng();
  row.stream = rng() % 4;
  row.position = rng() % 100000;
  return row;
}

TEST(SamplerBits, ArePhilox4x32) {
  // Known answers of Random123: counter {token / 4, stream, position low, position high}, key {seed low, seed high}.
  EXPECT_EQ(KeyedBits(0, 0, 0, 0), 0x6627e8d5u);
  EXPECT_EQ(KeyedBits(0, 0, 0, 1), 0xe169c58du);
  EXPECT_EQ(KeyedBits(0, 0, 0, 2), 0xbc57ac4cu);
  EXPECT_EQ(KeyedBits(0, 0, 0, 3), 0x9b00dbd8u);
}

// Chi-square over the 256 values of one byte; 255 degrees of freedom: beyond 380 has probability 1e-6.
double ByteChiSquare(const std::vector<uint32_t>& draws, int shift) {
  std::vector<double> count(256);
  for (uint32_t d : draws) count[(d >> shift) & 255] += 1;
  const double expected = static_cast<double>(draws.size()) / 256;
  double chi = 0;
  for (double c : count) chi += (c - expected) * (c - expected) / expected;
  return chi;
}

TEST(SamplerBits, AreUniformAlongEveryKey) {
  std::map<const char*, std::vector<uint32_t>> runs;
  for (int i = 0; i < 50000; ++i) {
    runs["token"].push_back(KeyedBits(7, 0, 11, i));
    runs["position"].push_back(KeyedBits(7, 0, i, 42));
    runs["stream"].push_back(KeyedBits(7, i, 11, 42));
    runs["seed"].push_back(KeyedBits(i, 0, 11, 42));
    // Neighbours along one key share no bits: the differences are uniform as well.
    runs["position difference"].push_back(KeyedBits(7, 0, i, 42) ^ KeyedBits(7, 0, i + 1, 42));
    runs["seed difference"].push_back(KeyedBits(i, 0, 11, 42) ^ KeyedBits(i + 1, 0, 11, 42));
    runs["position = token"].push_back(KeyedBits(7, 0, i, i));
  }
  for (const auto& [name, draws] : runs) {
    for (int shift : {0, 8, 16, 24}) EXPECT_LT(ByteChiSquare(draws, shift), 380) << name << " byte at " << shift;
    EXPECT_GT(std::set<uint32_t>(draws.begin(), draws.end()).size(), draws.size() - 10) << name;
  }
}

TEST(SamplerBits, EveryBitOfTheKeyCounts) {
  const uint32_t base = KeyedBits(0, 0, 0, 5);
  for (int bit = 0; bit < 64; ++bit) {
    EXPECT_NE(KeyedBits(uint64_t{1} << bit, 0, 0, 5), base) << "seed bit " << bit;
    if (bit < 32) {
      EXPECT_NE(KeyedBits(0, 1u << bit, 0, 5), base) << "stream bit " << bit;
    }
    if (bit < 63) {
      EXPECT_NE(KeyedBits(0, 0, int64_t{1} << bit, 5), base) << "position bit " << bit;
    }
  }
}

TEST(SamplerGumbel, IsTheNoiseItSaysToWithinFewUlp) {
  std::mt19937 rng(3);
  auto check = [](uint32_t bits) {
    const double u_complement = (static_cast<double>(~bits) + 0.5) / 4294967296.0;
    const double expected = -std::log(-std::log1p(-u_complement));
    const float got = KeyedGumbel(bits);
    ASSERT_NEAR(got, expected, 1e-6 + 2e-7 * std::fabs(expected)) << bits;
  };
  for (uint32_t i = 0; i < 5000; ++i) {
    check(i);
    check(~i);
    check(0x80000000u + i - 2500);
  }
  for (int shift = 0; shift < 32; ++shift) check(1u << shift), check(~(1u << shift));
  for (int i = 0; i < 200000; ++i) check(rng());
}

TEST(SamplerSupport, EqualsTheSortOracle) {
  std::mt19937 rng(17);
  int ambiguous = 0, compared = 0;
  for (int round = 0; round < 4000; ++round) {
    const int vocab = std::vector<int>{1, 2, 5, 63, 64, 65, 130, 500, 2000}[rng() % 9];
    const std::vector<float> logits = RandomLogits(rng, vocab);
    SamplingRow row = RandomRow(rng, vocab);
    std::vector<int32_t> banned;
    if (rng() % 3 == 0) {
      for (int i = 0; i < 3; ++i) banned.push_back(rng() % vocab);
      row.banned = banned;
    }
    const Oracle oracle = Naive(logits, row);
    if (oracle.ambiguous) {
      ++ambiguous;
      continue;
    }
    ++compared;
    ASSERT_EQ(SupportOf(logits, row), oracle.support)
        << "round " << round << " vocab " << vocab << " T " << row.temperature << " k " << row.top_k << " p "
        << row.top_p
        << " min_p " << row.min_p;
    ASSERT_EQ(Sample(logits, row).bad, oracle.support.empty());
  }
  EXPECT_GT(compared, 3500) << ambiguous << " ambiguous";
}

TEST(SamplerSupport, TopKIsExactlyKWithTiesByLowestId) {
  std::vector<float> logits(300, 1.0f);
  logits[250] = 2.0f;
  for (int k : {1, 2, 3, 5, 6, 64, 65, 299}) {
    std::vector<int32_t> expected(k - 1);
    std::iota(expected.begin(), expected.end(), 0);
    if (k > 250) expected.push_back(k - 1), expected.erase(std::find(expected.begin(), expected.end(), k - 1));
    if (!std::count(expected.begin(), expected.end(), 250)) expected.push_back(250);
    else expected.push_back(k - 1);
    EXPECT_EQ(SupportOf(logits, Row(1.0f, k)), expected) << k;
  }
  for (int k : {300, 301, 0, -1}) EXPECT_EQ(SupportOf(logits, Row(1.0f, k)).size(), 300u) << k;
}

TEST(SamplerSupport, TopPIsTakenOfWhatTopKLeaves) {
  // Masses 4:3:2:1. Of the first two, 4/7 = 0.571 reaches 0.55 alone; of all four, 0.4 does not.
  std::vector<float> logits = {std::log(1.0f), std::log(2.0f), std::log(3.0f), std::log(4.0f)};
  EXPECT_EQ(SupportOf(logits, Row(1, 2, 0.55f)), (std::vector<int32_t>{3}));
  EXPECT_EQ(SupportOf(logits, Row(1, 0, 0.55f)), (std::vector<int32_t>{2, 3}));
  EXPECT_EQ(SupportOf(logits, Row(1, 0, 0.71f)), (std::vector<int32_t>{1, 2, 3}));
  EXPECT_EQ(SupportOf(logits, Row(1, 0, 0.0f)), (std::vector<int32_t>{3}));
  // A temperature of 2 flattens before top-p sees it: 4 -> 2, 3 -> 1.73, 2 -> 1.41, 1 -> 1.
  EXPECT_EQ(SupportOf(logits, Row(2, 0, 0.55f)), (std::vector<int32_t>{2, 3}));
  EXPECT_EQ(SupportOf(logits, Row(2, 0, 0.62f)), (std::vector<int32_t>{1, 2, 3}));
  // min-p is relative to the most likely token, ties at the threshold stay.
  EXPECT_EQ(SupportOf(logits, Row(1, 0, 1.0f, 0.7f)), (std::vector<int32_t>{2, 3}));
  EXPECT_EQ(SupportOf(logits, Row(1, 0, 1.0f, 5.0f)), (std::vector<int32_t>{3}));
}

TEST(SamplerSupport, TopPTiesAreCutByLowestId) {
  const std::vector<float> logits(1000, 0.25f);
  std::vector<int32_t> expected(500);
  std::iota(expected.begin(), expected.end(), 0);
  EXPECT_EQ(SupportOf(logits, Row(1, 0, 0.5f)), expected);
  expected.push_back(500);
  EXPECT_EQ(SupportOf(logits, Row(1, 0, 0.5000001f)), expected);
}

TEST(SamplerSupport, TopPIsExactToOneUnitOfMassAndItsTargetIsRoundedUp) {
  // Found with big integers and the stated polynomial in numpy (share_row of bench/gpu_checks/sampling.py): the masses
  // of the last four, in units of 2^-42, add up to 2^42, that of the first; with the other last one to 2^42 + 1.
  std::vector<float> logits = {0.0f, -0x1.75a1c2p-1f, -0x1.8c2944p-1f, -0x1.6f607ep+1f, -0x1.2b706ap+4f};
  EXPECT_EQ(SupportOf(logits, Row(1, 0, 0.5f)), (std::vector<int32_t>{0})) << "half of 2^43: 2^42";
  logits[4] = -0x1.2b704ap+4f;
  EXPECT_EQ(SupportOf(logits, Row(1, 0, 0.5f)), (std::vector<int32_t>{0, 1})) << "half of 2^43 + 1: 2^42 + 1";
}

TEST(SamplerToken, EqualsTheNaiveArgmaxAndIgnoresBlockMax) {
  std::mt19937 rng(23);
  for (int round = 0; round < 3000; ++round) {
    const int vocab = std::vector<int>{1, 7, 64, 65, 129, 1000, 3000}[rng() % 7];
    const std::vector<float> logits = RandomLogits(rng, vocab);
    SamplingRow row = RandomRow(rng, vocab);
    if (rng() % 4 == 0) row.temperature = 0;
    std::vector<int32_t> banned;
    if (rng() % 3 == 0) {
      banned = {static_cast<int32_t>(rng() % vocab), LikeliestOf(logits)};
      row.banned = banned;
    }
    const SampleOutcome plain = Sample(logits, row);
    const std::vector<int32_t> support = SupportOf(logits, row);
    ASSERT_EQ(plain.bad, support.empty());
    if (plain.bad) continue;
    ASSERT_EQ(plain.token, row.temperature > 0 ? NaiveGumbel(logits, support, row) : support[0]) << round;
    for (float slack : {0.0f, 3.0f}) {
      const std::vector<float> block_max = BlockMax(logits, slack);
      ASSERT_EQ(Sample(logits, row, block_max.data()).token, plain.token) << round << " slack " << slack;
    }
  }
}

TEST(SamplerToken, SkippingAcrossALargeVocabularyChangesNothing) {
  std::mt19937 rng(5);
  std::normal_distribution<float> normal(0.0f, 2.5f);
  std::vector<float> logits(32003);
  for (float& x : logits) x = normal(rng);
  logits[30000] = 17.0f;
  std::vector<int32_t> all(logits.size());
  std::iota(all.begin(), all.end(), 0);
  std::set<int32_t> tokens;
  for (int position = 0; position < 60; ++position) {
    for (float temperature : {0.5f, 1.0f, 1.6f, 8.0f}) {
      SamplingRow row = Row(temperature);
      row.position = position;
      const int32_t token = Sample(logits, row).token;
      ASSERT_EQ(token, NaiveGumbel(logits, all, row)) << position << " T " << temperature;
      tokens.insert(token);
    }
  }
  EXPECT_GT(tokens.size(), 50u);
}

TEST(SamplerToken, GreedyTakesTheLowestIdOfTheLargest) {
  std::vector<float> logits(200, -1.0f);
  logits[70] = logits[71] = logits[199] = 3.0f;
  EXPECT_EQ(Sample(logits, Row(0)).token, 70);
  EXPECT_EQ(Sample(logits, Row(-1)).token, 70);
  EXPECT_EQ(Sample(logits, Row(kNaN)).token, 70);
  const std::vector<float> bounds = BlockMax(logits, 1.5f);
  EXPECT_EQ(Sample(logits, Row(0), bounds.data()).token, 70);
  const std::vector<int32_t> banned = {70, -5, 100000};
  SamplingRow row = Row(0);
  row.banned = banned;
  EXPECT_EQ(Sample(logits, row, bounds.data()).token, 71);
  std::vector<float> zeros = {-1.0f, -0.0f, 0.0f};
  EXPECT_EQ(Sample(zeros, Row(0)).token, 1) << "-0 equals +0";
  EXPECT_EQ(SupportOf(zeros, Row(1, 1)), (std::vector<int32_t>{1}));
}

TEST(SamplerToken, NoiseIsKeyedBySeedStreamAndPositionAlone) {
  const std::vector<float> logits(1000, 0.0f);
  auto draw = [&](uint64_t seed, uint32_t stream, int64_t position) {
    SamplingRow row = Row(1.0f);
    row.seed = seed;
    row.stream = stream;
    row.position = position;
    return Sample(logits, row).token;
  };
  // Uniform over 1000 tokens: two independent draws agree once in a thousand.
  int same_seed = 0, same_stream = 0, same_position = 0;
  for (int i = 0; i < 1000; ++i) {
    EXPECT_EQ(draw(i, 1, 2), draw(i, 1, 2));
    same_seed += draw(i, 1, 2) == draw(i + 1, 1, 2);
    same_stream += draw(9, i, 2) == draw(9, i + 1, 2);
    same_position += draw(9, 1, i) == draw(9, 1, i + 1);
  }
  EXPECT_LT(same_seed, 10);
  EXPECT_LT(same_stream, 10);
  EXPECT_LT(same_position, 10);
}

// Draws `n` tokens at consecutive positions and returns chi-square per degree-of-freedom bound: the statistic and dof.
void ExpectDistribution(const std::vector<float>& logits, SamplingRow row, int n, const Oracle& oracle) {
  std::map<int32_t, int> count;
  for (int i = 0; i < n; ++i) {
    row.position = i;
    ++count[Sample(logits, row).token];
  }
  for (const auto& [token, c] : count) {
    ASSERT_TRUE(oracle.probability.count(token)) << token << " drawn " << c << " times";
  }
  double chi = 0;
  int cells = 0;
  for (const auto& [token, p] : oracle.probability) {
    if (p * n < 5) continue;
    const double d = count[token] - p * n;
    chi += d * d / (p * n);
    ++cells;
  }
  const double dof = std::max(cells - 1, 1);
  // Wilson-Hilferty: z of the statistic; 4.9 has probability 5e-7.
  const double z = (std::cbrt(chi / dof) - (1 - 2 / (9 * dof))) / std::sqrt(2 / (9 * dof));
  EXPECT_LT(z, 4.9) << "chi2 " << chi << " dof " << dof;
  EXPECT_GT(z, -4.9) << "too even: chi2 " << chi << " dof " << dof;
}

void ExpectDistribution(const std::vector<float>& logits, const SamplingRow& row, int n) {
  ExpectDistribution(logits, row, n, Naive(logits, row));
}

TEST(SamplerDistribution, FollowsTheSoftmaxOfTheFilteredRow) {
  std::mt19937 rng(99);
  std::normal_distribution<float> normal(0.0f, 1.5f);
  std::vector<float> logits(40);
  for (float& x : logits) x = normal(rng);
  ExpectDistribution(logits, Row(1.0f), 300000);
  ExpectDistribution(logits, Row(0.6f), 100000);
  ExpectDistribution(logits, Row(3.0f), 100000);
  ExpectDistribution(logits, Row(1.0f, 7), 100000);
  ExpectDistribution(logits, Row(1.0f, 0, 0.8f), 100000);
  ExpectDistribution(logits, Row(1.0f, 0, 1.0f, 0.1f), 100000);
  ExpectDistribution(logits, Row(1.3f, 20, 0.9f, 0.02f), 100000);
  ExpectDistribution(std::vector<float>(1000, 4.0f), Row(1.0f), 100000);
}

TEST(SamplerEdge, BadRows) {
  for (int vocab : {1, 64, 100, 200}) {
    for (int at : {0, vocab / 2, vocab - 1}) {
      for (float temperature : {0.0f, 1.0f}) {
        std::vector<float> logits(vocab, 1.0f);
        const std::vector<float> block_max = BlockMax(logits);
        logits[at] = kNaN;
        EXPECT_TRUE(Sample(logits, Row(temperature)).bad) << vocab << " NaN at " << at;
        EXPECT_TRUE(Sample(logits, Row(temperature), block_max.data()).bad) << "NaN that the block maxima do not show";
        logits[at] = kInf;
        const SampleOutcome outcome = Sample(logits, Row(temperature));
        EXPECT_TRUE(outcome.bad);
        EXPECT_EQ(outcome.token, -1);
        const std::vector<int32_t> banned = {at};
        SamplingRow row = Row(temperature);
        row.banned = banned;
        EXPECT_TRUE(Sample(logits, row).bad) << "a ban does not hide a broken row";
      }
    }
    EXPECT_TRUE(Sample(std::vector<float>(vocab, -kInf), Row(0)).bad);
    EXPECT_TRUE(Sample(std::vector<float>(vocab, -kInf), Row(1)).bad);
  }
  std::vector<float> two = {1.0f, 2.0f};
  const std::vector<int32_t> both = {0, 1};
  SamplingRow row = Row(1);
  row.banned = both;
  EXPECT_TRUE(Sample(two, row).bad) << "everything banned";
}

TEST(SamplerEdge, OneAllowedTokenIsDrawnWhateverTheParameters) {
  std::vector<float> logits(500, -kInf);
  logits[321] = -3e38f;
  for (float temperature : {0.0f, 1e-30f, 1.0f, 1e30f, kInf}) {
    for (int k : {0, 1, 5}) {
      for (float p : {1.0f, 0.5f, 0.0f}) {
        SamplingRow row = Row(temperature, k, p, 0.5f);
        row.want_logprob = true;
        const SampleOutcome outcome = Sample(logits, row);
        EXPECT_EQ(outcome.token, 321);
        EXPECT_FALSE(outcome.bad);
        EXPECT_EQ(outcome.logprob, 0.0f);
      }
    }
  }
}

TEST(SamplerEdge, ExtremeTemperatures) {
  std::mt19937 rng(4);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> logits(300);
  for (float& x : logits) x = normal(rng);
  logits[10] = -3e38f;
  logits[11] = -kInf;
  const int32_t top = LikeliestOf(logits);
  for (int position = 0; position < 50; ++position) {
    for (float temperature : {1e-45f, 1e-38f, 1e-10f, 1e-4f}) {
      SamplingRow row = Row(temperature, 0, position % 2 ? 0.9f : 1.0f);
      row.position = position;
      EXPECT_EQ(Sample(logits, row).token, top) << temperature;
    }
  }
  for (float temperature : {1e30f, 3e38f, kInf}) {
    std::set<int32_t> seen;
    for (int position = 0; position < 3000; ++position) {
      SamplingRow row = Row(temperature);
      row.position = position;
      const SampleOutcome outcome = Sample(logits, row);
      ASSERT_FALSE(outcome.bad);
      seen.insert(outcome.token);
    }
    EXPECT_GT(seen.size(), 290u);
    EXPECT_FALSE(seen.count(11)) << "-inf stays impossible";
  }
}

TEST(SamplerLogprob, IsTheLogSoftmaxOfTheRawRow) {
  std::mt19937 rng(8);
  for (int round = 0; round < 300; ++round) {
    const int vocab = std::vector<int>{1, 63, 64, 65, 1000, 5001}[rng() % 6];
    const std::vector<float> logits = RandomLogits(rng, vocab);
    SamplingRow row = RandomRow(rng, vocab);
    row.want_logprob = true;
    const std::vector<int32_t> banned = {LikeliestOf(logits)};
    if (rng() % 2) row.banned = banned;
    const SampleOutcome outcome = Sample(logits, row);
    if (outcome.bad) continue;
    const double top = logits[banned[0]];
    double sum = 0;
    for (float x : logits) sum += std::exp(x - top);
    const double expected = logits[outcome.token] - top - std::log(sum);
    ASSERT_NEAR(outcome.logprob, expected, 2e-6 * (1 + std::fabs(expected)));
    row.want_logprob = false;
    ASSERT_TRUE(std::isnan(Sample(logits, row).logprob));
  }
}

// --- Masks, penalties, biases ------------------------------------------------------------------------------------

std::vector<float> Adjusted(const std::vector<float>& logits, const SamplingRow& row) {
  const int32_t vocab = static_cast<int32_t>(logits.size());
  std::vector<float> scratch(SamplerScratch(vocab), kNaN), out(vocab, kNaN);
  AdjustedLogits(logits.data(), vocab, row, scratch.data(), out.data());
  return out;
}

std::vector<uint32_t> MaskOf(const std::vector<bool>& allowed) {
  std::vector<uint32_t> mask((allowed.size() + 31) / 32);
  for (size_t i = 0; i < allowed.size(); ++i) mask[i / 32] |= (allowed[i] ? 1u : 0u) << (i % 32);
  return mask;
}

// Whatever a row's spans look into.
struct Adjustments {
  std::vector<bool> allowed;  // empty: no mask
  std::vector<uint32_t> mask;
  std::vector<Occurrence> occurred;
  std::vector<TokenBias> bias;
  std::vector<int32_t> banned;
  float repetition = 1, frequency = 0, presence = 0;

  void Into(SamplingRow& row) {
    mask = MaskOf(allowed);
    // Bits past the vocabulary mean nothing.
    if (allowed.size() % 32 != 0) mask.back() |= ~0u << (allowed.size() % 32);
    row.mask = mask;
    row.occurred = occurred;
    row.logit_bias = bias;
    row.banned = banned;
    row.repetition = repetition;
    row.frequency = frequency;
    row.presence = presence;
  }
};

// Each part there or not; masks of few tokens, of half, of most; lists of few tokens or of most.
Adjustments RandomAdjustments(std::mt19937& rng, int vocab) {
  Adjustments a;
  std::normal_distribution<float> normal;
  const auto some = [&](auto add) {
    const uint32_t every = rng() % 2 ? 1 + rng() % 3 : 1 + vocab / 4;
    for (int32_t i = 0; i < vocab; ++i) {
      if (rng() % every == 0) add(i);
    }
  };
  if (rng() % 2) {
    const uint32_t percent = std::vector<uint32_t>{2, 50, 98, 100}[rng() % 4];
    for (int i = 0; i < vocab; ++i) a.allowed.push_back(rng() % 100 < percent);
    // Whole words and blocks that are all set or all clear.
    for (int i = 0; i < vocab; ++i) {
      if (i / 64 % 3 == 1) a.allowed[i] = percent > 50;
    }
  }
  if (rng() % 2) {
    some([&](int32_t i) {
      const int32_t count = static_cast<int32_t>(rng() % 4 ? rng() % 3 : 1000);
      a.occurred.push_back({i, count, rng() % 2 == 0});
    });
    a.repetition = std::vector<float>{1.0f, 1.3f, 0.7f}[rng() % 3];
    a.frequency = std::vector<float>{0.0f, 0.4f, -0.3f}[rng() % 3];
    a.presence = std::vector<float>{0.0f, 1.5f, -2.0f}[rng() % 3];
  }
  if (rng() % 2) some([&](int32_t i) { a.bias.push_back({i, normal(rng) * (rng() % 2 ? 1.0f : 30.0f)}); });
  if (rng() % 3 == 0) a.banned = {static_cast<int32_t>(rng() % vocab), -1, vocab};
  return a;
}

// The rules of sampler.h, one token at a time. Real: float for the bits, double for what they should mean.
template <typename Real>
std::vector<Real> ByTheRules(const std::vector<float>& logits, const Adjustments& a) {
  std::map<int32_t, Occurrence> occurred;
  std::map<int32_t, float> bias;
  for (const Occurrence& o : a.occurred) occurred[o.token] = o;
  for (const TokenBias& b : a.bias) bias[b.token] = b.bias;
  std::vector<Real> out;
  for (int32_t i = 0; i < static_cast<int32_t>(logits.size()); ++i) {
    Real l = logits[i];
    const auto step = [](Real x) { return std::min<Real>(std::max<Real>(x, -kMax), kMax); };
    if (l > -kInf) {
      if (occurred.count(i)) {
        const Occurrence& o = occurred[i];
        if (o.in_prompt || o.output_count > 0) l = step(l > 0 ? l / Real(a.repetition) : l * Real(a.repetition));
        const Real times = Real(a.frequency) * Real(o.output_count);
        l = step(l - times);
        if (o.output_count > 0) l = step(l - Real(a.presence));
      }
      if (bias.count(i)) l = step(l + Real(bias[i]));
      if (!a.allowed.empty() && !a.allowed[i]) l = -kInf;
      if (std::count(a.banned.begin(), a.banned.end(), i)) l = -kInf;
    }
    out.push_back(l);
  }
  return out;
}

TEST(SamplerAdjust, FollowsTheRulesToTheLastBit) {
  std::mt19937 rng(31);
  for (int round = 0; round < 3000; ++round) {
    const int vocab = std::vector<int>{1, 31, 32, 33, 64, 65, 200, 1000}[rng() % 8];
    const std::vector<float> logits = RandomLogits(rng, vocab);
    Adjustments a = RandomAdjustments(rng, vocab);
    SamplingRow row = Row(1);
    a.Into(row);
    RequireValid(row, vocab);
    const std::vector<float> got = Adjusted(logits, row), expected = ByTheRules<float>(logits, a);
    const std::vector<double> exact = ByTheRules<double>(logits, a);
    for (int i = 0; i < vocab; ++i) {
      ASSERT_EQ(got[i], expected[i]) << "round " << round << " token " << i << " logit " << logits[i];
      if (exact[i] > -kInf) {
        ASSERT_NEAR(got[i], exact[i], 3e-7 * (1000 + std::fabs(logits[i]))) << i;
      }
    }
  }
}

TEST(SamplerAdjust, EachRuleByHand) {
  const std::vector<float> logits = {3.0f, -3.0f, 0.0f, 3.0f, 3.0f, -kInf};
  SamplingRow row = Row(1);
  // In the prompt only; in the output only; both; in neither; -inf.
  const std::vector<Occurrence> occurred = {{0, 0, true}, {1, 2, false}, {2, 1, true}, {3, 0, false}, {5, 1, true}};
  row.occurred = occurred;
  EXPECT_EQ(Adjusted(logits, row), logits) << "all off";
  row.repetition = 2.0f;
  EXPECT_EQ(Adjusted(logits, row), (std::vector<float>{1.5f, -6.0f, 0.0f, 3.0f, 3.0f, -kInf}));
  row.repetition = 0.5f;
  EXPECT_EQ(Adjusted(logits, row), (std::vector<float>{6.0f, -1.5f, 0.0f, 3.0f, 3.0f, -kInf}));
  row.repetition = 1.0f;
  row.frequency = 0.25f;
  EXPECT_EQ(Adjusted(logits, row), (std::vector<float>{3.0f, -3.5f, -0.25f, 3.0f, 3.0f, -kInf}));
  row.frequency = 0.0f;
  row.presence = 1.5f;
  EXPECT_EQ(Adjusted(logits, row), (std::vector<float>{3.0f, -4.5f, -1.5f, 3.0f, 3.0f, -kInf}));
  row.repetition = 2.0f;
  row.frequency = -4.0f;
  // Repetition first: -3 * 2 = -6, then + 8, then - 1.5.
  EXPECT_EQ(Adjusted(logits, row), (std::vector<float>{1.5f, 0.5f, 2.5f, 3.0f, 3.0f, -kInf}));
  const std::vector<TokenBias> bias = {{1, 10.0f}, {4, -100.0f}, {5, 100.0f}};
  row.logit_bias = bias;
  EXPECT_EQ(Adjusted(logits, row), (std::vector<float>{1.5f, 10.5f, 2.5f, 3.0f, -97.0f, -kInf}));
  const std::vector<uint32_t> mask = {0b111101};
  const std::vector<int32_t> banned = {3};
  row.mask = mask;
  row.banned = banned;
  EXPECT_EQ(Adjusted(logits, row), (std::vector<float>{1.5f, -kInf, 2.5f, -kInf, -97.0f, -kInf}));
}

TEST(SamplerAdjust, NoPenaltyMakesATokenImpossible) {
  const std::vector<Occurrence> occurred = {{0, 2, true}};
  for (float logit : {3e38f, -3e38f, 1.0f, -1.0f}) {
    for (float repetition : {1e-38f, 3e38f}) {
      for (float frequency : {-3e38f, 0.0f, 3e38f}) {
        for (float presence : {-3e38f, 3e38f}) {
          for (float b : {-3e38f, 3e38f}) {
            const std::vector<TokenBias> bias = {{0, b}};
            SamplingRow row = Row(1);
            row.occurred = occurred;
            row.repetition = repetition;
            row.frequency = frequency;
            row.presence = presence;
            row.logit_bias = bias;
            const float got = Adjusted({logit, -kInf}, row)[0];
            ASSERT_LE(std::fabs(got), kMax) << logit << " " << repetition << " " << frequency << " " << presence;
            ASSERT_EQ(Sample({logit, -kInf}, row).token, 0);
          }
        }
      }
    }
  }
}

TEST(SamplerAdjust, DrawsWhatTheAdjustedLogitsDraw) {
  std::mt19937 rng(37);
  int drawn = 0;
  for (int round = 0; round < 3000; ++round) {
    const int vocab = std::vector<int>{1, 33, 64, 130, 1000, 3000}[rng() % 6];
    const std::vector<float> logits = RandomLogits(rng, vocab);
    Adjustments a = RandomAdjustments(rng, vocab);
    const std::vector<float> plain = ByTheRules<float>(logits, a);
    SamplingRow row = RandomRow(rng, vocab);
    if (rng() % 3 == 0) row.temperature = 0;
    const SampleOutcome expected = Sample(plain, row);
    const std::vector<int32_t> support = SupportOf(plain, row);
    a.Into(row);
    for (float slack : {-1.0f, 0.0f, 3.0f}) {
      // The maxima are those of the raw row: below what a bias or a negative penalty raises.
      const std::vector<float> block_max = BlockMax(logits, std::max(slack, 0.0f));
      const SampleOutcome got = Sample(logits, row, slack < 0 ? nullptr : block_max.data());
      ASSERT_EQ(got.token, expected.token) << "round " << round << " slack " << slack;
      ASSERT_EQ(got.bad, expected.bad);
    }
    ASSERT_EQ(SupportOf(logits, row), support);
    drawn += !expected.bad;
  }
  EXPECT_GT(drawn, 2500);
}

TEST(SamplerAdjust, SupportEqualsTheSortOracleOfTheAdjustedRow) {
  std::mt19937 rng(43);
  int compared = 0;
  for (int round = 0; round < 1500; ++round) {
    const int vocab = std::vector<int>{2, 64, 130, 500}[rng() % 4];
    const std::vector<float> logits = RandomLogits(rng, vocab);
    Adjustments a = RandomAdjustments(rng, vocab);
    SamplingRow row = RandomRow(rng, vocab);
    const Oracle oracle = Naive(ByTheRules<float>(logits, a), row);
    if (oracle.ambiguous) continue;
    ++compared;
    a.Into(row);
    ASSERT_EQ(SupportOf(logits, row), oracle.support) << round;
  }
  EXPECT_GT(compared, 1200);
}

TEST(SamplerAdjust, ALogitRaisedInABlockOfLowOnesIsFound) {
  std::vector<float> logits(200, -20.0f);
  logits[3] = 5.0f;
  const std::vector<float> block_max = BlockMax(logits);
  const std::vector<TokenBias> bias = {{150, 30.0f}};
  SamplingRow row = Row(0);
  row.logit_bias = bias;
  EXPECT_EQ(Sample(logits, row, block_max.data()).token, 150);
  const std::vector<Occurrence> occurred = {{3, 0, true}, {199, 3, false}};
  row = Row(0);
  row.occurred = occurred;
  row.frequency = -9.0f;
  EXPECT_EQ(Sample(logits, row, block_max.data()).token, 199);
  // And a block whose largest is gone: the others' maxima still hold.
  row.frequency = 0.0f;
  row.repetition = 100.0f;
  logits[70] = 0.06f;
  EXPECT_EQ(Sample(logits, row, BlockMax(logits).data()).token, 70);
}

TEST(SamplerAdjust, AMaskHidesNoBrokenRowAndLeavesNothingToDrawIfItIsEmpty) {
  for (int vocab : {1, 32, 64, 100}) {
    std::vector<float> logits(vocab, 1.0f);
    const std::vector<uint32_t> none((vocab + 31) / 32, 0);
    std::vector<uint32_t> past = none;
    if (vocab % 32 != 0) past.back() = ~0u << (vocab % 32);
    for (float temperature : {0.0f, 1.0f}) {
      SamplingRow row = Row(temperature);
      row.mask = none;
      EXPECT_TRUE(Sample(logits, row).bad) << vocab;
      row.mask = past;
      EXPECT_TRUE(Sample(logits, row).bad) << "bits past the vocabulary allow nothing";
      EXPECT_TRUE(SupportOf(logits, row).empty());
    }
    if (vocab == 1) continue;
    std::vector<uint32_t> first = none;
    first[0] = 1;
    for (float broken : {kNaN, kInf}) {
      logits[vocab - 1] = broken;
      SamplingRow row = Row(1);
      row.mask = first;
      EXPECT_TRUE(Sample(logits, row).bad);
    }
  }
}

TEST(SamplerAdjust, LogprobsStayThoseOfTheRawRow) {
  std::mt19937 rng(47);
  int compared = 0;
  for (int round = 0; round < 500; ++round) {
    const int vocab = std::vector<int>{64, 100, 1000}[rng() % 3];
    const std::vector<float> logits = RandomLogits(rng, vocab);
    Adjustments a = RandomAdjustments(rng, vocab);
    SamplingRow row = RandomRow(rng, vocab);
    if (rng() % 2) row.temperature = 0;
    row.want_logprob = true;
    a.Into(row);
    const std::vector<float> block_max = BlockMax(logits, 1.0f);
    const SampleOutcome got = Sample(logits, row, rng() % 2 ? block_max.data() : nullptr);
    if (got.bad) continue;
    ++compared;
    // The same bits as a row that can only draw this token.
    std::vector<bool> only(vocab);
    only[got.token] = true;
    const std::vector<uint32_t> mask = MaskOf(only);
    SamplingRow single = Row(0);
    single.want_logprob = true;
    single.mask = mask;
    ASSERT_EQ(Sample(logits, single).logprob, got.logprob);
    const double top = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (float x : logits) sum += std::exp(x - top);
    const double expected = logits[got.token] - top - std::log(sum);
    ASSERT_NEAR(got.logprob, expected, 2e-6 * (1 + std::fabs(expected)));
  }
  EXPECT_GT(compared, 400);
}

TEST(SamplerAdjust, DistributionFollowsTheSoftmaxOfTheAdjustedRow) {
  std::mt19937 rng(53);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> logits(40);
  for (float& x : logits) x = normal(rng);
  Adjustments a;
  for (int32_t i = 0; i < 40; i += 2) a.occurred.push_back({i, i % 3, i % 4 == 0});
  a.repetition = 1.4f;
  a.frequency = 0.3f;
  a.presence = -0.5f;
  a.bias = {{1, 2.0f}, {2, -1.0f}};
  for (int i = 0; i < 40; ++i) a.allowed.push_back(i % 5 != 0);
  SamplingRow row = Row(1.2f, 0, 0.95f);
  const Oracle oracle = Naive(ByTheRules<float>(logits, a), row);
  ASSERT_FALSE(oracle.ambiguous);
  a.Into(row);
  ExpectDistribution(logits, row, 100000, oracle);
}

TEST(SamplerAdjust, WhatMakesNoRowIsRefusedWithTheReason) {
  const auto refusal = [](const SamplingRow& row) -> std::string {
    try {
      RequireValid(row, 40);
    } catch (const InvalidArgument& e) {
      return e.what();
    }
    return "";
  };
  const auto with = [](auto change) {
    SamplingRow row = Row(1);
    change(row);
    return row;
  };
  EXPECT_EQ(refusal(Row(1)), "");
  const std::vector<uint32_t> one(1), two(2), three(3);
  EXPECT_EQ(refusal(with([&](SamplingRow& row) { row.mask = two; })), "");
  for (const auto* mask : {&one, &three}) {
    EXPECT_NE(refusal(with([&](SamplingRow& row) { row.mask = *mask; })).find("ceil(vocab / 32) = 2 words"), -1ul);
  }
  for (float bad : {0.0f, -1.0f, kNaN, kInf}) {
    EXPECT_EQ(refusal(with([&](SamplingRow& row) { row.repetition = bad; })).find("repetition must be"), 0u) << bad;
  }
  for (float bad : {kNaN, kInf, -kInf}) {
    EXPECT_EQ(refusal(with([&](SamplingRow& row) { row.frequency = bad; })).find("frequency must be"), 0u) << bad;
    EXPECT_EQ(refusal(with([&](SamplingRow& row) { row.presence = bad; })).find("presence must be"), 0u) << bad;
    const std::vector<TokenBias> bias = {{3, bad}};
    EXPECT_EQ(refusal(with([&](SamplingRow& row) { row.logit_bias = bias; })).find("logit_bias must be finite"), 0u);
  }
  using Ids = std::vector<int32_t>;
  for (const Ids& ids : {Ids{3, 2}, Ids{3, 3}, Ids{-1}, Ids{40}, Ids{0, 5, 4}}) {
    std::vector<Occurrence> occurred;
    std::vector<TokenBias> bias;
    for (int32_t id : ids) occurred.push_back({id, 1, false}), bias.push_back({id, 1.0f});
    EXPECT_EQ(refusal(with([&](SamplingRow& row) { row.occurred = occurred; })).find("occurred must name"), 0u);
    EXPECT_EQ(refusal(with([&](SamplingRow& row) { row.logit_bias = bias; })).find("logit_bias must name"), 0u);
  }
  const std::vector<Occurrence> negative = {{3, -1, true}}, fine = {{0, 0, true}, {39, 2, false}};
  EXPECT_NE(refusal(with([&](SamplingRow& row) { row.occurred = negative; })).find("-1 for token 3"), -1ul);
  EXPECT_EQ(refusal(with([&](SamplingRow& row) { row.occurred = fine; })), "");
}

}  // namespace
}  // namespace sapwood
