// Products of many rows of x with weights of 8 or 4 bits, as sums of integers. x is rounded to 8 bits first.
//
//   a_t = max_i |x_ti| / 127,  p_ti = round(x_ti / a_t),  y_to = a_t s_o (sum_i p_ti q_oi) + b_o
//
// The sums of kPartInputs inputs are exact in integers of 32 bits; a longer sum adds several such parts in float. A row
// with NaN or an infinity has a scale of NaN, so its outputs are NaN.
//
// Weights of 4 bits, r_oi with a scale c_og for each group g of 32 inputs, are rounded to 8 bits with one scale for a
// row when they are packed. Integers of 16 bits suffice for the second line.
//
//   s_o = 8 max_g |c_og| / 127,  m_og = round(256 c_og / s_o)
//   q_oi = floor((r_oi m_og + 128) / 256), in [-127, 127]
//
// A word is the operand of one lane: neighbouring inputs, kWordInputs of them. A lane has 32 bits; SMMLA's have 64, two
// in a vector. A job has a panel (gemm.h): two vectors of outputs. It packs the panel's weights in its L2, a row of
// words for each word of the depth, then multiplies it by all rows of x, a tile of kRows rows at a time; sums stay in
// registers. x is rounded by all threads together, into tiles that store kRows words for each word of the depth. No
// result depends on the number of threads.
//
//   instruction set      word            product of two words            tile
//   v4_amx               4 of 8 bits     TDPBSUD, 16 x 16 x 16 words     32 rows x 2 vectors
//   v4_vnni, v3_vnni     4 of 8 bits     VPDPBUSD                        12 x 2, 6 x 2
//   v4, v3, v2           2 of 16 bits    VPMADDWD and VPADDD             12 x 2, 6 x 2
//   neon_i8mm            8 of 8 bits     SMMLA, 2 x 2 words              12 x 2
//   neon_dot             4 of 8 bits     SDOT                            12 x 2
//   others               2 of 16 bits    two multiply-adds               12 x 2
//
// VPDPBUSD and TDPBSUD multiply unsigned by signed integers. For them the weights are stored as q + kOffset, and
// -kOffset sum_i p_ti is added to each sum.

#include "quantized_linear.h"

#include <algorithm>
#include <cfloat>

#include "panels.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int kFloats = kLanes<float>, kPanel = 2 * kFloats;  // outputs of a vector, and of a panel
constexpr int64_t kPartInputs = 1 << 16;           // 127 * 255 * 2^16 < 2^31
constexpr int64_t kBlockBytes = int64_t{4} << 20;  // of rounded rows of x; they share the last-level cache
using Ints = VecOf<int32_t, kFloats>::type;

#if defined(__ARM_FEATURE_MATMUL_INT8)
using Lane = double;  // as wide as a word
#else
using Lane = float;
#endif
#if defined(__ARM_FEATURE_DOTPROD)
using Integer = int8_t;
constexpr int kOffset = 0;
#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)
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

constexpr int kIntegerBytes = sizeof(Integer), kWordInputs = sizeof(Lane) / kIntegerBytes;
constexpr int kVectors = kPanel / kLanes<Lane>;  // of words, in a row of a panel
#if defined(__AMX_INT8__)
constexpr int kRows = 32;
constexpr int64_t kDepthPadding = 64;
#else
constexpr int kRows = kRegisters == 32 ? 12 : 6;
constexpr int64_t kDepthPadding = kFloats * kWordInputs;

// Adds the products of a word of each row of x and a panel's row of words. With SMMLA, sums[r][j] and sums[r + 1][j], r
// even, are each a square of these two rows and two outputs.
MEGALODON_INLINE void add_row_of_words(Ints (&sums)[kRows][2], const Bits* weights, const Integer* x) {
#if defined(__ARM_FEATURE_DOTPROD)
  constexpr int kStep = kVectorBytes / sizeof(Lane);  // rows in a vector of x
  int8x16_t weight[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) weight[v] = bit_cast<int8x16_t>(weights[v]);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; r += kStep) {
    const auto rows = load_raw<int8x16_t>(x + r * kWordInputs);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
      Ints& sum = sums[r + v % 2][v / 2];
      sum = bit_cast<Ints>(vmmlaq_s32(bit_cast<int32x4_t>(sum), rows, weight[v]));
#else
      const auto add = [&](Ints& sum, auto lane) __attribute__((always_inline)) {
        sum = bit_cast<Ints>(vdotq_laneq_s32(bit_cast<int32x4_t>(sum), weight[v], rows, decltype(lane)::value));
      };
      add(sums[r][v], std::integral_constant<int, 0>{});
      add(sums[r + 1][v], std::integral_constant<int, 1>{});
      add(sums[r + 2][v], std::integral_constant<int, 2>{});
      add(sums[r + 3][v], std::integral_constant<int, 3>{});
#endif
    }
