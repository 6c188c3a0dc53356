// The instructions of sm_90a by name: clusters, barriers that count bytes, the copy engine (TMA), wgmma.
#pragma once

#include "cluster_plan.h"
#include "device.h"

#if defined(BYOL_EMULATE)
#include "emulator_hopper.h"
#else

#include <cuda.h>
#include <cudaTypedefs.h>

namespace byol::cuda {

using TensorMap = CUtensorMap;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using Barrier = uint64_t;

BYOL_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
BYOL_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

BYOL_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
BYOL_DEVICE void barrier_init_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// One arrival, and so many bytes to come.
BYOL_DEVICE void barrier_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
BYOL_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Makes what ordinary stores wrote, and barriers made visible, visible to wgmma and the copy engine.
BYOL_DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 64 rows of 64 columns, from (column, row) on; what lies outside is zero. Counts its bytes at the barrier.
BYOL_DEVICE void copy_box(void* to, const TensorMap* map, int column, int row, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// Stores 16 bytes into the same place of another block of the cluster and counts them at its barrier.
BYOL_DEVICE void push(void* to, const uint32_t (&value)[4], Barrier* barrier, int rank) {
  uint32_t remote, remote_barrier;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(to)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_barrier) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote),
               "r"(value[0]), "r"(value[1]), "r"(value[2]), "r"(value[3]), "r"(remote_barrier)
               : "memory");
}

BYOL_DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
BYOL_DEVICE void wgmma_end() {
  asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// C[64, 8n] += A[64, 16]·B[16, 8n] of a warpgroup, n = 4 or 8, both in shared memory; transposed: the wide side of both is
// contiguous, not k.
#define BYOL_WGMMA_64(type)                                                                                           \
  asm volatile(                                                                                                       \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, 1, 0;\n\t"                                                                \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                     \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "             \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, %34, %34;\n\t}"                     \
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),                     \
        "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),                     \
        "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),                     \
        "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),                     \
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),                     \
        "+f"(c[7][2]), "+f"(c[7][3])                                                                                  \
      : "l"(a), "l"(b), "n"(int(kTransposed)))
#define BYOL_WGMMA_32(type)                                                                                           \
  asm volatile(                                                                                                       \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, 1, 0;\n\t"                                                                \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                                                     \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, %18, "             \
      "%18;\n\t}"                                                                                                     \
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),                     \
        "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),                     \
        "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3])                                                    \
      : "l"(a), "l"(b), "n"(int(kTransposed)))

template <class T, bool kTransposed>
BYOL_DEVICE void wgmma(float (&c)[8][4], uint64_t a, uint64_t b) {
  if constexpr (T::kIsBf16) BYOL_WGMMA_64("bf16");
  else BYOL_WGMMA_64("f16");
}
template <class T, bool kTransposed>
BYOL_DEVICE void wgmma(float (&c)[4][4], uint64_t a, uint64_t b) {
  if constexpr (T::kIsBf16) BYOL_WGMMA_32("bf16");
  else BYOL_WGMMA_32("f16");
}

#endif  // sm_90a

// Calls use(configuration) with that of a launch in clusters.
template <class Args, class Use>
void in_clusters(void (*kernel)(Args), int cluster, int blocks, int threads, int shared_bytes, cudaStream_t stream,
                 const Use& use) {
  const void* function = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  // Above eight blocks a cluster is not portable, and has to be asked for.
  check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  use(config);
}

template <class Args>
void launch_clusters(void (*kernel)(Args), int cluster, int blocks, int threads, int shared_bytes, cudaStream_t stream,
                     const Args& args) {
  in_clusters(kernel, cluster, blocks, threads, shared_bytes, stream,
              [&](const cudaLaunchConfig_t& config) { check(cudaLaunchKernelEx(&config, kernel, args)); });
}

template <class Args>
int clusters_at_a_time(void (*kernel)(Args), int cluster, int threads, int shared_bytes) {
  int count = 0;
  in_clusters(kernel, cluster, cluster, threads, shared_bytes, nullptr,
              [&](const cudaLaunchConfig_t& config) { check(cudaOccupancyMaxActiveClusters(&count, kernel, &config)); });
  return count;
}

}  // namespace byol::cuda

#endif
