// The instructions the kernels use, by name: threads, barriers, asynchronous copies, tensor cores (sm_80 and newer).
// With BYOL_EMULATE the same names come from an emulator, and the kernels are plain C++.
#pragma once

#include "types.h"

#if defined(BYOL_EMULATE)
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define BYOL_DEVICE __device__ __forceinline__

namespace byol::cuda {

BYOL_DEVICE int thread() { return threadIdx.x; }
BYOL_DEVICE int block_x() { return blockIdx.x; }
BYOL_DEVICE int block_y() { return blockIdx.y; }
BYOL_DEVICE void sync() { __syncthreads(); }
BYOL_DEVICE void sync_warp() { __syncwarp(); }

extern __shared__ __align__(1024) unsigned char byol_shared_memory[];
BYOL_DEVICE unsigned char* shared_memory() { return byol_shared_memory; }
BYOL_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

template <class V>
BYOL_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class V>
BYOL_DEVICE V shuffle_from(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Copies 16 bytes to shared memory, of which all but the first valid_bytes are zero.
BYOL_DEVICE void copy_async(void* to, const void* from, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid_bytes)
               : "memory");
}
BYOL_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups but the newest kNewer.
template <int kNewer>
BYOL_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewer) : "memory");
}

// Four 8×8 matrices of 16-bit elements: lane 8i + j gives the address of row j of matrix i.
template <bool kTransposed>
BYOL_DEVICE void load_matrices(uint32_t (&result)[4], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// m16n8k16 of 16-bit elements.
template <class T>
BYOL_DEVICE void matrix_multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
BYOL_DEVICE void matrix_multiply<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
BYOL_DEVICE void matrix_multiply<Fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// m16n8k8 of tf32, which has the bits of a float whose last 13 are zero.
BYOL_DEVICE void matrix_multiply_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds to the nearest tf32, ties away from zero.
BYOL_DEVICE uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

template <class Args>
void launch(void (*kernel)(Args), int grid_x, int grid_y, int threads, size_t shared_bytes, cudaStream_t stream,
            const Args& args) {
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared_bytes)));
  kernel<<<dim3(grid_x, grid_y), threads, shared_bytes, stream>>>(args);
  check(cudaGetLastError());
}

}  // namespace byol::cuda

#endif
