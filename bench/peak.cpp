// What this machine can do at best, in JSON: fp32 multiply-adds, bf16 dot products, a copy. peak THREADS
// Each thread keeps independent sums in registers, enough of them to hide the latency of the instruction.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));

constexpr int kSums = 10;
constexpr long kRepeats = 10'000'000;
constexpr int kTrials = 8;
constexpr size_t kCopyBytes = size_t(1) << 28;

template <class Work>
double best_seconds(int threads, Work work) {
  double best = 1e30;
  for (int trial = 0; trial < kTrials; ++trial) {
    auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t) team.emplace_back(work, t);
    for (auto& thread : team) thread.join();
    std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = elapsed.count() < best ? elapsed.count() : best;
  }
  return best;
}

// Keeps the compiler from dropping a result nobody reads.
template <class T>
void keep(const T& value) { asm volatile("" : : "m"(value) : "memory"); }

void multiply_add(int) {
  Vector sums[kSums] = {}, factor = Vector{} + 0.5f, term = Vector{} + 1.f;
  asm volatile("" : "+m"(factor), "+m"(term));
  for (long i = 0; i < kRepeats; ++i)
#pragma GCC unroll 16
    for (int s = 0; s < kSums; ++s) sums[s] = sums[s] * factor + term;
  keep(sums);
}

#ifdef __AVX512BF16__
void dot_product(int) {
  __m512 sums[kSums] = {};
  __m512i bits = _mm512_setzero_si512();
  asm volatile("" : "+m"(bits));
  __m512bh pairs = (__m512bh)bits;
  for (long i = 0; i < kRepeats; ++i)
#pragma GCC unroll 16
    for (int s = 0; s < kSums; ++s) sums[s] = _mm512_dpbf16_ps(sums[s], pairs, pairs);
  keep(sums);
}
#endif

}  // namespace

int main(int argc, char** argv) {
  int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  double operations = double(threads) * kRepeats * kSums;
  std::printf("{\"float32\": %.6g", operations * 2 * (kBytes / 4) / best_seconds(threads, multiply_add));
#ifdef __AVX512BF16__
  std::printf(", \"bfloat16\": %.6g", operations * 64 / best_seconds(threads, dot_product));
#endif
  std::vector<char> from(kCopyBytes, 1), to(kCopyBytes, 2);
  size_t share = kCopyBytes / threads;
  double seconds = best_seconds(threads, [&](int t) { std::memcpy(&to[t * share], &from[t * share], share); });
  std::printf(", \"copy\": %.6g}\n", 2. * share * threads / seconds);
}
