// The training step: Σ R² of a bottleneck and, times c, the gradients of ½ Σ R², X read once, the reconstruction never built.
//
//   U = X Weᵀ + be,  Z = f(U),  A = T − bd,  R = Z Wdᵀ − A          (T is X when there is no target, Wd = Weᵀ when tied)
//
// Gram form, for each tile of rows:
//   Q = T Wd − bd Wd,  E = Z G − Q with G = Wdᵀ Wd,  Σ R² = Σ A² + Σ Z ⊙ (E − Q),  dU = E ⊙ f′(U)
//   dWe = dUᵀ X,  dWd = RᵀZ,  dbe = Σ dU,  dbd = Σ r = Wd Σz − Σ a
// RᵀZ would be Wd (ZᵀZ) − TᵀZ + bd (Σz)ᵀ. But where codes have a mean, these terms grow with the number of rows, and what is
// left of them only with its root. So Z = Y + 1 mᵀ is split, m being near the mean code:
//   dWd = RᵀY + (Σ r) mᵀ = Wd (YᵀY + m (Σy)ᵀ) − TᵀY + bd (Σy)ᵀ + (Σ r) mᵀ
// When T is X, U and Q are one product X·[Weᵀ, Wd] and the weight gradients are one product Xᵀ·[Y, dU]; tied weights need
// no second half: Q follows from U, and TᵀY and dUᵀX are one product Xᵀ·(dU − Y).
//
// Tiles whose Σ R² < τ Σ T², or τ Σ A², take the direct form (direct.h), for there the Gram form would cancel. After such a
// tile, the next one does not try the Gram form first: it is right in either, and most often like the one before.
#pragma once

#include "abi.h"
#include "activation.h"
#include "direct.h"
#include "operands.h"
#include "parallel_for.h"
#include "statistics.h"
#include "step_weights.h"

#include <type_traits>

namespace byol::BYOL_ISA {

// τ. The Gram form's relative error in Σ R² is about 4e-8/ρ in float and 5e-16/ρ in double on small problems, less on large
// ones. Half-precision inputs are so coarse that the Gram form in float is always more accurate than eager.
template <class T>
constexpr double kDirectBelow = sizeof(T) == 8 ? 1e-3 : sizeof(T) == 4 ? 4e-3 : 0.0;

// In float, sums over many rows lose digits in ways that do not average out: terms of dWd grow with the rows where dWd, of
// residuals that are noise, grows with their root, and all rows share G's rounding. With ρ the missed part of the energy, no
// thread sums more than kSummed·√ρ rows before it carries the sums into double; with more than kInFloat·ρ rows in all, dWd is put
// together in double; and with more than kRounded·ρ each row is given back what rounding took from G.
constexpr double kSummed = 12e3, kInFloat = 40e3, kRounded = 160e3;

// One of so many rows tells where the codes are centred; a thread that has less than half a block of these does without.
constexpr int64_t kSampled = 128;

template <class T>
class Step {
  using S = Acc<T>;
 public:
  explicit Step(const StepArgs& args)
      : args(args),
        tied(!args.decoder_weight.data),
        separate(args.target.data),
        joint(!tied && !separate),
        // Tied weights have one gradient, which wants what both would want.
        wants_code(tied ? args.d_encoder_weight : args.d_decoder_weight),
        wants_slope(args.d_encoder_weight || args.d_encoder_bias || args.code_gradient),
        curved(wants_slope && args.activation != Activation::identity),
        threads(useful_threads(args, 2)),
        K(args.rank),
        c(2 * args.scale),
        weights(args) {}

  double run() {
    Worker* workers = new Worker[threads];
    double total = 0;
    Missed missed;
    try {
      parallel_for(threads, [&](int thread) { run_share(workers[thread], thread); });
      for (int i = 0; i < threads; ++i) {
        total += workers[i].total;
        missed.add(workers[i].missed.squared_error, workers[i].missed.energy);
      }
      exceeds(kInFloat, missed) ? finish<double>(workers) : finish<S>(workers);
    } catch (...) {
      delete[] workers;
      throw;
    }
    delete[] workers;
    return total;
  }