#if defined(__ARM_FEATURE_MATMUL_INT8)
    if (r % 4 == 2) asm volatile("" ::: "memory");  // else GCC loads all rows first, and sums leave the registers
#endif
  }
#else
  const Bits low = weights[0], high = weights[1];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    uint32_t word;
    std::memcpy(&word, x + r * kWordInputs, sizeof word);
    const Bits factors = Bits{} + word;
    sums[r][0] = add_products(sums[r][0], low, factors);
    sums[r][1] = add_products(sums[r][1], high, factors);
  }
#endif
}
#endif

// Sizes of the depth: `inputs` padded to `depth`, in `parts` parts of kPartInputs inputs; the last may be shorter.
// `factors` is the number of groups of int4, padded to vectors.
struct Depth {
  int64_t inputs, depth, parts, factors;

  explicit Depth(const QuantizedWeight& w)
      : inputs(w.inputs),
        depth(round_up(inputs, w.is_int4 ? kInt4Block : kDepthPadding)),
        parts(std::max<int64_t>(1, ceil_div(depth, kPartInputs))),
        factors(w.is_int4 ? round_up(depth / kInt4Group, kFloats) : 0) {}

  int64_t end_of(int64_t part) const { return std::min((part + 1) * kPartInputs, depth); }
};

// Rounded rows of x. Element i of row r is at place(r, i).
struct RoundedRows {
  Integer* integers;  // (rows / kRows, depth / kWordInputs, kRows, kWordInputs); with AMX (rows, depth)
  float* scales;      // (rows)
  int32_t* starts;    // (rows, parts): -kOffset times the sum of the part's integers

  static int64_t place(int64_t r, int64_t i, int64_t depth) {
#if defined(__AMX_INT8__)
    return r * depth + i;
#else
    return r / kRows * kRows * depth + (i / kWordInputs * kRows + r % kRows) * kWordInputs + i % kWordInputs;
#endif
  }
};

// The integers nearest to x, up to 2^15, in the low bits of each lane: float's spacing at 1.5 * 2^23 is 1.
MEGALODON_INLINE Bits nearest(Vec<float> x) { return bit_cast<Bits>(x + 0x1.8p23f); }

