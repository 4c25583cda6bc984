// Emulated global and shared memory: one arena, a byte of flags for each byte, red zones around each buffer and array.
#include <link.h>
#include <sys/mman.h>

#include <map>

#include "state.h"

namespace emu {

char* arena = nullptr;

namespace {

constexpr uint8_t kValid = 1, kWritten = 2, kInFlight = 4, kReadOnly = 8;
constexpr size_t kRedZone = 256, kBufferAlignment = 256, kSharedAlignment = 128, kStaticSharedLimit = 48 * 1024;
constexpr size_t kPage = 4096;
constexpr int kPoison = 0xff;  // NaN in every floating-point type

uint8_t* flags = nullptr;
std::map<size_t, Buffer> buffers;  // by offset

struct SharedArray {
  const void* key;
  Buffer buffer;
};
std::vector<SharedArray> shared_arrays;  // of the block; the first is the dynamic one
size_t shared_top, static_shared_bytes;

uint64_t repeated(uint8_t flag) { return flag * 0x0101010101010101ull; }

// A flag is in every byte of `all` if all bytes have it, and in some byte of `any` if some byte has it.
struct FlagSummary {
  uint64_t all, any;
};
FlagSummary summarise(size_t offset, size_t size) {
  const uint8_t* f = flags + offset;
  if (size == 4) {
    uint32_t word;
    std::memcpy(&word, f, 4);
    const uint64_t both = word | uint64_t{word} << 32;
    return {both, both};
  }
  if (size % 8 == 0) {
    FlagSummary summary{~uint64_t{0}, 0};
    for (size_t i = 0; i < size; i += 8) {
      uint64_t word;
      std::memcpy(&word, f + i, 8);
      summary.all &= word;
      summary.any |= word;
    }
    return summary;
  }
  uint8_t all = 0xff, any = 0;
  for (size_t i = 0; i < size; ++i) all &= f[i], any |= f[i];
  return {repeated(all), repeated(any)};
}

void check_outside(const void* p, Access access, const void* address) {
  // A kernel's literals and constexpr tables are constants of the program.
  struct Search {
    uintptr_t address;
    bool found;
  } search{reinterpret_cast<uintptr_t>(p), false};
  if (access == Access::read)
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
          Search& search = *static_cast<Search*>(data);
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            search.found |= info->dlpi_phdr[i].p_type == PT_LOAD && search.address - begin < info->dlpi_phdr[i].p_memsz;
          }
          return 0;
        },
        &search);
  if (search.found) return;
  const std::string verb = access == Access::write ? "write through" : "read through";
  const bool null = search.address < 4096;
  report("not device memory", verb + (null ? " a null pointer" : " a pointer to the host's memory"), address);
  end_launch();
}

void set_flags(size_t offset, size_t size, uint8_t value) { std::memset(flags + offset, value, size); }

// Describes the place of an address in or next to a buffer.
std::string describe_in(const Buffer& buffer, size_t offset, const char* kind) {
  const std::string name = std::string(kind) + " '" + buffer.name + "' (" + std::to_string(buffer.size) + " bytes)";
  if (offset < buffer.offset) return std::to_string(buffer.offset - offset) + " bytes before " + name;
  if (offset < buffer.offset + buffer.size) return "byte " + std::to_string(offset - buffer.offset) + " of " + name;
  return std::to_string(offset - buffer.offset - buffer.size) + " bytes past the end of " + name;
}

char* take_shared(const void* key, const char* name, size_t bytes) {
  const size_t offset = (shared_top + kRedZone + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  shared_top = offset + bytes;
  shared_arrays.push_back({key, {offset, bytes, name, 1}});
  set_flags(offset, bytes, kValid);
  std::memset(arena + offset, kPoison, bytes);
  return arena + offset;
}

size_t offset_of(const void* p) { return static_cast<size_t>(static_cast<const char*>(p) - arena); }

}  // namespace

void initialise_memory() {
  if (arena) return;
  const auto map = [](size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw Error("out of memory for the emulated memory");
    return p;
  };
  flags = static_cast<uint8_t*>(map(kArenaBytes));
  arena = static_cast<char*>(map(kArenaBytes + kSparseBytes));
}

void start_shared_memory() {
  shared_top = static_shared_bytes = 0;
  shared_arrays.clear();
  take_shared(nullptr, "dynamic", launch_.dynamic_shared);
}

void finish_shared_memory() { set_flags(0, shared_top, 0); }

void* shared_array(const void* key, const char* name, size_t bytes) {
  for (const SharedArray& array : shared_arrays)
    if (array.key == key) return arena + array.buffer.offset;
  static_shared_bytes += (bytes + 15) / 16 * 16;
  const Place place{__builtin_return_address(0), nullptr, 0};
  if (static_shared_bytes > kStaticSharedLimit) fail("more than 48 KiB of static shared memory", place);
  if (static_shared_bytes + launch_.dynamic_shared > options.shared_limit) fail("too much shared memory", place);
  return take_shared(key, name, bytes);
}

