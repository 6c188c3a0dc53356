// The operands of the wide products on a processor with a matrix unit.
//
// Everything is packed in blocks of 32×32 numbers, for each part of a number two tiles. A left operand's tile holds rows. A
// right operand's holds pairs of rows, (b[2p, j], b[2p+1, j]) being neighbours: what interleaving two rows makes of them, lane
// by lane of 128 bits, leaves columns in another order (`place`), in which Xᵀ·V is summed.
#pragma once

#include "beside.h"
#include "wide.h"

#ifdef __AMX_BF16__

namespace byol::BYOL_ISA {

// Where the columns of a block are after two rows have been interleaved: columns 0–3, 8–11, 16–19, 24–27, then the others.
constexpr int64_t place(int64_t column) { return column / 4 % 2 * 16 + column / 8 * 4 + column % 4; }

// A matrix in blocks: block-row by block-row.
template <int P>
class Blocked {
 public:
  static int64_t count(int64_t numbers) { return (numbers + kEdge - 1) / kEdge; }
  void allocate(int64_t rows, int64_t cols) { data_.allocate(count(rows) * count(cols) * P * kBlock); }
  void shape(int64_t rows, int64_t cols) { rows_ = count(rows), cols_ = count(cols); }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  bf16* at(int64_t row, int64_t col) const { return data_ + (row * cols_ + col) * P * kBlock; }

 private:
  Buffer<bf16> data_;
  int64_t rows_ = 0, cols_ = 0;
};

// A right operand as it is put together, in float, zero outside.
class Staged {
 public:
  void allocate(int64_t rows, int64_t cols) { data_.allocate(round_up(rows, kEdge) * round_up(cols, kEdge)); }
  void shape(int64_t rows, int64_t cols) {
    rows_ = round_up(rows, kEdge), cols_ = round_up(cols, kEdge);
    if (rows != rows_ || cols != cols_) std::memset(data_, 0, rows_ * cols_ * sizeof(float));
  }
  template <class U>
  void put(const View<U>& source, int64_t col = 0) {
    constexpr int64_t kStrip = 16;
    float* const out = data_ + col;
    for (int64_t top = 0; top < source.rows; top += kStrip) {
      const int64_t bottom = min(top + kStrip, source.rows);
      if (source.col_stride == 1) {
        for (int64_t r = top; r < bottom; ++r)
          for (int64_t j = 0; j < source.cols; ++j) out[r * cols_ + j] = load(source.row(r)[j]);
      } else {
        int64_t j = 0;
        if (source.row_stride == 1 && bottom - top == kStrip)
          for (; j + kStrip <= source.cols; j += kStrip)
            put_transposed(source.row(top) + j * source.col_stride, source.col_stride, out + top * cols_ + j);
        for (; j < source.cols; ++j)
          for (int64_t r = top; r < bottom; ++r) out[r * cols_ + j] = load(source.row(r)[j * source.col_stride]);
      }
    }
  }
  int64_t cols() const { return cols_; }
  const float* at(int64_t row, int64_t col) const { return data_ + row * cols_ + col; }

 private:
  // 16 columns of 16 numbers each.
  template <class U>
  void put_transposed(const U* source, int64_t col_stride, float* out) {
    __m512i numbers[16];
    for (int j = 0; j < 16; ++j) numbers[j] = _mm512_castps_si512(load16(source + j * col_stride));
    transpose(numbers);
    for (int r = 0; r < 16; ++r) _mm512_storeu_si512(out + r * cols_, numbers[r]);
  }

  Buffer<float> data_;
  int64_t rows_ = 0, cols_ = 0;
};

// W: blocks by column, then by row, so that those of a sum follow each other; each holds pairs of rows, columns in order.
template <class T>
class TileWeights {
  static constexpr int P = kParts<T>;

 public:
  void allocate(int64_t rows, int64_t cols) { blocks_.allocate(cols, rows); }
  void shape(int64_t rows, int64_t cols) { blocks_.shape(cols, rows), cols_ = cols; }
  template <class U>
  void load(int64_t first, const View<U>& left, const View<U>* right = nullptr) {
    if (left.rows % kEdge == 0 && left.cols % kEdge == 0) {
      pack(left, first, 0);
      if (right) pack(*right, first, left.cols);
      return;
    }
    Staged strip;
    strip.allocate(kEdge, cols_);
    for (int64_t row = 0; row < left.rows; row += kEdge) {
      const int64_t count = min(kEdge, left.rows - row);
      strip.shape(count, cols_);
      strip.put(left.slice(row, count));
      if (right) strip.put(right->slice(row, count), left.cols);
      pack(View<float>{strip.at(0, 0), strip.cols(), 1, kEdge, strip.cols()}, first + row, 0);
    }
  }
  int64_t padded_cols() const { return blocks_.rows() * kEdge; }
  const Blocked<P>& blocks() const { return blocks_; }

