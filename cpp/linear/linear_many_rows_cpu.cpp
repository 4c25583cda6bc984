// Products of many rows, limited by multiplications, in float32 and 16-bit types. With AMX: linear_amx_cpu.cpp.
//
//   y_to = sum_i x_ti w_oi + b_o, plus the old y_to if `add`
//
// All threads together pack a block of the weights, of at most kColumns outputs and kDepth inputs; it stays in the
// last-level cache. Then a job packs the block's inputs of some rows of x, which stay in the L2, and multiplies them by
// the panels of the block (gemm.h): a tile is computed in registers and stored to y. If there are more inputs than in a
// block, the sums are kept in y or, if y is not float, in a buffer for kSumRows rows of y at a time. The terms of a sum
// are added in runs of kRunDepth, in the order of the depth; the number of threads does not change this order.
//
// If there are at least as many products as threads, each product is one job, and its thread packs the blocks alone.
// The order of the terms is the same.

#include "linear.h"

#include <algorithm>

#include "panels.h"

namespace megalodon::MEGALODON_ISA {
namespace {

// A part of the product: `rows` rows of y from `row` on, `columns` outputs from `column` on, `depth` inputs from
// `first` on.
struct Block { int64_t row, rows, column, columns, first, depth; };

// Addends and destination of a tile.
template <class T, class Y>
struct Place {
  Y* y;
  float* sums;  // over the depth so far; y itself if Y is float
  int64_t y_stride, sums_stride;
  const T* bias;     // or null
  bool add;          // adds the old y
  bool first, last;  // the tile's block has the first inputs, the last inputs
};

// Memory for packed operands and sums, which the calling thread keeps between calls. Matrix 0 is for itself, the others
// are for the threads that help. The size of a matrix depends on U and the purpose alone.
enum class For { weights, x, sums };
template <class U, For purpose>
U* thread_memory(int64_t rows, int64_t columns, size_t helper = 0) {
  thread_local std::vector<PackedMatrix<U>> memory;
  while (memory.size() <= helper) memory.emplace_back(rows, columns);
  return memory[helper].data;
}

template <class T, class Y>
class Product {
  using U = Unit<T>;
  using Panels = Packed<U>;
  static constexpr bool kSumsInY = std::is_same_v<Y, float>;
  static constexpr int kWidth = kTileColumns<U>, kHeight = kTileRows<U>, kLanes = MEGALODON_ISA::kLanes<float>;
  static constexpr int64_t kDepth = 1280 * kUnitDepth<U>, kColumns = 2112, kSumRows = 1152;
  static constexpr int64_t kRows = 144, kLeastRows = 24;  // most and least rows of a job
  // A float32 product is summed in runs of this depth, so that rounding errors grow with the root of the depth.
  static constexpr int64_t kRunDepth = std::is_same_v<T, float> ? 288 : kDepth;
  static_assert(kColumns % kWidth == 0 && kRows % kWidth == 0 && kRows % kTallRows<U> == 0);
  static_assert(kRunDepth % kWidth == 0 || kRunDepth == kDepth);

 public:
  Product(const LinearManyRowsParams& params, int64_t number)
      : p(params),
        x_(static_cast<const T*>(p.x) + number * p.rows * p.inputs),
        weight_(static_cast<const T*>(p.weight) + number * p.outputs * p.inputs),
        y_(static_cast<Y*>(p.y) + number * p.rows * p.outputs) {}

  // Runs the product on all threads.
  void run() const {
    for_each_block([&](const Block& block) { multiply(block); });
  }

  // Runs all products: each on one thread if there are at least as many products as threads, else each on all threads.
  static void run_each(const LinearManyRowsParams& p) {
    if (p.count == 1 || p.count < num_threads()) {
      for (int64_t number = 0; number < p.count; ++number) Product(p, number).run();
      return;
    }
    const double work = static_cast<double>(p.count) * static_cast<double>(p.rows * p.inputs * p.outputs);
    const bool needs_sums = !kSumsInY && p.inputs > kDepth;
    parallel_jobs<FlushDenormals>(p.count, work, [&] {
      return [&p, weights = PackedMatrix<U>(std::min(p.inputs, kDepth), std::min(p.outputs, kColumns)),
              x = PackedMatrix<U>(std::min(p.inputs, kDepth) + kWidth, kRows),
              sums = Scratch<float>(needs_sums ? kSumRows * (kColumns + kLanes) : 0), needs_sums](int64_t number) {
        const Product product(p, number);
        product.for_each_block([&](const Block& block) {
          float* const to = kSumsInY ? product.sums_of(block) : needs_sums ? sums.get() : nullptr;
          product.multiply_here(block, weights.data, x.data, to);
        });
      };
    });
  }

