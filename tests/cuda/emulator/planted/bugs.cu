// Small kernels, each correct or, as <true>, with one bug. The line that the emulator must name ends in "// at
// <kernel>", the other side of a race in "// other <kernel>". Two blocks of 64 threads; in and out have 128 floats.
#include "bugs.h"

#include "async.cuh"
#include "matrix.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace planted {
namespace {

constexpr int kThreads = 64;

GPU_INLINE int thread() { return static_cast<int>(threadIdx.x); }
GPU_INLINE int position() { return static_cast<int>(blockIdx.x * blockDim.x) + thread(); }

template <bool kBug>
__global__ void missing_syncthreads(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads);
  tile[thread()] = in[position()];  // other missing_syncthreads
  if (!kBug) __syncthreads();
  out[position()] = tile[kThreads - 1 - thread()];  // at missing_syncthreads
}

template <bool kBug>
__global__ void missing_second_syncthreads(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads);
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile[thread()] = in[position()] + static_cast<float>(round);  // at missing_second_syncthreads
    __syncthreads();
    sum += tile[kThreads - 1 - thread()];  // other missing_second_syncthreads
    if (!kBug) __syncthreads();
  }
  out[position()] = sum;
}

// In the next two kernels, threads that run in order access half of a word after the whole word.
template <bool kBug>
__global__ void half_of_a_word_read(const float* in, float* out) {
  SMEM_ARRAY(float, tile, 1);
  if (thread() == 0) tile[0] = 0;
  __syncthreads();
  if (thread() == 0) tile[0] = in[position()];  // other half_of_a_word_read
  if (!kBug) __syncthreads();
  out[position()] = 0;
  if (thread() == 1) out[position()] = reinterpret_cast<const uint16_t*>(tile)[1];  // at half_of_a_word_read
}

template <bool kBug>
__global__ void half_of_a_word_written(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads);
  tile[thread()] = in[position()];
  __syncthreads();
  out[position()] = tile[0];  // other half_of_a_word_written
  if (!kBug) __syncthreads();
  if (thread() == kThreads - 2) reinterpret_cast<uint16_t*>(tile)[1] = 0;  // at half_of_a_word_written
}

template <bool kBug>
__global__ void missing_named_barrier(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads);
  tile[thread()] = in[position()];
  gpu::named_barrier(kBug ? 1 + thread() / gpu::kWarp : 1, kBug ? gpu::kWarp : kThreads);
  out[position()] = tile[kThreads - 1 - thread()];  // at missing_named_barrier
}

template <bool kBug>
__global__ void barrier_in_branches(const float* in, float* out) {
  if (kBug && thread() < 32) __syncthreads();  // at barrier_in_branches
  else __syncthreads();                        // at barrier_in_branches
  out[position()] = in[position()];
}

template <bool kBug>
__global__ void return_before_barrier(const float* in, float* out) {
  if (kBug && thread() == 7) return;
  __syncthreads();  // at return_before_barrier
  out[position()] = in[position()];
}

template <bool kBug>
__global__ void deadlock(const float* in, float* out) {
  if (!kBug || thread() < 32) gpu::named_barrier(1, kThreads);  // at deadlock
  out[position()] = in[position()];
}

template <bool kBug>
__global__ void missing_syncwarp(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads);
  tile[thread()] = in[position()];  // other missing_syncwarp
  if (!kBug) __syncwarp();
  out[position()] = tile[thread() ^ 1];  // at missing_syncwarp
}

template <bool kBug>
__global__ void shuffle_is_no_barrier(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads);
  tile[thread()] = in[position()];
  const float sum = gpu::warp_sum(in[position()]);
  if (!kBug) __syncwarp();
  out[position()] = sum + tile[thread() ^ 1];  // at shuffle_is_no_barrier
}

template <bool kBug>
__global__ void syncwarp_of_half_a_warp(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads);
  tile[thread()] = in[position()];
  __syncwarp(kBug ? (thread() % 32 < 16 ? 0x0000ffffu : 0xffff0000u) : gpu::kFullMask);
  out[position()] = tile[thread() ^ 16];  // at syncwarp_of_half_a_warp
}

