// Every kernel of every ISA level of this machine against fp64 references, with NaN-poisoned outputs, guard bands and
// odd sizes. Bounds: relative L2 and per element, fp32 1e-5 / (1e-4, 1e-5 rms), bf16 4e-3 (attention 6e-3) / (2^-7,
// 2^-6 rms). The worst relative L2 seen per op is printed at the end.
#include <map>

#include "base/check.h"
#include "kernels_testing.h"

namespace sapwood {
namespace {

std::map<std::string, double>& WorstSeen() {
  static std::map<std::string, double> worst;
  return worst;
}

class PrintWorst : public ::testing::Environment {
 public:
  void TearDown() override {
    for (const auto& [op, error] : WorstSeen()) std::printf("worst relative L2 %-28s %.2e\n", op.c_str(), error);
  }
};
const auto* const kPrintWorst = ::testing::AddGlobalTestEnvironment(new PrintWorst);  // owned by gtest

void ExpectClose(const std::vector<double>& got, const std::vector<double>& want, DType act, const std::string& op,
                 const std::string& what, double bf16_l2 = 4e-3) {
  ASSERT_EQ(got.size(), want.size());
  double error2 = 0, norm2 = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error2 += (got[i] - want[i]) * (got[i] - want[i]);
    norm2 += want[i] * want[i];
  }
  const double rms = std::sqrt(norm2 / static_cast<double>(want.size()));
  const double l2 = norm2 > 0 ? std::sqrt(error2 / norm2) : std::sqrt(error2);
  double& worst = WorstSeen()[op + " " + ActName(act)];
  worst = std::max(worst, l2);
  EXPECT_LE(l2, act == DType::kF32 ? 1e-5 : bf16_l2) << op << " " << what;
  const double rtol = act == DType::kF32 ? 1e-4 : 0x1p-7, atol = (act == DType::kF32 ? 1e-5 : 0x1p-6) * rms;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_LE(std::abs(got[i] - want[i]), rtol * std::abs(want[i]) + atol)
        << op << " " << what << " element " << i << ": got " << got[i] << ", want " << want[i];
  }
}

double SiluRef(double x) { return x / (1.0 + std::exp(-x)); }

TEST(Half, Fp16IsExact) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    const float got = F16ToF32(static_cast<uint16_t>(bits));
    if (exponent == 31 && mantissa != 0) {
      EXPECT_TRUE(std::isnan(got));
      continue;
    }
    const double magnitude = exponent == 31  ? std::numeric_limits<double>::infinity()
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    ASSERT_EQ(got, sign * magnitude) << std::hex << bits;
    ASSERT_EQ(std::signbit(got), sign < 0) << std::hex << bits;
  }
}

TEST(Half, Bf16RoundsToNearestEven) {
  EXPECT_EQ(F32ToBf16(1.0f), 0x3f80);
  EXPECT_EQ(F32ToBf16(BitsToF32(0x3f808000)), 0x3f80);  // tie to even
  EXPECT_EQ(F32ToBf16(BitsToF32(0x3f818000)), 0x3f82);
  EXPECT_EQ(F32ToBf16(BitsToF32(0x3f808001)), 0x3f81);
  EXPECT_EQ(F32ToBf16(BitsToF32(0x7f7fffff)), 0x7f80);  // overflow
  EXPECT_EQ(F32ToBf16(-std::numeric_limits<float>::infinity()), 0xff80);
  EXPECT_TRUE(std::isnan(Bf16ToF32(F32ToBf16(BitsToF32(0x7f800001)))));  // a NaN whose payload is cut off
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = Bf16ToF32(static_cast<Bf16>(bits));
    if (!std::isnan(x)) {
      EXPECT_EQ(F32ToBf16(x), bits);
    }
  }
}

// Where kernels.h says element (n, k) of a packed weight is.
int64_t PackedIndex(DType dtype, int64_t k_size, int64_t n, int64_t k) {
  const int64_t panel = n / 64, j = n % 64;
  return dtype == DType::kF32 ? (panel * k_size + k) * 64 + j
                              : ((panel * ((k_size + 1) / 2) + k / 2) * 64 + j) * 2 + k % 2;
}

