// MᵀM of a tall matrix M, in double: G = Wdᵀ Wd, which a step needs before it sees a row. Every row shares G's errors, which do
// not average out in sums over rows.
#pragma once

#include "operands.h"
#include "parallel_for.h"

namespace byol::BYOL_ISA {

// sums += MᵀM, on and above the diagonal.
template <class T>
void add_gram(const View<T>& matrix, double* sums) {
  const int64_t K = matrix.cols;
  constexpr int64_t kRows = 8 * kTileRows;
  Buffer<double> tile(kRows * K), block_data(Blocks<double>::size(kRows, K)), panel_data(Panels<double>::size(kRows, K));
  for (int64_t row = 0; row < matrix.rows; row += kRows) {
    const int64_t count = min(kRows, matrix.rows - row);
    copy<T, double>(matrix.slice(row, count), tile);
    const View<double> view{tile, K, 1, count, K};
    const Panels<double> panels = Panels<double>::over(panel_data, count, K);
    pack_panels(view, panels);
    zero_padding(panels, count, K);
    multiply_symmetric(pack_blocks(view, block_data), panels, Panels<double>::over(sums, K, K));
  }
}

// MᵀM, in `data`; each thread sums a share of the rows.
template <class T>
Panels<double> gram_matrix(const View<T>& matrix, int most_threads, Buffer<double>& data) {
  const int64_t K = matrix.cols;
  const int threads = int(max(1, min(most_threads, matrix.rows * K * K / 400000)));
  const int64_t size = Panels<double>::size(K, K);
  data.allocate_zeros(size * threads);
  parallel_for(threads, [&](int thread) {
    const int64_t first = share(matrix.rows, thread, threads), last = share(matrix.rows, thread + 1, threads);
    add_gram(matrix.slice(first, last - first), data + thread * size);
  });
  for (int i = 1; i < threads; ++i)
    for (int64_t j = 0; j < size; ++j) data[j] += data[i * size + j];
  const Panels<double> products = Panels<double>::over(data, K, K);
  mirror(products, K);
  return products;
}

// The same of a matrix in half precision, in float: its products are exact, and what sums lose is far below its own digits.
// `out` is [K, K]; on and above the diagonal.
template <class T>
void half_gram(const View<T>& matrix, int most_threads, double* out) {
  constexpr int64_t kRows = 8 * 96;
  struct Part {
    Left<T> rows;
    Values<T> values;
    Sums<T> sums;
  };
  const int64_t K = matrix.cols;
  const int threads = int(max(1, min(most_threads, matrix.rows * K * K / 400000)));
  Part* parts = new Part[threads];
  try {
    parallel_for(threads, [&](int thread) {
      [[maybe_unused]] const MatrixUnit unit;
      Part& part = parts[thread];
      part.rows.allocate(kRows, K), part.values.allocate(kRows, K), part.sums.allocate_zeros(K, K);
      const int64_t last = share(matrix.rows, thread + 1, threads);
      for (int64_t row = share(matrix.rows, thread, threads); row < last; row += kRows) {
        const View<T> rows = matrix.slice(row, min(kRows, last - row));
        part.rows.pack(rows, visit_nothing);
        fill(part.values, rows);
        part.rows.multiply_symmetric(part.values, part.sums);
      }
    });
    std::memset(out, 0, K * K * sizeof(double));
    for (int i = 0; i < threads; ++i) parts[i].sums.add_rows(out, K, {0, K, 0, K}, 1);
  } catch (...) {
    delete[] parts;
    throw;
  }
  delete[] parts;
}

}  // namespace byol::BYOL_ISA
