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

namespace byol::BYOL_ISA {

// Columns of a wide result that are formed at a time.
constexpr int64_t kOutputCols = 32 * kTileRows;

// Y = A·B (+ a bias unless null) for a narrow A and a wide B, block of columns by block of columns: emit(row, first column,
// values, count).
template <class S, class Emit>
void expand(const Blocks<S>& a, int64_t rows, const Panels<S>& b, int64_t cols, const typename Same<S>::type* bias,
            Pointer<S> scratch, const Emit& emit) {
  for (int64_t col = 0; col < cols; col += kOutputCols) {
    const int64_t count = min(kOutputCols, cols - col);
    const Panels<S> block{b.panel(col / kCols<S>), b.rows, round_up(count, kCols<S>)};
    if (bias) fill_rows<S>(scratch, kOutputCols, a.rows, bias + col, count);
    multiply(a, block, scratch, kOutputCols, bias ? Into::begin : Into::store);
    for (int64_t r = 0; r < rows; ++r) emit(r, col, scratch + r * kOutputCols, count);
  }
}

// Calls tile(first row, rows) for each tile of a thread's share.
template <class PerTile>
void for_each_tile(const LayerArgs& args, int thread, int threads, int64_t height, const PerTile& tile) {
  const int64_t last = share(args.rows, thread + 1, threads);
  for (int64_t row = share(args.rows, thread, threads); row < last; row += height) tile(row, min(height, last - row));
}

inline int64_t tile_height(const LayerArgs& args, int threads) {
  return tile_rows((args.rows + threads - 1) / threads, max(args.in_features, args.out_features));
}

template <class T>
void forward(const ForwardArgs& args) {
  using S = Acc<T>;
  const int threads = useful_threads(args, 1);
  const int64_t K = args.rank, height = tile_height(args, threads);
  Buffer<S> encoder_bias, decoder_bias, encoder_data, decoder_data;
  load_bias<T>(args.encoder_bias, K, encoder_bias);
  load_bias<T>(args.decoder_bias, args.out_features, decoder_bias);
  const Panels<S> encoder = packed_panels(encoder_view<T>(args).transposed(), encoder_data);
  const Panels<S> decoder = packed_panels(decoder_view<T>(args).transposed(), decoder_data);
  parallel_for(threads, [&](int thread) {
    const int64_t stride = encoder.cols;
    Buffer<S> input_blocks(Blocks<S>::size(height, args.in_features)), code(height * stride);
    Buffer<S> code_blocks(Blocks<S>::size(height, K)), scratch(height * kOutputCols);
    for_each_tile(args, thread, threads, height, [&](int64_t first, int64_t rows) {
      const View<T> input = input_view<T>(args).slice(first, rows);
      fill_rows<S>(code, stride, round_up(rows, kTileRows), encoder_bias, K);
      multiply(pack_blocks(input, input_blocks), encoder, code, stride, Into::begin);
      for (int64_t r = 0; r < rows; ++r) {
        S* row = code + r * stride;
        if (args.preactivation)
          std::memcpy(static_cast<S*>(args.preactivation) + (first + r) * K, row, K * sizeof(S));
        // In place is fine: each element is read before it is written.
        activate<S>(args.activation, row, row, nullptr, K);
      }
      const Blocks<S> codes = pack_blocks<S>({code, stride, 1, rows, K}, code_blocks);
      expand(codes, rows, decoder, args.out_features, decoder_bias, scratch, [&](int64_t r, int64_t col, const S* values, int64_t n) {
        const T* x = input.data + r * input.row_stride + col;
        T* out = static_cast<T*>(args.output) + (first + r) * args.out_features + col;
        if (args.residual)
          for (int64_t j = 0; j < n; ++j) out[j] = store<T>(values[j] + load(x[j]));
        else
          for (int64_t j = 0; j < n; ++j) out[j] = store<T>(values[j]);
      });
    });
  });
}

template <class T>
void step_input_gradients(const InputGradientArgs& args) {
  using S = Acc<T>;
  const int threads = useful_threads(args, 1);
  const int64_t K = args.rank, height = tile_height(args, threads);
  const bool separate = args.target.data;
  const S scale = S(args.scale);
  // Without a target one product of inner width 2K does: [dU, −Z]·[We; Wdᵀ].
  const int64_t inner = separate ? K : 2 * K;
  Buffer<S> decoder_bias, input_data, target_data;
  load_bias<T>(args.decoder_bias, args.out_features, decoder_bias);
  Panels<S> input_weights{}, target_weights{};
  if (args.d_input) {
    input_data.allocate(Panels<S>::size(inner, args.in_features));
    input_weights = Panels<S>::over(input_data, inner, args.in_features);
    pack_panels(encoder_view<T>(args), input_weights);
    if (!separate) pack_panels(decoder_view<T>(args).transposed(), input_weights.below(K));
    zero_padding(input_weights, inner, args.in_features);
  }
  if (args.d_target) target_weights = packed_panels(decoder_view<T>(args).transposed(), target_data);
  parallel_for(threads, [&](int thread) {
    Buffer<S> left(height * inner), blocks(Blocks<S>::size(height, inner)), scratch(height * kOutputCols);
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
        const Blocks<S> a = pack_blocks<S>({left, inner, 1, rows, inner}, blocks);
        expand(a, rows, input_weights, args.in_features, nullptr, scratch, [&](int64_t r, int64_t col, const S* values, int64_t n) {
          const T* x = input.data + r * input.row_stride + col;
          T* out = static_cast<T*>(args.d_input) + (first + r) * args.in_features + col;
          const S* bias = decoder_bias + col;
          if (separate)
            for (int64_t j = 0; j < n; ++j) out[j] = store<T>(scale * values[j]);
          else
            for (int64_t j = 0; j < n; ++j) out[j] = store<T>(scale * (values[j] + (load(x[j]) - bias[j])));
        });
      }
      if (args.d_target) {
        const View<T> target = view<T>(args.target.data ? args.target : args.input, args.rows, args.out_features);
        const Blocks<S> a = pack_blocks<S>({code, K, 1, rows, K}, blocks);
        expand(a, rows, target_weights, args.out_features, nullptr, scratch, [&](int64_t r, int64_t col, const S* values, int64_t n) {
          const T* t = target.data + (first + r) * target.row_stride + col;
          T* out = static_cast<T*>(args.d_target) + (first + r) * args.out_features + col;
          const S* bias = decoder_bias + col;
          for (int64_t j = 0; j < n; ++j) out[j] = store<T>(scale * (load(t[j]) - bias[j] - values[j]));
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
    if (wants_slope) decoder = packed_panels(decoder_view<T>(args), decoder_data);
    if (args.d_input) encoder = packed_panels(encoder_view<T>(args), encoder_data);
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
    Buffer<S> encoder_sums, decoder_sums;      // dUᵀX transposed, [in_features, K], and dYᵀZ, in panels
    Buffer<double> slope_sum, grad_sum;        // Σ dU, Σ dY
  };

  void run_share(Worker& w, int thread) {
    const int64_t height = tile_height(args, threads);
    Buffer<S> grad_blocks(Blocks<S>::size(height, args.out_features)), slope(height * stride), code(height * stride);
    Buffer<S> slope_blocks(Blocks<S>::size(height, K)), panel_data(Panels<S>::size(height, K)), error(height * stride);
    Buffer<S> input_blocks, scratch;
    if (args.d_encoder_weight) {
      w.encoder_sums.allocate_zeros(Panels<S>::size(args.in_features, K));
      input_blocks.allocate(Blocks<S>::size(height, args.in_features));
    }
    if (wants_code) w.decoder_sums.allocate_zeros(Panels<S>::size(args.out_features, K));
    if (args.d_input) scratch.allocate(height * kOutputCols);
    w.slope_sum.allocate_zeros(K);
    w.grad_sum.allocate_zeros(args.out_features);
    for_each_tile(args, thread, threads, height, [&](int64_t first, int64_t rows) {
      const View<T> grad = view<T>(args.grad, args.rows, args.out_features).slice(first, rows);
      if (args.d_decoder_bias) add_rows(grad, w.grad_sum);
      if (!wants_code && !wants_slope) return;
      const Blocks<S> grads = pack_blocks(grad, grad_blocks);
      const S* u = static_cast<const S*>(args.preactivation) + first * K;
      for (int64_t r = 0; r < rows; ++r)
        activate(args.activation, u + r * K, code + r * stride, slope + r * stride, K);
      if (wants_code) multiply_transposed(grads, panels(code, rows, panel_data), sums(w.decoder_sums, args.out_features));
      if (!wants_slope) return;
      multiply(grads, decoder, error, stride);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < K; ++k) {
          slope[r * stride + k] *= error[r * stride + k];
          w.slope_sum[k] += double(slope[r * stride + k]);
        }
      if (args.d_encoder_weight)
        multiply_transposed(pack_blocks(input_view<T>(args).slice(first, rows), input_blocks),
                            panels(slope, rows, panel_data), sums(w.encoder_sums, args.in_features));
      if (!args.d_input) return;
      const Blocks<S> slopes = pack_blocks<S>({slope, stride, 1, rows, K}, slope_blocks);
      expand(slopes, rows, encoder, args.in_features, nullptr, scratch, [&](int64_t r, int64_t col, const S* values, int64_t n) {
        const T* g = grad.data + r * grad.row_stride + col;
        T* out = static_cast<T*>(args.d_input) + (first + r) * args.in_features + col;
        if (args.residual)
          for (int64_t j = 0; j < n; ++j) out[j] = store<T>(values[j] + load(g[j]));
        else
          for (int64_t j = 0; j < n; ++j) out[j] = store<T>(values[j]);
      });
    });
  }

  static void add_rows(const View<T>& rows, double* sum) {
    for (int64_t r = 0; r < rows.rows; ++r)
      for (int64_t j = 0; j < rows.cols; ++j) sum[j] += double(load(rows.data[r * rows.row_stride + j]));
  }

  Panels<S> panels(const S* matrix, int64_t rows, S* data) const {
    const Panels<S> result = Panels<S>::over(data, rows, K);
    pack_panels<S>({matrix, stride, 1, rows, K}, result);
    zero_padding(result, rows, K);
    return result;
  }

  Panels<S> sums(S* data, int64_t rows) const { return Panels<S>::over(data, rows, K); }

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
    Buffer<S> row(K);
    for (int64_t d = 0; args.d_encoder_weight && d < args.in_features; ++d) {
      sum_row(workers, row, d, true, tied);
      for (int64_t k = 0; k < K; ++k) static_cast<S*>(args.d_encoder_weight)[k * args.in_features + d] = row[k];
    }
    for (int64_t d = 0; args.d_decoder_weight && d < args.out_features; ++d)
      sum_row(workers, static_cast<S*>(args.d_decoder_weight) + d * K, d, false, true);
  }

  // Row d of the sums over threads, of the encoder's, the decoder's, or both.
  void sum_row(Worker* workers, S* row, int64_t d, bool of_encoder, bool of_decoder) const {
    for (int64_t k = 0; k < K; ++k) row[k] = S(0);
    for (int i = 0; i < threads; ++i) {
      if (of_encoder) add_row(row, K, workers[i].encoder_sums, args.in_features, K, d, 0, S(1));
      if (of_decoder) add_row(row, K, workers[i].decoder_sums, args.out_features, K, d, 0, S(1));
    }
  }

  const BackwardArgs& args;
  const bool tied, wants_code, wants_slope;
  const int threads;
  const int64_t K, stride;
  Buffer<S> decoder_data, encoder_data;
  Panels<S> decoder{}, encoder{};
};

}  // namespace byol::BYOL_ISA
