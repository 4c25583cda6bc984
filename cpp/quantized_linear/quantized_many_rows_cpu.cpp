// Products of many rows of x with weights of 8 or 4 bits, as sums of integers. x is rounded to 8 bits first.
//
//   a_tg = max over the group's i of |x_ti| / 127,  p_ti = round(x_ti / a_tg)         int8: a group is a row
//   y_to = sum_g a_tg s_og (sum over the group's i of p_ti q_oi) + b_o
//
// The inner sums are exact integers of 32 bits. With int8 they run over at most kMaxGroup inputs, which exceed no
// integer; the sums of several such parts, and of int4's groups of 32 inputs, are float. A row with NaN or an infinity
// has a scale of NaN, so its outputs are NaN.
//
// A word is the operand of one 32-bit lane: neighbouring inputs, kWordInputs of them. A job owns a panel, two vectors
// of outputs. It packs the panel's weights in its L2, a row of words for each word of the depth, then multiplies it by
// all rows of x, a tile of kRows rows at a time; sums stay in registers. x is rounded by all threads together, into
// tiles that store kRows words for each word of the depth. No result depends on the number of threads.
//
//   instruction set      word            product of two words            tile
//   v4_amx               4 of 8 bits     TDPBSUD, 16 x 16 x 16 words     32 rows x 2 vectors; only int8
//   v4_vnni, v3_vnni     4 of 8 bits     VPDPBUSD                        12 x 2, 6 x 2
//   v4, v3, v2           2 of 16 bits    VPMADDWD and VPADDD             12 x 2, 6 x 2
//   others               2 of 16 bits    two multiply-adds               12 x 2
//
// VPDPBUSD and TDPBSUD here multiply unsigned by signed integers. The weights are stored as q + 128, and each sum
// starts from -128 sum_i p_ti.

#include "quantized_linear.h"

#include <algorithm>
#include <cfloat>

#include "panels.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int kFloats = kLanes<float>, kPanel = 2 * kFloats;
constexpr int64_t kMaxGroup = 1 << 16;          // 127 * 255 * 2^16 < 2^31
constexpr int64_t kBlockBytes = int64_t{4} << 20;  // of rounded rows of x; they share the last-level cache
using Ints = VecOf<int32_t, kFloats>::type;

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
using Integer = int8_t;
constexpr int kOffset = 128;
#if defined(__AVX512VNNI__)
MEGALODON_INLINE Ints add_products(Ints sum, Bits weight, Bits x) {
  return bit_cast<Ints>(
      _mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(weight), bit_cast<__m512i>(x)));
}
#else
MEGALODON_INLINE Ints add_products(Ints sum, Bits weight, Bits x) {
  return bit_cast<Ints>(
      _mm256_dpbusd_avx_epi32(bit_cast<__m256i>(sum), bit_cast<__m256i>(weight), bit_cast<__m256i>(x)));
}
#endif
#else
using Integer = int16_t;
constexpr int kOffset = 0;
MEGALODON_INLINE Ints add_products(Ints sum, Bits weight, Bits x) {
#if defined(__AVX512BW__)
  return sum + bit_cast<Ints>(_mm512_madd_epi16(bit_cast<__m512i>(weight), bit_cast<__m512i>(x)));
#elif defined(__AVX2__)
  return sum + bit_cast<Ints>(_mm256_madd_epi16(bit_cast<__m256i>(weight), bit_cast<__m256i>(x)));
#elif defined(__SSE2__)
  return sum + bit_cast<Ints>(_mm_madd_epi16(bit_cast<__m128i>(weight), bit_cast<__m128i>(x)));
#else
  const auto low = [](Bits word) { return bit_cast<Ints>(word << 16) >> 16; };
  const auto high = [](Bits word) { return bit_cast<Ints>(word) >> 16; };
  return sum + low(weight) * low(x) + high(weight) * high(x);
#endif
}
#endif

constexpr int kIntegerBytes = sizeof(Integer), kWordInputs = 4 / kIntegerBytes;
#if defined(__AMX_INT8__)
constexpr int kRows = 32;
constexpr int64_t kDepthPadding = 64;
#else
constexpr int kRows = kRegisters == 32 ? 12 : 6;
constexpr int64_t kDepthPadding = kFloats * kWordInputs;
#endif

// Sizes of the depth: `inputs` padded to `depth`, in `groups` groups of `group` inputs; the last may be shorter.
struct Depth {
  int64_t inputs, depth, group, groups;

