// The determinism contract of kernels.h, bit for bit, per ISA level: a row's result does not depend on the rows beside
// it, on tiles, page size, chunking of the prompt, nor on anything in the pool that the row must not see.
#include "kernels_testing.h"

namespace sapwood {
namespace {

GemmArgs ArgsFor(const Buffer& a, int64_t k, const Buffer& packed, int64_t n, Buffer& out, int64_t ldc,
                 Epilogue epilogue) {
  GemmArgs args{};
  args.a = a.data();
  args.lda = k;
  args.w = packed.data();
  args.out = out.data();
  args.ldc = ldc;
  args.n = n;
  args.k = k;
  args.scale = 0.3f;
  args.softcap = epilogue == Epilogue::kLogits ? 4.0f : 0.0f;
  args.epilogue = epilogue;
  return args;
}

DType OutType(DType act, Epilogue epilogue) {
  return epilogue == Epilogue::kStoreAct || epilogue == Epilogue::kSiluMul ? act : DType::kF32;
}

TEST(GemmBitwise, RowsDoNotDependOnM) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (int64_t k : {37, 517}) {
        constexpr int64_t kRows = 70, kN = 130;
        Rng rng(static_cast<uint64_t>(k));
        const Weight w(act, kN, k, rng);
        Buffer a(act, kRows * k), bias(DType::kF32, kN);
        a.FillNormal(rng);
        bias.FillNormal(rng);
        // The reference: every row by itself.
        Buffer alone(DType::kF32, kRows * kN);
        GemmArgs args = ArgsFor(a, k, w.packed, kN, alone, kN, Epilogue::kStoreF32);
        args.bias = bias.f32();
        for (int64_t m = 0; m < kRows; ++m) Kernels(isa).gemm(act, args, m, m + 1, 0, 3);
        for (int64_t m = 1; m <= kRows; ++m) {
          Buffer out(DType::kF32, m * kN);
          args.out = out.data();
          Kernels(isa).gemm(act, args, 0, m, 0, 3);
          ASSERT_TRUE(SameBits(out, 0, alone, 0, m * kN))
              << IsaName(isa) << " " << ActName(act) << " k " << k << " m " << m;
        }
      }
    }
  }
}

TEST(GemmBitwise, AnyTilingAnyEpilogue) {
  constexpr int64_t kRows = 211, kN = 200, kInter = 100, kK = 523;
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      Rng rng(99);
      const Weight w(act, kN, kK, rng);
      const GateUpWeight gate_up(act, kInter, kK, rng);
      Buffer a(act, kRows * kK), bias(DType::kF32, 256), residual(DType::kF32, kRows * kN);
      a.FillNormal(rng);
      bias.FillNormal(rng);
      residual.FillNormal(rng);
      for (Epilogue epilogue :
           {Epilogue::kStoreAct, Epilogue::kStoreF32, Epilogue::kResidual, Epilogue::kSiluMul, Epilogue::kLogits}) {
        const bool silu = epilogue == Epilogue::kSiluMul;
        const int64_t n = silu ? kInter : kN;
        const Buffer& packed = silu ? gate_up.packed : w.packed;
        Buffer whole(OutType(act, epilogue), kRows * n), tiled(OutType(act, epilogue), kRows * n);
        Buffer whole_max(DType::kF32, kRows * 4), tiled_max(DType::kF32, kRows * 4);
        const auto run = [&](Buffer& out, Buffer& block_max, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
          GemmArgs args = ArgsFor(a, kK, packed, n, out, n, epilogue);
          args.bias = bias.f32();
          args.residual = residual.f32();
          args.block_max = epilogue == Epilogue::kLogits ? block_max.f32() : nullptr;
          Kernels(isa).gemm(act, args, m0, m1, p0, p1);
        };
        run(whole, whole_max, 0, kRows, 0, 4);
        for (int64_t p0 = 0; p0 < 4;) {
          const int64_t p1 = std::min<int64_t>(4, p0 + 1 + rng.Below(3));
          for (int64_t m0 = 0; m0 < kRows;) {
            const int64_t m1 = std::min(kRows, m0 + 1 + rng.Below(rng.Below(2) ? 9 : 120));
            run(tiled, tiled_max, m0, m1, p0, p1);
            m0 = m1;
          }
          p0 = p1;
        }
        EXPECT_TRUE(whole.SameBytes(tiled)) << IsaName(isa) << " " << ActName(act) << " epilogue " << int(epilogue);
        EXPECT_TRUE(whole_max.SameBytes(tiled_max)) << IsaName(isa) << " " << ActName(act);
      }
    }
  }
}

