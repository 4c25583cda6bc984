#include "memory_pool.h"

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
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

// What the process may still map under its limits: SIZE_MAX where there are none, 0 where Linux does not say what it has.
size_t room_under_limits() {
  rlimit addresses{RLIM_INFINITY, 0}, data{RLIM_INFINITY, 0};
  getrlimit(RLIMIT_AS, &addresses);
  getrlimit(RLIMIT_DATA, &data);
  if (addresses.rlim_cur == RLIM_INFINITY && data.rlim_cur == RLIM_INFINITY) return SIZE_MAX;
  unsigned long long address_pages, data_pages;
  FILE* const file = std::fopen("/proc/self/statm", "r");
  if (!file) return 0;
  const int numbers = std::fscanf(file, "%llu %*u %*u %*u %*u %llu", &address_pages, &data_pages);
  std::fclose(file);
  if (numbers != 2) return 0;
  const auto left = [](rlim_t limit, unsigned long long pages) {
    const auto used = static_cast<rlim_t>(pages) * page_bytes();
    return limit == RLIM_INFINITY ? SIZE_MAX : static_cast<size_t>(limit > used ? limit - used : 0);
  };
  return std::min(left(addresses.rlim_cur, address_pages), left(data.rlim_cur, data_pages));
}

#else

size_t page_bytes() { return 4096; }
void* map(size_t bytes) { return std::aligned_alloc(kHugePage, (bytes + kHugePage - 1) / kHugePage * kHugePage); }
void unmap(const MemoryBlock& block) { std::free(block.data); }
void offer(const MemoryBlock&) {}
size_t room_under_limits() { return SIZE_MAX; }

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
    drop_all_but(most_kept());
    size_t latest = 0;
    for (auto kept = kept_.rbegin(); kept != kept_.rend() && !kept->offered; ++kept)
      if ((latest += kept->bytes) > std::min(kLatest, cap_ / 8)) {
        offer(*kept);
        kept->offered = true;
      }
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    drop_all_but(0);
    peak_ = used_;
  }

  void cap(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    cap_ = bytes;
    drop_all_but(cap_);
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

  void drop_all_but(size_t bytes) {
    while (kept_bytes_ > bytes) drop_oldest();
  }

  size_t most_kept() const {
    const size_t room = room_under_limits();
    return room == SIZE_MAX ? cap_ : std::min(cap_, (room + kept_bytes_) / 8);
  }

  std::mutex mutex_;
  std::vector<Kept> kept_;  // in the order in which they came
  size_t kept_bytes_ = 0, used_ = 0, blocks_in_use_ = 0;
  size_t peak_ = 0;  // the most that was ever in use at once
  size_t cap_ = SIZE_MAX;
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
void cap_kept_memory(size_t bytes) { pool().cap(bytes); }

}  // namespace megalodon
