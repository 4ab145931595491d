// The meaning is in trm_fast/ops/vector_latent_update.py.
//
// Depth first: a thread takes a block of rows through all updates, so that states and activations stay in its caches,
// and back through those with gradient. On the way back it leaves both sides of the products that give the gradients of
// weights; then all threads share these, over the rows of all steps at once. Large batches do so chunk by chunk.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"

using torch::stable::Tensor;

namespace {

struct Arguments {
  Tensor x;
  std::vector<Tensor> weights;  // those of the network of z, then those of y
  std::vector<double> scales;   // of each round
  int64_t steps, grad_rounds;
  Tensor states, kept, norms;  // what the forward pass leaves for the backward pass
};

// Gradients of the results, which become those of the states, and of the weights.
struct CallGradients {
  Tensor x, y, z;
  std::vector<Tensor> weights;
};

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__)
#include "vector_latent_update/weight_products.h"

namespace {
using namespace vector_latent_update;

constexpr int64_t kChunk = 512;     // rows that share the products of weights
constexpr int64_t kBlock = 32;      // most rows of a block: more would leave the second-level cache
constexpr int64_t kLeastBlock = 4;  // least: fewer would not hide the latency of a multiply-add
constexpr int64_t kVectors = 8;     // gradients of both networks that are sums over rows

int64_t even(int64_t rows) { return rows + rows % 2; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The batch in chunks, and a chunk in blocks, about as many for each thread. All but the last are equal and even. What
// is saved depends on the chunks alone, so the number of threads may change before the backward pass.
struct Division {
  int64_t batch, chunk, block;

  explicit Division(int64_t rows) : batch(rows) {
    const int64_t threads = torch::stable::get_num_threads();
    chunk = std::max<int64_t>(2, even(ceil_div(rows, std::max<int64_t>(1, ceil_div(rows, kChunk)))));
    const int64_t blocks = threads * ceil_div(chunk, threads * kBlock);
    block = std::max(kLeastBlock, even(ceil_div(chunk, blocks)));
  }

  int64_t chunks() const { return ceil_div(batch, chunk); }
  int64_t rows(int64_t number) const { return std::min(chunk, batch - number * chunk); }
  int64_t blocks() const { return ceil_div(chunk, block); }
};

struct Call {
  Counts counts;
  Given z, y;
  Tensor states, kept, scales;
};

const float* floats(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }

template <class E>
typename E::Stored* stored(const Tensor& t) {
  return static_cast<typename E::Stored*>(t.data_ptr());
}

// The weights of a network, or their gradients, in the order of the page.
struct NetTensors {
  const Tensor &in, &in_bias, &out, &out_bias, &gain, &shift;
};

NetTensors net_of(const std::vector<Tensor>& weights, bool is_y) {
  const Tensor* w = weights.data() + (is_y ? weights.size() / 2 : 0);
  return {w[0], w[1], w[2], w[3], w[4], w[5]};
}

Given given_of(const NetTensors& w, int64_t parts) {
  return {parts, floats(w.in), floats(w.in_bias), floats(w.out), floats(w.out_bias), floats(w.gain), floats(w.shift)};
}

Call call_of(const Arguments& a) {
  const Counts counts{a.x.size(1), static_cast<int64_t>(a.scales.size()), a.steps, a.grad_rounds,
                      std::vector<float>(a.scales.begin(), a.scales.end())};
  const Given z = given_of(net_of(a.weights, false), 3), y = given_of(net_of(a.weights, true), 2);
  return {counts, z, y, a.states, a.kept, a.norms};
}

// What one chunk saves, whose first row is `first`.
template <class E>
Saved<E> saved_of(const Call& call, int64_t first, int64_t count) {
  const Counts& c = call.counts;
  const int64_t rows = even(count), size = rows * c.hidden, row = c.updates() * c.hidden;
  const auto slots = [&](typename E::Stored* place, int64_t number) {
    return Slots<E>{{reinterpret_cast<uint32_t*>(place), number * rows / E::kUnit}, rows};
  };
  auto* states = stored<E>(call.states) + first * c.states() * c.hidden;
  Saved<E> saved{slots(states, c.grad_rounds),
                 slots(states + c.grad_rounds * size, c.grad_steps() + 1),
                 {},
                 {},
                 nullptr,
                 nullptr,
                 nullptr};
  saved.act_z.rows = saved.act_y.rows = rows;
  if (call.kept.numel() == 0) return saved;
  auto* kept = stored<E>(call.kept) + first * 3 * row;
  saved.act_z = slots(kept, c.grad_steps());
  saved.act_y = slots(kept + c.grad_steps() * size, c.grad_rounds);
  saved.slope = kept + rows * row;
  saved.normed = saved.slope + rows * row;
  saved.scales = static_cast<float*>(call.scales.data_ptr()) + first * c.updates();
  return saved;
}

// Calls task(i) for all i, whichever thread is free next.
template <class Task>
void share(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  trm_fast::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = next++; i < count; i = next++) task(thread, i);
    }
  });
}