// One chain per output, k ascending, from zero: the order itself. (VDPBF16PS is checked against fp64 only.)
TEST(GemmBitwise, OneChainAscendingK) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      if (act == DType::kBF16 && isa == Isa::kAvx512Bf16) continue;
      constexpr int64_t kRows = 9, kN = 64, kK = 601;
      Rng rng(5);
      const Weight w(act, kN, kK, rng);
      Buffer a(act, kRows * kK), out(DType::kF32, kRows * kN);
      a.FillNormal(rng);
      const GemmArgs args = ArgsFor(a, kK, w.packed, kN, out, kN, Epilogue::kStoreF32);
      Kernels(isa).gemm(act, args, 0, kRows, 0, 1);
      for (int64_t m = 0; m < kRows; ++m) {
        for (int64_t n = 0; n < kN; ++n) {
          float acc = 0.0f;
          for (int64_t k = 0; k < kK; ++k) {
            const float x = static_cast<float>(a.Get(m * kK + k)), y = static_cast<float>(w.rows.Get(n * kK + k));
            acc = isa == Isa::kScalar ? x * y + acc : std::fma(x, y, acc);
          }
          ASSERT_EQ(out.Get(m * kN + n), acc) << IsaName(isa) << " " << ActName(act) << " row " << m << " output " << n;
        }
      }
    }
  }
}

// int8 and int4, as above: a row's bits whatever stands beside it, in every number of rows that has a tile of its own
// (at most 6) and beyond a block of them.
TEST(QuantizedGemmBitwise, RowsDoNotDependOnM) {
  for (Isa isa : SupportedLevels()) {
    for (WeightFormat format : kQuantized) {
      for (int64_t k : {37, 517, 4160}) {
        const int64_t rows = k > 4096 ? 26 : 104;
        constexpr int64_t kN = 130;
        Rng rng(static_cast<uint64_t>(k));
        Buffer weight(DType::kF32, kN * k), x(DType::kF32, rows * k), a = Q8Buffer(rows * Q8Blocks(k)),
                                                                      bias(DType::kF32, kN);
        weight.FillNormal(rng);
        x.FillNormal(rng);
        bias.FillNormal(rng);
        for (int64_t m = 0; m < rows; ++m) {
          Kernels(isa).quantize(DType::kF32, x.at(m * k), Q8At(a, m * Q8Blocks(k)), k);
        }
        const QuantizedPanels w(isa, format, PanelRows(weight, kN, k), k);
        Buffer alone(DType::kF32, rows * kN);
        GemmArgs args = ArgsFor(a, k, w.packed, kN, alone, kN, Epilogue::kStoreF32);
        args.lda = Q8Blocks(k);
        args.format = format;
        args.bias = bias.f32();
        for (int64_t m = 0; m < rows; ++m) Kernels(isa).gemm(DType::kBF16, args, m, m + 1, 0, 3);
        for (int64_t m = 1; m <= rows; m += m < 30 ? 1 : 7) {
          Buffer out(DType::kF32, m * kN);
          args.out = out.data();
          Kernels(isa).gemm(DType::kBF16, args, 0, m, 0, 3);
          ASSERT_TRUE(SameBits(out, 0, alone, 0, m * kN))
              << IsaName(isa) << " " << WeightFormatName(format) << " k " << k << " m " << m;
        }
      }
    }
  }
}

