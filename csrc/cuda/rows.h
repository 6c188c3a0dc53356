// The first pass over the rows, tile of rows by tile of rows. X and T are read once; only what is K wide is written.
//
//   step      U = X Weᵀ + be,  Z = f(U),  Q = T Wd − bd Wd,  E = Z G − Q,  dU = E ⊙ f′(U)
//             Σ R² = Σ (t − bd)² + Σ Z ⊙ (E − Q)
//   forward   U and Z, then  Y = Z Wdᵀ + bd (+ X)  of the same rows, Z never leaving shared memory
//   backward  dZ = dY Wd,  dU = dZ ⊙ f′(U),  with U from the forward pass
//
// When T is X, U and Q come from one reading of X; tied weights need no second product, Q = U − be − bd Wd, and none in the
// second pass, which multiplies X with V = dU − Z at once (combined). What V loses when it is rounded must not be lost of dU,
// nor be multiplied with all of X: it is booked to Z, as Z′ = dU − V, and the second pass makes ZᵀZ′. Then
// VᵀX + (ZᵀZ′)ᵀWe = dUᵀX + Z′ᵀR, and the rounding is multiplied with the residual alone.
//
// Direct form, for float tiles whose Σ R² is a share below τ of Σ t² (there the Gram form would cancel): with the tile's Z at
// hand, R = Z Wdᵀ + bd − T chunk of columns by chunk, Σ R², E = R Wd. The second pass reads the tile's flag. The
// decision is the block's own, so nothing waits for the host.
#pragma once

#include "activation.h"
#include "expand.h"

