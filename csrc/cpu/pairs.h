// The wide products of bf16 on a processor with dot-product instructions, which multiply pairs along the sum and add them in
// float. The bytes of both packings are those of one in float.
#pragma once

#include "wide.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

#include <immintrin.h>

namespace byol::BYOL_ISA {

// Two bf16 numbers that are neighbours along the sum, the first in the low half.
using Pair = uint32_t;

inline Pair pair(bf16 low, bf16 high) { return Pair(low.bits) | Pair(high.bits) << 16; }
inline bf16 to_bf16(bf16 x) { return x; }
inline bf16 to_bf16(float x) { return store<bf16>(x); }

// c[0…R, 0…kCols] (+)= the sum over `pairs` of A's pairs with B's. Pair k of A's row i is at a[i·row_step + k·pair_step]
// within a block of R/2 pairs; `stride` leads to the next block.
template <int kRowStep, int kPairStep>
inline void pair_tile(const Pair* a, int64_t stride, const Pair* b, int64_t pairs, float* c, int64_t ldc, Into into) {
  constexpr int R = kTileRows, L = kLanes<float>, C = kCols<float>;
  __m512 sum[R][2];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    sum[i][0] = into == Into::begin ? _mm512_loadu_ps(c + i * ldc) : _mm512_setzero_ps();
    sum[i][1] = into == Into::begin ? _mm512_loadu_ps(c + i * ldc + L) : _mm512_setzero_ps();
  }
  for (int64_t block = 0; block < pairs; block += R / 2, a += stride) {
    for (int k = 0; k < R / 2; ++k, b += C) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + L);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const __m512bh value = (__m512bh)_mm512_set1_epi32(int(a[i * kRowStep + k * kPairStep]));
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], value, b0);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], value, b1);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
    float* out = c + i * ldc;
    const bool add = into == Into::add;
    _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), sum[i][0]) : sum[i][0]);
    _mm512_storeu_ps(out + L, add ? _mm512_add_ps(_mm512_loadu_ps(out + L), sum[i][1]) : sum[i][1]);
  }
}

template <>
class Weights<bf16> {
 public:
  void allocate(int64_t rows, int64_t cols) { data_.allocate(round_up(rows, kTileRows) / 2 * round_up(cols, C)); }
  void shape(int64_t rows, int64_t cols) {
    rows_ = rows, cols_ = cols, pairs_ = round_up(rows, kTileRows) / 2;
    // The padding stays zero, for `put` writes what is inside.
    std::memset(data_, 0, pairs_ * padded_cols() * sizeof(Pair));
  }
  template <class U>
  void put(const View<U>& source, int64_t first = 0) {
    for (int64_t col = 0; col < source.cols; ++col) {
      Pair* out = data_ + ((first + col) / C * pairs_) * C + (first + col) % C;
      const U* from = source.data + col * source.col_stride;
      for (int64_t r = 0; r < source.rows; r += 2)
        out[r / 2 * C] = pair(to_bf16(from[r * source.row_stride]),
                              r + 1 < source.rows ? to_bf16(from[(r + 1) * source.row_stride]) : bf16{0});
    }
  }
  void pad() {}
  int64_t padded_cols() const { return round_up(cols_, C); }
  int64_t panel_count() const { return padded_cols() / C; }
  const Pair* panel(int64_t index, int64_t first_pair) const { return data_ + (index * pairs_ + first_pair) * C; }

 private:
  static constexpr int C = kCols<float>;
  Buffer<Pair> data_;
  int64_t rows_ = 0, cols_ = 0, pairs_ = 0;
};

template <>
class Values<bf16> : public Weights<bf16> {};

template <>
class Left<bf16> {
 public:
  static constexpr int64_t kBytes = sizeof(float);
  static constexpr int64_t kRows = kTileRows, kBlockRows = kTileRows, kBlockCols = kTileRows;

  void allocate(int64_t rows, int64_t cols) {
    by_column_.allocate(Blocks<float>::size(rows, cols) / 2);
    by_row_.allocate(Blocks<float>::size(rows, cols) / 2);
  }

  template <class U, class Visit>
  void pack(const View<U>& tile, const Visit& visit) {
    rows_ = round_up(tile.rows, R), cols_ = round_up(tile.cols, R);
    Pair *columns = by_column_, *rows = by_row_;
    bf16 block[R][R];
    for (int64_t row = 0; row < rows_; row += R)
      for (int64_t col = 0; col < cols_; col += R, columns += R * R / 2, rows += R * R / 2) {
        const int64_t live = max(0, min(R, tile.rows - row)), width = min(R, tile.cols - col);
        if (live < R || width < R) std::memset(block, 0, sizeof block);
        for (int64_t i = 0; i < live; ++i) {
          const U* from = tile.data + (row + i) * tile.row_stride + col * tile.col_stride;
          __builtin_prefetch(from + R * tile.row_stride);
          if (width == R && tile.col_stride == 1) {
            for (int j = 0; j < R; ++j) block[i][j] = to_bf16(from[j]);
          } else {
            for (int64_t j = 0; j < width; ++j) block[i][j] = to_bf16(from[j * tile.col_stride]);
          }
        }
        std::memcpy(columns, block, sizeof block);
        for (int i = 0; i < R / 2; ++i)
          for (int j = 0; j < R; ++j) rows[i * R + j] = pair(block[2 * i][j], block[2 * i + 1][j]);
        visit(row, col);
      }
  }

  void multiply(const Weights<bf16>& weights, int64_t first, int64_t cols, float* out, int64_t ldc, Into into) const {
    for (int64_t depth = 0; depth < cols_; depth += 2 * kDepth) {
      const int64_t steps = min(2 * kDepth, cols_ - depth);
      for (int64_t j = 0; j * kCols<float> < cols; ++j)
        for (int64_t row = 0; row < rows_; row += R)
          pair_tile<R / 2, 1>(by_column_ + (row * cols_ + depth * R) / 2, R * R / 2, weights.panel(first / kCols<float> + j, depth / 2), steps / 2,
                              out + row * ldc + j * kCols<float>, ldc, depth > 0 ? Into::add : into);
    }
  }

  void multiply_transposed(const Values<bf16>& values, const Sums<bf16>& sums, int64_t first = 0) const {
    for (int64_t j = first / kCols<float>; j < values.panel_count(); ++j)
      for (int64_t col = 0; col < cols_; col += R)
        pair_tile<1, R>(by_row_ + col * R / 2, cols_ * R / 2, values.panel(j, 0), rows_ / 2, sums.panels().row(col, j), kCols<float>,
                        Into::add);
  }
  void multiply_symmetric(const Values<bf16>& values, const Sums<bf16>& sums) const { multiply_transposed(values, sums); }

 private:
  static constexpr int R = kTileRows;
  static_assert(R % 2 == 0);
  Buffer<Pair> by_column_, by_row_;
  int64_t rows_ = 0, cols_ = 0;
};

}  // namespace byol::BYOL_ISA

#endif
