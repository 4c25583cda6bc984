// Products of few rows of x with weights w of 8 or 4 bits, and conversion of w to floating point. The time of a product
// is that of reading the weights once.
//
//   y_to = sum_i x_ti w_oi + b_o         int8: w_oi = s_o q_oi        int4: w_oi = s_og q_oi, i in group g
//
// The weights become floats in registers, without rounding. int8: the row's scale multiplies the sum. int4: the group's
// scale multiplies the weights. But if x is bfloat16 and the processor multiplies pairs of bfloat16, the integers of
// int4 become bfloat16, and the scale multiplies the group's sum.
//
// A job owns neighbouring rows of w and computes a vector of outputs at a time. It reads kWeightRows rows of w at once,
// for kMaxXRows rows of x, as many as the registers hold. x is first copied in the order in which the weights are
// unpacked, padded with zeros to a whole block of 64 bytes of weights. The order of a sum depends on I, the vector
// length and the number of rows of x alone.
//
// A block of int4 has 128 weights, in 4 groups with a scale each. Bits [4 k, 4 k + 4) of its 32-bit word d are weight
// 32 (k % 4) + 2 d + k / 4, in two's complement. So a right shift by 4 j moves group j to the low bits of the 16-bit
// words, in order. In each 32-bit word, the lower half then has an even weight and the upper half an odd one.

#include "quantized_linear.h"

#include <algorithm>

#include "panels.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int kFloats = kLanes<float>;
constexpr int kWeightRows = 4;
constexpr int kMaxXRows = kRegisters / 8;
constexpr int64_t kBlockBytes = 64;                        // weights read at a time
constexpr int64_t kBlockScales = kInt4Block / kInt4Group;  // of int4
constexpr int64_t kAhead = 8192;  // prefetch distance in bytes of the weights

// Addresses of the weights and of the scales of one block of a row.
struct Block {
  const char* weight;
  const bf16* scale;
};

// A format has these functions for blocks of kInputs inputs. X is the type of the copy of x, W of the weights of kStep
// inputs. `place` is the index of these inputs in the block of the copy.
//   read(blocks, take)          calls take(place, w) for each kStep inputs; w[o] has the weights of blocks[o]
//   order(block, i, inputs)     stores two vectors of inputs, from i on, at their places in the copy's block
//   in_order(block, i)          loads the two vectors from these places
//   load_x(x), add(sum, x, w)   load inputs, and add their products
struct Floats {  // base of the formats whose weights become floats
  using X = float;
  using W = Vec<float>;
  static constexpr int64_t kStep = kFloats;
  static MEGALODON_INLINE Vec<float> load_x(const float* x) { return load(x); }
  static MEGALODON_INLINE Vec<float> add(Vec<float> sum, Vec<float> x, Vec<float> w) { return sum + x * w; }
};

struct Int8 : Floats {
  static constexpr int64_t kInputs = 64;

  template <int rows, class Take>
  MEGALODON_INLINE static void read(const Block (&blocks)[rows], Take&& take) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kInputs; i += kFloats) {
      Vec<float> w[rows];
      for (int o = 0; o < rows; ++o) w[o] = load(reinterpret_cast<const int8_t*>(blocks[o].weight) + i);
      take(i, w);
    }
  }
  static MEGALODON_INLINE void order(float* block, int64_t i, TwoVectors<float> inputs) {
    store(block + i, inputs.a);
    store(block + i + kFloats, inputs.b);
  }
  static MEGALODON_INLINE TwoVectors<float> in_order(const float* block, int64_t i) { return load_two(block + i); }
};

struct Int4 : Floats {
  static constexpr int64_t kInputs = kInt4Block, kHalf = kInt4Group / 2;
  using Ints = VecOf<int32_t, kFloats>::type;