TEST(Pack, EveryElementEveryDType) {
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{100, 37}, {64, 64}, {1, 1}, {129, 130}}) {
    for (DType src : {DType::kF32, DType::kBF16, DType::kF16}) {
      Rng rng(static_cast<uint64_t>(n * k));
      Buffer rows(src, n * k);
      for (size_t i = 0; i < rows.size_bytes(); ++i)
        static_cast<uint8_t*>(rows.data())[i] = static_cast<uint8_t>(rng.Bits());
      const int64_t num_panels = (n + 63) / 64, null_row = n / 2;
      std::vector<const void*> pointers(static_cast<size_t>(num_panels * 64), nullptr);
      for (int64_t i = 0; i < n; ++i) pointers[static_cast<size_t>(i)] = i == null_row ? nullptr : rows.at(i * k);
      for (DType dst : kActs) {
        SCOPED_TRACE(testing::Message() << "n " << n << " k " << k << " src " << int(src) << " dst " << int(dst));
        Buffer packed(dst, static_cast<int64_t>(PackedBytes(dst, n, k) / DTypeBytes(dst)));
        // Panel by panel, as threads do.
        for (int64_t p = num_panels - 1; p >= 0; --p)
          PackPanels(dst, packed.data(), n, k, pointers.data(), src, p, p + 1);
        EXPECT_TRUE(packed.GuardsIntact());
        const int64_t padded_k = dst == DType::kBF16 ? (k + 1) / 2 * 2 : k;
        ASSERT_EQ(packed.count(), num_panels * 64 * padded_k);
        for (int64_t i = 0; i < num_panels * 64; ++i) {
          for (int64_t j = 0; j < padded_k; ++j) {
            const int64_t at = PackedIndex(dst, k, i, j);
            if (i >= n || j >= k || i == null_row) {
              ASSERT_TRUE(packed.BytesAre(at, 0)) << i << " " << j;
            } else if (src == dst) {
              ASSERT_TRUE(SameBits(packed, at, rows, i * k + j, 1)) << i << " " << j;  // NaN payloads included
            } else {
              const float x = static_cast<float>(rows.Get(i * k + j));
              if (std::isnan(x)) {
                ASSERT_TRUE(std::isnan(packed.Get(at)));
              } else {
                ASSERT_EQ(packed.Get(at), dst == DType::kF32 ? x : Bf16ToF32(F32ToBf16(x))) << i << " " << j;
              }
            }
          }
        }
      }
    }
  }
}

TEST(Pack, RefusesWhatItCannotDo) {
  const void* rows[64] = {};
  float out[64];
  EXPECT_THROW(PackedBytes(DType::kF16, 64, 1), InvalidArgument);
  EXPECT_THROW(PackedBytes(DType::kF32, -1, 1), InvalidArgument);
  EXPECT_THROW(PackPanels(DType::kF32, out, 64, 1, rows, DType::kI32, 0, 1), InvalidArgument);
  EXPECT_THROW(PackPanels(DType::kF32, out, 64, 1, rows, DType::kF32, 0, 2), InvalidArgument);
}

TEST(Dispatch, NamesAndLevels) {
  EXPECT_TRUE(IsaSupported(Isa::kScalar));
  EXPECT_EQ(ParseIsa("auto"), BestIsa());
  EXPECT_EQ(ParseIsa(""), BestIsa());
  EXPECT_EQ(ParseIsa(nullptr), BestIsa());
  for (Isa isa : SupportedLevels()) {
    EXPECT_EQ(ParseIsa(IsaName(isa)), isa);
    EXPECT_EQ(Kernels(isa).isa, isa);
    EXPECT_LE(isa, BestIsa());
  }
  try {
    ParseIsa("avx1024");
    FAIL();
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find("scalar"), std::string::npos) << e.what();
  }
}

struct Shape {
  int64_t m, n, k;
};

// K odd, one, and beyond a slice of K; N below, at and beyond a panel; M beyond a block of rows.
constexpr Shape kShapes[] = {{1, 64, 64},   {1, 100, 37},  {3, 1, 5},     {2, 172, 1},     {5, 65, 129},
                             {7, 130, 172}, {13, 64, 515}, {6, 96, 1030}, {101, 70, 1027}, {1, 200, 4097}};

