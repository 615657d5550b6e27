// The sampler against naive oracles: support sets by a full sort, tokens by evaluating every noise, and the drawn
// distribution by chi-square tests with fixed seeds.
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

namespace sapwood {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

SamplingRow Row(float temperature, int32_t top_k = 0, float top_p = 1.0f, float min_p = 0.0f) {
  return SamplingRow{temperature, top_k, top_p, min_p, 1234, 0, 0, {}, false};
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
void ExpectDistribution(const std::vector<float>& logits, SamplingRow row, int n) {
  const Oracle oracle = Naive(logits, row);
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

}  // namespace
}  // namespace sapwood