  explicit Depth(const QuantizedWeight& w)
      : inputs(w.inputs),
        depth(round_up(inputs, w.is_int4 ? kInt4Block : kDepthPadding)),
        group(w.is_int4 ? kInt4Group : kMaxGroup),
        groups(std::max<int64_t>(1, ceil_div(depth, group))) {}

  int64_t size_of(int64_t g) const { return std::min(group, depth - g * group); }
};

// Rounded rows of x. Element i of row r is at place(r, i).
struct RoundedRows {
  Integer* integers;  // (rows / kRows, depth / kWordInputs, kRows, kWordInputs); with AMX (rows, depth)
  float* scales;      // (rows, groups)
  int32_t* starts;    // (rows, groups): of the sums

  static int64_t place(int64_t r, int64_t i, int64_t depth) {
#if defined(__AMX_INT8__)
    return r * depth + i;
#else
    return r / kRows * kRows * depth + (i / kWordInputs * kRows + r % kRows) * kWordInputs;
#endif
  }
};

uint32_t largest_lane(Bits bits) {
  uint32_t largest = 0;
  for (int i = 0; i < kFloats; ++i) largest = std::max(largest, bits[i]);
  return largest;
}

// Rounds a row of x; groups of the row have one scale unless the weights are int4.
template <class T>
void round_row(const T* x, const Depth& size, bool is_int4, int64_t row, const RoundedRows& to) {
  const auto inputs_at = [&](int64_t i) {
    return i < size.inputs ? load_first(x + i, size.inputs - i) : zeros<float>();
  };
  const auto scale_of = [&](int64_t first, int64_t count) {
    Bits largest{};
    for (int64_t i = first; i < first + count; i += kFloats) {
      const Bits magnitude = bit_cast<Bits>(inputs_at(i)) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    const uint32_t bits = largest_lane(largest);
    return bits >= 0x7f800000 ? __builtin_nanf("") : std::max(bit_cast<float>(bits) / 127.0f, FLT_MIN);
  };
  float scale = is_int4 ? 0.0f : scale_of(0, size.inputs);
  for (int64_t g = 0; g < size.groups; ++g) {
    const int64_t first = g * size.group, end = first + size.size_of(g);
    if (is_int4) scale = scale_of(first, end - first);
    Ints sum{};
    for (int64_t i = first; i < end; i += kFloats) {
      constexpr float kToInteger = 0x1.8p23f;  // x + this rounds x to an integer, in the sum's low bits
      const Bits rounded = bit_cast<Bits>(inputs_at(i) / splat(scale) + kToInteger);
      sum += bit_cast<Ints>(rounded << 16) >> 16;
      using Narrow = typename VecOf<std::make_unsigned_t<Integer>, kFloats>::type;
      const Narrow narrow = __builtin_convertvector(rounded, Narrow);
#if defined(__AMX_INT8__)
      store_raw(to.integers + RoundedRows::place(row, i, size.depth), narrow);
#else
      constexpr int kWords = kFloats / kWordInputs;
      uint32_t words[kWords];
      std::memcpy(words, &narrow, sizeof words);
      Integer* place = to.integers + RoundedRows::place(row, i, size.depth);
      for (int w = 0; w < kWords; ++w, place += kRows * kWordInputs) std::memcpy(place, words + w, sizeof words[w]);
#endif
    }
    int32_t total = 0;
    for (int i = 0; i < kFloats; ++i) total += sum[i];
    to.scales[row * size.groups + g] = scale;
    to.starts[row * size.groups + g] = -kOffset * total;
  }
}

// A panel's weights (depth / kWordInputs, kPanel) and scales (groups, kPanel).
struct Panel {
  Bits* words;
  float* scales;
};

// Unpacks a block of int4 (quantized_linear.h) to integers of 8 bits.
void expand_int4(const uint8_t* block, int8_t* to) {
  uint16_t words[kInt4Group];
  std::memcpy(words, block, sizeof words);
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < kInt4Group; ++i)
      to[kInt4Group * j + i] = static_cast<int8_t>(static_cast<int16_t>(words[i] << (12 - 4 * j)) >> 12);
}

MEGALODON_INLINE Bits load_words(const int8_t* from) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  return load_raw<Bits>(from) ^ 0x80808080;
#else
  using Narrow = VecOf<int8_t, 2 * kFloats>::type;
  using Wide = VecOf<int16_t, 2 * kFloats>::type;
  return bit_cast<Bits>(__builtin_convertvector(load_raw<Narrow>(from), Wide));
