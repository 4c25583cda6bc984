// Memory traffic of kernels. On a GPU, the lanes of a warp run together; here they take turns. So the nth accesses of all
// lanes by one instruction count as one request.
#include <sys/mman.h>

#include <map>

#include "state.h"

namespace emu {
namespace {

constexpr size_t kSectorBytes = 32, kBanks = 32, kBankBytes = 4;
constexpr uint8_t kLoaded = 1, kStored = 2;

struct Request {
  uint32_t lanes = 0;
  uint32_t offset[kWarpSize];
};
// Requests of a warp that more lanes may join; the first `done` of them have been counted.
struct OpenRequests {
  uint32_t done = 0;
  uint32_t made[kWarpSize] = {};  // by lane: its number of accesses
  std::vector<Request> requests;

  void clear() {
    done = 0;
    std::fill_n(made, kWarpSize, 0);
    requests.clear();
  }
};
struct Site {
  const void* address;
  bool store, shared;
  size_t size;
  std::vector<OpenRequests> warps;
  uint64_t requests = 0, transactions = 0, ideal = 0, bytes = 0;
};

struct SiteKey {
  const void* address;
  unsigned detail;  // size, store, shared
  bool operator<(const SiteKey& other) const {
    return address != other.address ? address < other.address : detail < other.detail;
  }
};

std::map<SiteKey, Site> sites_of_launch;
uint8_t* touched = nullptr;  // a byte for each sector of the arena
TrafficByKernelAndBuffer totals;
std::map<std::pair<std::string, SiteKey>, Site> all_sites;
std::map<const Buffer*, Traffic> traffic_of_launch;

// What one instruction of a kernel accesses in global memory; most: the largest element of a sparse buffer.
struct Far {
  std::set<std::string> buffers;
  uint64_t most = 0;
};
std::map<std::pair<const void*, const void*>, Far> far;  // by kernel and address

// Direct-mapped cache of sites: loops access the same few.
constexpr size_t kCache = 256;
struct CacheEntry {
  SiteKey key;
  Site* site;
} cache[kCache];

Site& find_site(const void* address, size_t size, bool store, bool shared) {
  const SiteKey key{address, static_cast<unsigned>(size << 2 | store << 1 | shared)};
  const uintptr_t bits = reinterpret_cast<uintptr_t>(address);
  CacheEntry& entry = cache[(bits ^ bits >> 8) % kCache];
  if (!entry.site || entry.key.address != address || entry.key.detail != key.detail) {
    Site& site = sites_of_launch.try_emplace(key, Site{address, store, shared, size, {}}).first->second;
    site.warps.resize(launch_.threads / kWarpSize);
    entry = {key, &site};
  }
  return *entry.site;
}

// Calls `each` with the different values of offset / unit of the lanes [from, to); returns their number.
template <class F>
int collect(const Request& request, size_t size, size_t unit, int from, int to, F&& each) {
  uint32_t units[kWarpSize * (4 + 1)];  // 16 bytes are in at most 5 words
  int n = 0;
  for (int l = from; l < to; ++l)
    if (request.lanes >> l & 1)
      for (size_t u = request.offset[l] / unit; u <= (request.offset[l] + size - 1) / unit; ++u) units[n++] = u;
  std::sort(units, units + n);
  n = static_cast<int>(std::unique(units, units + n) - units);
  for (int i = 0; i < n; ++i) each(units[i]);
  return n;
}

void finish_request(Site& site, const Request& request) {
  ++site.requests;
  const int lanes = __builtin_popcount(request.lanes);
  site.bytes += lanes * site.size;
  if (site.shared) {
    // A wavefront has 128 bytes: with 8 or 16 bytes per lane, half or a quarter of the warp. Different words of one
    // bank take separate wavefronts.
    const int at_once = site.size > kBankBytes ? static_cast<int>(kBanks * kBankBytes / site.size) : kWarpSize;
    for (int from = 0; from < kWarpSize; from += at_once) {
      int bank_loads[kBanks] = {}, most = 0;
      collect(request, site.size, kBankBytes, from, std::min(from + at_once, kWarpSize),
              [&](uint32_t word) { most = std::max(most, ++bank_loads[word % kBanks]); });
      site.transactions += most;
      site.ideal += most > 0;
    }
    return;
  }
  const int sectors = collect(request, site.size, kSectorBytes, 0, kWarpSize, [](uint32_t) {});
  site.transactions += sectors;
  site.ideal += (lanes * site.size + kSectorBytes - 1) / kSectorBytes;
  const Buffer* buffer = find_buffer(request.offset[__builtin_ctz(request.lanes)]);
  if (!buffer) return;
  if (recording) far[{launch_.code, site.address}].buffers.insert(buffer->name);
  Traffic& t = traffic_of_launch[buffer];
  (site.store ? t.store_requests : t.load_requests) += 1;
  (site.store ? t.store_sectors : t.load_sectors) += sectors;
  (site.store ? t.store_bytes : t.load_bytes) += lanes * site.size;
}

}  // namespace

void count(size_t offset, size_t size, Access access, const void* address) {
  const bool store = access == Access::write, shared = is_shared(offset);
  if (size > 16) return;  // copy of a struct, which the compiler splits
  if (!shared) {
    if (!touched) {
      void* p = mmap(nullptr, kArenaBytes / kSectorBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw Error("out of memory for the emulator's counters");
      touched = static_cast<uint8_t*>(p);
    }
    for (size_t s = offset / kSectorBytes; s <= (offset + size - 1) / kSectorBytes; ++s)
      touched[s] |= store ? kStored : kLoaded;
  }
  Site& site = find_site(address, size, store, shared);
  OpenRequests& open = site.warps[current->warp];
  const uint32_t index = open.made[current->lane]++;
  if (open.requests.size() <= index) open.requests.resize(index + 1);
  Request& request = open.requests[index];
  request.offset[current->lane] = static_cast<uint32_t>(offset);
  request.lanes |= 1u << current->lane;
  while (open.done < open.requests.size() && open.requests[open.done].lanes == ~0u)
    finish_request(site, open.requests[open.done++]);
  if (open.done == open.requests.size()) open.clear();
}

void finish_block_counts() {
  for (auto& entry : sites_of_launch)
    for (OpenRequests& open : entry.second.warps) {
      for (size_t i = open.done; i < open.requests.size(); ++i)
        if (open.requests[i].lanes) finish_request(entry.second, open.requests[i]);
      open.clear();
    }
}

void finish_launch_counts() {
  for (const Buffer* buffer : live_buffers()) {
    if (!buffer->size || !touched || is_sparse(buffer->offset)) continue;
    Traffic sum;
    uint8_t* begin = touched + buffer->offset / kSectorBytes;
    uint8_t* end = touched + (buffer->offset + buffer->size - 1) / kSectorBytes + 1;
    for (const uint8_t* sector = begin; sector < end; ++sector) {
      sum.load_footprint += *sector & kLoaded ? kSectorBytes : 0;
      sum.store_footprint += *sector & kStored ? kSectorBytes : 0;
    }
    std::memset(begin, 0, end - begin);
    const auto found = traffic_of_launch.find(buffer);
    if (found == traffic_of_launch.end()) continue;
    const Traffic& t = found->second;
    Traffic& total = totals[{launch_.kernel, buffer->name}];
    total.load_bytes += t.load_bytes;
    total.load_requests += t.load_requests;
    total.load_sectors += t.load_sectors;
    total.load_footprint += sum.load_footprint;
    total.store_bytes += t.store_bytes;
    total.store_requests += t.store_requests;
    total.store_sectors += t.store_sectors;
    total.store_footprint += sum.store_footprint;
  }
  traffic_of_launch.clear();
  for (auto& [key, site] : sites_of_launch) {
    Site& all = all_sites.try_emplace({launch_.kernel, key}, Site{site.address, site.store, site.shared, site.size, {}})
                    .first->second;
    all.requests += site.requests;
    all.transactions += site.transactions;
    all.ideal += site.ideal;
    all.bytes += site.bytes;
  }
  sites_of_launch.clear();
  std::fill_n(cache, kCache, CacheEntry{});
}

void note_element(const void* address, size_t element) {
  uint64_t& most = far[{launch_.code, address}].most;
  most = std::max<uint64_t>(most, element);
}

std::vector<Magnitude> magnitudes() {
  std::vector<const void*> addresses;
  for (const auto& entry : far) addresses.push_back(entry.first.second);
  const std::vector<std::string> lines = source_lines(addresses);
  std::vector<Magnitude> list;
  for (const auto& [key, entry] : far) {
    std::string buffers;
    for (const std::string& name : entry.buffers) buffers += (buffers.empty() ? "" : " ") + name;
    list.push_back({offset_in_module(key.first), lines[list.size()], buffers, entry.most});
  }
  return list;
}

void reset_counters() {
  totals.clear();
  launched.clear();
  all_sites.clear();
}

const TrafficByKernelAndBuffer& traffic() { return totals; }

std::vector<SiteTraffic> sites() {
  std::vector<const void*> addresses;
  for (const auto& entry : all_sites) addresses.push_back(entry.second.address);
  const std::vector<std::string> lines = source_lines(addresses);
  std::vector<SiteTraffic> result;
  size_t i = 0;
  for (const auto& [key, s] : all_sites)
    result.push_back({key.first, lines[i++], s.store, s.shared, s.bytes, s.requests, s.transactions, s.ideal});
  return result;
}

}  // namespace emu
