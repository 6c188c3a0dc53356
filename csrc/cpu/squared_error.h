// Squared error:  S = Σ (x − t)²,  dx = scale·(x − t),  dt = −dx.  One read of each operand, no temporary.
#pragma once

#include "abi.h"
#include "numeric.h"
#include "parallel_for.h"
#include "product.h"

namespace byol::BYOL_ISA {

// Long enough to amortise a function call, short enough for a float sum of `kSums` lanes.
constexpr int64_t kChunk = 4096;
constexpr int kSums = 64;

template <class T>
double chunk_error(const T* x, const T* t, int64_t count) {
  using S = Acc<T>;
  S sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int j = 0; j < kSums; ++j) {
      const S difference = load(x[i + j]) - load(t[i + j]);
      sums[j] += difference * difference;
    }
  for (int j = 0; i < count; ++i, ++j) {
    const S difference = load(x[i]) - load(t[i]);
    sums[j] += difference * difference;
  }
  double total = 0;
  for (S sum : sums) total += double(sum);
  return total;
}

// The elements as `units` chunks, none of which crosses the end of a row.
struct Chunks {
  explicit Chunks(const SquaredErrorArgs& args)
      : args(args), per_row((args.cols + kChunk - 1) / kChunk), units(args.rows * per_row) {}
  int64_t row(int64_t unit) const { return unit / per_row; }
  int64_t col(int64_t unit) const { return unit % per_row * kChunk; }
  int64_t size(int64_t unit) const { return min(kChunk, args.cols - col(unit)); }
  template <class T>
  const T* at(const Matrix& matrix, int64_t unit) const {
    return static_cast<const T*>(matrix.data) + row(unit) * matrix.stride + col(unit);
  }

  const SquaredErrorArgs& args;
  int64_t per_row, units;
};

template <class T>
double squared_error(const SquaredErrorArgs& args) {
  const Chunks chunks(args);
  const int threads = int(max(1, min(args.threads, args.rows * args.cols / 32768)));
  Buffer<double> partial;
  partial.allocate_zeros(threads);
  parallel_for(threads, [&](int thread) {
    double total = 0;
    for (int64_t unit = share(chunks.units, thread, threads), end = share(chunks.units, thread + 1, threads); unit < end;
         ++unit)
      total += chunk_error(chunks.at<T>(args.input, unit), chunks.at<T>(args.target, unit), chunks.size(unit));
    partial[thread] = total;
  });
  double total = 0;
  for (int i = 0; i < threads; ++i) total += partial[i];
  return total;
}

template <class T>
void squared_error_backward(const SquaredErrorArgs& args) {
  using S = Acc<T>;
  const Chunks chunks(args);
  const int threads = int(max(1, min(args.threads, args.rows * args.cols / 32768)));
  const S scale = S(args.scale);
  parallel_for(threads, [&](int thread) {
    for (int64_t unit = share(chunks.units, thread, threads), end = share(chunks.units, thread + 1, threads); unit < end;
         ++unit) {
      const T* x = chunks.at<T>(args.input, unit);
      const T* t = chunks.at<T>(args.target, unit);
      const int64_t count = chunks.size(unit), row = chunks.row(unit), col = chunks.col(unit);
      if (args.d_input) {
        T* out = static_cast<T*>(args.d_input) + row * args.d_input_stride + col;
        for (int64_t i = 0; i < count; ++i) out[i] = store<T>(scale * (load(x[i]) - load(t[i])));
      }
      if (args.d_target) {
        T* out = static_cast<T*>(args.d_target) + row * args.d_target_stride + col;
        for (int64_t i = 0; i < count; ++i) out[i] = store<T>(scale * (load(t[i]) - load(x[i])));
      }
    }
  });
}

}  // namespace byol::BYOL_ISA