 private:
  // Whole blocks, the first of them at this row and column.
  template <class U>
  void pack(const View<U>& source, int64_t first, int64_t col) {
    for (int64_t j = 0; j < source.cols; j += kEdge)
      for (int64_t i = 0; i < source.rows; i += kEdge) {
        const U* from = source.row(i) + j * source.col_stride;
        bf16* to = blocks_.at((col + j) / kEdge, (first + i) / kEdge);
        source.col_stride == 1 ? pack_rows(from, source.row_stride, to) : pack_columns(from, source.col_stride, to);
      }
  }

  template <class U>
  static void pack_rows(const U* from, int64_t stride, bf16* out) {
    __m512i even[P], odd[P];
    for (int64_t pair = 0; pair < 16; ++pair, from += 2 * stride, out += 32) {
      split<P>(from, even);
      split<P>(from + stride, odd);
#pragma GCC unroll 3
      for (int p = 0; p < P; ++p) {
        _mm512_storeu_si512(out + p * kBlock, _mm512_permutex2var_epi16(even[p], interleaved(0), odd[p]));
        _mm512_storeu_si512(out + p * kBlock + kTile, _mm512_permutex2var_epi16(even[p], interleaved(16), odd[p]));
      }
    }
  }

  // Columns of 32 numbers each, which are pairs of rows already.
  template <class U>
  static void pack_columns(const U* from, int64_t stride, bf16* out) {
    __m512i parts[P], tiles[P][16];
    for (int half = 0; half < 2; ++half, out += kTile) {
      for (int col = 0; col < 16; ++col, from += stride) {
        split<P>(from, parts);
#pragma GCC unroll 3
        for (int p = 0; p < P; ++p) tiles[p][col] = parts[p];
      }
      for (int p = 0; p < P; ++p) {
        transpose(tiles[p]);
        for (int pair = 0; pair < 16; ++pair) _mm512_storeu_si512(out + p * kBlock + pair * 32, tiles[p][pair]);
      }
    }
  }

  // first, 32 + first, first + 1, 32 + first + 1, …
  static __m512i interleaved(int first) {
    const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_add_epi32(_mm512_mullo_epi32(steps, _mm512_set1_epi32(0x10001)),
                            _mm512_set1_epi32((32 + first) << 16 | first));
  }

  Blocked<P> blocks_;
  int64_t cols_ = 0;
};

// V: its transpose as a left operand, whose rows are in the order of `place`.
template <class T>
class TileValues {
  static constexpr int P = kParts<T>;

 public:
  void allocate(int64_t rows, int64_t cols) { staged_.allocate(rows, cols), blocks_.allocate(cols, rows); }
  void shape(int64_t rows, int64_t cols) {
    rows_ = rows, cols_ = cols, is_staged_ = false;
    blocks_.shape(cols, rows);
  }
  template <class U>
  void put(const View<U>& source, int64_t first = 0) {
    if (!is_staged_) staged_.shape(rows_, cols_);
    is_staged_ = true;
    staged_.put(source, first);
  }
  // Whole blocks are packed where they lie.
  void put(const View<float>& source, int64_t first = 0) {
    if (first % kEdge || source.cols % kEdge || source.col_stride != 1) return put<float>(source, first);
    pack(source.data, source.row_stride, first / kEdge, source.cols / kEdge);
  }
  void pad() {
    if (is_staged_) pack(staged_.at(0, 0), staged_.cols(), 0, blocks_.rows());
  }
  const Blocked<P>& blocks() const { return blocks_; }

