// Instructions behind the wrappers of cuda/common: vector accesses, cp.async, ldmatrix, mma.sync, with the layouts of
// the PTX manual.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "state.h"

namespace emu {
namespace {

#define EMU_RETURN_ADDRESS __builtin_return_address(0)

// Reports a misaligned address, on which the instruction then does nothing; on a GPU it ends the program.
bool misaligned(const void* p, size_t size, const char* what, const void* address) {
  if (reinterpret_cast<uintptr_t>(p) % size == 0) return false;
  const std::string bytes = std::to_string(size);
  report("misaligned", std::string(what) + " of " + bytes + " bytes at an address that is not a multiple of " + bytes,
         address);
  return true;
}

bool on_device(const void* p) {
  return static_cast<size_t>(static_cast<const char*>(p) - arena) < kArenaBytes + kSparseBytes;
}

void check_space(const void* p, Space space, const char* what, const void* address) {
  if (!on_device(p)) return;  // access() reports it
  const bool shared = is_shared(static_cast<const char*>(p) - arena);
  if (shared && space == Space::global)
    report("wrong memory", std::string(what) + " of global memory at an address of shared memory", address);
  if (!shared && space == Space::shared)
    report("wrong memory", std::string(what) + " of shared memory at an address of global memory", address);
}

float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float half_to_float(uint32_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                         : std::ldexp(static_cast<float>(exponent ? 1024 + mantissa : mantissa),
                                                      (exponent ? exponent : 1) - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

struct Operands {
  uint32_t a[4], b[2];
  float d[4];
};
static_assert(sizeof(Operands) <= kSlotBytes);

// A sum of products as an A100 computes it, the least accurate of the cards (docs/numerics.md): a sum before and 8 exact
// products (4 of tf32) are cut at 2^-24 of the power of two of the largest; their sum is cut to float32.
class TruncatedSum {
 public:
  struct Factor {
    float value;
    int significand, exponent;  // value is significand 2^(exponent - 23)
  };
  static Factor factor(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const int field = bits >> 23 & 255, significand = (bits & 0x7fffff) | (field ? 0x800000 : 0);
    return {value, bits >> 31 ? -significand : significand, std::max(field, 1) - 127};
  }

  explicit TruncatedSum(float sum) { add(factor(sum), {1.0f, 1 << 23, 0}); }

  void add(const Factor& a, const Factor& b) {
    rounded_ += a.value * b.value;
    const int64_t significand = int64_t{a.significand} * b.significand;  // 46 bits after the point
    if (!significand) return;
    terms_[count_++] = {significand, a.exponent + b.exponent};
    exponent_ = std::max(exponent_, a.exponent + b.exponent);
  }

  float value() const {
    if (!std::isfinite(rounded_)) return rounded_;
    int64_t sum = 0;  // 24 bits after the point
    for (int i = 0; i < count_; ++i) sum += cut(terms_[i].significand, 22 + exponent_ - terms_[i].exponent);
    if (sum == 0) return 0;
    const int extra = std::max(40 - __builtin_clzll(std::abs(sum)), 0);  // bits beyond the 24 of a float
    return std::ldexp(static_cast<float>(cut(sum, extra)), exponent_ - 24 + extra);
  }

 private:
  struct Term {
    int64_t significand;
    int exponent;
  };
  static int64_t cut(int64_t value, int bits) {
    if (bits > 62) return 0;
    return value < 0 ? -(-value >> bits) : value >> bits;
  }

  float rounded_ = 0;
  Term terms_[9];
  int count_ = 0, exponent_ = -1000;
};

// Elements of a register: two of 16 bits, or one tf32, whose low 13 bits the hardware ignores.
void unpack(Mma type, uint32_t bits, TruncatedSum::Factor* element) {
  if (type == Mma::tf32) return void(element[0] = TruncatedSum::factor(as_float(bits & 0xffffe000)));
  for (int i = 0; i < 2; ++i) {
    const uint32_t half = bits >> 16 * i & 0xffff;
    element[i] = TruncatedSum::factor(type == Mma::bf16 ? as_float(half << 16) : half_to_float(half));
  }
}

// Row and column of element e, 0 or 1, in register i of a lane: the table of matrix.cuh.
struct Coordinates {
  int row, column;
};
Coordinates coordinates_of(Operand operand, size_t element_size, int lane, int i, int e) {
  const int g = lane / 4, t = lane % 4;
  if (operand == Operand::a)
    return {g + 8 * (i % 2), element_size == 2 ? 2 * t + 8 * (i / 2) + e : t + 4 * (i / 2)};
  return {element_size == 2 ? 2 * t + 8 * i + e : t + 4 * i, g};
}

// Returns true if half e of a register, or the register as tf32 (truncated or rounded), is the element at `p`.
bool holds(uint32_t bits, size_t element_size, int e, const void* p) {
  uint32_t element = 0;
  if (p) std::memcpy(&element, p, element_size);
  if (element_size == 2) return (bits >> 16 * e & 0xffff) == element;
  return bits >> 13 == element >> 13 || bits == ((element + 0x1000) & 0xffffe000);
}

}  // namespace

__attribute__((noinline)) void load(void* to, const void* from, size_t size, Space space) {
  const void* address = EMU_RETURN_ADDRESS;
  if (misaligned(from, size, "load", address)) return void(std::memset(to, 0xff, size));
  check_space(from, space, "load", address);
  access(from, size, Access::read, address);
  std::memcpy(to, from, size);
}

__attribute__((noinline)) void store(void* to, const void* from, size_t size, Space space) {
  const void* address = EMU_RETURN_ADDRESS;
  if (misaligned(to, size, "store", address)) return;
  check_space(to, space, "store", address);
  access(to, size, Access::write, address);
  std::memcpy(to, from, size);
}

__attribute__((noinline)) void cp_async(void* to, const void* from, int size, int valid) {
  const void* address = EMU_RETURN_ADDRESS;
  if (misaligned(to, size, "destination of a cp_async", address)) return;
  if (misaligned(from, size, "source of a cp_async", address)) return;
  if (!on_device(to) || !is_shared(static_cast<char*>(to) - arena))
    return report("wrong memory", "cp_async to an address outside shared memory", address);
  check_space(from, Space::global, "cp_async", address);
  if (valid) access(from, valid, Access::read, address);
  // The copy may land at any time from now on, so it must be ordered after earlier accesses of other threads.
  access(to, size, Access::write, address);
  set_in_flight(static_cast<char*>(to) - arena, size, true);
  current->open_copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), size, valid, address});
}

