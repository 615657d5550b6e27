// CpuRunner: hand-recorded two-layer decoders against an fp64 reference written here, and the promise that bits do not
// depend on chunks, neighbours, pages, threads or memory reuse, for both dtypes and every ISA level of the machine.
#include "program/cpu_runner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>

#include "base/check.h"
#include "program/arena.h"
#include "program/executor.h"

namespace sapwood {
namespace {

constexpr int32_t kPageSize = 16;
constexpr int32_t kMaxPos = 2200;

struct Shape {
  const char* name;
  int32_t hidden, hq, hkv, d, rotary, inter, vocab;
  bool bias, qk_norm, plus_one, extra_linear;
  int32_t window;  // of layer 1, in a KV group of its own; 0 = one group
  float softcap;
  int32_t rope_modes;
};
constexpr int32_t kLayers = 2;

const Shape kShapes[] = {
    {"plain", 48, 4, 2, 16, 16, 80, 131, false, false, false, false, 0, 0.0f, 1},
    {"odd", 40, 6, 2, 20, 8, 37, 67, true, true, true, true, 11, 15.0f, 2},
    {"mqa", 64, 7, 1, 32, 32, 64, 200, true, false, false, false, 0, 0.0f, 1},
};

float RoundTo(DType act, float x) {
  if (act == DType::kF32) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<float> data;
  const float* row(int64_t r) const { return data.data() + r * cols; }
};

using Vec = std::vector<double>;

// The weights by name, the Program that uses them, and the same computation in double precision.
class Model {
 public:
  // format: of every matrix; int8 and int4 read rows of q8, which the program makes wherever a matrix wants them.
  Model(const Shape& shape, DType act, WeightFormat format = WeightFormat::kAct)
      : shape_(shape), act_(act), format_(format) {
    std::mt19937 rng(7);
    const auto& s = shape;
    Make("embed", s.vocab, s.hidden, 1.0f, act, rng);
    for (int32_t l = 0; l < kLayers; ++l) {
      const std::string p = "l" + std::to_string(l) + ".";
      Make(p + "norm1", s.hidden, 1, 0.2f, DType::kF32, rng, s.plus_one ? 0.0f : 1.0f);
      Make(p + "qkv", (s.hq + 2 * s.hkv) * s.d, s.hidden, 0.25f, act, rng);
      if (s.bias) Make(p + "qkv_bias", (s.hq + 2 * s.hkv) * s.d, 1, 0.3f, DType::kF32, rng);
      if (s.qk_norm) Make(p + "q_norm", s.d, 1, 0.2f, DType::kF32, rng, 1.0f);
      if (s.qk_norm) Make(p + "k_norm", s.d, 1, 0.2f, DType::kF32, rng, 1.0f);
      if (s.extra_linear) Make(p + "mid", s.hq * s.d, s.hq * s.d, 0.15f, act, rng);
      if (s.extra_linear) Make(p + "mid_bias", s.hq * s.d, 1, 0.1f, DType::kF32, rng);
      Make(p + "o", s.hidden, s.hq * s.d, 0.15f, act, rng);
      Make(p + "norm2", s.hidden, 1, 0.2f, DType::kF32, rng, s.plus_one ? 0.0f : 1.0f);
      Make(p + "gate_up", 2 * s.inter, s.hidden, 0.2f, act, rng);
      Make(p + "down", s.hidden, s.inter, 0.2f, act, rng);
    }
    Make("norm", s.hidden, 1, 0.2f, DType::kF32, rng, s.plus_one ? 0.0f : 1.0f);
    Make("head", s.vocab, s.hidden, 0.2f, act, rng);
    Matrix cos{s.rope_modes * kMaxPos, s.rotary / 2, {}}, sin = cos;
    for (int32_t mode = 0; mode < s.rope_modes; ++mode) {
      for (int32_t pos = 0; pos < kMaxPos; ++pos) {
        for (int32_t i = 0; i < s.rotary / 2; ++i) {
          const double angle = pos / (1.0 + 0.5 * mode) * std::pow(100.0, -2.0 * i / s.rotary);
          cos.data.push_back(static_cast<float>(std::cos(angle)));
          sin.data.push_back(static_cast<float>(std::sin(angle)));
        }
      }
    }
    weights_["cos"] = cos;
    weights_["sin"] = sin;
    MakeProgram();  // names the slots
    if (format_ != WeightFormat::kAct) {
      for (const auto& [name, matrix] : weights_) {
        if (IsMatrix(Kind(name))) dequantised_[name] = Dequantised(matrix);
      }
    }
  }

  const Shape& shape() const { return shape_; }
  DType act() const { return act_; }
  std::vector<KvGroup> groups() const {
    if (shape_.window == 0) return {{.kind = KvKind::kFull, .num_layers = kLayers, .page_size = kPageSize}};
    return {{.kind = KvKind::kFull, .num_layers = 1, .page_size = kPageSize},
            {.kind = KvKind::kWindow, .window = shape_.window, .num_layers = 1, .page_size = kPageSize}};
  }
  int32_t group_of(int32_t l) const { return shape_.window == 0 ? 0 : l; }
  int32_t layer_in_group(int32_t l) const { return shape_.window == 0 ? l : 0; }

  Program MakeProgram() {
    const auto& s = shape_;
    Program p;
    p.act = act_;
    p.vocab_size = s.vocab;
    slot_names_.clear();
    const auto value = [&](DType dtype, RowSym rows, int64_t cols) {
      p.values.push_back({dtype, rows, cols});
      return static_cast<int32_t>(p.values.size()) - 1;
    };
    const auto slot = [&](const std::string& name) -> int32_t {
      if (!weights_.count(name)) return -1;
      const auto [it, added] = slot_names_.emplace(name, p.num_weight_slots);
      if (added) ++p.num_weight_slots;
      return it->second;
    };
    const auto node = [&](OpKind op, SegmentKind segment, std::vector<int32_t> in, std::vector<int32_t> out,
                          std::vector<int32_t> w, std::vector<int64_t> ints, std::vector<double> floats,
                          std::string name) {
      p.nodes.push_back({op, segment, in, out, w, ints, floats, name});
    };
    constexpr auto kT = RowSym::kT, kL = RowSym::kL;
    const DType into_matrix = format_ == WeightFormat::kAct ? act_ : DType::kQ8;
    constexpr auto kF = SegmentKind::kForward, kH = SegmentKind::kHead;
    int32_t x = value(DType::kF32, kT, s.hidden);
    node(OpKind::kEmbedding, kF, {}, {x}, {slot("embed")}, {}, {kEmbedScale}, "embed");
    for (int32_t l = 0; l < kLayers; ++l) {
      const std::string n = "l" + std::to_string(l) + ".";
      int32_t y = value(into_matrix, kT, s.hidden);
      node(OpKind::kRmsNorm, kF, {x}, {y}, {slot(n + "norm1")}, {s.plus_one}, {kEps}, n + "norm1");
      const int32_t q = value(act_, kT, s.hq * s.d);
      node(OpKind::kQkv, kF, {y}, {q},
           {slot(n + "qkv"), slot(n + "qkv_bias"), slot(n + "q_norm"), slot(n + "k_norm"), slot("cos"), slot("sin")},
           {s.hq, s.hkv, s.d, s.rotary, group_of(l), layer_in_group(l), s.rope_modes}, {kEps}, n + "qkv");
      int32_t o = value(act_, kT, s.hq * s.d);
      node(OpKind::kAttention, kF, {q}, {o}, {},
           {s.hq, s.hkv, s.d, group_of(l), layer_in_group(l), l == 1 ? s.window : 0}, {Scale(), s.softcap}, n + "attn");
      const auto quantized = [&](int32_t id, const std::string& name) {
        if (format_ == WeightFormat::kAct) return id;
        const int32_t q8 = value(DType::kQ8, kT, p.values[id].cols);
        node(OpKind::kQuantize, kF, {id}, {q8}, {}, {}, {}, name);
        return q8;
      };
      o = quantized(o, n + "attn_q8");
      if (s.extra_linear) {
        const int32_t mid = value(act_, kT, s.hq * s.d);
        node(OpKind::kLinear, kF, {o}, {mid}, {slot(n + "mid"), slot(n + "mid_bias")}, {}, {}, n + "mid");
        o = quantized(mid, n + "mid_q8");
      }
      int32_t x2 = value(DType::kF32, kT, s.hidden);
      node(OpKind::kLinearResidual, kF, {o, x}, {x2}, {slot(n + "o"), -1}, {1}, {}, n + "o");
      y = value(into_matrix, kT, s.hidden);
      node(OpKind::kRmsNorm, kF, {x2}, {y}, {slot(n + "norm2")}, {s.plus_one}, {kEps}, n + "norm2");
      const int32_t h = value(into_matrix, kT, s.inter);
      node(OpKind::kGateUp, kF, {y}, {h}, {slot(n + "gate_up")}, {s.inter}, {}, n + "gate_up");
      x = value(DType::kF32, kT, s.hidden);
      node(OpKind::kLinearResidual, kF, {h, x2}, {x}, {slot(n + "down"), -1}, {1}, {}, n + "down");
    }
    const int32_t xl = value(DType::kF32, kL, s.hidden), yl = value(into_matrix, kL, s.hidden);
    node(OpKind::kGatherLogitRows, kH, {x}, {xl}, {}, {}, {}, "gather");
    node(OpKind::kRmsNorm, kH, {xl}, {yl}, {slot("norm")}, {s.plus_one}, {kEps}, "norm");
    const int32_t logits = value(DType::kF32, kL, s.vocab), block_max = value(DType::kF32, kL, (s.vocab + 63) / 64);
    node(OpKind::kLmHead, kH, {yl}, {logits, block_max}, {slot("head")}, {}, {kLogitScale, s.softcap}, "head");
    node(OpKind::kSample, SegmentKind::kSample, {logits, block_max}, {}, {}, {}, {}, "sample");
    return p;
  }