TEST(Gemm, LinearEpilogues) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (const Shape& s : kShapes) {
        Rng rng(static_cast<uint64_t>(s.m * 131 + s.n * 17 + s.k));
        const Weight w(act, s.n, s.k, rng);
        const int64_t lda = s.k + 3, ldc = s.n + 5;
        Buffer a(act, s.m * lda);  // NaN between the rows
        for (int64_t i = 0; i < s.m; ++i) {
          for (int64_t j = 0; j < s.k; ++j) a.Set(i * lda + j, rng.Normal());
        }
        Buffer bias(DType::kF32, s.n), residual(DType::kF32, s.m * ldc);
        bias.FillNormal(rng);
        residual.FillNormal(rng);
        std::vector<double> product;
        for (int64_t i = 0; i < s.m; ++i) {
          for (int64_t n = 0; n < s.n; ++n) {
            double sum = 0;
            for (int64_t k = 0; k < s.k; ++k) sum += a.Get(i * lda + k) * w.rows.Get(n * s.k + k);
            product.push_back(sum);
          }
        }
        for (Epilogue epilogue : {Epilogue::kStoreAct, Epilogue::kStoreF32, Epilogue::kResidual}) {
          for (bool with_bias : {false, true}) {
            for (bool alias : {false, true}) {
              if (alias && epilogue != Epilogue::kResidual) continue;
              Buffer out = alias ? residual : Buffer(epilogue == Epilogue::kStoreAct ? act : DType::kF32, s.m * ldc);
              GemmArgs args{};
              args.a = a.data();
              args.lda = lda;
              args.w = w.packed.data();
              args.bias = with_bias ? bias.f32() : nullptr;
              args.residual = alias ? out.f32() : residual.f32();
              args.out = out.data();
              args.ldc = ldc;
              args.n = s.n;
              args.k = s.k;
              args.epilogue = epilogue;
              Kernels(isa).gemm(act, args, 0, s.m, 0, (s.n + 63) / 64);
              std::vector<double> got, want;
              for (int64_t i = 0; i < s.m; ++i) {
                for (int64_t n = 0; n < s.n; ++n) {
                  got.push_back(out.Get(i * ldc + n));
                  want.push_back(product[static_cast<size_t>(i * s.n + n)] + (with_bias ? bias.Get(n) : 0.0) +
                                 (epilogue == Epilogue::kResidual ? residual.Get(i * ldc + n) : 0.0));
                }
                for (int64_t n = s.n; n < ldc; ++n) {  // beyond N nothing is written
                  ASSERT_TRUE(alias ? SameBits(out, i * ldc + n, residual, i * ldc + n, 1)
                                    : out.BytesAre(i * ldc + n, 0xff));
                }
              }
              ASSERT_TRUE(out.GuardsIntact());
              const std::string what = std::string(IsaName(isa)) + " m " + std::to_string(s.m) + " n " +
                                       std::to_string(s.n) + " k " + std::to_string(s.k);
              // What is stored as f32 is held to f32 bounds: products of bf16 are exact in it.
              const bool rounded = act == DType::kBF16 && epilogue == Epilogue::kStoreAct;
              ExpectClose(got, want, rounded ? DType::kBF16 : DType::kF32, "gemm", what);
            }
          }
        }
      }
    }
  }
}

TEST(Gemm, SiluMul) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (const Shape& s : {Shape{1, 172, 64}, {9, 172, 65}, {4, 32, 31}, {7, 5, 300}}) {
        for (bool with_bias : {false, true}) {
          Rng rng(static_cast<uint64_t>(s.n + s.k));
          const GateUpWeight w(act, s.n, s.k, rng);
          Buffer a(act, s.m * s.k), bias(DType::kF32, w.num_panels() * 64), out(act, s.m * s.n);
          a.FillNormal(rng, 2.0);
          bias.FillNormal(rng);
          GemmArgs args{};
          args.a = a.data();
          args.lda = s.k;
          args.w = w.packed.data();
          args.bias = with_bias ? bias.f32() : nullptr;
          args.out = out.data();
          args.ldc = s.n;
          args.n = s.n;
          args.k = s.k;
          args.epilogue = Epilogue::kSiluMul;
          Kernels(isa).gemm(act, args, 0, s.m, 0, w.num_panels());
          std::vector<double> got, want;
          for (int64_t i = 0; i < s.m; ++i) {
            for (int64_t n = 0; n < s.n; ++n) {
              double gate = 0, up = 0;
              for (int64_t k = 0; k < s.k; ++k) {
                gate += a.Get(i * s.k + k) * w.gate.Get(n * s.k + k);
                up += a.Get(i * s.k + k) * w.up.Get(n * s.k + k);
              }
              if (with_bias) {
                gate += bias.Get(n / 32 * 64 + n % 32);
                up += bias.Get(n / 32 * 64 + 32 + n % 32);
              }
              got.push_back(out.Get(i * s.n + n));
              want.push_back(SiluRef(gate) * up);
            }
          }
          EXPECT_TRUE(out.GuardsIntact());
          ExpectClose(got, want, act, "gemm silu_mul", IsaName(isa));
        }
      }
    }
  }
}

// A 1 x 1 product hands any value to an epilogue: exp and tanh over their whole range.
TEST(Gemm, SiluOverItsRange) {
  std::vector<float> xs = {0.0f,   -0.0f,  1e-30f,  -1e-30f, 87.0f,  -87.0f, 88.4f,
                           -88.4f, 100.0f, -100.0f, 1e30f,   -1e30f, 3e38f};
  for (float x = -90.0f; x < 90.0f; x += 0.0371f) xs.push_back(x);
  for (Isa isa : SupportedLevels()) {
    const float one = 1.0f;
    for (float x : xs) {
      std::vector<float> w(64, 0.0f);
      w[0] = x;
      w[32] = 1.0f;
      float out = std::nanf("");
      GemmArgs args{};
      args.a = &one;
      args.lda = 1;
      args.w = w.data();
      args.out = &out;
      args.ldc = args.n = args.k = 1;
      args.epilogue = Epilogue::kSiluMul;
      Kernels(isa).gemm(DType::kF32, args, 0, 1, 0, 1);
      const double want = SiluRef(x);
      ASSERT_LE(std::abs(out - want), 4e-7 * std::abs(want) + 1e-35) << IsaName(isa) << " silu(" << x << ") = " << out;
    }
  }
}

