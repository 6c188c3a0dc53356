// Narrow times wide:  Y = scale·(s A + b bd + dU We ± Z Wdᵀ),  tile of rows by tile of rows, chunk of columns by chunk.
//
//   layer forward     Y  = Z Wdᵀ + bd (+ X)          layer backward   dX = dU We (+ dY)
//   step, no target   dX = c (X − bd + dU We − Z Wdᵀ)
//   step, target      dX = c dU We                                    dT = c (T − bd − Z Wdᵀ)
//
// Z of 16-bit elements is split into two of them, hi + lo: the residual is a small difference of large numbers.
#pragma once

#include "abi.h"
#include "tile.h"

namespace byol::cuda {

constexpr int kThreads = 256;
// Shared memory of one block on every GPU from sm_80 on.
constexpr int kSharedBudget = 99 * 1024;

struct ExpandArgs {
  int64_t rows;
  int columns, rank;
  const float *code, *slope;  // [rows, rank]: Z and dU, or null
  float code_sign;
  Source encoder, decoder;    // packed [Kp, Dp]
  const float* bias;          // [Dp]
  Source addend;
  float addend_weight, bias_weight;
  const float* scale;         // null: 1
  void* output;               // contiguous
  bool output_aligned;
};

// The shape of a tile of rows: 8 warps, each 16 rows by kWarpColumns of the Kp code units.
template <int Kp>
struct Rows {
  static constexpr int kRows = Kp == 128 ? 64 : 128;
  static constexpr int kAcross = Kp == 128 ? 2 : 1;
  static constexpr int kWarpColumns = Kp / kAcross;
  static BYOL_DEVICE int warp_row() { return thread() / 32 / kAcross * 16; }
  static BYOL_DEVICE int warp_column(int columns) { return thread() / 32 % kAcross * (columns / kAcross); }
};

template <class T>
constexpr int kCodeTerms = sizeof(T) == 2 ? 2 : 1;

template <class T, int Kp>
struct Expand {
  static constexpr int kRows = Rows<Kp>::kRows;
  static constexpr int kLeftColumns = (1 + kCodeTerms<T>)*Kp;
  static constexpr int kLeftStride = row_stride<T>(kLeftColumns);
  static constexpr int kRightStride = column_stride(kChunk<T>);
  static constexpr int kOutStride = kChunk<T> + 4;
  static constexpr int kLeftBytes = kRows * kLeftStride * int(sizeof(T));
  static constexpr int kRightBytes = Kp * kRightStride * int(sizeof(T));
  static constexpr int kShared = kLeftBytes + kRightBytes + kRows * kOutStride * 4;
  static_assert(kShared <= kSharedBudget, "a tile of codes, one of weights and one of output fit");
};

template <class T>
struct alignas(16) Pack {
  T values[kVector<T>];
};

// The left operand [dU | Z hi | Z lo] of one element.
template <class T, int Kp>
BYOL_DEVICE void put_code(T* left, int row, int k, float code) {
  T* to = left + row * Expand<T, Kp>::kLeftStride + Kp + k;
  to[0] = from_float<T>(code);
  if constexpr (kCodeTerms<T> == 2) to[Kp] = from_float<T>(code - to_float(to[0]));
}

// acc += A·B for a [16, Kp] part of the left operand.
template <class T, int Kp, int kColumns>
BYOL_DEVICE void multiply_term(float (&acc)[kColumns / 8][4], const T* left, const T* right) {
  using E = Expand<T, Kp>;
  constexpr int kDepth = Kp < kChunk<T> ? Kp : kChunk<T>;
#pragma unroll 1
  for (int k = 0; k < Kp; k += kDepth)
    multiply<T, false, true, kDepth, kColumns>(acc, left + k, E::kLeftStride, right + k * E::kRightStride, E::kRightStride);
}

// All chunks of columns of the rows from first on; the left operand is in shared memory.
template <class T, int Kp>
BYOL_DEVICE void expand_rows(const ExpandArgs& args, int64_t first, unsigned char* shared) {
  using E = Expand<T, Kp>;
  constexpr int kColumns = kChunk<T> / Rows<Kp>::kAcross;
  const T* left = reinterpret_cast<const T*>(shared) + Rows<Kp>::warp_row() * E::kLeftStride;
  T* right = reinterpret_cast<T*>(shared + E::kLeftBytes);
  float* out = reinterpret_cast<float*>(shared + E::kLeftBytes + E::kRightBytes);
  const int warp_column = Rows<Kp>::warp_column(kChunk<T>), lane = thread() % 32;
  const float scale = args.scale ? *args.scale : 1.0f;
#pragma unroll 1
  for (int column = 0; column < args.columns; column += kChunk<T>) {
    float acc[kColumns / 8][4] = {};
    if (args.slope) {
      sync();
      load_tile<T, Kp, kChunk<T>, kThreads>(right, E::kRightStride, args.encoder, 0, column);
      copy_commit(), copy_wait<0>(), sync();
      multiply_term<T, Kp, kColumns>(acc, left, right + warp_column);
    }
    if (args.code_sign != 0) {
      sync();
      load_tile<T, Kp, kChunk<T>, kThreads>(right, E::kRightStride, args.decoder, 0, column);
      copy_commit(), copy_wait<0>(), sync();
#pragma unroll 1
      for (int term = 1; term <= kCodeTerms<T>; ++term)
        multiply_term<T, Kp, kColumns>(acc, left + term * Kp, right + warp_column);
    }
    sync();
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        out[(Rows<Kp>::warp_row() + lane / 4 + i / 2 * 8) * E::kOutStride + warp_column + 8 * n + lane % 4 * 2 + i % 2] =
            acc[n][i];
    sync();
    constexpr int kPerRow = kChunk<T> / kVector<T>;
    for (int i = thread(); i < E::kRows * kPerRow; i += kThreads) {
      const int r = i / kPerRow, c = i % kPerRow * kVector<T>;
      const int count = smaller(args.columns - column - c, kVector<T>);
      if (first + r >= args.rows || count <= 0) continue;
      const bool whole = count == kVector<T>;
      Pack<T> addend, result;
      if (args.addend_weight != 0) {
        const T* from = at<T>(args.addend, first + r, column + c);
        if (whole && args.addend.aligned) addend = *reinterpret_cast<const Pack<T>*>(from);
        else
          for (int j = 0; j < kVector<T>; ++j) addend.values[j] = j < count ? from[j] : from_float<T>(0.0f);
      }
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        float value = args.bias_weight != 0 ? args.bias_weight * args.bias[column + c + j] : 0.0f;
        if (args.addend_weight != 0) value += args.addend_weight * to_float(addend.values[j]);
        result.values[j] = from_float<T>(scale * (value + out[r * E::kOutStride + c + j]));
      }
      T* to = static_cast<T*>(args.output) + (first + r) * args.columns + column + c;
      if (whole && args.output_aligned) *reinterpret_cast<Pack<T>*>(to) = result;
      else
        for (int j = 0; j < count; ++j) to[j] = result.values[j];
    }
  }
}

template <class T, int Kp>
__global__ void __launch_bounds__(kThreads) expand_kernel(const __grid_constant__ ExpandArgs args) {
  using E = Expand<T, Kp>;
  const int64_t first = int64_t(block_x()) * E::kRows;
  T* left = reinterpret_cast<T*>(shared_memory());
  for (int i = thread(); i < E::kRows * Kp; i += kThreads) {
    const int r = i / Kp, k = i % Kp;
    const bool inside = first + r < args.rows && k < args.rank;
    const int64_t from = (first + r) * args.rank + k;
    if (args.code_sign != 0) put_code<T, Kp>(left, r, k, inside ? args.code_sign * args.code[from] : 0.0f);
    if (args.slope) left[r * E::kLeftStride + k] = from_float<T>(inside ? args.slope[from] : 0.0f);
  }
  expand_rows<T, Kp>(args, first, shared_memory());
}

}  // namespace byol::cuda
