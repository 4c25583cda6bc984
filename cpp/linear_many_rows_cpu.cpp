// float32 products of many rows, bound by multiplications. With AMX: linear_amx_cpu.cpp.
//
//   y_to (+)= sum_i x_ti w_oi + b_o
//
// The weights are packed a block of at most kColumns outputs and kDepth inputs at a time, by all threads together, and
// stay in the last cache. Then a job packs as much of the depth of some rows of x, which stay in the L2, and meets them
// with the panels of the block (gemm.h): a tile is made in registers and put to y. The order of a sum is that of the
// depth, whoever runs a job.

#include "linear.h"

#if !defined(__AMX_BF16__)

#include <algorithm>

#include "panels.h"

namespace megalodon::MEGALODON_ISA {
namespace {

using Panels = Packed<float>;
constexpr int kWidth = kTileColumns<float>;
constexpr int kHeight = kTileRows<float>;
constexpr int64_t kDepth = 1024, kColumns = 2112, kRows = 144, kLeastRows = 24;
static_assert(kColumns % kWidth == 0 && kRows % kWidth == 0 && kRows % kTallRows<float> == 0);

// Rows of a job, so that the threads' shares are as even as can be.
int64_t rows_of_job(int64_t rows, int64_t threads) {
  const auto longest_share = [&](int64_t each) { return ceil_div(ceil_div(rows, each), threads) * each; };
  int64_t best = kRows;
  for (int64_t each = kRows; each >= kLeastRows; each -= kHeight)
    if (longest_share(each) < longest_share(best)) best = each;
  return best;
}

// y (height, width), whose rows are `stride` apart, becomes the sums, plus y where `add`, plus a bias that may be null.
void put(const float* sums, int64_t height, int64_t width, bool add, const float* bias, int64_t stride, float* y) {
  for (int64_t i = 0; i < height; ++i, y += stride, sums += kWidth)
    for (int64_t c = 0; c < width; c += kLanes<float>) {
      Vec<float> sum = load(sums + c);
      if (add) sum += load_first(static_cast<const float*>(y) + c, width - c);
      if (bias) sum += load_first(bias + c, width - c);
      store_first(y + c, sum, width - c);
    }
}

// Of the weights: `columns` outputs from `column` on, `depth` inputs from `first` on.
struct Block { int64_t column, columns, first, depth; };

class Product {
 public:
  explicit Product(const LinearManyRowsParams& params)
      : p(params), threads_(omp_in_parallel() ? 1 : omp_get_max_threads()), rows_(rows_of_job(p.rows, threads_)) {}

  void operator()(const Block& block) const {
    // What is packed is kept from call to call.
    thread_local const PackedMatrix<float> kept(kDepth, kColumns);
    const Panels weights{kept.data, round_up(block.depth, kRowPadding)};
    pack_weights(block, weights);

    const int64_t panels = ceil_div(block.columns, kWidth), shares = ceil_div(p.rows, rows_);
    const int64_t parts = std::min(panels, ceil_div(threads_, shares)), part = ceil_div(panels, parts);
    parallel_jobs(shares * parts, static_cast<double>(p.rows * block.depth * block.columns), [&] {
      thread_local const Scratch<float> kept_rows(kRows * (kDepth + kWidth));
      return [&, rows = kept_rows.get(), flush = FlushDenormals()](int64_t job) {
        const int64_t row = job / parts * rows_, height = std::min(rows_, p.rows - row), panel = job % parts * part;
        const Panels x{rows, p.x_transposed ? round_up(block.depth, kRowPadding) : kRows};
        pack_x(block, row, height, x);
        multiply(block, weights, row, height, x, panel, std::min(panel + part, panels));
      };
    });
  }

 private:
  void pack_weights(const Block& block, Panels to) const {
    const int64_t all = p.weight_transposed ? block.depth : block.columns, step = kLanes<float>;
    parallel_jobs(ceil_div(all, step), static_cast<double>(block.depth * block.columns), [&] {
      return [&](int64_t job) {
        const int64_t begin = job * step, end = std::min(begin + step, all);
        const auto input = [&](int64_t i) { return p.weight + (block.first + i) * p.outputs + block.column; };
        const auto output = [&](int64_t o) { return p.weight + (block.column + o) * p.inputs + block.first; };
        if (p.weight_transposed) pack_by_rows<float>(begin, end, block.columns, input, to);
        else pack_transposed<float>(begin, end, block.depth, output, to);
      };
    });
  }

  // `height` rows from `row` on, as A = M^T where x is transposed.
  void pack_x(const Block& block, int64_t row, int64_t height, Panels to) const {
    const auto input = [&](int64_t i) { return p.x + (block.first + i) * p.rows + row; };
    const auto token = [&](int64_t r) { return r < height ? p.x + (row + r) * p.inputs + block.first : nullptr; };
    if (p.x_transposed) pack_by_rows<float>(0, block.depth, height, input, to);
    else pack_by_columns<float>(0, round_up(height, kHeight), block.depth, token, to);
  }

  // Those rows with the panels [panel, last) of the block.
  void multiply(const Block& block, Panels weights, int64_t row, int64_t height, Panels x, int64_t panel,
                int64_t last) const {
    alignas(64) float sums[kTallRows<float> * kWidth];
    for (const int64_t begin = panel; panel < last; ++panel) {
      const int vectors = vectors_in_panel<float>(block.columns, panel);
      const int64_t at = panel * kWidth, width = std::min<int64_t>(kWidth, block.columns - at);
      const float* bias = p.bias && block.first == 0 ? p.bias + block.column + at : nullptr;
      const float* b = weights.at(panel, 0);
      const Ahead<float> ahead{weights.at(panel + 1 < last ? panel + 1 : begin, 0), block.depth};
      int64_t rows;
      for (int64_t r = 0, tile = 0; r < height; r += rows, ++tile) {
        rows = tile_rows<float>(vectors, height - r);
        const int64_t here = std::min(rows, height - r);
        float* y = p.y + (row + r) * p.outputs + block.column + at;
        for (int64_t i = 0; i < here; ++i)
          for (int64_t c = 0; c < width; c += kLanes<float>) __builtin_prefetch(y + i * p.outputs + c, 1);
        if (p.x_transposed)
          multiply_tile<true>(vectors, rows, block.depth, x.at(r / kWidth, 0) + r % kWidth, 0, b, 1.0f, nullptr, sums,
                              ahead.part(tile));
        else
          multiply_tile<false>(vectors, rows, block.depth, x.at(0, r), x.panel_units(), b, 1.0f, nullptr, sums,
                               ahead.part(tile));
        put(sums, here, width, p.add || block.first > 0, bias, p.outputs, y);
      }
    }
  }

  const LinearManyRowsParams& p;
  const int64_t threads_, rows_;
};

}  // namespace

void linear_many_rows_cpu(const LinearManyRowsParams& p) {
  if (p.rows == 0) return;
  const auto even = [](int64_t all, int64_t most, int64_t unit) {
    return all > 0 ? round_up(ceil_div(all, ceil_div(all, most)), unit) : unit;
  };
  const int64_t columns = even(p.outputs, kColumns, kWidth), depth = even(p.inputs, kDepth, 1);
  const Product product(p);
  for (int64_t column = 0; column < p.outputs; column += columns) {
    int64_t first = 0;
    do {  // once for a depth of 0 too, which gives the bias
      product({column, std::min(columns, p.outputs - column), first, std::min(depth, p.inputs - first)});
      first += depth;
    } while (first < p.inputs);
  }
}

}  // namespace megalodon::MEGALODON_ISA

#endif