namespace byol::cuda {

// The Gram form's relative error in Σ R² is about 4e-8/ρ in float. Half-precision inputs are so coarse that the Gram form in
// float is always more accurate than eager.
constexpr double kDirectBelow = 4e-3;

enum class Mode : int { step, forward, backward };

struct RowsArgs {
  Mode mode;
  Activation activation;
  bool tied, separate;    // separate: the target is not the input
  bool combined;          // the second pass is given V = dU − Z
  int rank;
  int64_t rows;
  Source input, target;   // target: T, or the input; backward: dY
  Source encoder, decoder;  // packed [Kp, Dp]
  const float *encoder_bias, *decoder_bias, *gram, *gram_low;
  const double* offset;
  const float* preactivation;  // backward: U
  void* codes;                 // [rows, codes_width]
  float *code, *slope;         // [rows, rank] or null: Z (forward: U) and dU
  double* sums;                // [tiles, sum_count]: Σ R², then Σ z and Σ z rounded or Σ z′ (tiles in Gram form), Σ dU
  int* direct;                 // [tiles] or null
  ExpandArgs expand;           // forward: the output
};

// What the second pass multiplies, a row: of 16-bit elements [Z lo, Z, dU] or, combined, [Z lo, Z, Z′ − Z, V]; of float
// [Z, dU] or [Z, V], where dU − V is Z to the last bit but one. In tiles in direct form V is dU.
template <class T>
BYOL_HD constexpr int code_parts(bool combined) {
  return 1 + kCodeTerms<T> + (combined && kCodeTerms<T> == 2);
}

// The sums of a row tile.
BYOL_HD constexpr int sum_count(int padded_rank) { return 1 + 3 * padded_rank; }

template <class T, int Kp>
struct RowTile : Rows<Kp> {
  using Rows<Kp>::kRows;
  static constexpr int kStride = row_stride<T>(kChunk<T>);
  static constexpr int kStage = (kRows + 2 * Kp) * kStride;
  static constexpr int kStageBytes = kStage * int(sizeof(T));
  static constexpr int kStages = 3 * kStageBytes <= 72 * 1024 ? 3 : 2;
  // After the product the stages make room for Z, then dU, in float, and for chunks of G, or of R and Wd.
  static constexpr int kCodeStride = Kp + 4;
  static constexpr int kDepth = Kp < 32 ? Kp : 32;
  static constexpr int kAsideStride = kChunk<float> + 4;
  static constexpr int kCodeBytes = kRows * kCodeStride * 4;
  static constexpr int kAsideBytes = larger_of((kRows + Kp) * kAsideStride * 4, kCodeBytes);
  static constexpr int kShared = larger_of(larger_of(kStages * kStageBytes, kCodeBytes + kAsideBytes), Expand<T, Kp>::kShared);
  static_assert(kShared <= kSharedBudget, "two stages, and what follows them, fit");
  static_assert((kThreads + Kp) * 8 <= kAsideBytes, "sums in double fit beside the codes");
};

// Which matrix a chunk of columns is of, and what it is multiplied with.
struct Chunk {
  bool of_target, encode, decode, statistics;
  int column;
};

template <class T>
BYOL_HD int chunk_count(const RowsArgs& args) {
  const int in = args.mode == Mode::backward ? 0 : int(ceil_div(args.input.columns, kChunk<T>));
  const bool target = args.mode == Mode::backward || (args.mode == Mode::step && args.separate);
  return in + (target ? int(ceil_div(args.target.columns, kChunk<T>)) : 0);
}

template <class T>
BYOL_HD Chunk chunk_at(const RowsArgs& args, int i) {
  const int in = args.mode == Mode::backward ? 0 : int(ceil_div(args.input.columns, kChunk<T>));
  if (i >= in) return {true, false, true, args.mode == Mode::step, (i - in) * kChunk<T>};
  const bool joint = args.mode == Mode::step && !args.separate;
  return {false, true, joint && !args.tied, joint, i * kChunk<T>};
}

// Σ (t − bd)² and Σ t² of this thread's part of a chunk.
template <class T, int Kp>
BYOL_DEVICE void add_energy(const RowsArgs& args, const T* tile, int64_t first, int column, double& centred, double& raw) {
  constexpr int kPerRow = kChunk<T> / kVector<T>;
  const int c = thread() % kPerRow * kVector<T>;
  float bias[kVector<T>], sum = 0, raw_sum = 0;
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) bias[j] = args.decoder_bias[column + c + j];
#pragma unroll
  for (int r = thread() / kPerRow; r < Rows<Kp>::kRows; r += kThreads / kPerRow) {
    if (first + r >= args.rows) break;
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(tile + r * RowTile<T, Kp>::kStride + c);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const float t = to_float(pack.values[j]), a = t - bias[j];
      sum += a * a;
      if constexpr (sizeof(T) == 4) raw_sum += t * t;
    }
  }
  centred += double(sum);
  raw += double(raw_sum);
}

// Fragments to a [kRows, Kp] tile.
template <int Kp>
BYOL_DEVICE void put_tile(float* tile, const float (&c)[Rows<Kp>::kWarpColumns / 8][4]) {
  const int lane = thread() % 32;
  float* to = tile + (Rows<Kp>::warp_row() + lane / 4) * (Kp + 4) + Rows<Kp>::warp_column(Kp) + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < Rows<Kp>::kWarpColumns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i / 2 * 8 * (Kp + 4) + 8 * n + i % 2] = c[n][i];
}

// What rounding takes from a number.
template <class T>
BYOL_HD float rounded_off(float x) {
  return x - to_float(from_float<T>(x));
}

// Writes one part of the second pass' operand: value(i) for the element at i of the [kRows, Kp] tiles in shared memory.
template <class T, int Kp, class Value>
BYOL_DEVICE void emit(const RowsArgs& args, int64_t first, int part, const Value& value) {
  using Tile = RowTile<T, Kp>;
  constexpr int kPerRow = Kp / kVector<T>;
  T* codes = static_cast<T*>(args.codes);
  const int width = code_parts<T>(args.combined) * Kp;
  for (int i = thread(); codes && i < Tile::kRows * kPerRow; i += kThreads) {
    const int r = i / kPerRow, k = i % kPerRow * kVector<T>;
    if (first + r >= args.rows) break;
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) pack.values[j] = from_float<T>(value(r * Tile::kCodeStride + k + j));
    *reinterpret_cast<Pack<T>*>(codes + (first + r) * width + part * Kp + k) = pack;
  }
}

