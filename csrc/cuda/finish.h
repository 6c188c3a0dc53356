// The end of a call: partial sums are added in double, in a fixed order, and turned into gradients.
//
//   step      dWe = dUᵀX,  dWd = Wd (ZᵀZ) − TᵀZ + bd (Σz)ᵀ,  dbe = Σ dU,  dbd = Wd Σz − Σ (t − bd)
//             (tied: dWe + dWdᵀ in place of dWe; combined, dUᵀX − ZᵀX comes as VᵀX and ZᵀZ as ZᵀZ′)
//   backward  dWe = dUᵀX,  dWd = dYᵀZ,  dbe = Σ dU,  dbd = Σ dY
//
// The terms of dWd cancel as the residual falls, which is why these small sums are made in double.
#pragma once

#include "columns.h"

namespace byol::cuda {

constexpr int kReduceThreads = 512;

struct FinishArgs {
  bool is_step, tied;
  int in_features, out_features, rank, padded_rank;
  int64_t row_tiles;
  int splits;
  const double* sums;     // [row_tiles, sum_count] of the first pass
  const float* products;  // [product_splits, product_rows, 2 Kp]: the left rows are Z lo, then Z; null: no ZᵀZ
  int product_splits, product_rows, code_terms, product_parts;
  double* totals;         // [sum_count]
  double* gram;           // [Kp, Kp]: ZᵀZ
  const float* input_sums;   // [splits, input_columns, sums_width]: Z at 0, dU (combined: V) at slope_column
  const float* target_sums;
  int input_columns, target_columns, sums_width, slope_column;
  const double* column_sums;  // [splits, target_columns] or null
  Source decoder;             // packed [Kp, Dp]
  const float* decoder_bias;
  float* total;
  WeightGradients out;
};

// Block b < ceil(sum_count/32) adds 32 columns of the first pass' sums; the others add ZᵀZ.
static __global__ void __launch_bounds__(kReduceThreads) reduce_kernel(const __grid_constant__ FinishArgs args) {
  const int Kp = args.padded_rank, columns = sum_count(Kp), blocks = int(ceil_div(columns, 32));
  if (block_x() >= blocks) {
    const int i = (block_x() - blocks) * kReduceThreads + thread();
    if (!args.products || i >= Kp * Kp) return;
    const int j = i / Kp, k = i % Kp;
    double sum = 0;
    for (int split = 0; split < args.product_splits; ++split)
      for (int term = 0; term < args.code_terms; ++term)
        for (int part = 0; part < args.product_parts; ++part)
          sum += double(args.products[((int64_t(split) * args.product_rows + term * Kp + j) * 2 + part) * Kp + k]);
    args.gram[i] = sum;
    return;
  }
  const int column = block_x() * 32 + thread() % 32, part = thread() / 32;
  double sum = 0;
  if (column < columns)
#pragma unroll 4
    for (int64_t tile = part; tile < args.row_tiles; tile += kReduceThreads / 32) sum += args.sums[tile * columns + column];
  double* scratch = reinterpret_cast<double*>(shared_memory());
  scratch[thread()] = sum;
  sync();
  if (part || column >= columns) return;
  sum = 0;
  for (int p = 0; p < kReduceThreads / 32; ++p) sum += scratch[p * 32 + thread()];
  args.totals[column] = sum;
  // Rounding may leave a sum of squares just below zero; NaN passes.
  if (column == 0 && args.total) *args.total = sum < 0 ? 0.0f : float(sum);
  const int k = column - 1 - 2 * Kp;
  if (k >= 0 && k < args.rank && args.out.encoder_bias) args.out.encoder_bias[k] = float(sum);
}

BYOL_DEVICE double split_sum(const float* sums, int splits, int64_t columns, int width, int64_t column, int k) {
  double sum = 0;
#pragma unroll 4
  for (int split = 0; split < splits; ++split) sum += double(sums[(split * columns + column) * width + k]);
  return sum;
}

// Thread (d, k) makes one element of each weight gradient.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ FinishArgs args) {
  const int Kp = args.padded_rank, k = thread() % Kp;
  const int d = block_x() * (kThreads / Kp) + thread() / Kp;
  const double* code_total = args.totals + 1;
  if (k == 0 && d < args.out_features && args.out.decoder_bias) {
    double sum = 0;
    for (int split = 0; split < args.splits; ++split) sum += args.column_sums[int64_t(split) * args.target_columns + d];
    if (args.is_step) {
      sum = -sum;
      for (int j = 0; j < args.rank; ++j) sum += double(to_float(*at<T>(args.decoder, j, d))) * code_total[j];
    }
    args.out.decoder_bias[d] = float(sum);
  }
  if (k >= args.rank) return;
  double decoder = 0;
  if (d < args.out_features && (args.out.decoder_weight || args.tied)) {
    decoder = args.target_sums ? split_sum(args.target_sums, args.splits, args.target_columns, args.sums_width, d, k) : 0.0;
    if (args.is_step && args.products) {
      decoder = -decoder;
      for (int j = 0; j < args.rank; ++j) decoder += double(to_float(*at<T>(args.decoder, j, d))) * args.gram[j * Kp + k];
      decoder += double(args.decoder_bias[d]) * code_total[Kp + k];
    }
    if (args.out.decoder_weight) args.out.decoder_weight[int64_t(d) * args.rank + k] = float(decoder);
  }
  if (d < args.in_features && args.out.encoder_weight) {
    const double encoder =
        split_sum(args.input_sums, args.splits, args.input_columns, args.sums_width, d, args.slope_column + k);
    args.out.encoder_weight[int64_t(k) * args.in_features + d] = float(encoder + (args.tied ? decoder : 0.0));
  }
}

}  // namespace byol::cuda