TEST(QuantizedGemmBitwise, AnyTilingAnyEpilogue) {
  constexpr int64_t kRows = 211, kN = 200, kInter = 100, kK = 523;
  for (Isa isa : SupportedLevels()) {
    for (WeightFormat format : kQuantized) {
      Rng rng(99);
      Buffer weight(DType::kF32, kN * kK), gate_up(DType::kF32, 2 * kInter * kK), x(DType::kF32, kRows * kK);
      Buffer a = Q8Buffer(kRows * Q8Blocks(kK)), bias(DType::kF32, 256), residual(DType::kF32, kRows * kN);
      for (Buffer* buffer : {&weight, &gate_up, &x, &bias, &residual}) buffer->FillNormal(rng);
      for (int64_t m = 0; m < kRows; ++m) {
        Kernels(isa).quantize(DType::kF32, x.at(m * kK), Q8At(a, m * Q8Blocks(kK)), kK);
      }
      const QuantizedPanels w(isa, format, PanelRows(weight, kN, kK), kK);
      const QuantizedPanels gate_up_w(isa, format, PanelRows(gate_up, 2 * kInter, kK, true), kK);
      for (Epilogue epilogue : {Epilogue::kStoreAct, Epilogue::kStoreF32, Epilogue::kResidual, Epilogue::kSiluMul,
                                Epilogue::kSiluMulQ8, Epilogue::kLogits}) {
        const bool q8 = epilogue == Epilogue::kSiluMulQ8, silu = q8 || epilogue == Epilogue::kSiluMul;
        const int64_t n = silu ? kInter : kN, ldc = q8 ? Q8Blocks(kInter) : n;
        const auto output = [&] {
          return q8 ? Q8Buffer(kRows * ldc) : Buffer(OutType(DType::kBF16, epilogue), kRows * n);
        };
        Buffer whole = output(), tiled = output();
        Buffer whole_max(DType::kF32, kRows * 4), tiled_max(DType::kF32, kRows * 4);
        const auto run = [&](Buffer& out, Buffer& block_max, int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
          GemmArgs args = ArgsFor(a, kK, silu ? gate_up_w.packed : w.packed, n, out, ldc, epilogue);
          args.lda = Q8Blocks(kK);
          args.format = format;
          args.bias = bias.f32();
          args.residual = residual.f32();
          args.block_max = epilogue == Epilogue::kLogits ? block_max.f32() : nullptr;
          Kernels(isa).gemm(DType::kBF16, args, m0, m1, p0, p1);
        };
        run(whole, whole_max, 0, kRows, 0, 4);
        for (int64_t p0 = 0; p0 < 4;) {
          const int64_t p1 = std::min<int64_t>(4, p0 + 1 + rng.Below(3));
          for (int64_t m0 = 0; m0 < kRows;) {
            const int64_t m1 = std::min(kRows, m0 + 1 + rng.Below(rng.Below(2) ? 9 : 120));
            run(tiled, tiled_max, m0, m1, p0, p1);
            m0 = m1;
          }
          p0 = p1;
        }
        EXPECT_TRUE(whole.SameBytes(tiled)) << IsaName(isa) << " " << WeightFormatName(format) << " " << int(epilogue);
        EXPECT_TRUE(whole_max.SameBytes(tiled_max)) << IsaName(isa) << " " << WeightFormatName(format);
      }
    }
  }
}

// The chain itself: an exact sum of integers for every 32 k, times the product of both scales, k ascending, from zero.
TEST(QuantizedGemmBitwise, OneChainOfExactSums) {
  for (Isa isa : SupportedLevels()) {
    for (WeightFormat format : kQuantized) {
      constexpr int64_t kRows = 9, kN = 64, kK = 601;
      Rng rng(5);
      Buffer weight(DType::kF32, kN * kK), x(DType::kF32, kRows * kK), a = Q8Buffer(kRows * Q8Blocks(kK));
      weight.FillNormal(rng);
      x.FillNormal(rng);
      for (int64_t m = 0; m < kRows; ++m) {
        Kernels(isa).quantize(DType::kF32, x.at(m * kK), Q8At(a, m * Q8Blocks(kK)), kK);
      }
      const QuantizedPanels w(isa, format, PanelRows(weight, kN, kK), kK);
      Buffer out(DType::kF32, kRows * kN);
      GemmArgs args = ArgsFor(a, kK, w.packed, kN, out, kN, Epilogue::kStoreF32);
      args.lda = Q8Blocks(kK);
      args.format = format;
      Kernels(isa).gemm(DType::kF32, args, 0, kRows, 0, 1);
      const int64_t group_bytes = w.panel_bytes() / Q8Blocks(kK);
      for (int64_t n = 0; n < kN; ++n) {
        const std::vector<float> row = w.Row(n);
        for (int64_t m = 0; m < kRows; ++m) {
          float acc = 0.0f;
          for (int64_t b = 0; b < Q8Blocks(kK); ++b) {
            uint16_t half;  // the scales are the end of each group
            std::memcpy(&half, w.panel(0) + (b + 1) * group_bytes - 2 * (kPanel - n), 2);
            const float scale = F16ToF32(half);
            const Q8Block& block = *Q8At(a, m * Q8Blocks(kK) + b);
            int32_t sum = 0;
            for (int64_t i = 0; i < kQ8Block && b * kQ8Block + i < kK; ++i) {
              sum += block.q[i] * static_cast<int32_t>(std::lround(row[static_cast<size_t>(b * kQ8Block + i)] / scale));
            }
            const float both = scale * block.scale, product = static_cast<float>(sum);
            acc = isa == Isa::kScalar ? product * both + acc : std::fma(product, both, acc);
          }
          ASSERT_EQ(out.Get(m * kN + n), acc)
              << IsaName(isa) << " " << WeightFormatName(format) << " row " << m << " output " << n;
        }
      }
    }
  }
}

