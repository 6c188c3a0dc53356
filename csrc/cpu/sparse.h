// The training step of a sparse X in CSR form (T is X), without a dense row: Σ R² and, times c, the gradients of ½ Σ R².
//
//   Q = X Wd − bd Wd,  E = Z G − Q,  Σ R² = Σ A² + Σ Z ⊙ (E − Q),  Σ A² = Σ stored ((x − bd)² − bd²) + N ‖bd‖²
//   dWe = dUᵀ X,  dWd = Wd (ZᵀZ) − XᵀZ + bd (Σz)ᵀ,  dbe = Σ dU,  dbd = Wd Σz + N bd − Σ x
//
// Rows first: each gathers the rows of [Weᵀ, Wd] at its stored columns. U, Q, E and the loss are formed in double; the
// memory traffic, which decides, is the same. The caller turns to the direct form on dense rows when Σ R² is so small a
// share of Σ A² that even this cancels.
// Columns second: a copy of X by columns gathers the rows of V = [Z, dU] (tied: dU − Z), so every sum has one owner.
#pragma once

#include "abi.h"
#include "activation.h"
#include "gram.h"
#include "operands.h"
#include "parallel_for.h"

namespace byol::BYOL_ISA {

// Columns of a gathered sum are formed kGather vectors at a time, in registers.
constexpr int kGather = kTileRows >= 12 ? 8 : 4;
// Terms after which a float sum is moved to double.
constexpr int64_t kTerms = 4096;
// How far ahead of the sum the rows are fetched: they lie anywhere.
constexpr int64_t kAhead = 12;

template <class S>
constexpr int64_t kGatherCols = kGather * kLanes<S>;

// sums[0…width] += Σ values[i] · rows[index[i]·width …], summed in type S; width is a multiple of kGatherCols<S>. The index has
// `left` entries: the next sum goes on there, and its first rows are fetched, too.
template <class S, class M>
void gather(const S* values, const int64_t* index, int64_t count, int64_t left, const M* rows, int64_t width, double* sums) {
  typedef S Vector __attribute__((vector_size(BYOL_VECTOR_BYTES)));
  typedef M Source __attribute__((vector_size(kLanes<S> * sizeof(M)), aligned(alignof(M)), may_alias));
  for (int64_t first = 0; first < width; first += kGatherCols<S>) {
    Vector sum[kGather] = {};
    const int64_t after = first + kGatherCols<S>;
    const auto ahead = [&](int64_t i) {
      if (i < count) return rows + index[i] * width + first;
      return after < width ? rows + index[min(i - count, count - 1)] * width + after : rows + index[min(i, left - 1)] * width;
    };
    for (int64_t i = 0; i < count; ++i) {
      const M* next = ahead(i + kAhead);
#pragma GCC unroll 16
      for (int64_t line = 0; line < kGatherCols<S>; line += 64 / int64_t(sizeof(M))) __builtin_prefetch(next + line);
      const Source* row = reinterpret_cast<const Source*>(rows + index[i] * width + first);
#pragma GCC unroll 16
      for (int j = 0; j < kGather; ++j) sum[j] += values[i] * __builtin_convertvector(row[j], Vector);
    }
    for (int j = 0; j < kGather; ++j)
      for (int lane = 0; lane < kLanes<S>; ++lane) sums[first + j * kLanes<S> + lane] += double(sum[j][lane]);
  }
}

// Features that are transposed at a time: a cache line of each unit's.
constexpr int64_t kStrip = 16;

template <class T>
class SparseStep {
  using S = Acc<T>;

 public:
  explicit SparseStep(const SparseArgs& args)
      : args(args),
        tied(!args.decoder_weight.data),
        wants_code(tied ? args.d_encoder_weight : args.d_decoder_weight),
        threads(int(max(1, min(args.threads, args.rows)))),
        K(args.rank),
        D(args.in_features),
        c(2 * args.scale),
        width(round_up(tied ? K : 2 * K, kGatherCols<S>)),
        code_stride(round_up(K, kCols<double>)) {}