 private:
  // Of the Gram tiles so far.
  struct Missed {
    double squared_error = 0, energy = 0;  // Σ R², and what it may not be too small a part of

    void add(double more_error, double more_energy) { squared_error += more_error, energy += more_energy; }
    double ratio() const { return energy > 0 ? squared_error / energy : 1; }
  };

  static bool carries(int64_t rows, const Missed& missed) {
    return sizeof(T) == 4 && double(rows) * double(rows) > kSummed * kSummed * missed.ratio();
  }
  bool exceeds(double limit, const Missed& missed) const {
    return sizeof(T) == 4 && double(args.rows) > limit * missed.ratio();
  }

  // What one thread owns.
  struct Worker {
    double total = 0;                                           // Σ R²
    Missed missed;
    int64_t summed = 0;                                         // rows of Gram tiles since sums were carried
    bool expects_direct = false;                                // of the next tile
    Left<T> input, target;                                      // packed tiles of X and T
    NearLeft<Code<T>> left_code;                                // Z, then Y
    Values<T> values, target_values;                            // V, the right operands of Xᵀ·V and Tᵀ·V
    Values<Code<T>> code_values;                                // Y
    Buffer<S> product, target_product, code, slope, error;
    Sums<T> input_sums, target_sums;                            // Xᵀ·V, Tᵀ·V
    Sums<Code<T>> code_products;                                // YᵀY
    Buffer<S> centre;                                           // m
    Buffer<double> code_sum, centred_sum, slope_sum;            // Σz, Σy, Σ dU
    Statistics<T, Left<T>::kBlockRows, Left<T>::kBlockCols> statistics;  // Σ A² of a tile, Σa
    Buffer<double> tile_code_sum;                               // Σz of one tile
    Buffer<S> lost;                                             // Z times G's rounding
    Buffer<double> cross;                                       // Σ z ⊙ (e − q) of one tile
    Direct<T> direct;                                           // of tiles where the Gram form would cancel
  };

  static_assert(kResidualCols % kWeightRows == 0, "rows of Wd that are taken at a time belong to one block of the direct form");

  struct Tile {
    int64_t first, rows, next;  // first row, rows, and rows of the tile that follows
  };

  View<T> target_view() const {
    return separate ? view<T>(args.target, args.rows, args.out_features) : input_view<T>(args);
  }

  // ------------------------------------------------------------------------------------------- once per thread

  void run_share(Worker& w, int thread) {
    const int64_t first = share(args.rows, thread, threads), last = share(args.rows, thread + 1, threads);
    const int64_t height = tile_rows<T>(last - first, max(args.in_features, args.out_features), K);
    [[maybe_unused]] const MatrixUnit unit;
    allocate(w, height);
    const int64_t count = last - first, samples = min(pad_rows<T>(count / kSampled), height);
    if (wants_code && count >= kSampled / 2 * kTileRows) choose_centre(w, first, count, samples, height);
    w.expects_direct = args.form == Form::direct;
    for (int64_t row = first; row < last; row += height) {
      const int64_t rows = min(height, last - row);
      run_tile(w, {row, rows, min(height, last - row - rows)});
    }
  }

  static void carry(Worker& w) { w.input_sums.carry(), w.target_sums.carry(), w.code_products.carry(), w.summed = 0; }

  int64_t code_stride() const { return weights.gram_weights.padded_cols(); }
  // V for the input: the columns of Y (unless tied or separate), then those of dU, as far as they are wanted.
  int64_t slope_column() const { return joint && wants_code ? K : 0; }
  int64_t input_width() const {
    const int64_t codes = joint && wants_code ? K : 0;
    const int64_t slopes = args.d_encoder_weight ? K : 0;
    return codes + slopes;
  }

