// Stores past the caches: for results larger than they are, of which no line has to be read before it is written.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace byol::BYOL_ISA {

// From so many bytes on a result is large; the fuzz target has it lower.
#ifndef BYOL_LARGE_BYTES
#define BYOL_LARGE_BYTES (32 << 20)
#endif
constexpr int64_t kLarge = BYOL_LARGE_BYTES;

#if defined(__AVX512F__)
constexpr int64_t kStreamed = 64;
inline void stream_vector(void* out, const void* from) { _mm512_stream_si512(static_cast<__m512i*>(out), _mm512_loadu_si512(from)); }
#elif defined(__AVX2__)
constexpr int64_t kStreamed = 32;
inline void stream_vector(void* out, const void* from) {
  _mm256_stream_si256(static_cast<__m256i*>(out), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
#endif

// Copies past the caches; `end_stream` has to follow before another thread may read.
inline void stream(void* out, const void* from, int64_t bytes) {
#if defined(__AVX512F__) || defined(__AVX2__)
  char* to = static_cast<char*>(out);
  const char* at = static_cast<const char*>(from);
  const int64_t before = (kStreamed - int64_t(reinterpret_cast<uintptr_t>(to) % kStreamed)) % kStreamed;
  const int64_t head = before < bytes ? before : bytes;
  std::memcpy(to, at, head);
  int64_t i = head;
  for (; i + kStreamed <= bytes; i += kStreamed) stream_vector(to + i, at + i);
  std::memcpy(to + i, at + i, bytes - i);
#else
  std::memcpy(out, from, bytes);
#endif
}

inline void end_stream() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace byol::BYOL_ISA
