// The scatter of rows about a point, and their sum about it; what a covariance is made of:
//
//   image += Σ (x − s)(x − s)ᵀ  (its upper triangle),    sums += Σ (x − s).
//
// Some hundred rows at a time, a round, are shifted and packed into panels of C columns, which are both operands: a
// register tile is R columns of one panel by the C columns of another, and R divides C. Registers sum rows, the image sums
// in double. Every entry is summed in the same order whatever the number of threads.
//
// Threads draw the packing and the multiplying of all rounds from one queue, and nobody waits for the end of a round: while
// some multiply a round, others pack the next one into a second buffer.
#pragma once

#include <sched.h>

#include <atomic>

#include "operands.h"
#include "parallel_for.h"

namespace byol::BYOL_ISA {

template <class S>
class Scatter {
  typedef S Vector __attribute__((vector_size(BYOL_VECTOR_BYTES), aligned(alignof(S)), may_alias));
  // The register tile: R by three vectors, about as many accumulators as that of a product, with R a divisor of C.
  static constexpr int L = kLanes<S>, C = 3 * L, kMost = kTileRows * 2 / 3, R = C % kMost ? kTileRows / 2 : kMost;
  static_assert(C % R == 0);
  // Rows between two looks at the image: many hide its traffic, few stay in the cache. A register sums fewer of them, so
  // that less is lost to rounding.
  static constexpr int64_t kRows = 1024, kSum = 128, kPack = 64;
  // Panels of the left operand that stay in the second-level cache while those of the right operand pass.
  static constexpr int64_t kLeft = 240 * 1024 / (kRows * C * sizeof(S));
  static_assert(kLeft > 0);
  // Panels begin this far apart beyond their length, lest rows of all panels fall on the same lines of a cache.
  static constexpr int64_t kApart = 128 / sizeof(S);

 public:
  explicit Scatter(const ScatterArgs& args)
      : args(args),
        D(args.features),
        panels((D + C - 1) / C),
        rounds((args.rows + kRows - 1) / kRows),
        threads(int(max(1, min(args.threads, args.rows * D * D / 400000)))),
        left(units_of(panels, kLeft) < 8 * threads ? 1 : kLeft),
        packs((min(kRows, args.rows) + kPack - 1) / kPack),
        tiles(units_of(panels, left)),
        panel_size(min(kRows, args.rows) * C + kApart),
        packed(2 * panels * panel_size), done(packs + tiles), valid(args.rows) {
    for (int64_t unit = 0; unit < packs + tiles; ++unit) new (&done[unit]) std::atomic<int64_t>(0);
  }

  // How many rows were added: all, or those of the rounds before the one that holds the first NaN or infinity.
  int64_t run() {
    parallel_for(threads, [&](int) { work(); });
    return valid;
  }

 private:
  // Pairs of some panels of the left operand and one of the right, that reach above the diagonal.
  static int64_t units_of(int64_t panels, int64_t left) {
    int64_t units = 0;
    for (int64_t first = 0; first < panels; first += left) units += panels - first;
    return units;
  }

  // All units in the order in which they are drawn: a round is packed in the midst of multiplying the one before it. A unit
  // waits only for units that were drawn earlier, hence are being worked on.
  void work() {
    const int64_t before = tiles / 2;
    for (int64_t drawn; (drawn = next++) < packs + rounds * (packs + tiles);) {
      const int64_t round = (drawn + tiles) / (packs + tiles) - 1;
      const int64_t place = drawn - packs - round * (packs + tiles);
      if (round < 0) {
        pack(0, drawn);
      } else if (place < before) {
        multiply(round, place);
      } else if (place < before + packs) {
        if (round + 1 < rounds) pack(round + 1, place - before);
      } else {
        multiply(round, place - packs);
      }
    }
  }

  // Until the unit has done so many rounds.
  void wait(int64_t unit, int64_t count) const {
    while (done[unit].load(std::memory_order_acquire) < count) sched_yield();
  }
  void finish(int64_t unit, int64_t round) { done[unit].store(round + 1, std::memory_order_release); }

  int64_t rows_of(int64_t round) const { return min(kRows, args.rows - round * kRows); }
  S* panel(int64_t round, int64_t p) const { return packed + (round % 2 * panels + p) * panel_size; }

  // Some rows of a round, less the shift, into their places in all panels.
  void pack(int64_t round, int64_t unit) {
    wait(unit, round);
    for (int64_t other = packs; other < packs + tiles; ++other) wait(other, round - 1);
    const int64_t begin = unit * kPack, end = min(begin + kPack, rows_of(round));
    Vector zeros[3] = {};
    S rest = 0;
    for (int64_t r = begin; r < end; ++r) {
      const S* row = static_cast<const S*>(args.input.data) + (round * kRows + r) * args.input.stride;
      const S* shift = static_cast<const S*>(args.shift);
      for (int64_t p = 0; p < panels; ++p, row += C, shift += C) {
        S* out = panel(round, p) + r * C;
        if ((p + 1) * C <= D) {
          for (int v = 0; v < 3; ++v) {
            const Vector x = reinterpret_cast<const Vector*>(row)[v];
            // Zero, or NaN from the first NaN or infinity on.
            zeros[v] += x * 0;
            reinterpret_cast<Vector*>(out)[v] = x - reinterpret_cast<const Vector*>(shift)[v];
          }
        } else {
          const int64_t cols = D - p * C;
          for (int64_t j = 0; j < cols; ++j) rest += row[j] * 0, out[j] = row[j] - shift[j];
          for (int64_t j = cols; j < C; ++j) out[j] = 0;
        }
      }
    }
    for (int i = 0; i < C; ++i) rest += zeros[i / L][i % L];
    if (rest != 0)
      for (int64_t seen = valid; round * kRows < seen && !valid.compare_exchange_weak(seen, round * kRows);) {}
    finish(unit, round);
  }

