// The meaning is in trm_fast/ops/latent_update.py.
//
// Depth first: one thread takes one sample through the whole recursion, so that its activations stay in its caches and
// only weights come from farther away. Products are our own (product.h): their weights are packed once per call, and
// norms, activations and residual sums use the sums while they are in registers.
//
// The backward pass goes through the calls from last to first. In each, a thread takes its samples back through the
// layers, and leaves both sides of the products that give the gradients of weights; then all threads share these,
// over the tokens of all samples at once. Only the weights of the token mixer get their gradients sample by sample.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

using torch::stable::Tensor;

#if defined(__x86_64__) && defined(__GNUC__)
#include "latent_update/check.h"
#include "latent_update/network.h"

namespace {
using namespace latent_update;

struct Settings {
  int64_t n, T, grad_cycles, layers;

  int64_t saved_layers() const { return grad_cycles * (n + 1) * layers; }
};

Matrix matrix_of(const Tensor& t) {
  return {static_cast<const float*>(t.data_ptr()), t.size(0), t.size(1), t.size(1), 1};
}

Given given_of(const std::vector<Tensor>& weights, int64_t layer) {
  const Tensor* w = weights.data() + 4 * layer;
  return {matrix_of(w[0]), matrix_of(w[1]), matrix_of(w[2]), matrix_of(w[3])};
}

Sizes sizes_of(const Tensor& x, const std::vector<Tensor>& weights, int64_t heads, double eps) {
  const int64_t length = x.size(1);
  return {length, length + length % 2,    x.size(2), weights[3].size(1), heads > 0 ? 0 : weights[1].size(1),
          heads,  static_cast<float>(eps)};
}

Tensor memory_of(int64_t bytes) {
  Tensor memory = torch::stable::empty({bytes + 64}, torch::headeronly::ScalarType::Byte);
  use_huge_pages(memory.data_ptr(), bytes);
  return memory;
}

Arena arena_in(const Tensor& memory) {
  return Arena(reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data_ptr()) + 63) / 64 * 64));
}

// Bytes of the part of an arena that `lay_out` takes.
template <class LayOut>
int64_t bytes_of(const LayOut& lay_out) {
  Arena counting;
  lay_out(counting);
  return counting.bytes();
}

template <class E>
class Weights {
 public:
  Weights(const Sizes& s, const std::vector<Tensor>& given, const Tensor& rope, bool backward)
      : memory_(memory_of(bytes_of([&](Arena& arena) { lay_out(s, given.size() / 4, backward, arena); }))) {
    Arena arena = arena_in(memory_);
    lay_out(s, given.size() / 4, backward, arena);
    for (size_t i = 0; i < layers_.size(); ++i) {
      pack_weights<E>(s, given_of(given, i), backward, layers_[i]);
      layers_[i].attention.rope = rope.numel() > 0 ? static_cast<const float*>(rope.data_ptr()) : nullptr;
    }
  }

  const LayerWeights& operator[](int64_t layer) const { return layers_[layer]; }

 private:
  void lay_out(const Sizes& s, int64_t layers, bool backward, Arena& arena) {
    layers_.clear();
    for (int64_t i = 0; i < layers; ++i) layers_.push_back(lay_out_weights<E>(s, backward, arena));
  }

  std::vector<LayerWeights> layers_;  // before memory_, whose size it gives
  Tensor memory_;
};

// What the forward pass leaves for the backward pass: the state at the start of the first cycle with gradient, the
// output of every layer, the scales of its last norm, and, if wanted, what the layers would else compute once more.
template <class E>
struct Saved {
  using Stored = typename E::Stored;
  Sizes s;
  Settings settings;
  int64_t batch;
  Stored* states;  // [2 + cycles (n + 1) layers, batch, length, width]
  float* scales;   // [cycles (n + 1) layers, batch, length]
  char* kept;      // [cycles (n + 1) layers, batch, kept_bytes], or null
  int64_t kept_bytes;

