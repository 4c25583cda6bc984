// float32 products on AMX, which multiplies bfloat16. A number is the sum of three bfloat16 that hold its 24 bits:
//
//   a = a0 + a1 + a2:  a0 = a to 8 bits, |a - a0| <= 2^-8 |a|;  a1 = the next 8 bits, |a2| < 2^-16 |a|
//   a b = a0 b0 + (a0 b1 + a1 b0) + (a0 b2 + a1 b1 + a2 b0) + three omitted products
//
// (Henry, Tang and Heinecke 2019, arXiv 1904.06376). The omitted products are below 2^-22 |a b|, and 2^-26 |a b| in the
// root mean square. They have either sign, as a0 is rounded to nearest. The six products are exact. An instruction adds
// those of 32 indices of the depth to a sum, so the sum is rounded less often than by multiply-adds. AMX has 16 times
// the rate of float32: six products take 6 / 16 of its time.
//
// Matrices are packed in slices of 16 rows (of x and of weight). A slice is split into steps of 32 along the depth, a
// step into three tiles of 1 KiB, one for each part. Depths d and d + 16 form pair d. x is the left operand: a row of
// its tile has the 16 pairs of a row of x. weight is the right operand: row d of its tile has pair d of 16 rows.
//
// A job owns kRows rows of y, or some columns of them. For each kDepth of the depth, it packs its rows of x, which stay
// in the L2. Then, for each kColumns columns, it packs the weights and computes squares of y, of 2 x 2 tiles: 24
// products and 14 loads per step. Sums follow the order of the depth, for any number of threads.
//
// Infinities give NaN, and so do numbers of at least 2^128 (1 - 2^-9), which bfloat16 rounds to infinity. Numbers below
// 2^-110 lose low bits, as bfloat16 has float32's exponents and the instruction treats denormals as zero.

#include "linear.h"

#include <algorithm>

#include "panels.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int kSide = 16;  // rows of a tile
constexpr int kStep = 32;  // depth of a tile
constexpr int kParts = 3;  // bfloat16 per number
constexpr int kSquare = 2 * kSide;  // rows and columns of a square of y
constexpr int64_t kTileUnits = kSide * kSide;  // Bf16Pair
constexpr int64_t kStepUnits = kParts * kTileUnits;
constexpr int64_t kRows = 256, kColumns = 64, kDepth = 512;  // with three parts, 0.75 MiB of x and 0.2 MiB of weights

// One huge page for a thread's packed operands. With small pages, at arbitrary addresses, some pages that the L2 should
// hold would evict each other.
struct Workspace {
  static constexpr size_t kBytes = kHugePage;
  static constexpr int64_t kLeft = kRows / kSide * (kDepth / kStep) * kStepUnits;
  static constexpr int64_t kRight = kColumns / kSide * (kDepth / kStep) * kStepUnits;
  static_assert((kLeft + kRight + kSquare * kSquare) * sizeof(float) <= kBytes);

  explicit Workspace(void* page)
      : left(static_cast<Bf16Pair*>(page)), right(left + kLeft), sums(reinterpret_cast<float*>(right + kRight)) {}

  Bf16Pair* left;   // kRows rows of x
  Bf16Pair* right;  // kColumns rows of the weights
  float* sums;      // (kSquare, kSquare)
};

// A workspace that the calling thread keeps between calls: 0 for itself, the others for the threads that help.
Workspace kept_workspace(size_t helper) {
  struct Free {
    void operator()(void* page) const { std::free(page); }
  };
  thread_local std::vector<std::unique_ptr<void, Free>> pages;
  while (pages.size() <= helper) {
    std::unique_ptr<void, Free> page(std::aligned_alloc(Workspace::kBytes, Workspace::kBytes));
    if (!page) throw std::bad_alloc();
    advise_huge_pages(page.get(), Workspace::kBytes);
    pages.push_back(std::move(page));
  }
  return Workspace(pages[helper].get());
}

