// Once a call, from the weights, which are small:
//
//   encoder [Kp, Dp] = We,  decoder [Kp, Dp] = Wdᵀ,  padded with zeros to whole tiles
//   G = Wdᵀ Wd,  offset = bd Wd (+ be, where Q is read off a product that begins with be)
//
// Every row shares the errors of G and the offset, and in sums over rows they do not average out: so both are summed in
// double, and what float takes from G is kept as G's low part.
#pragma once

#include "tile.h"

namespace byol::cuda {

constexpr int kPrepareThreads = 512;

struct PrepareArgs {
  Matrix encoder_weight, decoder_weight;  // no decoder: tied
  const void *encoder_bias, *decoder_bias;
  int in_features, out_features, rank;
  int padded_rank, in_padded, out_padded;
  bool bias_in_offset;
  void *encoder, *decoder;                    // null when not wanted; tied: decoder is null, too
  float *encoder_bias_out, *decoder_bias_out; // [Kp], [Dp]
  float *gram, *gram_low;                     // [Kp, Kp] or null
  double* offset;                             // [Kp]
};

template <class T>
BYOL_HD float bias_at(const void* bias, int64_t i) {
  return bias ? to_float(static_cast<const T*>(bias)[i]) : 0.0f;
}

// Block j makes row j of everything.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ PrepareArgs args) {
  const int j = block_x(), Kp = args.padded_rank;
  const bool inside = j < args.rank, tied = !args.decoder_weight.data;
  const T* encoder = static_cast<const T*>(args.encoder_weight.data);
  const T* decoder = static_cast<const T*>(args.decoder_weight.data);
  const auto decoder_at = [&](int64_t d, int k) {
    return tied ? encoder[k * args.encoder_weight.stride + d] : decoder[d * args.decoder_weight.stride + k];
  };
  const T zero = from_float<T>(0.0f);
  if (args.encoder)
    for (int d = thread(); d < args.in_padded; d += kPrepareThreads)
      static_cast<T*>(args.encoder)[int64_t(j) * args.in_padded + d] =
          inside && d < args.in_features ? encoder[j * args.encoder_weight.stride + d] : zero;
  if (args.decoder)
    for (int d = thread(); d < args.out_padded; d += kPrepareThreads)
      static_cast<T*>(args.decoder)[int64_t(j) * args.out_padded + d] =
          inside && d < args.out_features ? decoder_at(d, j) : zero;
  for (int d = j * kPrepareThreads + thread(); d < args.out_padded; d += Kp * kPrepareThreads)
    args.decoder_bias_out[d] = d < args.out_features ? bias_at<T>(args.decoder_bias, d) : 0.0f;
  if (thread() == 0) args.encoder_bias_out[j] = inside ? bias_at<T>(args.encoder_bias, j) : 0.0f;
  if (!args.gram) return;

  // Thread (part, k) sums every parts-th feature.
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const int parts = kPrepareThreads / Kp, k = thread() % Kp, part = thread() / Kp;
  double product = 0, shift = 0;
  if (inside && k < args.rank)
#pragma unroll 4
    for (int d = part; d < args.out_features; d += parts)
      product += double(to_float(decoder_at(d, j))) * double(to_float(decoder_at(d, k)));
  if (inside && args.decoder_bias)
    for (int d = thread(); d < args.out_features; d += kPrepareThreads)
      shift += double(bias_at<T>(args.decoder_bias, d)) * double(to_float(decoder_at(d, j)));
  scratch[thread()] = product;
  sync();
  if (part == 0) {
    double sum = 0;
    for (int p = 0; p < parts; ++p) sum += scratch[p * Kp + k];
    args.gram[j * Kp + k] = float(sum);
    args.gram_low[j * Kp + k] = float(sum - double(float(sum)));
  }
  shift = block_sum<kPrepareThreads>(shift, scratch);
  if (thread() == 0)
    args.offset[j] = shift + (args.bias_in_offset && inside ? double(bias_at<T>(args.encoder_bias, j)) : 0.0);
}

}  // namespace byol::cuda