  template <int rows, class Take>
  MEGALODON_INLINE static void read(const Block (&blocks)[rows], Take&& take) {
#pragma GCC unroll 4
    for (int64_t d = 0; d < kHalf; d += kFloats) {
      Bits words[rows];
      for (int o = 0; o < rows; ++o) words[o] = load_raw<Bits>(blocks[o].weight + 4 * d);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Vec<float> even[rows], odd[rows];
        for (int o = 0; o < rows; ++o) {
          const Vec<float> scale = load_splat(blocks[o].scale + j);
#if defined(__AVX512F__)
          const __m512 values = bit_cast<__m512>(
              scale * Vec<float>{0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1});
          even[o] = bit_cast<Vec<float>>(_mm512_permutexvar_ps(bit_cast<__m512i>(words[o] >> (4 * j)), values));
          odd[o] = bit_cast<Vec<float>>(_mm512_permutexvar_ps(bit_cast<__m512i>(words[o] >> (4 * j + 16)), values));
#else
          even[o] = scale * __builtin_convertvector(bit_cast<Ints>(words[o] << (28 - 4 * j)) >> 28, Vec<float>);
          odd[o] = scale * __builtin_convertvector(bit_cast<Ints>(words[o] << (12 - 4 * j)) >> 28, Vec<float>);
#endif
        }
        take(kInt4Group * j + d, even);
        take(kInt4Group * j + kHalf + d, odd);
      }
    }
  }
  static MEGALODON_INLINE void order(float* block, int64_t i, TwoVectors<float> inputs) {
    order(block + place(i), inputs, std::make_integer_sequence<int, kFloats>{});
  }
  static MEGALODON_INLINE TwoVectors<float> in_order(const float* block, int64_t i) {
    return in_order(block + place(i), std::make_integer_sequence<int, kFloats>{});
  }

 private:
  static MEGALODON_INLINE int64_t place(int64_t i) { return i / kInt4Group * kInt4Group + i % kInt4Group / 2; }
  template <int... lane>
  static MEGALODON_INLINE void order(float* to, TwoVectors<float> inputs, std::integer_sequence<int, lane...>) {
    store(to, __builtin_shufflevector(inputs.a, inputs.b, (2 * lane)...));
    store(to + kHalf, __builtin_shufflevector(inputs.a, inputs.b, (2 * lane + 1)...));
  }
  template <int... lane>
  static MEGALODON_INLINE TwoVectors<float> in_order(const float* from, std::integer_sequence<int, lane...>) {
    const Vec<float> even = load(from), odd = load(from + kHalf);
    return {__builtin_shufflevector(even, odd, (lane / 2 + lane % 2 * kFloats)...),
            __builtin_shufflevector(even, odd, (lane / 2 + lane % 2 * kFloats + kFloats / 2)...)};
  }
};

#if defined(__AVX512BF16__)
struct Int4Pairs {
  using X = bf16;
  struct W {
    Bits pairs;
    Vec<float> scale;
  };
  static constexpr int64_t kInputs = kInt4Block, kStep = kInt4Group;
  static MEGALODON_INLINE Bits load_x(const bf16* x) { return load_raw<Bits>(x); }
  static MEGALODON_INLINE Vec<float> add(Vec<float> sum, Bits x, const W& w) {
    return sum + w.scale * add_pairs(zeros<float>(), w.pairs, x);
  }

  template <int rows, class Take>
  MEGALODON_INLINE static void read(const Block (&blocks)[rows], Take&& take) {
    // The 16 integers as bfloat16, broadcast twice: the permutation's index has a fifth bit, that of another weight.
    constexpr VecOf<uint16_t, 16>::type integers = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    const __m512i table = _mm512_broadcast_i64x4(bit_cast<__m256i>(integers));
    Bits words[rows];
    for (int o = 0; o < rows; ++o) words[o] = load_raw<Bits>(blocks[o].weight);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      W w[rows];
      for (int o = 0; o < rows; ++o)
        w[o] = {bit_cast<Bits>(_mm512_permutexvar_epi16(bit_cast<__m512i>(words[o] >> (4 * j)), table)),
                load_splat(blocks[o].scale + j)};
      take(kInt4Group * j, w);
    }
  }
};
#endif

template <class Format>
int64_t blocks_in_row(const QuantizedWeight& p) {
  return ceil_div(p.inputs, Format::kInputs);
}

