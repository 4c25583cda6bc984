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

// The wrappers of cuda/common, one warp, with each lane's registers given and returned: (32, registers) uint32.
enum class Product : int { bf16, fp16, tf32 };
void run_mma(Product product, const uint32_t* a, const uint32_t* b, const float* c, float* d);
// rows: (count * 8, 8) 16-bit elements, one row after another in shared memory.
void run_ldmatrix(int count, bool transposed, const uint16_t* rows, uint32_t* registers);
// 32 lanes copy `bytes` each, the last of them `valid` and zeros.
void run_cp_async(int bytes, int valid, const char* from, char* to);
// (n) float -> bf16, fp16, tf32 bits, and 16-bit bits -> float
void run_narrow(const float* x, uint16_t* bf16, uint16_t* fp16, uint32_t* packed_bf16, uint32_t* packed_fp16,
                uint32_t* tf32, int n);
void run_widen(const uint16_t* bits, float* bf16, float* fp16, int n);
// (blocks, threads) float -> what each thread gets.
void run_reduce(const float* x, float* block_sums, float* warp_sums, float* warp_maxima, int blocks, int threads);
// out[i] = in[i * stride], 1024 floats in vectors of `width`.
void run_strided_copy(const float* in, float* out, int stride, int width);
// Transposes (32, 32) floats through shared memory with rows `pitch` apart.
void run_shared_columns(const float* in, float* out, int pitch);

}  // namespace planted