  void allocate(Worker& w, int64_t height) {
    const int64_t code_size = round_up(height, kTileRows) * code_stride();
    w.input.allocate(height, args.in_features);
    w.product.allocate(height * weights.input_weights.padded_cols());
    w.code.allocate(code_size);
    w.error.allocate(code_size);
    if (curved) w.slope.allocate(code_size);
    w.left_code.allocate(height, K);
    if (separate) {
      w.target.allocate(height, args.out_features);
      w.target_product.allocate(height * weights.target_weights.padded_cols());
    }
    if (input_width()) {
      w.values.allocate(height, input_width());
      w.input_sums.allocate(args.in_features, input_width());
    }
    if (separate && wants_code) {
      w.target_values.allocate(height, K);
      w.target_sums.allocate(args.out_features, K);
    }
    if (wants_code) {
      w.code_values.allocate(height, K);
      w.code_products.allocate(K, K);
      w.centre.allocate_zeros(K);
      w.centred_sum.allocate_zeros(K);
    }
    w.statistics.allocate(weights.decoder_bias, args.out_features);
    w.code_sum.allocate_zeros(K);
    w.tile_code_sum.allocate(K);
    w.lost.allocate(sizeof(T) == 4 ? code_size : K);
    w.cross.allocate(K);
    w.slope_sum.allocate_zeros(K);
  }

  // m: the mean code of a few rows from all over a thread's share.
  void choose_centre(Worker& w, int64_t first, int64_t count, int64_t samples, int64_t height) const {
    View<T> rows = input_view<T>(args).slice(first, samples);
    rows.row_stride *= count / samples;
    w.input.pack(rows, visit_nothing);
    multiply_input(w, K, input_view<T>(args).slice(first, min(height, count)));
    for (int64_t r = 0; r < samples; ++r) {
      activate<S>(args.activation, w.product + r * weights.input_weights.padded_cols(), w.code, nullptr, K);
      for (int64_t k = 0; k < K; ++k) w.centre[k] += w.code[k] / S(samples);
    }
  }

  // --------------------------------------------------------------------------------------------- once per tile

  void run_tile(Worker& w, const Tile& tile) {
    const View<T> inputs = input_view<T>(args).slice(tile.first, tile.rows);
    const View<T> targets = target_view().slice(tile.first, tile.rows);
    const View<T> next_inputs = input_view<T>(args).slice(tile.first + tile.rows, tile.next);
    const auto measure = [&](int64_t row, int64_t col) { w.statistics.add(targets, row, col); };
    w.statistics.begin_tile();
    if (separate) {
      w.input.pack(inputs, visit_nothing);
      w.target.pack(targets, measure);
    } else {
      w.input.pack(inputs, measure);
    }
    multiply_input(w, w.expects_direct ? K : weights.input_weights.padded_cols(), next_inputs);
    encode(w, tile);
    const Energy energy = w.statistics.energy(tile.rows);
    const bool direct = w.expects_direct || !gram_loss(w, tile, energy);
    if (direct) {
      const double squared_error =
          w.direct.run(args, weights.decoder_bias, targets, code(w, tile.rows), wants_code, w.error, code_stride());
      w.total += squared_error;
      w.expects_direct = takes_direct(energy, squared_error);
    }
    if (wants_slope) finish_slope(w, tile);
    accumulate(w, tile, direct);
  }

  // U, in the first `cols` columns, and what else of X·[Weᵀ, Wd] is wanted.
  void multiply_input(Worker& w, int64_t cols, const View<T>& next) const {
    const int64_t width = weights.input_weights.padded_cols();
    w.input.multiply(weights.input_weights, 0, cols, w.product, width, Into::store, next, weights.product_start);
  }

  // Z = f(U) and, where it is not 1, f′(U).
  void encode(Worker& w, const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const S* product = w.product + r * weights.input_weights.padded_cols();
      activate(args.activation, product, w.code + r * code_stride(), curved ? w.slope + r * code_stride() : nullptr, K);
      if (args.code) std::memcpy(static_cast<S*>(args.code) + (tile.first + r) * K, w.code + r * code_stride(), K * sizeof(S));
    }
  }

