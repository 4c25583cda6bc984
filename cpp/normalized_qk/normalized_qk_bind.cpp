#include "normalized_qk.h"
#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"

#include <algorithm>

namespace megalodon {
namespace {

constexpr const char* kQk = "normalized_qk";

// Checks and fills the parameters that the forward and the backward share; returns z.
TensorView fill(NormalizedQkParams& params, py::handle z_, py::handle gamma_, py::handle beta_, int64_t num_heads,
                int64_t chunk_size, double eps, py::handle rotary_, py::handle position_, py::handle spans) {
  const TensorView z(kQk, "z", z_), gamma(kQk, "gamma", gamma_), beta(kQk, "beta", beta_);
  const TensorView rotary(kQk, "rotary", rotary_), position(kQk, "position", position_);
  params.dtype = z.rank("(B, L, Z)", 3).floating();
  params.sequences = make_sequences(kQk, z.size(0), z.size(1), spans);
  const Scalar real = real_of(params.dtype);
  const int64_t Z = z.size(2), S = params.sequences.count;
  if (num_heads < 1 || Z % num_heads || Z / num_heads % 2)
    throw py::value_error("normalized_qk: `num_heads` must divide Z = " + std::to_string(Z) +
                          " into heads of even size, got " + std::to_string(num_heads) + ".");
  if (chunk_size < 1)
    throw py::value_error("normalized_qk: `chunk_size` must be positive, got " + std::to_string(chunk_size) + ".");
  check_range(kQk, "eps", eps, 0, "finite and at least 0");
  params.heads = num_heads;
  params.key_dim = Z / num_heads;
  params.chunk_size = chunk_size;
  params.eps = eps;
  params.z = z.data();
  params.gamma = gamma.present().shape("(2, Z)", {2, Z}).dtype(real, kRealDtype).data();
  params.beta = beta.present().shape("(2, Z)", {2, Z}).dtype(real, kRealDtype).data();
  params.position = position.shape("(S,)", {S}).dtype(Scalar::i64, "positions").data_as<const int64_t>();
  params.table_rows = rotary.rank("(rows, K / 2, 2)", 3).size(0);
  params.rotary =
      rotary.shape("(rows, K / 2, 2)", {params.table_rows, params.key_dim / 2, 2}).dtype(real, kRealDtype).data();
  // The table needs a row for every position that can occur.
  const int64_t longest = z.size(1), needed = position.given() || longest > chunk_size ? chunk_size : longest;
  if (params.table_rows < needed)
    rotary.fail("of at least " + std::to_string(needed) + " rows, got " + std::to_string(params.table_rows));
  // A smaller chunk_size changes no valid position, as all are below table_rows. It keeps positions of spans that leave
  // their row, which a GPU does not refuse, inside the table.
  params.chunk_size = std::min(chunk_size, std::max<int64_t>(params.table_rows, 1));
  position.values(chunk_size - 1, "[0, " + std::to_string(chunk_size) + ")");
  return z;
}

MEGALODON_BINDING(normalized_qk_fwd,
                  (py::handle z_, py::handle gamma, py::handle beta, int64_t num_heads, int64_t chunk_size,
                   double eps, py::handle rotary, py::handle position, py::handle spans),
                  (py::handle q, py::handle k)) {
  NormalizedQkFwdParams params{};
  const TensorView z = fill(params, z_, gamma, beta, num_heads, chunk_size, eps, rotary, position, spans);
  const auto heads = [&](const char* name, py::handle object) {
    return TensorView(kQk, name, object)
        .present()
        .shape("(B, L, H, K)", {z.size(0), z.size(1), params.heads, params.key_dim})
        .dtype(z.scalar(), "as `z`")
        .data();
  };
  params.q = heads("q", q);
  params.k = heads("k", k);
  MEGALODON_LAUNCH(target, normalized_qk_fwd, params);
}

MEGALODON_BINDING(normalized_qk_bwd,
                  (py::handle z_, py::handle gamma, py::handle beta_, int64_t num_heads, int64_t chunk_size,
                   double eps, py::handle rotary, py::handle position, py::handle spans,
                   py::handle dq, py::handle dk),
                  (py::handle dz, py::handle dgamma, py::handle dbeta)) {
  NormalizedQkBwdParams params{};
  const TensorView z =
      fill(params, z_, gamma, beta_, num_heads, chunk_size, eps, rotary, position, spans);
  const TensorView beta(kQk, "beta", beta_);
  const auto heads = [&](const char* name, py::handle object) {
    return TensorView(kQk, name, object)
        .present()
        .shape("(B, L, H, K)", {z.size(0), z.size(1), params.heads, params.key_dim})
        .dtype(z.scalar(), "as `z`")
        .data();
  };
  params.dq = heads("dq", dq);
  params.dk = heads("dk", dk);
  params.dz = TensorView(kQk, "dz", dz).like(z).data();
  params.dgamma = TensorView(kQk, "dgamma", dgamma).like(beta).data();
  params.dbeta = TensorView(kQk, "dbeta", dbeta).like(beta).data();
  MEGALODON_LAUNCH(target, normalized_qk_bwd, params);
}

}  // namespace

}  // namespace megalodon
