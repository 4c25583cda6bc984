// CEMA, of N complex states (modes) per channel: what the kernels share. Derivation: ops/cema/cema_reference.py. The
// kernels: the scan, cema_scan.cuh or, on tensor cores, cema_mma_scan.cuh; the backward's sums, cema_bwd.cuh or
// cema_mma.cuh. Short sequences have a kernel of their own, cema_step.cuh.
//
//   u_t = q u_{t-1} + x_t      h = p u      y_t = Re(sum_n c_n u_t[n]) + omega x_t,  c = gamma p
//
// The adjoint is the same scan against time: r_t = q r_{t+1} + dy_t. The gradient of h is conj(gamma r), and dx_t =
// Re(sum_n c_n r_t[n]) + omega dy_t. A `Scan` is the forward's or the adjoint. Its positions 0 .. T - 1 are in its own
// order, so position 0 of the adjoint is the last token.
//
// The flat row of T tokens is cut into tiles of `tile` positions; a tile may hold several sequences.
//   1. table:   for each mode and channel the coefficients, and matrices that advance a state by 1 and by 8 tiles
//   2. local:   the state at each tile's end, from zero or, if a sequence starts in the tile, from its start
//   3. carry:   states at each tile's end -> states that enter each tile; a start inside a tile stops the carry, that
//               is, what enters the tile has no part in the state at its end
//   4. output:  from the entering states the rows of y, or of dx, and the end states of sequences
// The backward adds up its parameters' gradients from both scans' entering states: cema_bwd.cuh, cema_mma.cuh.
//
// Bytes: x is read in phases 2 and 4, y is written once; states are 8 N / tile bytes per channel and position.
//
// Basis. A state u is stored as a pair of reals, second = Im(u) / Im(q) and first = Re(u) + shear second. A step then
// takes 3 multiply-adds instead of 4:
//
//   first' = alpha first + beta second + x     second' = first + delta second
//   alpha = Re(q) + shear     delta = Re(q) - shear     beta = -(Im(q)^2 + shear^2)
//
// This matrix has the eigenvalues q and conj(q): its trace is 2 Re(q), its determinant |q|^2. The step is as stable as
// a complex product: each number of the pair is rounded relative to its own size.
//
// Why a shear: with shear 0, rounding beta = -Im(q)^2 to float turns q by up to 2^-25, at every position in the same
// direction. So beta is rounded first, and the shear, at most |Im(q)| / 2000, makes up for the difference. The rounded
// coefficients then multiply by q to within 2^-35.
//
// Why fma: if q is near 1, so are alpha and delta, and the state changes little from a position to the next. A product
// that is rounded alone would have nearly the same error each time, and these errors would add up.
//
// Given states are divided by p (in the adjoint by gamma) and by Im(q). So if there are any, a size of p or gamma below
// kLeastScale counts as kLeastScale, one of Im(q) below kLeastPhase as kLeastPhase. In float32 this changes p x by at
// most 2^-32 |x|, gamma by 2^-32 and q by 2^-44: less than the rounding errors of the states.
#pragma once

#include "cema_arrays.cuh"
#include "vec.cuh"

namespace megalodon {
namespace cema {

constexpr int kThreads = 128;   // per block, or fewer if there are few channels
constexpr int kMostModes = 32;  // per launch; more modes are processed in groups
constexpr int kTilesPerWarp = 8;  // in cema_carry.cuh
constexpr int64_t kLeastTile = 32, kMostTile = 512;
static_assert(kLeastTile % kTilesPerWarp == 0 && (kLeastTile & (kLeastTile - 1)) == 0,
              "powers of q are taken by squaring");

template <class T> constexpr int kBatch = sizeof(T) == 2 ? 8 : 4;   // positions whose inputs are loaded at once
template <class R> constexpr int kBlocks = sizeof(R) == 4 ? 3 : 1;  // least number per SM
template <class R> constexpr double kLeastScale = sizeof(R) == 4 ? 0x1p-32 : 0x1p-200;
template <class R> constexpr double kLeastPhase = sizeof(R) == 4 ? 0x1p-44 : 0x1p-200;

// The positions [begin, end) of one sequence, or of the padding between two, up to `to`.
struct Run {
  int64_t end;
  int sequence;  // or -1: padding
  bool starts;   // `begin` is the first position of the entire sequence