// One block of memory for a call; `lay_out` takes its parts, once to count and once for good.
class Memory {
 public:
  template <class LayOut>
  explicit Memory(const LayOut& lay_out) {
    Arena counting;
    lay_out(counting);
    memory_ = torch::stable::empty({counting.bytes() + 64}, torch::headeronly::ScalarType::Byte);
    const uintptr_t place = (reinterpret_cast<uintptr_t>(memory_.data_ptr()) + 63) / 64 * 64;
    Arena arena(reinterpret_cast<void*>(place));
    lay_out(arena);
  }

 private:
  Tensor memory_;
};

template <class E>
void pack(const std::vector<Packing>& packings) {
  share(packings.size(), [&](int64_t, int64_t i) {
    packings[i].transposed ? pack_transposed<E>(packings[i]) : pack_straight<E>(packings[i]);
  });
}

template <class E>
std::vector<Scratch<E>> take_scratch(const Division& division, int64_t hidden, bool backward, Arena& arena) {
  std::vector<Scratch<E>> all;
  const int64_t threads = torch::stable::get_num_threads();
  for (int64_t i = 0; i < threads; ++i) all.emplace_back(division.block, hidden, backward, arena);
  return all;
}

template <class E>
void forward_in(const Call& call, const Tensor& x, const Tensor& y, const Tensor& z) {
  const Division division(x.size(0));
  const int64_t h = call.counts.hidden;
  NetPair nets;
  std::vector<Packing> packings;
  std::vector<Scratch<E>> scratch;
  const Memory memory([&](Arena& arena) {
    packings.clear();
    nets = {lay_out_net<E>(call.z, h, true, false, arena, packings),
            lay_out_net<E>(call.y, h, true, false, arena, packings)};
    scratch = take_scratch<E>(division, h, false, arena);
  });
  pack<E>(packings);
  share(division.chunks() * division.blocks(), [&](int64_t thread, int64_t i) {
    const int64_t chunk = i / division.blocks(), row = i % division.blocks() * division.block;
    const int64_t first = chunk * division.chunk, count = std::min(division.block, division.rows(chunk) - row);
    if (count <= 0) return;
    const Saved<E> saved = saved_of<E>(call, first, division.rows(chunk));
    const int64_t place = (first + row) * h;
    Block<E>(call.counts, nets, scratch[thread], row, count)
        .forward(stored<E>(x) + place, stored<E>(y) + place, stored<E>(z) + place, &saved);
  });
}

template <class E>
class Backward {
 public:
  Backward(const Call& call, const Tensor& x, const CallGradients& d)
      : call_(call),
        division_(x.size(0)),
        x_(stored<E>(x)),
        d_{stored<E>(d.x), stored<E>(d.y), stored<E>(d.z)},
        gradients_(d.weights),
        memory_([this](Arena& arena) { lay_out(arena); }) {}

  void run() {
    pack<E>(packings_);
    for (int64_t chunk = 0; chunk < division_.chunks(); ++chunk) run_chunk(chunk);
    if (division_.chunks() > 0) return;
    for (const Tensor& gradient : gradients_) std::fill_n(place(gradient), gradient.numel(), 0.0f);
  }