TEST(Gemm, Logits) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (float softcap : {0.0f, 3.0f}) {
        const Shape s{7, 150, 77};
        Rng rng(3);
        const Weight w(act, s.n, s.k, rng);
        Buffer a(act, s.m * s.k), out(DType::kF32, s.m * s.n), block_max(DType::kF32, s.m * 3);
        a.FillNormal(rng, 3.0);
        GemmArgs args{};
        args.a = a.data();
        args.lda = s.k;
        args.w = w.packed.data();
        args.out = out.data();
        args.ldc = s.n;
        args.n = s.n;
        args.k = s.k;
        args.scale = 0.7f;
        args.softcap = softcap;
        args.block_max = block_max.f32();
        args.epilogue = Epilogue::kLogits;
        Kernels(isa).gemm(act, args, 0, s.m, 0, 3);
        std::vector<double> got, want;
        for (int64_t i = 0; i < s.m; ++i) {
          double most[3] = {-1e30, -1e30, -1e30};
          for (int64_t n = 0; n < s.n; ++n) {
            double x = 0;
            for (int64_t k = 0; k < s.k; ++k) x += a.Get(i * s.k + k) * w.rows.Get(n * s.k + k);
            x *= args.scale;
            got.push_back(out.Get(i * s.n + n));
            want.push_back(softcap > 0 ? softcap * std::tanh(x / softcap) : x);
            most[n / 64] = std::max(most[n / 64], got.back());
          }
          for (int b = 0; b < 3; ++b) ASSERT_EQ(block_max.Get(i * 3 + b), most[b]) << "row " << i << " block " << b;
        }
        EXPECT_TRUE(out.GuardsIntact());
        EXPECT_TRUE(block_max.GuardsIntact());
        ExpectClose(got, want, DType::kF32, "gemm logits", IsaName(isa));

        a.Set(2 * s.k, std::nan(""));
        Kernels(isa).gemm(act, args, 0, s.m, 0, 3);
        for (int b = 0; b < 3; ++b) EXPECT_TRUE(std::isnan(block_max.Get(2 * 3 + b))) << "a NaN logit must show";
        EXPECT_FALSE(std::isnan(block_max.Get(0)));
      }
    }
  }
}

TEST(Gemm, TanhOverItsRange) {
  for (Isa isa : SupportedLevels()) {
    const float one = 1.0f;
    for (float x = -12.0f; x < 12.0f; x += 0.00713f) {
      std::vector<float> w(64, 0.0f);
      w[0] = x;
      float out = std::nanf("");
      GemmArgs args{};
      args.a = &one;
      args.lda = 1;
      args.w = w.data();
      args.out = &out;
      args.ldc = args.n = args.k = 1;
      args.softcap = 1.0f;
      args.epilogue = Epilogue::kLogits;
      Kernels(isa).gemm(DType::kF32, args, 0, 1, 0, 1);
      ASSERT_LE(std::abs(out - std::tanh(double{x})), 4e-7 * std::abs(std::tanh(double{x})))
          << IsaName(isa) << " " << x;
    }
  }
}

TEST(RmsNorm, OddSizes) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (int64_t h : {1, 7, 15, 16, 17, 31, 64, 100, 172, 1024, 4097}) {
        for (bool plus_one : {false, true}) {
          Rng rng(static_cast<uint64_t>(h));
          Buffer x(DType::kF32, h), w(DType::kF32, h), y(act, h);
          const float eps = plus_one ? 1e-5f : 0.5f;  // one that vanishes, one that counts
          x.FillNormal(rng, plus_one ? 30.0 : 1.0);
          w.FillNormal(rng);
          Kernels(isa).rms_norm(act, x.f32(), w.f32(), y.data(), h, eps, plus_one);
          double sum = 0;
          for (int64_t i = 0; i < h; ++i) sum += x.Get(i) * x.Get(i);
          const double r = 1.0 / std::sqrt(sum / static_cast<double>(h) + eps);
          std::vector<double> got, want;
          for (int64_t i = 0; i < h; ++i) {
            got.push_back(y.Get(i));
            want.push_back(x.Get(i) * r * (w.Get(i) + plus_one));
          }
          EXPECT_TRUE(y.GuardsIntact());
          ExpectClose(got, want, act, "rms_norm", std::string(IsaName(isa)) + " h " + std::to_string(h));
        }
      }
    }
  }
}

TEST(Embed, Scales) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (int64_t h : {1, 15, 16, 33, 172}) {
        Rng rng(static_cast<uint64_t>(h));
        Buffer row(act, h), x(DType::kF32, h);
        row.FillNormal(rng);
        Kernels(isa).embed(act, row.data(), x.f32(), h, 1.5f);
        for (int64_t i = 0; i < h; ++i) ASSERT_EQ(x.Get(i), static_cast<float>(row.Get(i) * 1.5)) << i;
        EXPECT_TRUE(x.GuardsIntact());
      }
    }
  }
}