  SparseSums run() {
    prepare();
    const bool wants_columns = args.d_encoder_weight || wants_code || args.d_decoder_bias;
    if (wants_columns) values.allocate_zeros(args.rows * width);
    Worker* workers = new Worker[threads];
    SparseSums sums{};
    try {
      parallel_for(threads, [&](int thread) { run_rows(workers[thread], thread); });
      for (int i = 0; i < threads; ++i) {
        sums.squared_error += workers[i].energy + workers[i].cross;
        sums.energy += workers[i].energy;
      }
      merge(workers);
      if (wants_columns) {
        transpose();
        parallel_for(threads, [&](int thread) { run_columns(workers[0], thread); });
      }
    } catch (...) {
      delete[] workers;
      throw;
    }
    delete[] workers;
    return sums;
  }

 private:
  struct Worker {
    double energy = 0, cross = 0;                       // Σ A², Σ Z ⊙ (E − Q)
    Buffer<double> code_products, code_sum, slope_sum;  // ZᵀZ, Σz, Σ dU
  };

  const T* stored() const { return static_cast<const T*>(args.values); }

  int64_t longest_row() const {
    int64_t longest = 0;
    for (int64_t row = 0; row < args.rows; ++row) longest = max(longest, args.row_starts[row + 1] - args.row_starts[row]);
    return longest;
  }

  // [Weᵀ, Wd] (tied: Weᵀ) row-major, G = Wdᵀ Wd, bd·Wd and ‖bd‖².
  void prepare() {
    const View<T> encoder = encoder_view<T>(args), decoder = decoder_view<T>(args);
    load_bias<T>(args.encoder_bias, K, encoder_bias);
    load_bias<T>(args.decoder_bias, D, decoder_bias);
    weights.allocate(D * width);
    for (int64_t d = 0; d < D; ++d) bias_energy += double(decoder_bias[d]) * double(decoder_bias[d]);
    bias_code.allocate_zeros(K);
    const Buffer<double> products(K * K);
    gram(View<S>{decoder_row(0), width, 1, D, K}, args.decoder_bias ? static_cast<const S*>(decoder_bias) : nullptr, D, args.threads,
         products, bias_code, [&](int64_t first, int64_t count) {
           for (int64_t strip = first; strip < first + count; strip += kStrip)
             copy_weights(encoder, decoder, strip, min(strip + kStrip, first + count));
         });
    load_weights(gram_weights, View<double>{products, K, 1, K, K});
  }

  // Rows first … last of [Weᵀ, Wd], zeros after it.
  void copy_weights(const View<T>& encoder, const View<T>& decoder, int64_t first, int64_t last) const {
    std::memset(weights + first * width, 0, (last - first) * width * sizeof(S));
    for (int64_t k = 0; k < K; ++k)
      for (int64_t d = first; d < last; ++d) weights[d * width + k] = load(encoder.data[k * encoder.row_stride + d]);
    for (int64_t d = first; !tied && d < last; ++d)
      for (int64_t k = 0; k < K; ++k) weights[d * width + K + k] = load(decoder.data[d * decoder.row_stride + k]);
  }

  // Row d of Wd.
  const S* decoder_row(int64_t d) const { return weights + d * width + (tied ? 0 : K); }

  // ------------------------------------------------------------------------------------------------------ rows

