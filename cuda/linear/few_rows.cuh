// Products of few rows, and what follows them in a layer: y = silu(x weight^T + bias) value + add.
// Launched by few_rows.cu.
//
//   x (T, I), weight (O, I), bias (O), value, add, y (T, O):  the call's dtype
//
// Sums and all that follows them are R, float or double; y is rounded once.
//
// Grid: blocks x groups of kMostRows rows of x. A warp computes a column of y for the rows of its group, from one row of the
// weights. If there are few columns, all warps of a block share one (`shared`).
// Phases:
//   1. A lane takes the vectors lane, lane + 32, ... of the row of the weights; if the block shares the row, those of its
//      thread. It loads kAhead vectors at once, then those of each row of x.
//   2. The sums are added over the warp, and over the block if it shares the row.
//   3. Lane t computes y of row t of the group.
//
// Vectors are 16 bytes if alignment and I allow it; otherwise they are single elements.
// Shared memory: at most 256 bytes. Registers: at most 104 for one row, 128 for more; no spills.
// Bytes: the weights once for each group, the minimum for up to 8 rows. x comes from L1: T vectors for each vector of the
// weights. With 8 rows, L1 takes as long as HBM (H100: 128 bytes a clock for each multiprocessor, 3.3 TB/s of weights).
// H100, mega200M's wr (O 2048, I 1024) in bf16, one row: 4.2 MB, 1.3 us at 3.35 TB/s.
// Example: I = 1024 in bf16 are 128 vectors of 8: four for each lane.
#pragma once

#include "few_rows.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace megalodon {
namespace linear {

constexpr int kMostRows = 8, kWarps = 4, kThreads = kWarps * gpu::kWarp;
constexpr int kLeastBlocks = 4;         // of a multiprocessor, which leaves 128 registers
constexpr int kAhead = 4;               // vectors of the weights that a lane loads together
constexpr int64_t kSharedBelow = 2048;  // fewer columns: blocks share rows of the weights

// Returns y of a row of x and a column, from its sum.
template <class T, class R = Compute<T>>
GPU_INLINE T finished(const LinearFewRowsParams& p, int64_t row, int64_t column, R y) {
  const int64_t at = row * p.outputs + column;
  const auto element = [](const void* tensor, int64_t i) { return gpu::to_real(static_cast<const T*>(tensor)[i]); };
  if (p.bias) y += element(p.bias, column);
  if (p.silu) y /= 1 + exp(-y);
  if (p.value) y *= element(p.value, at);
  if (p.add) y += element(p.add, at);
  return gpu::from_real<T>(y);
}

// n: elements of a vector; kRows: rows of a group.
template <class T, int n, int kRows>
__global__ void __launch_bounds__(kThreads, kLeastBlocks) linear_few_rows_kernel(LinearFewRowsParams p, bool shared) {
  using R = Compute<T>;
  using Vector = gpu::Pack<T, n>;
  SMEM_ARRAY(R, partial, kRows* kWarps);
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  const int64_t column = shared ? int64_t{blockIdx.x} : int64_t{blockIdx.x} * kWarps + warp;
  const bool live = column < p.outputs;
  const int64_t group = int64_t{blockIdx.y} * kRows;
  const int rows = p.rows - group < kRows ? static_cast<int>(p.rows - group) : kRows;
  const int64_t start = int64_t{shared ? static_cast<int>(threadIdx.x) : lane} * n;
  const int64_t step = int64_t{shared ? kThreads : gpu::kWarp} * n;
  const T* const weight = static_cast<const T*>(p.weight) + column * p.inputs;
  R sums[kRows] = {};
  for (int64_t first = start; live && first < p.inputs; first += kAhead * step) {
    Vector w[kAhead], x[kAhead];
    const auto load = [&](Vector(&to)[kAhead], const T* from) {
      GPU_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        const int64_t i = first + a * step;
        to[a] = i < p.inputs ? gpu::ld<Vector>(from + i) : Vector{};
      }
    };
    load(w, weight);
    GPU_UNROLL
    for (int row = 0; row < kRows; ++row) {
      if (row >= rows) break;
      load(x, static_cast<const T*>(p.x) + (group + row) * p.inputs);
      R even = 0, odd = 0;  // two sums, so that an addition need not wait for the one before it
      GPU_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        GPU_UNROLL
        for (int e = 0; e < n; ++e) {
          const R product = gpu::to_real(x[a].element[e]) * gpu::to_real(w[a].element[e]);
          if ((a * n + e) % 2) odd += product;
          else even += product;
        }
      }
      sums[row] += even + odd;
    }
  }
  R sum = 0;  // of the row `lane` of x
  GPU_UNROLL
  for (int row = 0; row < kRows; ++row) {
    const R total = gpu::warp_sum(sums[row]);
    if (lane == row) sum = total;
  }
  if (shared) {
    if (lane < kRows) partial[lane * kWarps + warp] = sum;
    __syncthreads();
    sum = 0;
    GPU_UNROLL
    for (int w = 0; w < kWarps; ++w)
      if (lane < kRows) sum += partial[lane * kWarps + w];
  }
  const bool stores = live && lane < rows && !(shared && warp > 0);
  if (stores) static_cast<T*>(p.y)[(group + lane) * p.outputs + column] = finished<T>(p, group + lane, column, sum);
}

}  // namespace linear
}  // namespace megalodon
