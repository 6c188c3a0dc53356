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
    const View<T> inputs = encoder_view<T>(args).transposed(), decoder = decoder_view<T>(args);
    const bool tied = !args.decoder_weight.data, separate = args.target.data, joint = !tied && !separate;
    const auto begin = [](Weights<T>& weights, int64_t rows, int64_t cols) { weights.allocate(rows, cols), weights.shape(rows, cols); };
    begin(input_weights, inputs.rows, joint ? 2 * K : K);
    if (separate) begin(target_weights, decoder.rows, K);
    code_offset.allocate_zeros(K);
    // The product of tied weights has the encoder's bias in it, too.
    for (int64_t k = 0; tied && !separate && k < K; ++k) code_offset[k] = encoder_bias[k];
    const Buffer<double> products(K * K);
    gram(decoder, args.decoder_bias ? static_cast<const S*>(decoder_bias) : nullptr, max(inputs.rows, decoder.rows), args.threads,
         products, code_offset, [&](int64_t first, int64_t count) {
           load_rows(input_weights, first, count, inputs, joint ? &decoder : nullptr);
           if (separate) load_rows(target_weights, first, count, decoder, nullptr);
         });
    round_gram(products);
    product_start.allocate_zeros(input_weights.padded_cols());
    std::memcpy(product_start, encoder_bias, K * sizeof(S));
  }

  const int64_t K;
  Buffer<S> encoder_bias, decoder_bias;
  Buffer<S> product_start;            // what a row of X·[Weᵀ, Wd] begins with: [be, 0]
  Buffer<double> code_offset;         // bd·Wd; with be where Q is made of U
  Buffer<S> lost;                     // what rounding takes from G = Wdᵀ Wd
  Weights<T> input_weights;           // [Weᵀ, Wd] in the joint case, else Weᵀ
  Weights<T> target_weights;          // Wd
  Weights<Code<T>> gram_weights;      // G
  Weights<Code<T>> lost_weights;

 private:
  // Rows first … first + count, as far as there are, of one matrix and beside it of another.
  void load_rows(Weights<T>& to, int64_t first, int64_t count, const View<T>& one, const View<T>* other) const {
    count = min(count, one.rows - first);
    if (count <= 0) return;
    const View<T> rows = other ? other->slice(first, count) : View<T>{};
    to.load(first, one.slice(first, count), other ? &rows : nullptr);
  }

  void round_gram(const double* products) {
    Buffer<S> rounded(K * K);
    lost.allocate(K * K);
    for (int64_t i = 0; i < K * K; ++i) {
      rounded[i] = kept<Code<T>>(S(products[i]));
      lost[i] = S(products[i] - double(rounded[i]));
    }
    load_weights(gram_weights, View<S>{rounded, K, 1, K, K});
    if (sizeof(T) == 4) load_weights(lost_weights, View<S>{lost, K, 1, K, K});
  }
};

}  // namespace byol::BYOL_ISA
