#include "memory_pool.h"

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#else
#include <cstdlib>
#endif

#include "huge_pages.h"

namespace megalodon {
namespace {

#if defined(__linux__)

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Aligned to a huge page: as much more is mapped, and the ends are given back.
void* map(size_t bytes) {
  void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  char* const data = begin + (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (data > begin) munmap(begin, data - begin);
  if (data < begin + kHugePage) munmap(data + bytes, begin + kHugePage - data);
  advise_huge_pages(data, bytes);
  return data;
}

void unmap(const MemoryBlock& block) { munmap(block.data, block.bytes); }

// Linux may take the pages from now on; one that is written before it does stays, without a fault.
void offer(const MemoryBlock& block) { madvise(block.data, block.bytes, MADV_FREE); }

#else

size_t page_bytes() { return 4096; }
void* map(size_t bytes) { return std::aligned_alloc(kHugePage, (bytes + kHugePage - 1) / kHugePage * kHugePage); }
void unmap(const MemoryBlock& block) { std::free(block.data); }
void offer(const MemoryBlock&) {}

#endif

class Pool {
 public:
  MemoryBlock take(size_t bytes) {
    if (bytes > PTRDIFF_MAX - kHugePage) throw std::bad_alloc();
    bytes = (bytes + page_bytes() - 1) / page_bytes() * page_bytes();
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.reserve(kept_.size() + blocks_in_use_ + 1);  // so that give() allocates nothing
    auto best = kept_.end();
    for (auto kept = kept_.begin(); kept != kept_.end(); ++kept)  // of equals the last, which the caches may hold
      if (kept->bytes >= bytes && kept->bytes <= bytes + bytes / 4 && (best == kept_.end() || kept->bytes <= best->bytes))
        best = kept;
    const MemoryBlock block = best != kept_.end() ? forget(best) : map_new(bytes);
    used_ += block.bytes;
    ++blocks_in_use_;
    peak_ = std::max(peak_, used_);
    return block;
  }

  void give(const MemoryBlock& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= block.bytes;
    --blocks_in_use_;
    kept_bytes_ += block.bytes;
    kept_.push_back({block.data, block.bytes});
    size_t latest = 0;
    for (auto kept = kept_.rbegin(); kept != kept_.rend() && !kept->offered; ++kept)
      if ((latest += kept->bytes) > kLatest) {
        offer(*kept);
        kept->offered = true;
      }
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!kept_.empty()) drop_oldest();
    peak_ = used_;
  }

 private:
  // So much of what came last is not offered to the system, which takes several microseconds for a huge page.
  static constexpr size_t kLatest = size_t{128} << 20;

  struct Kept : MemoryBlock {
    bool offered = false;
  };

  MemoryBlock map_new(size_t bytes) {
    while (!kept_.empty() && used_ + bytes + kept_bytes_ > peak_) drop_oldest();
    while (true) {
      if (void* data = map(bytes)) return {data, bytes};
      if (kept_.empty()) throw std::bad_alloc();
      drop_oldest();
    }
  }

  MemoryBlock forget(std::vector<Kept>::iterator kept) {
    const MemoryBlock block = *kept;
    kept_bytes_ -= block.bytes;
    kept_.erase(kept);
    return block;
  }

  void drop_oldest() { unmap(forget(kept_.begin())); }

  std::mutex mutex_;
  std::vector<Kept> kept_;  // in the order in which they came
  size_t kept_bytes_ = 0, used_ = 0, blocks_in_use_ = 0;
  size_t peak_ = 0;  // the most that was ever in use at once
};

Pool& pool() {
  static Pool& pool = *[] {
    // The child of a fork has but one thread: whatever another did with the pool is done before.
    pthread_atfork([] { megalodon::pool().lock(); }, [] { megalodon::pool().unlock(); },
                   [] { megalodon::pool().unlock(); });
    return new Pool;  // tensors may outlive everything
  }();
  return pool;
}

}  // namespace

MemoryBlock take_memory(size_t bytes) { return pool().take(bytes); }
void give_memory(MemoryBlock block) { pool().give(block); }
void release_memory() { pool().release(); }

}  // namespace megalodon
