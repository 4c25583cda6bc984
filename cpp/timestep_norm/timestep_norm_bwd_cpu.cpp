// The backward of timestep norm. Phases and bytes moved: timestep_norm_cpu.cpp.
//
// Rows are visited from the end. u and v are the gradients of mean and var after a row, divided by the number of
// timesteps so far. Row t turns them into u' and v', those of the row before. mean' and n' are the mean after row t and
// its number of timesteps.
//   db = sum_F dy (1 + weight);  ds = sum_F dy (1 + weight) (x - mean')
//   v' = v - rstd^3 ds / (2 n');  p = u - rstd db / n';  u' = p - 2 v' (mean' - mean)
//   dx = dy rstd (1 + weight) + (p + 2 v' (x - mean')) / F;  dweight = sum_T dy (x - mean') rstd;  dbias = sum_T dy
// A run scanned from u = v = 0 is corrected by u0 and v0, those at its end: v' += v0, p += u0 - 2 v0 (mean_end -
// mean').
//
// A block sums dweight and dbias in R, then adds the sums to one of kSlots sums in double, in the order of the blocks.

#include "timestep_norm_plan.h"

namespace megalodon::MEGALODON_ISA {
namespace {

constexpr int64_t kSlots = 64;  // number of sums for dweight and dbias

// The backward on one thread. Each scratch array holds G values for each row of a block.
template <class T>
class Backward {
  using R = Compute<T>;
  static constexpr int lanes = kLanes<R>;

 public:
  Backward(const TimestepNormBwdParams& params, TimestepNormPlan<R>& plan, Relay& turns, double* slots)
      : p(params), plan(plan), turns(turns), slots(slots), G(p.groups), D(p.channels), mean_(scratch_size()),
        v_after_(scratch_size()), p_(scratch_size()), uv_(2 * G), before_(2 * G), hi_(scratch_size()),
        lo_(scratch_size()), rstd_(scratch_size()), db_then_level_(scratch_size()), ds_then_slope_(scratch_size()),
        block_sums_(2 * plan.channels.vectors * lanes),
        streams_(worth_streaming(static_cast<const T*>(p.dx), p.sequences.tokens, D)) {}

  void operator()(int64_t block) {
    const int64_t place = plan.blocks - 1 - block;  // of the block in the order of visits
    const int64_t from = block * plan.rows, to = smaller(from + plan.rows, p.sequences.tokens);
    int64_t continued_s = -1, continued_begin = 0;
    p.sequences.for_each_run(from, to, [&](int64_t s, int64_t a, int64_t b) {
      if (s < 0) return;
      scan(s, a, b, (a - from) * G);
      if (b == p.sequences.end(s)) return deliver(place, s, a);
      continued_s = s;
      continued_begin = a;
    });
    if (continued_s >= 0) {
      plan.relay.wait(place - 1);
      merge(plan.relay.carry(place - 1), (continued_begin - from) * G, to - continued_begin);
      deliver(place, continued_s, continued_begin);
    }
    std::memset(block_sums_.get(), 0, static_cast<size_t>(2 * plan.channels.vectors * lanes) * sizeof(R));
    p.sequences.for_each_run(from, to, [&](int64_t s, int64_t a, int64_t b) { write(s, a, b, (a - from) * G); });
    add_block_sums(place);
  }

 private:
  int64_t scratch_size() const { return plan.rows * G + lanes; }

  // Scans the rows [a, b) from their end. Fills v_after_ and p_ from index `at` on; uv_ becomes u and v before row a.
  void scan(int64_t s, int64_t a, int64_t b, int64_t at) {
    const int64_t size = (b - a) * G, plane = p.sequences.tokens * G;
    const R* stats = static_cast<const R*>(p.stats) + a * G;
    double *mean = &mean_[at], *u = uv_.get(), *v = u + G;
    R *hi = &hi_[at], *lo = &lo_[at], *rstd = &rstd_[at];
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      hi[i] = stats[i];
      lo[i] = stats[plane + i];
      rstd[i] = stats[2 * plane + i];
      mean[i] = static_cast<double>(stats[i]) + stats[plane + i];
    }
    if (a > p.sequences.begin(s)) {
      for (int64_t g = 0; g < G; ++g) before_[g] = static_cast<double>((stats - G)[g]) + (stats + plane - G)[g];
    } else if (count_before(p, s, a) > 0) {
      load_state<R>(p, s, before_.get(), before_.get() + G);
    } else {
      std::memcpy(before_.get(), mean, static_cast<size_t>(G) * sizeof(double));
    }
    sum_rows(a, b, at);