std::vector<double> NormedHead(const Buffer& qkv, int64_t begin, int64_t head_dim, const Buffer* norm, double eps) {
  double sum = 0;
  std::vector<double> x;
  for (int64_t d = 0; d < head_dim; ++d) {
    x.push_back(qkv.Get(begin + d));
    sum += x.back() * x.back();
  }
  for (int64_t d = 0; norm && d < head_dim; ++d) {
    x[static_cast<size_t>(d)] *= norm->Get(d) / std::sqrt(sum / static_cast<double>(head_dim) + eps);
  }
  return x;
}

void Rotate(std::vector<double>& x, const Buffer& cos, const Buffer& sin, int64_t rotary_dim) {
  const size_t half = static_cast<size_t>(rotary_dim / 2);
  for (size_t i = 0; i < half; ++i) {
    const double a = x[i], b = x[i + half], c = cos.Get(static_cast<int64_t>(i)), s = sin.Get(static_cast<int64_t>(i));
    x[i] = a * c - b * s;
    x[i + half] = b * c + a * s;
  }
}

TEST(RopeKv, EveryHeadDim) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (int32_t head_dim : {5, 8, 10, 20, 24, 40, 80, 96, 128, 256}) {
        for (int32_t rotary_dim : {head_dim / 2 * 2, head_dim / 4 * 2, 0}) {
          for (bool with_norm : {false, true}) {
            const int32_t page_size = head_dim % 3 == 0 ? 32 : head_dim % 3 == 1 ? 16 : 64;
            const int32_t num_q_heads = 6, num_kv_heads = 2;
            const std::string what = std::string(IsaName(isa)) + " head_dim " + std::to_string(head_dim) +
                                     " rotary_dim " + std::to_string(rotary_dim) + (with_norm ? " norm" : "");
            Rng rng(static_cast<uint64_t>(head_dim * 3 + rotary_dim));
            Buffer qkv(DType::kF32, (num_q_heads + 2 * num_kv_heads) * head_dim), q_norm(DType::kF32, head_dim),
                k_norm(DType::kF32, head_dim), cos(DType::kF32, rotary_dim / 2), sin(DType::kF32, rotary_dim / 2);
            qkv.FillNormal(rng, 2.0);
            q_norm.FillNormal(rng);
            k_norm.FillNormal(rng);
            for (int64_t i = 0; i < rotary_dim / 2; ++i) {
              const double angle = rng.Uniform() * 6.28;
              cos.Set(i, std::cos(angle));
              sin.Set(i, std::sin(angle));
            }
            KvSequence kv(act, page_size, num_kv_heads, head_dim, page_size);
            const int32_t offset = static_cast<int32_t>(rng.Below(page_size));
            Buffer q(act, num_q_heads * head_dim);
            RopeKvArgs args{};
            args.qkv = qkv.f32();
            args.num_q_heads = num_q_heads;
            args.q_norm = with_norm ? q_norm.f32() : nullptr;
            args.k_norm = with_norm ? k_norm.f32() : nullptr;
            args.norm_eps = 0.5f;
            args.cos = cos.f32();
            args.sin = sin.f32();
            args.rotary_dim = rotary_dim;
            args.q_out = q.data();
            args.layout = kv.layout();
            args.page = kv.Page(0);
            args.offset = offset;
            Kernels(isa).rope_kv(act, args);

            std::vector<double> got, want;
            for (int64_t h = 0; h < num_q_heads; ++h) {
              std::vector<double> x =
                  NormedHead(qkv, h * head_dim, head_dim, with_norm ? &q_norm : nullptr, args.norm_eps);
              Rotate(x, cos, sin, rotary_dim);
              want.insert(want.end(), x.begin(), x.end());
              for (int64_t d = 0; d < head_dim; ++d) got.push_back(q.Get(h * head_dim + d));
            }
            ExpectClose(got, want, act, "rope_kv q", what);
            EXPECT_TRUE(q.GuardsIntact());

            Buffer k(act, num_kv_heads * head_dim), v(act, num_kv_heads * head_dim);
            ReadKvToken(kv.layout(), args.page, offset, k.data(), v.data());
            std::vector<double> got_k, want_k;
            std::vector<bool> written(static_cast<size_t>(kv.pool().count()), false);
            for (int64_t h = 0; h < num_kv_heads; ++h) {
              std::vector<double> x =
                  NormedHead(qkv, (num_q_heads + h) * head_dim, head_dim, with_norm ? &k_norm : nullptr, args.norm_eps);
              Rotate(x, cos, sin, rotary_dim);
              want_k.insert(want_k.end(), x.begin(), x.end());
              for (int64_t d = 0; d < kv.layout().padded_dim(); ++d) {
                const int64_t k_at = kv.KIndex(offset, h, d), v_at = kv.VIndex(offset, h, d);
                written[static_cast<size_t>(k_at)] = written[static_cast<size_t>(v_at)] = true;
                if (d >= head_dim) {
                  ASSERT_TRUE(kv.pool().BytesAre(k_at, 0) && kv.pool().BytesAre(v_at, 0)) << what << " padding " << d;
                  continue;
                }
                got_k.push_back(k.Get(h * head_dim + d));
                ASSERT_TRUE(SameBits(k, h * head_dim + d, kv.pool(), k_at, 1)) << what;
                ASSERT_TRUE(SameBits(v, h * head_dim + d, kv.pool(), v_at, 1)) << what;
                Buffer rounded(act, 1);  // V is qkv rounded once, nothing else
                rounded.Set(0, qkv.Get((num_q_heads + num_kv_heads + h) * head_dim + d));
                ASSERT_TRUE(SameBits(v, h * head_dim + d, rounded, 0, 1)) << what << " v " << d;
              }
            }
            ExpectClose(got_k, want_k, act, "rope_kv k", what);
            for (int64_t i = 0; i < kv.pool().count(); ++i) {
              if (!written[static_cast<size_t>(i)]) {
                ASSERT_TRUE(kv.pool().BytesAre(i, 0xff)) << what << " neighbour written at " << i;
              }
            }
            ASSERT_TRUE(kv.pool().GuardsIntact());
          }
        }
      }
    }
  }
}

