// Kernels of the emulator's own tests.
#pragma once

#include <cstdint>
#include <vector>

namespace planted {

struct Plant {
  const char* name;
  void (*launch)(bool bug, const float* in, float* out);
};
std::vector<Plant> plants();
std::vector<Plant> overruns();  // found only by the sanitized build

// Wrappers of cuda/common in one warp; registers of lanes are arguments and results: (32, registers) uint32.
enum class Product : int { bf16, fp16, tf32 };
void run_mma(Product product, const uint32_t* a, const uint32_t* b, const float* c, float* d);
// rows: (count * 8, 8) 16-bit elements, one row after another in shared memory.
void run_ldmatrix(int count, bool transposed, const uint16_t* rows, uint32_t* registers);
// 32 lanes copy `bytes` each, the last lane only `valid`, then zeros.
void run_cp_async(int bytes, int valid, const char* from, char* to);
// (n) float -> bf16, fp16, tf32 bits, and 16-bit bits -> float
void run_narrow(const float* x, uint16_t* bf16, uint16_t* fp16, uint32_t* packed_bf16, uint32_t* packed_fp16,
                uint32_t* tf32, int n);
void run_widen(const uint16_t* bits, float* bf16, float* fp16, int n);
// (n, 4) counters -> (n, 4) random words
void run_philox(const uint32_t* counters, uint64_t seed, uint32_t* words, int n);
// A tile (rows, width) filled from `from` (rows, valid), without row `missing`.
void run_tile_load(bool whole, const uint16_t* from, uint16_t* to, int rows, int width, int valid, int missing);
// Fragments of a tile (32, 128) at (row, column): (32, 4) registers.
enum class Fragment : int { a, a_trans, b, b_trans };
void run_tile_fragment(Fragment fragment, const uint16_t* tile, int row, int column, uint32_t* registers);
// D (32, 4) at (row, column) of a tile (32, 64) of zeros; and A (32, 4) made of D and -D.
void run_tile_store(const float* d, int row, int column, uint16_t* tile, uint32_t* a);
// (blocks, threads) float -> results of each thread.
void run_reduce(const float* x, float* block_sums, float* warp_sums, float* warp_maxima, int blocks, int threads);
// out[i] = in[i * stride], 1024 floats in vectors of `width`.
void run_strided_copy(const float* in, float* out, int stride, int width);
// Transposes (32, 32) floats through shared memory with rows `pitch` apart.
void run_shared_columns(const float* in, float* out, int pitch);

// Fills (threads) floats with 1, by a kernel for blocks of at most 64 threads or a template for at most 96.
void run_bounded(float* out, int threads, bool as_template);

}  // namespace planted
