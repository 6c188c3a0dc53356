// The one matrix product, C = A·B or C = Aᵀ·B (+ C), that every kernel is made of.
//
// A is packed into square blocks of R×R numbers, row-major inside: the block in block-row p and block-column t holds
// A[p·R … p·R+R, t·R … t·R+R]. Because the blocks are square, A and Aᵀ are read equally well from one packing, so a tile of
// X is packed once and serves both X·W and Xᵀ·V. B is packed into panels of `kCols` columns, each panel row-major. All edges
// are padded with zeros, which sums leave out. One step of the register tile is an outer product of R numbers of A with
// `kCols` of B; at the edges there are lower and narrower ones.
#pragma once

#include <cstdint>

#include "memory.h"
#include "numeric.h"
#include "transpose.h"

// Bytes in a vector register, and the rows of the register tile: R rows × 2 vectors of accumulators must fit the file.
#ifndef BYOL_VECTOR_BYTES
#error "BYOL_VECTOR_BYTES and BYOL_TILE_ROWS are set by the build, per instruction set"
#endif

namespace byol::BYOL_ISA {

constexpr int kTileRows = BYOL_TILE_ROWS;

template <class S>
constexpr int kLanes = BYOL_VECTOR_BYTES / int(sizeof(S));
template <class S>
constexpr int kCols = 2 * kLanes<S>;

// How much of the inner dimension one accumulator sums before it is added to C: bounds the rounding error of long sums,
// and keeps a panel of B in a near cache.
constexpr int64_t kDepth = 43 * kTileRows;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// An aligned array of numbers that is freed with its scope.
template <class S>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { allocate(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { give_memory(data_, bytes_); }

  void allocate(int64_t count) {
    give_memory(data_, bytes_);
    data_ = nullptr;
    bytes_ = count * int64_t(sizeof(S));
    data_ = static_cast<S*>(take_memory(bytes_));
  }
  void allocate_zeros(int64_t count) {
    allocate(count);
    std::memset(data_, 0, count * sizeof(S));
  }
  explicit operator bool() const { return data_; }
  operator S*() const { return data_; }

 private:
  S* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Keeps an argument out of template argument deduction, so that a Buffer converts to a pointer there.
template <class S>
struct Same {
  using type = S;
};
template <class S>
using Pointer = typename Same<S>::type*;

// A source matrix of storage type T with any strides; reading beyond rows × cols gives zero.
template <class T>
struct View {
  const T* data;
  int64_t row_stride, col_stride;
  int64_t rows, cols;

  const T* row(int64_t index) const { return data + index * row_stride; }
  View transposed() const { return {data, col_stride, row_stride, cols, rows}; }
  View slice(int64_t first, int64_t count) const { return {data + first * row_stride, row_stride, col_stride, count, cols}; }
};

// Left operand, packed (see the top of the file) or where it is.
template <class S>
struct Blocks {
  static constexpr int R = kTileRows;

  const S* data;
  int64_t rows, cols;            // with padding, multiples of R
  int64_t live_rows, live_cols;  // without
  int64_t step = R, right = R * R, down = cols * R;  // from a row of a block, a block, a block-row to the next

  static int64_t size(int64_t rows, int64_t cols) { return round_up(rows, R) * round_up(cols, R); }
  // Its padding has to be there, with any numbers in it.
  static Blocks in_place(const View<S>& source) {
    const int64_t stride = source.row_stride;
    return {source.data, round_up(source.rows, R), round_up(source.cols, R), source.rows, source.cols, stride, R, R * stride};
  }
  const S* block(int64_t row, int64_t col) const { return data + row / R * down + col / R * right; }
};

// Columns that are packed at a time: what they are packed into stays in the first-level cache from row to row.
constexpr int64_t kStripCols = 16 * kTileRows;

inline void visit_nothing(int64_t, int64_t) {}

// Row by row, for rows that lie a power of two apart would drive each other out of the first-level cache.
template <class T, class S>
void pack_strip(const T* source, int64_t stride, int64_t rows, int64_t cols, S* out) {
  constexpr int R = kTileRows;
  for (int64_t i = 0; i < rows; ++i, source += stride, out += R) {
    // The rows of the next strip: each is a stream of its own, too short for the hardware to foresee.
    for (int64_t j = 0; j < cols; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(source + R * stride + j);
    int64_t col = 0;
    for (; col + R <= cols; col += R) {
      S* block = out + col * R;
      if constexpr (sizeof(T) == sizeof(S)) {
        std::memcpy(block, source + col, R * sizeof(S));
      } else {
        for (int j = 0; j < R; ++j) block[j] = load(source[col + j]);
      }
    }
    for (int64_t j = col; j < cols; ++j) out[col * R + j - col] = load(source[j]);
  }
}

// The same of any strides, along columns.
template <class T, class S>
void pack_strip(const View<T>& source, int64_t row, int64_t col, int64_t rows, int64_t cols, S* out) {
  constexpr int R = kTileRows;
  for (int64_t j = 0; j < cols; ++j) {
    const T* from = source.row(row) + (col + j) * source.col_stride;
    for (int64_t i = 0; i < rows; ++i) out[j / R * R * R + i * R + j % R] = load(from[i * source.row_stride]);
  }
}

// In numbers of type S; calls visit(row, col) after each strip of kTileRows rows and kStripCols columns, by its first row and
// column.
template <class S, class T, class Visit>
Blocks<S> pack_blocks(const View<T>& source, Pointer<S> data, const Visit& visit) {
  constexpr int R = kTileRows;
  const Blocks<S> blocks{data, round_up(source.rows, R), round_up(source.cols, R), source.rows, source.cols};
  for (int64_t row = 0; row < blocks.rows; row += R)
    for (int64_t col = 0; col < blocks.cols; col += kStripCols) {
      const int64_t rows = max(0, min(R, source.rows - row)), cols = min(kStripCols, source.cols - col);
      S* out = data + row * blocks.cols + col * R;
      if (rows < R || cols % R) std::memset(out, 0, round_up(cols, R) * R * sizeof(S));
      if (source.col_stride == 1) {
        pack_strip(source.row(row) + col, source.row_stride, rows, cols, out);
      } else {
        pack_strip(source, row, col, rows, cols, out);
      }
      visit(row, col);
    }
  return blocks;
}

template <class S, class T>
Blocks<S> pack_blocks(const View<T>& source, Pointer<S> data) {
  return pack_blocks<S>(source, data, visit_nothing);
}

// Packed right operand: panels of kCols columns, rows padded to a multiple of kTileRows.
template <class S>
struct Panels {
  S* data;
  int64_t rows, cols;  // as packed
  int64_t live_cols;   // without padding

  static int64_t size(int64_t rows, int64_t cols) { return round_up(rows, kTileRows) * round_up(cols, kCols<S>); }
  static Panels over(S* data, int64_t rows, int64_t cols) {
    return {data, round_up(rows, kTileRows), round_up(cols, kCols<S>), cols};
  }
  int64_t count() const { return cols / kCols<S>; }
  int64_t stride() const { return rows * kCols<S>; }
  S* panel(int64_t i) const { return data + i * stride(); }
  S* row(int64_t r, int64_t panel_index) const { return panel(panel_index) + r * kCols<S>; }
  int64_t offset(int64_t r, int64_t c) const { return c / kCols<S> * stride() + r * kCols<S> + c % kCols<S>; }
  S* at(int64_t r, int64_t c) const { return data + offset(r, c); }
  // The panels that hold the columns from `first` on, or those before `end`.
  Panels from(int64_t first) const {
    const int64_t skipped = first / kCols<S> * kCols<S>;
    return {panel(first / kCols<S>), rows, cols - skipped, live_cols - skipped};
  }
  Panels until(int64_t end) const { return {data, rows, round_up(end, kCols<S>), min(live_cols, end)}; }
};

// Writes `source` into the panels from column `col` and row `row` on; the caller pads (zero_padding).
template <class T, class S>
void pack_panels(const View<T>& source, const Panels<S>& panels, int64_t col = 0, int64_t row = 0) {
  constexpr int64_t C = kCols<S>;
  for (int64_t begin = 0; begin < source.cols;) {
    const int64_t lane = (col + begin) % C, width = min(C - lane, source.cols - begin);
    S* out = panels.row(row, (col + begin) / C) + lane;
    const T* from = source.data + begin * source.col_stride;
    if (source.col_stride == 1) {
      for (int64_t r = 0; r < source.rows; ++r)
        for (int64_t j = 0; j < width; ++j) out[r * C + j] = load(from[r * source.row_stride + j]);
    } else {
      // Transposed source: read along its contiguous direction, a few cache lines of the panel at a time.
      constexpr int64_t kStrip = 16;
      for (int64_t top = 0; top < source.rows; top += kStrip) {
        const int64_t bottom = min(top + kStrip, source.rows);
        int64_t j = 0;
#ifdef __AVX512F__
        if constexpr (sizeof(T) == 4 && sizeof(S) == 4)
          if (source.row_stride == 1 && bottom - top == kStrip)
            for (; j + 16 <= width; j += 16)
              visit_columns(from + top + j * source.col_stride, source.col_stride * int64_t(sizeof(T)),
                            [&](int i, __m512i numbers) { _mm512_storeu_si512(out + (top + i) * C + j, numbers); });
#endif
        for (; j < width; ++j)
          for (int64_t r = top; r < bottom; ++r)
            out[r * C + j] = load(from[r * source.row_stride + j * source.col_stride]);
      }
    }
    begin += width;
  }
}

// In rows first … last: zeros rows beyond `rows` and columns beyond `cols`.
template <class S>
void zero_padding(const Panels<S>& panels, int64_t first, int64_t last, int64_t rows, int64_t cols) {
  constexpr int64_t C = kCols<S>;
  for (int64_t i = 0; i < panels.count(); ++i) {
    S* panel = panels.panel(i);
    const int64_t live = max(0, min(C, cols - i * C));
    if (live < C)
      for (int64_t r = first; r < min(last, rows); ++r)
        for (int64_t j = live; j < C; ++j) panel[r * C + j] = S(0);
    if (last > rows) std::memset(panel + rows * C, 0, (last - rows) * C * sizeof(S));
  }
}
template <class S>
void zero_padding(const Panels<S>& panels, int64_t rows, int64_t cols) {
  zero_padding(panels, 0, panels.rows, rows, cols);
}

// What a product does with what C holds. A bias is where the sums of a column begin: added to a rounded sum, it would be rounded
// the same way in every row, which does not average out over rows.
enum class Into { store, add };

// Whether a line that is fetched as not to be kept goes to the second-level cache all the same, and past the third: it then
// drives nothing out of there. AMD's processors do that; to Intel's it means the first-level cache, of which it would soon be gone.
inline bool fetches_past_the_last_cache() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// Rows that will be packed next, fetched into the second-level cache a few lines at a time while a product is computed.
class Ahead {
 public:
  Ahead() = default;
  // While so many blocks are multiplied. Rows that do not follow each other are left to the processor.
  template <class T>
  Ahead(const View<T>& rows, int64_t blocks) {
    if (rows.row_stride != rows.cols || rows.col_stride != 1 || rows.rows <= 0) return;
    const int64_t lines = (rows.rows * rows.cols * int64_t(sizeof(T)) + kLine - 1) / kLine;
    next_ = reinterpret_cast<const char*>(rows.data);
    end_ = next_ + lines * kLine;
    step_ = (lines + blocks - 1) / blocks * kLine;
    passes_ = fetches_past_the_last_cache();
  }
  // With each block.
  void fetch() {
    for (const char* last = next_ + step_; next_ < last; next_ += kLine)
      passes_ ? __builtin_prefetch(next_, 0, 0) : __builtin_prefetch(next_, 0, 2);
    if (next_ >= end_) step_ = 0;
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *next_ = nullptr, *end_ = nullptr;
  int64_t step_ = 0;
  bool passes_ = false;
};

// What a register tile's sum will be added to, fetched while it is being summed.
template <class S>
inline void fetch_sums(const S* c, int64_t ldc) {
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i)
    for (int j = 0; j < kCols<S>; j += 64 / int(sizeof(S))) __builtin_prefetch(c + i * ldc + j, 1);
}

// c[0…kRows, 0…kVectors] (+)= Σ over `depth` of the outer products of A (or Aᵀ) with B, each row beginning with `start`, if
// there is one. Rows of a block of A are `step` apart, and `next` leads to the next block along the sum.
template <class S, bool kTransposed, int kRows, int kVectors, class RowStep>
inline void register_tile(const S* a, RowStep step, int64_t next, const S* b, int64_t depth, S* c, int64_t ldc, Into into,
                          const S* start, Ahead& ahead) {
  typedef S Vector __attribute__((vector_size(BYOL_VECTOR_BYTES), aligned(alignof(S)), may_alias));
  constexpr int R = kTileRows, L = kLanes<S>, C = kCols<S>;
  Vector sum[kRows][kVectors];
  if (into == Into::add) fetch_sums(c, ldc);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[i][v] = start ? *reinterpret_cast<const Vector*>(start + v * L) : Vector{};
  const auto add_product = [&](int k) {
    const S* column = kTransposed ? a + k * step : a + k;
    Vector row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) row[v] = *reinterpret_cast<const Vector*>(b + v * L);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const S value = column[kTransposed ? i : i * step];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] += value * row[v];
    }
    b += C;
  };
  int64_t left = depth;
  for (; left >= R; left -= R, a += next) {
    ahead.fetch();
    for (int k = 0; k < R; ++k) add_product(k);
  }
  for (int k = 0; k < left; ++k) add_product(k);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Vector* out = reinterpret_cast<Vector*>(c + i * ldc + v * L);
      *out = into == Into::add ? *out + sum[i][v] : sum[i][v];
    }
}