// Writes a [kRows, Kp] tile as float, if asked for.
template <class T, int Kp>
BYOL_DEVICE void save(const RowsArgs& args, const float* tile, int64_t first, float* saved) {
  using Tile = RowTile<T, Kp>;
  for (int i = thread(); saved && i < Tile::kRows * Kp; i += kThreads) {
    const int r = i / Kp, k = i % Kp;
    if (first + r < args.rows && k < args.rank) saved[(first + r) * args.rank + k] = tile[r * Tile::kCodeStride + k];
  }
}

// The sums over rows of value(i), for the element at i of the [kRows, Kp] tiles, to out[k]. Scratch may lie in a tile.
template <int Kp, int kRows, class Value>
BYOL_DEVICE void column_sums(int stride, const Value& value, double* scratch, double* out) {
  constexpr int kParts = kThreads / Kp;
  const int k = thread() % Kp;
  double sum = 0;
#pragma unroll 4
  for (int r = thread() / Kp; r < kRows; r += kParts) sum += double(value(r * stride + k));
  sync();
  scratch[thread()] = sum;
  sync();
  if (thread() < Kp) {
    sum = 0;
    for (int part = 0; part < kParts; ++part) sum += scratch[part * Kp + k];
    out[k] = sum;
  }
}

// The direct form of a tile whose Z is in shared memory: returns this thread's part of Σ R², leaves R Wd in e.
template <class T, int Kp>
BYOL_DEVICE double direct_tile(const RowsArgs& args, int64_t first, const float* code, float* aside,
                               float (&e)[Rows<Kp>::kWarpColumns / 8][4]) {
  using Tile = RowTile<T, Kp>;
  constexpr int kColumns = kChunk<float>, kStride = Tile::kAsideStride;
  float *residual = aside, *weights = aside + Tile::kRows * kStride;
  double total = 0;
#pragma unroll
  for (int n = 0; n < Tile::kWarpColumns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) e[n][i] = 0;
  const int c = thread() % kColumns;
#pragma unroll 1
  for (int column = 0; column < args.target.columns; column += kColumns) {
    load_tile<float, Kp, kColumns, kThreads>(weights, kStride, args.decoder, 0, column);
    copy_commit(), copy_wait<0>(), sync();
    const float bias = args.decoder_bias[column + c];
#pragma unroll 1
    for (int r = thread() / kColumns; r < Tile::kRows; r += kThreads / kColumns) {
      float value = 0;
      if (first + r < args.rows && column + c < args.target.columns) {
        value = bias - to_float(*at<T>(args.target, first + r, column + c));
        for (int k = 0; k < Kp; ++k) value += code[r * Tile::kCodeStride + k] * weights[k * kStride + c];
      }
      residual[r * kStride + c] = value;
      total += double(value) * double(value);
    }
    sync();
    multiply<float, false, false, kColumns, Tile::kWarpColumns>(
        e, residual + Tile::warp_row() * kStride, kStride, weights + Tile::warp_column(Kp) * kStride, kStride);
    sync();
  }
  return total;
}

