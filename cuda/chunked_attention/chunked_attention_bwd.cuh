// Chunked attention, backward: ops/chunked_attention/chunked_attention_reference.py.
//
//   P_ij = exp(scale q_i . k_j - lse_i), or 0 if row i does not see key j or drops the score
//   dS_ij = P_ij (do_i . v_j - delta_i)
//   dv_j = sum_i P_ij do_i     dk_j = scale sum_i dS_ij q_i     dq_i = scale sum_j dS_ij k_j     delta_i = do_i . o_i
//
//   q, k (T, H, K); v, o, do (T, H, V): the call's dtype; arbitrary K and V
//   lse (T, H): R
//
// P and dS are cut into tiles of kEdge rows by kEdge keys of one head of a chunk. Each tile is computed once and stored
// in the workspace, in the call's dtype. So no product is computed twice: 3 K + 2 V multiplications per score.
//
// Phases: 1. prepare, a warp for each token and head: delta, and zeros in the gradients of padding;
//         2. scores, a block for each tile: S = q k^T, dP = do v^T; P from S, dS from P and dP;
//         3. products, a block for each kEdge rows by kEdge channels of dq, dk or dv: sums over a row of tiles
//            (dq = dS k), or over a panel, a column of tiles (dk = dS^T q, dv = P^T do).
// Phases 2 and 3 run in rounds, each of which completes dk and dv of its panels. A round has as many panels, of 2 kEdge
// C elements, as fit into kTileBytes or an eighth of the tensors' bytes, whichever is more, but at least one.
// Exceptions:
//   a chunk in several rounds   each round adds to the chunk's dq in order: it reads the sums, of type R, from one of
//                               two buffers and writes them to the other
//   tiles above the diagonal    exist only if attention is not causal
//   only cached rows in a block there are neither queries nor gradients; the block is skipped
//   fp16                        dS may exceed the largest fp16: a tile is stored times a power of two, its factor, and
//                               sums over tiles always have the factor of the tile that is added (TileFactors)
//   a chunk of one block        phase 2 scales the rows of P to sum 1, and delta_i = sum_j P_ij dP_ij. With few keys
//                               the terms of dS cancel, and do_i . o_i would add the error of o, rounded to 16 bits
//
// A block has 256 threads and a ring of three slabs of both operands (block_product.cuh), filled by cp.async.
//   bf16, fp16    kEdge 128, slabs 64 deep, 96 KiB, 97 in scores; an SM has 1 block of scores or, if its memory
//                 allows, 2 of products
//   float         kEdge 128, slabs 16 deep, 49 KiB; double: kEdge 64, 49 KiB; by multiply-adds
// Registers: scores 223, products 128, or up to 174 if rows cannot be read as vectors; float 254, 194. No spills,
// except up to two registers (fp16: eight) in products on sm_80 and sm_90, once per thread, outside the loop.
//
// NaN and infinity: tiles on the diagonal hold zeros for pairs that do not see each other, and 0 times a NaN of q, k or
// do is NaN. If a block of phase 3 finds a NaN, it computes its sums twice more, such that 0 times NaN adds nothing
// (`add_products`): three times as many products in a call that overflowed, but no loop over the rows per element.
// Bytes: q, k, v and do twice, o, dq, dk and dv once. From L2, operands are read more often: 4 kEdge (K + V) elements
// for each tile; a tile of P is read V / kEdge times, one of dS 2 K / kEdge times.
// H100, (B 8, L 2048, H 1, K 256, V 2048, C 2048) bf16: at least 397 us, by issue and L2 (bench.predict); workspace 64
// MiB. 173 GFLOP, 10 of them above the diagonal, are 175 us at 990 TFLOP/s; 302 MB of tensors are 90 us at 3.35 TB/s;
// 2.7 GB come from L2.
// Example: kEdge 2, C 5: three panels, of the tiles (0,0) (1,0) (2,0), then (1,1) (2,1), then (2,2). If the first round
// takes two panels, it finishes rows 0-3 of dq, dk and dv, and passes row 4 of dq to the second round.
#pragma once