#endif
}

// Packs the panel of outputs from `output` on; outputs beyond the last one are zero.
void pack(const QuantizedWeight& p, const Depth& size, int64_t output, const Panel& to) {
  constexpr int64_t kStep = kFloats * kWordInputs;  // inputs of a square
  static_assert(kInt4Block % kStep == 0);
  const int64_t step = p.is_int4 ? kInt4Block : kStep, row_bytes = p.is_int4 ? size.depth / 2 : p.inputs;
  for (int half = 0; half < 2; ++half)
    for (int64_t i = 0; i < size.depth; i += step) {
      int8_t buffer[kFloats][kInt4Block];
      const int8_t* rows[kFloats];
      for (int o = 0; o < kFloats; ++o) {
        const int64_t row = output + half * kFloats + o, left = p.inputs - i;
        const char* from = static_cast<const char*>(p.weight) + row * row_bytes + (p.is_int4 ? i / 2 : i);
        rows[o] = buffer[o];
        if (row >= p.outputs) std::fill_n(buffer[o], step, int8_t{});
        else if (p.is_int4) expand_int4(reinterpret_cast<const uint8_t*>(from), buffer[o]);
        else if (left >= step) rows[o] = reinterpret_cast<const int8_t*>(from);
        else std::fill(std::copy_n(from, std::max<int64_t>(left, 0), buffer[o]), buffer[o] + step, int8_t{});
      }
      for (int64_t at = 0; at < step; at += kStep) {
        Vec<float> square[kFloats];
#pragma GCC unroll 16
        for (int o = 0; o < kFloats; ++o) square[o] = bit_cast<Vec<float>>(load_words(rows[o] + at));
        transpose<float>(square);
        Bits* words = to.words + (i + at) / kWordInputs * 2 + half;
#pragma GCC unroll 16
        for (int w = 0; w < kFloats; ++w) words[2 * w] = bit_cast<Bits>(square[w]);
      }
    }
  for (int o = 0; o < kPanel; ++o)
    for (int64_t g = 0; g < size.groups; ++g) {
      const int64_t row = output + o;
      float& scale = to.scales[g * kPanel + o];
      if (row >= p.outputs || p.inputs == 0) scale = 0;
      else if (p.is_int4) scale = widen(static_cast<const bf16*>(p.scale)[row * size.groups + g]);
      else scale = static_cast<const float*>(p.scale)[row];
    }
}

// Sets a tile of y, in float and without the bias, from kRows rounded rows of x, from `row` on, and a panel.
__attribute__((noinline)) void multiply_tile(const Depth& size, const RoundedRows& x, int64_t row, const Panel& panel,
                                             float (*tile)[kPanel]) {
  const Integer* integers = x.integers + row * size.depth;
  const Bits* weights = panel.words;
  for (int64_t g = 0; g < size.groups; ++g) {
    const float* scales = panel.scales + g * kPanel;
    const Vec<float> scale[2] = {load(scales), load(scales + kFloats)};
    const int64_t first = row * size.groups + g;
    // y += a_tg s_og times the integers.
    const auto finish = [&](int r, Ints low, Ints high) __attribute__((always_inline)) {
      const Vec<float> factor = splat(x.scales[first + r * size.groups]);
      const Vec<float> a = __builtin_convertvector(low, Vec<float>) * scale[0] * factor;
      const Vec<float> b = __builtin_convertvector(high, Vec<float>) * scale[1] * factor;
      store(tile[r], g > 0 ? load(static_cast<const float*>(tile[r])) + a : a);
      store(tile[r] + kFloats, g > 0 ? load(static_cast<const float*>(tile[r]) + kFloats) + b : b);
    };
    int64_t words = size.size_of(g) / kWordInputs;
#if defined(__AMX_INT8__)
    constexpr int64_t kStride = kPanel * sizeof(int32_t);
    alignas(64) int32_t sums[kRows][kPanel];
    asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler that they read memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (; words > 0; words -= 16, integers += 64, weights += 32) {
      _tile_loadd(4, integers, size.depth);
      _tile_loadd(5, integers + 16 * size.depth, size.depth);
      _tile_loadd(6, weights, kStride);
      _tile_loadd(7, weights + 1, kStride);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, sums[0], kStride);
    _tile_stored(1, sums[0] + kFloats, kStride);
    _tile_stored(2, sums[16], kStride);
    _tile_stored(3, sums[16] + kFloats, kStride);
    for (int r = 0; r < kRows; ++r) {
      const int32_t start = x.starts[first + r * size.groups];
      finish(r, load_raw<Ints>(sums[r]) + start, load_raw<Ints>(sums[r] + kFloats) + start);
    }
#else
    Ints sums[kRows][2];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = Ints{} + x.starts[first + r * size.groups];
    for (; words > 0; --words, weights += 2, integers += kRows * kWordInputs) {
      const Bits low = weights[0], high = weights[1];
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        uint32_t word;
        std::memcpy(&word, integers + r * kWordInputs, sizeof word);
        const Bits factors = Bits{} + word;
        sums[r][0] = add_products(sums[r][0], low, factors);
        sums[r][1] = add_products(sums[r][1], high, factors);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) finish(r, sums[r][0], sums[r][1]);
#endif
  }
}

