// The direct form of the step, for a tile of rows whose residual is so small a part of T that the Gram form would cancel:
//
//   R = Z Wdᵀ + bd − T in blocks of columns,  Σ R²,  E = R Wd,  dWd += Rᵀ Z,  dbd += Σ R
#pragma once

#include "abi.h"
#include "operands.h"
#include "product.h"

namespace byol::BYOL_ISA {

// Columns of R that are formed at a time.
constexpr int64_t kResidualCols = 32 * kTileRows;

// What one thread needs for its direct tiles; nothing is allocated before the first.
template <class T>
class Direct {
  using S = Acc<T>;

 public:
  // Σ R² of a tile of targets; stores E, row-major with row stride `stride`, and adds to RᵀZ, if wanted, and to Σ R.
  double run(const StepArgs& args, const S* bias, const View<T>& targets, const View<S>& code, bool wants_code, S* error,
             int64_t stride) {
    // No later tile has more rows.
    if (!residual_) prepare(args, code.rows, wants_code);
    const Blocks<S> left = pack_blocks(code, code_blocks_);
    const Panels<S> codes = pack_codes(code);
    const Panels<S> decoder = Panels<S>::over(decoder_panels_, args.out_features, args.rank);
    const Panels<S> rows = Panels<S>::over(decoder_rows_, args.rank, args.out_features);
    double total = 0;
    for (int64_t col = 0; col < args.out_features; col += kResidualCols) {
      const int64_t cols = min(kResidualCols, args.out_features - col);
      multiply(left, {rows.panel(col / kCols<S>), rows.rows, round_up(cols, kCols<S>)}, residual_, kResidualCols);
      for (int64_t r = 0; r < targets.rows; ++r) total += subtract(targets.row(r) + col, bias + col, r, col, cols);
      const Blocks<S> packed = pack_blocks<S>({residual_, kResidualCols, 1, targets.rows, cols}, blocks_);
      for (int64_t j = 0; j < decoder.count(); ++j) {
        const Panels<S> panel{decoder.row(col, j), packed.cols, kCols<S>};
        multiply(packed, panel, error + j * kCols<S>, stride, col > 0 ? Into::add : Into::store);
      }
      if (wants_code) multiply_transposed(packed, codes, code_sums_.below(col));
    }
    return total;
  }

  // RᵀZ; no panels when no tile was direct, or it is not wanted.
  const Panels<S>& code_sums() const { return code_sums_; }
  // Σ R of one column.
  double residual_sum(int64_t col) const { return residual_sum_ ? residual_sum_[col] : 0.0; }

 private:
  void prepare(const StepArgs& args, int64_t height, bool wants_code) {
    const View<T> decoder = decoder_view<T>(args);
    // A block of R ends on a whole panel of Wdᵀ and a whole block of Wd.
    static_assert(kResidualCols % kCols<S> == 0 && kResidualCols % kTileRows == 0);
    packed_panels(decoder, decoder_panels_);
    packed_panels(decoder.transposed(), decoder_rows_);
    blocks_.allocate(Blocks<S>::size(height, kResidualCols));
    code_blocks_.allocate(Blocks<S>::size(height, args.rank));
    code_panels_.allocate(Panels<S>::size(height, args.rank));
    if (wants_code) {
      code_sums_data_.allocate_zeros(Panels<S>::size(args.out_features, args.rank));
      code_sums_ = Panels<S>::over(code_sums_data_, args.out_features, args.rank);
    }
    if (args.d_decoder_bias) residual_sum_.allocate_zeros(args.out_features);
    residual_.allocate(round_up(height, kTileRows) * kResidualCols);
  }

  Panels<S> pack_codes(const View<S>& code) {
    const Panels<S> panels = Panels<S>::over(code_panels_, code.rows, code.cols);
    pack_panels(code, panels);
    zero_padding(panels, code.rows, code.cols);
    return panels;
  }

  // Turns the columns of row r of Z Wdᵀ into R; returns its Σ R².
  double subtract(const T* t, const S* bias, int64_t r, int64_t col, int64_t cols) {
    S* residual = residual_ + r * kResidualCols;
    double sum = 0;
    for (int64_t j = 0; j < cols; ++j) {
      // In double: a bias may be much larger than the residual, and must cost it no digits.
      residual[j] = S(double(residual[j]) + (double(bias[j]) - double(load(t[j]))));
      sum += double(residual[j]) * double(residual[j]);
      if (residual_sum_) residual_sum_[col + j] += double(residual[j]);
    }
    return sum;
  }

  Buffer<S> residual_, blocks_;                       // R, packed R
  Buffer<S> code_blocks_, code_panels_;               // Z, packed as left and as right operand
  Buffer<S> code_sums_data_;                          // RᵀZ
  Panels<S> code_sums_{};
  Buffer<S> decoder_panels_, decoder_rows_;           // Wd, Wdᵀ
  Buffer<double> residual_sum_;                       // Σ R
};

}  // namespace byol::BYOL_ISA
