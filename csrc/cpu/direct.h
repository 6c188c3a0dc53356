// The direct form of the step, for a tile of rows whose residual is so small a part of T that the Gram form would cancel:
//
//   R = Z Wdᵀ + bd − T in blocks of columns,  Σ R²,  E = R Wd,  dWd += Rᵀ Z,  dbd += Σ R
#pragma once

#include "abi.h"
#include "operands.h"

namespace byol::BYOL_ISA {

// Columns of R that are formed at a time.
constexpr int64_t kResidualCols = 32 * kTileRows;

// What one thread needs for its direct tiles; nothing is allocated before the first.
template <class T>
class Direct {
  using S = Acc<T>;

 public:
  ~Direct() { delete[] blocks_; }

  // Σ R² of a tile of targets; stores E, row-major with row stride `stride`, and adds to RᵀZ, if wanted, and to Σ R.
  double run(const StepArgs& args, const S* bias, const View<T>& targets, const View<S>& code, bool wants_code, S* error,
             int64_t stride) {
    // No later tile has more rows.
    if (!blocks_) prepare(args, code.rows, wants_code);
    left_code_.pack(code, visit_nothing);
    if (wants_code) fill(code_values_, code);
    double total = 0;
    for (int64_t col = 0; col < args.out_features; col += kResidualCols) {
      const int64_t cols = min(kResidualCols, args.out_features - col);
      Block& block = blocks_[col / kResidualCols];
      left_code_.multiply(rows_, col, cols, residual_, kResidualCols, Into::store);
      std::memset(squares_, 0, cols * sizeof(double));
      for (int64_t r = 0; r < targets.rows; ++r) subtract(targets.row(r) + col, bias + col, r, col, cols);
      for (int64_t j = 0; j < cols; ++j) total += squares_[j];
      left_.pack(View<S>{residual_, kResidualCols, 1, targets.rows, cols}, visit_nothing);
      left_.multiply(block.decoder, 0, args.rank, error, stride, col > 0 ? Into::add : Into::store);
      if (wants_code) left_.multiply_transposed(code_values_, block.code_sums);
    }
    return total;
  }

  // out[i·stride + k] += row first + i of RᵀZ, of so many rows, none of another block; nothing when no tile was direct.
  template <class Out>
  void add_code_sums(Out* out, int64_t stride, int64_t first, int64_t count, int64_t rank) const {
    if (blocks_) blocks_[first / kResidualCols].code_sums.add_rows(out, stride, {first % kResidualCols, count, 0, rank}, 1);
  }
  // Σ R of one column.
  double residual_sum(int64_t col) const { return residual_sum_ ? residual_sum_[col] : 0.0; }

 private:
  // What belongs to a block of columns: rows of Wd and of RᵀZ.
  struct Block {
    Weights<S> decoder;
    Sums<S> code_sums;
  };

  void prepare(const StepArgs& args, int64_t height, bool wants_code) {
    const View<T> decoder = decoder_view<T>(args);
    const int64_t blocks = (args.out_features + kResidualCols - 1) / kResidualCols;
    blocks_ = new Block[blocks];
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = i * kResidualCols, count = min(kResidualCols, args.out_features - first);
      load_weights(blocks_[i].decoder, decoder.slice(first, count));
      if (wants_code) blocks_[i].code_sums.allocate(count, args.rank);
    }
    if (wants_code) code_values_.allocate(height, args.rank);
    load_weights(rows_, decoder.transposed());
    left_code_.allocate(height, args.rank);
    left_.allocate(height, kResidualCols);
    residual_sum_.allocate_zeros(args.out_features);
    squares_.allocate(kResidualCols);
    residual_.allocate(pad_rows<S>(height) * kResidualCols);
  }

  // Turns the columns of row r of Z Wdᵀ into R.
  void subtract(const T* t, const S* bias, int64_t r, int64_t col, int64_t cols) {
    S* residual = residual_ + r * kResidualCols;
    double *sums = residual_sum_ + col, *squares = squares_;
#pragma GCC ivdep
    for (int64_t j = 0; j < cols; ++j) {
      // In double: a bias may be much larger than the residual, and must cost it no digits.
      residual[j] = S(double(residual[j]) + (double(bias[j]) - double(load(t[j]))));
      squares[j] += double(residual[j]) * double(residual[j]);
      sums[j] += double(residual[j]);
    }
  }

  Block* blocks_ = nullptr;
  Weights<S> rows_;                 // Wdᵀ
  Left<S> left_code_, left_;        // Z, R
  Values<S> code_values_;           // Z
  Buffer<S> residual_;              // a block of R
  Buffer<double> residual_sum_;     // Σ R
  Buffer<double> squares_;          // Σ R² of each column of a block
};

}  // namespace byol::BYOL_ISA