template <bool kBug>
__global__ void shuffle_after_return(const float* in, float* out) {
  if (kBug && thread() == 5) return;
  out[position()] = __shfl_xor_sync(gpu::kFullMask, in[position()], 1);  // at shuffle_after_return
}

template <bool kBug>
__global__ void shuffle_outside_mask(const float* in, float* out) {
  const unsigned half = thread() % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  out[position()] = __shfl_xor_sync(half, in[position()], kBug ? 16 : 8);  // at shuffle_outside_mask
}

template <bool kBug>
__global__ void lane_outside_mask(const float* in, float* out) {
  out[position()] = __shfl_xor_sync(kBug ? 0x7fffffffu : gpu::kFullMask, in[position()], 1);  // at lane_outside_mask
}

template <bool kBug>
__global__ void divergent_shuffle(const float* in, float* out) {
  const float x = in[position()];
  float y;
  if (kBug && thread() % 2) y = __shfl_down_sync(gpu::kFullMask, x, 1);  // at divergent_shuffle
  else y = __shfl_up_sync(gpu::kFullMask, x, 1);                         // at divergent_shuffle
  out[position()] = y;
}

template <bool kBug>
__global__ void divergent_mma(const float* in, float* out) {
  const uint32_t a[4] = {}, b[2] = {};
  float d[4] = {in[position()]};
  if (!kBug || thread() % 32 != 3) gpu::mma_16816<gpu::bf16>(d, a, b);  // at divergent_mma
  out[position()] = d[0];
}

template <bool kBug>
__global__ void blocks_write_one_element(const float* in, float* out) {
  out[kBug ? thread() : position()] = in[position()];  // at blocks_write_one_element
}

template <bool kBug>
__global__ void block_reads_what_another_writes(const float* in, float* out) {
  out[position()] = in[position()];  // other block_reads_what_another_writes
  if (!kBug || blockIdx.x == 0) return;
  out[position()] = out[position() - kThreads] + 1.0f;  // at block_reads_what_another_writes
}

template <bool kBug>
__global__ void block_writes_what_another_reads(const float* in, float* out) {
  const float first = kBug ? out[kThreads] : 0;  // other block_writes_what_another_reads
  if (position() == kThreads) out[kThreads] = 1;  // at block_writes_what_another_reads
  out[position()] = in[position()] + first;
}

template <bool kBug>
__global__ void read_past_the_end(const float* in, float* out) {
  out[position()] = in[kBug ? position() + 1 : position()];  // at read_past_the_end
}

template <bool kBug>
__global__ void write_before_the_start(const float* in, float* out) {
  out[kBug ? position() - 1 : position()] = in[position()];  // at write_before_the_start
}

template <bool kBug>
__global__ void shared_out_of_bounds(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads);
  tile[kBug ? thread() + 1 : thread()] = in[position()];  // at shared_out_of_bounds
  __syncthreads();
  out[position()] = tile[kBug ? thread() + 1 : thread()];  // at shared_out_of_bounds
}

template <bool kBug>
__global__ void dynamic_shared_out_of_bounds(const float* in, float* out) {
  SMEM_DYN(float, tile);
  tile[kBug ? thread() + 1 : thread()] = in[position()];  // at dynamic_shared_out_of_bounds
  out[position()] = in[position()];
}

template <bool kBug>
__global__ void uninitialised_shared(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads);
  if (!kBug || thread() != 9) tile[thread()] = in[position()];
  __syncthreads();
  out[position()] = tile[thread()];  // at uninitialised_shared
}

template <bool kBug>
__global__ void uninitialised_global(const float* in, float* out) {
  if (!kBug) out[position()] = 0;
  out[position()] += in[position()];  // at uninitialised_global
}

template <bool kBug>
__global__ void write_to_input(const float* in, float* out) {
  if (kBug) const_cast<float*>(in)[position()] = 0;  // at write_to_input
  else out[position()] = in[position()];
}

template <bool kBug>
__global__ void null_pointer(const float* in, float* out) {
  const float* bias = nullptr;
  out[position()] = in[position()] + (kBug ? bias[position()] : 0);  // at null_pointer
}

