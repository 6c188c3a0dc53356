// The scatter of rows about a point, and their sum about it; what a covariance is made of:
//
//   image += Σ (x − s)(x − s)ᵀ  (its upper triangle),    sums += Σ (x − s).
//
// Some hundred rows at a time are shifted and packed into panels, which are both operands: a register tile is R columns of
// one panel by the C columns of another, and R divides C. Registers sum rows, the image sums in double.
// Every entry is summed in the same order whatever the number of threads.
#pragma once

#include <atomic>

#include "operands.h"
#include "parallel_for.h"

namespace byol::BYOL_ISA {

template <class S>
class Scatter {
  typedef S Vector __attribute__((vector_size(BYOL_VECTOR_BYTES), aligned(alignof(S)), may_alias));
  // The register tile: R by three vectors, about as many accumulators as that of a product, with R a divisor of C.
  static constexpr int L = kLanes<S>, C = 3 * L, kMost = kTileRows * 2 / 3, R = C % kMost ? kTileRows / 2 : kMost;
  static_assert(C % R == 0);
  // Rows between two looks at the image: many hide its traffic, few stay in the cache. A register sums fewer of them, so
  // that less is lost to rounding.
  static constexpr int64_t kRows = 1024, kSum = 128;
  // Panels of the left operand that stay in the second-level cache while those of the right operand pass.
  static constexpr int64_t kLeft = 240 * 1024 / (kRows * C * sizeof(S));
  static_assert(kLeft > 0);

 public:
  explicit Scatter(const ScatterArgs& args)
      : args(args),
        D(args.features),
        panels((D + C - 1) / C),
        threads(int(max(1, min(args.threads, args.rows * D * D / 400000)))),
        packed(min(kRows, args.rows) * panels * C), column_sums(panels * C) {}

  void run() {
    for (int64_t first = 0; first < args.rows; first += kRows) {
      const int64_t rows = min(kRows, args.rows - first);
      parallel_for(threads, [&](int thread) { pack(first, rows, thread); });
      next = 0;
      parallel_for(threads, [&](int) { multiply(rows); });
    }
  }

 private:
  // Rows first … first + rows, less the shift: the columns of this thread's panels.
  void pack(int64_t first, int64_t rows, int thread) {
    const int64_t begin = share(panels, thread, threads), end = share(panels, thread + 1, threads);
    S* sums = column_sums + begin * C;
    std::memset(sums, 0, (end - begin) * C * sizeof(S));
    for (int64_t r = 0; r < rows; ++r) {
      const S* row = static_cast<const S*>(args.input.data) + (first + r) * args.input.stride;
      for (int64_t p = begin; p < end; ++p) pack_row(row, p, packed + (p * rows + r) * C);
    }
    for (int64_t j = begin * C; j < min(end * C, D); ++j) args.sums[j] += double(column_sums[j]);
  }

  void pack_row(const S* row, int64_t p, S* out) {
    const int64_t col = p * C, cols = min(C, D - col);
    const S* shift = static_cast<const S*>(args.shift) + col;
    S* sum = column_sums + col;
    if (cols == C) {
      for (int j = 0; j < C; ++j) out[j] = row[col + j] - shift[j];
    } else {
      for (int j = 0; j < C; ++j) out[j] = j < cols ? row[col + j] - shift[j] : S(0);
    }
    for (int j = 0; j < C; ++j) sum[j] += out[j];
  }

  // The tiles that reach above the diagonal, some left panels times one right panel at a time.
  void multiply(int64_t rows) {
    int64_t index = 0, taken = next++;
    for (int64_t left = 0; left < panels; left += kLeft)
      for (int64_t right = left; right < panels; ++right) {
        if (index++ != taken) continue;
        for (int64_t p = left; p < min(left + kLeft, right + 1); ++p) multiply_panels(rows, p, right);
        taken = next++;
      }
  }

  // image[C·p …, C·q …] += panel pᵀ · panel q.
  void multiply_panels(int64_t rows, int64_t p, int64_t q) {
    const int64_t height = min(C, D - p * C), width = min(C, D - q * C);
    alignas(64) S sums[C * C] = {};
    for (int64_t row = 0; row < rows; row += kSum) {
      const S *a = packed + (p * rows + row) * C, *b = packed + (q * rows + row) * C;
      // Vectors beyond the matrix, and on the diagonal those below it, are left out.
      for (int c = 0; c < height; c += R)
        tile(p == q ? c / L : 0, int((width + L - 1) / L), a + c, b, min(kSum, rows - row), sums + c * C);
    }
    double* image = args.image + p * C * D + q * C;
    if (height == C && width == C) {
      for (int i = 0; i < C; ++i)
        for (int j = 0; j < C; ++j) image[i * D + j] += double(sums[i * C + j]);
    } else {
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) image[i * D + j] += double(sums[i * C + j]);
    }
  }

  static void tile(int begin, int end, const S* a, const S* b, int64_t rows, S* sums) {
    if (end == 1) return tile<0, 1>(a, b, rows, sums);
    if (end == 2) return begin ? tile<1, 2>(a, b, rows, sums) : tile<0, 2>(a, b, rows, sums);
    if (begin == 0) return tile<0, 3>(a, b, rows, sums);
    begin == 1 ? tile<1, 3>(a, b, rows, sums) : tile<2, 3>(a, b, rows, sums);
  }

  // sums[0 … R, 0 … C] += Σ over the rows of the outer products of a[0 … R] with vectors kBegin … kEnd of b[0 … C].
  template <int kBegin, int kEnd>
  static void tile(const S* a, const S* b, int64_t rows, S* sums) {
    Vector sum[R][3] = {};
    for (int64_t r = 0; r < rows; ++r, a += C, b += C) {
      const Vector* right = reinterpret_cast<const Vector*>(b);
      const Vector b0 = right[0], b1 = right[1], b2 = right[2];
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const S value = a[i];
        if (kBegin == 0) sum[i][0] += value * b0;
        if (kBegin <= 1 && kEnd > 1) sum[i][1] += value * b1;
        if (kEnd > 2) sum[i][2] += value * b2;
      }
    }
    Vector* out = reinterpret_cast<Vector*>(sums);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
      for (int j = kBegin; j < kEnd; ++j) out[3 * i + j] += sum[i][j];
  }

  const ScatterArgs& args;
  const int64_t D, panels;
  const int threads;
  Buffer<S> packed, column_sums;
  std::atomic<int64_t> next{0};
};

}  // namespace byol::BYOL_ISA