// Adds the bias to the first `rows` rows of a tile and writes them to y.
template <class T>
void put(const QuantizedLinearParams& p, int64_t row, int64_t rows, int64_t output, const float (*tile)[kPanel]) {
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < std::min<int64_t>(kPanel, p.outputs - output); o += kFloats) {
      const int64_t n = p.outputs - output - o;
      Vec<float> y = load(tile[r] + o);
      if (bias) y += load_first(bias + output + o, n);
      store_first(static_cast<T*>(p.y) + (row + r) * p.outputs + output + o, y, n);
    }
}

// Memory that the calling thread keeps between calls: 0 for itself, the others for the threads that help.
template <class E>
E* kept_memory(int64_t count, size_t helper = 0) {
  struct Memory {
    Scratch<E> data{0};
    int64_t count = 0;
  };
  thread_local std::vector<Memory> kept;
  if (kept.size() <= helper) kept.resize(helper + 1);
  Memory& memory = kept[helper];
  if (memory.count < count) memory = {Scratch<E>(count), count};
  return memory.data.get();
}

template <class T>
void quantized_many_rows(const QuantizedLinearParams& p) {
  const Depth size(p);
  const int64_t block = std::max<int64_t>(1, kBlockBytes / (size.depth * kRows * kIntegerBytes + 1)) * kRows;
  const int64_t padded = std::min(block, round_up(p.rows, kRows)), panels = ceil_div(p.outputs, kPanel);
  const RoundedRows x{kept_memory<Integer>(padded * size.depth), kept_memory<float>(padded * size.groups),
                      kept_memory<int32_t>(padded * size.groups)};
  for (int64_t begin = 0; begin < p.rows; begin += block) {
    const int64_t rows = std::min(block, p.rows - begin), tiles = ceil_div(rows, kRows);
    parallel_jobs(tiles, static_cast<double>(rows * p.inputs), [&] {
      return [&](int64_t tile) {
        for (int64_t r = tile * kRows; r < (tile + 1) * kRows; ++r) {  // the last tile repeats the last row
          const int64_t row = begin + std::min(r, rows - 1);
          round_row(static_cast<const T*>(p.x) + row * p.inputs, size, p.is_int4, r, x);
        }
      };
    });
    // Each panel is one job or, if there are too few panels for the threads, several jobs that share the tiles.
    const int64_t parts = std::min(tiles, ceil_div(4 * num_threads(), std::max<int64_t>(1, panels)));
    size_t helper = 0;
    parallel_jobs<TileRegisters>(panels * parts, static_cast<double>(rows * p.inputs * p.outputs), [&] {
      ++helper;
      const Panel panel{kept_memory<Bits>(size.depth / kWordInputs * 2, helper),
                        kept_memory<float>(size.groups * kPanel, helper)};
      return [&, panel](int64_t job) {
        const int64_t output = job / parts * kPanel, part = job % parts;
        pack(p, size, output, panel);
        for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
          alignas(64) float sums[kRows][kPanel];
          multiply_tile(size, x, tile * kRows, panel, sums);
          put<T>(p, begin + tile * kRows, std::min<int64_t>(kRows, rows - tile * kRows), output, sums);
        }
      };
    });
  }
}

}  // namespace

void quantized_many_rows_cpu(const QuantizedManyRowsParams& p) {
  switch (p.dtype) {  // all types, also in code for bfloat16
    case DType::f32: return quantized_many_rows<float>(p);
    case DType::bf16: return quantized_many_rows<bf16>(p);
    default: return quantized_many_rows<fp16>(p);
  }
}

}  // namespace megalodon::MEGALODON_ISA
