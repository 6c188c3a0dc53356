// Products of a tall matrix T with narrow ones, T·W and Tᵀ·V, a tile of T's rows at a time.
//
// In general the tile is converted to the accumulation type once, and one packing serves both products (product.h). Two
// sets of instructions multiply pairs along the sum, for which the tile is packed twice, as pairs of columns for T·W and as
// pairs of rows for Tᵀ·V: dot products of bf16 (pairs.h), and tiles of bf16, of which float is made, too (tiles.h).
#pragma once

#include "product.h"

namespace byol::BYOL_ISA {

// The type in which codes are multiplied with each other and with G: the accumulation type, but for bf16, which is so coarse that
// hi and lo of 16 digits do.
template <class T>
struct CodeType {
  using type = Acc<T>;
};
template <>
struct CodeType<bf16> {
  using type = f16;
};
template <class T>
using Code = typename CodeType<T>::type;

// W, and in general V.
template <class T>
class Weights {
  using S = Acc<T>;

 public:
  void allocate(int64_t rows, int64_t cols) { data_.allocate(Panels<S>::size(rows, cols)); }
  // From here on a matrix of this size.
  void shape(int64_t rows, int64_t cols) { panels_ = Panels<S>::over(data_, rows, cols), rows_ = rows, cols_ = cols; }
  // Its rows from `first`, a multiple of kTileRows, on: those of one matrix and beside them those of another.
  template <class U>
  void load(int64_t first, const View<U>& left, const View<U>* right = nullptr) {
    const int64_t last = first + left.rows;
    pack_panels(left, panels_, 0, first);
    if (right) pack_panels(*right, panels_, left.cols, first);
    zero_padding(panels_, first, last < rows_ ? last : panels_.rows, rows_, cols_);
  }
  int64_t padded_cols() const { return panels_.cols; }
  const Panels<S>& panels() const { return panels_; }

 protected:
  Panels<S> panels_{};
  int64_t rows_ = 0, cols_ = 0;

 private:
  Buffer<S> data_;
};

// V: `shape` it, `put` its columns, then `pad`.
template <class T>
class Values : public Weights<T> {
 public:
  template <class U>
  void put(const View<U>& source, int64_t col = 0) {
    pack_panels(source, this->panels_, col);
  }
  void pad() { zero_padding(this->panels_, this->rows_, this->cols_); }
};

// Sums over rows in the accumulation type, which in float lose the more digits the more rows there are: what has been summed is
// carried into double once in a while.
template <class S>
class RowSums {
 public:
  void allocate(int64_t count) { count_ = count, data_.allocate(count); }
  S* data() const { return data_; }
  // What to do with the next terms: nothing has to be zero where the first are there for all sums.
  Into begin(bool all) {
    if (begun_) return Into::add;
    begun_ = true;
    if (all) return Into::store;
    std::memset(data_, 0, count_ * sizeof(S));
    return Into::add;
  }
  void carry() {
    if (sizeof(S) == sizeof(double) || !begun_) return;
    if (!carried_) carried_.allocate_zeros(count_);
    for (int64_t i = 0; i < count_; ++i) carried_[i] += double(data_[i]);
    begun_ = false;
  }
  // Calls add(numbers) with those whose sum it is; with nothing when nothing was summed.
  template <class Add>
  void visit(const Add& add) const {
    if (begun_) add(static_cast<const S*>(data_));
    if (carried_) add(static_cast<const double*>(carried_));
  }

 private:
  Buffer<S> data_;
  Buffer<double> carried_;
  int64_t count_ = 0;
  bool begun_ = false;
};

// Some rows and columns of a matrix.
struct Region {
  int64_t row, rows, col, cols;

  Region transposed() const { return {col, cols, row, rows}; }
};

// Tᵀ·V, summed over all tiles of a thread.
template <class T>
class Sums {
  using S = Acc<T>;

 public:
  void allocate(int64_t rows, int64_t cols) {
    sums_.allocate(Panels<S>::size(rows, cols));
    panels_ = Panels<S>::over(sums_.data(), rows, cols);
  }
  const Panels<S>& panels() const { return panels_; }
  Into begin(bool all) { return sums_.begin(all); }
  void carry() { sums_.carry(); }
  // out[i·stride + j] += factor · the number at row i and column j of the region, or = that; nothing when nothing was summed.
  template <class Out>
  void add_rows(Out* out, int64_t stride, const Region& region, double factor, Into into = Into::add) const {
    sums_.visit([&](const auto* numbers) {
      for (int64_t i = 0; i < region.rows; ++i)
        for (int64_t j = 0; j < region.cols;) {
          const auto* from = numbers + panels_.offset(region.row + i, region.col + j);
          const int64_t width = min(kCols<S> - (region.col + j) % kCols<S>, region.cols - j);
          put(out + i * stride + j, from, 1, width, factor, into);
          j += width;
        }
      into = Into::add;
    });
  }
  // The same with out[j·stride + i].
  void add_columns(S* out, int64_t stride, const Region& region, double factor, Into into = Into::add) const {
    sums_.visit([&](const auto* numbers) {
      for (int64_t j = 0; j < region.cols;) {
        const auto* from = numbers + panels_.offset(region.row, region.col + j);
        const int64_t width = min(kCols<S> - (region.col + j) % kCols<S>, region.cols - j);
        put_columns(out + j * stride, stride, from, width, region.rows, factor, into);
        j += width;
      }
      into = Into::add;
    });
  }