void* dynamic_shared() { return arena + shared_arrays[0].buffer.offset; }

std::string describe(size_t offset) {
  const Buffer* nearest = nullptr;
  size_t least = SIZE_MAX;
  const auto consider = [&](const Buffer& buffer) {
    const size_t end = buffer.offset + buffer.size;
    const size_t distance = offset < buffer.offset ? buffer.offset - offset : offset < end ? 0 : offset - end + 1;
    if (distance < least) nearest = &buffer, least = distance;
  };
  if (is_shared(offset))
    for (const SharedArray& array : shared_arrays) consider(array.buffer);
  else
    for (const auto& entry : buffers) consider(entry.second);
  if (!nearest) return "no buffer";
  return describe_in(*nearest, offset, is_shared(offset) ? "shared array" : "buffer");
}

void access(const void* p, size_t size, Access access, const void* address) {
  if (!current || kSanitized) return;  // host code, or a build that sees only some accesses
  const char* stack = stack_of(*current);
  if (p >= stack && p < stack + kStackBytes) return;
  const size_t offset = offset_of(p);
  if (offset >= kArenaBytes + kSparseBytes) return check_outside(p, access, address);
  const bool write = access == Access::write;
  const auto what = [&] { return std::to_string(size) + " bytes at " + describe(offset); };
  if (is_sparse(offset)) {
    const Buffer* buffer = find_buffer(offset);
    if (!buffer || buffer->offset + buffer->size - offset < size)
      report("out of bounds", (write ? "write of " : "read of ") + what(), address);
    else if (recording) note_element(address, (offset - buffer->offset) / buffer->item);
    return;
  }
  const FlagSummary found = summarise(offset, size);
  const uint64_t needed = repeated(write ? kValid : kValid | kWritten);
  const uint64_t forbidden = repeated(write ? kInFlight | kReadOnly : kInFlight);
  if ((found.all & needed) != needed || (found.any & forbidden)) {
    if ((found.all & repeated(kValid)) != repeated(kValid))
      return report("out of bounds", (write ? "write of " : "read of ") + what(), address);
    if (found.any & repeated(kInFlight))
      report("copy in flight", (write ? "write of " : "read of ") + what() + " before cp_async_wait", address);
    else if (write)
      report("read-only buffer", "write of " + what(), address);
    else
      report("uninitialised read", what(), address);
  }
  if (write && (found.all & repeated(kWritten)) != repeated(kWritten))
    for (size_t i = 0; i < size; ++i) flags[offset + i] |= kWritten;
  check_race(offset, size, access, address);
  count(offset, size, access, address);
}

void set_in_flight(size_t offset, size_t size, bool in_flight) {
  for (size_t i = offset; i < offset + size; ++i)
    flags[i] = static_cast<uint8_t>(in_flight ? flags[i] | kInFlight : flags[i] & ~kInFlight);
}

char* allocate(size_t bytes, const std::string& name, size_t misalignment, bool sparse, size_t item) {
  initialise_memory();
  const auto place_after = [&](size_t end) {
    return (end + bounds.red_zone + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment + misalignment;
  };
  size_t offset = place_after(sparse ? kArenaBytes : kSharedWindow);
  for (const auto& [start, buffer] : buffers) {  // the first gap that is large enough
    if (is_sparse(start) < sparse) continue;
    if (offset + bytes + bounds.red_zone <= start) break;
    offset = place_after(start + buffer.size);
  }
  if (offset + bytes + bounds.red_zone > kArenaBytes + sparse * kSparseBytes)
    throw Error("the emulated device is out of memory");
  buffers[offset] = {offset, bytes, name, item};
  if (sparse) return arena + offset;
  set_flags(offset, bytes, kValid);
  std::memset(arena + offset, kPoison, bytes);
  return arena + offset;
}

void release(char* p) {
  const auto found = buffers.find(offset_of(p));
  const auto [offset, size, name, item] = found->second;
  if (!is_sparse(offset)) set_flags(offset, size, 0);
  else madvise(arena + offset / kPage * kPage, offset % kPage + size, MADV_DONTNEED);  // pages are zeros again
  buffers.erase(found);
}

void mark_written(char* p, size_t bytes) { set_flags(offset_of(p), bytes, kValid | kWritten); }
void mark_read_only(char* p, size_t bytes) { set_flags(offset_of(p), bytes, kValid | kWritten | kReadOnly); }

const Buffer* find_buffer(size_t offset) {
  auto after = buffers.upper_bound(offset);
  if (after == buffers.begin()) return nullptr;
  const Buffer& buffer = std::prev(after)->second;
  return offset < buffer.offset + buffer.size ? &buffer : nullptr;
}

std::vector<const Buffer*> live_buffers() {
  std::vector<const Buffer*> live;
  for (const auto& entry : buffers) live.push_back(&entry.second);
  return live;
}

}  // namespace emu