  // Some panels of the left operand, those that reach above the diagonal, by one of the right.
  void multiply(int64_t round, int64_t unit) {
    for (int64_t other = 0; other < packs; ++other) wait(other, round + 1);
    wait(packs + unit, round);
    if (round * kRows < valid) {
      int64_t first = 0, q = unit;
      for (; q >= panels - first; first += left) q -= panels - first;
      q += first;
      for (int64_t p = first; p < min(first + left, q + 1); ++p) multiply_panels(round, p, q);
      if (q < first + left) add_columns(round, q);
    }
    finish(packs + unit, round);
  }

  int64_t width(int64_t p) const { return min(C, D - p * C); }
  // A narrow last panel costs less as the left operand, which is cut finer; its tile is transposed.
  bool transposed(int64_t p, int64_t q) const { return p < q && width(q) < C; }

  // image[C·p …, C·q …] += panel pᵀ · panel q.
  void multiply_panels(int64_t round, int64_t p, int64_t q) {
    alignas(64) S sums[C * C] = {};
    const bool swap = transposed(p, q);
    const S *a = panel(round, swap ? q : p), *b = panel(round, swap ? p : q);
    const int64_t rows = rows_of(round), height = width(swap ? q : p);
    // Vectors beyond the matrix, and on the diagonal those below it, are left out.
    const int end = int((width(swap ? p : q) + L - 1) / L);
    for (int64_t row = 0; row < rows; row += kSum, a += kSum * C, b += kSum * C)
      for (int c = 0; c < height; c += R) tile(p == q ? c / L : 0, end, a + c, b, min(kSum, rows - row), sums + c * C);
    double* image = args.image + p * C * D + q * C;
    if (swap) {
      for (int i = 0; i < C; ++i)
        for (int64_t j = 0; j < width(q); ++j) image[i * D + j] += double(sums[j * C + i]);
    } else if (width(q) == C) {
      for (int i = 0; i < C; ++i)
        for (int j = 0; j < C; ++j) image[i * D + j] += double(sums[i * C + j]);
    } else {
      for (int64_t i = 0; i < width(p); ++i)
        for (int64_t j = 0; j < width(q); ++j) image[i * D + j] += double(sums[i * C + j]);
    }
  }

  // Sums of the columns of a panel.
  void add_columns(int64_t round, int64_t p) {
    Vector sum[3] = {};
    for (int64_t row = 0; row < rows_of(round); row += kSum) {
      Vector part[3] = {};
      const Vector* rows = reinterpret_cast<const Vector*>(panel(round, p) + row * C);
      for (int64_t r = 0; r < min(kSum, rows_of(round) - row); ++r, rows += 3)
        part[0] += rows[0], part[1] += rows[1], part[2] += rows[2];
      sum[0] += part[0], sum[1] += part[1], sum[2] += part[2];
    }
    for (int64_t j = 0; j < width(p); ++j) args.sums[p * C + j] += double(sum[j / L][j % L]);
  }

  static void tile(int begin, int end, const S* a, const S* b, int64_t rows, S* sums) {
    if (end == 1) return tile<0, 1>(a, b, rows, sums);
    if (end == 2) return begin ? tile<1, 2>(a, b, rows, sums) : tile<0, 2>(a, b, rows, sums);
    if (begin == 0) return tile<0, 3>(a, b, rows, sums);
    begin == 1 ? tile<1, 3>(a, b, rows, sums) : tile<2, 3>(a, b, rows, sums);
  }

  // sums[0 … R, 0 … C] += Σ over the rows of the outer products of a[0 … R] with vectors kBegin … kEnd of b[0 … C].
  template <int kBegin, int kEnd>
  static void tile(const S* a, const S* b, int64_t rows, S* sums) {
    Vector sum[R][3] = {};
    for (int64_t r = 0; r < rows; ++r, a += C, b += C) {
      const Vector* right = reinterpret_cast<const Vector*>(b);
      const Vector b0 = right[0], b1 = right[1], b2 = right[2];
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const S value = a[i];
        if (kBegin == 0) sum[i][0] += value * b0;
        if (kBegin <= 1 && kEnd > 1) sum[i][1] += value * b1;
        if (kEnd > 2) sum[i][2] += value * b2;
      }
    }
    Vector* out = reinterpret_cast<Vector*>(sums);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
      for (int j = kBegin; j < kEnd; ++j) out[3 * i + j] += sum[i][j];
  }

  const ScatterArgs& args;
  const int64_t D, panels, rounds;
  const int threads;
  // Left panels of a unit; units that pack a round, and units that multiply it.
  const int64_t left, packs, tiles, panel_size;
  Buffer<S> packed;
  // Rounds that each unit has done; first those that pack.
  Buffer<std::atomic<int64_t>> done;
  std::atomic<int64_t> next{0}, valid;
};

}  // namespace byol::BYOL_ISA