  // Makes E = Z G − Q and adds the tile's Σ R²; false when the direct form has to do the tile instead.
  bool gram_loss(Worker& w, const Tile& tile, const Energy& energy) {
    if (separate)
      w.target.multiply(weights.target_weights, 0, K, w.target_product, weights.target_weights.padded_cols(), Into::store,
                        target_view().slice(tile.first + tile.rows, tile.next));
    w.left_code.take(code(w, tile.rows));
    w.left_code.multiply(weights.gram_weights, 0, K, w.error, code_stride(), Into::store);
    const S* products = separate ? w.target_product : w.product + (joint ? K : 0);
    const int64_t stride = separate ? weights.target_weights.padded_cols() : weights.input_weights.padded_cols();
    sum_codes(w, tile);
    const View<S> lost = multiply_lost(w, tile);
    for (int64_t k = 0; k < K; ++k) w.cross[k] = 0;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const S* product = products + r * stride;
      const S *z = w.code + r * code_stride(), *low = lost.row(r);
      S* e = w.error + r * code_stride();
#pragma GCC ivdep
      for (int64_t k = 0; k < K; ++k) {
        const double q = double(product[k]) - weights.code_offset[k], error = double(e[k]) + low[k] - q;
        e[k] = S(error);
        w.cross[k] += double(z[k]) * (error - q);
      }
    }
    double squared_error = energy.centred;
    for (int64_t k = 0; k < K; ++k) squared_error += w.cross[k];
    if (takes_direct(energy, squared_error)) return false;
    w.total += squared_error;
    w.missed.add(squared_error, most(energy));
    return true;
  }

  // Q and TᵀZ are made of T, biases and all, Σ R² of A: of neither may the residual be too small a part.
  static double most(const Energy& energy) { return energy.raw > energy.centred ? energy.raw : energy.centred; }
  bool takes_direct(const Energy& energy, double squared_error) const {
    return args.form == Form::direct || (args.form == Form::automatic && squared_error < kDirectBelow<T> * most(energy));
  }

  // Σ z of the tile.
  void sum_codes(Worker& w, const Tile& tile) const {
    for (int64_t k = 0; k < K; ++k) w.tile_code_sum[k] = 0;
    add_rows(code(w, tile.rows), w.tile_code_sum);
  }

  // Z times what rounding took from G; where rows are few, of their mean, in all rows.
  View<S> multiply_lost(Worker& w, const Tile& tile) const {
    if (exceeds(kRounded, w.missed)) {
      w.left_code.multiply(weights.lost_weights, 0, K, w.lost, code_stride(), Into::store);
      return {w.lost, code_stride(), 1, tile.rows, K};
    }
    std::memset(w.lost, 0, K * sizeof(S));
    for (int64_t j = 0; j < K; ++j) {
      const S mean = S(w.tile_code_sum[j] / double(tile.rows));
      for (int64_t k = 0; k < K; ++k) w.lost[k] += mean * weights.lost[j * K + k];
    }
    return {w.lost, 0, 1, tile.rows, K};
  }

  // dU = E ⊙ f′(U), in the place of E.
  void finish_slope(Worker& w, const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      S* e = w.error + r * code_stride();
      for (int64_t k = 0; curved && k < K; ++k) e[k] *= w.slope[r * code_stride() + k];
      if (args.code_gradient) std::memcpy(static_cast<S*>(args.code_gradient) + (tile.first + r) * K, e, K * sizeof(S));
    }
    add_rows(slopes(w, tile.rows), w.slope_sum);
  }

  // The first rows of Z or, later, of Y.
  View<S> code(const Worker& w, int64_t rows) const { return {w.code, code_stride(), 1, rows, K}; }

  View<S> slopes(const Worker& w, int64_t rows) const { return {w.error, code_stride(), 1, rows, K}; }

  // Y, in the place of Z.
  void centre_codes(Worker& w, const Tile& tile) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      S* code = w.code + r * code_stride();
      for (int64_t k = 0; k < K; ++k) code[k] -= w.centre[k];
    }
    add_rows(code(w, tile.rows), w.centred_sum);
  }

  // The sums over rows. A direct tile has already given the decoder's share, as RᵀZ and Σ R.
  void accumulate(Worker& w, const Tile& tile, bool direct) {
    if (!direct) {
      if (carries(w.summed + tile.rows, w.missed)) carry(w);
      w.summed += tile.rows;
      for (int64_t k = 0; k < K; ++k) w.code_sum[k] += w.tile_code_sum[k];
      w.statistics.keep_tile();
      if (wants_code) {
        centre_codes(w, tile);
        w.left_code.take(code(w, tile.rows));
        fill(w.code_values, code(w, tile.rows));
        w.left_code.multiply_symmetric(w.code_values, w.code_products);
      }
      if (separate && wants_code) {
        fill(w.target_values, code(w, tile.rows));
        w.target.multiply_transposed(w.target_values, w.target_sums);
      }
    }
    if (!input_width()) return;
    fill_values(w, tile, direct);
    w.input.multiply_transposed(w.values, w.input_sums, direct ? slope_column() : 0);
  }

  // V = [Y, dU]; tied: dU − Y. In a direct tile Y counts as zero.
  void fill_values(Worker& w, const Tile& tile, bool direct) {
    w.values.shape(tile.rows, input_width());
    if (joint && wants_code) {
      if (direct)
        for (int64_t r = 0; r < tile.rows; ++r) std::memset(w.code + r * code_stride(), 0, K * sizeof(S));
      w.values.put(code(w, tile.rows));
    }
    if (args.d_encoder_weight) {
      if (tied && !separate && !direct)
        for (int64_t r = 0; r < tile.rows; ++r)
          for (int64_t k = 0; k < K; ++k) w.error[r * code_stride() + k] -= w.code[r * code_stride() + k];
      w.values.put(slopes(w, tile.rows), slope_column());
    }
    w.values.pad();
  }

  // ------------------------------------------------------------------------------------------- after all tiles

  // dWd is put together in numbers of type N.
  template <class N>
  void finish(Worker* workers) const {
    for (int i = 1; i < threads; ++i)
      for (int64_t k = 0; k < K; ++k) workers[0].slope_sum[k] += workers[i].slope_sum[k];
    if (args.d_encoder_bias)
      for (int64_t k = 0; k < K; ++k) static_cast<S*>(args.d_encoder_bias)[k] = S(c * workers[0].slope_sum[k]);
    // Of no rows, all sums are zero.
    if (input_width()) workers[0].input_sums.begin(false);
    Weights<N> code_products;
    if (wants_code) finish_code_products(workers, code_products);
    parallel_for(threads, [&](int thread) { finish_weights(workers, thread, code_products); });
  }

  // YᵀY + m (Σy)ᵀ, each thread having its own m.
  template <class N>
  void finish_code_products(Worker* workers, Weights<N>& code_products) const {
    Buffer<N> products;
    products.allocate_zeros(K * K);
    for (int i = 0; i < threads; ++i) workers[i].code_products.template add_rows<N>(products, K, {0, K, 0, K}, 1);
    // Summed on and above the diagonal.
    mirror<N>(products, K);
    for (int i = 0; i < threads; ++i)
      for (int64_t j = 0; j < K; ++j)
        for (int64_t k = 0; k < K; ++k) products[j * K + k] += N(double(workers[i].centre[j]) * workers[i].centred_sum[k]);
    load_weights(code_products, View<N>{products, K, 1, K, K});
  }

  template <class N>
  void finish_weights(Worker* workers, int thread, const Weights<N>& code_products) const {
    [[maybe_unused]] const MatrixUnit unit;
    const int64_t stride = code_products.padded_cols();
    Buffer<N> gradient(kWeightRows * stride), copied(kWeightRows * K), centred_sum;
    Buffer<double> residuals(kWeightRows * threads);
    Left<N> decoder;
    if (wants_code) {
      decoder.allocate(kWeightRows, K);
      centred_sum.allocate_zeros(K);
      for (int i = 0; i < threads; ++i)
        for (int64_t k = 0; k < K; ++k) centred_sum[k] += N(workers[i].centred_sum[k]);
    }
    const int64_t features = max(args.in_features, args.out_features), units = (features + kWeightRows - 1) / kWeightRows;
    for (int64_t unit = share(units, thread, threads); unit < share(units, thread + 1, threads); ++unit) {
      const int64_t first = unit * kWeightRows, outputs = min(kWeightRows, args.out_features - first);
      if (outputs > 0 && (wants_code || args.d_decoder_bias)) {
        const N* rows = decoder_rows<N>(first, outputs, copied);
        sum_residuals<N>(workers, first, outputs, rows, residuals);
        if (wants_code) {
          decoder.pack(View<N>{rows, K, 1, outputs, K}, visit_nothing);
          decoder.multiply(code_products, 0, K, gradient, stride, Into::store);
          decoder_gradient<N>(workers, first, outputs, residuals, centred_sum, gradient, stride);
        }
      }
      if (args.d_encoder_weight && first < args.in_features)
        encoder_gradient<N>(workers, first, min(kWeightRows, args.in_features - first), gradient, stride);
    }
  }

  // Rows first … first + count of Wd, one after the other: where they are, or a copy.
  template <class N>
  const N* decoder_rows(int64_t first, int64_t count, N* copied) const {
    const View<T> rows = decoder_view<T>(args).slice(first, count);
    if constexpr (std::is_same_v<T, N>)
      if (rows.row_stride == K && rows.col_stride == 1) return rows.data;
    copy<T, N>(rows, copied);
    return copied;
  }

  // Σ r = Wd Σz − Σ a of columns first … first + count, from each thread's Gram tiles; with those of direct tiles, dbd.
  // `decoder` holds these rows of Wd.
  template <class N>
  void sum_residuals(Worker* workers, int64_t first, int64_t count, const N* decoder, double* residuals) const {
    for (int64_t d = 0; d < count; ++d) {
      double total = 0;
      for (int i = 0; i < threads; ++i) {
        double& residual = residuals[d * threads + i];
        residual = dot(decoder + d * K, workers[i].code_sum, K) - workers[i].statistics.sum(first + d);
        total += residual + workers[i].direct.residual_sum(first + d);
      }
      if (args.d_decoder_bias) static_cast<S*>(args.d_decoder_bias)[first + d] = S(c * total);
    }
  }

  // Turns rows first … first + count of Wd (YᵀY + m (Σy)ᵀ) into those of dWd, which untied go to the caller.
  template <class N>
  void decoder_gradient(Worker* workers, int64_t first, int64_t count, const double* residuals, const N* centred_sum, N* gradient,
                        int64_t stride) const {
    const Region region{first, count, 0, K};
    for (int64_t d = 0; d < count; ++d) {
      N* row = gradient + d * stride;
      const N bias = weights.decoder_bias[first + d];
      for (int64_t k = 0; k < K; ++k) row[k] += bias * centred_sum[k];
      for (int i = 0; i < threads; ++i) {
        const N residual = N(residuals[d * threads + i]);
        for (int64_t k = 0; k < K; ++k) row[k] += residual * workers[i].centre[k];
      }
    }
    for (int i = 0; i < threads; ++i) {
      const Worker& w = workers[i];
      if (joint) w.input_sums.add_rows(gradient, stride, region, -1);
      if (separate) w.target_sums.add_rows(gradient, stride, region, -1);
      w.direct.add_code_sums(gradient, stride, first, count, K);
    }
    if (tied) return;
    S* out = static_cast<S*>(args.d_decoder_weight) + first * K;
    for (int64_t d = 0; d < count; ++d)
      for (int64_t k = 0; k < K; ++k) out[d * K + k] = S(N(c) * gradient[d * stride + k]);
  }

  // Columns first … first + count of dWe = dUᵀX; tied: of the sum of both roles, of which `rows` holds the decoder's.
  template <class N>
  void encoder_gradient(Worker* workers, int64_t first, int64_t count, const N* rows, int64_t stride) const {
    S* out = static_cast<S*>(args.d_encoder_weight) + first;
    for (int64_t k = 0; tied && k < K; ++k)
      for (int64_t d = 0; d < count; ++d) out[k * args.in_features + d] = S(N(c) * rows[d * stride + k]);
    for (int i = 0; i < threads; ++i)
      workers[i].input_sums.add_columns(out, args.in_features, {first, count, slope_column(), K}, c,
                                       tied || i > 0 ? Into::add : Into::store);
  }

  const StepArgs& args;
  const bool tied, separate, joint, wants_code, wants_slope, curved;
  const int threads;
  const int64_t K;
  const double c;
  const StepWeights<T> weights;
};

}  // namespace byol::BYOL_ISA
