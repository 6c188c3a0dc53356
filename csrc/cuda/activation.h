// The activations f and their derivatives f′, as the reference defines them.
//
//   relu      max(u, 0)                              gelu       u·Φ(u), Φ(u) = ½(1 + erf(u/√2))
//   silu      u·σ(u), σ(u) = 1/(1 + e^−u)            gelu_tanh  ½u(1 + tanh(√(2/π)(u + 0.044715u³)))
#pragma once

#include <math.h>

#include "types.h"

namespace byol::cuda {

enum class Activation : int { identity = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4, tanh = 5 };

struct Activated {
  float value, slope;
};

// Switched at run time: a template for each would compile every kernel six times, for a few instructions a row.
BYOL_HD Activated activate(Activation activation, float u) {
  switch (activation) {
    case Activation::identity:
      return {u, 1.0f};
    case Activation::relu:
      // Written so that NaN passes through.
      return {u < 0 ? 0.0f : u, u <= 0 ? 0.0f : 1.0f};
    case Activation::gelu: {
      const float phi = 0.5f * (1.0f + erff(u * 0.707106781186547524f));
      return {u * phi, phi + u * 0.398942280401432678f * expf(-0.5f * u * u)};
    }
    case Activation::gelu_tanh: {
      const float beta = 0.797884560802865356f, kappa = 0.044715f;
      const float t = tanhf(beta * (u + kappa * u * u * u));
      return {0.5f * u * (1.0f + t),
              0.5f * (1.0f + t) + 0.5f * u * (1.0f - t * t) * beta * (1.0f + 3.0f * kappa * u * u)};
    }
    case Activation::silu: {
      const float sigma = 1.0f / (1.0f + expf(-u));
      return {u * sigma, sigma * (1.0f + u * (1.0f - sigma))};
    }
    default: {
      const float t = tanhf(u);
      return {t, 1.0f - t * t};
    }
  }
}

}  // namespace byol::cuda
