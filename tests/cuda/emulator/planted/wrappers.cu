// Wrappers of cuda/common, each in a kernel of its own that takes and returns the lanes' registers.
#include "bugs.h"

#include "async.cuh"
#include "matrix.cuh"
#include "philox.cuh"
#include "reduce.cuh"
#include "tile.cuh"
#include "vec.cuh"

namespace planted {
namespace {

template <Product product>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  uint32_t x[4], y[2];
  float z[4];
  for (int i = 0; i < 4; ++i) x[i] = a[threadIdx.x * 4 + i];
  for (int i = 0; i < 4; ++i) z[i] = c[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) y[i] = b[threadIdx.x * 2 + i];
  if constexpr (product == Product::tf32) gpu::mma_1688_tf32(z, x, y);
  else if constexpr (product == Product::bf16) gpu::mma_16816<gpu::bf16>(z, x, y);
  else gpu::mma_16816<gpu::fp16>(z, x, y);
  for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = z[i];
}

template <int kCount, bool kTransposed>
__global__ void ldmatrix_kernel(const uint16_t* rows, uint32_t* registers) {
  SMEM_ARRAY(uint16_t, tile, kCount * 64);
  for (int i = threadIdx.x; i < kCount * 64; i += 32) tile[i] = rows[i];
  __syncthreads();
  uint32_t r[kCount];
  const uint16_t* row = tile + threadIdx.x % (kCount * 8) * 8;
  if constexpr (kTransposed) gpu::ldmatrix_trans(r, row);
  else gpu::ldmatrix(r, row);
  for (int i = 0; i < kCount; ++i) registers[threadIdx.x * kCount + i] = r[i];
}

template <int kBytes>
__global__ void cp_async_kernel(const char* from, char* to, int valid) {
  SMEM_DYN(char, tile);
  const int at = threadIdx.x * kBytes;
  gpu::cp_async<kBytes>(tile + at, from + at, threadIdx.x == blockDim.x - 1 ? valid : kBytes);
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  for (int i = 0; i < kBytes; ++i) to[at + i] = tile[at + i];
}

__global__ void narrow_kernel(const float* x, uint16_t* bf16, uint16_t* fp16, uint32_t* packed_bf16,
                              uint32_t* packed_fp16, uint32_t* tf32, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  bf16[i] = gpu::from_real<gpu::bf16>(x[i]).bits;
  fp16[i] = gpu::from_real<gpu::fp16>(x[i]).bits;
  packed_bf16[i] = gpu::pack2<gpu::bf16>(x[i], 1.0f);
  packed_fp16[i] = gpu::pack2<gpu::fp16>(x[i], 1.0f);
  tf32[i] = gpu::to_tf32(x[i]);
}

__global__ void widen_kernel(const uint16_t* bits, float* bf16, float* fp16, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  bf16[i] = gpu::to_real(gpu::bf16{bits[i]});
  fp16[i] = gpu::to_real(gpu::fp16{bits[i]});
}

__global__ void reduce_kernel(const float* x, float* block_sums, float* warp_sums, float* warp_maxima) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  block_sums[i] = gpu::block_sum(x[i]) + gpu::block_sum(0.0f);
  warp_sums[i] = gpu::warp_sum(x[i]);
  warp_maxima[i] = gpu::warp_max(x[i]);
}

__global__ void philox_kernel(const uint32_t* counters, uint64_t seed, uint32_t* words, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint32_t word[4];
  for (int j = 0; j < 4; ++j) word[j] = counters[i * 4 + j];
  gpu::philox(word, seed);
  for (int j = 0; j < 4; ++j) words[i * 4 + j] = word[j];
}

using Tile = gpu::Tile<gpu::bf16>;

GPU_INLINE void copy_tile(const Tile& tile, int rows, int width, uint16_t* to) {
  for (int i = threadIdx.x; i < rows * width; i += blockDim.x)
    to[i] = tile.unit(i / width, i % width / 8 * 8)[i % 8].bits;
}

template <bool kWhole>
__global__ void tile_load_kernel(const gpu::bf16* from, uint16_t* to, int rows, int width, int valid, int missing) {
  SMEM_DYN(gpu::bf16, data);
  const Tile tile(data, width);
  tile.load<kWhole>(rows, width, valid, [=](int r) { return r == missing ? nullptr : from + r * valid; });
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  __syncthreads();
  copy_tile(tile, rows, width, to);
}

