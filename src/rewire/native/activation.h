// Activations on vectors. EXACT: within 1e-7 of the mathematical value; else within 1e-4, far below what bfloat16 and
// int8 resolve, at half the cost.
#pragma once

#include "interface.h"
#include "lanes.h"

namespace {

// The normal distribution's Phi(x) - 1/2 = x P(x^2) / Q(x^2) on [-5.5, 5.5] (rational) or x P(x^2) on [-4, 4], both
// fitted so that the largest error of x Phi(x) is least. Beyond, x Phi(x) is 0 or x.
template <bool EXACT>
INLINE Floats gelu(Floats x) {
  const float edge = EXACT ? 5.5f : 4.0f;
  Floats bounded = smaller(larger(x, all(-edge)), all(edge));
  Floats u = bounded * bounded, p, value;
  if (EXACT) {
    p = all(2.2215931666582947e-08f);
    p = p * u + 6.530758607891263e-06f;
    p = p * u + 0.00018285926414247168f;
    p = p * u + 0.004761623313995565f;
    p = p * u + 0.035142422886429256f;
    p = p * u + 0.39894198536715264f;
    Floats q = all(1.1953993997099827e-06f);
    q = q * u + 7.861068026510866e-05f;
    q = q * u + 0.0019624406052622524f;
    q = q * u + 0.02939875118380521f;
    q = q * u + 0.25475257712832716f;
    q = q * u + 1.0f;
    value = x * (0.5f + bounded * (p / q));
  } else {
    p = all(-1.3012952021647413e-09f);
    p = p * u + 1.0419609993698676e-07f;
    p = p * u - 3.6571345267328e-06f;
    p = p * u + 7.485507174919224e-05f;
    p = p * u - 0.0010064906180601632f;
    p = p * u + 0.00950539927586886f;
    p = p * u - 0.06588784503385818f;
    p = p * u + 0.3986733955265644f;
    value = x * (0.5f + bounded * p);
  }
  value = x < -edge ? Floats{} : value;
  return x > edge ? x : value;
}

// x / (1 + e^(-factor x)), where the caller has put log2 e into the factor.
template <bool EXACT>
INLINE Floats times_sigmoid(Floats x, Floats exponent) {
  return x / (exp2_of<EXACT>(smaller(all(0.0f) - exponent, all(126.0f))) + 1.0f);
}

template <bool EXACT, int KIND>
INLINE Floats activated(Floats x) {
  if (KIND == GELU) return gelu<EXACT>(x);
  if (KIND == GELU_TANH) return times_sigmoid<EXACT>(x, x * (x * x * 0.044715f + 1.0f) * (2 * 0.7978845608f * LOG2E));
  if (KIND == QUICK_GELU) return times_sigmoid<EXACT>(x, x * (1.702f * LOG2E));
  if (KIND == RELU) return x < 0.0f ? Floats{} : x;
  if (KIND == SILU) return times_sigmoid<EXACT>(x, x * LOG2E);
  return x;
}

}  // namespace