  GPU_INLINE Run(const Scan& scan, int64_t begin, int64_t to) {
    // The first sequence, in the scan's order, that ends after `begin`.
    const int count = static_cast<int>(scan.sequences.count);
    const auto nth_sequence = [&](int i) { return scan.reverse ? count - 1 - i : i; };
    int low = 0;
    for (int high = count; low < high;) {
      const int middle = low + (high - low) / 2;
      if (scan.sequence_end(nth_sequence(middle)) > begin) high = middle;
      else low = middle + 1;
    }
    const int64_t first = low < count ? scan.sequence_begin(nth_sequence(low)) : to;
    sequence = first <= begin ? nth_sequence(low) : -1;
    starts = first == begin;
    end = sequence < 0 ? first : scan.sequence_end(sequence);
    end = end > begin && end < to ? end : to;  // a run has a position even if spans overlap
  }
  GPU_INLINE bool ends(const Scan& scan) const { return scan.sequence_end(sequence) == end; }
};

// What a thread works on: a tile, two channels, and some of the modes. Neighbouring lanes take the other modes of the
// same two channels.
struct Place {
  int64_t tile, channel;  // channel: the first of the two
  int first_mode, part;   // the first of the thread's modes; the number of the thread among those of the two channels
  bool active;            // the first channel exists
  bool has_second;        // both channels exist
};

GPU_INLINE Place place(const Scan& scan, int modes) {
  const unsigned split = static_cast<unsigned>(scan.lanes / modes);        // threads of two channels
  const unsigned blocks = gridDim.x / static_cast<unsigned>(scan.tiles);   // of a tile
  const unsigned thread = blockIdx.x % blocks * blockDim.x + threadIdx.x;  // of the tile
  const int64_t channel = int64_t{thread / split} * 2;
  const int part = static_cast<int>(thread % split);
  const bool active = channel < scan.width;
  return {int64_t{blockIdx.x / blocks}, active ? channel : 0, part * modes, part, active,
          active && channel + 1 < scan.channels};
}

// Loads two channels of n rows, which are `step` elements apart. `whole`: both channels in one access.
template <int n, class T>
GPU_INLINE void load_rows(Compute<T> (&to)[n][2], const T* from, int64_t step, bool whole, bool has_second) {
  if (whole) {
    GPU_UNROLL
    for (int i = 0; i < n; ++i, from += step) gpu::load(to[i], from);
  } else {
    GPU_UNROLL
    for (int i = 0; i < n; ++i, from += step) {
      to[i][0] = gpu::to_real(from[0]);
      to[i][1] = has_second ? gpu::to_real(from[1]) : 0;
    }
  }
}

// The basis of one mode and channel: it converts complex numbers to pairs and back.
template <class R>
struct Basis {
  gpu::Complex<R> q, gamma;
  R p, shear, phase;  // phase: Im(q), of a size of at least kLeastPhase if states are given
  bool adjoint;

