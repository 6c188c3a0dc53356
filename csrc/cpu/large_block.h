// Memory of large results. The system's allocator maps a block of 32 MiB and more anew for every call and gives it back when it
// is freed, so that the system clears each page, and the processor stops at each, before a kernel writes there. So what such a
// result leaves is kept, and the next one of its size written into it: the system may take it back at any time it needs it, and
// until then it is in large pages that nobody has to clear.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace byol {

class LargeBlock {
 public:
  explicit LargeBlock(int64_t bytes) : region_(kept().take((bytes + kPage - 1) / kPage * kPage)) {}
  LargeBlock(const LargeBlock&) = delete;
  LargeBlock& operator=(const LargeBlock&) = delete;
  ~LargeBlock() { kept().put(region_); }

  void* data() const { return region_.data; }
  int64_t bytes() const { return region_.bytes; }

 private:
  static constexpr int64_t kPage = int64_t(2) << 20;
  // All that is kept, at most.
  static constexpr int64_t kMost = int64_t(512) << 20;

  struct Region {
    void* data;
    int64_t bytes;
  };

  // Regions that nobody uses, the oldest first.
  class Kept {
   public:
    Region take(int64_t bytes) {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = regions_.size(); i-- > 0;)
        if (regions_[i].bytes == bytes) return remove(i);
      return map(bytes);
    }
    void put(const Region& region) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (region.bytes > kMost) return unmap(region);
      while (bytes_ + region.bytes > kMost) unmap(remove(0));
      offer(region);
      regions_.push_back(region);
      bytes_ += region.bytes;
    }

   private:
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
  static Kept& kept() {
    static Kept& kept = *new Kept;
    return kept;
  }

#ifdef __linux__
  // From the start of a large page on.
  static Region map(int64_t bytes) {
    char* data = static_cast<char*>(mmap(nullptr, size_t(bytes + kPage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (data == MAP_FAILED) throw std::bad_alloc();
    const int64_t before = (kPage - int64_t(reinterpret_cast<uintptr_t>(data) % kPage)) % kPage;
    if (before > 0) munmap(data, size_t(before));
    munmap(data + before + bytes, size_t(kPage - before));
    // A wish: where the system knows no such pages, nothing happens.
    madvise(data + before, size_t(bytes), MADV_HUGEPAGE);
    return {data + before, bytes};
  }
  static void unmap(const Region& region) { munmap(region.data, size_t(region.bytes)); }
  // To the system, which takes it when memory is short; what was written is lost then.
  static void offer(const Region& region) { madvise(region.data, size_t(region.bytes), MADV_FREE); }
#else
  static Region map(int64_t bytes) {
    void* data = std::aligned_alloc(size_t(4096), size_t(bytes));
    if (!data) throw std::bad_alloc();
    return {data, bytes};
  }
  static void unmap(const Region& region) { std::free(region.data); }
  static void offer(const Region&) {}
#endif

  Region region_;
};

}  // namespace byol