__global__ void tile_fragment_kernel(Fragment fragment, const gpu::bf16* from, int row, int column,
                                     uint32_t* registers) {
  SMEM_ARRAY(gpu::bf16, data, 32 * 128);
  const Tile whole(data, 128), tile = whole.from(column / 64 * 64);
  whole.load<false>(32, 128, 128, [=](int r) { return from + r * 128; });
  column %= 64;
  __syncthreads();
  uint32_t r[4], b[2][2];
  if (fragment == Fragment::a) tile.load_a(r, row, column);
  if (fragment == Fragment::a_trans) tile.load_a_trans(r, row, column);
  if (fragment == Fragment::b) tile.load_b(b, row, column);
  if (fragment == Fragment::b_trans) tile.load_b_trans(b, row, column);
  const bool two = fragment == Fragment::b || fragment == Fragment::b_trans;
  for (int i = 0; i < 4; ++i) registers[threadIdx.x * 4 + i] = two ? b[i / 2][i % 2] : r[i];
}

__global__ void tile_store_kernel(const float* from, int row, int column, uint16_t* to, uint32_t* registers) {
  SMEM_ARRAY(gpu::bf16, data, 32 * 64);
  const Tile tile(data, 64);
  for (int i = threadIdx.x; i < 32 * 64; i += blockDim.x) data[i] = gpu::bf16{0};
  __syncwarp();
  float d[4], minus[4];
  for (int i = 0; i < 4; ++i) d[i] = from[threadIdx.x * 4 + i];
  for (int i = 0; i < 4; ++i) minus[i] = -d[i];
  tile.store_d(d, row, column);
  __syncwarp();
  copy_tile(tile, 32, 64, to);
  uint32_t a[4];
  gpu::to_a<gpu::bf16>(a, d, minus);
  for (int i = 0; i < 4; ++i) registers[threadIdx.x * 4 + i] = a[i];
}

template <int kWidth>
__global__ void strided_copy_kernel(const float* in, float* out, int stride) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * kWidth;
  float v[kWidth];
  gpu::load(v, in + i * stride);
  gpu::store(out + i, v);
}

__global__ void shared_columns_kernel(const float* in, float* out, int pitch) {
  SMEM_DYN(float, tile);
  for (int row = 0; row < 32; ++row) tile[row * pitch + threadIdx.x] = in[row * 32 + threadIdx.x];
  __syncwarp();
  for (int column = 0; column < 32; ++column) out[column * 32 + threadIdx.x] = tile[threadIdx.x * pitch + column];
}

__global__ void __launch_bounds__(64) bounded_kernel(float* out) { out[threadIdx.x] = 1; }

template <int kWarps>
__global__ void __launch_bounds__(kWarps* gpu::kWarp, 2) bounded_template_kernel(float* out) {
  out[threadIdx.x] = 1;
}

template <int kCount>
void launch_ldmatrix(bool transposed, const uint16_t* rows, uint32_t* registers) {
  if (transposed) LAUNCH((ldmatrix_kernel<kCount, true>), 1, 32, 0, nullptr, rows, registers);
  else LAUNCH((ldmatrix_kernel<kCount, false>), 1, 32, 0, nullptr, rows, registers);
}

}  // namespace

void run_mma(Product product, const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  if (product == Product::bf16) LAUNCH(mma_kernel<Product::bf16>, 1, 32, 0, nullptr, a, b, c, d);
  if (product == Product::fp16) LAUNCH(mma_kernel<Product::fp16>, 1, 32, 0, nullptr, a, b, c, d);
  if (product == Product::tf32) LAUNCH(mma_kernel<Product::tf32>, 1, 32, 0, nullptr, a, b, c, d);
}

void run_ldmatrix(int count, bool transposed, const uint16_t* rows, uint32_t* registers) {
  if (count == 1) launch_ldmatrix<1>(transposed, rows, registers);
  if (count == 2) launch_ldmatrix<2>(transposed, rows, registers);
  if (count == 4) launch_ldmatrix<4>(transposed, rows, registers);
}