 private:
  template <class Body>
  void for_each_block(Body&& body) const {
    const int64_t columns = even_size(p.outputs, kColumns, kWidth), depth = even_size(p.inputs, kDepth, kUnitDepth<U>);
    const int64_t rows = kSumsInY || p.inputs <= depth ? p.rows : even_size(p.rows, kSumRows, 1);
    for (int64_t column = 0; column < p.outputs; column += columns)
      for (int64_t row = 0; row < p.rows; row += rows) {
        int64_t first = 0;
        do {  // also once for a depth of 0, which gives the bias
          body(Block{row, std::min(rows, p.rows - row), column, std::min(columns, p.outputs - column), first,
                     std::min(depth, p.inputs - first)});
          first += depth;
        } while (first < p.inputs);
      }
  }

  // Size of the blocks into which `all` is split: equal, at most `most`, a multiple of `unit`, which divides `most`.
  static int64_t even_size(int64_t all, int64_t most, int64_t unit) {
    return all > 0 ? round_up(ceil_div(all, ceil_div(all, most)), unit) : unit;
  }

  // Chooses the rows per job that balance the threads best.
  static int64_t rows_of_job(int64_t rows, int64_t threads) {
    const auto longest_share = [&](int64_t each) { return ceil_div(ceil_div(rows, each), threads) * each; };
    int64_t best = kRows;
    for (int64_t each = kRows; each >= kLeastRows; each -= kHeight)
      if (longest_share(each) < longest_share(best)) best = each;
    return best;
  }

  void multiply(const Block& block) const {
    const Panels weights{thread_memory<U, For::weights>(kDepth, kColumns), round_up(block.depth, kRowPadding)};
    pack_weights(block, weights);

    const int64_t threads = num_threads(), rows = rows_of_job(block.rows, threads);
    // A job has `rows` rows and all panels or, if these are fewer jobs than threads, `job_panels` of the panels.
    const int64_t panels = ceil_div(block.columns, kWidth), row_jobs = ceil_div(block.rows, rows);
    const int64_t panel_jobs = std::min(panels, ceil_div(threads, row_jobs)), job_panels = ceil_div(panels, panel_jobs);
    float* const sums = sums_of(block);
    size_t helper = 0;
    const double work = static_cast<double>(block.rows * block.depth * block.columns);
    parallel_jobs<FlushDenormals>(row_jobs * panel_jobs, work, [&] {
      return [&, x_panels = thread_memory<U, For::x>(kDepth + kWidth, kRows, helper++)](int64_t job) {
        const int64_t panel = job % panel_jobs * job_panels, last = std::min(panel + job_panels, panels);
        multiply_some_rows(block, job / panel_jobs * rows, rows, x_panels, weights, panel, last, sums);
      };
    });
  }

  // Multiplies all rows on the calling thread.
  void multiply_here(const Block& block, U* weight_panels, U* x_panels, float* sums) const {
    const Panels weights{weight_panels, round_up(block.depth, kRowPadding)};
    for (int64_t begin = 0; begin < num_packed(block); begin += kLanes) pack_weights(block, weights, begin);
    for (int64_t r = 0; r < block.rows; r += kRows)
      multiply_some_rows(block, r, kRows, x_panels, weights, 0, ceil_div(block.columns, kWidth), sums);
  }

  // Multiplies at most `rows` rows of the block, from its row r on, by the panels [panel, last) of its columns.
  void multiply_some_rows(const Block& block, int64_t r, int64_t rows, U* x_panels, Panels weights, int64_t panel,
                          int64_t last, float* sums) const {
    Block some = block;
    some.row += r;
    some.rows = std::min(rows, block.rows - r);
    const Panels x{x_panels, p.x_transposed ? round_up(block.depth, kRowPadding) : kRows};
    pack_x(some, x);
    multiply_panels(some, x, weights, panel, last, sums ? sums + r * sums_stride(block) : sums);
  }

  // Address of the sums over the depth so far, in y or in a buffer. Null if y is not float and one block is enough.
  float* sums_of(const Block& block) const {
    if constexpr (kSumsInY) {
      return y_ + block.row * p.outputs + block.column;
    } else {
      return block.depth < p.inputs ? thread_memory<float, For::sums>(kSumRows, kColumns + kLanes) : nullptr;
    }
  }
  // Rows of the buffer are a vector longer: rows a power of two apart would evict each other from a cache.
  int64_t sums_stride(const Block& block) const {
    return kSumsInY ? p.outputs : round_up(block.columns, kLanes) + kLanes;
  }

  void pack_weights(const Block& block, Panels to) const {
    parallel_jobs(ceil_div(num_packed(block), kLanes), static_cast<double>(block.depth * block.columns), [&] {
      return [&](int64_t job) { pack_weights(block, to, job * kLanes); };
    });
  }

  // Rows of the stored weights in a block.
  int64_t num_packed(const Block& block) const {
    return p.weight_transposed ? round_up(block.depth, kUnitDepth<U>) : block.columns;
  }

