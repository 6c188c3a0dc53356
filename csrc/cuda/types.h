// Element types and their conversions, for the device and for plain C++.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define BYOL_HD __host__ __device__ __forceinline__
#elif !defined(BYOL_HD)
#define BYOL_HD inline
#endif

namespace byol::cuda {

struct Bf16 {
  static constexpr bool kIsBf16 = true;
  uint16_t bits;
};
struct Fp16 {
  static constexpr bool kIsBf16 = false;
  uint16_t bits;
};

BYOL_HD float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

BYOL_HD uint32_t bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

BYOL_HD float to_float(float x) { return x; }
BYOL_HD float to_float(Bf16 x) { return float_of_bits(uint32_t(x.bits) << 16); }
BYOL_HD float to_float(Fp16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  // Rescaling by 2^112 makes subnormals right; infinity and NaN keep the largest exponent.
  const uint32_t bits =
      magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits_of_float(float_of_bits(magnitude) * 0x1p112f);
  return float_of_bits(bits | uint32_t(x.bits & 0x8000u) << 16);
#endif
}

// Rounded to nearest, ties to even.
template <class T>
BYOL_HD T from_float(float x);

template <>
BYOL_HD float from_float<float>(float x) {
  return x;
}

template <>
BYOL_HD Bf16 from_float<Bf16>(float x) {
#if defined(__CUDA_ARCH__)
  Bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t bits = bits_of_float(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
BYOL_HD Fp16 from_float<Fp16>(float x) {
#if defined(__CUDA_ARCH__)
  Fp16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t sign = bits_of_float(x) >> 16 & 0x8000u;
  const float magnitude = float_of_bits(bits_of_float(x) & 0x7fffffffu);
  if (x != x) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00u)};
  if (magnitude < 0x1p-14f) {
    // Subnormal: adding 1.5·2^-1 leaves the rounded multiple of 2^-24 in the last bits.
    return {uint16_t(sign | (bits_of_float(magnitude + 0.5f) - bits_of_float(0.5f)))};
  }
  const uint32_t bits = bits_of_float(magnitude) - (112u << 23);
  return {uint16_t(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13)};
#endif
}

template <class V>
BYOL_HD V smaller(V a, V b) {
  return b < a ? b : a;
}
template <class V>
BYOL_HD V larger(V a, V b) {
  return a < b ? b : a;
}
constexpr int larger_of(int a, int b) { return a < b ? b : a; }
BYOL_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
BYOL_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace byol::cuda