  // Address of a basis in the table.
  GPU_INLINE static R* address(const Scan& scan, int64_t mode, int64_t channel) {
    return scan.plane<R>(kPlanes) + (mode * scan.width + channel) * kBasis;
  }
  Basis() = default;
  GPU_INLINE Basis(const Scan& scan, int64_t mode, int64_t channel) : adjoint(scan.reverse) {
    R value[kBasis];
    gpu::load_wide(value, address(scan, mode, channel));
    q = {value[0], value[1]};
    gamma = {value[2], value[3]};
    p = value[4];
    shear = value[5];
    phase = value[6];
  }
  GPU_INLINE void store(const Scan& scan, int64_t mode, int64_t channel) const {
    R* const to = address(scan, mode, channel);
    const R low[4] = {q.re, q.im, gamma.re, gamma.im}, high[4] = {p, shear, phase, 0};
    for (int i = 0; i < 4; ++i) {
      to[i] = low[i];
      to[4 + i] = high[i];
    }
  }
  GPU_INLINE Pair<R> to_pair(gpu::Complex<R> z) const {
    const R second = z.im / phase;
    return {z.re + shear * second, second};
  }
  GPU_INLINE gpu::Complex<R> from_pair(Pair<R> z) const { return {z.first - shear * z.second, phase * z.second}; }
  GPU_INLINE Pair<R> multiply(Pair<R> a, Pair<R> b) const {
    const R a_re = a.first - shear * a.second, b_re = b.first - shear * b.second;
    const R second = a_re * b.second + a.second * b_re;
    return {a_re * b_re - (phase * a.second) * (phase * b.second) + shear * second, second};
  }
  // Returns what the initial state z at index `at` of (S, D, N) adds to a scan's state, as a pair; zero if `at` is -1.
  //   forward:  z = h. Before the first position (`before_step`) it adds z / p, after it q z / p.
  //   adjoint:  z = dstate_out, the gradient of the last h. After the first position it adds conj(z) / gamma.
  GPU_INLINE Pair<R> initial(const Scan& scan, int64_t at, bool before_step) const {
    if (at < 0) return {0, 0};
    const auto z = gpu::ld<gpu::Complex<R>>(scan.initial.as<R>() + at);
    if (adjoint) return to_pair((1 / (gamma.re * gamma.re + gamma.im * gamma.im)) * gpu::conj(z * gamma));
    return to_pair((1 / p) * (before_step ? z : q * z));
  }
  // Returns the final state for a pair u or r: p u, or conj(gamma q r) for the adjoint.
  GPU_INLINE gpu::Complex<R> final(Pair<R> pair) const {
    const gpu::Complex<R> z = from_pair(pair);
    return adjoint ? gpu::conj(gamma * (q * z)) : p * z;
  }
};

// Calls f(basis, slot, at) for each of the thread's modes and channels, to read or write given and final states. `at`
// is the index in an (S, D, N) tensor, or -1 if the tensor has no such mode or channel. `slot` is a place in shared
// memory for a pair: that of mode m and channel e is slots + (2 m + e) kThreads. Registers will not do: the loop is not
// unrolled, as it seldom runs, and a loop's index cannot address registers.
template <int modes, class R, class F>
GPU_INLINE void for_each_slot(const Scan& scan, const Place& place, int64_t sequence, Pair<R>* slots, F&& f) {
#pragma unroll 1
  for (int i = 0; i < 2 * modes; ++i) {
    const int64_t mode = place.first_mode + i / 2, channel = place.channel + i % 2, n = scan.first_mode + mode;
    const bool exists = place.active && n < scan.modes && channel < scan.channels;
    const Basis<R> basis(scan, mode, channel);
    f(basis, slots + i * kThreads, exists ? (sequence * scan.channels + channel) * scan.modes + n : -1);
  }
}

template <class R, int modes>
GPU_INLINE void to_slots(Pair<R>* slots, const R (&first)[modes][2], const R (&second)[modes][2]) {
  GPU_UNROLL
  for (int m = 0; m < modes; ++m) {
    GPU_UNROLL
    for (int e = 0; e < 2; ++e) gpu::st_shared(&slots[(2 * m + e) * kThreads], Pair<R>{first[m][e], second[m][e]});
  }
}

// The states of `modes` modes of two channels, as pairs, and the coefficients of their steps.
template <class R, int modes>
struct Modes {
  R first[modes][2], second[modes][2];
  R alpha[modes][2], beta[modes][2], delta[modes][2];

  GPU_INLINE Modes(const Scan& scan, const Place& place) {
    GPU_UNROLL
    for (int m = 0; m < modes; ++m) {
      const int64_t at = (place.first_mode + m) * scan.width + place.channel;
      gpu::load(alpha[m], scan.plane<R>(kAlpha) + at);
      gpu::load(beta[m], scan.plane<R>(kBeta) + at);
      gpu::load(delta[m], scan.plane<R>(kDelta) + at);
    }
    clear();
  }
  GPU_INLINE void clear() {
    GPU_UNROLL
    for (int m = 0; m < modes; ++m) first[m][0] = first[m][1] = second[m][0] = second[m][1] = 0;
  }
  GPU_INLINE void step(const R (&x)[2]) {
    GPU_UNROLL
    for (int m = 0; m < modes; ++m) {
      GPU_UNROLL
      for (int e = 0; e < 2; ++e) {
        const R before = first[m][e];
        first[m][e] = fma(alpha[m][e], before, fma(beta[m][e], second[m][e], x[e]));
        second[m][e] = fma(delta[m][e], second[m][e], before);
      }
    }
  }
  // Adds a sequence's initial state, before its first position (`before_step`) or after it: see Basis::initial.
  GPU_INLINE void enter(const Scan& scan, const Place& place, int64_t sequence, Pair<R>* slots,
                        bool before_step = false) {
    for_each_slot<modes>(scan, place, sequence, slots, [&](const Basis<R>& basis, Pair<R>* slot, int64_t at) {
      gpu::st_shared(slot, basis.initial(scan, at, before_step));
    });
    GPU_UNROLL
    for (int m = 0; m < modes; ++m) {
      GPU_UNROLL
      for (int e = 0; e < 2; ++e) {
        const auto pair = gpu::ld_shared<Pair<R>>(&slots[(2 * m + e) * kThreads]);
        first[m][e] += pair.first;
        second[m][e] += pair.second;
      }
    }
  }
  // Stores the state after a sequence's last position.
  GPU_INLINE void leave(const Scan& scan, const Place& place, int64_t sequence, Pair<R>* slots) const {
    to_slots(slots, first, second);
    for_each_slot<modes>(scan, place, sequence, slots, [&](const Basis<R>& basis, Pair<R>* slot, int64_t at) {
      const auto pair = gpu::ld_shared<Pair<R>>(slot);
      if (at >= 0) gpu::st(scan.final.as<R>() + at, basis.final(pair));
    });
  }
  // Loads the states that enter the thread's tile, two modes per access.
  GPU_INLINE void load(const Scan& scan, const Place& place) {
    GPU_UNROLL
    for (int m = 0; m < modes; m += 2) {
      GPU_UNROLL
      for (int e = 0; e < 2; ++e) {
        R both[4];
        gpu::load_wide(both, scan.state<R>(place.tile, place.first_mode + m, place.channel + e));
        GPU_UNROLL
        for (int i = 0; i < 2; ++i) {
          first[m + i][e] = both[2 * i];
          second[m + i][e] = both[2 * i + 1];
        }
      }
    }
  }
  GPU_INLINE void store(const Scan& scan, const Place& place) const {
    if (!place.active) return;
    GPU_UNROLL
    for (int m = 0; m < modes; m += 2) {
      GPU_UNROLL
      for (int e = 0; e < 2; ++e) {
        const R both[4] = {first[m][e], second[m][e], first[m + 1][e], second[m + 1][e]};
        gpu::store_wide(scan.state<R>(place.tile, place.first_mode + m, place.channel + e), both);
      }
    }
  }
};

// Host side.

// Grid of a kernel whose threads take `modes` modes of two channels of a tile. The grid's y is over `scans` scans.
struct Grid {
  dim3 blocks;
  unsigned threads;

