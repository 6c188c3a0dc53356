// The wide products of bf16 on a processor with dot-product instructions, which multiply pairs along the sum and add them in
// float. The bytes of both packings are those of one in float.
#pragma once

#include "wide.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

namespace byol::BYOL_ISA {

// Two bf16 numbers that are neighbours along the sum, the first in the low half.
using Pair = uint32_t;

// Up to 16 neighbours as bf16, zero where the mask is.
inline __m256i load_bf16(const bf16* from, __mmask16 mask) { return _mm256_maskz_loadu_epi16(mask, from); }
inline __m256i load_bf16(const float* from, __mmask16 mask) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from));
}
inline bf16 to_bf16(bf16 x) { return x; }
inline bf16 to_bf16(float x) { return store<bf16>(x); }

inline __m512i pairs(__m256i low, __m256i high) {
  // With masks, for GCC 12 warns of the others.
  constexpr __mmask16 all = 0xffff;
  const __m512i shifted = _mm512_maskz_slli_epi32(all, _mm512_maskz_cvtepu16_epi32(all, high), 16);
  return _mm512_or_si512(_mm512_maskz_cvtepu16_epi32(all, low), shifted);
}
inline Pair pair(bf16 low, bf16 high) { return Pair(low.bits) | Pair(high.bits) << 16; }
// The first so many of 16.
inline __mmask16 first_of_16(int64_t count) { return __mmask16(0xffff >> (16 - count)); }

// c[0…kRows, 0…kVectors] (+)= the sum over `pairs` of A's pairs with B's, each row beginning with `start`, if there is one. Pair k
// of A's row i is at a[i·kRowStep + k·kPairStep] within a block of R/2 pairs; `stride` leads to the next block.
template <int kRowStep, int kPairStep, int kRows, int kVectors>
inline void pair_tile(const Pair* a, int64_t stride, const Pair* b, int64_t pairs, float* c, int64_t ldc, Into into,
                      const float* start, Ahead& ahead) {
  constexpr int H = kTileRows / 2, L = kLanes<float>, C = kCols<float>;
  __m512 sum[kRows][kVectors];
  if (into == Into::add) fetch_sums(c, ldc);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[i][v] = start ? _mm512_loadu_ps(start + v * L) : _mm512_setzero_ps();
  const auto add_product = [&](int k) {
    __m512bh row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) row[v] = (__m512bh)_mm512_loadu_si512(b + v * L);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const __m512bh value = (__m512bh)_mm512_set1_epi32(int(a[i * kRowStep + k * kPairStep]));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], value, row[v]);
    }
    b += C;
  };
  int64_t left = pairs;
  for (; left >= H; left -= H, a += stride) {
    ahead.fetch();
    for (int k = 0; k < H; ++k) add_product(k);
  }
  for (int k = 0; k < left; ++k) add_product(k);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* out = c + i * ldc + v * L;
      _mm512_storeu_ps(out, into == Into::add ? _mm512_add_ps(_mm512_loadu_ps(out), sum[i][v]) : sum[i][v]);
    }
}

template <>
class Weights<bf16> {
 public:
  void allocate(int64_t rows, int64_t cols) { data_.allocate(round_up(rows, kTileRows) / 2 * round_up(cols, C)); }
  void shape(int64_t rows, int64_t cols) {
    rows_ = rows, cols_ = cols, pairs_ = round_up(rows, kTileRows) / 2;
    // The padding stays zero, for only what is inside will be written.
    std::memset(data_, 0, pairs_ * padded_cols() * sizeof(Pair));
  }
  template <class U>
  void load(int64_t first, const View<U>& left, const View<U>* right = nullptr) {
    put(left, 0, first);
    if (right) put(*right, left.cols, first);
  }
  int64_t cols() const { return cols_; }
  int64_t padded_cols() const { return round_up(cols_, C); }
  int64_t panel_count() const { return padded_cols() / C; }
  const Pair* panel(int64_t index, int64_t first_pair) const { return data_ + (index * pairs_ + first_pair) * C; }

 protected:
  // `row` is even.
  template <class U>
  void put(const View<U>& source, int64_t col, int64_t row) {
    if (source.col_stride == 1) {
      for (int64_t r = 0; r < source.rows; r += 2)
        put_rows(source.row(r), r + 1 < source.rows ? source.row(r + 1) : nullptr, (row + r) / 2, source.cols, col);
    } else {
      int64_t j = 0;
      if constexpr (sizeof(U) == sizeof(bf16))
        if (source.row_stride == 1 && source.rows % 32 == 0 && col % 16 == 0)
          for (; j + 16 <= source.cols; j += 16)
            put_columns(source.data + j * source.col_stride, source.col_stride, source.rows, col + j, row / 2);
      for (; j < source.cols; ++j)
        put_column(source.data + j * source.col_stride, source.row_stride, source.rows, col + j, row / 2);
    }
  }

