// The second pass: long sums over the rows, for a tile of columns and a share of the rows,
//
//   C = Leftᵀ·[first, second]    of X or T or dY with [Z, dU] or one of them; tied, of X with V; of [Z lo, Z] with Z for ZᵀZ,
//                                or with [Z, Z′ − Z] for ZᵀZ′ (rows.h)
//
// and Σ (t − bd) beside it. Shares are added in a fixed order by finish.h: no atomic sums, so results repeat bit by bit.
// In rows of tiles in direct form, T is replaced by S = T − bd − Z Wdᵀ = −R in shared memory, ZᵀZ leaves them out, and V is dU:
// there, and there only, X has a product with Z of its own.
#pragma once

#include "rows.h"

namespace byol::cuda {

// The form of the tiles of rows in which a product is made.
enum class Form : int { any, gram, direct };

// One left matrix, and what it is multiplied with: one or two parts of the codes, side by side.
struct ColumnsJob {
  Source left{}, right{};
  bool first = false, second = false;
  int second_column = 0;          // of right
  Form first_form = Form::any;
  bool is_target = false;         // direct form: S instead of T, in the first product
  const float* bias = nullptr;    // of Σ (t − bd); null: none
  int tiles = 0;                  // of columns
  float* out = nullptr;           // [splits, tiles·kColumns, 2 Kp]
  double* column_sums = nullptr;  // [splits, tiles·kColumns] or null
};

constexpr int kMaxJobs = 3;

struct ColumnsArgs {
  ColumnsJob jobs[kMaxJobs];
  int64_t rows, rows_per_split;
  const int* direct;  // by row tile of the first pass, or null
  Source decoder;     // direct form
  const float* decoder_bias;
};

template <class T, int Kp>
struct ColumnTile : Rows<Kp> {
  static constexpr int kColumns = Rows<Kp>::kRows;  // they are the rows of Leftᵀ
  static constexpr int kDepth = kChunk<T>;
  static constexpr int kLeftStride = column_stride(kColumns), kRightStride = column_stride(2 * Kp);
  static constexpr int kStage = kDepth * (kLeftStride + kRightStride);
  static constexpr int kStageBytes = kStage * int(sizeof(T));
  static constexpr int kStages = 3 * kStageBytes <= 72 * 1024 ? 3 : 2;
  static constexpr int kShared = larger_of(kStages * kStageBytes, kThreads * 8);
  static_assert(kShared <= kSharedBudget, "two stages fit");
  static_assert(Rows<Kp>::kRows % kDepth == 0, "a step lies in one row tile of the first pass");
};

template <class T, int Kp>
__global__ void __launch_bounds__(kThreads) columns_kernel(const __grid_constant__ ColumnsArgs args) {
  using Tile = ColumnTile<T, Kp>;
  constexpr int kColumns = Tile::kWarpColumns;
  int number = 0, tile = block_x();
  while (tile >= args.jobs[number].tiles) tile -= args.jobs[number++].tiles;
  const ColumnsJob& job = args.jobs[number];
  const int first_column = tile * Tile::kColumns;
  const int64_t begin = block_y() * args.rows_per_split, end = smaller(begin + args.rows_per_split, args.rows);
  T* stages = reinterpret_cast<T*>(shared_memory());
  const int warp_row = Tile::warp_row(), warp_column = Tile::warp_column(Kp);
  const int column = thread() % Tile::kColumns, part = thread() / Tile::kColumns;

  float first_sum[kColumns / 8][4] = {}, second_sum[kColumns / 8][4] = {};
  double column_sum = 0;
  const float bias = job.bias && first_column + column < job.left.columns ? job.bias[first_column + column] : 0.0f;
  const int steps = int(ceil_div(end - begin, Tile::kDepth));
  const auto load = [&](int i) {
    if (i < steps) {
      T* left = stages + i % Tile::kStages * Tile::kStage;
      const int64_t row = begin + int64_t(i) * Tile::kDepth;
      load_tile<T, Tile::kDepth, Tile::kColumns, kThreads>(left, Tile::kLeftStride, job.left, row, first_column);
      load_tile<T, Tile::kDepth, 2 * Kp, kThreads>(left + Tile::kDepth * Tile::kLeftStride, Tile::kRightStride, job.right,
                                                 row, 0);
    }
    copy_commit();
  };
  for (int i = 0; i < Tile::kStages - 1; ++i) load(i);
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    copy_wait<Tile::kStages - 2>();
    sync();
    load(i + Tile::kStages - 1);
    T* left = stages + i % Tile::kStages * Tile::kStage;
    const T* right = left + Tile::kDepth * Tile::kLeftStride;
    const int64_t row = begin + int64_t(i) * Tile::kDepth;
    const bool direct = args.direct && args.direct[row / Rows<Kp>::kRows];
    if (job.second)
      multiply<T, true, true, Tile::kDepth, kColumns>(second_sum, left + warp_row, Tile::kLeftStride,
                                                      right + job.second_column + warp_column, Tile::kRightStride);
    if constexpr (sizeof(T) == 4) {
      if (direct && job.is_target) {
        sync();
#pragma unroll 1
        for (int r = part; r < Tile::kDepth; r += kThreads / Tile::kColumns) {
          float value = 0;
          if (row + r < end && first_column + column < job.left.columns) {
            value = left[r * Tile::kLeftStride + column] - args.decoder_bias[first_column + column];
            for (int k = 0; k < Kp; ++k)
              value -= right[r * Tile::kRightStride + k] * *at<T>(args.decoder, k, first_column + column);
          }
          left[r * Tile::kLeftStride + column] = value;
        }
        sync();
      }
    }
    if (job.first && job.first_form != (direct ? Form::gram : Form::direct))
      multiply<T, true, true, Tile::kDepth, kColumns>(first_sum, left + warp_row, Tile::kLeftStride, right + warp_column,
                                                      Tile::kRightStride);
    if (job.column_sums) {
      float sum = 0;
      for (int r = part; r < Tile::kDepth && row + r < end; r += kThreads / Tile::kColumns)
        sum += to_float(left[r * Tile::kLeftStride + column]) - (direct ? 0.0f : bias);
      column_sum += double(sum);
    }
  }
  copy_wait<0>();
  sync();
  const int lane = thread() % 32;
  float* out = job.out + (int64_t(block_y()) * job.tiles * Tile::kColumns + first_column) * (2 * Kp);
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* to = out + (warp_row + lane / 4 + i / 2 * 8) * (2 * Kp) + warp_column + 8 * n + lane % 4 * 2 + i % 2;
      if (job.first) to[0] = first_sum[n][i];
      if (job.second) to[Kp] = second_sum[n][i];
    }
  if (!job.column_sums) return;
  double* scratch = reinterpret_cast<double*>(shared_memory());
  scratch[thread()] = column_sum;
  sync();
  if (part == 0) {
    double sum = 0;
    for (int p = 0; p < kThreads / Tile::kColumns; ++p) sum += scratch[p * Tile::kColumns + column];
    job.column_sums[int64_t(block_y()) * job.tiles * Tile::kColumns + first_column + column] = sum;
  }
}

}  // namespace byol::cuda