// Calls body with how much of a register tile there is to do, in constants: thirds of its rows, and its vectors.
template <int kNumber>
struct Constant {
  static constexpr int value = kNumber;
  constexpr operator int64_t() const { return kNumber; }
};
template <class S, class Body>
inline void with_edges(int64_t rows, int64_t cols, const Body& body) {
  constexpr int R = kTileRows, L = kLanes<S>;
  static_assert(R % 3 == 0);
  const auto with_rows = [&](auto vectors) {
    if (rows > R / 3 * 2) return body(Constant<R>{}, vectors);
    if (rows > R / 3) return body(Constant<R / 3 * 2>{}, vectors);
    return body(Constant<R / 3>{}, vectors);
  };
  if (cols > L) return with_rows(Constant<2>{});
  return with_rows(Constant<1>{});
}

// Calls body with how far the rows of a block are apart: a constant where they are packed.
template <class S, class Body>
inline void with_step(const Blocks<S>& a, const Body& body) {
  a.step == kTileRows ? body(Constant<kTileRows>{}) : body(a.step);
}

// C[a.rows, b.cols] (+)= A·B, row-major with row stride ldc; each row begins with `start`, if there is one.
template <class S>
void multiply(const Blocks<S>& a, const Panels<S>& b, Pointer<S> c, int64_t ldc, Into into = Into::store,
              const S* start = nullptr, Ahead ahead = {}) {
  constexpr int64_t C = kCols<S>;
  for (int64_t depth = 0; depth < a.live_cols; depth += kDepth) {
    const int64_t count = min(kDepth, a.live_cols - depth);
    for (int64_t j = 0; j < b.count(); ++j)
      for (int64_t row = 0; row < a.rows; row += kTileRows)
        with_edges<S>(a.live_rows - row, b.live_cols - j * C, [&](auto rows, auto vectors) {
          with_step(a, [&](auto step) {
            register_tile<S, false, rows.value, vectors.value>(a.block(row, depth), step, a.right, b.row(depth, j), count,
                                                               c + row * ldc + j * C, ldc, depth > 0 ? Into::add : into,
                                                               start && depth == 0 ? start + j * C : nullptr, ahead);
          });
        });
  }
}