TEST(ReadKvToken, RefusesAnOffsetOutsideThePage) {
  float page[2 * 16 * 16], k[8], v[8];
  const KvLayout layout{DType::kF32, 16, 1, 8};
  EXPECT_THROW(ReadKvToken(layout, page, 16, k, v), InvalidArgument);
  EXPECT_THROW(ReadKvToken(layout, page, -1, k, v), InvalidArgument);
}

// int8 pages, by the words of KvLayout: V to the last bit, K (which went through a rotation) within half a step.
TEST(RopeKv, Int8) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (int32_t head_dim : {5, 10, 16, 40, 128}) {
        for (int32_t page_size : {16, 32, 64}) {
          const std::string what = std::string(IsaName(isa)) + " head_dim " + std::to_string(head_dim) +
                                   " page_size " + std::to_string(page_size);
          const int32_t num_kv_heads = 3, rotary_dim = head_dim / 2 * 2, offset = 11;
          Rng rng(static_cast<uint64_t>(head_dim + page_size));
          Buffer qkv(DType::kF32, (1 + 2 * num_kv_heads) * head_dim), cos(DType::kF32, rotary_dim / 2),
              sin(DType::kF32, rotary_dim / 2), q(act, head_dim);
          qkv.FillNormal(rng, 3.0);
          for (int64_t i = 0; i < rotary_dim / 2; ++i) {
            cos.Set(i, std::cos(0.1 * static_cast<double>(i + 1)));
            sin.Set(i, std::sin(0.1 * static_cast<double>(i + 1)));
          }
          const auto v_at = [&](int64_t h, int64_t d) { return (1 + num_kv_heads + h) * head_dim + d; };
          for (int64_t d = 0; d < head_dim; ++d) qkv.Set(v_at(1, d), d == 0 ? 1e-32 : 0.0);  // below kMinKvAmax
          qkv.Set(v_at(2, head_dim - 1), head_dim % 2 ? std::nan("") : -std::numeric_limits<double>::infinity());
          KvSequence kv(DType::kI8, page_size, num_kv_heads, head_dim, page_size);
          RopeKvArgs args{};
          args.qkv = qkv.f32();
          args.num_q_heads = 1;
          args.cos = cos.f32();
          args.sin = sin.f32();
          args.rotary_dim = rotary_dim;
          args.q_out = q.data();
          args.layout = kv.layout();
          args.page = kv.Page(0);
          args.offset = offset;
          Kernels(isa).rope_kv(act, args);

          Buffer k(DType::kF32, num_kv_heads * head_dim), v(DType::kF32, num_kv_heads * head_dim);
          ReadKvToken(kv.layout(), args.page, offset, k.data(), v.data());
          std::vector<bool> written(static_cast<size_t>(kv.pool().count()), false);
          for (int64_t h = 0; h < num_kv_heads; ++h) {
            std::vector<double> x = NormedHead(qkv, (1 + h) * head_dim, head_dim, nullptr, 0.0f);
            Rotate(x, cos, sin, rotary_dim);
            double k_max = 0;
            float v_max = 0;
            for (int64_t d = 0; d < head_dim; ++d) {
              k_max = std::max(k_max, std::abs(x[static_cast<size_t>(d)]));
              v_max = std::max(v_max, std::abs(qkv.f32()[v_at(h, d)]));
            }
            const float k_scale = kv.Scale(offset, h, false), v_scale = kv.Scale(offset, h, true);
            ASSERT_NEAR(k_scale, k_max / 127, 1e-6 * k_max) << what;
            if (h == 0) {
              ASSERT_EQ(v_scale, v_max / 127.0f) << what;
            } else if (h == 1) {
              ASSERT_EQ(v_scale, 0.0f) << what;
            } else {
              ASSERT_TRUE(std::isnan(v_scale)) << what;
            }
            for (int64_t d = 0; d < kv.layout().padded_dim(); ++d) {
              const int64_t k_index = kv.KIndex(offset, h, d), v_index = kv.VIndex(offset, h, d);
              written[static_cast<size_t>(k_index)] = written[static_cast<size_t>(v_index)] = true;
              if (d >= head_dim) {
                ASSERT_TRUE(kv.pool().Get(k_index) == 0 && kv.pool().Get(v_index) == 0) << what << " padding " << d;
                continue;
              }
              const double step = static_cast<double>(k_scale);
              ASSERT_NEAR(kv.K(offset, h, d), x[static_cast<size_t>(d)], 0.5001 * step) << what << " k " << d;
              ASSERT_EQ(k.Get(h * head_dim + d), static_cast<float>(kv.K(offset, h, d))) << what;
              if (h == 2) {
                ASSERT_TRUE(std::isnan(v.Get(h * head_dim + d))) << what;
                ASSERT_EQ(kv.pool().Get(v_index), 0) << what;
                continue;
              }
              const float want = h == 1 ? 0.0f : std::nearbyint(qkv.f32()[v_at(h, d)] * (127.0f / v_max));
              ASSERT_EQ(kv.pool().Get(v_index), want) << what << " v " << d;
              ASSERT_EQ(v.Get(h * head_dim + d), want * v_scale) << what;
            }
            for (int64_t byte = 0; byte < 4; ++byte) {
              written[static_cast<size_t>(kv.ScaleIndex(offset, h, false) + byte)] = true;
              written[static_cast<size_t>(kv.ScaleIndex(offset, h, true) + byte)] = true;
            }
          }
          for (int64_t i = 0; i < kv.pool().count(); ++i) {
            if (!written[static_cast<size_t>(i)]) {
              ASSERT_TRUE(kv.pool().BytesAre(i, 0xff)) << what << " neighbour written at " << i;
            }
          }
          ASSERT_TRUE(kv.pool().GuardsIntact() && q.GuardsIntact());
        }
      }
    }
  }
}