    double n = count_before(p, s, b);
    if (b == p.sequences.end(s)) load_state_gradient<R>(p, s, u);
    else std::memset(u, 0, static_cast<size_t>(2 * G) * sizeof(double));
    for (int64_t row = b - a - 1; row >= 0; --row, n -= 1) {
      double *v_after = &v_after_[at + row * G], *row_p = &p_[at + row * G];
      const R *row_rstd = rstd + row * G, *db = &db_then_level_[at + row * G], *ds = &ds_then_slope_[at + row * G];
      const double *mean_after = mean + row * G, *mean_before = row ? mean_after - G : before_.get();
      const double per_step = 1 / n;
#pragma omp simd
      for (int64_t g = 0; g < G; ++g) {
        const double r = row_rstd[g];
        row_p[g] = u[g] - r * db[g] * per_step;
        v_after[g] = v[g] - r * r * r * ds[g] * (per_step / 2);
        v[g] = v_after[g];
        u[g] = row_p[g] - 2 * v_after[g] * (mean_after[g] - mean_before[g]);
      }
    }
  }

  // Writes db and ds of each row and group to db_then_level_ and ds_then_slope_.
  void sum_rows(int64_t a, int64_t b, int64_t at) {
    const int64_t size = D / G, offset = a * D;
    const T *x = static_cast<const T*>(p.x), *x_end = x + p.sequences.tokens * D;
    const T *dy = static_cast<const T*>(p.dy), *dy_end = dy + p.sequences.tokens * D;
    x += offset;
    dy += offset;
    for (int64_t first = 0; first < (b - a) * G; first += lanes, x += lanes * size, dy += lanes * size) {
      const R* gains[lanes];
      for (int64_t i = 0, g = first % G; i < lanes; ++i, g = g + 1 == G ? 0 : g + 1) gains[i] = &plan.gain[g * size];
      const R *hi = &hi_[at + first], *lo = &lo_[at + first];
      const Terms<R, 2> sum = sum_groups<R, 2>(
          smaller(lanes, (b - a) * G - first), size,
          [&](int64_t i, int64_t k, int64_t n) __attribute__((always_inline)) {
            const int64_t c = i * size + k;
            fetch_ahead(x + c, k);
            fetch_ahead(dy + c, k);
            const Vec<R> scaled = load_within(dy + c, n, dy_end) * load(gains[i] + k);
            const Vec<R> centered = load_within(x + c, n, x_end) - splat(hi[i]);
            return Terms<R, 2>{keep_first<R>(scaled, n), keep_first<R>(scaled * centered, n)};
          });
      store(&db_then_level_[at + first], sum.v[0]);
      store(&ds_then_slope_[at + first], sum.v[1] - load(lo) * sum.v[0]);
    }
  }

  // Corrects `rows` rows, scanned from u = v = 0, by u and v at their end, which are in `carry`.
  void merge(const double* carry, int64_t at, int64_t rows) {
    const double *u0 = carry, *v0 = carry + G, *mean = &mean_[at], *mean_end = mean + (rows - 1) * G;
    for (int64_t row = 0; row < rows; ++row, mean += G, at += G) {
      double *v_after = &v_after_[at], *row_p = &p_[at];
#pragma omp simd
      for (int64_t g = 0; g < G; ++g) {
        v_after[g] += v0[g];
        row_p[g] += u0[g] - 2 * v0[g] * (mean_end[g] - mean[g]);
      }
    }
    for (int64_t g = 0; g < G; ++g) {
      uv_[g] += u0[g] - 2 * v0[g] * (mean_end[g] - before_[g]);
      uv_[G + g] += v0[g];
    }
  }

  // Takes u and v before token `begin` of sequence s. If the sequence begins there, stores the gradients of its initial
  // state, else passes u and v to the previous block.
  void deliver(int64_t place, int64_t s, int64_t begin) {
    if (begin == p.sequences.begin(s)) return store_state_gradient<R>(p, s, uv_.get());
    std::memcpy(plan.relay.carry(place), uv_.get(), static_cast<size_t>(2 * G) * sizeof(double));
    plan.relay.publish(place);
  }

  void write(int64_t s, int64_t a, int64_t b, int64_t at) {
    if (s < 0) {
      std::memset(static_cast<T*>(p.dx) + a * D, 0, static_cast<size_t>((b - a) * D) * sizeof(T));
      return;
    }
    const double per_channel = 1.0 / static_cast<double>(D / G);
#pragma omp simd
    for (int64_t i = at; i < at + (b - a) * G; ++i) {
      db_then_level_[i] = static_cast<R>(p_[i] * per_channel);
      ds_then_slope_[i] = static_cast<R>(2 * v_after_[i] * per_channel);
    }
    if (streams_) write_tiles<true>(a, b, at);
    else write_tiles<false>(a, b, at);
  }

