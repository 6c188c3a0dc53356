// What a tile of targets is beside the decoder's bias: Σ (t − bd)² and Σ (t − bd), and from both Σ t².
//
// Collected block by block while the tile is being packed, when its lines are in the first-level cache anyway. A row of a
// block is read as whole vectors; what their other lanes hold is summed, too, and never looked at.
#pragma once

#include "product.h"

namespace byol::BYOL_ISA {

struct Energy {
  double centred = 0, raw = 0;  // Σ (t − bd)², Σ t²
};

// For blocks of so many rows and columns.
template <class T, int64_t kBlockRows, int64_t kBlockCols>
class Statistics {
  using S = Acc<T>;
  static constexpr int R = kBlockRows, C = kBlockCols, L = kLanes<S>, V = (C + L - 1) / L, kSpan = V * L;
  // Blocks of which a register sums the squares.
  static constexpr int kBlocks = 4;
  typedef S Vector __attribute__((vector_size(BYOL_VECTOR_BYTES), may_alias));

 public:
  // `bias` has to outlive this.
  void allocate(const S* bias, int64_t cols) {
    cols_ = cols, bias_ = bias;
    biases_.allocate_zeros(size()), tile_.allocate(size()), total_.allocate_zeros(size());
    for (int64_t d = 0; d < cols; ++d) biases_[place(d)] = bias[d];
  }

  void begin_tile() {
    std::memset(tile_, 0, size() * sizeof(double));
    for (int j = 0; j < kSpan; ++j) squares_[j] = 0, energy_[j] = 0;
    blocks_ = 0;
  }

  // The block of a tile whose first number is at this row and column.
  void add(const View<T>& tile, int64_t row, int64_t col) {
    const T* first = tile.data + row * tile.row_stride + col * tile.col_stride;
    const int64_t at = col / C * kSpan;
    const bool whole = row + R <= tile.rows && col + kSpan <= tile.cols && tile.col_stride == 1;
    alignas(64) S sums[kSpan] = {};
    if (whole) {
      Vector sum[V] = {}, square[V];
      for (int v = 0; v < V; ++v) square[v] = reinterpret_cast<const Vector*>(squares_)[v];
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          Vector difference;
          load_vector(first + i * tile.row_stride + v * L, difference);
          difference -= reinterpret_cast<const Vector*>(biases_ + at)[v];
          sum[v] += difference;
          square[v] += difference * difference;
        }
      for (int v = 0; v < V; ++v) {
        reinterpret_cast<Vector*>(squares_)[v] = square[v];
        reinterpret_cast<Vector*>(sums)[v] = sum[v];
      }
    } else {
      for (int i = 0; i < min(R, tile.rows - row); ++i)
        for (int j = 0; j < min(C, tile.cols - col); ++j) {
          const S difference = load(first[i * tile.row_stride + j * tile.col_stride]) - biases_[at + j];
          sums[j] += difference;
          squares_[j] += difference * difference;
        }
    }
    for (int j = 0; j < kSpan; ++j) tile_[at + j] += double(sums[j]);
    if (++blocks_ % kBlocks == 0) move_squares();
  }

  // Of the tile, with this many rows.
  Energy energy(int64_t rows) {
    move_squares();
    Energy energy;
    for (int j = 0; j < C; ++j) energy.centred += energy_[j];
    energy.raw = energy.centred;
    for (int64_t d = 0; d < cols_; ++d)
      energy.raw += double(bias_[d]) * (2 * tile_[place(d)] + double(rows) * double(bias_[d]));
    return energy;
  }

  // Adds the tile's Σ (t − bd) to the sum of all tiles.
  void keep_tile() {
    for (int64_t i = 0; i < size(); ++i) total_[i] += tile_[i];
  }
  double sum(int64_t d) const { return total_[place(d)]; }

 private:
  int64_t size() const { return (cols_ + C - 1) / C * kSpan; }
  static int64_t place(int64_t d) { return d / C * kSpan + d % C; }

  static void load_vector(const T* t, Vector& out) {
    if constexpr (sizeof(T) == sizeof(S)) {
      std::memcpy(&out, t, sizeof out);
    } else {
      for (int j = 0; j < L; ++j) out[j] = load(t[j]);
    }
  }

  void move_squares() {
    for (int j = 0; j < kSpan; ++j) energy_[j] += double(squares_[j]), squares_[j] = 0;
  }

  int64_t cols_ = 0, blocks_ = 0;
  const S* bias_ = nullptr;
  Buffer<S> biases_;              // [blocks, kSpan], as both sums
  Buffer<double> tile_, total_;
  alignas(64) S squares_[kSpan];  // of the last blocks
  double energy_[kSpan];
};

}  // namespace byol::BYOL_ISA