TEST(KvLayout, Int8TakesAboutHalfOfBf16) {
  const KvLayout int8{DType::kI8, 16, 8, 128}, bf16{DType::kBF16, 16, 8, 128};
  EXPECT_EQ(bf16.page_bytes(), size_t{2} * 16 * 8 * 128 * 2);
  EXPECT_EQ(int8.page_bytes(), size_t{2} * 16 * 8 * (128 + 4));
}

void CheckAttention(Isa isa, const AttentionCase& c, int32_t page_size) {
  KvSequence kv(c.kv_dtype(), page_size, c.num_kv_heads, c.head_dim, c.len);
  kv.FillTokens(5, 0, c.len);
  if (c.window > 0) {  // pages that slid out of every query's window are gone: no such address
    const int64_t oldest = std::max<int64_t>(0, c.len - c.q_len + 1 - c.window);
    for (int64_t page = 0; page < oldest / page_size; ++page) kv.pages()[static_cast<size_t>(page)] = 1 << 30;
  }
  const Buffer q = Queries(c, 11);
  Buffer out(c.act, c.q_len * c.width());
  RunAttention(isa, c, kv, q, out, 0, c.q_len);
  ASSERT_TRUE(out.GuardsIntact());

  std::vector<double> got, want;
  const double scale = static_cast<double>(1.0f / std::sqrt(static_cast<float>(c.head_dim)));
  for (int64_t i = 0; i < c.q_len; ++i) {
    const int64_t position = c.len - c.q_len + i;
    const int64_t lo = c.window > 0 ? std::max<int64_t>(0, position + 1 - c.window) : 0;
    for (int64_t h = 0; h < c.num_q_heads(); ++h) {
      const int64_t kv_head = h / c.group, at = i * c.width() + h * c.head_dim;
      std::vector<double> p;
      double sum = 0, most = -1e300;
      for (int64_t t = lo; t <= position; ++t) {
        double s = 0;
        for (int64_t d = 0; d < c.head_dim; ++d) s += q.Get(at + d) * kv.K(t, kv_head, d);
        s *= scale;
        if (c.softcap > 0) s = c.softcap * std::tanh(s / c.softcap);
        p.push_back(s);
        most = std::max(most, s);
      }
      for (double& x : p) sum += x = std::exp(x - most);
      for (int64_t d = 0; d < c.head_dim; ++d) {
        double o = 0;
        for (int64_t t = lo; t <= position; ++t)
          o += p[static_cast<size_t>(t - lo)] * kv.V(t, kv_head, d);
        want.push_back(o / sum);
        got.push_back(out.Get(at + d));
      }
    }
  }
  ExpectClose(got, want, c.act, c.int8 ? "attention int8" : "attention",
              std::string(IsaName(isa)) + " group " + std::to_string(c.group) + " head_dim " +
                  std::to_string(c.head_dim) + " len " + std::to_string(c.len) + " q_len " + std::to_string(c.q_len) +
                  " window " + std::to_string(c.window) + " page_size " + std::to_string(page_size),
              6e-3);
}

