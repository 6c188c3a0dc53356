// What a tile of targets is beside the decoder's bias: Σ (t − bd)² and Σ (t − bd), and from both Σ t².
//
// Collected block by block while the tile is being packed, when its lines are in a near cache anyway.
#pragma once

#include "product.h"

namespace byol::BYOL_ISA {

struct Energy {
  double centred = 0, raw = 0;  // Σ (t − bd)², Σ t²
};

// For blocks of so many rows and columns, of a matrix whose rows are contiguous.
template <class T, int64_t kBlockRows, int64_t kBlockCols>
class Statistics {
  using S = Acc<T>;
  static constexpr int L = kLanes<S>;
  // Vectors that are read at a time, and sums of squares.
  static constexpr int kVectors = kBlockCols / L < 4 ? kBlockCols / L : 4;
  typedef S Vector __attribute__((vector_size(BYOL_VECTOR_BYTES), aligned(alignof(S)), may_alias));

 public:
  // `bias` has to outlive this.
  void allocate(const S* bias, int64_t cols) {
    bias_ = bias, cols_ = cols;
    tile_.allocate(cols), total_.allocate_zeros(cols);
  }

  void begin_tile() {
    std::memset(tile_, 0, cols_ * sizeof(double));
    for (double& energy : energy_) energy = 0;
  }

  // The block of a tile whose first number is at this row and column.
  void add(const View<T>& tile, int64_t row, int64_t col) {
    const View<T> block{tile.row(row) + col, tile.row_stride, 1, min(kBlockRows, tile.rows - row), min(kBlockCols, tile.cols - col)};
    Vector squares[kVectors] = {};
    int64_t j = 0;
    for (; j + kVectors * L <= block.cols; j += kVectors * L) add_columns<kVectors>(block, col, j, squares);
    for (; j + L <= block.cols; j += L) add_columns<1>(block, col, j, squares);
    for (; j < block.cols; ++j)
      for (int64_t i = 0; i < block.rows; ++i) {
        const S difference = load(block.row(i)[j]) - bias_[col + j];
        tile_[col + j] += double(difference);
        energy_[0] += double(difference) * double(difference);
      }
    for (const Vector& square : squares)
      for (int l = 0; l < L; ++l) energy_[l] += double(square[l]);
  }

  // Of the tile, with this many rows.
  Energy energy(int64_t rows) const {
    Energy energy;
    for (double part : energy_) energy.centred += part;
    energy.raw = energy.centred;
    for (int64_t d = 0; d < cols_; ++d)
      energy.raw += double(bias_[d]) * (2 * tile_[d] + double(rows) * double(bias_[d]));
    return energy;
  }

  // Adds the tile's Σ (t − bd) to the sum of all tiles.
  void keep_tile() {
    for (int64_t d = 0; d < cols_; ++d) total_[d] += tile_[d];
  }
  double sum(int64_t d) const { return total_[d]; }

 private:
  // N vectors of columns from j on.
  template <int N>
  void add_columns(const View<T>& block, int64_t col, int64_t j, Vector* squares) {
    // In registers: what `squares` points to might be what is read.
    Vector bias[N], square[N], sums[N] = {};
    for (int v = 0; v < N; ++v) {
      bias[v] = *reinterpret_cast<const Vector*>(bias_ + col + j + v * L);
      square[v] = squares[v];
    }
    for (int64_t i = 0; i < block.rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        const Vector difference = load_vector(block.row(i) + j + v * L) - bias[v];
        sums[v] += difference;
        square[v] += difference * difference;
      }
    double* out = tile_ + col + j;
    for (int v = 0; v < N; ++v) squares[v] = square[v];
    for (int v = 0; v < N; ++v)
      for (int l = 0; l < L; ++l) out[v * L + l] += double(sums[v][l]);
  }

  static Vector load_vector(const T* t) {
    if constexpr (sizeof(T) == sizeof(S)) {
      return *reinterpret_cast<const Vector*>(t);
    } else {
      Vector out;
      for (int l = 0; l < L; ++l) out[l] = load(t[l]);
      return out;
    }
  }

  const S* bias_ = nullptr;
  int64_t cols_ = 0;
  Buffer<double> tile_, total_;
  double energy_[L];
};

}  // namespace byol::BYOL_ISA