// Fills the vectors sums[r][at + o], for `rows` rows r of x and kWeightRows rows o of w. A vector's lanes add up to row
// r of x times row output + o of w. Rows past the last one of w repeat that row. One function serves all dtypes.
template <class Format, int rows>
__attribute__((noinline)) void add_up(const QuantizedWeight& p, const typename Format::X* x, int64_t output,
                                      Vec<float> (*sums)[kFloats], int at) {
  constexpr int chains = kRegisters / 2 / (rows * kWeightRows);
  const int64_t blocks = blocks_in_row<Format>(p), stride = p.is_int4 ? blocks * kBlockBytes : p.inputs;
  Block block[kWeightRows];
  for (int o = 0; o < kWeightRows; ++o) {
    const int64_t i = std::min(output + o, p.outputs - 1);
    block[o] = {static_cast<const char*>(p.weight) + i * stride,
                static_cast<const bf16*>(p.scale) + (p.is_int4 ? i * blocks * kBlockScales : 0)};
  }
  Vec<float> partial[chains][rows][kWeightRows] = {};
  const auto add = [&]() __attribute__((always_inline)) {
    Format::read(block, [&](int64_t place, const typename Format::W (&w)[kWeightRows]) __attribute__((always_inline)) {
      auto& chain = partial[place / Format::kStep % chains];
      for (int r = 0; r < rows; ++r) {
        const auto factor = Format::load_x(x + r * blocks * Format::kInputs + place);
        for (int o = 0; o < kWeightRows; ++o) chain[r][o] = Format::add(chain[r][o], factor, w[o]);
      }
    });
  };
  for (int64_t left = stride; left >= kBlockBytes; left -= kBlockBytes) {
    for (int o = 0; o < kWeightRows; ++o) __builtin_prefetch(block[o].weight + kAhead, 0, 2);
    add();
    x += Format::kInputs;
    for (int o = 0; o < kWeightRows; ++o) block[o] = {block[o].weight + kBlockBytes, block[o].scale + kBlockScales};
  }
  if (const int64_t left = stride % kBlockBytes) {
    char ends[kWeightRows][kBlockBytes] = {};
    for (int o = 0; o < kWeightRows; ++o) {
      std::memcpy(ends[o], block[o].weight, static_cast<size_t>(left));
      block[o].weight = ends[o];
    }
    add();
  }
  for (int r = 0; r < rows; ++r)
    for (int o = 0; o < kWeightRows; ++o) {
      sums[r][at + o] = partial[0][r][o];
      for (int chain = 1; chain < chains; ++chain) sums[r][at + o] += partial[chain][r][o];
    }
}

// Multiplies the `rows` rows of x from `row` on, whose copy starts at `x`, by the kFloats rows of w from `output` on.
template <class T, class Format, int rows>
void multiply(const QuantizedLinearParams& p, const typename Format::X* x, int64_t row, int64_t output) {
  Vec<float> parts[rows][kFloats];
  for (int o = 0; o < kFloats; o += kWeightRows) add_up<Format, rows>(p, x, output + o, parts, o);
  const int64_t n = std::min<int64_t>(kFloats, p.outputs - output);
  const T* bias = static_cast<const T*>(p.bias);
  const Vec<float> offset = bias ? load_first(bias + output, n) : zeros<float>();
  for (int r = 0; r < rows && row + r < p.rows; ++r) {
    Vec<float> sums = sum_rows<float>(parts[r]);
    if (!p.is_int4) sums *= load_first(static_cast<const float*>(p.scale) + output, n);
    store_first(static_cast<T*>(p.y) + (row + r) * p.outputs + output, sums + offset, n);
  }
}

// Copies x in the format's order, and zeros after each row and, for kMaxXRows rows at a time, after the last row.
template <class T, class Format>
void copy_x(const QuantizedLinearParams& p, typename Format::X* to) {
  using X = typename Format::X;
  const int64_t width = blocks_in_row<Format>(p) * Format::kInputs;
  [[maybe_unused]] const auto first_of = [](const T* from, int64_t n) {
    return n > 0 ? load_first(from, n) : zeros<float>();
  };
  std::fill(to + p.rows * width, to + round_up(p.rows, kMaxXRows) * width, X{});
  for (int64_t row = 0; row < p.rows; ++row, to += width) {
    const T* from = static_cast<const T*>(p.x) + row * p.inputs;
    if constexpr (std::is_same_v<X, bf16>) {
      std::fill(std::copy(from, from + p.inputs, to), to + width, X{});
    } else {
      for (int64_t i = 0; i < width; i += 2 * kFloats) {
        const int64_t place = i % Format::kInputs, left = p.inputs - i;
        const TwoVectors<float> inputs{first_of(from + i, left), first_of(from + i + kFloats, left - kFloats)};
        Format::order(to + i - place, place, inputs);
      }
    }
  }
}