#include "chunked_attention_bwd_factors.cuh"
#include "chunked_attention_bwd_prepare.cuh"

namespace megalodon {
namespace chunked_attention {

constexpr int kStages = 3;  // in the ring of slabs

GPU_INLINE float exponential(float x) { return gpu::exp2_approx(x * 1.44269504f); }
GPU_INLINE double exponential(double x) { return exp(x); }

// Returns bits for the tile at (row, column) of the sequence's grid: bit r kMicro + c is set if the score of the
// thread's element (r, c) is dropped.
template <class Product>
GPU_INLINE uint64_t dropped_scores(const DropKey& drop, int64_t row, int64_t column) {
  constexpr int kMicro = Product::kMicro;
  uint64_t bits = 0;
  if constexpr (sizeof(typename Product::T) == 2) {
    for (int i = 0; column % 4 == 0 && i < 16; ++i) {
      float kept[4] = {1, 1, 1, 1};
      const int top = i / 4 * 2, left = i % 4 * 2;  // (r, c) of the thread's first element in fragment i
      drop.apply(kept, static_cast<uint32_t>(row + Product::warp_row() + 8 * top),
                 static_cast<uint32_t>((column + Product::warp_column()) / 4 + left), 0);
      GPU_UNROLL
      for (int e = 0; e < 4; ++e)
        bits |= static_cast<uint64_t>(kept[e] == 0) << ((top + e / 2) * kMicro + left + e % 2);
    }
    if (column % 4 == 0) return bits;
  }
  for (int i = 0; i < kMicro * kMicro; ++i)
    bits |= static_cast<uint64_t>(drop.dropped(row + Product::row(i / kMicro), column + Product::column(i % kMicro)))
            << i;
  return bits;
}

// For a chunk of one block: scales each row of P to the sum 1, and sets delta to the row's sum of P dP. `partial` is in
// the slabs, which no thread may use any more.
template <class Product>
GPU_INLINE void normalize_rows(typename Product::Sum& prob, const typename Product::Sum& dp,
                               typename Product::R* partial, typename Product::R* gains,
                               typename Product::R* delta) {
  using R = typename Product::R;
  constexpr int pitch = Product::kSlots + 1;
  R* const sums = partial + Product::kEdge * pitch;
  GPU_UNROLL
  for (int r = 0; r < Product::kMicro; ++r) {
    R sum = 0, product = 0;
    GPU_UNROLL
    for (int c = 0; c < Product::kMicro; ++c) {
      sum += prob.at(r, c);
      product += prob.at(r, c) == 0 ? R{0} : prob.at(r, c) * dp.at(r, c);  // dp may be NaN if a row sees no key
    }
    sums[Product::row(r) * pitch + Product::slot()] = sum;
    partial[Product::row(r) * pitch + Product::slot()] = product;
  }
  __syncthreads();
  if (threadIdx.x < Product::kEdge) {
    R sum = 0, product = 0;
    for (int slot = 0; slot < Product::kSlots; ++slot) {
      sum += sums[threadIdx.x * pitch + slot];
      product += partial[threadIdx.x * pitch + slot];
    }
    const R gain = sum == 0 || sum != sum ? R{1} : 1 / sum;  // a NaN row keeps the zeros of keys that it does not see
    delta[threadIdx.x] = product * gain;
    gains[threadIdx.x] = gain;
  }
  __syncthreads();
  GPU_UNROLL
  for (int r = 0; r < Product::kMicro; ++r) {
    const R gain = gains[Product::row(r)];
    GPU_UNROLL
    for (int c = 0; c < Product::kMicro; ++c) prob.at(r, c) *= gain;
  }
}

// Phase 2: tiles of P and dS.
template <class Product>
__global__ void __launch_bounds__(Product::kThreads, 1)
    chunked_attention_bwd_scores_kernel(ChunkedAttentionBwdParams p, BwdPlan plan, int64_t round) {
  using T = typename Product::T;
  using R = typename Product::R;
  constexpr int kEdge = Product::kEdge, kDepth = Product::kDepth, kMicro = Product::kMicro;
  static_assert(2 * (Product::kSlots + 1) * kEdge * sizeof(R) <= 2 * kStages * Product::kSlab * sizeof(T));
  SMEM_DYN(T, slabs);
  SMEM_ARRAY(R, lse, kEdge);
  SMEM_ARRAY(R, delta, kEdge);
  const int64_t panel = blockIdx.x / plan.blocks;
  ChunkBlock block;
  if (!find_block<kEdge>(block, p, plan, round * plan.panels + panel)) return;
  const int key = block.first, query = (p.causal ? key : 0) + static_cast<int>(blockIdx.x % plan.blocks) * kEdge;
  if (query >= block.rows || query + kEdge <= block.cached) return;

  // An lse of infinity makes P = 0: a row that has no query, or whose scores were all dropped, has no probabilities.
  R my_lse = INFINITY, my_delta = 0;
  const int my_row = query + static_cast<int>(threadIdx.x);
  if (threadIdx.x < kEdge && my_row >= block.cached && my_row < block.rows) {
    const int64_t at = (block.token + my_row - block.cached) * p.heads + block.head;
    my_lse = typed<R>(p.lse)[at];
    if (plan.delta) my_delta = typed<R>(plan.delta)[at];
  }
  const auto q = chunk_rows(p, block, typed<T>(p.q), p.key_dim);
  const auto k = chunk_rows<true>(p, block, typed<T>(p.k), p.key_dim, typed<T>(p.cache_k));
  const auto d_o = chunk_rows(p, block, typed<T>(p.d_o), p.value_dim);
  const auto v = chunk_rows<true>(p, block, typed<T>(p.v), p.value_dim, typed<T>(p.cache_v));
  const int key_slabs = static_cast<int>((p.key_dim + kDepth - 1) / kDepth);
  const int value_slabs = static_cast<int>((p.value_dim + kDepth - 1) / kDepth);
  typename Product::Sum prob, ds;  // first S and dP, then P and dS
  gpu::pipeline<kStages, sizeof(T) == 2>(
      key_slabs + value_slabs,
      [&](int slab, int stage) {
        T *a = slabs + 2 * stage * Product::kSlab, *b = a + Product::kSlab;
        if (slab < key_slabs) {
          const int at = slab * kDepth;
          Product::template load<false>(a, p.key_dim - at, q.from(query, at));
          Product::template load<false>(b, p.key_dim - at, k.from(key, at));
        } else {
          const int at = (slab - key_slabs) * kDepth;
          Product::template load<false>(a, p.value_dim - at, d_o.from(query, at));
          Product::template load<false>(b, p.value_dim - at, v.from(key, at));
        }
      },
      [&](int slab, int stage) {
        const T *a = slabs + 2 * stage * Product::kSlab, *b = a + Product::kSlab;
        const int64_t depth = slab < key_slabs ? p.key_dim - slab * kDepth : p.value_dim - (slab - key_slabs) * kDepth;
        if (slab < key_slabs)
          Product::template multiply<false, false>(prob, a, b, depth, block.rows - query, block.rows - key);
        else Product::template multiply<false, false>(ds, a, b, depth, block.rows - query, block.rows - key);
      });

  if (threadIdx.x < kEdge) {
    lse[threadIdx.x] = my_lse == -R{INFINITY} ? R{INFINITY} : my_lse;
    delta[threadIdx.x] = my_delta;
  }
  __syncthreads();

  const R scale = static_cast<R>(p.scale);
  const DropKey drop(p, block.head, block.sequence);
  const uint64_t dropped = drop ? dropped_scores<Product>(drop, block.start + query, block.start + key) : 0;
  GPU_UNROLL
  for (int r = 0; r < kMicro; ++r) {
    const int seen_end = p.causal ? query + Product::row(r) + 1 : block.rows;
    const R shift = lse[Product::row(r)];
    GPU_UNROLL
    for (int c = 0; c < kMicro; ++c) {
      const bool seen = key + Product::column(c) < seen_end && !(dropped >> (r * kMicro + c) & 1);
      prob.at(r, c) = seen ? exponential(prob.at(r, c) * scale - shift) : R{0};
    }
  }
  if (block.rows <= kEdge) normalize_rows<Product>(prob, ds, reinterpret_cast<R*>(slabs), lse, delta);
  GPU_UNROLL
  for (int r = 0; r < kMicro; ++r) {
    const R mean = delta[Product::row(r)];
    GPU_UNROLL
    for (int c = 0; c < kMicro; ++c)
      ds.at(r, c) = prob.at(r, c) == 0 ? R{0} : prob.at(r, c) * (ds.at(r, c) - mean);
  }
  TileFactors<Product>{typed<float>(plan.factors) + panel * plan.blocks, 1}.apply(ds, query);
  T* const tile = typed<T>(plan.tiles) + (2 * panel * plan.blocks * kEdge + query) * kEdge;
  Product::template store<true>(prob, kEdge, TileRows<T>{tile, kEdge});
  Product::template store<true>(ds, kEdge, TileRows<T>{tile + plan.blocks * kEdge * kEdge, kEdge});
}

// Adds the product of weights (P or dS) and rows to `sum`, in `count` slabs: load(slab, a, b) loads weights into a and
// rows into b, and multiply(slab, a, b) adds their product. Returns true if `sum` is complete, and false if the caller
// must call again for the next pass. There is one pass, 0, or three if a sum of the block is NaN after it:
//   1. sets a sum to NaN if a NaN or infinity in rows has a weight other than 0, else to 0;
//   2. adds the products of finite elements.
// `pass` is in shared memory, as the loop has no register for it. Thread 0 sets it; the others read it after the first
// barrier of the pipeline, which has one because `count` is at least 1.
template <class Product, class Load, class Multiply>
GPU_INLINE bool add_products(typename Product::Sum& sum, int* pass, typename Product::T* slabs, int count, Load&& load,
                             Multiply&& multiply) {
  using T = typename Product::T;
  using R = typename Product::R;
  constexpr int kElements = Product::kMicro * Product::kMicro;
  constexpr int kPlain = 0, kFind = 1;  // passes; the last one is 2
  const auto element = [&](int e) -> R& { return sum.at(e / Product::kMicro, e % Product::kMicro); };
  gpu::pipeline<kStages, false>(
      count,
      [&](int slab, int stage) {
        T* const a = slabs + 2 * stage * Product::kSlab;
        load(slab, a, a + Product::kSlab);
      },
      [&](int slab, int stage) {
        T *const a = slabs + 2 * stage * Product::kSlab, *const b = a + Product::kSlab;
        if (*pass != kPlain) {
          const bool find = *pass == kFind;
          if (find) Product::replace(a, [](R weight) { return static_cast<R>(weight != 0); });
          Product::replace(b, [&](R x) { return find ? static_cast<R>(!is_finite(x)) : is_finite(x) ? x : R{0}; });
          __syncthreads();
        }
        multiply(slab, a, b);
      });
  const int last = *pass;
  int again = last == kFind;
  GPU_UNROLL
  for (int e = 0; e < kElements; ++e) again |= last == kPlain && element(e) != element(e);
  if (gpu::block_sum(again) == 0) return true;
  if (threadIdx.x == 0) *pass = last + 1;
  GPU_UNROLL
  for (int e = 0; e < kElements; ++e)  // infinite sums stay: a product with 0 is never infinite
    if (fabs(element(e)) != INFINITY) element(e) = last == kPlain || element(e) == 0 ? R{0} : R{NAN};
  __syncthreads();  // not for order: without it nvcc 13.0 spills 7 registers for sm_90, not 1
  return false;
}

// Computes kEdge columns of a panel: of dv = P^T do if `values`, else of dk = dS^T q. Returns add_products' result.
template <class Product>
GPU_INLINE bool differentiate_keys(const ChunkedAttentionBwdParams& p, const BwdPlan& plan, int64_t round,
                                   int64_t panel, bool values, int column, typename Product::Sum& sum, int* pass,
                                   typename Product::T* slabs) {
  using T = typename Product::T;
  using R = typename Product::R;
  constexpr int kEdge = Product::kEdge, kDepth = Product::kDepth;
  ChunkBlock block;
  if (!find_block<kEdge>(block, p, plan, round * plan.panels + panel)) return true;
  const int64_t width = values ? p.value_dim : p.key_dim;
  const int key = block.first;
  if (key + kEdge <= block.cached) return true;
  // A panel has tiles of P, for dv, then of dS, for dk.
  const T* tile = typed<T>(plan.tiles) + (2 * panel + !values) * plan.blocks * kEdge * kEdge;
  const TileFactors<Product> factors{typed<float>(plan.factors) + panel * plan.blocks, 1};
  const auto right = chunk_rows(p, block, typed<T>(values ? p.d_o : p.q), width);
  const int first = p.causal && key > block.cached ? key : block.cached / kDepth * kDepth;  // the first query row
  const bool complete = add_products<Product>(
      sum, pass, slabs, (block.rows - first + kDepth - 1) / kDepth,
      [&](int slab, T* a, T* b) {
        const int at = first + slab * kDepth;
        Product::template load<true, true>(a, kEdge, TileRows<const T>{tile + int64_t{at} * kEdge, kEdge});
        Product::template load<true>(b, width - column, right.from(at, column));
      },
      [&](int slab, const T* a, const T* b) {
        if (!values && slab > 0 && (first + slab * kDepth) % kEdge == 0) factors.enter(sum, first + slab * kDepth);
        Product::template multiply<true, true>(sum, a, b, block.rows - first - slab * kDepth, block.rows - key,
                                               width - column);
      });
  if (!complete) return false;
  if (!values) factors.leave(sum, block.rows - 1);
  if (!values) scale_by<Product>(sum, static_cast<R>(p.scale));
  const auto out = chunk_rows(p, block, typed<T>(values ? p.dv : p.dk), width);
  Product::store(sum, width - column, out.from(key, column));
  return true;
}

// Adds the round's terms to kEdge columns of dq = dS k, for a block of queries: those of the keys whose panels are in
// the round. Returns add_products' result.
template <class Product>
GPU_INLINE bool differentiate_queries(const ChunkedAttentionBwdParams& p, const BwdPlan& plan, int64_t round,
                                      int64_t number, int column, typename Product::Sum& sum, int* pass,
                                      typename Product::T* slabs) {
  using T = typename Product::T;
  using R = typename Product::R;
  constexpr int kEdge = Product::kEdge, kDepth = Product::kDepth, kMicro = Product::kMicro;
  ChunkBlock block;
  if (!find_block<kEdge>(block, p, plan, round * plan.panels + number)) return true;
  // first_panel: number of the chunk's first panel, counted from the round's first; negative if it was in an earlier
  // round. [key, stop): the keys of this round's panels that the queries see.
  const int64_t first_panel = block.number - round * plan.panels, end = (plan.panels - first_panel) * kEdge;
  const int query = block.first, key = first_panel < 0 ? static_cast<int>(-first_panel) * kEdge : 0;
  const int seen = p.causal && query + kEdge < block.rows ? query + kEdge : block.rows;
  const int stop = end < seen ? static_cast<int>(end) : seen;
  if (stop <= key || query + kEdge <= block.cached) return true;
  const auto k = chunk_rows<true>(p, block, typed<T>(p.k), p.key_dim, typed<T>(p.cache_k));
  const TileFactors<Product> factors{
      typed<float>(plan.factors) + first_panel * plan.blocks + query / kEdge, plan.blocks};
  const bool complete = add_products<Product>(
      sum, pass, slabs, (stop - key + kDepth - 1) / kDepth,
      [&](int slab, T* a, T* b) {
        const int at = key + slab * kDepth;
        const T* tile =
            typed<T>(plan.tiles) + ((2 * (first_panel + at / kEdge) + 1) * plan.blocks * kEdge + query) * kEdge;
        Product::template load<false, true>(a, kDepth, TileRows<const T>{tile + at % kEdge, kEdge});
        Product::template load<true>(b, p.key_dim - column, k.from(at, column));
      },
      [&](int slab, const T* a, const T* b) {
        if (slab > 0 && slab * kDepth % kEdge == 0) factors.enter(sum, key + slab * kDepth);
        Product::template multiply<false, true>(sum, a, b, stop - key - slab * kDepth, block.rows - query,
                                                p.key_dim - column);
      });
  if (!complete) return false;
  factors.leave(sum, stop - 1);

  const R* before = key > 0 ? typed<R>(round % 2 ? plan.dq_sums[1] : plan.dq_sums[0]) : nullptr;
  R* after = stop < seen ? typed<R>(round % 2 ? plan.dq_sums[0] : plan.dq_sums[1]) : nullptr;
  GPU_UNROLL
  for (int r = 0; r < kMicro; ++r) {
    const int row = query + Product::row(r);
    const bool live = row >= block.cached && row < block.rows;
    GPU_UNROLL
    for (int c = 0; c < kMicro; ++c) {
      const int64_t channel = column + Product::column(c), at = row * p.key_dim + channel;
      if (!live || channel >= p.key_dim) continue;
      if (before) sum.at(r, c) += before[at];
      if (after) after[at] = sum.at(r, c);
    }
  }
  if (after) return true;
  scale_by<Product>(sum, static_cast<R>(p.scale));
  const auto out = chunk_rows(p, block, typed<T>(p.dq), p.key_dim);
  Product::store(sum, p.key_dim - column, out.from(query, column));
  return true;
}

// Phase 3. The grid has a block for each block of queries and kEdge channels of dq, then for each panel and kEdge
// channels of dv and dk.
template <class Product>
__global__ void __launch_bounds__(Product::kThreads, Product::kVectors ? 2 : 1)
    chunked_attention_bwd_products_kernel(ChunkedAttentionBwdParams p, BwdPlan plan, int64_t round) {
  SMEM_DYN(typename Product::T, slabs);
  SMEM_ARRAY(int, pass, 1);
  if (threadIdx.x == 0) *pass = 0;
  typename Product::Sum sum;
  constexpr int kEdge = Product::kEdge;
  const int64_t value_slices = (p.value_dim + kEdge - 1) / kEdge, key_slices = (p.key_dim + kEdge - 1) / kEdge;
  const int64_t key_block = blockIdx.x - plan.query_blocks * key_slices;
  if (key_block < 0) {
    const int64_t number = blockIdx.x / key_slices - (p.causal ? 0 : plan.blocks - 1);
    const int column = static_cast<int>(blockIdx.x % key_slices) * kEdge;
    while (!differentiate_queries<Product>(p, plan, round, number, column, sum, pass, slabs)) {}
  } else {
    const int64_t slices = value_slices + key_slices, slice = key_block % slices;
    const bool values = slice < value_slices;
    const int column = static_cast<int>(values ? slice : slice - value_slices) * kEdge;
    while (!differentiate_keys<Product>(p, plan, round, key_block / slices, values, column, sum, pass, slabs)) {}
  }
}

}  // namespace chunked_attention
}  // namespace megalodon