  int64_t index(int64_t cycle, int64_t call, int64_t layer) const {
    return (cycle * (settings.n + 1) + call) * settings.layers + layer;
  }
  Stored* start(int64_t which, int64_t b) const { return states + (which * batch + b) * s.length * s.width; }
  Stored* out(int64_t cycle, int64_t call, int64_t layer, int64_t b) const {
    return start(2 + index(cycle, call, layer), b);
  }
  Stored* last(int64_t cycle, int64_t call, int64_t b) const { return out(cycle, call, settings.layers - 1, b); }
  float* scale(int64_t cycle, int64_t call, int64_t layer, int64_t b) const {
    return scales + (index(cycle, call, layer) * batch + b) * s.length;
  }
  Kept<E> keep(int64_t cycle, int64_t call, int64_t layer, int64_t b) const {
    Arena arena(kept + (index(cycle, call, layer) * batch + b) * kept_bytes);
    return Kept<E>(s, arena);
  }

  // What a cycle starts from, and what call k of it adds up: z + (y + x), or y + z at its end.
  const Stored* first_y(int64_t cycle, int64_t b) const {
    return cycle == 0 ? start(0, b) : last(cycle - 1, settings.n, b);
  }
  const Stored* z_before(int64_t cycle, int64_t call, int64_t b) const {
    if (call > 0) return last(cycle, call - 1, b);
    return cycle == 0 ? start(1, b) : last(cycle - 1, settings.n - 1, b);
  }
  Addends<E> addends(int64_t cycle, int64_t call, const Stored* x, int64_t b) const {
    const Stored *y = first_y(cycle, b), *z = z_before(cycle, call, b);
    return call < settings.n ? Addends<E>{z, y, x} : Addends<E>{y, z, nullptr};
  }
};

template <class E>
int64_t kept_bytes_of(const Sizes& s) {
  return bytes_of([&](Arena& arena) { Kept<E>(s, arena); });
}

template <class E>
Saved<E> saved_of(const Sizes& s, const Settings& settings, const Tensor& x, const Tensor& states, const Tensor& scales,
                  const Tensor& kept) {
  char* kept_data = kept.numel() > 0 ? static_cast<char*>(kept.data_ptr()) : nullptr;
  STD_TORCH_CHECK(kept_data == nullptr || kept.size(2) == kept_bytes_of<E>(s), "latent_update: kept must have ",
                  kept_bytes_of<E>(s), " bytes per layer and sample; got ", kept.size(2));
  use_huge_pages(kept_data, kept.numel());
  return {s,
          settings,
          x.size(0),
          static_cast<typename E::Stored*>(states.data_ptr()),
          static_cast<float*>(scales.data_ptr()),
          kept_data,
          kept_bytes_of<E>(s)};
}

// Workers for the threads of a region, each in its own part of one block of memory.
template <class E>
struct Crew {
  int64_t threads, bytes;
  Tensor memory;
  Sizes s;
  bool backward;

  Crew(const Sizes& sizes, bool back, int64_t samples)
      : threads(std::min<int64_t>(torch::stable::get_num_threads(), samples)),
        bytes(bytes_of([&](Arena& arena) { Worker<E>(sizes, back, arena); })),
        memory(memory_of(threads * bytes)),
        s(sizes),
        backward(back) {}

  Worker<E> worker(int64_t thread) const {
    Arena all = arena_in(memory);
    Arena mine(all.take<char>(0) + thread * bytes);
    return Worker<E>(s, backward, mine);
  }
};

template <class E>
class Forward {
 public:
  using Stored = typename E::Stored;

  Forward(const Saved<E>& saved, const Weights<E>& weights, const Tensor& x, const Tensor& y, const Tensor& z)
      : saved_(saved), weights_(weights), x_(data(x)), y_(data(y)), z_(data(z)) {}

  void run(Worker<E>& worker, int64_t b) const {
    const Settings& settings = saved_.settings;
    const int64_t size = saved_.s.length * saved_.s.width, plain = settings.T - settings.grad_cycles;
    Stored *y = y_ + b * size, *z = z_ + b * size;
    const Stored* x = x_ + b * size;
    std::vector<Stored> between(settings.layers > 1 ? size : 0);
    for (int64_t cycle = 0; cycle < plain; ++cycle) {
      for (int64_t k = 0; k < settings.n; ++k) call(worker, {z, y, x}, between.data(), z);
      call(worker, {y, z, nullptr}, between.data(), y);
    }
    if (settings.grad_cycles == 0) return;
    std::copy_n(y, size, saved_.start(0, b));
    std::copy_n(z, size, saved_.start(1, b));
    for (int64_t cycle = 0; cycle < settings.grad_cycles; ++cycle) {
      for (int64_t k = 0; k <= settings.n; ++k) saved_call(worker, cycle, k, x, b);
    }
    std::copy_n(saved_.last(settings.grad_cycles - 1, settings.n, b), size, y);
    std::copy_n(saved_.last(settings.grad_cycles - 1, settings.n - 1, b), size, z);
  }