  template <bool kStream>
  void write_tiles(int64_t a, int64_t b, int64_t at) {
    constexpr int tile = 2;
    for (; a + tile <= b; a += tile, at += tile * G) write_rows<tile, kStream>(a, at);
    for (; a < b; ++a, at += G) write_rows<1, kStream>(a, at);
  }

  template <int rows, bool kStream>
  void write_rows(int64_t a, int64_t at) {
    const R* const stats[5] = {&hi_[at], &lo_[at], &rstd_[at], &db_then_level_[at], &ds_then_slope_[at]};
    const T *x = static_cast<const T*>(p.x) + a * D, *dy = static_cast<const T*>(p.dy) + a * D;
    T* dx = static_cast<T*>(p.dx) + a * D;
    const R* gain = plan.gain.get();
    R *dweight = block_sums_.get(), *dbias = dweight + plan.channels.vectors * lanes;
    plan.channels.template for_each_vector_with_statistics<rows>(
        stats, [=, D = D](int64_t j, int64_t c, int64_t n, auto& s) __attribute__((always_inline)) {
          Vec<R> dw = zeros<R>(), db = zeros<R>();
          for (int row = 0; row < rows; ++row) {
            const Vec<R> g = load_first(dy + row * D + c, n);
            const Vec<R> centered = load_first(x + row * D + c, n) - s[row][0] - s[row][1];
            dw += g * (centered * s[row][2]);
            db += g;
            const Vec<R> out = g * (s[row][2] * load(gain + c)) + (s[row][3] + s[row][4] * centered);
            if constexpr (kStream) {
              stream(dx + row * D + c, out);
            } else {
              fetch_ahead<1>(dx + row * D + c, c);
              store_first(dx + row * D + c, out, n);
            }
          }
          store(dweight + j * lanes, load(dweight + j * lanes) + dw);
          store(dbias + j * lanes, load(dbias + j * lanes) + db);
        });
  }

  // Adds the block's sums for dweight and dbias to slot place % kSlots, after place - kSlots has added its own.
  void add_block_sums(int64_t place) {
    const Channels<R>& channels = plan.channels;
    const int64_t last = D > 0 ? channels.vectors - 1 : 0, overlap = last * lanes - channels.offset(last);
    double* slot = slots + place % kSlots * 2 * D;
    if (place >= kSlots) turns.wait(place - kSlots);
    for (int i = 0; i < 2; ++i, slot += D) {
      const R* sum = block_sums_.get() + i * channels.vectors * lanes;
      if (place < kSlots) std::memset(slot, 0, static_cast<size_t>(D) * sizeof(double));
      for (int64_t c = 0; c < last * lanes; ++c) slot[c] += sum[c];
      for (int64_t c = last * lanes; c < D; ++c) slot[c] += sum[c + overlap];
    }
    turns.publish(place);
  }

  const TimestepNormBwdParams& p;
  TimestepNormPlan<R>& plan;
  Relay& turns;
  double* const slots;
  const int64_t G, D;
  Scratch<double> mean_, v_after_, p_;   // mean', v' and p of the block's rows
  Scratch<double> uv_;                   // u and v before the current row
  Scratch<double> before_;               // mean before the run, and var, which is not used
  Scratch<R> hi_, lo_, rstd_;            // mean' = hi + lo and rstd of the block's rows
  Scratch<R> db_then_level_;             // db of the block's rows; after write(), p / F
  Scratch<R> ds_then_slope_;             // ds of the block's rows; after write(), 2 v' / F
  Scratch<R> block_sums_;                // for dweight, then for dbias
  const bool streams_;
};

template <class T>
void backward(const TimestepNormBwdParams& p) {
  using R = Compute<T>;
  const int64_t D = p.channels;
  Scratch<double> uv(2 * p.groups);
  for (int64_t s = 0; (p.dmean || p.dvar) && s < p.sequences.count; ++s) {
    if (p.sequences.length(s) > 0) continue;
    load_state_gradient<R>(p, s, uv.get());
    store_state_gradient<R>(p, s, uv.get());
  }
  TimestepNormPlan<R> plan(p, sizeof(T));
  Relay turns(plan.blocks, 0);
  const int64_t slots = smaller(plan.blocks, kSlots);
  Scratch<double> sums(slots * 2 * D);
  const double work = 8.0 * static_cast<double>(p.sequences.tokens * D);
  const auto make = [&] { return Backward<T>(p, plan, turns, sums.get()); };
  parallel_jobs<StreamFence>(plan.blocks, work, make, Order::backward);
  for (int64_t slot = 1; slot < slots; ++slot)
    for (int64_t c = 0; c < 2 * D; ++c) sums[c] += sums[slot * 2 * D + c];
  for (int64_t c = 0; c < D; ++c) {
    static_cast<R*>(p.dweight)[c] = slots > 0 ? static_cast<R>(sums[c]) : 0;
    static_cast<R*>(p.dbias)[c] = slots > 0 ? static_cast<R>(sums[D + c]) : 0;
  }
}

// Backward of end states alone, on one thread. For a sequence of n tokens:
//   dx = (dmean + 2 dvar (x - mean)) / (n F)
template <class T>
class EndStateBackward {
  using R = Compute<T>;