// Packs a whole step of a slice, for the left or the right operand. Element (r, d) is from[r stride + d] or, if
// transposed, from[d stride + r].
template <bool transposed>
void split_step(const float* from, int64_t stride, bool left, Bf16Pair* to) {
  Vec<float> low[kSide], high[kSide];  // depths 0 to 15, and 16 to 31
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
    low[i] = load(from + i * stride);
    high[i] = load(from + i * stride + (transposed ? kSide * stride : kSide));
  }
  if (transposed == left) {
    transpose<float>(low);
    transpose<float>(high);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) {
      const uint32_t half = part == 0 ? 0x8000 : 0;  // rounds part 0 to nearest; the others are truncated
      const Bits a = (bit_cast<Bits>(low[i]) + half) & 0xffff0000, b = (bit_cast<Bits>(high[i]) + half) & 0xffff0000;
      store_raw(to + part * kTileUnits + i * kSide, a >> 16 | b);
      low[i] -= bit_cast<Vec<float>>(a);
      high[i] -= bit_cast<Vec<float>>(b);
    }
  }
}

struct Matrix {
  const float* data;
  int64_t rows, depth;
  bool transposed;

  // Packs rows [row, end), rounded up to squares, and `steps` steps from depth `first` on; zeros beyond the matrix.
  void pack(int64_t row, int64_t end, int64_t first, int64_t steps, bool left, Bf16Pair* to) const {
    const int64_t slices = round_up(end - row, kSquare) / kSide;
    const auto pack_one = [&](int64_t slice, int64_t step) {
      pack_step(row + slice * kSide, first + step * kStep, left, to + (slice * steps + step) * kStepUnits);
    };
    // Packs in the order of memory.
    if (transposed)
      for (int64_t step = 0; step < steps; ++step)
        for (int64_t slice = 0; slice < slices; ++slice) pack_one(slice, step);
    else
      for (int64_t slice = 0; slice < slices; ++slice)
        for (int64_t step = 0; step < steps; ++step) pack_one(slice, step);
  }

 private:
  void pack_step(int64_t row, int64_t first, bool left, Bf16Pair* to) const {
    int64_t stride = transposed ? rows : depth;
    const float* from = data + (transposed ? first * stride + row : row * stride + first);
    float edge[kStep * kSide];  // copy, padded with zeros, of a step that the matrix does not fill
    if (rows - row < kSide || depth - first < kStep) {
      const int height = transposed ? kStep : kSide, width = transposed ? kSide : kStep;
      const int64_t lines = transposed ? depth - first : rows - row, size = transposed ? rows - row : depth - first;
      std::fill_n(edge, kStep * kSide, 0.0f);
      for (int64_t i = 0; i < std::min<int64_t>(height, lines) && size > 0; ++i)
        std::copy_n(from + i * stride, std::min<int64_t>(width, size), edge + i * width);
      from = edge;
      stride = width;
    }
    const auto split = transposed ? split_step<true> : split_step<false>;
    split(from, stride, left, to);
  }
};

