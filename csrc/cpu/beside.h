// What else is to be done, done beside products of tiles: these take few of a core's instructions, so that a slice of other work
// after each of them is nearly free.
#pragma once

#include "matrix_unit.h"

#ifdef __AMX_BF16__

namespace byol::BYOL_ISA {

// Of a product of two blocks: as many as it takes products of parts.
template <int P>
constexpr int64_t kSlices = P * (P + 1) / 2;

// How much of so much work belongs into each of so many slices.
constexpr int64_t slice(int64_t work, int64_t slices) { return (work + slices - 1) / slices; }

// Adds a block of 32×32 sums to another.
class Addition {
 public:
  static constexpr int64_t kVectors = kEdge * kEdge / 16;

  void begin(const float* from, float* to) { from_ = from, to_ = to, left_ = kVectors; }
  void advance(int64_t vectors) {
    vectors = min(vectors, left_);
    const float* const from = from_;
    float* const to = to_;
    for (int64_t i = 0; i < 16 * vectors; i += 16)
      _mm512_storeu_ps(to + i, _mm512_add_ps(_mm512_loadu_ps(to + i), _mm512_loadu_ps(from + i)));
    from_ += 16 * vectors, to_ += 16 * vectors, left_ -= vectors;
  }
  void finish() { advance(left_); }

 private:
  const float* from_ = nullptr;
  float* to_ = nullptr;
  int64_t left_ = 0;
};

// Makes blocks of rows, `stride` apart, blocks of pairs of rows: of a left operand a right one, with columns in the order of
// `place`.
template <int P>
class Pairing {
 public:
  // Four pairs of rows each: a quarter of a tile's part.
  static constexpr int64_t kUnits = 4 * P;

  void begin(const bf16* from, int64_t stride, int64_t blocks, bf16* to) {
    from_ = from, stride_ = stride, to_ = to, left_ = blocks * kUnits;
  }
  void advance(int64_t units) {
    for (units = min(units, left_); units > 0; --units) {
      // The compiler has to assume that what is written here may be these members.
      const bf16* const from = from_;
      bf16* const to = to_;
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; ++pair) {
        const __m512i even = _mm512_loadu_si512(from + pair * 64), odd = _mm512_loadu_si512(from + pair * 64 + 32);
        _mm512_storeu_si512(to + pair * 32, _mm512_unpacklo_epi16(even, odd));
        _mm512_storeu_si512(to + kTile + pair * 32, _mm512_unpackhi_epi16(even, odd));
      }
      from_ += 256, to_ += 128, --left_;
      if (left_ % 4 == 0) to_ += kTile;
      if (left_ % kUnits == 0) from_ += stride_ - P * kBlock;
    }
  }
  void finish() { advance(left_); }

 private:
  const bf16* from_ = nullptr;
  bf16* to_ = nullptr;
  int64_t stride_ = 0, left_ = 0;
};

}  // namespace byol::BYOL_ISA

#endif