 private:
  static constexpr int C = kCols<float>;

  Pair* at(int64_t pair, int64_t col) const { return data_ + (col / C * pairs_ + pair) * C + col % C; }

  template <class U>
  void put_rows(const U* low, const U* high, int64_t pair, int64_t cols, int64_t first) {
    for (int64_t col = 0; col < cols;) {
      const int64_t count = min(16 - (first + col) % 16, cols - col);
      const __mmask16 mask = first_of_16(count);
      const __m256i none = _mm256_setzero_si256();
      _mm512_mask_storeu_epi32(at(pair, first + col), mask, pairs(load_bf16(low + col, mask), high ? load_bf16(high + col, mask) : none));
      col += count;
    }
  }

  // 16 columns at once, of which each has its numbers one after the other.
  void put_columns(const bf16* from, int64_t stride, int64_t rows, int64_t col, int64_t pair_row) {
    for (int64_t r = 0; r < rows; r += 32)
      visit_columns(from + r, stride * int64_t(sizeof(bf16)),
                    [&](int i, __m512i numbers) { _mm512_storeu_si512(at(pair_row + r / 2 + i, col), numbers); });
  }

  template <class U>
  void put_column(const U* from, int64_t stride, int64_t rows, int64_t col, int64_t pair_row) {
    for (int64_t r = 0; r < rows; r += 2, from += 2 * stride)
      *at(pair_row + r / 2, col) = pair(to_bf16(from[0]), r + 1 < rows ? to_bf16(from[stride]) : bf16{0});
  }

  Buffer<Pair> data_;
  int64_t rows_ = 0, cols_ = 0, pairs_ = 0;
};

template <>
class Values<bf16> : public Weights<bf16> {
 public:
  template <class U>
  void put(const View<U>& source, int64_t col = 0) {
    Weights<bf16>::put(source, col, 0);
  }
  void pad() {}
};

template <>
class Left<bf16> {
 public:
  static constexpr int64_t kBytes = sizeof(float), kTileBytes = BYOL_ISA::kTileBytes, kHighRankRows = BYOL_ISA::kHighRankRows,
                           kFewRows = BYOL_ISA::kFewRows;
  static constexpr int64_t kRows = kTileRows, kBlockRows = kTileRows, kBlockCols = kStripCols;

  void allocate(int64_t rows, int64_t cols) {
    by_column_.allocate(Blocks<float>::size(rows, cols) / 2);
    by_row_.allocate(Blocks<float>::size(rows, cols) / 2);
  }

  template <class U, class Visit>
  void pack(const View<U>& tile, const Visit& visit) {
    live_rows_ = tile.rows, live_cols_ = tile.cols;
    rows_ = round_up(tile.rows, R), cols_ = round_up(tile.cols, R);
    for (int64_t row = 0; row < rows_; row += R)
      for (int64_t col = 0; col < cols_; col += kStripCols) {
        pack_strip(tile, row, col);
        visit(row, col);
      }
  }

  void multiply(const Weights<bf16>& weights, int64_t first, int64_t cols, float* out, int64_t ldc, Into into,
                const View<bf16>& next = {}, const float* start = nullptr) const {
    const int64_t panels = (cols + C - 1) / C, live = min(cols, weights.cols() - first);
    Ahead ahead(next, rows_ / R * (cols_ / R) * panels);
    for (int64_t depth = 0; depth < live_cols_; depth += 2 * kDepth) {
      const int64_t pairs = (min(2 * kDepth, live_cols_ - depth) + 1) / 2;
      for (int64_t j = 0; j < panels; ++j)
        for (int64_t row = 0; row < rows_; row += R)
          with_edges<float>(live_rows_ - row, live - j * C, [&](auto rows, auto vectors) {
            pair_tile<R / 2, 1, rows.value, vectors.value>(by_column_ + (row * cols_ + depth * R) / 2, R * R / 2,
                                                           weights.panel(first / C + j, depth / 2), pairs, out + row * ldc + j * C,
                                                           ldc, depth > 0 ? Into::add : into,
                                                           start && depth == 0 ? start + j * C : nullptr, ahead);
          });
    }
  }

  void multiply_transposed(const Values<bf16>& values, Sums<bf16>& sums, int64_t first = 0) const {
    multiply_transposed(values, sums, first, [&](int64_t) { return cols_; }, sums.begin(first == 0));
  }
  void multiply_symmetric(const Values<bf16>& values, Sums<bf16>& sums) const {
    multiply_transposed(values, sums, 0, [&](int64_t j) { return min(cols_, (j + 1) * C); }, sums.begin(false));
  }