  void run_rows(Worker& w, int thread) {
    constexpr int64_t kRows = 8 * kTileRows;
    w.code_products.allocate_zeros(Panels<double>::size(K, K));
    w.code_sum.allocate_zeros(K);
    w.slope_sum.allocate_zeros(K);
    Buffer<double> product(kRows * width), code(kRows * code_stride), slope(kRows * code_stride), error(kRows * code_stride);
    Buffer<double> block_data(Blocks<double>::size(kRows, K)), panel_data(Panels<double>::size(kRows, K)), entries(longest_row());
    const int64_t last = share(args.rows, thread + 1, threads);
    for (int64_t first = share(args.rows, thread, threads); first < last; first += kRows) {
      const int64_t rows = min(kRows, last - first);
      for (int64_t r = 0; r < rows; ++r)
        w.energy += encode(first + r, product + r * width, code + r * code_stride, slope + r * code_stride, entries);
      const View<double> codes{code, code_stride, 1, rows, K};
      const Blocks<double> blocks = pack_blocks<double>(codes, block_data);
      multiply(blocks, gram_weights.panels(), error, code_stride);
      for (int64_t r = 0; r < rows; ++r)
        w.cross += finish_row(w, first + r, product + r * width, code + r * code_stride, slope + r * code_stride,
                              error + r * code_stride);
      if (!wants_code) continue;
      const Panels<double> panels = Panels<double>::over(panel_data, rows, K);
      pack_panels(codes, panels);
      zero_padding(panels, rows, K);
      multiply_transposed(blocks, panels, Panels<double>::over(w.code_products, K, K), Into::add);
    }
  }

  // X·[Weᵀ, Wd] of one row, Z and f′(U); returns Σ A² of the row.
  double encode(int64_t row, double* product, double* code, double* slope, double* entries) const {
    const int64_t begin = args.row_starts[row], count = args.row_starts[row + 1] - begin;
    double energy = bias_energy;
    for (int64_t i = 0; i < count; ++i) {
      const double x = double(load(stored()[begin + i])), bias = double(decoder_bias[args.columns[begin + i]]);
      entries[i] = x;
      energy += x * (x - 2 * bias);
    }
    std::memset(product, 0, width * sizeof(double));
    gather<double>(entries, args.columns + begin, count, args.row_starts[args.rows] - begin, static_cast<const S*>(weights), width,
                   product);
    for (int64_t k = 0; k < K; ++k) code[k] = product[k] + double(encoder_bias[k]);
    activate<double>(args.activation, code, code, slope, K);
    return energy;
  }

  // E and dU of one row; stores V and returns Σ Z ⊙ (E − Q).
  double finish_row(Worker& w, int64_t row, const double* product, const double* code, double* slope, const double* error) {
    const double* products = product + (tied ? 0 : K);
    double cross = 0;
    for (int64_t k = 0; k < K; ++k) {
      const double q = products[k] - bias_code[k], e = error[k] - q;
      cross += code[k] * (e - q);
      slope[k] *= e;
      w.slope_sum[k] += slope[k];
      w.code_sum[k] += code[k];
    }
    if (values) {
      S* v = values + row * width;
      for (int64_t k = 0; k < K; ++k) {
        v[k] = tied ? S(slope[k] - code[k]) : S(code[k]);
        if (!tied) v[K + k] = S(slope[k]);
      }
    }
    return cross;
  }

  void merge(Worker* workers) {
    for (int i = 1; i < threads; ++i) {
      for (int64_t j = 0; j < Panels<double>::size(K, K); ++j) workers[0].code_products[j] += workers[i].code_products[j];
      for (int64_t k = 0; k < K; ++k) {
        workers[0].code_sum[k] += workers[i].code_sum[k];
        workers[0].slope_sum[k] += workers[i].slope_sum[k];
      }
    }
    if (args.d_encoder_bias)
      for (int64_t k = 0; k < K; ++k) static_cast<S*>(args.d_encoder_bias)[k] = S(c * workers[0].slope_sum[k]);
  }

  // --------------------------------------------------------------------------------------------------- columns