 public:
  EndStateBackward(const TimestepNormEndStateBwdParams& params, const Channels<R>& channels, int64_t block_rows)
      : p(params), channels(channels), block_rows(block_rows), G(p.groups), D(p.channels), mean_(G + kLanes<R>),
        level_(G + kLanes<R>), slope_(G + kLanes<R>),
        streams_(worth_streaming(static_cast<const T*>(p.dx), p.sequences.tokens, D)) {}

  void operator()(int64_t block) {
    const int64_t from = block * block_rows, to = smaller(from + block_rows, p.sequences.tokens);
    p.sequences.for_each_run(from, to, [&](int64_t s, int64_t a, int64_t b) {
      if (s < 0) {
        std::memset(static_cast<T*>(p.dx) + a * D, 0, static_cast<size_t>((b - a) * D) * sizeof(T));
        return;
      }
      load_sequence(s);
      for (int64_t row = a; row < b; ++row) streams_ ? write_row<true>(row) : write_row<false>(row);
    });
  }

 private:
  // Loads sequence s: dx = level + slope (x - mean). The level includes the mean's residual.
  void load_sequence(int64_t s) {
    const double factor = 1 / static_cast<double>(p.sequences.length(s) * (D / G));
    const R* mean = static_cast<const R*>(p.mean_out) + s * G;
    const R* residual = static_cast<const R*>(p.residual_out) + 2 * s * G;
    const R *dmean = static_cast<const R*>(p.dmean_out), *dvar = static_cast<const R*>(p.dvar_out);
    for (int64_t g = 0; g < G; ++g) {
      const double slope = dvar ? 2 * factor * dvar[s * G + g] : 0;
      mean_[g] = mean[g];
      slope_[g] = static_cast<R>(slope);
      level_[g] = static_cast<R>((dmean ? factor * dmean[s * G + g] : 0) - slope * residual[g]);
    }
  }

  template <bool kStream>
  void write_row(int64_t row) {
    const R* const stats[3] = {mean_.get(), level_.get(), slope_.get()};
    const T* x = static_cast<const T*>(p.x) + row * D;
    T* dx = static_cast<T*>(p.dx) + row * D;
    channels.template for_each_vector_with_statistics<1>(
        stats, [=](int64_t, int64_t c, int64_t n, auto& s) __attribute__((always_inline)) {
          fetch_ahead(x + c, c);
          const Vec<R> out = s[0][1] + s[0][2] * (load_first(x + c, n) - s[0][0]);
          if constexpr (kStream) {
            stream(dx + c, out);
          } else {
            fetch_ahead<1>(dx + c, c);
            store_first(dx + c, out, n);
          }
        });
  }

  const TimestepNormEndStateBwdParams& p;
  const Channels<R>& channels;
  const int64_t block_rows, G, D;
  Scratch<R> mean_, level_, slope_;  // of the current sequence
  const bool streams_;
};

template <class T>
void end_state_backward(const TimestepNormEndStateBwdParams& p) {
  using R = Compute<T>;
  const int64_t tokens = p.sequences.tokens;
  if (tokens * p.channels == 0) return;
  const Channels<R> channels(p.channels, p.groups);
  const int64_t rows = TimestepNormPlan<R>::block_rows(p, sizeof(T));
  const double work = 4.0 * static_cast<double>(tokens * p.channels);
  parallel_jobs<StreamFence>((tokens + rows - 1) / rows, work, [&] { return EndStateBackward<T>(p, channels, rows); },
                             Order::shares);
}

}  // namespace

void timestep_norm_bwd_cpu(const TimestepNormBwdParams& params) {
  dispatch_dtype(params.dtype, [&](auto type) { backward<decltype(type)>(params); });
}

void timestep_norm_end_state_bwd_cpu(const TimestepNormEndStateBwdParams& params) {
  dispatch_dtype(params.dtype, [&](auto type) { end_state_backward<decltype(type)>(params); });
}

}  // namespace megalodon::MEGALODON_ISA