 private:
  static Stored* data(const Tensor& t) { return static_cast<Stored*>(t.data_ptr()); }

  void call(Worker<E>& worker, const Addends<E>& addends, Stored* between, Stored* out) const {
    const int64_t last = saved_.settings.layers - 1;
    for (int64_t i = 0; i <= last; ++i) {
      const Addends<E> in = i == 0 ? addends : Addends<E>{between, nullptr, nullptr};
      worker.forward(weights_[i], in, nullptr, i == last ? out : between, worker.spare());
    }
  }

  void saved_call(Worker<E>& worker, int64_t cycle, int64_t k, const Stored* x, int64_t b) const {
    for (int64_t i = 0; i < saved_.settings.layers; ++i) {
      const Addends<E> in =
          i == 0 ? saved_.addends(cycle, k, x, b) : Addends<E>{saved_.out(cycle, k, i - 1, b), nullptr, nullptr};
      Stored* out = saved_.out(cycle, k, i, b);
      float* scales = saved_.scale(cycle, k, i, b);
      if (saved_.kept == nullptr) {
        worker.forward(weights_[i], in, nullptr, out, scales);
      } else {
        const Kept<E> kept = saved_.keep(cycle, k, i, b);
        worker.forward(weights_[i], in, &kept, out, scales);
      }
    }
  }

  const Saved<E>& saved_;
  const Weights<E>& weights_;
  Stored *x_, *y_, *z_;
};

template <class E>
void forward(const Tensor& x, const Tensor& y, const Tensor& z, const std::vector<Tensor>& weights, const Tensor& rope,
             const Tensor& states, const Tensor& scales, const Tensor& kept, const Sizes& s, const Settings& settings) {
  const Weights<E> packed(s, weights, rope, false);
  const Saved<E> saved = saved_of<E>(s, settings, x, states, scales, kept);
  const Crew<E> crew(s, false, saved.batch);
  const Forward<E> pass(saved, packed, x, y, z);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, crew.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      Worker<E> worker = crew.worker(thread);
      for (int64_t b = next++; b < saved.batch; b = next++) pass.run(worker, b);
    }
  });
}

// Sums into rows of a weight's gradient, which SwiGLU's products have in turns.
struct AddToWeight {
  float* out;
  int64_t width, inner;

  template <int R, int C>
  AVX512 void operator()(int64_t row, int64_t col, const __m512 (&sums)[R][C]) const {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const int64_t block = (row + r) / kLanes;
      const int64_t to = inner > 0 ? in_turns(block, inner) + (row + r) % kLanes : row + r;
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        float* at = out + to * width + col + c * kLanes;
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sums[r][c]));
      }
    }
  }
};

// out += left^T right over the tokens of all samples.
struct WeightProduct {
  Panels left, right;
  int64_t left_cols, right_cols;
  AddToWeight out;
};

// Units that are summed at once, and panels of the left side that stay in the second-level cache while the panels of
// the right side pass: 256 KB.
constexpr int64_t kDepth = 1024, kLeftPanels = 2;

template <class E>
void add_to_weight(const WeightProduct& p, int64_t first_panel, int64_t units) {
  const int64_t end = std::min(first_panel + kLeftPanels, p.left_cols / kPanel);
  for (int64_t depth = 0; depth < units; depth += kDepth) {
    const int64_t count = std::min(kDepth, units - depth);
    for (int64_t col = 0; col < p.right_cols; col += kPanel) {
      for (int64_t panel = first_panel; panel < end; ++panel) {
        AddToWeight out = p.out;
        const Left left = by_columns(from_unit(p.left, depth), panel);
        for (int64_t row = 0; row < kPanel;) {
          const int64_t rows = tile_rows(row, kPanel);
          const Left here{left.words + row, left.row, left.unit};
          const int64_t to = panel * kPanel + row;
          if (rows == 12) {
            tile<E, 12, 2>(here, p.right.at(col, depth), count, to, col, out);
          } else {
            tile<E, 10, 2>(here, p.right.at(col, depth), count, to, col, out);
          }
          row += rows;
        }
      }
    }
  }
}

template <class E>
class Backward {
 public:
  using Stored = typename E::Stored;

