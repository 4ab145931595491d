// The arguments of a call, and whether they fit: sizes that do not would be read or written past the end, and no schema
// forbids them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <vector>

namespace latent_update {

using torch::stable::Tensor;

// The weights of a layer, or their gradients, in the order of the page.
struct LayerTensors {
  const Tensor &mix_in, &mix_out, &gate_up, &down;
};

constexpr size_t kPerLayer = 4;

inline LayerTensors layer_of(const std::vector<Tensor>& weights, int64_t layer) {
  const Tensor* w = weights.data() + kPerLayer * layer;
  return {w[0], w[1], w[2], w[3]};
}

struct Network {
  std::vector<Tensor> weights;  // four for each layer
  Tensor rope;                  // [2, length, 1, head dim], or empty without positions
  int64_t heads;                // 0 for the token mixer
  double eps;

  int64_t layers() const { return weights.size() / kPerLayer; }
};

// How often the network is called; grad_cycles cycles, the last ones, carry gradients.
struct Counts {
  int64_t n, T, grad_cycles;
};

// What the forward pass leaves for the backward pass.
struct SavedTensors {
  Tensor states, scales, kept;
};

struct Call {
  Tensor x;
  Network network;
  Counts counts;
  SavedTensors saved;

  // Calls of a layer that carry gradients.
  int64_t saved_layers() const { return counts.grad_cycles * (counts.n + 1) * network.layers(); }
};

// Gradients of the results, which become those of the states, and of the weights.
struct CallGradients {
  Tensor x, y, z;
  std::vector<Tensor> weights;
};

inline bool is_float(const Tensor& t, int64_t values) {
  return t.scalar_type() == torch::headeronly::ScalarType::Float && t.is_contiguous() && t.numel() == values;
}

inline bool is_matrix(const Tensor& t, int64_t rows, int64_t cols) {
  return t.dim() == 2 && t.size(0) == rows && t.size(1) == cols && is_float(t, rows * cols);
}

// Whether these weights, or their gradients, have the sizes of a network, whose inner widths are those of its first
// layer.
inline bool weights_fit(const Tensor& x, const std::vector<Tensor>& weights, const Network& network) {
  const std::vector<Tensor>& own = network.weights;
  if (own.empty() || own.size() % kPerLayer != 0 || weights.size() != own.size()) return false;
  const LayerTensors first = layer_of(own, 0);
  if (first.mix_out.dim() != 2 || first.down.dim() != 2) return false;
  const int64_t length = x.size(1), width = x.size(2), inner = first.down.size(1), mix = first.mix_out.size(1);
  const int64_t heads = network.heads;
  bool fit = width % 32 == 0 && inner % 32 == 0 && heads >= 0;
  fit = fit && (heads > 0 ? width % (16 * heads) == 0 : mix > 0 && mix % 2 == 0);
  for (int64_t i = 0; fit && i < network.layers(); ++i) {
    const LayerTensors w = layer_of(weights, i);
    fit = is_matrix(w.gate_up, 2 * inner, width) && is_matrix(w.down, width, inner);
    fit = fit && (heads > 0 ? is_matrix(w.mix_in, 3 * width, width) && is_matrix(w.mix_out, width, width)
                            : is_matrix(w.mix_in, 2 * mix, length) && is_matrix(w.mix_out, length, mix));
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

// `kept` may be empty, and its bytes are checked where they are known.
inline bool saved_fit(const Call& call) {
  const Tensor &x = call.x, &rope = call.network.rope;
  const auto& [states, scales, kept] = call.saved;
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2), layers = call.saved_layers();
  bool fit = states.scalar_type() == x.scalar_type() && states.is_contiguous() && kept.is_contiguous();
  fit = fit && states.numel() == (layers > 0 ? 2 + layers : 0) * x.numel() && is_float(scales, layers * batch * length);
  fit = fit && kept.scalar_type() == torch::headeronly::ScalarType::Byte && kept.dim() == 3;
  fit = fit && kept.size(0) == layers && kept.size(1) == batch;
  const int64_t heads = call.network.heads;
  return fit && (rope.numel() == 0 || (heads > 0 && is_float(rope, 2 * length * (width / heads))));
}

// Whether a call fits whose states are x and these others.
inline bool call_fits(const Call& call, std::initializer_list<Tensor> others) {
  const auto& [n, T, grad_cycles] = call.counts;
  return n > 0 && 0 <= grad_cycles && grad_cycles <= T && states_fit(call.x, others) &&
         weights_fit(call.x, call.network.weights, call.network) && saved_fit(call);
}

}  // namespace latent_update