void run_cp_async(int bytes, int valid, const char* from, char* to) {
  if (bytes == 4) LAUNCH(cp_async_kernel<4>, 1, 32, 32 * 4, nullptr, from, to, valid);
  if (bytes == 8) LAUNCH(cp_async_kernel<8>, 1, 32, 32 * 8, nullptr, from, to, valid);
  if (bytes == 16) LAUNCH(cp_async_kernel<16>, 1, 32, 32 * 16, nullptr, from, to, valid);
}

void run_narrow(const float* x, uint16_t* bf16, uint16_t* fp16, uint32_t* packed_bf16, uint32_t* packed_fp16,
                uint32_t* tf32, int n) {
  LAUNCH(narrow_kernel, (n + 127) / 128, 128, 0, nullptr, x, bf16, fp16, packed_bf16, packed_fp16, tf32, n);
}

void run_widen(const uint16_t* bits, float* bf16, float* fp16, int n) {
  LAUNCH(widen_kernel, (n + 127) / 128, 128, 0, nullptr, bits, bf16, fp16, n);
}

void run_reduce(const float* x, float* block_sums, float* warp_sums, float* warp_maxima, int blocks, int threads) {
  LAUNCH(reduce_kernel, blocks, threads, 0, nullptr, x, block_sums, warp_sums, warp_maxima);
}

void run_philox(const uint32_t* counters, uint64_t seed, uint32_t* words, int n) {
  LAUNCH(philox_kernel, (n + 127) / 128, 128, 0, nullptr, counters, seed, words, n);
}

void run_tile_load(bool whole, const uint16_t* from, uint16_t* to, int rows, int width, int valid, int missing) {
  const auto* rows_of = reinterpret_cast<const gpu::bf16*>(from);
  const size_t bytes = size_t{2} * rows * Tile::pitch(width);
  if (whole) LAUNCH(tile_load_kernel<true>, 1, 64, bytes, nullptr, rows_of, to, rows, width, valid, missing);
  else LAUNCH(tile_load_kernel<false>, 1, 64, bytes, nullptr, rows_of, to, rows, width, valid, missing);
}

void run_tile_fragment(Fragment fragment, const uint16_t* tile, int row, int column, uint32_t* registers) {
  LAUNCH(tile_fragment_kernel, 1, 32, 0, nullptr, fragment, reinterpret_cast<const gpu::bf16*>(tile), row, column,
         registers);
}

void run_tile_store(const float* d, int row, int column, uint16_t* tile, uint32_t* a) {
  LAUNCH(tile_store_kernel, 1, 32, 0, nullptr, d, row, column, tile, a);
}

void run_strided_copy(const float* in, float* out, int stride, int width) {
  if (width == 1) LAUNCH(strided_copy_kernel<1>, 1024 / 128, 128, 0, nullptr, in, out, stride);
  if (width == 4) LAUNCH(strided_copy_kernel<4>, 1024 / 4 / 128, 128, 0, nullptr, in, out, stride);
}

void run_shared_columns(const float* in, float* out, int pitch) {
  LAUNCH(shared_columns_kernel, 1, 32, 32 * pitch * sizeof(float), nullptr, in, out, pitch);
}

void run_bounded(float* out, int threads, bool as_template) {
  if (as_template) LAUNCH(bounded_template_kernel<3>, 1, threads, 0, nullptr, out);
  else LAUNCH(bounded_kernel, 1, threads, 0, nullptr, out);
}

// For widened.py, which finds the lines that end in "found". A warp's number is small; a comparison limits `column`.
struct Rows {
  int first, warp;
  int64_t channels, tokens;
};
const float* multiple_of_a_size(const float* p, const Rows& rows) { return p + (rows.first + 1) * 128; }  // found
const float* multiple_of_a_warp(const float* p, const Rows& rows) { return p + rows.warp * 128; }
const float* cut(const float* p, const Rows& rows) { return p + (static_cast<int>(rows.tokens) + 1); }  // found
const float* cut_remainder(const float* p, const Rows& rows) { return p + static_cast<int>(rows.tokens % 128); }
const float* loops(const float* p, const Rows& rows) {
  int row = 0, column = 0;
  for (int i = 0; i < rows.tokens; ++i) row += static_cast<int>(rows.channels);  // found
  while (column < rows.warp) column += rows.first;
  p += column;
  return p + row;  // found
}

}  // namespace planted
