// Launches attention's backward for its binding: the phases of chunked_attention_bwd.cuh, in rounds.
#include "chunked_attention_bwd.cuh"

namespace megalodon {
namespace {

using namespace chunked_attention;

// A round's tiles may take kTileBytes, or 1 / kTensorsPerTiles of the tensors' bytes if that is more: few rounds.
constexpr int64_t kTileBytes = int64_t{64} << 20, kTensorsPerTiles = 8;

// Sets all fields of `plan` and returns the bytes of the workspace.
template <class Product>
int64_t make_plan(const ChunkedAttentionBwdParams& p, BwdPlan& plan) {
  using T = typename Product::T;
  using R = typename Product::R;
  constexpr int64_t edge = Product::kEdge, size = sizeof(T);
  const Sequences& sequences = p.sequences;
  const int64_t longest = sequences.by_row ? sequences.row_length : sequences.tokens;
  const int64_t rows = longest + (p.position ? p.chunk_size - 1 : 0);
  plan.most_rows = rows < p.chunk_size ? rows : p.chunk_size;
  plan.blocks = ceil_div(plan.most_rows, edge);
  plan.total = first_number<Product::kEdge>(p, plan, sequences.count, sequences.tokens) * p.heads;

  const int64_t panel_bytes = 2 * plan.blocks * edge * edge * size;
  const int64_t part = sequences.tokens * p.heads * 4 * (p.key_dim + p.value_dim) * size / kTensorsPerTiles;
  const int64_t most = (part > kTileBytes ? part : kTileBytes) / panel_bytes;
  const int64_t panels = most < plan.total ? most : plan.total;
  plan.panels = LAUNCH_SIZE(attention_panels, panels < 1 ? 1 : panels);
  plan.rounds = ceil_div(plan.total, plan.panels);
  plan.query_blocks = plan.panels + (p.causal ? 1 : 2) * (plan.blocks - 1);

  int64_t bytes = 0;
  const auto take = [&](int64_t n) {
    void* at = static_cast<char*>(p.workspace) + bytes;
    bytes += workspace_part(n);
    return at;
  };
  const int64_t sums = plan.rounds > 1 ? plan.blocks * edge * p.key_dim * static_cast<int64_t>(sizeof(R)) : 0;
  plan.tiles = take(plan.panels * panel_bytes);
  const int64_t factors = TileFactors<Product>::kNeeded ? plan.panels * plan.blocks : 0;
  plan.factors = take(factors * static_cast<int64_t>(sizeof(float)));
  for (void*& buffer : plan.dq_sums) buffer = take(sums);
  plan.delta = plan.blocks > 1 ? take(sequences.tokens * p.heads * static_cast<int64_t>(sizeof(R))) : nullptr;
  return bytes;
}

template <class Product>
void launch(const ChunkedAttentionBwdParams& p, void* stream) {
  using T = typename Product::T;
  BwdPlan plan;
  make_plan<Product>(p, plan);
  if (plan.delta || p.sequences.spans || p.position)
    LAUNCH(chunked_attention_bwd_prepare_kernel<Product>, static_cast<unsigned>(ceil_div(p.sequences.tokens, kTokens)),
           kPrepareWarps * gpu::kWarp, 0, stream, p, plan);
  constexpr int64_t edge = Product::kEdge;
  constexpr size_t shared = 2 * kStages * Product::kSlab * sizeof(T);
  const int64_t key_slices = ceil_div(p.key_dim, edge), slices = ceil_div(p.value_dim, edge) + key_slices;
  const int64_t products = plan.panels * slices + plan.query_blocks * key_slices;
  for (int64_t round = 0; round < plan.rounds; ++round) {
    LAUNCH(chunked_attention_bwd_scores_kernel<Product>, static_cast<unsigned>(plan.panels * plan.blocks),
           Product::kThreads, shared, stream, p, plan, round);
    LAUNCH(chunked_attention_bwd_products_kernel<Product>, static_cast<unsigned>(products), Product::kThreads, shared,
           stream, p, plan, round);
  }
}

template <class T>
bool takes_vectors(const ChunkedAttentionBwdParams& p) {
  constexpr int width = gpu::kVectorWidth<T>;
  if (p.key_dim % width != 0 || p.value_dim % width != 0) return false;
  for (const void* tensor : {p.q, p.k, p.v, p.cache_k, p.cache_v, p.o, p.d_o, static_cast<const void*>(p.dq),
                             static_cast<const void*>(p.dk), static_cast<const void*>(p.dv)})
    if (!gpu::aligned<width>(static_cast<const T*>(tensor))) return false;
  return true;
}

// Calls f(Product{}) with the class of block_product.cuh that suits the dtype and the tensors' alignment.
template <class F>
void dispatch_product(const ChunkedAttentionBwdParams& p, F&& f) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) > 2) f(gpu::PlainProduct<T>{});
    else if (takes_vectors<T>(p)) f(gpu::TensorProduct<T, true>{});
    else f(gpu::TensorProduct<T, false>{});
  });
}

bool is_empty(const ChunkedAttentionBwdParams& p) {
  return p.sequences.tokens == 0 || p.heads == 0 || p.key_dim + p.value_dim == 0;
}

}  // namespace

int64_t workspace_chunked_attention_bwd_cuda(const ChunkedAttentionBwdParams& params) {
  if (is_empty(params)) return 0;
  int64_t bytes = 0;
  BwdPlan plan;
  dispatch_product(params, [&](auto product) { bytes = make_plan<decltype(product)>(params, plan); });
  return bytes;
}

void launch_chunked_attention_bwd_cuda(const ChunkedAttentionBwdParams& params, void* stream) {
  if (is_empty(params)) return;
  dispatch_product(params, [&](auto product) { launch<decltype(product)>(params, stream); });
}

}  // namespace megalodon