template <class T, class Format>
void quantized_linear(const QuantizedLinearParams& p) {
  const int64_t width = blocks_in_row<Format>(p) * Format::kInputs;
  const Scratch<typename Format::X> x(round_up(p.rows, kMaxXRows) * width);
  copy_x<T, Format>(p, x.get());
  // Each job has whole vectors of outputs. So the number of jobs, which depends on the threads, changes no sum.
  const int64_t vectors = ceil_div(p.outputs, kFloats), jobs = std::min<int64_t>(vectors, num_threads());
  parallel_jobs(jobs, static_cast<double>(p.rows * p.inputs * p.outputs), [&] {
    return [&](int64_t job) {
      for (int64_t i = vectors * job / jobs; i < vectors * (job + 1) / jobs; ++i) {
        int64_t row = 0;
        for (; row + 1 < p.rows; row += kMaxXRows)
          multiply<T, Format, kMaxXRows>(p, x.get() + row * width, row, i * kFloats);
        if (row < p.rows) multiply<T, Format, 1>(p, x.get() + row * width, row, i * kFloats);
      }
    };
  });
}

template <class T, class Format>
void dequantize(const DequantizeParams& p) {
  constexpr int64_t kRows = 16;  // per job
  const int64_t blocks = blocks_in_row<Format>(p), stride = p.is_int4 ? blocks * kBlockBytes : p.inputs;
  const auto convert_row = [&](int64_t place) {
    const int64_t row = p.rows ? p.rows[place] : place;
    T* y = static_cast<T*>(p.y) + place * p.inputs;
    const char* weight = static_cast<const char*>(p.weight) + row * stride;
    const bf16* group_scales = static_cast<const bf16*>(p.scale) + row * blocks * kBlockScales;
    const Vec<float> scale = splat(p.is_int4 ? 1.0f : static_cast<const float*>(p.scale)[row]);
    for (int64_t b = 0; b < blocks; ++b) {
      char bytes[kBlockBytes] = {};
      const int64_t count = std::min(kBlockBytes, stride - b * kBlockBytes);
      std::memcpy(bytes, weight + b * kBlockBytes, static_cast<size_t>(count));
      float values[Format::kInputs];
      Format::read({{bytes, group_scales + kBlockScales * b}}, [&](int64_t place, const Vec<float> (&w)[1])
                       __attribute__((always_inline)) { store(values + place, scale * w[0]); });
      const int64_t left = std::min(Format::kInputs, p.inputs - b * Format::kInputs);
      for (int64_t i = 0; i < left; i += 2 * kFloats, y += 2 * kFloats) {
        const TwoVectors<float> w = Format::in_order(values, i);
        store_first(y, w.a, left - i);
        if (left - i > kFloats) store_first(y + kFloats, w.b, left - i - kFloats);
      }
    }
  };
  parallel_jobs(ceil_div(p.num_rows, kRows), static_cast<double>(p.inputs * p.num_rows), [&] {
    return [&](int64_t job) {
      for (int64_t row = job * kRows; row < std::min(p.num_rows, (job + 1) * kRows); ++row) convert_row(row);
    };
  }, Order::shares);
}

// Calls f(T{}, Format{}).
template <class F>
void dispatch(DType dtype, bool is_int4, F&& f) {
  dispatch_dtype(dtype, [&](auto type) {
    if constexpr (!std::is_same_v<decltype(type), double>) is_int4 ? f(type, Int4{}) : f(type, Int8{});
  });
}

}  // namespace

void quantized_linear_cpu(const QuantizedLinearParams& p) {
#if defined(__AVX512BF16__)
  if (p.is_int4) return quantized_linear<bf16, Int4Pairs>(p);
#endif
  dispatch(p.dtype, p.is_int4, [&](auto type, auto format) { quantized_linear<decltype(type), decltype(format)>(p); });
}

void dequantize_cpu(const DequantizeParams& p) {
  dispatch(p.dtype, p.is_int4, [&](auto type, auto format) { dequantize<decltype(type), decltype(format)>(p); });
}

}  // namespace megalodon::MEGALODON_ISA
