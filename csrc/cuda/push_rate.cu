// Each block of a cluster pushes 16-byte pieces to the others in turn, as the single-pass kernel does, and nothing else.
#include "push_rate.h"

#include "hopper.h"

namespace byol::cuda {

namespace {

constexpr int kPushThreads = 256;
constexpr int kPieceBytes = 16 * kPushThreads;
// Bytes that a block pushes, and is pushed, a round.
constexpr int kRoundBytes = 1 << 19;
static_assert(kRoundBytes < 1 << 20, "a barrier counts no more bytes");
// Where they are pushed to, over and over: nobody reads them. So much that there is one block on a multiprocessor.
constexpr int kSlotBytes = 128 * 1024;

struct PushArgs {
  int cluster, rounds;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

BYOL_DEVICE void push_rounds(const PushArgs& args) {
  unsigned char* slots = shared_memory();
  Barrier* barrier = reinterpret_cast<Barrier*>(slots + kSlotBytes);
  if (thread() == 0) {
    barrier_init(barrier, 1);
    barrier_init_visible();
  }
  sync();
  cluster_sync();
  const uint32_t value[4] = {uint32_t(thread()), 1, 2, 3};
  for (int round = 0; round < args.rounds; ++round) {
    if (thread() == 0) barrier_expect(barrier, kRoundBytes);
    int ahead = 0;
    for (int at = 0; at < kRoundBytes; at += kPieceBytes) {
      // To the next block, the one after it, …: as much comes as goes.
      ahead = ahead + 1 < args.cluster ? ahead + 1 : 1;
      const int to = cluster_rank() + ahead;
      push(slots + at % kSlotBytes + 16 * thread(), value, barrier, to < args.cluster ? to : to - args.cluster);
    }
    barrier_wait(barrier, round % 2);
  }
  // No block leaves while another may still push to it.
  cluster_sync();
}

#endif

__global__ void __launch_bounds__(kPushThreads) push_kernel(const __grid_constant__ PushArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  push_rounds(args);
#endif
}

}  // namespace

int64_t push_in_clusters(int cluster, int rounds, void* stream) {
  const int shared_bytes = kSlotBytes + int(sizeof(uint64_t));
  const int blocks = cluster * clusters_at_a_time(push_kernel, cluster, kPushThreads, shared_bytes);
  launch_clusters(push_kernel, cluster, blocks, kPushThreads, shared_bytes, static_cast<cudaStream_t>(stream),
                  PushArgs{cluster, rounds});
  return int64_t(blocks) * rounds * kRoundBytes;
}

}  // namespace byol::cuda
