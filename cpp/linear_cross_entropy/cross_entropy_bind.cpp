#include "cross_entropy.h"
#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"

namespace megalodon {
namespace {

constexpr const char* kCrossEntropy = "cross_entropy";

MEGALODON_BINDING(cross_entropy, (py::handle logits_, py::handle targets_, py::handle scales_), (py::handle losses_)) {
  CrossEntropyParams params{};
  const TensorView logits(kCrossEntropy, "logits", logits_), targets(kCrossEntropy, "targets", targets_);
  params.dtype = logits.rank("(T, V)", 2).floating();
  params.rows = logits.size(0);
  params.classes = logits.size(1);
  params.logits = logits.data();
  targets.present().shape("(T,)", {params.rows}).dtype(Scalar::i64, "indices");
  params.targets = targets.data_as<const int64_t>();
  const auto real = [&](const TensorView& view) {
    const char* why = "float64 for float64 `logits`, else float32";
    return view.shape("(T,)", {params.rows}).dtype(real_of(params.dtype), why).data();
  };
  params.scales = real(TensorView(kCrossEntropy, "scales", scales_));
  params.losses = real(TensorView(kCrossEntropy, "losses", losses_).present());
  for (int64_t t = 0; t < params.rows; ++t)
    if (params.targets[t] < 0 || params.targets[t] >= params.classes)
      throw py::index_error("Target " + std::to_string(params.targets[t]) + " is out of bounds.");
  MEGALODON_LAUNCH(target, cross_entropy, params);
}

}  // namespace

}  // namespace megalodon
