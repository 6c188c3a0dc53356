// What this machine can do at best, in JSON: fp32 multiply-adds, bf16 dot products, bf16 products of tiles, a copy.
// peak THREADS
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
#if defined(__AMX_BF16__) && defined(__linux__)
#define TILES
#include <sys/syscall.h>
#include <unistd.h>
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
constexpr long kTileRepeats = 1'000'000;
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

#ifdef TILES
// Four sums, as many as hide the latency; the numbers are neither zero nor alike, for a multiplier that idles runs faster.
void multiply_tiles(int) {
  alignas(64) struct {
    unsigned char palette = 1, start = 0, reserved[14] = {};
    unsigned short row_bytes[16] = {};
    unsigned char rows[16] = {};
  } shape;
  for (int tile = 0; tile < 8; ++tile) shape.row_bytes[tile] = 64, shape.rows[tile] = 16;
  alignas(64) unsigned short numbers[1024];
  for (unsigned i = 0; i < 1024; ++i) numbers[i] = static_cast<unsigned short>(0x3f00 | (i * 2654435761u >> 16 & 0x80ff));
  asm volatile("" : : "r"(&shape), "r"(numbers) : "memory");
  _tile_loadconfig(&shape);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, numbers, 64);
  _tile_loadd(5, numbers + 512, 64);
  _tile_loadd(6, numbers, 64);
  _tile_loadd(7, numbers + 512, 64);
  for (long i = 0; i < kTileRepeats; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

bool may_use_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#endif

}  // namespace

int main(int argc, char** argv) {
  int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  double operations = double(threads) * kRepeats * kSums;
  std::printf("{\"float32\": %.6g", operations * 2 * (kBytes / 4) / best_seconds(threads, multiply_add));
#ifdef __AVX512BF16__
  std::printf(", \"bfloat16\": %.6g", operations * 64 / best_seconds(threads, dot_product));
#endif
#ifdef TILES
  if (may_use_tiles())
    std::printf(", \"tiles\": %.6g", double(threads) * kTileRepeats * 4 * 16384 / best_seconds(threads, multiply_tiles));
#endif
  std::vector<char> from(kCopyBytes, 1), to(kCopyBytes, 2);
  size_t share = kCopyBytes / threads;
  double seconds = best_seconds(threads, [&](int t) { std::memcpy(&to[t * share], &from[t * share], share); });
  std::printf(", \"copy\": %.6g}\n", 2. * share * threads / seconds);
}
