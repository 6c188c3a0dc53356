// The bottleneck layer, tile of rows by tile of rows:
//
//   forward    U = X Weᵀ + be,  Z = f(U),  Y = Z Wdᵀ + bd (+ X with residual)
//   backward   dZ = dY Wd,  dU = dZ ⊙ f′(U),  dWe = dUᵀ X,  dWd = dYᵀ Z,  dbe = Σ dU,  dbd = Σ dY,  dX = dU We (+ dY)
//
// and the step's gradients of the data, from its Z and dU:
//
//   dX = scale·(dU We − R) or, with a target, scale·dU We;   dT = −scale·R;   R = Z Wdᵀ + bd − T
#pragma once

#include "abi.h"
#include "activation.h"
#include "operands.h"
#include "parallel_for.h"
#include "stream.h"

namespace byol::BYOL_ISA {

// Columns of a wide result that are formed at a time.
constexpr int64_t kOutputCols = 32 * kTileRows;

// The rows of a wide result that belong to a tile.
template <class T>
struct Rows {
  T* data;
  int64_t cols;
  bool large;  // the whole result

  static Rows of(void* result, int64_t rows, int64_t cols, int64_t first) {
    return {static_cast<T*>(result) + first * cols, cols, rows * cols * int64_t(sizeof(T)) >= kLarge};
  }
  // Part of row r from column `col` on.
  void put(int64_t r, int64_t col, const Acc<T>* values, int64_t count) const {
    T* out = data + r * cols + col;
    if (!large) {
      for (int64_t j = 0; j < count; ++j) out[j] = store<T>(values[j]);
    } else if constexpr (sizeof(T) == sizeof(Acc<T>)) {
      stream(out, values, count * int64_t(sizeof(T)));
    } else {
      T stored[kOutputCols];
      for (int64_t j = 0; j < count; ++j) stored[j] = store<T>(values[j]);
      stream(out, stored, count * int64_t(sizeof(T)));
    }
  }
};

// A·B for a narrow A and a wide B, block of columns by block of columns: finish(row, first column, values, count) makes results
// of what is in `values`.
template <class T, class U, class Finish>
void expand(const Left<T>& a, int64_t rows, const Weights<T>& b, Pointer<Acc<T>> scratch, const Rows<U>& out, const Finish& finish) {
  for (int64_t col = 0; col < out.cols; col += kOutputCols) {
    const int64_t count = min(kOutputCols, out.cols - col);
    a.multiply(b, col, count, scratch, kOutputCols, Into::store);
    for (int64_t r = 0; r < rows; ++r) {
      finish(r, col, scratch + r * kOutputCols, count);
      out.put(r, col, scratch + r * kOutputCols, count);
    }
  }
  if (out.large) end_stream();
}

// Calls tile(first row, rows) for each tile of a thread's share.
template <class PerTile>
void for_each_tile(const LayerArgs& args, int thread, int threads, int64_t height, const PerTile& tile) {
  const int64_t last = share(args.rows, thread + 1, threads);
  for (int64_t row = share(args.rows, thread, threads); row < last; row += height) tile(row, min(height, last - row));
}

// The tile after the one whose rows end at `first`, which may be fetched; it may be another thread's.
template <class T>
View<T> next_tile(const View<T>& rows, int64_t first, int64_t height) {
  return rows.slice(first, min(height, rows.rows - first));
}

template <class T>
int64_t tile_height(const LayerArgs& args, int threads) {
  return tile_rows<T>((args.rows + threads - 1) / threads, max(args.in_features, args.out_features), args.rank);
}

template <class T>
void forward(const ForwardArgs& args) {
  using S = Acc<T>;
  const int threads = useful_threads(args, 1);
  const int64_t K = args.rank, height = tile_height<T>(args, threads);
  Buffer<S> encoder_bias, decoder_bias;
  load_bias<T>(args.encoder_bias, K, encoder_bias);
  load_bias<T>(args.decoder_bias, args.out_features, decoder_bias);
  Weights<T> encoder, decoder;
  load_weights(encoder, encoder_view<T>(args).transposed());
  load_weights(decoder, decoder_view<T>(args).transposed());
  parallel_for(threads, [&](int thread) {
    [[maybe_unused]] const MatrixUnit unit;
    const int64_t stride = encoder.padded_cols();
    Left<T> inputs, codes;
    inputs.allocate(height, args.in_features);
    codes.allocate(height, K);
    Buffer<S> code(height * stride), scratch(height * kOutputCols);
    for_each_tile(args, thread, threads, height, [&](int64_t first, int64_t rows) {
      const View<T> input = input_view<T>(args).slice(first, rows);
      inputs.pack(input, visit_nothing);
      inputs.multiply(encoder, 0, K, code, stride, Into::store, next_tile(input_view<T>(args), first + rows, height), encoder_bias);
      for (int64_t r = 0; r < rows; ++r) {
        S* row = code + r * stride;
        if (args.preactivation)
          std::memcpy(static_cast<S*>(args.preactivation) + (first + r) * K, row, K * sizeof(S));
        // In place is fine: each element is read before it is written.
        activate<S>(args.activation, row, row, nullptr, K);
      }
      codes.pack(View<S>{code, stride, 1, rows, K}, visit_nothing);
      const auto output = Rows<T>::of(args.output, args.rows, args.out_features, first);
      expand(codes, rows, decoder, scratch, output, [&](int64_t r, int64_t col, S* values, int64_t n) {
        const T* x = input.data + r * input.row_stride + col;
        const S* bias = decoder_bias + col;
        if (args.residual)
          for (int64_t j = 0; j < n; ++j) values[j] += bias[j] + load(x[j]);
        else
          for (int64_t j = 0; j < n; ++j) values[j] += bias[j];
      });
    });
  });
}

template <class T>
void step_input_gradients(const InputGradientArgs& args) {
  using S = Acc<T>;
  const int threads = useful_threads(args, 1);
  const int64_t K = args.rank, height = tile_height<T>(args, threads);
  const bool separate = args.target.data;
  const S scale = S(args.scale);
  // Without a target one product of inner width 2K does: [dU, −Z]·[We; Wdᵀ].
  const int64_t inner = separate ? K : 2 * K;
  Buffer<S> decoder_bias;
  load_bias<T>(args.decoder_bias, args.out_features, decoder_bias);
  // In the accumulation type, for R is a difference.
  Weights<S> input_weights, target_weights;
  if (args.d_input) {
    Buffer<S> rows(inner * args.in_features);
    copy<T, S>(encoder_view<T>(args), rows);
    if (!separate) copy<T, S>(decoder_view<T>(args).transposed(), rows + K * args.in_features);
    load_weights(input_weights, View<S>{rows, args.in_features, 1, inner, args.in_features});
  }
  if (args.d_target) load_weights(target_weights, decoder_view<T>(args).transposed());
  parallel_for(threads, [&](int thread) {
    [[maybe_unused]] const MatrixUnit unit;
    Left<S> packed;
    packed.allocate(height, inner);
    Buffer<S> left(height * inner), scratch(height * kOutputCols);
    for_each_tile(args, thread, threads, height, [&](int64_t first, int64_t rows) {
      const S* code = static_cast<const S*>(args.code) + first * K;
      const S* slope = static_cast<const S*>(args.code_gradient) + first * K;
      if (args.d_input) {
        for (int64_t r = 0; r < rows; ++r) {
          std::memcpy(left + r * inner, slope + r * K, K * sizeof(S));
          if (!separate)
            for (int64_t k = 0; k < K; ++k) left[r * inner + K + k] = -code[r * K + k];
        }
        const View<T> input = input_view<T>(args).slice(first, rows);
        packed.pack(View<S>{left, inner, 1, rows, inner}, visit_nothing);
        const auto gradient = Rows<T>::of(args.d_input, args.rows, args.in_features, first);
        expand(packed, rows, input_weights, scratch, gradient, [&](int64_t r, int64_t col, S* values, int64_t n) {
          const T* x = input.data + r * input.row_stride + col;
          const S* bias = decoder_bias + col;
          if (separate)
            for (int64_t j = 0; j < n; ++j) values[j] *= scale;
          else
            for (int64_t j = 0; j < n; ++j) values[j] = scale * (values[j] + (load(x[j]) - bias[j]));
        });
      }
      if (args.d_target) {
        const View<T> target = view<T>(args.target.data ? args.target : args.input, args.rows, args.out_features);
        packed.pack(View<S>{code, K, 1, rows, K}, visit_nothing);
        const auto gradient = Rows<T>::of(args.d_target, args.rows, args.out_features, first);
        expand(packed, rows, target_weights, scratch, gradient, [&](int64_t r, int64_t col, S* values, int64_t n) {
          const T* t = target.data + (first + r) * target.row_stride + col;
          const S* bias = decoder_bias + col;
          for (int64_t j = 0; j < n; ++j) values[j] = scale * (load(t[j]) - bias[j] - values[j]);
        });
      }
    });
  });
}

template <class T>
class Backward {
  using S = Acc<T>;