constexpr int32_t kPageSizes[] = {16, 32, 64};

// All rows of a case in one call, page size 16, NaN wherever the sequence is not.
Buffer Baseline(Isa isa, const AttentionCase& c, const Buffer& q) {
  KvSequence kv(c.kv_dtype(), 16, c.num_kv_heads, c.head_dim, c.len);
  kv.FillTokens(5, 0, c.len);
  Buffer out(c.act, c.q_len * c.width());
  RunAttention(isa, c, kv, q, out, 0, c.q_len);
  for (int64_t i = 0; i < out.count(); ++i) EXPECT_TRUE(std::isfinite(out.Get(i)));
  return out;
}

std::string Describe(Isa isa, const AttentionCase& c) {
  return std::string(IsaName(isa)) + " " + ActName(c.act) + " group " + std::to_string(c.group) + " len " +
         std::to_string(c.len) + " q_len " + std::to_string(c.q_len) + " window " + std::to_string(c.window) +
         (c.int8 ? " int8" : "");
}

std::vector<AttentionCase> BitwiseCases(DType act) {
  std::vector<AttentionCase> cases;
  for (int64_t len : {1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 700}) {
    for (int32_t group : {1, 2, 4, 7, 8}) {
      const int32_t window = group == 2 ? 0 : group == 7 ? 70 : group == 8 ? 5 : len > 256 && group == 4 ? 300 : 0;
      for (bool int8 : {false, true}) {
        cases.push_back({act, group, 1, 40, len, std::min<int64_t>(len, 31), window, group == 1 ? 8.0f : 0.0f, int8});
      }
    }
  }
  return cases;
}

TEST(AttentionBitwise, AloneAsAmongMany) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (const AttentionCase& c : BitwiseCases(act)) {
        const Buffer q = Queries(c, 11);
        const Buffer together = Baseline(isa, c, q);
        KvSequence kv(c.kv_dtype(), 16, c.num_kv_heads, c.head_dim, c.len);
        Buffer alone(act, c.q_len * c.width());
        // As decode meets it: the row's token is the newest there is, the rest of the pool is NaN.
        kv.FillTokens(5, 0, c.len - c.q_len);
        for (int64_t i = 0; i < c.q_len; ++i) {
          kv.FillTokens(5, c.len - c.q_len + i, c.len - c.q_len + i + 1);
          RunAttention(isa, c, kv, q, alone, i, i + 1);
        }
        ASSERT_TRUE(alone.SameBytes(together)) << Describe(isa, c);
      }
    }
  }
}

TEST(AttentionBitwise, PageSizePoisonAndPageOrder) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (const AttentionCase& c : BitwiseCases(act)) {
        const Buffer q = Queries(c, 11);
        const Buffer want = Baseline(isa, c, q);
        for (int32_t page_size : kPageSizes) {
          for (uint8_t poison : {uint8_t{0xff}, uint8_t{0x7f}, uint8_t{0x00}}) {  // NaN, large or NaN, zero
            KvSequence kv(c.kv_dtype(), page_size, c.num_kv_heads, c.head_dim, c.len, poison, 1 + poison);
            kv.FillTokens(5, 0, c.len);
            Buffer out(act, c.q_len * c.width(), poison);
            RunAttention(isa, c, kv, q, out, 0, c.q_len);
            ASSERT_TRUE(out.SameBytes(want))
                << Describe(isa, c) << " page_size " << page_size << " poison " << int(poison);
          }
        }
      }
    }
  }
}

TEST(AttentionBitwise, AnySplitOfTheRows) {
  Rng rng(21);
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (const AttentionCase& c : {AttentionCase{act, 2, 2, 24, 300, 300, 0, 0.0f},
                                     {act, 1, 1, 128, 300, 300, 0, 0.0f},
                                     {act, 7, 1, 20, 290, 100, 65, 0.0f},
                                     {act, 30, 1, 16, 270, 40, 0, 0.0f},
                                     {act, 2, 2, 24, 300, 300, 0, 0.0f, true},
                                     {act, 7, 1, 20, 290, 100, 65, 0.0f, true},
                                     {act, 30, 1, 16, 270, 40, 0, 0.0f, true}}) {
        const Buffer q = Queries(c, 11);
        const Buffer whole = Baseline(isa, c, q);
        for (int repeat = 0; repeat < 3; ++repeat) {
          KvSequence kv(c.kv_dtype(), 32, c.num_kv_heads, c.head_dim, c.len);
          kv.FillTokens(5, 0, c.len);
          Buffer split(act, c.q_len * c.width());
          for (int64_t begin = 0; begin < c.q_len;) {
            const int64_t end = std::min(c.q_len, begin + 1 + rng.Below(repeat == 0 ? 4 : 60));
            RunAttention(isa, c, kv, q, split, begin, end);
            begin = end;
          }
          ASSERT_TRUE(split.SameBytes(whole)) << Describe(isa, c);
        }
      }
    }
  }
}