  Grid(const Scan& scan, int modes, int scans = 1) {
    const int64_t all = ceil_div(scan.width / 2 * (scan.lanes / modes), gpu::kWarp) * gpu::kWarp;
    threads = static_cast<unsigned>(all < kThreads ? all : kThreads);
    blocks = dim3(static_cast<unsigned>(scan.tiles * ceil_div(all, threads)), static_cast<unsigned>(scans));
  }
};

// Returns true if two channels of each of these (T, D) tensors can be accessed at once.
inline bool takes_two_channels(DType dtype, int64_t channels, std::initializer_list<const void*> tensors) {
  bool all = channels % 2 == 0;
  dispatch_dtype(dtype, [&](auto type) {
    for (const void* tensor : tensors) all = all && gpu::aligned<2>(static_cast<const decltype(type)*>(tensor));
  });
  return all;
}

// Calls f with `scan` set to each group of modes.
template <class F>
void for_each_group(Scan& scan, F&& f) {
  for (scan.first_mode = 0; scan.first_mode < scan.modes; scan.first_mode += kMostModes) {
    scan.loads_sums = scan.first_mode > 0;
    scan.stores_sums = scan.first_mode + kMostModes < scan.modes;
    f();
  }
}

// In cema_scan.cu:

// Returns a scan with sizes and tiles, without tensors.
Scan make_scan(const CemaParams& params);
// Returns true if tensor cores can process two (T, D) tensors: a scan's input and output, or x and dy of the backward's
// sums.
bool takes_mma(const CemaParams& params, const Scan& scan, const void* first, const void* second);
// Returns true if tensor cores are also worth while for a scan's states and output.
bool takes_mma_output(const Scan& scan);
// Sets the tiles that the kernels on tensor cores use.
void cut_for_mma(Scan& scan);
// Return the bytes of a table, of a scan's states and stops, of `powers`, and of `sums`; all are multiples of 256.
int64_t table_bytes(const CemaParams& params);
int64_t states_bytes(const Scan& scan, DType dtype);
int64_t powers_bytes(const Scan& scan);
int64_t sums_bytes(const CemaParams& params);
// Places the states and stops of `scan` at `memory`; returns the address after them.
char* take_states(Scan& scan, DType dtype, char* memory);

// Phase 1. Fills the table of the scan's group of modes. `carried`: states, or gradients of states, are given.
void launch_table(const CemaParams& params, const Scan& scan, bool carried, void* stream);
// Phases 2 and 3. Computes the states that enter the tiles of scan a and, unless b is null, of scan b.
void launch_states(DType dtype, const Scan& a, const Scan* b, void* stream);
// Phase 4. Compute the output, or the final states alone.
void launch_output(DType dtype, const Scan& scan, void* stream);
void launch_ends(DType dtype, const Scan& scan, void* stream);
// In cema_mma_scan.cu: phases 2 and 4 of a scan that is `by_mma`.
void launch_mma_local(const Scan& scan, void* stream);
void launch_mma_output(const Scan& scan, void* stream);
// In cema_scan.cu: copies the initial states of sequences without tokens to their final states.
void launch_empty(DType dtype, const Scan& scan, void* stream);

}  // namespace cema
}  // namespace megalodon