// Returns the largest magnitude of x_0, ..., x_n-1, divided by `divisor`; NaN if an element is not finite.
template <class T>
float scale_of(const T* x, int64_t n, float divisor) {
  Bits largest{};
  for (int64_t i = 0; i < n; i += kFloats) {
    const Bits magnitude = bit_cast<Bits>(load_first(x + i, n - i)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  uint32_t bits = 0;
  for (int i = 0; i < kFloats; ++i) bits = std::max(bits, largest[i]);
  return bits >= 0x7f800000 ? __builtin_nanf("") : std::max(bit_cast<float>(bits) / divisor, FLT_MIN);
}

template <class T>
void round_row(const T* x, const Depth& size, int64_t row, const RoundedRows& to) {
  const auto inputs_at = [&](int64_t i) {
    return i < size.inputs ? load_first(x + i, size.inputs - i) : zeros<float>();
  };
  const float scale = to.scales[row] = scale_of(x, size.inputs, 127.0f);
  for (int64_t part = 0; part < size.parts; ++part) {
    Ints sum{};
    for (int64_t i = part * kPartInputs; i < size.end_of(part); i += kFloats) {
      const Bits rounded = nearest(inputs_at(i) / splat(scale));
      sum += bit_cast<Ints>(rounded << 16) >> 16;
      using Narrow = typename VecOf<std::make_unsigned_t<Integer>, kFloats>::type;
      const Narrow narrow = __builtin_convertvector(rounded, Narrow);
#if defined(__AMX_INT8__)
      store_raw(to.integers + RoundedRows::place(row, i, size.depth), narrow);
#else
      constexpr int kCopied = std::min(kFloats, kWordInputs), kWords = kFloats / kCopied;  // inputs of one word; words
      Integer words[kWords][kCopied];
      std::memcpy(words, &narrow, sizeof words);
      Integer* place = to.integers + RoundedRows::place(row, i, size.depth);
      for (int w = 0; w < kWords; ++w, place += kRows * kWordInputs) std::memcpy(place, words[w], sizeof words[w]);
#endif
    }
    int32_t total = 0;
    for (int i = 0; i < kFloats; ++i) total += sum[i];
    to.starts[row * size.parts + part] = -kOffset * total;
  }
}

// A panel's weights (depth / kWordInputs, kPanel) and scales (kPanel). With int4 also m_og (kPanel, factors).
struct Panel {
  Bits* words;
  float* scales;
  int16_t* factors;
};

// The scale of a row of w, of 8 bits.
float row_scale(const QuantizedWeight& p, const Depth& size, int64_t row) {
  if (row >= p.outputs || p.inputs == 0) return 0;
  if (!p.is_int4) return static_cast<const float*>(p.scale)[row];
  const int64_t groups = size.depth / kInt4Group;
  return scale_of(static_cast<const bf16*>(p.scale) + row * groups, groups, 127.0f / 8);
}

// Writes m_og of a row of int4.
void row_factors(const QuantizedWeight& p, const Depth& size, int64_t row, float row_scale, int16_t* to) {
  using Halves = VecOf<uint16_t, kFloats>::type;
  const int64_t groups = size.depth / kInt4Group;
  const bf16* scales = static_cast<const bf16*>(p.scale) + row * groups;
  for (int64_t g = 0; g < groups; g += kFloats) {
    const Vec<float> quotient = load_first(scales + g, groups - g) / splat(row_scale);
    store_raw(to + g, __builtin_convertvector(nearest(256 * quotient), Halves));
  }
}

// Rounds a block of int4 (quantized_linear.h), whose groups have these factors, to integers of 8 bits.
MEGALODON_INLINE void round_int4(const char* block, const int16_t* factors, int8_t* to) {
  using Shorts = VecOf<int16_t, kInt4Group>::type;
  using Bytes = VecOf<int8_t, kInt4Group>::type;
  const auto words = load_raw<Shorts>(block);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    store_raw(to + kInt4Group * j,
              __builtin_convertvector(((words << (12 - 4 * j) >> 12) * factors[j] + 128) >> 8, Bytes));
}

// Loads a vector of words from weights of 8 bits.
MEGALODON_INLINE Bits load_words(const int8_t* from) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
  return load_raw<Bits>(from) ^ kOffset * 0x01010101u;
#else
  using Narrow = VecOf<int8_t, 2 * kFloats>::type;
  using Wide = VecOf<int16_t, 2 * kFloats>::type;
  return bit_cast<Bits>(__builtin_convertvector(load_raw<Narrow>(from), Wide));
#endif
}

// Packs the panel of outputs from `output` on; outputs beyond the last one are zero.
void pack(const QuantizedWeight& p, const Depth& size, int64_t output, const Panel& to) {
  constexpr int kSide = kLanes<Lane>;
  constexpr int64_t kStep = kSide * kWordInputs;  // inputs of a square of words
  static_assert(kInt4Block % kStep == 0);
  const int64_t step = p.is_int4 ? kInt4Block : kStep, row_bytes = p.is_int4 ? size.depth / 2 : p.inputs;
  for (int o = 0; o < kPanel; ++o) {
    to.scales[o] = row_scale(p, size, output + o);
    if (p.is_int4 && output + o < p.outputs)
      row_factors(p, size, output + o, to.scales[o], to.factors + o * size.factors);
  }
  for (int vector = 0; vector < kVectors; ++vector)
    for (int64_t i = 0; i < size.depth; i += step) {
      int8_t buffer[kSide][kInt4Block];
      const int8_t* rows[kSide];
      for (int o = 0; o < kSide; ++o) {
        const int64_t row = output + vector * kSide + o, left = p.inputs - i;
        const char* from = static_cast<const char*>(p.weight) + row * row_bytes + (p.is_int4 ? i / 2 : i);
        rows[o] = buffer[o];
        if (row >= p.outputs) std::fill_n(buffer[o], step, int8_t{});
        else if (p.is_int4)
          round_int4(from, to.factors + (vector * kSide + o) * size.factors + i / kInt4Group, buffer[o]);
        else if (left >= step) rows[o] = reinterpret_cast<const int8_t*>(from);
        else std::fill(std::copy_n(from, std::max<int64_t>(left, 0), buffer[o]), buffer[o] + step, int8_t{});
      }
      for (int64_t at = 0; at < step; at += kStep) {
        Vec<Lane> square[kSide];
#pragma GCC unroll 16
        for (int o = 0; o < kSide; ++o) square[o] = bit_cast<Vec<Lane>>(load_words(rows[o] + at));
        transpose<Lane>(square);
        Bits* words = to.words + (i + at) / kWordInputs * kVectors + vector;
#pragma GCC unroll 16
        for (int w = 0; w < kSide; ++w) words[kVectors * w] = bit_cast<Bits>(square[w]);
      }
    }
}

// Sets a tile of y, in float and without the bias, from kRows rounded rows of x, from `row` on, and a panel.
__attribute__((noinline)) void multiply_tile(const Depth& size, const RoundedRows& x, int64_t row, const Panel& panel,
                                             float (*tile)[kPanel]) {
  const Integer* integers = x.integers + row * size.depth;
  const Bits* weights = panel.words;
  const Vec<float> scale[2] = {load(static_cast<const float*>(panel.scales)),
                               load(static_cast<const float*>(panel.scales) + kFloats)};
  for (int64_t part = 0; part < size.parts; ++part) {
    const int32_t* starts = x.starts + row * size.parts + part;
    // y += a_t s_o times the integers.
    const auto finish = [&](int r, Ints low, Ints high) __attribute__((always_inline)) {
      const Vec<float> factor = splat(x.scales[row + r]);
      const int32_t start = starts[r * size.parts];
      const Vec<float> a = __builtin_convertvector(low + start, Vec<float>) * scale[0] * factor;
      const Vec<float> b = __builtin_convertvector(high + start, Vec<float>) * scale[1] * factor;
      store(tile[r], part > 0 ? load(static_cast<const float*>(tile[r])) + a : a);
      store(tile[r] + kFloats, part > 0 ? load(static_cast<const float*>(tile[r]) + kFloats) + b : b);
    };
    int64_t words = (size.end_of(part) - part * kPartInputs) / kWordInputs;
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
    for (int r = 0; r < kRows; ++r) finish(r, load_raw<Ints>(sums[r]), load_raw<Ints>(sums[r] + kFloats));
#else
    Ints sums[kRows][2] = {};
    for (; words > 0; --words, weights += kVectors, integers += kRows * kWordInputs)
      add_row_of_words(sums, weights, integers);
#if defined(__ARM_FEATURE_MATMUL_INT8)
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {  // the rows of each square
      Ints &even = sums[i / 2 * 2][i % 2], &odd = sums[i / 2 * 2 + 1][i % 2];
      Vec<Lane> square[2] = {bit_cast<Vec<Lane>>(even), bit_cast<Vec<Lane>>(odd)};
      transpose<Lane>(square);
      even = bit_cast<Ints>(square[0]);
      odd = bit_cast<Ints>(square[1]);
    }
#endif
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
  // Rows of x that are rounded, then multiplied, before the next ones.
  const int64_t block = std::max<int64_t>(1, kBlockBytes / (size.depth * kRows * kIntegerBytes + 1)) * kRows;
  const int64_t padded = std::min(block, round_up(p.rows, kRows)), panels = ceil_div(p.outputs, kPanel);
  const RoundedRows x{kept_memory<Integer>(padded * size.depth), kept_memory<float>(padded),
                      kept_memory<int32_t>(padded * size.parts)};
  for (int64_t begin = 0; begin < p.rows; begin += block) {
    const int64_t rows = std::min(block, p.rows - begin), tiles = ceil_div(rows, kRows);
    parallel_jobs(tiles, static_cast<double>(rows * p.inputs), [&] {
      return [&](int64_t tile) {
        for (int64_t r = tile * kRows; r < (tile + 1) * kRows; ++r) {  // the last tile repeats the last row
          const int64_t row = begin + std::min(r, rows - 1);
          round_row(static_cast<const T*>(p.x) + row * p.inputs, size, r, x);
        }
      };
    });
    // Each panel is one job or, if there are too few panels for the threads, several jobs that share the tiles.
    const int64_t shares = std::min(tiles, ceil_div(4 * num_threads(), std::max<int64_t>(1, panels)));
    size_t helper = 0;
    parallel_jobs<TileRegisters>(panels * shares, static_cast<double>(rows * p.inputs * p.outputs), [&] {
      ++helper;
      const Panel panel{kept_memory<Bits>(size.depth / kWordInputs * kVectors, helper),
                        kept_memory<float>(kPanel, helper),
                        kept_memory<int16_t>(kPanel * size.factors, helper)};
      return [&, panel](int64_t job) {
        const int64_t output = job / shares * kPanel, share = job % shares;
        pack(p, size, output, panel);
        for (int64_t tile = tiles * share / shares; tile < tiles * (share + 1) / shares; ++tile) {
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
