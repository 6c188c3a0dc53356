// Views of a call's matrices in their storage type, and its biases in the accumulation type.
#pragma once

#include "abi.h"
#include "pairs.h"
#include "tiles.h"

namespace byol::BYOL_ISA {

template <class T>
View<T> view(const Matrix& matrix, int64_t rows, int64_t cols) {
  return {static_cast<const T*>(matrix.data), matrix.stride, 1, rows, cols};
}

template <class T>
View<T> input_view(const LayerArgs& args) {
  return view<T>(args.input, args.rows, args.in_features);
}
// We [rank, in_features].
template <class T>
View<T> encoder_view(const LayerArgs& args) {
  return view<T>(args.encoder_weight, args.rank, args.in_features);
}
// Wd [out_features, rank]: the decoder's weight, or the encoder's transposed when tied.
template <class T>
View<T> decoder_view(const LayerArgs& args) {
  if (args.decoder_weight.data) return view<T>(args.decoder_weight, args.out_features, args.rank);
  return encoder_view<T>(args).transposed();
}

// A matrix as rows that follow each other; one that is transposed is read along its own rows.
template <class T, class S>
void copy(const View<T>& source, S* out) {
  const int64_t cols = source.cols;
  if (source.col_stride == 1) {
    for (int64_t r = 0; r < source.rows; ++r)
      for (int64_t j = 0; j < cols; ++j) out[r * cols + j] = S(load(source.row(r)[j]));
  } else {
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t r = 0; r < source.rows; ++r) out[r * cols + j] = S(load(source.row(r)[j * source.col_stride]));
  }
}

// sums += the sum of all rows; a few at a time are added up before it goes on in double.
template <class T>
void add_rows(const View<T>& rows, double* sums) {
  constexpr int64_t kRows = 8;
  int64_t r = 0;
  for (; r + kRows <= rows.rows; r += kRows) {
    const T* first = rows.row(r);
    for (int64_t k = 0; k < rows.cols; ++k) {
      Acc<T> sum = load(first[k]);
#pragma GCC unroll 8
      for (int64_t i = 1; i < kRows; ++i) sum += load(first[i * rows.row_stride + k]);
      sums[k] += double(sum);
    }
  }
  for (; r < rows.rows; ++r)
    for (int64_t k = 0; k < rows.cols; ++k) sums[k] += double(load(rows.row(r)[k]));
}

// sums += vᵀ·rows, in double.
template <class T>
void add_products(const View<T>& rows, const Acc<T>* v, double* sums) {
  if (rows.col_stride == 1) {
    for (int64_t r = 0; r < rows.rows; ++r)
      for (int64_t k = 0; k < rows.cols; ++k) sums[k] += double(v[r]) * double(load(rows.row(r)[k]));
  } else {
    for (int64_t k = 0; k < rows.cols; ++k)
      for (int64_t r = 0; r < rows.rows; ++r) sums[k] += double(v[r]) * double(load(rows.row(r)[k * rows.col_stride]));
  }
}

// Below the diagonal of a square matrix, what is above it.
template <class N>
void mirror(N* matrix, int64_t size) {
  for (int64_t j = 0; j < size; ++j)
    for (int64_t k = 0; k < j; ++k) matrix[j * size + k] = matrix[k * size + j];
}

// Σ a ⊙ b, in double.
template <class S>
double dot(const S* a, const double* b, int64_t count) {
  constexpr int kSums = 16;
  double parts[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int j = 0; j < kSums; ++j) parts[j] += double(a[i + j]) * b[i + j];
  for (int j = 0; i < count; ++i, ++j) parts[j] += double(a[i]) * b[i];
  double total = 0;
  for (double part : parts) total += part;
  return total;
}

// A bias in the accumulation type, with zeros up to the end of a panel; all zeros when it is absent.
template <class T>
void load_bias(const void* bias, int64_t count, Buffer<Acc<T>>& out) {
  out.allocate_zeros(round_up(count, kCols<Acc<T>>));
  if (!bias) return;
  for (int64_t i = 0; i < count; ++i) out[i] = load(static_cast<const T*>(bias)[i]);
}

// Rows of a tile that is packed in its own type or, as codes are, in the accumulation type.
template <class T>
constexpr int64_t pad_rows(int64_t rows) {
  return round_up(rows, max(Left<T>::kRows, Left<Code<T>>::kRows));
}

// Rows that one thread takes at a time: few enough that the packed tile stays in the second-level cache, enough to hide the
// traffic of weights and accumulators, which grows with the rank; the tiles of a thread's share are of nearly equal height.
template <class T>
int64_t tile_rows(int64_t share_rows, int64_t features, int64_t rank) {
  const int64_t least = max(64, min(3 * rank / 2, Left<T>::kHighRankRows));
  const int64_t fitting = max(least, min(256, Left<T>::kTileBytes / (Left<T>::kBytes * max(features, 1))));
  // The first tile's memory is in no near cache, that of the others is: there have to be others.
  const int64_t most = min(fitting, max(Left<T>::kFewRows, share_rows / 8));
  const int64_t tiles = max(1, (share_rows + most - 1) / most);
  return pad_rows<T>(max(1, (share_rows + tiles - 1) / tiles));
}

// Threads worth using for this much arithmetic.
inline int useful_threads(const LayerArgs& args, int64_t products) {
  const int64_t operations = products * args.rows * args.rank * (args.in_features + args.out_features);
  return int(max(1, min(args.threads, min(operations / 400000, (args.rows + kTileRows - 1) / kTileRows))));
}

}  // namespace byol::BYOL_ISA