template <class T, int Kp>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ RowsArgs args) {
  using Tile = RowTile<T, Kp>;
  constexpr int kColumns = Tile::kWarpColumns;
  T* stages = reinterpret_cast<T*>(shared_memory());
  const int64_t first = int64_t(block_x()) * Tile::kRows;
  const int lane = thread() % 32, warp_row = Tile::warp_row(), warp_column = Tile::warp_column(Kp);
  const auto row_of = [&](int i) { return warp_row + lane / 4 + i / 2 * 8; };
  const auto column_of = [&](int n, int i) { return warp_column + 8 * n + lane % 4 * 2 + i % 2; };

  // The products. U begins with the bias: added to the finished sum, it would be rounded the same way in every row.
  float u[kColumns / 8][4], q[kColumns / 8][4];
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) u[n][i] = args.encoder_bias[column_of(n, i)], q[n][i] = 0;
  double centred = 0, raw = 0;
  const int chunks = chunk_count<T>(args);
  const auto load = [&](int i) {
    if (i < chunks) {
      const Chunk chunk = chunk_at<T>(args, i);
      T* left = stages + i % Tile::kStages * Tile::kStage;
      T* right = left + Tile::kRows * Tile::kStride;
      load_tile<T, Tile::kRows, kChunk<T>, kThreads>(left, Tile::kStride, chunk.of_target ? args.target : args.input, first,
                                                     chunk.column);
      if (chunk.encode) load_tile<T, Kp, kChunk<T>, kThreads>(right, Tile::kStride, args.encoder, 0, chunk.column);
      if (chunk.decode)
        load_tile<T, Kp, kChunk<T>, kThreads>(right + Kp * Tile::kStride, Tile::kStride, args.decoder, 0, chunk.column);
    }
    copy_commit();
  };
  for (int i = 0; i < Tile::kStages - 1; ++i) load(i);
#pragma unroll 1
  for (int i = 0; i < chunks; ++i) {
    copy_wait<Tile::kStages - 2>();
    sync();
    load(i + Tile::kStages - 1);
    const Chunk chunk = chunk_at<T>(args, i);
    const T* left = stages + i % Tile::kStages * Tile::kStage;
    const T* right = left + (Tile::kRows + warp_column) * Tile::kStride;
    const T* mine = left + warp_row * Tile::kStride;
    if (chunk.encode) multiply<T, false, false, kChunk<T>, kColumns>(u, mine, Tile::kStride, right, Tile::kStride);
    if (chunk.decode)
      multiply<T, false, false, kChunk<T>, kColumns>(q, mine, Tile::kStride, right + Kp * Tile::kStride, Tile::kStride);
    if (chunk.statistics) add_energy<T, Kp>(args, left, first, chunk.column, centred, raw);
  }
  copy_wait<0>();
  sync();

  float* code = reinterpret_cast<float*>(shared_memory());
  float* aside = code + Tile::kRows * Tile::kCodeStride;
  double* scratch = reinterpret_cast<double*>(aside);
  if (args.mode == Mode::backward) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool inside = first + row_of(i) < args.rows && column_of(n, i) < args.rank;
        u[n][i] = inside ? args.preactivation[(first + row_of(i)) * args.rank + column_of(n, i)] : 0.0f;
      }
  }
  // Z, by way of shared memory: the loop over it need not be unrolled, six activations in every step would be long.
  put_tile<Kp>(code, u);
  sync();
