#include "dispatch.h"

#ifdef BYOL_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>

namespace byol {

// Of the instruction sets that the compiler knew, BYOL_HAS_… each.
const KernelTable* amx_kernels();
const KernelTable* avx512_bf16_kernels();
const KernelTable* avx512_kernels();
const KernelTable* avx2_kernels();
const KernelTable* portable_kernels();

namespace {

#ifdef BYOL_HAS_AMX
// Linux has to be asked before a process may use the tile registers, which make the state of its threads large.
bool has_amx() {
  constexpr unsigned kTilesAndBf16 = 1u << 24 | 1u << 22;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTilesAndBf16) == kTilesAndBf16 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#ifdef BYOL_HAS_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
#endif

std::vector<const KernelTable*> runnable() {
  std::vector<const KernelTable*> tables;
#ifdef BYOL_HAS_AMX
  if (has_avx512() && __builtin_cpu_supports("avx512bf16") && has_amx()) tables.push_back(amx_kernels());
#endif
#ifdef BYOL_HAS_AVX512_BF16
  if (has_avx512() && __builtin_cpu_supports("avx512bf16")) tables.push_back(avx512_bf16_kernels());
#endif
#ifdef BYOL_HAS_AVX512
  if (has_avx512()) tables.push_back(avx512_kernels());
#endif
#ifdef BYOL_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(avx2_kernels());
#endif
  tables.push_back(portable_kernels());
  return tables;
}

const KernelTable& choose() {
  const std::vector<const KernelTable*> tables = runnable();
  const char* forced = std::getenv("BYOL_FAST_CPU");
  if (!forced || !*forced) return *tables.front();
  std::string names;
  for (const KernelTable* table : tables) {
    if (std::string(table->name) == forced) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::runtime_error("BYOL_FAST_CPU: expected one of " + names + " on this processor, got '" + forced + "'");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

std::vector<std::string> runnable_instruction_sets() {
  std::vector<std::string> names;
  for (const KernelTable* table : runnable()) names.emplace_back(table->name);
  return names;
}

}  // namespace byol
