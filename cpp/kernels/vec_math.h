// exp, tanh and SiLU of 16 lanes. Polynomials are minimax fits of ours (relative error of the fit 3e-9 and 5e-9; with
// fp32 rounding about 1e-7), evaluated with the same operations at every place, so a value does not depend on
// which lane or kernel computes it.
#pragma once

#include "kernels/level.h"

namespace sapwood::SAPWOOD_LEVEL {

// exp(r), |r| <= ln2/2.
SAPWOOD_INLINE V16 ExpPolynomial(V16 r) {
  V16 p = Set1(0x1.6a1a72p-10f);
  p = Fma(p, r, Set1(0x1.123fc6p-7f));
  p = Fma(p, r, Set1(0x1.555916p-5f));
  p = Fma(p, r, Set1(0x1.55548ap-3f));
  p = Fma(p, r, Set1(0x1.fffffcp-2f));
  p = Fma(Mul(p, r), r, r);
  return Add(p, Set1(1.0f));
}

// exp(0) = 1 exactly (attention relies on it: a merge into an empty state copies); 0 below -87.3 and for -inf; inf
// above 88.3; NaN stays NaN.
SAPWOOD_INLINE V16 Exp(V16 x) {
  const V16 low = Set1(-87.3f), high = Set1(88.3f);
  const V16 clamped = Min(high, Max(low, x));  // NaN is the second operand and passes through
  // x = n ln2 + r, |r| <= ln2/2; adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const V16 magic = Set1(12582912.0f);
  const V16 t = Add(Mul(clamped, Set1(1.44269504f)), magic);
  const V16 n = Sub(t, magic);
  V16 r = Fma(n, Set1(-0.693145751953125f), clamped);  // high part of ln2: 16 bits, so n * part is exact
  r = Fma(n, Set1(-1.4286068203094e-06f), r);
  V16 y = Mul(ExpPolynomial(r), Pow2OfMagic(t));
  y = Select(Less(x, low), Zero(), y);
  return Select(Less(high, x), Set1(__builtin_inff()), y);
}

// Exp of what is not positive, and of NaN: the same bits.
SAPWOOD_INLINE V16 ExpNotPositive(V16 x) {
  const V16 low = Set1(-87.3f);
  const V16 clamped = Max(low, x);
  const V16 magic = Set1(12582912.0f);
  const V16 t = Add(Mul(clamped, Set1(1.44269504f)), magic);
  const V16 n = Sub(t, magic);
  V16 r = Fma(n, Set1(-0.693145751953125f), clamped);
  r = Fma(n, Set1(-1.4286068203094e-06f), r);
  const V16 y = Mul(ExpPolynomial(r), Pow2OfMagic(t));
  return Select(Less(x, low), Zero(), y);
}

SAPWOOD_INLINE V16 Tanh(V16 x) {
  const V16 a = Abs(x);
  const V16 z = Mul(x, x);
  V16 p = Set1(-0.005717044696211815f);  // (tanh(x)/x - 1) / x^2 for |x| < 0.625
  p = Fma(p, z, Set1(0.020650586113333702f));
  p = Fma(p, z, Set1(-0.05374349653720856f));
  p = Fma(p, z, Set1(0.13331490755081177f));
  p = Fma(p, z, Set1(-0.3333328366279602f));
  const V16 small = Fma(Mul(p, z), x, x);
  const V16 e = Exp(Add(a, a));
  const V16 large = Sub(Set1(1.0f), Div(Set1(2.0f), Add(e, Set1(1.0f))));
  return Select(Less(a, Set1(0.625f)), small, CopySign(large, x));
}

SAPWOOD_INLINE V16 Silu(V16 x) { return Div(x, Add(Set1(1.0f), Exp(Sub(Zero(), x)))); }

// softcap * tanh(x / softcap)
SAPWOOD_INLINE V16 SoftCap(V16 x, float softcap) {
  const V16 cap = Set1(softcap);
  return Mul(cap, Tanh(Div(x, cap)));
}

}  // namespace sapwood::SAPWOOD_LEVEL