  Backward(const Saved<E>& saved, const std::vector<Tensor>& weights, const Tensor& rope, const Tensor& x,
           const Tensor& dx, const Tensor& dy, const Tensor& dz, const std::vector<Tensor>& d_weights)
      : saved_(saved),
        s_(saved.s),
        layers_(saved.settings.layers),
        weights_(s_, weights, rope, true),
        x_(data(x)),
        given_{data(dx), data(dy), data(dz)},
        d_weights_(d_weights),
        crew_(s_, true, saved.batch),
        chunk_(chunk_of(crew_.threads)),
        slots_(slots_of()),
        memory_(memory_of(bytes_of([&](Arena& arena) { lay_out(arena); }))) {
    Arena arena = arena_in(memory_);
    lay_out(arena);
  }

  void run() {
    for (const auto& g : gradients_) {
      std::fill_n(g.down, s_.mix_inner * g.tokens, 0.0f);
      std::fill_n(g.gate_up, 2 * s_.mix_inner * g.tokens, 0.0f);
    }
    for (int64_t first = 0; first < saved_.batch; first += chunk_) {
      run_chunk(first, std::min(chunk_, saved_.batch - first));
    }
    if (!s_.attention()) add_mixer_gradients();
  }

 private:
  static Stored* data(const Tensor& t) { return static_cast<Stored*>(t.data_ptr()); }

  // Samples that go back together: about 2048 tokens, and the same number for each thread.
  int64_t chunk_of(int64_t threads) const {
    const int64_t each = std::max<int64_t>(1, 2048 / s_.padded / threads);
    return std::min(saved_.batch, each * threads);
  }

  // Calls whose operands are multiplied at once, so that few tokens do not mean many passes over the gradients.
  int64_t slots_of() const {
    const int64_t calls = saved_.settings.grad_cycles * (saved_.settings.n + 1);
    return std::clamp<int64_t>(2048 / (chunk_ * s_.padded), 1, calls);
  }

  void lay_out(Arena& arena) {
    const int64_t rows = chunk_ * s_.padded;
    for (auto& place : d_) place = arena.take<float>(rows * s_.width);
    operands_.clear();
    gradients_.clear();
    for (int64_t i = 0; i < layers_; ++i) operands_.push_back(Operands::lay_out<E>(s_, slots_ * rows, arena));
    for (int64_t i = 0; i < (s_.attention() ? 0 : crew_.threads * layers_); ++i) gradients_.emplace_back(s_, arena);
  }

