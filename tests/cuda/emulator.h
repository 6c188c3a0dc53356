// A GPU in plain C++: runs the kernels of csrc/cuda, thread by thread, on the CPU.
//
// Each CUDA thread is a fiber; barriers, shuffles and matrix instructions switch to the next one. So the very source that
// nvcc compiles is tested: tiling, masks, fragment layouts, the order of sums. What hardware leaves undefined is made
// visible: shared memory starts as NaN, an asynchronous copy arrives only when it is waited for, a fiber order given by
// EMULATOR_ORDER (forward, backward) shows races as other results, and a barrier that some threads never reach aborts.
// Tensor cores are modelled as exact products whose sum is rounded toward zero, which is worse than any hardware known.
//
// It defines what csrc/cuda/device.h (and hopper.h) define for hardware, with the same names.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define BYOL_DEVICE inline

using cudaStream_t = void*;

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

// What the lanes of a warp hand each other; two sets, since a lane may be one collective ahead of the others.
struct Warp {
  Barrier barrier;
  uint64_t values[2][32][8];
};

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Block {
  int x = 0, y = 0, rank = 0, threads = 0;
  std::vector<unsigned char> shared;
  Barrier all;
  std::vector<Barrier> named;
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;
  Block* block = nullptr;
  int thread = 0, collective = 0;
  std::vector<Copy> pending;
  std::vector<size_t> groups;  // pending.size() at each commit
};

struct Machine {
  static constexpr size_t kStack = 128 * 1024;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::function<void()> body;
  uint64_t progress = 0;
  std::vector<Block>* cluster = nullptr;

  static void enter() {
    Machine& m = self();
    m.body();
    m.current->done = true;
    ++m.progress;
    _longjmp(m.scheduler, 1);
  }

  static Machine& self() {
    static Machine machine;
    return machine;
  }

  // Runs the blocks, together, until all their threads are done.
  void run(std::vector<Block>& blocks) {
    cluster = &blocks;
    // Volatile: setjmp returns more than once.
    volatile size_t count = 0;
    for (Block& block : blocks) count = count + block.threads;
    while (fibers.size() < count) {
      fibers.push_back(std::make_unique<Fiber>());
      stacks.emplace_back(new char[kStack]);
    }
    size_t next = 0;
    for (Block& block : blocks)
      for (int thread = 0; thread < block.threads; ++thread, ++next) {
        Fiber& fiber = *fibers[next];
        fiber.started = fiber.done = false;
        fiber.block = &block, fiber.thread = thread, fiber.collective = 0;
        fiber.pending.clear(), fiber.groups.clear();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks[next].get();
        fiber.start.uc_stack.ss_size = kStack;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, &Machine::enter, 0);
      }
    const char* order = std::getenv("EMULATOR_ORDER");
    const volatile bool backward = order && std::strcmp(order, "backward") == 0;
    volatile bool active = true;
    while (active) {
      const uint64_t before = progress;
      active = false;
      for (volatile size_t i = 0; i < count; i = i + 1) {
        Fiber* fiber = fibers[backward ? count - 1 - i : i].get();
        if (fiber->done) continue;
        active = true;
        current = fiber;
        if (_setjmp(scheduler) == 0) {
          if (fiber->started) _longjmp(fiber->state, 1);
          fiber->started = true;
          setcontext(&fiber->start);
        }
      }
      if (active && progress == before) fail("deadlock: no thread can go on");
    }
  }

  void yield() {
    if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
  }
};

inline Fiber& fiber() { return *Machine::self().current; }
inline Block& block() { return *fiber().block; }
inline void progress() { ++Machine::self().progress; }

template <class Ready>
void wait_until(const Ready& ready) {
  while (!ready()) Machine::self().yield();
  progress();
}

inline void arrive_and_wait(Barrier& barrier) {
  const uint64_t generation = barrier.generation;
  progress();
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) Machine::self().yield();
}

// Gives the other lanes `count` values and returns those of all lanes.
inline uint64_t (&share(const uint64_t* values, int count))[32][8] {
  Fiber& me = fiber();
  Warp& warp = me.block->warps[me.thread / 32];
  auto& slots = warp.values[me.collective++ % 2];
  for (int i = 0; i < count; ++i) slots[me.thread % 32][i] = values[i];
  arrive_and_wait(warp.barrier);
  return slots;
}

inline void check_shared(const void* address, size_t bytes) {
  Block& here = block();
  const auto* p = static_cast<const unsigned char*>(address);
  if (p < here.shared.data() || p + bytes > here.shared.data() + here.shared.size()) fail("address outside of shared memory");
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("shared address is not 16-byte aligned");
}

inline float toward_zero(double x) {
  float rounded = float(x);
  if (std::fabs(double(rounded)) > std::fabs(x)) rounded = std::nextafterf(rounded, 0.0f);
  return rounded;
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Runs grid_x × grid_y blocks, `cluster` neighbours along x at a time.
inline void run_grid(int grid_x, int grid_y, int threads, size_t shared_bytes, int cluster, std::function<void()> body) {
  Machine& machine = Machine::self();
  machine.body = std::move(body);
  for (int y = 0; y < grid_y; ++y)
    for (int x = 0; x < grid_x; x += cluster) {
      std::vector<Block> blocks(cluster);
      for (int rank = 0; rank < cluster; ++rank) {
        Block& block = blocks[rank];
        block.x = x + rank, block.y = y, block.rank = rank, block.threads = threads;
        block.shared.assign(shared_bytes + 1024, 0xff);
        block.all.expected = threads;
        block.named.resize(16);
        block.warps.resize(threads / 32);
        for (Warp& warp : block.warps) warp.barrier.expected = 32;
      }
      machine.run(blocks);
    }
}

}  // namespace emulator