 private:
  // Columns of V become block-rows from `first` on.
  void pack(const float* values, int64_t stride, int64_t first, int64_t count) {
    float edge[kEdge][kEdge];
    for (int64_t col = 0; col < count; ++col)
      for (int64_t row = 0; row < blocks_.cols(); ++row) {
        const float* from = values + row * kEdge * stride + col * kEdge;
        const int64_t live = min(kEdge, rows_ - row * kEdge);
        if (live == kEdge) {
          pack_block(from, stride, blocks_.at(first + col, row));
        } else {
          std::memset(edge, 0, sizeof edge);
          for (int64_t r = 0; r < live; ++r) std::memcpy(edge[r], from + r * stride, sizeof edge[r]);
          pack_block(edge[0], kEdge, blocks_.at(first + col, row));
        }
      }
  }

  static void pack_block(const float* from, int64_t stride, bf16* out) {
    __m512i even[P], odd[P], tiles[P][2][16];
    for (int64_t pair = 0; pair < 16; ++pair, from += 2 * stride) {
      split<P>(from, even);
      split<P>(from + stride, odd);
      for (int p = 0; p < P; ++p) {
        tiles[p][0][pair] = _mm512_unpacklo_epi16(even[p], odd[p]);
        tiles[p][1][pair] = _mm512_unpackhi_epi16(even[p], odd[p]);
      }
    }
    for (int p = 0; p < P; ++p)
      for (int half = 0; half < 2; ++half, out += kTile) {
        transpose(tiles[p][half]);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * 32, tiles[p][half][i]);
      }
  }

  Staged staged_;
  Blocked<P> blocks_;
  int64_t rows_ = 0, cols_ = 0;
  bool is_staged_ = false;
};

// A block of 32×32 numbers, row by row.
template <class N>
struct Square {
  alignas(64) N rows[kEdge][kEdge];
};

// Undoes `place`, for rows and columns.
template <class N>
Square<N> in_order(const N* block) {
  Square<N> out;
  for (int64_t i = 0; i < kEdge; ++i)
    for (int64_t j = 0; j < kEdge; ++j) out.rows[i][j] = block[place(i) * kEdge + place(j)];
  return out;
}
template <>
inline Square<float> in_order(const float* block) {
  Square<float> out;
  // By 128 bits: those of the first register and of the second in turn.
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < kEdge; ++i) {
    const __m512 first = _mm512_loadu_ps(block + place(i) * kEdge), second = _mm512_loadu_ps(block + place(i) * kEdge + 16);
    _mm512_store_ps(out.rows[i], _mm512_permutex2var_ps(first, low, second));
    _mm512_store_ps(out.rows[i] + 16, _mm512_permutex2var_ps(first, high, second));
  }
  return out;
}

template <class N>
Square<N> transposed(const Square<N>& block) {
  Square<N> out;
  for (int64_t i = 0; i < kEdge; ++i)
    for (int64_t j = 0; j < kEdge; ++j) out.rows[j][i] = block.rows[i][j];
  return out;
}
template <>
inline Square<float> transposed(const Square<float>& block) {
  Square<float> out;
  for (int64_t i = 0; i < kEdge; i += 16)
    for (int64_t j = 0; j < kEdge; j += 16)
      visit_columns(block.rows[i] + j, sizeof block.rows[i],
                    [&](int r, __m512i numbers) { _mm512_store_si512(out.rows[j + r] + i, numbers); });
  return out;
}

// (Tᵀ·V)ᵀ in blocks of 32×32, rows and columns of each in the order of `place`.
class TileSums {
 public:
  void allocate(int64_t rows, int64_t cols) {
    row_blocks_ = Blocked<1>::count(rows);
    sums_.allocate(row_blocks_ * Blocked<1>::count(cols) * kEdge * kEdge);
  }
  float* block(int64_t row, int64_t col) const { return sums_.data() + offset(row, col); }
  Into begin(bool all) { return sums_.begin(all); }
  void carry() { sums_.carry(); }
  template <class Out>
  void add_rows(Out* out, int64_t stride, const Region& region, double factor, Into into = Into::add) const {
    sums_.visit([&](const auto* numbers) {
      visit_blocks(numbers, region, [&](const auto& block, int64_t row, int64_t col) {
        add_part(transposed(block), row, col, region, out, stride, factor, into);
      });
      into = Into::add;
    });
  }
  void add_columns(float* out, int64_t stride, const Region& region, double factor, Into into = Into::add) const {
    sums_.visit([&](const auto* numbers) {
      visit_blocks(numbers, region, [&](const auto& block, int64_t row, int64_t col) {
        add_part(block, col, row, region.transposed(), out, stride, factor, into);
      });
      into = Into::add;
    });
  }