  // Packs kLanes of these rows, from `begin` on.
  void pack_weights(const Block& block, Panels to, int64_t begin) const {
    const int64_t end = std::min<int64_t>(begin + kLanes, num_packed(block));
    const auto input = [&](int64_t i) {
      return i < block.depth ? weight_ + (block.first + i) * p.outputs + block.column : nullptr;
    };
    const auto output = [&](int64_t o) { return weight_ + (block.column + o) * p.inputs + block.first; };
    if (p.weight_transposed) pack_by_rows<T>(begin, end, block.columns, input, to);
    else pack_transposed<T>(begin, end, block.depth, output, to);
  }

  // Packs x for use as A = M (gemm.h) or, if x is transposed, as A = M^T.
  void pack_x(const Block& block, Panels to) const {
    const auto input = [&](int64_t i) {
      return i < block.depth ? x_ + (block.first + i) * p.rows + block.row : nullptr;
    };
    const auto token = [&](int64_t r) {
      return r < block.rows ? x_ + (block.row + r) * p.inputs + block.first : nullptr;
    };
    if (p.x_transposed) pack_by_rows<T>(0, round_up(block.depth, kUnitDepth<U>), block.rows, input, to);
    else pack_by_columns<T>(0, round_up(block.rows, kHeight), block.depth, token, to);
  }

  // Multiplies the rows of the block by the panels [panel, last) of its columns.
  void multiply_panels(const Block& block, Panels x, Panels weights, int64_t panel, int64_t last, float* sums) const {
    alignas(64) float tile_sums[kTallRows<U> * kWidth];
    for (const int64_t begin = panel; panel < last; ++panel) {  // the last one prefetches `begin`, for the next rows
      const int vectors = vectors_in_panel<U>(block.columns, panel);
      const int64_t column = panel * kWidth, width = std::min<int64_t>(kWidth, block.columns - column);
      const Ahead<U> ahead{weights.at(panel + 1 < last ? panel + 1 : begin, 0), block.depth};
      int64_t rows;
      for (int64_t r = 0, tile = 0; r < block.rows; r += rows, ++tile) {
        rows = tile_rows<U>(vectors, block.rows - r);
        Place<T, Y> place{};
        place.y = y_ + (block.row + r) * p.outputs + block.column + column;
        place.y_stride = p.outputs;
        place.sums_stride = sums_stride(block);
        place.sums = sums ? sums + r * place.sums_stride + column : sums;
        place.bias = p.bias ? static_cast<const T*>(p.bias) + block.column + column : nullptr;
        place.add = p.add;
        place.first = block.first == 0;
        place.last = block.first + block.depth == p.inputs;
        const int64_t height = std::min(rows, block.rows - r);
        for (int64_t i = 0; i < height; ++i)
          for (int64_t c = 0; c < width; c += kLanes) __builtin_prefetch(place.y + i * p.outputs + c, 1);
        for (int64_t d = 0; d == 0 || d < block.depth; d += kRunDepth) {
          const int64_t depth = std::min(kRunDepth, block.depth - d);
          const float* const factors = d > 0 ? kOnes<float> : nullptr;
          const char* const part = ahead.part(tile) + d / kUnitDepth<U> * Ahead<U>::kStepBytes;
          if (p.x_transposed)
            multiply_tile<true>(vectors, rows, depth, x.at(r / kWidth, d) + r % kWidth, 0, weights.at(panel, d), 1.0f,
                                factors, tile_sums, part);
          else
            multiply_tile<false>(vectors, rows, depth, x.at(d / kWidth, r), x.panel_units(),
                                 weights.at(panel, d), 1.0f, factors, tile_sums, part);
        }
        put(tile_sums, height, width, place);
      }
    }
  }

  // Adds a tile's sums to those in `to`, and stores them there or, complete, in y.
  static void put(const float* tile, int64_t height, int64_t width, const Place<T, Y>& to) {
    for (int64_t i = 0; i < height; ++i, tile += kWidth)
      for (int64_t c = 0; c < width; c += kLanes) {
        const int64_t n = width - c;
        Y* y = to.y + i * to.y_stride + c;
        float* sums = to.sums ? to.sums + i * to.sums_stride + c : to.sums;
        Vec<float> sum = load(tile + c);
        if (!to.first) sum += load_first(static_cast<const float*>(sums), n);
        if (to.first && to.add) sum += load_first(static_cast<const Y*>(y), n);
        if (to.first && to.bias) sum += load_first(to.bias + c, n);
        if (kSumsInY || to.last) store_first(y, sum, n);
        else store_first(sums, sum, n);
      }
  }

  const LinearManyRowsParams& p;
  const T *const x_, *const weight_;
  Y* const y_;
};

}  // namespace

void linear_many_rows_cpu(const LinearManyRowsParams& p) {
  if (p.rows == 0) return;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, double>) {
      p.y_is_float ? Product<T, float>::run_each(p) : Product<T, T>::run_each(p);
    }
  });
}

}  // namespace megalodon::MEGALODON_ISA
