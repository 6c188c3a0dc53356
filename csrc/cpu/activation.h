// The activations f and their derivatives f′, as the reference defines them.
//
//   relu      max(u, 0)                              gelu       u·Φ(u), Φ(u) = ½(1 + erf(u/√2))
//   silu      u·σ(u), σ(u) = 1/(1 + e^−u)            gelu_tanh  ½u(1 + tanh(√(2/π)(u + 0.044715u³)))
//
// float has branch-free approximations that the compiler vectorises (absolute error about 1e-7, relative for tanh); double
// calls the mathematical library.
#pragma once

#include <math.h>

#include "abi.h"
#include "numeric.h"

namespace byol::BYOL_ISA {

inline double exponential(double x) { return ::exp(x); }
inline double hyperbolic_tangent(double x) { return ::tanh(x); }
inline double error_function(double x) { return ::erf(x); }

// e^x = 2^n·e^r with |r| ≤ ½ln 2, the polynomial being the Taylor series to r⁷. Comparisons let NaN through.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 89.0f ? 89.0f : x;  // becomes infinity below
  // Adding and subtracting 1.5·2²³ rounds to the nearest integer.
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float finite = x == x ? n : 0.0f;
  return p * as_float(uint32_t(int32_t(finite) + 127) << 23);
}

// Near zero the odd series (as in Cephes), elsewhere 1 − 2/(e^2|x| + 1).
inline float hyperbolic_tangent(float x) {
  const float magnitude = x < 0 ? -x : x, square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = x + x * square * p;
  const float far = 1.0f - 2.0f / (exponential(2.0f * magnitude) + 1.0f);
  return magnitude < 0.625f ? near : (x < 0 ? -far : far);
}

// Abramowitz and Stegun, 7.1.26.
inline float error_function(float x) {
  const float magnitude = x < 0 ? -x : x;
  const float t = 1.0f / (1.0f + 0.3275911f * magnitude);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float y = 1.0f - p * t * exponential(-magnitude * magnitude);
  return x < 0 ? -y : y;
}

// z[i] = f(u[i]) and, unless slope is null, slope[i] = f′(u[i]); z may be u.
template <class S>
void activate(Activation activation, const S* u, S* z, S* slope, int64_t count) {
  const auto apply = [&](const auto& f) {
    if (slope) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) f(u[i], z[i], slope[i]);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        S unused;
        f(u[i], z[i], unused);
      }
    }
  };
  switch (activation) {
    case Activation::identity:
      return apply([](S x, S& y, S& d) { y = x, d = S(1); });
    case Activation::relu:
      // Written so that NaN passes through both.
      return apply([](S x, S& y, S& d) { y = x < 0 ? S(0) : x, d = x <= 0 ? S(0) : S(1); });
    case Activation::gelu:
      return apply([](S x, S& y, S& d) {
        const S phi = S(0.5) * (S(1) + error_function(x * S(0.70710678118654752440)));
        y = x * phi;
        d = phi + x * S(0.39894228040143267794) * exponential(S(-0.5) * x * x);
      });
    case Activation::gelu_tanh:
      return apply([](S x, S& y, S& d) {
        const S beta = S(0.79788456080286535588), kappa = S(0.044715);
        const S t = hyperbolic_tangent(beta * (x + kappa * x * x * x));
        y = S(0.5) * x * (S(1) + t);
        d = S(0.5) * (S(1) + t) + S(0.5) * x * (S(1) - t * t) * beta * (S(1) + S(3) * kappa * x * x);
      });
    case Activation::silu:
      return apply([](S x, S& y, S& d) {
        const S sigma = S(1) / (S(1) + exponential(-x));
        y = x * sigma;
        d = sigma * (S(1) + x * (S(1) - sigma));
      });
    case Activation::tanh:
      return apply([](S x, S& y, S& d) {
        y = hyperbolic_tangent(x);
        d = S(1) - y * y;
      });
  }
}

}  // namespace byol::BYOL_ISA
