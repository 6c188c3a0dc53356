// What csrc/cuda/hopper.h defines for sm_90a, emulated: clusters, barriers that count bytes, the copy engine, wgmma.
#pragma once

#include "emulator.h"

#define __CUDA_ARCH_FEAT_SM90_ALL 1

namespace byol::cuda {

struct TensorMap {
  const uint16_t* data;
  int64_t columns, rows, stride;
};

// Eight bytes, as in hardware.
struct Barrier {
  uint8_t phase, expected;
  int16_t pending;
  int32_t bytes;
};

namespace emulated {

inline void complete(Barrier& barrier) {
  emulator::progress();
  if (barrier.pending || barrier.bytes) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.expected;
}

template <class V>
V* in_block(V* local, int rank) {
  const auto base = [](emulator::Block& block) {
    return (reinterpret_cast<uintptr_t>(block.shared.data()) + 1023) / 1024 * 1024;
  };
  const uintptr_t offset = reinterpret_cast<uintptr_t>(local) - base(emulator::block());
  return reinterpret_cast<V*>(base((*emulator::Machine::self().cluster)[rank]) + offset);
}

}  // namespace emulated

BYOL_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - shared_memory());
}
BYOL_DEVICE int cluster_rank() { return emulator::block().rank; }
BYOL_DEVICE void cluster_sync() {
  // Of all threads of the cluster, counted in its first block.
  emulator::Block& first = (*emulator::Machine::self().cluster)[0];
  first.named[0].expected = first.threads * int(emulator::Machine::self().cluster->size());
  emulator::arrive_and_wait(first.named[0]);
}
BYOL_DEVICE void barrier_init(Barrier* barrier, int arrivals) { *barrier = {0, uint8_t(arrivals), int16_t(arrivals), 0}; }
BYOL_DEVICE void barrier_init_visible() {}
BYOL_DEVICE void barrier_expect(Barrier* barrier, int bytes) {
  barrier->bytes += bytes;
  --barrier->pending;
  emulated::complete(*barrier);
}
BYOL_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  emulator::wait_until([&] { return barrier->phase != parity; });
}
BYOL_DEVICE void async_fence() {}

BYOL_DEVICE void copy_box(void* to, const TensorMap* map, int column, int row, Barrier* barrier) {
  if (shared_address(to) % 1024) emulator::fail("a swizzled box begins at a multiple of 1024 bytes");
  for (int r = 0; r < 64; ++r)
    for (int c = 0; c < 64; ++c) {
      const bool inside = row + r < map->rows && column + c < map->columns;
      const uint16_t value = inside ? map->data[(row + r) * map->stride + column + c] : 0;
      std::memcpy(static_cast<char*>(to) + r * 128 + ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2, &value, 2);
    }
  barrier->bytes -= 64 * 64 * 2;
  emulated::complete(*barrier);
}

BYOL_DEVICE void push(void* to, const uint32_t (&value)[4], Barrier* barrier, int rank) {
  emulator::check_shared(to, 16);
  std::memcpy(emulated::in_block(to, rank), value, 16);
  Barrier& remote = *emulated::in_block(barrier, rank);
  remote.bytes -= 16;
  emulated::complete(remote);
}

template <class Args>
void launch_clusters(void (*kernel)(Args), int cluster, int blocks, int threads, int shared_bytes, cudaStream_t stream,
                     const Args& args) {
  launch(kernel, blocks, 1, threads, size_t(shared_bytes), stream, args, cluster);
}
template <class Args>
int clusters_at_a_time(void (*)(Args), int, int, int) {
  return 2;
}

BYOL_DEVICE void wgmma_begin() {}
BYOL_DEVICE void wgmma_end() {
  // No lane goes on to overwrite an operand that another still reads.
  sync_warp();
}

// An operand, read as the descriptor says: `wide` of 64, `deep` of 16. K-major: 128-byte rows along k, groups of eight of
// them `stride` apart. MN-major (transposed): 128-byte rows along the wide side, one for each k. Swizzled by address.
template <class T>
float wgmma_element(uint64_t descriptor, bool transposed, int wide, int deep) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) emulator::fail("only the 128-byte swizzle is modelled");
  const int row = transposed ? deep : wide, along = transposed ? wide : deep;
  const uint32_t linear = start + row / 8 * stride + row % 8 * 128 + along * 2;
  const uint32_t address = linear ^ ((linear >> 7 & 7) << 4);
  T value;
  std::memcpy(&value, shared_memory() + address, 2);
  return to_float(value);
}

template <class T, bool kTransposed, int kPieces>
BYOL_DEVICE void wgmma(float (&c)[kPieces][4], uint64_t a, uint64_t b) {
  const int lane = thread() % 32, warp = thread() / 32 % 4;
  for (int n = 0; n < kPieces; ++n)
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp + lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
      double sum = c[n][i];
      for (int k = 0; k < 16; ++k)
        sum += double(wgmma_element<T>(a, kTransposed, row, k)) * double(wgmma_element<T>(b, kTransposed, column, k));
      c[n][i] = emulator::toward_zero(sum);
    }
}

}  // namespace byol::cuda