namespace byol::cuda {

BYOL_DEVICE int thread() { return emulator::fiber().thread; }
BYOL_DEVICE int block_x() { return emulator::block().x; }
BYOL_DEVICE int block_y() { return emulator::block().y; }
BYOL_DEVICE void sync() { emulator::arrive_and_wait(emulator::block().all); }
BYOL_DEVICE void sync_warp() { emulator::share(nullptr, 0); }

// Shared memory begins at a multiple of 1024 bytes, as the copy engine's swizzle wants.
BYOL_DEVICE unsigned char* shared_memory() {
  auto address = reinterpret_cast<uintptr_t>(emulator::block().shared.data());
  return reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
}

template <class V>
BYOL_DEVICE V shuffle_from(V value, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  auto& lanes = emulator::share(&bits, 1);
  V result;
  std::memcpy(&result, &lanes[lane][0], sizeof(V));
  return result;
}
template <class V>
BYOL_DEVICE V shuffle_xor(V value, int mask) {
  return shuffle_from(value, (thread() % 32) ^ mask);
}

BYOL_DEVICE void copy_async(void* to, const void* from, int valid_bytes) {
  emulator::check_shared(to, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("copy from an address that is not 16-byte aligned");
  emulator::fiber().pending.push_back({to, from, 16, valid_bytes});
}
BYOL_DEVICE void copy_commit() {
  emulator::Fiber& me = emulator::fiber();
  me.groups.push_back(me.pending.size());
}
template <int kNewer>
BYOL_DEVICE void copy_wait() {
  emulator::Fiber& me = emulator::fiber();
  while (int(me.groups.size()) > kNewer) {
    const size_t count = me.groups.front();
    for (size_t i = 0; i < count; ++i) {
      const emulator::Copy& copy = me.pending[i];
      std::memset(copy.to, 0, copy.bytes);
      std::memcpy(copy.to, copy.from, copy.valid);
    }
    me.pending.erase(me.pending.begin(), me.pending.begin() + count);
    me.groups.erase(me.groups.begin());
    for (size_t& group : me.groups) group -= count;
  }
}

// Four 8×8 matrices of 16-bit elements: lane 8i + j gives the address of row j of matrix i.
template <bool kTransposed>
BYOL_DEVICE void load_matrices(uint32_t (&result)[4], const void* row) {
  emulator::check_shared(row, 16);
  const uint64_t address = reinterpret_cast<uintptr_t>(row);
  auto& rows = emulator::share(&address, 1);
  const int lane = thread() % 32;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int r = kTransposed ? 2 * (lane % 4) + j : lane / 4, c = kTransposed ? lane / 4 : 2 * (lane % 4) + j;
      pair[j] = reinterpret_cast<const uint16_t*>(rows[8 * i + r][0])[c];
    }
    std::memcpy(&result[i], pair, 4);
  }
}

namespace emulated {

// D += A·B of one warp, element by element: a(row, k) and b(k, column) read what the lanes hold.
template <int kDepth, class A, class B>
void multiply_add(float (&d)[4], const A& a, const B& b) {
  const int lane = thread() % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    double sum = d[i];
    for (int k = 0; k < kDepth; ++k) sum += double(a(row, k)) * double(b(k, column));
    d[i] = emulator::toward_zero(sum);
  }
}

}  // namespace emulated

// m16n8k16 of 16-bit elements.
template <class T>
BYOL_DEVICE void matrix_multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint64_t values[6] = {a[0], a[1], a[2], a[3], b0, b1};
  auto& lanes = emulator::share(values, 6);
  const auto half = [](uint64_t pair, int i) { return to_float(T{uint16_t(pair >> (16 * i))}); };
  emulated::multiply_add<16>(
      d, [&](int row, int k) { return half(lanes[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2); },
      [&](int k, int column) { return half(lanes[column * 4 + k % 8 / 2][4 + k / 8], k % 2); });
}

// m16n8k8 of tf32, which has the bits of a float whose last 13 are zero.
BYOL_DEVICE void matrix_multiply_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint64_t values[6] = {a[0], a[1], a[2], a[3], b0, b1};
  auto& lanes = emulator::share(values, 6);
  const auto value = [](uint64_t bits) { return emulator::bits_to_float(uint32_t(bits) & ~0x1fffu); };
  emulated::multiply_add<8>(
      d, [&](int row, int k) { return value(lanes[row % 8 * 4 + k % 4][row / 8 + 2 * (k / 4)]); },
      [&](int k, int column) { return value(lanes[column * 4 + k % 4][4 + k / 4]); });
}

// Rounds to the nearest tf32, ties away from zero.
BYOL_DEVICE uint32_t round_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0x1000u;
  else if (bits & 0x007fffffu) bits |= 0x00400000u;
  return bits & ~0x1fffu;
}

template <class Args>
void launch(void (*kernel)(Args), int grid_x, int grid_y, int threads, size_t shared_bytes, cudaStream_t, const Args& args,
            int cluster = 1) {
  emulator::run_grid(grid_x, grid_y, threads, shared_bytes, cluster, [kernel, &args] { kernel(args); });
}

}  // namespace byol::cuda
