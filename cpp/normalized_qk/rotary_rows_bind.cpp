// Rotary tables on the CPU for a few tokens whose positions do not start again in each chunk.

#include <cmath>

#include "target.h"  // MEGALODON_BINDING, which declares `target`
#include "tensor_view.h"

namespace megalodon {
namespace {

struct RotaryRowsParams {
  DType dtype;                // of table: f32 or f64
  int64_t sequences, length;  // S, L
  int64_t pairs;              // K / 2
  const int64_t* end;         // (S) number of positions of each sequence, these L tokens included
  const double* frequencies;  // (K / 2)
  void* table;                // (S, L, K / 2, 2): cosine and sine
};

void fill_rotary_rows(const RotaryRowsParams& p) {
  for (int64_t row = 0; row < p.sequences * p.length; ++row) {
    const auto position = static_cast<double>(p.end[row / p.length] - p.length + row % p.length);
    for (int64_t i = 0; i < p.pairs; ++i) {
      const double angle = position * p.frequencies[i], values[] = {std::cos(angle), std::sin(angle)};
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t at = (row * p.pairs + i) * 2 + j;
        if (p.dtype == DType::f64) static_cast<double*>(p.table)[at] = values[j];
        else static_cast<float*>(p.table)[at] = static_cast<float>(values[j]);
      }
    }
  }
}

MEGALODON_BINDING(rotary_rows, (py::handle end_, py::handle frequencies_, int64_t length), (py::handle table_)) {
  const TensorView end("rotary_rows", "end", end_), frequencies("rotary_rows", "frequencies", frequencies_);
  const TensorView table("rotary_rows", "table", table_);
  const int64_t S = end.rank("(S,)", 1).dtype(Scalar::i64, "positions").size(0);
  const int64_t pairs = frequencies.rank("(K / 2,)", 1).dtype(Scalar::f64, "frequencies").size(0);
  table.present().shape("(S L, K / 2, 2)", {S * length, pairs, 2});
  target.launch(RotaryRowsParams{table.floating(), S, length, pairs, end.data_as<const int64_t>(),
                                 frequencies.data_as<const double>(), table.data()},
                fill_rotary_rows);
}

}  // namespace

}  // namespace megalodon