// Computes the sums of a square from two slices of x and two of the weights.
void multiply_square(int64_t steps, const Bf16Pair* x, const Bf16Pair* weight, float* sums) {
  const Bf16Pair *second_x = x + steps * kStepUnits, *second_weight = weight + steps * kStepUnits;
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const auto load_left = [&](int part) __attribute__((always_inline)) {
    _tile_loadd(4, x + part * kTileUnits, 64);
    _tile_loadd(5, second_x + part * kTileUnits, 64);
  };
  const auto load_right = [&](int part) __attribute__((always_inline)) {
    _tile_loadd(6, weight + part * kTileUnits, 64);
    _tile_loadd(7, second_weight + part * kTileUnits, 64);
  };
  const auto multiply = [&]() __attribute__((always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  // a0 b2, a0 b1, a1 b1, a1 b0, a2 b0, a0 b0: each product loads one new part; the largest comes last.
  for (; steps > 0; --steps) {
    load_left(0);
    load_right(2);
    multiply();
    load_right(1);
    multiply();
    load_left(1);
    multiply();
    load_right(0);
    multiply();
    load_left(2);
    multiply();
    load_left(0);
    multiply();
    x += kStepUnits;
    second_x += kStepUnits;
    weight += kStepUnits;
    second_weight += kStepUnits;
  }
  constexpr int64_t kStride = kSquare * sizeof(float);
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + kSide, kStride);
  _tile_stored(2, sums + kSide * kSquare, kStride);
  _tile_stored(3, sums + kSide * kSquare + kSide, kStride);
}

// Sets y (height, width), rows `stride` apart, to the sums, plus y if `add`, plus the bias unless it is null.
template <bool add>
void put_square(const float* sums, int64_t height, int64_t width, const float* bias, int64_t stride, float* y) {
  for (int64_t i = 0; i < height; ++i, y += stride, sums += kSquare)
    for (int64_t c = 0; c < width; c += kLanes<float>) {
      const int64_t n = width - c;
      Vec<float> sum = load(sums + c);
      if (add) sum += load_first(static_cast<const float*>(y) + c, n);
      if (bias) sum += load_first(bias + c, n);
      store_first(y + c, sum, n);
    }
}

}  // namespace

void linear_many_rows_cpu(const LinearManyRowsParams& p) {
  const Matrix x{static_cast<const float*>(p.x), p.rows, p.inputs, p.x_transposed};
  const Matrix weight{static_cast<const float*>(p.weight), p.outputs, p.inputs, p.weight_transposed};
  const float* bias = static_cast<const float*>(p.bias);
  float* y = static_cast<float*>(p.y);
  // Divides the columns until there are enough jobs for the threads.
  const int64_t row_jobs = ceil_div(p.rows, kRows), threads = num_threads();
  int64_t column_jobs = 1;
  while (row_jobs * column_jobs < 4 * threads && row_jobs * column_jobs % threads &&
         column_jobs * 2 * kColumns <= p.outputs)
    ++column_jobs;
  const int64_t columns = round_up(ceil_div(p.outputs, column_jobs), kColumns);
  size_t helper = 0;
  const double work = static_cast<double>(p.rows * p.inputs * p.outputs);
  parallel_jobs<TileRegisters, FlushDenormals>(row_jobs * column_jobs, work, [&] {
    return [&, workspace = kept_workspace(helper++)](int64_t job) {
      const auto [left, right, sums] = workspace;
      const int64_t row = job / column_jobs * kRows, row_end = std::min(row + kRows, p.rows);
      const int64_t begin = job % column_jobs * columns, end = std::min(begin + columns, p.outputs);
      int64_t first = 0;
      do {  // also once for a depth of 0, which gives the bias
        const int64_t steps = ceil_div(std::min(kDepth, p.inputs - first), kStep), slice = steps * kStepUnits;
        x.pack(row, row_end, first, steps, /*left=*/true, left);
        for (int64_t column = begin; column < end; column += kColumns) {
          const int64_t column_end = std::min(column + kColumns, end);
          weight.pack(column, column_end, first, steps, /*left=*/false, right);
          for (int64_t o = column; o < column_end; o += kSquare)
            for (int64_t t = row; t < row_end; t += kSquare) {
              multiply_square(steps, left + (t - row) / kSide * slice, right + (o - column) / kSide * slice, sums);
              const auto put = p.add || first > 0 ? put_square<true> : put_square<false>;
              put(sums, std::min<int64_t>(kSquare, row_end - t), std::min<int64_t>(kSquare, column_end - o),
                  bias && first == 0 ? bias + o : nullptr, p.outputs, y + t * p.outputs + o);
            }
        }
        first += kDepth;
      } while (first < p.inputs);
    };
  });
}

}  // namespace megalodon::MEGALODON_ISA