  // Calls task(thread, sample) for the samples of a chunk; a thread always has the same ones.
  template <class Task>
  void each_sample(int64_t count, const Task& task) const {
    torch::stable::parallel_for(0, crew_.threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        for (int64_t i = count * thread / crew_.threads; i < count * (thread + 1) / crew_.threads; ++i) task(thread, i);
      }
    });
  }

  void run_chunk(int64_t first, int64_t count) {
    const int64_t size = s_.padded * s_.width, plain = s_.length * s_.width;
    each_sample(count, [&](int64_t, int64_t i) {
      std::fill_n(d_[0] + i * size, size, 0.0f);
      widen(given_[1] + (first + i) * plain, d_[1] + i * size);
      widen(given_[2] + (first + i) * plain, d_[2] + i * size);
    });
    int64_t slot = 0;
    for (int64_t cycle = saved_.settings.grad_cycles - 1; cycle >= 0; --cycle) {
      for (int64_t k = saved_.settings.n; k >= 0; --k) {
        torch::stable::parallel_for(0, crew_.threads, 1, [&](int64_t begin, int64_t end) {
          for (int64_t thread = begin; thread < end; ++thread) {
            Worker<E> worker = crew_.worker(thread);
            const int64_t last = count * (thread + 1) / crew_.threads;
            for (int64_t i = count * thread / crew_.threads; i < last; ++i) {
              call(worker, thread, cycle, k, first + i, i, slot * count + i);
            }
          }
        });
        if (++slot < slots_ && (cycle > 0 || k > 0)) continue;
        add_weight_products(slot * count);
        slot = 0;
      }
    }
    each_sample(count, [&](int64_t, int64_t i) {
      for (int j = 0; j < 3; ++j) round_rows<E>(d_[j] + i * size, plain, given_[j] + (first + i) * plain);
    });
  }

  AVX512 void widen(const Stored* from, float* to) const {
    const int64_t size = s_.length * s_.width;
    for (int64_t i = 0; i < size; i += kLanes) _mm512_storeu_ps(to + i, E::load(from + i));
    std::fill_n(to + size, (s_.padded - s_.length) * s_.width, 0.0f);
  }

  AVX512 static void add(const float* from, float* to, int64_t size) {
    for (int64_t i = 0; i < size; i += kLanes) {
      _mm512_storeu_ps(to + i, _mm512_add_ps(_mm512_loadu_ps(to + i), _mm512_loadu_ps(from + i)));
    }
  }

  // Sample b, the i-th of its chunk, back through call k, whose output is y if k = n, else z. `slot` is its place among
  // the operands.
  void call(Worker<E>& worker, int64_t thread, int64_t cycle, int64_t k, int64_t b, int64_t i, int64_t slot) {
    const int64_t size = s_.padded * s_.width;
    float *dx = d_[0] + i * size, *dy = d_[1] + i * size, *dz = d_[2] + i * size;
    float* d = k == saved_.settings.n ? dy : dz;
    const Stored* x = x_ + b * s_.length * s_.width;
    for (int64_t layer = layers_ - 1; layer >= 0; --layer) {
      const Addends<E> in = layer == 0 ? saved_.addends(cycle, k, x, b)
                                       : Addends<E>{saved_.out(cycle, k, layer - 1, b), nullptr, nullptr};
      const Operands operands = operands_[layer].from(slot * s_.padded / E::kUnit);
      const MixerGradients* gradients = s_.attention() ? nullptr : &gradients_[thread * layers_ + layer];
      const auto back = [&](const Kept<E>* kept) {
        worker.backward(weights_[layer], in, kept, saved_.out(cycle, k, layer, b), saved_.scale(cycle, k, layer, b), d,
                        operands, gradients);
      };
      if (saved_.kept == nullptr) {
        back(nullptr);
      } else {
        const Kept<E> kept = saved_.keep(cycle, k, layer, b);
        back(&kept);
      }
    }
    add(d, k == saved_.settings.n ? dz : dy, size);
    if (k < saved_.settings.n) add(d, dx, size);
  }

  float* d_weight(int64_t layer, int64_t which) const {
    return static_cast<float*>(d_weights_[4 * layer + which].data_ptr());
  }

  std::vector<WeightProduct> weight_products() const {
    std::vector<WeightProduct> all;
    const int64_t width = s_.width, inner = s_.inner;
    for (int64_t i = 0; i < layers_; ++i) {
      const Operands& o = operands_[i];
      all.push_back({o.mlp.d_gate_up, o.mlp.in, 2 * inner, width, {d_weight(i, 2), width, inner}});
      all.push_back({o.mlp.d_out, o.mlp.act, width, inner, {d_weight(i, 3), inner, 0}});
      if (!s_.attention()) continue;
      all.push_back({o.attention.d_qkv, o.attention.in, 3 * width, width, {d_weight(i, 0), width, 0}});
      all.push_back({o.attention.d_out, o.attention.mixed, width, width, {d_weight(i, 1), width, 0}});
    }
    return all;
  }

  void add_weight_products(int64_t samples) const {
    const std::vector<WeightProduct> products = weight_products();
    std::vector<std::pair<const WeightProduct*, int64_t>> tasks;
    for (const WeightProduct& p : products) {
      for (int64_t panel = 0; panel < p.left_cols / kPanel; panel += kLeftPanels) tasks.emplace_back(&p, panel);
    }
    const int64_t units = samples * s_.padded / E::kUnit;
    std::atomic<size_t> next{0};
    const int64_t threads = torch::stable::get_num_threads();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (size_t i = next++; i < tasks.size(); i = next++) add_to_weight<E>(*tasks[i].first, tasks[i].second, units);
    });
  }

  // The sums of all threads, in the order of threads; that of `down` is turned.
  void add_mixer_gradients() const {
    for (int64_t layer = 0; layer < layers_; ++layer) {
      float *gate_up = d_weight(layer, 0), *down = d_weight(layer, 1);
      for (int64_t thread = 0; thread < crew_.threads; ++thread) {
        const MixerGradients& g = gradients_[thread * layers_ + layer];
        for (int64_t i = 0; i < 2 * s_.mix_inner; ++i) {
          for (int64_t j = 0; j < s_.length; ++j) gate_up[i * s_.length + j] += g.gate_up[i * g.tokens + j];
        }
        for (int64_t i = 0; i < s_.mix_inner; ++i) {
          for (int64_t j = 0; j < s_.length; ++j) down[j * s_.mix_inner + i] += g.down[i * g.tokens + j];
        }
      }
    }
  }

  const Saved<E>& saved_;
  const Sizes s_;
  const int64_t layers_;
  const Weights<E> weights_;
  const Stored* x_;
  Stored* given_[3];  // gradients of x, y and z: those of y and z are overwritten
  const std::vector<Tensor>& d_weights_;
  const Crew<E> crew_;
  const int64_t chunk_, slots_;
  float* d_[3];                            // the same in float32, for one chunk: [chunk, padded, width]
  std::vector<Operands> operands_;         // of each layer
  std::vector<MixerGradients> gradients_;  // of each thread and layer
  Tensor memory_;
};

