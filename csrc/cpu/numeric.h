// Storage types (f32, f64, bf16, f16), the type each accumulates in, and the conversions between them.
//
// This header and those below it are compiled once per instruction set, each time inside a namespace of its own
// (BYOL_ISA), so that the linker never mixes code of one set into another. For the same reason they use no templates of
// the standard library.
#pragma once

#include <cstdint>
#include <cstring>

namespace byol::BYOL_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulateIn<T>::type;

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float load(f16 x) {
  // Shift exponent and fraction into place and rescale by 2^112, which also makes subnormals right; the largest
  // exponent (infinity, NaN) is put back by hand.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : as_bits(as_float(magnitude) * 0x1p112f);
  return as_float(special | uint32_t(x.bits & 0x8000u) << 16);
}

template <class T>
T store(Acc<T> value);
template <>
inline float store<float>(float value) {
  return value;
}
template <>
inline double store<double>(double value) {
  return value;
}
// Round to nearest, ties to even; NaN stays NaN.
template <>
inline bf16 store<bf16>(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(value != value ? (bits >> 16) | 0x40u : rounded)};
}
template <>
inline f16 store<f16>(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal numbers: rebias the exponent by −112 and round the fraction.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding ½ leaves the rounded fraction in the low bits of the sum.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return {uint16_t(sign | result)};
}

}  // namespace byol::BYOL_ISA