 public:
  explicit Backward(const BackwardArgs& args)
      : args(args),
        tied(!args.decoder_weight.data),
        wants_code(tied ? args.d_encoder_weight : args.d_decoder_weight),
        wants_slope(args.d_encoder_weight || args.d_encoder_bias || args.d_input),
        threads(useful_threads(args, 2)),
        K(args.rank),
        stride(round_up(args.rank, kCols<S>)) {}

  void run() {
    if (wants_slope) load_weights(decoder, decoder_view<T>(args));
    if (args.d_input) load_weights(encoder, encoder_view<T>(args));
    Worker* workers = new Worker[threads];
    try {
      parallel_for(threads, [&](int thread) { run_share(workers[thread], thread); });
      finish(workers);
    } catch (...) {
      delete[] workers;
      throw;
    }
    delete[] workers;
  }

 private:
  struct Worker {
    Sums<T> encoder_sums, decoder_sums;        // dUᵀX transposed, [in_features, K], and dYᵀZ
    Buffer<double> slope_sum, grad_sum;        // Σ dU, Σ dY
  };

  void run_share(Worker& w, int thread) {
    const int64_t height = tile_height<T>(args, threads);
    [[maybe_unused]] const MatrixUnit unit;
    Left<T> grads, inputs, slopes;
    Values<T> values;
    Buffer<S> slope(height * stride), code(height * stride), error(height * stride), scratch;
    grads.allocate(height, args.out_features);
    values.allocate(height, K);
    if (args.d_encoder_weight) {
      w.encoder_sums.allocate(args.in_features, K);
      inputs.allocate(height, args.in_features);
    }
    if (wants_code) w.decoder_sums.allocate(args.out_features, K);
    if (args.d_input) {
      slopes.allocate(height, K);
      scratch.allocate(height * kOutputCols);
    }
    w.slope_sum.allocate_zeros(K);
    w.grad_sum.allocate_zeros(args.out_features);
    for_each_tile(args, thread, threads, height, [&](int64_t first, int64_t rows) {
      const View<T> grads_of_all = view<T>(args.grad, args.rows, args.out_features), grad = grads_of_all.slice(first, rows);
      if (args.d_decoder_bias) add_rows<T>(grad, w.grad_sum);
      if (!wants_code && !wants_slope) return;
      grads.pack(grad, visit_nothing);
      const S* u = static_cast<const S*>(args.preactivation) + first * K;
      for (int64_t r = 0; r < rows; ++r)
        activate(args.activation, u + r * K, code + r * stride, slope + r * stride, K);
      if (wants_code) {
        fill(values, View<S>{code, stride, 1, rows, K});
        grads.multiply_transposed(values, w.decoder_sums);
      }
      if (!wants_slope) return;
      grads.multiply(decoder, 0, K, error, stride, Into::store, next_tile(grads_of_all, first + rows, height));
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < K; ++k) {
          slope[r * stride + k] *= error[r * stride + k];
          w.slope_sum[k] += double(slope[r * stride + k]);
        }
      if (args.d_encoder_weight) {
        inputs.pack(input_view<T>(args).slice(first, rows), visit_nothing);
        fill(values, View<S>{slope, stride, 1, rows, K});
        inputs.multiply_transposed(values, w.encoder_sums);
      }
      if (!args.d_input) return;
      slopes.pack(View<S>{slope, stride, 1, rows, K}, visit_nothing);
      const auto gradient = Rows<T>::of(args.d_input, args.rows, args.in_features, first);
      expand(slopes, rows, encoder, scratch, gradient, [&](int64_t r, int64_t col, S* values, int64_t n) {
        const T* g = grad.data + r * grad.row_stride + col;
        for (int64_t j = 0; args.residual && j < n; ++j) values[j] += load(g[j]);
      });
    });
  }

