// Transposes 16×16 numbers of 32 bits in registers, where there are 32 of them: reading a matrix across its rows, number by
// number, takes several times as long.
#pragma once

#include <cstdint>

#ifdef __AVX512F__

// GCC warns of its own header.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace byol::BYOL_ISA {

inline void transpose(__m512i* rows) {
  __m512i pairs[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  // Within each 128 bits, a 4×4 transposition of four rows.
  __m512i fours[16];
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + 2 + j]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + 2 + j]);
    }
  // Then one of 4×4 pieces of 128 bits.
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x44), b = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xee);
    rows[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    rows[8 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    rows[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// Calls put(i, column i) for the columns of 16 rows of 16 numbers of 32 bits, the rows being so many bytes apart.
template <class Put>
inline void visit_columns(const void* rows, int64_t bytes, const Put& put) {
  __m512i numbers[16];
  for (int i = 0; i < 16; ++i) numbers[i] = _mm512_loadu_si512(static_cast<const char*>(rows) + i * bytes);
  transpose(numbers);
  for (int i = 0; i < 16; ++i) put(i, numbers[i]);
}

}  // namespace byol::BYOL_ISA

#endif