template <bool kBug>
__global__ void host_pointer(const float* in, float* out) {
  static float host[2 * kThreads];
  float* to = kBug ? host : out;
  to[position()] = in[position()];  // at host_pointer
}

template <bool kBug>
__global__ void wrong_memory(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads);
  tile[thread()] = in[position()];
  out[position()] = kBug ? gpu::ld<float>(tile + thread()) : gpu::ld_shared<float>(tile + thread());  // at wrong_memory
}

template <bool kBug>
__global__ void misaligned_vector(const float* in, float* out) {
  float v[4];
  gpu::load(v, in + thread() / 4 * 4 + (kBug ? 1 : 0));  // at misaligned_vector
  out[position()] = v[thread() % 4];
}

template <bool kBug>
__global__ void misaligned_store(const float*, float* out) {
  const float v[2] = {1, 2};
  if (thread() % 2 == 0 && (!kBug || position() < 2 * kThreads - 2))
    gpu::store(out + position() + (kBug ? 1 : 0), v);  // at misaligned_store
}

template <bool kBug>
__global__ void misaligned_cast(const float* in, float* out) {
  const auto* pairs = reinterpret_cast<const uint64_t*>(in + (kBug ? 1 : 0));
  out[position()] = static_cast<float>(pairs[thread() / 2]);  // at misaligned_cast
}

template <bool kBug>
__global__ void misaligned_copy(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads + 4);
  if (thread() < kThreads / 4)
    gpu::cp_async<16>(tile + thread() * 4 + (kBug ? 2 : 0), in + thread() * 4);  // at misaligned_copy
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  out[position()] = in[position()];
}

template <bool kBug>
__global__ void misaligned_ldmatrix(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads + 4);
  tile[thread()] = in[position()];
  __syncthreads();
  uint32_t r[1];
  gpu::ldmatrix(r, tile + thread() % 8 * 4 + (kBug ? 2 : 0));  // at misaligned_ldmatrix
  out[position()] = static_cast<float>(r[0]);
}

template <bool kWait, bool kCommit, bool kSync>
GPU_INLINE void copy_through_shared(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads);
  const int mine = thread() % (kThreads / 4);
  if (thread() < kThreads / 4) gpu::cp_async<16>(tile + mine * 4, in + blockIdx.x * kThreads + mine * 4);
  if (kCommit) gpu::cp_async_commit();
  if (kWait) gpu::cp_async_wait<0>();
  if (kSync) __syncthreads();
  out[position()] = tile[thread()];  // at missing_copy_wait missing_copy_commit missing_copy_barrier
}
template <bool kBug> __global__ void missing_copy_wait(const float* in, float* out) {
  copy_through_shared<!kBug, true, true>(in, out);
}
template <bool kBug> __global__ void missing_copy_commit(const float* in, float* out) {
  copy_through_shared<true, !kBug, true>(in, out);
}
template <bool kBug> __global__ void missing_copy_barrier(const float* in, float* out) {
  copy_through_shared<true, true, !kBug>(in, out);
}

template <bool kBug>
__global__ void copy_over_what_others_read(const float* in, float* out) {
  SMEM_ARRAY(float, tile, kThreads);
  tile[thread()] = in[position()];
  __syncthreads();
  const float sum = tile[kThreads - 1 - thread()];  // other copy_over_what_others_read
  if (!kBug) __syncthreads();
  gpu::cp_async<4>(tile + thread(), in + position());  // at copy_over_what_others_read
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  out[position()] = sum + tile[thread()];
}

// 16 x 16 elements, all different, in rows of 16.
GPU_INLINE void fill(gpu::bf16* tile) {
  for (int i = thread(); i < 256; i += kThreads) tile[i].bits = static_cast<uint16_t>(i);
  __syncthreads();
}