 private:
  static float* place(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

  void lay_out(Arena& arena) {
    const Counts& c = call_.counts;
    const int64_t h = c.hidden, rows = division_.chunk, rounds = c.grad_rounds, steps = c.grad_steps();
    const bool recompute = call_.kept.numel() == 0;
    const auto slots = [&](int64_t count) { return Slots<E>::take(count, rows, h, arena); };
    packings_.clear();
    nets_ = {lay_out_net<E>(call_.z, h, recompute, true, arena, packings_),
             lay_out_net<E>(call_.y, h, recompute, true, arena, packings_)};
    scratch_ = take_scratch<E>(division_, h, true, arena);
    operands_ = {slots(1), slots(1), slots(rounds), slots(steps), slots(rounds), slots(steps), slots(rounds)};
    if (recompute) act_z_ = slots(steps), act_y_ = slots(rounds);
    sums_ = arena.take<float>(division_.blocks() * kVectors * h);
  }

  // The panels of a last, shorter chunk lie closer together.
  Slots<E> fitted(const Slots<E>& slots, int64_t rows) const {
    return {{slots.panels.words, slots.panels.units * rows / slots.rows}, rows};
  }

  void run_chunk(int64_t chunk) {
    const int64_t first = chunk * division_.chunk, count = division_.rows(chunk), rows = even(count);
    Saved<E> saved = saved_of<E>(call_, first, count);
    if (!saved.has_insides()) saved.act_z = fitted(act_z_, rows), saved.act_y = fitted(act_y_, rows);
    const Operands<E>& o = operands_;
    const Operands<E> operands{fitted(o.x, rows),        fitted(o.total, rows),    fitted(o.round, rows),
                               fitted(o.hidden_z, rows), fitted(o.hidden_y, rows), fitted(o.out_z, rows),
                               fitted(o.out_y, rows)};
    const int64_t h = call_.counts.hidden, blocks = ceil_div(count, division_.block);
    share(blocks, [&](int64_t thread, int64_t i) {
      const int64_t row = i * division_.block, at = (first + row) * h;
      float* sums = sums_ + i * kVectors * h;
      std::fill_n(sums, kVectors * h, 0.0f);
      Block<E>(call_.counts, nets_, scratch_[thread], row, std::min(division_.block, count - row))
          .backward(x_ + at, d_[0] + at, d_[1] + at, d_[2] + at, saved, operands, vector_sums(sums),
                    vector_sums(sums + 4 * h));
    });
    const auto products = weight_products<E>(call_.counts, saved, operands, gradients_of(false), gradients_of(true));
    const int64_t panels = ceil_div(h / kPanel, kLeftPanels);
    share(products.size() * panels, [&](int64_t, int64_t i) {
      multiply_pieces<E>(products[i / panels], i % panels * kLeftPanels, h, chunk > 0);
    });
    add_vectors(blocks, chunk > 0);
  }

  VectorSums vector_sums(float* sums) const {
    const int64_t h = call_.counts.hidden;
    return {sums, sums + h, sums + 2 * h, sums + 3 * h};
  }

  Gradients gradients_of(bool is_y) const {
    const NetTensors d = net_of(gradients_, is_y);
    return {place(d.in), place(d.in_bias), place(d.out), place(d.out_bias), place(d.gain), place(d.shift)};
  }

  // In the order of blocks, whichever thread had them.
  void add_vectors(int64_t blocks, bool add) const {
    const int64_t h = call_.counts.hidden;
    const Gradients z = gradients_of(false), y = gradients_of(true);
    float* out[kVectors] = {z.in_bias, z.out_bias, z.gain, z.shift, y.in_bias, y.out_bias, y.gain, y.shift};
    for (int64_t v = 0; v < kVectors; ++v) {
      if (!add) std::fill_n(out[v], h, 0.0f);
      for (int64_t block = 0; block < blocks; ++block) {
        const float* from = sums_ + (block * kVectors + v) * h;
        for (int64_t i = 0; i < h; ++i) out[v][i] += from[i];
      }
    }
  }

  const Call& call_;
  const Division division_;
  const typename E::Stored* x_;
  typename E::Stored* d_[3];  // gradients of x, y and z
  const std::vector<Tensor>& gradients_;
  NetPair nets_;
  std::vector<Packing> packings_;
  std::vector<Scratch<E>> scratch_;
  Operands<E> operands_;
  Slots<E> act_z_, act_y_;
  float* sums_;          // [blocks, kVectors, hidden]
  const Memory memory_;  // last: it gives all of these their places
};

bool ready(bool bfloat16) {
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 && (!bfloat16 || __builtin_cpu_supports("avx512bf16"));
}

bool is_bfloat16(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::BFloat16; }

void forward(const Arguments& a, const Tensor& y, const Tensor& z) {
  const Call call = call_of(a);
  is_bfloat16(a.x) ? forward_in<BFloat16>(call, a.x, y, z) : forward_in<Float32>(call, a.x, y, z);
}

void backward(const Arguments& a, const CallGradients& d) {
  const Call call = call_of(a);
  is_bfloat16(a.x) ? Backward<BFloat16>(call, a.x, d).run() : Backward<Float32>(call, a.x, d).run();
}

}  // namespace
#else
namespace {
bool ready(bool) { return false; }
bool is_bfloat16(const Tensor&) { return false; }
void forward(const Arguments&, const Tensor&, const Tensor&) {}
void backward(const Arguments&, const CallGradients&) {}
}  // namespace
#endif