// C (+)= Aᵀ·B, C in panels: its rows until `end(j)` in panel j.
template <class S, class End>
void multiply_transposed(const Blocks<S>& a, const Panels<S>& b, const Panels<S>& c, const End& end, Into into) {
  Ahead nothing;
  for (int64_t depth = 0; depth < a.live_rows; depth += kDepth) {
    const int64_t count = min(kDepth, a.live_rows - depth);
    for (int64_t j = 0; j < b.count(); ++j)
      for (int64_t col = 0; col < end(j); col += kTileRows)
        with_edges<S>(a.live_cols - col, b.live_cols - j * kCols<S>, [&](auto rows, auto vectors) {
          with_step(a, [&](auto step) {
            register_tile<S, true, rows.value, vectors.value>(a.block(depth, col), step, a.down, b.row(depth, j), count,
                                                              c.row(col, j), kCols<S>, depth > 0 ? Into::add : into,
                                                              static_cast<const S*>(nullptr), nothing);
          });
        });
  }
}

// C[a.cols, b.cols] (+)= Aᵀ·B.
template <class S>
void multiply_transposed(const Blocks<S>& a, const Panels<S>& b, const Panels<S>& c, Into into) {
  multiply_transposed(a, b, c, [&](int64_t) { return a.cols; }, into);
}

// C += Aᵀ·A, given A in blocks and in panels; below the diagonal, only what shares a tile with it is right.
template <class S>
void multiply_symmetric(const Blocks<S>& a, const Panels<S>& b, const Panels<S>& c) {
  multiply_transposed(a, b, c, [&](int64_t j) { return min(a.cols, (j + 1) * kCols<S>); }, Into::add);
}

}  // namespace byol::BYOL_ISA