TEST(Attention, Lengths) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (int64_t len : {1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 700}) {
        for (int32_t window : {0, 1, 33, 300}) {
          for (int64_t q_len : {int64_t{1}, std::min<int64_t>(len, 9)}) {
            for (bool int8 : {false, true}) {
              CheckAttention(isa, {act, 2, 1, 40, len, q_len, window, 0.0f, int8},
                             len % 3 == 0 ? 16 : len % 3 == 1 ? 32 : 64);
            }
          }
        }
      }
    }
  }
}

TEST(Attention, GroupsAndHeadDims) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (bool int8 : {false, true}) {
        for (int32_t group : {1, 2, 4, 7, 8, 29}) CheckAttention(isa, {act, group, 2, 24, 270, 5, 0, 0.0f, int8}, 16);
        for (int32_t head_dim : {5, 8, 10, 20, 24, 80, 96, 128, 256}) {
          CheckAttention(isa, {act, 3, 2, head_dim, 77, 11, 0, 0.0f, int8}, 32);
          CheckAttention(isa, {act, 1, 1, head_dim, 77, 1, 0, 5.0f, int8}, 64);
        }
      }
    }
  }
}

TEST(Attention, WholePrefill) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (bool int8 : {false, true}) {
        CheckAttention(isa, {act, 2, 1, 16, 300, 300, 0, 0.0f, int8}, 16);
        CheckAttention(isa, {act, 1, 2, 16, 300, 300, 70, 10.0f, int8}, 32);
      }
    }
  }
}

// bf16: p is rounded before it multiplies V and before it is summed. Emulated for one tile, nearly every output is then
// the same bf16 number; a sum of unrounded p shifts more of them than the bound allows.
TEST(Attention, ProbabilitiesAreRoundedOnceForBothSums) {
  for (Isa isa : SupportedLevels()) {
    const AttentionCase c{DType::kBF16, 8, 1, 40, 64, 63, 0, 0.0f};
    KvSequence kv(c.act, 16, 1, c.head_dim, c.len);
    kv.FillTokens(5, 0, c.len);
    const Buffer q = Queries(c, 11);
    Buffer out(c.act, c.q_len * c.width());
    RunAttention(isa, c, kv, q, out, 0, c.q_len);
    int64_t equal = 0;
    for (int64_t i = 0; i < c.q_len; ++i) {
      for (int64_t h = 0; h < c.group; ++h) {
        const int64_t at = i * c.width() + h * c.head_dim, position = c.len - c.q_len + i;
        std::vector<double> p;
        double sum = 0, most = -1e300;
        for (int64_t t = 0; t <= position; ++t) {
          double s = 0;
          for (int64_t d = 0; d < c.head_dim; ++d) s += q.Get(at + d) * kv.pool().Get(kv.KIndex(t, 0, d));
          p.push_back(s / std::sqrt(static_cast<double>(c.head_dim)));
          most = std::max(most, p.back());
        }
        for (double& x : p) sum += x = Bf16ToF32(F32ToBf16(static_cast<float>(std::exp(x - most))));
        for (int64_t d = 0; d < c.head_dim; ++d) {
          double o = 0;
          for (int64_t t = 0; t <= position; ++t) o += p[static_cast<size_t>(t)] * kv.pool().Get(kv.VIndex(t, 0, d));
          equal += out.Get(at + d) == Bf16ToF32(F32ToBf16(static_cast<float>(o / sum)));
        }
      }
    }
    EXPECT_GE(static_cast<double>(equal), 0.98 * static_cast<double>(out.count())) << IsaName(isa) << " " << equal;
  }
}

// Scores far apart: the running maximum rescales, and what underflows is exactly zero.
TEST(Attention, LargeScores) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      const AttentionCase c{act, 1, 1, 16, 600, 1, 0, 0.0f};
      KvSequence kv(act, 16, 1, 16, c.len);
      kv.FillTokens(5, 0, c.len);
      for (int64_t t = 0; t < c.len; ++t) kv.pool().Set(kv.KIndex(t, 0, 0), t == 411 ? 1000.0 : -1000.0);
      Buffer q = Queries(c, 3), out(act, 16);
      q.Set(0, 50.0);
      RunAttention(isa, c, kv, q, out, 0, 1);
      for (int64_t d = 0; d < 16; ++d) ASSERT_EQ(out.Get(d), kv.pool().Get(kv.VIndex(411, 0, d))) << IsaName(isa);
    }
  }
}

}  // namespace
}  // namespace sapwood
