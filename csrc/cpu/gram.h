// MᵀM and vᵀM of a tall matrix M, in double: G = Wdᵀ Wd and bd·Wd, which a step needs before it sees a row. Every row shares
// their errors, which do not average out in sums over rows.
#pragma once

#include "operands.h"
#include "parallel_for.h"

namespace byol::BYOL_ISA {

// Rows of a tall matrix, as weights are, that are taken at a time.
constexpr int64_t kWeightRows = 8 * kTileRows;

// MᵀM of some of the rows.
template <class T>
class SquareSums {
 public:
  void allocate_zeros(int64_t cols) {
    cols_ = cols;
    blocks_.allocate(Blocks<double>::size(kWeightRows, cols)), panels_.allocate(Panels<double>::size(kWeightRows, cols));
    sums_.allocate_zeros(Panels<double>::size(cols, cols));
  }
  void add(const View<T>& rows) {
    const Panels<double> panels = Panels<double>::over(panels_, rows.rows, cols_);
    pack_panels(rows, panels);
    zero_padding(panels, rows.rows, cols_);
    multiply_symmetric(pack_blocks<double>(rows, blocks_), panels, sums());
  }
  // On and above the diagonal.
  void add_to(double* out) const {
    constexpr int64_t C = kCols<double>;
    for (int64_t i = 0; i < sums().count(); ++i)
      for (int64_t j = 0; j < min(cols_, (i + 1) * C); ++j)
        for (int64_t k = max(j, i * C); k < min(cols_, (i + 1) * C); ++k) out[j * cols_ + k] += sums().row(j, i)[k - i * C];
  }

 private:
  Panels<double> sums() const { return Panels<double>::over(sums_, cols_, cols_); }

  Buffer<double> blocks_, panels_, sums_;
  int64_t cols_ = 0;
};

// bf16 is so coarse that sums in float do, in which its products are exact.
template <>
class SquareSums<bf16> {
 public:
  void allocate_zeros(int64_t cols) {
    cols_ = cols;
    rows_.allocate(kWeightRows, cols), values_.allocate(kWeightRows, cols), sums_.allocate(cols, cols);
  }
  void add(const View<bf16>& rows) {
    rows_.pack(rows, visit_nothing);
    fill(values_, rows);
    rows_.multiply_symmetric(values_, sums_);
  }
  void add_to(double* out) const { sums_.add_rows(out, cols_, {0, cols_, 0, cols_}, 1); }

 private:
  Left<bf16> rows_;
  Values<bf16> values_;
  Sums<bf16> sums_;
  int64_t cols_ = 0;
};

// products [K, K] = MᵀM and, with a v, v_products [K] += vᵀM; each thread sums a share of the rows. Before some rows of M are
// taken, visit(first, count) is called for them, and for those up to `rows`, of which M may have fewer.
template <class T, class Visit>
void gram(const View<T>& matrix, const Acc<T>* v, int64_t rows, int most_threads, double* products, double* v_products,
          const Visit& visit) {
  struct Part {
    SquareSums<T> squares;
    Buffer<double> v_products;
  };
  const int64_t K = matrix.cols, units = (rows + kWeightRows - 1) / kWeightRows;
  const int threads = int(max(1, min(most_threads, min(units, rows * K * (K + 32) / 400000))));
  Part* parts = new Part[threads];
  try {
    parallel_for(threads, [&](int thread) {
      [[maybe_unused]] const MatrixUnit unit;
      Part& part = parts[thread];
      part.squares.allocate_zeros(K), part.v_products.allocate_zeros(K);
      for (int64_t i = share(units, thread, threads); i < share(units, thread + 1, threads); ++i) {
        const int64_t first = i * kWeightRows, count = min(kWeightRows, matrix.rows - first);
        visit(first, min(kWeightRows, rows - first));
        if (count <= 0) continue;
        part.squares.add(matrix.slice(first, count));
        if (v) add_products(matrix.slice(first, count), v + first, part.v_products);
      }
    });
    std::memset(products, 0, K * K * sizeof(double));
    for (int i = 0; i < threads; ++i) {
      parts[i].squares.add_to(products);
      for (int64_t k = 0; k < K; ++k) v_products[k] += parts[i].v_products[k];
    }
  } catch (...) {
    delete[] parts;
    throw;
  }
  delete[] parts;
  mirror(products, K);
}

}  // namespace byol::BYOL_ISA
