// Squared error:  S = Σ (x − t)²,  dx = scale·(x − t),  dt = −dx.  One read of each operand, 16 bytes at a time.
#pragma once

#include "abi.h"
#include "expand.h"

namespace byol::cuda {

struct SquaredErrorKernelArgs {
  int64_t rows, columns, units;  // a unit is one vector of a row
  Source input, target;
  double* partial;               // [blocks]
  int blocks;
  float* total;
  const float* scale;
  void* d_input;
  int64_t d_input_stride;
  void* d_target;
  int64_t d_target_stride;
  bool d_aligned;
};

template <class T>
BYOL_DEVICE Pack<T> read(const Source& source, int64_t row, int64_t column, int count) {
  const T* from = static_cast<const T*>(source.data) + row * source.stride + column;
  if (source.aligned && count == kVector<T>) return *reinterpret_cast<const Pack<T>*>(from);
  Pack<T> pack;
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) pack.values[j] = j < count ? from[j] : from_float<T>(0.0f);
  return pack;
}

template <class T>
BYOL_DEVICE void write(void* data, int64_t stride, bool aligned, int64_t row, int64_t column, int count, const Pack<T>& pack) {
  T* to = static_cast<T*>(data) + row * stride + column;
  if (aligned && count == kVector<T>) {
    *reinterpret_cast<Pack<T>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j)
    if (j < count) to[j] = pack.values[j];
}

// Calls visit(row, column, count) for this thread's units.
template <class T, class Visit>
BYOL_DEVICE void for_each_unit(const SquaredErrorKernelArgs& args, const Visit& visit) {
  const int64_t per_row = ceil_div(args.columns, kVector<T>);
#pragma unroll 4
  for (int64_t i = int64_t(block_x()) * kThreads + thread(); i < args.units; i += int64_t(args.blocks) * kThreads) {
    const int64_t row = args.rows == 1 ? 0 : i / per_row, column = (i - row * per_row) * kVector<T>;
    visit(row, column, int(smaller(args.columns - column, int64_t(kVector<T>))));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) squared_error_kernel(const __grid_constant__ SquaredErrorKernelArgs args) {
  double sum = 0;
  for_each_unit<T>(args, [&](int64_t row, int64_t column, int count) {
    const Pack<T> x = read<T>(args.input, row, column, count), t = read<T>(args.target, row, column, count);
    float part = 0;
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const float difference = to_float(x.values[j]) - to_float(t.values[j]);
      part += difference * difference;
    }
    sum += double(part);
  });
  sum = block_sum<kThreads>(sum, reinterpret_cast<double*>(shared_memory()));
  if (thread() == 0) args.partial[block_x()] = sum;
}

static __global__ void __launch_bounds__(kThreads) total_kernel(const __grid_constant__ SquaredErrorKernelArgs args) {
  double sum = 0;
  for (int i = thread(); i < args.blocks; i += kThreads) sum += args.partial[i];
  sum = block_sum<kThreads>(sum, reinterpret_cast<double*>(shared_memory()));
  if (thread() == 0) *args.total = float(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) squared_error_backward_kernel(const __grid_constant__ SquaredErrorKernelArgs args) {
  const float scale = *args.scale;
  for_each_unit<T>(args, [&](int64_t row, int64_t column, int count) {
    const Pack<T> x = read<T>(args.input, row, column, count), t = read<T>(args.target, row, column, count);
    Pack<T> dx, dt;
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const float gradient = scale * (to_float(x.values[j]) - to_float(t.values[j]));
      dx.values[j] = from_float<T>(gradient), dt.values[j] = from_float<T>(-gradient);
    }
    if (args.d_input) write(args.d_input, args.d_input_stride, args.d_aligned, row, column, count, dx);
    if (args.d_target) write(args.d_target, args.d_target_stride, args.d_aligned, row, column, count, dt);
  });
}

}  // namespace byol::cuda
