// The arguments of a call, and whether they fit: sizes that do not would be read or written past the end, and no schema
// forbids them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <vector>

#include "common/checks.h"

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

constexpr int64_t kMostCalls = std::numeric_limits<int32_t>::max();

// How often the network is called; grad_cycles cycles, the last ones, carry gradients.
struct Counts {
  int64_t n, T, grad_cycles;

  bool are_counts() const { return 0 < n && n < kMostCalls && 0 <= grad_cycles && grad_cycles <= T; }
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

  // Calls of a layer that carry gradients, -1 if there are too many.
  int64_t saved_layers() const { return trm_fast::product({counts.grad_cycles, counts.n + 1, network.layers()}); }
};

// Gradients of the results, which become those of the states, and of the weights.
struct CallGradients {
  Tensor x, y, z;
  std::vector<Tensor> weights;
};

// Whether these weights, or their gradients, have the sizes of a network, whose inner widths are those of its first
// layer.
inline bool weights_fit(const Tensor& x, const std::vector<Tensor>& weights, const Network& network) {
  const std::vector<Tensor>& own = network.weights;
  if (own.empty() || own.size() % kPerLayer != 0 || weights.size() != own.size()) return false;
  const LayerTensors first = layer_of(own, 0);
  if (first.mix_out.dim() != 2 || first.down.dim() != 2) return false;
  const int64_t length = x.size(1), width = x.size(2), inner = first.down.size(1), mix = first.mix_out.size(1);
  const int64_t heads = network.heads;
  bool fit = width % 32 == 0 && inner % 32 == 0 && 0 <= heads && heads <= width;
  fit = fit && (heads > 0 ? width % (16 * heads) == 0 : mix > 0 && mix % 2 == 0);
  const auto is_matrix = [](const Tensor& t, int64_t rows, int64_t cols) {
    return trm_fast::is_plain(t, torch::headeronly::ScalarType::Float, {rows, cols});
  };
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
  const ScalarType type = x.scalar_type();
  bool fit = x.dim() == 3 && (type == ScalarType::Float || type == ScalarType::BFloat16);
  fit = fit && x.is_contiguous();
  for (const Tensor& t : others) fit = fit && trm_fast::is_plain(t, type, {x.size(0), x.size(1), x.size(2)});
  return fit;
}

// `kept` may be empty, and its bytes are checked where they are known.
inline bool saved_fit(const Call& call) {
  using torch::headeronly::ScalarType;
  const Tensor &x = call.x, &rope = call.network.rope;
  const auto& [states, scales, kept] = call.saved;
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2), layers = call.saved_layers();
  if (layers < 0) return false;
  const int64_t saved = trm_fast::product({layers > 0 ? 2 + layers : 0, x.numel()});
  bool fit = trm_fast::is_flat(states, x.scalar_type(), saved);
  fit = fit && trm_fast::is_flat(scales, ScalarType::Float, trm_fast::product({layers, batch, length}));
  fit = fit && kept.dim() == 3 && trm_fast::is_plain(kept, ScalarType::Byte, {layers, batch, kept.size(2)});
  const int64_t heads = call.network.heads;
  return fit &&
         (rope.numel() == 0 || (heads > 0 && trm_fast::is_flat(rope, ScalarType::Float, 2 * length * (width / heads))));
}

inline bool is_disjoint(const Call& call, std::initializer_list<Tensor> written, const std::vector<Tensor>& gradients) {
  trm_fast::Memory memory;
  memory.reads(call.x);
  memory.reads(call.network.rope);
  memory.reads(call.network.weights);
  for (const Tensor& tensor : written) memory.writes(tensor);
  memory.writes(gradients);
  return memory.is_disjoint();
}

// Whether a call fits whose states are x and these others.
inline bool call_fits(const Call& call, std::initializer_list<Tensor> others) {
  return call.counts.are_counts() && states_fit(call.x, others) &&
         weights_fit(call.x, call.network.weights, call.network) && saved_fit(call);
}

}  // namespace latent_update