  // X by columns: a counting sort, which keeps the rows of a column in order. Each thread goes through all of X for its share.
  void transpose() {
    const int64_t stored_count = args.row_starts[args.rows];
    column_starts.allocate_zeros(D + 1);
    column_rows.allocate(stored_count);
    column_values.allocate(stored_count);
    const Buffer<int64_t> next(D);
    parallel_for(threads, [&](int thread) {
      const int64_t first = share(D, thread, threads), last = share(D, thread + 1, threads);
      int64_t place = 0;
      for (int64_t i = 0; i < stored_count; ++i) {
        const int64_t col = args.columns[i];
        place += col < first;
        if (col >= first && col < last) ++column_starts[col + 1];
      }
      for (int64_t col = first; col < last; ++col) {
        next[col] = place;
        place += column_starts[col + 1];
        column_starts[col + 1] = place;
      }
      for (int64_t row = 0; row < args.rows; ++row)
        for (int64_t i = args.row_starts[row]; i < args.row_starts[row + 1]; ++i) {
          const int64_t col = args.columns[i];
          if (col < first || col >= last) continue;
          column_rows[next[col]] = row;
          column_values[next[col]++] = load(stored()[i]);
        }
    });
  }

  // The weights' gradients of a thread's share of the columns; `sums` holds ZᵀZ and Σz.
  void run_columns(const Worker& sums, int thread) {
    constexpr int64_t kRows = 8 * kTileRows;
    const Panels<double> code_products = Panels<double>::over(sums.code_products, K, K);
    Buffer<double> tile(kRows * K), block_data(Blocks<double>::size(kRows, K)), decoded(kRows * code_stride), column(width);
    Buffer<S> encoded(kRows * K);
    const int64_t last = share(D, thread + 1, threads);
    for (int64_t first = share(D, thread, threads); first < last; first += kRows) {
      const int64_t count = min(kRows, last - first);
      if (wants_code) {
        for (int64_t d = 0; d < count; ++d)
          for (int64_t k = 0; k < K; ++k) tile[d * K + k] = double(decoder_row(first + d)[k]);
        multiply(pack_blocks<double>(View<double>{tile, K, 1, count, K}, block_data), code_products, decoded, code_stride);
      }
      for (int64_t d = 0; d < count; ++d) finish_column(sums, first + d, decoded + d * code_stride, column, encoded + d * K);
      for (int64_t k = 0; args.d_encoder_weight && k < K; ++k)
        for (int64_t d = 0; d < count; ++d)
          static_cast<S*>(args.d_encoder_weight)[k * D + first + d] = encoded[d * K + k];
    }
  }

  void finish_column(const Worker& sums, int64_t d, const double* decoded, double* column, S* encoded) {
    const int64_t begin = column_starts[d], end = column_starts[d + 1];
    std::memset(column, 0, width * sizeof(double));
    for (int64_t i = begin; i < end; i += kTerms)
      gather<S>(column_values + i, column_rows + i, min(kTerms, end - i), column_starts[D] - i, static_cast<const S*>(values), width,
                column);
    const double bias = double(decoder_bias[d]);
    for (int64_t k = 0; k < K; ++k) {
      const double decoder_part = wants_code ? decoded[k] + bias * sums.code_sum[k] : 0;
      // Tied, V has −Z in it already.
      const double encoder_part = tied ? column[k] + decoder_part : column[K + k];
      encoded[k] = S(c * encoder_part);
      if (args.d_decoder_weight) static_cast<S*>(args.d_decoder_weight)[d * K + k] = S(c * (decoder_part - column[k]));
    }
    if (!args.d_decoder_bias) return;
    double sum = double(args.rows) * bias;
    for (int64_t k = 0; k < K; ++k) sum += double(decoder_row(d)[k]) * sums.code_sum[k];
    for (int64_t i = begin; i < end; ++i) sum -= double(column_values[i]);
    static_cast<S*>(args.d_decoder_bias)[d] = S(c * sum);
  }

  const SparseArgs& args;
  const bool tied, wants_code;
  const int threads;
  const int64_t K, D;
  const double c;
  const int64_t width, code_stride;
  double bias_energy = 0;
  Buffer<S> encoder_bias, decoder_bias, weights, values, column_values;
  Buffer<double> bias_code;
  Buffer<int64_t> column_starts, column_rows;
  Weights<double> gram_weights;  // G
};

}  // namespace byol::BYOL_ISA
