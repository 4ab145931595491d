// Sizes that do not fit would be read or written past the end, and no schema forbids them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <vector>

namespace latent_update {

using torch::stable::Tensor;

inline bool is_float(const Tensor& t, int64_t values) {
  return t.scalar_type() == torch::headeronly::ScalarType::Float && t.is_contiguous() && t.numel() == values;
}

inline bool is_matrix(const Tensor& t, int64_t rows, int64_t cols) {
  return t.dim() == 2 && t.size(0) == rows && t.size(1) == cols && is_float(t, rows * cols);
}

// Weights, or their gradients, of layers whose inner widths are those of the first of `like`.
inline bool weights_fit(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& like,
                        int64_t heads) {
  if (like.empty() || like.size() % 4 != 0 || weights.size() != like.size()) return false;
  if (like[1].dim() != 2 || like[3].dim() != 2) return false;
  const int64_t length = x.size(1), width = x.size(2), inner = like[3].size(1), mix = like[1].size(1);
  bool fit = width % 32 == 0 && inner % 32 == 0 && heads >= 0;
  fit = fit && (heads > 0 ? width % (16 * heads) == 0 : mix > 0 && mix % 2 == 0);
  for (size_t i = 0; fit && i < weights.size(); i += 4) {
    const Tensor* w = &weights[i];
    fit = is_matrix(w[2], 2 * inner, width) && is_matrix(w[3], width, inner);
    fit = fit && (heads > 0 ? is_matrix(w[0], 3 * width, width) && is_matrix(w[1], width, width)
                            : is_matrix(w[0], 2 * mix, length) && is_matrix(w[1], length, mix));
  }
  return fit;
}

inline bool states_fit(const Tensor& x, std::initializer_list<Tensor> others) {
  using torch::headeronly::ScalarType;
  bool fit = x.dim() == 3 && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16);
  fit = fit && x.is_contiguous();
  for (const Tensor& t : others) {
    fit = fit && t.scalar_type() == x.scalar_type() && t.is_contiguous() && t.numel() == x.numel();
  }
  return fit;
}

// What is kept of `layers` calls of a layer; `kept` may be empty, and its bytes are checked where they are known.
inline bool saved_fit(const Tensor& x, const Tensor& rope, const Tensor& states, const Tensor& scales,
                      const Tensor& kept, int64_t heads, int64_t layers) {
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
  bool fit = states.scalar_type() == x.scalar_type() && states.is_contiguous() && kept.is_contiguous();
  fit = fit && states.numel() == (layers > 0 ? 2 + layers : 0) * x.numel() && is_float(scales, layers * batch * length);
  fit = fit && kept.scalar_type() == torch::headeronly::ScalarType::Byte && kept.dim() == 3;
  fit = fit && kept.size(0) == layers && kept.size(1) == batch;
  return fit && (rope.numel() == 0 || (heads > 0 && is_float(rope, 2 * length * (width / heads))));
}

}  // namespace latent_update