  void finish(Worker* workers) {
    const auto biases = [&](void* out, int64_t count, Buffer<double> Worker::*sum) {
      for (int64_t i = 0; out && i < count; ++i) {
        double total = 0;
        for (int thread = 0; thread < threads; ++thread) total += (workers[thread].*sum)[i];
        static_cast<S*>(out)[i] = S(total);
      }
    };
    biases(args.d_encoder_bias, K, &Worker::slope_sum);
    biases(args.d_decoder_bias, args.out_features, &Worker::grad_sum);
    // Of no rows, all sums are zero.
    if (args.d_encoder_weight) workers[0].encoder_sums.begin(false);
    if (wants_code) workers[0].decoder_sums.begin(false);
    parallel_for(threads, [&](int thread) {
      const int64_t k = share(K, thread, threads), d = share(args.out_features, thread, threads);
      if (args.d_encoder_weight) encoder_gradient(workers, k, share(K, thread + 1, threads) - k);
      if (args.d_decoder_weight) decoder_gradient(workers, d, share(args.out_features, thread + 1, threads) - d);
    });
  }

  // Rows first … first + count of dWe; tied: of the sum of both roles.
  void encoder_gradient(Worker* workers, int64_t first, int64_t count) const {
    S* out = static_cast<S*>(args.d_encoder_weight) + first * args.in_features;
    const Region region{0, args.in_features, first, count};
    for (int i = 0; i < threads; ++i) {
      workers[i].encoder_sums.add_columns(out, args.in_features, region, 1, i > 0 ? Into::add : Into::store);
      if (tied) workers[i].decoder_sums.add_columns(out, args.in_features, region, 1);
    }
  }

  // Rows first … first + count of dWd.
  void decoder_gradient(Worker* workers, int64_t first, int64_t count) const {
    S* out = static_cast<S*>(args.d_decoder_weight) + first * K;
    const Region region{first, count, 0, K};
    for (int i = 0; i < threads; ++i) workers[i].decoder_sums.add_rows(out, K, region, 1, i > 0 ? Into::add : Into::store);
  }

  const BackwardArgs& args;
  const bool tied, wants_code, wants_slope;
  const int threads;
  const int64_t K, stride;
  Weights<T> decoder, encoder;
};

}  // namespace byol::BYOL_ISA