// A token that holds NaN or infinity spoils the rows that see it and no other, in the same call.
TEST(AttentionBitwise, RowsBeforeABadTokenAreUntouched) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (bool int8 : {false, true}) {
        const AttentionCase c{act, 3, 1, 40, 140, 60, 0, 0.0f, int8};
        const Buffer q = Queries(c, 11);
        const Buffer good = Baseline(isa, c, q);
        for (int64_t bad : {81, 100, 127, 128, 139}) {
          KvSequence kv(c.kv_dtype(), 16, 1, c.head_dim, c.len);
          kv.FillTokens(5, 0, c.len);
          kv.Spoil(bad, std::nan(""), std::numeric_limits<double>::infinity());
          Buffer out(act, c.q_len * c.width());
          RunAttention(isa, c, kv, q, out, 0, c.q_len);
          const int64_t rows_before = bad - (c.len - c.q_len);
          ASSERT_TRUE(SameBits(out, 0, good, 0, rows_before * c.width())) << Describe(isa, c) << " bad token " << bad;
          ASSERT_TRUE(std::isnan(out.Get(rows_before * c.width()))) << Describe(isa, c) << " bad token " << bad;
        }
      }
    }
  }
}

// The same for tokens that have left the window of later rows.
TEST(AttentionBitwise, RowsPastABadTokenAreUntouched) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (bool int8 : {false, true}) {
        const AttentionCase c{act, 2, 1, 40, 140, 60, 21, 0.0f, int8};
        const Buffer q = Queries(c, 11);
        const Buffer good = Baseline(isa, c, q);
        for (int64_t bad : {62, 63, 64, 83, 84}) {
          KvSequence kv(c.kv_dtype(), 32, 1, c.head_dim, c.len);
          kv.FillTokens(5, 0, c.len);
          kv.Spoil(bad, std::nan(""), std::nan(""));
          Buffer out(act, c.q_len * c.width());
          RunAttention(isa, c, kv, q, out, 0, c.q_len);
          for (int64_t i = 0; i < c.q_len; ++i) {
            const int64_t position = c.len - c.q_len + i;
            if (bad <= position && bad > position - c.window) {
              ASSERT_TRUE(std::isnan(out.Get(i * c.width()))) << Describe(isa, c) << " row " << i;
            } else {
              ASSERT_TRUE(SameBits(out, i * c.width(), good, i * c.width(), c.width()))
                  << Describe(isa, c) << " row " << i;
            }
          }
        }
      }
    }
  }
}

// Keys computed by several calls and merged, wherever the cuts are.
TEST(AttentionBitwise, AnySplitOfTheKeys) {
  for (Isa isa : SupportedLevels()) {
    for (DType act : kActs) {
      for (bool int8 : {false, true}) {
        for (const AttentionCase& c : {AttentionCase{act, 2, 2, 24, 1100, 1, 0, 0.0f, int8},
                                       {act, 1, 1, 128, 1024, 3, 0, 0.0f, int8},
                                       {act, 7, 1, 20, 1290, 40, 0, 9.0f, int8},
                                       {act, 3, 1, 40, 1200, 70, 600, 0.0f, int8},
                                       {act, 2, 1, 16, 900, 300, 130, 0.0f, int8},
                                       {act, 2, 1, 16, 100, 1, 0, 0.0f, int8}}) {
          const Buffer q = Queries(c, 11);
          const Buffer want = Baseline(isa, c, q);
          KvSequence kv(c.kv_dtype(), 32, c.num_kv_heads, c.head_dim, c.len);
          kv.FillTokens(5, 0, c.len);
          for (const std::vector<int64_t>& cuts :
               {std::vector<int64_t>{256}, {512}, {256, 512, 768, 1024}, {1024}, {256, 1024}}) {
            Buffer out(act, c.q_len * c.width());
            RunAttention(isa, c, kv, q, out, 0, c.q_len, cuts);
            ASSERT_TRUE(out.SameBytes(want)) << Describe(isa, c) << " cuts " << cuts.size() << " from " << cuts[0];
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace sapwood
