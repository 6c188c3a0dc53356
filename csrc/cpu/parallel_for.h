// Fixed division of work: thread i of n always gets the same part, so results are equal from run to run.
#pragma once

#include <cstdint>
#include <new>

#include "parallel.h"

namespace byol::BYOL_ISA {

// The first unit of the i-th of n equal shares.
constexpr int64_t share(int64_t units, int i, int n) { return units * i / n; }

// body(thread) for each thread in [0, threads). The one thing that may go wrong inside is memory running out.
template <class Body>
void parallel_for(int threads, const Body& body) {
  struct Context {
    const Body& body;
    volatile bool out_of_memory;
  } context{body, false};
  run_tasks(
      threads,
      [](void* argument, int task) {
        Context& context = *static_cast<Context*>(argument);
        try {
          context.body(task);
        } catch (const std::bad_alloc&) {
          context.out_of_memory = true;
        }
      },
      &context);
  if (context.out_of_memory) throw std::bad_alloc();
}

}  // namespace byol::BYOL_ISA
