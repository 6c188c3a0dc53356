// torch loads its OpenMP runtime with global visibility, so GOMP_parallel found at run time is the very pool that torch
// uses: no second pool, no oversubscription, no threads at import. Where there is none (another OpenMP, macOS) and in a
// forked child, whose copy of libgomp's pool has lost its threads and would wait for them for ever, plain threads are
// started for the call and joined at its end.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace byol {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};

GompParallel find_gomp() {
  const char* forced = std::getenv("BYOL_FAST_THREADS");
  if (forced && std::strcmp(forced, "std") == 0) return nullptr;
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

GompParallel gomp() {
  static const GompParallel found = find_gomp();
  return forked ? nullptr : found;
}

struct Team {
  void (*body)(void*, int);
  void* context;
  int tasks;
  std::atomic<int> next{0};
};

// The runtime may grant fewer threads than asked for, so tasks are drawn, not assigned.
void work(void* argument) {
  Team& team = *static_cast<Team*>(argument);
  for (int task; (task = team.next.fetch_add(1)) < team.tasks;) team.body(team.context, task);
}

void run_on_plain_threads(Team& team) {
  std::vector<std::thread> threads;
  threads.reserve(team.tasks - 1);
  try {
    for (int i = 1; i < team.tasks; ++i) threads.emplace_back(work, &team);
  } catch (const std::system_error&) {
    // No more threads to be had: those there are, and this one, do the work.
  }
  work(&team);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void run_tasks(int tasks, void (*body)(void*, int), void* context) {
  Team team{body, context, tasks};
  if (tasks <= 1) {
    work(&team);
  } else if (const GompParallel parallel = gomp()) {
    parallel(work, &team, static_cast<unsigned>(tasks), 0);
  } else {
    run_on_plain_threads(team);
  }
}

const char* thread_pool() { return gomp() ? "libgomp" : "std::thread"; }

}  // namespace byol