  std::shared_ptr<WeightStore> MakeStore(ThreadPool* pool = nullptr) const {
    auto store = std::make_shared<WeightStore>(act_, static_cast<int32_t>(slot_names_.size()));
    for (const auto& [name, id] : slot_names_) FillSlot(store.get(), name, id, pool);
    return store;
  }
  void FillSlot(WeightStore* store, const std::string& name, int32_t id, ThreadPool* pool) const {
    const Matrix& m = weights_.at(name);
    const SlotKind kind = Kind(name);
    store->Fill(id, kind, {{m.data.data(), DType::kF32, m.rows, m.cols, m.cols}}, pool, 0.0f,
                IsMatrix(kind) ? format_ : WeightFormat::kAct);
  }
  int32_t slot(const std::string& name) const { return slot_names_.at(name); }
  const Matrix& weight(const std::string& name) const { return weights_.at(name); }

  // Logits after every token, [num_tokens][vocab]. int8: K and V as whole multiples of 1/127 of a head's largest.
  std::vector<Vec> Reference(const std::vector<int32_t>& tokens, int32_t rope_mode, bool int8 = false) const {
    const auto& s = shape_;
    const size_t n = tokens.size();
    std::vector<Vec> x(n);
    for (size_t t = 0; t < n; ++t) {
      for (int32_t i = 0; i < s.hidden; ++i) x[t].push_back(weight("embed").row(tokens[t])[i] * kEmbedScale);
    }
    const int32_t group = s.hq / s.hkv;
    for (int32_t l = 0; l < kLayers; ++l) {
      const std::string p = "l" + std::to_string(l) + ".";
      std::vector<Vec> qkv(n);
      for (size_t t = 0; t < n; ++t) {
        qkv[t] = Linear(p + "qkv", Norm(x[t], p + "norm1", s.plus_one), p + "qkv_bias");
        for (int32_t head = 0; head < s.hq + s.hkv; ++head) {
          double* v = qkv[t].data() + head * s.d;
          if (s.qk_norm) {
            const Vec y = Norm(Vec(v, v + s.d), p + (head < s.hq ? "q_norm" : "k_norm"), false);
            std::copy(y.begin(), y.end(), v);
          }
          for (int32_t i = 0; i < s.rotary / 2; ++i) {
            const double c = weight("cos").row(rope_mode * kMaxPos + static_cast<int64_t>(t))[i];
            const double sn = weight("sin").row(rope_mode * kMaxPos + static_cast<int64_t>(t))[i];
            const double a = v[i], b = v[i + s.rotary / 2];
            v[i] = a * c - b * sn;
            v[i + s.rotary / 2] = b * c + a * sn;
          }
        }
        for (int32_t head = s.hq; int8 && head < s.hq + 2 * s.hkv; ++head) {
          double* const v = qkv[t].data() + head * s.d;
          double largest = 0;
          for (int32_t i = 0; i < s.d; ++i) largest = std::max(largest, std::abs(v[i]));
          for (int32_t i = 0; i < s.d; ++i) v[i] = std::nearbyint(v[i] / largest * 127) * largest / 127;
        }
      }
      const int32_t window = l == 1 ? s.window : 0;
      for (size_t t = 0; t < n; ++t) {
        Vec out(s.hq * s.d, 0.0);
        const size_t lo = window > 0 && t + 1 > static_cast<size_t>(window) ? t + 1 - window : 0;
        for (int32_t head = 0; head < s.hq; ++head) {
          const double* q = qkv[t].data() + head * s.d;
          Vec score;
          for (size_t j = lo; j <= t; ++j) {
            const double* k = qkv[j].data() + (s.hq + head / group) * s.d;
            double dot = std::inner_product(q, q + s.d, k, 0.0) * Scale();
            if (s.softcap > 0) dot = s.softcap * std::tanh(dot / s.softcap);
            score.push_back(dot);
          }
          const double top = *std::max_element(score.begin(), score.end());
          double sum = 0;
          for (double& v : score) sum += v = std::exp(v - top);
          for (size_t j = lo; j <= t; ++j) {
            const double* v = qkv[j].data() + (s.hq + s.hkv + head / group) * s.d;
            for (int32_t i = 0; i < s.d; ++i) out[head * s.d + i] += score[j - lo] / sum * v[i];
          }
        }
        if (s.extra_linear) out = Linear(p + "mid", out, p + "mid_bias");
        Add(&x[t], Linear(p + "o", out, ""));
      }
      for (size_t t = 0; t < n; ++t) {
        const Vec gu = Linear(p + "gate_up", Norm(x[t], p + "norm2", s.plus_one), "");
        Vec h(s.inter);
        for (int32_t i = 0; i < s.inter; ++i) h[i] = gu[i] / (1 + std::exp(-gu[i])) * gu[s.inter + i];
        Add(&x[t], Linear(p + "down", h, ""));
      }
    }
    std::vector<Vec> logits(n);
    for (size_t t = 0; t < n; ++t) {
      logits[t] = Linear("head", Norm(x[t], "norm", s.plus_one), "");
      for (double& v : logits[t]) {
        v *= kLogitScale;
        if (s.softcap > 0) v = s.softcap * std::tanh(v / s.softcap);
      }
    }
    return logits;
  }

  static constexpr double kEps = 1e-5, kEmbedScale = 1.5, kLogitScale = 0.5;
  double Scale() const { return 1.0 / std::sqrt(static_cast<double>(shape_.d)); }

 private:
  void Make(const std::string& name, int64_t rows, int64_t cols, float scale, DType round, std::mt19937& rng,
            float mean = 0.0f) {
    std::normal_distribution<float> normal(mean, scale);
    Matrix m{rows, cols, {}};
    for (int64_t i = 0; i < rows * cols; ++i) m.data.push_back(RoundTo(round, normal(rng)));
    weights_[name] = std::move(m);
  }
  Vec Norm(const Vec& x, const std::string& name, bool plus_one) const {
    double sum = 0;
    for (double v : x) sum += v * v;
    const double inv = 1 / std::sqrt(sum / static_cast<double>(x.size()) + kEps);
    Vec y(x.size());
    for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] * inv * (weight(name).data[i] + (plus_one ? 1 : 0));
    return y;
  }
  SlotKind Kind(const std::string& name) const {
    return name == "embed"                             ? SlotKind::kTable
           : name == "cos" || name == "sin"            ? SlotKind::kF32
           : weight(name).cols == 1                    ? SlotKind::kVector
           : name.find("gate_up") != std::string::npos ? SlotKind::kGateUp
                                                       : SlotKind::kLinear;
  }
  static bool IsMatrix(SlotKind kind) { return kind == SlotKind::kLinear || kind == SlotKind::kGateUp; }
  // What the matrix is once it went through the format; a row does not depend on the others of its panel.
  Matrix Dequantised(const Matrix& matrix) const {
    Matrix out = matrix;
    std::vector<uint8_t> panel(PackedBytes(format_, DType::kF32, kPanel, matrix.cols));
    for (int64_t r = 0; r < matrix.rows; ++r) {
      std::vector<const float*> rows(kPanel, nullptr);
      rows[0] = matrix.row(r);
      Kernels(BestIsa()).quantize_panel(format_, rows.data(), matrix.cols, panel.data());
      ReadQuantizedRow(format_, panel.data(), matrix.cols, 0, out.data.data() + r * matrix.cols);
    }
    return out;
  }
  // Blocks of 32 as integers up to 127 times a scale.
  static Vec RoundedToQ8(Vec x) {
    for (size_t begin = 0; begin < x.size(); begin += kQ8Block) {
      const size_t end = std::min<size_t>(x.size(), begin + kQ8Block);
      double most = 0;
      for (size_t i = begin; i < end; ++i) most = std::max(most, std::abs(x[i]));
      for (size_t i = begin; i < end && most > 0; ++i) x[i] = std::nearbyint(x[i] * 127 / most) * most / 127;
    }
    return x;
  }
  Vec Linear(const std::string& name, Vec x, const std::string& bias) const {
    const Matrix& w = format_ == WeightFormat::kAct ? weight(name) : dequantised_.at(name);
    if (format_ != WeightFormat::kAct) x = RoundedToQ8(std::move(x));
    Vec y(w.rows);
    for (int64_t r = 0; r < w.rows; ++r) {
      y[r] = std::inner_product(x.begin(), x.end(), w.row(r), 0.0);
      if (const auto it = weights_.find(bias); it != weights_.end()) y[r] += it->second.data[r];
    }
    return y;
  }
  static void Add(Vec* x, const Vec& y) {
    for (size_t i = 0; i < x->size(); ++i) (*x)[i] += y[i];
  }

