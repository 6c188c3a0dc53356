// A processor's matrix unit (AMX): it multiplies a tile of 16×32 bf16 with one of 32×16 and adds the products, summed in
// float, to a tile of 16×16 float.
//
// A number of a wider type is a sum of bf16, of as many as hold all its digits: float of 3, f16 of 2. All products of two
// parts are taken but three of float's nine, the third part's with the second and third: the larger two are at most 2^−24 of
// the whole product each, of either sign. Numbers below 2^−103 lose digits, for their last part is below what bf16 can hold
// (the unit takes subnormal numbers for zero), and products below 2^−126 are zero.
#pragma once

#include "product.h"

namespace byol::BYOL_ISA {

#ifndef __AMX_BF16__

// What a thread has to hold while it multiplies: nothing.
struct MatrixUnit {};

// What is left of a number in an operand.
template <class T>
Acc<T> kept(Acc<T> x) {
  return x;
}

#else

// Compilers do not know how much the instructions on tiles read and write.
inline void in_memory(const void* data) { asm volatile("" : : "r"(data) : "memory"); }

// A thread's tile registers, shaped for the products here; whoever had them shaped before finds them so again.
class MatrixUnit {
 public:
  MatrixUnit() {
    _tile_storeconfig(before_);
    struct Configuration {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } all;
    for (int tile = 0; tile < 8; ++tile) all.row_bytes[tile] = 64, all.rows[tile] = 16;
    in_memory(&all);
    _tile_loadconfig(&all);
  }
  ~MatrixUnit() {
    in_memory(before_);
    if (before_[0]) _tile_loadconfig(before_);
    else _tile_release();
  }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// How many bf16 a number is the sum of.
template <class T>
constexpr int kParts = 3;
template <>
inline constexpr int kParts<bf16> = 1;
template <>
inline constexpr int kParts<f16> = 2;

// A block of 32×32 numbers, for each part two tiles of 16×32.
constexpr int64_t kEdge = 32, kTile = 16 * 32, kBlock = 2 * kTile;

inline __m512 widen(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }

inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load16(const f16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
inline __m512 load16(const bf16* x) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }

// The parts of 32 numbers, each part's in a register.
template <int P, class U>
inline void split(const U* x, __m512i* parts) {
  __m512 low = load16(x), high = load16(x + 16);
#pragma GCC unroll 3
  for (int p = 0; p < P; ++p) {
    parts[p] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (p + 1 == P) break;
    low -= widen(_mm512_castsi512_si256(parts[p]));
    high -= widen(_mm512_extracti64x4_epi64(parts[p], 1));
  }
}
template <>
inline void split<1>(const bf16* x, __m512i* parts) {
  parts[0] = _mm512_loadu_si512(x);
}

// What is left of a number in the parts of a type.
template <class T>
inline Acc<T> kept(Acc<T> x) {
  if (sizeof(T) == 8) return x;
  Acc<T> rest = x;
  for (int p = 0; p < kParts<T>; ++p) rest -= load(store<bf16>(float(rest)));
  return x - rest;
}

// C[32, 32] += Σ of A's blocks times B's, or C = that sum, C's rows being ldc apart. Calls beside() after each product of parts.
template <int P, class Beside>
inline void multiply_blocks(const bf16* a, int64_t a_stride, const bf16* b, int64_t b_stride, int64_t count, float* c,
                            int64_t ldc, bool add, const Beside& beside) {
  const auto left = [&](int part) {
    if (P == 1) {
      // Past the first-level cache, where B stays: nothing of A is loaded again before it would be gone.
      _tile_stream_loadd(4, a, 64);
      _tile_stream_loadd(5, a + kTile, 64);
    } else {
      _tile_loadd(4, a + part * kBlock, 64);
      _tile_loadd(5, a + part * kBlock + kTile, 64);
    }
  };
  const auto right = [&](int part) {
    _tile_loadd(6, b + part * kBlock, 64);
    _tile_loadd(7, b + part * kBlock + kTile, 64);
  };
  const auto multiply = [&] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    beside();
  };
  float* const lower = c + 16 * ldc;
  const int64_t bytes = ldc * int64_t(sizeof(float));
  in_memory(a), in_memory(b), in_memory(c);
  if (add) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + 16, bytes);
    _tile_loadd(2, lower, bytes);
    _tile_loadd(3, lower + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < count; ++i, a += a_stride, b += b_stride) {
    left(0);
    if (P > 2) right(2), multiply();
    if (P > 1) {
      right(1), multiply();
      left(1), multiply();
    }
    right(0), multiply();
    if (P > 2) left(2), multiply();
    if (P > 1) left(0), multiply();
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + 16, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + 16, bytes);
}

#endif

}  // namespace byol::BYOL_ISA