#pragma unroll 1
  for (int i = thread(); i < Tile::kRows * Kp; i += kThreads) {
    const int r = i / Kp, k = i % Kp;
    float* at = code + r * Tile::kCodeStride + k;
    const bool inside = first + r < args.rows;
    if (args.mode == Mode::forward && args.code && inside && k < args.rank) args.code[(first + r) * args.rank + k] = *at;
    // Rows beyond the last must not count in sums.
    *at = inside ? activate(args.activation, *at).value : 0.0f;
  }
  sync();
  if (args.mode == Mode::forward) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) u[n][i] = code[row_of(i) * Tile::kCodeStride + column_of(n, i)];
    sync();
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) put_code<T, Kp>(stages, row_of(i), column_of(n, i), u[n][i]);
    expand_rows<T, Kp>(args.expand, first, shared_memory());
    return;
  }
  const auto z = [=](int i) { return code[i]; };
  if constexpr (kCodeTerms<T> == 2) emit<T, Kp>(args, first, 0, [=](int i) { return rounded_off<T>(code[i]); });
  emit<T, Kp>(args, first, kCodeTerms<T> - 1, z);
  save<T, Kp>(args, code, first, args.code);
  double* sums = args.sums + int64_t(block_x()) * sum_count(Kp);
  float e[kColumns / 8][4] = {};
  bool direct = false;
  if (args.mode == Mode::step) {
    constexpr int kStride = Tile::kDepth + 4;
#pragma unroll 1
    for (int k = 0; k < Kp; k += Tile::kDepth) {
      for (int i = thread(); i < Kp * Tile::kDepth; i += kThreads)
        aside[i / Tile::kDepth * kStride + i % Tile::kDepth] = args.gram[i / Tile::kDepth * Kp + k + i % Tile::kDepth];
      sync();
      // G is symmetric.
      multiply<float, false, false, Tile::kDepth, kColumns>(e, code + warp_row * Tile::kCodeStride + k, Tile::kCodeStride,
                                                            aside + warp_column * kStride, kStride);
      sync();
    }
    column_sums<Kp, Tile::kRows>(Tile::kCodeStride, z, scratch, sums + 1);
    // ZᵀZ and TᵀZ have a rounded right Z, and the bias' part of the same sum must have it, too.
    column_sums<Kp, Tile::kRows>(Tile::kCodeStride, [=](int i) { return to_float(from_float<T>(code[i])); }, scratch,
                                 sums + 1 + Kp);
    sync();
    // What rounding took from G is given back for the mean row of the tile.
    double* lost = scratch + kThreads;
    if (thread() < Kp) {
      const double rows = double(smaller(args.rows - first, int64_t(Tile::kRows)));
      double sum = 0;
      for (int j = 0; j < args.rank; ++j) sum += sums[1 + j] * double(args.gram_low[j * Kp + thread()]);
      lost[thread()] = sum / rows;
    }
    sync();
    double cross = 0;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const double product = args.tied && !args.separate ? u[n][i] : q[n][i];
        const double shifted = product - args.offset[column_of(n, i)];
        const double error = double(e[n][i]) + lost[column_of(n, i)] - shifted;
        cross += double(code[row_of(i) * Tile::kCodeStride + column_of(n, i)]) * (error - shifted);
        e[n][i] = float(error);
      }
    double total = block_sum<kThreads>(centred + cross, scratch);
    if constexpr (sizeof(T) == 4) {
      // NaN stays in Gram form.
      direct = total < kDirectBelow * block_sum<kThreads>(raw, scratch);
      if (direct) {
        sync();
        total = block_sum<kThreads>(direct_tile<T, Kp>(args, first, code, aside, e), scratch);
        if (thread() < Kp) sums[1 + thread()] = sums[1 + Kp + thread()] = 0;
      }
      if (thread() == 0) args.direct[block_x()] = direct;
    }
    if (thread() == 0) sums[0] = total;
  } else {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) e[n][i] = q[n][i];
  }
  sync();
  put_tile<Kp>(code, e);
  put_tile<Kp>(aside, u);
  sync();
#pragma unroll 1
  for (int i = thread(); i < Tile::kRows * Kp; i += kThreads) {
    const int at = i / Kp * Tile::kCodeStride + i % Kp;
    const bool inside = first + i / Kp < args.rows;
    const Activated f = activate(args.activation, aside[at]);
    code[at] = inside ? code[at] * f.slope : 0.0f;
    // Beside dU, what V takes away.
    aside[at] = inside && args.combined && !direct ? f.value : 0.0f;
  }
  sync();
  const auto v = [=](int i) { return code[i] - aside[i]; };
  const auto booked = [=](int i) { return code[i] - to_float(from_float<T>(v(i))); };
  const int parts = code_parts<T>(args.combined);
  if constexpr (kCodeTerms<T> == 2)
    if (args.combined)
      emit<T, Kp>(args, first, parts - 2, [=](int i) { return booked(i) - to_float(from_float<T>(aside[i])); });
  emit<T, Kp>(args, first, parts - 1, v);
  save<T, Kp>(args, code, first, args.slope);
  // In the sum beside ZᵀZ′, Z is Z′, too. The last of all: its scratch lies in the tile of Z.
  if (args.combined && !direct) column_sums<Kp, Tile::kRows>(Tile::kCodeStride, booked, scratch, sums + 1 + Kp);
  column_sums<Kp, Tile::kRows>(Tile::kCodeStride, z, scratch, sums + 1 + 2 * Kp);
}

}  // namespace byol::cuda