 private:
  // out[j·stride + i], i < rows and j < cols, of a panel's number at row i and column j.
  template <class N>
  static void put_columns(S* out, int64_t stride, const N* from, int64_t cols, int64_t rows, double factor, Into into) {
    int64_t first = 0;
#ifdef __AVX512F__
    if constexpr (sizeof(N) == 4)
      if (cols % 16 == 0)
        for (; first + 16 <= rows; first += 16)
          for (int64_t col = 0; col < cols; col += 16)
            visit_columns(from + first * kCols<S> + col, kCols<S> * sizeof(N), [&](int j, __m512i numbers) {
              S* to = out + (col + j) * stride + first;
              const __m512 before = into == Into::add ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
              _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_castsi512_ps(numbers), _mm512_set1_ps(float(factor)), before));
            });
#endif
    for (int64_t j = 0; j < cols; ++j) put(out + j * stride + first, from + first * kCols<S> + j, kCols<S>, rows - first, factor, into);
  }

  template <class N, class Out>
  static void put(Out* out, const N* from, int64_t step, int64_t count, double factor, Into into) {
    for (int64_t i = 0; i < count; ++i) out[i] = Out(N(factor) * from[i * step]) + (into == Into::add ? out[i] : Out(0));
  }

  RowSums<S> sums_;
  Panels<S> panels_{};
};

// A packed tile leaves room for others in a second-level cache of 1 MiB.
constexpr int64_t kTileBytes = 384 * 1024, kHighRankRows = 96, kFewRows = 48;

// The products of a tile of T.
template <class T>
class LeftProducts {
  using S = Acc<T>;

 public:
  // out (+)= T·W, row-major, for columns first … first + cols of W and what shares a panel with them; each row begins with `start`,
  // if there is one. Meanwhile the rows that will be packed next are fetched.
  void multiply(const Weights<T>& weights, int64_t first, int64_t cols, S* out, int64_t ldc, Into into,
                const View<T>& next = {}, const S* start = nullptr) const {
    const Panels<S> panels = weights.panels().from(first).until(cols);
    const Ahead ahead(next, blocks_.rows / kTileRows * (blocks_.cols / kTileRows) * panels.count());
    byol::BYOL_ISA::multiply(blocks_, panels, out, ldc, into, start, ahead);
  }
  // sums += Tᵀ·V, the columns from `first` on, and what shares a panel with them.
  void multiply_transposed(const Values<T>& values, Sums<T>& sums, int64_t first = 0) const {
    byol::BYOL_ISA::multiply_transposed(blocks_, values.panels().from(first), sums.panels().from(first), sums.begin(first == 0));
  }
  // sums += TᵀT, V being T; on and above the diagonal.
  void multiply_symmetric(const Values<T>& values, Sums<T>& sums) const {
    sums.begin(false);
    byol::BYOL_ISA::multiply_symmetric(blocks_, values.panels(), sums.panels());
  }

 protected:
  Blocks<S> blocks_{};
};

// A tile of T, packed.
template <class T>
class Left : public LeftProducts<T> {
  using S = Acc<T>;

 public:
  // The bytes of a number, of a tile, and its rows at high rank and where rows are few (tile_rows). Rows are padded to a multiple of
  // kRows; packing goes by blocks of so many rows and columns.
  static constexpr int64_t kBytes = sizeof(S), kTileBytes = BYOL_ISA::kTileBytes, kHighRankRows = BYOL_ISA::kHighRankRows,
                           kFewRows = BYOL_ISA::kFewRows;
  static constexpr int64_t kRows = kTileRows, kBlockRows = kTileRows, kBlockCols = kStripCols;

  void allocate(int64_t rows, int64_t cols) { data_.allocate(Blocks<S>::size(rows, cols)); }
  // Calls visit(row, col) after each block.
  template <class U, class Visit>
  void pack(const View<U>& tile, const Visit& visit) {
    this->blocks_ = pack_blocks<S>(tile, data_, visit);
  }

 private:
  Buffer<S> data_;
};

// A tile of numbers in the accumulation type that lie in a near cache, one row after the other: no need to pack them.
template <class T>
class NearLeft : public LeftProducts<T> {
 public:
  void allocate(int64_t, int64_t) {}
  // Its padding, up to a multiple of kTileRows rows and columns, has to be there, with any numbers in it.
  void take(const View<Acc<T>>& tile) { this->blocks_ = Blocks<Acc<T>>::in_place(tile); }
};

// The whole of a right operand.
template <class T, class U>
void fill(Values<T>& values, const View<U>& source) {
  values.shape(source.rows, source.cols);
  values.put(source);
  values.pad();
}
template <class T, class U>
void load_weights(Weights<T>& weights, const View<U>& source) {
  weights.allocate(source.rows, source.cols);
  weights.shape(source.rows, source.cols);
  weights.load(0, source);
}

}  // namespace byol::BYOL_ISA
