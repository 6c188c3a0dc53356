// Runs numbered tasks on the threads of the pool that torch already has.
#pragma once

namespace byol {

// Calls body(context, i) once for each i in [0, tasks), on at most `tasks` threads; returns when all are done.
// What task i does must depend on i alone, so that results do not depend on which thread ran it.
void run_tasks(int tasks, void (*body)(void* context, int task), void* context);

// "libgomp" when torch's own pool is used, "std::thread" otherwise.
const char* thread_pool();

}  // namespace byol
