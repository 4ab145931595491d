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

#include "latent_update/call.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "latent_update/network.h"

namespace {
using namespace latent_update;

Matrix matrix_of(const Tensor& t) {
  return {static_cast<const float*>(t.data_ptr()), t.size(0), t.size(1), t.size(1), 1};
}

Given given_of(const LayerTensors& w) {
  return {matrix_of(w.mix_in), matrix_of(w.mix_out), matrix_of(w.gate_up), matrix_of(w.down)};
}

Sizes sizes_of(const Call& call) {
  const LayerTensors first = layer_of(call.network.weights, 0);
  const int64_t length = call.x.size(1), heads = call.network.heads;
  Sizes s;
  s.length = length;
  s.padded = length + length % 2;
  s.width = call.x.size(2);
  s.inner = first.down.size(1);
  s.mix_inner = heads > 0 ? 0 : first.mix_out.size(1);
  s.heads = heads;
  s.eps = static_cast<float>(call.network.eps);
  return s;
}

Tensor memory_of(int64_t bytes) {
  Tensor memory = torch::stable::empty({bytes + 64}, torch::headeronly::ScalarType::Byte);
  use_huge_pages(memory.data_ptr(), bytes);
  return memory;
}

char* begin_of(const Tensor& memory) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data_ptr()) + 63) / 64 * 64);
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
  Weights(const Sizes& s, const Network& network, bool backward)
      : memory_(memory_of(bytes_of([&](Arena& arena) { lay_out(s, network.layers(), backward, arena); }))) {
    Arena arena(begin_of(memory_));
    lay_out(s, network.layers(), backward, arena);
    const Tensor& rope = network.rope;
    for (size_t i = 0; i < layers_.size(); ++i) {
      pack_weights<E>(s, given_of(layer_of(network.weights, i)), backward, layers_[i]);
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
  Counts counts;
  int64_t layers, batch;
  Stored* states;  // [2 + cycles (n + 1) layers, batch, length, width]
  float* scales;   // [cycles (n + 1) layers, batch, length]
  char* kept;      // [cycles (n + 1) layers, batch, kept_bytes], or null
  int64_t kept_bytes;

  int64_t index(int64_t cycle, int64_t call, int64_t layer) const {
    return (cycle * (counts.n + 1) + call) * layers + layer;
  }
  Stored* start(int64_t which, int64_t b) const { return states + (which * batch + b) * s.length * s.width; }
  Stored* out(int64_t cycle, int64_t call, int64_t layer, int64_t b) const {
    return start(2 + index(cycle, call, layer), b);
  }
  Stored* last(int64_t cycle, int64_t call, int64_t b) const { return out(cycle, call, layers - 1, b); }
  float* scale(int64_t cycle, int64_t call, int64_t layer, int64_t b) const {
    return scales + (index(cycle, call, layer) * batch + b) * s.length;
  }
  Kept<E> keep(int64_t cycle, int64_t call, int64_t layer, int64_t b) const {
    Arena arena(kept + (index(cycle, call, layer) * batch + b) * kept_bytes, 0);
    return Kept<E>(s, arena);
  }

  // What a cycle starts from, and what call k of it adds up: z + (y + x), or y + z at its end.
  const Stored* first_y(int64_t cycle, int64_t b) const {
    return cycle == 0 ? start(0, b) : last(cycle - 1, counts.n, b);
  }
  const Stored* z_before(int64_t cycle, int64_t call, int64_t b) const {
    if (call > 0) return last(cycle, call - 1, b);
    return cycle == 0 ? start(1, b) : last(cycle - 1, counts.n - 1, b);
  }
  Addends<E> addends(int64_t cycle, int64_t call, const Stored* x, int64_t b) const {
    const Stored *y = first_y(cycle, b), *z = z_before(cycle, call, b);
    return call < counts.n ? Addends<E>{z, y, x} : Addends<E>{y, z, nullptr};
  }
};

template <class E>
int64_t kept_bytes_of(const Sizes& s) {
  Arena counting(nullptr, 0);
  Kept<E>(s, counting);
  return counting.bytes();
}

template <class E>
Saved<E> saved_of(const Call& call, const Sizes& s) {
  const auto& [states, scales, kept] = call.saved;
  Saved<E> saved;
  saved.s = s;
  saved.counts = call.counts;
  saved.layers = call.network.layers();
  saved.batch = call.x.size(0);
  saved.states = static_cast<typename E::Stored*>(states.data_ptr());
  saved.scales = static_cast<float*>(scales.data_ptr());
  saved.kept = kept.numel() > 0 ? static_cast<char*>(kept.data_ptr()) : nullptr;
  saved.kept_bytes = kept_bytes_of<E>(s);
  STD_TORCH_CHECK(saved.kept == nullptr || kept.size(2) == saved.kept_bytes, "latent_update: kept must have ",
                  saved.kept_bytes, " bytes per layer and sample; got ", kept.size(2));
  use_huge_pages(saved.kept, kept.numel());
  return saved;
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
    Arena mine(begin_of(memory) + thread * bytes);
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
    const Counts& counts = saved_.counts;
    const int64_t size = saved_.s.length * saved_.s.width, plain = counts.T - counts.grad_cycles;
    Stored *y = y_ + b * size, *z = z_ + b * size;
    const Stored* x = x_ + b * size;
    std::vector<Stored> between(saved_.layers > 1 ? size : 0);
    for (int64_t cycle = 0; cycle < plain; ++cycle) {
      for (int64_t k = 0; k < counts.n; ++k) call(worker, {z, y, x}, between.data(), z);
      call(worker, {y, z, nullptr}, between.data(), y);
    }
    if (counts.grad_cycles == 0) return;
    std::copy_n(y, size, saved_.start(0, b));
    std::copy_n(z, size, saved_.start(1, b));
    for (int64_t cycle = 0; cycle < counts.grad_cycles; ++cycle) {
      for (int64_t k = 0; k <= counts.n; ++k) saved_call(worker, cycle, k, x, b);
    }
    std::copy_n(saved_.last(counts.grad_cycles - 1, counts.n, b), size, y);
    std::copy_n(saved_.last(counts.grad_cycles - 1, counts.n - 1, b), size, z);
  }

 private:
  static Stored* data(const Tensor& t) { return static_cast<Stored*>(t.data_ptr()); }

  void call(Worker<E>& worker, const Addends<E>& addends, Stored* between, Stored* out) const {
    const int64_t last = saved_.layers - 1;
    for (int64_t i = 0; i <= last; ++i) {
      const Addends<E> in = i == 0 ? addends : Addends<E>{between, nullptr, nullptr};
      worker.forward(weights_[i], in, nullptr, i == last ? out : between, worker.spare());
    }
  }

  void saved_call(Worker<E>& worker, int64_t cycle, int64_t k, const Stored* x, int64_t b) const {
    for (int64_t i = 0; i < saved_.layers; ++i) {
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
void forward_in(const Call& call, const Tensor& y, const Tensor& z) {
  const Sizes s = sizes_of(call);
  const Weights<E> packed(s, call.network, false);
  const Saved<E> saved = saved_of<E>(call, s);
  const Crew<E> crew(s, false, saved.batch);
  const Forward<E> pass(saved, packed, call.x, y, z);
  std::atomic<int64_t> next{0};
  trm_fast::parallel_for(0, crew.threads, 1, [&](int64_t begin, int64_t end) {
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

  Backward(const Call& call, const CallGradients& d)
      : s_(sizes_of(call)),
        saved_(saved_of<E>(call, s_)),
        layers_(saved_.layers),
        weights_(s_, call.network, true),
        x_(data(call.x)),
        given_{data(d.x), data(d.y), data(d.z)},
        d_weights_(d.weights),
        crew_(s_, true, saved_.batch),
        chunk_(chunk_of(crew_.threads)),
        slots_(slots_of()),
        memory_(memory_of(bytes_of([&](Arena& arena) { lay_out(arena); }))) {
    Arena arena(begin_of(memory_));
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
    const int64_t calls = saved_.counts.grad_cycles * (saved_.counts.n + 1);
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
    trm_fast::parallel_for(0, crew_.threads, 1, [&](int64_t begin, int64_t end) {
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
    for (int64_t cycle = saved_.counts.grad_cycles - 1; cycle >= 0; --cycle) {
      for (int64_t k = saved_.counts.n; k >= 0; --k) {
        trm_fast::parallel_for(0, crew_.threads, 1, [&](int64_t begin, int64_t end) {
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
    float* d = k == saved_.counts.n ? dy : dz;
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
    add(d, k == saved_.counts.n ? dz : dy, size);
    if (k < saved_.counts.n) add(d, dx, size);
  }

  static float* place(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

  std::vector<WeightProduct> weight_products() const {
    std::vector<WeightProduct> all;
    const int64_t width = s_.width, inner = s_.inner;
    for (int64_t i = 0; i < layers_; ++i) {
      const Operands& o = operands_[i];
      const LayerTensors d = layer_of(d_weights_, i);
      all.push_back({o.mlp.d_gate_up, o.mlp.in, 2 * inner, width, {place(d.gate_up), width, inner}});
      all.push_back({o.mlp.d_out, o.mlp.act, width, inner, {place(d.down), inner, 0}});
      if (!s_.attention()) continue;
      all.push_back({o.attention.d_qkv, o.attention.in, 3 * width, width, {place(d.mix_in), width, 0}});
      all.push_back({o.attention.d_out, o.attention.mixed, width, width, {place(d.mix_out), width, 0}});
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
    trm_fast::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (size_t i = next++; i < tasks.size(); i = next++) add_to_weight<E>(*tasks[i].first, tasks[i].second, units);
    });
  }

  // The sums of all threads, in the order of threads; that of `down` is turned.
  void add_mixer_gradients() const {
    for (int64_t layer = 0; layer < layers_; ++layer) {
      const LayerTensors d = layer_of(d_weights_, layer);
      float *gate_up = place(d.mix_in), *down = place(d.mix_out);
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

  const Sizes s_;
  const Saved<E> saved_;
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

void forward(const Call& call, const Tensor& y, const Tensor& z) {
  is_bfloat16(call.x) ? forward_in<BFloat16>(call, y, z) : forward_in<Float32>(call, y, z);
}

void backward(const Call& call, const CallGradients& d) {
  is_bfloat16(call.x) ? Backward<BFloat16>(call, d).run() : Backward<Float32>(call, d).run();
}

}  // namespace
#else
namespace {
using namespace latent_update;
bool ready(bool) { return false; }
bool is_bfloat16(const Tensor&) { return false; }
void forward(const Call&, const Tensor&, const Tensor&) {}
void backward(const Call&, const CallGradients&) {}
}  // namespace
#endif

namespace {

void check(const Call& call, bool fits) {
  STD_TORCH_CHECK(
      fits,
      "latent_update: needs contiguous float32 or bfloat16 states and float32 weights of sizes that fit, and "
      "memory of its own for what it writes");
  STD_TORCH_CHECK(ready(is_bfloat16(call.x)), "latent_update: needs a CPU with AVX-512, and AVX512-BF16 for bfloat16");
}

// The arguments of both are those of their schemas.
void latent_update_forward(Tensor x, Tensor y, Tensor z, std::vector<Tensor> weights, Tensor rope, Tensor states,
                           Tensor scales, Tensor kept, int64_t heads, double eps, int64_t n, int64_t T,
                           int64_t grad_cycles) {
  const Call call{x, {weights, rope, heads, eps}, {n, T, grad_cycles}, {states, scales, kept}};
  check(call, call_fits(call, {y, z}) && is_disjoint(call, {y, z, states, scales, kept}, {}));
  if (x.numel() > 0) forward(call, y, z);
}

void latent_update_backward(Tensor x, std::vector<Tensor> weights, Tensor rope, Tensor states, Tensor scales,
                            Tensor kept, Tensor dx, Tensor dy, Tensor dz, std::vector<Tensor> d_weights, int64_t heads,
                            double eps, int64_t n, int64_t grad_cycles) {
  const Call call{x, {weights, rope, heads, eps}, {n, grad_cycles, grad_cycles}, {states, scales, kept}};
  const CallGradients d{dx, dy, dz, d_weights};
  // What is saved is only read, but nothing of it may be part of another tensor either.
  check(call, grad_cycles > 0 && call_fits(call, {dx, dy, dz}) && weights_fit(x, d.weights, call.network) &&
                  is_disjoint(call, {states, scales, kept, dx, dy, dz}, d.weights));
  if (x.numel() > 0) backward(call, d);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CPU, m) {
  m.impl("latent_update_forward_", TORCH_BOX(&latent_update_forward));
  m.impl("latent_update_backward_", TORCH_BOX(&latent_update_backward));
}
STABLE_TORCH_LIBRARY_IMPL(trm_fast, CompositeExplicitAutograd, m) {
  m.impl("latent_update_cpu_ready", TORCH_BOX(&ready));
}