 private:
  int64_t offset(int64_t row_block, int64_t col_block) const { return (col_block * row_blocks_ + row_block) * kEdge * kEdge; }

  // Calls body(block, row, col) with each block that has a part of the region: its rows are columns from `col` on, its columns
  // rows from `row` on.
  template <class N, class Body>
  void visit_blocks(const N* numbers, const Region& region, const Body& body) const {
    for (int64_t row = region.row / kEdge * kEdge; row < region.row + region.rows; row += kEdge)
      for (int64_t col = region.col / kEdge * kEdge; col < region.col + region.cols; col += kEdge)
        body(in_order(numbers + offset(row / kEdge, col / kEdge)), row, col);
  }

  // out += factor · what a block, whose first number is at this row and column, has of the region; or = that.
  template <class N, class Out>
  static void add_part(const Square<N>& block, int64_t row, int64_t col, const Region& region, Out* out, int64_t stride,
                       double factor, Into into) {
    const int64_t first = max(col, region.col), last = min(col + kEdge, region.col + region.cols);
    for (int64_t r = max(row, region.row); r < min(row + kEdge, region.row + region.rows); ++r) {
      const N* from = block.rows[r - row] - col;
      Out* to = out + (r - region.row) * stride - region.col;
      for (int64_t c = first; c < last; ++c) to[c] = Out(N(factor) * from[c]) + (into == Into::add ? to[c] : Out(0));
    }
  }

  RowSums<float> sums_;
  int64_t row_blocks_ = 0;
};

// A tile of T as a left operand; as a right one, for Vᵀ·T, a block of columns at a time.
template <class T>
class TileLeft {
  static constexpr int P = kParts<T>;
  // Blocks of a sum that are taken at a time, so that those of W stay in a near cache.
  static constexpr int64_t kDepth = 32;

 public:
  // With those of its source, which go through the same cache.
  static constexpr int64_t kBytes = P * sizeof(bf16) + sizeof(T), kTileBytes = 640 * 1024, kHighRankRows = P > 1 ? 128 : 256,
                           kFewRows = P > 1 ? 32 : 64;
  static constexpr int64_t kRows = kEdge, kBlockRows = 8, kBlockCols = kEdge;

  void allocate(int64_t rows, int64_t cols) {
    blocks_.allocate(rows, cols);
    pairs_.allocate(2 * Blocked<P>::count(rows) * P * kBlock);
  }

  template <class U, class Visit>
  void pack(const View<U>& tile, const Visit& visit) {
    blocks_.shape(tile.rows, tile.cols);
    U edge[kBlockRows][kEdge];
    for (int64_t row = 0; row < blocks_.rows() * kEdge; row += kBlockRows)
      for (int64_t col = 0; col < tile.cols; col += kEdge) {
        const U* from = tile.data + row * tile.row_stride + col * tile.col_stride;
        if (row + kBlockRows <= tile.rows && col + kEdge <= tile.cols && tile.col_stride == 1) {
          // The next rows: each is a stream of its own, too short for the hardware to foresee.
          for (int64_t i = kBlockRows; i < 2 * kBlockRows; ++i)
            for (int64_t j = 0; j < kEdge; j += 64 / int64_t(sizeof(U))) __builtin_prefetch(from + i * tile.row_stride + j);
          pack_rows(from, tile.row_stride, row, col / kEdge);
        } else {
          std::memset(edge, 0, sizeof edge);
          for (int64_t i = 0; i < min(kBlockRows, tile.rows - row); ++i)
            for (int64_t j = 0; j < min(kEdge, tile.cols - col); ++j)
              edge[i][j] = from[i * tile.row_stride + j * tile.col_stride];
          pack_rows(edge[0], kEdge, row, col / kEdge);
        }
        visit(row, col);
      }
  }

  void take(const View<float>& tile) { pack(tile, visit_nothing); }

  // The rows that follow are not fetched meanwhile: the lines come in the way of those that the products wait for.
  void multiply(const TileWeights<T>& weights, int64_t first, int64_t cols, float* out, int64_t ldc, Into into,
                const View<T>& = {}, const float* start = nullptr) const {
    for (int64_t r = 0; start && r < blocks_.rows() * kEdge; ++r)
      std::memcpy(out + r * ldc, start, round_up(cols, kEdge) * sizeof(float));
    for (int64_t depth = 0; depth < blocks_.cols(); depth += kDepth)
      for (int64_t j = 0; j * kEdge < cols; ++j)
        for (int64_t i = 0; i < blocks_.rows(); ++i)
          multiply_blocks<P>(blocks_.at(i, depth), P * kBlock, weights.blocks().at(first / kEdge + j, depth), P * kBlock,
                             min(kDepth, blocks_.cols() - depth), out + i * kEdge * ldc + j * kEdge, ldc,
                             depth > 0 || start || into == Into::add, [] {});
  }