namespace {

using torch::headeronly::ScalarType;

bool states_fit(const Tensor& x, std::initializer_list<Tensor> others) {
  const ScalarType type = x.scalar_type();
  if ((type != ScalarType::Float && type != ScalarType::BFloat16) || x.dim() != 2) return false;
  bool fits = x.size(1) > 0 && x.is_contiguous();
  for (const Tensor& other : others) fits = fits && trm_fast::is_plain(other, type, {x.size(0), x.size(1)});
  return fits;
}

// Six tensors for the network of z, which sees three states, and for that of y, which sees two.
bool weights_fit(const std::vector<Tensor>& weights, int64_t hidden) {
  if (weights.size() != 12) return false;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t place = i % 6, columns = place == 2 ? hidden : (i < 6 ? 3 : 2) * hidden;
    const bool fits = place == 0 || place == 2 ? trm_fast::is_plain(weights[i], ScalarType::Float, {hidden, columns})
                                               : trm_fast::is_plain(weights[i], ScalarType::Float, {hidden});
    if (!fits) return false;
  }
  return true;
}

// What is saved fills memory without gaps, for an even number of rows.
bool saved_fits(const Arguments& a) {
  const int64_t rounds = static_cast<int64_t>(a.scales.size());
  if (a.steps < 1 || a.steps >= std::numeric_limits<int32_t>::max()) return false;
  if (rounds < 1 || a.grad_rounds < 0 || a.grad_rounds > rounds) return false;
  if (a.grad_rounds == 0) return true;
  const int64_t rows = a.x.size(0) + a.x.size(0) % 2, hidden = a.x.size(1);
  const int64_t updates = trm_fast::product({a.grad_rounds, a.steps + 1}), kept = a.kept.numel() > 0 ? updates : 0;
  const ScalarType type = a.x.scalar_type();
  return updates > 0 && trm_fast::is_flat(a.states, type, trm_fast::product({updates + 1, rows, hidden})) &&
         trm_fast::is_flat(a.kept, type, trm_fast::product({3, kept, rows, hidden})) &&
         trm_fast::is_flat(a.norms, ScalarType::Float, trm_fast::product({kept, rows}));
}

bool is_disjoint(const Arguments& a, std::initializer_list<Tensor> states, const std::vector<Tensor>& gradients) {
  trm_fast::Memory memory;
  memory.reads(a.x);
  memory.reads(a.weights);
  // The backward pass only reads what is saved, but nothing of it may be part of another tensor either.
  for (const Tensor& tensor : {a.states, a.kept, a.norms}) memory.writes(tensor);
  for (const Tensor& tensor : states) memory.writes(tensor);
  memory.writes(gradients);
  return memory.is_disjoint();
}

void check(const Arguments& a, std::initializer_list<Tensor> states, const std::vector<Tensor>& gradients) {
  const bool fits = states_fit(a.x, states) && weights_fit(a.weights, a.x.size(1)) && saved_fits(a) &&
                    (gradients.empty() || weights_fit(gradients, a.x.size(1))) && is_disjoint(a, states, gradients);
  STD_TORCH_CHECK(fits,
                  "vector_latent_update: needs contiguous float32 or bfloat16 states, float32 weights and counts "
                  "that fit, and memory of its own for what it writes");
  STD_TORCH_CHECK(ready(is_bfloat16(a.x)),
                  "vector_latent_update: needs a CPU with AVX-512, and AVX512-BF16 for bfloat16");
  STD_TORCH_CHECK(a.x.size(1) % 32 == 0, "vector_latent_update: needs a hidden size in multiples of 32");
}

// The arguments of both are those of their schemas.
void vector_latent_update_forward(Tensor x, Tensor y, Tensor z, std::vector<Tensor> weights, std::vector<double> scales,
                                  int64_t steps, int64_t grad_rounds, Tensor states, Tensor kept, Tensor norms) {
  const Arguments arguments{x, weights, scales, steps, grad_rounds, states, kept, norms};
  check(arguments, {y, z}, {});
  forward(arguments, y, z);
}

void vector_latent_update_backward(Tensor x, std::vector<Tensor> weights, std::vector<double> scales, int64_t steps,
                                   int64_t grad_rounds, Tensor states, Tensor kept, Tensor norms, Tensor dx, Tensor dy,
                                   Tensor dz, std::vector<Tensor> gradients) {
  const Arguments arguments{x, weights, scales, steps, grad_rounds, states, kept, norms};
  STD_TORCH_CHECK(grad_rounds > 0 && !gradients.empty(),
                  "vector_latent_update: a backward pass needs rounds with gradients, and room for those of weights");
  check(arguments, {dx, dy, dz}, gradients);
  backward(arguments, {dx, dy, dz, gradients});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trm_fast, CPU, m) {
  m.impl("vector_latent_update_forward_", TORCH_BOX(&vector_latent_update_forward));
  m.impl("vector_latent_update_backward_", TORCH_BOX(&vector_latent_update_backward));
}
STABLE_TORCH_LIBRARY_IMPL(trm_fast, CompositeExplicitAutograd, m) {
  m.impl("vector_latent_update_cpu_ready", TORCH_BOX(&ready));
}
