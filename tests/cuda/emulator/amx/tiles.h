// AMX's tile instructions as functions on arrays, for processors without AMX. A file of kernels is compiled with this
// header included first; its intrinsics then call these functions.
//
// The arithmetic is that of TDPBF16PS in Intel's manual: even and odd elements of the depth are summed separately by
// fused multiply-adds, the two sums are added, then the result is added to the destination; each rounds to nearest,
// denormals are zero, and MXCSR does not matter. An instruction that would raise #UD or #GP ends the process.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __AMX_BF16__ 1  // which -mamx-bf16 defines
#define __AMX_INT8__ 1

namespace amx {

constexpr int kTiles = 8, kRows = 16, kBytes = 64;

struct Tile {
  int rows, bytes;
  alignas(kBytes) uint8_t data[kRows][kBytes];
};

// A thread's registers.
struct Registers {
  bool configured = false;
  Tile tiles[kTiles];
};
inline thread_local Registers registers;

inline void require(bool holds, const char* problem) {
  if (holds) return;
  std::fprintf(stderr, "emulated AMX: %s\n", problem);
  std::abort();
}

inline Tile& tile(int index) {
  require(registers.configured, "tile registers are not configured");
  require(index < kTiles && registers.tiles[index].rows > 0, "a tile without rows");
  return registers.tiles[index];
}

inline void load_config(const void* from) {
  uint8_t config[64];
  std::memcpy(config, from, sizeof config);
  require(config[0] == 1 && config[1] == 0, "the configuration must have palette 1 and start row 0");
  for (int i = 0; i < kTiles; ++i) {
    Tile& tile = registers.tiles[i];
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * i, sizeof bytes);  // bytes of a row, 2 for each tile from byte 16 on
    tile.rows = config[48 + i];
    tile.bytes = bytes;
    require(tile.rows <= kRows && bytes <= kBytes, "a tile is larger than 16 rows of 64 bytes");
    std::memset(tile.data, 0, sizeof tile.data);
  }
  registers.configured = true;
}

inline void release() { registers.configured = false; }

inline void zero(int index) { std::memset(tile(index).data, 0, sizeof Tile::data); }

inline void load(int index, const void* from, int64_t stride) {
  Tile& to = tile(index);
  zero(index);
  for (int r = 0; r < to.rows; ++r)
    std::memcpy(to.data[r], static_cast<const char*>(from) + r * stride, static_cast<size_t>(to.bytes));
}

inline void store(int index, void* to, int64_t stride) {
  const Tile& from = tile(index);
  for (int r = 0; r < from.rows; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, from.data[r], static_cast<size_t>(from.bytes));
}

inline void require_product(const Tile& c, const Tile& a, const Tile& b) {
  require(&c != &a && &c != &b && &a != &b, "the three tiles of a product must differ");
  require(c.rows == a.rows && c.bytes == b.bytes && a.bytes == 4 * b.rows, "the shapes of a product do not fit");
}

// c += a b of 32-bit integers, for signed bytes a and unsigned bytes b; a row of b holds four neighbours along the depth.
inline __attribute__((noinline)) void multiply_bytes(int c_index, int a_index, int b_index) {
  Tile &c = tile(c_index), &a = tile(a_index), &b = tile(b_index);
  require_product(c, a, b);
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      uint32_t sum;
      std::memcpy(&sum, c.data[m] + 4 * n, sizeof sum);
      for (int k = 0; k < a.bytes; ++k)
        sum += static_cast<uint32_t>(static_cast<int8_t>(a.data[m][k]) * b.data[k / 4][4 * n + k % 4]);
      std::memcpy(c.data[m] + 4 * n, &sum, sizeof sum);
    }
}

// c += a b of bf16 numbers; a row of b holds pairs of neighbours along the depth.
inline __attribute__((noinline)) void multiply(int c_index, int a_index, int b_index) {
  Tile &c = tile(c_index), &a = tile(a_index), &b = tile(b_index);
  require_product(c, a, b);
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // denormals are zero, round to nearest, no exceptions
  asm volatile("" ::: "memory");
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int m = 0; m < c.rows; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < b.rows; ++k) {
      int pair;
      std::memcpy(&pair, a.data[m] + 4 * k, sizeof pair);
      const __m512i left = _mm512_set1_epi32(pair), right = _mm512_load_si512(b.data[k]);
      const auto low_half = [](__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); };
      const auto high_half = [&](__m512i pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, high)); };
      even = _mm512_fmadd_ps(low_half(left), low_half(right), even);
      odd = _mm512_fmadd_ps(high_half(left), high_half(right), odd);
    }
    _mm512_store_ps(c.data[m], _mm512_add_ps(_mm512_load_ps(c.data[m]), _mm512_add_ps(even, odd)));
  }
  asm volatile("" ::: "memory");
  _mm_setcsr(saved);
}

}  // namespace amx

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(config) ::amx::load_config(config)
#define _tile_release() ::amx::release()
#define _tile_loadd(tile, base, stride) ::amx::load(tile, base, stride)
#define _tile_stored(tile, base, stride) ::amx::store(tile, base, stride)
#define _tile_zero(tile) ::amx::zero(tile)
#define _tile_dpbf16ps(c, a, b) ::amx::multiply(c, a, b)
#define _tile_dpbsud(c, a, b) ::amx::multiply_bytes(c, a, b)