void cp_async_commit() {
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void cp_async_wait(int pending) {
  auto& groups = current->copy_groups;
  for (; groups.size() > static_cast<size_t>(pending); groups.pop_front())
    for (const AsyncCopy& copy : groups.front()) {
      const size_t offset = copy.to - arena;
      set_in_flight(offset, copy.size, false);
      if (copy.valid && !on_device(copy.from)) continue;
      if (copy.valid) std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(copy.to + copy.valid, 0, copy.size - copy.valid);
      check_race(offset, copy.size, Access::write, copy.address);
      const size_t from = copy.from - arena;
      if (copy.valid && !is_sparse(from)) check_race(from, copy.valid, Access::read, copy.address);
    }
}

__attribute__((noinline)) void ldmatrix(uint32_t* r, int count, const void* row, bool transposed) {
  const void* address = EMU_RETURN_ADDRESS;
  unsigned char bytes[16] = {};
  if (current->lane < 8 * count && !misaligned(row, 16, "a row of an ldmatrix", address)) {
    check_space(row, Space::shared, "ldmatrix", address);
    access(row, 16, Access::read, address);
    std::memcpy(bytes, row, 16);
  }
  const unsigned char* rows = exchange(~0u, bytes, 16, "ldmatrix", {address, nullptr, 0});
  const int major = current->lane / 4, minor = current->lane % 4 * 2;
  for (int m = 0; m < count; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int j = transposed ? minor + i : major, column = transposed ? major : minor + i;
      std::memcpy(&pair[i], rows + (8 * m + j) * kSlotBytes + 2 * column, 2);
    }
    r[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

__attribute__((noinline)) void mma(Mma type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Operands mine;
  std::copy_n(a, 4, mine.a);
  std::copy_n(b, 2, mine.b);
  std::copy_n(d, 4, mine.d);
  const unsigned char* lanes = exchange(~0u, &mine, sizeof mine, "mma", {EMU_RETURN_ADDRESS, nullptr, 0});
  const auto operands = [&](int lane) { return reinterpret_cast<const Operands*>(lanes + lane * kSlotBytes); };
  // A register holds `width` neighbours in k; four lanes hold a stripe of 4 width, and there are two stripes.
  const int group = current->lane / 4, in_group = current->lane % 4, width = type == Mma::tf32 ? 1 : 2;
  TruncatedSum::Factor x[2][16], y[2][16];  // the rows of A and the columns of B for this lane's four sums
  for (int stripe = 0; stripe < 2; ++stripe)
    for (int t = 0; t < 4; ++t)
      for (int half = 0; half < 2; ++half) {
        const int k = (4 * stripe + t) * width;
        unpack(type, operands(group * 4 + t)->a[half + 2 * stripe], x[half] + k);
        unpack(type, operands((in_group * 2 + half) * 4 + t)->b[stripe], y[half] + k);
      }
  for (int i = 0; i < 4; ++i)
    for (int stripe = 0; stripe < 2; ++stripe) {
      TruncatedSum sum(d[i]);
      for (int k = 4 * width * stripe; k < 4 * width * (stripe + 1); ++k) sum.add(x[i / 2][k], y[i % 2][k]);
      d[i] = sum.value();
    }
}

// Reads elements without checks, like a debugger: their load has been checked.
__attribute__((noinline)) void check_fragment(Operand operand, size_t element_size, const uint32_t* registers,
                                              ElementAt element, const void* functor) {
  const char name = operand == Operand::a ? 'a' : 'b';
  for (int i = 0; i < (operand == Operand::a ? 4 : 2); ++i)
    for (int e = 0; e < static_cast<int>(4 / element_size); ++e) {
      const auto [row, column] = coordinates_of(operand, element_size, current->lane, i, e);
      const void* p = element(functor, row, column);
      if (holds(registers[i], element_size, e, p)) continue;
      const std::string place = "row " + std::to_string(row) + ", column " + std::to_string(column);
      const std::string source = !p             ? "zero"
                                 : on_device(p) ? describe(static_cast<const char*>(p) - arena)
                                                : "not device memory";
      return report("wrong mma fragment",
                    std::string(1, name) + "[" + std::to_string(i) + "] is not the element of " + place + ", " + source,
                    EMU_RETURN_ADDRESS);
    }
}

}  // namespace emu
