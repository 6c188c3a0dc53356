#include "memory.h"

#include <pthread.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace byol {
namespace {

constexpr int64_t kPage = int64_t(2) << 20;
// From so many bytes on a block is kept; none where a sanitizer watches over the system's blocks.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kLeast = INT64_MAX;
#else
constexpr int64_t kLeast = int64_t(1) << 20;
#endif
// All that is kept, at most; and of what was used last, so much is not offered to the system, for that takes long.
constexpr int64_t kMost = int64_t(512) << 20, kWarm = int64_t(128) << 20;

struct Region {
  void* data;
  int64_t bytes;
  bool offered = false;
};

#ifdef __linux__
// From the start of a large page on.
Region map(int64_t bytes) {
  char* data = static_cast<char*>(mmap(nullptr, size_t(bytes + kPage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (data == MAP_FAILED) throw std::bad_alloc();
  const int64_t before = (kPage - int64_t(reinterpret_cast<uintptr_t>(data) % kPage)) % kPage;
  if (before > 0) munmap(data, size_t(before));
  munmap(data + before + bytes, size_t(kPage - before));
  // A wish: where the system knows no such pages, nothing happens.
  madvise(data + before, size_t(bytes), MADV_HUGEPAGE);
  return {data + before, bytes};
}
void unmap(const Region& region) { munmap(region.data, size_t(region.bytes)); }
// To the system, which takes it when memory is short; what was written is lost then.
void offer(const Region& region) { madvise(region.data, size_t(region.bytes), MADV_FREE); }
#else
Region map(int64_t bytes) {
  void* data = std::aligned_alloc(size_t(4096), size_t(bytes));
  if (!data) throw std::bad_alloc();
  return {data, bytes};
}
void unmap(const Region& region) { std::free(region.data); }
void offer(const Region&) {}
#endif

// Regions that nobody uses, the oldest first.
class Kept {
 public:
  void* take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = regions_.size(); i-- > 0;)
      if (regions_[i].bytes == bytes) return remove(i).data;
    return map(bytes).data;
  }
  void give(const Region& region) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (region.bytes > kMost) return unmap(region);
    while (bytes_ + region.bytes > kMost) unmap(remove(0));
    regions_.push_back(region);
    bytes_ += region.bytes;
    offer_older();
  }
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!regions_.empty()) unmap(remove(regions_.size() - 1));
  }
  // Around a fork: in the child, a mutex that another thread had would stay locked for ever.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  void offer_older() {
    int64_t later = 0;
    for (size_t i = regions_.size(); i-- > 0 && !regions_[i].offered;) {
      later += regions_[i].bytes;
      if (later > kWarm) offer(regions_[i]), regions_[i].offered = true;
    }
  }
  Region remove(size_t index) {
    const Region region = regions_[index];
    regions_.erase(regions_.begin() + std::ptrdiff_t(index));
    bytes_ -= region.bytes;
    return region;
  }

  std::mutex mutex_;
  std::vector<Region> regions_;
  int64_t bytes_ = 0;
};

// Never destroyed: a result may outlive the interpreter.
Kept& kept() {
  static Kept& kept = *[] {
    pthread_atfork([] { byol::kept().lock(); }, [] { byol::kept().unlock(); }, [] { byol::kept().unlock(); });
    return new Kept;
  }();
  return kept;
}

int64_t rounded(int64_t bytes, int64_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

}  // namespace

void* take_memory(int64_t bytes) {
  if (bytes >= kLeast) return kept().take(rounded(bytes, kPage));
  void* data = std::aligned_alloc(64, size_t(rounded(bytes > 0 ? bytes : 1, 64)));
  if (!data) throw std::bad_alloc();
  return data;
}

void give_memory(void* data, int64_t bytes) {
  if (!data) return;
  if (bytes < kLeast) return std::free(data);
  kept().give({data, rounded(bytes, kPage)});
}

void release_memory() { kept().release(); }

}  // namespace byol
