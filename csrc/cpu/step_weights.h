// What a step makes of its weights and biases before it sees a row.
#pragma once

#include "abi.h"
#include "gram.h"
#include "operands.h"

namespace byol::BYOL_ISA {

template <class T>
struct StepWeights {
  using S = Acc<T>;

  explicit StepWeights(const StepArgs& args) : K(args.rank) {
    load_bias<T>(args.encoder_bias, K, encoder_bias);
    load_bias<T>(args.decoder_bias, args.out_features, decoder_bias);
    const View<T> encoder = encoder_view<T>(args), decoder = decoder_view<T>(args);
    const bool tied = !args.decoder_weight.data, separate = args.target.data;
    load_input_weights(encoder, decoder, !tied && !separate);
    if (separate) load_weights(target_weights, decoder);
    code_offset.allocate_zeros(K);
    if (args.decoder_bias) add_bias_products(decoder);
    // The product of tied weights has the encoder's bias in it, too.
    for (int64_t k = 0; tied && !separate && k < K; ++k) code_offset[k] += double(encoder_bias[k]);
    make_gram(decoder, args.threads);
    if (sizeof(T) == 4) load_weights(lost_weights, View<S>{lost, K, 1, K, K});
  }

  const int64_t K;
  Buffer<S> encoder_bias, decoder_bias;
  Buffer<S> product_start;            // what a row of X·[Weᵀ, Wd] begins with: [be, 0]
  Buffer<double> code_offset;         // bd·Wd; with be where Q is made of U
  Buffer<S> lost;                     // what rounding takes from G
  Weights<T> input_weights;           // [Weᵀ, Wd] in the joint case, else Weᵀ
  Weights<T> target_weights;          // Wd
  Weights<Code<T>> gram, lost_weights;

 private:
  void load_input_weights(const View<T>& encoder, const View<T>& decoder, bool joint) {
    const int64_t width = joint ? 2 * K : K;
    input_weights.allocate(encoder.cols, width);
    input_weights.shape(encoder.cols, width);
    input_weights.put(encoder.transposed());
    if (joint) input_weights.put(decoder, K);
    input_weights.pad();
    product_start.allocate_zeros(input_weights.padded_cols());
    std::memcpy(product_start, encoder_bias, K * sizeof(S));
  }

  void add_bias_products(const View<T>& decoder) {
    // Features that are taken at a time.
    constexpr int64_t kRows = 8 * kTileRows;
    Buffer<S> rows(kRows * K);
    for (int64_t first = 0; first < decoder.rows; first += kRows) {
      const int64_t count = min(kRows, decoder.rows - first);
      copy<T, S>(decoder.slice(first, count), rows);
      for (int64_t d = 0; d < count; ++d) {
        const double bias = decoder_bias[first + d];
        for (int64_t k = 0; k < K; ++k) code_offset[k] += bias * double(rows[d * K + k]);
      }
    }
  }

  // G = Wdᵀ Wd.
  void make_gram(const View<T>& decoder, int threads) {
    const Buffer<double> products(K * K);
    gram_products(decoder, threads, products);
    Buffer<S> rounded(K * K);
    lost.allocate(K * K);
    for (int64_t j = 0; j < K; ++j)
      for (int64_t k = 0; k < K; ++k) {
        // Summed on and above the diagonal.
        const double product = j < k ? products[j * K + k] : products[k * K + j];
        rounded[j * K + k] = kept<Code<T>>(S(product));
        lost[j * K + k] = S(product - double(rounded[j * K + k]));
      }
    load_weights(gram, View<S>{rounded, K, 1, K, K});
  }

  void gram_products(const View<T>& decoder, int threads, double* products) const {
    if constexpr (sizeof(T) == 2) {
      half_gram(decoder, threads, products);
    } else {
      Buffer<double> sums;
      const Panels<double> panels = gram_matrix(decoder, threads, sums);
      for (int64_t j = 0; j < K; ++j)
        for (int64_t k = 0; k < K; ++k) products[j * K + k] = *panels.at(j, k);
    }
  }
};

}  // namespace byol::BYOL_ISA