  void multiply_transposed(const TileValues<T>& values, TileSums& sums, int64_t first = 0) const {
    multiply_transposed(values, sums, [&](int64_t) { return first / kEdge; }, sums.begin(first == 0));
  }

  void multiply_symmetric(const TileValues<T>& values, TileSums& sums) const {
    multiply_transposed(values, sums, [](int64_t col) { return col; }, sums.begin(false));
  }

 private:
  // Those of V's blocks of columns from first(col) on with each block of T's columns. These become right operands, one beside the
  // products of the one before; but with one block of V, or of numbers of one part, that would take as long as the products.
  //
  // A sum of three parts begins at zero, for each of its six products is rounded to the digits of what it is added to, and what
  // all tiles before came to is larger than it. It is added to that beside the next sum.
  template <class First>
  void multiply_transposed(const TileValues<T>& values, const TileSums& sums, const First& first, Into into) const {
    const int64_t rows = blocks_.rows(), cols = blocks_.cols(), slices = kSlices<P> * rows;
    const int64_t vectors = slice(Addition::kVectors, slices);
    const bool ahead = P > 1 && values.blocks().rows() - first(0) > 1;
    const auto pairs = [&](int64_t col) { return pairs_ + (ahead ? col % 2 * rows * P * kBlock : 0); };
    alignas(64) float products[2][kEdge * kEdge];
    int turn = 0;
    Addition addition;
    Pairing<P> pairing;
    const auto begin_pairs = [&](int64_t col) { pairing.begin(blocks_.at(0, col), cols * P * kBlock, rows, pairs(col)); };
    if (ahead) begin_pairs(0);
    for (int64_t col = 0; col < cols; ++col) {
      if (!ahead) begin_pairs(col);
      pairing.finish();
      if (ahead && col + 1 < cols) begin_pairs(col + 1);
      const bf16* const right = pairs(col);
      const int64_t end = values.blocks().rows(), units = slice(Pairing<P>::kUnits * rows, slices * (end - first(col)));
      for (int64_t k = first(col); k < end; ++k) {
        const auto multiply = [&](float* out, bool add, const auto& beside) {
          multiply_blocks<P>(values.blocks().at(k, 0), P * kBlock, right, P * kBlock, rows, out, kEdge, add, beside);
        };
        if (P < 3 || into == Into::store) {
          multiply(sums.block(col, k), into == Into::add, [&] { pairing.advance(units); });
        } else {
          multiply(products[turn], false, [&] { addition.advance(vectors), pairing.advance(units); });
          addition.finish();
          addition.begin(products[turn], sums.block(col, k));
          turn = 1 - turn;
        }
      }
    }
    addition.finish();
  }

  // kBlockRows rows of 32 numbers.
  template <class U>
  void pack_rows(const U* from, int64_t stride, int64_t row, int64_t block_col) {
    bf16* out = blocks_.at(row / kEdge, block_col) + row % kEdge * 32;
    __m512i parts[P];
#pragma GCC unroll 8
    for (int i = 0; i < kBlockRows; ++i, out += 32) {
      split<P>(from + i * stride, parts);
#pragma GCC unroll 3
      for (int p = 0; p < P; ++p) _mm512_storeu_si512(out + p * kBlock, parts[p]);
    }
  }

  Blocked<P> blocks_;
  Buffer<bf16> pairs_;
};

#define BYOL_IN_TILES(T)                                \
  template <>                                           \
  class Weights<T> : public TileWeights<T> {};          \
  template <>                                           \
  class Values<T> : public TileValues<T> {};            \
  template <>                                           \
  class Sums<T> : public TileSums {};                   \
  template <>                                           \
  class Left<T> : public TileLeft<T> {};                \
  template <>                                           \
  class NearLeft<T> : public TileLeft<T> {};

BYOL_IN_TILES(float)
BYOL_IN_TILES(bf16)
BYOL_IN_TILES(f16)
#undef BYOL_IN_TILES

}  // namespace byol::BYOL_ISA

#endif
