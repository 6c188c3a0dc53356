// Memory of large results, and of what a kernel puts together on the way.
//
// The system's allocator gives what is freed back to the system before long, a block of 32 MiB and more at once, so that the next
// call finds pages that have to be cleared, and the processor stops at each, before a kernel writes there. So large blocks are
// kept, and the next one of that size taken from them, in large pages that nobody has to clear. Those that were not used lately are
// offered to the system, which may have them when it needs them.
#pragma once

#include <cstdint>

namespace byol {

// So many bytes, aligned to 64 of them; throws std::bad_alloc.
void* take_memory(int64_t bytes);
// Back again, with the same number of bytes; nothing for a null pointer.
void give_memory(void* data, int64_t bytes);
// All that is kept goes back to the system.
void release_memory();

}  // namespace byol