  Shape shape_;
  DType act_;
  WeightFormat format_;
  std::map<std::string, Matrix> weights_, dequantised_;
  std::map<std::string, int32_t> slot_names_;
};

std::vector<int32_t> Tokens(int32_t n, int32_t vocab, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<int32_t> out(n);
  for (int32_t& t : out) t = static_cast<int32_t>(rng() % vocab);
  return out;
}

// Rows of tokens run through a CpuRunner in chosen chunks; keeps the logits of every token and reads the KV back.
class Bench {
 public:
  static constexpr int32_t kNumPages = 144, kMaxRows = 8;

  Bench(Model* model, CpuRunnerConfig config, uint32_t page_seed = 1)
      : model_(model), table_(model->groups(), kMaxRows), page_rng_(page_seed) {
    Program program = model->MakeProgram();
    config.groups = model->groups();
    config.num_pages.assign(config.groups.size(), kNumPages);
    config.num_kv_heads = model->shape().hkv;
    config.head_dim = model->shape().d;
    if (config.num_threads == 0) config.num_threads = 1;
    if (config.max_step_tokens == 2048) config.max_step_tokens = 256;
    store_ = model->MakeStore();
    runner_ = std::make_unique<CpuRunner>(std::move(program), store_, config);
    runner_->PoisonKv();  // whoever reads what no step wrote gets NaN
    runner_->TapLogits(true);
    free_.resize(config.groups.size());
    for (auto& pages : free_) {
      pages.resize(kNumPages);
      std::iota(pages.begin(), pages.end(), 0);
      std::shuffle(pages.begin(), pages.end(), page_rng_);
    }
    rows_.resize(kMaxRows);
  }

  // A row with room for all its tokens. shared: its first pages are another row's, whose tokens it begins with.
  void AddRow(int32_t row, std::vector<int32_t> tokens, int32_t rope_mode = 0, int32_t shared_row = -1,
              int32_t shared_len = 0) {
    Row& r = rows_[row];
    r.tokens = std::move(tokens);
    r.done = shared_len;
    RowInit init{.row = row, .gen = 1, .kv_len = shared_len, .max_len = 1 << 20, .temperature = 0};
    init.rope_mode = rope_mode;
    next_.row_ops.push_back({.kind = RowOpKind::kInit, .row = row, .gen = 1,
                             .begin = static_cast<int32_t>(next_.inits.size()), .count = 1});
    next_.inits.push_back(init);
    const int32_t num_pages = (static_cast<int32_t>(r.tokens.size()) + kPageSize - 1) / kPageSize;
    r.pages.assign(free_.size(), {});
    for (size_t g = 0; g < free_.size(); ++g) {
      for (int32_t p = 0; p < num_pages; ++p) {
        if (p < shared_len / kPageSize) {
          r.pages[g].push_back(rows_[shared_row].pages[g][p]);
        } else {
          r.pages[g].push_back(free_[g].back());
          free_[g].pop_back();
        }
      }
      next_.row_ops.push_back({.kind = RowOpKind::kAppendPages, .row = row, .gen = 1, .group = static_cast<int32_t>(g),
                               .begin = static_cast<int32_t>(next_.ints.size()), .count = num_pages});
      next_.ints.insert(next_.ints.end(), r.pages[g].begin(), r.pages[g].end());
    }
  }

  // One step: (row, tokens) each; logits of every token.
  void Step(const std::vector<std::pair<int32_t, int32_t>>& items) {
    StepPlan plan = std::exchange(next_, {});
    plan.step_id = ++step_;
    for (const auto& [row, n] : items) {
      Row& r = rows_[row];
      plan.items.push_back({row, 1, ItemKind::kExtend, n, 0, static_cast<int32_t>(plan.tokens.size()), r.done});
      plan.tokens.insert(plan.tokens.end(), r.tokens.begin() + r.done, r.tokens.begin() + r.done + n);
      r.done += n;
    }
    table_.ApplyRowOps(plan);
    StepBatch batch;
    table_.Prepare(plan, &batch);
    std::vector<SampledToken> out(batch.logit_src.size());
    runner_->Forward(batch, table_);
    runner_->Head(batch, table_, out);
    for (size_t l = 0; l < out.size(); ++l) {
      sampled_[{batch.segments[batch.logit_segment[l]].row, batch.positions[batch.logit_src[l]]}] = out[l].token;
    }
    for (LogitTap& tap : runner_->TakeLogits()) {
      EXPECT_EQ(tap.step_id, step_);
      EXPECT_EQ(tap.gen, 1u);
      logits_[{tap.row, tap.position - 1}] = std::move(tap.logits);
    }
  }

  // Everything a row's bits are: logits of each token from `from` on, then K and V of each token of each layer.
  std::vector<uint8_t> Bits(int32_t row, int32_t from = 0) const {
    std::vector<uint8_t> out;
    const Row& r = rows_[row];
    for (int32_t t = from; t < r.done; ++t) {
      const std::vector<float>& logits = logits_.at({row, t});
      const auto* bytes = reinterpret_cast<const uint8_t*>(logits.data());
      out.insert(out.end(), bytes, bytes + logits.size() * 4);
    }
    for (int32_t l = 0; l < kLayers; ++l) {
      const int32_t g = model_->group_of(l);
      for (int32_t t = 0; t < r.done; ++t) {
        const auto kv = runner_->ReadKv(g, model_->layer_in_group(l), r.pages[g][t / kPageSize], t % kPageSize);
        out.insert(out.end(), kv.begin(), kv.end());
      }
    }
    return out;
  }
  const std::vector<float>& logits(int32_t row, int64_t t) const { return logits_.at({row, t}); }
  int32_t sampled(int32_t row, int64_t t) const { return sampled_.at({row, t}); }
  CpuRunner& runner() { return *runner_; }
  WeightStore& store() { return *store_; }
  PageId page(int32_t row, int32_t group, int32_t index) const { return rows_[row].pages[group][index]; }

 private:
  struct Row {
    std::vector<int32_t> tokens;
    int32_t done = 0;
    std::vector<std::vector<PageId>> pages;
  };
  Model* model_;
  RowTable table_;
  std::mt19937 page_rng_;
  std::shared_ptr<WeightStore> store_;
  std::unique_ptr<CpuRunner> runner_;
  std::vector<std::vector<PageId>> free_;
  std::vector<Row> rows_;
  StepPlan next_;
  int64_t step_ = 0;
  std::map<std::pair<int32_t, int64_t>, std::vector<float>> logits_;
  std::map<std::pair<int32_t, int64_t>, int32_t> sampled_;
};

struct Case {
  const Shape* shape;
  DType act;
  Isa isa;
  bool int8_kv = false;
  WeightFormat format = WeightFormat::kAct;
};

std::string CaseName(const testing::TestParamInfo<Case>& info) {
  const WeightFormat format = info.param.format;
  return std::string(info.param.shape->name) + (info.param.act == DType::kF32 ? "_f32_" : "_bf16_") +
         (info.param.int8_kv ? "int8_kv_" : "") +
         (format == WeightFormat::kAct ? "" : WeightFormatName(format) + std::string("_")) + IsaName(info.param.isa);
}

std::vector<Case> Cases() {
  std::vector<Case> out;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (!IsaSupported(isa)) continue;
    for (DType act : {DType::kF32, DType::kBF16}) {
      for (const Shape& shape : kShapes) {
        for (bool int8_kv : {false, true}) out.push_back({&shape, act, isa, int8_kv});
      }
    }
    out.push_back({&kShapes[0], DType::kF32, isa, false, WeightFormat::kInt8});
    for (WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
      out.push_back({&kShapes[1], DType::kBF16, isa, false, format});
    }
  }
  return out;
}