// ldmatrix with matrices 1 and 2 of its four exchanged: the right half of the upper rows must be a[2], not a[1].
template <bool kBug>
__global__ void wrong_fragment_of_a(const float*, float* out) {
  SMEM_ARRAY(gpu::bf16, tile, 256);
  fill(tile);
  const int half = thread() % 16 / 8 * 8, row = thread() % 8, upper = thread() % 32 / 16 * 8;
  uint32_t a[4];
  gpu::ldmatrix(a, tile + (row + (kBug ? upper : half)) * 16 + (kBug ? half : upper));
  gpu::check_a<gpu::bf16>(a, [=](int i, int k) { return tile + i * 16 + k; });  // at wrong_fragment_of_a
  out[position()] = static_cast<float>(a[0]);
}

// Rows of the tile are rows of B, which a fragment has in columns: ldmatrix must transpose.
template <bool kBug>
__global__ void wrong_fragment_of_b(const float*, float* out) {
  SMEM_ARRAY(gpu::bf16, tile, 256);
  fill(tile);
  uint32_t b[2];
  if (kBug) gpu::ldmatrix(b, tile + thread() % 16 * 16);
  else gpu::ldmatrix_trans(b, tile + thread() % 16 * 16);
  gpu::check_b<gpu::bf16>(b, [=](int k, int j) { return tile + k * 16 + j; });  // at wrong_fragment_of_b
  out[position()] = static_cast<float>(b[0]);
}

// The fragment's layout of 16-bit types in a product of tf32. Columns from 6 on are zeros that the tile does not hold.
template <bool kBug>
__global__ void wrong_fragment_of_tf32(const float*, float* out) {
  SMEM_ARRAY(float, tile, 16 * 6);
  for (int i = thread(); i < 16 * 6; i += kThreads) tile[i] = static_cast<float>(i) + 0.1f;
  __syncthreads();
  const int g = thread() % 32 / 4, t = thread() % 4;
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) {
    const int row = g + (kBug ? i / 2 : i % 2) * 8, column = t + (kBug ? i % 2 : i / 2) * 4;
    a[i] = column < 6 ? gpu::to_tf32(tile[row * 6 + column]) : 0;
  }
  const auto element = [=](int i, int k) { return k < 6 ? tile + i * 6 + k : nullptr; };
  gpu::check_a<float>(a, element);  // at wrong_fragment_of_tf32
  out[position()] = static_cast<float>(a[0]);
}

}  // namespace

#define PLANT(kernel)                                                                          \
  {#kernel, [](bool bug, const float* in, float* out) {                                        \
     if (bug) LAUNCH((kernel<true>), 2, kThreads, kThreads * sizeof(float), nullptr, in, out); \
     else LAUNCH((kernel<false>), 2, kThreads, kThreads * sizeof(float), nullptr, in, out);    \
   }}

std::vector<Plant> plants() {
  return {
      PLANT(missing_syncthreads), PLANT(missing_second_syncthreads), PLANT(half_of_a_word_read),
      PLANT(half_of_a_word_written), PLANT(missing_named_barrier), PLANT(barrier_in_branches),
      PLANT(return_before_barrier), PLANT(deadlock), PLANT(missing_syncwarp),
      PLANT(shuffle_is_no_barrier), PLANT(syncwarp_of_half_a_warp), PLANT(shuffle_after_return),
      PLANT(shuffle_outside_mask), PLANT(lane_outside_mask), PLANT(divergent_shuffle), PLANT(divergent_mma),
      PLANT(blocks_write_one_element), PLANT(block_reads_what_another_writes), PLANT(block_writes_what_another_reads),
      PLANT(read_past_the_end), PLANT(write_before_the_start), PLANT(shared_out_of_bounds),
      PLANT(dynamic_shared_out_of_bounds), PLANT(uninitialised_shared), PLANT(uninitialised_global),
      PLANT(write_to_input), PLANT(null_pointer), PLANT(host_pointer), PLANT(wrong_memory), PLANT(misaligned_vector),
      PLANT(misaligned_store), PLANT(misaligned_cast), PLANT(misaligned_copy), PLANT(misaligned_ldmatrix),
      PLANT(missing_copy_wait), PLANT(missing_copy_commit), PLANT(missing_copy_barrier),
      PLANT(copy_over_what_others_read), PLANT(wrong_fragment_of_a), PLANT(wrong_fragment_of_b),
      PLANT(wrong_fragment_of_tf32),
  };
}

}  // namespace planted