 private:
  static constexpr int R = kTileRows;
  static constexpr int64_t C = kCols<float>;
  static_assert(R % 2 == 0 && R <= 16);

  // Rows of the sums until `end(j)` in panel j.
  template <class End>
  void multiply_transposed(const Values<bf16>& values, const Sums<bf16>& sums, int64_t first, const End& end, Into into) const {
    Ahead nothing;
    for (int64_t j = first / C; j < values.panel_count(); ++j)
      for (int64_t col = 0; col < end(j); col += R)
        with_edges<float>(live_cols_ - col, values.cols() - j * C, [&](auto rows, auto vectors) {
          pair_tile<1, R, rows.value, vectors.value>(by_row_ + col * R / 2, cols_ * R / 2, values.panel(j, 0), (live_rows_ + 1) / 2,
                                                     sums.panels().row(col, j), C, into, nullptr, nothing);
        });
  }

  // As product.h does.
  template <class U>
  void pack_strip(const View<U>& tile, int64_t row, int64_t col) {
    const int64_t rows = max(0, min(R, tile.rows - row)), cols = min(kStripCols, tile.cols - col);
    Pair *columns = by_column_ + (row * cols_ + col * R) / 2, *pairs = by_row_ + (row * cols_ + col * R) / 2;
    if (tile.col_stride != 1) return pack_elements(tile, row, col, rows, cols, columns, pairs);
    for (int64_t i = 0; i < R; i += 2, columns += R, pairs += R) {
      const U *low = tile.row(row + i) + col, *high = low + tile.row_stride;
      for (int64_t j = 0; j < cols && i < rows; j += 64 / int64_t(sizeof(U))) {
        __builtin_prefetch(low + R * tile.row_stride + j);
        __builtin_prefetch(high + R * tile.row_stride + j);
      }
      const auto pack = [&](int64_t j, __mmask16 mask) {
        const __m256i none = _mm256_setzero_si256();
        const __m256i lower = i < rows ? load_bf16(low + j, mask) : none, higher = i + 1 < rows ? load_bf16(high + j, mask) : none;
        i + 2 < R ? pack_block<true>(lower, higher, columns + j * R / 2, pairs + j * R / 2)
                  : pack_block<false>(lower, higher, columns + j * R / 2, pairs + j * R / 2);
      };
      int64_t j = 0;
      for (; j + R <= cols; j += R) pack(j, first_of_16(R));
      if (j < cols) pack(j, first_of_16(cols - j));
    }
  }

  // The same of any strides, along columns.
  template <class U>
  static void pack_elements(const View<U>& tile, int64_t row, int64_t col, int64_t rows, int64_t cols, Pair* columns, Pair* pairs) {
    bf16* numbers = reinterpret_cast<bf16*>(columns);
    std::memset(columns, 0, round_up(cols, R) * R * sizeof(bf16));
    std::memset(pairs, 0, round_up(cols, R) * R * sizeof(bf16));
    for (int64_t j = 0; j < cols; ++j) {
      const U* from = tile.row(row) + (col + j) * tile.col_stride;
      for (int64_t i = 0; i < rows; i += 2, from += 2 * tile.row_stride) {
        const bf16 low = to_bf16(from[0]), high = i + 1 < rows ? to_bf16(from[tile.row_stride]) : bf16{0};
        const int64_t block = j / R * R * R, within = j % R;
        numbers[block + i * R + within] = low, numbers[block + (i + 1) * R + within] = high;
        pairs[block / 2 + i / 2 * R + within] = pair(low, high);
      }
    }
  }

  // R columns of two rows. In whole registers, where what is beyond will be overwritten by the rows that follow.
  template <bool kWhole>
  static void pack_block(__m256i low, __m256i high, Pair* columns, Pair* pairs) {
    const __m512i both = BYOL_ISA::pairs(low, high);
    std::memcpy(columns, &low, kWhole ? sizeof low : R * sizeof(bf16));
    std::memcpy(columns + R / 2, &high, kWhole ? sizeof high : R * sizeof(bf16));
    std::memcpy(pairs, &both, kWhole ? sizeof both : R * sizeof(Pair));
  }
  Buffer<Pair> by_column_, by_row_;
  int64_t rows_ = 0, cols_ = 0;            // as packed
  int64_t live_rows_ = 0, live_cols_ = 0;  // without padding
};

}  // namespace byol::BYOL_ISA

#endif
