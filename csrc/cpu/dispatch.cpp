#include "dispatch.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>

namespace byol {

const KernelTable* portable_kernels();
#ifdef BYOL_X86
const KernelTable* avx2_kernels();
const KernelTable* avx512_kernels();
const KernelTable* avx512_bf16_kernels();
const KernelTable* amx_kernels();
#endif

namespace {

#ifdef BYOL_X86
// Whether the system lets this process use the tile registers: Linux has to be asked, for they make its threads' state large.
bool may_use_tiles() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const KernelTable*> runnable() {
  std::vector<const KernelTable*> tables;
#ifdef BYOL_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") && may_use_tiles())
      tables.push_back(amx_kernels());
    if (__builtin_cpu_supports("avx512bf16")) tables.push_back(avx512_bf16_kernels());
    tables.push_back(avx512_kernels());
  }
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