bool ready(bool bfloat16) {
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 && (!bfloat16 || __builtin_cpu_supports("avx512bf16"));
}

bool is_bfloat16(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::BFloat16; }

void check(const Tensor& x, bool fits) {
  STD_TORCH_CHECK(fits,
                  "latent_update: needs contiguous float32 or bfloat16 states and float32 weights of sizes that fit");
  STD_TORCH_CHECK(ready(is_bfloat16(x)), "latent_update: needs a CPU with AVX-512, and AVX512-BF16 for bfloat16");
}

void latent_update_forward(Tensor x, Tensor y, Tensor z, std::vector<Tensor> weights, Tensor rope, Tensor states,
                           Tensor scales, Tensor kept, int64_t heads, double eps, int64_t n, int64_t T,
                           int64_t grad_cycles) {
  const Settings settings{n, T, grad_cycles, static_cast<int64_t>(weights.size()) / 4};
  check(x, n > 0 && 0 <= grad_cycles && grad_cycles <= T && states_fit(x, {y, z}) &&
               weights_fit(x, weights, weights, heads) &&
               saved_fit(x, rope, states, scales, kept, heads, settings.saved_layers()));
  if (x.numel() == 0) return;
  const Sizes s = sizes_of(x, weights, heads, eps);
  const auto run = is_bfloat16(x) ? forward<BFloat16> : forward<Float32>;
  run(x, y, z, weights, rope, states, scales, kept, s, settings);
}

void latent_update_backward(Tensor x, std::vector<Tensor> weights, Tensor rope, Tensor states, Tensor scales,
                            Tensor kept, Tensor dx, Tensor dy, Tensor dz, std::vector<Tensor> d_weights, int64_t heads,
                            double eps, int64_t n, int64_t grad_cycles) {
  const Settings settings{n, grad_cycles, grad_cycles, static_cast<int64_t>(weights.size()) / 4};
  check(x, n > 0 && grad_cycles > 0 && states_fit(x, {dx, dy, dz}) && weights_fit(x, weights, weights, heads) &&
               weights_fit(x, d_weights, weights, heads) &&
               saved_fit(x, rope, states, scales, kept, heads, settings.saved_layers()));
  if (x.numel() == 0) return;
  const Sizes s = sizes_of(x, weights, heads, eps);
  if (is_bfloat16(x)) {
    const auto saved = saved_of<BFloat16>(s, settings, x, states, scales, kept);
    Backward<BFloat16>(saved, weights, rope, x, dx, dy, dz, d_weights).run();
  } else {
    const auto saved = saved_of<Float32>(s, settings, x, states, scales, kept);
    Backward<Float32>(saved, weights, rope, x, dx, dy, dz, d_weights).run();
  }
}

}  // namespace
#else
namespace {
bool ready(bool) { return false; }
void latent_update_forward(Tensor, Tensor, Tensor, std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor, int64_t, double,
                           int64_t, int64_t, int64_t) {
  STD_TORCH_CHECK(false, "latent_update: needs a CPU with AVX-512");
}
void latent_update_backward(Tensor, std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                            std::vector<Tensor>, int64_t, double, int64_t, int64_t) {
  STD_TORCH_CHECK(false, "latent_update: needs a CPU with AVX-512");
}
}  // namespace
#endif

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CPU, m) {
  m.impl("latent_update_forward_", TORCH_BOX(&latent_update_forward));
  m.impl("latent_update_backward_", TORCH_BOX(&latent_update_backward));
}
STABLE_TORCH_LIBRARY_IMPL(trm_fast, CompositeExplicitAutograd, m) {
  m.impl("latent_update_cpu_ready", TORCH_BOX(&ready));
}