class CpuRunnerCase : public testing::TestWithParam<Case> {
 protected:
  static constexpr int32_t kLen = 77;
  CpuRunnerCase()
      : model_(*GetParam().shape, GetParam().act, GetParam().format),
        tokens_(Tokens(kLen, GetParam().shape->vocab, 3)) {
    config_.isa = GetParam().isa;
    config_.int8_kv = GetParam().int8_kv;
    mode_ = GetParam().shape->rope_modes - 1;
  }
  // Of logits. Where int8 rows or pages are made in fp32 and, by the reference, in fp64, a value near a tie may become the
  // neighbouring integer: seldom, and by one step of its block.
  static double Tolerance(double f32) {
    if (GetParam().act == DType::kBF16) return GetParam().int8_kv ? 0.16 : 0.1;
    return GetParam().format == WeightFormat::kAct && !GetParam().int8_kv ? f32 : 0.02;
  }
  Model model_;
  std::vector<int32_t> tokens_;
  CpuRunnerConfig config_;
  int32_t mode_;
};
INSTANTIATE_TEST_SUITE_P(All, CpuRunnerCase, testing::ValuesIn(Cases()), CaseName);

TEST_P(CpuRunnerCase, AgreesWithFp64) {
  Bench bench(&model_, config_);
  bench.AddRow(0, tokens_, mode_);
  bench.Step({{0, kLen}});
  const auto reference = model_.Reference(tokens_, mode_, config_.int8_kv);
  double worst = 0, square = 0;
  for (int32_t t = 0; t < kLen; ++t) {
    ASSERT_EQ(bench.logits(0, t).size(), reference[t].size());
    for (size_t v = 0; v < reference[t].size(); ++v) {
      const double error = std::abs(bench.logits(0, t)[v] - reference[t][v]);
      ASSERT_FALSE(std::isnan(error)) << "token " << t << " logit " << v;
      worst = std::max(worst, error);
      square += reference[t][v] * reference[t][v];
    }
    const auto& logits = bench.logits(0, t);
    EXPECT_EQ(bench.sampled(0, t), std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  const double rms = std::sqrt(square / (kLen * static_cast<double>(GetParam().shape->vocab)));
  RecordProperty("max_abs_error", std::to_string(worst));
  EXPECT_GT(rms, 0.3) << "the test's model must say something";
  EXPECT_LT(worst, Tolerance(2e-5)) << "rms of the logits " << rms;
}

TEST_P(CpuRunnerCase, BitsDoNotDependOnTheSchedule) {
  Bench alone(&model_, config_);
  alone.AddRow(0, tokens_, mode_);
  alone.Step({{0, kLen}});
  const auto want = alone.Bits(0);

  for (int32_t chunk : {1, 7, 64}) {
    Bench bench(&model_, config_, 2);
    bench.AddRow(0, tokens_, mode_);
    for (int32_t at = 0; at < kLen; at += chunk) bench.Step({{0, std::min(chunk, kLen - at)}});
    EXPECT_EQ(bench.Bits(0), want) << "chunks of " << chunk;
  }
  {
    Bench bench(&model_, config_, 3);  // among others, more than one block of logit rows
    for (int32_t row : {4, 2, 5}) {
      bench.AddRow(row, Tokens(90, model_.shape().vocab, row), row % model_.shape().rope_modes);
    }
    bench.Step({{4, 33}, {2, 1}});
    bench.AddRow(0, tokens_, mode_);
    bench.Step({{2, 40}, {0, 30}, {4, 1}, {5, 61}});
    bench.Step({{5, 1}, {4, 1}, {0, 1}, {2, 1}});
    bench.Step({{0, kLen - 31}, {4, 1}});
    EXPECT_EQ(bench.Bits(0), want) << "among others";
  }
  {
    Bench bench(&model_, config_, 7);  // so many tokens that a GEMM is cut into blocks of rows
    bench.AddRow(3, Tokens(150, model_.shape().vocab, 8));
    bench.AddRow(0, tokens_, mode_);
    bench.Step({{3, 150}, {0, kLen}});
    EXPECT_EQ(bench.Bits(0), want) << "behind a long prompt";
  }
  for (int32_t threads : {2, 3}) {
    CpuRunnerConfig config = config_;
    config.num_threads = threads;
    Bench bench(&model_, config, 4);
    bench.AddRow(0, tokens_, mode_);
    bench.Step({{0, 50}});
    for (int32_t at = 50; at < kLen; ++at) bench.Step({{0, 1}});
    EXPECT_EQ(bench.Bits(0), want) << threads << " threads";
  }
  {
    CpuRunnerConfig config = config_;
    config.debug = true;
    Bench bench(&model_, config, 5);
    bench.AddRow(0, tokens_, mode_);
    bench.Step({{0, kLen - 2}});
    bench.Step({{0, 2}});
    EXPECT_EQ(bench.Bits(0), want) << "without reuse of memory";
  }
}

// A row may use pages that another row of the same step writes: each layer's KV is there before its attention.
TEST_P(CpuRunnerCase, FollowerReadsItsLeadersPagesInTheSameStep) {
  Bench alone(&model_, config_);
  alone.AddRow(0, tokens_, mode_);
  alone.Step({{0, kLen}});
  const auto want = alone.Bits(0, 64);
  for (int32_t threads : {1, 2}) {
    CpuRunnerConfig config = config_;
    config.num_threads = threads;
    Bench bench(&model_, config, 6);
    std::vector<int32_t> leader(tokens_.begin(), tokens_.begin() + 70);
    bench.AddRow(1, leader, mode_);
    bench.AddRow(0, tokens_, mode_, 1, 64);
    bench.Step({{0, kLen - 64}, {1, 70}});  // the follower stands first
    EXPECT_EQ(bench.Bits(0, 64), want) << threads << " threads";
  }
}

TEST_P(CpuRunnerCase, CopiedPagesContinueAlike) {
  Bench bench(&model_, config_);
  bench.AddRow(0, tokens_, mode_);
  bench.Step({{0, 40}});
  std::vector<int32_t> fork(tokens_.begin(), tokens_.begin() + 60);
  bench.AddRow(1, fork, mode_, 0, 32);  // shares two pages; the third is a copy, half full
  std::vector<PageCopy> copies;
  for (int32_t g = 0; g < static_cast<int32_t>(model_.groups().size()); ++g) {
    copies.push_back({g, bench.page(0, g, 2), bench.page(1, g, 2)});
  }
  bench.runner().CopyPages(copies);
  for (int32_t l = 0; l < kLayers; ++l) {
    const int32_t g = model_.group_of(l), i = model_.layer_in_group(l);
    for (int32_t offset = 0; offset < 8; ++offset) {
      EXPECT_EQ(bench.runner().ReadKv(g, i, bench.page(0, g, 2), offset),
                bench.runner().ReadKv(g, i, bench.page(1, g, 2), offset));
    }
  }
  EXPECT_THROW(bench.runner().CopyPages(std::vector<PageCopy>{{0, 0, Bench::kNumPages}}), InternalError);
}

// Rows that wait for their masks draw what they would have drawn in time, from the same bits: resumed alone, beside
// others, after others have used the runner's memory, and after being held again.
TEST_P(CpuRunnerCase, HeldRowsDrawAsIfTheMaskHadBeenInTime) {
  constexpr int32_t kRows = 3, kPrompt = 20, kNumTokens = 6;
  const int32_t vocab = model_.shape().vocab;
  const auto mask = [&](int32_t row, int64_t position) {
    std::vector<uint32_t> words((vocab + 31) / 32);
    std::mt19937 rng(static_cast<uint32_t>(100 * position + row));
    for (uint32_t& word : words) word = rng() & rng();
    words[0] |= 1;
    return words;
  };
  struct Run {
    std::vector<std::vector<int32_t>> tokens = std::vector<std::vector<int32_t>>(kRows);
    std::map<std::pair<int32_t, int64_t>, std::vector<float>> logits;
    std::map<std::pair<int32_t, int64_t>, float> logprobs;
    int num_held = 0;
  };
  // delay(row, position): how many steps after the token was to be drawn its mask comes. The other rows go on meanwhile;
  // every second time the held row is resumed in vain first.
  const auto run = [&](const std::function<int(int32_t, int64_t)>& delay, int32_t num_threads, bool debug) {
    CpuRunnerConfig config = config_;
    config.groups = model_.groups();
    config.num_pages.assign(config.groups.size(), 4 * kRows);
    config.num_kv_heads = model_.shape().hkv;
    config.head_dim = model_.shape().d;
    config.num_threads = num_threads;
    config.debug = debug;
    auto owned = std::make_unique<CpuRunner>(model_.MakeProgram(), model_.MakeStore(), config);
    CpuRunner& runner = *owned;
    runner.TapLogits(true);
    Executor executor(std::move(owned), {.groups = model_.groups(), .max_rows = kRows + 1});
    Run out;
    int64_t step = 0;
    auto plan = std::make_shared<StepPlan>();
    std::vector<int32_t> late(kRows);
    const auto submit = [&] {
      plan->step_id = step++;
      executor.Submit(plan);
      executor.WaitIdle();
      for (LogitTap& tap : runner.TakeLogits()) out.logits[{tap.row, tap.position}] = std::move(tap.logits);
      const StepResult result = executor.Drain().back().result;
      EXPECT_EQ(result.error, "");
      for (const ResultItem& item : result.items) {
        if (item.flags & kHeld) {
          EXPECT_GT(late[item.row], 0);
          ++out.num_held;
          continue;
        }
        EXPECT_EQ(item.n, 1);
        EXPECT_EQ(late[item.row], 0);
        const int64_t position = kPrompt + static_cast<int64_t>(out.tokens[item.row].size());
        out.tokens[item.row].push_back(result.tokens[item.token_begin]);
        out.logprobs[{item.row, position}] = result.logprobs[item.token_begin];
      }
      plan = std::make_shared<StepPlan>();
    };
    const auto post = [&](int32_t row, int64_t position) {
      executor.PostMask(row, 1, position, mask(row, position));
    };
    for (int32_t row = 0; row < kRows; ++row) {
      RowInit init{.row = row, .gen = 1, .max_len = 1000, .temperature = row == 1 ? 0.8f : 0.0f, .return_logprob = 1};
      init.seed = 5;
      init.rope_mode = mode_;
      plan->row_ops.push_back({.kind = RowOpKind::kInit, .row = row, .gen = 1, .begin = row});
      plan->inits.push_back(init);
      for (int32_t g = 0; g < static_cast<int32_t>(model_.groups().size()); ++g) {
        plan->row_ops.push_back({.kind = RowOpKind::kAppendPages, .row = row, .gen = 1, .group = g,
                                 .begin = static_cast<int32_t>(plan->ints.size()), .count = 4});
        for (int32_t page = 0; page < 4; ++page) plan->ints.push_back(4 * row + page);
      }
      const std::vector<int32_t> prompt = Tokens(kPrompt, vocab, row);
      plan->items.push_back({row, 1, ItemKind::kExtend, kPrompt, kPrompt - 1, kPrompt * row, 0});
      plan->tokens.insert(plan->tokens.end(), prompt.begin(), prompt.end());
    }
    const auto unfinished = [&](const std::vector<int32_t>& tokens) { return tokens.size() < kNumTokens; };
    while (step < 100 && std::any_of(out.tokens.begin(), out.tokens.end(), unfinished)) {
      for (int32_t i = 0; i < kRows; ++i) {
        const auto row = static_cast<int32_t>((i + step) % kRows);  // in another order each time
        const int64_t position = kPrompt + static_cast<int64_t>(out.tokens[row].size());
        if (position == kPrompt + kNumTokens) continue;
        if (late[row] > 0) {
          if (--late[row] == 0) post(row, position);
          if (late[row] > 0 && position % 2 == 0) continue;
          plan->items.push_back({row, 1, ItemKind::kResume, 0, 0, 0, -1});
        } else {
          if (step > 0) plan->items.push_back({row, 1, ItemKind::kDecode, 1, 0, 0, -1});
          late[row] = delay(row, position);
          if (late[row] == 0) post(row, position);
        }
        plan->mask_rows.push_back(row);
      }
      submit();
    }
    return out;
  };
  const Run in_time = run([](int32_t, int64_t) { return 0; }, 1, false);
  EXPECT_EQ(in_time.num_held, 0);
  for (int32_t row = 0; row < kRows; ++row) {
    ASSERT_EQ(in_time.tokens[row].size(), static_cast<size_t>(kNumTokens));
    for (int32_t i = 0; i < kNumTokens; ++i) {
      const int32_t token = in_time.tokens[row][i];
      const std::vector<uint32_t> words = mask(row, kPrompt + i);
      EXPECT_TRUE(words[token / 32] >> (token % 32) & 1) << "row " << row << " token " << i;
      // Log-probabilities are those of the raw logits, whatever the mask allows.
      const std::vector<float>& logits = in_time.logits.at({row, kPrompt + i});
      double sum = 0;
      for (const float v : logits) sum += std::exp(static_cast<double>(v) - logits[token]);
      EXPECT_NEAR(in_time.logprobs.at({row, kPrompt + i}), -std::log(sum), 1e-4);
    }
  }
  const std::function<int(int32_t, int64_t)> delays[] = {
      [](int32_t, int64_t) { return 1; },
      [](int32_t row, int64_t position) { return static_cast<int>((row + position) % 3); },
      [](int32_t row, int64_t) { return row == 1 ? 3 : 0; },
  };
  for (const auto& delay : delays) {
    for (const bool debug : {false, true}) {
      const Run late = run(delay, debug ? 2 : 1, debug);
      EXPECT_GE(late.num_held, kNumTokens);
      EXPECT_EQ(late.tokens, in_time.tokens);
      EXPECT_EQ(late.logits, in_time.logits) << "logits, bit by bit";
      EXPECT_EQ(late.logprobs, in_time.logprobs);
    }
  }
}

// Through the Executor: prompt, then decode steps that take the token from the row, as served.
TEST_P(CpuRunnerCase, GreedyDecodingThroughTheExecutor) {
  Program program = model_.MakeProgram();
  config_.groups = model_.groups();
  config_.num_pages.assign(config_.groups.size(), 8);
  config_.num_kv_heads = model_.shape().hkv;
  config_.head_dim = model_.shape().d;
  config_.num_threads = 2;
  Executor executor(std::make_unique<CpuRunner>(program, model_.MakeStore(), config_),
                    {.groups = model_.groups(), .max_rows = 2});
  auto plan = std::make_shared<StepPlan>();
  plan->step_id = 0;
  RowInit init{.row = 0, .gen = 1, .max_len = 1000, .temperature = 0, .return_logprob = 1};
  init.rope_mode = mode_;
  plan->row_ops.push_back({.kind = RowOpKind::kInit, .row = 0, .gen = 1, .begin = 0, .count = 1});
  plan->inits.push_back(init);
  plan->ints = {5, 3, 1};
  for (int32_t g = 0; g < static_cast<int32_t>(model_.groups().size()); ++g) {
    plan->row_ops.push_back({.kind = RowOpKind::kAppendPages, .row = 0, .gen = 1, .group = g, .begin = 0, .count = 3});
  }
  std::vector<int32_t> all(tokens_.begin(), tokens_.begin() + 10);
  plan->tokens = all;
  plan->items.push_back({0, 1, ItemKind::kExtend, 10, 9, 0, 0});
  executor.Submit(plan);
  for (int64_t step = 1; step < 30; ++step) {
    auto next = std::make_shared<StepPlan>();
    next->step_id = step;
    next->items.push_back({0, 1, ItemKind::kDecode, 1, 0, 0, -1});
    executor.Submit(next);
  }
  executor.WaitIdle();
  std::vector<float> logprobs;
  for (const ExecutorEvent& e : executor.Drain()) {
    if (e.kind != ExecutorEvent::Kind::kResult) continue;
    ASSERT_EQ(e.result.error, "");
    ASSERT_EQ(e.result.tokens.size(), 1u);
    all.push_back(e.result.tokens[0]);
    logprobs.push_back(e.result.logprobs[0]);
  }
  ASSERT_EQ(all.size(), 40u);
  const auto reference = model_.Reference(all, mode_, config_.int8_kv);
  for (size_t t = 10; t < all.size(); ++t) {
    const Vec& logits = reference[t - 1];
    const double top = *std::max_element(logits.begin(), logits.end());
    EXPECT_GE(logits[all[t]], top - (Tolerance(1e-4))) << "position " << t;
    double sum = 0;
    for (double v : logits) sum += std::exp(v - top);
    EXPECT_NEAR(logprobs[t - 10], logits[all[t]] - top - std::log(sum), Tolerance(1e-4)) << "position " << t;
  }
}

// --- Not once per ISA level and dtype ------------------------------------------------------------------------------

class CpuRunnerTest : public testing::Test {
 protected:
  Model model_{kShapes[0], DType::kF32};
  CpuRunnerConfig Config() const {
    CpuRunnerConfig config;
    config.groups = model_.groups();
    config.num_pages.assign(config.groups.size(), 8);
    config.num_kv_heads = model_.shape().hkv;
    config.head_dim = model_.shape().d;
    config.max_step_tokens = 64;
    config.num_threads = 1;
    return config;
  }
};

TEST_F(CpuRunnerTest, StopIdsAreBannedBelowMinLen) {
  const std::vector<int32_t> prompt = Tokens(5, model_.shape().vocab, 9);
  const Program program = model_.MakeProgram();
  const auto store = model_.MakeStore();
  const auto first_token = [&](std::vector<int32_t> stop_ids, int64_t min_len) {
    CpuRunner runner(program, store, Config());
    RowTable rows(model_.groups(), 1);
    StepPlan plan;
    plan.step_id = 1;
    RowInit init{.max_len = 100, .min_len = min_len, .temperature = 0};
    init.gen = 1;
    init.stop_count = static_cast<int32_t>(stop_ids.size());
    plan.inits = {init};
    plan.ints = stop_ids;
    plan.ints.push_back(3);
    plan.row_ops = {{.kind = RowOpKind::kInit, .row = 0, .gen = 1, .begin = 0, .count = 1},
                    {.kind = RowOpKind::kAppendPages, .row = 0, .gen = 1, .begin = init.stop_count, .count = 1}};
    plan.tokens = prompt;
    plan.items = {{0, 1, ItemKind::kExtend, 5, 4, 0, 0}};
    rows.ApplyRowOps(plan);
    StepBatch batch;
    rows.Prepare(plan, &batch);
    std::vector<SampledToken> out(1);
    runner.Forward(batch, rows);
    runner.Head(batch, rows, out);
    return out[0].token;
  };
  const int32_t top = first_token({}, 0);
  EXPECT_EQ(first_token({top}, 5), top) << "five tokens exist: allowed";
  EXPECT_NE(first_token({top}, 6), top) << "below min_len: banned";
}

// It has no forward: what a step begins with is then the head's business. Here the row is no longer to obey a mask.
TEST_F(CpuRunnerTest, AStepOfResumesAloneBeginsAnew) {
  CpuRunnerConfig config = Config();
  config.debug = true;
  CpuRunner runner(model_.MakeProgram(), model_.MakeStore(), config);
  RowTable rows(model_.groups(), 2);
  const auto step = [&](const StepPlan& plan) {
    rows.ApplyRowOps(plan);
    StepBatch batch;
    rows.Prepare(plan, &batch);
    std::vector<SampledToken> out(batch.logit_src.size());
    if (batch.num_tokens > 0) runner.Forward(batch, rows);
    runner.Head(batch, rows, out);
    return out.at(0);
  };
  const std::vector<int32_t> prompt = Tokens(5, model_.shape().vocab, 9);
  const auto extend = [&](int32_t row) {
    StepPlan plan;
    plan.inits = {RowInit{.row = row, .gen = 1, .max_len = 100, .temperature = 0}};
    plan.ints = {row};
    plan.row_ops = {{.kind = RowOpKind::kInit, .row = row, .gen = 1},
                    {.kind = RowOpKind::kAppendPages, .row = row, .gen = 1, .begin = 0, .count = 1}};
    plan.tokens = prompt;
    plan.items = {{row, 1, ItemKind::kExtend, 5, 4, 0, 0}};
    plan.mask_rows = {row};
    return plan;
  };
  const SampledToken held = step(extend(0));
  ASSERT_TRUE(held.held);
  rows.CommitSample(0, held);
  runner.StopAfter("embed");
  step(extend(1));
  runner.StopAfter("");
  StepPlan resume;
  resume.items = {{0, 1, ItemKind::kResume, 0, 0, 0, -1}};
  const Vec logits = model_.Reference(prompt, 0).back();
  EXPECT_EQ(step(resume).token, std::max_element(logits.begin(), logits.end()) - logits.begin());
  EXPECT_TRUE(runner.Dump("embed").empty()) << "no tokens";
  EXPECT_FALSE(runner.Dump("gather").empty());
}

TEST_F(CpuRunnerTest, MalformedProgramsAreRefusedByName) {
  const auto store_of = [&] { return model_.MakeStore(); };
  const auto find = [](Program& p, const std::string& name) -> NodeDesc& {
    for (NodeDesc& node : p.nodes) {
      if (node.name == name) return node;
    }
    throw std::logic_error(name);
  };
  struct Broken {
    const char* expect;  // in the message
    std::function<void(Program&, CpuRunnerConfig&, WeightStore&)> change;
  };
  const Shape& s = model_.shape();
  const std::vector<Broken> all = {
      {"l0.norm1", [&](Program& p, auto&, auto&) { find(p, "l0.norm1").inputs.clear(); }},
      {"l1.attn", [&](Program& p, auto&, auto&) { find(p, "l1.attn").ints.pop_back(); }},
      {"expected 7 ints", [&](Program& p, auto&, auto&) { find(p, "l1.qkv").ints.pop_back(); }},
      {"expected 1 floats", [&](Program& p, auto&, auto&) { find(p, "embed").floats.clear(); }},
      {"value id 999", [&](Program& p, auto&, auto&) { find(p, "l1.o").inputs[0] = 999; }},
      {"weight slot 999", [&](Program& p, auto&, auto&) { find(p, "l1.o").weights[0] = 999; }},
      {"is required", [&](Program& p, auto&, auto&) { find(p, "l1.down").weights[0] = -1; }},
      {"before any node writes", [&](Program& p, auto&, auto&) { std::swap(p.nodes[1], p.nodes[2]); }},
      {"wrote already", [&](Program& p, auto&, auto&) { p.nodes.insert(p.nodes.begin() + 1, p.nodes[0]); }},
      {"in the order", [&](Program& p, auto&, auto&) {
         NodeDesc late = p.nodes[0];
         late.outputs = {static_cast<int32_t>(p.values.size())};
         p.values.push_back(p.values[p.nodes[0].outputs[0]]);
         p.nodes.push_back(late);
       }},
      {"one sample node", [&](Program& p, auto&, auto&) { p.nodes.pop_back(); }},
      {"l0.qkv", [&](Program& p, auto&, auto&) { p.values[find(p, "l0.qkv").outputs[0]].cols += 1; }},
      {"over T", [&](Program& p, auto&, auto&) { p.values[find(p, "l0.o").outputs[0]].rows = RowSym::kL; }},
      {"must be f32", [&](Program& p, auto&, auto&) { p.values[find(p, "l0.o").outputs[0]].dtype = DType::kBF16; }},
      {"layer 2 of KV group 0", [&](Program& p, auto&, auto&) { find(p, "l1.qkv").ints[5] = 2; }},
      {"KV group 1 does not exist", [&](Program& p, auto&, auto&) { find(p, "l1.attn").ints[3] = 1; }},
      {"rotary_dim", [&](Program& p, auto&, auto&) { find(p, "l1.qkv").ints[3] = 7; }},
      {"rope modes", [&](Program& p, auto&, auto&) { find(p, "l1.qkv").ints[6] = 3; }},
      {"all_reduce", [&](Program& p, auto&, auto&) { find(p, "l1.o").ints[0] = 2; }},
      {"head", [&](Program& p, auto&, auto&) { p.vocab_size += 1; }},
      {"segment", [&](Program& p, auto&, auto&) { find(p, "l1.attn").segment = SegmentKind::kHead; }},
      {"KV heads", [&](Program&, CpuRunnerConfig& c, auto&) { c.num_kv_heads = 4; }},
      {"page_size", [&](Program&, CpuRunnerConfig& c, auto&) { c.groups[0].page_size = 8; }},
      {"num_pages", [&](Program&, CpuRunnerConfig& c, auto&) { c.num_pages.clear(); }},
      {"max_step_tokens", [&](Program&, CpuRunnerConfig& c, auto&) { c.max_step_tokens = 0; }},
      {"reaches further back", [&](Program&, CpuRunnerConfig& c, auto&) {
         c.groups[0].kind = KvKind::kWindow;
         c.groups[0].window = 4;
       }},
      {"not filled", [&](Program& p, auto&, auto&) { find(p, "l1.down").weights[0] = p.num_weight_slots++; }},
      {"must be [", [&](Program&, auto&, WeightStore& w) {
         w.Fill(model_.slot("l1.down"), SlotKind::kLinear,
                {{nullptr, DType::kF32, s.hidden, s.inter + 1, s.inter + 1}}, nullptr);
       }},
      {"slot kind", [&](Program&, auto&, WeightStore& w) {
         w.Fill(model_.slot("l1.down"), SlotKind::kTable, {{nullptr, DType::kF32, s.hidden, s.inter, s.inter}},
                nullptr);
       }},
  };
  for (size_t i = 0; i < all.size(); ++i) {
    Program program = model_.MakeProgram();
    CpuRunnerConfig config = Config();
    const auto filled = store_of();
    auto store = std::make_shared<WeightStore>(*filled);
    all[i].change(program, config, *store);
    if (store->size() < program.num_weight_slots) {
      store = std::make_shared<WeightStore>(DType::kF32, program.num_weight_slots);
      for (const std::string name : {"embed", "cos", "sin", "norm", "head"}) {
        model_.FillSlot(store.get(), name, model_.slot(name), nullptr);
      }
      for (const std::string l : {"l0.", "l1."}) {
        for (const std::string name : {"norm1", "qkv", "o", "norm2", "gate_up", "down"}) {
          model_.FillSlot(store.get(), l + name, model_.slot(l + name), nullptr);
        }
      }
    }
    try {
      CpuRunner runner(program, store, config);
      ADD_FAILURE() << "case " << i << " (" << all[i].expect << ") was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(all[i].expect), std::string::npos) << "case " << i << ": " << e.what();
    }
  }
  EXPECT_THROW(CpuRunner(model_.MakeProgram(), nullptr, Config()), InvalidArgument);
}

TEST_F(CpuRunnerTest, QuantisedWeightsAndQ8ValuesGoTogether) {
  Model quantised(kShapes[0], DType::kF32, WeightFormat::kInt8);
  const auto message = [&](const Program& program, std::shared_ptr<WeightStore> store) {
    try {
      CpuRunner runner(program, store, Config());
    } catch (const InvalidArgument& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(message(quantised.MakeProgram(), quantised.MakeStore()), "accepted");
  const auto expect = [&](const std::string& got, const std::string& node, const std::string& words) {
    EXPECT_EQ(got.find("node \"" + node + "\""), 0u) << got;
    EXPECT_NE(got.find(words), std::string::npos) << got;
  };
  const Shape& s = model_.shape();
  const auto refill = [&](Model& model, const std::string& name, SlotKind kind, int64_t rows, int64_t cols,
                          WeightFormat format) {
    auto store = model.MakeStore();
    store->Fill(model.slot(name), kind, {{nullptr, DType::kF32, rows, cols, cols}}, nullptr, 0.1f, format);
    return store;
  };
  for (WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
    const std::string words = std::string("has format ") + WeightFormatName(format) + ", but the node's input is [T";
    expect(message(model_.MakeProgram(), refill(model_, "l1.down", SlotKind::kLinear, s.hidden, s.inter, format)),
           "l1.down", words);
    expect(
        message(model_.MakeProgram(), refill(model_, "l0.gate_up", SlotKind::kGateUp, 2 * s.inter, s.hidden, format)),
        "l0.gate_up", words);
  }
  expect(message(quantised.MakeProgram(),
                 refill(quantised, "l0.o", SlotKind::kLinear, s.hidden, s.hq * s.d, WeightFormat::kAct)),
         "l0.o", "has format act, but the node's input is [T, 64] q8");
  EXPECT_EQ(message(quantised.MakeProgram(),
                    refill(quantised, "l0.o", SlotKind::kLinear, s.hidden, s.hq * s.d, WeightFormat::kInt4)),
            "accepted")
      << "formats may differ from node to node";

  const auto with_dtype = [&](const std::string& name, DType dtype) {
    Program program = quantised.MakeProgram();
    for (const NodeDesc& node : program.nodes) {
      if (node.name == name) program.values[node.outputs[0]].dtype = dtype;
    }
    return message(program, quantised.MakeStore());
  };
  expect(with_dtype("l0.attn", DType::kQ8), "l0.attn", "output must be f32");
  expect(with_dtype("l0.attn_q8", DType::kF32), "l0.attn_q8", "output must be q8");
  expect(with_dtype("l0.o", DType::kQ8), "l0.o", "output must be f32");
  expect(with_dtype("l0.norm1", DType::kBF16), "l0.norm1", "output must be f32");

  // Refilled between steps: in the other format it fits as well, as act it does not.
  Bench bench(&quantised, CpuRunnerConfig{});
  bench.AddRow(0, Tokens(10, s.vocab, 2));
  bench.Step({{0, 4}});
  const auto fill_head = [&](WeightFormat format) {
    bench.store().Fill(quantised.slot("head"), SlotKind::kLinear, {{nullptr, DType::kF32, s.vocab, s.hidden, s.hidden}},
                       nullptr, 0.0f, format);
  };
  fill_head(WeightFormat::kInt4);
  bench.Step({{0, 4}});
  EXPECT_NE(bench.logits(0, 3), std::vector<float>(s.vocab));
  EXPECT_EQ(bench.logits(0, 4), std::vector<float>(s.vocab));
  fill_head(WeightFormat::kAct);
  EXPECT_THROW(bench.Step({{0, 2}}), InvalidArgument);
}

TEST_F(CpuRunnerTest, DumpOfAQ8ValueIsItsBlocks) {
  Model quantised(kShapes[1], DType::kBF16, WeightFormat::kInt8);
  CpuRunnerConfig config;
  config.debug = true;
  Bench bench(&quantised, config);
  bench.AddRow(0, Tokens(20, quantised.shape().vocab, 2));
  bench.Step({{0, 20}});
  const Shape& s = quantised.shape();
  EXPECT_EQ(bench.runner().Dump("l0.norm1").size(), 20u * sizeof(Q8Block) * 2);  // 40 columns
  EXPECT_EQ(bench.runner().Dump("l1.gate_up").size(), 20u * sizeof(Q8Block) * 2);  // 37
  const auto attn = bench.runner().Dump("l0.attn"), attn_q8 = bench.runner().Dump("l0.attn_q8");
  const int64_t cols = int64_t{s.hq} * s.d;
  ASSERT_EQ(attn_q8.size(), 20u * RowBytes(DType::kQ8, cols));
  for (int64_t t = 0; t < 20; ++t) {
    for (int64_t i = 0; i < cols; ++i) {
      uint32_t bits = 0;
      std::memcpy(reinterpret_cast<char*>(&bits) + 2, attn.data() + (t * cols + i) * 2, 2);
      float x;
      std::memcpy(&x, &bits, 4);
      Q8Block block;
      std::memcpy(&block, attn_q8.data() + (t * Q8Blocks(cols) + i / kQ8Block) * sizeof(Q8Block), sizeof(Q8Block));
      ASSERT_NEAR(block.q[i % kQ8Block] * block.scale, x, 0.501f * block.scale) << "token " << t << " column " << i;
    }
  }
}

// So long that its keys are cut among three threads, in prefill and in decode. The cutting knows no levels.
TEST(CpuRunnerCuts, KeysCutAmongThreadsGiveTheSameBits) {
  constexpr int32_t kPrompt = 2048, kLong = kPrompt + 6;
  for (const Shape& shape : kShapes) {
    for (DType act : {DType::kF32, DType::kBF16}) {
      for (bool int8_kv : {false, true}) {
        Model model(shape, act);
        const std::vector<int32_t> tokens = Tokens(kLong, shape.vocab, 4);
        std::vector<uint8_t> want;
        for (int32_t threads : {1, 3}) {
          CpuRunnerConfig config;
          config.isa = BestIsa();
          config.int8_kv = int8_kv;
          config.num_threads = threads;
          Bench bench(&model, config, 8);
          bench.AddRow(0, tokens);
          for (int32_t at = 0; at < kPrompt; at += 256) bench.Step({{0, 256}});
          for (int32_t at = kPrompt; at < kLong; at += 2) bench.Step({{0, 2}});
          if (threads == 1) {
            want = bench.Bits(0, kPrompt - 20);
          } else {
            EXPECT_EQ(bench.Bits(0, kPrompt - 20), want) << shape.name << (int8_kv ? " int8" : "");
          }
        }
      }
    }
  }
}

// Rows that decode together behind prefixes of two chunks, and one, in the same pages: what is computed for several rows at
// once is what each has alone.
TEST(CpuRunnerCuts, SharedPrefixesGiveTheSameBits) {
  constexpr int32_t kPrompt = 590, kLong = kPrompt + 4;
  struct Sharer {
    int32_t row, with, len;
  };
  constexpr Sharer kSharers[] = {{0, -1, 0}, {1, 0, 544}, {2, 0, 288}, {3, 1, 528}, {4, -1, 0}, {5, 2, 560}};
  for (const Shape& shape : kShapes) {
    for (DType act : {DType::kF32, DType::kBF16}) {
      for (bool int8_kv : {false, true}) {
        Model model(shape, act);
        CpuRunnerConfig config;
        config.isa = BestIsa();
        config.int8_kv = int8_kv;
        std::vector<std::vector<int32_t>> tokens;
        std::vector<std::vector<uint8_t>> want;
        for (const Sharer& s : kSharers) {
          tokens.push_back(Tokens(kLong, shape.vocab, 40 + s.row));
          if (s.with >= 0) std::copy_n(tokens[s.with].begin(), s.len, tokens.back().begin());
          Bench alone(&model, config, 9);
          alone.AddRow(0, tokens.back());
          for (int32_t at = 0; at < kLong; at += 198) alone.Step({{0, 198}});
          want.push_back(alone.Bits(0, kPrompt));
        }
        for (int32_t threads : {1, 3}) {
          config.num_threads = threads;
          Bench bench(&model, config, 10);
          for (const Sharer& s : kSharers) {
            bench.AddRow(s.row, tokens[s.row], 0, s.with, s.len);
            for (int32_t at = s.len; at < kPrompt; at += 256) bench.Step({{s.row, std::min(256, kPrompt - at)}});
          }
          bench.Step({{0, 1}, {1, 1}, {2, 1}, {3, 1}, {4, 1}, {5, 1}});
          bench.Step({{5, 1}, {3, 1}, {4, 2}, {0, 1}, {1, 1}, {2, 1}});
          bench.Step({{2, 1}, {5, 2}, {3, 1}, {1, 2}, {0, 2}});
          bench.Step({{3, 1}, {2, 1}, {4, 1}});
          for (const Sharer& s : kSharers) {
            EXPECT_EQ(bench.Bits(s.row, kPrompt), want[s.row])
                << shape.name << (int8_kv ? " int8, " : ", ") << threads << " threads, row " << s.row;
          }
        }
      }
    }
  }
}

TEST_F(CpuRunnerTest, StepsThatDoNotFitAreRefused) {
  CpuRunnerConfig config;
  config.max_step_tokens = 20;
  const auto message = [&](std::vector<int32_t> tokens, int32_t mode) {
    Bench bench(&model_, config);
    const auto n = static_cast<int32_t>(tokens.size());
    bench.AddRow(0, std::move(tokens), mode);
    try {
      bench.Step({{0, n}});
    } catch (const InvalidArgument& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  const auto tokens = [&](int32_t n) { return Tokens(n, model_.shape().vocab, 1); };
  EXPECT_EQ(message(tokens(20), 0), "accepted");
  EXPECT_NE(message(tokens(21), 0).find("max_step_tokens"), std::string::npos);
  EXPECT_NE(message({1, model_.shape().vocab}, 0).find("embedding table"), std::string::npos);
  EXPECT_NE(message({1, -1}, 0).find("embedding table"), std::string::npos);
  EXPECT_NE(message(tokens(3), 1).find("rope mode"), std::string::npos);
  config.max_step_tokens = kMaxPos + 1;
  EXPECT_NE(message(tokens(kMaxPos + 1), 0).find("rope table"), std::string::npos);
}

TEST_F(CpuRunnerTest, DumpStopAndTimes) {
  const std::vector<int32_t> tokens = Tokens(20, model_.shape().vocab, 2);
  CpuRunnerConfig config;
  config.debug = true;
  Bench debug(&model_, config);
  debug.AddRow(0, tokens);
  debug.runner().TimeNodes(true);
  debug.Step({{0, 20}});
  const Shape& s = model_.shape();
  const auto embed = debug.runner().Dump("embed");
  ASSERT_EQ(embed.size(), 20u * s.hidden * 4);
  const auto* x = reinterpret_cast<const float*>(embed.data());
  for (int32_t t = 0; t < 20; ++t) {
    for (int32_t i = 0; i < s.hidden; ++i) {
      ASSERT_EQ(x[t * s.hidden + i], model_.weight("embed").row(tokens[t])[i] * 1.5f);
    }
  }
  EXPECT_EQ(debug.runner().Dump("head").size(), 20u * s.vocab * 4);
  EXPECT_THROW(debug.runner().Dump("sample"), InvalidArgument);
  EXPECT_THROW(debug.runner().Dump("nobody"), InvalidArgument);
  const auto times = debug.runner().NodeTimes();
  ASSERT_EQ(times.size(), model_.MakeProgram().nodes.size());
  for (const NodeTime& t : times) EXPECT_EQ(t.calls, 1) << t.name;
  EXPECT_GT(times[2].total_ns, 0);

  for (const std::string node : {"l0.qkv", "l1.gate_up", "norm"}) {
    Bench plain(&model_, CpuRunnerConfig{});
    plain.AddRow(0, tokens);
    EXPECT_THROW(plain.runner().Dump(node), InvalidArgument) << "its bytes may be another value's";
    plain.runner().StopAfter(node);
    plain.runner().TimeNodes(true);
    plain.Step({{0, 20}});
    EXPECT_EQ(plain.runner().Dump(node), debug.runner().Dump(node)) << node;
    int64_t calls = 0;
    bool after = false;
    for (const NodeTime& t : plain.runner().NodeTimes()) {
      if (after) {
        EXPECT_EQ(t.calls, 0) << t.name;
      }
      after |= t.name == node;
      calls += t.calls;
    }
    EXPECT_GT(calls, 0);
    plain.runner().StopAfter("");
    EXPECT_THROW(plain.runner().StopAfter("nobody"), InvalidArgument);
  }
}

TEST_F(CpuRunnerTest, WeightsMayBeRefilledBetweenSteps) {
  Bench bench(&model_, CpuRunnerConfig{});
  bench.AddRow(0, Tokens(10, model_.shape().vocab, 2));
  bench.Step({{0, 4}});
  const Matrix& head = model_.weight("head");
  const std::vector<float> zeros(head.data.size());
  const int32_t slot = model_.slot("head");
  SlotPart part{zeros.data(), DType::kF32, head.rows, head.cols, head.cols};
  bench.store().Fill(slot, SlotKind::kLinear, {part}, nullptr);
  bench.Step({{0, 4}});
  EXPECT_NE(bench.logits(0, 3), std::vector<float>(head.rows));
  EXPECT_EQ(bench.logits(0, 4), std::vector<float>(head.rows));
  --part.rows;
  bench.store().Fill(slot, SlotKind::kLinear, {part}, nullptr);
  EXPECT_THROW(bench.Step({{0, 2}}), InvalidArgument);
}

TEST_F(CpuRunnerTest, KvPoolIsAsLargeAsItsPages) {
  CpuRunner runner(model_.MakeProgram(), model_.MakeStore(), Config());
  const KvLayout layout{DType::kF32, kPageSize, model_.shape().hkv, model_.shape().d};
  EXPECT_EQ(runner.kv_bytes(), layout.page_bytes() * 8 * kLayers);
  EXPECT_EQ(runner.pool().num_threads(), 1);
  EXPECT_THROW(runner.ReadKv(1, 0, 0, 0), InvalidArgument);
  EXPECT_THROW(runner.ReadKv(0, 2, 0, 0), InvalidArgument);
  EXPECT_THROW(runner.ReadKv(0, 0, 8, 0), InvalidArgument);
  EXPECT_THROW(runner.ReadKv(0, 0, 0, 16), InvalidArgument);
  runner.PoisonKv();
  EXPECT_EQ(runner.ReadKv(0, 0, 3, 5), std::vector<uint8_t>(2 * model_.shape().hkv * model_.shape().d * 4, 0xff));
}

TEST(Arena, LivesDoNotOverlapAndGuardsHold) {
  Model model(kShapes[1], DType::kBF16);
  const Program program = model.MakeProgram();
  Arena packed(program, 100, 64, false), debug(program, 100, 64, true);
  EXPECT_LT(packed.bytes(), debug.bytes() / 2);
  // Two values that both live while some node runs must not share a byte.
  const auto n = static_cast<int32_t>(program.values.size());
  std::vector<int32_t> birth(n, -1), death(n, -1);
  for (int32_t i = 0; i < static_cast<int32_t>(program.nodes.size()); ++i) {
    for (int32_t id : program.nodes[i].outputs) birth[id] = death[id] = i;
    for (int32_t id : program.nodes[i].inputs) death[id] = i;
  }
  const auto end = [&](const Arena& arena, int32_t id) {
    const size_t rows = program.values[id].rows == RowSym::kT ? 100 : 64;
    return static_cast<char*>(arena.value(id)) + arena.row_bytes(id) * rows;
  };
  int32_t shared = 0;
  for (int32_t a = 0; a < n; ++a) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(packed.value(a)) % 64, 0u);
    for (int32_t b = 0; b < a; ++b) {
      const bool together = birth[a] <= death[b] && birth[b] <= death[a];
      const bool overlap = packed.value(a) < end(packed, b) && packed.value(b) < end(packed, a);
      EXPECT_FALSE(together && overlap) << a << " and " << b;
      EXPECT_FALSE(debug.value(a) < end(debug, b) && debug.value(b) < end(debug, a));
      shared += overlap;
    }
  }
  EXPECT_GT(shared, 0);

  EXPECT_EQ(debug.CheckGuards(10, 5), "");
  std::memset(debug.value(3), 0, debug.row_bytes(3) * 10);
  EXPECT_EQ(debug.CheckGuards(10, 5), "");
  static_cast<char*>(debug.value(3))[debug.row_bytes(3) * 10] = 0;
  EXPECT_NE(debug.CheckGuards(10, 5).find("value 3"), std::string::npos);
  debug.Poison(RowSym::kT);
  EXPECT_EQ(debug.CheckGuards(10, 5), "");
  static_cast<char*>(debug.value(3))[-1] = 0;
  EXPECT_NE(debug.CheckGuards(10, 5).find("before value 3"), std::string::npos);
}

TEST(Program, OpNamesRoundTrip) {
  for (int i = 0; i <= static_cast<int>(OpKind::kSample); ++i) {
    const auto op = static_cast<OpKind>(i);
    EXPECT_EQ(ParseOp(OpName(op)), op);
  }
  EXPECT_STREQ(OpName(OpKind::kLinearResidual), "linear_residual");
  EXPECT_THROW(ParseOp("relu"), InvalidArgument);
}

}  // namespace
}  // namespace sapwood
