#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"
#include "timestep_norm.h"

namespace megalodon {
namespace {

constexpr const char* kNorm = "timestep_norm";
constexpr const char* kNormEndState = "timestep_norm_end_state";

// Checks and fills x, its groups and its sequences; returns x.
template <class Params>
TensorView fill_x(const char* op, Params& params, py::handle x_, int64_t num_groups, py::handle spans) {
  const TensorView x(op, "x", x_);
  params.dtype = x.rank("(B, L, D)", 3).floating();
  params.sequences = make_sequences(op, x.size(0), x.size(1), spans);
  const int64_t D = x.size(2), G = num_groups;
  if (G < 1 || D % G)
    throw py::value_error(std::string(op) + ": `num_groups` must be positive and divide D = " + std::to_string(D) +
                          ", got " + std::to_string(G) + ".");
  params.channels = D;
  params.groups = G;
  params.x = x.data();
  return x;
}

// Checks and fills the end states, which are outputs.
void fill_end_states(const char* op, TimestepNormFwdParams& params, const TensorView& count, py::handle mean_out,
                     py::handle var_out, py::handle residual_out) {
  const Scalar real = real_of(params.dtype);
  const int64_t S = params.sequences.count, G = params.groups;
  const TensorView mean(op, "mean_out", mean_out), var(op, "var_out", var_out);
  const TensorView residual(op, "residual_out", residual_out);
  params.count_out = count.present().shape("(S,)", {S}).dtype(Scalar::i64, "timesteps").data_as<int64_t>();
  params.mean_out = mean.present().shape("(S, G)", {S, G}).dtype(real, kRealDtype).data();
  params.var_out = var.present().shape("(S, G)", {S, G}).dtype(real, kRealDtype).data();
  params.residual_out = residual.present().shape("(S, 2, G)", {S, 2, G}).dtype(real, kRealDtype).data();
}

// Checks and fills the parameters that the forward and the backward share; returns x.
TensorView fill(TimestepNormParams& params, py::handle x_, py::handle weight_, py::handle bias_, int64_t num_groups,
                double eps, py::handle count_, py::handle mean_, py::handle var_, py::handle residual_,
                py::handle spans) {
  const TensorView weight(kNorm, "weight", weight_), bias(kNorm, "bias", bias_);
  const TensorView count(kNorm, "state.count", count_), mean(kNorm, "state.mean", mean_), var(kNorm, "state.var", var_);
  const TensorView residual(kNorm, "state.residual", residual_);
  const TensorView x = fill_x(kNorm, params, x_, num_groups, spans);
  const Scalar real = real_of(params.dtype);
  const int64_t S = params.sequences.count, D = params.channels, G = params.groups;
  check_range(kNorm, "eps", eps, 0, "finite and at least 0");
  params.eps = eps;
  params.weight = weight.present().shape("(D,)", {D}).dtype(real, kRealDtype).data();
  params.bias = bias.present().shape("(D,)", {D}).dtype(real, kRealDtype).data();
  if (!count.given()) {
    for (const TensorView* part : {&mean, &var, &residual}) part->absent("a `state.count` to go with it");
  } else {
    params.count = count.shape("(S,)", {S}).dtype(Scalar::i64, "timesteps").data_as<const int64_t>();
    params.mean = mean.present().shape("(S, G)", {S, G}).dtype(real, kRealDtype).data();
    params.var = var.present().shape("(S, G)", {S, G}).dtype(real, kRealDtype).data();
    params.residual = residual.shape("(S, 2, G)", {S, 2, G}).dtype(real, kRealDtype).data();
    count.values(kMaxPositions, "[0, " + std::to_string(kMaxPositions) + "]");
  }
  return x;
}

MEGALODON_BINDING(timestep_norm_fwd,
                  (py::handle x_, py::handle weight, py::handle bias, int64_t num_groups, double eps,
                   py::handle count, py::handle mean, py::handle var, py::handle residual, py::handle spans),
                  (py::handle y, py::handle stats, py::handle count_out, py::handle mean_out, py::handle var_out,
                   py::handle residual_out)) {
  TimestepNormFwdParams params{};
  const TensorView x = fill(params, x_, weight, bias, num_groups, eps, count, mean, var, residual, spans);
  const Scalar real = real_of(params.dtype);
  const int64_t B = x.size(0), L = x.size(1), G = params.groups;
  params.y = TensorView(kNorm, "y", y).like(x).data();
  params.stats = TensorView(kNorm, "stats", stats).shape("(3, B, L, G)", {3, B, L, G}).dtype(real, kRealDtype).data();
  const TensorView count_view(kNorm, "count_out", count_out);
  if (count_view.given()) fill_end_states(kNorm, params, count_view, mean_out, var_out, residual_out);
  MEGALODON_LAUNCH(target, timestep_norm_fwd, params);
}

MEGALODON_BINDING(timestep_norm_bwd,
                  (py::handle x_, py::handle weight_, py::handle bias, int64_t num_groups, double eps,
                   py::handle count, py::handle mean, py::handle var, py::handle residual, py::handle spans,
                   py::handle stats_, py::handle dy, py::handle dmean_out, py::handle dvar_out),
                  (py::handle dx, py::handle dweight, py::handle dbias, py::handle dmean, py::handle dvar)) {
  TimestepNormBwdParams params{};
  const TensorView x =
      fill(params, x_, weight_, bias, num_groups, eps, count, mean, var, residual, spans);
  const TensorView weight(kNorm, "weight", weight_);
  const Scalar real = real_of(params.dtype);
  const int64_t B = x.size(0), L = x.size(1), S = params.sequences.count, G = params.groups;
  const auto per_group = [&](const char* name, py::handle object) {
    return TensorView(kNorm, name, object).shape("(S, G)", {S, G}).dtype(real, kRealDtype).data();
  };
  const TensorView stats(kNorm, "stats", stats_);
  if (stats.present().axes() == 1)  // empty
    throw py::value_error("timestep_norm: `return_stats` must be True where gradients are wanted, got False.");
  params.stats = stats.shape("(3, B, L, G)", {3, B, L, G}).dtype(real, kRealDtype).data();
  params.dy = TensorView(kNorm, "dy", dy).like(x).data();
  params.dmean_out = per_group("dmean_out", dmean_out);
  params.dvar_out = per_group("dvar_out", dvar_out);
  params.dx = TensorView(kNorm, "dx", dx).like(x).data();
  params.dweight = TensorView(kNorm, "dweight", dweight).like(weight).data();
  params.dbias = TensorView(kNorm, "dbias", dbias).like(weight).data();
  params.dmean = per_group("dmean", dmean);
  params.dvar = per_group("dvar", dvar);
  MEGALODON_LAUNCH(target, timestep_norm_bwd, params);
}

MEGALODON_BINDING(timestep_norm_end_state_fwd,
                  (py::handle x, int64_t num_groups, py::handle spans),
                  (py::handle mean_out, py::handle var_out, py::handle residual_out, py::handle count_out)) {
  TimestepNormFwdParams params{};
  fill_x(kNormEndState, params, x, num_groups, spans);
  const TensorView count(kNormEndState, "count_out", count_out);
  fill_end_states(kNormEndState, params, count, mean_out, var_out, residual_out);
  params.ends_only = true;
  MEGALODON_LAUNCH(target, timestep_norm_fwd, params);
}

MEGALODON_BINDING(timestep_norm_end_state_bwd,
                  (py::handle x_, int64_t num_groups, py::handle spans, py::handle mean_out,
                   py::handle residual_out, py::handle dmean_out, py::handle dvar_out),
                  (py::handle dx)) {
  TimestepNormEndStateBwdParams params{};
  const TensorView x = fill_x(kNormEndState, params, x_, num_groups, spans);
  const Scalar real = real_of(params.dtype);
  const int64_t S = params.sequences.count, G = params.groups;
  const TensorView mean(kNormEndState, "mean_out", mean_out), residual(kNormEndState, "residual_out", residual_out);
  const TensorView dmean(kNormEndState, "dmean_out", dmean_out), dvar(kNormEndState, "dvar_out", dvar_out);
  params.mean_out = mean.present().shape("(S, G)", {S, G}).dtype(real, kRealDtype).data();
  params.residual_out = residual.present().shape("(S, 2, G)", {S, 2, G}).dtype(real, kRealDtype).data();
  params.dmean_out = dmean.shape("(S, G)", {S, G}).dtype(real, kRealDtype).data();
  params.dvar_out = dvar.shape("(S, G)", {S, G}).dtype(real, kRealDtype).data();
  params.dx = TensorView(kNormEndState, "dx", dx).like(x).data();
  MEGALODON_LAUNCH(target, timestep_norm_end_state_bwd, params);
}

}  // namespace

}  // namespace megalodon
