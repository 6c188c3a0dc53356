// Tiles in shared memory, and the product every kernel here is made of:
//
//   C[16, n] += A[16, k]·B[k, n]      one warp, fp32 sums, A and B in shared memory, either one stored transposed
//
// 16-bit elements are multiplied as they are. A float is split into x = hi + lo, two tf32 numbers, and the product is
// hi·hi + (lo·hi + hi·lo). Tensor cores truncate their sums, a bias that does not average out; so they start from zero, in
// every instruction, or for bfloat16, whose eager products are far coarser, in every call, and are then added to C rounded
// to nearest.
//
// Strides of tiles are padded, so that the eight rows a fragment is read from lie in different banks.
#pragma once

#include "device.h"

namespace byol::cuda {

// Elements in 16 bytes, and in 128: the columns of a tile along which a product sums.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));
template <class T>
constexpr int kChunk = 128 / int(sizeof(T));

// The stride of a tile of `columns` whose fragments are read along rows, or down columns (transposed).
template <class T>
constexpr int row_stride(int columns) {
  return columns + (sizeof(T) == 4 ? 4 : 8);
}
constexpr int column_stride(int columns) { return columns + 8; }

// A matrix in global memory with contiguous rows; aligned: every row begins at a multiple of 16 bytes.
struct Source {
  const void* data;
  int64_t stride;
  int64_t rows;
  int columns;
  bool aligned;
};

template <class T>
BYOL_HD const T* at(const Source& source, int64_t row, int column) {
  return static_cast<const T*>(source.data) + row * source.stride + column;
}

// Starts the copy of a kRows × kColumns tile by all threads of the block. What lies outside of the matrix becomes zero.
template <class T, int kRows, int kColumns, int kThreads>
BYOL_DEVICE void load_tile(T* tile, int stride, const Source& source, int64_t row, int column) {
  constexpr int kPerRow = kColumns / kVector<T>;
  static_assert(kColumns % kVector<T> == 0, "rows of a tile are whole vectors");
#pragma unroll 4
  for (int i = thread(); i < kRows * kPerRow; i += kThreads) {
    const int r = i / kPerRow, c = i % kPerRow * kVector<T>;
    T* to = tile + r * stride + c;
    const int inside = row + r < source.rows ? smaller(larger(source.columns - column - c, 0), kVector<T>) : 0;
    const T* from = inside ? at<T>(source, row + r, column + c) : static_cast<const T*>(source.data);
    if (source.aligned) {
      copy_async(to, from, inside * int(sizeof(T)));
    } else {
      for (int j = 0; j < kVector<T>; ++j) to[j] = j < inside ? from[j] : from_float<T>(0.0f);
    }
  }
}

template <class T>
constexpr bool kFreshSums = true;
template <>
constexpr bool kFreshSums<Bf16> = false;

struct SplitFloat {
  uint32_t high, low;
};
BYOL_DEVICE SplitFloat split(float x) {
  const uint32_t high = round_to_tf32(x);
  return {high, round_to_tf32(x - float_of_bits(high))};
}

// C[16, kColumns] += A[16, kDepth]·B[kDepth, kColumns] of one warp. A is stored [16][kDepth] or, transposed,
// [kDepth][16]; B is stored [kColumns][kDepth] or, transposed, [kDepth][kColumns].
// Lane 4g + t holds C(g, 8n + 2t), C(g, 8n + 2t + 1) in c[n][0…1] and row g + 8 in c[n][2…3].
template <class T, bool kLeftTransposed, bool kRightTransposed, int kDepth, int kColumns>
BYOL_DEVICE void multiply(float (&c)[kColumns / 8][4], const T* a, int a_stride, const T* b, int b_stride) {
  const int lane = thread() % 32;
  if constexpr (sizeof(T) == 2) {
    constexpr int kSteps = kDepth / 16;
    uint32_t left[kSteps][4];
    const T* a_row = kLeftTransposed ? a + (lane % 8 + lane / 16 * 8) * a_stride + lane / 8 % 2 * 8
                                     : a + lane % 16 * a_stride + lane / 16 * 8;
    const T* b_row = kRightTransposed ? b + lane % 16 * b_stride + lane / 16 * 8
                                      : b + (lane % 8 + lane / 16 * 8) * b_stride + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) load_matrices<kLeftTransposed>(left[k], a_row + 16 * k * (kLeftTransposed ? a_stride : 1));
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      float sum[2][4] = {};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t right[4];
        load_matrices<kRightTransposed>(right, b_row + (kRightTransposed ? 16 * k * b_stride + 8 * n : 8 * n * b_stride + 16 * k));
        matrix_multiply<T>(sum[0], left[k], right[0], right[1]);
        matrix_multiply<T>(sum[1], left[k], right[2], right[3]);
        if (kFreshSums<T> || k == kSteps - 1)
#pragma unroll
          for (int i = 0; i < 4; ++i) c[n][i] += sum[0][i], c[n + 1][i] += sum[1][i], sum[0][i] = sum[1][i] = 0;
      }
    }
  } else {
    constexpr int kSteps = kDepth / 8;
    uint32_t high[kSteps][4], low[kSteps][4];
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = g + i % 2 * 8, d = 8 * k + t + i / 2 * 4;
        const SplitFloat x = split(a[kLeftTransposed ? d * a_stride + m : m * a_stride + d]);
        high[k][i] = x.high, low[k][i] = x.low;
      }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      float sum[4] = {}, small[4] = {};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        SplitFloat y[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int d = 8 * k + t + 4 * i, m = 8 * n + g;
          y[i] = split(b[kRightTransposed ? d * b_stride + m : m * b_stride + d]);
        }
        float large[4] = {};
        matrix_multiply_tf32(large, high[k], y[0].high, y[1].high);
        matrix_multiply_tf32(small, low[k], y[0].high, y[1].high);
        matrix_multiply_tf32(small, high[k], y[0].low, y[1].low);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += large[i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) c[n][i] += sum[i] + small[i];
    }
  }
}

// The sum of a value over the block, by all threads, in a fixed order; scratch holds a double for each warp.
template <int kThreads>
BYOL_DEVICE double block_sum(double value, double* scratch) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
  sync();
  if (thread() % 32 == 0) scratch[thread() / 32] = value;
  sync();
  double sum = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += scratch[warp];
  return sum;
}

}  // namespace byol::cuda
